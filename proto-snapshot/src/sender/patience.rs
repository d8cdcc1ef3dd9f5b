//! How long is waited: for the receiver on one stream, and with failures before the transfer is given up.

use std::future::Future;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto_common::error::Error;
use tokio::time::Instant;

use crate::reason::Reason;

/// Bounds waits for a receiver by the time in which nothing moves, however long they last.
#[derive(Debug)]
pub(super) struct Quiet {
    idle: Duration,
    since: Mutex<Instant>,
}

impl Quiet {
    pub(super) fn new(idle: Duration) -> Self {
        Self { idle, since: Mutex::new(Instant::now()) }
    }

    /// Something moved: waits start over.
    pub(super) fn moved(&self) {
        *lock(&self.since) = Instant::now();
    }

    /// Waits for `future` until nothing has [moved](Self::moved) for the idle time: then `IDLE_TIMEOUT`, which is retryable.
    pub(super) async fn bound<T>(&self, what: &str, future: impl Future<Output = T>) -> Result<T, Error> {
        let mut future = pin!(future);
        self.moved();
        loop {
            let end = *lock(&self.since) + self.idle;
            tokio::select! {
                biased;
                done = &mut future => return Ok(done),
                () = tokio::time::sleep_until(end) => {}
            }
            if *lock(&self.since) + self.idle <= end {
                return Err(Reason::IdleTimeout.error(format!(
                    "waiting for {what}, nothing moved at the receiver for {:?}",
                    self.idle
                )));
            }
        }
    }
}

/// How long a transfer has been failing since its last progress. Time in which something happens is not held against it.
#[derive(Debug, Default)]
pub(super) struct Patience {
    failing: Mutex<Failing>,
}

#[derive(Debug, Default)]
struct Failing {
    /// The last failure, while nothing has happened since.
    since: Option<Instant>,
    spent: Duration,
}

impl Patience {
    /// An attempt failed; returns the time that was spent failing since the last progress, which is 0 at the first.
    pub(super) fn failed(&self) -> Duration {
        let mut failing = lock(&self.failing);
        failing.stop();
        failing.since = Some(Instant::now());
        failing.spent
    }

    /// Something happens: either side reads, bytes flow, the receiver answers.
    pub(super) fn active(&self) {
        lock(&self.failing).stop();
    }

    /// Bytes became durable that never were before.
    pub(super) fn progressed(&self) {
        *lock(&self.failing) = Failing::default();
    }
}

impl Failing {
    fn stop(&mut self) {
        if let Some(since) = self.since.take() {
            self.spent += since.elapsed();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_time_between_a_failure_and_the_next_sign_of_life_counts() {
        let (patience, second) = (Patience::default(), Duration::from_secs(1));
        tokio::time::advance(1000 * second).await;
        assert_eq!(patience.failed(), Duration::ZERO, "the first failure starts the count");
        tokio::time::advance(second).await;
        assert_eq!(patience.failed(), second);
        tokio::time::advance(second).await;
        patience.active();
        tokio::time::advance(1000 * second).await;
        assert_eq!(patience.failed(), 2 * second);
        patience.progressed();
        assert_eq!(patience.failed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_lasts_while_something_moves_and_no_longer() {
        let quiet = Quiet::new(Duration::from_secs(10));
        let start = Instant::now();
        let moving = async {
            for _ in 0..5 {
                tokio::time::sleep(Duration::from_secs(9)).await;
                quiet.moved();
            }
            std::future::pending::<()>().await;
        };
        let waited = quiet.bound("a test", std::future::pending::<()>());
        let error = tokio::select! { waited = waited => waited.unwrap_err(), () = moving => unreachable!() };
        assert!(error.is(Reason::IdleTimeout) && error.is_retryable(), "{error:?}");
        assert_eq!(start.elapsed(), Duration::from_secs(55));
    }
}

//! Trying again, later and later, as long as the error allows it.

use std::future::Future;
use std::time::Duration;

use crate::error::Error;

/// A peer's wish to wait is followed up to this long: a wrong one must not stop a task for ever.
pub const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// How to wait between attempts: exponentially longer, with jitter, so that many callers that failed together do not come back together.
///
/// ```
/// # use std::time::Duration;
/// # use proto_common::error::{CommonReason, Error};
/// use proto_common::retry::Backoff;
/// let mut backoff = Backoff::default().start();
/// let broken = Error::new(CommonReason::Unavailable, "connection refused");
/// assert!(backoff.next(&broken).is_some());
/// let stale = Error::new(CommonReason::StaleFence, "not the leader any more");
/// assert_eq!(backoff.next(&stale), None);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Backoff {
    /// Longest wait after the first failure. Default 100 ms.
    pub initial: Duration,
    /// Longest wait after any failure. Default 10 s.
    pub max: Duration,
    /// Each wait is up to this many times the one before; values below 1 count as 1. Default 2.
    pub factor: f64,
    /// Which part of each wait is random, 0 to 1. Default 1: anything from nothing to the whole wait ("full jitter").
    pub jitter: f64,
    /// How often to try again; `None` means for as long as the error allows it. Default `None`.
    pub retries: Option<u32>,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            initial: Duration::from_millis(100),
            max: Duration::from_secs(10),
            factor: 2.0,
            jitter: 1.0,
            retries: None,
        }
    }
}

impl Backoff {
    /// A fresh sequence of waits.
    #[must_use]
    pub fn start(&self) -> BackoffState {
        BackoffState { policy: self.clone(), ceiling: self.initial.min(self.max), failures: 0 }
    }
}

/// Where one caller is in its sequence of waits.
#[derive(Debug, Clone)]
pub struct BackoffState {
    policy: Backoff,
    /// Longest next wait.
    ceiling: Duration,
    failures: u32,
}

impl BackoffState {
    /// How long to wait before trying again after `error`; `None` if it is [final](Error::is_retryable) or tried often enough.
    ///
    /// At least [`retry_after_hint`](Error::retry_after_hint) (but see [`MAX_RETRY_AFTER`]), plus up to a tenth of it.
    pub fn next(&mut self, error: &Error) -> Option<Duration> {
        let spent = self.policy.retries.is_some_and(|retries| self.failures >= retries);
        if spent || !error.is_retryable() {
            return None;
        }
        self.failures = self.failures.saturating_add(1);
        let ceiling = self.ceiling;
        let factor = if self.policy.factor >= 1.0 { self.policy.factor } else { 1.0 };
        self.ceiling = scaled(ceiling, factor).min(self.policy.max);
        let jitter = if self.policy.jitter.is_nan() { 1.0 } else { self.policy.jitter.clamp(0.0, 1.0) };
        // Rounding may have taken it beyond the ceiling.
        let wait = scaled(ceiling, 1.0 - jitter * fastrand::f64()).min(ceiling);
        let Some(hint) = error.retry_after_hint() else { return Some(wait) };
        let hint = hint.min(MAX_RETRY_AFTER);
        Some(wait.max(hint + scaled(hint, 0.1 * fastrand::f64())))
    }

    /// How many failures there were since the start, or since the last [`reset`](Self::reset).
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Starts over, once something has succeeded: data moved, not just a connection opened.
    pub fn reset(&mut self) {
        *self = self.policy.start();
    }
}

fn scaled(duration: Duration, factor: f64) -> Duration {
    Duration::try_from_secs_f64(duration.as_secs_f64() * factor).unwrap_or(Duration::MAX)
}

/// Calls `operation` until it succeeds, fails for good, or has been tried often enough.
///
/// Cancel safe as far as `operation` is: dropping the future stops it, or the wait.
///
/// # Errors
///
/// The last error of `operation`.
pub async fn retry<T, F, Fut>(backoff: &Backoff, mut operation: F) -> Result<T, Error>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, Error>>,
{
    let mut state = backoff.start();
    loop {
        let error = match operation().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let Some(wait) = state.next(&error) else { return Err(error) };
        tracing::debug!(error = %error, reason = error.reason(), failures = state.failures(), ?wait, "trying again");
        tokio::time::sleep(wait).await;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::time::Instant;

    use super::*;
    use crate::error::{Code, CommonReason};

    fn broken() -> Error {
        Error::new(CommonReason::Unavailable, "x")
    }

    #[test]
    fn without_jitter_the_waits_double_up_to_the_limit() {
        let backoff = Backoff { jitter: 0.0, max: Duration::from_millis(500), ..Backoff::default() };
        let mut state = backoff.start();
        let mut waits = || (0..5).map(|_| state.next(&broken()).unwrap().as_millis()).collect::<Vec<_>>();
        assert_eq!(waits(), [100, 200, 400, 500, 500]);
        state.reset();
        assert_eq!(state.failures(), 0);
        assert_eq!(state.next(&broken()), Some(Duration::from_millis(100)));
    }

    #[test]
    fn full_jitter_uses_the_whole_range() {
        let mut state = Backoff { factor: 1.0, ..Backoff::default() }.start();
        let waits: Vec<_> = (0..1000).map(|_| state.next(&broken()).unwrap()).collect();
        assert!(waits.iter().all(|&wait| wait <= Duration::from_millis(100)));
        assert!(waits.iter().any(|&wait| wait < Duration::from_millis(20)));
        assert!(waits.iter().any(|&wait| wait > Duration::from_millis(80)));
    }

    #[test]
    fn a_hint_is_followed_within_reason() {
        let mut state = Backoff::default().start();
        let hint =
            |secs| Error::with_code(Code::ResourceExhausted, "X", "x").retry_after(Duration::from_secs(secs));
        let wait = state.next(&hint(60)).unwrap();
        assert!((60.0..=66.0).contains(&wait.as_secs_f64()), "{wait:?}");
        assert!(state.next(&hint(u64::MAX)).unwrap() <= MAX_RETRY_AFTER.mul_f64(1.1));
    }

    #[test]
    fn final_errors_and_spent_retries_end_it() {
        let mut state = Backoff { retries: Some(2), ..Backoff::default() }.start();
        assert_eq!(state.next(&Error::new(CommonReason::Superseded, "x")), None);
        assert!(state.next(&broken()).is_some());
        assert!(state.next(&broken()).is_some());
        assert_eq!(state.next(&broken()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn retries_until_it_works() {
        let start = Instant::now();
        let mut calls = 0;
        let backoff = Backoff { jitter: 0.0, ..Backoff::default() };
        let result = retry(&backoff, || {
            calls += 1;
            let result = if calls < 4 { Err(broken()) } else { Ok(calls) };
            async move { result }
        });
        assert_eq!(result.await, Ok(4));
        assert_eq!(start.elapsed().as_millis(), 100 + 200 + 400);
    }

    #[tokio::test(start_paused = true)]
    async fn returns_a_final_error_at_once() {
        let start = Instant::now();
        let mut calls = 0;
        let result: Result<(), _> = retry(&Backoff::default(), || {
            calls += 1;
            async { Err(Error::new(CommonReason::NotFound, "x")) }
        })
        .await;
        assert_eq!(result.unwrap_err().reason(), "NOT_FOUND");
        assert_eq!((calls, start.elapsed()), (1, Duration::ZERO));
    }

    proptest! {
        #[test]
        fn no_policy_panics_or_exceeds_its_maximum(
            initial in any::<Duration>(),
            max in any::<Duration>(),
            factor in any::<f64>(),
            jitter in any::<f64>(),
        ) {
            let mut state = Backoff { initial, max, factor, jitter, retries: None }.start();
            for _ in 0..20 {
                prop_assert!(state.next(&broken()).unwrap() <= max);
            }
        }
    }
}

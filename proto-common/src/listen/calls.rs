//! The calls that one peer may make in a second, over all of its connections.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::limits::ConnectionLimits;

/// A bucket of tokens, one for each call. All that has to be known of it is when it is full again.
#[derive(Debug)]
pub(super) struct Calls {
    /// Time in which one token comes.
    every: Duration,
    /// Time in which an empty bucket gets full.
    burst: Duration,
    full: Mutex<Instant>,
}

impl Calls {
    /// A full one.
    pub(super) fn new(limits: &ConnectionLimits) -> Self {
        let every = Duration::from_secs(1) / limits.calls_per_peer.max(1);
        Self { every, burst: every * limits.calls_burst_per_peer, full: Mutex::new(Instant::now()) }
    }

    /// Takes the next token; from when on it is there. Whoever has to wait takes it all the same, so those that wait have their turns one after the other.
    pub(super) fn take(&self, now: Instant) -> Instant {
        let mut full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        *full = now.max(*full) + self.every;
        now + full.saturating_duration_since(now).saturating_sub(self.burst)
    }

    /// Gives back a token that was taken and whose time has not come.
    pub(super) fn give_back(&self) {
        let mut full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        *full = full.checked_sub(self.every).unwrap_or(*full);
    }

    /// When nothing has been taken of it any more.
    pub(super) fn full(&self) -> Instant {
        *self.full.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calls(each_second: u32, burst: u32) -> Calls {
        Calls::new(&ConnectionLimits {
            calls_per_peer: each_second,
            calls_burst_per_peer: burst,
            ..ConnectionLimits::default()
        })
    }

    const SECOND: Duration = Duration::from_secs(1);

    /// After how many milliseconds each of `count` may be made.
    fn waits(calls: &Calls, now: Instant, count: usize) -> Vec<u128> {
        (0..count).map(|_| calls.take(now).saturating_duration_since(now).as_millis()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_and_then_one_after_the_other() {
        let (calls, now) = (calls(10, 3), Instant::now());
        assert_eq!(waits(&calls, now, 5), [0, 0, 0, 100, 200]);
        // Half of a burst has come back, and the two that waited are paid for.
        assert_eq!(waits(&calls, now + SECOND * 2 / 5, 3), [0, 0, 100]);
        assert_eq!(calls.full(), now + SECOND * 8 / 10);
        // It gets no fuller than full.
        assert_eq!(waits(&calls, now + SECOND * 100, 5), [0, 0, 0, 100, 200]);
    }

    #[tokio::test(start_paused = true)]
    async fn any_number_is_a_limit() {
        let now = Instant::now();
        assert_eq!(waits(&calls(u32::MAX, u32::MAX), now, 1000), [0; 1000]);
        assert_eq!(waits(&calls(1, u32::MAX), now, 1000), [0; 1000]);
        assert_eq!(waits(&calls(0, 0), now, 2), [1000, 2000]);
        // As many as there are no nanoseconds for: no limit.
        assert_eq!(waits(&calls(u32::MAX, 0), now, 1000), [0; 1000]);
    }
}

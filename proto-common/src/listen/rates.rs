//! What one peer may send in a second, over all of its connections: calls, and frames that cost more than they carry.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::limits::ConnectionLimits;

/// What takes a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Call,
    /// A frame that begins no call and carries little or no data.
    Frame,
}

impl Kind {
    /// What one that has to wait is counted as.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Call => "TOO_MANY_CALLS_OF_PEER",
            Self::Frame => "TOO_MANY_FRAMES_OF_PEER",
        }
    }
}

/// The buckets of one peer.
#[derive(Debug)]
pub(super) struct Rates {
    calls: Bucket,
    frames: Bucket,
}

impl Rates {
    /// Full ones.
    pub(super) fn new(limits: &ConnectionLimits) -> Self {
        Self {
            calls: Bucket::new(limits.calls_per_peer, limits.calls_burst_per_peer),
            frames: Bucket::new(limits.frames_per_peer, limits.frames_burst_per_peer),
        }
    }

    pub(super) fn of(&self, kind: Kind) -> &Bucket {
        match kind {
            Kind::Call => &self.calls,
            Kind::Frame => &self.frames,
        }
    }

    /// When nothing has been taken of them any more.
    pub(super) fn full(&self) -> Instant {
        self.calls.full().max(self.frames.full())
    }
}

/// A bucket of tokens. All that has to be known of it is when it is full again.
#[derive(Debug)]
pub(crate) struct Bucket {
    /// Time in which one token comes.
    every: Duration,
    /// Time in which an empty bucket gets full.
    burst: Duration,
    full: Mutex<Instant>,
}

impl Bucket {
    /// A full one.
    pub(crate) fn new(each_second: u32, burst: u32) -> Self {
        let every = Duration::from_secs(1) / each_second.max(1);
        Self { every, burst: every * burst, full: Mutex::new(Instant::now()) }
    }

    /// Takes the next token; from when on it is there. Whoever has to wait takes it all the same, so those that wait have their turns one after the other.
    pub(crate) fn take(&self, now: Instant) -> Instant {
        let mut full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        *full = now.max(*full) + self.every;
        now + full.saturating_duration_since(now).saturating_sub(self.burst)
    }

    /// Gives back a token that was taken, such as one whose time has not come. A full bucket gets no fuller.
    pub(crate) fn give_back(&self) {
        let mut full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        *full = full.checked_sub(self.every).unwrap_or(*full);
    }

    /// When nothing has been taken of it any more.
    pub(crate) fn full(&self) -> Instant {
        *self.full.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// After how many milliseconds each of `count` has its token.
    fn waits(bucket: &Bucket, now: Instant, count: usize) -> Vec<u128> {
        (0..count).map(|_| bucket.take(now).saturating_duration_since(now).as_millis()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_and_then_one_after_the_other() {
        let (bucket, now) = (Bucket::new(10, 3), Instant::now());
        assert_eq!(waits(&bucket, now, 5), [0, 0, 0, 100, 200]);
        // Half of a burst has come back, and the two that waited are paid for.
        assert_eq!(waits(&bucket, now + SECOND * 2 / 5, 3), [0, 0, 100]);
        assert_eq!(bucket.full(), now + SECOND * 8 / 10);
        // It gets no fuller than full.
        assert_eq!(waits(&bucket, now + SECOND * 100, 5), [0, 0, 0, 100, 200]);
    }

    #[tokio::test(start_paused = true)]
    async fn any_number_is_a_limit() {
        let now = Instant::now();
        assert_eq!(waits(&Bucket::new(u32::MAX, u32::MAX), now, 1000), [0; 1000]);
        assert_eq!(waits(&Bucket::new(1, u32::MAX), now, 1000), [0; 1000]);
        assert_eq!(waits(&Bucket::new(0, 0), now, 2), [1000, 2000]);
        // As many as there are no nanoseconds for: no limit.
        assert_eq!(waits(&Bucket::new(u32::MAX, 0), now, 1000), [0; 1000]);
    }
}

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
    frames_at_once: u32,
}

impl Rates {
    /// Frames for which a connection takes tokens at once, at most: so few of each burst that all connections of a peer may have some left. What has to wait then comes in as many at once, for
    /// which there is one turn of the runtime and one answer on the socket: 20,000 pings in a second on 240 connections take 0.06 of a core, and with one token for each they took 0.35.
    const FRAMES_AT_ONCE: u32 = 32;

    /// Full ones.
    pub(super) fn new(limits: &ConnectionLimits) -> Self {
        Self {
            calls: Bucket::new(limits.calls_per_peer, limits.calls_burst_per_peer),
            frames: Bucket::new(limits.frames_per_peer, limits.frames_burst_per_peer),
            frames_at_once: (limits.frames_burst_per_peer / 1024).clamp(1, Self::FRAMES_AT_ONCE),
        }
    }

    pub(super) fn of(&self, kind: Kind) -> &Bucket {
        match kind {
            Kind::Call => &self.calls,
            Kind::Frame => &self.frames,
        }
    }

    /// How many tokens a connection takes at once.
    pub(super) fn at_once(&self, kind: Kind) -> u32 {
        match kind {
            Kind::Call => 1,
            Kind::Frame => self.frames_at_once,
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

    /// Takes the next `count` tokens; from when on they are there. Whoever has to wait takes them all the same, so those that wait have their turns one after the other.
    pub(crate) fn take(&self, now: Instant, count: u32) -> Instant {
        let mut full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        *full = now.max(*full) + self.every * count;
        now + full.saturating_duration_since(now).saturating_sub(self.burst)
    }

    /// Gives back `count` tokens that were taken, such as those whose time has not come. A full bucket gets no fuller.
    pub(crate) fn give_back(&self, count: u32) {
        let mut full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        *full = full.checked_sub(self.every * count).unwrap_or(*full);
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
        (0..count).map(|_| bucket.take(now, 1).saturating_duration_since(now).as_millis()).collect()
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

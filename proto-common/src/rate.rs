//! A limit of bytes per second that can change while others wait for it.
//!
//! Own code, because none of the token buckets at hand (`governor`, `leaky-bucket`, `async-speed-limit`) combines a rate that
//! changes at run time, requests larger than the bucket, and tokio's clock.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex as FairMutex, Notify};
use tokio::time::{Instant, timeout};

const NANOS_PER_SECOND: i128 = 1_000_000_000;

/// What may be sent at once after a pause: as much as the rate allows in 100 ms. Less would have a sender wait for timers, which tell milliseconds, and more would be seen
/// by others at the same link.
const BURST: Duration = Duration::from_millis(100);

/// A token bucket of bytes. Clones share the same bucket.
///
/// Within any time `t`, at most `rate * (t + 100 ms)` bytes pass, plus what [`charge`](Self::charge) let through.
///
/// Waiters are served in the order in which they came, the urgent ones ([`acquire_urgent`](Self::acquire_urgent)) first.
#[derive(Debug, Clone)]
pub struct RateLimiter {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    bucket: Mutex<Bucket>,
    /// Held while waiting for tokens by an urgent caller, and while taking them by any.
    turn: FairMutex<()>,
    /// Held by the ordinary caller that is next.
    ordinary: FairMutex<()>,
    /// Somebody waits for tokens at a rate that has changed.
    changed: Notify,
}

#[derive(Debug)]
struct Bucket {
    rate: Option<NonZeroU64>,
    /// In billionths of a byte, so that nothing is lost to rounding; negative after [`RateLimiter::charge`].
    level: i128,
    /// When `level` was right.
    at: Instant,
}

impl RateLimiter {
    /// A limiter that lets everything pass, until [`set_rate`](Self::set_rate).
    #[must_use]
    pub fn unlimited() -> Self {
        Self::with_rate(None)
    }

    /// A limiter with a full bucket.
    #[must_use]
    pub fn new(bytes_per_second: NonZeroU64) -> Self {
        Self::with_rate(Some(bytes_per_second))
    }

    /// A limiter with a full bucket, or without a limit.
    #[must_use]
    pub fn with_rate(bytes_per_second: Option<NonZeroU64>) -> Self {
        let mut bucket = Bucket { rate: bytes_per_second, level: 0, at: Instant::now() };
        bucket.level = bucket.burst();
        Self {
            shared: Arc::new(Shared {
                bucket: Mutex::new(bucket),
                turn: FairMutex::new(()),
                ordinary: FairMutex::new(()),
                changed: Notify::new(),
            }),
        }
    }

    /// The limit, if there is one.
    #[must_use]
    pub fn rate(&self) -> Option<NonZeroU64> {
        self.bucket().rate
    }

    /// Changes the limit, or removes it. Whoever waits goes on at the new rate at once.
    pub fn set_rate(&self, bytes_per_second: Option<NonZeroU64>) {
        let mut bucket = self.bucket();
        bucket.refill();
        bucket.rate = bytes_per_second;
        bucket.level = bucket.level.min(bucket.burst());
        drop(bucket);
        // At most two wait for tokens at a time: the next ordinary caller and the next urgent one. The permit
        // reaches one that is just about to wait; a spurious one only makes it look again.
        self.shared.changed.notify_waiters();
        self.shared.changed.notify_one();
    }

    /// Waits until `bytes` may be sent, and returns how long that took.
    ///
    /// `bytes` may be more than the bucket holds: it then gathers all of them first. Cancel safe: a dropped future gives back what
    /// it had gathered, as far as the bucket holds it.
    pub async fn acquire(&self, bytes: u64) -> Duration {
        if self.rate().is_none() {
            return Duration::ZERO;
        }
        let start = Instant::now();
        let _next = self.shared.ordinary.lock().await;
        let mut share = Share::new(self, bytes);
        loop {
            let turn = self.shared.turn.lock().await;
            let Some(pause) = share.gather() else { return start.elapsed() };
            // Waiting without the turn lets urgent callers pass.
            drop(turn);
            self.wait(pause).await;
        }
    }

    /// As [`acquire`](Self::acquire), ahead of all ordinary callers, also of those that have waited for longer.
    /// Cancel safe.
    ///
    /// Urgent callers that use up the whole rate leave nothing to the others.
    pub async fn acquire_urgent(&self, bytes: u64) -> Duration {
        if self.rate().is_none() {
            return Duration::ZERO;
        }
        let start = Instant::now();
        let _turn = self.shared.turn.lock().await;
        let mut share = Share::new(self, bytes);
        while let Some(pause) = share.gather() {
            self.wait(pause).await;
        }
        start.elapsed()
    }

    /// Counts `bytes` that are sent without waiting; later callers wait for them.
    pub fn charge(&self, bytes: u64) {
        let mut bucket = self.bucket();
        if bucket.rate.is_some() {
            bucket.refill();
            bucket.level = bucket.level.saturating_sub(nano_bytes(bytes));
        }
    }

    async fn wait(&self, pause: Duration) {
        // tokio's timer has milliseconds and wakes late rather than early; looking again is cheap either way.
        let _ = timeout(pause, self.shared.changed.notified()).await;
    }

    fn bucket(&self) -> MutexGuard<'_, Bucket> {
        self.shared.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one caller has of what it wants, in billionths of a byte.
struct Share<'a> {
    limiter: &'a RateLimiter,
    gathered: i128,
    missing: i128,
}

impl<'a> Share<'a> {
    fn new(limiter: &'a RateLimiter, bytes: u64) -> Self {
        Self { limiter, gathered: 0, missing: nano_bytes(bytes) }
    }

    /// Takes what is there; then says when to look again, or `None` if nothing is missing.
    fn gather(&mut self) -> Option<Duration> {
        let mut bucket = self.limiter.bucket();
        bucket.refill();
        let rate = i128::from(bucket.rate?.get());
        let there = self.missing.min(bucket.level).max(0);
        bucket.level -= there;
        self.gathered += there;
        self.missing -= there;
        if self.missing == 0 {
            return None;
        }
        // Half a bucket at a time: a full one would lose what comes in while we wake up late.
        let next = self.missing.min((bucket.burst() / 2).max(1)).saturating_sub(bucket.level);
        let nanos = next / rate + i128::from(next % rate != 0);
        Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        let mut bucket = self.limiter.bucket();
        if self.missing > 0 && bucket.rate.is_some() {
            let burst = bucket.burst();
            bucket.level = bucket.level.saturating_add(self.gathered).min(burst.max(bucket.level));
        }
    }
}

impl Bucket {
    /// Adds what came in since the last time.
    fn refill(&mut self) {
        let now = Instant::now();
        let nanos = i128::try_from(now.saturating_duration_since(self.at).as_nanos()).unwrap_or(i128::MAX);
        self.at = now;
        let gained = nanos.saturating_mul(self.rate.map_or(0, |rate| rate.get().into()));
        self.level = self.level.saturating_add(gained).min(self.burst());
    }

    fn burst(&self) -> i128 {
        let rate = self.rate.map_or(0, |rate| i128::from(rate.get()));
        i128::try_from(BURST.as_nanos()).unwrap_or(0).saturating_mul(rate)
    }
}

fn nano_bytes(bytes: u64) -> i128 {
    i128::from(bytes) * NANOS_PER_SECOND
}

#[cfg(test)]
#[path = "rate_tests.rs"]
mod tests;

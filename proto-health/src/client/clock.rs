//! Time as the monitor sees it, so that a test can make it.

use std::fmt::Debug;
use std::time::Duration;

use proto_common::clock::now_unix_ms;
use tokio::time::Instant;

/// A clock that never goes back.
pub trait Clock: Debug + Send + Sync + 'static {
    /// Time since some moment that stays the same.
    fn now(&self) -> Duration;

    /// Milliseconds since the Unix epoch, for people and for `PeerStatus`.
    fn unix_ms(&self) -> u64 {
        now_unix_ms()
    }
}

/// tokio's clock: the system's monotonic one, or the paused one of a test.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock(Instant);

impl Default for SystemClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

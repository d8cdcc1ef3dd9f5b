//! The least that a peer must bring to keep a place: silence is found by an idle timeout, a byte now and then is not.

use std::num::NonZeroU64;
use std::time::Duration;

use tokio::time::Instant;

/// Watches a count of bytes that has to rise by at least so many within each span of time.
#[derive(Debug)]
pub struct Pace {
    least: u64,
    within: Duration,
    since: Instant,
    bytes: u64,
}

impl Pace {
    /// Expects `least` bytes more than `bytes` within `within`, and so on. Of a peer that is asked for no more than `asked` bytes per second,
    /// half of that is enough.
    #[must_use]
    pub fn new(least: u64, within: Duration, asked: Option<NonZeroU64>, bytes: u64) -> Self {
        let half = asked.map_or(u64::MAX, |asked| {
            u64::try_from(u128::from(asked.get()) * within.as_millis() / 2000).unwrap_or(u64::MAX)
        });
        Self { least: least.min(half), within, since: Instant::now(), bytes }
    }

    /// When to [look](Self::is_kept) next.
    #[must_use]
    pub fn due(&self) -> Instant {
        self.since + self.within
    }

    /// Begins the next span with `bytes`; whether enough came in the last one.
    pub fn is_kept(&mut self, bytes: u64) -> bool {
        let brought = bytes.saturating_sub(self.bytes);
        self.restart(bytes);
        brought >= self.least
    }

    /// Begins anew with `bytes`, whatever came: the peer is not to blame for the time until now.
    pub fn restart(&mut self, bytes: u64) {
        self.since = Instant::now();
        self.bytes = bytes;
    }

    /// In words, for the peer.
    #[must_use]
    pub fn expected(&self) -> String {
        format!("{} bytes within {:?}", self.least, self.within)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_span_has_to_bring_its_share() {
        let mut pace = Pace::new(100, Duration::from_secs(10), None, 7);
        assert_eq!(pace.due() - Instant::now(), Duration::from_secs(10));
        tokio::time::advance(Duration::from_secs(10)).await;
        assert!(pace.is_kept(107));
        assert_eq!(pace.due() - Instant::now(), Duration::from_secs(10));
        assert!(!pace.is_kept(206));
        pace.restart(300);
        assert!(!pace.is_kept(399));
        // Who is asked for 8 bytes per second brings 80 in ten of them.
        let mut slow = Pace::new(100, Duration::from_secs(10), NonZeroU64::new(8), 0);
        assert_eq!(slow.expected(), "40 bytes within 10s");
        assert!(slow.is_kept(40) && !slow.is_kept(79));
        let short = Pace::new(100, Duration::from_millis(500), NonZeroU64::new(80), 0);
        assert_eq!(short.expected(), "20 bytes within 500ms");
    }
}

//! Wall-clock time as the messages carry it.

use std::time::{Duration, SystemTime};

/// Milliseconds since the Unix epoch, UTC, by this node's clock.
///
/// 0 if the clock is set before 1970. For intervals use [`std::time::Instant`]: this clock may jump.
#[must_use]
pub fn now_unix_ms() -> u64 {
    unix_ms(SystemTime::now())
}

/// `time` in milliseconds since the Unix epoch; 0 for a time before it.
#[must_use]
pub fn unix_ms(time: SystemTime) -> u64 {
    millis(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

/// Whole milliseconds of `duration`, `u64::MAX` if there are more.
#[must_use]
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saturates_at_both_ends() {
        let epoch = SystemTime::UNIX_EPOCH;
        assert_eq!(unix_ms(epoch - Duration::from_secs(1)), 0);
        assert_eq!(unix_ms(epoch + Duration::from_micros(1_999)), 1);
        assert_eq!(millis(Duration::MAX), u64::MAX);
        assert!(now_unix_ms() > 1_700_000_000_000);
    }
}

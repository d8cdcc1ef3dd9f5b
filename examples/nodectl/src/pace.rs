//! When the next line is due in a log that nobody wants to be flooded.

use std::time::{Duration, Instant};

/// Between two lines, at least, unless something happened.
const EVERY: Duration = Duration::from_secs(2);
/// The same once it takes long.
const EVERY_LATER: Duration = Duration::from_secs(10);
/// From when on it takes long.
const LONG: Duration = Duration::from_secs(60);
/// So many percent are something that happened.
const STEP: u64 = 10;

/// Decides which states become lines.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    first: Option<Instant>,
    last: Option<(Instant, String, u64)>,
}

impl Pace {
    /// Whether a line about this state is due: the first, one in another state, one that is a tenth further, or simply the
    /// next after a while. Counts it as written if so.
    pub(crate) fn is_due(&mut self, now: Instant, state: &str, percent: u64) -> bool {
        let first = *self.first.get_or_insert(now);
        let every = if now.saturating_duration_since(first) < LONG { EVERY } else { EVERY_LATER };
        let due = self.last.as_ref().is_none_or(|(at, before, done)| {
            before != state || percent.abs_diff(*done) >= STEP || now.saturating_duration_since(*at) >= every
        });
        if due {
            self.last = Some((now, state.to_owned(), percent));
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_and_tenths_at_once_the_rest_after_a_while() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut pace = Pace::default();
        assert!(pace.is_due(at(0), "pending", 0));
        assert!(!pace.is_due(at(100), "pending", 0));
        assert!(pace.is_due(at(200), "transferring", 0));
        assert!(!pace.is_due(at(300), "transferring", 9));
        assert!(pace.is_due(at(400), "transferring", 10));
        assert!(!pace.is_due(at(2399), "transferring", 19));
        assert!(pace.is_due(at(2400), "transferring", 19));
        assert!(pace.is_due(at(60_000), "transferring", 19));
        assert!(!pace.is_due(at(69_999), "transferring", 19));
        assert!(pace.is_due(at(70_000), "transferring", 19));
    }
}

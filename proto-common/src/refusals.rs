//! How often this process has refused something, by reason: the metric of every limit.
//!
//! Counted wherever an [`Error`](crate::Error) becomes a gRPC status, and where a connection is closed before there could be one. Bounded,
//! whatever peers do.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Reasons that are told apart; further ones are counted together as [`OTHER`]. More than all error tables have.
const MAX_REASONS: usize = 256;

/// What reasons beyond the 256th are counted as.
pub const OTHER: &str = "OTHER";

static COUNTS: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());

/// Counts one.
pub fn count(reason: &str) {
    let mut counts = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = counts.get_mut(reason) {
        *known += 1;
        return;
    }
    let reason = if counts.len() < MAX_REASONS { reason } else { OTHER };
    *counts.entry(reason.to_owned()).or_default() += 1;
}

/// How many of each there were since the process started.
#[must_use]
pub fn counts() -> BTreeMap<String, u64> {
    COUNTS.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// How many of this there were.
#[must_use]
pub fn count_of(reason: &str) -> u64 {
    COUNTS.lock().unwrap_or_else(PoisonError::into_inner).get(reason).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counted_by_reason_and_bounded() {
        for number in 0..MAX_REASONS + 50 {
            count(&format!("REASON_{number}"));
        }
        count("REASON_0");
        assert_eq!(count_of("REASON_0"), 2);
        assert!(counts().len() <= MAX_REASONS + 1);
        assert!(count_of(OTHER) >= 50);
    }
}

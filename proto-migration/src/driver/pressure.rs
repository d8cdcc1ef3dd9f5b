//! Whether the target keeps up, and what is done so that it does: its store hurries, and if that does not help, the writers of the moving slots are
//! slowed.
//!
//! Additive-increase, multiplicative-decrease turned round: the delay of a write grows by half as long as the lag is too large and does not
//! fall, and shrinks by a third once it does. But for the last moments before a freeze (`approach.rs`), writers run at full speed unless they outrun the target, and never wait longer than
//! [`MAX_DELAY`] for one write.

use std::time::Duration;

use crate::limits::TaskLimits;
use crate::source::LogState;

/// Time between two looks.
pub(super) const LOOK: Duration = Duration::from_millis(100);

/// Longest delay of one write: a client that waits for each reply is down to 10 writes per second then.
const MAX_DELAY: Duration = Duration::from_millis(100);

/// Shortest delay that has an effect; below it there is none.
const MIN_DELAY: Duration = Duration::from_micros(200);

/// Looks without progress after which a lag counts as not converging: 2 s.
const PATIENCE: u32 = 20;

/// Looks without progress after which the target's store hurries, for less than the noise of a busy machine is no reason: 0.3 s.
const HURRY: u32 = 3;

/// Looks at the lag, and decides.
#[derive(Debug, Clone, Default)]
pub(super) struct Pressure {
    delay: Duration,
    /// Changes, while they are late.
    lag: Stuck,
    /// Bytes of the log, while it is above its cap.
    log: Stuck,
}

/// Counts looks at what is too much and does not fall.
#[derive(Debug, Clone, Default)]
struct Stuck {
    least: Option<u64>,
    looks: u32,
}

impl Stuck {
    /// Looks at so much; a tenth less than the least so far is progress.
    fn look(&mut self, amount: u64, too_much: bool) -> u32 {
        if !too_much || self.least.is_none_or(|least| amount < least - least / 10) {
            self.least = too_much.then_some(amount);
            self.looks = 0;
        } else {
            self.looks = self.looks.saturating_add(1);
        }
        self.looks
    }
}

/// What follows from a look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) not_converging: bool,
    /// Whether the log has to be given up: it has been above its cap for 2 s without falling. One write, or a burst that is worked off, is no reason.
    pub(super) outgrown: bool,
    /// Whether the target's store is to let other work wait for the changes.
    pub(super) hurry: bool,
    /// For each write to the moving slots; zero without `slow_writers`.
    pub(super) delay: Duration,
}

impl Pressure {
    /// What the last look decided for each write.
    pub(super) fn delay(&self) -> Duration {
        self.delay
    }

    /// Takes a look. `copied`: all rows are at the target, so that a lag is not merely the price of the copy.
    pub(super) fn look(
        &mut self,
        log: &LogState,
        age: Duration,
        copied: bool,
        limits: &TaskLimits,
    ) -> Verdict {
        let near_cap = log.bytes > limits.log_bytes_cap / 4 * 3;
        let late = copied && (log.entries > limits.ready_lag_entries || age > limits.ready_lag);
        let late_for = self.lag.look(log.entries, late);
        let outgrown = self.log.look(log.bytes, log.bytes > limits.log_bytes_cap) >= PATIENCE;
        let not_converging = near_cap || late_for >= PATIENCE;
        self.delay = if not_converging && limits.slow_writers {
            (self.delay * 3 / 2).clamp(MIN_DELAY * 5, MAX_DELAY)
        } else if self.delay > MIN_DELAY && limits.slow_writers {
            self.delay * 2 / 3
        } else {
            Duration::ZERO
        };
        let hurry = not_converging || late_for >= HURRY;
        Verdict { not_converging, outgrown, hurry, delay: self.delay }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> TaskLimits {
        TaskLimits::from_wire(None, "limits").unwrap()
    }

    fn log(entries: u64, bytes: u64) -> LogState {
        LogState { entries, bytes, ..LogState::default() }
    }

    #[test]
    fn writers_run_free_while_the_target_keeps_up() {
        let mut pressure = Pressure::default();
        for entries in [0, 5000, 9000, 100, 0] {
            let verdict =
                pressure.look(&log(entries, entries * 100), Duration::from_millis(50), true, &limits());
            let free =
                Verdict { not_converging: false, outgrown: false, hurry: false, delay: Duration::ZERO };
            assert_eq!(verdict, free);
        }
        // A lag that falls is no reason, however large.
        for round in 0..100 {
            let entries = 1_000_000_u64 * 8_u64.pow(round.min(5)) / 10_u64.pow(round.min(5));
            if round <= 5 {
                assert!(
                    !pressure.look(&log(entries, 0), Duration::from_secs(1), true, &limits()).not_converging
                );
            }
        }
    }

    #[test]
    fn a_lag_that_does_not_fall_slows_writers_more_and_more_up_to_a_bound() {
        let mut pressure = Pressure::default();
        let mut look = |entries| pressure.look(&log(entries, 0), Duration::from_secs(1), true, &limits());
        let first = (0..).find(|_| look(50_000).hurry).unwrap();
        assert_eq!(first, HURRY, "the store hurries");
        let first = (HURRY + 1..).find(|_| look(50_000).not_converging).unwrap();
        assert_eq!(first, PATIENCE, "before anybody is slowed");
        let mut last = Duration::ZERO;
        for _ in 0..30 {
            let delay = look(50_000).delay;
            assert!(delay >= last && delay <= MAX_DELAY);
            last = delay;
        }
        assert_eq!(last, MAX_DELAY);
        // Caught up: the delay fades.
        let looks = (0..).find(|_| look(0).delay.is_zero()).unwrap();
        assert!((5..40).contains(&looks), "{looks}");
    }

    #[test]
    fn near_the_cap_also_while_copying() {
        let mut pressure = Pressure::default();
        let copying = pressure.look(&log(1_000_000, 0), Duration::from_secs(9), false, &limits());
        assert!(!copying.not_converging);
        let near = pressure.look(&log(1_000_000, 200 << 20), Duration::from_secs(9), false, &limits());
        assert!(near.not_converging && !near.delay.is_zero());
        let off = TaskLimits { slow_writers: false, ..limits() };
        let near = pressure.look(&log(1_000_000, 200 << 20), Duration::from_secs(9), false, &off);
        let unslowed = Verdict { not_converging: true, outgrown: false, hurry: true, delay: Duration::ZERO };
        assert_eq!(near, unslowed);
    }

    #[test]
    fn a_log_is_outgrown_when_it_stays_above_its_cap_and_not_by_a_burst() {
        let mut pressure = Pressure::default();
        let cap = limits().log_bytes_cap;
        let mut look = |bytes| pressure.look(&log(1, bytes), Duration::ZERO, false, &limits()).outgrown;
        for _ in 0..3 {
            // A large write, and one burst after the other that is worked off.
            assert!(!look(2 * cap));
            let mut bytes = 10 * cap;
            while bytes > cap / 2 {
                assert!(!look(bytes));
                bytes -= bytes / 9;
            }
        }
        let first = (0..).find(|_| look(cap + 1)).unwrap();
        assert_eq!(first, PATIENCE);
        assert!(!look(cap));
    }
}

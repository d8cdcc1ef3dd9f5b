//! Keeps tasks of one node that would touch the same slots apart.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{CommonReason, Error};
use crate::slots::SlotRange;

/// Hands out slot ranges, of which no two overlap. Clones share the same ranges.
///
/// One guard per node, asked by transfers and by migrations before they start.
#[derive(Debug, Clone, Default)]
pub struct RangeGuard {
    held: Arc<Mutex<Held>>,
}

#[derive(Debug, Default)]
struct Held {
    closed: bool,
    next: u64,
    holds: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    range: SlotRange,
    owner: Arc<str>,
    quarantined: bool,
}

impl RangeGuard {
    /// A guard that holds nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes `range` for `owner` (a text for people and logs, such as `transfer t1`) until the hold is dropped.
    ///
    /// # Errors
    ///
    /// `RANGE_BUSY` if somebody else, or the same owner, holds a slot of it; `SLOTS_QUARANTINED` if a slot of it is
    /// [quarantined](Self::quarantine); metadata `holder` and `held_slots`. `SHUTTING_DOWN` (retryable) after [`close`](Self::close).
    pub fn try_acquire(&self, range: SlotRange, owner: &str) -> Result<RangeHold, Error> {
        let mut held = lock(&self.held);
        if held.closed {
            let message = format!(
                "the node is about to stop, so slots {range} are not moved now; try again when it is back"
            );
            return Err(Error::new(CommonReason::ShuttingDown, message));
        }
        let overlapping = || held.holds.iter().filter(|other| other.range.overlaps(range));
        if let Some(damage) = overlapping().find(|other| other.quarantined) {
            let message = format!(
                "slots {range} cannot be moved: {} are quarantined because of {}; an operator has to look at it",
                damage.range, damage.owner
            );
            return Err(Error::new(CommonReason::SlotsQuarantined, message)
                .metadata("holder", &*damage.owner)
                .metadata("held_slots", damage.range.to_string()));
        }
        if let Some(other) = overlapping().next() {
            let message = format!(
                "slots {range} cannot be moved now: {} holds {}; wait until it ends, or cancel it",
                other.owner, other.range
            );
            return Err(Error::new(CommonReason::RangeBusy, message)
                .metadata("holder", &*other.owner)
                .metadata("held_slots", other.range.to_string()));
        }
        Ok(self.hold(&mut held, range, owner, false))
    }

    /// Keeps everybody off `range`, whoever holds slots of it already, until the hold is dropped: what is known of them cannot be trusted.
    /// `why` is a text for people and logs that names the damaged file or record.
    pub fn quarantine(&self, range: SlotRange, why: &str) -> RangeHold {
        self.hold(&mut lock(&self.held), range, why, true)
    }

    /// All that is [quarantined](Self::quarantine), and why.
    #[must_use]
    pub fn quarantines(&self) -> Vec<(SlotRange, Arc<str>)> {
        let held = lock(&self.held);
        let quarantined = held.holds.iter().filter(|entry| entry.quarantined);
        quarantined.map(|entry| (entry.range, Arc::clone(&entry.owner))).collect()
    }

    fn hold(&self, held: &mut Held, range: SlotRange, owner: &str, quarantined: bool) -> RangeHold {
        let number = held.next;
        held.next += 1;
        let owner: Arc<str> = owner.into();
        held.holds.push(Entry { number, range, owner: Arc::clone(&owner), quarantined });
        RangeHold { guard: self.clone(), number, range, owner }
    }

    /// Hands out nothing any more: the node is about to stop. Holds that are there stay.
    pub fn close(&self) {
        lock(&self.held).closed = true;
    }

    /// The owner of a hold that overlaps `range`, if there is one.
    #[must_use]
    pub fn holder(&self, range: SlotRange) -> Option<Arc<str>> {
        lock(&self.held).holds.iter().find(|e| e.range.overlaps(range)).map(|e| Arc::clone(&e.owner))
    }
}

/// A range of slots that nobody else gets while this lives.
#[must_use = "the range is free again as soon as this is dropped"]
pub struct RangeHold {
    guard: RangeGuard,
    number: u64,
    range: SlotRange,
    owner: Arc<str>,
}

impl RangeHold {
    /// The slots held.
    #[must_use]
    pub fn range(&self) -> SlotRange {
        self.range
    }

    /// Who holds them.
    #[must_use]
    pub fn owner(&self) -> &str {
        &self.owner
    }
}

impl Drop for RangeHold {
    fn drop(&mut self) {
        lock(&self.guard.held).holds.retain(|entry| entry.number != self.number);
    }
}

impl fmt::Debug for RangeHold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RangeHold").field("range", &self.range).field("owner", &self.owner).finish()
    }
}

/// No critical section above can leave the list half changed, so a panic elsewhere does no harm.
fn lock(held: &Mutex<Held>) -> MutexGuard<'_, Held> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(start: u16, end: u16) -> SlotRange {
        SlotRange::new(start, end).unwrap()
    }

    #[test]
    fn closed_it_hands_out_nothing_and_takes_nothing_back() {
        let guard = RangeGuard::new();
        let hold = guard.try_acquire(SlotRange::new(0, 5).unwrap(), "a").unwrap();
        guard.clone().close();
        let refused = guard.try_acquire(SlotRange::new(7, 9).unwrap(), "b").unwrap_err();
        assert!(refused.is(CommonReason::ShuttingDown) && refused.is_retryable(), "{refused:?}");
        assert_eq!(guard.holder(hold.range()).as_deref(), Some("a"));
    }

    #[test]
    fn a_quarantine_keeps_everybody_off_beside_whoever_is_there() {
        let guard = RangeGuard::new();
        let _there = guard.try_acquire(range(0, 10), "transfer t1").unwrap();
        let first = guard.quarantine(range(5, 20), "the damaged record a");
        let second = guard.quarantine(range(19, 30), "the damaged record b");
        let _held = guard.try_acquire(range(40, 50), "somebody").unwrap();
        let all = [(range(5, 20), "the damaged record a"), (range(19, 30), "the damaged record b")];
        assert_eq!(guard.quarantines(), all.map(|(range, why)| (range, why.into())));
        for (slots, file) in [(range(0, 6), "a"), (range(15, 16), "a"), (range(29, 40), "b")] {
            let refused = guard.try_acquire(slots, "migration m1").unwrap_err();
            assert!(refused.is(CommonReason::SlotsQuarantined) && !refused.is_retryable(), "{refused:?}");
            assert_eq!(refused.get("holder"), Some(format!("the damaged record {file}").as_str()));
        }
        assert!(guard.try_acquire(range(0, 5), "x").unwrap_err().is(CommonReason::RangeBusy));
        drop((first, second));
        let _free = guard.try_acquire(range(10, 30), "migration m1").unwrap();
    }

    #[test]
    fn overlapping_ranges_wait_for_each_other() {
        let guard = RangeGuard::new();
        let low = guard.try_acquire(range(0, 10), "transfer t1").unwrap();
        let error = guard.clone().try_acquire(range(9, 20), "migration m1").unwrap_err();
        assert_eq!(error.reason(), "RANGE_BUSY");
        assert!(error.is_retryable());
        assert_eq!(error.get("holder"), Some("transfer t1"));
        assert_eq!(error.get("held_slots"), Some("0-9"));
        let high = guard.try_acquire(range(10, 20), "migration m1").unwrap();
        drop(low);
        assert_eq!(guard.holder(range(0, 10)), None);
        assert!(guard.try_acquire(range(0, 11), "x").is_err(), "10 is still held by {high:?}");
        drop(high);
        let _all = guard.try_acquire(SlotRange::FULL, "x").unwrap();
    }

    #[test]
    fn a_panic_of_the_owner_releases() {
        let guard = RangeGuard::new();
        let theirs = guard.clone();
        let owner = std::thread::spawn(move || {
            let _hold = theirs.try_acquire(SlotRange::FULL, "x").unwrap();
            panic!("the owner fails");
        });
        assert!(owner.join().is_err());
        assert!(guard.try_acquire(SlotRange::FULL, "y").is_ok());
    }

    proptest! {
        #[test]
        fn no_slot_is_ever_held_twice(steps in prop::collection::vec((0_u16..20, 1_u16..20, any::<bool>()), 0..40)) {
            let guard = RangeGuard::new();
            let mut holds: Vec<RangeHold> = Vec::new();
            for (start, len, release) in steps {
                if release && !holds.is_empty() {
                    drop(holds.remove(usize::from(start) % holds.len()));
                } else {
                    let wanted = range(start, start + len);
                    let free = holds.iter().all(|hold| !hold.range().overlaps(wanted));
                    let got = guard.try_acquire(wanted, "x");
                    prop_assert_eq!(got.is_ok(), free);
                    holds.extend(got);
                }
            }
        }
    }
}

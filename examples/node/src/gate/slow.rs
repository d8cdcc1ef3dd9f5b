//! Writes to some slots that are delayed, so that whoever follows them keeps up.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::time::Instant;

use crate::common::SlotRange;

/// Slots whose writes are delayed.
#[derive(Debug, Clone, Default)]
pub(super) struct SlowSlots {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// How many delays are not zero: every write asks, and most of the time there are none.
    delays: AtomicUsize,
    entries: RwLock<Vec<Arc<Entry>>>,
}

#[derive(Debug)]
struct Entry {
    range: SlotRange,
    delay_us: AtomicU64,
    waited_us: AtomicU64,
}

impl SlowSlots {
    pub(super) fn add(&self, range: SlotRange) -> WriteDelay {
        let entry = Arc::new(Entry { range, delay_us: AtomicU64::new(0), waited_us: AtomicU64::new(0) });
        self.entries().push(Arc::clone(&entry));
        WriteDelay { slots: self.clone(), entry }
    }

    pub(super) fn of(&self, slot: u16) -> Option<SlowSlot> {
        if self.shared.delays.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let entries = self.shared.entries.read().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.iter().find(|entry| entry.range.contains(slot))?;
        let delay = Duration::from_micros(entry.delay_us.load(Ordering::Relaxed));
        (!delay.is_zero()).then(|| SlowSlot { entry: Arc::clone(entry), delay })
    }

    pub(super) async fn delay(&self, slot: u16) {
        if let Some(slow) = self.of(slot) {
            let waiting = Waiting { entry: slow.entry, since: Instant::now() };
            tokio::time::sleep(slow.delay).await;
            drop(waiting);
        }
    }

    fn entries(&self) -> std::sync::RwLockWriteGuard<'_, Vec<Arc<Entry>>> {
        self.shared.entries.write().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct SlowSlot {
    entry: Arc<Entry>,
    delay: Duration,
}

/// A writer that waits. Counted also when it gives up.
struct Waiting {
    entry: Arc<Entry>,
    since: Instant,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.entry.waited_us.fetch_add(micros(self.since.elapsed()), Ordering::Relaxed);
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// A delay of the writes to some slots. Dropping it ends that.
#[derive(Debug)]
#[must_use = "dropping it ends the delay"]
pub struct WriteDelay {
    slots: SlowSlots,
    entry: Arc<Entry>,
}

impl WriteDelay {
    /// Delays each write by so much from now on; zero: not at all.
    pub fn set(&self, delay: Duration) {
        // An entry counts for as long as it is not zero. One caller at a time changes it, so the two cannot differ for long.
        let before = self.entry.delay_us.swap(micros(delay), Ordering::Relaxed);
        match (before, micros(delay)) {
            (0, 1..) => self.slots.shared.delays.fetch_add(1, Ordering::Relaxed),
            (1.., 0) => self.slots.shared.delays.fetch_sub(1, Ordering::Relaxed),
            _ => 0,
        };
    }

    /// How long writers have waited, summed over all of them.
    #[must_use]
    pub fn waited(&self) -> Duration {
        Duration::from_micros(self.entry.waited_us.load(Ordering::Relaxed))
    }
}

impl Drop for WriteDelay {
    fn drop(&mut self) {
        self.set(Duration::ZERO);
        self.slots.entries().retain(|entry| !Arc::ptr_eq(entry, &self.entry));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_writes_to_slow_slots_wait() {
        let slots = SlowSlots::default();
        let delay = slots.add("10-19".parse().unwrap());
        let took = async |slot| {
            let begun = Instant::now();
            slots.delay(slot).await;
            begun.elapsed()
        };
        assert_eq!(took(15).await, Duration::ZERO);
        delay.set(Duration::from_millis(7));
        delay.set(Duration::from_millis(5));
        assert_eq!((took(15).await, took(9).await), (Duration::from_millis(5), Duration::ZERO));
        assert_eq!(delay.waited(), Duration::from_millis(5));
        delay.set(Duration::ZERO);
        assert_eq!(took(15).await, Duration::ZERO);
        delay.set(Duration::from_millis(5));
        drop(delay);
        assert_eq!(took(15).await, Duration::ZERO);
        assert!(slots.shared.delays.load(Ordering::Relaxed) == 0 && slots.entries().is_empty());
    }
}

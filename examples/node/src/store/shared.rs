//! What the writer thread and readers share: the database, and pictures of it in memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use redb::{Database, ReadableDatabase as _, ReadableTable as _};

use super::generations::{GenerationView, Generations};
use super::hurry::Hurry;
use super::leases::Leases;
use super::strain::Strain;
use super::txn::Effects;
use super::{StoreError, counters, lock, tables};
use crate::common::{SLOT_COUNT, SlotRange};

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) database: Database,
    pub(super) counts: SlotCounts,
    pub(super) generations: GenerationView,
    pub(super) leases: Leases,
    /// The last sequence that is committed.
    pub(super) last_seq: AtomicU64,
    /// Transactions that hold writes of clients, since the start.
    pub(super) client_writes: AtomicU64,
    /// Generations that are being imported: not referred to by anything durable, but no garbage.
    pub(super) importing: Mutex<Vec<(SlotRange, u32)>>,
    /// Migrations whose rows are staged in longer slices, before other work in the background.
    pub(super) hurry: Hurry,
    /// How long clients wait for their writes.
    pub(super) strain: Strain,
    /// Slots whose expired rows are left alone.
    pub(super) paused: Paused,
}

impl Shared {
    pub(super) fn load(database: Database) -> Result<Self, StoreError> {
        let txn = database.begin_read()?;
        let generations = Generations::load(&txn.open_table(tables::GENERATIONS)?)?;
        let counts = SlotCounts::new();
        for entry in txn.open_table(tables::SLOT_COUNTS)?.iter()? {
            let (place, count) = entry?;
            let (generation, slot) = place.value();
            if generations.of(slot) == generation {
                counts.set(slot, count.value());
            }
        }
        let last_seq = counters::last(&txn.open_table(tables::COUNTERS)?, counters::SEQUENCE)?;
        let leases = Leases::load(&database)?;
        Ok(Self {
            database,
            counts,
            generations: GenerationView::new(generations),
            leases,
            last_seq: AtomicU64::new(last_seq),
            client_writes: AtomicU64::new(0),
            importing: Mutex::default(),
            hurry: Hurry::default(),
            strain: Strain::default(),
            paused: Paused::default(),
        })
    }

    /// In the writer's thread, after the commit.
    pub(super) fn publish(&self, effects: Effects) {
        let Effects { counts, generations: _, log } = effects;
        for (slot, count) in counts {
            self.counts.set(slot, count);
        }
        self.last_seq.store(log.last_seq, Ordering::SeqCst);
        self.leases.publish(log);
    }
}

/// How many visible rows each slot has, in memory; equal to the table `slot_counts` at the last commit.
#[derive(Debug)]
pub(super) struct SlotCounts {
    counts: Box<[AtomicU64]>,
}

impl SlotCounts {
    fn new() -> Self {
        Self { counts: (0..SLOT_COUNT).map(|_| AtomicU64::new(0)).collect() }
    }

    fn set(&self, slot: u16, count: u64) {
        if let Some(counter) = self.counts.get(usize::from(slot)) {
            counter.store(count, Ordering::Relaxed);
        }
    }

    pub(super) fn sum(&self, range: SlotRange) -> u64 {
        let counters = &self.counts[usize::from(range.start())..usize::from(range.end())];
        counters.iter().map(|counter| counter.load(Ordering::Relaxed)).sum()
    }
}

/// Slots whose expired rows are not removed for now.
#[derive(Debug, Clone, Default)]
pub(super) struct Paused {
    pauses: Arc<Mutex<Vec<Pause>>>,
}

#[derive(Debug)]
struct Pause {
    id: u64,
    range: SlotRange,
    /// What was being removed when it began is removed.
    quiet: bool,
}

impl Paused {
    /// Adds slots until the result is dropped, and says whether a pause that is quiet has all of them already.
    pub(super) fn add(&self, range: SlotRange) -> (ExpiryPause, bool) {
        let mut pauses = lock(&self.pauses);
        let quiet = pauses.iter().any(|pause| pause.quiet && pause.range.intersection(range) == Some(range));
        let id = pauses.iter().map(|pause| pause.id + 1).max().unwrap_or(0);
        pauses.push(Pause { id, range, quiet });
        (ExpiryPause { paused: self.clone(), id }, quiet)
    }

    pub(super) fn ranges(&self) -> Vec<SlotRange> {
        lock(&self.pauses).iter().map(|pause| pause.range).collect()
    }
}

/// Expired rows of some slots are not removed as long as this lives.
#[derive(Debug)]
#[must_use = "dropping it lets expired rows be removed"]
pub struct ExpiryPause {
    paused: Paused,
    id: u64,
}

impl ExpiryPause {
    /// Nothing is removed any more that was being removed when it began.
    pub(super) fn is_quiet(&self) {
        for pause in lock(&self.paused.pauses).iter_mut().filter(|pause| pause.id == self.id) {
            pause.quiet = true;
        }
    }
}

impl Drop for ExpiryPause {
    fn drop(&mut self) {
        lock(&self.paused.pauses).retain(|pause| pause.id != self.id);
    }
}

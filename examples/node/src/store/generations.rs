//! Which rows are visible: for each slot, those of one generation.
//!
//! Rows that are staged for slots of another node, or that were given up, are of other generations. So slots change hands by a switch
//! whose time does not depend on how many rows there are, and what is left behind is deleted without ever touching what came later.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, PoisonError, RwLock};

use redb::{Database, ReadTransaction, ReadableDatabase as _, ReadableTable, WriteTransaction};

use super::{StoreError, tables};
use crate::common::{SLOT_COUNT, SlotRange};

/// The generation of all slots of a fresh database.
pub(super) const FIRST: u32 = 1;

/// The visible generation of every slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Generations {
    /// First slot and generation of each range, in order; the first one starts at slot 0.
    ranges: Vec<(u16, u32)>,
}

impl Generations {
    pub(super) fn of(&self, slot: u16) -> u32 {
        let next = self.ranges.partition_point(|&(start, _)| start <= slot);
        self.ranges.get(next.wrapping_sub(1)).map_or(FIRST, |&(_, generation)| generation)
    }

    /// The parts of `range`, each with its generation, in order.
    pub(super) fn parts(&self, range: SlotRange) -> Vec<(SlotRange, u32)> {
        let ends = self.ranges.iter().skip(1).map(|&(start, _)| start).chain([SLOT_COUNT]);
        let all = self.ranges.iter().zip(ends);
        all.filter_map(|(&(start, generation), end)| {
            let part = SlotRange::new(start, end).ok()?.intersection(range)?;
            Some((part, generation))
        })
        .collect()
    }

    /// Every visible generation, once.
    pub(super) fn all(&self) -> Vec<u32> {
        let mut all: Vec<u32> = self.ranges.iter().map(|&(_, generation)| generation).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The same with `generation` visible in `range`.
    pub(super) fn with(&self, range: SlotRange, generation: u32) -> Self {
        let mut parts: Vec<(u16, u32)> =
            [SlotRange::new(0, range.start()), SlotRange::new(range.end(), SLOT_COUNT)]
                .into_iter()
                .flatten()
                .flat_map(|other| self.parts(other))
                .map(|(part, generation)| (part.start(), generation))
                .chain([(range.start(), generation)])
                .collect();
        parts.sort_unstable();
        parts.dedup_by_key(|&mut (_, generation)| generation);
        Self { ranges: parts }
    }

    pub(super) fn load(table: &impl ReadableTable<u16, u32>) -> Result<Self, StoreError> {
        let ranges: Vec<(u16, u32)> = table
            .iter()?
            .map(|entry| entry.map(|(start, generation)| (start.value(), generation.value())))
            .collect::<Result<_, _>>()?;
        match ranges.first() {
            Some((0, _)) => Ok(Self { ranges }),
            _ => Err(StoreError::Damaged("slots without a generation".into())),
        }
    }

    pub(super) fn store(&self, txn: &WriteTransaction) -> Result<(), StoreError> {
        let mut table = txn.open_table(tables::GENERATIONS)?;
        table.retain(|_, _| false)?;
        for (start, generation) in &self.ranges {
            table.insert(start, generation)?;
        }
        Ok(())
    }

    /// Those of a fresh database.
    pub(super) fn first() -> Self {
        Self { ranges: vec![(0, FIRST)] }
    }
}

/// What is visible at the last commit, in memory.
///
/// A reader needs rows and generations of the same commit. Reading the table each time would be a detour for every GET, so the picture in
/// memory has a version that is odd while a commit that changes it is under way: a reader that sees the same even version before
/// and after its read transaction began has a picture that fits; otherwise it reads the table in that transaction.
#[derive(Debug)]
pub(super) struct GenerationView {
    version: AtomicU64,
    current: RwLock<Arc<Generations>>,
}

impl GenerationView {
    pub(super) fn new(generations: Generations) -> Self {
        Self { version: AtomicU64::new(0), current: RwLock::new(Arc::new(generations)) }
    }

    /// For the writer, which alone changes it.
    pub(super) fn current(&self) -> Arc<Generations> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// A read transaction, and what is visible in it.
    pub(super) fn begin_read(
        &self,
        database: &Database,
    ) -> Result<(ReadTransaction, Arc<Generations>), StoreError> {
        let before = self.version.load(Ordering::SeqCst);
        let generations = self.current();
        let txn = database.begin_read()?;
        fence(Ordering::SeqCst);
        if before.is_multiple_of(2) && self.version.load(Ordering::SeqCst) == before {
            return Ok((txn, generations));
        }
        let generations = Generations::load(&txn.open_table(tables::GENERATIONS)?)?;
        Ok((txn, Arc::new(generations)))
    }

    /// Commits a transaction after which `new` is visible.
    pub(super) fn switch(
        &self,
        new: Arc<Generations>,
        commit: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.version.fetch_add(1, Ordering::SeqCst);
        let committed = commit();
        if committed.is_ok() {
            *self.current.write().unwrap_or_else(PoisonError::into_inner) = new;
        }
        self.version.fetch_add(1, Ordering::SeqCst);
        committed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> SlotRange {
        text.parse().unwrap()
    }

    #[test]
    fn parts_and_neighbours() {
        let generations = Generations::first().with(range("100-199"), 2).with(range("150-299"), 3);
        assert_eq!(generations.ranges, [(0, 1), (100, 2), (150, 3), (300, 1)]);
        assert_eq!(
            generations.parts(range("120-16383")),
            [(range("120-149"), 2), (range("150-299"), 3), (range("300-16383"), 1)]
        );
        assert_eq!(generations.all(), [1, 2, 3]);
        assert_eq!(generations.with(range("0-16383"), 4).ranges, [(0, 4)]);
        assert_eq!(generations.with(range("300-400"), 3).ranges, [(0, 1), (100, 2), (150, 3), (401, 1)]);
    }

    proptest::proptest! {
        #[test]
        fn equal_the_model(switches in proptest::collection::vec((0u16..16384, 1u16..5000, 2u32..6), 0..12)) {
            let mut generations = Generations::first();
            let mut model = vec![FIRST; usize::from(SLOT_COUNT)];
            for (start, len, generation) in switches {
                let range = SlotRange::new(start, (start + len).min(SLOT_COUNT)).unwrap();
                generations = generations.with(range, generation);
                model[usize::from(range.start())..usize::from(range.end())].fill(generation);
            }
            for slot in 0..SLOT_COUNT {
                proptest::prop_assert_eq!(generations.of(slot), model[usize::from(slot)]);
            }
            let parts = generations.parts(SlotRange::FULL);
            proptest::prop_assert!(parts.windows(2).all(|pair| pair[0].0.end() == pair[1].0.start() && pair[0].1 != pair[1].1));
        }
    }

    /// A reader that begins while a switch is being committed sees rows and generations of one side of it.
    #[test]
    fn a_read_sees_rows_and_generations_of_the_same_commit() {
        use std::sync::atomic::AtomicBool;
        let dir = tempfile::tempdir().unwrap();
        let database = Database::create(dir.path().join("db")).unwrap();
        let write = |generation: u32| {
            let txn = database.begin_write().unwrap();
            // In place of rows: what the generation is, told by another table of the same commit.
            txn.open_table(tables::COUNTERS).unwrap().insert("visible", u64::from(generation)).unwrap();
            let generations = Generations::first().with(range("0-99"), generation);
            generations.store(&txn).unwrap();
            (txn, generations)
        };
        let (txn, generations) = write(1);
        txn.commit().unwrap();
        let view = GenerationView::new(generations);
        let stop = AtomicBool::new(false);
        let reads = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let (txn, generations) = view.begin_read(&database).unwrap();
                        let told = txn
                            .open_table(tables::COUNTERS)
                            .unwrap()
                            .get("visible")
                            .unwrap()
                            .unwrap()
                            .value();
                        assert_eq!(u64::from(generations.of(5)), told);
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let mut generation = 1;
            while generation < 300 || (reads.load(Ordering::Relaxed) < 100 && generation < 100_000) {
                generation += 1;
                let (mut txn, generations) = write(generation);
                txn.set_durability(redb::Durability::None).unwrap();
                view.switch(Arc::new(generations), || Ok(txn.commit()?)).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}

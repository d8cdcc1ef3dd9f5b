//! Import: the rows of a snapshot file become this node's, all at once.
//!
//! Rows are written in many transactions of moderate size, so that clients of other slots are served in
//! between and memory stays bounded. They are of a new generation, which is invisible until the last transaction hands the slots
//! over, and marked as garbage until then: what a crash leaves is swept, and a repeated import begins anew.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::format::{self, SnapshotRow};
use crate::common::{NodeId, SlotRange, slot_of};
use crate::store::ownership::{Claim, NodeAddresses, Ownership, adopt_all, load, put_nodes};
use crate::store::shared::Shared;
use crate::store::space::row_bytes;
use crate::store::tables::{self, Place, Row};
use crate::store::{Store, StoreError, lock};

/// Bytes of rows in one transaction.
const CHUNK_BYTES: usize = 8 << 20;

/// Rows of a snapshot that are in the database, and that nobody sees yet. Dropped, they are garbage.
pub(crate) struct StagedImport {
    hold: Importing,
    generation: u32,
    rows: u64,
}

impl StagedImport {
    /// How many there are.
    pub(crate) fn rows(&self) -> u64 {
        self.rows
    }
}

impl Store {
    /// Puts the rows of the snapshot file at `path` into the database, invisible. Blocks.
    ///
    /// `None` when `me` owns the range already with the epoch that `claims` give it: there is nothing to be done.
    ///
    /// # Errors
    ///
    /// [`StoreError::Refused`] when `me` owns some of the slots, [`StoreError::NoSpace`] when the rows would take the room that is to be left
    /// free. What was written until then is garbage.
    pub(crate) fn stage_import(
        &self,
        me: &NodeId,
        path: &Path,
        range: SlotRange,
        claims: &[Claim],
    ) -> Result<Option<StagedImport>, StoreError> {
        let writer = self.writer()?;
        let (me, claims) = (me.clone(), claims.to_vec());
        let hold = Importing::begin(self, range)?;
        let shared = Arc::clone(&hold.shared);
        let generation = writer.transact_blocking(move |txn, rows| {
            let present = load(&txn.open_table(tables::OWNERSHIP)?)?;
            if is_done(&present, &me, range, &claims) {
                return Ok(None);
            }
            if let Some(own) = present.ranges_of(&me).find(|own| own.overlaps(range)) {
                return Err(StoreError::Refused(format!(
                    "slots {range} cannot be imported: this node owns slots {own} already"
                )));
            }
            let generation = rows.new_generation()?;
            // Before the sweeper can see the mark.
            importing(&shared, range, generation);
            rows.discard(range, generation)?;
            Ok(Some(generation))
        })?;
        let Some(generation) = generation else { return Ok(None) };
        let mut file = format::open(path)?;
        let header = file.header().range()?;
        if header != range {
            return Err(StoreError::Refused(format!("the snapshot file holds slots {header}, not {range}")));
        }
        let mut chunk = Vec::new();
        let mut size = 0;
        let mut on_disk = 0_u64;
        loop {
            let block = file.next_block()?;
            let is_last = block.is_none();
            let block = block.unwrap_or_default();
            for row in &block {
                if !range.contains(slot_of(&row.key)) {
                    return Err(StoreError::Damaged(format!(
                        "the snapshot file has a key outside of slots {range}"
                    )));
                }
                // With what it takes beside them: of rows that are next to nothing there would be millions in one transaction.
                size += row.key.len() + row.value.len() + size_of::<SnapshotRow>();
                let (key, value) = (row.key.len(), row.value.len());
                on_disk = on_disk.saturating_add(row_bytes(key, value, row.expires_at.is_some()));
            }
            chunk.extend(block);
            if is_last || size >= CHUNK_BYTES {
                // A file of tiny rows takes many times its length, and after a write that finds no room the database takes no other either.
                self.check_space(std::mem::take(&mut on_disk))?;
                let rows = std::mem::take(&mut chunk);
                size = 0;
                writer.transact_blocking(move |_, txn| insert(txn, generation, &rows))?;
            }
            if is_last {
                return Ok(Some(StagedImport { hold, generation, rows: file.rows() }));
            }
        }
    }

    /// Hands the slots of an import over: in one transaction, their rows are those of the snapshot, `claims` are taken over by epoch,
    /// and `nodes` are known.
    ///
    /// # Errors
    ///
    /// No slot changed hands. [`StoreError::Refused`] when `claims` do not make `me` the owner.
    pub(crate) async fn finish_import(
        &self,
        me: &NodeId,
        staged: StagedImport,
        claims: Vec<Claim>,
        nodes: BTreeMap<NodeId, NodeAddresses>,
    ) -> Result<Ownership, StoreError> {
        let me = me.clone();
        self.writer()?
            .transact(move |txn, rows| {
                let StagedImport { hold, generation, rows: _ } = &staged;
                let range = hold.range;
                txn.open_table(tables::GARBAGE)?.remove((*generation, range.start()))?;
                rows.switch(range, *generation)?;
                put_nodes(txn, &nodes)?;
                let ownership = adopt_all(txn, &claims)?;
                if !is_done(&ownership, &me, range, &claims) {
                    return Err(StoreError::Refused(format!(
                        "slots {range} cannot be handed over: a newer owner is known"
                    )));
                }
                Ok(ownership)
            })
            .await
    }
}

fn insert(
    txn: &mut crate::store::txn::RowsTxn<'_>,
    generation: u32,
    rows: &[SnapshotRow],
) -> Result<(), StoreError> {
    for row in rows {
        let place = Place { slot: slot_of(&row.key), generation, key: &row.key };
        txn.put(place, Row::new(&row.value, row.expires_at))?;
    }
    Ok(())
}

/// Whether `me` owns all of `range`, with at least the epoch that `claims` give it.
fn is_done(present: &Ownership, me: &NodeId, range: SlotRange, claims: &[Claim]) -> bool {
    let wanted = claims
        .iter()
        .filter(|claim| claim.owner == *me && claim.range.overlaps(range))
        .map(|claim| claim.epoch)
        .max();
    let Some(wanted) = wanted else { return false };
    (range.start()..range.end())
        .all(|slot| present.of(slot).is_some_and(|claim| claim.owner == *me && claim.epoch >= wanted))
}

/// Keeps the sweeper away from rows that are being imported, and a second import from their slots.
struct Importing {
    shared: Arc<Shared>,
    range: SlotRange,
}

impl Importing {
    fn begin(store: &Store, range: SlotRange) -> Result<Self, StoreError> {
        let shared = Arc::clone(&store.inner.shared);
        let mut importing = lock(&shared.importing);
        if let Some((other, _)) = importing.iter().find(|(other, _)| other.overlaps(range)) {
            return Err(StoreError::Busy(format!("slots {other} are being imported already")));
        }
        // No generation is 0.
        importing.push((range, 0));
        drop(importing);
        Ok(Self { shared, range })
    }
}

/// Says of which generation the rows of `range` are that are being imported.
fn importing(shared: &Shared, range: SlotRange, generation: u32) {
    for entry in lock(&shared.importing).iter_mut().filter(|(other, _)| *other == range) {
        entry.1 = generation;
    }
}

impl Drop for Importing {
    fn drop(&mut self) {
        lock(&self.shared.importing).retain(|(range, _)| *range != self.range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Handover;
    use crate::store::test_store::{self, set};

    fn id(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn range(text: &str) -> SlotRange {
        text.parse().unwrap()
    }

    /// A source with 500 keys and a file with its upper half.
    async fn exported(dir: &Path) -> (Store, std::path::PathBuf, u64) {
        let (store, _) = test_store::open(&dir.join("source"), "n1", "0-16383");
        for n in 0..500 {
            set(&store, &format!("key:{n}"), &format!("value {n}")).await;
        }
        let path = dir.join("upper.snap");
        let summary = store.export_file(&id("n1"), range("8192-16383"), Handover::default(), &path).unwrap();
        assert_eq!(summary.rows, store.rows_in(range("8192-16383")));
        (store, path, summary.rows)
    }

    async fn import(
        target: &Store,
        path: &Path,
        nodes: &BTreeMap<NodeId, NodeAddresses>,
    ) -> Result<Option<(u64, Ownership)>, StoreError> {
        let (me, claims) = (id("n2"), to_n2());
        let staged =
            tokio::task::block_in_place(|| target.stage_import(&me, path, range("8192-16383"), &claims))?;
        let Some(staged) = staged else { return Ok(None) };
        let rows = staged.rows();
        Ok(Some((rows, target.finish_import(&me, staged, claims, nodes.clone()).await?)))
    }

    fn to_n2() -> Vec<Claim> {
        vec![
            Claim { range: range("0-8191"), owner: id("n1"), epoch: 1 },
            Claim { range: range("8192-16383"), owner: id("n2"), epoch: 2 },
        ]
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_import_is_visible_with_its_ownership_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let (source, path, rows) = exported(dir.path()).await;
        let (target, identity) = test_store::open(&dir.path().join("target"), "n2", "none");
        assert_eq!(identity.ownership.claims(), []);

        let nodes = BTreeMap::from([(id("n1"), NodeAddresses { grpc: "g".into(), resp: "r".into() })]);
        let (imported, ownership) = import(&target, &path, &nodes).await.unwrap().unwrap();
        assert_eq!(imported, rows);
        assert_eq!(ownership.claims(), to_n2());
        assert_eq!(target.nodes().unwrap(), nodes);
        assert_eq!(target.rows_in(SlotRange::FULL), rows);
        target.sweep_once().await.unwrap();
        assert_eq!(target.rows_in(SlotRange::FULL), rows, "what was imported is no garbage");

        // Again, also after the snapshot is gone: the slots are here already.
        std::fs::remove_file(&path).unwrap();
        assert_eq!(import(&target, &path, &nodes).await.unwrap(), None);

        let given = source.give_up(&id("n1"), range("8192-16383"), to_n2(), None).await.unwrap();
        assert_eq!(given.claims(), to_n2());
        assert_eq!((source.rows_in(range("8192-16383")), test_store::stored_rows(&source)), (0, 500));
        source.sweep_once().await.unwrap();
        assert_eq!(test_store::stored_rows(&source), 500 - rows);
        assert_eq!(source.rows_in(SlotRange::FULL), 500 - rows);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_an_interrupted_import_left_is_invisible_and_swept() {
        let dir = tempfile::tempdir().unwrap();
        let (source, _, _) = exported(dir.path()).await;
        let (target, _) = test_store::open(&dir.path().join("target"), "n2", "none");
        // Large enough for several transactions.
        let large = "x".repeat(CHUNK_BYTES / 4);
        for n in 0..6 {
            set(&source, &format!("{{foo}}{n}"), &large).await;
        }
        let path = dir.path().join("large.snap");
        let rows =
            source.export_file(&id("n1"), range("8192-16383"), Handover::default(), &path).unwrap().rows;
        let whole = std::fs::read(&path).unwrap();
        let cut = dir.path().join("cut.snap");
        std::fs::write(&cut, &whole[..whole.len() - 1]).unwrap();

        let failed = import(&target, &cut, &BTreeMap::new()).await;
        assert!(matches!(failed, Err(StoreError::Damaged(_))), "{failed:?}");
        assert!(test_store::stored_rows(&target) > 0, "the test needs an import that has begun");
        assert_eq!(target.rows_in(SlotRange::FULL), 0);
        // A row of another owner's slots, as an older import could have left it.
        set(&target, "foo", "leftover").await;
        assert!(range("8192-16383").contains(slot_of(b"foo")));

        let (imported, _) = import(&target, &path, &BTreeMap::new()).await.unwrap().unwrap();
        assert_eq!(imported, rows);
        assert_eq!(target.rows_in(SlotRange::FULL), rows);
        target.sweep_once().await.unwrap();
        assert_eq!((target.rows_in(SlotRange::FULL), test_store::stored_rows(&target)), (rows, rows));
    }

    /// A file of rows of next to nothing, in slots 8192-16383.
    fn tiny_rows(path: &Path, rows: u64, expires_at: Option<u64>) {
        let slots = range("8192-16383");
        let header = format::SnapshotHeader {
            start: slots.start(),
            end: slots.end(),
            source: "n1".into(),
            taken_unix_ms: 0,
            handover: Handover::default(),
        };
        let mut writer = format::SnapshotWriter::begin(Vec::new(), &header).unwrap();
        for n in 0..rows {
            // Each expires at a time of its own, so that the index is in another order than the rows.
            let at = expires_at.map(|at| at + n.wrapping_mul(0x9E37_79B9_7F4A_7C15) % 1_000_000);
            writer.row(format!("{{foo}}{n}").as_bytes(), b"", at).unwrap();
        }
        std::fs::write(path, writer.finish().unwrap().0).unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn rows_of_next_to_nothing_are_no_large_transaction() {
        let dir = tempfile::tempdir().unwrap();
        let (target, _) = test_store::open(&dir.path().join("target"), "n2", "none");
        let path = dir.path().join("cut.snap");
        tiny_rows(&path, u64::try_from(CHUNK_BYTES / size_of::<SnapshotRow>()).unwrap(), None);
        let mut file = std::fs::read(&path).unwrap();
        file.pop();
        std::fs::write(&path, file).unwrap();
        let failed = import(&target, &path, &BTreeMap::new()).await;
        assert!(matches!(failed, Err(StoreError::Damaged(_))), "{failed:?}");
        assert!(test_store::stored_rows(&target) > 0, "all rows are one transaction");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn tiny_rows_take_no_more_of_the_disk_than_is_counted() {
        const ROWS: u64 = 40_000;
        for expires_at in [None, Some(1 << 50)] {
            let dir = tempfile::tempdir().unwrap();
            let (target, _) = test_store::open(&dir.path().join("target"), "n2", "none");
            let path = dir.path().join("rows");
            tiny_rows(&path, ROWS, expires_at);
            let allocated = || {
                let stats = target.inner.shared.database.begin_write().unwrap().stats().unwrap();
                stats.allocated_pages() * u64::try_from(stats.page_size()).unwrap()
            };
            let before = allocated();
            assert_eq!(import(&target, &path, &BTreeMap::new()).await.unwrap().unwrap().0, ROWS);
            let taken = allocated() - before;
            let keys = (0..ROWS).map(|n| format!("{{foo}}{n}").len());
            let counted: u64 = keys.map(|key| row_bytes(key, 0, expires_at.is_some())).sum();
            let file = std::fs::metadata(&path).unwrap().len();
            assert!(taken > file, "{taken} bytes: the file says little of them, {file}");
            assert!(taken <= crate::store::on_disk(counted), "{taken} bytes, {counted} were counted");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_import_leaves_free_what_is_to_be_left_free() {
        let dir = tempfile::tempdir().unwrap();
        let (_source, path, _) = exported(dir.path()).await;
        let init = crate::store::Init { node: id("n2"), slots: Some(vec![]), others: vec![] };
        let full = crate::store::StoreOptions { reserve_bytes: 1 << 60, ..Default::default() };
        let (target, _) = Store::open(&dir.path().join("target"), &init, &full).unwrap();
        let failed = import(&target, &path, &BTreeMap::new()).await;
        assert!(matches!(failed, Err(StoreError::NoSpace { .. })), "{failed:?}");
        assert_eq!(test_store::stored_rows(&target), 0);
        // Nothing is in the way of a later one, and others can write.
        set(&target, "still", "written").await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_abandoned_import_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let (_source, path, rows) = exported(dir.path()).await;
        let (target, _) = test_store::open(&dir.path().join("target"), "n2", "none");
        // A newer owner makes the last transaction fail, when all other rows are in.
        let newer = Claim { range: range("9000-9001"), owner: id("n3"), epoch: 9 };
        target.adopt(vec![newer]).await.unwrap();
        let failed = import(&target, &path, &BTreeMap::new()).await;
        assert!(matches!(failed, Err(StoreError::Refused(_))), "{failed:?}");
        assert!(rows > 0);
        target.sweep_once().await.unwrap();
        assert_eq!(test_store::stored_rows(&target), 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn own_slots_are_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let (_source, path, _) = exported(dir.path()).await;
        let (target, _) = test_store::open(&dir.path().join("target"), "n2", "16000-16383");
        let refused = import(&target, &path, &BTreeMap::new()).await;
        assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
    }
}

//! Import: the rows of a snapshot file become this node's, all at once.
//!
//! Rows are written in many transactions of moderate size, so that clients of other slots are served in
//! between and memory stays bounded; they are invisible until the last transaction, which hands the slots
//! over. From the first transaction on, the range is marked as garbage, so what a crash leaves is either swept or
//! begun anew, and a repeated import ends as the first one would have.

use std::collections::BTreeMap;
use std::path::Path;

use redb::{ReadableTable as _, WriteTransaction};

use super::format::{self, SnapshotRow};
use crate::common::{NodeId, SlotRange, slot_of};
use crate::store::ownership::{Claim, NodeAddresses, Ownership, adopt_all, load, put_nodes};
use crate::store::tables::{self, Row, row_key};
use crate::store::{Store, StoreError, lock, splits};

/// Bytes of rows in one transaction.
const CHUNK_BYTES: usize = 8 << 20;
/// Rows deleted in one transaction before the import begins.
const CHUNK_ROWS: usize = 8 << 10;

impl Store {
    /// Merges the snapshot file at `path` and hands its slots over: in one transaction, the rows of `range` are
    /// those of the file, `claims` are taken over by epoch, and `nodes` are known. Blocks.
    ///
    /// Idempotent: when `me` owns the range already with the epoch that `claims` give it, nothing is done.
    /// Returns the number of rows (`None` if nothing was to be done) and the ownership.
    ///
    /// # Errors
    ///
    /// No slot changed hands. [`StoreError::Refused`] when `me` owns some of the slots, or `claims` do not make it
    /// the owner.
    pub fn import(
        &self,
        me: &NodeId,
        path: &Path,
        range: SlotRange,
        claims: &[Claim],
        nodes: &BTreeMap<NodeId, NodeAddresses>,
    ) -> Result<(Option<u64>, Ownership), StoreError> {
        let writer = self.writer()?;
        let (begin_me, begin_claims) = (me.clone(), claims.to_vec());
        let _importing = Importing::begin(self, range)?;
        let done = writer.transact_blocking(move |txn, _| {
            let present = load(&txn.open_table(tables::OWNERSHIP)?)?;
            if is_done(&present, &begin_me, range, &begin_claims) {
                return Ok(Some(present));
            }
            if let Some(own) = present.ranges_of(&begin_me).find(|own| own.overlaps(range)) {
                return Err(StoreError::Refused(format!(
                    "slots {range} cannot be imported: this node owns slots {own} already"
                )));
            }
            mark(txn, range, true)?;
            Ok(None)
        })?;
        if let Some(ownership) = done {
            return Ok((None, ownership));
        }

        while writer.transact_blocking(move |_, rows| rows.delete_range(range, CHUNK_ROWS))? == CHUNK_ROWS {}

        let mut file = format::open(path)?;
        let header = file.header().range()?;
        if header != range {
            return Err(StoreError::Refused(format!("the snapshot file holds slots {header}, not {range}")));
        }
        let mut chunk = Vec::new();
        let mut size = 0;
        while let Some(block) = file.next_block()? {
            for row in &block {
                if !range.contains(slot_of(&row.key)) {
                    return Err(StoreError::Damaged(format!(
                        "the snapshot file has a key outside of slots {range}"
                    )));
                }
                size += row.key.len() + row.value.len();
            }
            chunk.extend(block);
            if size >= CHUNK_BYTES {
                let rows = std::mem::take(&mut chunk);
                size = 0;
                writer.transact_blocking(move |_, txn| insert(txn, &rows))?;
            }
        }
        let rows = file.rows();
        let (me, claims, nodes) = (me.clone(), claims.to_vec(), nodes.clone());
        let ownership = writer.transact_blocking(move |txn, rows| {
            insert(rows, &chunk)?;
            mark(txn, range, false)?;
            put_nodes(txn, &nodes)?;
            let ownership = adopt_all(txn, &claims)?;
            if !is_done(&ownership, &me, range, &claims) {
                return Err(StoreError::Refused(format!(
                    "slots {range} cannot be handed over: a newer owner is known"
                )));
            }
            Ok(ownership)
        })?;
        Ok((Some(rows), ownership))
    }

    /// Takes `claims` over and gives the rows of `range` up, in one transaction. They are invisible at once, and
    /// deleted in the background. The intent of the split `finished` is removed with them.
    ///
    /// # Errors
    ///
    /// Nothing was changed. [`StoreError::Refused`] when `me` would still own a slot of the range.
    pub(crate) async fn give_up(
        &self,
        me: &NodeId,
        range: SlotRange,
        claims: Vec<Claim>,
        finished: Option<String>,
    ) -> Result<Ownership, StoreError> {
        let me = me.clone();
        self.writer()?
            .transact(move |txn, _| {
                let ownership = adopt_all(txn, &claims)?;
                if let Some(own) = ownership.ranges_of(&me).find(|own| own.overlaps(range)) {
                    return Err(StoreError::Refused(format!(
                        "slots {range} cannot be given up: this node would still own slots {own}"
                    )));
                }
                mark(txn, range, true)?;
                if let Some(split) = finished {
                    splits::remove(txn, &split)?;
                }
                Ok(ownership)
            })
            .await
    }
}

fn insert(txn: &mut crate::store::txn::RowsTxn<'_>, rows: &[SnapshotRow]) -> Result<(), StoreError> {
    for row in rows {
        let stored = Row { expires_at: row.expires_at, value: &row.value };
        txn.put(&row_key(slot_of(&row.key), &row.key), stored)?;
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

/// Puts `range` into the table of garbage, or takes it out.
fn mark(txn: &WriteTransaction, range: SlotRange, garbage: bool) -> Result<(), StoreError> {
    let mut table = txn.open_table(tables::GARBAGE)?;
    let mut pieces = Vec::new();
    for entry in table.iter()? {
        let (start, end) = entry?;
        let (start, end) = (start.value(), end.value());
        pieces.push((start, end.min(range.start())));
        pieces.push((start.max(range.end()), end));
    }
    if garbage {
        pieces.push((range.start(), range.end()));
    }
    table.retain(|_, _| false)?;
    for (start, end) in pieces {
        if start < end {
            table.insert(start, end)?;
        }
    }
    Ok(())
}

/// Keeps the sweeper away from a range that is being imported, and a second import.
struct Importing<'a> {
    store: &'a Store,
    range: SlotRange,
}

impl<'a> Importing<'a> {
    fn begin(store: &'a Store, range: SlotRange) -> Result<Self, StoreError> {
        let mut importing = lock(&store.inner.importing);
        if let Some(other) = importing.iter().find(|other| other.overlaps(range)) {
            return Err(StoreError::Refused(format!("slots {other} are being imported already")));
        }
        importing.push(range);
        Ok(Self { store, range })
    }
}

impl Drop for Importing<'_> {
    fn drop(&mut self) {
        lock(&self.store.inner.importing).retain(|range| *range != self.range);
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

    fn import(
        target: &Store,
        path: &Path,
        nodes: &BTreeMap<NodeId, NodeAddresses>,
    ) -> Result<(Option<u64>, Ownership), StoreError> {
        tokio::task::block_in_place(|| target.import(&id("n2"), path, range("8192-16383"), &to_n2(), nodes))
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
        let (imported, ownership) = import(&target, &path, &nodes).unwrap();
        assert_eq!(imported, Some(rows));
        assert_eq!(ownership.claims(), to_n2());
        assert_eq!(target.nodes().unwrap(), nodes);
        assert_eq!(target.rows_in(SlotRange::FULL), rows);
        target.sweep_once().await.unwrap();
        assert_eq!(target.rows_in(SlotRange::FULL), rows, "what was imported is no garbage");

        // Again, also after the snapshot is gone: the slots are here already.
        std::fs::remove_file(&path).unwrap();
        let (again, same) = import(&target, &path, &nodes).unwrap();
        assert_eq!((again, same), (None, ownership));

        let given = source.give_up(&id("n1"), range("8192-16383"), to_n2(), None).await.unwrap();
        assert_eq!(given.claims(), to_n2());
        source.sweep_once().await.unwrap();
        assert_eq!(source.rows_in(range("8192-16383")), 0);
        assert_eq!(source.rows_in(SlotRange::FULL), 500 - rows);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_an_interrupted_import_left_is_replaced_or_swept() {
        let dir = tempfile::tempdir().unwrap();
        let (_source, path, rows) = exported(dir.path()).await;
        let (target, _) = test_store::open(&dir.path().join("target"), "n2", "none");
        let whole = std::fs::read(&path).unwrap();
        let cut = dir.path().join("cut.snap");
        std::fs::write(&cut, &whole[..whole.len() - 1]).unwrap();

        let failed = import(&target, &cut, &BTreeMap::new());
        assert!(matches!(failed, Err(StoreError::Damaged(_))), "{failed:?}");
        // A row that the snapshot does not have, as an older import could have left it.
        set(&target, "key:leftover:1", "x").await;

        let (imported, _) = import(&target, &path, &BTreeMap::new()).unwrap();
        assert_eq!(imported, Some(rows));
        let slot = slot_of(b"key:leftover:1");
        assert!(
            range("8192-16383").contains(slot),
            "the test needs a key of the upper half, this is of {slot}"
        );
        assert_eq!(target.rows_in(SlotRange::FULL), rows);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_abandoned_import_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let (_source, path, rows) = exported(dir.path()).await;
        let (target, _) = test_store::open(&dir.path().join("target"), "n2", "none");
        // A newer owner makes the last transaction fail, when all other rows are in.
        let newer = Claim { range: range("9000-9001"), owner: id("n3"), epoch: 9 };
        target.adopt(vec![newer]).await.unwrap();
        let failed = import(&target, &path, &BTreeMap::new());
        assert!(matches!(failed, Err(StoreError::Refused(_))), "{failed:?}");
        assert!(rows > 0);
        target.sweep_once().await.unwrap();
        assert_eq!(target.rows_in(SlotRange::FULL), 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn own_slots_are_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let (_source, path, _) = exported(dir.path()).await;
        let (target, _) = test_store::open(&dir.path().join("target"), "n2", "16000-16383");
        let refused = import(&target, &path, &BTreeMap::new());
        assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn garbage_ranges_are_cut_and_joined() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = test_store::open(dir.path(), "n1", "none");
        let marks = [("0-99", true), ("50-149", true), ("20-29", false), ("145-200", false)];
        for (slots, garbage) in marks {
            let slots = range(slots);
            store.writer().unwrap().transact(move |txn, _| mark(txn, slots, garbage)).await.unwrap();
        }
        let left = store
            .writer()
            .unwrap()
            .transact(|txn, _| {
                let table = txn.open_table(tables::GARBAGE)?;
                table
                    .iter()?
                    .map(|entry| entry.map(|(a, b)| (a.value(), b.value())).map_err(Into::into))
                    .collect()
            })
            .await;
        let left: Vec<(u16, u16)> = left.unwrap();
        assert_eq!(left, [(0, 20), (30, 50), (50, 145)]);
    }
}

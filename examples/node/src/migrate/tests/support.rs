//! Two nodes, and a driver that moves slots from one to the other step by step.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use proto::common::ids::{MigrationId, ShardId};
use proto::migration::entry::Entry;
use proto::migration::hold::HoldMode;
use proto::migration::source::{ChangeCursor, Handover, PageLimit};
use proto::migration::target::Takeover;
use proto::migration::{MigrationSource as _, MigrationSpec, MigrationTarget as _};

use crate::common::{NodeId, SlotRange, slot_of};
use crate::gate::{Access, Verdict};
use crate::migrate::{MigrateOptions, NodeSource, NodeTarget};
use crate::node::Node;
use crate::store::{Init, Outcome, ReadExtent, ScanPosition, SetCondition, SetExpiry, StoreOptions, WriteOp};
use crate::store::{test_store, unix_ms};

/// The slots that move: about half of all keys are in them.
pub(super) fn moving() -> SlotRange {
    range("4096-12287")
}

pub(super) fn range(text: &str) -> SlotRange {
    text.parse().unwrap()
}

pub(super) fn id(name: &str) -> MigrationId {
    MigrationId::new(name).unwrap()
}

pub(super) const PAGE: PageLimit = PageLimit { bytes: 1 << 20, entries: 100 };

pub(super) struct TestNode {
    pub(super) node: Node,
    pub(super) source: NodeSource,
    pub(super) target: NodeTarget,
    directory: PathBuf,
}

impl TestNode {
    pub(super) fn open(directory: &Path, name: &str, slots: &str) -> Self {
        let slots = if slots == "none" { vec![] } else { vec![range(slots)] };
        Self::open_with(directory, name, Some(slots))
    }

    fn open_with(directory: &Path, name: &str, slots: Option<Vec<SlotRange>>) -> Self {
        let options = StoreOptions { cache_bytes: 16 << 20, ..StoreOptions::default() };
        Self::open_as(directory, name, slots, &options)
    }

    pub(super) fn open_as(
        directory: &Path,
        name: &str,
        slots: Option<Vec<SlotRange>>,
        options: &StoreOptions,
    ) -> Self {
        let init = Init { node: NodeId::new(name).unwrap(), slots, others: vec![] };
        let node = Node::open(directory, &init, options).unwrap();
        let options = MigrateOptions::default();
        Self {
            source: NodeSource::new(node.clone(), options),
            target: NodeTarget::new(node.clone(), options),
            node,
            directory: directory.to_path_buf(),
        }
    }

    /// What a crash at this moment leaves: the file as it is, opened elsewhere.
    pub(super) fn crash(self) -> Self {
        let copy = self.copy();
        let node = self.node.clone();
        drop(self);
        // The first process is gone; what it would have done is not in the copy.
        node.store().close();
        copy
    }

    /// The same node from a copy of the file, made while it is in use.
    pub(super) fn copy(&self) -> Self {
        let (parent, name) = (self.directory.parent().unwrap(), self.node.id().as_str());
        let directory = parent.join(format!("{name}-{:x}", rand::random::<u64>()));
        std::fs::create_dir(&directory).unwrap();
        std::fs::copy(self.directory.join("node.redb"), directory.join("node.redb")).unwrap();
        Self::open_with(&directory, name, None)
    }

    /// Does writes of one slot through the gate, as a connection does.
    pub(super) async fn write(&self, op: WriteOp) -> Result<Outcome, Verdict> {
        let key = match &op {
            WriteOp::Set { key, .. }
            | WriteOp::Take { key }
            | WriteOp::Expire { key, .. }
            | WriteOp::Persist { key }
            | WriteOp::Add { key, .. } => key.clone(),
            WriteOp::SetMany { pairs } => pairs[0].0.clone(),
            WriteOp::Delete { keys } => keys[0].clone(),
        };
        let mut permits = self.node.gate().permits(Access::Write);
        match permits.enter(slot_of(&key)) {
            Verdict::Pass => Ok(self.node.store().write(vec![op], permits).await.unwrap().remove(0)),
            verdict => Err(verdict),
        }
    }

    pub(super) async fn set(&self, key: &str, value: &str) {
        assert_eq!(self.write(set(key, value, SetExpiry::Never)).await, Ok(Outcome::Done));
    }

    pub(super) async fn delete(&self, key: &str) {
        self.write(WriteOp::Delete { keys: vec![bytes(key)] }).await.unwrap();
    }

    pub(super) async fn get(&self, key: &str) -> Option<Bytes> {
        let key = bytes(key);
        let read = self.node.store().read(ReadExtent::Point, move |reader| reader.get(&key)).await;
        read.unwrap().map(|entry| entry.value)
    }

    /// All live keys of a range, as SCAN finds them.
    pub(super) async fn keys(&self, range: SlotRange) -> Vec<Bytes> {
        let mut keys = Vec::new();
        let mut next = Some(ScanPosition::Slot(range.start()));
        while let Some(from) = next {
            let scan = self.node.store().read(ReadExtent::Bulk, move |reader| reader.scan(&from, range, 7));
            let scanned = scan.await.unwrap();
            keys.extend(scanned.keys);
            next = scanned.next;
        }
        keys
    }

    /// All live rows of a range.
    pub(super) async fn rows(&self, range: SlotRange) -> BTreeMap<Bytes, (Bytes, Option<u64>)> {
        let keys = self.keys(range).await;
        let read = self.node.store().read(ReadExtent::Bulk, move |reader| {
            let mut rows = BTreeMap::new();
            for key in keys {
                if let Some(entry) = reader.get(&key)? {
                    rows.insert(key, (entry.value, entry.expires_at));
                }
            }
            Ok(rows)
        });
        read.await.unwrap()
    }

    pub(super) fn check(&self) {
        test_store::check(self.node.store());
    }
}

impl Drop for TestNode {
    fn drop(&mut self) {
        self.node.store().close();
    }
}

pub(super) fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

pub(super) fn set(key: &str, value: &str, expiry: SetExpiry) -> WriteOp {
    WriteOp::Set {
        key: bytes(key),
        value: bytes(value),
        expiry,
        condition: SetCondition::Always,
        want_old: false,
    }
}

pub(super) fn in_ms(ms: u64) -> SetExpiry {
    SetExpiry::At(unix_ms() + ms)
}

/// The first of `name:0`, `name:1`, … that lies in `range`, or outside of it.
pub(super) fn key_in(name: &str, range: SlotRange, inside: bool) -> String {
    let mut keys = (0..).map(|n| format!("{name}:{n}"));
    keys.find(|key| range.contains(slot_of(key.as_bytes())) == inside).unwrap()
}

pub(super) fn spec(slots: SlotRange) -> MigrationSpec {
    MigrationSpec {
        slots,
        source_shard: ShardId::new("s1").unwrap(),
        target_shard: ShardId::new("s2").unwrap(),
        source_node: NodeId::new("n1").unwrap(),
        target_node: NodeId::new("n2").unwrap(),
        auto_complete: true,
        value_format: String::new(),
    }
}

/// One migration, from outside of both nodes.
pub(super) struct Mover {
    pub(super) id: MigrationId,
    pub(super) slots: SlotRange,
    pub(super) cursor: Bytes,
    pub(super) copied: bool,
    pub(super) changes: ChangeCursor,
}

impl Mover {
    pub(super) async fn begin(name: &str, slots: SlotRange, from: &TestNode, to: &TestNode) -> Self {
        let id = id(name);
        let base = from.source.open_log(&id, slots, None).await.unwrap();
        to.target.begin(&id, slots, bytes("begun")).await.unwrap();
        Self { id, slots, cursor: Bytes::new(), copied: false, changes: ChangeCursor::at(base) }
    }

    /// Rows of the next page.
    pub(super) async fn read_rows(&mut self, from: &TestNode, limit: PageLimit) -> Vec<Entry> {
        if self.copied {
            return Vec::new();
        }
        let page = from.source.read_rows(&self.id, &self.cursor, limit).await.unwrap();
        assert!(page.entries.len() <= limit.entries && !page.cursor.is_empty());
        assert!(page.entries.iter().all(|entry| self.slots.contains(slot_of(&entry.key))));
        self.cursor = page.cursor;
        self.copied = page.last;
        page.entries
    }

    /// Changes of the next page, which keeps the rules that pages have.
    pub(super) async fn read_changes(&mut self, from: &TestNode, limit: PageLimit) -> Vec<Entry> {
        let before = self.changes;
        let page = from.source.read_changes(&self.id, before, limit).await.unwrap();
        let seqs: Vec<u64> = page.entries.iter().map(|entry| entry.seq).collect();
        assert!(seqs.is_sorted() && seqs.iter().all(|&seq| seq > before.watermark), "{before:?}: {seqs:?}");
        assert!(page.entries.iter().all(|entry| self.slots.contains(slot_of(&entry.key))));
        match page.through {
            Some(through) => {
                assert!(through >= before.watermark && seqs.iter().all(|&seq| seq <= through));
                assert_eq!(page.next, ChangeCursor::at(through));
            }
            None => {
                assert!(!page.entries.is_empty() || page.next.scanned > before.scanned, "it goes on");
                assert_eq!(page.next.watermark, before.watermark);
            }
        }
        self.changes = page.next;
        page.entries
    }

    /// Reads and applies all that is left.
    pub(super) async fn catch_up(&mut self, from: &TestNode, to: &TestNode) {
        while !self.copied {
            let rows = self.read_rows(from, PAGE).await;
            to.target.apply(&self.id, rows, bytes("rows")).await.unwrap();
        }
        loop {
            let head = from.source.watch_log(&self.id).borrow().head_seq;
            let changes = self.read_changes(from, PAGE).await;
            to.target.apply(&self.id, changes, bytes("changes")).await.unwrap();
            if self.changes == ChangeCursor::at(head) {
                break;
            }
        }
        from.source.release_changes(&self.id, self.changes.watermark).await.unwrap();
    }

    /// The freeze and the commit.
    pub(super) async fn hand_over(&mut self, from: &TestNode, to: &TestNode, slot_epoch: u64) {
        let (id, slots) = (&self.id.clone(), self.slots);
        from.source.prepare_digests(id).await.unwrap();
        let writes = from.source.hold(slots, HoldMode::Writes).await.unwrap();
        self.catch_up(from, to).await;
        assert_eq!(from.source.digests(id).await.unwrap(), to.target.digests(id).await.unwrap());
        to.target.check_epoch(slots, slot_epoch).await.unwrap();
        let held = to.target.hold(slots);
        let all = from.source.hold(slots, HoldMode::All).await.unwrap();
        let takeover = Takeover { id, slots, from: Some(from.node.id()), slot_epoch };
        to.target.commit(&takeover, bytes("committed")).await.unwrap();
        drop(held);
        let owner = to.node.id().clone();
        let handover =
            Handover { id: id.clone(), slots, owner, address: "127.0.0.1:7102".into(), slot_epoch };
        from.source.give_up(&handover).await.unwrap();
        drop((writes, all));
        to.target.forget(id).await.unwrap();
    }
}

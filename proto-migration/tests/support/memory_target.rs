//! A target's store in memory. What is durable outlives a receiver: a crash is a new receiver over the same store.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use proto_common::error::Error;
use proto_common::ids::MigrationId;
use proto_common::slots::SlotRange;
use proto_migration::MigrationSpec;
use proto_migration::Reason;
use proto_migration::digest::{SlotDigest, SlotDigests};
use proto_migration::entry::{Entry, Image};
use proto_migration::hold::{Held, Hold};
use proto_migration::target::{MigrationTarget, Offer, Staged, StoredMigration, Takeover};

/// Staged images by key, with the sequence of each; `None`: a tombstone.
pub type Rows = BTreeMap<Bytes, (u64, Option<Image>)>;

#[derive(Debug, Default)]
pub struct Disk {
    pub records: BTreeMap<MigrationId, Bytes>,
    pub staged: BTreeMap<MigrationId, Rows>,
    pub slots: BTreeMap<MigrationId, SlotRange>,
    pub owned: Vec<(SlotRange, u64, Rows)>,
    pub known_epoch: u64,
}

/// What one call does instead of its work.
#[derive(Debug, Clone)]
pub enum Fault {
    Fail(Error),
    /// `apply` alone: stages the first half of the entries, and fails.
    FailHalfway(Error),
    Panic,
    /// Does its work, and panics then.
    PanicAfter,
    /// Waits for a permit.
    Wait(Arc<tokio::sync::Semaphore>),
}

#[derive(Debug, Clone, Default)]
pub struct MemoryTarget {
    disk: Arc<Mutex<Disk>>,
    faults: Arc<Mutex<BTreeMap<&'static str, VecDeque<Fault>>>>,
    calls: Arc<Mutex<BTreeMap<&'static str, usize>>>,
    holds: Arc<AtomicUsize>,
    hurried: Arc<AtomicBool>,
    lost: Arc<Mutex<Option<String>>>,
}

struct Counted(Arc<AtomicUsize>);

impl Held for Counted {
    fn held_requests(&self) -> u64 {
        0
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl MemoryTarget {
    pub fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap()
    }

    /// The same disk, found by a process that has just started: holds and faults are gone.
    pub fn crash(&self) -> Self {
        Self { disk: Arc::clone(&self.disk), ..Self::default() }
    }

    pub fn fault(&self, call: &'static str, fault: Fault) {
        self.faults.lock().unwrap().entry(call).or_default().push_back(fault);
    }

    pub fn calls(&self, call: &str) -> usize {
        self.calls.lock().unwrap().get(call).copied().unwrap_or(0)
    }

    /// From now on, the source of all that is staged cannot give its slots away, for this reason; or can again.
    pub fn lose(&self, reason: Option<&str>) {
        *self.lost.lock().unwrap() = reason.map(str::to_owned);
    }

    /// Whether it is to hurry now.
    pub fn hurried(&self) -> bool {
        self.hurried.load(Ordering::SeqCst)
    }

    /// Ranges that are held now.
    pub fn holds(&self) -> usize {
        self.holds.load(Ordering::SeqCst)
    }

    async fn call<R>(
        &self,
        name: &'static str,
        work: impl FnOnce(&mut Disk) -> Result<R, Error>,
    ) -> Result<R, Error> {
        *self.calls.lock().unwrap().entry(name).or_default() += 1;
        let fault = self.faults.lock().unwrap().get_mut(name).and_then(VecDeque::pop_front);
        let mut after = false;
        match fault {
            Some(Fault::Fail(error) | Fault::FailHalfway(error)) => return Err(error),
            Some(Fault::Panic) => panic!("{name} panics"),
            Some(Fault::Wait(gate)) => gate.acquire().await.unwrap().forget(),
            Some(Fault::PanicAfter) => after = true,
            None => {}
        }
        let done = work(&mut self.disk());
        assert!(!after, "{name} panics when it is done");
        done
    }
}

fn stage(rows: &mut Rows, entries: Vec<Entry>) {
    for Entry { seq, key, image } in entries {
        if rows.get(&key).is_none_or(|(held, _)| seq > *held) {
            rows.insert(key, (seq, image));
        }
    }
}

fn count(rows: &Rows) -> Staged {
    let mut staged = Staged::default();
    for (key, (_, image)) in rows {
        if let Some(image) = image {
            staged.keys += 1;
            staged.bytes += (key.len() + image.value.len()) as u64;
        }
    }
    staged
}

impl MigrationTarget for MemoryTarget {
    async fn load(&self) -> Result<Vec<StoredMigration>, Error> {
        self.call("load", |disk| {
            let staged = |id| disk.staged.get(id).map(count).unwrap_or_default();
            Ok(disk
                .records
                .iter()
                .map(|(id, record)| StoredMigration {
                    id: id.clone(),
                    record: record.clone(),
                    staged: staged(id),
                    slots: disk.staged.contains_key(id).then(|| disk.slots[id]),
                })
                .collect())
        })
        .await
    }

    async fn admit(&self, _: &Offer<'_>) -> Result<(), Error> {
        self.call("admit", |_| Ok(())).await
    }

    fn lost_by_source(&self, _: &MigrationSpec) -> Option<String> {
        *self.calls.lock().unwrap().entry("lost_by_source").or_default() += 1;
        self.lost.lock().unwrap().clone()
    }

    async fn begin(&self, id: &MigrationId, slots: SlotRange, record: Bytes) -> Result<(), Error> {
        self.call("begin", |disk| {
            disk.slots.insert(id.clone(), slots);
            disk.staged.insert(id.clone(), Rows::new());
            disk.records.insert(id.clone(), record);
            Ok(())
        })
        .await
    }

    async fn save(&self, id: &MigrationId, record: Bytes) -> Result<(), Error> {
        self.call("save", |disk| {
            disk.records.insert(id.clone(), record);
            Ok(())
        })
        .await
    }

    fn hurry(&self, _: &MigrationId, wanted: bool) {
        *self.calls.lock().unwrap().entry("hurry").or_default() += usize::from(wanted);
        let fault = self.faults.lock().unwrap().get_mut("hurry").and_then(VecDeque::pop_front);
        assert!(fault.is_none(), "it panics when it hurries");
        self.hurried.store(wanted, Ordering::SeqCst);
    }

    async fn apply(&self, id: &MigrationId, entries: Vec<Entry>, record: Bytes) -> Result<Staged, Error> {
        let fault = self.faults.lock().unwrap().get("apply").and_then(|faults| faults.front().cloned());
        if matches!(fault, Some(Fault::FailHalfway(_))) {
            assert!(entries.len() > 1, "there is no half of what comes");
            stage(self.disk().staged.get_mut(id).expect("begun"), entries[..entries.len() / 2].to_vec());
        }
        self.call("apply", |disk| {
            let rows = disk.staged.get_mut(id).expect("begun");
            stage(rows, entries);
            let staged = count(rows);
            disk.records.insert(id.clone(), record);
            Ok(staged)
        })
        .await
    }

    async fn digests(&self, id: &MigrationId) -> Result<Vec<SlotDigest>, Error> {
        self.call("digests", |disk| Ok(digests_of(&disk.staged[id]))).await
    }

    async fn check_epoch(&self, slots: SlotRange, slot_epoch: u64) -> Result<(), Error> {
        self.call("check_epoch", |disk| {
            if disk.known_epoch < slot_epoch {
                return Ok(());
            }
            Err(Reason::StaleSlotEpoch
                .error("a higher claim is known")
                .metadata("slot", slots.start().to_string())
                .metadata("slot_epoch", disk.known_epoch.to_string()))
        })
        .await
    }

    async fn commit(&self, takeover: &Takeover<'_>, record: Bytes) -> Result<(), Error> {
        self.call("commit", |disk| {
            if let Some(rows) = disk.staged.remove(takeover.id) {
                disk.owned.push((takeover.slots, takeover.slot_epoch, rows));
            }
            disk.records.insert(takeover.id.clone(), record);
            Ok(())
        })
        .await
    }

    async fn discard(&self, id: &MigrationId, record: Bytes) -> Result<(), Error> {
        self.call("discard", |disk| {
            disk.staged.remove(id);
            disk.records.insert(id.clone(), record);
            Ok(())
        })
        .await
    }

    async fn forget(&self, id: &MigrationId) -> Result<(), Error> {
        self.call("forget", |disk| {
            disk.records.remove(id);
            disk.staged.remove(id);
            Ok(())
        })
        .await
    }

    fn hold(&self, _: SlotRange) -> Hold {
        self.holds.fetch_add(1, Ordering::SeqCst);
        Box::new(Counted(Arc::clone(&self.holds)))
    }
}

pub fn digests_of(rows: &Rows) -> Vec<SlotDigest> {
    let mut digests = SlotDigests::new();
    for (key, (_, image)) in rows {
        if let Some(image) = image {
            digests.add(key, image);
        }
    }
    digests.of(SlotRange::FULL)
}

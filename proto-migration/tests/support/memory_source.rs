//! A store in memory that gives slots away: rows, a change log, and clients that are held, slowed and redirected.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use proto_common::clock::now_unix_ms;
use proto_common::error::Error;
use proto_common::fence::Fence;
use proto_common::ids::MigrationId;
use proto_common::slots::{SlotRange, slot_of};
use proto_migration::MigrationSpec;
use proto_migration::Reason;
use proto_migration::digest::{SlotDigest, SlotDigests};
use proto_migration::entry::{Entry, Image};
use proto_migration::hold::{Held, Hold, HoldMode};
use proto_migration::source::{
    ChangeCursor, ChangePage, Handover, LogState, MigrationSource, PageLimit, RowPage, SourceTerms,
};
use tokio::sync::{Notify, Semaphore, watch};

/// Clones are one store.
#[derive(Clone, Default)]
pub struct MemorySource {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
    slowed_ms: AtomicU64,
    pages: AtomicU64,
}

#[derive(Default)]
struct State {
    rows: BTreeMap<Bytes, Image>,
    seq: u64,
    logs: HashMap<MigrationId, Log>,
    holds: Vec<(u64, SlotRange, HoldMode, Arc<AtomicU64>)>,
    next_hold: u64,
    writing: Vec<u16>,
    reading: Vec<u16>,
    /// Slots that others own, and at which epoch.
    moved: Vec<(SlotRange, String, u64)>,
    epoch: u64,
    fence: Fence,
    delay: Duration,
    longest_delay: Duration,
    /// Faults to inject.
    pub(crate) faults: Faults,
}

/// What a test makes go wrong.
#[derive(Default, Clone)]
pub struct Faults {
    /// The digests say one key more than there is, in this slot.
    pub wrong_digest: Option<u16>,
    /// Reading changes fails once, as if the log had been cut.
    pub lose_log: bool,
    /// A page takes this long.
    pub slow_pages: Duration,
    /// Writes that are on their way end this long after a hold.
    pub slow_drain: Duration,
    /// The same of reads, where they are held, too.
    pub slow_reads: Duration,
    /// Whoever is admitted waits for a permit, with what the store says decided.
    pub slow_admit: Option<Arc<Semaphore>>,
    /// So many keys and bytes are estimated, whatever there is.
    pub estimate: Option<(u64, u64)>,
    /// Nothing is given up or claimed.
    pub full_disk: bool,
    /// The store panics when it is told who owns the slots now, and counts that.
    pub panics: Option<Arc<AtomicU64>>,
}

struct Log {
    slots: SlotRange,
    base: u64,
    released: u64,
    changes: Vec<(u64, Bytes, u64)>,
    state: watch::Sender<LogState>,
}

impl Log {
    fn publish(&self, head_seq: u64) {
        let left = || self.changes.iter().filter(|(seq, ..)| *seq > self.released);
        self.state.send_replace(LogState {
            head_seq,
            entries: left().count() as u64,
            bytes: left().map(|(_, key, _)| key.len() as u64 + 16).sum(),
            oldest_unix_ms: left().next().map(|(_, _, at)| *at),
        });
    }
}

/// What a client gets.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    Value(Option<Bytes>),
    Moved { owner: String, epoch: u64 },
}

struct MemoryHold {
    shared: Arc<Shared>,
    id: u64,
    held: Arc<AtomicU64>,
}

impl Held for MemoryHold {
    fn held_requests(&self) -> u64 {
        self.held.load(Ordering::SeqCst)
    }
}

impl Drop for MemoryHold {
    fn drop(&mut self) {
        self.shared.lock().holds.retain(|(id, ..)| *id != self.id);
        self.shared.changed.notify_waiters();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl MemorySource {
    /// The same store in a new process: nothing is held or under way.
    pub fn restarted(&self) -> Self {
        let state = std::mem::take(&mut *self.shared.lock());
        let state = State { holds: Vec::new(), writing: Vec::new(), reading: Vec::new(), ..state };
        Self { shared: Arc::new(Shared { state: Mutex::new(state), ..Shared::default() }) }
    }

    /// Pages of rows that were read.
    pub fn pages(&self) -> u64 {
        self.shared.pages.load(Ordering::SeqCst)
    }

    /// What is held now.
    pub fn held(&self) -> Option<HoldMode> {
        let state = self.shared.lock();
        let any = |mode| state.holds.iter().any(|(_, _, held, _)| *held == mode);
        if any(HoldMode::All) {
            Some(HoldMode::All)
        } else {
            any(HoldMode::Writes).then_some(HoldMode::Writes)
        }
    }

    /// The slots have come back, empty and at this epoch.
    pub fn take_back(&self, epoch: u64) {
        let mut state = self.shared.lock();
        state.moved.clear();
        state.rows.clear();
        state.epoch = epoch;
    }

    /// Another node turns out to own all slots.
    pub fn lose(&self, owner: &str, epoch: u64) {
        self.shared.lock().moved.push((SlotRange::FULL, owner.into(), epoch));
    }

    /// A change of what is in no log.
    pub fn touch(&self) {
        let state = &mut *self.shared.lock();
        state.seq += 1;
        for log in state.logs.values() {
            log.publish(state.seq);
        }
    }

    pub fn set_faults(&self, faults: Faults) {
        self.shared.lock().faults = faults;
    }

    pub fn set_fence(&self, fence: Fence) {
        self.shared.lock().fence = fence;
    }

    pub fn delay(&self) -> Duration {
        self.shared.lock().delay
    }

    /// The longest that there was.
    pub fn longest_delay(&self) -> Duration {
        self.shared.lock().longest_delay
    }

    /// As an operator does whose journal is lost.
    pub fn keep_no_log(&self, id: &MigrationId) {
        self.shared.lock().logs.remove(id);
    }

    pub fn has_log(&self, id: &MigrationId) -> bool {
        self.shared.lock().logs.contains_key(id)
    }

    /// Rows of `slots`, as clients would see them.
    pub fn rows(&self, slots: SlotRange) -> BTreeMap<Bytes, Image> {
        let state = self.shared.lock();
        let inside = state.rows.iter().filter(|(key, _)| slots.contains(slot_of(key)));
        inside.map(|(key, image)| (key.clone(), image.clone())).collect()
    }

    /// A write by a client; `None` deletes. Waits where it is held.
    pub async fn write(&self, key: &[u8], value: Option<&[u8]>) -> Answer {
        let slot = slot_of(key);
        let delay = self.shared.lock().delay;
        if !delay.is_zero() {
            let slowed = proto_common::clock::millis(delay).max(1);
            self.shared.slowed_ms.fetch_add(slowed, Ordering::SeqCst);
            tokio::time::sleep(delay).await;
        }
        if let Some(moved) = self.enter(slot, HoldMode::Writes).await {
            return moved;
        }
        tokio::task::yield_now().await;
        let mut state = self.shared.lock();
        let key = Bytes::copy_from_slice(key);
        match value {
            Some(value) => {
                let image = Image { value: Bytes::copy_from_slice(value), expires_unix_ms: None };
                state.rows.insert(key.clone(), image);
            }
            None => {
                state.rows.remove(&key);
            }
        }
        state.seq += 1;
        let seq = state.seq;
        for log in state.logs.values_mut() {
            if log.slots.contains(slot) {
                log.changes.push((seq, key.clone(), now_unix_ms()));
            }
            log.publish(seq);
        }
        state.writing.retain({
            let mut first = true;
            move |busy| *busy != slot || !std::mem::take(&mut first)
        });
        drop(state);
        self.shared.changed.notify_waiters();
        Answer::Done
    }

    /// A read by a client.
    pub async fn read(&self, key: &[u8]) -> Answer {
        if let Some(moved) = self.enter(slot_of(key), HoldMode::All).await {
            return moved;
        }
        let mut state = self.shared.lock();
        state.reading.pop();
        Answer::Value(state.rows.get(key).map(|image| image.value.clone()))
    }

    async fn enter(&self, slot: u16, from: HoldMode) -> Option<Answer> {
        let mut counted = false;
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let mut state = self.shared.lock();
                let held = state.holds.iter().find(|(_, slots, mode, _)| {
                    slots.contains(slot) && (*mode == HoldMode::All || from == HoldMode::Writes)
                });
                if let Some((_, _, _, count)) = held {
                    if !std::mem::replace(&mut counted, true) {
                        count.fetch_add(1, Ordering::SeqCst);
                    }
                } else {
                    if let Some((_, owner, epoch)) =
                        state.moved.iter().find(|(slots, ..)| slots.contains(slot))
                    {
                        return Some(Answer::Moved { owner: owner.clone(), epoch: *epoch });
                    }
                    match from {
                        HoldMode::Writes => state.writing.push(slot),
                        HoldMode::All => state.reading.push(slot),
                    }
                    return None;
                }
            }
            changed.await;
        }
    }

    fn log<T>(&self, id: &MigrationId, work: impl FnOnce(&mut Log, u64) -> T) -> Result<T, Error> {
        let mut state = self.shared.lock();
        let seq = state.seq;
        let log = state.logs.get_mut(id).ok_or_else(|| Reason::LogLost.error("there is no such log"))?;
        Ok(work(log, seq))
    }
}

impl MigrationSource for MemorySource {
    async fn admit(&self, spec: &MigrationSpec, fence: Option<Fence>) -> Result<SourceTerms, Error> {
        self.check_owner(spec.slots, u64::MAX)?;
        let (terms, gate) = {
            let state = self.shared.lock();
            if let Some(fence) = fence {
                fence.check(state.fence, &spec.source_shard)?;
            }
            let rows = state.rows.keys().filter(|key| spec.slots.contains(slot_of(key)));
            let (estimated_keys, estimated_bytes) = match state.faults.estimate {
                Some((keys, bytes)) => (Some(keys), Some(bytes)),
                None => (Some(rows.count() as u64), None),
            };
            let terms = SourceTerms { slot_epoch: state.epoch, estimated_keys, estimated_bytes };
            (terms, state.faults.slow_admit.clone())
        };
        if let Some(gate) = gate {
            gate.acquire().await.unwrap().forget();
        }
        Ok(terms)
    }

    fn check_owner(&self, asked: SlotRange, slot_epoch: u64) -> Result<(), Error> {
        let state = self.shared.lock();
        if let Some((slots, owner, _)) = state.moved.iter().find(|(slots, ..)| slots.overlaps(asked)) {
            return Err(Reason::NotSlotOwner
                .error(format!("{owner} owns {slots}"))
                .metadata("slot", slots.start().to_string())
                .metadata("owner", owner.as_str()));
        }
        if state.epoch > slot_epoch {
            return Err(Reason::NotSlotOwner
                .error("the slots have come back since")
                .metadata("slot", asked.start().to_string()));
        }
        Ok(())
    }

    async fn open_log(&self, id: &MigrationId, slots: SlotRange, from: Option<u64>) -> Result<u64, Error> {
        let mut state = self.shared.lock();
        let seq = state.seq;
        match from {
            Some(from) => {
                let log = state.logs.get(id).ok_or_else(|| Reason::LogLost.error("there is no such log"))?;
                if from < log.released.max(log.base) {
                    return Err(Reason::LogLost.error("the log was cut"));
                }
                Ok(log.base)
            }
            None => {
                let log = Log {
                    slots,
                    base: seq,
                    released: seq,
                    changes: Vec::new(),
                    state: watch::Sender::new(LogState::default()),
                };
                log.publish(seq);
                state.logs.insert(id.clone(), log);
                Ok(seq)
            }
        }
    }

    async fn logs(&self) -> Result<Vec<(MigrationId, SlotRange)>, Error> {
        Ok(self.shared.lock().logs.iter().map(|(id, log)| (id.clone(), log.slots)).collect())
    }

    fn watch_log(&self, id: &MigrationId) -> watch::Receiver<LogState> {
        self.log(id, |log, _| log.state.subscribe()).unwrap_or_else(|_| watch::channel(LogState::default()).1)
    }

    async fn read_rows(&self, id: &MigrationId, cursor: &Bytes, limit: PageLimit) -> Result<RowPage, Error> {
        self.shared.pages.fetch_add(1, Ordering::SeqCst);
        let slow = self.shared.lock().faults.slow_pages;
        tokio::time::sleep(slow).await;
        let slots = self.log(id, |log, _| log.slots)?;
        let state = self.shared.lock();
        // The cursor is "0" at the start, else "1" and the last key.
        let after = cursor.strip_prefix(b"1");
        let (mut entries, mut bytes, mut last) = (Vec::new(), 0, true);
        for (key, image) in &state.rows {
            if after.is_some_and(|after| key[..] <= *after) || !slots.contains(slot_of(key)) {
                continue;
            }
            if entries.len() >= limit.entries.min(50) || bytes >= limit.bytes {
                last = false;
                break;
            }
            bytes += key.len() + image.value.len();
            entries.push(Entry { seq: state.seq.max(1), key: key.clone(), image: Some(image.clone()) });
        }
        let cursor = entries
            .last()
            .map_or_else(|| Bytes::from_static(b"0"), |entry: &Entry| [b"1", &entry.key[..]].concat().into());
        Ok(RowPage { entries, cursor, last })
    }

    async fn read_changes(
        &self,
        id: &MigrationId,
        cursor: ChangeCursor,
        limit: PageLimit,
    ) -> Result<ChangePage, Error> {
        if std::mem::take(&mut self.shared.lock().faults.lose_log) {
            self.shared.lock().logs.remove(id);
        }
        let rows = self.shared.lock().rows.clone();
        self.log(id, |log, head| {
            if cursor.watermark < log.released {
                return Err(Reason::LogLost.error("the log was cut"));
            }
            let behind = log.changes.iter().filter(|(seq, ..)| *seq > cursor.watermark);
            let taken: Vec<_> = behind.take(limit.entries.min(50)).collect();
            let through = if taken.len() < 50 { head } else { taken.last().map_or(head, |(seq, ..)| *seq) };
            // The image at the head is that of a later change, too; it is sent again with that one.
            let mut latest: BTreeMap<&Bytes, u64> = BTreeMap::new();
            for (seq, key, _) in &taken {
                latest.insert(key, *seq);
            }
            let mut entries: Vec<Entry> = latest
                .into_iter()
                .map(|(key, seq)| Entry { seq, key: key.clone(), image: rows.get(key).cloned() })
                .collect();
            entries.sort_by_key(|entry| entry.seq);
            Ok(ChangePage { entries, through: Some(through), next: ChangeCursor::at(through) })
        })?
    }

    async fn release_changes(&self, id: &MigrationId, through: u64) -> Result<(), Error> {
        self.log(id, |log, head| {
            log.released = log.released.max(through);
            log.publish(head);
        })
    }

    fn slow_writers(&self, _id: &MigrationId, delay: Duration) {
        let mut state = self.shared.lock();
        state.delay = delay;
        state.longest_delay = state.longest_delay.max(delay);
    }

    fn writers_slowed_ms(&self, _id: &MigrationId) -> u64 {
        self.shared.slowed_ms.load(Ordering::SeqCst)
    }

    async fn hold(&self, slots: SlotRange, mode: HoldMode) -> Result<Hold, Error> {
        let held = Arc::new(AtomicU64::new(0));
        let hold = {
            let mut state = self.shared.lock();
            let id = state.next_hold;
            state.next_hold += 1;
            state.holds.push((id, slots, mode, Arc::clone(&held)));
            MemoryHold { shared: Arc::clone(&self.shared), id, held }
        };
        let began = Instant::now();
        let slow = || match (mode, &self.shared.lock().faults) {
            (HoldMode::Writes, faults) => faults.slow_drain,
            (HoldMode::All, faults) => faults.slow_drain.max(faults.slow_reads),
        };
        // Ends when the fault does.
        while began.elapsed() < slow() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let state = self.shared.lock();
                let busy = |list: &[u16]| list.iter().any(|slot| slots.contains(*slot));
                if !busy(&state.writing) && (mode == HoldMode::Writes || !busy(&state.reading)) {
                    return Ok(Box::new(hold));
                }
            }
            changed.await;
        }
    }

    async fn prepare_digests(&self, _id: &MigrationId) -> Result<(), Error> {
        Ok(())
    }

    async fn digests(&self, id: &MigrationId) -> Result<Vec<SlotDigest>, Error> {
        let slots = self.log(id, |log, _| log.slots)?;
        let mut digests = SlotDigests::new();
        for (key, image) in self.rows(slots) {
            digests.add(&key, &image);
        }
        if let Some(slot) = self.shared.lock().faults.wrong_digest {
            digests.change(slot, None, Some(1));
        }
        Ok(digests.of(slots))
    }

    async fn give_up(&self, handover: &Handover) -> Result<(), Error> {
        let panics = self.shared.lock().faults.panics.clone();
        if let Some(panics) = panics {
            panics.fetch_add(1, Ordering::SeqCst);
            panic!("a test asks for it");
        }
        let mut state = self.shared.lock();
        if state.faults.full_disk {
            return Err(Reason::StorageFailed.error("the disk is full"));
        }
        let Handover { id, slots, owner, slot_epoch, .. } = handover;
        if state.moved.iter().any(|(_, _, epoch)| epoch == slot_epoch) {
            return Ok(());
        }
        state.moved.push((*slots, owner.to_string(), *slot_epoch));
        state.logs.remove(id);
        state.rows.retain(|key, _| !slots.contains(slot_of(key)));
        Ok(())
    }

    async fn keep(&self, id: &MigrationId, _slots: SlotRange, claim: Option<u64>) -> Result<(), Error> {
        let mut state = self.shared.lock();
        if state.faults.full_disk {
            return Err(Reason::StorageFailed.error("the disk is full"));
        }
        state.logs.remove(id);
        if let Some(claim) = claim {
            state.epoch = claim;
        }
        Ok(())
    }
}

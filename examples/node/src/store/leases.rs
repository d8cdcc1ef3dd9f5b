//! Leases of the change log: for which slots changes are logged, and how far that is.
//!
//! A lease belongs to a migration. It is durable (table `leases`); this is what the store knows of it in memory: what the
//! log holds, and count and digest of the leased rows.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use proto::common::ids::MigrationId;
use proto::migration::source::LogState;
use redb::{Database, ReadableDatabase as _, ReadableTable as _};
use tokio::sync::watch;

use super::digest_scan::DigestScan;
use super::log::{LeaseChange, LogEffects, Logged};
use super::retained::Retained;
use super::{StoreError, counters, tables};
use crate::common::SlotRange;

/// What the writer needs of a lease.
#[derive(Debug, Clone)]
pub(super) struct ActiveLease {
    pub(super) id: MigrationId,
    pub(super) number: u32,
    pub(super) slots: SlotRange,
    begin: Arc<AtomicU64>,
    released: Arc<AtomicU64>,
}

impl ActiveLease {
    /// The log starts behind the first one, and is not needed up to the second one.
    pub(super) fn trimmable(&self) -> (u64, u64) {
        (self.begin.load(Ordering::Relaxed), self.released.load(Ordering::Relaxed))
    }
}

/// A lease.
#[derive(Debug)]
pub(super) struct Lease {
    active: ActiveLease,
    retained: Retained,
    state: watch::Sender<LogState>,
    pub(super) digests: DigestScan,
}

impl Lease {
    fn new(id: MigrationId, number: u32, slots: SlotRange, begin: u64, head_seq: u64) -> Self {
        let at = || Arc::new(AtomicU64::new(begin));
        Self {
            active: ActiveLease { id, number, slots, begin: at(), released: at() },
            retained: Retained::new(),
            state: watch::Sender::new(LogState { head_seq, ..LogState::default() }),
            digests: DigestScan::new(),
        }
    }

    pub(super) fn number(&self) -> u32 {
        self.active.number
    }

    /// Changes that are retained.
    pub(super) fn entries(&self) -> u64 {
        self.state.borrow().entries
    }

    pub(super) fn slots(&self) -> SlotRange {
        self.active.slots
    }

    fn publish(&self, head_seq: u64) {
        let now = LogState {
            head_seq,
            entries: self.retained.entries(),
            bytes: self.retained.bytes(),
            oldest_unix_ms: self.retained.oldest_unix_ms(),
        };
        self.state.send_if_modified(|state| std::mem::replace(state, now) != now);
    }

    fn release(&mut self, through: u64, head_seq: u64) {
        self.active.released.fetch_max(through, Ordering::Relaxed);
        self.retained.release(through);
        self.publish(head_seq);
    }
}

/// All leases of a store.
#[derive(Debug)]
pub(super) struct Leases {
    /// The same as in `all`, for the writer.
    active: RwLock<Arc<[ActiveLease]>>,
    all: Mutex<BTreeMap<MigrationId, Lease>>,
}

impl Leases {
    pub(super) fn load(database: &Database) -> Result<Self, StoreError> {
        let txn = database.begin_read()?;
        let head_seq = counters::last(&txn.open_table(tables::COUNTERS)?, counters::SEQUENCE)?;
        let log = txn.open_table(tables::CHANGES)?;
        let mut all = BTreeMap::new();
        for entry in txn.open_table(tables::LEASES)?.iter()? {
            let (id, lease) = entry?;
            let (number, start, end, begin) = lease.value();
            let damaged = |what: String| StoreError::Damaged(format!("a row of table leases: {what}"));
            let id = MigrationId::new(id.value()).map_err(|error| damaged(error.to_string()))?;
            let slots = SlotRange::new(start, end).map_err(|error| damaged(error.to_string()))?;
            let mut lease = Lease::new(id.clone(), number, slots, begin, head_seq);
            for change in log.range((number, 0)..=(number, u64::MAX))? {
                let (place, logged) = change?;
                let Logged { unix_ms, bytes, position: _ } = Logged::decode(logged.value())?;
                lease.retained.push(place.value().1, bytes, unix_ms);
            }
            lease.publish(head_seq);
            all.insert(id, lease);
        }
        let leases = Self { active: RwLock::new(Arc::new([])), all: Mutex::new(all) };
        leases.set_active(&leases.lock());
        Ok(leases)
    }

    /// What the writer has to watch.
    pub(super) fn active(&self) -> Arc<[ActiveLease]> {
        Arc::clone(&self.active.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs `work` on a lease, if there is one.
    pub(super) fn with<T>(&self, id: &MigrationId, work: impl FnOnce(&mut Lease) -> T) -> Option<T> {
        self.lock().get_mut(id).map(work)
    }

    /// The state of a log, as it changes. Of none: its sender is gone.
    pub(super) fn watch(&self, id: &MigrationId) -> watch::Receiver<LogState> {
        match self.lock().get(id) {
            Some(lease) => lease.state.subscribe(),
            None => watch::Sender::new(LogState::default()).subscribe(),
        }
    }

    /// A log is not needed up to `through` any more.
    pub(super) fn release(&self, id: &MigrationId, through: u64, head_seq: u64) {
        if let Some(lease) = self.lock().get_mut(id) {
            lease.release(through.min(head_seq), head_seq);
        }
    }

    /// Whether there are entries that can be removed.
    pub(super) fn is_trimmable(&self) -> bool {
        self.active().iter().any(|lease| {
            let (begin, released) = lease.trimmable();
            begin < released
        })
    }

    /// In the writer's thread, after the commit.
    pub(super) fn publish(&self, effects: LogEffects) {
        let LogEffects { changes, unix_ms, last_seq, trimmed, leases } = effects;
        let mut all = self.lock();
        if all.is_empty() && leases.is_empty() {
            return;
        }
        for change in changes {
            let number = change.lease;
            if let Some(lease) = all.values_mut().find(|lease| lease.number() == number) {
                lease.retained.push(change.seq, change.bytes, unix_ms);
                lease.digests.change(change);
            }
        }
        for (number, begin) in trimmed {
            if let Some(lease) = all.values().find(|lease| lease.number() == number) {
                lease.active.begin.fetch_max(begin, Ordering::Relaxed);
            }
        }
        let changed = !leases.is_empty();
        for change in leases {
            match change {
                LeaseChange::Open { id, number, slots, begin } => {
                    all.insert(id.clone(), Lease::new(id, number, slots, begin, last_seq));
                }
                LeaseChange::Close { id } => {
                    all.remove(&id);
                }
            }
        }
        if changed {
            self.set_active(&all);
        }
        for lease in all.values() {
            lease.publish(last_seq);
        }
    }

    fn set_active(&self, all: &BTreeMap<MigrationId, Lease>) {
        let active = all.values().map(|lease| lease.active.clone()).collect();
        *self.active.write().unwrap_or_else(PoisonError::into_inner) = active;
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<MigrationId, Lease>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

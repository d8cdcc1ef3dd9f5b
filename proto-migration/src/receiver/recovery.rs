//! What an earlier process left, what a panic left, and what nobody comes back for.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use proto_common::error::Error;
use proto_common::guard::{RangeGuard, RangeHold};
use proto_common::ids::{MigrationId, NodeId};
use proto_common::slots::SlotRange;
use proto_common::v1::Direction;

use super::Inner;
use super::incoming::{Incoming, Slot, Stop, guarded};
use super::outcome::discarded;
use super::places::COME_BACK;
use super::record::{Record, Unread};
use crate::Reason;
use crate::target::{MigrationTarget, StoredMigration};
use crate::v1::{MigrationProgress, MigrationState};

/// How often records that nobody needs are looked for, at least.
const COLLECT_INTERVAL: Duration = Duration::from_secs(60);

/// A record of a migration to this node that cannot be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnreadRecord {
    /// What is wrong with it, as the end of a sentence that begins with "the record".
    pub problem: String,
    /// The slots that nobody may move because of it: those that rows are staged for, which the store knows without it, and those that it tells itself where
    /// that can be read, unless they are told by a whole record of the migration that it names. Empty where nothing is staged: what was committed or given up
    /// is in the store, and leaves nothing in doubt.
    pub slots: Vec<SlotRange>,
}

/// Reads records as [`start`](super::MigrationReceiverBuilder::start) does; for tools that look at the store of a node that does not run, too.
#[must_use]
pub fn read_records(
    stored: Vec<StoredMigration>,
) -> Vec<(StoredMigration, Result<MigrationProgress, UnreadRecord>)> {
    let read = read_all(stored).into_iter();
    read.map(|(stored, read)| (stored, read.map(|record| record.progress))).collect()
}

fn read_all(stored: Vec<StoredMigration>) -> Vec<(StoredMigration, Result<Record, UnreadRecord>)> {
    let read: Vec<_> = stored.into_iter().map(|stored| (Record::decode(&stored), stored)).collect();
    let whole: HashSet<MigrationId> =
        read.iter().filter(|(read, _)| read.is_ok()).map(|(_, stored)| stored.id.clone()).collect();
    let mut all = Vec::with_capacity(read.len());
    for (read, stored) in read {
        let read = read.map_err(|Unread { problem, told }| {
            // Those of a migration whose own record is whole are not in doubt.
            let told = told.filter(|(id, _)| MigrationId::new(id).map_or(true, |id| !whole.contains(&id)));
            let mut slots: Vec<_> = stored.slots.into_iter().chain(told.map(|(_, slots)| slots)).collect();
            slots.dedup();
            UnreadRecord { problem, slots }
        });
        all.push((stored, read));
    }
    all
}

/// Sorts records; those that cannot be read are left alone, and nobody gets their slots.
pub(super) fn sort(
    stored: Vec<StoredMigration>,
    guard: &RangeGuard,
) -> (Vec<Incoming>, HashMap<MigrationId, Vec<RangeHold>>) {
    let (mut known, mut untrusted) = (Vec::new(), HashMap::new());
    for (StoredMigration { id, staged, .. }, read) in read_all(stored) {
        match read {
            Ok(record) => known.push(Incoming::new(record, staged)),
            Err(UnreadRecord { problem, slots }) => {
                let shown: Vec<_> = slots.iter().map(ToString::to_string).collect();
                let shown = if shown.is_empty() { "none".to_owned() } else { shown.join(" and ") };
                tracing::error!(migration_id = %id, problem, slots = shown, "the record of a migration cannot be trusted; left as it is");
                let why = damaged(&id);
                untrusted.insert(id, slots.into_iter().map(|slots| guard.quarantine(slots, &why)).collect());
            }
        }
    }
    (known, untrusted)
}

/// How a record that cannot be read is called, by peers and operators.
pub(super) fn damaged(id: &MigrationId) -> String {
    format!("the damaged record of migration {id}")
}

impl<T: MigrationTarget> Inner<T> {
    /// Takes what an earlier process left: what was prepared is held before anybody is served.
    pub(super) async fn readopt(self: &Arc<Self>, mut incoming: Incoming) -> Result<(), Error> {
        let id = MigrationId::new(&incoming.record.progress.migration_id)
            .map_err(|error| error.at("migration_id"))?;
        self.hold_as_recorded(&id, &mut incoming).await?;
        let cancelled = incoming.state() == MigrationState::Cancelled;
        let recorded = cancelled
            && self
                .migrations
                .get(Some(Direction::In), &id)
                .is_ok_and(|ended| ended.state() == MigrationState::Cancelled);
        if !recorded {
            self.track(&mut incoming)?;
        }
        let deciding = incoming.state() == MigrationState::Prepared && incoming.record.kept.deciding;
        incoming.unrecorded = cancelled && !recorded;
        let slot = Slot::new(id.clone(), Some(incoming));
        if cancelled && !recorded {
            let mut state = slot.state.lock().await;
            if let Some(incoming) = state.as_mut() {
                self.record_end(&slot, incoming).await;
            }
        }
        self.slots().insert(id, Arc::clone(&slot));
        if deciding {
            let inner = Arc::clone(self);
            self.tasks.spawn(async move { inner.decide_again(&slot).await });
        }
        Ok(())
    }

    /// The commit was asked for before the crash: whoever decides says what became of it.
    async fn decide_again(&self, slot: &Slot) {
        let mut state = slot.state.lock().await;
        if let Some(incoming) = state.as_mut()
            && incoming.state() == MigrationState::Prepared
            && incoming.record.kept.deciding
            && let Err(error) = self.commit(slot, incoming, None).await
        {
            tracing::warn!(migration_id = %slot.id, error = %error, "not committed after the restart");
        }
    }

    /// Holds what a migration in this state holds.
    async fn hold_as_recorded(&self, id: &MigrationId, incoming: &mut Incoming) -> Result<(), Error> {
        let slots = incoming.record.spec.slots;
        let open = matches!(incoming.state(), MigrationState::Receiving | MigrationState::Prepared);
        if !open {
            incoming.release();
            return Ok(());
        }
        if incoming.state() == MigrationState::Prepared {
            if incoming.hold.is_none() {
                incoming.hold = Some(guarded(async { Ok(self.target.hold(slots)) }).await?);
            }
        } else {
            incoming.hold = None;
        }
        if incoming.place.is_none() {
            incoming.place = Some(self.places.take(&incoming.record.spec.source_node));
        }
        if incoming.range.is_none() {
            match self.range(id, slots) {
                Ok(range) => incoming.range = Some(range),
                Err(error) => tracing::error!(migration_id = %id, error = %error, "the slots are busy"),
            }
        }
        Ok(())
    }

    /// Reads a record again that a panic of the store left in doubt.
    pub(super) async fn settle(&self, slot: &Slot, state: &mut Option<Incoming>) -> Result<(), Error> {
        let Some(incoming) = state.as_mut().filter(|incoming| incoming.doubt) else { return Ok(()) };
        let stored = guarded(async { self.target.load().await }).await?;
        let Some(found) = stored.into_iter().find(|stored| stored.id == slot.id) else {
            if let Some(tracker) = state.take().and_then(|incoming| incoming.tracker) {
                tracker.finish(|shown| shown.enter(MigrationState::Failed));
            }
            return Ok(());
        };
        let record = Record::decode(&found).map_err(|Unread { problem, .. }| {
            Reason::StorageFailed.error(format!("the record of migration {} {problem}", slot.id))
        })?;
        incoming.record = record;
        incoming.staged = found.staged;
        self.hold_as_recorded(&slot.id, incoming).await?;
        incoming.doubt = false;
        incoming.show(|_| {});
        if incoming.state() == MigrationState::Cancelled && incoming.tracker.is_some() {
            incoming.unrecorded = true;
            self.record_end(slot, incoming).await;
        }
        Ok(())
    }

    /// Drops records that nobody comes back for, and cancels what has lost its sense, until the node stops.
    pub(super) async fn collect(&self) {
        let every = COLLECT_INTERVAL.min(self.unused_kept() / 4).max(Duration::from_millis(50));
        loop {
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = tokio::time::sleep(every) => {}
            }
            let slots: Vec<_> = self.slots().values().cloned().collect();
            for slot in slots {
                self.cancel_lost(&slot).await;
                self.collect_one(&slot, self.limits.record_kept).await;
                self.remove_empty(&slot);
            }
        }
    }

    /// Drops the oldest records of cancelled migrations from `source`, beyond those that are kept for a node, before one more begins: whoever begins and
    /// cancels, again and again, fills neither the store nor the memory. Streams about such records are ended, and where that takes a while, it has to come back.
    /// What is committed cannot be dropped before its source knows of it: with too many such records, nothing begins.
    pub(super) async fn make_room(&self, source: &NodeId) -> Result<(), Error> {
        let slots: Vec<_> = self.slots().values().cloned().collect();
        let (mut ended, mut committed) = (Vec::new(), 0);
        for slot in slots {
            let found = slot.state.try_lock().ok().and_then(|state| {
                let incoming =
                    state.as_ref().filter(|incoming| incoming.record.spec.source_node == *source)?;
                // What an operator has committed nobody may come back for.
                let waits = incoming.record.progress.resolved_reason.is_none();
                committed += usize::from(waits && incoming.state() == MigrationState::Committed);
                let is_one = incoming.state() == MigrationState::Cancelled;
                is_one.then(|| (slot.has_stream(), incoming.last_stream, discarded(incoming)))
            });
            ended.extend(found.map(|found| (found, slot)));
        }
        let limit = self.limits.committed_per_peer;
        if committed >= limit {
            return Err(Reason::TooManyMigrations
                .error(format!(
                    "{committed} migrations from node {source} are committed here without its having taken note of it; it has to, or an operator has to \
                     resolve them, before one more begins"
                ))
                .metadata("limit", limit.to_string())
                .metadata("peer", source.as_str())
                .retry_after(COME_BACK));
        }
        let limit = self.limits.cancelled_per_peer;
        let beyond = ended.len().saturating_sub(limit);
        ended.sort_by_key(|((has_stream, since, _), _)| (*has_stream, *since));
        let mut left = 0;
        for ((has_stream, _, discarded), slot) in ended.into_iter().take(beyond) {
            if has_stream {
                slot.tell(Stop::Discarded(discarded));
            } else {
                self.collect_one(&slot, Duration::ZERO).await;
                self.remove_empty(&slot);
            }
            left += usize::from(self.is_current(&slot));
        }
        if left == 0 {
            return Ok(());
        }
        Err(Reason::TooManyMigrations
            .error(format!(
                "{left} migrations that were cancelled, beyond the {limit} that are kept for node {source}, have streams, or cannot be forgotten yet; \
                 it is tried again"
            ))
            .metadata("limit", limit.to_string())
            .metadata("peer", source.as_str())
            .retry_after(COME_BACK))
    }

    /// How long a record is kept of which nothing is staged. It has the slots and a place, and where its source never heard that it was accepted, nobody comes
    /// to give them back. One that does come begins anew.
    fn unused_kept(&self) -> Duration {
        self.limits.record_kept.min(self.idle().saturating_mul(2))
    }

    /// Cancels a migration whose source has lost the slots to another node: nothing of it can be committed, and it would keep that one off them. Seen twice, since
    /// what this node knows of owners may be a second old.
    async fn cancel_lost(&self, slot: &Slot) {
        let Ok(_attach) = slot.attach.try_lock() else { return };
        let Ok(mut state) = slot.state.try_lock() else { return };
        let Some(incoming) = state.as_mut() else { return };
        let receiving = incoming.state() == MigrationState::Receiving && !incoming.doubt;
        let lost = receiving.then(|| self.target.lost_by_source(&incoming.record.spec)).flatten();
        let before = std::mem::replace(&mut incoming.lost, lost.is_some());
        let Some(reason) = lost.filter(|_| before) else { return };
        tracing::warn!(migration_id = %slot.id, reason, "cancelled: its source has lost the slots");
        if let Err(error) = self.cancel_here(slot, incoming, &reason, false).await {
            tracing::warn!(migration_id = %slot.id, error = %error, "cannot be cancelled; it is tried again");
        }
    }

    /// Drops a record that nobody came back for: of one that was cancelled, within `kept`.
    async fn collect_one(&self, slot: &Slot, kept: Duration) {
        // One that is worked on is not stale.
        let Ok(_attach) = slot.attach.try_lock() else { return };
        let Ok(mut state) = slot.state.try_lock() else { return };
        let Some(incoming) = state.as_mut() else { return };
        if incoming.unrecorded {
            self.record_end(slot, incoming).await;
        }
        let kept = if incoming.state() == MigrationState::Cancelled { kept } else { self.unused_kept() };
        let stale = incoming.last_stream.elapsed() >= kept;
        if incoming.doubt || slot.has_stream() || !stale || !incoming.is_empty() {
            return;
        }
        if let Err(error) = guarded(async { self.target.forget(&slot.id).await }).await {
            tracing::warn!(migration_id = %slot.id, error = %error, "cannot forget; it is tried again");
            return;
        }
        if let Some(Incoming { tracker: Some(tracker), mut record, .. }) = state.take() {
            let error = Reason::StreamEndedEarly.error("no stream came for long, and nothing was staged");
            record.progress.task().error = Some(error.into());
            record.progress.enter(MigrationState::Failed);
            if let Err(error) = self.journal.remember(&record.progress).await {
                tracing::warn!(migration_id = %slot.id, error = %error, "not in the history");
            }
            tracker.finish(|shown| *shown = record.progress);
        }
    }
}

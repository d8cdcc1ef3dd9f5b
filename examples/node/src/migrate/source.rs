//! The node as the source of a migration.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use proto::common::error::Error;
use proto::common::fence::Fence;
use proto::common::ids::MigrationId;
use proto::common::slots::SlotRange;
use proto::migration::digest::SlotDigest;
use proto::migration::hold::{Hold, HoldMode};
use proto::migration::limits::LONGEST_FREEZE;
use proto::migration::source::{
    ChangeCursor, ChangePage, Handover, LogState, PageLimit, RowPage, SourceTerms,
};
use proto::migration::{MigrationSource, MigrationSpec, Reason};
use tokio::sync::watch;

use super::{MigrateOptions, NodeHold, check_value_format, failed};
use crate::gate::{self, WriteDelay};
use crate::node::Node;
use crate::store::{Claim, MAX_EPOCH_LEAP};

/// Gives slots of a node away.
#[derive(Debug)]
pub struct NodeSource {
    node: Node,
    options: MigrateOptions,
    delays: Mutex<BTreeMap<MigrationId, WriteDelay>>,
}

impl NodeSource {
    /// Of `node`.
    #[must_use]
    pub fn new(node: Node, options: MigrateOptions) -> Self {
        Self { node, options, delays: Mutex::default() }
    }

    fn delays(&self) -> MutexGuard<'_, BTreeMap<MigrationId, WriteDelay>> {
        self.delays.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the target owns from now on. That it does is its word; how high it says so is believed as far as that of any peer.
    fn given(&self, handover: &Handover) -> Claim {
        let Handover { id: _, slots, owner, address: _, slot_epoch } = handover.clone();
        let most = self.node.gate().ownership().highest_epoch(slots).saturating_add(MAX_EPOCH_LEAP);
        Claim { range: slots, owner, epoch: slot_epoch.min(most) }
    }
}

impl MigrationSource for NodeSource {
    async fn admit(&self, spec: &MigrationSpec, fence: Option<Fence>) -> Result<SourceTerms, Error> {
        let store = self.node.store();
        check_value_format(spec)?;
        self.check_owner(spec.slots, u64::MAX)?;
        if let Some(fence) = fence {
            fence.check(
                store.raise_fence(&spec.source_shard, fence, None).await.map_err(failed)?,
                &spec.source_shard,
            )?;
        }
        Ok(SourceTerms {
            slot_epoch: self.node.gate().ownership().highest_epoch(spec.slots),
            estimated_keys: Some(store.rows_in(spec.slots)),
            estimated_bytes: Some(store.estimate_bytes(spec.slots).await.map_err(failed)?),
        })
    }

    fn check_owner(&self, slots: SlotRange, slot_epoch: u64) -> Result<(), Error> {
        let ownership = self.node.gate().ownership();
        for slot in slots.iter() {
            let claim = ownership.of(slot);
            let is_mine = |claim: &&Claim| claim.owner == *self.node.id();
            if claim.filter(is_mine).is_some_and(|claim| claim.epoch <= slot_epoch) {
                continue;
            }
            let me = self.node.id();
            let whose = match claim {
                None => format!("nobody, not by {me}"),
                Some(claim) if claim.owner == *me => {
                    format!("{me} at epoch {}, not up to {slot_epoch}", claim.epoch)
                }
                Some(claim) => format!("node {}, not by {me}", claim.owner),
            };
            let sentence = format!("slot {slot} of slots {slots} is owned by {whose}");
            let error = Reason::NotSlotOwner.error(sentence).metadata("slot", slot.to_string());
            return Err(match claim {
                Some(claim) => error.metadata("owner", claim.owner.as_str()),
                None => error,
            });
        }
        Ok(())
    }

    async fn open_log(&self, id: &MigrationId, slots: SlotRange, from: Option<u64>) -> Result<u64, Error> {
        self.node.store().open_log(id, slots, from).await.map_err(failed)
    }

    fn watch_log(&self, id: &MigrationId) -> watch::Receiver<LogState> {
        self.node.store().watch_log(id)
    }

    async fn read_rows(&self, id: &MigrationId, cursor: &Bytes, limit: PageLimit) -> Result<RowPage, Error> {
        self.node.store().read_rows(id, cursor, limit).await.map_err(failed)
    }

    async fn read_changes(
        &self,
        id: &MigrationId,
        cursor: ChangeCursor,
        limit: PageLimit,
    ) -> Result<ChangePage, Error> {
        self.node.store().read_changes(id, cursor, limit).await.map_err(failed)
    }

    async fn release_changes(&self, id: &MigrationId, through: u64) -> Result<(), Error> {
        self.node.store().release_changes(id, through);
        Ok(())
    }

    fn slow_writers(&self, id: &MigrationId, delay: Duration) {
        let mut delays = self.delays();
        if let Some(present) = delays.get(id) {
            present.set(delay);
        } else if let Some(slots) = self.node.store().leased_slots(id) {
            let new = self.node.gate().slow_writes(slots);
            new.set(delay);
            delays.insert(id.clone(), new);
        }
    }

    fn writers_slowed_ms(&self, id: &MigrationId) -> u64 {
        let waited = self.delays().get(id).map(WriteDelay::waited).unwrap_or_default();
        u64::try_from(waited.as_millis()).unwrap_or(u64::MAX)
    }

    async fn hold(&self, slots: SlotRange, mode: HoldMode) -> Result<Hold, Error> {
        let patience = self.options.patience;
        let (mode, patience) = match mode {
            // A freeze ends by itself: writes wait for its end, and don't fail.
            HoldMode::Writes => (gate::HoldMode::Writes, patience.max(LONGEST_FREEZE)),
            HoldMode::All => (gate::HoldMode::All, patience),
        };
        let (hold, expiry) = tokio::join!(
            self.node.gate().hold_for(slots, mode, patience),
            self.node.store().stop_expiry(slots)
        );
        Ok(Box::new(NodeHold { hold, _expiry: Some(expiry.map_err(failed)?) }))
    }

    async fn logs(&self) -> Result<Vec<(MigrationId, SlotRange)>, Error> {
        Ok(self.node.store().open_logs())
    }

    async fn quarantine(&self, slots: SlotRange, why: &str) -> Result<Hold, Error> {
        let expiry = self.node.store().pause_expiry(slots);
        let hold = self.node.gate().quarantine(slots, why);
        Ok(Box::new(NodeHold { hold, _expiry: Some(expiry) }))
    }

    async fn prepare_digests(&self, id: &MigrationId) -> Result<(), Error> {
        self.node.store().prepare_digests(id).await.map_err(failed)
    }

    async fn digests(&self, id: &MigrationId) -> Result<Vec<SlotDigest>, Error> {
        self.node.store().slot_digests(id).await.map_err(failed)
    }

    fn redirect(&self, handover: &Handover) -> bool {
        self.node.redirect(self.given(handover), handover.address.clone())
    }

    async fn give_up(&self, handover: &Handover) -> Result<(), Error> {
        let Handover { id, address, .. } = handover.clone();
        let me = self.node.id().clone();
        let claim = self.given(handover);
        let migration = id.clone();
        self.node
            .change_ownership(move |store| async move {
                store.give_up_migrated(&me, &migration, claim, address).await
            })
            .await
            .map_err(failed)?;
        self.node.reload_nodes().await.map_err(failed)?;
        self.delays().remove(&id);
        Ok(())
    }

    async fn keep(&self, id: &MigrationId, slots: SlotRange, claim: Option<u64>) -> Result<(), Error> {
        let claimed = claim.is_some();
        let claim = claim.map(|epoch| Claim { range: slots, owner: self.node.id().clone(), epoch });
        let migration = id.clone();
        self.node
            .change_ownership(move |store| async move { store.keep_migrated(&migration, claim).await })
            .await
            .map_err(failed)?;
        if claimed && self.check_owner(slots, u64::MAX).is_err() {
            tracing::warn!(migration = %id, %slots, "a claim is void: a newer owner of some of the slots is known");
        }
        self.delays().remove(id);
        Ok(())
    }
}

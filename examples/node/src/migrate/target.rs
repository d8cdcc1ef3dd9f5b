//! The node as the target of a migration.

use bytes::Bytes;
use proto::common::error::Error;
use proto::common::ids::MigrationId;
use proto::common::slots::SlotRange;
use proto::migration::MigrationSpec;
use proto::migration::digest::SlotDigest;
use proto::migration::entry::Entry;
use proto::migration::hold::Hold;
use proto::migration::receiver::read_records;
use proto::migration::target::{Offer, Staged, StoredMigration, Takeover};
use proto::migration::{MigrationTarget, Reason};

use super::room::Room;
use super::{MigrateOptions, NodeHold, check_value_format, failed};
use crate::common::NodeId;
use crate::gate::HoldMode;
use crate::node::Node;
use crate::store::{Claim, MAX_EPOCH_LEAP, StoreError};

/// Takes slots over for a node.
#[derive(Debug)]
pub struct NodeTarget {
    node: Node,
    options: MigrateOptions,
    room: Room,
}

impl NodeTarget {
    /// Of `node`.
    #[must_use]
    pub fn new(node: Node, options: MigrateOptions) -> Self {
        Self { node, options, room: Room::new(options.percent_per_peer) }
    }
}

impl MigrationTarget for NodeTarget {
    async fn load(&self) -> Result<Vec<StoredMigration>, Error> {
        let stored = self.node.store().stored_migrations().await.map_err(failed)?;
        let mut all = Vec::with_capacity(stored.len());
        for (migration, record) in read_records(stored) {
            if migration.slots.is_some() {
                let spec = record.ok().and_then(|progress| progress.spec);
                let source = spec.and_then(|spec| NodeId::new(&spec.source_node_id).ok());
                self.room.recovered(&migration.id, migration.staged, source);
            }
            all.push(migration);
        }
        Ok(all)
    }

    async fn admit(&self, offer: &Offer<'_>) -> Result<(), Error> {
        let (store, slots) = (self.node.store(), offer.spec.slots);
        check_value_format(offer.spec)?;
        let shard = &offer.spec.target_shard;
        if let Some(fence) = offer.fence {
            fence.check(store.fence(shard).await.map_err(failed)?, shard)?;
        }
        if let Some(own) = self.node.own_ranges().into_iter().find(|own| own.overlaps(slots)) {
            let sentence = format!("node {} owns slots {own} of {slots} itself", self.node.id());
            return Err(Reason::RangeBusy.error(sentence).metadata("holder", self.node.id().as_str()));
        }
        if let Some((owner, sentence)) = self.node.third_owner(slots, &offer.spec.source_node) {
            return Err(Reason::RangeBusy.error(sentence).metadata("holder", owner.as_str()));
        }
        if store.is_importing(slots) {
            let sentence = format!("a snapshot with some of slots {slots} is being imported");
            return Err(Reason::RangeBusy.error(sentence).metadata("holder", "import"));
        }
        // What is refused is not remembered for ever.
        if let Some(fence) = offer.fence {
            let highest = store.raise_fence(shard, fence, Some(&offer.spec.source_node)).await;
            fence.check(highest.map_err(failed)?, shard)?;
        }
        self.room.admit(store, offer)
    }

    fn lost_by_source(&self, spec: &MigrationSpec) -> Option<String> {
        Some(self.node.third_owner(spec.slots, &spec.source_node)?.1)
    }

    async fn begin(&self, id: &MigrationId, slots: SlotRange, record: Bytes) -> Result<(), Error> {
        match self.node.store().begin_staging(id, slots, record).await {
            Ok(()) => self.room.begun(id),
            Err(error) => {
                self.room.ended(id);
                return Err(failed(error));
            }
        }
        Ok(())
    }

    async fn save(&self, id: &MigrationId, record: Bytes) -> Result<(), Error> {
        self.node.store().save_migration(id, record).await.map_err(failed)
    }

    async fn save_prepared(&self, id: &MigrationId, record: Bytes) -> Result<(), Error> {
        self.node.store().save_prepared(id, record).await.map_err(failed)
    }

    async fn apply(&self, id: &MigrationId, entries: Vec<Entry>, record: Bytes) -> Result<Staged, Error> {
        let store = self.node.store();
        self.room.check(store, id, &entries)?;
        let (staged, tombstones) = store.stage(id, entries, record).await.map_err(failed)?;
        self.room.staged(id, staged, tombstones);
        Ok(staged)
    }

    fn hurry(&self, id: &MigrationId, wanted: bool) {
        self.node.store().hurry(id, wanted);
    }

    async fn digests(&self, id: &MigrationId) -> Result<Vec<SlotDigest>, Error> {
        self.node.store().staged_digests(id).await.map_err(failed)
    }

    async fn check_epoch(&self, slots: SlotRange, slot_epoch: u64) -> Result<(), Error> {
        let ownership = self.node.gate().ownership();
        if let Some((slot, epoch)) = ownership.at_least(slots, slot_epoch) {
            return Err(failed(StoreError::Outdated { slot, epoch }));
        }
        if ownership.is_leap(slots, slot_epoch) {
            let highest = ownership.highest_epoch(slots);
            let problem = format!(
                "is {slot_epoch}, more than {MAX_EPOCH_LEAP} above {highest}, the highest that is known of slots {slots}"
            );
            return Err(Reason::InvalidField.field("prepare.new_slot_epoch", problem));
        }
        Ok(())
    }

    async fn commit(&self, takeover: &Takeover<'_>, record: Bytes) -> Result<(), Error> {
        let &Takeover { id, slots, from, slot_epoch } = takeover;
        let claim = Claim { range: slots, owner: self.node.id().clone(), epoch: slot_epoch };
        let (taken, from) = (id.clone(), from.cloned());
        self.node
            .change_ownership(move |store| async move {
                store.take_over(&taken, from.as_ref(), claim, record).await
            })
            .await
            .map_err(failed)?;
        self.room.ended(id);
        Ok(())
    }

    async fn discard(&self, id: &MigrationId, record: Bytes) -> Result<(), Error> {
        self.node.store().discard_staging(id, record).await.map_err(failed)?;
        self.room.ended(id);
        Ok(())
    }

    async fn forget(&self, id: &MigrationId) -> Result<(), Error> {
        self.node.store().drop_migration(id).await.map_err(failed)?;
        self.room.ended(id);
        Ok(())
    }

    fn hold(&self, slots: SlotRange) -> Hold {
        let patience = Some(self.options.patience);
        let hold = self.node.gate().hold_undrained_for(slots, HoldMode::All, patience);
        Box::new(NodeHold { hold, _expiry: None })
    }
}

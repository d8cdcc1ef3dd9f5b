//! Giving slots up, and keeping them: the end of a split or a migration at the node that owned them.

use std::collections::BTreeSet;
use std::sync::Arc;

use proto::common::ids::MigrationId;
use redb::WriteTransaction;

use super::ownership::{Claim, Ownership, adopt_all, load, load_nodes, put_nodes};
use super::txn::RowsTxn;
use super::{Store, StoreError, splits, tables};
use crate::common::{NodeId, SlotRange};

impl Store {
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
            .transact(move |txn, rows| {
                if let Some(split) = finished {
                    splits::remove(txn, &split)?;
                }
                give_up(txn, rows, &me, range, &claims)
            })
            .await
    }

    /// [`Store::give_up`] to the owner of `claim`, for a migration, whose change log ends with it. `grpc` is where the owner is.
    /// Does nothing where that is done.
    pub(crate) async fn give_up_migrated(
        &self,
        me: &NodeId,
        id: &MigrationId,
        claim: Claim,
        grpc: String,
    ) -> Result<Ownership, StoreError> {
        let (me, id) = (me.clone(), id.clone());
        let shared = Arc::clone(&self.inner.shared);
        self.writer()?
            .transact(move |txn, rows| {
                let had_log = rows.log().close_lease(&id)?;
                let present = load(&txn.open_table(tables::OWNERSHIP)?)?;
                let owns_some = present.ranges_of(&me).any(|own| own.overlaps(claim.range));
                // The log may have ended before the outcome was known, and the owner be known from others: the rows are still there.
                if !had_log && !owns_some && shared.counts.sum(claim.range) == 0 {
                    return Ok(present);
                }
                let mut nodes = load_nodes(&txn.open_table(tables::NODES)?)?;
                nodes.retain(|node, _| *node == claim.owner);
                nodes.entry(claim.owner.clone()).or_default().grpc = grpc;
                put_nodes(txn, &nodes)?;
                give_up(txn, rows, &me, claim.range, std::slice::from_ref(&claim))
            })
            .await
    }

    /// Ends the change log of a migration whose record is lost, if `id` is known and the log is of one of `ranges`, and gives up the rows of those of `ranges` that are known to be
    /// another node's: nothing else would, as the outcome that the record would have led to is never found out. Slots that this node owns, or that
    /// nobody is known to own, stay as they are. Returns how many rows clients cannot get back here.
    ///
    /// # Errors
    ///
    /// Nothing was changed.
    pub(crate) async fn give_up_lost(
        &self,
        me: &NodeId,
        id: Option<&MigrationId>,
        ranges: &[SlotRange],
    ) -> Result<u64, StoreError> {
        let (me, id, ranges) = (me.clone(), id.cloned(), ranges.to_vec());
        let shared = Arc::clone(&self.inner.shared);
        self.writer()?
            .transact(move |txn, rows| {
                let logged = |id: &MigrationId| shared.leases.with(id, |lease| lease.slots());
                // One of other slots is all that tells that their record is gone.
                if let Some(id) = id.filter(|id| logged(id).is_some_and(|slots| ranges.contains(&slots))) {
                    rows.log().close_lease(&id)?;
                }
                let ownership = load(&txn.open_table(tables::OWNERSHIP)?)?;
                let of_others = ownership.claims().iter().filter(|claim| claim.owner != me);
                let given_up: Vec<SlotRange> = of_others
                    .flat_map(|claim| ranges.iter().filter_map(|range| range.intersection(claim.range)))
                    .collect();
                // Of ranges that overlap, each slot once.
                let slots: BTreeSet<u16> = given_up.iter().flat_map(|range| range.iter()).collect();
                let single = |slot: u16| SlotRange::new(slot, slot.saturating_add(1)).ok();
                let count = slots.into_iter().filter_map(single).map(|slot| shared.counts.sum(slot)).sum();
                for range in given_up {
                    let empty = rows.new_generation()?;
                    rows.switch(range, empty)?;
                }
                Ok(count)
            })
            .await
    }

    /// Ends the change log of a migration that did not commit, and takes `claim` over, by epoch.
    pub(crate) async fn keep_migrated(
        &self,
        id: &MigrationId,
        claim: Option<Claim>,
    ) -> Result<Ownership, StoreError> {
        let id = id.clone();
        self.writer()?
            .transact(move |txn, rows| {
                rows.log().close_lease(&id)?;
                adopt_all(txn, claim.as_slice())
            })
            .await
    }
}

fn give_up(
    txn: &WriteTransaction,
    rows: &mut RowsTxn<'_>,
    me: &NodeId,
    range: SlotRange,
    claims: &[Claim],
) -> Result<Ownership, StoreError> {
    let ownership = adopt_all(txn, claims)?;
    if let Some(own) = ownership.ranges_of(me).find(|own| own.overlaps(range)) {
        return Err(StoreError::Refused(format!(
            "slots {range} cannot be given up: this node would still own slots {own}"
        )));
    }
    let empty = rows.new_generation()?;
    rows.switch(range, empty)?;
    Ok(ownership)
}

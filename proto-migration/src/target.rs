//! What a store does to take slots over: stage rows that nobody sees, and make them visible at once.
//!
//! With what is staged the store keeps a record, opaque to it, saved in the transaction that completes what the record tells: so whatever crashes or
//! fails, all that the [receiver](crate::receiver) knows to be staged is. A part of what came last may be staged beyond that; it comes again, and counts once.

use std::future::Future;

use bytes::Bytes;
use proto_common::error::Error;
use proto_common::fence::Fence;
use proto_common::ids::{MigrationId, NodeId};
use proto_common::slots::SlotRange;

use crate::digest::SlotDigest;
use crate::entry::Entry;
use crate::hold::Hold;
use crate::spec::MigrationSpec;

/// What a source asks a node to take.
#[derive(Debug, Clone, PartialEq)]
pub struct Offer<'a> {
    /// The migration.
    pub id: &'a MigrationId,
    /// What is moved.
    pub spec: &'a MigrationSpec,
    /// Fence of the target shard; `None`: "current".
    pub fence: Option<Fence>,
    /// Bytes that are still to come, if known; an estimate.
    pub missing_bytes: Option<u64>,
}

/// Live rows that are staged for one migration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Staged {
    /// Keys; tombstones do not count.
    pub keys: u64,
    /// Bytes of their keys and values.
    pub bytes: u64,
}

/// A record that an earlier process left, with what is staged for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredMigration {
    /// The migration.
    pub id: MigrationId,
    /// The record, as it was last saved.
    pub record: Bytes,
    /// What is staged.
    pub staged: Staged,
    /// The slots that rows are staged for, as the store knows them without the record; `None` where none are staged. With a record that
    /// cannot be read, nobody may move them.
    pub slots: Option<SlotRange>,
}

/// The switch that makes staged rows those of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Takeover<'a> {
    /// The migration.
    pub id: &'a MigrationId,
    /// The slots.
    pub slots: SlotRange,
    /// Whose they have to be as far as anybody is known to own them: a node that has lost them since it was prepared cannot give them away. `None` where others have
    /// decided, an operator or [`Decisions`](crate::decisions::Decisions): then the epoch alone counts, and what is known of a third node may be out of date.
    pub from: Option<&'a NodeId>,
    /// The epoch at which this node owns them from now on.
    pub slot_epoch: u64,
}

/// A store that takes slots over.
///
/// Every method that takes a record saves it in the same durable transaction as what else it does. Calls for one migration
/// come one after the other. Futures run to their end, whatever becomes of the stream.
///
/// Errors that are [retryable](Error::is_retryable) end the stream, and the source comes back; any other fails the migration at the source.
pub trait MigrationTarget: Send + Sync + 'static {
    /// All records, at the start of the process.
    ///
    /// # Errors
    ///
    /// The store cannot be read; the node does not start.
    fn load(&self) -> impl Future<Output = Result<Vec<StoredMigration>, Error>> + Send;

    /// Says whether this node can take what is offered. Called at the start of each stream that moves data, and before it answers that
    /// it is prepared.
    ///
    /// # Errors
    ///
    /// `STALE_FENCE`, `UNSUPPORTED_VALUE_FORMAT`, `INSUFFICIENT_DISK` (metadata `needed_bytes`, `available_bytes`, and `peer` for a share), or `RANGE_BUSY`
    /// (metadata `holder`) if this node owns a slot of the range itself, knows of another owner than the source, or cannot take it for another reason that passes.
    fn admit(&self, offer: &Offer<'_>) -> impl Future<Output = Result<(), Error>> + Send;

    /// Why the source of a migration that is staged here cannot give its slots away any more, as far as this node knows: that another one owns some of them. Where it says
    /// so at two looks in a row, some seconds apart, and the migration is still RECEIVING, it is cancelled, so that whoever owns the slots does not find them busy here. What
    /// is PREPARED stays, whatever is known: it may be the only copy that is left. `None`, the default: nothing is known. Does not wait.
    fn lost_by_source(&self, spec: &MigrationSpec) -> Option<String> {
        let _ = spec;
        None
    }

    /// Starts staging for `id` from nothing: what was staged for it before becomes invisible garbage, deleted in the background.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`, and nothing has changed.
    fn begin(
        &self,
        id: &MigrationId,
        slots: SlotRange,
        record: Bytes,
    ) -> impl Future<Output = Result<(), Error>> + Send;

    /// Saves the record alone.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`, and nothing has changed.
    fn save(&self, id: &MigrationId, record: Bytes) -> impl Future<Output = Result<(), Error>> + Send;

    /// [`save`](Self::save) of a record that says that the target is prepared, with writes held at the source. A store may do with less than it
    /// spends on other records, as on rows: of one that a crash takes back, the source learns by its next stream that nothing was committed. An operator who
    /// decides COMMITTED at the source while the target is away relies on it: damage that goes unseen leaves rows that are staged, and nobody who
    /// may commit them. By default it is saved like any other.
    ///
    /// # Errors
    ///
    /// As of [`save`](Self::save).
    fn save_prepared(
        &self,
        id: &MigrationId,
        record: Bytes,
    ) -> impl Future<Output = Result<(), Error>> + Send {
        self.save(id, record)
    }

    /// Stages entries, and returns what is staged then: each is applied if and only if its sequence is higher than that of the entry
    /// that is staged for its key; tombstones are kept as such. Staged rows never expire. All of it is durable on return.
    ///
    /// A store with one writer at a time does this in many transactions that each take less than a client would notice, and lets the writes
    /// of clients go before each. Only the last one has to be durable, with the record: what a crash leaves of the others comes again.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED` or `INSUFFICIENT_DISK`: the record has not changed; some of the entries may be staged already. The source sends what the record
    /// does not tell again, as it is then, on its next stream.
    fn apply(
        &self,
        id: &MigrationId,
        entries: Vec<Entry>,
        record: Bytes,
    ) -> impl Future<Output = Result<Staged, Error>> + Send;

    /// From `true` to `false`, the clients of the source wait for what is applied: writes are held there, or will be when it is, or are or will be slowed because
    /// the target does not keep up. [`apply`](Self::apply) may then take more of the store's time than it otherwise would. Comes while it runs, too. Does not wait.
    fn hurry(&self, id: &MigrationId, wanted: bool) {
        let _ = (id, wanted);
    }

    /// Count and digest of the live staged keys of each slot that has any, in rising order, from the store and not from what came.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`.
    fn digests(&self, id: &MigrationId) -> impl Future<Output = Result<Vec<SlotDigest>, Error>> + Send;

    /// Whether this node could own the slots at that epoch.
    ///
    /// # Errors
    ///
    /// `STALE_SLOT_EPOCH` (metadata `slot`, `slot_epoch`) if it knows of a claim to one of them with the same or a higher epoch. `INVALID_FIELD`
    /// (`prepare.new_slot_epoch`) if the epoch is so far above all that it knows that no honest source has come to it.
    fn check_epoch(
        &self,
        slots: SlotRange,
        slot_epoch: u64,
    ) -> impl Future<Output = Result<(), Error>> + Send;

    /// The commit: in one transaction, this node owns the slots at that epoch, and their staged rows are its rows; rows that
    /// it had of these slots before are garbage. A switch, whose time does not depend on how many rows there are. Tombstones are
    /// dropped and expiry begins in the background.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`: it is called again until it succeeds; the requests for the slots are held meanwhile. `STALE_SLOT_EPOCH` where a slot is known at
    /// that epoch or a higher one, or to be of another node than it has to be: then it is no longer prepared, unless `Decisions` have decided, where it is tried again.
    fn commit(
        &self,
        takeover: &Takeover<'_>,
        record: Bytes,
    ) -> impl Future<Output = Result<(), Error>> + Send;

    /// Drops what is staged: invisible for ever, deleted in the background.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`, and nothing has changed.
    fn discard(&self, id: &MigrationId, record: Bytes) -> impl Future<Output = Result<(), Error>> + Send;

    /// Removes the record of a migration of which nothing is needed any more. What is staged is at most what [`apply`](Self::apply) left of a first
    /// batch that failed; it is dropped in the same transaction, as by [`discard`](Self::discard). Does nothing where there is no record.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`, and nothing has changed.
    fn forget(&self, id: &MigrationId) -> impl Future<Output = Result<(), Error>> + Send;

    /// Holds all requests for `slots`, which are not this node's yet, instead of redirecting them, as long as the hold lives.
    fn hold(&self, slots: SlotRange) -> Hold;
}

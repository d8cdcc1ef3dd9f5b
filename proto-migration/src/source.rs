//! What a store does to give slots away: read rows, log changes, hold requests, let go.
//!
//! The [driver](crate::driver) decides when each of these happens and persists that first. A store needs to know nothing of
//! the protocol, but every method says what must be durable when it returns, and which may be repeated.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use proto_common::clock::now_unix_ms;
use proto_common::error::Error;
use proto_common::fence::Fence;
use proto_common::ids::{MigrationId, NodeId};
use proto_common::slots::SlotRange;
use tokio::sync::watch;

use crate::digest::SlotDigest;
use crate::entry::Entry;
use crate::hold::{Hold, HoldMode};
use crate::spec::MigrationSpec;

/// How much a read returns at most. A single entry that is larger is returned alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageLimit {
    /// Bytes of keys and values.
    pub bytes: usize,
    /// Entries.
    pub entries: usize,
}

/// What the store says about slots that are to be given away.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SourceTerms {
    /// Highest epoch of the slots.
    pub slot_epoch: u64,
    /// Live keys, if known; an estimate.
    pub estimated_keys: Option<u64>,
    /// Bytes of their keys and values, if known; an estimate.
    pub estimated_bytes: Option<u64>,
}

/// Some rows of the range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowPage {
    /// The rows; `seq` of each is that of the read: every change up to it is contained, none behind it.
    pub entries: Vec<Entry>,
    /// Where the next page starts; of the store's making, at most [`MAX_CURSOR_BYTES`], never empty.
    pub cursor: Bytes,
    /// There is nothing behind this page.
    pub last: bool,
}

/// Longest cursor, in bytes.
pub const MAX_CURSOR_BYTES: usize = 65 << 10;

/// Some changes of the range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangePage {
    /// Post-images and tombstones of keys that changed behind the asked sequence, in rising order of `seq`. Where a key
    /// changed more than once, the last image is enough.
    pub entries: Vec<Entry>,
    /// Every change up to here is contained in what was read since the asked sequence, and no entry is later. `None`: there is
    /// more to read before the watermark may move; entries may then be later than any sequence asked for, and the next read
    /// continues with [`ChangeCursor`].
    pub through: Option<u64>,
    /// Where the next read continues.
    pub next: ChangeCursor,
}

/// Where a reader of the change log stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChangeCursor {
    /// The watermark: the target gets, or has, every change up to here.
    pub watermark: u64,
    /// How far the log was read behind it; equal to `watermark` between pages that move it.
    pub scanned: u64,
    /// Of the store's making: up to where it reads before the watermark moves. 0 between pages that move it.
    pub goal: u64,
}

impl ChangeCursor {
    /// A reader that has everything up to `watermark`.
    #[must_use]
    pub const fn at(watermark: u64) -> Self {
        Self { watermark, scanned: watermark, goal: 0 }
    }
}

/// What the log of a migration holds: changes that are not [released](MigrationSource::release_changes).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogState {
    /// Last sequence of the store's log that is committed, whatever it changed.
    pub head_seq: u64,
    /// Changes retained.
    pub entries: u64,
    /// What they take, in bytes.
    pub bytes: u64,
    /// When the oldest of them was made, in Unix milliseconds; `None` if there is none.
    pub oldest_unix_ms: Option<u64>,
}

impl LogState {
    /// Age of the oldest change that is retained, in milliseconds; 0 if there is none.
    #[must_use]
    pub fn age_ms(&self) -> u64 {
        self.oldest_unix_ms.map_or(0, |oldest| now_unix_ms().saturating_sub(oldest))
    }
}

/// To whom slots are given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handover {
    /// The migration.
    pub id: MigrationId,
    /// The slots.
    pub slots: SlotRange,
    /// Their new owner.
    pub owner: NodeId,
    /// Where it was dialled, `host:port`.
    pub address: String,
    /// The epoch at which it owns them.
    pub slot_epoch: u64,
}

/// A store that gives slots away.
///
/// Futures may be dropped at any time (a cancel, a broken stream); what a method began must then either finish in the background or
/// be repeatable. Errors that are [retryable](Error::is_retryable) are tried again with the next stream, any other fails
/// the migration, with the source serving on.
pub trait MigrationSource: Send + Sync + 'static {
    /// Says whether this node may give the slots away, and what it knows of them.
    ///
    /// # Errors
    ///
    /// `NOT_SLOT_OWNER` (metadata `slot`, and `owner` if known) unless it owns every slot; `STALE_FENCE` if `fence` is lower than the
    /// shard's persisted one; `None` means "current".
    fn admit(
        &self,
        spec: &MigrationSpec,
        fence: Option<Fence>,
    ) -> impl Future<Output = Result<SourceTerms, Error>> + Send;

    /// Says whether this node still owns every slot of `slots`, and none at a higher epoch than `slot_epoch`, which [`admit`](Self::admit)
    /// told. Asked before a copy begins, and before the commit, with everybody held. Does not wait.
    ///
    /// # Errors
    ///
    /// `NOT_SLOT_OWNER`, as of `admit`.
    fn check_owner(&self, slots: SlotRange, slot_epoch: u64) -> Result<(), Error>;

    /// Logs every change of `slots` from the moment it returns, for migration `id`, and returns the sequence behind which the log
    /// starts. With `from`, an existing log of `id` goes on: it reaches back to `from`, and nothing behind it was dropped.
    /// Without, a log that `id` has is replaced by an empty one.
    ///
    /// Logged in the same transaction as the change itself: a change that was acknowledged to a client is in the log, whatever crashes.
    ///
    /// # Errors
    ///
    /// `LOG_LOST` if the log does not reach back to `from`.
    fn open_log(
        &self,
        id: &MigrationId,
        slots: SlotRange,
        from: Option<u64>,
    ) -> impl Future<Output = Result<u64, Error>> + Send;

    /// The state of the log of `id`, as it changes. A store without such a log gives one whose sender is gone.
    fn watch_log(&self, id: &MigrationId) -> watch::Receiver<LogState>;

    /// Reads rows behind `cursor` (empty: from the start), in the store's order, in one short read. Keys that have expired but are not
    /// removed yet are rows like any other.
    ///
    /// The copy goes as fast as this answers and the target stages. Where clients need the processors or the disk, answer later: a pause
    /// of a few times what the read took leaves them most of both, at either end. Changes wait for the answer, too, so it should not be
    /// longer than some milliseconds.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`.
    fn read_rows(
        &self,
        id: &MigrationId,
        cursor: &Bytes,
        limit: PageLimit,
    ) -> impl Future<Output = Result<RowPage, Error>> + Send;

    /// Reads changes behind `cursor`. An empty page means that there are none; `through` then says up to where.
    ///
    /// # Errors
    ///
    /// `LOG_LOST` if the log does not reach back to `cursor.watermark`.
    fn read_changes(
        &self,
        id: &MigrationId,
        cursor: ChangeCursor,
        limit: PageLimit,
    ) -> impl Future<Output = Result<ChangePage, Error>> + Send;

    /// Lets the store drop what its log has up to `through`: it is durable at the target, or given up because the log is beyond its cap.
    /// Need not be durable itself.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`; called again with a later sequence.
    fn release_changes(
        &self,
        id: &MigrationId,
        through: u64,
    ) -> impl Future<Output = Result<(), Error>> + Send;

    /// Delays each write to the slots of `id` by `delay` from now on; zero ends that. It must not hold up other slots, and a [hold](Self::hold) that begins must not wait for
    /// a write that is being delayed.
    fn slow_writers(&self, id: &MigrationId, delay: Duration);

    /// Milliseconds that writers were kept waiting by [`slow_writers`](Self::slow_writers), summed over all of them, since this process began. The driver adds what
    /// it has saved of earlier ones.
    fn writers_slowed_ms(&self, id: &MigrationId) -> u64;

    /// Stops new requests for `slots`, waits until those that were let in are done and durable, and returns. With
    /// [`HoldMode::Writes`] and above, the store also stops removing expired keys of the slots. Dropping the future, or the hold, lets
    /// requests through again. Holds may overlap; the stricter one counts.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`, and nothing is held.
    fn hold(&self, slots: SlotRange, mode: HoldMode) -> impl Future<Output = Result<Hold, Error>> + Send;

    /// The change logs that are open, with their migrations and slots, at the start of the process. One that no record of the journal belongs to
    /// shows that the record is lost: its slots are [quarantined](Self::quarantine).
    ///
    /// # Errors
    ///
    /// The store cannot be read; the driver does not start.
    fn logs(&self) -> impl Future<Output = Result<Vec<(MigrationId, SlotRange)>, Error>> + Send;

    /// Serves no request for `slots` as long as the result lives: a damaged record leaves open whether they were handed over. `why` names
    /// it, without paths, for what clients are told. By default they are held, and get what those get that have waited for too long;
    /// better is to refuse them at once and say why.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`, and the slots would be served: the driver does not start.
    fn quarantine(&self, slots: SlotRange, why: &str) -> impl Future<Output = Result<Hold, Error>> + Send {
        let _ = why;
        self.hold(slots, HoldMode::All)
    }

    /// Waits until [`digests`](Self::digests) of `id` takes no scan, such as after a restart. Called when all rows were read, before
    /// writes are held.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`.
    fn prepare_digests(&self, id: &MigrationId) -> impl Future<Output = Result<(), Error>> + Send;

    /// Count and digest of the live keys of each slot that has any, in rising order, from the store and not from what was sent. Keys that
    /// have expired but are not removed count. Called with writes held.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`.
    fn digests(&self, id: &MigrationId) -> impl Future<Output = Result<Vec<SlotDigest>, Error>> + Send;

    /// The commit is known, and this node learns of it again if it crashes: requests for the slots are redirected from now on, in memory, and
    /// [`give_up`](Self::give_up), which is called next, makes that durable. Returns whether they are: then the hold is dropped at once, and
    /// clients do not wait for the disk. Whatever else the store learns of owners meanwhile must not take it back. By default they wait.
    ///
    /// Does not wait. May come more than once.
    fn redirect(&self, handover: &Handover) -> bool {
        let _ = handover;
        false
    }

    /// The commit is known: in one durable transaction, the slots belong to `handover.owner` at `slot_epoch`, their rows here are
    /// invisible (to scans and counts, too), and the log of the migration is gone. The rows are deleted in the background. From the
    /// moment it returns, requests are redirected. Does nothing where that is done.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`; it is called again until it succeeds, with the slots held or [redirected](Self::redirect).
    fn give_up(&self, handover: &Handover) -> impl Future<Output = Result<(), Error>> + Send;

    /// The migration ended without a commit: its log is gone. With `claim`, an operator decided so: this node claims the slots at that
    /// epoch, durably, since a lost target may have committed at a lower one. Does nothing where that is done.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`; it is called again until it succeeds.
    fn keep(
        &self,
        id: &MigrationId,
        slots: SlotRange,
        claim: Option<u64>,
    ) -> impl Future<Output = Result<(), Error>> + Send;
}

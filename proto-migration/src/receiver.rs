//! The target's side: a service that stages what a source sends, and takes the slots over.
//!
//! | question | where |
//! |---|---|
//! | who may write? what is decided already? | `receiver/attach.rs` |
//! | where is a frame checked? | `receiver/handshake.rs` (header), `receiver/batch.rs`, `receiver/session.rs` |
//! | where is it applied, verified, prepared? | `receiver/applier.rs` |
//! | how does it end? | `receiver/outcome.rs`, asked for by the source or by `receiver/control.rs` |
//! | what survives a crash? | `receiver/record.rs`, kept by the [`MigrationTarget`] with the rows |

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto_common::error::{CommonReason, Error};
use proto_common::guard::{RangeGuard, RangeHold};
use proto_common::ids::{MigrationId, NodeId, RANDOM_ID_LEN};
use proto_common::slots::SlotRange;
use proto_common::v1::{Direction, NodeIdentity};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

mod applier;
mod attach;
mod batch;
mod control;
mod handshake;
mod hurry;
mod incoming;
mod outcome;
mod places;
mod record;
mod recovery;
mod session;
mod turns;

use self::control::Calls;
use self::incoming::{Incoming, Slot};
use self::places::Places;
pub use self::recovery::{UnreadRecord, read_records};
use self::turns::Turns;
use crate::Reason;
use crate::decisions::Decisions;
use crate::journal::Journal;
use crate::limits::{BATCH_BYTES, Limits};
use crate::migrations::Migrations;
use crate::service::{MigrationNode, MigrationService};
use crate::target::MigrationTarget;

/// Shortest idle timeout that the contract allows.
const MIN_IDLE: Duration = Duration::from_secs(3);

/// Takes slots over. Cheap to clone; all clones are one receiver.
///
/// Its tasks run until [`shutdown`](Self::shutdown).
pub struct MigrationReceiver<T: MigrationTarget> {
    inner: Arc<Inner<T>>,
}

impl<T: MigrationTarget> Clone for MigrationReceiver<T> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<T: MigrationTarget> std::fmt::Debug for MigrationReceiver<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MigrationReceiver")
            .field("node_id", &self.inner.identity.node_id)
            .finish_non_exhaustive()
    }
}

/// Makes a [`MigrationReceiver`].
pub struct MigrationReceiverBuilder<T: MigrationTarget> {
    identity: NodeIdentity,
    target: T,
    journal: Journal,
    limits: Limits,
    migrations: Option<Migrations>,
    guard: RangeGuard,
    decisions: Option<Arc<dyn Decisions>>,
}

impl<T: MigrationTarget> std::fmt::Debug for MigrationReceiverBuilder<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MigrationReceiverBuilder").field("limits", &self.limits).finish_non_exhaustive()
    }
}

/// What all calls and tasks of a receiver share.
struct Inner<T: MigrationTarget> {
    target: Arc<T>,
    identity: NodeIdentity,
    limits: Limits,
    migrations: Migrations,
    journal: Journal,
    guard: RangeGuard,
    decisions: Option<Arc<dyn Decisions>>,
    places: Places,
    /// To let streams in.
    streams: Turns,
    /// To prepare.
    freezes: Turns,
    slots: Mutex<HashMap<MigrationId, Arc<Slot>>>,
    /// Those whose record cannot be read, and their slots, as long as this lives.
    untrusted: HashMap<MigrationId, Vec<RangeHold>>,
    tasks: TaskTracker,
    stopping: CancellationToken,
    draining: AtomicBool,
}

impl<T: MigrationTarget> MigrationReceiverBuilder<T> {
    /// Other limits than the default ones.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// The node's registry, which it shares with its driver. Default: a new one.
    #[must_use]
    pub fn migrations(mut self, migrations: Migrations) -> Self {
        self.migrations = Some(migrations);
        self
    }

    /// The node's ranges, which it shares with its driver and its transfers. Default: a new one.
    #[must_use]
    pub fn guard(mut self, guard: RangeGuard) -> Self {
        self.guard = guard;
        self
    }

    /// Who decides. Default: the target's store, with the commit.
    #[must_use]
    pub fn decisions(mut self, decisions: impl Decisions) -> Self {
        self.decisions = Some(Arc::new(decisions));
        self
    }

    /// Recovers what an earlier process left, holds what it had prepared, and starts.
    ///
    /// A record that cannot be read is reported to the log and left as it is; streams of its migration, and whoever wants to move slots that
    /// are in doubt because of it ([`UnreadRecord::slots`]), are refused with `SLOTS_QUARANTINED`. All else goes on.
    ///
    /// # Errors
    ///
    /// `INVALID_FIELD` or `INVALID_ID` for an identity or limits that the protocol does not allow; `STORAGE_FAILED` when the store cannot be
    /// read.
    pub async fn start(self) -> Result<MigrationReceiver<T>, Error> {
        let Self { identity, target, journal, limits, migrations, guard, decisions } = self;
        NodeId::new(&identity.node_id).map_err(|error| error.at("identity.node_id"))?;
        if identity.store_id.len() != RANDOM_ID_LEN {
            let problem = format!("has {} bytes instead of {RANDOM_ID_LEN}", identity.store_id.len());
            return Err(Reason::InvalidField.field("identity.store_id", problem));
        }
        if !BATCH_BYTES.contains(&limits.batch_bytes) {
            let problem = format!("is {}; it takes 64 KiB to 64 MiB", limits.batch_bytes);
            return Err(Reason::InvalidField.field("limits.batch_bytes", problem));
        }
        let stored = incoming::guarded(async { target.load().await }).await?;
        let (known, untrusted) = recovery::sort(stored, &guard);
        let inner = Arc::new(Inner {
            target: Arc::new(target),
            identity,
            migrations: migrations.unwrap_or_else(|| Migrations::new(&limits)),
            journal,
            guard,
            decisions,
            places: Places::new(limits.incoming, limits.incoming_per_peer),
            streams: Turns::new(limits.streams_per_peer),
            freezes: Turns::new(limits.streams_per_peer),
            limits,
            slots: Mutex::default(),
            untrusted,
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
            draining: AtomicBool::new(false),
        });
        for incoming in known {
            inner.readopt(incoming).await?;
        }
        let collector = Arc::clone(&inner);
        inner.tasks.spawn(async move { collector.collect().await });
        Ok(MigrationReceiver { inner })
    }
}

impl<T: MigrationTarget> MigrationReceiver<T> {
    /// A receiver of the node `identity`, whose store is `target`. Of the journal it uses the history.
    pub fn builder(identity: NodeIdentity, target: T, journal: Journal) -> MigrationReceiverBuilder<T> {
        MigrationReceiverBuilder {
            identity,
            target,
            journal,
            limits: Limits::default(),
            migrations: None,
            guard: RangeGuard::new(),
            decisions: None,
        }
    }

    /// The target's half of the service of a node.
    #[must_use]
    pub fn node(&self) -> MigrationNode {
        MigrationNode {
            migrations: self.inner.migrations.clone(),
            limits: self.inner.limits.clone(),
            source: None,
            target: Some(Arc::new(Calls(Arc::clone(&self.inner)))),
            stopping: self.inner.stopping.clone(),
            access: proto_common::access::Access::default(),
        }
    }

    /// The service of a node that takes slots over and gives none away.
    #[must_use]
    pub fn into_service(self) -> MigrationService {
        self.node().into_service()
    }

    /// All migrations of the node.
    #[must_use]
    pub fn migrations(&self) -> Migrations {
        self.inner.migrations.clone()
    }

    /// The store behind it.
    #[must_use]
    pub fn target(&self) -> &T {
        &self.inner.target
    }

    /// Refuses migrations that are new here with `SHUTTING_DOWN`; those under way go on.
    pub fn drain(&self) {
        self.inner.refuse_new();
    }

    /// Ends open streams with `SHUTTING_DOWN` after what they brought is durable, refuses new ones, ends watches, and waits for all that.
    /// Everything unfinished is resumable. Cancel safe; may be called again.
    pub async fn shutdown(&self) {
        self.inner.stopping.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }
}

impl<T: MigrationTarget> Inner<T> {
    fn slots(&self) -> MutexGuard<'_, HashMap<MigrationId, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The place of an ID; an empty one where there is none.
    fn slot(&self, id: &MigrationId) -> Arc<Slot> {
        let mut slots = self.slots();
        Arc::clone(slots.entry(id.clone()).or_insert_with(|| Slot::new(id.clone(), None)))
    }

    fn is_current(&self, slot: &Arc<Slot>) -> bool {
        self.slots().get(&slot.id).is_some_and(|current| Arc::ptr_eq(current, slot))
    }

    /// Removes the place of an ID of which there is no record.
    fn remove_empty(&self, slot: &Arc<Slot>) {
        // Whoever holds one of the locks is about to fill it, or will call this, or the collector will.
        let Ok(_attach) = slot.attach.try_lock() else { return };
        let Ok(state) = slot.state.try_lock() else { return };
        if state.is_none() && self.is_current(slot) {
            self.slots().remove(&slot.id);
        }
    }

    fn idle(&self) -> Duration {
        self.limits.idle.max(MIN_IDLE)
    }

    /// Payload bytes that a source may have on the way.
    fn credit(&self) -> u64 {
        self.limits.credit_bytes.max(u64::from(self.limits.batch_bytes))
    }

    fn range(&self, id: &MigrationId, slots: SlotRange) -> Result<RangeHold, Error> {
        self.guard.try_acquire(slots, &format!("migration {id}")).map_err(|error| {
            if !error.is(CommonReason::RangeBusy) {
                return error;
            }
            error
                .metadata_map()
                .iter()
                .fold(Reason::RangeBusy.error(error.message()), |busy, (key, value)| {
                    busy.metadata(key, value)
                })
        })
    }

    /// Shows a migration of an earlier process as active.
    fn track(&self, incoming: &mut Incoming) -> Result<(), Error> {
        let progress = &mut incoming.record.progress;
        progress.task().set_direction(Direction::In);
        incoming.tracker = Some(self.migrations.readopt(progress.clone())?);
        Ok(())
    }
}

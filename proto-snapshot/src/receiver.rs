//! The receiving side: a service that takes snapshots into a store.
//!
//! | question | where |
//! |---|---|
//! | where is a frame handled? | `receiver/session.rs` (chunks, end), `receiver/handshake.rs` (header, manifest) |
//! | who may write? | `receiver/incoming.rs` |
//! | is it the same transfer as before? | `receiver/identity.rs` |
//! | which bytes are there? | `receiver/ledger.rs` |
//! | how much is filled from installed files? | `receiver/reuse.rs` |
//! | where do bytes become durable? | [`Staging::sync`], called by `receiver/incoming.rs` |
//! | how is a snapshot put in place? | `receiver/completion.rs` |
//! | how do I keep snapshots elsewhere? | implement [`SnapshotStore`] |

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto_common::access::{Access, Guarded};
use proto_common::bulk::WithRawBody;
use proto_common::clock::{millis, now_unix_ms};
use proto_common::error::Error;
use proto_common::ids::{NodeId, ShardId, TransferId};
use proto_common::prompt::MAX_REQUEST_BYTES;
use proto_common::refusal::WithDetails;
use proto_common::v1::{Direction, NodeIdentity};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

mod admission;
mod completion;
mod control;
mod handshake;
mod identity;
mod incoming;
mod ledger;
mod reuse;
mod service;
mod session;

use self::admission::{Admission, Manifests};
use self::identity::initial_progress;
use self::incoming::{Incoming, Stage};
use self::reuse::Reuses;
use self::session::Budget;
use crate::hook::{InstallHook, KeepFiles};
use crate::limits::{Limits, MAX_MESSAGE_BYTES};
use crate::reason::Reason;
use crate::store::{SnapshotStore, Staging, StagingState, StoreError};
use crate::transfers::{HistorySink, Transfers};
use crate::v1::split_snapshot_service_server::SplitSnapshotServiceServer;
use crate::v1::{TransferPhase, TransferProgress};

/// The method whose chunks are not copied.
const TRANSFER: &str = "/node.snapshot.v1.SplitSnapshotService/TransferSplitSnapshot";

/// The service of a [`SnapshotReceiver`], as it is added to a tonic server.
pub type ReceiverService<S> =
    Guarded<WithDetails<WithRawBody<SplitSnapshotServiceServer<SnapshotReceiver<S>>>>>;

/// How often stale staging is looked for; at most a quarter of its age.
const COLLECT_INTERVAL: Duration = Duration::from_secs(60);

/// Takes snapshots into a store. Cheap to clone; all clones are one receiver.
///
/// Its tasks (installs, collection of stale staging) run until [`shutdown`](Self::shutdown).
pub struct SnapshotReceiver<S: SnapshotStore> {
    inner: Arc<Inner<S>>,
}

impl<S: SnapshotStore> Clone for SnapshotReceiver<S> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<S: SnapshotStore> std::fmt::Debug for SnapshotReceiver<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SnapshotReceiver")
            .field("node_id", &self.inner.identity.node_id)
            .finish_non_exhaustive()
    }
}

/// Makes a [`SnapshotReceiver`].
pub struct SnapshotReceiverBuilder<S: SnapshotStore> {
    store: S,
    identity: NodeIdentity,
    limits: Limits,
    hook: Arc<dyn InstallHook>,
    transfers: Option<Transfers>,
    access: Access,
}

impl<S: SnapshotStore> std::fmt::Debug for SnapshotReceiverBuilder<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SnapshotReceiverBuilder").field("limits", &self.limits).finish_non_exhaustive()
    }
}

/// What all calls and tasks of a receiver share.
struct Inner<S: SnapshotStore> {
    store: Arc<S>,
    identity: NodeIdentity,
    limits: Limits,
    access: Access,
    hook: Arc<dyn InstallHook>,
    transfers: Transfers,
    places: Admission,
    manifests: Manifests,
    /// To install, by shard.
    turns: Turns<ShardId>,
    /// To reuse installed files, by source node.
    reuse_turns: Turns<NodeId>,
    reusing: Semaphore,
    reuses: Reuses,
    budget: Arc<Budget>,
    slots: Mutex<HashMap<TransferId, Arc<Slot<S::Staging>>>>,
    /// Whose turn it is to cancel a transfer.
    cancelling: Turns<TransferId>,
    tasks: TaskTracker,
    stopping: CancellationToken,
}

/// The place of one transfer ID. Whoever creates, takes over or removes the transfer holds `attach`.
struct Slot<A: Staging> {
    /// The node whose share of staged transfers it is part of, also while it is being filled.
    source: NodeId,
    attach: tokio::sync::Mutex<()>,
    incoming: Mutex<Option<Arc<Incoming<A>>>>,
}

/// Whose turn it is, for each of what can be done by one at a time only.
#[derive(Debug)]
struct Turns<K> {
    turns: Mutex<HashMap<K, Arc<tokio::sync::Mutex<()>>>>,
}

impl<K> Default for Turns<K> {
    fn default() -> Self {
        Self { turns: Mutex::default() }
    }
}

impl<K: Clone + Eq + Hash> Turns<K> {
    fn of(&self, key: &K) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that nobody waits for are forgotten, so that there are no more than there are who do.
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        Arc::clone(turns.entry(key.clone()).or_default())
    }
}

/// Files that are filled from installed ones at once, over all transfers: that reads, hashes and writes as much as the disk gives, for a few bytes that a
/// sender says, and what is received needs the disk as well. Two, and one of each source node, so that no node keeps the others from it.
const REUSING: usize = 2;

impl<A: Staging> Slot<A> {
    fn new(source: NodeId, incoming: Option<Arc<Incoming<A>>>) -> Arc<Self> {
        Arc::new(Self { source, attach: tokio::sync::Mutex::new(()), incoming: Mutex::new(incoming) })
    }

    fn get(&self) -> Option<Arc<Incoming<A>>> {
        self.incoming.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, incoming: Option<Arc<Incoming<A>>>) {
        *self.incoming.lock().unwrap_or_else(PoisonError::into_inner) = incoming;
    }
}

impl<S: SnapshotStore> SnapshotReceiverBuilder<S> {
    /// Cluster, store and version that the receiver tells of itself, beside its node ID.
    #[must_use]
    pub fn identity(mut self, identity: NodeIdentity) -> Self {
        self.identity = NodeIdentity { node_id: self.identity.node_id, ..identity };
        self
    }

    /// Other limits than the default ones.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// What the store's owner has to say. Default: [`KeepFiles`].
    #[must_use]
    pub fn hook(mut self, hook: impl InstallHook) -> Self {
        self.hook = Arc::new(hook);
        self
    }

    /// The cluster, and who may call. Default: everybody.
    #[must_use]
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// The node's registry, where it has one already. Default: a new one.
    #[must_use]
    pub fn transfers(mut self, transfers: Transfers) -> Self {
        self.transfers = Some(transfers);
        self
    }

    /// Recovers what an earlier process left, goes on with installs that it had begun, and starts.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    pub async fn start(self) -> Result<SnapshotReceiver<S>, StoreError> {
        let Self { store, identity, limits, hook, transfers, access } = self;
        let transfers = transfers.unwrap_or_else(|| Transfers::new(&limits));
        let store = Arc::new(store);
        let recovered = store.recover().await?;
        for damage in &recovered.damage {
            tracing::warn!(damage, "left out on recovery");
        }
        transfers.persist_in(&recovered.finished, Arc::new(StoreHistory(Arc::clone(&store))));
        let inner = Arc::new(Inner {
            store,
            identity,
            places: Admission::new(limits.transfers, limits.transfers_per_peer),
            manifests: Manifests::new(&limits),
            turns: Turns::default(),
            reuse_turns: Turns::default(),
            reusing: Semaphore::new(REUSING),
            reuses: Reuses::new(limits.reuse_bytes_per_peer),
            limits,
            access,
            hook,
            transfers,
            budget: Arc::default(),
            slots: Mutex::default(),
            cancelling: Turns::default(),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
        });
        for staging in recovered.staged {
            inner.readopt(staging).await;
        }
        let collector = Arc::clone(&inner);
        inner.tasks.spawn(async move { collector.collect_stale().await });
        Ok(SnapshotReceiver { inner })
    }
}

impl<S: SnapshotStore> SnapshotReceiver<S> {
    /// A receiver of the node `node_id` that keeps its snapshots in `store`.
    pub fn builder(node_id: &NodeId, store: S) -> SnapshotReceiverBuilder<S> {
        SnapshotReceiverBuilder {
            store,
            identity: NodeIdentity { node_id: node_id.to_string(), ..NodeIdentity::default() },
            limits: Limits::default(),
            hook: Arc::new(KeepFiles),
            transfers: None,
            access: Access::default(),
        }
    }

    /// The service, to be added to a tonic server. Chunks of 128 KiB or more reach the store in the pieces in which they came from the
    /// network, which a [`SplitSnapshotServiceServer`] alone would copy together.
    #[must_use]
    pub fn into_service(self) -> ReceiverService<S> {
        let access = self.inner.access.clone();
        let service = SplitSnapshotServiceServer::new(self)
            // Chunks do not pass its decoder.
            .max_decoding_message_size(MAX_REQUEST_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let service = WithDetails::new(WithRawBody::new(service, TRANSFER), handshake::refused);
        Guarded::new(service, access)
    }

    /// All transfers of the node; for its senders to report to.
    #[must_use]
    pub fn transfers(&self) -> Transfers {
        self.inner.transfers.clone()
    }

    /// The store behind it.
    #[must_use]
    pub fn store(&self) -> &S {
        &self.inner.store
    }

    /// Refuses new streams, ends open ones with `SHUTTING_DOWN` after what they brought is durable, ends watches, and waits for
    /// that and for installs that are under way. Everything unfinished is resumable. Cancel safe; may be called again.
    pub async fn shutdown(&self) {
        self.inner.stopping.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }
}

impl<S: SnapshotStore> Inner<S> {
    fn slots(&self) -> MutexGuard<'_, HashMap<TransferId, Arc<Slot<S::Staging>>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, id: &TransferId) -> Option<Arc<Incoming<S::Staging>>> {
        self.slots().get(id).and_then(|slot| slot.get())
    }

    /// Takes a staging area of an earlier process. One that cannot be taken is left where it is, and said so: the node starts.
    async fn readopt(self: &Arc<Self>, staging: Arc<S::Staging>) {
        let plan = staging.plan().clone();
        let id = &plan.spec.transfer_id;
        let known = self.transfers.registry().get(Some(Direction::In), id.as_str());
        if let Some(known) = known
            && matches!(
                known.phase(),
                TransferPhase::Cancelled | TransferPhase::Expired | TransferPhase::Failed
            )
            && staging.claim().attempt <= known.attempt
        {
            // Its end is on record, the crash came before the removal. A later attempt is another transfer of the ID.
            if let Err(error) = staging.remove().await {
                tracing::error!(transfer_id = %id, error = &error as &dyn std::error::Error, "cannot be removed");
            }
            return;
        }
        let sealed = staging.state() == StagingState::Sealed;
        let phase = if sealed { TransferPhase::Installing } else { TransferPhase::Interrupted };
        let admitted = match self.hook.readmit(&plan).await {
            Ok(hold) => hold,
            Err(error) => {
                // It was admitted before; what changed since is for the install to find out.
                tracing::warn!(transfer_id = %id, error = %error, "no longer admitted");
                Box::new(())
            }
        };
        let memory = self.manifests.take(&plan.spec.source_node, &plan.manifest);
        let progress = initial_progress(&plan, &self.identity.node_id, phase);
        let tracker = match self.transfers.registry().readopt(Direction::In, id.as_str(), progress) {
            Ok(tracker) => tracker,
            Err(error) => {
                tracing::error!(transfer_id = %id, error = %error, "cannot be shown; left as it is");
                return;
            }
        };
        let stage = if sealed { Stage::Installing } else { Stage::Open };
        let incoming = Incoming::new(staging, admitted, memory, tracker, stage, &self.limits);
        let slot = Slot::new(plan.spec.source_node.clone(), Some(Arc::clone(&incoming)));
        self.slots().insert(id.clone(), slot);
        if sealed {
            self.spawn_install(incoming);
        } else {
            self.show_expiry(&incoming);
        }
    }

    /// Shows when staged data that nobody resumes is collected.
    fn show_expiry(&self, incoming: &Incoming<S::Staging>) {
        let expires =
            incoming.staging.last_activity_unix_ms().saturating_add(millis(self.limits.stale_after));
        incoming.show(|transfer| transfer.expires_unix_ms = Some(expires));
    }

    async fn collect_stale(&self) {
        let every = COLLECT_INTERVAL.min(self.limits.stale_after / 4).max(Duration::from_millis(50));
        loop {
            self.collect_once().await;
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = tokio::time::sleep(every) => {}
            }
        }
    }

    async fn collect_once(&self) {
        let now = now_unix_ms();
        let slots: Vec<_> = self.slots().values().cloned().collect();
        for slot in slots {
            // A transfer that is being attached is not stale.
            let Ok(_attach) = slot.attach.try_lock() else { continue };
            let Some(incoming) = slot.get() else { continue };
            if incoming.stage() == Stage::Closed {
                // Its removal failed.
                let ended = incoming.ended().as_ref().map(TransferProgress::phase);
                // Nobody has come again to whom it makes room.
                let phase = ended.or(incoming.makes_room().then_some(TransferPhase::Expired));
                if let Some(phase) = phase
                    && let Err(error) = self.end(&incoming, phase, None).await
                {
                    tracing::warn!(transfer_id = %incoming.plan.spec.transfer_id, error = %error, "still cannot be removed");
                }
                continue;
            }
            self.end_lost(&incoming).await;
            let expired = incoming.expires_unix_ms().is_some_and(|at| at <= now);
            if !expired
                || incoming.has_streams()
                || incoming.stage() != Stage::Open
                || incoming.close().is_err()
            {
                continue;
            }
            let held = incoming.ledger().durable_bytes();
            tracing::info!(transfer_id = %incoming.plan.spec.transfer_id, staged_bytes = held, "collecting stale staging");
            if let Err(error) = self.end(&incoming, TransferPhase::Expired, None).await {
                tracing::warn!(transfer_id = %incoming.plan.spec.transfer_id, error = %error, "cannot collect");
            }
        }
    }

    /// Ends a transfer whose source has lost the slots to another node: it could not be installed, and what is held for it would keep that one off them. Seen twice,
    /// since what the hook knows of owners may be out of date. The caller holds the transfer's attach lock.
    async fn end_lost(&self, incoming: &Arc<Incoming<S::Staging>>) {
        let open = incoming.stage() == Stage::Open;
        let lost = open.then(|| self.hook.lost_by_source(&incoming.plan)).flatten();
        let before = incoming.lost(lost.is_some());
        let Some(reason) = lost.filter(|_| before) else { return };
        let id = &incoming.plan.spec.transfer_id;
        tracing::warn!(transfer_id = %id, reason, "ended: its source has lost the slots");
        let error = Reason::InstallRefused.error(reason);
        let ended = async {
            self.close(incoming, &error).await?;
            self.end(incoming, TransferPhase::Failed, Some(&error)).await
        };
        if let Err(error) = ended.await {
            tracing::warn!(transfer_id = %id, error = %error, "cannot be ended; it is tried again");
        }
    }

    /// Ends a transfer that is closed to all others: writes the history, removes the staging area, then shows it as finished.
    /// Called again after it failed, it goes on; phase and error are those of the first call.
    async fn end(
        &self,
        incoming: &Arc<Incoming<S::Staging>>,
        phase: TransferPhase,
        error: Option<&Error>,
    ) -> Result<TransferProgress, Error> {
        let recorded = incoming.ended().clone();
        let last = match recorded {
            Some(last) => last,
            None => {
                incoming.show(|_| {});
                let Some(mut last) = incoming.shown() else {
                    return Err(Reason::Internal.error("the transfer has ended already"));
                };
                last.lanes = 0;
                last.finish(phase);
                if phase == TransferPhase::Installed {
                    // Also where a size was unknown until the end.
                    let progress = last.progress.get_or_insert_default();
                    progress.bytes_total = Some(progress.bytes_done);
                    progress.items_done = incoming.plan.manifest.file_count();
                }
                if let Some(error) = error {
                    last.progress.get_or_insert_default().error = Some(error.clone().into());
                }
                // Before the removal: a crash between the two repeats that at the next start.
                self.transfers.record(&last).await;
                *incoming.ended() = Some(last.clone());
                last
            }
        };
        incoming.staging.remove().await?;
        incoming.finish(last.clone());
        let id = &incoming.plan.spec.transfer_id;
        let mut slots = self.slots();
        if let Some(slot) = slots.get(id)
            && slot.get().is_some_and(|current| Arc::ptr_eq(&current, incoming))
        {
            slot.set(None);
            slots.remove(id);
        }
        Ok(last)
    }
}

/// The store as the home of the history.
struct StoreHistory<S>(Arc<S>);

impl<S: SnapshotStore> HistorySink for StoreHistory<S> {
    fn record(&self, record: Vec<u8>) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async move {
            if let Err(error) = self.0.record_finished(&record).await {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the history of transfers is incomplete"
                );
            }
        })
    }
}

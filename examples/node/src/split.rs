//! Splitting: the upper part of a slot range goes to another node, with nothing lost and nobody served twice.
//!
//! At the source, one task per split:
//!
//! 1. persist the intent, so that a restart goes on with it before it serves ([`Splits::resume`]);
//! 2. hold writes to the slots that move, let those that were let in end;
//! 3. export one consistent snapshot, send it; before its last piece leaves, hold reads too (`source`);
//! 4. the target imports it and owns the slots from the same transaction on (`receive`);
//! 5. on `Installed`, give the slots up; held requests are answered with `MOVED`.
//!
//! An outcome that is not known, after a lost reply or a restart, is asked for before anything else happens; until there is an
//! answer, the slots stay held. Only what proves that the target has not taken over, and will not, undoes a split: it has nothing of the transfer,
//! or has ended it, and its slot map has no owner of the slots as of the split or later. And only the slot map that gives the slots to the target gives them
//! up here: what is said of the transfer is not enough, since any peer may have begun one under its ID. The slot map proves something only where the store that
//! says it is the one that the split began with: the ownership is committed there in one transaction with the import. From another store, it says nothing:
//! then the operator has the word ([`Splits::resolve`]).

mod outcome;
mod receive;
mod run;
mod source;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use proto::common::error::Error;
use proto::common::guard::{RangeGuard, RangeHold};
use proto::common::ids::{ShardId, TransferId};
use proto::node::Priority;
use proto::snapshot::sender::SnapshotToSend;
use proto::snapshot::spec::SnapshotPoint;
use proto::snapshot::transfers::Transfers;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use receive::{ROWS_FILE, SplitHook};

use crate::common::{NodeId, SlotRange};
use crate::gate::{GateHold, HoldMode};
use crate::node::Node;
use crate::store::{NodeAddresses, PARTIAL, SplitIntent, StoreError, unix_ms};

/// Splits that are remembered after their end, for those who ask.
const REMEMBERED: usize = 100;
/// Phases that are remembered of each: while nobody can tell how it ended, there may come any number.
const PHASES: usize = 32;

/// What to split, and for whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SplitRequest {
    /// The first slot that moves: with all that follow in the same owned range.
    pub slot: u16,
    /// The node that gets them.
    pub target: NodeId,
    /// Where it is.
    pub target_addresses: NodeAddresses,
    /// Bytes per second at most.
    pub bytes_per_second: Option<u64>,
}

/// How far a split is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SplitPhase {
    /// Writes to the slots are held; the snapshot is written.
    Exporting,
    /// The snapshot is being sent and installed.
    Sending,
    /// It is not known whether the target took over; the slots are held until it is.
    Asking,
    /// As before, and the target cannot tell any more: [`Splits::resolve`] ends it.
    NeedsOperator,
    /// Done: the target owns the slots.
    Done,
    /// Undone: this node owns the slots as before.
    Undone,
}

impl SplitPhase {
    /// One word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Exporting => "exporting",
            Self::Sending => "sending",
            Self::Asking => "asking",
            Self::NeedsOperator => "needs-operator",
            Self::Done => "done",
            Self::Undone => "undone",
        }
    }
}

/// What the operator says of a split whose target cannot tell what became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// The slots stay here: the target has not taken over, or is gone with all that it had.
    Keep,
    /// The target has taken over.
    Give,
}

/// What is known of a split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SplitStatus {
    /// The id of its transfer.
    pub transfer: TransferId,
    /// The slots that move.
    pub range: SlotRange,
    /// The node that gets them.
    pub target: NodeId,
    /// How far it is.
    pub phase: SplitPhase,
    /// When each phase began, in milliseconds since the Unix epoch: the first one and at most the last 31.
    pub phases: Vec<(SplitPhase, u64)>,
    /// The last thing that went wrong.
    pub error: Option<String>,
    /// Rows in the snapshot, once it is written by this process.
    pub rows: Option<u64>,
    /// Bytes of the snapshot, once it is written.
    pub bytes: Option<u64>,
}

/// Why a split was not begun.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SplitError {
    /// It makes no sense here; the sentence says why.
    #[error("{0}")]
    Refused(String),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// All splits of which this node is the source. Clones are the same.
#[derive(Debug, Clone)]
pub struct Splits {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    node: Node,
    transfers: Transfers,
    guard: RangeGuard,
    directory: PathBuf,
    known: Mutex<BTreeMap<TransferId, Known>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// A split whose slots nobody else may move.
#[derive(Debug)]
struct Begun {
    intent: SplitIntent,
    transfer: TransferId,
    range: SlotRange,
    target: NodeId,
    /// What is sent, and by what the target's answers are told from those about another one.
    snapshot: SnapshotToSend,
    resolution: watch::Receiver<Option<Resolution>>,
    ended: CancellationToken,
    _guard: RangeHold,
}

impl Begun {
    /// What the operator says, once he does.
    async fn resolution(&self) -> Resolution {
        let mut said = self.resolution.clone();
        match said.wait_for(Option::is_some).await.map(|said| *said) {
            Ok(Some(resolution)) => resolution,
            _ => std::future::pending().await,
        }
    }
}

/// A split that somebody may ask about.
#[derive(Debug)]
struct Known {
    status: SplitStatus,
    resolve: watch::Sender<Option<Resolution>>,
    ended: CancellationToken,
}

/// How the name of the snapshot of a split ends.
const ROWS: &str = "rows";

/// Where the snapshot of a split is written.
fn rows_file(directory: &Path, transfer: &str) -> PathBuf {
    directory.join(format!("{transfer}.{ROWS}"))
}

impl Splits {
    /// `guard` is shared with everything that moves slots of this node, `transfers` with its receiver. Tasks end with `stop`; what they
    /// have begun goes on with the next start.
    ///
    /// # Errors
    ///
    /// The directory for snapshots cannot be made.
    pub fn new(
        node: Node,
        transfers: Transfers,
        guard: RangeGuard,
        stop: CancellationToken,
    ) -> Result<Self, StoreError> {
        let directory = node.store().directory().join("splits");
        std::fs::create_dir_all(&directory)
            .map_err(|source| StoreError::io(format!("cannot make {}", directory.display()), source))?;
        let inner = Inner {
            node,
            transfers,
            guard,
            directory,
            known: Mutex::default(),
            tasks: TaskTracker::new(),
            stop,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Goes on with what an earlier process has begun. Call it before the node serves: their slots are held when it returns.
    ///
    /// # Errors
    ///
    /// The database cannot be read.
    pub fn resume(&self) -> Result<(), SplitError> {
        let intents = self.inner.node.store().splits()?;
        self.remove_leftovers(&intents);
        for intent in intents {
            let begun = self.begin(intent)?;
            tracing::info!(transfer = %begun.transfer, slots = %begun.range, target = %begun.target, "going on with a split");
            let hold = self.inner.node.gate().hold_undrained(begun.range, HoldMode::All);
            self.spawn(begun, Some(hold));
        }
        Ok(())
    }

    /// Removes snapshots of splits that have ended: the process did, too, before it came to that. Nothing that a split does not make, and nothing that a link in the
    /// place of the directory leads to.
    fn remove_leftovers(&self, intents: &[SplitIntent]) {
        let directory = &self.inner.directory;
        if !std::fs::symlink_metadata(directory).is_ok_and(|found| found.is_dir()) {
            return;
        }
        let wanted: Vec<_> = intents.iter().map(|intent| rows_file(directory, &intent.transfer)).collect();
        let is_ours = |path: &PathBuf| {
            path.extension().is_some_and(|extension| extension == ROWS || extension == PARTIAL)
        };
        let found = std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
        for path in found.filter(|path| is_ours(path) && !wanted.contains(path)) {
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "the snapshot of a split cannot be removed");
            }
        }
    }

    /// Begins a split. When it returns, the split is durable: it goes on whatever happens to this process.
    ///
    /// # Errors
    ///
    /// Nothing was begun.
    pub async fn start(&self, request: SplitRequest) -> Result<TransferId, SplitError> {
        let refused = |why: String| SplitError::Refused(why);
        let SplitRequest { slot, target, target_addresses, bytes_per_second } = request;
        let node = &self.inner.node;
        if target == *node.id() {
            return Err(refused(format!("node {target} is this node")));
        }
        let owned = || node.own_ranges().into_iter().find(|range| range.contains(slot));
        let not_owned = || refused(format!("slot {slot} is not of this node"));
        let shard = owned().ok_or_else(not_owned)?;
        let range = SlotRange::new(slot, shard.end()).map_err(|error| refused(error.to_string()))?;
        // Here rather than when writes are held: the name of this node may be too long for that of a shard.
        receive::split_shard(range, node.id()).map_err(|error| refused(error.to_string()))?;
        let epoch = node.gate().ownership().highest_epoch(range).saturating_add(1);
        let begun_unix_ms = unix_ms();
        let transfer =
            format!("split-{}-{}-{begun_unix_ms}-{:08x}", slot, shard.end() - 1, rand::random::<u32>());
        let store =
            outcome::identify(&node.trust().dialer(), &target_addresses.grpc, &target, &transfer).await;
        let target_store = store.map_err(refused)?;
        let intent = SplitIntent {
            transfer,
            start: range.start(),
            end: range.end(),
            target: target.to_string(),
            target_addresses: target_addresses.clone(),
            target_store,
            epoch,
            source_start: shard.start(),
            source_end: shard.end(),
            begun_unix_ms,
            bytes_per_second,
        };
        let begun = self.begin(intent.clone())?;
        let transfer = begun.transfer.clone();
        // From here on, nobody else moves them; until then, somebody may have, also away and back.
        let unmoved = || {
            if owned() != Some(shard) {
                return Err(not_owned());
            }
            if node.gate().ownership().highest_epoch(range) >= epoch {
                return Err(refused(format!("slots {range} changed hands meanwhile; say it again")));
            }
            Ok(())
        };
        if let Err(error) = unmoved() {
            self.known().remove(&transfer);
            return Err(error);
        }
        // From here on in a task of its own: whoever asked may go away.
        let splits = self.clone();
        let started = self.inner.tasks.spawn(async move {
            let node = &splits.inner.node;
            node.put_nodes(BTreeMap::from([(begun.target.clone(), target_addresses)])).await?;
            node.store().put_split(intent).await?;
            splits.spawn(begun, None);
            Ok::<(), StoreError>(())
        });
        match started.await {
            Ok(Ok(())) => Ok(transfer),
            Ok(Err(error)) => {
                self.known().remove(&transfer);
                Err(error.into())
            }
            Err(_) => Err(StoreError::Closed.into()),
        }
    }

    /// All splits of this process, in the order of their ids.
    #[must_use]
    pub fn list(&self) -> Vec<SplitStatus> {
        self.known().values().map(|known| known.status.clone()).collect()
    }

    /// Ends a split that waits for an answer of its target, or whose transfer the target does not let be cancelled any more, as the operator says, and returns when that is durable. **Keeping slots that
    /// the target serves, or giving up those that it does not, loses writes**: look first.
    ///
    /// # Errors
    ///
    /// Nothing was changed: it is not known, has ended, or does not wait for an answer.
    pub async fn resolve(&self, transfer: &str, resolution: Resolution) -> Result<(), SplitError> {
        let refused = |why: String| Err(SplitError::Refused(why));
        let unknown = || SplitError::Refused(format!("no split {transfer} is known here; see SPLIT LIST"));
        let id = TransferId::new(transfer).map_err(|_| unknown())?;
        let ended = {
            let known = self.known();
            let known = known.get(&id).ok_or_else(unknown)?;
            match known.status.phase {
                SplitPhase::Asking | SplitPhase::NeedsOperator => {}
                SplitPhase::Sending if self.inner.transfers.cannot_be_cancelled(&id) => {}
                phase @ (SplitPhase::Done | SplitPhase::Undone) => {
                    return refused(format!("the split is {} already", phase.as_str()));
                }
                phase => {
                    return refused(format!(
                        "the split is {}, not waiting for an answer; cancel its transfer first (nodectl cancel {id})",
                        phase.as_str()
                    ));
                }
            }
            known.resolve.send_replace(Some(resolution));
            known.ended.clone()
        };
        tokio::select! {
            () = ended.cancelled() => {}
            () = self.inner.stop.cancelled() => {
                return refused("the node is shutting down; say it again when it is back".into());
            }
        }
        let phase = self.known().get(&id).map(|known| known.status.phase);
        match (resolution, phase) {
            (Resolution::Keep, Some(SplitPhase::Undone)) | (Resolution::Give, Some(SplitPhase::Done)) => {
                Ok(())
            }
            // The target answered at the same time.
            (_, phase) => refused(format!("the split is {}", phase.map_or("forgotten", SplitPhase::as_str))),
        }
    }

    /// Waits for the tasks, which end after the `stop` that they were given.
    pub async fn join(&self) {
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    fn begin(&self, intent: SplitIntent) -> Result<Begun, SplitError> {
        let refused = |error: String| SplitError::Refused(error);
        let target = NodeId::new(&intent.target).map_err(|error| refused(error.to_string()))?;
        let snapshot =
            self.snapshot(&intent, &target).map_err(|error| refused(error.message().to_owned()))?;
        let (transfer, range) = (snapshot.transfer_id.clone(), snapshot.slots);
        let guard = self.inner.guard.try_acquire(range, transfer.as_str());
        let guard = guard.map_err(|error| refused(error.message().to_owned()))?;
        let status = SplitStatus {
            transfer: transfer.clone(),
            range,
            target: target.clone(),
            phase: SplitPhase::Exporting,
            phases: vec![(SplitPhase::Exporting, unix_ms())],
            error: None,
            rows: None,
            bytes: None,
        };
        let mut known = self.known();
        while known.len() >= REMEMBERED {
            let ended = known
                .iter()
                .filter(|(_, split)| matches!(split.status.phase, SplitPhase::Done | SplitPhase::Undone))
                .min_by_key(|(_, split)| split.status.phases.first().map(|(_, at)| *at))
                .map(|(id, _)| id.clone());
            let Some(ended) = ended else { break };
            known.remove(&ended);
        }
        let (resolve, resolution) = watch::channel(None);
        let ended = CancellationToken::new();
        known.insert(transfer.clone(), Known { status, resolve, ended: ended.clone() });
        Ok(Begun { intent, transfer, range, target, snapshot, resolution, ended, _guard: guard })
    }

    fn snapshot(&self, intent: &SplitIntent, target: &NodeId) -> Result<SnapshotToSend, Error> {
        let node = self.inner.node.id();
        let slots = SlotRange::new(intent.start, intent.end)?;
        let source = SlotRange::new(intent.source_start, intent.source_end)?;
        Ok(SnapshotToSend {
            transfer_id: TransferId::new(&intent.transfer)?,
            source_shard: ShardId::new(format!("slots-{source}"))?,
            target_shard: receive::split_shard(slots, node)?,
            source_node: node.clone(),
            target_node: Some(target.clone()),
            slots,
            // There is no log: the epoch orders hand-overs of these slots, the time orders attempts at one.
            point: SnapshotPoint { term: intent.epoch, index: intent.begun_unix_ms },
            fence: None,
            priority: Priority::Split,
        })
    }

    fn spawn(&self, begun: Begun, resumed: Option<GateHold>) {
        let splits = self.clone();
        self.inner.tasks.spawn(async move {
            let stopped = async {
                splits.inner.stop.cancelled().await;
                // Before the holds are dropped: the target may have taken over already.
                splits.inner.node.gate().seal();
            };
            tokio::select! {
                () = stopped => {}
                () = run::run(&splits, &begun, resumed) => {}
            }
        });
    }

    fn known(&self) -> std::sync::MutexGuard<'_, BTreeMap<TransferId, Known>> {
        self.inner.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, transfer: &TransferId, change: impl FnOnce(&mut SplitStatus)) {
        if let Some(known) = self.known().get_mut(transfer) {
            change(&mut known.status);
        }
    }

    fn enter(&self, transfer: &TransferId, phase: SplitPhase) {
        self.update(transfer, |status| {
            if status.phase != phase {
                status.phase = phase;
                if status.phases.len() >= PHASES {
                    // Not the first one: that is when the split began.
                    status.phases.remove(1);
                }
                status.phases.push((phase, unix_ms()));
            }
        });
    }

    fn failed(&self, transfer: &TransferId, error: impl std::fmt::Display) {
        let error = error.to_string();
        tracing::warn!(%transfer, error, "split");
        self.update(transfer, |status| status.error = Some(error));
    }
}

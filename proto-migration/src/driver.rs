//! The source's side: starts migrations, drives each to its end, and answers for them.
//!
//! | question | where |
//! |---|---|
//! | what is the state, what is saved when? | `driver/task.rs` |
//! | what may callers ask? | `driver/calls.rs` |
//! | how are rows and changes sent? | `driver/pump.rs`, within one stream: `driver/transfer.rs` |
//! | how do slots change hands? | `driver/freeze.rs`, and what is done so that it is short: `driver/approach.rs` |
//! | what of an earlier process is gone on with? | `driver/recovery.rs` |
//! | how is an unknown outcome found out? | `driver/resolve.rs` |
//! | who is slowed when the target does not keep up? | `driver/pressure.rs` |
//! | what must my store do? | implement [`MigrationSource`] |

mod approach;
mod calls;
mod dial;
mod freeze;
mod link;
mod open;
mod pressure;
mod pump;
mod recovery;
mod resolve;
mod task;
mod transfer;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use proto_common::clock::now_unix_ms;
use proto_common::error::{CommonReason, Error};
use proto_common::fence::Fence;
use proto_common::guard::{RangeGuard, RangeHold};
use proto_common::ids::{MigrationId, NodeId};
use proto_common::meter::Meter;
use proto_common::rate::RateLimiter;
use proto_common::registry::Tracker;
use proto_common::retry::Backoff;
use proto_common::v1::{Direction, NodeIdentity, Priority, Progress};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use dial::{Dial, DialFn, dial_fn};
pub use recovery::{Doubt, Doubtful, Sorted, SoundRecord, sort};

use self::calls::Command;
use self::task::{Task, freeze_backoff};
use crate::Reason;
use crate::hold::Hold;
use crate::journal::{Journal, Recovered, SourceRecord};
use crate::limits::{Limits, TaskLimits};
use crate::migrations::{Migrations, not_found};
use crate::service::{MigrationNode, Resolution, SourceCalls, shutting_down};
use crate::source::MigrationSource;
use crate::spec::MigrationSpec;
use crate::v1::{
    MigrationGate, MigrationProgress, MigrationState, StartMigrationRequest, StartMigrationResponse,
};

/// Features of this version, as both sides name them.
pub(crate) const FEATURES: [&str; 2] = ["crc64nvme", "blake3-sum128"];

/// Calls that wait for one task.
const COMMANDS: usize = 16;

/// Longest wait of a caller for a task. Saving a command takes milliseconds, and the longest freeze but those that somebody asked for half a second.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Drives the migrations that leave a node. Cheap to clone; all clones are one driver.
pub struct MigrationDriver<S: MigrationSource, D: Dial> {
    inner: Arc<Inner<S, D>>,
}

impl<S: MigrationSource, D: Dial> Clone for MigrationDriver<S, D> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<S: MigrationSource, D: Dial> std::fmt::Debug for MigrationDriver<S, D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MigrationDriver")
            .field("node_id", &self.inner.identity.node_id)
            .finish_non_exhaustive()
    }
}

/// What all calls and tasks of a driver share.
struct Inner<S: MigrationSource, D: Dial> {
    source: Arc<S>,
    dial: D,
    journal: Journal,
    identity: NodeIdentity,
    me: NodeId,
    /// 16 random bytes of this process.
    session: Bytes,
    limits: Limits,
    migrations: Migrations,
    guard: RangeGuard,
    running: Mutex<HashMap<MigrationId, Handle>>,
    /// One start at a time: a second with the same ID finds the first.
    starting: tokio::sync::Mutex<()>,
    /// Held as long as the process lives: slots whose record is damaged, and what was undecided when the driver stopped or its task panicked.
    held: Mutex<Vec<(Hold, Option<RangeHold>)>>,
    tasks: TaskTracker,
    draining: CancellationToken,
    stopping: CancellationToken,
}

#[derive(Clone)]
struct Handle {
    spec: MigrationSpec,
    commands: mpsc::Sender<Command>,
}

/// Makes a [`MigrationDriver`].
pub struct MigrationDriverBuilder<S: MigrationSource, D: Dial> {
    source: S,
    dial: D,
    identity: NodeIdentity,
    journal: Journal,
    limits: Limits,
    migrations: Option<Migrations>,
    guard: RangeGuard,
}

impl<S: MigrationSource, D: Dial> std::fmt::Debug for MigrationDriverBuilder<S, D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MigrationDriverBuilder").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl<S: MigrationSource, D: Dial> MigrationDriverBuilder<S, D> {
    /// Other limits than the default ones.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// The node's registry, shared with its receiver. Default: a new one.
    #[must_use]
    pub fn migrations(mut self, migrations: Migrations) -> Self {
        self.migrations = Some(migrations);
        self
    }

    /// The node's guard of slots, shared with its transfers and its receiver. Default: a new one.
    #[must_use]
    pub fn guard(mut self, guard: RangeGuard) -> Self {
        self.guard = guard;
        self
    }

    /// Takes up what an earlier process left, and starts. When it returns, the slots of every undecided migration are held: let clients
    /// in after that.
    ///
    /// Slots of a damaged record are [quarantined](MigrationSource::quarantine) as long as this process lives, since they may have been
    /// handed over, and calls that want to move them get `SLOTS_QUARANTINED`. The same goes for a record that is whole but overlaps a damaged one,
    /// and for one that is gone while the store [logs changes](MigrationSource::logs) for it. The rest of the node serves. [`sort`] says what is
    /// quarantined, without a driver.
    ///
    /// # Errors
    ///
    /// The node's ID is none, or the store cannot tell its logs or hold the slots.
    pub async fn start(self, mut recovered: Recovered) -> Result<MigrationDriver<S, D>, Error> {
        let Self { source, dial, identity, journal, limits, migrations, guard } = self;
        let inner = Arc::new(Inner {
            source: Arc::new(source),
            dial,
            journal,
            me: NodeId::new(&identity.node_id).map_err(|error| error.at("identity.node_id"))?,
            identity,
            session: Bytes::copy_from_slice(&rand::random::<[u8; 16]>()),
            migrations: migrations.unwrap_or_else(|| Migrations::new(&limits)),
            limits,
            guard,
            running: Mutex::default(),
            starting: tokio::sync::Mutex::default(),
            held: Mutex::default(),
            tasks: TaskTracker::new(),
            draining: CancellationToken::new(),
            stopping: CancellationToken::new(),
        });
        inner.migrations.seed(std::mem::take(&mut recovered.finished));
        inner.take_up_all(recovered).await?;
        Ok(MigrationDriver { inner })
    }
}

impl<S: MigrationSource, D: Dial> MigrationDriver<S, D> {
    /// A driver of the node `identity`, whose slots are in `source`.
    pub fn builder(
        identity: NodeIdentity,
        source: S,
        journal: Journal,
        dial: D,
    ) -> MigrationDriverBuilder<S, D> {
        MigrationDriverBuilder {
            source,
            dial,
            identity,
            journal,
            limits: Limits::default(),
            migrations: None,
            guard: RangeGuard::new(),
        }
    }

    /// The source's half of the node's service.
    #[must_use]
    pub fn node(&self) -> MigrationNode {
        MigrationNode {
            migrations: self.inner.migrations.clone(),
            limits: self.inner.limits.clone(),
            source: Some(Arc::new(Calls(Arc::clone(&self.inner)))),
            target: None,
            stopping: self.inner.stopping.clone(),
            access: proto_common::access::Access::default(),
        }
    }

    /// All migrations of the node.
    #[must_use]
    pub fn migrations(&self) -> Migrations {
        self.inner.migrations.clone()
    }

    /// Migrations that are COMPLETED here, while their target has not confirmed yet that it need not remember that. Without this node it would
    /// for ever, and could not be removed itself.
    #[must_use]
    pub fn unconfirmed(&self) -> Vec<MigrationProgress> {
        let running: Vec<MigrationId> = self.inner.running().keys().cloned().collect();
        let shown = running.iter().filter_map(|id| self.inner.migrations.get(Some(Direction::Out), id).ok());
        shown.filter(|migration| migration.state() == MigrationState::Completed).collect()
    }

    /// Refuses new migrations with `SHUTTING_DOWN`; those under way go on.
    pub fn drain(&self) {
        self.inner.draining.cancel();
    }

    /// Stops all tasks where they are, and waits for them. Everything goes on after the next start. What is undecided stays held until
    /// the process ends. Cancel safe; may be called again.
    pub async fn shutdown(&self) {
        self.inner.draining.cancel();
        self.inner.stopping.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }
}

/// Keeps others off the slots of a migration.
fn acquire(guard: &RangeGuard, id: &MigrationId, spec: &MigrationSpec) -> Result<RangeHold, Error> {
    let held = guard.try_acquire(spec.slots, &format!("migration {id}"));
    held.map_err(|error| {
        if !error.is(CommonReason::RangeBusy) {
            return error;
        }
        let refused = Reason::RangeBusy.error(error.message());
        refused.metadata("holder", error.get("holder").unwrap_or_default())
    })
}

impl<S: MigrationSource, D: Dial> Inner<S, D> {
    fn running(&self) -> MutexGuard<'_, HashMap<MigrationId, Handle>> {
        lock(&self.running)
    }

    fn ended(&self, id: &MigrationId) {
        self.running().remove(id);
    }

    fn keep_held(&self, hold: Hold, range: Option<RangeHold>) {
        lock(&self.held).push((hold, range));
    }

    fn task(
        self: &Arc<Self>,
        id: MigrationId,
        spec: MigrationSpec,
        limits: TaskLimits,
        record: SourceRecord,
        tracker: Tracker<MigrationProgress>,
    ) -> Task<S, D> {
        let slowed = record.progress.as_ref().map_or(0, |progress| progress.writers_slowed_ms);
        // The store counts those of its own process.
        let slowed_before = slowed.saturating_sub(self.source.writers_slowed_ms(&id));
        let (commands, asked) = mpsc::channel(COMMANDS);
        self.running().insert(id.clone(), Handle { spec: spec.clone(), commands });
        Task {
            inner: Arc::clone(self),
            rate: RateLimiter::with_rate(limits.bytes_per_second),
            wished_rate: None,
            slowed_before,
            id,
            spec,
            limits,
            record,
            tracker,
            commands: asked,
            later: Vec::new(),
            hold: None,
            range: None,
            meter: Meter::default(),
            backoff: Backoff::default().start(),
            freeze_after: Instant::now(),
            freeze_backoff: freeze_backoff(),
            began: Instant::now(),
            no_place: false,
        }
    }

    /// Asks a task that runs. `None` if it has ended, or ends before it looks.
    ///
    /// A task that waits for its disk looks at nothing: its caller gets an answer all the same.
    async fn ask(
        &self,
        id: &MigrationId,
        command: impl FnOnce(calls::Reply) -> Command,
    ) -> Option<Result<MigrationProgress, Error>> {
        let handle = self.running().get(id).cloned()?;
        let (reply, answer) = oneshot::channel();
        let asking = async {
            handle.commands.send(command(reply)).await.ok()?;
            answer.await.ok()
        };
        timeout(ANSWER_TIMEOUT, asking).await.unwrap_or_else(|_| {
            let waited = ANSWER_TIMEOUT.as_secs();
            let text = format!(
                "migration {id} has not answered for {waited} s, as while its disk takes nothing or a freeze lasts; what was asked may \
                 still be done: look at its progress, and ask again"
            );
            Some(Err(Reason::OutcomePending.error(text)))
        })
    }

    /// What is known of a migration whose task has ended.
    fn ended_as(&self, id: &MigrationId) -> Result<MigrationProgress, Error> {
        let known = self.migrations.get(Some(Direction::Out), id)?;
        // Only a node that stops ends a task before its migration.
        if known.is_final() { Ok(known) } else { Err(shutting_down()) }
    }

    async fn start(self: Arc<Self>, request: StartMigrationRequest) -> Result<StartMigrationResponse, Error> {
        let StartMigrationRequest { migration_id, spec, target_address, fence, priority, limits } = request;
        let id = MigrationId::new(&migration_id).map_err(|error| error.at("migration_id"))?;
        let spec = MigrationSpec::from_wire(spec, "spec", Some(&self.me))?;
        if spec.source_node != self.me {
            let text = format!(
                "this node is {}, not {}; ask the source of the migration",
                self.me, spec.source_node
            );
            return Err(Reason::WrongNode
                .error(text)
                .violation("spec.source_node_id", "is another node")
                .metadata("node_id", self.me.as_str()));
        }
        if target_address.is_empty() || target_address.len() > 512 {
            let problem = "is empty or longer than 512 bytes; write host:port";
            return Err(Reason::InvalidField.field("target_address", problem));
        }
        self.dial
            .check(&target_address)
            .map_err(|error| Reason::InvalidField.field("target_address", error.message()))?;
        let priority = Priority::try_from(priority).map_err(|_| {
            Reason::InvalidField.field("priority", format!("is {priority}, which this node does not know"))
        })?;
        let limits = TaskLimits::from_wire(limits, "limits")?;

        let one = self.starting.lock().await;
        let known = self.running().get(&id).map(|handle| handle.spec.clone());
        if let Some(known) = known {
            same(&known, &spec, &id)?;
            // It may be busy with its disk, or with a freeze: nobody else waits for that.
            drop(one);
            let joined = self
                .ask(&id, |reply| Command::Join { limits, priority, address: target_address, reply })
                .await;
            let joined = joined.unwrap_or_else(|| self.ended_as(&id))?;
            return Ok(StartMigrationResponse { migration: Some(joined), joined: true });
        }
        if let Ok(ended) = self.migrations.get(Some(Direction::Out), &id) {
            same(&MigrationSpec::from_wire(ended.spec.clone(), "spec", None)?, &spec, &id)?;
            return Ok(StartMigrationResponse { migration: Some(ended), joined: true });
        }
        if self.draining.is_cancelled() {
            return Err(shutting_down());
        }
        let going = self.migrations.active(Some(Direction::Out)).len();
        if going >= self.limits.outgoing {
            let text = format!("{going} migrations leave this node already; try again when one has ended");
            return Err(Reason::TooManyMigrations
                .error(text)
                .metadata("limit", self.limits.outgoing.to_string())
                .retry_after(Duration::from_secs(1)));
        }
        // First, so that nobody gives them away between the store's answer and this migration.
        let range = acquire(&self.guard, &id, &spec)?;
        let terms = self.source.admit(&spec, fence.map(Fence::from)).await?;
        let now = now_unix_ms();
        let mut progress = MigrationProgress {
            migration_id: id.to_string(),
            progress: Some(Progress {
                direction: Direction::Out.into(),
                bytes_total: terms.estimated_bytes,
                items_total: terms.estimated_keys,
                total_is_estimate: true,
                started_unix_ms: now,
                ..Progress::default()
            }),
            spec: Some(spec.clone().into()),
            gate: MigrationGate::Open.into(),
            reporter: Some(self.identity.clone()),
            target_address,
            limits: Some(limits.into()),
            priority: priority.into(),
            slot_epoch: terms.slot_epoch,
            decision: crate::v1::MigrationDecision::Undecided.into(),
            ..MigrationProgress::default()
        };
        progress.enter(MigrationState::Pending);
        let record = SourceRecord { progress: Some(progress.clone()), fence, ..SourceRecord::default() };
        let saved = self.journal.save(&id, spec.slots, &record).await;
        let tracker = match saved.and_then(|()| self.migrations.insert(progress.clone())) {
            Ok(tracker) => tracker,
            Err(error) => return Err(self.withdraw(id, range, error).await),
        };
        let mut task = self.task(id.clone(), spec, limits, record, tracker);
        tracing::info!(migration_id = %id, slots = %task.spec.slots, target = %task.spec.target_node, "migration started");
        task.range = Some(range);
        self.tasks.spawn(task.run());
        Ok(StartMigrationResponse { migration: Some(progress), joined: false })
    }

    /// A start that failed leaves no record, which a later process would go on with though its caller knows of none. Until it is gone, nobody gets the slots: a
    /// record of theirs would be found beside it.
    async fn withdraw(self: &Arc<Self>, id: MigrationId, range: RangeHold, error: Error) -> Error {
        let Err(mut failed) = self.journal.withdraw(&id, range.range()).await else { return error };
        let text = format!(
            "migration {id} did not begin: {}; nor can what was saved of it be removed: {}, and until then nobody gets slots {}, and a restart of \
             this node would begin it",
            error.message(),
            failed.message(),
            range.range()
        );
        let inner = Arc::clone(self);
        self.tasks.spawn(async move {
            let mut backoff = Backoff::default().start();
            loop {
                tracing::error!(migration_id = %id, error = %failed, "the record of a migration that did not begin cannot be removed");
                let wait = backoff.next(&failed).unwrap_or(Duration::from_secs(10));
                tokio::select! {
                    () = inner.stopping.cancelled() => return,
                    () = tokio::time::sleep(wait) => {}
                }
                match inner.journal.withdraw(&id, range.range()).await {
                    Ok(()) => return,
                    Err(again) => failed = again,
                }
            }
        });
        Reason::StorageFailed.error(text).caused_by(error)
    }

    /// Refuses a caller that is not, or no longer, who it believes to be.
    async fn check_fence(&self, id: &MigrationId, fence: Option<Fence>) -> Result<(), Error> {
        let Some(fence) = fence else { return Ok(()) };
        let spec = self.running().get(id).map(|handle| handle.spec.clone()).ok_or_else(|| not_found(id));
        let Ok(spec) = spec else { return Ok(()) };
        match self.source.admit(&spec, Some(fence)).await {
            Err(error) if error.is(CommonReason::StaleFence) => Err(error),
            // Whether the node still owns the slots is for the task to say.
            _ => Ok(()),
        }
    }
}

fn same(known: &MigrationSpec, asked: &MigrationSpec, id: &MigrationId) -> Result<(), Error> {
    match known.difference(asked) {
        None => Ok(()),
        Some(field) => {
            let text =
                format!("migration {id} exists with another {field}; choose a new ID for another migration");
            Err(Reason::SpecificationMismatch
                .error(text)
                .violation(format!("spec.{field}"), "differs from what the migration began with")
                .metadata("field", field))
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Calls<S: MigrationSource, D: Dial>(Arc<Inner<S, D>>);

impl<S: MigrationSource, D: Dial> Calls<S, D> {
    /// What was begun goes on when the caller hangs up.
    async fn owned<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let done = self.0.tasks.spawn(work).await;
        done.unwrap_or_else(|error| Err(Reason::Internal.error("the call panicked").caused_by(error)))
    }
}

#[tonic::async_trait]
impl<S: MigrationSource, D: Dial> SourceCalls for Calls<S, D> {
    async fn start(&self, request: StartMigrationRequest) -> Result<StartMigrationResponse, Error> {
        self.owned(Arc::clone(&self.0).start(request)).await
    }

    async fn complete(
        &self,
        id: &MigrationId,
        deadline_ms: u64,
        fence: Option<Fence>,
    ) -> Result<MigrationProgress, Error> {
        self.0.check_fence(id, fence).await?;
        let deadline = Duration::from_millis(deadline_ms);
        if let Some(answer) = self.0.ask(id, |reply| Command::Complete { deadline, reply }).await {
            return answer;
        }
        let known = self.0.ended_as(id)?;
        match known.state() {
            MigrationState::Completed => Ok(known),
            state => Err(calls::ended(state)),
        }
    }

    async fn cancel(
        &self,
        id: &MigrationId,
        reason: &str,
        fence: Option<Fence>,
    ) -> Result<MigrationProgress, Error> {
        self.0.check_fence(id, fence).await?;
        let asked = reason.to_owned();
        if let Some(answer) = self.0.ask(id, |reply| Command::Cancel { reason: asked, reply }).await {
            return answer;
        }
        let known = self.0.ended_as(id)?;
        match known.state() {
            MigrationState::Cancelled => Ok(known),
            MigrationState::Completed => Err(calls::already_committed()),
            state => Err(calls::ended(state)),
        }
    }

    async fn resolve(&self, id: &MigrationId, resolution: Resolution) -> Result<MigrationProgress, Error> {
        let decision = resolution.decision;
        if let Some(answer) = self.0.ask(id, |reply| Command::Resolve { resolution, reply }).await {
            return answer;
        }
        let known = self.0.ended_as(id)?;
        if known.resolved_reason.is_some() && known.decision() == decision {
            return Ok(known);
        }
        let text = format!("the migration has ended: it is {}", known.state().short_name());
        Err(calls::resolve_refused(&text, &known))
    }
}

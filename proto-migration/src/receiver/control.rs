//! What an operator asks of the target: cancel and resolve.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use proto_common::access::Caller;
use proto_common::error::Error;
use proto_common::fence::Fence;
use proto_common::ids::MigrationId;
use proto_common::text::hex;
use proto_common::v1::Direction;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Streaming};

use super::Inner;
use super::applier::already_committed;
use super::handshake::Frames;
use super::incoming::{Incoming, Slot, Stop, guarded};
use super::session::Answers;
use crate::Reason;
use crate::migrations::not_found;
use crate::service::{self, Resolution, TargetCalls, shutting_down};
use crate::target::{MigrationTarget, Offer};
use crate::v1::{MigrationDecision, MigrationProgress, MigrationState, TransferMigrationDataRequest};

/// Answers of one stream that may wait for the peer to read them.
const ANSWERS: usize = 32;

/// The target's half of the service.
pub(super) struct Calls<T: MigrationTarget>(pub(super) Arc<Inner<T>>);

#[tonic::async_trait]
impl<T: MigrationTarget> TargetCalls for Calls<T> {
    fn transfer(
        &self,
        request: Request<Streaming<TransferMigrationDataRequest>>,
        caller: Caller,
    ) -> Result<service::Answers, Error> {
        let inner = &self.0;
        if inner.stopping.is_cancelled() {
            return Err(shutting_down());
        }
        let (sender, answers) = mpsc::channel(ANSWERS);
        let answer = Answers { sender, patience: inner.idle() };
        // Not in the handler: its future is dropped when the peer disconnects, and what has begun must end in order.
        let frames = Frames::new(request, inner.limits.batch_bytes);
        inner.tasks.spawn(Arc::clone(inner).serve(frames, caller, answer));
        Ok(ReceiverStream::new(answers))
    }

    async fn cancel(
        &self,
        id: &MigrationId,
        reason: &str,
        fence: Option<Fence>,
    ) -> Result<MigrationProgress, Error> {
        let (inner, id, reason) = (Arc::clone(&self.0), id.clone(), reason.to_owned());
        owned(&self.0, async move { inner.cancel(&id, &reason, fence, false).await }).await
    }

    async fn resolve(&self, id: &MigrationId, resolution: Resolution) -> Result<MigrationProgress, Error> {
        let (inner, id) = (Arc::clone(&self.0), id.clone());
        owned(&self.0, async move { inner.resolve(&id, resolution).await }).await
    }
}

/// Runs what must end when it has begun, also when the caller hangs up.
async fn owned<T: MigrationTarget>(
    inner: &Inner<T>,
    work: impl Future<Output = Result<MigrationProgress, Error>> + Send + 'static,
) -> Result<MigrationProgress, Error> {
    if inner.stopping.is_cancelled() {
        return Err(shutting_down());
    }
    let done = inner.tasks.spawn(work).await;
    done.unwrap_or_else(|error| Err(Reason::Internal.error("the call panicked").caused_by(error)))
}

impl<T: MigrationTarget> Inner<T> {
    fn known(&self, id: &MigrationId) -> Option<Arc<Slot>> {
        self.slots().get(id).cloned()
    }

    fn pending(slot: &Slot) -> Result<(), Error> {
        if slot.is_committing() {
            return Err(Reason::OutcomePending.error("the commit is under way; ask again"));
        }
        Ok(())
    }

    async fn cancel(
        &self,
        id: &MigrationId,
        reason: &str,
        fence: Option<Fence>,
        operator: bool,
    ) -> Result<MigrationProgress, Error> {
        let Some(slot) = self.known(id) else { return self.ended(id) };
        Self::pending(&slot)?;
        let _attach = slot.attach.lock().await;
        Self::pending(&slot)?;
        let mut state = slot.state.lock().await;
        self.settle(&slot, &mut state).await?;
        let Some(incoming) = state.as_mut() else { return self.ended(id) };
        if let Some(fence) = fence {
            self.check_fence(id, incoming, fence).await?;
        }
        self.cancel_here(&slot, incoming, reason, operator).await?;
        Ok(incoming.record.progress.clone())
    }

    /// Cancels what is not committed, for a caller that holds the migration.
    pub(super) async fn cancel_here(
        &self,
        slot: &Slot,
        incoming: &mut Incoming,
        reason: &str,
        operator: bool,
    ) -> Result<(), Error> {
        match incoming.state() {
            MigrationState::Cancelled => return Ok(()),
            MigrationState::Receiving => {}
            MigrationState::Prepared => {
                if !self.abort_prepared(slot, incoming).await? {
                    return Err(already_committed(incoming));
                }
            }
            _ => return Err(already_committed(incoming)),
        }
        let discarded = self.discard(slot, incoming, reason, &self.identity.node_id, operator).await?;
        slot.tell(Stop::Discarded(discarded));
        Ok(())
    }

    /// A migration without a record: what the history says of it.
    fn ended(&self, id: &MigrationId) -> Result<MigrationProgress, Error> {
        let ended = self.migrations.get(Some(Direction::In), id)?;
        match ended.state() {
            MigrationState::Cancelled => Ok(ended),
            MigrationState::Completed => {
                Err(Reason::AlreadyCommitted.error("the migration is committed; this node owns the slots"))
            }
            other => Err(has_ended(other)),
        }
    }

    /// Only the store knows the fence of its shard; for what else it may refuse, a cancel does not care.
    async fn check_fence(&self, id: &MigrationId, incoming: &Incoming, fence: Fence) -> Result<(), Error> {
        let offer = Offer { id, spec: &incoming.record.spec, fence: Some(fence), missing_bytes: Some(0) };
        match guarded(async { self.target.admit(&offer).await }).await {
            Err(error) if error.is(Reason::StaleFence) => Err(error),
            _ => Ok(()),
        }
    }

    async fn resolve(&self, id: &MigrationId, resolution: Resolution) -> Result<MigrationProgress, Error> {
        let Resolution { decision, attempt, peer_store_id, reason } = resolution;
        let same = |progress: &MigrationProgress| {
            progress.decision() == decision
                && (progress.resolved_reason.is_some() || decision == MigrationDecision::Discarded)
        };
        let Some(slot) = self.known(id) else {
            let ended = self.migrations.get(Some(Direction::In), id).map_err(|_| not_found(id))?;
            return if same(&ended) { Ok(ended) } else { Err(has_ended(ended.state())) };
        };
        Self::pending(&slot)?;
        let _attach = slot.attach.lock().await;
        Self::pending(&slot)?;
        let mut state = slot.state.lock().await;
        self.settle(&slot, &mut state).await?;
        let Some(incoming) = state.as_mut() else {
            let ended = self.migrations.get(Some(Direction::In), id)?;
            return if same(&ended) { Ok(ended) } else { Err(has_ended(ended.state())) };
        };
        let progress = &incoming.record.progress;
        if same(progress) {
            return Ok(progress.clone());
        }
        let confirmed =
            incoming.state() == MigrationState::Committed && decision == MigrationDecision::Committed;
        let (present, peer) = (progress.attempt, progress.peer.clone().unwrap_or_default().store_id);
        let problem = if incoming.state() != MigrationState::Prepared && !confirmed {
            Some(format!("the migration is {}, not PREPARED", incoming.state().short_name()))
        } else if attempt != present {
            Some(format!("the attempt is {present}, not {attempt}"))
        } else if peer_store_id != peer {
            Some(format!("the store of the source is {}, not {}", hex(&peer), hex(&peer_store_id)))
        } else {
            None
        };
        let refusal = |problem: &str, state: MigrationState| {
            Reason::ResolveRefused
                .error(format!("{problem}; look at its progress again"))
                .metadata("state", state.short_name())
                .metadata("attempt", present.to_string())
                .metadata("store_id", hex(&peer))
        };
        if let Some(problem) = problem {
            return Err(refusal(&problem, incoming.state()));
        }
        if confirmed {
            // The source is gone, and nobody else would say that it knows.
            incoming.record.progress.resolved_reason = Some(reason);
            self.forget(&slot, &mut state).await?;
            return self.migrations.get(Some(Direction::In), id);
        }
        if decision == MigrationDecision::Discarded {
            self.cancel_here(&slot, incoming, &reason, true).await?;
        } else {
            match self.commit(&slot, incoming, Some(&reason)).await {
                Err(error) if error.is(Reason::StaleSlotEpoch) => {
                    let problem = format!("the slots have another owner by now: {}", error.message());
                    return Err(refusal(&problem, incoming.state()));
                }
                committed => committed?,
            };
            slot.tell(Stop::Error(
                Reason::StaleAttempt
                    .error("an operator decided to commit; open the next stream to learn of it")
                    .metadata("attempt", attempt.to_string()),
            ));
        }
        Ok(incoming.record.progress.clone())
    }

    pub(super) fn refuse_new(&self) {
        self.draining.store(true, Ordering::Release);
    }
}

fn has_ended(state: MigrationState) -> Error {
    Reason::MigrationEnded
        .error(format!("the migration has ended: {}", state.short_name()))
        .metadata("state", state.short_name())
}

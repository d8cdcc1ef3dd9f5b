//! What callers ask of a migration that runs: to join, complete, cancel or decide it.

use std::time::Duration;

use proto_common::clock::now_unix_ms;
use proto_common::error::Error;
use proto_common::slots::RECLAIM_STEP;
use proto_common::text::hex;
use proto_common::v1::Priority;
use tokio::sync::oneshot;

use super::dial::Dial;
use super::task::{Halt, Task};
use crate::Reason;
use crate::journal::SourceRecord;
use crate::limits::TaskLimits;
use crate::service::{Resolution, shutting_down};
use crate::source::MigrationSource;
use crate::v1::transfer_migration_data_response::Committed;
use crate::v1::{FreezeOutcome, MigrationDecision, MigrationGate, MigrationProgress, MigrationState};

/// What a caller asks of a task that runs.
#[derive(Debug)]
pub(super) enum Command {
    Join { limits: TaskLimits, priority: Priority, address: String, reply: Reply },
    Complete { deadline: Duration, reply: Reply },
    Cancel { reason: String, reply: Reply },
    Resolve { resolution: Resolution, reply: Reply },
}

pub(super) type Reply = oneshot::Sender<Result<MigrationProgress, Error>>;

impl<S: MigrationSource, D: Dial> Task<S, D> {
    /// Answers a caller. `Changed` if the migration is in another state now.
    pub(super) async fn command(&mut self, command: Command) -> Result<(), Halt> {
        let (reply, answer, halt) = match command {
            Command::Join { limits, priority, address, reply } => {
                self.limits = limits;
                let progress = self.change();
                progress.limits = Some(limits.into());
                progress.set_priority(priority);
                progress.target_address = address;
                self.limit_rate();
                let saved = self.save().await;
                (reply, Ok(()), saved)
            }
            Command::Complete { deadline, reply } => {
                let (answer, halt) = self.complete_wanted(deadline).await;
                (reply, answer, halt)
            }
            Command::Cancel { reason, reply } => {
                let (answer, halt) = self.cancel_wanted(&reason).await;
                (reply, answer, halt)
            }
            Command::Resolve { resolution, reply } => {
                let (answer, halt) = self.resolved(resolution).await;
                (reply, answer, halt)
            }
        };
        let answer = match halt {
            Err(Halt::Stopping) => Err(shutting_down()),
            _ => answer.map(|()| self.shown().clone()),
        };
        // A caller that hung up asks again.
        let _ = reply.send(answer);
        halt
    }

    async fn complete_wanted(&mut self, deadline: Duration) -> (Result<(), Error>, Result<(), Halt>) {
        let state = self.state();
        match state {
            MigrationState::CatchingUp | MigrationState::Ready => {
                let until = now_unix_ms().saturating_add(proto_common::clock::millis(deadline));
                self.change().complete_deadline_unix_ms = Some(until);
                (Ok(()), self.save().await)
            }
            MigrationState::Freezing => {
                // Writes don't wait for it to be saved: the end of the freeze is.
                let until = now_unix_ms().saturating_add(proto_common::clock::millis(deadline));
                let wanted = &mut self.change().complete_deadline_unix_ms;
                *wanted = (*wanted).max(Some(until));
                (Ok(()), Ok(()))
            }
            MigrationState::Committing | MigrationState::Completed => (Ok(()), Ok(())),
            MigrationState::Pending | MigrationState::Copying => {
                let error = Reason::NotReady
                    .error(format!("the rows are not copied yet ({}); ask again", state.short_name()))
                    .metadata("state", state.as_str_name());
                (Err(error), Ok(()))
            }
            _ => (Err(ended(state)), Ok(())),
        }
    }

    async fn cancel_wanted(&mut self, reason: &str) -> (Result<(), Error>, Result<(), Halt>) {
        let state = self.state();
        let refusal = match state {
            MigrationState::Cancelling | MigrationState::Cancelled => return (Ok(()), Ok(())),
            MigrationState::Committing => Reason::OutcomePending
                .error("the commit is under way and its outcome is being found out; ask again"),
            MigrationState::Completed => already_committed(),
            MigrationState::Failed => ended(state),
            MigrationState::NeedsOperator => resolve_refused(
                "the outcome of this migration cannot be found out; decide it with ResolveMigration",
                self.shown(),
            ),
            _ => {
                let me = self.inner.identity.node_id.clone();
                let accepted = self.shown().peer.is_some();
                let progress = self.change();
                reason.clone_into(&mut progress.cancel_reason);
                progress.cancelled_at_node_id = me;
                self.end_freeze(FreezeOutcome::Cancelled, None);
                let done = if accepted {
                    let entered = self.enter(MigrationState::Cancelling, MigrationGate::Open).await;
                    if entered.is_ok() {
                        self.open_gate();
                    }
                    entered
                } else {
                    self.record.untold = self.may_be_known();
                    self.discarded("").await
                };
                return match done {
                    Ok(()) => (Ok(()), Err(Halt::Changed)),
                    Err(halt) => (Err(shutting_down()), Err(halt)),
                };
            }
        };
        (Err(refusal.metadata("state", state.as_str_name())), Ok(()))
    }

    /// An operator decides.
    async fn resolved(&mut self, resolution: Resolution) -> (Result<(), Error>, Result<(), Halt>) {
        let Resolution { decision, attempt, peer_store_id, reason } = resolution;
        let shown = self.shown();
        let state = shown.state();
        if shown.resolved_reason.is_some() && shown.decision() == decision {
            return (Ok(()), Ok(()));
        }
        let peer = shown.peer.as_ref().map(|peer| peer.store_id.clone()).unwrap_or_default();
        let refusal = match state {
            _ if shown.resolved_reason.is_some() => Some("an operator has decided otherwise".to_owned()),
            MigrationState::Committing | MigrationState::Cancelling | MigrationState::NeedsOperator => {
                if attempt != shown.attempt {
                    Some(format!("attempt {attempt} is not the present one, {}; look again", shown.attempt))
                } else if peer_store_id != peer {
                    Some("the peer's store is another one than the one vouched for; look again".to_owned())
                } else {
                    None
                }
            }
            _ => Some(format!("nothing is to be decided in {}", state.short_name())),
        };
        if let Some(refusal) = refusal {
            return (Err(resolve_refused(&refusal, shown)), Ok(()));
        }
        tracing::warn!(migration_id = %self.id, decision = decision.as_str_name(), reason, "an operator decided");
        self.change().resolved_reason = Some(reason);
        let halt = if decision == MigrationDecision::Committed {
            // Before the slots are given up: a process that knew nothing of it would ask the target, which then could not commit any more what
            // only it has.
            self.change().set_decision(decision);
            match self.save().await {
                Ok(()) => self.give_away().await,
                Err(halt) => Err(halt),
            }
        } else {
            self.take_back().await
        };
        match halt {
            Ok(()) => (Ok(()), Err(Halt::Changed)),
            Err(halt) => (Err(shutting_down()), Err(halt)),
        }
    }

    /// The operator's COMMITTED: the target owns the slots, whatever it knows of that.
    pub(super) async fn give_away(&mut self) -> Result<(), Halt> {
        let committed = Committed {
            attempt: self.shown().attempt,
            slot_epoch: self.new_slot_epoch(),
            resolved_by_operator: true,
            ..Committed::default()
        };
        self.hand_over(&committed).await
    }

    /// The operator's DISCARDED: this node serves, at an epoch that neither the lost target nor whoever has the slots from it can have.
    async fn take_back(&mut self) -> Result<(), Halt> {
        let epoch = self.shown().slot_epoch.saturating_add(RECLAIM_STEP);
        self.record.claim_epoch = epoch;
        self.record.untold = true;
        self.save().await?;
        self.claim_back().await
    }

    /// Carries out that an operator took the slots back, once it is saved.
    pub(super) async fn claim_back(&mut self) -> Result<(), Halt> {
        let epoch = self.record.claim_epoch;
        self.keep(Some(epoch)).await?;
        let progress = self.change();
        progress.set_decision(MigrationDecision::Discarded);
        progress.slot_epoch = epoch;
        self.end_freeze(FreezeOutcome::Fenced, None);
        self.enter(MigrationState::Cancelled, MigrationGate::Open).await?;
        self.open_gate();
        Ok(())
    }
}

/// Whether an operator took the slots back, and that is not carried out yet.
pub(super) fn taken_back(record: &SourceRecord) -> bool {
    let state = record.progress.as_ref().map(MigrationProgress::state).unwrap_or_default();
    record.claim_epoch > 0 && state != MigrationState::Cancelled
}

/// Whether an operator decided COMMITTED, and the slots are not given up yet.
pub(super) fn given_away(progress: &MigrationProgress) -> bool {
    progress.decision() == MigrationDecision::Committed
        && progress.resolved_reason.is_some()
        && !progress.state().is_final()
}

pub(super) fn ended(state: MigrationState) -> Error {
    Reason::MigrationEnded
        .error(format!("the migration has ended: it is {}", state.short_name()))
        .metadata("state", state.as_str_name())
}

pub(super) fn already_committed() -> Error {
    Reason::AlreadyCommitted
        .error("the target owns the slots; migrate them back instead")
        .metadata("state", MigrationState::Completed.as_str_name())
}

pub(super) fn resolve_refused(why: &str, shown: &MigrationProgress) -> Error {
    let store = shown.peer.as_ref().map(|peer| hex(&peer.store_id)).unwrap_or_default();
    Reason::ResolveRefused
        .error(why)
        .metadata("state", shown.state().as_str_name())
        .metadata("attempt", shown.attempt.to_string())
        .metadata("store_id", store)
}

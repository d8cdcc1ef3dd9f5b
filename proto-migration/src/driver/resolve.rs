//! Finding out the outcome, and telling the end: streams that carry no data.
//!
//! | state | COMMITTED | UNDECIDED | DISCARDED | not known |
//! |---|---|---|---|---|
//! | COMMITTING | COMPLETED | known: no attempt commits any more, CATCHING_UP | CANCELLED | NEEDS_OPERATOR |
//! | CANCELLING | an operator decided so at the target: COMPLETED | `Discard` | CANCELLED or FAILED | likewise |
//! | COMPLETED | `Forget` | an operator decided here, and has to there: looked at again later, in no stream | likewise | forgotten |
//! | CANCELLED by an operator | `Forget`: its claim is the lower one | `Discard` | told | told |

use std::time::Duration;

use proto_common::error::Error;
use proto_common::v1::Direction;
use tokio::time::timeout;

use super::dial::Dial;
use super::link::{Link, Said, unexpected};
use super::open::{OUTCOME_TIMEOUT, silent};
use super::task::{Halt, Task};
use crate::Reason;
use crate::limits::MAX_ANSWER_BYTES;
use crate::source::MigrationSource;
use crate::v1::migration_service_client::MigrationServiceClient;
use crate::v1::transfer_migration_data_request::{Discard, Forget, Frame, Purpose};
use crate::v1::{
    FreezeOutcome, GetMigrationProgressRequest, MigrationDecision, MigrationGate, MigrationState,
};

/// How long the target may take to forget.
const FORGET_TIMEOUT: Duration = Duration::from_secs(5);

impl<S: MigrationSource, D: Dial> Task<S, D> {
    /// One stream that asks for the outcome, or tells it. `Ok` when the target knows the end.
    pub(super) async fn resolve(&mut self) -> Result<(), Halt> {
        if self.state() == MigrationState::Completed && self.shown().resolved_reason.is_some() {
            self.leave_prepared().await?;
        }
        if self.state() == MigrationState::Cancelling {
            // Whatever comes of it, no more changes are sent, and the target may be away for long.
            self.keep(None).await?;
        }
        let mut link = self.open(Purpose::Resolve).await?;
        self.backoff.reset();
        let accepted = link.accepted.clone();
        match (self.state(), accepted.decision()) {
            (_, MigrationDecision::Unspecified) => {
                Err(unexpected("the target told no decision that this version knows").into())
            }
            (MigrationState::Completed, MigrationDecision::Committed) => self.forget(link).await,
            (MigrationState::Completed, _) if !accepted.known => self.told(),
            (MigrationState::Completed, _) => Err(undecided_there().into()),
            (MigrationState::Cancelled | MigrationState::Failed, MigrationDecision::Committed) => {
                self.forget(link).await
            }
            (MigrationState::Cancelled | MigrationState::Failed, MigrationDecision::Undecided)
                if accepted.known =>
            {
                self.discard(&mut link).await?;
                self.told()
            }
            (MigrationState::Cancelled | MigrationState::Failed, _) => self.told(),

            (_, MigrationDecision::Committed) => {
                let committed = accepted.committed.unwrap_or_default();
                self.hand_over(&committed).await?;
                self.forget(link).await
            }
            (_, MigrationDecision::Discarded) => {
                let reason = accepted.discarded.unwrap_or_default().reason;
                self.discarded(&reason).await.and(Err(Halt::Changed))
            }
            (MigrationState::Cancelling, MigrationDecision::Undecided) => {
                let reason = if accepted.known { self.discard(&mut link).await? } else { String::new() };
                self.discarded(&reason).await.and(Err(Halt::Changed))
            }
            (_, MigrationDecision::Undecided) if accepted.known => {
                if let Err(error) = self.check_owner() {
                    // Whatever the target has may be the only copy.
                    return self.needs_operator(&error).await.and(Err(Halt::Changed));
                }
                let error = Reason::StreamEndedEarly.error(
                    "the stream broke before the commit; the target's fence proves that it did not commit",
                );
                self.end_freeze(FreezeOutcome::Fenced, Some(&error));
                self.enter(MigrationState::CatchingUp, MigrationGate::Open).await?;
                self.open_gate();
                Err(Halt::Changed)
            }
            (_, MigrationDecision::Undecided) => {
                let error = Reason::OutcomeLost.error(
                    "the target has no record of an attempt that was prepared; whether it committed cannot be found out: \
                     look at the target, then decide with ResolveMigration",
                );
                self.needs_operator(&error).await.and(Err(Halt::Changed))
            }
        }
    }

    /// Looks before it tells that an operator decided COMMITTED here: a stream would fence a target that is prepared, and an operator
    /// there could not commit any more what only that target has.
    async fn leave_prepared(&mut self) -> Result<(), Halt> {
        let channel = self.dial(OUTCOME_TIMEOUT).await?;
        let mut client = MigrationServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
        let asked = GetMigrationProgressRequest {
            migration_id: self.id.to_string(),
            direction: Direction::In.into(),
        };
        let asking = timeout(OUTCOME_TIMEOUT, async move { client.get_migration_progress(asked).await });
        let answer = self.meanwhile(asking).await?.map_err(|_| silent())?;
        let found = match answer.map_err(Error::from) {
            Ok(answer) => answer.into_inner().migration.unwrap_or_default(),
            Err(error) if error.is(Reason::MigrationNotFound) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if matches!(found.state(), MigrationState::Receiving | MigrationState::Prepared) {
            return Err(undecided_there().into());
        }
        Ok(())
    }

    /// Says that the record of the commit is not needed any more.
    pub(super) async fn forget(&mut self, mut link: Link) -> Result<(), Halt> {
        let forgotten = timeout(FORGET_TIMEOUT, async {
            link.outbound().send(Frame::Forget(Forget {})).await?;
            loop {
                match link.next().await {
                    Ok(Said::Forgotten) => return Ok(()),
                    // What was under way before.
                    Ok(_) => {}
                    Err(error) => return Err(error),
                }
            }
        });
        self.meanwhile(forgotten)
            .await?
            .unwrap_or_else(|_| Err(unexpected("the target does not say that it forgot")))?;
        self.told()
    }

    async fn discard(&mut self, link: &mut Link) -> Result<String, Halt> {
        let shown = self.shown();
        let reason = match shown.resolved_reason.as_ref().unwrap_or(&shown.cancel_reason) {
            reason if reason.is_empty() => shown
                .progress
                .as_ref()
                .and_then(|p| p.error.as_ref())
                .map_or(String::new(), |e| e.reason.clone()),
            reason => reason.clone(),
        };
        let answered = timeout(link.idle, async {
            link.outbound().send(Frame::Discard(Discard { reason })).await?;
            loop {
                match link.next().await {
                    Ok(Said::Discarded(discarded)) => return Ok::<_, Error>(discarded.reason),
                    Ok(_) => {}
                    Err(error) => return Err(error),
                }
            }
        });
        let answered = self.meanwhile(answered).await?;
        Ok(answered.unwrap_or_else(|_| Err(unexpected("the target does not say that it discarded")))?)
    }

    /// The target knows the end, or nothing that it would have to be told. Not saved: after a crash it is told again, which does no harm.
    pub(super) fn told(&mut self) -> Result<(), Halt> {
        self.record.untold = false;
        Ok(())
    }
}

/// Only an operator's word can lead here; the other node waits for one, too.
fn undecided_there() -> Error {
    let text = "this node gave the slots up by an operator's decision; decide so at the target, too";
    Reason::OutcomePending.error(text)
}

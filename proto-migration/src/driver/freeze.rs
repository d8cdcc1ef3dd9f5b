//! The cut-over: writes wait, the last changes go, the target verifies, and the slots change hands.
//!
//! Up to `Prepared` all of it is bounded by the freeze timeout and lives in memory; whatever goes wrong, writes go on and nothing is lost. From
//! the moment that COMMITTING is saved, only evidence ends it.

use std::sync::Arc;
use std::time::Duration;

use proto_common::clock::millis;
use proto_common::error::Error;
use tokio::time::{Instant, interval, timeout_at};

use super::approach::Slowed;
use super::calls::Command;
use super::dial::Dial;
use super::link::{Outbound, Said, unexpected};
use super::pump::Wish;
use super::task::{Halt, Task};
use super::transfer::Running;
use crate::Reason;
use crate::digest::{SUM_BYTES, SlotDigest, to_wire};
use crate::failpoint::reached;
use crate::hold::{Hold, HoldMode};
use crate::source::MigrationSource;
use crate::v1::transfer_migration_data_request::{Commit, Frame, Prepare, Release};
use crate::v1::transfer_migration_data_response::Committed;
use crate::v1::{FreezeOutcome, MigrationGate, MigrationState, SlotMismatch};

/// Signs of life while requests wait for the target.
const HEARTBEAT: Duration = Duration::from_millis(500);

/// Silence after which the outcome of a commit is asked for over another connection: reads and writes wait for it, and a connection that
/// swallows what is sent shows in no other way. Four heartbeats, each of which the target answers at once, whatever its store does. A target
/// that takes nothing for as long is given up, too, where the end of a freeze has to be told to it.
const COMMIT_SILENCE: Duration = Duration::from_secs(2);

/// How a freeze ended before the commit was decided.
enum GivenUp {
    TimedOut,
    Refused(Error, Option<SlotMismatch>),
    Interrupted(Error),
    /// A caller asked to cancel.
    Asked(Command),
    /// Somebody cancelled at the target, and said why.
    Discarded(String),
}

impl From<Error> for GivenUp {
    fn from(error: Error) -> Self {
        Self::Interrupted(error)
    }
}

/// The way to `Prepared`: what it took, and how far it went.
#[derive(Default)]
struct Way {
    drained: Duration,
    flushed: Duration,
    prepared: Duration,
    final_seq: u64,
    /// The target was asked to prepare, and has to be told when it is not wanted any more.
    asked: bool,
}

impl<S: MigrationSource, D: Dial> Task<S, D> {
    /// Tries to cut over. True when the slots are handed over; false when writes go on.
    pub(super) async fn freeze(&mut self, running: &mut Running) -> Result<bool, Halt> {
        let done = self.try_freeze(running).await;
        for command in std::mem::take(&mut self.later) {
            if !matches!(done, Err(Halt::Stopping)) {
                self.command(command).await?;
            }
        }
        done
    }

    async fn try_freeze(&mut self, running: &mut Running) -> Result<bool, Halt> {
        let slowed = self.come_close(running).await?;
        let number = self.begin_freeze();
        // Its number is not used again, whatever crashes.
        slowed.during(self.save()).await?;
        let began = Instant::now();
        let deadline = began + self.limits.freeze_timeout.min(self.wanted_within());
        let progress = self.change();
        progress.enter(MigrationState::Freezing);
        progress.set_gate(MigrationGate::WritesHeld);
        if let Some(freeze) = progress.freezes.last_mut() {
            freeze.started_unix_ms = proto_common::clock::now_unix_ms();
        }
        self.show();

        let mut way = Way::default();
        let prepared = self.prepare(running, number, slowed, deadline, &mut way).await;
        let writers_slowed_ms = self.writers_slowed_ms();
        self.change().writers_slowed_ms = writers_slowed_ms;
        if let Some(freeze) = self.change().freezes.last_mut() {
            freeze.drain_ms = millis(way.drained);
            freeze.flush_ms = millis(way.flushed);
            freeze.prepare_ms = millis(way.prepared);
            freeze.final_seq = way.final_seq;
        }
        let writes = match prepared? {
            Ok(hold) => hold,
            Err(given_up) => {
                let release = way.asked.then_some(Release { freeze: number });
                return self
                    .give_up_freeze(running, release, given_up, deadline - began)
                    .await
                    .map(|()| false);
            }
        };
        match self.commit(running, number, writes, deadline).await? {
            Ok(()) => Ok(true),
            Err(given_up) => {
                let release = Some(Release { freeze: number });
                self.give_up_freeze(running, release, given_up, deadline - began).await.map(|()| false)
            }
        }
    }

    /// Up to `Prepared`; returns the hold of the writes.
    async fn prepare(
        &mut self,
        running: &mut Running,
        number: u64,
        slowed: Slowed,
        deadline: Instant,
        way: &mut Way,
    ) -> Result<Result<Hold, GivenUp>, Halt> {
        let (source, id, slots) = (Arc::clone(&self.inner.source), self.id.clone(), self.spec.slots);
        let new_slot_epoch = self.new_slot_epoch();
        let alive = running.out.clone();
        let Running { link, out, wish, sent, log, .. } = running;
        let steps = async {
            let began = Instant::now();
            let hold = source.hold(slots, HoldMode::Writes).await?;
            drop(slowed);
            way.drained = began.elapsed();
            let goal = log.borrow().head_seq;
            wish.send_replace(Wish::Flush(goal));
            let final_seq = sent
                .wait_for(|sent| sent.flushed >= Some(goal))
                .await
                .map_err(|_| super::link::broken())?
                .watermark;
            way.final_seq = final_seq;
            let digests = source.digests(&id).await?;
            let prepare = prepare_frame(number, final_seq, new_slot_epoch, &digests);
            out.send(Frame::Prepare(prepare)).await?;
            way.asked = true;
            way.flushed = began.elapsed().saturating_sub(way.drained);
            loop {
                match link.next().await? {
                    Said::Prepared(prepared) if prepared.freeze == number => {
                        if prepared.final_seq != final_seq {
                            return Err(unexpected("the target prepared another sequence").into());
                        }
                        break;
                    }
                    Said::Refused(refused) if refused.freeze == number => {
                        let error = Error::from(refused.error.unwrap_or_default());
                        return Err(GivenUp::Refused(error, refused.mismatch));
                    }
                    // Of an earlier freeze.
                    Said::Prepared(_) | Said::Refused(_) => {}
                    Said::Discarded(discarded) => return Err(GivenUp::Discarded(discarded.reason)),
                    Said::Committed(_) | Said::Forgotten => {
                        return Err(unexpected("the target answered what it was not asked").into());
                    }
                }
            }
            way.prepared = began.elapsed().saturating_sub(way.drained + way.flushed);
            Ok(hold)
        };
        self.while_held(&alive, deadline, steps).await
    }

    /// Does `steps` with clients held for them, until `deadline` at most. Nothing that callers ask is saved meanwhile: a disk that takes nothing would
    /// keep clients waiting for as long.
    async fn while_held<T>(
        &mut self,
        alive: &Outbound,
        deadline: Instant,
        steps: impl Future<Output = Result<T, GivenUp>>,
    ) -> Result<Result<T, GivenUp>, Halt> {
        let stopping = self.inner.stopping.clone();
        let mut beat = interval(HEARTBEAT);
        let mut steps = std::pin::pin!(timeout_at(deadline, steps));
        loop {
            tokio::select! {
                biased;
                () = stopping.cancelled() => return Err(Halt::Stopping),
                command = self.commands.recv() => match command {
                    None => return Err(Halt::Stopping),
                    Some(command @ Command::Cancel { .. }) => return Ok(Err(GivenUp::Asked(command))),
                    Some(command @ Command::Join { .. }) => self.later.push(command),
                    // Neither ends a freeze, nor changes anything in it, nor is saved.
                    Some(command @ (Command::Complete { .. } | Command::Resolve { .. })) => {
                        self.command(command).await?;
                    }
                },
                _ = beat.tick() => {
                    alive.offer(Frame::Heartbeat(self.heartbeat()));
                }
                done = &mut steps => return Ok(done.unwrap_or(Err(GivenUp::TimedOut))),
            }
        }
    }

    /// From `Prepared` on. `Err` inside only as long as nothing was sent that could commit.
    async fn commit(
        &mut self,
        running: &mut Running,
        number: u64,
        writes: Hold,
        deadline: Instant,
    ) -> Result<Result<(), GivenUp>, Halt> {
        let began = Instant::now();
        let (source, slots) = (Arc::clone(&self.inner.source), self.spec.slots);
        let closing = async move { Ok(source.hold(slots, HoldMode::All).await?) };
        let all = match self.while_held(&running.out, deadline, closing).await? {
            Ok(hold) => hold,
            Err(given_up) => return Ok(Err(given_up)),
        };
        if let Err(error) = self.check_owner() {
            return Ok(Err(GivenUp::Refused(error, None)));
        }
        // A cancel and the commit race for this point: commands are not looked at until it is saved.
        let progress = self.change();
        progress.enter(MigrationState::Committing);
        progress.set_gate(MigrationGate::Closed);
        if let Err(error) = self.inner.journal.save(&self.id, self.spec.slots, &self.record).await {
            // It may be saved or not; nothing was sent, so after a crash the target's fence tells.
            return Ok(Err(error.into()));
        }
        self.hold = Some(all);
        if let Some(freeze) = self.change().freezes.last_mut() {
            freeze.held_requests = writes.held_requests();
        }
        drop(writes);
        self.show();
        let new_slot_epoch = self.new_slot_epoch();
        reached("commit.before", self.state());
        let (out, commit) = (running.out.clone(), Frame::Commit(Commit { freeze: number, new_slot_epoch }));
        self.meanwhile(async move { out.send_within(COMMIT_SILENCE, commit).await }).await??;
        reached("commit.after", self.state());
        let committed = self.committed(running).await?;
        if let Some(freeze) = self.change().freezes.last_mut() {
            freeze.commit_ms = millis(began.elapsed());
        }
        self.hand_over(&committed).await?;
        Ok(Ok(()))
    }

    /// Waits for the answer to `Commit`, as long as the target shows that it is alive.
    async fn committed(&mut self, running: &mut Running) -> Result<Committed, Halt> {
        let (out, heartbeat) = (running.out.clone(), Frame::Heartbeat(self.heartbeat()));
        let mut beating = std::pin::pin!(async move {
            let mut beat = interval(HEARTBEAT);
            loop {
                beat.tick().await;
                out.offer(heartbeat.clone());
            }
        });
        loop {
            let answer = async {
                tokio::select! {
                    said = running.link.next_within(COMMIT_SILENCE) => said,
                    never = &mut beating => never,
                }
            };
            match self.meanwhile(answer).await?? {
                Said::Committed(committed) => return Ok(committed),
                Said::Discarded(discarded) => self.heard(Said::Discarded(discarded)).await?,
                Said::Prepared(_) | Said::Refused(_) => {}
                Said::Forgotten => return Err(unexpected("the target forgot what it was not told to").into()),
            }
        }
    }

    /// Writes go on. The target is told if it has to be, and the next try comes later. `patience` is how long the freeze might have lasted.
    async fn give_up_freeze(
        &mut self,
        running: &mut Running,
        release: Option<Release>,
        given_up: GivenUp,
        patience: Duration,
    ) -> Result<(), Halt> {
        self.open_gate();
        let timeout_error = || {
            let text = format!(
                "the target was not prepared within {} ms; writes go on and the freeze is tried again",
                patience.as_millis()
            );
            Reason::FreezeTimeout.error(text)
        };
        let (outcome, error, then) = match given_up {
            GivenUp::TimedOut => (FreezeOutcome::TimedOut, timeout_error(), None),
            GivenUp::Refused(error, mismatch) => {
                self.change().mismatch = mismatch.filter(is_one);
                (FreezeOutcome::Refused, error, None)
            }
            GivenUp::Interrupted(error) => (FreezeOutcome::Interrupted, error.clone(), Some(Ok(error))),
            GivenUp::Discarded(reason) => {
                self.discarded(&reason).await?;
                return Err(Halt::Changed);
            }
            GivenUp::Asked(command) => (
                FreezeOutcome::Cancelled,
                Reason::MigrationCancelled.error("a caller ended the freeze"),
                Some(Err(command)),
            ),
        };
        self.end_freeze(outcome, Some(&error));
        self.change().incident(&error);
        if outcome == FreezeOutcome::Refused && (error.is(Reason::DigestMismatch) || !error.is_retryable()) {
            self.fail(&error).await?;
            return Err(Halt::Changed);
        }
        // Ahead of all that the pump sends from now on: until then, the target takes no changes.
        let released = match (release, &then) {
            (Some(release), None) => {
                let out = running.out.clone();
                let release = Frame::Release(release);
                self.meanwhile(async move { out.send_within(COMMIT_SILENCE, release).await }).await?
            }
            _ => Ok(()),
        };
        running.wish.send_replace(Wish::Run);
        self.enter(MigrationState::CatchingUp, MigrationGate::Open).await?;
        released?;
        let retryable = if error.is_retryable() { error } else { timeout_error() };
        let wait = self.freeze_backoff.next(&retryable).unwrap_or(Duration::from_secs(5));
        self.freeze_after = Instant::now() + wait;
        match then {
            None => Ok(()),
            Some(Ok(error)) => Err(Halt::Failed(error)),
            Some(Err(command)) => self.command(command).await,
        }
    }
}

fn prepare_frame(freeze: u64, final_seq: u64, new_slot_epoch: u64, digests: &[SlotDigest]) -> Prepare {
    Prepare {
        freeze,
        final_seq,
        new_slot_epoch,
        keys: digests.iter().fold(0, |keys, digest| digest.keys.saturating_add(keys)),
        digests: Some(to_wire(digests)),
    }
}

/// Whether a difference that the target told is kept: a digest has 16 bytes, and what has more is something else.
fn is_one(mismatch: &SlotMismatch) -> bool {
    let SlotMismatch { slot: _, source, target, slots_differing: _ } = mismatch;
    [source, target].into_iter().flatten().all(|digest| digest.sum.len() == SUM_BYTES)
}

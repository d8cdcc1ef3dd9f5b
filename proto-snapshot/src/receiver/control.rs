//! The life of one call of `TransferSplitSnapshot`, from its first frame to its last.

use std::sync::Arc;

use proto_common::access::Caller;
use proto_common::clock::{millis, now_unix_ms};
use proto_common::error::Error;
use proto_common::ids::TransferId;
use proto_common::v1::Direction;
use tokio::sync::{MutexGuard, watch};
use tokio_util::sync::CancellationToken;

use super::admission::Charge;
use super::completion::shutting_down;
use super::handshake::{CheckedLane, ControlHeader, Frames, ended_early, unexpected};
use super::identity::{check_same, check_same_shown, check_same_spec, initial_progress};
use super::incoming::{Incoming, Outcome, Stage, StreamPermit, Takeover, cancelled, replaced};
use super::ledger::Listing;
use super::session::{Answers, Lanes, Session, accept, told_to_stop};
use super::{Inner, Slot};
use crate::extent::{Extent, ExtentRecord};
use crate::reason::Reason;
use crate::spec::{FEATURES, Manifest, TransferPlan, TransferSpec};
use crate::store::{ShardState, SnapshotStore, Staging, StoreError};
use crate::v1::TransferPhase;
use crate::v1::transfer_split_snapshot_request::Frame;
use crate::v1::transfer_split_snapshot_response::{Accepted, Ack, Frame as Answer, Installed};

/// What a control stream finds when it attaches.
enum Attached<A: Staging> {
    /// It may send what is missing.
    Writer(StreamPermit<A>),
    /// All is there; the outcome is awaited.
    Completing(Arc<Incoming<A>>),
    /// It was installed before.
    Done(Installed),
}

/// What is left of a transfer whose streams were ended for another.
enum Stopped {
    /// It takes data.
    Open,
    /// All is there; its completion goes on.
    Completing,
    /// Nothing.
    Removed,
}

impl<S: SnapshotStore> Inner<S> {
    /// Serves one stream to its end.
    pub(super) async fn serve(self: Arc<Self>, frames: Frames, caller: Caller, answers: Answers) {
        let served = tokio::select! {
            result = self.stream(frames, &caller, &answers) => result,
            // Sessions stop by themselves, in order; this is for the handshake of a stream that is not one yet.
            () = self.stopping_handshake() => Err(shutting_down()),
        };
        if let Err(error) = served {
            tracing::debug!(error = %error, reason = error.reason(), "stream ended");
            answers.fail(error).await;
        }
    }

    /// Resolves some time after the stop began, when every session has been told.
    async fn stopping_handshake(&self) {
        self.stopping.cancelled().await;
        let running: Vec<_> = self.slots().values().filter_map(|slot| slot.get()).collect();
        for incoming in running {
            incoming.stop_streams(&shutting_down()).await;
        }
    }

    async fn stream(
        self: &Arc<Self>,
        mut frames: Frames,
        caller: &Caller,
        answers: &Answers,
    ) -> Result<(), Error> {
        match frames.first(&caller.peer().key(), self.limits.first_frame).await? {
            Some(Frame::Header(header)) => {
                let header = ControlHeader::check(header, &self.identity.node_id, &self.limits)?;
                let TransferSpec { source_node, source_shard, target_shard, slots, .. } = &header.spec;
                caller.sends_as("header.source_node_id", source_node)?;
                caller.may(&[source_shard, target_shard], Some(*slots))?;
                self.control(header, frames, answers).await
            }
            Some(Frame::LaneHeader(header)) => {
                self.lane(CheckedLane::check(&header)?, frames, caller, answers).await
            }
            Some(other) => Err(unexpected(&other, "a header")),
            None => Err(ended_early()),
        }
    }

    async fn control(
        self: &Arc<Self>,
        header: ControlHeader,
        mut frames: Frames,
        answers: &Answers,
    ) -> Result<(), Error> {
        let spec = &header.spec;
        // Before anything is read: a manifest can be large. A transfer that is connected has its place already, which a stream that may take over shares.
        let may_take_over = self.find(&spec.transfer_id).filter(|incoming| {
            incoming.plan.spec.source_node == spec.source_node
                && incoming.check_claim(header.claim, header.generation).is_ok()
        });
        let takeover = match may_take_over.and_then(|incoming| incoming.take_over(header.claim)) {
            Some(takeover) => takeover,
            None => {
                let place = self.places.enter(&spec.transfer_id, &spec.source_node, header.priority)?;
                Takeover::of_nothing(place)
            }
        };
        let shard = self.store.shard(&spec.target_shard).await?;
        if let Some(fence) = header.fence {
            fence.check(shard.fence, &spec.target_shard)?;
        }
        let makes_room = self.find(&spec.transfer_id).is_some_and(|incoming| incoming.makes_room());
        if header.discard_staged || makes_room {
            // Before the new manifest is read: a node's share of the memory need not hold both.
            self.discard_staged(&header, &takeover, answers).await?;
        }
        // What is staged is in memory already: going on with it takes no more, and keeps the charge for as long as it keeps the manifest.
        let known = self.find(&spec.transfer_id).filter(|incoming| header.is_of(&incoming.plan));
        let known = known.and_then(|incoming| Some((incoming.memory()?, incoming.plan.manifest.clone())));
        let (manifest, memory) = tokio::select! {
            biased;
            error = takeover.replaced() => return Err(error),
            read = self.read_manifest(&header, &mut frames, known) => read?,
        };
        let attached = self.attach(&header, manifest, memory, takeover, answers).await?;
        let permit = match attached {
            Attached::Done(installed) => {
                drop(frames);
                return self.answer_installed(answers, installed).await;
            }
            Attached::Completing(incoming) => {
                // Nothing that still comes means anything, and what nobody reads would stay in memory for as long as the completion takes.
                drop(frames);
                self.accept_complete(answers).await?;
                return self.await_outcome(&incoming, Ack::default(), answers).await;
            }
            Attached::Writer(permit) => permit,
        };
        let incoming = Arc::clone(permit.incoming());
        let mut stop = permit.stop.clone();
        let result = self.write_and_complete(&header, &permit, &mut stop, frames, answers).await;
        // What arrived becomes durable before anybody asks what is missing.
        let flushed = incoming.flush().await;
        drop(permit);
        incoming.release_place();
        // Also after `End`: the completion may have failed before.
        self.rest(&incoming).await;
        match result.and_then(|last| flushed.map(|()| last)) {
            Ok(last) => self.await_outcome(&incoming, last, answers).await,
            Err(error) => {
                self.interrupted(&incoming, &error);
                Err(error)
            }
        }
    }

    /// The manifest, and the memory that it is charged to; of one that goes on with what is `known`, both are that.
    async fn read_manifest(
        &self,
        header: &ControlHeader,
        frames: &mut Frames,
        known: Option<(Charge, Manifest)>,
    ) -> Result<(Manifest, Charge), Error> {
        if let Some((memory, known)) = known {
            return Ok((header.read_manifest(frames, Some(known), &self.limits).await?, memory));
        }
        let source = &header.spec.source_node;
        let memory = self.manifests.charge(source, header.file_count, header.name_bytes)?;
        let manifest = header.read_manifest(frames, None, &self.limits).await?;
        let memory = self.manifests.charge_directories(memory, source, &manifest)?;
        Ok((manifest, memory))
    }

    /// Where no stream is left, and `End` has not come: what was written becomes durable, and the store closes what it holds open for writing.
    /// For whoever ends what may have been the last to write: a stream that has given up its permit, or a completion that failed.
    pub(super) async fn rest(&self, incoming: &Incoming<S::Staging>) {
        if incoming.has_streams() || incoming.stage() != Stage::Open {
            return;
        }
        // A failure ends the next stream, too, and is told there.
        let _ = incoming.flush().await;
        if let Err(error) = incoming.staging.rest().await {
            tracing::warn!(transfer_id = %incoming.plan.spec.transfer_id, error = &error as &dyn std::error::Error, "cannot rest");
        }
    }

    /// Shows that nobody sends any more, and from when on the rest is stale.
    fn interrupted(&self, incoming: &Arc<Incoming<S::Staging>>, error: &Error) {
        if incoming.stage() != Stage::Open || incoming.has_control() {
            return;
        }
        let expires = now_unix_ms().saturating_add(millis(self.limits.stale_after));
        incoming.show(|transfer| {
            let phase = if error.is_retryable() { TransferPhase::Interrupted } else { TransferPhase::Failed };
            transfer.enter(phase);
            transfer.expires_unix_ms = Some(expires);
            transfer.progress.get_or_insert_default().error = Some(error.clone().into());
        });
    }

    /// Takes chunks until `End`, then starts the completion. Returns the last `Ack`, which those that follow go on from.
    async fn write_and_complete(
        self: &Arc<Self>,
        header: &ControlHeader,
        permit: &StreamPermit<S::Staging>,
        stop: &mut watch::Receiver<Option<Error>>,
        mut frames: Frames,
        answers: &Answers,
    ) -> Result<Ack, Error> {
        let incoming = permit.incoming();
        self.reuse(incoming, permit, answers).await?;
        incoming.show(|transfer| {
            transfer.enter(TransferPhase::Transferring);
            transfer.priority = header.priority.into();
            transfer.connections += 1;
            transfer.expires_unix_ms = None;
            transfer.progress.get_or_insert_default().error = None;
        });
        let (durable_bytes, reused_bytes) = {
            let ledger = incoming.ledger();
            (ledger.durable_bytes(), ledger.reused_bytes())
        };
        let budget = self.budget.join(&incoming.plan.spec.source_node);
        let credit = Session::<S::Staging>::first_credit(&budget, &self.limits);
        let lanes = self.lanes(incoming, header.lanes);
        let max_lanes = lanes.count().saturating_add(1);
        incoming.grant_lanes(&lanes, header.file_runs);
        let terms = Accepted { max_lanes, durable_bytes, reused_bytes, ..self.terms(credit) };
        accept(answers, terms, incoming, Listing::new(header.file_runs), stop).await?;
        frames.chunks_and_pages(self.limits.chunk_bytes);
        let mut session = Session {
            permit,
            frames: &mut frames,
            answers,
            limits: &self.limits,
            budget: &budget,
            control: true,
        };
        // The syncer ends with the session, but never in the middle of a sync.
        let session_over = CancellationToken::new();
        let _end_syncer = session_over.clone().drop_guard();
        let (syncing, limits) = (Arc::clone(incoming), self.limits.clone());
        self.tasks.spawn(async move { syncing.sync_until(session_over, &limits).await });
        let (totals, last) = session.run(credit).await?;
        let Some(totals) = totals else {
            return Err(Reason::Internal.error("the control stream ended without totals"));
        };
        if !incoming.begin_verifying() {
            return Err(permit.stopped().unwrap_or_else(cancelled));
        }
        self.spawn_completion(Arc::clone(incoming), totals);
        Ok(last)
    }

    async fn lane(
        self: &Arc<Self>,
        header: CheckedLane,
        frames: Frames,
        caller: &Caller,
        answers: &Answers,
    ) -> Result<(), Error> {
        let incoming = self.find(&header.transfer_id).ok_or_else(|| {
            Reason::NoSuchAttempt.error("the transfer has no control stream; open that first")
        })?;
        let TransferSpec { source_node, source_shard, target_shard, slots, .. } = &incoming.plan.spec;
        caller.sends_as("the transfer's header.source_node_id", source_node)?;
        caller.may(&[source_shard, target_shard], Some(*slots))?;
        let permit = incoming.attach_lane(header.claim, header.lane, header.generation).await?;
        incoming.show(|_| {});
        let result = self.write(&permit, frames, answers).await;
        drop(permit);
        incoming.show(|_| {});
        // Its control stream may have ended before.
        self.rest(&incoming).await;
        result
    }

    /// Takes the chunks of a lane until its end.
    async fn write(
        &self,
        permit: &StreamPermit<S::Staging>,
        mut frames: Frames,
        answers: &Answers,
    ) -> Result<(), Error> {
        let incoming = permit.incoming();
        let mut stop = permit.stop.clone();
        tokio::select! {
            biased;
            reason = told_to_stop(&mut stop) => return Err(reason.unwrap_or_else(ended_early)),
            () = answers.closed() => return Err(ended_early()),
            () = incoming.turn_of_lane() => {}
        }
        let durable_bytes = incoming.ledger().durable_bytes();
        // Gone where its control stream is.
        let budget = incoming.lanes().ok_or_else(|| permit.stopped().unwrap_or_else(ended_early))?.join();
        let credit = Session::<S::Staging>::first_credit(&budget, &self.limits);
        let terms = Accepted { max_lanes: incoming.max_lanes(), durable_bytes, ..self.terms(credit) };
        accept(answers, terms, incoming, Listing::new(incoming.lists_runs()), &mut stop).await?;
        frames.only_chunks(self.limits.chunk_bytes);
        let mut session = Session {
            permit,
            frames: &mut frames,
            answers,
            limits: &self.limits,
            budget: &budget,
            control: false,
        };
        session.run(credit).await.map(|_| ())
    }

    /// Lanes for a sender that would like to use `wanted` streams.
    fn lanes(&self, incoming: &Incoming<S::Staging>, wanted: u32) -> Arc<Lanes> {
        let known = incoming.plan.manifest.total_bytes().is_some();
        let wanted = if known { self.limits.lanes.min(wanted).saturating_sub(1) } else { 0 };
        self.budget.lanes(&incoming.plan.spec.source_node, wanted.into(), &self.limits)
    }

    /// What every `Accepted` says.
    fn terms(&self, credit_limit: u64) -> Accepted {
        Accepted {
            max_chunk_bytes: self.limits.chunk_bytes,
            credit_limit,
            max_bytes_per_second: self.limits.bytes_per_second.map(std::num::NonZeroU64::get),
            idle_timeout_ms: u64::try_from(self.limits.idle.as_millis()).unwrap_or(u64::MAX),
            max_lanes: 1,
            receiver: Some(self.identity.clone()),
            supported_features: FEATURES.map(str::to_owned).to_vec(),
            ..Accepted::default()
        }
    }

    async fn accept_complete(&self, answers: &Answers) -> Result<(), Error> {
        let terms = Accepted { already_installed: true, last: true, ..self.terms(0) };
        answers.send(Answer::Accepted(terms)).await
    }

    async fn answer_installed(&self, answers: &Answers, installed: Installed) -> Result<(), Error> {
        self.accept_complete(answers).await?;
        answers.send(Answer::Installed(installed)).await
    }

    /// Waits for the completion and tells the sender. A stream that waits has no place, and nothing of it is read any more.
    async fn await_outcome(
        &self,
        incoming: &Incoming<S::Staging>,
        last: Ack,
        answers: &Answers,
    ) -> Result<(), Error> {
        let mut waiting = incoming.wait();
        let mut alive = tokio::time::interval(self.limits.idle / 3);
        loop {
            tokio::select! {
                () = answers.closed() => return Err(ended_early()),
                () = waiting.replaced_by_newer.cancelled() => return Err(replaced()),
                done = ended(&mut waiting.outcome) => {
                    let installed = done.unwrap_or_else(|| Err(shutting_down()))?;
                    return answers.send(Answer::Installed(installed)).await;
                }
                _ = alive.tick() => {
                    let durable_bytes = incoming.ledger().durable_bytes();
                    let phase = incoming.shown().map_or(TransferPhase::Installing, |shown| shown.phase());
                    answers.offer(Answer::Ack(Ack { durable_bytes, phase: phase.into(), ..last }));
                }
            }
        }
    }

    /// Finds or makes the transfer and makes this stream its only writer, in the place of `takeover` where the transfer has none.
    async fn attach(
        self: &Arc<Self>,
        header: &ControlHeader,
        manifest: Manifest,
        memory: Charge,
        takeover: Takeover,
        answers: &Answers,
    ) -> Result<Attached<S::Staging>, Error> {
        let TransferSpec { transfer_id: id, source_node: source, .. } = &header.spec;
        loop {
            if self.stopping.is_cancelled() {
                return Err(shutting_down());
            }
            let slot = {
                let mut slots = self.slots();
                let known = slots.len();
                match slots.get(id) {
                    Some(slot) => Arc::clone(slot),
                    None if known >= self.limits.staged => {
                        return Err(Reason::TooManyTransfers
                            .error(format!(
                                "{known} transfers are staged here; cancel some, or wait until they expire"
                            ))
                            .metadata("limit", self.limits.staged.to_string())
                            .retry_after(std::time::Duration::from_secs(10)));
                    }
                    None if slots.values().filter(|slot| slot.source == *source).count()
                        >= self.limits.staged_per_peer =>
                    {
                        return Err(Reason::TooManyTransfers
                            .error(format!(
                                "the transfers of node {source} that are staged here are its share; cancel some, or wait until they expire"
                            ))
                            .metadata("limit", self.limits.staged_per_peer.to_string())
                            .metadata("peer", source.as_str())
                            .retry_after(std::time::Duration::from_secs(10)));
                    }
                    None => {
                        let slot = Slot::new(source.clone(), None);
                        Arc::clone(slots.entry(id.clone()).or_insert(slot))
                    }
                }
            };
            let attach = self.lock(id, &slot, &takeover, answers).await?;
            // It may have ended, and been made anew, while we waited.
            if !self.slots().get(id).is_some_and(|current| Arc::ptr_eq(current, &slot)) {
                continue;
            }
            if slot.source != *source && slot.get().is_none() {
                // It counts for another node, which has not filled it.
                drop(attach);
                self.forget_empty(id, &slot);
                continue;
            }
            let attached = self.attach_in(&slot, header, manifest, memory, takeover, answers).await;
            self.unlock(id, &slot, attach, attached.as_ref().err()).await;
            return attached;
        }
    }

    /// Discards what is staged under the ID, for an attempt that starts anew, or has begun to.
    async fn discard_staged(
        self: &Arc<Self>,
        header: &ControlHeader,
        takeover: &Takeover,
        answers: &Answers,
    ) -> Result<(), Error> {
        let id = &header.spec.transfer_id;
        let Some(slot) = self.slots().get(id).cloned() else { return Ok(()) };
        let attach = self.lock(id, &slot, takeover, answers).await?;
        let discarded = match slot.get() {
            Some(incoming) => match check_same_spec(&incoming.plan, header, true) {
                Ok(()) => self.stop_others(&slot, &incoming, header, takeover).await.map(|_| ()),
                Err(error) => Err(error),
            },
            None => Ok(()),
        };
        self.unlock(id, &slot, attach, discarded.as_ref().err()).await;
        discarded
    }

    /// The right to attach to the slot of `id`. Of streams that come to take over, only the last waits for it: nobody reads what they send meanwhile.
    async fn lock<'a>(
        &self,
        id: &TransferId,
        slot: &'a Arc<Slot<S::Staging>>,
        takeover: &Takeover,
        answers: &Answers,
    ) -> Result<MutexGuard<'a, ()>, Error> {
        let error = tokio::select! {
            biased;
            attach = slot.attach.lock() => return Ok(attach),
            error = takeover.replaced() => error,
            () = answers.closed() => ended_early(),
        };
        self.forget_empty(id, slot);
        Err(error)
    }

    /// Gives that up, after what may have failed with `error`.
    async fn unlock(
        &self,
        id: &TransferId,
        slot: &Arc<Slot<S::Staging>>,
        attach: MutexGuard<'_, ()>,
        error: Option<&Error>,
    ) {
        if let (Some(error), Some(incoming)) = (error, slot.get())
            && incoming.expires_unix_ms().is_none()
        {
            // Or it would stay as it is for ever, if nobody comes back.
            self.interrupted(&incoming, error);
            self.rest(&incoming).await;
        }
        drop(attach);
        self.forget_empty(id, slot);
    }

    /// Ends the streams that write into the transfer, for the claim of `header`, and removes it where that says so.
    async fn stop_others(
        &self,
        slot: &Slot<S::Staging>,
        incoming: &Arc<Incoming<S::Staging>>,
        header: &ControlHeader,
        takeover: &Takeover,
    ) -> Result<Stopped, Error> {
        if matches!(incoming.stage(), Stage::Verifying | Stage::Installing) {
            return Ok(Stopped::Completing);
        }
        if incoming.makes_room() {
            self.make_room(slot, incoming).await?;
            return Ok(Stopped::Removed);
        }
        incoming.check_claim(header.claim, header.generation)?;
        let reason = if incoming.claim() == header.claim {
            replaced()
        } else {
            Reason::Superseded
                .error(format!(
                    "attempt {} was claimed by another sender; this one must stop",
                    header.claim.attempt
                ))
                .metadata("attempt", header.claim.attempt.to_string())
        };
        tokio::select! {
            biased;
            // The newer one waits instead. Those that were told to end do so all the same.
            error = takeover.replaced() => return Err(error),
            () = incoming.stop_streams(&reason) => {}
        }
        // `End` may have come with the last frames of the old stream.
        match incoming.stage() {
            Stage::Open => {}
            Stage::Closed => return Err(cancelled()),
            Stage::Verifying | Stage::Installing => return Ok(Stopped::Completing),
        }
        if !header.discard_staged {
            return Ok(Stopped::Open);
        }
        incoming.close_to_make_room()?;
        self.make_room(slot, incoming).await?;
        Ok(Stopped::Removed)
    }

    /// Removes what was closed to make room for an attempt that starts anew. May be repeated after it failed.
    async fn make_room(
        &self,
        slot: &Slot<S::Staging>,
        incoming: &Arc<Incoming<S::Staging>>,
    ) -> Result<(), Error> {
        incoming.staging.remove().await?;
        if let Some(mut shown) = incoming.shown() {
            // The attempt that starts anew may come no further, and then nothing of it is here any more.
            shown.lanes = 0;
            shown.finish(TransferPhase::Failed);
            let error = Reason::Superseded
                .error("what was staged was discarded, as an attempt that starts anew asked for");
            shown.progress.get_or_insert_default().error = Some(error.into());
            incoming.finish(shown);
        }
        slot.set(None);
        Ok(())
    }

    /// Removes the slot of an ID that nobody made a transfer of.
    fn forget_empty(&self, id: &TransferId, slot: &Arc<Slot<S::Staging>>) {
        // Whoever holds the lock is about to fill it, or will call this.
        let Ok(_attach) = slot.attach.try_lock() else { return };
        let mut slots = self.slots();
        if slot.get().is_none() && slots.get(id).is_some_and(|current| Arc::ptr_eq(current, slot)) {
            slots.remove(id);
        }
    }

    async fn attach_in(
        self: &Arc<Self>,
        slot: &Slot<S::Staging>,
        header: &ControlHeader,
        manifest: Manifest,
        memory: Charge,
        takeover: Takeover,
        answers: &Answers,
    ) -> Result<Attached<S::Staging>, Error> {
        let spec = &header.spec;
        let mut existing = slot.get();
        if let Some(incoming) = &existing {
            check_same(&incoming.plan, header, &manifest)?;
            match self.stop_others(slot, incoming, header, &takeover).await? {
                Stopped::Open => {}
                Stopped::Completing => return Ok(Attached::Completing(Arc::clone(incoming))),
                Stopped::Removed => existing = None,
            }
        }
        let shard = self.store.shard(&spec.target_shard).await?;
        if existing.is_none()
            && let Some(installed) = self.finished(header, &manifest, &shard).await?
        {
            return Ok(Attached::Done(installed));
        }
        if let Some(installed) = shard.high_water
            && spec.point < installed
        {
            return Err(StoreError::Stale { installed }.into());
        }
        if let Some(fence) = header.fence {
            // Raised and compared in one step: two leaders may be here at once.
            let highest = self.store.raise_fence(&spec.target_shard, fence, &spec.source_node).await?;
            fence.check(highest, &spec.target_shard)?;
        }
        let incoming = match existing {
            Some(incoming) => incoming,
            None if answers.is_closed() => return Err(ended_early()),
            None => {
                let incoming = self.create(TransferPlan { spec: spec.clone(), manifest }, memory).await?;
                slot.set(Some(Arc::clone(&incoming)));
                incoming
            }
        };
        let attached = incoming.attach(header.claim, header.generation, header.fence, takeover.place).await;
        attached.map(Attached::Writer)
    }

    /// Whether the transfer ended before, and how.
    async fn finished(
        &self,
        header: &ControlHeader,
        manifest: &Manifest,
        shard: &ShardState,
    ) -> Result<Option<Installed>, Error> {
        let spec = &header.spec;
        let known = self.transfers.registry().get(Some(Direction::In), spec.transfer_id.as_str());
        let installed = |bytes: u64, reused: u64, at: u64| Installed {
            total_bytes: bytes,
            file_count: manifest.file_count(),
            reused_bytes: reused,
            installed_unix_ms: at,
            already_installed: true,
        };
        match known.as_ref().map(|known| (known, known.phase())) {
            Some((known, TransferPhase::Installed)) => {
                check_same_shown(known, header, manifest)?;
                let progress = known.progress.clone().unwrap_or_default();
                let at = progress.finished_unix_ms.unwrap_or(0);
                Ok(Some(installed(progress.bytes_done, known.reused_bytes, at)))
            }
            Some((_, TransferPhase::Cancelled)) => Err(cancelled()),
            // The history forgets, the shard does not.
            _ if shard.current.as_ref() == Some(&spec.transfer_id) => {
                if let Some(current) = self.store.current_plan(&spec.target_shard).await? {
                    check_same(&current, header, manifest)?;
                }
                Ok(Some(installed(manifest.total_bytes().unwrap_or(0), 0, 0)))
            }
            // A staging area tells by its attempt whether an end on record is its own.
            Some((known, _)) if header.claim.attempt <= known.attempt => Err(Reason::Superseded
                .error(format!(
                    "attempt {} has ended; ask GetTransferProgress and claim the next",
                    known.attempt
                ))
                .metadata("attempt", known.attempt.to_string())),
            _ => Ok(None),
        }
    }

    /// Stages a transfer that is new here.
    async fn create(&self, plan: TransferPlan, memory: Charge) -> Result<Arc<Incoming<S::Staging>>, Error> {
        let hold = self.hook.admit(&plan).await?;
        let staging = self.store.stage(&plan).await?;
        let progress = initial_progress(&plan, &self.identity.node_id, TransferPhase::Preparing);
        match self.transfers.registry().insert(Direction::In, plan.spec.transfer_id.as_str(), progress) {
            Ok(tracker) => Ok(Incoming::new(staging, hold, memory, tracker, Stage::Open, &self.limits)),
            Err(error) => {
                staging.remove().await?;
                Err(Reason::TooManyTransfers.error(error.message()))
            }
        }
    }

    /// Fills files from installed ones, by digest.
    async fn reuse(
        &self,
        incoming: &Arc<Incoming<S::Staging>>,
        permit: &StreamPermit<S::Staging>,
        answers: &Answers,
    ) -> Result<(), Error> {
        let wanted: Vec<(u32, u64)> = {
            let ledger = incoming.ledger();
            let files = incoming.plan.manifest.numbered().filter(|(_, file)| file.blake3.is_some());
            files
                .filter_map(|(number, file)| Some((number, file.size?)))
                .filter(|(number, size)| {
                    *size > 0 && incoming.may_look_for(*number) && ledger.is_empty(*number)
                })
                .collect()
        };
        if wanted.is_empty() {
            return Ok(());
        }
        incoming.show(|transfer| transfer.enter(TransferPhase::Preparing));
        let mut alive = tokio::time::interval(self.limits.idle / 3);
        let still_here = || {
            answers.offer(Answer::Ack(Ack {
                durable_bytes: incoming.ledger().durable_bytes(),
                phase: TransferPhase::Preparing.into(),
                ..Ack::default()
            }));
        };
        let node = &incoming.plan.spec.source_node;
        let turn = self.reuse_turns.of(node);
        let mut stop = permit.stop.clone();
        for (file, len) in wanted {
            // Nor is one waited for that would not be filled.
            if !self.reuses.allows(node, &incoming.ticket, len) {
                incoming.looks_for(file);
                continue;
            }
            let mut waiting = std::pin::pin!(async { (turn.lock().await, self.reusing.acquire().await) });
            let _place = loop {
                tokio::select! {
                    biased;
                    reason = told_to_stop(&mut stop) => return Err(reason.unwrap_or_else(ended_early)),
                    () = answers.closed() => return Err(ended_early()),
                    place = &mut waiting => break place,
                    _ = alive.tick() => still_here(),
                }
            };
            incoming.looks_for(file);
            // Others of the node had their turn meanwhile.
            let Some(begun) = self.reuses.begin(node, &incoming.ticket, len) else { continue };
            // Not by a stream that takes over, which needs the file as well.
            let halt = incoming.closed.child_token();
            let mut reused = std::pin::pin!(incoming.staging.reuse(file, halt.clone()));
            let found = loop {
                tokio::select! {
                    found = &mut reused => break found?,
                    () = self.stopping.cancelled(), if !halt.is_cancelled() => halt.cancel(),
                    _ = alive.tick() => still_here(),
                }
            };
            match found {
                Some(crc) => {
                    incoming
                        .ledger()
                        .reused(ExtentRecord { extent: Extent { file, offset: 0, len }, crc })?;
                }
                // Whoever has copies begun to end them has had their disk read all the same.
                None if halt.is_cancelled() => {}
                None => self.reuses.found_nothing(node, &begun),
            }
        }
        if let Some(stop) = permit.stopped() {
            return Err(stop);
        }
        // Of all that was copied: it takes as long as the disk does.
        let mut flushed = std::pin::pin!(incoming.flush());
        loop {
            tokio::select! {
                flushed = &mut flushed => return flushed,
                _ = alive.tick() => still_here(),
            }
        }
    }
}

/// The outcome, once there is one.
async fn ended(outcome: &mut watch::Receiver<Outcome>) -> Outcome {
    outcome.wait_for(Option::is_some).await.map_or(None, |outcome| outcome.clone())
}

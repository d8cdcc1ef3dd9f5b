//! The header decides: who may write, and what is decided already.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use proto_common::clock::{millis, now_unix_ms};
use proto_common::error::Error;
use proto_common::text::hex;
use proto_common::v1::{Direction, Progress};

use super::Inner;
use super::handshake::{CheckedHeader, FEATURES, ended_early};
use super::incoming::{Incoming, Permit, Slot, Stop, guarded};
use super::outcome::{discard_reason, discarded};
use super::record::Record;
use super::recovery::damaged;
use super::session::Answers;
use super::turns;
use crate::Reason;
use crate::failpoint::reached;
use crate::progress::kept;
use crate::service::shutting_down;
use crate::spec::MigrationSpec;
use crate::target::{MigrationTarget, Offer, Staged};
use crate::v1::transfer_migration_data_response::{Accepted, Committed, Discarded, Resume};
use crate::v1::{MigrationDecision, MigrationProgress, MigrationState};

/// A stream that was let in.
pub(super) struct Attached {
    pub(super) accepted: Accepted,
    /// `None` where there is no record: nothing can be changed then.
    pub(super) permit: Option<Permit>,
}

impl<T: MigrationTarget> Inner<T> {
    pub(super) async fn attach(&self, header: &CheckedHeader, answers: &Answers) -> Result<Attached, Error> {
        let wait = self.streams.take(&header.spec.source_node, turns::PATIENCE)?;
        if !wait.is_zero() {
            tokio::select! {
                biased;
                () = self.stopping.cancelled() => return Err(shutting_down()),
                () = answers.closed() => return Err(ended_early()),
                () = tokio::time::sleep(wait) => {}
            }
        }
        loop {
            let slot = self.slot(&header.id);
            let attach = tokio::select! {
                biased;
                () = self.stopping.cancelled() => return Err(shutting_down()),
                attach = slot.attach.lock() => attach,
                () = answers.closed() => return Err(ended_early()),
            };
            // Whoever removed it had the lock.
            if !self.is_current(&slot) {
                continue;
            }
            let attached = self.attach_in(&slot, header).await;
            drop(attach);
            self.remove_empty(&slot);
            return attached;
        }
    }

    async fn attach_in(&self, slot: &Arc<Slot>, header: &CheckedHeader) -> Result<Attached, Error> {
        let refused = {
            let mut state = slot.state.lock().await;
            self.settle(slot, &mut state).await?;
            let Some(incoming) = state.as_ref() else {
                return self.attach_unknown(slot, &mut state, header).await;
            };
            check(slot, incoming, header)?;
            match self.take_on(incoming, header).await {
                Ok(()) => None,
                // The source has given up what is prepared, and serves: that holds whatever becomes of its next stream.
                Err(error) if incoming.state() == MigrationState::Prepared => Some(error),
                Err(error) => return Err(error),
            }
        };
        let superseded = Reason::Superseded
            .error(format!("attempt {} has come; this stream must stop", header.attempt))
            .metadata("attempt", header.attempt.to_string());
        slot.tell(Stop::Error(superseded));
        slot.quiet().await;
        let mut state = slot.state.lock().await;
        self.settle(slot, &mut state).await?;
        // The last words of the older stream may have ended it.
        let Some(incoming) = state.as_mut() else {
            return self.attach_unknown(slot, &mut state, header).await;
        };
        self.fence(slot, incoming, header, refused.is_none()).await?;
        if let Some(error) = refused
            && incoming.state() == MigrationState::Receiving
        {
            incoming.show(|progress| progress.incident(&error));
            return Err(error);
        }
        incoming.show(|progress| progress.connected = true);
        let accepted = self.accepted(incoming, header.transfer, true);
        Ok(Attached { accepted, permit: Some(slot.register(header.attempt)?) })
    }

    /// Whether data of such a stream can be taken, where it brings some.
    async fn take_on(&self, incoming: &Incoming, header: &CheckedHeader) -> Result<(), Error> {
        let progress = &incoming.record.progress;
        let open = matches!(incoming.state(), MigrationState::Receiving | MigrationState::Prepared);
        if !header.transfer || !open {
            return Ok(());
        }
        if header.copy < progress.copy {
            return Err(Reason::StaleCopy
                .field("header.copy", format!("is {}; copy {} is staged", header.copy, progress.copy))
                .metadata("copy", progress.copy.to_string()));
        }
        let staged = if header.copy == progress.copy { incoming.staged.bytes } else { 0 };
        self.admit(header, staged).await
    }

    async fn admit(&self, header: &CheckedHeader, staged: u64) -> Result<(), Error> {
        let offer = Offer {
            id: &header.id,
            spec: &header.spec,
            fence: header.fence,
            missing_bytes: header.estimated_bytes.map(|bytes| bytes.saturating_sub(staged)),
        };
        guarded(async { self.target.admit(&offer).await }).await
    }

    /// Records that no older attempt commits any more, unless one has. A copy begins only where data is `taken`.
    async fn fence(
        &self,
        slot: &Slot,
        incoming: &mut Incoming,
        header: &CheckedHeader,
        taken: bool,
    ) -> Result<(), Error> {
        if incoming.state() == MigrationState::Prepared {
            self.abort_prepared(slot, incoming).await?;
        }
        let mut next = incoming.record.clone();
        self.introduce(&mut next, header);
        match incoming.state() {
            // No attempt commits any more, whatever its number: there is nothing that a crash could take back.
            MigrationState::Cancelled => {
                incoming.record = next;
                incoming.show(|_| {});
                return Ok(());
            }
            MigrationState::Committed => return self.save(slot, incoming, next).await,
            _ => {}
        }
        next.unprepare();
        if taken && header.transfer && header.copy > next.progress.copy {
            next.progress.copy_reason =
                format!("the source began copy {}; see its progress for why", header.copy);
            begin_copy(&mut next, header);
            self.begin(slot, incoming, next).await?;
        } else {
            self.save(slot, incoming, next).await?;
        }
        incoming.hold = None;
        Ok(())
    }

    async fn begin(&self, slot: &Slot, incoming: &mut Incoming, next: Record) -> Result<(), Error> {
        reached("begin.before", next.state());
        guarded(async { self.target.begin(&slot.id, next.spec.slots, next.encode()).await })
            .await
            .map_err(|error| incoming.failed(error))?;
        reached("begin.after", next.state());
        incoming.record = next;
        incoming.staged = Staged::default();
        Ok(())
    }

    /// Takes over from the header what may differ from stream to stream.
    fn introduce(&self, record: &mut Record, header: &CheckedHeader) {
        let ended = record.state().is_final();
        record.kept.session = header.session.clone();
        record.kept.fence = header.fence.map(Into::into);
        let progress = &mut record.progress;
        progress.attempt = header.attempt;
        progress.peer = Some(header.source.clone());
        progress.reporter = Some(self.identity.clone());
        progress.set_priority(header.priority);
        if ended || !header.transfer {
            return;
        }
        let skew = i128::from(now_unix_ms()) - i128::from(header.sent_unix_ms);
        progress.clock_skew_ms =
            Some(i64::try_from(skew).unwrap_or(if skew < 0 { i64::MIN } else { i64::MAX }));
        estimates(progress.task(), record.kept.copied, header.estimated_keys, header.estimated_bytes);
    }

    /// There is no record: the history may know it, a transfer begins it, and for any other purpose it stays unknown.
    async fn attach_unknown(
        &self,
        slot: &Arc<Slot>,
        state: &mut Option<Incoming>,
        header: &CheckedHeader,
    ) -> Result<Attached, Error> {
        if self.untrusted.contains_key(&slot.id) {
            return Err(Reason::SlotsQuarantined
                .error(format!(
                    "the record of migration {} at this node cannot be read; an operator has to look at it",
                    slot.id
                ))
                .metadata("holder", damaged(&slot.id)));
        }
        if let Ok(ended) = self.migrations.get(Some(Direction::In), &slot.id)
            && matches!(ended.state(), MigrationState::Completed | MigrationState::Cancelled)
        {
            if let Ok(spec) = MigrationSpec::from_wire(ended.spec.clone(), "spec", None) {
                check_spec(&spec, header)?;
            }
            return Ok(Attached { accepted: self.accepted_ended(&ended), permit: None });
        }
        if !header.transfer {
            let accepted = self.terms(MigrationDecision::Undecided, false);
            return Ok(Attached { accepted, permit: None });
        }
        if self.draining.load(Ordering::Acquire) {
            return Err(shutting_down());
        }
        let place = self.places.enter(&slot.id, &header.spec.source_node, header.priority)?;
        let range = self.range(&slot.id, header.spec.slots)?;
        self.make_room(&header.spec.source_node).await?;
        self.admit(header, 0).await?;
        let mut progress = MigrationProgress {
            migration_id: slot.id.to_string(),
            spec: Some(header.spec.clone().into()),
            ..MigrationProgress::default()
        };
        let task = progress.task();
        *task = Progress { started_unix_ms: now_unix_ms(), ..Progress::default() };
        task.set_direction(Direction::In);
        let mut record = Record::new(header.spec.clone(), progress);
        record.enter(MigrationState::Receiving);
        self.introduce(&mut record, header);
        begin_copy(&mut record, header);
        // First: what began without being shown would be nobody's until the next start.
        let tracker = match self.migrations.insert(record.progress.clone()) {
            Ok(tracker) => tracker,
            Err(error) => {
                // What was admitted counts at the store.
                guarded(async { self.target.forget(&slot.id).await }).await?;
                return Err(error);
            }
        };
        let mut incoming = Incoming::new(record.clone(), Staged::default());
        let begun = self.begin(slot, &mut incoming, record).await;
        if let Err(error) = &begun
            && !incoming.doubt
        {
            tracker.finish(|shown| {
                shown.task().error = Some(kept(error));
                shown.enter(MigrationState::Failed);
            });
            return Err(error.clone());
        }
        incoming.tracker = Some(tracker);
        (incoming.place, incoming.range) = (Some(place), Some(range));
        if let Err(error) = begun {
            // It may have begun after all.
            *state = Some(incoming);
            return Err(error);
        }
        incoming.show(|progress| progress.connected = true);
        let accepted = self.accepted(&incoming, true, false);
        *state = Some(incoming);
        Ok(Attached { accepted, permit: Some(slot.register(header.attempt)?) })
    }

    /// What is answered to a stream of a migration that has a record.
    fn accepted(&self, incoming: &Incoming, transfer: bool, known: bool) -> Accepted {
        let Record { progress, kept, .. } = &incoming.record;
        let mut accepted = self.terms(progress.decision(), known);
        accepted.committed = kept.committed;
        accepted.discarded =
            (progress.decision() == MigrationDecision::Discarded).then(|| discarded(incoming));
        if transfer && progress.decision() == MigrationDecision::Undecided {
            accepted.resume = Some(Resume {
                copy: progress.copy,
                cursor: kept.cursor.clone(),
                copied: kept.copied,
                through_seq: kept.through_seq,
                staged_keys: incoming.staged.keys,
                staged_bytes: incoming.staged.bytes,
            });
        }
        accepted
    }

    /// What is answered of a migration that only the history knows.
    fn accepted_ended(&self, ended: &MigrationProgress) -> Accepted {
        let mut accepted = self.terms(ended.decision(), true);
        if ended.decision() == MigrationDecision::Committed {
            let freeze = ended.freezes.last().cloned().unwrap_or_default();
            accepted.committed = Some(Committed {
                attempt: freeze.attempt,
                freeze: freeze.freeze,
                slot_epoch: ended.slot_epoch,
                committed_unix_ms: freeze.started_unix_ms,
                resolved_by_operator: ended.resolved_reason.is_some(),
            });
        }
        if ended.decision() == MigrationDecision::Discarded {
            accepted.discarded = Some(Discarded { staged_bytes: 0, reason: discard_reason(ended) });
        }
        accepted
    }

    fn terms(&self, decision: MigrationDecision, known: bool) -> Accepted {
        Accepted {
            decision: decision.into(),
            known,
            committed: None,
            discarded: None,
            resume: None,
            target: Some(self.identity.clone()),
            max_batch_bytes: self.limits.batch_bytes,
            credit_limit: self.credit(),
            max_bytes_per_second: self.limits.bytes_per_second.map(std::num::NonZeroU64::get),
            idle_timeout_ms: millis(self.idle()),
            sent_unix_ms: now_unix_ms(),
            required_features: Vec::new(),
            supported_features: FEATURES.map(str::to_owned).to_vec(),
        }
    }
}

/// Refuses what must not disturb the stream that there is.
fn check(slot: &Slot, incoming: &Incoming, header: &CheckedHeader) -> Result<(), Error> {
    let Record { spec, progress, kept } = &incoming.record;
    check_spec(spec, header)?;
    let known = progress.peer.clone().unwrap_or_default();
    if known.store_id != header.source.store_id {
        return Err(Reason::StoreChanged
            .field(
                "header.source.store_id",
                format!("is not {}, with which migration {} began", hex(&known.store_id), slot.id),
            )
            .metadata("store_id", hex(&header.source.store_id)));
    }
    if header.attempt <= progress.attempt {
        let (reason, what) = if kept.session == header.session {
            (Reason::StaleAttempt, "this session; claim the next one")
        } else {
            (Reason::Superseded, "another session; this one must stop")
        };
        return Err(reason
            .error(format!("attempt {} is not higher than {} of {what}", header.attempt, progress.attempt))
            .metadata("attempt", progress.attempt.to_string()));
    }
    Ok(())
}

fn check_spec(known: &MigrationSpec, header: &CheckedHeader) -> Result<(), Error> {
    let Some(field) = known.difference(&header.spec) else { return Ok(()) };
    Err(Reason::SpecificationMismatch
        .field(&format!("header.spec.{field}"), format!("is not that of migration {} here", header.id))
        .metadata("field", field))
}

/// Starts a copy from nothing.
fn begin_copy(record: &mut Record, header: &CheckedHeader) {
    let kept = &mut record.kept;
    kept.base_seq = header.base_seq;
    kept.through_seq = header.base_seq;
    kept.cursor.clear();
    (kept.copied, kept.used) = (false, false);
    record.progress.copy = header.copy;
    let task = record.progress.task();
    (task.bytes_done, task.items_done) = (0, 0);
    estimates(task, false, header.estimated_keys, header.estimated_bytes);
}

/// Shows what the source thinks that there is in all; once all was copied, that is known.
pub(super) fn estimates(task: &mut Progress, copied: bool, keys: Option<u64>, bytes: Option<u64>) {
    if copied {
        return;
    }
    task.items_total = keys.map(|keys| keys.max(task.items_done)).or(task.items_total);
    task.bytes_total = bytes.map(|bytes| bytes.max(task.bytes_done)).or(task.bytes_total);
    task.total_is_estimate = true;
}

//! One transfer from its start to its end: claim an attempt, push, and try again for as long as that can help.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use proto_common::connect::Connect;
use proto_common::error::{CommonReason, Error};
use proto_common::rate::RateLimiter;
use proto_common::registry::Tracker;
use proto_common::retry::BackoffState;
use proto_common::v1::Direction;
use tokio_util::sync::CancellationToken;

use super::patience::Quiet;
use super::pump::Shared;
use super::shown::Shown;
use super::stream::{FIRST_IDLE, client};
use super::{SnapshotSender, SnapshotToSend};
use crate::reason::Reason;
use crate::source::{SOURCE_CHANGED, SnapshotSource};
use crate::spec::Manifest;
use crate::transfers::Transfers;
use crate::v1::transfer_split_snapshot_response::Installed;
use crate::v1::{CancelTransferRequest, GetTransferProgressRequest, TransferPhase, TransferProgress};

/// How long a cancel waits for the receiver, which may be reading back what it has staged.
const CANCEL_PATIENCE: Duration = Duration::from_secs(30);

/// See the module.
pub(super) struct Task<C: Connect, S: SnapshotSource> {
    pub(super) sender: SnapshotSender<C>,
    pub(super) snapshot: SnapshotToSend,
    pub(super) shared: Shared<S>,
    pub(super) shown: Shown,
    cancel: CancellationToken,
    /// Tells that the transfer has ended, however its task ended; after `shown` did.
    _registered: Registered,
}

struct Registered {
    transfers: Transfers,
    id: proto_common::ids::TransferId,
    cancel: CancellationToken,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.transfers.forget_outgoing(&self.id, &self.cancel);
    }
}

/// The attempt that this task has claimed.
pub(super) struct Claimed {
    pub(super) attempt: u64,
    pub(super) session: [u8; 16],
    pub(super) generation: u64,
    pub(super) discard_staged: bool,
}

impl Claimed {
    fn after(attempt: u64, discard_staged: bool) -> Result<Self, Error> {
        let attempt = attempt.checked_add(1).ok_or_else(|| {
            Reason::InvalidField.field("attempt", "cannot be counted further; use a new transfer ID")
        })?;
        Ok(Self { attempt, session: rand::random(), generation: 0, discard_staged })
    }
}

/// The source, read once at the start.
pub(super) struct Described {
    pub(super) manifest: Manifest,
    pub(super) content_version: String,
}

/// How one control stream ended without an error.
pub(super) enum Ended {
    Installed(Installed),
    /// The source cannot go on where the receiver is: it has to start anew.
    StartAnew,
}

/// What the receiver makes of a cancel.
enum Cancelled {
    /// It will not be installed, as far as is known; the error says how far that is.
    Yes(Error),
    TooLate,
}

impl<C: Connect, S: SnapshotSource> Task<C, S> {
    pub(super) fn new(
        sender: SnapshotSender<C>,
        snapshot: SnapshotToSend,
        source: S,
        tracker: Tracker<TransferProgress>,
        limiter: RateLimiter,
        cancel: CancellationToken,
    ) -> Self {
        let shared = Shared::new(source, limiter);
        let registered = Registered {
            transfers: sender.transfers.clone(),
            id: snapshot.transfer_id.clone(),
            cancel: cancel.clone(),
        };
        let shown = Shown::new(tracker, Arc::clone(&shared.counters), Arc::clone(&shared.patience));
        Self { sender, snapshot, shared, shown, cancel, _registered: registered }
    }

    /// Sends until it is installed or cannot be.
    pub(super) async fn run(self) -> Result<Installed, Error> {
        let result = self.push_or_cancel().await;
        let phase = match &result {
            Ok(_) => TransferPhase::Installed,
            Err(error) if error.is(Reason::TransferCancelled) => TransferPhase::Cancelled,
            Err(_) => TransferPhase::Failed,
        };
        if let Some(last) = self.shown.finish(phase, result.as_ref().err()) {
            self.sender.transfers.record(&last).await;
        }
        result
    }

    /// Pushes. On a cancel it holds back whatever was not sent until the receiver has decided, which may have all already.
    async fn push_or_cancel(&self) -> Result<Installed, Error> {
        let mut pushing = pin!(self.push());
        let mut pushed = tokio::select! {
            biased;
            () = self.cancel.cancelled() => None,
            result = &mut pushing => Some(result),
        };
        if !self.cancel.is_cancelled()
            && let Some(result) = pushed
        {
            if matches!(&result, Err(error) if error.reason() == SOURCE_CHANGED) {
                // No attempt can go on with what is staged, which would keep its part of the disk until it expires.
                self.cancel_at_receiver("the source has changed").await;
            }
            return result;
        }
        self.shared.hold.set(true);
        let mut cancelling = pin!(self.cancel_at_receiver("cancelled at the sender"));
        let cancelled = loop {
            match &pushed {
                Some(Ok(_)) => break Cancelled::TooLate,
                // The receiver says so on the stream as well, but before it has discarded anything: the call tells when it has.
                Some(Err(error)) if error.is(Reason::TransferCancelled) => {
                    let error = error.clone();
                    cancelling.await;
                    break Cancelled::Yes(error);
                }
                _ => {}
            }
            tokio::select! {
                biased;
                cancelled = &mut cancelling => break cancelled,
                result = &mut pushing, if pushed.is_none() => pushed = Some(result),
            }
        };
        self.shared.hold.set(false);
        if matches!(cancelled, Cancelled::TooLate) {
            self.sender.transfers.is_too_late(&self.snapshot.transfer_id, &self.cancel);
        }
        match (cancelled, pushed) {
            (Cancelled::Yes(error), _) => Err(error),
            (Cancelled::TooLate, Some(result)) => result,
            (Cancelled::TooLate, None) => pushing.await,
        }
    }

    async fn push(&self) -> Result<Installed, Error> {
        let described = self.describe().await?;
        let mut backoff = self.sender.options.backoff.start();
        let mut claimed = loop {
            match self.claim().await {
                Ok(claimed) => break claimed,
                Err(error) => self.pause(&mut backoff, error).await?,
            }
        };
        loop {
            claimed.generation += 1;
            let before = self.shown.progress_mark();
            let result = self.control(&described, &claimed).await;
            if self.shown.progress_mark() > before {
                backoff.reset();
            }
            match result {
                Ok(Ended::Installed(installed)) => return Ok(installed),
                Ok(Ended::StartAnew) => claimed = Claimed::after(claimed.attempt, true)?,
                Err(error) => self.pause(&mut backoff, error).await?,
            }
        }
    }

    async fn describe(&self) -> Result<Described, Error> {
        let description = self.shared.source.describe(self.sender.options.digests).await?;
        let manifest = Manifest::new(description.files)?;
        if manifest.file_count() == 0 {
            return Err(Reason::InvalidField.field("source", "has no files; a snapshot has at least one"));
        }
        self.shared.patience.active();
        self.shared.checksums.start(&manifest);
        self.shown.show(|transfer| {
            let progress = transfer.progress.get_or_insert_default();
            progress.bytes_total = manifest.total_bytes();
            progress.items_total = Some(manifest.file_count());
        });
        Ok(Described { manifest, content_version: description.content_version })
    }

    /// Asks for the current attempt and claims the next.
    async fn claim(&self) -> Result<Claimed, Error> {
        let mut client = client(self.sender.connect.connect().await?);
        let request = GetTransferProgressRequest {
            transfer_id: self.snapshot.transfer_id.to_string(),
            direction: Direction::In.into(),
        };
        let quiet = Quiet::new(FIRST_IDLE);
        let answer = quiet.bound("an answer", client.get_transfer_progress(request)).await?;
        let current = match answer.map_err(Error::from) {
            Ok(answer) => answer.into_inner().transfer.map_or(0, |transfer| transfer.attempt),
            Err(error) if error.is(Reason::TransferNotFound) => 0,
            Err(error) => return Err(error),
        };
        Claimed::after(current, false)
    }

    /// Shows the error and waits, or returns it where it is final.
    async fn pause(&self, backoff: &mut BackoffState, error: Error) -> Result<(), Error> {
        self.shown.failed(&error);
        let failing = self.shared.patience.failed();
        // What is there already is worth waiting for whoever renews certificates.
        let waits = error.is_renewable() && self.shown.progress_mark() > 0;
        let judged =
            if waits { Error::new(CommonReason::Unavailable, error.message()) } else { error.clone() };
        let Some(pause) = backoff.next(&judged) else { return Err(error) };
        if self.sender.options.give_up_after.is_some_and(|patience| failing > patience) {
            tracing::warn!(transfer_id = %self.snapshot.transfer_id, ?failing, "giving up");
            return Err(error);
        }
        tracing::debug!(transfer_id = %self.snapshot.transfer_id, error = %error, ?pause, "will try again");
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// Tells the receiver to discard what is staged.
    async fn cancel_at_receiver(&self, reason: &str) -> Cancelled {
        let asked = tokio::time::timeout(CANCEL_PATIENCE, async {
            let mut client = client(self.sender.connect.connect().await?);
            let request = CancelTransferRequest {
                transfer_id: self.snapshot.transfer_id.to_string(),
                direction: Direction::In.into(),
                reason: reason.to_owned(),
            };
            client.cancel_transfer(request).await.map_err(Error::from)
        });
        let how = match asked.await {
            Ok(Ok(_)) => String::new(),
            Ok(Err(error)) if error.is(Reason::TransferNotFound) => {
                ", before the receiver knew of it".to_owned()
            }
            Ok(Err(error)) if error.is(Reason::TooLateToCancel) => {
                // It may also be too late because it came to nothing already.
                let phase = error.get("phase").and_then(TransferPhase::from_str_name);
                match phase {
                    Some(TransferPhase::Failed) => ", after the receiver had given it up".to_owned(),
                    Some(TransferPhase::Expired) => ", after it had expired at the receiver".to_owned(),
                    _ => return Cancelled::TooLate,
                }
            }
            Ok(Err(error)) => {
                tracing::warn!(transfer_id = %self.snapshot.transfer_id, error = %error, "the receiver did not hear of the cancel");
                format!(
                    "; the receiver could not be told ({error}) and keeps what is staged until it expires"
                )
            }
            Err(_) => {
                tracing::warn!(transfer_id = %self.snapshot.transfer_id, "the receiver did not answer the cancel");
                format!(
                    "; the receiver did not answer in time ({CANCEL_PATIENCE:?}), and it is not known whether it discarded what \
                     is staged"
                )
            }
        };
        Cancelled::Yes(
            Reason::TransferCancelled.error(format!("the transfer was cancelled at its sender{how}")),
        )
    }
}

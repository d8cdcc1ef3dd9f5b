//! From `End` to `Installed`: verify, seal, place, let the owner merge it, activate.
//!
//! Runs in a task of the receiver, since a handler's future is dropped when its peer disconnects. After a crash, a sealed
//! transfer starts again at [`Inner::spawn_install`].

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use proto_common::clock::now_unix_ms;
use proto_common::error::Error;
use proto_common::retry::Backoff;

use super::Inner;
use super::incoming::{Incoming, Stage, cancelled};
use crate::extent::Extent;
use crate::reason::Reason;
use crate::spec::FileTotal;
use crate::store::{SnapshotStore, Staging, StagingState, StoreError};
use crate::v1::TransferPhase;
use crate::v1::transfer_split_snapshot_response::Installed;

impl<S: SnapshotStore> Inner<S> {
    /// Completes a transfer whose `End` has come, in a task of its own. The outcome goes to
    /// [`Incoming::outcome`].
    pub(super) fn spawn_completion(
        self: &Arc<Self>,
        incoming: Arc<Incoming<S::Staging>>,
        totals: Vec<FileTotal>,
    ) {
        let inner = Arc::clone(self);
        self.tasks.spawn(async move {
            incoming.show(|transfer| transfer.enter(TransferPhase::Verifying));
            match inner.verify(&incoming, &totals).await {
                Ok(()) => inner.install(&incoming).await,
                Err(error) => {
                    incoming.show(|transfer| {
                        if !incoming_closed(&error) {
                            transfer.enter(TransferPhase::Failed);
                        }
                        transfer.progress.get_or_insert_default().error = Some(error.clone().into());
                    });
                    inner.show_expiry(&incoming);
                    incoming.complete_unsealed(error);
                    inner.rest(&incoming).await;
                }
            }
        });
    }

    /// Installs a sealed transfer, in a task of its own.
    pub(super) fn spawn_install(self: &Arc<Self>, incoming: Arc<Incoming<S::Staging>>) {
        let inner = Arc::clone(self);
        self.tasks.spawn(async move { inner.install(&incoming).await });
    }

    /// Checks all that was promised and seals.
    async fn verify(&self, incoming: &Arc<Incoming<S::Staging>>, totals: &[FileTotal]) -> Result<(), Error> {
        incoming.flush().await?;
        // First: where what lies on disk is not what its records say, that is to be sent again, and the sender's totals may be right.
        self.read_back(incoming).await?;
        incoming.ledger().check_totals(totals)?;
        let spec = &incoming.plan.spec;
        if let Some(fence) = incoming.fence() {
            // A newer leader may have come while the data did. What is sealed is decided.
            let current = self.store.shard(&spec.target_shard).await?.fence;
            fence.check(current, &spec.target_shard)?;
        }
        tracing::debug!(transfer_id = %spec.transfer_id, "verified");
        loop {
            // From here on a cancel is refused.
            if !incoming.begin_installing() {
                return Err(cancelled());
            }
            match incoming.staging.seal(totals).await {
                Ok(()) => break,
                Err(error) if error.is_retryable() => {
                    // It may be for ever, as on a full disk, which a cancel makes room on.
                    incoming.put_off_installing();
                    self.pause_after(incoming, &error.into()).await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        // Not before it is durable: INSTALLING promises to go on after a crash.
        incoming.show(|transfer| transfer.enter(TransferPhase::Installing));
        Ok(())
    }

    /// Reads what an earlier process wrote: its records say that it was durable, the disk has the last word.
    async fn read_back(&self, incoming: &Arc<Incoming<S::Staging>>) -> Result<(), Error> {
        let mut damaged: Vec<Extent> = Vec::new();
        let inherited = incoming.ledger().inherited();
        for record in inherited {
            if incoming.stage() == Stage::Closed {
                return Err(cancelled());
            }
            match incoming.staging.checksum(record.extent).await {
                Ok(crc) if crc == record.crc => {}
                Ok(_) => damaged.push(record.extent),
                // What cannot be read is as lost as what reads differently.
                Err(error) => {
                    tracing::warn!(
                        transfer_id = %incoming.plan.spec.transfer_id,
                        error = &error as &dyn std::error::Error,
                        "cannot read back"
                    );
                    damaged.push(record.extent);
                }
            }
        }
        if !damaged.is_empty() {
            let remaining = incoming.ledger().without(&damaged);
            // The store first: what it still had on record, it would not take again.
            incoming.staging.reset_records(remaining).await?;
        }
        incoming.ledger().verified(&damaged);
        if damaged.is_empty() {
            return Ok(());
        }
        let bytes: u64 = damaged.iter().map(|extent| extent.len).sum();
        tracing::warn!(transfer_id = %incoming.plan.spec.transfer_id, bytes, "staged data is damaged; dropped");
        Err(Reason::StagedDataDamaged
            .error(format!("{bytes} bytes that were staged before a restart are damaged; they were dropped, send them again"))
            .metadata("bytes", bytes.to_string()))
    }

    /// Takes a sealed transfer to its end. Goes on until it is installed, refused for good, or the receiver stops.
    async fn install(&self, incoming: &Arc<Incoming<S::Staging>>) {
        let result = self.install_in_turn(incoming).await;
        let stopping = self.stopping.is_cancelled();
        match result {
            Ok(installed) => incoming.complete(Ok(installed)),
            Err(error) if stopping && error.is_retryable() => incoming.complete(Err(error)),
            Err(error) => {
                tracing::error!(transfer_id = %incoming.plan.spec.transfer_id, error = %error, "not installed");
                incoming.close_for_good();
                if let Err(error) = self.end(incoming, TransferPhase::Failed, Some(&error)).await {
                    // The collector of stale staging repeats it.
                    tracing::error!(transfer_id = %incoming.plan.spec.transfer_id, error = %error, "cannot be removed");
                }
                incoming.complete(Err(error));
            }
        }
    }

    /// One snapshot of a shard at a time, from the check of the high-water mark to its rise: an older one must not be merged
    /// after a newer one.
    async fn install_in_turn(&self, incoming: &Arc<Incoming<S::Staging>>) -> Result<Installed, Error> {
        let spec = &incoming.plan.spec;
        let turn = self.turns.of(&spec.target_shard);
        let _turn = tokio::select! {
            turn = turn.lock() => turn,
            () = self.stopping.cancelled() => return Err(shutting_down()),
        };
        // What an earlier process sealed it may have merged, too: then its sender must not be told that it ended without.
        let perhaps_merged = incoming.staging.state() == StagingState::Sealed;
        let shard = loop {
            match self.store.shard(&spec.target_shard).await {
                Ok(shard) => break shard,
                Err(error) => self.retry_store(incoming, error, perhaps_merged).await?,
            }
        };
        // After a crash between the last step and the removal, nothing is repeated but the removal.
        let was_current =
            shard.current.as_ref() == Some(&spec.transfer_id) || shard.superseded.contains(&spec.transfer_id);
        if !was_current {
            if let Some(installed) = shard.high_water
                && spec.point < installed
            {
                return Err(StoreError::Stale { installed }.into());
            }
            self.install_steps(incoming, perhaps_merged).await?;
        }
        if !self.hook.keeps_files(&incoming.plan)
            && let Err(error) = incoming.staging.discard().await
        {
            // They are in the way of nobody, and go with the shard's next snapshot.
            tracing::warn!(
                transfer_id = %spec.transfer_id,
                error = &error as &dyn std::error::Error,
                "files of a merged snapshot are left"
            );
        }
        self.ended_well(incoming).await
    }

    async fn install_steps(
        &self,
        incoming: &Arc<Incoming<S::Staging>>,
        perhaps_merged: bool,
    ) -> Result<(), Error> {
        let placed = loop {
            match incoming.staging.place().await {
                Ok(placed) => break placed,
                Err(error) => self.retry_store(incoming, error, perhaps_merged).await?,
            }
        };
        let mut backoff = Backoff::default().start();
        loop {
            let merged = AssertUnwindSafe(self.hook.install(&placed)).catch_unwind().await;
            let merged = merged.unwrap_or_else(|_| {
                Err(Reason::Internal.error("the install hook panicked").retry_after(Duration::from_secs(1)))
            });
            let Err(error) = merged else { break };
            incoming.show(|transfer| {
                transfer.progress.get_or_insert_default().error = Some(error.clone().into());
            });
            let Some(pause) = backoff.next(&error) else {
                return Err(Reason::InstallRefused
                    .error(format!("the store's owner refused the snapshot: {}", error.message()))
                    .caused_by(error));
            };
            tracing::warn!(
                transfer_id = %incoming.plan.spec.transfer_id,
                error = %error,
                "the install hook will be repeated"
            );
            self.pause(pause).await?;
        }
        loop {
            match incoming.staging.activate().await {
                Ok(()) => break,
                Err(error) => self.retry_store(incoming, error, true).await?,
            }
        }
        Ok(())
    }

    /// Writes the history and removes what is left, of a snapshot that is current.
    async fn ended_well(&self, incoming: &Arc<Incoming<S::Staging>>) -> Result<Installed, Error> {
        let reused_bytes = incoming.ledger().reused_bytes();
        incoming.show(|transfer| transfer.progress.get_or_insert_default().error = None);
        let last = loop {
            match self.end(incoming, TransferPhase::Installed, None).await {
                Ok(last) => break last,
                Err(error) => self.pause_after(incoming, &error).await?,
            }
        };
        let total_bytes = last.progress.as_ref().map_or(0, |progress| progress.bytes_done);
        tracing::info!(transfer_id = %incoming.plan.spec.transfer_id, total_bytes, "installed");
        Ok(Installed {
            total_bytes,
            file_count: incoming.plan.manifest.file_count(),
            reused_bytes,
            installed_unix_ms: now_unix_ms(),
            already_installed: false,
        })
    }

    /// Waits before a step is repeated, unless that is of no use. Of a snapshot that is `perhaps_merged` already, what became is told only once it is
    /// known: until somebody has repaired or removed the damaged record of its shard, it is being installed.
    async fn retry_store(
        &self,
        incoming: &Arc<Incoming<S::Staging>>,
        error: StoreError,
        perhaps_merged: bool,
    ) -> Result<(), Error> {
        if error.is_retryable() || (perhaps_merged && matches!(error, StoreError::ShardDamaged { .. })) {
            tracing::warn!(transfer_id = %incoming.plan.spec.transfer_id, error = &error as &dyn std::error::Error, "the install will be repeated");
            self.pause_after(incoming, &error.into()).await
        } else {
            Err(error.into())
        }
    }

    async fn pause_after(&self, incoming: &Arc<Incoming<S::Staging>>, error: &Error) -> Result<(), Error> {
        incoming
            .show(|transfer| transfer.progress.get_or_insert_default().error = Some(error.clone().into()));
        self.pause(Duration::from_secs(1)).await
    }

    async fn pause(&self, pause: Duration) -> Result<(), Error> {
        tokio::select! {
            () = self.stopping.cancelled() => Err(shutting_down()),
            () = tokio::time::sleep(pause) => Ok(()),
        }
    }
}

fn incoming_closed(error: &Error) -> bool {
    error.is(Reason::TransferCancelled)
}

/// The receiver is going away.
pub(super) fn shutting_down() -> Error {
    Reason::ShuttingDown
        .error("the node is shutting down; what arrived is kept, go on when it is back")
        .retry_after(Duration::from_secs(1))
}

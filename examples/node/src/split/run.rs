//! One split, from the hold to the hand-over.

use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proto::common::error::Error;
use proto::common::ids::ShardId;
use proto::common::path::FileName;
use proto::node::Priority;
use proto::snapshot::sender::{SenderOptions, SnapshotToSend};
use proto::snapshot::spec::SnapshotPoint;
use proto::snapshot::{FileSource, SnapshotSender};

use super::outcome::{Answer, ask_until_answered, cancel};
use super::receive::ROWS_FILE;
use super::source::{Closing, ClosingSource};
use super::{Begun, SplitPhase, Splits};
use crate::common::SlotRange;
use crate::gate::{GateHold, HoldMode};
use crate::store::{Claim, Handover, StoreError};

/// Between two questions whether an install has ended.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// How a split ended.
enum End {
    Done,
    Undone,
}

/// Runs until it is decided. Dropping the future leaves the intent for the next start.
pub(super) async fn run(splits: &Splits, begun: &Begun, resumed: Option<GateHold>) {
    let end = decide(splits, begun, resumed).await;
    let transfer = &begun.transfer;
    let path = path(splits, begun);
    match end {
        End::Done => {
            splits.enter(transfer, SplitPhase::Done);
            tracing::info!(%transfer, slots = %begun.range, target = %begun.target, "slots handed over");
        }
        End::Undone => {
            splits.enter(transfer, SplitPhase::Undone);
            tracing::warn!(%transfer, slots = %begun.range, "the split is undone; the slots stay here");
        }
    }
    if let Err(error) = tokio::fs::remove_file(&path).await
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "the snapshot of a split cannot be removed");
    }
}

fn path(splits: &Splits, begun: &Begun) -> std::path::PathBuf {
    splits.inner.directory.join(format!("{}.rows", begun.transfer))
}

async fn decide(splits: &Splits, begun: &Begun, resumed: Option<GateHold>) -> End {
    let node = &splits.inner.node;
    let was_resumed = resumed.is_some();
    let address = begun.intent.target_addresses.grpc.as_str();
    let transfer = &begun.transfer;
    // Held from here until it is decided, whatever else is held beside it.
    let writes = match &resumed {
        Some(_) => node.gate().hold_undrained(begun.range, HoldMode::Writes),
        None => node.hold_writes(begun.range).await,
    };
    if was_resumed {
        splits.enter(transfer, SplitPhase::Asking);
        match ask_until_answered(address, transfer.as_str(), |error| splits.failed(transfer, error)).await {
            Answer::Installed => return commit(splits, begun, writes).await,
            Answer::Installing | Answer::Partial | Answer::Ended | Answer::Unknown => {}
        }
    }
    let closing = Closing::new(node.gate().clone(), begun.range);
    if was_resumed {
        // The target may have all but the `End`: what closed the gate then must stay closed.
        closing.close().await;
    }
    drop(resumed);

    let sent = send(splits, begun, &closing).await;
    match sent {
        Ok(()) => commit(splits, begun, writes).await,
        Err(error) => {
            splits.failed(transfer, &error);
            splits.enter(transfer, SplitPhase::Asking);
            resolve(splits, begun, writes, was_resumed).await
        }
    }
}

/// Why the snapshot was not sent.
#[derive(Debug, thiserror::Error)]
enum SendError {
    #[error("the snapshot could not be written: {0}")]
    Export(#[from] StoreError),
    #[error("{0}")]
    Transfer(#[from] Error),
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

async fn send(splits: &Splits, begun: &Begun, closing: &Arc<Closing>) -> Result<(), SendError> {
    let node = &splits.inner.node;
    let path = path(splits, begun);
    if !tokio::fs::try_exists(&path).await? {
        splits.enter(&begun.transfer, SplitPhase::Exporting);
        let ownership = node.gate().ownership();
        let new = claim(begun);
        let handover = Handover::new(ownership.claims().iter().chain([&new]), &node.nodes());
        let summary = node.consistent_export(begun.range, handover, path.clone()).await?;
        splits.update(&begun.transfer, |status| status.rows = Some(summary.rows));
    }
    let bytes = size(&path).await?;
    splits.update(&begun.transfer, |status| status.bytes = Some(bytes));
    splits.enter(&begun.transfer, SplitPhase::Sending);

    let name = FileName::new(ROWS_FILE).map_err(std::io::Error::other)?;
    let source = ClosingSource::new(FileSource::new(&path).named(name), bytes, Arc::clone(closing));
    let mut options = SenderOptions::default();
    options.bytes_per_second = begun.intent.bytes_per_second.and_then(NonZeroU64::new);
    // The slots are held until it is decided, so there is nothing to be gained by giving up.
    options.give_up_after = None;
    let sender = SnapshotSender::connect(&begun.intent.target_addresses.grpc)?
        .options(options)
        .transfers(splits.inner.transfers.clone());
    sender.send(what(splits, begun)?, source)?.join().await?;
    Ok(())
}

async fn size(path: &Path) -> std::io::Result<u64> {
    Ok(tokio::fs::metadata(path).await?.len())
}

fn what(splits: &Splits, begun: &Begun) -> Result<SnapshotToSend, Error> {
    let node = &splits.inner.node;
    let intent = &begun.intent;
    let source = SlotRange::new(intent.source_start, intent.source_end)?;
    Ok(SnapshotToSend {
        transfer_id: begun.transfer.clone(),
        source_shard: shard_id(source)?,
        target_shard: shard_id(begun.range)?,
        source_node: node.id().clone(),
        target_node: Some(begun.target.clone()),
        slots: begun.range,
        // There is no log: the epoch orders hand-overs of these slots, the time orders attempts at one.
        point: SnapshotPoint { term: intent.epoch, index: intent.begun_unix_ms },
        fence: None,
        priority: Priority::Split,
    })
}

/// The shard that holds `range`.
fn shard_id(range: SlotRange) -> Result<ShardId, Error> {
    Ok(ShardId::new(format!("slots-{range}"))?)
}

fn claim(begun: &Begun) -> Claim {
    Claim { range: begun.range, owner: begun.target.clone(), epoch: begun.intent.epoch }
}

/// The target owns the slots: this node gives them up. Tried until it is durable, since there is no way back.
async fn commit(splits: &Splits, begun: &Begun, writes: GateHold) -> End {
    let transfer = begun.transfer.to_string();
    loop {
        let given =
            splits.inner.node.give_up_for(begun.range, vec![claim(begun)], Some(transfer.clone())).await;
        match given {
            Ok(()) => break,
            Err(error) => {
                splits.failed(&begun.transfer, &error);
                tokio::time::sleep(ASK_AGAIN).await;
            }
        }
    }
    drop(writes);
    End::Done
}

/// The transfer ended with an error that is final: finds out whether the target has taken over all the same, and
/// undoes the split only if it has not and will not.
async fn resolve(splits: &Splits, begun: &Begun, writes: GateHold, was_resumed: bool) -> End {
    let address = begun.intent.target_addresses.grpc.as_str();
    let transfer = &begun.transfer;
    loop {
        match ask_until_answered(address, transfer.as_str(), |error| splits.failed(transfer, error)).await {
            Answer::Installed => return commit(splits, begun, writes).await,
            Answer::Ended => break,
            // It was refused before the target accepted anything, by the same process that began it.
            Answer::Unknown if !was_resumed => break,
            Answer::Unknown => {
                // A target that lost its disk, or its history, would say the same: no evidence.
                splits.failed(
                    transfer,
                    format!(
                        "node {} knows nothing of a split that an earlier process began; its slots stay held until it does",
                        begun.target
                    ),
                );
            }
            Answer::Partial => match cancel(address, transfer.as_str()).await {
                Ok(()) => continue,
                Err(error) => splits.failed(transfer, error),
            },
            Answer::Installing => {}
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
    let transfer = begun.transfer.to_string();
    while let Err(error) = splits.inner.node.store().remove_split(transfer.clone()).await {
        splits.failed(&begun.transfer, &error);
        tokio::time::sleep(ASK_AGAIN).await;
    }
    drop(writes);
    End::Undone
}

//! One split, from the hold to the hand-over.

use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proto::common::error::Error;
use proto::common::ids::ShardId;
use proto::common::path::FileName;
use proto::common::slots::RECLAIM_STEP;
use proto::node::Priority;
use proto::snapshot::sender::{SenderOptions, SnapshotToSend};
use proto::snapshot::spec::SnapshotPoint;
use proto::snapshot::{FileSource, SnapshotSender};

use super::outcome::{Answer, Taken, Target, Unanswered, ask_until_answered, cancel, taken};
use super::receive::{ROWS_FILE, split_shard};
use super::source::{Closing, ClosingSource};
use super::{Begun, Resolution, SplitPhase, Splits, rows_file};
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
    begun.ended.cancel();
    if let Err(error) = tokio::fs::remove_file(&path).await
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "the snapshot of a split cannot be removed");
    }
}

fn path(splits: &Splits, begun: &Begun) -> std::path::PathBuf {
    rows_file(&splits.inner.directory, begun.transfer.as_str())
}

async fn decide(splits: &Splits, begun: &Begun, resumed: Option<GateHold>) -> End {
    let node = &splits.inner.node;
    let was_resumed = resumed.is_some();
    let transfer = &begun.transfer;
    // Held from here until it is decided, whatever else is held beside it.
    let writes = match &resumed {
        Some(_) => node.gate().hold_undrained(begun.range, HoldMode::Writes),
        None => node.hold_writes(begun.range).await,
    };
    if was_resumed {
        splits.enter(transfer, SplitPhase::Asking);
        match ask(splits, begun).await {
            Told::Answer(Answer::Installed) => return commit(splits, begun, writes).await,
            Told::Resolution(resolution) => return settle(splits, begun, writes, resolution).await,
            // Nothing of it was merged there, or it goes on: the same transfer, again.
            Told::Answer(Answer::Installing | Answer::Partial | Answer::Ended | Answer::Unknown) => {}
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
            if !was_resumed && error.before_sending() {
                return undo(splits, begun, writes).await;
            }
            splits.enter(transfer, SplitPhase::Asking);
            resolve(splits, begun, writes).await
        }
    }
}

/// What is known of a split whose outcome was not.
enum Told {
    Answer(Answer),
    Resolution(Resolution),
}

/// Asks the target until it answers, or the operator says what became of it.
async fn ask(splits: &Splits, begun: &Begun) -> Told {
    let (transfer, intent) = (&begun.transfer, &begun.intent);
    let unanswered = |unanswered: &Unanswered| {
        let phase = match unanswered {
            Unanswered::Failed(_) => SplitPhase::Asking,
            Unanswered::Stranger { .. } => SplitPhase::NeedsOperator,
        };
        splits.enter(transfer, phase);
        splits.failed(transfer, unanswered);
    };
    let target = target(splits, begun);
    tokio::select! {
        biased;
        resolution = begun.resolution() => Told::Resolution(resolution),
        answer = ask_until_answered(&target, transfer.as_str(), &intent.target_store, unanswered) => {
            splits.enter(transfer, SplitPhase::Asking);
            Told::Answer(answer)
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

impl SendError {
    /// Whether nothing has left this node.
    fn before_sending(&self) -> bool {
        matches!(self, Self::Export(_) | Self::Io(_))
    }
}

async fn send(splits: &Splits, begun: &Begun, closing: &Arc<Closing>) -> Result<(), SendError> {
    let node = &splits.inner.node;
    let path = path(splits, begun);
    if !tokio::fs::try_exists(&path).await? {
        splits.enter(&begun.transfer, SplitPhase::Exporting);
        let ownership = node.gate().ownership();
        // The target believes nobody else's address.
        let mut nodes = node.nodes();
        nodes.retain(|id, _| id == node.id());
        let handover = Handover::new(&ownership, &claim(begun), &nodes);
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
    options.target_store = Some(begun.intent.target_store.clone().into());
    let sender = SnapshotSender::new(target(splits, begun).dial()?)
        .options(options)
        .transfers(splits.inner.transfers.clone());
    sender.send(what(splits, begun)?, source)?.join().await?;
    Ok(())
}

async fn size(path: &Path) -> std::io::Result<u64> {
    Ok(tokio::fs::metadata(path).await?.len())
}

/// The way to the target.
fn target(splits: &Splits, begun: &Begun) -> Target {
    Target {
        dialer: splits.inner.node.trust().dialer(),
        address: begun.intent.target_addresses.grpc.clone(),
        node: begun.target.clone(),
    }
}

fn what(splits: &Splits, begun: &Begun) -> Result<SnapshotToSend, Error> {
    let node = &splits.inner.node;
    let intent = &begun.intent;
    let source = SlotRange::new(intent.source_start, intent.source_end)?;
    Ok(SnapshotToSend {
        transfer_id: begun.transfer.clone(),
        source_shard: ShardId::new(format!("slots-{source}"))?,
        target_shard: split_shard(begun.range, node.id())?,
        source_node: node.id().clone(),
        target_node: Some(begun.target.clone()),
        slots: begun.range,
        // There is no log: the epoch orders hand-overs of these slots, the time orders attempts at one.
        point: SnapshotPoint { term: intent.epoch, index: intent.begun_unix_ms },
        fence: None,
        priority: Priority::Split,
    })
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
async fn resolve(splits: &Splits, begun: &Begun, writes: GateHold) -> End {
    let transfer = &begun.transfer;
    loop {
        match ask(splits, begun).await {
            Told::Resolution(resolution) => return settle(splits, begun, writes, resolution).await,
            Told::Answer(Answer::Installed) => return commit(splits, begun, writes).await,
            // Nothing is on its way there any more, so what the very store that the split began with says of the slots is the last word. The
            // hand-over is committed there with the import; the transfer that brought it, a newer one may have replaced, and others pushed out of the
            // history.
            Told::Answer(Answer::Ended | Answer::Unknown) => {
                let (node, intent) = (&splits.inner.node, &begun.intent);
                match taken(&target(splits, begun), node.id(), &claim(begun), &intent.target_store).await {
                    Ok(Taken::No) => break,
                    Ok(Taken::Yes) => return commit(splits, begun, writes).await,
                    Ok(Taken::Unclear) => {
                        splits.enter(transfer, SplitPhase::NeedsOperator);
                        splits.failed(
                            transfer,
                            format!(
                                "node {} does not say of one and all of these slots whether it took them over: say SPLIT RESOLVE",
                                begun.target
                            ),
                        );
                    }
                    Err(unanswered) => splits.failed(transfer, &unanswered),
                }
            }
            Told::Answer(Answer::Partial) => match cancel(&target(splits, begun), transfer.as_str()).await {
                Ok(()) => continue,
                Err(error) => splits.failed(transfer, error),
            },
            Told::Answer(Answer::Installing) => {}
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
    undo(splits, begun, writes).await
}

/// The target has not taken over, and will not: everything is as before.
async fn undo(splits: &Splits, begun: &Begun, writes: GateHold) -> End {
    let transfer = begun.transfer.to_string();
    while let Err(error) = splits.inner.node.store().remove_split(transfer.clone()).await {
        splits.failed(&begun.transfer, &error);
        tokio::time::sleep(ASK_AGAIN).await;
    }
    drop(writes);
    End::Undone
}

/// Does as the operator says.
async fn settle(splits: &Splits, begun: &Begun, writes: GateHold, resolution: Resolution) -> End {
    tracing::warn!(transfer = %begun.transfer, slots = %begun.range, ?resolution, "the operator decides a split");
    match resolution {
        Resolution::Give => commit(splits, begun, writes).await,
        Resolution::Keep => {
            // Above what the target may have been given, and may have handed on: should it come back, its claim is the older one.
            let node = &splits.inner.node;
            let epoch = begun.intent.epoch.saturating_add(RECLAIM_STEP);
            let claim = Claim { range: begun.range, owner: node.id().clone(), epoch };
            while let Err(error) = node.keep_for(claim.clone(), begun.transfer.to_string()).await {
                splits.failed(&begun.transfer, &error);
                tokio::time::sleep(ASK_AGAIN).await;
            }
            drop(writes);
            End::Undone
        }
    }
}

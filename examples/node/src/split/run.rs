//! One split, from the hold to the hand-over.

use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proto::common::error::Error;
use proto::common::path::FileName;
use proto::common::slots::RECLAIM_STEP;
use proto::snapshot::sender::SenderOptions;
use proto::snapshot::{FileSource, SnapshotSender};

use super::outcome::{Answer, Taken, Target, Unanswered, ask_until_answered, cancel, taken};
use super::receive::ROWS_FILE;
use super::source::{Closing, ClosingSource};
use super::{Begun, Resolution, SplitPhase, Splits, rows_file};
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
        match unless_resolved(begun, ask(splits, begun)).await {
            Err(resolution) => return settle(splits, begun, writes, resolution).await,
            // Nothing more is to be sent.
            Ok(Answer::Installed | Answer::Anothers) => return resolve(splits, begun, writes).await,
            // Nothing of it was merged there, or it goes on: the same transfer, again.
            Ok(Answer::Installing | Answer::Partial | Answer::Ended | Answer::Unknown) => {}
        }
    }
    let closing = Closing::new(node.gate().clone(), begun.range);
    if was_resumed {
        // The target may have all but the `End`: what closed the gate then must stay closed.
        closing.close().await;
    }
    drop(resumed);

    match unless_resolved(begun, send(splits, begun, &closing)).await {
        Err(resolution) => settle(splits, begun, writes, resolution).await,
        Ok(Ok(())) => commit(splits, begun, writes).await,
        Ok(Err(error)) => {
            splits.failed(transfer, &error);
            if !was_resumed && error.before_sending() {
                return undo(splits, begun, writes).await;
            }
            splits.enter(transfer, SplitPhase::Asking);
            resolve(splits, begun, writes).await
        }
    }
}

/// What the target keeps `asked` waiting for, unless the operator says meanwhile what became of the split.
async fn unless_resolved<T>(begun: &Begun, asked: impl Future<Output = T>) -> Result<T, Resolution> {
    tokio::select! {
        biased;
        resolution = begun.resolution() => Err(resolution),
        told = asked => Ok(told),
    }
}

/// Asks the target until it answers.
async fn ask(splits: &Splits, begun: &Begun) -> Answer {
    let unanswered = |unanswered: &Unanswered| {
        let phase = match unanswered {
            Unanswered::Failed(_) => SplitPhase::Asking,
            Unanswered::Stranger { .. } => SplitPhase::NeedsOperator,
        };
        splits.enter(&begun.transfer, phase);
        splits.failed(&begun.transfer, unanswered);
    };
    let target = target(splits, begun);
    ask_until_answered(&target, &begun.snapshot, &begun.intent.target_store, unanswered).await
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
    sender.send(begun.snapshot.clone(), source)?.join().await?;
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

/// The transfer ended with an error that is final, or before this process began: finds out whether the target has taken over, and
/// undoes the split only if it has not and will not.
async fn resolve(splits: &Splits, begun: &Begun, writes: GateHold) -> End {
    match unless_resolved(begun, has_taken(splits, begun)).await {
        Err(resolution) => settle(splits, begun, writes, resolution).await,
        Ok(true) => commit(splits, begun, writes).await,
        Ok(false) => undo(splits, begun, writes).await,
    }
}

/// Asks until it is known whether the target has taken over.
async fn has_taken(splits: &Splits, begun: &Begun) -> bool {
    let transfer = &begun.transfer;
    let target = target(splits, begun);
    loop {
        let answer = ask(splits, begun).await;
        let mut phase = SplitPhase::Asking;
        match answer {
            // Nothing is on its way there any more, so what the very store that the split began with says of the slots is the last word, also where a transfer
            // is said to be installed. The hand-over is committed there with the import; the transfer that brought it, a newer one may have
            // replaced, and others pushed out of the history.
            Answer::Installed | Answer::Ended | Answer::Unknown | Answer::Anothers => {
                let (node, intent) = (&splits.inner.node, &begun.intent);
                let taken = taken(&target, node.id(), &claim(begun), &intent.target_store).await;
                match (taken, answer) {
                    (Ok(Taken::No), _) => return false,
                    // That others have the slots now is no proof that the target ever did, unless it says that it took them.
                    (Ok(Taken::Yes), _) | (Ok(Taken::Elsewhere), Answer::Installed) => return true,
                    (Ok(Taken::Elsewhere | Taken::Unclear), _) => {
                        phase = SplitPhase::NeedsOperator;
                        splits.failed(
                            transfer,
                            format!(
                                "node {} does not say of one and all of these slots whether it took them over: say SPLIT RESOLVE",
                                begun.target
                            ),
                        );
                    }
                    (Err(unanswered), _) => splits.failed(transfer, &unanswered),
                }
            }
            Answer::Partial => {
                if let Err(error) = cancel(&target, transfer.as_str()).await {
                    splits.failed(transfer, error);
                }
            }
            Answer::Installing => {}
        }
        splits.enter(transfer, phase);
        tokio::time::sleep(ASK_AGAIN).await;
    }
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

#[cfg(test)]
mod tests {
    use proto::common::guard::RangeGuard;
    use proto::common::ids::TransferId;
    use proto::common::text::hex;
    use proto::node::split_snapshot_service_server::{SplitSnapshotService, SplitSnapshotServiceServer};
    use proto::node::{
        CancelTransferRequest, CancelTransferResponse, Direction, GetTransferProgressRequest,
        GetTransferProgressResponse, ListTransfersRequest, ListTransfersResponse, NodeIdentity,
        TransferPhase, TransferProgress, TransferSplitSnapshotRequest, TransferSplitSnapshotResponse,
        WatchTransferProgressRequest, WatchTransferProgressResponse,
    };
    use proto::snapshot::Reason;
    use proto::snapshot::transfers::Transfers;
    use tokio::net::TcpListener;
    use tokio::sync::watch;
    use tokio_util::sync::CancellationToken;
    use tonic::transport::server::TcpIncoming;
    use tonic::{Request, Response, Status, Streaming};

    use super::*;
    use crate::common::SlotRange;
    use crate::gate::{Access, Verdict};
    use crate::node::Node;
    use crate::split::SplitRequest;
    use crate::store::{Init, NodeAddresses, SplitIntent, StoreOptions};

    /// A target that refuses the transfer of a split, or takes it and never says anything, tells of it when it may, and never answers who cancels it, or says that it is too late.
    struct Hangs {
        takes: bool,
        store: Vec<u8>,
        told: Option<TransferProgress>,
        asked: watch::Sender<bool>,
        may_tell: watch::Receiver<bool>,
        asked_to_cancel: watch::Sender<bool>,
    }

    #[tonic::async_trait]
    impl SplitSnapshotService for Hangs {
        type TransferSplitSnapshotStream = tokio_stream::Empty<Result<TransferSplitSnapshotResponse, Status>>;
        type WatchTransferProgressStream = tokio_stream::Empty<Result<WatchTransferProgressResponse, Status>>;

        async fn transfer_split_snapshot(
            &self,
            _: Request<Streaming<TransferSplitSnapshotRequest>>,
        ) -> Result<Response<Self::TransferSplitSnapshotStream>, Status> {
            if self.takes {
                std::future::pending::<()>().await;
            }
            Err(Reason::SpecificationMismatch.error("it says").into())
        }

        async fn get_transfer_progress(
            &self,
            _: Request<GetTransferProgressRequest>,
        ) -> Result<Response<GetTransferProgressResponse>, Status> {
            self.asked.send_replace(true);
            self.may_tell.clone().wait_for(|may| *may).await.map_err(|_| Status::cancelled("it ends"))?;
            let node = NodeIdentity {
                node_id: "n2".into(),
                store_id: self.store.clone().into(),
                ..NodeIdentity::default()
            };
            let Some(told) = self.told.clone() else {
                let error = Reason::TransferNotFound.error("it says").metadata("node_id", "n2");
                return Err(error.metadata("store_id", hex(&self.store)).into());
            };
            Ok(Response::new(GetTransferProgressResponse { transfer: Some(told), node: Some(node) }))
        }

        async fn watch_transfer_progress(
            &self,
            _: Request<WatchTransferProgressRequest>,
        ) -> Result<Response<Self::WatchTransferProgressStream>, Status> {
            Err(Status::unimplemented("not asked here"))
        }

        async fn list_transfers(
            &self,
            _: Request<ListTransfersRequest>,
        ) -> Result<Response<ListTransfersResponse>, Status> {
            Err(Status::unimplemented("not asked here"))
        }

        async fn cancel_transfer(
            &self,
            _: Request<CancelTransferRequest>,
        ) -> Result<Response<CancelTransferResponse>, Status> {
            self.asked_to_cancel.send_replace(true);
            if self.takes {
                let too_late = Reason::TooLateToCancel.error("it says");
                return Err(too_late.metadata("phase", TransferPhase::Installing.as_str_name()).into());
            }
            std::future::pending().await
        }
    }

    fn source(dir: &Path, slots: SlotRange) -> Node {
        let init = Init { node: "n1".parse().unwrap(), slots: Some(vec![slots]), others: vec![] };
        Node::open(dir, &init, &StoreOptions::default()).unwrap()
    }

    async fn serve(target: Hangs) -> (String, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = tonic::transport::Server::builder().add_service(SplitSnapshotServiceServer::new(target));
        let serving = server.serve_with_incoming(TcpIncoming::from(listener));
        (address, tokio::spawn(async { serving.await.unwrap() }))
    }

    /// Away and back while the target is asked who it is, so that they are of this node as before, at an epoch above that of the split.
    #[tokio::test]
    async fn slots_that_changed_hands_meanwhile_are_not_split() {
        let dir = tempfile::tempdir().unwrap();
        let range: SlotRange = "100-199".parse().unwrap();
        let node = source(dir.path(), range);
        let (asked, mut was_asked) = watch::channel(false);
        let (tell, may_tell) = watch::channel(false);
        let asked_to_cancel = watch::Sender::new(false);
        let (grpc, serving) =
            serve(Hangs { takes: false, store: vec![7; 16], told: None, asked, may_tell, asked_to_cancel })
                .await;
        let stop = CancellationToken::new();
        let splits =
            Splits::new(node.clone(), Transfers::default(), RangeGuard::new(), stop.clone()).unwrap();
        let request = SplitRequest {
            slot: 100,
            target: "n2".parse().unwrap(),
            target_addresses: NodeAddresses { grpc, resp: String::new() },
            bytes_per_second: None,
        };
        let starting = tokio::spawn({
            let (splits, request) = (splits.clone(), request.clone());
            async move { splits.start(request).await }
        });
        was_asked.wait_for(|asked| *asked).await.unwrap();
        let epoch = node.gate().ownership().highest_epoch(range) + 2;
        node.keep_for(Claim { range, owner: node.id().clone(), epoch }, "x".to_owned()).await.unwrap();
        tell.send_replace(true);
        let error = starting.await.unwrap().unwrap_err();
        assert!(error.to_string().contains("slots 100-199 changed hands meanwhile"), "{error}");
        assert!(splits.list().is_empty() && node.store().splits().unwrap().is_empty());
        assert_eq!(node.gate().verdict(100, Access::Write), Verdict::Pass);
        // Nothing of it is in the way of the next one.
        splits.start(request).await.unwrap();
        assert_eq!(node.store().splits().unwrap()[0].epoch, epoch + 1);
        stop.cancel();
        splits.join().await;
        serving.abort();
    }

    /// A split of slots 100-199 of n1 that was begun before this process, and a target that says that the transfer is in this phase.
    async fn resumed(dir: &Path, takes: bool, phase: TransferPhase) -> Resumed {
        let range: SlotRange = "100-199".parse().unwrap();
        let node = source(dir, range);
        let told = TransferProgress {
            transfer_id: "split-1".into(),
            phase: phase.into(),
            source_shard_id: "slots-100-199".into(),
            target_shard_id: "slots-100-199-n1".into(),
            source_node_id: "n1".into(),
            slots: Some(range.into()),
            snapshot_index: 1,
            snapshot_term: 2,
            ..TransferProgress::default()
        };
        let (asked_to_cancel, cancel) = watch::channel(false);
        let (tell, may_tell) = watch::channel(true);
        let asked = watch::Sender::new(false);
        let (grpc, serving) =
            serve(Hangs { takes, store: vec![7; 16], told: Some(told), asked, may_tell, asked_to_cancel })
                .await;
        let intent = SplitIntent {
            transfer: "split-1".into(),
            start: range.start(),
            end: range.end(),
            target: "n2".into(),
            target_addresses: NodeAddresses { grpc, resp: String::new() },
            target_store: vec![7; 16],
            epoch: 2,
            source_start: range.start(),
            source_end: range.end(),
            begun_unix_ms: 1,
            bytes_per_second: None,
        };
        node.store().put_split(intent).await.unwrap();
        let stop = CancellationToken::new();
        let transfers = Transfers::default();
        let splits = Splits::new(node.clone(), transfers.clone(), RangeGuard::new(), stop.clone()).unwrap();
        splits.resume().unwrap();
        Resumed { node, transfers, splits, cancel, serving, stop, _tell: tell }
    }

    struct Resumed {
        node: Node,
        transfers: Transfers,
        splits: Splits,
        /// Whether the target was asked to cancel.
        cancel: watch::Receiver<bool>,
        serving: tokio::task::JoinHandle<()>,
        stop: CancellationToken,
        _tell: watch::Sender<bool>,
    }

    impl Resumed {
        async fn is_cancelled(&mut self) {
            let minute = Duration::from_secs(60);
            tokio::time::timeout(minute, self.cancel.wait_for(|asked| *asked)).await.unwrap().unwrap();
        }

        /// Well before the target is not waited for any more, the slots are kept.
        async fn keeps(self) {
            assert_eq!(self.node.gate().verdict(100, Access::Write), Verdict::Held);
            let told = self.splits.resolve("split-1", Resolution::Keep);
            let told = tokio::time::timeout(Duration::from_secs(15), told);
            told.await.expect("the target is waited for").unwrap();
            assert_eq!(self.splits.list()[0].phase, SplitPhase::Undone);
            self.stop.cancel();
            self.splits.join().await;
            self.serving.abort();
        }
    }

    #[tokio::test]
    async fn the_operator_decides_whatever_the_target_keeps_waiting_for() {
        let dir = tempfile::tempdir().unwrap();
        let mut split = resumed(dir.path(), false, TransferPhase::Transferring).await;
        split.is_cancelled().await;
        let node = split.node.clone();
        split.keeps().await;
        assert_eq!(node.gate().verdict(100, Access::Write), Verdict::Pass);
    }

    #[tokio::test]
    async fn the_operator_decides_where_a_target_neither_ends_a_transfer_nor_lets_it_be_cancelled() {
        let dir = tempfile::tempdir().unwrap();
        let mut split = resumed(dir.path(), true, TransferPhase::Installing).await;
        let id: TransferId = "split-1".parse().unwrap();
        let sending = async {
            while split.splits.list()[0].phase != SplitPhase::Sending
                || split.transfers.registry().get(Some(Direction::Out), "split-1").is_none()
            {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), sending).await.unwrap();
        // Before it was cancelled, nobody is to decide what the target has not got yet.
        let refused = split.splits.resolve("split-1", Resolution::Keep).await.unwrap_err();
        assert!(refused.to_string().contains("cancel its transfer first"), "{refused}");
        assert!(split.transfers.cancel(&id));
        split.is_cancelled().await;
        // Nor before the target has said what it makes of that.
        let too_late = async {
            while !split.transfers.cannot_be_cancelled(&id) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), too_late).await.unwrap();
        assert_eq!(split.splits.list()[0].phase, SplitPhase::Sending);
        let (node, transfers) = (split.node.clone(), split.transfers.clone());
        split.keeps().await;
        assert!(!transfers.cannot_be_cancelled(&id), "it goes on");
        let passes = async {
            while node.gate().verdict(100, Access::Write) != Verdict::Pass {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), passes).await.expect("the slots stay held");
    }
}

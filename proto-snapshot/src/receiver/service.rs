//! The five calls of the service.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use proto_common::access::Caller;
use proto_common::error::{CommonReason, Error};
use proto_common::ids::TransferId;
use proto_common::v1::{Direction, NodeIdentity};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::completion::shutting_down;
use super::handshake::Frames;
use super::incoming::{Incoming, Stage, cancelled};
use super::session::Answers;
use super::{Inner, SnapshotReceiver};
use crate::reason::Reason;
use crate::spec::{TransferSpec, id};
use crate::store::SnapshotStore;
use crate::v1::split_snapshot_service_server::SplitSnapshotService;
use crate::v1::{
    CancelTransferRequest, CancelTransferResponse, GetTransferProgressRequest, GetTransferProgressResponse,
    ListTransfersRequest, ListTransfersResponse, TransferPhase, TransferProgress,
    TransferSplitSnapshotRequest, TransferSplitSnapshotResponse, WatchTransferProgressRequest,
    WatchTransferProgressResponse,
};

/// Answers of one stream that may wait for the peer to read them.
const ANSWERS: usize = 32;
/// How much of a cancel's reason is kept, in bytes.
const MAX_CANCEL_REASON: usize = 256;
/// How long a cancel waits for the end of a transfer that this node sends: the sender waits for its receiver for 30 s, and knows then whether it came in time.
const OUTGOING_PATIENCE: Duration = Duration::from_secs(35);

type Answered<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl<S: SnapshotStore> SplitSnapshotService for SnapshotReceiver<S> {
    type TransferSplitSnapshotStream = ReceiverStream<Result<TransferSplitSnapshotResponse, Status>>;
    type WatchTransferProgressStream = Answered<WatchTransferProgressResponse>;

    async fn transfer_split_snapshot(
        &self,
        request: Request<Streaming<TransferSplitSnapshotRequest>>,
    ) -> Result<Response<Self::TransferSplitSnapshotStream>, Status> {
        if self.inner.stopping.is_cancelled() {
            return Err(shutting_down().into());
        }
        let caller = Caller::of(request.extensions())?;
        let (sender, answers) = mpsc::channel(ANSWERS);
        let frames = Frames::new(request);
        // Not in the handler: its future is dropped when the peer disconnects, and writers must end in order.
        self.inner.tasks.spawn(Arc::clone(&self.inner).serve(
            frames,
            caller,
            Answers::new(sender, self.inner.limits.idle),
        ));
        Ok(Response::new(ReceiverStream::new(answers)))
    }

    async fn get_transfer_progress(
        &self,
        request: Request<GetTransferProgressRequest>,
    ) -> Result<Response<GetTransferProgressResponse>, Status> {
        let GetTransferProgressRequest { transfer_id, direction } = request.into_inner();
        let id = transfer_id_of(&transfer_id)?;
        let transfer = self.inner.get(wanted(direction)?, &id)?;
        Ok(Response::new(GetTransferProgressResponse {
            transfer: Some(transfer),
            node: Some(self.inner.identity.clone()),
        }))
    }

    async fn watch_transfer_progress(
        &self,
        request: Request<WatchTransferProgressRequest>,
    ) -> Result<Response<Self::WatchTransferProgressStream>, Status> {
        let peer = Caller::of(request.extensions())?.peer().key();
        let WatchTransferProgressRequest { transfer_id, direction } = request.into_inner();
        let id = transfer_id_of(&transfer_id)?;
        let direction = self.inner.meant(wanted(direction)?, &id);
        let registry = self.inner.transfers.registry();
        let watch = registry.watch_for(&peer, direction, id.as_str()).map_err(|error| {
            if error.is(CommonReason::LimitExceeded) {
                error.under(Reason::TooManyWatchers)
            } else {
                self.inner.not_found(&id)
            }
        })?;
        let stopping = self.inner.stopping.clone();
        let states = futures::stream::unfold(Some((watch, stopping)), |open| async move {
            let (mut watch, stopping) = open?;
            tokio::select! {
                biased;
                transfer = watch.next() => {
                    let answer = WatchTransferProgressResponse { transfer: Some(transfer?) };
                    Some((Ok(answer), Some((watch, stopping))))
                }
                // Not the end of the transfer, so not the end of a stream that went well.
                () = stopping.cancelled() => Some((Err(shutting_down().into()), None)),
            }
        });
        Ok(Response::new(Box::pin(states)))
    }

    async fn list_transfers(
        &self,
        request: Request<ListTransfersRequest>,
    ) -> Result<Response<ListTransfersResponse>, Status> {
        let ListTransfersRequest { page_size, page_token, direction, active_only } = request.into_inner();
        let direction = wanted(direction)?;
        let size = if page_size == 0 { 100 } else { page_size };
        let page = self.inner.transfers.registry().list(
            |of, transfer| {
                direction.is_none_or(|wanted| wanted == of) && !(active_only && transfer.is_finished())
            },
            size,
            &page_token,
        );
        let page = page.map_err(Status::from)?;
        Ok(Response::new(ListTransfersResponse {
            transfers: page.items,
            next_page_token: page.next_page_token,
        }))
    }

    async fn cancel_transfer(
        &self,
        request: Request<CancelTransferRequest>,
    ) -> Result<Response<CancelTransferResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let CancelTransferRequest { transfer_id, direction, reason } = request.into_inner();
        let id = transfer_id_of(&transfer_id)?;
        let direction = wanted(direction)?;
        self.inner.may_cancel(&caller, direction, &id)?;
        let reason = proto_common::text::printable(&reason, MAX_CANCEL_REASON);
        // Those that wait end with their calls. A removal that has begun goes on when its caller hangs up.
        let turn = self.inner.cancelling.of(&id).lock_owned().await;
        let inner = Arc::clone(&self.inner);
        let cancelling = self.inner.tasks.spawn(async move {
            let _turn = turn;
            inner.cancel(&caller, &id, direction, &reason).await
        });
        let transfer = cancelling
            .await
            .map_err(|error| Reason::Internal.error("the cancellation panicked").caused_by(error))
            .and_then(|result| result)?;
        Ok(Response::new(CancelTransferResponse { transfer: Some(transfer) }))
    }
}

impl<S: SnapshotStore> Inner<S> {
    /// The direction of the transfer that is meant: where none is given, incoming if there is one.
    fn meant(&self, direction: Option<Direction>, id: &TransferId) -> Option<Direction> {
        direction.or_else(|| {
            self.transfers.registry().get(Some(Direction::In), id.as_str()).map(|_| Direction::In)
        })
    }

    fn get(&self, direction: Option<Direction>, id: &TransferId) -> Result<TransferProgress, Error> {
        let direction = self.meant(direction, id);
        self.transfers.registry().get(direction, id.as_str()).ok_or_else(|| self.not_found(id))
    }

    /// Says who does not know it, since that is evidence only if it is who knew it before.
    fn not_found(&self, id: &TransferId) -> Error {
        let NodeIdentity { node_id, store_id, .. } = &self.identity;
        Reason::TransferNotFound
            .error(format!("no transfer {id} is active here or in the history"))
            .metadata("transfer_id", id.as_str())
            .metadata("node_id", node_id)
            .metadata("store_id", proto_common::text::hex(store_id))
    }

    /// Whether `caller` may cancel all that the call could mean, as far as it is shown yet.
    fn may_cancel(
        &self,
        caller: &Caller,
        direction: Option<Direction>,
        id: &TransferId,
    ) -> Result<(), Error> {
        for of in [Direction::In, Direction::Out] {
            if direction.is_some_and(|wanted| wanted != of) {
                continue;
            }
            let Some(shown) = self.transfers.registry().get(Some(of), id.as_str()) else { continue };
            // A transfer that this node sends is no other node's to stop: the receiver refuses it instead.
            let other_end = if of == Direction::In { shown.source_node_id.as_str() } else { "" };
            caller.is_party(&format!("transfer {id}"), other_end)?;
            caller.may_named([&shown.source_shard_id, &shown.target_shard_id], shown.slots)?;
        }
        Ok(())
    }

    async fn cancel(
        &self,
        caller: &Caller,
        id: &TransferId,
        direction: Option<Direction>,
        reason: &str,
    ) -> Result<TransferProgress, Error> {
        if direction != Some(Direction::Out)
            && let Some(cancelled) = self.cancel_incoming(caller, id, reason).await?
        {
            return Ok(cancelled);
        }
        if direction != Some(Direction::In)
            && let Some(cancel) = self.transfers.outgoing_cancel(id)
        {
            // It may have begun since the call was let through.
            self.may_cancel(caller, Some(Direction::Out), id)?;
            cancel.cancel();
            let mut watch = self.transfers.registry().watch(Some(Direction::Out), id.as_str())?;
            // A receiver that says that it is too late may take as long as it likes to end it.
            let _ = tokio::time::timeout(OUTGOING_PATIENCE, async { while watch.next().await.is_some() {} })
                .await;
        }
        let transfer = self.get(direction, id)?;
        match transfer.phase() {
            TransferPhase::Cancelled => Ok(transfer),
            phase => Err(Reason::TooLateToCancel
                .error(format!("the transfer is {}; it can no longer be cancelled", phase.short_name()))
                .metadata("phase", phase.as_str_name())),
        }
    }

    /// Cancels a transfer that is staged here, or is about to be, where `caller` may do that; `None` if there is none.
    async fn cancel_incoming(
        &self,
        caller: &Caller,
        id: &TransferId,
        reason: &str,
    ) -> Result<Option<TransferProgress>, Error> {
        let Some(slot) = self.slots().get(id).cloned() else { return Ok(None) };
        // Asked of what is found: a transfer that begins is shown only when it is staged, and its ID is known before.
        let may = |incoming: &Incoming<S::Staging>| {
            let TransferSpec { source_node, source_shard, target_shard, slots, .. } = &incoming.plan.spec;
            caller.is_party(&format!("transfer {id}"), source_node.as_str())?;
            caller.may(&[source_shard, target_shard], Some(*slots))
        };
        if let Some(incoming) = slot.get() {
            may(&incoming)?;
            self.close(&incoming, &cancelled()).await?;
        }
        // Whoever attaches has this; then there is something to cancel, or there is not.
        let _attach = slot.attach.lock().await;
        let Some(incoming) = slot.get() else { return Ok(None) };
        may(&incoming)?;
        self.close(&incoming, &cancelled()).await?;
        let message = if reason.is_empty() { "cancelled".to_owned() } else { format!("cancelled: {reason}") };
        let error = Reason::TransferCancelled.error(message);
        self.end(&incoming, TransferPhase::Cancelled, Some(&error)).await.map(Some)
    }

    /// Closes a transfer, tells its streams why, and waits until nobody works on it.
    pub(super) async fn close(&self, incoming: &Incoming<S::Staging>, why: &Error) -> Result<(), Error> {
        let before = incoming.close()?;
        incoming.stop_streams(why).await;
        if before == Stage::Verifying {
            // The check stops by itself when it sees that it was closed.
            let _ = incoming.outcome().wait_for(Option::is_some).await;
        }
        Ok(())
    }
}

fn transfer_id_of(text: &str) -> Result<TransferId, Error> {
    id("transfer_id", text, |text| TransferId::new(text))
}

/// The direction that a request asks for; none where it leaves that open.
fn wanted(direction: i32) -> Result<Option<Direction>, Error> {
    match Direction::try_from(direction) {
        Ok(Direction::Unspecified) => Ok(None),
        Ok(direction) => Ok(Some(direction)),
        Err(_) => Err(Reason::InvalidField.field("direction", format!("{direction} is not known"))),
    }
}

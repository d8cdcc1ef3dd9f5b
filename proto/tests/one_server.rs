//! Our services and a foreign one on one server and port, as in the README.
#![cfg(all(feature = "snapshot", feature = "client", feature = "server", feature = "transport"))]

use proto::common::tuning::{endpoint, server};
use proto::node::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto::node::split_snapshot_service_server::{SplitSnapshotService, SplitSnapshotServiceServer};
use proto::node::{
    CancelTransferRequest, CancelTransferResponse, GetTransferProgressRequest, GetTransferProgressResponse,
    ListTransfersRequest, ListTransfersResponse, TransferProgress, TransferSplitSnapshotRequest,
    TransferSplitSnapshotResponse, WatchTransferProgressRequest, WatchTransferProgressResponse,
};
use raft::raft_service_client::RaftServiceClient;
use raft::raft_service_server::{RaftService, RaftServiceServer};
use raft::{RequestVoteRequest, RequestVoteResponse};
use tokio_stream::Empty;
use tonic::{Code, Request, Response, Status, Streaming};

struct Voter;

#[tonic::async_trait]
impl RaftService for Voter {
    async fn request_vote(
        &self,
        request: Request<RequestVoteRequest>,
    ) -> Result<Response<RequestVoteResponse>, Status> {
        Ok(Response::new(RequestVoteResponse { term: request.into_inner().term, granted: true }))
    }
}

/// Knows one transfer, and nothing else.
struct OneTransfer;

#[tonic::async_trait]
impl SplitSnapshotService for OneTransfer {
    type TransferSplitSnapshotStream = Empty<Result<TransferSplitSnapshotResponse, Status>>;
    type WatchTransferProgressStream = Empty<Result<WatchTransferProgressResponse, Status>>;

    async fn transfer_split_snapshot(
        &self,
        _: Request<Streaming<TransferSplitSnapshotRequest>>,
    ) -> Result<Response<Self::TransferSplitSnapshotStream>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn get_transfer_progress(
        &self,
        request: Request<GetTransferProgressRequest>,
    ) -> Result<Response<GetTransferProgressResponse>, Status> {
        let transfer_id = request.into_inner().transfer_id;
        if transfer_id != "t1" {
            return Err(Status::not_found(transfer_id));
        }
        let transfer = TransferProgress { transfer_id, ..Default::default() };
        Ok(Response::new(GetTransferProgressResponse { transfer: Some(transfer), node: None }))
    }

    async fn watch_transfer_progress(
        &self,
        _: Request<WatchTransferProgressRequest>,
    ) -> Result<Response<Self::WatchTransferProgressStream>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn list_transfers(
        &self,
        _: Request<ListTransfersRequest>,
    ) -> Result<Response<ListTransfersResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn cancel_transfer(
        &self,
        _: Request<CancelTransferRequest>,
    ) -> Result<Response<CancelTransferResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}

#[tokio::test]
async fn both_services_answer_on_one_port() -> Result<(), Box<dyn std::error::Error>> {
    let (mut server, incoming) = server(([127, 0, 0, 1], 0).into())?;
    let address = incoming.get_ref().local_addr()?.to_string();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tokio::spawn(
        server
            .add_service(SplitSnapshotServiceServer::new(OneTransfer))
            .add_service(RaftServiceServer::new(Voter))
            .serve_with_incoming_shutdown(incoming, async {
                let _ = stopped.await;
            }),
    );

    let channel = endpoint(&address)?.connect().await?;
    let mut raft = RaftServiceClient::new(channel.clone());
    let vote = raft.request_vote(RequestVoteRequest { term: 4 }).await?.into_inner();
    assert_eq!(vote, RequestVoteResponse { term: 4, granted: true });

    let mut snapshots = SplitSnapshotServiceClient::new(channel);
    let ask = |id: &str| GetTransferProgressRequest { transfer_id: id.to_owned(), ..Default::default() };
    let found = snapshots.get_transfer_progress(ask("t1")).await?.into_inner();
    assert_eq!(found.transfer.map(|transfer| transfer.transfer_id).as_deref(), Some("t1"));
    let missing = snapshots.get_transfer_progress(ask("t2")).await.expect_err("there is no t2");
    assert_eq!(missing.code(), Code::NotFound);

    drop((raft, snapshots));
    let _ = stop.send(());
    server.await??;
    Ok(())
}

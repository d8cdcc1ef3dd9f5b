//! tonic as it is generated, with our messages: at its default settings, what anybody would write first; and with our windows and frames.

use std::time::Instant;

use proto_common::checksum::crc64;
use proto_common::tuning::{endpoint, tune_server};
use proto_snapshot::v1::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto_snapshot::v1::split_snapshot_service_server::{SplitSnapshotService, SplitSnapshotServiceServer};
use proto_snapshot::v1::transfer_split_snapshot_request::{Chunk, Frame};
use proto_snapshot::v1::transfer_split_snapshot_response::{Frame as Answer, Installed};
use proto_snapshot::v1::{
    CancelTransferRequest, CancelTransferResponse, GetTransferProgressRequest, GetTransferProgressResponse,
    ListTransfersRequest, ListTransfersResponse, TransferSplitSnapshotRequest, TransferSplitSnapshotResponse,
    WatchTransferProgressRequest, WatchTransferProgressResponse,
};
use tokio::net::TcpListener;
use tokio_stream::Iter;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use crate::payload::Payload;
use crate::side::{Before, Sent, Side, report_when_asked};

type Answers<T> = Iter<std::array::IntoIter<Result<T, Status>, 1>>;

/// Names of the peer.
pub const DEFAULTS: &str = "tonic";
pub const TUNED: &str = "tonic, tuned";

struct Receiver;

#[tonic::async_trait]
impl SplitSnapshotService for Receiver {
    type TransferSplitSnapshotStream = Answers<TransferSplitSnapshotResponse>;
    type WatchTransferProgressStream = Answers<WatchTransferProgressResponse>;

    async fn transfer_split_snapshot(
        &self,
        request: Request<Streaming<TransferSplitSnapshotRequest>>,
    ) -> Result<Response<Self::TransferSplitSnapshotStream>, Status> {
        let mut frames = request.into_inner();
        let mut total_bytes = 0;
        while let Some(TransferSplitSnapshotRequest { frame }) = frames.message().await? {
            let Some(Frame::Chunk(chunk)) = frame else {
                return Err(Status::invalid_argument("not a chunk"));
            };
            if crc64(&chunk.payload) != chunk.crc64nvme {
                return Err(Status::data_loss("a checksum differs"));
            }
            total_bytes += chunk.payload.len() as u64;
        }
        let installed = Answer::Installed(Installed { total_bytes, ..Installed::default() });
        let answer = TransferSplitSnapshotResponse { frame: Some(installed) };
        Ok(Response::new(tokio_stream::iter([Ok(answer)])))
    }

    async fn get_transfer_progress(
        &self,
        _: Request<GetTransferProgressRequest>,
    ) -> Result<Response<GetTransferProgressResponse>, Status> {
        Err(Status::unimplemented("only the transfer is measured"))
    }

    async fn watch_transfer_progress(
        &self,
        _: Request<WatchTransferProgressRequest>,
    ) -> Result<Response<Self::WatchTransferProgressStream>, Status> {
        Err(Status::unimplemented("only the transfer is measured"))
    }

    async fn list_transfers(
        &self,
        _: Request<ListTransfersRequest>,
    ) -> Result<Response<ListTransfersResponse>, Status> {
        Err(Status::unimplemented("only the transfer is measured"))
    }

    async fn cancel_transfer(
        &self,
        _: Request<CancelTransferRequest>,
    ) -> Result<Response<CancelTransferResponse>, Status> {
        Err(Status::unimplemented("only the transfer is measured"))
    }
}

pub async fn receive(side: &Side) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut server = if side.peer == TUNED { tune_server(Server::builder()) } else { Server::builder() };
    let server = server.add_service(SplitSnapshotServiceServer::new(Receiver));
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true))));
    tokio::task::spawn_blocking(move || report_when_asked(address)).await.unwrap();
}

pub async fn send(side: &Side, address: &str) -> Sent {
    let payload = Payload::new();
    let before = Before::now();
    let began = Instant::now();
    let endpoint = match side.peer.as_str() {
        TUNED => endpoint(address).unwrap(),
        _ => Endpoint::from_shared(format!("http://{address}")).unwrap(),
    };
    let mut client = SplitSnapshotServiceClient::new(endpoint.connect().await.unwrap());
    let mut offset = 0;
    let frames = payload.pieces(side.bytes, side.chunk).map(move |payload| {
        let chunk = Chunk { file: 0, offset, crc64nvme: crc64(&payload), payload };
        offset += chunk.payload.len() as u64;
        TransferSplitSnapshotRequest { frame: Some(Frame::Chunk(chunk)) }
    });
    let mut answers = client.transfer_split_snapshot(tokio_stream::iter(frames)).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().frame;
    let Some(Answer::Installed(Installed { total_bytes, .. })) = answer else { panic!("{answer:?}") };
    assert_eq!(total_bytes, side.bytes, "all bytes are counted");
    Sent { seconds: began.elapsed().as_secs_f64(), usage: before.usage() }
}

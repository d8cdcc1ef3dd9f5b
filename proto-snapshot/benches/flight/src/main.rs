//! Arrow Flight's `DoPut` at its default settings, as one end of a transfer of `cargo bench -p proto-snapshot --bench transfer`.
//!
//! The payload goes into `data_body`, its checksum into `app_metadata`; the receiver checks it and answers once at the end.

#[path = "../../transfer/payload.rs"]
mod payload;
#[path = "../../transfer/side.rs"]
#[allow(dead_code, reason = "the other end uses the rest")]
mod side;

use std::time::Instant;

use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::flight_service_server::{FlightService, FlightServiceServer};
use arrow_flight::{
    Action, ActionType, Criteria, Empty, FlightData, FlightDescriptor, FlightInfo, HandshakeRequest,
    HandshakeResponse, PollInfo, PutResult, SchemaResult, Ticket,
};
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use crc_fast::crc64_nvme as crc64;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use payload::Payload;
use side::{Before, Sent, Side, report_when_asked, say};

struct Receiver;

type Answers<T> = BoxStream<'static, Result<T, Status>>;

fn unused<T>() -> Result<T, Status> {
    Err(Status::unimplemented("only DoPut is measured"))
}

#[tonic::async_trait]
impl FlightService for Receiver {
    type HandshakeStream = Answers<HandshakeResponse>;
    type ListFlightsStream = Answers<FlightInfo>;
    type DoGetStream = Answers<FlightData>;
    type DoPutStream = Answers<PutResult>;
    type DoExchangeStream = Answers<FlightData>;
    type DoActionStream = Answers<arrow_flight::Result>;
    type ListActionsStream = Answers<ActionType>;

    async fn do_put(
        &self,
        request: Request<Streaming<FlightData>>,
    ) -> Result<Response<Self::DoPutStream>, Status> {
        let mut data = request.into_inner();
        let mut bytes = 0_u64;
        while let Some(FlightData { app_metadata, data_body, .. }) = data.message().await? {
            if app_metadata != crc64(&data_body).to_le_bytes()[..] {
                return Err(Status::data_loss("a checksum differs"));
            }
            bytes += data_body.len() as u64;
        }
        let result = PutResult { app_metadata: Bytes::copy_from_slice(&bytes.to_le_bytes()) };
        Ok(Response::new(Box::pin(stream::iter([Ok(result)]))))
    }

    async fn handshake(
        &self,
        _: Request<Streaming<HandshakeRequest>>,
    ) -> Result<Response<Self::HandshakeStream>, Status> {
        unused()
    }

    async fn list_flights(&self, _: Request<Criteria>) -> Result<Response<Self::ListFlightsStream>, Status> {
        unused()
    }

    async fn get_flight_info(&self, _: Request<FlightDescriptor>) -> Result<Response<FlightInfo>, Status> {
        unused()
    }

    async fn poll_flight_info(&self, _: Request<FlightDescriptor>) -> Result<Response<PollInfo>, Status> {
        unused()
    }

    async fn get_schema(&self, _: Request<FlightDescriptor>) -> Result<Response<SchemaResult>, Status> {
        unused()
    }

    async fn do_get(&self, _: Request<Ticket>) -> Result<Response<Self::DoGetStream>, Status> {
        unused()
    }

    async fn do_exchange(
        &self,
        _: Request<Streaming<FlightData>>,
    ) -> Result<Response<Self::DoExchangeStream>, Status> {
        unused()
    }

    async fn do_action(&self, _: Request<Action>) -> Result<Response<Self::DoActionStream>, Status> {
        unused()
    }

    async fn list_actions(&self, _: Request<Empty>) -> Result<Response<Self::ListActionsStream>, Status> {
        unused()
    }
}

#[tokio::main]
async fn main() {
    let side = std::env::args().nth(1).and_then(|side| serde_json::from_str::<Side>(&side).ok());
    let Some(side) = side else {
        eprintln!("a part of `cargo bench -p proto-snapshot --bench transfer`, which starts it");
        std::process::exit(2);
    };
    match &side.address {
        None => {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
            let address = listener.local_addr().expect("it is bound");
            let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
            let server = Server::builder().add_service(FlightServiceServer::new(Receiver));
            tokio::spawn(server.serve_with_incoming(incoming));
            let report = tokio::task::spawn_blocking(move || report_when_asked(address));
            report.await.expect("it is asked");
        }
        Some(address) => say(serde_json::to_string(&send(&side, address).await).expect("numbers can be written")),
    }
}

async fn send(side: &Side, address: &str) -> Sent {
    let payload = Payload::new();
    let descriptor = FlightDescriptor::new_path(vec!["snapshot".to_owned()]);
    let before = Before::now();
    let began = Instant::now();
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("it is an address");
    let mut client = FlightServiceClient::new(endpoint.connect().await.expect("it connects"));
    let mut descriptor = Some(descriptor);
    let data = payload.pieces(side.bytes, side.chunk).map(move |piece| FlightData {
        flight_descriptor: descriptor.take(),
        app_metadata: Bytes::copy_from_slice(&crc64(&piece).to_le_bytes()),
        data_body: piece,
        ..FlightData::default()
    });
    let mut results = client.do_put(stream::iter(data)).await.expect("it is taken").into_inner();
    let result = results.message().await.expect("all arrived").expect("it is confirmed");
    assert_eq!(result.app_metadata, side.bytes.to_le_bytes()[..], "all bytes are counted");
    Sent { seconds: began.elapsed().as_secs_f64(), usage: before.usage() }
}

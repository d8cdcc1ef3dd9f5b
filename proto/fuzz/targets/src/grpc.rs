//! Raw bytes as the body of every call of every service: whatever comes, the call ends with a status that says why, and the next one is
//! served.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use proto_common::v1::NodeIdentity;
use proto_health::server::HealthRegistry;
use proto_migration::journal::Journal;
use proto_migration::receiver::MigrationReceiver;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};

use crate::harness::{block_on, directory, refusal};
use crate::sender;
use crate::support::memory_target::MemoryTarget;

const CALLS: [&str; 17] = [
    "snapshot.v1.SplitSnapshotService/TransferSplitSnapshot",
    "migration.v1.MigrationService/TransferMigrationData",
    "snapshot.v1.SplitSnapshotService/GetTransferProgress",
    "snapshot.v1.SplitSnapshotService/WatchTransferProgress",
    "snapshot.v1.SplitSnapshotService/ListTransfers",
    "snapshot.v1.SplitSnapshotService/CancelTransfer",
    "migration.v1.MigrationService/StartMigration",
    "migration.v1.MigrationService/CompleteMigration",
    "migration.v1.MigrationService/CancelMigration",
    "migration.v1.MigrationService/GetMigrationProgress",
    "migration.v1.MigrationService/WatchMigrationProgress",
    "migration.v1.MigrationService/ListMigrations",
    "migration.v1.MigrationService/ResolveMigration",
    "health.v1.HealthService/HealthCheck",
    "health.v1.HealthService/WatchHealth",
    "health.v1.HealthService/GetNodeStatus",
    "health.v1.HealthService/NoSuchCall",
];

/// Frames of an answer that are read: a watch has no end.
const ANSWERS: usize = 8;

/// The first byte chooses the call, the second how the rest is framed; the rest is the body.
pub fn run(data: &[u8]) {
    let Some(([call, framing], body)) = data.split_first_chunk::<2>() else { return };
    let call = CALLS[usize::from(*call) % CALLS.len()];
    let dir = directory();
    block_on(async {
        let snapshots = sender::receiver(sender::open(&dir.path().join("store")).unwrap()).await;
        let (journal, _) = Journal::open(dir.path().join("journal"), 10).unwrap();
        let identity =
            NodeIdentity { node_id: "n2".into(), store_id: vec![2; 16].into(), ..NodeIdentity::default() };
        let migrations = MigrationReceiver::builder(identity.clone(), MemoryTarget::default(), journal)
            .start()
            .await
            .unwrap();
        let health = HealthRegistry::builder(identity).build();
        match call.split_once('.').unwrap().0 {
            "snapshot" => ask(&mut snapshots.clone().into_service(), call, *framing, body).await,
            "migration" => ask(&mut migrations.clone().into_service(), call, *framing, body).await,
            _ => ask(&mut health.service(), call, *framing, body).await,
        }
        // What was refused did no harm.
        let listed = sender::client(&snapshots)
            .list_transfers(proto_snapshot::v1::ListTransfersRequest::default())
            .await;
        listed.unwrap();
        health.shut_down(std::time::Duration::ZERO).await;
        migrations.shutdown().await;
        snapshots.shutdown().await;
    });
    let mut found: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    found.sort();
    assert_eq!(found, ["journal", "store"], "something was written elsewhere");
}

async fn ask<S>(service: &mut S, call: &str, framing: u8, body: &[u8])
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Error: std::fmt::Debug,
{
    let framed = match framing {
        // As one message of the right length, so that its content is what is tried.
        0..128 => {
            let len = u32::try_from(body.len()).unwrap();
            [&[0], &len.to_be_bytes()[..], body].concat()
        }
        _ => body.to_vec(),
    };
    let mut request = http::Request::post(format!("/node.{call}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(Full::new(Bytes::from(framed))))
        .unwrap();
    if framing & 1 == 1 {
        let encoding = if framing & 2 == 2 { "gzip" } else { "identity" };
        request.headers_mut().insert("grpc-encoding", http::HeaderValue::from_static(encoding));
    }
    let answer = service.call(request).await.unwrap();
    assert_eq!(answer.status(), 200, "gRPC tells in its own status");
    let (head, mut body) = answer.into_parts();
    let mut status = Status::from_header_map(&head.headers);
    let watch = call.contains("/Watch");
    for _ in 0..ANSWERS {
        // Long enough for what is there at once.
        let patience = std::time::Duration::from_millis(if watch { 20 } else { 15_000 });
        match tokio::time::timeout(patience, body.frame()).await {
            Ok(Some(frame)) => {
                let frame = frame.unwrap();
                status = status.or_else(|| Status::from_header_map(frame.trailers_ref()?));
            }
            Ok(None) => break,
            Err(_) if watch => return,
            Err(_) => panic!("{call} does not answer"),
        }
    }
    let status = status.expect("an end with a status");
    if status.code() != tonic::Code::Ok && call != "health.v1.HealthService/NoSuchCall" {
        refusal(status);
    }
}

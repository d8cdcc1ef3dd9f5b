//! What is measured: driver and receiver of this crate, until all rows are at the target.

use std::time::{Duration, Instant};

use proto_common::dial::Dialer;
use proto_common::slots::SlotRange;
use proto_common::tuning::{incoming, tune_server};
use proto_common::v1::{Direction, NodeIdentity};
use proto_migration::driver::MigrationDriver;
use proto_migration::journal::Journal;
use proto_migration::limits::Limits;
use proto_migration::receiver::MigrationReceiver;
use proto_migration::v1::migration_service_client::MigrationServiceClient;
use proto_migration::v1::{
    GetMigrationProgressRequest, MigrationSpec, MigrationState, StartMigrationRequest,
};
use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::memory::{DiscardTarget, MemorySource};
use crate::payload::Payload;
use crate::side::{Before, Sent, Side, report_when_asked};

fn identity(id: &str, store: u8) -> NodeIdentity {
    NodeIdentity {
        node_id: id.into(),
        cluster_id: "c".into(),
        store_id: vec![store; 16].into(),
        ..NodeIdentity::default()
    }
}

pub async fn receive() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path(), 10).unwrap();
    let receiver = MigrationReceiver::builder(identity("n2", 2), DiscardTarget::default(), journal);
    let receiver = receiver.start().await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tune_server(Server::builder()).add_service(receiver.into_service());
    tokio::spawn(server.serve_with_incoming(incoming(TcpIncoming::from(listener))));
    tokio::task::spawn_blocking(move || report_when_asked(address)).await.unwrap();
}

/// Values of `side.chunk` bytes, of which `side.bytes` in all.
pub async fn send(side: &Side, address: &str, page: Option<usize>) -> Sent {
    let dir = tempfile::tempdir().unwrap();
    let (journal, recovered) = Journal::open(dir.path(), 10).unwrap();
    let source = MemorySource::new(Payload::new(), side.bytes / side.chunk as u64, side.chunk);
    let mut limits = Limits::default();
    limits.sent_batch_bytes = page.unwrap_or(limits.sent_batch_bytes);
    let driver =
        MigrationDriver::builder(identity("n1", 1), source, journal, Dialer::plaintext()).limits(limits);
    let driver = driver.start(recovered).await.unwrap();
    let mut client = MigrationServiceClient::new(driver.node().into_service());
    let request = StartMigrationRequest {
        migration_id: "m1".into(),
        spec: Some(MigrationSpec {
            slots: Some(SlotRange::FULL.into()),
            source_shard_id: "s1".into(),
            target_shard_id: "s2".into(),
            source_node_id: "n1".into(),
            target_node_id: "n2".into(),
            ..MigrationSpec::default()
        }),
        target_address: address.to_owned(),
        ..StartMigrationRequest::default()
    };
    let before = Before::now();
    let began = Instant::now();
    client.start_migration(request).await.unwrap();
    loop {
        let request =
            GetMigrationProgressRequest { migration_id: "m1".into(), direction: Direction::Out.into() };
        let migration = client.get_migration_progress(request).await.unwrap().into_inner().migration.unwrap();
        match migration.state() {
            MigrationState::Pending | MigrationState::Copying => {}
            MigrationState::CatchingUp | MigrationState::Ready => {
                let bytes = migration.progress.unwrap().bytes_done;
                assert!(bytes >= side.bytes, "{bytes} bytes are at the target");
                break;
            }
            other => panic!("{other:?}: {:?}", migration.progress),
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Sent { seconds: began.elapsed().as_secs_f64(), usage: before.usage() }
}

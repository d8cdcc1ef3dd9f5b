//! Slots migrate between real nodes while clients write.

#![allow(clippy::unwrap_used)]

#[allow(dead_code, unreachable_pub)]
mod support;

use std::time::Duration;

use node::demo::load_gen::{History, LoadGenerator};
use node::demo::processes::NodeProcess;
use proto::node::health_service_client::HealthServiceClient;
use proto::node::migration_service_client::MigrationServiceClient;
use proto::node::{
    CancelMigrationRequest, CompleteMigrationRequest, Direction, GetMigrationProgressRequest,
    GetNodeStatusRequest, MigrationProgress, MigrationSpec, MigrationState, NodeStatus, SlotRange,
    StartMigrationRequest,
};
use support::{call, client, load, start, until};
use tonic::transport::Channel;

/// The half that moves.
const SLOTS: &str = "8192-16383";

async fn service(node: &NodeProcess) -> MigrationServiceClient<Channel> {
    let endpoint = proto::common::tuning::endpoint(&node.addresses().grpc).unwrap();
    MigrationServiceClient::new(endpoint.connect().await.unwrap())
}

fn request(id: &str, to: &NodeProcess, slots: SlotRange, auto_complete: bool) -> StartMigrationRequest {
    StartMigrationRequest {
        migration_id: id.to_owned(),
        spec: Some(MigrationSpec {
            slots: Some(slots),
            source_shard_id: "s1".to_owned(),
            target_shard_id: "s2".to_owned(),
            source_node_id: String::new(),
            target_node_id: to.id().to_owned(),
            auto_complete,
            value_format: String::new(),
        }),
        target_address: to.addresses().grpc.clone(),
        ..StartMigrationRequest::default()
    }
}

async fn progress(node: &NodeProcess, id: &str, direction: Direction) -> Option<MigrationProgress> {
    let request = GetMigrationProgressRequest { migration_id: id.to_owned(), direction: direction.into() };
    let answer = service(node).await.get_migration_progress(request).await.ok()?;
    answer.into_inner().migration
}

async fn state(node: &NodeProcess, id: &str, direction: Direction) -> MigrationState {
    progress(node, id, direction).await.map_or(MigrationState::Unspecified, |progress| progress.state())
}

async fn completed(from: &NodeProcess, to: &NodeProcess, id: &str) -> MigrationProgress {
    until("both ends say COMPLETED", async || {
        let ends = [state(from, id, Direction::Out).await, state(to, id, Direction::In).await];
        for end in ends {
            assert!(
                !matches!(
                    end,
                    MigrationState::Failed | MigrationState::Cancelled | MigrationState::NeedsOperator
                ),
                "{end:?}: {:?} {:?}",
                progress(from, id, Direction::Out).await,
                progress(to, id, Direction::In).await
            );
        }
        ends == [MigrationState::Completed; 2]
    })
    .await;
    progress(from, id, Direction::Out).await.unwrap()
}

/// Every key's value at the node that owns it is one that its writer tried, and not older than the last that it was acknowledged.
async fn check(histories: &[History], nodes: &[&NodeProcess]) {
    let mut clients = Vec::new();
    for node in nodes {
        clients.push(client(node).await);
    }
    for History { key, acknowledged, tried } in histories {
        let mut owners = 0;
        for client in &mut clients {
            let value = call(client, &format!("GET {}", str::from_utf8(key).unwrap())).await;
            if value.starts_with("-MOVED") {
                continue;
            }
            owners += 1;
            let found: u64 = if value == "nil" { 0 } else { value.parse().unwrap() };
            assert!(
                (*acknowledged..=*tried).contains(&found),
                "{key:?}: {acknowledged} <= {found} <= {tried}"
            );
        }
        assert_eq!(owners, 1, "{key:?} has one owner");
    }
}

async fn dbsize(node: &NodeProcess) -> String {
    call(&mut client(node).await, "DBSIZE").await
}

fn slots() -> node::common::SlotRange {
    SLOTS.parse().unwrap()
}

#[tokio::test]
async fn slots_move_there_and_back_under_writes() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = start("n1", dir.path(), "0-16383").await;
    let n2 = start("n2", dir.path(), "none").await;
    load(&n1, 5_000).await;
    let writers = LoadGenerator::start(&n1.addresses().resp, "w", slots());
    for (round, (from, to)) in [(&n1, &n2), (&n2, &n1), (&n1, &n2)].into_iter().enumerate() {
        let id = format!("m{round}");
        let request = request(&id, to, slots().into(), true);
        let started = service(from).await.start_migration(request.clone()).await.unwrap().into_inner();
        assert!(!started.joined);
        assert!(service(from).await.start_migration(request).await.unwrap().into_inner().joined);
        let done = completed(from, to, &id).await;
        assert!(done.max_freeze_ms < 5_000, "{done:?}");
        assert_eq!(done.slot_epoch, 2 + round as u64);
        assert!(done.delta_entries > 0, "the writers wrote meanwhile: {done:?}");
    }
    let written = writers.finish().await.unwrap();
    assert!(written.moved > 0 && written.acknowledged > 0, "{written:?}");
    check(&written.histories, &[&n1, &n2]).await;
    // Keys of both nodes together: what was loaded, and one for each history.
    let sizes = [dbsize(&n1).await, dbsize(&n2).await];
    let total: usize = sizes.iter().map(|size| size[1..].parse::<usize>().unwrap()).sum();
    assert_eq!(total, 5_000 + written.histories.iter().filter(|history| history.acknowledged > 0).count());
    let mut at_n1 = client(&n1).await;
    let slot_map = call(&mut at_n1, "CLUSTER SLOTS").await;
    assert!(slot_map.contains("n2"), "{slot_map}");
}

#[tokio::test]
async fn a_migration_waits_for_complete_and_can_be_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = start("n1", dir.path(), "0-16383").await;
    let n2 = start("n2", dir.path(), "none").await;
    load(&n1, 1_000).await;
    let mut at_n1 = service(&n1).await;
    at_n1.start_migration(request("m1", &n2, slots().into(), false)).await.unwrap();
    until("READY", async || state(&n1, "m1", Direction::Out).await == MigrationState::Ready).await;
    assert_eq!(dbsize(&n2).await, ":0", "what is staged is invisible");
    let cancel = CancelMigrationRequest {
        migration_id: "m1".to_owned(),
        reason: "changed my mind".to_owned(),
        ..Default::default()
    };
    at_n1.cancel_migration(cancel.clone()).await.unwrap();
    until("CANCELLED at both ends", async || {
        state(&n1, "m1", Direction::Out).await == MigrationState::Cancelled
            && state(&n2, "m1", Direction::In).await == MigrationState::Cancelled
    })
    .await;
    assert_eq!(dbsize(&n1).await, ":1000");

    at_n1.start_migration(request("m2", &n2, slots().into(), false)).await.unwrap();
    until("READY", async || state(&n1, "m2", Direction::Out).await == MigrationState::Ready).await;
    let complete = CompleteMigrationRequest { migration_id: "m2".to_owned(), ..Default::default() };
    at_n1.complete_migration(complete).await.unwrap();
    completed(&n1, &n2, "m2").await;
    let refused = at_n1
        .cancel_migration(CancelMigrationRequest { migration_id: "m2".to_owned(), ..cancel })
        .await
        .unwrap_err();
    assert_eq!(proto::common::error::Error::from(refused).reason(), "ALREADY_COMMITTED");
}

#[tokio::test]
async fn the_status_tells_of_migrations_and_when_a_node_may_go() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = start("n1", dir.path(), "8192-16383").await;
    let n2 = start("n2", dir.path(), "none").await;
    load_slots(&n1, 500).await;
    assert!(!status(&n1).await.safe_to_remove, "it owns slots");
    assert!(status(&n2).await.safe_to_remove, "it owns none, and nothing moves");

    service(&n1).await.start_migration(request("m1", &n2, slots().into(), false)).await.unwrap();
    until("READY", async || state(&n1, "m1", Direction::Out).await == MigrationState::Ready).await;
    for (node, peer, phase) in [(&n1, "n2", "READY"), (&n2, "n1", "RECEIVING")] {
        let status = status(node).await;
        let migration = &status.migrations[0];
        assert_eq!((migration.id.as_str(), migration.peer_node_id.as_str()), ("m1", peer));
        assert_eq!((migration.phase.as_str(), migration.needs_operator), (phase, false));
        assert_eq!(migration.slots, Some(slots().into()));
        assert!(!status.safe_to_remove, "something moves: {status:?}");
    }
    let complete = CompleteMigrationRequest { migration_id: "m1".to_owned(), ..Default::default() };
    service(&n1).await.complete_migration(complete).await.unwrap();
    completed(&n1, &n2, "m1").await;
    let (one, two) = (status(&n1).await, status(&n2).await);
    assert!(one.safe_to_remove && one.migrations.is_empty() && one.slots_owned == 0, "{one:?}");
    assert!(!two.safe_to_remove && two.migrations.is_empty(), "{two:?}");
    assert_eq!((two.slots_owned, two.keys), (8192, Some(500)));
}

async fn status(node: &NodeProcess) -> NodeStatus {
    let endpoint = proto::common::tuning::endpoint(&node.addresses().grpc).unwrap();
    let mut client = HealthServiceClient::new(endpoint.connect().await.unwrap());
    client.get_node_status(GetNodeStatusRequest::default()).await.unwrap().into_inner().status.unwrap()
}

/// Loads keys of the slots that move.
async fn load_slots(node: &NodeProcess, count: usize) {
    let mut client = client(node).await;
    let moving = |key: &String| slots().contains(node::common::slot_of(key.as_bytes()));
    for key in (0..).map(|n| format!("key:{n}")).filter(moving).take(count) {
        assert_eq!(call(&mut client, &format!("SET {key} v")).await, "OK");
    }
}

#[tokio::test]
async fn either_node_may_be_killed_at_any_moment() {
    let dir = tempfile::tempdir().unwrap();
    let mut n1 = start("n1", dir.path(), "0-16383").await;
    let mut n2 = start("n2", dir.path(), "none").await;
    load(&n1, 3_000).await;
    let writers = LoadGenerator::start(&n1.addresses().resp, "w", slots());
    for round in 0..6_u64 {
        let id = format!("m{round}");
        let there = round % 2 == 0;
        {
            let (from, to) = if there { (&n1, &n2) } else { (&n2, &n1) };
            service(from).await.start_migration(request(&id, to, slots().into(), true)).await.unwrap();
        }
        // Somewhere on its way: the moments differ, and the outcome must not.
        tokio::time::sleep(Duration::from_millis(fastrand_ms(round))).await;
        let victim = if round % 3 == 0 { &mut n1 } else { &mut n2 };
        victim.kill().await.unwrap();
        victim.restart().await.unwrap();
        let (from, to) = if there { (&n1, &n2) } else { (&n2, &n1) };
        completed(from, to, &id).await;
    }
    let written = writers.finish().await.unwrap();
    assert!(written.acknowledged > 0);
    check(&written.histories, &[&n1, &n2]).await;
}

fn fastrand_ms(round: u64) -> u64 {
    rand::random_range(0..150 + round * 50)
}

//! Slots migrate between real nodes while clients write.

use crate::support;
use std::time::Duration;

use crate::support::load::Load;
use crate::support::migration::{begin, cancel, complete, manual, progress, reaches, request, slots, state};
use crate::support::{call, checker, client, load, show, start, until};
use node::common::slot_of;
use node::demo::processes::NodeProcess;
use node::store::MAX_ROW_BYTES;
use proto::migration::entry::MAX_KEY_BYTES;
use proto::node::health_service_client::HealthServiceClient;
use proto::node::{Direction, GetNodeStatusRequest, MigrationProgress, MigrationState, NodeStatus};

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

/// What was loaded is there once, at either node.
async fn all_there(nodes: [&NodeProcess; 2], count: usize) {
    let mut owners = vec![0; count];
    for node in nodes {
        let mut client = client(node).await;
        for n in 0..count {
            client.push(&["GET".to_owned(), format!("key:{n}")]).unwrap();
        }
        client.send().await.unwrap();
        for (n, owners) in owners.iter_mut().enumerate() {
            let found = show(&client.reply().await.unwrap());
            if !found.starts_with("-MOVED") {
                assert_eq!(found, format!("{n:0100}"));
                *owners += 1;
            }
        }
    }
    assert!(owners.iter().all(|owners| *owners == 1), "{owners:?}");
}

async fn dbsize(node: &NodeProcess) -> String {
    call(&mut client(node).await, "DBSIZE").await
}

#[tokio::test]
async fn slots_move_there_and_back_under_writes() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = start("n1", dir.path(), "0-16383").await;
    let n2 = start("n2", dir.path(), "none").await;
    load(&n1, 5_000).await;
    let clients = Load::start(&[&n1, &n2], slots());
    for (round, (from, to)) in [(&n1, &n2), (&n2, &n1), (&n1, &n2)].into_iter().enumerate() {
        let id = format!("m{round}");
        begin(from, request(&id, to)).await.unwrap();
        let done = completed(from, to, &id).await;
        assert!(done.max_freeze_ms < 5_000, "{done:?}");
        assert_eq!(done.slot_epoch, 2 + round as u64);
        assert!(done.delta_entries > 0, "the clients wrote meanwhile: {done:?}");
    }
    let faults = checker::check(&clients.finish().await, 3);
    assert!(faults.is_empty(), "{faults:?}");
    all_there([&n1, &n2], 5_000).await;
    let slot_map = call(&mut client(&n1).await, "CLUSTER SLOTS").await;
    assert!(slot_map.contains("n2"), "{slot_map}");
}

#[tokio::test]
async fn what_is_stored_can_be_moved_however_large() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = start("n1", dir.path(), "0-16383").await;
    let n2 = start("n2", dir.path(), "none").await;
    let tag =
        (0..).map(|n| format!("{{{n}}}")).find(|tag| slots().contains(slot_of(tag.as_bytes()))).unwrap();
    let key = |len: usize| format!("{tag}{}", "k".repeat(len - tag.len()));
    let value = |len: usize| "v".repeat(len);
    let mut client = client(&n1).await;
    let mut answer = async |command: &[String]| {
        show(&client.call(command).await.unwrap()).chars().take(99).collect::<String>()
    };
    let set = |key: String, value: String| ["SET".to_owned(), key, value];

    let (name, longest) = (key(MAX_KEY_BYTES), key(MAX_KEY_BYTES + 1));
    let largest = value(MAX_ROW_BYTES - name.len());
    assert_eq!(answer(&set(name.clone(), largest.clone())).await, "OK");
    let refused = "-ERR key and value have 16777153 bytes together; the limit is 16777152";
    for (key, value) in [(&name, format!("{largest}v")), (&tag, value(MAX_ROW_BYTES + 1 - tag.len()))] {
        assert_eq!(answer(&set(key.clone(), value.clone())).await, refused);
        let many = ["MSET".to_owned(), key.clone(), String::new(), key.clone(), value];
        assert_eq!(answer(&many).await, refused);
    }
    let refused = "-ERR the key has 65537 bytes; the limit is 65536";
    assert_eq!(answer(&set(longest.clone(), String::new())).await, refused);
    assert_eq!(answer(&["INCR".to_owned(), longest.clone()]).await, refused);
    assert_eq!(answer(&["DEL".to_owned(), longest]).await, ":0", "what is not stored may be asked for");

    begin(&n1, request("m1", &n2)).await.unwrap();
    completed(&n1, &n2, "m1").await;
    let mut client = support::client(&n2).await;
    assert!(show(&client.call(&["GET".to_owned(), name]).await.unwrap()) == largest);
}

#[tokio::test]
async fn a_migration_waits_for_complete_and_can_be_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = start("n1", dir.path(), "0-16383").await;
    let n2 = start("n2", dir.path(), "none").await;
    load(&n1, 1_000).await;
    begin(&n1, manual("m1", &n2)).await.unwrap();
    reaches(&n1, "m1", Direction::Out, MigrationState::Ready).await;
    assert_eq!(dbsize(&n2).await, ":0", "what is staged is invisible");
    cancel(&n1, "m1").await.unwrap();
    reaches(&n1, "m1", Direction::Out, MigrationState::Cancelled).await;
    reaches(&n2, "m1", Direction::In, MigrationState::Cancelled).await;
    assert_eq!(dbsize(&n1).await, ":1000");

    begin(&n1, manual("m2", &n2)).await.unwrap();
    reaches(&n1, "m2", Direction::Out, MigrationState::Ready).await;
    complete(&n1, "m2").await.unwrap();
    completed(&n1, &n2, "m2").await;
    let refused = cancel(&n1, "m2").await.unwrap_err();
    assert_eq!(refused.reason(), "ALREADY_COMMITTED");
}

#[tokio::test]
async fn the_status_tells_of_migrations_and_when_a_node_may_go() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = start("n1", dir.path(), "8192-16383").await;
    let n2 = start("n2", dir.path(), "none").await;
    load_slots(&n1, 500).await;
    assert!(!status(&n1).await.safe_to_remove, "it owns slots");
    assert!(status(&n2).await.safe_to_remove, "it owns none, and nothing moves");

    begin(&n1, manual("m1", &n2)).await.unwrap();
    reaches(&n1, "m1", Direction::Out, MigrationState::Ready).await;
    for (node, peer, phase) in [(&n1, "n2", "READY"), (&n2, "n1", "RECEIVING")] {
        let status = status(node).await;
        let migration = &status.migrations[0];
        assert_eq!((migration.id.as_str(), migration.peer_node_id.as_str()), ("m1", peer));
        assert_eq!((migration.phase.as_str(), migration.needs_operator), (phase, false));
        assert_eq!(migration.slots, Some(slots().into()));
        assert!(!status.safe_to_remove, "something moves: {status:?}");
    }
    complete(&n1, "m1").await.unwrap();
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
    let clients = Load::start(&[&n1, &n2], slots());
    for round in 0..6_u64 {
        let id = format!("m{round}");
        let there = round % 2 == 0;
        {
            let (from, to) = if there { (&n1, &n2) } else { (&n2, &n1) };
            begin(from, request(&id, to)).await.unwrap();
        }
        // Somewhere on its way: the moments differ, and the outcome must not.
        tokio::time::sleep(Duration::from_millis(rand::random_range(0..150 + round * 50))).await;
        let victim = if round % 3 == 0 { &mut n1 } else { &mut n2 };
        victim.kill().await.unwrap();
        victim.restart().await.unwrap();
        let (from, to) = if there { (&n1, &n2) } else { (&n2, &n1) };
        completed(from, to, &id).await;
    }
    let faults = checker::check(&clients.finish().await, 6);
    assert!(faults.is_empty(), "{faults:?}");
    all_there([&n1, &n2], 3_000).await;
}

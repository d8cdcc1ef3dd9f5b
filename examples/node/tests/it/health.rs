//! What a node tells of itself, as processes: its status, and its end.

use crate::support;
use std::time::{Duration, Instant};

use crate::support::migration::{ID, Pair, begin, progress, reaches, request, resolve};
use crate::support::proxy::{Frame, Ways};
use crate::support::{call, client, load, program, start, until};
use node::demo::load_gen::LoadGenerator;
use node::demo::processes::NodeProcess;
use proto::common::error::Error;
use proto::common::ids::{NodeId, ShardId, TransferId};
use proto::health::grpc_health_v1::health_check_response::ServingStatus;
use proto::health::grpc_health_v1::health_client::HealthClient;
use proto::health::grpc_health_v1::{HealthCheckRequest as StandardRequest, HealthListRequest};
use proto::node::health_service_client::HealthServiceClient;
use proto::node::{
    Direction, GetNodeStatusRequest, HealthCheckRequest, HealthStatus, MigrationDecision, MigrationState,
    NodeState, NodeStatus, PeerState, Priority, RemovalBlockerKind, TaskKind, WatchHealthRequest,
};
use proto::snapshot::sender::{SenderOptions, SnapshotToSend};
use proto::snapshot::spec::SnapshotPoint;
use proto::snapshot::{FileSource, SnapshotSender};
use tonic::transport::Channel;

async fn channel(node: &NodeProcess) -> Channel {
    let endpoint = proto::common::tuning::endpoint(&node.addresses().grpc).unwrap();
    endpoint.connect().await.unwrap()
}

async fn status(node: &NodeProcess) -> NodeStatus {
    let mut client = HealthServiceClient::new(channel(node).await);
    client.get_node_status(GetNodeStatusRequest::default()).await.unwrap().into_inner().status.unwrap()
}

fn blockers(status: &NodeStatus) -> Vec<RemovalBlockerKind> {
    assert_eq!(status.safe_to_remove, status.removal_blockers.is_empty(), "{status:?}");
    status.removal_blockers.iter().map(proto::node::RemovalBlocker::kind).collect()
}

async fn split(from: &NodeProcess, to: &NodeProcess, slot: u16, rate: u64) -> String {
    let addresses = to.addresses();
    let command = format!("SPLIT {slot} {} {} {} RATE {rate}", to.id(), addresses.grpc, addresses.resp);
    let transfer = call(&mut client(from).await, &command).await;
    assert!(transfer.starts_with("split-"), "{transfer}");
    transfer
}

async fn split_phase(node: &NodeProcess) -> String {
    let reply = client(node).await.call(&["SPLIT", "LIST"]).await.unwrap();
    let redis_protocol::resp2::types::BytesFrame::Array(splits) = reply else { panic!("{reply:?}") };
    splits
        .first()
        .and_then(|split| node::demo::client::field(split, "phase"))
        .map(support::show)
        .unwrap_or_default()
}

#[tokio::test]
async fn the_status_is_what_clients_see() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = start("n1", dir.path(), "0-16383").await;
    let n2 = start("n2", dir.path(), "none").await;
    load(&n1, 20_000).await;

    let one = status(&n1).await;
    assert_eq!((one.state(), one.slots_owned, one.keys), (NodeState::Running, 16_384, Some(20_000)));
    assert_eq!((&one.node_address, &one.client_address), (&n1.addresses().grpc, &n1.addresses().resp));
    assert_eq!(blockers(&one), [RemovalBlockerKind::OwnsSlots]);
    let [shard] = one.shards.as_slice() else { panic!("{one:?}") };
    assert_eq!((shard.shard_id.as_str(), shard.keys), ("slots-0-16383", Some(20_000)));
    let machine = one.machine.clone().unwrap();
    assert!(machine.memory_total_bytes > Some(0) && machine.disks[0].total_bytes > 0, "{machine:?}");
    let two = status(&n2).await;
    assert_eq!((two.slots_owned, two.keys), (0, Some(0)));
    assert!(two.safe_to_remove, "{two:?}");

    let transfer = split(&n1, &n2, 0, 1_000_000).await;
    until("both ends show the transfer", async || {
        let (one, two) = (status(&n1).await, status(&n2).await);
        if two.transfers.is_empty() {
            return false;
        }
        // It owns nothing yet, but something moves.
        if two.slots_owned == 0 {
            assert_eq!(blockers(&two), [RemovalBlockerKind::ActiveTransfer]);
        }
        let (sent, received) = (&one.transfers[0], &two.transfers[0]);
        assert_eq!((&sent.id, &received.id), (&transfer, &transfer));
        assert_eq!((sent.kind(), sent.peer_node_id.as_str()), (TaskKind::SplitSnapshot, "n2"));
        assert_eq!(received.peer_node_id, "n1");
        assert_eq!(received.progress.as_ref().unwrap().direction(), Direction::In);
        true
    })
    .await;
    until("the split is done", async || split_phase(&n1).await == "done").await;
    until("nothing moves any more", async || {
        let (one, two) = (status(&n1).await, status(&n2).await);
        one.transfers.is_empty() && two.transfers.is_empty()
    })
    .await;
    let after = status(&n1).await;
    assert!(after.safe_to_remove && after.slots_owned == 0 && after.keys == Some(0), "{after:?}");
    assert!(after.slot_map_revision > one.slot_map_revision);
    assert_eq!(after.slot_owners[0].node_id, "n2");
    assert_eq!(after.slot_owners[0].client_address, n2.addresses().resp);
    let two = status(&n2).await;
    assert_eq!((blockers(&two), two.keys), (vec![RemovalBlockerKind::OwnsSlots], Some(20_000)));
    assert_eq!(call(&mut client(&n2).await, "DBSIZE").await, ":20000");

    // By now they know each other, and watch.
    until("each hears the other", async || {
        let (one, two) = (status(&n1).await, status(&n2).await);
        [one, two].iter().all(|status| {
            let [peer] = status.peers.as_slice() else { return false };
            peer.state() == PeerState::Alive && peer.last_heard_from_unix_ms.is_some()
        })
    })
    .await;
    let peer = status(&n1).await.peers.remove(0);
    assert_eq!(
        (peer.node_id.as_str(), peer.node_state(), peer.self_doubt),
        ("n2", NodeState::Running, false)
    );
}

#[tokio::test]
async fn both_protocols_tell_of_every_component() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = start("n1", dir.path(), "0-16383").await;
    let mut health = HealthServiceClient::new(channel(&n1).await);
    let mut components = Vec::new();
    until("each check has a result", async || {
        let report =
            health.health_check(HealthCheckRequest::default()).await.unwrap().into_inner().health.unwrap();
        components = report.components;
        components.iter().all(|one| one.checked_unix_ms.is_some())
    })
    .await;
    let mut names: Vec<_> = components.iter().map(|one| one.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["database", "disk", "owners", "quarantine", "runtime", "space", "transfers"]);
    let disk = components.iter().find(|one| one.name == "disk").unwrap();
    let latency = disk.measurement.as_ref().unwrap();
    assert!(latency.value > 0.0 && latency.unit == "ms", "{disk:?}");
    let live = HealthCheckRequest { service: "liveness".into(), ..Default::default() };
    let live = health.health_check(live).await.unwrap().into_inner().health.unwrap();
    assert_eq!(
        (live.status(), live.components.len()),
        (HealthStatus::Healthy, 0),
        "nothing that a restart does not cure"
    );

    let mut standard = HealthClient::new(channel(&n1).await);
    let list = standard.list(HealthListRequest {}).await.unwrap().into_inner().statuses;
    for name in ["", "liveness", "readiness", "startup", "disk", "node.snapshot.v1.SplitSnapshotService"] {
        assert!(list.contains_key(name), "{name}: {list:?}");
    }
    assert_eq!(list["startup"].status(), ServingStatus::Serving);
}

/// A transfer of one small file that is no part of the database.
fn little(n: usize) -> SnapshotToSend {
    SnapshotToSend {
        transfer_id: TransferId::new(format!("little-{n}")).unwrap(),
        source_shard: ShardId::new("s1").unwrap(),
        target_shard: ShardId::new(format!("little-{n}")).unwrap(),
        source_node: NodeId::new("nodectl").unwrap(),
        target_node: None,
        slots: "0-16383".parse().unwrap(),
        point: SnapshotPoint { term: 1, index: 1 },
        fence: None,
        priority: Priority::Rebalance,
    }
}

/// Sends little files until one is refused; what the refusal was.
async fn send_until_refused(address: String, file: std::path::PathBuf) -> (usize, Error) {
    let mut options = SenderOptions::default();
    options.give_up_after = Some(Duration::ZERO);
    let sender = SnapshotSender::connect(&address).unwrap().options(options);
    for n in 0.. {
        let sent = sender.send(little(n), FileSource::new(&file)).unwrap().join().await;
        if let Err(error) = sent {
            return (n, error);
        }
    }
    unreachable!()
}

#[tokio::test]
async fn sigterm_tells_watchers_first_and_leaves_a_transfer_that_can_be_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = start("n1", dir.path(), "0-16383").await;
    let mut n2 =
        NodeProcess::start_with(&program(), "n2", dir.path(), "none", &["--grace", "4"]).await.unwrap();
    load(&n1, 20_000).await;
    // Far longer than the grace period.
    split(&n1, &n2, 8192, 60_000).await;
    until("the transfer runs", async || !status(&n2).await.transfers.is_empty()).await;
    let file = dir.path().join("file");
    std::fs::write(&file, b"little").unwrap();
    let sending = tokio::spawn(send_until_refused(n2.addresses().grpc.clone(), file));

    let mut ours = Vec::new();
    let mut standard = Vec::new();
    for _ in 0..20 {
        let request = WatchHealthRequest { heartbeat_ms: 500, ..Default::default() };
        let channel = channel(&n2).await;
        ours.push(
            HealthServiceClient::new(channel.clone()).watch_health(request).await.unwrap().into_inner(),
        );
        let request = StandardRequest::default();
        standard.push(HealthClient::new(channel).watch(request).await.unwrap().into_inner());
    }
    // The first to hear of the drain asks for readiness at once: whatever was refused by then, it is withdrawn.
    let mut probe = HealthClient::new(channel(&n2).await);
    let watchers = ours.into_iter().map(|mut watch| {
        tokio::spawn(async move {
            let mut states = Vec::new();
            while let Some(frame) = watch.message().await.unwrap() {
                states.push((frame.origin.unwrap().state(), frame.last_frame));
            }
            states
        })
    });
    let watchers: Vec<_> = watchers.collect();
    let plain = standard.into_iter().map(|mut watch| {
        tokio::spawn(async move {
            let mut states = Vec::new();
            while let Some(answer) = watch.message().await.unwrap() {
                states.push(answer.status());
            }
            states
        })
    });
    let plain: Vec<_> = plain.collect();
    assert!(!sending.is_finished(), "nothing was refused before");

    let began = Instant::now();
    let stopping = tokio::spawn(async move {
        n2.stop().await.unwrap();
        n2
    });
    let (sent, refusal) = sending.await.unwrap();
    let ready = probe.check(StandardRequest { service: "readiness".into() }).await.unwrap().into_inner();
    assert_eq!(
        ready.status(),
        ServingStatus::NotServing,
        "when something is refused, readiness is withdrawn"
    );
    let live = probe.check(StandardRequest { service: "liveness".into() }).await.unwrap().into_inner();
    assert_eq!(live.status(), ServingStatus::Serving);
    assert!(sent > 0 && refusal.reason() == "SHUTTING_DOWN" && refusal.is_retryable(), "{sent} {refusal:?}");

    for watcher in watchers {
        let states = watcher.await.unwrap();
        assert_eq!(states.last(), Some(&(NodeState::ShuttingDown, true)), "{states:?}");
        assert!(states.contains(&(NodeState::Draining, false)), "{states:?}");
    }
    for watcher in plain {
        assert_eq!(watcher.await.unwrap().last(), Some(&ServingStatus::NotServing));
    }
    let mut n2 = stopping.await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "within its grace period: {:?}", began.elapsed());

    // Nothing of the transfer was lost, nothing is served twice.
    n2.restart().await.unwrap();
    until("the transfer goes on", async || {
        let now = status(&n2).await;
        now.transfers.iter().any(|task| task.phase == "TRANSFERRING")
            && now.transfers[0].progress.as_ref().unwrap().bytes_done > 0
    })
    .await;
}

#[tokio::test]
async fn sigterm_lets_a_transfer_end_that_can() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = start("n1", dir.path(), "0-16383").await;
    let mut n2 = start("n2", dir.path(), "none").await;
    load(&n1, 5000).await;
    split(&n1, &n2, 8192, 250_000).await;
    until("the transfer runs", async || !status(&n2).await.transfers.is_empty()).await;
    n2.stop().await.unwrap();
    until("the split is done", async || split_phase(&n1).await == "done").await;
    n2.restart().await.unwrap();
    let moved = status(&n2).await;
    assert_eq!((moved.slots_owned, moved.transfers.len()), (8192, 0));
    assert_eq!(moved.keys.unwrap() + status(&n1).await.keys.unwrap(), 5000);
}

/// Open watches that nobody reads, and nothing else to do: gone at once.
#[tokio::test]
async fn open_watches_do_not_hold_up_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut n1 = start("n1", dir.path(), "0-16383").await;
    let mut watches = Vec::new();
    for _ in 0..10 {
        let channel = channel(&n1).await;
        for _ in 0..20 {
            let request = WatchHealthRequest { heartbeat_ms: 100, ..Default::default() };
            watches.push(HealthServiceClient::new(channel.clone()).watch_health(request).await.unwrap());
        }
    }
    assert_eq!(status(&n1).await.open_watches, 200);
    let began = Instant::now();
    n1.stop().await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

/// Every processor busy, clients writing, a transfer running: a probe is answered, and says that the process works.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_under_full_load_is_alive() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = start("n1", dir.path(), "0-16383").await;
    let n2 = start("n2", dir.path(), "none").await;
    load(&n1, 20_000).await;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let cpus = std::thread::available_parallelism().unwrap().get();
    let burners: Vec<_> = (0..cpus)
        .map(|_| {
            let stop = std::sync::Arc::clone(&stop);
            std::thread::spawn(move || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        })
        .collect();
    let writers = LoadGenerator::start(&n1.addresses().resp, "w:", "0-8191".parse().unwrap());
    split(&n1, &n2, 8192, 500_000).await;
    let mut probes: Vec<_> = Vec::new();
    for node in [&n1, &n2] {
        probes.push(HealthClient::new(channel(node).await));
    }
    until("the transfer runs", async || !status(&n2).await.transfers.is_empty()).await;
    let mut during = 0;
    for _ in 0..200 {
        for probe in &mut probes {
            let request = StandardRequest { service: "liveness".into() };
            let live = tokio::time::timeout(Duration::from_secs(20), probe.check(request)).await;
            assert_eq!(live.unwrap().unwrap().into_inner().status(), ServingStatus::Serving);
        }
        during += usize::from(split_phase(&n1).await == "sending");
    }
    assert!(during > 0, "none of it was while the transfer ran");
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for burner in burners {
        burner.join().unwrap();
    }
    assert!(writers.finish().await.unwrap().acknowledged > 0);
}

/// Its target keeps the record of the commit until it has heard that the source knows.
#[tokio::test]
async fn a_source_that_its_target_waits_for_is_not_safe_to_remove() {
    let mut pair = Pair::start(300, 100).await;
    let (proxy, asked) = pair.behind(request(ID, &pair.n2)).await;
    proxy.arm(Frame::Forget, Ways::LATE);
    begin(&pair.n1, asked).await.unwrap();
    proxy.fired().await;
    proxy.go(Ways::LATE);
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Completed).await;
    let status = status(&pair.n1).await;
    assert!(blockers(&status).contains(&RemovalBlockerKind::UnconfirmedCommit), "{status:?}");
    // It is removed all the same.
    pair.n1.kill().await.unwrap();
    let there = reaches(&pair.n2, ID, Direction::In, MigrationState::Committed).await;
    assert!(blockers(&self::status(&pair.n2).await).contains(&RemovalBlockerKind::ActiveMigration));
    let confirmed = resolve(&pair.n2, &there, MigrationDecision::Committed).await.unwrap();
    assert_eq!(confirmed.state(), MigrationState::Completed);
    assert!(!blockers(&self::status(&pair.n2).await).contains(&RemovalBlockerKind::ActiveMigration));
    // And back after all.
    proxy.go(Ways::default());
    pair.n1.restart().await.unwrap();
    until("nothing keeps the source", async || {
        !blockers(&self::status(&pair.n1).await).contains(&RemovalBlockerKind::UnconfirmedCommit)
    })
    .await;
    assert_eq!(progress(&pair.n1, ID, Direction::Out).await.unwrap().state(), MigrationState::Completed);
    pair.owner(true).await;
}

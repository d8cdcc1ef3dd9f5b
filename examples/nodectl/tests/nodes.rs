//! `health` and `status`, of nodes that are well, ill, draining, away, and that lie.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use proto::health::HealthRegistry;
use proto::health::server::{Component, ComponentHandle, Facts, FactsFuture, NodeFacts, Sections};
use proto::node::{ActiveTask, HealthStatus, NodeIdentity, Progress, RemovalBlocker, SlotRange, TaskKind};
use support::{Running, nodectl, refusing_port};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

/// It owns ten slots, and one migration goes out.
struct Busy;

impl NodeFacts for Busy {
    fn facts(&self, _: Sections) -> FactsFuture<'_> {
        let progress = Progress { direction: 2, bytes_done: 7, ..Default::default() };
        let migration = ActiveTask {
            kind: TaskKind::Migration.into(),
            id: "m1".into(),
            phase: "CATCHING_UP".into(),
            peer_node_id: "n9".into(),
            slots: Some(SlotRange { start: 0, end: 10 }),
            progress: Some(progress),
            needs_operator: true,
        };
        let facts =
            Facts { slots_owned: 10, keys: Some(1234), migrations: vec![migration], ..Facts::default() };
        Box::pin(std::future::ready(facts))
    }
}

struct Idle;

impl NodeFacts for Idle {
    fn facts(&self, _: Sections) -> FactsFuture<'_> {
        Box::pin(std::future::ready(Facts { keys: Some(0), ..Facts::default() }))
    }
}

struct Node {
    address: SocketAddr,
    health: HealthRegistry,
    disk: ComponentHandle,
}

async fn start(id: &str, facts: impl NodeFacts) -> Node {
    let identity = NodeIdentity { node_id: id.into(), incarnation: 1, ..Default::default() };
    let health = HealthRegistry::builder(identity).facts(facts).build();
    let disk =
        health.add(Component::new("disk".parse().unwrap()).critical(), HealthStatus::Healthy, "").unwrap();
    health.set_running();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder().add_service(health.service());
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    Node { address, health, disk }
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_0_only_if_all_are_healthy() {
    let (n1, n2) = (start("n1", Idle).await, start("n2", Idle).await);
    let both = format!("health {} {}", n1.address, n2.address);
    let well = nodectl(&both).await;
    assert_eq!((well.code, well.stderr.as_str()), (Some(0), ""), "{well:?}");
    well.assert_plain();
    let rows: Vec<Vec<&str>> = well.stdout.lines().map(|line| line.split('\t').collect()).collect();
    assert_eq!(rows[0], ["NODE", "ADDRESS", "STATE", "HEALTH", "WHY"]);
    assert_eq!(rows[2], ["n2", n2.address.to_string().as_str(), "running", "healthy", "-"]);
    let json = nodectl(&format!("{both} --json")).await;
    assert_eq!(json.documents().len(), 1);
    assert_eq!(json.last()["healthy"], true);

    for (status, word) in [
        (HealthStatus::Degraded, "degraded"),
        (HealthStatus::Unhealthy, "unhealthy"),
        (HealthStatus::Undecided, "degraded"),
    ] {
        n2.disk.set(status, "a write took 900 ms");
        let ill = nodectl(&both).await;
        assert_eq!(ill.code, Some(1), "{ill:?}");
        assert!(ill.stdout.contains(&format!("{word}\tdisk: a write took 900 ms")), "{ill:?}");
        assert!(ill.stderr.contains("1 of 2 nodes not healthy"), "{ill:?}");
        let json = nodectl(&format!("{both} --json")).await;
        assert_eq!((json.code, json.documents().len()), (Some(1), 1), "{json:?}");
        let document = json.last();
        assert_eq!(document["healthy"], false);
        assert_eq!(document["nodes"][0]["status"], "healthy");
        assert_eq!(document["nodes"][1]["status"], word);
        assert_eq!(document["nodes"][1]["components"][0]["name"], "disk");
    }
    // Alive all the same.
    assert_eq!(nodectl(&format!("{both} --service liveness")).await.code, Some(0));
    assert_eq!(nodectl(&format!("health {} --service disk", n1.address)).await.code, Some(0));
    let wrong = nodectl(&format!("{both} --service dics")).await;
    assert_eq!(wrong.code, Some(1));
    assert!(
        wrong.stderr.contains("UNKNOWN_SERVICE") && wrong.stderr.contains("help: name liveness"),
        "{wrong:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_away_is_a_row() {
    let n1 = start("n1", Idle).await;
    let (_port, nobody) = refusing_port();
    let health = nodectl(&format!("health {} {nobody}", n1.address)).await;
    assert_eq!(health.code, Some(1), "{health:?}");
    let row = format!("{nobody}\t{nobody}\tno answer\t-\tconnection refused");
    assert!(health.stdout.contains(&row) && health.stdout.contains("healthy"), "{health:?}");

    let status = nodectl(&format!("status {nobody} {}", n1.address)).await;
    assert_eq!((status.code, status.stderr.as_str()), (Some(0), ""), "{status:?}");
    let rows: Vec<Vec<&str>> = status.stdout.lines().map(|line| line.split('\t').collect()).collect();
    assert_eq!(rows[1][..3], [nobody.to_string().as_str(), "no answer", "-"], "{status:?}");
    assert_eq!(rows[2][..2], ["n1", "running"]);
    let json = nodectl(&format!("status {nobody} {} --json", n1.address)).await.last();
    assert_eq!(json["nodes"][0]["reachable"], false);
    assert_eq!(json["nodes"][0]["error"]["reason"], "UNAVAILABLE");
    assert_eq!(json["nodes"][1]["reachable"], true);

    // One that takes connections and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    let status = nodectl(&format!("status {address} --timeout 300ms")).await;
    assert_eq!(status.code, Some(0));
    assert!(status.stdout.contains("no answer from"), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn status_says_what_a_node_has_and_does() {
    let (busy, idle) = (start("busy", Busy).await, start("idle", Idle).await);
    busy.disk.set(HealthStatus::Degraded, "slow");
    let status = nodectl(&format!("status {} {}", busy.address, idle.address)).await;
    status.assert_plain();
    let rows: Vec<Vec<&str>> = status.stdout.lines().map(|line| line.split('\t').collect()).collect();
    assert_eq!(
        rows[0],
        ["NODE", "STATE", "UP", "SLOTS", "KEYS", "DISK", "CPU", "MEM", "MOVING", "HEALTH", "WHY"]
    );
    assert_eq!(
        [rows[1][0], rows[1][3], rows[1][4], rows[1][8], rows[1][9]],
        ["busy", "10", "1.2k", "0/1", "degraded"]
    );
    assert_eq!(rows[1][10], "disk: slow; m1 is CATCHING_UP and waits for an operator");
    assert!(rows[2][10].contains("safe to remove"), "{rows:?}");

    let json = nodectl(&format!("status {} {} --json", busy.address, idle.address)).await.last();
    let (busy_json, idle_json) = (&json["nodes"][0], &json["nodes"][1]);
    assert_eq!(busy_json["node_id"], "busy");
    assert_eq!(busy_json["slots_owned"], 10);
    assert_eq!(busy_json["safe_to_remove"], false);
    assert_eq!(busy_json["removal_blockers"][0]["kind"], "owns_slots");
    assert_eq!(busy_json["removal_blockers"][1]["subject"], "m1");
    assert_eq!(busy_json["migrations"][0]["phase"], "catching_up");
    assert_eq!(busy_json["migrations"][0]["slots"], "0-9");
    assert_eq!(busy_json["migrations"][0]["direction"], "out");
    assert!(busy_json["cpu_percent"].is_null(), "this node does not know");
    assert_eq!(idle_json["safe_to_remove"], true);

    idle.health.begin_drain("SIGTERM", Duration::from_secs(30));
    let draining = nodectl(&format!("status {}", idle.address)).await;
    assert!(draining.stdout.contains("draining") && draining.stdout.contains("unhealthy"), "{draining:?}");
    assert!(draining.stdout.contains("draining: SIGTERM; drain: 0 transfers"), "{draining:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn status_is_watched_until_it_is_interrupted() {
    let n1 = start("n1", Idle).await;
    let mut watch = Running::start(&format!("status {} --watch --interval 50ms --json", n1.address));
    watch.says("\"running\"").await;
    n1.health.set_maintenance("new disk");
    watch.says("\"maintenance\"").await;
    watch.signal(rustix::process::Signal::INT);
    let ended = watch.ended().await;
    assert_eq!(ended.code, Some(130), "{ended:?}");
    assert!(ended.documents().len() >= 3, "{ended:?}");
}

/// Texts that would clear the screen, and numbers without end.
struct Liar;

const TEXT: &str = "x\x1b[2J\u{9b}31m\u{202e}y\r\n\tz";

impl NodeFacts for Liar {
    fn facts(&self, _: Sections) -> FactsFuture<'_> {
        let task = ActiveTask {
            id: TEXT.into(),
            phase: TEXT.into(),
            kind: 99,
            needs_operator: true,
            ..Default::default()
        };
        let blocker = RemovalBlocker { kind: 99, message: TEXT.into(), ..Default::default() };
        Box::pin(std::future::ready(Facts {
            node_address: TEXT.into(),
            slots_owned: u32::MAX,
            keys: Some(u64::MAX),
            transfers: vec![task],
            removal_blockers: vec![blocker],
            ..Facts::default()
        }))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_a_node_says_reaches_the_terminal_raw() {
    let liar = start(TEXT, Liar).await;
    liar.disk.set(HealthStatus::Unhealthy, "down");
    for args in [format!("status {}", liar.address), format!("health {}", liar.address)] {
        for args in [args.clone(), format!("{args} --json")] {
            let ended = nodectl(&args).await;
            ended.assert_plain();
            assert!(!ended.stdout.contains('\u{202e}'), "{args}: {ended:?}");
        }
    }
    let json = nodectl(&format!("status {} --json", liar.address)).await.last();
    assert_eq!(json["nodes"][0]["node_id"], TEXT);
    assert_eq!(json["nodes"][0]["transfers"][0]["kind"], "unknown_99");
}

//! The disk is full for one of the nodes, at the worst moments of a migration, while clients write: it says so and refuses, the other one goes on as far as it
//! can, and once the node is restarted with room the migration ends by itself.

use std::time::Duration;

use crate::support::disk::{full_at, program_without_signal};
use crate::support::load::Load;
use crate::support::migration::{
    ID, Pair, Slow, begin, complete, limits, manual, progress, reaches, request,
};
use crate::support::proxy::{Frame, Proxy, Ways};
use crate::support::{call, client, until};
use node::demo::processes::NodeProcess;
use proto::node::health_service_client::HealthServiceClient;
use proto::node::{
    Direction, FreezeOutcome, HealthCheckRequest, HealthStatus, MigrationGate, MigrationLimits,
    MigrationProgress, MigrationState, StartMigrationRequest,
};

/// Waits until a node tells that its store failed, and returns what it says of it.
async fn storage_failed(node: &NodeProcess, direction: Direction) -> String {
    let mut found = None;
    until(&format!("{} tells that its store failed", node.id()), async || {
        let told = progress(node, ID, direction).await;
        found = told.and_then(|told| {
            let errors = told.incidents.into_iter().filter_map(|incident| incident.error);
            errors.rev().find(|error| error.reason == "STORAGE_FAILED")
        });
        found.is_some()
    })
    .await;
    found.unwrap().message
}

/// Waits until a node says of itself that it takes no writes.
async fn is_unhealthy(node: &NodeProcess) {
    let endpoint = proto::common::tuning::endpoint(&node.addresses().grpc).unwrap();
    let mut health = HealthServiceClient::new(endpoint.connect().await.unwrap());
    until("the database is UNHEALTHY", async || {
        let asked = HealthCheckRequest { service: "database".into(), ..HealthCheckRequest::default() };
        let told = health.health_check(asked).await.unwrap().into_inner().health.unwrap();
        told.status() == HealthStatus::Unhealthy && told.message.contains("restart the node")
    })
    .await;
}

/// The next process has no limit.
async fn room(node: &mut NodeProcess) {
    node.kill().await.unwrap();
    node.restart().await.unwrap();
}

async fn out(pair: &Pair) -> MigrationProgress {
    pair.source_is_honest("the disk was full").await.unwrap()
}

#[tokio::test]
async fn a_target_that_cannot_stage_says_so_and_goes_on_when_it_can() {
    let mut pair = Pair::start_as(program_without_signal, 2000, 1000).await;
    let load = pair.load();
    // Room for some of the rows, which have more than a megabyte; they take so long that there is none before all are there.
    let database = pair.directory.path().join("n2/node.redb");
    let room_for = std::fs::metadata(database).unwrap().len() + (600 << 10);
    let slowly = MigrationLimits { max_bytes_per_second: Some(512 << 10), ..limits(Slow::Freezing).unwrap() };
    let asked = StartMigrationRequest { limits: Some(slowly), ..manual(ID, &pair.n2) };
    begin(&pair.n1, asked).await.unwrap();
    until("some of the rows are there", async || {
        let there = progress(&pair.n2, ID, Direction::In).await;
        there.and_then(|there| there.progress).is_some_and(|there| there.items_done > 0)
    })
    .await;
    full_at(&pair.n2, room_for);
    let said = storage_failed(&pair.n1, Direction::Out).await;
    assert!(said.contains("make sure that there is room, then restart the node"), "{said}");
    let log = std::fs::read_to_string(pair.n2.log()).unwrap();
    assert!(log.contains("File too large (os error 27)"), "the log says what failed: {log}");
    // It costs the clients of the source nothing.
    load.going().await;
    let before = out(&pair).await;
    assert_eq!((before.state(), before.gate()), (MigrationState::Copying, MigrationGate::Open));
    let there = pair.target_is_honest("its disk was full").await.unwrap();
    assert_eq!(there.state(), MigrationState::Receiving);
    assert!(there.progress.unwrap().items_done > 0, "some of the rows are there");

    room(&mut pair.n2).await;
    until("the wish to cut over is accepted", async || complete(&pair.n1, ID).await.is_ok()).await;
    let done = reaches(&pair.n1, ID, Direction::Out, MigrationState::Completed).await;
    assert_eq!(done.copy, 1, "what was durable is not copied again: {done:?}");
    pair.ends("the disk of the target was full", load, MigrationState::Completed).await;
}

/// A migration under load, with a `Commit` that has not arrived.
async fn with_commit_on_its_way() -> (Pair, Load, Proxy) {
    let pair = Pair::start_as(program_without_signal, 300, 100).await;
    let load = pair.load();
    let (proxy, asked) = pair.behind(request(ID, &pair.n2)).await;
    proxy.arm(Frame::Commit, Ways::LATE);
    begin(&pair.n1, asked).await.unwrap();
    proxy.fired().await;
    (pair, load, proxy)
}

/// Nothing can be written any more, a line of the log neither.
#[tokio::test]
async fn a_target_that_cannot_commit_holds_the_clients_until_it_can() {
    let (mut pair, load, proxy) = with_commit_on_its_way().await;
    reaches(&pair.n2, ID, Direction::In, MigrationState::Prepared).await;
    full_at(&pair.n2, 0);
    proxy.go(Ways::default());
    storage_failed(&pair.n2, Direction::In).await;
    is_unhealthy(&pair.n2).await;
    for _ in 0..3 {
        let there = pair.target_is_honest("its disk was full").await.unwrap();
        assert_eq!((there.state(), there.gate()), (MigrationState::Prepared, MigrationGate::Closed));
        let here = out(&pair).await;
        assert_eq!((here.state(), here.gate()), (MigrationState::Committing, MigrationGate::Closed));
    }
    room(&mut pair.n2).await;
    pair.ends("the disk of the target was full at the commit", load, MigrationState::Completed).await;
}

#[tokio::test]
async fn a_source_that_cannot_log_changes_answers_no_write_and_goes_on_when_it_can() {
    let mut pair = Pair::start_as(program_without_signal, 300, 100).await;
    let load = pair.load();
    let asked = StartMigrationRequest { limits: limits(Slow::Freezing), ..manual(ID, &pair.n2) };
    begin(&pair.n1, asked).await.unwrap();
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Ready).await;
    load.going().await;
    full_at(&pair.n1, 0);
    let mut at_n1 = client(&pair.n1).await;
    until("a write is refused", async || {
        let answer = call(&mut at_n1, "SET {foo}bar 1").await;
        assert!(answer == "OK" || answer.contains("the outcome of this write is unknown"), "{answer}");
        answer.contains("make sure that there is room, then restart the node")
    })
    .await;
    assert_eq!(call(&mut at_n1, "GET foo").await, "nil", "it can still be read");
    // The wish has to be durable before it is accepted.
    let asked = tokio::time::timeout(Duration::from_secs(1), complete(&pair.n1, ID)).await;
    assert!(!matches!(asked, Ok(Ok(_))), "{asked:?}");
    storage_failed(&pair.n1, Direction::Out).await;
    out(&pair).await;
    pair.target_is_honest("the disk of the source was full").await.unwrap();
    room(&mut pair.n1).await;
    until("the wish to cut over is accepted", async || complete(&pair.n1, ID).await.is_ok()).await;
    let done = reaches(&pair.n1, ID, Direction::Out, MigrationState::Completed).await;
    assert_eq!(done.copy, 1, "its log is whole: {done:?}");
    pair.ends("the disk of the source was full", load, MigrationState::Completed).await;
}

#[tokio::test]
async fn a_source_that_cannot_save_that_it_commits_does_not_commit() {
    let mut pair = Pair::start_as(program_without_signal, 300, 100).await;
    let load = pair.load();
    let (proxy, asked) = pair.behind(request(ID, &pair.n2)).await;
    proxy.arm(Frame::Prepare, Ways::LATE);
    begin(&pair.n1, StartMigrationRequest { limits: limits(Slow::Freezing), ..asked }).await.unwrap();
    proxy.fired().await;
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Freezing).await;
    full_at(&pair.n1, 0);
    proxy.go(Ways::default());
    let said = storage_failed(&pair.n1, Direction::Out).await;
    assert!(said.contains("file too large"), "{said}");
    let shown = out(&pair).await;
    assert_eq!((shown.state(), shown.gate()), (MigrationState::CatchingUp, MigrationGate::Open));
    assert_eq!(shown.freezes.last().unwrap().outcome(), FreezeOutcome::Interrupted, "{shown:?}");
    let there = pair.target_is_honest("the disk of the source was full").await.unwrap();
    assert_eq!(there.state(), MigrationState::Prepared, "nobody told it to commit");
    room(&mut pair.n1).await;
    let done = reaches(&pair.n1, ID, Direction::Out, MigrationState::Completed).await;
    assert!(done.freezes.len() > 1, "{done:?}");
    pair.ends("the disk of the source was full in the freeze", load, MigrationState::Completed).await;
}

/// Who owns the slots is decided, and clients do not wait until the source can write it down.
#[tokio::test]
async fn a_source_that_cannot_give_the_slots_up_redirects_all_the_same() {
    let (mut pair, load, proxy) = with_commit_on_its_way().await;
    full_at(&pair.n1, 0);
    proxy.go(Ways::default());
    storage_failed(&pair.n1, Direction::Out).await;
    load.going().await;
    let shown = out(&pair).await;
    assert_eq!((shown.state(), shown.gate()), (MigrationState::Committing, MigrationGate::Moved));
    assert_eq!(shown.freezes.last().unwrap().outcome(), FreezeOutcome::Committed, "{shown:?}");
    let there = pair.target_is_honest("the disk of the source was full").await.unwrap();
    assert_eq!((there.state(), there.gate()), (MigrationState::Committed, MigrationGate::Open));
    room(&mut pair.n1).await;
    pair.ends("the disk of the source was full behind the commit", load, MigrationState::Completed).await;
}

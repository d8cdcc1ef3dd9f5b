//! A node comes back with another store than the one that the migration began with, or not at all: nobody guesses, an operator decides,
//! either way and at either node.

use crate::support;
use std::time::Duration;

use crate::support::migration::{
    ID, Pair, Slow, begin, cancel, limits, manual, progress, reaches, request, resolve, slots,
};
use crate::support::proxy::{Frame, Proxy, Ways};
use crate::support::{call, checker, client, until};
use node::demo::client::Client;
use node::demo::processes::NodeProcess;
use proto::common::error::Error;
use proto::common::slots::RECLAIM_STEP;
use proto::node::health_service_client::HealthServiceClient;
use proto::node::{
    Direction, HealthCheckRequest, HealthStatus, MigrationDecision, MigrationGate, MigrationProgress,
    MigrationState,
};

/// Leads a migration to where the source waits for the answer to `Commit`.
async fn committing(pair: &Pair, ways: Ways) -> Proxy {
    let (proxy, request) = pair.behind(request(ID, &pair.n2)).await;
    proxy.arm(Frame::Commit, ways);
    begin(&pair.n1, request).await.unwrap();
    proxy.fired().await;
    let there = if ways == Ways::LATE { MigrationState::Prepared } else { MigrationState::Committed };
    reaches(&pair.n2, ID, Direction::In, there).await;
    assert_eq!(pair.source().await, MigrationState::Committing);
    proxy
}

async fn out(pair: &Pair) -> MigrationProgress {
    progress(&pair.n1, ID, Direction::Out).await.unwrap()
}

fn reason_of(shown: &MigrationProgress) -> String {
    shown.progress.clone().unwrap().error.unwrap().reason
}

fn is(refused: &Error, reason: &str) -> bool {
    refused.reason() == reason
}

#[tokio::test]
async fn a_target_that_was_wiped_before_the_freeze_costs_nobody_anything() {
    for slow in [Some(Slow::Copying), None] {
        let mut pair = Pair::start(2000, 1000).await;
        let load = pair.load();
        let mut asked = manual(ID, &pair.n2);
        asked.limits = slow.and_then(limits);
        begin(&pair.n1, asked).await.unwrap();
        let state = if slow.is_some() { MigrationState::Copying } else { MigrationState::Ready };
        reaches(&pair.n1, ID, Direction::Out, state).await;
        pair.restart_target_wiped().await;
        let stopped = reaches(&pair.n1, ID, Direction::Out, MigrationState::NeedsOperator).await;
        assert_eq!((stopped.gate(), reason_of(&stopped).as_str()), (MigrationGate::Open, "STORE_CHANGED"));
        assert_eq!(pair.target().await, MigrationState::Unspecified);
        let refused = cancel(&pair.n1, ID).await.unwrap_err();
        assert!(is(&refused, "RESOLVE_REFUSED"), "{refused:?}");
        let decided = resolve(&pair.n1, &stopped, MigrationDecision::Discarded).await.unwrap();
        assert_eq!((decided.state(), decided.slot_epoch), (MigrationState::Cancelled, 1 + RECLAIM_STEP));
        assert_eq!(decided.resolved_reason.as_deref(), Some("a test decides"));
        // The new store can be moved to like any other.
        begin(&pair.n1, request("again", &pair.n2)).await.unwrap();
        let again = reaches(&pair.n1, "again", Direction::Out, MigrationState::Completed).await;
        assert_eq!(again.slot_epoch, 2 + RECLAIM_STEP);
        until("the target's end", async || {
            support::migration::state(&pair.n2, "again", Direction::In).await == MigrationState::Completed
        })
        .await;
        let faults = checker::check(&load.finish().await, 1);
        assert!(faults.is_empty(), "{faults:?}");
        pair.owner(true).await;
        pair.nothing_is_left().await;
    }
}

#[tokio::test]
async fn a_target_that_was_wiped_while_it_was_prepared_leaves_the_slots_to_an_operator() {
    let mut pair = Pair::start(300, 100).await;
    let load = pair.load();
    load.going().await;
    let proxy = committing(&pair, Ways::LATE).await;
    pair.restart_target_wiped().await;
    proxy.cut();
    let stopped = reaches(&pair.n1, ID, Direction::Out, MigrationState::NeedsOperator).await;
    assert_eq!((stopped.gate(), reason_of(&stopped).as_str()), (MigrationGate::Closed, "STORE_CHANGED"));
    let answer = call(&mut client(&pair.n1).await, "GET foo").await;
    assert!(answer.starts_with("-TRYAGAIN"), "nobody serves what was not decided: {answer}");

    // It is as stuck after a restart.
    pair.n1.kill().await.unwrap();
    pair.n1.restart().await.unwrap();
    // And after one of the target.
    pair.n2.kill().await.unwrap();
    pair.n2.restart().await.unwrap();
    let again = out(&pair).await;
    assert_eq!((again.state(), again.gate()), (MigrationState::NeedsOperator, MigrationGate::Closed));
    let mut other_store = again.clone();
    other_store.peer.as_mut().unwrap().store_id = b"another store ID".to_vec().into();
    for wrong in [MigrationProgress { attempt: again.attempt + 1, ..again.clone() }, other_store] {
        let refused = resolve(&pair.n1, &wrong, MigrationDecision::Discarded).await.unwrap_err();
        assert!(is(&refused, "RESOLVE_REFUSED"), "{refused:?}");
    }
    for _ in 0..2 {
        let decided = resolve(&pair.n1, &again, MigrationDecision::Discarded).await.unwrap();
        assert_eq!((decided.state(), decided.gate()), (MigrationState::Cancelled, MigrationGate::Open));
        assert_eq!(decided.slot_epoch, 1 + RECLAIM_STEP, "higher than what the lost store may have");
    }
    let refused = resolve(&pair.n1, &again, MigrationDecision::Committed).await.unwrap_err();
    assert!(is(&refused, "RESOLVE_REFUSED"), "{refused:?}");
    let faults = checker::check(&load.finish().await, 0);
    assert!(faults.is_empty(), "{faults:?}");
    assert_eq!(call(&mut client(&pair.n1).await, "GET foo").await, "nil");
    pair.nothing_is_left().await;
}

#[tokio::test]
async fn a_target_that_was_wiped_after_the_commit_may_be_given_up() {
    let mut pair = Pair::start(300, 100).await;
    let proxy = committing(&pair, Ways::LOST).await;
    pair.restart_target_wiped().await;
    proxy.cut();
    let stopped = reaches(&pair.n1, ID, Direction::Out, MigrationState::NeedsOperator).await;
    assert_eq!(stopped.gate(), MigrationGate::Closed);
    let decided = resolve(&pair.n1, &stopped, MigrationDecision::Committed).await.unwrap();
    assert_eq!((decided.state(), decided.gate()), (MigrationState::Completed, MigrationGate::Moved));
    let answer = call(&mut client(&pair.n1).await, "GET foo").await;
    assert!(answer.starts_with("-MOVED"), "{answer}");
    // Whoever lost the slots does not serve them from nothing, whatever others believe.
    for _ in 0..10 {
        let answer = call(&mut client(&pair.n2).await, "GET foo").await;
        assert!(answer.starts_with('-'), "{answer}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    pair.nothing_is_left().await;
}

#[tokio::test]
async fn a_target_that_returns_after_the_slots_were_taken_back_obeys() {
    let mut pair = Pair::start(300, 100).await;
    let load = pair.load();
    load.going().await;
    let proxy = committing(&pair, Ways::LOST).await;
    pair.n2.kill().await.unwrap();
    proxy.cut();
    // The node that is gone answers nothing; the operator does not wait.
    let seen = out(&pair).await;
    assert_eq!(seen.state(), MigrationState::Committing);
    until("the last stream has ended, and no other one began", async || {
        let now = out(&pair).await;
        resolve(&pair.n1, &now, MigrationDecision::Discarded).await.is_ok()
    })
    .await;
    let decided = out(&pair).await;
    assert_eq!((decided.state(), decided.slot_epoch), (MigrationState::Cancelled, 1 + RECLAIM_STEP));
    pair.n2.restart().await.unwrap();
    proxy.go(Ways::default());
    until("it learns that its commit does not count", async || {
        call(&mut client(&pair.n2).await, "GET foo").await.starts_with('-')
    })
    .await;
    pair.owner(false).await;
    let faults = checker::check(&load.finish().await, 0);
    assert!(faults.is_empty(), "{faults:?}");
    until("the source has told it", async || out(&pair).await.state() == MigrationState::Cancelled).await;
    pair.nothing_is_left().await;
}

/// The source is gone for good while the target is prepared.
async fn without_source(decision: MigrationDecision) {
    let mut pair = Pair::start(300, 100).await;
    let proxy = committing(&pair, Ways::LATE).await;
    let mine = (0..300).filter(|n| slots().contains(node::common::slot_of(format!("key:{n}").as_bytes())));
    let (mine, committed) = (mine.count(), decision == MigrationDecision::Committed);
    pair.n1.kill().await.unwrap();
    proxy.cut();
    let seen = progress(&pair.n2, ID, Direction::In).await.unwrap();
    assert_eq!((seen.state(), seen.gate()), (MigrationState::Prepared, MigrationGate::Closed));
    let mut wrong = seen.clone();
    wrong.peer.as_mut().unwrap().store_id = b"another store ID".to_vec().into();
    let refused = resolve(&pair.n2, &wrong, decision).await.unwrap_err();
    assert!(is(&refused, "RESOLVE_REFUSED"), "{refused:?}");
    let decided = resolve(&pair.n2, &seen, decision).await.unwrap();
    assert_eq!(decided.decision(), decision);
    let mut at_n2 = client(&pair.n2).await;
    let expected = if committed { mine } else { 0 };
    assert_eq!(call(&mut at_n2, "DBSIZE").await, format!(":{expected}"));
    assert_eq!(call(&mut at_n2, "GET foo").await == "nil", committed);
    // Told of the decision when it is back after all.
    pair.n1.restart().await.unwrap();
    let end = if committed { MigrationState::Completed } else { MigrationState::Cancelled };
    reaches(&pair.n1, ID, Direction::Out, end).await;
    pair.owner(committed).await;
    pair.nothing_is_left().await;
}

#[tokio::test]
async fn an_operator_may_decide_at_a_target_whose_source_is_gone() {
    without_source(MigrationDecision::Committed).await;
    without_source(MigrationDecision::Discarded).await;
}

#[tokio::test]
async fn a_decision_at_the_source_alone_does_not_make_the_target_serve() {
    let mut pair = Pair::start(300, 100).await;
    let proxy = committing(&pair, Ways::LATE).await;
    pair.n2.kill().await.unwrap();
    proxy.cut();
    until("the commit is decided at the source", async || {
        let now = out(&pair).await;
        resolve(&pair.n1, &now, MigrationDecision::Committed).await.is_ok()
    })
    .await;
    pair.n2.restart().await.unwrap();
    // It goes on waiting, since nobody decided here, and does not serve rows that nobody made visible.
    for _ in 0..10 {
        assert_eq!(pair.target().await, MigrationState::Prepared);
        let answer = tokio::time::timeout(Duration::from_millis(100), async {
            call(&mut client(&pair.n2).await, "GET foo").await
        });
        let answer = answer.await.unwrap_or_else(|_| "-held".to_owned());
        assert!(answer.starts_with('-'), "{answer}");
    }
    let seen = progress(&pair.n2, ID, Direction::In).await.unwrap();
    resolve(&pair.n2, &seen, MigrationDecision::Committed).await.unwrap();
    reaches(&pair.n2, ID, Direction::In, MigrationState::Completed).await;
    pair.owner(true).await;
    pair.nothing_is_left().await;
}

/// Moves the slots, then wipes the node that had them, and starts it with the arguments that it was first started with, as if it owned them still.
async fn wiped_owner(peers: bool) -> (Pair, Vec<String>) {
    let mut pair = Pair::start(300, 100).await;
    begin(&pair.n1, request(ID, &pair.n2)).await.unwrap();
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Completed).await;
    assert_eq!(call(&mut client(&pair.n2).await, "SET foo new").await, "OK");
    pair.n1.kill().await.unwrap();
    std::fs::remove_dir_all(pair.directory.path().join("n1")).unwrap();
    let peer = support::migration::peer(&pair.n2);
    let arguments = ["--peer", peer.as_str()];
    pair.n1.set_arguments(if peers { &arguments } else { &[] });
    // From the first moment at which anybody can ask it.
    let address = pair.n1.addresses().resp.clone();
    let asking = tokio::spawn(async move {
        let mut answers = Vec::new();
        while answers.len() < 300 {
            let Ok(mut n1) = Client::connect(&address).await else { continue };
            while let Ok(answer) = n1.call(&["GET", "foo"]).await {
                answers.push(support::show(&answer));
                if answers.len() == 300 {
                    break;
                }
            }
        }
        answers
    });
    pair.n1.restart().await.unwrap();
    (pair, asking.await.unwrap())
}

#[tokio::test]
async fn an_owner_that_was_wiped_asks_its_peers_before_it_serves() {
    let (pair, answers) = wiped_owner(true).await;
    let moved = |answer: &String| answer.starts_with("-MOVED") && answer.ends_with(&pair.n2.addresses().resp);
    assert!(answers.iter().all(moved), "{answers:?}");
    assert_eq!(call(&mut client(&pair.n2).await, "GET foo").await, "new");
    let refused = begin(&pair.n1, request("again", &pair.n2)).await.unwrap_err();
    assert_eq!(refused.reason(), "NOT_SLOT_OWNER", "{refused:?}");
}

/// Whom nobody tells of the others has no way to know; the owner does, and says so.
#[tokio::test]
async fn an_owner_that_was_wiped_and_knows_nobody_is_told_of_by_the_true_one() {
    let (pair, answers) = wiped_owner(false).await;
    assert!(answers.iter().all(|answer| answer == "nil"), "the control: {answers:?}");
    assert_eq!(call(&mut client(&pair.n2).await, "GET foo").await, "new");
    let endpoint = proto::common::tuning::endpoint(&pair.n2.addresses().grpc).unwrap();
    let mut health = HealthServiceClient::new(endpoint.connect().await.unwrap());
    until("its health names both", async || {
        let asked = HealthCheckRequest { service: "owners".to_owned(), ..HealthCheckRequest::default() };
        let told = health.health_check(asked).await.unwrap().into_inner().health.unwrap();
        let named =
            "node n1 owns slots 0-16383 at epoch 1, says n1; slots 8192-16383 are this node's at epoch 2";
        told.status() == HealthStatus::Degraded && told.message.contains(named)
    })
    .await;
    // Whoever has to do with the true owner learns of it.
    begin(&pair.n1, request("again", &pair.n2)).await.unwrap();
    until("it redirects", async || call(&mut client(&pair.n1).await, "GET foo").await.starts_with("-MOVED"))
        .await;
    assert_eq!(call(&mut client(&pair.n2).await, "GET foo").await, "new");
}

/// The slots are at n2, and the wiped n1, which nobody told so, is asked to move them to n3.
async fn to_a_third(n3_is_told: bool) -> (Pair, NodeProcess) {
    let (pair, answers) = wiped_owner(false).await;
    assert!(answers.iter().all(|answer| answer == "nil"), "n1 takes itself for the owner: {answers:?}");
    let peer = support::migration::peer(&pair.n2);
    let arguments: &[&str] = if n3_is_told { &["--peer", &peer] } else { &[] };
    let directory = pair.directory.path();
    let n3 = NodeProcess::start_with(&support::program(), "n3", directory, "none", arguments).await.unwrap();
    if n3_is_told {
        // It asks before it serves, but waits a second for the answer at most.
        until("n3 knows the owner", async || {
            call(&mut client(&n3).await, "GET foo").await.ends_with(&pair.n2.addresses().resp)
        })
        .await;
    }
    begin(&pair.n1, request("again", &n3)).await.unwrap();
    (pair, n3)
}

/// Whoever is told of the true owner does not take its slots from another one, at an epoch that is taken.
#[tokio::test]
async fn a_third_node_that_knows_the_true_owner_takes_nothing_from_one_that_was_wiped() {
    let (pair, n3) = to_a_third(true).await;
    until("n3 refuses", async || {
        let shown = progress(&pair.n1, "again", Direction::Out).await.unwrap();
        assert_eq!(shown.state(), MigrationState::Pending, "nothing is copied: {shown:?}");
        let refusal = shown.progress.unwrap().error;
        refusal.is_some_and(|error| {
            let holder = error.metadata.get("holder").map(String::as_str);
            assert_eq!((error.reason.as_str(), holder), ("RANGE_BUSY", Some("n2")), "{error:?}");
            true
        })
    })
    .await;
    let answer = call(&mut client(&n3).await, "GET foo").await;
    assert!(answer.starts_with("-MOVED") && answer.ends_with(&pair.n2.addresses().resp), "{answer}");
    assert_eq!(call(&mut client(&pair.n2).await, "GET foo").await, "new");
    let cancelled = cancel(&pair.n1, "again").await.unwrap();
    assert_ne!(cancelled.decision(), MigrationDecision::Committed);
    reaches(&pair.n1, "again", Direction::Out, MigrationState::Cancelled).await;
}

/// The control, and the limit: where nobody who takes part knows the true owner, nobody can refuse.
#[tokio::test]
async fn a_third_node_that_knows_nobody_takes_slots_from_one_that_was_wiped() {
    let (pair, n3) = to_a_third(false).await;
    let moved = reaches(&pair.n1, "again", Direction::Out, MigrationState::Completed).await;
    assert_eq!(moved.slot_epoch, 2, "which is n2's");
    assert_eq!(call(&mut client(&n3).await, "GET foo").await, "nil");
    assert_eq!(call(&mut client(&pair.n2).await, "GET foo").await, "new");
}

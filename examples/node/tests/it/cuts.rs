//! What is between the nodes fails: connections are cut, one direction swallows what is sent, answers get lost and commits arrive late.

use std::time::Duration;

use crate::support::migration::{
    ID, Pair, Slow, begin, complete, limits, manual, progress, reaches, request, service,
};
use crate::support::proxy::{Frame, Way, Ways};
use crate::support::{at_once, call, client, until};
use node::demo::processes::NodeProcess;
use proto::node::{
    CompleteMigrationRequest, Direction, FreezeOutcome, MigrationGate, MigrationProgress, MigrationState,
    StartMigrationRequest,
};

const FRAMES_LOST: Ways = Ways { there: Way::Swallow, back: Way::Pass };

async fn out(pair: &Pair) -> MigrationProgress {
    progress(&pair.n1, ID, Direction::Out).await.unwrap()
}

/// Whether a node answers a read of a slot that moves within a short time, with a value.
async fn serves(node: &NodeProcess) -> bool {
    let mut client = client(node).await;
    let answer = tokio::time::timeout(Duration::from_millis(500), call(&mut client, "GET foo")).await;
    answer.is_ok_and(|answer| !answer.starts_with('-'))
}

#[tokio::test]
async fn a_source_that_cannot_learn_of_the_commit_does_not_serve() {
    let pair = Pair::start(300, 100).await;
    let load = pair.load();
    let (proxy, request) = pair.behind(request(ID, &pair.n2)).await;
    proxy.arm(Frame::Commit, Ways::LOST);
    proxy.go_next(Ways::default());
    begin(&pair.n1, request).await.unwrap();
    proxy.fired().await;
    // Nor do the answers to those who ask for the outcome arrive.
    proxy.go_next(Ways::LOST);
    reaches(&pair.n2, ID, Direction::In, MigrationState::Committed).await;
    for _ in 0..4 {
        let shown = out(&pair).await;
        assert_eq!((shown.state(), shown.gate()), (MigrationState::Committing, MigrationGate::Closed));
        assert!(!serves(&pair.n1).await, "the source serves what it may have given away");
        assert!(serves(&pair.n2).await, "the target serves what it owns");
    }
    assert!(proxy.swallowed() > 0);
    proxy.go(Ways::default());
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Completed).await;
    let shown = out(&pair).await;
    assert!(shown.attempt >= 2, "it asked in a stream of its own: {shown:?}");
    pair.ends("the answers to the commit were lost", load, MigrationState::Completed).await;
}

#[tokio::test]
async fn a_source_asks_again_soon_when_the_answer_to_a_commit_is_lost() {
    let mut pair = Pair::start(300, 100).await;
    // With the usual patience for silence, which is far longer than clients should wait.
    pair.restart_target(&[]).await;
    let load = pair.load();
    let (proxy, request) = pair.behind(request(ID, &pair.n2)).await;
    proxy.arm(Frame::Commit, Ways::LOST);
    begin(&pair.n1, request).await.unwrap();
    proxy.fired().await;
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Completed).await;
    let shown = out(&pair).await;
    assert!(shown.attempt >= 2, "{shown:?}");
    assert!(shown.max_freeze_ms < 15_000, "requests waited for {} ms", shown.max_freeze_ms);
    assert!(shown.freezes[0].commit_ms >= 1000, "most of it for the outcome: {shown:?}");
    pair.ends("one answer to the commit was lost", load, MigrationState::Completed).await;
}

#[tokio::test]
async fn a_commit_that_arrives_late_commits_nothing() {
    let pair = Pair::start(300, 100).await;
    let load = pair.load();
    let (proxy, request) = pair.behind(manual(ID, &pair.n2)).await;
    begin(&pair.n1, request).await.unwrap();
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Ready).await;
    proxy.arm(Frame::Commit, Ways::LATE);
    let soon = CompleteMigrationRequest {
        migration_id: ID.to_owned(),
        deadline_ms: Some(1500),
        ..CompleteMigrationRequest::default()
    };
    service(&pair.n1).await.unwrap().complete_migration(soon).await.unwrap();
    proxy.fired().await;
    let shown = reaches(&pair.n2, ID, Direction::In, MigrationState::Prepared).await;
    let fenced = shown.attempt;
    assert_eq!(pair.source().await, MigrationState::Committing);
    until("the wish to cut over is past", async || {
        let deadline = out(&pair).await.complete_deadline_unix_ms.unwrap_or(0);
        proto::common::clock::now_unix_ms() > deadline
    })
    .await;
    // The source opens the next attempt, while the Commit of this one is still under way.
    proxy.cut();
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Ready).await;
    let shown = reaches(&pair.n2, ID, Direction::In, MigrationState::Receiving).await;
    assert!(shown.attempt > fenced && proxy.swallowed() > 0, "{shown:?}");
    assert_eq!(out(&pair).await.freezes.last().unwrap().outcome(), FreezeOutcome::Fenced);
    assert_eq!(proxy.late(), 0);
    proxy.go(Ways::default());
    until("the Commit arrives", async || proxy.late() > 0).await;
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(pair.target().await, MigrationState::Receiving, "a fenced attempt committed");
    }
    assert!(serves(&pair.n1).await && !serves(&pair.n2).await);
    complete(&pair.n1, ID).await.unwrap();
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Completed).await;
    let outcomes: Vec<_> = out(&pair).await.freezes.iter().map(|freeze| freeze.outcome()).collect();
    let committed = [FreezeOutcome::Fenced, FreezeOutcome::Committed];
    assert_eq!((outcomes.first(), outcomes.last()), (committed.first(), committed.last()), "{outcomes:?}");
    pair.ends("a commit arrived late", load, MigrationState::Completed).await;
}

#[tokio::test]
async fn a_commit_and_the_next_attempt_may_arrive_at_the_same_time() {
    for _ in 0..3 {
        let pair = Pair::start(300, 100).await;
        let load = pair.load();
        let (proxy, request) = pair.behind(request(ID, &pair.n2)).await;
        proxy.arm(Frame::Commit, Ways::LATE);
        begin(&pair.n1, request).await.unwrap();
        proxy.fired().await;
        assert_eq!(pair.source().await, MigrationState::Committing);
        proxy.cut();
        tokio::time::sleep(Duration::from_millis(rand::random_range(0..100))).await;
        proxy.go(Ways::default());
        until("the Commit arrives", async || proxy.late() > 0).await;
        pair.ends("a commit met the next attempt", load, MigrationState::Completed).await;
    }
}

/// Lets a manual migration without limits go on to its end.
async fn go_on(pair: &Pair, request: StartMigrationRequest) {
    begin(&pair.n1, StartMigrationRequest { limits: None, ..request }).await.unwrap();
    until("the wish to cut over is accepted", async || complete(&pair.n1, ID).await.is_ok()).await;
}

async fn cut_in(state: MigrationState) {
    use MigrationState::{CatchingUp, Committing, Copying, Freezing};
    let pair = Pair::start(2000, 1000).await;
    let load = pair.load();
    let (proxy, mut request) = pair.behind(manual(ID, &pair.n2)).await;
    request.limits = match state {
        Copying => limits(Slow::Copying),
        CatchingUp => limits(Slow::CatchingUp),
        _ => limits(Slow::Freezing),
    };
    let frame = match state {
        Freezing => Some(Frame::Prepare),
        Committing => Some(Frame::Commit),
        _ => None,
    };
    if let Some(frame) = frame {
        request.spec.as_mut().unwrap().auto_complete = true;
        proxy.arm(frame, Ways::LATE);
    }
    begin(&pair.n1, request.clone()).await.unwrap();
    if frame.is_some() {
        proxy.fired().await;
    }
    let before = reaches(&pair.n1, ID, Direction::Out, state).await.attempt;
    proxy.cut();
    until("the next attempt", async || out(&pair).await.attempt > before).await;
    assert!(!out(&pair).await.incidents.is_empty(), "the cut is told of");
    if frame.is_none() {
        go_on(&pair, request).await;
    }
    pair.ends(&format!("a cut in {state:?}"), load, MigrationState::Completed).await;
}

#[tokio::test]
async fn a_connection_may_be_cut_in_each_state() {
    use MigrationState::{CatchingUp, Committing, Copying, Freezing, Ready};
    at_once([Copying, CatchingUp, Ready, Freezing, Committing].map(cut_in)).await;
}

async fn swallowed_in(state: MigrationState, lost: Ways) {
    let pair = Pair::start(2000, 1000).await;
    let load = pair.load();
    let (proxy, mut request) = pair.behind(manual(ID, &pair.n2)).await;
    if state == MigrationState::Copying {
        request.limits = limits(Slow::Copying);
    }
    begin(&pair.n1, request.clone()).await.unwrap();
    let before = reaches(&pair.n1, ID, Direction::Out, state).await.attempt;
    proxy.go(lost);
    proxy.go_next(Ways::default());
    until("silence ends the stream, and the next one comes", async || out(&pair).await.attempt > before)
        .await;
    assert!(proxy.swallowed() > 0, "{lost:?}");
    assert!(!out(&pair).await.incidents.is_empty(), "{lost:?}");
    go_on(&pair, request).await;
    pair.ends(&format!("{lost:?} in {state:?}"), load, MigrationState::Completed).await;
}

#[tokio::test]
async fn either_direction_may_swallow_what_is_sent() {
    let states = [MigrationState::Copying, MigrationState::Ready];
    let cases = states.into_iter().flat_map(|state| [FRAMES_LOST, Ways::LOST].map(|lost| (state, lost)));
    at_once(cases.map(|(state, lost)| swallowed_in(state, lost))).await;
}

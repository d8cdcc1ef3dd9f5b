//! Both nodes are killed at once, in each state of a migration, while clients write; both come back, and it ends by itself.

use std::time::Duration;

use crate::support::migration::{
    ID, Pair, Slow, begin, complete, limits, manual, progress, reaches, request,
};
use crate::support::proxy::{Frame, Ways};
use crate::support::{at_once, until};
use proto::node::{Direction, FreezeOutcome, MigrationState, StartMigrationRequest};

/// Both die while rows or changes flow, and a manual migration is completed afterwards.
async fn before_the_freeze(state: MigrationState) {
    let mut pair = Pair::start(2000, 1000).await;
    let load = pair.load();
    let mut request = manual(ID, &pair.n2);
    request.limits = match state {
        MigrationState::Copying => limits(Slow::Copying),
        MigrationState::CatchingUp => limits(Slow::CatchingUp),
        _ => None,
    };
    begin(&pair.n1, request.clone()).await.unwrap();
    let before = if state == MigrationState::Copying {
        let mut found = None;
        until("something is copied", async || {
            found = progress(&pair.n1, ID, Direction::Out).await;
            found.as_ref().is_some_and(|found| found.progress.as_ref().unwrap().items_done > 0)
        })
        .await;
        found.unwrap()
    } else {
        reaches(&pair.n1, ID, Direction::Out, state).await
    };
    pair.crash().await;
    pair.both_are_honest(&format!("both died in {state:?}")).await;
    begin(&pair.n1, StartMigrationRequest { limits: None, ..request }).await.unwrap();
    until("the wish to cut over is accepted", async || complete(&pair.n1, ID).await.is_ok()).await;
    let done = reaches(&pair.n1, ID, Direction::Out, MigrationState::Completed).await;
    assert!(done.attempt > before.attempt, "{done:?}");
    assert_eq!(done.copy, 1, "what was durable is not copied again: {done:?}");
    pair.ends(&format!("both died in {state:?}"), load, MigrationState::Completed).await;
}

/// Both die when `frame` went these `ways`, which the source waits for in `state`.
async fn around_the_commit(frame: Frame, ways: Ways, state: MigrationState, there: MigrationState) {
    let mut pair = Pair::start(300, 100).await;
    let load = pair.load();
    let (proxy, mut request) = pair.behind(request(ID, &pair.n2)).await;
    proxy.arm(frame, ways);
    request.limits = limits(Slow::Freezing);
    begin(&pair.n1, request).await.unwrap();
    proxy.fired().await;
    reaches(&pair.n2, ID, Direction::In, there).await;
    assert_eq!(pair.source().await, state);
    pair.crash().await;
    let what = format!("both died in {state:?} and {there:?}");
    pair.both_are_honest(&what).await;
    let done = reaches(&pair.n1, ID, Direction::Out, MigrationState::Completed).await;
    let first = done.freezes[0].outcome();
    let expected = match (state, there) {
        (MigrationState::Freezing, _) => FreezeOutcome::Interrupted,
        (_, MigrationState::Committed) => FreezeOutcome::Committed,
        _ => FreezeOutcome::Fenced,
    };
    assert_eq!(first, expected, "{what}: {done:?}");
    pair.ends(&what, load, MigrationState::Completed).await;
}

#[tokio::test]
async fn both_nodes_die_before_the_freeze() {
    use MigrationState::{CatchingUp, Copying, Ready};
    at_once([Copying, CatchingUp, Ready].map(before_the_freeze)).await;
}

#[tokio::test]
async fn both_nodes_die_around_the_commit() {
    use MigrationState::{Committed, Committing, Freezing, Prepared, Receiving};
    let cases = [
        (Frame::Prepare, Ways::LATE, Freezing, Receiving),
        (Frame::Prepare, Ways::LOST, Freezing, Prepared),
        (Frame::Commit, Ways::LATE, Committing, Prepared),
        (Frame::Commit, Ways::LOST, Committing, Committed),
    ];
    at_once(cases.map(|(frame, ways, state, there)| around_the_commit(frame, ways, state, there))).await;
}

/// Whatever the moment is: three times for the same migration, if it lasts that long.
#[tokio::test]
async fn both_nodes_die_at_any_moment() {
    for _ in 0..3 {
        let mut pair = Pair::start(300, 100).await;
        let load = pair.load();
        begin(&pair.n1, request(ID, &pair.n2)).await.unwrap();
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(rand::random_range(0..200))).await;
            pair.crash().await;
            pair.both_are_honest("both died at random moments").await;
        }
        pair.ends("both died at random moments", load, MigrationState::Completed).await;
    }
}

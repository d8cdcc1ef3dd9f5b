//! A migration is cancelled in each of its states, at either node, while clients write: the source goes on serving, or it is too late.

use crate::support::at_once;
use crate::support::migration::{ID, Pair, Slow, begin, cancel, limits, manual, reaches, request};
use crate::support::proxy::{Frame, Way, Ways};
use proto::node::{Direction, FreezeOutcome, MigrationGate, MigrationState};

/// At the source, in a state in which it stays long enough.
async fn cancelled_in(state: MigrationState) {
    use MigrationState::{CatchingUp, Copying, Freezing, Pending};
    let pair = Pair::start(2000, 1000).await;
    let load = pair.load();
    let (proxy, mut asked) =
        pair.behind(if state == Freezing { request(ID, &pair.n2) } else { manual(ID, &pair.n2) }).await;
    asked.limits = match state {
        Copying => limits(Slow::Copying),
        CatchingUp => limits(Slow::CatchingUp),
        _ => limits(Slow::Freezing),
    };
    match state {
        Pending => proxy.go(Ways { there: Way::Swallow, back: Way::Swallow }),
        Freezing => proxy.arm(Frame::Prepare, Ways::LATE),
        _ => {}
    }
    begin(&pair.n1, asked).await.unwrap();
    if state == Freezing {
        proxy.fired().await;
    }
    let seen = reaches(&pair.n1, ID, Direction::Out, state).await;
    let gate = if state == Freezing { MigrationGate::WritesHeld } else { MigrationGate::Open };
    assert_eq!(seen.gate(), gate);
    let told = cancel(&pair.n1, ID).await.unwrap();
    // What was never accepted has nothing to undo.
    let after = if state == Pending { MigrationState::Cancelled } else { MigrationState::Cancelling };
    assert_eq!((told.state(), told.gate()), (after, MigrationGate::Open), "{state:?}");
    assert_eq!((told.cancel_reason.as_str(), told.cancelled_at_node_id.as_str()), ("a test asks", "n1"));
    if state == Freezing {
        let freeze = told.freezes.last().unwrap();
        assert_eq!(freeze.outcome(), FreezeOutcome::Cancelled, "{freeze:?}");
    }
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Cancelled).await;
    let again = cancel(&pair.n1, ID).await.unwrap();
    assert_eq!(again.state(), MigrationState::Cancelled);
    pair.ends(&format!("a cancel in {state:?}"), load, MigrationState::Cancelled).await;
}

#[tokio::test]
async fn it_is_cancelled_in_each_state_before_the_commit() {
    use MigrationState::{CatchingUp, Copying, Freezing, Pending, Ready};
    at_once([Pending, Copying, CatchingUp, Ready, Freezing].map(cancelled_in)).await;
}

#[tokio::test]
async fn a_cancel_may_be_asked_for_again_while_it_is_under_way() {
    let pair = Pair::start(300, 100).await;
    let load = pair.load();
    let (proxy, asked) = pair.behind(manual(ID, &pair.n2)).await;
    begin(&pair.n1, asked).await.unwrap();
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Ready).await;
    proxy.arm(Frame::Discard, Ways::LATE);
    for _ in 0..3 {
        assert_eq!(cancel(&pair.n1, ID).await.unwrap().state(), MigrationState::Cancelling);
    }
    proxy.fired().await;
    assert_eq!(pair.target().await, MigrationState::Receiving);
    assert_eq!(cancel(&pair.n1, ID).await.unwrap().state(), MigrationState::Cancelling);
    proxy.cut();
    pair.ends("cancels while cancelling", load, MigrationState::Cancelled).await;
}

#[tokio::test]
async fn a_target_whose_answer_was_lost_hears_of_the_cancel() {
    let pair = Pair::start(300, 100).await;
    let load = pair.load();
    let (proxy, asked) = pair.behind(manual(ID, &pair.n2)).await;
    proxy.go(Ways::LOST);
    begin(&pair.n1, asked).await.unwrap();
    reaches(&pair.n2, ID, Direction::In, MigrationState::Receiving).await;
    assert_eq!(pair.source().await, MigrationState::Pending);
    proxy.go_next(Ways::default());
    assert_eq!(cancel(&pair.n1, ID).await.unwrap().state(), MigrationState::Cancelled);
    // Otherwise it would keep the slots from others for a minute.
    reaches(&pair.n2, ID, Direction::In, MigrationState::Cancelled).await;
    pair.ends("a cancel that the target did not know of", load, MigrationState::Cancelled).await;
}

/// While the outcome is being found out, and after.
async fn too_late(ways: Ways) {
    let pair = Pair::start(300, 100).await;
    let load = pair.load();
    let (proxy, asked) = pair.behind(request(ID, &pair.n2)).await;
    proxy.arm(Frame::Commit, ways);
    begin(&pair.n1, asked).await.unwrap();
    proxy.fired().await;
    let refused = cancel(&pair.n1, ID).await.unwrap_err();
    assert_eq!(refused.reason(), "OUTCOME_PENDING", "{refused:?}");
    assert!(refused.is_retryable());
    assert_eq!(pair.source().await, MigrationState::Committing);
    if ways == Ways::LOST {
        reaches(&pair.n2, ID, Direction::In, MigrationState::Committed).await;
        let refused = cancel(&pair.n2, ID).await.unwrap_err();
        assert_eq!(refused.reason(), "ALREADY_COMMITTED", "{refused:?}");
    }
    proxy.cut();
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Completed).await;
    reaches(&pair.n2, ID, Direction::In, MigrationState::Completed).await;
    for node in [&pair.n1, &pair.n2] {
        let refused = cancel(node, ID).await.unwrap_err();
        assert_eq!(refused.reason(), "ALREADY_COMMITTED", "{}: {refused:?}", node.id());
    }
    pair.ends("a cancel that came too late", load, MigrationState::Completed).await;
}

#[tokio::test]
async fn a_cancel_while_or_after_it_commits_is_refused() {
    at_once([Ways::LATE, Ways::LOST].map(too_late)).await;
}

/// At the target, where the source is to learn of it.
async fn cancelled_at_the_target(state: MigrationState) {
    let pair = Pair::start(300, 100).await;
    let load = pair.load();
    let prepared = state == MigrationState::Prepared;
    let asked = if prepared { request(ID, &pair.n2) } else { manual(ID, &pair.n2) };
    let (proxy, asked) = pair.behind(asked).await;
    proxy.arm(Frame::Commit, Ways::LATE);
    begin(&pair.n1, asked).await.unwrap();
    if prepared {
        proxy.fired().await;
    } else {
        reaches(&pair.n1, ID, Direction::Out, MigrationState::Ready).await;
    }
    reaches(&pair.n2, ID, Direction::In, state).await;
    let told = cancel(&pair.n2, ID).await.unwrap();
    assert_eq!((told.state(), told.cancelled_at_node_id.as_str()), (MigrationState::Cancelled, "n2"));
    let end = reaches(&pair.n1, ID, Direction::Out, MigrationState::Cancelled).await;
    assert_eq!((end.cancel_reason.as_str(), end.cancelled_at_node_id.as_str()), ("a test asks", "n2"));
    // The Commit of a source that did not know is harmless.
    proxy.go(Ways::default());
    pair.ends(&format!("a cancel at the target in {state:?}"), load, MigrationState::Cancelled).await;
}

#[tokio::test]
async fn it_is_cancelled_at_the_target() {
    at_once([MigrationState::Receiving, MigrationState::Prepared].map(cancelled_at_the_target)).await;
}

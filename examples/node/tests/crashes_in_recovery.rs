//! What a crash of a migration leads to is interrupted by another one, of the same node or of the other: all ends by itself all the same.

#![allow(clippy::unwrap_used)]

#[allow(dead_code, unreachable_pub)]
mod support;

use proto::common::slots::RECLAIM_STEP;
use proto::node::{Direction, MigrationDecision, MigrationGate, MigrationProgress, MigrationState};
use support::crash::{Crash, End, Source, Target, all, dies, doom};
use support::migration::{ID, Pair, begin, manual, progress, reaches, request, resolve};
use support::{at_once, call, checker, client, until};

fn after(first: Crash, second: &[Crash]) -> Vec<Vec<Crash>> {
    second.iter().map(|second| vec![first, *second]).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_dies_again_while_it_finds_out_the_outcome() {
    let undecided = [(Source, "save.before:COMMITTING"), (Source, "save.after:COMMITTING")];
    all(after((Source, "commit.before:COMMITTING"), &undecided), End::Completed).await;
    let committed = [
        (Source, "save.before:COMMITTING"),
        (Source, "give_up.before:COMMITTING"),
        (Source, "give_up.after:COMMITTING"),
        (Source, "save.before:COMPLETED"),
        (Source, "save.after:COMPLETED"),
        (Source, "finish.between:COMPLETED"),
    ];
    all(after((Source, "commit.after:COMMITTING"), &committed), End::Completed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_target_dies_while_it_fences_what_was_prepared() {
    let fence = [(Target, "record.before:RECEIVING"), (Target, "record.after:RECEIVING")];
    // The source asks for the outcome after its own crash, or after one of the target.
    for first in [
        (Source, "commit.before:COMMITTING"),
        (Target, "record.after:PREPARED"),
        (Target, "take_over.before:COMMITTED"),
        (Target, "begin.after:RECEIVING"),
    ] {
        all(after(first, &fence), End::Completed).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_target_dies_while_it_tells_what_was_decided() {
    let told = [
        (Target, "record.before:COMMITTED"),
        (Target, "record.after:COMMITTED"),
        (Target, "forget.before:COMPLETED"),
        (Target, "forget.after:COMPLETED"),
    ];
    // Where it was cancelled, the target writes nothing when it tells.
    all(after((Source, "save.before:COMPLETED"), &told), End::Completed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_dies_again_while_it_cancels() {
    let again = [(Source, "save.before:CANCELLING"), (Source, "save.before:CANCELLED")];
    all(after((Source, "save.after:CANCELLING"), &again), End::Cancelled).await;
}

/// The evidence is gone, and the source dies while it says so, before the freeze or in COMMITTING.
async fn evidence_is_gone(point: &'static str, committing: bool) {
    let mut pair = Pair::start(300, 100).await;
    let dead = [(Target, "take_over.before:COMMITTED")];
    if committing {
        doom(&mut pair, Target, &dead).await;
    }
    let crash = (Source, point);
    doom(&mut pair, Source, &[crash]).await;
    let load = pair.load();
    let asked = if committing { request(ID, &pair.n2) } else { manual(ID, &pair.n2) };
    begin(&pair.n1, asked).await.unwrap();
    if committing {
        dies(&mut pair, dead[0]).await;
    } else {
        reaches(&pair.n1, ID, Direction::Out, MigrationState::Ready).await;
    }
    pair.restart_target_wiped().await;
    dies(&mut pair, crash).await;
    pair.n1.set_environment(&[]);
    pair.n1.restart().await.unwrap();
    let stopped = reaches(&pair.n1, ID, Direction::Out, MigrationState::NeedsOperator).await;
    let gate = if committing { MigrationGate::Closed } else { MigrationGate::Open };
    assert_eq!(stopped.gate(), gate, "{point}");
    resolve(&pair.n1, &stopped, MigrationDecision::Discarded).await.unwrap();
    pair.owner(false).await;
    let faults = checker::check(&load.finish().await, 0);
    assert!(faults.is_empty(), "{point}: {faults:?}");
    pair.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_dies_while_it_asks_for_an_operator() {
    let points = ["save.before:NEEDS_OPERATOR", "save.after:NEEDS_OPERATOR"];
    let cases = points.into_iter().flat_map(|point| [false, true].map(|committing| (point, committing)));
    at_once(cases.map(|(point, committing)| evidence_is_gone(point, committing))).await;
}

/// The source dies while it does what an operator decided about a target that was wiped; returns what it tells then.
async fn dies_deciding(
    pair: &mut Pair,
    decision: MigrationDecision,
    point: &'static str,
) -> MigrationProgress {
    let dead = (Target, "take_over.before:COMMITTED");
    doom(pair, Target, &[dead]).await;
    begin(&pair.n1, request(ID, &pair.n2)).await.unwrap();
    dies(pair, dead).await;
    pair.restart_target_wiped().await;
    reaches(&pair.n1, ID, Direction::Out, MigrationState::NeedsOperator).await;
    let crash = (Source, point);
    doom(pair, Source, &[crash]).await;
    let stopped = reaches(&pair.n1, ID, Direction::Out, MigrationState::NeedsOperator).await;
    assert_eq!(stopped.gate(), MigrationGate::Closed);
    resolve(&pair.n1, &stopped, decision).await.unwrap_err();
    dies(pair, crash).await;
    pair.n1.set_environment(&[]);
    pair.n1.restart().await.unwrap();
    progress(&pair.n1, ID, Direction::Out).await.unwrap()
}

async fn taken_back(point: &'static str) {
    let mut pair = Pair::start(300, 100).await;
    let load = pair.load();
    load.going().await;
    let after = dies_deciding(&mut pair, MigrationDecision::Discarded, point).await;
    // Either the decision was lost with the process, or it is carried out.
    if point == "save.before:NEEDS_OPERATOR" {
        assert_eq!(after.state(), MigrationState::NeedsOperator);
    } else {
        reaches(&pair.n1, ID, Direction::Out, MigrationState::Cancelled).await;
    }
    let decided = resolve(&pair.n1, &after, MigrationDecision::Discarded).await.unwrap();
    assert_eq!(
        (decided.state(), decided.gate()),
        (MigrationState::Cancelled, MigrationGate::Open),
        "{point}"
    );
    assert_eq!(decided.slot_epoch, 1 + RECLAIM_STEP, "{point}: higher than what the lost store may have");
    pair.owner(false).await;
    let faults = checker::check(&load.finish().await, 0);
    assert!(faults.is_empty(), "{point}: {faults:?}");
    pair.nothing_is_left().await;
}

async fn given_up(point: &'static str) {
    let mut pair = Pair::start(300, 100).await;
    let after = dies_deciding(&mut pair, MigrationDecision::Committed, point).await;
    // Either the decision was lost with the process, or it is carried out.
    if point == "save.before:NEEDS_OPERATOR" {
        assert_eq!(after.state(), MigrationState::NeedsOperator);
        resolve(&pair.n1, &after, MigrationDecision::Committed).await.unwrap();
    }
    let decided = reaches(&pair.n1, ID, Direction::Out, MigrationState::Completed).await;
    assert_eq!(decided.gate(), MigrationGate::Moved, "{point}");
    assert!(decided.resolved_reason.is_some(), "{point}: {decided:?}");
    let otherwise = resolve(&pair.n1, &decided, MigrationDecision::Discarded).await;
    assert!(otherwise.is_err(), "{point}: it is decided");
    until("clients are sent to n2", async || {
        let answer = call(&mut client(&pair.n1).await, "GET foo").await;
        assert!(answer.starts_with('-'), "{point}: {answer}");
        answer.starts_with("-MOVED") && answer.ends_with(&pair.n2.addresses().resp)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_dies_while_it_takes_the_slots_back() {
    let points = [
        "save.before:NEEDS_OPERATOR",
        "save.after:NEEDS_OPERATOR",
        "save.before:CANCELLED",
        "save.after:CANCELLED",
    ];
    at_once(points.into_iter().map(taken_back)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_dies_while_it_gives_the_slots_to_a_target_that_an_operator_vouches_for() {
    let points = [
        "save.before:NEEDS_OPERATOR",
        "save.after:NEEDS_OPERATOR",
        "give_up.before:NEEDS_OPERATOR",
        "give_up.after:NEEDS_OPERATOR",
        "save.before:COMPLETED",
        "save.after:COMPLETED",
    ];
    at_once(points.into_iter().map(given_up)).await;
}

/// The target is prepared with the only copy, and dead. The source dies while it gives the slots up, as an operator decided.
async fn the_only_copy(point: &'static str) {
    let mut pair = Pair::start(300, 100).await;
    let dead = (Target, "take_over.before:COMMITTED");
    let crash = (Source, point);
    doom(&mut pair, Target, &[dead]).await;
    doom(&mut pair, Source, &[crash]).await;
    let load = pair.load();
    load.going().await;
    begin(&pair.n1, request(ID, &pair.n2)).await.unwrap();
    dies(&mut pair, dead).await;
    let now = progress(&pair.n1, ID, Direction::Out).await.unwrap();
    assert_eq!(now.state(), MigrationState::Committing, "{point}");
    resolve(&pair.n1, &now, MigrationDecision::Committed).await.unwrap_err();
    dies(&mut pair, crash).await;
    pair.n1.set_environment(&[]);
    pair.n2.set_environment(&[]);
    let (one, two) = tokio::join!(pair.n1.restart(), pair.n2.restart());
    one.and(two).unwrap();
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Completed).await;
    until("the source has looked at the target", async || {
        let shown = progress(&pair.n1, ID, Direction::Out).await.unwrap();
        shown.incidents.last().is_some_and(|seen| seen.state() == MigrationState::Completed)
    })
    .await;
    let seen = progress(&pair.n2, ID, Direction::In).await.unwrap();
    assert_eq!(seen.state(), MigrationState::Prepared, "{point}: {seen:?}");
    resolve(&pair.n2, &seen, MigrationDecision::Committed).await.unwrap();
    pair.ends(point, load, MigrationState::Completed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_dies_while_it_gives_the_slots_to_a_target_that_has_the_only_copy() {
    let points = [
        "give_up.before:COMMITTING",
        "give_up.after:COMMITTING",
        "save.before:COMPLETED",
        "save.after:COMPLETED",
    ];
    at_once(points.into_iter().map(the_only_copy)).await;
}

//! What README of proto-migration says of each state in its table "What a crash leads to": one node is killed there, and kept from the other one when it is back, so
//! that it shows what it does by itself; then it ends as it should.

use crate::support::crash::{Source, Target, Victim};
use crate::support::migration::{ID, Pair, Slow, begin, cancel, complete, limits, manual, reaches, request};
use crate::support::proxy::{Frame, Proxy, Way, Ways};
use crate::support::{at_once, fill, until};
use proto::node::{
    Direction, FreezeOutcome, MigrationGate, MigrationLimits, MigrationProgress, MigrationState,
    StartMigrationRequest,
};

/// Nothing gets through.
const SILENT: Ways = Ways { there: Way::Swallow, back: Way::Swallow };

/// Where one of the two dies: the state of the source and, where it matters, of the target.
#[derive(Debug, Clone, Copy)]
struct Case {
    victim: Victim,
    at: MigrationState,
    there: MigrationState,
}

/// What becomes of a frame of the source, so that it waits for the answer in `case.at`.
fn frame(case: Case) -> Option<(Frame, Ways)> {
    use MigrationState::{Cancelling, Committed, Committing, Completed, Freezing, Prepared};
    match (case.at, case.there) {
        (Freezing, Prepared) => Some((Frame::Prepare, Ways::LOST)),
        (Freezing, _) => Some((Frame::Prepare, Ways::LATE)),
        (Committing, Committed) => Some((Frame::Commit, Ways::LOST)),
        (Committing, _) => Some((Frame::Commit, Ways::LATE)),
        (Completed, _) => Some((Frame::Forget, Ways::LATE)),
        (Cancelling, _) => Some((Frame::Discard, Ways::LATE)),
        _ => None,
    }
}

/// Leads a migration to where somebody dies.
async fn lead(pair: &Pair, case: Case) -> (Proxy, StartMigrationRequest) {
    use MigrationState::{Cancelling, CatchingUp, Copying, Pending, Ready};
    let stops = matches!(case.at, Pending | Copying | CatchingUp | Ready | Cancelling);
    let (proxy, mut asked) =
        pair.behind(if stops { manual(ID, &pair.n2) } else { request(ID, &pair.n2) }).await;
    asked.limits = match case.at {
        Copying => limits(Slow::Copying),
        CatchingUp => limits(Slow::CatchingUp),
        _ => limits(Slow::Freezing),
    };
    if case.at == Pending {
        proxy.go(SILENT);
    }
    if let Some((frame, ways)) = frame(case) {
        proxy.arm(frame, ways);
    }
    begin(&pair.n1, asked.clone()).await.unwrap();
    if case.at == Cancelling {
        reaches(&pair.n1, ID, Direction::Out, Ready).await;
        cancel(&pair.n1, ID).await.unwrap();
    }
    if frame(case).is_some() {
        proxy.fired().await;
    }
    reaches(&pair.n1, ID, Direction::Out, case.at).await;
    if case.at == Copying {
        until("something is copied", async || items(&source(pair, "copying").await) > 0).await;
    }
    until("the target is as far", async || pair.target().await == case.there).await;
    proxy.go_next(SILENT);
    (proxy, asked)
}

fn items(told: &MigrationProgress) -> u64 {
    told.progress.as_ref().unwrap().items_done
}

async fn source(pair: &Pair, what: &str) -> MigrationProgress {
    pair.source_is_honest(what).await.unwrap()
}

async fn dies(case: Case) {
    use MigrationState::{Cancelled, Cancelling, CatchingUp, Completed, Copying, Freezing, Pending, Ready};
    let mut pair = match case.at {
        Copying => Pair::start(2000, 100).await,
        _ => Pair::start(300, 100).await,
    };
    let load = pair.load();
    let (proxy, asked) = lead(&pair, case).await;
    let before = pair.source_is_honest("it was led there").await.unwrap();
    let what = format!("{case:?}");
    // What the source is by itself, whoever died.
    let alone = match case.at {
        Ready | Freezing => CatchingUp,
        state => state,
    };
    match case.victim {
        Source => {
            pair.n1.kill().await.unwrap();
            let told = pair.target_is_honest(&what).await;
            assert_eq!(told.map_or(MigrationState::Unspecified, |told| told.state()), case.there, "{what}");
            pair.n1.restart().await.unwrap();
        }
        Target => {
            pair.n2.kill().await.unwrap();
            let told = source_says(&pair, alone, &what).await;
            if told.gate() == MigrationGate::Open {
                load.going().await;
            }
            pair.n2.restart().await.unwrap();
            let told = pair.target_is_honest(&what).await;
            assert_eq!(told.map_or(MigrationState::Unspecified, |told| told.state()), case.there, "{what}");
        }
    }
    source_says(&pair, alone, &what).await;
    if case.at == Copying {
        let staged = pair.target_is_honest(&what).await.unwrap();
        assert!(items(&staged) > 0, "what was durable is kept: {staged:?}");
    }
    // What is held for the target stays so: a Commit that arrives after all would win or lose against the next stream.
    proxy.go_next(Ways::default());
    proxy.cut();
    if asked.spec.as_ref().is_some_and(|spec| !spec.auto_complete) && case.at != Cancelling {
        let unlimited = StartMigrationRequest { limits: limits(Slow::Freezing), ..asked };
        begin(&pair.n1, unlimited).await.unwrap();
        until("the wish to cut over is accepted", async || complete(&pair.n1, ID).await.is_ok()).await;
    }
    let end = if case.at == Cancelling { Cancelled } else { Completed };
    let done = reaches(&pair.n1, ID, Direction::Out, end).await;
    assert_eq!(done.copy, 1, "nothing is copied twice: {what}: {done:?}");
    // Where it has ended already, the next stream only tells so.
    if !matches!(case.at, Pending | Completed) {
        assert!(done.attempt > before.attempt, "{what}: {done:?}");
    }
    let outcome = match (case.at, case.there) {
        (Freezing, _) => Some(FreezeOutcome::Interrupted),
        (MigrationState::Committing, MigrationState::Committed) => Some(FreezeOutcome::Committed),
        (MigrationState::Committing, _) => Some(FreezeOutcome::Fenced),
        _ => None,
    };
    if let Some(outcome) = outcome {
        assert_eq!(done.freezes[0].outcome(), outcome, "{what}: {done:?}");
    }
    pair.ends(&what, load, end).await;
}

/// Waits until the source is in `state`, by itself.
async fn source_says(pair: &Pair, state: MigrationState, what: &str) -> MigrationProgress {
    let mut found = None;
    until(&format!("the source is {state:?}, alone, after {what}"), async || {
        found = pair.source_is_honest(what).await;
        found.as_ref().is_some_and(|told| told.state() == state && !told.connected)
    })
    .await;
    found.unwrap()
}

async fn all(victim: Victim) {
    use MigrationState::{
        Cancelling, CatchingUp, Committed, Committing, Completed, Copying, Freezing, Pending, Prepared,
        Ready, Receiving, Unspecified,
    };
    let cases = [
        (Pending, Unspecified),
        (Copying, Receiving),
        (CatchingUp, Receiving),
        (Ready, Receiving),
        (Freezing, Receiving),
        (Freezing, Prepared),
        (Committing, Prepared),
        (Committing, Committed),
        (Completed, Committed),
        (Cancelling, Receiving),
    ];
    at_once(cases.map(|(at, there)| Box::pin(dies(Case { victim, at, there })))).await;
}

#[tokio::test]
async fn the_source_dies_in_each_state() {
    all(Source).await;
}

#[tokio::test]
async fn the_target_dies_in_each_state() {
    all(Target).await;
}

/// A target that stays away: what it was to copy fails in time, and what it has copied is copied again when the log has grown too long.
#[tokio::test]
async fn the_target_stays_away() {
    let mut pair = Pair::start(300, 100).await;
    pair.n2.kill().await.unwrap();
    let mut asked = manual("never", &pair.n2);
    asked.limits = Some(MigrationLimits { accept_timeout_ms: Some(500), ..MigrationLimits::default() });
    begin(&pair.n1, asked).await.unwrap();
    let failed = reaches(&pair.n1, "never", Direction::Out, MigrationState::Failed).await;
    assert_eq!(failed.progress.unwrap().error.unwrap().reason, "TARGET_UNREACHABLE");

    pair.n2.restart().await.unwrap();
    let load = pair.load();
    let mut asked = manual(ID, &pair.n2);
    asked.limits = Some(MigrationLimits { log_bytes_cap: Some(1 << 20), ..limits(Slow::Freezing).unwrap() });
    begin(&pair.n1, asked).await.unwrap();
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Ready).await;
    pair.n2.kill().await.unwrap();
    // Half of them move.
    fill(&pair.n1, 300, 10_000).await;
    let filled = proto::common::clock::now_unix_ms();
    until("the source has looked at its log since", async || {
        let told = source_says(&pair, MigrationState::CatchingUp, "the log grew").await;
        told.incidents.last().is_some_and(|last| last.at_unix_ms > filled)
    })
    .await;
    pair.n2.restart().await.unwrap();
    until("the wish to cut over is accepted", async || complete(&pair.n1, ID).await.is_ok()).await;
    let done = reaches(&pair.n1, ID, Direction::Out, MigrationState::Completed).await;
    assert_eq!(done.copy, 2, "{done:?}");
    pair.ends("the target stayed away", load, MigrationState::Completed).await;
}

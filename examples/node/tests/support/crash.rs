//! Nodes that die exactly at chosen places of a migration, one after the other, while clients write.

use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use bytes::Bytes;
use node::common::NodeId;
use node::demo::processes::NodeProcess;
use node::gate::{Access, Gate};
use node::store::{Ownership, Store, StoreOptions, WriteOp};
use proto::node::{CancelMigrationRequest, Direction, MigrationProgress, MigrationState};

use super::migration::{ID, Pair, manual, reaches, request, service, state};
use super::{at_once, until};

const SIGKILL: i32 = 9;

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    Source,
    Target,
}

pub use Victim::{Source, Target};

/// Who dies where.
pub type Crash = (Victim, &'static str);

/// How the migration ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Completed,
    Cancelled,
    /// A key is too long to be moved.
    Failed,
}

fn node(pair: &mut Pair, victim: Victim) -> &mut NodeProcess {
    match victim {
        Source => &mut pair.n1,
        Target => &mut pair.n2,
    }
}

/// The next place at which `victim` dies, of those that are left.
fn arm(pair: &mut Pair, victim: Victim, left: &[Crash]) {
    let next = left.iter().find(|(other, _)| *other == victim);
    let environment = next.map(|(_, point)| ("PROTO_FAILPOINT", *point));
    node(pair, victim).set_environment(environment.as_slice());
}

/// Asks for what leads to `end`, as a caller does again whose answer was lost.
async fn ask(pair: &Pair, end: End) {
    let asked = if end == End::Cancelled { manual(ID, &pair.n2) } else { request(ID, &pair.n2) };
    if let Some(mut service) = service(&pair.n1).await {
        let _ = service.start_migration(asked).await;
    }
    if end == End::Cancelled {
        for _ in 0..1000 {
            match state(&pair.n1, ID, Direction::Out).await {
                MigrationState::Ready => break,
                MigrationState::Pending | MigrationState::Copying | MigrationState::CatchingUp => {}
                _ => return,
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if let Some(mut service) = service(&pair.n1).await {
            let asked = CancelMigrationRequest { migration_id: ID.to_owned(), ..Default::default() };
            let _ = service.cancel_migration(asked).await;
        }
    }
}

/// Waits until the victim has died where it should.
pub async fn dies(pair: &mut Pair, (victim, point): Crash) {
    let doomed = node(pair, victim);
    let status =
        doomed.ended(Duration::from_secs(30)).await.unwrap_or_else(|error| panic!("{point}: {error}"));
    assert_eq!(status.signal(), Some(SIGKILL), "{point}: {status}");
    let log = std::fs::read_to_string(doomed.log()).unwrap();
    assert!(log.contains(&format!("fail point {point}")), "{point}: {log}");
}

/// Restarts a node so that it dies at the first of `crashes` that is its own.
pub async fn doom(pair: &mut Pair, victim: Victim, crashes: &[Crash]) {
    node(pair, victim).stop().await.unwrap();
    arm(pair, victim, crashes);
    node(pair, victim).restart().await.unwrap();
}

/// Whoever is left tells the truth, and that the other one is gone; unless it is about to die itself.
async fn survivor_is_honest(pair: &Pair, victim: Victim, left: &[Crash], what: &str) {
    if left.iter().any(|(next, _)| *next != victim) {
        return;
    }
    let connected = |told: Option<MigrationProgress>| told.is_some_and(|told| told.connected);
    until(&format!("whoever is left knows that it is alone, after {what}"), async || match victim {
        Source => !connected(pair.target_is_honest(what).await),
        Target => !connected(pair.source_is_honest(what).await),
    })
    .await;
}

/// Puts a key into the store of n1 that is too long to be moved, and that a client could not store.
async fn plant(pair: &mut Pair) {
    pair.n1.stop().await.unwrap();
    let directory = pair.directory.path().join("n1");
    let (store, _) = Store::open_existing(&directory, &StoreOptions::default()).unwrap();
    let op = WriteOp::SetMany {
        pairs: vec![(format!("{{foo}}{}", "k".repeat(70_000)).into(), Bytes::from_static(b"v"))],
    };
    assert!(op.too_large().is_some());
    let gate = Gate::new(NodeId::new("n1").unwrap(), Ownership::default(), 0);
    store.write(vec![op], gate.permits(Access::Write)).await.unwrap();
    tokio::task::spawn_blocking(move || store.close()).await.unwrap();
    pair.n1.restart().await.unwrap();
}

/// The other one dies in the same moment, if `both` do.
async fn crash(crashes: Vec<Crash>, both: bool, end: End) {
    let mut pair = Pair::start(300, 100).await;
    if end == End::Failed {
        plant(&mut pair).await;
    }
    for victim in [Source, Target] {
        if crashes.iter().any(|(other, _)| *other == victim) {
            doom(&mut pair, victim, &crashes).await;
        }
    }
    let load = pair.load();
    tokio::time::sleep(Duration::from_millis(100)).await;
    ask(&pair, end).await;
    let what = format!("{crashes:?}{}", if both { ", and the other one with it" } else { "" });
    for (n, &(victim, point)) in crashes.iter().enumerate() {
        dies(&mut pair, (victim, point)).await;
        let left = &crashes[n + 1..];
        if both {
            let other = if victim == Source { Target } else { Source };
            node(&mut pair, other).kill().await.unwrap();
            node(&mut pair, other).restart().await.unwrap();
        } else {
            survivor_is_honest(&pair, victim, left, &what).await;
        }
        arm(&mut pair, victim, left);
        if left.first().is_some_and(|(next, _)| *next == victim) {
            // It may die again before it serves.
            node(&mut pair, victim).launch().unwrap();
        } else {
            node(&mut pair, victim).restart().await.unwrap();
        }
        ask(&pair, end).await;
        if left.is_empty() {
            pair.both_are_honest(&what).await;
        }
    }
    let state = match end {
        End::Completed => MigrationState::Completed,
        End::Cancelled => MigrationState::Cancelled,
        End::Failed => MigrationState::Failed,
    };
    if end == End::Failed {
        let failed = reaches(&pair.n1, ID, Direction::Out, state).await;
        assert_eq!(failed.progress.unwrap().error.unwrap().reason, "ENTRY_TOO_LARGE", "{what}");
    }
    pair.ends(&what, load, state).await;
}

/// One case per list of crashes, a few at the same time.
pub async fn all(cases: impl IntoIterator<Item = Vec<Crash>>, end: End) {
    at_once(cases.into_iter().map(|crashes| crash(crashes, false, end))).await;
}

/// Two cases per place: it alone dies there, and the other one with it.
pub async fn each(victim: Victim, points: &[&'static str], end: End) {
    let cases = points.iter().flat_map(|point| [(*point, false), (*point, true)]);
    at_once(cases.map(|(point, both)| crash(vec![(victim, point)], both, end))).await;
}

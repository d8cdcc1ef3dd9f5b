//! Either node dies exactly at each persisted transition of a migration, while clients write: all ends by itself, in one owner.

#![allow(clippy::unwrap_used)]

#[allow(dead_code, unreachable_pub)]
mod support;

use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::time::Duration;

use futures::StreamExt as _;
use node::demo::processes::NodeProcess;
use proto::node::migration_service_client::MigrationServiceClient;
use proto::node::{
    CancelMigrationRequest, Direction, GetMigrationProgressRequest, MigrationSpec, MigrationState,
    StartMigrationRequest,
};
use redb::{ReadableDatabase as _, ReadableTable, ReadableTableMetadata as _, TableDefinition};
use support::load::Load;
use support::{call, checker, client, start, until};
use tonic::transport::Channel;

const SIGABRT: i32 = 6;
/// Cases at the same time.
const AT_ONCE: usize = 3;

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Source,
    Target,
}

fn slots() -> node::common::SlotRange {
    "8192-16383".parse().unwrap()
}

async fn service(node: &NodeProcess) -> Option<MigrationServiceClient<Channel>> {
    let endpoint = proto::common::tuning::endpoint(&node.addresses().grpc).unwrap();
    endpoint.connect().await.ok().map(MigrationServiceClient::new)
}

fn request(to: &NodeProcess, auto_complete: bool) -> StartMigrationRequest {
    StartMigrationRequest {
        migration_id: "m".to_owned(),
        spec: Some(MigrationSpec {
            slots: Some(slots().into()),
            source_shard_id: "s1".to_owned(),
            target_shard_id: "s2".to_owned(),
            source_node_id: String::new(),
            target_node_id: to.id().to_owned(),
            auto_complete,
            value_format: String::new(),
        }),
        target_address: to.addresses().grpc.clone(),
        ..StartMigrationRequest::default()
    }
}

async fn state(node: &NodeProcess, direction: Direction) -> MigrationState {
    let Some(mut service) = service(node).await else { return MigrationState::Unspecified };
    let asked = GetMigrationProgressRequest { migration_id: "m".to_owned(), direction: direction.into() };
    let answer = service.get_migration_progress(asked).await;
    answer
        .ok()
        .and_then(|answer| answer.into_inner().migration)
        .map_or(MigrationState::Unspecified, |m| m.state())
}

/// What is in a stopped node's database that a finished migration must not leave.
fn leftovers(node: &Path) -> Vec<String> {
    let database = redb::Database::open(node.join("node.redb")).unwrap();
    let txn = database.begin_read().unwrap();
    let mut found = Vec::new();
    let mut count = |name: &str, len: u64| {
        if len > 0 {
            found.push(format!("{len} in {name}"));
        }
    };
    let garbage = TableDefinition::<(u32, u16), u16>::new("garbage");
    count("garbage", txn.open_table(garbage).unwrap().len().unwrap());
    let tombstones = TableDefinition::<&[u8], u64>::new("tombstones");
    count("tombstones", txn.open_table(tombstones).unwrap().len().unwrap());
    let staged = TableDefinition::<(u32, u16), (u64, u128)>::new("staged");
    count("staged", txn.open_table(staged).unwrap().len().unwrap());
    let leases = TableDefinition::<&str, (u32, u16, u16, u64)>::new("leases");
    count("leases", txn.open_table(leases).unwrap().len().unwrap());
    let changes = TableDefinition::<(u32, u64), &[u8]>::new("changes");
    count("changes", txn.open_table(changes).unwrap().len().unwrap());
    let migrations = TableDefinition::<&str, (u32, u16, u16, u64, u64, &[u8])>::new("migrations");
    let staging = txn.open_table(migrations).unwrap();
    let staging = staging.iter().unwrap().filter(|row| row.as_ref().unwrap().1.value().0 != 0).count();
    count("migrations", staging as u64);
    let active = std::fs::read_dir(node.join("migrations/active")).unwrap().count();
    count("migrations/active", active as u64);
    found
}

/// Both nodes end without a trace of the migration but their history.
async fn nothing_is_left(directory: &Path, nodes: [&mut NodeProcess; 2]) {
    for node in nodes {
        let mut found = Vec::new();
        for _ in 0..40 {
            node.stop().await.unwrap();
            found = leftovers(&directory.join(node.id()));
            if found.is_empty() {
                break;
            }
            node.restart().await.unwrap();
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        assert!(found.is_empty(), "{}: {found:?}", node.id());
    }
}

/// The victim dies at `point` of a migration that is cancelled on its way, or not; then it comes back.
async fn dies_at(victim: Victim, point: &str, cancel: bool) {
    let directory = tempfile::tempdir().unwrap();
    let mut n1 = start("n1", directory.path(), "0-16383").await;
    let mut n2 = start("n2", directory.path(), "none").await;
    {
        let mut loading = client(&n1).await;
        for n in 0..300 {
            loading.push(&["SET".to_owned(), format!("key:{n}"), format!("{n:0100}")]).unwrap();
        }
        loading.send().await.unwrap();
        for _ in 0..300 {
            loading.reply().await.unwrap();
        }
    }
    let doomed = if victim == Victim::Source { &mut n1 } else { &mut n2 };
    doomed.stop().await.unwrap();
    doomed.set_environment(&[("PROTO_FAILPOINT", point)]);
    doomed.restart().await.unwrap();
    doomed.set_environment(&[]);
    let load = Load::start(&[&n1, &n2], slots());
    tokio::time::sleep(Duration::from_millis(100)).await;

    // A caller asks again where the answer was lost.
    let ask = async |n1: &NodeProcess, n2: &NodeProcess| {
        if let Some(mut service) = service(n1).await {
            let _ = service.start_migration(request(n2, !cancel)).await;
        }
        if cancel {
            for _ in 0..1000 {
                match state(n1, Direction::Out).await {
                    MigrationState::Ready => break,
                    MigrationState::Pending | MigrationState::Copying | MigrationState::CatchingUp => {}
                    _ => return,
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            if let Some(mut service) = service(n1).await {
                let asked = CancelMigrationRequest { migration_id: "m".to_owned(), ..Default::default() };
                let _ = service.cancel_migration(asked).await;
            }
        }
    };
    ask(&n1, &n2).await;
    let doomed = if victim == Victim::Source { &mut n1 } else { &mut n2 };
    let status =
        doomed.ended(Duration::from_secs(30)).await.unwrap_or_else(|error| panic!("{point}: {error}"));
    assert_eq!(status.signal(), Some(SIGABRT), "{point}: {status}");
    let log = std::fs::read_to_string(doomed.log()).unwrap();
    assert!(log.contains(&format!("fail point {point}")), "{point}: {log}");
    doomed.restart().await.unwrap();
    ask(&n1, &n2).await;

    let end = if cancel { MigrationState::Cancelled } else { MigrationState::Completed };
    until(&format!("{end:?} at both ends after {point}"), async || {
        let ends = [state(&n1, Direction::Out).await, state(&n2, Direction::In).await];
        for bad in [MigrationState::Failed, MigrationState::NeedsOperator] {
            assert!(!ends.contains(&bad), "{point}: {ends:?}");
        }
        // Where nothing was accepted yet, the target never hears of it.
        ends[0] == end && (ends[1] == end || (cancel && ends[1] == MigrationState::Unspecified))
    })
    .await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let events = load.finish().await;
    let faults = checker::check(&events, usize::from(!cancel));
    assert!(faults.is_empty(), "{point}: {faults:?}");
    for (node, owns) in [(&n1, cancel), (&n2, !cancel)] {
        let answer = call(&mut client(node).await, "GET foo").await;
        assert!(slots().contains(node::common::slot_of(b"foo")));
        assert_eq!(!answer.starts_with('-'), owns, "{point}: {} {answer}", node.id());
    }
    nothing_is_left(directory.path(), [&mut n1, &mut n2]).await;
}

async fn all(victim: Victim, points: &[&str], cancel: bool) {
    futures::stream::iter(points)
        .map(|point| dies_at(victim, point, cancel))
        .buffer_unordered(AT_ONCE)
        .collect::<Vec<()>>()
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_dies_around_the_commit() {
    let points = [
        "save.before:COMMITTING",
        "save.after:COMMITTING",
        "commit.before:COMMITTING",
        "commit.after:COMMITTING",
        "give_up.before:COMMITTING",
        "give_up.after:COMMITTING",
        "save.before:COMPLETED",
        "save.after:COMPLETED",
        "finish.before:COMPLETED",
        "finish.between:COMPLETED",
    ];
    all(Victim::Source, &points, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_dies_before_the_commit() {
    let points = [
        "save.before:PENDING",
        "save.after:PENDING",
        "save.before:COPYING",
        "save.after:COPYING",
        "save.before:CATCHING_UP",
        "save.after:CATCHING_UP",
        "save.before:READY",
        "save.after:READY",
    ];
    all(Victim::Source, &points, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_target_dies() {
    let points = [
        "record.before:PREPARED",
        "record.after:PREPARED",
        "take_over.before:COMMITTED",
        "take_over.after:COMMITTED",
        "finish.before:COMPLETED",
        "finish.between:COMPLETED",
        "forget.before:COMPLETED",
        "forget.after:COMPLETED",
        "begin.before:RECEIVING",
        "begin.after:RECEIVING",
        "apply.before:RECEIVING",
        "apply.after:RECEIVING",
    ];
    all(Victim::Target, &points, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn either_dies_while_it_is_cancelled() {
    let points = [
        "save.before:CANCELLING",
        "save.after:CANCELLING",
        "save.before:CANCELLED",
        "save.after:CANCELLED",
        "finish.before:CANCELLED",
        "finish.between:CANCELLED",
    ];
    all(Victim::Source, &points, true).await;
    let points = [
        "discard.before:CANCELLED",
        "discard.after:CANCELLED",
        "finish.before:CANCELLED",
        "finish.between:CANCELLED",
    ];
    all(Victim::Target, &points, true).await;
}

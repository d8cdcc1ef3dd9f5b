//! Two nodes between which half of the slots moves, and the judgement of how that ended.

use std::path::{Path, PathBuf};
use std::time::Duration;

use node::demo::processes::NodeProcess;
use node::store::NodeAddresses;
use proto::common::error::Error;
use proto::node::migration_service_client::MigrationServiceClient;
use proto::node::{
    CancelMigrationRequest, CompleteMigrationRequest, Direction, GetMigrationProgressRequest,
    MigrationDecision, MigrationGate, MigrationLimits, MigrationProgress, MigrationSpec, MigrationState,
    ResolveMigrationRequest, StartMigrationRequest,
};
use redb::{ReadableDatabase as _, ReadableTable, ReadableTableMetadata as _, TableDefinition};
use tonic::transport::Channel;

use super::checker;
use super::load::Load;
use super::proxy::Proxy;
use super::{call, client, fill, program, until};

/// The ID of the migration, where there is one.
pub const ID: &str = "m";
/// Seconds of silence that a target of these tests bears with; the least that it takes.
const IDLE: &str = "3";
/// Seconds that a node of these tests goes on with its migrations after SIGTERM: they are to be gone on with later.
const GRACE: &str = "1";

/// The half that moves.
pub fn slots() -> node::common::SlotRange {
    "8192-16383".parse().unwrap()
}

pub async fn service(node: &NodeProcess) -> Option<MigrationServiceClient<Channel>> {
    let endpoint = proto::common::tuning::endpoint(&node.addresses().grpc).unwrap();
    endpoint.connect().await.ok().map(MigrationServiceClient::new)
}

/// Moves the upper half to a node, at once.
pub fn request(id: &str, to: &NodeProcess) -> StartMigrationRequest {
    StartMigrationRequest {
        migration_id: id.to_owned(),
        spec: Some(MigrationSpec {
            slots: Some(slots().into()),
            source_shard_id: "s1".to_owned(),
            target_shard_id: "s2".to_owned(),
            source_node_id: String::new(),
            target_node_id: to.id().to_owned(),
            auto_complete: true,
            value_format: String::new(),
        }),
        target_address: to.addresses().grpc.clone(),
        ..StartMigrationRequest::default()
    }
}

/// The same, and waits in READY.
pub fn manual(id: &str, to: &NodeProcess) -> StartMigrationRequest {
    let mut request = request(id, to);
    request.spec.as_mut().unwrap().auto_complete = false;
    request
}

/// What keeps a migration in one state for long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slow {
    /// Rows take long.
    Copying,
    /// The target is never close enough, as long as clients write.
    CatchingUp,
    /// An answer may come late.
    Freezing,
}

pub fn limits(slow: Slow) -> Option<MigrationLimits> {
    let mut limits = MigrationLimits { accept_timeout_ms: Some(60_000), ..MigrationLimits::default() };
    match slow {
        Slow::Copying => limits.max_bytes_per_second = Some(32 << 10),
        Slow::CatchingUp => {
            limits.ready_lag_entries = Some(0);
            limits.ready_lag_ms = Some(0);
        }
        Slow::Freezing => limits.freeze_timeout_ms = Some(20_000),
    }
    Some(limits)
}

pub async fn begin(node: &NodeProcess, request: StartMigrationRequest) -> Result<MigrationProgress, Error> {
    let answer = service(node).await.unwrap().start_migration(request).await?;
    Ok(answer.into_inner().migration.unwrap())
}

pub async fn complete(node: &NodeProcess, id: &str) -> Result<MigrationProgress, Error> {
    let asked = CompleteMigrationRequest { migration_id: id.to_owned(), ..Default::default() };
    let answer = service(node).await.unwrap().complete_migration(asked).await?;
    Ok(answer.into_inner().migration.unwrap())
}

pub async fn cancel(node: &NodeProcess, id: &str) -> Result<MigrationProgress, Error> {
    let reason = "a test asks".to_owned();
    let asked = CancelMigrationRequest { migration_id: id.to_owned(), reason, ..Default::default() };
    let answer = service(node).await.unwrap().cancel_migration(asked).await?;
    Ok(answer.into_inner().migration.unwrap())
}

/// Decides as an operator who has looked at `seen`.
pub async fn resolve(
    node: &NodeProcess,
    seen: &MigrationProgress,
    decision: MigrationDecision,
) -> Result<MigrationProgress, Error> {
    let asked = ResolveMigrationRequest {
        migration_id: seen.migration_id.clone(),
        direction: seen.progress.as_ref().unwrap().direction,
        decision: decision.into(),
        attempt: seen.attempt,
        peer_store_id: seen.peer.clone().unwrap_or_default().store_id,
        reason: "a test decides".to_owned(),
    };
    let answer = service(node).await.unwrap().resolve_migration(asked).await?;
    Ok(answer.into_inner().migration.unwrap())
}

pub async fn progress(node: &NodeProcess, id: &str, direction: Direction) -> Option<MigrationProgress> {
    let asked = GetMigrationProgressRequest { migration_id: id.to_owned(), direction: direction.into() };
    service(node).await?.get_migration_progress(asked).await.ok()?.into_inner().migration
}

pub async fn state(node: &NodeProcess, id: &str, direction: Direction) -> MigrationState {
    progress(node, id, direction).await.map_or(MigrationState::Unspecified, |progress| progress.state())
}

/// Waits until a node shows `wanted` of a migration, and returns what it shows then.
pub async fn reaches(
    node: &NodeProcess,
    id: &str,
    direction: Direction,
    wanted: MigrationState,
) -> MigrationProgress {
    let mut found = None;
    until(&format!("{id} is {wanted:?} at {}", node.id()), async || {
        found = progress(node, id, direction).await;
        found.as_ref().is_some_and(|found| found.state() == wanted)
    })
    .await;
    found.unwrap()
}

/// What is in a stopped node's database and journal that a finished migration must not leave.
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

async fn nothing_is_left(directory: &Path, nodes: &mut [&mut NodeProcess]) {
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

/// How a node is told of another one.
pub fn peer(node: &NodeProcess) -> String {
    let NodeAddresses { grpc, resp } = node.addresses();
    format!("{}={grpc},{resp}", node.id())
}

/// A node that owns all slots, and one that owns none.
pub struct Pair {
    pub directory: tempfile::TempDir,
    pub n1: NodeProcess,
    pub n2: NodeProcess,
}

impl Pair {
    /// With `keys` keys of `bytes` bytes in all slots.
    pub async fn start(keys: usize, bytes: usize) -> Self {
        Self::start_as(|_| program(), keys, bytes).await
    }

    /// The same, with nodes that run the program which `program` makes for the directory.
    pub async fn start_as(program: impl FnOnce(&Path) -> PathBuf, keys: usize, bytes: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let program = program(directory.path());
        let arguments = ["--grace", GRACE];
        let n1 =
            NodeProcess::start_with(&program, "n1", directory.path(), "0-16383", &arguments).await.unwrap();
        let peer = peer(&n1);
        let arguments = ["--peer", &peer, "--idle", IDLE, "--grace", GRACE];
        let n2 = NodeProcess::start_with(&program, "n2", directory.path(), "none", &arguments).await.unwrap();
        fill(&n1, keys, bytes).await;
        Self { directory, n1, n2 }
    }

    pub fn load(&self) -> Load {
        Load::start(&[&self.n1, &self.n2], slots())
    }

    pub async fn source(&self) -> MigrationState {
        state(&self.n1, ID, Direction::Out).await
    }

    pub async fn target(&self) -> MigrationState {
        state(&self.n2, ID, Direction::In).await
    }

    /// A proxy in front of the target, and `request` by way of it.
    pub async fn behind(&self, request: StartMigrationRequest) -> (Proxy, StartMigrationRequest) {
        let proxy = Proxy::start(&self.n2.addresses().grpc).await;
        let request = StartMigrationRequest { target_address: proxy.address().to_owned(), ..request };
        (proxy, request)
    }

    /// The target dies, and comes back with these arguments.
    pub async fn restart_target(&mut self, arguments: &[&str]) {
        self.n2.kill().await.unwrap();
        self.n2.set_arguments(&[&["--peer", &peer(&self.n1)], arguments].concat());
        self.n2.restart().await.unwrap();
    }

    /// The target comes back under its ID and addresses without anything that it knew, and dies no more.
    pub async fn restart_target_wiped(&mut self) {
        // An error where a fail point has killed it.
        let _ = self.n2.kill().await;
        std::fs::remove_dir_all(self.directory.path().join(self.n2.id())).unwrap();
        self.n2.set_environment(&[]);
        self.n2.restart().await.unwrap();
    }

    /// Both nodes die at once, and come back.
    pub async fn crash(&mut self) {
        let (one, two) = tokio::join!(self.n1.kill(), self.n2.kill());
        one.and(two).unwrap();
        let (one, two) = tokio::join!(self.n1.restart(), self.n2.restart());
        one.and(two).unwrap();
    }

    /// Waits for `end` at the source and what belongs to it at the target, and judges all of it: what clients saw, who serves, what is
    /// shown, what is left. `what` led there.
    pub async fn ends(self, what: &str, load: Load, end: MigrationState) {
        self.judged(what, load, end).await;
        self.nothing_is_left().await;
    }

    /// Both nodes end without a trace of any migration but their history.
    pub async fn nothing_is_left(mut self) {
        nothing_is_left(self.directory.path(), &mut [&mut self.n1, &mut self.n2]).await;
    }

    /// The same with nodes that go on.
    pub async fn judged(&self, what: &str, load: Load, end: MigrationState) {
        let moved = end == MigrationState::Completed;
        let there = if moved { end } else { MigrationState::Cancelled };
        until(&format!("{end:?} after {what}"), async || {
            let ends = [self.source().await, self.target().await];
            for bad in [MigrationState::Failed, MigrationState::NeedsOperator, MigrationState::Cancelled] {
                assert!(
                    bad == end || ends[0] != bad,
                    "{what}: {bad:?}: {:?}",
                    progress(&self.n1, ID, Direction::Out).await
                );
            }
            // Where nothing was accepted yet, the target never hears of it.
            ends[0] == end && (ends[1] == there || (!moved && ends[1] == MigrationState::Unspecified))
        })
        .await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let events = load.finish().await;
        let faults = checker::check(&events, usize::from(moved));
        assert!(faults.is_empty(), "{what}: {faults:?}");
        self.owner(moved).await;
        self.is_told(what, end).await;
    }

    /// One of the two serves the slots, and the other one does not, and redirects to it when it has heard.
    pub async fn owner(&self, moved: bool) {
        assert!(slots().contains(node::common::slot_of(b"foo")));
        let (owner, other) = if moved { (&self.n2, &self.n1) } else { (&self.n1, &self.n2) };
        let answer = call(&mut client(owner).await, "GET foo").await;
        assert_eq!(answer, "nil", "{} serves", owner.id());
        until("the other one redirects", async || {
            let answer = call(&mut client(other).await, "GET foo").await;
            assert!(answer.starts_with('-'), "{} serves, too: {answer}", other.id());
            answer.starts_with("-MOVED") && answer.ends_with(&owner.addresses().resp)
        })
        .await;
    }

    /// Both nodes tell the same end.
    async fn is_told(&self, what: &str, end: MigrationState) {
        let moved = end == MigrationState::Completed;
        let out = progress(&self.n1, ID, Direction::Out).await.unwrap();
        let (decision, gate) = if moved {
            (MigrationDecision::Committed, MigrationGate::Moved)
        } else {
            (MigrationDecision::Discarded, MigrationGate::Open)
        };
        assert_eq!((out.decision(), out.gate()), (decision, gate), "{what}: {out:?}");
        assert_eq!(out.reporter.clone().unwrap().node_id, "n1", "{what}");
        assert!(!out.connected, "{what}: {out:?}");
        assert_eq!(out.phases.last().unwrap().state(), end, "{what}: {out:?}");
        let error = out.progress.as_ref().unwrap().error.is_some();
        assert_eq!(error, !moved, "an error says why it did not complete: {what}: {out:?}");
        for freeze in &out.freezes {
            assert!(freeze.freeze_ms.is_some(), "{what}: {freeze:?} has ended");
        }
        let Some(into) = progress(&self.n2, ID, Direction::In).await else { return };
        let gate = if moved { MigrationGate::Open } else { MigrationGate::Moved };
        assert_eq!((into.decision(), into.gate()), (decision, gate), "{what}: {into:?}");
        assert_eq!(into.reporter.clone().unwrap().node_id, "n2", "{what}");
        assert!(!into.connected, "{what}: {into:?}");
        if moved {
            assert_eq!(out.slot_epoch, into.slot_epoch, "{what}");
        }
    }
}

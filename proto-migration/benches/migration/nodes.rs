//! The example node as a process, and a migration between two of them.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use proto_common::v1::{Direction, SlotRange};
use proto_migration::v1::migration_service_client::MigrationServiceClient;
use proto_migration::v1::{
    GetMigrationProgressRequest, MigrationProgress, MigrationSpec, MigrationState, StartMigrationRequest,
};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tonic::transport::Channel;

use crate::until;

/// Builds the node for release, and says where it is.
pub(crate) fn build() -> PathBuf {
    let built = std::process::Command::new(env!("CARGO"))
        .args(["build", "--release", "--package", "node", "--message-format", "json"])
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo runs");
    assert!(built.status.success(), "the node does not build");
    let messages = String::from_utf8(built.stdout).unwrap();
    let executable = messages.lines().rev().find_map(|line| {
        let (_, rest) = line.split_once("\"executable\":\"")?;
        rest.split_once('"').map(|(path, _)| PathBuf::from(path))
    });
    executable.expect("cargo says where the node is")
}

/// A running node; killed when dropped.
pub(crate) struct Node {
    id: String,
    grpc: String,
    pub(crate) resp: String,
    _child: Child,
}

impl Node {
    pub(crate) async fn start(program: &Path, dir: &Path, id: &str, slots: &str) -> Self {
        let mut child = Command::new(program)
            .args(["serve", "--id", id, "--slots", slots, "--grpc", "127.0.0.1:0", "--resp", "127.0.0.1:0"])
            .arg("--data")
            .arg(dir.join(id))
            .env("RUST_LOG", "warn")
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.next_line().await.unwrap().expect("the node starts");
        let field = |name: &str| {
            ready
                .split(' ')
                .find_map(|word| word.strip_prefix(name))
                .expect("the line of a ready node")
                .to_owned()
        };
        Self { id: id.to_owned(), grpc: field("grpc="), resp: field("resp="), _child: child }
    }

    async fn client(&self) -> MigrationServiceClient<Channel> {
        let endpoint = proto_common::tuning::endpoint(&self.grpc).unwrap();
        MigrationServiceClient::new(endpoint.connect().await.unwrap())
    }
}

/// Moves the slots, and returns what the source says of it in the end.
pub(crate) async fn migrate(ends: [&Node; 2], id: &str, slots: (u16, u16)) -> MigrationProgress {
    let [from, to] = ends;
    let request = StartMigrationRequest {
        migration_id: id.to_owned(),
        spec: Some(MigrationSpec {
            slots: Some(SlotRange { start: slots.0.into(), end: slots.1.into() }),
            source_shard_id: "s1".to_owned(),
            target_shard_id: "s2".to_owned(),
            target_node_id: to.id.clone(),
            auto_complete: true,
            ..MigrationSpec::default()
        }),
        target_address: to.grpc.clone(),
        ..StartMigrationRequest::default()
    };
    let mut source = from.client().await;
    source.start_migration(request).await.unwrap();
    let request =
        GetMigrationProgressRequest { migration_id: id.to_owned(), direction: Direction::Out.into() };
    let done = until("the migration has ended", async || {
        let answer = source.get_migration_progress(request.clone()).await.unwrap().into_inner();
        answer.migration.filter(MigrationProgress::is_final)
    })
    .await;
    assert_eq!(done.state(), MigrationState::Completed, "{done:?}");
    // The target may be told a moment later that it is done; a migration back needs its range.
    let mut target = to.client().await;
    let request = GetMigrationProgressRequest { direction: Direction::In.into(), ..request };
    until("the target knows", async || {
        let answer = target.get_migration_progress(request.clone()).await.ok()?.into_inner();
        answer.migration.filter(MigrationProgress::is_final)
    })
    .await;
    done
}

//! The receiving node is killed with SIGKILL exactly while it is INSTALLING: before the rows are merged, and after that, when clients write
//! to them already.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::support::{call, client, start, until};
use clap::Parser as _;
use node::cli::{Cli, Command as CliCommand};
use node::demo::client::Client;
use node::serve::Ready;
use node::split::SplitHook;
use proto::node::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto::node::{GetTransferProgressRequest, TransferPhase};
use proto::snapshot::hook::{Hold, HookFuture, InstallHook};
use proto::snapshot::spec::TransferPlan;
use proto::snapshot::store::PlacedSnapshot;

const CHILD: &str = "NODE_TEST_CHILD";
/// While this file is there, an install stops before the merge, or after it.
const HOLD_BEFORE: &str = "hold-before";
const HOLD_AFTER: &str = "hold-after";
/// One line for each call of the hook, and one for each place where it is held.
const TOLD: &str = "told";

/// The node's own hook, which can be held.
struct Held {
    hook: SplitHook,
    directory: PathBuf,
}

impl Held {
    fn tell(&self, what: &str) {
        let mut told =
            std::fs::File::options().create(true).append(true).open(self.directory.join(TOLD)).unwrap();
        writeln!(told, "{what}").unwrap();
    }

    async fn hold(&self, name: &str) {
        if self.directory.join(name).exists() {
            self.tell(name);
        }
        while self.directory.join(name).exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl InstallHook for Held {
    fn admit<'a>(&'a self, plan: &'a TransferPlan) -> HookFuture<'a, Hold> {
        self.hook.admit(plan)
    }

    fn readmit<'a>(&'a self, plan: &'a TransferPlan) -> HookFuture<'a, Hold> {
        self.hook.readmit(plan)
    }

    fn lost_by_source(&self, plan: &TransferPlan) -> Option<String> {
        self.hook.lost_by_source(plan)
    }

    fn install<'a>(&'a self, snapshot: &'a PlacedSnapshot) -> HookFuture<'a, ()> {
        Box::pin(async move {
            self.tell("install");
            self.hold(HOLD_BEFORE).await;
            self.hook.install(snapshot).await?;
            self.hold(HOLD_AFTER).await;
            Ok(())
        })
    }

    fn keeps_files(&self, plan: &TransferPlan) -> bool {
        self.hook.keeps_files(plan)
    }
}

/// Not a test of its own: the receiving node of the test below.
#[tokio::test(flavor = "multi_thread")]
async fn child_node() {
    let Some(directory) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    let arguments = std::fs::read_to_string(directory.join("arguments")).unwrap();
    let Cli { command } = Cli::parse_from(arguments.lines());
    let CliCommand::Serve(options) = command else { panic!("{command:?}") };
    node::serve::serve_with((*options).into(), |hook| Held { hook, directory }).await.unwrap();
}

/// This test binary again, as the node n2; killed when dropped.
struct Target {
    directory: PathBuf,
    child: Child,
    ready: Ready,
}

impl Target {
    fn start(directory: &Path, grpc: &str, resp: &str) -> Self {
        let data = directory.join("n2");
        let arguments = [
            "node",
            "serve",
            "--id",
            "n2",
            "--data",
            data.to_str().unwrap(),
            "--slots",
            "none",
            "--grpc",
            grpc,
            "--resp",
            resp,
        ];
        std::fs::write(directory.join("arguments"), arguments.join("\n")).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "installing::child_node", "--nocapture", "--include-ignored"])
            .env(CHILD, directory)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        let ready = loop {
            line.clear();
            assert!(output.read_line(&mut line).unwrap() > 0, "it ended before it was ready");
            // The test harness prints the name of the test without a line break.
            if let Some(at) = line.find("ready id=") {
                break line[at..].trim().parse().unwrap();
            }
        };
        Self { directory: directory.into(), child, ready }
    }

    fn kill(mut self) -> Ready {
        assert!(self.child.try_wait().unwrap().is_none(), "it is alive");
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.ready.clone()
    }

    fn told(&self) -> Vec<String> {
        let told = std::fs::read_to_string(self.directory.join(TOLD)).unwrap_or_default();
        told.lines().map(str::to_owned).collect()
    }

    async fn phase(&self, transfer: &str) -> TransferPhase {
        let endpoint = proto::common::tuning::endpoint(&self.ready.addresses.grpc).unwrap();
        let mut client = SplitSnapshotServiceClient::new(endpoint.connect().await.unwrap());
        let request = GetTransferProgressRequest { transfer_id: transfer.into(), ..Default::default() };
        client.get_transfer_progress(request).await.unwrap().into_inner().transfer.unwrap().phase()
    }

    async fn client(&self) -> Client {
        Client::connect(&self.ready.addresses.resp).await.unwrap()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn a_node_that_is_killed_while_it_installs_repeats_the_hook_and_ends_installed() {
    for hold in [HOLD_BEFORE, HOLD_AFTER] {
        let dir = tempfile::tempdir().unwrap();
        let n1 = start("n1", dir.path(), "0-16383").await;
        let n2 = Target::start(dir.path(), "127.0.0.1:0", "127.0.0.1:0");
        let mut control = client(&n1).await;
        // 10850 is its slot.
        assert_eq!(call(&mut control, "SET key:2 old").await, "OK");
        std::fs::write(dir.path().join(hold), "").unwrap();
        let addresses = n2.ready.addresses.clone();
        let split = format!("SPLIT 8192 n2 {} {}", addresses.grpc, addresses.resp);
        let transfer = call(&mut control, &split).await;
        until("the install is held", async || n2.told() == ["install", hold]).await;
        assert_eq!(n2.phase(&transfer).await, TransferPhase::Installing);
        if hold == HOLD_AFTER {
            // The rows are merged and the slots are its own: what it acknowledges now must survive the repetition.
            assert_eq!(call(&mut n2.client().await, "SET key:2 new").await, "OK");
        } else {
            assert!(call(&mut n2.client().await, "GET key:2").await.starts_with("-CLUSTERDOWN"));
        }
        n2.kill();

        // Still held: it is INSTALLING from the start, by itself.
        let n2 = Target::start(dir.path(), &addresses.grpc, &addresses.resp);
        until("the hook is repeated", async || n2.told() == ["install", hold, "install", hold]).await;
        assert_eq!(n2.phase(&transfer).await, TransferPhase::Installing);
        std::fs::remove_file(dir.path().join(hold)).unwrap();
        until("it is installed", async || n2.phase(&transfer).await == TransferPhase::Installed).await;
        let value = if hold == HOLD_AFTER { "new" } else { "old" };
        until("the source knows", async || call(&mut control, "GET key:2").await.starts_with("-MOVED")).await;
        assert_eq!(call(&mut n2.client().await, "GET key:2").await, value);

        // Nothing is repeated of what is current.
        n2.kill();
        let n2 = Target::start(dir.path(), &addresses.grpc, &addresses.resp);
        assert_eq!(n2.phase(&transfer).await, TransferPhase::Installed);
        assert_eq!(call(&mut n2.client().await, "GET key:2").await, value);
        assert_eq!(n2.told().iter().filter(|told| *told == "install").count(), 2);
    }
}

//! A receiver in a process of its own, killed with SIGKILL in the middle of a transfer, again and again; and a sender.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use proto_snapshot::DirectorySource;
use proto_snapshot::sender::{SenderOptions, SnapshotSender};
use rand::{RngExt as _, SeedableRng as _};
use std::io::{BufRead as _, BufReader, Write as _};
use support::*;
use tokio::sync::watch;

const CHILD_DIR: &str = "PROTO_SNAPSHOT_TEST_CHILD_DIR";
const CHILD_TARGET: &str = "PROTO_SNAPSHOT_TEST_CHILD_TARGET";

/// A process of this test binary that runs one of the `child_` functions; killed when dropped.
struct Process {
    child: Child,
    output: Option<BufReader<std::process::ChildStdout>>,
}

impl Process {
    fn spawn(function: &str, dir: &Path, target: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", function, "--nocapture", "--include-ignored"])
            .env(CHILD_DIR, dir)
            .env(CHILD_TARGET, target)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output: Some(output) }
    }

    /// The rest of the first line that begins with `mark`.
    fn line(&mut self, mark: &str) -> String {
        let output = self.output.as_mut().unwrap();
        let mut line = String::new();
        loop {
            line.clear();
            assert!(output.read_line(&mut line).unwrap() > 0, "the child ended before it printed {mark}");
            // The test harness prints the name of the test without a line break.
            if let Some((_, rest)) = line.split_once(mark) {
                return rest.trim().to_owned();
            }
        }
    }

    /// SIGKILL; returns whether it was alive.
    fn kill(&mut self) -> bool {
        let alive = self.child.try_wait().unwrap().is_none();
        let _ = self.child.kill();
        self.child.wait().unwrap();
        alive
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn child_environment() -> Option<(PathBuf, String)> {
    Some((std::env::var_os(CHILD_DIR)?.into(), std::env::var(CHILD_TARGET).ok()?))
}

/// Not a test of its own: the receiving process of the tests below.
#[tokio::test(flavor = "multi_thread")]
async fn child_receiver() {
    let Some((dir, _)) = child_environment() else { return };
    let server = Server::start(builder(&dir).limits(small_limits())).await;
    println!("READY {}", server.address);
    std::io::stdout().flush().unwrap();
    std::future::pending::<()>().await;
}

/// Not a test of its own: the sending process of the tests below.
#[tokio::test(flavor = "multi_thread")]
async fn child_sender() {
    let Some((dir, target)) = child_environment() else { return };
    let mut handle = sender(&target).send(snapshot("crash"), DirectorySource::new(dir)).unwrap();
    println!("SENDING now");
    std::io::stdout().flush().unwrap();
    handle.join().await.unwrap();
    println!("INSTALLED now");
    std::io::stdout().flush().unwrap();
}

fn sender(address: &str) -> SnapshotSender<proto_common::dial::Dial> {
    let mut options = SenderOptions::default();
    options.backoff.initial = Duration::from_millis(5);
    options.backoff.max = Duration::from_millis(50);
    // Slow enough to be hit in the middle.
    options.bytes_per_second = std::num::NonZeroU64::new(24 << 20);
    SnapshotSender::connect(address).unwrap().options(options)
}

fn on_its_way() -> u64 {
    let limits = small_limits();
    // Not durable, on credit, and in the buffers of HTTP/2, the sockets and the proxy.
    limits.unsynced_bytes + limits.stream_credit_bytes + (6 << 20)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_is_killed_again_and_again_gets_every_byte_about_once() {
    const KILLS: u64 = 6;
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 30, 48 << 20, 21);
    let size = tree_bytes(source.path());
    let (aim, aimed) = watch::channel(None::<SocketAddr>);
    let proxy = Proxy::start(aimed).await;
    let mut receiver = Process::spawn("child_receiver", target.path(), "");
    aim.send_replace(Some(receiver.line("READY").parse().unwrap()));
    let mut handle = sender(&proxy.address.to_string())
        .send(snapshot("crash"), DirectorySource::new(source.path()))
        .unwrap();
    let mut rng = rand::rngs::StdRng::seed_from_u64(22);
    for kill in 1..=KILLS {
        let mark = size / (KILLS + 2) * kill + rng.random_range(0..size / 20);
        until("more was sent", || proxy.sent() >= mark).await;
        assert!(!handle.progress().unwrap().is_finished(), "the kill comes in the middle");
        assert!(receiver.kill(), "it was alive when it was killed");
        let before = handle.progress().unwrap().connections;
        receiver = Process::spawn("child_receiver", target.path(), "");
        aim.send_replace(Some(receiver.line("READY").parse().unwrap()));
        until("the sender is back", || handle.progress().unwrap().connections > before).await;
    }
    handle.join().await.unwrap();
    assert_eq!(read_tree(&installed_dir(target.path(), "crash")), read_tree(source.path()));
    assert!(staging_is_empty(target.path()));
    let limit = size + size / 20 + KILLS * on_its_way();
    assert!(proxy.sent() <= limit, "{} bytes were sent for {size}, at most {limit} may be", proxy.sent());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_that_is_killed_and_started_again_goes_on() {
    const KILLS: u64 = 4;
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 30, 48 << 20, 23);
    let size = tree_bytes(source.path());
    let server = Server::start(builder(target.path()).limits(small_limits())).await;
    let proxy = Proxy::to(server.address).await;
    let address = proxy.address.to_string();
    for kill in 1..=KILLS {
        let mut process = Process::spawn("child_sender", source.path(), &address);
        process.line("SENDING");
        let mark = size / (KILLS + 2) * kill;
        until("more was sent", || proxy.sent() >= mark).await;
        assert!(process.kill(), "it was alive when it was killed");
    }
    let mut last = Process::spawn("child_sender", source.path(), &address);
    let installed = tokio::task::spawn_blocking(move || last.line("INSTALLED"));
    tokio::time::timeout(LONG, installed).await.expect("the last sender finishes").unwrap();
    assert_eq!(read_tree(&installed_dir(target.path(), "crash")), read_tree(source.path()));
    let limit = size + size / 20 + KILLS * on_its_way();
    assert!(proxy.sent() <= limit, "{} bytes were sent for {size}, at most {limit} may be", proxy.sent());
    server.stop().await;
}

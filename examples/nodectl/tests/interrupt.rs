//! Ctrl-C and SIGTERM: nothing is lost, and the command that is shown goes on.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod support;

use rustix::process::Signal;
use support::{Node, Running, installed, nodectl, refusing_port, snapshot, tree, until};

const MIB: usize = 1 << 20;

/// The arguments of the command after "to resume:".
fn resume_of(stderr: &str) -> String {
    let (_, command) = stderr.split_once("to resume:\n  ").unwrap_or_else(|| panic!("{stderr}"));
    let (program, args) = command.trim().split_once(' ').unwrap();
    assert_eq!(program, env!("CARGO_BIN_EXE_nodectl"));
    args.to_owned()
}

async fn interrupted_by(signal: Signal) {
    let dir = tempfile::tempdir().unwrap();
    let (path, size) = snapshot(dir.path(), 12 * MIB);
    let node = Node::start(&dir.path().join("data")).await;
    // No ID is given: the one that it makes has to be in the command that resumes.
    let push =
        format!("push {path} --to {} --source-shard s1 --target-shard s2 --rate 4MiB --json", node.address);
    let mut push = Running::start(&push);
    let started: serde_json::Value = serde_json::from_str(&push.says("started").await).unwrap();
    let id = started["transfer_id"].as_str().unwrap().to_owned();
    until("3 MiB are durable", || node.durable(&id) >= 3 << 20).await;
    push.signal(signal);
    let ended = push.ended().await;
    assert_eq!(ended.code, Some(130), "{ended:?}");
    assert_eq!(ended.last()["event"], "interrupted");
    assert!(ended.stderr.contains("are safe at"), "{ended:?}");
    let args = resume_of(&ended.stderr);
    assert!(args.contains(&format!("--transfer-id {id}")), "{args}");

    // What came last is made durable when the sender is gone.
    until("the node has noticed", || {
        node.incoming(&id).unwrap().phase() == proto::node::TransferPhase::Interrupted
    })
    .await;
    let durable = node.durable(&id);
    assert!((3 << 20..size).contains(&durable), "{durable}");
    let resumed = nodectl(&args).await;
    assert_eq!(resumed.code, Some(0), "{resumed:?}");
    assert_eq!(installed(&node).await, tree(path.as_ref()));
    let last = resumed.last();
    assert_eq!(last["wire_bytes"], size - durable);
    assert_eq!(last["attempt"], 2);
    assert_eq!(last["transfer_id"], id);
}

#[tokio::test(flavor = "multi_thread")]
async fn sigint_in_the_middle() {
    interrupted_by(Signal::INT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_in_the_middle() {
    interrupted_by(Signal::TERM).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_it_waits_for_the_node() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path(), 1000);
    let (_port, address) = refusing_port();
    let mut push = Running::start(&format!("push {path} --to {address} --source-shard s1 --target-shard s2"));
    push.says("waiting for").await;
    push.signal(Signal::INT);
    let ended = push.ended().await;
    assert_eq!(ended.code, Some(130), "{ended:?}");
    ended.assert_plain();
    assert!(ended.stderr.contains("before") && ended.stderr.contains("accepted anything"), "{ended:?}");
    assert!(resume_of(&ended.stderr).contains("--transfer-id push-"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_leaves_the_transfer_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path(), 4 * MIB);
    let node = Node::start(&dir.path().join("data")).await;
    let push = Running::start(&format!(
        "push {path} --to {} --source-shard s1 --target-shard s2 --transfer-id t1 --rate 2MiB",
        node.address
    ));
    until("some of it is durable", || node.durable("t1") > 0).await;
    let mut watch = Running::start(&format!("progress t1 --at {} --watch", node.address));
    watch.says("transferring").await;
    watch.signal(Signal::INT);
    let ended = watch.ended().await;
    assert_eq!(ended.code, Some(130), "{ended:?}");
    assert_eq!(push.ended().await.code, Some(0));
}

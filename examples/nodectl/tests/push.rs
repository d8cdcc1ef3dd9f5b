//! `nodectl push`: what arrives, what it says, and how it ends.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod support;

use std::time::Duration;

use proto::node::TransferPhase;
use support::{Node, Running, installed, nodectl, refusing_port, snapshot, tree, until};

const SHARDS: &str = "--source-shard s1 --target-shard s2";
const MIB: usize = 1 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_arrives_and_each_line_is_a_document() {
    let dir = tempfile::tempdir().unwrap();
    let (path, size) = snapshot(dir.path(), 3 * MIB);
    let node = Node::start(&dir.path().join("data")).await;
    let push = format!(
        "push {path} --to {} {SHARDS} --slots 8192-16383 --index 7 --term 3 --transfer-id t1 --json",
        node.address
    );
    let ended = nodectl(&push).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(installed(&node).await, tree(path.as_ref()));

    let documents = ended.documents();
    let started = &documents[0];
    assert_eq!(started["event"], "started");
    assert_eq!(started["transfer_id"], "t1");
    assert_eq!((started["files_total"].as_u64(), started["bytes_total"].as_u64()), (Some(3), Some(size)));
    let last = ended.last();
    for (field, value) in [
        ("event", "installed"),
        ("transfer_id", "t1"),
        ("phase", "installed"),
        ("direction", "out"),
        ("slots", "8192-16383"),
        ("priority", "split"),
        ("source_shard_id", "s1"),
        ("target_shard_id", "s2"),
        ("source_node_id", "nodectl"),
        ("target_node_id", "n1"),
    ] {
        assert_eq!(last[field], value, "{field}");
    }
    for (field, value) in [
        ("bytes_done", size),
        ("bytes_total", size),
        ("wire_bytes", size),
        ("files_done", 3),
        ("snapshot_index", 7),
        ("snapshot_term", 3),
        ("attempt", 1),
    ] {
        assert_eq!(last[field], value, "{field}");
    }
    assert_eq!(last["already_installed"], false);
    assert!(last["error"].is_null());
    assert!(
        documents[1..documents.len() - 1].iter().all(|document| document["event"] == "progress"),
        "{ended:?}"
    );

    let again = nodectl(&push).await;
    assert_eq!(again.code, Some(0), "{again:?}");
    assert_eq!(again.last()["already_installed"], true);
    assert_eq!(again.last()["wire_bytes"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipe_gets_plain_lines_and_the_same_command_the_same_transfer() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path(), MIB);
    let node = Node::start(&dir.path().join("data")).await;
    let push = format!("push {path}/a/big --to {} {SHARDS}", node.address);
    let ended = nodectl(&push).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    ended.assert_plain();
    assert!(ended.stdout.starts_with("pushing 1.00 MiB in 1 file to 127.0.0.1:"), "{ended:?}");
    assert!(
        ended.stdout.lines().last().unwrap().starts_with("installed 1.00 MiB in 1 file in "),
        "{ended:?}"
    );
    assert_eq!(ended.stderr, "");
    assert_eq!(installed(&node).await["big"].len(), MIB);

    let again = nodectl(&push).await;
    assert_eq!(again.code, Some(0), "{again:?}");
    assert!(again.stdout.contains("was installed already"), "{again:?}");
    assert_eq!(again.stdout.lines().next(), ended.stdout.lines().next());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path(), 1000);
    let node = Node::start(&dir.path().join("data")).await;
    let push = format!("push {path} --to {} {SHARDS} --target-node n2 --transfer-id t1", node.address);
    let ended = nodectl(&push).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    ended.assert_plain();
    for part in ["error: ", "reason: WRONG_NODE", "help: ", "--target-node"] {
        assert!(ended.stderr.contains(part), "{part}: {ended:?}");
    }
    assert!(!ended.stderr.contains("to resume"), "{ended:?}");

    let last = nodectl(&format!("{push} --json")).await.last();
    assert_eq!(last["event"], "failed");
    assert_eq!(last["transfer_id"], "t1");
    assert_eq!(last["error"]["code"], "failed_precondition");
    assert_eq!(last["error"]["reason"], "WRONG_NODE");
    assert_eq!(last["error"]["metadata"]["node_id"], "n1");
    assert_eq!(last["error"]["retryable"], false);
    assert!(last["error"]["message"].as_str().unwrap().contains("n2"));

    // Something else under the same name.
    let ok = nodectl(&format!("push {path} --to {} {SHARDS} --transfer-id t1", node.address)).await;
    assert_eq!(ok.code, Some(0), "{ok:?}");
    let other = format!("push {path} --to {} {SHARDS} --transfer-id t1 --index 9", node.address);
    let ended = nodectl(&other).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for part in ["reason: SPECIFICATION_MISMATCH", "differs in --index"] {
        assert!(ended.stderr.contains(part), "{part}: {ended:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_never_comes_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path(), 1000);
    let (_port, address) = refusing_port();
    let push = format!("push {path} --to {address} {SHARDS} --transfer-id t1 --retry-for 1s");
    let ended = nodectl(&push).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    ended.assert_plain();
    assert!(
        ended.stdout.contains(&format!("waiting for {address}: connection refused, next try in ")),
        "{ended:?}"
    );
    for part in [
        "reason: UNAVAILABLE",
        "nothing moved for 1.0 s",
        &format!("{address} is its gRPC address"),
        "to resume:",
    ] {
        assert!(ended.stderr.contains(part), "{part}: {ended:?}");
    }

    let ended = nodectl(&format!("{push} --json")).await;
    assert_eq!(ended.code, Some(1));
    let waiting = ended.documents().into_iter().find(|document| document["event"] == "waiting").unwrap();
    assert_eq!(waiting["error"]["reason"], "UNAVAILABLE");
    assert!(waiting["next_try_ms"].as_u64().unwrap() <= 1000);
    assert_eq!(ended.last()["event"], "failed");
    assert_eq!(ended.last()["error"]["retryable"], true);
    assert!(ended.last()["resume"].as_str().unwrap().contains("--transfer-id t1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_for_a_node_that_comes_later() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path(), MIB);
    let (port, address) = refusing_port();
    let mut push = Running::start(&format!("push {path} --to {address} {SHARDS}"));
    push.says("waiting for").await;
    let node = Node::start_on(&dir.path().join("data"), port).await;
    let ended = push.ended().await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(installed(&node).await, tree(path.as_ref()));
}

#[tokio::test(flavor = "multi_thread")]
async fn carries_on_when_the_node_was_away_in_the_middle() {
    let dir = tempfile::tempdir().unwrap();
    let (path, size) = snapshot(dir.path(), 12 * MIB);
    let data = dir.path().join("data");
    let (port, address) = refusing_port();
    let node = Node::start_on(&data, port).await;
    let mut push =
        Running::start(&format!("push {path} --to {address} {SHARDS} --transfer-id t1 --rate 4MiB --json"));
    until("3 MiB are durable", || node.durable("t1") >= 3 << 20).await;
    let before = node.durable("t1");
    let port = node.kill();
    push.says("\"event\":\"waiting\"").await;
    let node = Node::start_on(&data, port).await;
    let ended = push.ended().await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(installed(&node).await, tree(path.as_ref()));
    let last = ended.last();
    assert!(last["connections"].as_u64().unwrap() >= 2, "{last}");
    // The new process of the node has only seen what came after the old one's end.
    let received = node.incoming("t1").unwrap().wire_bytes;
    assert!(received > 0 && received <= size - before, "{received} of {size}, {before} were durable");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_by_somebody_else_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path(), 12 * MIB);
    let node = Node::start(&dir.path().join("data")).await;
    let push =
        Running::start(&format!("push {path} --to {} {SHARDS} --transfer-id t1 --rate 1MiB", node.address));
    until("some of it is durable", || node.durable("t1") > 0).await;
    let cancel = nodectl(&format!("cancel t1 --at {} --reason mistake", node.address)).await;
    assert_eq!(cancel.code, Some(0), "{cancel:?}");
    assert!(cancel.stdout.starts_with("t1 is cancelled; "), "{cancel:?}");
    let ended = push.ended().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("reason: TRANSFER_CANCELLED"), "{ended:?}");
    assert!(ended.stderr.contains("choose a new --transfer-id"), "{ended:?}");
    assert_eq!(node.incoming("t1").unwrap().phase(), TransferPhase::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rate_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (path, size) = snapshot(dir.path(), 4 * MIB);
    let node = Node::start(&dir.path().join("data")).await;
    let push = format!("push {path} --to {} {SHARDS} --rate 2MiB --json", node.address);
    let ended = nodectl(&push).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let elapsed = Duration::from_millis(ended.last()["elapsed_ms"].as_u64().unwrap());
    assert_eq!(ended.last()["wire_bytes"], size);
    // Half of the time, for what may go at once.
    assert!(elapsed >= Duration::from_secs(1), "{elapsed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reuse_sends_nothing_twice_and_a_lower_fence_or_index_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (path, size) = snapshot(dir.path(), MIB);
    let node = Node::start(&dir.path().join("data")).await;
    let push = format!("push {path} --to {} {SHARDS} --json", node.address);
    let first = nodectl(&format!("{push} --index 1 --epoch 5 --lanes 2")).await;
    assert_eq!((first.code, first.last()["wire_bytes"].as_u64()), (Some(0), Some(size)), "{first:?}");
    let reused = nodectl(&format!("{push} --index 2 --reuse")).await;
    assert_eq!((reused.code, reused.last()["wire_bytes"].as_u64()), (Some(0), Some(0)), "{reused:?}");
    assert_eq!(reused.last()["reused_bytes"], size);
    for (more, reason, advice) in [
        ("--index 3 --epoch 4", "STALE_FENCE", "epoch 5"),
        ("--index 1 --transfer-id other", "STALE_SNAPSHOT", "index 2"),
    ] {
        let refused = nodectl(&format!("{push} {more}")).await;
        assert_eq!(refused.code, Some(1), "{more}: {refused:?}");
        assert_eq!(refused.last()["error"]["reason"], reason, "{more}");
        assert!(refused.last()["help"].as_str().unwrap().contains(advice), "{more}: {refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_changes_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path(), 12 * MIB);
    let node = Node::start(&dir.path().join("data")).await;
    let push =
        Running::start(&format!("push {path} --to {} {SHARDS} --transfer-id t1 --rate 2MiB", node.address));
    until("some of it is durable", || node.durable("t1") > 0).await;
    std::fs::write(format!("{path}/a/big"), vec![7; 12 * MIB]).unwrap();
    let ended = push.ended().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("a/big changed while it was read"), "{ended:?}");
    assert!(ended.stderr.contains("help: nothing may write to PATH"), "{ended:?}");
}

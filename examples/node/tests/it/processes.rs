//! Nodes as real processes: killed, restarted, split.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use crate::support::proxy::{Frame, Proxy, Ways};
use crate::support::{call, client, program, show, split_says, start, until};
use node::common::NodeId;
use node::demo::load_gen::{LoadGenerator, judge};
use node::demo::processes::NodeProcess;
use node::split::ROWS_FILE;
use node::store::{Identity, Init, SplitIntent, Store, StoreOptions};
use proto::common::dial::Dialer;
use proto::common::ids::{ShardId, TransferId};
use proto::common::path::FileName;
use proto::common::slots::RECLAIM_STEP;
use proto::node::Priority;
use proto::snapshot::sender::SnapshotToSend;
use proto::snapshot::spec::{FileTotal, Manifest, ManifestFile, SnapshotPoint, TransferPlan, TransferSpec};
use proto::snapshot::store::{FileStoreOptions, SnapshotStore as _, Staging as _};
use proto::snapshot::{FileSnapshotStore, FileSource, SnapshotSender};

fn split_command(target: &NodeProcess, rate: Option<u64>) -> String {
    split_command_by(&target.addresses().grpc, target, rate)
}

/// The same by way of `grpc`.
fn split_command_by(grpc: &str, target: &NodeProcess, rate: Option<u64>) -> String {
    let rate = rate.map(|rate| format!(" RATE {rate}")).unwrap_or_default();
    format!("SPLIT 8192 {} {grpc} {}{rate}", target.id(), target.addresses().resp)
}

/// Files whose names end in `suffix`.
fn files_below(dir: &Path, suffix: &str) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    // Something may be deleted meanwhile.
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files_below(&path, suffix));
        } else if path.to_string_lossy().ends_with(suffix) {
            found.push(path);
        }
    }
    found
}

fn value_of(reply: &redis_protocol::resp2::types::BytesFrame) -> Option<&[u8]> {
    match reply {
        redis_protocol::resp2::types::BytesFrame::BulkString(value) => Some(value),
        _ => None,
    }
}

/// `count` keys with values of 100 bytes.
async fn load(client: &mut node::demo::client::Client, count: usize) {
    for n in 0..count {
        client.push(&["SET".to_owned(), format!("key:{n}"), format!("{n:0100}")]).unwrap();
    }
    client.send().await.unwrap();
    for _ in 0..count {
        assert_eq!(show(&client.reply().await.unwrap()), "OK");
    }
}

async fn check(nodes: &[&NodeProcess], count: usize) {
    let addresses: Vec<_> = nodes.iter().map(|node| node.addresses().resp.clone()).collect();
    let owners = node::demo::verify::owners(&addresses).await.unwrap();
    let mut loaded = node::demo::load::Loaded::default();
    for n in 0..count {
        let value = node::demo::load::Expected::of(format!("{n:0100}").as_bytes());
        loaded.keys.insert(format!("key:{n}").into(), value);
    }
    let verified = node::demo::verify::verify(&loaded, &[], &owners, |_| {}).await.unwrap();
    assert_eq!((verified.keys, verified.wrong), (count as u64, 0), "{:?}", verified.differences);
}

/// Runs `node serve` with `arguments` to its end; returns what it wrote to stderr.
fn refused(arguments: &[&str]) -> String {
    let output = std::process::Command::new(program())
        .args(["serve", "--grpc", "127.0.0.1:0", "--resp", "127.0.0.1:0"])
        .args(arguments)
        .output()
        .unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

#[tokio::test]
async fn what_was_acknowledged_survives_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = start("n1", dir.path(), "0-16383").await;
    for _ in 0..3 {
        let writers = LoadGenerator::start(&node.addresses().resp, "w:", "0-8191".parse().unwrap());
        let mut watcher = client(&node).await;
        until("some writes", async || {
            call(&mut watcher, "DBSIZE").await.trim_start_matches(':').parse::<u64>().unwrap() > 100
        })
        .await;
        node.kill().await.unwrap();
        assert!(watcher.call(&["PING"]).await.is_err(), "it was killed");
        let written = writers.finish().await.unwrap();
        // DBSIZE counts what is committed, also what is not acknowledged yet.
        assert!(written.acknowledged > 50 && written.unknown > 0, "{written:?}");
        node.restart().await.unwrap();
        let mut client = client(&node).await;
        for history in &written.histories {
            let value = client.call(&[b"GET".as_slice(), &history.key]).await.unwrap();
            assert_eq!(judge(history, value_of(&value)), None);
        }
        // The next round counts from 1 again.
        for history in &written.histories {
            client.call(&[b"DEL".as_slice(), &history.key]).await.unwrap();
        }
    }
    node.stop().await.unwrap();
}

/// As Redis does it.
#[tokio::test]
async fn as_many_clients_are_let_in_as_there_are_files_to_open() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("node");
    // The soft limit is raised, the hard one is not.
    let text =
        format!("#!/bin/sh\nulimit -Sn 300 && ulimit -Hn 2000 && exec {} \"$@\"\n", program().display());
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut node = NodeProcess::start(&script, "n1", dir.path(), "0-99").await.unwrap();
    let info = call(&mut client(&node).await, "INFO clients").await;
    assert!(info.contains("maxclients:500\r"), "{info}");
    node.stop().await.unwrap();
    if rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.is_some_and(|most| most < 14_000)
    {
        eprintln!("SKIPPED: this process may not have as many files open as a node with all of its clients");
        return;
    }
    let mut node = start("n2", dir.path(), "0-99").await;
    let info = call(&mut client(&node).await, "INFO clients").await;
    assert!(info.contains("maxclients:10000\r"), "{info}");
    node.stop().await.unwrap();
}

/// A directory for what splits write may be elsewhere, or hold what somebody else has put there.
#[tokio::test]
async fn nothing_but_what_splits_have_left_is_removed_at_a_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = start("n1", dir.path(), "0-99").await;
    node.kill().await.unwrap();
    let splits = dir.path().join("n1/splits");
    for name in ["split-1.rows", "split-2.partial", "notes.txt"] {
        std::fs::write(splits.join(name), b"x").unwrap();
    }
    node.restart().await.unwrap();
    let left: Vec<_> = std::fs::read_dir(&splits).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["notes.txt"]);
    node.kill().await.unwrap();
    let elsewhere = dir.path().join("elsewhere");
    std::fs::rename(&splits, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &splits).unwrap();
    std::fs::write(elsewhere.join("split-1.rows"), b"x").unwrap();
    node.restart().await.unwrap();
    assert!(elsewhere.join("split-1.rows").exists());
    node.stop().await.unwrap();
}

#[tokio::test]
async fn a_data_directory_is_one_nodes_only() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("n1");
    let data = data.to_str().unwrap();
    let mut node = start("n1", dir.path(), "0-99").await;
    let error = refused(&["--id", "n1", "--data", data]);
    assert!(error.contains("in use by another process"), "{error}");
    node.stop().await.unwrap();
    let error = refused(&["--id", "n2", "--data", data]);
    assert!(error.contains("belongs to node n1"), "{error}");
    let error = refused(&["--id", "n1", "--data", data, "--slots", "0-100"]);
    assert!(error.contains("was made with --slots 0-99"), "{error}");
    node.restart().await.unwrap();
    node.stop().await.unwrap();
}

#[test]
fn a_file_that_is_no_database_is_named_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("node.redb");
    std::fs::write(&file, b"something else").unwrap();
    let error = refused(&["--id", "n1", "--data", dir.path().to_str().unwrap()]);
    assert!(error.contains(&format!("the database {} is damaged", file.display())), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"something else");
}

#[tokio::test]
async fn a_split_survives_a_kill_of_the_source() {
    let dir = tempfile::tempdir().unwrap();
    let mut n1 = start("n1", dir.path(), "0-16383").await;
    let n2 = start("n2", dir.path(), "none").await;
    let mut control = client(&n1).await;
    load(&mut control, 20_000).await;
    let transfer = call(&mut control, &split_command(&n2, Some(300_000))).await;
    assert!(transfer.starts_with("split-"), "{transfer}");
    until("the transfer runs", async || split_says(&mut control, "phase").await == "sending").await;

    // Held: a write to the slots that move waits. One to the others does not.
    let mut writer = client(&n1).await;
    assert_eq!(call(&mut writer, "CLUSTER KEYSLOT key:2").await, ":10850");
    writer.push(&["SET", "key:2", "held"]).unwrap();
    writer.send().await.unwrap();
    assert!(
        tokio::time::timeout(Duration::from_millis(200), writer.reply()).await.is_err(),
        "the write waits"
    );

    n1.kill().await.unwrap();
    assert!(writer.reply().await.is_err(), "it was killed");
    n1.restart().await.unwrap();
    let mut control = client(&n1).await;
    until("the split is done", async || split_says(&mut control, "phase").await == "done").await;
    assert_eq!(split_says(&mut control, "transfer").await, transfer);
    let moved = call(&mut control, "GET key:2").await;
    assert_eq!(moved, format!("-MOVED 10850 {}", n2.addresses().resp));
    check(&[&n1, &n2], 20_000).await;
    // The rows that were given up are deleted in the background, and counted out at once.
    let count = async |node: &NodeProcess| {
        let size = call(&mut client(node).await, "DBSIZE").await;
        size.trim_start_matches(':').parse::<u64>().unwrap()
    };
    assert_eq!(count(&n1).await + count(&n2).await, 20_000);
}

/// The target has taken over, and the source does not hear of it before it is killed.
#[tokio::test]
async fn a_split_whose_answer_is_lost_is_done_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut n1 = start("n1", dir.path(), "0-16383").await;
    let n2 = start("n2", dir.path(), "none").await;
    let mut control = client(&n1).await;
    load(&mut control, 1000).await;
    let proxy = Proxy::start(&n2.addresses().grpc).await;
    proxy.arm(Frame::End, Ways::LOST);
    let transfer = call(&mut control, &split_command_by(proxy.address(), &n2, None)).await;
    let mut target = client(&n2).await;
    until("the target has taken over", async || {
        call(&mut target, "GET key:2").await == format!("{:0100}", 2)
    })
    .await;
    proxy.fired().await;
    assert_eq!(split_says(&mut control, "phase").await, "sending", "the source has not heard");
    n1.kill().await.unwrap();
    n1.restart().await.unwrap();
    let mut control = client(&n1).await;
    until("the split is done", async || split_says(&mut control, "phase").await == "done").await;
    assert_eq!(split_says(&mut control, "transfer").await, transfer);
    check(&[&n1, &n2], 1000).await;
}

#[tokio::test]
async fn a_split_survives_kills_of_the_target_at_any_moment() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = start("n1", dir.path(), "0-16383").await;
    let mut n2 = start("n2", dir.path(), "none").await;
    let mut control = client(&n1).await;
    load(&mut control, 20_000).await;
    let writers = LoadGenerator::start(&n1.addresses().resp, "w:", "8192-16383".parse().unwrap());
    call(&mut control, &split_command(&n2, Some(800_000))).await;
    let mut kills = 0;
    // Over and over, each time later, until it gets through: also while it installs.
    while split_says(&mut control, "phase").await != "done" && kills < 12 {
        tokio::time::sleep(Duration::from_millis(150 * (kills + 1))).await;
        n2.kill().await.unwrap();
        n2.restart().await.unwrap();
        kills += 1;
    }
    assert!(kills >= 2, "{kills} kills");
    until("the split is done", async || split_says(&mut control, "phase").await == "done").await;
    // The rows are in the database; their file is of no more use, at either end.
    for node in ["n1/splits", "n2/snapshots"] {
        until("the file is gone", async || files_below(&dir.path().join(node), ".rows").is_empty()).await;
        until("the file is gone", async || files_below(&dir.path().join(node), ROWS_FILE).is_empty()).await;
    }
    let written = writers.finish().await.unwrap();
    assert!(written.acknowledged > 0);
    check(&[&n1, &n2], 20_000).await;
    let mut target = client(&n2).await;
    let mut source = client(&n1).await;
    for history in &written.histories {
        let mut value = source.call(&[b"GET".as_slice(), &history.key]).await.unwrap();
        if show(&value).starts_with("-MOVED") {
            value = target.call(&[b"GET".as_slice(), &history.key]).await.unwrap();
        }
        assert_eq!(judge(history, value_of(&value)), None);
    }
}

#[tokio::test]
async fn a_refused_split_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = start("n1", dir.path(), "0-16383").await;
    let n2 = start("n2", dir.path(), "16000-16383").await;
    let mut control = client(&n1).await;
    load(&mut control, 100).await;
    assert_eq!(
        call(&mut control, "SPLIT 8192 n1 127.0.0.1:1 127.0.0.1:2").await,
        "-ERR node n1 is this node"
    );
    // The target owns a part of it already and says so.
    call(&mut control, &split_command(&n2, None)).await;
    until("the split is undone", async || split_says(&mut control, "phase").await == "undone").await;
    let error = split_says(&mut control, "error").await;
    assert!(error.contains("owns slots 16000-16383"), "{error}");
    assert_eq!(call(&mut control, "SET key:1 free").await, "OK");
    assert_eq!(call(&mut control, "DBSIZE").await, ":100");
}

/// What does not fit is refused for good: the source's clients do not wait until there is room.
#[tokio::test]
async fn a_split_to_a_node_without_room_for_the_rows_is_undone() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = start("n1", dir.path(), "0-16383").await;
    let full = ["--reserve-mib", "1000000000"];
    let n2 = NodeProcess::start_with(&program(), "n2", dir.path(), "none", &full).await.unwrap();
    let mut control = client(&n1).await;
    load(&mut control, 100).await;
    call(&mut control, &split_command(&n2, None)).await;
    until("the split is undone", async || split_says(&mut control, "phase").await == "undone").await;
    let error = split_says(&mut control, "error").await;
    assert!(error.contains("bytes left") && error.contains("make room there"), "{error}");
    assert_eq!(call(&mut control, "SET key:2 free").await, "OK");
    assert_eq!(call(&mut control, "DBSIZE").await, ":100");
    assert_eq!(call(&mut client(&n2).await, "DBSIZE").await, ":0");
}

/// Opens the data directory of a node that does not run.
fn open(directory: &Path, id: &str) -> (Store, Identity) {
    let init = Init { node: NodeId::new(id).unwrap(), slots: None, others: Vec::new() };
    Store::open(&directory.join(id), &init, &StoreOptions::default()).unwrap()
}

/// Stops `source` and has it find, at its next start, that it had begun to split 8192-16383 off to `target`, which then had the data
/// directory `target_store`.
async fn as_if_begun(
    directory: &Path,
    source: &mut NodeProcess,
    target: &NodeProcess,
    target_store: Vec<u8>,
) {
    source.stop().await.unwrap();
    let (store, _) = open(directory, source.id());
    let intent = SplitIntent {
        transfer: "split-begun".into(),
        start: 8192,
        end: 16384,
        target: target.id().into(),
        target_addresses: target.addresses().clone(),
        target_store,
        epoch: 2,
        source_start: 0,
        source_end: 16384,
        begun_unix_ms: node::store::unix_ms(),
        bytes_per_second: None,
    };
    let addresses = BTreeMap::from([(NodeId::new(target.id()).unwrap(), target.addresses().clone())]);
    store.put_nodes(addresses).await.unwrap();
    store.put_split(intent).await.unwrap();
    store.close();
}

/// A write to the slots that move does not return.
async fn writes_are_held(node: &NodeProcess) {
    let mut writer = client(node).await;
    writer.push(&["SET", "key:2", "held"]).unwrap();
    writer.send().await.unwrap();
    let held = tokio::time::timeout(Duration::from_millis(300), writer.reply()).await;
    assert!(held.is_err(), "{held:?}");
}

/// Node n1, which is down and has begun to split, and n2 with these slots, which knows nothing of it.
async fn begun(dir: &Path, slots: &str) -> (NodeProcess, NodeProcess) {
    let mut n2 = start("n2", dir, slots).await;
    n2.stop().await.unwrap();
    let (store, identity) = open(dir, "n2");
    store.close();
    drop(store);
    n2.restart().await.unwrap();
    let mut n1 = start("n1", dir, "0-16383").await;
    load(&mut client(&n1).await, 100).await;
    as_if_begun(dir, &mut n1, &n2, identity.store_id.to_vec()).await;
    (n1, n2)
}

#[tokio::test]
async fn a_resumed_split_that_its_target_never_had_and_refuses_is_undone() {
    let dir = tempfile::tempdir().unwrap();
    let (mut n1, _n2) = begun(dir.path(), "16000-16383").await;
    n1.restart().await.unwrap();
    let mut control = client(&n1).await;
    until("the split is undone", async || split_says(&mut control, "phase").await == "undone").await;
    let error = split_says(&mut control, "error").await;
    assert!(error.contains("owns slots 16000-16383"), "{error}");
    assert_eq!(call(&mut control, "SET key:2 free").await, "OK");
    let refused = call(&mut control, "SPLIT RESOLVE split-begun KEEP").await;
    assert_eq!(refused, "-ERR the split is undone already");
}

/// Another node has seen the ID, and installs something of its own under it while the source is down.
#[tokio::test]
async fn a_resumed_split_whose_id_another_node_has_used_gives_no_slots_away() {
    let dir = tempfile::tempdir().unwrap();
    let (mut n1, n2) = begun(dir.path(), "none").await;
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let foreign = SnapshotToSend {
        transfer_id: TransferId::new("split-begun").unwrap(),
        source_shard: ShardId::new("s3").unwrap(),
        target_shard: ShardId::new("x").unwrap(),
        source_node: NodeId::new("n3").unwrap(),
        target_node: None,
        slots: "0".parse().unwrap(),
        point: SnapshotPoint { term: 1, index: 1 },
        fence: None,
        priority: Priority::Split,
    };
    let sender = SnapshotSender::new(Dialer::plaintext().to(&n2.addresses().grpc, None).unwrap());
    sender.send(foreign, FileSource::new(&file)).unwrap().join().await.unwrap();
    n1.restart().await.unwrap();
    let mut control = client(&n1).await;
    until("it is decided", async || {
        ["undone", "done"].contains(&split_says(&mut control, "phase").await.as_str())
    })
    .await;
    assert_eq!(split_says(&mut control, "phase").await, "undone");
    check(&[&n1], 100).await;
    assert_eq!(call(&mut control, "SET key:2 free").await, "OK");
}

#[tokio::test]
async fn a_target_that_lost_its_disk_is_no_evidence_and_the_operator_decides() {
    let dir = tempfile::tempdir().unwrap();
    let mut n1 = start("n1", dir.path(), "0-16383").await;
    let mut n2 = start("n2", dir.path(), "none").await;
    let mut control = client(&n1).await;
    load(&mut control, 20_000).await;
    let transfer = call(&mut control, &split_command(&n2, Some(300_000))).await;
    until("the transfer runs", async || split_says(&mut control, "phase").await == "sending").await;
    let refused = call(&mut control, &format!("SPLIT RESOLVE {transfer} KEEP")).await;
    assert!(refused.contains("is sending, not waiting for an answer"), "{refused}");

    n2.kill().await.unwrap();
    std::fs::remove_dir_all(dir.path().join("n2")).unwrap();
    n2.restart().await.unwrap();
    until("it is noticed", async || split_says(&mut control, "phase").await == "needs-operator").await;
    let error = split_says(&mut control, "error").await;
    assert!(error.contains("SPLIT RESOLVE"), "{error}");
    writes_are_held(&n1).await;
    assert_eq!(call(&mut client(&n2).await, "DBSIZE").await, ":0", "nothing was sent to it");

    // Also after a restart of the source.
    n1.kill().await.unwrap();
    n1.restart().await.unwrap();
    let mut control = client(&n1).await;
    until("it is noticed", async || split_says(&mut control, "phase").await == "needs-operator").await;
    writes_are_held(&n1).await;
    for (wrong, answer) in [
        ("SPLIT RESOLVE split-other KEEP", "no split split-other is known here"),
        (&format!("SPLIT RESOLVE {transfer} TAKE"), "syntax error"),
        ("SPLIT RESOLVE", "wrong number of arguments for 'split|resolve'"),
    ] {
        let refused = call(&mut control, wrong).await;
        assert!(refused.starts_with("-ERR") && refused.contains(answer), "{wrong}: {refused}");
    }
    assert_eq!(call(&mut control, &format!("SPLIT RESOLVE {transfer} KEEP")).await, "OK");
    assert_eq!(split_says(&mut control, "phase").await, "undone");
    // The write that had waited was done, by the client that had gone or not at all.
    call(&mut control, &format!("SET key:2 {:0100}", 2)).await;
    check(&[&n1], 20_000).await;
    n1.kill().await.unwrap();
    n1.restart().await.unwrap();
    check(&[&n1], 20_000).await;
    assert_eq!(split_says(&mut client(&n1).await, "phase").await, "", "nothing is left of it");
    n1.stop().await.unwrap();
    let (store, _) = open(dir.path(), "n1");
    let kept = store.adopt(Vec::new()).await.unwrap().of(8192).unwrap().epoch;
    assert_eq!(kept, 2 + RECLAIM_STEP, "above whoever may have the slots from the lost node");
    store.close();
}

#[tokio::test]
async fn the_operator_can_give_what_the_target_has() {
    let dir = tempfile::tempdir().unwrap();
    let n2 = start("n2", dir.path(), "8192-16383").await;
    let mut n1 = start("n1", dir.path(), "0-16383").await;
    as_if_begun(dir.path(), &mut n1, &n2, vec![7; 16]).await;
    n1.restart().await.unwrap();
    let mut control = client(&n1).await;
    until("it is noticed", async || split_says(&mut control, "phase").await == "needs-operator").await;
    assert_eq!(call(&mut control, "SPLIT RESOLVE split-begun GIVE").await, "OK");
    assert_eq!(split_says(&mut control, "phase").await, "done");
    let moved = format!("-MOVED 10850 {}", n2.addresses().resp);
    assert_eq!(call(&mut control, "GET key:2").await, moved);
    n1.kill().await.unwrap();
    n1.restart().await.unwrap();
    assert_eq!(call(&mut client(&n1).await, "GET key:2").await, moved);
}

#[tokio::test]
async fn a_split_to_a_node_that_is_not_there_is_not_begun() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = start("n1", dir.path(), "0-16383").await;
    let n2 = start("n2", dir.path(), "none").await;
    let mut control = client(&n1).await;
    let nobody = call(&mut control, "SPLIT 8192 n2 127.0.0.1:1 127.0.0.1:2").await;
    assert!(nobody.starts_with("-ERR node n2 cannot be asked at 127.0.0.1:1"), "{nobody}");
    let other = split_command(&n2, None).replacen("n2", "n3", 1);
    let other = call(&mut control, &other).await;
    assert!(other.starts_with("-ERR node n2 answers at") && other.ends_with("not n3"), "{other}");
    assert_eq!(call(&mut control, "SPLIT LIST").await, "[]");
    assert_eq!(call(&mut control, "SET key:2 free").await, "OK");
}

#[test]
fn the_demo_succeeds() {
    let output = std::process::Command::new(program()).args(["demo", "--keys", "5000"]).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    assert!(out.contains("killed n2 (SIGKILL)") && out.contains("every key is where it belongs"), "{out}");
    let lost = out.lines().find(|line| line.contains("acknowledged writes lost")).unwrap();
    assert!(lost.split_whitespace().any(|word| word == "0"), "{lost}");
    for said in ["longest freeze", "p50, slots that move", "p99, slots that stay"] {
        assert!(out.contains(said), "{said} is missing: {out}");
    }
}

/// Installs a snapshot of the shard at the store in `directory` that is newer than any.
async fn install_the_newest(directory: &Path, shard: &str) {
    let spec = TransferSpec {
        transfer_id: TransferId::new("newest").unwrap(),
        source_shard: ShardId::new("s1").unwrap(),
        target_shard: ShardId::new(shard).unwrap(),
        source_node: NodeId::new("n1").unwrap(),
        slots: "8192-16383".parse().unwrap(),
        point: SnapshotPoint { term: u64::MAX, index: u64::MAX },
        content_version: String::new(),
    };
    let empty = ManifestFile { name: FileName::new("a").unwrap(), size: Some(0), blake3: None };
    let plan = TransferPlan { spec, manifest: Manifest::new(vec![empty]).unwrap() };
    let store = FileSnapshotStore::open(directory, FileStoreOptions::default()).unwrap();
    store.recover().await.unwrap();
    let staging = store.stage(&plan).await.unwrap();
    staging.seal(&[FileTotal { size: 0, crc: 0 }]).await.unwrap();
    staging.place().await.unwrap();
    staging.activate().await.unwrap();
    staging.remove().await.unwrap();
}

/// What no repetition gets past gives the slots back by itself: the target, which owns none of them, says so.
#[tokio::test]
async fn a_split_that_its_target_refuses_for_good_is_undone() {
    for damaged in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let n1 = start("n1", dir.path(), "0-16383").await;
        let mut n2 = start("n2", dir.path(), "none").await;
        n2.kill().await.unwrap();
        let (snapshots, shard) = (dir.path().join("n2/snapshots"), "slots-8192-16383-n1");
        if damaged {
            std::fs::create_dir(snapshots.join("shards").join(shard)).unwrap();
            std::fs::write(snapshots.join("shards").join(shard).join("CURRENT"), "damaged").unwrap();
        } else {
            install_the_newest(&snapshots, shard).await;
        }
        n2.restart().await.unwrap();
        let mut control = client(&n1).await;
        let begun = call(&mut control, &split_command(&n2, None)).await;
        assert!(begun.starts_with("split-8192-16383-"), "{begun}");
        until("it is undone", async || split_says(&mut control, "phase").await == "undone").await;
        let error = split_says(&mut control, "error").await;
        let why = if damaged { "record of shard slots-8192-16383-n1 is damaged" } else { "a newer snapshot" };
        assert!(error.contains(why), "{error}");
        // Slot 12182.
        assert_eq!(call(&mut control, "SET foo bar").await, "OK");
    }
}

//! Nodes as real processes: killed, restarted, split.

#![allow(clippy::unwrap_used)]

#[allow(dead_code, unreachable_pub)]
mod support;

use std::time::Duration;

use node::demo::load_gen::{LoadGenerator, judge};
use node::demo::processes::NodeProcess;
use support::{call, client, program, show, start, until};

/// What a split's status says under `name`.
async fn split_says(client: &mut node::demo::client::Client, name: &str) -> String {
    let reply = client.call(&["SPLIT", "LIST"]).await.unwrap();
    let redis_protocol::resp2::types::BytesFrame::Array(splits) = reply else { panic!("{reply:?}") };
    splits.first().and_then(|split| node::demo::client::field(split, name)).map(show).unwrap_or_default()
}

fn split_command(target: &NodeProcess, rate: Option<u64>) -> String {
    let addresses = target.addresses();
    let rate = rate.map(|rate| format!(" RATE {rate}")).unwrap_or_default();
    format!("SPLIT 8192 {} {} {}{rate}", target.id(), addresses.grpc, addresses.resp)
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

#[test]
fn the_demo_succeeds() {
    let output = std::process::Command::new(program()).args(["demo", "--keys", "5000"]).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    assert!(out.contains("killed n2 (SIGKILL)") && out.contains("every key is where it belongs"), "{out}");
}

//! What the tests with real processes share.

pub mod checker;
pub mod crash;
pub mod disk;
pub mod load;
pub mod migration;
pub mod proxy;
pub mod truth;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use node::demo::client::{Client, field};
use node::demo::processes::NodeProcess;
use redis_protocol::resp2::types::BytesFrame;

/// The binary under test.
pub fn program() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_node"))
}

/// A node on free ports.
pub async fn start(id: &str, directory: &Path, slots: &str) -> NodeProcess {
    NodeProcess::start(&program(), id, directory, slots).await.unwrap()
}

/// A connection to a node.
pub async fn client(node: &NodeProcess) -> Client {
    Client::connect(&node.addresses().resp).await.unwrap()
}

/// A reply as a line of text, in the manner of redis-cli.
pub fn show(frame: &BytesFrame) -> String {
    match frame {
        BytesFrame::SimpleString(text) | BytesFrame::BulkString(text) => {
            String::from_utf8_lossy(text).into_owned()
        }
        BytesFrame::Error(text) => format!("-{text}"),
        BytesFrame::Integer(number) => format!(":{number}"),
        BytesFrame::Null => "nil".into(),
        BytesFrame::Array(items) => {
            format!("[{}]", items.iter().map(show).collect::<Vec<_>>().join(" "))
        }
    }
}

/// Sends a command, whose arguments are separated by spaces, and shows the reply.
pub async fn call(client: &mut Client, command: &str) -> String {
    let arguments: Vec<&str> = command.split(' ').collect();
    show(&client.call(&arguments).await.unwrap())
}

/// What the status of a node's first split says under `name`.
pub async fn split_says(client: &mut Client, name: &str) -> String {
    let reply = client.call(&["SPLIT", "LIST"]).await.unwrap();
    let BytesFrame::Array(splits) = reply else { panic!("{reply:?}") };
    splits.first().and_then(|split| field(split, name)).map(show).unwrap_or_default()
}

/// Writes `count` keys of 100 bytes each.
pub async fn load(node: &NodeProcess, count: usize) {
    fill(node, count, 100).await;
}

/// Writes `count` keys of `bytes` bytes each.
pub async fn fill(node: &NodeProcess, count: usize, bytes: usize) {
    let mut client = client(node).await;
    for n in 0..count {
        client.push(&["SET".to_owned(), format!("key:{n}"), format!("{n:0bytes$}")]).unwrap();
    }
    client.send().await.unwrap();
    for _ in 0..count {
        assert_eq!(show(&client.reply().await.unwrap()), "OK");
    }
}

/// Asks again until `wanted` holds.
pub async fn until(what: &str, mut wanted: impl AsyncFnMut() -> bool) {
    let since = Instant::now();
    while !wanted().await {
        assert!(since.elapsed() < Duration::from_secs(60), "not within a minute: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Runs all cases, a few at the same time.
pub async fn at_once(cases: impl IntoIterator<Item = impl Future<Output = ()>>) {
    const AT_ONCE: usize = 3;
    futures::stream::iter(cases).buffer_unordered(AT_ONCE).collect::<Vec<()>>().await;
}

//! A real node in this process, and `nodectl` in processes of its own.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

pub(crate) mod script;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use proto::common::access::Access;
use proto::common::ids::NodeId;
use proto::common::tuning::tune_server;
use proto::node::{Direction, TransferProgress};
use proto::snapshot::store::{FileSnapshotStore, FileStoreOptions, StoreError};
use proto::snapshot::{SnapshotReceiver, limits::Limits};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader, Lines};
use tokio::net::{TcpListener, TcpSocket};
use tokio::process::{Child, ChildStdout, Command};
use tokio::runtime::{Builder, Runtime};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::server::Router;

/// Nothing here takes as long when it works.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// A node that takes snapshots, in a runtime of its own: it ends as abruptly as a process.
pub(crate) struct Node {
    pub(crate) address: SocketAddr,
    pub(crate) receiver: SnapshotReceiver<FileSnapshotStore>,
    runtime: Option<Runtime>,
}

impl Node {
    /// Node `n1` with its data in `dir`, on a free port.
    pub(crate) async fn start(dir: &Path) -> Self {
        Self::start_on(dir, refusing_port().0).await
    }

    /// The same on a port that is bound already.
    pub(crate) async fn start_on(dir: &Path, port: TcpSocket) -> Self {
        Self::start_by(dir, port, Access::default(), |listener, server| async move {
            server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        })
        .await
    }

    /// The same for those whom `access` lets in, as `serve` serves.
    pub(crate) async fn start_by<F: Future<Output = ()> + Send + 'static>(
        dir: &Path,
        port: TcpSocket,
        access: Access,
        serve: impl FnOnce(TcpListener, Router) -> F + Send + 'static,
    ) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let dir = dir.to_owned();
        let starting = runtime.spawn(async move {
            let store = loop {
                match FileSnapshotStore::open(&dir, FileStoreOptions::default()) {
                    Ok(store) => break store,
                    // The node before is still going away.
                    Err(StoreError::Io { source, .. }) if source.kind() == ErrorKind::WouldBlock => {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    Err(error) => panic!("{error}"),
                }
            };
            let mut limits = Limits::default();
            limits.unsynced_time = Duration::from_millis(50);
            let builder = SnapshotReceiver::builder(&NodeId::new("n1").unwrap(), store);
            let receiver = builder.limits(limits).access(access).start().await.unwrap();
            let listener = port.listen(64).unwrap();
            let address = listener.local_addr().unwrap();
            let service = receiver.clone().into_service();
            tokio::spawn(serve(
                listener,
                tune_server(tonic::transport::Server::builder()).add_service(service),
            ));
            (address, receiver)
        });
        let (address, receiver) = tokio::time::timeout(LIMIT, starting).await.expect("no node").unwrap();
        Self { address, receiver, runtime: Some(runtime) }
    }

    /// What the node says of a transfer that it receives.
    pub(crate) fn incoming(&self, id: &str) -> Option<TransferProgress> {
        self.receiver.transfers().registry().get(Some(Direction::In), id)
    }

    /// Bytes of it that are durable.
    pub(crate) fn durable(&self, id: &str) -> u64 {
        self.incoming(id).and_then(|transfer| transfer.progress).map_or(0, |progress| progress.bytes_done)
    }

    /// Ends it: connections break, and what is durable stays. Returns its port, which refuses connections.
    pub(crate) fn kill(self) -> TcpSocket {
        let address = self.address;
        drop(self);
        let port = TcpSocket::new_v4().unwrap();
        port.set_reuseaddr(true).unwrap();
        loop {
            match port.bind(address) {
                Ok(()) => return port,
                Err(error) if error.kind() == ErrorKind::AddrInUse => std::thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A port that refuses connections until it is listened on; nobody else can take it.
pub(crate) fn refusing_port() -> (TcpSocket, SocketAddr) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// How `nodectl` ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// Its lines as JSON documents.
    pub(crate) fn documents(&self) -> Vec<Value> {
        self.stdout
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{self:?}")))
            .collect()
    }

    /// The last of them.
    pub(crate) fn last(&self) -> Value {
        self.documents().pop().unwrap_or_else(|| panic!("{self:?}"))
    }

    /// No code that a terminal would obey.
    pub(crate) fn assert_plain(&self) {
        let odd = |c: char| c.is_control() && c != '\n' && c != '\t';
        assert!(!self.stdout.contains(odd) && !self.stderr.contains(odd), "{self:?}");
    }
}

fn command(args: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nodectl"));
    command.args(args.split_whitespace()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env_remove("CLICOLOR_FORCE").kill_on_drop(true);
    command
}

/// Runs `nodectl` with arguments that have no spaces in them.
pub(crate) async fn nodectl(args: &str) -> Ended {
    let output = tokio::time::timeout(LIMIT, command(args).output()).await;
    let output = output.unwrap_or_else(|_| panic!("nodectl {args} does not end")).unwrap();
    Ended {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A `nodectl` that runs.
pub(crate) struct Running {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    read: String,
}

impl Running {
    pub(crate) fn start(args: &str) -> Self {
        let mut child = command(args).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines, read: String::new() }
    }

    /// Reads until a line has `text` in it.
    pub(crate) async fn says(&mut self, text: &str) -> String {
        let reading = async {
            loop {
                let line = self.lines.next_line().await.unwrap();
                let Some(line) = line else { panic!("ended without {text}: {}", self.read) };
                self.read.push_str(&line);
                self.read.push('\n');
                if line.contains(text) {
                    return line;
                }
            }
        };
        tokio::time::timeout(LIMIT, reading).await.unwrap_or_else(|_| panic!("never says {text}"))
    }

    /// Sends it a signal.
    #[cfg(unix)]
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = i32::try_from(self.child.id().expect("it has ended")).unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal).unwrap();
    }

    pub(crate) async fn ended(mut self) -> Ended {
        let ending = async {
            let mut stderr = String::new();
            self.child.stderr.take().unwrap().read_to_string(&mut stderr).await.unwrap();
            while let Some(line) = self.lines.next_line().await.unwrap() {
                self.read.push_str(&line);
                self.read.push('\n');
            }
            Ended { code: self.child.wait().await.unwrap().code(), stdout: self.read, stderr }
        };
        tokio::time::timeout(LIMIT, ending).await.expect("nodectl does not end")
    }
}

/// Waits for a condition that something else brings about.
pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// Files below a new directory `snapshot`: an empty one, a nested one and one of `size` bytes. Returns the size of all.
pub(crate) fn snapshot(dir: &Path, size: usize) -> (String, u64) {
    let root = dir.join("snapshot");
    std::fs::create_dir_all(root.join("a/b")).unwrap();
    std::fs::write(root.join("empty"), []).unwrap();
    std::fs::write(root.join("a/b/small"), b"small").unwrap();
    let big: Vec<u8> =
        (0..size as u64).map(|n| (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect();
    std::fs::write(root.join("a/big"), big).unwrap();
    (root.to_str().unwrap().to_owned(), size as u64 + 5)
}

/// All files below `dir`, by name.
pub(crate) fn tree(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(next) = pending.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
                files.insert(name, std::fs::read(path).unwrap());
            }
        }
    }
    files
}

/// What is installed for shard `s2`.
pub(crate) async fn installed(node: &Node) -> BTreeMap<String, Vec<u8>> {
    let shard = proto::common::ids::ShardId::new("s2").unwrap();
    let current = node.receiver.store().current(&shard).await.unwrap().expect("nothing is installed");
    tree(&current.path.unwrap())
}

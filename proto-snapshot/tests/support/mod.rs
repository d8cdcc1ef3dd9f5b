//! What the integration tests share: trees of files, a receiver on a loopback port, a proxy that counts and cuts.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test binary uses a part of it")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proto_common::ids::{NodeId, ShardId, TransferId};
use proto_common::slots::SlotRange;
use proto_common::tuning::tune_server;
use proto_common::v1::Priority;
use proto_snapshot::SnapshotReceiver;
use proto_snapshot::limits::Limits;
use proto_snapshot::receiver::SnapshotReceiverBuilder;
use proto_snapshot::sender::SnapshotToSend;
use proto_snapshot::spec::SnapshotPoint;
use proto_snapshot::store::{FileSnapshotStore, FileStoreOptions, SnapshotStore};
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub const LONG: Duration = Duration::from_secs(60);

/// Files of mixed sizes, nested and empty ones among them.
pub fn make_tree(root: &Path, files: usize, largest: usize, seed: u64) {
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    for number in 0..files {
        let dir = root.join(["", "a", "a/b", "c/d/e"][number % 4]);
        std::fs::create_dir_all(&dir).unwrap();
        let size = match number {
            0 => largest,
            1 => 0,
            _ => rng.random_range(0..largest / files.max(1) + 1),
        };
        let mut content = vec![0; size];
        rng.fill_bytes(&mut content);
        std::fs::write(dir.join(format!("file-{number:05}")), content).unwrap();
    }
}

/// Every file below `root`, by name, with its BLAKE3.
pub fn read_tree(root: &Path) -> BTreeMap<String, [u8; 32]> {
    fn walk(root: &Path, dir: &Path, found: &mut BTreeMap<String, [u8; 32]>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, found);
            } else {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                found.insert(name, blake3::hash(&std::fs::read(&path).unwrap()).into());
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(root, root, &mut found);
    found
}

/// Bytes of all files below `root`.
pub fn tree_bytes(root: &Path) -> u64 {
    std::fs::read_dir(root)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            if path.is_dir() { tree_bytes(&path) } else { path.metadata().unwrap().len() }
        })
        .sum()
}

/// Where the store puts the current snapshot of shard `s2` that came as `id`.
pub fn installed_dir(store: &Path, id: &str) -> PathBuf {
    store.join("installed").join("s2").join(id)
}

/// Open descriptors of this process below `dir`.
#[cfg(target_os = "linux")]
pub fn open_below(dir: &Path) -> usize {
    let open = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(Result::ok);
    open.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|at| at.starts_with(dir))).count()
}

/// Whether nothing of any transfer is staged.
pub fn staging_is_empty(store: &Path) -> bool {
    std::fs::read_dir(store.join("staging")).map_or(true, |mut entries| entries.next().is_none())
}

pub fn snapshot(id: &str) -> SnapshotToSend {
    SnapshotToSend {
        transfer_id: TransferId::new(id).unwrap(),
        source_shard: ShardId::new("s1").unwrap(),
        target_shard: ShardId::new("s2").unwrap(),
        source_node: NodeId::new("n1").unwrap(),
        target_node: None,
        slots: SlotRange::new(8192, 16384).unwrap(),
        point: SnapshotPoint { term: 1, index: 1 },
        fence: None,
        priority: Priority::Split,
    }
}

pub type Builder = SnapshotReceiverBuilder<FileSnapshotStore>;

pub fn builder(dir: &Path) -> Builder {
    builder_with(dir, FileStoreOptions::default())
}

pub fn builder_with(dir: &Path, options: FileStoreOptions) -> Builder {
    let store = FileSnapshotStore::open(dir, options).unwrap();
    SnapshotReceiver::builder(&NodeId::new("n2").unwrap(), store)
}

/// A receiver behind a port.
pub struct Server<S: SnapshotStore = FileSnapshotStore> {
    pub address: SocketAddr,
    pub receiver: SnapshotReceiver<S>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl<S: SnapshotStore> Server<S> {
    pub async fn start(builder: SnapshotReceiverBuilder<S>) -> Self {
        Self::start_on(builder, "127.0.0.1:0").await
    }

    pub async fn start_on(builder: SnapshotReceiverBuilder<S>, address: &str) -> Self {
        let receiver = builder.start().await.unwrap();
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, mut stopped) = watch::channel(false);
        let service = receiver.clone().into_service();
        let task = tokio::spawn(async move {
            tune_server(tonic::transport::Server::builder())
                .add_service(service)
                .serve_with_incoming_shutdown(
                    tokio_stream::wrappers::TcpListenerStream::new(listener),
                    async move {
                        let _ = stopped.wait_for(|stop| *stop).await;
                    },
                )
                .await
                .unwrap();
        });
        Self { address, receiver, stop, task }
    }

    pub fn uri(&self) -> String {
        self.address.to_string()
    }

    pub async fn stop(self) {
        let Self { receiver, stop, task, .. } = self;
        tokio::time::timeout(LONG, receiver.shutdown()).await.expect("the receiver stops");
        drop(receiver);
        stop.send_replace(true);
        tokio::time::timeout(LONG, task).await.expect("the server stops").unwrap();
    }
}

/// Small limits, so that a test sees many syncs, acks and pages of credit.
pub fn small_limits() -> Limits {
    let mut limits = Limits::default();
    limits.chunk_bytes = 64 << 10;
    limits.stream_credit_bytes = 512 << 10;
    limits.unsynced_bytes = 1 << 20;
    limits.unsynced_time = Duration::from_millis(50);
    limits
}

/// Forwards to a port that may change, counts what goes there, and cuts when told.
pub struct Proxy {
    pub address: SocketAddr,
    pub to_server: Arc<AtomicU64>,
    pub accepted: Arc<AtomicU64>,
    cut: watch::Sender<u64>,
    task: JoinHandle<()>,
}

impl Proxy {
    pub async fn start(target: watch::Receiver<Option<SocketAddr>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let to_server = Arc::new(AtomicU64::new(0));
        let accepted = Arc::new(AtomicU64::new(0));
        let (cut, cuts) = watch::channel(0_u64);
        let (count, connections) = (Arc::clone(&to_server), Arc::clone(&accepted));
        let task = tokio::spawn(async move {
            let mut tasks = tokio::task::JoinSet::new();
            loop {
                let Ok((client, _)) = listener.accept().await else { return };
                connections.fetch_add(1, Ordering::SeqCst);
                let Some(target) = *target.borrow() else { continue };
                let (count, mut cuts) = (Arc::clone(&count), cuts.clone());
                cuts.mark_unchanged();
                tasks.spawn(async move {
                    let Ok(server) = TcpStream::connect(target).await else { return };
                    let (mut from_client, mut to_client) = client.into_split();
                    let (mut from_server, mut to_server) = server.into_split();
                    let forward = async {
                        let mut buffer = vec![0; 64 << 10];
                        loop {
                            match from_client.read(&mut buffer).await {
                                Ok(read) if read > 0 => {
                                    count.fetch_add(read as u64, Ordering::SeqCst);
                                    if to_server.write_all(&buffer[..read]).await.is_err() {
                                        return;
                                    }
                                }
                                _ => return,
                            }
                        }
                    };
                    tokio::select! {
                        () = forward => {}
                        _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
                        _ = cuts.changed() => {}
                    }
                });
            }
        });
        Self { address, to_server, accepted, cut, task }
    }

    pub async fn to(address: SocketAddr) -> Self {
        let (sender, target) = watch::channel(Some(address));
        let proxy = Self::start(target).await;
        drop(sender);
        proxy
    }

    pub fn sent(&self) -> u64 {
        self.to_server.load(Ordering::SeqCst)
    }

    /// Breaks every connection.
    pub fn cut(&self) {
        self.cut.send_modify(|count| *count += 1);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Waits until `condition` holds.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(LONG, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("timed out waiting until {what}"));
}

//! What is measured: sender and receiver of this crate, as a user gets them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use proto_common::ids::{NodeId, ShardId, TransferId};
use proto_common::slots::SlotRange;
use proto_common::tuning::{incoming, listen, tune_server};
use proto_common::v1::Priority;
use proto_snapshot::SnapshotReceiver;
use proto_snapshot::limits::Limits;
use proto_snapshot::sender::{SenderOptions, SnapshotSender, SnapshotToSend};
use proto_snapshot::source::{DirectorySource, FileSource};
use proto_snapshot::spec::SnapshotPoint;
use proto_snapshot::store::{FileSnapshotStore, FileStoreOptions, SnapshotStore};
use tonic::transport::Server;

use crate::cases::OUR_CHUNK;
use crate::memory::{DiscardStore, MemorySource};
use crate::payload::Payload;
use crate::side::{Before, Sent, Side, report_when_asked};

/// Listens, with whatever store it is.
pub async fn receive(side: &Side) {
    match &side.path {
        None => serve(DiscardStore::default(), side.chunk).await,
        Some(dir) => {
            let store = FileSnapshotStore::open(dir, FileStoreOptions::default()).unwrap();
            serve(store, side.chunk).await;
        }
    }
}

async fn serve<S: SnapshotStore>(store: S, chunk: usize) {
    let mut limits = Limits::default();
    // But for the sweep, as by default: a sender makes no larger ones.
    if chunk != OUR_CHUNK {
        limits.chunk_bytes = u32::try_from(chunk).unwrap();
    }
    let receiver = SnapshotReceiver::builder(&NodeId::new("n2").unwrap(), store).limits(limits);
    let receiver = receiver.start().await.unwrap();
    let listener = listen(([127, 0, 0, 1], 0).into()).unwrap();
    let address = listener.local_addr().unwrap();
    let server = tune_server(Server::builder()).add_service(receiver.into_service());
    tokio::spawn(server.serve_with_incoming(incoming(listener)));
    tokio::task::spawn_blocking(move || report_when_asked(address)).await.unwrap();
}

pub fn snapshot(id: &str) -> SnapshotToSend {
    SnapshotToSend {
        transfer_id: TransferId::new(id).unwrap(),
        source_shard: ShardId::new("s1").unwrap(),
        target_shard: ShardId::new(id).unwrap(),
        source_node: NodeId::new("n1").unwrap(),
        target_node: None,
        slots: SlotRange::new(8192, 16384).unwrap(),
        point: SnapshotPoint { term: 1, index: 1 },
        fence: None,
        priority: Priority::Split,
    }
}

pub async fn send(side: &Side, address: &str) -> Sent {
    let payload = Payload::new();
    let before = Before::now();
    let began = Instant::now();
    let mut options = SenderOptions::default();
    options.lanes = side.lanes;
    let sender = SnapshotSender::connect(address).unwrap().options(options);
    let snapshot = snapshot("t1");
    let mut handle = match &side.path {
        None => sender.send(snapshot, MemorySource::new(payload, side.bytes, side.files)),
        Some(path) if path.is_dir() => sender.send(snapshot, DirectorySource::new(path)),
        Some(path) => sender.send(snapshot, FileSource::new(path)),
    }
    .unwrap();
    let installed = handle.join().await.unwrap();
    assert_eq!((installed.total_bytes, installed.file_count), (side.bytes, side.files), "all is installed");
    Sent { seconds: began.elapsed().as_secs_f64(), usage: before.usage() }
}

/// Sends up to `position`, and returns when that is durable. Whoever waits kills the process then.
pub async fn send_a_part(side: &Side, address: &str, position: u64) {
    let source = MemorySource::new(Payload::new(), side.bytes, side.files).stop_at(position);
    let sender = SnapshotSender::connect(address).unwrap();
    let handle = sender.send(snapshot("t1"), source).unwrap();
    loop {
        let progress = handle.progress().and_then(|transfer| transfer.progress);
        // The last chunk may reach beyond it.
        if progress.is_some_and(|progress| progress.bytes_done + (side.chunk as u64) > position) {
            std::mem::forget(handle);
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Goes on after [`send_a_part`]; the time from the call to the first byte that was not sent before.
pub async fn resume(side: &Side, address: &str, position: u64) -> Duration {
    // Nothing from there on had been durable.
    let source = MemorySource::new(Payload::new(), side.bytes, side.files);
    let (source, watched) = source.watch_from(position - position % side.chunk as u64);
    let began = Instant::now();
    let sender = SnapshotSender::connect(address).unwrap();
    let mut handle = sender.send(snapshot("t1"), source).unwrap();
    let first = loop {
        if let Some(first) = watched.first() {
            break first - began;
        }
        tokio::time::sleep(Duration::from_micros(200)).await;
    };
    handle.join().await.unwrap();
    first
}

/// Many transfers at once.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub struct Crowd {
    pub sent: Sent,
    /// Bytes of each that had been handed to the connection when half of all had, or all of one.
    pub bytes: Vec<u64>,
}

/// Sends `transfers` snapshots of `side.bytes` each at the same time.
pub async fn crowd(side: &Side, address: &str, transfers: usize) -> Crowd {
    let payload = Payload::new();
    let before = Before::now();
    let began = Instant::now();
    let sender = Arc::new(SnapshotSender::connect(address).unwrap());
    let (handles, given): (Vec<_>, Vec<_>) = (0..transfers)
        .map(|number| {
            let source = MemorySource::new(payload.clone(), side.bytes, side.files);
            let given = source.given();
            // Each of a node of its own: from one, a receiver takes fewer at a time.
            let source_node = NodeId::new(format!("n1-{number}")).unwrap();
            let snapshot = SnapshotToSend { source_node, ..snapshot(&format!("t{number}")) };
            (sender.send(snapshot, source).unwrap(), given)
        })
        .unzip();
    // When half of all has moved, or one has ended.
    let bytes = loop {
        let sent: Vec<u64> = given.iter().map(|given| given.load(Ordering::Relaxed)).collect();
        let half = sent.iter().sum::<u64>() >= side.bytes / 2 * transfers as u64;
        if half || sent.iter().any(|sent| *sent >= side.bytes) {
            break sent;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    for mut handle in handles {
        handle.join().await.unwrap();
    }
    Crowd { sent: Sent { seconds: began.elapsed().as_secs_f64(), usage: before.usage() }, bytes }
}

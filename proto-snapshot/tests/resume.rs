//! Resuming where it is hard: sources of unknown length, staged data that the disk has damaged.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

#[path = "support/slow.rs"]
mod slow;
mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use proto_common::ids::NodeId;
use proto_common::path::FileName;
use proto_common::v1::Direction;
use proto_snapshot::SnapshotReceiver;
use proto_snapshot::sender::{SenderOptions, SnapshotSender, TransferHandle};
use proto_snapshot::source::{DirectorySource, SnapshotSource, StreamSource};
use proto_snapshot::store::{FileSnapshotStore, FileStoreOptions};
use proto_snapshot::v1::TransferPhase;
use rand::{Rng as _, SeedableRng as _};
use slow::{Brake, SlowStore};
use support::*;

const SIZE: usize = 12 << 20;

fn content(seed: u64) -> Bytes {
    let mut content = vec![0; SIZE];
    rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut content);
    content.into()
}

/// Pieces of an odd length, so that they fit no chunk.
fn pieces(
    content: &Bytes,
    offset: u64,
) -> impl futures::Stream<Item = std::io::Result<Bytes>> + Send + 'static + use<> {
    let rest = content.slice(usize::try_from(offset).unwrap()..);
    futures::stream::iter((0..rest.len().div_ceil(70_001)).map(move |number| {
        let start = number * 70_001;
        Ok(rest.slice(start..(start + 70_001).min(rest.len())))
    }))
}

fn send<S: SnapshotSource>(address: &str, id: &str, source: S) -> TransferHandle {
    let mut options = SenderOptions::default();
    options.backoff.initial = Duration::from_millis(5);
    options.backoff.max = Duration::from_millis(50);
    options.bytes_per_second = std::num::NonZeroU64::new(16 << 20);
    SnapshotSender::connect(address).unwrap().options(options).send(snapshot(id), source).unwrap()
}

async fn cut_at_durable(server: &Server, proxy: &Proxy, id: &str, bytes: u64) {
    let registry = server.receiver.transfers().registry().clone();
    let durable = || {
        let shown = registry.get(Some(Direction::In), id);
        shown.and_then(|shown| shown.progress).map_or(0, |progress| progress.bytes_done)
    };
    until("enough is durable", || durable() >= bytes).await;
    proxy.cut();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_unknown_length_that_can_seek_goes_on_where_it_was() {
    let target = tempfile::tempdir().unwrap();
    let server = Server::start(builder(target.path()).limits(small_limits())).await;
    let proxy = Proxy::to(server.address).await;
    let content = content(1);
    let opened = Arc::new(Mutex::new(Vec::new()));
    let (bytes, offsets) = (content.clone(), Arc::clone(&opened));
    let source = StreamSource::new(FileName::new("dump").unwrap(), "v1", move |offset| {
        offsets.lock().unwrap().push(offset);
        let stream = pieces(&bytes, offset);
        async move { Ok(stream) }
    })
    .seekable();
    let mut handle = send(&proxy.address.to_string(), "seek", source);
    cut_at_durable(&server, &proxy, "seek", 4 << 20).await;
    let installed = handle.join().await.unwrap();
    assert_eq!(installed.total_bytes, SIZE as u64);
    assert!(opened.lock().unwrap().iter().any(|offset| *offset >= 4 << 20), "it went on, {opened:?}");
    assert_eq!(handle.progress().unwrap().attempt, 1);
    assert_eq!(std::fs::read(installed_dir(target.path(), "seek").join("dump")).unwrap(), content);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_cannot_seek_starts_anew_under_the_next_attempt() {
    let target = tempfile::tempdir().unwrap();
    let server = Server::start(builder(target.path()).limits(small_limits())).await;
    let proxy = Proxy::to(server.address).await;
    // Other bytes each time, as a dump of a running system has.
    let opened = Arc::new(Mutex::new(0_u64));
    let count = Arc::clone(&opened);
    let source = StreamSource::new(FileName::new("dump").unwrap(), "v1", move |offset| {
        assert_eq!(offset, 0);
        let mut opened = count.lock().unwrap();
        *opened += 1;
        let stream = pieces(&content(*opened), 0).boxed();
        async move { Ok(stream) }
    });
    let mut handle = send(&proxy.address.to_string(), "anew", source);
    cut_at_durable(&server, &proxy, "anew", 4 << 20).await;
    handle.join().await.unwrap();
    let times = *opened.lock().unwrap();
    assert!(times >= 2, "it was opened again");
    assert!(handle.progress().unwrap().attempt >= 2);
    assert_eq!(std::fs::read(installed_dir(target.path(), "anew").join("dump")).unwrap(), content(times));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_stream_is_an_empty_file() {
    let target = tempfile::tempdir().unwrap();
    let server = Server::start(builder(target.path())).await;
    let source = StreamSource::new(FileName::new("none").unwrap(), "v1", |_| async {
        Ok(futures::stream::empty::<std::io::Result<Bytes>>())
    });
    let mut handle = send(&server.uri(), "empty", source);
    assert_eq!(handle.join().await.unwrap().total_bytes, 0);
    assert_eq!(std::fs::read(installed_dir(target.path(), "empty").join("none")).unwrap(), b"");
    server.stop().await;
}

fn staged_file(store: &Path, id: &str, name: &str) -> PathBuf {
    store.join("staging").join(id).join("tree").join(name)
}

/// Sends a part of `source`, and goes.
async fn send_a_part(server: &Server, id: &str, source: &Path) {
    let handle = send(&server.uri(), id, DirectorySource::new(source));
    let registry = server.receiver.transfers().registry().clone();
    let shown = || registry.get(Some(Direction::In), id);
    let durable = || shown().and_then(|shown| shown.progress).map_or(0, |progress| progress.bytes_done);
    until("a part is durable", || durable() >= 2 << 20).await;
    drop(handle);
    until("it is interrupted", || shown().unwrap().phase() == TransferPhase::Interrupted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn staged_data_that_the_disk_has_damaged_is_sent_again() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 1, 8 << 20, 31);
    let server = Server::start(builder(target.path()).limits(small_limits())).await;
    let address = server.uri();
    send_a_part(&server, "rot", source.path()).await;
    server.stop().await;

    let file = staged_file(target.path(), "rot", "file-00000");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[1 << 20] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    // And when it is found, the store cannot forget it at first.
    let brake = Brake::released();
    brake.resets_fail.store(1, Ordering::SeqCst);
    let store = FileSnapshotStore::open(target.path(), FileStoreOptions::default()).unwrap();
    let store = SlowStore { store, brake: brake.clone() };
    let builder = SnapshotReceiver::builder(&NodeId::new("n2").unwrap(), store).limits(small_limits());
    let server = Server::start_on(builder, &address).await;
    let mut handle = send(&address, "rot", DirectorySource::new(source.path()));
    handle.join().await.unwrap();
    assert_eq!(brake.resets_fail.load(Ordering::SeqCst), 0, "that failed");
    assert!(handle.progress().unwrap().connections >= 2, "the damage was found and the sender came back");
    assert_eq!(read_tree(&installed_dir(target.path(), "rot")), read_tree(source.path()));
    server.stop().await;
}

/// Nothing that their sender did was wrong.
#[tokio::test(flavor = "multi_thread")]
async fn where_the_records_of_two_transfers_were_swapped_both_are_sent_again() {
    let target = tempfile::tempdir().unwrap();
    let sources = [("one", 31), ("two", 32)].map(|(id, seed)| {
        let source = tempfile::tempdir().unwrap();
        make_tree(source.path(), 1, 8 << 20, seed);
        (id, source)
    });
    let server = Server::start(builder(target.path()).limits(small_limits())).await;
    for (id, source) in &sources {
        send_a_part(&server, id, source.path()).await;
    }
    server.stop().await;
    let [one, two] = ["one", "two"].map(|id| target.path().join("staging").join(id).join("records"));
    let (of_one, of_two) = (std::fs::read(&one).unwrap(), std::fs::read(&two).unwrap());
    assert_ne!(of_one, of_two);
    std::fs::write(&one, of_two).unwrap();
    std::fs::write(&two, of_one).unwrap();

    let server = Server::start(builder(target.path()).limits(small_limits())).await;
    let mut connections = 0;
    for (id, source) in &sources {
        let mut handle = send(&server.uri(), id, DirectorySource::new(source.path()));
        handle.join().await.unwrap();
        connections += handle.progress().unwrap().connections;
        assert_eq!(read_tree(&installed_dir(target.path(), id)), read_tree(source.path()));
    }
    // Records of more than the file holds are dropped at the start; those of less are read back.
    assert!(connections > 2, "the damage was found and a sender came back");
    server.stop().await;
}

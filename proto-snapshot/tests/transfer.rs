//! Whole transfers between a real sender and a real receiver over loopback.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proto_common::error::{CommonReason, Error};
use proto_common::fence::Fence;
use proto_common::tuning;
use proto_common::v1::{Direction, NodeIdentity};
use proto_snapshot::hook::{HookFuture, InstallHook};
use proto_snapshot::sender::{SenderOptions, SnapshotSender};
use proto_snapshot::spec::SnapshotPoint;
use proto_snapshot::store::{FileStoreOptions, PlacedSnapshot};
use proto_snapshot::transfers::Transfers;
use proto_snapshot::v1::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto_snapshot::v1::{GetTransferProgressRequest, ListTransfersRequest, TransferPhase};
use proto_snapshot::{DirectorySource, Reason};
use support::*;

fn options(change: impl FnOnce(&mut SenderOptions)) -> SenderOptions {
    let mut options = SenderOptions::default();
    options.backoff.initial = Duration::from_millis(5);
    options.backoff.max = Duration::from_millis(50);
    change(&mut options);
    options
}

fn sender(address: &str) -> SnapshotSender<proto_common::dial::Dial> {
    SnapshotSender::connect(address).unwrap().options(options(|_| {}))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_arrives_and_installing_twice_is_one_install() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 40, 3 << 20, 1);
    let server = Server::start(builder(target.path())).await;
    let mut handle = sender(&server.uri()).send(snapshot("t1"), DirectorySource::new(source.path())).unwrap();
    let installed = handle.join().await.unwrap();
    assert_eq!(installed.total_bytes, tree_bytes(source.path()));
    assert_eq!(installed.file_count, 40);
    assert!(!installed.already_installed);
    assert_eq!(read_tree(&installed_dir(target.path(), "t1")), read_tree(source.path()));
    assert!(staging_is_empty(target.path()));

    let again = sender(&server.uri()).send(snapshot("t1"), DirectorySource::new(source.path())).unwrap();
    let wire = again.progress().unwrap().wire_bytes;
    let mut again = again;
    assert!(again.join().await.unwrap().already_installed);
    assert_eq!(wire, 0);
    assert_eq!(again.progress().unwrap().wire_bytes, 0, "nothing is sent twice");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_history_survives_a_restart_and_a_cancelled_id_stays_cancelled() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 4, 1 << 20, 2);
    let server = Server::start(builder(target.path())).await;
    let mut slow = SnapshotSender::connect(&server.uri())
        .unwrap()
        .options(options(|options| options.bytes_per_second = NonZeroU64::new(64 << 10)))
        .send(snapshot("slow"), DirectorySource::new(source.path()))
        .unwrap();
    let registry = server.receiver.transfers().registry().clone();
    let phase = |id: &str| registry.get(Some(Direction::In), id).map(|transfer| transfer.phase());
    until("it is transferring", || phase("slow") == Some(TransferPhase::Transferring)).await;
    slow.cancel();
    let error = slow.join().await.unwrap_err();
    assert!(error.is(Reason::TransferCancelled), "{error:?}");
    assert_eq!(phase("slow"), Some(TransferPhase::Cancelled));
    assert!(staging_is_empty(target.path()));
    let mut done = sender(&server.uri()).send(snapshot("done"), DirectorySource::new(source.path())).unwrap();
    done.join().await.unwrap();
    server.stop().await;

    let server = Server::start(builder(target.path())).await;
    let registry = server.receiver.transfers().registry().clone();
    let phase = |id: &str| registry.get(Some(Direction::In), id).map(|transfer| transfer.phase());
    assert_eq!(phase("slow"), Some(TransferPhase::Cancelled));
    assert_eq!(phase("done"), Some(TransferPhase::Installed));
    let error = sender(&server.uri())
        .send(snapshot("slow"), DirectorySource::new(source.path()))
        .unwrap()
        .join()
        .await
        .unwrap_err();
    assert!(error.is(Reason::TransferCancelled), "{error:?}");
    assert!(!error.is_retryable());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cuts_at_any_moment_lose_nothing_and_send_little_again() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 30, 24 << 20, 3);
    let size = tree_bytes(source.path());
    let limits = small_limits();
    let window = limits.stream_credit_bytes;
    let server = Server::start(builder(target.path()).limits(limits)).await;
    for lanes in [1, 3] {
        let id = format!("cut-{lanes}");
        let proxy = Proxy::to(server.address).await;
        let mut handle = SnapshotSender::connect(&proxy.address.to_string())
            .unwrap()
            .options(options(|options| {
                options.lanes = lanes;
                options.bytes_per_second = NonZeroU64::new(16 << 20);
            }))
            .send(snapshot(&id), DirectorySource::new(source.path()))
            .unwrap();
        let mut cuts = 0_u64;
        for step in 1..=6 {
            let mark = size / 8 * step;
            until("more was sent", || proxy.sent() >= mark).await;
            if !handle.progress().unwrap().is_finished() {
                proxy.cut();
                cuts += 1;
            }
        }
        handle.join().await.unwrap();
        assert_eq!(cuts, 6, "every cut hit a running transfer");
        assert!(handle.progress().unwrap().connections > 1, "the sender reconnected");
        assert_eq!(read_tree(&installed_dir(target.path(), &id)), read_tree(source.path()));
        // Nothing written is asked for again; what a cut costs is what was on its way: credit, and the buffers of
        // HTTP/2, the sockets and the proxy.
        let on_its_way = u64::from(lanes) * (window + (1 << 20)) + (4 << 20);
        let limit = size + size / 20 + cuts * on_its_way;
        assert!(proxy.sent() <= limit, "{} bytes were sent, at most {limit} may be", proxy.sent());
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_senders_of_one_id_do_not_fight() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 3, 2 << 20, 4);
    let server = Server::start(builder(target.path()).limits(small_limits())).await;
    let slow = |rate| {
        SnapshotSender::connect(&server.uri())
            .unwrap()
            .options(options(|options| options.bytes_per_second = NonZeroU64::new(rate)))
    };
    let mut first = slow(128 << 10).send(snapshot("one"), DirectorySource::new(source.path())).unwrap();
    until("the first sends", || first.progress().unwrap().wire_bytes > 0).await;
    let mut second = slow(64 << 20).send(snapshot("one"), DirectorySource::new(source.path())).unwrap();
    let error = first.join().await.unwrap_err();
    assert!(error.is(Reason::Superseded), "{error:?}");
    assert!(!error.is_retryable());
    second.join().await.unwrap();
    assert_eq!(read_tree(&installed_dir(target.path(), "one")), read_tree(source.path()));
    server.stop().await;
}

/// Fails a number of times before it merges.
struct Flaky {
    failures: usize,
    calls: Arc<AtomicUsize>,
    refuse: bool,
}

impl InstallHook for Flaky {
    fn install<'a>(&'a self, snapshot: &'a PlacedSnapshot) -> HookFuture<'a, ()> {
        Box::pin(async move {
            assert!(snapshot.path.as_ref().unwrap().is_dir());
            let call = self.calls.fetch_add(1, Ordering::SeqCst);
            if self.refuse {
                Err(Error::new(CommonReason::InvalidField, "not a snapshot of mine"))
            } else if call < self.failures {
                Err(Error::new(CommonReason::Unavailable, "the database is busy"))
            } else {
                Ok(())
            }
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hook_is_repeated_until_it_succeeds_and_survives_a_restart() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 3, 1 << 20, 5);
    let calls = Arc::new(AtomicUsize::new(0));
    let hook = Flaky { failures: usize::MAX, calls: Arc::clone(&calls), refuse: false };
    let server = Server::start(builder(target.path()).hook(hook)).await;
    let handle = sender(&server.uri()).send(snapshot("hook"), DirectorySource::new(source.path())).unwrap();
    until("the hook has failed twice", || calls.load(Ordering::SeqCst) >= 2).await;
    let shown = server.receiver.transfers().registry().get(Some(Direction::In), "hook").unwrap();
    assert_eq!(shown.phase(), TransferPhase::Installing);
    assert_eq!(shown.progress.unwrap().error.unwrap().message, "the database is busy");
    server.stop().await;
    drop(handle);

    let calls = Arc::new(AtomicUsize::new(0));
    let hook = Flaky { failures: 1, calls: Arc::clone(&calls), refuse: false };
    let server = Server::start(builder(target.path()).hook(hook)).await;
    let registry = server.receiver.transfers().registry().clone();
    until("it is installed without a sender", || {
        registry.get(Some(Direction::In), "hook").unwrap().phase() == TransferPhase::Installed
    })
    .await;
    assert_eq!(calls.load(Ordering::SeqCst), 2);
    assert_eq!(read_tree(&installed_dir(target.path(), "hook")), read_tree(source.path()));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_install_is_final_and_leaves_nothing() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 3, 1 << 20, 6);
    let calls = Arc::new(AtomicUsize::new(0));
    let hook = Flaky { failures: 0, calls: Arc::clone(&calls), refuse: true };
    let server = Server::start(builder(target.path()).hook(hook)).await;
    let mut handle = sender(&server.uri()).send(snapshot("no"), DirectorySource::new(source.path())).unwrap();
    let error = handle.join().await.unwrap_err();
    assert!(error.is(Reason::InstallRefused), "{error:?}");
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    assert!(!installed_dir(target.path(), "no").exists());
    assert!(staging_is_empty(target.path()));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_fences_and_snapshots_are_refused_before_any_data() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 2, 1 << 10, 7);
    let server = Server::start(builder(target.path())).await;
    let send = |id: &str, point: SnapshotPoint, fence: Option<Fence>| {
        let mut what = snapshot(id);
        (what.point, what.fence) = (point, fence);
        sender(&server.uri()).send(what, DirectorySource::new(source.path())).unwrap()
    };
    let new = SnapshotPoint { term: 3, index: 10 };
    send("new", new, Some(Fence { epoch: 5, term: 3 })).join().await.unwrap();
    let old = SnapshotPoint { term: 2, index: 99 };
    let mut stale = send("old", old, None);
    let error = stale.join().await.unwrap_err();
    assert!(error.is(Reason::StaleSnapshot), "{error:?}");
    assert_eq!(error.get("installed_term"), Some("3"));
    assert_eq!(stale.progress().unwrap().wire_bytes, 0);
    let error = send("fenced", new, Some(Fence { epoch: 4, term: 9 })).join().await.unwrap_err();
    assert!(error.is(Reason::StaleFence), "{error:?}");
    assert_eq!(error.get("current_epoch"), Some("5"));
    assert!(staging_is_empty(target.path()));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_with_a_known_digest_are_not_sent() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 12, 2 << 20, 8);
    let server = Server::start(builder(target.path())).await;
    let send = |id: &str| {
        SnapshotSender::connect(&server.uri())
            .unwrap()
            .options(options(|options| options.digests = true))
            .send(snapshot(id), DirectorySource::new(source.path()))
            .unwrap()
    };
    send("base").join().await.unwrap();
    std::fs::write(source.path().join("added"), vec![7; 100_000]).unwrap();
    let mut next = send("next");
    let installed = next.join().await.unwrap();
    assert_eq!(next.progress().unwrap().wire_bytes, 100_000);
    assert_eq!(installed.reused_bytes, tree_bytes(source.path()) - 100_000);
    assert_eq!(read_tree(&installed_dir(target.path(), "next")), read_tree(source.path()));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_without_room_refuses_before_any_data_and_takes_it_once_there_is_room() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 3, 2 << 20, 9);
    let mut small = FileStoreOptions::default();
    small.capacity_bytes = Some(1 << 20);
    let server = Server::start(builder_with(target.path(), small)).await;
    let address = server.uri();
    let mut handle = sender(&address).send(snapshot("big"), DirectorySource::new(source.path())).unwrap();
    let refused = || {
        let error = handle.progress().unwrap().progress.unwrap().error;
        error.is_some_and(|error| error.reason == "INSUFFICIENT_DISK" && error.retry_after_ms.is_some())
    };
    until("it was refused", refused).await;
    assert_eq!(handle.progress().unwrap().wire_bytes, 0);
    assert!(staging_is_empty(target.path()));
    server.stop().await;
    let server = Server::start_on(builder(target.path()), &address).await;
    handle.join().await.unwrap();
    assert_eq!(read_tree(&installed_dir(target.path(), "big")), read_tree(source.path()));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_source_is_not_believed() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 2, 4 << 20, 10);
    let server = Server::start(builder(target.path()).limits(small_limits())).await;
    let mut handle = SnapshotSender::connect(&server.uri())
        .unwrap()
        .options(options(|options| options.bytes_per_second = NonZeroU64::new(1 << 20)))
        .send(snapshot("moving"), DirectorySource::new(source.path()))
        .unwrap();
    until("it sends", || handle.progress().unwrap().wire_bytes > 0).await;
    std::fs::write(source.path().join("file-00000"), vec![1; 4 << 20]).unwrap();
    let error = handle.join().await.unwrap_err();
    assert_eq!(error.reason(), "SOURCE_CHANGED", "{error:?}");
    assert!(!installed_dir(target.path(), "moving").exists());
    // Nobody can go on with what is staged, and it keeps nobody off the disk.
    let shown = server.receiver.transfers().registry().get(Some(Direction::In), "moving").unwrap();
    assert_eq!(shown.phase(), TransferPhase::Cancelled);
    assert_eq!(std::fs::read_dir(target.path().join("staging")).unwrap().count(), 0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_directions_are_listed_and_an_outgoing_transfer_can_be_cancelled_by_call() {
    use proto_snapshot::v1::split_snapshot_service_client::SplitSnapshotServiceClient;
    let (source, target, own) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 2, 4 << 20, 11);
    let receiving = Server::start(builder(target.path()).limits(small_limits())).await;
    let sending = Server::start(builder(own.path())).await;
    let transfers: Transfers = sending.receiver.transfers();
    let mut handle = SnapshotSender::connect(&receiving.uri())
        .unwrap()
        .options(options(|options| options.bytes_per_second = NonZeroU64::new(256 << 10)))
        .transfers(transfers)
        .send(snapshot("out"), DirectorySource::new(source.path()))
        .unwrap();
    until("it sends", || handle.progress().unwrap().wire_bytes > 0).await;
    let channel = proto_common::tuning::endpoint(&sending.uri()).unwrap().connect().await.unwrap();
    let mut client = SplitSnapshotServiceClient::new(channel);
    let listed = client.list_transfers(ListTransfersRequest::default()).await.unwrap().into_inner().transfers;
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].progress.as_ref().unwrap().direction(), Direction::Out);
    let cancelled = client
        .cancel_transfer(proto_snapshot::v1::CancelTransferRequest {
            transfer_id: "out".into(),
            ..Default::default()
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(cancelled.transfer.unwrap().phase(), TransferPhase::Cancelled);
    assert!(handle.join().await.unwrap_err().is(Reason::TransferCancelled));
    until("the receiver has discarded it", || staging_is_empty(target.path())).await;
    drop(client);
    sending.stop().await;
    receiving.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn staging_that_nobody_resumes_is_collected() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 2, 4 << 20, 12);
    let mut limits = small_limits();
    limits.stale_after = Duration::from_millis(400);
    let server = Server::start(builder(target.path()).limits(limits)).await;
    let handle = SnapshotSender::connect(&server.uri())
        .unwrap()
        .options(options(|options| options.bytes_per_second = NonZeroU64::new(1 << 20)))
        .send(snapshot("stale"), DirectorySource::new(source.path()))
        .unwrap();
    let registry = server.receiver.transfers().registry().clone();
    let shown = || registry.get(Some(Direction::In), "stale");
    until("something is durable", || {
        shown().is_some_and(|transfer| transfer.progress.unwrap().bytes_done > 0)
    })
    .await;
    assert!(!staging_is_empty(target.path()));
    drop(handle);
    until("it expired", || shown().is_some_and(|transfer| transfer.phase() == TransferPhase::Expired)).await;
    assert!(staging_is_empty(target.path()));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_says_whose_it_is_also_when_the_transfer_is_not_known() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 3, 1 << 10, 1);
    let identity = NodeIdentity { store_id: vec![0x0a, 0xff].into(), ..NodeIdentity::default() };
    let server = Server::start(builder(target.path()).identity(identity)).await;
    let mut client =
        SplitSnapshotServiceClient::new(tuning::endpoint(&server.uri()).unwrap().connect().await.unwrap());
    let mut ask = async || {
        let request = GetTransferProgressRequest { transfer_id: "t1".into(), ..Default::default() };
        client.get_transfer_progress(request).await.map_err(Error::from)
    };
    let error = ask().await.unwrap_err();
    assert!(error.is(Reason::TransferNotFound), "{error:?}");
    assert_eq!(error.metadata_map()["node_id"], "n2");
    assert_eq!(error.metadata_map()["store_id"], "0aff");
    let mut handle = sender(&server.uri()).send(snapshot("t1"), DirectorySource::new(source.path())).unwrap();
    handle.join().await.unwrap();
    let node = ask().await.unwrap().into_inner().node.unwrap();
    assert_eq!((node.node_id.as_str(), &node.store_id[..]), ("n2", [0x0a, 0xff].as_slice()));
    server.stop().await;
}

//! Calls that meet: cancels and takeovers, installs of one shard, fences, restarts between an end and its removal.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

#[path = "support/slow.rs"]
mod slow;
mod support;

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt as _;
use proto_common::error::{CommonReason, Error};
use proto_common::fence::Fence;
use proto_common::ids::NodeId;
use proto_common::peer::Peer;
use proto_common::v1::Direction;
use proto_snapshot::hook::{Hold, HookFuture, InstallHook};
use proto_snapshot::sender::{SenderOptions, SnapshotSender, SnapshotToSend, TransferHandle};
use proto_snapshot::spec::{SnapshotPoint, TransferPlan};
use proto_snapshot::store::{FileSnapshotStore, FileStoreOptions, PlacedSnapshot, SnapshotStore};
use proto_snapshot::v1::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto_snapshot::v1::transfer_split_snapshot_request::{Chunk, File, Frame, Header, LaneHeader, Manifest};
use proto_snapshot::v1::{
    CancelTransferRequest, TransferPhase, TransferProgress, TransferSplitSnapshotRequest,
    TransferSplitSnapshotResponse,
};
use proto_snapshot::{DirectorySource, Reason, SnapshotReceiver};
use slow::{Brake, SlowStore};
use support::*;
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::transport::Channel;

type Client = SplitSnapshotServiceClient<Channel>;

fn send(address: &str, what: SnapshotToSend, source: &tempfile::TempDir, rate: u64) -> TransferHandle {
    let mut options = SenderOptions::default();
    options.backoff.initial = Duration::from_millis(5);
    options.backoff.max = Duration::from_millis(50);
    options.bytes_per_second = NonZeroU64::new(rate);
    let sender = SnapshotSender::connect(address).unwrap().options(options);
    sender.send(what, DirectorySource::new(source.path())).unwrap()
}

fn source() -> tempfile::TempDir {
    let source = tempfile::tempdir().unwrap();
    make_tree(source.path(), 4, 8 << 20, 41);
    source
}

fn shown<S: SnapshotStore>(server: &Server<S>, id: &str) -> Option<TransferProgress> {
    server.receiver.transfers().registry().get(Some(Direction::In), id)
}

fn phase<S: SnapshotStore>(server: &Server<S>, id: &str) -> Option<TransferPhase> {
    shown(server, id).map(|shown| shown.phase())
}

fn durable(server: &Server, id: &str) -> u64 {
    shown(server, id).and_then(|shown| shown.progress).map_or(0, |progress| progress.bytes_done)
}

async fn client<S: SnapshotStore>(server: &Server<S>) -> Client {
    Client::new(proto_common::tuning::endpoint(&server.uri()).unwrap().connect().await.unwrap())
}

async fn cancel<S: SnapshotStore>(server: &Server<S>, id: &str) -> Result<TransferPhase, Error> {
    let request = CancelTransferRequest { transfer_id: id.to_owned(), ..Default::default() };
    let mut client = client(server).await;
    let answer = tokio::time::timeout(LONG, client.cancel_transfer(request)).await.expect("a cancel returns");
    Ok(answer.map_err(Error::from)?.into_inner().transfer.unwrap().phase())
}

/// Records what it is called for; refuses once, or holds one transfer until told.
#[derive(Default)]
struct Gate {
    log: Arc<Mutex<Vec<String>>>,
    refuse: AtomicBool,
    held: &'static str,
    go: Arc<Notify>,
}

impl InstallHook for Gate {
    fn install<'a>(&'a self, snapshot: &'a PlacedSnapshot) -> HookFuture<'a, ()> {
        Box::pin(async move {
            let id = snapshot.plan.spec.transfer_id.to_string();
            self.log.lock().unwrap().push(format!("begin {id}"));
            if self.refuse.swap(false, Ordering::SeqCst) {
                return Err(Error::new(CommonReason::InvalidField, "no"));
            }
            if id == self.held {
                self.go.notified().await;
            }
            self.log.lock().unwrap().push(format!("merged {id}"));
            Ok(())
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_expired_and_came_back_is_kept_by_a_restart() {
    let (source, target) = (source(), tempfile::tempdir().unwrap());
    let mut limits = small_limits();
    limits.stale_after = Duration::from_millis(300);
    let server = Server::start(builder(target.path()).limits(limits)).await;
    let first = send(&server.uri(), snapshot("t"), &source, 4 << 20);
    until("a part is durable", || durable(&server, "t") > 1 << 20).await;
    drop(first);
    until("it expired", || phase(&server, "t") == Some(TransferPhase::Expired)).await;
    let second = send(&server.uri(), snapshot("t"), &source, 4 << 20);
    until("it is transferring again", || {
        phase(&server, "t") == Some(TransferPhase::Transferring) && durable(&server, "t") > 1 << 20
    })
    .await;
    server.stop().await;
    drop(second);
    let server = Server::start(builder(target.path())).await;
    assert_eq!(phase(&server, "t"), Some(TransferPhase::Interrupted));
    assert!(durable(&server, "t") > 1 << 20);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_end_of_an_id_is_the_one_that_a_restart_remembers() {
    let (source, target) = (source(), tempfile::tempdir().unwrap());
    let hook = Gate { refuse: AtomicBool::new(true), ..Gate::default() };
    let server = Server::start(builder(target.path()).hook(hook)).await;
    let refused = send(&server.uri(), snapshot("t"), &source, 1 << 30).join().await.unwrap_err();
    assert!(refused.is(Reason::InstallRefused), "{refused:?}");
    send(&server.uri(), snapshot("t"), &source, 1 << 30).join().await.unwrap();
    server.stop().await;
    let server = Server::start(builder(target.path())).await;
    assert_eq!(phase(&server, "t"), Some(TransferPhase::Installed));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_content_under_an_installed_id_is_refused_also_when_the_history_forgot_it() {
    let (source, other, target) = (source(), source(), tempfile::tempdir().unwrap());
    std::fs::write(other.path().join("more"), "more").unwrap();
    let mut limits = small_limits();
    limits.history = 1;
    let server = Server::start(builder(target.path()).limits(limits)).await;
    send(&server.uri(), snapshot("t"), &source, 1 << 30).join().await.unwrap();
    let error = send(&server.uri(), snapshot("t"), &other, 1 << 30).join().await.unwrap_err();
    assert!(error.is(Reason::SpecificationMismatch), "{error:?}");

    let mut elsewhere = snapshot("u");
    elsewhere.target_shard = proto_common::ids::ShardId::new("s3").unwrap();
    send(&server.uri(), elsewhere, &source, 1 << 30).join().await.unwrap();
    assert_eq!(phase(&server, "t"), None, "the history has forgotten it");
    let error = send(&server.uri(), snapshot("t"), &other, 1 << 30).join().await.unwrap_err();
    assert!(error.is(Reason::SpecificationMismatch), "{error:?}");
    assert!(send(&server.uri(), snapshot("t"), &source, 1 << 30).join().await.unwrap().already_installed);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_snapshot_is_never_merged_after_a_newer_one() {
    let (source, target) = (source(), tempfile::tempdir().unwrap());
    let hook = Gate { held: "old", ..Gate::default() };
    let (log, go) = (Arc::clone(&hook.log), Arc::clone(&hook.go));
    let server = Server::start(builder(target.path()).hook(hook)).await;
    let mut old = send(&server.uri(), snapshot("old"), &source, 1 << 30);
    until("the old one is being merged", || log.lock().unwrap().contains(&"begin old".to_owned())).await;
    let newer = SnapshotToSend { point: SnapshotPoint { term: 1, index: 2 }, ..snapshot("new") };
    let mut new = send(&server.uri(), newer, &source, 1 << 30);
    until("the new one is complete", || phase(&server, "new") == Some(TransferPhase::Installing)).await;
    go.notify_one();
    old.join().await.unwrap();
    new.join().await.unwrap();
    assert_eq!(*log.lock().unwrap(), ["begin old", "merged old", "begin new", "merged new"]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_was_deposed_meanwhile_does_not_install() {
    let (source, target) = (source(), tempfile::tempdir().unwrap());
    let server = Server::start(builder(target.path()).limits(small_limits())).await;
    let fenced = |id: &str, term| SnapshotToSend { fence: Some(Fence { epoch: 1, term }), ..snapshot(id) };
    let mut old = send(&server.uri(), fenced("old", 1), &source, 4 << 20);
    until("the old leader sends", || durable(&server, "old") > 0).await;
    let new = send(&server.uri(), fenced("new", 2), &source, 1 << 20);
    until("the new leader sends", || durable(&server, "new") > 0).await;
    let error = old.join().await.unwrap_err();
    assert!(error.is(Reason::StaleFence), "{error:?}");
    assert_eq!(error.get("current_term"), Some("2"));
    assert!(!installed_dir(target.path(), "old").exists());
    drop(new);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_failed_is_repeated_by_the_next_cancel() {
    let (source, target) = (source(), tempfile::tempdir().unwrap());
    let server = Server::start(builder(target.path()).limits(small_limits())).await;
    let handle = send(&server.uri(), snapshot("t"), &source, 2 << 20);
    until("a part is durable", || durable(&server, "t") > 0).await;
    // Where the store moves what it removes.
    let in_the_way = target.path().join("staging").join(".gone.t");
    std::fs::create_dir(&in_the_way).unwrap();
    std::fs::write(in_the_way.join("x"), "x").unwrap();
    let error = cancel(&server, "t").await.unwrap_err();
    assert!(error.is(Reason::StorageFailed), "{error:?}");
    assert!(target.path().join("staging").join("t").exists());
    std::fs::remove_dir_all(&in_the_way).unwrap();
    assert_eq!(cancel(&server, "t").await.unwrap(), TransferPhase::Cancelled);
    assert!(!target.path().join("staging").join("t").exists());
    drop(handle);
    server.stop().await;
}

/// Decides about nobody until told.
struct Door {
    asked: Arc<AtomicBool>,
    opens: watch::Receiver<Option<bool>>,
}

impl InstallHook for Door {
    fn admit<'a>(&'a self, _: &'a TransferPlan) -> HookFuture<'a, Hold> {
        self.asked.store(true, Ordering::SeqCst);
        let mut opens = self.opens.clone();
        Box::pin(async move {
            if opens.wait_for(Option::is_some).await.unwrap().unwrap() {
                Ok(Box::new(()) as Hold)
            } else {
                Err(Error::new(CommonReason::InvalidField, "no"))
            }
        })
    }

    fn install<'a>(&'a self, _: &'a PlacedSnapshot) -> HookFuture<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}

/// Whether another node is known to own the slots, look by look.
#[derive(Default)]
struct Lost {
    looks: Mutex<VecDeque<bool>>,
}

impl InstallHook for Lost {
    fn lost_by_source(&self, _: &TransferPlan) -> Option<String> {
        let lost = self.looks.lock().unwrap().pop_front().unwrap_or(false);
        lost.then(|| "slots 3 are of n3".to_owned())
    }

    fn install<'a>(&'a self, _: &'a PlacedSnapshot) -> HookFuture<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}

/// Whoever owns the slots now would find them busy for as long as the one that has lost them likes.
#[tokio::test(flavor = "multi_thread")]
async fn what_its_source_has_lost_ends_when_that_was_seen_twice() {
    let (source, target) = (source(), tempfile::tempdir().unwrap());
    let mut limits = small_limits();
    limits.stale_after = Duration::from_millis(400);
    let hook = Arc::new(Lost::default());
    let server = Server::start(builder(target.path()).limits(limits).hook(Arc::clone(&hook))).await;
    let mut handle = send(&server.uri(), snapshot("t"), &source, 1 << 20);
    until("a part is durable", || durable(&server, "t") > 0).await;
    hook.looks.lock().unwrap().extend([true, false, true, true, false]);
    let error = tokio::time::timeout(LONG, handle.join()).await.expect("it ends").unwrap_err();
    assert!(error.is(Reason::InstallRefused), "{error:?}");
    assert!(error.message().contains("slots 3 are of n3"), "{error}");
    until("it has failed", || phase(&server, "t") == Some(TransferPhase::Failed)).await;
    assert_eq!(*hook.looks.lock().unwrap(), [false], "one look in doubt is not enough");
    let shown = shown(&server, "t").unwrap().progress.unwrap().error.unwrap();
    assert_eq!((&*shown.reason, &*shown.message), ("INSTALL_REFUSED", "slots 3 are of n3"));
    assert!(!target.path().join("staging").join("t").exists());
    server.stop().await;
}

/// A receiver where a transfer `t` of node n1 waits to be admitted, its stream, and what decides.
async fn at_the_door(target: &tempfile::TempDir) -> (Server, Stream, watch::Sender<Option<bool>>) {
    let asked = Arc::new(AtomicBool::new(false));
    let (decide, opens) = watch::channel(None);
    let hook = Door { asked: Arc::clone(&asked), opens };
    let server = Server::start(builder(target.path()).hook(hook)).await;
    let stream = stream(&server, opening("t", 1, 1)).await;
    until("it is asked for", || asked.load(Ordering::SeqCst)).await;
    (server, stream, decide)
}

/// Cancels `t`, whichever it is, as the owner of a certificate.
async fn cancel_as(
    receiver: SnapshotReceiver<FileSnapshotStore>,
    node: &'static str,
) -> Result<TransferPhase, Error> {
    let peer = Peer::certified(Some(format!("node:///{node}").parse().unwrap()), None);
    let service =
        tower::util::MapRequest::new(receiver.into_service(), move |mut request: http::Request<Body>| {
            request.extensions_mut().insert(peer.clone());
            request
        });
    let request = CancelTransferRequest { transfer_id: "t".to_owned(), ..Default::default() };
    let answer = SplitSnapshotServiceClient::new(service).cancel_transfer(request).await;
    Ok(answer?.into_inner().transfer.unwrap().phase())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_cannot_cancel_what_another_one_is_about_to_begin() {
    for (node, may) in [("n3", false), ("n1", true)] {
        let target = tempfile::tempdir().unwrap();
        let (server, mut opened, decide) = at_the_door(&target).await;
        assert_eq!(phase(&server, "t"), None, "it is not shown yet");
        let mut cancelling = pin!(cancel_as(server.receiver.clone(), node));
        assert!(cancelling.as_mut().now_or_never().is_none(), "it waits for that");
        decide.send_replace(Some(true));
        let cancelled = tokio::time::timeout(LONG, cancelling).await.expect("a cancel returns");
        if may {
            assert_eq!(cancelled.unwrap(), TransferPhase::Cancelled);
        } else {
            let refused = cancelled.unwrap_err();
            assert!(refused.is(CommonReason::PermissionDenied), "{refused:?}");
            opened.answers.message().await.unwrap().expect("Accepted");
            until("it goes on", || phase(&server, "t") == Some(TransferPhase::Transferring)).await;
        }
        drop(opened);
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cancels_that_wait_end_with_their_calls() {
    let target = tempfile::tempdir().unwrap();
    let (server, opened, decide) = at_the_door(&target).await;
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    for _ in 0..100 {
        let cancelling = pin!(cancel_as(server.receiver.clone(), "n1"));
        assert!(cancelling.now_or_never().is_none(), "it waits for what is at the door");
    }
    // The first one goes on, whoever has hung up.
    assert!(tasks() <= before + 1, "{} tasks, {before} before", tasks());
    decide.send_replace(Some(true));
    let cancelled = tokio::time::timeout(LONG, cancel_as(server.receiver.clone(), "n1")).await;
    assert_eq!(cancelled.expect("a cancel returns").unwrap(), TransferPhase::Cancelled);
    drop(opened);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_cannot_cancel_what_this_one_begins_to_send_meanwhile() {
    let target = tempfile::tempdir().unwrap();
    let (server, mut opened, decide) = at_the_door(&target).await;
    let mut cancelling = pin!(cancel_as(server.receiver.clone(), "n1"));
    assert!(cancelling.as_mut().now_or_never().is_none(), "it waits for the incoming one");
    // Nobody answers there.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let sender = SnapshotSender::connect(&format!("http://{}", silent.local_addr().unwrap())).unwrap();
    let sender = sender.transfers(server.receiver.transfers());
    let source = source();
    let sending = sender.send(snapshot("t"), DirectorySource::new(source.path())).unwrap();
    decide.send_replace(Some(false));
    opened.answers.message().await.unwrap_err();
    let refused = tokio::time::timeout(LONG, cancelling).await.expect("a cancel returns").unwrap_err();
    assert!(refused.is(CommonReason::PermissionDenied), "{refused:?}");
    let transfers = server.receiver.transfers();
    let outgoing = transfers.registry().get(Some(Direction::Out), "t").unwrap();
    assert_ne!(outgoing.phase(), TransferPhase::Cancelled);
    drop(sending);
    server.stop().await;
}

fn request(frame: Frame) -> TransferSplitSnapshotRequest {
    TransferSplitSnapshotRequest { frame: Some(frame) }
}

/// Header and manifest of one transfer of `files` files of `size` bytes each.
fn opening(id: &str, files: u64, size: u64) -> Vec<TransferSplitSnapshotRequest> {
    let files: Vec<File> = (0..files)
        .map(|number| File { name: format!("dir/{number:08}"), size: Some(size), blake3: None })
        .collect();
    let header = Header {
        transfer_id: id.to_owned(),
        source_shard_id: "s1".to_owned(),
        target_shard_id: "s2".to_owned(),
        source_node_id: "n1".to_owned(),
        slots: Some(proto_common::v1::SlotRange { start: 0, end: 10 }),
        attempt: 1,
        session: vec![1; 16].into(),
        generation: 1,
        file_count: files.len() as u64,
        name_bytes: files.iter().map(|file| file.name.len() as u64).sum(),
        total_bytes: Some(files.len() as u64 * size),
        lanes: 8,
        ..Header::default()
    };
    let mut frames = vec![request(Frame::Header(header))];
    let pages = files.chunks(20_000);
    let last = pages.len() - 1;
    for (number, page) in pages.enumerate() {
        frames.push(request(Frame::Manifest(Manifest { files: page.to_vec(), last: number == last })));
    }
    frames
}

struct Stream {
    frames: mpsc::Sender<TransferSplitSnapshotRequest>,
    answers: tonic::Streaming<TransferSplitSnapshotResponse>,
}

/// Opens a stream on a connection of its own and sends `frames`.
async fn stream<S: SnapshotStore>(server: &Server<S>, frames: Vec<TransferSplitSnapshotRequest>) -> Stream {
    let (sender, receiver) = mpsc::channel(128);
    let answers = client(server)
        .await
        .transfer_split_snapshot(ReceiverStream::new(receiver))
        .await
        .unwrap()
        .into_inner();
    for frame in frames {
        // A refusal ends the stream before all are sent; the answer tells.
        let _ = sender.send(frame).await;
    }
    Stream { frames: sender, answers }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_at_any_moment_of_the_opening_leaves_nothing_and_tells_the_truth() {
    let target = tempfile::tempdir().unwrap();
    let server = Server::start(builder(target.path())).await;
    let mut cancelled = 0;
    for round in 0..12_u64 {
        let id = format!("t{round}");
        let mut opened = stream(&server, opening(&id, 60_000, 1)).await;
        // The moment differs from round to round, from before the transfer is known to after it was accepted.
        tokio::time::sleep(Duration::from_millis(round * 20)).await;
        if round % 3 == 0 {
            opened.answers.message().await.unwrap().expect("Accepted");
        } else {
            drop(opened);
        }
        match cancel(&server, &id).await {
            Ok(phase) => {
                assert_eq!(phase, TransferPhase::Cancelled);
                cancelled += 1;
                assert!(!target.path().join("staging").join(&id).exists());
            }
            Err(error) => assert!(error.is(Reason::TransferNotFound), "{error:?}"),
        }
    }
    assert!(cancelled > 0, "some were there to be cancelled");
    // What a late opening may still have made is interrupted, not active, and can be cancelled.
    until("nothing is left", || {
        let staged = std::fs::read_dir(target.path().join("staging")).unwrap();
        staged.filter_map(Result::ok).all(|entry| {
            let id = entry.file_name().into_string().unwrap();
            phase(&server, &id).is_none_or(|phase| phase != TransferPhase::Preparing)
        })
    })
    .await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lanes_with_a_backlog_end_after_their_control_stream() {
    const CHUNK: u64 = 64 << 10;
    let target = tempfile::tempdir().unwrap();
    let mut limits = small_limits();
    limits.unsynced_bytes = 4 * CHUNK;
    limits.unsynced_time = LONG;
    let server = Server::start(builder(target.path()).limits(limits)).await;
    let data = bytes::Bytes::from(vec![7; usize::try_from(CHUNK).unwrap()]);
    let crc64nvme = proto_common::checksum::crc64(&data);
    let mut control = stream(&server, opening("t", 1, 64 << 20)).await;
    control.answers.message().await.unwrap().expect("Accepted");
    let mut lanes = Vec::new();
    for lane in 1..8_u32 {
        let header = LaneHeader {
            transfer_id: "t".to_owned(),
            attempt: 1,
            session: vec![1; 16].into(),
            lane,
            generation: 1,
        };
        let mut opened = stream(&server, vec![request(Frame::LaneHeader(header))]).await;
        opened.answers.message().await.unwrap().expect("Accepted");
        lanes.push(opened);
    }
    for number in 0..8_u64 {
        for (lane, stream) in (0..).zip(&lanes) {
            let offset = (lane * 8 + number) * CHUNK;
            let chunk = Chunk { file: 0, offset, crc64nvme, payload: data.clone() };
            stream.frames.send(request(Frame::Chunk(chunk))).await.unwrap();
        }
    }
    drop(control);
    until("it is interrupted, and expires", || {
        let shown = shown(&server, "t").unwrap();
        shown.phase() == TransferPhase::Interrupted && shown.expires_unix_ms.is_some()
    })
    .await;
    #[cfg(target_os = "linux")]
    until("nothing of it is open", || open_below(&target.path().join("staging")) == 0).await;
    drop(lanes);
    assert_eq!(cancel(&server, "t").await.unwrap(), TransferPhase::Cancelled);
    assert!(staging_is_empty(target.path()));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_has_expired_is_not_resumed_and_the_next_is() {
    let target = tempfile::tempdir().unwrap();
    let mut limits = small_limits();
    limits.stale_after = Duration::from_millis(100);
    let server = Server::start(builder(target.path()).limits(limits)).await;
    let mut first = stream(&server, opening("t", 1, 1 << 20)).await;
    first.answers.message().await.unwrap().expect("Accepted");
    drop(first);
    until("it expired", || phase(&server, "t") == Some(TransferPhase::Expired)).await;
    let mut again = opening("t", 1, 1 << 20);
    let Some(Frame::Header(header)) = &mut again[0].frame else { panic!("a header") };
    header.generation = 2;
    let mut same = stream(&server, again.clone()).await;
    let error = Error::from(same.answers.message().await.unwrap_err());
    assert!(error.is(Reason::Superseded), "{error:?}");
    let Some(Frame::Header(header)) = &mut again[0].frame else { panic!("a header") };
    (header.attempt, header.generation) = (2, 1);
    let mut next = stream(&server, again).await;
    next.answers.message().await.unwrap().expect("Accepted");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn manifests_beyond_the_memory_for_them_wait_for_others_to_end() {
    let target = tempfile::tempdir().unwrap();
    let mut limits = small_limits();
    limits.manifest_memory_bytes = 1 << 20;
    let server = Server::start(builder(target.path()).limits(limits)).await;
    let mut first = stream(&server, opening("first", 5_000, 1)).await;
    first.answers.message().await.unwrap().expect("one alone is always taken");
    let mut second = stream(&server, opening("second", 5_000, 1)).await;
    let error = Error::from(second.answers.message().await.unwrap_err());
    assert!(error.is(Reason::TooManyTransfers) && error.is_retryable(), "{error:?}");
    assert_eq!(cancel(&server, "first").await.unwrap(), TransferPhase::Cancelled);
    let mut second = stream(&server, opening("second", 5_000, 1)).await;
    second.answers.message().await.unwrap().expect("there is room again");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_is_charged_for_as_long_as_a_stream_goes_on_with_it() {
    let target = tempfile::tempdir().unwrap();
    let mut limits = small_limits();
    limits.manifest_memory_bytes = 1 << 20;
    let server = Server::start(builder(target.path()).limits(limits)).await;
    let mut first = stream(&server, opening("first", 5_000, 1)).await;
    first.answers.message().await.unwrap().expect("one alone is always taken");
    // It says what it goes on with, and does not come to the manifest.
    let mut again = opening("first", 5_000, 1);
    let Some(Frame::Header(header)) = &mut again[0].frame else { panic!("the header comes first") };
    header.generation = 2;
    again.truncate(1);
    let stalled = stream(&server, again).await;
    assert_eq!(cancel(&server, "first").await.unwrap(), TransferPhase::Cancelled);
    let mut second = stream(&server, opening("second", 5_000, 1)).await;
    let error = Error::from(second.answers.message().await.unwrap_err());
    assert!(error.is(Reason::TooManyTransfers) && error.is_retryable(), "{error:?}");
    drop(stalled);
    let room = async {
        while stream(&server, opening("second", 5_000, 1)).await.answers.message().await.is_err() {}
    };
    tokio::time::timeout(LONG, room).await.expect("there is room again");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_starts_anew_needs_no_memory_beside_that_of_what_it_discards() {
    let target = tempfile::tempdir().unwrap();
    let mut limits = small_limits();
    (limits.manifest_memory_bytes, limits.transfers) = (1 << 20, 1);
    let server = Server::start(builder(target.path()).limits(limits)).await;
    let mut first = stream(&server, opening("first", 5_000, 1)).await;
    first.answers.message().await.unwrap().expect("one alone is always taken");
    // Other content, under the next attempt, while the first is still connected.
    let mut anew = opening("first", 5_000, 2);
    let Some(Frame::Header(header)) = &mut anew[0].frame else { panic!("the header comes first") };
    (header.attempt, header.session, header.discard_staged) = (2, vec![2; 16].into(), true);
    header.content_version = "later".to_owned();
    let begin = async || match stream(&server, anew.clone()).await.answers.message().await {
        Ok(answer) => Ok(answer.expect("Accepted")),
        Err(status) => Err(Error::from(status)),
    };
    let accepted = async {
        // The place of the one that it ended comes free in a moment.
        while let Err(error) = begin().await {
            assert!(error.is(Reason::TooManyTransfers), "{error:?}");
            assert!(!error.message().contains("memory"), "{error:?}");
        }
    };
    tokio::time::timeout(LONG, accepted).await.expect("it is accepted");
    let ended = loop {
        match first.answers.message().await {
            Ok(answer) => drop(answer.expect("the stream ends with an error")),
            Err(status) => break Error::from(status),
        }
    };
    assert!(ended.is(Reason::Superseded), "{ended:?}");
    server.stop().await;
}

/// A receiver of one transfer at a time whose next removal of a staging area fails; and the opening of an attempt that starts anew.
async fn without_removal() -> (Server<SlowStore>, Brake, Vec<TransferSplitSnapshotRequest>, tempfile::TempDir)
{
    let target = tempfile::tempdir().unwrap();
    let brake = Brake::released();
    let store = FileSnapshotStore::open(target.path(), FileStoreOptions::default()).unwrap();
    let store = SlowStore { store, brake: brake.clone() };
    let mut limits = small_limits();
    // Four looks at what is left in that time.
    limits.stale_after = LONG / 4;
    let builder = SnapshotReceiver::builder(&NodeId::new("n2").unwrap(), store).limits(limits);
    let server = Server::start(builder).await;
    let mut first = stream(&server, opening("t", 10, 1)).await;
    first.answers.message().await.unwrap().expect("Accepted");
    drop(first);
    let mut anew = opening("t", 10, 2);
    let Some(Frame::Header(header)) = &mut anew[0].frame else { panic!("the header comes first") };
    (header.attempt, header.session, header.discard_staged) = (2, vec![2; 16].into(), true);
    brake.removals_fail.store(1, Ordering::SeqCst);
    let refused = stream(&server, anew.clone()).await.answers.message().await.unwrap_err();
    let refused = Error::from(refused);
    assert!(refused.is(Reason::StorageFailed) && refused.is_retryable(), "{refused:?}");
    assert_eq!(brake.removals_fail.load(Ordering::SeqCst), 0, "it failed");
    (server, brake, anew, target)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_starts_anew_does_so_although_the_removal_failed_before() {
    let (server, _, mut anew, _target) = without_removal().await;
    // As a sender comes back that has said what is to be discarded.
    let Some(Frame::Header(header)) = &mut anew[0].frame else { panic!("the header comes first") };
    (header.generation, header.discard_staged) = (2, false);
    let begun = async {
        loop {
            match stream(&server, anew.clone()).await.answers.message().await {
                Ok(answer) => break answer.expect("Accepted"),
                Err(status) => {
                    let error = Error::from(status);
                    assert!(error.is_retryable(), "nobody cancelled it: {error:?}");
                }
            }
        }
    };
    tokio::time::timeout(LONG, begun).await.expect("it is accepted");
    server.stop().await;
}

/// Nobody comes back for it.
#[tokio::test(flavor = "multi_thread")]
async fn what_could_not_be_removed_for_an_attempt_that_starts_anew_is_removed_later() {
    let (server, _, _, target) = without_removal().await;
    let staging = target.path().join("staging");
    let left = || std::fs::read_dir(&staging).unwrap().count();
    assert!(left() > 0, "it is there still");
    until("it is removed", || left() == 0 && phase(&server, "t") == Some(TransferPhase::Expired)).await;
    server.stop().await;
}

/// It may fail for ever, as on a full disk, and a cancel makes room there.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_complete_and_cannot_be_sealed_can_be_cancelled() {
    let target = tempfile::tempdir().unwrap();
    let brake = Brake::released();
    brake.seals_fail.store(usize::MAX, Ordering::SeqCst);
    let store = FileSnapshotStore::open(target.path(), FileStoreOptions::default()).unwrap();
    let store = SlowStore { store, brake: brake.clone() };
    let server =
        Server::start(SnapshotReceiver::builder(&NodeId::new("n2").unwrap(), store).limits(small_limits()))
            .await;
    let source = source();
    let mut sending = send(&server.uri(), snapshot("t"), &source, u64::MAX);
    until("a seal has failed", || brake.seals_fail.load(Ordering::SeqCst) < usize::MAX).await;
    let cancelled = async {
        // Not while one is under way.
        while let Err(error) = cancel(&server, "t").await {
            assert!(error.is(Reason::TooLateToCancel), "{error:?}");
        }
    };
    tokio::time::timeout(LONG, cancelled).await.expect("it is cancelled");
    assert_eq!(phase(&server, "t"), Some(TransferPhase::Cancelled));
    assert_eq!(std::fs::read_dir(target.path().join("staging")).unwrap().count(), 0);
    assert!(sending.join().await.unwrap_err().is(Reason::TransferCancelled));
    server.stop().await;
}

/// Nothing of it is here then, so nothing says that it goes on.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_attempt_discards_that_comes_no_further_has_ended() {
    for connected in [true, false] {
        let target = tempfile::tempdir().unwrap();
        let server = Server::start(builder(target.path()).limits(small_limits())).await;
        let mut first = stream(&server, opening("t", 50, 1)).await;
        first.answers.message().await.unwrap().expect("Accepted");
        let first = connected.then_some(first);
        if !connected {
            until("it is interrupted", || phase(&server, "t") == Some(TransferPhase::Interrupted)).await;
        }
        let mut anew = opening("t", 50, 2);
        let Some(Frame::Header(header)) = &mut anew[0].frame else { panic!("the header comes first") };
        (header.attempt, header.session, header.discard_staged) = (2, vec![2; 16].into(), true);
        anew.truncate(1);
        let second = stream(&server, anew.clone()).await;
        until("it has ended", || phase(&server, "t") == Some(TransferPhase::Failed)).await;
        drop((first, second));
        let shown = shown(&server, "t").unwrap();
        assert_eq!((shown.attempt, shown.lanes, shown.expires_unix_ms), (1, 0, None), "{shown:?}");
        let progress = shown.progress.unwrap();
        assert!(progress.finished_unix_ms.is_some());
        assert!(Error::from(progress.error.unwrap()).is(Reason::Superseded));
        assert_eq!(server.receiver.transfers().registry().active(None), 0);
        assert_eq!(std::fs::read_dir(target.path().join("staging")).unwrap().count(), 0);
        // It is no end of the next attempt.
        let mut third = opening("t", 50, 3);
        let Some(Frame::Header(header)) = &mut third[0].frame else { panic!("the header comes first") };
        (header.attempt, header.session) = (3, vec![3; 16].into());
        let mut third = stream(&server, third).await;
        third.answers.message().await.unwrap().expect("Accepted");
        server.stop().await;
    }
}

//! What one source node may take of a receiver: its share, and no more, whatever it opens; others go on meanwhile.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

#[path = "support/slow.rs"]
mod slow;
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use proto_common::checksum::{combine, crc64};
use proto_common::error::Error;
use proto_common::ids::NodeId;
use proto_common::refusals::count_of;
use proto_common::slots::SlotRange;
use proto_snapshot::hook::{Hold, HookFuture, InstallHook};
use proto_snapshot::limits::Limits;
use proto_snapshot::sender::SnapshotSender;
use proto_snapshot::source::DirectorySource;
use proto_snapshot::spec::TransferPlan;
use proto_snapshot::store::{FileSnapshotStore, FileStoreOptions, PlacedSnapshot, SnapshotStore};
use proto_snapshot::v1::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto_snapshot::v1::transfer_split_snapshot_request::{
    Chunk, End, File, FileTotal, Frame, Header, Heartbeat, LaneHeader, Manifest,
};
use proto_snapshot::v1::transfer_split_snapshot_response::Frame as Answer;
use proto_snapshot::v1::{
    TransferSplitSnapshotRequest, TransferSplitSnapshotResponse, WatchTransferProgressRequest,
};
use proto_snapshot::{Reason, SnapshotReceiver};
use slow::{Brake, SlowStore};
use support::{Server, builder, builder_with, make_tree, small_limits, snapshot, until};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

/// Of the snapshot of a [`Stalled`] stream, and of a chunk.
const SIZE: u64 = 1 << 20;

/// A stream that is accepted and then says nothing by itself.
struct Stalled {
    frames: mpsc::Sender<TransferSplitSnapshotRequest>,
    answers: Streaming<TransferSplitSnapshotResponse>,
    /// What it may send before the next answer.
    credit: u64,
}

impl Stalled {
    async fn open(server: &Server<impl SnapshotStore>, node: &str, id: &str) -> Result<Self, Error> {
        Self::open_with(server, node, id, SIZE, 1).await
    }

    /// One of a snapshot of `size` bytes.
    async fn open_with(
        server: &Server<impl SnapshotStore>,
        node: &str,
        id: &str,
        size: u64,
        generation: u64,
    ) -> Result<Self, Error> {
        Self::begin(server, Self::begun(node, id, size, generation)).await
    }

    /// What it says first.
    fn begun(node: &str, id: &str, size: u64, generation: u64) -> Vec<Frame> {
        let header = Header {
            transfer_id: id.to_owned(),
            source_shard_id: "s1".to_owned(),
            target_shard_id: format!("s-{id}"),
            source_node_id: node.to_owned(),
            slots: Some(SlotRange::new(0, 1).unwrap().into()),
            snapshot_index: 1,
            snapshot_term: 1,
            attempt: 1,
            session: vec![1; 16].into(),
            generation,
            file_count: 1,
            name_bytes: 1,
            total_bytes: Some(size),
            lanes: 2,
            ..Header::default()
        };
        let file = File { name: "a".to_owned(), size: Some(size), blake3: None };
        let manifest = Manifest { files: vec![file], last: true };
        vec![Frame::Header(header), Frame::Manifest(manifest)]
    }

    /// A lane of one.
    async fn lane(server: &Server<impl SnapshotStore>, id: &str) -> Self {
        let header = LaneHeader {
            transfer_id: id.to_owned(),
            attempt: 1,
            session: vec![1; 16].into(),
            lane: 1,
            generation: 1,
        };
        Self::begin(server, vec![Frame::LaneHeader(header)]).await.unwrap()
    }

    async fn begin(server: &Server<impl SnapshotStore>, first: Vec<Frame>) -> Result<Self, Error> {
        let channel = proto_common::tuning::endpoint(&server.uri()).unwrap().connect().await.unwrap();
        let (frames, requests) = mpsc::channel(4);
        for frame in first {
            frames.send(TransferSplitSnapshotRequest { frame: Some(frame) }).await.unwrap();
        }
        let mut client = SplitSnapshotServiceClient::new(channel);
        let mut answers = client.transfer_split_snapshot(ReceiverStream::new(requests)).await?.into_inner();
        let answer = answers.message().await?.unwrap().frame.unwrap();
        let Answer::Accepted(accepted) = answer else { panic!("{answer:?}") };
        Ok(Self { frames, answers, credit: accepted.credit_limit })
    }

    async fn say(&self, frame: Frame) {
        self.frames.send(TransferSplitSnapshotRequest { frame: Some(frame) }).await.unwrap();
    }

    /// Sends a chunk, where it has credit for that.
    async fn chunk(&self, offset: u64, payload: &Bytes) {
        let payload = payload.clone();
        self.say(Frame::Chunk(Chunk { file: 0, offset, crc64nvme: crc64(&payload), payload })).await;
    }

    /// Says that it has sent `size` bytes that have this checksum.
    async fn end(&self, size: u64, crc64nvme: u64) {
        let files = vec![FileTotal { file: 0, size, crc64nvme }];
        self.say(Frame::End(End { files, last: true, file_count: 1, total_bytes: size })).await;
    }

    /// The next answer.
    async fn hear(&mut self) -> Result<Answer, Error> {
        let answer = tokio::time::timeout(support::LONG, self.answers.message()).await.expect("an answer");
        let answer = answer?.expect("no end before the last word").frame.unwrap();
        if let Answer::Ack(ack) = &answer {
            self.credit = ack.credit_limit;
        }
        Ok(answer)
    }

    /// The error that ends it.
    async fn refusal(&mut self) -> Error {
        loop {
            match self.hear().await {
                Ok(answer) => assert!(matches!(answer, Answer::Ack(_)), "{answer:?}"),
                Err(error) => return error,
            }
        }
    }

    /// Waits until the snapshot is installed.
    async fn installed(&mut self) {
        while !matches!(self.hear().await.unwrap(), Answer::Installed(_)) {}
    }
}

/// Waits until another stream, which brings nothing, is refused for that: whatever is open already has been looked at then.
async fn look_at_all(server: &Server<impl SnapshotStore>, id: &str) {
    let refused = Stalled::open(server, "n9", id).await.unwrap().refusal().await;
    assert!(refused.is(Reason::TooSlow), "{refused:?}");
}

fn impatient() -> Limits {
    let mut limits = Limits::default();
    limits.slowest_time = Duration::from_millis(500);
    limits
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_takes_all_it_gets_leaves_the_others_their_places() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 8, 1 << 20, 1);
    let mut limits = small_limits();
    (limits.transfers, limits.transfers_per_peer, limits.staged_per_peer) = (4, 2, 3);
    let server = Server::start(builder(target.path()).limits(limits)).await;
    let first = Stalled::open(&server, "n9", "x1").await.unwrap();
    let _second = Stalled::open(&server, "n9", "x2").await.unwrap();
    let before = count_of("TOO_MANY_TRANSFERS");
    let refused = Stalled::open(&server, "n9", "x3").await.err().expect("more than its share");
    assert!(refused.is(Reason::TooManyTransfers) && refused.is_retryable(), "{refused:?}");
    assert_eq!((refused.get("limit"), refused.get("peer")), (Some("2"), Some("n9")));
    assert!(count_of("TOO_MANY_TRANSFERS") > before);
    // Another node, at once and to its end.
    let endpoint = proto_common::tuning::endpoint(&server.uri()).unwrap();
    let sender = SnapshotSender::new(endpoint);
    let other = DirectorySource::new(source.path());
    sender.send(snapshot("t"), other).unwrap().join().await.unwrap();

    // What it leaves behind is counted, too.
    drop(first);
    let third = async {
        loop {
            match Stalled::open(&server, "n9", "x3").await {
                Ok(third) => return third,
                Err(error) => assert!(error.is(Reason::TooManyTransfers), "{error:?}"),
            }
        }
    };
    drop(tokio::time::timeout(support::LONG, third).await.expect("a place comes free"));
    let refused = async {
        loop {
            let refused = Stalled::open(&server, "n9", "x4").await.err().expect("three are staged");
            if refused.get("limit") == Some("3") {
                return refused;
            }
        }
    };
    let refused = tokio::time::timeout(support::LONG, refused).await.expect("the share of staged transfers");
    assert!(refused.is(Reason::TooManyTransfers), "{refused:?}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_now_and_then_keeps_no_place() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 8, 1 << 20, 1);
    let mut limits = small_limits();
    limits.transfers = 1;
    limits.slowest_time = std::time::Duration::from_millis(500);
    let server = Server::start(builder(target.path()).limits(limits)).await;
    let before = count_of("TOO_SLOW");
    let mut slow = Stalled::open(&server, "n9", "x1").await.unwrap();
    let frames = slow.frames.clone();
    let bytes = tokio::spawn(async move {
        for offset in 0.. {
            let payload = bytes::Bytes::from_static(b"x");
            let chunk = Chunk { file: 0, offset, crc64nvme: crc64(&payload), payload };
            for frame in [Frame::Chunk(chunk), Frame::Heartbeat(Heartbeat {})] {
                let sent = frames.send(TransferSplitSnapshotRequest { frame: Some(frame) }).await;
                if sent.is_err() {
                    return offset;
                }
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        0
    });
    // It has the only place until it is found too slow; then somebody else gets that.
    let endpoint = proto_common::tuning::endpoint(&server.uri()).unwrap();
    let other = DirectorySource::new(source.path());
    SnapshotSender::new(endpoint).send(snapshot("t"), other).unwrap().join().await.unwrap();
    let refused = loop {
        match slow.answers.message().await {
            Ok(answer) => assert!(answer.is_some(), "an end without a refusal"),
            Err(status) => break Error::from(status),
        }
    };
    assert!(refused.is(Reason::TooSlow) && refused.is_retryable(), "{refused:?}");
    assert!(refused.message().contains("65536 bytes within 500ms"), "{refused}");
    assert!(count_of("TOO_SLOW") > before);
    drop(slow);
    assert!(bytes.await.unwrap() > 1, "it was refused for its rate, not for its silence");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_is_not_to_blame_for_a_store_that_hangs() {
    for by_lane in [false, true] {
        let target = tempfile::tempdir().unwrap();
        let brake = Brake::held();
        let store = FileSnapshotStore::open(target.path(), FileStoreOptions::default()).unwrap();
        let store = SlowStore { store, brake: brake.clone() };
        let builder = SnapshotReceiver::builder(&NodeId::new("n2").unwrap(), store);
        let server = Server::start(builder.limits(impatient())).await;
        let mut sender = Stalled::open(&server, "n1", "t").await.unwrap();
        let lane = if by_lane { Some(Stalled::lane(&server, "t").await) } else { None };
        let bytes = Bytes::from(vec![7; usize::try_from(SIZE).unwrap()]);
        lane.as_ref().unwrap_or(&sender).chunk(0, &bytes).await;
        brake.begun.subscribe().wait_for(|begun| *begun > 0).await.unwrap();
        look_at_all(&server, "x1").await;
        look_at_all(&server, "x2").await;
        brake.release();
        if let Some(mut lane) = lane {
            while !matches!(lane.hear().await.unwrap(), Answer::Ack(ack) if ack.received_bytes == SIZE) {}
        }
        sender.end(SIZE, crc64(&bytes)).await;
        sender.installed().await;
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_that_reads_its_snapshot_for_the_totals_has_the_time_for_that() {
    // 8 s at the rate at which a sender is thought to read at least.
    const TOTAL: u64 = 128 << 20;
    let target = tempfile::tempdir().unwrap();
    let server = Server::start(builder(target.path()).limits(impatient())).await;
    let bytes = Bytes::from(vec![7; usize::try_from(SIZE).unwrap()]);
    let mut first = Stalled::open_with(&server, "n1", "t", TOTAL, 1).await.unwrap();
    let mut crc = 0;
    for offset in (0..TOTAL).step_by(bytes.len()) {
        while first.credit < offset + SIZE {
            first.hear().await.unwrap();
        }
        first.chunk(offset, &bytes).await;
        crc = combine(crc, crc64(&bytes), SIZE);
    }
    while !matches!(first.hear().await.unwrap(), Answer::Ack(ack) if ack.durable_bytes == TOTAL) {}
    // Nothing is missing from the start, and nothing comes.
    let mut again = Stalled::open_with(&server, "n1", "t", TOTAL, 2).await.unwrap();
    look_at_all(&server, "x1").await;
    again.say(Frame::Heartbeat(Heartbeat {})).await;
    again.end(TOTAL, crc).await;
    again.installed().await;
    server.stop().await;
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn snapshots_that_fail_the_check_hold_nothing_open() {
    let target = tempfile::tempdir().unwrap();
    let server = Server::start(builder(target.path())).await;
    let staging = target.path().join("staging");
    for number in 0..64 {
        let mut sender = Stalled::open_with(&server, "n9", &format!("x{number}"), 1, 1).await.unwrap();
        assert!(support::open_below(&staging) > 0, "it is open while it is sent");
        sender.chunk(0, &Bytes::from_static(b"x")).await;
        sender.end(1, !crc64(b"x")).await;
        let refused = sender.refusal().await;
        assert!(refused.is(Reason::FileChecksumMismatch), "{refused:?}");
    }
    until("nothing is open", || support::open_below(&staging) == 0).await;
    assert_eq!(std::fs::read_dir(&staging).unwrap().count(), 64, "all of them are staged");
    server.stop().await;
}

/// Admits nobody until told.
struct Undecided {
    asked: Arc<AtomicUsize>,
    decided: watch::Receiver<bool>,
}

impl InstallHook for Undecided {
    fn admit<'a>(&'a self, _: &'a TransferPlan) -> HookFuture<'a, Hold> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let mut decided = self.decided.clone();
        Box::pin(async move {
            decided.wait_for(|decided| *decided).await.unwrap();
            Ok(Box::new(()) as Hold)
        })
    }

    fn install<'a>(&'a self, _: &'a PlacedSnapshot) -> HookFuture<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_that_come_at_once_are_staged_up_to_the_share_of_their_node() {
    let target = tempfile::tempdir().unwrap();
    let (asked, refused) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let (decide, decided) = watch::channel(false);
    let mut limits = small_limits();
    limits.staged_per_peer = 2;
    let hook = Undecided { asked: Arc::clone(&asked), decided };
    let server = Arc::new(Server::start(builder(target.path()).limits(limits).hook(hook)).await);
    let mut streams = tokio::task::JoinSet::new();
    for number in 0..8 {
        let (server, refused) = (Arc::clone(&server), Arc::clone(&refused));
        streams.spawn(async move {
            let opened = Stalled::open(&server, "n9", &format!("x{number}")).await;
            if let Err(error) = &opened {
                assert!(error.is(Reason::TooManyTransfers), "{error:?}");
                refused.fetch_add(1, Ordering::SeqCst);
            }
            opened.ok()
        });
    }
    let count = |counter: &AtomicUsize| counter.load(Ordering::SeqCst);
    until("each is refused or being staged", || count(&asked) + count(&refused) == 8).await;
    assert_eq!((count(&asked), count(&refused)), (2, 6));
    // Others have theirs, also of an ID that was refused.
    decide.send_replace(true);
    let opened = streams.join_all().await;
    assert_eq!(opened.iter().flatten().count(), 2);
    drop(Stalled::open(&server, "n1", "y").await.unwrap());
    drop(opened);
    Arc::into_inner(server).unwrap().stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_announces_all_it_can_leaves_the_others_room_on_the_disk() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 8, 1 << 20, 1);
    let mut options = FileStoreOptions::default();
    options.capacity_bytes = Some(16 << 20);
    let server = Server::start(builder_with(target.path(), options)).await;
    let first = Stalled::open_with(&server, "n9", "x1", 11 << 20, 1).await.unwrap();
    let before = count_of("INSUFFICIENT_DISK");
    let refused =
        Stalled::open_with(&server, "n9", "x2", 2 << 20, 1).await.err().expect("more than its share");
    assert!(refused.is(Reason::InsufficientDisk) && refused.is_retryable(), "{refused:?}");
    let facts = ["peer", "needed_bytes", "available_bytes"].map(|name| refused.get(name));
    assert_eq!(facts, [Some("n9"), Some("2097152"), Some("1048576")]);
    assert!(count_of("INSUFFICIENT_DISK") > before);
    // Another node, at once and to its end.
    let endpoint = proto_common::tuning::endpoint(&server.uri()).unwrap();
    let other = DirectorySource::new(source.path());
    SnapshotSender::new(endpoint).send(snapshot("t"), other).unwrap().join().await.unwrap();
    drop(first);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_has_its_share_of_the_memory_for_manifests_and_goes_on_with_what_it_has() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 8, 1 << 20, 1);
    let mut limits = small_limits();
    // Room for eight ordinary ones; of one node, for one. A file counts as 512 bytes and twice its name.
    (limits.manifest_memory_bytes, limits.manifest_memory_per_peer) = (8 << 10, 600);
    let server = Server::start(builder(target.path()).limits(limits)).await;
    let first = Stalled::open(&server, "n9", "x1").await.unwrap();
    let before = count_of("TOO_MANY_TRANSFERS");
    let refused = Stalled::open(&server, "n9", "x2").await.err().expect("more than its share");
    assert!(refused.is(Reason::TooManyTransfers) && refused.is_retryable(), "{refused:?}");
    assert_eq!((refused.get("limit"), refused.get("peer")), (Some("600"), Some("n9")));
    assert!(refused.message().contains("memory"), "{refused}");
    assert!(count_of("TOO_MANY_TRANSFERS") > before);
    // Another node, with more files than that: its only manifest is taken.
    let endpoint = proto_common::tuning::endpoint(&server.uri()).unwrap();
    let other = DirectorySource::new(source.path());
    SnapshotSender::new(endpoint).send(snapshot("t"), other).unwrap().join().await.unwrap();

    // What it has it may go on with, but only as it is.
    drop(first);
    let resumed = Stalled::open_with(&server, "n9", "x1", SIZE, 2).await.unwrap();
    drop(resumed);
    let mut changed = Stalled::begun("n9", "x1", SIZE, 3);
    let Some(Frame::Manifest(manifest)) = changed.last_mut() else { panic!("a manifest comes last") };
    manifest.files[0].name = "b".to_owned();
    let refused = Stalled::begin(&server, changed).await.err().expect("another manifest");
    assert!(refused.is(Reason::SpecificationMismatch), "{refused:?}");
    assert_eq!(refused.get("field"), Some("manifest.files"));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_watches_all_it_can_leaves_the_others_their_watches() {
    let target = tempfile::tempdir().unwrap();
    let mut limits = small_limits();
    (limits.watchers, limits.watchers_per_peer) = (4, 3);
    let server = Server::start(builder(target.path()).limits(limits)).await;
    let _staged = Stalled::open(&server, "n1", "t").await.unwrap();
    // In plaintext, a peer is an address, whatever it opens.
    let watch_from = async |address: [u8; 4]| {
        let endpoint = proto_common::tuning::endpoint(&server.uri()).unwrap();
        let channel = endpoint.local_address(Some(address.into())).connect().await.unwrap();
        let request = WatchTransferProgressRequest { transfer_id: "t".to_owned(), ..Default::default() };
        let mut client = SplitSnapshotServiceClient::new(channel);
        let mut watch = client.watch_transfer_progress(request).await.map_err(Error::from)?.into_inner();
        assert!(watch.message().await.unwrap().is_some());
        Ok::<_, Error>(watch)
    };
    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(watch_from([127, 0, 0, 1]).await.unwrap());
    }
    let before = count_of("TOO_MANY_WATCHERS");
    let refused = watch_from([127, 0, 0, 1]).await.unwrap_err();
    assert!(refused.is(Reason::TooManyWatchers) && refused.is_retryable(), "{refused:?}");
    assert_eq!((refused.get("limit"), refused.get("peer")), (Some("3"), Some("127.0.0.1")));
    assert!(count_of("TOO_MANY_WATCHERS") > before);
    let _other = watch_from([127, 0, 0, 2]).await.unwrap();
    let refused = watch_from([127, 0, 0, 2]).await.unwrap_err();
    assert_eq!(
        (refused.reason(), refused.get("limit"), refused.get("peer")),
        ("TOO_MANY_WATCHERS", Some("4"), None)
    );
    // A place comes back with the watch.
    open.clear();
    let again = async {
        while let Err(error) = watch_from([127, 0, 0, 1]).await {
            assert!(error.is(Reason::TooManyWatchers), "{error:?}");
        }
    };
    tokio::time::timeout(support::LONG, again).await.expect("a place comes free");
    server.stop().await;
}

/// Every stream ends the streams of every transfer when the node stops, so each is told by many at once.
#[test]
fn streams_that_are_told_to_end_by_many_at_once_end() {
    let (done, stopped) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // A thread that waits for itself stops the clock of its runtime, too.
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
        for _ in 0..40 {
            runtime.block_on(async {
                let target = tempfile::tempdir().unwrap();
                let server = Server::start(builder(target.path())).await;
                let mut open = Vec::new();
                for number in 0..12 {
                    open.push(Stalled::open(&server, "n1", &format!("t{number}")).await.unwrap());
                }
                server.receiver.shutdown().await;
                for stream in &mut open {
                    let refused = stream.refusal().await;
                    assert!(refused.is(Reason::ShuttingDown), "{refused:?}");
                }
                drop(open);
                server.stop().await;
            });
            done.send(()).unwrap();
        }
    });
    for round in 0..40 {
        assert_eq!(stopped.recv_timeout(support::LONG), Ok(()), "round {round}");
    }
}

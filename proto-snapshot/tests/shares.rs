//! What one source node may take of a receiver: its share, and no more, whatever it opens; others go on meanwhile.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

#[path = "support/slow.rs"]
mod slow;
#[path = "support/stalled.rs"]
mod stalled;
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use proto_common::checksum::{combine, crc64};
use proto_common::error::Error;
use proto_common::ids::NodeId;
use proto_common::v1::Direction;
use proto_snapshot::hook::{Hold, HookFuture, InstallHook};
use proto_snapshot::limits::Limits;
use proto_snapshot::spec::TransferPlan;
use proto_snapshot::store::{FileSnapshotStore, FileStoreOptions, PlacedSnapshot, SnapshotStore};
use proto_snapshot::v1::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto_snapshot::v1::transfer_split_snapshot_request::{Frame, Header, Heartbeat, LaneHeader};
use proto_snapshot::v1::transfer_split_snapshot_response::Frame as Answer;
use proto_snapshot::v1::{CancelTransferRequest, GetTransferProgressRequest, TransferPhase};
use proto_snapshot::{Reason, SnapshotReceiver};
use slow::{Brake, SlowStore};
use stalled::{SIZE, Stalled};
use support::{LONG, Server, builder, small_limits, until};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::transport::Channel;

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
async fn a_node_without_memory_for_manifests_goes_on_with_what_it_has_as_it_is() {
    let target = tempfile::tempdir().unwrap();
    let mut limits = small_limits();
    // Room for one manifest.
    limits.manifest_memory_per_peer = 600;
    let server = Server::start(builder(target.path()).limits(limits)).await;
    drop(Stalled::open(&server, "n9", "x1").await.unwrap());
    let refused = Stalled::open(&server, "n9", "x2").await.err().expect("more than its share");
    assert!(refused.is(Reason::TooManyTransfers), "{refused:?}");
    drop(Stalled::open_with(&server, "n9", "x1", SIZE, 2).await.unwrap());
    let mut changed = Stalled::begun("n9", "x1", SIZE, 3);
    let Some(Frame::Manifest(manifest)) = changed.last_mut() else { panic!("a manifest comes last") };
    manifest.files[0].name = "b".to_owned();
    let refused = Stalled::begin(&server, changed).await.err().expect("another manifest");
    assert!(refused.is(Reason::SpecificationMismatch), "{refused:?}");
    assert_eq!(refused.get("field"), Some("manifest.files"));
    server.stop().await;
}

/// The error of the one of two streams that is refused, and the other one.
async fn first_refused(mut a: Stalled, mut b: Stalled) -> (Error, Stalled) {
    tokio::select! {
        error = a.refusal() => (error, b),
        error = b.refusal() => (error, a),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_in_their_handshake_have_places_and_one_that_takes_over_shares_that_of_its_transfer() {
    let target = tempfile::tempdir().unwrap();
    let mut limits = small_limits();
    limits.transfers_per_peer = 1;
    let server = Server::start(builder(target.path()).limits(limits)).await;
    let mut first = Stalled::open(&server, "n9", "x1").await.unwrap();
    let header = |node: &str, change: &dyn Fn(&mut Header)| {
        let mut first = Stalled::begun(node, "x1", SIZE, 1);
        let Frame::Header(header) = &mut first[0] else { panic!("the header comes first") };
        change(header);
        first.truncate(1);
        first
    };
    let full = async |first: Vec<Frame>| {
        let refused = Stalled::say_first(&server, first).await.unwrap().refusal().await;
        assert!(refused.is(Reason::TooManyTransfers), "{refused:?}");
    };
    // A stream that cannot take over has no part in the place of the transfer that it names.
    full(header("n9", &|_| {})).await;
    full(header("n9", &|header| (header.generation, header.session) = (2, vec![2; 16].into()))).await;
    // Nor has that of another node; it has one of its own, and no second one.
    let others = header("n8", &|header| header.generation = 2);
    let others =
        (Stalled::say_first(&server, others.clone()).await, Stalled::say_first(&server, others).await);
    let (refused, _other) = first_refused(others.0.unwrap(), others.1.unwrap()).await;
    assert!(refused.is(Reason::TooManyTransfers), "{refused:?}");
    // One that can, and comes to nothing, ends when the next one comes.
    let takes_over =
        |generation| Stalled::say_first(&server, header("n9", &move |header| header.generation = generation));
    let mut last = takes_over(2).await.unwrap();
    for generation in 3..20 {
        let (replaced, newer) = first_refused(last, takes_over(generation).await.unwrap()).await;
        assert!(replaced.is(Reason::StreamEndedEarly) && replaced.is_retryable(), "{replaced:?}");
        last = newer;
    }
    // The place is not free while one of them has it, also where the transfer is gone.
    let channel = proto_common::tuning::endpoint(&server.uri()).unwrap().connect().await.unwrap();
    let cancel = CancelTransferRequest { transfer_id: "x1".to_owned(), ..CancelTransferRequest::default() };
    SplitSnapshotServiceClient::new(channel).cancel_transfer(cancel).await.unwrap();
    assert!(first.refusal().await.is(Reason::TransferCancelled));
    let begun = Stalled::begun("n9", "x2", SIZE, 1);
    full(begun.clone()).await;
    drop(last);
    let free = async {
        while let Err(error) = Stalled::begin(&server, begun.clone()).await {
            assert!(error.is(Reason::TooManyTransfers), "{error:?}");
        }
    };
    tokio::time::timeout(support::LONG, free).await.expect("it is given back");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_that_comes_back_takes_over_where_all_places_are_taken() {
    let target = tempfile::tempdir().unwrap();
    let mut limits = small_limits();
    limits.transfers = 1;
    let server = Server::start(builder(target.path()).limits(limits)).await;
    let mut last = Stalled::open(&server, "n1", "t").await.unwrap();
    for generation in [2, 5] {
        // It breaks in its handshake, unnoticed, and comes back.
        let breaks = |generation| {
            let begun = Stalled::begun("n1", "t", SIZE, generation).into_iter().take(1).collect();
            Stalled::say_first(&server, begun)
        };
        let broken = (breaks(generation).await.unwrap(), breaks(generation + 1).await.unwrap());
        let (replaced, mut broken) = first_refused(broken.0, broken.1).await;
        assert!(replaced.is(Reason::StreamEndedEarly), "{replaced:?}");
        let next = Stalled::open_with(&server, "n1", "t", SIZE, generation + 2).await.unwrap();
        for stream in [&mut broken, &mut last] {
            assert!(stream.refusal().await.is(Reason::StreamEndedEarly));
        }
        last = next;
    }
    let bytes = Bytes::from(vec![7; usize::try_from(SIZE).unwrap()]);
    for offset in (0..SIZE).step_by(64 << 10) {
        while last.credit < offset + (64 << 10) {
            last.hear().await.unwrap();
        }
        last.chunk(offset, &bytes.slice(..64 << 10)).await;
    }
    last.end(SIZE, crc64(&bytes)).await;
    last.installed().await;
    server.stop().await;
}

/// Merges nothing until told.
struct Slow {
    go: watch::Receiver<bool>,
}

impl InstallHook for Slow {
    fn install<'a>(&'a self, _: &'a PlacedSnapshot) -> HookFuture<'a, ()> {
        let mut go = self.go.clone();
        Box::pin(async move {
            go.wait_for(|go| *go).await.unwrap();
            Ok(())
        })
    }
}

/// A receiver that does not come to the end of the transfer `t`, which is complete, the stream that brought it, and what ends that.
async fn completing(target: &tempfile::TempDir) -> (Server, Stalled, watch::Sender<bool>) {
    let (go, wait) = watch::channel(false);
    let server = Server::start(builder(target.path()).hook(Slow { go: wait })).await;
    let mut first = Stalled::open_with(&server, "n9", "t", 1, 1).await.unwrap();
    first.chunk(0, &Bytes::from_static(b"x")).await;
    first.end(1, crc64(b"x")).await;
    let waiting = [TransferPhase::Verifying, TransferPhase::Installing];
    while !matches!(first.hear().await.unwrap(), Answer::Ack(ack) if waiting.contains(&ack.phase())) {}
    let shown = || server.receiver.transfers().registry().get(Some(Direction::In), "t").unwrap();
    until("it is being installed", || shown().phase() == TransferPhase::Installing).await;
    (server, first, go)
}

/// Another stream of it, on a connection that it shares, which waits for the end.
async fn waits(channel: &Channel, generation: u64) -> Stalled {
    let begun = Stalled::begun("n9", "t", 1, generation);
    let mut stream = Stalled::say_first_on(channel.clone(), begun).await.unwrap();
    let accepted = stream.hear().await.unwrap();
    assert!(matches!(&accepted, Answer::Accepted(accepted) if accepted.already_installed), "{accepted:?}");
    let waiting = stream.hear().await.unwrap();
    assert!(matches!(waiting, Answer::Ack(_)), "{waiting:?}");
    stream
}

async fn connected(server: &Server<impl SnapshotStore>) -> Channel {
    proto_common::tuning::endpoint(&server.uri()).unwrap().connect().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_on_a_stream_that_waits_for_a_completion_is_not_kept() {
    let target = tempfile::tempdir().unwrap();
    let (server, mut first, go) = completing(&target).await;
    let channel = connected(&server).await;
    let mut streams = Vec::new();
    for generation in 2..=4 {
        streams.push(waits(&channel, generation).await);
    }
    // Each less than the window of a stream, all together more than that of the connection, which would be closed until somebody reads them.
    let bytes = Bytes::from(vec![7; 1 << 20]);
    let sending = async {
        for number in 0..7 {
            for stream in &streams {
                stream.chunk(number << 20, &bytes).await;
            }
        }
        let asked = GetTransferProgressRequest { transfer_id: "t".to_owned(), ..Default::default() };
        let answer = SplitSnapshotServiceClient::new(channel.clone()).get_transfer_progress(asked).await;
        answer.unwrap().into_inner().transfer.unwrap().phase()
    };
    let phase = tokio::time::timeout(LONG, sending).await.expect("all of it goes out");
    assert_eq!(phase, TransferPhase::Installing);
    go.send_replace(true);
    for stream in [&mut first].into_iter().chain(&mut streams) {
        stream.installed().await;
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn four_streams_of_a_transfer_wait_for_its_completion_and_one_more_ends_the_oldest() {
    let target = tempfile::tempdir().unwrap();
    let (server, first, go) = completing(&target).await;
    let channel = connected(&server).await;
    let mut streams = std::collections::VecDeque::from([first]);
    for generation in 2..=10 {
        streams.push_back(waits(&channel, generation).await);
        if streams.len() > 4 {
            let replaced = streams.pop_front().unwrap().refusal().await;
            assert!(replaced.is(Reason::StreamEndedEarly) && replaced.is_retryable(), "{replaced:?}");
        }
    }
    go.send_replace(true);
    for mut stream in streams {
        stream.installed().await;
    }
    server.stop().await;
}

/// The first answer that is none of those that say that it waits.
async fn ended(mut stream: Stalled) -> Result<Answer, Error> {
    loop {
        match stream.hear().await {
            Ok(Answer::Ack(_)) => {}
            other => return other,
        }
    }
}

/// Waits until all but one of `streams`, which wait for the same, have been told to end for `reason`, and then has the `brake` go: the last one is accepted.
async fn all_but_one_end(mut streams: JoinSet<Result<Answer, Error>>, reason: Reason, brake: &Brake) {
    while streams.len() > 1 {
        let ended = tokio::time::timeout(LONG, streams.join_next()).await.expect("it does not wait");
        let error = ended.unwrap().unwrap().expect_err("the others wait");
        assert!(error.is(reason), "{error:?}");
    }
    brake.release();
    let last = streams.join_next().await.unwrap().unwrap().unwrap();
    assert!(matches!(last, Answer::Accepted(_)), "{last:?}");
}

async fn slow_store(target: &tempfile::TempDir, brake: &Brake) -> Server<SlowStore> {
    let store = FileSnapshotStore::open(target.path(), FileStoreOptions::default()).unwrap();
    let store = SlowStore { store, brake: brake.clone() };
    Server::start(SnapshotReceiver::builder(&NodeId::new("n2").unwrap(), store)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn of_streams_that_come_to_take_over_one_that_cannot_be_ended_the_last_waits() {
    let (target, brake) = (tempfile::tempdir().unwrap(), Brake::held());
    let server = slow_store(&target, &brake).await;
    let begun = |generation| {
        let mut begun = Stalled::begun("n9", "t", SIZE, generation);
        let Some(Frame::Manifest(manifest)) = begun.last_mut() else { panic!("a manifest comes last") };
        manifest.files[0].blake3 = Some(vec![7; 32].into());
        begun
    };
    // It looks for a file among installed ones, and does not leave off.
    let first = Stalled::say_first(&server, begun(1)).await.unwrap();
    brake.begun.subscribe().wait_for(|begun| *begun > 0).await.unwrap();
    let mut streams = JoinSet::new();
    for generation in 2..10 {
        streams.spawn(ended(Stalled::say_first(&server, begun(generation)).await.unwrap()));
    }
    all_but_one_end(streams, Reason::StreamEndedEarly, &brake).await;
    assert!(ended(first).await.expect_err("it was replaced").is(Reason::StreamEndedEarly));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_streams_that_come_in_place_of_a_lane_that_still_writes_the_last_waits() {
    let (target, brake) = (tempfile::tempdir().unwrap(), Brake::held());
    let server = slow_store(&target, &brake).await;
    let _control = Stalled::open(&server, "n9", "t").await.unwrap();
    let lane = Stalled::lane(&server, "t").await;
    lane.chunk(0, &Bytes::from_static(b"x")).await;
    brake.begun.subscribe().wait_for(|begun| *begun > 0).await.unwrap();
    let mut streams = JoinSet::new();
    for generation in 2..10 {
        let session = vec![1; 16].into();
        let header = LaneHeader { transfer_id: "t".to_owned(), attempt: 1, session, lane: 1, generation };
        let first = vec![Frame::LaneHeader(header)];
        streams.spawn(ended(Stalled::say_first(&server, first).await.unwrap()));
    }
    all_but_one_end(streams, Reason::Superseded, &brake).await;
    server.stop().await;
}

/// Every stream ends the streams of every transfer when the node stops, so each is told by many at once.
#[test]
fn streams_that_are_told_to_end_by_many_at_once_end() {
    const THREADS: usize = 4;
    const ROUNDS: usize = 10;
    let (done, stopped) = std::sync::mpsc::channel();
    let rounds = move |done: std::sync::mpsc::Sender<()>| {
        // A thread that waits for itself stops the clock of its runtime, too.
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
        for _ in 0..ROUNDS {
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
    };
    for _ in 0..THREADS {
        let done = done.clone();
        std::thread::spawn(move || rounds(done));
    }
    drop(done);
    for round in 0..THREADS * ROUNDS {
        assert_eq!(stopped.recv_timeout(support::LONG), Ok(()), "round {round}");
    }
}

//! Every limit of `docs/limits.md`: a node that exceeds it gets the error that is said there, which is counted under its reason, and while it
//! holds whatever it got, other nodes go on and begin.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

#[path = "../../proto-common/tests/support/refusals.rs"]
mod refusals;
#[path = "support/slow.rs"]
mod slow;
#[path = "support/stalled.rs"]
mod stalled;
mod support;

use std::sync::Mutex as SyncMutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use proto_common::checksum::{combine, crc64};
use proto_common::error::{Code, Error};
use proto_common::ids::{NodeId, ShardId};
use proto_common::pace::Signs;
use proto_common::prompt::MAX_REQUEST_BYTES;
use proto_common::refusals::counts;
use proto_common::v1::{Direction, Fence};
use proto_snapshot::SnapshotReceiver;
use proto_snapshot::limits::{Limits, MAX_PAGE_BYTES};
use proto_snapshot::sender::{SenderOptions, SnapshotSender, SnapshotToSend};
use proto_snapshot::source::DirectorySource;
use proto_snapshot::store::{FileSnapshotStore, FileStoreOptions};
use proto_snapshot::v1::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto_snapshot::v1::transfer_split_snapshot_request::{
    File, Frame, Header, Heartbeat, LaneHeader, Manifest,
};
use proto_snapshot::v1::transfer_split_snapshot_response::{Extent, Frame as Answer};
use proto_snapshot::v1::{
    CancelTransferRequest, TransferPhase, TransferProgress, WatchTransferProgressRequest,
};
use refusals::{ALONE, Abuse, Refusal, counted, limits_of};
use slow::{Brake, SlowStore};
use stalled::{SIZE, Stalled};
use support::{LONG, Server, make_tree, small_limits, snapshot, until};
use tokio::task::JoinHandle;
use tonic::transport::Channel;

const CHUNK: u64 = 64 << 10;
const MIB: u64 = 1 << 20;
/// The node that exceeds limits.
const OFFENDER: &str = "n9";

const TOO_MANY: Refusal = Refusal::too_many("TOO_MANY_TRANSFERS");
const INVALID: Refusal = Refusal::invalid("");
const IDLE: Refusal = Refusal { code: Code::DeadlineExceeded, reason: "IDLE_TIMEOUT", ..TOO_MANY };
const NO_DISK: Refusal = Refusal { reason: "INSUFFICIENT_DISK", ..TOO_MANY };
/// What a stream is told whose sender hangs up, and a sender that asks for its transfer before it begins it.
const USUAL: [&str; 2] = ["STREAM_ENDED_EARLY", "TRANSFER_NOT_FOUND"];

/// One limit.
struct Case {
    limits: Limits,
    disk: FileStoreOptions,
    /// Whether nodes are served that come meanwhile; not where the node as a whole is full.
    newcomers: bool,
    /// Whether a transfer is under way when it begins; not where that would have to hurry.
    ongoing: bool,
}

/// A receiver, and what others send there.
struct Bench {
    server: Server<SlowStore>,
    /// Of the offender's writes.
    brake: Brake,
    tree: tempfile::TempDir,
    sent: SyncMutex<u32>,
    _target: tempfile::TempDir,
}

impl Case {
    fn new(lower: impl FnOnce(&mut Limits)) -> Self {
        let mut limits = small_limits();
        lower(&mut limits);
        Self { limits, disk: FileStoreOptions::default(), newcomers: true, ongoing: true }
    }

    /// Of the whole node: nobody gets more while it is full.
    fn of_all(lower: impl FnOnce(&mut Limits)) -> Self {
        Self { newcomers: false, ..Self::new(lower) }
    }

    async fn check(self, exceed: impl AsyncFnOnce(&Bench) -> Abuse) {
        let _alone = ALONE.lock().await;
        let (tree, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        make_tree(tree.path(), 4, 256 << 10, 1);
        let brake = Brake::held_for(OFFENDER);
        brake.release();
        let store = FileSnapshotStore::open(target.path(), self.disk).unwrap();
        let store = SlowStore { store, brake: brake.clone() };
        let builder = SnapshotReceiver::builder(&NodeId::new("n2").unwrap(), store).limits(self.limits);
        let server = Server::start(builder).await;
        let bench = Bench { server, brake, tree, sent: SyncMutex::new(0), _target: target };
        let before = counts();

        let ongoing = if self.ongoing { Some(Ongoing::begin(&bench).await) } else { None };
        let newcomer = async {
            if self.newcomers {
                bench.another_sends().await;
            }
        };
        let (abuse, ()) = tokio::join!(exceed(&bench), newcomer);
        if self.newcomers {
            bench.another_sends().await;
        }
        if let Some(ongoing) = ongoing {
            ongoing.complete().await;
        }
        let Abuse { refused, held, others } = abuse;
        for other in others {
            tokio::time::timeout(LONG, other).await.expect("others go on").unwrap();
        }

        counted(&before, &refused, &USUAL);
        drop(held);
        bench.server.stop().await;
    }
}

impl Bench {
    /// Another node, which nobody has heard of, sends a snapshot, from the beginning to the end.
    async fn another_sends(&self) {
        let number = {
            let mut sent = self.sent.lock().unwrap();
            *sent += 1;
            *sent
        };
        self.send(&format!("m{number}"), &format!("other-{number}")).await;
    }

    async fn send(&self, node: &str, id: &str) {
        let endpoint = proto_common::tuning::endpoint(&self.server.uri()).unwrap();
        let what = SnapshotToSend {
            source_node: NodeId::new(node).unwrap(),
            target_shard: ShardId::new(format!("shard-of-{id}")).unwrap(),
            ..snapshot(id)
        };
        let options = SenderOptions::default();
        let sender = SnapshotSender::new(endpoint).options(options);
        let mut sending = sender.send(what, DirectorySource::new(self.tree.path())).unwrap();
        tokio::time::timeout(LONG, sending.join()).await.expect("it is not held up").unwrap();
    }

    /// A stream of the offender that is accepted.
    async fn offender(&self, id: &str) -> Stalled {
        Stalled::open(&self.server, OFFENDER, id).await.unwrap()
    }

    /// A connection of its own.
    async fn channel(&self) -> Channel {
        proto_common::tuning::endpoint(&self.server.uri()).unwrap().connect().await.unwrap()
    }

    /// One that is not.
    async fn refuses(&self, first: Vec<Frame>) -> Error {
        Stalled::begin(&self.server, first).await.err().expect("it is refused")
    }

    fn shown(&self, id: &str) -> Option<TransferProgress> {
        self.server.receiver.transfers().registry().get(Some(Direction::In), id)
    }
}

/// What the offender says first, with a header of the test's making.
fn begun(id: &str, change: impl FnOnce(&mut Header)) -> Vec<Frame> {
    let mut first = Stalled::begun(OFFENDER, id, SIZE, 1);
    let Frame::Header(header) = &mut first[0] else { panic!("the header comes first") };
    change(header);
    first
}

/// The same of files whose sizes, where they are known, are `sizes`.
fn files(id: &str, sizes: &[Option<u64>]) -> Vec<Frame> {
    let mut first = begun(id, |header| {
        (header.file_count, header.name_bytes) = (sizes.len() as u64, sizes.len() as u64);
        header.total_bytes = sizes.iter().copied().sum();
    });
    let named = |(number, size): (u8, &Option<u64>)| File {
        name: char::from(b'a' + number).to_string(),
        size: *size,
        blake3: None,
    };
    first[1] = Frame::Manifest(Manifest { files: (0..).zip(sizes).map(named).collect(), last: true });
    first
}

fn payload(size: u64) -> Bytes {
    Bytes::from(vec![7; usize::try_from(size).unwrap()])
}

/// A transfer of another node that is under way.
struct Ongoing {
    stream: Stalled,
    beating: JoinHandle<()>,
}

impl Ongoing {
    const ID: &str = "ongoing";

    async fn begin(bench: &Bench) -> Self {
        let stream = Stalled::open(&bench.server, "n1", Self::ID).await.unwrap();
        let frames = stream.frames.clone();
        let beating = tokio::spawn(async move {
            let beat = || Frame::Heartbeat(Heartbeat {});
            while frames.send(stalled::request(beat())).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        Self { stream, beating }
    }

    async fn complete(self) {
        let Self { mut stream, beating } = self;
        let bytes = payload(CHUNK);
        let mut crc = 0;
        for offset in (0..SIZE).step_by(bytes.len()) {
            while stream.credit < offset + CHUNK {
                stream.hear().await.unwrap();
            }
            stream.chunk(offset, &bytes).await;
            crc = combine(crc, crc64(&bytes), CHUNK);
        }
        beating.abort();
        stream.end(SIZE, crc).await;
        stream.installed().await;
    }
}

// ---- Places.

#[tokio::test(flavor = "multi_thread")]
async fn transfers() {
    let full = Refusal { facts: &[("limit", Some("2")), ("peer", None)], ..TOO_MANY };
    let case = Case::of_all(|limits| limits.transfers = 2);
    case.check(async |bench| {
        let held = bench.offender("x1").await;
        Abuse::default().refused(bench.refuses(begun("x2", |_| {})).await, full).holds(held)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn transfers_per_peer() {
    let full = Refusal { facts: &[("limit", Some("2")), ("peer", Some(OFFENDER))], ..TOO_MANY };
    let case = Case::new(|limits| (limits.transfers, limits.transfers_per_peer) = (5, 2));
    case.check(async |bench| {
        let held = [bench.offender("x1").await, bench.offender("x2").await];
        Abuse::default().refused(bench.refuses(begun("x3", |_| {})).await, full).holds(held)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_comes_free_is_given_again() {
    let _alone = ALONE.lock().await;
    let target = tempfile::tempdir().unwrap();
    let mut limits = small_limits();
    limits.transfers_per_peer = 1;
    let server = Server::start(support::builder(target.path()).limits(limits)).await;
    drop(Stalled::open(&server, OFFENDER, "x1").await.unwrap());
    let again = async {
        while let Err(error) = Stalled::open(&server, OFFENDER, "x2").await {
            assert_eq!(error.reason(), "TOO_MANY_TRANSFERS", "{error:?}");
        }
    };
    tokio::time::timeout(LONG, again).await.expect("a place comes free");
    server.stop().await;
}

/// Leaves one behind: it is staged, and not connected.
async fn left_behind(bench: &Bench, id: &str) {
    drop(bench.offender(id).await);
    until("it is interrupted", || bench.shown(id).unwrap().phase() == TransferPhase::Interrupted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn staged() {
    let full = Refusal { facts: &[("limit", Some("3")), ("peer", None)], ..TOO_MANY };
    let case = Case::of_all(|limits| limits.staged = 3);
    case.check(async |bench| {
        left_behind(bench, "x1").await;
        let held = bench.offender("x2").await;
        Abuse::default().refused(bench.refuses(begun("x3", |_| {})).await, full).holds(held)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn staged_per_peer() {
    let full = Refusal { facts: &[("limit", Some("2")), ("peer", Some(OFFENDER))], ..TOO_MANY };
    let case = Case::new(|limits| limits.staged_per_peer = 2);
    case.check(async |bench| {
        left_behind(bench, "x1").await;
        let held = bench.offender("x2").await;
        let mut abuse = Abuse::default().holds(held);
        for id in ["x3", "x4"] {
            abuse = abuse.refused(bench.refuses(begun(id, |_| {})).await, full);
        }
        abuse
    })
    .await;
}

/// A stream of the offender whose transfer may have lanes.
async fn with_lanes(bench: &Bench, id: &str) -> Stalled {
    Stalled::begin(&bench.server, begun(id, |header| header.lanes = u32::MAX)).await.unwrap()
}

fn lane(id: &str, lane: u32) -> LaneHeader {
    let session = vec![1; 16].into();
    LaneHeader { transfer_id: id.to_owned(), attempt: 1, session, lane, generation: 1 }
}

#[tokio::test(flavor = "multi_thread")]
async fn lanes() {
    let beyond = Refusal { reason: "INVALID_FIELD", field: Some("lane_header.lane"), ..INVALID };
    let case = Case::new(|limits| limits.lanes = 3);
    case.check(async |bench| {
        let mut held = vec![with_lanes(bench, "x1").await];
        for number in [1, 2] {
            let header = Frame::LaneHeader(lane("x1", number));
            held.push(Stalled::begin(&bench.server, vec![header]).await.unwrap());
        }
        let refused = bench.refuses(vec![Frame::LaneHeader(lane("x1", 3))]).await;
        Abuse::default().refused(refused, beyond).holds(held)
    })
    .await;
}

/// A stream of lane 1 of `x1`, and all that it is told to be missing.
async fn missing_on_lane(channel: &Channel, generation: u64) -> (Stalled, Vec<Extent>) {
    let header = Frame::LaneHeader(LaneHeader { generation, ..lane("x1", 1) });
    let mut stream = Stalled::say_first_on(channel.clone(), vec![header]).await.unwrap();
    let mut missing = Vec::new();
    loop {
        let Answer::Accepted(page) = stream.hear().await.unwrap() else { panic!("pages come first") };
        missing.extend(page.missing);
        if page.last {
            return (stream, missing);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lanes_are_told_of_runs_of_files_where_their_sender_knows_of_them() {
    Case::new(|_| {})
        .check(async |bench| {
            let (channel, mut abuse) = (bench.channel().await, Abuse::default());
            for (generation, file_runs) in (1..).zip([false, true]) {
                let mut first = files("x1", &[Some(1); 20]);
                let Frame::Header(header) = &mut first[0] else { panic!("the header comes first") };
                (header.generation, header.lanes) = (generation, 2);
                header.supported_features.extend(file_runs.then(|| "file-runs".to_owned()));
                let control = Stalled::begin(&bench.server, first).await.unwrap();
                let (lane, missing) = missing_on_lane(&channel, generation).await;
                assert_eq!(missing.len(), if file_runs { 1 } else { 20 });
                let all: u32 = missing.iter().map(|extent| 1 + extent.more_files).sum();
                assert_eq!(all, 20);
                abuse = abuse.holds((control, lane));
            }
            abuse
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_comes_back_again_and_again_waits_for_its_turn() {
    Case::new(|_| {})
        .check(async |bench| {
            let (channel, control) = (bench.channel().await, with_lanes(bench, "x1").await);
            let began = Instant::now();
            // As many as there are lanes are told at once.
            for generation in 1..=7 + 25 {
                drop(missing_on_lane(&channel, generation).await);
            }
            assert!(began.elapsed() >= Duration::from_millis(2500), "{:?}", began.elapsed());
            Abuse::default().holds(control)
        })
        .await;
}

// ---- Sizes.

#[tokio::test(flavor = "multi_thread")]
async fn chunk_bytes() {
    let too_large = Refusal { reason: "CHUNK_TOO_LARGE", field: Some("chunk.payload"), ..INVALID };
    let case = Case::new(|limits| assert_eq!(u64::from(limits.chunk_bytes), CHUNK));
    case.check(async |bench| {
        let mut stream = bench.offender("x1").await;
        stream.chunk(0, &payload(CHUNK)).await;
        stream.chunk(CHUNK, &payload(CHUNK + 1)).await;
        Abuse::default().refused(stream.refusal().await, too_large).holds(stream)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message() {
    assert_eq!(MAX_PAGE_BYTES, 1 << 20);
    let too_large =
        Refusal { reason: "CHUNK_TOO_LARGE", facts: &[("max_message_bytes", Some("1048576"))], ..INVALID };
    Case::new(|_| {})
        .check(async |bench| {
            let mut stream = bench.offender("x1").await;
            stream.chunk(0, &payload(MIB)).await;
            let chunk = stream.refusal().await;
            let name = "x".repeat(MAX_PAGE_BYTES);
            let page = Manifest { files: vec![File { name, ..File::default() }], last: true };
            let header = begun("x2", |_| {}).remove(0);
            let page = bench.refuses(vec![header, Frame::Manifest(page)]).await;
            // On a lane there are only chunks, and before the header is there, nothing large.
            let control = with_lanes(bench, "x3").await;
            let mut lane =
                Stalled::begin(&bench.server, vec![Frame::LaneHeader(lane("x3", 1))]).await.unwrap();
            lane.chunk(0, &payload(CHUNK + MAX_REQUEST_BYTES as u64)).await;
            let on_lane = lane.refusal().await;
            let of_lane = Refusal { facts: &[("max_message_bytes", Some("81920"))], ..too_large };
            let header = begun("x4", |header| header.source_shard_id = "x".repeat(MAX_REQUEST_BYTES));
            let header = bench.refuses(header).await;
            assert!(header.message().contains("the header has"), "{header:?}");
            let of_header = Refusal { facts: &[("max_message_bytes", Some("16384"))], ..too_large };
            let abuse = Abuse::default().refused(chunk, too_large).refused(page, too_large);
            abuse.refused(on_lane, of_lane).refused(header, of_header).holds((stream, control, lane))
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_has_room_for_a_chunk_that_is_larger_than_a_page() {
    let too_large =
        Refusal { reason: "CHUNK_TOO_LARGE", facts: &[("max_message_bytes", Some("2113536"))], ..INVALID };
    let page = Refusal { facts: &[("max_message_bytes", Some("1048576"))], ..too_large };
    let case = Case::new(|limits| {
        limits.chunk_bytes = 2 << 20;
        limits.stream_credit_bytes = 4 << 20;
    });
    case.check(async |bench| {
        let first = Stalled::begun(OFFENDER, "x1", 4 * MIB, 1);
        let mut stream = Stalled::begin(&bench.server, first).await.unwrap();
        stream.chunk(0, &payload(2 * MIB)).await;
        while !matches!(stream.hear().await.unwrap(), Answer::Ack(ack) if ack.received_bytes == 2 * MIB) {}
        stream.chunk(2 * MIB, &payload(2 * MIB + MAX_REQUEST_BYTES as u64)).await;
        let chunk = stream.refusal().await;
        // Of a manifest that is no larger for that.
        let header = begun("x2", |_| {}).remove(0);
        let name = "x".repeat(MAX_PAGE_BYTES);
        let manifest = Manifest { files: vec![File { name, ..File::default() }], last: true };
        let manifest = bench.refuses(vec![header, Frame::Manifest(manifest)]).await;
        Abuse::default().refused(chunk, too_large).refused(manifest, page).holds(stream)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_a_manifest() {
    let too_many = Refusal {
        reason: "MANIFEST_TOO_LARGE",
        field: Some("header.file_count"),
        facts: &[("limit", Some("8"))],
        ..INVALID
    };
    let liar = Refusal { reason: "MANIFEST_MISMATCH", field: Some("manifest.files"), ..INVALID };
    let case = Case::new(|limits| limits.files = 8);
    case.check(async |bench| {
        let mut abuse = Abuse::default();
        for count in [9, u64::MAX] {
            let first = begun("x1", |header| header.file_count = count);
            abuse = abuse.refused(bench.refuses(first).await, too_many);
        }
        // It declares few, and brings many.
        let mut first = files("x1", &[Some(1); 20]);
        let Frame::Header(header) = &mut first[0] else { panic!("the header comes first") };
        header.file_count = 8;
        abuse.refused(bench.refuses(first).await, liar)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn name_bytes() {
    let too_long = Refusal {
        reason: "MANIFEST_TOO_LARGE",
        field: Some("header.name_bytes"),
        facts: &[("limit", Some("100"))],
        ..INVALID
    };
    let liar = Refusal { reason: "MANIFEST_MISMATCH", field: Some("manifest.files"), ..INVALID };
    let case = Case::new(|limits| limits.name_bytes = 100);
    case.check(async |bench| {
        let mut abuse = Abuse::default();
        for bytes in [101, u64::MAX] {
            let first = begun("x1", |header| header.name_bytes = bytes);
            abuse = abuse.refused(bench.refuses(first).await, too_long);
        }
        let mut first = begun("x1", |header| header.name_bytes = 100);
        let Frame::Manifest(manifest) = &mut first[1] else { panic!("the manifest comes then") };
        manifest.files[0].name = "x".repeat(101);
        abuse.refused(bench.refuses(first).await, liar)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn directories() {
    let too_many = Refusal {
        reason: "MANIFEST_TOO_LARGE",
        field: Some("manifest.files.name"),
        facts: &[("limit", Some("8"))],
        ..INVALID
    };
    let too_deep = Refusal { reason: "INVALID_FILE_NAME", field: Some("manifest.files[1].name"), ..INVALID };
    let named = |id: &str, names: &[String]| {
        let mut first = begun(id, |header| {
            (header.file_count, header.total_bytes) = (names.len() as u64, Some(0));
            header.name_bytes = names.iter().map(|name| name.len() as u64).sum();
        });
        let file = |name: &String| File { name: name.clone(), size: Some(0), blake3: None };
        first[1] = Frame::Manifest(Manifest { files: names.iter().map(file).collect(), last: true });
        first
    };
    let case = Case::new(|limits| limits.directories = 8);
    case.check(async |bench| {
        // In any order, and those that files share are counted once.
        let nine = ["b/1/2/f", "a/1/2/3/4/f", "b/1/3/f", "a/1/f"].map(str::to_owned);
        let refused = bench.refuses(named("x1", &nine)).await;
        let held = Stalled::begin(&bench.server, named("x2", &nine[..2])).await.unwrap();
        let names = ["f".to_owned(), ["d"; 33].join("/")];
        let deep = bench.refuses(named("x3", &names)).await;
        Abuse::default().refused(refused, too_many).refused(deep, too_deep).holds(held)
    })
    .await;
}

/// A file counts as 512 bytes and twice its name; a transfer, as 256 bytes for each piece that it may come in.
const ONE_FILE: u64 = 514 + 1024 * 256;

#[tokio::test(flavor = "multi_thread")]
async fn manifest_memory_bytes() {
    let full = Refusal { facts: &[("limit", Some("525388")), ("peer", None)], ..TOO_MANY };
    let case = Case::of_all(|limits| limits.manifest_memory_bytes = 2 * ONE_FILE + 72);
    case.check(async |bench| {
        let held = bench.offender("x1").await;
        let refused = bench.refuses(begun("x2", |_| {})).await;
        assert!(refused.message().contains("memory"), "{refused}");
        Abuse::default().refused(refused, full).holds(held)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn manifest_memory_per_peer() {
    let full = Refusal { facts: &[("limit", Some("600")), ("peer", Some(OFFENDER))], ..TOO_MANY };
    // The others have more files than that: the only manifest of a node is taken.
    let case = Case::new(|limits| limits.manifest_memory_per_peer = 600);
    case.check(async |bench| {
        let held = bench.offender("x1").await;
        let refused = bench.refuses(begun("x2", |_| {})).await;
        assert!(refused.message().contains("memory"), "{refused}");
        Abuse::default().refused(refused, full).holds(held)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn manifest_memory_for_directories() {
    let full = Refusal { facts: &[("limit", Some("526316")), ("peer", Some(OFFENDER))], ..TOO_MANY };
    let case = Case::new(|limits| limits.manifest_memory_per_peer = 2 * ONE_FILE + 1000);
    case.check(async |bench| {
        let within = |id: &str, dirs: &str| {
            let name = format!("{dirs}f");
            let mut first = begun(id, |header| header.name_bytes = name.len() as u64);
            let Frame::Manifest(manifest) = &mut first[1] else { panic!("the manifest comes then") };
            manifest.files[0].name = name;
            first
        };
        let held = bench.offender("x1").await;
        let refused = bench.refuses(within("x2", "a/b/")).await;
        assert!(refused.message().contains("memory"), "{refused}");
        let held = (held, Stalled::begin(&bench.server, within("x3", "a/")).await.unwrap());
        Abuse::default().refused(refused, full).holds(held)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn extents() {
    let scattered = Refusal { reason: "TOO_FRAGMENTED", field: Some("chunk.offset"), ..INVALID };
    let case = Case::new(|limits| limits.extents = 16);
    case.check(async |bench| {
        let mut stream = bench.offender("x1").await;
        // One for the file, and as many more as the limit says.
        for number in 0..18 {
            stream.chunk(number * 2, &payload(1)).await;
        }
        let refused = stream.refusal().await;
        let durable = || bench.shown("x1").and_then(|shown| shown.progress).map(|shown| shown.bytes_done);
        until("what came before is durable", || durable() == Some(17)).await;
        Abuse::default().refused(refused, scattered).holds(stream)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshot_bytes() {
    let too_large = |field| Refusal {
        reason: "SNAPSHOT_TOO_LARGE",
        field: Some(field),
        facts: &[("limit", Some("1048576"))],
        ..INVALID
    };
    let case = Case::new(|limits| limits.snapshot_bytes = MIB);
    case.check(async |bench| {
        let announced = bench.refuses(files("x1", &[Some(MIB + 1)])).await;
        // Where a size is unknown, so is the sum, which says nothing of what is known of it.
        let known = bench.refuses(files("x2", &[None, Some(MIB - 1), Some(2)])).await;
        let open = async |id: &str, sizes: &[Option<u64>]| {
            Stalled::begin(&bench.server, files(id, sizes)).await.unwrap()
        };
        let mut one = open("x3", &[None]).await;
        one.chunk(MIB - 1, &payload(2)).await;
        let one_file = one.refusal().await;
        let mut all = open("x4", &[None, None]).await;
        all.chunk_of(0, 0, &payload(CHUNK)).await;
        for offset in (0..MIB).step_by(usize::try_from(CHUNK).unwrap()) {
            while all.credit < offset + 2 * CHUNK {
                all.hear().await.unwrap();
            }
            all.chunk_of(1, offset, &payload(CHUNK)).await;
        }
        let all_files = all.refusal().await;
        Abuse::default()
            .refused(announced, too_large("header.total_bytes"))
            .refused(known, too_large("manifest.files[2].size"))
            .refused(one_file, too_large("chunk.offset"))
            .refused(all_files, too_large("chunk.offset"))
            .holds((one, all))
    })
    .await;
}

// ---- The disk.

#[tokio::test(flavor = "multi_thread")]
async fn capacity_bytes() {
    let full = Refusal { facts: &[("needed_bytes", Some("6291456")), ("peer", None)], ..NO_DISK };
    let mut case = Case::new(|_| {});
    (case.disk.capacity_bytes, case.disk.percent_per_peer) = (Some(16 * MIB), 100);
    case.check(async |bench| {
        let held = Stalled::open_with(&bench.server, OFFENDER, "x1", 10 * MIB, 1).await.unwrap();
        let refused = Stalled::open_with(&bench.server, OFFENDER, "x2", 6 * MIB, 1).await.err();
        Abuse::default().refused(refused, full).holds(held)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn min_free_bytes() {
    let full =
        Refusal { facts: &[("needed_bytes", Some("1048576")), ("available_bytes", Some("0"))], ..NO_DISK };
    let mut case = Case { ongoing: false, ..Case::of_all(|_| {}) };
    case.disk.min_free_bytes = u64::MAX / 2;
    case.check(async |bench| Abuse::default().refused(bench.refuses(begun("x1", |_| {})).await, full)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn min_free_files() {
    let dir = tempfile::tempdir().unwrap();
    if rustix::fs::statvfs(dir.path()).unwrap().f_files == 0 {
        return eprintln!("SKIPPED: this file system makes as many files as there is room for");
    }
    let facts: &[_] = &[("needed_files", Some("1")), ("available_files", Some("0")), ("needed_bytes", None)];
    let full = Refusal { facts, ..NO_DISK };
    let mut case = Case { ongoing: false, ..Case::of_all(|_| {}) };
    case.disk.min_free_files = u64::MAX / 2;
    case.check(async |bench| Abuse::default().refused(bench.refuses(begun("x1", |_| {})).await, full)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn percent_per_peer() {
    let full = Refusal { facts: &[("needed_bytes", Some("2097152")), ("peer", Some(OFFENDER))], ..NO_DISK };
    let mut case = Case::new(|_| {});
    (case.disk.capacity_bytes, case.disk.percent_per_peer) = (Some(16 * MIB), 75);
    case.check(async |bench| {
        let held = Stalled::open_with(&bench.server, OFFENDER, "x1", 10 * MIB, 1).await.unwrap();
        let refused = Stalled::open_with(&bench.server, OFFENDER, "x2", 2 * MIB, 1).await.err();
        Abuse::default().refused(refused, full).holds(held)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_per_peer() {
    let facts: &[_] = &[("limit", Some("1")), ("peer", Some(OFFENDER))];
    let too_many = Refusal { reason: "TOO_MANY_SHARDS", retryable: false, facts, ..TOO_MANY };
    let mut case = Case::new(|_| {});
    case.disk.shards_per_peer = 1;
    case.check(async |bench| {
        let fenced = |id| begun(id, |header| header.fence = Some(Fence { epoch: 1, term: 1 }));
        let held = Stalled::begin(&bench.server, fenced("x1")).await.unwrap();
        Abuse::default().refused(bench.refuses(fenced("x2")).await, too_many).holds(held)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn installed_per_peer() {
    let facts: &[_] = &[("limit", Some("1")), ("peer", Some(OFFENDER))];
    let too_many = Refusal { reason: "TOO_MANY_SHARDS", retryable: false, facts, ..TOO_MANY };
    let mut case = Case::new(|_| {});
    case.disk.installed_per_peer = 1;
    case.check(async |bench| {
        bench.send(OFFENDER, "x1").await;
        Abuse::default().refused(bench.refuses(begun("x2", |_| {})).await, too_many)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn receive_budget_bytes() {
    let beyond = Refusal { reason: "CREDIT_EXCEEDED", field: Some("chunk.payload"), ..INVALID };
    // Half of it for the node that is there, and a quarter of it for each of two streams.
    let case = Case::new(|limits| limits.receive_budget_bytes = 8 * CHUNK);
    case.check(async |bench| {
        bench.brake.hold();
        let first = bench.offender("x1").await;
        let mut second = bench.offender("x2").await;
        assert!(second.credit <= 2 * CHUNK, "{}", second.credit);
        // It may rise to that, when a newcomer that shares it is done.
        for offset in (0..=2 * CHUNK).step_by(usize::try_from(CHUNK).unwrap()) {
            second.chunk(offset, &payload(CHUNK)).await;
        }
        bench.brake.begun.subscribe().wait_for(|begun| *begun > 0).await.unwrap();
        bench.another_sends().await;
        bench.brake.release();
        Abuse::default().refused(second.refusal().await, beyond).holds((first, second))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lanes_are_given_while_each_stream_has_a_chunk_of_the_budget() {
    let beyond = Refusal { reason: "INVALID_FIELD", field: Some("lane_header.lane"), ..INVALID };
    let case = Case::new(|limits| limits.receive_budget_bytes = 8 * CHUNK);
    case.check(async |bench| {
        let begin = async |id| {
            let first = begun(id, |header| header.lanes = u32::MAX);
            let mut stream = Stalled::say_first(&bench.server, first).await.unwrap();
            let Answer::Accepted(accepted) = stream.hear().await.unwrap() else { panic!("it is accepted") };
            assert!(accepted.last);
            (stream, accepted.max_lanes)
        };
        // Half of what the one that is under way leaves, and a newcomer.
        let (first, lanes) = begin("x1").await;
        assert!((2..=3).contains(&lanes), "{lanes}");
        let refused = bench.refuses(vec![Frame::LaneHeader(lane("x1", lanes))]).await;
        // A transfer has its own stream in any case.
        let (second, lanes) = begin("x2").await;
        assert_eq!(lanes, 1);
        let other = bench.refuses(vec![Frame::LaneHeader(lane("x2", 1))]).await;
        // What it gives up is there again.
        drop(first);
        let again = async {
            for generation in 2.. {
                let mut first = begun("x3", |header| header.lanes = u32::MAX);
                let Frame::Header(header) = &mut first[0] else { panic!("the header comes first") };
                header.generation = generation;
                let mut stream = Stalled::say_first(&bench.server, first).await.unwrap();
                let Answer::Accepted(accepted) = stream.hear().await.unwrap() else {
                    panic!("it is accepted")
                };
                if accepted.max_lanes > 1 {
                    return stream;
                }
            }
            unreachable!()
        };
        let third = tokio::time::timeout(LONG, again).await.expect("it has lanes");
        Abuse::default().refused(refused, beyond).refused(other, beyond).holds((second, third))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unsynced_bytes() {
    const CHUNKS: u64 = 4000;
    let case = Case::new(|limits| (limits.unsynced_bytes, limits.unsynced_time) = (4 * MIB, LONG));
    case.check(async |bench| {
        let first = files("x1", &[Some(MIB), Some(MIB)]);
        let mut stream = Stalled::begin(&bench.server, first).await.unwrap();
        // Each is one piece, but what comes behind the other does not go on where that ends.
        for number in 0..CHUNKS {
            stream.chunk_of(u32::try_from(number % 2).unwrap(), number / 2, &payload(1)).await;
        }
        while !matches!(stream.hear().await.unwrap(), Answer::Ack(ack) if ack.received_bytes == CHUNKS) {}
        drop(stream);
        let durable = || bench.shown("x1").and_then(|shown| shown.progress).map(|shown| shown.bytes_done);
        until("all of it is durable", || durable() == Some(CHUNKS)).await;
        let most = bench.brake.most_synced.load(Ordering::SeqCst);
        assert!(most <= 1024, "{most} of one byte are as much as that many blocks");
        Abuse::default()
    })
    .await;
}

// ---- Reuse.

/// What a sender says first of a file that may be here already.
fn with_digest(node: &str, id: &str, generation: u64) -> Vec<Frame> {
    let mut first = Stalled::begun(node, id, SIZE, generation);
    let Frame::Manifest(manifest) = &mut first[1] else { panic!("the manifest comes second") };
    manifest.files[0].blake3 = Some(vec![7; 32].into());
    first
}

async fn reusing(brake: Brake, limits: Limits) -> (Server<SlowStore>, tempfile::TempDir) {
    let target = tempfile::tempdir().unwrap();
    let store = FileSnapshotStore::open(target.path(), FileStoreOptions::default()).unwrap();
    let builder = SnapshotReceiver::builder(&NodeId::new("n2").unwrap(), SlowStore { store, brake });
    (Server::start(builder.limits(limits)).await, target)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_files_are_reused_at_once_and_one_of_each_node() {
    let _alone = ALONE.lock().await;
    let brake = Brake::held();
    let mut limits = small_limits();
    // Three signs of life in that time.
    limits.idle = Duration::from_secs(1);
    let (server, _target) = reusing(brake.clone(), limits).await;
    let mut streams = Vec::new();
    for (node, id) in [("x", "x1"), ("x", "x2"), ("x", "x3"), ("y", "y1"), ("y", "y2"), ("z", "z1")] {
        let mut stream = Stalled::say_first(&server, with_digest(node, id, 1)).await.unwrap();
        // Between the first and the second one it has come as far as it can.
        for _ in 0..2 {
            let heard = stream.hear().await.unwrap();
            assert!(matches!(heard, Answer::Ack(_)), "{heard:?}");
        }
        streams.push(stream);
    }
    assert_eq!(brake.reuses.lock().unwrap().now, ["x", "y"]);
    // One that waits for its turn leaves when it is told to, or its sender is gone.
    drop(streams.pop());
    let shown = |id: &str| server.receiver.transfers().registry().get(Some(Direction::In), id).unwrap();
    until("it is gone", || shown("z1").phase() == TransferPhase::Interrupted).await;
    brake.release();
    for stream in &mut streams {
        while matches!(stream.hear().await.unwrap(), Answer::Ack(_)) {}
    }
    {
        let reuses = brake.reuses.lock().unwrap();
        assert_eq!((reuses.now.len(), reuses.most, reuses.ever), (0, (2, 1), 5));
    }
    drop(streams);
    server.stop().await;
}

/// Copying a large file takes minutes, in which the slots stay held.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_ends_a_copy_that_is_under_way() {
    let _alone = ALONE.lock().await;
    let brake = Brake::held();
    let (server, _target) = reusing(brake.clone(), small_limits()).await;
    let reuses = || {
        let reuses = brake.reuses.lock().unwrap();
        (reuses.now.len(), reuses.ever, reuses.stopped)
    };
    let _stream = Stalled::say_first(&server, with_digest(OFFENDER, "x1", 1)).await.unwrap();
    until("it is copied", || reuses() == (1, 1, 0)).await;
    let request = CancelTransferRequest { transfer_id: "x1".to_owned(), ..CancelTransferRequest::default() };
    let channel = proto_common::tuning::endpoint(&server.uri()).unwrap().connect().await.unwrap();
    SplitSnapshotServiceClient::new(channel).cancel_transfer(request).await.unwrap();
    assert_eq!(reuses(), (0, 1, 1));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_comes_back_has_nothing_looked_for_again() {
    let _alone = ALONE.lock().await;
    let brake = Brake::held();
    brake.release();
    let (server, _target) = reusing(brake.clone(), small_limits()).await;
    for generation in 1..=3 {
        drop(Stalled::begin(&server, with_digest(OFFENDER, "x1", generation)).await.unwrap());
        assert_eq!(brake.reuses.lock().unwrap().ever, 1, "of generation {generation}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reuse_bytes_per_peer() {
    let _alone = ALONE.lock().await;
    let brake = Brake::released();
    let mut limits = small_limits();
    limits.reuse_bytes_per_peer = SIZE;
    let (server, _target) = reusing(brake.clone(), limits).await;
    let bytes = payload(SIZE);
    let first = |node: &str, id: &str, attempt: u64| {
        let mut first = with_digest(node, id, 1);
        let Frame::Header(header) = &mut first[0] else { panic!("the header comes first") };
        (header.attempt, header.discard_staged) = (attempt, attempt > 1);
        let Frame::Manifest(manifest) = &mut first[1] else { panic!("the manifest comes second") };
        manifest.files[0].blake3 = Some(blake3::hash(&bytes).as_bytes().to_vec().into());
        first
    };
    // How much of it is found, of which the rest is asked of its sender.
    let begin = async |node: &str, id: &str, attempt| {
        let mut stream = Stalled::say_first(&server, first(node, id, attempt)).await.unwrap();
        loop {
            match stream.hear().await.unwrap() {
                Answer::Ack(_) => {}
                Answer::Accepted(accepted) => {
                    let missing: u64 = accepted.missing.iter().filter_map(|extent| extent.length).sum();
                    assert_eq!(accepted.reused_bytes + missing, SIZE);
                    stream.credit = accepted.credit_limit;
                    return (stream, accepted.reused_bytes);
                }
                other => panic!("not accepted: {other:?}"),
            }
        }
    };
    let send = async |stream: &mut Stalled| {
        for offset in (0..SIZE).step_by(usize::try_from(CHUNK).unwrap()) {
            while stream.credit < offset + CHUNK {
                stream.hear().await.unwrap();
            }
            stream.chunk(offset, &payload(CHUNK)).await;
        }
        stream.end(SIZE, crc64(&bytes)).await;
        stream.installed().await;
    };
    let (mut stream, found) = begin(OFFENDER, "x1", 1).await;
    assert_eq!(found, 0);
    send(&mut stream).await;
    let (held, found) = begin(OFFENDER, "x2", 1).await;
    assert_eq!(found, SIZE);
    let looked = || brake.reuses.lock().unwrap().ever;
    assert_eq!(looked(), 2);
    // The disk does not read and write it again, whether it begins anew or under another ID.
    let (anew, found) = begin(OFFENDER, "x2", 2).await;
    assert_eq!((found, looked()), (0, 2));
    let (mut another, found) = begin(OFFENDER, "x3", 1).await;
    assert_eq!((found, looked()), (0, 2));
    // Others have their own share, and its sender goes on.
    let (other, found) = begin("n8", "y1", 1).await;
    assert_eq!((found, looked()), (SIZE, 3));
    send(&mut another).await;
    drop((held, anew, other));
    server.stop().await;
}

// ---- Time.

#[tokio::test(flavor = "multi_thread")]
async fn first_frame() {
    let case = Case::new(|limits| limits.first_frame = Duration::from_millis(500));
    case.check(async |bench| {
        let nothing = bench.refuses(vec![]);
        let header = bench.refuses(vec![begun("x1", |_| {}).remove(0)]);
        let page = async {
            let mut first = begun("x2", |header| header.file_count = 2);
            let Frame::Manifest(page) = &mut first[1] else { panic!("the manifest comes then") };
            page.last = false;
            bench.refuses(first).await
        };
        // It says something each time, and never comes to the end: ten times that, for the whole manifest.
        let never_ends = async {
            let mut stream =
                Stalled::say_first(&bench.server, vec![begun("x3", |_| {}).remove(0)]).await.unwrap();
            let frames = stream.frames.clone();
            let beating = tokio::spawn(async move {
                let mut beats = 0;
                while frames.send(stalled::request(Frame::Heartbeat(Heartbeat {}))).await.is_ok() {
                    beats += 1;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                beats
            });
            let refused = stream.refusal().await;
            drop(stream);
            assert!(beating.await.unwrap() > 10, "it was refused for its length, not for its silence");
            assert!(refused.message().contains("5s"), "{refused}");
            refused
        };
        let (nothing, header, page, never_ends) = tokio::join!(nothing, header, page, never_ends);
        let all = [nothing, header, page, never_ends];
        all.into_iter().fold(Abuse::default(), |abuse, refused| abuse.refused(refused, IDLE))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn idle() {
    let case = Case::new(|limits| limits.idle = Duration::from_secs(1));
    case.check(async |bench| {
        let mut silent = bench.offender("x1").await;
        // A lane is not kept alive by its control stream.
        let control = bench.offender("x2").await;
        let mut lane = Stalled::lane(&bench.server, "x2").await;
        let beating = async {
            loop {
                control.say(Frame::Heartbeat(Heartbeat {})).await;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let refused = tokio::select! {
            both = async { (silent.refusal().await, lane.refusal().await) } => both,
            () = beating => unreachable!(),
        };
        // Silence would be refused from here on.
        drop(control);
        Abuse::default().refused(refused.0, IDLE).refused(refused.1, IDLE).holds((silent, lane))
    })
    .await;
}

/// Who fills a connection with signs of life has few of them looked at.
#[tokio::test(flavor = "multi_thread")]
async fn signs_of_life_on_end() {
    const SIGNS: u32 = 100;
    let empty = Refusal { field: Some("chunk.payload"), ..Refusal::invalid("EMPTY_CHUNK") };
    let case = Case::new(|_| {});
    case.check(async |bench| {
        let mut stream = bench.offender("x1").await;
        let began = Instant::now();
        for _ in 0..SIGNS {
            stream.say(Frame::Heartbeat(Heartbeat {})).await;
        }
        stream.chunk(0, &Bytes::new()).await;
        let refused = stream.refusal().await;
        assert!(began.elapsed() >= Signs::REST * (SIGNS - 1), "{:?}", began.elapsed());
        Abuse::default().refused(refused, empty).holds(stream)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slowest() {
    let slow = Refusal { code: Code::DeadlineExceeded, reason: "TOO_SLOW", ..TOO_MANY };
    let mut case = Case::new(|limits| {
        // It has the only place until it is found too slow: then others get that.
        limits.transfers = 1;
        (limits.slowest_bytes, limits.slowest_time) = (64 << 10, Duration::from_millis(500));
    });
    (case.ongoing, case.newcomers) = (false, false);
    case.check(async |bench| {
        let mut stream = bench.offender("x1").await;
        let frames = stream.frames.clone();
        let bytes = tokio::spawn(async move {
            for offset in 0.. {
                let payload = Bytes::from_static(b"x");
                for frame in [stalled::chunk(0, offset, &payload), Frame::Heartbeat(Heartbeat {})] {
                    if frames.send(stalled::request(frame)).await.is_err() {
                        return offset;
                    }
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            0
        });
        let refused = stream.refusal().await;
        assert!(refused.message().contains("65536 bytes within 500ms"), "{refused}");
        bench.another_sends().await;
        // What it brought is there.
        let kept = || bench.shown("x1").and_then(|shown| shown.progress).map_or(0, |shown| shown.bytes_done);
        assert!(kept() > 1, "it was refused for its rate, not for its silence");
        drop(stream);
        assert!(bytes.await.unwrap() > 1);
        Abuse::default().refused(refused, slow)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_after() {
    let case = Case::new(|limits| limits.stale_after = Duration::from_millis(300));
    case.check(async |bench| {
        drop(bench.offender("x1").await);
        until("it expired", || bench.shown("x1").unwrap().phase() == TransferPhase::Expired).await;
        // One that is connected is not stale, however old.
        let ongoing = bench.shown(Ongoing::ID).unwrap();
        assert_ne!(ongoing.phase(), TransferPhase::Expired);
        Abuse::default()
    })
    .await;
}

// ---- What is remembered, and who looks.

#[tokio::test(flavor = "multi_thread")]
async fn history() {
    let case = Case::new(|limits| limits.history = 2);
    case.check(async |bench| {
        for id in ["x1", "x2", "x3"] {
            bench.send(OFFENDER, id).await;
        }
        assert_eq!(bench.shown("x1"), None, "the oldest is forgotten");
        assert_eq!(bench.shown("x3").unwrap().phase(), TransferPhase::Installed);
        let page = bench.server.receiver.transfers().registry().list(|_, _| true, 100, "").unwrap();
        let finished = page.items.iter().filter(|shown| shown.is_finished()).count();
        assert!(finished <= 2, "{finished}");
        assert!(!bench.shown(Ongoing::ID).unwrap().is_finished(), "what runs is never forgotten");
        Abuse::default()
    })
    .await;
}

type Watch = tonic::Streaming<proto_snapshot::v1::WatchTransferProgressResponse>;

/// A watch of the transfer that is under way. In plaintext, a peer is an address, whatever it opens.
async fn watch_from(bench: &Bench, address: [u8; 4]) -> Result<Watch, Error> {
    let endpoint = proto_common::tuning::endpoint(&bench.server.uri()).unwrap();
    let channel = endpoint.local_address(Some(address.into())).connect().await.unwrap();
    let request = WatchTransferProgressRequest { transfer_id: Ongoing::ID.to_owned(), ..Default::default() };
    let mut client = SplitSnapshotServiceClient::new(channel);
    let mut watch = client.watch_transfer_progress(request).await?.into_inner();
    assert!(watch.message().await.unwrap().is_some());
    Ok(watch)
}

/// Watches until it ends.
fn watches_on(mut watch: Watch) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut last = None;
        while let Some(next) = watch.message().await.unwrap() {
            last = next.transfer;
        }
        assert_eq!(last.unwrap().phase(), TransferPhase::Installed);
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers() {
    let full =
        Refusal { reason: "TOO_MANY_WATCHERS", facts: &[("limit", Some("3")), ("peer", None)], ..TOO_MANY };
    let case = Case::new(|limits| limits.watchers = 3);
    case.check(async |bench| {
        let other = watches_on(watch_from(bench, [127, 0, 0, 2]).await.unwrap());
        let held = [watch_from(bench, [127, 0, 0, 1]).await, watch_from(bench, [127, 0, 0, 1]).await];
        let held = held.map(Result::unwrap);
        let refused = watch_from(bench, [127, 0, 0, 1]).await.err();
        Abuse { others: vec![other], ..Abuse::default() }.refused(refused, full).holds(held)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers_per_peer() {
    let full = Refusal {
        reason: "TOO_MANY_WATCHERS",
        facts: &[("limit", Some("2")), ("peer", Some("127.0.0.1"))],
        ..TOO_MANY
    };
    let case = Case::new(|limits| (limits.watchers, limits.watchers_per_peer) = (3, 2));
    case.check(async |bench| {
        let mut held = Vec::new();
        for _ in 0..2 {
            held.push(watch_from(bench, [127, 0, 0, 1]).await.unwrap());
        }
        let refused = watch_from(bench, [127, 0, 0, 1]).await.err();
        let other = watches_on(watch_from(bench, [127, 0, 0, 2]).await.unwrap());
        Abuse { others: vec![other], ..Abuse::default() }.refused(refused, full).holds(held)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_ends_leaves_its_place() {
    let case = Case::new(|limits| limits.watchers_per_peer = 1);
    case.check(async |bench| {
        drop(watch_from(bench, [127, 0, 0, 1]).await.unwrap());
        let mut abuse = Abuse::default();
        let again = async {
            loop {
                match watch_from(bench, [127, 0, 0, 1]).await {
                    Ok(watch) => return abuse.holds(watch),
                    Err(error) => {
                        let full = Refusal { reason: "TOO_MANY_WATCHERS", ..TOO_MANY };
                        abuse = abuse.refused(error, full);
                    }
                }
            }
        };
        tokio::time::timeout(LONG, again).await.expect("a place comes free")
    })
    .await;
}

/// So that no row of the table is forgotten here: each limit is lowered, or exceeded by its name.
#[test]
fn every_limit_of_the_table_is_here() {
    let here = include_str!("limits.rs");
    let limits = limits_of("Snapshots:");
    for name in &limits {
        let name = name.rsplit(':').next().unwrap();
        assert!(
            ["limits.", "disk.", "async fn "].iter().any(|at| here.contains(&format!("{at}{name}"))),
            "no test exceeds {name}"
        );
    }
    assert!(limits.len() >= 24, "the table was found: {limits:?}");
}

//! A client that knows the `.proto`s and means harm, against a real node, while another peer sends snapshots: it gets nowhere, the other one
//! goes on, and what it made the node take is given back. In plaintext, and with a valid certificate of a node.

use crate::support;
use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::certificates::{Ca, Issue};
use crate::support::proxy::{self, Proxy, Ways};
use crate::support::{call, client, program, split_says, until};
use node::demo::processes::NodeProcess;
use proto::common::checksum::crc64;
use proto::common::connect::Connect as _;
use proto::common::dial::{Dialer, NodeChannel};
use proto::common::error::{Code, Error};
use proto::common::ids::{NodeId, ShardId, TransferId};
use proto::common::limits::ConnectionLimits;
use proto::common::slots::SlotRange;
use proto::common::tls::{Tls, TlsPem};
use proto::common::v1::Priority;
use proto::node::health_service_client::HealthServiceClient;
use proto::node::migration_service_client::MigrationServiceClient;
use proto::node::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto::node::transfer_split_snapshot_request::{Chunk, File, Frame, Header, LaneHeader, Manifest};
use proto::node::transfer_split_snapshot_response::Frame as Answer;
use proto::node::{
    Direction, GetMigrationProgressRequest, GetNodeStatusRequest, GetTransferProgressRequest,
    ListTransfersRequest, MigrationSpec, MigrationState, NodeIdentity, TransferMigrationDataRequest,
    TransferPhase, TransferSplitSnapshotRequest, TransferSplitSnapshotResponse, WatchHealthRequest,
    WatchTransferProgressRequest, transfer_migration_data_request as migration,
    transfer_migration_data_response as migration_answer,
};
use proto::snapshot::sender::{SnapshotSender, SnapshotToSend};
use proto::snapshot::source::FileSource;
use proto::snapshot::spec::SnapshotPoint;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, TcpStream};
use tokio::runtime::{Builder, Handle};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

const MIB: usize = 1 << 20;
/// The name of the hostile one.
const EVIL: &str = "n9";

async fn channel(node: &NodeProcess, dialer: &Dialer) -> NodeChannel {
    dialer.to(&node.addresses().grpc, None).unwrap().connect().await.unwrap()
}

fn header(id: &str, attempt: u64, session: u8, name: &str, size: u64) -> Header {
    Header {
        transfer_id: id.to_owned(),
        source_shard_id: "s1".to_owned(),
        target_shard_id: "evil".to_owned(),
        source_node_id: EVIL.to_owned(),
        slots: Some(SlotRange::new(0, 1).unwrap().into()),
        snapshot_index: 1,
        snapshot_term: 1,
        attempt,
        session: vec![session; 16].into(),
        generation: 1,
        file_count: 1,
        name_bytes: name.len() as u64,
        total_bytes: Some(size),
        ..Header::default()
    }
}

fn manifest(name: &str, size: u64) -> Frame {
    let file = File { name: name.to_owned(), size: Some(size), blake3: None };
    Frame::Manifest(Manifest { files: vec![file], last: true })
}

struct Stream {
    frames: mpsc::Sender<TransferSplitSnapshotRequest>,
    answers: Streaming<TransferSplitSnapshotResponse>,
}

impl Stream {
    async fn open(channel: &NodeChannel, first: impl IntoIterator<Item = Frame>) -> Result<Self, Error> {
        let (frames, requests) = mpsc::channel(64);
        for frame in first {
            frames.send(TransferSplitSnapshotRequest { frame: Some(frame) }).await.unwrap();
        }
        let mut client = SplitSnapshotServiceClient::new(channel.clone());
        let answers = client.transfer_split_snapshot(ReceiverStream::new(requests)).await?.into_inner();
        Ok(Self { frames, answers })
    }

    async fn say(&self, frame: Frame) {
        let _ = self.frames.send(TransferSplitSnapshotRequest { frame: Some(frame) }).await;
    }

    async fn accepted(&mut self) -> Result<(), Error> {
        let answer = self.answers.message().await?.unwrap().frame.unwrap();
        assert!(matches!(answer, Answer::Accepted(_)), "{answer:?}");
        Ok(())
    }

    async fn refusal(&mut self) -> Error {
        loop {
            match self.answers.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("an end without a refusal"),
                Err(status) => return Error::from(status),
            }
        }
    }
}

async fn refused(channel: &NodeChannel, first: impl IntoIterator<Item = Frame>) -> Error {
    match Stream::open(channel, first).await {
        Ok(mut stream) => stream.refusal().await,
        Err(error) => error,
    }
}

/// Sends one snapshot as any peer does; how long it took.
async fn send(node: &NodeProcess, dialer: &Dialer, file: &Path, number: u64) -> Duration {
    let sender = SnapshotSender::new(dialer.to(&node.addresses().grpc, None).unwrap());
    let snapshot = SnapshotToSend {
        transfer_id: TransferId::new(format!("good-{number}")).unwrap(),
        source_shard: ShardId::new("s1").unwrap(),
        target_shard: ShardId::new("good").unwrap(),
        source_node: NodeId::new("n2").unwrap(),
        target_node: None,
        slots: SlotRange::new(100, 200).unwrap(),
        point: SnapshotPoint { term: 1, index: number },
        fence: None,
        priority: Priority::Split,
    };
    let began = Instant::now();
    sender.send(snapshot, FileSource::new(file)).unwrap().join().await.unwrap();
    began.elapsed()
}

/// Resident memory in bytes, open file descriptors.
fn usage(node: &NodeProcess) -> (usize, usize) {
    let pid = node.pid().unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let kib: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    (kib << 10, std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count())
}

/// Everything below `dir`, by name.
fn names(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        found.push(path.display().to_string());
        if path.is_dir() {
            found.extend(names(&path));
        }
    }
    found.sort();
    found
}

/// Names that would lead out of the staging directory, or that a careless store would take for another.
async fn names_that_escape(channel: &NodeChannel) {
    let deep = "d/".repeat(600);
    let long = "x".repeat(256);
    for name in [
        "../escaped",
        "a/../../escaped",
        "/tmp/escaped",
        "//escaped",
        "a//b",
        ".",
        "..",
        "",
        "a/",
        "a\0b",
        "a\\..\\b",
        "a\nb",
        deep.as_str(),
        long.as_str(),
        "\u{202e}a\u{7f}",
    ] {
        let error = refused(channel, [Frame::Header(header("esc", 1, 1, name, 4)), manifest(name, 4)]).await;
        assert_eq!(error.reason(), "INVALID_FILE_NAME", "{name:?}: {error:?}");
        assert!(!error.message().chars().any(char::is_control));
    }
    for id in ["../escaped", "/tmp/escaped", ".hidden", "..", "a/b", "a\0", ""] {
        for field in 0..2 {
            let mut header = header("esc", 1, 1, "a", 4);
            *(if field == 0 { &mut header.transfer_id } else { &mut header.target_shard_id }) = id.to_owned();
            let error = refused(channel, [Frame::Header(header)]).await;
            assert_eq!(error.reason(), "INVALID_ID", "{id:?}: {error:?}");
        }
    }
}

/// Sizes and counts that would exhaust disk and memory if they were believed.
async fn sizes_that_exhaust(channel: &NodeChannel, round: u64) {
    let error =
        refused(channel, [Frame::Header(header("big", 1, 1, "a", 1 << 60)), manifest("a", 1 << 60)]).await;
    assert_eq!(error.reason(), "INSUFFICIENT_DISK", "{error:?}");
    assert!(!error.message().contains('/'), "{error}");
    for (files, names) in [(u64::MAX, 1), (1, u64::MAX)] {
        let header = Header { file_count: files, name_bytes: names, ..header("big", 1, 1, "a", 4) };
        let error = refused(channel, [Frame::Header(header)]).await;
        assert_eq!(error.reason(), "MANIFEST_TOO_LARGE", "{error:?}");
    }
    let first = [Frame::Header(header("large", round + 1, 1, "a", 64 << 20)), manifest("a", 64 << 20)];
    let mut stream = Stream::open(channel, first).await.unwrap();
    stream.accepted().await.unwrap();
    let payload = bytes::Bytes::from(vec![0; 5 * MIB]);
    stream.say(Frame::Chunk(Chunk { file: 0, offset: 0, crc64nvme: crc64(&payload), payload })).await;
    assert_eq!(stream.refusal().await.reason(), "CHUNK_TOO_LARGE");
}

/// Attempts that were replaced, and sessions that are somebody else's.
async fn old_attempts(channel: &NodeChannel, round: u64) {
    let before = 3 * round;
    let open = |attempt, session| {
        [Frame::Header(header("race", before + attempt, session, "a", 4)), manifest("a", 4)]
    };
    let mut first = Stream::open(channel, open(1, 1)).await.unwrap();
    first.accepted().await.unwrap();
    let mut second = Stream::open(channel, open(2, 2)).await.unwrap();
    second.accepted().await.unwrap();
    assert_eq!(first.refusal().await.reason(), "SUPERSEDED");
    assert_eq!(refused(channel, open(1, 1)).await.reason(), "SUPERSEDED", "replayed");
    assert_eq!(refused(channel, open(2, 9)).await.reason(), "SUPERSEDED", "with another session");
    let lane = LaneHeader {
        transfer_id: "race".to_owned(),
        attempt: before + 2,
        session: vec![9; 16].into(),
        lane: 1,
        generation: 1,
    };
    let error = refused(channel, [Frame::LaneHeader(lane)]).await;
    assert!(["NO_SUCH_ATTEMPT", "SUPERSEDED"].contains(&error.reason()), "{error:?}");
    // A stream that is accepted and says nothing is in the way of nobody but itself: the next attempt takes over at once.
    let mut third = Stream::open(channel, open(3, 3)).await.unwrap();
    third.accepted().await.unwrap();
    assert_eq!(second.refusal().await.reason(), "SUPERSEDED");
}

/// Begins a migration of one slot to a node, and keeps its stream open.
async fn migration(
    channel: &NodeChannel,
    id: &str,
    attempt: u64,
    slot: u16,
    target: &str,
) -> Result<impl Sized + use<>, Error> {
    let header = migration::Header {
        migration_id: id.to_owned(),
        spec: Some(MigrationSpec {
            slots: Some(SlotRange::new(slot, slot + 1).unwrap().into()),
            source_shard_id: "s1".to_owned(),
            target_shard_id: "s2".to_owned(),
            source_node_id: EVIL.to_owned(),
            target_node_id: target.to_owned(),
            ..MigrationSpec::default()
        }),
        purpose: migration::Purpose::Transfer.into(),
        source: Some(NodeIdentity {
            node_id: EVIL.to_owned(),
            store_id: vec![1; 16].into(),
            cluster_id: String::new(),
            ..NodeIdentity::default()
        }),
        attempt,
        session: vec![7; 16].into(),
        copy: 1,
        ..migration::Header::default()
    };
    let (frames, requests) = mpsc::channel(4);
    let first = TransferMigrationDataRequest { frame: Some(migration::Frame::Header(header)) };
    frames.send(first).await.unwrap();
    let mut client = MigrationServiceClient::new(channel.clone());
    let mut answers = client.transfer_migration_data(ReceiverStream::new(requests)).await?.into_inner();
    let frame = answers.message().await?.unwrap().frame;
    assert!(matches!(frame, Some(migration_answer::Frame::Accepted(_))), "{frame:?}");
    Ok((frames, answers))
}

/// Streams of migrations to the node, which it keeps open: as many as it gets, and how the next one is refused.
async fn migrations(channel: &NodeChannel, round: u64) -> (Vec<impl Sized + use<>>, Error) {
    let mut open = Vec::new();
    for number in 0..8_u16 {
        match migration(channel, &format!("evil-{number}"), round + 1, 300 + number, "n1").await {
            Ok(stream) => open.push(stream),
            Err(error) => return (open, error),
        }
    }
    panic!("it got {} places for migrations", open.len());
}

/// A connection from an address that no other peer has: connections are counted by that.
async fn dial(node: &NodeProcess) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind("127.0.0.9:0".parse().unwrap())?;
    socket.connect(node.addresses().grpc.parse().unwrap()).await
}

/// Whether the node has closed it, whatever it said before.
fn is_closed(connection: &TcpStream) -> bool {
    loop {
        match connection.try_read(&mut [0; 256]) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
}

/// As many connections without a byte as it gets: those beyond the share of an address are closed at once.
async fn connections(node: &NodeProcess) -> Vec<TcpStream> {
    const DIALLED: usize = 400;
    let share = ConnectionLimits::default().connections_per_peer;
    let mut open = Vec::new();
    for _ in 0..DIALLED {
        open.extend(dial(node).await);
    }
    until("those beyond the share are closed", async || {
        open.iter().filter(|connection| !is_closed(connection)).count() <= share
    })
    .await;
    open
}

/// As many watches as it gets of a transfer, over one connection, and of the node's health, over another; each kind has its end.
async fn watches(node: &NodeProcess, evil: &Dialer) -> impl Sized + use<> {
    let refused = |error: &Error, limit: usize, open: usize| {
        assert_eq!(error.reason(), "TOO_MANY_WATCHERS", "{error:?}");
        assert_eq!(error.get("limit"), Some(limit.to_string().as_str()), "{error:?}");
        assert!(open <= limit, "{open} were opened");
    };
    let limits = proto::limits::Limits::default();
    let (of_peer, of_connection) = (limits.snapshot.watchers_per_peer, limits.health.watches_per_connection);
    let channels = [channel(node, evil).await, channel(node, evil).await];
    let mut transfers = Vec::new();
    let mut client = SplitSnapshotServiceClient::new(channels[0].clone());
    let error = loop {
        let transfer_id = "stall-0".to_owned();
        let request = WatchTransferProgressRequest { transfer_id, ..Default::default() };
        match client.watch_transfer_progress(request).await {
            Ok(watch) => transfers.push(watch),
            Err(status) => break Error::from(status),
        }
        assert!(transfers.len() <= of_peer, "watches have an end");
    };
    refused(&error, of_peer, transfers.len());
    assert!(error.get("peer").is_some(), "{error:?}");
    let mut health = Vec::new();
    let mut client = HealthServiceClient::new(channels[1].clone());
    let error = loop {
        match client.watch_health(WatchHealthRequest::default()).await {
            Ok(watch) => health.push(watch),
            Err(status) => break Error::from(status),
        }
        assert!(health.len() <= of_connection, "watches have an end");
    };
    refused(&error, of_connection, health.len());
    (transfers, health, channels)
}

/// What says nothing at all while everything else goes on.
struct Silent {
    since: Instant,
    streams: Vec<Stream>,
    connections: Vec<TcpStream>,
    _channel: NodeChannel,
}

impl Silent {
    async fn begin(node: &NodeProcess, evil: &Dialer) -> Self {
        let channel = channel(node, evil).await;
        let (mut streams, mut connections) = (Vec::new(), Vec::new());
        for _ in 0..8 {
            streams.push(Stream::open(&channel, []).await.unwrap());
            connections.push(dial(node).await.unwrap());
        }
        Self { since: Instant::now(), streams, connections, _channel: channel }
    }

    /// The node has given up all of it, streams and connections.
    async fn see_refused(mut self) {
        for stream in &mut self.streams {
            let refused = tokio::time::timeout(Duration::from_secs(60), stream.refusal()).await;
            assert_eq!(refused.expect("silence has an end").reason(), "IDLE_TIMEOUT");
        }
        assert!(self.since.elapsed() >= proto::limits::Limits::default().snapshot.first_frame);
        // They had a third of that.
        until("connections without a byte are closed", async || self.connections.iter().all(is_closed)).await;
    }
}

/// What the hostile client holds while others work.
struct Attack {
    held: Vec<Box<dyn std::any::Any>>,
}

/// Everything that it knows, once. In each round it takes up its own transfers with the next attempts.
async fn attack(node: &NodeProcess, evil: &Dialer, round: u64) -> Attack {
    let channel = channel(node, evil).await;
    names_that_escape(&channel).await;
    sizes_that_exhaust(&channel, round).await;
    old_attempts(&channel, round).await;

    // Places: as many as it can get, each with a header and no more.
    let mut stalled = Vec::new();
    let mut full = None;
    for number in 0..80 {
        let name = format!("stall-{number}");
        let first = [Frame::Header(header(&name, round + 1, 1, "a", 4)), manifest("a", 4)];
        let opened = match Stream::open(&channel, first).await {
            Ok(mut stream) => stream.accepted().await.map(|()| stream),
            Err(error) => Err(error),
        };
        match opened {
            Ok(stream) => stalled.push(stream),
            Err(error) => {
                full = Some(error);
                break;
            }
        }
    }
    let full = full.expect("places have an end");
    assert_eq!((full.reason(), full.get("peer")), ("TOO_MANY_TRANSFERS", Some(EVIL)), "{full:?}");
    let (migrations, full) = migrations(&channel, round).await;
    assert_eq!((full.reason(), full.get("peer")), ("TOO_MANY_MIGRATIONS", Some(EVIL)), "{full:?}");
    // Streams without a frame, connections without a byte, watches.
    let mut idle = Vec::new();
    for _ in 0..150 {
        idle.push(Stream::open(&channel, []).await.unwrap());
    }
    let connections = connections(node).await;
    let watches = watches(node, evil).await;
    let held: Vec<Box<dyn std::any::Any>> = vec![
        Box::new((stalled, migrations)),
        Box::new(idle),
        Box::new(connections),
        Box::new((watches, channel)),
    ];
    Attack { held }
}

/// Whatever it can send at once, as fast as it is answered: all of it is refused.
async fn storm(node: &NodeProcess, channel: &NodeChannel, step: u64) {
    let id = format!("storm-{}", step % 7);
    let bad = Chunk { file: 0, offset: 0, crc64nvme: 1, payload: bytes::Bytes::from(vec![0; MIB]) };
    let lane = LaneHeader {
        transfer_id: "stall-0".to_owned(),
        attempt: step + 1,
        session: vec![9; 16].into(),
        lane: 1,
        generation: 1,
    };
    let huge = Header { file_count: u64::MAX, ..header(&id, 1, 1, "a", 4) };
    let frames = [
        vec![Frame::Header(header(&id, step + 1, 1, "../x", 4)), manifest("../x", 4)],
        vec![Frame::Header(header("../x", 1, 1, "a", 4))],
        vec![Frame::Header(header("stall-0", 1, 3, "a", 4)), manifest("a", 4)],
        vec![Frame::Header(header(&id, 1, 1, "a", 1 << 60)), manifest("a", 1 << 60)],
        vec![Frame::Header(huge)],
        vec![Frame::LaneHeader(lane)],
        vec![Frame::Chunk(bad)],
    ];
    for first in frames {
        refused(channel, first).await;
    }
    // Connections that come and go, and talk nonsense.
    for _ in 0..4 {
        if let Ok(mut stream) = dial(node).await {
            let _ = stream.write_all(&[0x16; 600]).await;
        }
    }
}

/// The middle one.
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// How long another peer's transfers take, by themselves and while the hostile client does what it can.
#[derive(Default)]
struct Times {
    alone: Vec<Duration>,
    beside: Vec<Duration>,
}

impl Times {
    /// By how much the rate drops.
    fn drop(&self) -> f64 {
        let rate = |times: &Vec<Duration>| 1.0 / median(times.clone()).as_secs_f64();
        1.0 - rate(&self.beside) / rate(&self.alone)
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (alone, beside) = (median(self.alone.clone()), median(self.beside.clone()));
        let (of, among) = (self.alone.len(), self.beside.len());
        write!(f, "another peer's transfer: {alone:?} alone ({of}), {beside:?} beside ({among})")?;
        write!(f, ", its rate drops by {:.0} %", self.drop() * 100.0)
    }
}

/// One round: another peer's transfers by themselves, then from the first moment of an attack on. Returns what the attack holds.
async fn round(
    node: &NodeProcess,
    evil: &Dialer,
    number: u64,
    times: &mut Times,
    mut send: impl AsyncFnMut() -> Duration,
) -> Attack {
    const SENDS: usize = 3;
    for _ in 0..SENDS {
        times.alone.push(send().await);
    }
    let (holds, stop) = (Cell::new(false), Cell::new(false));
    let attacking = async {
        let attack = attack(node, evil, number).await;
        holds.set(true);
        let channel = channel(node, evil).await;
        let mut storms = 0;
        while !stop.get() || storms == 0 {
            storm(node, &channel, number * 10_000 + storms).await;
            storms += 1;
        }
        attack
    };
    let sending = async {
        let mut held = 0;
        while held < SENDS {
            let before = holds.get();
            times.beside.push(send().await);
            held += usize::from(before);
        }
        stop.set(true);
    };
    tokio::join!(attacking, sending).0
}

/// A node, its data below `directory`, and what the hostile client, and an honest one called n2, connect with.
async fn hostile(mut node: NodeProcess, nodes: &Path, evil: Dialer, good: Dialer) {
    /// At most. The first attacks grow the allocator's arenas, which stay: how many that takes depends on how busy the machine is.
    const ROUNDS: u64 = 24;
    // glibc gives back what is freed: what is resident is what is held, and not what is kept for the next bulk stream.
    node.stop().await.unwrap();
    node.set_environment(&[
        ("MALLOC_ARENA_MAX", "2"),
        ("MALLOC_MMAP_THRESHOLD_", "65536"),
        ("MALLOC_TRIM_THRESHOLD_", "65536"),
    ]);
    node.restart().await.unwrap();
    let silent = Silent::begin(&node, &evil).await;
    let directory = nodes.parent().unwrap();
    let file = directory.join("snapshot");
    let content: Vec<u8> = (0..32 * MIB).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect();
    std::fs::write(&file, content).unwrap();

    let mut number = 0;
    let mut rate = async || {
        number += 1;
        send(&node, &good, &file, number).await
    };
    for _ in 0..6 {
        rate().await;
    }
    let before = usage(&node);
    let outside = || {
        let all = names(nodes);
        all.into_iter().filter(|name| !name.contains("/snapshots/")).collect::<Vec<_>>()
    };
    let there = outside();

    let mib = |bytes: usize| bytes / MIB;
    let mut after = Vec::new();
    let mut times = Times::default();
    // Three attacks in a row left no more than 1 MiB.
    let is_level = |after: &[usize]| match after {
        [.., then, _, _, now] => *now <= then + MIB,
        _ => false,
    };
    for number in 0..ROUNDS {
        // Meanwhile, another peer's snapshots arrive, and clients are served.
        let attack = round(&node, &evil, number, &mut times, &mut rate).await;
        let taken = usage(&node);
        assert_eq!(call(&mut client(&node).await, "PING").await, "PONG");
        assert_eq!(attack.held.len(), 4);
        drop(attack);
        until("descriptors are given back", async || usage(&node).1 <= before.1 + 16).await;
        // Its size when it has settled, since what is given back is given back a little later.
        let mut settled = usize::MAX;
        for _ in 0..20 {
            settled = settled.min(usage(&node).0);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        println!("memory: {} MiB before, {} while, {} after", mib(before.0), mib(taken.0), mib(settled));
        println!("file descriptors: {} before, {} while, {} after", before.1, taken.1, usage(&node).1);
        after.push(settled);
        if is_level(&after) {
            break;
        }
    }
    silent.see_refused().await;
    println!("{times}");
    // Both were taken in turns, so a machine that is busy slows both down. Whoever waits for the hostile client waits longer than that.
    assert!(times.drop() < 0.75, "{times}");
    // What grows with each attack is what a peer could exhaust.
    assert!(is_level(&after), "memory grew with every attack: {after:?}");
    assert!(after[0] <= before.0 + 48 * MIB, "{after:?}");
    assert_eq!(outside(), there, "something was written outside of the snapshots");
    let escaped = names(directory).into_iter().find(|name| name.contains("escaped"));
    assert_eq!(escaped, None);
    assert!(!Path::new("/tmp/escaped").exists());
    let log = std::fs::read_to_string(node.log()).unwrap();
    assert!(!log.contains("panicked"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_client_gets_nowhere() {
    let directory = tempfile::tempdir().unwrap();
    let nodes = directory.path().join("nodes");
    std::fs::create_dir(&nodes).unwrap();
    let node = support::start("n1", &nodes, "0-99").await;
    hostile(node, &nodes, Dialer::plaintext(), Dialer::plaintext()).await;
}

/// A node with a certificate, its data in `nodes` below `directory`, and what makes the connections of another one.
async fn certified(directory: &Path) -> (NodeProcess, impl Fn(&str) -> Dialer + use<>) {
    let nodes = directory.join("nodes");
    std::fs::create_dir(&nodes).unwrap();
    let ca = Ca::new("one");
    // In the cluster without a name, so that the same headers fit.
    let issue =
        |ca: &Ca, id: &str| ca.issue(&Issue { uri: None, dns: vec![id.to_owned()], ..Issue::node(id) });
    let (certificate, key) = issue(&ca, "n1");
    let mut arguments = Vec::new();
    let files = [
        ("--tls-ca", "ca.crt", ca.pem()),
        ("--tls-cert", "n1.crt", certificate),
        ("--tls-key", "n1.key", key),
    ];
    for (flag, name, text) in files {
        let path = directory.join(name);
        std::fs::write(&path, text).unwrap();
        arguments.extend([flag.to_owned(), path.display().to_string()]);
    }
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let node = NodeProcess::start_with(&program(), "n1", &nodes, "0-99", &arguments).await.unwrap();
    let dialer = move |id: &str| {
        let (certificate, key) = issue(&ca, id);
        let pem = TlsPem { ca: ca.pem().into(), certificate: certificate.into(), key: key.into() };
        Dialer::tls(Tls::from_pem(pem).unwrap())
    };
    (node, dialer)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_node_with_a_valid_certificate_gets_no_further() {
    let directory = tempfile::tempdir().unwrap();
    let (node, dialer) = certified(directory.path()).await;
    // In another's name it gets nothing at all.
    let as_other = Header { source_node_id: "n2".to_owned(), ..header("stolen", 1, 1, "a", 4) };
    let refused = refused(&channel(&node, &dialer(EVIL)).await, [Frame::Header(as_other)]).await;
    assert_eq!(refused.reason(), "PERMISSION_DENIED", "{refused:?}");
    hostile(node, &directory.path().join("nodes"), dialer(EVIL), dialer("n2")).await;
}

/// Calls without end, as fast as they are answered, on many connections at once and with many on each.
struct Calls {
    since: Instant,
    answered: Arc<AtomicU64>,
    calling: JoinHandle<()>,
}

impl Calls {
    /// On the threads of `runtime`.
    fn begin(
        runtime: &Handle,
        node: &NodeProcess,
        evil: &Dialer,
        connections: usize,
        on_each: usize,
    ) -> Self {
        let (since, answered) = (Instant::now(), Arc::default());
        let (to, count) = (evil.to(&node.addresses().grpc, None).unwrap(), Arc::clone(&answered));
        let calling = runtime.spawn(async move {
            let mut channels = Vec::new();
            for _ in 0..connections {
                channels.push(to.connect().await.unwrap());
            }
            let mut callers = JoinSet::new();
            for number in 0..on_each {
                for channel in &channels {
                    callers.spawn(Self::call(channel.clone(), number, Arc::clone(&count)));
                }
            }
            while let Some(ended) = callers.join_next().await {
                ended.unwrap();
            }
        });
        Self { since, answered, calling }
    }

    async fn call(channel: NodeChannel, number: usize, answered: Arc<AtomicU64>) {
        let mut transfers = SplitSnapshotServiceClient::new(channel.clone());
        let mut migrations = MigrationServiceClient::new(channel.clone());
        let mut health = HealthServiceClient::new(channel);
        for turn in number.. {
            let answer = match turn % 3 {
                0 => transfers.list_transfers(ListTransfersRequest::default()).await.err(),
                1 => health.get_node_status(GetNodeStatusRequest::default()).await.err(),
                _ => {
                    let request = GetMigrationProgressRequest {
                        migration_id: "none".to_owned(),
                        ..GetMigrationProgressRequest::default()
                    };
                    migrations.get_migration_progress(request).await.err()
                }
            };
            match answer.map(Error::from) {
                None => {}
                Some(error) if turn % 3 == 2 && error.code() == Code::NotFound => {}
                // Heads of other calls come before the rest of this one, and each of them waits.
                Some(error) if error.reason() == "IDLE_TIMEOUT" => {}
                Some(error) => panic!("{error:?}"),
            }
            answered.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many were answered, and how many may have been.
    fn answered(&self) -> (u64, f64) {
        assert!(!self.calling.is_finished(), "it has failed");
        let limits = ConnectionLimits::default();
        let answered = self.answered.load(Ordering::Relaxed);
        let of_rate = f64::from(limits.calls_per_peer) * self.since.elapsed().as_secs_f64();
        (answered, f64::from(limits.calls_burst_per_peer) + of_rate)
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        self.calling.abort();
    }
}

/// How long a call of another peer takes.
async fn status(channel: &NodeChannel) -> Duration {
    let began = Instant::now();
    HealthServiceClient::new(channel.clone()).get_node_status(GetNodeStatusRequest::default()).await.unwrap();
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_node_makes_no_more_calls_than_it_may_while_another_makes_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let (node, dialer) = certified(directory.path()).await;
    let good = dialer("n2");
    let file = directory.path().join("snapshot");
    std::fs::write(&file, vec![7; MIB]).unwrap();
    let other = channel(&node, &good).await;
    status(&other).await;
    let calls = Calls::begin(&Handle::current(), &node, &dialer(EVIL), 24, 200);
    let mut times = Vec::new();
    until("the burst is used up, and as much again is made in turn", async || {
        times.push(status(&other).await);
        calls.answered().0 > 2 * u64::from(ConnectionLimits::default().calls_burst_per_peer)
    })
    .await;
    let (answered, most) = calls.answered();
    assert!(
        u32::try_from(answered).is_ok_and(|answered| f64::from(answered) <= most),
        "{answered} of {most}"
    );
    send(&node, &good, &file, 1).await;
    times.sort();
    println!("calls of another peer: {:?}, {:?} at most", median(times.clone()), times.last());
    // It is behind none of those that wait, which take seconds.
    assert!(median(times) < Duration::from_millis(500));
}

/// A node that owns nothing offers slots of others, and announces those of its victim.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_that_are_not_of_a_hostile_node_are_neither_taken_from_it_nor_held_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let n1 = support::start("n1", directory.path(), "0-99").await;
    let peer = support::migration::peer(&n1);
    let arguments = ["--peer", peer.as_str()];
    let n2 = NodeProcess::start_with(&program(), "n2", directory.path(), "none", &arguments).await.unwrap();
    let mut keys = (0..).map(|n| format!("key:{n}"));
    let key = keys.find(|key| node::common::slot_of(key.as_bytes()) < 100).unwrap();
    until("n2 knows the owner", async || {
        call(&mut client(&n2).await, &format!("GET {key}")).await.starts_with("-MOVED")
    })
    .await;
    let evil = Dialer::plaintext();
    let (to_n1, to_n2) = (channel(&n1, &evil).await, channel(&n2, &evil).await);
    let Err(error) = migration(&to_n2, "evil", 1, 7, "n2").await else { panic!("n1's slot is taken") };
    assert_eq!((error.reason(), error.get("holder")), ("RANGE_BUSY", Some("n1")), "{error:?}");
    // A slot of nobody may be anybody's.
    let _open = migration(&to_n2, "evil", 1, 300, "n2").await.unwrap();

    let rows = node::split::ROWS_FILE;
    let first = || [Frame::Header(header("evil", 1, 1, rows, 4)), manifest(rows, 4)];
    let error = refused(&to_n2, first()).await;
    assert_eq!(error.reason(), "INSTALL_REFUSED", "{error:?}");
    let mut left = Stream::open(&to_n1, first()).await.unwrap();
    left.accepted().await.unwrap();
    drop(left);
    let mut request = support::migration::request("m", &n2);
    request.spec.as_mut().unwrap().slots = Some(SlotRange::new(0, 50).unwrap().into());
    support::migration::begin(&n1, request).await.unwrap();
    support::migration::reaches(&n1, "m", Direction::Out, MigrationState::Completed).await;
}

/// It sees the ID of a split in the status of its source, and is at the target with a transfer of its own under that ID before the source is. That is
/// installed, or left unfinished; the slots, and all that is in them, stay with their owner, and writes to them go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_under_the_id_of_anothers_split_gives_no_slots_away() {
    for installs in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        let n1 = support::start("n1", directory.path(), "0-16383").await;
        let n2 = support::start("n2", directory.path(), "none").await;
        support::load(&n1, 1000).await;
        let mut control = client(&n1).await;
        // The source's manifest comes later.
        let proxy = Proxy::start(&n2.addresses().grpc).await;
        proxy.arm(proxy::Frame::Manifest, Ways::LATE);
        let split = format!("SPLIT 8192 n2 {} {}", proxy.address(), n2.addresses().resp);
        call(&mut control, &split).await;
        proxy.fired().await;
        let evil = Dialer::plaintext();
        let status = HealthServiceClient::new(channel(&n1, &evil).await)
            .get_node_status(GetNodeStatusRequest::default())
            .await;
        let id = status.unwrap().into_inner().status.unwrap().transfers[0].id.clone();

        let to_n2 = channel(&n2, &evil).await;
        let mut left = None;
        if installs {
            let file = directory.path().join("file");
            std::fs::write(&file, "x").unwrap();
            let sender = SnapshotSender::new(evil.to(&n2.addresses().grpc, None).unwrap());
            let snapshot = SnapshotToSend {
                transfer_id: TransferId::new(&id).unwrap(),
                source_shard: ShardId::new("s1").unwrap(),
                target_shard: ShardId::new("evil").unwrap(),
                source_node: NodeId::new(EVIL).unwrap(),
                target_node: None,
                slots: SlotRange::new(0, 1).unwrap(),
                point: SnapshotPoint { term: 1, index: 1 },
                fence: None,
                priority: Priority::Split,
            };
            sender.send(snapshot, FileSource::new(&file)).unwrap().join().await.unwrap();
        } else {
            let first = [Frame::Header(header(&id, 1, 1, "a", 4)), manifest("a", 4)];
            let mut stream = Stream::open(&to_n2, first).await.unwrap();
            stream.accepted().await.unwrap();
            left = Some(stream);
        }
        proxy.go(Ways::default());
        until("it is decided", async || {
            ["undone", "done"].contains(&split_says(&mut control, "phase").await.as_str())
        })
        .await;
        let (phase, error) =
            (split_says(&mut control, "phase").await, split_says(&mut control, "error").await);
        assert_eq!(phase, "undone", "{error}");
        assert!(error.contains("exists with another"), "{error}");
        assert_eq!(call(&mut control, "DBSIZE").await, ":1000");
        // Slot 12182.
        assert_eq!(call(&mut control, "SET foo bar").await, "OK");
        assert_eq!(call(&mut control, "GET key:2").await, format!("{:0100}", 2));

        // What is another's is not the source's to cancel.
        let request = GetTransferProgressRequest { transfer_id: id, ..GetTransferProgressRequest::default() };
        let shown = SplitSnapshotServiceClient::new(to_n2).get_transfer_progress(request).await.unwrap();
        let shown = shown.into_inner().transfer.unwrap().phase();
        let expected = if installs { TransferPhase::Installed } else { TransferPhase::Transferring };
        assert_eq!(shown, expected);
        drop(left);
    }
}

/// By how much another peer's rate drops meanwhile. Alone on the machine: `cargo test --release -p node --test hostile -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, which needs the machine for itself"]
async fn how_much_a_hostile_client_costs_others() {
    const SIZE: usize = 256 * MIB;
    let directory = tempfile::tempdir().unwrap();
    let nodes = directory.path().join("nodes");
    std::fs::create_dir(&nodes).unwrap();
    let node = support::start("n1", &nodes, "0-99").await;
    let file = directory.path().join("snapshot");
    std::fs::write(&file, vec![7; SIZE]).unwrap();
    let (evil, good) = (Dialer::plaintext(), Dialer::plaintext());
    let mut number = 0;
    let mut rate = async || {
        number += 1;
        send(&node, &good, &file, number).await
    };
    for _ in 0..3 {
        rate().await;
    }
    let mut times = Times::default();
    for number in 0..7 {
        drop(round(&node, &evil, number, &mut times, &mut rate).await);
        until("descriptors are given back", async || usage(&node).1 <= 64).await;
    }
    println!("{times}");
    assert!(times.drop() < 0.2, "{times}");
}

/// Time of the processor that a process has taken.
fn processor(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // Behind the name, which may have spaces in it: of the process itself in user and in kernel mode, in hundredths of a second.
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let ticks = fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap());
    Duration::from_millis(10 * ticks.sum::<u64>())
}

/// By how much another peer's rate drops while a node with a valid certificate calls on all of its connections, as fast as it can. What its own work takes of the
/// processor is not the node's: its threads get what nobody else wants, as if they were on another machine, and as long as the calls come at their full
/// rate all the same, the node has to do all that they can make it do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, which needs the machine for itself"]
async fn how_much_calls_of_a_hostile_node_cost_others() {
    const SIZE: usize = 256 * MIB;
    const SENDS: usize = 7;
    let directory = tempfile::tempdir().unwrap();
    let (node, dialer) = certified(directory.path()).await;
    let (evil, good) = (dialer(EVIL), dialer("n2"));
    let file = directory.path().join("snapshot");
    std::fs::write(&file, "x").unwrap();
    let mut number = 0;
    let mut rate = async || {
        number += 1;
        send(&node, &good, &file, number).await
    };
    // A list that is long.
    for _ in 0..300 {
        rate().await;
    }
    std::fs::write(&file, vec![7; SIZE]).unwrap();
    for _ in 0..3 {
        rate().await;
    }
    let least = || {
        // Of this thread.
        rustix::process::setpriority_process(None, 19).unwrap();
    };
    let elsewhere =
        Builder::new_multi_thread().worker_threads(2).enable_all().on_thread_start(least).build().unwrap();
    let other = channel(&node, &good).await;
    let mut times = Times::default();
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    let pid = node.pid().unwrap();
    for _ in 0..3 {
        for _ in 0..SENDS {
            times.alone.push(rate().await);
            alone.push(status(&other).await);
        }
        let calls = Calls::begin(elsewhere.handle(), &node, &evil, 240, 300);
        until("the burst is over", async || {
            calls.answered().0 > u64::from(ConnectionLimits::default().calls_burst_per_peer)
        })
        .await;
        let (taken, answered, began) = (processor(pid), calls.answered().0, Instant::now());
        tokio::time::sleep(Duration::from_secs(3)).await;
        let (taken, answered) = (processor(pid) - taken, calls.answered().0 - answered);
        println!("{answered} calls in {:?} took {taken:?} of the processor in the node", began.elapsed());
        let (answered, began) = (calls.answered().0, Instant::now());
        for _ in 0..SENDS {
            times.beside.push(rate().await);
            beside.push(status(&other).await);
        }
        println!("{} in {:?} beside another peer", calls.answered().0 - answered, began.elapsed());
        drop(calls);
        until("descriptors are given back", async || usage(&node).1 <= 64).await;
    }
    elsewhere.shutdown_background();
    println!("{times}; a call: {:?} alone, {:?} beside", median(alone), median(beside));
    assert!(times.drop() < 0.2, "{times}");
}

//! Sender and receiver over a simulated network and disk, with partitions, delays and crashes at moments that a seed decides.
//!
//! One simulation is one process, a child of its test: `mad-turmoil` gives the whole process the clock of the simulation and random numbers
//! of the seed, so that a run can be repeated exactly. To look at one that failed:
//!
//! ```sh
//! SIM_SEED=7 SIM_FAULTS=yes cargo test -p proto-snapshot --all-features --test sim -- --exact child_simulation --nocapture
//! ```

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    missing_debug_implementations,
    unreachable_pub,
    reason = "a failed expectation is a failed test"
)]

#[path = "sim/disk.rs"]
mod disk;
#[path = "sim/net.rs"]
mod net;
#[path = "sim/trace.rs"]
mod trace;

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use proto_common::ids::{NodeId, ShardId, TransferId};
use proto_common::path::FileName;
use proto_common::slots::SlotRange;
use proto_common::tuning::tune_server;
use proto_common::v1::Priority;
use proto_snapshot::hook::{HookFuture, InstallHook};
use proto_snapshot::limits::Limits;
use proto_snapshot::sender::{SenderOptions, SnapshotToSend};
use proto_snapshot::source::{Description, PieceStream, SnapshotSource, SourceError};
use proto_snapshot::spec::{ManifestFile, SnapshotPoint};
use proto_snapshot::store::PlacedSnapshot;
use proto_snapshot::{SnapshotReceiver, SnapshotSender};
use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};

use disk::Disk;
use trace::Trace;

const SEED: &str = "SIM_SEED";
const FAULTS: &str = "SIM_FAULTS";
/// How many seeds are tried; more than the default to search for something.
const SEEDS: &str = "SIM_SEEDS";
const SEEDS_BY_DEFAULT: u64 = 8;
const SENDER: &str = "sender";
const RECEIVER: &str = "receiver";
const ID: &str = "split-1";
/// Nothing takes longer, in simulated time; a run without an end is a failure.
const LONGEST: Duration = Duration::from_secs(3600);
/// Faults of one run.
const FAULTS_AT_ONE_RUN: usize = 12;
/// Bytes of a chunk, of credit, and that may be lost in a crash of the receiver.
const CHUNK: u32 = 8 << 10;
const CREDIT: u64 = 128 << 10;
const UNSYNCED: u64 = 256 << 10;

/// Files in memory.
#[derive(Clone)]
struct Files(Arc<Vec<Bytes>>);

impl Files {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let sizes = [0, 1, u64::from(CHUNK), 700_000, 300_001, 12_345];
        let file = |len: u64| {
            let mut bytes = vec![0; len as usize];
            rng.fill_bytes(&mut bytes);
            Bytes::from(bytes)
        };
        Self(Arc::new(sizes.into_iter().map(file).collect()))
    }

    fn bytes(&self) -> u64 {
        self.0.iter().map(|file| file.len() as u64).sum()
    }
}

impl SnapshotSource for Files {
    async fn describe(&self, _: bool) -> Result<Description, SourceError> {
        let file = |(number, bytes): (usize, &Bytes)| ManifestFile {
            name: FileName::new(&format!("file-{number}")).unwrap(),
            size: Some(bytes.len() as u64),
            blake3: None,
        };
        Ok(Description {
            files: self.0.iter().enumerate().map(file).collect(),
            content_version: "v1".to_owned(),
        })
    }

    async fn open(
        &self,
        file: u32,
        offset: u64,
        len: Option<u64>,
        piece: usize,
    ) -> Result<PieceStream, SourceError> {
        let bytes = &self.0[file as usize];
        let end = len.map_or(bytes.len() as u64, |len| offset + len);
        let mut rest = bytes.slice(offset as usize..end as usize);
        let pieces =
            std::iter::from_fn(move || (!rest.is_empty()).then(|| Ok(rest.split_to(piece.min(rest.len())))));
        Ok(futures::stream::iter(pieces).boxed())
    }
}

/// Takes its time, so that a crash can come in between, and counts.
struct SlowMerge {
    trace: Trace,
}

impl InstallHook for SlowMerge {
    fn install<'a>(&'a self, _: &'a PlacedSnapshot) -> HookFuture<'a, ()> {
        Box::pin(async {
            self.trace.add("hook: merge begins");
            tokio::time::sleep(Duration::from_millis(300)).await;
            self.trace.add("hook: merge ends");
            Ok(())
        })
    }
}

async fn receive(disk: Disk) -> turmoil::Result {
    disk.trace.add("receiver: starts");
    let mut limits = Limits::default();
    limits.chunk_bytes = CHUNK;
    limits.stream_credit_bytes = CREDIT;
    limits.unsynced_bytes = UNSYNCED;
    limits.unsynced_time = Duration::from_millis(50);
    limits.idle = Duration::from_secs(6);
    let receiver = SnapshotReceiver::builder(&NodeId::new("n2")?, disk.mount())
        .limits(limits)
        .hook(SlowMerge { trace: disk.trace.clone() })
        .start()
        .await?;
    tune_server(tonic::transport::Server::builder())
        .add_service(receiver.into_service())
        .serve_with_incoming(net::listen().await?)
        .await?;
    Ok(())
}

async fn send(files: Files, lanes: u32, trace: Trace, done: Arc<AtomicBool>) -> turmoil::Result {
    trace.add("sender: starts");
    let mut options = SenderOptions::default();
    options.lanes = lanes;
    options.give_up_after = None;
    // Slow enough for faults to come in the middle.
    options.bytes_per_second = std::num::NonZeroU64::new(200 << 10);
    let what = SnapshotToSend {
        transfer_id: TransferId::new(ID)?,
        source_shard: ShardId::new("s1")?,
        target_shard: ShardId::new("s2")?,
        source_node: NodeId::new("n1")?,
        target_node: Some(NodeId::new("n2")?),
        slots: SlotRange::new(8192, 16384)?,
        point: SnapshotPoint { term: 1, index: 1 },
        fence: None,
        priority: Priority::Split,
    };
    let sender = SnapshotSender::new(net::connect(RECEIVER, trace.clone())).options(options);
    let mut handle = sender.send(what, files)?;
    let installed = handle.join().await?;
    trace.add(format_args!("sender: installed {} bytes", installed.total_bytes));
    done.store(true, Ordering::SeqCst);
    std::future::pending().await
}

/// One run; panics where something is not as it has to be.
fn simulate(seed: u64, faults: bool) -> (Trace, Disk) {
    mad_turmoil::rand::set_rng(StdRng::seed_from_u64(seed));
    let _clock = mad_turmoil::time::SimClocksGuard::init();
    let trace = Trace::default();
    let disk = Disk::new(trace.clone());
    let files = Files::new(seed);
    let done = Arc::new(AtomicBool::new(false));
    let mut rng = StdRng::seed_from_u64(seed);
    let lanes = rng.random_range(1..4);
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .simulation_duration(LONGEST)
        .tick_duration(Duration::from_millis(1))
        .min_message_latency(Duration::from_micros(100))
        .max_message_latency(Duration::from_millis(20))
        .tcp_capacity(1 << 16)
        .build();
    sim.host(RECEIVER, {
        let disk = disk.clone();
        move || receive(disk.clone())
    });
    sim.host(SENDER, {
        let (files, trace, done) = (files.clone(), trace.clone(), Arc::clone(&done));
        move || send(files.clone(), lanes, trace.clone(), Arc::clone(&done))
    });
    let left = AtomicU64::new(if faults { FAULTS_AT_ONE_RUN as u64 } else { 0 });
    let mut repair: Option<(Duration, &str)> = None;
    let mut next = sim.elapsed() + Duration::from_millis(rng.random_range(20..1500));
    while !done.load(Ordering::SeqCst) {
        assert!(sim.elapsed() < LONGEST, "it does not end");
        let now = sim.elapsed();
        if let Some((_, how)) = repair.filter(|(at, _)| *at <= now) {
            trace.add(format_args!("fault: {how} ends"));
            match how {
                "partition" => sim.repair(SENDER, RECEIVER),
                "hold" => sim.release(SENDER, RECEIVER),
                "crash of the sender" => sim.bounce(SENDER),
                _ => sim.bounce(RECEIVER),
            }
            repair = None;
            next = now + Duration::from_millis(rng.random_range(20..1500));
        } else if repair.is_none() && now >= next && left.load(Ordering::SeqCst) > 0 {
            left.fetch_sub(1, Ordering::SeqCst);
            let how =
                ["partition", "hold", "crash of the sender", "crash of the receiver"][rng.random_range(0..4)];
            trace.add(format_args!("fault: {how}"));
            match how {
                "partition" => sim.partition(SENDER, RECEIVER),
                "hold" => sim.hold(SENDER, RECEIVER),
                "crash of the sender" => sim.crash(SENDER),
                _ => sim.crash(RECEIVER),
            }
            // Some are shorter than any timeout, some are longer.
            repair = Some((now + Duration::from_millis(rng.random_range(1..20_000)), how));
        }
        sim.step().unwrap();
    }
    let installed = disk.installed(ID).expect("it is installed");
    assert!(
        installed.iter().zip(files.0.iter()).all(|(found, sent)| found == sent),
        "what was sent is there"
    );
    assert_eq!(installed.len(), files.0.len());
    assert!(disk.is_tidy(), "nothing is left");
    // A crash of the receiver loses what was not durable; a stream that breaks, what was on its way.
    let crashes = trace.count("fault: crash of the receiver") as u64;
    let limit = files.bytes() + crashes * (UNSYNCED + 4 * CREDIT);
    assert!(
        disk.written() <= limit,
        "{} bytes were stored for {}, at most {limit} may be",
        disk.written(),
        files.bytes()
    );
    (trace, disk)
}

/// Not a test of its own: one simulation.
#[test]
fn child_simulation() {
    let Ok(seed) = std::env::var(SEED) else { return };
    let (trace, disk) = simulate(seed.parse().unwrap(), std::env::var_os(FAULTS).is_some());
    for line in trace.lines() {
        println!("| {line}");
    }
    println!("| lost {}", disk.lost());
}

/// What a simulation in a process of its own tells.
fn run(seed: u64, faults: bool) -> Vec<String> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child_simulation", "--nocapture"]).env(SEED, seed.to_string());
    if faults {
        command.env(FAULTS, "yes");
    }
    let output = command.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "seed {seed}, faults {faults}:\n{out}\n{err}");
    out.lines().filter_map(|line| line.split_once("| ")).map(|(_, said)| said.to_owned()).collect()
}

fn count(trace: &[String], part: &str) -> usize {
    trace.iter().filter(|line| line.contains(part)).count()
}

#[test]
fn whatever_breaks_a_snapshot_arrives_whole() {
    let (mut crashed_sender, mut crashed_receiver, mut reconnected, mut lost, mut merges) = (0, 0, 0, 0, 0);
    let seeds = std::env::var(SEEDS).map_or(SEEDS_BY_DEFAULT, |seeds| seeds.parse().unwrap());
    for seed in 0..seeds {
        let trace = run(seed, true);
        crashed_sender += count(&trace, "fault: crash of the sender ends");
        crashed_receiver += count(&trace, "fault: crash of the receiver ends");
        reconnected += count(&trace, "net: connected").saturating_sub(4);
        lost += usize::from(!trace.iter().any(|line| line == "lost 0"));
        merges += count(&trace, "hook: merge begins") - count(&trace, "hook: merge ends");
        assert!(count(&trace, "fault: partition") > 0 || count(&trace, "fault: hold") > 0, "seed {seed}");
    }
    // The faults do happen, and hurt.
    assert!(crashed_sender > 5 && crashed_receiver > 5, "{crashed_sender} and {crashed_receiver} crashes");
    assert!(reconnected > 20, "{reconnected} further connections");
    assert!(lost > 0, "no crash lost anything");
    println!(
        "{crashed_sender} {crashed_receiver} crashes, {reconnected} reconnects, {lost} runs lost bytes, {merges} merges cut"
    );
}

#[test]
fn without_faults_nothing_is_repeated() {
    let trace = run(1, false);
    assert_eq!(count(&trace, "fault:"), 0);
    assert_eq!(count(&trace, "receiver: starts"), 1);
    assert_eq!(count(&trace, "hook: merge begins"), 1);
    assert_eq!(count(&trace, "no connection"), 0);
    assert!(trace.iter().any(|line| line == "lost 0"));
}

#[test]
fn a_seed_gives_the_same_run_each_time_and_another_seed_another() {
    let first = run(3, true);
    assert!(first.len() > 100, "there is something to compare");
    let again = run(3, true);
    let differs = first.iter().zip(&again).find(|(first, again)| first != again);
    assert_eq!(differs, None);
    assert_eq!(first.len(), again.len());
    assert_ne!(first, run(4, true));
}

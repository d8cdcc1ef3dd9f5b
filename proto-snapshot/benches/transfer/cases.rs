//! What is measured: the ways of moving bytes, one after the other and round by round.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use bytesize::ByteSize;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;

use crate::Options;
use crate::payload::Payload;
use crate::peers::ours::Crowd;
use crate::peers::programs;
use crate::process::{Process, Sample, Skipped, transfer};
use crate::side::Side;
use crate::table::{CrowdRow, Report, Resume, Row};

/// Where a case reads and writes.
pub const IN_MEMORY: &str = "in memory";
pub const ON_DISK: &str = "on disk";

/// A write or a message of the other peers.
const PIECE: usize = 1 << 20;
/// Our senders make no larger chunks, whatever a receiver takes.
pub const OUR_CHUNK: usize = 512 << 10;

pub fn row(case: &str, peer: &str, bytes: u64) -> Row {
    Row {
        case: case.to_owned(),
        peer: peer.to_owned(),
        bytes,
        chunk: if peer == "proto" { OUR_CHUNK } else { PIECE },
        files: 1,
        lanes: 1,
        samples: Vec::new(),
        skipped: None,
    }
}

fn side(row: &Row) -> Side {
    Side {
        peer: row.peer.clone(),
        address: None,
        bytes: row.bytes,
        chunk: row.chunk,
        files: row.files,
        lanes: row.lanes,
        path: None,
    }
}

/// All of them in each round, in an order that is drawn anew, the same ones in each run: what disturbs the machine for a while disturbs all of them, and nobody is
/// always the one that comes behind another. A round before the first one is not counted: it takes the memory that the system has not handed out yet.
fn interleave(
    options: &Options,
    report: &mut Report,
    mut rows: Vec<Row>,
    measure: impl Fn(&Row) -> Result<Sample, Skipped>,
) {
    let mut random = StdRng::seed_from_u64(1);
    let mut order: Vec<usize> = (0..rows.len()).collect();
    for round in 0..=options.rounds() {
        order.shuffle(&mut random);
        for number in &order {
            let row = &mut rows[*number];
            if row.skipped.is_some() {
                continue;
            }
            match measure(row) {
                Ok(sample) => {
                    eprintln!("{}, {}, round {round}: {:.3} s", row.case, row.peer, sample.seconds);
                    if round > 0 {
                        row.samples.push(sample);
                    }
                }
                Err(Skipped(why)) => row.skipped = Some(why),
            }
        }
    }
    report.rows.extend(rows);
}

pub fn memory(options: &Options, report: &mut Report) {
    for bytes in options.sizes() {
        let case = format!("{}, memory to memory", ByteSize(bytes));
        let rows =
            ["raw TCP", "proto", "tonic", "tonic, tuned", "flight"].map(|peer| row(&case, peer, bytes));
        interleave(options, report, rows.into(), |row| transfer(&side(row), None, None));
    }
}

/// Rates by chunk size, number of files, and lanes.
pub fn sweep(options: &Options, report: &mut Report) {
    let bytes = options.sizes().into_iter().max().unwrap_or_default().min(1 << 30) / 2;
    let base = |case: &str| row(case, "proto", bytes);
    let chunks = [64, 128, 256, 512];
    let rows = chunks.map(|kib| Row { chunk: kib << 10, ..base("sweep of the chunk size") });
    let files = [1, 10, 100, 1000, 10_000];
    let rows = rows.into_iter().chain(files.map(|files| Row { files, ..base("sweep of the files") }));
    let rows = rows.chain([1, 2, 4].map(|lanes| Row { lanes, ..base("sweep of the lanes") }));
    interleave(options, report, rows.collect(), |row| transfer(&side(row), None, None));
}

/// One file, to a durable one.
pub fn file(options: &Options, report: &mut Report, place: &str, dir: &Path) {
    for bytes in options.sizes() {
        let scratch = Scratch::new(dir);
        let source = scratch.0.join("source");
        write_file(&source, bytes);
        settle(&source);
        let case = format!("{}, file to durable file, {place}", ByteSize(bytes));
        let rows = ["raw TCP", "proto", "cp", "rsync"].map(|peer| row(&case, peer, bytes));
        interleave(options, report, rows.into(), |row| copy(row, &scratch.0, &source));
    }
}

/// Many small files.
pub fn small(options: &Options, report: &mut Report, place: &str, dir: &Path) {
    const EACH: usize = 4 << 10;
    let scratch = Scratch::new(dir);
    let source = scratch.0.join("source");
    let files = if options.quick { 2_000 } else { 100_000 };
    let payload = Payload::new();
    for (number, piece) in payload.pieces(files * EACH as u64, EACH).enumerate() {
        // A thousand to a directory.
        let dir = source.join(format!("{:03}", number / 1000));
        if number % 1000 == 0 {
            std::fs::create_dir_all(&dir).unwrap();
        }
        std::fs::write(dir.join(format!("{number:06}")), piece).unwrap();
    }
    settle(&source);
    let case = format!("{files} files of 4 KiB, {place}");
    let rows = ["proto", "cp", "rsync"].map(|peer| Row { files, ..row(&case, peer, files * EACH as u64) });
    interleave(options, report, rows.into(), |row| copy(row, &scratch.0, &source));
}

fn copy(row: &Row, scratch: &Path, source: &Path) -> Result<Sample, Skipped> {
    /// So that each copy has a name of its own.
    static COPIES: AtomicU32 = AtomicU32::new(0);
    let target = scratch.join(format!("target-{}", COPIES.fetch_add(1, Ordering::Relaxed)));
    let result = match row.peer.as_str() {
        "cp" => programs::cp(source, &target),
        "rsync" => programs::rsync(source, &target),
        _ => transfer(&side(row), Some(source), Some(&target)),
    };
    if target.is_dir() && row.files > 1 && row.case.ends_with(ON_DISK) {
        // It goes with the rest: ext4 passes over every inode that was freed in the last seconds, so whoever makes files after a removal of very many
        // is not measured, but the removal is.
    } else if target.is_dir() {
        std::fs::remove_dir_all(&target).unwrap();
    } else if target.exists() {
        std::fs::remove_file(&target).unwrap();
    }
    settle(source);
    result
}

/// Nothing of an earlier copy is written in the time of the next.
fn settle(path: &Path) {
    Command::new("sync").arg("--file-system").arg(path).status().unwrap();
}

fn write_file(path: &Path, bytes: u64) {
    use std::io::Write as _;
    let mut file = std::fs::File::create(path).unwrap();
    Payload::new().pieces(bytes, PIECE).for_each(|piece| file.write_all(&piece).unwrap());
}

/// A directory that goes with its owner.
struct Scratch(PathBuf);

impl Scratch {
    fn new(dir: &Path) -> Self {
        let path = dir.join(format!("bench-transfer-{}", std::process::id()));
        std::fs::create_dir(&path)
            .unwrap_or_else(|error| panic!("{} cannot be made: {error}", path.display()));
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The sender is killed at some point, and another one goes on: with a receiver that has stayed, and with one that was killed too
/// and reads its directory first.
pub fn resume(options: &Options, report: &mut Report, dir: &Path) {
    let rounds = options.rounds().min(3);
    let bytes = options.resume_size();
    for (store, restart) in [("stayed", false), ("restarted", true)] {
        for files in [1, if options.quick { 100 } else { 10_000 }] {
            for percent in [1, 50, 99] {
                let seconds = (0..rounds).map(|_| {
                    let scratch = Scratch::new(dir);
                    let path = Some(scratch.0.join("store"));
                    let side = Side { files, path, ..side(&row("resume", "proto", bytes)) };
                    resume_once(&side, bytes / 100 * percent, restart)
                });
                let seconds: Vec<f64> = seconds.collect();
                eprintln!("resume, receiver {store}, {files} files, {percent} %: {seconds:?} s");
                report.resume.push(Resume { store: store.to_owned(), bytes, files, percent, seconds });
            }
        }
    }
}

fn resume_once(side: &Side, position: u64, restart: bool) -> f64 {
    let mut receiver = Process::part(&["side"], side);
    let mut sender = Side { address: Some(receiver.line()), path: None, ..side.clone() };
    let mut first = Process::part(&["begin", &position.to_string()], &sender);
    assert_eq!(first.line(), "durable");
    drop(first);
    if restart {
        drop(receiver);
        receiver = Process::part(&["side"], side);
        sender.address = Some(receiver.line());
    }
    let seconds = Process::part(&["resume", &position.to_string()], &sender).answer();
    drop(receiver);
    seconds
}

/// Many transfers to one receiver, which keeps them below `dir`.
pub fn crowd(options: &Options, report: &mut Report, dir: &Path) {
    let (transfers, bytes) = if options.quick { (20, 16 << 20) } else { (200, 64 << 20) };
    let scratch = Scratch::new(dir);
    let side = Side { path: Some(scratch.0.join("store")), ..side(&row("crowd", "proto", bytes)) };
    let mut receiver = Process::part(&["side"], &side);
    let sender = Side { address: Some(receiver.line()), path: None, ..side };
    let Crowd { sent, bytes: each } = Process::part(&["crowd", &transfers.to_string()], &sender).answer();
    report.crowd = Some(CrowdRow {
        transfers,
        bytes,
        seconds: sent.seconds,
        sender: sent.usage,
        receiver: receiver.report(),
        slowest: each.iter().copied().min().unwrap_or(0),
        fastest: each.iter().copied().max().unwrap_or(0),
    });
}

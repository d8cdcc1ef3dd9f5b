//! What a migration costs clients: whether it converges under a load, how long it freezes, and what writers notice.
//! `cargo bench -p proto-migration --bench migration -- --help`.
//!
//! Two processes of the example node, built for release. For each offered load of writes to the moving slots there is a time without a
//! migration and one in which the slots go there and back, again and again; a few writes to other slots go on beside. Latency is
//! counted from the moment at which a write was due, so that a stall is not hidden by the writes that it held back. Load, nodes and
//! measuring share the machine: ratios within one run mean more than numbers.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark that cannot run ends")]

mod disk;
mod load;
mod nodes;
mod report;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Parser;
use load::{Load, Measured, Offer};
use nodes::Node;
use proto_migration::v1::MigrationProgress;
use report::{Freeze, Report, Row};

/// The slots that move: half of them.
const MOVING: (u16, u16) = (0, 8192);
/// Keys, as `redis-benchmark -r` makes them: `key:` and twelve digits, with values of 3 bytes.
const KEYS: u64 = 100_000;
/// Writes per second to slots that stay.
const BESIDE: u64 = 2_000;
/// What saturates a node: as many connections as `redis-benchmark` has by default, with a write on its way on each.
const SATURATION: Offer = Offer::Closed { connections: 50, unanswered: 1 };
/// More than a node can take: the same in pipelines.
const FLOOD: Offer = Offer::Closed { connections: 50, unanswered: 32 };

/// Measures migrations of 100,000 keys between two nodes under a load of writes.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo bench -p proto-migration --bench migration --")]
struct Options {
    /// Seconds instead of minutes: whether everything works, not how fast
    #[arg(long)]
    quick: bool,
    /// Writes per second that are offered to the moving slots, separated by commas [default: 10000,30000,60000; 2000 with --quick]
    #[arg(long, value_delimiter = ',')]
    loads: Vec<u64>,
    /// Look for the load that saturates a node, and measure at half of it, at all of it and at more, too
    #[arg(long)]
    saturation: bool,
    /// Migrations per load [default: 30; 2 with --quick]
    #[arg(long)]
    migrations: Option<usize>,
    /// Directory for the nodes' data: a memory file system, so that the disk is not what is measured, or the disk that is
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// The program of the node, e.g. to compare two of them [default: built for release]
    #[arg(long)]
    node: Option<PathBuf>,
    /// Where to write the results as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

#[tokio::main]
async fn main() {
    let mut options = Options::parse();
    if options.loads.is_empty() {
        options.loads = if options.quick { vec![2_000] } else { vec![10_000, 30_000, 60_000] };
    }
    let (migrations, time) = if options.quick { (2, 1) } else { (30, 5) };
    let (migrations, time) = (options.migrations.unwrap_or(migrations), Duration::from_secs(time));
    let program = options.node.clone().unwrap_or_else(nodes::build);
    let mut report = Report::new(KEYS, disk::fsync(&options.dir, Duration::ZERO));
    let mut loads: Vec<_> =
        options.loads.iter().map(|&offered| (offered.to_string(), Offer::Rate(offered))).collect();
    if options.saturation {
        let most = saturation(&program, &options.dir, time).await;
        report.saturation = Some(most);
        loads.push((format!("half: {}", most / 2), Offer::Rate(most / 2)));
        loads.push(("all: 50 connections".to_owned(), SATURATION));
        loads.push(("flood: pipelines of 32".to_owned(), FLOOD));
    }
    for (name, offered) in loads {
        report.rows.push(measure(&program, &options.dir, name, offered, migrations, time).await);
        println!("\n{report}");
    }
    if let Some(path) = &options.json {
        let json = serde_json::to_string_pretty(&report).expect("a report is JSON");
        std::fs::write(path, json).expect("the JSON file is written");
    }
}

/// Two nodes, of which the first one has all keys.
async fn start(program: &Path, dir: &Path) -> (Node, Node) {
    let one = Node::start(program, dir, "n1", "0-16383").await;
    let two = Node::start(program, dir, "n2", "none").await;
    load::fill(&one, KEYS).await;
    (one, two)
}

/// Waits until connections, caches and the first writes of each key are not what is measured, then measures for `time`.
async fn alone(load: &Load, time: Duration) -> Measured {
    tokio::time::sleep(time / 2).await;
    load.take();
    tokio::time::sleep(time).await;
    load.take()
}

/// The writes per second to the moving slots that a node acknowledges when they saturate it.
async fn saturation(program: &Path, dir: &Path, time: Duration) -> u64 {
    let dir = tempfile::tempdir_in(dir).unwrap();
    let (one, two) = start(program, dir.path()).await;
    let load = Load::start([&one, &two], MOVING, KEYS, SATURATION, BESIDE);
    let measured = alone(&load, time).await;
    load.stop().await;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate")]
    let most = measured.moving.per_s as u64;
    most
}

async fn measure(
    program: &Path,
    dir: &Path,
    load: String,
    offered: Offer,
    migrations: usize,
    time: Duration,
) -> Row {
    let dir = tempfile::tempdir_in(dir).unwrap();
    let (one, two) = start(program, dir.path()).await;
    let writers = Load::start([&one, &two], MOVING, KEYS, offered, BESIDE);
    // Before anything is measured of the writers, so that they don't wait for it.
    let place = dir.path().to_owned();
    let fsync = tokio::task::spawn_blocking(move || disk::fsync(&place, time)).await.unwrap();
    let alone = alone(&writers, time).await;
    let mut ends = [&one, &two];
    let mut took = Duration::ZERO;
    let (mut freezes, mut given_up, mut slowed_ms) = (Vec::new(), 0, 0);
    for number in 0..migrations {
        let began = Instant::now();
        let done: MigrationProgress = nodes::migrate(ends, &format!("m{number}"), MOVING).await;
        took += began.elapsed();
        let committed: Vec<Freeze> = done.freezes.iter().filter_map(Freeze::of).collect();
        given_up += done.freezes.len() - committed.len();
        freezes.extend(committed);
        slowed_ms += done.writers_slowed_ms;
        ends.reverse();
    }
    let migrating = writers.take();
    freezes.sort_by_key(|freeze| freeze.total_ms);
    // What was moved away is deleted in the background.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let after = self::alone(&writers, time).await;
    let connections = writers.connections;
    writers.stop().await;
    let mean_migration_s = took.as_secs_f64() / f64::from(u32::try_from(migrations.max(1)).unwrap());
    #[allow(clippy::cast_precision_loss)]
    let slowed_percent =
        slowed_ms as f64 / 10.0 / took.as_secs_f64().max(f64::MIN_POSITIVE) / connections as f64;
    Row {
        load,
        fsync,
        alone,
        migrating,
        after,
        migrations,
        mean_migration_s,
        freezes,
        given_up,
        slowed_percent,
    }
}

/// Waits until something holds, at most two minutes.
pub(crate) async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(began.elapsed() < Duration::from_secs(120), "not within two minutes: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

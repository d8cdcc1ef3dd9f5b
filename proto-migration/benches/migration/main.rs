//! What a migration costs clients: whether it converges under a load, how long it freezes, and what writers notice.
//!
//!   cargo bench -p proto-migration [-- --quick] [--dir DIR] [--json FILE]
//!
//! Two processes of the example node, built for release, with their data in DIR (default: a memory file system where there is one, so
//! that the disk is not what is measured). For each offered load of writes to the moving slots there is a time without a migration and
//! one in which the slots go there and back, again and again; a few writes to other slots go on beside. Latency is counted
//! from the moment at which a write was due, so that a stall is not hidden by the writes that it held back. Load, nodes and
//! measuring share the machine: ratios within one run mean more than numbers.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark that cannot run ends")]

mod load;
mod nodes;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use load::{Load, Measured};
use nodes::Node;
use proto_migration::v1::{FreezeOutcome, MigrationProgress};

/// The slots that move: half of them.
const MOVING: (u16, u16) = (0, 8192);
/// Keys, as `redis-benchmark -r` makes them: `key:` and twelve digits, with values of 3 bytes.
const KEYS: u64 = 100_000;
/// Writes per second to slots that stay.
const BESIDE: u64 = 2_000;

struct Options {
    quick: bool,
    dir: PathBuf,
    json: Option<PathBuf>,
}

/// One line of the table.
struct Row {
    offered: u64,
    alone: Measured,
    migrating: Measured,
    freezes: Vec<u64>,
    migrations: usize,
    given_up: usize,
    not_converging: usize,
}

#[tokio::main]
async fn main() {
    let options = options();
    let (loads, migrations, time) = if options.quick {
        (vec![2_000], 2, Duration::from_secs(1))
    } else {
        (vec![10_000, 30_000, 60_000], 30, Duration::from_secs(5))
    };
    let program = nodes::build();
    println!("two nodes with their data in {}; {KEYS} keys", options.dir.display());
    let mut rows = Vec::new();
    for offered in loads {
        rows.push(measure(&program, &options, offered, migrations, time).await);
        print(&rows);
    }
    if let Some(path) = &options.json {
        std::fs::write(path, json(&rows)).expect("the JSON file is written");
    }
}

fn options() -> Options {
    let memory = PathBuf::from("/dev/shm");
    let mut options = Options {
        quick: false,
        dir: if memory.is_dir() { memory } else { std::env::temp_dir() },
        json: None,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--quick" => options.quick = true,
            "--dir" => options.dir = words.next().expect("--dir DIR").into(),
            "--json" => options.json = Some(words.next().expect("--json FILE").into()),
            // What `cargo bench` passes to every harness.
            "--bench" => {}
            other => panic!("{other}: not known; there are --quick, --dir DIR, --json FILE"),
        }
    }
    options
}

async fn measure(
    program: &std::path::Path,
    options: &Options,
    offered: u64,
    migrations: usize,
    time: Duration,
) -> Row {
    let dir = tempfile::tempdir_in(&options.dir).unwrap();
    let one = Node::start(program, dir.path(), "n1", "0-16383").await;
    let two = Node::start(program, dir.path(), "n2", "none").await;
    load::fill(&one, KEYS).await;
    let load = Load::start([&one, &two], MOVING, KEYS, offered, BESIDE);
    // Connections, caches and the first writes of each key are not what is measured.
    tokio::time::sleep(time / 2).await;
    load.take();
    tokio::time::sleep(time).await;
    let alone = load.take();
    let mut freezes = Vec::new();
    let (mut given_up, mut not_converging) = (0, 0);
    let mut ends = [&one, &two];
    for number in 0..migrations {
        let done: MigrationProgress = nodes::migrate(ends, &format!("m{number}"), MOVING).await;
        let outcome =
            |freeze: &&proto_migration::v1::FreezeAttempt| freeze.outcome() == FreezeOutcome::Committed;
        freezes.extend(done.freezes.iter().filter(outcome).filter_map(|freeze| freeze.freeze_ms));
        given_up += done.freezes.iter().filter(|freeze| !outcome(freeze)).count();
        not_converging += usize::from(done.writers_slowed_ms > 0);
        ends.reverse();
    }
    let migrating = load.take();
    load.stop().await;
    freezes.sort_unstable();
    Row { offered, alone, migrating, freezes, migrations, given_up, not_converging }
}

fn quantile(sorted: &[u64], q: f64) -> u64 {
    if sorted.is_empty() {
        return 0;
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let index = ((sorted.len() as f64 * q).ceil() as usize).clamp(1, sorted.len());
    sorted[index - 1]
}

fn print(rows: &[Row]) {
    println!();
    println!(
        "  offered/s | writes to moving slots, /s     | p99 ms         | other slots p99 | freeze ms      | slowed"
    );
    println!(
        "            | alone   migrating  ratio       | alone   migr.  | alone   migr.   | p50  p99  more |"
    );
    for row in rows {
        #[allow(clippy::cast_precision_loss)]
        let ratio = row.migrating.moving_rate() as f64 / row.alone.moving_rate().max(1) as f64;
        println!(
            "  {:>9} | {:>7} {:>9}   {:>5.2}       | {:>6.1} {:>6.1}  | {:>6.1} {:>6.1}   | {:>3}  {:>3}  {:>4} | {}/{}",
            row.offered,
            row.alone.moving_rate(),
            row.migrating.moving_rate(),
            ratio,
            row.alone.moving_p99_ms(),
            row.migrating.moving_p99_ms(),
            row.alone.staying_p99_ms(),
            row.migrating.staying_p99_ms(),
            quantile(&row.freezes, 0.5),
            quantile(&row.freezes, 0.99),
            row.given_up,
            row.not_converging,
            row.migrations,
        );
    }
    println!("  (more: freezes that were given up and tried again; slowed: migrations that slowed writers)");
}

fn json(rows: &[Row]) -> String {
    let rows: Vec<String> = rows
        .iter()
        .map(|row| {
            format!(
                "{{\"offered\":{},\"alone\":{},\"migrating\":{},\"freezes_ms\":{:?},\"given_up\":{},\"slowed\":{},\"migrations\":{}}}",
                row.offered, row.alone, row.migrating, row.freezes, row.given_up, row.not_converging, row.migrations
            )
        })
        .collect();
    format!("[{}]\n", rows.join(",\n "))
}

/// Waits until something holds, at most a minute.
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

//! `node demo`: a split between two real processes, one of which is killed in the middle, and a migration back.

pub mod client;
pub mod latency;
pub mod load;
pub mod load_gen;
mod migrate;
pub mod processes;
mod split;
mod table;
pub mod verify;
mod watch;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use client::Client;
use load::Source;
use load_gen::LoadGenerator;
use processes::NodeProcess;
use table::{Report, bytes, count, seconds};
use verify::Verified;

use crate::common::SlotRange;

/// The first slot that the split moves to the second node.
const MIDDLE: u16 = 8192;
/// The first slot that the migration moves back.
const THREE_QUARTERS: u16 = 12288;
/// Keys of the clients that write meanwhile.
const WRITERS_PREFIX: &str = "node-demo-writer:";

/// What the demo is to do.
#[derive(Debug, Clone)]
pub struct DemoOptions {
    /// What is loaded.
    pub source: Source,
    /// Where data and logs are kept.
    pub keep: Option<PathBuf>,
}

/// Runs the demo, and prints what it does and found to stdout.
///
/// # Errors
///
/// Something is not as it should be; says what.
pub async fn run(options: DemoOptions) -> anyhow::Result<()> {
    let temporary = tempfile::Builder::new().prefix("node-demo-").tempdir()?;
    let directory = match &options.keep {
        Some(keep) => empty_directory(keep)?,
        None => temporary.path().to_path_buf(),
    };
    let result = play(&options.source, &directory).await;
    if result.is_err() && options.keep.is_none() {
        // What went wrong is in the logs.
        say(&format!("data and logs are kept in {}", temporary.keep().display()));
    }
    result
}

fn empty_directory(path: &Path) -> anyhow::Result<PathBuf> {
    std::fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
    if std::fs::read_dir(path)?.next().is_some() {
        bail!("{} is not empty; choose another --keep", path.display());
    }
    Ok(path.canonicalize()?)
}

fn say(line: &str) {
    // Nobody may read it.
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn bar(total: Option<u64>, template: &str) -> anyhow::Result<ProgressBar> {
    let bar = match total {
        Some(total) => ProgressBar::new(total),
        None => ProgressBar::no_length(),
    };
    bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(10));
    bar.set_style(ProgressStyle::with_template(template)?);
    Ok(bar)
}

const COUNT_BAR: &str = "  {bar:32} {human_pos}/{human_len} {msg} {per_sec}";
const COUNT_SPINNER: &str = "  {spinner} {human_pos} {msg} {per_sec}";
const BYTES_BAR: &str = "  {bar:32} {bytes}/{total_bytes} {msg}";

async fn play(source: &Source, directory: &Path) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let moving = SlotRange::new(MIDDLE, SlotRange::FULL.end())?;
    let returning = SlotRange::new(THREE_QUARTERS, SlotRange::FULL.end())?;

    let mut n1 = NodeProcess::start(&program, "n1", directory, "0-16383").await?;
    let mut n2 = NodeProcess::start(&program, "n2", directory, "none").await?;
    for node in [&n1, &n2] {
        let addresses = node.addresses();
        say(&format!("node {}: gRPC {}, Redis {}", node.id(), addresses.grpc, addresses.resp));
    }

    let since = Instant::now();
    let progress = match source {
        Source::Generated(keys) => bar(Some(*keys), COUNT_BAR)?,
        Source::File(_) => bar(None, COUNT_SPINNER)?,
    };
    progress.set_message("loaded");
    let mut client = Client::connect(&n1.addresses().resp).await?;
    let loaded = load::load(source, &mut client, |commands| progress.set_position(commands)).await?;
    progress.finish_and_clear();
    if let Some(key) = loaded.keys.keys().find(|key| key.starts_with(WRITERS_PREFIX.as_bytes())) {
        bail!(
            "the input has the key {}; the demo needs those that begin with {WRITERS_PREFIX} for itself",
            String::from_utf8_lossy(key)
        );
    }
    let loading = since.elapsed();
    let keys = u64::try_from(loaded.keys.len())?;
    say(&format!("loaded {} keys into n1 in {}", count(keys), seconds(loading)));

    let writers = LoadGenerator::start(&n1.addresses().resp, WRITERS_PREFIX, moving);
    let split = split::split(&mut client, &n1, &mut n2, loaded.bytes_in(moving), moving).await?;
    let written = writers.finish().await?;
    say("the split is done: the slots are handed over");

    let migration = migrate::migrate(&n2, &n1, moving, returning, loaded.bytes_in(returning)).await?;
    say("reading every key back");

    let since = Instant::now();
    let nodes = [n1.addresses().resp.clone(), n2.addresses().resp.clone()];
    let owners = verify::owners(&nodes).await?;
    let progress = bar(Some(keys), COUNT_BAR)?;
    progress.set_message("compared");
    let histories = [written.histories.as_slice(), &migration.written.histories].concat();
    let verified = verify::verify(&loaded, &histories, &owners, |keys| progress.set_position(keys)).await?;
    progress.finish_and_clear();
    let verifying = since.elapsed();
    n1.stop().await?;
    n2.stop().await?;

    let mut table = Report::new("LOAD", [""]);
    table.row("keys", count(keys));
    table.row("bytes of keys and values", bytes(loaded.bytes_in(SlotRange::FULL)));
    table.time("load", loading);
    say(&table.table().to_string());
    let mut table = Report::new("SPLIT, WITH A KILL", [""]);
    split.tell(&mut table, &written);
    say(&table.table().to_string());
    let mut table = Report::new("MIGRATION BACK", [""]);
    migration.tell(&mut table);
    say(&table.table().to_string());
    let mut table = Report::new("LATENCY OF WRITES, MIGRATION", ["before", "during", "after"]);
    migration.latencies(&mut table);
    say(&table.table().to_string());
    let mut table = Report::new("IN THE END", [""]);
    tell(&mut table, written.acknowledged + migration.written.acknowledged, &verified);
    table.time("read back and compare", verifying);
    say(&table.table().to_string());
    if verified.wrong > 0 {
        for difference in &verified.differences {
            say(difference);
        }
        bail!("{} keys are not as they should be", count(verified.wrong));
    }
    say("every key is where it belongs, with the value that was written last");
    Ok(())
}

fn tell(report: &mut Report, acknowledged: u64, verified: &Verified) {
    report.row("writes acknowledged, in all", count(acknowledged));
    report.row("acknowledged writes lost", count(verified.lost));
    if verified.wrong > 0 {
        report.row("KEYS THAT ARE WRONG", count(verified.wrong));
    }
    report.row("keys compared", count(verified.keys));
    if verified.expired > 0 {
        report.row("keys that have expired", count(verified.expired));
    }
}

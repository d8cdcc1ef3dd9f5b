//! `node demo`: a split between two real processes, one of which is killed in the middle.

pub mod client;
pub mod load;
pub mod load_gen;
pub mod processes;
mod table;
pub mod verify;
mod watch;

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use proto::node::{TransferPhase, TransferProgress};
use redis_protocol::resp2::types::BytesFrame;

use client::{Client, field, text};
use load::Source;
use load_gen::{LoadGenerator, Written};
use processes::NodeProcess;
use table::{Report, bytes, count, seconds};
use verify::Verified;

use crate::common::SlotRange;

/// The first slot that moves.
const MIDDLE: u16 = 8192;
/// A transfer is slowed down to take so long, so that there is a middle to kill the receiver in.
const TRANSFER_SECONDS: u64 = 5;
/// From so many bytes on it takes long enough by itself.
const LARGE: u64 = 2 << 30;
const SLOWEST: u64 = 64 << 10;
/// Part of the bytes that is durable at the receiver when it is killed.
const KILL_AT_PERCENT: u64 = 35;
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
    let mut report = Report::default();

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
    report.row("keys loaded", count(keys));
    report.row("bytes of keys and values", bytes(loaded.bytes_in(SlotRange::FULL)));

    let writers = LoadGenerator::start(&n1.addresses().resp, WRITERS_PREFIX, moving);
    let split = split(&mut client, &n1, &mut n2, loaded.bytes_in(moving), moving).await?;
    let written = writers.finish().await?;
    say("the slots are handed over; reading every key back");

    let since = Instant::now();
    let nodes = [n1.addresses().resp.clone(), n2.addresses().resp.clone()];
    let owners = verify::owners(&nodes).await?;
    let progress = bar(Some(keys), COUNT_BAR)?;
    progress.set_message("compared");
    let verified =
        verify::verify(&loaded, &written.histories, &owners, |keys| progress.set_position(keys)).await?;
    progress.finish_and_clear();
    let verifying = since.elapsed();
    n1.stop().await?;
    n2.stop().await?;

    tell(&mut report, &split, &written, &verified);
    report.time("load", loading);
    split.times(&mut report);
    report.time("read back and compare", verifying);
    say(&report.table().to_string());
    if verified.wrong > 0 {
        for difference in &verified.differences {
            say(difference);
        }
        bail!("{} keys are not as they should be", count(verified.wrong));
    }
    say("every key is where it belongs, with the value that was written last");
    Ok(())
}

fn tell(report: &mut Report, split: &Split, written: &Written, verified: &Verified) {
    let transfer = &split.transfer;
    report.row("rows that moved", count(split.rows));
    report.row("bytes of the snapshot", bytes(split.bytes));
    report.row(
        "limit of the rate",
        split.limit.map_or_else(|| "none".into(), |limit| format!("{}/s", bytes(limit))),
    );
    report.row("receiver killed at", split.killed_at.clone());
    report.row("bytes sent again", bytes(transfer.wire_bytes.saturating_sub(split.bytes)));
    report.row("connections of the transfer", count(transfer.connections.into()));
    report.row("writes acknowledged meanwhile", count(written.acknowledged));
    report.row("of which missing", count(verified.lost));
    if verified.wrong > 0 {
        report.row("KEYS THAT ARE WRONG", count(verified.wrong));
    }
    report.row("writes whose connection broke", count(written.unknown));
    report.row("writes that were redirected", count(written.moved));
    report.time("longest write, slots that stay", written.longest_staying);
    report.time("longest write, slots that move", written.longest_moving);
    report.row("keys compared", count(verified.keys));
    if verified.expired > 0 {
        report.row("keys that have expired", count(verified.expired));
    }
}

/// How the split went.
struct Split {
    transfer: TransferProgress,
    rows: u64,
    bytes: u64,
    limit: Option<u64>,
    killed_at: String,
    down: Duration,
    phases: Vec<(String, u64)>,
}

impl Split {
    fn times(&self, report: &mut Report) {
        let at = |name: &str| self.phases.iter().find(|(phase, _)| phase == name).map(|(_, at)| *at);
        let between = |from: Option<u64>, to: Option<u64>| {
            from.zip(to).map(|(from, to)| Duration::from_millis(to.saturating_sub(from)))
        };
        let installing = self
            .transfer
            .phases
            .iter()
            .rev()
            // A short one may be installed before its sender hears that it is being verified.
            .take_while(|phase| {
                let phase = phase.phase();
                matches!(
                    phase,
                    TransferPhase::Verifying | TransferPhase::Installing | TransferPhase::Installed
                )
            })
            .last()
            .map(|phase| phase.started_unix_ms);
        for (name, time) in [
            ("hold writes, export the snapshot", between(at("exporting"), at("sending"))),
            ("transfer, with the restart", between(at("sending"), installing)),
            ("verify, install, hand over", between(installing, at("done"))),
        ] {
            if let Some(time) = time {
                report.time(name, time);
            }
        }
        report.time("of which the receiver was down", self.down);
    }
}

async fn split(
    client: &mut Client,
    n1: &NodeProcess,
    n2: &mut NodeProcess,
    estimate: u64,
    moving: SlotRange,
) -> anyhow::Result<Split> {
    let limit = (estimate < LARGE).then(|| (estimate / TRANSFER_SECONDS).max(SLOWEST));
    let target = n2.addresses().clone();
    let slot = moving.start().to_string();
    let mut command = vec!["SPLIT", &slot, n2.id(), &target.grpc, &target.resp];
    let rate = limit.map(|limit| limit.to_string());
    if let Some(rate) = &rate {
        command.extend(["RATE", rate]);
    }
    let reply = client.call(&command).await?;
    let transfer = match (&reply, text(&reply)) {
        (BytesFrame::BulkString(_), Some(transfer)) => transfer.to_owned(),
        (_, error) => bail!("the split was refused: {}", error.unwrap_or("without a reason")),
    };
    say(&format!("splitting at slot {slot}: slots {moving} go to {}, transfer {transfer}", n2.id()));

    let progress = bar(None, BYTES_BAR)?;
    let plain = !std::io::stderr().is_terminal();
    let mut watch = watch::Watching::start(&n1.addresses().grpc, &transfer);
    let mut killed = None;
    let mut told = Instant::now();
    loop {
        let status = status(client, &transfer).await?;
        let phase = status.phase.as_str();
        if phase == "undone" {
            bail!("the split was undone: {}", status.error.unwrap_or_default());
        }
        if let Some(seen) = watch.changed(Duration::from_millis(100)).await {
            let done = seen.progress.as_ref().map_or(0, |progress| progress.bytes_done);
            let total = status.bytes.unwrap_or(0);
            progress.set_length(total);
            progress.set_position(done);
            let doing = seen.phase().as_str_name().trim_start_matches("TRANSFER_PHASE_").to_lowercase();
            progress.set_message(doing.clone());
            if plain && told.elapsed() > Duration::from_secs(1) {
                told = Instant::now();
                say(&format!("  {} of {}: {doing}", bytes(done), bytes(total)));
            }
            let middle = total > 0 && done.saturating_mul(100) >= total.saturating_mul(KILL_AT_PERCENT);
            let late = matches!(
                seen.phase(),
                TransferPhase::Verifying | TransferPhase::Installing | TransferPhase::Installed
            );
            if killed.is_none() && (middle || late) {
                killed = Some(kill(n2, &progress, done, total, &seen).await?);
            }
        }
        if phase == "done" {
            break;
        }
    }
    progress.finish_and_clear();
    let (killed_at, down) = match killed {
        Some(killed) => killed,
        // So small that it was over before anybody looked.
        None => kill(n2, &progress, 0, 0, &TransferProgress::default()).await?,
    };
    let status = status(client, &transfer).await?;
    let transfer = watch::last(&n1.addresses().grpc, &transfer).await?;
    Ok(Split {
        rows: status.rows.unwrap_or(0),
        bytes: status.bytes.unwrap_or(0),
        phases: status.phases,
        transfer,
        limit,
        killed_at,
        down,
    })
}

/// SIGKILL for the receiver, and a new process of it. Says where that was.
async fn kill(
    node: &mut NodeProcess,
    progress: &ProgressBar,
    done: u64,
    total: u64,
    seen: &TransferProgress,
) -> anyhow::Result<(String, Duration)> {
    let since = Instant::now();
    node.kill().await?;
    let at = match seen.phase() {
        TransferPhase::Unspecified | TransferPhase::Installed => {
            "the end (too small for a middle)".to_owned()
        }
        _ => format!("{} of {}", bytes(done), bytes(total)),
    };
    progress.suspend(|| say(&format!("killed {} (SIGKILL) at {at}; starting it again", node.id())));
    node.restart().await?;
    let down = since.elapsed();
    progress.suspend(|| say(&format!("{} is back after {}", node.id(), seconds(down))));
    Ok((at, down))
}

/// What SPLIT LIST says.
struct Status {
    phase: String,
    phases: Vec<(String, u64)>,
    rows: Option<u64>,
    bytes: Option<u64>,
    error: Option<String>,
}

async fn status(client: &mut Client, transfer: &str) -> anyhow::Result<Status> {
    let reply = client.call(&["SPLIT", "LIST"]).await?;
    let BytesFrame::Array(splits) = &reply else { bail!("SPLIT LIST answered {reply:?}") };
    let split = splits.iter().find(|split| field(split, "transfer").and_then(text) == Some(transfer));
    let split = split.context("the split is not listed")?;
    let number = |name: &str| match field(split, name) {
        Some(BytesFrame::Integer(number)) => u64::try_from(*number).ok(),
        _ => None,
    };
    let phases = match field(split, "phases") {
        Some(BytesFrame::Array(items)) => items
            .as_chunks::<2>()
            .0
            .iter()
            .filter_map(|[phase, at]| match at {
                BytesFrame::Integer(at) => Some((text(phase)?.to_owned(), u64::try_from(*at).ok()?)),
                _ => None,
            })
            .collect(),
        _ => Vec::new(),
    };
    Ok(Status {
        phase: field(split, "phase").and_then(text).context("a split without a phase")?.to_owned(),
        phases,
        rows: number("rows"),
        bytes: number("bytes"),
        error: field(split, "error").and_then(text).map(str::to_owned),
    })
}

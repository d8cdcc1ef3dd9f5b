//! The split: the upper half of the slots goes to the second node, which is killed in the middle of it.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use indicatif::ProgressBar;
use proto::node::{TransferPhase, TransferProgress};
use redis_protocol::resp2::types::BytesFrame;

use super::client::{Client, field, text};
use super::latency::Period;
use super::load_gen::Written;
use super::processes::NodeProcess;
use super::table::{Report, bytes, count, seconds};
use super::{BYTES_BAR, bar, say, watch};
use crate::common::SlotRange;

/// A transfer is slowed down to take so long, so that there is a middle to kill the receiver in.
const TRANSFER_SECONDS: u64 = 5;
/// From so many bytes on it takes long enough by itself.
const LARGE: u64 = 2 << 30;
const SLOWEST: u64 = 64 << 10;
/// Part of the bytes that is durable at the receiver when it is killed.
const KILL_AT_PERCENT: u64 = 35;

/// How the split went.
pub(super) struct Split {
    transfer: TransferProgress,
    rows: u64,
    bytes: u64,
    limit: Option<u64>,
    killed_at: String,
    down: Duration,
    phases: Vec<(String, u64)>,
}

impl Split {
    /// What happened, and how long what took.
    pub(super) fn tell(&self, report: &mut Report, written: &Written) {
        report.row("rows that moved", count(self.rows));
        report.row("bytes of the snapshot", bytes(self.bytes));
        report.row(
            "limit of the rate",
            self.limit.map_or_else(|| "none".into(), |limit| format!("{}/s", bytes(limit))),
        );
        report.row("receiver killed at", self.killed_at.clone());
        report.row("bytes sent again", bytes(self.transfer.wire_bytes.saturating_sub(self.bytes)));
        report.row("connections of the transfer", count(self.transfer.connections.into()));
        report.row("writes acknowledged meanwhile", count(written.acknowledged));
        report.row("writes whose connection broke", count(written.unknown));
        report.row("writes that were redirected", count(written.moved));
        for (name, latencies) in [
            ("longest write, slots that stay", &written.staying),
            ("longest write, slots that move", &written.moving),
        ] {
            if let Some(longest) = latencies.longest(Period::Before) {
                report.time(name, longest);
            }
        }
        self.times(report);
    }

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

/// Splits the slots `moving`, about `estimate` bytes of keys and values, off to `n2`.
///
/// # Errors
///
/// It was refused or undone; says why.
pub(super) async fn split(
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
    let mut watch = watch::transfer(&n1.addresses().grpc, &transfer);
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
    let transfer = watch::last_transfer(&n1.addresses().grpc, &transfer).await?;
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

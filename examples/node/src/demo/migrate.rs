//! The migration: a part of the slots goes back to the first node while clients write, and their writes are timed before, during and after.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use proto::common::error::Error;
use proto::node::migration_service_client::MigrationServiceClient;
use proto::node::{MigrationLimits, MigrationProgress, MigrationSpec, MigrationState, StartMigrationRequest};

use super::latency::{Latencies, Period};
use super::load_gen::{LoadGenerator, Written};
use super::processes::NodeProcess;
use super::table::{Report, bytes, count, millis};
use super::{BYTES_BAR, WRITERS_PREFIX, bar, say, watch};
use crate::common::SlotRange;

const ID: &str = "demo-migration";
/// How long writes are timed before and after.
const QUIET: Duration = Duration::from_secs(2);
/// The copy is slowed down to take so long, so that there is something to see and to time.
const COPY_SECONDS: u64 = 4;
/// From so many bytes on it takes long enough by itself.
const LARGE: u64 = 2 << 30;
/// The changes of the writers share the rate with the rows, and come in all the time.
const SLOWEST: u64 = 256 << 10;
/// All rows are copied: the changes catch up and the slots are handed over within this time.
const PATIENCE: Duration = Duration::from_secs(60);

/// How the migration went.
pub(super) struct Migration {
    progress: MigrationProgress,
    limit: Option<u64>,
    took: Duration,
    /// What the writers did meanwhile.
    pub(super) written: Written,
}

/// Migrates `moving`, about `estimate` bytes of keys and values, from `from` to `to`. The writers write to `slots`, all of which `from` has.
///
/// # Errors
///
/// It was refused, or ended otherwise than completed; says why.
pub(super) async fn migrate(
    from: &NodeProcess,
    to: &NodeProcess,
    slots: SlotRange,
    moving: SlotRange,
    estimate: u64,
) -> anyhow::Result<Migration> {
    let prefix = format!("{WRITERS_PREFIX}migration:");
    let writers = LoadGenerator::within(slots, &from.addresses().resp, &prefix, moving);
    say(&format!("timing writes for {} s before the migration", QUIET.as_secs()));
    tokio::time::sleep(QUIET).await;

    writers.enter(Period::During);
    let since = Instant::now();
    let limit = (estimate < LARGE).then(|| (estimate / COPY_SECONDS).max(SLOWEST));
    start(from, to, moving, limit).await?;
    say(&format!("migrating slots {moving} from {} back to {}, migration {ID}", from.id(), to.id()));
    follow(&from.addresses().grpc).await?;
    let took = since.elapsed();
    let progress = watch::last_migration(&from.addresses().grpc, ID).await?;

    writers.enter(Period::After);
    say(&format!("migrated; timing writes for {} s after it", QUIET.as_secs()));
    tokio::time::sleep(QUIET).await;
    Ok(Migration { progress, limit, took, written: writers.finish().await? })
}

async fn start(
    from: &NodeProcess,
    to: &NodeProcess,
    moving: SlotRange,
    limit: Option<u64>,
) -> anyhow::Result<()> {
    let request = StartMigrationRequest {
        migration_id: ID.into(),
        spec: Some(MigrationSpec {
            slots: Some(moving.into()),
            source_shard_id: "s2".into(),
            target_shard_id: "s1".into(),
            source_node_id: from.id().into(),
            target_node_id: to.id().into(),
            auto_complete: true,
            value_format: String::new(),
        }),
        target_address: to.addresses().grpc.clone(),
        limits: Some(MigrationLimits { max_bytes_per_second: limit, ..MigrationLimits::default() }),
        ..StartMigrationRequest::default()
    };
    let mut client = MigrationServiceClient::new(watch::connect(&from.addresses().grpc).await?);
    client.start_migration(request).await.map_err(Error::from).context("the migration was refused")?;
    Ok(())
}

/// Shows how far it is until it has ended.
async fn follow(address: &str) -> anyhow::Result<()> {
    let shown = bar(None, BYTES_BAR)?;
    let plain = !std::io::stderr().is_terminal();
    let mut watch = watch::migration(address, ID);
    let mut told: Option<Instant> = None;
    let mut copied: Option<Instant> = None;
    loop {
        if let Some(copied) = copied
            && copied.elapsed() > PATIENCE
        {
            let progress = watch::last_migration(address, ID).await?;
            bail!(
                "all rows are copied, but the slots are not handed over after {PATIENCE:?}: {}",
                ending(&progress)
            );
        }
        let Some(seen) = watch.changed(Duration::from_millis(100)).await else { continue };
        let state = seen.state();
        match state {
            MigrationState::Completed => break,
            MigrationState::Failed | MigrationState::Cancelled | MigrationState::NeedsOperator => {
                bail!("the migration ended otherwise: {}", ending(&seen));
            }
            MigrationState::CatchingUp
            | MigrationState::Ready
            | MigrationState::Freezing
            | MigrationState::Committing => {
                copied.get_or_insert_with(Instant::now);
            }
            _ => copied = None,
        }
        let progress = seen.progress.as_ref();
        let done = progress.map_or(0, |progress| progress.bytes_done);
        let total = progress.and_then(|progress| progress.bytes_total).unwrap_or(0).max(done);
        let doing = format!("{}, {} changes", name(state), count(seen.delta_entries));
        shown.set_length(total);
        shown.set_position(done);
        shown.set_message(doing.clone());
        let begun = state != MigrationState::Pending;
        if plain && begun && told.is_none_or(|told| told.elapsed() > Duration::from_secs(1)) {
            told = Some(Instant::now());
            say(&format!("  {} of {}: {doing}", bytes(done), bytes(total)));
        }
    }
    shown.finish_and_clear();
    Ok(())
}

/// `catching up`
fn name(state: MigrationState) -> String {
    state.as_str_name().trim_start_matches("MIGRATION_STATE_").replace('_', " ").to_lowercase()
}

/// Where it ended, and why.
fn ending(progress: &MigrationProgress) -> String {
    let error = progress.progress.as_ref().and_then(|progress| progress.error.as_ref());
    let why = error.map(|error| format!(": {} ({})", error.message, error.reason)).unwrap_or_default();
    format!("{}, after {} freezes{why}", name(progress.state()), progress.freeze_count)
}

impl Migration {
    /// What happened, and how long what took.
    pub(super) fn tell(&self, report: &mut Report) {
        let Self { progress, limit, took, written } = self;
        let copied = progress.progress.as_ref();
        report.row("rows copied", count(copied.map_or(0, |progress| progress.items_done)));
        report.row("bytes copied", bytes(copied.map_or(0, |progress| progress.bytes_done)));
        report.row("changes sent besides", count(progress.delta_entries));
        report.row(
            "limit of the rate",
            limit.map_or_else(|| "none".into(), |limit| format!("{}/s", bytes(limit))),
        );
        report.row("freezes", count(progress.freeze_count));
        report.row("longest freeze", format!("{} ms", count(progress.max_freeze_ms)));
        report.row("writes that were redirected", count(written.moved));
        report.row("writes whose connection broke", count(written.unknown));
        report.time("migrate, from start to end", *took);
    }

    /// How long writes took, a column for each period.
    pub(super) fn latencies(&self, report: &mut Report) {
        let Written { moving, staying, .. } = &self.written;
        let row = |name: &str, value: &dyn Fn(Period) -> String| {
            std::iter::once(name.to_owned()).chain(Period::ALL.map(value)).collect::<Vec<_>>()
        };
        report.columns(row("writes acknowledged", &|period| {
            count(moving.count(period) + staying.count(period))
        }));
        let quantiles = [("p50", 0.5), ("p99", 0.99), ("longest", 1.0)];
        for (slots, latencies) in [("slots that move", moving), ("slots that stay", staying)] {
            for (name, quantile) in quantiles {
                report.columns(row(&format!("{name}, {slots}"), &|period| time(latencies, period, quantile)));
            }
        }
    }
}

fn time(latencies: &Latencies, period: Period, quantile: f64) -> String {
    latencies.quantile(period, quantile).map_or_else(|| "-".into(), millis)
}

//! What was measured, as a table and as JSON.

use std::fmt;

use comfy_table::presets;
use comfy_table::{CellAlignment, Table};
use proto_migration::v1::{FreezeAttempt, FreezeOutcome};
use serde::Serialize;

use crate::disk::Fsync;
use crate::load::Measured;

#[derive(Serialize)]
pub(crate) struct Report {
    pub(crate) cores: usize,
    pub(crate) keys: u64,
    /// Of a disk with nothing else to do.
    pub(crate) fsync: Fsync,
    /// Writes per second to the moving slots.
    pub(crate) saturation: Option<u64>,
    pub(crate) rows: Vec<Row>,
}

/// One load.
#[derive(Serialize)]
pub(crate) struct Row {
    pub(crate) load: String,
    /// Beside that load, without a migration.
    pub(crate) fsync: Fsync,
    pub(crate) alone: Measured,
    pub(crate) migrating: Measured,
    pub(crate) after: Measured,
    pub(crate) migrations: usize,
    pub(crate) mean_migration_s: f64,
    /// Of those that led to a commit, shortest first.
    pub(crate) freezes: Vec<Freeze>,
    /// Freezes that were given up and tried again.
    pub(crate) given_up: usize,
    /// Of the time of the migrations: how long each writer to moving slots was slowed.
    pub(crate) slowed_percent: f64,
}

/// How long writes were held, and by what.
#[derive(Serialize)]
pub(crate) struct Freeze {
    pub(crate) total_ms: u64,
    pub(crate) drain_ms: u64,
    pub(crate) flush_ms: u64,
    pub(crate) prepare_ms: u64,
    pub(crate) commit_ms: u64,
}

impl Freeze {
    /// Unless it was given up.
    pub(crate) fn of(attempt: &FreezeAttempt) -> Option<Self> {
        let total_ms = attempt.freeze_ms.filter(|_| attempt.outcome() == FreezeOutcome::Committed)?;
        let FreezeAttempt { drain_ms, flush_ms, prepare_ms, commit_ms, .. } = *attempt;
        Some(Self { total_ms, drain_ms, flush_ms, prepare_ms, commit_ms })
    }
}

impl Report {
    pub(crate) fn new(keys: u64, fsync: Fsync) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { cores, keys, fsync, saturation: None, rows: Vec::new() }
    }
}

impl Row {
    fn freeze_ms(&self, percent: usize) -> u64 {
        let index = (self.freezes.len() * percent).div_ceil(100).saturating_sub(1);
        self.freezes.get(index).map_or(0, |freeze| freeze.total_ms)
    }

    fn cells(&self) -> Vec<String> {
        let three = |of: fn(&Measured) -> f64| {
            format!("{:.1} {:.1} {:.1}", of(&self.alone), of(&self.migrating), of(&self.after))
        };
        let ratio =
            |of: fn(&Measured) -> f64| format!("{:.2}", of(&self.migrating) / of(&self.alone).max(1.0));
        vec![
            self.load.clone(),
            format!("{:.0}", self.alone.moving.per_s),
            ratio(|measured| measured.moving.per_s),
            ratio(|measured| measured.staying.per_s),
            three(|measured| measured.moving.p99_ms),
            three(|measured| measured.staying.p99_ms),
            format!("{:.1} {:.1}", self.fsync.p50_ms, self.fsync.p99_ms),
            format!("{} {}", self.freeze_ms(50), self.freeze_ms(99)),
            format!("{:.1}", self.mean_migration_s),
            format!("{:.1}", self.slowed_percent),
            format!("{} {}", self.migrations, self.given_up),
        ]
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Fsync { p50_ms, p99_ms } = self.fsync;
        writeln!(
            f,
            "{} cores, {} keys; fsync without a load p50 {p50_ms:.2} ms, p99 {p99_ms:.2} ms",
            self.cores, self.keys
        )?;
        if let Some(saturation) = self.saturation {
            writeln!(f, "a node is saturated by {saturation} writes/s to the moving slots")?;
        }
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN);
        table.set_header([
            "offered, /s",
            "acked/s",
            "moving ×",
            "others ×",
            "moving p99 ms",
            "others p99 ms",
            "fsync ms",
            "freeze ms",
            "migration s",
            "slowed %",
            "tries",
        ]);
        table.add_rows(self.rows.iter().map(Row::cells));
        for column in table.column_iter_mut() {
            column.set_cell_alignment(CellAlignment::Right);
        }
        writeln!(f, "{table}")?;
        writeln!(
            f,
            "acked: without a migration; ×: writes/s while slots move, relative to that; p99: before, during and after the migrations; \
             fsync: p50 and p99 beside the load, without a migration; freeze: p50 and p99; slowed: how much of the time of the migrations writers to moving slots were slowed; \
             tries: migrations, and freezes that were given up"
        )
    }
}

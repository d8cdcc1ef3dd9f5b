//! What the demo says in the end.

use std::time::Duration;

use comfy_table::{Cell, CellAlignment, Table, presets};
use indicatif::{HumanBytes, HumanCount};

/// The numbers of a run.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// Rows: what, and how much.
    rows: Vec<(String, String)>,
}

impl Report {
    /// Adds a row.
    pub(super) fn row(&mut self, what: impl Into<String>, how_much: impl Into<String>) {
        self.rows.push((what.into(), how_much.into()));
    }

    /// Adds a row of a time.
    pub(super) fn time(&mut self, what: &str, time: Duration) {
        self.row(what, seconds(time));
    }

    /// The table.
    pub(super) fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        for (what, how_much) in &self.rows {
            table.add_row([Cell::new(what), Cell::new(how_much).set_alignment(CellAlignment::Right)]);
        }
        table
    }
}

/// `1,234`
pub(super) fn count(number: u64) -> String {
    HumanCount(number).to_string()
}

/// `1.21 MiB`
pub(super) fn bytes(number: u64) -> String {
    HumanBytes(number).to_string()
}

/// `1.234 s`
pub(super) fn seconds(time: Duration) -> String {
    format!("{:.3} s", time.as_secs_f64())
}

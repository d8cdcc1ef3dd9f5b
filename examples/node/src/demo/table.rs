//! What the demo says in the end.

use std::time::Duration;

use comfy_table::{Cell, CellAlignment, Table, presets};
use indicatif::{HumanBytes, HumanCount};

/// The numbers of a part of a run.
#[derive(Debug)]
pub(super) struct Report {
    /// Names of the columns; the first is what the part is.
    header: Vec<String>,
    /// Rows: what, and how much.
    rows: Vec<Vec<String>>,
}

impl Report {
    /// A report of the part `name`.
    pub(super) fn new<const N: usize>(name: &str, columns: [&str; N]) -> Self {
        Self { header: std::iter::once(name).chain(columns).map(str::to_owned).collect(), rows: Vec::new() }
    }

    /// Adds a row.
    pub(super) fn row(&mut self, what: impl Into<String>, how_much: impl Into<String>) {
        self.columns(vec![what.into(), how_much.into()]);
    }

    /// Adds a row of more than one number.
    pub(super) fn columns(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    /// Adds a row of a time.
    pub(super) fn time(&mut self, what: &str, time: Duration) {
        self.row(what, seconds(time));
    }

    /// The table.
    pub(super) fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        table.set_header(cells(&self.header));
        for row in &self.rows {
            table.add_row(cells(row));
        }
        table
    }
}

/// What to the left, how much to the right.
fn cells(row: &[String]) -> impl Iterator<Item = Cell> {
    row.iter().enumerate().map(|(column, text)| {
        let alignment = if column == 0 { CellAlignment::Left } else { CellAlignment::Right };
        Cell::new(text).set_alignment(alignment)
    })
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

/// `1.23 ms`
pub(super) fn millis(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1000.0)
}

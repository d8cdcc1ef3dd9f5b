//! Export: all live rows of a slot range, as of one moment.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::format::{Handover, SnapshotHeader, SnapshotWriter};
use crate::common::{NodeId, SlotRange};
use crate::store::tables;
use crate::store::visible::VisibleRows;
use crate::store::{Store, StoreError, unix_ms};

/// What an export holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportSummary {
    /// Live rows.
    pub rows: u64,
    /// Size of the file in bytes; 0 where it was written to something else.
    pub file_bytes: u64,
}

impl Store {
    /// Writes all live rows of `range` to `out`, from one read transaction: the state of one moment,
    /// whatever is written meanwhile. Blocks.
    ///
    /// # Errors
    ///
    /// What was written is of no use.
    pub fn export<W: Write>(
        &self,
        source: &NodeId,
        range: SlotRange,
        handover: Handover,
        out: W,
    ) -> Result<(W, ExportSummary), StoreError> {
        let now = unix_ms();
        let (txn, generations) = self.inner.shared.generations.begin_read(&self.inner.shared.database)?;
        let table = txn.open_table(tables::ROWS)?;
        let header = SnapshotHeader {
            start: range.start(),
            end: range.end(),
            source: source.as_str().into(),
            taken_unix_ms: now,
            handover,
        };
        let mut writer = SnapshotWriter::begin(out, &header)?;
        let mut rows = VisibleRows::new(&table, &generations, range, None)?;
        while let Some(found) = rows.next()? {
            let row = found.row()?;
            if row.is_live(now) {
                writer.row(found.place()?.key, row.value, row.expires_at)?;
            }
        }
        let (out, rows) = writer.finish()?;
        Ok((out, ExportSummary { rows, file_bytes: 0 }))
    }

    /// [`Store::export`] to a file, durably; it appears under its name only when it is whole. Blocks.
    ///
    /// # Errors
    ///
    /// No file appeared.
    pub fn export_file(
        &self,
        source: &NodeId,
        range: SlotRange,
        handover: Handover,
        path: &Path,
    ) -> Result<ExportSummary, StoreError> {
        let failed = |error| StoreError::io(format!("cannot write {}", path.display()), error);
        let partial = path.with_extension("partial");
        let file = File::create(&partial).map_err(failed)?;
        let (out, summary) = self.export(source, range, handover, BufWriter::with_capacity(1 << 20, file))?;
        let file = out.into_inner().map_err(|error| failed(error.into_error()))?;
        file.sync_all().map_err(failed)?;
        let file_bytes = file.metadata().map_err(failed)?.len();
        std::fs::rename(&partial, path).map_err(failed)?;
        if let Some(directory) = path.parent() {
            File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)?;
        }
        Ok(ExportSummary { file_bytes, ..summary })
    }
}

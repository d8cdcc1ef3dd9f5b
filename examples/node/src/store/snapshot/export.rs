//! Export: all live rows of a slot range, as of one moment.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::format::{Handover, SnapshotHeader, SnapshotWriter};
use crate::common::{NodeId, SlotRange};
use crate::store::tables;
use crate::store::visible::VisibleRows;
use crate::store::{Store, StoreError, unix_ms};

/// How the name of a file ends that is not whole yet.
pub(crate) const PARTIAL: &str = "partial";

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

    /// [`Store::export`] to a file, durably; it appears under its name only when it is whole. Leaves the room on the disk that is to be left free. Blocks.
    ///
    /// # Errors
    ///
    /// No file appeared, and nothing is left of it.
    pub fn export_file(
        &self,
        source: &NodeId,
        range: SlotRange,
        handover: Handover,
        path: &Path,
    ) -> Result<ExportSummary, StoreError> {
        let partial = path.with_extension(PARTIAL);
        let written = self.export_to(source, range, handover, &partial, path);
        if written.is_err() {
            // What it takes is what clients' writes need, if it was for lack of room.
            let _ = std::fs::remove_file(&partial);
        }
        written
    }

    fn export_to(
        &self,
        source: &NodeId,
        range: SlotRange,
        handover: Handover,
        partial: &Path,
        path: &Path,
    ) -> Result<ExportSummary, StoreError> {
        let failed = |error| StoreError::io(format!("cannot write {}", path.display()), error);
        let file = Sparing { store: self, file: File::create(partial).map_err(failed)?, granted: 0 };
        let (out, summary) = self.export(source, range, handover, BufWriter::with_capacity(1 << 20, file))?;
        let Sparing { file, .. } = out.into_inner().map_err(|error| failed(error.into_error()))?;
        file.sync_all().map_err(failed)?;
        let file_bytes = file.metadata().map_err(failed)?.len();
        std::fs::rename(partial, path).map_err(failed)?;
        if let Some(directory) = path.parent() {
            File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)?;
        }
        Ok(ExportSummary { file_bytes, ..summary })
    }
}

/// A file that leaves the database its room: on a full disk that would refuse all work of all clients.
struct Sparing<'s> {
    store: &'s Store,
    file: File,
    /// Bytes that may be written until the disk is looked at again.
    granted: usize,
}

/// Bytes for which the disk is looked at once.
const STEP: usize = 16 << 20;

impl Write for Sparing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.granted < bytes.len() {
            let step = STEP.max(bytes.len());
            let room = self.store.room().map_err(io::Error::other)?;
            if usize::try_from(room).is_ok_and(|room| room < step) {
                let problem = "the disk would have less free space than the database is to have left";
                return Err(io::Error::new(io::ErrorKind::StorageFull, problem));
            }
            self.granted = step;
        }
        let written = self.file.write(bytes)?;
        self.granted -= written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::test_store::set;
    use crate::store::{Init, StoreOptions};

    #[tokio::test]
    async fn an_export_leaves_free_what_is_to_be_left_free() {
        let dir = tempfile::tempdir().unwrap();
        let (node, all) = (NodeId::new("n1").unwrap(), SlotRange::FULL);
        let init = Init { node: node.clone(), slots: Some(vec![all]), others: vec![] };
        let full = StoreOptions { reserve_bytes: 1 << 60, ..StoreOptions::default() };
        let (store, _) = Store::open(&dir.path().join("store"), &init, &full).unwrap();
        set(&store, "key", "value").await;
        let files = dir.path().join("files");
        std::fs::create_dir(&files).unwrap();
        let path = files.join("rows");
        let refused = store.export_file(&node, all, Handover::default(), &path).unwrap_err();
        assert!(refused.to_string().contains("less free space"), "{refused}");
        assert_eq!(std::fs::read_dir(&files).unwrap().count(), 0, "nothing is left of it");
    }
}

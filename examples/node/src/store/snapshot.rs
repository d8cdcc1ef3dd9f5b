//! Slot ranges in and out of the database: consistent export to a snapshot file, import, giving up.

mod export;
mod format;
mod import;

pub use export::ExportSummary;
pub(crate) use export::PARTIAL;
pub use format::{Handover, SnapshotHeader, read_header};

//! The last finished transfers.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Mutex;

use proto_common::durable::RecordLog;

use crate::store::StoreError;

use super::lock;
use super::recover::describe;

#[derive(Debug)]
pub(super) struct History {
    path: PathBuf,
    limit: usize,
    log: Mutex<Log>,
}

#[derive(Debug, Default)]
struct Log {
    /// `None` before the first use and after a failure.
    file: Option<RecordLog>,
    /// The last ones; the file holds at most as many again.
    records: VecDeque<Vec<u8>>,
    in_file: usize,
}

impl History {
    pub(super) fn new(path: PathBuf, limit: usize) -> Self {
        Self { path, limit: limit.max(1), log: Mutex::default() }
    }

    /// The records, oldest first.
    pub(super) fn load(&self, damage: &mut Vec<String>) -> Result<Vec<Vec<u8>>, StoreError> {
        let mut log = lock(&self.log);
        self.open(&mut log, damage)?;
        Ok(log.records.iter().cloned().collect())
    }

    fn open(&self, log: &mut Log, damage: &mut Vec<String>) -> Result<(), StoreError> {
        let (file, records, cut) =
            RecordLog::open(&self.path).map_err(|error| StoreError::io("open the history", error))?;
        damage.extend(cut.map(|cut| format!("history: {}", describe(cut))));
        log.in_file = records.len();
        log.records = records.into();
        log.trim(self.limit);
        log.file = Some(file);
        Ok(())
    }

    /// Adds a record, durably.
    pub(super) fn add(&self, record: &[u8]) -> Result<(), StoreError> {
        let failed = |error| StoreError::io("record a finished transfer", error);
        let mut log = lock(&self.log);
        if log.file.is_none() {
            let mut damage = Vec::new();
            self.open(&mut log, &mut damage)?;
            for what in damage {
                tracing::warn!("{what}");
            }
        }
        // Put back when all went well; else the next call reads what the file holds.
        let Some(mut file) = log.file.take() else { return Ok(()) };
        if log.in_file >= self.limit.saturating_mul(2) {
            file.rewrite(&log.records).map_err(failed)?;
            log.in_file = log.records.len();
        }
        file.append(record).map_err(failed)?;
        file.sync().map_err(failed)?;
        log.file = Some(file);
        log.in_file += 1;
        log.records.push_back(record.to_vec());
        log.trim(self.limit);
        Ok(())
    }
}

impl Log {
    fn trim(&mut self, limit: usize) {
        while self.records.len() > limit {
            self.records.pop_front();
        }
    }
}

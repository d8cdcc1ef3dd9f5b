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
    /// Whether `records` are those of the file.
    loaded: bool,
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
        log.loaded = true;
        log.file = Some(file);
        Ok(())
    }

    /// Adds a record, durably.
    pub(super) fn add(&self, record: &[u8]) -> Result<(), StoreError> {
        let failed = |error| StoreError::io("record a finished transfer", error);
        let mut log = lock(&self.log);
        if log.file.is_none() && log.loaded {
            // After a failure the file may read as it was written without being so on the disk, and the system tells only once.
            let (mut file, ..) = RecordLog::open(&self.path).map_err(failed)?;
            file.rewrite(&log.records).map_err(failed)?;
            log.in_file = log.records.len();
            log.file = Some(file);
        } else if log.file.is_none() {
            let mut damage = Vec::new();
            self.open(&mut log, &mut damage)?;
            for what in damage {
                tracing::warn!("{what}");
            }
        }
        // Put back when all went well; else the next call writes the file anew.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_failure_the_file_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history");
        let history = History::new(path.clone(), 10);
        history.add(b"one").unwrap();
        history.add(b"two").unwrap();
        // What a failed sync leaves: no handle, and a disk that holds something else than what was written.
        lock(&history.log).file = None;
        std::fs::write(&path, [0; 40]).unwrap();
        history.add(b"three").unwrap();
        let mut damage = Vec::new();
        let found = History::new(path, 10).load(&mut damage).unwrap();
        assert_eq!(found, [b"one".to_vec(), b"two".to_vec(), b"three".to_vec()]);
        assert_eq!(damage, Vec::<String>::new());
    }
}

//! The last finished tasks.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Damage, RecordLog};

/// The last records of a [`RecordLog`]: older ones are dropped. All methods block.
#[derive(Debug)]
pub struct History {
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
    /// A history in the file at `path`, of the last `limit` records. Touches no file yet.
    #[must_use]
    pub fn new(path: PathBuf, limit: usize) -> Self {
        Self { path, limit: limit.max(1), log: Mutex::default() }
    }

    /// The records, oldest first, and what of the file could not be read.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn load(&self) -> io::Result<(Vec<Vec<u8>>, Option<Damage>)> {
        let mut log = self.log();
        let damage = self.open(&mut log)?;
        Ok((log.records.iter().cloned().collect(), damage))
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, log: &mut Log) -> io::Result<Option<Damage>> {
        let (file, records, damage) = RecordLog::open(&self.path)?;
        log.in_file = records.len();
        log.records = records.into();
        log.trim(self.limit);
        log.loaded = true;
        log.file = Some(file);
        Ok(damage)
    }

    /// Adds a record, durably.
    ///
    /// # Errors
    ///
    /// Those of the file system; the record may be there or not after a crash. The next call starts from what was added before.
    pub fn add(&self, record: &[u8]) -> io::Result<()> {
        let mut log = self.log();
        if log.file.is_none() && log.loaded {
            // After a failure the file may read as it was written without being so on the disk, and the system tells only once.
            let (mut file, ..) = RecordLog::open(&self.path)?;
            file.rewrite(&log.records)?;
            log.in_file = log.records.len();
            log.file = Some(file);
        } else if log.file.is_none()
            && let Some(damage) = self.open(&mut log)?
        {
            tracing::warn!(path = %self.path.display(), "{damage}");
        }
        // Put back when all went well; else the next call writes the file anew.
        let Some(mut file) = log.file.take() else { return Ok(()) };
        if log.in_file >= self.limit.saturating_mul(2) {
            file.rewrite(&log.records)?;
            log.in_file = log.records.len();
        }
        file.append(record)?;
        file.sync()?;
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
    fn keeps_the_last_ones_in_a_bounded_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history");
        let history = History::new(path.clone(), 3);
        let mut longest = 0;
        for number in 0..50_u8 {
            history.add(&[number; 100]).unwrap();
            longest = longest.max(std::fs::metadata(&path).unwrap().len());
        }
        assert!(longest <= 6 * 112, "{longest}");
        let (found, _) = History::new(path, 3).load().unwrap();
        assert_eq!(found, [vec![47; 100], vec![48; 100], vec![49; 100]]);
    }

    #[test]
    fn after_a_failure_the_file_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history");
        let history = History::new(path.clone(), 10);
        history.add(b"one").unwrap();
        history.add(b"two").unwrap();
        // What a failed sync leaves: no handle, and a disk that holds something else than what was written.
        history.log().file = None;
        std::fs::write(&path, [0; 40]).unwrap();
        history.add(b"three").unwrap();
        let (found, damage) = History::new(path, 10).load().unwrap();
        assert_eq!(found, [b"one".to_vec(), b"two".to_vec(), b"three".to_vec()]);
        assert_eq!(damage, None);
    }
}

//! Opening the database file: made as a whole or not at all, and verified before anything of it is believed.

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use proto::common::durable::sync_dir;
use redb::{Database, DatabaseError, StorageError};

use super::identity::{self, Identity, Init};
use super::{StoreError, StoreOptions};

pub(super) const DATABASE_FILE: &str = "node.redb";
/// A database that is being made.
const NEW_FILE: &str = "node.redb.new";
/// What else a node keeps in its data directory, and never without a database.
const BESIDE: [&str; 4] = ["migrations", "snapshots", "splits", "incarnation"];

/// Opens the database in `directory`, and makes it where nothing is there yet.
pub(super) fn open(
    directory: &Path,
    init: &Init,
    options: &StoreOptions,
) -> Result<(Database, Identity), StoreError> {
    let file = directory.join(DATABASE_FILE);
    let fresh = match fs::metadata(&file) {
        Ok(_) => false,
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        Err(error) => return Err(StoreError::io(format!("cannot open {}", file.display()), error)),
    };
    if fresh {
        make(directory, &file, init, options)?;
    }
    unharmed(&file, || {
        let database = existing(directory, &file, options)?;
        let found = identity::load(&database, directory, init)?;
        Ok((database, Identity { fresh, ..found }))
    })
}

/// Opens the database in `directory` as whichever node's it is.
pub(super) fn open_existing(
    directory: &Path,
    options: &StoreOptions,
) -> Result<(Database, Identity), StoreError> {
    let file = directory.join(DATABASE_FILE);
    if matches!(fs::metadata(&file), Err(error) if error.kind() == io::ErrorKind::NotFound) {
        let what = format!("there is no {DATABASE_FILE} in it; is it the --data of a node?");
        return Err(StoreError::Mismatch { path: directory.to_path_buf(), what });
    }
    unharmed(&file, || {
        let database = existing(directory, &file, options)?;
        let init = Init { node: identity::node(&database)?, slots: None, others: Vec::new() };
        let identity = identity::load(&database, directory, &init)?;
        Ok((database, identity))
    })
}

/// A crash leaves a whole database or none: a file that is empty or holds no identity is not taken for a new one.
fn make(directory: &Path, file: &Path, init: &Init, options: &StoreOptions) -> Result<(), StoreError> {
    for beside in BESIDE {
        let path = directory.join(beside);
        let there = path.try_exists();
        // What cannot be looked at may be there.
        if there.map_err(|error| StoreError::io(format!("cannot look at {}", path.display()), error))? {
            let what = format!("it is missing, while {beside} beside it is there");
            return Err(StoreError::DamagedFile { path: file.to_path_buf(), what });
        }
    }
    let new = directory.join(NEW_FILE);
    let failed = |error| StoreError::io(format!("cannot make {}", file.display()), error);
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let database = builder(options).create(&new).map_err(|error| opening(directory, &new, error))?;
    identity::init(&database, init)?;
    drop(database);
    fs::rename(&new, file).and_then(|()| sync_dir(directory)).map_err(failed)
}

fn existing(directory: &Path, file: &Path, options: &StoreOptions) -> Result<Database, StoreError> {
    let mut builder = builder(options);
    // What redb repairs after a crash it verifies. Of a file that was closed it would believe each page that it meets.
    builder.set_check_integrity_on_open(options.verify);
    builder.set_repair_callback(|session| {
        tracing::info!(progress = session.progress(), "verifying the database")
    });
    builder.open(file).map_err(|error| opening(directory, file, error))
}

fn builder(options: &StoreOptions) -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(options.cache_bytes);
    builder
}

fn opening(directory: &Path, file: &Path, error: DatabaseError) -> StoreError {
    let path = || PathBuf::from(file);
    match error {
        DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path: directory.to_path_buf() },
        DatabaseError::Storage(StorageError::Corrupted(what)) => {
            StoreError::DamagedFile { path: path(), what }
        }
        DatabaseError::Storage(StorageError::Io(error))
            if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
        {
            StoreError::DamagedFile { path: path(), what: error.to_string() }
        }
        DatabaseError::UpgradeRequired(version) => {
            let what = format!("its file format is {version}, which is not that of this program");
            StoreError::DamagedFile { path: path(), what }
        }
        error => StoreError::io(format!("cannot open {}", file.display()), io::Error::other(error)),
    }
}

/// Reads what may be damaged: a panic of the database on the way is an error that names the file.
fn unharmed<T>(file: &Path, work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    let damaged = |what: String| StoreError::DamagedFile { path: file.to_path_buf(), what };
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Err(StoreError::Damaged(what))) => Err(damaged(what)),
        Ok(Err(StoreError::Database(error))) => Err(damaged(error.to_string())),
        Ok(done) => done,
        Err(_) => Err(damaged("reading it ended in a panic".into())),
    }
}

/// [`unharmed`] of what memory holds of the database.
pub(super) fn load<T>(
    directory: &Path,
    work: impl FnOnce() -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    unharmed(&directory.join(DATABASE_FILE), work)
}

#[cfg(test)]
#[path = "open_tests.rs"]
mod tests;

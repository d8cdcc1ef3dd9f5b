//! Files that survive a crash: small ones replaced as a whole, and logs of records.
//!
//! Everything here blocks; call it from a blocking thread. Each path has one writer at a time: that is for the owner of the
//! directory to ensure.

mod history;
mod log;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

pub use history::History;
pub use log::{Damage, MAX_RECORD_LEN, RecordLog};

/// Replaces the file at `path` by `content`, or leaves it as it was, whatever crashes.
///
/// Written to `<path>.tmp`, synced, renamed, and the directory synced: once this returns, the new content is durable. A leftover
/// `.tmp` of a crash is overwritten by the next call.
///
/// # Errors
///
/// Those of the file system. After an error the file holds the old or the new content, and which one a crash leaves is open.
pub fn write_atomic(path: impl AsRef<Path>, content: &[u8]) -> io::Result<()> {
    replace(path.as_ref(), |file| file.write_all(content)).map(drop)
}

/// Makes what was created, renamed or removed in the directory `path` durable.
///
/// # Errors
///
/// Those of the file system.
pub fn sync_dir(path: impl AsRef<Path>) -> io::Result<()> {
    // Windows cannot open a directory as a file; its file systems order such changes by themselves.
    if cfg!(unix) { File::open(path)?.sync_all() } else { Ok(()) }
}

/// Makes the directory `path`, and those above it that are missing, durably. One that is there is made durable, too: whoever made it may have
/// crashed before that.
///
/// # Errors
///
/// Those of the file system.
pub fn create_dir_all(path: impl AsRef<Path>) -> io::Result<()> {
    let path = path.as_ref();
    let missing: Vec<&Path> = path.ancestors().skip(1).take_while(|above| is_missing(above)).collect();
    fs::create_dir_all(path)?;
    for made in missing {
        if let Some(parent) = made.parent() {
            sync_dir(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })?;
        }
    }
    path.canonicalize()?.parent().map_or(Ok(()), sync_dir)
}

fn is_missing(path: &Path) -> bool {
    !path.as_os_str().is_empty() && !path.exists()
}

/// A path in `directory` where nothing lies yet: `name`, or `name` with the first free number.
///
/// # Errors
///
/// Those of the file system.
pub fn free_path(directory: impl AsRef<Path>, name: impl AsRef<OsStr>) -> io::Result<PathBuf> {
    let mut number = 0_u64;
    loop {
        let mut numbered = name.as_ref().to_owned();
        if number > 0 {
            numbered.push(format!(".{number}"));
        }
        let path = directory.as_ref().join(numbered);
        match fs::symlink_metadata(&path) {
            Ok(_) => number += 1,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(path),
            Err(error) => return Err(error),
        }
    }
}

/// Replaces the file at `path` by what `write` writes, and returns it, open for writing at its end.
fn replace(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<File> {
    let temporary = with_suffix(path, ".tmp");
    let result = File::create(&temporary).and_then(|mut file| {
        write(&mut file)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        Ok(file)
    });
    if result.is_err() {
        // The first error says more than one about the leftover, which the next call overwrites.
        let _ = fs::remove_file(&temporary);
    }
    let file = result?;
    sync_dir(parent(path))?;
    Ok(file)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("CURRENT");
        write_atomic(&path, b"one").unwrap();
        // A leftover of a crash, longer than what follows.
        fs::write(dir.path().join("CURRENT.tmp"), b"half of something long").unwrap();
        write_atomic(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_leaves_the_old_content_and_no_leftover() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("CURRENT");
        write_atomic(&path, b"one").unwrap();
        let failed = replace(&path, |file| {
            file.write_all(b"tw")?;
            Err(io::Error::other("disk full"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "disk full");
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

        // The target is a directory: the rename fails.
        fs::create_dir(dir.path().join("dir")).unwrap();
        assert!(write_atomic(dir.path().join("dir"), b"x").is_err());
        assert!(!dir.path().join("dir.tmp").exists());
    }
}

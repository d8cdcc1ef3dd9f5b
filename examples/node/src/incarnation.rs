//! Which start of the node this is.

use std::fs;
use std::io::{self, Read as _};
use std::path::Path;

use proto::common::durable::write_atomic;

use crate::store::unix_ms;

/// Beside the database, not in it: a start that is told nothing new writes nothing there, so that a node whose disk is full serves reads.
const FILE: &str = "incarnation";

/// The next one: the time of the start in milliseconds since the Unix epoch, or one more than the last one where the clock was set back. Where that cannot be
/// kept, the log says so, and peers may take some answers to know the next start.
pub(crate) fn next(directory: &Path) -> u64 {
    let file = directory.join(FILE);
    let last = last(&file).unwrap_or_else(|error| {
        if error.kind() != io::ErrorKind::NotFound {
            tracing::warn!(file = %file.display(), %error, "the last incarnation cannot be read");
        }
        0
    });
    let next = last.saturating_add(1).max(unix_ms());
    if let Err(error) = write_atomic(&file, format!("{next}\n").as_bytes()) {
        tracing::warn!(file = %file.display(), %error, "the incarnation cannot be kept");
    }
    next
}

fn last(file: &Path) -> io::Result<u64> {
    if !fs::metadata(file)?.is_file() {
        // To open a pipe would wait for whoever writes into it.
        return Err(io::Error::other("it is no file"));
    }
    let mut text = String::new();
    fs::File::open(file)?.take(64).read_to_string(&mut text)?;
    text.trim().parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rises_although_the_clock_was_set_back_or_nothing_can_be_kept() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        let first = next(dir.path());
        assert!(first <= unix_ms() && first > 1_700_000_000_000, "{first}");
        assert!(next(dir.path()) > first);
        let future = unix_ms() + 1_000_000_000;
        fs::write(&file, format!("{future}\n")).unwrap();
        assert_eq!((next(dir.path()), next(dir.path())), (future + 1, future + 2));
        fs::write(&file, b"what\xff").unwrap();
        assert!(next(dir.path()) < future, "that is lost");
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        assert!(next(dir.path()) > first);
    }
}

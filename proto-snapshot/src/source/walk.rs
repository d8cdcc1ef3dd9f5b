//! Finding the files below a directory, on several threads: a receiver has nothing to do before it has the list.

use std::fs::{self, DirEntry};
use std::io;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;

use proto_common::path::FileName;
use proto_common::text::printable;

use super::SourceError;
use super::disk::{Entry, Identity, lock};

/// Threads at most: what they ask of the kernel is short, and takes locks there. Of 100,000 files in a memory file system one thread lists
/// 400,000 in a second. On 2 cores, their transfer took 0.92 s with two threads and 0.96 with one.
const THREADS: usize = 4;

/// Files of one directory that are asked about at once; those beyond are for any thread, so that one very large directory occupies all of them. With 64
/// and 4096 the transfer of 100,000 files, a thousand to a directory, took as long.
const ASKED: usize = 512;

/// Most bytes of a name that an error shows.
const SHOWN: usize = 256;

/// Something to do.
#[derive(Debug)]
enum Job {
    /// List the directory, whose files have names that begin so.
    List(PathBuf, String),
    /// Ask what each of these files is.
    Ask(Vec<(DirEntry, FileName)>),
}

/// What one thread has found.
#[derive(Debug, Default)]
struct Found {
    files: Vec<Entry>,
    refused: Vec<String>,
}

impl Found {
    /// Most file systems list a directory in some order, so there are runs to be merged.
    fn sort(&mut self) {
        self.files.sort_by(|a, b| a.name.cmp(&b.name));
    }
}

/// What is left to do.
#[derive(Debug, Default)]
struct Walk {
    state: Mutex<State>,
    /// There are more jobs, or there will be none.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    jobs: Vec<Job>,
    /// Jobs in hand, which may make others.
    busy: usize,
    /// Why there is no result; nothing more is begun then.
    failed: Option<SourceError>,
}

/// A job in hand, until dropped: also by a panic, or the other threads would wait for ever.
struct Busy<'a>(&'a Walk);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).busy -= 1;
        self.0.changed.notify_all();
    }
}

/// The files below `root`, sorted by name.
pub(super) fn walk(root: &Path) -> Result<Vec<Entry>, SourceError> {
    let walk = Walk::default();
    walk.add(Job::List(root.to_owned(), String::new()));
    let mut found = Found::default();
    // A thread costs as much as some ten files, so there has to be something for it.
    while walk.len() == 1 && walk.step(&mut found) {}
    if walk.len() > 0 {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS);
        thread::scope(|scope| {
            let help = || {
                let mut found = Found::default();
                while walk.step(&mut found) {}
                found.sort();
                found
            };
            // Where there can be no more threads, those that there are do it all.
            let helpers = (1..threads).map_while(|_| thread::Builder::new().spawn_scoped(scope, help).ok());
            let helpers: Vec<_> = helpers.collect();
            while walk.step(&mut found) {}
            found.sort();
            for helper in helpers {
                let more = helper.join().unwrap_or_else(|panic| resume_unwind(panic));
                found.files.extend(more.files);
                found.refused.extend(more.refused);
            }
        });
    }
    let Found { mut files, mut refused } = found;
    let failed = lock(&walk.state).failed.take();
    if let Some(error) = failed {
        return Err(error);
    }
    if !refused.is_empty() {
        refused.sort_unstable();
        return Err(SourceError::Unsupported { entries: refused });
    }
    if u32::try_from(files.len()).is_err() {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "more than 2^32 files");
        return Err(SourceError::Io { name: ".".to_owned(), source });
    }
    // What each thread has put in order is merged.
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

impl Walk {
    fn len(&self) -> usize {
        lock(&self.state).jobs.len()
    }

    fn add(&self, job: Job) {
        lock(&self.state).jobs.push(job);
        self.changed.notify_one();
    }

    /// Does the next job, once there is one; false when all are done, or one has failed.
    fn step(&self, found: &mut Found) -> bool {
        let mut state = lock(&self.state);
        let job = loop {
            if state.failed.is_some() {
                return false;
            }
            match state.jobs.pop() {
                Some(job) => break job,
                None if state.busy == 0 => return false,
                None => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        };
        state.busy += 1;
        drop(state);
        let _busy = Busy(self);
        let done = match job {
            Job::List(dir, prefix) => self.list(&dir, &prefix, found),
            Job::Ask(files) => ask(files, found),
        };
        if let Err(error) = done {
            lock(&self.state).failed.get_or_insert(error);
        }
        true
    }

    fn list(&self, dir: &Path, prefix: &str, found: &mut Found) -> Result<(), SourceError> {
        let failed = |source| SourceError::Io { name: shown(prefix), source };
        let mut files = Vec::new();
        for entry in fs::read_dir(dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = match entry.file_name().into_string() {
                Ok(name) => format!("{prefix}{name}"),
                Err(name) => {
                    let name = shown(&format!("{prefix}{}", name.display()));
                    found.refused.push(format!("{name}: the name is not UTF-8"));
                    continue;
                }
            };
            let kind = entry.file_type().map_err(failed)?;
            let refused = match FileName::new(&name) {
                // A directory counts by the files in it; but its name has to be a valid one for theirs to be.
                Err(error) => error.problem().to_string(),
                Ok(_) if kind.is_dir() => {
                    self.add(Job::List(entry.path(), format!("{name}/")));
                    continue;
                }
                Ok(file) if kind.is_file() => {
                    files.push((entry, file));
                    if files.len() == ASKED {
                        self.add(Job::Ask(std::mem::take(&mut files)));
                    }
                    continue;
                }
                Ok(_) if kind.is_symlink() => "is a symbolic link".to_owned(),
                Ok(_) => "is neither a file nor a directory".to_owned(),
            };
            found.refused.push(format!("{}: {refused}", shown(&name)));
        }
        ask(files, found)
    }
}

fn ask(files: Vec<(DirEntry, FileName)>, found: &mut Found) -> Result<(), SourceError> {
    for (entry, name) in files {
        // Of the entry itself, also should it have become a link meanwhile.
        match entry.metadata() {
            Ok(metadata) => found.files.push(Entry { identity: Identity::of(&metadata), name }),
            Err(source) => return Err(SourceError::Io { name: shown(name.as_str()), source }),
        }
    }
    Ok(())
}

fn shown(name: &str) -> String {
    if name.is_empty() { ".".to_owned() } else { printable(name, SHOWN) }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Ends only if every thread does.
    fn work(walk: &Walk) -> Vec<Found> {
        thread::scope(|scope| {
            let help = || {
                let mut found = Found::default();
                while walk.step(&mut found) {}
                found.sort();
                found
            };
            let helpers: Vec<_> = (0..THREADS).map(|_| scope.spawn(help)).collect();
            helpers.into_iter().map(|helper| helper.join().unwrap()).collect()
        })
    }

    #[test]
    fn a_directory_that_cannot_be_listed_ends_it_for_all_threads() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("f"), "x").unwrap();
        let walk = Walk::default();
        for number in 0..100 {
            let at = if number == 50 { dir.path().join("absent") } else { dir.path().to_owned() };
            walk.add(Job::List(at, format!("{number}/")));
        }
        work(&walk);
        let state = walk.state.into_inner().unwrap();
        let Some(SourceError::Io { name, .. }) = state.failed else { panic!("{:?}", state.failed) };
        assert_eq!((name.as_str(), state.busy), ("50/", 0));
        assert!(!state.jobs.is_empty(), "it did not end early");
    }

    #[test]
    fn a_panic_in_one_thread_leaves_no_other_waiting() {
        let walk = Walk::default();
        let waiting = AtomicUsize::new(0);
        thread::scope(|scope| {
            lock(&walk.state).busy = 1;
            let busy = Busy(&walk);
            let helper = scope.spawn(|| {
                waiting.fetch_add(1, Ordering::SeqCst);
                walk.step(&mut Found::default())
            });
            while waiting.load(Ordering::SeqCst) == 0 {
                thread::yield_now();
            }
            assert!(!helper.is_finished(), "a job in hand may make others");
            let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let _busy = busy;
                panic!("as a test");
            }));
            assert!(panicked.is_err());
            assert!(!helper.join().unwrap());
        });
    }
}

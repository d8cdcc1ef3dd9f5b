//! What the store asks of the system before it says that something is durable, as `strace` sees it.
//!
//! On the file systems of most machines one synced directory takes the others along, so no power cut shows one that was forgotten.
//! Says so and passes where there is no `strace`, or no right to trace.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use proto_common::fence::Fence;

use super::support::*;
use crate::store::{Claim, SnapshotStore as _, Staging as _};

const DIR: &str = "PROTO_SNAPSHOT_STORE_TRACED_DIR";
/// Where the store is in that directory; nothing of it is there before.
const STORE: &str = "above/store";

fn files() -> Files {
    vec![
        ("a/b/c".to_owned(), content(1, 5000)),
        ("d".to_owned(), content(2, 3000)),
        // It comes in parts, unlike the others.
        ("parts/large".to_owned(), content(3, 100_000)),
        ("e/empty".to_owned(), Vec::new()),
    ]
}

/// A line that the trace shows, between calls.
fn say(what: &str) {
    let _ = fs::symlink_metadata(format!("/said: {what}"));
}

#[tokio::test]
#[ignore = "is run by another test, in a process of its own"]
async fn child_that_installs() {
    let dir = std::env::var_os(DIR).unwrap();
    let (store, _) = open(&Path::new(&dir).join(STORE)).await;
    say("opened");
    for (id, index) in [("t1", 1), ("t2", 2)] {
        let staging = store.stage(&plan(id, index, &files())).await.unwrap();
        say("staged");
        staging.set_claim(Claim { attempt: 1, session: [1; 16] }).await.unwrap();
        say("claimed");
        fill(&staging, &files()).await;
        say("synced");
        staging.reset_records(Vec::new()).await.unwrap();
        say("reset");
        staging.seal(&totals(&files())).await.unwrap();
        say("sealed");
        staging.place().await.unwrap();
        say("placed");
        staging.activate().await.unwrap();
        say("activated");
        staging.remove().await.unwrap();
        say("removed");
        store.record_finished(b"x").await.unwrap();
        say("recorded");
        store.raise_fence(&shard(), Fence { epoch: 1, term: index }, &source()).await.unwrap();
        say("raised");
    }
}

#[tokio::test]
#[ignore = "is run by another test, in a process of its own"]
async fn child_that_recovers() {
    let dir = std::env::var_os(DIR).unwrap();
    let store = super::FileSnapshotStore::open(Path::new(&dir).join(STORE), options()).unwrap();
    say("opened");
    let recovered = store.recover().await.unwrap();
    store.shard(&shard()).await.unwrap();
    say("recovered");
    drop(recovered);
}

/// Of the syncs of the shard's directory, the second fails.
#[test]
#[ignore = "is run by another test, in a process of its own"]
fn child_whose_sync_fails() {
    use std::os::unix::fs::MetadataExt as _;
    let dir = std::env::var_os(DIR).unwrap();
    let root = Path::new(&dir).join(STORE);
    // They are counted by thread.
    let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
    runtime.block_on(async {
        let (store, _) = open(&root).await;
        let record = || fs::metadata(root.join("shards/shard-1/CURRENT")).unwrap().ino();
        let (old, new) = (Fence { epoch: 1, term: 1 }, Fence { epoch: 1, term: 5 });
        store.raise_fence(&shard(), old, &source()).await.unwrap();
        let before = record();
        store.raise_fence(&shard(), new, &source()).await.unwrap_err();
        let failed = record();
        assert_ne!(failed, before, "it was replaced");
        assert_eq!(store.raise_fence(&shard(), new, &source()).await.unwrap(), new);
        let repeated = record();
        assert_ne!(repeated, failed, "what a failed sync left is not believed");
        assert_eq!(store.raise_fence(&shard(), new, &source()).await.unwrap(), new);
        assert_eq!(record(), repeated, "once it is durable, it is");
    });
}

/// The system tells once that a sync failed; the next one succeeds, whatever is on the disk.
#[test]
fn a_fence_whose_directory_could_not_be_synced_is_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().canonicalize().unwrap().join(STORE).join("shards/shard-1");
    let fail = ["-P", at.to_str().unwrap(), "-e", "inject=fsync:error=EIO:when=2"];
    let Some(lines) = trace_with("child_whose_sync_fails", dir.path(), &fail) else { return };
    assert!(lines.iter().any(|line| line.contains("INJECTED")), "{lines:?}");
}

/// The calls of one of the above, in order; `None` where nothing can be traced.
fn trace(function: &str, dir: &Path) -> Option<Vec<String>> {
    trace_with(function, dir, &[])
}

fn trace_with(function: &str, dir: &Path, options: &[&str]) -> Option<Vec<String>> {
    let out = dir.join("trace");
    let calls =
        "trace=mkdir,mkdirat,rename,renameat,renameat2,openat,fsync,fdatasync,stat,lstat,newfstatat,statx";
    let ran = Command::new("strace")
        .args(["-f", "-y", "-s", "4096", "-e", calls])
        .args(options)
        .arg("-o")
        .arg(&out)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("store::file::tests::syscalls::{function}"), "--ignored"])
        .env(DIR, dir)
        .output();
    match ran {
        Ok(output) if output.status.success() => {}
        other => {
            let can = Command::new("strace").args(["-f", "-o", "/dev/null", "true"]).status();
            assert!(!can.is_ok_and(|status| status.success()), "{function} failed: {other:?}");
            eprintln!("SKIPPED: strace does not work here: what is synced is not tested");
            return None;
        }
    }
    Some(fs::read_to_string(out).unwrap().lines().map(str::to_owned).collect())
}

fn parent(path: &str) -> String {
    Path::new(path).parent().unwrap().to_str().unwrap().to_owned()
}

/// The paths that a line names; those that are relative begin in the directory whose descriptor stands before them.
fn paths(line: &str) -> impl Iterator<Item = String> {
    let quoted = line.split('"').collect::<Vec<_>>();
    let named = quoted.chunks_exact(2).map(|pair| {
        let dir = pair[0].rsplit_once('<').and_then(|(_, rest)| Some(rest.split_once('>')?.0));
        Path::new(dir.unwrap_or("")).join(pair[1]).to_str().unwrap().to_owned()
    });
    named.collect::<Vec<_>>().into_iter()
}

/// The path of the descriptor that is synced.
fn synced(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once("fsync(").or_else(|| line.split_once("fdatasync("))?;
    Some(rest.split_once('<')?.1.split_once('>')?.0)
}

fn said(line: &str) -> Option<&str> {
    Some(line.split_once("\"/said: ")?.1.split_once('"')?.0)
}

#[test]
fn a_directory_is_synced_before_its_new_entries_are_called_durable() {
    let dir = tempfile::tempdir().unwrap();
    let Some(lines) = trace("child_that_installs", dir.path()) else { return };
    let root = dir.path().canonicalize().unwrap().join("above").to_str().unwrap().to_owned();
    let mut dirty: BTreeSet<String> = BTreeSet::new();
    let mut created = HashSet::new();
    let (mut changes, mut marks) = (0, 0);
    for line in &lines {
        if let Some(path) = synced(line) {
            dirty.remove(path);
        } else if let Some(mark) = said(line) {
            marks += 1;
            assert!(dirty.is_empty(), "{mark}, but entries of {dirty:?} are not durable");
        } else if line.contains("mkdir") || line.contains("rename") || line.contains("O_CREAT") {
            let failed = line.contains(" = -1 ");
            for path in paths(line).filter(|path| path.starts_with(&root)) {
                // A file that is opened to be created if need be is there the second time; what is in the trash need not stay.
                let old = line.contains("O_CREAT") && !created.insert(path.clone());
                if !failed && !old && !path.contains("/trash/") {
                    changes += 1;
                    dirty.insert(parent(&path));
                }
            }
        }
    }
    assert!(changes > 40 && marks == 21, "{changes} changes, {marks} marks");
}

/// A killed process may have left what it made in memory only, and the next one believes what it sees.
#[tokio::test]
async fn what_is_recovered_is_synced_before_it_is_believed() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(&dir.path().join(STORE)).await;
    store.raise_fence(&shard(), Fence { epoch: 1, term: 1 }, &source()).await.unwrap();
    let staging = store.stage(&plan("t1", 1, &files())).await.unwrap();
    fill(&staging, &files()).await;
    store.record_finished(b"x").await.unwrap();
    drop((staging, store));
    let Some(lines) = trace("child_that_recovers", dir.path()) else { return };
    let root = dir.path().canonicalize().unwrap().join(STORE);
    let mut lines = lines.iter().skip_while(|line| said(line) != Some("opened"));
    let until = lines.by_ref().take_while(|line| said(line) != Some("recovered"));
    let seen: HashSet<&str> = until.filter_map(|line| synced(line)).collect();
    for path in ["staging", "staging/t1", "staging/t1/records", "shards/shard-1", "history"] {
        assert!(seen.contains(root.join(path).to_str().unwrap()), "{path} is not synced: {seen:?}");
    }
}

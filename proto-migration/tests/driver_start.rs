//! A start whose record is written and not known to be durable. Alone in its process, of which it limits the open files.

#![cfg(all(unix, feature = "client", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use proto_migration::journal::Journal;
use support::pair::{Pair, manual};

#[tokio::test]
async fn a_start_that_failed_is_not_found_by_the_next_process() {
    let mut pair = Pair::start().await;
    pair.fill(10).await;
    // The file can be opened, and replaced; then its directory cannot be opened to be synced.
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let free = File::open("/dev/null").unwrap().as_raw_fd();
    setrlimit(Resource::RLIMIT_NOFILE, u64::try_from(free).unwrap() + 1, hard).unwrap();
    let failed = pair.begin(manual).await;
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    assert_eq!(failed.unwrap_err().reason(), "STORAGE_FAILED");
    assert_eq!(fs::read_dir(pair.dir.path().join("source/active")).unwrap().count(), 0);

    pair.source_down().await;
    let (_, recovered) = Journal::open(pair.dir.path().join("source"), 10).unwrap();
    assert!(recovered.active.is_empty(), "{recovered:?}");
    pair.source_up().await;
    // Nor does anything keep the same migration, or another one of the slots, from beginning.
    pair.begin(|request| request.migration_id = "m2".into()).await.unwrap();
    pair.source_down().await;
}

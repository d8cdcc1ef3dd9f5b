//! What of a staged file is left in the page cache.

use std::fs::File;
use std::io::IoSliceMut;
use std::path::Path;

use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::support::*;
use crate::store::file::FileStoreOptions;
use crate::store::{SnapshotStore as _, Staging as _};

const LEN: usize = 4 << 20;

/// Stages a file in a store with these options; the pages of it that can be read without the disk, in percent.
async fn cached_after_sync(dir: &Path, options: FileStoreOptions) -> Result<usize, Errno> {
    let files = vec![("file".to_owned(), content(1, LEN))];
    let (store, _) = open_with(dir, options).await;
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    let (first, first_record) = chunk(&files, 0, 0, LEN / 2);
    let (second, second_record) = chunk(&files, 0, LEN / 2, LEN / 2);
    staging.write(vec![first]).await.unwrap();
    staging.sync(vec![first_record]).await.unwrap();
    staging.write(vec![second]).await.unwrap();
    staging.sync(vec![second_record]).await.unwrap();
    let file = File::open(dir.join("staging/t1/tree/file")).unwrap();
    let mut cached = 0;
    // From the end: a page that is read brings in those that follow it.
    for page in (0..LEN / 4096).rev() {
        let mut buffer = [0; 1];
        let at = (page * 4096) as u64;
        match preadv2(&file, &mut [IoSliceMut::new(&mut buffer)], at, ReadWriteFlags::NOWAIT) {
            Ok(_) => cached += 1,
            Err(Errno::AGAIN) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(cached * 100 / (LEN / 4096))
}

#[tokio::test]
async fn large_snapshots_leave_the_page_cache_and_others_stay() {
    let dir = tempfile::tempdir().unwrap();
    let limited = |uncached_from_bytes| FileStoreOptions { uncached_from_bytes, ..options() };
    let small = cached_after_sync(&dir.path().join("small"), limited(LEN as u64 + 1)).await;
    let large = cached_after_sync(&dir.path().join("large"), limited(LEN as u64)).await;
    let (Ok(small), Ok(large)) = (small, large) else {
        eprintln!("SKIPPED: the file system does not tell what is cached: {small:?}, {large:?}");
        return;
    };
    assert!(small > 90, "{small} percent of a small snapshot are cached");
    if rustix::fs::statfs(dir.path()).unwrap().f_type == 0x0102_1994 {
        eprintln!("SKIPPED: a memory file system is its own page cache");
        return;
    }
    assert!(large < 10, "{large} percent of a large snapshot are cached");
}

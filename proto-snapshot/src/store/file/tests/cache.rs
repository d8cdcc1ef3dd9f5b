//! What of a staged file is left in the page cache.

use std::fs::File;
use std::io::IoSliceMut;
use std::path::Path;

use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::support::*;
use crate::spec::{Manifest, ManifestFile};
use crate::store::file::FileStoreOptions;
use crate::store::{SnapshotStore as _, Staging as _};

const LEN: usize = 4 << 20;

/// Stages a file in a store with these options; how much of it is [`cached`] then.
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
    cached(&dir.join("staging/t1/tree/file"))
}

/// The pages of a file that can be read without the disk, in percent.
fn cached(path: &Path) -> Result<usize, Errno> {
    let file = File::open(path).unwrap();
    let pages = file.metadata().unwrap().len() as usize / 4096;
    let mut cached = 0;
    // From the end: a page that is read brings in those that follow it.
    for page in (0..pages).rev() {
        let mut buffer = [0; 1];
        let at = (page * 4096) as u64;
        match preadv2(&file, &mut [IoSliceMut::new(&mut buffer)], at, ReadWriteFlags::NOWAIT) {
            Ok(_) => cached += 1,
            Err(Errno::AGAIN) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(cached * 100 / pages)
}

fn in_memory(dir: &Path) -> bool {
    let in_memory = rustix::fs::statfs(dir).unwrap().f_type == 0x0102_1994;
    if in_memory {
        eprintln!("SKIPPED: a memory file system is its own page cache");
    }
    in_memory
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
    if in_memory(dir.path()) {
        return;
    }
    assert!(large < 10, "{large} percent of a large snapshot are cached");
}

/// As streams bring them that write at the same time: chunks of several files, and small files among them.
#[tokio::test]
async fn chunks_of_several_files_in_turn_leave_the_page_cache() {
    const CHUNK: usize = 512 << 10;
    let names = ["one", "two", "small"];
    let lens = [LEN, LEN, 256 << 10];
    let files: Files =
        names.iter().zip(lens).map(|(name, len)| (name.to_string(), content(len as u64, len))).collect();
    for sizes_are_known in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = plan("t1", 1, &files);
        if !sizes_are_known {
            let unsized_files =
                plan.manifest.files().iter().map(|file| ManifestFile { size: None, ..file.clone() });
            plan.manifest = Manifest::new(unsized_files.collect()).unwrap();
        }
        // Of unknown size, it is large from the second sync on.
        let first_half = if sizes_are_known { 2 * LEN } else { LEN } as u64;
        let limited = FileStoreOptions { uncached_from_bytes: first_half + 1, ..options() };
        let (store, _) = open_with(dir.path(), limited).await;
        let staging = store.stage(&plan).await.unwrap();
        for half in [0..LEN / 2, LEN / 2..LEN] {
            let mut records = Vec::new();
            for offset in half.step_by(CHUNK) {
                for file in [0, 1] {
                    let (chunk, record) = chunk(&files, file, offset, CHUNK);
                    staging.write(vec![chunk]).await.unwrap();
                    records.push(record);
                }
            }
            if records[0].extent.offset > 0 {
                let (small, record) = chunk(&files, 2, 0, lens[2]);
                staging.write(vec![small]).await.unwrap();
                records.push(record);
            }
            staging.sync(records).await.unwrap();
        }
        for name in names {
            let left = match cached(&dir.path().join("staging/t1/tree").join(name)) {
                Ok(left) => left,
                Err(error) => {
                    return eprintln!("SKIPPED: the file system does not tell what is cached: {error}");
                }
            };
            if in_memory(dir.path()) {
                return;
            }
            // What was synced before the snapshot was known to be large stays.
            let expected = if sizes_are_known || name == "small" { 0 } else { 50 };
            assert!(left.abs_diff(expected) < 10, "{left} percent of {name} are cached");
        }
    }
}

#[tokio::test]
async fn what_is_read_back_leaves_the_page_cache_again() {
    let dir = tempfile::tempdir().unwrap();
    let files = vec![("file".to_owned(), content(1, LEN))];
    let (store, _) = open_with(dir.path(), FileStoreOptions { uncached_from_bytes: 1, ..options() }).await;
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    let (whole, record) = chunk(&files, 0, 0, LEN);
    staging.write(vec![whole]).await.unwrap();
    staging.sync(vec![record]).await.unwrap();
    let path = dir.path().join("staging/t1/tree/file");
    std::fs::read(&path).unwrap();
    match cached(&path) {
        Err(error) => return eprintln!("SKIPPED: the file system does not tell what is cached: {error}"),
        Ok(before) => assert!(before > 90, "{before} percent of what was read are cached"),
    }
    assert_eq!(staging.checksum(record.extent).await.unwrap(), record.crc);
    if in_memory(dir.path()) {
        return;
    }
    let after = cached(&path).unwrap();
    assert!(after < 10, "{after} percent of what was read back are cached");
}

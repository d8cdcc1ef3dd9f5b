//! A store in a memory file system, which writes on the async threads.

use std::future::Future as _;

use super::support::*;
use crate::store::{SnapshotStore as _, Staging as _};

#[tokio::test]
async fn a_write_keeps_no_task_waiting_for_long_nor_for_whoever_has_the_area_to_himself() {
    const CHUNK: usize = 512 << 10;
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let files: Files = vec![("file".to_owned(), content(1, 16 * CHUNK))];
    let (store, _) = open(dir.path()).await;
    if !store.shared.in_memory {
        return eprintln!("SKIPPED: no memory file system is at /dev/shm");
    }
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    let (mut chunks, records): (Vec<_>, Vec<_>) =
        (0..16).map(|number| chunk(&files, 0, number * CHUNK, CHUNK)).unzip();

    // On the only thread of this runtime: were it to wait for the lock, nobody would let that go.
    let rest = chunks.split_off(1);
    {
        let area = staging.inner().exclusive();
        let mut write = std::pin::pin!(staging.write(chunks.clone()));
        let waker = std::task::Waker::noop();
        let polled = write.as_mut().poll(&mut std::task::Context::from_waker(waker));
        assert!(polled.is_pending(), "it waits");
        drop(area);
    }

    let write = staging.write(chunks.into_iter().chain(rest).collect());
    tokio::pin!(write);
    let mut turns = 0;
    while futures::poll!(&mut write).is_pending() {
        turns += 1;
        tokio::task::yield_now().await;
    }
    assert!(turns >= 7, "others had {turns} turns while 8 MiB were written, 1 MiB at once");
    staging.sync(records).await.unwrap();
    install(&staging, &files).await;
    assert_eq!(current(&store).await.unwrap().1, as_tree(&files));
}

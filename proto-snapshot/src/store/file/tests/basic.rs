//! What a store does when nothing goes wrong.

use proto_common::fence::Fence;

use super::support::*;
use crate::store::{SnapshotStore as _, StagedChunk, Staging as _, StagingState};

fn files() -> Files {
    vec![
        ("a/one".to_owned(), content(1, 300_000)),
        ("a/b/empty".to_owned(), Vec::new()),
        ("two".to_owned(), content(2, 2 << 20)),
        ("a/three".to_owned(), content(3, 1)),
    ]
}

#[tokio::test]
async fn installs_a_snapshot_that_survives_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let (store, recovered) = open(dir.path()).await;
    assert!(recovered.staged.is_empty() && recovered.damage.is_empty());
    assert!(current(&store).await.is_none());
    let staging = store.stage(&plan("t1", 7, &files())).await.unwrap();
    assert_eq!(staging.state(), StagingState::Open);
    fill(&staging, &files()).await;
    install(&staging, &files()).await;
    store.record_finished(b"t1").await.unwrap();
    let (low, high) = (Fence { epoch: 1, term: 1 }, Fence { epoch: 1, term: 2 });
    assert_eq!(store.raise_fence(&shard(), high, &source()).await.unwrap(), high);
    assert_eq!(store.raise_fence(&shard(), low, &source()).await.unwrap(), high);
    drop((staging, store));

    let (store, recovered) = open(dir.path()).await;
    assert_eq!(recovered.damage, Vec::<String>::new());
    assert!(recovered.staged.is_empty());
    assert_eq!(recovered.finished, [b"t1".to_vec()]);
    let (id, found) = current(&store).await.unwrap();
    assert_eq!((id.as_str(), found), ("t1", as_tree(&files())));
    let state = store.shard(&shard()).await.unwrap();
    assert_eq!(state.fence, Fence { epoch: 1, term: 2 });
    assert_eq!(state.high_water, Some(spec("t1", 7).point));
}

/// Whoever raises a fence learns whether somebody else has raised it further.
#[tokio::test]
async fn of_fences_that_are_raised_at_once_only_the_highest_gets_itself_back() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let store = std::sync::Arc::new(open(dir.path()).await.0);
    for round in 1..50 {
        let raise = |term| {
            let (store, fence) = (std::sync::Arc::clone(&store), Fence { epoch: round, term });
            tokio::spawn(async move { store.raise_fence(&shard(), fence, &source()).await.unwrap() })
        };
        let (low, high) = (raise(1), raise(2));
        let (low, high) = (low.await.unwrap(), high.await.unwrap());
        assert_eq!(high, Fence { epoch: round, term: 2 });
        assert!(low.epoch == round && low <= high);
        assert_eq!(
            store.raise_fence(&shard(), Fence { epoch: round, term: 1 }, &source()).await.unwrap(),
            high
        );
    }
}

#[tokio::test]
async fn says_what_is_current() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    assert_eq!(store.current_plan(&shard()).await.unwrap(), None);
    let expected = plan_with_digests("t1", 7, &files());
    let staging = store.stage(&expected).await.unwrap();
    fill(&staging, &files()).await;
    install(&staging, &files()).await;
    drop((staging, store));
    let (store, _) = open(dir.path()).await;
    let found = store.current_plan(&shard()).await.unwrap().unwrap();
    assert_eq!(found, expected);
    assert_eq!(found.spec.content_version, "v1");
    // Without the manifest, only the ID is known.
    let manifest = dir.path().join("shards/shard-1/t1.manifest");
    let mut content = std::fs::read(&manifest).unwrap();
    *content.last_mut().unwrap() ^= 1;
    std::fs::write(&manifest, content).unwrap();
    assert_eq!(store.current_plan(&shard()).await.unwrap(), None);
    std::fs::remove_file(&manifest).unwrap();
    assert_eq!(store.current_plan(&shard()).await.unwrap(), None);
    assert_eq!(store.shard(&shard()).await.unwrap().current, Some(expected.spec.transfer_id));
}

#[tokio::test]
async fn small_files_that_come_whole_are_made_once_and_written_over_if_they_are_there() {
    let dir = tempfile::tempdir().unwrap();
    let names =
        (0..300).map(|number| (format!("{}/{number}", number % 3), content(number, 10 + number as usize)));
    let files: Files = names.collect();
    let (store, _) = open(dir.path()).await;
    let staging = store.stage(&plan("t1", 7, &files)).await.unwrap();
    let whole = |number: u32| chunk(&files, number, 0, files[number as usize].1.len());
    let promised = staging.inner().reservation.outstanding();
    assert_eq!((promised.bytes, promised.files), (303 * 4096, 303));
    // One that is there in part, from another writer; its record never came.
    let (part, _) = chunk(&files, 7, 2, 3);
    staging.write(vec![part]).await.unwrap();
    let (chunks, records): (Vec<_>, Vec<_>) = (0..300).map(whole).unzip();
    staging.write(chunks[..200].to_vec()).await.unwrap();
    // What precedes a chunk that is refused is written, and counts as written.
    let mut beyond = chunks[200..210].to_vec();
    beyond.push(StagedChunk { offset: 1, ..chunks[210].clone() });
    staging.write(beyond).await.unwrap_err();
    // So do the three directories.
    let left = staging.inner().reservation.outstanding();
    assert_eq!((left.bytes, left.files), (90 * 4096, 90));
    staging.sync(records[..210].to_vec()).await.unwrap();
    staging.write(chunks[210..].to_vec()).await.unwrap();
    staging.sync(records[210..].to_vec()).await.unwrap();
    install(&staging, &files).await;
    assert_eq!(current(&store).await.unwrap().1, as_tree(&files));
}

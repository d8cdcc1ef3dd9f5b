//! What a store does when nothing goes wrong.

use proto_common::fence::Fence;

use super::support::*;
use crate::store::{SnapshotStore as _, Staging as _, StagingState};

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
    store.raise_fence(&shard(), Fence { epoch: 1, term: 2 }).await.unwrap();
    store.raise_fence(&shard(), Fence { epoch: 1, term: 1 }).await.unwrap();
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

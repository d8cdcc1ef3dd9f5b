//! Seal, place, activate, remove: in order, repeated, interrupted, too late, and several at once.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use super::support::*;
use crate::spec::SnapshotPoint;
use crate::store::file::{FileSnapshotStore, FileStaging, FileStoreOptions};
use crate::store::{Claim, SnapshotStore as _, Staging, StagingState, StoreError};

fn files(seed: u64) -> Files {
    vec![
        ("a/b".to_owned(), content(seed, 50_000)),
        ("c".to_owned(), content(seed + 1, 10)),
        ("e/f/empty".to_owned(), Vec::new()),
    ]
}

async fn filled(store: &FileSnapshotStore, id: &str, index: u64) -> Arc<FileStaging> {
    let staging = store.stage(&plan(id, index, &files(index))).await.unwrap();
    fill(&staging, &files(index)).await;
    staging
}

async fn installed(store: &FileSnapshotStore, id: &str, index: u64) {
    install(&*filled(store, id, index).await, &files(index)).await;
}

async fn step(staging: &FileStaging, step: usize, index: u64) {
    match step {
        0 => staging.seal(&totals(&files(index))).await.unwrap(),
        1 => drop(staging.place().await.unwrap()),
        2 => staging.activate().await.unwrap(),
        _ => staging.remove().await.unwrap(),
    }
}

/// Waits until the background has deleted what it has to.
async fn until_gone(path: &std::path::Path) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while path.exists() {
        assert!(tokio::time::Instant::now() < deadline, "{} is still there", path.display());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_crash_between_any_two_steps_is_repaired_by_repeating_all() {
    for steps in 0..=4 {
        for repeat_before in [false, true] {
            let dir = tempfile::tempdir_in(fast_dir()).unwrap();
            let (store, _) = open(dir.path()).await;
            installed(&store, "old", 1).await;
            let staging = filled(&store, "new", 2).await;
            for at in 0..steps {
                step(&staging, at, 2).await;
                if repeat_before {
                    step(&staging, at, 2).await;
                }
            }
            drop((staging, store));
            let (store, mut recovered) = open(dir.path()).await;
            assert_eq!(recovered.damage, Vec::<String>::new(), "after {steps} steps");
            let (id, found) = current(&store).await.unwrap();
            let expected = if steps < 3 { ("old", 1) } else { ("new", 2) };
            assert_eq!(
                (id.as_str(), found),
                (expected.0, as_tree(&files(expected.1))),
                "after {steps} steps"
            );
            assert_eq!(recovered.staged.len(), usize::from(steps < 4));
            if let Some(staging) = recovered.staged.pop() {
                let sealed = if steps > 0 { StagingState::Sealed } else { StagingState::Open };
                assert_eq!(staging.state(), sealed);
                for at in 0..4 {
                    step(&staging, at, 2).await;
                }
            }
            let (id, found) = current(&store).await.unwrap();
            assert_eq!((id.as_str(), found), ("new", as_tree(&files(2))));
            until_gone(&dir.path().join("installed/shard-1/old")).await;
            assert_eq!(fs::read_dir(dir.path().join("staging")).unwrap().count(), 0);
            drop(store);
            let (_store, recovered) = open(dir.path()).await;
            assert!(recovered.staged.is_empty() && recovered.damage.is_empty(), "{recovered:?}");
        }
    }
}

/// The states inside of a step that a crash can leave, made by hand.
#[tokio::test]
async fn a_crash_within_a_step_is_repaired_too() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let at = |path: &str| dir.path().join(path);
    let (store, _) = open(dir.path()).await;
    let staging = filled(&store, "t1", 1).await;
    staging.seal(&totals(&files(1))).await.unwrap();
    drop((staging, store));
    // Placing: the directory of the shard was made, and a record half written.
    fs::create_dir_all(at("installed/shard-1")).unwrap();
    fs::create_dir_all(at("shards/shard-1")).unwrap();
    fs::write(at("shards/shard-1/t1.manifest.tmp"), "half").unwrap();
    let (store, recovered) = open(dir.path()).await;
    drop((store, recovered));
    // Placed, and the record of the shard half written.
    fs::rename(at("staging/t1/tree"), at("installed/shard-1/t1")).unwrap();
    fs::write(at("shards/shard-1/CURRENT.tmp"), "half").unwrap();
    // A new one half made, and an old one half removed.
    fs::create_dir_all(at("staging/.new.t9/tree")).unwrap();
    fs::create_dir_all(at("staging/.gone.t8/tree")).unwrap();
    let (store, mut recovered) = open(dir.path()).await;
    assert_eq!(recovered.damage, Vec::<String>::new());
    assert_eq!(recovered.staged.len(), 1);
    install(&recovered.staged.remove(0), &files(1)).await;
    assert_eq!(current(&store).await.unwrap().1, as_tree(&files(1)));
    assert_eq!(fs::read_dir(at("staging")).unwrap().count(), 0);
}

#[tokio::test]
async fn an_older_snapshot_never_replaces_a_newer_one() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let old = filled(&store, "old", 5).await;
    let older = filled(&store, "older", 4).await;
    old.seal(&totals(&files(5))).await.unwrap();
    old.place().await.unwrap();
    installed(&store, "new", 6).await;
    // Both were there before the new one: one was placed already, one was not.
    let installed = SnapshotPoint { term: 3, index: 6 };
    let stale =
        |error: StoreError| matches!(error, StoreError::Stale { installed: found } if found == installed);
    assert!(stale(old.activate().await.unwrap_err()));
    older.seal(&totals(&files(4))).await.unwrap();
    assert!(stale(older.place().await.unwrap_err()));
    for staging in [old, older] {
        staging.remove().await.unwrap();
    }
    assert_eq!(current(&store).await.unwrap().0.as_str(), "new");
    assert_eq!(fs::read_dir(dir.path().join("installed/shard-1")).unwrap().count(), 1);
    // Of the same point, the last one counts; a higher term wins over a higher index.
    self::installed(&store, "same", 6).await;
    assert_eq!(current(&store).await.unwrap().0.as_str(), "same");
    let mut higher = plan("higher", 1, &files(1));
    higher.spec.point.term = 4;
    let staging = store.stage(&higher).await.unwrap();
    fill(&staging, &files(1)).await;
    install(&staging, &files(1)).await;
    assert_eq!(current(&store).await.unwrap().0.as_str(), "higher");
}

#[tokio::test]
async fn a_placed_snapshot_stays_while_others_come_and_go() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let slow = filled(&store, "slow", 9).await;
    slow.seal(&totals(&files(9))).await.unwrap();
    let placed = slow.place().await.unwrap().path.unwrap();
    // A hook reads `placed` while these are installed for the same shard.
    installed(&store, "quick-1", 7).await;
    installed(&store, "quick-2", 8).await;
    until_gone(&dir.path().join("installed/shard-1/quick-1")).await;
    assert_eq!(tree(&placed), as_tree(&files(9)));
    // Also over a restart.
    drop((slow, store));
    let (store, mut recovered) = open(dir.path()).await;
    assert_eq!(tree(&placed), as_tree(&files(9)));
    install(&recovered.staged.remove(0), &files(9)).await;
    assert_eq!(current(&store).await.unwrap().1, as_tree(&files(9)));
}

#[tokio::test]
async fn keeps_as_many_previous_snapshots_as_asked_for() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open_with(dir.path(), FileStoreOptions { keep_previous: 2, ..options() }).await;
    for index in 1..=5 {
        installed(&store, &format!("t{index}"), index).await;
    }
    for index in [1, 2] {
        until_gone(&dir.path().join(format!("installed/shard-1/t{index}"))).await;
    }
    for index in [3, 4, 5] {
        assert_eq!(tree(&dir.path().join(format!("installed/shard-1/t{index}"))), as_tree(&files(index)));
    }
    drop(store);
    // The next start keeps them, too; fewer go with the next install.
    let (store, _) = open(dir.path()).await;
    assert!(dir.path().join("installed/shard-1/t3").exists());
    installed(&store, "t6", 6).await;
    for index in 3..=5 {
        until_gone(&dir.path().join(format!("installed/shard-1/t{index}"))).await;
    }
    assert_eq!(fs::read_dir(dir.path().join("shards/shard-1")).unwrap().count(), 2);
}

#[tokio::test]
async fn a_removed_transfer_leaves_nothing() {
    for steps in 0..=2 {
        let dir = tempfile::tempdir_in(fast_dir()).unwrap();
        let (store, _) = open(dir.path()).await;
        let staging = filled(&store, "t1", 1).await;
        staging.set_claim(Claim { attempt: 1, session: [1; 16] }).await.unwrap();
        for at in 0..steps {
            step(&staging, at, 1).await;
        }
        staging.remove().await.unwrap();
        staging.remove().await.unwrap();
        until_gone(&dir.path().join("installed/shard-1/t1")).await;
        assert_eq!(fs::read_dir(dir.path().join("staging")).unwrap().count(), 0);
        assert!(!dir.path().join("shards/shard-1/t1.manifest").exists());
        assert!(staging.set_claim(Claim { attempt: 2, session: [1; 16] }).await.is_err());
        assert!(staging.write(vec![chunk(&files(1), 1, 0, 10).0]).await.is_err());
        // The ID is free again.
        installed(&store, "t1", 1).await;
        assert_eq!(current(&store).await.unwrap().1, as_tree(&files(1)));
    }
}

#[tokio::test]
async fn an_id_is_staged_once() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let plan = plan("t1", 1, &files(1));
    let (a, b) = tokio::join!(store.stage(&plan), store.stage(&plan));
    assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
    let first = a.or(b).unwrap();
    fill(&first, &files(1)).await;
    let error = store.stage(&plan).await.unwrap_err();
    assert!(!error.is_retryable(), "{error:?}");
    install(&first, &files(1)).await;
    assert!(store.stage(&plan).await.is_err(), "it is current");
    assert_eq!(current(&store).await.unwrap().1, as_tree(&files(1)));
}

#[tokio::test]
async fn what_was_not_recovered_is_never_overwritten() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    drop(filled(&store, "t1", 1).await);
    drop(store);
    let store = FileSnapshotStore::open(dir.path(), options()).unwrap();
    assert!(store.stage(&plan("t1", 1, &files(1))).await.is_err());
    assert_eq!(store.recover().await.unwrap().staged[0].records().len(), 2);
}

#[tokio::test]
async fn a_leftover_of_a_forgotten_transfer_is_replaced() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    installed(&store, "base", 1).await;
    let leftover = dir.path().join("installed/shard-1/t1");
    fs::create_dir_all(&leftover).unwrap();
    fs::write(leftover.join("foreign"), "x").unwrap();
    installed(&store, "t1", 2).await;
    assert_eq!(current(&store).await.unwrap().1, as_tree(&files(2)));
}

#[tokio::test]
async fn after_sealing_nothing_is_written() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let staging = filled(&store, "t1", 1).await;
    assert!(staging.place().await.is_err(), "it is not sealed");
    assert!(staging.activate().await.is_err(), "it is not sealed");
    staging.seal(&totals(&files(1))).await.unwrap();
    let (chunk, record) = chunk(&files(2), 0, 0, 100);
    assert!(!staging.write(vec![chunk]).await.unwrap_err().is_retryable());
    assert!(staging.sync(vec![record]).await.is_err());
    assert!(staging.reset_records(Vec::new()).await.is_err());
    install(&staging, &files(1)).await;
    assert_eq!(current(&store).await.unwrap().1, as_tree(&files(1)));
}

#[tokio::test]
async fn a_snapshot_with_bytes_missing_is_not_sealed() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let staging = store.stage(&plan("t1", 1, &files(1))).await.unwrap();
    let (chunk, record) = chunk(&files(1), 0, 0, 49_999);
    staging.write(vec![chunk]).await.unwrap();
    staging.sync(vec![record]).await.unwrap();
    let error = staging.seal(&totals(&files(1))).await.unwrap_err();
    assert!(matches!(&error, StoreError::Damaged { file, .. } if file == "staging/t1/tree/a/b"), "{error:?}");
    fill(&staging, &vec![("a/b".to_owned(), Vec::new()), files(1)[1].clone()]).await;
    let error = staging.seal(&totals(&files(1))).await.unwrap_err();
    assert!(matches!(&error, StoreError::Damaged { .. }), "{error:?}");
}

/// A handler that was dropped may have left a write behind; it must not reach a tree that was given up or finished.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_whose_future_was_dropped_never_lands_after_removal() {
    // Not in memory, where writes have no thread of their own.
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    let big: Files = vec![("big".to_owned(), content(1, 4 << 20))];
    for round in 0..20 {
        let staging = store.stage(&plan("t1", 1, &big)).await.unwrap();
        let chunks = (0..4).map(|n| chunk(&big, 0, n << 20, 1 << 20).0).collect();
        {
            let write = staging.write(chunks);
            tokio::pin!(write);
            // Begins the write on its thread, and is dropped.
            let _ = futures::poll!(&mut write);
        }
        staging.remove().await.unwrap();
        assert_eq!(fs::read_dir(dir.path().join("staging")).unwrap().count(), 0, "round {round}");
    }
}

#[tokio::test]
async fn a_second_store_on_the_directory_is_refused() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let error = FileSnapshotStore::open(dir.path(), options()).unwrap_err();
    assert!(
        matches!(&error, StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::WouldBlock),
        "{error:?}"
    );
    drop(store);
    FileSnapshotStore::open(dir.path(), options()).unwrap();
}

/// The record of what was current goes by IDs, and one of another shard may have the same.
#[tokio::test]
async fn what_is_staged_anew_under_an_id_that_was_current_is_installed() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    installed(&store, "older", 1).await;
    let mut elsewhere = plan("older", 1, &files(1));
    elsewhere.spec.target_shard = proto_common::ids::ShardId::new("shard-2").unwrap();
    let elsewhere = store.stage(&elsewhere).await.unwrap();
    installed(&store, "newer", 2).await;
    assert_eq!(store.shard(&shard()).await.unwrap().superseded.len(), 1, "it may still ask");
    elsewhere.remove().await.unwrap();
    let again = filled(&store, "older", 3).await;
    assert_eq!(store.shard(&shard()).await.unwrap().superseded, []);
    for at in 0..4 {
        step(&again, at, 3).await;
    }
    let (id, files_now) = current(&store).await.unwrap();
    assert_eq!((id.as_str(), files_now), ("older", as_tree(&files(3))));
}

/// A crash before the removal, and somebody else is quicker after the restart.
#[tokio::test]
async fn what_was_current_is_not_stale_when_it_asks_again() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let older = filled(&store, "older", 1).await;
    for at in 0..3 {
        step(&older, at, 1).await;
    }
    drop((older, store));
    let (store, mut recovered) = open(dir.path()).await;
    installed(&store, "newer", 2).await;
    assert_eq!(store.shard(&shard()).await.unwrap().superseded.len(), 1);
    for at in 0..3 {
        step(&recovered.staged[0], at, 1).await;
    }
    // And once more.
    drop((recovered.staged.pop(), store));
    let (store, mut recovered) = open(dir.path()).await;
    assert_eq!(recovered.damage, Vec::<String>::new());
    let superseded = store.shard(&shard()).await.unwrap().superseded;
    assert_eq!(superseded, [recovered.staged[0].plan().spec.transfer_id.clone()]);
    for at in 0..4 {
        step(&recovered.staged[0], at, 1).await;
    }
    let state = store.shard(&shard()).await.unwrap();
    assert_eq!((state.superseded, state.high_water), (Vec::new(), Some(spec("newer", 2).point)));
    assert_eq!(current(&store).await.unwrap().1, as_tree(&files(2)));
    until_gone(&dir.path().join("installed/shard-1/older")).await;
    // The ID is free, and one that was never current is stale.
    let again = filled(&store, "older", 1).await;
    again.seal(&totals(&files(1))).await.unwrap();
    assert!(matches!(again.place().await.unwrap_err(), StoreError::Stale { .. }));
    again.remove().await.unwrap();
    drop((again, recovered.staged.pop(), store));
    let (_store, recovered) = open(dir.path()).await;
    assert!(recovered.staged.is_empty() && recovered.damage.is_empty(), "{recovered:?}");
}

/// The owner refused a snapshot that was in place; every state in which its removal can be interrupted, made by hand.
#[tokio::test]
async fn an_interrupted_removal_is_finished_without_a_word() {
    for first in [false, true] {
        for state in 0..4 {
            let dir = tempfile::tempdir_in(fast_dir()).unwrap();
            let at = |path: &str| dir.path().join(path);
            let (store, _) = open(dir.path()).await;
            if !first {
                installed(&store, "old", 1).await;
            }
            let refused = filled(&store, "refused", 2).await;
            refused.seal(&totals(&files(2))).await.unwrap();
            refused.place().await.unwrap();
            // Another is in place and waits for its owner.
            let waiting = filled(&store, "waiting", 3).await;
            waiting.seal(&totals(&files(3))).await.unwrap();
            waiting.place().await.unwrap();
            drop((refused, waiting, store));
            fs::rename(at("staging/refused"), at("staging/.gone.refused")).unwrap();
            if state > 0 {
                fs::rename(at("installed/shard-1/refused"), at("trash/1")).unwrap();
            }
            if state > 1 {
                fs::remove_file(at("shards/shard-1/refused.manifest")).unwrap();
            }
            if state > 2 {
                fs::remove_file(at("staging/.gone.refused/meta")).unwrap();
            }
            let (store, mut recovered) = open(dir.path()).await;
            assert_eq!(recovered.damage, Vec::<String>::new(), "{first} {state}");
            assert_eq!(recovered.staged.len(), 1);
            for gone in
                ["staging/.gone.refused", "installed/shard-1/refused", "shards/shard-1/refused.manifest"]
            {
                assert!(!at(gone).exists(), "{first} {state}: {gone}");
            }
            install(&recovered.staged.remove(0), &files(3)).await;
            assert_eq!(current(&store).await.unwrap().1, as_tree(&files(3)));
        }
    }
}

#[tokio::test]
async fn discarded_files_free_their_space_and_stay_installed() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let bytes: usize = files(1).iter().map(|(_, content)| content.len()).sum();
    // Room for one of them, and for a half of the next.
    let narrow = || FileStoreOptions { capacity_bytes: Some(bytes as u64 * 3 / 2), ..options() };
    let (store, _) = open_with(dir.path(), narrow()).await;
    let staging = filled(&store, "one", 1).await;
    staging.seal(&totals(&files(1))).await.unwrap();
    staging.place().await.unwrap();
    staging.discard().await.unwrap();
    assert_eq!(tree(&dir.path().join("installed/shard-1/one")), as_tree(&files(1)), "it is not current yet");
    staging.activate().await.unwrap();
    let full = store.stage(&plan("two", 2, &files(2))).await.unwrap_err();
    assert!(matches!(full, StoreError::NoSpace { .. }), "{full:?}");
    staging.discard().await.unwrap();

    // A crash before the removal: everything is done once more.
    drop((staging, store));
    let (store, mut recovered) = open_with(dir.path(), narrow()).await;
    assert_eq!(recovered.damage, Vec::<String>::new());
    let staging = recovered.staged.pop().unwrap();
    assert_eq!(staging.state(), StagingState::Sealed);
    for at in 0..3 {
        step(&staging, at, 1).await;
    }
    staging.discard().await.unwrap();
    staging.remove().await.unwrap();
    let is_empty = async |store: &FileSnapshotStore| {
        let (id, found) = current(store).await.unwrap();
        assert_eq!(id.as_str(), "one");
        assert!(store.current_plan(&shard()).await.unwrap().is_some());
        found.is_empty()
    };
    assert!(is_empty(&store).await);

    drop((staging, store));
    let (store, recovered) = open_with(dir.path(), narrow()).await;
    assert!(recovered.staged.is_empty());
    assert_eq!(recovered.damage, Vec::<String>::new());
    assert!(is_empty(&store).await);
    installed(&store, "two", 2).await;
    let (id, found) = current(&store).await.unwrap();
    assert_eq!((id.as_str(), found), ("two", as_tree(&files(2))));
    until_gone(&dir.path().join("installed/shard-1/one")).await;
}

//! Any order, any restart, any names: the tree is the same.

use std::collections::HashSet;
use std::sync::Arc;

use proptest::prelude::*;
use proto_common::ids::ShardId;

use super::support::*;
use crate::extent::{Extent, ExtentRecord};
use crate::store::file::FileStoreOptions;
use crate::store::{SnapshotStore as _, Staging as _, StoreError};

#[derive(Debug, Clone)]
struct Case {
    sizes: Vec<usize>,
    /// Cut into chunks of this length, in this order.
    chunk: usize,
    order: u64,
    /// After so many chunks each: sync, or restart (which loses what was not synced).
    sync_every: usize,
    restart_every: usize,
    open_files: usize,
}

fn cases() -> impl Strategy<Value = Case> {
    (
        prop::collection::vec(0..30_000_usize, 1..8),
        500..9000_usize,
        any::<u64>(),
        1..6_usize,
        3..20_usize,
        1..5_usize,
    )
        .prop_map(|(sizes, chunk, order, sync_every, restart_every, open_files)| Case {
            sizes,
            chunk,
            order,
            sync_every,
            restart_every,
            open_files,
        })
}

fn shuffle<T>(items: &mut [T], seed: u64) {
    use rand::{SeedableRng as _, seq::SliceRandom as _};
    items.shuffle(&mut rand::rngs::StdRng::seed_from_u64(seed));
}

async fn transfer(case: Case) {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let options = FileStoreOptions { max_open_files: case.open_files, ..options() };
    let files: Files = case
        .sizes
        .iter()
        .enumerate()
        .map(|(n, &len)| (format!("d{}/f{n}", n % 3), content(n as u64, len)))
        .collect();
    let (mut store, _) = open_with(dir.path(), options.clone()).await;
    let mut staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    let mut steps = 0;
    loop {
        let mut there = vec![crate::extent::FileExtents::default(); files.len()];
        for record in staging.records() {
            let Extent { file, offset, len } = record.extent;
            there[file as usize].insert(offset, len, record.crc).unwrap();
        }
        let mut todo = Vec::new();
        for (number, (_, content)) in (0_u32..).zip(&files) {
            for (offset, len) in there[number as usize].gaps(content.len() as u64) {
                for at in (offset..offset + len).step_by(case.chunk) {
                    todo.push((number, at as usize, (case.chunk as u64).min(offset + len - at) as usize));
                }
            }
        }
        if todo.is_empty() {
            break;
        }
        shuffle(&mut todo, case.order);
        let mut pending = Vec::new();
        let mut restarted = false;
        for (file, at, len) in todo {
            let (chunk, record) = chunk(&files, file, at, len);
            staging.write(vec![chunk]).await.unwrap();
            pending.push(record);
            steps += 1;
            if pending.len() >= case.sync_every {
                staging.sync(std::mem::take(&mut pending)).await.unwrap();
            }
            if steps % case.restart_every == 0 {
                restarted = true;
                break;
            }
        }
        if !restarted {
            staging.sync(pending).await.unwrap();
        }
        drop((staging, store));
        let (opened, mut recovered) = open_with(dir.path(), options.clone()).await;
        assert_eq!(recovered.damage, Vec::<String>::new());
        (store, staging) = (opened, recovered.staged.remove(0));
        // If a round is shorter than a sync, it would never get on.
        if case.restart_every < case.sync_every {
            let (file, at, len) = {
                let have: HashSet<u32> = staging.records().iter().map(|record| record.extent.file).collect();
                let Some(file) =
                    (0..files.len() as u32).find(|f| !have.contains(f) && !files[*f as usize].1.is_empty())
                else {
                    continue;
                };
                (file, 0, files[file as usize].1.len())
            };
            let (chunk, record) = chunk(&files, file, at, len);
            staging.write(vec![chunk]).await.unwrap();
            staging.sync(vec![record]).await.unwrap();
        }
        if steps > 5000 {
            panic!("does not get on");
        }
    }
    install(&staging, &files).await;
    assert_eq!(current(&store).await.unwrap().1, as_tree(&files));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn any_order_and_any_restarts_give_the_same_tree(case in cases()) {
        // Every restart comes after a sync at least now and then.
        let case = Case { restart_every: case.restart_every.max(case.sync_every), ..case };
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap().block_on(transfer(case));
    }
}

#[tokio::test]
async fn odd_names_are_kept_byte_by_byte() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    let names = [
        "meta",
        "records",
        "tree/tree/tree",
        "CURRENT",
        ".hidden/.new.t1",
        "...",
        "a b/\u{a0}\u{2003}x",
        "caf\u{e9}",
        "cafe\u{301}",
        "\u{1f980}/\u{202e}rtl",
        "C:/x:y|z?*\"<>",
        "-rf",
        "~",
        "$HOME/`x`;'",
        "\u{fffd}\u{10ffff}",
    ];
    let mut files: Files =
        names.iter().zip(0..).map(|(name, n)| (name.to_string(), content(n, 10))).collect();
    files.push((
        ["x".repeat(255), "y".repeat(255), "\u{20ac}".repeat(85), "z".repeat(254)].join("/"),
        content(50, 10),
    ));
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    fill(&staging, &files).await;
    drop((staging, store));
    let (store, mut recovered) = open(dir.path()).await;
    install(&recovered.staged.remove(0), &files).await;
    assert_eq!(current(&store).await.unwrap().1, as_tree(&files));
}

#[tokio::test]
async fn ids_that_look_like_our_own_files_do_no_harm() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let long = "z".repeat(128);
    let ids = ["t", "t.tmp", "t.manifest", "t.manifest.tmp", "CURRENT", "CURRENT.tmp", "meta", "tree", &long];
    for (n, shard_id) in (0..).zip(ids) {
        for (m, id) in (0..).zip(ids) {
            let files: Files = vec![("f".to_owned(), content(n * 100 + m, 100))];
            let mut plan = plan(id, m + 1, &files);
            plan.spec.target_shard = ShardId::new(shard_id).unwrap();
            let staging = store.stage(&plan).await.unwrap();
            fill(&staging, &files).await;
            install(&staging, &files).await;
        }
    }
    drop(store);
    let (store, recovered) = open(dir.path()).await;
    assert_eq!(recovered.damage, Vec::<String>::new());
    for (n, shard_id) in (0..).zip(ids) {
        let current = store.current(&ShardId::new(shard_id).unwrap()).await.unwrap().unwrap();
        assert_eq!(current.plan.spec.transfer_id.as_str(), *ids.last().unwrap());
        let expected = content(n * 100 + ids.len() as u64 - 1, 100);
        assert_eq!(tree(&current.path.unwrap())["f"], expected);
    }
}

#[tokio::test]
async fn ten_thousand_small_files() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open_with(dir.path(), FileStoreOptions { max_open_files: 64, ..options() }).await;
    let files: Files = (0..10_000)
        .map(|n| (format!("{}/{}/{n}", n % 10, n % 97), content(n, 1 + n as usize % 300)))
        .collect();
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    let shared = Arc::new(files.clone());
    for worker in 0..4 {
        let (staging, files) = (Arc::clone(&staging), Arc::clone(&shared));
        tasks.spawn(async move {
            let numbers: Vec<u32> = (0..10_000).filter(|n| n % 4 == worker).collect();
            for batch in numbers.chunks(500) {
                let (chunks, records) = batch
                    .iter()
                    .map(|&n| chunk(&files, n, 0, files[n as usize].1.len()))
                    .unzip::<_, _, Vec<_>, Vec<ExtentRecord>>();
                staging.write(chunks).await.unwrap();
                staging.sync(records).await.unwrap();
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert!(staging.inner().shared.handles.len() <= 64);
    drop((staging, store));
    let (store, mut recovered) = open(dir.path()).await;
    let staging = recovered.staged.remove(0);
    assert_eq!(staging.records().len(), 10_000);
    install(&staging, &files).await;
    assert_eq!(current(&store).await.unwrap().1, as_tree(&files));
}

#[tokio::test]
async fn an_extent_is_recorded_once_and_within_its_file() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let files: Files = vec![("f".to_owned(), content(1, 1000))];
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    let (all, record) = chunk(&files, 0, 0, 1000);
    staging.write(vec![all.clone()]).await.unwrap();
    staging.sync(vec![record]).await.unwrap();
    let invalid = |error: StoreError| assert!(!error.is_retryable(), "{error:?}");
    invalid(staging.sync(vec![record]).await.unwrap_err());
    let beyond = |offset, len| ExtentRecord { extent: Extent { file: 0, offset, len }, crc: 0 };
    invalid(staging.sync(vec![beyond(999, 2)]).await.unwrap_err());
    invalid(staging.sync(vec![beyond(u64::MAX, 2)]).await.unwrap_err());
    invalid(
        staging
            .sync(vec![ExtentRecord { extent: Extent { file: 1, offset: 0, len: 1 }, crc: 0 }])
            .await
            .unwrap_err(),
    );
    let mut beyond = all;
    beyond.offset = 1;
    invalid(staging.write(vec![beyond.clone()]).await.unwrap_err());
    beyond.offset = u64::MAX;
    invalid(staging.write(vec![beyond]).await.unwrap_err());
    // After a reset the same extent may come again.
    staging.reset_records(Vec::new()).await.unwrap();
    staging.sync(vec![record]).await.unwrap();
    drop((staging, store));
    let (_store, mut recovered) = open(dir.path()).await;
    assert_eq!(recovered.staged.remove(0).records(), [record]);
}

/// The kernel forgets pages that it could not write: what a failed sync covered has to be written again before it counts.
#[tokio::test]
async fn what_a_failed_sync_may_have_lost_is_not_recorded() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let files: Files = vec![("f".to_owned(), content(1, 1000)), ("g".to_owned(), content(2, 1000))];
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    let (f, f_record) = chunk(&files, 0, 0, 1000);
    let (g, g_record) = chunk(&files, 1, 0, 1000);
    staging.write(vec![f, g]).await.unwrap();
    // A file that is gone is one that cannot be synced.
    staging.inner().shared.handles.forget_area(staging.inner().serial);
    std::fs::rename(dir.path().join("staging/t1/tree/f"), dir.path().join("away")).unwrap();
    assert!(staging.sync(vec![f_record]).await.is_err());
    std::fs::rename(dir.path().join("away"), dir.path().join("staging/t1/tree/f")).unwrap();
    // This would succeed, were it only asked again.
    assert!(staging.sync(vec![f_record]).await.is_err());
    assert!(staging.sync(vec![g_record]).await.is_err(), "the same sync failed for it");
    assert!(staging.seal(&totals(&files)).await.is_err());
    let (part, part_record) = chunk(&files, 0, 0, 400);
    staging.write(vec![part]).await.unwrap();
    staging.sync(vec![part_record]).await.unwrap();
    let (rest, rest_record) = chunk(&files, 0, 400, 600);
    assert!(staging.sync(vec![rest_record]).await.is_err());
    let (g, _) = chunk(&files, 1, 0, 1000);
    staging.write(vec![rest, g]).await.unwrap();
    staging.sync(vec![rest_record, g_record]).await.unwrap();
    install(&staging, &files).await;
    assert_eq!(current(&store).await.unwrap().1, as_tree(&files));
}

/// A file without bytes has none to be written again: the next sync of the area makes it durable, or nobody would.
#[tokio::test]
async fn a_failed_sync_forgets_no_file_without_bytes() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let files: Files = vec![("f".to_owned(), content(1, 1000)), ("empty".to_owned(), Vec::new())];
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    staging.write(vec![chunk(&files, 0, 0, 1000).0, chunk(&files, 1, 0, 0).0]).await.unwrap();
    let [f, away] = ["staging/t1/tree/f", "away"].map(|name| dir.path().join(name));
    staging.inner().shared.handles.forget_area(staging.inner().serial);
    std::fs::rename(&f, &away).unwrap();
    staging.sync(Vec::new()).await.unwrap_err();
    std::fs::rename(&away, &f).unwrap();
    assert_eq!(staging.inner().lock_state().dirty.files(), [1], "the other one is to be written again");
    staging.sync(Vec::new()).await.unwrap();
    assert!(staging.inner().lock_state().dirty.files().is_empty());
}

#[tokio::test]
async fn the_history_keeps_the_last_ones() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let options = FileStoreOptions { history_limit: 10, ..options() };
    let (store, _) = open_with(dir.path(), options.clone()).await;
    for n in 0..95_u32 {
        store.record_finished(&n.to_le_bytes()).await.unwrap();
    }
    drop(store);
    let (store, recovered) = open_with(dir.path(), options.clone()).await;
    let expected: Vec<Vec<u8>> = (85..95_u32).map(|n| n.to_le_bytes().to_vec()).collect();
    assert_eq!(recovered.finished, expected);
    assert!(std::fs::metadata(dir.path().join("history")).unwrap().len() <= 20 * 16);
    store.record_finished(b"last").await.unwrap();
    drop(store);
    let (_store, recovered) = open_with(dir.path(), options).await;
    assert_eq!(recovered.finished[9], b"last");
}

/// A large file that arrives in small chunks leaves a small log.
#[tokio::test]
async fn the_log_of_extents_is_compacted() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let files: Files = vec![("f".to_owned(), content(1, 400_000))];
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    staging.write(vec![chunk(&files, 0, 0, 400_000).0]).await.unwrap();
    let mut largest = 0;
    for batch in (0..40_000).collect::<Vec<_>>().chunks(100) {
        staging.sync(batch.iter().map(|n| chunk(&files, 0, n * 10, 10).1).collect()).await.unwrap();
        largest = largest.max(std::fs::metadata(dir.path().join("staging/t1/records")).unwrap().len());
    }
    assert!(largest < 17_000 * 30, "{largest}");
    drop((staging, store));
    let (_store, mut recovered) = open(dir.path()).await;
    assert_eq!(recovered.staged.remove(0).records(), [chunk(&files, 0, 0, 400_000).1]);
}

/// A checksum that does not match costs the whole extent, so they must not grow without end.
#[tokio::test]
async fn what_is_read_back_is_in_pieces_of_64_mib() {
    const MIB: u64 = 1 << 20;
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let mut plan = plan("t1", 1, &vec![("f".to_owned(), Vec::new())]);
    let mut file = plan.manifest.files()[0].clone();
    file.size = Some(130 * MIB);
    plan.manifest = crate::spec::Manifest::new(vec![file]).unwrap();
    let staging = store.stage(&plan).await.unwrap();
    let last = bytes::Bytes::from_static(b"x");
    let chunk = crate::store::StagedChunk { file: 0, offset: 130 * MIB - 1, payload: last.into() };
    staging.write(vec![chunk]).await.unwrap();
    for at in 0..130 {
        let extent = Extent { file: 0, offset: at * MIB, len: MIB };
        staging.sync(vec![ExtentRecord { extent, crc: at }]).await.unwrap();
    }
    let lengths = |staging: &crate::store::FileStaging| {
        staging.records().iter().map(|record| record.extent.len / MIB).collect::<Vec<_>>()
    };
    drop((staging, store));
    let (_store, mut recovered) = open(dir.path()).await;
    let staging = recovered.staged.remove(0);
    assert_eq!(lengths(&staging), [64, 64, 2]);
    // Written anew, they stay so.
    staging.reset_records(staging.records()).await.unwrap();
    drop((staging, _store));
    let (_store, mut recovered) = open(dir.path()).await;
    assert_eq!(lengths(&recovered.staged.remove(0)), [64, 64, 2]);
}

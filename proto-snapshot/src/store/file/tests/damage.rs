//! Flipped bits and cut files: each is harmless or reported by name, and costs what the file says and no more.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use proto_common::fence::Fence;
use proto_common::ids::ShardId;
use tokio_util::sync::CancellationToken;

use super::super::FileSnapshotStore;
use super::super::recover::described;
use super::support::*;
use crate::store::{Claim, SnapshotStore as _, Staging as _, StagingState, StoreError};

fn files() -> Files {
    vec![
        ("a/b".to_owned(), content(1, 5000)),
        ("c".to_owned(), content(2, 3000)),
        ("e".to_owned(), Vec::new()),
    ]
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// A store with one transfer open, one sealed, one installed, and a history.
async fn populated() -> tempfile::TempDir {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let staging = store.stage(&plan("done", 1, &files())).await.unwrap();
    fill(&staging, &files()).await;
    install(&staging, &files()).await;
    store.raise_fence(&shard(), Fence { epoch: 5, term: 6 }, &source()).await.unwrap();
    for id in ["open", "sealed"] {
        let staging = store.stage(&plan(id, 2, &files())).await.unwrap();
        staging.set_claim(Claim { attempt: 3, session: [7; 16] }).await.unwrap();
        let (one, record) = chunk(&files(), 0, 0, 2000);
        staging.write(vec![one]).await.unwrap();
        staging.sync(vec![record]).await.unwrap();
        if id == "sealed" {
            let (rest, record) = chunk(&files(), 0, 2000, 3000);
            let (other, other_record) = chunk(&files(), 1, 0, 3000);
            staging.write(vec![rest, other]).await.unwrap();
            staging.sync(vec![record, other_record]).await.unwrap();
            staging.seal(&totals(&files())).await.unwrap();
        }
    }
    store.record_finished(b"one").await.unwrap();
    store.record_finished(b"two").await.unwrap();
    dir
}

/// What a user can see of a store.
#[derive(Debug, PartialEq)]
struct Seen {
    staged: Vec<(String, StagingState, Claim, usize)>,
    finished: Vec<Vec<u8>>,
    shard: Option<(Fence, Option<u64>, Option<String>)>,
    current: bool,
    damage: Vec<String>,
}

/// Opens the store; whatever it believes of the staged bytes has to be true.
async fn look(dir: &Path) -> Result<Seen, StoreError> {
    let store = super::FileSnapshotStore::open(dir, options())?;
    let recovered = store.recover().await?;
    let mut staged = Vec::new();
    for staging in recovered.staged {
        for record in staging.records() {
            let extent = record.extent;
            let (_, expected) = chunk(&files(), extent.file, extent.offset as usize, extent.len as usize);
            assert_eq!(record.crc, expected.crc, "a record that was never written: {record:?}");
            assert_eq!(staging.checksum(extent).await?, record.crc);
        }
        assert_eq!(staging.plan().manifest, plan("x", 1, &files()).manifest);
        let id = staging.plan().spec.transfer_id.to_string();
        staged.push((id, staging.state(), staging.claim(), staging.records().len()));
    }
    staged.sort_by(|a, b| a.0.cmp(&b.0));
    let state = store.shard(&shard()).await.ok();
    let shard_seen = state.map(|state| {
        (state.fence, state.high_water.map(|point| point.index), state.current.map(|id| id.to_string()))
    });
    let current = match store.current(&shard()).await {
        Ok(current) => current.is_some_and(|current| tree(&current.path.unwrap()) == as_tree(&files())),
        Err(StoreError::Damaged { .. } | StoreError::ShardDamaged { .. }) => false,
        Err(error) => return Err(error),
    };
    Ok(Seen { staged, finished: recovered.finished, shard: shard_seen, current, damage: recovered.damage })
}

/// Flips every bit of `file` and cuts it at every length, each in a fresh copy, and checks what the store makes of it.
async fn damage_everywhere(file: &str, names: &str) {
    let original = populated().await;
    let whole = look(original.path()).await.unwrap();
    assert_eq!((whole.staged.len(), whole.finished.len(), whole.current), (2, 2, true), "{whole:?}");
    assert_eq!(whole.damage, Vec::<String>::new());
    let content = fs::read(original.path().join(file)).unwrap();
    assert!(!content.is_empty());
    let mut variants: Vec<(String, Vec<u8>)> = Vec::new();
    for bit in 0..content.len() * 8 {
        let mut flipped = content.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        variants.push((format!("bit {} of byte {} flipped", bit % 8, bit / 8), flipped));
    }
    for len in 0..content.len() {
        variants.push((format!("cut to {len} bytes"), content[..len].to_vec()));
    }
    variants.push(("with a byte more".to_owned(), [&content[..], b"x"].concat()));
    variants.push(("all zeros".to_owned(), vec![0; content.len()]));
    let mut noticed = 0;
    for (how, bytes) in variants {
        let copy = tempfile::tempdir_in(fast_dir()).unwrap();
        copy_tree(original.path(), copy.path());
        fs::write(copy.path().join(file), bytes).unwrap();
        let seen = look(copy.path()).await.unwrap_or_else(|error| panic!("{file} {how}: {error:?}"));
        if seen.damage.is_empty() {
            // The log of extents may lose its last records at a record's border; they are asked for again.
            let harmless =
                if file.ends_with("records") || file == "history" { how.starts_with("cut") } else { false };
            assert!(harmless || seen == whole, "{file} {how}: {seen:?}");
            continue;
        }
        noticed += 1;
        assert!(seen.damage.iter().any(|damage| damage.contains(names)), "{file} {how}: {:?}", seen.damage);
        assert_eq!(seen.damage.len(), 1, "{file} {how}: {:?}", seen.damage);
        // The rest is untouched.
        let others = |seen: &Seen| {
            seen.staged.iter().filter(|staged| !file.contains(&staged.0)).cloned().collect::<Vec<_>>()
        };
        assert_eq!(others(&seen), others(&whole), "{file} {how}");
        if file != "history" {
            assert_eq!(seen.finished, whole.finished, "{file} {how}");
        }
        if !file.starts_with("shards") {
            assert_eq!((&seen.shard, seen.current), (&whole.shard, true), "{file} {how}");
        }
        // What was found to be damaged is dealt with: the next start is clean, but for what only a person can repair.
        let again = look(copy.path()).await.unwrap();
        assert!(file.starts_with("shards") || again.damage.is_empty(), "{file} {how}: {:?}", again.damage);
    }
    assert!(noticed >= content.len() * 8, "{file}: only {noticed} were noticed");
}

#[tokio::test]
async fn damaged_meta() {
    damage_everywhere("staging/open/meta", "staging/open").await;
}

#[tokio::test]
async fn damaged_claim() {
    damage_everywhere("staging/open/claim", "staging/open/claim").await;
}

#[tokio::test]
async fn damaged_records() {
    damage_everywhere("staging/sealed/records", "staging/sealed/records").await;
}

#[tokio::test]
async fn damaged_seal() {
    damage_everywhere("staging/sealed/sealed", "staging/sealed/sealed").await;
}

#[tokio::test]
async fn damaged_manifest_of_an_installed_snapshot() {
    damage_everywhere("shards/shard-1/done.manifest", "done.manifest").await;
}

#[tokio::test]
async fn damaged_history() {
    damage_everywhere("history", "history").await;
}

#[tokio::test]
async fn damaged_current() {
    damage_everywhere("shards/shard-1/CURRENT", "shards/shard-1/CURRENT").await;
}

#[tokio::test]
async fn a_shard_whose_record_is_damaged_is_refused_and_loses_nothing() {
    let dir = populated().await;
    let path = dir.path().join("shards/shard-1/CURRENT");
    let mut content = fs::read(&path).unwrap();
    *content.last_mut().unwrap() ^= 1;
    fs::write(&path, &content).unwrap();
    let (store, recovered) = open(dir.path()).await;
    let refused = |error: StoreError| {
        assert!(matches!(&error, StoreError::ShardDamaged { shard: of, .. } if *of == shard()), "{error:?}");
    };
    refused(store.shard(&shard()).await.unwrap_err());
    refused(store.raise_fence(&shard(), Fence { epoch: 9, term: 9 }, &source()).await.unwrap_err());
    refused(store.stage(&plan("new", 9, &files())).await.unwrap_err());
    let sealed = recovered.staged.iter().find(|staging| staging.plan().spec.transfer_id.as_str() == "sealed");
    let sealed = sealed.unwrap();
    refused(sealed.place().await.unwrap_err());
    sealed.remove().await.unwrap();
    assert_eq!(tree(&dir.path().join("installed/shard-1/done")), as_tree(&files()));
    // Others go on.
    let mut other = plan("other", 1, &files());
    other.spec.target_shard = proto_common::ids::ShardId::new("shard-2").unwrap();
    let staging = store.stage(&other).await.unwrap();
    fill(&staging, &files()).await;
    install(&staging, &files()).await;
}

/// Without it the shard would be a new one, which takes older snapshots and lower fences.
#[tokio::test]
async fn a_shard_whose_record_is_gone_is_refused_and_loses_nothing() {
    let dir = populated().await;
    let at = |path: &str| dir.path().join(path);
    let record = fs::read(at("shards/shard-1/CURRENT")).unwrap();
    fs::remove_file(at("shards/shard-1/CURRENT")).unwrap();
    let mut other = plan("other", 1, &files());
    other.spec.target_shard = proto_common::ids::ShardId::new("shard-2").unwrap();
    for _ in 0..2 {
        let (store, recovered) = open(dir.path()).await;
        let told = |what: &String| {
            what.contains("shards/shard-1/CURRENT")
                && what.contains("is missing")
                && what.contains("done.manifest")
        };
        assert!(recovered.damage.iter().any(told), "{:?}", recovered.damage);
        let refused = |error: StoreError| {
            assert!(
                matches!(&error, StoreError::ShardDamaged { shard: of, file, .. } if *of == shard() && file == "shards/shard-1/CURRENT"),
                "{error:?}"
            );
        };
        refused(store.shard(&shard()).await.unwrap_err());
        refused(store.raise_fence(&shard(), Fence { epoch: 1, term: 1 }, &source()).await.unwrap_err());
        refused(store.stage(&plan("new", 1, &files())).await.unwrap_err());
        let staged = |id: &str| {
            let found =
                recovered.staged.iter().find(|staging| staging.plan().spec.transfer_id.as_str() == id);
            std::sync::Arc::clone(found.unwrap())
        };
        refused(staged("sealed").place().await.unwrap_err());
        assert_eq!(tree(&at("installed/shard-1/done")), as_tree(&files()));
        // Others go on.
        let staging = store.stage(&other).await.unwrap();
        fill(&staging, &files()).await;
        install(&staging, &files()).await;
        other.spec.transfer_id = proto_common::ids::TransferId::new("another").unwrap();
        other.spec.point.index += 1;
    }
    // Repaired, all is as it was.
    fs::write(at("shards/shard-1/CURRENT"), record).unwrap();
    let seen = look(dir.path()).await.unwrap();
    assert_eq!((seen.damage, seen.current), (Vec::new(), true));
    // Removed, the shard is new.
    fs::remove_dir_all(at("shards/shard-1")).unwrap();
    let (store, _) = open(dir.path()).await;
    assert_eq!(store.shard(&shard()).await.unwrap(), crate::store::ShardState::default());
}

/// As from a backup: it is whole, and would have the newer snapshot deleted, older ones taken and lower fences.
#[tokio::test]
async fn a_shard_whose_record_is_older_than_what_is_installed_is_refused_and_loses_nothing() {
    for first in [false, true] {
        let dir = tempfile::tempdir_in(fast_dir()).unwrap();
        let at = |path: &str| dir.path().join(path);
        let (store, _) = open(dir.path()).await;
        store.raise_fence(&shard(), Fence { epoch: 1, term: 1 }, &source()).await.unwrap();
        let mut old = fs::read(at("shards/shard-1/CURRENT")).unwrap();
        for (id, index) in [("t1", 1), ("t2", 2)] {
            let staging = store.stage(&plan(id, index, &files())).await.unwrap();
            fill(&staging, &files()).await;
            install(&staging, &files()).await;
            if index == 1 && !first {
                old = fs::read(at("shards/shard-1/CURRENT")).unwrap();
            }
        }
        drop(store);
        let new = fs::read(at("shards/shard-1/CURRENT")).unwrap();
        fs::write(at("shards/shard-1/CURRENT"), old).unwrap();
        for _ in 0..2 {
            let (store, recovered) = open(dir.path()).await;
            let [told] = &recovered.damage[..] else { panic!("{:?}", recovered.damage) };
            assert!(told.contains("shards/shard-1/CURRENT") && told.contains("older than"), "{told}");
            assert!(told.contains("shards/shard-1/t2.manifest"), "{told}");
            let refused = store.stage(&plan("t3", 3, &files())).await.unwrap_err();
            assert!(matches!(refused, StoreError::ShardDamaged { .. }), "{refused:?}");
            store.raise_fence(&shard(), Fence { epoch: 9, term: 9 }, &source()).await.unwrap_err();
            assert_eq!(tree(&at("installed/shard-1/t2")), as_tree(&files()));
        }
        fs::write(at("shards/shard-1/CURRENT"), new).unwrap();
        let (store, recovered) = open(dir.path()).await;
        assert_eq!(recovered.damage, Vec::<String>::new());
        assert_eq!(current(&store).await.unwrap().0.as_str(), "t2");
    }
}

/// Without its directory the shard would be a new one, whatever the name has become.
#[tokio::test]
async fn a_shard_whose_record_lies_elsewhere_is_refused_with_the_one_whose_place_it_has() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;
    for name in [&b"shard-3"[..], b"shard\x0d1", b"shard-\xb1"] {
        let dir = populated().await;
        let root = dir.path().join("shards");
        fs::rename(root.join("shard-1"), root.join(OsStr::from_bytes(name))).unwrap();
        for _ in 0..2 {
            let (store, recovered) = open(dir.path()).await;
            let told = "transfers to shard shard-1 are refused until a start finds it in shards/shard-1";
            assert!(recovered.damage.iter().any(|damage| damage.contains(told)), "{:?}", recovered.damage);
            for shard in [shard(), ShardId::new("shard-3").unwrap()] {
                let refused = store.raise_fence(&shard, Fence { epoch: 1, term: 1 }, &source()).await;
                let other = name != b"shard-3" && shard.as_str() == "shard-3";
                assert_eq!(refused.is_ok(), other, "{shard}: {refused:?}");
            }
            assert_eq!(tree(&dir.path().join("installed/shard-1/done")), as_tree(&files()));
        }
    }
}

#[tokio::test]
async fn a_copy_beside_a_shard_is_told_of_and_changes_nothing_of_it() {
    let dir = populated().await;
    let root = dir.path().join("shards");
    fs::create_dir(root.join("shard-1.bak")).unwrap();
    fs::copy(root.join("shard-1/CURRENT"), root.join("shard-1.bak/CURRENT")).unwrap();
    let (store, recovered) = open(dir.path()).await;
    let told = "shards/shard-1.bak/CURRENT is the record of shard shard-1, in the place of another";
    assert!(recovered.damage.iter().any(|damage| damage.contains(told)), "{:?}", recovered.damage);
    let fence = Fence { epoch: 1, term: 1 };
    store.raise_fence(&shard(), fence, &source()).await.unwrap();
    store.raise_fence(&ShardId::new("shard-1.bak").unwrap(), fence, &source()).await.unwrap_err();
}

#[tokio::test]
async fn names_that_the_store_does_not_give_are_told_of_in_bounds() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;
    let dir = populated().await;
    let at = |path: &str| dir.path().join(path);
    let no_text = OsStr::from_bytes(b"\xff");
    for path in ["staging", "shards", "installed", "shards/shard-1", "installed/shard-1"] {
        fs::create_dir(at(path).join(no_text)).unwrap();
        fs::create_dir(at(path).join("a b")).unwrap();
        let seen = look(dir.path()).await.unwrap();
        for name in ["\\xFF", "a b"] {
            let told = format!("\"{path}/{name}\" is nothing of the store's");
            assert!(seen.damage.contains(&format!("{told}; it was left alone")), "{told}: {:?}", seen.damage);
        }
        assert_eq!((seen.damage.len(), seen.staged.len(), seen.current), (2, 2, true), "{:?}", seen.damage);
        fs::remove_dir(at(path).join(no_text)).unwrap();
        fs::remove_dir(at(path).join("a b")).unwrap();
    }
    for number in 0..20 {
        fs::write(at(&format!("shards/a {number}")), "").unwrap();
    }
    let seen = look(dir.path()).await.unwrap();
    assert_eq!(seen.damage.len(), 17, "{:?}", seen.damage);
    assert!(seen.damage[16].starts_with("4 more names"), "{:?}", seen.damage);
}

/// One bad disk, and 131,072 files.
#[tokio::test]
async fn damaged_files_of_one_transfer_are_told_of_in_bounds() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let files: Files = (0..20).map(|number| (format!("f{number:02}"), vec![number; 100])).collect();
    let (store, _) = open(dir.path()).await;
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    fill(&staging, &files).await;
    drop((staging, store));
    for number in 0..20 {
        let file =
            fs::OpenOptions::new().write(true).open(dir.path().join(format!("staging/t1/tree/f{number:02}")));
        file.unwrap().set_len(99).unwrap();
    }
    let (_store, recovered) = open(dir.path()).await;
    assert_eq!(recovered.damage.len(), 17, "{:?}", recovered.damage);
    assert!(recovered.damage[..16].iter().all(|damage| damage.contains("staging/t1: tree/f")));
    assert_eq!(recovered.damage[16], "staging/t1: 4 more of its files or records are damaged");
    assert_eq!(recovered.staged[0].records(), [], "all of them are asked for again");
}

/// What is in place only is not in the record yet: damage to its staging area costs that alone, and a crash in between nothing.
#[tokio::test]
async fn a_snapshot_that_was_placed_only_is_no_lost_record() {
    for (damaged, old) in [(false, false), (false, true), (true, false), (true, true)] {
        let dir = tempfile::tempdir_in(fast_dir()).unwrap();
        let (store, _) = open(dir.path()).await;
        if old {
            let staging = store.stage(&plan("old", 0, &files())).await.unwrap();
            fill(&staging, &files()).await;
            install(&staging, &files()).await;
        }
        let staging = store.stage(&plan("first", 1, &files())).await.unwrap();
        fill(&staging, &files()).await;
        staging.seal(&totals(&files())).await.unwrap();
        staging.place().await.unwrap();
        assert_eq!(store.raise_fence(&shard(), Fence::default(), &source()).await.unwrap(), Fence::default());
        drop((staging, store));
        assert!(dir.path().join("shards/shard-1/first.manifest").exists());
        if damaged {
            fs::write(dir.path().join("staging/first/meta"), "x").unwrap();
        }
        let (store, recovered) = open(dir.path()).await;
        let told = recovered.damage.join("; ");
        assert_eq!(damaged, told.contains("staging/first was set aside"), "{told}");
        assert!(!told.contains("CURRENT"), "{told}");
        let staging = match recovered.staged.first() {
            Some(staging) => std::sync::Arc::clone(staging),
            None => {
                let staging = store.stage(&plan("first", 1, &files())).await.unwrap();
                fill(&staging, &files()).await;
                staging
            }
        };
        install(&staging, &files()).await;
        assert_eq!(current(&store).await.unwrap().1, as_tree(&files()));
        drop((staging, recovered, store));
        assert_eq!(look(dir.path()).await.unwrap().damage, Vec::<String>::new());
    }
}

/// What cannot be read now says nothing: what was placed stays removable, and what never was is removed.
#[tokio::test]
async fn a_record_that_cannot_be_read_keeps_what_was_placed_alone() {
    for placed in [false, true] {
        let dir = tempfile::tempdir_in(fast_dir()).unwrap();
        let (store, _) = open(dir.path()).await;
        let staging = store.stage(&plan("first", 1, &files())).await.unwrap();
        fill(&staging, &files()).await;
        staging.seal(&totals(&files())).await.unwrap();
        if placed {
            staging.place().await.unwrap();
        }
        let record = dir.path().join("shards/shard-1/CURRENT");
        fs::create_dir_all(&record).unwrap();
        let removed = staging.remove().await;
        assert_eq!(removed.is_err(), placed, "{removed:?}");
        fs::remove_dir(&record).unwrap();
        staging.remove().await.unwrap();
        assert!(!dir.path().join("shards/shard-1/first.manifest").exists());
        assert_eq!(store.shard(&shard()).await.unwrap(), crate::store::ShardState::default());
        drop((staging, store));
        assert_eq!(look(dir.path()).await.unwrap().damage, Vec::<String>::new());
    }
}

/// As after a repair by hand, or by a file system that mixed them up.
#[tokio::test]
async fn claims_and_seals_of_other_transfers_are_not_believed() {
    for name in ["claim", "sealed"] {
        let dir = tempfile::tempdir_in(fast_dir()).unwrap();
        let (store, _) = open(dir.path()).await;
        // Of the same sizes, so that nothing but the ID tells the seals apart; an empty snapshot has no totals either.
        let contents = [
            vec![("f".to_owned(), content(1, 500))],
            vec![("f".to_owned(), content(2, 500))],
            vec![],
            vec![],
        ];
        for (number, files) in (1..).zip(&contents) {
            let staging = store.stage(&plan(&format!("t{number}"), 2, files)).await.unwrap();
            staging.set_claim(Claim { attempt: number, session: [7; 16] }).await.unwrap();
            fill(&staging, files).await;
            staging.seal(&totals(files)).await.unwrap();
        }
        drop(store);
        let path = |id: &str| dir.path().join("staging").join(id).join(name);
        for (one, other) in [("t1", "t2"), ("t3", "t4")] {
            let between = dir.path().join("between");
            fs::rename(path(one), &between).unwrap();
            fs::rename(path(other), path(one)).unwrap();
            fs::rename(&between, path(other)).unwrap();
        }
        let (_store, recovered) = open(dir.path()).await;
        for id in ["t1", "t2", "t3", "t4"] {
            let file = format!("staging/{id}/{name}");
            assert!(recovered.damage.iter().any(|damage| damage.contains(&file)), "{:?}", recovered.damage);
            let staged =
                recovered.staged.iter().find(|staging| staging.plan().spec.transfer_id.as_str() == id);
            // Without a seal, the sender is asked for it again; without a claim, for all.
            let state = staged.map(|staged| staged.state());
            assert_eq!(state, (name == "sealed").then_some(StagingState::Open), "{id}");
        }
        assert_eq!(recovered.damage.len(), 4, "{:?}", recovered.damage);
    }
}

#[tokio::test]
async fn records_of_bytes_that_are_gone_are_dropped() {
    let dir = populated().await;
    fs::File::options()
        .write(true)
        .open(dir.path().join("staging/open/tree/a/b"))
        .unwrap()
        .set_len(100)
        .unwrap();
    fs::remove_file(dir.path().join("staging/sealed/tree/c")).unwrap();
    let seen = {
        let (_store, recovered) = open(dir.path()).await;
        let records = |id: &str| {
            let staging =
                recovered.staged.iter().find(|staging| staging.plan().spec.transfer_id.as_str() == id);
            staging.map(|staging| (staging.state(), staging.records().len())).unwrap()
        };
        assert_eq!(records("open"), (StagingState::Open, 0));
        assert_eq!(records("sealed"), (StagingState::Open, 1));
        recovered.damage
    };
    assert!(seen.iter().any(|damage| damage.contains("tree/a/b")), "{seen:?}");
    assert!(seen.iter().any(|damage| damage.contains("tree/c")), "{seen:?}");
    let (_store, recovered) = open(dir.path()).await;
    assert_eq!(recovered.damage, Vec::<String>::new());
}

#[tokio::test]
async fn what_was_set_aside_is_bounded_and_holds_no_data() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    for round in 0..20 {
        let (store, _) = open(dir.path()).await;
        let staging = store.stage(&plan("t", 1, &files())).await.unwrap();
        fill(&staging, &files()).await;
        drop((staging, store));
        fs::write(dir.path().join("staging/t/meta"), format!("{round}")).unwrap();
        let (_store, recovered) = open(dir.path()).await;
        assert!(recovered.staged.is_empty());
    }
    let kept: Vec<PathBuf> =
        fs::read_dir(dir.path().join("quarantine")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(kept.len(), 16);
    assert!(kept.iter().all(|kept| kept.join("meta").exists() && !kept.join("tree").exists()));
}

/// As where the clock was set back.
#[tokio::test]
async fn what_is_set_aside_in_the_same_moment_as_another_is_kept_beside_it() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let staging = store.stage(&plan("t", 1, &files())).await.unwrap();
    drop((staging, store));
    fs::write(dir.path().join("staging/t/meta"), "damaged").unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    for at in now..now + 3000 {
        let other = dir.path().join(format!("quarantine/{at:016x}.t"));
        fs::create_dir(&other).unwrap();
        fs::write(other.join("meta"), "of another").unwrap();
    }
    let (_store, recovered) = open(dir.path()).await;
    assert!(recovered.staged.is_empty());
    assert!(recovered.damage.iter().any(|damage| damage.contains("was set aside")), "{:?}", recovered.damage);
    assert!(!dir.path().join("staging/t").exists());
}

#[tokio::test]
async fn a_store_of_another_layout_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()).await);
    fs::write(dir.path().join("FORMAT"), "node snapshot store 2\n").unwrap();
    let error = super::FileSnapshotStore::open(dir.path(), options()).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
}

#[tokio::test]
async fn a_damaged_format_is_told_and_written_anew() {
    let dir = populated().await;
    let path = dir.path().join("FORMAT");
    let right = fs::read(&path).unwrap();
    let mut variants: Vec<Vec<u8>> = (0..right.len()).map(|len| right[..len].to_vec()).collect();
    variants.extend([vec![0; right.len()], [&right[..], b"x"].concat(), vec![b'1'; 1 << 20]]);
    for bit in 0..right.len() * 8 {
        let mut flipped = right.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        variants.push(flipped);
    }
    let whole = look(dir.path()).await.unwrap();
    let mut others = 0;
    for bytes in variants {
        let shown = String::from_utf8_lossy(&bytes).chars().take(40).collect::<String>();
        fs::write(&path, &bytes).unwrap();
        let version = bytes.strip_prefix(b"node snapshot store ").and_then(|rest| rest.first());
        if version.is_some_and(|digit| digit.is_ascii_digit() && *digit != b'1') {
            // What a flip has made of our digit is another version as any other is.
            others += 1;
            let error = look(dir.path()).await.unwrap_err();
            assert!(
                matches!(&error, StoreError::Damaged { file, .. } if file == "FORMAT"),
                "{shown:?}: {error:?}"
            );
            assert_eq!(fs::read(&path).unwrap(), bytes, "it was left as it is");
            continue;
        }
        let seen = look(dir.path()).await.unwrap_or_else(|error| panic!("{shown:?}: {error:?}"));
        let [damage] = &seen.damage[..] else { panic!("{shown:?}: {:?}", seen.damage) };
        assert!(damage.contains("FORMAT"), "{shown:?}: {damage}");
        assert_eq!(fs::read(&path).unwrap(), right, "{shown:?}");
        assert_eq!(look(dir.path()).await.unwrap(), whole, "{shown:?}");
    }
    assert_eq!(others, 4, "0, 3, 5 and 9");
}

/// What a store cannot do without is named when it cannot be read: without that, nobody knows what to repair.
#[tokio::test]
async fn a_start_that_fails_names_what_could_not_be_read() {
    for name in ["staging", "shards", "installed"] {
        let dir = tempfile::tempdir_in(fast_dir()).unwrap();
        drop(open(dir.path()).await);
        fs::remove_dir(dir.path().join(name)).unwrap();
        fs::write(dir.path().join(name), "").unwrap();
        let error = look(dir.path()).await.unwrap_err();
        let StoreError::Io { source, .. } = &error else { panic!("{error:?}") };
        assert!(source.to_string().starts_with(&format!("{name}: ")), "{source}");
        let told = proto_common::error::Error::from(error);
        assert!(!told.message().contains(name), "peers are told no paths: {told:?}");
    }
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    fs::create_dir(dir.path().join("FORMAT")).unwrap();
    let error = look(dir.path()).await.unwrap_err();
    assert!(
        matches!(&error, StoreError::Io { source, .. } if source.to_string().starts_with("FORMAT: ")),
        "{error:?}"
    );
}

/// What a disk that cannot read one sector does to a start: everything else works.
#[tokio::test]
async fn what_cannot_be_read_or_removed_is_reported_and_blocks_its_id_only() {
    for unreadable in ["open/meta", "open/claim", "open/records", "sealed/sealed", ".gone.open", ".new.open"]
    {
        let dir = populated().await;
        let root = dir.path().join("staging");
        let (path, away) = (root.join(unreadable), dir.path().join("away"));
        let half = unreadable.starts_with('.');
        if half {
            fs::rename(root.join("open"), &away).unwrap();
            // A file cannot be removed as a directory is.
            fs::write(&path, "x").unwrap();
        } else {
            fs::rename(&path, &away).unwrap();
            // A directory opens as a file does, and reading it is an error of the system.
            fs::create_dir(&path).unwrap();
        }
        let (name, other) =
            if unreadable.starts_with("sealed") { ("sealed", "open") } else { ("open", "sealed") };
        let area = unreadable.split('/').next().unwrap();
        let before = tree(&root);
        {
            let (store, recovered) = open(dir.path()).await;
            let staged: Vec<_> =
                recovered.staged.iter().map(|area| area.plan().spec.transfer_id.to_string()).collect();
            assert_eq!(staged, [other], "{unreadable}");
            assert_eq!(recovered.finished.len(), 2);
            assert_eq!(recovered.damage.len(), 1, "{:?}", recovered.damage);
            assert!(recovered.damage[0].contains(&format!("staging/{area} ")), "{:?}", recovered.damage);
            let refused = store.stage(&plan(name, 9, &files())).await.unwrap_err();
            assert!(
                matches!(&refused, StoreError::Damaged { file, .. } if *file == format!("staging/{area}")),
                "{refused:?}"
            );
            assert_eq!(tree(&root), before, "{unreadable}: it was left as it is");
            // Also what others remove does not touch it.
            let staging = store.stage(&plan("new", 9, &files())).await.unwrap();
            fill(&staging, &files()).await;
            install(&staging, &files()).await;
            assert_eq!(current(&store).await.unwrap().1, as_tree(&files()));
        }
        // The disk answers again.
        if half {
            fs::remove_file(&path).unwrap();
            fs::rename(&away, root.join("open")).unwrap();
        } else {
            fs::remove_dir(&path).unwrap();
            fs::rename(&away, &path).unwrap();
        }
        let (_store, recovered) = open(dir.path()).await;
        assert_eq!((recovered.staged.len(), recovered.damage), (2, Vec::new()), "{unreadable}");
    }
}

/// No peer can make one, a hand can: the store writes into its own directory alone.
#[tokio::test]
async fn nothing_is_written_through_a_link_that_lies_in_the_place_of_a_file_or_directory() {
    use std::os::unix::fs::symlink;
    let outside = tempfile::tempdir_in(fast_dir()).unwrap();
    fs::write(outside.path().join("b"), b"precious").unwrap();
    let files = vec![("a/b".to_owned(), vec![7; 100])];
    for at_file in [false, true] {
        let dir = tempfile::tempdir_in(fast_dir()).unwrap();
        let (store, _) = open(dir.path()).await;
        for id in ["linked", "other"] {
            let staging = store.stage(&plan(id, 2, &files)).await.unwrap();
            let (one, record) = chunk(&files, 0, 0, 50);
            staging.write(vec![one]).await.unwrap();
            staging.sync(vec![record]).await.unwrap();
        }
        drop(store);
        let at = dir.path().join("staging/linked/tree/a");
        if at_file {
            fs::remove_file(at.join("b")).unwrap();
            symlink(outside.path().join("b"), at.join("b")).unwrap();
        } else {
            fs::remove_dir_all(&at).unwrap();
            symlink(outside.path(), &at).unwrap();
        }
        let (store, recovered) = open(dir.path()).await;
        assert!(
            recovered.damage.iter().any(|what| what.contains("staging/linked cannot be used")),
            "{:?}",
            recovered.damage
        );
        assert!(matches!(store.stage(&plan("linked", 2, &files)).await, Err(StoreError::Damaged { .. })));
        let [other] = &recovered.staged[..] else { panic!("{:?}", recovered.staged) };
        let (rest, record) = chunk(&files, 0, 50, 50);
        other.write(vec![rest]).await.unwrap();
        other.sync(vec![record]).await.unwrap();
        install(other, &files).await;
        assert_eq!(fs::read(outside.path().join("b")).unwrap(), b"precious");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    }
}

/// Nothing is deleted through a link either: what is damaged is, so one in the place of a staging area would do for whatever it leads to.
#[tokio::test]
async fn nothing_is_deleted_through_a_link_that_lies_in_the_place_of_a_staging_area() {
    use std::os::unix::fs::symlink;
    for (name, damaged) in [("x", true), ("x", false), (".gone.x", false), (".new.x", true)] {
        let dir = tempfile::tempdir_in(fast_dir()).unwrap();
        let outside = tempfile::tempdir_in(fast_dir()).unwrap();
        let (store, _) = open(dir.path()).await;
        let staging = store.stage(&plan("x", 2, &files())).await.unwrap();
        let (one, record) = chunk(&files(), 0, 0, 2000);
        staging.write(vec![one]).await.unwrap();
        staging.sync(vec![record]).await.unwrap();
        drop((staging, store));
        copy_tree(&dir.path().join("staging/x"), outside.path());
        fs::remove_dir_all(dir.path().join("staging/x")).unwrap();
        fs::create_dir_all(outside.path().join("reuse")).unwrap();
        fs::write(outside.path().join("tree/precious"), b"precious").unwrap();
        fs::write(outside.path().join("reuse/precious"), b"precious").unwrap();
        if damaged {
            fs::remove_file(outside.path().join("meta")).unwrap();
        }
        let link = dir.path().join("staging").join(name);
        symlink(outside.path(), &link).unwrap();
        let before = tree(outside.path());
        let (store, recovered) = open(dir.path()).await;
        assert!(recovered.staged.is_empty());
        let told = format!("staging/{name} cannot be used");
        assert!(recovered.damage.iter().any(|what| what.contains(&told)), "{:?}", recovered.damage);
        assert!(matches!(store.stage(&plan("x", 2, &files())).await, Err(StoreError::Damaged { .. })));
        assert_eq!(tree(outside.path()), before, "{name}");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink(), "it was left as it is");
    }
}

/// The log of records is cut where it is damaged.
#[tokio::test]
async fn a_link_in_the_place_of_the_records_is_not_followed() {
    let dir = populated().await;
    let outside = tempfile::NamedTempFile::new_in(fast_dir()).unwrap();
    fs::write(outside.path(), b"precious").unwrap();
    let records = dir.path().join("staging/open/records");
    fs::remove_file(&records).unwrap();
    std::os::unix::fs::symlink(outside.path(), &records).unwrap();
    let (_store, recovered) = open(dir.path()).await;
    let told =
        |what: &String| what.contains("staging/open cannot be used") && what.contains("staging/open/records");
    assert!(recovered.damage.iter().any(told), "{:?}", recovered.damage);
    assert_eq!(recovered.staged.len(), 1, "the other one");
    assert_eq!(fs::read(outside.path()).unwrap(), b"precious");
}

/// As above, but the links come while the store is in use.
#[tokio::test]
async fn links_that_appear_while_a_transfer_runs_are_not_followed() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let outside = tempfile::tempdir_in(fast_dir()).unwrap();
    for name in ["b", "0", "1", "2"] {
        fs::write(outside.path().join(name), b"precious").unwrap();
    }
    let before = tree(outside.path());
    let (store, _) = open(dir.path()).await;
    let files: Files = vec![
        ("a/b".to_owned(), content(1, 5000)),
        ("c".to_owned(), content(2, 3000)),
        ("empty".to_owned(), Vec::new()),
    ];
    let base = store.stage(&plan_with_digests("base", 1, &files)).await.unwrap();
    fill(&base, &files).await;
    install(&base, &files).await;
    let staging = store.stage(&plan_with_digests("t", 2, &files)).await.unwrap();
    let area = dir.path().join("staging/t");
    fs::create_dir(area.join("tree")).unwrap();
    symlink(outside.path(), area.join("tree/a")).unwrap();
    symlink(outside.path().join("b"), area.join("tree/c")).unwrap();
    symlink(outside.path().join("b"), area.join("tree/empty")).unwrap();
    symlink(outside.path(), area.join("reuse")).unwrap();
    // In the place of a directory, and of a file; of what comes whole, and in part; of a copy.
    for (file, len) in [(0, 5000), (0, 2000), (1, 3000), (1, 2000)] {
        let error = staging.write(vec![chunk(&files, file, 0, len).0]).await.unwrap_err();
        assert!(matches!(error, StoreError::Io { .. }), "{error:?}");
        assert_eq!(tree(outside.path()), before, "{file}, {len}");
    }
    staging.checksum(crate::extent::Extent { file: 1, offset: 0, len: 8 }).await.unwrap_err();
    for file in [0, 1] {
        staging.reuse(file, CancellationToken::new()).await.unwrap_err();
        assert_eq!(tree(outside.path()), before, "{file}");
    }
    // A file that is too long is cut when it is sealed.
    fs::remove_file(area.join("tree/a")).unwrap();
    fs::remove_file(area.join("tree/c")).unwrap();
    fill(&staging, &files).await;
    staging.seal(&totals(&files)).await.unwrap_err();
    assert_eq!(tree(outside.path()), before);
    fs::remove_file(area.join("tree/empty")).unwrap();
    install(&staging, &files).await;
    assert_eq!(current(&store).await.unwrap().1, as_tree(&files));
    assert_eq!(tree(outside.path()), before);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_record_that_is_no_file_keeps_nobody_waiting() {
    let dir = populated().await;
    let at = dir.path().join("shards").join(shard().as_str()).join("CURRENT");
    make_pipe(&at);
    let opening = tokio::time::timeout(std::time::Duration::from_secs(20), open(dir.path()));
    let (store, recovered) = opening.await.expect("in time");
    assert_eq!(recovered.staged.len(), 2, "the rest is there");
    let told =
        |what: &String| what.contains("shards/shard-1 cannot be used") && what.contains("it is no file");
    assert!(recovered.damage.iter().any(told), "{:?}", recovered.damage);
    store.raise_fence(&shard(), Fence { epoch: 9, term: 9 }, &source()).await.unwrap_err();
}

/// A pipe, which whoever opens it in the common way waits at.
fn make_pipe(at: &Path) {
    fs::remove_file(at).unwrap();
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mkfifoat(rustix::fs::CWD, at, mode).unwrap();
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn neither_a_format_nor_an_installed_file_that_is_a_pipe_keeps_anybody_waiting() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let base = store.stage(&plan_with_digests("base", 1, &files())).await.unwrap();
    fill(&base, &files()).await;
    install(&base, &files()).await;
    let staging = store.stage(&plan_with_digests("next", 2, &files())).await.unwrap();
    make_pipe(&dir.path().join("installed/shard-1/base/c"));
    let soon = std::time::Duration::from_secs(20);
    let reused = tokio::time::timeout(soon, staging.reuse(1, CancellationToken::new()))
        .await
        .expect("in time")
        .unwrap();
    assert_eq!(reused, None);
    drop((base, staging, store));
    make_pipe(&dir.path().join("FORMAT"));
    let at = dir.path().to_owned();
    let opening = tokio::task::spawn_blocking(move || FileSnapshotStore::open(at, options()).map(drop));
    let error = tokio::time::timeout(soon, opening).await.expect("in time").unwrap().unwrap_err();
    let told = described(&error);
    assert!(told.contains("FORMAT") && told.contains("it is no file"), "{told}");
}

/// What lies in the directories of the store's own is deleted at each start, or written to.
#[tokio::test]
async fn a_store_whose_own_directory_is_a_link_does_not_open() {
    use std::os::unix::fs::symlink;
    for name in ["trash", "quarantine", "staging", "shards", "installed"] {
        let dir = populated().await;
        let outside = tempfile::tempdir_in(fast_dir()).unwrap();
        copy_tree(&dir.path().join(name), outside.path());
        fs::create_dir(outside.path().join("precious")).unwrap();
        fs::write(outside.path().join("precious/file"), b"precious").unwrap();
        let before = tree(outside.path());
        fs::remove_dir_all(dir.path().join(name)).unwrap();
        symlink(outside.path(), dir.path().join(name)).unwrap();
        let error = FileSnapshotStore::open(dir.path(), options()).unwrap_err();
        let told = described(&error);
        assert!(told.contains(name) && told.contains("perhaps a link"), "{told}");
        assert_eq!(tree(outside.path()), before, "{name}");
    }
}

#[tokio::test]
async fn a_shard_whose_directory_is_a_link_is_refused_and_the_rest_served() {
    use std::os::unix::fs::symlink;
    for name in ["shards/shard-1", "installed/shard-1"] {
        let dir = populated().await;
        let outside = tempfile::tempdir_in(fast_dir()).unwrap();
        copy_tree(&dir.path().join(name), outside.path());
        fs::remove_dir_all(dir.path().join(name)).unwrap();
        symlink(outside.path(), dir.path().join(name)).unwrap();
        let before = tree(outside.path());
        let (store, recovered) = open(dir.path()).await;
        let told = |what: &String| what.contains(name) && what.contains("perhaps a link");
        assert!(recovered.damage.iter().any(told), "{:?}", recovered.damage);
        let refused = store.raise_fence(&shard(), Fence { epoch: 9, term: 9 }, &source()).await.unwrap_err();
        assert!(matches!(refused, StoreError::ShardDamaged { .. }), "{refused:?}");
        let sealed = recovered.staged.iter().find(|staged| staged.state() == StagingState::Sealed).unwrap();
        sealed.place().await.unwrap_err();
        assert_eq!(tree(outside.path()), before, "{name}");
        let other = ShardId::new("other").unwrap();
        store.raise_fence(&other, Fence { epoch: 1, term: 1 }, &source()).await.unwrap();
    }
}

#[tokio::test]
async fn a_manifest_of_what_is_current_that_is_gone_is_told() {
    let dir = populated().await;
    fs::remove_file(dir.path().join("shards/shard-1/done.manifest")).unwrap();
    let (_store, recovered) = open(dir.path()).await;
    let told = |what: &String| what.contains("shards/shard-1/done.manifest is missing");
    assert!(recovered.damage.iter().any(told), "{:?}", recovered.damage);
}

#[tokio::test]
async fn files_of_what_is_current_that_are_gone_as_a_whole_are_told() {
    let dir = populated().await;
    fs::remove_dir_all(dir.path().join("installed/shard-1/done")).unwrap();
    let (_store, recovered) = open(dir.path()).await;
    let [told] = &recovered.damage[..] else { panic!("{:?}", recovered.damage) };
    assert!(told.starts_with("installed/shard-1/done is missing"), "{told}");
}

//! What dropping leaves in the database, and what it must not touch.

use std::fs;

use super::*;
use crate::common::slot_of;
use crate::store::Claim;
use crate::store::test_store::{leftovers, open as open_store, set, stored_rows};

const FILE: &str = "active/00000-08191.m.task";

fn options(data: &Path, drop: Option<&str>, target_discarded: bool) -> CheckOptions {
    CheckOptions {
        data: data.to_path_buf(),
        store: StoreOptions::default(),
        drop: drop.map(str::to_owned),
        target_discarded,
        json: true,
    }
}

fn range(text: &str) -> SlotRange {
    text.parse().unwrap()
}

/// A node with 200 keys whose slots 0-8191 are moved, with a change log, and whose record of that is damaged; how many keys are in them.
async fn moving(data: &Path, owned_by_others: &[&str]) -> u64 {
    let (store, _) = open_store(data, "n1", "0-16383");
    for n in 0..200 {
        set(&store, &format!("key:{n}"), "value").await;
    }
    let id = MigrationId::new("m").unwrap();
    store.open_log(&id, range("0-8191"), None).await.unwrap();
    set(&store, "key:0", "logged or not").await;
    let owner = NodeId::new("n2").unwrap();
    let claim = |slots: &&str| Claim { range: range(slots), owner: owner.clone(), epoch: 2 };
    store.adopt(owned_by_others.iter().map(claim).collect()).await.unwrap();
    let moved = owned_by_others.iter().map(|slots| store.rows_in(range(slots))).sum();
    closed(store);
    let active = data.join("migrations/active");
    fs::create_dir_all(&active).unwrap();
    fs::write(data.join("migrations").join(FILE), b"damaged").unwrap();
    moved
}

fn closed(store: Store) {
    store.close();
}

fn opened(data: &Path) -> Store {
    Store::open_existing(data, &StoreOptions::default()).unwrap().0
}

#[tokio::test]
async fn rows_that_another_node_owns_by_now_go_with_the_record() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path();
    let moved = moving(data, &["0-8191"]).await;
    assert!(moved > 50 && moved < 150, "{moved}");
    assert!(check(options(data, Some(FILE), false)).await.unwrap());
    let store = opened(data);
    assert_eq!((store.rows_in(range("0-8191")), store.rows_in(range("8192-16383"))), (0, 200 - moved));
    assert_eq!(store.open_logs(), []);
    store.sweep_once().await.unwrap();
    assert_eq!((stored_rows(&store), leftovers(&store)), (200 - moved, [0; 4]));
}

#[tokio::test]
async fn rows_that_this_node_owns_stay_whatever_is_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path();
    // A third node has a part, by another way; this one has the rest.
    let moved = moving(data, &["100-4095"]).await;
    assert!(moved > 20, "{moved}");
    let refused = check(options(data, Some(FILE), false)).await.unwrap_err();
    assert!(refused.to_string().contains("still owns slots"), "{refused}");
    let store = opened(data);
    assert_eq!((stored_rows(&store), store.open_logs().len()), (200, 1), "nothing was changed");
    closed(store);
    assert!(check(options(data, Some(FILE), true)).await.unwrap());
    let store = opened(data);
    store.sweep_once().await.unwrap();
    assert_eq!((stored_rows(&store), leftovers(&store)), (200 - moved, [0; 4]));
    for n in 0..200 {
        let key = format!("key:{n}");
        let slot = slot_of(key.as_bytes());
        if !range("100-4095").contains(slot) {
            assert!(store.rows_in(SlotRange::new(slot, slot + 1).unwrap()) > 0, "{key}");
        }
    }
}

#[tokio::test]
async fn a_drop_that_was_cut_short_is_gone_on_with() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path();
    let moved = moving(data, &["0-8191"]).await;
    // A crash when the database was changed, and the file was not.
    let store = opened(data);
    let (me, id) = (NodeId::new("n1").unwrap(), MigrationId::new("m").unwrap());
    assert_eq!(store.give_up_lost(&me, Some(&id), &[range("0-8191"), range("0-99")]).await.unwrap(), moved);
    closed(store);
    assert!(!check(options(data, None, false)).await.unwrap(), "the file is still there");
    assert!(check(options(data, Some(FILE), false)).await.unwrap());
    let store = opened(data);
    store.sweep_once().await.unwrap();
    assert_eq!((stored_rows(&store), leftovers(&store)), (200 - moved, [0; 4]));
    closed(store);
    // The other way about, the log would tell.
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path();
    moving(data, &["0-8191"]).await;
    fs::remove_file(data.join("migrations").join(FILE)).unwrap();
    assert!(!check(options(data, None, false)).await.unwrap(), "the record is missing");
    assert!(check(options(data, Some(FILE), false)).await.unwrap());
    assert_eq!(opened(data).open_logs(), []);
}

/// A log is the evidence of the record of its slots alone.
#[tokio::test]
async fn what_is_dropped_of_other_slots_leaves_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path();
    moving(data, &["0-8191"]).await;
    let other = "active/08192-16383.m.task";
    let [from, to] = [FILE, other].map(|file| data.join("migrations").join(file));
    fs::rename(from, to).unwrap();
    assert!(!check(options(data, Some(other), true)).await.unwrap(), "the record of the log is missing");
    assert_eq!(opened(data).open_logs().len(), 1);
}

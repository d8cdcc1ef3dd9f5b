//! What single flipped bits of the database file lead to: they do no harm, or the file is named.

use std::collections::BTreeMap;

use bytes::Bytes;
use proto::common::ids::MigrationId;
use proto::migration::entry::{Entry, Image};
use redb::{ReadableDatabase as _, ReadableTable as _};

use super::*;
use crate::common::{NodeId, SlotRange};
use crate::store::test_store::{open as open_store, set};
use crate::store::{Claim, NodeAddresses, Store, tables};

const PAGE: usize = 4096;
/// What redb keeps before the first page: magic number, flags, layout, and two commits.
const HEADER: usize = 320;
/// Flipped bits outside of that.
const POSITIONS: usize = 200;

type Believed = BTreeMap<String, String>;

/// Everything in the database that a node believes.
fn believed(store: &Store) -> Believed {
    let txn = store.inner.shared.database.begin_read().unwrap();
    let mut all = BTreeMap::new();
    macro_rules! tables {
        ($($table:ident)*) => {$(
            for entry in txn.open_table(tables::$table).unwrap().iter().unwrap() {
                let (key, value) = entry.unwrap();
                let name = format!(concat!(stringify!($table), " {:?}"), key.value());
                all.insert(name, format!("{:?}", value.value()));
            }
        )*};
    }
    tables! {
        ROWS EXPIRY SLOT_COUNTS GENERATIONS GARBAGE OWNERSHIP NODES SPLITS LEASES CHANGES MIGRATIONS TOMBSTONES STAGED FENCES NAMED_BY COUNTERS META
    }
    all
}

/// A store with something in each of its parts, the last of which is key `last`; and what it held before that one.
async fn filled(directory: &Path) -> (Store, Believed) {
    let (store, _) = open_store(directory, "n1", "0-8191");
    for n in 0..60 {
        set(&store, &format!("key:{n}"), &"value ".repeat(n)).await;
    }
    let id = MigrationId::new("m1").unwrap();
    let range = |text: &str| text.parse::<SlotRange>().unwrap();
    store.open_log(&id, range("0-99"), None).await.unwrap();
    store.begin_staging(&id, range("8192-16383"), Bytes::from_static(b"a record")).await.unwrap();
    let image = Image { value: Bytes::from_static(b"staged"), expires_unix_ms: Some(u64::MAX) };
    let entry = |key: &'static [u8], image| Entry { seq: 7, key: Bytes::from_static(key), image };
    // `foo` is in slot 12182, `a` in 15495.
    let entries = vec![entry(b"foo", Some(image)), entry(b"a", None)];
    store.stage(&id, entries, Bytes::from_static(b"another record")).await.unwrap();
    let before = believed(&store);
    set(&store, "last", "one").await;
    (store, before)
}

/// Bits of `file`: in every byte of the header, and spread over all pages that hold something.
fn bits(file: &[u8]) -> Vec<usize> {
    let used: Vec<usize> = (1..file.len() / PAGE)
        .filter(|&page| file[page * PAGE..][..PAGE].iter().any(|&byte| byte != 0))
        .collect();
    assert!(used.len() > 10, "{} pages", used.len());
    let spread = (0..POSITIONS).map(|n| {
        let page = used[n * used.len() / POSITIONS];
        // Pages fill from both of their ends.
        let at = n * 2503 % PAGE;
        (page * PAGE + at) * 8 + n % 8
    });
    // Byte 9 holds the flags.
    let header = (0..HEADER).map(|at| at * 8 + at % 8).chain(72..80);
    header.chain(spread).collect()
}

/// What became of a damaged file.
#[derive(Debug, PartialEq)]
enum Found {
    All,
    LastLost,
    Told,
}

/// Opens a directory of its own in which the database is `file`.
fn found(file: &[u8], how: &str, now: &Believed, before: &Believed) -> Found {
    let directory = directory();
    fs::write(directory.path().join(DATABASE_FILE), file).unwrap();
    let init = Init { node: NodeId::new("n1").unwrap(), slots: None, others: vec![] };
    match Store::open(directory.path(), &init, &StoreOptions::default()) {
        Ok((store, _)) => {
            let found = believed(&store);
            store.close();
            if &found == now {
                return Found::All;
            }
            assert_eq!(&found, before, "{how}: the node believes something else");
            Found::LastLost
        }
        Err(error @ StoreError::DamagedFile { .. }) => {
            let said = error.to_string();
            assert!(said.contains("node.redb is damaged: "), "{how}: {said}");
            assert!(!said.contains("panic"), "{how}: {said}");
            Found::Told
        }
        Err(error) => panic!("{how}: {error:?}"),
    }
}

/// In memory where that is possible: what is tried is not the disk.
fn directory() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

/// How often each became of one flipped bit of `file`.
fn flipped(file: &[u8], now: &Believed, before: &Believed) -> [usize; 3] {
    assert_eq!(found(file, "the control", now, before), Found::All);
    let mut counts = [0; 3];
    for bit in bits(file) {
        let mut damaged = file.to_vec();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let how = format!("bit {} of byte {} flipped", bit % 8, bit / 8);
        match found(&damaged, &how, now, before) {
            Found::All => counts[0] += 1,
            Found::LastLost => {
                counts[1] += 1;
            }
            Found::Told => counts[2] += 1,
        }
    }
    println!("{} harmless, {} without the last commit, {} told", counts[0], counts[1], counts[2]);
    counts
}

#[tokio::test]
async fn a_flipped_bit_of_a_database_that_was_closed_is_harmless_or_told() {
    let directory = directory();
    let (store, before) = filled(directory.path()).await;
    let now = believed(&store);
    assert_ne!(now, before);
    store.close();
    drop(store);
    let file = fs::read(directory.path().join(DATABASE_FILE)).unwrap();
    let [harmless, lost, told] = flipped(&file, &now, &before);
    assert_eq!(lost, 0, "what was closed is never rolled back");
    assert!(harmless > 0 && told > 50, "{harmless} harmless, {told} told");
}

/// What a process that is killed leaves.
fn crashed(store: Store, directory: &Path) -> Vec<u8> {
    let file = fs::read(directory.join(DATABASE_FILE)).unwrap();
    store.close();
    file
}

/// Where a crash could have torn the last commit of rows, redb takes the one before: nothing else is ever believed.
#[tokio::test]
async fn a_flipped_bit_after_a_crash_loses_the_last_writes_at_most() {
    let directory = directory();
    let (store, before) = filled(directory.path()).await;
    let now = believed(&store);
    let file = crashed(store, directory.path());
    let [harmless, lost, told] = flipped(&file, &now, &before);
    assert!(
        harmless > 0 && lost > 0 && told > 0,
        "{harmless} harmless, {lost} without the last, {told} told"
    );
}

/// Who owns what is not rolled back. One bit cannot be told: the one that says which of the two last commits counts.
#[tokio::test]
async fn a_flipped_bit_after_a_crash_takes_no_decision_back() {
    let directory = directory();
    let (store, _) = filled(directory.path()).await;
    let before = believed(&store);
    let (id, range) = (MigrationId::new("m1").unwrap(), "8192-16383".parse().unwrap());
    let claim = Claim { range, owner: NodeId::new("n1").unwrap(), epoch: 2 };
    let source = NodeId::new("n2").unwrap();
    store.take_over(&id, Some(&source), claim, Bytes::from_static(b"committed")).await.unwrap();
    let now = believed(&store);
    assert_ne!(now, before);
    let file = crashed(store, directory.path());
    let [harmless, lost, told] = flipped(&file, &now, &before);
    assert!(harmless > 0 && told > 50, "{harmless} harmless, {told} told");
    assert_eq!(lost, 1);
}

/// Nor is what cannot be looked at taken for nothing.
#[test]
fn a_database_is_not_made_beside_what_a_node_leaves() {
    let init = Init { node: NodeId::new("n1").unwrap(), slots: None, others: vec![] };
    let refused = |lay: fn(&Path)| {
        let directory = directory();
        lay(directory.path());
        let refused = Store::open(directory.path(), &init, &StoreOptions::default()).unwrap_err();
        assert!(!directory.path().join(DATABASE_FILE).exists(), "{refused}");
        refused.to_string()
    };
    let said = refused(|directory| fs::write(directory.join("incarnation"), "1\n").unwrap());
    assert!(said.contains("it is missing, while incarnation beside it is there"), "{said}");
    let said = refused(|directory| std::os::unix::fs::symlink("splits", directory.join("splits")).unwrap());
    assert!(said.contains("cannot look at ") && said.contains("splits"), "{said}");
}

/// Without the comparison of all pages it is found where it is read, and the file is named all the same.
#[tokio::test]
async fn a_damaged_row_of_the_nodes_is_told_at_the_start() {
    let directory = directory();
    let (store, identity) = open_store(directory.path(), "n1", "none");
    let written = br#"{"grpc":"a-name-that-nothing-else-has:1""#;
    let address = NodeAddresses { grpc: "a-name-that-nothing-else-has:1".into(), resp: String::new() };
    store.put_nodes([(identity.node.clone(), address)].into()).await.unwrap();
    store.close();
    drop(store);
    let path = directory.path().join(DATABASE_FILE);
    let mut file = fs::read(&path).unwrap();
    let at: Vec<usize> =
        (0..file.len() - written.len()).filter(|&at| file[at..].starts_with(written)).collect();
    assert!(!at.is_empty());
    for at in at {
        file[at] ^= 1;
    }
    fs::write(&path, file).unwrap();
    let init = Init { node: identity.node, slots: None, others: vec![] };
    let options = StoreOptions { verify: false, ..StoreOptions::default() };
    let error = Store::open(directory.path(), &init, &options).unwrap_err();
    assert!(matches!(error, StoreError::DamagedFile { .. }), "{error:?}");
}

//! The target: what is staged is invisible until the commit, and whole after a crash.

use std::sync::LazyLock;

use bytes::Bytes;
use proto::common::error::Error;
use proto::common::fence::Fence;
use proto::common::ids::{MigrationId, ShardId};
use proto::common::refusals::count_of;
use proto::common::slots::SlotRange;
use proto::common::v1::NodeIdentity;
use proto::migration::digest::SlotDigests;
use proto::migration::entry::{Entry, Image};
use proto::migration::journal::Journal;
use proto::migration::receiver::MigrationReceiver;
use proto::migration::target::{Offer, Staged, Takeover};
use proto::migration::v1::migration_service_client::MigrationServiceClient;
use proto::migration::v1::transfer_migration_data_request::{Frame, Header, Purpose};
use proto::migration::v1::transfer_migration_data_response::Frame as Answer;
use proto::migration::v1::{TransferMigrationDataRequest, TransferMigrationDataResponse};
use proto::migration::{MigrationSpec, MigrationTarget as _};

use super::support::*;
use crate::common::{NodeId, slot_of};
use crate::gate::{Access, Verdict};
use crate::migrate::{MigrateOptions, NodeTarget};
use crate::store::{Claim, Handover, MAX_EPOCH_LEAP, SHARDS_PER_PEER, StoreOptions, test_store};

fn image(value: &str) -> Option<Image> {
    Some(Image { value: bytes(value), expires_unix_ms: None })
}

fn entry(seq: u64, key: &str, image: Option<Image>) -> Entry {
    Entry { seq, key: bytes(key), image }
}

/// Entries of so many keys of the moving slots.
fn many(seq: u64, count: usize, value: &str) -> Vec<Entry> {
    (0..)
        .map(|n| format!("key:{n}"))
        .filter(|key| moving().contains(slot_of(key.as_bytes())))
        .take(count)
        .map(|key| entry(seq, &key, image(value)))
        .collect()
}

fn counted(entries: &[Entry]) -> SlotDigests {
    let mut digests = SlotDigests::new();
    for entry in entries {
        if let Some(image) = &entry.image {
            digests.add(&entry.key, image);
        }
    }
    digests
}

fn takeover(id: &MigrationId, slot_epoch: u64) -> Takeover<'_> {
    static SOURCE: LazyLock<NodeId> = LazyLock::new(|| NodeId::new("n1").unwrap());
    Takeover { id, slots: moving(), from: Some(&SOURCE), slot_epoch }
}

fn exported(node: &TestNode) -> Vec<u8> {
    node.node.store().export(node.node.id(), SlotRange::FULL, Handover::default(), Vec::new()).unwrap().0
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_staged_is_invisible_until_the_commit() {
    let dir = tempfile::tempdir().unwrap();
    let b = TestNode::open(&dir.path().join("b"), "n2", "0-100");
    let (id, own) = (id("m"), key_in("own", range("0-100"), true));
    b.set(&own, "x").await;
    // What an earlier owner of the slots left here, as if it had been adopted away.
    let key = key_in("key", moving(), true);
    test_store::set(b.node.store(), &key, "old").await;
    let before = (b.keys(SlotRange::FULL).await, exported(&b).len());

    b.target.begin(&id, moving(), bytes("1")).await.unwrap();
    let entries = many(5, 50, "staged");
    let staged = b.target.apply(&id, entries.clone(), bytes("2")).await.unwrap();
    let size = entries.iter().map(Entry::bytes).sum();
    assert_eq!(staged, Staged { keys: 50, bytes: size });
    assert_eq!((b.keys(SlotRange::FULL).await, exported(&b).len()), before);
    assert_eq!((b.get(&key).await, b.node.key_count()), (Some(bytes("old")), 1));
    assert_eq!(b.node.store().rows_in(moving()), 1);
    assert_eq!(b.target.digests(&id).await.unwrap(), counted(&entries).of(moving()));

    b.target.commit(&takeover(&id, 2), bytes("3")).await.unwrap();
    assert_eq!((b.keys(moving()).await.len(), b.node.key_count()), (50, 51));
    assert_eq!(b.get(&key).await, Some(bytes("staged")));
    assert_eq!(b.node.gate().verdict(slot_of(key.as_bytes()), Access::Write), Verdict::Pass);
    b.check();
    // Again, as after a lost reply; and the switch holds after a crash.
    b.target.commit(&takeover(&id, 2), bytes("4")).await.unwrap();
    let b = b.crash();
    assert_eq!(b.node.gate().verdict(slot_of(key.as_bytes()), Access::Write), Verdict::Pass);
    assert_eq!((b.keys(moving()).await.len(), b.node.key_count()), (50, 51));
    let stored = b.target.load().await.unwrap();
    assert_eq!(stored.len(), 1);
    assert_eq!((&stored[0].record, stored[0].staged), (&bytes("4"), Staged::default()));
    b.node.store().sweep_once().await.unwrap();
    assert_eq!(test_store::stored_rows(b.node.store()), 51);
    assert_eq!(test_store::leftovers(b.node.store()), [0; 4]);
    b.target.forget(&id).await.unwrap();
    b.target.forget(&id).await.unwrap();
    assert_eq!(b.target.load().await.unwrap(), []);
    b.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_counts_if_it_is_newer_than_what_is_held() {
    let dir = tempfile::tempdir().unwrap();
    let b = TestNode::open(&dir.path().join("b"), "n2", "none");
    let (id, key) = (id("m"), key_in("key", moving(), true));
    b.target.begin(&id, moving(), Bytes::new()).await.unwrap();
    let mut held: Option<Entry> = None;
    let steps = [
        (5, image("a")),
        (4, image("older")),
        (5, None),
        (7, None),
        (6, image("older than the tombstone")),
        (7, image("as old")),
        (8, image("b")),
        (9, None),
        (8, None),
        (9, image("older than the first tombstone")),
        (10, image("c")),
    ];
    for (seq, image) in steps {
        let entry = entry(seq, &key, image);
        if held.as_ref().is_none_or(|held| entry.seq > held.seq) {
            held = Some(entry.clone());
        }
        let staged = b.target.apply(&id, vec![entry], Bytes::new()).await.unwrap();
        let expected = counted(held.as_slice());
        assert_eq!(staged.keys, expected.keys(), "{seq}");
        assert_eq!(b.target.digests(&id).await.unwrap(), expected.of(moving()), "{seq}");
        b.check();
    }
    // Of one key in one batch, too.
    let batch = vec![entry(12, &key, image("d")), entry(11, &key, None), entry(12, &key, image("e"))];
    b.target.apply(&id, batch, Bytes::new()).await.unwrap();
    b.target.commit(&takeover(&id, 2), Bytes::new()).await.unwrap();
    assert_eq!(b.get(&key).await, Some(bytes("d")));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_discarded_or_begun_anew_is_garbage() {
    let dir = tempfile::tempdir().unwrap();
    let b = TestNode::open(&dir.path().join("b"), "n2", "none");
    let (id, key) = (id("m"), key_in("key", moving(), true));
    let store = b.node.store();
    b.target.begin(&id, moving(), Bytes::new()).await.unwrap();
    let mut entries = many(9, 40, "first copy");
    entries.push(entry(9, "{key:0}dead", None));
    let slots = SlotRange::FULL;
    b.target.apply(&id, entries, Bytes::new()).await.unwrap();
    b.target.begin(&id, moving(), bytes("second")).await.unwrap();
    assert_eq!(b.target.digests(&id).await.unwrap(), []);
    // A lower sequence: nothing of the first copy counts.
    let second = many(3, 20, "second copy");
    b.target.apply(&id, second.clone(), bytes("second")).await.unwrap();
    store.sweep_once().await.unwrap();
    assert_eq!(test_store::stored_rows(store), 20);
    assert_eq!(b.target.digests(&id).await.unwrap(), counted(&second).of(slots));

    b.target.discard(&id, bytes("discarded")).await.unwrap();
    let b = b.crash();
    let store = b.node.store();
    assert_eq!(b.target.load().await.unwrap()[0].record, bytes("discarded"));
    // It can neither be committed nor written to any more.
    for refused in [
        b.target.commit(&takeover(&id, 2), Bytes::new()).await.unwrap_err(),
        b.target.apply(&id, many(99, 1, "late"), Bytes::new()).await.unwrap_err(),
        b.target.digests(&id).await.unwrap_err(),
    ] {
        assert_eq!(refused.reason(), "INTERNAL");
    }
    assert_eq!(b.node.gate().verdict(slot_of(key.as_bytes()), Access::Read), Verdict::Unowned);
    b.check();
    store.sweep_once().await.unwrap();
    assert_eq!((test_store::stored_rows(store), test_store::leftovers(store)), (0, [0; 4]));
    b.target.discard(&id, bytes("discarded")).await.unwrap();
    b.target.forget(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_within_a_batch_leaves_a_part_that_is_in_step() {
    let dir = tempfile::tempdir().unwrap();
    let b = TestNode::open(&dir.path().join("b"), "n2", "none");
    let id = id("m");
    b.target.begin(&id, moving(), bytes("before")).await.unwrap();
    let entries = many(5, 6000, "value");
    // What a crash between two parts leaves: rows, with the record from before.
    b.target.apply(&id, entries[..2500].to_vec(), bytes("before")).await.unwrap();
    let part = b.copy();
    assert_eq!(part.target.load().await.unwrap()[0].staged.keys, 2500);
    assert_eq!(part.target.apply(&id, entries.clone(), bytes("after")).await.unwrap().keys, 6000);
    assert_eq!(part.target.digests(&id).await.unwrap(), counted(&entries).of(moving()));
    part.check();

    let applying = {
        let target =
            crate::migrate::NodeTarget::new(b.node.clone(), crate::migrate::MigrateOptions::default());
        let (id, entries) = (id.clone(), entries.clone());
        tokio::spawn(async move { target.apply(&id, entries, bytes("after")).await })
    };
    let mut copies = 0;
    while !applying.is_finished() {
        // Any moment: between transactions, or in the middle of one.
        let crashed = b.copy();
        crashed.check();
        if crashed.target.load().await.unwrap()[0].record == bytes("before") {
            crashed.target.apply(&id, entries.clone(), bytes("after")).await.unwrap();
        }
        assert_eq!(crashed.target.digests(&id).await.unwrap(), counted(&entries).of(moving()));
        crashed.check();
        copies += 1;
    }
    assert_eq!(applying.await.unwrap().unwrap().keys, 6000);
    assert!(copies > 0, "the test needs a copy that was made meanwhile");
    assert_eq!(b.target.digests(&id).await.unwrap(), counted(&entries).of(moving()));
    b.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_ends_between_two_parts_comes_again_and_counts_once() {
    let dir = tempfile::tempdir().unwrap();
    let b = TestNode::open(&dir.path().join("b"), "n2", "none");
    let id = id("m");
    b.target.begin(&id, moving(), bytes("before")).await.unwrap();
    let entries = many(5, 20_000, "value");
    let mut applying = Box::pin(b.target.apply(&id, entries.clone(), bytes("after")));
    loop {
        tokio::select! {
            biased;
            done = &mut applying => panic!("the test needs more than one part: {done:?}"),
            stored = b.target.load() => {
                if stored.unwrap()[0].staged.keys > 0 {
                    break;
                }
            }
        }
    }
    drop(applying);
    // What the writer has begun ends before this does.
    b.target.save(&id, bytes("before")).await.unwrap();
    let part = b.target.load().await.unwrap().remove(0);
    assert!(part.staged.keys > 0 && part.staged.keys < 20_000, "{part:?}");
    b.check();
    // Again, in another order, with what changed meanwhile.
    let mut again = many(6, 3000, "changed");
    again.extend(entries.iter().rev().cloned());
    let mut expected = entries;
    expected.splice(..3000, many(6, 3000, "changed"));
    let staged = b.target.apply(&id, again, bytes("after")).await.unwrap();
    assert_eq!(staged, Staged { keys: 20_000, bytes: expected.iter().map(Entry::bytes).sum() });
    assert_eq!(b.target.digests(&id).await.unwrap(), counted(&expected).of(moving()));
    assert_eq!(b.target.load().await.unwrap()[0].record, bytes("after"));
    b.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_is_forgotten_leaves_nothing_staged() {
    let dir = tempfile::tempdir().unwrap();
    let b = TestNode::open(&dir.path().join("b"), "n2", "none");
    // Begun and no more, and begun with what a first batch that failed leaves.
    for (name, entries) in [("empty", vec![]), ("part", many(5, 50, "value"))] {
        let id = id(name);
        b.target.begin(&id, moving(), bytes("record")).await.unwrap();
        if !entries.is_empty() {
            assert_eq!(b.target.apply(&id, entries, bytes("record")).await.unwrap().keys, 50);
        }
        b.target.forget(&id).await.unwrap();
        assert_eq!(b.target.load().await.unwrap(), [], "{name}");
        b.node.store().sweep_once().await.unwrap();
        let store = b.node.store();
        assert_eq!((test_store::stored_rows(store), test_store::leftovers(store)), (0, [0; 4]), "{name}");
    }
    b.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_node_cannot_take_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let b = TestNode::open(&dir.path().join("b"), "n2", "0-100");
    let id = id("m");
    let offer = async |spec: &MigrationSpec, fence: Option<Fence>, missing_bytes: Option<u64>| {
        b.target.admit(&Offer { id: &id, spec, fence, missing_bytes }).await
    };
    let reason = |result: Result<(), Error>| result.unwrap_err().reason().to_owned();
    let good = spec(moving());
    offer(&good, None, None).await.unwrap();
    offer(&good, Some(Fence::new(3, 1)), Some(1000)).await.unwrap();
    let stale = offer(&good, Some(Fence::new(2, 9)), None).await.unwrap_err();
    assert_eq!((stale.reason(), stale.get("current_epoch")), ("STALE_FENCE", Some("3")));
    offer(&good, Some(Fence::new(3, 1)), None).await.unwrap();
    assert_eq!(reason(offer(&spec(range("100-200")), None, None).await), "RANGE_BUSY");
    let format = MigrationSpec { value_format: "other.v1".into(), ..good.clone() };
    assert_eq!(reason(offer(&format, None, None).await), "UNSUPPORTED_VALUE_FORMAT");
    let full = offer(&good, None, Some(u64::MAX / 4)).await.unwrap_err();
    assert_eq!((full.reason(), full.is_retryable()), ("INSUFFICIENT_DISK", true));
    assert!(full.get("needed_bytes").is_some() && full.get("available_bytes").is_some());

    // A fence that was seen stays, and so does a claim.
    let owner = NodeId::new("n3").unwrap();
    b.node.store().adopt(vec![Claim { range: range("5000-5009"), owner, epoch: 7 }]).await.unwrap();
    let b = b.crash();
    assert_eq!(
        reason(
            b.target
                .admit(&Offer { id: &id, spec: &good, fence: Some(Fence::new(2, 9)), missing_bytes: None })
                .await
        ),
        "STALE_FENCE"
    );
    b.target.check_epoch(moving(), 8).await.unwrap();
    let stale = b.target.check_epoch(moving(), 7).await.unwrap_err();
    assert_eq!(
        (stale.reason(), stale.get("slot"), stale.get("slot_epoch")),
        ("STALE_SLOT_EPOCH", Some("5000"), Some("7"))
    );
    b.target.check_epoch(moving(), 7 + MAX_EPOCH_LEAP).await.unwrap();
    for (slots, leap) in
        [(moving(), 8 + MAX_EPOCH_LEAP), (range("6000-7000"), 1 + MAX_EPOCH_LEAP), (moving(), u64::MAX)]
    {
        let leap = b.target.check_epoch(slots, leap).await.unwrap_err();
        assert_eq!(
            (leap.reason(), leap.violations()[0].field.as_str()),
            ("INVALID_FIELD", "prepare.new_slot_epoch")
        );
        assert!(!leap.is_retryable());
    }
    // Nor are slots taken over from a node that they are known not to be of.
    let offer = async |spec: &MigrationSpec| {
        b.target.admit(&Offer { id: &id, spec, fence: None, missing_bytes: None }).await
    };
    let third = offer(&good).await.unwrap_err();
    assert_eq!((third.reason(), third.get("holder"), third.is_retryable()), ("RANGE_BUSY", Some("n3"), true));
    assert!(
        third.message().contains("slots 5000-5009 of 4096-12287 are known to be of node n3, not of n1"),
        "{third}"
    );
    // What was begun before has lost its sense.
    assert_eq!(b.target.lost_by_source(&good).as_deref(), Some(third.message()));
    for (what, offered) in [
        ("other slots", spec(range("4096-4999"))),
        ("another source", MigrationSpec { source_node: NodeId::new("n3").unwrap(), ..good.clone() }),
    ] {
        offer(&offered).await.unwrap();
        assert_eq!(b.target.lost_by_source(&offered), None, "{what}");
    }

    b.target.begin(&id, moving(), Bytes::new()).await.unwrap();
    b.target.apply(&id, many(5, 3, "x"), Bytes::new()).await.unwrap();
    let refused = b.target.commit(&takeover(&id, 7), Bytes::new()).await.unwrap_err();
    assert_eq!((refused.reason(), refused.get("slot")), ("STALE_SLOT_EPOCH", Some("5000")));
    // Nor at a higher epoch, where they became another node's after it was prepared.
    let third = b.target.commit(&takeover(&id, 8), Bytes::new()).await.unwrap_err();
    assert_eq!((third.reason(), third.get("slot")), ("STALE_SLOT_EPOCH", Some("5000")));
    assert!(third.message().contains("of node n3 at epoch 7, not of n1"), "{third}");
    assert_eq!((b.node.own_ranges(), b.node.key_count()), (vec![range("0-100")], 0));
    // An operator may have known better than this node.
    b.target.commit(&Takeover { from: None, ..takeover(&id, 8) }, Bytes::new()).await.unwrap();
    assert_eq!(b.node.key_count(), 3);
}

const MIB: u64 = 1 << 20;

/// Node n2, for which about 400 MiB of the disk are left, whatever others write to it meanwhile.
fn with_room(dir: &std::path::Path) -> TestNode {
    let disk = rustix::fs::statvfs(dir).unwrap();
    let reserve_bytes = disk.f_bavail * disk.f_frsize - 400 * MIB;
    let options = StoreOptions { reserve_bytes, ..StoreOptions::default() };
    TestNode::open_as(&dir.join("b"), "n2", Some(vec![range("0-100")]), &options)
}

/// Migrations of one node have a share of the disk, by what they announce and by what they stage.
#[tokio::test(flavor = "multi_thread")]
async fn the_migrations_of_one_node_leave_room_to_those_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let b = with_room(dir.path());
    let from = |node: &str, slots: &str| MigrationSpec {
        source_node: NodeId::new(node).unwrap(),
        ..spec(range(slots))
    };
    let offer = async |id: &MigrationId, spec: &MigrationSpec, missing: u64| {
        let offer = Offer { id, spec, fence: None, missing_bytes: Some(missing) };
        b.target.admit(&offer).await
    };
    let (first, second, other) = (id("first"), id("second"), id("other"));
    let (one, two, three) = (from("n1", "4096-8191"), from("n1", "8192-12287"), from("n3", "12288-16383"));
    // Rows take twice their bytes: 240 of 400 MiB, then 120 more, which is beyond 75 %.
    offer(&first, &one, 120 * MIB).await.unwrap();
    b.target.begin(&first, one.slots, bytes("1")).await.unwrap();
    let refused = offer(&second, &two, 60 * MIB).await.unwrap_err();
    assert!(refused.is_retryable(), "{refused:?}");
    assert_eq!((refused.reason(), refused.get("peer")), ("INSUFFICIENT_DISK", Some("n1")));
    assert_eq!(refused.get("needed_bytes"), Some((120 * MIB).to_string().as_str()));
    // One that comes back with more than that is refused, and counts as before: what it has begun goes on within its share.
    let more = offer(&first, &one, 160 * MIB).await.unwrap_err();
    assert_eq!((more.reason(), more.get("peer")), ("INSUFFICIENT_DISK", Some("n1")));
    assert_eq!(
        offer(&second, &two, 60 * MIB).await.unwrap_err().get("available_bytes"),
        refused.get("available_bytes")
    );
    // It may come again, and another node may come with as much.
    offer(&first, &one, 120 * MIB).await.unwrap();
    offer(&other, &three, 60 * MIB).await.unwrap();
    b.target.discard(&first, bytes("ended")).await.unwrap();
    offer(&second, &two, 60 * MIB).await.unwrap();

    // One that announces nothing has no more of it. A hundredth of 400 MiB is two of rows.
    let strict = MigrateOptions { percent_per_peer: 1, ..MigrateOptions::default() };
    let target = NodeTarget::new(b.node.clone(), strict);
    let offered = Offer { id: &second, spec: &two, fence: None, missing_bytes: None };
    target.admit(&offered).await.unwrap();
    target.begin(&second, two.slots, bytes("1")).await.unwrap();
    let value = "v".repeat(1 << 10);
    let all = many(1, 4096, &value);
    let (mut staged, mut refused) = (Staged::default(), None);
    for entries in all.chunks(256) {
        match target.apply(&second, entries.to_vec(), bytes("2")).await {
            Ok(now) => staged = now,
            Err(error) => {
                refused = Some(error);
                break;
            }
        }
    }
    let refused = refused.expect("its share has an end");
    assert_eq!((refused.reason(), refused.get("peer")), ("INSUFFICIENT_DISK", Some("n1")));
    assert!((MIB..4 * MIB).contains(&staged.bytes), "{staged:?}");
    // Also after a restart, and also of tombstones, which are no rows.
    drop(target);
    let target = NodeTarget::new(b.node.clone(), strict);
    target.load().await.unwrap();
    target.admit(&offered).await.unwrap();
    assert_eq!(
        target.apply(&second, all[..512].to_vec(), bytes("3")).await.unwrap_err().reason(),
        "INSUFFICIENT_DISK"
    );
    target.begin(&second, two.slots, bytes("4")).await.unwrap();
    let dead = |n: u64| Entry { seq: n + 1, key: bytes(&format!("{{dead}}{n:0>8000}")), image: None };
    let mut tombstones = 0;
    while target.apply(&second, (0..64).map(|n| dead(tombstones + n)).collect(), bytes("5")).await.is_ok() {
        tombstones += 64;
        assert!(tombstones * 8000 < 16 * MIB, "tombstones have no end");
    }
    assert!(tombstones > 0);

    // One key that comes and goes is one row or one tombstone.
    target.begin(&second, two.slots, bytes("6")).await.unwrap();
    let change = |n: u64| Entry { seq: n + 1, image: if n % 3 == 2 { image("v") } else { None }, ..dead(0) };
    for round in 0..16 {
        let changes = (0..64).map(|n| change(64 * round + n)).collect();
        target.apply(&second, changes, bytes("7")).await.unwrap();
    }
    // A row takes more than its key and value.
    target.begin(&second, two.slots, bytes("8")).await.unwrap();
    let mut staged = Staged::default();
    for entries in many(1, 100_000, "").chunks(4096) {
        match target.apply(&second, entries.to_vec(), bytes("9")).await {
            Ok(now) => staged = now,
            Err(error) => {
                assert_eq!(error.reason(), "INSUFFICIENT_DISK");
                break;
            }
        }
    }
    assert!((10_000..60_000).contains(&staged.keys), "{staged:?}");
}

/// Whoever calls may name any shard, and each that is named is remembered for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_names_no_more_shards_than_its_share_and_none_where_it_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b");
    let b = TestNode::open_as(&path, "n2", Some(vec![range("0-100")]), &StoreOptions::default());
    let offer = async |b: &TestNode, node: &str, shard: String, slots: &str, term: u64| {
        let spec = MigrationSpec {
            source_node: NodeId::new(node).unwrap(),
            target_shard: ShardId::new(shard).unwrap(),
            ..spec(range(slots))
        };
        let fence = Some(Fence { epoch: 1, term });
        let offer = Offer { id: &id("m1"), spec: &spec, fence, missing_bytes: None };
        b.target.admit(&offer).await
    };
    let named = async |b: &TestNode, shard: &str| {
        let shard = ShardId::new(shard).unwrap();
        b.node.store().fence(&shard).await.unwrap() != Fence::default()
    };
    let busy = offer(&b, "n9", "busy".to_owned(), "50-200", 1).await.unwrap_err();
    assert_eq!(busy.reason(), "RANGE_BUSY");
    assert!(!named(&b, "busy").await, "a call that is refused leaves nothing");

    let offers = (0..SHARDS_PER_PEER).map(|n| offer(&b, "n9", format!("s-{n}"), "5000", 1));
    for offered in futures::future::join_all(offers).await {
        offered.unwrap();
    }
    let b = b.crash();
    let refused = offer(&b, "n9", "more".to_owned(), "5000", 1).await.unwrap_err();
    assert_eq!((refused.reason(), refused.get("peer")), ("TOO_MANY_SHARDS", Some("n9")));
    assert_eq!(refused.get("limit"), Some(SHARDS_PER_PEER.to_string().as_str()));
    assert!(!refused.is_retryable());
    assert!(!named(&b, "more").await);
    // What is known is raised as before, and others name theirs.
    offer(&b, "n9", "s-7".to_owned(), "5000", 2).await.unwrap();
    assert_eq!(offer(&b, "n9", "s-7".to_owned(), "5000", 1).await.unwrap_err().reason(), "STALE_FENCE");
    offer(&b, "n3", "more".to_owned(), "5000", 1).await.unwrap();
}

/// A receiver with `target`, of node n2.
async fn receiver(target: NodeTarget, journal: &std::path::Path) -> MigrationReceiver<NodeTarget> {
    let (journal, _) = Journal::open(journal, 10).unwrap();
    MigrationReceiver::builder(identity("n2"), target, journal).start().await.unwrap()
}

fn identity(id: &str) -> NodeIdentity {
    NodeIdentity { node_id: id.to_owned(), store_id: vec![2; 16].into(), ..NodeIdentity::default() }
}

type Stream = (
    tokio::sync::mpsc::Sender<TransferMigrationDataRequest>,
    tonic::Streaming<TransferMigrationDataResponse>,
);

/// The stream of a migration from `node`, which says that so many bytes come.
async fn open(
    receiver: &MigrationReceiver<NodeTarget>,
    id: &str,
    node: &str,
    slots: &str,
    bytes: u64,
) -> Result<Stream, Error> {
    let spec = MigrationSpec { source_node: NodeId::new(node).unwrap(), ..spec(range(slots)) };
    let header = Header {
        migration_id: id.to_owned(),
        spec: Some(spec.into()),
        purpose: Purpose::Transfer.into(),
        source: Some(identity(node)),
        attempt: 1,
        session: vec![7; 16].into(),
        copy: 1,
        estimated_bytes: Some(bytes),
        ..Header::default()
    };
    let (frames, requests) = tokio::sync::mpsc::channel(4);
    let first = TransferMigrationDataRequest { frame: Some(Frame::Header(header)) };
    frames.send(first).await.unwrap();
    let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
    let mut client = MigrationServiceClient::new(receiver.clone().into_service());
    let mut answers = client.transfer_migration_data(requests).await?.into_inner();
    let answer = answers.message().await?.expect("an answer").frame;
    assert!(matches!(answer, Some(Answer::Accepted(_))), "{answer:?}");
    Ok((frames, answers))
}

/// As a peer meets it: refused with that reason, counted, and in nobody's way.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_beyond_its_share_of_the_disk_is_refused_and_counted_and_others_are_served() {
    const REASON: &str = "INSUFFICIENT_DISK";
    let dir = tempfile::tempdir().unwrap();
    let b = with_room(dir.path());
    let target = NodeTarget::new(b.node.clone(), MigrateOptions::default());
    let receiver = receiver(target, &dir.path().join("journal")).await;
    let open =
        async |id: &str, node: &str, slots: &str, bytes: u64| open(&receiver, id, node, slots, bytes).await;
    let _first = open("first", "n1", "4096-8191", 120 * MIB).await.unwrap();
    let before = count_of(REASON);
    let refused = open("second", "n1", "8192-12287", 60 * MIB).await.unwrap_err();
    assert_eq!((refused.reason(), refused.get("peer")), (REASON, Some("n1")));
    assert!(refused.is_retryable());
    assert_eq!(count_of(REASON), before + 1);
    let _other = open("other", "n3", "12288-16383", 60 * MIB).await.unwrap();
    assert_eq!(count_of(REASON), before + 1);
    receiver.shutdown().await;
}

/// A node that stays away after a restart of the target keeps the share that it has.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_restart_leaves_counts_for_its_source_before_that_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let b = with_room(dir.path());
    let journal = dir.path().join("journal");
    let first = receiver(NodeTarget::new(b.node.clone(), MigrateOptions::default()), &journal).await;
    drop(open(&first, "first", "n1", "4096-12287", MIB).await.unwrap());
    first.shutdown().await;
    let record = b.target.load().await.unwrap()[0].record.clone();
    let value = "v".repeat(1 << 10);
    b.target.apply(&id("first"), many(1, 1200, &value), record).await.unwrap();

    // A hundredth of 400 MiB is two of rows: one is there, and one more is too much.
    let strict = MigrateOptions { percent_per_peer: 1, ..MigrateOptions::default() };
    let again = receiver(NodeTarget::new(b.node.clone(), strict), &journal).await;
    let refused = open(&again, "second", "n1", "12288-16383", MIB).await.unwrap_err();
    assert_eq!((refused.reason(), refused.get("peer")), ("INSUFFICIENT_DISK", Some("n1")));
    drop(open(&again, "third", "n3", "12288-16383", MIB).await.unwrap());
    again.shutdown().await;
}

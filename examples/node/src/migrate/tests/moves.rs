//! Whole migrations: what clients wrote is what arrives.

use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::prelude::*;
use proto::common::slots::SlotRange;
use proto::migration::entry::Entry;
use proto::migration::hold::HoldMode;
use proto::migration::source::{Handover, PageLimit};
use proto::migration::{MigrationSource as _, MigrationTarget as _};

use super::support::*;
use crate::common::{NodeId, slot_of};
use crate::gate::{Access, Verdict};
use crate::store::{Claim, MAX_EPOCH_LEAP, SetExpiry, WriteOp, test_store};

#[tokio::test(flavor = "multi_thread")]
async fn slots_move_there_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let a = TestNode::open(&dir.path().join("a"), "n1", "0-16383");
    let b = TestNode::open(&dir.path().join("b"), "n2", "none");
    for n in 0..300 {
        a.set(&format!("key:{n}"), "before").await;
    }
    let edited = key_in("key", moving(), true);
    let before = a.rows(moving()).await;
    let others = a.rows(SlotRange::FULL).await.len() - before.len();
    assert!(before.len() > 50 && others > 50, "the test needs keys of both kinds");

    for (round, epoch) in (0..3).zip([2, 4, 6]) {
        let key = key_in("round", moving(), true);
        let mut there = Mover::begin(&format!("there-{round}"), moving(), &a, &b).await;
        there.catch_up(&a, &b).await;
        a.write(WriteOp::Add { key: bytes(&key), delta: 1 }).await.unwrap();
        a.write(WriteOp::Add { key: bytes(&key), delta: 1 }).await.unwrap();
        there.hand_over(&a, &b, epoch).await;

        assert_eq!(a.node.gate().verdict(slot_of(key.as_bytes()), Access::Read), Verdict::Moved);
        assert_eq!(b.node.gate().verdict(slot_of(key.as_bytes()), Access::Write), Verdict::Pass);
        assert_eq!(a.node.addresses(b.node.id()).unwrap().grpc, "127.0.0.1:7102");
        assert_eq!(b.get(&key).await, Some(bytes(&(4 * round + 2).to_string())));
        assert_eq!((a.rows(moving()).await.len(), a.node.key_count()), (0, others as u64));
        // Both ends as they would be after a power cut.
        for (node, keys) in [(&a, 0), (&b, before.len() + 1)] {
            let crashed = node.copy();
            let owned = crashed.node.own_ranges().iter().any(|own| own.overlaps(moving()));
            assert_eq!((owned, crashed.keys(moving()).await.len()), (keys > 0, keys));
            crashed.check();
        }
        let there_now = b.rows(moving()).await;
        assert_eq!(there_now.len(), before.len() + 1);
        assert!(before.iter().all(|(key, row)| there_now.get(key) == Some(row)));
        a.check();
        b.check();

        // Back, with what was given up not deleted yet: it must not be mixed up with what comes.
        b.delete(&edited).await;
        b.set(&edited, "changed at b").await;
        b.write(WriteOp::Add { key: bytes(&key), delta: 2 }).await.unwrap();
        let mut back = Mover::begin(&format!("back-{round}"), moving(), &b, &a).await;
        back.catch_up(&b, &a).await;
        if round == 1 {
            a.node.store().sweep_once().await.unwrap();
        }
        back.hand_over(&b, &a, epoch + 1).await;
        assert_eq!(a.rows(moving()).await, {
            let mut expected = there_now.clone();
            expected.insert(bytes(&key), (bytes(&(4 * round + 4).to_string()), None));
            expected.insert(bytes(&edited), (bytes("changed at b"), None));
            expected
        });
        a.set(&edited, "before").await;
    }
    for node in [&a, &b] {
        node.node.store().sweep_once().await.unwrap();
        node.check();
        assert_eq!(test_store::leftovers(node.node.store()), [0; 4]);
        assert_eq!(test_store::stored_rows(node.node.store()), node.node.key_count());
    }
    assert_eq!(b.node.key_count(), 0);
}

#[derive(Debug, Clone)]
enum Step {
    Set(u8, u8),
    SetExpiring(u8, u8),
    Delete(u8),
    Add(u8),
    SetMany(u8, u8),
    Rows(usize),
    Changes(usize),
    /// Applies one of the pages that were read, by its place; it may come again.
    Apply(usize),
    Release,
    Digests,
    CrashSource,
    CrashTarget,
    Sweep,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let key = 0_u8..24;
    let step = prop_oneof![
        6 => (key.clone(), any::<u8>()).prop_map(|(key, value)| Step::Set(key, value)),
        2 => (key.clone(), any::<u8>()).prop_map(|(key, value)| Step::SetExpiring(key, value)),
        4 => key.clone().prop_map(Step::Delete),
        3 => key.clone().prop_map(Step::Add),
        2 => (key.clone(), key).prop_map(|(from, to)| Step::SetMany(from, to)),
        4 => (1_usize..6).prop_map(Step::Rows),
        6 => (1_usize..6).prop_map(Step::Changes),
        8 => (0_usize..64).prop_map(Step::Apply),
        2 => Just(Step::Release),
        1 => Just(Step::Digests),
        1 => Just(Step::CrashSource),
        1 => Just(Step::CrashTarget),
        1 => Just(Step::Sweep),
    ];
    prop::collection::vec(step, 1..70)
}

/// Keys of many slots, and some of one.
fn key(n: u8) -> String {
    if n.is_multiple_of(3) { format!("{{tag}}:{n}") } else { format!("key:{n}") }
}

async fn run(steps: Vec<Step>) {
    let dir = tempfile::tempdir().unwrap();
    let mut a = TestNode::open(&dir.path().join("a"), "n1", "0-16383");
    let mut b = TestNode::open(&dir.path().join("b"), "n2", "none");
    for n in 0..12 {
        a.set(&key(n), "7").await;
    }
    let mut mover = Mover::begin("m", moving(), &a, &b).await;
    let mut pages: Vec<Vec<Entry>> = Vec::new();
    let mut unapplied: Vec<Vec<Entry>> = Vec::new();
    for step in steps {
        match step {
            Step::Set(n, value) => a.set(&key(n), &value.to_string()).await,
            Step::SetExpiring(n, value) => {
                a.write(set(&key(n), &value.to_string(), in_ms(u64::from(value) * 2))).await.unwrap();
            }
            Step::Delete(n) => a.delete(&key(n)).await,
            Step::Add(n) => {
                a.write(WriteOp::Add { key: bytes(&key(n)), delta: 1 }).await.unwrap();
            }
            Step::SetMany(from, to) => {
                let pairs =
                    (from..to).map(|n| (bytes(&format!("{{tag}}:{n}")), bytes("many"))).collect::<Vec<_>>();
                if !pairs.is_empty() {
                    a.write(WriteOp::SetMany { pairs }).await.unwrap();
                }
            }
            Step::Rows(entries) => {
                let limit = PageLimit { bytes: 40, entries };
                let page = mover.read_rows(&a, limit).await;
                unapplied.push(page);
            }
            Step::Changes(entries) => {
                let limit = PageLimit { bytes: 40, entries };
                let page = mover.read_changes(&a, limit).await;
                unapplied.push(page);
            }
            Step::Apply(place) => {
                let all = unapplied.len() + pages.len();
                if all > 0 {
                    let place = place % all;
                    let page = if place < unapplied.len() {
                        let page = unapplied.swap_remove(place);
                        pages.push(page.clone());
                        page
                    } else {
                        pages[place - unapplied.len()].clone()
                    };
                    b.target.apply(&mover.id, page, bytes("applied")).await.unwrap();
                }
            }
            // As the target's watermark, which is behind nothing that was not applied.
            Step::Release if unapplied.is_empty() => {
                a.source.release_changes(&mover.id, mover.changes.watermark).await.unwrap();
            }
            Step::Release => {}
            Step::Digests => {
                a.source.digests(&mover.id).await.unwrap();
            }
            Step::CrashSource => {
                a = a.crash();
                let from = a.source.open_log(&mover.id, mover.slots, Some(mover.changes.watermark)).await;
                assert_eq!(from.unwrap(), mover.changes.watermark);
                mover.changes = proto::migration::source::ChangeCursor::at(mover.changes.watermark);
            }
            Step::CrashTarget => b = b.crash(),
            Step::Sweep => {
                a.node.store().sweep_once().await.unwrap();
                b.node.store().sweep_once().await.unwrap();
            }
        }
        assert_eq!((b.node.key_count(), b.keys(SlotRange::FULL).await.len()), (0, 0));
    }
    for page in unapplied {
        b.target.apply(&mover.id, page, bytes("applied")).await.unwrap();
    }
    let outside: BTreeMap<Bytes, _> = a
        .rows(SlotRange::FULL)
        .await
        .into_iter()
        .filter(|(key, _)| !moving().contains(slot_of(key)))
        .collect();
    a.check();
    b.check();
    mover.hand_over(&a, &b, 2).await;
    a.check();
    b.check();
    // Time went on: compare what neither has removed meanwhile.
    let moved = b.rows(SlotRange::FULL).await;
    assert!(moved.keys().all(|key| moving().contains(slot_of(key))));
    for (key, row) in a.rows(SlotRange::FULL).await {
        assert_eq!(outside.get(&key), Some(&row));
    }
    assert!(a.keys(moving()).await.is_empty());
}

/// The target has the slots, whatever it says; but nobody has them for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_tells_of_the_highest_epoch_gets_one_that_can_be_surpassed() {
    let dir = tempfile::tempdir().unwrap();
    let a = TestNode::open(&dir.path().join("a"), "n1", "0-16383");
    let (id, slots, address) = (id("m"), moving(), "127.0.0.1:7102".to_owned());
    a.source.open_log(&id, slots, None).await.unwrap();
    let owner = NodeId::new("n2").unwrap();
    let handover = Handover { id, slots, owner: owner.clone(), address, slot_epoch: u64::MAX };
    a.source.give_up(&handover).await.unwrap();
    let ownership = a.node.gate().ownership();
    let claim = ownership.of(slots.start()).unwrap();
    assert_eq!((claim.range, &claim.owner, claim.epoch), (slots, &owner, 1 + MAX_EPOCH_LEAP));
}

/// A cancel under way has ended the log, an operator decided at the target, and this node learns of the owner before its driver does.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_slots_that_are_known_to_be_given_away_are_given_up_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let a = TestNode::open(&dir.path().join("a"), "n1", "0-16383");
    let (moves, stays) = (key_in("key", moving(), true), key_in("key", moving(), false));
    for key in [&moves, &stays] {
        a.set(key, "value").await;
    }
    a.source.open_log(&id("m"), moving(), None).await.unwrap();
    a.source.keep(&id("m"), moving(), None).await.unwrap();
    let owner = NodeId::new("n2").unwrap();
    let claim = Claim { range: moving(), owner: owner.clone(), epoch: 2 };
    a.node.change_ownership(move |store| async move { store.adopt(vec![claim]).await }).await.unwrap();
    assert_eq!(a.node.gate().verdict(slot_of(moves.as_bytes()), Access::Read), Verdict::Moved);
    assert_eq!(a.rows(moving()).await.len(), 1, "they are there");
    let (id, slots, address) = (id("m"), moving(), "127.0.0.1:7102".to_owned());
    let handover = Handover { id, slots, owner, address, slot_epoch: 2 };
    for again in [false, true] {
        a.source.give_up(&handover).await.unwrap();
        assert_eq!((a.rows(moving()).await.len(), a.node.key_count()), (0, 1), "{again}");
        a.check();
    }
    a.node.store().sweep_once().await.unwrap();
    assert_eq!(test_store::stored_rows(a.node.store()), 1);
    assert_eq!(a.get(&stays).await, Some(bytes("value")));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn what_arrives_is_what_was_written(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(run(steps));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_redirected_is_not_given_up_before_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let a = TestNode::open(&dir.path().join("a"), "n1", "0-16383");
    let b = NodeId::new("n2").unwrap();
    let key = key_in("key", moving(), true);
    a.set(&key, "value").await;
    a.source.open_log(&id("m1"), moving(), None).await.unwrap();
    let hold = a.source.hold(moving(), HoldMode::All).await.unwrap();
    let handover = Handover {
        id: id("m1"),
        slots: moving(),
        owner: b.clone(),
        address: "127.0.0.1:7102".into(),
        slot_epoch: 2,
    };
    assert!(a.source.redirect(&handover));
    drop(hold);
    let verdict = |node: &TestNode| node.node.gate().verdict(slot_of(key.as_bytes()), Access::Write);
    assert_eq!((verdict(&a), a.node.key_count()), (Verdict::Moved, 0));
    assert_eq!(a.node.addresses(&b).unwrap().grpc, "127.0.0.1:7102");
    // Another migration ends meanwhile, and brings what is durable.
    a.source.keep(&id("m2"), range("0-9"), None).await.unwrap();
    assert_eq!(verdict(&a), Verdict::Moved);
    // The driver's record says that the target is to be asked; until then it holds them.
    let crashed = a.copy();
    assert_eq!((verdict(&crashed), crashed.rows(moving()).await.len()), (Verdict::Pass, 1));
    crashed.source.give_up(&handover).await.unwrap();
    assert_eq!((verdict(&crashed), crashed.rows(moving()).await.len()), (Verdict::Moved, 0));
    a.source.give_up(&handover).await.unwrap();
    assert_eq!((verdict(&a), a.rows(moving()).await.len()), (Verdict::Moved, 0));
    a.check();
}

/// Writers that never pause, on few keys and many.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_under_load_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let a = TestNode::open(&dir.path().join("a"), "n1", "0-16383");
    let b = TestNode::open(&dir.path().join("b"), "n2", "none");
    for n in 0..2000 {
        a.set(&format!("cold:{n}"), "x").await;
    }
    let counters: Vec<String> = (0..8).map(|n| key_in(&format!("hot{n}"), moving(), true)).collect();
    let writers: Vec<_> = counters
        .iter()
        .enumerate()
        .map(|(n, key)| {
            let (node, key) = (a.node.clone(), key.clone());
            tokio::spawn(async move {
                let mut acknowledged = 0;
                loop {
                    let key = if n % 2 == 0 { key.clone() } else { format!("{{{key}}}:{acknowledged}") };
                    let mut permits = node.gate().permits(Access::Write);
                    match permits.enter(slot_of(key.as_bytes())) {
                        Verdict::Pass => {
                            let op = WriteOp::Add { key: bytes(&key), delta: 1 };
                            node.store().write(vec![op], permits).await.unwrap();
                            acknowledged += 1;
                        }
                        Verdict::Held => {
                            node.gate().wait(slot_of(key.as_bytes()), Access::Write).await.unwrap();
                        }
                        Verdict::Moved | Verdict::Unowned | Verdict::Quarantined => return acknowledged,
                    }
                }
            })
        })
        .collect();
    let mut mover = Mover::begin("m", moving(), &a, &b).await;
    let small = PageLimit { bytes: 1 << 20, entries: 16 };
    for _ in 0..60 {
        for read in [mover.read_rows(&a, small).await, mover.read_changes(&a, small).await] {
            b.target.apply(&mover.id, read, bytes("")).await.unwrap();
        }
        a.source.release_changes(&mover.id, mover.changes.watermark).await.unwrap();
    }
    while !mover.copied {
        let rows = mover.read_rows(&a, PAGE).await;
        b.target.apply(&mover.id, rows, bytes("")).await.unwrap();
    }
    mover.hand_over(&a, &b, 2).await;
    for (n, writer) in writers.into_iter().enumerate() {
        let acknowledged: u64 = writer.await.unwrap();
        assert!(acknowledged > 0);
        let key = &counters[n];
        if n % 2 == 0 {
            assert_eq!(b.get(key).await, Some(bytes(&acknowledged.to_string())));
        } else {
            for m in 0..acknowledged {
                assert_eq!(b.get(&format!("{{{key}}}:{m}")).await, Some(bytes("1")), "{m} of {acknowledged}");
            }
        }
    }
    a.check();
    b.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_keys_are_removed_by_the_owner_alone() {
    let dir = tempfile::tempdir().unwrap();
    let a = TestNode::open(&dir.path().join("a"), "n1", "0-16383");
    let b = TestNode::open(&dir.path().join("b"), "n2", "none");
    let keys: Vec<String> = (0..3).map(|n| key_in(&format!("e{n}"), moving(), true)).collect();
    for key in &keys {
        a.write(set(key, "x", in_ms(20))).await.unwrap();
    }
    let mut mover = Mover::begin("m", moving(), &a, &b).await;
    mover.catch_up(&a, &b).await;
    tokio::time::sleep(std::time::Duration::from_millis(30)).await;
    b.node.store().sweep_once().await.unwrap();
    assert_eq!(b.target.digests(&mover.id).await.unwrap().iter().map(|slot| slot.keys).sum::<u64>(), 3);

    // Held: not removed there either. A key that is written again lives.
    let hold = a.source.hold(moving(), proto::migration::hold::HoldMode::Writes).await.unwrap();
    a.node.store().sweep_once().await.unwrap();
    assert_eq!(a.node.store().rows_in(moving()), 3);
    drop(hold);
    a.write(set(&keys[0], "again", SetExpiry::Never)).await.unwrap();
    a.node.store().sweep_once().await.unwrap();
    assert_eq!(a.node.store().rows_in(moving()), 1);
    mover.catch_up(&a, &b).await;
    assert_eq!(b.target.digests(&mover.id).await.unwrap().iter().map(|slot| slot.keys).sum::<u64>(), 1);
    assert_eq!(a.source.digests(&mover.id).await.unwrap(), b.target.digests(&mover.id).await.unwrap());

    // One that expires after the last sequence arrives, invisible, and is removed by its new owner.
    a.write(set(&keys[1], "x", in_ms(20))).await.unwrap();
    mover.catch_up(&a, &b).await;
    tokio::time::sleep(std::time::Duration::from_millis(30)).await;
    mover.hand_over(&a, &b, 2).await;
    assert_eq!((b.node.key_count(), b.get(&keys[1]).await), (2, None));
    b.node.store().sweep_once().await.unwrap();
    assert_eq!((b.node.key_count(), b.get(&keys[0]).await), (1, Some(bytes("again"))));
    a.check();
    b.check();
}

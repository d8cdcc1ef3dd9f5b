//! Records of a target that a bad disk, or a hand, has changed in its store: none is believed, the slots that are in doubt go to nobody, and
//! all else goes on.

#![cfg(all(feature = "client", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::sync::Arc;

use bytes::Bytes;
use futures::future::join_all;
use proto_common::error::Error;
use proto_common::guard::RangeGuard;
use proto_common::ids::MigrationId;
use proto_common::slots::SlotRange;
use proto_migration::journal::Journal;
use proto_migration::receiver::{MigrationReceiver, read_records};
use proto_migration::v1::MigrationState;
use proto_migration::v1::migration_service_client::MigrationServiceClient;
use proto_migration::v1::transfer_migration_data_request::Header;
use proto_migration::v1::transfer_migration_data_response::Frame as Answer;
use proto_migration::{MigrationTarget as _, Reason};
use support::frames::{COMMIT, Node, eventually, header, identity, row};
use support::memory_target::MemoryTarget;

/// The slots of `b` and `c` among them.
fn damaged_slots() -> SlotRange {
    SlotRange::new(0, 8192).unwrap()
}

/// Those of a migration that nothing is wrong with.
fn other_slots() -> SlotRange {
    SlotRange::new(8192, 16384).unwrap()
}

fn id(text: &str) -> MigrationId {
    MigrationId::new(text).unwrap()
}

fn of(id: &str, slots: SlotRange, attempt: u64) -> Header {
    let mut header = header(attempt);
    header.migration_id = id.to_owned();
    header.spec.as_mut().unwrap().slots = Some(slots.into());
    header
}

/// What a node leaves that had `m1` in `state`, and `m2`, which is receiving.
struct Left {
    target: MemoryTarget,
    journal: Journal,
    dir: Arc<tempfile::TempDir>,
}

async fn left_in(state: MigrationState) -> Left {
    let node = Node::start().await;
    let (mut other, _) = node.accept(of("m2", other_slots(), 1)).await;
    other.bulk(vec![row(10, "a")], true).await;
    other.durable().await;
    let (mut source, _) = node.accept(of("m1", damaged_slots(), 1)).await;
    source.bulk(vec![row(10, "b"), row(10, "c")], true).await;
    if matches!(state, MigrationState::Prepared | MigrationState::Committed) {
        source.prepare(1, &node.target).await;
        assert!(matches!(source.answer().await.unwrap(), Answer::Prepared(_)));
    } else {
        source.durable().await;
    }
    if state == MigrationState::Committed {
        source.send(COMMIT).await;
        assert!(matches!(source.answer().await.unwrap(), Answer::Committed(_)));
    } else if state == MigrationState::Cancelled {
        node.cancel().await.unwrap();
    }
    assert_eq!(node.progress().state(), state);
    drop((source, other));
    node.receiver.shutdown().await;
    let Node { target, dir, .. } = node;
    // Opened once, since that takes longer than all else here.
    Left { target, journal: Journal::open(dir.path(), 10).unwrap().0, dir }
}

/// Starts a receiver over the store of `node`, in which `record` lies for `m1`.
async fn start(left: &Left, record: &Bytes) -> (Node, RangeGuard) {
    left.target.disk().records.insert(id("m1"), record.clone());
    let (target, guard, journal) = (left.target.crash(), RangeGuard::new(), left.journal.clone());
    let builder = MigrationReceiver::builder(identity("n2", 2), target.clone(), journal);
    let receiver = builder.guard(guard.clone()).start().await.unwrap();
    let client = MigrationServiceClient::new(receiver.clone().into_service());
    (Node { target, receiver, client, dir: Arc::clone(&left.dir) }, guard)
}

/// `m1` is refused with its name, its slots go to nobody where they are in doubt, and `m2` goes on.
async fn quarantined(left: &Left, record: &Bytes, in_doubt: &[SlotRange], attempt: u64, how: &str) {
    let (started, guard) = start(left, record).await;
    let error = started.refused(of("m1", damaged_slots(), 99)).await;
    assert!(error.is(Reason::SlotsQuarantined), "{how}: {error:?}");
    assert!(error.message().contains("migration m1") && !error.message().contains('/'), "{how}: {error:?}");
    assert_eq!(error.get("holder"), Some("the damaged record of migration m1"), "{how}");
    let acquired = guard.try_acquire(damaged_slots(), "somebody else");
    if in_doubt.contains(&damaged_slots()) {
        let error: Error = acquired.unwrap_err();
        assert!(error.is(Reason::SlotsQuarantined), "{how}: {error:?}");
        assert!(error.message().contains("migration m1"), "{how}: {error:?}");
    } else {
        drop(acquired.unwrap_or_else(|error| panic!("{how}: {error:?}")));
    }
    let (mut other, accepted) = started.accept(of("m2", other_slots(), attempt)).await;
    assert!(accepted.known && accepted.resume.unwrap().copied, "{how}");
    let next = other.watermark + 1;
    other.delta(next, vec![row(next, "a")]).await;
    other.durable().await;
    assert_eq!(started.target.holds(), 0, "{how}");
    assert_eq!(started.target.disk().records[&id("m1")], record, "{how}: it is left as it is");
    let stored = started.target.load().await.unwrap();
    let read = read_records(stored).into_iter().find(|(stored, _)| stored.id == id("m1")).unwrap().1;
    assert_eq!(read.unwrap_err().slots, in_doubt, "{how}: what a tool sees");
    drop(other);
    started.receiver.shutdown().await;
}

fn damages(whole: &[u8]) -> impl Iterator<Item = (String, Bytes)> {
    let flips = (0..whole.len() * 8).map(|bit| {
        let mut flipped = whole.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        (format!("bit {bit} flipped"), flipped.into())
    });
    let cuts =
        (0..whole.len()).map(|len| (format!("cut to {len} bytes"), Bytes::copy_from_slice(&whole[..len])));
    flips.chain(cuts).chain([("a byte behind it".to_owned(), [whole, b"\0"].concat().into())])
}

/// Every `of`-th damage of the record of `m1` in that state, from the one with this number on; first, the control.
async fn damaged_in(state: MigrationState, in_doubt: &[SlotRange], number: usize, of: usize) {
    let left = left_in(state).await;
    let whole = left.target.disk().records[&id("m1")].clone();
    let (started, _) = start(&left, &whole).await;
    assert_eq!(started.progress().state(), state, "the control");
    assert_eq!(started.target.holds(), usize::from(state == MigrationState::Prepared), "the control");
    started.receiver.shutdown().await;
    for (attempt, (how, damaged)) in (2..).zip(damages(&whole).skip(number).step_by(of)) {
        quarantined(&left, &damaged, in_doubt, attempt, &how).await;
    }
}

/// Every flip and every cut of the record of `m1` in that state, on several nodes at the same time: each waits for its timers most of the time.
async fn every_damage_in(state: MigrationState, in_doubt: &[SlotRange]) {
    const NODES: usize = 8;
    join_all((0..NODES).map(|number| damaged_in(state, in_doubt, number, NODES))).await;
}

#[tokio::test]
async fn every_flipped_bit_and_every_cut_of_what_is_staged_quarantines_its_slots_and_nothing_else() {
    every_damage_in(MigrationState::Receiving, &[damaged_slots()]).await;
}

#[tokio::test]
async fn every_flipped_bit_and_every_cut_of_what_is_prepared_quarantines_its_slots_and_nothing_else() {
    every_damage_in(MigrationState::Prepared, &[damaged_slots()]).await;
}

/// The store itself knows who owns the slots: nobody has to be kept off them.
#[tokio::test]
async fn every_flipped_bit_and_every_cut_of_what_is_committed_is_found_and_leaves_no_slots_in_doubt() {
    every_damage_in(MigrationState::Committed, &[]).await;
}

#[tokio::test]
async fn every_flipped_bit_and_every_cut_of_what_is_cancelled_is_found_and_leaves_no_slots_in_doubt() {
    every_damage_in(MigrationState::Cancelled, &[]).await;
}

#[tokio::test]
async fn the_record_of_another_migration_is_not_believed() {
    let left = left_in(MigrationState::Prepared).await;
    let other = left.target.disk().records[&id("m2")].clone();
    // It lies where it belongs, too, so that its slots are not in doubt.
    quarantined(&left, &other, &[damaged_slots()], 2, "a copy").await;
    // Where it does not, it may be all that is left of that migration.
    left.target.disk().records.remove(&id("m2"));
    let (started, guard) = start(&left, &other).await;
    for slots in [damaged_slots(), other_slots()] {
        let error = guard.try_acquire(slots, "somebody else").unwrap_err();
        assert!(error.is(Reason::SlotsQuarantined), "{error:?}");
    }
    let error = started.refused(of("m2", other_slots(), 9)).await;
    assert!(error.is(Reason::SlotsQuarantined), "{error:?}");
    started.receiver.shutdown().await;
}

#[tokio::test]
async fn a_record_that_was_dropped_lets_the_migration_begin_again() {
    let left = left_in(MigrationState::Prepared).await;
    let whole = left.target.disk().records[&id("m1")].clone();
    let damaged = whole.slice(1..);
    quarantined(&left, &damaged, &[damaged_slots()], 2, "its first byte is missing").await;
    left.target.forget(&id("m1")).await.unwrap();
    let node = Node::over(left.target.crash(), left.dir, |builder| builder).await;
    let (mut source, accepted) = node.accept(of("m1", damaged_slots(), 3)).await;
    assert!(!accepted.known);
    source.bulk(vec![row(10, "b")], true).await;
    source.durable().await;
    drop(source);
    eventually("it is staged", || node.target.disk().staged[&id("m1")].len() == 1).await;
    node.receiver.shutdown().await;
}

//! What clients feel: holds and delays.

use std::time::{Duration, Instant};

use proto::migration::hold::HoldMode;
use proto::migration::{MigrationSource as _, MigrationTarget as _};

use super::support::*;
use crate::common::slot_of;
use crate::gate::{Access, Verdict};
use crate::migrate::{MigrateOptions, NodeTarget};

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_counts_requests_and_stops_its_slots_only() {
    let dir = tempfile::tempdir().unwrap();
    let a = TestNode::open(&dir.path().join("a"), "n1", "0-16383");
    let slot = moving().start();
    let hold = a.source.hold(moving(), HoldMode::Writes).await.unwrap();
    let gate = a.node.gate().clone();
    assert_eq!(gate.verdict(slot, Access::Write), Verdict::Held);
    assert_eq!(
        (gate.verdict(slot, Access::Read), gate.verdict(0, Access::Write)),
        (Verdict::Pass, Verdict::Pass)
    );
    let waiter = tokio::spawn(async move { gate.wait(slot, Access::Write).await });
    while hold.held_requests() == 0 {
        tokio::task::yield_now().await;
    }
    let all = a.source.hold(moving(), HoldMode::All).await.unwrap();
    assert_eq!(a.node.gate().verdict(slot, Access::Read), Verdict::Held);
    drop((hold, all));
    assert_eq!(waiter.await.unwrap(), Ok(Verdict::Pass));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_holds_slots_that_are_not_its_own_for_as_long_as_clients_may_wait() {
    let dir = tempfile::tempdir().unwrap();
    let b = TestNode::open(&dir.path().join("b"), "n2", "none");
    let patience = Duration::from_millis(50);
    let target = NodeTarget::new(b.node.clone(), MigrateOptions { patience, ..MigrateOptions::default() });
    let slot = moving().start();
    assert_eq!(b.node.gate().verdict(slot, Access::Read), Verdict::Unowned);
    let hold = target.hold(moving());
    assert_eq!(b.node.gate().verdict(slot, Access::Read), Verdict::Held);
    let begun = Instant::now();
    b.node.gate().wait(slot, Access::Read).await.unwrap_err();
    assert!(begun.elapsed() >= patience);
    assert_eq!(hold.held_requests(), 1);
    drop(hold);
    assert_eq!(b.node.gate().verdict(slot, Access::Read), Verdict::Unowned);
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_of_leased_slots_are_slowed_until_the_migration_ends() {
    let dir = tempfile::tempdir().unwrap();
    let a = TestNode::open(&dir.path().join("a"), "n1", "0-16383");
    let (id, delay) = (id("m"), Duration::from_millis(20));
    let slot = slot_of(key_in("k", moving(), true).as_bytes());
    a.source.slow_writers(&id, delay);
    assert!(!a.node.gate().is_slow(slot), "there is no such migration");
    a.source.open_log(&id, moving(), None).await.unwrap();
    a.source.slow_writers(&id, delay);
    assert!(a.node.gate().is_slow(slot) && !a.node.gate().is_slow(0));
    a.node.gate().delay_write(slot).await;
    assert!(a.source.writers_slowed_ms(&id) >= 20);
    a.source.slow_writers(&id, Duration::ZERO);
    assert!(!a.node.gate().is_slow(slot) && a.source.writers_slowed_ms(&id) >= 20);
    a.source.slow_writers(&id, delay);
    a.source.keep(&id, moving(), None).await.unwrap();
    assert!(!a.node.gate().is_slow(slot));
}

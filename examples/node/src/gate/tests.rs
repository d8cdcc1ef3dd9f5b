use std::time::Duration;

use super::*;
use crate::store::Claim;

fn gate(max_waiting: usize) -> Gate {
    let me = NodeId::new("n1").unwrap();
    let mut ownership = Ownership::default();
    ownership.adopt(&Claim { range: "0-99".parse().unwrap(), owner: me.clone(), epoch: 1 });
    ownership.adopt(&Claim {
        range: "100-199".parse().unwrap(),
        owner: NodeId::new("n2").unwrap(),
        epoch: 1,
    });
    Gate::new(me, ownership, max_waiting)
}

fn range(text: &str) -> SlotRange {
    text.parse().unwrap()
}

#[tokio::test]
async fn says_whose_a_slot_is() {
    let gate = gate(1);
    assert_eq!(gate.verdict(99, Access::Write), Verdict::Pass);
    assert_eq!(gate.verdict(100, Access::Read), Verdict::Moved);
    assert_eq!(gate.verdict(200, Access::Read), Verdict::Unowned);
}

#[tokio::test]
async fn a_hold_on_writes_stops_writes_of_its_slots_only() {
    let gate = gate(1);
    let hold = gate.hold(range("50-99"), HoldMode::Writes).await;
    assert_eq!(gate.verdict(50, Access::Write), Verdict::Held);
    assert_eq!(gate.verdict(50, Access::Read), Verdict::Pass);
    assert_eq!(gate.verdict(49, Access::Write), Verdict::Pass);
    drop(hold);
    assert_eq!(gate.verdict(50, Access::Write), Verdict::Pass);
}

#[tokio::test]
async fn a_hold_waits_for_what_was_let_in() {
    let gate = gate(1);
    let mut permits = gate.permits(Access::Write);
    assert_eq!(permits.enter(60), Verdict::Pass);
    let mut holding = Box::pin(gate.hold(range("50-99"), HoldMode::Writes));
    tokio::time::timeout(Duration::from_millis(30), &mut holding).await.unwrap_err();
    assert_eq!(gate.verdict(60, Access::Write), Verdict::Held, "newcomers are stopped at once");
    drop(permits);
    let _hold = holding.await;
}

#[tokio::test]
async fn reads_drain_only_for_a_hold_on_all() {
    let gate = gate(1);
    let mut permits = gate.permits(Access::Read);
    assert_eq!(permits.enter(60), Verdict::Pass);
    drop(gate.hold(range("50-99"), HoldMode::Writes).await);
    let mut holding = Box::pin(gate.hold(range("50-99"), HoldMode::All));
    tokio::time::timeout(Duration::from_millis(30), &mut holding).await.unwrap_err();
    drop(permits);
    let _hold = holding.await;
    assert_eq!(gate.verdict(60, Access::Read), Verdict::Held);
}

#[tokio::test]
async fn quarantined_slots_are_refused_at_once_unless_another_node_owns_them() {
    let gate = gate(1);
    let hold = gate.hold(range("0-99"), HoldMode::Writes).await;
    let quarantine = gate.quarantine(range("50-99"), "the damaged record a");
    for access in [Access::Read, Access::Write] {
        assert_eq!(gate.verdict(60, access), Verdict::Quarantined);
        assert_eq!(gate.permits(access).enter(60), Verdict::Quarantined);
        assert_eq!(gate.wait(60, access).await, Ok(Verdict::Quarantined));
    }
    assert_eq!(gate.quarantined(60).as_deref(), Some("the damaged record a"));
    assert_eq!((gate.quarantined(49), gate.verdict(49, Access::Read)), (None, Verdict::Pass));
    assert_eq!(gate.quarantines(), [(range("50-99"), "the damaged record a".into())]);
    let mut ownership = Ownership::clone(&gate.ownership());
    ownership.adopt(&Claim { range: range("50-59"), owner: NodeId::new("n2").unwrap(), epoch: 2 });
    gate.set_ownership(ownership);
    assert_eq!(gate.verdict(55, Access::Read), Verdict::Moved);
    drop(hold);
    drop(quarantine);
    assert_eq!((gate.quarantined(60), gate.verdict(60, Access::Write)), (None, Verdict::Pass));
}

#[tokio::test]
async fn a_redirect_is_not_taken_back_by_what_was_durable_before() {
    let gate = gate(1);
    let claim =
        |owner: &str, epoch| Claim { range: range("50-99"), owner: NodeId::new(owner).unwrap(), epoch };
    let durable = Ownership::clone(&gate.ownership());
    for _ in 0..2 {
        assert!(gate.redirect(claim("n2", 2)));
        gate.set_ownership(durable.clone());
        assert_eq!(
            (gate.verdict(49, Access::Write), gate.verdict(50, Access::Read)),
            (Verdict::Pass, Verdict::Moved)
        );
    }
    // A claim that is older than what is known is none, and clients are not let go because of it.
    assert!(!gate.redirect(claim("n1", 1)) && !gate.redirect(claim("n3", 2)));
    assert_eq!(gate.verdict(50, Access::Read), Verdict::Moved);
    let mut next = durable.clone();
    next.adopt(&claim("n2", 2));
    gate.set_ownership(next.clone());
    assert_eq!(*gate.ownership(), next);
    // Once it is durable, that is what counts.
    next.adopt(&claim("n1", 3));
    gate.set_ownership(next);
    assert_eq!(gate.verdict(50, Access::Write), Verdict::Pass);
    gate.set_ownership(durable);
    assert_eq!(gate.verdict(50, Access::Write), Verdict::Pass);
}

#[tokio::test]
async fn a_dropped_hold_in_waiting_is_released() {
    let gate = gate(1);
    let mut permits = gate.permits(Access::Write);
    permits.enter(60);
    let holding = gate.hold(range("50-99"), HoldMode::Writes);
    tokio::time::timeout(Duration::from_millis(30), holding).await.unwrap_err();
    assert_eq!(gate.verdict(60, Access::Write), Verdict::Pass);
}

#[tokio::test]
async fn waiting_requests_go_on_with_the_new_owner() {
    let gate = gate(1);
    let hold = gate.hold(range("0-99"), HoldMode::Writes).await;
    let waiter = tokio::spawn({
        let gate = gate.clone();
        async move { gate.wait(7, Access::Write).await }
    });
    while gate.waiting() == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(gate.wait(7, Access::Write).await, Err(WaitError::TooMany), "only one may wait");
    assert_eq!(hold.waited(), 1);
    let mut ownership = Ownership::clone(&gate.ownership());
    ownership.adopt(&Claim { range: range("0-99"), owner: NodeId::new("n2").unwrap(), epoch: 2 });
    gate.set_ownership(ownership);
    assert!(!waiter.is_finished());
    drop(hold);
    assert_eq!(waiter.await.unwrap(), Ok(Verdict::Moved));
    assert_eq!(gate.waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_patience_of_a_hold_counts_from_its_own_beginning() {
    let gate = gate(9);
    let freeze = gate.hold_for(range("0-99"), HoldMode::Writes, Duration::from_secs(60)).await;
    let waiting = gate.clone();
    let waiter = tokio::spawn(async move { waiting.wait(60, Access::Write).await });
    tokio::time::sleep(Duration::from_secs(8)).await;
    let _commit = gate.hold_for(range("0-99"), HoldMode::All, Duration::from_secs(5)).await;
    drop(freeze);
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(!waiter.is_finished(), "a long freeze takes nothing from the patience with the commit");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(waiter.is_finished());
    assert_eq!(waiter.await.unwrap(), Err(WaitError::TooLong));
}

#[tokio::test(start_paused = true)]
async fn a_request_waits_as_long_as_the_least_patient_hold_lets_it() {
    let gate = gate(9);
    let patient = gate.hold(range("0-99"), HoldMode::All).await;
    let hold = gate.hold_for(range("50-99"), HoldMode::Writes, Duration::from_secs(5)).await;
    let begun = Instant::now();
    assert_eq!(gate.wait(60, Access::Write).await, Err(WaitError::TooLong));
    assert_eq!(begun.elapsed(), Duration::from_secs(5));
    assert_eq!((patient.waited(), hold.waited()), (1, 1));
    // Reads of it, and other slots, are stopped by the other one only.
    for (slot, access) in [(60, Access::Read), (7, Access::Write)] {
        tokio::time::timeout(Duration::from_secs(60), gate.wait(slot, access)).await.unwrap_err();
    }
    assert_eq!((patient.waited(), hold.waited(), gate.waiting()), (3, 1, 0));
}

#[tokio::test]
async fn a_request_is_counted_by_a_hold_that_comes_while_it_waits() {
    let gate = gate(9);
    let first = gate.hold(range("0-99"), HoldMode::All).await;
    let waiter = tokio::spawn({
        let gate = gate.clone();
        async move { gate.wait(7, Access::Read).await }
    });
    while first.waited() == 0 {
        tokio::task::yield_now().await;
    }
    let second = gate.hold_undrained(range("0-9"), HoldMode::All);
    drop(first);
    while second.waited() == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(second.waited(), 1);
    drop(second);
    assert_eq!(waiter.await.unwrap(), Ok(Verdict::Pass));
}

#[tokio::test]
async fn a_sealed_gate_lets_nothing_through() {
    let gate = gate(1);
    let hold = gate.hold(range("0-99"), HoldMode::Writes).await;
    gate.seal();
    drop(hold);
    assert_eq!(gate.verdict(7, Access::Write), Verdict::Held);
}

#[tokio::test]
async fn the_stricter_of_two_holds_counts() {
    let gate = gate(1);
    let all = gate.hold(range("10-19"), HoldMode::All).await;
    let writes = gate.hold(range("0-99"), HoldMode::Writes).await;
    assert_eq!(gate.verdict(15, Access::Read), Verdict::Held);
    drop(all);
    assert_eq!(gate.verdict(15, Access::Read), Verdict::Pass);
    assert_eq!(gate.verdict(15, Access::Write), Verdict::Held);
    drop(writes);
    assert_eq!(gate.verdict(15, Access::Write), Verdict::Pass);
}

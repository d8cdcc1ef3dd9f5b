//! What nodes refuse, before anything is moved and in the middle of it: each says why, nothing is lost, and what can go on goes on.

use crate::support;
use crate::support::migration::{
    ID, Pair, Slow, begin, cancel, complete, limits, manual, progress, reaches, request, state,
};
use crate::support::{start, until};
use node::demo::processes::NodeProcess;
use proto::common::error::Error;
use proto::node::{
    Direction, MigrationLimits, MigrationProgress, MigrationSpec, MigrationState, SlotRange,
    StartMigrationRequest,
};

/// Of slots that few keys have, so that many fit beside each other.
fn small(id: &str, to: &NodeProcess, first: u32, slots: u32) -> StartMigrationRequest {
    let mut small = manual(id, to);
    small.spec.as_mut().unwrap().slots = Some(SlotRange { start: first, end: first + slots });
    small
}

fn with_spec(
    request: &StartMigrationRequest,
    change: impl FnOnce(&mut MigrationSpec),
) -> StartMigrationRequest {
    let mut changed = request.clone();
    change(changed.spec.as_mut().unwrap());
    changed
}

fn error_of(shown: &MigrationProgress) -> Error {
    shown.progress.clone().unwrap().error.unwrap().into()
}

/// Waits until a migration has survived a refusal for this reason.
async fn refuses(node: &NodeProcess, id: &str, reason: &str) {
    until(&format!("the target refuses with {reason}"), async || {
        let shown = progress(node, id, Direction::Out).await.unwrap();
        shown.incidents.iter().any(|incident| incident.error.clone().unwrap_or_default().reason == reason)
    })
    .await;
}

#[tokio::test]
async fn a_request_that_cannot_be_is_refused_at_once() {
    let pair = Pair::start(100, 100).await;
    let asked = manual(ID, &pair.n2);
    for (wrong, reason, field) in [
        (
            with_spec(&asked, |spec| spec.target_node_id = "n1".into()),
            "SELF_MIGRATION",
            "spec.target_node_id",
        ),
        (with_spec(&asked, |spec| spec.source_node_id = "n3".into()), "WRONG_NODE", "spec.source_node_id"),
        (with_spec(&asked, |spec| spec.slots = None), "INVALID_SLOT_RANGE", "spec.slots"),
        (
            StartMigrationRequest { target_address: "nowhere".into(), ..asked.clone() },
            "INVALID_FIELD",
            "target_address",
        ),
    ] {
        let refused = begin(&pair.n1, wrong).await.unwrap_err();
        assert_eq!(refused.reason(), reason, "{refused:?}");
        assert_eq!(refused.violations()[0].field, field, "{refused:?}");
    }
    let refused = begin(&pair.n2, request("m2", &pair.n1)).await.unwrap_err();
    assert_eq!(refused.reason(), "NOT_SLOT_OWNER", "{refused:?}");
    assert_eq!(pair.source().await, MigrationState::Unspecified, "nothing of it was kept");

    let first = begin(&pair.n1, asked.clone()).await.unwrap();
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Ready).await;
    let again = begin(&pair.n1, asked.clone()).await.unwrap();
    let since = |shown: &MigrationProgress| shown.progress.clone().unwrap().started_unix_ms;
    assert_eq!((again.attempt, since(&again)), (1, since(&first)), "it joined");
    let refused = begin(&pair.n1, with_spec(&asked, |spec| spec.auto_complete = true)).await.unwrap_err();
    assert_eq!((refused.reason(), refused.get("field")), ("SPECIFICATION_MISMATCH", Some("auto_complete")));
    let refused = begin(&pair.n1, small("other", &pair.n2, 16_000, 10)).await.unwrap_err();
    assert_eq!((refused.reason(), refused.get("holder")), ("RANGE_BUSY", Some("migration m")));
    assert!(refused.is_retryable());
    assert_eq!(pair.source().await, MigrationState::Ready, "none of it disturbed the first");
    let load = pair.load();
    cancel(&pair.n1, ID).await.unwrap();
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Cancelled).await;
    // One that has ended is told of, and not started again.
    assert_eq!(begin(&pair.n1, asked).await.unwrap().state(), MigrationState::Cancelled);
    let refused = complete(&pair.n1, ID).await.unwrap_err();
    assert_eq!(refused.reason(), "MIGRATION_ENDED", "{refused:?}");
    pair.ends("refusals", load, MigrationState::Cancelled).await;
}

#[tokio::test]
async fn a_target_that_is_not_there_fails_the_migration_in_time() {
    let pair = Pair::start(100, 100).await;
    let dead = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    // Nobody else gets the port as long as it is bound, and nobody accepts.
    let silent = dead.local_addr().unwrap().to_string();
    let soon = |address: &str, id: &str, node: &str| {
        let mut asked = manual(id, &pair.n2);
        asked.target_address = address.to_owned();
        asked.spec.as_mut().unwrap().target_node_id = node.to_owned();
        asked.limits = Some(MigrationLimits { accept_timeout_ms: Some(700), ..MigrationLimits::default() });
        asked
    };
    for (id, address, node, reason) in [
        ("dead", "127.0.0.1:1", "n2", "TARGET_UNREACHABLE"),
        ("silent", silent.as_str(), "n2", "TARGET_UNREACHABLE"),
        ("unknown", pair.n2.addresses().grpc.as_str(), "n7", "WRONG_NODE"),
    ] {
        begin(&pair.n1, soon(address, id, node)).await.unwrap();
        if reason == "TARGET_UNREACHABLE" {
            let refused = complete(&pair.n1, id).await.unwrap_err();
            assert_eq!(
                (refused.reason(), refused.get("state")),
                ("NOT_READY", Some("MIGRATION_STATE_PENDING"))
            );
        }
        let failed = reaches(&pair.n1, id, Direction::Out, MigrationState::Failed).await;
        assert_eq!(error_of(&failed).reason(), reason, "{failed:?}");
        assert!(failed.peer.is_none() && failed.freezes.is_empty(), "{failed:?}");
        assert_eq!(state(&pair.n2, id, Direction::In).await, MigrationState::Unspecified);
    }
    // Nothing is kept from the next one.
    let load = pair.load();
    begin(&pair.n1, request(ID, &pair.n2)).await.unwrap();
    pair.ends("targets that were not there", load, MigrationState::Completed).await;
}

#[tokio::test]
async fn it_is_not_completed_before_the_rows_are_copied() {
    let pair = Pair::start(2000, 1000).await;
    let load = pair.load();
    let asked = StartMigrationRequest { limits: limits(Slow::Copying), ..manual(ID, &pair.n2) };
    begin(&pair.n1, asked.clone()).await.unwrap();
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Copying).await;
    let refused = complete(&pair.n1, ID).await.unwrap_err();
    assert_eq!((refused.reason(), refused.get("state")), ("NOT_READY", Some("MIGRATION_STATE_COPYING")));
    assert!(refused.is_retryable());
    begin(&pair.n1, StartMigrationRequest { limits: None, ..asked }).await.unwrap();
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Ready).await;
    assert_eq!(pair.target().await, MigrationState::Receiving, "it was not completed by that");
    complete(&pair.n1, ID).await.unwrap();
    pair.ends("a complete that came too early", load, MigrationState::Completed).await;
}

#[tokio::test]
async fn more_migrations_than_a_node_takes_wait_or_are_refused() {
    let pair = Pair::start(100, 100).await;
    let n3 = start("n3", pair.directory.path(), "none").await;
    // n3 gets slots of its own first, to be a second source.
    let mut to_n3 = small("first", &n3, 0, 100);
    to_n3.spec.as_mut().unwrap().auto_complete = true;
    begin(&pair.n1, to_n3).await.unwrap();
    reaches(&n3, "first", Direction::In, MigrationState::Completed).await;
    reaches(&pair.n1, "first", Direction::Out, MigrationState::Completed).await;
    for n in 0..4 {
        begin(&pair.n1, small(&format!("m{n}"), &pair.n2, 8192 + 10 * n, 10)).await.unwrap();
    }
    // Three are the share of one source; the fourth waits for one of them to end.
    let mut ready = Vec::new();
    until("three of them have a place", async || {
        ready.clear();
        for n in 0..4 {
            let id = format!("m{n}");
            if state(&pair.n1, &id, Direction::Out).await == MigrationState::Ready {
                ready.push(id);
            }
        }
        ready.len() == 3
    })
    .await;
    let waits = (0..4).map(|n| format!("m{n}")).find(|id| !ready.contains(id)).unwrap();
    refuses(&pair.n1, &waits, "TOO_MANY_MIGRATIONS").await;
    let refused = begin(&pair.n1, small("m4", &pair.n2, 9000, 10)).await.unwrap_err();
    assert_eq!(refused.reason(), "TOO_MANY_MIGRATIONS", "{refused:?}");
    assert!(refused.is_retryable());
    // The last place is for another one. Then the target has no more: who asks there waits.
    begin(&n3, small("m5", &pair.n2, 0, 10)).await.unwrap();
    reaches(&n3, "m5", Direction::Out, MigrationState::Ready).await;
    begin(&n3, small("m6", &pair.n2, 10, 10)).await.unwrap();
    refuses(&n3, "m6", "TOO_MANY_MIGRATIONS").await;
    assert_eq!(state(&n3, "m6", Direction::Out).await, MigrationState::Pending);
    for ended in &ready[..2] {
        cancel(&pair.n1, ended).await.unwrap();
    }
    reaches(&n3, "m6", Direction::Out, MigrationState::Ready).await;
    reaches(&pair.n1, &waits, Direction::Out, MigrationState::Ready).await;
}

#[tokio::test]
async fn a_target_that_drains_takes_nothing_new_and_goes_on_later() {
    let mut pair = Pair::start(2000, 1000).await;
    pair.restart_target(&["--grace", "6"]).await;
    let n3 = start("n3", pair.directory.path(), "none").await;
    let mut to_n3 = small("first", &n3, 0, 100);
    to_n3.spec.as_mut().unwrap().auto_complete = true;
    begin(&pair.n1, to_n3).await.unwrap();
    reaches(&n3, "first", Direction::In, MigrationState::Completed).await;
    let load = pair.load();
    begin(&pair.n1, manual(ID, &pair.n2)).await.unwrap();
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Ready).await;
    // What runs keeps the node from stopping at once.
    let addresses = pair.n2.addresses().clone();
    let (stopped, ()) = tokio::join!(pair.n2.stop(), async {
        let mut asked = small("m2", &n3, 0, 10);
        let spec = asked.spec.as_mut().unwrap();
        spec.target_node_id = "n2".to_owned();
        asked.target_address.clone_from(&addresses.grpc);
        begin(&n3, asked).await.unwrap();
        refuses(&n3, "m2", "SHUTTING_DOWN").await;
    });
    stopped.unwrap();
    assert_eq!(state(&n3, "m2", Direction::Out).await, MigrationState::Pending);
    pair.n2.restart().await.unwrap();
    reaches(&n3, "m2", Direction::Out, MigrationState::Ready).await;
    cancel(&n3, "m2").await.unwrap();
    reaches(&pair.n2, "m2", Direction::In, MigrationState::Cancelled).await;
    until("the wish to cut over is accepted", async || complete(&pair.n1, ID).await.is_ok()).await;
    pair.ends("a drain of the target", load, MigrationState::Completed).await;
}

#[tokio::test]
async fn a_target_without_space_keeps_the_source_waiting() {
    let mut pair = Pair::start(2000, 1000).await;
    let load = pair.load();
    let full = ["--reserve-mib", "1000000000"];
    pair.restart_target(&full).await;
    let asked = StartMigrationRequest { limits: limits(Slow::Copying), ..manual(ID, &pair.n2) };
    begin(&pair.n1, asked.clone()).await.unwrap();
    // Before anything is staged.
    refuses(&pair.n1, ID, "INSUFFICIENT_DISK").await;
    assert_eq!(pair.source().await, MigrationState::Pending);
    assert_eq!(pair.target().await, MigrationState::Unspecified);
    pair.restart_target(&[]).await;
    until("something is copied", async || {
        progress(&pair.n1, ID, Direction::Out).await.unwrap().progress.unwrap().items_done > 0
    })
    .await;
    // In the middle of it: what is staged stays.
    pair.restart_target(&full).await;
    let incident = |shown: &MigrationProgress| shown.incidents.last().unwrap().at_unix_ms;
    let before = incident(&progress(&pair.n1, ID, Direction::Out).await.unwrap());
    until("the target refuses", async || {
        let shown = progress(&pair.n1, ID, Direction::Out).await.unwrap();
        let last = shown.incidents.last().unwrap().error.clone().unwrap_or_default();
        incident(&shown) > before && last.reason == "INSUFFICIENT_DISK"
    })
    .await;
    let shown = progress(&pair.n2, ID, Direction::In).await.unwrap();
    assert_eq!(shown.state(), MigrationState::Receiving);
    assert!(shown.progress.unwrap().items_done > 0, "what is staged stays");
    pair.restart_target(&[]).await;
    begin(&pair.n1, StartMigrationRequest { limits: None, ..asked }).await.unwrap();
    until("the wish to cut over is accepted", async || complete(&pair.n1, ID).await.is_ok()).await;
    let done = reaches(&pair.n1, ID, Direction::Out, MigrationState::Completed).await;
    assert_eq!(done.copy, 1, "nothing was copied again: {done:?}");
    pair.ends("a full disk at the target", load, MigrationState::Completed).await;
}

/// A third node takes the earlier owner for the present one, for a moment: it refuses, learns better, and takes the slots.
#[tokio::test]
async fn slots_go_on_to_a_third_node_at_once() {
    let pair = Pair::start(100, 100).await;
    let peers = [support::migration::peer(&pair.n1), support::migration::peer(&pair.n2)];
    let arguments = ["--peer", peers[0].as_str(), "--peer", peers[1].as_str()];
    let directory = pair.directory.path();
    let n3 = NodeProcess::start_with(&support::program(), "n3", directory, "none", &arguments).await.unwrap();
    for (round, (from, to)) in
        (0..).zip([(&pair.n1, &pair.n2), (&pair.n2, &n3), (&n3, &pair.n1), (&pair.n1, &n3), (&n3, &pair.n2)])
    {
        let id = format!("round-{round}");
        begin(from, request(&id, to)).await.unwrap();
        let moved = reaches(from, &id, Direction::Out, MigrationState::Completed).await;
        assert_eq!(moved.slot_epoch, 2 + round);
    }
}

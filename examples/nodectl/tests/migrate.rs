//! `migrate`: what is asked of a node, what is shown, and the exit codes.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod support;

use proto::common::error::Error;
use proto::migration::Reason;
use proto::node::{
    FreezeAttempt, FreezeOutcome, ListMigrationsResponse, MigrationDecision, MigrationLag,
    MigrationPhaseStart, MigrationProgress, MigrationState, NodeStatus, Priority, ShardStatus, SlotOwner,
    SlotRange, TaskError,
};
use support::script::{Script, State, migration};
use support::{Running, nodectl, until};

const STORE: &str = "22222222222222222222222222222222";

async fn one(state: MigrationState) -> Script {
    Script::start(State { migrations: vec![migration("m1", state)], ..State::default() }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn start_asks_for_what_was_said() {
    let script = Script::start(State::default()).await;
    let line = format!("migrate start --from {} --to n2=127.0.0.1:7102 --slots 8192-8291", script.address);
    let plain = nodectl(&line).await;
    assert_eq!(plain.code, Some(0), "{plain:?}");
    let full = format!(
        "{line} --id m-1 --manual --rate 50MiB --freeze 250ms --source-shard a --target-shard b --source-node n1 \
         --priority recovery --json"
    );
    let full = nodectl(&full).await;
    assert_eq!((full.code, full.documents().len()), (Some(0), 1), "{full:?}");
    assert_eq!(full.last()["event"], "started");
    assert_eq!(full.last()["migration_id"], "m-1");

    let started = script.with(|state| state.started.clone());
    let spec = started[0].spec.clone().unwrap();
    assert_eq!(spec.slots, Some(SlotRange { start: 8192, end: 8292 }));
    assert_eq!(
        (spec.source_shard_id.as_str(), spec.target_shard_id.as_str()),
        ("slots-8192-8291", "slots-8192-8291")
    );
    assert_eq!((spec.source_node_id.as_str(), spec.target_node_id.as_str()), ("", "n2"));
    assert!(spec.auto_complete);
    assert_eq!(started[0].target_address, "127.0.0.1:7102");
    assert_eq!(started[0].limits.unwrap().max_bytes_per_second, None);
    // The ID that it made is the one that it names.
    let id = &started[0].migration_id;
    assert!(plain.stdout.contains(&format!("migrate watch {id} --at {}", script.address)), "{plain:?}");
    let spec = started[1].spec.clone().unwrap();
    assert_eq!((spec.source_shard_id.as_str(), spec.target_shard_id.as_str()), ("a", "b"));
    assert_eq!(spec.source_node_id, "n1");
    assert!(!spec.auto_complete);
    let limits = started[1].limits.unwrap();
    assert_eq!((limits.max_bytes_per_second, limits.freeze_timeout_ms), (Some(50 << 20), Some(250)));
    assert_eq!(started[1].priority(), Priority::Recovery);

    let again = nodectl(&format!("{line} --id m-1 --json")).await;
    assert_eq!(again.last()["event"], "joined");
    let another = nodectl(&line).await;
    assert_eq!(another.code, Some(0));
    assert_ne!(script.with(|state| state.started[3].migration_id.clone()), *id);
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_ends_as_the_migration_does() {
    for (state, code, word, advice) in [
        (MigrationState::Completed, 0, "handed over slots 0-99 n1 -> n2", ""),
        (MigrationState::Cancelled, 1, "m1 is cancelled", "choose a new --id"),
        (MigrationState::Failed, 1, "m1 is failed: disk full", "make room there"),
        (MigrationState::NeedsOperator, 1, "m1 needs an operator", "migrate resolve m1"),
    ] {
        let mut last = migration("m1", state);
        if state == MigrationState::Failed {
            last.progress.as_mut().unwrap().error = Some(TaskError {
                code: 8,
                reason: "INSUFFICIENT_DISK".to_owned(),
                message: "disk full".to_owned(),
                ..TaskError::default()
            });
        }
        let watch =
            vec![migration("m1", MigrationState::Copying), migration("m1", MigrationState::CatchingUp)];
        let script = Script::start(State { migrations: vec![last], watch, ..State::default() }).await;
        let line = format!(
            "migrate start --from {} --to n2=127.0.0.1:7102 --slots 0-99 --id m1 --wait",
            script.address
        );
        for line in [line, format!("migrate watch m1 --at {}", script.address)] {
            let ended = nodectl(&line).await;
            assert_eq!(ended.code, Some(code), "{line}: {ended:?}");
            ended.assert_plain();
            assert!(ended.stdout.contains("copying 1.00 MiB of ~4.00 MiB (25 %)"), "{ended:?}");
            assert!(ended.stdout.contains("catching up"), "{ended:?}");
            let said = format!("{}{}", ended.stdout, ended.stderr);
            assert!(said.contains(word) && said.contains(advice), "{line}: {ended:?}");
            let json = nodectl(&format!("{line} --json")).await;
            assert_eq!(json.code, Some(code), "{json:?}");
            let documents = json.documents();
            assert!(documents.iter().any(|one| one["event"] == "progress" && one["state"] == "copying"));
            match code {
                0 => assert_eq!(json.last()["state"], "completed"),
                _ => {
                    assert_eq!(json.last()["event"], "failed");
                    assert_eq!(json.last()["migration_id"], "m1");
                }
            }
        }
    }
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_wait_leaves_the_migration_alone() {
    let script = one(MigrationState::Copying).await;
    let start =
        format!("migrate start --from {} --to n2=127.0.0.1:7102 --slots 0-99 --id m1 --wait", script.address);
    for line in [start, format!("migrate watch m1 --at {}", script.address)] {
        let mut running = Running::start(&line);
        running.says("copying 1.00 MiB").await;
        running.signal(rustix::process::Signal::INT);
        let ended = running.ended().await;
        assert_eq!(ended.code, Some(130), "{ended:?}");
        for part in ["the migration m1 goes on", "migrate watch m1 --at", "migrate cancel m1 --at"] {
            assert!(ended.stderr.contains(part), "{part}: {ended:?}");
        }
    }
    assert!(script.with(|state| state.cancelled.is_empty()));
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_shows_everything() {
    let mut shown = migration("m1", MigrationState::CatchingUp);
    shown.lag = Some(MigrationLag { entries: Some(1234), bytes: Some(2048), age_ms: Some(35) });
    shown.not_converging = true;
    shown.source_throttled_ms = 77;
    shown.target_throttled_ms = 88;
    shown.copy = 2;
    shown.copy_reason = "the log was cut".to_owned();
    shown.cancel_reason = "wrong node".to_owned();
    shown.phases = vec![
        MigrationPhaseStart { state: MigrationState::Pending.into(), started_unix_ms: 1_000 },
        MigrationPhaseStart { state: 99, started_unix_ms: 2_000 },
    ];
    shown.freeze_count = 1;
    shown.max_freeze_ms = 512;
    shown.freezes = vec![FreezeAttempt {
        freeze: 1,
        attempt: 4,
        freeze_ms: Some(512),
        outcome: FreezeOutcome::TimedOut.into(),
        held_requests: 9,
        ..FreezeAttempt::default()
    }];
    let script = Script::start(State { migrations: vec![shown], ..State::default() }).await;
    let text = nodectl(&format!("migrate progress m1 --at {}", script.address)).await;
    assert_eq!(text.code, Some(0), "{text:?}");
    text.assert_plain();
    for part in [
        "state       catching up",
        "gate        open: this node serves the slots",
        "decision    undecided",
        "slots       0-99, epoch 7",
        &format!("peer        n2, store {STORE}"),
        "keys        10 of ~40 (25 %)",
        "bytes       1.00 MiB of ~4.00 MiB (25 %)",
        "lag         1234 changes, 2.00 KiB, 35 ms behind",
        "converging  not",
        "77 ms at the source, 88 ms at the target",
        "copy        2, started again: the log was cut",
        "phase       pending, began",
        "phase       unknown 99",
        "freeze      1: 512 ms timed out",
        "9 requests held",
        "wrong node",
    ] {
        assert!(text.stdout.contains(part), "{part}: {}", text.stdout);
    }
    let json = nodectl(&format!("migrate progress m1 --at {} --json", script.address)).await.last();
    assert_eq!((&json["lag_entries"], &json["lag_ms"]), (&1234.into(), &35.into()));
    assert_eq!(json["freezes"][0]["outcome"], "timed_out");
    assert_eq!(json["peer"]["store_id"], STORE);
    assert_eq!(json["phases"][1]["state"], "unknown_99");
    assert!(json["error"].is_null() && json["eta_ms"].is_null());
}

#[tokio::test(flavor = "multi_thread")]
async fn list_complete_and_cancel() {
    let ended = migration("m2", MigrationState::Completed);
    let state = State { migrations: vec![migration("m1", MigrationState::Ready), ended], ..State::default() };
    let script = Script::start(state).await;
    let at = format!("--at {}", script.address);
    let list = nodectl(&format!("migrate list {at}")).await;
    let rows: Vec<Vec<&str>> = list.stdout.lines().map(|line| line.split('\t').collect()).collect();
    assert_eq!(rows.len(), 3, "{list:?}");
    assert!(rows.iter().all(|row| row.len() == rows[0].len()), "{list:?}");
    assert_eq!(&rows[1][..4], ["m1", "out", "ready", "0-99"]);
    let active = nodectl(&format!("migrate list {at} --active --json")).await.last();
    assert_eq!(active["migrations"].as_array().unwrap().len(), 1);

    let complete = nodectl(&format!("migrate complete m1 {at} --deadline 45s")).await;
    assert_eq!(complete.code, Some(0), "{complete:?}");
    assert_eq!(script.with(|state| state.completed[0].deadline_ms), Some(45_000));
    let cancel = nodectl(&format!("migrate cancel m1 {at} --reason wrong --direction in --json")).await;
    assert_eq!(cancel.last()["state"], "cancelling");
    let asked = script.with(|state| state.cancelled[0].clone());
    assert_eq!((asked.reason.as_str(), asked.direction), ("wrong", 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_have_a_reason_and_advice() {
    let refused = |error: Error| Script::start(State { refuse: Some(error), ..State::default() });
    let start = "start --to n2=127.0.0.1:7102 --slots 0-99 --from";
    let owner = Reason::NotSlotOwner.error("no").metadata("slot", "7").metadata("owner", "n3");
    for (line, error, advice) in [
        (start, owner, "slot 7 belongs to n3"),
        (
            start,
            Reason::SpecificationMismatch.error("no").metadata("field", "spec.slots"),
            "differs in --slots",
        ),
        (start, Reason::RangeBusy.error("no"), "migrate list --at"),
        (start, Reason::SelfMigration.error("no"), "another node in --to"),
        ("complete m1 --at", Reason::NotReady.error("no"), "rows are still copied"),
        ("cancel m1 --at", Reason::AlreadyCommitted.error("no"), "start a migration at their new owner"),
        ("cancel m1 --at", Reason::OutcomePending.error("no"), "migrate watch m1"),
        ("watch m1 --retry-for 0 --at", Reason::MigrationNotFound.error("no"), "migrate list --at"),
    ] {
        let reason = error.reason().to_owned();
        let script = refused(error).await;
        let line = format!("migrate {line} {}", script.address);
        let ended = nodectl(&line).await;
        assert_eq!(ended.code, Some(1), "{line}: {ended:?}");
        assert!(ended.stderr.contains(&format!("reason: {reason}")), "{line}: {ended:?}");
        assert!(ended.stderr.contains(advice), "{advice}: {ended:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn resolve_does_nothing_until_it_is_confirmed() {
    let script = one(MigrationState::NeedsOperator).await;
    let line = format!("migrate resolve m1 --at {} --reason lost", script.address);
    for unconfirmed in [
        format!("{line} --discard"),
        format!("{line} --discard --attempt 4"),
        format!("{line} --commit --store-id {STORE}"),
    ] {
        let ended = nodectl(&unconfirmed).await;
        assert_eq!(ended.code, Some(2), "{unconfirmed}: {ended:?}");
        for part in ["what will happen: n1", "you vouch: the store", STORE, "nothing was done"] {
            assert!(ended.stderr.contains(part), "{part}: {ended:?}");
        }
        assert!(script.with(|state| state.resolved.is_empty()), "{unconfirmed}");
    }
    // The command that it proposes is about what was seen, not about what is there by then.
    let proposed = nodectl(&format!("{line} --discard")).await.stderr;
    assert!(proposed.contains(&format!("--discard --attempt 4 --store-id {STORE}")), "{proposed}");

    for confirmed in [
        format!("{line} --discard --yes"),
        format!("{line} --discard --attempt 3 --store-id {}", STORE.replace('2', "3")),
    ] {
        let ended = nodectl(&confirmed).await;
        assert_eq!(ended.code, Some(0), "{confirmed}: {ended:?}");
        assert!(ended.stderr.contains("takes slots 0-99 back, at epoch 65543"), "{ended:?}");
    }
    let resolved = script.with(|state| state.resolved.clone());
    assert_eq!(resolved.len(), 2);
    assert_eq!(resolved[0].decision(), MigrationDecision::Discarded);
    assert_eq!((resolved[0].attempt, resolved[0].peer_store_id.as_ref()), (4, [0x22; 16].as_slice()));
    assert_eq!((resolved[1].attempt, resolved[1].peer_store_id.as_ref()), (3, [0x33; 16].as_slice()));
    assert_eq!(resolved[0].reason, "lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn resolve_needs_a_store_to_vouch_for() {
    let unknown = MigrationProgress { peer: None, ..migration("m1", MigrationState::Committing) };
    let script = Script::start(State { migrations: vec![unknown], ..State::default() }).await;
    let ended =
        nodectl(&format!("migrate resolve m1 --at {} --commit --reason x --yes", script.address)).await;
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.stderr.contains("--store-id"), "{ended:?}");
    assert!(script.with(|state| state.resolved.is_empty()));
}

#[tokio::test(flavor = "multi_thread")]
async fn resolve_says_what_it_means_at_a_target_that_has_committed() {
    let script = one(MigrationState::Committed).await;
    script.with(|state| {
        state.migrations[0].progress.as_mut().unwrap().set_direction(proto::node::Direction::In);
    });
    let line = format!("migrate resolve m1 --at {} --reason lost", script.address);
    let committed = nodectl(&format!("{line} --commit --yes")).await;
    assert_eq!(committed.code, Some(0), "{committed:?}");
    assert!(committed.stderr.contains("n2 owns slots 0-99, and waits no more for n1"), "{committed:?}");
    assert!(!committed.stderr.contains("refuses a decision"), "{committed:?}");
    let discarded = nodectl(&format!("{line} --discard")).await;
    assert!(discarded.stderr.contains("in this state the node refuses a decision"), "{discarded:?}");
}

const HALVES: [&str; 2] = ["0-49", "50-99"];

fn owning(slots: &[(u32, u32)]) -> State {
    let owned = slots.iter().map(|(start, end)| SlotRange { start: *start, end: *end }).collect();
    State { owned, start_ends: Some(MigrationState::Completed), ..State::default() }
}

fn drain(script: &Script) -> String {
    format!("drain {} --to n2=127.0.0.1:7102 --to n3=127.0.0.1:7103", script.address)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_moves_everything_and_says_when_it_is_safe() {
    let mut state = owning(&[(0, 100)]);
    state.blockers = ["n2 has not confirmed".to_owned()].into_iter().cycle().take(4).collect();
    let script = Script::start(state).await;
    let dry = nodectl(&format!("{} --dry-run", drain(&script))).await;
    assert_eq!(dry.code, Some(0), "{dry:?}");
    assert!(dry.stdout.contains("would move 0-49 to n2") && dry.stdout.contains("50-99 to n3"), "{dry:?}");
    assert!(script.with(|state| state.started.is_empty()));

    let ended = nodectl(&drain(&script)).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    ended.assert_plain();
    let (before, after) =
        ended.stdout.split_once("not safe to stop yet: ").expect("it was not safe at first");
    assert!(!before.contains("it is safe to stop it"));
    assert!(after.starts_with("unconfirmed commit: n2 has not confirmed"), "{after}");
    assert!(after.ends_with("it is safe to stop it\n"), "{after}");
    let started = script.with(|state| state.started.clone());
    let moved: Vec<(String, String)> = started
        .iter()
        .map(|request| {
            let spec = request.spec.clone().unwrap();
            let slots: proto::common::slots::SlotRange = spec.slots.unwrap().try_into().unwrap();
            (slots.to_string(), spec.target_node_id)
        })
        .collect();
    assert_eq!(moved, [(HALVES[0].to_owned(), "n2".to_owned()), (HALVES[1].to_owned(), "n3".to_owned())]);
    assert!(started.iter().all(|request| request.spec.as_ref().unwrap().auto_complete));

    let again = nodectl(&format!("{} --json", drain(&script))).await;
    assert_eq!(again.last()["event"], "drained");
    assert_eq!(again.last()["safe_to_remove"], true);
    assert_eq!(script.with(|state| state.started.len()), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_never_says_that_an_unsafe_node_is_safe() {
    let mut state = owning(&[(0, 100)]);
    state.blockers = std::iter::repeat_n("n2 has not confirmed".to_owned(), 1_000).collect();
    let script = Script::start(state).await;
    for json in ["", " --json"] {
        let ended = nodectl(&format!("{} --settle 1ms{json}", drain(&script))).await;
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(!ended.stdout.contains("is safe") && !ended.stdout.contains("drained"), "{ended:?}");
        for part in ["not safe to stop", "n2 has not confirmed", "do not stop the node", "to resume:"] {
            assert!(ended.stderr.contains(part), "{part}: {ended:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_runs_again_joins_and_does_not_repeat() {
    // One half moves already, without an end.
    let mut state = owning(&[(0, 100)]);
    let mut running = migration("drain-x-1", MigrationState::Copying);
    running.spec.as_mut().unwrap().slots = Some(SlotRange { start: 0, end: 50 });
    state.migrations = vec![running];
    let script = Script::start(state).await;
    let mut draining = Running::start(&format!("{} --parallel 3", drain(&script)));
    draining.says("0-49: copying").await;
    until("the rest is started", || script.with(|state| state.started.len() == 2)).await;
    #[cfg(unix)]
    {
        draining.signal(rustix::process::Signal::INT);
        let ended = draining.ended().await;
        assert_eq!(ended.code, Some(130), "{ended:?}");
        assert!(ended.stderr.contains("to resume:") && ended.stderr.contains("--parallel 3"), "{ended:?}");
    }
    let mut slots = script
        .with(|state| state.started.iter().map(|one| one.spec.clone().unwrap().slots).collect::<Vec<_>>());
    // They were asked for at the same time, over a connection each, so either may arrive first.
    slots.sort_by_key(|slots| slots.map(|slots| slots.start));
    assert_eq!(slots, [Some(SlotRange { start: 50, end: 75 }), Some(SlotRange { start: 75, end: 100 })]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_tries_again_under_another_id_what_failed_before() {
    let script =
        Script::start(State { start_ends: Some(MigrationState::Cancelled), ..owning(&[(0, 10)]) }).await;
    let line = format!("drain {} --to n2=127.0.0.1:7102", script.address);
    let failed = nodectl(&line).await;
    assert_eq!(failed.code, Some(1), "{failed:?}");
    assert!(
        failed.stderr.contains("MIGRATION_CANCELLED") && failed.stderr.contains("to resume:"),
        "{failed:?}"
    );
    script.with(|state| state.start_ends = Some(MigrationState::Completed));
    let done = nodectl(&line).await;
    assert_eq!(done.code, Some(0), "{done:?}");
    let ids =
        script.with(|state| state.started.iter().map(|one| one.migration_id.clone()).collect::<Vec<_>>());
    assert_eq!(ids.len(), 3);
    assert_eq!(ids[0], ids[1]);
    assert!(ids[0].ends_with("-1") && ids[2].ends_with("-2"), "{ids:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_waits_for_a_place_and_for_what_is_being_cancelled() {
    let mut state = owning(&[(0, 100)]);
    state.places_taken = 5;
    state.migrations = vec![migration("m1", MigrationState::Cancelling)];
    let script = Script::start(state).await;
    let dry = nodectl(&format!("{} --dry-run", drain(&script))).await;
    assert_eq!(dry.code, Some(0), "{dry:?}");
    let mut draining = Running::start(&format!("{} --parallel 8", drain(&script)));
    draining.says("waiting for the migration m1, which is being cancelled").await;
    script.with(|state| {
        assert!(state.started.is_empty());
        state.migrations[0] = migration("m1", MigrationState::Cancelled);
    });
    let ended = draining.ended().await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(script.with(|state| (state.places_taken, state.owned.len())), (0, 0));
    let waits = "0-99 wait for a place: 4 migrations leave this node already";
    assert_eq!(ended.stdout.matches(waits).count(), 1, "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_does_not_move_what_has_left_while_it_waited() {
    let mut state = owning(&[(0, 200)]);
    state.migrations =
        vec![migration("m1", MigrationState::Cancelling), migration("m2", MigrationState::Copying)];
    state.migrations[1].spec.as_mut().unwrap().slots = Some(SlotRange { start: 100, end: 200 });
    state.start_ends = Some(MigrationState::Completed);
    let script = Script::start(state).await;
    let mut draining = Running::start(&drain(&script));
    draining.says("waiting for the migration m1, which is being cancelled").await;
    // One comes to nothing, the other one completes.
    script.with(|state| {
        state.migrations.clear();
        state.owned = vec![SlotRange { start: 0, end: 100 }];
    });
    let ended = draining.ended().await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let moved: Vec<_> =
        script.with(|state| state.started.iter().filter_map(|one| one.spec.as_ref()?.slots).collect());
    assert!(!moved.is_empty() && moved.iter().all(|slots| slots.end <= 100), "{moved:?}");
}

/// It was asked to complete by a time, and that has passed: it goes back to waiting.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_does_not_wait_for_what_nobody_completes_any_more() {
    let mut manual = migration("m1", MigrationState::Ready);
    manual.spec.as_mut().unwrap().auto_complete = false;
    let mut asked = manual.clone();
    asked.complete_deadline_unix_ms = Some(1);
    let watch = vec![asked.clone(), manual];
    let script = Script::start(State { migrations: vec![asked], watch, ..owning(&[(0, 100)]) }).await;
    let ended = nodectl(&drain(&script)).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("m1 waits for somebody to complete it"), "{ended:?}");
    assert!(ended.stderr.contains("migrate complete m1"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_stops_at_what_waits_for_a_person() {
    let mut manual = migration("m1", MigrationState::Ready);
    manual.spec.as_mut().unwrap().auto_complete = false;
    for (waiting, advice) in [
        (manual, "migrate complete m1"),
        (migration("m1", MigrationState::NeedsOperator), "migrate resolve m1"),
        (migration("m1", MigrationState::Cancelling), "migrate resolve m1"),
    ] {
        let script = Script::start(State { migrations: vec![waiting], ..owning(&[(0, 100)]) }).await;
        let ended = nodectl(&format!("{} --settle 1ms", drain(&script))).await;
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.stderr.contains(advice), "{ended:?}");
        assert!(script.with(|state| state.started.is_empty()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_to_itself_is_wrong_usage() {
    let script = Script::start(owning(&[(0, 100)])).await;
    let ended = nodectl(&format!("drain {} --to n1=127.0.0.1:7102", script.address)).await;
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.stderr.contains("--to"), "{ended:?}");
    assert!(script.with(|state| state.started.is_empty()));
}

/// Each empty entry is two or three bytes of an answer and up to 1200 of memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_lists_without_end_is_refused() {
    fn empty(count: usize, next: &str) -> ListMigrationsResponse {
        let migrations = vec![MigrationProgress::default(); count];
        ListMigrationsResponse { migrations, next_page_token: next.to_owned() }
    }
    fn owners(count: usize) -> NodeStatus {
        NodeStatus { slot_owners: vec![SlotOwner::default(); count], ..NodeStatus::default() }
    }
    // As many as fit into a page: 19 MB of memory, on each of 400 pages.
    fn freezes(count: usize) -> ListMigrationsResponse {
        let mut migration = migration("m1", MigrationState::Completed);
        migration.freezes = vec![FreezeAttempt::default(); count];
        ListMigrationsResponse { migrations: vec![migration], next_page_token: "on".to_owned() }
    }
    fn shard(ranges: usize) -> NodeStatus {
        let slots = vec![SlotRange::default(); ranges];
        let shards = vec![ShardStatus { shard_id: "s1".to_owned(), slots, ..ShardStatus::default() }];
        NodeStatus { shards, ..NodeStatus::default() }
    }
    type Answer<T> = fn() -> T;
    let lists: [(Answer<ListMigrationsResponse>, &str); 4] = [
        (|| freezes(80_000), "80000 freezes of migration m1, where a node tells of 64 at most"),
        (|| empty(140_000, ""), "too large"),
        (|| empty(101, ""), "a page of 101 migrations, where 100 were asked for"),
        (|| empty(1, "on"), "it goes on after 400 migrations on 400 pages"),
    ];
    for (lists, says) in lists {
        let script = Script::start(State { lists: Some(lists), ..State::default() }).await;
        let ended = nodectl(&format!("migrate list --at {} --timeout 60s", script.address)).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{ended:?}");
        let named = ended.stderr.contains(&script.address.to_string());
        assert!(named && ended.stderr.contains(says) && ended.stderr.contains("OUT_OF_RANGE"), "{ended:?}");
    }
    let tells: [(Answer<NodeStatus>, &str); 3] = [
        (|| shard(129), "129 slots of shard s1, where a node tells of 128 at most"),
        (|| owners(600_000), "too large"),
        (|| owners(1001), "a page of 1001 entries, where a node gives 1000"),
    ];
    for (tells, says) in tells {
        let script = Script::start(State { tells: Some(tells), ..State::default() }).await;
        let told = nodectl(&format!("status {} --json --timeout 60s", script.address)).await;
        assert!(told.stdout.contains(says), "{told:?}");
    }
}

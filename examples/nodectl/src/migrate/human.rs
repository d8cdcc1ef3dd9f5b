//! Migrations as people read them: a line, a table, and all the facts.

use std::fmt::Write as _;
use std::time::Duration;

use proto::common::clock::now_unix_ms;
use proto::common::slots::SlotRange;
use proto::common::text::hex;
use proto::node::{
    Direction, FreezeAttempt, MigrationGate, MigrationLag, MigrationProgress, MigrationState, NodeIdentity,
    Progress, TaskError,
};

use super::document::{decision_word, gate_word, outcome_word, state_word};
use crate::document::{direction_word, priority_word};
use crate::grid::{self, NONE};
use crate::human::{bytes, countdown, percent, rate, safe, since, time};

const HEADER: [&str; 10] = ["ID", "DIR", "STATE", "SLOTS", "DONE", "LAG", "RATE", "LEFT", "NODES", "AGE"];
/// Columns that go, in this order, where the terminal is too narrow: an ID that is broken in two cannot be copied.
const DISPENSABLE: [&str; 7] = ["AGE", "LEFT", "RATE", "NODES", "DIR", "LAG", "DONE"];

/// A word of the protocol, as a sentence has it.
pub(crate) fn state(migration: &MigrationProgress) -> String {
    state_word(migration.state).replace('_', " ")
}

/// Rows are copied, so that their number says how far it is.
pub(crate) fn copies(migration: &MigrationProgress) -> bool {
    matches!(migration.state(), MigrationState::Pending | MigrationState::Copying | MigrationState::Receiving)
}

/// First and last.
pub(crate) fn slots(migration: &MigrationProgress) -> String {
    let slots = migration.spec.as_ref().and_then(|spec| spec.slots);
    SlotRange::from_wire(slots).map_or_else(|_| NONE.to_owned(), |slots| slots.to_string())
}

/// `n1 -> n2`.
pub(crate) fn nodes(migration: &MigrationProgress) -> String {
    let spec = migration.spec.clone().unwrap_or_default();
    let node = |id: &str| if id.is_empty() { "?".to_owned() } else { safe(id) };
    format!("{} -> {}", node(&spec.source_node_id), node(&spec.target_node_id))
}

/// `1234 changes, 1.2 MiB, 35 ms behind`, as far as it is known.
pub(crate) fn lag(lag: &MigrationLag) -> Option<String> {
    let MigrationLag { entries, bytes: size, age_ms } = *lag;
    let mut parts = Vec::new();
    parts.extend(entries.map(|entries| format!("{entries} changes")));
    parts.extend(size.map(bytes));
    parts.extend(age_ms.map(|age| format!("{age} ms")));
    (!parts.is_empty()).then(|| format!("{} behind", parts.join(", ")))
}

/// `1.00 MiB of ~4.00 MiB (25 %)`.
fn amount(done: u64, total: Option<u64>, is_estimate: bool, unit: impl Fn(u64) -> String) -> String {
    match total {
        Some(total) => {
            let about = if is_estimate { "~" } else { "" };
            format!("{} of {about}{} ({} %)", unit(done), unit(total), share(done, total, is_estimate))
        }
        None => unit(done),
    }
}

/// An estimate that was reached says nothing about being done.
fn share(done: u64, total: u64, is_estimate: bool) -> u64 {
    let share = percent(done, total);
    if is_estimate && total > 0 { share.min(99) } else { share }
}

/// What is moved per second and how long it may take, while something moves.
pub(crate) fn pace(progress: &Progress) -> String {
    let mut text = String::new();
    if progress.finished_unix_ms.is_some() {
        return text;
    }
    if let Some(now) = progress.bytes_per_second {
        let _ = write!(text, ", {}", rate(now));
    }
    if let Some(left) = progress.eta_ms {
        let _ = write!(text, ", {} left", countdown(Duration::from_millis(left)));
    }
    text
}

/// Copied so far: `1.00 MiB of ~4.00 MiB (25 %)`.
pub(crate) fn copied(progress: &Progress) -> String {
    amount(progress.bytes_done, progress.bytes_total, progress.total_is_estimate, bytes)
}

/// One line about where a migration is.
pub(crate) fn line(migration: &MigrationProgress) -> String {
    let progress = migration.progress.clone().unwrap_or_default();
    let mut line = state(migration);
    let behind = migration.lag.as_ref().and_then(lag);
    match migration.state() {
        MigrationState::Copying | MigrationState::Receiving => {
            let _ = write!(line, " {}", copied(&progress));
            line.push_str(&pace(&progress));
        }
        MigrationState::CatchingUp | MigrationState::Ready => {
            line.push_str(&behind.map_or_else(String::new, |behind| format!(", {behind}")));
            line.push_str(&pace(&progress));
        }
        MigrationState::Freezing | MigrationState::Committing => {
            let _ = write!(line, ", freeze {}", migration.freeze_count);
        }
        _ => {}
    }
    if migration.not_converging {
        line.push_str(", NOT CONVERGING");
    }
    if migration.copy > 1 {
        let _ = write!(line, ", copy {}", migration.copy);
    }
    if let Some(error) = progress.error {
        let _ = write!(line, ": {} ({})", safe(&error.message), safe(&error.reason));
    }
    line
}

/// What there is to say at the end: `handed over slots 0-99 from n1 to n2 in 12 s; writes were held for 8 ms`.
pub(crate) fn completed(migration: &MigrationProgress) -> String {
    let progress = migration.progress.clone().unwrap_or_default();
    let end = progress.finished_unix_ms.unwrap_or(progress.last_activity_unix_ms);
    let took = Duration::from_millis(end.saturating_sub(progress.started_unix_ms));
    let freezes = match migration.freeze_count {
        0 | 1 => String::new(),
        count => format!(" (the longest of {count} freezes)"),
    };
    format!(
        "handed over slots {} {} in {}: {} keys, {}; writes were held for {} ms{freezes}",
        slots(migration),
        nodes(migration),
        time(took),
        progress.items_done,
        bytes(progress.bytes_done),
        migration.max_freeze_ms
    )
}

fn row(migration: &MigrationProgress, now: u64) -> [String; 10] {
    let progress = migration.progress.clone().unwrap_or_default();
    let known = |text: Option<String>| text.unwrap_or_else(|| NONE.to_owned());
    let runs = progress.finished_unix_ms.is_none();
    let age = migration.lag.as_ref().and_then(|lag| lag.age_ms).filter(|_| runs);
    let state = state_word(migration.state) + if migration.not_converging { " !" } else { "" };
    [
        safe(&migration.migration_id),
        direction_word(progress.direction),
        state,
        slots(migration),
        progress.bytes_total.map_or_else(
            || bytes(progress.bytes_done),
            |total| format!("{} %", share(progress.bytes_done, total, progress.total_is_estimate && runs)),
        ),
        known(age.map(|age| format!("{age} ms"))),
        known(progress.bytes_per_second.filter(|_| runs).map(rate)),
        known(progress.eta_ms.filter(|_| runs).map(|left| countdown(Duration::from_millis(left)))),
        nodes(migration),
        since(progress.started_unix_ms, now),
    ]
}

fn error(migration: &MigrationProgress) -> Option<String> {
    let error = migration.progress.as_ref()?.error.as_ref()?;
    Some(why(error))
}

fn why(error: &TaskError) -> String {
    format!("{} ({})", safe(&error.message), safe(&error.reason))
}

/// For a terminal of that width; an error has a line of its own below the table.
pub(crate) fn table(migrations: &[MigrationProgress], width: u16) -> String {
    let now = now_unix_ms();
    let rows: Vec<_> = migrations.iter().map(|migration| row(migration, now)).collect();
    let mut text = grid::fit(&HEADER, &rows, &DISPENSABLE, width);
    for migration in migrations {
        if let Some(error) = error(migration) {
            // Writing to a `String` cannot fail.
            let _ = writeln!(text, "\n{}: {error}", safe(&migration.migration_id));
        }
    }
    text
}

/// For a pipe: one line each, columns separated by tabs, the error last.
pub(crate) fn lines(migrations: &[MigrationProgress]) -> String {
    let now = now_unix_ms();
    let mut text = format!("{}\tERROR\n", HEADER.join("\t"));
    for migration in migrations {
        let error = error(migration).unwrap_or_else(|| NONE.to_owned());
        let _ = writeln!(text, "{}\t{error}", row(migration, now).join("\t"));
    }
    text
}

fn identity(identity: Option<&NodeIdentity>) -> Option<String> {
    let identity = identity?;
    Some(format!("{}, store {}", safe(&identity.node_id), hex(&identity.store_id)))
}

fn gate(migration: &MigrationProgress) -> String {
    let means = match migration.gate() {
        MigrationGate::Open => ": this node serves the slots",
        MigrationGate::WritesHeld => ": this node serves reads, writes wait",
        MigrationGate::Closed => ": reads and writes wait for the outcome",
        MigrationGate::Moved => ": clients are redirected",
        MigrationGate::Unspecified => "",
    };
    gate_word(migration.gate).replace('_', " ") + means
}

fn freeze(freeze: &FreezeAttempt) -> String {
    let took = freeze.freeze_ms.map_or_else(|| "so far".to_owned(), |ms| format!("{ms} ms"));
    let mut text = format!(
        "{}: {took} {} (drain {}, flush {}, prepare {}, commit {} ms), {} requests held, attempt {}",
        freeze.freeze,
        outcome_word(freeze.outcome).replace('_', " "),
        freeze.drain_ms,
        freeze.flush_ms,
        freeze.prepare_ms,
        freeze.commit_ms,
        freeze.held_requests,
        freeze.attempt
    );
    if let Some(error) = &freeze.error {
        let _ = write!(text, ": {}", why(error));
    }
    text
}

/// All that is known of one migration, one fact per line.
pub(crate) fn facts(migration: &MigrationProgress) -> String {
    let now = now_unix_ms();
    let progress = migration.progress.clone().unwrap_or_default();
    let spec = migration.spec.clone().unwrap_or_default();
    let ago = |at: u64| format!("{} ago", since(at, now));
    let mut facts: Vec<(&str, String)> = vec![
        ("migration", safe(&migration.migration_id)),
        ("direction", direction_word(progress.direction)),
        ("state", format!("{}, for {}", state(migration), since(progress.phase_started_unix_ms, now))),
        ("gate", gate(migration)),
        ("decision", decision_word(migration.decision)),
        ("slots", format!("{}, epoch {}", slots(migration), migration.slot_epoch)),
        ("nodes", nodes(migration)),
        ("shards", format!("{} -> {}", safe(&spec.source_shard_id), safe(&spec.target_shard_id))),
    ];
    facts.extend(identity(migration.reporter.as_ref()).map(|text| ("reporter", text)));
    facts.extend(identity(migration.peer.as_ref()).map(|text| ("peer", text)));
    if !migration.target_address.is_empty() {
        facts.push(("target at", safe(&migration.target_address)));
    }
    let (is_estimate, count) = (progress.total_is_estimate, |keys: u64| format!("{keys}"));
    facts.push(("keys", amount(progress.items_done, progress.items_total, is_estimate, count)));
    facts.push(("bytes", copied(&progress)));
    facts.push(("changes", format!("{}, {}", migration.delta_entries, bytes(migration.delta_bytes))));
    facts.extend(migration.lag.as_ref().and_then(lag).map(|text| ("lag", text)));
    if migration.not_converging {
        let long = migration.not_converging_since_unix_ms.map(|at| format!(" for {}", since(at, now)));
        let text = format!("not{}: changes come in faster than they go out", long.unwrap_or_default());
        facts.push(("converging", text));
    }
    let pace = pace(&progress);
    if !pace.is_empty() {
        facts.push(("rate", pace.trim_start_matches(", ").to_owned()));
    }
    facts.push((
        "throttled",
        format!(
            "{} ms at the source, {} ms at the target; writers slowed by {} ms",
            migration.source_throttled_ms, migration.target_throttled_ms, migration.writers_slowed_ms
        ),
    ));
    if progress.direction() == Direction::Out {
        let cap = bytes(migration.log_bytes_cap);
        facts.push(("change log", format!("{} of at most {cap}", bytes(migration.log_bytes))));
    }
    facts.push(("on the wire", bytes(migration.wire_bytes)));
    facts.push((
        "attempt",
        format!("{}, {}", migration.attempt, if migration.connected { "connected" } else { "not connected" }),
    ));
    let again = if migration.copy_reason.is_empty() {
        String::new()
    } else {
        format!(", started again: {}", safe(&migration.copy_reason))
    };
    facts.push(("copy", format!("{}{again}", migration.copy)));
    facts.push(("priority", priority_word(migration.priority)));
    let limits = migration.limits.unwrap_or_default();
    let most = limits.max_bytes_per_second.filter(|most| *most > 0);
    let held = limits.freeze_timeout_ms.map(|ms| format!(", freeze at most {ms} ms"));
    facts.push(("limits", most.map_or_else(|| "no rate".to_owned(), rate) + &held.unwrap_or_default()));
    let how = if spec.auto_complete { "as soon as it is ready" } else { "when `migrate complete` says so" };
    facts.push(("hand-over", how.to_owned()));
    if let Some(at) = migration.complete_deadline_unix_ms {
        facts.push(("complete", format!("asked for, until {} from now", since(now, at))));
    }
    facts.extend(migration.clock_skew_ms.map(|skew| ("clock skew", format!("{skew} ms"))));
    facts.push(("started", ago(progress.started_unix_ms)));
    for phase in &migration.phases {
        let state = state_word(phase.state).replace('_', " ");
        facts.push(("phase", format!("{state}, began {}", ago(phase.started_unix_ms))));
    }
    for attempt in &migration.freezes {
        facts.push(("freeze", freeze(attempt)));
    }
    if migration.freeze_count > 0 {
        let text = format!("{}, the longest {} ms", migration.freeze_count, migration.max_freeze_ms);
        facts.push(("freezes", text));
    }
    match progress.finished_unix_ms {
        Some(finished) => {
            let took = Duration::from_millis(finished.saturating_sub(progress.started_unix_ms));
            facts.push(("ended", format!("{}, after {}", ago(finished), time(took))));
        }
        None => facts.push(("last moved", ago(progress.last_activity_unix_ms))),
    }
    for incident in &migration.incidents {
        let error = incident.error.clone().unwrap_or_default();
        facts.push((
            "survived",
            format!("{}, attempt {}: {}", ago(incident.at_unix_ms), incident.attempt, why(&error)),
        ));
    }
    if let Some(mismatch) = &migration.mismatch {
        let keys = |side: &Option<proto::node::SlotDigest>| side.as_ref().map_or(0, |side| side.keys);
        facts.push((
            "mismatch",
            format!(
                "slot {}: {} keys at the source, {} at the target; {} slots differ",
                mismatch.slot,
                keys(&mismatch.source),
                keys(&mismatch.target),
                mismatch.slots_differing
            ),
        ));
    }
    if !migration.cancelled_at_node_id.is_empty() || !migration.cancel_reason.is_empty() {
        let reason = if migration.cancel_reason.is_empty() { "no reason" } else { &migration.cancel_reason };
        facts.push(("cancelled", format!("at {}: {}", safe(&migration.cancelled_at_node_id), safe(reason))));
    }
    if let Some(reason) = &migration.resolved_reason {
        facts.push(("resolved", format!("by an operator: {}", safe(reason))));
    }
    facts.extend(error(migration).map(|text| ("error", text)));
    facts.into_iter().map(|(name, value)| format!("{name:<11} {value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use proto::node::{MigrationSpec, SlotRange};

    use super::*;

    const HOSTILE: &str = "x\x1b[2J\u{9b}31m\u{202e}y\r\n\tz";

    fn migration(id: &str) -> MigrationProgress {
        MigrationProgress {
            migration_id: id.to_owned(),
            state: MigrationState::CatchingUp.into(),
            not_converging: true,
            spec: Some(MigrationSpec {
                slots: Some(SlotRange { start: 10_000, end: 16_384 }),
                source_node_id: "node-with-a-long-name-1".to_owned(),
                target_node_id: "node-with-a-long-name-2".to_owned(),
                ..MigrationSpec::default()
            }),
            lag: Some(MigrationLag { entries: Some(1), bytes: Some(2), age_ms: Some(123_456) }),
            progress: Some(Progress {
                bytes_done: 4 << 30,
                bytes_total: Some(4 << 30),
                total_is_estimate: true,
                bytes_per_second: Some(100 << 20),
                eta_ms: Some(60_000),
                started_unix_ms: 1,
                ..Progress::default()
            }),
            ..MigrationProgress::default()
        }
    }

    #[test]
    fn a_terminal_of_80_columns_is_enough() {
        let id = "drain-0123456789abcdef-1";
        let text = table(&[migration(id), migration("m-0123456789abcdef")], 80);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(
            text.contains(id) && text.contains("catching_up !") && text.contains("10000-16383"),
            "{text}"
        );
        let wide = table(&[migration(id)], 300);
        assert!(wide.lines().next().unwrap().ends_with("AGE"), "{wide}");
    }

    #[test]
    fn an_estimate_that_is_reached_is_not_100_percent() {
        let progress = migration("m1").progress.unwrap();
        assert_eq!(copied(&progress), "4.00 GiB of ~4.00 GiB (99 %)");
        assert!(line(&migration("m1")).contains("NOT CONVERGING"));
    }

    #[test]
    fn what_a_peer_says_has_no_escape_codes() {
        let text = |text: &str| text.to_owned();
        let error = TaskError { reason: text(HOSTILE), message: text(HOSTILE), ..TaskError::default() };
        let hostile = MigrationProgress {
            migration_id: text(HOSTILE),
            state: 99,
            gate: 99,
            copy_reason: text(HOSTILE),
            cancel_reason: text(HOSTILE),
            cancelled_at_node_id: text(HOSTILE),
            resolved_reason: Some(text(HOSTILE)),
            target_address: text(HOSTILE),
            peer: Some(NodeIdentity { node_id: text(HOSTILE), ..NodeIdentity::default() }),
            spec: Some(MigrationSpec {
                source_shard_id: text(HOSTILE),
                source_node_id: text(HOSTILE),
                ..MigrationSpec::default()
            }),
            freezes: vec![FreezeAttempt { error: Some(error.clone()), ..FreezeAttempt::default() }],
            progress: Some(Progress { error: Some(error), ..Progress::default() }),
            ..MigrationProgress::default()
        };
        let of = std::slice::from_ref(&hostile);
        for text in [facts(&hostile), table(of, 80), lines(of), line(&hostile), completed(&hostile)] {
            let odd = |c: char| (c.is_control() && c != '\n' && c != '\t') || c == '\u{202e}';
            assert!(!text.contains(odd), "{text:?}");
        }
    }
}

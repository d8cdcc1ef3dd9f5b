//! Nodes as tables, and why they are as they are below.

use std::fmt::Write as _;
use std::time::Duration;

use proto::common::error::Error;
use proto::common::text::printable;
use proto::node::{
    ActiveTask, Direction, DiskStatus, GetNodeStatusResponse, HealthCheckResponse, HealthReport, NodeState,
    NodeStatus, Progress, ReplyOrigin,
};

use crate::grid::{self, NONE};
use crate::human::{cause, percent, safe};
use crate::node_document::{state_word, status_word};
use crate::nodes::Answered;

/// What stands for the state of a node that did not answer.
const NO_ANSWER: &str = "no answer";
/// Longest ID in a table; the JSON has it whole.
const ID_LEN: usize = 20;

const STATUS: [&str; 10] = ["NODE", "STATE", "UP", "SLOTS", "KEYS", "DISK", "CPU", "MEM", "MOVING", "HEALTH"];
/// At 80 columns all of them fit, unless names are long.
const STATUS_DISPENSABLE: [&str; 4] = ["UP", "CPU", "MEM", "DISK"];

const HEALTH: [&str; 4] = ["NODE", "ADDRESS", "STATE", "HEALTH"];
const HEALTH_DISPENSABLE: [&str; 1] = ["ADDRESS"];

/// `nodectl status` on a terminal.
pub(crate) fn status(answers: &[Answered<GetNodeStatusResponse>], width: u16) -> String {
    let rows: Vec<_> = answers.iter().map(status_row).collect();
    let mut text = grid::fit(&STATUS, &rows, &STATUS_DISPENSABLE, width);
    reasons(&mut text, answers.iter().map(|one| (status_name(one), status_reasons(one))));
    text
}

/// `nodectl status` in a pipe: one line each, columns separated by tabs, the reasons last.
pub(crate) fn status_lines(answers: &[Answered<GetNodeStatusResponse>]) -> String {
    let mut text = format!("{}\tWHY\n", STATUS.join("\t"));
    for one in answers {
        // Writing to a `String` cannot fail.
        let _ = writeln!(text, "{}\t{}", status_row(one).join("\t"), or_none(status_reasons(one).join("; ")));
    }
    text
}

/// `nodectl health` on a terminal.
pub(crate) fn health(answers: &[Answered<HealthCheckResponse>], width: u16) -> String {
    let rows: Vec<_> = answers.iter().map(health_row).collect();
    let mut text = grid::fit(&HEALTH, &rows, &HEALTH_DISPENSABLE, width);
    reasons(&mut text, answers.iter().map(|one| (health_name(one), health_reasons(one))));
    text
}

/// `nodectl health` in a pipe.
pub(crate) fn health_lines(answers: &[Answered<HealthCheckResponse>]) -> String {
    let mut text = format!("{}\tWHY\n", HEALTH.join("\t"));
    for one in answers {
        // Writing to a `String` cannot fail.
        let _ = writeln!(text, "{}\t{}", health_row(one).join("\t"), or_none(health_reasons(one).join("; ")));
    }
    text
}

fn reasons(text: &mut String, all: impl Iterator<Item = (String, Vec<String>)>) {
    let mut first = true;
    for (name, reasons) in all {
        for reason in reasons {
            if std::mem::take(&mut first) {
                text.push('\n');
            }
            // Writing to a `String` cannot fail.
            let _ = writeln!(text, "{name}: {reason}");
        }
    }
}

fn or_none(text: String) -> String {
    if text.is_empty() { NONE.to_owned() } else { text }
}

fn id(id: &str) -> String {
    or_none(printable(id, ID_LEN))
}

/// The node's ID; of one that did not answer, its address.
fn name<T>(one: &Answered<T>, origin: impl Fn(&T) -> Option<&ReplyOrigin>) -> String {
    let identity = one.answer.as_ref().ok().and_then(origin).and_then(|origin| origin.identity.as_ref());
    identity.map_or_else(|| one.address.clone(), |identity| id(&identity.node_id))
}

fn status_name(one: &Answered<GetNodeStatusResponse>) -> String {
    name(one, |answer| answer.origin.as_ref())
}

fn health_name(one: &Answered<HealthCheckResponse>) -> String {
    name(one, |answer| answer.origin.as_ref())
}

fn status_row(one: &Answered<GetNodeStatusResponse>) -> [String; 10] {
    let none = || NONE.to_owned();
    let Ok(answer) = &one.answer else {
        let mut row = std::array::from_fn(|_| none());
        row[0] = one.address.clone();
        row[1] = NO_ANSWER.to_owned();
        return row;
    };
    let status = answer.status.clone().unwrap_or_default();
    let machine = status.machine.clone().unwrap_or_default();
    let uptime = answer.origin.as_ref().map_or(0, |origin| origin.uptime_ms);
    [
        status_name(one),
        short_state(status.state),
        short_time(Duration::from_millis(uptime)),
        status.slots_owned.to_string(),
        status.keys.map_or_else(none, short_count),
        machine.disks.first().map_or_else(none, disk_used),
        machine.cpu_percent.map_or_else(none, |percent| format!("{percent:.0}%")),
        machine.process_memory_bytes.map_or_else(none, short_bytes),
        moving(&status),
        status.health.as_ref().map_or_else(none, |health| status_word(health.status)),
    ]
}

/// `1/2`: one in, two out.
fn moving(status: &NodeStatus) -> String {
    let tasks = status.transfers.iter().chain(&status.migrations);
    let direction = |task: &&ActiveTask| task.progress.as_ref().map(Progress::direction);
    let out = tasks.clone().filter(|task| direction(task) == Some(Direction::Out)).count();
    let all = tasks.count();
    if all == 0 { NONE.to_owned() } else { format!("{}/{out}", all - out) }
}

/// Narrow enough for the table.
fn short_state(state: i32) -> String {
    if state == i32::from(NodeState::ShuttingDown) { "stopping".to_owned() } else { state_word(state) }
}

fn disk_used(disk: &DiskStatus) -> String {
    let used = disk.total_bytes.saturating_sub(disk.available_bytes);
    if disk.total_bytes == 0 { NONE.to_owned() } else { format!("{}%", percent(used, disk.total_bytes)) }
}

/// In four characters or so: `17s`, `5m`, `3h`, `12d`.
fn short_time(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..60 => format!("{seconds}s"),
        seconds @ 60..3600 => format!("{}m", seconds / 60),
        seconds @ 3600..86_400 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

/// `999`, `1.2k`, `34M`: at most four characters.
fn short_count(count: u64) -> String {
    short(count, 1000, &["", "k", "M", "G", "T", "P", "E"])
}

/// `999B`, `1.2K`, `340M`, in powers of 1024.
fn short_bytes(bytes: u64) -> String {
    short(bytes, 1024, &["B", "K", "M", "G", "T", "P", "E"])
}

fn short(value: u64, base: u64, units: &[&str]) -> String {
    let (mut scale, mut unit) = (1_u64, 0);
    while value / scale >= base && unit + 1 < units.len() {
        scale = scale.saturating_mul(base);
        unit += 1;
    }
    let whole = value / scale;
    if unit > 0 && whole < 10 {
        // Rounded down, as everything else here: 9.99 is not 10.
        format!("{whole}.{}{}", (value % scale) * 10 / scale, units[unit])
    } else {
        format!("{whole}{}", units[unit])
    }
}

/// Why it is not well, what cannot move by itself, and what it does.
fn status_reasons(one: &Answered<GetNodeStatusResponse>) -> Vec<String> {
    let answer = match &one.answer {
        Ok(answer) => answer,
        Err(error) => return vec![refusal(error, &one.address)],
    };
    let status = answer.status.clone().unwrap_or_default();
    let mut reasons = Vec::new();
    if let Some(health) = status.health.as_ref().filter(|health| !health.message.is_empty()) {
        reasons.push(safe(&health.message));
    }
    if let Some(drain) = &status.drain {
        reasons.push(format!(
            "drain: {} transfers and {} migrations still run",
            drain.active_transfers, drain.active_migrations
        ));
    }
    let stuck = status.transfers.iter().chain(&status.migrations).filter(|task| task.needs_operator);
    reasons.extend(
        stuck.map(|task| format!("{} is {} and waits for an operator", safe(&task.id), safe(&task.phase))),
    );
    if status.safe_to_remove {
        reasons.push("owns no slot and nothing moves: safe to remove".to_owned());
    }
    reasons
}

fn health_row(one: &Answered<HealthCheckResponse>) -> [String; 4] {
    match &one.answer {
        Ok(answer) => [
            health_name(one),
            one.address.clone(),
            state_word(answer.origin.as_ref().map_or(0, |origin| origin.state)),
            answer.health.as_ref().map_or_else(|| NONE.to_owned(), |health| status_word(health.status)),
        ],
        Err(_) => [one.address.clone(), one.address.clone(), NO_ANSWER.to_owned(), NONE.to_owned()],
    }
}

fn health_reasons(one: &Answered<HealthCheckResponse>) -> Vec<String> {
    match &one.answer {
        Ok(answer) => {
            let health: HealthReport = answer.health.clone().unwrap_or_default();
            if health.message.is_empty() { Vec::new() } else { vec![safe(&health.message)] }
        }
        Err(error) => vec![refusal(error, &one.address)],
    }
}

/// Why it did not answer.
fn refusal(error: &Error, address: &str) -> String {
    let text = cause(error, address);
    text.strip_prefix(&format!("{address}: ")).map(str::to_owned).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use proto::common::error::CommonReason;
    use proto::node::{MachineStatus, NodeIdentity};

    use super::*;

    fn answer(node_id: &str) -> Answered<GetNodeStatusResponse> {
        let identity = NodeIdentity { node_id: node_id.into(), ..Default::default() };
        let origin = ReplyOrigin { identity: Some(identity), uptime_ms: 90_061_000, ..Default::default() };
        let task = |direction: Direction| ActiveTask {
            progress: Some(Progress { direction: direction.into(), ..Default::default() }),
            ..Default::default()
        };
        let status = NodeStatus {
            state: NodeState::ShuttingDown.into(),
            slots_owned: 16_384,
            keys: Some(123_456_789),
            machine: Some(MachineStatus {
                cpu_percent: Some(100.0),
                process_memory_bytes: Some(1 << 35),
                disks: vec![DiskStatus { total_bytes: 100, available_bytes: 1, ..Default::default() }],
                ..Default::default()
            }),
            transfers: vec![task(Direction::In), task(Direction::Out)],
            health: Some(HealthReport { status: 3, message: "disk: slow".into(), ..Default::default() }),
            ..Default::default()
        };
        let answer =
            GetNodeStatusResponse { origin: Some(origin), status: Some(status), ..Default::default() };
        Answered { address: "127.0.0.1:7101".into(), answer: Ok(answer) }
    }

    #[test]
    fn a_full_row_fits_80_columns() {
        let error =
            Error::new(CommonReason::Unavailable, "cannot connect to 127.0.0.1:17102: Connection refused");
        let away = Answered { address: "127.0.0.1:17102".into(), answer: Err(error) };
        let text = status(&[answer("node-1"), away], 80);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.iter().all(|line| line.chars().count() <= 80), "{text}");
        for column in STATUS {
            assert!(lines[0].contains(column), "{column}: {text}");
        }
        for cell in ["node-1", "stopping", "1d", "16384", "123M", "99%", "100%", "32G", "1/1", "unhealthy"] {
            assert!(lines[1].contains(cell), "{cell}: {text}");
        }
        assert!(lines[2].starts_with("127.0.0.1:17102  no answer"), "{text}");
        assert_eq!(lines[4], "node-1: disk: slow");
        assert_eq!(lines[5], "127.0.0.1:17102: connection refused");
    }

    #[test]
    fn long_names_are_cut_and_columns_go() {
        let text = status(&[answer(&"x".repeat(128))], 80);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(text.contains("HEALTH"));
    }

    #[test]
    fn short_numbers() {
        assert_eq!(
            [0, 999, 1000, 1_250, 9_999, 10_000, 123_456_789].map(short_count),
            ["0", "999", "1.0k", "1.2k", "9.9k", "10k", "123M"]
        );
        assert_eq!(short_bytes(u64::MAX), "15E");
        assert_eq!(short_bytes(80 << 20), "80M");
    }
}

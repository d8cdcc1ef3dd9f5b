//! Transfers as a table, and one as a list of facts.

use std::fmt::Write as _;
use std::time::Duration;

use proto::common::clock::now_unix_ms;
use proto::common::slots::SlotRange;
use proto::node::{Direction, TransferProgress};

use crate::document::{direction_word, phase_word};
use crate::grid::{self, NONE};
use crate::human::{bytes, countdown, files, left, percent, rate, safe, since, speed};

const HEADER: [&str; 10] = ["ID", "DIR", "PHASE", "DONE", "SIZE", "RATE", "LEFT", "SLOTS", "SHARDS", "AGE"];

fn row(transfer: &TransferProgress, now: u64) -> [String; 10] {
    let progress = transfer.progress.clone().unwrap_or_default();
    let known = |text: Option<String>| text.unwrap_or_else(|| NONE.to_owned());
    [
        safe(&transfer.transfer_id),
        direction_word(progress.direction),
        phase_word(transfer.phase),
        progress.bytes_total.map_or_else(
            || bytes(progress.bytes_done),
            |total| format!("{} %", percent(progress.bytes_done, total)),
        ),
        known(progress.bytes_total.map(bytes)),
        known(speed(transfer).map(rate)),
        known(left(transfer).map(countdown)),
        known(slots(transfer)),
        format!("{} -> {}", safe(&transfer.source_shard_id), safe(&transfer.target_shard_id)),
        since(progress.started_unix_ms, now),
    ]
}

fn slots(transfer: &TransferProgress) -> Option<String> {
    SlotRange::from_wire(transfer.slots).ok().map(|slots| slots.to_string())
}

/// Columns that go, in this order, where the terminal is too narrow: an ID that is broken in two cannot be copied.
const DISPENSABLE: [&str; 6] = ["AGE", "LEFT", "SLOTS", "SIZE", "SHARDS", "RATE"];

/// For a terminal of that width; the error of a transfer has a line of its own below the table.
pub(crate) fn table(transfers: &[TransferProgress], width: u16) -> String {
    let now = now_unix_ms();
    let rows: Vec<_> = transfers.iter().map(|transfer| row(transfer, now)).collect();
    let mut text = grid::fit(&HEADER, &rows, &DISPENSABLE, width);
    for transfer in transfers {
        if let Some(error) = transfer.progress.as_ref().and_then(|progress| progress.error.as_ref()) {
            let id = safe(&transfer.transfer_id);
            // Writing to a `String` cannot fail.
            let _ = writeln!(text, "\n{id}: {} ({})", safe(&error.message), safe(&error.reason));
        }
    }
    text
}

/// For a pipe: one line each, columns separated by tabs, the error last.
pub(crate) fn lines(transfers: &[TransferProgress]) -> String {
    let now = now_unix_ms();
    let mut text = format!("{}\tERROR\n", HEADER.join("\t"));
    for transfer in transfers {
        let error = transfer.progress.as_ref().and_then(|progress| progress.error.as_ref());
        let error = error.map_or_else(|| NONE.to_owned(), |error| safe(&error.message));
        // Writing to a `String` cannot fail.
        let _ = writeln!(text, "{}\t{error}", row(transfer, now).join("\t"));
    }
    text
}

/// All that a person wants to know of one transfer, one fact per line.
pub(crate) fn facts(transfer: &TransferProgress) -> String {
    let now = now_unix_ms();
    let progress = transfer.progress.clone().unwrap_or_default();
    let node = |id: &str| if id.is_empty() { "?".to_owned() } else { safe(id) };
    let mut facts: Vec<(&str, String)> = vec![
        ("transfer", safe(&transfer.transfer_id)),
        ("direction", direction_word(progress.direction)),
        (
            "phase",
            format!("{}, for {}", phase_word(transfer.phase), since(progress.phase_started_unix_ms, now)),
        ),
        ("shards", format!("{} -> {}", safe(&transfer.source_shard_id), safe(&transfer.target_shard_id))),
        ("slots", slots(transfer).unwrap_or_else(|| NONE.to_owned())),
        ("nodes", format!("{} -> {}", node(&transfer.source_node_id), node(&transfer.target_node_id))),
        ("snapshot", format!("index {}, term {}", transfer.snapshot_index, transfer.snapshot_term)),
    ];
    let done = progress.bytes_total.map_or_else(
        || bytes(progress.bytes_done),
        |total| {
            let done = percent(progress.bytes_done, total);
            format!("{} of {} ({done} %)", bytes(progress.bytes_done), bytes(total))
        },
    );
    let count = progress
        .items_total
        .map_or_else(String::new, |total| format!(", {} of {} complete", progress.items_done, files(total)));
    facts.push(("done", done + &count));
    if let Some(now) = speed(transfer) {
        let left = left(transfer).map(|left| format!(", {} left", countdown(left)));
        facts.push(("rate", rate(now) + &left.unwrap_or_default()));
    }
    let wire = if progress.direction() == Direction::Out { "sent" } else { "received" };
    facts.push((wire, bytes(transfer.wire_bytes)));
    if transfer.reused_bytes > 0 {
        facts.push(("reused", bytes(transfer.reused_bytes)));
    }
    facts.push((
        "attempt",
        format!(
            "{}, connections so far {}, streams now {}",
            transfer.attempt, transfer.connections, transfer.lanes
        ),
    ));
    facts.push(("started", format!("{} ago", since(progress.started_unix_ms, now))));
    if let Some(finished) = progress.finished_unix_ms {
        let took = Duration::from_millis(finished.saturating_sub(progress.started_unix_ms));
        facts.push(("ended", format!("{} ago, after {}", since(finished, now), crate::human::time(took))));
    } else {
        facts.push(("last moved", format!("{} ago", since(progress.last_activity_unix_ms, now))));
    }
    if let Some(expires) = transfer.expires_unix_ms {
        facts.push(("expires", format!("in {}", since(now, expires))));
    }
    if let Some(error) = progress.error {
        facts.push(("error", format!("{} ({})", safe(&error.message), safe(&error.reason))));
    }
    facts.into_iter().map(|(name, value)| format!("{name:<11} {value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use proto::node::{Progress, SlotRange, TaskError, TransferPhase};

    use super::*;

    fn transfer() -> TransferProgress {
        TransferProgress {
            transfer_id: "t1".to_owned(),
            phase: TransferPhase::Transferring.into(),
            source_shard_id: "s1".to_owned(),
            target_shard_id: "s2\x1b[2J\tx".to_owned(),
            slots: Some(SlotRange { start: 8192, end: 16384 }),
            progress: Some(Progress {
                bytes_done: 1 << 20,
                bytes_total: Some(4 << 20),
                error: Some(TaskError {
                    message: "odd\nnews".to_owned(),
                    reason: "ODD".to_owned(),
                    ..TaskError::default()
                }),
                ..Progress::default()
            }),
            ..TransferProgress::default()
        }
    }

    #[test]
    fn what_a_peer_says_stays_in_its_cell() {
        let text = lines(&[transfer()]);
        assert!(!text.contains('\x1b'));
        let cells: Vec<Vec<&str>> = text.lines().map(|line| line.split('\t').collect()).collect();
        assert_eq!(cells.len(), 2, "{text}");
        assert_eq!(cells[0].len(), cells[1].len(), "{text}");
        assert_eq!(
            &cells[1][..8],
            ["t1", "unspecified", "transferring", "25 %", "4.00 MiB", "-", "-", "8192-16383"]
        );
        assert_eq!(cells[1][10], "odd\\nnews");
    }

    #[test]
    fn a_table_has_no_escape_codes_either() {
        for text in [table(&[transfer()], 200), facts(&transfer())] {
            assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
            assert!(text.contains("8192-16383") && text.contains("odd\\nnews (ODD)"), "{text}");
        }
        assert!(table(&[transfer()], 200).starts_with("ID "));
    }

    #[test]
    fn a_narrow_terminal_gets_fewer_columns_and_whole_ids() {
        let id = "push-dcf6cc96ec081f1acd8d";
        let transfer = TransferProgress { transfer_id: id.to_owned(), ..TransferProgress::default() };
        let header = |width| {
            let text = table(std::slice::from_ref(&transfer), width);
            assert!(text.contains(id), "{text}");
            text.lines().next().unwrap_or_default().to_owned()
        };
        assert!(header(200).contains("SLOTS") && header(200).ends_with("AGE"));
        let narrow = header(70);
        assert!(narrow.len() <= 70 && narrow.contains("DONE") && !narrow.contains("AGE"), "{narrow}");
        assert!(header(1).ends_with("DONE"));
    }
}

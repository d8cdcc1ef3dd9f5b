//! Numbers and states as people read them.

use std::time::Duration;

use proto::common::error::Error;
use proto::common::text::printable;
use proto::node::{TransferPhase, TransferProgress};

use crate::document::{millis, phase_word};

/// Most bytes of a peer's text in a line or cell.
const SHOWN: usize = 512;

/// A peer's text, made harmless.
pub(crate) fn safe(text: &str) -> String {
    printable(text, SHOWN)
}

/// `1.5 GiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    indicatif::BinaryBytes(bytes).to_string()
}

/// `1.5 GiB/s`.
pub(crate) fn rate(bytes_per_second: u64) -> String {
    format!("{}/s", bytes(bytes_per_second))
}

/// `0.4 s`, `12 s`, `3 min 20 s`, `5 min`, `2 h 5 min`, `3 d 4 h`.
pub(crate) fn time(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let two = |large: String, small: u64, unit: &str| {
        if small == 0 { large } else { format!("{large} {small} {unit}") }
    };
    if seconds < 10 {
        format!("{}.{} s", seconds, duration.subsec_millis() / 100)
    } else if minutes == 0 {
        format!("{seconds} s")
    } else if hours == 0 {
        two(format!("{minutes} min"), seconds % 60, "s")
    } else if days == 0 {
        two(format!("{hours} h"), minutes % 60, "min")
    } else {
        two(format!("{days} d"), hours % 24, "h")
    }
}

/// Whole seconds, rounded up: a countdown that ends at 0.
pub(crate) fn countdown(duration: Duration) -> String {
    let seconds = millis(duration).div_ceil(1000);
    if seconds < 60 { format!("{seconds} s") } else { time(Duration::from_secs(seconds)) }
}

/// How long ago, or how long until then, by this machine's clock.
pub(crate) fn since(unix_ms: u64, now_ms: u64) -> String {
    if unix_ms == 0 {
        return "-".to_owned();
    }
    countdown(Duration::from_secs(now_ms.saturating_sub(unix_ms) / 1000))
}

/// `1 file`, `5 files`.
pub(crate) fn files(count: u64) -> String {
    if count == 1 { "1 file".to_owned() } else { format!("{count} files") }
}

/// What is moved per second; only of a transfer in which something moves.
pub(crate) fn speed(transfer: &TransferProgress) -> Option<u64> {
    transfer.progress.as_ref()?.bytes_per_second.filter(|_| moves(transfer))
}

/// How long it may still take; only of a transfer in which something moves.
pub(crate) fn left(transfer: &TransferProgress) -> Option<Duration> {
    transfer.progress.as_ref()?.eta_ms.filter(|_| moves(transfer)).map(Duration::from_millis)
}

/// A node may remember the pace of a transfer whose sender is gone.
fn moves(transfer: &TransferProgress) -> bool {
    !matches!(transfer.phase(), TransferPhase::Pending | TransferPhase::Interrupted)
}

/// Percent done, 0 to 100; of nothing, all is done. Only what is complete is 100.
pub(crate) fn percent(done: u64, total: u64) -> u64 {
    if done >= total {
        return 100;
    }
    let percent = u128::from(done) * 100 / u128::from(total);
    u64::try_from(percent).unwrap_or(100)
}

/// ` 58 %  1.2 GiB of 2.0 GiB`.
pub(crate) fn done(done: u64, total: u64) -> String {
    format!("{:>3} %  {} of {}", percent(done, total), bytes(done), bytes(total))
}

/// One line about where a transfer is: `transferring 1.2 GiB of 2.0 GiB (58 %), 103 MiB/s, 8 s left`.
pub(crate) fn line(transfer: &TransferProgress) -> String {
    let progress = transfer.progress.clone().unwrap_or_default();
    let mut line = phase_word(transfer.phase);
    line.push(' ');
    line.push_str(&bytes(progress.bytes_done));
    if let Some(total) = progress.bytes_total {
        line.push_str(&format!(" of {} ({} %)", bytes(total), percent(progress.bytes_done, total)));
    }
    line.push_str(&pace(transfer));
    if let Some(error) = progress.error {
        line.push_str(&format!(": {}", safe(&error.message)));
    }
    line
}

/// `, 103 MiB/s, 8 s left`, as far as it is known.
pub(crate) fn pace(transfer: &TransferProgress) -> String {
    let mut text = String::new();
    if let Some(now) = speed(transfer) {
        text.push_str(&format!(", {}", rate(now)));
    }
    if let Some(left) = left(transfer) {
        text.push_str(&format!(", {} left", countdown(left)));
    }
    text
}

/// Why a connection could not be made, in few words: tonic and the operating system like to say more.
pub(crate) fn cause(error: &Error, address: &str) -> String {
    let text = error.message();
    let text = text.strip_prefix(&format!("cannot connect to {address}: ")).unwrap_or(text);
    let text = text.strip_prefix("transport error: ").unwrap_or(text);
    let text = text.split(" (os error").next().unwrap_or(text);
    let mut chars = text.chars();
    // "Connection refused" in the middle of a sentence; but "DNS ..." stays.
    match (chars.next(), chars.clone().next()) {
        (Some(first), Some(second)) if first.is_ascii_uppercase() && second.is_lowercase() => {
            safe(&format!("{}{}", first.to_ascii_lowercase(), chars.as_str()))
        }
        _ => safe(text),
    }
}

#[cfg(test)]
mod tests {
    use proto::common::error::CommonReason;
    use proto::node::{Progress, TaskError};

    use super::*;

    #[test]
    fn sizes_and_times() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(3 << 29), "1.50 GiB");
        assert_eq!(time(Duration::from_secs(300)), "5 min");
        let shown =
            [0, 450, 9_990, 59_999, 200_000, 7_500_000, 277_200_000].map(Duration::from_millis).map(time);
        assert_eq!(shown, ["0.0 s", "0.4 s", "9.9 s", "59 s", "3 min 20 s", "2 h 5 min", "3 d 5 h"]);
        assert_eq!(countdown(Duration::from_millis(1001)), "2 s");
        assert_eq!(percent(0, 0), 100);
        assert_eq!(percent(u64::MAX - 1, u64::MAX), 99);
    }

    #[test]
    fn a_line_says_what_is_known() {
        let mut transfer = TransferProgress {
            phase: TransferPhase::Transferring.into(),
            progress: Some(Progress { bytes_done: 1 << 20, ..Progress::default() }),
            ..TransferProgress::default()
        };
        assert_eq!(line(&transfer), "transferring 1.00 MiB");
        let progress = transfer.progress.as_mut().unwrap();
        progress.bytes_total = Some(2 << 20);
        progress.bytes_per_second = Some(1 << 20);
        progress.eta_ms = Some(1000);
        assert_eq!(line(&transfer), "transferring 1.00 MiB of 2.00 MiB (50 %), 1.00 MiB/s, 1 s left");
        transfer.progress = Some(Progress {
            error: Some(TaskError { message: "bad\x1b[2J".to_owned(), ..TaskError::default() }),
            ..Progress::default()
        });
        assert_eq!(line(&transfer), "transferring 0 B: bad\\u{1b}[2J");
    }

    #[test]
    fn causes_are_short() {
        let error = |text: &str| Error::new(CommonReason::Unavailable, text);
        let refused = error("cannot connect to n1:1: Connection refused (os error 111)");
        assert_eq!(cause(&refused, "n1:1"), "connection refused");
        assert_eq!(cause(&error("DNS is down"), "n1:1"), "DNS is down");
    }
}

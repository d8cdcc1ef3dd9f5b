//! One end of one transfer: what its process is told, and what it answers. Shared with the programs of other packages.

use std::io::{BufRead as _, Write as _};

use nix::sys::resource::{UsageWho, getrusage};
use serde::{Deserialize, Serialize};

/// What a process is told on its command line.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Side {
    /// Who plays it.
    pub peer: String,
    /// Where the other end listens; a receiver has none.
    pub address: Option<String>,
    /// Bytes to move, over all files.
    pub bytes: u64,
    /// Bytes of a message or a write.
    pub chunk: usize,
    /// Files that they are divided into.
    pub files: u64,
    /// Connections.
    pub lanes: u32,
    /// Where to read or write; memory where there is none.
    pub path: Option<std::path::PathBuf>,
}

/// What a process took.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Usage {
    /// User and system time, in seconds.
    pub cpu_s: f64,
    /// Most memory that was resident, in bytes.
    pub peak_rss: u64,
    /// How much of it was resident before the transfer began.
    pub idle_rss: u64,
}

/// What a sender answers.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Sent {
    /// From the first call to the receiver's confirmation.
    pub seconds: f64,
    /// What it took.
    pub usage: Usage,
}

/// Where the clocks stood when the transfer began.
#[derive(Debug, Clone, Copy)]
pub struct Before {
    cpu_s: f64,
    rss: u64,
}

impl Before {
    /// Now.
    pub fn now() -> Self {
        Self { cpu_s: cpu(UsageWho::RUSAGE_SELF), rss: memory("VmRSS:") }
    }

    /// What was taken since.
    pub fn usage(self) -> Usage {
        Usage {
            cpu_s: cpu(UsageWho::RUSAGE_SELF) - self.cpu_s,
            peak_rss: memory("VmHWM:"),
            idle_rss: self.rss,
        }
    }
}

/// User and system time, in seconds.
pub fn cpu(who: UsageWho) -> f64 {
    let usage = getrusage(who).expect("getrusage knows its own process");
    [usage.user_time(), usage.system_time()]
        .iter()
        .map(|time| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6)
        .sum()
}

/// A line of `/proc/self/status`, in bytes.
fn memory(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib =
        status.lines().find_map(|line| line.strip_prefix(field)?.split_whitespace().next()?.parse().ok());
    kib.unwrap_or(0_u64) * 1024
}

/// Prints one line to the parent.
pub fn say(line: impl std::fmt::Display) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).expect("the parent listens");
}

/// Tells where it listens, waits for the parent to ask, and answers what was taken meanwhile.
pub fn report_when_asked(address: impl std::fmt::Display) {
    let before = Before::now();
    say(address);
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).expect("the parent asks");
    say(serde_json::to_string(&before.usage()).expect("numbers can be written"));
}

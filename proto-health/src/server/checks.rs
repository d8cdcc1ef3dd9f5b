//! Checks that most nodes need.
//!
//! None of them belongs to liveness: a restart cures neither a disk nor load.

use std::io::{self, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use proto_common::clock::unix_ms;

use crate::server::check::{Check, CheckResult};
use crate::v1::Measurement;

/// What a disk is written to with: one page, as the smallest record of a log would be.
const WRITE_BYTES: usize = 4096;
/// The file that is written, in the directory that is checked.
const PROBE_FILE: &str = ".health-write-probe";

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Writes and syncs 4 KiB in a directory and measures how long that takes: what a log record costs at this moment. A disk that
/// cannot be written to is UNHEALTHY, a slow one DEGRADED, with the number. Clones are the same check.
#[derive(Debug, Clone)]
pub struct SyncedWrite {
    path: Arc<PathBuf>,
    degraded_at: Duration,
    unhealthy_at: Option<Duration>,
    last: Arc<Mutex<Option<WriteProbe>>>,
}

/// The last result of a [`SyncedWrite`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WriteProbe {
    /// How long write and sync took; `None` if they failed.
    pub latency: Option<Duration>,
}

impl SyncedWrite {
    /// Of the disk that holds `directory`. DEGRADED from 250 ms on: 25 times what
    /// [etcd](https://etcd.io/docs/v3.5/faq/) wants of the 99th percentile, so that it means a disk that is ill, not one that is busy.
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        Self {
            path: Arc::new(directory.join(PROBE_FILE)),
            degraded_at: Duration::from_millis(250),
            unhealthy_at: None,
            last: Arc::default(),
        }
    }

    /// From which latency on it is DEGRADED, and from which UNHEALTHY, if ever.
    #[must_use]
    pub fn bounds(mut self, degraded_at: Duration, unhealthy_at: Option<Duration>) -> Self {
        self.degraded_at = degraded_at;
        self.unhealthy_at = unhealthy_at;
        self
    }

    /// The last result, if there is one.
    #[must_use]
    pub fn last(&self) -> Option<WriteProbe> {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The check.
    #[must_use]
    pub fn check(&self) -> Check {
        let probe = self.clone();
        Check::blocking(move || probe.run())
    }

    fn run(&self) -> CheckResult {
        let began = Instant::now();
        let written = write_synced(&self.path);
        let took = began.elapsed();
        let latency = written.is_ok().then_some(took);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(WriteProbe { latency });
        // Which directory that is, the name of the check says as far as peers have to know; the log has it.
        if let Err(error) = written {
            tracing::warn!(path = %self.path.display(), %error, "cannot write");
            return CheckResult::unhealthy(format!("cannot write to the disk: {error}"));
        }
        let measurement = Measurement {
            value: ms(took),
            unit: "ms".to_owned(),
            degraded_at: Some(ms(self.degraded_at)),
            unhealthy_at: self.unhealthy_at.map(ms),
            lower_is_worse: false,
        };
        CheckResult::measured(measurement, format!("a synced write took {:.0} ms", ms(took)))
    }
}

fn write_synced(path: &Path) -> io::Result<()> {
    let mut file = std::fs::File::options().create(true).truncate(false).write(true).open(path)?;
    file.rewind()?;
    file.write_all(&[0; WRITE_BYTES])?;
    file.sync_data()
}

/// Size and free space of a file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Its size.
    pub total: u64,
    /// What this process may still write.
    pub available: u64,
}

/// The space of the file system that holds `path`.
///
/// # Errors
///
/// It is not there.
pub fn space(path: &Path) -> io::Result<Space> {
    let found = rustix::fs::statvfs(path)?;
    Ok(Space {
        total: found.f_blocks.saturating_mul(found.f_frsize),
        available: found.f_bavail.saturating_mul(found.f_frsize),
    })
}

/// Free space of the file system that holds `directory`, in percent: DEGRADED at `degraded_at` or less, UNHEALTHY at
/// `unhealthy_at` or less.
#[must_use]
pub fn free_space(directory: &Path, degraded_at: f64, unhealthy_at: f64) -> Check {
    let directory = directory.to_owned();
    Check::blocking(move || {
        let Space { total, available } = match space(&directory) {
            Ok(space) => space,
            Err(error) => {
                tracing::warn!(path = %directory.display(), %error, "cannot ask for the space");
                return CheckResult::undecided(format!("cannot ask for the space of the disk: {error}"));
            }
        };
        #[allow(clippy::cast_precision_loss, reason = "a percentage")]
        let percent = if total == 0 { 0.0 } else { available as f64 / total as f64 * 100.0 };
        let measurement = Measurement {
            value: percent,
            unit: "percent".to_owned(),
            degraded_at: Some(degraded_at),
            unhealthy_at: Some(unhealthy_at),
            lower_is_worse: true,
        };
        let what = format!("{percent:.1} % of the disk is free ({} MiB)", available >> 20);
        CheckResult::measured(measurement, what)
    })
}

/// How long a task that is due waits until the runtime runs it: the longest of several short sleeps' delays. DEGRADED from
/// `degraded_at` on: somebody blocks the runtime's threads, or there is more work than they can do.
#[must_use]
pub fn event_loop_lag(degraded_at: Duration) -> Check {
    const SLEEPS: u32 = 10;
    const SLEEP: Duration = Duration::from_millis(10);
    Check::new(move || async move {
        let mut lag = Duration::ZERO;
        for _ in 0..SLEEPS {
            let began = tokio::time::Instant::now();
            tokio::time::sleep(SLEEP).await;
            lag = lag.max(began.elapsed().saturating_sub(SLEEP));
        }
        let measurement = Measurement {
            value: ms(lag),
            unit: "ms".to_owned(),
            degraded_at: Some(ms(degraded_at)),
            unhealthy_at: None,
            lower_is_worse: false,
        };
        CheckResult::measured(measurement, format!("tasks wait up to {:.0} ms for a thread", ms(lag)))
    })
}

/// Too many failures lately: DEGRADED when `count` finds `degraded_at` or more of them since `window` ago. `count` gets that
/// time in milliseconds since the Unix epoch; `what` says what has failed, such as "transfers".
pub fn recent_failures(
    what: &'static str,
    window: Duration,
    degraded_at: u32,
    count: impl Fn(u64) -> u64 + Send + Sync + 'static,
) -> Check {
    let count = Arc::new(count);
    Check::new(move || {
        let count = Arc::clone(&count);
        async move {
            let since = SystemTime::now().checked_sub(window).map_or(0, unix_ms);
            let failed = count(since);
            #[allow(clippy::cast_precision_loss, reason = "a count of failures is small")]
            let measurement = Measurement {
                value: failed as f64,
                unit: "count".to_owned(),
                degraded_at: Some(degraded_at.max(1).into()),
                unhealthy_at: None,
                lower_is_worse: false,
            };
            let minutes = window.as_secs().div_ceil(60);
            CheckResult::measured(measurement, format!("{failed} {what} failed in the last {minutes} min"))
        }
    })
}

#[cfg(test)]
#[path = "checks_tests.rs"]
mod tests;

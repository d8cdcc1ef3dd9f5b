//! One component: results come in, a status comes out, and one bad result does not make it flap.

use std::time::Duration;

use proto_common::clock::{millis, now_unix_ms};
use proto_common::ids::ComponentName;
use proto_common::text::printable;
use proto_common::v1::TaskError;
use tokio::time::Instant;
use tokio_util::sync::DropGuard;

use crate::server::check::{CheckResult, Schedule};
use crate::v1::{ComponentHealth, HealthProbe, HealthStatus, Measurement};

/// A result older than so many intervals says nothing any more.
const STALE_INTERVALS: u32 = 3;

/// What a component is, before anything is known of its health.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Component {
    pub(crate) name: ComponentName,
    pub(crate) critical: bool,
    pub(crate) probes: Vec<HealthProbe>,
}

impl Component {
    /// A component that is not critical and counts for readiness.
    #[must_use]
    pub fn new(name: ComponentName) -> Self {
        Self { name, critical: false, probes: vec![HealthProbe::Readiness] }
    }

    /// Without it the node does not work: if it is UNHEALTHY, so is every probe that it counts for.
    #[must_use]
    pub fn critical(mut self) -> Self {
        self.critical = true;
        self
    }

    /// The probes that it counts for. Nothing that a restart does not cure belongs to liveness: no peers, quorum, disk space
    /// or load. What counts for startup has to work once before the node is RUNNING.
    #[must_use]
    pub fn counts_for(mut self, probes: impl IntoIterator<Item = HealthProbe>) -> Self {
        self.probes = probes.into_iter().filter(|probe| *probe != HealthProbe::Unspecified).collect();
        self.probes.sort_unstable();
        self.probes.dedup();
        self
    }
}

/// How one run of a check ended.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    pub(crate) result: CheckResult,
    pub(crate) took: Duration,
    pub(crate) timed_out: bool,
    pub(crate) panicked: bool,
}

/// Results in a row. A result that could not decide (UNDECIDED) interrupts a row of successes; it counts neither for nor
/// against UNHEALTHY.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Rows {
    /// HEALTHY or DEGRADED.
    works: u32,
    /// HEALTHY.
    healthy: u32,
    /// Anything but HEALTHY.
    not_healthy: u32,
    /// Neither HEALTHY nor DEGRADED.
    failures: u32,
    /// UNHEALTHY, since the last that worked.
    unhealthy: u32,
    /// UNDECIDED.
    undecided: u32,
}

impl Rows {
    fn count(&mut self, result: HealthStatus) {
        let up = |row: u32, counts: bool| if counts { row.saturating_add(1) } else { 0 };
        self.works = up(self.works, result.works());
        self.healthy = up(self.healthy, result == HealthStatus::Healthy);
        self.not_healthy = up(self.not_healthy, result != HealthStatus::Healthy);
        self.failures = up(self.failures, !result.works());
        self.undecided = up(self.undecided, result == HealthStatus::Undecided);
        if result.works() {
            self.unhealthy = 0;
        } else if result == HealthStatus::Unhealthy {
            self.unhealthy = self.unhealthy.saturating_add(1);
        }
    }

    /// The status after `result`, which is counted already.
    fn decide(&self, before: HealthStatus, schedule: &Schedule) -> HealthStatus {
        let bad = schedule.failure_threshold.max(1);
        let good = schedule.success_threshold.max(1);
        if self.works > 0 {
            if self.healthy >= good {
                HealthStatus::Healthy
            } else if self.works >= good && !before.works()
                || before == HealthStatus::Healthy && self.not_healthy >= bad
            {
                HealthStatus::Degraded
            } else {
                before
            }
        } else if self.undecided >= bad {
            HealthStatus::Undecided
        } else if self.unhealthy >= bad {
            HealthStatus::Unhealthy
        } else if self.failures >= bad && before != HealthStatus::Unhealthy {
            HealthStatus::Undecided
        } else if before == HealthStatus::Healthy && self.not_healthy >= bad {
            HealthStatus::Degraded
        } else {
            before
        }
    }
}

/// What is known of the check behind a component.
#[derive(Debug)]
struct Checked {
    schedule: Schedule,
    rows: Rows,
    last: Option<Last>,
    last_success_unix_ms: Option<u64>,
    last_error: Option<TaskError>,
}

#[derive(Debug)]
struct Last {
    at: Instant,
    unix_ms: u64,
    took: Duration,
    status: HealthStatus,
    timed_out: bool,
    panicked: bool,
    measurement: Option<Measurement>,
}

/// A component and its health.
#[derive(Debug)]
pub(crate) struct Cell {
    pub(crate) component: Component,
    /// After thresholds, before staleness.
    status: HealthStatus,
    message: String,
    since_unix_ms: u64,
    /// Whether it was stale when it was last looked at.
    stale: bool,
    check: Option<Checked>,
    /// Ends the check when the component is removed.
    _stop: Option<DropGuard>,
}

impl Cell {
    /// A component that the node sets itself.
    pub(crate) fn by_hand(component: Component, status: HealthStatus, message: String) -> Self {
        Self {
            component,
            status,
            message,
            since_unix_ms: now_unix_ms(),
            stale: false,
            check: None,
            _stop: None,
        }
    }

    /// A component with a check, of which there is no result yet.
    pub(crate) fn checked(component: Component, schedule: Schedule, stop: Option<DropGuard>) -> Self {
        let check = Checked {
            schedule,
            rows: Rows::default(),
            last: None,
            last_success_unix_ms: None,
            last_error: None,
        };
        let message = "there is no result yet".to_owned();
        Self { check: Some(check), _stop: stop, ..Self::by_hand(component, HealthStatus::Undecided, message) }
    }

    /// Sets the health of a component without a check.
    pub(crate) fn set(&mut self, status: HealthStatus, message: String) {
        if status != self.status {
            self.since_unix_ms = now_unix_ms();
        }
        self.status = status;
        self.message = message;
    }

    /// Takes a result in.
    pub(crate) fn record(&mut self, outcome: Outcome, now: Instant, message_bytes: usize) {
        let Some(check) = &mut self.check else { return };
        let Outcome { result, took, timed_out, panicked } = outcome;
        let CheckResult { status, message, measurement, error } = result;
        let message = printable(&message, message_bytes);
        let unix_ms = now_unix_ms();
        check.rows.count(status);
        if status.works() {
            check.last_success_unix_ms = Some(unix_ms);
        } else {
            let mut error: TaskError = error.into();
            error.message = if error.message.is_empty() {
                message.clone()
            } else {
                printable(&error.message, message_bytes)
            };
            check.last_error = Some(error);
        }
        check.last = Some(Last { at: now, unix_ms, took, status, timed_out, panicked, measurement });
        let decided = check.rows.decide(self.status, &check.schedule);
        if decided != self.status {
            self.since_unix_ms = unix_ms;
        }
        let row = if status.works() { check.rows.works } else { check.rows.failures };
        self.message = if decided == status {
            message
        } else if decided == HealthStatus::Healthy {
            // One bad result is not worth a word; the fields about the check have it.
            String::new()
        } else if message.is_empty() {
            format!("last result {} ({row} in a row)", status.short_name())
        } else {
            printable(
                &format!("last result {} ({row} in a row): {message}", status.short_name()),
                message_bytes,
            )
        };
        self.status = decided;
    }

    /// When the last result will be stale.
    pub(crate) fn stale_at(&self) -> Option<Instant> {
        let check = self.check.as_ref()?;
        Some(check.last.as_ref()?.at + check.schedule.interval * STALE_INTERVALS)
    }

    /// The status at `now`, and why.
    pub(crate) fn verdict(&mut self, now: Instant) -> (HealthStatus, String) {
        let stale = self.stale_at().is_some_and(|at| now > at);
        if stale != self.stale {
            self.stale = stale;
            self.since_unix_ms = now_unix_ms();
        }
        if stale { (HealthStatus::Undecided, stale_message()) } else { (self.status, self.message.clone()) }
    }

    /// Since when the status is what it is.
    pub(crate) fn since_unix_ms(&self) -> u64 {
        self.since_unix_ms
    }

    /// All about it, as of `now`.
    pub(crate) fn to_wire(&self, now: Instant) -> ComponentHealth {
        let stale = self.stale_at().is_some_and(|at| now > at);
        let mut wire = ComponentHealth {
            name: self.component.name.to_string(),
            status: if stale { HealthStatus::Undecided } else { self.status }.into(),
            message: if stale { stale_message() } else { self.message.clone() },
            critical: self.component.critical,
            probes: self.component.probes.iter().map(|probe| i32::from(*probe)).collect(),
            set_by_hand: self.check.is_none(),
            since_unix_ms: self.since_unix_ms,
            stale,
            ..ComponentHealth::default()
        };
        let Some(check) = &self.check else { return wire };
        let Checked { schedule, rows, last, last_success_unix_ms, last_error } = check;
        if let Some(last) = last {
            wire.checked_unix_ms = Some(last.unix_ms);
            wire.age_ms = Some(millis(now.saturating_duration_since(last.at)));
            wire.last_result = last.status.into();
            wire.took_ms = Some(millis(last.took));
            wire.timed_out = last.timed_out;
            wire.panicked = last.panicked;
            wire.measurement.clone_from(&last.measurement);
        }
        wire.consecutive_failures = rows.failures;
        wire.consecutive_successes = rows.works;
        wire.failure_threshold = schedule.failure_threshold.max(1);
        wire.success_threshold = schedule.success_threshold.max(1);
        wire.interval_ms = millis(schedule.interval);
        wire.timeout_ms = millis(schedule.timeout);
        wire.last_success_unix_ms = *last_success_unix_ms;
        wire.last_error.clone_from(last_error);
        wire
    }
}

fn stale_message() -> String {
    "the last result is older than three intervals".to_owned()
}

#[cfg(test)]
#[path = "component_tests.rs"]
mod tests;

//! Checks: what they are, what they say, how often they run.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use proto_common::error::{CommonReason, Error};
use tokio::task::JoinHandle;

use crate::v1::{HealthStatus, Measurement};

/// What a check found.
#[derive(Debug, Clone)]
pub struct CheckResult {
    /// HEALTHY, DEGRADED, UNHEALTHY, or UNDECIDED if it could not find out.
    pub status: HealthStatus,
    /// Why, in a sentence for people; empty if all is well.
    pub message: String,
    /// The number behind it.
    pub measurement: Option<Measurement>,
    /// The error to remember, unless the check succeeded; its message may be empty, then `message` counts.
    pub error: Error,
}

impl CheckResult {
    fn new(status: HealthStatus, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            measurement: None,
            error: Error::new(CommonReason::Internal, String::new()),
        }
    }

    /// All is well.
    #[must_use]
    pub fn healthy() -> Self {
        Self::new(HealthStatus::Healthy, "")
    }

    /// It works, but something is wrong.
    #[must_use]
    pub fn degraded(message: impl Into<String>) -> Self {
        Self::new(HealthStatus::Degraded, message)
    }

    /// It does not work.
    #[must_use]
    pub fn unhealthy(message: impl Into<String>) -> Self {
        Self::new(HealthStatus::Unhealthy, message)
    }

    /// It could not be found out.
    #[must_use]
    pub fn undecided(message: impl Into<String>) -> Self {
        Self::new(HealthStatus::Undecided, message)
    }

    /// DEGRADED or UNHEALTHY from the bounds of `measurement`, else HEALTHY. `what` is a sentence that holds the number.
    #[must_use]
    pub fn measured(measurement: Measurement, what: impl Into<String>) -> Self {
        let reached = |bound: Option<f64>| {
            bound.is_some_and(|bound| {
                if measurement.lower_is_worse {
                    measurement.value <= bound
                } else {
                    measurement.value >= bound
                }
            })
        };
        let result = if reached(measurement.unhealthy_at) {
            Self::unhealthy(what)
        } else if reached(measurement.degraded_at) {
            Self::degraded(what)
        } else {
            Self::healthy()
        };
        Self { measurement: Some(measurement), ..result }
    }

    /// With an error that programs can read.
    #[must_use]
    pub fn because(mut self, error: Error) -> Self {
        self.error = error;
        self
    }
}

/// UNHEALTHY with the error's sentence, or HEALTHY.
impl From<Result<(), Error>> for CheckResult {
    fn from(result: Result<(), Error>) -> Self {
        match result {
            Ok(()) => Self::healthy(),
            Err(error) => Self::unhealthy(error.message().to_owned()).because(error),
        }
    }
}

/// When a check runs, and how many results make a status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// Time between the starts of two runs. Default 5 s. A result is stale after three of them.
    pub interval: Duration,
    /// Longest time that a run may take; one that takes longer is UNHEALTHY. Default 2 s.
    pub timeout: Duration,
    /// So many results in a row make the status worse. Default 3; 0 counts as 1.
    pub failure_threshold: u32,
    /// So many results in a row make it better. Default 1; 0 counts as 1.
    pub success_threshold: u32,
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(2),
            failure_threshold: 3,
            success_threshold: 1,
        }
    }
}

type Running = Pin<Box<dyn Future<Output = CheckResult> + Send>>;

/// A check that can be run again and again. Two runs of it never overlap, also when one hangs.
#[derive(Clone)]
pub struct Check(Work);

#[derive(Clone)]
enum Work {
    Async(Arc<dyn Fn() -> Running + Send + Sync>),
    Blocking(Arc<dyn Fn() -> CheckResult + Send + Sync>),
}

impl Check {
    /// A check that waits. It is cancelled at its next `await` when its time is up.
    pub fn new<F, Fut>(check: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = CheckResult> + Send + 'static,
    {
        Self(Work::Async(Arc::new(move || Box::pin(check()))))
    }

    /// A check that blocks its thread, such as one that writes to a disk; it runs on tokio's blocking threads. One that
    /// hangs keeps one of them, and no more than one.
    pub fn blocking(check: impl Fn() -> CheckResult + Send + Sync + 'static) -> Self {
        Self(Work::Blocking(Arc::new(check)))
    }

    pub(crate) fn start(&self) -> JoinHandle<CheckResult> {
        match &self.0 {
            Work::Async(check) => {
                let check = Arc::clone(check);
                // Made in the task, so that a panic in there is contained as well.
                tokio::spawn(async move { check().await })
            }
            Work::Blocking(check) => {
                let check = Arc::clone(check);
                tokio::task::spawn_blocking(move || check())
            }
        }
    }
}

impl std::fmt::Debug for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.0 {
            Work::Async(_) => "Check::new(..)",
            Work::Blocking(_) => "Check::blocking(..)",
        })
    }
}

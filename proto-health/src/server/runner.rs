//! Runs one check on its schedule. Whatever the check does, a result comes out in time.

use std::time::Duration;

use proto_common::error::{Code, Error};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::server::check::{Check, CheckResult, Schedule};
use crate::server::component::Outcome;

/// A run that has not ended. Dropping it cancels the run, as far as that can be cancelled.
struct Run {
    handle: JoinHandle<CheckResult>,
    began: Instant,
}

impl Drop for Run {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

/// Runs `check` until `stop`, or until `report` says that nobody wants to know any more.
pub(crate) async fn run(
    check: Check,
    schedule: Schedule,
    stop: CancellationToken,
    mut report: impl FnMut(Outcome) -> bool,
) {
    // A run that did not end in time, and has not ended since.
    let mut hanging: Option<Run> = None;
    loop {
        let began = Instant::now();
        let outcome = tokio::select! {
            () = stop.cancelled() => return,
            outcome = attempt(&check, &schedule, &mut hanging) => outcome,
        };
        if !report(outcome) {
            return;
        }
        // At least a little pause, whatever the schedule says.
        let next = (began + schedule.interval).max(Instant::now() + Duration::from_millis(1));
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep_until(next) => {}
        }
    }
}

async fn attempt(check: &Check, schedule: &Schedule, hanging: &mut Option<Run>) -> Outcome {
    if let Some(run) = hanging.take_if(|run| !run.handle.is_finished()) {
        let took = run.began.elapsed();
        *hanging = Some(run);
        return timed_out(took, "hangs since it was started");
    }
    *hanging = None;
    let mut run = Run { handle: check.start(), began: Instant::now() };
    match tokio::time::timeout(schedule.timeout, &mut run.handle).await {
        Ok(Ok(result)) => Outcome { result, took: run.began.elapsed(), timed_out: false, panicked: false },
        Ok(Err(error)) => {
            let what =
                if error.is_panic() { panic_text(error.into_panic()) } else { "it was cancelled".to_owned() };
            let message = format!("the check panicked: {what}");
            let error = Error::with_code(Code::Internal, "CHECK_PANICKED", message.clone());
            let result = CheckResult::unhealthy(message).because(error);
            Outcome { result, took: run.began.elapsed(), timed_out: false, panicked: true }
        }
        Err(_) => {
            let took = run.began.elapsed();
            run.handle.abort();
            *hanging = Some(run);
            timed_out(took, "no result within its timeout")
        }
    }
}

fn timed_out(took: Duration, what: &str) -> Outcome {
    let message = format!("{what}, for {} ms", took.as_millis());
    let error = Error::with_code(Code::DeadlineExceeded, "CHECK_TIMED_OUT", message.clone());
    let result = CheckResult::unhealthy(message).because(error);
    Outcome { result, took, timed_out: true, panicked: false }
}

fn panic_text(panic: Box<dyn std::any::Any + Send>) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}

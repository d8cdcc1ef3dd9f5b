//! How a progress changes: the same at both ends.

use proto_common::clock::now_unix_ms;
use proto_common::error::Error;
use proto_common::text::printable;
use proto_common::v1::{Progress, TaskError};

use crate::v1::{FreezeAttempt, MigrationIncident, MigrationPhaseStart, MigrationProgress, MigrationState};

/// Phases, freezes and incidents that a progress remembers, each.
pub(crate) const REMEMBERED: usize = 64;

/// Text of an error that a progress keeps, in bytes.
pub(crate) const ERROR_TEXT_BYTES: usize = 1024;

/// Reasons of callers that are kept, in bytes.
pub(crate) const REASON_BYTES: usize = 256;

impl MigrationProgress {
    pub(crate) fn task(&mut self) -> &mut Progress {
        self.progress.get_or_insert_default()
    }

    /// Enters a state, now; does nothing where it is in it.
    pub(crate) fn enter(&mut self, state: MigrationState) {
        let now = now_unix_ms();
        self.task().last_activity_unix_ms = now;
        if self.state() == state {
            return;
        }
        self.set_state(state);
        push(&mut self.phases, MigrationPhaseStart { state: state.into(), started_unix_ms: now });
        let task = self.task();
        task.phase_started_unix_ms = now;
        if state.is_final() {
            task.finished_unix_ms = Some(now);
            (task.bytes_per_second, task.eta_ms) = (None, None);
        }
    }

    /// Remembers an error that did not end the task.
    pub(crate) fn incident(&mut self, error: &Error) {
        let incident = MigrationIncident {
            at_unix_ms: now_unix_ms(),
            state: self.state,
            attempt: self.attempt,
            error: Some(kept(error)),
        };
        push(&mut self.incidents, incident);
    }

    pub(crate) fn add_freeze(&mut self, freeze: FreezeAttempt) {
        push(&mut self.freezes, freeze);
    }

    /// What a list shows of it.
    pub(crate) fn without_details(mut self) -> Self {
        self.phases.clear();
        self.freezes.clear();
        self.incidents.clear();
        self
    }
}

fn push<T>(list: &mut Vec<T>, item: T) {
    if list.len() >= REMEMBERED {
        list.drain(..=list.len() - REMEMBERED);
    }
    list.push(item);
}

/// An error as a progress keeps it: its text is cut, since it may be a peer's.
pub(crate) fn kept(error: &Error) -> TaskError {
    let mut kept = TaskError::from(error.clone());
    kept.reason = printable(&kept.reason, 64);
    kept.message = printable(&kept.message, ERROR_TEXT_BYTES);
    kept.metadata = kept
        .metadata
        .into_iter()
        .take(16)
        .map(|(key, value)| (printable(&key, 64), printable(&value, ERROR_TEXT_BYTES)))
        .collect();
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reason;

    #[test]
    fn what_is_remembered_is_bounded_and_the_latest() {
        let mut progress = MigrationProgress::default();
        for attempt in 0..200 {
            progress.attempt = attempt;
            progress.incident(&Reason::StorageFailed.error("x".repeat(5000)));
            progress.enter(if attempt % 2 == 0 { MigrationState::Copying } else { MigrationState::Ready });
        }
        assert_eq!((progress.incidents.len(), progress.phases.len()), (REMEMBERED, REMEMBERED));
        assert_eq!(progress.incidents.last().unwrap().attempt, 199);
        let text = &progress.incidents[0].error.as_ref().unwrap().message;
        assert!(text.len() <= ERROR_TEXT_BYTES);
    }

    #[test]
    fn a_final_state_has_an_end_and_no_forecast() {
        let mut progress = MigrationProgress::default();
        progress.enter(MigrationState::Copying);
        progress.task().eta_ms = Some(5);
        assert_eq!(progress.task().finished_unix_ms, None);
        progress.enter(MigrationState::Completed);
        assert!(progress.task().finished_unix_ms.is_some() && progress.task().eta_ms.is_none());
    }
}

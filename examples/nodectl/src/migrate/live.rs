//! A migration as it goes on: a bar for each phase on a terminal, lines in a pipe, or JSON.

use std::time::{Duration, Instant};

use indicatif::MultiProgress;
use proto::common::clock::millis;
use proto::node::{MigrationProgress, MigrationState};

use super::document::{MigrationDocument, MigrationEventDocument, state_word};
use super::human;
use crate::dial::Wait;
use crate::document::WaitingDocument;
use crate::human::{cause, percent, time};
use crate::live::{Bar, waiting};
use crate::output::Output;
use crate::pace::Pace;

/// Shows one migration until it is dropped; of its bars, a line for each phase that ended stays.
#[derive(Debug)]
pub(crate) struct Live {
    address: String,
    name: Option<String>,
    bar: Option<Bar>,
    pace: Pace,
    phase: Option<(i32, u64)>,
    /// Lag at the beginning of the phase or the largest since, in changes: what the bar measures against.
    most_lag: u64,
}

impl Live {
    /// For the only one, which the node at `address` tells of.
    pub(crate) fn new(output: &Output, address: impl ToString) -> Self {
        Self::with(address.to_string(), None, output.terminal().then(Bar::new))
    }

    /// For one of several, which is called `name` in each line.
    pub(crate) fn among(output: &Output, bars: &MultiProgress, address: impl ToString, name: &str) -> Self {
        let bar = output.terminal().then(|| Bar::among(bars));
        Self::with(address.to_string(), Some(name.to_owned()), bar)
    }

    fn with(address: String, name: Option<String>, bar: Option<Bar>) -> Self {
        Self { address, name, bar, pace: Pace::default(), phase: None, most_lag: 0 }
    }

    fn named(&self, text: &str) -> String {
        self.name.as_ref().map_or_else(|| text.to_owned(), |name| format!("{name}: {text}"))
    }

    /// Brings it up to date.
    pub(crate) fn show(&mut self, output: &mut Output, migration: &MigrationProgress, wait: Option<&Wait>) {
        let progress = migration.progress.clone().unwrap_or_default();
        let lag = migration.lag.and_then(|lag| lag.entries).unwrap_or(0);
        if self.phase.is_none_or(|(state, _)| state != migration.state) {
            self.end_phase(progress.phase_started_unix_ms);
            self.phase = Some((migration.state, progress.phase_started_unix_ms));
            self.most_lag = 0;
        }
        self.most_lag = self.most_lag.max(lag);
        let name = self.name.clone().map_or_else(String::new, |name| format!("{name}: "));
        if let Some(bar) = &mut self.bar {
            match (wait, migration.state(), progress.bytes_total) {
                (Some(wait), ..) => bar.spin(name + &waiting(wait, &self.address)),
                (None, MigrationState::Copying | MigrationState::Receiving, Some(total)) => {
                    let text = format!("{name}{}{}", human::copied(&progress), human::pace(&progress));
                    bar.measure(state_word(migration.state), progress.bytes_done, total, text);
                }
                (None, MigrationState::CatchingUp, _) if self.most_lag > 0 => {
                    let caught_up = self.most_lag - lag;
                    let phase = human::state(migration);
                    let line = human::line(migration);
                    let text = line.strip_prefix(&format!("{phase}, ")).unwrap_or(&line);
                    bar.measure(phase, caught_up, self.most_lag, name + text);
                }
                (None, ..) => bar.spin(name + &human::line(migration)),
            }
            return;
        }
        let percent = match (human::copies(migration), progress.bytes_total) {
            (true, Some(total)) => percent(progress.bytes_done, total),
            _ => 0,
        };
        let state = match wait {
            Some(wait) => format!("waiting: {}", cause(&wait.error, &self.address)),
            None => format!("{} {} {}", migration.state, migration.attempt, migration.not_converging),
        };
        if !self.pace.is_due(Instant::now(), &state, percent) {
            return;
        }
        match (output.json(), wait) {
            (true, Some(wait)) => output.document(&WaitingDocument {
                event: "waiting",
                transfer_id: None,
                migration_id: Some(&migration.migration_id),
                address: &self.address,
                error: (&wait.error).into(),
                next_try_ms: wait.next_try.map(millis),
            }),
            (true, None) => output.document(&MigrationEventDocument {
                event: "progress",
                migration: MigrationDocument::from(migration),
            }),
            (false, Some(wait)) => output.line(&self.named(&waiting(wait, &self.address))),
            (false, None) => output.line(&self.named(&human::line(migration))),
        }
    }

    /// Leaves a line about the phase that was shown until now.
    fn end_phase(&self, ended_unix_ms: u64) {
        let (Some(bar), Some((state, began))) = (&self.bar, self.phase) else { return };
        let took = Duration::from_millis(ended_unix_ms.saturating_sub(began));
        let word = state_word(state).replace('_', " ");
        bar.keep(&self.named(&format!("{word:12} took {}", time(took))));
    }
}

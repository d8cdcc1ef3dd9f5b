//! A transfer as it goes on: a bar on a terminal, lines in a pipe, or JSON.

use std::time::Instant;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use proto::node::{Direction, TransferPhase, TransferProgress};

use crate::dial::Wait;
use crate::document::{EventDocument, TransferDocument, WaitingDocument, phase_word};
use crate::human;
use crate::output::Output;
use crate::pace::Pace;
use proto::common::clock::millis;

/// Redrawn at most this often, per second.
const REDRAW_HZ: u8 = 10;

/// Shows one transfer until it is dropped; then nothing of a bar is left.
#[derive(Debug)]
pub(crate) struct Live {
    address: String,
    bar: Option<Bar>,
    pace: Pace,
}

/// One line of a terminal that is drawn again and again, gone when it is dropped.
#[derive(Debug)]
pub(crate) struct Bar {
    bar: ProgressBar,
    measured: Option<bool>,
}

impl Live {
    /// For a transfer with the node at `address`.
    pub(crate) fn new(output: &Output, address: impl ToString) -> Self {
        let bar = output.terminal().then(Bar::new);
        Self { address: address.to_string(), bar, pace: Pace::default() }
    }

    /// Brings it up to date.
    pub(crate) fn show(&mut self, output: &mut Output, transfer: &TransferProgress, wait: Option<&Wait>) {
        let progress = transfer.progress.clone().unwrap_or_default();
        let percent = progress.bytes_total.map_or(0, |total| human::percent(progress.bytes_done, total));
        let waiting = wait.map(|wait| waiting(wait, &self.address)).or_else(|| self.opening(transfer));
        if let Some(bar) = &mut self.bar {
            match waiting {
                Some(text) => bar.spin(text),
                None => match progress.bytes_total {
                    Some(total) => {
                        let text = human::done(progress.bytes_done, total);
                        let text = format!("{text}{}", human::pace(transfer));
                        bar.measure(phase_word(transfer.phase), progress.bytes_done, total, text);
                    }
                    None => bar.spin(human::line(transfer)),
                },
            }
            return;
        }
        let state = match (wait, &waiting) {
            (Some(wait), _) => format!("waiting: {}", human::cause(&wait.error, &self.address)),
            (None, Some(opening)) => opening.clone(),
            (None, None) => phase_word(transfer.phase),
        };
        if !self.pace.is_due(Instant::now(), &state, percent) {
            return;
        }
        match (output.json(), wait) {
            (true, Some(wait)) => output.document(&WaitingDocument {
                event: "waiting",
                transfer_id: Some(&transfer.transfer_id),
                migration_id: None,
                address: &self.address,
                error: (&wait.error).into(),
                next_try_ms: wait.next_try.map(millis),
            }),
            (true, None) => output.document(&EventDocument {
                event: "progress",
                transfer: TransferDocument::from(transfer),
                installed: None,
            }),
            (false, _) => output.line(&waiting.unwrap_or_else(|| human::line(transfer))),
        }
    }

    /// What a push does before the node has accepted it; nothing moves in that time.
    fn opening(&self, transfer: &TransferProgress) -> Option<String> {
        let progress = transfer.progress.as_ref()?;
        if transfer.phase() != TransferPhase::Pending || progress.direction() != Direction::Out {
            return None;
        }
        Some(match (progress.items_total, transfer.connections) {
            (None, _) => "reading what to send".to_owned(),
            (Some(_), 0) => format!("connecting to {}", self.address),
            (Some(_), _) => format!("asking {} what it lacks", self.address),
        })
    }
}

/// `waiting for n1:7101: connection refused, next try in 2 s`.
pub(crate) fn waiting(wait: &Wait, address: &str) -> String {
    let next = wait
        .next_try
        .map_or_else(|| "trying again".to_owned(), |time| format!("next try in {}", human::countdown(time)));
    format!("waiting for {address}: {}, {next}", human::cause(&wait.error, address))
}

impl Bar {
    /// The only one on standard output.
    pub(crate) fn new() -> Self {
        let target = ProgressDrawTarget::stdout_with_hz(REDRAW_HZ);
        Self { bar: ProgressBar::with_draw_target(None, target), measured: None }
    }

    /// One of several, below each other.
    pub(crate) fn among(bars: &MultiProgress) -> Self {
        Self { bar: bars.add(ProgressBar::no_length()), measured: None }
    }

    /// A line above it, which stays.
    pub(crate) fn keep(&self, line: &str) {
        self.bar.println(line);
    }

    /// Something goes on, and nobody knows for how long.
    pub(crate) fn spin(&mut self, text: String) {
        self.style(false);
        self.bar.set_message(text);
        self.bar.tick();
    }

    /// So much of it is done.
    pub(crate) fn measure(&mut self, phase: String, done: u64, total: u64, text: String) {
        self.style(true);
        self.bar.set_length(total);
        self.bar.set_position(done);
        self.bar.set_prefix(phase);
        self.bar.set_message(text);
    }

    /// With a measure or without; the style is kept where it does not change.
    fn style(&mut self, measured: bool) {
        if self.measured == Some(measured) {
            return;
        }
        self.measured = Some(measured);
        let template = if measured { "{prefix:12} [{bar:30}] {wide_msg}" } else { "{spinner} {wide_msg}" };
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        self.bar.set_style(style.progress_chars("=> ").tick_chars("|/-\\ "));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

//! A transfer as it goes on: a bar on a terminal, lines in a pipe, or JSON.

use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
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

#[derive(Debug)]
struct Bar {
    bar: ProgressBar,
    measured: Option<bool>,
}

impl Live {
    /// For a transfer with the node at `address`.
    pub(crate) fn new(output: &Output, address: impl ToString) -> Self {
        let bar = output.terminal().then(|| Bar {
            bar: ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout_with_hz(REDRAW_HZ)),
            measured: None,
        });
        Self { address: address.to_string(), bar, pace: Pace::default() }
    }

    /// Brings it up to date.
    pub(crate) fn show(&mut self, output: &mut Output, transfer: &TransferProgress, wait: Option<&Wait>) {
        let progress = transfer.progress.clone().unwrap_or_default();
        let percent = progress.bytes_total.map_or(0, |total| human::percent(progress.bytes_done, total));
        let waiting = wait.map(|wait| self.waiting(wait)).or_else(|| self.opening(transfer));
        if let Some(bar) = &mut self.bar {
            match waiting {
                Some(text) => bar.spin(text),
                None => bar.measure(transfer),
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
                transfer_id: &transfer.transfer_id,
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

    /// `waiting for n1:7101: connection refused, next try in 2 s`.
    fn waiting(&self, wait: &Wait) -> String {
        let next = wait.next_try.map_or_else(
            || "trying again".to_owned(),
            |time| format!("next try in {}", human::countdown(time)),
        );
        format!("waiting for {}: {}, {next}", self.address, human::cause(&wait.error, &self.address))
    }
}

impl Bar {
    fn spin(&mut self, text: String) {
        self.style(false);
        self.bar.set_message(text);
        self.bar.tick();
    }

    fn measure(&mut self, transfer: &TransferProgress) {
        let progress = transfer.progress.clone().unwrap_or_default();
        let Some(total) = progress.bytes_total else {
            return self.spin(human::line(transfer));
        };
        self.style(true);
        self.bar.set_length(total);
        self.bar.set_position(progress.bytes_done);
        self.bar.set_prefix(phase_word(transfer.phase));
        self.bar.set_message(format!(
            "{:>3} %  {} of {}{}",
            human::percent(progress.bytes_done, total),
            human::bytes(progress.bytes_done),
            human::bytes(total),
            human::pace(transfer)
        ));
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

impl Drop for Live {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.bar.finish_and_clear();
        }
    }
}

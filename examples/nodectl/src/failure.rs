//! Why a command did not do what it was asked: the exit code, the reason, and what to do about it.

use std::process::ExitCode;

use anstyle::{AnsiColor, Style};
use proto::common::error::{Code, Error};
use proto::common::text::printable;

use crate::document::FailureDocument;
use crate::output::Output;

/// It was tried and did not work.
pub(crate) const FAILED: u8 = 1;
/// The command line asks for something that cannot be; nothing was done.
pub(crate) const USAGE: u8 = 2;
/// A signal stopped it.
pub(crate) const INTERRUPTED: u8 = 130;

/// Most bytes of a message on a terminal; a refused directory may have many entries to name.
const SHOWN: usize = 8 * 1024;

/// How a command ended that did not succeed.
#[derive(Debug)]
pub(crate) struct Failure(Box<Inner>);

#[derive(Debug)]
struct Inner {
    exit: u8,
    error: Error,
    transfer_id: Option<String>,
    migration_id: Option<String>,
    help: Option<String>,
    resume: Option<String>,
    /// The results say it all; what is left is the exit code, and a sentence.
    told: bool,
}

impl Failure {
    fn new(exit: u8, error: Error) -> Self {
        Self(Box::new(Inner {
            exit,
            error,
            transfer_id: None,
            migration_id: None,
            help: None,
            resume: None,
            told: false,
        }))
    }

    /// It was done, and what it found, which is on stdout already, is not what is wished for.
    pub(crate) fn verdict(message: impl Into<String>) -> Self {
        let mut verdict = Self::failed(message);
        verdict.0.told = true;
        verdict
    }

    /// Something on this machine went wrong.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(FAILED, Error::with_code(Code::Internal, "LOCAL_FAILURE", message))
    }

    /// The command line asks for what cannot be.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(USAGE, Error::with_code(Code::InvalidArgument, "WRONG_USAGE", message))
    }

    /// A signal came first.
    pub(crate) fn interrupted(message: impl Into<String>) -> Self {
        Self::new(INTERRUPTED, Error::with_code(Code::Cancelled, "INTERRUPTED", message))
    }

    /// Which transfer it was about.
    pub(crate) fn about(mut self, id: impl Into<String>) -> Self {
        self.0.transfer_id = Some(id.into());
        self
    }

    /// Which migration it was about.
    pub(crate) fn about_migration(mut self, id: impl Into<String>) -> Self {
        self.0.migration_id = Some(id.into());
        self
    }

    /// What to do.
    pub(crate) fn help(mut self, help: Option<String>) -> Self {
        self.0.help = help;
        self
    }

    /// The command that goes on where it stopped.
    pub(crate) fn resume(mut self, command: impl Into<String>) -> Self {
        self.0.resume = Some(command.into());
        self
    }

    /// Tells the user and returns the exit code: sentences on stderr, and with `--json` a document on stdout.
    pub(crate) fn report(&self, output: &mut Output) -> ExitCode {
        let Inner { exit, error, transfer_id, migration_id, help, resume, told } = &*self.0;
        if output.json() && !told {
            output.document(&FailureDocument {
                event: if *exit == INTERRUPTED { "interrupted" } else { "failed" },
                transfer_id: transfer_id.as_deref(),
                migration_id: migration_id.as_deref(),
                error: error.into(),
                help: help.as_deref(),
                resume: resume.as_deref(),
            });
        }
        let red = Style::new().bold().fg_color(Some(AnsiColor::Red.into()));
        let bold = Style::new().bold();
        let message = printable(error.message(), SHOWN);
        if *exit == INTERRUPTED {
            anstream::eprintln!("{message}");
        } else {
            anstream::eprintln!("{red}error:{red:#} {message}");
        }
        if *exit == FAILED && error.reason() != "LOCAL_FAILURE" {
            let facts: Vec<String> =
                error.metadata_map().iter().map(|(name, value)| format!("{name} {value}")).collect();
            let facts = if facts.is_empty() { String::new() } else { format!(" ({})", facts.join(", ")) };
            anstream::eprintln!(
                "{bold}reason:{bold:#} {}",
                printable(&format!("{}{facts}", error.reason()), SHOWN)
            );
        }
        if let Some(help) = help {
            anstream::eprintln!("{bold}help:{bold:#} {}", printable(help, SHOWN));
        }
        if let Some(resume) = resume {
            anstream::eprintln!("{bold}to resume:{bold:#}\n  {resume}");
        }
        ExitCode::from(*exit)
    }
}

/// A node refused, or could not be reached.
impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(FAILED, error)
    }
}

//! Standard output: a terminal, a pipe, or JSON.

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write as _};

use proto::common::text::printable;
use serde::Serialize;

use crate::failure::Failure;

/// Where results go. Once it cannot be written to, what follows is dropped: a reader such as `head` that has seen
/// enough must not stop a push.
#[derive(Debug)]
pub(crate) struct Output {
    json: bool,
    terminal: bool,
    broken: Option<io::Error>,
}

impl Output {
    /// Standard output, as JSON or for people.
    pub(crate) fn new(json: bool) -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self { json, terminal: io::stdout().is_terminal() && !json && !dumb, broken: None }
    }

    /// Whether it is JSON.
    pub(crate) fn json(&self) -> bool {
        self.json
    }

    /// Whether a person looks at it, on a terminal that can move its cursor.
    pub(crate) fn terminal(&self) -> bool {
        self.terminal
    }

    /// Writes text as it is.
    pub(crate) fn text(&mut self, text: &str) {
        if self.broken.is_none() {
            let mut stdout = io::stdout().lock();
            self.broken = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).err();
        }
    }

    /// Writes one line.
    pub(crate) fn line(&mut self, line: &str) {
        self.text(&format!("{line}\n"));
    }

    /// Writes one JSON document, as one line.
    pub(crate) fn document(&mut self, document: &impl Serialize) {
        match serde_json::to_string(document) {
            Ok(json) => self.line(&inert(&json)),
            Err(error) => self.broken = self.broken.take().or(Some(error.into())),
        }
    }

    /// Whether nobody reads it any more.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// Says whether everything could be written. A reader that left is no failure.
    pub(crate) fn finish(&mut self) -> Result<(), Failure> {
        match self.broken.take() {
            Some(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(Failure::failed(format!("cannot write to standard output: {error}")))
            }
            _ => Ok(()),
        }
    }
}

/// JSON may hold characters raw that a terminal obeys; escaped, it means the same.
fn inert(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let mut utf8 = [0; 4];
    for c in json.chars() {
        if c.is_ascii_graphic() || c == ' ' || printable(c.encode_utf8(&mut utf8), 16).starts_with(c) {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                // Writing to a `String` cannot fail.
                let _ = write!(out, "\\u{unit:04x}");
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_holds_nothing_that_a_terminal_obeys() {
        let text = "a\x1b[2J\u{9b}2J\u{7f}\u{202e}gr\u{fc}n \\ \" \u{1f600}";
        let json = inert(&serde_json::to_string(text).unwrap());
        assert!(!json.chars().any(|c| c.is_control() || c == '\u{202e}'), "{json}");
        assert!(json.contains("gr\u{fc}n"));
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
    }
}

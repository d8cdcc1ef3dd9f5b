//! What a peer that exceeds limits is told, whether that is counted, and which limits there are.

#![allow(dead_code, reason = "not every test needs all of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

use std::any::Any;
use std::collections::BTreeMap;

use proto_common::error::{Code, Error};
use proto_common::refusals::counts;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

/// Refusals are counted for the process: one test after the other.
pub(crate) static ALONE: Mutex<()> = Mutex::const_new(());

/// What a peer is told.
#[derive(Clone, Copy)]
pub(crate) struct Refusal {
    pub(crate) code: Code,
    pub(crate) reason: &'static str,
    pub(crate) retryable: bool,
    /// The field that is blamed, where one is.
    pub(crate) field: Option<&'static str>,
    /// Metadata by name; `None`: there is none of that name.
    pub(crate) facts: &'static [(&'static str, Option<&'static str>)],
    /// A part of the message.
    pub(crate) says: &'static str,
}

impl Refusal {
    /// Of something of which the peer has enough.
    pub(crate) const fn too_many(reason: &'static str) -> Self {
        Self { code: Code::ResourceExhausted, reason, retryable: true, field: None, facts: &[], says: "" }
    }

    /// Of something that is never taken.
    pub(crate) const fn invalid(reason: &'static str) -> Self {
        Self { code: Code::InvalidArgument, retryable: false, ..Self::too_many(reason) }
    }
}

/// What a peer that exceeds a limit has, and the refusals that it got.
#[derive(Default)]
pub(crate) struct Abuse {
    pub(crate) refused: Vec<(Error, Refusal)>,
    pub(crate) held: Vec<Box<dyn Any>>,
    /// What others do meanwhile, beside what every test has them do; it ends when that has.
    pub(crate) others: Vec<JoinHandle<()>>,
}

impl Abuse {
    pub(crate) fn refused(mut self, error: impl Into<Option<Error>>, as_what: Refusal) -> Self {
        self.refused.push((error.into().expect("it is refused"), as_what));
        self
    }

    pub(crate) fn holds(mut self, what: impl Any) -> Self {
        self.held.push(Box::new(what));
        self
    }
}

/// Each of `refused` is what was expected, and counted once since `before`; and nothing else was refused, but for the `usual`.
pub(crate) fn counted(before: &BTreeMap<String, u64>, refused: &[(Error, Refusal)], usual: &[&str]) {
    let mut expected = BTreeMap::new();
    for (error, as_what) in refused {
        let Refusal { code, reason, retryable, field, facts, says } = as_what;
        let found = (error.code(), error.reason(), error.is_retryable());
        assert_eq!(found, (*code, *reason, *retryable), "{error:?}");
        let blamed: Vec<_> = error.violations().iter().map(|violation| violation.field.as_str()).collect();
        assert_eq!(blamed, field.iter().copied().collect::<Vec<_>>(), "{error:?}");
        for (name, value) in *facts {
            assert_eq!(error.get(name), *value, "{name}: {error:?}");
        }
        assert!(error.message().contains(says), "{error:?}");
        *expected.entry((*reason).to_owned()).or_insert(0) += 1;
    }
    let mut counted = counts();
    for (reason, count) in &mut counted {
        *count -= before.get(reason).copied().unwrap_or(0);
    }
    counted.retain(|reason, count| *count > 0 && !usual.contains(&reason.as_str()));
    assert_eq!(counted, expected, "each refusal is counted once, and nobody else was refused");
}

/// The limits in the table of a part of `docs/limits.md`, whose title begins so.
pub(crate) fn limits_of(part: &str) -> Vec<&'static str> {
    let parts = include_str!("../../../docs/limits.md").split("\n## ");
    let table = parts.into_iter().find(|found| found.starts_with(part)).expect("the part is there");
    let rows = table.lines().filter_map(|line| line.strip_prefix("| ")?.split('|').next());
    rows.flat_map(|row| row.split('`').skip(1).step_by(2)).collect()
}

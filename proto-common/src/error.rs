//! The error that all services share: one set of facts, whether it comes from a call, from a task's
//! record or from this process.
//!
//! Programs decide by [`code`](Error::code), [`reason`](Error::reason) and
//! [`is_retryable`](Error::is_retryable); people read the message.

mod code;
mod reason;
mod reasons;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

pub use code::{Code, UnknownCode};
pub use reason::{CommonReason, Reason};

use crate::clock::millis;
use crate::text::received;
use crate::v1;

/// What a caller is told to wait by an error whose reason allows to try again, where nothing better is known.
pub const RETRY_AFTER: Duration = Duration::from_millis(100);

/// The `domain` of our `google.rpc.ErrorInfo`.
pub const ERROR_DOMAIN: &str = "node.v1";

/// A field of a request that is at fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldViolation {
    /// Path of the field from the top of the request, such as `manifest.files[3].name`.
    pub field: String,
    /// What is wrong with it.
    pub description: String,
}

/// What failed, where, and whether trying again can help.
///
/// Small to move (one pointer) and cheap to clone. It crosses the network as a gRPC status with `google.rpc` details (feature
/// `client` or `server`: `From<Error> for tonic::Status` and back) and is kept in a task's progress as [`v1::TaskError`].
///
/// ```
/// use proto_common::error::{CommonReason, Error};
/// let error = Error::new(CommonReason::NotFound, "there is no transfer t1 at this node")
///     .metadata("transfer_id", "t1");
/// assert_eq!(error.reason(), "NOT_FOUND");
/// assert!(!error.is_retryable());
/// ```
#[derive(Clone)]
pub struct Error(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    code: Code,
    reason: Cow<'static, str>,
    message: String,
    metadata: BTreeMap<String, String>,
    violations: Vec<FieldViolation>,
    retry_after: Option<Duration>,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error from a reason, which brings its code, and a sentence: what, where, and what to do.
    pub fn new(reason: impl Reason, message: impl Into<String>) -> Self {
        Self::with_code(reason.code(), reason.as_str(), message)
    }

    /// An error whose reason is only known as text, such as one from a peer.
    ///
    /// [`Code::Ok`] is no error; it becomes [`Code::Unknown`].
    pub fn with_code(code: Code, reason: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner {
            code: if code == Code::Ok { Code::Unknown } else { code },
            reason: reason.into(),
            message: message.into(),
            metadata: BTreeMap::new(),
            violations: Vec::new(),
            retry_after: None,
            source: None,
        }))
    }

    /// Adds a fact by name; a later one of the same name replaces it.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.inner_mut().metadata.insert(key.into(), value.into());
        self
    }

    /// Adds a field that is at fault.
    #[must_use]
    pub fn violation(mut self, field: impl Into<String>, description: impl Into<String>) -> Self {
        let violation = FieldViolation { field: field.into(), description: description.into() };
        self.inner_mut().violations.push(violation);
        self
    }

    /// Says that trying again after `delay` can help.
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.inner_mut().retry_after = Some(delay);
        self
    }

    /// Keeps what led to this as the [source](std::error::Error::source). It stays in this process: a peer gets the message only.
    #[must_use]
    pub fn caused_by(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.inner_mut().source = Some(Arc::new(source));
        self
    }

    /// The same facts under another reason, which brings its code: a service says in its own table's words what a part that it shares with
    /// others has found.
    #[must_use]
    pub fn under(mut self, reason: impl Reason) -> Self {
        let inner = self.inner_mut();
        (inner.code, inner.reason) = (reason.code(), Cow::Borrowed(reason.as_str()));
        self
    }

    fn inner_mut(&mut self) -> &mut Inner {
        Arc::make_mut(&mut self.0)
    }

    /// The gRPC code; never [`Code::Ok`].
    #[must_use]
    pub fn code(&self) -> Code {
        self.0.code
    }

    /// `UPPER_SNAKE_CASE`, from the error table of the service, or the name of the code if a peer gave none.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.0.reason
    }

    /// Whether this error has that reason.
    #[must_use]
    pub fn is(&self, reason: impl Reason) -> bool {
        self.0.reason == reason.as_str()
    }

    /// The sentence for people.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The fact of that name.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.metadata.get(key).map(String::as_str)
    }

    /// All facts, by name.
    #[must_use]
    pub fn metadata_map(&self) -> &BTreeMap<String, String> {
        &self.0.metadata
    }

    /// The fields at fault, in the order in which they were found.
    #[must_use]
    pub fn violations(&self) -> &[FieldViolation] {
        &self.0.violations
    }

    /// How long to wait at least before trying again, if whoever failed said so.
    #[must_use]
    pub fn retry_after_hint(&self) -> Option<Duration> {
        self.0.retry_after
    }

    /// Whether new certificates help, which nodes take without a restart: one of the two has expired, or is signed by a CA that the other
    /// side does not trust (yet, or any more). No call succeeds before, so it is not [retryable](Self::is_retryable); what was under way
    /// already had better wait for them than fail.
    #[must_use]
    pub fn is_renewable(&self) -> bool {
        self.is(CommonReason::CertificateExpired) || self.is(CommonReason::UnknownCa)
    }

    /// Whether the same call may succeed later without anybody changing anything.
    ///
    /// True if there is a [hint](Self::retry_after_hint), if the code is `UNAVAILABLE`, `ABORTED` or
    /// `DEADLINE_EXCEEDED`, or if the reason is `UNAVAILABLE` (a broken connection, which tonic reports
    /// under several codes). All calls of our services may be repeated: an ID makes them idempotent.
    /// `SUPERSEDED` is always final, whatever the code: two senders that both insist would fight for ever.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        if self.is(CommonReason::Superseded) {
            return false;
        }
        self.0.retry_after.is_some()
            || matches!(self.0.code, Code::Unavailable | Code::Aborted | Code::DeadlineExceeded)
            || self.is(CommonReason::Unavailable)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { code, reason, message, metadata, violations, retry_after, source } = &*self.0;
        let mut out = f.debug_struct("Error");
        out.field("code", code).field("reason", reason).field("message", message);
        if !metadata.is_empty() {
            out.field("metadata", metadata);
        }
        if !violations.is_empty() {
            out.field("violations", violations);
        }
        if let Some(delay) = retry_after {
            out.field("retry_after", delay);
        }
        if let Some(source) = source {
            out.field("source", source);
        }
        out.finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

/// Equal facts; the source is not compared.
impl PartialEq for Error {
    fn eq(&self, other: &Self) -> bool {
        let Inner { code, reason, message, metadata, violations, retry_after, source: _ } = &*self.0;
        let b = &*other.0;
        (code, reason, message, metadata, violations, retry_after)
            == (&b.code, &b.reason, &b.message, &b.metadata, &b.violations, &b.retry_after)
    }
}

/// Violations have no place in a task's record; the message has to name the field.
impl From<Error> for v1::TaskError {
    fn from(error: Error) -> Self {
        let inner = Arc::unwrap_or_clone(error.0);
        let Inner { code, reason, message, metadata, violations: _, retry_after, source: _ } = inner;
        Self {
            code: code.number(),
            reason: reason.into_owned(),
            message,
            metadata: metadata.into_iter().collect(),
            retry_after_ms: retry_after.map(millis),
        }
    }
}

/// A code that is unknown or 0 becomes [`Code::Unknown`]; an empty reason becomes the name of the code.
///
/// A peer may have written it: its text is [`printable`](crate::text::printable) and cut to 4 KiB, as that of a status.
impl From<v1::TaskError> for Error {
    fn from(error: v1::TaskError) -> Self {
        let v1::TaskError { code, reason, message, metadata, retry_after_ms } = error;
        let code = Code::try_from(code).unwrap_or(Code::Unknown);
        let reason =
            if reason.is_empty() { Cow::Borrowed(code.name()) } else { Cow::Owned(received(&reason)) };
        let mut error = Self::with_code(code, reason, received(&message));
        let inner = error.inner_mut();
        inner.metadata =
            metadata.into_iter().map(|(key, value)| (received(&key), received(&value))).collect();
        inner.retry_after = retry_after_ms.map(Duration::from_millis);
        error
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    fn full() -> Error {
        Error::new(CommonReason::RangeBusy, "slots 0-5 are moving")
            .metadata("holder", "migration m1")
            .violation("slots", "overlaps 0-5")
            .retry_after(Duration::from_millis(1500))
    }

    #[test]
    fn a_tasks_record_keeps_the_facts() {
        let mut expected = full();
        expected.inner_mut().violations.clear();
        assert_eq!(Error::from(v1::TaskError::from(full())), expected);

        let odd = Error::from(v1::TaskError { code: 99, ..Default::default() });
        assert_eq!((odd.code(), odd.reason()), (Code::Unknown, "UNKNOWN"));
        let forged = Error::from(v1::TaskError {
            reason: "R\r".to_owned(),
            message: format!("x\n2026 INFO handed over{}", "m".repeat(5000)),
            metadata: [("k\u{202e}".to_owned(), "v\n".to_owned())].into(),
            ..Default::default()
        });
        assert_eq!((forged.reason(), forged.get("k\\u{202e}")), ("R\\r", Some("v\\n")));
        assert!(forged.message().starts_with("x\\n2026") && forged.message().len() <= 4096, "{forged}");
        let ok = Error::from(v1::TaskError::default());
        assert_eq!(ok.code(), Code::Unknown);
    }

    #[test]
    fn retryable() {
        let with = |code| Error::with_code(code, "X", "x").is_retryable();
        for code in Code::ALL {
            let expected = matches!(code, Code::Unavailable | Code::Aborted | Code::DeadlineExceeded);
            assert_eq!(with(code), expected, "{code}");
        }
        assert!(
            Error::with_code(Code::ResourceExhausted, "X", "x").retry_after(Duration::ZERO).is_retryable()
        );
        assert!(Error::with_code(Code::Internal, "UNAVAILABLE", "h2 broke").is_retryable());
        let superseded = Error::with_code(Code::Aborted, "SUPERSEDED", "x").retry_after(Duration::ZERO);
        assert!(!superseded.is_retryable());
    }

    #[test]
    fn clones_are_independent() {
        let first = full();
        let second = first.clone().metadata("holder", "other");
        assert_eq!(first.get("holder"), Some("migration m1"));
        assert_eq!(second.get("holder"), Some("other"));
        assert_ne!(first, second);
    }

    #[test]
    fn shows_the_message_and_keeps_the_source() {
        let error = full().caused_by(std::io::Error::other("disk"));
        assert_eq!(error.to_string(), "slots 0-5 are moving");
        assert_eq!(error.source().unwrap().to_string(), "disk");
        assert_eq!(Error::with_code(Code::Ok, "X", "x").code(), Code::Unknown);
    }
}

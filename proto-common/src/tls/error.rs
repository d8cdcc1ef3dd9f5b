//! What is wrong with certificates and keys, said so that somebody can mend it.

use std::time::{Duration, SystemTime};

use rustls::pki_types::UnixTime;
use thiserror::Error;

use super::files::Names;
use crate::error::{CommonReason, Error};
use crate::peer::PeerIdentity;

/// Why the own certificate, key or CA cannot be used. The message names the file.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct TlsError {
    problem: TlsProblem,
    message: String,
}

/// What kind of problem it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TlsProblem {
    /// A file cannot be read.
    Unreadable,
    /// It is not what it should be: not PEM, damaged, empty, or of an unknown kind.
    Malformed,
    /// The certificate has expired.
    Expired,
    /// The certificate is not valid yet.
    NotYetValid,
    /// None of the CAs has signed the certificate.
    UnknownCa,
    /// The key is that of another certificate.
    KeyMismatch,
    /// The certificate names neither a node nor an operator nor an observer.
    NamesNobody,
    /// On reload: the certificate names somebody else than the one before.
    OtherIdentity,
    /// The certificate may not be used for both sides of a connection, or breaks another rule.
    NotUsable,
}

impl TlsError {
    pub(super) fn new(problem: TlsProblem, message: String) -> Self {
        Self { problem, message }
    }

    /// What kind of problem it is.
    #[must_use]
    pub fn problem(&self) -> TlsProblem {
        self.problem
    }

    /// Whether the same files may do later: those that cannot be read, and a certificate that is not valid yet.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self.problem, TlsProblem::Unreadable | TlsProblem::NotYetValid)
    }
}

impl From<TlsError> for Error {
    fn from(error: TlsError) -> Self {
        let reason = match error.problem {
            TlsProblem::Expired => CommonReason::CertificateExpired,
            TlsProblem::UnknownCa => CommonReason::UnknownCa,
            _ => CommonReason::TlsFailed,
        };
        Self::new(reason, error.to_string())
    }
}

pub(super) fn nameless(certificate: &str) -> TlsError {
    let what = format!(
        "{certificate} names nobody, or not one alone: it needs a subject alternative name such as URI:node://CLUSTER/NODE_ID, and no other of that kind"
    );
    TlsError::new(TlsProblem::NamesNobody, what)
}

pub(super) fn other_identity(before: &PeerIdentity, now: &PeerIdentity) -> TlsError {
    let what = format!("the new certificate is that of {now}, not of {before}; the old one stays in use");
    TlsError::new(TlsProblem::OtherIdentity, what)
}

/// What is wrong with the own chain.
pub(super) fn of_own(problem: webpki::Error, now: SystemTime, names: &Names) -> TlsError {
    let Names { ca, certificate, .. } = names;
    match problem {
        webpki::Error::CertExpired { not_after, .. } => {
            let ago = long(since(not_after, now));
            TlsError::new(TlsProblem::Expired, format!("certificate expired {ago} ago: {certificate}"))
        }
        webpki::Error::CertNotValidYet { not_before, .. } => {
            let ahead = long(until(not_before, now));
            let what = format!("certificate not valid for another {ahead}: {certificate}; check the clock");
            TlsError::new(TlsProblem::NotYetValid, what)
        }
        // The latter for another CA of the same name.
        webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => TlsError::new(
            TlsProblem::UnknownCa,
            format!("signed by an unknown CA: {certificate} is signed by none in {ca}"),
        ),
        webpki::Error::BadDer => {
            TlsError::new(TlsProblem::Malformed, format!("{certificate} is no X.509 certificate"))
        }
        other => TlsError::new(TlsProblem::NotUsable, format!("{certificate} cannot be used: {other}")),
    }
}

/// From `then` to `now`.
pub(super) fn since(then: UnixTime, now: SystemTime) -> Duration {
    unix(now).saturating_sub(Duration::from_secs(then.as_secs()))
}

/// From `now` to `then`.
pub(super) fn until(then: UnixTime, now: SystemTime) -> Duration {
    Duration::from_secs(then.as_secs()).saturating_sub(unix(now))
}

fn unix(time: SystemTime) -> Duration {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// As people say it, in its largest unit: `3 days`.
pub(super) fn long(time: Duration) -> String {
    let seconds = time.as_secs();
    let (count, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_said_in_their_largest_unit() {
        for (seconds, text) in
            [(0, "0 seconds"), (1, "1 second"), (119, "1 minute"), (7200, "2 hours"), (259_200, "3 days")]
        {
            assert_eq!(long(Duration::from_secs(seconds)), text);
        }
    }
}

//! [`Error`] as a gRPC status with `google.rpc` details, and back.

use std::borrow::Cow;
use std::collections::HashMap;

use tonic::Status;
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::error::{Code, CommonReason, ERROR_DOMAIN, Error, Reason as _};
use crate::text::received;

/// What a status may take of the trailers, in bytes: 8 KiB is the soft limit of gRPC C-core (and so of Python, Ruby, PHP) for all
/// headers of a response; beyond it the peer would see a protocol error in place of ours. A quarter KiB is left for the rest.
const TRAILER_BUDGET: usize = 8 * 1024 - 256;

/// Longest message that is sent, in bytes. It travels twice: percent-encoded, and in the details.
const SENT_MESSAGE_LEN: usize = 1024;

/// Upper bounds for what protobuf puts around the parts of the details, in bytes: three `Any` with type URLs; one entry.
const DETAILS_OVERHEAD: usize = 256;
const ENTRY_OVERHEAD: usize = 16;

/// Name of the fact that says how much was left out because the trailers are limited.
const OMITTED: &str = "omitted_details";

/// The details are `ErrorInfo` always, `BadRequest` if there are violations, `RetryInfo` if there is a hint.
///
/// A message beyond 1 KiB is cut (`…`). Metadata and violations that would take the trailers beyond 8 KiB are left out, the later
/// ones first, and the metadata `omitted_details` says how many.
///
/// It is [counted](crate::refusals) by its reason.
impl From<Error> for Status {
    fn from(error: Error) -> Self {
        crate::refusals::count(error.reason());
        let message = cut(error.message(), SENT_MESSAGE_LEN);
        let base64_budget = TRAILER_BUDGET.saturating_sub(percent_encoded_len(&message));
        // Base64 makes 4 bytes of 3.
        let mut budget = (base64_budget / 4 * 3).saturating_sub(
            message.len() + error.reason().len() + ERROR_DOMAIN.len() + DETAILS_OVERHEAD + OMITTED.len() + 64,
        );
        let mut fits = |a: &str, b: &str| {
            let size = a.len() + b.len() + ENTRY_OVERHEAD;
            let fits = size <= budget;
            budget = if fits { budget - size } else { 0 };
            fits
        };

        let mut metadata = HashMap::new();
        for (key, value) in error.metadata_map() {
            if !fits(key, value) {
                break;
            }
            metadata.insert(key.clone(), value.clone());
        }
        let mut details = ErrorDetails::new();
        let mut violations = 0;
        for violation in error.violations() {
            if !fits(&violation.field, &violation.description) {
                break;
            }
            details.add_bad_request_violation(&violation.field, &violation.description);
            violations += 1;
        }
        let omitted = (error.metadata_map().len() - metadata.len(), error.violations().len() - violations);
        if omitted != (0, 0) {
            let text = format!("{} of metadata, {} violations", omitted.0, omitted.1);
            metadata.insert(OMITTED.to_owned(), text);
        }
        details.set_error_info(error.reason(), ERROR_DOMAIN, metadata);
        if let Some(delay) = error.retry_after_hint() {
            details.set_retry_info(Some(delay));
        }
        Self::with_error_details(to_tonic(error.code()), message, details)
    }
}

/// See `From<&Status>`.
impl From<Status> for Error {
    fn from(status: Status) -> Self {
        Self::from(&status)
    }
}

/// The code is kept. The reason is that of our `ErrorInfo`; without one (another server, a proxy, or no server at all) it is the
/// name of the code, and `UNAVAILABLE`, thus [retryable](Error::is_retryable), if the status was made on this side because the connection
/// broke, whatever code tonic chose for that.
///
/// Everything that the peer said is [`printable`](crate::text::printable) and cut to 4 KiB.
impl From<&Status> for Error {
    fn from(status: &Status) -> Self {
        if let Some(error) = own_error(status) {
            return error;
        }
        let code = from_tonic(status.code());
        // Details that cannot be decoded are as good as none.
        let details = status.check_error_details().unwrap_or_default();
        let info = details.error_info().filter(|info| info.domain == ERROR_DOMAIN && is_reason(&info.reason));
        let mut error = match info {
            Some(info) => {
                let mut error = Self::with_code(code, info.reason.clone(), received(status.message()));
                for (key, value) in &info.metadata {
                    error = error.metadata(received(key), received(value));
                }
                error
            }
            None if broke(status) => {
                Self::with_code(code, CommonReason::Unavailable.as_str(), received(&with_sources(status)))
            }
            None => Self::with_code(code, Cow::Borrowed(code.name()), received(status.message())),
        };
        for violation in details.bad_request().map_or(&[][..], |bad| &bad.field_violations) {
            error = error.violation(received(&violation.field), received(&violation.description));
        }
        match details.retry_info().and_then(|info| info.retry_delay) {
            Some(delay) => error.retry_after(delay),
            None => error,
        }
    }
}

/// The error of ours that `error` was made of on this side, as when a connection could not be made.
pub(crate) fn own_error(error: &(dyn std::error::Error + 'static)) -> Option<Error> {
    let mut source = error.source();
    while let Some(error) = source {
        if let Some(own) = error.downcast_ref::<Error>() {
            return Some(own.clone());
        }
        source = error.source();
    }
    None
}

/// Whether this status says that the connection broke, not that a server refused.
///
/// tonic attaches a source to the statuses that it makes of transport errors, and to no status that a peer sent. The
/// exception is a response that ends without any status, as with a proxy that cuts the stream: the text is tonic's (`infer_grpc_status`).
fn broke(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
        || (status.code() == tonic::Code::Unknown
            && status.message().starts_with("protocol error: missing grpc-status"))
}

/// tonic's own text is often no more than "transport error"; what happened is in the chain of sources.
fn with_sources(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error_text(error);
    let mut source = error.source();
    while let Some(error) = source {
        let next = error_text(error);
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        source = error.source();
    }
    text
}

fn error_text(error: &(dyn std::error::Error + 'static)) -> String {
    // `Display` of a status repeats code, details and metadata.
    error.downcast_ref::<Status>().map_or_else(|| error.to_string(), |status| status.message().to_owned())
}

/// The rule of `google.rpc.ErrorInfo`.
fn is_reason(reason: &str) -> bool {
    (1..=63).contains(&reason.len())
        && reason.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_')
}

/// `text`, cut between characters so that it has at most `max` bytes, with a mark.
fn cut(text: &str, max: usize) -> Cow<'_, str> {
    if text.len() <= max {
        return Cow::Borrowed(text);
    }
    let end = (0..=max - '…'.len_utf8()).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    Cow::Owned(format!("{}…", &text[..end]))
}

/// Length of `grpc-message` on the wire, at most: every byte that is not a letter or digit may take three.
fn percent_encoded_len(message: &str) -> usize {
    message.bytes().map(|b| if b.is_ascii_alphanumeric() { 1 } else { 3 }).sum()
}

fn to_tonic(code: Code) -> tonic::Code {
    tonic::Code::from(i32::try_from(code.number()).unwrap_or(2))
}

/// An error that says that there is none is one that nobody knows.
fn from_tonic(code: tonic::Code) -> Code {
    u32::try_from(i32::from(code))
        .ok()
        .and_then(|number| Code::try_from(number).ok())
        .filter(|code| *code != Code::Ok)
        .unwrap_or(Code::Unknown)
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;

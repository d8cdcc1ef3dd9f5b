//! What a peer says of an error: any code, any message, any bytes as details.

use std::time::Duration;

use arbitrary::Unstructured;
use bytes::Bytes;
use proto_common::Error;
use proto_common::error::ERROR_DOMAIN;
use proto_common::text::printable;
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

/// Longest text of a peer that is kept, in bytes.
const KEPT: usize = 4 * 1024;

/// Takes `data` as code, message and details, separated by the first zeros; a first byte from 128 on makes details of the rest that decode.
pub fn run(data: &[u8]) {
    let (&first, rest) = data.split_first().unwrap_or((&2, &[]));
    let code = Code::from(i32::from(first % 20));
    let status = if first >= 128 {
        // Where the input ends, nothing more is said.
        structured(code, &mut Unstructured::new(rest)).unwrap_or_else(|_| Status::new(code, ""))
    } else {
        let mut parts = rest.splitn(2, |&b| b == 0);
        let message = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
        let details = Bytes::copy_from_slice(parts.next().unwrap_or_default());
        Status::with_details_and_metadata(code, message, details, MetadataMap::new())
    };
    let error = Error::from(&status);
    means(&status, &error);
    let shown = [error.message(), error.reason()]
        .into_iter()
        .map(str::to_owned)
        .chain(error.metadata_map().iter().flat_map(|(key, value)| [key.clone(), value.clone()]))
        .chain(error.violations().iter().flat_map(|v| [v.field.clone(), v.description.clone()]));
    for text in shown {
        assert!(!text.chars().any(char::is_control), "{text:?}");
        assert!(text.len() <= KEPT, "{} bytes", text.len());
    }
    // What is passed on fits into the trailers that every client takes, and comes back as it was, but for what was cut.
    let passed = Status::from(error.clone());
    let trailers: usize =
        passed.clone().into_http::<()>().headers().iter().map(|(k, v)| k.as_str().len() + v.len()).sum();
    assert!(trailers <= 8 * 1024, "{trailers} bytes of trailers");
    let again = Error::from(passed);
    assert_eq!((again.code(), again.reason()), (error.code(), error.reason()));
    assert_eq!(again.is_retryable(), error.is_retryable(), "{error:?}");
    assert_eq!(again.retry_after_hint(), error.retry_after_hint(), "{error:?}");
    for (key, value) in again.metadata_map().iter().filter(|(key, _)| *key != "omitted_details") {
        assert_eq!(error.get(key), Some(value.as_str()));
    }
}

/// Details of the kinds that we read, with what a peer of another kind may say in them.
fn structured(code: Code, data: &mut Unstructured<'_>) -> arbitrary::Result<Status> {
    let message = data.arbitrary::<&str>()?;
    let mut details = ErrorDetails::new();
    if data.ratio(7_u8, 8)? {
        let domain = *data.choose(&[ERROR_DOMAIN, ERROR_DOMAIN, ERROR_DOMAIN, "", "example.com"])?;
        let reasons =
            ["STALE_FENCE", "SUPERSEDED", "X", "", "stale_fence", "A-B", "A\u{1b}[2J", "TOO_MANY_TRANSFERS"];
        let reason = match data.int_in_range(0..=9_u8)? {
            9 => "R".repeat(data.int_in_range(60..=70)?),
            at => (*reasons.get(usize::from(at)).unwrap_or(&"INTERNAL")).to_owned(),
        };
        let mut metadata = std::collections::HashMap::new();
        for _ in 0..data.int_in_range(0..=3_u8)? {
            let value = data.arbitrary::<&str>()?.repeat(if data.ratio(1_u8, 16)? { 3000 } else { 1 });
            metadata.insert(data.arbitrary::<&str>()?.to_owned(), value);
        }
        details.set_error_info(reason, domain, metadata);
    }
    if data.ratio(1_u8, 2)? {
        let millis = data.int_in_range(0..=100_000_000_u64)?;
        details.set_retry_info(Some(Duration::from_millis(millis)));
    }
    for _ in 0..data.int_in_range(0..=2_u8)? {
        details.add_bad_request_violation(data.arbitrary::<&str>()?, data.arbitrary::<&str>()?);
    }
    Ok(Status::with_error_details(code, message, details))
}

/// Holds `error` to what `status` says.
fn means(status: &Status, error: &Error) {
    let code = match status.code() {
        // An error that says that there is none is still one.
        Code::Ok => Code::Unknown,
        code => code,
    };
    // What tonic says of a response without a status, whoever says it.
    let broke =
        status.code() == Code::Unknown && status.message().starts_with("protocol error: missing grpc-status");
    assert_eq!(error.code().number(), u32::try_from(i32::from(code)).unwrap(), "{status:?}");
    // What does not decode as a whole says nothing.
    let details = status.check_error_details().unwrap_or_default();
    let ours = details.error_info().filter(|info| {
        let letters = |b: u8| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_';
        info.domain == ERROR_DOMAIN
            && (1..64).contains(&info.reason.len())
            && info.reason.bytes().all(letters)
    });
    let own = if broke { "UNAVAILABLE" } else { error.code().name() };
    assert_eq!(error.reason(), ours.map_or(own, |info| &info.reason), "{status:?}");
    assert_eq!(
        error.metadata_map().is_empty(),
        ours.is_none_or(|info| info.metadata.is_empty()),
        "{status:?}"
    );
    for (key, value) in ours.map(|info| &info.metadata).into_iter().flatten() {
        let shown = error.get(&printable(key, KEPT)).expect("it is there");
        let alike = ours.into_iter().flat_map(|info| &info.metadata);
        let mut alike = alike.filter(|(other, _)| printable(other, KEPT) == printable(key, KEPT));
        assert!(alike.any(|(_, value)| printable(value, KEPT) == shown), "{value:?}");
    }
    let violations = details.bad_request().map_or(&[][..], |bad| &bad.field_violations);
    assert_eq!(error.violations().len(), violations.len(), "{status:?}");
    for (FieldViolation { field, description, .. }, shown) in violations.iter().zip(error.violations()) {
        assert_eq!(
            (&*shown.field, &*shown.description),
            (&*printable(field, KEPT), &*printable(description, KEPT))
        );
    }
    let hint = details.retry_info().and_then(|info| info.retry_delay);
    assert_eq!(error.retry_after_hint(), hint, "{status:?}");
}

//! What a peer says of an error: any code, any message, any bytes as details.

use bytes::Bytes;
use proto_common::Error;
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};

/// Takes `data` as code, message and details, separated by the first zeros.
pub fn run(data: &[u8]) {
    let (&code, rest) = data.split_first().unwrap_or((&2, &[]));
    let mut parts = rest.splitn(2, |&b| b == 0);
    let message = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let details = Bytes::copy_from_slice(parts.next().unwrap_or_default());
    let status = Status::with_details_and_metadata(
        Code::from(i32::from(code % 20)),
        message,
        details,
        MetadataMap::new(),
    );
    let error = Error::from(status);
    let shown = [error.message(), error.reason()]
        .into_iter()
        .map(str::to_owned)
        .chain(error.metadata_map().iter().flat_map(|(key, value)| [key.clone(), value.clone()]))
        .chain(error.violations().iter().flat_map(|v| [v.field.clone(), v.description.clone()]));
    for text in shown {
        assert!(!text.chars().any(char::is_control), "{text:?}");
        assert!(text.len() <= 4 * 1024, "{} bytes", text.len());
    }
    // What is passed on fits into the trailers that every client takes, and comes back as it was, but for what was cut.
    let passed = Status::from(error.clone());
    let trailers: usize =
        passed.clone().into_http::<()>().headers().iter().map(|(k, v)| k.as_str().len() + v.len()).sum();
    assert!(trailers <= 8 * 1024, "{trailers} bytes of trailers");
    let again = Error::from(passed);
    assert_eq!((again.code(), again.reason()), (error.code(), error.reason()));
    assert_eq!(again.is_retryable(), error.is_retryable(), "{error:?}");
    for (key, value) in again.metadata_map().iter().filter(|(key, _)| *key != "omitted_details") {
        assert_eq!(error.get(key), Some(value.as_str()));
    }
}

use std::time::Duration;

use proptest::prelude::*;

use super::*;

/// What the status takes of the trailers, in bytes.
fn trailer_len(status: &Status) -> usize {
    let response: http::Response<()> = clone(status).into_http();
    response.headers().iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum()
}

fn clone(status: &Status) -> Status {
    Status::with_details(status.code(), status.message(), status.details().to_vec().into())
}

/// As a peer gets it: from the headers, so without anything that lives only in memory.
fn over_the_wire(error: Error) -> Error {
    let response: http::Response<()> = Status::from(error).into_http();
    Error::from(Status::from_header_map(response.headers()).unwrap())
}

#[test]
fn nothing_is_lost_on_the_way() {
    let error = Error::new(CommonReason::RangeBusy, "slots 0-5 are moving: wait, or cancel")
        .metadata("holder", "migration m1")
        .metadata("held_slots", "0-5")
        .violation("header.slots", "overlaps 0-5")
        .violation("header.manifest.files[3].name", "is empty")
        .retry_after(Duration::from_millis(1500));
    assert_eq!(over_the_wire(error.clone()), error);
}

#[test]
fn every_code_survives() {
    for code in Code::ALL.into_iter().filter(|&code| code != Code::Ok) {
        assert_eq!(over_the_wire(Error::with_code(code, "SOME_REASON", "x")).code(), code);
    }
}

#[test]
fn a_huge_error_fits_and_says_what_is_missing() {
    let mut error = Error::new(CommonReason::InvalidField, "\u{fc}".repeat(10_000));
    for i in 0..1000 {
        error = error.metadata(format!("key{i:04}"), "v".repeat(50));
        error = error.violation(format!("manifest.files[{i}]"), "is wrong");
    }
    let status = Status::from(error);
    assert!(trailer_len(&status) <= 8 * 1024, "{}", trailer_len(&status));
    let back = Error::from(&status);
    assert_eq!(back.reason(), "INVALID_FIELD");
    assert!(back.message().ends_with('…'));
    let kept = back.metadata_map().len() - 1;
    assert!(kept > 10);
    assert_eq!(back.get(OMITTED), Some(&*format!("{} of metadata, 1000 violations", 1000 - kept)));
}

#[test]
fn a_status_without_our_details_keeps_its_code() {
    let error = Error::from(Status::not_found("no such key"));
    assert_eq!((error.code(), error.reason(), error.message()), (Code::NotFound, "NOT_FOUND", "no such key"));
    assert!(!error.is_retryable());

    let mut details = ErrorDetails::new();
    details.set_error_info("THEIR_REASON", "example.com", HashMap::new());
    details.set_retry_info(Some(Duration::from_secs(2)));
    let status = Status::with_error_details(tonic::Code::ResourceExhausted, "slow down", details);
    let error = Error::from(status);
    assert_eq!(error.reason(), "RESOURCE_EXHAUSTED");
    assert_eq!(error.retry_after_hint(), Some(Duration::from_secs(2)));

    // One that says that it is none is one that nobody knows.
    let error = Error::from(Status::new(tonic::Code::Ok, "fine"));
    assert_eq!((error.code(), error.reason()), (Code::Unknown, "UNKNOWN"));

    let garbage = Status::with_details(tonic::Code::Internal, "x", vec![0xff; 40].into());
    assert_eq!(Error::from(garbage).reason(), "INTERNAL");
}

#[test]
fn a_broken_connection_is_retryable_whatever_its_code() {
    for code in [tonic::Code::Unknown, tonic::Code::Internal, tonic::Code::Cancelled] {
        let sent_by_a_peer = Error::from(Status::new(code, "h2 protocol error"));
        assert!(!sent_by_a_peer.is_retryable(), "{code:?}");

        let mut status = Status::new(code, "h2 protocol error");
        status.set_source(std::sync::Arc::new(std::io::Error::other("connection reset")));
        let error = Error::from(status);
        assert!(error.is_retryable(), "{code:?}");
        assert_eq!(error.reason(), "UNAVAILABLE");
        assert_eq!(error.message(), "h2 protocol error: connection reset");
    }
    assert!(Error::from(Status::unavailable("x")).is_retryable());
}

#[test]
fn a_peers_text_cannot_harm_a_terminal() {
    let mut details = ErrorDetails::new();
    details.set_error_info(
        "OK_REASON",
        ERROR_DOMAIN,
        HashMap::from([("k\n".to_owned(), "\x1b[2J".to_owned())]),
    );
    let text = "\x1b]0;title\x07".to_owned() + &"x".repeat(100_000);
    let error = Error::from(Status::with_error_details(tonic::Code::Internal, text, details));
    assert!(error.message().len() <= crate::text::RECEIVED_LEN);
    assert!(!format!("{} {:?}", error.message(), error.metadata_map()).contains('\x1b'));
    assert_eq!(error.get("k\\n"), Some("\\u{1b}[2J"));

    let mut details = ErrorDetails::new();
    details.set_error_info("bad reason\n", ERROR_DOMAIN, HashMap::new());
    let error = Error::from(Status::with_error_details(tonic::Code::Aborted, "x", details));
    assert_eq!(error.reason(), "ABORTED");
}

fn any_error() -> impl Strategy<Value = Error> {
    let facts = prop::collection::btree_map("[a-z_]{1,20}", "\\PC{0,60}", 0..8);
    let violations = prop::collection::vec(("[a-z.\\[\\]0-9]{1,40}", "\\PC{0,60}"), 0..8);
    let delay = prop::option::of((0_u64..1_000_000).prop_map(Duration::from_millis));
    (1_usize..17, "[A-Z][A-Z0-9_]{0,62}", "\\PC{0,200}", facts, violations, delay).prop_map(
        |(code, reason, message, facts, violations, delay)| {
            let mut error = Error::with_code(Code::ALL[code], reason, message);
            for (key, value) in facts {
                error = error.metadata(key, value);
            }
            for (field, description) in violations {
                error = error.violation(field, description);
            }
            match delay {
                Some(delay) => error.retry_after(delay),
                None => error,
            }
        },
    )
}

/// The direction marks are printable in the sense of a regular expression, but are escaped on receipt.
fn is_plain(error: &Error) -> bool {
    let same = |text: &str| received(text) == text;
    same(error.message())
        && error.metadata_map().values().all(|value| same(value))
        && error.violations().iter().all(|violation| same(&violation.description))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn round_trip(error in any_error().prop_filter("escaped on receipt", is_plain)) {
        let back = over_the_wire(error.clone());
        if back.get(OMITTED).is_none() {
            prop_assert_eq!(back, error);
        }
    }

    #[test]
    fn trailers_stay_small(
        message in "\\PC{0,1500}",
        facts in prop::collection::btree_map("\\PC{1,50}", "\\PC{0,600}", 0..12),
    ) {
        let mut error = Error::new(CommonReason::InvalidField, message);
        for (key, value) in facts {
            error = error.violation(key.clone(), value.clone()).metadata(key, value);
        }
        prop_assert!(trailer_len(&Status::from(error)) <= 8 * 1024);
    }
}

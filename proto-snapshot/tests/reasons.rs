//! The typed reasons are the error table of the `.proto` file, no more and no less.

#[path = "../../proto-common/tests/support/error_table.rs"]
mod error_table;

use std::collections::BTreeMap;

use error_table::Row;
use proto_common::error::{CommonReason, Reason as _};
use proto_snapshot::Reason;

const PROTO: &str = include_str!("../proto/node/snapshot/v1/snapshot.proto");

#[test]
fn reasons_equal_the_table_both_ways() {
    let code_side: BTreeMap<String, Row> = Reason::ALL
        .iter()
        .map(|reason| {
            let row = Row { code: reason.code().name().to_owned(), retry: reason.hints_retry() };
            (reason.as_str().to_owned(), row)
        })
        .collect();
    assert_eq!(code_side.len(), Reason::ALL.len(), "a reason stands there twice");
    assert_eq!(code_side, error_table::parse(PROTO));
}

#[test]
fn a_reason_that_services_share_has_one_code() {
    for common in CommonReason::ALL {
        if let Some(reason) = Reason::parse(common.as_str()) {
            assert_eq!(reason.code(), common.code(), "{}", common.as_str());
        }
    }
}

#[test]
fn an_error_is_retryable_exactly_where_the_table_says_so() {
    for reason in Reason::ALL {
        assert_eq!(Reason::parse(reason.as_str()), Some(*reason));
        assert_eq!(reason.error("no details").is_retryable(), reason.hints_retry(), "{}", reason.as_str());
    }
    assert_eq!(Reason::parse("NO_SUCH_REASON"), None);
}

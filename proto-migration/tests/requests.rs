//! Requests that are too large, or that never come whole: refused before they hold much, and before long.

#![cfg(all(feature = "client", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use bytes::{BufMut as _, BytesMut};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use proto_common::error::{Code, Error};
use proto_common::prompt::{MAX_REQUEST_BYTES, REQUEST_TIME};
use proto_common::refusals::count_of;
use support::pair::Pair;
use tokio::time::Instant;
use tokio_stream::StreamExt as _;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service as _, http};

/// The prefix of a message of `declared` bytes and the first ones of it, and then nothing, for ever.
fn half(declared: usize) -> Body {
    let mut data = BytesMut::new();
    data.put_u8(0);
    data.put_u32(u32::try_from(declared).unwrap());
    data.put_bytes(0, 100);
    let first = Ok::<_, Status>(Frame::data(data.freeze()));
    Body::new(StreamBody::new(tokio_stream::iter([first]).chain(tokio_stream::pending())))
}

#[tokio::test]
async fn half_a_request_is_not_waited_for_and_a_large_one_not_at_all() {
    let pair = Pair::start().await;
    let mut service = pair.receiver.clone().unwrap().into_service();
    tokio::time::pause();
    for (declared, code, reason, waited) in [
        (MAX_REQUEST_BYTES + 1, Code::InvalidArgument, "BATCH_TOO_LARGE", 0),
        (MAX_REQUEST_BYTES, Code::DeadlineExceeded, "IDLE_TIMEOUT", REQUEST_TIME.as_secs()),
    ] {
        for method in ["StartMigration", "CancelMigration", "WatchMigrationProgress", "TransferMigrationData"]
        {
            let request =
                http::Request::post(format!("http://n2/node.migration.v1.MigrationService/{method}"))
                    .header("content-type", "application/grpc")
                    .body(half(declared))
                    .unwrap();
            let (began, before) = (Instant::now(), count_of(reason));
            let response = service.call(request).await.unwrap();
            let of_headers = Status::from_header_map(response.headers());
            let rest = response.into_body().collect().await.unwrap();
            let status = of_headers.or_else(|| Status::from_header_map(rest.trailers()?));
            let error = Error::from(status.expect("a status"));
            assert_eq!((error.code(), error.reason()), (code, reason), "{method}: {error:?}");
            assert_eq!(began.elapsed().as_secs(), waited, "{method}");
            assert!(count_of(reason) > before, "{method}: {reason}");
        }
    }
}

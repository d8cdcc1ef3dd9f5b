//! Requests that are too large, or that never come whole: refused before they hold much, and before long.

#![cfg(all(feature = "client", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{BufMut as _, Bytes, BytesMut};
use http_body::{Body as _, Frame};
use proto_common::error::{Code, Error};
use proto_common::prompt::{MAX_REQUEST_BYTES, REQUEST_TIME};
use proto_common::refusals::count_of;
use support::pair::Pair;
use tokio::time::Instant;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service as _, http};

/// The prefix of a message of `declared` bytes and the first ones of it, and then nothing, for ever.
struct Half {
    declared: usize,
    sent: bool,
}

impl http_body::Body for Half {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if std::mem::replace(&mut self.sent, true) {
            return Poll::Pending;
        }
        let mut data = BytesMut::new();
        data.put_u8(0);
        data.put_u32(u32::try_from(self.declared).unwrap());
        data.put_bytes(0, 100);
        Poll::Ready(Some(Ok(Frame::data(data.freeze()))))
    }
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
        for method in ["StartMigration", "CancelMigration", "WatchMigrationProgress"] {
            let request =
                http::Request::post(format!("http://n2/node.migration.v1.MigrationService/{method}"))
                    .header("content-type", "application/grpc")
                    .body(Body::new(Half { declared, sent: false }))
                    .unwrap();
            let (began, before) = (Instant::now(), count_of(reason));
            let mut response = service.call(request).await.unwrap();
            let mut status = Status::from_header_map(response.headers());
            while let Some(frame) =
                std::future::poll_fn(|cx| Pin::new(response.body_mut()).poll_frame(cx)).await
            {
                let trailers = frame.unwrap().into_trailers();
                status = status.or_else(|| Status::from_header_map(&trailers.ok()?));
            }
            let error = Error::from(status.expect("a status"));
            assert_eq!((error.code(), error.reason()), (code, reason), "{method}: {error:?}");
            assert_eq!(began.elapsed().as_secs(), waited, "{method}");
            assert!(count_of(reason) > before, "{method}: {reason}");
        }
    }
}

//! Requests that are too large, or that never come whole: refused before they hold much, and before long.

#![cfg(all(feature = "client", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{BufMut as _, Bytes, BytesMut};
use http_body::{Body as _, Frame};
use proto_common::error::{Code, Error};
use proto_common::peer::Peer;
use proto_common::prompt::{MAX_REQUEST_BYTES, REQUEST_TIME};
use proto_common::refusals::count_of;
use proto_common::v1::Direction;
use proto_migration::Reason;
use proto_migration::v1::migration_service_client::MigrationServiceClient;
use proto_migration::v1::{MigrationState, WatchMigrationProgressRequest};
use support::pair::Pair;
use tokio::time::Instant;
use tonic::body::Body;
use tonic::codegen::{Service as _, http};
use tonic::{Request, Status};

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

#[tokio::test]
async fn a_peer_that_watches_all_it_can_leaves_the_others_their_watches() {
    let mut pair = Pair::start().await;
    pair.target_down().await;
    (pair.target_limits.watchers, pair.target_limits.watchers_per_peer) = (3, 2);
    pair.target_up(2).await;
    pair.begin(|request| request.spec.as_mut().unwrap().auto_complete = false).await.unwrap();
    pair.reaches(MigrationState::Ready).await;
    let target = MigrationServiceClient::new(pair.receiver.clone().unwrap().into_service());
    let watch_as = async |node: &str| {
        let id = "m1".to_owned();
        let mut request =
            Request::new(WatchMigrationProgressRequest { migration_id: id, direction: Direction::In.into() });
        let identity = format!("node:///{node}").parse().unwrap();
        request.extensions_mut().insert(Peer::certified(Some(identity), None));
        let watch = target.clone().watch_migration_progress(request).await;
        watch.map(tonic::Response::into_inner).map_err(Error::from)
    };
    let first = watch_as("n9").await.unwrap();
    let _second = watch_as("n9").await.unwrap();
    let before = count_of("TOO_MANY_WATCHERS");
    let refused = watch_as("n9").await.unwrap_err();
    assert!(refused.is(Reason::TooManyWatchers) && refused.is_retryable(), "{refused:?}");
    assert_eq!((refused.get("limit"), refused.get("peer")), (Some("2"), Some("node:///n9")));
    assert!(count_of("TOO_MANY_WATCHERS") > before);
    let mut other = watch_as("n1").await.unwrap();
    assert!(other.message().await.unwrap().is_some());
    assert_eq!(watch_as("n3").await.unwrap_err().get("limit"), Some("3"));
    drop(first);
    watch_as("n9").await.unwrap();
}

//! Requests that are too large, or that never come whole: refused before they hold much, and before long.

#![cfg(all(feature = "client", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{BufMut as _, BytesMut};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use prost::Message as _;
use proto_common::error::{Code, Error};
use proto_common::prompt::{MAX_REQUEST_BYTES, REQUEST_TIME};
use proto_common::refusals::count_of;
use proto_migration::limits::Limits;
use proto_migration::v1::TransferMigrationDataRequest;
use proto_migration::v1::transfer_migration_data_request::{Frame as Sent, Header, Heartbeat};
use support::frames::{Node, header, resolve};
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

/// A header, and then heartbeats that are all there already: who reads them has nothing to wait for, for as long as `most`. How often 10,000 of them were taken is counted.
fn without_a_pause(header: Header, most: Duration, taken: Arc<AtomicU64>) -> Body {
    let message = |frame| {
        let message = TransferMigrationDataRequest { frame: Some(frame) }.encode_to_vec();
        [&[0][..], &u32::try_from(message.len()).unwrap().to_be_bytes(), &message].concat()
    };
    let first = Frame::data(message(Sent::Header(header)).into());
    let beats = bytes::Bytes::from(message(Sent::Heartbeat(Heartbeat::default())).repeat(10_000));
    let began = Instant::now();
    let more = std::iter::from_fn(move || {
        taken.fetch_add(1, Ordering::Relaxed);
        (began.elapsed() < most).then(|| Frame::data(beats.clone()))
    });
    let all = std::iter::once(first).chain(more).map(Ok::<_, Status>);
    // Tokio's own gives others a turn after some items.
    Body::new(StreamBody::new(futures::stream::iter(all)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn frames_without_a_pause_keep_no_clock_and_nobody_else_from_a_turn() {
    let mut limits = Limits::default();
    (limits.idle, limits.slowest_time) = (Duration::from_secs(3), Duration::from_secs(2));
    let node = Node::with(|builder| builder.limits(limits)).await;
    let ticks = Arc::new(AtomicU64::new(0));
    let ticking = tokio::spawn({
        let ticks = Arc::clone(&ticks);
        async move {
            loop {
                tokio::time::sleep(Duration::from_millis(1)).await;
                ticks.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    // A migration that is not known here, and one whose rows are to come.
    for (header, reason) in [(resolve(1), "IDLE_TIMEOUT"), (header(1), "TOO_SLOW")] {
        let before = ticks.load(Ordering::Relaxed);
        let taken = Arc::default();
        let began = Instant::now();
        let request =
            http::Request::post("http://n2/node.migration.v1.MigrationService/TransferMigrationData")
                .header("content-type", "application/grpc")
                .body(without_a_pause(header, Duration::from_secs(30), Arc::clone(&taken)))
                .unwrap();
        let response = node.receiver.clone().into_service().call(request).await.unwrap();
        let rest = response.into_body().collect().await.unwrap();
        let error = Error::from(Status::from_header_map(rest.trailers().unwrap()).unwrap());
        assert_eq!(error.reason(), reason, "{error:?}");
        assert!(began.elapsed() < Duration::from_secs(20), "whatever comes: {:?}", began.elapsed());
        let ticked = ticks.load(Ordering::Relaxed) - before;
        assert!(ticked > 100, "others had {ticked} turns of a millisecond in {:?}", began.elapsed());
        // In 20 s, 4000 would be looked at.
        assert_eq!(taken.load(Ordering::Relaxed), 1, "more than 10,000 were looked at");
    }
    ticking.abort();
}

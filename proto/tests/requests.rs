//! Requests that are too large, or that never come whole, at every service that is ready-made here: refused before they hold much, and before
//! long, counted, and in nobody's way. (Those of migrations: `proto-migration/tests/requests.rs`.)
#![cfg(all(feature = "snapshot", feature = "health", feature = "server"))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use bytes::{BufMut as _, BytesMut};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use prost::Message as _;
use proto::common::error::Error;
use proto::common::prompt::{MAX_REQUEST_BYTES, REQUEST_TIME};
use proto::health::HealthRegistry;
use proto::health::grpc_health_v1;
use proto::node::{NodeIdentity, health_service_server, split_snapshot_service_server};
use proto::refusals::count_of;
use proto::snapshot::store::FileStoreOptions;
use proto::snapshot::{FileSnapshotStore, SnapshotReceiver};
use tokio::time::Instant;
use tokio_stream::StreamExt as _;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service as _, http};
use tonic::service::Routes;

/// The prefix of a message of `declared` bytes and the `first` ones of it, and then nothing, for ever, where there are more.
fn part(declared: usize, first: usize) -> Body {
    let mut data = BytesMut::new();
    data.put_u8(0);
    data.put_u32(u32::try_from(declared).unwrap());
    data.put_bytes(0, first);
    let begun = tokio_stream::iter([Ok::<_, Status>(Frame::data(data.freeze()))]);
    if first < declared {
        Body::new(StreamBody::new(begun.chain(tokio_stream::pending())))
    } else {
        Body::new(StreamBody::new(begun))
    }
}

/// Calls with `first` bytes of a message of `declared`: the error, and after which time. `None` when it is not refused for its message.
async fn call(services: &Routes, path: &str, declared: usize, first: usize) -> (Option<Error>, u64) {
    let request = http::Request::post(format!("http://n1{path}"))
        .header("content-type", "application/grpc")
        .body(part(declared, first))
        .unwrap();
    let began = Instant::now();
    let mut response = services.clone().call(request).await.unwrap();
    let mut status = Status::from_header_map(response.headers());
    // A watch that was let in goes on, so its first frame is enough.
    if status.is_none() {
        let frame = response.body_mut().frame().await;
        let trailers = frame.and_then(|frame| frame.unwrap().into_trailers().ok());
        status = trailers.and_then(|trailers| Status::from_header_map(&trailers));
    }
    let waited = began.elapsed().as_secs();
    (status.map(Error::from).filter(|error| error.reason() != "NOT_FOUND"), waited)
}

/// The methods of `service` in `set`, by path: also of a stream, the first message is a request.
fn methods(set: &[u8], service: &str) -> Vec<String> {
    let files = prost_types::FileDescriptorSet::decode(set).unwrap().file;
    let mut paths = Vec::new();
    for file in &files {
        for found in &file.service {
            let name = format!("{}.{}", file.package(), found.name());
            if name == service {
                paths.extend(found.method.iter().map(|method| format!("/{name}/{}", method.name())));
            }
        }
    }
    paths
}

#[tokio::test]
async fn half_a_request_is_not_waited_for_and_a_large_one_not_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let store = FileSnapshotStore::open(directory.path(), FileStoreOptions::default()).unwrap();
    let receiver = SnapshotReceiver::builder(&"n1".parse().unwrap(), store).start().await.unwrap();
    let identity = NodeIdentity { node_id: "n1".to_owned(), incarnation: 1, ..NodeIdentity::default() };
    let health = HealthRegistry::builder(identity).build();
    let services = Routes::new(receiver.into_service())
        .add_service(health.service())
        .add_service(health.standard_service());
    tokio::time::pause();
    let mut seen = 0;
    for (set, service, large) in [
        (
            proto::snapshot::FILE_DESCRIPTOR_SET,
            split_snapshot_service_server::SERVICE_NAME,
            "CHUNK_TOO_LARGE",
        ),
        (proto::health::FILE_DESCRIPTOR_SET, health_service_server::SERVICE_NAME, "INVALID_FIELD"),
        (grpc_health_v1::FILE_DESCRIPTOR_SET, "grpc.health.v1.Health", "INVALID_FIELD"),
    ] {
        for path in methods(set, service) {
            for (declared, reason, seconds) in [
                (MAX_REQUEST_BYTES + 1, large, 0),
                (MAX_REQUEST_BYTES, "IDLE_TIMEOUT", REQUEST_TIME.as_secs()),
            ] {
                let before = count_of(reason);
                // Another one comes whole, meanwhile, and is looked at.
                let (refused, other) =
                    tokio::join!(call(&services, &path, declared, 100), call(&services, &path, 0, 0),);
                let error = refused.0.unwrap_or_else(|| panic!("{path} takes {declared} bytes"));
                assert_eq!((error.reason(), refused.1), (reason, seconds), "{path}: {error:?}");
                assert_eq!(error.is_retryable(), reason == "IDLE_TIMEOUT", "{path}: {error:?}");
                let of_other = other.0.as_ref().map(Error::reason);
                assert!(of_other.is_none_or(|of_other| of_other != "IDLE_TIMEOUT"), "{path}: {other:?}");
                assert_eq!(other.1, 0, "{path}: {other:?}");
                // The empty request may lack a field of which the same reason is told.
                let counted = if of_other == Some(reason) { 2 } else { 1 };
                assert_eq!(count_of(reason), before + counted, "{path}");
                seen += 1;
            }
        }
    }
    assert!(seen >= 2 * 10, "{seen}");
}

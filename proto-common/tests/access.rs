//! Who is let in by the ready-made authorizers, and that others are refused before a byte of their request is read.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use http_body::Frame;
use http_body_util::StreamBody;
use proto_common::access::{
    Access, AllowAll, AllowLocal, Authorizer, CLUSTER_METADATA, Guarded, RoleTable, SameCluster,
};
use proto_common::connect::Connect as _;
use proto_common::dial::Dialer;
use proto_common::error::Error;
use proto_common::peer::Peer;
use proto_common::refusals::count_of;
use proto_common::tuning::{incoming, listen, tune_server};
use tokio_stream::StreamExt as _;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service as _, http};
use tonic::transport::Server;

#[path = "support/echo.rs"]
#[allow(dead_code, reason = "not every test needs all of it")]
mod echo;

use echo::{Echo, call_of};

const METHOD: &str = "TransferSplitSnapshot";

/// What comes of a call by `peer` which names `cluster`. A refusal is counted, and nothing was read before it.
async fn ask(access: &Access, peer: &Peer, cluster: Option<&str>) -> Result<(), Error> {
    let asked = Arc::new(AtomicBool::new(false));
    let noted = Arc::clone(&asked);
    // A message without content, which says when it is asked for.
    let message = tokio_stream::once(Bytes::from_static(&[0; 5])).map(move |message| {
        noted.store(true, Ordering::Relaxed);
        Ok::<_, Status>(Frame::data(message))
    });
    let body = Body::new(StreamBody::new(message));
    let mut request = http::Request::post(format!("http://n1/any/{METHOD}"))
        .header("content-type", "application/grpc")
        .body(body)
        .unwrap();
    request.extensions_mut().insert(peer.clone());
    if let Some(cluster) = cluster {
        request.headers_mut().insert(CLUSTER_METADATA, cluster.parse().unwrap());
    }
    let answer = Guarded::new(Echo, access.clone()).call(request).await.unwrap();
    // One that is let in has its status after the answer.
    let refused = Status::from_header_map(answer.headers()).map(Error::from);
    assert_eq!(asked.load(Ordering::Relaxed), refused.is_none(), "{peer:?} {refused:?}");
    refused.map_or(Ok(()), Err)
}

fn certified(uri: &str) -> Peer {
    Peer::certified(Some(uri.parse().unwrap()), Some("192.0.2.7:1".parse().unwrap()))
}

fn plaintext(address: &str) -> Peer {
    Peer::plaintext(Some(address.parse().unwrap()))
}

/// Asks in cluster c1, and compares the reasons; `None` is let in.
async fn decides(authorizer: impl Authorizer, cases: &[(Peer, Option<&str>, Option<&str>)]) {
    let access = Access::new(Some("c1".parse().unwrap()), authorizer);
    for (peer, cluster, expected) in cases {
        let before = expected.map_or(0, count_of);
        let outcome = ask(&access, peer, *cluster).await;
        let reason = outcome.as_ref().err().map(Error::reason);
        assert_eq!(reason, *expected, "{peer:?} {cluster:?}: {outcome:?}");
        if let Err(error) = &outcome {
            // At least: other tests of this process count as well.
            assert!(count_of(error.reason()) > before && !error.is_retryable(), "{error:?}");
        }
    }
}

#[tokio::test]
async fn the_same_cluster_is_that_of_the_certificate() {
    let unauthenticated = Some("UNAUTHENTICATED");
    let wrong = Some("WRONG_CLUSTER");
    decides(
        SameCluster,
        &[
            (certified("node://c1/n2"), None, None),
            (certified("node://c1/n2"), Some("c1"), None),
            // Whatever the role.
            (certified("operator://c1/alice"), None, None),
            (certified("observer://c1/grafana"), None, None),
            (certified("node://c2/n2"), None, wrong),
            (certified("node:///n2"), None, wrong),
            // What the call names helps nobody.
            (certified("node://c2/n2"), Some("c1"), wrong),
            (certified("node://c1/n2"), Some("c2"), wrong),
            (Peer::certified(None, None), Some("c1"), unauthenticated),
            // In plaintext nobody proves a cluster, whichever is named, and wherever it comes from.
            (plaintext("127.0.0.1:1"), None, unauthenticated),
            (plaintext("127.0.0.1:1"), Some("c1"), unauthenticated),
            (plaintext("127.0.0.1:1"), Some("c2"), wrong),
            (Peer::anonymous(), None, unauthenticated),
        ],
    )
    .await;
}

#[tokio::test]
async fn roles_are_of_certificates_of_the_cluster() {
    let unauthenticated = Some("UNAUTHENTICATED");
    decides(
        RoleTable::new(),
        &[
            (certified("node://c1/n2"), None, None),
            (certified("observer://c1/grafana"), None, Some("PERMISSION_DENIED")),
            (certified("node://c2/n1"), None, Some("WRONG_CLUSTER")),
            (certified("node:///n1"), None, Some("WRONG_CLUSTER")),
            (Peer::certified(None, None), None, unauthenticated),
            (plaintext("127.0.0.1:1"), Some("c1"), unauthenticated),
            (Peer::anonymous(), None, unauthenticated),
        ],
    )
    .await;
}

#[tokio::test]
async fn plaintext_is_for_this_machine_unless_everybody_is_allowed() {
    let unauthenticated = Some("UNAUTHENTICATED");
    let wrong = Some("WRONG_CLUSTER");
    let near = ["127.0.0.1:1", "127.8.0.9:1", "[::1]:1", "[::ffff:127.0.0.1]:1"];
    let far = ["192.0.2.7:1", "10.0.0.1:1", "0.0.0.0:1", "[2001:db8::1]:1", "[::ffff:192.0.2.7]:1"];
    for address in near {
        let peer = plaintext(address);
        let cases = [(peer.clone(), None, None), (peer.clone(), Some("c1"), None), (peer, Some("c2"), wrong)];
        decides(AllowLocal, &cases).await;
        decides(AllowAll, &cases).await;
    }
    for address in far {
        let peer = plaintext(address);
        decides(
            AllowLocal,
            &[(peer.clone(), None, unauthenticated), (peer.clone(), Some("c1"), unauthenticated)],
        )
        .await;
        decides(AllowAll, &[(peer.clone(), None, None), (peer, Some("c2"), wrong)]).await;
    }
    decides(AllowLocal, &[(Peer::anonymous(), None, None), (certified("node://c1/n2"), None, None)]).await;
    // What a service has of which nobody says who may call it.
    let refused = ask(&Access::default(), &plaintext("192.0.2.7:1"), None).await.unwrap_err();
    assert!(refused.message().contains("192.0.2.7"), "{refused:?}");
    ask(&Access::default(), &plaintext("127.0.0.1:1"), None).await.unwrap();
}

/// Over a connection, where the address is the real one.
#[tokio::test]
async fn over_plaintext_the_cluster_is_the_one_that_the_call_names() {
    let serve = |access: Access| {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = tune_server(Server::builder()).add_service(Guarded::new(Echo, access));
        tokio::spawn(server.serve_with_incoming(incoming(listener)));
        address
    };
    let cluster = || Some("c1".parse().unwrap());
    let (local, certified) =
        (serve(Access::new(cluster(), AllowLocal)), serve(Access::new(cluster(), SameCluster)));
    for (address, named, expected) in [
        (&local, None, None),
        (&local, Some("c1"), None),
        (&local, Some("c2"), Some("WRONG_CLUSTER")),
        (&local, Some(""), Some("WRONG_CLUSTER")),
        (&certified, None, Some("UNAUTHENTICATED")),
        (&certified, Some("c1"), Some("UNAUTHENTICATED")),
        (&certified, Some("c2"), Some("WRONG_CLUSTER")),
    ] {
        let channel = Dialer::plaintext().to(address, None).unwrap().connect().await.unwrap();
        let answer = call_of(channel, METHOD, named).await;
        assert_eq!(answer.as_ref().err().map(Error::reason), expected, "{named:?}: {answer:?}");
    }
}

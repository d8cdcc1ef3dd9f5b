//! What only real connections show.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod support;

use std::time::{Duration, Instant};

use proto_common::tuning::{endpoint, tune_endpoint, tune_server};
use proto_health::HealthRegistry;
use proto_health::v1::WatchHealthRequest;
use proto_health::v1::health_service_client::HealthServiceClient;
use support::*;
use tokio::net::TcpListener;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Server};

async fn serve(registry: &HealthRegistry) -> (String, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = tune_server(Server::builder())
        .add_service(registry.service())
        .add_service(registry.standard_service());
    let ending = registry.clone();
    let serving = tokio::spawn(async move {
        let shutdown = async {
            while !ending.state().is_leaving() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            ending.shut_down(Duration::from_secs(1)).await;
        };
        server.serve_with_incoming_shutdown(TcpIncoming::from(listener), shutdown).await.unwrap();
    });
    (address, serving)
}

async fn connect(address: &str) -> Channel {
    endpoint(address).unwrap().connect().await.unwrap()
}

/// A reader that reads nothing: its window is full, and then the node stops.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stalls_holds_up_nobody_and_gets_the_latest() {
    let registry = registry();
    registry.set_running();
    let long = "x".repeat(1000);
    let raft = registry.add(component("raft"), HEALTHY, &long).unwrap();
    let (address, serving) = serve(&registry).await;
    // A window of a few frames.
    let narrow = tune_endpoint(endpoint(&address).unwrap()).initial_stream_window_size(4096);
    let mut client = HealthServiceClient::new(narrow.connect().await.unwrap());
    let request = WatchHealthRequest { service: "raft".into(), heartbeat_ms: 100, ..Default::default() };
    let mut stalled = client.watch_health(request.clone()).await.unwrap().into_inner();
    let mut read =
        HealthServiceClient::new(connect(&address).await).watch_health(request).await.unwrap().into_inner();
    // Far more than the window holds: 30 frames of a KiB and more. Others are not kept waiting meanwhile.
    let mut change = async |n: u32| {
        let wanted = if n.is_multiple_of(2) { DEGRADED } else { HEALTHY };
        raft.set(wanted, &long);
        while next_status(&mut read).await != wanted {}
    };
    for n in 0..30 {
        change(n).await;
    }
    raft.set(UNHEALTHY, "the last");
    let mut seen = Vec::new();
    while seen.last() != Some(&UNHEALTHY) {
        seen.push(next_status(&mut stalled).await);
    }
    assert!(seen.len() < 15, "the rest was never kept: {}", seen.len());

    // Stalled again, at the end of the node: that is waited for as long as was said, and no longer.
    for n in 0..30 {
        change(n).await;
    }
    registry.begin_drain("", Duration::ZERO);
    let began = Instant::now();
    let rest = async {
        while let Some(frame) = read.message().await.unwrap() {
            if frame.last_frame {
                return;
            }
        }
        panic!("no last frame");
    };
    tokio::time::timeout(Duration::from_secs(20), rest).await.unwrap();
    while registry.shut_down(Duration::ZERO).await > 1 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(began.elapsed() < Duration::from_secs(10));
    drop((stalled, client, read));
    tokio::time::timeout(Duration::from_secs(20), serving).await.unwrap().unwrap();
}

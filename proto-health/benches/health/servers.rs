//! The servers that are compared: ours, by both protocols, and tonic-health's.

use std::io::{BufRead as _, Write as _};
use std::net::SocketAddr;

use proto_common::limits::ConnectionLimits;
use proto_common::listen::Limited;
use proto_common::tuning::{incoming_within, tune_server};
use proto_common::v1::NodeIdentity;
use proto_health::HealthRegistry;
use proto_health::server::Component;
use proto_health::v1::HealthStatus;
use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

/// The service that is asked for and changed.
pub(crate) const SERVICE: &str = "store";

async fn listen() -> (Limited<TcpIncoming>, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // As many connections from one address as there are watchers to measure, and all of their calls.
    let mut limits = ConnectionLimits::default();
    limits.calls_per_peer = u32::MAX;
    (limits.connections, limits.connections_per_peer) = (usize::MAX, usize::MAX);
    (incoming_within(listener, limits), address)
}

/// Our server. The returned function changes the status of [`SERVICE`].
pub(crate) async fn ours() -> (SocketAddr, impl Fn(bool)) {
    let identity = NodeIdentity { node_id: "n1".into(), incarnation: 1, ..Default::default() };
    let registry = HealthRegistry::builder(identity).build();
    let component =
        registry.add(Component::new(SERVICE.parse().unwrap()), HealthStatus::Healthy, "").unwrap();
    registry.set_running();
    let (incoming, address) = listen().await;
    let server = tune_server(Server::builder())
        .add_service(registry.service())
        .add_service(registry.standard_service())
        .serve_with_incoming(incoming);
    tokio::spawn(server);
    let set = move |serving| {
        component.set(if serving { HealthStatus::Healthy } else { HealthStatus::Unhealthy }, "");
    };
    (address, set)
}

/// tonic-health, on the same transport.
pub(crate) async fn tonic_health() -> (SocketAddr, impl AsyncFn(bool)) {
    let (reporter, service) = tonic_health::server::health_reporter();
    let set = async move |serving| {
        let status = if serving {
            tonic_health::ServingStatus::Serving
        } else {
            tonic_health::ServingStatus::NotServing
        };
        reporter.set_service_status(SERVICE, status).await;
    };
    set(true).await;
    let (incoming, address) = listen().await;
    let server = tune_server(Server::builder()).add_service(service).serve_with_incoming(incoming);
    tokio::spawn(server);
    (address, set)
}

/// A server alone in its process: prints its address, changes its status with each line that it reads.
pub(crate) fn child(kind: &str) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let say = |address: SocketAddr| {
        println!("{address}");
        std::io::stdout().flush().unwrap();
    };
    let mut serving = true;
    let mut flip = || {
        serving = !serving;
        serving
    };
    let lines = std::io::stdin().lock().lines();
    match kind {
        "tonic-health" => {
            let (address, set) = runtime.block_on(tonic_health());
            say(address);
            lines.for_each(|_| runtime.block_on(set(flip())));
        }
        _ => {
            let (address, set) = runtime.block_on(ours());
            say(address);
            lines.for_each(|_| set(flip()));
        }
    }
}

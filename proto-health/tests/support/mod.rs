//! What the tests of the services share: clients without a socket.
#![allow(dead_code, reason = "not every test needs all of it")]

use std::time::Duration;

use proto_common::v1::NodeIdentity;
use proto_health::HealthRegistry;
use proto_health::grpc_health_v1::health_client::HealthClient;
use proto_health::server::{Component, NodeHealthService, StandardHealthService};
use proto_health::v1::health_service_client::HealthServiceClient;
use proto_health::v1::{
    HealthCheckRequest, HealthCheckResponse, HealthReport, HealthStatus, WatchHealthRequest,
    WatchHealthResponse,
};
use tonic::{Status, Streaming};

pub(crate) const HEALTHY: HealthStatus = HealthStatus::Healthy;
pub(crate) const DEGRADED: HealthStatus = HealthStatus::Degraded;
pub(crate) const UNHEALTHY: HealthStatus = HealthStatus::Unhealthy;
pub(crate) const UNDECIDED: HealthStatus = HealthStatus::Undecided;

pub(crate) type Client = HealthServiceClient<NodeHealthService>;
pub(crate) type Standard = HealthClient<StandardHealthService>;

pub(crate) fn identity() -> NodeIdentity {
    NodeIdentity {
        node_id: "n1".into(),
        cluster_id: "c1".into(),
        store_id: vec![7; 16].into(),
        incarnation: 42,
        version: "1.2.3".into(),
    }
}

pub(crate) fn registry() -> HealthRegistry {
    HealthRegistry::builder(identity()).build()
}

pub(crate) fn client(registry: &HealthRegistry) -> Client {
    HealthServiceClient::new(registry.service())
}

pub(crate) fn standard(registry: &HealthRegistry) -> Standard {
    HealthClient::new(registry.standard_service())
}

pub(crate) fn component(name: &str) -> Component {
    Component::new(name.parse().unwrap())
}

pub(crate) async fn check(registry: &HealthRegistry, service: &str) -> Result<HealthCheckResponse, Status> {
    let request = HealthCheckRequest { service: service.into(), ..Default::default() };
    client(registry).health_check(request).await.map(tonic::Response::into_inner)
}

pub(crate) async fn report(registry: &HealthRegistry, service: &str) -> HealthReport {
    check(registry, service).await.unwrap().health.unwrap()
}

pub(crate) async fn status(registry: &HealthRegistry, service: &str) -> HealthStatus {
    report(registry, service).await.status()
}

/// Of the empty name, liveness, readiness, startup.
pub(crate) async fn probes(registry: &HealthRegistry) -> [HealthStatus; 4] {
    let mut all = [UNDECIDED; 4];
    for (at, service) in ["", "liveness", "readiness", "startup"].into_iter().enumerate() {
        all[at] = status(registry, service).await;
    }
    all
}

pub(crate) async fn watch(
    registry: &HealthRegistry,
    service: &str,
    heartbeat_ms: u32,
) -> Streaming<WatchHealthResponse> {
    let request = WatchHealthRequest { service: service.into(), heartbeat_ms, ..Default::default() };
    client(registry).watch_health(request).await.unwrap().into_inner()
}

/// The next frame; waits for it, on whichever clock the test runs.
pub(crate) async fn frame(watch: &mut Streaming<WatchHealthResponse>) -> WatchHealthResponse {
    let next = tokio::time::timeout(Duration::from_secs(600), watch.message()).await;
    next.expect("no frame").unwrap().expect("the watch ended")
}

/// The status of the next frame that has one.
pub(crate) async fn next_status(watch: &mut Streaming<WatchHealthResponse>) -> HealthStatus {
    loop {
        if let Some(health) = frame(watch).await.health {
            return health.status();
        }
    }
}

/// Nothing comes for that long.
pub(crate) async fn quiet<T: prost::Message + Default + std::fmt::Debug + 'static>(
    watch: &mut Streaming<T>,
    time: Duration,
) {
    let next = tokio::time::timeout(time, watch.message()).await;
    assert!(next.is_err(), "{next:?}");
}

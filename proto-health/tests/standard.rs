//! The standard protocol in each state of the node.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use proto_health::HealthRegistry;
use proto_health::grpc_health_v1::health_check_response::ServingStatus::{self, *};
use proto_health::grpc_health_v1::{HealthCheckRequest, HealthCheckResponse, HealthListRequest};
use support::*;
use tonic::{Code, Status, Streaming};

const SERVICE: &str = "node.snapshot.v1.SplitSnapshotService";

fn request(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.into() }
}

async fn check(registry: &HealthRegistry, service: &str) -> Result<ServingStatus, Status> {
    let answer = standard(registry).check(request(service)).await?;
    Ok(answer.into_inner().status())
}

async fn watch(registry: &HealthRegistry, service: &str) -> Streaming<HealthCheckResponse> {
    standard(registry).watch(request(service)).await.unwrap().into_inner()
}

async fn next(watching: &mut Streaming<HealthCheckResponse>) -> ServingStatus {
    let next = tokio::time::timeout(Duration::from_secs(60), watching.message()).await;
    next.expect("no message").unwrap().expect("it ended").status()
}

async fn list(registry: &HealthRegistry) -> BTreeMap<String, ServingStatus> {
    let answer = standard(registry).list(HealthListRequest {}).await.unwrap().into_inner();
    answer.statuses.iter().map(|(name, answer)| (name.clone(), answer.status())).collect()
}

/// Of the empty name, liveness, readiness, startup, a gRPC service, and the component.
async fn all(registry: &HealthRegistry) -> [ServingStatus; 6] {
    let mut all = [Unknown; 6];
    for (at, service) in ["", "liveness", "readiness", "startup", SERVICE, "raft"].into_iter().enumerate() {
        all[at] = check(registry, service).await.unwrap();
    }
    assert_eq!(list(registry).await.values().filter(|status| **status == Serving).count(), {
        all.iter().filter(|status| **status == Serving).count()
    });
    all
}

#[tokio::test(start_paused = true)]
async fn each_state_as_the_contract_says() {
    let registry = registry();
    registry.add_service(SERVICE);
    let raft = registry.add(component("raft").critical(), UNDECIDED, "").unwrap();
    let mut watching = watch(&registry, SERVICE).await;
    assert_eq!(next(&mut watching).await, NotServing);
    assert_eq!(all(&registry).await, [NotServing, Serving, NotServing, NotServing, NotServing, NotServing]);
    registry.set_running();
    // UNDECIDED is SERVING after the start.
    assert_eq!(all(&registry).await, [Serving; 6]);
    assert_eq!(next(&mut watching).await, Serving);
    for status in [HEALTHY, DEGRADED] {
        raft.set(status, "");
        assert_eq!(all(&registry).await, [Serving; 6]);
    }
    quiet(&mut watching, Duration::from_secs(60)).await;
    raft.set(UNHEALTHY, "");
    assert_eq!(all(&registry).await, [NotServing, Serving, NotServing, Serving, NotServing, NotServing]);
    assert_eq!(next(&mut watching).await, NotServing);
    raft.set(HEALTHY, "");
    assert_eq!(next(&mut watching).await, Serving);

    registry.begin_drain("", Duration::from_secs(30));
    assert_eq!(all(&registry).await, [NotServing, Serving, NotServing, Serving, NotServing, NotServing]);
    assert_eq!(next(&mut watching).await, NotServing);
    assert_eq!(registry.shut_down(Duration::from_secs(60)).await, 1, "it has not read the end yet");
    assert_eq!(watching.message().await.unwrap(), None);
    assert_eq!(registry.shut_down(Duration::from_secs(60)).await, 0);
    let refused = standard(&registry).watch(request("")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert_eq!(check(&registry, "liveness").await.unwrap(), Serving);
}

#[tokio::test(start_paused = true)]
async fn a_watch_without_the_drain_gets_the_last_state_too() {
    let registry = registry();
    registry.set_running();
    let mut watching = watch(&registry, "").await;
    assert_eq!(next(&mut watching).await, Serving);
    registry.shut_down(Duration::ZERO).await;
    assert_eq!(next(&mut watching).await, NotServing);
    assert_eq!(watching.message().await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn an_unknown_service_is_watched_until_it_appears() {
    let registry = registry();
    registry.set_running();
    assert_eq!(check(&registry, "later").await.unwrap_err().code(), Code::NotFound);
    let mut watching = watch(&registry, "later").await;
    assert_eq!(next(&mut watching).await, ServiceUnknown);
    quiet(&mut watching, Duration::from_secs(60)).await;
    registry.add_service("later");
    assert_eq!(next(&mut watching).await, Serving);
    registry.remove_service("later");
    assert_eq!(next(&mut watching).await, ServiceUnknown);
    registry.add(component("later"), UNHEALTHY, "").unwrap();
    assert_eq!(next(&mut watching).await, NotServing);
    assert_eq!(check(&registry, "later").await.unwrap(), NotServing);
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_gets_the_latest() {
    let registry = registry();
    registry.set_running();
    let raft = registry.add(component("raft").critical(), HEALTHY, "").unwrap();
    let mut watching = watch(&registry, "").await;
    assert_eq!(next(&mut watching).await, Serving);
    for _ in 0..1000 {
        raft.set(UNHEALTHY, "");
        tokio::time::sleep(Duration::from_millis(1)).await;
        raft.set(HEALTHY, "");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    raft.set(UNHEALTHY, "");
    assert_eq!(next(&mut watching).await, NotServing);
    quiet(&mut watching, Duration::from_secs(60)).await;
}

#[tokio::test(start_paused = true)]
async fn a_list_is_bounded_as_the_specification_says() {
    let registry = registry();
    for n in 4..100 {
        registry.add_service(&format!("service-{n}"));
    }
    assert_eq!(list(&registry).await.len(), 100);
    registry.add_service("one-more");
    let refused = standard(&registry).list(HealthListRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
}

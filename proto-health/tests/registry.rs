//! What the registry says in each state, on a clock that jumps: time passes when everybody waits.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod support;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto_common::access::{Access, AllowAll, Authorizer, Call};
use proto_common::error::Error;
use proto_common::peer::Peer;
use proto_common::refusals::count_of;
use proto_health::server::{
    Check, CheckResult, Component, ConnectionId, HealthRegistry, RegistryError, Schedule,
};
use proto_health::v1::{
    DrainStep, GetNodeStatusRequest, HealthCheckRequest, HealthProbe, HealthStatus, NodeState,
    WatchHealthRequest,
};
use proto_health::{Reason, limits::Limits};
use support::*;
use tonic::Request;

const SECOND: Duration = Duration::from_secs(1);

fn every_second() -> Schedule {
    Schedule { interval: SECOND, timeout: SECOND / 2, failure_threshold: 2, success_threshold: 1 }
}

/// A check that says what the test wants.
fn scripted() -> (Arc<Mutex<CheckResult>>, Check) {
    let says = Arc::new(Mutex::new(CheckResult::healthy()));
    let script = Arc::clone(&says);
    (says, Check::new(move || std::future::ready(script.lock().unwrap().clone())))
}

async fn seconds(n: u32) {
    tokio::time::sleep(SECOND * n).await;
}

#[tokio::test(start_paused = true)]
async fn the_probes_follow_the_life_of_the_node() {
    let registry = registry();
    registry.set_starting("recovers its log");
    let raft = registry
        .add(
            component("raft").critical().counts_for([HealthProbe::Readiness, HealthProbe::Startup]),
            UNDECIDED,
            "",
        )
        .unwrap();
    assert_eq!(probes(&registry).await, [UNHEALTHY, HEALTHY, UNHEALTHY, UNHEALTHY]);
    let starting = report(&registry, "").await;
    assert_eq!(starting.message, "still starting: recovers its log");
    // Up, but what counts for the start does not work yet.
    registry.set_running();
    assert_eq!(registry.state(), NodeState::Starting);
    assert_eq!(report(&registry, "startup").await.message, "still starting: waits for raft");
    let waiting = tokio::time::timeout(SECOND, registry.started());
    assert!(waiting.await.is_err(), "it is not yet");
    raft.set(HEALTHY, "");
    registry.started().await;
    assert_eq!((registry.state(), registry.is_ready()), (NodeState::Running, true));
    assert_eq!(probes(&registry).await, [HEALTHY; 4]);

    raft.set(DEGRADED, "one voter is missing");
    assert_eq!(probes(&registry).await, [DEGRADED, HEALTHY, DEGRADED, HEALTHY]);
    assert_eq!(report(&registry, "").await.message, "raft: one voter is missing");
    raft.set(UNDECIDED, "who leads?");
    assert_eq!(probes(&registry).await, [DEGRADED, HEALTHY, DEGRADED, HEALTHY]);
    raft.set(UNHEALTHY, "no quorum");
    assert_eq!(probes(&registry).await, [UNHEALTHY, HEALTHY, UNHEALTHY, HEALTHY]);
    assert!(!registry.is_ready());
    raft.set(HEALTHY, "");

    registry.set_maintenance("new disk");
    assert_eq!(probes(&registry).await, [UNHEALTHY, HEALTHY, UNHEALTHY, HEALTHY]);
    assert_eq!(report(&registry, "readiness").await.message, "in maintenance: new disk");
    assert_eq!(status(&registry, "raft").await, HEALTHY);
    registry.set_running();
    assert_eq!(registry.state(), NodeState::Running);

    registry.begin_drain("SIGTERM", SECOND);
    registry.set_maintenance("too late");
    registry.set_running();
    assert_eq!(registry.state(), NodeState::Draining);
    assert_eq!(probes(&registry).await, [UNHEALTHY, HEALTHY, UNHEALTHY, HEALTHY]);
    assert_eq!(report(&registry, "").await.message, "draining: SIGTERM");
    assert_eq!(registry.shut_down(SECOND).await, 0);
    assert_eq!(probes(&registry).await, [UNHEALTHY, HEALTHY, UNHEALTHY, HEALTHY]);
    assert_eq!(registry.state(), NodeState::ShuttingDown);
}

#[tokio::test(start_paused = true)]
async fn only_critical_components_make_a_node_unhealthy() {
    let registry = registry();
    registry.set_running();
    let cache = registry.add(component("cache"), UNHEALTHY, "cold").unwrap();
    assert_eq!(status(&registry, "").await, DEGRADED);
    cache.set(UNDECIDED, "");
    assert_eq!(status(&registry, "").await, HEALTHY, "one that is not critical may be undecided");
    let threads = registry
        .add(component("threads").critical().counts_for([HealthProbe::Liveness]), HEALTHY, "")
        .unwrap();
    threads.set(UNHEALTHY, "deadlock");
    assert_eq!(probes(&registry).await, [HEALTHY, UNHEALTHY, HEALTHY, HEALTHY]);
    let live = report(&registry, "liveness").await;
    assert_eq!(live.components.len(), 1);
    assert_eq!(live.message, "threads: deadlock");
    let all = report(&registry, "").await.components;
    assert_eq!(
        all.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(),
        ["threads", "cache"],
        "the worst first"
    );
    assert!(all.iter().all(|one| one.set_by_hand && one.age_ms.is_none()));
}

#[tokio::test(start_paused = true)]
async fn a_check_that_hangs_panics_or_flaps_is_seen_and_stops_nobody() {
    let registry = registry();
    registry.set_running();
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let hangs = Check::new(move || {
        counted.fetch_add(1, Ordering::SeqCst);
        std::future::pending()
    });
    registry.check(component("hangs").critical(), every_second(), hangs).unwrap();
    registry
        .check(component("panics"), every_second(), Check::new(|| async { panic!("at the disco") }))
        .unwrap();
    let flips = Arc::new(AtomicU64::new(0));
    let flaps = Check::new(move || {
        let even = flips.fetch_add(1, Ordering::SeqCst).is_multiple_of(2);
        std::future::ready(if even { CheckResult::healthy() } else { CheckResult::unhealthy("now and then") })
    });
    registry.check(component("flaps").critical(), every_second(), flaps).unwrap();

    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(status(&registry, "hangs").await, UNDECIDED, "no result yet");
    let mut flapping = watch(&registry, "flaps", 0).await;
    assert_eq!(next_status(&mut flapping).await, HEALTHY);

    tokio::time::sleep(Duration::from_millis(3500)).await;
    let before = std::time::Instant::now();
    let all = report(&registry, "").await;
    assert!(before.elapsed() < SECOND, "a probe waits for nobody");
    assert_eq!(all.status(), UNHEALTHY);
    let [hangs, panics, flaps] = all.components.as_slice() else { panic!("{all:?}") };
    assert_eq!((hangs.name.as_str(), hangs.status()), ("hangs", UNHEALTHY));
    assert!(hangs.timed_out && hangs.took_ms >= Some(500) && hangs.consecutive_failures >= 2, "{hangs:?}");
    assert_eq!((hangs.failure_threshold, hangs.timeout_ms, hangs.interval_ms), (2, 500, 1000));
    let error = Error::from(hangs.last_error.clone().unwrap());
    assert_eq!(error.reason(), "CHECK_TIMED_OUT");
    assert_eq!((panics.name.as_str(), panics.status()), ("panics", UNHEALTHY));
    assert!(panics.panicked && panics.message.contains("at the disco"), "{panics:?}");
    assert_eq!((flaps.name.as_str(), flaps.status()), ("flaps", HEALTHY), "below its threshold");
    assert!(flaps.last_error.is_some() && flaps.last_success_unix_ms.is_some());
    quiet(&mut flapping, SECOND * 20).await;
    assert!(runs.load(Ordering::SeqCst) > 3, "a run that was cancelled makes room for the next");
}

/// Not on a paused clock: it is the operating system's thread that hangs.
#[tokio::test]
async fn a_thread_that_hangs_is_not_joined_by_others() {
    let registry = registry();
    let runs = Arc::new(AtomicUsize::new(0));
    let (counted, (release, hold)) = (Arc::clone(&runs), std::sync::mpsc::channel::<()>());
    let hold = Mutex::new(hold);
    let check = Check::blocking(move || {
        counted.fetch_add(1, Ordering::SeqCst);
        let _ = hold.lock().unwrap().recv();
        CheckResult::healthy()
    });
    let often = Schedule {
        interval: Duration::from_millis(20),
        timeout: Duration::from_millis(10),
        ..every_second()
    };
    registry.check(component("disk"), often, check).unwrap();
    let disk = loop {
        let disk = report(&registry, "disk").await.components.remove(0);
        if disk.consecutive_failures >= 5 {
            break disk;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert!(disk.timed_out && disk.status() == UNHEALTHY, "{disk:?}");
    assert_eq!(runs.load(Ordering::SeqCst), 1);
    drop(release);
    while status(&registry, "disk").await != HEALTHY {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(runs.load(Ordering::SeqCst) > 1);
}

#[tokio::test(start_paused = true)]
async fn a_result_that_is_too_old_counts_for_nothing() {
    let registry = registry();
    registry.set_running();
    // The second run takes longer than the age at which the first is stale.
    let runs = AtomicUsize::new(0);
    let check = Check::new(move || {
        let first = runs.fetch_add(1, Ordering::SeqCst) == 0;
        async move {
            tokio::time::sleep(if first { Duration::ZERO } else { SECOND * 10 }).await;
            CheckResult::healthy()
        }
    });
    let slow = Schedule { timeout: SECOND * 20, ..every_second() };
    registry.check(component("disk").critical(), slow, check).unwrap();
    let mut watching = watch(&registry, "", 0).await;
    assert_eq!(next_status(&mut watching).await, DEGRADED);
    assert_eq!(next_status(&mut watching).await, HEALTHY);
    assert_eq!(next_status(&mut watching).await, DEGRADED, "told without being asked");
    let disk = report(&registry, "disk").await.components.remove(0);
    assert!(disk.stale && disk.status() == UNDECIDED && disk.last_result() == HEALTHY, "{disk:?}");
    assert!(disk.age_ms > Some(3000), "{disk:?}");
    assert_eq!(next_status(&mut watching).await, HEALTHY);
}

#[tokio::test(start_paused = true)]
async fn every_reply_says_who_answers_and_in_which_order() {
    let registry = registry();
    let first = check(&registry, "").await.unwrap().origin.unwrap();
    assert_eq!(first.identity, Some(identity()));
    assert_eq!((first.sequence, first.state()), (1, NodeState::Starting));
    let second = check(&registry, "").await.unwrap().origin.unwrap();
    assert_eq!((second.sequence, second.revision), (2, first.revision), "nothing has changed");
    registry.set_running();
    let mut watching = watch(&registry, "liveness", 100).await;
    let third = frame(&mut watching).await.origin.unwrap();
    assert_eq!((third.sequence, third.state()), (3, NodeState::Running));
    assert!(third.revision > second.revision);
    let heartbeat = frame(&mut watching).await;
    assert_eq!(heartbeat.health, None, "as it was");
    let fourth = heartbeat.origin.unwrap();
    assert_eq!((fourth.sequence, fourth.uptime_ms), (4, 100));
}

#[tokio::test(start_paused = true)]
async fn a_watch_gets_the_latest_state_and_no_backlog() {
    let registry = registry();
    registry.set_running();
    let raft = registry.add(component("raft"), HEALTHY, "").unwrap();
    let mut watching = watch(&registry, "raft", 0).await;
    assert_eq!(next_status(&mut watching).await, HEALTHY);
    // Faster than frames may be sent, and never read meanwhile.
    for _ in 0..1000 {
        raft.set(UNHEALTHY, "down");
        raft.set(HEALTHY, "");
    }
    raft.set(DEGRADED, "slow");
    let began = tokio::time::Instant::now();
    assert_eq!(next_status(&mut watching).await, DEGRADED);
    assert_eq!(began.elapsed(), Duration::from_millis(100));
    quiet(&mut watching, SECOND * 60).await;
    // Words are no change, and neither is what another component says.
    raft.set(DEGRADED, "slower");
    registry.add(component("other"), UNHEALTHY, "").unwrap();
    quiet(&mut watching, SECOND * 60).await;
    assert_eq!(report(&registry, "raft").await.message, "slower");
}

#[tokio::test(start_paused = true)]
async fn a_service_that_appears_later_and_goes() {
    let registry = registry();
    let mut watching = watch(&registry, "raft", 0).await;
    assert_eq!(next_status(&mut watching).await, HealthStatus::UnknownService);
    let error = Error::from(&check(&registry, "raft").await.unwrap_err());
    assert!(error.is(Reason::UnknownService) && error.get("service") == Some("raft"), "{error:?}");
    registry.add(component("raft"), HEALTHY, "").unwrap();
    assert_eq!(next_status(&mut watching).await, HEALTHY);
    registry.remove(&"raft".parse().unwrap());
    assert_eq!(next_status(&mut watching).await, HealthStatus::UnknownService);
    registry.add(component("raft"), HEALTHY, "").unwrap();
    assert_eq!(next_status(&mut watching).await, HEALTHY);
}

#[tokio::test(start_paused = true)]
async fn a_removed_check_leaves_its_name_to_the_next() {
    let registry = registry();
    let (old, check) = scripted();
    registry.check(component("disk"), every_second(), check).unwrap();
    seconds(1).await;
    registry.remove(&"disk".parse().unwrap());
    *old.lock().unwrap() = CheckResult::unhealthy("of the old one");
    registry.check(component("disk"), every_second(), scripted().1).unwrap();
    seconds(10).await;
    let disk = report(&registry, "disk").await.components.remove(0);
    assert_eq!((disk.status(), disk.consecutive_failures, disk.last_error), (HEALTHY, 0, None));
}

#[tokio::test(start_paused = true)]
async fn a_drain_tells_every_watcher_and_ends_it() {
    let registry = registry();
    registry.set_running();
    registry.check(component("disk"), every_second(), scripted().1).unwrap();
    let mut watches = Vec::new();
    for service in ["", "liveness", "disk", "nobody"] {
        let mut watching = watch(&registry, service, 0).await;
        frame(&mut watching).await;
        watches.push(watching);
    }
    seconds(1).await;
    registry.begin_drain("SIGTERM", SECOND * 30);
    for watching in &mut watches[..3] {
        // A watch of the empty name hears of the component's first result, too.
        let drained = loop {
            let one = frame(watching).await;
            if one.origin.as_ref().unwrap().state() != NodeState::Running {
                break one;
            }
        };
        assert_eq!(drained.origin.unwrap().state(), NodeState::Draining);
        assert!(!drained.last_frame);
    }
    registry.set_stopping_tasks();
    // One of them does not read; it is not waited for longer than that.
    let silent = watch(&registry, "", 0).await;
    let closing = registry.clone();
    let closing = tokio::spawn(async move { closing.shut_down(SECOND * 5).await });
    for mut watching in watches {
        let last = frame(&mut watching).await;
        assert!(last.last_frame, "{last:?}");
        assert_eq!(last.origin.unwrap().state(), NodeState::ShuttingDown);
        assert_eq!(watching.message().await.unwrap(), None, "and ends with OK");
    }
    assert_eq!(closing.await.unwrap(), 1);
    drop(silent);
    assert_eq!(registry.shut_down(SECOND).await, 0);

    let request = WatchHealthRequest::default();
    let refused = Error::from(&client(&registry).watch_health(request).await.unwrap_err());
    assert!(refused.is(Reason::ShuttingDown) && refused.is_retryable(), "{refused:?}");
    let request = proto_health::v1::GetNodeStatusRequest::default();
    let status = client(&registry).get_node_status(request).await.unwrap().into_inner().status.unwrap();
    let drain = status.drain.unwrap();
    assert_eq!((drain.step(), drain.reason.as_str()), (DrainStep::Stopped, "SIGTERM"));
    assert_eq!(drain.deadline_unix_ms - drain.started_unix_ms, 30_000);
}

#[tokio::test(start_paused = true)]
async fn what_is_wrong_with_a_request_is_said_by_name() {
    let registry = registry();
    let mut client = client(&registry);
    let watch = |heartbeat_ms, from: &str| WatchHealthRequest {
        heartbeat_ms,
        from: from.into(),
        ..Default::default()
    };
    for (request, reason, field) in [
        (watch(99, ""), Reason::InvalidField, "heartbeat_ms"),
        (watch(60_001, ""), Reason::InvalidField, "heartbeat_ms"),
        (watch(100, ".x"), Reason::InvalidId, "from"),
        (watch(100, "a/b"), Reason::InvalidId, "from"),
        (
            WatchHealthRequest { service: "x".repeat(1025), ..Default::default() },
            Reason::InvalidField,
            "service",
        ),
    ] {
        let error = Error::from(&client.watch_health(request).await.unwrap_err());
        assert!(error.is(reason), "{error:?}");
        assert_eq!(error.violations()[0].field, field);
    }
    for service in ["nobody", "", "readiness"] {
        let request =
            HealthCheckRequest { service: service.into(), from: "n 2".into(), ..Default::default() };
        let error = Error::from(&client.health_check(request).await.unwrap_err());
        assert!(error.is(Reason::InvalidId), "{error:?}");
    }
    let mut packed = Request::new(HealthCheckRequest::default());
    packed.metadata_mut().insert("grpc-encoding", "gzip".parse().unwrap());
    let error = Error::from(&client.health_check(packed).await.unwrap_err());
    assert!(error.is(Reason::UnsupportedCompression) && error.get("encoding") == Some("gzip"), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn names_of_components_are_bounded_and_not_those_of_probes() {
    let mut limits = Limits::default();
    limits.components = 3;
    let registry = HealthRegistry::builder(identity()).limits(limits).build();
    for name in ["liveness", "readiness", "startup"] {
        let added = registry.add(component(name), HEALTHY, "");
        assert_eq!(added.unwrap_err(), RegistryError::Reserved(name.into()));
    }
    for name in ["a", "b"] {
        registry.add(component(name), HEALTHY, "").unwrap();
    }
    assert_eq!(registry.add(component("a"), HEALTHY, "").unwrap_err(), RegistryError::Exists("a".into()));
    registry.check(component("c"), every_second(), scripted().1).unwrap();
    assert_eq!(registry.check(component("d"), every_second(), scripted().1), Err(RegistryError::TooMany(3)));
    let long = registry.add(component("a"), HEALTHY, "x");
    assert!(long.is_err());
    registry.remove(&"a".parse().unwrap());
    registry.add(component("e"), UNHEALTHY, "x".repeat(5000)).unwrap();
    assert_eq!(report(&registry, "e").await.message.len(), 1024);
}

#[tokio::test(start_paused = true)]
async fn watches_are_bounded_for_the_node_and_for_each_connection() {
    let mut limits = Limits::default();
    (limits.watches, limits.watches_per_connection) = (3, 2);
    let registry = HealthRegistry::builder(identity()).limits(limits).build();
    let open = async |connection: u64| {
        let mut request = Request::new(WatchHealthRequest::default());
        request.extensions_mut().insert(ConnectionId(connection));
        let opened = client(&registry).watch_health(request).await;
        opened.map(tonic::Response::into_inner).map_err(|status| Error::from(&status))
    };
    let first = open(1).await.unwrap();
    let _second = open(1).await.unwrap();
    let refused = open(1).await.unwrap_err();
    assert!(refused.is(Reason::TooManyWatchers) && refused.is_retryable(), "{refused:?}");
    assert!(refused.message().contains("2 watches are open on this connection"), "{refused}");
    let _other = open(2).await.unwrap();
    let refused = open(3).await.unwrap_err();
    assert!(refused.message().contains("3 watches are open at this node"), "{refused}");
    let mut standard = standard(&registry);
    let refused = Error::from(
        &standard.watch(proto_health::grpc_health_v1::HealthCheckRequest::default()).await.unwrap_err(),
    );
    assert!(refused.is(Reason::TooManyWatchers), "one limit for both protocols");
    drop(first);
    open(1).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_peer_has_its_share_of_the_watches_over_all_its_connections() {
    let mut limits = Limits::default();
    limits.watches_per_peer = 3;
    let anybody = Access::new(None, AllowAll);
    let registry = HealthRegistry::builder(identity()).limits(limits).access(anybody).build();
    let open = async |peer: Peer| {
        let mut request = Request::new(WatchHealthRequest::default());
        request.extensions_mut().insert(peer);
        let opened = client(&registry).watch_health(request).await;
        opened.map(tonic::Response::into_inner).map_err(|status| Error::from(&status))
    };
    // Of one certificate, wherever its owner is connected; without one, of one address.
    let at = |address: &str| Some(address.parse().unwrap());
    let certified = |address| Peer::certified(Some("node:///n9".parse().unwrap()), at(address));
    for (peer, other, name) in [
        (certified("10.0.0.1:1"), certified("10.0.0.2:1"), "node:///n9"),
        (Peer::plaintext(at("10.0.0.1:1")), Peer::plaintext(at("10.0.0.1:2")), "10.0.0.1"),
    ] {
        let first = open(peer.clone()).await.unwrap();
        let _more = [open(peer).await.unwrap(), open(other.clone()).await.unwrap()];
        let before = count_of("TOO_MANY_WATCHERS");
        let refused = open(other.clone()).await.unwrap_err();
        assert!(refused.is(Reason::TooManyWatchers) && refused.is_retryable(), "{refused:?}");
        assert_eq!((refused.get("limit"), refused.get("peer")), (Some("3"), Some(name)));
        assert!(count_of("TOO_MANY_WATCHERS") > before);
        open(Peer::plaintext(at("10.0.0.9:1"))).await.unwrap();
        drop(first);
        open(other).await.unwrap();
    }
}

struct NoStatus;

impl Authorizer for NoStatus {
    fn authorize(&self, call: &Call<'_>) -> Result<(), Error> {
        match call.method {
            "GetNodeStatus" => Err(Reason::PermissionDenied.error(format!("{} is for peers", call.method))),
            _ => Ok(()),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_authorizer_decides_per_call() {
    let registry = HealthRegistry::builder(identity()).access(Access::new(None, NoStatus)).build();
    let status = client(&registry).get_node_status(GetNodeStatusRequest::default()).await;
    let refused = Error::from(&status.unwrap_err());
    assert!(
        refused.is(Reason::PermissionDenied) && refused.message() == "GetNodeStatus is for peers",
        "{refused:?}"
    );
    let request = HealthCheckRequest { from: "peer-1".into(), ..Default::default() };
    client(&registry).health_check(request).await.unwrap();
    let peer = "peer-1".parse().unwrap();
    assert!(registry.last_heard_from(&peer).is_some());
    assert_eq!(registry.last_heard_from(&"n2".parse().unwrap()), None);
}

/// Checks end with the last clone of the registry.
#[tokio::test(start_paused = true)]
async fn nothing_outlives_the_registry() {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let registry = registry();
    let check = Check::new(move || {
        counted.fetch_add(1, Ordering::SeqCst);
        std::future::ready(CheckResult::healthy())
    });
    registry.check(Component::new("c".parse().unwrap()), every_second(), check).unwrap();
    seconds(3).await;
    drop(registry);
    seconds(3).await;
    let after = runs.load(Ordering::SeqCst);
    assert!(after >= 3);
    seconds(30).await;
    assert_eq!(runs.load(Ordering::SeqCst), after);
    assert_eq!(Arc::strong_count(&runs), 1, "its task is gone");
}

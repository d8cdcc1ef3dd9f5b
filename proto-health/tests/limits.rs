//! Every limit of `docs/limits.md`: a peer that exceeds it gets the error that is said there, which is counted under its reason, and while it
//! holds whatever it got, other peers are answered and told.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

#[path = "../../proto-common/tests/support/refusals.rs"]
mod refusals;
mod support;

use std::time::Duration;

use prost::Message as _;
use proto_common::error::Error;
use proto_common::refusals::counts;
use proto_common::tuning::{endpoint, tune_server};
use proto_common::v1::TaskError;
use proto_health::HealthRegistry;
use proto_health::grpc_health_v1::HealthCheckRequest as StandardRequest;
use proto_health::grpc_health_v1::health_client::HealthClient;
use proto_health::limits::{Limits, MAX_ANSWER_BYTES, MAX_PEER_ANSWER_BYTES, PEER_PAGE, REMOVAL_BLOCKERS};
use proto_health::server::{
    Check, CheckResult, Facts, FactsFuture, NodeFacts, RegistryError, Schedule, Sections,
};
use proto_health::v1::health_service_client::HealthServiceClient;
use proto_health::v1::{
    ComponentHealth, GetNodeStatusRequest, HealthCheckRequest, NodeStatus, PeerStatus, ShardStatus,
    WatchHealthRequest, WatchHealthResponse,
};
use refusals::{ALONE, Abuse, Refusal, counted, limits_of};
use support::{DEGRADED, HEALTHY, component, frame, identity, next_status, report, watch};
use tokio::net::TcpListener;
use tonic::Streaming;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Server};

/// The peer that exceeds limits, and another one: in plaintext, a peer is an address.
const OFFENDER: [u8; 4] = [127, 0, 0, 1];
const OTHER: [u8; 4] = [127, 0, 0, 2];
/// Shards that the node has.
const SHARDS: usize = 5;

const TOO_MANY: Refusal = Refusal::too_many("TOO_MANY_WATCHERS");

struct Bench {
    registry: HealthRegistry,
    address: String,
}

/// A node that has some shards.
struct Shards;

impl NodeFacts for Shards {
    fn facts(&self, _: Sections) -> FactsFuture<'_> {
        let shard = |n| ShardStatus { shard_id: format!("{n:0>1000}"), ..Default::default() };
        let shards = (0..SHARDS).map(shard).collect();
        Box::pin(std::future::ready(Facts { keys: Some(0), shards, ..Facts::default() }))
    }
}

async fn check(lower: impl FnOnce(&mut Limits), newcomers: bool, exceed: impl AsyncFnOnce(&Bench) -> Abuse) {
    let _alone = ALONE.lock().await;
    let mut limits = Limits::default();
    lower(&mut limits);
    let registry = HealthRegistry::builder(identity()).limits(limits).facts(Shards).build();
    registry.set_running();
    let raft = registry.add(component("raft"), HEALTHY, "").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = tune_server(Server::builder())
        .add_service(registry.service())
        .add_service(registry.standard_service());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving =
        tokio::spawn(server.serve_with_incoming_shutdown(TcpIncoming::from(listener), async move {
            let _ = stopped.await;
        }));
    let bench = Bench { registry, address };
    let before = counts();

    // One that watches already, from the beginning to the end.
    let mut watching = bench.watch(&bench.connect(OTHER).await, "raft").await.unwrap();
    assert_eq!(next_status(&mut watching).await, HEALTHY);
    let Abuse { refused, held, others: _ } = exceed(&bench).await;
    let mut newcomer = None;
    let other = bench.connect(OTHER).await;
    if newcomers {
        let mut watch = bench.watch(&other, "raft").await.unwrap();
        assert_eq!(next_status(&mut watch).await, HEALTHY);
        newcomer = Some(watch);
    }
    // Who finds no place for a watch can ask.
    let request = HealthCheckRequest { service: "raft".into(), ..Default::default() };
    let asked = HealthServiceClient::new(other).health_check(request).await.unwrap().into_inner();
    assert_eq!(asked.health.unwrap().status(), HEALTHY);
    raft.set(DEGRADED, "one voter is missing");
    for watch in [&mut watching].into_iter().chain(&mut newcomer) {
        assert_eq!(next_status(watch).await, DEGRADED);
    }

    counted(&before, &refused, &[]);
    drop(held);
    let closing = bench.registry.clone();
    let closing = tokio::spawn(async move { closing.shut_down(Duration::from_secs(20)).await });
    for mut watch in [Some(watching), newcomer].into_iter().flatten() {
        while !frame(&mut watch).await.last_frame {}
        assert_eq!(watch.message().await.unwrap(), None, "it ends well");
    }
    assert_eq!(closing.await.unwrap(), 0, "no watch is left");
    drop((bench, stop));
    tokio::time::timeout(Duration::from_secs(60), serving).await.expect("the server stops").unwrap().unwrap();
}

impl Bench {
    async fn connect(&self, from: [u8; 4]) -> Channel {
        endpoint(&self.address).unwrap().local_address(Some(from.into())).connect().await.unwrap()
    }

    async fn watch(&self, channel: &Channel, service: &str) -> Result<Streaming<WatchHealthResponse>, Error> {
        let request = WatchHealthRequest { service: service.into(), ..Default::default() };
        let watch = HealthServiceClient::new(channel.clone()).watch_health(request).await;
        watch.map(tonic::Response::into_inner).map_err(Error::from)
    }

    /// How one more watch is refused, in either protocol: there is one limit for both.
    async fn refuses(&self, channel: &Channel) -> [Error; 2] {
        let standard = HealthClient::new(channel.clone()).watch(StandardRequest::default()).await;
        [self.watch(channel, "").await.unwrap_err(), Error::from(standard.unwrap_err())]
    }

    /// A watch that the offender gets.
    async fn takes(&self, channel: &Channel) -> Streaming<WatchHealthResponse> {
        self.watch(channel, "").await.unwrap()
    }

    /// All pages of the node's status.
    async fn pages(&self, page_size: u32) -> Vec<NodeStatus> {
        let mut client = HealthServiceClient::new(self.connect(OFFENDER).await);
        let (mut pages, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = GetNodeStatusRequest { page_size, page_token, ..Default::default() };
            let page = client.get_node_status(request).await.unwrap().into_inner();
            pages.push(page.status.unwrap());
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return pages;
            }
        }
    }
}

fn shards(pages: &[NodeStatus]) -> Vec<usize> {
    pages.iter().map(|page| page.shards.len()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn watches() {
    let lower = |limits: &mut Limits| limits.watches = 3;
    check(lower, false, async |bench| {
        let channel = bench.connect(OFFENDER).await;
        let held = [bench.takes(&channel).await, bench.takes(&channel).await];
        let refused = bench.refuses(&bench.connect(OFFENDER).await).await;
        let full = Refusal {
            facts: &[("limit", Some("3")), ("peer", None)],
            says: "3 watches are open at this node already",
            ..TOO_MANY
        };
        refused.into_iter().fold(Abuse::default().holds(held), |abuse, error| abuse.refused(error, full))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_per_connection() {
    let lower = |limits: &mut Limits| limits.watches_per_connection = 2;
    check(lower, true, async |bench| {
        let channel = bench.connect(OFFENDER).await;
        let held = [bench.takes(&channel).await, bench.takes(&channel).await];
        let refused = bench.refuses(&channel).await;
        let full = Refusal {
            facts: &[("limit", Some("2")), ("peer", None)],
            says: "2 watches are open on this connection",
            ..TOO_MANY
        };
        // What was refused took nothing: another connection has its own.
        let more = bench.takes(&bench.connect(OFFENDER).await).await;
        refused
            .into_iter()
            .fold(Abuse::default().holds((held, more)), |abuse, error| abuse.refused(error, full))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_per_peer() {
    let lower = |limits: &mut Limits| limits.watches_per_peer = 2;
    check(lower, true, async |bench| {
        let mut abuse = Abuse::default();
        let first = bench.takes(&bench.connect(OFFENDER).await).await;
        let second = bench.takes(&bench.connect(OFFENDER).await).await;
        let share = Refusal {
            facts: &[("limit", Some("2")), ("peer", Some("127.0.0.1"))],
            says: "which is its share",
            ..TOO_MANY
        };
        let channel = bench.connect(OFFENDER).await;
        for error in bench.refuses(&channel).await {
            abuse = abuse.refused(error, share);
        }
        // A place comes back with its watch.
        drop(first);
        let again = loop {
            match bench.watch(&channel, "").await {
                Ok(watch) => break watch,
                Err(error) => abuse = abuse.refused(error, share),
            }
        };
        abuse.holds((second, again))
    })
    .await;
}

/// Many watches with short heartbeats are a load that a node makes for itself: 41,000 frames per second.
#[tokio::test(start_paused = true)]
async fn heartbeats_per_peer() {
    const WATCHES: u64 = 40;
    let mut limits = Limits::default();
    limits.heartbeats_per_peer = 100;
    let registry = HealthRegistry::builder(identity()).limits(limits).build();
    registry.set_running();
    let mut watching = watch(&registry, "liveness", 100).await;
    frame(&mut watching).await;
    let next = async |watch: &mut Streaming<WatchHealthResponse>| {
        let began = tokio::time::Instant::now();
        assert_eq!(frame(watch).await.health, None, "a heartbeat");
        u64::try_from(began.elapsed().as_millis()).unwrap()
    };
    assert_eq!(next(&mut watching).await, 100, "as it was asked for");
    let mut others = Vec::new();
    for _ in 1..WATCHES {
        others.push(watch(&registry, "liveness", 100).await);
    }
    assert_eq!(next(&mut watching).await, WATCHES * 10);
    // Who asks for less gets that.
    let mut slow = watch(&registry, "liveness", 1000).await;
    frame(&mut slow).await;
    assert_eq!(next(&mut slow).await, 1000);
    drop((others, slow));
    frame(&mut watching).await;
    assert_eq!(next(&mut watching).await, 100, "the others are gone");
}

/// What the node itself is refused is no refusal of a peer, and is counted nowhere.
#[tokio::test(flavor = "multi_thread")]
async fn components() {
    let lower = |limits: &mut Limits| limits.components = 2;
    check(lower, true, async |bench| {
        let registry = &bench.registry;
        registry.add(component("second"), HEALTHY, "").unwrap();
        let healthy = Check::new(|| std::future::ready(CheckResult::healthy()));
        let checked = registry.check(component("third"), Schedule::default(), healthy);
        assert_eq!(checked, Err(RegistryError::TooMany(2)));
        assert_eq!(registry.add(component("third"), HEALTHY, "").unwrap_err(), RegistryError::TooMany(2));
        assert_eq!(report(registry, "").await.components.len(), 2);
        // One that goes makes room.
        registry.remove(&"second".parse().unwrap());
        registry.add(component("third"), HEALTHY, "").unwrap();
        Abuse::default()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn message_bytes() {
    let lower = |limits: &mut Limits| limits.message_bytes = 100;
    check(lower, true, async |bench| {
        let registry = &bench.registry;
        let long = "x".repeat(5000);
        let handle = registry.add(component("by-hand"), DEGRADED, &long).unwrap();
        let message = async |name| report(registry, name).await.components.remove(0).message;
        assert_eq!(message("by-hand").await.len(), 100, "cut when it is added");
        handle.set(DEGRADED, format!("later {long}"));
        let later = message("by-hand").await;
        assert!(later.len() == 100 && later.starts_with("later xx"), "and when it is set: {later}");
        let says = Check::new(move || std::future::ready(CheckResult::degraded(long.clone())));
        registry.check(component("checked"), Schedule::default(), says).unwrap();
        let checked = async {
            loop {
                let checked = message("checked").await;
                if checked.contains("xx") {
                    return checked;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let checked = tokio::time::timeout(Duration::from_secs(60), checked).await.expect("a result");
        assert_eq!(checked.len(), 100, "and when a check says it");
        Abuse::default()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn page() {
    let lower = |limits: &mut Limits| limits.page = 2;
    check(lower, true, async |bench| {
        for wanted in [0, 3, u32::MAX] {
            assert_eq!(shards(&bench.pages(wanted).await), [2, 2, 1], "who asks for {wanted}");
        }
        Abuse::default()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn page_bytes() {
    // Two shards of a little more than 1000 bytes each, and what stands on every page.
    let lower = |limits: &mut Limits| limits.page_bytes = 2900;
    check(lower, true, async |bench| {
        let pages = bench.pages(0).await;
        assert_eq!(shards(&pages), [2, 2, 1]);
        assert!(pages.iter().all(|page| page.encoded_len() <= 2900));
        Abuse::default()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn callers() {
    let lower = |limits: &mut Limits| limits.callers = 3;
    check(lower, true, async |bench| {
        // One that keeps a watch open is never forgotten, whoever else calls under however many names.
        let request = WatchHealthRequest { from: "friend".into(), ..Default::default() };
        let mut other = HealthServiceClient::new(bench.connect(OTHER).await);
        let watching = other.watch_health(request).await.unwrap().into_inner();
        let mut client = HealthServiceClient::new(bench.connect(OFFENDER).await);
        for number in 0..50 {
            let request = HealthCheckRequest { from: format!("evil-{number}"), ..Default::default() };
            client.health_check(request).await.unwrap();
        }
        let remembered = |name: &str| bench.registry.last_heard_from(&name.parse().unwrap()).is_some();
        assert!(remembered("friend") && remembered("evil-49"));
        let evil = (0..50).filter(|number| remembered(&format!("evil-{number}"))).count();
        assert_eq!(evil, 2, "the oldest are forgotten");
        Abuse::default().holds(watching)
    })
    .await;
}

/// What is refused of an answer is more than an honest node says, however long its texts are.
#[test]
fn honest_answers_fit() {
    let text = |len| "x".repeat(len);
    let peer = PeerStatus {
        node_id: text(128),
        address: text(259),
        state: i32::MAX,
        since_unix_ms: u64::MAX,
        message: text(2 * 256 + 128),
        phi: Some(8.0),
        last_reply_unix_ms: Some(u64::MAX),
        heartbeat_mean_ms: Some(1.0),
        round_trip_ms: Some(1.0),
        last_heard_from_unix_ms: Some(u64::MAX),
        incarnation: u64::MAX,
        node_state: i32::MAX,
        health: i32::MAX,
        self_doubt: true,
    };
    let peers = NodeStatus { peers: vec![peer; PEER_PAGE as usize], ..Default::default() };
    // And what stands on each page.
    let around = REMOVAL_BLOCKERS * 1024;
    assert!(peers.encoded_len() + around <= MAX_PEER_ANSWER_BYTES, "{}", peers.encoded_len());
    let limits = Limits::default();
    let component = ComponentHealth {
        name: text(128),
        message: text(limits.message_bytes),
        last_error: Some(TaskError { message: text(limits.message_bytes), ..Default::default() }),
        ..Default::default()
    };
    let all = limits.components * (component.encoded_len() + 128);
    assert!(all + around <= MAX_ANSWER_BYTES && limits.page_bytes + around <= MAX_ANSWER_BYTES, "{all}");
}

/// So that no row of the table is forgotten here.
#[test]
fn every_limit_of_the_table_is_here() {
    let here = include_str!("limits.rs");
    let limits = limits_of("Health:");
    for name in &limits {
        assert!(here.contains(&format!("async fn {name}()")), "no test exceeds {name}");
    }
    assert!(limits.len() >= 8, "the table was found: {limits:?}");
}

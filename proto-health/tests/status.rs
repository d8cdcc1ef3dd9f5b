//! `GetNodeStatus`: sections, pages, and what keeps a node from being removed.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod support;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use prost::Message as _;
use proto_common::error::Error;
use proto_common::v1::SlotRange;
use proto_health::server::{Facts, FactsFuture, HealthRegistry, NodeFacts, Sections};
use proto_health::v1::{
    ActiveTask, GetNodeStatusRequest, GetNodeStatusResponse, HealthCheckRequest, NodeStatus,
    NodeStatusSection, PeerStatus, RemovalBlocker, RemovalBlockerKind, ShardStatus, SlotOwner,
};
use proto_health::{Reason, limits::Limits};
use support::*;

type Says = Arc<dyn Fn() -> FactsFuture<'static> + Send + Sync>;

/// A node that says what the test wants.
struct Node(Mutex<Says>);

impl NodeFacts for Node {
    fn facts(&self, _: Sections) -> FactsFuture<'_> {
        let says = Arc::clone(&self.0.lock().unwrap());
        says()
    }
}

fn node(facts: Facts) -> HealthRegistry {
    node_that(Arc::new(move || Box::pin(std::future::ready(facts.clone()))))
}

fn node_that(says: Says) -> HealthRegistry {
    HealthRegistry::builder(identity()).facts(Node(Mutex::new(says))).build()
}

async fn ask(
    registry: &HealthRegistry,
    request: GetNodeStatusRequest,
) -> Result<GetNodeStatusResponse, Error> {
    let answer = client(registry).get_node_status(request).await;
    answer.map(tonic::Response::into_inner).map_err(|status| Error::from(&status))
}

async fn status(registry: &HealthRegistry) -> NodeStatus {
    ask(registry, GetNodeStatusRequest::default()).await.unwrap().status.unwrap()
}

fn task(id: &str) -> ActiveTask {
    ActiveTask { id: id.into(), phase: "TRANSFERRING".into(), ..Default::default() }
}

fn kinds(status: &NodeStatus) -> Vec<RemovalBlockerKind> {
    assert_eq!(status.safe_to_remove, status.removal_blockers.is_empty());
    status.removal_blockers.iter().map(RemovalBlocker::kind).collect()
}

#[tokio::test]
async fn safe_to_remove_exactly_when_nothing_is_owned_and_nothing_moves() {
    let idle = Facts { keys: Some(0), ..Facts::default() };
    let safe = status(&node(idle.clone())).await;
    assert!(safe.safe_to_remove, "{safe:?}");
    for (facts, kind) in [
        (Facts { slots_owned: 1, ..idle.clone() }, RemovalBlockerKind::OwnsSlots),
        (Facts { transfers: vec![task("t")], ..idle.clone() }, RemovalBlockerKind::ActiveTransfer),
        (Facts { migrations: vec![task("m")], ..idle.clone() }, RemovalBlockerKind::ActiveMigration),
        (
            Facts {
                removal_blockers: vec![RemovalBlocker {
                    kind: RemovalBlockerKind::UnconfirmedCommit.into(),
                    ..Default::default()
                }],
                ..idle.clone()
            },
            RemovalBlockerKind::UnconfirmedCommit,
        ),
    ] {
        let blocked = status(&node(facts)).await;
        assert_eq!(kinds(&blocked), [kind]);
    }
    let many =
        Facts { slots_owned: 5, transfers: (0..100).map(|n| task(&format!("t{n}"))).collect(), ..idle };
    let blocked = status(&node(many)).await;
    assert_eq!((blocked.removal_blockers.len(), blocked.removal_blockers_omitted), (64, 37));
    assert_eq!(blocked.removal_blockers[0].count, 5);
    assert!(blocked.removal_blockers[1].message.contains("transfer t0 is TRANSFERRING"));
}

#[tokio::test(start_paused = true)]
async fn a_node_that_cannot_say_what_it_has_is_not_safe_to_remove() {
    let nobody = HealthRegistry::builder(identity()).build();
    assert_eq!(kinds(&status(&nobody).await), [RemovalBlockerKind::Unknown]);
    let hangs = node_that(Arc::new(|| Box::pin(std::future::pending())));
    let began = tokio::time::Instant::now();
    let blocked = status(&hangs).await;
    assert_eq!(began.elapsed(), Duration::from_secs(2));
    assert_eq!((kinds(&blocked), blocked.keys), (vec![RemovalBlockerKind::Unknown], None));
    let panics = node_that(Arc::new(|| panic!("what do I have?")));
    assert_eq!(kinds(&status(&panics).await), [RemovalBlockerKind::Unknown]);
}

fn full() -> Facts {
    let slots = Some(SlotRange { start: 0, end: 1 });
    Facts {
        node_address: "127.0.0.1:1".into(),
        slots_owned: 3,
        slot_map_revision: 9,
        keys: Some(5),
        shards: (0..5).map(|n| ShardStatus { shard_id: format!("s{n}"), ..Default::default() }).collect(),
        slot_owners: (0..5).map(|n| SlotOwner { epoch: n, slots, ..Default::default() }).collect(),
        transfers: (0..5).map(|n| task(&format!("t{n}"))).collect(),
        migrations: (0..5).map(|n| task(&format!("m{n}"))).collect(),
        peers: (0..5).map(|n| PeerStatus { node_id: format!("p{n}"), ..Default::default() }).collect(),
        ..Facts::default()
    }
}

/// How long each list is.
fn lists(status: &NodeStatus) -> [usize; 5] {
    [
        status.shards.len(),
        status.slot_owners.len(),
        status.transfers.len(),
        status.migrations.len(),
        status.peers.len(),
    ]
}

#[tokio::test]
async fn sections_leave_out_what_nobody_asked_for() {
    let registry = node(full());
    let all = status(&registry).await;
    assert_eq!(lists(&all), [5; 5]);
    assert!(all.health.is_some());
    for (section, lens) in [
        (NodeStatusSection::Shards, [5, 0, 0, 0, 0]),
        (NodeStatusSection::SlotOwners, [0, 5, 0, 0, 0]),
        (NodeStatusSection::Tasks, [0, 0, 5, 5, 0]),
        (NodeStatusSection::Peers, [0, 0, 0, 0, 5]),
        (NodeStatusSection::Health, [0; 5]),
        (NodeStatusSection::Machine, [0; 5]),
    ] {
        let request = GetNodeStatusRequest { sections: vec![section.into()], ..Default::default() };
        let part = ask(&registry, request).await.unwrap().status.unwrap();
        assert_eq!(lists(&part), lens, "{section:?}");
        assert_eq!(part.health.is_some(), section == NodeStatusSection::Health);
        assert_eq!((part.slots_owned, part.keys, part.slot_map_revision), (3, Some(5), 9));
        assert!(!part.safe_to_remove, "that is never left out");
    }
    for value in [0, 7, -1] {
        let request = GetNodeStatusRequest { sections: vec![1, value], ..Default::default() };
        let error = ask(&registry, request).await.unwrap_err();
        assert!(error.is(Reason::InvalidField) && error.violations()[0].field == "sections[1]", "{error:?}");
    }
}

#[tokio::test]
async fn pages_hold_every_entry_once() {
    let registry = node(full());
    for page_size in [1, 3, 7, 24, 25, 0, 5000] {
        let (mut sum, mut pages, mut page_token) = ([0; 5], 0, String::new());
        loop {
            let request = GetNodeStatusRequest { page_size, page_token, ..Default::default() };
            let page = ask(&registry, request).await.unwrap();
            let status = page.status.unwrap();
            assert!(status.health.is_some() && status.slots_owned == 3, "what is no list is on each page");
            let lens = lists(&status);
            pages += 1;
            assert!(page_size == 0 || lens.iter().sum::<usize>() <= page_size as usize);
            sum.iter_mut().zip(lens).for_each(|(sum, len)| *sum += len);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        assert_eq!(sum, [5; 5], "in pages of {page_size}");
        assert_eq!(pages, if page_size == 0 { 1 } else { 25_u32.div_ceil(page_size) });
    }
}

#[tokio::test]
async fn a_page_stays_below_its_size() {
    let mut facts = full();
    // 16000 bytes of slots each, as large as the protocol lets a shard be.
    let slots = vec![SlotRange { start: 16_383, end: 16_384 }; 128];
    facts.shards = (0..2000)
        .map(|n| ShardStatus { shard_id: format!("s{n}"), slots: slots.clone(), ..Default::default() })
        .collect();
    let registry = node(facts);
    let (mut shards, mut page_token) = (0, String::new());
    while shards < 2000 {
        let page = ask(&registry, GetNodeStatusRequest { page_token, ..Default::default() }).await.unwrap();
        assert!(page.encoded_len() <= (1 << 20) + 4096, "{}", page.encoded_len());
        let status = page.status.unwrap();
        assert!(!status.shards.is_empty() && status.shards.len() <= 1000);
        shards += status.shards.len();
        page_token = page.next_page_token;
    }
    assert_eq!(shards, 2000);
}

#[tokio::test]
async fn a_token_from_elsewhere_is_refused() {
    let registry = node(full());
    let request = GetNodeStatusRequest { page_size: 1, ..Default::default() };
    let token = ask(&registry, request).await.unwrap().next_page_token;
    let with = |sections: Vec<i32>, page_token: &str| GetNodeStatusRequest {
        sections,
        page_token: page_token.into(),
        ..Default::default()
    };
    let restarted = {
        let identity = proto_common::v1::NodeIdentity { incarnation: 43, ..identity() };
        HealthRegistry::builder(identity).build()
    };
    for (registry, request) in [
        (&registry, with(vec![], "nonsense")),
        (&registry, with(vec![], "1.2.3")),
        (&registry, with(vec![], &format!("{token}.1"))),
        (&registry, with(vec![2], &token)),
        (&restarted, with(vec![], &token)),
    ] {
        let error = ask(registry, request).await.unwrap_err();
        assert!(error.is(Reason::InvalidField), "{error:?}");
        assert_eq!(error.violations()[0].field, "page_token");
    }
    assert!(ask(&registry, with(vec![], &token)).await.is_ok());
}

#[tokio::test]
async fn peers_show_when_they_were_heard_from() {
    let mut limits = Limits::default();
    limits.callers = 2;
    let says: Says = Arc::new(|| Box::pin(std::future::ready(full())));
    let registry = HealthRegistry::builder(identity()).limits(limits).facts(Node(Mutex::new(says))).build();
    assert!(status(&registry).await.peers.iter().all(|peer| peer.last_heard_from_unix_ms.is_none()));
    let call = async |from: &str| {
        let request = HealthCheckRequest { from: from.into(), ..Default::default() };
        client(&registry).health_check(request).await.unwrap();
    };
    let request = proto_health::v1::WatchHealthRequest { from: "p0".into(), ..Default::default() };
    let watching = client(&registry).watch_health(request).await.unwrap();
    call("p1").await;
    call("p2").await;
    let heard: Vec<bool> =
        status(&registry).await.peers.iter().map(|peer| peer.last_heard_from_unix_ms.is_some()).collect();
    assert_eq!(heard, [true, false, true, false, false], "the oldest caller without a watch is forgotten");
    drop(watching);
    call("p1").await;
    call("p3").await;
    let heard: Vec<bool> =
        status(&registry).await.peers.iter().map(|peer| peer.last_heard_from_unix_ms.is_some()).collect();
    assert_eq!(heard.iter().filter(|heard| **heard).count(), 2);
}

/// What the node spends on callers does not grow with them, and nobody is told what was before it called.
#[tokio::test]
async fn many_who_ask_at_once_are_told_by_few_questions_to_the_node_and_none_of_before() {
    let (asked, moved) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let says = {
        let (asked, moved) = (Arc::clone(&asked), Arc::clone(&moved));
        move || -> FactsFuture<'static> {
            asked.fetch_add(1, Ordering::SeqCst);
            let slot_map_revision = moved.load(Ordering::SeqCst);
            Box::pin(async move {
                tokio::time::sleep(Duration::from_millis(5)).await;
                Facts { slot_map_revision, ..Facts::default() }
            })
        }
    };
    let registry = node_that(Arc::new(says));
    let began = std::time::Instant::now();
    let calls = (0..2000).map(|n| {
        let (registry, moved) = (registry.clone(), Arc::clone(&moved));
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_micros(n * 50)).await;
            let before = moved.fetch_add(1, Ordering::SeqCst) + 1;
            let told = status(&registry).await;
            assert!(told.slot_map_revision >= before, "{} of {before}", told.slot_map_revision);
        })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap();
    }
    let most = began.elapsed().as_millis() / 5 + 2;
    let asked = asked.load(Ordering::SeqCst);
    assert!(u128::from(asked) <= most, "it was asked {asked} times, not {most}");
}

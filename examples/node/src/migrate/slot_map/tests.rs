use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use proto::node::health_service_server::{HealthService, HealthServiceServer};
use proto::node::{
    ActiveTask, GetNodeStatusResponse, HealthCheckRequest, HealthCheckResponse, NodeIdentity, ReplyOrigin,
    WatchHealthRequest, WatchHealthResponse,
};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response};

use super::*;
use crate::store::{Init, MAX_EPOCH_LEAP, StoreOptions};

fn id(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

/// Node n1, which owns nothing and knows nobody.
fn bare(dir: &std::path::Path) -> Node {
    let init = Init { node: id("n1"), slots: Some(vec![]), others: vec![] };
    Node::open(dir, &init, &StoreOptions::default()).unwrap()
}

fn owner(node: &str, start: u32, epoch: u64, address: &str) -> SlotOwner {
    SlotOwner {
        slots: Some(proto::common::v1::SlotRange { start, end: start + 1 }),
        node_id: node.into(),
        epoch,
        node_address: address.into(),
        client_address: address.into(),
    }
}

#[tokio::test]
async fn a_node_that_is_silent_delays_no_question_to_others() {
    let dir = tempfile::tempdir().unwrap();
    let node = bare(dir.path());
    let listen = || TcpListener::bind("127.0.0.1:0");
    let (silent, other) = (listen().await.unwrap(), listen().await.unwrap());
    let at = |listener: &TcpListener| {
        let grpc = listener.local_addr().unwrap().to_string();
        NodeAddresses { resp: grpc.clone(), grpc }
    };
    node.put_nodes([(id("n2"), at(&silent)), (id("n3"), at(&other))].into()).await.unwrap();
    let stop = CancellationToken::new();
    let following = tokio::spawn(follow(node.clone(), stop.clone()));
    let _silent = silent.accept().await.unwrap();
    // Each question is a connection, since none is answered.
    let mut asked = Vec::new();
    while !asked.windows(2).any(|two: &[Instant]| two[1] - two[0] < ANSWER) {
        assert!(asked.len() < 8, "each waits for the one that is silent: {asked:?}");
        let question = tokio::time::timeout(Duration::from_secs(30), other.accept()).await;
        drop(question.expect("a peer is not asked at all").unwrap());
        asked.push(Instant::now());
    }
    stop.cancel();
    following.await.unwrap();
}

#[tokio::test]
async fn a_node_that_is_elsewhere_now_has_its_pause_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let node = bare(dir.path());
    let (mut asked, mut answers) = (BTreeMap::new(), JoinSet::new());
    let questions = async |asked: &mut BTreeMap<_, Asked>, answers: &mut JoinSet<_>, port: u16| {
        let grpc = format!("127.0.0.1:{port}");
        node.put_nodes([(id("n2"), NodeAddresses { resp: grpc.clone(), grpc })].into()).await.unwrap();
        ask_all(&node, asked, answers);
        answers.len()
    };
    assert_eq!(questions(&mut asked, &mut answers, 1).await, 1);
    asked.get_mut(&id("n2")).unwrap().not_before = Some(Instant::now() + Duration::from_secs(600));
    assert_eq!(questions(&mut asked, &mut answers, 2).await, 1, "it is asked before its time");
    assert_eq!(asked[&id("n2")].address, "127.0.0.1:2");
    asked.get_mut(&id("n2")).unwrap().not_before = None;
    assert_eq!(questions(&mut asked, &mut answers, 2).await, 2);
}

/// A node that answers `GetNodeStatus` like this.
#[derive(Clone)]
struct Tells(Arc<dyn Fn(&GetNodeStatusRequest) -> GetNodeStatusResponse + Send + Sync>);

#[tonic::async_trait]
impl HealthService for Tells {
    type WatchHealthStream = tokio_stream::Empty<Result<WatchHealthResponse, Status>>;

    async fn health_check(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn watch_health(
        &self,
        _: Request<WatchHealthRequest>,
    ) -> Result<Response<Self::WatchHealthStream>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn get_node_status(
        &self,
        request: Request<GetNodeStatusRequest>,
    ) -> Result<Response<GetNodeStatusResponse>, Status> {
        Ok(Response::new((self.0)(request.get_ref())))
    }
}

/// Serves it, until it is aborted.
async fn serve(
    tells: impl Fn(&GetNodeStatusRequest) -> GetNodeStatusResponse + Send + Sync + 'static,
) -> (String, AbortOnDropHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let service = HealthServiceServer::new(Tells(Arc::new(tells)));
    let served = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming(TcpIncoming::from(listener));
    (address, AbortOnDropHandle::new(tokio::spawn(async { served.await.unwrap() })))
}

/// A page of the map of node n2 as it is at `revision`, with one owner to a page.
fn page_of_n2(request: &GetNodeStatusRequest, pages: u32, revision: u64) -> GetNodeStatusResponse {
    let page = request.page_token.parse().unwrap_or(0);
    let next = (page + 1 < pages).then(|| (page + 1).to_string());
    let identity = NodeIdentity { node_id: "n2".into(), incarnation: 1, ..NodeIdentity::default() };
    let status = NodeStatus {
        slot_map_revision: revision,
        slot_owners: vec![owner("n2", page, revision + 1, "h:1")],
        ..NodeStatus::default()
    };
    GetNodeStatusResponse {
        origin: Some(ReplyOrigin { identity: Some(identity), ..ReplyOrigin::default() }),
        status: Some(status),
        next_page_token: next.unwrap_or_default(),
    }
}

#[tokio::test]
async fn of_a_map_that_changes_while_it_is_read_the_front_is_learned() {
    let questions = AtomicU64::new(0);
    let changes = move |request: &GetNodeStatusRequest| {
        page_of_n2(request, 9, questions.fetch_add(1, Ordering::Relaxed) / 3)
    };
    let (address, _served) = serve(changes).await;
    let dir = tempfile::tempdir().unwrap();
    let node = bare(dir.path());
    let addresses = NodeAddresses { grpc: address.clone(), resp: "h:1".into() };
    node.put_nodes([(id("n2"), addresses)].into()).await.unwrap();
    let channel = Asked::new(&node, &id("n2"), address.clone()).channel.unwrap();
    let told = ask(channel.clone(), node.id(), None, PATIENCE).await.unwrap();
    assert_eq!((told.read, told.owners.len()), (Read::Part, 3));
    let refused = ask_whole(channel, node.id()).await.unwrap_err();
    assert!(refused.is_retryable(), "{refused}: a part is not taken for the whole");

    let mut asked = [(id("n2"), Asked::new(&node, &id("n2"), address.clone()))].into();
    take(&node, &mut asked, (id("n2"), address, Ok(told))).await;
    let ownership = node.gate().ownership();
    assert_eq!(ownership.claims().len(), 1, "{ownership:?}");
    assert!(ownership.of(2).is_some() && ownership.of(3).is_none());
    assert_eq!(asked[&id("n2")].revision, None, "it is asked for the rest");
}

/// Whoever makes others read a long map again and again gets no more of their time.
#[tokio::test]
async fn a_long_map_that_changes_all_the_time_is_read_seldom() {
    let (began, mut first_pages) = mpsc::channel(64);
    let (ended, mut last_pages) = mpsc::channel(64);
    let revision = AtomicU64::new(0);
    let pages = 21;
    let changes = move |request: &GetNodeStatusRequest| {
        if request.page_token.is_empty() {
            let read = revision.fetch_add(1, Ordering::Relaxed) + 1;
            let _ = began.try_send((read, Instant::now()));
        }
        let read = revision.load(Ordering::Relaxed);
        let page = page_of_n2(request, pages, read);
        if page.next_page_token.is_empty() {
            let _ = ended.try_send((read, Instant::now()));
        }
        page
    };
    let (grpc, _served) = serve(changes).await;
    let dir = tempfile::tempdir().unwrap();
    let node = bare(dir.path());
    node.put_nodes([(id("n2"), NodeAddresses { resp: grpc.clone(), grpc })].into()).await.unwrap();
    let stop = CancellationToken::new();
    let following = tokio::spawn(follow(node, stop.clone()));
    let mut ends = BTreeMap::new();
    let mut pauses = 0;
    while pauses < 3 {
        let (read, again) = first_pages.recv().await.unwrap();
        assert!(read < 40, "it is never read to its end");
        ends.extend(std::iter::from_fn(|| last_pages.try_recv().ok()));
        // A page that comes late ends a read before its time.
        let Some(ended) = ends.get(&(read - 1)) else { continue };
        pauses += 1;
        let pause = again - *ended;
        // More than the usual time between two questions.
        assert!(pause >= PAGE_PAUSE * (pages - 1) + CLAIM_PAUSE * pages && pause > ASK, "{pause:?}");
    }
    stop.cancel();
    following.await.unwrap();
}

/// Each empty task is three bytes of an answer and some 340 of memory, several times a second.
#[tokio::test]
async fn an_answer_larger_than_any_honest_one_is_refused() {
    let ask = async |tells: fn(&GetNodeStatusRequest) -> NodeStatus| {
        let answer = move |request: &GetNodeStatusRequest| GetNodeStatusResponse {
            status: Some(tells(request)),
            ..GetNodeStatusResponse::default()
        };
        let (address, _served) = serve(answer).await;
        let dir = tempfile::tempdir().unwrap();
        let channel = Asked::new(&bare(dir.path()), &id("n2"), address).channel.unwrap();
        ask(channel, &id("n1"), None, ANSWER).await
    };
    let flood = |_: &GetNodeStatusRequest| NodeStatus {
        transfers: vec![ActiveTask::default(); 180_000],
        ..NodeStatus::default()
    };
    let Err(Unusable::Refused(error)) = ask(flood).await else { panic!("it is believed") };
    assert!(error.code() == Code::OutOfRange && error.message().contains("too large"), "{error:?}");
    let whole = |_: &GetNodeStatusRequest| NodeStatus {
        slot_owners: (0..=PEER_PAGE).map(|slot| owner("n2", slot, 1, "")).collect(),
        ..NodeStatus::default()
    };
    let Err(Unusable::Refused(error)) = ask(whole).await else { panic!("it has no pause") };
    assert_eq!(error.violations()[0].field, "status.slot_owners", "{error:?}");
    // The largest page that an honest node gives.
    let honest = |request: &GetNodeStatusRequest| {
        let (name, address) = ("n".repeat(128), "h".repeat(259));
        let one = |slot| owner(&name, slot, u64::MAX, &address);
        NodeStatus {
            node_address: address.clone(),
            client_address: address.clone(),
            slot_owners: (0..request.page_size).map(one).collect(),
            ..NodeStatus::default()
        }
    };
    assert_eq!(ask(honest).await.unwrap().owners.len(), PEER_PAGE as usize);
}

async fn n2_tells(node: &Node, epoch: u64, status: NodeStatus) {
    let mut told = Told::new((1, epoch), "n2".into(), &status);
    told.add(status.slot_owners).unwrap();
    learn(node, &id("n2"), &told).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_shown_of_an_address_is_not_learned() {
    let dir = tempfile::tempdir().unwrap();
    let node = bare(dir.path());
    let tell = async |address: &str, epoch: u64| {
        let owner = |node: &str, start: u32| owner(node, start, epoch, address);
        let status = NodeStatus {
            node_address: address.into(),
            client_address: address.into(),
            slot_owners: vec![owner("n2", 1), owner("n3", 2)],
            ..NodeStatus::default()
        };
        n2_tells(&node, epoch, status).await;
    };
    let long = "x".repeat(300);
    for (epoch, address) in (1..).zip(["h:1\nn9 h:2", "h:1\x1b[2J", "h :1", "h\u{202e}:1", long.as_str()]) {
        tell(address, epoch).await;
        assert_eq!(node.nodes().get(&id("n2")), None, "{address:?}");
        assert_eq!(node.nodes().get(&id("n3")), None, "{address:?}");
    }
    // Who owns what is learned all the same.
    assert_eq!(node.gate().ownership().of(2).map(|claim| claim.owner.clone()), Some(id("n3")));
    tell("[::1]:7001", 9).await;
    for name in ["n2", "n3"] {
        assert_eq!(node.nodes().get(&id(name)).map(|known| known.resp.clone()), Some("[::1]:7001".into()));
    }
}

/// A node that lies can name as many as it wants.
#[tokio::test]
async fn the_names_that_a_peer_may_have_learned_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let node = bare(dir.path());
    let tell = async |epoch: u64, from: u32| {
        let owner = |start: u32| owner(&format!("{epoch}-{start}"), start, epoch, "h:1");
        let slot_owners = (from..from + 600).map(owner).collect();
        n2_tells(&node, epoch, NodeStatus { slot_owners, ..NodeStatus::default() }).await;
    };
    tell(7, 0).await;
    assert_eq!(node.nodes().len(), 600, "owners are learned");
    // Of slots that others own.
    tell(6, 0).await;
    assert_eq!(node.nodes().len(), 600);
    for epoch in 8..12 {
        tell(epoch, 100).await;
    }
    assert_eq!(node.nodes().len(), MAX_NODES);
    // Who owns what is learned all the same.
    assert_eq!(node.gate().ownership().of(100).map(|claim| claim.owner.clone()), Some(id("11-100")));
}

#[test]
fn what_others_claim_of_ones_own_slots_is_told() {
    let claim =
        |range: &str, owner: &str, epoch| Claim { range: range.parse().unwrap(), owner: id(owner), epoch };
    let mut ownership = Ownership::default();
    ownership.adopt(&claim("0-99", "n1", 3));
    ownership.adopt(&claim("100-199", "n2", 2));
    let told =
        |claims: &[Claim]| contest(&ownership, &id("n1"), &id("n2"), claims).map(|contest| contest.what);
    // A map that is older than that of this node, newer, or of other slots.
    assert_eq!(told(&[claim("0-99", "n3", 2), claim("50-199", "n2", 4), claim("100-199", "n2", 2)]), None);
    let lost = told(&[claim("50-199", "n2", 2)]).unwrap();
    assert_eq!(lost, "node n2 owns slots 50-199 at epoch 2, says n2; slots 0-99 are this node's at epoch 3");
    let twice = told(&[claim("99", "n3", 3)]).unwrap();
    assert_eq!(twice, "node n3 owns slots 99 at epoch 3, says n2; slots 0-99 are this node's at epoch 3");
}

fn told_by_n2(owners: Vec<SlotOwner>) -> Result<Told, Error> {
    let mut told = Told::new((1, 1), "n2".into(), &NodeStatus::default());
    told.add(owners).map(|()| told)
}

#[test]
fn a_map_that_is_out_of_order_is_refused_on_whichever_page() {
    let slots = |start: u32, end: u32| SlotOwner {
        slots: Some(proto::common::v1::SlotRange { start, end }),
        ..owner("n3", 0, 9, "h:1")
    };
    let good = || vec![slots(0, 10), slots(10, 11), slots(5000, 16_384)];
    assert_eq!(told_by_n2(good()).unwrap().owners.len(), 3);
    for bad in
        [slots(0, 16_384), slots(4000, 4001), slots(16_383, 16_384), slots(16_384, 16_385), slots(7, 7)]
    {
        let mut told = told_by_n2(good()).unwrap();
        let refused = told.add(vec![bad.clone()]).unwrap_err();
        assert_eq!(refused.violations()[0].field, "status.slot_owners[3].slots", "{refused}");
        let all = [good(), vec![bad]].concat();
        assert_eq!(told_by_n2(all).unwrap_err(), refused);
    }
    let missing = told_by_n2(vec![SlotOwner::default()]).unwrap_err();
    assert_eq!(missing.violations()[0].field, "status.slot_owners[0].slots", "{missing}");
}

/// It would be the owner for ever.
#[tokio::test]
async fn an_epoch_that_leaps_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let node = bare(dir.path());
    let tell = async |first: u64, second: u64| {
        let owners = vec![owner("n2", 1, first, ""), owner("n3", 2, second, "")];
        let learned = learn(&node, &id("n2"), &told_by_n2(owners).unwrap()).await.unwrap();
        let epoch = |slot| node.gate().ownership().of(slot).map(|claim| claim.epoch);
        (epoch(1), epoch(2), learned.leap.map(|(ignored, first)| (ignored, first.range.start())))
    };
    assert_eq!(tell(u64::MAX, MAX_EPOCH_LEAP + 1).await, (None, None, Some((2, 1))));
    assert_eq!(tell(u64::MAX, 7).await, (None, Some(7), Some((1, 1))), "the rest is learned");
    assert_eq!(tell(1, 8 + MAX_EPOCH_LEAP).await, (Some(1), Some(7), Some((1, 2))));
    assert_eq!(tell(2, 7 + MAX_EPOCH_LEAP).await, (Some(2), Some(7 + MAX_EPOCH_LEAP), None));
}

#[tokio::test]
async fn a_claim_to_ones_own_slots_is_told_while_they_are_and_somebody_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let init = Init { node: id("n1"), slots: Some(vec!["0-99".parse().unwrap()]), others: vec![] };
    let node = Node::open(dir.path(), &init, &StoreOptions::default()).unwrap();
    let tell = async |revision: u64, slots: std::ops::Range<u32>, read: Read| {
        let mut told = Told::new((1, revision), "n2".into(), &NodeStatus::default());
        told.read = read;
        told.add(slots.map(|slot| owner("n2", slot, 1, "")).collect()).unwrap();
        learn(&node, &id("n2"), &told).await.unwrap();
        node.contested().len()
    };
    assert_eq!(tell(1, 0..0, Read::Whole).await, 0);
    assert_eq!(tell(2, 5..6, Read::Part).await, 1);
    assert_eq!(tell(3, 0..0, Read::Part).await, 1, "it may be told behind that");
    assert_eq!(tell(2, 0..0, Read::Known).await, 1);
    assert_eq!(tell(4, 0..0, Read::Whole).await, 0, "no more");
    assert_eq!(tell(5, 5..6, Read::Whole).await, 1);
    let claim = Claim { range: "0-99".parse().unwrap(), owner: id("n3"), epoch: 2 };
    node.give_up(claim.range, vec![claim]).await.unwrap();
    assert!(node.contested().is_empty(), "they are another one's now");
}

/// The largest map that an honest node has.
#[tokio::test]
async fn an_owner_for_each_slot_is_learned_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let node = bare(dir.path());
    let all = || (0..16_384).map(|slot| owner(if slot % 2 == 0 { "n2" } else { "n3" }, slot, 7, ""));
    let began = Instant::now();
    learn(&node, &id("n2"), &told_by_n2(all().collect()).unwrap()).await.unwrap();
    assert_eq!(node.gate().ownership().claims().len(), 16_384);
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    // Only what is new goes to the database, whose writer others need.
    let before = node.gate().ownership();
    learn(&node, &id("n2"), &told_by_n2(all().collect()).unwrap()).await.unwrap();
    assert!(std::sync::Arc::ptr_eq(&before, &node.gate().ownership()), "nothing was written");
}

/// What may be true, what is not, and what cannot be.
fn told() -> impl Strategy<Value = (String, Told, bool)> {
    let name = || prop_oneof!["n[1-4]", "[a-z0-9.-]{0,140}", ".{0,20}"];
    let address = || prop_oneof!["127[.]0[.]0[.]1:[0-9]{1,5}", ".{0,20}", "[a-z]{250,260}"];
    let epoch = || prop_oneof![19 => 0..1000_u64, 1 => any::<u64>()];
    let slots = prop::option::weighted(0.9, (0..17_000_u32, 0..900_u32));
    let owner = (slots, name(), epoch(), address(), address());
    let owner = owner.prop_map(|(slots, node_id, epoch, node_address, client_address)| SlotOwner {
        slots: slots.map(|(start, len)| proto::common::v1::SlotRange { start, end: start + len }),
        node_id,
        epoch,
        node_address,
        client_address,
    });
    let status = (address(), address(), prop::collection::vec(owner, 0..8));
    let kinds = (prop::bool::weighted(0.8), prop::bool::weighted(0.9));
    (name(), name(), kinds, status).prop_map(|(asked, other, (itself, in_order), status)| {
        let (node_address, client_address, mut slot_owners) = status;
        if in_order {
            slot_owners.sort_by_key(|owner| owner.slots.map(|slots| slots.start));
            let mut end = 0;
            slot_owners.retain(|owner| {
                let slots = owner.slots.unwrap_or_default();
                let fits = end <= slots.start && SlotRange::try_from(slots).is_ok();
                end = if fits { slots.end } else { end };
                fits
            });
        }
        let node_id = if itself { asked.clone() } else { other };
        let status = NodeStatus { node_address, client_address, ..NodeStatus::default() };
        let mut told = Told::new((1, 1), node_id, &status);
        let taken = told.add(slot_owners).is_ok();
        (asked, told, taken)
    })
}

#[tokio::test]
async fn whatever_is_told_no_slot_becomes_ones_own_and_nodes_can_be_shown() {
    let dir = tempfile::tempdir().unwrap();
    let me = NodeId::new("n1").unwrap();
    let own: SlotRange = "0-99".parse().unwrap();
    let init = Init { node: me.clone(), slots: Some(vec![own]), others: vec![] };
    let node = Node::open(dir.path(), &init, &StoreOptions::default()).unwrap();
    let mut runner = TestRunner::deterministic();
    let (mut learned, mut refused) = (0, 0);
    for _ in 0..300 {
        let (asked, told, taken) = told().new_tree(&mut runner).unwrap().current();
        refused += usize::from(!taken);
        let Ok(asked) = NodeId::new(asked) else { continue };
        if !taken {
            continue;
        }
        let before = node.gate().ownership();
        learn(&node, &asked, &told).await.unwrap();
        let after = node.gate().ownership();
        if told.node_id != asked.as_str() {
            assert_eq!(*before, *after, "{told:?}: another node answers");
        }
        learned += usize::from(before != after);
        assert!(after.ranges_of(&me).all(|range| own.contains_range(range)), "{told:?}");
        let sorted = after.claims().iter().is_sorted_by(|a, b| a.range.end() <= b.range.start());
        assert!(sorted, "{after:?}");
        assert!(node.nodes().values().all(NodeAddresses::can_be_shown), "{told:?}");
    }
    assert!(learned > 10 && refused > 10, "{learned} {refused}");
}

//! Who owns which slots, learned from other nodes: each is asked a few times a second, and the claim with the highest epoch is the truth.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use proto::common::dial::NodeChannel;
use proto::common::error::{Code, CommonReason, Error};
use proto::common::slots::SlotRange;
use proto::common::text::printable;
use proto::health::limits::{MAX_PEER_ANSWER_BYTES, PEER_PAGE};
use proto::migration::Reason;
use proto::migration::driver::Dial;
use proto::node::health_service_client::HealthServiceClient;
use proto::node::{GetNodeStatusRequest, NodeStatus, NodeStatusSection, SlotOwner};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::common::NodeId;
use crate::node::{Contest, Node};
use crate::store::{Claim, MAX_NODES, NodeAddresses, Ownership};

/// How often each node is asked: three times within the second in which everybody should know.
const ASK: Duration = Duration::from_millis(300);
/// How long one page of an answer may take, and where somebody waits for it, the whole.
const ANSWER: Duration = Duration::from_secs(1);
/// How long a whole answer may take where nobody waits.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pages of one answer; a map of 16384 single slots takes 41.
const PAGES: u32 = 64;
/// How long a node is not asked again for each page of a map behind the first one, which takes half a millisecond to read at either end: a map of 16384
/// single slots, the longest one, may be read each second.
const PAGE_PAUSE: Duration = Duration::from_millis(25);
/// The same for each claim that was new, which takes some 5 µs to learn: such a map, if all of it changes all the time, is read every 4 s.
const CLAIM_PAUSE: Duration = Duration::from_micros(200);

/// What was asked where, and what came of it.
type Answer = (NodeId, String, Result<Told, Unusable>);

/// Asks the nodes that `node` knows, until `stop`: each by itself, so that who is silent delays nothing that others tell.
pub(crate) async fn follow(node: Node, stop: CancellationToken) {
    let mut asked: BTreeMap<NodeId, Asked> = BTreeMap::new();
    let mut answers = JoinSet::new();
    let mut turns = interval(ASK);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = turns.tick() => ask_all(&node, &mut asked, &mut answers),
            Some(answer) = answers.join_next() => match answer {
                Ok(answer) => take(&node, &mut asked, answer).await,
                // Whose it was is not known: all are asked.
                Err(_) => asked.values_mut().for_each(|asked| asked.waiting = false),
            },
        }
    }
}

/// Asks each that has answered, or not in time, and has had its pause.
fn ask_all(node: &Node, asked: &mut BTreeMap<NodeId, Asked>, answers: &mut JoinSet<Answer>) {
    let mut known = node.nodes();
    known.remove(node.id());
    asked.retain(|id, asked| known.get(id).is_some_and(|addresses| addresses.grpc == asked.address));
    for (id, NodeAddresses { grpc, .. }) in known {
        let asked = asked.entry(id.clone()).or_insert_with(|| Asked::new(node, &id, grpc));
        let ready = !asked.waiting && asked.not_before.is_none_or(|at| at <= Instant::now());
        let Some(channel) = asked.channel.clone().filter(|_| ready) else { continue };
        asked.waiting = true;
        let (me, revision) = (node.id().clone(), asked.revision);
        let address = asked.address.clone();
        answers.spawn(async move { (id, address, ask(channel, &me, revision, PATIENCE).await) });
    }
}

async fn take(node: &Node, asked: &mut BTreeMap<NodeId, Asked>, (id, address, answer): Answer) {
    // It may be elsewhere by now.
    let Some(asked) = asked.get_mut(&id).filter(|asked| asked.address == address) else { return };
    asked.waiting = false;
    let told = match answer {
        Ok(told) => told,
        Err(Unusable::Refused(error)) => {
            // However many pages stood before the one that is none.
            asked.not_before = Some(Instant::now() + PAGE_PAUSE * PAGES);
            tell_refused(&id, &error, std::mem::replace(&mut asked.refused, true));
            return;
        }
        // Who cannot be reached is for the monitor of peers to tell.
        Err(Unusable::Unanswered) => return,
    };
    asked.refused = false;
    // Also where it cannot be learned.
    let pause = PAGE_PAUSE * told.pages.saturating_sub(1);
    asked.not_before = Some(Instant::now() + pause);
    match learn(node, &id, &told).await {
        Ok(claims) => {
            asked.not_before = Some(Instant::now() + pause + CLAIM_PAUSE * claims);
            if told.read != Read::Part {
                asked.revision = Some(told.revision);
            }
        }
        Err(error) => tracing::warn!(from = %id, %error, "the slot map cannot be saved"),
    }
}

/// An answer that is none is told once, until the node gives another one: it is asked a few times a second.
fn tell_refused(id: &NodeId, error: &Error, told_before: bool) {
    if !told_before {
        tracing::warn!(from = %id, %error, "the slot map that a node tells is refused");
    }
}

/// Asks each node that `node` knows once, before it serves anybody: an owner that comes back without its data would otherwise serve slots that
/// are another one's by now, until it had asked. Who does not answer at once is not waited for.
pub(crate) async fn ask_first(node: &Node) {
    let mut known = node.nodes();
    known.remove(node.id());
    let mut round = JoinSet::new();
    for (id, NodeAddresses { grpc, .. }) in known {
        if let Some(channel) = Asked::new(node, &id, grpc).channel {
            let me = node.id().clone();
            round.spawn(async move { (id, ask(channel, &me, None, ANSWER).await) });
        }
    }
    for (id, answer) in round.join_all().await {
        let told = match answer {
            Ok(told) => told,
            Err(Unusable::Refused(error)) => {
                tell_refused(&id, &error, false);
                continue;
            }
            Err(Unusable::Unanswered) => continue,
        };
        if let Err(error) = learn(node, &id, &told).await {
            tracing::warn!(from = %id, %error, "the slot map cannot be saved");
        }
    }
}

struct Asked {
    address: String,
    channel: Option<NodeChannel>,
    /// It has not answered yet.
    waiting: bool,
    /// It is not asked again before.
    not_before: Option<Instant>,
    /// Of the map that was learned last.
    revision: Option<(u64, u64)>,
    /// Its last answer could not be one.
    refused: bool,
}

impl Asked {
    fn new(node: &Node, id: &NodeId, address: String) -> Self {
        let dial = node.trust().dialer().to(&address, Some(id));
        let channel = dial.ok().map(|dial| dial.connect_timeout(ANSWER).connect_lazy());
        Self { address, channel, waiting: false, not_before: None, revision: None, refused: false }
    }
}

/// Why nothing is learned.
#[derive(Debug)]
enum Unusable {
    /// There was no answer.
    Unanswered,
    /// No map is like that.
    Refused(Error),
}

impl Unusable {
    fn of(status: Status) -> Self {
        match Error::from(status) {
            // Larger than any honest answer: it is for the log, since the node can be reached.
            error if error.code() == Code::OutOfRange => Self::Refused(error),
            _ => Self::Unanswered,
        }
    }
}

/// How much of a map was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Read {
    /// All of it.
    Whole,
    /// Nothing, since it is the one that was learned last.
    Known,
    /// What stands in front: it changed meanwhile, or its node did not go on. Each claim counts by itself, so this much is learned: a map
    /// that changes faster than it is read would never be.
    Part,
}

/// What is kept of an answer: no more than a claim for each slot, whatever comes.
#[derive(Debug)]
struct Told {
    /// Incarnation of the node, and revision of its map.
    revision: (u64, u64),
    node_id: String,
    /// Its [store id](Node::store_id).
    store: Vec<u8>,
    /// How much of the map is here.
    read: Read,
    /// Pages that it came in.
    pages: u32,
    /// Where the node is.
    own: NodeAddresses,
    /// Disjoint claims in order of their slots, and where their owners are.
    owners: Vec<(Claim, NodeAddresses)>,
    /// Entries up to here, and where the last of them ends.
    seen: (usize, u16),
}

impl Told {
    fn new(revision: (u64, u64), node_id: String, status: &NodeStatus) -> Self {
        let own = addresses(&status.node_address, &status.client_address);
        let read = Read::Part;
        Self { revision, node_id, store: Vec::new(), read, pages: 0, own, owners: Vec::new(), seen: (0, 0) }
    }

    /// Adds the owners of the next page.
    fn add(&mut self, owners: Vec<SlotOwner>) -> Result<(), Error> {
        for owner in owners {
            let (number, end) = self.seen;
            let field = format!("status.slot_owners[{number}].slots");
            let range = SlotRange::from_wire(owner.slots).map_err(|error| error.at(field.as_str()))?;
            if range.start() < end {
                let problem = format!("is {range}; the entry before reaches to {}", end - 1);
                return Err(Reason::InvalidField.field(&field, problem));
            }
            self.seen = (number + 1, range.end());
            // A name that is none here is nobody's to whom clients could be sent.
            let Ok(id) = NodeId::new(&owner.node_id) else { continue };
            let addresses = addresses(&owner.node_address, &owner.client_address);
            self.owners.push((Claim { range, owner: id, epoch: owner.epoch }, addresses));
        }
        Ok(())
    }
}

/// Not known is better than what cannot be shown.
fn addresses(grpc: &str, resp: &str) -> NodeAddresses {
    let told = NodeAddresses { grpc: grpc.to_owned(), resp: resp.to_owned() };
    if told.can_be_shown() { told } else { NodeAddresses::default() }
}

/// The status of a node, with its slot map unless that is the one of `revision`, and what came of that within `patience`.
async fn ask(
    channel: NodeChannel,
    me: &NodeId,
    revision: Option<(u64, u64)>,
    patience: Duration,
) -> Result<Told, Unusable> {
    let end = Instant::now() + patience;
    let mut client = HealthServiceClient::new(channel).max_decoding_message_size(MAX_PEER_ANSWER_BYTES);
    let mut told: Option<Told> = None;
    let mut token = String::new();
    for _ in 0..PAGES {
        let request = GetNodeStatusRequest {
            sections: vec![NodeStatusSection::SlotOwners.into()],
            page_size: PEER_PAGE,
            page_token: token,
            from: me.to_string(),
        };
        let answer = timeout_at(end.min(Instant::now() + ANSWER), client.get_node_status(request)).await;
        let answer = match answer.map(|answer| answer.map_err(Unusable::of)) {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(Unusable::Refused(error))) => return Err(Unusable::Refused(error)),
            _ => break,
        };
        let mut status = answer.status.unwrap_or_default();
        let origin = answer.origin.unwrap_or_default();
        let identity = origin.identity.unwrap_or_default();
        let owners = std::mem::take(&mut status.slot_owners);
        if !u32::try_from(owners.len()).is_ok_and(|entries| entries <= PEER_PAGE) {
            let problem = format!("has {} entries; {PEER_PAGE} were asked for", owners.len());
            return Err(Unusable::Refused(Reason::InvalidField.field("status.slot_owners", problem)));
        }
        let now = (identity.incarnation, status.slot_map_revision);
        let told = told.get_or_insert_with(|| Told {
            store: identity.store_id.into(),
            ..Told::new(now, identity.node_id, &status)
        });
        told.pages += 1;
        if told.revision != now {
            // Two maps need not fit together.
            break;
        }
        if revision == Some(told.revision) {
            told.read = Read::Known;
            break;
        }
        told.add(owners).map_err(Unusable::Refused)?;
        token = answer.next_page_token;
        if token.is_empty() {
            told.read = Read::Whole;
            break;
        }
    }
    told.ok_or(Unusable::Unanswered)
}

/// The whole slot map of the node at the other end of `channel`, as it tells it, and the store that it has.
///
/// # Errors
///
/// There is no answer, or it is none.
pub(crate) async fn ask_whole(channel: NodeChannel, me: &NodeId) -> Result<(Vec<u8>, Ownership), Error> {
    let unanswered = || Error::new(CommonReason::Unavailable, "the node does not tell its slot map");
    let told = ask(channel, me, None, ANSWER).await.map_err(|unusable| match unusable {
        Unusable::Unanswered => unanswered(),
        Unusable::Refused(error) => error,
    })?;
    if told.read != Read::Whole {
        return Err(unanswered());
    }
    let claims: Vec<Claim> = told.owners.into_iter().map(|(claim, _)| claim).collect();
    let mut ownership = Ownership::default();
    ownership.adopt_all(&claims);
    Ok((told.store, ownership))
}

/// Takes over what is newer, and where nodes are. Returns how many claims were.
async fn learn(node: &Node, asked: &NodeId, told: &Told) -> Result<u32, crate::store::StoreError> {
    if told.node_id != asked.as_str() {
        // Another node has this address now; what it says of itself is learned under its own name.
        tracing::debug!(asked = %asked, found = printable(&told.node_id, 128), "another node answers");
        return Ok(0);
    }
    let known = node.nodes();
    let mut nodes = BTreeMap::new();
    let own = &told.own;
    // A node knows best where it is.
    if !own.grpc.is_empty() && !own.resp.is_empty() && known.get(asked) != Some(own) {
        nodes.insert(asked.clone(), own.clone());
    }
    let mut claims = Vec::new();
    for (claim, addresses) in &told.owners {
        // What a node owns stands in its own store, with the rows. Another one may believe more: of a store that was lost, or of a
        // migration that an operator decided there and not here yet.
        if claim.owner == *node.id() {
            continue;
        }
        let complete = known.get(&claim.owner).is_some_and(|known| !known.resp.is_empty());
        if claim.owner != *asked && !complete && !addresses.grpc.is_empty() {
            nodes.insert(claim.owner.clone(), addresses.clone());
        }
        claims.push(claim.clone());
    }
    let ownership = node.gate().ownership();
    let contested = contest(&ownership, node.id(), asked, &claims);
    if told.read == Read::Whole || contested.is_some() {
        node.set_contested(asked, contested);
    } else if told.read == Read::Known {
        node.still_contested(asked);
    }
    let told_of = claims.len();
    let mut leap = None;
    claims.retain(|claim| {
        let believed = !ownership.is_leap(claim.range, claim.epoch);
        if !believed {
            leap.get_or_insert_with(|| claim.clone());
        }
        believed
    });
    if let Some(Claim { range, owner, epoch }) = leap {
        let ignored = told_of - claims.len();
        tracing::warn!(from = %asked, ignored, slots = %range, %owner, epoch, "epochs of slots are not believed, too far above what is known");
    }
    let mut after = (*ownership).clone();
    let claims = after.adopt_all(&claims);
    // Where somebody is counts of those alone to whom clients may have to be sent: names cost whoever tells them nothing.
    let owners: HashSet<&NodeId> = after.claims().iter().map(|claim| &claim.owner).collect();
    nodes.retain(|id, _| id == asked || owners.contains(id));
    let mut room = MAX_NODES.saturating_sub(known.len());
    nodes.retain(|id, _| {
        known.contains_key(id) || {
            let fits = room > 0;
            room = room.saturating_sub(1);
            fits
        }
    });
    if !nodes.is_empty() {
        node.put_nodes(nodes).await?;
    }
    if claims.is_empty() {
        return Ok(0);
    }
    let learned = u32::try_from(claims.len()).unwrap_or(u32::MAX);
    tracing::info!(from = %asked, claims = learned, "learned of new owners of slots");
    node.change_ownership(move |store| async move { store.adopt(claims).await }).await?;
    Ok(learned)
}

/// What `asked` claims for itself of the slots that `me` owns at the same or a higher epoch, or whom it takes for the owner at the same epoch, in words.
/// While slots change hands, the old owner does so for a moment.
fn contest(ownership: &Ownership, me: &NodeId, asked: &NodeId, claims: &[Claim]) -> Option<Contest> {
    claims.iter().find_map(|claim| {
        let same = |own: &&Claim| {
            own.owner == *me
                && (own.epoch == claim.epoch || (own.epoch > claim.epoch && claim.owner == *asked))
        };
        let own = ownership.overlapping(claim.range).find(same)?;
        let Claim { range, owner, epoch } = claim;
        let what = format!("node {owner} owns slots {range} at epoch {epoch}, says {asked}; slots {} are this node's at epoch {}", own.range, own.epoch);
        if own.epoch == claim.epoch {
            tracing::error!("{what}: two nodes serve the same slots");
        }
        Some(Contest::new(own.range, what))
    })
}

/// Learns where the clients of a target are sent to, before any are.
#[derive(Debug)]
pub struct LearningDial<D> {
    node: Node,
    dial: D,
}

impl<D> LearningDial<D> {
    /// `dial`, for `node`.
    pub fn new(node: Node, dial: D) -> Self {
        Self { node, dial }
    }
}

impl<D: Dial<Channel = NodeChannel>> Dial for LearningDial<D> {
    type Channel = NodeChannel;

    async fn dial(&self, node: &NodeId, address: &str) -> Result<NodeChannel, Error> {
        let channel = self.dial.dial(node, address).await?;
        let known = self.node.addresses(node);
        if known.is_none_or(|known| known.resp.is_empty() || known.grpc != address)
            && let Ok(told) = ask(channel.clone(), self.node.id(), None, ANSWER).await
            && let Err(error) = learn(&self.node, node, &told).await
        {
            tracing::warn!(%node, %error, "its address cannot be saved");
        }
        Ok(channel)
    }

    fn check(&self, address: &str) -> Result<(), Error> {
        self.dial.check(address)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use proptest::prelude::*;
    use proptest::strategy::ValueTree as _;
    use proptest::test_runner::TestRunner;
    use proto::node::health_service_server::{HealthService, HealthServiceServer};
    use proto::node::{
        ActiveTask, GetNodeStatusResponse, HealthCheckRequest, HealthCheckResponse, NodeIdentity,
        ReplyOrigin, WatchHealthRequest, WatchHealthResponse,
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
        for (epoch, address) in (1..).zip(["h:1\nn9 h:2", "h:1\x1b[2J", "h :1", "h\u{202e}:1", long.as_str()])
        {
            tell(address, epoch).await;
            assert_eq!(node.nodes().get(&id("n2")), None, "{address:?}");
            assert_eq!(node.nodes().get(&id("n3")), None, "{address:?}");
        }
        // Who owns what is learned all the same.
        assert_eq!(node.gate().ownership().of(2).map(|claim| claim.owner.clone()), Some(id("n3")));
        tell("[::1]:7001", 9).await;
        for name in ["n2", "n3"] {
            assert_eq!(
                node.nodes().get(&id(name)).map(|known| known.resp.clone()),
                Some("[::1]:7001".into())
            );
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
        let claim = |range: &str, owner: &str, epoch| Claim {
            range: range.parse().unwrap(),
            owner: id(owner),
            epoch,
        };
        let mut ownership = Ownership::default();
        ownership.adopt(&claim("0-99", "n1", 3));
        ownership.adopt(&claim("100-199", "n2", 2));
        let told =
            |claims: &[Claim]| contest(&ownership, &id("n1"), &id("n2"), claims).map(|contest| contest.what);
        // A map that is older than that of this node, newer, or of other slots.
        assert_eq!(
            told(&[claim("0-99", "n3", 2), claim("50-199", "n2", 4), claim("100-199", "n2", 2)]),
            None
        );
        let lost = told(&[claim("50-199", "n2", 2)]).unwrap();
        assert_eq!(
            lost,
            "node n2 owns slots 50-199 at epoch 2, says n2; slots 0-99 are this node's at epoch 3"
        );
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
            learn(&node, &id("n2"), &told_by_n2(owners).unwrap()).await.unwrap();
            let epoch = |slot| node.gate().ownership().of(slot).map(|claim| claim.epoch);
            (epoch(1), epoch(2))
        };
        assert_eq!(tell(u64::MAX, MAX_EPOCH_LEAP + 1).await, (None, None));
        assert_eq!(tell(u64::MAX, 7).await, (None, Some(7)), "the rest is learned");
        assert_eq!(tell(1, 8 + MAX_EPOCH_LEAP).await, (Some(1), Some(7)));
        assert_eq!(tell(2, 7 + MAX_EPOCH_LEAP).await, (Some(2), Some(7 + MAX_EPOCH_LEAP)));
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
}

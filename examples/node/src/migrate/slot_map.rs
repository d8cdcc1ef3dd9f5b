//! Who owns which slots, learned from other nodes: each is asked a few times a second, and the claim with the highest epoch is the truth.

#[cfg(test)]
mod tests;

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
    asked.retain(|id, _| known.contains_key(id));
    for (id, NodeAddresses { grpc, .. }) in known {
        let asked = asked.entry(id.clone()).or_insert_with(|| Asked::new(node, &id, grpc.clone()));
        if asked.address != grpc {
            // The pause stays: a node that is said to be elsewhere, by itself as well, is asked no more often for it.
            let (not_before, refused, leaps) = (asked.not_before, asked.refused, asked.leaps);
            *asked = Asked { not_before, refused, leaps, ..Asked::new(node, &id, grpc) };
        }
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
        Ok(learned) => {
            // A map that is as it was has no claims.
            if told.read != Read::Known {
                learned.tell(&id, std::mem::replace(&mut asked.leaps, learned.leap.is_some()));
            }
            asked.not_before = Some(Instant::now() + pause + CLAIM_PAUSE * learned.claims);
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

/// Asks each node that `node` knows once, before it serves anybody. Until it had asked, an owner that comes back without its data would serve slots that
/// are another one's by now, and one that never had any would take them from whoever says that it owns them. Who does not answer at once is not waited for.
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
        match learn(node, &id, &told).await {
            Ok(learned) => learned.tell(&id, false),
            Err(error) => tracing::warn!(from = %id, %error, "the slot map cannot be saved"),
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
    /// Its last answer had epochs that are not believed.
    leaps: bool,
}

/// What came of an answer.
#[derive(Debug, Default)]
struct Learned {
    /// Claims that were taken over.
    claims: u32,
    /// How many were not believed, and the first of them.
    leap: Option<(usize, Claim)>,
}

impl Learned {
    /// What is not believed is told once, until the node gives an answer without that: it is asked a few times a second.
    fn tell(&self, from: &NodeId, told_before: bool) {
        if let Some((ignored, Claim { range, owner, epoch })) = &self.leap
            && !told_before
        {
            tracing::warn!(%from, ignored, slots = %range, %owner, epoch, "epochs of slots are not believed, too far above what is known");
        }
    }
}

impl Asked {
    fn new(node: &Node, id: &NodeId, address: String) -> Self {
        let dial = node.trust().dialer().to(&address, Some(id));
        let channel = dial.ok().map(|dial| dial.connect_timeout(ANSWER).connect_lazy());
        Self {
            address,
            channel,
            waiting: false,
            not_before: None,
            revision: None,
            refused: false,
            leaps: false,
        }
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

/// Takes over what is newer, and where nodes are.
async fn learn(node: &Node, asked: &NodeId, told: &Told) -> Result<Learned, crate::store::StoreError> {
    if told.node_id != asked.as_str() {
        // Another node has this address now; what it says of itself is learned under its own name.
        tracing::debug!(asked = %asked, found = printable(&told.node_id, 128), "another node answers");
        return Ok(Learned::default());
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
    let leap = leap.map(|first| (told_of - claims.len(), first));
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
        return Ok(Learned { claims: 0, leap });
    }
    let learned = u32::try_from(claims.len()).unwrap_or(u32::MAX);
    tracing::info!(from = %asked, claims = learned, "learned of new owners of slots");
    node.change_ownership(move |store| async move { store.adopt(claims).await }).await?;
    Ok(Learned { claims: learned, leap })
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

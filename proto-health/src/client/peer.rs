//! One peer: what is known of it, and the verdict. Pure: time and answers come in, changes go out.

use std::time::Duration;

use bytes::Bytes;
use proto_common::clock::millis;
use proto_common::ids::{NodeId, RANDOM_ID_LEN};
use proto_common::text::printable;
use proto_common::v1::NodeIdentity;

use crate::client::detector::Detector;
use crate::client::options::MonitorOptions;
use crate::v1::{HealthReport, HealthStatus, NodeState, PeerState, PeerStatus, ReplyOrigin};

/// How much of what a peer says is kept, in bytes.
const SHOWN_LEN: usize = 256;

/// A change of what is thought of a peer.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerEvent {
    /// Where it is.
    pub address: String,
    /// Who it is, once it is known.
    pub node_id: Option<NodeId>,
    /// What happened.
    pub change: PeerChange,
    /// Why, in a sentence for people.
    pub reason: String,
    /// Suspicion at this moment; `None` while warming up.
    pub phi: Option<f64>,
    /// When, in milliseconds since the Unix epoch.
    pub unix_ms: u64,
}

/// What happened to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PeerChange {
    /// Its state changed.
    State {
        /// What it was.
        from: PeerState,
        /// What it is.
        to: PeerState,
    },
    /// It is a new process: what was known of the one before is void.
    Restarted {
        /// Incarnation of the process before.
        from: u64,
        /// Incarnation of this one.
        to: u64,
        /// It came back with another disk: its `store_id` is another one.
        new_store: bool,
    },
    /// It is no longer watched.
    Removed,
}

/// An answer of a peer, of whichever method.
#[derive(Debug, Clone, Default)]
pub(crate) struct Answer {
    pub(crate) origin: Option<ReplyOrigin>,
    pub(crate) health: Option<HealthReport>,
    /// One of a row that comes at regular times; others prove life and say nothing about rhythm.
    pub(crate) heartbeat: bool,
    pub(crate) last_frame: bool,
    pub(crate) round_trip: Option<Duration>,
}

/// What a peer thinks of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opinion {
    /// Its verdict on this node.
    pub state: PeerState,
    /// When it last heard from this node, by its own clock, in milliseconds since the Unix epoch.
    pub last_heard_from_unix_ms: Option<u64>,
    /// When it said so, by this node's clock.
    pub unix_ms: u64,
}

/// What is kept of an identity, which may be as large as a message.
#[derive(Debug, Clone)]
struct Known {
    node_id: NodeId,
    store_id: Bytes,
    incarnation: u64,
}

impl Known {
    /// `None`: it names no node.
    fn of(identity: &NodeIdentity) -> Option<Self> {
        let node_id = NodeId::new(&identity.node_id).ok()?;
        // Of a longer one no more is kept; and a part of the message would keep all of it.
        let store_id = &identity.store_id[..identity.store_id.len().min(RANDOM_ID_LEN)];
        Some(Self { node_id, store_id: Bytes::copy_from_slice(store_id), incarnation: identity.incarnation })
    }
}

#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) address: String,
    /// Who has to answer there, if that was given.
    expected: Option<NodeId>,
    identity: Option<Known>,
    sequence: u64,
    detector: Detector,
    pub(crate) state: PeerState,
    since_unix_ms: u64,
    message: String,
    /// Heartbeats on time, one after the other, since it was late.
    on_time: u32,
    added: Duration,
    /// Answers of an earlier incarnation, since there was one of this.
    older: u32,
    last_reply_unix_ms: Option<u64>,
    round_trip: Option<Duration>,
    node_state: NodeState,
    health: HealthStatus,
    /// Why there is no connection; empty if there is one.
    broken: String,
    pub(crate) opinion: Option<Opinion>,
}

impl Peer {
    pub(crate) fn new(
        address: String,
        expected: Option<NodeId>,
        options: &MonitorOptions,
        now: Duration,
        unix_ms: u64,
    ) -> Self {
        Self {
            address,
            expected,
            identity: None,
            sequence: 0,
            detector: Detector::new(options.detector.clone()),
            state: PeerState::WarmingUp,
            since_unix_ms: unix_ms,
            message: String::new(),
            on_time: 0,
            added: now,
            older: 0,
            last_reply_unix_ms: None,
            round_trip: None,
            node_state: NodeState::Unspecified,
            health: HealthStatus::Unspecified,
            broken: String::new(),
            opinion: None,
        }
    }

    /// Who it is: who answered, or who has to.
    pub(crate) fn node_id(&self) -> Option<NodeId> {
        let answered = self.identity.as_ref().map(|identity| identity.node_id.clone());
        answered.or_else(|| self.expected.clone())
    }

    pub(crate) fn event(&self, change: PeerChange, now: Duration, unix_ms: u64) -> PeerEvent {
        PeerEvent {
            address: self.address.clone(),
            node_id: self.node_id(),
            change,
            reason: self.message.clone(),
            phi: self.detector.phi(now),
            unix_ms,
        }
    }

    fn enter(
        &mut self,
        state: PeerState,
        why: String,
        now: Duration,
        unix_ms: u64,
        events: &mut Vec<PeerEvent>,
    ) {
        self.message = why;
        if state == self.state {
            return;
        }
        let from = std::mem::replace(&mut self.state, state);
        self.since_unix_ms = unix_ms;
        self.on_time = 0;
        events.push(self.event(PeerChange::State { from, to: state }, now, unix_ms));
    }

    /// Takes an answer in.
    pub(crate) fn answered(
        &mut self,
        answer: Answer,
        options: &MonitorOptions,
        now: Duration,
        unix_ms: u64,
        events: &mut Vec<PeerEvent>,
    ) {
        let Some(origin) = answer.origin else { return };
        let Some(identity) = &origin.identity else { return };
        let who = || printable(&identity.node_id, SHOWN_LEN);
        if let Some(expected) = &self.expected
            && identity.node_id != expected.as_str()
        {
            self.broken = format!("it is node {} that answers there, not {expected}", who());
            return;
        }
        let Some(identity) = Known::of(identity) else {
            self.broken = format!("what answers there calls itself {:?}, which names no node", who());
            return;
        };
        let before = self.identity.as_ref();
        let before = before.map(|known| (known.node_id == identity.node_id).then_some(known.incarnation));
        if let Some(Some(incarnation)) = before
            && identity.incarnation < incarnation
            && self.is_late_word()
        {
            return;
        }
        if before.is_some_and(|incarnation| incarnation != Some(identity.incarnation)) {
            self.restarted(&identity, now, unix_ms, events);
        }
        self.older = 0;
        let newer = self.identity.is_none() || origin.sequence > self.sequence;
        self.identity = Some(identity);
        self.broken.clear();
        self.last_reply_unix_ms = Some(unix_ms);
        self.round_trip = answer.round_trip.or(self.round_trip);
        if newer {
            self.sequence = origin.sequence;
            self.node_state = origin.state();
            if let Some(health) = &answer.health {
                self.health = health.status();
            }
        }
        if answer.last_frame || self.node_state.is_leaving() {
            let what = if self.node_state == NodeState::Draining { "drains" } else { "shuts down" };
            self.enter(PeerState::Left, format!("it said that it {what}"), now, unix_ms, events);
            return;
        }
        if !answer.heartbeat {
            return;
        }
        let on_time = self.detector.heartbeat(now);
        self.on_time = if on_time { self.on_time.saturating_add(1) } else { 0 };
        match self.state {
            PeerState::WarmingUp if self.detector.phi(now).is_some() => {
                self.enter(PeerState::Alive, "its heartbeats are regular".to_owned(), now, unix_ms, events);
            }
            PeerState::Suspect | PeerState::Dead if self.on_time >= options.recover_heartbeats => {
                let why = format!("{} heartbeats in a row were on time", self.on_time);
                self.enter(PeerState::Alive, why, now, unix_ms, events);
            }
            PeerState::Left => {
                self.enter(PeerState::WarmingUp, "it no longer drains".to_owned(), now, unix_ms, events);
            }
            _ => {}
        }
    }

    /// Whether that is the last word of the process before, which came late, rather than one of a process whose clock was set back, which goes on.
    fn is_late_word(&mut self) -> bool {
        /// Answers of such a process, one after the other.
        const OLDER: u32 = 4;
        self.older += 1;
        self.broken =
            "what answers there says that it started earlier than what did before; was its clock set back?"
                .to_owned();
        self.older < OLDER
    }

    fn restarted(&mut self, identity: &Known, now: Duration, unix_ms: u64, events: &mut Vec<PeerEvent>) {
        let Some(known) = self.identity.take() else { return };
        let new_store = known.store_id != identity.store_id;
        self.detector.reset();
        self.added = now;
        self.sequence = 0;
        self.opinion = None;
        self.message = if known.node_id == identity.node_id {
            format!("it was restarted{}", if new_store { ", with another disk" } else { "" })
        } else {
            format!("another node than {} answers there", known.node_id)
        };
        let change = PeerChange::Restarted { from: known.incarnation, to: identity.incarnation, new_store };
        self.identity = Some(identity.clone());
        events.push(self.event(change, now, unix_ms));
        let why = self.message.clone();
        self.enter(PeerState::WarmingUp, why, now, unix_ms, events);
    }

    /// The connection broke, or could not be made. That is no verdict: it says nothing of the peer.
    pub(crate) fn disconnected(&mut self, why: &str) {
        self.broken = printable(why, SHOWN_LEN);
    }

    /// Whether whoever has to be there has answered, ever.
    pub(crate) fn has_answered(&self) -> bool {
        self.identity.is_some()
    }

    /// Time without any heartbeat.
    fn silence(&self, now: Duration) -> Duration {
        self.detector.silence(now).unwrap_or_else(|| now.saturating_sub(self.added))
    }

    /// Whether its heartbeats are late at `now`.
    pub(crate) fn is_late(&self, options: &MonitorOptions, now: Duration) -> bool {
        match self.detector.phi(now) {
            Some(phi) => phi >= options.suspect_phi,
            None => self.silence(now) >= options.warm_up_timeout / 2,
        }
    }

    /// Whether its silence is a death.
    fn is_gone(&self, options: &MonitorOptions, now: Duration) -> bool {
        match self.detector.phi(now) {
            Some(phi) => phi >= options.dead_phi && self.silence(now) >= options.dead_after,
            None => self.silence(now) >= options.warm_up_timeout,
        }
    }

    /// Looks at it again. In `doubt` of this node itself, nobody is declared dead.
    pub(crate) fn look(
        &mut self,
        options: &MonitorOptions,
        doubt: bool,
        now: Duration,
        unix_ms: u64,
        events: &mut Vec<PeerEvent>,
    ) {
        if matches!(self.state, PeerState::Left | PeerState::Dead) {
            return;
        }
        let why = |what: &str| {
            let silence = millis(self.silence(now));
            let broken = if self.broken.is_empty() { String::new() } else { format!("; {}", self.broken) };
            let doubt = if doubt { "; most peers seem gone at once, so the fault may be here" } else { "" };
            format!("{what}: no heartbeat for {silence} ms{broken}{doubt}")
        };
        if self.is_gone(options, now) && !doubt {
            self.enter(PeerState::Dead, why("gone"), now, unix_ms, events);
        } else if self.is_late(options, now) {
            self.enter(PeerState::Suspect, why("late"), now, unix_ms, events);
        }
    }

    /// This process did not run for `pause`.
    pub(crate) fn forgive(&mut self, pause: Duration) {
        self.detector.forgive(pause);
        self.added += pause;
    }

    pub(crate) fn status(&self, doubt: bool, now: Duration) -> PeerStatus {
        let as_ms = |time: Duration| time.as_secs_f64() * 1000.0;
        PeerStatus {
            node_id: self.node_id().map_or_else(String::new, String::from),
            address: self.address.clone(),
            state: self.state.into(),
            since_unix_ms: self.since_unix_ms,
            message: if self.message.is_empty() { self.broken.clone() } else { self.message.clone() },
            phi: self.detector.phi(now),
            last_reply_unix_ms: self.last_reply_unix_ms,
            heartbeat_mean_ms: self.detector.mean().map(as_ms),
            round_trip_ms: self.round_trip.map(as_ms),
            last_heard_from_unix_ms: None,
            incarnation: self.identity.as_ref().map_or(0, |identity| identity.incarnation),
            node_state: self.node_state.into(),
            health: self.health.into(),
            self_doubt: doubt,
        }
    }
}

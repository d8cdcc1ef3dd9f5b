//! All peers, and the doubt in oneself: when most of them seem gone at once, the fault is here.

use std::collections::BTreeMap;
use std::time::Duration;

use proto_common::ids::NodeId;

use crate::client::options::MonitorOptions;
use crate::client::peer::{Answer, Opinion, Peer, PeerChange, PeerEvent};
use crate::v1::{PeerState, PeerStatus};

/// Fewer than so many peers say nothing about this node.
const LEAST_FOR_DOUBT: usize = 2;

/// Whether the fault may be here. Peers that have never answered may be made up, and must not keep the verdict off those that have; a node
/// that has just started, and hears nobody, must not declare them dead either.
#[derive(Debug, Clone, Copy, Default)]
struct Doubt {
    /// Most of those that have answered since they were added are late.
    of_heard: bool,
    /// Most of all are, or of those.
    of_all: bool,
    /// None has answered.
    none_heard: bool,
}

impl Doubt {
    fn as_to(self, peer: &Peer) -> bool {
        if peer.has_answered() { self.of_heard } else { self.of_all }
    }
}

/// By address. Pure: time and answers come in, events go out.
#[derive(Debug)]
pub(crate) struct Table {
    options: MonitorOptions,
    peers: BTreeMap<String, Peer>,
    doubt: Doubt,
    looked: Option<Duration>,
}

impl Table {
    pub(crate) fn new(options: MonitorOptions) -> Self {
        Self { options, peers: BTreeMap::new(), doubt: Doubt::default(), looked: None }
    }

    pub(crate) fn len(&self) -> usize {
        self.peers.len()
    }

    pub(crate) fn contains(&self, address: &str) -> bool {
        self.peers.contains_key(address)
    }

    pub(crate) fn add(&mut self, address: &str, expected: Option<NodeId>, now: Duration, unix_ms: u64) {
        let peer = Peer::new(address.to_owned(), expected, &self.options, now, unix_ms);
        self.peers.insert(address.to_owned(), peer);
    }

    pub(crate) fn remove(&mut self, address: &str, now: Duration, unix_ms: u64) -> Option<PeerEvent> {
        let peer = self.peers.remove(address)?;
        let event = peer.event(PeerChange::Removed, now, unix_ms);
        Some(PeerEvent { reason: "it is no longer watched".to_owned(), ..event })
    }

    pub(crate) fn answered(
        &mut self,
        address: &str,
        answer: Answer,
        now: Duration,
        unix_ms: u64,
    ) -> Vec<PeerEvent> {
        let mut events = Vec::new();
        if let Some(peer) = self.peers.get_mut(address) {
            peer.answered(answer, &self.options, now, unix_ms, &mut events);
        }
        events
    }

    pub(crate) fn disconnected(&mut self, address: &str, why: &str) {
        if let Some(peer) = self.peers.get_mut(address) {
            peer.disconnected(why);
        }
    }

    pub(crate) fn opinion(&mut self, address: &str, opinion: Option<Opinion>) {
        if let Some(peer) = self.peers.get_mut(address) {
            peer.opinion = opinion;
        }
    }

    pub(crate) fn state(&self, address: &str) -> Option<PeerState> {
        self.peers.get(address).map(|peer| peer.state)
    }

    /// Whether the peer ever has.
    pub(crate) fn has_answered(&self, address: &str) -> bool {
        self.peers.get(address).is_some_and(Peer::has_answered)
    }

    /// Looks at all peers; call it every [`MonitorOptions::tick`].
    pub(crate) fn look(&mut self, now: Duration, unix_ms: u64) -> Vec<PeerEvent> {
        let tick = self.options.tick();
        if let Some(looked) = self.looked {
            let gap = now.saturating_sub(looked);
            // This process stood still, or had no processor. Nobody else is to blame for that time.
            if gap > tick * 2 + self.options.heartbeat / 2 {
                for peer in self.peers.values_mut() {
                    peer.forgive(gap - tick);
                }
            }
        }
        self.looked = Some(now);

        // Those who said goodbye and those whose death is settled say nothing about this node.
        let judged =
            || self.peers.values().filter(|peer| !matches!(peer.state, PeerState::Left | PeerState::Dead));
        let heard = || judged().filter(|peer| peer.has_answered());
        let is_late = |peer: &&Peer| peer.is_late(&self.options, now);
        let most = |late: usize, all: usize| all >= LEAST_FOR_DOUBT && late * 2 > all;
        let of_heard = most(heard().filter(is_late).count(), heard().count());
        let of_all = of_heard || most(judged().filter(is_late).count(), judged().count());
        self.doubt = Doubt { of_heard, of_all, none_heard: heard().next().is_none() };

        let mut events = Vec::new();
        for peer in self.peers.values_mut() {
            let doubt = self.doubt.as_to(peer);
            peer.look(&self.options, doubt, now, unix_ms, &mut events);
        }
        events
    }

    pub(crate) fn doubts_itself(&self) -> bool {
        let Doubt { of_heard, of_all, none_heard } = self.doubt;
        of_heard || (none_heard && of_all)
    }

    pub(crate) fn statuses(&self, now: Duration) -> Vec<PeerStatus> {
        self.peers.values().map(|peer| peer.status(self.doubt.as_to(peer), now)).collect()
    }

    pub(crate) fn peers(&self) -> impl Iterator<Item = &Peer> {
        self.peers.values()
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;

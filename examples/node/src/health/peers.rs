//! Other nodes are watched as they become known.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::health::PeerMonitor;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::common::NodeId;
use crate::node::Node;

/// How often the list of nodes is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// How long a node that does not answer is looked for at an address that is said to be another one's, too: far longer than it takes to connect to one
/// that is there.
const TURN: Duration = Duration::from_secs(10);

/// Keeps the monitor's peers those that the node knows, until `stop`.
pub(super) async fn follow(node: Node, monitor: PeerMonitor, stop: CancellationToken) {
    let mut watched = Watched::default();
    let mut told = BTreeSet::new();
    loop {
        let mut known: BTreeMap<NodeId, String> =
            node.nodes().into_iter().map(|(id, addresses)| (id, addresses.grpc)).collect();
        known.remove(node.id());
        let has_answered = |address: &str| {
            let peers = monitor.statuses();
            peers.iter().any(|peer| peer.address == address && peer.last_reply_unix_ms.is_some())
        };
        for address in watched.leave(&known, has_answered, Instant::now()) {
            monitor.remove(&address);
        }
        for (address, id) in watched.join(&known) {
            match watch(&node, &monitor, &id, &address) {
                Ok(()) => watched.added(address, id, Instant::now()),
                Err(error) => {
                    if told.insert((id.clone(), address.clone())) {
                        tracing::warn!(node = %id, address, error, "this node is not watched");
                    }
                }
            }
        }
        told.retain(|(id, address)| known.get(id) == Some(address));
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
    monitor.stop().await;
}

fn watch(node: &Node, monitor: &PeerMonitor, id: &NodeId, address: &str) -> Result<(), String> {
    let dial = node.trust().dialer().to(address, Some(id)).map_err(|error| error.message().to_owned())?;
    monitor.add(address, Some(id.clone()), dial).map_err(|error| error.to_string())
}

/// Who is looked for at each address. Any node may say that another one is where a third one is: whoever has answered there stays, and those who have
/// not take turns.
#[derive(Debug, Default)]
struct Watched {
    at: BTreeMap<String, (NodeId, Instant)>,
    /// Whose turn was the last at addresses where nobody is looked for at the moment.
    last: BTreeMap<String, NodeId>,
}

impl Watched {
    /// The addresses at which nobody is looked for from now on, or somebody else.
    fn leave(
        &mut self,
        known: &BTreeMap<NodeId, String>,
        has_answered: impl Fn(&str) -> bool,
        now: Instant,
    ) -> Vec<String> {
        let ends = |address: &String, id: &NodeId, since: Instant| {
            if known.get(id) != Some(address) {
                return true;
            }
            let contested = known.iter().any(|(other, at)| at == address && other != id);
            contested && now.duration_since(since) >= TURN && !has_answered(address)
        };
        let over: Vec<String> = self
            .at
            .iter()
            .filter(|(at, (id, since))| ends(at, id, *since))
            .map(|(at, _)| at.clone())
            .collect();
        for address in &over {
            if let Some((id, _)) = self.at.remove(address) {
                self.last.insert(address.clone(), id);
            }
        }
        over
    }

    /// Who is to be looked for where nobody is: of several, the one behind the last.
    fn join(&mut self, known: &BTreeMap<NodeId, String>) -> Vec<(String, NodeId)> {
        let mut claimed: BTreeMap<&String, Vec<&NodeId>> = BTreeMap::new();
        for (id, address) in known {
            claimed.entry(address).or_default().push(id);
        }
        self.last.retain(|address, _| claimed.contains_key(address));
        let free = claimed.into_iter().filter(|(address, _)| !self.at.contains_key(*address));
        free.filter_map(|(address, ids)| {
            let last = self.last.get(address);
            let next = ids.iter().find(|id| last.is_some_and(|last| **id > last));
            Some((address.clone(), (*next.or(ids.first())?).clone()))
        })
        .collect()
    }

    fn added(&mut self, address: String, id: NodeId, now: Instant) {
        self.at.insert(address, (id, now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(nodes: &[(&str, &str)]) -> BTreeMap<NodeId, String> {
        nodes.iter().map(|(id, at)| (NodeId::new(*id).unwrap(), (*at).to_owned())).collect()
    }

    /// Looks once; returns who is looked for at each address then.
    fn look(
        watched: &mut Watched,
        nodes: &[(&str, &str)],
        has_answered: bool,
        now: Instant,
    ) -> Vec<(String, String)> {
        let known = known(nodes);
        watched.leave(&known, |_| has_answered, now);
        for (address, id) in watched.join(&known) {
            watched.added(address, id, now);
        }
        watched.at.iter().map(|(at, (id, _))| (id.to_string(), at.clone())).collect()
    }

    fn pairs(of: &[(&str, &str)]) -> Vec<(String, String)> {
        of.iter().map(|(id, at)| ((*id).to_owned(), (*at).to_owned())).collect()
    }

    #[test]
    fn nobody_is_watched_no_more_because_another_one_was_said_to_be_there() {
        let mut watched = Watched::default();
        let now = Instant::now();
        let there = pairs(&[("n2", "a:1")]);
        assert_eq!(look(&mut watched, &[("n2", "a:1")], true, now), there);
        assert_eq!(look(&mut watched, &[("f", "a:1"), ("n2", "a:1")], true, now + 2 * TURN), there);
        let moved = pairs(&[("n2", "a:1"), ("f", "b:1")]);
        assert_eq!(look(&mut watched, &[("f", "b:1"), ("n2", "a:1")], true, now + 2 * TURN), moved);
        // It is at another address now.
        assert_eq!(look(&mut watched, &[("n2", "c:1")], true, now + 2 * TURN), pairs(&[("n2", "c:1")]));
    }

    #[test]
    fn those_who_do_not_answer_at_an_address_take_turns_until_one_does() {
        let mut watched = Watched::default();
        let now = Instant::now();
        let nodes = [("f", "a:1"), ("g", "a:1"), ("n2", "a:1")];
        let mut seen = Vec::new();
        for turn in 0..4 {
            let at = now + TURN * turn;
            seen.extend(look(&mut watched, &nodes, false, at).into_iter().map(|(id, _)| id));
            look(&mut watched, &nodes, false, at + TURN / 2);
        }
        assert_eq!(seen, ["f", "g", "n2", "f"]);
        look(&mut watched, &nodes, false, now + TURN * 4);
        look(&mut watched, &nodes, false, now + TURN * 5);
        assert_eq!(look(&mut watched, &nodes, true, now + TURN * 50), pairs(&[("n2", "a:1")]));
    }
}

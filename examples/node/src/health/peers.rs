//! Other nodes are watched as they become known.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::health::PeerMonitor;
use tokio_util::sync::CancellationToken;

use crate::common::NodeId;
use crate::node::Node;

/// How often the list of nodes is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Keeps the monitor's peers those that the node knows, until `stop`.
pub(super) async fn follow(node: Node, monitor: PeerMonitor, stop: CancellationToken) {
    let mut watched: BTreeMap<NodeId, String> = BTreeMap::new();
    loop {
        let mut known: BTreeMap<NodeId, String> =
            node.nodes().into_iter().map(|(id, addresses)| (id, addresses.grpc)).collect();
        known.remove(node.id());
        if known != watched {
            for (id, address) in &watched {
                if known.get(id) != Some(address) {
                    monitor.remove(address);
                }
            }
            for (id, address) in &known {
                if watched.get(id) != Some(address) {
                    watch(&node, &monitor, id, address);
                }
            }
            watched = known;
        }
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
    monitor.stop().await;
}

fn watch(node: &Node, monitor: &PeerMonitor, id: &NodeId, address: &str) {
    let added = match node.trust().dialer().to(address, Some(id)) {
        Ok(dial) => monitor.add(address, Some(id.clone()), dial).map_err(|error| error.to_string()),
        Err(error) => Err(error.message().to_owned()),
    };
    if let Err(error) = added {
        tracing::warn!(node = %id, address, error, "this node is not watched");
    }
}

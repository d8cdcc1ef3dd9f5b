//! How the node is and what it tells of itself: the registry with its checks, the watch on other nodes, the drain.
//!
//! | module | holds |
//! |---|---|
//! | `facts` | what `GetNodeStatus` says: slots, keys, tasks, and whether the node can be removed |
//! | `checks` | what is checked in the background |
//! | `peers` | other nodes are watched as they become known |
//! | `drain` | the order of things after SIGTERM |

mod checks;
mod drain;
mod facts;
mod peers;

use std::sync::Arc;

use anyhow::Context as _;
use proto::common::guard::RangeGuard;
use proto::health::client::MonitorOptions;
use proto::health::limits::Limits;
use proto::health::server::checks::SyncedWrite;
use proto::health::server::machine::{Disk, Machine};
use proto::health::{HealthRegistry, PeerMonitor};
use proto::snapshot::transfers::Transfers;
use tokio_util::sync::CancellationToken;

pub use drain::{Drain, WhileUp};
pub use facts::Migrations;

use crate::grpc::identity;
use crate::node::Node;
use crate::split::Splits;

/// Everything that tells of the node.
#[derive(Debug, Clone)]
pub struct Health {
    registry: HealthRegistry,
    monitor: PeerMonitor,
    tasks: facts::Tasks,
}

impl Health {
    /// In the state STARTING, with its checks running. `transfers`, `splits` and `migrations` say what moves, `guard` what must not. Ends with
    /// [`Drain::shut_down`].
    ///
    /// # Errors
    ///
    /// A check could not be added.
    pub fn start(
        node: &Node,
        transfers: &Transfers,
        splits: &Splits,
        guard: &RangeGuard,
        migrations: Arc<dyn Migrations>,
        limits: Limits,
    ) -> anyhow::Result<Self> {
        let monitor = PeerMonitor::start(node.id().clone(), MonitorOptions::default());
        let directory = node.store().directory().to_owned();
        let write = SyncedWrite::new(&directory);
        let machine = Machine::start(vec![Disk::new("data", &directory).write_probe(write.clone())]);
        let tasks = facts::Tasks::new(transfers, splits, migrations);
        let facts = facts::Facts::new(node, tasks.clone(), &monitor);
        let registry = HealthRegistry::builder(identity(node))
            .access(node.trust().access())
            .limits(limits)
            .facts(facts)
            .machine(machine)
            .build();
        for service in [
            "node.snapshot.v1.SplitSnapshotService",
            "node.migration.v1.MigrationService",
            "node.health.v1.HealthService",
            "grpc.reflection.v1.ServerReflection",
        ] {
            registry.add_service(service);
        }
        checks::add(&registry, node, transfers, guard, &write).context("cannot check the node's health")?;
        Ok(Self { registry, monitor, tasks })
    }

    /// Where services get their answers from, and where the node says that it is up.
    #[must_use]
    pub fn registry(&self) -> &HealthRegistry {
        &self.registry
    }

    /// Watches the nodes that `node` knows, until `stop`.
    pub async fn watch_peers(&self, node: Node, stop: CancellationToken) {
        peers::follow(node, self.monitor.clone(), stop).await;
    }
}

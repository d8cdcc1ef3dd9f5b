//! What the node says of itself: slots, keys, tasks, and whether it can be removed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use proto::common::ids::{NodeId, TransferId};
use proto::health::PeerMonitor;
use proto::health::server::{Facts as Told, FactsFuture, NodeFacts, Sections};
use proto::node::{
    ActiveTask, Direction, Fence, NodeStatusSection, Progress, RemovalBlocker, ShardRole, ShardStatus,
    SlotOwner, TaskKind, TransferPhase, TransferProgress,
};
use proto::snapshot::transfers::Transfers;

use crate::node::Node;
use crate::split::{SplitPhase, SplitStatus, Splits};
use crate::store::{Claim, NodeAddresses, Ownership};

/// Where the node's migrations are told of. What it lists keeps the node from being removed and is waited for by a drain.
pub trait Migrations: std::fmt::Debug + Send + Sync + 'static {
    /// Migrations that have not ended, in and out, those with an unknown outcome included. Cheap: it is asked often.
    fn active(&self) -> Vec<ActiveTask>;

    /// What else of them keeps the node from being removed, such as a commit that the source has not confirmed.
    fn removal_blockers(&self) -> Vec<RemovalBlocker> {
        Vec::new()
    }
}

/// Reads everything from where it is true: the gate, the store's counters, the registries of tasks.
#[derive(Debug)]
pub(super) struct Facts {
    node: Node,
    tasks: Tasks,
    monitor: PeerMonitor,
    map: Mutex<SlotMap>,
}

/// Everything that moves data.
#[derive(Debug, Clone)]
pub(super) struct Tasks {
    transfers: Transfers,
    splits: Splits,
    migrations: Arc<dyn Migrations>,
}

/// The slot map that was told last, and its revision. It is kept as it is told: peers ask for it a few times a second, for each page of it.
#[derive(Debug, Default)]
struct SlotMap {
    revision: u64,
    of: Option<(Arc<Ownership>, BTreeMap<NodeId, NodeAddresses>)>,
    told: Arc<[SlotOwner]>,
}

impl SlotMap {
    /// The revision of the map that these make, and the map.
    fn tell(
        &mut self,
        ownership: &Arc<Ownership>,
        nodes: &BTreeMap<NodeId, NodeAddresses>,
    ) -> (u64, Arc<[SlotOwner]>) {
        let same = self.of.as_ref().is_some_and(|(claims, known)| {
            (Arc::ptr_eq(claims, ownership) || claims == ownership) && known == nodes
        });
        if !same {
            self.revision += 1;
            self.told = ownership.claims().iter().map(|claim| slot_owner(claim, nodes)).collect();
            self.of = Some((Arc::clone(ownership), nodes.clone()));
        } else if let Some((claims, _)) = &mut self.of {
            // It is known at a glance next time.
            claims.clone_from(ownership);
        }
        (self.revision, Arc::clone(&self.told))
    }
}

fn slot_owner(claim: &Claim, nodes: &BTreeMap<NodeId, NodeAddresses>) -> SlotOwner {
    let NodeAddresses { grpc, resp } = nodes.get(&claim.owner).cloned().unwrap_or_default();
    SlotOwner {
        slots: Some(claim.range.into()),
        epoch: claim.epoch,
        node_id: claim.owner.to_string(),
        client_address: resp,
        node_address: grpc,
    }
}

impl Tasks {
    pub(super) fn new(transfers: &Transfers, splits: &Splits, migrations: Arc<dyn Migrations>) -> Self {
        Self { transfers: transfers.clone(), splits: splits.clone(), migrations }
    }

    /// Active transfers of snapshots: what the registry has, and splits that have none there at this moment.
    pub(super) fn transfers(&self) -> Vec<ActiveTask> {
        let mut page_token = String::new();
        let mut active = Vec::new();
        // Pages, because the registry has a limit for each. A token of its own is never refused.
        while let Ok(page) =
            self.transfers.registry().list(|_, transfer| !transfer.is_finished(), 0, &page_token)
        {
            active.extend(page.items.iter().map(transfer_task));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        let splits = self.splits.list();
        let more =
            splits.iter().filter(|split| !matches!(split.phase, SplitPhase::Done | SplitPhase::Undone));
        let more: Vec<ActiveTask> = more
            .filter(|split| !active.iter().any(|task| is(task, &split.transfer)))
            .map(split_task)
            .collect();
        active.extend(more);
        active
    }

    pub(super) fn migrations(&self) -> Vec<ActiveTask> {
        self.migrations.active()
    }

    /// Tasks that a drain waits for: those that somebody works on. What was interrupted, or failed and is kept for a while, is resumed later, by whoever wants to.
    pub(super) fn running(&self) -> usize {
        let idle = [TransferPhase::Interrupted, TransferPhase::Failed].map(TransferPhase::short_name);
        let transfers = self.transfers().into_iter().filter(|task| !idle.contains(&&*task.phase)).count();
        transfers + self.migrations().iter().filter(|task| !task.needs_operator).count()
    }
}

fn is(task: &ActiveTask, transfer: &TransferId) -> bool {
    task.id == transfer.as_str()
}

fn transfer_task(transfer: &TransferProgress) -> ActiveTask {
    let outgoing = transfer.progress.as_ref().is_some_and(|progress| progress.direction() == Direction::Out);
    let peer = if outgoing { &transfer.target_node_id } else { &transfer.source_node_id };
    ActiveTask {
        kind: TaskKind::SplitSnapshot.into(),
        id: transfer.transfer_id.clone(),
        phase: transfer.phase().short_name().to_owned(),
        peer_node_id: peer.clone(),
        slots: transfer.slots,
        progress: transfer.progress.clone(),
        needs_operator: false,
    }
}

fn split_task(split: &SplitStatus) -> ActiveTask {
    let first = split.phases.first().map_or(0, |(_, at)| *at);
    let last = split.phases.last().map_or(0, |(_, at)| *at);
    ActiveTask {
        kind: TaskKind::SplitSnapshot.into(),
        id: split.transfer.to_string(),
        phase: split.phase.as_str().to_ascii_uppercase(),
        peer_node_id: split.target.to_string(),
        slots: Some(split.range.into()),
        progress: Some(Progress {
            direction: Direction::Out.into(),
            bytes_total: split.bytes,
            items_total: split.rows,
            started_unix_ms: first,
            phase_started_unix_ms: last,
            last_activity_unix_ms: last,
            ..Progress::default()
        }),
        needs_operator: false,
    }
}

impl Facts {
    pub(super) fn new(node: &Node, tasks: Tasks, monitor: &PeerMonitor) -> Self {
        Self { node: node.clone(), tasks, monitor: monitor.clone(), map: Mutex::default() }
    }

    fn told(&self, sections: Sections) -> Told {
        let node = &self.node;
        let (ownership, nodes) = (node.gate().ownership(), node.nodes());
        let own = ownership.claims().iter().filter(|claim| claim.owner == *node.id());
        let own: Vec<_> = own.cloned().collect();
        let addresses = nodes.get(node.id()).cloned().unwrap_or_default();
        let rows: Vec<u64> = own.iter().map(|claim| node.store().rows_in(claim.range)).collect();
        let map = self.map.lock().unwrap_or_else(PoisonError::into_inner).tell(&ownership, &nodes);
        let (slot_map_revision, slot_owners) = map;
        let shards = own.iter().zip(&rows).map(|(claim, rows)| ShardStatus {
            shard_id: format!("slots-{}", claim.range),
            slots: vec![claim.range.into()],
            role: ShardRole::Sole.into(),
            fence: Some(Fence { epoch: claim.epoch, term: 0 }),
            leader_node_id: node.id().to_string(),
            lag_entries: Some(0),
            lag_ms: Some(0),
            keys: Some(*rows),
            ..ShardStatus::default()
        });
        Told {
            node_address: addresses.grpc,
            client_address: addresses.resp,
            slots_owned: own.iter().map(|claim| u32::from(claim.range.end() - claim.range.start())).sum(),
            keys: Some(rows.iter().sum()),
            bytes: None,
            slot_map_revision,
            shards: if sections.contains(NodeStatusSection::Shards) { shards.collect() } else { Vec::new() },
            slot_owners,
            transfers: self.tasks.transfers(),
            migrations: self.tasks.migrations(),
            peers: self.monitor.statuses(),
            removal_blockers: self.tasks.migrations.removal_blockers(),
        }
    }
}

impl NodeFacts for Facts {
    fn facts(&self, sections: Sections) -> FactsFuture<'_> {
        Box::pin(async move { self.told(sections) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Peers ask for it a few times a second, for each page.
    #[test]
    fn a_map_is_made_once_for_each_change_of_it() {
        let mut map = SlotMap::default();
        let id = |name| NodeId::new(name).unwrap();
        let claim = |range: &str, epoch| Claim { range: range.parse().unwrap(), owner: id("n2"), epoch };
        let mut ownership = Ownership::default();
        ownership.adopt(&claim("0-99", 1));
        let first = Arc::new(ownership.clone());
        let mut nodes = BTreeMap::new();
        let (revision, told) = map.tell(&first, &nodes);
        let (same_revision, same) = map.tell(&Arc::new(ownership.clone()), &nodes);
        assert!(same_revision == revision && Arc::ptr_eq(&told, &same));
        assert_eq!((told.len(), told[0].epoch, &*told[0].client_address), (1, 1, ""));

        ownership.adopt(&claim("5", 2));
        let second = Arc::new(ownership);
        let (changed, told) = map.tell(&second, &nodes);
        assert!(changed > revision && told.len() == 3);
        nodes.insert(id("n2"), NodeAddresses { grpc: "h:1".into(), resp: "h:2".into() });
        let (moved, told) = map.tell(&second, &nodes);
        assert!(moved > changed && told.iter().all(|owner| owner.client_address == "h:2"));
    }
}

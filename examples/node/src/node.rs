//! A node: its database, the gate in front of it, and what it knows of other nodes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crate::common::{NodeId, SlotRange};
use crate::gate::{Gate, GateHold, HoldMode};
use crate::incarnation;
use crate::store::{
    Claim, ExportSummary, Handover, Identity, Init, NodeAddresses, Ownership, Store, StoreError, StoreOptions,
};
use crate::trust::Trust;

/// Requests that may wait for slots that change hands; more get `TRYAGAIN`.
pub const MAX_WAITING: usize = 10_000;

/// See the [module](self). Clones are the same node.
#[derive(Debug, Clone)]
pub struct Node {
    inner: Arc<Inner>,
    trust: Trust,
}

#[derive(Debug)]
struct Inner {
    id: NodeId,
    store_id: [u8; 16],
    store: Store,
    gate: Gate,
    nodes: RwLock<BTreeMap<NodeId, NodeAddresses>>,
    /// Changes of ownership, one after the other: what is durable and the gate must not overtake each other.
    changing: tokio::sync::Mutex<()>,
    /// Slots of this node that another one says are its own, by that node.
    contested: Mutex<BTreeMap<NodeId, Contest>>,
    /// The data directory was made by this process.
    fresh: bool,
    started: Instant,
    incarnation: u64,
}

/// What another node claims of this node's slots.
#[derive(Debug)]
pub(crate) struct Contest {
    slots: SlotRange,
    pub(crate) what: String,
    told: Instant,
}

impl Contest {
    /// `what` is in words.
    pub(crate) fn new(slots: SlotRange, what: String) -> Self {
        Self { slots, what, told: Instant::now() }
    }
}

/// Of who has not said so for that long it is told when it did: it may be gone, or only not to be reached from here.
const LONG_AGO: Duration = Duration::from_secs(60);

impl Node {
    /// Opens the node's data directory. Blocks.
    ///
    /// # Errors
    ///
    /// See [`Store::open`].
    pub fn open(directory: &Path, init: &Init, options: &StoreOptions) -> Result<Self, StoreError> {
        let (store, identity) = Store::open(directory, init, options)?;
        let Identity { node: id, store_id, ownership, nodes, fresh } = identity;
        let gate = Gate::new(id.clone(), ownership, MAX_WAITING);
        let inner = Inner {
            id,
            store_id,
            store,
            gate,
            nodes: RwLock::new(nodes),
            changing: tokio::sync::Mutex::new(()),
            contested: Mutex::default(),
            fresh,
            started: Instant::now(),
            incarnation: incarnation::next(directory),
        };
        Ok(Self { inner: Arc::new(inner), trust: Trust::default() })
    }

    /// The node, with whom it trusts. Without, all is plaintext.
    #[must_use]
    pub fn with_trust(mut self, trust: Trust) -> Self {
        self.trust = trust;
        self
    }

    /// Whom it trusts.
    #[must_use]
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// The node's id.
    #[must_use]
    pub fn id(&self) -> &NodeId {
        &self.inner.id
    }

    /// 16 random bytes made with the data directory.
    #[must_use]
    pub fn store_id(&self) -> [u8; 16] {
        self.inner.store_id
    }

    /// Rises with each start: the time of it, in milliseconds since the Unix epoch, unless the clock was set back.
    #[must_use]
    pub fn incarnation(&self) -> u64 {
        self.inner.incarnation
    }

    /// Whether the data directory was made by this process: it knows of no owner but those that it was told of on the command line.
    pub(crate) fn is_fresh(&self) -> bool {
        self.inner.fresh
    }

    /// Notes what `by` claims of this node's slots, if anything.
    pub(crate) fn set_contested(&self, by: &NodeId, contest: Option<Contest>) {
        let mut contested = self.inner.contested.lock().unwrap_or_else(PoisonError::into_inner);
        match contest {
            Some(contest) => contested.insert(by.clone(), contest),
            None => contested.remove(by),
        };
    }

    /// `by` still says what it said last.
    pub(crate) fn still_contested(&self, by: &NodeId) {
        let mut contested = self.inner.contested.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(contest) = contested.get_mut(by) {
            contest.told = Instant::now();
        }
    }

    /// What other nodes claim of this node's slots, in words: as long as the slots are this node's.
    pub(crate) fn contested(&self) -> Vec<String> {
        let ownership = self.inner.gate.ownership();
        let mut contested = self.inner.contested.lock().unwrap_or_else(PoisonError::into_inner);
        contested.retain(|_, contest| {
            ownership.overlapping(contest.slots).any(|claim| claim.owner == self.inner.id)
        });
        let told = contested.values().map(|Contest { what, told, .. }| match told.elapsed() {
            ago if ago < LONG_AGO => what.clone(),
            ago => format!("{what}; it said so last {} s ago", ago.as_secs()),
        });
        told.collect()
    }

    /// When it was opened.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.inner.started
    }

    /// The database.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// The gate that requests pass.
    #[must_use]
    pub fn gate(&self) -> &Gate {
        &self.inner.gate
    }

    /// Where `node` can be reached, if that is known.
    #[must_use]
    pub fn addresses(&self, node: &NodeId) -> Option<NodeAddresses> {
        self.inner.nodes.read().unwrap_or_else(PoisonError::into_inner).get(node).cloned()
    }

    /// All nodes that are known, this one included.
    #[must_use]
    pub fn nodes(&self) -> BTreeMap<NodeId, NodeAddresses> {
        self.inner.nodes.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Remembers where nodes can be reached, durably.
    ///
    /// # Errors
    ///
    /// Nothing was changed.
    pub async fn put_nodes(&self, nodes: BTreeMap<NodeId, NodeAddresses>) -> Result<(), StoreError> {
        self.inner.store.put_nodes(nodes.clone()).await?;
        self.inner.nodes.write().unwrap_or_else(PoisonError::into_inner).extend(nodes);
        Ok(())
    }

    /// [`put_nodes`](Self::put_nodes) of what the command line says: known from now on in any case. Nothing is written where the database says the same.
    ///
    /// # Errors
    ///
    /// The next process does not know of it.
    pub(crate) async fn meet(&self, mut nodes: BTreeMap<NodeId, NodeAddresses>) -> Result<(), StoreError> {
        {
            let mut known = self.inner.nodes.write().unwrap_or_else(PoisonError::into_inner);
            nodes.retain(|id, addresses| known.get(id) != Some(addresses));
            known.extend(nodes.clone());
        }
        if nodes.is_empty() { Ok(()) } else { self.inner.store.put_nodes(nodes).await }
    }

    /// The slots that this node owns.
    #[must_use]
    pub fn own_ranges(&self) -> Vec<SlotRange> {
        self.inner.gate.ownership().ranges_of(&self.inner.id).collect()
    }

    /// Which other node than `source`, which wants to hand `range` over, is known to own slots of it; and a sentence that says so. They may have changed hands a
    /// moment ago: the slot map is learned within a second.
    pub(crate) fn third_owner(&self, range: SlotRange, source: &NodeId) -> Option<(NodeId, String)> {
        let ownership = self.inner.gate.ownership();
        let Claim { range: slots, owner, .. } = ownership.of_neither(range, source, &self.inner.id)?;
        let sentence = format!("slots {slots} of {range} are known to be of node {owner}, not of {source}");
        Some((owner.clone(), sentence))
    }

    /// How many keys this node serves. Expired ones count until they are deleted, as in Redis. Takes the same time however
    /// many there are.
    #[must_use]
    pub fn key_count(&self) -> u64 {
        self.own_ranges().into_iter().map(|range| self.inner.store.rows_in(range)).sum()
    }

    /// Lets new writes to `range` wait, and returns when those that were let in before are durable.
    ///
    /// Cancel safe: dropping the future releases the writes.
    pub async fn hold_writes(&self, range: SlotRange) -> GateHold {
        self.inner.gate.hold(range, HoldMode::Writes).await
    }

    /// Writes all live rows of `range` to a snapshot file, as of one moment after the call. With the writes of
    /// the range [held](Node::hold_writes), that is the last state before whatever follows.
    ///
    /// # Errors
    ///
    /// There is no file.
    pub async fn consistent_export(
        &self,
        range: SlotRange,
        handover: Handover,
        path: PathBuf,
    ) -> Result<ExportSummary, StoreError> {
        let node = self.clone();
        blocking(move || node.inner.store.export_file(&node.inner.id, range, handover, &path)).await
    }

    /// Makes the rows of a snapshot file this node's, together with the slots, in one transaction. `claims` are who owns
    /// what from then on, `nodes` where to find them. Repeating it changes nothing; `None` says that there was
    /// nothing to be done, else it is the number of rows.
    ///
    /// Runs to its end when the future is dropped.
    ///
    /// # Errors
    ///
    /// No slot changed hands. [`StoreError::Refused`] when this node owns some of the slots, or `claims` do not make it the owner.
    pub async fn import(
        &self,
        path: PathBuf,
        range: SlotRange,
        claims: Vec<Claim>,
        nodes: BTreeMap<NodeId, NodeAddresses>,
    ) -> Result<Option<u64>, StoreError> {
        let node = self.clone();
        owned(async move {
            let (staging, theirs) = (node.clone(), claims.clone());
            let staged =
                blocking(move || staging.inner.store.stage_import(&staging.inner.id, &path, range, &theirs));
            let Some(staged) = staged.await? else { return Ok(None) };
            let rows = staged.rows();
            let mut others = nodes;
            // What this node listens on, it knows best itself.
            others.remove(&node.inner.id);
            let inner = Arc::clone(&node.inner);
            node.change_ownership(move |store| async move {
                let ownership = store.finish_import(&inner.id, staged, claims, others.clone()).await?;
                inner.nodes.write().unwrap_or_else(PoisonError::into_inner).extend(others);
                Ok(ownership)
            })
            .await?;
            Ok(Some(rows))
        })
        .await
    }

    /// Gives `range` to the owner that `claims` name. Its rows are invisible at once and deleted in the background.
    ///
    /// Runs to its end when the future is dropped.
    ///
    /// # Errors
    ///
    /// Nothing was changed.
    pub async fn give_up(&self, range: SlotRange, claims: Vec<Claim>) -> Result<(), StoreError> {
        self.give_up_for(range, claims, None).await
    }

    /// [`Node::give_up`], which also ends the split `finished`, in the same transaction.
    pub(crate) async fn give_up_for(
        &self,
        range: SlotRange,
        claims: Vec<Claim>,
        finished: Option<String>,
    ) -> Result<(), StoreError> {
        let me = self.inner.id.clone();
        self.change_ownership(move |store| async move { store.give_up(&me, range, claims, finished).await })
            .await
    }

    /// Changes who owns what in the database, and then what the gate says.
    ///
    /// Runs to its end when the future is dropped.
    pub(crate) async fn change_ownership<F>(
        &self,
        change: impl FnOnce(Store) -> F + Send + 'static,
    ) -> Result<(), StoreError>
    where
        F: Future<Output = Result<Ownership, StoreError>> + Send,
    {
        let node = self.clone();
        owned(async move {
            let _changing = node.inner.changing.lock().await;
            let ownership = change(node.inner.store.clone()).await?;
            node.inner.gate.set_ownership(ownership);
            Ok(())
        })
        .await
    }

    /// Redirects requests for the slots of `claim` to its owner, which is at `grpc`, before that is durable here; see [`Gate::redirect`].
    #[must_use]
    pub(crate) fn redirect(&self, claim: Claim, grpc: String) -> bool {
        let mut nodes = self.inner.nodes.write().unwrap_or_else(PoisonError::into_inner);
        nodes.entry(claim.owner.clone()).or_default().grpc = grpc;
        drop(nodes);
        self.inner.gate.redirect(claim)
    }

    /// Learns of the database where nodes are.
    pub(crate) async fn reload_nodes(&self) -> Result<(), StoreError> {
        let store = self.inner.store.clone();
        let nodes = blocking(move || store.nodes()).await?;
        self.inner.nodes.write().unwrap_or_else(PoisonError::into_inner).extend(nodes);
        Ok(())
    }

    /// Owns slots with the epoch of `claim`, and ends the split `finished`, in one transaction.
    pub(crate) async fn keep_for(&self, claim: Claim, finished: String) -> Result<(), StoreError> {
        self.change_ownership(move |store| async move { store.keep(claim, finished).await }).await
    }
}

/// Runs `work` in a task of its own: what it has begun, it ends.
async fn owned<T: Send + 'static>(
    work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::spawn(work).await.map_err(|_| StoreError::Closed)?
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| StoreError::Closed)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_database_that_takes_no_writes_keeps_no_node_from_knowing_others() {
        let directory = tempfile::tempdir().unwrap();
        let init = Init { node: NodeId::new("n1").unwrap(), slots: None, others: Vec::new() };
        let node = Node::open(directory.path(), &init, &StoreOptions::default()).unwrap();
        let other = |port: u16| {
            let resp = format!("127.0.0.1:{port}");
            BTreeMap::from([(NodeId::new("n2").unwrap(), NodeAddresses { grpc: resp.clone(), resp })])
        };
        node.meet(other(1)).await.unwrap();
        assert_eq!(node.store().nodes().unwrap(), other(1));
        node.store().close();
        node.meet(other(1)).await.unwrap();
        node.meet(other(2)).await.unwrap_err();
        assert_eq!((node.nodes(), node.store().nodes().unwrap()), (other(2), other(1)));
    }
}

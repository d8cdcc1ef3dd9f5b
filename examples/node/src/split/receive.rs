//! The target's side: a snapshot of rows becomes part of the database, any other stays what it is, files.

use proto::common::error::Error;
use proto::common::guard::{RangeGuard, RangeHold};
use proto::common::ids::{IdError, ShardId};
use proto::snapshot::Reason;
use proto::snapshot::hook::{Hold, HookFuture, InstallHook};
use proto::snapshot::spec::{TransferPlan, TransferSpec};
use proto::snapshot::store::PlacedSnapshot;

use crate::common::{NodeId, SlotRange};
use crate::node::Node;
use crate::store::{Claim, MAX_EPOCH_LEAP, Ownership, StoreError, read_header};

/// The name of the one file that a snapshot of rows consists of.
pub const ROWS_FILE: &str = "node-rows.snapshot";

/// How the names of shards begin that are kept for splits.
const SPLIT_SHARDS: &str = "slots-";

/// The shard as which `source` hands `slots` over: each source has its own, so that no other node decides what is the newest snapshot of it. Both ends are in it,
/// also of a single slot: no name of a node makes one of another's.
pub(super) fn split_shard(slots: SlotRange, source: &NodeId) -> Result<ShardId, IdError> {
    ShardId::new(format!("{SPLIT_SHARDS}{}-{}-{source}", slots.start(), slots.end() - 1))
}

/// Merges snapshots of rows into the node's database.
#[derive(Debug, Clone)]
pub struct SplitHook {
    node: Node,
    guard: RangeGuard,
}

impl SplitHook {
    /// `guard` is shared with everything that moves slots of this node.
    #[must_use]
    pub fn new(node: Node, guard: RangeGuard) -> Self {
        Self { node, guard }
    }

    async fn merge(&self, snapshot: &PlacedSnapshot) -> Result<(), Error> {
        let spec = &snapshot.plan.spec;
        let directory = snapshot
            .path
            .as_ref()
            .ok_or_else(|| Reason::Internal.error("the snapshot is not in a directory"))?;
        let path = directory.join(ROWS_FILE);
        let (range, claims, mut nodes) = {
            let path = path.clone();
            let read = move || {
                let header = read_header(&path)?;
                Ok((header.range()?, header.handover.claims()?, header.handover.nodes()?))
            };
            tokio::task::spawn_blocking(read)
                .await
                .map_err(|_| Reason::ShuttingDown.error("the node is shutting down"))?
                .map_err(refused)?
        };
        if range != spec.slots {
            return Err(Reason::InstallRefused.error(format!(
                "the snapshot holds slots {range}, the transfer was announced for {}",
                spec.slots
            )));
        }
        // Of what the file says of owners and addresses, only what its sender may say: the rest is learned from those concerned.
        let (source, me) = (&spec.source_node, self.node.id());
        let ownership = self.node.gate().ownership();
        let claims: Vec<Claim> = claims
            .into_iter()
            .flat_map(|claim| credible(claim, spec.slots, source, me, &ownership))
            .collect();
        if let Some(claim) = claims.iter().find(|claim| ownership.is_leap(claim.range, claim.epoch)) {
            return Err(Reason::InstallRefused.error(format!(
                "the snapshot claims slots {} at epoch {}, more than {MAX_EPOCH_LEAP} above what is known of them",
                claim.range, claim.epoch
            )));
        }
        // What the transfer was admitted for may be another one's by now: for good, since owners that are known are never forgotten.
        if let Some((_, sentence)) = self.node.third_owner(spec.slots, source) {
            return Err(Reason::InstallRefused.error(sentence));
        }
        nodes.retain(|node, _| node == source);
        let rows = self.node.import(path, spec.slots, claims, nodes).await.map_err(|error| {
            // Only here, where a snapshot has come for it: what does not fit before that, its sender may announce without end.
            if let StoreError::NoSpace { .. } = &error {
                tracing::warn!(transfer = %spec.transfer_id, %error, "a snapshot of rows does not fit");
            }
            refused(error)
        })?;
        match rows {
            Some(rows) => {
                tracing::info!(transfer = %spec.transfer_id, slots = %spec.slots, rows, "slots taken over");
            }
            None => {
                tracing::info!(transfer = %spec.transfer_id, slots = %spec.slots, "slots were taken over before")
            }
        }
        Ok(())
    }
}

/// The parts of `claim` that the source of a transfer of `slots` may make: that `me` owns what was announced, and that it owns itself
/// what nobody else is known to own.
fn credible(claim: Claim, slots: SlotRange, source: &NodeId, me: &NodeId, known: &Ownership) -> Vec<Claim> {
    if claim.owner == *me && slots.contains_range(claim.range) {
        return vec![claim];
    }
    if claim.owner != *source {
        return Vec::new();
    }
    let anothers = |range: SlotRange| known.overlapping(range).any(|known| known.owner != *source);
    let before = SlotRange::new(claim.range.start(), claim.range.end().min(slots.start()));
    let after = SlotRange::new(claim.range.start().max(slots.end()), claim.range.end());
    let parts = [before, after].into_iter().flatten().filter(|range| !anothers(*range));
    parts.map(|range| Claim { range, ..claim.clone() }).collect()
}

/// Keeps the shards of splits to those: whoever could install anything there would have the next split refused as older.
fn check_shard(plan: &TransferPlan) -> Result<(), Error> {
    let TransferSpec { target_shard, slots, source_node, .. } = &plan.spec;
    let own = || split_shard(*slots, source_node).is_ok_and(|own| own == *target_shard);
    if !target_shard.as_str().starts_with(SPLIT_SHARDS) || (has_rows(plan) && own()) {
        return Ok(());
    }
    Err(Reason::InstallRefused.error(format!(
        "shard {target_shard} takes no snapshot of slots {slots} from node {source_node}: names that begin with {SPLIT_SHARDS} are kept for splits"
    )))
}

fn has_rows(plan: &TransferPlan) -> bool {
    matches!(plan.manifest.files(), [file] if file.name.as_str() == ROWS_FILE)
}

/// Tells the sender, without paths; the log has the rest.
fn refused(error: StoreError) -> Error {
    match &error {
        // For good: while it is repeated, clients of the source wait, and it has a room that others need.
        StoreError::NoSpace { needed, available, .. } => {
            Reason::InstallRefused
                .error(format!(
                    "the receiver's disk has {available} bytes left, of {needed} that are needed, with those that stay free; make room there, then begin anew"
                ))
                .metadata("needed_bytes", needed.to_string())
                .metadata("available_bytes", available.to_string())
        }
        StoreError::Database(_)
        | StoreError::Io { .. }
        | StoreError::DamagedFile { .. }
        | StoreError::Mismatch { .. }
        | StoreError::Closed => {
            tracing::warn!(%error, "a snapshot cannot be merged yet");
            let what = match &error {
                StoreError::Database(redb) if matches!(**redb, redb::Error::PreviousIo) => {
                    "a write to the receiver's disk failed; it goes on once it has room and was restarted"
                }
                _ => "the receiver cannot write to its database; it tries again",
            };
            Reason::StorageFailed.error(what).retry_after(std::time::Duration::from_secs(1)).caused_by(error)
        }
        _ => Reason::InstallRefused.error(error.to_string()),
    }
}

impl SplitHook {
    /// Keeps others off the slots that a snapshot of rows would bring, if it brings any.
    fn hold(&self, plan: &TransferPlan) -> Result<Option<RangeHold>, Error> {
        check_shard(plan)?;
        if !has_rows(plan) {
            return Ok(None);
        }
        let slots = plan.spec.slots;
        let own = self.node.own_ranges();
        // All of them: perhaps this very snapshot was installed and the sender does not know. The install finds out, and takes nothing over, so
        // nobody is kept off the slots for as long as the transfer is staged.
        if own.iter().any(|own| own.contains_range(slots)) {
            return Ok(None);
        }
        if let Some(own) = own.iter().find(|own| own.overlaps(slots)) {
            return Err(Reason::InstallRefused
                .error(format!("node {} owns slots {own} of {slots} already", self.node.id())));
        }
        if let Some((_, sentence)) = self.node.third_owner(slots, &plan.spec.source_node) {
            return Err(Reason::InstallRefused
                .error(sentence)
                .retry_after(std::time::Duration::from_secs(1)));
        }
        self.guard.try_acquire(slots, plan.spec.transfer_id.as_str()).map(Some)
    }

    /// Refuses what could not be imported once it is here. How much that takes beside the keys and values is known then.
    async fn check_room(&self, plan: &TransferPlan) -> Result<(), Error> {
        let Some(bytes) = plan.manifest.total_bytes() else { return Ok(()) };
        // The file lies beside its rows, which take twice that.
        let bytes = bytes.saturating_add(bytes / 2);
        let store = self.node.store().clone();
        let checked = tokio::task::spawn_blocking(move || store.check_space(bytes)).await;
        checked.map_err(|_| Reason::ShuttingDown.error("the node is shutting down"))?.map_err(refused)
    }
}

fn held(hold: Option<RangeHold>) -> Hold {
    match hold {
        Some(hold) => Box::new(hold),
        None => Box::new(()),
    }
}

impl InstallHook for SplitHook {
    fn admit<'a>(&'a self, plan: &'a TransferPlan) -> HookFuture<'a, Hold> {
        Box::pin(async move {
            let hold = self.hold(plan)?;
            if hold.is_some() {
                self.check_room(plan).await?;
            }
            Ok(held(hold))
        })
    }

    /// Without a look at the room, which its file has a part of already: the import looks again.
    fn readmit<'a>(&'a self, plan: &'a TransferPlan) -> HookFuture<'a, Hold> {
        Box::pin(async move { self.hold(plan).map(held) })
    }

    fn lost_by_source(&self, plan: &TransferPlan) -> Option<String> {
        let TransferSpec { slots, source_node, .. } = &plan.spec;
        has_rows(plan).then(|| self.node.third_owner(*slots, source_node))?.map(|(_, sentence)| sentence)
    }

    fn install<'a>(&'a self, snapshot: &'a PlacedSnapshot) -> HookFuture<'a, ()> {
        Box::pin(async move { if has_rows(&snapshot.plan) { self.merge(snapshot).await } else { Ok(()) } })
    }

    /// Rows are in the database.
    fn keeps_files(&self, plan: &TransferPlan) -> bool {
        !has_rows(plan)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use proto::common::ids::TransferId;
    use proto::snapshot::spec::{Manifest, ManifestFile, SnapshotPoint};

    use super::*;
    use crate::store::{Handover, Init, Store, StoreOptions};

    fn node(directory: &Path, slots: &str) -> Node {
        node_with(directory, slots, &StoreOptions::default())
    }

    fn node_with(directory: &Path, slots: &str, options: &StoreOptions) -> Node {
        let slots = slots.parse().into_iter().collect();
        let init = Init { node: "n2".parse().unwrap(), slots: Some(slots), others: vec![] };
        Node::open(directory, &init, options).unwrap()
    }

    /// A snapshot of rows that n1 announces.
    fn plan(slots: &str) -> TransferPlan {
        let rows = ManifestFile { name: ROWS_FILE.parse().unwrap(), size: None, blake3: None };
        let spec = TransferSpec {
            transfer_id: TransferId::new("t1").unwrap(),
            source_shard: ShardId::new("s1").unwrap(),
            target_shard: ShardId::new("s2").unwrap(),
            source_node: "n1".parse().unwrap(),
            slots: slots.parse().unwrap(),
            point: SnapshotPoint { term: 1, index: 1 },
            content_version: String::new(),
        };
        TransferPlan { spec, manifest: Manifest::new(vec![rows]).unwrap() }
    }

    /// Who installed something newer than all under the name that another's split uses would keep that from ever being taken.
    #[tokio::test]
    async fn the_shards_of_splits_are_for_the_rows_of_their_sources_alone() {
        let dir = tempfile::tempdir().unwrap();
        let hook = SplitHook::new(node(dir.path(), "none"), RangeGuard::new());
        let of_n1 = |shard: &str, slots: &str| {
            let mut plan = plan(slots);
            plan.spec.target_shard = ShardId::new(shard).unwrap();
            plan
        };
        let files = |mut plan: TransferPlan| {
            let file = ManifestFile { name: "a".parse().unwrap(), size: Some(1), blake3: None };
            plan.manifest = Manifest::new(vec![file]).unwrap();
            plan
        };
        drop(hook.admit(&of_n1("slots-100-199-n1", "100-199")).await.unwrap());
        drop(hook.admit(&of_n1("slots-7-7-n1", "7")).await.unwrap());
        drop(hook.admit(&files(of_n1("s2", "100-199"))).await.unwrap());
        for other in [
            files(of_n1("slots-100-199-n1", "100-199")),
            files(of_n1("slots-100-199-n3", "100-199")),
            files(of_n1("slots-100-199", "100-199")),
            of_n1("slots-100-199-n3", "100-199"),
            of_n1("slots-100-199-n1", "100-198"),
            of_n1("slots-100-199", "100-199"),
        ] {
            let Err(refused) = hook.admit(&other).await else { panic!("it is admitted: {other:?}") };
            assert!(refused.is(Reason::InstallRefused) && !refused.is_retryable(), "{refused:?}");
        }
    }

    /// A peer that announces a snapshot of this node's own slots, and leaves it there, keeps nobody off them.
    #[tokio::test]
    async fn slots_of_this_node_can_be_moved_whatever_a_peer_announces() {
        let dir = tempfile::tempdir().unwrap();
        let (node, guard) = (node(dir.path(), "0-99"), RangeGuard::new());
        let hook = SplitHook::new(node, guard.clone());
        let _left = hook.admit(&plan("0-99")).await.unwrap();
        drop(guard.try_acquire("0-99".parse().unwrap(), "a migration away").unwrap());
        // Those that it does not own are kept for the transfer.
        let _taken = hook.admit(&plan("100-199")).await.unwrap();
        guard.try_acquire("100-199".parse().unwrap(), "a migration").unwrap_err();
    }

    fn claim(range: &str, owner: &str) -> Claim {
        Claim { range: range.parse().unwrap(), owner: owner.parse().unwrap(), epoch: 9 }
    }

    /// A snapshot without rows that is complete, and says that n2 owns its slots from now on, at `epoch`.
    fn placed(directory: &Path, slots: &str, epoch: u64) -> PlacedSnapshot {
        let source: NodeId = "n1".parse().unwrap();
        let path = directory.join(epoch.to_string());
        std::fs::create_dir(&path).unwrap();
        let init = Init { node: source.clone(), slots: None, others: vec![] };
        let (store, _) = Store::open(&path.join("n1"), &init, &StoreOptions::default()).unwrap();
        let handover =
            Handover::new(&Ownership::default(), &Claim { epoch, ..claim(slots, "n2") }, &BTreeMap::new());
        store.export_file(&source, slots.parse().unwrap(), handover, &path.join(ROWS_FILE)).unwrap();
        store.close();
        PlacedSnapshot { path: Some(path), plan: plan(slots) }
    }

    #[tokio::test]
    async fn slots_that_became_a_third_nodes_meanwhile_are_not_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let (node, snapshot) = (node(&dir.path().join("n2"), "none"), placed(dir.path(), "100-199", 12));
        let hook = SplitHook::new(node.clone(), RangeGuard::new());
        let _hold = hook.admit(&snapshot.plan).await.unwrap();
        assert_eq!(hook.lost_by_source(&snapshot.plan), None);
        let learned = vec![claim("150-150", "n3"), claim("0-99", "n4")];
        node.change_ownership(|store| async move { store.adopt(learned).await }).await.unwrap();
        let refused = hook.install(&snapshot).await.unwrap_err();
        assert!(refused.is(Reason::InstallRefused) && !refused.is_retryable(), "{refused:?}");
        let why = "slots 150 of 100-199 are known to be of node n3, not of n1";
        assert_eq!(hook.lost_by_source(&snapshot.plan).as_deref(), Some(why));
        let mut files = snapshot.plan.clone();
        let file = ManifestFile { name: "a".parse().unwrap(), size: Some(1), blake3: None };
        files.manifest = Manifest::new(vec![file]).unwrap();
        assert_eq!(hook.lost_by_source(&files), None, "files take no slots over");
        assert!(refused.message().contains(why), "{refused}");
        assert_eq!(node.own_ranges(), []);
        // The sender hears the same if it begins again, and may try until this node has learned better.
        let Err(refused) = hook.admit(&snapshot.plan).await else { panic!("it is admitted") };
        assert!(refused.is(Reason::InstallRefused) && refused.is_retryable(), "{refused:?}");
        assert!(refused.message().contains(why), "{refused}");
    }

    #[tokio::test]
    async fn a_snapshot_whose_epoch_leaps_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(&dir.path().join("n2"), "none");
        let hook = SplitHook::new(node.clone(), RangeGuard::new());
        for epoch in [u64::MAX, MAX_EPOCH_LEAP + 1] {
            let refused = hook.install(&placed(dir.path(), "100-199", epoch)).await.unwrap_err();
            assert!(refused.is(Reason::InstallRefused) && !refused.is_retryable(), "{refused:?}");
            assert_eq!(node.own_ranges(), []);
        }
        hook.install(&placed(dir.path(), "100-199", MAX_EPOCH_LEAP)).await.unwrap();
        assert_eq!(node.own_ranges(), ["100-199".parse().unwrap()]);
    }

    /// The database would take nothing more until a restart, and then meet the same again.
    #[tokio::test]
    async fn rows_without_room_are_refused_for_good_before_they_come_and_before_they_are_imported() {
        let dir = tempfile::tempdir().unwrap();
        let full = StoreOptions { reserve_bytes: 1 << 60, ..StoreOptions::default() };
        let (node, guard) = (node_with(&dir.path().join("n2"), "0-99", &full), RangeGuard::new());
        let hook = SplitHook::new(node.clone(), guard.clone());
        let is_refused = |error: &Error| {
            assert!(error.is(Reason::InstallRefused) && !error.is_retryable(), "{error:?}");
            assert!(error.message().contains("make room there"), "{error}");
            assert!(!error.message().contains('/'), "{error}");
            assert!(
                error.get("needed_bytes").is_some() && error.get("available_bytes").is_some(),
                "{error:?}"
            );
        };
        let snapshot = placed(dir.path(), "100-199", 12);
        // As a sender announces it that knows how much it is.
        let sized = |slots: &str| {
            let mut plan = plan(slots);
            let file = ManifestFile { name: ROWS_FILE.parse().unwrap(), size: Some(1000), blake3: None };
            plan.manifest = Manifest::new(vec![file]).unwrap();
            plan
        };
        let Err(refused) = hook.admit(&sized("100-199")).await else { panic!("it is admitted") };
        is_refused(&refused);
        drop(guard.try_acquire("100-199".parse().unwrap(), "nobody holds them").unwrap());
        // The sender may not know that it was installed.
        hook.admit(&sized("0-99")).await.unwrap();
        // What came before a restart keeps its slots until it is known what becomes of it.
        let hold = hook.readmit(&sized("100-199")).await.unwrap();
        guard.try_acquire("100-199".parse().unwrap(), "a migration").unwrap_err();
        is_refused(&hook.install(&snapshot).await.unwrap_err());
        drop(hold);
        assert_eq!(node.own_ranges(), ["0-99".parse().unwrap()]);
        crate::store::test_store::set(node.store(), "still", "written").await;
    }

    /// A file that claims more than its sender may say.
    #[test]
    fn a_crafted_file_gains_nothing() {
        let (source, me) = ("n1".parse().unwrap(), "n2".parse().unwrap());
        let mut known = Ownership::default();
        known.adopt(&claim("12000-16383", "n3"));
        known.adopt(&claim("0-99", "n2"));
        let credible = |said: Claim| credible(said, "8000-8999".parse().unwrap(), &source, &me, &known);
        // What a real one says.
        assert_eq!(credible(claim("8000-8999", "n2")), [claim("8000-8999", "n2")]);
        assert_eq!(credible(claim("100-8999", "n1")), [claim("100-7999", "n1")]);
        assert_eq!(credible(claim("5000-9500", "n1")), [claim("5000-7999", "n1"), claim("9000-9500", "n1")]);
        for (range, owner) in [
            // More for this node than was announced, so that it would serve another's slots.
            ("8000-9000", "n2"),
            ("12000-12100", "n2"),
            // Slots of a third node, or of this one, for the sender; anything for somebody else.
            ("12000-16383", "n1"),
            ("0-99", "n1"),
            ("8000-8999", "n3"),
            ("9000-9100", "n4"),
        ] {
            assert_eq!(credible(claim(range, owner)), [], "{range} {owner}");
        }
    }
}

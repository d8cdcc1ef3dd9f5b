//! What goes where: the same plan for the same state, so that a drain that is run again joins what the first one began.

use proto::common::ids::{IdError, MigrationId, NodeId, ShardId};
use proto::common::slots::{SLOT_COUNT, SlotRange};
use proto::node::{MigrationProgress, NodeStatus};

use crate::migrate::args::Target;
use crate::migrate::start::shard_of;

/// Slots that the node owns, all at one epoch and in one shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) slots: SlotRange,
    pub(super) epoch: u64,
    pub(super) shard: Option<ShardId>,
}

/// One migration to start.
#[derive(Debug)]
pub(super) struct Move<'a> {
    pub(super) slots: SlotRange,
    pub(super) epoch: u64,
    pub(super) shard: ShardId,
    pub(super) target: &'a Target,
}

impl Move<'_> {
    /// The name of its `attempt`, from 1: the same for the same move of the same claim. The epoch is part of it, because the
    /// slots may come back and be moved once more.
    pub(super) fn id(&self, source: &NodeId, attempt: u32) -> Result<MigrationId, IdError> {
        let mut hasher = blake3::Hasher::new_derive_key("nodectl drain 2026: migration ID from the move");
        for field in [source.as_str(), self.target.node.as_str(), self.shard.as_str()] {
            hasher.update(&(field.len() as u64).to_le_bytes());
            hasher.update(field.as_bytes());
        }
        hasher.update(&self.slots.start().to_le_bytes());
        hasher.update(&self.slots.end().to_le_bytes());
        hasher.update(&self.epoch.to_le_bytes());
        let hash = hasher.finalize().to_hex();
        MigrationId::new(format!("drain-{}-{attempt}", &hash[..16]))
    }
}

/// What the node owns, ascending, as it says itself.
pub(super) fn claims(node_id: &NodeId, status: &NodeStatus) -> Vec<Claim> {
    let shards: Vec<(SlotRange, u64, Option<ShardId>)> = status
        .shards
        .iter()
        .flat_map(|shard| {
            let epoch = shard.fence.map_or(0, |fence| fence.epoch);
            let id = ShardId::new(&shard.shard_id).ok();
            shard.slots.iter().filter_map(move |slots| Some(((*slots).try_into().ok()?, epoch, id.clone())))
        })
        .collect();
    let mut claims: Vec<Claim> = Vec::new();
    for owned in status.slot_owners.iter().filter(|owner| owner.node_id == node_id.as_str()) {
        // Of an honest node each has a slot for itself; of another one each of ten thousand may overlap with each of as many.
        if claims.len() >= usize::from(SLOT_COUNT) {
            break;
        }
        let Ok(range) = SlotRange::from_wire(owned.slots) else { continue };
        let mut rest = vec![range];
        for (held, _, shard) in &shards {
            if let Some(slots) = common(range, *held) {
                claims.push(Claim { slots, epoch: owned.epoch, shard: shard.clone() });
                rest = rest.into_iter().flat_map(|range| without(range, slots)).collect();
            }
        }
        claims.extend(rest.into_iter().map(|slots| Claim { slots, epoch: owned.epoch, shard: None }));
    }
    if claims.is_empty() && status.slots_owned > 0 {
        claims.extend(shards.into_iter().map(|(slots, epoch, shard)| Claim { slots, epoch, shard }));
    }
    claims.sort_by_key(|claim| claim.slots);
    claims
}

/// One migration for each claim and target, without what moves already. Each target gets about as many slots.
pub(super) fn moves<'a>(
    claims: &[Claim],
    running: &[MigrationProgress],
    targets: &'a [Target],
) -> Vec<Move<'a>> {
    let mut idle: Vec<Claim> = claims.to_vec();
    for migration in running {
        let spec = migration.spec.clone().unwrap_or_default();
        let Ok(moving) = SlotRange::from_wire(spec.slots) else { continue };
        idle = idle
            .into_iter()
            .flat_map(|claim| {
                let rest = without(claim.slots, moving);
                rest.into_iter().map(move |slots| Claim { slots, ..claim.clone() })
            })
            .collect();
    }
    let total: usize = idle.iter().map(|claim| usize::from(claim.slots.len())).sum();
    let mut moves = Vec::new();
    let mut given: usize = 0;
    for claim in idle {
        let (mut start, end) = (claim.slots.start(), claim.slots.end());
        while start < end {
            // The share in which this slot lies ends at a whole number of slots.
            let index = (given * targets.len() / total.max(1)).min(targets.len().saturating_sub(1));
            let Some(target) = targets.get(index) else { return moves };
            let share_end = ((index + 1) * total).div_ceil(targets.len());
            let take = share_end.saturating_sub(given).clamp(1, usize::from(end - start));
            let stop = start + u16::try_from(take).unwrap_or(SLOT_COUNT).min(end - start);
            let Ok(slots) = SlotRange::new(start, stop) else { break };
            if let Some(shard) = claim.shard.clone().or_else(|| shard_of(slots).ok()) {
                moves.push(Move { slots, epoch: claim.epoch, shard, target });
            }
            given += usize::from(slots.len());
            start = stop;
        }
    }
    moves
}

fn common(a: SlotRange, b: SlotRange) -> Option<SlotRange> {
    SlotRange::new(a.start().max(b.start()), a.end().min(b.end())).ok()
}

/// What of `range` is outside of `other`.
fn without(range: SlotRange, other: SlotRange) -> Vec<SlotRange> {
    let Some(cut) = common(range, other) else { return vec![range] };
    [SlotRange::new(range.start(), cut.start()), SlotRange::new(cut.end(), range.end())]
        .into_iter()
        .flatten()
        .collect()
}

#[cfg(test)]
mod tests {
    use proto::node::{MigrationSpec, ShardStatus, SlotOwner};

    use super::*;

    fn range(text: &str) -> SlotRange {
        text.parse().unwrap()
    }

    fn claim(text: &str) -> Claim {
        Claim { slots: range(text), epoch: 7, shard: None }
    }

    fn targets(count: usize) -> Vec<Target> {
        (0..count).map(|n| format!("t{n}=127.0.0.1:{}", 7200 + n).parse().unwrap()).collect()
    }

    fn planned(claims: &[&str], running: &[&str], count: usize) -> Vec<(String, String)> {
        let claims: Vec<Claim> = claims.iter().map(|text| claim(text)).collect();
        let running: Vec<MigrationProgress> = running
            .iter()
            .map(|text| MigrationProgress {
                spec: Some(MigrationSpec { slots: Some(range(text).into()), ..Default::default() }),
                ..Default::default()
            })
            .collect();
        let targets = targets(count);
        moves(&claims, &running, &targets)
            .iter()
            .map(|one| (one.slots.to_string(), one.target.node.to_string()))
            .collect()
    }

    fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected.iter().map(|(slots, node)| ((*slots).to_owned(), (*node).to_owned())).collect()
    }

    #[test]
    fn each_target_gets_its_share_and_no_slot_is_left_or_moved_twice() {
        assert_eq!(planned(&["0-16383"], &[], 1), pairs(&[("0-16383", "t0")]));
        assert_eq!(planned(&["0-16383"], &[], 2), pairs(&[("0-8191", "t0"), ("8192-16383", "t1")]));
        assert_eq!(planned(&["5"], &[], 3), pairs(&[("5", "t0")]));
        for (claims, count) in
            [(vec!["0-99", "200", "300-16000"], 3), (vec!["0-6", "9-12"], 5), (vec!["1-2"], 4)]
        {
            let mut moved: Vec<u16> = Vec::new();
            let mut shares = std::collections::BTreeMap::<String, usize>::new();
            for (slots, node) in planned(&claims, &[], count) {
                let slots = range(&slots);
                moved.extend(slots.start()..slots.end());
                *shares.entry(node).or_default() += usize::from(slots.len());
            }
            let owned: Vec<u16> =
                claims.iter().map(|text| range(text)).flat_map(|slots| slots.start()..slots.end()).collect();
            assert_eq!(moved, owned, "{claims:?}");
            let (least, most) = (shares.values().min().unwrap(), shares.values().max().unwrap());
            assert!(most - least <= 1, "{shares:?}");
        }
    }

    #[test]
    fn what_moves_already_is_left_alone() {
        assert_eq!(planned(&["0-99"], &["20-29"], 1), pairs(&[("0-19", "t0"), ("30-99", "t0")]));
        assert_eq!(planned(&["0-99"], &["0-99"], 2), pairs(&[]));
    }

    #[test]
    fn ids_are_of_the_move_and_of_the_claim() {
        let n1 = NodeId::new("n1").unwrap();
        let targets = targets(1);
        let id = |epoch: u64, attempt: u32| {
            let claims = [Claim { epoch, ..claim("0-9") }];
            moves(&claims, &[], &targets)[0].id(&n1, attempt).unwrap()
        };
        assert_eq!(id(1, 1), id(1, 1));
        assert_ne!(id(1, 1), id(2, 1));
        assert_ne!(id(1, 1), id(1, 2));
    }

    #[test]
    fn claims_are_the_nodes_own_cut_by_its_shards() {
        let owner = |text: &str, node: &str, epoch| SlotOwner {
            slots: Some(range(text).into()),
            epoch,
            node_id: node.to_owned(),
            ..Default::default()
        };
        let shard = |id: &str, text: &str| ShardStatus {
            shard_id: id.to_owned(),
            slots: vec![range(text).into()],
            ..Default::default()
        };
        let status = NodeStatus {
            slots_owned: 30,
            slot_owners: vec![owner("10-39", "n1", 3), owner("40-50", "n2", 4)],
            shards: vec![shard("a", "0-19"), shard("b", "20-29")],
            ..Default::default()
        };
        let claims = claims(&NodeId::new("n1").unwrap(), &status);
        let shown: Vec<_> = claims
            .iter()
            .map(|claim| {
                (claim.slots.to_string(), claim.epoch, claim.shard.as_ref().map(ToString::to_string))
            })
            .collect();
        assert_eq!(
            shown,
            [
                ("10-19".to_owned(), 3, Some("a".to_owned())),
                ("20-29".to_owned(), 3, Some("b".to_owned())),
                ("30-39".to_owned(), 3, None)
            ]
        );
    }

    #[test]
    fn claims_that_overlap_are_no_more_than_slots() {
        let owner = SlotOwner {
            slots: Some(range("0-16383").into()),
            node_id: "n1".to_owned(),
            ..Default::default()
        };
        let shard = ShardStatus { slots: vec![range("0-9").into(); 100], ..Default::default() };
        let status =
            NodeStatus { slot_owners: vec![owner; 10_000], shards: vec![shard], ..Default::default() };
        let claims = claims(&NodeId::new("n1").unwrap(), &status).len();
        assert!((16_384..16_500).contains(&claims), "{claims}");
    }
}

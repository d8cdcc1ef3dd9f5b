//! Which node owns which slots: a table in the database, and its picture in memory.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use redb::{ReadableTable, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::{StoreError, tables};
use crate::common::{NodeId, SLOT_COUNT, SlotRange};

/// Nodes that are learned of at most: each is asked all the time, and kept for ever. Slots of further ones are known as theirs, without an address.
pub(crate) const MAX_NODES: usize = 1024;
/// How far above the highest epoch that is known of its slots one may be that a peer tells. Honest ones rise by one with each move, and by
/// 65536 where an operator takes slots back; and in steps of this size nobody gets to the highest number that there is, which would leave the slots with an
/// owner for ever.
pub(crate) const MAX_EPOCH_LEAP: u64 = 1 << 32;

/// Where a node can be reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeAddresses {
    /// `host:port` of its gRPC services.
    pub grpc: String,
    /// `host:port` of its Redis port.
    pub resp: String,
}

impl NodeAddresses {
    /// Whether both can be handed on as they are, to clients, logs and terminals: one that another node tells could hold a line that is not its
    /// own, or an escape sequence. No statement that there is anybody.
    pub(crate) fn can_be_shown(&self) -> bool {
        /// The longest name of a host, and a port.
        const MOST: usize = 253 + 6;
        let shown =
            |address: &String| address.len() <= MOST && address.bytes().all(|byte| byte.is_ascii_graphic());
        shown(&self.grpc) && shown(&self.resp)
    }
}

/// A slot range with its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The slots.
    pub range: SlotRange,
    /// Who owns them.
    pub owner: NodeId,
    /// Rises with every change of the owner; the higher one wins.
    pub epoch: u64,
}

/// Disjoint claims in order of their slots. Slots in none of them have no owner.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ownership {
    claims: Vec<Claim>,
}

impl Ownership {
    /// All claims, in order of their slots, neighbours of one owner and epoch joined.
    #[must_use]
    pub fn claims(&self) -> &[Claim] {
        &self.claims
    }

    /// The claim that holds `slot`.
    #[must_use]
    pub fn of(&self, slot: u16) -> Option<&Claim> {
        let next = self.claims.partition_point(|claim| claim.range.end() <= slot);
        self.claims.get(next).filter(|claim| claim.range.contains(slot))
    }

    /// The ranges of `node`.
    pub fn ranges_of<'a>(&'a self, node: &'a NodeId) -> impl Iterator<Item = SlotRange> + 'a {
        self.claims.iter().filter(move |claim| claim.owner == *node).map(|claim| claim.range)
    }

    /// Whether every slot of `claim` belongs to its owner, at its epoch or a higher one.
    #[must_use]
    pub fn gives(&self, claim: &Claim) -> bool {
        self.against(claim).is_none()
    }

    /// The first slot of `claim` that does not belong to its owner, or at a lower epoch; and the epoch that it has.
    #[must_use]
    pub fn against(&self, claim: &Claim) -> Option<(u16, u64)> {
        let gives = |present: &&Claim| present.owner == claim.owner && present.epoch >= claim.epoch;
        let slot = claim.range.iter().find(|&slot| self.of(slot).filter(gives).is_none())?;
        Some((slot, self.of(slot).map_or(0, |present| present.epoch)))
    }

    /// The claims that hold a slot of `range`, in order of their slots.
    pub fn overlapping(&self, range: SlotRange) -> impl Iterator<Item = &Claim> {
        let first = self.claims.partition_point(|claim| claim.range.end() <= range.start());
        self.claims[first..].iter().take_while(move |claim| claim.range.overlaps(range))
    }

    /// The first claim that holds a slot of `range` and is of neither node.
    pub fn of_neither(&self, range: SlotRange, one: &NodeId, other: &NodeId) -> Option<&Claim> {
        self.overlapping(range).find(|claim| claim.owner != *one && claim.owner != *other)
    }

    /// The first slot of `range` that has this epoch or a higher one; and the epoch.
    #[must_use]
    pub fn at_least(&self, range: SlotRange, epoch: u64) -> Option<(u16, u64)> {
        let claim = self.overlapping(range).find(|claim| claim.epoch >= epoch)?;
        Some((claim.range.start().max(range.start()), claim.epoch))
    }

    /// The highest epoch of any slot of `range`; 0 if none is owned.
    #[must_use]
    pub fn highest_epoch(&self, range: SlotRange) -> u64 {
        self.overlapping(range).map(|claim| claim.epoch).max().unwrap_or(0)
    }

    /// Whether `epoch`, which a peer tells for `range`, is [too far](MAX_EPOCH_LEAP) above what is known.
    pub(crate) fn is_leap(&self, range: SlotRange, epoch: u64) -> bool {
        epoch.saturating_sub(self.highest_epoch(range)) > MAX_EPOCH_LEAP
    }

    /// Takes over `new` for those of its slots whose present claim has a lower epoch. Returns whether
    /// anything changed.
    pub fn adopt(&mut self, new: &Claim) -> bool {
        !self.adopt_all(std::slice::from_ref(new)).is_empty()
    }

    /// [Adopts](Self::adopt) each of `claims`, in any order, as if one by one: of two with the same epoch, the first one counts. Returns what
    /// they changed: disjoint parts of them, in order of their slots. Takes no longer for claims that overlap than for others.
    pub fn adopt_all(&mut self, claims: &[Claim]) -> Vec<Claim> {
        if claims.is_empty() {
            return Vec::new();
        }
        let present = std::mem::take(&mut self.claims);
        let mut owners: Vec<Option<&Claim>> = vec![None; usize::from(SLOT_COUNT)];
        for claim in &present {
            owners[usize::from(claim.range.start())..usize::from(claim.range.end())].fill(Some(claim));
        }
        let mut by_epoch: Vec<&Claim> = claims.iter().collect();
        by_epoch.sort_by_key(|claim| Reverse(claim.epoch));
        let mut best: Vec<Option<&Claim>> = vec![None; usize::from(SLOT_COUNT)];
        // The highest comes first, so each slot is given away once, however many claim it.
        let mut free = Free::new();
        for claim in by_epoch {
            let end = usize::from(claim.range.end());
            let mut slot = free.next(usize::from(claim.range.start()));
            while slot < end {
                best[slot] = Some(claim);
                free.take(slot);
                slot = free.next(slot);
            }
        }
        for (best, owner) in best.iter_mut().zip(&mut owners) {
            *best = best.filter(|new| owner.is_none_or(|present| present.epoch < new.epoch));
            *owner = best.or(*owner);
        }
        self.claims = joined(&owners);
        joined(&best)
    }
}

/// The slots that nobody has been given yet.
struct Free {
    /// By slot: itself if it is free, or else one behind it that no free one lies before. The last entry stands for the end.
    next: Vec<usize>,
}

impl Free {
    fn new() -> Self {
        Self { next: (0..=usize::from(SLOT_COUNT)).collect() }
    }

    /// The first free slot from `slot` on; that of the end if there is none.
    fn next(&mut self, mut slot: usize) -> usize {
        while self.next[slot] != slot {
            // Halves the way for the next one who comes along.
            self.next[slot] = self.next[self.next[slot]];
            slot = self.next[slot];
        }
        slot
    }

    fn take(&mut self, slot: usize) {
        self.next[slot] = slot + 1;
    }
}

/// The claims that `owners`, by slot, make, neighbours of one owner and epoch joined.
fn joined(owners: &[Option<&Claim>]) -> Vec<Claim> {
    let mut claims: Vec<Claim> = Vec::new();
    for (slot, owner) in (0..SLOT_COUNT).zip(owners) {
        let (Some(owner), Ok(range)) = (owner, SlotRange::new(slot, slot + 1)) else { continue };
        match claims.last_mut() {
            Some(last)
                if last.range.end() == slot && last.epoch == owner.epoch && last.owner == owner.owner =>
            {
                last.range = SlotRange::new(last.range.start(), slot + 1).unwrap_or(last.range);
            }
            _ => claims.push(Claim { range, owner: owner.owner.clone(), epoch: owner.epoch }),
        }
    }
    claims
}

#[derive(Serialize, Deserialize)]
struct StoredClaim {
    end: u16,
    owner: String,
    epoch: u64,
}

/// Reads the ownership table.
pub(super) fn load(table: &impl ReadableTable<u16, &'static [u8]>) -> Result<Ownership, StoreError> {
    let mut ownership = Ownership::default();
    for entry in table.iter()? {
        let (start, stored) = entry?;
        let stored: StoredClaim = from_json(stored.value(), "ownership")?;
        let claim = Claim {
            range: SlotRange::new(start.value(), stored.end)
                .map_err(|e| StoreError::Damaged(e.to_string()))?,
            owner: NodeId::new(&stored.owner).map_err(|e| StoreError::Damaged(e.to_string()))?,
            epoch: stored.epoch,
        };
        ownership.claims.push(claim);
    }
    Ok(ownership)
}

/// Takes `claims` over into the table, by epoch, and returns the whole.
pub(super) fn adopt_all(txn: &WriteTransaction, claims: &[Claim]) -> Result<Ownership, StoreError> {
    let mut table = txn.open_table(tables::OWNERSHIP)?;
    let before = load(&table)?;
    let mut ownership = before.clone();
    if !ownership.adopt_all(claims).is_empty() {
        // No more than what changed: a peer may have brought thousands of claims, and bring one more a few times a second.
        let (gone, new) = difference(&before, &ownership);
        for start in gone {
            table.remove(start)?;
        }
        for claim in new {
            let stored = StoredClaim {
                end: claim.range.end(),
                owner: claim.owner.as_str().into(),
                epoch: claim.epoch,
            };
            table.insert(claim.range.start(), to_json(&stored)?.as_slice())?;
        }
    }
    Ok(ownership)
}

/// What makes `after` of `before`, where claims are kept by their first slot: those that are kept no more, and those that are new or other ones.
fn difference<'a>(before: &'a Ownership, after: &'a Ownership) -> (Vec<u16>, Vec<&'a Claim>) {
    fn by_start(of: &Ownership) -> BTreeMap<u16, &Claim> {
        of.claims().iter().map(|claim| (claim.range.start(), claim)).collect()
    }
    let (before, after) = (by_start(before), by_start(after));
    let gone = before.keys().filter(|start| !after.contains_key(start)).copied().collect();
    let new =
        after.into_iter().filter(|(start, claim)| before.get(start) != Some(claim)).map(|(_, claim)| claim);
    (gone, new.collect())
}

/// Remembers where nodes can be reached.
pub(super) fn put_nodes(
    txn: &WriteTransaction,
    nodes: &BTreeMap<NodeId, NodeAddresses>,
) -> Result<(), StoreError> {
    let mut table = txn.open_table(tables::NODES)?;
    for (id, addresses) in nodes {
        table.insert(id.as_str(), to_json(addresses)?.as_slice())?;
    }
    Ok(())
}

/// Reads where nodes can be reached.
pub(super) fn load_nodes(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
) -> Result<BTreeMap<NodeId, NodeAddresses>, StoreError> {
    let mut nodes = BTreeMap::new();
    for entry in table.iter()? {
        let (id, stored) = entry?;
        let id = NodeId::new(id.value()).map_err(|e| StoreError::Damaged(e.to_string()))?;
        nodes.insert(id, from_json(stored.value(), "nodes")?);
    }
    Ok(nodes)
}

pub(super) fn to_json(value: &impl Serialize) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(value).map_err(|error| StoreError::Damaged(error.to_string()))
}

pub(super) fn from_json<T: for<'de> Deserialize<'de>>(stored: &[u8], table: &str) -> Result<T, StoreError> {
    serde_json::from_slice(stored)
        .map_err(|error| StoreError::Damaged(format!("a row of table {table}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(range: &str, owner: &str, epoch: u64) -> Claim {
        Claim { range: range.parse().unwrap(), owner: NodeId::new(owner).unwrap(), epoch }
    }

    fn ownership(claims: &[(&str, &str, u64)]) -> Ownership {
        let mut ownership = Ownership::default();
        for (range, owner, epoch) in claims {
            ownership.adopt(&claim(range, owner, *epoch));
        }
        ownership
    }

    #[test]
    fn a_higher_epoch_takes_slots_out_of_the_middle() {
        let mut all = ownership(&[("0-16383", "n1", 1)]);
        assert!(all.adopt(&claim("100-199", "n2", 2)));
        assert_eq!(
            all.claims(),
            [claim("0-99", "n1", 1), claim("100-199", "n2", 2), claim("200-16383", "n1", 1)]
        );
        assert_eq!(all.of(99).unwrap().owner.as_str(), "n1");
        assert_eq!(all.of(100).unwrap().owner.as_str(), "n2");
    }

    #[test]
    fn an_equal_or_lower_epoch_changes_nothing() {
        let mut all = ownership(&[("0-16383", "n1", 2)]);
        let before = all.clone();
        assert!(!all.adopt(&claim("0-16383", "n2", 2)));
        assert!(!all.adopt(&claim("5-9", "n2", 1)));
        assert_eq!(all, before);
    }

    #[test]
    fn free_slots_between_claims_that_stay_are_taken() {
        let mut all = ownership(&[("10-19", "n1", 5), ("30-39", "n1", 5)]);
        assert!(all.adopt(&claim("0-49", "n2", 1)));
        assert_eq!(
            all.claims(),
            [
                claim("0-9", "n2", 1),
                claim("10-19", "n1", 5),
                claim("20-29", "n2", 1),
                claim("30-39", "n1", 5),
                claim("40-49", "n2", 1)
            ]
        );
        assert!(all.of(50).is_none());
    }

    #[test]
    fn claims_that_overlap_are_found() {
        let all = ownership(&[("10-19", "n1", 1), ("20-29", "n2", 1), ("40-49", "n1", 1)]);
        for start in 0..60 {
            for end in start + 1..=60 {
                let range = SlotRange::new(start, end).unwrap();
                let expected = all.claims().iter().filter(|claim| claim.range.overlaps(range));
                assert!(all.overlapping(range).eq(expected), "{range}");
            }
        }
    }

    #[test]
    fn neighbours_are_joined() {
        let all = ownership(&[("0-99", "n1", 1), ("100-199", "n1", 1)]);
        assert_eq!(all.claims(), [claim("0-199", "n1", 1)]);
    }

    proptest::proptest! {
        #![proptest_config(proptest::test_runner::Config::with_cases(100))]

        /// Against the obvious model: one owner per slot, the higher epoch wins. However the claims come: one by one, or some of them at once.
        #[test]
        fn adopting_equals_the_model(
            claims in proptest::collection::vec((0u16..60, 1u16..30, 0usize..3, 1u64..5), 0..12),
            first in 0usize..12,
        ) {
            let names = ["a", "b", "c"];
            let claims: Vec<Claim> = claims
                .into_iter()
                .map(|(start, len, owner, epoch)| claim(&format!("{start}-{}", start + len - 1), names[owner], epoch))
                .collect();
            let (mut all, mut at_once) = (Ownership::default(), Ownership::default());
            let mut model: Vec<Option<(&str, u64)>> = vec![None; 100];
            let (before, after) = claims.split_at(first.min(claims.len()));
            at_once.adopt_all(before);
            let middle = at_once.clone();
            for claim in &claims {
                let mut changed = false;
                for slot in claim.range.iter() {
                    let present = &mut model[usize::from(slot)];
                    if present.is_none_or(|(_, present)| claim.epoch > present) {
                        *present = Some((claim.owner.as_str(), claim.epoch));
                        changed = true;
                    }
                }
                proptest::prop_assert_eq!(all.adopt(claim), changed);
            }
            let changed = at_once.adopt_all(after);
            proptest::prop_assert_eq!(&at_once, &all);
            let mut rows: BTreeMap<u16, Claim> =
                middle.claims().iter().map(|claim| (claim.range.start(), claim.clone())).collect();
            let (gone, new) = difference(&middle, &at_once);
            rows.retain(|start, _| !gone.contains(start));
            rows.extend(new.into_iter().map(|claim| (claim.range.start(), claim.clone())));
            proptest::prop_assert!(rows.values().eq(at_once.claims()));
            for (slot, expected) in (0..).zip(&model) {
                let found = all.of(slot).map(|claim| (claim.owner.as_str(), claim.epoch));
                proptest::prop_assert_eq!(found, *expected);
                let told = changed.iter().find(|claim| claim.range.contains(slot));
                let differs = Some(at_once.of(slot)).filter(|now| now.map(what) != middle.of(slot).map(what));
                proptest::prop_assert_eq!(told.map(what), differs.flatten().map(what));
            }
            let overlapping = |range: SlotRange| all.claims().iter().filter(move |claim| claim.range.overlaps(range));
            for range in claims.iter().map(|claim| claim.range) {
                proptest::prop_assert!(all.overlapping(range).eq(overlapping(range)));
            }
        }
    }

    fn what(claim: &Claim) -> (&str, u64) {
        (claim.owner.as_str(), claim.epoch)
    }

    /// A claim for each slot, and as many that each hold all of them.
    #[test]
    fn many_claims_take_no_longer_than_their_slots() {
        let single = |slot: u16| Claim {
            range: SlotRange::new(slot, slot + 1).unwrap(),
            ..claim("0", &format!("n{slot}"), 1)
        };
        let singles: Vec<Claim> = (0..SLOT_COUNT).map(single).collect();
        let began = std::time::Instant::now();
        let mut all = Ownership::default();
        assert_eq!(all.adopt_all(&singles), singles);
        let before = all.clone();
        all.adopt(&Claim { epoch: 2, ..singles[7].clone() });
        let (gone, new) = difference(&before, &all);
        assert_eq!((gone.len(), new.len()), (0, 1), "one row is written for one claim");
        let wide: Vec<Claim> = (0..100_000).map(|n| claim("0-16383", "n1", 3 + n)).collect();
        assert_eq!(all.adopt_all(&wide), [claim("0-16383", "n1", 100_002)]);
        // One by one: minutes.
        assert!(began.elapsed() < std::time::Duration::from_secs(20), "{:?}", began.elapsed());
    }
}

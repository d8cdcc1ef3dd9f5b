//! Count and digest of the live keys of each slot: what both sides compare before the commit.
//!
//! The digest of a slot is the sum modulo 2^128 of a hash of each of its live keys, so it has no order and can be kept up:
//! subtract the old image, add the new one. The definition, byte by byte, stands in `migration.proto` under "Digest".

use std::collections::BTreeMap;

use bytes::Bytes;
use proto_common::error::Error;
use proto_common::slots::{SlotRange, slot_of};

use crate::Reason;
use crate::entry::Image;
use crate::v1;

/// The live keys of one slot, in sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotDigest {
    /// The slot.
    pub slot: u16,
    /// Number of keys.
    pub keys: u64,
    /// Sum of their [hashes](entry_hash) modulo 2^128.
    pub sum: u128,
}

impl From<SlotDigest> for v1::SlotDigest {
    fn from(digest: SlotDigest) -> Self {
        let SlotDigest { slot, keys, sum } = digest;
        Self { slot: u32::from(slot), keys, sum: Bytes::copy_from_slice(&sum.to_le_bytes()) }
    }
}

/// The hash of one live key: the first 16 bytes of BLAKE3 over both lengths, key and value.
#[must_use]
pub fn entry_hash(key: &[u8], value: &[u8], expires_unix_ms: Option<u64>) -> u128 {
    let mut hasher = blake3::Hasher::new();
    let mut head = [0; 16];
    let (len, expiry) = head.split_at_mut(8);
    len.copy_from_slice(&u64::try_from(key.len()).unwrap_or(u64::MAX).to_le_bytes());
    expiry.copy_from_slice(&expires_unix_ms.unwrap_or(0).to_le_bytes());
    hasher.update(&head).update(key).update(value);
    let hash = hasher.finalize();
    let mut first = [0; 16];
    first.copy_from_slice(&hash.as_bytes()[..16]);
    u128::from_le_bytes(first)
}

/// The hash of `key` with `image`.
#[must_use]
pub fn image_hash(key: &[u8], image: &Image) -> u128 {
    entry_hash(key, &image.value, image.expires_unix_ms)
}

/// Digests of many slots, kept up as their keys change. Slots without keys take no memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SlotDigests {
    slots: BTreeMap<u16, (u64, u128)>,
}

impl SlotDigests {
    /// Of no keys.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A key appeared in `slot` (its hash is `new`), changed, or went (its hash was `old`).
    pub fn change(&mut self, slot: u16, old: Option<u128>, new: Option<u128>) {
        let (keys, sum) = self.slots.entry(slot).or_default();
        if let Some(old) = old {
            *keys = keys.wrapping_sub(1);
            *sum = sum.wrapping_sub(old);
        }
        if let Some(new) = new {
            *keys = keys.wrapping_add(1);
            *sum = sum.wrapping_add(new);
        }
        // A wrapped count is not 0, so what a caller got wrong stays visible.
        if (*keys, *sum) == (0, 0) {
            self.slots.remove(&slot);
        }
    }

    /// Adds a live key, in the slot that it hashes to.
    pub fn add(&mut self, key: &[u8], image: &Image) {
        self.change(slot_of(key), None, Some(image_hash(key, image)));
    }

    /// Adds what another one holds.
    pub fn merge(&mut self, other: &Self) {
        for (&slot, &(keys, sum)) in &other.slots {
            let entry = self.slots.entry(slot).or_default();
            *entry = (entry.0.wrapping_add(keys), entry.1.wrapping_add(sum));
            if *entry == (0, 0) {
                self.slots.remove(&slot);
            }
        }
    }

    /// Every slot of `range` with at least one key, in rising order.
    #[must_use]
    pub fn of(&self, range: SlotRange) -> Vec<SlotDigest> {
        self.slots
            .range(range.start()..range.end())
            .map(|(&slot, &(keys, sum))| SlotDigest { slot, keys, sum })
            .collect()
    }

    /// Number of keys in all slots.
    #[must_use]
    pub fn keys(&self) -> u64 {
        self.slots.values().fold(0, |keys, &(more, _)| keys.saturating_add(more))
    }
}

/// Where two sides differ, if they do: the first slot, what each has there, and how many slots differ in all.
#[must_use]
pub fn compare(source: &[SlotDigest], target: &[SlotDigest]) -> Option<v1::SlotMismatch> {
    // As a rule, and a freeze waits for it.
    if source == target {
        return None;
    }
    type Pair = (Option<SlotDigest>, Option<SlotDigest>);
    let mut slots: BTreeMap<u16, Pair> = BTreeMap::new();
    for digest in source {
        slots.entry(digest.slot).or_default().0 = Some(*digest);
    }
    for digest in target {
        slots.entry(digest.slot).or_default().1 = Some(*digest);
    }
    let empty = |slot| SlotDigest { slot, keys: 0, sum: 0 };
    let mut differing = slots
        .into_iter()
        .map(|(slot, (source, target))| {
            (slot, source.unwrap_or_else(|| empty(slot)), target.unwrap_or_else(|| empty(slot)))
        })
        .filter(|(_, source, target)| source != target);
    let (slot, source, target) = differing.next()?;
    Some(v1::SlotMismatch {
        slot: u32::from(slot),
        source: Some(source.into()),
        target: Some(target.into()),
        slots_differing: u32::try_from(1 + differing.count()).unwrap_or(u32::MAX),
    })
}

/// Bytes of a sum.
pub(crate) const SUM_BYTES: usize = size_of::<u128>();

/// The digests of a `Prepare`.
#[must_use]
pub fn to_wire(digests: &[SlotDigest]) -> v1::SlotDigests {
    let mut sums = Vec::with_capacity(digests.len() * SUM_BYTES);
    digests.iter().for_each(|digest| sums.extend_from_slice(&digest.sum.to_le_bytes()));
    v1::SlotDigests {
        slots: digests.iter().map(|digest| u32::from(digest.slot)).collect(),
        keys: digests.iter().map(|digest| digest.keys).collect(),
        sums: sums.into(),
    }
}

/// Reads the digests of a `Prepare`: slots of `range`, each with keys, in strictly rising order.
///
/// # Errors
///
/// `INVALID_FIELD`, naming the first one that is not so.
pub fn from_wire(digests: &v1::SlotDigests, range: SlotRange) -> Result<Vec<SlotDigest>, Error> {
    let v1::SlotDigests { slots, keys, sums } = digests;
    let of_all = |field: &str, problem: String| {
        Reason::InvalidField.field(&format!("prepare.digests.{field}"), problem)
    };
    if keys.len() != slots.len() {
        return Err(of_all("keys", format!("are {}, of {} slots", keys.len(), slots.len())));
    }
    let (sums, rest) = sums.as_chunks::<SUM_BYTES>();
    if sums.len() != slots.len() || !rest.is_empty() {
        let bytes = sums.as_flattened().len() + rest.len();
        let problem = format!("has {bytes} bytes instead of {SUM_BYTES} for each of {} slots", slots.len());
        return Err(of_all("sums", problem));
    }
    let mut last = None;
    slots
        .iter()
        .zip(keys)
        .zip(sums)
        .enumerate()
        .map(|(index, ((slot, &keys), sum))| {
            let bad = |field: &str, problem: String| of_all(&format!("{field}[{index}]"), problem);
            let slot = u16::try_from(*slot)
                .ok()
                .filter(|&slot| range.contains(slot))
                .ok_or_else(|| bad("slots", format!("is {slot}, outside of {range}")))?;
            if last.is_some_and(|last| slot <= last) {
                return Err(bad("slots", format!("is {slot}; slots are in strictly rising order")));
            }
            last = Some(slot);
            if keys == 0 {
                return Err(bad("keys", "is 0; slots without keys are left out".to_owned()));
            }
            Ok(SlotDigest { slot, keys, sum: u128::from_le_bytes(*sum) })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PROTO: &str = include_str!("../proto/node/migration/v1/migration.proto");

    fn hex(sum: u128) -> String {
        proto_common::text::hex(&sum.to_le_bytes())
    }

    #[test]
    fn equals_the_examples_of_the_contract() {
        let one = entry_hash(b"a", b"1", None);
        let two = entry_hash(b"key", b"", Some(1_700_000_000_000));
        for sum in [one, two, one.wrapping_add(two)] {
            assert!(PROTO.contains(&format!("//   {}\n", hex(sum))), "{}", hex(sum));
        }
    }

    #[test]
    fn the_first_slot_that_differs_is_named() {
        let digest = |slot, keys, sum| SlotDigest { slot, keys, sum };
        let source = [digest(1, 1, 10), digest(2, 2, 20), digest(4, 1, 7)];
        let target = [digest(1, 1, 10), digest(3, 1, 30), digest(4, 1, 8)];
        assert_eq!(compare(&source, &source), None);
        let mismatch = compare(&source, &target).unwrap();
        assert_eq!((mismatch.slot, mismatch.slots_differing), (2, 3));
        assert_eq!(mismatch.source, Some(digest(2, 2, 20).into()));
        assert_eq!(mismatch.target, Some(digest(2, 0, 0).into()));
    }

    #[test]
    fn digests_of_a_prepare_are_checked() {
        type Spoil = fn(&mut v1::SlotDigests);
        let range = SlotRange::new(5, 10).unwrap();
        let digests =
            [SlotDigest { slot: 5, keys: 1, sum: 3 }, SlotDigest { slot: 9, keys: 2, sum: u128::MAX - 1 }];
        let good = to_wire(&digests);
        assert_eq!(from_wire(&good, range).unwrap(), digests);
        assert_eq!(from_wire(&v1::SlotDigests::default(), range).unwrap(), []);
        let bad: [(&str, Spoil); 9] = [
            (".slots[0]", |d| d.slots[0] = 4),
            (".slots[1]", |d| d.slots[1] = 10),
            (".slots[1]", |d| d.slots[1] = 5),
            (".slots[0]", |d| d.slots[0] = 65_536 + 5),
            (".keys[1]", |d| d.keys[1] = 0),
            (".keys", |d| d.keys.push(1)),
            (".keys", |d| d.keys.clear()),
            (".sums", |d| d.sums = d.sums.slice(1..)),
            (".sums", |d| d.sums = d.sums.slice(16..)),
        ];
        for (field, spoil) in bad {
            let mut digests = good.clone();
            spoil(&mut digests);
            let error = from_wire(&digests, range).unwrap_err();
            assert_eq!(error.violations()[0].field, format!("prepare.digests{field}"));
        }
    }

    proptest! {
        #[test]
        fn kept_up_equals_counted_anew(
            changes in prop::collection::vec((0_u8..8, prop::option::of(any::<u8>())), 0..200),
        ) {
            let mut kept = SlotDigests::new();
            let mut store: BTreeMap<u8, Image> = BTreeMap::new();
            for (key, value) in changes {
                let image = value.map(|value| Image { value: vec![value].into(), expires_unix_ms: None });
                let hash = |image: &Image| image_hash(&[key], image);
                let new = image.as_ref().map(hash);
                let old = match image {
                    Some(image) => store.insert(key, image),
                    None => store.remove(&key),
                };
                kept.change(slot_of(&[key]), old.as_ref().map(hash), new);
            }
            let mut anew = SlotDigests::new();
            for (key, image) in &store {
                anew.add(&[*key], image);
            }
            prop_assert_eq!(kept.keys(), store.len() as u64);
            prop_assert_eq!(kept, anew);
        }
    }
}

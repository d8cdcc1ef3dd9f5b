//! One key as it was at a sequence, and how many of them travel in a batch.
//!
//! Policy of this border: a batch is checked as a whole before any of it is applied, and an error names the
//! entry and the field. Inside, an entry is either an image or a tombstone; nothing else can be expressed.

use bytes::{Buf, Bytes, BytesMut};
use prost::DecodeError;
use prost::encoding::{
    DecodeContext, WireType, decode_key, encode_key, encode_varint, encoded_len_varint, key_len, message,
    skip_field,
};
use proto_common::error::Error;
use proto_common::slots::{SlotRange, slot_of};

use crate::Reason;
use crate::v1::transfer_migration_data_request as wire;

/// Entries of one batch, at most.
pub const MAX_ENTRIES: usize = 65_536;

/// Longest key, in bytes.
pub const MAX_KEY_BYTES: usize = 65_536;

/// What a batch spends on an entry beside its key and value, at most, in bytes.
pub const ENTRY_OVERHEAD: usize = 64;

/// One key as it was at a sequence of the source's change log: a post-image or a tombstone, never an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The sequence at which this was true, 1 or more.
    pub seq: u64,
    /// The key.
    pub key: Bytes,
    /// What the key held then; `None`: it did not exist.
    pub image: Option<Image>,
}

/// What a key holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The value, in the encoding that the specification names.
    pub value: Bytes,
    /// When it expires, in Unix milliseconds, 1 or more; `None` if it does not.
    pub expires_unix_ms: Option<u64>,
}

impl Entry {
    /// Bytes of key and value, as limits and progress count them.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let value = self.image.as_ref().map_or(0, |image| image.value.len());
        u64::try_from(self.key.len().saturating_add(value)).unwrap_or(u64::MAX)
    }
}

/// Numbers of the fields of `Entry` and `Entries`.
mod field {
    pub(super) const ENTRIES: u32 = 1;
    pub(super) const SEQ: u32 = 1;
    pub(super) const TOMBSTONE: u32 = 2;
    pub(super) const EXPIRES: u32 = 3;
    pub(super) const KEY: u32 = 2046;
    pub(super) const VALUE: u32 = 2047;
}

/// Encodes entries as the payload of a batch.
#[must_use]
pub fn encode(entries: &[Entry]) -> Bytes {
    // By hand: prost encodes a list of messages, which had to be made of the entries first.
    let len = |entry| {
        let len = encoded_len(entry);
        1 + encoded_len_varint(len as u64) + len
    };
    let mut buffer = BytesMut::with_capacity(entries.iter().map(len).sum());
    let to = &mut buffer;
    for entry in entries {
        let Entry { seq, key, image } = entry;
        encode_key(field::ENTRIES, WireType::LengthDelimited, to);
        encode_varint(encoded_len(entry) as u64, to);
        number(field::SEQ, *seq, to);
        match image {
            None => {
                number(field::TOMBSTONE, 1, to);
                bytes(field::KEY, key, to);
            }
            Some(Image { value, expires_unix_ms }) => {
                if let Some(expires) = expires_unix_ms {
                    encode_key(field::EXPIRES, WireType::Varint, to);
                    encode_varint(*expires, to);
                }
                bytes(field::KEY, key, to);
                bytes(field::VALUE, value, to);
            }
        }
    }
    buffer.freeze()
}

/// Bytes of an `Entry` on the wire.
fn encoded_len(entry: &Entry) -> usize {
    let Entry { seq, key, image } = entry;
    let bytes = |tag, bytes: &Bytes| match bytes.len() {
        0 => 0,
        len => key_len(tag) + encoded_len_varint(len as u64) + len,
    };
    let seq = if *seq == 0 { 0 } else { key_len(field::SEQ) + encoded_len_varint(*seq) };
    let image = match image {
        None => key_len(field::TOMBSTONE) + 1,
        Some(Image { value, expires_unix_ms }) => {
            let expires = expires_unix_ms.map_or(0, |at| key_len(field::EXPIRES) + encoded_len_varint(at));
            expires + bytes(field::VALUE, value)
        }
    };
    seq + image + bytes(field::KEY, key)
}

/// A number, which is left out where it is 0.
fn number(tag: u32, value: u64, to: &mut BytesMut) {
    if value != 0 {
        encode_key(tag, WireType::Varint, to);
        encode_varint(value, to);
    }
}

/// Bytes, which are left out where there are none.
fn bytes(tag: u32, value: &Bytes, to: &mut BytesMut) {
    if !value.is_empty() {
        encode_key(tag, WireType::LengthDelimited, to);
        encode_varint(value.len() as u64, to);
        to.extend_from_slice(value);
    }
}

/// Decodes a payload whose checksum is right and checks every entry of it. Keys and values share the payload's
/// memory, where that is [`Bytes`], or where they lie in one piece of a [`Payload`](proto_common::bulk::Payload).
///
/// # Errors
///
/// `MALFORMED_BATCH`, `INVALID_FIELD`, `KEY_OUTSIDE_RANGE` (metadata `slot`) or `ENTRY_TOO_LARGE`, naming the entry
/// below `path`.
pub fn decode(
    mut payload: impl Buf,
    declared: u32,
    slots: SlotRange,
    path: &str,
) -> Result<Vec<Entry>, Error> {
    let malformed = |error: DecodeError| {
        let sentence =
            format!("{path}.payload does not decode as Entries: {error}; nothing of the batch is applied");
        Reason::MalformedBatch.error(sentence).violation(format!("{path}.payload"), "does not decode")
    };
    let miscounted = |found: &str| {
        let problem = format!("is {declared}, but the payload holds {found} entries");
        Reason::MalformedBatch.field(&format!("{path}.entry_count"), problem)
    };
    let declared_len = usize::try_from(declared).unwrap_or(usize::MAX);
    // An entry takes two bytes at least.
    let mut entries = Vec::with_capacity(declared_len.min(MAX_ENTRIES).min(payload.remaining() / 2));
    // One by one, and none beyond those that are declared: an entry of two bytes would take a hundred in memory.
    while payload.has_remaining() {
        let Some(entry) = next(&mut payload).map_err(malformed)? else { continue };
        if entries.len() == declared_len {
            return Err(miscounted("more"));
        }
        let index = entries.len();
        entries.push(check(entry, slots, &|| format!("{path}.payload.entries[{index}]"))?);
    }
    if entries.len() != declared_len {
        return Err(miscounted(&entries.len().to_string()));
    }
    Ok(entries)
}

/// The next field of an `Entries`, which is not empty. `None` for one that this version does not know.
fn next(payload: &mut impl Buf) -> Result<Option<wire::Entry>, DecodeError> {
    let (tag, wire_type) = decode_key(payload)?;
    if tag != field::ENTRIES {
        skip_field(wire_type, tag, payload, DecodeContext::default())?;
        return Ok(None);
    }
    let mut entry = wire::Entry::default();
    message::merge(wire_type, &mut entry, payload, DecodeContext::default())?;
    Ok(Some(entry))
}

fn check(entry: wire::Entry, slots: SlotRange, path: &dyn Fn() -> String) -> Result<Entry, Error> {
    let wire::Entry { seq, tombstone, expires_unix_ms, key, value } = entry;
    let bad =
        |field: &str, problem: &str| Reason::InvalidField.field(&format!("{}.{field}", path()), problem);
    if seq == 0 {
        return Err(bad("seq", "is 0; sequences start at 1"));
    }
    if expires_unix_ms == Some(0) {
        return Err(bad("expires_unix_ms", "is 0; leave it out for a key that does not expire"));
    }
    if tombstone && !value.is_empty() {
        return Err(bad("value", "is set, but the entry is a tombstone"));
    }
    if tombstone && expires_unix_ms.is_some() {
        return Err(bad("expires_unix_ms", "is set, but the entry is a tombstone"));
    }
    let slot = slot_of(&key);
    if key.len() > MAX_KEY_BYTES {
        let problem = format!("has {} bytes; the limit is {MAX_KEY_BYTES}", key.len());
        return Err(Reason::EntryTooLarge
            .field(&format!("{}.key", path()), problem)
            .metadata("slot", slot.to_string())
            .metadata("size", key.len().to_string()));
    }
    if !slots.contains(slot) {
        let problem = format!("lies in slot {slot}, outside of {slots}");
        return Err(Reason::KeyOutsideRange
            .field(&format!("{}.key", path()), problem)
            .metadata("slot", slot.to_string()));
    }
    let image = (!tombstone).then_some(Image { value, expires_unix_ms });
    Ok(Entry { seq, key, image })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    fn image(value: &[u8]) -> Option<Image> {
        Some(Image { value: Bytes::copy_from_slice(value), expires_unix_ms: None })
    }

    fn entry(seq: u64, key: &[u8], image: Option<Image>) -> Entry {
        Entry { seq, key: Bytes::copy_from_slice(key), image }
    }

    fn wire_entry(entry: Entry) -> wire::Entry {
        let Entry { seq, key, image } = entry;
        let tombstone = image.is_none();
        let (value, expires_unix_ms) =
            image.map_or_else(Default::default, |image| (image.value, image.expires_unix_ms));
        wire::Entry { seq, tombstone, expires_unix_ms, key, value }
    }

    fn one(entry: wire::Entry, slots: SlotRange) -> Result<Vec<Entry>, Error> {
        let payload = wire::Entries { entries: vec![entry] }.encode_to_vec();
        decode(&payload[..], 1, slots, "bulk")
    }

    #[test]
    fn what_is_wrong_with_an_entry_is_named() {
        type Spoil = fn(&mut wire::Entry);
        let bad: [(&str, &str, Spoil); 6] = [
            ("seq", "INVALID_FIELD", |e| e.seq = 0),
            ("expires_unix_ms", "INVALID_FIELD", |e| e.expires_unix_ms = Some(0)),
            ("value", "INVALID_FIELD", |e| e.tombstone = true),
            ("expires_unix_ms", "INVALID_FIELD", |e| {
                (e.tombstone, e.expires_unix_ms, e.value) = (true, Some(1), Bytes::new());
            }),
            ("key", "ENTRY_TOO_LARGE", |e| e.key = vec![b'k'; MAX_KEY_BYTES + 1].into()),
            ("key", "KEY_OUTSIDE_RANGE", |e| e.key = Bytes::from_static(b"{other}k")),
        ];
        let key = Bytes::from_static(b"{tag}k");
        let slots = SlotRange::new(slot_of(&key), slot_of(&key) + 1).unwrap();
        let good = wire::Entry { seq: 7, tombstone: false, expires_unix_ms: None, key, value: "v".into() };
        assert_eq!(one(good.clone(), slots).unwrap(), [entry(7, b"{tag}k", image(b"v"))]);
        for (field, reason, spoil) in bad {
            let mut entry = good.clone();
            spoil(&mut entry);
            let error = one(entry, slots).unwrap_err();
            assert_eq!(error.reason(), reason, "{field}");
            assert_eq!(error.violations()[0].field, format!("bulk.payload.entries[0].{field}"));
        }
    }

    #[test]
    fn a_payload_that_is_no_batch_is_refused() {
        let error = decode(Bytes::from_static(b"\xff\xff"), 0, SlotRange::FULL, "delta").unwrap_err();
        assert_eq!(error.reason(), "MALFORMED_BATCH");
        let payload = encode(&[entry(1, b"k", None)]);
        let error = decode(payload, 2, SlotRange::FULL, "delta").unwrap_err();
        assert_eq!((error.reason(), &*error.violations()[0].field), ("MALFORMED_BATCH", "delta.entry_count"));
    }

    /// How far decoding read tells what it kept.
    struct Counted<'a>(&'a [u8], &'a std::cell::Cell<usize>);

    impl Buf for Counted<'_> {
        fn remaining(&self) -> usize {
            self.0.remaining()
        }

        fn chunk(&self) -> &[u8] {
            self.0.chunk()
        }

        fn advance(&mut self, count: usize) {
            self.1.set(self.1.get() + count);
            self.0.advance(count);
        }
    }

    #[test]
    fn no_more_entries_are_made_than_are_declared() {
        let one = encode(&[entry(1, b"k", None)]);
        let payload = one.repeat(1000);
        let read = std::cell::Cell::new(0);
        let error = decode(Counted(&payload, &read), 2, SlotRange::FULL, "bulk").unwrap_err();
        assert_eq!((error.reason(), &*error.violations()[0].field), ("MALFORMED_BATCH", "bulk.entry_count"));
        assert!(read.get() <= 3 * one.len(), "{} bytes were read, {} an entry", read.get(), one.len());
    }

    proptest! {
        #[test]
        fn entries_survive_the_wire(
            entries in prop::collection::vec(
                (1_u64.., any::<Vec<u8>>(), prop::option::of((any::<Vec<u8>>(), prop::option::of(1_u64..)))),
                0..20,
            ),
        ) {
            let entries: Vec<Entry> = entries
                .into_iter()
                .map(|(seq, key, image)| Entry {
                    seq,
                    key: key.into(),
                    image: image.map(|(value, expires_unix_ms)| Image { value: value.into(), expires_unix_ms }),
                })
                .collect();
            let payload = encode(&entries);
            // To the byte what prost makes of them.
            let of_prost = wire::Entries { entries: entries.iter().cloned().map(wire_entry).collect() };
            prop_assert_eq!(&payload[..], of_prost.encode_to_vec());
            let overhead = payload.len() - entries.iter().map(|e| usize::try_from(e.bytes()).unwrap()).sum::<usize>();
            prop_assert!(overhead <= ENTRY_OVERHEAD * entries.len());
            let count = u32::try_from(entries.len()).unwrap();
            prop_assert_eq!(decode(payload, count, SlotRange::FULL, "bulk").unwrap(), entries);
        }

        /// Also of fields of another kind, or of none that is known.
        #[test]
        fn the_same_verdict_as_prost_on_anything(payload in prop::collection::vec(0_u8..20, 0..40)) {
            let of_prost = wire::Entries::decode(&payload[..]);
            let count = of_prost.as_ref().map_or(MAX_ENTRIES, |entries| entries.entries.len());
            let ours = decode(&payload[..], u32::try_from(count).unwrap(), SlotRange::FULL, "bulk");
            let is_malformed = ours.as_ref().is_err_and(|error| error.is(Reason::MalformedBatch));
            let is_checked = ours.as_ref().is_err_and(|error| error.is(Reason::InvalidField));
            match of_prost {
                // What is wrong with an entry is told before what comes behind it is read.
                Err(_) => prop_assert!(is_malformed || is_checked, "{ours:?}"),
                Ok(_) => prop_assert!(!is_malformed, "{ours:?}"),
            }
        }

        #[test]
        fn no_bytes_panic(payload in any::<Vec<u8>>(), declared in any::<u32>()) {
            let _ = decode(&payload[..], declared, SlotRange::FULL, "bulk");
        }
    }
}

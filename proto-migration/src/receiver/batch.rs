//! One batch of rows or changes: everything that is checked before any of it is applied.

use bytes::{Bytes, BytesMut};
use proto_common::bulk::Payload;
use proto_common::error::Error;
use proto_common::slots::{SlotRange, slot_of};

use super::handshake::unexpected;
use super::hurry::Hurried;
use super::record::Record;
use crate::Reason;
use crate::entry::{ENTRY_OVERHEAD, Entry, MAX_ENTRIES, decode};
use crate::v1::transfer_migration_data_request::{Bulk, Delta, Frame};

/// Longest cursor, in bytes.
const MAX_CURSOR_BYTES: usize = 65 << 10;
/// A payload below this size gets memory of its own, and so does each cursor: as slices of the HTTP/2 frames that they came in, of up to 512 KiB, they keep all of these, whatever
/// else was in there, until they are applied, and credit would not bound it. A longer payload keeps at most the frames at its two ends, four times its size. To copy
/// 256 KiB takes some 30 µs; a page that is full has 512 KiB.
const OWNED: usize = 256 << 10;

/// What a batch changes beside its entries.
#[derive(Debug)]
pub(super) enum Moves {
    /// The copy stands here.
    Copy { cursor: Bytes, last: bool },
    /// The watermark is this.
    Watermark(u64),
}

/// A batch whose every entry was checked.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) number: u64,
    /// Of the payload, in bytes.
    pub(super) payload: u64,
    pub(super) entries: Vec<Entry>,
    pub(super) moves: Moves,
    /// Where clients of the source wait for it, the store hurries until it is applied.
    pub(super) urgent: Option<Hurried>,
}

impl Batch {
    /// Bytes that it holds until it is applied, beside what its entries take.
    pub(super) fn held(&self) -> u64 {
        let cursor = if let Moves::Copy { cursor, .. } = &self.moves { cursor.len() } else { 0 };
        self.payload.saturating_add(cursor as u64)
    }

    /// Whether somebody waits for it to be durable, or for what can begin once it is.
    pub(super) fn is_waited_for(&self) -> bool {
        self.urgent.is_some() || matches!(self.moves, Moves::Copy { last: true, .. })
    }
}

/// Checks the batches of one stream in the order in which they come.
#[derive(Debug)]
pub(super) struct Checker {
    pub(super) slots: SlotRange,
    batch_bytes: u32,
    /// Of the last batch that was taken.
    number: u64,
    /// Payload bytes that were taken.
    pub(super) taken: u64,
    /// Largest payload that was taken.
    pub(super) largest: u64,
    /// All rows have come.
    pub(super) copied: bool,
    watermark: u64,
}

impl Checker {
    pub(super) fn new(record: &Record, batch_bytes: u32) -> Self {
        Self {
            slots: record.spec.slots,
            batch_bytes,
            number: 0,
            taken: 0,
            largest: 0,
            copied: record.kept.copied,
            watermark: record.kept.through_seq,
        }
    }

    /// Takes rows; `credit` is what the source was told last.
    pub(super) fn bulk(&mut self, bulk: Bulk, payload: Payload, credit: u64) -> Result<Batch, Error> {
        if self.copied {
            return Err(unexpected(&Frame::Bulk(bulk), "no rows: the copy is complete"));
        }
        let Bulk { number, entry_count, cursor, last, crc64nvme, payload: _ } = bulk;
        if cursor.len() > MAX_CURSOR_BYTES {
            let problem = format!("has {} bytes; the limit is {MAX_CURSOR_BYTES}", cursor.len());
            return Err(Reason::InvalidField.field("bulk.cursor", problem));
        }
        let cursor = Bytes::copy_from_slice(&cursor);
        let bytes = payload.len() as u64;
        let entries = self.open("bulk", number, entry_count, crc64nvme, payload, credit)?;
        self.copied = last;
        Ok(self.take(number, bytes, entries, Moves::Copy { cursor, last }))
    }

    /// Takes changes.
    pub(super) fn delta(&mut self, delta: &Delta, payload: Payload, credit: u64) -> Result<Batch, Error> {
        let Delta { number, entry_count, prev_seq, through_seq, crc64nvme, urgent: _, payload: _ } = *delta;
        if number == self.number + 1 && prev_seq != self.watermark {
            let problem = format!("is {prev_seq}, the watermark is {}", self.watermark);
            return Err(Reason::DeltaGap
                .field("delta.prev_seq", problem)
                .metadata("watermark", self.watermark.to_string()));
        }
        if through_seq < prev_seq {
            let problem = format!("is {through_seq}, lower than prev_seq {prev_seq}");
            return Err(Reason::InvalidField.field("delta.through_seq", problem));
        }
        let bytes = payload.len() as u64;
        let entries = self.open("delta", number, entry_count, crc64nvme, payload, credit)?;
        // A part of a transaction leaves the watermark where it is.
        let newest = if through_seq == prev_seq { u64::MAX } else { through_seq };
        let mut before = prev_seq.saturating_add(1);
        for (index, entry) in entries.iter().enumerate() {
            let wrong = |problem: String| {
                Reason::InvalidField.field(&format!("delta.payload.entries[{index}].seq"), problem)
            };
            if entry.seq <= prev_seq || entry.seq > newest {
                return Err(wrong(format!("is {}, not behind {prev_seq} and up to {newest}", entry.seq)));
            }
            if entry.seq < before {
                return Err(wrong(format!("is {} behind {before}; changes rise", entry.seq)));
            }
            before = entry.seq;
        }
        self.watermark = through_seq;
        Ok(self.take(number, bytes, entries, Moves::Watermark(through_seq)))
    }

    fn open(
        &self,
        path: &str,
        number: u64,
        entry_count: u32,
        declared_crc: u64,
        payload: Payload,
        credit: u64,
    ) -> Result<Vec<Entry>, Error> {
        let field = |field: &str| format!("{path}.{field}");
        if number != self.number + 1 {
            let problem = format!("is {number}; the next batch is {}", self.number + 1);
            return Err(Reason::BatchOutOfOrder.field(&field("number"), problem));
        }
        if payload.len() as u64 > u64::from(self.batch_bytes) {
            let problem = format!("has {} bytes; Accepted allows {}", payload.len(), self.batch_bytes);
            return Err(Reason::BatchTooLarge.field(&field("payload"), problem));
        }
        if usize::try_from(entry_count).unwrap_or(usize::MAX) > MAX_ENTRIES {
            let problem = format!("is {entry_count}; the limit is {MAX_ENTRIES}");
            return Err(Reason::BatchTooLarge.field(&field("entry_count"), problem));
        }
        if self.taken.saturating_add(payload.len() as u64) > credit {
            let problem =
                format!("has {} bytes; {} were sent and the credit is {credit}", payload.len(), self.taken);
            return Err(Reason::CreditExceeded.field(&field("payload"), problem));
        }
        let actual = payload.crc64();
        if actual != declared_crc {
            let problem =
                format!("is {declared_crc:#018x}, the payload has {actual:#018x}; nothing of it was stored");
            return Err(Reason::BatchChecksumMismatch.field(&field("crc64nvme"), problem));
        }
        let entries = decode(owned(payload).reader(), entry_count, self.slots, path)?;
        let largest = u64::from(self.batch_bytes).saturating_sub(ENTRY_OVERHEAD as u64);
        if let Some((index, entry)) = entries.iter().enumerate().find(|(_, entry)| entry.bytes() > largest) {
            let problem = format!("has {} bytes of key and value; the limit is {largest}", entry.bytes());
            return Err(Reason::EntryTooLarge
                .field(&format!("{path}.payload.entries[{index}]"), problem)
                .metadata("slot", slot_of(&entry.key).to_string())
                .metadata("size", entry.bytes().to_string()));
        }
        Ok(entries)
    }

    fn take(&mut self, number: u64, payload: u64, entries: Vec<Entry>, moves: Moves) -> Batch {
        self.number = number;
        self.taken += payload;
        self.largest = self.largest.max(payload);
        Batch { number, payload, entries, moves, urgent: None }
    }
}

/// Without the frames that it came in, if it is small; see [`OWNED`].
fn owned(payload: Payload) -> Payload {
    if payload.len() >= OWNED {
        return payload;
    }
    let mut own = BytesMut::with_capacity(payload.len());
    for slice in payload.slices() {
        own.extend_from_slice(slice);
    }
    own.freeze().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Image, encode};

    /// What comes of a batch of one row of `len` bytes, of which payload and cursor lie in one frame: is anything of it still kept?
    fn keeps_of_the_frame(len: usize) -> [bool; 2] {
        let image = Image { value: Bytes::from(vec![7; len]), expires_unix_ms: None };
        let entry = Entry { seq: 1, key: Bytes::from_static(b"k"), image: Some(image) };
        let rows = encode(&[entry]);
        let frame = Bytes::from([&rows[..], b"cursor"].concat());
        let payload = Payload::from(frame.slice(..rows.len()));
        let bulk = Bulk {
            number: 1,
            entry_count: 1,
            cursor: frame.slice(rows.len()..),
            last: false,
            crc64nvme: payload.crc64(),
            payload: Bytes::new(),
        };
        let mut checker = Checker {
            slots: SlotRange::FULL,
            batch_bytes: 16 << 20,
            number: 0,
            taken: 0,
            largest: 0,
            copied: false,
            watermark: 0,
        };
        let batch = checker.bulk(bulk, payload, u64::MAX).unwrap();
        assert_eq!(batch.held(), frame.len() as u64);
        let Moves::Copy { cursor, .. } = &batch.moves else { panic!("rows are copied") };
        assert_eq!(&cursor[..], b"cursor");
        let value = &batch.entries[0].image.as_ref().unwrap().value;
        [value, cursor].map(|kept| frame.as_ptr_range().contains(&kept.as_ptr()))
    }

    #[test]
    fn a_small_batch_keeps_nothing_of_the_frame_that_it_came_in() {
        assert_eq!(keeps_of_the_frame(1), [false, false]);
        assert_eq!(keeps_of_the_frame(OWNED - 64), [false, false]);
        assert_eq!(keeps_of_the_frame(OWNED), [true, false]);
    }
}

//! The snapshot file. Integers are little endian.
//!
//! ```text
//! file    = magic frame(header) frame(block)* 0u32 trailer
//! frame   = len: u32 (> 0), crc: u64 (of the body), body: len bytes
//! header  = JSON, see SnapshotHeader
//! block   = row*
//! row     = key_len: u32, value_len: u32, expires_at: u64 (ms since the epoch; u64::MAX is never), key, value
//! trailer = rows: u64, block_bytes: u64, crc: u64 (of all blocks, one after the other)
//! ```
//!
//! Rows are in the order of slot and key. Checksums are CRC-64/NVME.
//!
//! A file may come from a peer, so what no writer writes is refused before it takes memory: a long header, a row that no node stores, a block
//! that goes on after it was full.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::Path;

use bytes::{Buf as _, BufMut as _, Bytes};
use proto::common::checksum::{Crc64Hasher, crc64};
use serde::{Deserialize, Serialize};

use crate::common::{NodeId, SLOT_COUNT, SlotRange};
use crate::store::ops::row_too_large;
use crate::store::{Claim, MAX_NODES, MAX_ROW_BYTES, NodeAddresses, Ownership, StoreError};

const MAGIC: &[u8; 8] = b"NODESNP\x01";
const NEVER: u64 = u64::MAX;
const ROW_HEAD: usize = 16;
/// A block is written when it has reached this size; one row may make it larger.
const BLOCK_BYTES: usize = 256 << 10;
/// The longest block: the last row begins before it is full.
const MAX_BLOCK: usize = BLOCK_BYTES + ROW_HEAD + MAX_ROW_BYTES;
/// The longest header: each slot a claim of its own and as many nodes as are known, all of them with the longest names, take less.
const MAX_HEADER: usize = 4 << 20;
/// Claims of a header. They are disjoint.
const MAX_CLAIMS: usize = SLOT_COUNT as usize;

/// What a snapshot file says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotHeader {
    /// First slot.
    pub start: u16,
    /// One past the last slot.
    pub end: u16,
    /// The node that it was taken from.
    pub source: String,
    /// When, in milliseconds since the Unix epoch. What had expired by then is not in it.
    pub taken_unix_ms: u64,
    /// What is to be so once it is imported.
    pub handover: Handover,
}

/// Who owns what once a snapshot is imported, and where to find them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    claims: Vec<HandoverClaim>,
    nodes: BTreeMap<String, NodeAddresses>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct HandoverClaim {
    start: u16,
    end: u16,
    owner: String,
    epoch: u64,
}

impl Handover {
    /// What a node knows, but that `new` is so; and where nodes are, at most as many as are learned of.
    #[must_use]
    pub fn new(known: &Ownership, new: &Claim, nodes: &BTreeMap<NodeId, NodeAddresses>) -> Self {
        let rest = known.claims().iter().flat_map(|known| {
            let rest = known.range.difference(new.range).into_iter();
            rest.map(|range| Claim { range, ..known.clone() })
        });
        let claims = rest.chain([new.clone()]).map(|claim| HandoverClaim {
            start: claim.range.start(),
            end: claim.range.end(),
            owner: claim.owner.to_string(),
            epoch: claim.epoch,
        });
        let mut claims: Vec<_> = claims.collect();
        claims.sort_unstable_by_key(|claim| claim.start);
        let nodes = nodes.iter().take(MAX_NODES);
        Self { claims, nodes: nodes.map(|(id, addresses)| (id.to_string(), addresses.clone())).collect() }
    }

    /// Whether a node can have written it.
    fn check(&self) -> Result<(), StoreError> {
        if self.claims.len() > MAX_CLAIMS {
            return Err(damaged(&format!(
                "it has {} claims; there are {MAX_CLAIMS} slots",
                self.claims.len()
            )));
        }
        if self.nodes.len() > MAX_NODES {
            return Err(damaged(&format!("it names {} nodes; the limit is {MAX_NODES}", self.nodes.len())));
        }
        if !self.claims.is_sorted_by(|claim, next| claim.end <= next.start) {
            return Err(damaged("its claims are not in the order of their slots, each by itself"));
        }
        Ok(())
    }

    /// Who owns what.
    ///
    /// # Errors
    ///
    /// A range or id is none.
    pub fn claims(&self) -> Result<Vec<Claim>, StoreError> {
        let claim = |claim: &HandoverClaim| {
            Ok(Claim {
                range: SlotRange::new(claim.start, claim.end).map_err(|error| damaged(&error.to_string()))?,
                owner: NodeId::new(&claim.owner).map_err(|error| damaged(&error.to_string()))?,
                epoch: claim.epoch,
            })
        };
        self.claims.iter().map(claim).collect()
    }

    /// Where nodes are.
    ///
    /// # Errors
    ///
    /// An id is none, or an address is none that can be shown.
    pub fn nodes(&self) -> Result<BTreeMap<NodeId, NodeAddresses>, StoreError> {
        let node = |(id, addresses): (&String, &NodeAddresses)| {
            let id = NodeId::new(id).map_err(|error| damaged(&error.to_string()))?;
            if !addresses.can_be_shown() {
                return Err(damaged(&format!(
                    "an address of node {id} has characters that no address has, or too many"
                )));
            }
            Ok((id, addresses.clone()))
        };
        self.nodes.iter().map(node).collect()
    }
}

impl SnapshotHeader {
    /// The slots.
    ///
    /// # Errors
    ///
    /// They are no range.
    pub fn range(&self) -> Result<SlotRange, StoreError> {
        SlotRange::new(self.start, self.end).map_err(|error| damaged(&error.to_string()))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SnapshotRow {
    pub(super) key: Bytes,
    pub(super) value: Bytes,
    pub(super) expires_at: Option<u64>,
}

pub(super) struct SnapshotWriter<W: Write> {
    out: W,
    block: Vec<u8>,
    crc: Crc64Hasher,
    rows: u64,
    block_bytes: u64,
}

impl<W: Write> SnapshotWriter<W> {
    pub(super) fn begin(mut out: W, header: &SnapshotHeader) -> Result<Self, StoreError> {
        let body = serde_json::to_vec(header).map_err(|error| damaged(&error.to_string()))?;
        out.write_all(MAGIC).map_err(write_failed)?;
        write_frame(&mut out, &body)?;
        Ok(Self {
            out,
            block: Vec::with_capacity(BLOCK_BYTES * 2),
            crc: Crc64Hasher::new(),
            rows: 0,
            block_bytes: 0,
        })
    }

    pub(super) fn row(
        &mut self,
        key: &[u8],
        value: &[u8],
        expires_at: Option<u64>,
    ) -> Result<(), StoreError> {
        let too_long = |_| damaged("a row is longer than 4 GiB");
        self.block.put_u32_le(u32::try_from(key.len()).map_err(too_long)?);
        self.block.put_u32_le(u32::try_from(value.len()).map_err(too_long)?);
        self.block.put_u64_le(expires_at.unwrap_or(NEVER));
        self.block.put_slice(key);
        self.block.put_slice(value);
        self.rows += 1;
        if self.block.len() >= BLOCK_BYTES {
            self.flush_block()?;
        }
        Ok(())
    }

    fn flush_block(&mut self) -> Result<(), StoreError> {
        if !self.block.is_empty() {
            write_frame(&mut self.out, &self.block)?;
            self.crc.update(&self.block);
            self.block_bytes += u64::try_from(self.block.len()).unwrap_or(u64::MAX);
            self.block.clear();
        }
        Ok(())
    }

    /// Writes the trailer; returns the writer and the number of rows.
    pub(super) fn finish(mut self) -> Result<(W, u64), StoreError> {
        self.flush_block()?;
        let mut trailer = Vec::with_capacity(28);
        trailer.put_u32_le(0);
        trailer.put_u64_le(self.rows);
        trailer.put_u64_le(self.block_bytes);
        trailer.put_u64_le(self.crc.finish());
        self.out.write_all(&trailer).map_err(write_failed)?;
        self.out.flush().map_err(write_failed)?;
        Ok((self.out, self.rows))
    }
}

fn write_frame(out: &mut impl Write, body: &[u8]) -> Result<(), StoreError> {
    let len = u32::try_from(body.len()).map_err(|_| damaged("a frame is longer than 4 GiB"))?;
    out.write_all(&len.to_le_bytes()).map_err(write_failed)?;
    out.write_all(&crc64(body).to_le_bytes()).map_err(write_failed)?;
    out.write_all(body).map_err(write_failed)
}

pub(super) struct SnapshotReader<R: Read> {
    input: R,
    header: SnapshotHeader,
    crc: Crc64Hasher,
    rows: u64,
    block_bytes: u64,
}

impl<R: Read> SnapshotReader<R> {
    pub(super) fn begin(mut input: R) -> Result<Self, StoreError> {
        let mut magic = [0; MAGIC.len()];
        read_exact(&mut input, &mut magic)?;
        if magic != *MAGIC {
            return Err(damaged("it is no snapshot of this program, or one of another version"));
        }
        let body = read_frame(&mut input, MAX_HEADER, "its header is longer than any that is written")?
            .ok_or_else(|| damaged("it has no header"))?;
        let header: SnapshotHeader =
            serde_json::from_slice(&body).map_err(|error| damaged(&error.to_string()))?;
        header.handover.check()?;
        Ok(Self { input, header, crc: Crc64Hasher::new(), rows: 0, block_bytes: 0 })
    }

    pub(super) fn header(&self) -> &SnapshotHeader {
        &self.header
    }

    /// Rows read so far.
    pub(super) fn rows(&self) -> u64 {
        self.rows
    }

    /// The next rows; `None` once the trailer was read and agrees with what was read.
    pub(super) fn next_block(&mut self) -> Result<Option<Vec<SnapshotRow>>, StoreError> {
        let Some(body) = read_frame(&mut self.input, MAX_BLOCK, LONG_BLOCK)? else {
            let mut trailer = [0; 24];
            read_exact(&mut self.input, &mut trailer)?;
            let mut trailer = &trailer[..];
            let (rows, bytes, crc) = (trailer.get_u64_le(), trailer.get_u64_le(), trailer.get_u64_le());
            if rows != self.rows || bytes != self.block_bytes || crc != self.crc.finish() {
                return Err(damaged("its rows are not those that its trailer counts"));
            }
            return Ok(None);
        };
        self.crc.update(&body);
        self.block_bytes += u64::try_from(body.len()).unwrap_or(u64::MAX);
        let mut body = Bytes::from(body);
        let len = body.len();
        let mut rows = Vec::new();
        while !body.is_empty() {
            if len - body.len() >= BLOCK_BYTES {
                return Err(damaged(LONG_BLOCK));
            }
            if body.len() < ROW_HEAD {
                return Err(damaged("a row is cut off"));
            }
            let key_len = usize::try_from(body.get_u32_le()).unwrap_or(usize::MAX);
            let value_len = usize::try_from(body.get_u32_le()).unwrap_or(usize::MAX);
            let expires_at = Some(body.get_u64_le()).filter(|&at| at != NEVER);
            if let Some(why) = row_too_large(key_len, value_len) {
                return Err(damaged(&why));
            }
            if key_len + value_len > body.len() {
                return Err(damaged("a row is cut off"));
            }
            let key = body.split_to(key_len);
            let value = body.split_to(value_len);
            rows.push(SnapshotRow { key, value, expires_at });
            self.rows += 1;
        }
        Ok(Some(rows))
    }
}

const LONG_BLOCK: &str = "a block is longer than any that is written";

/// A frame's verified body, of at most `max` bytes, else it is damaged as `too_long` says; `None` for the end mark.
fn read_frame(input: &mut impl Read, max: usize, too_long: &str) -> Result<Option<Vec<u8>>, StoreError> {
    let mut len = [0; 4];
    read_exact(input, &mut len)?;
    let len = usize::try_from(u32::from_le_bytes(len)).unwrap_or(usize::MAX);
    if len == 0 {
        return Ok(None);
    }
    if len > max {
        return Err(damaged(too_long));
    }
    let mut crc = [0; 8];
    read_exact(input, &mut crc)?;
    // Grows with what is there: a wrong length must not take memory.
    let mut body = Vec::new();
    let wanted = u64::try_from(len).unwrap_or(u64::MAX);
    input.by_ref().take(wanted).read_to_end(&mut body).map_err(read_failed)?;
    if body.len() != len {
        return Err(damaged("it is cut off"));
    }
    if crc64(&body) != u64::from_le_bytes(crc) {
        return Err(damaged("a checksum does not match"));
    }
    Ok(Some(body))
}

fn read_exact(input: &mut impl Read, into: &mut [u8]) -> Result<(), StoreError> {
    input.read_exact(into).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => damaged("it is cut off"),
        _ => read_failed(error),
    })
}

fn damaged(what: &str) -> StoreError {
    StoreError::Damaged(format!("snapshot file: {what}"))
}

fn read_failed(source: std::io::Error) -> StoreError {
    StoreError::io("cannot read the snapshot file", source)
}

fn write_failed(source: std::io::Error) -> StoreError {
    StoreError::io("cannot write the snapshot file", source)
}

/// What the snapshot file at `path` says about itself. Blocks.
///
/// # Errors
///
/// It cannot be read or is no snapshot file.
pub fn read_header(path: &Path) -> Result<SnapshotHeader, StoreError> {
    Ok(open(path)?.header)
}

pub(super) fn open(path: &Path) -> Result<SnapshotReader<BufReader<File>>, StoreError> {
    let file = File::open(path)
        .map_err(|source| StoreError::io(format!("cannot open {}", path.display()), source))?;
    SnapshotReader::begin(BufReader::with_capacity(BLOCK_BYTES, file))
}

#[cfg(test)]
mod tests {
    use proto::migration::entry::MAX_KEY_BYTES;

    use super::*;

    fn header() -> SnapshotHeader {
        SnapshotHeader {
            start: 0,
            end: 10,
            source: "n1".into(),
            taken_unix_ms: 7,
            handover: Handover::default(),
        }
    }

    fn file(rows: &[(&[u8], &[u8], Option<u64>)]) -> Vec<u8> {
        let mut writer = SnapshotWriter::begin(Vec::new(), &header()).unwrap();
        for (key, value, expires_at) in rows {
            writer.row(key, value, *expires_at).unwrap();
        }
        writer.finish().unwrap().0
    }

    fn read(file: &[u8]) -> Result<Vec<SnapshotRow>, StoreError> {
        let mut reader = SnapshotReader::begin(file)?;
        assert_eq!(reader.header(), &header());
        let mut rows = Vec::new();
        while let Some(block) = reader.next_block()? {
            rows.extend(block);
        }
        Ok(rows)
    }

    #[test]
    fn rows_come_back_as_they_were() {
        let large = vec![7; BLOCK_BYTES + 1];
        let rows: [(&[u8], &[u8], Option<u64>); 4] =
            [(b"", b"", None), (b"key", b"value", Some(9)), (b"large", &large, None), (b"z", b"", Some(0))];
        let back = read(&file(&rows)).unwrap();
        let back: Vec<_> = back.iter().map(|row| (&row.key[..], &row.value[..], row.expires_at)).collect();
        assert_eq!(back, rows);
        assert_eq!(read(&file(&[])).unwrap(), []);
    }

    #[test]
    fn the_largest_rows_come_back() {
        let (key, value) = (vec![b'k'; MAX_KEY_BYTES], vec![7; MAX_ROW_BYTES - MAX_KEY_BYTES]);
        // The first one leaves a byte of its block.
        let almost = vec![1; BLOCK_BYTES - ROW_HEAD - 1];
        let rows: [(&[u8], &[u8], Option<u64>); 3] =
            [(b"", &almost, None), (&key, &value, Some(1)), (&key, b"", None)];
        let back = read(&file(&rows)).unwrap();
        assert!(back.iter().zip(rows).all(|(back, row)| (&back.key[..], &back.value[..]) == (row.0, row.1)));
        assert_eq!(back.len(), rows.len());
    }

    /// A file with this block, and all else as it should be.
    fn with_block(block: &[(usize, usize)]) -> Vec<u8> {
        let mut writer = SnapshotWriter::begin(Vec::new(), &header()).unwrap();
        for &(key, value) in block {
            writer.block.put_u32_le(key.try_into().unwrap());
            writer.block.put_u32_le(value.try_into().unwrap());
            writer.block.put_u64_le(NEVER);
            writer.block.resize(writer.block.len() + key + value, b'x');
            writer.rows += 1;
        }
        writer.finish().unwrap().0
    }

    #[test]
    fn a_block_that_no_writer_writes_is_refused() {
        let refused = |block: &[(usize, usize)]| read(&with_block(block)).unwrap_err().to_string();
        let rows = BLOCK_BYTES / ROW_HEAD;
        assert_eq!(read(&with_block(&vec![(0, 0); rows])).unwrap().len(), rows);
        for block in [vec![(0, 0); rows + 1], vec![(0, BLOCK_BYTES - ROW_HEAD), (1, 0)]] {
            assert_eq!(
                refused(&block),
                "damaged data: snapshot file: a block is longer than any that is written"
            );
        }
        for (row, why) in [
            ((MAX_KEY_BYTES + 1, 0), "the key has 65537 bytes; the limit is 65536"),
            ((0, MAX_ROW_BYTES + 1), "key and value have 16777153 bytes together; the limit is 16777152"),
        ] {
            assert_eq!(refused(&[row]), format!("damaged data: snapshot file: {why}"));
        }
        // Seen by its length alone.
        let mut cut = file(&[]);
        cut.truncate(cut.len() - 28);
        cut.put_u32_le(u32::try_from(MAX_BLOCK + 1).unwrap());
        let refused = read(&cut).unwrap_err().to_string();
        assert_eq!(refused, "damaged data: snapshot file: a block is longer than any that is written");
    }

    fn begin(header: &SnapshotHeader) -> Result<SnapshotHeader, StoreError> {
        let file = SnapshotWriter::begin(Vec::new(), header)?.finish()?.0;
        Ok(SnapshotReader::begin(&file[..])?.header)
    }

    fn handed_over(claims: Vec<HandoverClaim>, nodes: usize) -> SnapshotHeader {
        let long = "h".repeat(259);
        let node = |n| (format!("{n:0>128}"), NodeAddresses { grpc: long.clone(), resp: long.clone() });
        SnapshotHeader { handover: Handover { claims, nodes: (0..nodes).map(node).collect() }, ..header() }
    }

    fn single(slot: u16) -> HandoverClaim {
        HandoverClaim { start: slot, end: slot + 1, owner: format!("{slot:0>128}"), epoch: u64::MAX }
    }

    #[test]
    fn the_largest_header_comes_back() {
        let largest = handed_over((0..SLOT_COUNT).map(single).collect(), MAX_NODES);
        assert_eq!(begin(&largest).unwrap(), largest);
        assert_eq!(largest.handover.claims().unwrap().len(), MAX_CLAIMS);
        assert_eq!(largest.handover.nodes().unwrap().len(), MAX_NODES);
    }

    #[test]
    fn a_header_that_no_node_writes_is_refused() {
        let short = |slot| HandoverClaim { owner: "n".into(), ..single(slot) };
        let twice = (0..SLOT_COUNT).flat_map(|slot| [short(slot), short(slot)]).collect();
        let wide = HandoverClaim { end: 9, ..single(0) };
        for (header, why) in [
            (SnapshotHeader { source: "n".repeat(MAX_HEADER), ..header() }, "its header is longer than any"),
            (handed_over(twice, 0), "it has 32768 claims; there are 16384 slots"),
            (handed_over(vec![], MAX_NODES + 1), "it names 1025 nodes; the limit is 1024"),
            (handed_over(vec![wide, single(8)], 0), "its claims are not in the order of their slots"),
            (handed_over(vec![single(9), single(8)], 0), "its claims are not in the order of their slots"),
        ] {
            let refused = begin(&header).unwrap_err().to_string();
            assert!(refused.starts_with(&format!("damaged data: snapshot file: {why}")), "{refused}");
        }
    }

    #[test]
    fn what_is_handed_over_stands_by_itself_among_what_is_known() {
        let claim = |range: &str, owner: &str, epoch| Claim {
            range: range.parse().unwrap(),
            owner: owner.parse().unwrap(),
            epoch,
        };
        let mut known = Ownership::default();
        known.adopt(&claim("0-9999", "n1", 1));
        known.adopt(&claim("10000-16383", "n2", 2));
        let handover = Handover::new(&known, &claim("8000-9999", "n2", 2), &BTreeMap::new());
        let expected = [claim("0-7999", "n1", 1), claim("8000-9999", "n2", 2), claim("10000-16383", "n2", 2)];
        assert_eq!(handover.claims().unwrap(), expected);
        handover.check().unwrap();
    }

    #[test]
    fn every_damage_is_seen() {
        let whole = file(&[(b"key", b"value", Some(9)), (b"other", b"value", None)]);
        for len in 0..whole.len() {
            assert!(read(&whole[..len]).is_err(), "cut at {len}");
        }
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 0x10;
            assert!(read(&flipped).is_err(), "byte {at} changed");
        }
    }
}

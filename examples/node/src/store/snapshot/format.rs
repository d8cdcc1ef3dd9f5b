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

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::Path;

use bytes::{Buf as _, BufMut as _, Bytes};
use proto::common::checksum::{Crc64Hasher, crc64};
use serde::{Deserialize, Serialize};

use crate::common::{NodeId, SlotRange};
use crate::store::{Claim, NodeAddresses, StoreError};

const MAGIC: &[u8; 8] = b"NODESNP\x01";
const NEVER: u64 = u64::MAX;
const ROW_HEAD: usize = 16;
/// A block is written when it has reached this size; one row may make it larger.
const BLOCK_BYTES: usize = 256 << 10;
/// The largest body that is read: the largest row that the node takes, with room for its block.
const MAX_BODY: usize = 1 << 30;

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
    /// From what a node knows.
    #[must_use]
    pub fn new<'a>(
        claims: impl IntoIterator<Item = &'a Claim>,
        nodes: &BTreeMap<NodeId, NodeAddresses>,
    ) -> Self {
        let claims = claims.into_iter().map(|claim| HandoverClaim {
            start: claim.range.start(),
            end: claim.range.end(),
            owner: claim.owner.to_string(),
            epoch: claim.epoch,
        });
        Self {
            claims: claims.collect(),
            nodes: nodes.iter().map(|(id, addresses)| (id.to_string(), addresses.clone())).collect(),
        }
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
        let body = read_frame(&mut input)?.ok_or_else(|| damaged("it has no header"))?;
        let header = serde_json::from_slice(&body).map_err(|error| damaged(&error.to_string()))?;
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
        let Some(body) = read_frame(&mut self.input)? else {
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
        let mut rows = Vec::new();
        while !body.is_empty() {
            if body.len() < ROW_HEAD {
                return Err(damaged("a row is cut off"));
            }
            let key_len = usize::try_from(body.get_u32_le()).unwrap_or(usize::MAX);
            let value_len = usize::try_from(body.get_u32_le()).unwrap_or(usize::MAX);
            let expires_at = Some(body.get_u64_le()).filter(|&at| at != NEVER);
            if key_len.checked_add(value_len).is_none_or(|len| len > body.len()) {
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

/// A frame's verified body; `None` for the end mark.
fn read_frame(input: &mut impl Read) -> Result<Option<Vec<u8>>, StoreError> {
    let mut len = [0; 4];
    read_exact(input, &mut len)?;
    let len = usize::try_from(u32::from_le_bytes(len)).unwrap_or(usize::MAX);
    if len == 0 {
        return Ok(None);
    }
    if len > MAX_BODY {
        return Err(damaged("a frame is longer than any that is written"));
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

//! The store's small files: Protobuf messages behind a header with length and checksum, replaced atomically.
//!
//! `[magic: 8][kind: u32][length: u64][crc: u64][message]`, little-endian; `crc` is CRC-64/NVME of kind, length and message. Whatever
//! does not match in full is damaged: nothing of it is used.

use std::io::{self, Read as _};
use std::path::Path;

use bytes::Bytes;
use prost::{Message, encoding};
use proto_common::checksum::Crc64Hasher;
use proto_common::durable::write_atomic;
use proto_common::fence::Fence;
use proto_common::ids::{NodeId, ShardId, TransferId};

use crate::extent::{Extent, ExtentRecord};
use crate::spec::{FileTotal, Manifest, ManifestFile, SnapshotPoint, TransferPlan, TransferSpec};
use crate::store::{Claim, ShardState, StoreError};
use crate::v1::transfer_split_snapshot_request as request;

use super::layout::Layout;
use super::write::open_file;

const MAGIC: [u8; 8] = *b"NODESNP1";
const HEADER_LEN: usize = 28;

/// What the total of a file takes, if neither its number nor its size is large.
const TOTAL_ROOM: usize = 20;

/// Longest message, in bytes: four times the largest manifest that a receiver takes by default. More can only be damage.
const MAX_LEN: u64 = 512 << 20;

/// What a file holds, so that one is never taken for another.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Meta = 1,
    Claim = 2,
    Sealed = 3,
    Shard = 4,
    Manifest = 5,
}

/// `meta`, and with totals `<transfer_id>.manifest`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct PlanRecord {
    #[prost(message, optional, tag = "1")]
    header: Option<request::Header>,
    #[prost(message, repeated, tag = "2")]
    files: Vec<request::File>,
    #[prost(message, repeated, tag = "3")]
    totals: Vec<request::FileTotal>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ClaimRecord {
    #[prost(uint64, tag = "1")]
    attempt: u64,
    #[prost(bytes = "vec", tag = "2")]
    session: Vec<u8>,
    /// So that the file of another staging area is found out.
    #[prost(string, tag = "3")]
    transfer_id: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SealedRecord {
    #[prost(message, repeated, tag = "1")]
    totals: Vec<request::FileTotal>,
    /// As in a claim.
    #[prost(string, tag = "2")]
    transfer_id: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ShardRecord {
    /// The shard's ID, so that a file that was copied to another place is found out.
    #[prost(string, tag = "1")]
    shard_id: String,
    #[prost(uint64, tag = "2")]
    epoch: u64,
    #[prost(uint64, tag = "3")]
    term: u64,
    #[prost(message, optional, tag = "4")]
    high_water: Option<PointRecord>,
    #[prost(string, optional, tag = "5")]
    current: Option<String>,
    #[prost(string, repeated, tag = "6")]
    previous: Vec<String>,
    #[prost(string, repeated, tag = "7")]
    superseded: Vec<String>,
    /// The node whose transfer named the shard first, until something is installed.
    #[prost(string, optional, tag = "8")]
    named_by: Option<String>,
    /// The node whose snapshot was the first that was installed.
    #[prost(string, optional, tag = "9")]
    installed_by: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct PointRecord {
    #[prost(uint64, tag = "1")]
    term: u64,
    #[prost(uint64, tag = "2")]
    index: u64,
}

/// All that is kept of a shard.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Shard {
    pub(super) state: ShardState,
    /// Current ones of before that are kept, the latest first.
    pub(super) previous: Vec<TransferId>,
    /// The node whose transfer named it first, until something is installed.
    pub(super) named_by: Option<NodeId>,
    /// The node whose snapshot was the first that was installed.
    pub(super) installed_by: Option<NodeId>,
}

/// Replaces the file at `path`, durably.
pub(super) fn write<M: Message>(path: &Path, kind: Kind, message: &M) -> io::Result<()> {
    let mut content = vec![0; HEADER_LEN];
    message.encode(&mut content).map_err(io::Error::other)?;
    write_encoded(path, kind, content)
}

/// `content` is a message behind room for the header.
fn write_encoded(path: &Path, kind: Kind, mut content: Vec<u8>) -> io::Result<()> {
    let (head, body) = content.split_at_mut(HEADER_LEN);
    let len = u64::try_from(body.len()).map_err(io::Error::other)?;
    head.copy_from_slice(&header(kind, len, body));
    write_atomic(path, &content)
}

/// Writes a [`PlanRecord`], file by file: as a message it would be in memory several times over.
pub(super) fn write_plan(
    path: &Path,
    kind: Kind,
    plan: &TransferPlan,
    totals: &[FileTotal],
) -> io::Result<()> {
    // What grows step by step is copied at each; most files have no digest.
    let room =
        plan.manifest.name_bytes() + 16 * plan.manifest.file_count() + (TOTAL_ROOM * totals.len()) as u64;
    let mut content = Vec::with_capacity(usize::try_from(room).unwrap_or(0));
    content.resize(HEADER_LEN, 0);
    encoding::message::encode(1, &PlanRecord::header(&plan.spec), &mut content);
    // One name after the other in the same memory.
    let mut wire = request::File::default();
    for ManifestFile { name, size, blake3 } in plan.manifest.files() {
        name.as_str().clone_into(&mut wire.name);
        wire.size = *size;
        wire.blake3 = blake3.as_ref().map(|digest| Bytes::copy_from_slice(&digest[..]));
        encoding::message::encode(2, &wire, &mut content);
    }
    for total in to_wire(totals) {
        encoding::message::encode(3, &total, &mut content);
    }
    write_encoded(path, kind, content)
}

/// Writes a [`SealedRecord`].
pub(super) fn write_totals(path: &Path, id: &TransferId, totals: &[FileTotal]) -> io::Result<()> {
    let id = id.to_string();
    let mut content = Vec::with_capacity(HEADER_LEN + TOTAL_ROOM + id.len() + totals.len() * TOTAL_ROOM);
    content.resize(HEADER_LEN, 0);
    for total in to_wire(totals) {
        encoding::message::encode(1, &total, &mut content);
    }
    encoding::string::encode(2, &id, &mut content);
    write_encoded(path, Kind::Sealed, content)
}

fn header(kind: Kind, len: u64, body: &[u8]) -> [u8; HEADER_LEN] {
    let kind = u32::from(kind as u8).to_le_bytes();
    let len = len.to_le_bytes();
    let mut hasher = Crc64Hasher::new();
    hasher.update(&kind);
    hasher.update(&len);
    hasher.update(body);
    let mut header = [0; HEADER_LEN];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&kind);
    header[12..20].copy_from_slice(&len);
    header[20..].copy_from_slice(&hasher.finish().to_le_bytes());
    header
}

/// Reads the file at `path`; `None` if there is none.
///
/// # Errors
///
/// [`StoreError::Damaged`] unless every bit of it is as written.
pub(super) fn read<M: Message + Default>(
    layout: &Layout,
    path: &Path,
    kind: Kind,
) -> Result<Option<M>, StoreError> {
    let mut file = match open_file(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StoreError::io("open a record", error)),
    };
    let damaged = |what: &str| StoreError::Damaged { file: layout.shown(path), what: what.to_owned() };
    let len = file.metadata().map_err(|error| StoreError::io("read a record", error))?.len();
    if len > MAX_LEN {
        return Err(damaged("is too long"));
    }
    let mut content = Vec::new();
    file.read_to_end(&mut content).map_err(|error| StoreError::io("read a record", error))?;
    let Some((head, body)) = content.split_at_checked(HEADER_LEN) else {
        return Err(damaged("is cut short"));
    };
    let len = u64::try_from(body.len()).unwrap_or(u64::MAX);
    if head != header(kind, len, body) {
        return Err(damaged("does not match its checksum"));
    }
    M::decode(body).map(Some).map_err(|_| damaged("is not a message of this version"))
}

impl PlanRecord {
    fn header(spec: &TransferSpec) -> request::Header {
        let TransferSpec {
            transfer_id,
            source_shard,
            target_shard,
            source_node,
            slots,
            point,
            content_version,
        } = spec;
        request::Header {
            transfer_id: transfer_id.to_string(),
            source_shard_id: source_shard.to_string(),
            target_shard_id: target_shard.to_string(),
            source_node_id: source_node.to_string(),
            slots: Some((*slots).into()),
            snapshot_index: point.index,
            snapshot_term: point.term,
            content_version: content_version.clone(),
            ..request::Header::default()
        }
    }

    /// `None` if it does not hold what this version would have written.
    pub(super) fn decode_plan(self) -> Option<(TransferPlan, Vec<FileTotal>)> {
        let spec = TransferSpec::from_header(&self.header?).ok()?;
        let files = self.files.into_iter().map(ManifestFile::try_from).collect::<Result<Vec<_>, _>>().ok()?;
        let manifest = Manifest::new(files).ok()?;
        Some((TransferPlan { spec, manifest }, from_wire(&self.totals)))
    }
}

impl SealedRecord {
    /// `None` if they are of another transfer than `id`.
    pub(super) fn totals(&self, id: &TransferId) -> Option<Vec<FileTotal>> {
        (self.transfer_id == id.as_str()).then(|| from_wire(&self.totals))
    }
}

fn to_wire(totals: &[FileTotal]) -> impl Iterator<Item = request::FileTotal> + '_ {
    (0_u32..).zip(totals).map(|(file, &FileTotal { size, crc })| request::FileTotal {
        file,
        size,
        crc64nvme: crc,
    })
}

fn from_wire(totals: &[request::FileTotal]) -> Vec<FileTotal> {
    totals.iter().map(|total| FileTotal { size: total.size, crc: total.crc64nvme }).collect()
}

impl ClaimRecord {
    pub(super) fn new(id: &TransferId, Claim { attempt, session }: Claim) -> Self {
        Self { attempt, session: session.to_vec(), transfer_id: id.to_string() }
    }

    /// `None` if it is of another transfer than `id`, or not what this version would have written.
    pub(super) fn claim(&self, id: &TransferId) -> Option<Claim> {
        if self.transfer_id != id.as_str() {
            return None;
        }
        Some(Claim { attempt: self.attempt, session: self.session.as_slice().try_into().ok()? })
    }
}

impl ShardRecord {
    pub(super) fn new(shard_id: &str, shard: &Shard) -> Self {
        let Shard {
            state: ShardState { fence, high_water, current, superseded },
            previous,
            named_by,
            installed_by,
        } = shard;
        Self {
            shard_id: shard_id.to_owned(),
            epoch: fence.epoch,
            term: fence.term,
            high_water: high_water.map(|SnapshotPoint { term, index }| PointRecord { term, index }),
            current: current.as_ref().map(ToString::to_string),
            previous: previous.iter().map(ToString::to_string).collect(),
            superseded: superseded.iter().map(ToString::to_string).collect(),
            named_by: named_by.as_ref().map(ToString::to_string),
            installed_by: installed_by.as_ref().map(ToString::to_string),
        }
    }

    /// The shard that it is of.
    pub(super) fn shard_id(&self) -> Option<ShardId> {
        ShardId::new(&self.shard_id).ok()
    }

    pub(super) fn shard(self, shard_id: &str) -> Option<Shard> {
        if self.shard_id != shard_id {
            return None;
        }
        let current = self.current.map(TransferId::try_from).transpose().ok()?;
        let ids = |ids: Vec<String>| ids.into_iter().map(TransferId::try_from).collect::<Result<_, _>>().ok();
        let (previous, superseded) = (ids(self.previous)?, ids(self.superseded)?);
        let named_by = self.named_by.map(NodeId::try_from).transpose().ok()?;
        let installed_by = self.installed_by.map(NodeId::try_from).transpose().ok()?;
        let fence = Fence { epoch: self.epoch, term: self.term };
        let high_water = self.high_water.map(|PointRecord { term, index }| SnapshotPoint { term, index });
        let state = ShardState { fence, high_water, current, superseded };
        Some(Shard { state, previous, named_by, installed_by })
    }
}

/// Bytes of one extent in the record log: file, offset, length, checksum; little-endian.
const EXTENT_LEN: usize = 28;

/// Most extents in one record of the log, of 28 bytes each: what a damaged record costs is sent again, and one holds less than what is synced at once. With 256, files
/// of 1 GiB and of 4 KiB took as long.
const EXTENTS_PER_RECORD: usize = 4096;

/// The records of the log that hold `extents`.
pub(super) fn encode_extents(extents: &[ExtentRecord]) -> impl Iterator<Item = Vec<u8>> + '_ {
    extents.chunks(EXTENTS_PER_RECORD).map(|extents| {
        let mut bytes = Vec::with_capacity(extents.len() * EXTENT_LEN);
        for ExtentRecord { extent: Extent { file, offset, len }, crc } in extents {
            bytes.extend_from_slice(&file.to_le_bytes());
            bytes.extend_from_slice(&offset.to_le_bytes());
            bytes.extend_from_slice(&len.to_le_bytes());
            bytes.extend_from_slice(&crc.to_le_bytes());
        }
        bytes
    })
}

/// The extents of one record; `None` if it is not a list of them.
pub(super) fn decode_extents(mut record: &[u8]) -> Option<Vec<ExtentRecord>> {
    let mut extents = Vec::with_capacity(record.len() / EXTENT_LEN);
    while !record.is_empty() {
        let file = u32::from_le_bytes(take(&mut record)?);
        let offset = u64::from_le_bytes(take(&mut record)?);
        let len = u64::from_le_bytes(take(&mut record)?);
        let crc = u64::from_le_bytes(take(&mut record)?);
        extents.push(ExtentRecord { extent: Extent { file, offset, len }, crc });
    }
    Some(extents)
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*first)
}

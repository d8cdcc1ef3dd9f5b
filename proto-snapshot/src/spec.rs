//! What a transfer moves: the validated forms of `Header` and `Manifest`.
//!
//! The receiver converts on receipt with [`TransferSpec::from_header`] and the `TryFrom` of each file; from
//! there on nothing handles a name, an ID or a range that was not checked.

use std::sync::Arc;

use bytes::Bytes;
use proto_common::error::Error;
use proto_common::ids::{NodeId, ShardId, TransferId};
use proto_common::path::FileName;
use proto_common::slots::SlotRange;

use crate::reason::Reason;
use crate::v1;
use crate::v1::transfer_split_snapshot_request as request;

/// Largest `content_version`, in bytes.
pub const MAX_CONTENT_VERSION: usize = 1024;

/// Where in the Raft log a snapshot was taken. Ordered by term, then index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct SnapshotPoint {
    /// Raft term.
    pub term: u64,
    /// Raft log index.
    pub index: u64,
}

/// What is transferred, from where to where: the part of the header by which the receiver tells
/// whether two calls mean the same transfer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransferSpec {
    /// The key of everything that is known about the transfer.
    pub transfer_id: TransferId,
    /// The shard that is split.
    pub source_shard: ShardId,
    /// The shard that the snapshot becomes.
    pub target_shard: ShardId,
    /// The node that sends.
    pub source_node: NodeId,
    /// The slots that move.
    pub slots: SlotRange,
    /// Where in the Raft log the snapshot was taken.
    pub point: SnapshotPoint,
    /// What makes two reads of the source the same bytes; at most [`MAX_CONTENT_VERSION`] bytes.
    pub content_version: String,
}

/// One file of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestFile {
    /// Relative name, checked.
    pub name: FileName,
    /// In bytes; `None` if it is generated on the fly.
    pub size: Option<u64>,
    /// BLAKE3 of the content, if known.
    pub blake3: Option<[u8; 32]>,
}

/// The files of a snapshot, in order; cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    files: Arc<[ManifestFile]>,
    total: Option<u64>,
}

/// A transfer's specification together with its manifest: what a store needs to stage it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransferPlan {
    /// What is transferred.
    pub spec: TransferSpec,
    /// Its files.
    pub manifest: Manifest,
}

/// Size and checksum of a whole file, from `End`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileTotal {
    /// In bytes.
    pub size: u64,
    /// CRC-64/NVME.
    pub crc: u64,
}

impl TransferSpec {
    /// Checks every field of the specification in `header`.
    ///
    /// # Errors
    ///
    /// `INVALID_FIELD` or `INVALID_SLOT_RANGE`, with the path of the field.
    pub fn from_header(header: &request::Header) -> Result<Self, Error> {
        let slots =
            header.slots.ok_or_else(|| Reason::InvalidSlotRange.field("header.slots", "must be set"))?;
        if header.content_version.len() > MAX_CONTENT_VERSION {
            return Err(Reason::InvalidField.field(
                "header.content_version",
                format!(
                    "has {} bytes, at most {MAX_CONTENT_VERSION} are allowed",
                    header.content_version.len()
                ),
            ));
        }
        Ok(Self {
            transfer_id: id("header.transfer_id", &header.transfer_id, |text| TransferId::new(text))?,
            source_shard: id("header.source_shard_id", &header.source_shard_id, |text| ShardId::new(text))?,
            target_shard: id("header.target_shard_id", &header.target_shard_id, |text| ShardId::new(text))?,
            source_node: id("header.source_node_id", &header.source_node_id, |text| NodeId::new(text))?,
            slots: SlotRange::try_from(slots)
                .map_err(|error| Reason::InvalidSlotRange.field("header.slots", error.to_string()))?,
            point: SnapshotPoint { term: header.snapshot_term, index: header.snapshot_index },
            content_version: header.content_version.clone(),
        })
    }

    /// The name of the first field in which `other` differs, as in `Header`.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Option<&'static str> {
        let Self { transfer_id, source_shard, target_shard, source_node, slots, point, content_version } =
            self;
        if *transfer_id != other.transfer_id {
            Some("transfer_id")
        } else if *source_shard != other.source_shard {
            Some("source_shard_id")
        } else if *target_shard != other.target_shard {
            Some("target_shard_id")
        } else if *source_node != other.source_node {
            Some("source_node_id")
        } else if *slots != other.slots {
            Some("slots")
        } else if point.index != other.point.index {
            Some("snapshot_index")
        } else if point.term != other.point.term {
            Some("snapshot_term")
        } else if *content_version != other.content_version {
            Some("content_version")
        } else {
            None
        }
    }
}

/// Reads an ID out of the field `path`.
pub(crate) fn id<T, E: std::fmt::Display>(
    path: &str,
    value: &str,
    parse: impl FnOnce(&str) -> Result<T, E>,
) -> Result<T, Error> {
    parse(value).map_err(|error| Reason::InvalidField.field(path, error.to_string()))
}

impl Manifest {
    /// A manifest of `files`.
    ///
    /// # Errors
    ///
    /// `CONFLICTING_FILE_NAMES` when two files have one name or a name is also a directory of
    /// another; `SNAPSHOT_TOO_LARGE` when a size or the sum is beyond 2^63 - 1.
    pub fn new(files: Vec<ManifestFile>) -> Result<Self, Error> {
        proto_common::path::check_tree(files.iter().map(|file| &file.name))
            .map_err(|error| Reason::ConflictingFileNames.field("manifest.files.name", error.to_string()))?;
        let mut total = Some(0_u64);
        for file in &files {
            if let Some(size) = file.size {
                total = match total {
                    Some(sum) => Some(
                        sum.checked_add(size).filter(|sum| i64::try_from(*sum).is_ok()).ok_or_else(|| {
                            Reason::SnapshotTooLarge.field(
                                "manifest.files.size",
                                format!("{} makes it larger than 2^63 - 1 bytes", file.name),
                            )
                        })?,
                    ),
                    None => None,
                };
            } else {
                total = None;
            }
        }
        Ok(Self { files: files.into(), total })
    }

    /// The files, in order.
    #[must_use]
    pub fn files(&self) -> &[ManifestFile] {
        &self.files
    }

    /// File number `file`.
    #[must_use]
    pub fn get(&self, file: u32) -> Option<&ManifestFile> {
        self.files.get(usize::try_from(file).ok()?)
    }

    /// The files with their numbers.
    pub fn numbered(&self) -> impl Iterator<Item = (u32, &ManifestFile)> {
        (0_u32..).zip(self.files.iter())
    }

    /// Sum of the sizes; `None` if one is unknown.
    #[must_use]
    pub fn total_bytes(&self) -> Option<u64> {
        self.total
    }

    /// Number of files.
    #[must_use]
    pub fn file_count(&self) -> u64 {
        self.files.len() as u64
    }

    /// Sum of the lengths of all names, in bytes.
    #[must_use]
    pub fn name_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.name.as_str().len() as u64).sum()
    }

    /// What differs from `other` first: a count, a name or a size. Digests are compared where both
    /// have one.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Option<String> {
        if self.files.len() != other.files.len() {
            return Some(format!("file_count: {} and {}", self.files.len(), other.files.len()));
        }
        self.files.iter().zip(other.files.iter()).find_map(|(a, b)| {
            if a.name != b.name {
                Some(format!("name: {} and {}", a.name, b.name))
            } else if a.size != b.size {
                Some(format!("size of {}", a.name))
            } else if a.blake3.is_some() && b.blake3.is_some() && a.blake3 != b.blake3 {
                Some(format!("blake3 of {}", a.name))
            } else {
                None
            }
        })
    }
}

impl From<&ManifestFile> for request::File {
    fn from(file: &ManifestFile) -> Self {
        let ManifestFile { name, size, blake3 } = file;
        Self {
            name: name.as_str().to_owned(),
            size: *size,
            blake3: blake3.as_ref().map(|digest| Bytes::copy_from_slice(digest)),
        }
    }
}

impl TryFrom<request::File> for ManifestFile {
    type Error = Error;

    fn try_from(file: request::File) -> Result<Self, Error> {
        let request::File { name, size, blake3 } = file;
        let name = FileName::new(&name)
            .map_err(|error| Reason::InvalidFileName.field("manifest.files.name", error.to_string()))?;
        if let Some(size) = size
            && i64::try_from(size).is_err()
        {
            return Err(Reason::SnapshotTooLarge.field(
                "manifest.files.size",
                format!("{name} has {size} bytes, at most 2^63 - 1 are possible"),
            ));
        }
        let blake3 = match blake3 {
            None => None,
            Some(digest) => Some(<[u8; 32]>::try_from(digest.as_ref()).map_err(|_| {
                Reason::InvalidField
                    .field("manifest.files.blake3", format!("has {} bytes, a digest has 32", digest.len()))
            })?),
        };
        Ok(Self { name, size, blake3 })
    }
}

impl From<SnapshotPoint> for (u64, u64) {
    fn from(point: SnapshotPoint) -> Self {
        (point.term, point.index)
    }
}

/// The part of a transfer's progress that never changes.
impl From<&TransferSpec> for v1::TransferProgress {
    fn from(spec: &TransferSpec) -> Self {
        let TransferSpec {
            transfer_id,
            source_shard,
            target_shard,
            source_node,
            slots,
            point,
            content_version: _,
        } = spec;
        Self {
            transfer_id: transfer_id.to_string(),
            source_shard_id: source_shard.to_string(),
            target_shard_id: target_shard.to_string(),
            source_node_id: source_node.to_string(),
            slots: Some((*slots).into()),
            snapshot_index: point.index,
            snapshot_term: point.term,
            ..Self::default()
        }
    }
}

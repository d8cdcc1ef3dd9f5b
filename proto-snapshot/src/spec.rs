//! What a transfer moves: the validated forms of `Header` and `Manifest`.
//!
//! The receiver converts on receipt with [`TransferSpec::from_header`] and the `TryFrom` of each file; from
//! there on nothing handles a name, an ID or a range that was not checked.

use std::sync::Arc;

use bytes::Bytes;
use proto_common::error::Error;
use proto_common::ids::{NodeId, ShardId, TransferId};
use proto_common::path::{Directories, FileName};
use proto_common::slots::SlotRange;

use crate::reason::Reason;
use crate::v1;
use crate::v1::transfer_split_snapshot_request as request;

/// Largest `content_version`, in bytes.
pub const MAX_CONTENT_VERSION: usize = 1024;

/// Features that this version has, at either end.
#[cfg(any(feature = "client", feature = "server"))]
pub(crate) const FEATURES: [&str; 5] = ["lanes", "reuse", "unknown-size", "crc64nvme", FILE_RUNS];

/// The sender understands [`Extent::more_files`](v1::transfer_split_snapshot_response::Extent::more_files).
#[cfg(any(feature = "client", feature = "server"))]
pub(crate) const FILE_RUNS: &str = "file-runs";

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
    /// BLAKE3 of the content, if known; in a box, because there may be very many files, most of them without.
    pub blake3: Option<Box<[u8; 32]>>,
}

/// The files of a snapshot, in order; cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Not a slice: that would be a second list while it is made, and there may be many files.
    files: Arc<Vec<ManifestFile>>,
    total: Option<u64>,
    directories: Directories,
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
    /// `INVALID_ID`, `INVALID_FIELD` or `INVALID_SLOT_RANGE`, with the path of the field.
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
    parse(value).map_err(|error| Reason::InvalidId.field(path, error.to_string()))
}

impl Manifest {
    /// A manifest of `files`.
    ///
    /// # Errors
    ///
    /// `CONFLICTING_FILE_NAMES` when two files have one name or a name is also a directory of
    /// another; `SNAPSHOT_TOO_LARGE` when a size or the sum is beyond 2^63 - 1.
    pub fn new(mut files: Vec<ManifestFile>) -> Result<Self, Error> {
        let directories = proto_common::path::check_tree(files.iter().map(|file| &file.name))
            .map_err(|error| Reason::ConflictingFileNames.field("manifest.files.name", error.to_string()))?;
        let mut known = 0_u64;
        for (number, file) in files.iter().enumerate() {
            let sum = known.checked_add(file.size.unwrap_or(0)).filter(|sum| i64::try_from(*sum).is_ok());
            known = sum.ok_or_else(|| {
                Reason::SnapshotTooLarge.field(
                    &format!("manifest.files[{number}].size"),
                    format!("{} makes the snapshot larger than 2^63 - 1 bytes", file.name),
                )
            })?;
        }
        let total = files.iter().all(|file| file.size.is_some()).then_some(known);
        files.shrink_to_fit();
        Ok(Self { files: Arc::new(files), total, directories })
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

    /// The directories that the files lie in, below that of the snapshot.
    #[must_use]
    pub fn directories(&self) -> Directories {
        self.directories
    }

    /// What differs from `other` first: a count, a name or a size. Digests are compared where both
    /// have one.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Option<String> {
        if self.files.len() != other.files.len() {
            return Some(format!("file_count: {} and {}", self.files.len(), other.files.len()));
        }
        self.files.iter().zip(other.files.iter()).find_map(|(a, b)| a.difference(b))
    }
}

impl ManifestFile {
    /// What differs from `other` first: name or size. Digests are compared where both have one.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Option<String> {
        if self.name != other.name {
            Some(format!("name: {} and {}", self.name, other.name))
        } else if self.size != other.size {
            Some(format!("size of {}", self.name))
        } else if self.blake3.is_some() && other.blake3.is_some() && self.blake3 != other.blake3 {
            Some(format!("blake3 of {}", self.name))
        } else {
            None
        }
    }
}

impl From<&ManifestFile> for request::File {
    fn from(file: &ManifestFile) -> Self {
        let ManifestFile { name, size, blake3 } = file;
        Self {
            name: name.as_str().to_owned(),
            size: *size,
            blake3: blake3.as_ref().map(|digest| Bytes::copy_from_slice(&digest[..])),
        }
    }
}

impl TryFrom<request::File> for ManifestFile {
    type Error = Error;

    fn try_from(file: request::File) -> Result<Self, Error> {
        Self::check(file, || "file".to_owned())
    }
}

impl ManifestFile {
    /// Checks a file that came in the field `path`, which is asked for where something is wrong: there may be very many files.
    pub(crate) fn check(file: request::File, path: impl Fn() -> String) -> Result<Self, Error> {
        let request::File { name, size, blake3 } = file;
        let name = FileName::new(&name)
            .map_err(|error| Reason::InvalidFileName.field(&format!("{}.name", path()), error.to_string()))?;
        if let Some(size) = size
            && i64::try_from(size).is_err()
        {
            return Err(Reason::SnapshotTooLarge.field(
                &format!("{}.size", path()),
                format!("{name} has {size} bytes, at most 2^63 - 1 are possible"),
            ));
        }
        let blake3 = match blake3 {
            None => None,
            Some(digest) => Some(<[u8; 32]>::try_from(digest.as_ref()).map(Box::new).map_err(|_| {
                Reason::InvalidField.field(
                    &format!("{}.blake3", path()),
                    format!("has {} bytes, a digest has 32", digest.len()),
                )
            })?),
        };
        Ok(Self { name, size, blake3 })
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

#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the numbers of test data are small"
)]
pub(crate) mod tests {
    use super::*;

    /// Files of these sizes, in order.
    #[cfg(any(feature = "client", feature = "server"))]
    pub(crate) fn manifest(sizes: &[Option<u64>]) -> Manifest {
        let name = |number| format!("f{number}");
        Manifest::new(sizes.iter().enumerate().map(|(number, size)| file(&name(number), *size)).collect())
            .unwrap()
    }

    fn header() -> request::Header {
        request::Header {
            transfer_id: "t1".to_owned(),
            source_shard_id: "s0".to_owned(),
            target_shard_id: "s1".to_owned(),
            source_node_id: "n1".to_owned(),
            slots: Some(proto_common::v1::SlotRange { start: 8192, end: 16384 }),
            snapshot_index: 7,
            snapshot_term: 3,
            content_version: "v".to_owned(),
            ..request::Header::default()
        }
    }

    fn file(name: &str, size: Option<u64>) -> ManifestFile {
        ManifestFile { name: FileName::new(name).unwrap(), size, blake3: None }
    }

    /// Reason and first field of an error.
    fn blamed(error: &Error) -> (&str, &str) {
        (error.reason(), error.violations().first().map_or("", |violation| violation.field.as_str()))
    }

    #[test]
    fn a_valid_header_is_taken_over_as_it_is() {
        let spec = TransferSpec::from_header(&header()).unwrap();
        assert_eq!(spec.target_shard.as_str(), "s1");
        assert_eq!(spec.point, SnapshotPoint { term: 3, index: 7 });
        assert_eq!(spec.difference(&spec.clone()), None);
        let shown = v1::TransferProgress::from(&spec);
        assert_eq!((shown.snapshot_index, shown.snapshot_term), (7, 3));
        assert_eq!(shown.slots, header().slots);
        assert_eq!((shown.source_shard_id.as_str(), shown.target_shard_id.as_str()), ("s0", "s1"));
    }

    #[test]
    fn every_field_of_the_header_is_checked_and_named() {
        type Spoil = fn(&mut request::Header);
        let cases: [(&str, &str, Spoil); 8] = [
            ("INVALID_ID", "header.transfer_id", |h| h.transfer_id = "../x".to_owned()),
            ("INVALID_ID", "header.source_shard_id", |h| h.source_shard_id.clear()),
            ("INVALID_ID", "header.target_shard_id", |h| h.target_shard_id = ".hidden".to_owned()),
            ("INVALID_ID", "header.source_node_id", |h| h.source_node_id = "x".repeat(129)),
            ("INVALID_FIELD", "header.content_version", |h| h.content_version = "x".repeat(1025)),
            ("INVALID_SLOT_RANGE", "header.slots", |h| h.slots = None),
            ("INVALID_SLOT_RANGE", "header.slots", |h| h.slots.as_mut().unwrap().end = 16385),
            ("INVALID_SLOT_RANGE", "header.slots", |h| h.slots.as_mut().unwrap().end = 8192),
        ];
        for (reason, field, spoil) in cases {
            let mut header = header();
            spoil(&mut header);
            let error = TransferSpec::from_header(&header).unwrap_err();
            assert_eq!(blamed(&error), (reason, field), "{error}");
        }
        let longest = request::Header { content_version: "x".repeat(MAX_CONTENT_VERSION), ..header() };
        TransferSpec::from_header(&longest).unwrap();
    }

    #[test]
    fn a_specification_is_all_of_its_fields_and_no_others() {
        type Change = fn(&mut request::Header);
        let spec = TransferSpec::from_header(&header()).unwrap();
        let cases: [(&str, Change); 8] = [
            ("transfer_id", |h| h.transfer_id.push('x')),
            ("source_shard_id", |h| h.source_shard_id.push('x')),
            ("target_shard_id", |h| h.target_shard_id.push('x')),
            ("source_node_id", |h| h.source_node_id.push('x')),
            ("slots", |h| h.slots.as_mut().unwrap().start = 8193),
            ("snapshot_index", |h| h.snapshot_index += 1),
            ("snapshot_term", |h| h.snapshot_term += 1),
            ("content_version", |h| h.content_version.push('x')),
        ];
        for (field, change) in cases {
            let mut header = header();
            change(&mut header);
            assert_eq!(spec.difference(&TransferSpec::from_header(&header).unwrap()), Some(field));
        }
        let same = request::Header {
            attempt: 9,
            session: vec![1; 16].into(),
            generation: 4,
            lanes: 8,
            priority: 1,
            discard_staged: true,
            fence: Some(proto_common::v1::Fence { epoch: 1, term: 2 }),
            supported_features: vec!["lanes".to_owned()],
            ..header()
        };
        assert_eq!(spec.difference(&TransferSpec::from_header(&same).unwrap()), None);
    }

    #[test]
    fn points_are_ordered_by_term_first() {
        let point = |term, index| SnapshotPoint { term, index };
        assert!(point(2, 1) > point(1, 9) && point(2, 2) > point(2, 1));
    }

    #[test]
    fn a_manifest_counts_what_it_holds() {
        let manifest = Manifest::new(vec![file("a/b", Some(3)), file("c", Some(0))]).unwrap();
        assert_eq!((manifest.total_bytes(), manifest.file_count(), manifest.name_bytes()), (Some(3), 2, 4));
        assert_eq!(manifest.directories(), Directories { count: 1, name_bytes: 1 });
        assert_eq!(manifest.get(1).unwrap().name.as_str(), "c");
        assert!(manifest.get(2).is_none());
        assert_eq!(manifest.numbered().map(|(number, _)| number).collect::<Vec<_>>(), [0, 1]);
        let unknown = Manifest::new(vec![file("a", Some(3)), file("b", None), file("c", Some(4))]).unwrap();
        assert_eq!(unknown.total_bytes(), None);
        assert_eq!(Manifest::new(Vec::new()).unwrap().total_bytes(), Some(0));
    }

    #[test]
    fn names_that_exclude_each_other_are_refused() {
        for names in [["a", "a"], ["a", "a/b"], ["a/b/c", "a/b"]] {
            let error = Manifest::new(names.map(|name| file(name, Some(1))).to_vec()).unwrap_err();
            assert_eq!(blamed(&error), ("CONFLICTING_FILE_NAMES", "manifest.files.name"), "{names:?}");
        }
    }

    #[test]
    fn sizes_end_at_two_to_the_63() {
        let most = i64::MAX as u64;
        Manifest::new(vec![file("a", Some(most)), file("b", Some(0))]).unwrap();
        for sizes in [[most, 1], [u64::MAX, 0], [u64::MAX, u64::MAX]] {
            let files = vec![file("a", Some(sizes[0])), file("b", Some(sizes[1]))];
            assert_eq!(blamed(&Manifest::new(files).unwrap_err()).0, "SNAPSHOT_TOO_LARGE", "{sizes:?}");
        }
        let wire = request::File { name: "a".to_owned(), size: Some(most + 1), blake3: None };
        assert_eq!(blamed(&ManifestFile::try_from(wire).unwrap_err()).0, "SNAPSHOT_TOO_LARGE");
    }

    #[test]
    fn a_file_survives_the_wire() {
        let known = ManifestFile { blake3: Some(Box::new([7; 32])), ..file("caf\u{e9}/x", Some(5)) };
        for file in [known, file("a", None)] {
            assert_eq!(ManifestFile::try_from(request::File::from(&file)).unwrap(), file);
        }
        let wire = |name: &str, digest: usize| request::File {
            name: name.to_owned(),
            size: Some(1),
            blake3: Some(vec![0; digest].into()),
        };
        for (name, digest, reason) in [
            ("../x", 32, "INVALID_FILE_NAME"),
            ("", 32, "INVALID_FILE_NAME"),
            ("a", 31, "INVALID_FIELD"),
            ("a", 33, "INVALID_FIELD"),
            ("a", 0, "INVALID_FIELD"),
        ] {
            assert_eq!(blamed(&ManifestFile::try_from(wire(name, digest)).unwrap_err()).0, reason);
        }
    }

    #[test]
    fn manifests_differ_by_name_and_size_and_by_digests_that_both_have() {
        let with = |name: &str, size, digest: Option<u8>| {
            let file = ManifestFile { blake3: digest.map(|byte| Box::new([byte; 32])), ..file(name, size) };
            Manifest::new(vec![file]).unwrap()
        };
        let base = with("a", Some(1), Some(1));
        assert_eq!(base.difference(&with("a", Some(1), Some(1))), None);
        assert_eq!(base.difference(&with("a", Some(1), None)), None);
        for other in [
            with("b", Some(1), Some(1)),
            with("a", Some(2), Some(1)),
            with("a", None, Some(1)),
            with("a", Some(1), Some(2)),
        ] {
            assert!(base.difference(&other).is_some(), "{other:?}");
        }
        assert!(base.difference(&Manifest::new(Vec::new()).unwrap()).unwrap().contains("file_count"));
    }
}

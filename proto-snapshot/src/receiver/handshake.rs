//! What comes before any byte: header and manifest are read, checked and bounded.

use std::time::Duration;

use proto_common::bulk::{BulkError, Incoming, Payload, Received};
use proto_common::error::Error;
use proto_common::fence::Fence;
use proto_common::ids::{NodeId, TransferId};
use proto_common::pace::Signs;
use proto_common::peer::PeerKey;
use proto_common::prompt::{self, MAX_REQUEST_BYTES};
use proto_common::refusal::Refusal;
use proto_common::v1::Priority;
use tonic::{Request, Streaming};

use super::identity::other_manifest;
use crate::limits::{Limits, MAX_MESSAGE_BYTES, MAX_PAGE_BYTES};
use crate::reason::Reason;
use crate::spec::{FEATURES, FILE_RUNS, Manifest, ManifestFile, TransferPlan, TransferSpec, id};
use crate::store::Claim;
use crate::v1::TransferSplitSnapshotRequest;
use crate::v1::transfer_split_snapshot_request::{Frame, Header, LaneHeader};

/// Features in a header at most; more than any version will have.
const MAX_FEATURES: usize = 64;

/// The frames of one stream, with the time that the peer has for each.
pub(super) struct Frames {
    messages: Incoming<TransferSplitSnapshotRequest>,
    signs: Signs,
}

/// A header whose every field was checked.
#[derive(Debug)]
pub(super) struct ControlHeader {
    pub(super) spec: TransferSpec,
    pub(super) fence: Option<Fence>,
    pub(super) claim: Claim,
    pub(super) generation: u64,
    pub(super) priority: Priority,
    pub(super) file_count: u64,
    pub(super) name_bytes: u64,
    pub(super) total_bytes: Option<u64>,
    pub(super) lanes: u32,
    pub(super) discard_staged: bool,
    /// Whether it may be told of runs of missing files.
    pub(super) file_runs: bool,
}

/// A lane's header whose every field was checked.
#[derive(Debug)]
pub(super) struct CheckedLane {
    pub(super) transfer_id: TransferId,
    pub(super) claim: Claim,
    pub(super) lane: u32,
    pub(super) generation: u64,
}

impl Frames {
    pub(super) fn new(request: Request<Streaming<TransferSplitSnapshotRequest>>) -> Self {
        Self { messages: Incoming::new(request, MAX_REQUEST_BYTES), signs: Signs::default() }
    }

    /// The first frame, which has no payload. It is like a request: small, and counted while it is waited for. Pages of the manifest follow.
    pub(super) async fn first(&mut self, peer: &PeerKey, limit: Duration) -> Result<Option<Frame>, Error> {
        let first = prompt::first(peer, self.next_within(limit)).await;
        self.messages.set_limit(MAX_PAGE_BYTES);
        first
    }

    /// From now on only chunks of at most `chunk_bytes` come, as on a lane: a part of a message that is larger than a chunk is not waited for.
    pub(super) fn only_chunks(&mut self, chunk_bytes: u32) {
        self.messages.set_limit(with_chunk(chunk_bytes));
    }

    /// From now on chunks of at most `chunk_bytes` come, and pages of the end.
    pub(super) fn chunks_and_pages(&mut self, chunk_bytes: u32) {
        self.messages.set_limit(with_chunk(chunk_bytes).max(MAX_PAGE_BYTES));
    }

    /// The next frame, with its payload beside it; `None` at the end of the stream. Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Option<(Frame, Payload)>, Error> {
        self.signs.rest().await;
        let Some(Received { message, payload }) = self.messages.next().await.map_err(broken)? else {
            return Ok(None);
        };
        self.signs.came(matches!(message.frame, Some(Frame::Heartbeat(_))));
        match message.frame {
            Some(frame) => Ok(Some((frame, payload))),
            None => Err(Reason::UnknownFrame
                .field("frame", "is not set, or of a kind that this version does not know")),
        }
    }

    /// The next frame, within `limit`, of those that have no payload.
    pub(super) async fn next_within(&mut self, limit: Duration) -> Result<Option<Frame>, Error> {
        let next = tokio::time::timeout(limit, self.next()).await.map_err(|_| idle(limit))??;
        Ok(next.map(|(frame, _)| frame))
    }
}

/// A message with a chunk of at most `chunk_bytes`.
fn with_chunk(chunk_bytes: u32) -> usize {
    let chunk = usize::try_from(chunk_bytes).unwrap_or(usize::MAX);
    chunk.saturating_add(MAX_REQUEST_BYTES).min(MAX_MESSAGE_BYTES)
}

/// A peer that is gone and a peer that sends garbage both end the stream; only the latter hears of it.
fn broken(error: BulkError) -> Error {
    match error {
        BulkError::TooLarge { len, limit } => {
            // Only a header has so low a limit.
            let (what, advice) = match limit {
                MAX_REQUEST_BYTES => ("the header", "shorten its texts"),
                _ => ("a message", "send smaller chunks and pages"),
            };
            Reason::ChunkTooLarge
                .error(format!("{what} has {len} bytes where at most {limit} are taken; {advice}"))
                .metadata("max_message_bytes", limit.to_string())
        }
        BulkError::Compressed => refused(Refusal::Compressed { encoding: "unnamed".to_owned() }),
        BulkError::Malformed(_) | BulkError::Flag(_) => refused(Refusal::Undecodable).caused_by(error),
        error => ended_early().caused_by(error),
    }
}

/// What tonic refuses before it gets here, or on the way.
pub(super) fn refused(refusal: Refusal) -> Error {
    match refusal {
        Refusal::TooLarge => Reason::ChunkTooLarge
            .error(format!(
                "a message is larger than {MAX_MESSAGE_BYTES} bytes, or a request than {MAX_REQUEST_BYTES}; send smaller chunks and pages"
            ))
            .metadata("max_message_bytes", MAX_MESSAGE_BYTES.to_string()),
        Refusal::Compressed { encoding } => Reason::UnsupportedCompression
            .error(format!("the message is compressed with {encoding}; send it as it is"))
            .metadata("encoding", encoding),
        _ => Reason::UnknownFrame.error("a message could not be decoded"),
    }
}

/// The stream was closed without `End`.
pub(super) fn ended_early() -> Error {
    Reason::StreamEndedEarly
        .error("the stream was closed before End; what arrived is kept, open the stream again to go on")
}

/// Nothing came for `limit`.
pub(super) fn idle(limit: Duration) -> Error {
    Reason::IdleTimeout.error(format!(
        "no frame arrived for {limit:?}; what arrived is kept, open the stream again to go on"
    ))
}

/// Next to nothing came for long.
pub(super) fn too_slow(expected: &str) -> Error {
    Reason::TooSlow.error(format!(
        "the transfer has brought less than {expected}, so others get its place; what arrived is kept, open the stream again to go on"
    ))
}

/// A frame of a known kind at the wrong time.
pub(super) fn unexpected(frame: &Frame, expected: &str) -> Error {
    let name = match frame {
        Frame::Header(_) => "header",
        Frame::LaneHeader(_) => "lane_header",
        Frame::Manifest(_) => "manifest",
        Frame::Chunk(_) => "chunk",
        Frame::End(_) => "end",
        Frame::Heartbeat(_) => "heartbeat",
    };
    Reason::UnexpectedFrame.field(name, format!("came where {expected} was expected"))
}

impl ControlHeader {
    pub(super) fn check(header: Header, node: &str, limits: &Limits) -> Result<Self, Error> {
        let spec = TransferSpec::from_header(&header)?;
        // Every field is named, so that a new one cannot be forgotten here.
        let Header {
            transfer_id: _,
            source_shard_id: _,
            target_shard_id: _,
            source_node_id: _,
            target_node_id,
            slots: _,
            snapshot_index: _,
            snapshot_term: _,
            content_version: _,
            fence,
            attempt,
            session,
            generation,
            priority,
            file_count,
            name_bytes,
            total_bytes,
            lanes,
            discard_staged,
            required_features,
            supported_features,
        } = header;
        for (field, features) in [
            ("header.required_features", &required_features),
            ("header.supported_features", &supported_features),
        ] {
            if features.len() > MAX_FEATURES {
                let what = format!("names {} features, at most {MAX_FEATURES} are taken", features.len());
                return Err(Reason::InvalidField.field(field, what));
            }
        }
        if let Some(unknown) = required_features.iter().find(|name| !FEATURES.contains(&name.as_str())) {
            let unknown = proto_common::text::printable(unknown, 64);
            return Err(Reason::UnsupportedFeature
                .error(format!(
                    "the sender requires the feature {unknown}, this receiver has {}",
                    FEATURES.join(", ")
                ))
                .violation("header.required_features", format!("names {unknown}"))
                .metadata("feature", unknown));
        }
        if !target_node_id.is_empty() {
            let target = id("header.target_node_id", &target_node_id, |text| NodeId::new(text))?;
            if target.as_str() != node {
                return Err(Reason::WrongNode
                    .error(format!("the sender means node {target}, this is node {node}; check the address"))
                    .violation("header.target_node_id", format!("is not {node}"))
                    .metadata("node_id", node));
            }
        }
        let generation = at_least_1("header.generation", generation)?;
        if discard_staged && generation != 1 {
            return Err(Reason::InvalidField
                .field("header.discard_staged", "needs an attempt of its own, with generation 1"));
        }
        let priority = Priority::try_from(priority)
            .map_err(|_| Reason::InvalidField.field("header.priority", format!("{priority} is not known")))?;
        for (field, value, limit) in [
            ("header.file_count", file_count, limits.files),
            ("header.name_bytes", name_bytes, limits.name_bytes),
        ] {
            if value > limit {
                return Err(Reason::ManifestTooLarge
                    .field(field, format!("is {value}, at most {limit} are taken; pack the files into fewer"))
                    .metadata("limit", limit.to_string()));
            }
        }
        if file_count == 0 {
            return Err(
                Reason::InvalidField.field("header.file_count", "is 0, a snapshot has at least one file")
            );
        }
        if let Some(total) = total_bytes
            && total > limits.snapshot_bytes.min(i64::MAX.unsigned_abs())
        {
            return Err(Reason::SnapshotTooLarge
                .field(
                    "header.total_bytes",
                    format!("is {total}, at most {} are taken", limits.snapshot_bytes),
                )
                .metadata("limit", limits.snapshot_bytes.to_string()));
        }
        Ok(Self {
            spec,
            fence: fence.map(Fence::from),
            claim: claim("header", attempt, &session)?,
            generation,
            priority: if priority == Priority::Unspecified { Priority::Rebalance } else { priority },
            file_count,
            name_bytes,
            total_bytes,
            lanes: lanes.max(1),
            discard_staged,
            file_runs: supported_features.iter().any(|name| name == FILE_RUNS),
        })
    }

    /// Whether it announces what is staged as `plan`, as far as it says.
    pub(super) fn is_of(&self, plan: &TransferPlan) -> bool {
        !self.discard_staged
            && plan.spec == self.spec
            && plan.manifest.file_count() == self.file_count
            && plan.manifest.name_bytes() == self.name_bytes
    }

    /// Reads the manifest pages, never more than the header declared. Of one that has to be the same as `known`, nothing is kept beside that.
    pub(super) async fn read_manifest(
        &self,
        frames: &mut Frames,
        known: Option<Manifest>,
        limits: &Limits,
    ) -> Result<Manifest, Error> {
        // Pages may come slowly, but not for ever: whoever sends them has a place.
        let patience = limits.first_frame * 10;
        let read = tokio::time::timeout(patience, self.read_pages(frames, known, limits));
        read.await.map_err(|_| idle(patience))?
    }

    async fn read_pages(
        &self,
        frames: &mut Frames,
        known: Option<Manifest>,
        limits: &Limits,
    ) -> Result<Manifest, Error> {
        let mut files: Vec<ManifestFile> = Vec::new();
        let (mut count, mut name_bytes, mut total_bytes) = (0_usize, 0_u64, 0_u64);
        let mismatch = |what: String| Reason::ManifestMismatch.field("manifest.files", what);
        loop {
            let page = match frames.next_within(limits.first_frame).await? {
                Some(Frame::Manifest(page)) => page,
                Some(Frame::Heartbeat(_)) => continue,
                Some(other) => return Err(unexpected(&other, "a manifest page")),
                None => return Err(ended_early()),
            };
            if page.files.is_empty() && !page.last {
                return Err(mismatch("a page that is not the last has no files".to_owned()));
            }
            for file in page.files {
                let file = ManifestFile::check(file, || format!("manifest.files[{count}]"))?;
                name_bytes = name_bytes.saturating_add(file.name.as_str().len() as u64);
                let number = count;
                // The header says nothing of it where one size is unknown.
                total_bytes = total_bytes.saturating_add(file.size.unwrap_or(0));
                if total_bytes > limits.snapshot_bytes {
                    return Err(Reason::SnapshotTooLarge
                        .field(
                            &format!("manifest.files[{number}].size"),
                            format!(
                                "{} makes the snapshot larger than the {} bytes that are taken",
                                file.name, limits.snapshot_bytes
                            ),
                        )
                        .metadata("limit", limits.snapshot_bytes.to_string()));
                }
                count += 1;
                if count as u64 > self.file_count || name_bytes > self.name_bytes {
                    return Err(mismatch(format!(
                        "the header declares {} files and {} bytes of names, the manifest has more",
                        self.file_count, self.name_bytes
                    )));
                }
                let Some(known) = &known else {
                    files.push(file);
                    continue;
                };
                if let Some(what) = known.files().get(number).and_then(|known| known.difference(&file)) {
                    return Err(other_manifest(&self.spec, &what));
                }
            }
            if page.last {
                break;
            }
        }
        if count as u64 != self.file_count || name_bytes != self.name_bytes {
            return Err(mismatch(format!(
                "the header declares {} files and {} bytes of names, the manifest has {count} and {name_bytes}",
                self.file_count, self.name_bytes
            )));
        }
        let manifest = match known {
            Some(known) => known,
            None => Manifest::new(files)?,
        };
        let directories = manifest.directories().count;
        if directories > limits.directories {
            return Err(Reason::ManifestTooLarge
                .field(
                    "manifest.files.name",
                    format!(
                        "the files lie in {directories} directories, at most {} are taken; pack them into fewer",
                        limits.directories
                    ),
                )
                .metadata("limit", limits.directories.to_string()));
        }
        if manifest.total_bytes() != self.total_bytes {
            return Err(Reason::ManifestMismatch.field(
                "header.total_bytes",
                format!(
                    "is {:?}, the sizes in the manifest add up to {:?}",
                    self.total_bytes,
                    manifest.total_bytes()
                ),
            ));
        }
        Ok(manifest)
    }
}

impl CheckedLane {
    pub(super) fn check(header: &LaneHeader) -> Result<Self, Error> {
        let LaneHeader { transfer_id, attempt, session, lane, generation } = header;
        Ok(Self {
            transfer_id: id("lane_header.transfer_id", transfer_id, |text| TransferId::new(text))?,
            claim: claim("lane_header", *attempt, session)?,
            lane: *lane,
            generation: at_least_1("lane_header.generation", *generation)?,
        })
    }
}

fn claim(header: &str, attempt: u64, session: &[u8]) -> Result<Claim, Error> {
    Ok(Claim {
        attempt: at_least_1(&format!("{header}.attempt"), attempt)?,
        session: session.try_into().map_err(|_| {
            Reason::InvalidField
                .field(&format!("{header}.session"), format!("has {} bytes, a session has 16", session.len()))
        })?,
    })
}

fn at_least_1(field: &str, value: u64) -> Result<u64, Error> {
    if value == 0 { Err(Reason::InvalidField.field(field, "is 0, must be at least 1")) } else { Ok(value) }
}

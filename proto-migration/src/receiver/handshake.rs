//! What comes before any batch: frames are read in time, and the header is checked field by field.

use std::time::Duration;

use bytes::Bytes;
use proto_common::access::Caller;
use proto_common::bulk::{BulkError, Incoming, Payload, Received};
use proto_common::error::Error;
use proto_common::fence::Fence;
use proto_common::ids::{MigrationId, NodeId, RANDOM_ID_LEN};
use proto_common::pace::Signs;
use proto_common::peer::PeerKey;
use proto_common::prompt::{self, MAX_REQUEST_BYTES};
use proto_common::refusal::Refusal;
use proto_common::text::{hex, printable};
use proto_common::v1::{NodeIdentity, Priority};
use tonic::{Request, Streaming};

use crate::Reason;
use crate::limits::largest_message;
use crate::service::refused;
use crate::spec::MigrationSpec;
use crate::v1::TransferMigrationDataRequest;
use crate::v1::transfer_migration_data_request::{Frame, Header, Purpose};

/// Features that this version has.
pub(super) const FEATURES: [&str; 2] = ["crc64nvme", "blake3-sum128"];
/// Features in a header at most.
const MAX_FEATURES: usize = 64;
/// Longest name of a feature, in bytes.
const MAX_FEATURE_BYTES: usize = 64;
/// How long the first frame is waited for.
pub(super) const FIRST_FRAME: Duration = Duration::from_secs(30);

/// The frames of one stream.
pub(super) struct Frames {
    messages: Incoming<TransferMigrationDataRequest>,
    signs: Signs,
    /// Largest message behind the header, in bytes.
    largest: usize,
}

impl Frames {
    /// Of a request whose batches have at most `batch_bytes` of payload.
    pub(super) fn new(request: Request<Streaming<TransferMigrationDataRequest>>, batch_bytes: u32) -> Self {
        let messages = Incoming::new(request, MAX_REQUEST_BYTES);
        Self { messages, signs: Signs::default(), largest: largest_message(batch_bytes) }
    }

    /// The next frame, with its payload beside it; an end of the stream is an error, since only an end frame ends it well. Cancel safe.
    pub(super) async fn next(&mut self) -> Result<(Frame, Payload), Error> {
        self.signs.rest().await;
        let next = self.messages.next().await.map_err(|error| match error {
            BulkError::TooLarge { .. } => refused(Refusal::TooLarge),
            BulkError::Compressed => refused(Refusal::Compressed { encoding: "unnamed".to_owned() }),
            BulkError::Malformed(_) | BulkError::Flag(_) => refused(Refusal::Undecodable).caused_by(error),
            error => ended_early().caused_by(error),
        });
        let Received { message, payload } = next?.ok_or_else(ended_early)?;
        self.signs.came(matches!(message.frame, Some(Frame::Heartbeat(_))));
        match message.frame {
            Some(frame) => Ok((frame, payload)),
            None => Err(Reason::UnknownFrame
                .field("frame", "is not set, or of a kind that this version does not know")),
        }
    }

    /// The header, which comes first and in time. It is like a request: small, and counted while it is waited for.
    pub(super) async fn header(&mut self, peer: &PeerKey) -> Result<Header, Error> {
        let largest = self.largest;
        let first = prompt::first(peer, async {
            tokio::time::timeout(FIRST_FRAME, self.next()).await.map_err(|_| idle(FIRST_FRAME))?
        })
        .await?;
        self.messages.set_limit(largest);
        match first {
            (Frame::Header(header), _) => Ok(header),
            (other, _) => Err(unexpected(&other, "the header")),
        }
    }

    /// Nothing but small frames may come from now on.
    pub(super) fn expect_small(&mut self) {
        self.messages.set_limit(MAX_REQUEST_BYTES);
    }
}

pub(super) fn ended_early() -> Error {
    Reason::StreamEndedEarly.error(
        "the stream was closed without an end frame; what is durable stays, open the next one to go on",
    )
}

pub(super) fn idle(limit: Duration) -> Error {
    Reason::IdleTimeout
        .error(format!("nothing arrived for {limit:?}; what is durable stays, open the next stream to go on"))
}

/// A stream on which nothing but its end was left to come.
pub(super) fn unended(limit: Duration) -> Error {
    Reason::IdleTimeout.error(format!(
        "the stream was not closed within {limit:?} after all was said; open the next stream to ask again"
    ))
}

/// Next to nothing came for long, with rows missing.
pub(super) fn too_slow(expected: &str) -> Error {
    Reason::TooSlow.error(format!(
        "the stream has brought less than {expected}, with rows missing; what is durable stays, open the next stream to go on"
    ))
}

/// A frame of a known kind at the wrong time.
pub(super) fn unexpected(frame: &Frame, expected: &str) -> Error {
    let name = match frame {
        Frame::Header(_) => "header",
        Frame::Bulk(_) => "bulk",
        Frame::Delta(_) => "delta",
        Frame::Prepare(_) => "prepare",
        Frame::Release(_) => "release",
        Frame::Commit(_) => "commit",
        Frame::Discard(_) => "discard",
        Frame::Forget(_) => "forget",
        Frame::Heartbeat(_) => "heartbeat",
    };
    Reason::UnexpectedFrame.field(name, format!("came where {expected} was expected"))
}

/// A header whose every field was checked.
#[derive(Debug, Clone)]
pub(super) struct CheckedHeader {
    pub(super) id: MigrationId,
    pub(super) spec: MigrationSpec,
    /// Whether data may follow.
    pub(super) transfer: bool,
    pub(super) source: NodeIdentity,
    pub(super) fence: Option<Fence>,
    pub(super) attempt: u64,
    pub(super) session: Bytes,
    pub(super) copy: u64,
    pub(super) base_seq: u64,
    pub(super) priority: Priority,
    pub(super) estimated_keys: Option<u64>,
    pub(super) estimated_bytes: Option<u64>,
    pub(super) sent_unix_ms: u64,
}

impl CheckedHeader {
    /// Checks what can be known without a record, at the node `own`.
    pub(super) fn check(header: Header, own: &NodeIdentity) -> Result<Self, Error> {
        let Header {
            migration_id,
            spec,
            purpose,
            source,
            target_store_id,
            fence,
            attempt,
            session,
            copy,
            base_seq,
            priority,
            estimated_keys,
            estimated_bytes,
            sent_unix_ms,
            required_features,
            supported_features,
        } = header;
        check_features(&required_features, &supported_features)?;
        let id = MigrationId::new(&migration_id).map_err(|error| error.at("header.migration_id"))?;
        let spec = MigrationSpec::from_wire(spec, "header.spec", None)?;
        let bad = |field: &str, problem: String| Reason::InvalidField.field(field, problem);
        let transfer = match Purpose::try_from(purpose) {
            Ok(Purpose::Transfer) => true,
            Ok(Purpose::Resolve) => false,
            _ => return Err(bad("header.purpose", format!("is {purpose}, which this node does not know"))),
        };
        let source = source.ok_or_else(|| bad("header.source", "is missing".to_owned()))?;
        NodeId::new(&source.node_id).map_err(|error| error.at("header.source.node_id"))?;
        if source.node_id != spec.source_node.as_str() {
            let problem = format!("is not header.spec.source_node_id, {}", spec.source_node);
            return Err(bad("header.source.node_id", problem));
        }
        for (field, bytes, may_be_empty) in [
            ("header.source.store_id", &source.store_id, false),
            ("header.target_store_id", &target_store_id, true),
            ("header.session", &session, false),
        ] {
            if bytes.len() != RANDOM_ID_LEN && !(may_be_empty && bytes.is_empty()) {
                return Err(bad(field, format!("has {} bytes instead of {RANDOM_ID_LEN}", bytes.len())));
            }
        }
        for (field, number) in [("header.attempt", attempt), ("header.copy", copy)] {
            if number == 0 {
                return Err(bad(field, "is 0; it starts at 1".to_owned()));
            }
        }
        let priority = match Priority::try_from(priority) {
            Ok(Priority::Unspecified) => Priority::Rebalance,
            Ok(priority) => priority,
            Err(_) => return Err(bad("header.priority", format!("is {priority}, which is not known"))),
        };
        if spec.target_node.as_str() != own.node_id {
            return Err(Reason::WrongNode
                .field(
                    "header.spec.target_node_id",
                    format!("is {}; this is {}", spec.target_node, own.node_id),
                )
                .metadata("node_id", &*own.node_id));
        }
        if source.cluster_id != own.cluster_id {
            let theirs = printable(&source.cluster_id, 128);
            return Err(Reason::WrongCluster
                .field(
                    "header.source.cluster_id",
                    format!("is {theirs:?}; this node's is {:?}", own.cluster_id),
                )
                .metadata("cluster_id", &*own.cluster_id));
        }
        if !target_store_id.is_empty() && target_store_id != own.store_id {
            let ours = hex(&own.store_id);
            return Err(Reason::StoreChanged
                .field("header.target_store_id", format!("is not the store of this node, {ours}"))
                .metadata("store_id", ours));
        }
        Ok(Self {
            id,
            spec,
            transfer,
            source: NodeIdentity { version: printable(&source.version, 64), ..source },
            fence: fence.map(Fence::from),
            attempt,
            session,
            copy,
            base_seq,
            priority,
            estimated_keys,
            estimated_bytes,
            sent_unix_ms,
        })
    }
}

impl CheckedHeader {
    /// Whether `caller` is the source that it says it is, and may send these slots.
    pub(super) fn authorize(&self, caller: &Caller) -> Result<(), Error> {
        let MigrationSpec { source_node, source_shard, target_shard, slots, .. } = &self.spec;
        caller.claims("header.source.node_id", source_node)?;
        caller.may(&[source_shard, target_shard], Some(*slots))
    }
}

fn check_features(required: &[String], supported: &[String]) -> Result<(), Error> {
    for (field, features) in
        [("header.required_features", required), ("header.supported_features", supported)]
    {
        if features.len() > MAX_FEATURES {
            let problem = format!("names {} features; at most {MAX_FEATURES} are taken", features.len());
            return Err(Reason::InvalidField.field(field, problem));
        }
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let valid =
            |name: &&String| (1..=MAX_FEATURE_BYTES).contains(&name.len()) && name.bytes().all(allowed);
        if let Some(name) = features.iter().find(|name| !valid(name)) {
            let problem = format!("names {:?}; a name is 1 to 64 bytes of a-z 0-9 -", printable(name, 64));
            return Err(Reason::InvalidField.field(field, problem));
        }
    }
    match required.iter().find(|name| !FEATURES.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => Err(Reason::UnsupportedFeature
            .field("header.required_features", format!("names {name}; this node has {}", FEATURES.join(", ")))
            .metadata("feature", name.as_str())),
    }
}

//! Whether two calls mean the same transfer: against what is staged, and against what is on record of one that has ended.

use proto_common::clock::now_unix_ms;
use proto_common::error::Error;
use proto_common::v1 as common;

use super::handshake::ControlHeader;
use crate::reason::Reason;
use crate::spec::{Manifest, TransferPlan, TransferSpec};
use crate::v1::{TransferPhase, TransferProgress};

/// What the counters of a new transfer start from.
pub(super) fn initial_progress(plan: &TransferPlan, node: &str, phase: TransferPhase) -> TransferProgress {
    let mut transfer = TransferProgress::from(&plan.spec);
    node.clone_into(&mut transfer.target_node_id);
    transfer.progress = Some(common::Progress {
        direction: common::Direction::In.into(),
        bytes_total: plan.manifest.total_bytes(),
        items_total: Some(plan.manifest.file_count()),
        started_unix_ms: now_unix_ms(),
        ..common::Progress::default()
    });
    let (content_version, manifest) = content_digests(&plan.spec, &plan.manifest);
    transfer.specification = [content_version, manifest].concat().into();
    transfer.enter(phase);
    transfer
}

/// Length of each digest in `TransferProgress.specification`.
const CONTENT_DIGEST: usize = 16;

/// Digests of the parts of a specification that its progress does not show: content version; names and sizes of the manifest.
fn content_digests(spec: &TransferSpec, manifest: &Manifest) -> ([u8; CONTENT_DIGEST], [u8; CONTENT_DIGEST]) {
    /// What is hashed at once: enough for the widest vectors.
    const AT_ONCE: usize = 32 << 10;
    let mut files = blake3::Hasher::new();
    let mut bytes = Vec::with_capacity(AT_ONCE + (4 << 10));
    for file in manifest.files() {
        bytes.extend_from_slice(file.name.as_str().as_bytes());
        // No name contains it.
        bytes.extend_from_slice(&[0, u8::from(file.size.is_some())]);
        bytes.extend_from_slice(&file.size.unwrap_or(0).to_le_bytes());
        if bytes.len() >= AT_ONCE {
            files.update(&bytes);
            bytes.clear();
        }
    }
    files.update(&bytes);
    let mut version = blake3::Hasher::new();
    version.update(spec.content_version.as_bytes());
    let digest = |hasher: &blake3::Hasher| {
        let mut digest = [0; CONTENT_DIGEST];
        hasher.finalize_xof().fill(&mut digest);
        digest
    };
    (digest(&version), digest(&files))
}

/// Refuses another specification under the same ID. A sender that cannot read its source twice may bring other content.
pub(super) fn check_same(
    plan: &TransferPlan,
    header: &ControlHeader,
    manifest: &Manifest,
) -> Result<(), Error> {
    check_same_spec(plan, header, header.discard_staged)?;
    match plan.manifest.difference(manifest) {
        Some(what) if !header.discard_staged => Err(other_manifest(&header.spec, &what)),
        _ => Ok(()),
    }
}

/// The same, before the manifest is known. Where what is staged is discarded (`discards`), other content may come.
pub(super) fn check_same_spec(
    plan: &TransferPlan,
    header: &ControlHeader,
    discards: bool,
) -> Result<(), Error> {
    let spec = &header.spec;
    match plan.spec.difference(spec) {
        Some("content_version") if discards => Ok(()),
        Some(field) => Err(other_specification(spec, &format!("header.{field}"), field)),
        None => Ok(()),
    }
}

/// `what` of the manifest is another than before.
pub(super) fn other_manifest(spec: &TransferSpec, what: &str) -> Error {
    other_specification(spec, "manifest.files", &format!("manifest ({what})"))
}

/// The same against the history, which keeps digests of manifest and content version.
pub(super) fn check_same_shown(
    known: &TransferProgress,
    header: &ControlHeader,
    manifest: &Manifest,
) -> Result<(), Error> {
    let spec = &header.spec;
    let sent = TransferProgress::from(spec);
    let (content_version, manifest) = content_digests(spec, manifest);
    let differs = |known: Option<&[u8]>, sent: [u8; CONTENT_DIGEST]| {
        !header.discard_staged && known.is_some_and(|known| known != sent)
    };
    let digests = known.specification.split_at_checked(CONTENT_DIGEST);
    let field = if known.source_shard_id != sent.source_shard_id {
        "header.source_shard_id"
    } else if known.target_shard_id != sent.target_shard_id {
        "header.target_shard_id"
    } else if known.source_node_id != sent.source_node_id {
        "header.source_node_id"
    } else if known.slots != sent.slots {
        "header.slots"
    } else if known.snapshot_index != sent.snapshot_index {
        "header.snapshot_index"
    } else if known.snapshot_term != sent.snapshot_term {
        "header.snapshot_term"
    } else if differs(digests.map(|(known, _)| known), content_version) {
        "header.content_version"
    } else if differs(digests.map(|(_, known)| known), manifest) {
        "manifest.files"
    } else {
        return Ok(());
    };
    Err(other_specification(spec, field, field.trim_start_matches("header.")))
}

fn other_specification(spec: &TransferSpec, field: &str, what: &str) -> Error {
    Reason::SpecificationMismatch
        .error(format!("transfer {} exists with another {what}; use a new ID", spec.transfer_id))
        .violation(field, format!("{what} is another one than before"))
        .metadata("field", field)
}

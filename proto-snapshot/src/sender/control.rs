//! One control stream: what it says first, what it sends, and how it ends.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use proto_common::connect::Connect;
use proto_common::error::{CommonReason, Error};
use proto_common::text::{hex, printable};
use tokio::task::JoinSet;

use super::SnapshotToSend;
use super::lane::{Lane, Taken};
use super::missing::Span;
use super::patience::Quiet;
use super::stream::{
    FIRST_IDLE, Heard, Inbound, Opened, Outbound, broken, early, heartbeats, open, send_end, send_manifest,
};
use super::task::{Claimed, Described, Ended, Task};
use super::work::{UNIT_BYTES, Work};
use crate::reason::Reason;
use crate::source::SnapshotSource;
use crate::spec::{FEATURES, Manifest};
use crate::v1::transfer_split_snapshot_request::{End, Frame, Header, LaneHeader};
use crate::v1::transfer_split_snapshot_response::{Accepted, Installed};

impl<C: Connect, S: SnapshotSource> Task<C, S> {
    /// One control stream, with its lanes.
    pub(super) async fn control(&self, described: &Described, claimed: &Claimed) -> Result<Ended, Error> {
        self.shared.hold.pass().await;
        let channel = self.sender.connect.connect().await?;
        let (outbound, frames) = Outbound::new();
        outbound.send(Frame::Header(self.header(described, claimed))).await?;
        self.shown.connecting(claimed.attempt);
        let manifest = &described.manifest;
        let quiet = Quiet::new(FIRST_IDLE);
        let opened = {
            let mut opening =
                std::pin::pin!(open(channel, frames, manifest, &quiet, || self.shared.patience.active()));
            let mut sending = std::pin::pin!(send_manifest(&outbound, manifest, &quiet));
            let mut sent = false;
            loop {
                tokio::select! {
                    // The receiver may refuse while the manifest is still on its way, and its reason is what counts.
                    biased;
                    opened = &mut opening => {
                        let opened = opened?;
                        if !sent && !opened.accepted.already_installed {
                            sending.await?;
                        }
                        break opened;
                    }
                    _ = &mut sending, if !sent => sent = true,
                }
            }
        };
        let Opened { mut inbound, accepted, missing } = opened;
        self.check_receiver(&accepted)?;
        self.shared.patience.active();
        if accepted.already_installed {
            return self.await_installed(&mut inbound, &outbound, &accepted).await;
        }
        let can_seek = self.shared.source.can_seek();
        if !can_seek {
            let fresh = claimed.discard_staged && claimed.generation == 1;
            if !readable_once(manifest, &missing, fresh) {
                if fresh {
                    return Err(Reason::InvalidField.field(
                        "accepted.missing",
                        "the receiver kept a part of what it was told to discard, and the source can be read only once",
                    ));
                }
                return Ok(Ended::StartAnew);
            }
            // What was read before is not what will be read now.
            self.shared.checksums.start(manifest);
        }
        self.shown.accepted(&accepted);
        self.set_rate(&accepted);

        let work = Arc::new(Work::new(&missing, if can_seek { UNIT_BYTES } else { u64::MAX }));
        let unread = self.shared.checksums.unread(&missing);
        drop(missing);
        let idle = inbound.idle();
        let heard = Heard::new(&accepted, idle);
        let mut lanes = self.open_lanes(&accepted, manifest, claimed, &work);
        let ended = OnceLock::new();
        let sending = async {
            let mut pump = self.shared.pump(&outbound, &heard, accepted.max_chunk_bytes);
            let known = self.shared.read_known(unread);
            let pushed = async {
                let mut taken = Vec::new();
                loop {
                    pump.drain(&work, &mut taken).await?;
                    // Only a lane that comes back is asked what it took.
                    taken.clear();
                    match lanes.join_next().await {
                        // A lane may have given work back before it ended.
                        Some(ended) => ended.map_err(|error| {
                            Reason::Internal.error("a lane ended early").caused_by(error)
                        })??,
                        None if work.is_empty() => return Ok::<_, Error>(()),
                        None => {}
                    }
                }
            };
            tokio::try_join!(pushed, known)?;
            let totals = loop {
                match self.shared.checksums.totals() {
                    Ok(totals) => break totals,
                    Err(unread) => self.shared.read_known(unread).await?,
                }
            };
            self.shared.hold.pass().await;
            send_end(&outbound, &totals, &heard.quiet, &ended).await?;
            // The receiver works now; keep the stream, and let the other branches go on.
            heard.quiet.bound("the receiver to verify", std::future::pending::<Result<(), Error>>()).await?
        };
        let installed = tokio::select! {
            // Its reason counts more than that of a stream that broke.
            biased;
            listened = inbound.listen(&heard, || self.heard(&heard)) => listened?,
            result = sending => {
                let Err(error) = result else { return Err(broken("the sending ended early")) };
                // A closed stream has its reason in the answers.
                match tokio::time::timeout(Duration::from_secs(1), inbound.listen(&heard, || ())).await {
                    Ok(Err(reason)) if error.is(CommonReason::Unavailable) => return Err(reason),
                    _ => return Err(error),
                }
            }
            () = heartbeats(&outbound, idle) => None,
            () = self.shown.keep_up_to_date(&heard) => None,
        };
        let installed = installed.ok_or_else(ended_early)?;
        check_installed(&installed, ended.get())?;
        Ok(Ended::Installed(installed))
    }

    async fn await_installed(
        &self,
        inbound: &mut Inbound,
        outbound: &Outbound,
        accepted: &Accepted,
    ) -> Result<Ended, Error> {
        let idle = inbound.idle();
        let heard = Heard::new(accepted, idle);
        let installed = tokio::select! {
            listened = heard.quiet.bound("Installed", inbound.listen(&heard, || self.heard(&heard))) => listened??,
            () = heartbeats(outbound, idle) => None,
        };
        installed.map(Ended::Installed).ok_or_else(ended_early)
    }

    fn heard(&self, heard: &Heard) {
        if heard.completing() {
            self.shared.patience.active();
        }
        self.shown.heard(heard);
    }

    fn check_receiver(&self, accepted: &Accepted) -> Result<(), Error> {
        let (node_id, store_id) = match &accepted.receiver {
            Some(node) => (node.node_id.as_str(), &node.store_id[..]),
            None => ("", [].as_slice()),
        };
        if let Some(expected) = &self.snapshot.target_node
            && !node_id.is_empty()
            && node_id != expected.as_str()
        {
            let name = printable(node_id, 128);
            return Err(Reason::WrongNode.error(format!("{name} answers where {expected} is expected")));
        }
        if let Some(expected) = &self.sender.options.target_store
            && store_id != expected
        {
            return Err(Reason::WrongNode.error(format!(
                "the receiver has store {}, the transfer began with store {}; was it given an empty disk?",
                printable(&hex(store_id), 64),
                hex(expected)
            )));
        }
        Ok(())
    }

    fn header(&self, described: &Described, claimed: &Claimed) -> Header {
        let SnapshotToSend {
            transfer_id,
            source_shard,
            target_shard,
            source_node,
            target_node,
            slots,
            point,
            fence,
            priority,
        } = &self.snapshot;
        Header {
            transfer_id: transfer_id.to_string(),
            source_shard_id: source_shard.to_string(),
            target_shard_id: target_shard.to_string(),
            source_node_id: source_node.to_string(),
            target_node_id: target_node.as_ref().map_or_else(String::new, ToString::to_string),
            slots: Some((*slots).into()),
            snapshot_index: point.index,
            snapshot_term: point.term,
            content_version: described.content_version.clone(),
            fence: fence.map(Into::into),
            attempt: claimed.attempt,
            session: bytes::Bytes::copy_from_slice(&claimed.session),
            generation: claimed.generation,
            priority: (*priority).into(),
            file_count: described.manifest.file_count(),
            name_bytes: described.manifest.name_bytes(),
            total_bytes: described.manifest.total_bytes(),
            lanes: self.sender.options.streams(described.manifest.total_bytes()),
            discard_staged: claimed.discard_staged && claimed.generation == 1,
            required_features: vec!["crc64nvme".to_owned()],
            supported_features: FEATURES.map(str::to_owned).to_vec(),
        }
    }

    fn set_rate(&self, accepted: &Accepted) {
        let asked = accepted.max_bytes_per_second.and_then(std::num::NonZeroU64::new);
        let own = self.sender.options.bytes_per_second;
        self.shared.limiter.set_rate(match (own, asked) {
            (Some(own), Some(asked)) => Some(own.min(asked)),
            (own, asked) => own.or(asked),
        });
    }

    fn open_lanes(
        &self,
        accepted: &Accepted,
        manifest: &Manifest,
        claimed: &Claimed,
        work: &Arc<Work>,
    ) -> JoinSet<Result<(), Error>> {
        let mut lanes = JoinSet::new();
        // What is read once, or has no known end, has one reader; and where nothing is missing, a lane could only fail.
        let many = self.shared.source.can_seek() && manifest.total_bytes().is_some() && !work.is_empty();
        let wanted = if many { self.sender.options.streams(manifest.total_bytes()) } else { 1 };
        let count = wanted.min(accepted.max_lanes.max(1));
        self.shown.show(|transfer| transfer.lanes = count);
        for lane in 1..count {
            let lane = Lane {
                connect: Arc::clone(&self.sender.connect),
                shared: self.shared.clone(),
                manifest: manifest.clone(),
                work: Arc::clone(work),
                header: LaneHeader {
                    transfer_id: self.snapshot.transfer_id.to_string(),
                    attempt: claimed.attempt,
                    session: bytes::Bytes::copy_from_slice(&claimed.session),
                    lane,
                    // Unique and rising over all control streams of the attempt.
                    generation: claimed.generation << 32,
                },
                backoff: self.sender.options.backoff.start(),
                taken: Taken::default(),
            };
            lanes.spawn(lane.run());
        }
        lanes
    }
}

/// Whether a source that is read once, each file from its start, can give what is `missing` and the checksums of all. The rest of
/// a file can not be read, and other files only if nothing of them was sent before, as in a `fresh` attempt.
fn readable_once(manifest: &Manifest, missing: &[Span], fresh: bool) -> bool {
    let whole =
        |gap: &Span| gap.offset == 0 && manifest.get(gap.file).is_some_and(|file| file.size == gap.len);
    let files = manifest.files().iter().filter(|file| file.size != Some(0)).count();
    missing.iter().all(whole) && (fresh || missing.len() == files)
}

/// `Installed` must follow `End`, and mean the same snapshot.
fn check_installed(installed: &Installed, end: Option<&End>) -> Result<(), Error> {
    let end = end.ok_or_else(|| early("Installed before End"))?;
    if (installed.total_bytes, installed.file_count) == (end.total_bytes, end.file_count) {
        return Ok(());
    }
    Err(Reason::TotalsMismatch.field(
        "installed.total_bytes",
        format!(
            "the receiver installed {} bytes in {} files, {} in {} were sent",
            installed.total_bytes, installed.file_count, end.total_bytes, end.file_count
        ),
    ))
}

fn ended_early() -> Error {
    broken("the receiver ended the stream before it installed")
}

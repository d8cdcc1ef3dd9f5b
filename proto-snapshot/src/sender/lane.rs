//! One lane, through reconnections of its own.

use std::sync::Arc;

use proto_common::connect::Connect;
use proto_common::error::Error;
use proto_common::retry::BackoffState;

use super::missing::{Span, intersect};
use super::patience::Quiet;
use super::pump::Shared;
use super::stream::{FIRST_IDLE, Heard, Opened, Outbound, broken, early, heartbeats, open};
use super::work::Work;
use crate::source::SnapshotSource;
use crate::spec::Manifest;
use crate::v1::transfer_split_snapshot_request::{Frame, LaneHeader};

/// How often a lane is opened again before the whole transfer starts over.
const LANE_RETRIES: u32 = 3;

/// See the module.
pub(super) struct Lane<C, S> {
    pub(super) connect: Arc<C>,
    pub(super) shared: Shared<S>,
    pub(super) manifest: Manifest,
    pub(super) work: Arc<Work>,
    pub(super) header: LaneHeader,
    pub(super) backoff: BackoffState,
}

impl<C: Connect, S: SnapshotSource> Lane<C, S> {
    /// Sends work until there is none.
    pub(super) async fn run(mut self) -> Result<(), Error> {
        let mut taken = Vec::new();
        loop {
            self.header.generation += 1;
            let error = match self.stream(&mut taken).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if self.backoff.failures() >= LANE_RETRIES {
                return Err(error);
            }
            let Some(pause) = self.backoff.next(&error) else { return Err(error) };
            tokio::time::sleep(pause).await;
        }
    }

    /// One stream of the lane; `taken` are the units that its earlier ones took.
    async fn stream(&mut self, taken: &mut Vec<Span>) -> Result<(), Error> {
        self.shared.hold.pass().await;
        let channel = self.connect.connect().await?;
        let (outbound, frames) = Outbound::new();
        outbound.send(Frame::LaneHeader(self.header.clone())).await?;
        let quiet = Quiet::new(FIRST_IDLE);
        let Opened { mut inbound, accepted, missing } =
            open(channel, frames, &self.manifest, &quiet, || ()).await?;
        if accepted.already_installed {
            return Err(early("already_installed on a lane"));
        }
        self.work.give_back(intersect(taken, &missing));
        taken.clear();
        let idle = inbound.idle();
        let heard = Heard::new(&accepted, idle);
        let mut pump = self.shared.pump(&outbound, &heard, accepted.max_chunk_bytes);
        let ended = tokio::select! {
            biased;
            listened = inbound.listen(&heard, || ()) => {
                listened?;
                Err(broken("the receiver ended the lane"))
            }
            result = async {
                pump.drain(&self.work, taken).await?;
                heard.received(pump.sent).await
            } => result,
            () = heartbeats(&outbound, idle) => Ok(()),
        };
        ended?;
        // Half-close, and let the receiver end the stream.
        drop(outbound);
        let rest = inbound.listen(&heard, || ());
        heard.quiet.bound("the end of the lane", rest).await?.map(|_| ())
    }
}

//! One lane, through reconnections of its own.

use std::sync::Arc;

use proto_common::connect::Connect;
use proto_common::error::Error;
use proto_common::retry::BackoffState;

use super::missing::{Span, intersect};
use super::patience::Quiet;
use super::pump::Shared;
use super::stream::{FIRST_IDLE, Heard, Opened, Outbound, broken, early, heartbeats, open};
use super::work::{Work, rest};
use crate::source::SnapshotSource;
use crate::spec::Manifest;
use crate::v1::transfer_split_snapshot_request::{Frame, LaneHeader};

/// How often in a row a lane is opened again, without getting anything done, before the others go on without it: with the pauses between, about as long as a
/// receiver takes to notice that the stream before is gone. Without a lane nothing is lost but its share of the rate.
const LANE_RETRIES: u32 = 3;

/// See the module.
pub(super) struct Lane<C, S> {
    pub(super) connect: Arc<C>,
    pub(super) shared: Shared<S>,
    pub(super) manifest: Manifest,
    pub(super) work: Arc<Work>,
    pub(super) header: LaneHeader,
    pub(super) backoff: BackoffState,
    pub(super) taken: Taken,
}

/// The units that the last stream of a lane took, in order, and how much of them it has sent.
#[derive(Default)]
pub(super) struct Taken {
    units: Vec<Span>,
    sent: u64,
    /// What the receiver has written of that.
    received: u64,
}

impl Taken {
    /// What was not sent, where all that was has been written; `None` where nobody but the receiver knows what is missing.
    fn unsent(&self) -> Option<Vec<Span>> {
        (self.sent == self.received).then(|| rest(&self.units, self.sent))
    }
}

impl<C: Connect, S: SnapshotSource> Lane<C, S> {
    /// Sends work until there is none. Where no stream can be opened, it gives its units back, and the others go on without it.
    pub(super) async fn run(mut self) -> Result<(), Error> {
        loop {
            self.header.generation += 1;
            let error = match self.stream().await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let again = self.backoff.failures() < LANE_RETRIES;
            if let Some(pause) = again.then(|| self.backoff.next(&error)).flatten() {
                if self.while_needed(tokio::time::sleep(pause)).await.is_none() {
                    return Ok(());
                }
                continue;
            }
            // What it has sent and not heard of may have arrived: that is for a new control stream to find out.
            let Some(unsent) = self.taken.unsent().filter(|_| error.is_retryable()) else {
                return Err(error);
            };
            tracing::warn!(
                transfer_id = self.header.transfer_id,
                lane = self.header.lane,
                error = %error,
                "the transfer goes on without a lane that cannot be opened"
            );
            self.work.give_back(unsent);
            return Ok(());
        }
    }

    /// Waits for `future`, or until there is nothing that the lane could do: then `None`.
    async fn while_needed<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let has_work = self.taken.unsent().is_none_or(|unsent| !unsent.is_empty());
        tokio::select! {
            biased;
            () = self.work.used_up(), if !has_work => None,
            done = future => Some(done),
        }
    }

    async fn open(&self) -> Result<(Outbound, Opened), Error> {
        self.shared.hold.pass().await;
        let channel = self.connect.connect().await?;
        let (outbound, frames) = Outbound::new();
        outbound.send(Frame::LaneHeader(self.header.clone())).await?;
        let quiet = Quiet::new(FIRST_IDLE);
        let opened = open(channel, frames, &self.manifest, &quiet, || ()).await?;
        Ok((outbound, opened))
    }

    /// One stream of the lane.
    async fn stream(&mut self) -> Result<(), Error> {
        let Some(opened) = self.while_needed(self.open()).await else { return Ok(()) };
        let (outbound, Opened { mut inbound, accepted, missing }) = opened?;
        if accepted.already_installed {
            return Err(early("already_installed on a lane"));
        }
        let mut earlier = std::mem::take(&mut self.taken);
        self.work.give_back(intersect(&mut earlier.units, &missing));
        let idle = inbound.idle();
        let heard = Heard::new(&accepted, idle);
        let mut pump = self.shared.pump(&outbound, &heard, accepted.max_chunk_bytes);
        let ended = tokio::select! {
            biased;
            listened = inbound.listen(&heard, || ()) => {
                listened.and_then(|_| Err(broken("the receiver ended the lane")))
            }
            result = async {
                pump.drain(&self.work, &mut self.taken.units).await?;
                heard.received(pump.sent).await
            } => result,
            () = heartbeats(&outbound, idle) => Ok(()),
        };
        (self.taken.sent, self.taken.received) = (pump.handed_over(), heard.written());
        if self.taken.received > 0 {
            self.backoff.reset();
        }
        ended?;
        // Half-close, and let the receiver end the stream.
        drop(outbound);
        let rest = inbound.listen(&heard, || ());
        heard.quiet.bound("the end of the lane", rest).await?.map(|_| ())
    }
}

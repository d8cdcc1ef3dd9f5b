//! One stream to the target: opened with a header, accepted, and read by a task of its own.

use std::time::Duration;

use proto_common::bulk::{Outgoing, WithBody};
use proto_common::connect::GrpcChannel;
use proto_common::error::Error;
use tokio::sync::{mpsc, watch};
use tokio::task::coop::cooperative;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::Reason;
use crate::limits::{BATCH_BYTES, MESSAGE_OVERHEAD, largest_message};
use crate::v1::TransferMigrationDataRequest;
use crate::v1::migration_service_client::MigrationServiceClient;
use crate::v1::transfer_migration_data_request::{Frame, Header};
use crate::v1::transfer_migration_data_response::{
    Accepted, Ack, Committed, Discarded, Frame as Answer, PrepareRefused, Prepared,
};

/// Frames between the pump and the connection. Their bytes are bounded by credit. 1 GiB of rows took 0.37 s with 2 of them, 0.36 with 4 and 0.35 with 16, and 1 and 5 MiB of
/// memory more than with 2 (medians of 8 interleaved rounds).
const QUEUE: usize = 4;

/// Answers that wait for the driver; a target that sends more of them breaks the protocol.
const ANSWERS: usize = 16;

/// Longest silence that is borne, whatever the target declares: its signs of life come three times as often.
const MAX_IDLE: Duration = Duration::from_secs(60 * 60);

/// How long the first answer may take.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(30);

/// What the target says beside acknowledgements.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Said {
    Prepared(Prepared),
    Refused(PrepareRefused),
    Committed(Committed),
    Discarded(Discarded),
    Forgotten,
}

/// An accepted stream. Dropping it ends the stream without an end frame, which completes nothing.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) accepted: Accepted,
    pub(super) idle: Duration,
    out: mpsc::Sender<TransferMigrationDataRequest>,
    /// The latest `Ack`, merged with all earlier ones.
    pub(super) acks: watch::Receiver<Ack>,
    /// What else the target says; in the end, why there is no more.
    pub(super) said: mpsc::Receiver<Result<Said, Error>>,
    _reader: AbortOnDropHandle<()>,
}

/// Sends frames into a stream.
#[derive(Debug, Clone)]
pub(super) struct Outbound {
    out: mpsc::Sender<TransferMigrationDataRequest>,
    patience: Duration,
}

impl Outbound {
    /// Sends what must arrive. Cancel safe: a dropped future has sent nothing.
    pub(super) async fn send(&self, frame: Frame) -> Result<(), Error> {
        self.send_within(self.patience, frame).await
    }

    /// The same, for a target that takes what was sent before within `patience`.
    pub(super) async fn send_within(&self, patience: Duration, frame: Frame) -> Result<(), Error> {
        let frame = TransferMigrationDataRequest { frame: Some(frame) };
        self.out.send_timeout(frame, patience).await.map_err(|error| match error {
            mpsc::error::SendTimeoutError::Timeout(_) => idle(patience),
            mpsc::error::SendTimeoutError::Closed(_) => broken(),
        })
    }

    /// Sends what the next of its kind repeats.
    pub(super) fn offer(&self, frame: Frame) -> bool {
        self.out.try_send(TransferMigrationDataRequest { frame: Some(frame) }).is_ok()
    }
}

impl Link {
    /// Opens a stream with `header`.
    ///
    /// Cancel safe: a dropped future leaves no stream behind; the target may have seen the header.
    pub(super) async fn open<C: GrpcChannel>(channel: C, header: Header) -> Result<Self, Error> {
        let (out, frames) = mpsc::channel(QUEUE);
        let first = TransferMigrationDataRequest { frame: Some(Frame::Header(header)) };
        out.try_send(first).map_err(|_| broken())?;
        // The target decides how large a batch may be; our own limit is the protocol's.
        let body = Outgoing::new(frames, largest_message(*BATCH_BYTES.end()));
        let mut client = MigrationServiceClient::new(WithBody::new(channel, body))
            .max_decoding_message_size(MESSAGE_OVERHEAD * 2);
        let opening = async {
            let mut answers = client.transfer_migration_data(tokio_stream::empty()).await?.into_inner();
            match answers.message().await?.and_then(|answer| answer.frame) {
                Some(Answer::Accepted(accepted)) => Ok((accepted, answers)),
                Some(_) => {
                    Err(unexpected("the target answered the header with something else than Accepted"))
                }
                None => Err(broken()),
            }
        };
        let (accepted, mut answers) =
            timeout(ACCEPT_TIMEOUT, opening).await.unwrap_or_else(|_| Err(idle(ACCEPT_TIMEOUT)))?;
        check(&accepted)?;
        let silence = Duration::from_millis(accepted.idle_timeout_ms).min(MAX_IDLE);
        let first = Ack { credit_limit: accepted.credit_limit, ..Ack::default() };
        let (acks, latest) = watch::channel(first);
        let (say, said) = mpsc::channel(ANSWERS);
        // A target that answers without end keeps nobody else from a turn.
        let reader = tokio::spawn(async move {
            let end = loop {
                let answer = match timeout(silence, cooperative(answers.message())).await {
                    Err(_) => break idle(silence),
                    Ok(Err(status)) => break Error::from(status),
                    Ok(Ok(None)) => break broken(),
                    Ok(Ok(Some(answer))) => answer.frame,
                };
                let said = match answer {
                    Some(Answer::Ack(ack)) => {
                        acks.send_modify(|latest| merge(latest, ack));
                        continue;
                    }
                    Some(Answer::Prepared(prepared)) => Said::Prepared(prepared),
                    Some(Answer::PrepareRefused(refused)) => Said::Refused(refused),
                    Some(Answer::Committed(committed)) => Said::Committed(committed),
                    Some(Answer::Discarded(discarded)) => Said::Discarded(discarded),
                    Some(Answer::Forgotten(_)) => Said::Forgotten,
                    Some(Answer::Accepted(_)) => break unexpected("the target accepted twice"),
                    None => break unexpected("the target sent a frame that this version does not know"),
                };
                if say.send(Ok(said)).await.is_err() {
                    return;
                }
            };
            let _ = say.send(Err(end)).await;
        });
        Ok(Self { accepted, idle: silence, out, acks: latest, said, _reader: AbortOnDropHandle::new(reader) })
    }

    /// A way into the stream.
    pub(super) fn outbound(&self) -> Outbound {
        Outbound { out: self.out.clone(), patience: self.idle }
    }

    /// What the target says next; an error once the stream is over.
    pub(super) async fn next(&mut self) -> Result<Said, Error> {
        self.said.recv().await.unwrap_or_else(|| Err(broken()))
    }

    /// The same, for as long as the target is not silent for `silence`: acknowledgements count as signs of life, too.
    pub(super) async fn next_within(&mut self, silence: Duration) -> Result<Said, Error> {
        let Self { said, acks, .. } = self;
        loop {
            tokio::select! {
                biased;
                said = said.recv() => return said.unwrap_or_else(|| Err(broken())),
                Ok(()) = acks.changed() => {}
                () = sleep(silence) => return Err(idle(silence)),
            }
        }
    }
}

/// What a target may not declare, since nothing could work with it.
fn check(accepted: &Accepted) -> Result<(), Error> {
    if !BATCH_BYTES.contains(&accepted.max_batch_bytes) {
        let text = format!(
            "the target takes batches of {} bytes; the protocol says 64 KiB to 64 MiB",
            accepted.max_batch_bytes
        );
        return Err(unexpected(&text));
    }
    if accepted.credit_limit < u64::from(accepted.max_batch_bytes) {
        return Err(unexpected("the target gives less credit than one batch takes"));
    }
    if accepted.idle_timeout_ms < 3000 {
        return Err(unexpected("the target gives up after less than 3 s, which the protocol does not allow"));
    }
    Ok(())
}

/// Each number only rises; a reordered or repeated `Ack` takes nothing back.
fn merge(latest: &mut Ack, ack: Ack) {
    latest.received_number = latest.received_number.max(ack.received_number);
    latest.durable_number = latest.durable_number.max(ack.durable_number);
    latest.durable_seq = latest.durable_seq.max(ack.durable_seq);
    latest.credit_limit = latest.credit_limit.max(ack.credit_limit);
    latest.staged_keys = ack.staged_keys;
    latest.staged_bytes = ack.staged_bytes;
    latest.throttled_ms = latest.throttled_ms.max(ack.throttled_ms);
    latest.state = ack.state;
}

pub(super) fn broken() -> Error {
    Reason::StreamEndedEarly.error("the stream to the target broke; what is durable there stays")
}

fn idle(after: Duration) -> Error {
    Reason::IdleTimeout.error(format!("the target was silent for {} ms", after.as_millis()))
}

/// The target does not keep the protocol. Tried again: another version may be there by then.
pub(super) fn unexpected(what: &str) -> Error {
    Reason::UnexpectedFrame.error(what).retry_after(Duration::from_secs(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_ack_takes_nothing_back() {
        let mut latest = Ack { durable_number: 5, durable_seq: 50, credit_limit: 500, ..Ack::default() };
        merge(&mut latest, Ack { durable_number: 4, durable_seq: 40, credit_limit: 400, ..Ack::default() });
        assert_eq!((latest.durable_number, latest.durable_seq, latest.credit_limit), (5, 50, 500));
    }

    #[test]
    fn a_target_that_nothing_can_work_with_is_told_apart() {
        let good = Accepted {
            max_batch_bytes: 1 << 20,
            credit_limit: 1 << 20,
            idle_timeout_ms: 3000,
            ..Accepted::default()
        };
        assert!(check(&good).is_ok());
        for bad in [
            Accepted { max_batch_bytes: 1000, ..good.clone() },
            Accepted { max_batch_bytes: u32::MAX, ..good.clone() },
            Accepted { credit_limit: 1000, ..good.clone() },
            Accepted { idle_timeout_ms: 10, ..good.clone() },
        ] {
            assert!(check(&bad).unwrap_err().is_retryable());
        }
    }
}

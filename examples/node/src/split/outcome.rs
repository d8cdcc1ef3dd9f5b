//! What became of a transfer: asked of the target, until it answers.

use proto::common::error::Error;
use proto::common::retry::Backoff;
use proto::node::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto::node::{CancelTransferRequest, Direction, GetTransferProgressRequest, TransferPhase};
use proto::snapshot::Reason;
use tonic::transport::Channel;

/// What the target says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// It owns the slots.
    Installed,
    /// It has everything, and is about to.
    Installing,
    /// It has a part.
    Partial,
    /// It has ended without taking over, and will not.
    Ended,
    /// It knows nothing of it.
    Unknown,
}

/// Asks once.
pub(super) async fn ask(address: &str, transfer: &str) -> Result<Answer, Error> {
    let request =
        GetTransferProgressRequest { transfer_id: transfer.into(), direction: Direction::In.into() };
    let asked = connect(address).await?.get_transfer_progress(request).await;
    match asked.map_err(Error::from) {
        Ok(reply) => {
            let phase = reply.into_inner().transfer.unwrap_or_default().phase();
            Ok(match phase {
                TransferPhase::Installed => Answer::Installed,
                TransferPhase::Installing | TransferPhase::Verifying => Answer::Installing,
                TransferPhase::Cancelled | TransferPhase::Expired | TransferPhase::Failed => Answer::Ended,
                _ => Answer::Partial,
            })
        }
        Err(error) if error.is(Reason::TransferNotFound) => Ok(Answer::Unknown),
        Err(error) => Err(error),
    }
}

/// Asks until there is an answer.
pub(super) async fn ask_until_answered(
    address: &str,
    transfer: &str,
    mut failed: impl FnMut(&Error),
) -> Answer {
    let mut pauses = Backoff::default().start();
    loop {
        match ask(address, transfer).await {
            Ok(answer) => return answer,
            Err(error) => {
                failed(&error);
                // Also after an error that says that asking again is of no use: the slots are held until there is an answer.
                let pause = pauses.next(&error).unwrap_or(std::time::Duration::from_secs(5));
                tokio::time::sleep(pause).await;
            }
        }
    }
}

/// Has the target discard what it has. An error may mean that it is too late; ask again.
pub(super) async fn cancel(address: &str, transfer: &str) -> Result<(), Error> {
    let request = CancelTransferRequest { transfer_id: transfer.into(), ..CancelTransferRequest::default() };
    connect(address).await?.cancel_transfer(request).await.map_err(Error::from)?;
    Ok(())
}

async fn connect(address: &str) -> Result<SplitSnapshotServiceClient<Channel>, Error> {
    let endpoint = proto::common::tuning::endpoint(address)?;
    let channel = proto::common::connect::Connect::connect(&endpoint).await?;
    Ok(SplitSnapshotServiceClient::new(channel))
}

//! The progress of a transfer, as the sending node tells it over gRPC.

use std::time::Duration;

use anyhow::Context as _;
use proto::common::error::Error;
use proto::node::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto::node::{Direction, GetTransferProgressRequest, TransferProgress, WatchTransferProgressRequest};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::Channel;

const PAUSE: Duration = Duration::from_millis(100);

/// Watches until it is dropped.
pub(super) struct Watching {
    seen: watch::Receiver<Option<TransferProgress>>,
    task: JoinHandle<()>,
}

impl Watching {
    pub(super) fn start(address: &str, transfer: &str) -> Self {
        let (tell, seen) = watch::channel(None);
        let (address, transfer) = (address.to_owned(), transfer.to_owned());
        let task = tokio::spawn(async move {
            loop {
                // The transfer is not there yet, or the stream broke: watched again.
                if follow(&address, &transfer, &tell).await.is_ok() {
                    return;
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
        Self { seen, task }
    }

    /// The latest state, if there is a new one within `patience`.
    pub(super) async fn changed(&mut self, patience: Duration) -> Option<TransferProgress> {
        match tokio::time::timeout(patience, self.seen.changed()).await {
            Ok(Ok(())) => self.seen.borrow_and_update().clone(),
            // It has ended: nothing comes any more, and the caller must not spin.
            Ok(Err(_)) => {
                tokio::time::sleep(patience).await;
                None
            }
            Err(_) => None,
        }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn follow(
    address: &str,
    transfer: &str,
    tell: &watch::Sender<Option<TransferProgress>>,
) -> anyhow::Result<()> {
    let request =
        WatchTransferProgressRequest { transfer_id: transfer.into(), direction: Direction::Out.into() };
    let mut states = connect(address).await?.watch_transfer_progress(request).await?.into_inner();
    while let Some(state) = states.message().await? {
        tell.send_replace(state.transfer);
    }
    Ok(())
}

/// The state of a transfer now.
pub(super) async fn last(address: &str, transfer: &str) -> anyhow::Result<TransferProgress> {
    let request =
        GetTransferProgressRequest { transfer_id: transfer.into(), direction: Direction::Out.into() };
    let reply = connect(address).await?.get_transfer_progress(request).await.map_err(Error::from)?;
    reply.into_inner().transfer.context("a progress without a transfer")
}

async fn connect(address: &str) -> anyhow::Result<SplitSnapshotServiceClient<Channel>> {
    let endpoint = proto::common::tuning::endpoint(address)?;
    Ok(SplitSnapshotServiceClient::new(proto::common::connect::Connect::connect(&endpoint).await?))
}

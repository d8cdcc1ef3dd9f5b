//! The progress of a transfer or a migration, as the node that gives rows away tells it over gRPC.

use std::time::Duration;

use anyhow::Context as _;
use proto::common::error::Error;
use proto::node::migration_service_client::MigrationServiceClient;
use proto::node::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto::node::{
    Direction, GetMigrationProgressRequest, GetTransferProgressRequest, MigrationProgress, TransferProgress,
    WatchMigrationProgressRequest, WatchTransferProgressRequest,
};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::Channel;

const PAUSE: Duration = Duration::from_millis(100);

/// Watches until it is dropped.
pub(super) struct Watching<P> {
    seen: watch::Receiver<Option<P>>,
    task: JoinHandle<()>,
}

impl<P: Clone + Send + Sync + 'static> Watching<P> {
    /// Runs `follow`, which tells what it sees, again and again until one has seen the end.
    fn start<F>(follow: impl Fn(watch::Sender<Option<P>>) -> F + Send + 'static) -> Self
    where
        F: Future<Output = anyhow::Result<()>> + Send,
    {
        let (tell, seen) = watch::channel(None);
        let task = tokio::spawn(async move {
            // It is not there yet, or the stream broke: watched again.
            while follow(tell.clone()).await.is_err() {
                tokio::time::sleep(PAUSE).await;
            }
        });
        Self { seen, task }
    }

    /// The latest state, if there is a new one within `patience`.
    pub(super) async fn changed(&mut self, patience: Duration) -> Option<P> {
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

impl<P> Drop for Watching<P> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Watches a transfer.
pub(super) fn transfer(address: &str, id: &str) -> Watching<TransferProgress> {
    let (address, id) = (address.to_owned(), id.to_owned());
    Watching::start(move |tell| {
        let request =
            WatchTransferProgressRequest { transfer_id: id.clone(), direction: Direction::Out.into() };
        let address = address.clone();
        async move {
            let mut client = SplitSnapshotServiceClient::new(connect(&address).await?);
            let mut states = client.watch_transfer_progress(request).await?.into_inner();
            while let Some(state) = states.message().await? {
                tell.send_replace(state.transfer);
            }
            Ok(())
        }
    })
}

/// The state of a transfer now.
pub(super) async fn last_transfer(address: &str, id: &str) -> anyhow::Result<TransferProgress> {
    let request = GetTransferProgressRequest { transfer_id: id.into(), direction: Direction::Out.into() };
    let mut client = SplitSnapshotServiceClient::new(connect(address).await?);
    let reply = client.get_transfer_progress(request).await.map_err(Error::from)?;
    reply.into_inner().transfer.context("a progress without a transfer")
}

/// Watches a migration.
pub(super) fn migration(address: &str, id: &str) -> Watching<MigrationProgress> {
    let (address, id) = (address.to_owned(), id.to_owned());
    Watching::start(move |tell| {
        let request =
            WatchMigrationProgressRequest { migration_id: id.clone(), direction: Direction::Out.into() };
        let address = address.clone();
        async move {
            let mut client = MigrationServiceClient::new(connect(&address).await?);
            let mut states = client.watch_migration_progress(request).await?.into_inner();
            while let Some(state) = states.message().await? {
                tell.send_replace(state.migration);
            }
            Ok(())
        }
    })
}

/// The state of a migration now.
pub(super) async fn last_migration(address: &str, id: &str) -> anyhow::Result<MigrationProgress> {
    let request = GetMigrationProgressRequest { migration_id: id.into(), direction: Direction::Out.into() };
    let mut client = MigrationServiceClient::new(connect(address).await?);
    let reply = client.get_migration_progress(request).await.map_err(Error::from)?;
    reply.into_inner().migration.context("a progress without a migration")
}

/// A connection to a node's gRPC port.
pub(super) async fn connect(address: &str) -> anyhow::Result<Channel> {
    let endpoint = proto::common::tuning::endpoint(address)?;
    Ok(proto::common::connect::Connect::connect(&endpoint).await?)
}

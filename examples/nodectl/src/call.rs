//! Questions to a node, with one time limit for connection and answer.

use std::time::Duration;

use proto::common::error::{Code, Error};
use proto::node::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto::snapshot::limits::MAX_MESSAGE_BYTES;
use tonic::Status;
use tonic::transport::Channel;

use crate::address::Address;

/// A client over a connection of its own.
pub(crate) type Client = SplitSnapshotServiceClient<Channel>;

/// Connects to `address` and asks it, within `limit`.
pub(crate) async fn ask<T>(
    address: &Address,
    limit: Duration,
    question: impl AsyncFnOnce(Client) -> Result<T, Status>,
) -> Result<T, Error> {
    let asked = async {
        let channel = address.endpoint().connect_timeout(limit);
        let channel = proto::common::connect::Connect::connect(&channel).await?;
        let client = Client::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        question(client).await.map_err(Error::from)
    };
    tokio::time::timeout(limit, asked).await.unwrap_or_else(|_| {
        let message = format!("no answer from {address} within {}", humantime::format_duration(limit));
        Err(Error::with_code(Code::DeadlineExceeded, "NO_ANSWER", message))
    })
}

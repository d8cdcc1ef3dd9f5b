//! Questions to a node, with one time limit for connection and answer.

use std::time::Duration;

use proto::common::dial::NodeChannel;
use proto::common::error::{Code, CommonReason, Error};
use proto::node::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto::snapshot::limits::MAX_ANSWER_BYTES;
use tonic::{Code as StatusCode, Status};

use crate::address::Address;
use crate::bounds::Listed;
use crate::trust;

/// A client over a connection of its own.
pub(crate) type Client = SplitSnapshotServiceClient<NodeChannel>;

/// Connects to `address` and asks its snapshot service, within `limit`.
pub(crate) async fn ask<T>(
    address: &Address,
    limit: Duration,
    question: impl AsyncFnOnce(Client) -> Result<T, Status>,
) -> Result<T, Error> {
    ask_over(address, limit, async |channel| {
        question(Client::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES)).await
    })
    .await
}

/// Connects to `address` and asks it whatever over that connection, within `limit`.
pub(crate) async fn ask_over<T>(
    address: &Address,
    limit: Duration,
    question: impl AsyncFnOnce(NodeChannel) -> Result<T, Status>,
) -> Result<T, Error> {
    let asked = async {
        let channel = address.dial(None)?.connect_timeout(limit);
        let channel = proto::common::connect::Connect::connect(&channel).await?;
        question(channel).await.map_err(Error::from)
    };
    let asked = tokio::time::timeout(limit, asked).await.unwrap_or_else(|_| {
        let message = format!("no answer from {address} within {}", humantime::format_duration(limit));
        Err(Error::with_code(Code::DeadlineExceeded, "NO_ANSWER", message))
    });
    asked.map_err(|error| located(broken(error), address))
}

/// Pages that are read of a list. An honest node has some 2300 entries, which are 24 pages, or 230 small ones.
const PAGES: usize = 400;

/// All of a list, whose pages of so many entries `page` asks for: the entries, and the token of the next page. `sizes` are that of a page, and that of one where the first kind
/// is too large to be taken.
pub(crate) async fn all_pages<T: Listed>(
    what: &str,
    sizes: [u32; 2],
    mut page: impl AsyncFnMut(u32, String) -> Result<(Vec<T>, String), Status>,
) -> Result<Vec<T>, Status> {
    let [mut size, small] = sizes;
    let mut all = Vec::new();
    let mut token = String::new();
    for _ in 0..PAGES {
        let (mut entries, next) = match page(size, token.clone()).await {
            Err(status) if status.code() == StatusCode::OutOfRange && size > small => {
                size = small;
                continue;
            }
            answer => answer?,
        };
        if u32::try_from(entries.len()).is_ok_and(|len| len <= size) {
            entries.iter_mut().try_for_each(T::bound)?;
            // One that repeats itself ends here.
            let is_last = next.is_empty() || entries.is_empty();
            all.extend(entries);
            token = next;
            if is_last {
                return Ok(all);
            }
        } else {
            let told = entries.len();
            return Err(Status::out_of_range(format!(
                "a page of {told} {what}, where {size} were asked for"
            )));
        }
    }
    Err(Status::out_of_range(format!(
        "it goes on after {} {what} on {PAGES} pages, which no node has",
        all.len()
    )))
}

/// A connection that broke in the middle, in words. Such is what a listener that wants TLS makes of plaintext.
fn broken(error: Error) -> Error {
    let Some((_, cause)) = error.message().split_once("transport error: ") else { return error };
    if !error.is(CommonReason::Unavailable) {
        return error;
    }
    let plaintext = cfg!(feature = "tls") && !trust::dialer().is_encrypted();
    let tls = if plaintext { " (does it want TLS?)" } else { "" };
    reworded(&error, format!("the connection broke before there was an answer{tls}: {cause}"))
}

/// `error`, with the address in it where it says nothing of the place: one that a node made of a decision of its own is
/// clear, one that a library made of a broken connection is not.
pub(crate) fn located(error: Error, address: &Address) -> Error {
    let place = address.to_string();
    let unspecific = error.message().is_empty()
        || error.is(CommonReason::Unavailable)
        || error.reason() == error.code().name();
    if !unspecific || error.message().contains(&place) {
        return error;
    }
    let what = if error.message().is_empty() { error.reason() } else { error.message() };
    let located = reworded(&error, format!("{place}: {what}"));
    match error.retry_after_hint() {
        Some(delay) => located.retry_after(delay),
        None => located,
    }
}

/// The error that ended a task, with `what` before its sentence. It is no advice to try again.
pub(crate) fn headed(error: &Error, what: &str) -> Error {
    reworded(error, format!("{what}: {}", error.message()))
}

fn reworded(error: &Error, message: String) -> Error {
    let mut reworded = Error::with_code(error.code(), error.reason().to_owned(), message);
    for (name, value) in error.metadata_map() {
        reworded = reworded.metadata(name, value);
    }
    reworded
}

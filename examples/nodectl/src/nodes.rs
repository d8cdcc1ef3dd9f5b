//! Many nodes, asked at the same time; the answers come in the order of the addresses.

use std::future::Future;

use futures::StreamExt as _;
use proto::common::error::Error;

use crate::address::Address;
use crate::args::Nodes;

/// Nodes that are asked at the same time.
const AT_ONCE: usize = 64;

/// What a node answered, or why it did not.
#[derive(Debug)]
pub(crate) struct Answered<T> {
    pub(crate) address: String,
    pub(crate) answer: Result<T, Error>,
}

/// Asks all of them.
pub(crate) async fn ask_all<T, F>(nodes: &Nodes, ask: impl Fn(Address) -> F) -> Vec<Answered<T>>
where
    F: Future<Output = Result<T, Error>>,
{
    let asking = nodes.addresses.iter().map(|address| {
        let asked = ask(address.clone());
        async move { Answered { address: address.to_string(), answer: asked.await } }
    });
    futures::stream::iter(asking).buffered(AT_ONCE).collect().await
}

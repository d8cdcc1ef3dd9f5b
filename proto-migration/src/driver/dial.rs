//! Where connections to targets come from.

use std::future::Future;

use proto_common::connect::GrpcChannel;
use proto_common::error::Error;
use proto_common::ids::NodeId;

/// Opens connections to other nodes by their address.
///
/// [`Dialer`](proto_common::dial::Dialer) is one (feature `channel`), [`dial_fn`] turns a closure into one.
pub trait Dial: Send + Sync + 'static {
    /// What a generated client is made of.
    type Channel: GrpcChannel;

    /// Opens a new connection, shared with nobody: bulk data would stall what shares it.
    ///
    /// Bounded in time by the implementation. Cancel safe.
    ///
    /// # Errors
    ///
    /// Retryable ones (`UNAVAILABLE`) where trying again can help; anything else fails a migration that was never accepted.
    fn dial(&self, node: &NodeId, address: &str)
    -> impl Future<Output = Result<Self::Channel, Error>> + Send;

    /// Whether `address` is one, before anything is persisted.
    ///
    /// # Errors
    ///
    /// `INVALID_FIELD`.
    fn check(&self, address: &str) -> Result<(), Error> {
        let _ = address;
        Ok(())
    }
}

/// In plaintext or by TLS; by TLS whoever answers has to be that node.
#[cfg(feature = "channel")]
impl Dial for proto_common::dial::Dialer {
    type Channel = proto_common::dial::NodeChannel;

    async fn dial(&self, node: &NodeId, address: &str) -> Result<Self::Channel, Error> {
        proto_common::connect::Connect::connect(&self.to(address, Some(node))?).await
    }

    fn check(&self, address: &str) -> Result<(), Error> {
        self.to(address, None).map(drop)
    }
}

/// A [`Dial`] from a closure that opens one connection per call.
pub fn dial_fn<F, Fut, C>(dial: F) -> DialFn<F>
where
    F: Fn(NodeId, String) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<C, Error>> + Send,
    C: GrpcChannel,
{
    DialFn(dial)
}

/// See [`dial_fn`].
#[derive(Clone, Copy)]
pub struct DialFn<F>(F);

impl<F> std::fmt::Debug for DialFn<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DialFn(..)")
    }
}

impl<F, Fut, C> Dial for DialFn<F>
where
    F: Fn(NodeId, String) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<C, Error>> + Send,
    C: GrpcChannel,
{
    type Channel = C;

    fn dial(&self, node: &NodeId, address: &str) -> impl Future<Output = Result<C, Error>> + Send {
        (self.0)(node.clone(), address.to_owned())
    }
}

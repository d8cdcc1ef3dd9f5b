//! Factories of connections.
//!
//! A sender that reconnects, and one that uses several lanes, needs *new* connections rather than clones of a channel: bulk data never
//! shares a connection with health or control, because one unread stream pins the window of all.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use tonic::body::Body;
use tonic::client::GrpcService;

use crate::error::Error;

type StdError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// Everything that a generated client asks of its channel, under one name. Implemented for every type that fits, such as
/// `tonic::transport::Channel`, one wrapped in layers, or a server in the same process.
pub trait GrpcChannel:
    GrpcService<
        Body,
        Error: Into<StdError> + Send,
        Future: Send,
        ResponseBody: http_body::Body<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
    > + Clone
    + Send
    + Sync
    + 'static
{
}

impl<T> GrpcChannel for T
where
    T: GrpcService<Body> + Clone + Send + Sync + 'static,
    T::Error: Into<StdError> + Send,
    T::Future: Send,
    T::ResponseBody: http_body::Body<Data = Bytes> + Send + 'static,
    <T::ResponseBody as http_body::Body>::Error: Into<StdError> + Send,
{
}

/// Makes connections to one peer.
///
/// `dial::Dial`, which knows TLS, and `tonic::transport::Endpoint` are some (feature `channel`), [`connect_fn`] turns a closure into one. An `Arc` of one is one too.
pub trait Connect: Send + Sync + 'static {
    /// What a generated client is made of.
    type Channel: GrpcChannel;

    /// Opens a new connection, shared with nobody.
    ///
    /// Bounded in time by the implementation. Cancel safe: a dropped future leaves no connection behind.
    ///
    /// # Errors
    ///
    /// Retryable ones (`UNAVAILABLE`) where trying again can help; anything else is taken as final.
    fn connect(&self) -> impl Future<Output = Result<Self::Channel, Error>> + Send;
}

impl<C: Connect> Connect for Arc<C> {
    type Channel = C::Channel;

    fn connect(&self) -> impl Future<Output = Result<Self::Channel, Error>> + Send {
        (**self).connect()
    }
}

/// A new TCP connection each time; `UNAVAILABLE` with metadata `address` if there is none.
#[cfg(feature = "channel")]
impl Connect for tonic::transport::Endpoint {
    type Channel = tonic::transport::Channel;

    async fn connect(&self) -> Result<Self::Channel, Error> {
        tonic::transport::Endpoint::connect(self).await.map_err(|error| no_connection(self, error))
    }
}

#[cfg(feature = "channel")]
pub(crate) fn no_connection(to: &tonic::transport::Endpoint, error: tonic::transport::Error) -> Error {
    let address = to.uri().authority().map_or_else(String::new, ToString::to_string);
    let message = format!("cannot connect to {address}: {}", deepest(&error));
    Error::new(crate::error::CommonReason::Unavailable, message).metadata("address", address).caused_by(error)
}

/// What happened: tonic's own text is only "transport error".
#[cfg(feature = "channel")]
pub(crate) fn deepest(error: &dyn std::error::Error) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}

/// A [`Connect`] from a closure that opens one connection per call.
pub fn connect_fn<F, Fut, C>(connect: F) -> ConnectFn<F>
where
    F: Fn() -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<C, Error>> + Send,
    C: GrpcChannel,
{
    ConnectFn(connect)
}

/// See [`connect_fn`].
#[derive(Clone, Copy)]
pub struct ConnectFn<F>(F);

impl<F> std::fmt::Debug for ConnectFn<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ConnectFn(..)")
    }
}

impl<F, Fut, C> Connect for ConnectFn<F>
where
    F: Fn() -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<C, Error>> + Send,
    C: GrpcChannel,
{
    type Channel = C;

    fn connect(&self) -> impl Future<Output = Result<C, Error>> + Send {
        (self.0)()
    }
}

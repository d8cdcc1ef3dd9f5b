//! Who may call.

use proto_common::error::Error;
use proto_common::ids::NodeId;

/// A call, before it is answered.
#[derive(Debug)]
pub struct Call<'a> {
    /// `HealthCheck`, `WatchHealth` or `GetNodeStatus`.
    pub method: &'static str,
    /// The node that the caller says it is.
    pub from: Option<&'a NodeId>,
    /// Of the request: with TLS, tonic puts the peer's certificates there.
    pub extensions: &'a http::Extensions,
}

/// Decides per call. Without one, everybody may ask.
///
/// Where peers have certificates, `from` has to be the node of the caller's: refuse it otherwise. The standard protocol has no
/// such thing: its callers are probes.
pub trait Authorizer: Send + Sync + 'static {
    /// Lets the call pass.
    ///
    /// # Errors
    ///
    /// Why not; [`Reason::PermissionDenied`](crate::Reason::PermissionDenied).
    fn authorize(&self, call: &Call<'_>) -> Result<(), Error>;
}

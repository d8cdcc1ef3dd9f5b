//! The guard in front of a service.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;

use super::answers::Answered;
use super::{Access, CLUSTER_METADATA, Caller};
use crate::peer::{Peer, PeerKey};

/// Longest name of a method that is looked at; all of ours are shorter.
const MAX_METHOD: usize = 128;

/// `S`, which only those reach that [`Access`] lets pass. See the [module](super).
#[derive(Debug, Clone)]
pub struct Guarded<S> {
    inner: S,
    access: Access,
}

impl<S> Guarded<S> {
    /// Puts `access` in front of `inner`.
    pub fn new(inner: S, access: Access) -> Self {
        Self { inner, access }
    }
}

impl<S: NamedService> NamedService for Guarded<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> Service<http::Request<B>> for Guarded<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>> + NamedService,
    S::Future: Unpin,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Answer<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        let peer = peer_of(request.extensions());
        let key = peer.key();
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        let method = if method.len() > MAX_METHOD { "" } else { method };
        let meant = request.headers().get(CLUSTER_METADATA).map(http::HeaderValue::as_bytes);
        if let Err(error) = self.access.admit(&peer, S::NAME, method, meant) {
            tracing::debug!(%peer, service = S::NAME, method, reason = error.reason(), "call refused");
            return Answer::Refused(Some(error.into()));
        }
        let caller =
            Caller { peer, access: self.access.clone(), service: S::NAME, method: Arc::from(method) };
        request.extensions_mut().insert(caller);
        // A copy: it is made of slices of the buffer that the connection read it into, and of a request, that is all that is.
        if let Ok(uri) = http::Uri::try_from(request.uri().to_string()) {
            *request.uri_mut() = uri;
        }
        Answer::Passed(self.inner.call(request), key)
    }
}

/// Who is at the other end: whom the listener has put there, else whom tonic says to be connected.
fn peer_of(extensions: &http::Extensions) -> Peer {
    if let Some(peer) = extensions.get::<Peer>() {
        return peer.clone();
    }
    #[cfg(feature = "listen")]
    {
        use tonic::transport::server::TcpConnectInfo;
        Peer::plaintext(extensions.get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr))
    }
    #[cfg(not(feature = "listen"))]
    Peer::anonymous()
}

/// What [`Guarded`] answers.
#[derive(Debug)]
pub enum Answer<F> {
    /// The call was refused.
    Refused(Option<Status>),
    /// The service answers, to this peer.
    Passed(F, PeerKey),
}

impl<F, E> Future for Answer<F>
where
    F: Future<Output = Result<http::Response<Body>, E>> + Unpin,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Self::Refused(status) => {
                let status = status.take().unwrap_or_else(|| Status::internal("polled after its end"));
                Poll::Ready(Ok(status.into_http()))
            }
            Self::Passed(inner, peer) => {
                let (parts, body) = ready!(Pin::new(inner).poll(cx))?.into_parts();
                Poll::Ready(Ok(match Answered::new(body, peer.clone(), cx) {
                    Ok(body) => http::Response::from_parts(parts, Body::new(body)),
                    Err(status) => status.into_http(),
                }))
            }
        }
    }
}

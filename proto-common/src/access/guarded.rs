//! The guard in front of a service.

use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, ready};

use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;

use super::answers::Answered;
use super::{Access, CLUSTER_METADATA, Caller};
use crate::error::{CommonReason, Error, RETRY_AFTER};
use crate::peer::{Peer, PeerKey};
use crate::shares::{Share, Shares};

/// Longest name of a method that is looked at; all of ours are shorter.
const MAX_METHOD: usize = 128;

/// Calls that wait for their turn, of all services in this process: nobody has looked at them since they came. Whatever a call costs, others wait
/// for no more of them.
pub const UNSEEN: u64 = 4096;

/// Of them, those of one peer, while there are no others. One more is refused with `LIMIT_EXCEEDED`.
pub const UNSEEN_PER_PEER: u64 = 1024;

static CALLS: LazyLock<Shares<PeerKey>> = LazyLock::new(|| Shares::graded(UNSEEN, UNSEEN_PER_PEER));

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
        let turn = match CALLS.take(Some(&key), 1) {
            Ok(turn) => turn,
            Err(_) => return Answer::Refused(Some(too_many(&key))),
        };
        let caller =
            Caller { peer, access: self.access.clone(), service: S::NAME, method: Arc::from(method) };
        request.extensions_mut().insert(caller);
        // A copy: it is made of slices of the buffer that the connection read it into, and of a request, that is all that is.
        if let Ok(uri) = http::Uri::try_from(request.uri().to_string()) {
            *request.uri_mut() = uri;
        }
        Answer::Passed(self.inner.call(request), key, Some(turn))
    }
}

fn too_many(peer: &PeerKey) -> Status {
    let message =
        format!("{UNSEEN_PER_PEER} calls of {peer} wait for their turn; wait for the answers to some");
    let error = Error::new(CommonReason::LimitExceeded, message).retry_after(RETRY_AFTER);
    error.metadata("limit", UNSEEN_PER_PEER.to_string()).metadata("peer", peer.to_string()).into()
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
    /// The service answers, to this peer, whose share of calls it has a place of until then.
    Passed(F, PeerKey, Option<Share<PeerKey>>),
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
            Self::Passed(inner, peer, turn) => {
                *turn = None;
                let (parts, body) = ready!(Pin::new(inner).poll(cx))?.into_parts();
                Poll::Ready(Ok(match Answered::new(body, peer.clone(), cx) {
                    Ok(body) => http::Response::from_parts(parts, Body::new(body)),
                    Err(status) => status.into_http(),
                }))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::{Ready, poll_fn, ready};

    use super::*;

    struct Idle;

    impl NamedService for Idle {
        const NAME: &'static str = "test.Idle";
    }

    impl Service<http::Request<Body>> for Idle {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = Ready<Result<Self::Response, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: http::Request<Body>) -> Self::Future {
            ready(Ok(http::Response::new(Body::empty())))
        }
    }

    /// Others would wait for the answers to all of them.
    #[tokio::test]
    async fn calls_of_one_peer_that_nobody_has_looked_at_are_bounded() {
        let mut guarded = Guarded::new(Idle, Access::default());
        let mut call = |host: u8| {
            let mut request = http::Request::new(Body::empty());
            *request.uri_mut() = "/test.Idle/Call".parse().unwrap();
            request.extensions_mut().insert(Peer::plaintext(Some(([127, 0, 0, host], 1).into())));
            guarded.call(request)
        };
        let mut waiting: Vec<_> = (0..UNSEEN_PER_PEER).map(|_| call(8)).collect();
        assert!(waiting.iter().all(|answer| matches!(answer, Answer::Passed(..))));
        let answer = call(8).await.unwrap();
        let refused = Error::from(Status::from_header_map(answer.headers()).unwrap());
        assert!(refused.is(CommonReason::LimitExceeded) && refused.is_retryable(), "{refused:?}");
        assert_eq!(refused.metadata_map()["peer"], "127.0.0.8");
        assert!(matches!(call(9), Answer::Passed(..)), "another peer");
        let first = &mut waiting[0];
        poll_fn(|cx| Pin::new(&mut *first).poll(cx)).await.unwrap();
        assert!(matches!(call(8), Answer::Passed(..)), "one was looked at");
    }
}

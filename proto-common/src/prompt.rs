//! Requests that are small and come in time.
//!
//! tonic gathers the message of a unary call before a handler sees it, for as long as it takes. A peer that declares much and sends it slowly, or
//! not at all, on all streams of all its connections would hold memory that no limit of a service counts. So requests have to be small and in time, and
//! of those that are waited for there may be so many at once.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::LazyLock;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, StdError, http};
use tonic::server::NamedService;

use crate::access::Caller;
use crate::error::{CommonReason, Error, RETRY_AFTER};
use crate::peer::PeerKey;
use crate::shares::{Share, Shares};

/// Largest message of a unary call, in bytes: some identifiers, a text for people, a page token. All streams of a connection together
/// hold 5 MiB.
pub const MAX_REQUEST_BYTES: usize = 16 << 10;

/// Time for all of a request, like that for the first frame of a stream.
pub const REQUEST_TIME: Duration = Duration::from_secs(30);

/// Requests that are waited for at once in this process, because not all of them is there, or, of a stream, not its first message. Each may hold
/// [`MAX_REQUEST_BYTES`], and as much of headers: 256 MiB in all.
pub const WAITED_FOR: u64 = 8192;

/// Of them, those of one peer, while there are no others: no peer gets more than a quarter of what the others leave, so that behind peers which take all
/// that they can there is something for the next one. One more is refused with `IDLE_TIMEOUT` at once.
pub const WAITED_FOR_PER_PEER: u64 = 2048;

static WAITING: LazyLock<Shares<PeerKey>> = LazyLock::new(|| Shares::graded(WAITED_FOR, WAITED_FOR_PER_PEER));

/// `first`, the first message of a stream, which should have at most [`MAX_REQUEST_BYTES`]. Where it is not there yet, it takes a place among those that are waited for
/// meanwhile. How long that may take is for `first` to say. As cancel safe as that.
///
/// # Errors
///
/// Those of `first`; `IDLE_TIMEOUT` if there is no place, which is worth trying again.
pub async fn first<T>(peer: &PeerKey, first: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let mut first = pin!(first);
    if let Poll::Ready(first) = poll_fn(|cx| Poll::Ready(first.as_mut().poll(cx))).await {
        return first;
    }
    let _waiting = wait_for(peer)?;
    first.await
}

/// A place among those whose request is waited for, until dropped.
fn wait_for(peer: &PeerKey) -> Result<Share<PeerKey>, Error> {
    WAITING.take(Some(peer), 1).map_err(|full| {
        let message = format!(
            "not all of the request is there, and {} others are waited for already; send it again, in one piece",
            full.limit()
        );
        Error::new(CommonReason::IdleTimeout, message).retry_after(RETRY_AFTER)
    })
}

/// `S`, whose requests come within [`REQUEST_TIME`]; others fail with `IDLE_TIMEOUT`. Of a stream, that is
/// all of it: for services without client streaming, or where it is over soon.
#[derive(Debug, Clone)]
pub struct Prompt<S> {
    inner: S,
}

impl<S> Prompt<S> {
    /// Stands in front of a generated service.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S: NamedService> NamedService for Prompt<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> Service<http::Request<B>> for Prompt<S>
where
    S: Service<http::Request<Body>>,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<StdError>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        self.inner.call(in_time(request.map(Body::new)))
    }
}

/// The request, whose body has to come within [`REQUEST_TIME`] from now.
pub(crate) fn in_time(request: http::Request<Body>) -> http::Request<Body> {
    let peer = Caller::of(request.extensions()).map_or(PeerKey::Unknown, |caller| caller.peer().key());
    request.map(|body| of_peer(body, peer))
}

fn of_peer(body: Body, peer: PeerKey) -> Body {
    Body::new(PromptBody { inner: body, peer, until: Instant::now() + REQUEST_TIME, waiting: None })
}

struct PromptBody {
    inner: Body,
    peer: PeerKey,
    until: Instant,
    /// Made when something has to be waited for, which is rare.
    waiting: Option<(Pin<Box<Sleep>>, Share<PeerKey>)>,
}

impl http_body::Body for PromptBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(cx) {
            return Poll::Ready(frame);
        }
        let this = &mut *self;
        let (timer, _) = match &mut this.waiting {
            Some(waiting) => waiting,
            waiting => match wait_for(&this.peer) {
                Ok(share) => waiting.insert((Box::pin(sleep_until(this.until)), share)),
                Err(error) => return Poll::Ready(Some(Err(error.into()))),
            },
        };
        ready!(timer.as_mut().poll(cx));
        let message = format!("the request did not come within {REQUEST_TIME:?}; send it again");
        let idle = Error::new(CommonReason::IdleTimeout, message).retry_after(RETRY_AFTER);
        Poll::Ready(Some(Err(idle.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use http_body::Body as _;

    use super::*;

    /// Held by each test: there is one count of those that are waited for.
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

    /// Sends a byte every second, for ever.
    struct Drip(Pin<Box<Sleep>>);

    impl http_body::Body for Drip {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            ready!(self.0.as_mut().poll(cx));
            self.0 = Box::pin(tokio::time::sleep(Duration::from_secs(1)));
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"x")))))
        }
    }

    fn peer(host: u8) -> PeerKey {
        PeerKey::Address([10, 9, 8, host].into())
    }

    #[tokio::test]
    async fn one_request_more_of_a_peer_than_are_waited_for_is_refused_at_once() {
        let _alone = ALONE.lock().await;
        let all: Vec<_> = (0..WAITED_FOR_PER_PEER).map(|_| wait_for(&peer(2)).unwrap()).collect();
        let drip = || Body::new(Drip(Box::pin(tokio::time::sleep(Duration::from_secs(3600)))));
        let next = async |body: &mut Body| {
            let frame = std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut *body).poll_frame(cx))).await;
            match frame {
                Poll::Ready(frame) => Some(frame.unwrap().map(drop).map_err(Error::from)),
                Poll::Pending => None,
            }
        };
        let refused = next(&mut of_peer(drip(), peer(2))).await.unwrap().unwrap_err();
        assert!(refused.is(CommonReason::IdleTimeout) && refused.is_retryable(), "{refused:?}");
        // What is all there need not be waited for, and other peers are not in question.
        let there = Body::new(http_body_util::Full::new(Bytes::from_static(b"x")));
        next(&mut of_peer(there, peer(2))).await.unwrap().unwrap();
        let mut other = of_peer(drip(), peer(3));
        assert!(next(&mut other).await.is_none(), "it is waited for");
        drop((all, other));
        let mut again = of_peer(drip(), peer(2));
        assert!(next(&mut again).await.is_none());
        let rest: Vec<_> = std::iter::from_fn(|| wait_for(&peer(2)).ok()).collect();
        assert_eq!(rest.len() as u64, WAITED_FOR_PER_PEER - 1, "the one that is waited for has a place");
    }

    #[tokio::test]
    async fn a_first_message_that_is_there_takes_no_place() {
        let _alone = ALONE.lock().await;
        let all: Vec<_> = (0..WAITED_FOR_PER_PEER).map(|_| wait_for(&peer(4)).unwrap()).collect();
        assert_eq!(first(&peer(4), async { Ok(7) }).await.unwrap(), 7);
        let later = || async {
            tokio::task::yield_now().await;
            Ok(7)
        };
        let refused = first(&peer(4), later()).await.unwrap_err();
        assert!(refused.is(CommonReason::IdleTimeout) && refused.is_retryable(), "{refused:?}");
        drop(all);
        assert_eq!(first(&peer(4), later()).await.unwrap(), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn a_byte_now_and_then_does_not_help() {
        let _alone = ALONE.lock().await;
        let began = Instant::now();
        let drip = Drip(Box::pin(tokio::time::sleep(Duration::from_secs(1))));
        let mut body = of_peer(Body::new(drip), peer(1));
        let mut came = 0;
        let status = loop {
            match std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await.unwrap() {
                Ok(_) => came += 1,
                Err(status) => break status,
            }
        };
        assert!((29..=30).contains(&came), "{came}");
        assert_eq!(began.elapsed().as_secs(), REQUEST_TIME.as_secs());
        let error = Error::from(status);
        assert!(error.is(CommonReason::IdleTimeout) && error.is_retryable(), "{error:?}");
    }
}

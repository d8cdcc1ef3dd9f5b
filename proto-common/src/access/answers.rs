//! Answers that a peer does not take.
//!
//! HTTP/2 lets a peer ask on all streams of all its connections and take nothing of what is answered, for as long as it likes. A page of a list is
//! small, but not eighty thousand times. So what is answered is counted until it is on its way, and who has much of it gets no more.

use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body as _, Frame};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http;

use crate::error::{CommonReason, Error, RETRY_AFTER};
use crate::peer::PeerKey;
use crate::shares::{Share, Shares};

/// Bytes of answers that were not taken, of all services in this process.
pub const UNTAKEN: u64 = 256 << 20;

/// Of them, those of one peer, while there are no others: 64 pages of the largest lists. One more is refused with `LIMIT_EXCEEDED`.
pub const UNTAKEN_PER_PEER: u64 = 64 << 20;

/// What is not counted: the messages of watches, what a stream acknowledges, and of any other message the end, since nobody tells when that was taken.
const SMALL: usize = 1 << 10;

/// A message goes in pieces of this size: the next one is made when the peer has taken something.
const PIECE: usize = 16 << 10;

static ANSWERS: LazyLock<Shares<PeerKey>> = LazyLock::new(|| Shares::graded(UNTAKEN, UNTAKEN_PER_PEER));

/// The body of an answer.
#[derive(Debug)]
pub(super) struct Answered {
    inner: Body,
    peer: PeerKey,
    /// Of a message.
    rest: Bytes,
    held: Option<Share<PeerKey>>,
    /// Behind `rest`.
    next: Option<Result<Frame<Bytes>, Status>>,
}

impl Answered {
    /// `inner` as it is answered to `peer`. What is there of it is counted at once, taken or not.
    pub(super) fn new(inner: Body, peer: PeerKey, cx: &mut Context<'_>) -> Result<Self, Status> {
        let mut body = Self { inner, peer, rest: Bytes::new(), held: None, next: None };
        if !body.inner.is_end_stream()
            && let Poll::Ready(Some(first)) = Pin::new(&mut body.inner).poll_frame(cx)
        {
            match first.map(Frame::into_data) {
                Ok(Ok(message)) => body.hold(message)?,
                Ok(Err(trailers)) => body.next = Some(Ok(trailers)),
                Err(status) => body.next = Some(Err(status)),
            }
        }
        Ok(body)
    }

    fn hold(&mut self, message: Bytes) -> Result<(), Status> {
        if message.len() > SMALL {
            let bytes = message.len() as u64;
            self.held = Some(ANSWERS.take(Some(&self.peer), bytes).map_err(|_| full(&self.peer))?);
        }
        self.rest = message;
        Ok(())
    }

    fn piece(&mut self) -> Bytes {
        let len = match self.rest.len() {
            len if len > PIECE + SMALL => PIECE,
            len if len > SMALL => len - SMALL,
            len => len,
        };
        let piece = self.rest.split_to(len);
        if self.rest.is_empty() {
            self.held = None;
        }
        piece
    }
}

fn full(peer: &PeerKey) -> Status {
    let message = format!("{peer} has not taken what was answered before; take that first");
    let error = Error::new(CommonReason::LimitExceeded, message).retry_after(RETRY_AFTER);
    error.metadata("limit", UNTAKEN_PER_PEER.to_string()).metadata("peer", peer.to_string()).into()
}

impl http_body::Body for Answered {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            if !this.rest.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(this.piece()))));
            }
            if let Some(next) = this.next.take() {
                return Poll::Ready(Some(next));
            }
            match ready!(Pin::new(&mut this.inner).poll_frame(cx)).map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(message))) => {
                    if let Err(status) = this.hold(message) {
                        // Told as the end of the answer, which is one.
                        this.inner = Body::empty();
                        let mut trailers = http::HeaderMap::new();
                        let added = status.add_header(&mut trailers);
                        return Poll::Ready(Some(added.map(|()| Frame::trailers(trailers))));
                    }
                }
                Some(Ok(Err(trailers))) => return Poll::Ready(Some(Ok(trailers))),
                Some(Err(status)) => return Poll::Ready(Some(Err(status))),
                None => return Poll::Ready(None),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.next.is_none() && self.inner.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::{Ready, ready};
    use std::net::SocketAddr;

    use http_body_util::{BodyExt as _, Full, StreamBody};
    use tonic::codegen::Service;
    use tonic::server::NamedService;

    use super::*;
    use crate::access::{Access, AllowAll, Guarded};
    use crate::peer::Peer;

    /// Held by each test: there is one count of what was not taken.
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

    /// Answers every call with a message of so many bytes.
    #[derive(Clone)]
    struct Large(usize);

    impl NamedService for Large {
        const NAME: &'static str = "test.Test";
    }

    impl Service<http::Request<Body>> for Large {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = Ready<Result<Self::Response, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: http::Request<Body>) -> Self::Future {
            let message =
                Bytes::from((0..self.0).map(|at| u8::try_from(at % 251).unwrap()).collect::<Vec<_>>());
            ready(Ok(http::Response::new(Body::new(Full::new(message)))))
        }
    }

    /// The body of an answer to a peer at that address, or why there is none.
    async fn ask(bytes: usize, host: u8) -> Result<Body, Error> {
        let peer = Peer::plaintext(Some(SocketAddr::from(([10, 7, 0, host], 1))));
        let mut request = http::Request::new(Body::empty());
        request.extensions_mut().insert(peer);
        let access = Access::new(None, AllowAll);
        let response = Guarded::new(Large(bytes), access).call(request).await.unwrap();
        match Status::from_header_map(response.headers()) {
            Some(status) => Err(status.into()),
            None => Ok(response.into_body()),
        }
    }

    #[tokio::test]
    async fn who_takes_nothing_gets_no_more_and_others_do() {
        const MIB: usize = 1 << 20;
        let _alone = ALONE.lock().await;
        let mut untaken = Vec::new();
        for _ in 0..64 {
            untaken.push(ask(MIB, 1).await.unwrap());
        }
        let refused = ask(MIB, 1).await.unwrap_err();
        assert!(refused.is(CommonReason::LimitExceeded) && refused.is_retryable(), "{refused:?}");
        assert_eq!(refused.get("peer"), Some("10.7.0.1"));
        // What is small is answered all the same, and others are.
        ask(SMALL, 1).await.unwrap();
        ask(MIB, 2).await.unwrap();
        // Whoever has all but the end of it, or has gone away, has taken it.
        let mut last = untaken.pop().unwrap();
        let mut taken = 0;
        while taken < MIB - SMALL {
            assert!(ask(MIB, 1).await.is_err(), "{taken}");
            let piece = last.frame().await.unwrap().unwrap().into_data().unwrap();
            assert!(piece.len() <= PIECE);
            taken += piece.len();
        }
        assert_eq!(last.frame().await.unwrap().unwrap().into_data().unwrap().len(), SMALL);
        drop(ask(MIB, 1).await.unwrap());
        drop(untaken);
        assert_eq!(ask(60 * MIB, 1).await.unwrap().collect().await.unwrap().to_bytes().len(), 60 * MIB);
    }

    #[tokio::test]
    async fn a_stream_of_messages_that_are_not_taken_ends_with_the_reason() {
        let _alone = ALONE.lock().await;
        let mut untaken = Vec::new();
        while let Ok(body) = ask(1 << 20, 4).await {
            untaken.push(body);
        }
        let message = |len| Ok::<_, Status>(Frame::data(Bytes::from(vec![7; len])));
        let messages = tokio_stream::iter([message(SMALL), message(1 << 20), message(1)]);
        let peer = Peer::plaintext(Some(SocketAddr::from(([10, 7, 0, 4], 1)))).key();
        let cx = &mut Context::from_waker(std::task::Waker::noop());
        let mut body = Answered::new(Body::new(StreamBody::new(messages)), peer, cx).unwrap();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap().len(), SMALL);
        let trailers = body.frame().await.unwrap().unwrap().into_trailers().unwrap();
        let error = Error::from(Status::from_header_map(&trailers).unwrap());
        assert!(error.is(CommonReason::LimitExceeded), "{error:?}");
        assert!(body.frame().await.is_none());
    }

    #[tokio::test]
    async fn it_is_what_was_answered() {
        let _alone = ALONE.lock().await;
        for bytes in [0, 1, SMALL, SMALL + 1, PIECE, PIECE + SMALL, PIECE + SMALL + 1, 100_000] {
            let answered = ask(bytes, 3).await.unwrap();
            assert_eq!(answered.is_end_stream(), bytes == 0);
            let answered = answered.collect().await.unwrap().to_bytes();
            let meant = Large(bytes).call(http::Request::new(Body::empty())).await.unwrap();
            assert_eq!(answered, meant.into_body().collect().await.unwrap().to_bytes());
        }
    }
}

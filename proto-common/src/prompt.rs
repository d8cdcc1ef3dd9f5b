//! Requests that are small and come in time.
//!
//! tonic gathers the message of a unary call before a handler sees it, for as long as it takes. A peer that declares much and sends it slowly, or
//! not at all, on all streams of all its connections would hold memory that no limit of a service counts.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, StdError, http};
use tonic::server::NamedService;

use crate::error::{CommonReason, Error, RETRY_AFTER};

/// Largest message of a unary call, in bytes: some identifiers, a text for people, a page token. All streams of a connection together
/// hold 5 MiB.
pub const MAX_REQUEST_BYTES: usize = 16 << 10;

/// Time for all of a request, like that for the first frame of a stream.
pub const REQUEST_TIME: Duration = Duration::from_secs(30);

/// `S`, whose requests come within [`REQUEST_TIME`]; others fail with `IDLE_TIMEOUT`. For services without client streaming.
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
        self.inner.call(request.map(|body| in_time(Body::new(body))))
    }
}

/// A body that has to come within [`REQUEST_TIME`] from now.
pub(crate) fn in_time(body: Body) -> Body {
    Body::new(PromptBody { inner: body, until: Instant::now() + REQUEST_TIME, timer: None })
}

struct PromptBody {
    inner: Body,
    until: Instant,
    /// Made when something has to be waited for, which is rare.
    timer: Option<Pin<Box<Sleep>>>,
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
        let until = self.until;
        ready!(self.timer.get_or_insert_with(|| Box::pin(sleep_until(until))).as_mut().poll(cx));
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

    #[tokio::test(start_paused = true)]
    async fn a_byte_now_and_then_does_not_help() {
        let began = Instant::now();
        let drip = Drip(Box::pin(tokio::time::sleep(Duration::from_secs(1))));
        let mut body = in_time(Body::new(drip));
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

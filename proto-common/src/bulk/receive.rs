//! The body of a request past the generated server, and the messages in it.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::Body as _;
use tonic::body::Body;
use tonic::codegen::{Service, StdError, http};
use tonic::server::NamedService;
use tonic::{Request, Status, Streaming};

use super::decode::{BulkError, Decoder, Received};
use super::{BulkMessage, Payload};
use crate::prompt::Prompted;

/// A generated server that is given the body of one method past its decoder, for [`Incoming`] to read.
///
/// It stands directly in front of the generated server. All but the body goes through that as ever, so it answers unknown methods, refuses
/// encodings and sends the answers. All other methods are without client streaming, and their requests have to come [in time](crate::prompt).
#[derive(Debug, Clone)]
pub struct WithRawBody<S> {
    inner: S,
    path: &'static str,
}

/// The body of a call, in the request's extensions. Extensions have to be cloneable; whoever comes first takes it.
#[derive(Debug, Clone)]
struct RawBody(Arc<Mutex<Option<Body>>>);

impl<S> WithRawBody<S> {
    /// For the method with this path, such as `/package.Service/Method`.
    pub fn new(inner: S, path: &'static str) -> Self {
        super::memory::keep_freed_buffers();
        Self { inner, path }
    }
}

impl<S: NamedService> NamedService for WithRawBody<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> Service<http::Request<B>> for WithRawBody<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone,
    S::Future: Unpin,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<StdError>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Prompted<S>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let mut request = request.map(Body::new);
        if request.uri().path() == self.path {
            let body = std::mem::replace(request.body_mut(), Body::empty());
            request.extensions_mut().insert(RawBody(Arc::new(Mutex::new(Some(body)))));
            return Prompted::called(self.inner.call(request));
        }
        Prompted::whole(self.inner.clone(), request)
    }
}

/// The messages of a request.
#[derive(Debug)]
pub struct Incoming<M> {
    from: From<M>,
}

#[derive(Debug)]
enum From<M> {
    Body(Body, Decoder<M>),
    /// Of a generated server that nobody put [`WithRawBody`] in front of: decoded by tonic, with its copy.
    Decoded(Streaming<M>),
}

impl<M: BulkMessage> Incoming<M> {
    /// The messages of a request to a generated server, of at most `limit` bytes each.
    #[must_use]
    pub fn new(request: Request<Streaming<M>>, limit: usize) -> Self {
        let (_, mut extensions, stream) = request.into_parts();
        let raw = extensions.remove::<RawBody>();
        let body = raw.and_then(|RawBody(body)| body.lock().unwrap_or_else(PoisonError::into_inner).take());
        Self {
            from: match body {
                Some(body) => From::Body(body, Decoder::new(limit)),
                None => From::Decoded(stream),
            },
        }
    }

    /// Messages that have not begun yet have at most `limit` bytes each. Where the generated server has the body, it has its own limit.
    pub fn set_limit(&mut self, limit: usize) {
        if let From::Body(_, decoder) = &mut self.from {
            decoder.set_limit(limit);
        }
    }

    /// The next message; `None` at the end of the stream. Cancel safe. After a number of them others have their turn (`tokio::task::coop`), however many are here
    /// already: a frame of 512 KiB can hold 75,000 small ones.
    ///
    /// # Errors
    ///
    /// After one there are no more messages to be had.
    pub async fn next(&mut self) -> Result<Option<Received<M>>, BulkError> {
        tokio::task::coop::cooperative(std::future::poll_fn(|cx| self.poll_next(cx))).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Received<M>>, BulkError>> {
        let (body, decoder) = match &mut self.from {
            From::Body(body, decoder) => (body, decoder),
            From::Decoded(stream) => return poll_decoded(stream, cx),
        };
        loop {
            if let Some(received) = decoder.next_message()? {
                return Poll::Ready(Ok(Some(received)));
            }
            match ready!(Pin::new(&mut *body).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    // Trailers of a request mean nothing in gRPC.
                    if let Ok(data) = frame.into_data() {
                        decoder.push(data);
                    }
                }
                Some(Err(status)) => return Poll::Ready(Err(BulkError::Broken(status))),
                None if decoder.is_within_message() => {
                    let status = Status::internal("the stream ended within a message");
                    return Poll::Ready(Err(BulkError::Broken(status)));
                }
                None => return Poll::Ready(Ok(None)),
            }
        }
    }
}

fn poll_decoded<M: BulkMessage>(
    stream: &mut Streaming<M>,
    cx: &mut Context<'_>,
) -> Poll<Result<Option<Received<M>>, BulkError>> {
    use tokio_stream::Stream as _;
    let next = ready!(Pin::new(stream).poll_next(cx)).transpose().map_err(BulkError::Broken)?;
    Poll::Ready(Ok(next.map(|mut message| {
        let payload = message.payload_mut().map(std::mem::take).unwrap_or_default();
        Received { message, payload: Payload::from(payload) }
    })))
}

//! The body of a request whose payloads are not copied, and the client that sends it.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http_body::Frame;
use tokio::sync::mpsc;
use tonic::Status;
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::codegen::{Service, http};

use super::encode::append;
use super::{BulkMessage, PREFIX, TooLong, encode};

/// The body of a request: the messages of a channel, each in one data frame or, if it has a payload, in two.
///
/// HTTP/2 cuts the payload into frames as large as the peer takes, and hands each to the socket together with its nine bytes of header. What waits is bounded by the
/// channel, one message or batch here, and what the connection buffers for sending. A message that is too long ends the call.
#[derive(Debug)]
pub struct Outgoing<M> {
    messages: Messages<M>,
    payload: Option<Bytes>,
    limit: usize,
}

#[derive(Debug)]
enum Messages<M> {
    Single(mpsc::Receiver<M>),
    Batches(mpsc::Receiver<Vec<M>>),
}

impl<M: BulkMessage> Outgoing<M> {
    /// Sends `messages` of at most `limit` bytes each, until all senders are dropped.
    #[must_use]
    pub fn new(messages: mpsc::Receiver<M>, limit: usize) -> Self {
        super::memory::keep_freed_buffers();
        Self { messages: Messages::Single(messages), payload: None, limit }
    }

    /// The same for messages that come in batches. A batch of more than one goes out as one data frame, so it is for messages with small
    /// payloads, which are copied.
    #[must_use]
    pub fn of_batches(batches: mpsc::Receiver<Vec<M>>, limit: usize) -> Self {
        super::memory::keep_freed_buffers();
        Self { messages: Messages::Batches(batches), payload: None, limit }
    }

    /// Encodes a message, and keeps its payload for the next data frame.
    fn one(&mut self, message: M) -> Result<Bytes, TooLong> {
        let parts = encode(message, self.limit)?;
        self.payload = Some(parts.payload).filter(|payload| !payload.is_empty());
        Ok(parts.head)
    }

    fn batch(&mut self, mut batch: Vec<M>) -> Result<Bytes, TooLong> {
        if batch.len() == 1
            && let Some(message) = batch.pop()
        {
            return self.one(message);
        }
        // All at once: what grows step by step is copied at each.
        let room = batch.iter().map(|message| message.encoded_len() + PREFIX).sum();
        let mut joined = BytesMut::with_capacity(room);
        for message in &batch {
            append(message, self.limit, &mut joined)?;
        }
        Ok(joined.freeze())
    }
}

impl<M> Messages<M> {
    fn close(&mut self) {
        match self {
            Self::Single(messages) => messages.close(),
            Self::Batches(batches) => batches.close(),
        }
    }
}

impl<M: BulkMessage> http_body::Body for Outgoing<M> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(payload) = self.payload.take() {
            return Poll::Ready(Some(Ok(Frame::data(payload))));
        }
        let encoded = match &mut self.messages {
            Messages::Single(messages) => ready!(messages.poll_recv(cx)).map(|message| self.one(message)),
            Messages::Batches(batches) => ready!(batches.poll_recv(cx)).map(|batch| self.batch(batch)),
        };
        Poll::Ready(encoded.map(|encoded| match encoded {
            Ok(head) => Ok(Frame::data(head)),
            Err(error) => {
                self.messages.close();
                Err(Status::out_of_range(error.to_string()))
            }
        }))
    }
}

/// A channel whose next call sends another body than the one that it is given.
///
/// A generated client on top of it makes the call as it makes any other, for which it is given an empty stream; so path, headers, the answers
/// and the status are all tonic's. For one call, of it or of a clone: a second one sends what it is given.
#[derive(Debug, Clone)]
pub struct WithBody<T> {
    channel: T,
    body: Arc<Mutex<Option<Body>>>,
}

impl<T> WithBody<T> {
    /// `channel`, whose next call sends `body`.
    pub fn new<M: BulkMessage + Send>(channel: T, body: Outgoing<M>) -> Self {
        Self { channel, body: Arc::new(Mutex::new(Some(Body::new(body)))) }
    }
}

impl<T: GrpcService<Body>> Service<http::Request<Body>> for WithBody<T> {
    type Response = http::Response<T::ResponseBody>;
    type Error = T::Error;
    type Future = T::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), T::Error>> {
        self.channel.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> T::Future {
        let body = self.body.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.channel.call(match body {
            Some(body) => request.map(|_| body),
            None => request,
        })
    }
}

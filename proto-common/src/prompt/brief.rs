//! A call with client streaming that is over in time.
//!
//! HTTP/2 asks for an answer only when its client has room for one. While it has none, the service waits, and nobody looks at the request, whose
//! bytes lie in the connection's buffers meanwhile: 16 MiB of them, for as long as the client likes. So the request is read by a task of
//! its own, which holds little of it, and which ends the call when its time is over.

use std::future::{pending, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http_body::{Body as _, Frame};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until, timeout_at};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http;

use super::{MAX_REQUEST_BYTES, PromptBody, Wanted, late, wait_for};
use crate::bulk::PREFIX;
use crate::error::{CommonReason, Error};
use crate::peer::PeerKey;

/// What of a request may have come that its service has not read.
const UNREAD: usize = PREFIX + MAX_REQUEST_BYTES;

/// What is held of a call. Two locks: who makes the answer may read the request for it.
struct Held {
    request: Mutex<Request>,
    answer: Mutex<Answer>,
}

#[derive(Default)]
struct Request {
    /// Copied, since a slice would keep the buffer that the connection read it into.
    unread: Vec<u8>,
    error: Option<Status>,
    has_ended: bool,
    /// The service wants no more of it.
    is_left: bool,
    reader: Option<Waker>,
}

enum Answer {
    /// Under way; who waits for it.
    Awaited(Option<Waker>),
    Given(Body, Option<Waker>),
    /// To be told why.
    Over(Status),
    Told,
}

/// A call under way; over at the latest when dropped.
pub(super) struct Brief {
    held: Arc<Held>,
    reading: AbortHandle,
}

impl Drop for Brief {
    fn drop(&mut self) {
        self.reading.abort();
        // An answer that holds the request would keep both.
        let answer = std::mem::replace(&mut *lock(&self.held.answer), Answer::Told);
        drop(answer);
    }
}

impl Brief {
    /// Reads `body` until `until`. It takes a place among the requests that are waited for.
    pub(super) fn begin(body: Body, peer: PeerKey, until: Instant) -> Result<(Self, Body), Status> {
        let place = wait_for(&peer)?;
        let mut body = PromptBody::new(body, peer, Wanted::First);
        body.until = until;
        body.waiting = Some((Box::pin(sleep_until(until)), place));
        let held = Arc::new(Held {
            request: Mutex::new(Request::default()),
            answer: Mutex::new(Answer::Awaited(None)),
        });
        let reading = tokio::spawn(read(body, Arc::clone(&held))).abort_handle();
        let request = Body::new(RequestBody(Arc::clone(&held)));
        Ok((Self { held, reading }, request))
    }

    /// The answer, if the call is over before the service gave one.
    pub(super) fn poll_over(&self, cx: &mut Context<'_>) -> Poll<http::Response<Body>> {
        let mut answer = lock(&self.held.answer);
        match std::mem::replace(&mut *answer, Answer::Told) {
            Answer::Over(status) => Poll::Ready(status.into_http()),
            _ => {
                *answer = Answer::Awaited(Some(cx.waker().clone()));
                Poll::Pending
            }
        }
    }

    /// What the service answers, until the call is over.
    pub(super) fn answered(self, answer: http::Response<Body>) -> http::Response<Body> {
        let (parts, body) = answer.into_parts();
        let mut answer = lock(&self.held.answer);
        if matches!(*answer, Answer::Awaited(_)) {
            *answer = Answer::Given(body, None);
        }
        drop(answer);
        http::Response::from_parts(parts, Body::new(AnswerBody(self)))
    }
}

/// Reads all of the request, and waits for the answer to be taken; too late, or for too much, it ends the call.
async fn read(mut body: PromptBody, held: Arc<Held>) {
    let until = body.until;
    let reading = async {
        while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
            let is_last = frame.is_err();
            if !held.push(frame)? {
                body.inner = Body::empty();
                break;
            }
            if is_last {
                break;
            }
        }
        held.ended();
        pending::<Result<(), Status>>().await
    };
    let ended = timeout_at(until, reading).await;
    // What of it lies in the connection's buffers, and its place.
    drop(body);
    held.end(&match ended {
        Ok(Err(status)) => status,
        _ => late("the call was not over").into(),
    });
}

impl Held {
    /// Whether the service wants more.
    fn push(&self, frame: Result<Frame<Bytes>, Status>) -> Result<bool, Status> {
        let mut request = lock(&self.request);
        match frame.map(Frame::into_data) {
            Ok(Ok(data)) if request.unread.len() + data.len() > UNREAD && !request.is_left => {
                let message =
                    format!("more than {UNREAD} bytes of requests wait for their answers; take those first");
                return Err(Error::new(CommonReason::LimitExceeded, message)
                    .metadata("limit", UNREAD.to_string())
                    .into());
            }
            Ok(Ok(data)) if !request.is_left => request.unread.extend_from_slice(&data),
            // Trailers of a request mean nothing.
            Ok(_) => {}
            Err(status) => request.error = Some(status),
        }
        wake(&mut request.reader);
        Ok(!request.is_left)
    }

    fn ended(&self) {
        let mut request = lock(&self.request);
        request.has_ended = true;
        wake(&mut request.reader);
    }

    /// Nothing more is read or answered.
    fn end(&self, why: &Status) {
        let mut request = lock(&self.request);
        request.unread = Vec::new();
        request.error = Some(why.clone());
        wake(&mut request.reader);
        drop(request);
        let mut answer = lock(&self.answer);
        let before = std::mem::replace(&mut *answer, Answer::Told);
        if !matches!(before, Answer::Told) {
            *answer = Answer::Over(why.clone());
        }
        drop(answer);
        // Not under the lock: what it holds may be anything.
        if let Answer::Awaited(mut waker) | Answer::Given(_, mut waker) = before {
            wake(&mut waker);
        }
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

fn lock<T>(held: &Mutex<T>) -> MutexGuard<'_, T> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The request as its service reads it.
struct RequestBody(Arc<Held>);

impl Drop for RequestBody {
    fn drop(&mut self) {
        let mut request = lock(&self.0.request);
        request.is_left = true;
        request.unread = Vec::new();
    }
}

impl http_body::Body for RequestBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let mut request = lock(&self.0.request);
        if !request.unread.is_empty() {
            let data = std::mem::take(&mut request.unread);
            return Poll::Ready(Some(Ok(Frame::data(data.into()))));
        }
        if let Some(status) = request.error.take() {
            request.has_ended = true;
            return Poll::Ready(Some(Err(status)));
        }
        if request.has_ended {
            return Poll::Ready(None);
        }
        request.reader = Some(cx.waker().clone());
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        let request = lock(&self.0.request);
        request.has_ended && request.unread.is_empty() && request.error.is_none()
    }
}

/// The answer as the connection takes it.
struct AnswerBody(Brief);

impl http_body::Body for AnswerBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let mut answer = lock(&self.0.held.answer);
        match &mut *answer {
            Answer::Given(body, waker) => {
                let polled = Pin::new(body).poll_frame(cx).map_err(Status::from);
                if polled.is_pending() {
                    *waker = Some(cx.waker().clone());
                }
                Poll::Ready(ready!(polled))
            }
            Answer::Over(status) => {
                let mut trailers = http::HeaderMap::new();
                let added = status.add_header(&mut trailers);
                *answer = Answer::Told;
                Poll::Ready(Some(added.map(|()| Frame::trailers(trailers))))
            }
            Answer::Awaited(_) | Answer::Told => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &*lock(&self.0.held.answer) {
            Answer::Given(body, _) => body.is_end_stream(),
            Answer::Over(_) => false,
            Answer::Awaited(_) | Answer::Told => true,
        }
    }
}

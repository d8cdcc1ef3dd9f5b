//! A stream of one task's states.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tokio_stream::Stream;

use super::State;
use crate::peer::PeerKey;
use crate::shares::Share;

type Step<T> = Pin<Box<dyn Future<Output = (Option<T>, Cursor<T>)> + Send>>;

/// See [`Registry::watch`](super::Registry::watch). Holds one place among the watchers until it is dropped.
///
/// Nothing piles up for a slow reader: it gets the latest state.
#[must_use = "a stream does nothing unless polled"]
pub struct Watch<T> {
    /// The wait for the next item; `None` once the last one was delivered.
    step: Option<Step<T>>,
    /// Released with the stream.
    _place: Share<PeerKey>,
}

struct Cursor<T> {
    states: watch::Receiver<State<T>>,
    interval: Duration,
    /// When the last item was delivered; `None` before the first.
    delivered: Option<Instant>,
    ended: bool,
}

impl<T: Clone + Send + Sync + 'static> Watch<T> {
    pub(super) fn new(states: watch::Receiver<State<T>>, interval: Duration, place: Share<PeerKey>) -> Self {
        let cursor = Cursor { states, interval, delivered: None, ended: false };
        Self { step: Some(Box::pin(cursor.next())), _place: place }
    }

    /// The next state; `None` once the last one was delivered. Cancel safe.
    pub async fn next(&mut self) -> Option<T> {
        std::future::poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }
}

impl<T: Clone> Cursor<T> {
    async fn next(mut self) -> (Option<T>, Self) {
        if self.ended {
            return (None, self);
        }
        if let Some(delivered) = self.delivered {
            if self.states.changed().await.is_err() {
                // The owner is gone. It marks the end before that, so there is nothing newer to deliver.
                self.ended = true;
                return (None, self);
            }
            // Either the interval is over, or the task; a state that came in between is superseded.
            let _ = timeout_at(delivered + self.interval, self.states.wait_for(|state| state.ended)).await;
        }
        let State { value, ended } = self.states.borrow_and_update().clone();
        self.ended = ended;
        self.delivered = Some(Instant::now());
        (Some(value), self)
    }
}

impl<T: Clone + Send + Sync + 'static> Stream for Watch<T> {
    type Item = T;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let Some(step) = &mut self.step else { return Poll::Ready(None) };
        let (item, cursor) = ready!(step.as_mut().poll(cx));
        self.step = if cursor.ended { None } else { Some(Box::pin(cursor.next())) };
        Poll::Ready(item)
    }
}

impl<T> fmt::Debug for Watch<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("ended", &self.step.is_none()).finish_non_exhaustive()
    }
}

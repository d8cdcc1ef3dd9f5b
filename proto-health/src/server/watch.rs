//! A watch of either protocol: the state at once, then the latest whenever it has changed. Nothing piles up for a slow
//! reader, and the end of the node ends it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::server::callers::Watching;
use crate::server::core::Inner;
use crate::server::places::Place;
use crate::server::verdict::Snapshot;

/// What comes next.
#[derive(Debug)]
pub(crate) enum Event {
    /// The first state, or another one than before.
    State(Arc<Snapshot>),
    /// Nothing has changed for the heartbeat's time.
    Heartbeat(Arc<Snapshot>),
    /// The node has sent its last frames.
    Closed(Arc<Snapshot>),
}

/// One open watch. `V` is what its reader is told of: a change of anything else is no change.
pub(crate) struct Cursor<V> {
    pub(crate) inner: Arc<Inner>,
    pub(crate) service: Arc<str>,
    shown: watch::Receiver<Arc<Snapshot>>,
    heartbeat: Option<Duration>,
    view: fn(&Snapshot, &str) -> V,
    told: Option<(V, Instant)>,
    // Released with the watch, both.
    place: Place,
    _watching: Option<Watching>,
}

impl<V: PartialEq> Cursor<V> {
    pub(crate) fn new(
        inner: &Arc<Inner>,
        service: &str,
        heartbeat: Option<Duration>,
        view: fn(&Snapshot, &str) -> V,
        place: Place,
        watching: Option<Watching>,
    ) -> Self {
        Self {
            inner: Arc::clone(inner),
            service: Arc::from(service),
            shown: inner.subscribe(),
            heartbeat,
            view,
            told: None,
            place,
            _watching: watching,
        }
    }

    /// Cancel safe.
    pub(crate) async fn next(&mut self) -> Event {
        loop {
            self.inner.refresh();
            let snapshot = Arc::clone(&self.shown.borrow_and_update());
            let view = (self.view)(&snapshot, &self.service);
            let Some((told, at)) = &self.told else {
                self.told = Some((view, Instant::now()));
                return Event::State(snapshot);
            };
            if snapshot.closed {
                return Event::Closed(snapshot);
            }
            let now = Instant::now();
            if *told != view {
                let due = *at + self.inner.limits.watch_interval;
                if now >= due {
                    self.told = Some((view, now));
                    return Event::State(snapshot);
                }
                tokio::select! {
                    () = sleep_until(due) => {}
                    _ = self.shown.wait_for(|shown| shown.closed) => {}
                }
                continue;
            }
            let Some(heartbeat) = self.heartbeat else {
                // The sender lives as long as `inner`.
                let _ = self.shown.changed().await;
                continue;
            };
            let due = *at + heartbeat.max(self.place.least_heartbeat());
            if now >= due {
                self.told = Some((view, now));
                return Event::Heartbeat(snapshot);
            }
            tokio::select! {
                () = sleep_until(due) => {}
                _ = self.shown.changed() => {}
            }
        }
    }
}

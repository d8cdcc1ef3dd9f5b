//! What all clones of a registry share.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proto_common::access::Access;
use proto_common::clock::{millis, now_unix_ms};
use proto_common::v1::NodeIdentity;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::limits::{Limits, MAX_HEARTBEAT_BYTES};
use crate::server::asking::Asking;
use crate::server::callers::Callers;
use crate::server::component::Cell;
use crate::server::facts::NodeFacts;
use crate::server::life::Life;
use crate::server::places::Places;
use crate::server::verdict::{Snapshot, look};
use crate::v1::ReplyOrigin;

/// What changes.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) cells: BTreeMap<Arc<str>, Cell>,
    pub(crate) services: BTreeSet<Arc<str>>,
    pub(crate) life: Life,
    pub(crate) revision: u64,
    pub(crate) closed: bool,
    pub(crate) message_bytes: usize,
}

pub(crate) struct Inner {
    pub(crate) identity: NodeIdentity,
    pub(crate) limits: Limits,
    pub(crate) started: Instant,
    pub(crate) started_unix_ms: u64,
    pub(crate) facts: Option<Arc<dyn NodeFacts>>,
    pub(crate) asking: Asking,
    pub(crate) access: Access,
    pub(crate) places: Places,
    pub(crate) callers: Callers,
    #[cfg(feature = "machine")]
    pub(crate) machine: Option<crate::server::machine::Machine>,
    core: Mutex<Core>,
    published: watch::Sender<Arc<Snapshot>>,
    sequence: AtomicU64,
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
}

/// The checks end with the last clone of the registry.
impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// What a registry is made with.
pub(crate) struct Parts {
    pub(crate) identity: NodeIdentity,
    pub(crate) limits: Limits,
    pub(crate) facts: Option<Arc<dyn NodeFacts>>,
    pub(crate) access: Access,
    #[cfg(feature = "machine")]
    pub(crate) machine: Option<crate::server::machine::Machine>,
}

impl Inner {
    pub(crate) fn new(parts: Parts) -> Self {
        let now = Instant::now();
        let mut core = Core {
            cells: BTreeMap::new(),
            services: BTreeSet::new(),
            life: Life::new(),
            revision: 0,
            closed: false,
            message_bytes: parts.limits.message_bytes.min(MAX_HEARTBEAT_BYTES / 2),
        };
        let nothing = Snapshot {
            revision: 0,
            state: core.life.state(),
            closed: false,
            fresh_until: None,
            verdicts: std::collections::HashMap::new(),
            services: BTreeSet::new(),
        };
        let first = look(&mut core, &nothing, now);
        Self {
            identity: parts.identity,
            places: Places::new(&parts.limits),
            callers: Callers::new(parts.limits.callers),
            limits: parts.limits,
            started: now,
            started_unix_ms: now_unix_ms(),
            facts: parts.facts,
            asking: Asking::default(),
            access: parts.access,
            #[cfg(feature = "machine")]
            machine: parts.machine,
            core: Mutex::new(core),
            published: watch::Sender::new(Arc::new(first)),
            sequence: AtomicU64::new(0),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    pub(crate) fn core(&self) -> MutexGuard<'_, Core> {
        // Nothing in here runs a caller's code half way through a change.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a change and tells whoever has to know.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Core) -> T) -> T {
        let mut core = self.core();
        let result = change(&mut core);
        self.publish(&mut core);
        result
    }

    /// Still under the lock, so that no older picture replaces a newer one.
    fn publish(&self, core: &mut Core) {
        self.published.send_if_modified(|shown| {
            let next = look(core, shown, Instant::now());
            // New words for the same facts wake nobody.
            let told = next.revision != shown.revision
                || next.closed != shown.closed
                || next.services != shown.services
                || next.fresh_until.is_some() != shown.fresh_until.is_some();
            *shown = Arc::new(next);
            told
        });
    }

    /// Everything as it is now.
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.refresh();
        Arc::clone(&self.published.borrow())
    }

    /// What `read` finds in the present picture; a pointer away.
    pub(crate) fn peek<T>(&self, read: impl FnOnce(&Snapshot) -> T) -> T {
        let shown = self.published.borrow();
        if shown.fresh_until.is_none_or(|until| Instant::now() <= until) {
            return read(&shown);
        }
        drop(shown);
        self.refresh();
        read(&self.published.borrow())
    }

    /// Looks again if time alone has changed something: truth does not wait for a background task.
    pub(crate) fn refresh(&self) {
        let until = self.published.borrow().fresh_until;
        if until.is_some_and(|until| Instant::now() > until) {
            self.change(|_| {});
        }
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.published.subscribe()
    }

    /// Who answers, and when. Each call is one reply.
    pub(crate) fn origin(&self, shown: &Snapshot) -> ReplyOrigin {
        ReplyOrigin {
            identity: Some(self.identity.clone()),
            sequence: self.sequence.fetch_add(1, Ordering::Relaxed) + 1,
            revision: shown.revision,
            sent_unix_ms: now_unix_ms(),
            uptime_ms: millis(self.started.elapsed()),
            state: shown.state.into(),
        }
    }
}

//! Which nodes reach this one: by the `from` of their calls, and by the watches that they keep open.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proto_common::clock::now_unix_ms;
use proto_common::ids::NodeId;

#[derive(Debug, Clone)]
pub(crate) struct Callers {
    known: Arc<Mutex<HashMap<NodeId, Heard>>>,
    limit: usize,
}

#[derive(Debug, Default)]
struct Heard {
    unix_ms: u64,
    watches: usize,
}

/// An open watch of a caller.
#[derive(Debug)]
pub(crate) struct Watching {
    callers: Callers,
    caller: NodeId,
}

impl Callers {
    pub(crate) fn new(limit: usize) -> Self {
        Self { known: Arc::default(), limit }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<NodeId, Heard>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `caller` has made a request.
    pub(crate) fn heard(&self, caller: &NodeId) {
        self.update(caller, |_| {});
    }

    /// `caller` opens a watch.
    pub(crate) fn watching(&self, caller: NodeId) -> Watching {
        self.update(&caller, |heard| heard.watches += 1);
        Watching { callers: self.clone(), caller }
    }

    fn update(&self, caller: &NodeId, change: impl FnOnce(&mut Heard)) {
        let mut known = self.known();
        if !known.contains_key(caller) && known.len() >= self.limit {
            let idle = known.iter().filter(|(_, heard)| heard.watches == 0);
            let Some(oldest) = idle.min_by_key(|(_, heard)| heard.unix_ms).map(|(id, _)| id.clone()) else {
                return;
            };
            known.remove(&oldest);
        }
        let heard = known.entry(caller.clone()).or_default();
        heard.unix_ms = now_unix_ms();
        change(heard);
    }

    /// When `caller` was heard from last: now, while it has a watch open.
    pub(crate) fn last_heard_from(&self, caller: &NodeId) -> Option<u64> {
        let known = self.known();
        let heard = known.get(caller)?;
        Some(if heard.watches > 0 { now_unix_ms() } else { heard.unix_ms })
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        if let Some(heard) = self.callers.known().get_mut(&self.caller) {
            heard.watches = heard.watches.saturating_sub(1);
            heard.unix_ms = now_unix_ms();
        }
    }
}

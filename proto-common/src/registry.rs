//! The one registry of what moves in and out of a node: Get, List and Watch for every service.
//!
//! `T` is a service's progress message. A task's owner holds a [`Tracker`] and updates it; everybody else looks.

mod page;
mod watch;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch as channel;

pub use page::Page;
pub use watch::Watch;

use crate::error::{CommonReason, Error};
use crate::peer::PeerKey;
use crate::shares::{Full, Shares};
use crate::text::printable;
use crate::v1::Direction;

/// Bounds of a [`Registry`].
#[derive(Debug, Clone)]
pub struct RegistryLimits {
    /// Tasks that run at the same time; those that an earlier process left may be more. Default 1024.
    pub active: usize,
    /// Finished tasks that are remembered; the oldest is forgotten first. Default 1000.
    pub finished: usize,
    /// Watches that are open at the same time. Default 256.
    pub watchers: usize,
    /// Of them, of one peer ([`Peer::key`](crate::peer::Peer::key)). Default 64.
    pub watchers_per_peer: usize,
    /// Items of one page; also the page size for whoever does not ask for one. Default 100.
    pub page: usize,
    /// Shortest time between two items of a watch, apart from the last one. Default 100 ms.
    pub watch_interval: Duration,
}

impl Default for RegistryLimits {
    fn default() -> Self {
        Self {
            active: 1024,
            finished: 1000,
            watchers: 256,
            watchers_per_peer: 64,
            page: 100,
            watch_interval: Duration::from_millis(100),
        }
    }
}

/// Progress of all tasks of one service at this node, in both directions. Clones share the same tasks.
pub struct Registry<T> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    limits: RegistryLimits,
    /// Tells page tokens of this registry from those of an earlier run of the process.
    nonce: u32,
    watchers: Shares<PeerKey>,
    tasks: Mutex<Tasks<T>>,
}

/// Both maps are ordered by the number that a task got when it was inserted, or when it finished.
struct Tasks<T> {
    next_started: u64,
    next_finished: u64,
    active: BTreeMap<u64, Active<T>>,
    finished: BTreeMap<u64, Finished<T>>,
    by_key: HashMap<Key, Place>,
}

type Key = (Direction, Arc<str>);

#[derive(Debug, Clone, Copy)]
enum Place {
    Active(u64),
    Finished(u64),
}

struct Active<T> {
    key: Key,
    state: channel::Sender<State<T>>,
}

struct Finished<T> {
    key: Key,
    started: u64,
    /// Of an earlier process.
    seeded: bool,
    value: T,
}

#[derive(Clone)]
struct State<T> {
    value: T,
    ended: bool,
}

impl<T> Shared<T> {
    fn tasks(&self) -> MutexGuard<'_, Tasks<T>> {
        // Nothing in here runs a caller's code half way through a change.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Clone + Send + Sync + 'static> Registry<T> {
    /// An empty registry.
    #[must_use]
    pub fn new(limits: RegistryLimits) -> Self {
        Self {
            shared: Arc::new(Shared {
                watchers: Shares::new(limits.watchers as u64, limits.watchers_per_peer as u64),
                limits,
                nonce: fastrand::u32(..),
                tasks: Mutex::new(Tasks {
                    next_started: 0,
                    next_finished: 0,
                    active: BTreeMap::new(),
                    finished: BTreeMap::new(),
                    by_key: HashMap::new(),
                }),
            }),
        }
    }

    /// Starts a task. It replaces a finished one of the same direction and ID.
    ///
    /// # Errors
    ///
    /// `ALREADY_EXISTS` if one with that direction and ID is active, `LIMIT_EXCEEDED` (retryable) if too many are.
    pub fn insert(&self, direction: Direction, id: &str, value: T) -> Result<Tracker<T>, Error> {
        self.insert_within(self.shared.limits.active, direction, id, value)
    }

    /// [`insert`](Self::insert) of a task that an earlier process left: it is there already, so it is let in beyond the limit, and counts.
    ///
    /// # Errors
    ///
    /// `ALREADY_EXISTS` if one with that direction and ID is active.
    pub fn readopt(&self, direction: Direction, id: &str, value: T) -> Result<Tracker<T>, Error> {
        self.insert_within(usize::MAX, direction, id, value)
    }

    fn insert_within(
        &self,
        limit: usize,
        direction: Direction,
        id: &str,
        value: T,
    ) -> Result<Tracker<T>, Error> {
        let mut tasks = self.shared.tasks();
        let key: Key = (direction, Arc::from(id));
        if let Some(Place::Active(_)) = tasks.by_key.get(&key) {
            let message = format!("{} is already {}", printable(id, 128), active_as(direction));
            return Err(Error::new(CommonReason::AlreadyExists, message));
        }
        if tasks.active.len() >= limit {
            let message = format!("{limit} tasks run at this node already; try again when one has ended");
            return Err(limit_exceeded(message, limit as u64));
        }
        let started = tasks.next_started;
        tasks.next_started += 1;
        if let Some(Place::Finished(number)) = tasks.by_key.insert(key.clone(), Place::Active(started)) {
            tasks.finished.remove(&number);
        }
        let state = channel::Sender::new(State { value, ended: false });
        tasks.active.insert(started, Active { key: key.clone(), state: state.clone() });
        Ok(Tracker { shared: Arc::clone(&self.shared), key, started, state, ended: false })
    }

    /// Puts tasks that had finished before this process started into the history, the oldest first: of several with the same
    /// direction and ID, the last one stays.
    ///
    /// One whose direction and ID this process has inserted itself is skipped: what it knows is newer.
    pub fn seed(&self, finished: impl IntoIterator<Item = (Direction, String, T)>) {
        let mut tasks = self.shared.tasks();
        for (direction, id, value) in finished {
            let key: Key = (direction, Arc::from(id));
            match tasks.by_key.get(&key).copied() {
                Some(Place::Active(_)) => continue,
                Some(Place::Finished(number)) => {
                    if tasks.finished.get(&number).is_some_and(|task| !task.seeded) {
                        continue;
                    }
                    tasks.finished.remove(&number);
                }
                None => {}
            }
            let started = tasks.next_started;
            tasks.next_started += 1;
            tasks.archive(Finished { key, started, seeded: true, value }, self.shared.limits.finished);
        }
    }

    /// The state of a task, active or finished. Without a direction: the active one first, then the incoming one.
    #[must_use]
    pub fn get(&self, direction: Option<Direction>, id: &str) -> Option<T> {
        let tasks = self.shared.tasks();
        match tasks.find(direction, id)? {
            Place::Active(number) => tasks.active.get(&number).map(|task| task.state.borrow().value.clone()),
            Place::Finished(number) => tasks.finished.get(&number).map(|task| task.value.clone()),
        }
    }

    /// How many tasks of that direction are active; of both without one.
    #[must_use]
    pub fn active(&self, direction: Option<Direction>) -> usize {
        let wanted = |task: &&Active<T>| direction.is_none_or(|direction| direction == task.key.0);
        self.shared.tasks().active.values().filter(wanted).count()
    }

    /// A stream of a task's states: the current one at once, then the latest whenever it has changed, at most one per
    /// [`watch_interval`](RegistryLimits::watch_interval), and the last one without waiting; then it ends. A finished
    /// task gives its last state and ends. Without a direction as [`get`](Self::get).
    ///
    /// # Errors
    ///
    /// `NOT_FOUND`, or `LIMIT_EXCEEDED` (retryable) if too many watches are open.
    pub fn watch(&self, direction: Option<Direction>, id: &str) -> Result<Watch<T>, Error> {
        self.watch_of(None, direction, id)
    }

    /// [`watch`](Self::watch) for a peer, which has no more than its share of them.
    ///
    /// # Errors
    ///
    /// Those of [`watch`](Self::watch); `LIMIT_EXCEEDED` names the peer as `peer` if it is its share that is used up.
    pub fn watch_for(
        &self,
        peer: &PeerKey,
        direction: Option<Direction>,
        id: &str,
    ) -> Result<Watch<T>, Error> {
        self.watch_of(Some(peer), direction, id)
    }

    fn watch_of(
        &self,
        peer: Option<&PeerKey>,
        direction: Option<Direction>,
        id: &str,
    ) -> Result<Watch<T>, Error> {
        let place = self.shared.watchers.take(peer, 1).map_err(|full| match (full, peer) {
            (Full::Peer { limit }, Some(peer)) => {
                let message = format!(
                    "{limit} watches of {peer} are open at this node already, which is its share; poll, or try again later"
                );
                limit_exceeded(message, limit).metadata("peer", peer.to_string())
            }
            (full, _) => {
                let limit = full.limit();
                let message = format!("{limit} watches are open at this node already; poll, or try again later");
                limit_exceeded(message, limit)
            }
        })?;
        let tasks = self.shared.tasks();
        let receiver = match tasks.find(direction, id) {
            Some(Place::Active(number)) => tasks.active.get(&number).map(|task| task.state.subscribe()),
            Some(Place::Finished(number)) => tasks
                .finished
                .get(&number)
                .map(|task| channel::channel(State { value: task.value.clone(), ended: true }).1),
            None => None,
        };
        let receiver = receiver.ok_or_else(|| not_found(id))?;
        Ok(Watch::new(receiver, self.shared.limits.watch_interval, place))
    }
}

impl<T> Tasks<T> {
    fn find(&self, direction: Option<Direction>, id: &str) -> Option<Place> {
        let id: Arc<str> = Arc::from(id);
        let place = |direction| self.by_key.get(&(direction, Arc::clone(&id))).copied();
        match direction {
            Some(direction) => place(direction),
            None => [Direction::In, Direction::Out, Direction::Unspecified]
                .into_iter()
                .filter_map(place)
                .min_by_key(|place| matches!(place, Place::Finished(_))),
        }
    }

    fn archive(&mut self, task: Finished<T>, limit: usize) {
        let number = self.next_finished;
        self.next_finished += 1;
        self.by_key.insert(task.key.clone(), Place::Finished(number));
        self.finished.insert(number, task);
        while self.finished.len() > limit {
            if let Some((_, oldest)) = self.finished.pop_first() {
                self.by_key.remove(&oldest.key);
            }
        }
    }
}

fn active_as(direction: Direction) -> &'static str {
    match direction {
        Direction::In => "being received",
        Direction::Out => "being sent",
        Direction::Unspecified => "active",
    }
}

fn not_found(id: &str) -> Error {
    let shown = printable(id, 128);
    Error::new(CommonReason::NotFound, format!("this node knows no task {shown}")).metadata("id", shown)
}

fn limit_exceeded(message: String, limit: u64) -> Error {
    Error::new(CommonReason::LimitExceeded, message)
        .metadata("limit", limit.to_string())
        .retry_after(Duration::from_secs(1))
}

impl<T> Clone for Registry<T> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<T: Clone + Send + Sync + 'static> Default for Registry<T> {
    fn default() -> Self {
        Self::new(RegistryLimits::default())
    }
}

impl<T> fmt::Debug for Registry<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tasks = self.shared.tasks();
        f.debug_struct("Registry")
            .field("active", &tasks.active.len())
            .field("finished", &tasks.finished.len())
            .finish_non_exhaustive()
    }
}

/// One active task, in the hands of whoever does it.
///
/// Dropped without [`finish`](Self::finish), as in a panic, it leaves its last state in the history just as it is, and
/// the ID is free again.
pub struct Tracker<T: Clone> {
    shared: Arc<Shared<T>>,
    key: Key,
    started: u64,
    state: channel::Sender<State<T>>,
    ended: bool,
}

impl<T: Clone> Tracker<T> {
    /// Changes the state; watchers are told. Cheap enough for every frame.
    ///
    /// `change` must not call into the registry, and must not block.
    pub fn update(&self, change: impl FnOnce(&mut T)) {
        self.state.send_modify(|state| change(&mut state.value));
    }

    /// The current state.
    #[must_use]
    pub fn get(&self) -> T {
        self.state.borrow().value.clone()
    }

    /// Makes a last change and moves the task into the history. Watches deliver that state and end.
    pub fn finish(mut self, change: impl FnOnce(&mut T)) {
        self.update(change);
        self.end();
    }

    /// The ID of the task.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.key.1
    }

    /// Which way its data flows.
    #[must_use]
    pub fn direction(&self) -> Direction {
        self.key.0
    }

    fn end(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let mut tasks = self.shared.tasks();
        tasks.active.remove(&self.started);
        let value = self.state.borrow().value.clone();
        let task = Finished { key: self.key.clone(), started: self.started, seeded: false, value };
        tasks.archive(task, self.shared.limits.finished);
        drop(tasks);
        // Last, so that whoever sees the end finds the task in the history.
        self.state.send_modify(|state| state.ended = true);
    }
}

impl<T: Clone> Drop for Tracker<T> {
    fn drop(&mut self) {
        self.end();
    }
}

impl<T: Clone> fmt::Debug for Tracker<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker")
            .field("direction", &self.key.0)
            .field("id", &self.key.1)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "registry_tests.rs"]
mod tests;

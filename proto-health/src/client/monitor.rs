//! Watches many peers and tells what becomes of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proto_common::connect::Connect;
use proto_common::ids::NodeId;
use tokio::sync::{Semaphore, SemaphorePermit, broadcast};
use tokio::task::AbortHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::client::clock::{Clock, SystemClock};
use crate::client::link;
use crate::client::options::MonitorOptions;
use crate::client::peer::{Answer, Opinion, PeerEvent};
use crate::client::table::Table;
use crate::v1::{PeerState, PeerStatus};

/// What the monitor and the connections to its peers share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) from: NodeId,
    pub(crate) options: MonitorOptions,
    pub(crate) clock: Arc<dyn Clock>,
    table: Mutex<Table>,
    events: broadcast::Sender<PeerEvent>,
    calls: Semaphore,
    /// Of `calls`, those of peers that did not answer when they were first looked for, and never have since.
    doubtful: Semaphore,
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, events: Vec<PeerEvent>) {
        for event in events {
            tracing::debug!(peer = event.address, change = ?event.change, reason = event.reason, "peer");
            // Nobody may be listening.
            let _ = self.events.send(event);
        }
    }

    /// A place among the calls that go out at the same time. Never closed.
    pub(crate) async fn place(&self) -> Option<SemaphorePermit<'_>> {
        self.calls.acquire().await.ok()
    }

    /// The same for a peer that was looked for in vain, and has never answered: these have half of the places, so that however many nodes somebody makes up, those
    /// that are there don't wait for them.
    pub(crate) async fn doubtful_place(&self) -> (Option<SemaphorePermit<'_>>, Option<SemaphorePermit<'_>>) {
        let own = self.doubtful.acquire().await.ok();
        (own, self.place().await)
    }

    pub(crate) fn answered(&self, address: &str, answer: Answer) {
        let mut table = self.table();
        let events = table.answered(address, answer, self.clock.now(), self.clock.unix_ms());
        // Still under the lock: events come in the order in which they happened.
        self.tell(events);
    }

    pub(crate) fn disconnected(&self, address: &str, why: &str) {
        self.table().disconnected(address, why);
    }

    pub(crate) fn opinion(&self, address: &str, opinion: Option<Opinion>) {
        self.table().opinion(address, opinion);
    }

    pub(crate) fn state(&self, address: &str) -> Option<PeerState> {
        self.table().state(address)
    }

    pub(crate) fn has_answered(&self, address: &str) -> bool {
        self.table().has_answered(address)
    }

    fn look(&self) {
        let mut table = self.table();
        let events = table.look(self.clock.now(), self.clock.unix_ms());
        self.tell(events);
    }
}

/// Why a peer is not watched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MonitorError {
    /// That address is watched.
    #[error("{0} is watched already")]
    Exists(String),
    /// The limit is reached.
    #[error("{0} peers are watched already, which is the limit")]
    TooMany(usize),
    /// The monitor was stopped.
    #[error("the monitor was stopped")]
    Stopped,
}

/// Whether two nodes reach each other, as far as this one of them knows.
#[derive(Debug, Clone, PartialEq)]
pub struct Reach {
    /// The peer's address.
    pub address: String,
    /// The peer, once it is known.
    pub node_id: Option<NodeId>,
    /// What this node thinks of it: the way there and back again.
    pub state: PeerState,
    /// What it thinks of this node, where it watches this node and has said so.
    pub opinion: Option<Opinion>,
}

impl Reach {
    /// One of the two reaches the other, and not the other way round.
    #[must_use]
    pub fn is_one_way(&self) -> bool {
        let gone = |state| matches!(state, PeerState::Suspect | PeerState::Dead);
        self.opinion.is_some_and(|opinion| {
            self.state == PeerState::Alive && gone(opinion.state)
                || gone(self.state) && opinion.state == PeerState::Alive
        })
    }
}

/// Events of all peers, in order. Dropping it is fine.
#[derive(Debug)]
pub struct PeerEvents {
    events: broadcast::Receiver<PeerEvent>,
}

/// What a reader of [`PeerEvents`] gets.
#[derive(Debug, Clone, PartialEq)]
pub enum Told {
    /// Something happened to a peer.
    Event(PeerEvent),
    /// So many events were dropped because the reader was behind: look at [`PeerMonitor::statuses`].
    Missed(u64),
}

impl PeerEvents {
    /// The next one; `None` when the monitor is gone. Cancel safe.
    pub async fn next(&mut self) -> Option<Told> {
        match self.events.recv().await {
            Ok(event) => Some(Told::Event(event)),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(Told::Missed(missed)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

/// Watches peers by their heartbeats. Clones are the same monitor; its tasks end with the last one, or with
/// [`stop`](Self::stop).
///
/// Connections of its own, from a [`Connect`] for each peer: bulk data never shares a connection with heartbeats. A verdict
/// follows from heartbeats alone, never from a connection that breaks; but a restarted peer is known by its incarnation as soon as it
/// answers, and one that drains says so.
///
/// ```no_run
/// use proto_common::tuning::endpoint;
/// use proto_health::client::{MonitorOptions, PeerMonitor, Told};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let monitor = PeerMonitor::start("n1".parse()?, MonitorOptions::default());
/// let mut events = monitor.events();
/// monitor.add("127.0.0.1:7102", Some("n2".parse()?), endpoint("127.0.0.1:7102")?)?;
/// while let Some(Told::Event(event)) = events.next().await {
///     println!("{} {:?}: {}", event.address, event.change, event.reason);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct PeerMonitor {
    shared: Arc<Shared>,
    links: Arc<Links>,
}

#[derive(Debug)]
struct Links {
    running: Mutex<HashMap<String, AbortHandle>>,
    tasks: TaskTracker,
    stop: CancellationToken,
    _stop_on_drop: DropGuard,
}

impl PeerMonitor {
    /// A monitor in the name of the node `from`. Call it in a tokio runtime.
    #[must_use]
    pub fn start(from: NodeId, options: MonitorOptions) -> Self {
        Self::with_clock(from, options, Arc::new(SystemClock::default()))
    }

    /// One that takes the time of its verdicts from `clock`.
    #[must_use]
    pub fn with_clock(from: NodeId, options: MonitorOptions, clock: Arc<dyn Clock>) -> Self {
        let shared = Arc::new(Shared {
            from,
            table: Mutex::new(Table::new(options.clone())),
            events: broadcast::Sender::new(options.events.max(1)),
            calls: Semaphore::new(options.concurrency.max(1)),
            doubtful: Semaphore::new((options.concurrency / 2).max(1)),
            options,
            clock,
        });
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let (looking, stopped) = (Arc::clone(&shared), stop.clone());
        tasks.spawn(async move {
            let mut ticks = tokio::time::interval(looking.options.tick());
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    () = stopped.cancelled() => return,
                    _ = ticks.tick() => looking.look(),
                }
            }
        });
        let links =
            Links { running: Mutex::default(), tasks, _stop_on_drop: stop.clone().drop_guard(), stop };
        Self { shared, links: Arc::new(links) }
    }

    fn running(&self) -> MutexGuard<'_, HashMap<String, AbortHandle>> {
        self.links.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches the node at `address`, which `connect` connects to. If it has to be the node `expected`, answers of any other are
    /// none.
    ///
    /// # Errors
    ///
    /// See [`MonitorError`]; nothing was added.
    pub fn add(
        &self,
        address: &str,
        expected: Option<NodeId>,
        connect: impl Connect,
    ) -> Result<(), MonitorError> {
        if self.links.stop.is_cancelled() {
            return Err(MonitorError::Stopped);
        }
        let limit = self.shared.options.peers;
        let mut running = self.running();
        let mut table = self.shared.table();
        if table.contains(address) {
            return Err(MonitorError::Exists(address.to_owned()));
        }
        if table.len() >= limit {
            return Err(MonitorError::TooMany(limit));
        }
        table.add(address, expected, self.shared.clock.now(), self.shared.clock.unix_ms());
        drop(table);
        let (shared, name, stop) = (Arc::clone(&self.shared), Arc::from(address), self.links.stop.clone());
        let link = self.links.tasks.spawn(async move {
            stop.run_until_cancelled(link::run(shared, name, connect)).await;
        });
        running.insert(address.to_owned(), link.abort_handle());
        Ok(())
    }

    /// No longer watches that address. Returns whether it was watched.
    pub fn remove(&self, address: &str) -> bool {
        if let Some(link) = self.running().remove(address) {
            link.abort();
        }
        let mut table = self.shared.table();
        let event = table.remove(address, self.shared.clock.now(), self.shared.clock.unix_ms());
        let removed = event.is_some();
        self.shared.tell(event.into_iter().collect());
        removed
    }

    /// What happens from now on.
    #[must_use]
    pub fn events(&self) -> PeerEvents {
        PeerEvents { events: self.shared.events.subscribe() }
    }

    /// All peers, by address, as `NodeStatus.peers` has them; without `last_heard_from_unix_ms`, which the server knows.
    #[must_use]
    pub fn statuses(&self) -> Vec<PeerStatus> {
        self.shared.table().statuses(self.shared.clock.now())
    }

    /// Who reaches whom: what this node thinks of each peer, and what each says it thinks of this node.
    #[must_use]
    pub fn reach(&self) -> Vec<Reach> {
        let table = self.shared.table();
        let of = |peer: &crate::client::peer::Peer| Reach {
            address: peer.address.clone(),
            node_id: peer.node_id(),
            state: peer.state,
            opinion: peer.opinion,
        };
        table.peers().map(of).collect()
    }

    /// Most peers seem gone at once, so the fault is more likely here: nobody is declared dead meanwhile. Counted of those that have answered since they
    /// were added, or of all where none has.
    #[must_use]
    pub fn doubts_itself(&self) -> bool {
        self.shared.table().doubts_itself()
    }

    /// Ends all watches and waits for their tasks. Cancel safe; may be called again.
    pub async fn stop(&self) {
        self.links.stop.cancel();
        self.links.tasks.close();
        self.links.tasks.wait().await;
    }
}

#[cfg(test)]
mod tests {
    use proto_common::connect::connect_fn;
    use proto_common::error::{CommonReason, Error};
    use tonic::body::Body;

    use super::*;

    /// A network on which nobody answers.
    #[derive(Debug, Clone)]
    struct Nobody;

    impl tonic::client::GrpcService<Body> for Nobody {
        type ResponseBody = Body;
        type Error = std::convert::Infallible;
        type Future = std::future::Pending<Result<tonic::codegen::http::Response<Body>, Self::Error>>;

        fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
            std::task::Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: tonic::codegen::http::Request<Body>) -> Self::Future {
            std::future::pending()
        }
    }

    fn nobody() -> impl Connect {
        connect_fn(|| async { Err::<Nobody, _>(Error::new(CommonReason::Unavailable, "no route")) })
    }

    fn monitor(peers: usize, events: usize) -> PeerMonitor {
        let options = MonitorOptions { peers, events, ..MonitorOptions::default() };
        PeerMonitor::start(NodeId::new("n1").unwrap(), options)
    }

    #[tokio::test(start_paused = true)]
    async fn peers_are_bounded_and_each_is_watched_once() {
        let monitor = monitor(2, 16);
        monitor.add("a", None, nobody()).unwrap();
        assert_eq!(monitor.add("a", None, nobody()), Err(MonitorError::Exists("a".into())));
        monitor.add("b", None, nobody()).unwrap();
        assert_eq!(monitor.add("c", None, nobody()), Err(MonitorError::TooMany(2)));
        assert!(monitor.remove("a"));
        monitor.add("c", None, nobody()).unwrap();
        monitor.stop().await;
        assert_eq!(monitor.add("d", None, nobody()), Err(MonitorError::Stopped));
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_is_behind_is_told_what_it_missed() {
        let monitor = monitor(100, 4);
        let mut events = monitor.events();
        for n in 0..10 {
            monitor.add(&n.to_string(), None, nobody()).unwrap();
            monitor.remove(&n.to_string());
        }
        assert_eq!(events.next().await, Some(Told::Missed(6)));
        let Some(Told::Event(event)) = events.next().await else { panic!() };
        assert_eq!((event.address.as_str(), event.change), ("6", crate::client::PeerChange::Removed));
    }

    /// Why nobody answers stands in the reason; the times are those of the clock.
    #[tokio::test(start_paused = true)]
    async fn a_peer_that_never_answers_is_dead_by_the_clock() {
        let monitor = monitor(100, 16);
        let mut events = monitor.events();
        monitor.add("a", Some(NodeId::new("n2").unwrap()), nobody()).unwrap();
        let began = tokio::time::Instant::now();
        let mut states = Vec::new();
        while states.len() < 2 {
            let Some(Told::Event(event)) = events.next().await else { panic!() };
            assert!(event.reason.contains("no route"), "{event:?}");
            states.push((event.change, began.elapsed().as_secs()));
        }
        let change = |from, to| crate::client::PeerChange::State { from, to };
        assert_eq!(
            states,
            [
                (change(PeerState::WarmingUp, PeerState::Suspect), 5),
                (change(PeerState::Suspect, PeerState::Dead), 10)
            ]
        );
    }

    /// All tasks end with the last clone.
    #[tokio::test(start_paused = true)]
    async fn nothing_outlives_the_monitor() {
        let monitor = monitor(100, 16);
        monitor.add("a", None, nobody()).unwrap();
        let tasks = monitor.links.tasks.clone();
        drop(monitor);
        tasks.close();
        tokio::time::timeout(std::time::Duration::from_secs(60), tasks.wait()).await.unwrap();
    }
}

//! The node's own side: what it knows of its health, and the services that tell.
//!
//! | question | where |
//! |---|---|
//! | when does a result change a status? | `server/component.rs` |
//! | what makes the node ready, alive, started? | `server/verdict.rs`, `server/life.rs` |
//! | what if a check hangs or panics? | `server/runner.rs` |
//! | which checks are there? | [`checks`] |
//! | how is the standard protocol answered? | `server/standard.rs` |
//! | what do I implement? | [`NodeFacts`] |

use std::sync::Arc;
use std::time::Duration;

use proto_common::access::Access;
use proto_common::ids::{ComponentName, IdError};
use proto_common::text::printable;
use proto_common::v1::NodeIdentity;
use tokio::time::sleep_until;

mod asking;
mod callers;
mod check;
pub mod checks;
mod component;
mod core;
mod facts;
mod life;
#[cfg(feature = "machine")]
pub mod machine;
mod page;
mod places;
mod runner;
mod service;
mod standard;
mod verdict;
mod watch;

pub use check::{Check, CheckResult, Schedule};
pub use component::Component;
pub use facts::{Facts, FactsFuture, NodeFacts, Sections};
pub use places::ConnectionId;
pub use service::{NodeHealth, NodeHealthService};
pub use standard::{StandardHealth, StandardHealthService};

use self::component::Cell;
use self::core::{Inner, Parts};
use crate::limits::Limits;
use crate::v1::{DrainStep, HealthStatus, NodeState};

/// Why a component or a service was not added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// The name breaks the rule of identifiers.
    #[error(transparent)]
    Name(#[from] IdError),
    /// The name stands for a probe of the node.
    #[error("\"{0}\" is the name of a probe; choose another one")]
    Reserved(String),
    /// There is one of that name.
    #[error("there is a component \"{0}\" already")]
    Exists(String),
    /// The limit is reached.
    #[error("there are {0} components already, which is the limit")]
    TooMany(usize),
}

/// What a node knows of its health. Clones are the same registry; its checks end with the last one.
///
/// ```
/// use proto_common::v1::NodeIdentity;
/// use proto_health::server::{Check, CheckResult, Component, HealthRegistry, Schedule};
/// use proto_health::v1::HealthStatus;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let identity = NodeIdentity { node_id: "n1".into(), incarnation: 1, ..Default::default() };
/// let health = HealthRegistry::builder(identity).build();
/// // Set by the node itself.
/// let raft = health.add(Component::new("raft".parse()?).critical(), HealthStatus::Undecided, "no leader yet")?;
/// // Checked in the background.
/// let backup = Check::new(|| async { CheckResult::degraded("the last one is two days old") });
/// health.check(Component::new("backup".parse()?), Schedule::default(), backup)?;
/// health.set_running();
/// raft.set(HealthStatus::Healthy, "");
/// assert!(health.is_ready());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct HealthRegistry {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for HealthRegistry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HealthRegistry")
            .field("node_id", &self.inner.identity.node_id)
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

/// Makes a [`HealthRegistry`].
pub struct HealthRegistryBuilder {
    parts: Parts,
}

impl std::fmt::Debug for HealthRegistryBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HealthRegistryBuilder").field("limits", &self.parts.limits).finish_non_exhaustive()
    }
}

impl HealthRegistryBuilder {
    /// Other limits than the default ones.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.parts.limits = limits;
        self
    }

    /// Who tells what the node has and does, for `GetNodeStatus`. Without, it is never `safe_to_remove`: nobody knows.
    #[must_use]
    pub fn facts(mut self, facts: impl NodeFacts) -> Self {
        self.parts.facts = Some(Arc::new(facts));
        self
    }

    /// The cluster, and who may call. Default: everybody.
    #[must_use]
    pub fn access(mut self, access: Access) -> Self {
        self.parts.access = access;
        self
    }

    /// The machine, for `GetNodeStatus`.
    #[cfg(feature = "machine")]
    #[must_use]
    pub fn machine(mut self, machine: machine::Machine) -> Self {
        self.parts.machine = Some(machine);
        self
    }

    /// A registry in the state STARTING.
    #[must_use]
    pub fn build(self) -> HealthRegistry {
        HealthRegistry { inner: Arc::new(Inner::new(self.parts)) }
    }
}

/// A component that the node sets by hand. It stays when the handle is dropped.
#[derive(Debug, Clone)]
pub struct ComponentHandle {
    registry: HealthRegistry,
    name: Arc<str>,
}

impl ComponentHandle {
    /// Says how the component is, and why.
    pub fn set(&self, status: HealthStatus, message: impl AsRef<str>) {
        let inner = &self.registry.inner;
        let message = printable(message.as_ref(), inner.limits.message_bytes);
        inner.change(|core| {
            if let Some(cell) = core.cells.get_mut(&self.name) {
                cell.set(status, message);
            }
        });
    }
}

impl HealthRegistry {
    /// A registry of the node `identity`, whose `incarnation` must be higher than at the last start.
    #[must_use]
    pub fn builder(identity: NodeIdentity) -> HealthRegistryBuilder {
        HealthRegistryBuilder {
            parts: Parts {
                identity,
                limits: Limits::default(),
                facts: None,
                access: Access::default(),
                #[cfg(feature = "machine")]
                machine: None,
            },
        }
    }

    /// Adds a component that the node sets by hand.
    ///
    /// # Errors
    ///
    /// See [`RegistryError`]; nothing was added.
    pub fn add(
        &self,
        component: Component,
        status: HealthStatus,
        message: impl AsRef<str>,
    ) -> Result<ComponentHandle, RegistryError> {
        let message = printable(message.as_ref(), self.inner.limits.message_bytes);
        let name = self.put(Cell::by_hand(component, status, message))?;
        Ok(ComponentHandle { registry: self.clone(), name })
    }

    /// Adds a component that is checked in the background, at once and then on its schedule. Call it in a tokio runtime.
    ///
    /// # Errors
    ///
    /// See [`RegistryError`]; nothing was added.
    pub fn check(&self, component: Component, schedule: Schedule, check: Check) -> Result<(), RegistryError> {
        let stop = self.inner.stop.child_token();
        let guard = stop.clone().drop_guard();
        let name = self.put(Cell::checked(component, schedule.clone(), Some(guard)))?;
        if self.inner.tasks.is_empty() {
            self.watch_for_staleness();
        }
        let inner = Arc::downgrade(&self.inner);
        self.inner.tasks.spawn(runner::run(check, schedule, stop, move |outcome| {
            let Some(inner) = inner.upgrade() else { return false };
            let bytes = inner.limits.message_bytes;
            inner.change(|core| match core.cells.get_mut(&name) {
                Some(cell) => {
                    cell.record(outcome, tokio::time::Instant::now(), bytes);
                    true
                }
                None => false,
            })
        }));
        Ok(())
    }

    /// Tells watchers when a result becomes stale; whoever asks finds out by itself.
    fn watch_for_staleness(&self) {
        let (inner, stop) = (Arc::downgrade(&self.inner), self.inner.stop.clone());
        let mut shown = self.inner.subscribe();
        self.inner.tasks.spawn(async move {
            loop {
                let until = shown.borrow_and_update().fresh_until;
                let stale = async {
                    match until {
                        // What is stale is so strictly after the time.
                        Some(until) => sleep_until(until + Duration::from_millis(1)).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = stop.cancelled() => return,
                    changed = shown.changed() => if changed.is_err() { return },
                    () = stale => match inner.upgrade() {
                        Some(inner) => inner.refresh(),
                        None => return,
                    },
                }
            }
        });
    }

    fn put(&self, cell: Cell) -> Result<Arc<str>, RegistryError> {
        let name: Arc<str> = Arc::from(cell.component.name.as_str());
        if verdict::RESERVED.contains(&&*name) {
            return Err(RegistryError::Reserved(name.to_string()));
        }
        let limit = self.inner.limits.components;
        self.inner.change(|core| {
            if core.cells.contains_key(&name) {
                return Err(RegistryError::Exists(name.to_string()));
            }
            if core.cells.len() >= limit {
                return Err(RegistryError::TooMany(limit));
            }
            core.cells.insert(Arc::clone(&name), cell);
            Ok(Arc::clone(&name))
        })
    }

    /// Removes a component; its check ends. Watches of it say that it is not known.
    pub fn remove(&self, name: &ComponentName) {
        self.inner.change(|core| core.cells.remove(name.as_str()));
    }

    /// Names a gRPC service of the node, such as `node.snapshot.v1.SplitSnapshotService`, for the standard protocol: it is as ready
    /// as the node.
    pub fn add_service(&self, name: &str) {
        self.inner.change(|core| core.services.insert(Arc::from(name)));
    }

    /// The node no longer serves `name`.
    pub fn remove_service(&self, name: &str) {
        self.inner.change(|core| core.services.remove(name));
    }

    /// What the node does while it is STARTING, for people.
    pub fn set_starting(&self, reason: impl Into<String>) {
        self.inner.change(|core| core.life.starting(reason.into()));
    }

    /// The node serves. It is RUNNING from the moment on when every critical component that counts for startup works; and again,
    /// when it was in MAINTENANCE.
    pub fn set_running(&self) {
        self.inner.change(|core| core.life.up());
    }

    /// Returns when the start is complete: [`set_running`](Self::set_running) was called, and what counts for startup works. Cancel
    /// safe.
    pub async fn started(&self) {
        let started = |snapshot: &Arc<verdict::Snapshot>| snapshot.serving(verdict::STARTUP) == Some(true);
        // The sender lives as long as `self`.
        let _ = self.inner.subscribe().wait_for(started).await;
    }

    /// An operator takes the node out of service: not ready, but nothing ends.
    pub fn set_maintenance(&self, reason: impl Into<String>) {
        self.inner.change(|core| core.life.maintain(reason.into()));
    }

    /// The node's state.
    #[must_use]
    pub fn state(&self) -> NodeState {
        self.inner.peek(|snapshot| snapshot.state)
    }

    /// Whether work should be sent to the node.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.inner.peek(|snapshot| snapshot.serving(verdict::READINESS).unwrap_or(false))
    }

    /// When a node was last heard from: it called with its ID, or has a watch open. In milliseconds since the Unix epoch.
    #[must_use]
    pub fn last_heard_from(&self, node: &proto_common::ids::NodeId) -> Option<u64> {
        self.inner.callers.last_heard_from(node)
    }

    /// Withdraws readiness in every answer, at once. Refuse new work after this, never before; let what runs end within
    /// `grace`, then go on with [`set_stopping_tasks`](Self::set_stopping_tasks) and [`shut_down`](Self::shut_down).
    /// Called again it can only bring the deadline forward.
    pub fn begin_drain(&self, reason: impl Into<String>, grace: Duration) {
        self.inner.change(|core| core.life.drain(reason.into(), grace));
    }

    /// The drain's time is up: tasks are being stopped where they can be resumed.
    pub fn set_stopping_tasks(&self) {
        self.inner.change(|core| core.life.drain_step(DrainStep::StoppingTasks));
    }

    /// Sends the last state to every watcher and ends all watches; from now on there are no new ones. Returns when they have
    /// ended, or after `within`: a watcher that does not read keeps its place until its connection is closed. Checks end, too.
    ///
    /// Returns how many watches are still open. Cancel safe; may be called again.
    pub async fn shut_down(&self, within: Duration) -> usize {
        self.inner.change(|core| {
            core.life.shut_down();
            core.closed = true;
        });
        self.inner.stop.cancel();
        self.inner.tasks.close();
        let ended = async {
            self.inner.places.empty().await;
            self.inner.tasks.wait().await;
        };
        let _ = tokio::time::timeout(within, ended).await;
        self.inner.change(|core| core.life.drain_step(DrainStep::Stopped));
        self.inner.places.open()
    }

    /// `node.health.v1.HealthService`, to be added to a tonic server.
    #[must_use]
    pub fn service(&self) -> NodeHealthService {
        NodeHealth::server(Arc::clone(&self.inner))
    }

    /// The standard `grpc.health.v1.Health` from the same facts, to be added to the same server.
    #[must_use]
    pub fn standard_service(&self) -> StandardHealthService {
        StandardHealth::server(Arc::clone(&self.inner))
    }
}

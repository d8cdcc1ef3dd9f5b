//! Where the node is in its life, and how far its drain is.

use std::time::Duration;

use proto_common::clock::{millis, now_unix_ms};

use crate::v1::{DrainStatus, DrainStep, NodeState};

/// The life of this process.
#[derive(Debug)]
pub(crate) struct Life {
    state: NodeState,
    since_unix_ms: u64,
    reason: String,
    /// The node said that it is up; it is RUNNING when what counts for startup works.
    up: bool,
    /// It was RUNNING once.
    started: bool,
    drain: Option<Drain>,
}

#[derive(Debug, Clone, Copy)]
struct Drain {
    step: DrainStep,
    started_unix_ms: u64,
    deadline_unix_ms: u64,
}

impl Life {
    pub(crate) fn new() -> Self {
        Self {
            state: NodeState::Starting,
            since_unix_ms: now_unix_ms(),
            reason: String::new(),
            up: false,
            started: false,
            drain: None,
        }
    }

    pub(crate) fn state(&self) -> NodeState {
        self.state
    }

    pub(crate) fn since_unix_ms(&self) -> u64 {
        self.since_unix_ms
    }

    pub(crate) fn reason(&self) -> &str {
        &self.reason
    }

    pub(crate) fn started(&self) -> bool {
        self.started
    }

    fn enter(&mut self, state: NodeState, reason: String) {
        if self.state != state {
            self.state = state;
            self.since_unix_ms = now_unix_ms();
        }
        self.reason = reason;
    }

    /// What the node does while it starts.
    pub(crate) fn starting(&mut self, reason: String) {
        if self.state == NodeState::Starting {
            self.reason = reason;
        }
    }

    /// The node serves from now on; out of maintenance, again.
    pub(crate) fn up(&mut self) {
        self.up = true;
        if self.state == NodeState::Maintenance {
            let state = if self.started { NodeState::Running } else { NodeState::Starting };
            self.enter(state, String::new());
        }
    }

    /// Goes on to RUNNING, once what counts for startup works.
    pub(crate) fn advance(&mut self, startup_works: bool) {
        if self.state == NodeState::Starting && self.up && startup_works {
            self.started = true;
            self.enter(NodeState::Running, String::new());
        }
    }

    pub(crate) fn maintain(&mut self, reason: String) {
        if !self.state.is_leaving() {
            self.enter(NodeState::Maintenance, reason);
        }
    }

    /// Begins to drain. Called again it brings the deadline forward, never back.
    pub(crate) fn drain(&mut self, reason: String, grace: Duration) {
        if self.state == NodeState::ShuttingDown {
            return;
        }
        let now = now_unix_ms();
        let deadline_unix_ms = now.saturating_add(millis(grace));
        match &mut self.drain {
            Some(drain) => drain.deadline_unix_ms = drain.deadline_unix_ms.min(deadline_unix_ms),
            None => {
                self.drain =
                    Some(Drain { step: DrainStep::WaitingForTasks, started_unix_ms: now, deadline_unix_ms });
            }
        }
        self.enter(NodeState::Draining, reason);
    }

    pub(crate) fn drain_step(&mut self, step: DrainStep) {
        if let Some(drain) = &mut self.drain {
            drain.step = drain.step.max(step);
        }
    }

    pub(crate) fn shut_down(&mut self) {
        self.drain_step(DrainStep::ClosingWatches);
        let reason = std::mem::take(&mut self.reason);
        self.enter(NodeState::ShuttingDown, reason);
    }

    /// How far the drain is; the numbers of tasks are the caller's to fill in.
    pub(crate) fn drain_status(&self) -> Option<DrainStatus> {
        let Drain { step, started_unix_ms, deadline_unix_ms } = self.drain?;
        Some(DrainStatus {
            step: step.into(),
            started_unix_ms,
            deadline_unix_ms,
            reason: self.reason.clone(),
            active_transfers: 0,
            active_migrations: 0,
        })
    }

    /// Why the node takes no work, with what its components say beside it.
    pub(crate) fn why_not_ready(&self, components: &str) -> String {
        let state = match self.state {
            NodeState::Starting => "still starting",
            NodeState::Draining => "draining",
            NodeState::ShuttingDown => "shutting down",
            NodeState::Maintenance => "in maintenance",
            NodeState::Running | NodeState::Unspecified => "not ready",
        };
        let reason = if self.reason.is_empty() { String::new() } else { format!(": {}", self.reason) };
        let components = if components.is_empty() { String::new() } else { format!("; {components}") };
        format!("{state}{reason}{components}")
    }
}

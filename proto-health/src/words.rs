//! What the enums of the protocol say: one word for people, and how bad it is.

use crate::v1::{HealthStatus, NodeState, PeerState, RemovalBlockerKind, TaskKind};

impl HealthStatus {
    /// The status as people write it: `HEALTHY`.
    #[must_use]
    pub fn short_name(self) -> &'static str {
        self.as_str_name().trim_start_matches("HEALTH_STATUS_")
    }

    /// HEALTHY or DEGRADED: it works.
    #[must_use]
    pub fn works(self) -> bool {
        matches!(self, Self::Healthy | Self::Degraded)
    }

    /// The worst last.
    #[must_use]
    pub fn severity(self) -> u8 {
        match self {
            Self::Healthy => 0,
            Self::Degraded => 1,
            Self::Unspecified | Self::Undecided | Self::UnknownService => 2,
            Self::Unhealthy => 3,
        }
    }
}

impl NodeState {
    /// The state as people write it: `RUNNING`.
    #[must_use]
    pub fn short_name(self) -> &'static str {
        self.as_str_name().trim_start_matches("NODE_STATE_")
    }

    /// It said that it goes away.
    #[must_use]
    pub fn is_leaving(self) -> bool {
        matches!(self, Self::Draining | Self::ShuttingDown)
    }
}

impl PeerState {
    /// The state as people write it: `ALIVE`.
    #[must_use]
    pub fn short_name(self) -> &'static str {
        self.as_str_name().trim_start_matches("PEER_STATE_")
    }
}

impl TaskKind {
    /// The kind as people write it: `MIGRATION`.
    #[must_use]
    pub fn short_name(self) -> &'static str {
        self.as_str_name().trim_start_matches("TASK_KIND_")
    }
}

impl RemovalBlockerKind {
    /// The kind as people write it: `OWNS_SLOTS`.
    #[must_use]
    pub fn short_name(self) -> &'static str {
        self.as_str_name().trim_start_matches("REMOVAL_BLOCKER_KIND_")
    }
}

//! How peers are watched, and when the verdict on one changes.

use std::time::Duration;

use crate::client::detector::DetectorOptions;

/// How a peer's heartbeats come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heartbeats {
    /// One `WatchHealth` for as long as it goes: the peer sends, changes arrive at once.
    Watch,
    /// A `HealthCheck` each time: for peers behind something that does not let streams live.
    Poll,
}

/// Options of a [`PeerMonitor`](crate::client::PeerMonitor).
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct MonitorOptions {
    /// How heartbeats come. Default [`Heartbeats::Watch`].
    pub heartbeats: Heartbeats,
    /// Time between two of them: 100 ms to 60 s. Default 500 ms.
    pub heartbeat: Duration,
    /// How a row of them is judged.
    pub detector: DetectorOptions,
    /// Suspicion from which on a peer is SUSPECT. Default 8.
    pub suspect_phi: f64,
    /// Suspicion from which on it is DEAD, once it is silent for `dead_after`. Default 12.
    pub dead_phi: f64,
    /// Least silence of a DEAD peer: longer than what a node may stand still and be well after all, such as a pause of its
    /// memory management or of its virtual machine. Default 5 s.
    pub dead_after: Duration,
    /// Heartbeats on time, one after the other, before a SUSPECT or DEAD peer is ALIVE again. Default 3.
    pub recover_heartbeats: u32,
    /// Silence of a peer of which there are not enough heartbeats to judge, after which it is DEAD; after half of it, it is
    /// SUSPECT. Default 10 s.
    pub warm_up_timeout: Duration,
    /// Longest time that a connection, and the first answer on it, may take. Default 3 s.
    pub connect_timeout: Duration,
    /// Pause between attempts to connect, at most; the first ones are shorter. All have jitter. Default 3 s.
    pub reconnect_max: Duration,
    /// How often each peer is asked what it thinks of its own peers, this node among them. `None`: never. Default 5 s.
    pub opinions_interval: Option<Duration>,
    /// Connections that are being opened, and calls other than watches, at the same time. Default 16.
    pub concurrency: usize,
    /// Peers. Default 1024.
    pub peers: usize,
    /// Events that a slow reader may be behind; then it misses some, and is told so. Default 1024.
    pub events: usize,
}

impl Default for MonitorOptions {
    fn default() -> Self {
        Self {
            heartbeats: Heartbeats::Watch,
            heartbeat: Duration::from_millis(500),
            detector: DetectorOptions::default(),
            suspect_phi: 8.0,
            dead_phi: 12.0,
            dead_after: Duration::from_secs(5),
            recover_heartbeats: 3,
            warm_up_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(3),
            reconnect_max: Duration::from_secs(3),
            opinions_interval: Some(Duration::from_secs(5)),
            concurrency: 16,
            peers: 1024,
            events: 1024,
        }
    }
}

impl MonitorOptions {
    /// Time between two looks at all peers.
    pub(crate) fn tick(&self) -> Duration {
        (self.heartbeat / 5).clamp(Duration::from_millis(10), Duration::from_secs(1))
    }

    /// Silence after which a connection is given up for a new one.
    pub(crate) fn stall(&self) -> Duration {
        (self.heartbeat * 4).max(Duration::from_secs(2))
    }

    /// As the protocol has it.
    pub(crate) fn heartbeat_ms(&self) -> u32 {
        u32::try_from(self.heartbeat.as_millis()).unwrap_or(u32::MAX).clamp(100, 60_000)
    }
}

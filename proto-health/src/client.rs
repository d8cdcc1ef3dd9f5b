//! The view from outside: watching peers.
//!
//! | question | where |
//! |---|---|
//! | how suspicious is a silence? | [`Detector`] |
//! | when is a peer suspect, dead, alive again? | `client/peer.rs` |
//! | and when is it this node's own fault? | `client/table.rs` |
//! | what happens on the network? | `client/link.rs` |

mod clock;
mod detector;
mod link;
mod monitor;
mod options;
mod peer;
mod table;

pub use clock::{Clock, SystemClock};
pub use detector::{Detector, DetectorOptions};
pub use monitor::{MonitorError, PeerEvents, PeerMonitor, Reach, Told};
pub use options::{Heartbeats, MonitorOptions};
pub use peer::{Opinion, PeerChange, PeerEvent};

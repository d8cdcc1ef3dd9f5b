//! What every part of the node takes from the shared crates.

pub use proto::common::ids::NodeId;
pub use proto::common::slots::{SLOT_COUNT, SlotRange, slot_of};

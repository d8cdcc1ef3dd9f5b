//! Who plays the ends of a transfer.

pub mod ours;
pub mod plain;
pub mod programs;
pub mod raw;

use crate::side::{Side, say};

/// Plays one end, as the parent asks.
pub async fn play(side: Side) {
    let sent = match (side.peer.as_str(), side.address.as_deref()) {
        ("proto", None) => return ours::receive(&side).await,
        ("proto", Some(address)) => ours::send(&side, address).await,
        (plain::DEFAULTS | plain::TUNED, None) => return plain::receive(&side).await,
        (plain::DEFAULTS | plain::TUNED, Some(address)) => plain::send(&side, address).await,
        ("raw TCP", None) => return raw::receive(&side),
        ("raw TCP", Some(address)) => raw::send(&side, address),
        (other, _) => unreachable!("{other} is a program of its own"),
    };
    say(serde_json::to_string(&sent).expect("numbers can be written"));
}

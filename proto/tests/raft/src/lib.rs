//! A tiny consensus service that knows nothing of ours: tests and examples put it on the same server.

#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/raft.v1.rs"));
}

pub use generated::*;

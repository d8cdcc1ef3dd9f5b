//! Generated from `proto/node/migration/v1/migration.proto`, whose comments are the contract of the protocol.

#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/node.migration.v1.rs"));
}

pub use generated::*;

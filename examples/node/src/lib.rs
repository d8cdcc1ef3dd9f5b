//! A full node: a key-value store on an embedded database that speaks the Redis protocol, with the
//! node-to-node services beside it.
//!
//! | module | holds |
//! |---|---|
//! | [`store`] | the database: rows by slot, group commit, expiry, ownership, export and import |
//! | [`gate`] | whose a slot is, and which requests have to wait |
//! | [`node`] | both together: what a split is made of |
//! | [`split`] | handing slots over, at either end |
//! | [`migrate`] | the same while clients write: what a migration asks of the node |
//! | [`resp`] | the Redis port |
//! | [`grpc`] | the gRPC port |
//! | [`health`] | how the node is, what it tells of itself, and its drain |
//! | [`trust`] | TLS, the cluster, and who may call |
//! | [`serve`], [`cli`] | `node serve` |
//! | [`check`] | `node check` |
//! | [`demo`] | `node demo` |

pub mod check;
pub mod cli;
pub mod common;
pub mod demo;
mod descriptors;

pub mod gate;
pub mod grpc;
pub mod health;
mod incarnation;
pub mod migrate;
pub mod node;
pub mod resp;
pub mod serve;
pub mod split;
pub mod store;
pub mod trust;

//! The Redis protocol: requests in, replies out, one task per connection.

mod commands;
mod connection;
mod glob;
mod memory;
mod reply;
mod request;
mod scan;
mod server;

pub use request::{Limits, ProtocolError, RequestDecoder};
pub use server::RespServer;

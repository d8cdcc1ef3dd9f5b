//! What the tests of this crate share.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test binary uses a part of it")]

#[cfg(all(feature = "client", feature = "server"))]
pub mod frames;
#[cfg(all(feature = "client", feature = "server"))]
pub mod memory_source;
pub mod memory_target;
#[cfg(all(feature = "client", feature = "server"))]
pub mod pair;

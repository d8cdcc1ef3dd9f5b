//! Real nodes as processes, and what they do when they are killed, cut off, cheated and full. One program, since each would be linked with all of a node; the crashes at fail points
//! (`crashes.rs`) need another build of it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

#[path = "../../../../proto-common/tests/support/certificates.rs"]
#[allow(dead_code, reason = "other tests need the rest of it")]
mod certificates;
#[path = "../../../../proto-common/tests/support/secret.rs"]
mod secret;
#[path = "../support/mod.rs"]
#[allow(dead_code, unreachable_pub)]
mod support;

mod both_die;
mod cancelled;
mod checker;
mod commands;
mod cuts;
mod damage;
#[cfg(target_os = "linux")]
mod full_disk;
mod health;
mod hostile;
mod installing;
mod migration;
mod one_dies;
mod processes;
mod refused;
mod states;
mod trust;
mod wiped;

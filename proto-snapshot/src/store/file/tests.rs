//! Tests of the store as a user of the trait sees it; what can be lost worst, first.

mod basic;
mod cache;
mod crash;
mod damage;
mod install;
mod memory;
mod power;
mod random;
mod reuse;
mod space;
pub(super) mod support;
mod syscalls;
mod tree;

use super::{FileSnapshotStore, FileStoreOptions};

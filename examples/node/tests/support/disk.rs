//! Nodes whose disk is full: a file of theirs that would grow beyond a limit is answered with an error, as where there is no room.
//!
//! The limit is that of the kernel for one process, `RLIMIT_FSIZE`, which needs no file system of its own and no privilege. It is set while the node runs, at the moment
//! that a test chooses, and the next process of the node has none. The signal that comes with the error by default is ignored by the node's process, so that
//! the error is all that it sees.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use node::demo::processes::NodeProcess;
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use super::program;

/// A program that runs the node with the signal ignored, which is passed on to what is executed.
pub fn program_without_signal(directory: &Path) -> PathBuf {
    let path = directory.join("node-without-sigxfsz");
    let script = format!("#!/bin/sh\ntrap '' XFSZ\nexec '{}' \"$@\"\n", program().display());
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
    path
}

/// No file of the node's process becomes longer than `bytes` from now on, and nothing is written behind that; files that are longer stay as they are.
pub fn full_at(node: &NodeProcess, bytes: u64) {
    let pid = Pid::from_raw(i32::try_from(node.pid().unwrap()).unwrap());
    prlimit(pid, Resource::Fsize, Rlimit { current: Some(bytes), maximum: None }).unwrap();
}

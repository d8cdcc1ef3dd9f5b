//! What is fuzzed: each target is a plain function of bytes that panics on a finding.
//!
//! libFuzzer calls them (`proto/fuzz/fuzz_targets`, needs a C++ compiler), so do the runner of this package (stable) and the test that replays
//! `proto/fuzz/seeds`. A finding's input is kept there.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed expectation is a finding"
)]

use std::path::Path;

use anyhow::Context as _;

pub mod answers;
pub mod damage;
pub mod grpc;
mod harness;
pub mod ids;
pub mod journal;
pub mod manifest;
pub mod migration;
pub mod mutate;
pub mod records;
mod sender;
pub mod snapshot;
pub mod staging;
pub mod status;

pub use harness::panics;

#[path = "../../../../proto-migration/tests/support"]
#[allow(
    dead_code,
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    reason = "shared with its tests"
)]
mod support {
    pub(crate) mod frames;
    pub(crate) mod memory_target;
}

#[path = "../../../../proto-snapshot/src/store/file/tests/tree.rs"]
mod tree;

/// What is kept for the target of that name: `proto/fuzz/seeds`, by name of the file.
///
/// # Errors
///
/// A directory or a file that cannot be read.
pub fn seeds(name: &str) -> anyhow::Result<Vec<Vec<u8>>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../seeds").join(name);
    let entries = std::fs::read_dir(&dir).with_context(|| format!("no seeds in {}", dir.display()))?;
    let mut files: Vec<_> = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    files.sort();
    files
        .iter()
        .map(|file| std::fs::read(file).with_context(|| format!("cannot read {}", file.display())))
        .collect()
}

/// Something that is fuzzed.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// As the command line and the directory of its seeds name it.
    pub name: &'static str,
    /// What it looks for.
    pub about: &'static str,
    /// Tries one input; panics on a finding.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: [Target; 10] = [
    Target { name: "answers", about: "what a peer answers to the one that watches it", run: answers::run },
    Target { name: "grpc", about: "raw bytes as the body of every call of every service", run: grpc::run },
    Target {
        name: "ids",
        about: "the parsers of identifiers, names and slots against their rules",
        run: ids::run,
    },
    Target { name: "journal", about: "damaged files of a migration journal", run: journal::run },
    Target {
        name: "manifest",
        about: "headers and manifests, and where their names would lead",
        run: manifest::run,
    },
    Target {
        name: "migration",
        about: "sequences of frames to a migration's target, against a model",
        run: migration::run,
    },
    Target { name: "records", about: "damaged records of a migration's target", run: records::run },
    Target {
        name: "snapshot",
        about: "sequences of frames to a snapshot's receiver, against a model",
        run: snapshot::run,
    },
    Target { name: "staging", about: "damaged files of a snapshot store", run: staging::run },
    Target { name: "status", about: "error details of a peer", run: status::run },
];

/// The target of that name.
#[must_use]
pub fn target(name: &str) -> Option<Target> {
    TARGETS.into_iter().find(|target| target.name == name)
}

//! The ID of a transfer that was given none: the same for the same command on the same content, so that repeating the
//! command resumes, and another one as soon as anything differs.

use proto::common::ids::{IdError, NodeId, TransferId};
use proto::snapshot::source::Description;

use crate::args::Push;

/// `push-` and 80 bits of a hash over all that makes up the specification of the transfer.
pub(crate) fn of(push: &Push, source_node: &NodeId, content: &Description) -> Result<TransferId, IdError> {
    let mut hasher = blake3::Hasher::new_derive_key("nodectl push 2026: transfer ID from the specification");
    let mut field = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    field(push.source_shard.as_str().as_bytes());
    field(push.target_shard.as_str().as_bytes());
    field(source_node.as_str().as_bytes());
    field(push.slots.to_string().as_bytes());
    field(&push.term.to_le_bytes());
    field(&push.index.to_le_bytes());
    field(content.content_version.as_bytes());
    for file in &content.files {
        field(file.name.as_str().as_bytes());
        field(&file.size.unwrap_or(u64::MAX).to_le_bytes());
    }
    let hash = hasher.finalize().to_hex();
    TransferId::new(format!("push-{}", &hash[..20]))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Args, Command};

    #[test]
    fn equal_for_equal_commands_and_content_only() {
        let id = |extra: &str, version: &str| {
            let line = format!("nodectl push . --to n1:1 --source-shard s1 --target-shard s2 {extra}");
            let Command::Push(push) = Args::parse_from(line.split_whitespace()).command else { panic!() };
            let content = Description { files: Vec::new(), content_version: version.to_owned() };
            let source = push.source_node.clone().unwrap_or_else(|| "nodectl".parse().unwrap());
            of(&push, &source, &content).unwrap()
        };
        let first = id("", "v1");
        assert_eq!(first, id("--rate 1MiB --lanes 3 --epoch 4 --priority recovery", "v1"));
        for (extra, version) in [
            ("", "v2"),
            ("--slots 0-1", "v1"),
            ("--index 1", "v1"),
            ("--term 1", "v1"),
            ("--source-node x", "v1"),
        ] {
            assert_ne!(first, id(extra, version), "{extra} {version}");
        }
    }
}

//! What is moved, as validated types.
//!
//! Policy of this border: what arrives is checked once, field by field, and an error names the path of
//! the field. An empty `source_node_id` is only allowed where a caller asks the source itself.

use proto_common::error::Error;
use proto_common::ids::{NodeId, ShardId};
use proto_common::slots::SlotRange;

use crate::{Reason, v1};

/// Longest name of an encoding of values, in bytes.
pub const MAX_VALUE_FORMAT_LEN: usize = 64;

/// The part of a migration that never changes: what makes two calls with one ID mean the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigrationSpec {
    /// The slots that move.
    pub slots: SlotRange,
    /// The shard that gives them up.
    pub source_shard: ShardId,
    /// The shard that takes them over.
    pub target_shard: ShardId,
    /// The node that owns them.
    pub source_node: NodeId,
    /// The node that takes them over; not the source.
    pub target_node: NodeId,
    /// Cut over as soon as the lag allows, without being asked.
    pub auto_complete: bool,
    /// Name of the encoding of values: up to [`MAX_VALUE_FORMAT_LEN`] bytes of `a-z 0-9 . -`; empty if
    /// values are the bytes that a client sees.
    pub value_format: String,
}

impl MigrationSpec {
    /// Reads the specification in field `path` of a request; `asked` is the node that a caller asks to
    /// be the source, where it may leave the source out.
    ///
    /// # Errors
    ///
    /// `INVALID_FIELD`, `INVALID_ID`, `INVALID_SLOT_RANGE` or `SELF_MIGRATION`, naming the field.
    pub fn from_wire(
        spec: Option<v1::MigrationSpec>,
        path: &str,
        asked: Option<&NodeId>,
    ) -> Result<Self, Error> {
        let Some(spec) = spec else {
            return Err(
                Error::new(Reason::InvalidField, format!("{path} is missing")).violation(path, "is missing")
            );
        };
        let v1::MigrationSpec {
            slots,
            source_shard_id,
            target_shard_id,
            source_node_id,
            target_node_id,
            auto_complete,
            value_format,
        } = spec;
        let at = |field: &str| format!("{path}.{field}");
        let source_node = match asked {
            Some(asked) if source_node_id.is_empty() => asked.clone(),
            _ => NodeId::new(source_node_id).map_err(|error| error.at(at("source_node_id")))?,
        };
        let target_node = NodeId::new(target_node_id).map_err(|error| error.at(at("target_node_id")))?;
        if source_node == target_node {
            let sentence = format!("{source_node} cannot migrate slots to itself; name another target node");
            return Err(Error::new(Reason::SelfMigration, sentence)
                .violation(at("target_node_id"), "is the source node"));
        }
        check_value_format(&value_format).map_err(|problem| {
            let field = at("value_format");
            Error::new(Reason::InvalidField, format!("{field} {problem}")).violation(field, problem)
        })?;
        Ok(Self {
            slots: SlotRange::from_wire(slots).map_err(|error| error.at(at("slots")))?,
            source_shard: ShardId::new(source_shard_id).map_err(|error| error.at(at("source_shard_id")))?,
            target_shard: ShardId::new(target_shard_id).map_err(|error| error.at(at("target_shard_id")))?,
            source_node,
            target_node,
            auto_complete,
            value_format,
        })
    }

    /// The first field, by its name on the wire, in which `other` differs; `None` if they are the same.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Option<&'static str> {
        let Self { slots, source_shard, target_shard, source_node, target_node, auto_complete, value_format } =
            self;
        [
            (*slots == other.slots, "slots"),
            (*source_shard == other.source_shard, "source_shard_id"),
            (*target_shard == other.target_shard, "target_shard_id"),
            (*source_node == other.source_node, "source_node_id"),
            (*target_node == other.target_node, "target_node_id"),
            (*auto_complete == other.auto_complete, "auto_complete"),
            (*value_format == other.value_format, "value_format"),
        ]
        .into_iter()
        .find_map(|(same, field)| (!same).then_some(field))
    }
}

impl From<MigrationSpec> for v1::MigrationSpec {
    fn from(spec: MigrationSpec) -> Self {
        let MigrationSpec {
            slots,
            source_shard,
            target_shard,
            source_node,
            target_node,
            auto_complete,
            value_format,
        } = spec;
        Self {
            slots: Some(slots.into()),
            source_shard_id: source_shard.into(),
            target_shard_id: target_shard.into(),
            source_node_id: source_node.into(),
            target_node_id: target_node.into(),
            auto_complete,
            value_format,
        }
    }
}

fn check_value_format(name: &str) -> Result<(), &'static str> {
    if name.len() > MAX_VALUE_FORMAT_LEN {
        return Err("is longer than 64 bytes");
    }
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-');
    if name.bytes().all(allowed) { Ok(()) } else { Err("has a character that is none of a-z 0-9 . -") }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Change = fn(&mut v1::MigrationSpec);

    fn wire() -> v1::MigrationSpec {
        v1::MigrationSpec {
            slots: Some(proto_common::v1::SlotRange { start: 100, end: 200 }),
            source_shard_id: "s1".into(),
            target_shard_id: "s2".into(),
            source_node_id: "n1".into(),
            target_node_id: "n2".into(),
            auto_complete: true,
            value_format: "rows.v1".into(),
        }
    }

    fn read(spec: v1::MigrationSpec) -> Result<MigrationSpec, Error> {
        MigrationSpec::from_wire(Some(spec), "header.spec", None)
    }

    #[test]
    fn round_trip() {
        let spec = read(wire()).expect("a valid specification");
        assert_eq!(v1::MigrationSpec::from(spec), wire());
    }

    #[test]
    fn each_bad_field_is_named() {
        let bad: [(&str, &str, Change); 8] = [
            ("slots", "INVALID_SLOT_RANGE", |s| s.slots = None),
            ("slots", "INVALID_SLOT_RANGE", |s| s.slots.as_mut().expect("set").end = 16385),
            ("source_shard_id", "INVALID_ID", |s| s.source_shard_id = "../x".into()),
            ("target_shard_id", "INVALID_ID", |s| s.target_shard_id.clear()),
            ("source_node_id", "INVALID_ID", |s| s.source_node_id.clear()),
            ("target_node_id", "INVALID_ID", |s| s.target_node_id = "n".repeat(129)),
            ("target_node_id", "SELF_MIGRATION", |s| s.target_node_id = "n1".into()),
            ("value_format", "INVALID_FIELD", |s| s.value_format = "Rows".into()),
        ];
        for (field, reason, spoil) in bad {
            let mut spec = wire();
            spoil(&mut spec);
            let error = read(spec).expect_err(field);
            assert_eq!(error.reason(), reason, "{field}");
            assert_eq!(error.violations()[0].field, format!("header.spec.{field}"));
        }
        let error = MigrationSpec::from_wire(None, "header.spec", None).expect_err("no spec");
        assert_eq!(error.violations()[0].field, "header.spec");
    }

    #[test]
    fn the_node_that_is_asked_is_the_source_unless_one_is_named() {
        let asked = NodeId::new("n9").expect("an ID");
        let mut spec = wire();
        spec.source_node_id.clear();
        let read = MigrationSpec::from_wire(Some(spec), "spec", Some(&asked)).expect("valid");
        assert_eq!(read.source_node, asked);
        let named = MigrationSpec::from_wire(Some(wire()), "spec", Some(&asked)).expect("valid");
        assert_eq!(named.source_node.as_str(), "n1");
    }

    #[test]
    fn a_difference_is_named_for_every_field() {
        let changes: [(&str, Change); 7] = [
            ("slots", |s| s.slots.as_mut().expect("set").end = 201),
            ("source_shard_id", |s| s.source_shard_id = "s3".into()),
            ("target_shard_id", |s| s.target_shard_id = "s3".into()),
            ("source_node_id", |s| s.source_node_id = "n3".into()),
            ("target_node_id", |s| s.target_node_id = "n3".into()),
            ("auto_complete", |s| s.auto_complete = false),
            ("value_format", |s| s.value_format.clear()),
        ];
        let spec = read(wire()).expect("valid");
        assert_eq!(spec.difference(&spec.clone()), None);
        for (field, change) in changes {
            let mut other = wire();
            change(&mut other);
            assert_eq!(spec.difference(&read(other).expect("valid")), Some(field));
        }
    }
}

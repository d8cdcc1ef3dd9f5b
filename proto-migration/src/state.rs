//! What follows from a state alone.

use proto_common::v1::{Direction, Progress};

use crate::v1::{MigrationProgress, MigrationState};

impl MigrationState {
    /// Whether the migration has ended at the node that reports this state.
    ///
    /// `NEEDS_OPERATOR` has not: somebody has to decide. `COMMITTED` has not, either: the target keeps the
    /// record of the commit until the source has seen it.
    #[must_use]
    pub const fn is_final(self) -> bool {
        match self {
            Self::Completed | Self::Cancelled | Self::Failed => true,
            Self::Unspecified
            | Self::Pending
            | Self::Copying
            | Self::CatchingUp
            | Self::Ready
            | Self::Freezing
            | Self::Committing
            | Self::Cancelling
            | Self::NeedsOperator
            | Self::Receiving
            | Self::Prepared
            | Self::Committed => false,
        }
    }

    /// The state as people know it, such as `CATCHING_UP`.
    #[must_use]
    pub fn short_name(self) -> &'static str {
        let name = self.as_str_name();
        name.strip_prefix("MIGRATION_STATE_").unwrap_or(name)
    }
}

impl MigrationProgress {
    /// Whether the migration has ended at the node that reports.
    #[must_use]
    pub fn is_final(&self) -> bool {
        self.state().is_final()
    }

    /// The direction, seen from the node that reports.
    #[must_use]
    pub fn direction(&self) -> Direction {
        self.progress.as_ref().map_or(Direction::Unspecified, Progress::direction)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn final_states_are_those_that_the_contract_calls_final() {
        let proto = include_str!("../proto/node/migration/v1/migration.proto");
        let (_, body) = proto.split_once("enum MigrationState {").expect("the enum");
        let (body, _) = body.split_once("\n}").expect("its end");
        let mut said_final = false;
        let mut seen = 0;
        for line in body.lines().map(str::trim) {
            if let Some(comment) = line.strip_prefix("// ") {
                said_final |= comment.starts_with("Final");
            } else if let Some((name, _)) = line.split_once(" = ") {
                let state = MigrationState::from_str_name(name).expect(name);
                assert_eq!(state.is_final(), said_final, "{name}");
                assert_eq!(format!("MIGRATION_STATE_{}", state.short_name()), name);
                said_final = false;
                seen += 1;
            }
        }
        assert_eq!(seen, 15);
    }
}

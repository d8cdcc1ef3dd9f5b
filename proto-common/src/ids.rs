//! Identifiers, validated once at the border.
//!
//! Rule: 1 to [`MAX_ID_LEN`] bytes of `A-Z a-z 0-9 . _ -`, not starting with a dot. So an identifier is
//! also a safe file name. Inside a program only these types travel, never the strings they came from.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

use crate::error::{CommonReason, Error};
use crate::text::printable;

/// Longest identifier, in bytes.
pub const MAX_ID_LEN: usize = 128;

/// Length of an ID that is made at random and is no name: of a store (`NodeIdentity.store_id`), or of the session of a stream, in bytes.
pub const RANDOM_ID_LEN: usize = 16;

/// How much of a refused identifier an error message shows, in bytes.
const SHOWN_LEN: usize = 64;

/// Why a string is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{kind} \"{shown}\" {problem}")]
pub struct IdError {
    kind: &'static str,
    problem: IdProblem,
    shown: String,
}

/// What is wrong with an identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum IdProblem {
    /// No bytes at all.
    #[error("is empty; it takes 1 to {MAX_ID_LEN} bytes of A-Z a-z 0-9 . _ -")]
    Empty,
    /// More than [`MAX_ID_LEN`] bytes.
    #[error("has {0} bytes, the limit is {MAX_ID_LEN}")]
    TooLong(usize),
    /// The first byte is a dot.
    #[error("starts with a dot, which identifiers must not")]
    LeadingDot,
    /// A byte outside of the alphabet, at this index.
    #[error("has a character at byte {0} that is none of A-Z a-z 0-9 . _ -")]
    Character(usize),
}

impl IdError {
    fn new(kind: &'static str, problem: IdProblem, text: &str) -> Self {
        Self { kind, problem, shown: printable(text, SHOWN_LEN) }
    }

    /// Which kind of identifier was meant: `node_id`, `shard_id`, ...
    #[must_use]
    pub fn kind(&self) -> &'static str {
        self.kind
    }

    /// What is wrong.
    #[must_use]
    pub fn problem(&self) -> IdProblem {
        self.problem
    }

    /// The error for a caller that sent it in `field` (a path such as `header.transfer_id`).
    #[must_use]
    pub fn at(self, field: impl Into<String>) -> Error {
        Error::from(self.clone()).violation(field, self.to_string())
    }
}

impl From<IdError> for Error {
    fn from(error: IdError) -> Self {
        Self::new(CommonReason::InvalidId, error.to_string())
    }
}

fn check(text: &str) -> Result<(), IdProblem> {
    if text.is_empty() {
        return Err(IdProblem::Empty);
    }
    if text.len() > MAX_ID_LEN {
        return Err(IdProblem::TooLong(text.len()));
    }
    if text.starts_with('.') {
        return Err(IdProblem::LeadingDot);
    }
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    match text.bytes().position(|b| !allowed(b)) {
        Some(at) => Err(IdProblem::Character(at)),
        None => Ok(()),
    }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        ///
        /// Cheap to clone. Ordered by bytes.
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Validates `id`.
            ///
            /// # Errors
            ///
            /// [`IdError`] if it breaks the rule in the [module's documentation](self).
            pub fn new(id: impl AsRef<str>) -> Result<Self, IdError> {
                let id = id.as_ref();
                check(id).map_err(|problem| IdError::new($kind, problem, id))?;
                Ok(Self(Arc::from(id)))
            }

            /// The identifier as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                self.as_str()
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(id: &str) -> Result<Self, IdError> {
                Self::new(id)
            }
        }

        impl TryFrom<&str> for $name {
            type Error = IdError;

            fn try_from(id: &str) -> Result<Self, IdError> {
                Self::new(id)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(id: String) -> Result<Self, IdError> {
                Self::new(id)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.as_str().to_owned()
            }
        }
    };
}

id!(
    /// A node of the cluster.
    NodeId, "node_id"
);
id!(
    /// A shard: one range of slots and the members that replicate it.
    ShardId, "shard_id"
);
id!(
    /// One transfer of a snapshot, made by whoever starts it.
    TransferId, "transfer_id"
);
id!(
    /// One migration of a slot range, made by whoever starts it.
    MigrationId, "migration_id"
);
id!(
    /// A cluster, where clusters are named.
    ClusterId, "cluster_id"
);
id!(
    /// A component of a node, whose health is told by itself.
    ComponentName, "component"
);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn accepts_the_rule() {
        for id in ["a", "n1", "shard-7", "A.b_c-9", "-x", "_", &"x".repeat(MAX_ID_LEN)] {
            let parsed = TransferId::new(id).unwrap();
            assert_eq!(parsed.as_str(), id);
            assert_eq!(parsed.to_string().parse::<TransferId>().unwrap(), parsed);
        }
    }

    #[test]
    fn refuses_what_breaks_it_and_says_which_way() {
        let problem = |id: &str| NodeId::new(id).unwrap_err().problem();
        assert_eq!(problem(""), IdProblem::Empty);
        assert_eq!(problem(&"x".repeat(129)), IdProblem::TooLong(129));
        assert_eq!(problem("."), IdProblem::LeadingDot);
        assert_eq!(problem(".."), IdProblem::LeadingDot);
        assert_eq!(problem("a/b"), IdProblem::Character(1));
        assert_eq!(problem("ab\0"), IdProblem::Character(2));
        assert_eq!(problem("caf\u{e9}"), IdProblem::Character(3));
        assert_eq!(problem("a b"), IdProblem::Character(1));
    }

    #[test]
    fn the_error_is_short_and_names_the_field() {
        let error = NodeId::new("\x1b[31m".to_owned() + &"x".repeat(10_000)).unwrap_err();
        assert_eq!(error.kind(), "node_id");
        assert!(error.to_string().len() < 200, "{error}");
        assert!(!error.to_string().contains('\x1b'));
        let error = error.at("header.source_node");
        assert_eq!(error.reason(), "INVALID_ID");
        assert_eq!(error.violations()[0].field, "header.source_node");
    }

    proptest! {
        #[test]
        fn exactly_the_documented_language(id in "\\PC{0,10}|[A-Za-z0-9._-]{0,140}") {
            let rule = !id.is_empty()
                && id.len() <= 128
                && !id.starts_with('.')
                && id.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
            prop_assert_eq!(ShardId::new(&id).is_ok(), rule);
        }
    }
}

//! The one home of the outcome of a migration.
//!
//! By default it is the target's store: the commit, the ownership of the slots and the record are one transaction, and an attempt that
//! is fenced can never commit any more. A store whose ownership of slots is decided in a consensus gives the
//! [receiver](crate::receiver) a [`Decisions`] instead; then that decides, and the target's transaction follows it.

use std::future::Future;
use std::pin::Pin;

use proto_common::error::Error;
use proto_common::ids::MigrationId;

/// What becomes of one attempt of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Decision {
    /// The target owns the slots.
    Commit,
    /// This attempt changes nothing; a later one may.
    Abort,
}

/// Decides attempts, each once and for ever.
pub trait Decisions: Send + Sync + 'static {
    /// Decides `attempt` of `migration` as `wish` says, unless it is decided already, and returns the decision that holds.
    ///
    /// Write-once, linearizable over all callers in the cluster, durable on return, and idempotent: called again it returns the same.
    ///
    /// # Errors
    ///
    /// It is not known whether anything was decided; the caller asks again.
    fn decide<'a>(
        &'a self,
        migration: &'a MigrationId,
        attempt: u64,
        wish: Decision,
    ) -> Pin<Box<dyn Future<Output = Result<Decision, Error>> + Send + 'a>>;
}

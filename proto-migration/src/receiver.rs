//! The target's side: a service that stages what a source sends, and takes the slots over.

/// Takes slots over.
#[derive(Debug)]
pub struct MigrationReceiver {}

//! Why the service refuses: the error table of `health.proto`, typed.

proto_common::reasons! {
    /// A row of the error table in `health.proto`. A test compares the two.
    pub enum Reason {
        /// `from` is no identifier.
        InvalidId "INVALID_ID" InvalidArgument,
        /// A field is not valid: heartbeat out of bounds, a page token that is not from here, an
        /// unknown section.
        InvalidField "INVALID_FIELD" InvalidArgument,
        /// `HealthCheck` for a service that is not known.
        UnknownService "UNKNOWN_SERVICE" NotFound,
        /// No free place for one more watch.
        TooManyWatchers "TOO_MANY_WATCHERS" ResourceExhausted retry,
        /// The request did not come within 30 s.
        IdleTimeout "IDLE_TIMEOUT" DeadlineExceeded retry,
        /// A compressed message.
        UnsupportedCompression "UNSUPPORTED_COMPRESSION" Unimplemented,
        /// The caller has shown no certificate where one is needed.
        Unauthenticated "UNAUTHENTICATED" Unauthenticated,
        /// The caller belongs to another cluster; metadata `cluster_id`.
        WrongCluster "WRONG_CLUSTER" FailedPrecondition,
        /// The caller may not do this, or `from` is not its certificate's node.
        PermissionDenied "PERMISSION_DENIED" PermissionDenied,
        /// A new watch on a node that has sent its last frames.
        ShuttingDown "SHUTTING_DOWN" Unavailable retry,
        /// A bug in the node.
        Internal "INTERNAL" Internal,
    }
}

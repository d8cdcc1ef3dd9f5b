//! Why the service refuses: the error table of `migration.proto`, typed.

proto_common::reasons! {
    /// A row of the error table in `migration.proto`. A test compares the two.
    pub enum Reason {
        /// An ID breaks the rule for identifiers.
        InvalidId "INVALID_ID" InvalidArgument,
        /// A field is not valid: wrong length, out of bounds, unknown enum value, a tombstone with a
        /// value.
        InvalidField "INVALID_FIELD" InvalidArgument,
        /// A slot range is empty or beyond 16384.
        InvalidSlotRange "INVALID_SLOT_RANGE" InvalidArgument,
        /// The target is the source.
        SelfMigration "SELF_MIGRATION" InvalidArgument,
        /// The frame is not set or not known to this version.
        UnknownFrame "UNKNOWN_FRAME" InvalidArgument,
        /// A known frame at the wrong time: a batch before the header, a second header, `Bulk` after
        /// `last`, `Commit` without `Prepared`.
        UnexpectedFrame "UNEXPECTED_FRAME" InvalidArgument,
        /// A feature in `required_features` is not supported; metadata `feature`.
        UnsupportedFeature "UNSUPPORTED_FEATURE" Unimplemented,
        /// The target cannot read values of `value_format`; metadata `value_format`.
        UnsupportedValueFormat "UNSUPPORTED_VALUE_FORMAT" Unimplemented,
        /// A compressed message.
        UnsupportedCompression "UNSUPPORTED_COMPRESSION" Unimplemented,
        /// `number` is not 1 more than that of the batch before.
        BatchOutOfOrder "BATCH_OUT_OF_ORDER" InvalidArgument,
        /// Payload larger than `max_batch_bytes`, or too many entries.
        BatchTooLarge "BATCH_TOO_LARGE" InvalidArgument,
        /// An entry that fits in no batch, or a key that is too long; metadata `slot`, `size`; the task
        /// fails.
        EntryTooLarge "ENTRY_TOO_LARGE" FailedPrecondition,
        /// More bytes than `credit_limit` allows.
        CreditExceeded "CREDIT_EXCEEDED" InvalidArgument,
        /// The payload does not decode, or has another number of entries than declared.
        MalformedBatch "MALFORMED_BATCH" InvalidArgument,
        /// The key's slot is outside the range; metadata `slot`.
        KeyOutsideRange "KEY_OUTSIDE_RANGE" InvalidArgument,
        /// Payload and checksum differ; nothing of it was stored.
        BatchChecksumMismatch "BATCH_CHECKSUM_MISMATCH" DataLoss retry,
        /// `prev_seq` is not the watermark; metadata `watermark`.
        DeltaGap "DELTA_GAP" FailedPrecondition retry,
        /// `copy` is lower than the one that the target has; metadata `copy`.
        StaleCopy "STALE_COPY" FailedPrecondition,
        /// Same ID, other specification; metadata `field`.
        SpecificationMismatch "SPECIFICATION_MISMATCH" AlreadyExists,
        /// The fence is lower than the persisted one; metadata `current_epoch`, `current_term`.
        StaleFence "STALE_FENCE" FailedPrecondition,
        /// A slot is known at a higher or equal epoch; metadata `slot`, `slot_epoch`.
        StaleSlotEpoch "STALE_SLOT_EPOCH" FailedPrecondition retry,
        /// The attempt was used already by the same session; claim the next; metadata `attempt`.
        StaleAttempt "STALE_ATTEMPT" Aborted retry,
        /// Another session has this or a higher attempt; metadata `attempt`.
        Superseded "SUPERSEDED" FailedPrecondition,
        /// `target_node_id` (at the source: `source_node_id`) is another node; metadata `node_id`.
        WrongNode "WRONG_NODE" FailedPrecondition,
        /// The peer belongs to another cluster; metadata `cluster_id`.
        WrongCluster "WRONG_CLUSTER" FailedPrecondition,
        /// The peer's store is not the one that the migration began with; metadata `store_id` in
        /// hexadecimal.
        StoreChanged "STORE_CHANGED" FailedPrecondition,
        /// The source does not own every slot of the range; metadata `slot`, `owner` if known.
        NotSlotOwner "NOT_SLOT_OWNER" FailedPrecondition,
        /// Another transfer or migration holds slots of the range; metadata `holder`.
        RangeBusy "RANGE_BUSY" Aborted retry,
        /// A damaged record says nothing that can be trusted of slots of the range; metadata `holder` names it.
        SlotsQuarantined "SLOTS_QUARANTINED" FailedPrecondition,
        /// No free place for one more migration.
        TooManyMigrations "TOO_MANY_MIGRATIONS" ResourceExhausted retry,
        /// No free place for one more watcher.
        TooManyWatchers "TOO_MANY_WATCHERS" ResourceExhausted retry,
        /// Staging does not fit on the disk; metadata `needed_bytes`, `available_bytes`, and `peer` where it is that node's share that is used up.
        InsufficientDisk "INSUFFICIENT_DISK" ResourceExhausted retry,
        /// One more shard of which a fence would be kept.
        TooManyShards "TOO_MANY_SHARDS" ResourceExhausted,
        /// `Prepare` before the copy is complete, or the watermark is not `final_seq`; metadata
        /// `watermark`.
        NotCaughtUp "NOT_CAUGHT_UP" FailedPrecondition retry,
        /// Count or digest of a slot differ; metadata `slot`, the first one; the task fails.
        DigestMismatch "DIGEST_MISMATCH" DataLoss,
        /// The freeze took longer than `freeze_timeout_ms`; the task goes on.
        FreezeTimeout "FREEZE_TIMEOUT" DeadlineExceeded retry,
        /// `CompleteMigration` missed its deadline; the task is READY again.
        CompleteDeadline "COMPLETE_DEADLINE" DeadlineExceeded retry,
        /// `CompleteMigration` before CATCHING_UP; metadata `state`.
        NotReady "NOT_READY" FailedPrecondition retry,
        /// Cancel in COMMITTING: the outcome is being found out; ask again.
        OutcomePending "OUTCOME_PENDING" FailedPrecondition retry,
        /// Cancel after the commit.
        AlreadyCommitted "ALREADY_COMMITTED" FailedPrecondition,
        /// Complete, or resolve, after the task ended otherwise; metadata `state`.
        MigrationEnded "MIGRATION_ENDED" FailedPrecondition,
        /// The migration was cancelled.
        MigrationCancelled "MIGRATION_CANCELLED" Cancelled,
        /// No `Accepted` within `accept_timeout_ms` of the start; the task fails.
        TargetUnreachable "TARGET_UNREACHABLE" Unavailable retry,
        /// The target has no record of an attempt that was prepared; the task needs an operator.
        OutcomeLost "OUTCOME_LOST" DataLoss,
        /// Resolve in a state, for an attempt or for a store that does not fit; metadata `state`,
        /// `attempt`, `store_id`.
        ResolveRefused "RESOLVE_REFUSED" FailedPrecondition,
        /// The change log was cut behind the watermark; copying starts again.
        LogLost "LOG_LOST" OutOfRange retry,
        /// No such migration, neither active nor in the history.
        MigrationNotFound "MIGRATION_NOT_FOUND" NotFound,
        /// The caller has shown no certificate where one is needed.
        Unauthenticated "UNAUTHENTICATED" Unauthenticated,
        /// The caller may not do this, or claims a node_id that is not its certificate's.
        PermissionDenied "PERMISSION_DENIED" PermissionDenied,
        /// Nothing arrived for the idle timeout.
        IdleTimeout "IDLE_TIMEOUT" DeadlineExceeded retry,
        /// Fewer bytes than the slowest accepted rate, before all rows were copied.
        TooSlow "TOO_SLOW" DeadlineExceeded retry,
        /// The stream was closed without an end frame.
        StreamEndedEarly "STREAM_ENDED_EARLY" Aborted retry,
        /// Reading or writing the store failed.
        StorageFailed "STORAGE_FAILED" Unavailable retry,
        /// The node is shutting down or draining.
        ShuttingDown "SHUTTING_DOWN" Unavailable retry,
        /// A bug in the node.
        Internal "INTERNAL" Internal,
    }
}

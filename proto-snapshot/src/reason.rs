//! Why the service refuses: the error table of `snapshot.proto`, typed.

proto_common::reasons! {
    /// A row of the error table in `snapshot.proto`. A test compares the two.
    pub enum Reason {
        /// An ID is not valid.
        InvalidId "INVALID_ID" InvalidArgument,
        /// Another field is not valid.
        InvalidField "INVALID_FIELD" InvalidArgument,
        /// A slot range is empty or beyond 16384.
        InvalidSlotRange "INVALID_SLOT_RANGE" InvalidArgument,
        /// The frame is not set or not known to this version, or a message is not one of its type.
        UnknownFrame "UNKNOWN_FRAME" InvalidArgument,
        /// A known frame at the wrong time.
        UnexpectedFrame "UNEXPECTED_FRAME" InvalidArgument,
        /// A compressed message.
        UnsupportedCompression "UNSUPPORTED_COMPRESSION" Unimplemented,
        /// A required feature is not supported.
        UnsupportedFeature "UNSUPPORTED_FEATURE" Unimplemented,
        /// The header means another node.
        WrongNode "WRONG_NODE" FailedPrecondition,
        /// The caller has shown no certificate where one is needed.
        Unauthenticated "UNAUTHENTICATED" Unauthenticated,
        /// The caller belongs to another cluster; metadata `cluster_id`.
        WrongCluster "WRONG_CLUSTER" FailedPrecondition,
        /// The caller may not do this, or claims a node that is not its certificate's.
        PermissionDenied "PERMISSION_DENIED" PermissionDenied,
        /// A file name breaks the rules.
        InvalidFileName "INVALID_FILE_NAME" InvalidArgument,
        /// Two files of one name, or a name that is a directory of another.
        ConflictingFileNames "CONFLICTING_FILE_NAMES" InvalidArgument,
        /// Declared counts, or the directories of the files, are beyond a limit.
        ManifestTooLarge "MANIFEST_TOO_LARGE" InvalidArgument,
        /// The manifest differs from the counts in the header.
        ManifestMismatch "MANIFEST_MISMATCH" InvalidArgument,
        /// A file or the snapshot is larger than allowed.
        SnapshotTooLarge "SNAPSHOT_TOO_LARGE" InvalidArgument,
        /// A payload or message is larger than allowed.
        ChunkTooLarge "CHUNK_TOO_LARGE" InvalidArgument,
        /// A chunk has no payload.
        EmptyChunk "EMPTY_CHUNK" InvalidArgument,
        /// The extent is not part of the manifest.
        ExtentOutOfBounds "EXTENT_OUT_OF_BOUNDS" InvalidArgument,
        /// Bytes that are there already.
        OverlappingExtent "OVERLAPPING_EXTENT" InvalidArgument,
        /// Too many pieces with gaps between them.
        TooFragmented "TOO_FRAGMENTED" InvalidArgument,
        /// More bytes than credit was given for.
        CreditExceeded "CREDIT_EXCEEDED" InvalidArgument,
        /// Payload and checksum differ.
        ChunkChecksumMismatch "CHUNK_CHECKSUM_MISMATCH" DataLoss retry,
        /// `End` while extents are missing.
        MissingExtents "MISSING_EXTENTS" FailedPrecondition,
        /// Totals differ from what arrived.
        TotalsMismatch "TOTALS_MISMATCH" DataLoss,
        /// A whole-file checksum differs from what was stored.
        FileChecksumMismatch "FILE_CHECKSUM_MISMATCH" DataLoss,
        /// Stored data no longer matches its record.
        StagedDataDamaged "STAGED_DATA_DAMAGED" DataLoss retry,
        /// The stream was closed without `End`.
        StreamEndedEarly "STREAM_ENDED_EARLY" Aborted retry,
        /// Same ID, other specification.
        SpecificationMismatch "SPECIFICATION_MISMATCH" AlreadyExists,
        /// The fence is lower than the persisted one.
        StaleFence "STALE_FENCE" FailedPrecondition,
        /// An installed snapshot of the shard is newer.
        StaleSnapshot "STALE_SNAPSHOT" FailedPrecondition,
        /// Another sender claimed this ID.
        Superseded "SUPERSEDED" FailedPrecondition,
        /// A lane without a control stream.
        NoSuchAttempt "NO_SUCH_ATTEMPT" FailedPrecondition retry,
        /// Slots of the range are held by another task.
        RangeBusy "RANGE_BUSY" Aborted retry,
        /// A damaged record says nothing that can be trusted of slots of the range; metadata `holder` names it.
        SlotsQuarantined "SLOTS_QUARANTINED" FailedPrecondition,
        /// No free place for one more transfer.
        TooManyTransfers "TOO_MANY_TRANSFERS" ResourceExhausted retry,
        /// The snapshot does not fit on the disk.
        InsufficientDisk "INSUFFICIENT_DISK" ResourceExhausted retry,
        /// One more shard of which only a fence would be kept, or the first snapshot.
        TooManyShards "TOO_MANY_SHARDS" ResourceExhausted,
        /// No free place for one more watcher.
        TooManyWatchers "TOO_MANY_WATCHERS" ResourceExhausted retry,
        /// The transfer was cancelled.
        TransferCancelled "TRANSFER_CANCELLED" Cancelled,
        /// A cancel came at INSTALLING or later.
        TooLateToCancel "TOO_LATE_TO_CANCEL" FailedPrecondition,
        /// The store's owner refused the snapshot for good, or the record of its shard is damaged; metadata `shard`.
        InstallRefused "INSTALL_REFUSED" FailedPrecondition,
        /// Nothing arrived for the idle timeout.
        IdleTimeout "IDLE_TIMEOUT" DeadlineExceeded retry,
        /// Fewer bytes than the slowest accepted rate.
        TooSlow "TOO_SLOW" DeadlineExceeded retry,
        /// No such transfer.
        TransferNotFound "TRANSFER_NOT_FOUND" NotFound,
        /// Reading or writing the staging area failed.
        StorageFailed "STORAGE_FAILED" Unavailable retry,
        /// The node is going away.
        ShuttingDown "SHUTTING_DOWN" Unavailable retry,
        /// A bug.
        Internal "INTERNAL" Internal,
    }
}

//! Reasons: what programs decide by.

use super::Code;

/// A reason from the error table of a service, with the code that it always comes with.
///
/// Each service has an enum of its own reasons; [`CommonReason`] holds those that all services share.
pub trait Reason {
    /// `UPPER_SNAKE_CASE`; a part of the protocol, so it never changes.
    fn as_str(&self) -> &'static str;

    /// The gRPC code of a call that fails for this reason.
    fn code(&self) -> Code;
}

impl<R: Reason + ?Sized> Reason for &R {
    fn as_str(&self) -> &'static str {
        (**self).as_str()
    }

    fn code(&self) -> Code {
        (**self).code()
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident $name:literal $code:ident,)*) => {
        /// Reasons that every service uses with the same meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum CommonReason {
            $($(#[$doc])* $variant,)*
        }

        impl CommonReason {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),*];
        }

        impl Reason for CommonReason {
            fn as_str(&self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            fn code(&self) -> Code {
                match self { $(Self::$variant => Code::$code,)* }
            }
        }
    };
}

reasons! {
    /// An identifier breaks the rule.
    InvalidId "INVALID_ID" InvalidArgument,
    /// A slot range is empty, backwards, missing, or beyond the last slot.
    InvalidSlotRange "INVALID_SLOT_RANGE" InvalidArgument,
    /// A file name breaks the rule, or clashes with another one.
    InvalidFileName "INVALID_FILE_NAME" InvalidArgument,
    /// Any other field is wrong; the violations name it.
    InvalidField "INVALID_FIELD" InvalidArgument,
    /// The peer sent a frame that this side does not know.
    UnknownFrame "UNKNOWN_FRAME" InvalidArgument,
    /// The shard's fence is lower than the one that the node holds. Final.
    StaleFence "STALE_FENCE" FailedPrecondition,
    /// Another sender has claimed the ID with a higher attempt. Final.
    Superseded "SUPERSEDED" FailedPrecondition,
    /// Another task holds slots of the range.
    RangeBusy "RANGE_BUSY" Aborted,
    /// What is known of slots of the range is damaged; an operator has to look at it.
    SlotsQuarantined "SLOTS_QUARANTINED" FailedPrecondition,
    /// Nothing arrived for longer than the idle timeout.
    IdleTimeout "IDLE_TIMEOUT" DeadlineExceeded,
    /// There is nothing under that name.
    NotFound "NOT_FOUND" NotFound,
    /// The ID is taken by something else.
    AlreadyExists "ALREADY_EXISTS" AlreadyExists,
    /// A limit of the node is reached.
    LimitExceeded "LIMIT_EXCEEDED" ResourceExhausted,
    /// Somebody cancelled it. Final.
    Cancelled "CANCELLED" Cancelled,
    /// The caller may not do that.
    PermissionDenied "PERMISSION_DENIED" PermissionDenied,
    /// The caller has not proved who it is.
    Unauthenticated "UNAUTHENTICATED" Unauthenticated,
    /// A certificate, of this side or the other, has expired.
    CertificateExpired "CERTIFICATE_EXPIRED" Unauthenticated,
    /// A certificate is signed by a CA that the other side does not trust.
    UnknownCa "UNKNOWN_CA" Unauthenticated,
    /// The peer's certificate is not that of the node that was meant.
    WrongPeer "WRONG_PEER" Unauthenticated,
    /// TLS cannot be spoken for another reason; the message has it.
    TlsFailed "TLS_FAILED" Unauthenticated,
    /// The peer, or the call, belongs to another cluster.
    WrongCluster "WRONG_CLUSTER" FailedPrecondition,
    /// The node does not know the call, or the feature.
    Unimplemented "UNIMPLEMENTED" Unimplemented,
    /// What arrived is not what was sent.
    DataLoss "DATA_LOSS" DataLoss,
    /// The node cannot be reached, or the connection broke.
    Unavailable "UNAVAILABLE" Unavailable,
    /// The node is about to stop.
    ShuttingDown "SHUTTING_DOWN" Unavailable,
    /// A defect, or the disk, at the node.
    Internal "INTERNAL" Internal,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upper_snake_case_within_the_limit_of_google_rpc() {
        for reason in CommonReason::ALL {
            let name = reason.as_str();
            assert!(name.len() <= 63 && name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_'), "{name}");
            assert_ne!(reason.code(), Code::Ok);
        }
    }
}

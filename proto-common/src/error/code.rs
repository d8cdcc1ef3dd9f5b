//! The status codes of gRPC, without gRPC.

use std::fmt;

use thiserror::Error;

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $number:literal $name:literal,)*) => {
        /// A [gRPC status code](https://grpc.io/docs/guides/status-codes/).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Code {
            $($(#[$doc])* $variant = $number,)*
        }

        impl Code {
            /// All codes, by number.
            pub const ALL: [Self; 17] = [$(Self::$variant),*];

            /// The number on the wire, 0..=16.
            #[must_use]
            pub const fn number(self) -> u32 {
                match self { $(Self::$variant => $number,)* }
            }

            /// The name in the specification, such as `FAILED_PRECONDITION`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }

        impl TryFrom<u32> for Code {
            type Error = UnknownCode;

            fn try_from(number: u32) -> Result<Self, UnknownCode> {
                match number {
                    $($number => Ok(Self::$variant),)*
                    _ => Err(UnknownCode(number)),
                }
            }
        }
    };
}

codes! {
    /// No error.
    Ok = 0 "OK",
    /// The caller gave up, or the call was cut off.
    Cancelled = 1 "CANCELLED",
    /// Nobody said what it is.
    Unknown = 2 "UNKNOWN",
    /// The request is wrong whatever the state of the node.
    InvalidArgument = 3 "INVALID_ARGUMENT",
    /// Time ran out before it was done.
    DeadlineExceeded = 4 "DEADLINE_EXCEEDED",
    /// There is no such thing.
    NotFound = 5 "NOT_FOUND",
    /// The ID is taken by something else.
    AlreadyExists = 6 "ALREADY_EXISTS",
    /// This caller may not do that.
    PermissionDenied = 7 "PERMISSION_DENIED",
    /// A limit, or the disk, is used up.
    ResourceExhausted = 8 "RESOURCE_EXHAUSTED",
    /// The state of the node does not allow it; somebody has to change that first.
    FailedPrecondition = 9 "FAILED_PRECONDITION",
    /// A conflict with something concurrent.
    Aborted = 10 "ABORTED",
    /// Beyond the valid range.
    OutOfRange = 11 "OUT_OF_RANGE",
    /// The node does not know the call, or the feature.
    Unimplemented = 12 "UNIMPLEMENTED",
    /// Something is broken at the node.
    Internal = 13 "INTERNAL",
    /// Not now: the node is starting, stopping, or out of reach.
    Unavailable = 14 "UNAVAILABLE",
    /// Data was corrupted or lost.
    DataLoss = 15 "DATA_LOSS",
    /// The caller did not say who it is.
    Unauthenticated = 16 "UNAUTHENTICATED",
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A number that is not a gRPC status code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{0} is not a gRPC status code")]
pub struct UnknownCode(pub u32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip() {
        for (number, code) in (0..).zip(Code::ALL) {
            assert_eq!(code.number(), number);
            assert_eq!(Code::try_from(number), Ok(code));
        }
        assert_eq!(Code::try_from(17), Err(UnknownCode(17)));
    }
}

//! Why the service refuses: the error table of `health.proto`, typed.

use proto_common::error::Code;

macro_rules! reasons {
    (@retry) => { false };
    (@retry retry) => { true };
    ($($(#[$doc:meta])* $variant:ident $name:literal $code:ident $($retry:ident)?,)*) => {
        /// A row of the error table in `health.proto`. A test compares the two.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Reason {
            $($(#[$doc])* $variant,)*
        }

        impl Reason {
            /// All reasons, in the order of the table.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The reason that an error names `text`, if this version knows it.
            #[must_use]
            pub fn parse(text: &str) -> Option<Self> {
                match text {
                    $($name => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// Whether an error for this reason says after which time to try again.
            #[must_use]
            pub const fn hints_retry(self) -> bool {
                match self {
                    $(Self::$variant => reasons!(@retry $($retry)?),)*
                }
            }
        }

        impl proto_common::error::Reason for Reason {
            fn as_str(&self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            fn code(&self) -> Code {
                match self {
                    $(Self::$variant => Code::$code,)*
                }
            }
        }
    };
}

reasons! {
    /// `from` is no identifier.
    InvalidId "INVALID_ID" InvalidArgument,
    /// A field is not valid: heartbeat out of bounds, a page token that is not from here, an
    /// unknown section.
    InvalidField "INVALID_FIELD" InvalidArgument,
    /// `HealthCheck` for a service that is not known.
    UnknownService "UNKNOWN_SERVICE" NotFound,
    /// No free place for one more watch.
    TooManyWatchers "TOO_MANY_WATCHERS" ResourceExhausted retry,
    /// A compressed message.
    UnsupportedCompression "UNSUPPORTED_COMPRESSION" Unimplemented,
    /// The caller may not do this, or `from` is not its certificate's node.
    PermissionDenied "PERMISSION_DENIED" PermissionDenied,
    /// A new watch on a node that has sent its last frames.
    ShuttingDown "SHUTTING_DOWN" Unavailable retry,
    /// A bug in the node.
    Internal "INTERNAL" Internal,
}

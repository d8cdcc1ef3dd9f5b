//! The enum of a service's reasons, written as the rows of its error table.

/// Defines `pub enum Reason` of a service from the rows of the error table in its `.proto`:
/// `Variant "REASON" Code`, and `retry` where errors of that reason carry `RetryInfo`.
///
/// ```
/// proto_common::reasons! {
///     /// Why the service refuses.
///     pub enum Reason {
///         /// No free place.
///         TooManyWatchers "TOO_MANY_WATCHERS" ResourceExhausted retry,
///         /// A bug.
///         Internal "INTERNAL" Internal,
///     }
/// }
///
/// assert!(Reason::TooManyWatchers.error("come back later").is_retryable());
/// assert!(!Reason::Internal.error("sorry").is_retryable());
/// assert_eq!(Reason::parse("INTERNAL"), Some(Reason::Internal));
/// ```
#[macro_export]
macro_rules! reasons {
    (@retry) => { false };
    (@retry retry) => { true };
    (
        $(#[$enum_doc:meta])*
        pub enum $reason:ident {
            $($(#[$doc:meta])* $variant:ident $name:literal $code:ident $($retry:ident)?,)*
        }
    ) => {
        $(#[$enum_doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum $reason {
            $($(#[$doc])* $variant,)*
        }

        impl $reason {
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
                    $(Self::$variant => $crate::reasons!(@retry $($retry)?),)*
                }
            }

            /// An error for this reason; with `RetryInfo` where trying again can help.
            #[must_use]
            pub fn error(self, message: impl Into<String>) -> $crate::error::Error {
                let error = $crate::error::Error::new(self, message);
                if self.hints_retry() { error.retry_after($crate::error::RETRY_AFTER) } else { error }
            }

            /// An error that blames the field `path`.
            #[must_use]
            pub fn field(self, path: &str, description: impl Into<String>) -> $crate::error::Error {
                let description = description.into();
                self.error(format!("{path}: {description}")).violation(path, description)
            }
        }

        impl $crate::error::Reason for $reason {
            fn as_str(&self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            fn code(&self) -> $crate::error::Code {
                match self {
                    $(Self::$variant => $crate::error::Code::$code,)*
                }
            }
        }
    };
}

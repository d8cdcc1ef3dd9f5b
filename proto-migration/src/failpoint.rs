//! Places at which a test has the process die, exactly there. Nothing of it is compiled without the feature `failpoints`.
//!
//! `PROTO_FAILPOINT=place` in the environment aborts the process when it comes there for the first time, as SIGKILL would: nothing is
//! flushed, dropped or told.

use crate::v1::MigrationState;

/// The process has come to `place`, with a migration in `state`.
pub(crate) fn reached(place: &str, state: MigrationState) {
    #[cfg(feature = "failpoints")]
    {
        static WANTED: std::sync::LazyLock<Option<String>> =
            std::sync::LazyLock::new(|| std::env::var("PROTO_FAILPOINT").ok());
        if let Some(wanted) = &*WANTED
            && *wanted == format!("{place}:{}", state.short_name())
        {
            eprintln!("fail point {wanted}");
            std::process::abort();
        }
    }
    #[cfg(not(feature = "failpoints"))]
    let _ = (place, state);
}

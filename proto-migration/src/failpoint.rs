//! Places at which a test has the process die, exactly there. Nothing of it is compiled without the feature `failpoints`.
//!
//! `PROTO_FAILPOINT=place:STATE` in the environment aborts the process when it comes there for the first time. For what these tests ask it is
//! as SIGKILL: no destructor runs, nothing is flushed or told, no other thread gets further than it is, and the kernel keeps what was
//! written and closes the sockets. It differs in three ways, none of which a peer or the disk can see: the parent reads SIGABRT, by which a
//! test knows that this place was reached; a line on standard error says which; and where core dumps are on, the sockets stay open for as
//! long as the dump takes.

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

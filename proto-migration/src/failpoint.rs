//! Places at which a test has the process die, exactly there. Nothing of it is compiled without the feature `failpoints`.
//!
//! `PROTO_FAILPOINT=place:STATE` in the environment has the process send itself SIGKILL when it comes there for the first time, behind a line on
//! standard error that says where: so a test knows that this place was reached, and that nothing else ended the process. The signal comes before the call
//! returns, so this thread gets no further; nothing can catch it, and the kernel keeps what was written and closes the sockets.

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
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
            // If it could not be sent: a test that waits for SIGKILL sees this one.
            std::process::abort();
        }
    }
    #[cfg(not(feature = "failpoints"))]
    let _ = (place, state);
}

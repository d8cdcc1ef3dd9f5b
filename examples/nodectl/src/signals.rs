//! Ctrl-C and SIGTERM: the first one asks to stop, the second ends the process at once.

use tokio::sync::watch;

use crate::failure::{Failure, INTERRUPTED};

/// Hears signals from its making on.
#[derive(Debug)]
pub(crate) struct Signals {
    heard: watch::Receiver<bool>,
}

impl Signals {
    /// Starts to listen; must be called in a tokio runtime. The task that listens ends with the process.
    pub(crate) fn listen() -> Result<Self, Failure> {
        let mut source =
            Source::new().map_err(|error| Failure::failed(format!("cannot listen for signals: {error}")))?;
        let (tell, heard) = watch::channel(false);
        tokio::spawn(async move {
            source.next().await;
            tell.send_replace(true);
            source.next().await;
            std::process::exit(INTERRUPTED.into());
        });
        Ok(Self { heard })
    }

    /// What `work` comes to, or `interrupted` if there is a signal first.
    pub(crate) async fn before(
        &mut self,
        interrupted: Failure,
        work: impl Future<Output = Result<(), Failure>>,
    ) -> Result<(), Failure> {
        tokio::select! {
            result = work => result,
            () = self.interrupted() => Err(interrupted),
        }
    }

    /// Returns once there was a signal. Cancel safe.
    pub(crate) async fn interrupted(&mut self) {
        if self.heard.wait_for(|heard| *heard).await.is_err() {
            // Nobody listens any more: there will never be one.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(unix)]
struct Source {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Source {
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(not(unix))]
struct Source;

#[cfg(not(unix))]
impl Source {
    fn new() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

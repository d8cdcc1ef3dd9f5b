//! Nodes as processes of their own: started, killed, restarted, stopped.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpSocket;
use tokio::process::{Child, Command};

use crate::serve::Ready;
use crate::store::NodeAddresses;

/// Verifying a large database after a kill takes time.
const READY_TIMEOUT: Duration = Duration::from_secs(120);
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// A node's process. Dropping it kills it.
#[derive(Debug)]
pub struct NodeProcess {
    program: PathBuf,
    id: String,
    directory: PathBuf,
    slots: String,
    arguments: Vec<String>,
    addresses: NodeAddresses,
    /// Keep others off its ports while it is down.
    _reserved: [TcpSocket; 2],
    environment: Vec<(String, String)>,
    child: Option<Child>,
}

/// A free port of this machine, which nobody else gets until the socket is dropped: bound, it keeps the system from giving it away, and since it does not listen,
/// whoever asks for this very port may.
fn reserve() -> anyhow::Result<(TcpSocket, String)> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
    let address = socket.local_addr()?.to_string();
    Ok((socket, address))
}

impl NodeProcess {
    /// Starts `program serve` with its data in `directory/<id>` and its log beside it, on free ports, and waits until it serves.
    ///
    /// # Errors
    ///
    /// It did not come up; the log says why.
    pub async fn start(program: &Path, id: &str, directory: &Path, slots: &str) -> anyhow::Result<Self> {
        Self::start_with(program, id, directory, slots, &[]).await
    }

    /// The same with more `arguments`, at this start and later ones.
    ///
    /// # Errors
    ///
    /// As [`NodeProcess::start`].
    pub async fn start_with(
        program: &Path,
        id: &str,
        directory: &Path,
        slots: &str,
        arguments: &[&str],
    ) -> anyhow::Result<Self> {
        let ((grpc_port, grpc), (resp_port, resp)) = (reserve()?, reserve()?);
        let mut process = Self {
            program: program.into(),
            id: id.into(),
            directory: directory.into(),
            slots: slots.into(),
            arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
            addresses: NodeAddresses { grpc, resp },
            _reserved: [grpc_port, resp_port],
            environment: Vec::new(),
            child: None,
        };
        process.restart().await?;
        Ok(process)
    }

    /// Starts it again, on the ports that it had.
    ///
    /// # Errors
    ///
    /// As [`NodeProcess::start`].
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        let mut child = self.spawn(Stdio::piped())?;
        let stdout = child.stdout.take().context("the node has no output")?;
        let mut lines = BufReader::new(stdout).lines();
        let line = tokio::time::timeout(READY_TIMEOUT, lines.next_line())
            .await
            .with_context(|| format!("node {} is not ready after {READY_TIMEOUT:?}", self.id))??;
        let Some(line) = line else {
            let said = std::fs::read_to_string(self.log()).unwrap_or_default();
            let last = said.lines().last().unwrap_or("nothing");
            bail!(
                "node {} ended before it was ready and said: {last}; see {}",
                self.id,
                self.log().display()
            );
        };
        let Ready { addresses, .. } = line.parse()?;
        self.addresses = addresses;
        self.child = Some(child);
        Ok(())
    }

    /// The same without waiting until it serves: it may end before.
    ///
    /// # Errors
    ///
    /// It could not be started.
    pub fn launch(&mut self) -> anyhow::Result<()> {
        self.child = Some(self.spawn(Stdio::null())?);
        Ok(())
    }

    fn spawn(&self, output: Stdio) -> anyhow::Result<Child> {
        let log = self.log();
        let log_file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        Command::new(&self.program)
            .arg("serve")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .args(["--id", &self.id, "--slots", &self.slots])
            .args(["--grpc", &self.addresses.grpc, "--resp", &self.addresses.resp])
            .arg("--data")
            .arg(self.directory.join(&self.id))
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(log_file)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))
    }

    /// What it is started with from the next start on.
    pub fn set_arguments(&mut self, arguments: &[&str]) {
        self.arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    }

    /// What the environment of its next start has beside that of this process.
    pub fn set_environment(&mut self, environment: &[(&str, &str)]) {
        self.environment =
            environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    }

    /// Of the process, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().and_then(Child::id)
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> &NodeAddresses {
        &self.addresses
    }

    /// Where its log is.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.directory.join(format!("{}.log", self.id))
    }

    /// SIGKILL; returns when it is gone.
    ///
    /// # Errors
    ///
    /// It was not running.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        let mut child = self.child.take().with_context(|| format!("node {} is not running", self.id))?;
        child.kill().await.with_context(|| format!("cannot kill node {}", self.id))
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    ///
    /// It is not running, or still runs after `limit`.
    pub async fn ended(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let child = self.child.as_mut().with_context(|| format!("node {} is not running", self.id))?;
        let status = tokio::time::timeout(limit, child.wait())
            .await
            .with_context(|| format!("node {} still runs after {limit:?}", self.id))??;
        self.child = None;
        Ok(status)
    }

    /// SIGTERM; returns when it has ended.
    ///
    /// # Errors
    ///
    /// It did not end in time, or not cleanly.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        let mut child = self.child.take().with_context(|| format!("node {} is not running", self.id))?;
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw);
        let pid = pid
            .with_context(|| format!("node {} has ended by itself; see {}", self.id, self.log().display()))?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let status = tokio::time::timeout(STOP_TIMEOUT, child.wait())
            .await
            .with_context(|| format!("node {} did not stop within {STOP_TIMEOUT:?}", self.id))??;
        if !status.success() {
            bail!("node {} ended with {status}; see {}", self.id, self.log().display());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proto::common::tuning::listen;

    use super::*;

    #[tokio::test]
    async fn a_port_is_kept_for_a_node_that_is_down() {
        let (reserved, address) = reserve().unwrap();
        let address = address.parse().unwrap();
        let other = TcpSocket::new_v4().unwrap();
        assert_eq!(other.bind(address).unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
        for _ in 0..2 {
            drop(listen(address).unwrap());
        }
        drop(reserved);
        TcpSocket::new_v4().unwrap().bind(address).unwrap();
    }
}

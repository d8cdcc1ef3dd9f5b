//! Programs that copy files, as an operator would use them. All of them are followed by a sync, in the time that is measured.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::UsageWho;

use crate::process::{Sample, Skipped};
use crate::side::cpu;

/// Copies on this machine, over no network at all.
pub fn cp(from: &Path, to: &Path) -> Result<Sample, Skipped> {
    measured(|| {
        run(Command::new("cp").arg("--recursive").arg(from).arg(to))?;
        sync(to)
    })
}

/// Sends to an rsync daemon, whole files, with what makes an installed snapshot: names, sizes, bytes.
pub fn rsync(from: &Path, to: &Path) -> Result<Sample, Skipped> {
    let config = to.with_extension("conf");
    let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let port = port.map_err(|error| Skipped(error.to_string()))?.port();
    std::fs::create_dir_all(to).unwrap();
    let module = "use chroot = no\nuid = root\ngid = root\n[to]\nread only = no\npath = ";
    std::fs::write(&config, format!("{module}{}\n", to.display())).unwrap();
    let mut daemon = Command::new("rsync");
    let daemon = daemon.args(["--daemon", "--no-detach", "--address=127.0.0.1", &format!("--port={port}")]);
    let daemon = daemon.arg(format!("--config={}", config.display())).stdin(Stdio::null());
    let daemon = daemon.spawn().map_err(|error| Skipped(format!("rsync cannot be started: {error}")))?;
    let daemon = Ended(daemon);
    let until = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        if Instant::now() > until {
            return Err(Skipped("the rsync daemon does not listen".to_owned()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    measured(|| {
        let mut client = Command::new("rsync");
        let client = client.args(["--whole-file", "--recursive"]).arg(from);
        run(client.arg(format!("rsync://127.0.0.1:{port}/to/")))?;
        sync(to)?;
        // Its end is waited for, so that its time is counted.
        drop(daemon);
        Ok(())
    })
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn sync(path: &Path) -> Result<(), Skipped> {
    run(Command::new("sync").arg("--file-system").arg(path))
}

fn measured(work: impl FnOnce() -> Result<(), Skipped>) -> Result<Sample, Skipped> {
    let before = cpu(UsageWho::RUSAGE_CHILDREN);
    let began = Instant::now();
    work()?;
    let seconds = began.elapsed().as_secs_f64();
    Ok(Sample { seconds, cpu_s: cpu(UsageWho::RUSAGE_CHILDREN) - before, sender: None, receiver: None })
}

fn run(command: &mut Command) -> Result<(), Skipped> {
    let name = command.get_program().to_string_lossy().into_owned();
    match command.stdin(Stdio::null()).stdout(Stdio::null()).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Skipped(format!("{name} ended with {status}"))),
        Err(error) => Err(Skipped(format!("{name} cannot be started: {error}"))),
    }
}

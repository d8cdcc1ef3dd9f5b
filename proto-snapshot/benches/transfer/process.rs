//! Runs each end of a transfer in a process of its own.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::side::{Sent, Side, Usage};

/// One transfer.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Sample {
    pub seconds: f64,
    /// Of both ends.
    pub cpu_s: f64,
    pub sender: Option<Usage>,
    pub receiver: Option<Usage>,
}

/// Why something could not be measured.
#[derive(Debug, Clone)]
pub struct Skipped(pub String);

/// What tokio takes the number of its worker threads from.
const WORKERS: &str = "TOKIO_WORKER_THREADS";

/// Worker threads of each end: half of the cores, as both ends share the machine. A runtime for each that counts all cores as its own would have the two
/// take them from each other; who wants that sets the variable.
pub fn workers() -> String {
    std::env::var(WORKERS).unwrap_or_else(|_| {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        (cores / 2).max(1).to_string()
    })
}

/// A process that is ended with its owner.
pub struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    pub fn start(program: &Path, words: &[&str], side: &Side) -> Self {
        let side = serde_json::to_string(side).unwrap();
        let mut child = Command::new(program)
            .args(words)
            .arg(side)
            .env(WORKERS, workers())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{} cannot be started: {error}", program.display()));
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { child, input, output: BufReader::new(output) }
    }

    /// This program, in one of its parts.
    pub fn part(words: &[&str], side: &Side) -> Self {
        Self::start(&std::env::current_exe().unwrap(), words, side)
    }

    /// Its next line.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        let read = self.output.read_line(&mut line).unwrap();
        assert!(read > 0, "a side ended before it answered; its error stands above");
        line.trim_end().to_owned()
    }

    pub fn answer<T: serde::de::DeserializeOwned>(&mut self) -> T {
        let line = self.line();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error} in {line:?}"))
    }

    /// What a receiver took since it listens. Ends it.
    pub fn report(mut self) -> Usage {
        writeln!(self.input, "report").unwrap();
        self.answer()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// From `from` to `to` (memory where there is none).
pub fn transfer(side: &Side, from: Option<&Path>, to: Option<&Path>) -> Result<Sample, Skipped> {
    let (program, words): (PathBuf, &[&str]) = match side.peer.as_str() {
        "flight" => (flight()?, &[]),
        _ => (std::env::current_exe().unwrap(), &["side"]),
    };
    let receiver = Side { path: to.map(Path::to_owned), ..side.clone() };
    let mut receiver = Process::start(&program, words, &receiver);
    let address = receiver.line();
    let sender = Side { address: Some(address), path: from.map(Path::to_owned), ..side.clone() };
    let sent: Sent = Process::start(&program, words, &sender).answer();
    let received = receiver.report();
    Ok(Sample {
        seconds: sent.seconds,
        cpu_s: sent.usage.cpu_s + received.cpu_s,
        sender: Some(sent.usage),
        receiver: Some(received),
    })
}

/// The program of the package beside this one, built when it is first wanted.
fn flight() -> Result<PathBuf, Skipped> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/flight/Cargo.toml");
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../flight");
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        let cargo = cargo.args(["build", "--quiet", "--locked", "--release", "--manifest-path", manifest]);
        eprintln!("building the peer of Arrow Flight; minutes, the first time");
        match cargo.arg("--target-dir").arg(&target).status() {
            Ok(status) if status.success() => Ok(target.join("release/flight-peer")),
            Ok(status) => Err(format!("its build ended with {status}")),
            Err(error) => Err(format!("cargo cannot be started: {error}")),
        }
    });
    built.clone().map_err(Skipped)
}

/// The middle one.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

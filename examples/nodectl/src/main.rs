//! `nodectl`: see, start, watch and stop what moves between nodes.
//!
//! | question | where |
//! |---|---|
//! | which commands and options are there? | `args.rs` |
//! | how is a snapshot pushed, and what happens on Ctrl-C? | `push.rs` |
//! | how does it wait for a node that is away? | `dial.rs` |
//! | how is a task followed through restarts of a node? | `follow.rs` |
//! | how are nodes told by their certificates, and who makes those? | `trust.rs`, `certs.rs` |
//! | how are slots moved, and a node emptied? | `migrate/`, `drain.rs` |
//! | how are many nodes asked? | `nodes.rs` |
//! | how much of an answer is taken? | `call.rs` (pages), `bounds.rs` (what is in them) |
//! | what does the JSON look like? | `document.rs`, `node_document.rs` |
//! | what does a person see? | `human.rs`, `table.rs`, `node_table.rs`, `live.rs` |
//! | which advice does an error get, which exit code? | `advice.rs`, `failure.rs` |

mod address;
mod advice;
mod args;
mod bounds;
mod call;
mod cancel;
#[cfg(feature = "tls")]
mod certs;
mod dial;
mod document;
mod drain;
mod failure;
mod follow;
mod grid;
mod health;
mod human;
mod identity;
mod live;
mod migrate;
mod node_document;
mod node_table;
mod nodes;
mod output;
mod pace;
mod progress;
mod push;
mod resume;
mod signals;
mod status;
mod table;
mod transfers;
mod trust;

use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory as _, Parser as _};

use crate::args::{Args, Command};
use crate::failure::Failure;
use crate::output::Output;

/// How long connections may take to say goodbye at the end.
const FAREWELL: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    let args = Args::parse();
    let mut output = Output::new(args.json);
    let result = start(args, &mut output).and_then(|()| output.finish());
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(&mut output),
    }
}

fn start(args: Args, output: &mut Output) -> Result<(), Failure> {
    if let Command::Completions { shell } = args.command {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Args::command(), "nodectl", &mut script);
        output.text(&String::from_utf8_lossy(&script));
        return Ok(());
    }
    #[cfg(feature = "tls")]
    if let Command::Certs(command) = args.command {
        return certs::run(command, output);
    }
    trust::set(args.tls)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("cannot start: {error}")))?;
    #[cfg(feature = "tls")]
    runtime.spawn(trust::follow());
    let result = runtime.block_on(run(args.command, output));
    runtime.shutdown_timeout(FAREWELL);
    result
}

async fn run(command: Command, output: &mut Output) -> Result<(), Failure> {
    let mut signals = signals::Signals::listen()?;
    match command {
        Command::Push(command) => push::run(*command, output, &mut signals).await,
        Command::Transfers(command) => {
            let interrupted = Failure::interrupted("interrupted");
            signals.before(interrupted, transfers::run(command, output)).await
        }
        Command::Progress(command) => {
            let interrupted = Failure::interrupted("stopped looking; the transfer is not touched by that");
            signals.before(interrupted, progress::run(command, output)).await
        }
        Command::Cancel(command) => {
            let interrupted = Failure::interrupted(
                "interrupted; the node may have heard the cancel or not, `nodectl progress` tells",
            );
            signals.before(interrupted, cancel::run(command, output)).await
        }
        Command::Health(command) => {
            signals.before(Failure::interrupted("interrupted"), health::run(command, output)).await
        }
        Command::Status(command) => {
            signals.before(Failure::interrupted("stopped looking"), status::run(command, output)).await
        }
        Command::Migrate(command) => migrate::run(command, output, &mut signals).await,
        Command::Drain(command) => drain::run(command, output, &mut signals).await,
        #[cfg(feature = "tls")]
        Command::Certs(command) => certs::run(command, output),
        Command::Completions { .. } => Ok(()),
    }
}

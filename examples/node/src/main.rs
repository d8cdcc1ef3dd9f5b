//! The binary `node`. See `node --help`.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser as _;
use node::cli::{Cli, Command};
use tracing_subscriber::EnvFilter;

/// glibc keeps what was freed, in the worst case all that an attack took.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// As a shell tells of SIGINT.
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // The others speak for themselves.
    let level = if matches!(cli.command, Command::Serve(_)) { "info" } else { "warn" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(ansi)
        .with_writer(std::io::stderr)
        // It would be said on standard error, which is what failed, and the failure of that is a panic of whoever logs: of all that writes, on a full disk.
        .log_internal_errors(false)
        .init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        match cli.command {
            Command::Serve(args) => node::serve::serve((*args).into()).await.map(|()| ExitCode::SUCCESS),
            Command::Check(args) => node::check::check(args.into())
                .await
                .map(|whole| if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
            Command::Demo(args) => tokio::select! {
                // Its nodes are killed when it is dropped, and its temporary directory removed.
                interrupted = tokio::signal::ctrl_c() => {
                    interrupted?;
                    eprintln!("interrupted");
                    Ok(ExitCode::from(INTERRUPTED))
                }
                result = node::demo::run(args.into()) => result.map(|()| ExitCode::SUCCESS),
            },
        }
    });
    // Whatever still runs on a thread that blocks must not keep the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

//! How fast snapshots move, beside everything else that moves bytes. `cargo bench -p proto-snapshot --bench transfer -- --help`.
//!
//! Each end runs in a process of its own. Ways are compared round by round (A B C A B C), so that what disturbs the machine disturbs
//! all of them: a ratio within one run means more than a rate.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    unreachable_pub,
    reason = "a benchmark that cannot run ends"
)]

mod cases;
mod memory;
mod payload;
mod peers;
mod plot;
mod process;
mod side;
mod table;

use std::path::PathBuf;

use bytesize::ByteSize;
use clap::{Parser, Subcommand, ValueEnum};

use side::{Side, say};
use table::Report;

/// Measures transfers from memory to memory, file to file, of many small files, resumed ones, and 200 at once.
#[derive(Debug, Parser)]
#[command(
    bin_name = "cargo bench -p proto-snapshot --bench transfer --",
    args_conflicts_with_subcommands = true
)]
struct Options {
    /// Seconds instead of minutes: little data, one round; whether everything works, not how fast
    #[arg(long)]
    quick: bool,
    /// What to measure, separated by commas; all of it by default
    #[arg(long, value_enum, value_delimiter = ',')]
    cases: Vec<Case>,
    /// Bytes of large transfers, e.g. 256MiB,1GiB,8GiB [default: 1GiB; 64MiB with --quick]
    #[arg(long, value_delimiter = ',')]
    size: Vec<ByteSize>,
    /// Bytes of the transfer that is resumed, kept in the memory file system [default: 8GiB; 64MiB with --quick]
    #[arg(long)]
    resume_size: Option<ByteSize>,
    /// Rounds [default: 5; 1 with --quick]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Directory on the disk to be measured
    #[arg(long, default_value = env!("CARGO_TARGET_TMPDIR"))]
    dir: PathBuf,
    /// Directory in a memory file system; the crowd takes 13 GiB there, a transfer that is resumed its size, everything else less
    #[arg(long, default_value = "/dev/shm")]
    memory_dir: PathBuf,
    /// Where to write the results as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Case {
    /// Memory to memory, beside raw TCP, plain tonic and Arrow Flight
    Memory,
    /// Rates by chunk size, files and lanes
    Sweep,
    /// File to durable file in a memory file system, beside raw TCP, cp and rsync
    File,
    /// The same on the disk
    Disk,
    /// 100,000 files of 4 KiB in a memory file system, beside cp and rsync
    Small,
    /// The same on the disk
    SmallDisk,
    /// From a reconnection to the first new byte, into a memory file system
    Resume,
    /// 200 transfers at once, into a memory file system
    Crowd,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Draws the sweeps of a run as SVG
    Plot {
        /// What --json has written
        json: PathBuf,
        /// Where to write the picture
        svg: PathBuf,
    },
    /// Prints the table of a run again
    Table {
        /// What --json has written
        json: PathBuf,
    },
    #[command(hide = true)]
    Side { side: String },
    #[command(hide = true)]
    Begin { position: u64, side: String },
    #[command(hide = true)]
    Resume { position: u64, side: String },
    #[command(hide = true)]
    Crowd { transfers: usize, side: String },
}

impl Options {
    fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 1 } else { 5 })
    }

    /// One at least.
    fn sizes(&self) -> Vec<u64> {
        let default = if self.quick { ByteSize::mib(64) } else { ByteSize::gib(1) };
        let sizes = if self.size.is_empty() { &[default][..] } else { &self.size };
        sizes.iter().map(ByteSize::as_u64).collect()
    }

    fn resume_size(&self) -> u64 {
        let default = if self.quick { ByteSize::mib(64) } else { ByteSize::gib(8) };
        self.resume_size.unwrap_or(default).as_u64()
    }

    fn wants(&self, case: Case) -> bool {
        self.cases.is_empty() || self.cases.contains(&case)
    }
}

#[tokio::main]
async fn main() {
    let options = Options::parse();
    let side = |text: &str| serde_json::from_str::<Side>(text).expect("the parent says what to do");
    match &options.part {
        None => tokio::task::spawn_blocking(move || run(&options)).await.expect("it ends"),
        Some(Part::Plot { json, svg }) => {
            std::fs::write(svg, plot::svg(&read(json))).unwrap_or_else(|error| fail(svg, &error));
        }
        Some(Part::Table { json }) => print!("{}", read(json).table()),
        Some(Part::Side { side: text }) => peers::play(side(text)).await,
        Some(Part::Begin { position, side: text }) => {
            let side = side(text);
            let address = side.address.clone().expect("the receiver listens");
            peers::ours::send_a_part(&side, &address, *position).await;
            say("durable");
            std::future::pending().await
        }
        Some(Part::Resume { position, side: text }) => {
            let side = side(text);
            let address = side.address.clone().expect("the receiver listens");
            say(peers::ours::resume(&side, &address, *position).await.as_secs_f64());
        }
        Some(Part::Crowd { transfers, side: text }) => {
            let side = side(text);
            let address = side.address.clone().expect("the receiver listens");
            let crowd = peers::ours::crowd(&side, &address, *transfers).await;
            say(serde_json::to_string(&crowd).expect("numbers can be written"));
        }
    }
}

fn run(options: &Options) {
    let mut report = Report { machine: machine(), ..Report::default() };
    let (memory, disk) = (&options.memory_dir, &options.dir);
    if options.wants(Case::Memory) {
        cases::memory(options, &mut report);
    }
    if options.wants(Case::Sweep) {
        cases::sweep(options, &mut report);
    }
    if options.wants(Case::File) {
        cases::file(options, &mut report, cases::IN_MEMORY, memory);
    }
    if options.wants(Case::Disk) {
        cases::file(options, &mut report, cases::ON_DISK, disk);
    }
    if options.wants(Case::Small) {
        cases::small(options, &mut report, cases::IN_MEMORY, memory);
    }
    if options.wants(Case::SmallDisk) {
        cases::small(options, &mut report, cases::ON_DISK, disk);
    }
    if options.wants(Case::Resume) {
        cases::resume(options, &mut report, memory);
    }
    if options.wants(Case::Crowd) {
        cases::crowd(options, &mut report, memory);
    }
    print!("{}", report.table());
    if let Some(path) = &options.json {
        let json = serde_json::to_string_pretty(&report).expect("it has no maps");
        std::fs::write(path, json + "\n").unwrap_or_else(|error| fail(path, &error));
    }
}

fn read(path: &std::path::Path) -> Report {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| fail(path, &error));
    serde_json::from_str(&text).unwrap_or_else(|error| fail(path, &error))
}

fn fail(path: &std::path::Path, error: &dyn std::error::Error) -> ! {
    eprintln!("{}: {error}", path.display());
    std::process::exit(1);
}

fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let cpu =
        cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, cpu)| cpu);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    let workers = process::workers();
    format!(
        "{cores} cores of {}, Linux {}, worker threads at each end: {workers}",
        cpu.unwrap_or("an unknown CPU"),
        kernel.trim()
    )
}

//! How fast the rows of a migration move from memory to memory, beside raw TCP in the same run.
//!
//! `cargo bench -p proto-migration --bench bulk -- --help`.
//!
//! Each end runs in a process of its own. Ways take turns (A B C A B C), so that what disturbs the machine disturbs all of them: the ratio to raw TCP
//! means more than a rate. Both check the CRC-64 of all bytes at the receiver.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    unreachable_pub,
    reason = "a benchmark that cannot run ends"
)]

mod memory;
mod ours;
#[path = "../../../proto-snapshot/benches/transfer/payload.rs"]
mod payload;
#[path = "../../../proto-snapshot/benches/transfer/process.rs"]
#[allow(dead_code, reason = "the other benchmark uses the rest")]
mod process;
#[path = "../../../proto-snapshot/benches/transfer/peers/raw.rs"]
mod raw;
#[path = "../../../proto-snapshot/benches/transfer/side.rs"]
mod side;

use clap::Parser;
use process::{Sample, median, transfer};
use side::{Side, say};

/// What raw TCP writes at once.
const CHUNK: usize = 1 << 20;
/// Rows of a page where it is not the default.
const LARGE_PAGE: usize = 1 << 20;

const RAW: &str = "raw TCP";
const DEFAULT: &str = "migration";
const LARGE: &str = "migration, pages of 1 MiB";

/// Measures the rows of a migration from memory to memory, beside raw TCP.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo bench -p proto-migration --bench bulk --")]
struct Options {
    /// 64 MiB in one round: whether everything works, not how fast
    #[arg(long)]
    quick: bool,
    /// Bytes of all values, in MiB [default: 1024; 64 with --quick]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    size: Option<u64>,
    /// Rounds [default: 5; 1 with --quick]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Bytes of a value
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    value: u32,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

#[tokio::main]
async fn main() {
    let words: Vec<String> = std::env::args().collect();
    if let [_, word, side] = words.as_slice()
        && word == "side"
    {
        play(&serde_json::from_str(side).expect("the parent says what to do")).await;
        return;
    }
    let options = Options::parse();
    tokio::task::spawn_blocking(move || run(&options)).await.expect("it ends");
}

async fn play(side: &Side) {
    let sent = match (side.peer.as_str(), side.address.as_deref()) {
        (RAW, None) => return raw::receive(side),
        (RAW, Some(address)) => raw::send(side, address),
        (_, None) => return ours::receive().await,
        (DEFAULT, Some(address)) => ours::send(side, address, None).await,
        (_, Some(address)) => ours::send(side, address, Some(LARGE_PAGE)).await,
    };
    say(serde_json::to_string(&sent).expect("numbers can be written"));
}

fn run(options: &Options) {
    let peers = [RAW, DEFAULT, LARGE];
    let (mib, rounds) = if options.quick { (64, 1) } else { (1024, 5) };
    let (mib, rounds) = (options.size.unwrap_or(mib), options.rounds.unwrap_or(rounds));
    let (value, bytes) = (options.value as usize, mib << 20);
    let mut samples: [Vec<Sample>; 3] = Default::default();
    for _ in 0..rounds {
        for (peer, samples) in peers.iter().zip(&mut samples) {
            let chunk = if *peer == RAW { CHUNK } else { value };
            let side = Side {
                peer: (*peer).to_owned(),
                address: None,
                bytes,
                chunk,
                files: 1,
                lanes: 1,
                path: None,
            };
            samples.push(transfer(&side, None, None).unwrap_or_else(|skipped| panic!("{}", skipped.0)));
        }
    }
    println!("{mib} MiB in values of {value} bytes, medians of {rounds} rounds");
    println!("                            GiB/s  of raw TCP  CPU s/GiB  peak MiB");
    let gib = bytes as f64 / f64::from(1 << 30);
    for (peer, these) in peers.iter().zip(&samples) {
        let ratios = these.iter().zip(&samples[0]).map(|(this, raw)| raw.seconds / this.seconds);
        let peak = |sample: &Sample| {
            [sample.sender, sample.receiver].into_iter().flatten().map(|end| end.peak_rss).max().unwrap_or(0)
        };
        println!(
            "  {peer:25} {:>6.2}  {:>10.2}  {:>9.2}  {:>8.0}",
            of_rounds(these, &|sample| gib / sample.seconds),
            median(ratios.collect()).unwrap_or(f64::NAN),
            of_rounds(these, &|sample| sample.cpu_s / gib),
            of_rounds(these, &|sample| (peak(sample) >> 20) as f64),
        );
    }
}

fn of_rounds(samples: &[Sample], of: &dyn Fn(&Sample) -> f64) -> f64 {
    median(samples.iter().map(of).collect()).unwrap_or(f64::NAN)
}

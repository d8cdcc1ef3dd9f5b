//! How fast the rows of a migration move from memory to memory, beside raw TCP in the same run.
//!
//!   cargo bench -p proto-migration --bench bulk [-- --quick] [--size MIB] [--rounds N] [--value BYTES]
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

use process::{Sample, transfer};
use side::{Side, say};

/// What raw TCP writes at once.
const CHUNK: usize = 1 << 20;
/// Rows of a page where it is not the default.
const LARGE_PAGE: usize = 1 << 20;

const RAW: &str = "raw TCP";
const DEFAULT: &str = "migration";
const LARGE: &str = "migration, pages of 1 MiB";

struct Options {
    mib: u64,
    rounds: usize,
    value: usize,
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
    let options = options(words);
    tokio::task::spawn_blocking(move || run(&options)).await.expect("it ends");
}

fn options(words: Vec<String>) -> Options {
    let mut options = Options { mib: 1024, rounds: 5, value: 4096 };
    let mut words = words.into_iter().skip(1);
    while let Some(word) = words.next() {
        let mut number = || -> u64 {
            let text = words.next().unwrap_or_default();
            text.parse().ok().filter(|number| *number > 0).unwrap_or_else(|| {
                eprintln!("{word} takes a number above 0, not {text:?}");
                std::process::exit(2);
            })
        };
        match word.as_str() {
            "--quick" => (options.mib, options.rounds) = (64, 1),
            "--size" => options.mib = number(),
            "--rounds" => options.rounds = number() as usize,
            "--value" => options.value = number() as usize,
            // What `cargo bench` passes to every harness.
            "--bench" => {}
            other => {
                eprintln!("{other}: not known; there are --quick, --size MIB, --rounds N, --value BYTES");
                std::process::exit(2);
            }
        }
    }
    options
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
    let bytes = options.mib << 20;
    let mut samples: [Vec<Sample>; 3] = Default::default();
    for _ in 0..options.rounds {
        for (peer, samples) in peers.iter().zip(&mut samples) {
            let chunk = if *peer == RAW { CHUNK } else { options.value };
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
    println!(
        "{} MiB in values of {} bytes, medians of {} rounds",
        options.mib, options.value, options.rounds
    );
    println!("                            GiB/s  of raw TCP  CPU s/GiB  peak MiB");
    let gib = bytes as f64 / f64::from(1 << 30);
    for (peer, these) in peers.iter().zip(&samples) {
        let ratios = these.iter().zip(&samples[0]).map(|(this, raw)| raw.seconds / this.seconds);
        let peak = |sample: &Sample| {
            [sample.sender, sample.receiver].into_iter().flatten().map(|end| end.peak_rss).max().unwrap_or(0)
        };
        println!(
            "  {peer:25} {:>6.2}  {:>10.2}  {:>9.2}  {:>8.0}",
            median(these.iter().map(|sample| gib / sample.seconds)),
            median(ratios),
            median(these.iter().map(|sample| sample.cpu_s / gib)),
            median(these.iter().map(|sample| (peak(sample) >> 20) as f64)),
        );
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    if values.len() % 2 == 1 { values[half] } else { f64::midpoint(values[half - 1], values[half]) }
}

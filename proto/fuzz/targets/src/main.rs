//! `fuzz-targets TARGET... --seconds N`: fuzzes on stable Rust. For coverage-guided fuzzing see `proto/fuzz/README.md`.
#![allow(clippy::print_stdout, reason = "a program for people")]

use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Parser;
use fuzz_targets::mutate::mutate;
use fuzz_targets::{TARGETS, Target, panics, seeds, target};

/// Looks at an input, a second apart, after which it is a finding. The limit that the targets have themselves does not help where a thread waits, or
/// computes, for ever. Most take some milliseconds, so no machine is that busy; and each look needs a turn, too, which one that stands still does not give.
const HANG: u32 = 600;

/// Fuzzes targets on stable Rust: changes their seeds at random and tries the result, until something panics or hangs.
#[derive(Debug, Parser)]
#[command(name = "fuzz-targets", version)]
struct Args {
    /// What to fuzz; all of them if none is named
    targets: Vec<String>,
    /// How long, for each target, in seconds
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Start of the random numbers; the same one tries the same inputs. Default: another each time
    #[arg(long)]
    seed: Option<u64>,
    /// Try these files instead, once each
    #[arg(long, value_name = "FILE", num_args = 1..)]
    replay: Vec<PathBuf>,
    /// Where the input of a finding is written
    #[arg(long, value_name = "DIR", default_value = "fuzz-findings")]
    findings: PathBuf,
    /// List the targets and end
    #[arg(long)]
    list: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if args.list {
        for Target { name, about, .. } in TARGETS {
            println!("{name:10} {about}");
        }
        return Ok(());
    }
    let chosen: Vec<Target> = if args.targets.is_empty() {
        TARGETS.to_vec()
    } else {
        let named = |name: &String| {
            target(name).with_context(|| format!("there is no target {name:?}; --list names them"))
        };
        args.targets.iter().map(named).collect::<Result<_, _>>()?
    };
    for target in chosen {
        fuzz(target, &args)?;
    }
    Ok(())
}

fn fuzz(target: Target, args: &Args) -> anyhow::Result<()> {
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    let mut rng = fastrand::Rng::with_seed(seed);
    let trying: Trying = Arc::default();
    watch(target, &args.findings, Arc::clone(&trying));
    if !args.replay.is_empty() {
        for file in &args.replay {
            let input = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
            attempt(target, input, &args.findings, &trying)?;
        }
        println!("{}: {} files, no finding", target.name, args.replay.len());
        return Ok(());
    }
    let seeds = seeds(target.name)?;
    let until = Instant::now() + Duration::from_secs(args.seconds);
    let mut inputs = 0_u64;
    while Instant::now() < until {
        attempt(target, mutate(&mut rng, &seeds), &args.findings, &trying)?;
        inputs += 1;
    }
    println!("{}: {inputs} inputs in {} s from seed {seed}, no finding", target.name, args.seconds);
    Ok(())
}

/// What is tried now, and how often it was looked at.
type Trying = Arc<Mutex<Option<(u32, Vec<u8>)>>>;

fn attempt(target: Target, input: Vec<u8>, findings: &Path, trying: &Trying) -> anyhow::Result<()> {
    let before = panics();
    *trying.lock().unwrap_or_else(PoisonError::into_inner) = Some((0, input.clone()));
    let ended = catch_unwind(|| (target.run)(&input));
    *trying.lock().unwrap_or_else(PoisonError::into_inner) = None;
    if ended.is_err() || panics() != before {
        let file = keep(target, &input, findings)?;
        bail!("{}: a finding; its input is in {}", target.name, file.display());
    }
    Ok(())
}

/// Ends the process when an input never ends.
fn watch(target: Target, findings: &Path, trying: Trying) {
    let findings = findings.to_owned();
    std::thread::spawn(move || {
        while Arc::strong_count(&trying) > 1 {
            std::thread::sleep(Duration::from_secs(1));
            let mut trying = trying.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((looks, input)) = &mut *trying {
                *looks += 1;
                if *looks < HANG {
                    continue;
                }
                match keep(target, input, &findings) {
                    Ok(file) => println!("{}: hangs; its input is in {}", target.name, file.display()),
                    Err(error) => println!("{}: hangs: {error:#}", target.name),
                }
                std::process::exit(1);
            }
        }
    });
}

fn keep(target: Target, input: &[u8], findings: &Path) -> anyhow::Result<PathBuf> {
    let dir = findings.join(target.name);
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let name = proto_common::checksum::crc64(input);
    let file = dir.join(format!("{name:016x}"));
    std::fs::write(&file, input).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}

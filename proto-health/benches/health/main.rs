//! `cargo bench -p proto-health [-- [--quick] [check] [watchers] [detector]]`
//!
//! | part | measures |
//! |---|---|
//! | `check` | throughput and latency of the standard Check beside tonic-health's, idle and under load, in turns |
//! | `watchers` | memory of 10,000 open watches over 100 connections, and how long a change takes to reach all of them |
//! | `detector` | how fast a death is seen and how often wrongly, beside a fixed timeout |
//!
//! `--quick` takes seconds: it shows that everything runs, its numbers mean little.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_precision_loss, reason = "a benchmark")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a benchmark")]

mod check;
mod detector;
mod servers;
mod watchers;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    if let [first, kind] = args.as_slice()
        && first == "--serve"
    {
        return servers::child(kind);
    }
    let quick = args.iter().any(|arg| arg == "--quick");
    let parts: Vec<&str> = args.iter().filter(|arg| !arg.starts_with("--")).map(String::as_str).collect();
    let wanted = |part: &str| parts.is_empty() || parts.contains(&part);
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    if wanted("check") {
        runtime().block_on(check::run(quick));
    }
    if wanted("watchers") {
        runtime().block_on(watchers::run(quick));
    }
    if wanted("detector") {
        detector::run(quick);
    }
}

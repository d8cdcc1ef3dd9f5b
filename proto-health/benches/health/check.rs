//! Check beside tonic-health's, in turns, so that whatever else the machine does hits both.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proto_common::tuning::endpoint;
use proto_health::grpc_health_v1::HealthCheckRequest;
use proto_health::grpc_health_v1::health_client::HealthClient;
use tonic::transport::Channel;

use crate::servers::{self, SERVICE};

const CONNECTIONS: usize = 4;
/// Calls that are under way at the same time, over all connections.
const CALLERS: usize = 32;

#[derive(Default)]
struct Measured {
    per_second: Vec<f64>,
    /// Seconds.
    latencies: Vec<f64>,
}

async fn clients(address: SocketAddr) -> Vec<HealthClient<Channel>> {
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        let channel = endpoint(&address.to_string()).unwrap().connect().await.unwrap();
        clients.push(HealthClient::new(channel));
    }
    clients
}

fn request() -> HealthCheckRequest {
    HealthCheckRequest { service: SERVICE.into() }
}

/// Calls per second of many callers.
async fn throughput(clients: &[HealthClient<Channel>], time: Duration) -> f64 {
    let began = Instant::now();
    let callers: Vec<_> = (0..CALLERS)
        .map(|n| {
            let mut client = clients[n % clients.len()].clone();
            tokio::spawn(async move {
                let mut calls = 0_u64;
                while began.elapsed() < time {
                    client.check(request()).await.unwrap();
                    calls += 1;
                }
                calls
            })
        })
        .collect();
    let mut calls = 0;
    for caller in callers {
        calls += caller.await.unwrap();
    }
    calls as f64 / began.elapsed().as_secs_f64()
}

/// Latencies of one caller, in seconds. On a worker's thread, as the server is.
async fn latencies(client: &HealthClient<Channel>, time: Duration) -> Vec<f64> {
    let mut client = client.clone();
    let calling = tokio::spawn(async move {
        let began = Instant::now();
        let mut latencies = Vec::new();
        while began.elapsed() < time {
            let asked = Instant::now();
            client.check(request()).await.unwrap();
            latencies.push(asked.elapsed().as_secs_f64());
        }
        latencies
    });
    calling.await.unwrap()
}

pub(crate) fn percentile(sorted: &[f64], percent: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * percent / 100.0).round() as usize]
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    percentile(&values, 50.0)
}

async fn compare(
    title: &str,
    ours: &[HealthClient<Channel>],
    theirs: &[HealthClient<Channel>],
    rounds: usize,
    time: Duration,
) {
    let mut measured = [Measured::default(), Measured::default()];
    for round in 0..rounds {
        // Who is first changes, too.
        for n in 0..2 {
            let which = (round + n) % 2;
            let clients = if which == 0 { ours } else { theirs };
            measured[which].per_second.push(throughput(clients, time).await);
            measured[which].latencies.extend(latencies(&clients[0], time).await);
        }
    }
    println!(
        "\nCheck, {title}: {rounds} rounds of {time:?}, {CALLERS} callers on {CONNECTIONS} connections; latency of one caller"
    );
    println!("{:<14} {:>12} {:>10} {:>10}", "", "calls/s", "p50", "p99");
    for (name, one) in ["proto-health", "tonic-health"].iter().zip(&mut measured) {
        one.latencies.sort_by(f64::total_cmp);
        println!(
            "{name:<14} {:>12.0} {:>7.0} us {:>7.0} us",
            median(one.per_second.iter().copied()),
            percentile(&one.latencies, 50.0) * 1e6,
            percentile(&one.latencies, 99.0) * 1e6
        );
    }
    let [ours, theirs] = &measured;
    let ratio = median(ours.per_second.iter().zip(&theirs.per_second).map(|(ours, theirs)| ours / theirs));
    let latency = |percent| percentile(&ours.latencies, percent) / percentile(&theirs.latencies, percent);
    println!(
        "{:<14} {ratio:>12.2} {:>10.2} {:>10.2}   (calls/s: more is better; latency: less is better)",
        "ratio",
        latency(50.0),
        latency(99.0)
    );
}

pub(crate) async fn run(quick: bool) {
    let (rounds, time) =
        if quick { (2, Duration::from_millis(100)) } else { (20, Duration::from_millis(500)) };
    let (our_address, _set) = servers::ours().await;
    let (their_address, _set_theirs) = servers::tonic_health().await;
    let (ours, theirs) = (clients(our_address).await, clients(their_address).await);
    // Warm.
    throughput(&ours, time).await;
    throughput(&theirs, time).await;
    compare("idle machine", &ours, &theirs, rounds, time).await;

    // As many threads that only compute as there are processors, and tasks that hold the runtime's threads in between.
    let stop = Arc::new(AtomicBool::new(false));
    let cpus = std::thread::available_parallelism().unwrap().get();
    let burners: Vec<_> = (0..cpus)
        .map(|_| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        })
        .collect();
    let hogging = Arc::clone(&stop);
    let hog = tokio::spawn(async move {
        while !hogging.load(Ordering::Relaxed) {
            let began = Instant::now();
            while began.elapsed() < Duration::from_micros(200) {
                std::hint::spin_loop();
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    compare("every processor busy", &ours, &theirs, rounds, time).await;
    stop.store(true, Ordering::Relaxed);
    for burner in burners {
        burner.join().unwrap();
    }
    hog.await.unwrap();
}

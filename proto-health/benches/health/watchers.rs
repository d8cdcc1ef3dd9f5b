//! Many open watches: the server's memory for each, HTTP/2 included, and the time of a change to all of them.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proto_common::tuning::endpoint;
use proto_health::grpc_health_v1::HealthCheckRequest;
use proto_health::grpc_health_v1::health_client::HealthClient;
use proto_health::v1::WatchHealthRequest;
use proto_health::v1::health_service_client::HealthServiceClient;
use tokio::sync::Semaphore;
use tonic::transport::Channel;

use crate::servers::SERVICE;

/// What a watch may cost, as the goal says.
const GOAL: u64 = 8 << 10;

/// A server in a process of its own; killed when dropped.
struct Server {
    child: Child,
    stdin: ChildStdin,
    address: String,
}

impl Server {
    fn start(kind: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--serve", kind])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
        let stdin = child.stdin.take().unwrap();
        Self { child, stdin, address: address.trim().to_owned() }
    }

    fn change(&mut self) {
        writeln!(self.stdin, "change").unwrap();
    }

    fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One watch, counted once for each message. `protocol` is ours or the standard.
async fn watch(channel: Channel, ours: bool, opened: Arc<Semaphore>, heard: Arc<AtomicUsize>) {
    macro_rules! follow {
        ($stream:expr) => {{
            let mut stream = $stream.unwrap().into_inner();
            let mut first = true;
            while let Ok(Some(_)) = stream.message().await {
                if std::mem::take(&mut first) {
                    opened.add_permits(1);
                } else {
                    heard.fetch_add(1, Ordering::SeqCst);
                }
            }
        }};
    }
    if ours {
        let request =
            WatchHealthRequest { service: SERVICE.into(), omit_components: true, ..Default::default() };
        follow!(HealthServiceClient::new(channel).watch_health(request).await);
    } else {
        let request = HealthCheckRequest { service: SERVICE.into() };
        follow!(HealthClient::new(channel).watch(request).await);
    }
}

pub(crate) async fn run(quick: bool) {
    let (connections, each, changes) = if quick { (20, 50, 2) } else { (100, 100, 10) };
    let watches = connections * each;
    println!(
        "\n{watches} watches over {connections} connections: resident memory of the server for each, HTTP/2 included"
    );
    println!("{:<26} {:>12} {:>16} {:>16}", "", "per watch", "change to all", "slowest");
    for (name, kind, ours) in [
        ("standard Watch", "ours", false),
        ("WatchHealth", "ours", true),
        ("tonic-health Watch", "tonic-health", false),
    ] {
        let mut server = Server::start(kind);
        let mut channels = Vec::new();
        for _ in 0..connections {
            channels.push(endpoint(&server.address).unwrap().connect().await.unwrap());
        }
        // What a first call makes once, such as threads and pools, is not a watch's.
        let (opened, heard) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
        let warm = tokio::spawn(watch(channels[0].clone(), ours, Arc::clone(&opened), Arc::clone(&heard)));
        let _ = opened.acquire().await.unwrap();
        warm.abort();
        opened.forget_permits(usize::MAX);
        tokio::time::sleep(Duration::from_millis(500)).await;
        let before = server.resident_bytes();

        let mut tasks = tokio::task::JoinSet::new();
        for channel in &channels {
            for _ in 0..each {
                tasks.spawn(watch(channel.clone(), ours, Arc::clone(&opened), Arc::clone(&heard)));
            }
        }
        let all = opened.acquire_many(watches as u32).await.unwrap();
        all.forget();
        tokio::time::sleep(Duration::from_millis(500)).await;
        let per_watch = server.resident_bytes().saturating_sub(before) / watches as u64;

        let mut times = Vec::new();
        for n in 1..=changes {
            // Longer than the pause between two frames of a watch.
            tokio::time::sleep(Duration::from_millis(300)).await;
            let began = Instant::now();
            server.change();
            while heard.load(Ordering::SeqCst) < n * watches {
                assert!(
                    began.elapsed() < Duration::from_secs(60),
                    "{} of {}",
                    heard.load(Ordering::SeqCst),
                    n * watches
                );
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
            times.push(began.elapsed().as_secs_f64() * 1e3);
        }
        times.sort_by(f64::total_cmp);
        let verdict = if per_watch < GOAL { "" } else { "  above the goal of 8 KiB" };
        println!(
            "{name:<26} {:>8.1} KiB {:>13.1} ms {:>13.1} ms{verdict}",
            per_watch as f64 / 1024.0,
            times[times.len() / 2],
            times[times.len() - 1]
        );
        tasks.abort_all();
    }
}

//! The smallest node that tells its health, with a console on stdin to change it.
//!
//! ```text
//! cargo run -p proto-health --features server,listen --example node -- ADDR [NODE_ID]
//! ```
//!
//! ADDR is `127.0.0.1:0` for any free port. When it serves, it prints one line, `listening on ADDRESS`, and after each command
//! `ok`. Commands, one per line:
//!
//! ```text
//! running                      the start is complete
//! maintenance                  an operator takes it out of service
//! add NAME [critical]          a component that is set by hand; healthy
//! set NAME STATUS [MESSAGE]    healthy, degraded, unhealthy or undecided
//! check NAME KIND              a check every 100 ms that is well, hangs, panics or flaps
//! remove NAME                  a component goes
//! service NAME                 a gRPC service appears
//! ```
//!
//! SIGTERM: readiness is withdrawn at once; half a second later watches get the last state and end, and so does the process.

use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proto_common::clock::now_unix_ms;
use proto_common::ids::{ComponentName, NodeId};
use proto_common::tuning::{incoming, tune_server};
use proto_common::v1::NodeIdentity;
use proto_health::HealthRegistry;
use proto_health::server::{
    Check, CheckResult, Component, ComponentHandle, Facts, FactsFuture, NodeFacts, Schedule, Sections,
};
use proto_health::v1::HealthStatus;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Server;

type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// Between the first word that it goes and the end.
const DRAIN: Duration = Duration::from_millis(500);
const GRACE: Duration = Duration::from_secs(5);

/// It owns nothing.
struct Nothing;

impl NodeFacts for Nothing {
    fn facts(&self, _: Sections) -> FactsFuture<'_> {
        Box::pin(std::future::ready(Facts::default()))
    }
}

fn status(word: &str) -> Result<HealthStatus, AnyError> {
    let name = format!("HEALTH_STATUS_{}", word.to_ascii_uppercase());
    HealthStatus::from_str_name(&name).ok_or_else(|| format!("{word} is no status").into())
}

fn scripted(kind: &str) -> Result<Check, AnyError> {
    Ok(match kind {
        "well" => Check::new(|| async { CheckResult::healthy() }),
        "hangs" => Check::new(std::future::pending),
        "panics" => Check::new(|| async { panic!("as it was told") }),
        "flaps" => {
            let well = AtomicBool::new(false);
            Check::new(move || {
                let well = !well.fetch_xor(true, Ordering::SeqCst);
                std::future::ready(if well {
                    CheckResult::healthy()
                } else {
                    CheckResult::unhealthy("flaps")
                })
            })
        }
        _ => return Err(format!("{kind} is no kind of check").into()),
    })
}

/// Does what a line says.
fn obey(
    line: &str,
    health: &HealthRegistry,
    handles: &mut Vec<(String, ComponentHandle)>,
) -> Result<(), AnyError> {
    let words: Vec<&str> = line.splitn(4, ' ').collect();
    let name = |name: &str| ComponentName::new(name);
    match words.as_slice() {
        ["running"] => health.set_running(),
        ["maintenance"] => health.set_maintenance("by the console"),
        ["add", one, rest @ ..] => {
            let component = Component::new(name(one)?);
            let component = if rest.contains(&"critical") { component.critical() } else { component };
            handles.push(((*one).to_owned(), health.add(component, HealthStatus::Healthy, "")?));
        }
        ["set", one, to, message @ ..] => {
            let handle = handles.iter().rev().find(|(name, _)| name == one);
            let (_, handle) = handle.ok_or_else(|| format!("there is no {one}"))?;
            handle.set(status(to)?, message.join(" "));
        }
        ["check", one, kind] => {
            let schedule = Schedule {
                interval: Duration::from_millis(100),
                timeout: Duration::from_millis(50),
                failure_threshold: 3,
                success_threshold: 1,
            };
            health.check(Component::new(name(one)?), schedule, scripted(kind)?)?;
        }
        ["remove", one] => health.remove(&name(one)?),
        ["service", one] => health.add_service(one),
        _ => return Err(format!("what is {line:?}?").into()),
    }
    Ok(())
}

fn say(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{text}")?;
    stdout.flush()
}

async fn console(health: HealthRegistry) -> Result<(), AnyError> {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut handles = Vec::new();
    while let Some(line) = lines.next_line().await? {
        match obey(line.trim(), &health, &mut handles) {
            Ok(()) => say("ok")?,
            Err(error) => say(&format!("error: {error}"))?,
        }
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), AnyError> {
    let mut args = std::env::args().skip(1);
    let address = args.next().ok_or("usage: node ADDR [NODE_ID]")?;
    let node_id = NodeId::new(args.next().unwrap_or_else(|| "node".to_owned()))?;
    let identity = NodeIdentity {
        node_id: node_id.to_string(),
        incarnation: now_unix_ms(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..NodeIdentity::default()
    };
    let health = HealthRegistry::builder(identity).facts(Nothing).build();
    let mut term = signal(SignalKind::terminate())?;
    let listener = TcpListener::bind(&address).await?;
    say(&format!("listening on {}", listener.local_addr()?))?;
    tokio::spawn(console(health.clone()));

    let draining = health.clone();
    let server = tune_server(Server::builder())
        .add_service(health.service())
        .add_service(health.standard_service())
        .serve_with_incoming_shutdown(incoming(listener), async move {
            term.recv().await;
            draining.begin_drain("SIGTERM", DRAIN);
            tokio::time::sleep(DRAIN).await;
            draining.shut_down(GRACE).await;
        });
    server.await?;
    // The console still waits for its next line.
    std::process::exit(0)
}

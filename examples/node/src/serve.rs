//! `node serve`: one node until it is told to stop.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use proto::common::guard::RangeGuard;
use proto::common::tls::TlsLimits;
use proto::common::tuning::listen;
use proto::snapshot::hook::InstallHook;
use proto::snapshot::store::FileStoreOptions;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::common::{NodeId, SlotRange};
use crate::health::{Drain, Health};
use crate::migrate::{self, MigrateOptions, Migrating};
use crate::node::Node;
use crate::resp::{Limits, RespServer};
use crate::split::{SplitHook, Splits};
use crate::store::{Claim, Init, NodeAddresses, StoreOptions};
use crate::trust::{Trust, TrustOptions};
use crate::{descriptors, grpc};

/// How long connections may go on at most, once all else has ended.
const CONNECTIONS: Duration = Duration::from_secs(2);
/// For the first results of the checks that the start waits for.
const FIRST_RESULTS: Duration = Duration::from_secs(5);
/// Least time for the database to be closed.
const CLOSE: Duration = Duration::from_millis(500);

/// Another node, as the command line names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its id.
    pub id: NodeId,
    /// Where it is.
    pub addresses: NodeAddresses,
    /// Slots that it owns from the start.
    pub slots: Vec<SlotRange>,
}

/// What a node is started with.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Its id.
    pub id: NodeId,
    /// Its data directory.
    pub data: PathBuf,
    /// Where its gRPC services listen.
    pub grpc: SocketAddr,
    /// Where its Redis port listens.
    pub resp: SocketAddr,
    /// Slots that it owns from the start.
    pub slots: Option<Vec<SlotRange>>,
    /// Other nodes.
    pub peers: Vec<Peer>,
    /// Of the database.
    pub store: StoreOptions,
    /// Of the Redis port.
    pub limits: Limits,
    /// Connections to the Redis port.
    pub max_clients: usize,
    /// Of migrations.
    pub migrate: MigrateOptions,
    /// Whom it trusts.
    pub trust: TrustOptions,
    /// Longest time from a signal to the end of the process.
    pub grace: Duration,
}

/// What `node serve` prints when it is ready: one line, for people and for programs.
///
/// `ready id=n1 grpc=127.0.0.1:7101 resp=127.0.0.1:7001`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// The node.
    pub id: String,
    /// Where its services are.
    pub addresses: NodeAddresses,
}

impl std::fmt::Display for Ready {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let NodeAddresses { grpc, resp } = &self.addresses;
        write!(f, "ready id={} grpc={grpc} resp={resp}", self.id)
    }
}

impl std::str::FromStr for Ready {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let mut words = line.split_whitespace();
        let mut field = |name: &str| {
            words
                .next()
                .and_then(|word| word.strip_prefix(name))
                .map(str::to_owned)
                .with_context(|| format!("this is not the line of a node that is ready: {line}"))
        };
        field("ready")?;
        Ok(Self {
            id: field("id=")?,
            addresses: NodeAddresses { grpc: field("grpc=")?, resp: field("resp=")? },
        })
    }
}

/// Serves until SIGINT or SIGTERM, then drains; a second signal cuts that short.
///
/// # Errors
///
/// It could not start, or failed; the message says what to do.
pub async fn serve(options: ServeOptions) -> anyhow::Result<()> {
    serve_with(options, |hook| hook).await
}

/// [`serve`], with what `hook` makes of the install hook.
///
/// # Errors
///
/// As [`serve`].
pub async fn serve_with<H: InstallHook>(
    options: ServeOptions,
    hook: impl FnOnce(SplitHook) -> H,
) -> anyhow::Result<()> {
    // Before anything that takes long: verifying a database after a crash can be interrupted.
    let stop = CancellationToken::new();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;

    let (trust, id, listen) = (options.trust.clone(), options.id.clone(), options.grpc);
    let trust = tokio::task::spawn_blocking(move || Trust::load(trust, &id, listen)).await??;
    let resp = bind(options.resp, "--resp")?;
    let grpc = bind(options.grpc, "--grpc")?;
    let init = Init {
        node: options.id.clone(),
        slots: options.slots.clone(),
        others: options
            .peers
            .iter()
            .flat_map(|peer| {
                peer.slots.iter().map(|&range| Claim { range, owner: peer.id.clone(), epoch: 1 })
            })
            .collect(),
    };
    let (data, store) = (options.data.clone(), options.store.clone());
    let opening = tokio::task::spawn_blocking(move || Node::open(&data, &init, &store));
    let node = tokio::select! {
        opened = opening => opened.context("the database could not be opened")??.with_trust(trust),
        _ = interrupt.recv() => return Ok(()),
        _ = terminate.recv() => return Ok(()),
    };

    let addresses =
        NodeAddresses { grpc: grpc.local_addr()?.to_string(), resp: resp.local_addr()?.to_string() };
    let mut nodes: BTreeMap<NodeId, NodeAddresses> =
        options.peers.into_iter().map(|peer| (peer.id, peer.addresses)).collect();
    nodes.insert(options.id.clone(), addresses.clone());
    // A node whose disk is full serves what it has all the same.
    if let Err(error) = node.meet(nodes).await {
        tracing::error!(%error, "where nodes can be reached is known until the next start only");
    }
    if node.is_fresh() {
        migrate::slot_map::ask_first(&node).await;
    }

    let limits = proto::limits::Limits::default();
    let guard = RangeGuard::new();
    let draining = CancellationToken::new();
    let hook = hook(SplitHook::new(node.clone(), guard.clone()));
    let mut files = FileStoreOptions::default();
    files.percent_per_peer = options.migrate.percent_per_peer;
    let staged_files = files.max_open_files;
    let receiver = grpc::receiver(&node, hook, draining.clone(), files, limits.snapshot.clone()).await?;
    let stop_tasks = stop.child_token();
    let splits = Splits::new(node.clone(), receiver.transfers(), guard.clone(), stop_tasks.clone())?;
    // Holds their slots: before anybody is served.
    splits.resume()?;
    let migrating = Migrating::start(&node, guard.clone(), options.migrate, limits.migration.clone()).await?;
    let told = migrate::told(&migrating);
    let health = Health::start(&node, &receiver.transfers(), &splits, &guard, told, limits.health.clone())?;
    let services = grpc::services(&node, receiver.clone(), &migrating, health.registry())?;
    let connections = CONNECTIONS.min(options.grace / 4);
    let handshakes = if node.trust().tls().is_some() { TlsLimits::default().handshakes } else { 0 };
    let peers = limits.connections.connections.saturating_add(handshakes).saturating_add(staged_files);
    let max_clients = descriptors::clients(options.max_clients, u64::try_from(peers).unwrap_or(u64::MAX));
    let resp = RespServer::new(node.clone(), splits.clone(), resp, options.limits, Some(max_clients))?;
    let mut serving = tokio::task::JoinSet::new();
    serving.spawn({
        let stop = stop.clone();
        async move {
            resp.serve(stop, connections).await;
            Ok(())
        }
    });
    serving.spawn(grpc::serve(
        grpc,
        node.trust().tls().cloned(),
        services,
        limits,
        stop.clone(),
        connections,
    ));
    serving.spawn({
        let (store, stop) = (node.store().clone(), stop.clone());
        async move {
            store.sweep(stop).await;
            Ok(())
        }
    });
    serving.spawn({
        let (health, node, stop) = (health.clone(), node.clone(), stop.clone());
        async move {
            health.watch_peers(node, stop).await;
            Ok(())
        }
    });
    serving.spawn({
        let (trust, stop) = (node.trust().clone(), stop.clone());
        async move {
            trust.follow(stop).await;
            Ok(())
        }
    });
    serving.spawn({
        let (node, stop) = (node.clone(), stop.clone());
        async move {
            migrate::slot_map::follow(node, stop).await;
            Ok(())
        }
    });
    health.registry().set_running();
    // So that whoever reads the line below finds the node ready.
    if tokio::time::timeout(FIRST_RESULTS, health.registry().started()).await.is_err() {
        tracing::warn!("some checks have no good result yet; the node serves, and is not ready");
    }

    let ready = Ready { id: options.id.to_string(), addresses };
    writeln!(std::io::stdout(), "{ready}").context("cannot say that the node is ready")?;
    tracing::info!(keys = node.key_count(), slots = ?node.own_ranges(), "{ready}");

    let mut result = Ok(());
    let why = tokio::select! {
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
        // Nothing ends by itself.
        ended = serving.join_next() => {
            result = match ended {
                Some(Ok(ended)) => ended,
                Some(Err(error)) => Err(error.into()),
                None => Ok(()),
            };
            "a part of the node has ended"
        }
    };
    tracing::info!("{why}: draining");
    let drain = Drain::begin(&health, why, options.grace, &draining, &guard);
    migrating.drain();
    let hurry = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    let running = drain.tasks_ended(hurry).await;
    if running > 0 {
        tracing::info!(running, "stopping what still runs; it can be resumed");
    }
    stop_tasks.cancel();
    let stopped = async {
        splits.join().await;
        migrating.shutdown().await;
        receiver.shutdown().await;
    };
    drain.tasks_stopped(stopped).await;
    drain.shut_down().await;
    stop.cancel();
    while let Some(ended) = serving.join_next().await {
        result = result.and(ended.map_err(anyhow::Error::from).and_then(|ended| ended));
    }
    let closing = tokio::task::spawn_blocking(move || node.store().close());
    match tokio::time::timeout(drain.left().max(CLOSE), closing).await {
        Ok(closed) => closed.context("the database could not be closed")?,
        Err(_) => tracing::warn!("the database is busy; it is verified at the next start"),
    }
    tracing::info!("stopped");
    result
}

fn bind(address: SocketAddr, flag: &str) -> anyhow::Result<TcpListener> {
    listen(address)
        .with_context(|| format!("cannot listen on {address}; is it in use? Choose another {flag}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ready_line_is_read_back() {
        let ready = Ready {
            id: "n1".into(),
            addresses: NodeAddresses { grpc: "127.0.0.1:7101".into(), resp: "127.0.0.1:7001".into() },
        };
        assert_eq!(ready.to_string().parse::<Ready>().unwrap(), ready);
        for line in ["", "ready", "ready id=n1", "error: no"] {
            assert!(line.parse::<Ready>().is_err(), "{line:?}");
        }
    }
}

//! The smallest node that takes snapshots: a directory, the receiver, a server.
//!
//! ```text
//! cargo run -p proto-snapshot --features server,listen --example receiver -- DIR ADDR [--option value]...
//! ```
//!
//! Snapshots are kept in DIR; ADDR is `127.0.0.1:0` for any free port. When it serves, it prints one line,
//! `listening on ADDRESS`. SIGTERM and SIGINT stop it cleanly. [`Options`] lists the options, which are
//! there to reach limits in a test.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use proto_common::error::Error;
use proto_common::ids::NodeId;
use proto_common::tuning::{incoming, tune_server};
use proto_common::v1::NodeIdentity;
use proto_snapshot::SnapshotReceiver;
use proto_snapshot::hook::{HookFuture, InstallHook};
use proto_snapshot::limits::Limits;
use proto_snapshot::reason::Reason;
use proto_snapshot::store::{FileSnapshotStore, FileStoreOptions, PlacedSnapshot};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Server;

type AnyError = Box<dyn std::error::Error>;

/// What the command line may set.
struct Options {
    /// `--node-id`: who this is. Default `receiver`.
    node_id: NodeId,
    /// `--idle-ms --first-frame-ms --stale-ms --chunk-bytes --stream-credit-bytes --unsynced-bytes --extents --lanes
    /// --transfers --staged --watchers --history`.
    limits: Limits,
    /// `--capacity-bytes`: what the store may hold.
    store: FileStoreOptions,
    hook: Hook,
}

/// An owner that tests can make slow or unwilling.
#[derive(Default)]
struct Hook {
    /// `--hold-install FILE`: an install waits for as long as FILE exists.
    hold: Option<PathBuf>,
    /// `--refuse-install FILE`: an install is refused for good when FILE exists.
    refuse: Option<PathBuf>,
}

impl InstallHook for Hook {
    fn install<'a>(&'a self, _snapshot: &'a PlacedSnapshot) -> HookFuture<'a, ()> {
        Box::pin(async {
            while self.hold.as_ref().is_some_and(|file| file.exists()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            if self.refuse.as_ref().is_some_and(|file| file.exists()) {
                return Err(Error::new(Reason::InstallRefused, "this snapshot is not wanted"));
            }
            Ok(())
        })
    }
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<(PathBuf, String, Options), AnyError> {
    let (Some(dir), Some(address)) = (args.next(), args.next()) else {
        return Err("usage: receiver DIR ADDR [--option value]...".into());
    };
    let mut options = Options {
        node_id: NodeId::new("receiver")?,
        limits: Limits::default(),
        store: FileStoreOptions::default(),
        hook: Hook::default(),
    };
    let Options { node_id, limits, store, hook } = &mut options;
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
        let millis = || value.parse().map(Duration::from_millis);
        match name.as_str() {
            "--node-id" => *node_id = NodeId::new(&value)?,
            "--idle-ms" => limits.idle = millis()?,
            "--first-frame-ms" => limits.first_frame = millis()?,
            "--stale-ms" => limits.stale_after = millis()?,
            "--chunk-bytes" => limits.chunk_bytes = value.parse()?,
            "--stream-credit-bytes" => limits.stream_credit_bytes = value.parse()?,
            "--unsynced-bytes" => limits.unsynced_bytes = value.parse()?,
            "--extents" => limits.extents = value.parse()?,
            "--lanes" => limits.lanes = value.parse()?,
            "--transfers" => limits.transfers = value.parse()?,
            "--staged" => limits.staged = value.parse()?,
            "--watchers" => limits.watchers = value.parse()?,
            "--history" => limits.history = value.parse()?,
            "--capacity-bytes" => store.capacity_bytes = Some(value.parse()?),
            "--hold-install" => hook.hold = Some(value.into()),
            "--refuse-install" => hook.refuse = Some(value.into()),
            _ => return Err(format!("unknown option {name}").into()),
        }
    }
    Ok((dir.into(), address, options))
}

#[tokio::main]
async fn main() -> Result<(), AnyError> {
    let (dir, address, options) = parse(std::env::args().skip(1))?;
    let Options { node_id, limits, store, hook } = options;

    let store = tokio::task::spawn_blocking(move || FileSnapshotStore::open(dir, store)).await??;
    let identity = NodeIdentity { version: env!("CARGO_PKG_VERSION").to_owned(), ..NodeIdentity::default() };
    let receiver = SnapshotReceiver::builder(&node_id, store)
        .identity(identity)
        .limits(limits)
        .hook(hook)
        .start()
        .await?;

    let listener = TcpListener::bind(&address).await?;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "listening on {}", listener.local_addr()?)?;
    stdout.flush()?;

    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stopping = receiver.clone();
    tune_server(Server::builder())
        .add_service(receiver.clone().into_service())
        .serve_with_incoming_shutdown(incoming(listener), async move {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            // First the transfers, so that each sender hears why its stream ends.
            stopping.shutdown().await;
        })
        .await?;
    receiver.shutdown().await;
    Ok(())
}

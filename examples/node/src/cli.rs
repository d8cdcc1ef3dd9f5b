//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use proto::common::ids::ClusterId;
use proto::common::tls::TlsFiles;

use crate::check::CheckOptions;
use crate::common::{NodeId, SlotRange};
use crate::demo::DemoOptions;
use crate::demo::load::Source;
use crate::migrate::MigrateOptions;
use crate::resp::Limits;
use crate::serve::{Peer, ServeOptions};
use crate::store::{NodeAddresses, StoreOptions};
use crate::trust::TrustOptions;

/// A key-value store that speaks the Redis protocol, one slot range per node, and moves slots to other nodes.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve one node until SIGINT or SIGTERM.
    Serve(Box<ServeArgs>),
    /// Look at the data directory of a stopped node: is the database whole, and can all records of migrations be read?
    Check(CheckArgs),
    /// Split a shard between two nodes, kill one in the middle, migrate slots back, and prove that nothing is lost.
    Demo(DemoArgs),
}

/// Of `node check`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  node check --data data/n1
  node check --data data/n1 --drop active/08192-16383.m1.task --target-discarded
  node check --data data/n2 --drop m1 --json

For each record that cannot be read it says what can be done about it. A dropped one is kept below DIR/migrations/dropped/.

Exit codes: 0 everything can be read, 1 something cannot, or could not be done (it says what), 2 wrong usage.")]
pub struct CheckArgs {
    /// The data directory of a node that does not run.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Look at the records only, without reading the whole database first.
    #[arg(long)]
    skip_verify: bool,
    /// Drop this record, which cannot be read: the name that is shown for it.
    #[arg(long, value_name = "RECORD")]
    drop: Option<String>,
    /// With --drop, of a record of slots that this node owns: the target was asked, and has discarded the migration.
    #[arg(long, requires = "drop")]
    target_discarded: bool,
    /// Say it in JSON.
    #[arg(long)]
    json: bool,
}

impl From<CheckArgs> for CheckOptions {
    fn from(args: CheckArgs) -> Self {
        let CheckArgs { data, skip_verify, drop, target_discarded, json } = args;
        let store = StoreOptions { verify: !skip_verify, ..StoreOptions::default() };
        Self { data, store, drop, target_discarded, json }
    }
}

/// Of `node demo`.
#[derive(Debug, Args)]
#[command(
    long_about = "\
Split a shard between two nodes, kill one in the middle, migrate slots back, and prove that nothing is lost.

Starts two nodes as processes of their own and loads data into the first. Then, while clients write: takes a consistent \
snapshot of the upper half of the slots, streams it to the second node, kills that with SIGKILL in the middle and restarts \
it; the transfer resumes, the snapshot is installed, the slots are handed over. Then the upper half of these slots \
migrates back to the first node while clients write, and their writes are timed before, during and after. In the end the \
nodes must agree on the owner of every slot, and every key is read back through the Redis port of the node that owns it, \
and compared. Copies of little data are slowed down to take a few seconds.",
    after_help = "\
Examples:
  node demo
  node demo --keys 1000000 --keep /tmp/demo
  node demo --input pairs.tsv          # lines of key<TAB>value
  node demo --input dump.resp          # commands, as for redis-cli --pipe

Exit codes: 0 everything is as it should be, 1 something is not (it says what), 2 wrong usage, 130 interrupted."
)]
pub struct DemoArgs {
    /// Keys to generate, of 100 bytes each.
    #[arg(long, value_name = "N", default_value_t = 200_000, conflicts_with = "input", value_parser = clap::value_parser!(u64).range(1..))]
    keys: u64,
    /// Load this file instead: lines of `key<TAB>value`, or Redis commands as redis-cli --pipe takes them.
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Keep data directories and logs in DIR, which must be empty or not there yet.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

impl From<DemoArgs> for DemoOptions {
    fn from(args: DemoArgs) -> Self {
        let DemoArgs { keys, input, keep } = args;
        Self { source: input.map_or(Source::Generated(keys), Source::File), keep }
    }
}

/// Of `node serve`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  One node that owns everything:
    node serve --id n1 --data data/n1 --grpc 127.0.0.1:7101 --resp 127.0.0.1:7001 --slots 0-16383
    redis-cli -p 7001 set greeting hello

  A second one without slots, which knows the first:
    node serve --id n2 --data data/n2 --grpc 127.0.0.1:7102 --resp 127.0.0.1:7002 --slots none \\
      --peer n1=127.0.0.1:7101,127.0.0.1:7001,0-16383

When it serves it prints one line, with the ports that it has (port 0 takes any free one):
    ready id=n1 grpc=127.0.0.1:7101 resp=127.0.0.1:7001
Logs go to stderr; RUST_LOG=debug shows more.")]
pub struct ServeArgs {
    /// The node's id: letters, digits, '.', '_' and '-'.
    #[arg(long)]
    id: NodeId,
    /// Its data directory; made if it is not there.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Where the gRPC services listen.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7101")]
    grpc: SocketAddr,
    /// Where the Redis port listens.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7001")]
    resp: SocketAddr,
    /// Slots that the node owns when its data directory is made, like 0-8191 or 0-99,200 or none.
    /// An existing directory keeps what it has: saying again what it was made with, or what it has now, is fine, anything else is refused.
    #[arg(long, value_name = "SLOTS", value_parser = parse_slots)]
    slots: Option<Slots>,
    /// Another node: ID=GRPC,RESP or ID=GRPC,RESP,SLOTS, with the slots that it owns when this
    /// node's data directory is made. Can be given many times.
    #[arg(long, value_name = "PEER", value_parser = parse_peer)]
    peer: Vec<Peer>,
    /// Memory for the database's cache, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    cache_mib: usize,
    /// Disk space that migrations to this node leave free, in MiB; a source that needs it waits.
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    reserve_mib: u64,
    /// How much of the free disk the snapshots from one node may take while they come in, in percent, and how much its migrations. What needs
    /// more is refused.
    #[arg(long, value_name = "PERCENT", default_value_t = 75, value_parser = clap::value_parser!(u8).range(1..=100))]
    disk_percent_per_peer: u8,
    /// Start without reading the whole database first: fast where it is large, and a damaged page is found late or never.
    /// After a crash it is read anyhow.
    #[arg(long)]
    skip_verify: bool,
    /// The largest request that is taken, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=512))]
    max_request_mib: usize,
    /// Connections to the Redis port.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    max_clients: usize,
    /// TLS: certificates of the CAs that sign the cluster's certificates, in PEM form. With --tls-cert and --tls-key.
    #[arg(long, value_name = "FILE", requires = "tls_cert", requires = "tls_key")]
    tls_ca: Option<PathBuf>,
    /// TLS: the node's certificate, in PEM form; its SAN names it: URI:node://CLUSTER/ID. Replaced files are taken within seconds.
    #[arg(long, value_name = "FILE", requires = "tls_ca", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// TLS: the private key of that certificate, in PEM form.
    #[arg(long, value_name = "FILE", requires = "tls_ca", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// The cluster's name; nodes of another one are refused. With TLS it is in the certificate.
    #[arg(long, value_name = "ID")]
    cluster: Option<ClusterId>,
    /// Let the gRPC port be plaintext beyond loopback: whoever reaches it may read, move and discard data.
    #[arg(long, conflicts_with = "tls_cert")]
    insecure_plaintext: bool,
    /// Seconds from SIGTERM to the end of the process, at most. Transfers that run may end in that time;
    /// what does not is resumed later. A second signal cuts it short.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    grace: u64,
    /// Seconds that a request waits at most for slots that a migration hands over; then it is told to try again. Writes wait for the end of a freeze, if its caller allows that to take longer.
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    patience: u64,
    /// Seconds of silence after which the stream of a migration to this node is given up; its source opens the next one.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(3..=3600))]
    idle: u64,
}

/// Slots of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Slots(Vec<SlotRange>);

fn parse_slots(text: &str) -> Result<Slots, String> {
    if text == "none" {
        return Ok(Slots(Vec::new()));
    }
    text.split(',')
        .map(|range| range.parse().map_err(|error| format!("{range:?}: {error}; write 0-16383, 5 or none")))
        .collect::<Result<_, _>>()
        .map(Slots)
}

fn parse_peer(text: &str) -> Result<Peer, String> {
    let wanted = || format!("{text:?} is not ID=GRPC,RESP or ID=GRPC,RESP,SLOTS");
    let (id, rest) = text.split_once('=').ok_or_else(wanted)?;
    let mut rest = rest.splitn(3, ',');
    let (grpc, resp) = rest.next().zip(rest.next()).ok_or_else(wanted)?;
    for address in [grpc, resp] {
        let port = address.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
        if !matches!(port, Some(Ok(_))) {
            return Err(format!("{address:?} is not HOST:PORT"));
        }
    }
    Ok(Peer {
        id: NodeId::new(id).map_err(|error| error.to_string())?,
        addresses: NodeAddresses { grpc: grpc.into(), resp: resp.into() },
        slots: rest.next().map(parse_slots).transpose()?.map(|slots| slots.0).unwrap_or_default(),
    })
}

impl From<ServeArgs> for ServeOptions {
    fn from(args: ServeArgs) -> Self {
        let ServeArgs {
            id,
            data,
            grpc,
            resp,
            slots,
            peer,
            cache_mib,
            reserve_mib,
            disk_percent_per_peer,
            skip_verify,
            max_request_mib,
            max_clients,
            tls_ca,
            tls_cert,
            tls_key,
            cluster,
            insecure_plaintext,
            grace,
            patience,
            idle,
        } = args;
        Self {
            id,
            data,
            grpc,
            resp,
            slots: slots.map(|slots| slots.0),
            peers: peer,
            store: StoreOptions {
                cache_bytes: cache_mib.saturating_mul(1 << 20),
                reserve_bytes: reserve_mib.saturating_mul(1 << 20),
                verify: !skip_verify,
            },
            limits: {
                let limits =
                    Limits { request_bytes: max_request_mib.saturating_mul(1 << 20), ..Limits::default() };
                // A few of the largest at once.
                Limits {
                    memory_bytes: limits.memory_bytes.max(limits.request_bytes.saturating_mul(4)),
                    ..limits
                }
            },
            max_clients,
            trust: TrustOptions {
                // clap has seen to it that there are all three or none.
                tls: tls_ca.zip(tls_cert).zip(tls_key).map(|((ca, certificate), key)| TlsFiles {
                    ca,
                    certificate,
                    key,
                }),
                cluster,
                insecure_plaintext,
            },
            grace: Duration::from_secs(grace),
            migrate: MigrateOptions {
                patience: Duration::from_secs(patience),
                idle: Duration::from_secs(idle),
                percent_per_peer: disk_percent_per_peer,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn slots_and_peers() {
        assert_eq!(parse_slots("none"), Ok(Slots(vec![])));
        assert_eq!(parse_slots("0-99,200").unwrap().0.len(), 2);
        assert!(parse_slots("5-3").is_err());
        let peer = parse_peer("n2=127.0.0.1:7102,127.0.0.1:7002,0-5,9").unwrap();
        assert_eq!((peer.id.as_str(), peer.slots.len()), ("n2", 2));
        assert!(parse_peer("n2=127.0.0.1:7102,[::1]:7002").unwrap().slots.is_empty());
        for wrong in ["n2", "n2=a:1", "n2=a,b", "=a:1,b:1", "n2=a:1,b:x"] {
            assert!(parse_peer(wrong).is_err(), "{wrong}");
        }
    }
}

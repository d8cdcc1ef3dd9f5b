//! The command line: what there is to say, and what is refused before anything is done.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use clap::builder::{PathBufValueParser, TypedValueParser as _};
use clap::{Parser, Subcommand, ValueEnum};
use proto::common::ids::{NodeId, ShardId, TransferId};
use proto::common::slots::SlotRange;
use proto::node;

use crate::address::Address;
use crate::drain::{DRAIN_EXAMPLES, Drain};
use crate::migrate::args::Migrate;
use crate::trust::TlsArgs;

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed; the reason, and what to do, are on stderr
  2    wrong usage; nothing was done
  130  interrupted; stderr says how to go on";

const EXAMPLES: &str = "\
Examples:
  nodectl push ./snapshot --to 127.0.0.1:7101 --source-shard s1 --target-shard s2
  nodectl transfers --at 127.0.0.1:7101 --active
  nodectl progress split-42 --at 127.0.0.1:7101 --watch
  nodectl cancel split-42 --at 127.0.0.1:7101 --reason 'wrong shard'
  nodectl migrate start --from 127.0.0.1:7101 --to n2=127.0.0.1:7102 --slots 0-99 --wait
  nodectl drain 127.0.0.1:7101 --to n2=127.0.0.1:7102
  nodectl health 127.0.0.1:7101 127.0.0.1:7102
  nodectl status 127.0.0.1:7101 127.0.0.1:7102 --watch";

const PUSH_EXAMPLES: &str = "\
Examples:
  The upper half of shard s1, which becomes shard s2, at no more than 100 MiB/s:
    nodectl push ./snapshot --to 127.0.0.1:7101 --source-shard s1 --target-shard s2 \\
        --slots 8192-16383 --index 1200 --term 3 --rate 100MiB

  Go on with what was interrupted; bytes that the node has are not sent again:
    nodectl push ./snapshot --to 127.0.0.1:7101 --source-shard s1 --target-shard s2 \\
        --slots 8192-16383 --index 1200 --term 3 --transfer-id split-42

What is sent: PATH itself if it is a file, else all files below it. Symbolic links and special
files are refused; empty directories, modes and times are not part of a snapshot. PATH must not
change while it is sent.

Ctrl-C (or SIGTERM) stops the sending and harms nothing: what the node has stays there until it
is resumed or expires, and stderr says with which command to resume. A second one exits at once.";

const TRANSFERS_EXAMPLES: &str = "\
Examples:
  nodectl transfers --at 127.0.0.1:7101
  nodectl transfers --at 127.0.0.1:7101 --active --direction in
  nodectl transfers --at 127.0.0.1:7101 --json | jq '.transfers[] | select(.error)'";

const PROGRESS_EXAMPLES: &str = "\
Examples:
  nodectl progress split-42 --at 127.0.0.1:7101
  nodectl progress split-42 --at 127.0.0.1:7101 --watch

With --watch it ends with the transfer: 0 if it was installed, 1 if not. Without, it exits with 0
whatever the state.";

const HEALTH_EXAMPLES: &str = "\
Examples:
  nodectl health 127.0.0.1:7101 127.0.0.1:7102
  nodectl health 127.0.0.1:7101 --service readiness
  nodectl health 127.0.0.1:7101 --json | jq '.nodes[].components[] | select(.status != \"healthy\")'

It exits with 0 only if every node answers and is healthy, with 1 otherwise; DEGRADED is not healthy.
A node that can't be reached is a row.";

const STATUS_EXAMPLES: &str = "\
Examples:
  nodectl status 127.0.0.1:7101 127.0.0.1:7102
  nodectl status 127.0.0.1:7101 127.0.0.1:7102 --watch
  nodectl status 127.0.0.1:7101 --json | jq '.nodes[] | select(.safe_to_remove)'

A node that can't be reached is a row, and no failure of the command: it exits with 0. MOVING counts
transfers and migrations, those that come in and those that go out. DISK is how full it is, CPU the
use of the whole machine, MEM the memory of the process. Below the table stand the reasons.";

const CANCEL_EXAMPLES: &str = "\
Examples:
  nodectl cancel split-42 --at 127.0.0.1:7101
  nodectl cancel split-42 --at 127.0.0.1:7101 --reason 'wrong shard'

What the node has of the transfer is deleted. Its sender is told, and stops. Once the snapshot is
being installed it is too late: that is refused with exit code 1.";

/// See, start, watch and stop what moves between nodes.
#[derive(Debug, Parser)]
#[command(name = "nodectl", version, after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
#[command(
    propagate_version = true,
    subcommand_required = true,
    arg_required_else_help = true,
    max_term_width = 100
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,

    /// Print JSON: one document, or one per line while something is watched or pushed
    #[arg(long, global = true, display_order = 1000)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) tls: TlsArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Send a file or directory to a node, as a snapshot of a shard
    #[command(after_help = PUSH_EXAMPLES)]
    Push(Box<Push>),
    /// List the transfers of a node, active ones first
    #[command(after_help = TRANSFERS_EXAMPLES)]
    Transfers(Transfers),
    /// Show one transfer, active or finished
    #[command(after_help = PROGRESS_EXAMPLES)]
    Progress(Progress),
    /// Stop a transfer and delete what the node has of it
    #[command(after_help = CANCEL_EXAMPLES)]
    Cancel(Cancel),
    /// Ask nodes how they are; exits with 0 only if all are healthy
    #[command(after_help = HEALTH_EXAMPLES)]
    Health(Health),
    /// Show what nodes are, have and do, one row each
    #[command(after_help = STATUS_EXAMPLES)]
    Status(Status),
    /// Move slots between nodes while clients write: start, watch, complete, cancel
    #[command(subcommand)]
    Migrate(Migrate),
    /// Move all slots off a node, and say when it is safe to stop it
    #[command(after_help = DRAIN_EXAMPLES)]
    Drain(Drain),
    /// Make certificates for a test cluster
    #[cfg(feature = "tls")]
    #[command(subcommand)]
    Certs(crate::certs::Certs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct Push {
    /// The file or directory to send
    #[arg(value_parser = PathBufValueParser::new().try_map(reachable))]
    pub(crate) path: PathBuf,

    /// gRPC address of the node that receives
    #[arg(long, value_name = "ADDR")]
    pub(crate) to: Address,

    /// The shard that is split
    #[arg(long, value_name = "ID")]
    pub(crate) source_shard: ShardId,

    /// The shard that the snapshot becomes
    #[arg(long, value_name = "ID")]
    pub(crate) target_shard: ShardId,

    /// The slots that move, first and last
    #[arg(long, value_name = "A-B", default_value_t = SlotRange::FULL)]
    pub(crate) slots: SlotRange,

    /// Name of the transfer; the same name and options go on with it. Default: made from the other
    /// options and the state of PATH, so that the same command resumes
    #[arg(long, value_name = "ID")]
    pub(crate) transfer_id: Option<TransferId>,

    /// Raft log index that the snapshot was taken at
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    pub(crate) index: u64,

    /// Raft term of that index
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    pub(crate) term: u64,

    /// Fence: be refused where the target shard has seen a higher epoch (with the same one: a higher
    /// --term). Default: no fence
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) epoch: Option<u64>,

    /// Connections to send over; the node may allow fewer. Default: chosen for you
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64), allow_negative_numbers = true)]
    pub(crate) lanes: Option<u32>,

    /// Most payload bytes per second, such as 100MiB. Default: what the node asks for
    #[arg(long, value_name = "SIZE")]
    pub(crate) rate: Option<Rate>,

    /// Compute digests first, so that files which the node has already are not sent. Reads everything
    /// once more
    #[arg(long, alias = "digests")]
    pub(crate) reuse: bool,

    /// Who goes first when the node has more to do than it can
    #[arg(long, value_enum, default_value_t = Priority::Split)]
    pub(crate) priority: Priority,

    /// The node in whose name it is sent. Default: whom the certificate names, without TLS "nodectl"
    #[arg(long, value_name = "ID")]
    pub(crate) source_node: Option<NodeId>,

    /// The node that must answer; another one refuses. Default: whoever does
    #[arg(long, value_name = "ID")]
    pub(crate) target_node: Option<NodeId>,

    /// Go on trying this long without any progress: 30s, 5m, 2h, or forever
    #[arg(long, value_name = "TIME", default_value = "5m")]
    pub(crate) retry_for: Patience,
}

/// Which node is asked, and how long it may take.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Node {
    /// gRPC address of the node to ask
    #[arg(long, value_name = "ADDR")]
    pub(crate) at: Address,

    /// Longest wait for an answer: 500ms, 10s, 1m
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = positive_time)]
    pub(crate) timeout: Duration,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Transfers {
    #[command(flatten)]
    pub(crate) node: Node,

    /// Leave out those that have ended
    #[arg(long)]
    pub(crate) active: bool,

    /// Only what the node receives (in) or sends (out)
    #[arg(long, value_enum)]
    pub(crate) direction: Option<Direction>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Progress {
    /// The transfer
    #[arg(value_name = "ID")]
    pub(crate) transfer_id: TransferId,

    #[command(flatten)]
    pub(crate) node: Node,

    /// Follow it until it ends
    #[arg(long)]
    pub(crate) watch: bool,

    /// Which one, where a node sends to itself
    #[arg(long, value_enum)]
    pub(crate) direction: Option<Direction>,

    /// With --watch: go on trying this long when the node goes away: 30s, 5m, 2h, or forever
    #[arg(long, value_name = "TIME", default_value = "5m")]
    pub(crate) retry_for: Patience,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Cancel {
    /// The transfer
    #[arg(value_name = "ID")]
    pub(crate) transfer_id: TransferId,

    #[command(flatten)]
    pub(crate) node: Node,

    /// Why; kept in the node's history, at most 256 bytes of it
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) reason: String,

    /// Which one, where a node sends to itself
    #[arg(long, value_enum)]
    pub(crate) direction: Option<Direction>,
}

/// Which nodes are asked, and how long each may take.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Nodes {
    /// gRPC addresses of the nodes to ask
    #[arg(value_name = "ADDR", required = true)]
    pub(crate) addresses: Vec<Address>,

    /// Longest wait for the answer of a node: 500ms, 10s, 1m
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = positive_time)]
    pub(crate) timeout: Duration,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Health {
    #[command(flatten)]
    pub(crate) nodes: Nodes,

    /// Ask for one part: liveness, readiness, startup, or a component. Default: the node as a whole
    #[arg(long, value_name = "NAME", default_value = "")]
    pub(crate) service: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Status {
    #[command(flatten)]
    pub(crate) nodes: Nodes,

    /// Ask again and again, until it is interrupted
    #[arg(long)]
    pub(crate) watch: bool,

    /// With --watch: time between two rounds
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = positive_time)]
    pub(crate) interval: Duration,
}

/// What a push is for.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Priority {
    /// A replica or shard is being brought back
    Recovery,
    /// A shard splits; writes may be waiting
    Split,
    /// Moving data to even out load; can wait
    Rebalance,
}

impl From<Priority> for node::Priority {
    fn from(priority: Priority) -> Self {
        match priority {
            Priority::Recovery => Self::Recovery,
            Priority::Split => Self::Split,
            Priority::Rebalance => Self::Rebalance,
        }
    }
}

/// Which way data flows, seen from the node that is asked.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Direction {
    /// It receives
    In,
    /// It sends
    Out,
}

impl From<Direction> for node::Direction {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::In => Self::In,
            Direction::Out => Self::Out,
        }
    }
}

/// The direction in a request; none given is "unspecified".
pub(crate) fn wire_direction(direction: Option<Direction>) -> i32 {
    direction.map_or(node::Direction::Unspecified, Into::into).into()
}

/// Bytes per second, at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rate(pub(crate) NonZeroU64);

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size = text.strip_suffix("/s").unwrap_or(text);
        let ByteSize(bytes) = size.parse().map_err(|_| {
            "write a size per second, such as 500KiB, 100MiB (1024s), 100MB (1000s) or 1GiB".to_owned()
        })?;
        NonZeroU64::new(bytes)
            .map(Self)
            .ok_or_else(|| "at 0 bytes per second it would never end; leave it out for no limit".to_owned())
    }
}

/// For how long to go on trying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Patience(pub(crate) Option<Duration>);

impl FromStr for Patience {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "forever" => Ok(Self(None)),
            "0" => Ok(Self(Some(Duration::ZERO))),
            text => time(text).map(|time| Self(Some(time))).map_err(|why| format!("{why}, or forever")),
        }
    }
}

fn time(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| "write a time with its unit, such as 500ms, 30s, 5m or 2h".to_owned())
}

/// A time that is not nothing.
pub(crate) fn positive_time(text: &str) -> Result<Duration, String> {
    time(text)
        .and_then(|time| if time.is_zero() { Err("must be more than nothing".to_owned()) } else { Ok(time) })
}

/// Refuses a path that could not be sent, while nothing has been done yet.
fn reachable(path: PathBuf) -> Result<PathBuf, String> {
    let metadata = std::fs::metadata(&path).map_err(|error| error.to_string())?;
    if metadata.is_dir() {
        std::fs::read_dir(&path).map_err(|error| error.to_string())?;
    } else if metadata.is_file() {
        std::fs::File::open(&path).map_err(|error| error.to_string())?;
    } else {
        return Err("is neither a file nor a directory".to_owned());
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use clap::error::ErrorKind;

    use super::*;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(line.split_whitespace())
    }

    const PUSH: &str = "nodectl push . --to n1:7101 --source-shard s1 --target-shard s2";

    #[test]
    fn the_definition_holds_together() {
        use clap::CommandFactory as _;
        Args::command().debug_assert();
    }

    #[test]
    fn a_push_with_everything() {
        let line = format!(
            "{PUSH} --slots 8192-16383 --transfer-id t1 --index 7 --term 3 --epoch 2 --lanes 4 --rate 100MiB --reuse \
             --priority recovery --source-node n0 --target-node n1 --retry-for 90s --json"
        );
        let args = parse(&line).unwrap();
        assert!(args.json);
        let Command::Push(push) = args.command else { panic!("{args:?}") };
        assert_eq!((push.slots.start(), push.slots.end()), (8192, 16384));
        assert_eq!(push.rate.unwrap().0.get(), 100 << 20);
        assert_eq!(push.retry_for.0, Some(Duration::from_secs(90)));
        assert_eq!(push.transfer_id.unwrap().as_str(), "t1");
        assert!(push.reuse);
    }

    #[test]
    fn a_push_with_what_it_needs() {
        let Command::Push(push) = parse(PUSH).unwrap().command else { panic!() };
        assert_eq!(push.slots, SlotRange::FULL);
        assert_eq!((push.index, push.term, push.epoch, push.lanes), (0, 0, None, None));
        assert_eq!(push.retry_for.0, Some(Duration::from_secs(300)));
        assert_eq!(push.source_node, None);
    }

    #[test]
    fn wrong_values_are_refused_by_the_name_of_their_option() {
        for (extra, named) in [
            ("--slots 9-1", "--slots"),
            ("--slots 0-16384", "--slots"),
            ("--transfer-id a/b", "--transfer-id"),
            ("--source-node .n", "--source-node"),
            ("--rate 0", "--rate"),
            ("--rate fast", "--rate"),
            ("--lanes 0", "--lanes"),
            ("--lanes 65", "--lanes"),
            ("--index -1", "--index"),
            ("--retry-for 5", "--retry-for"),
            ("--priority high", "--priority"),
        ] {
            let error = parse(&format!("{PUSH} {extra}")).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{extra}");
            assert!(error.to_string().contains(named), "{extra}: {error}");
        }
        for to in ["n1", "n1:0", "ftp://n1:1", "https://n1"] {
            let error = parse(&PUSH.replace("n1:7101", to)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ValueValidation, "{to}");
            assert!(error.to_string().contains("--to"), "{to}: {error}");
        }
        let error = parse(&PUSH.replace(" . ", " /no/such/path ")).unwrap_err();
        assert!(error.to_string().contains("PATH") && error.to_string().contains("/no/such/path"), "{error}");
    }

    #[test]
    fn rates_and_times() {
        for (text, bytes) in
            [("1", 1), ("1KiB", 1024), ("1kB", 1000), ("1.5MiB", 1_572_864), ("2GiB/s", 2 << 30)]
        {
            assert_eq!(text.parse::<Rate>().unwrap().0.get(), bytes, "{text}");
        }
        assert_eq!("forever".parse(), Ok(Patience(None)));
        assert_eq!("0".parse(), Ok(Patience(Some(Duration::ZERO))));
        assert_eq!("1h 30m".parse(), Ok(Patience(Some(Duration::from_secs(5400)))));
        assert!("soon".parse::<Patience>().is_err());
        assert!(positive_time("0s").is_err());
    }
}

//! The command line of `nodectl migrate`.

use std::str::FromStr;
use std::time::Duration;

use proto::common::ids::{MigrationId, NodeId, ShardId};
use proto::common::slots::SlotRange;

use crate::address::Address;
use crate::args::{Direction, Node, Patience, Priority, Rate, positive_time};

const EXAMPLES: &str = "\
Examples:
  nodectl migrate start --from 127.0.0.1:7101 --to n2=127.0.0.1:7102 --slots 0-99 --wait
  nodectl migrate list --at 127.0.0.1:7101 --active
  nodectl migrate progress m-42 --at 127.0.0.1:7101
  nodectl migrate watch m-42 --at 127.0.0.1:7101
  nodectl migrate cancel m-42 --at 127.0.0.1:7101 --reason 'wrong node'";

const START_EXAMPLES: &str = "\
Examples:
  Move 100 slots at no more than 50 MiB/s, and wait until the other node owns them:
    nodectl migrate start --from 127.0.0.1:7101 --to n2=127.0.0.1:7102 --slots 0-99 --rate 50MiB --wait

  Prepare everything, and cut over later:
    nodectl migrate start --from 127.0.0.1:7101 --to n2=127.0.0.1:7102 --slots 0-99 --id m-42 --manual
    nodectl migrate complete m-42 --at 127.0.0.1:7101

The same --id and options again join the migration, whatever became of the first call; --rate,
--freeze and --priority are set anew. With --wait it exits with 0 only if the slots were handed over.
Ctrl-C stops the waiting and not the migration; stderr says how to watch and how to cancel it.";

const LIST_EXAMPLES: &str = "\
Examples:
  nodectl migrate list --at 127.0.0.1:7101
  nodectl migrate list --at 127.0.0.1:7101 --json | jq '.migrations[] | select(.not_converging)'";

const PROGRESS_EXAMPLES: &str = "\
Examples:
  nodectl migrate progress m-42 --at 127.0.0.1:7101
  nodectl migrate progress m-42 --at 127.0.0.1:7102 --json | jq .freezes

Either node can be asked, while it runs and afterwards. It exits with 0 whatever the state.";

const WATCH_EXAMPLES: &str = "\
Examples:
  nodectl migrate watch m-42 --at 127.0.0.1:7101

It exits with 0 if the slots were handed over, with 1 if not, or if an operator has to decide.";

const COMPLETE_EXAMPLES: &str = "\
Examples:
  nodectl migrate complete m-42 --at 127.0.0.1:7101 --deadline 1m
  nodectl migrate complete m-42 --at 127.0.0.1:7101 && nodectl migrate watch m-42 --at 127.0.0.1:7101

Ask the node that owns the slots. It exits with 0 as soon as the wish is stored. If the hand-over does
not begin in time, the migration goes on following changes, and can be asked again.";

const CANCEL_EXAMPLES: &str = "\
Examples:
  nodectl migrate cancel m-42 --at 127.0.0.1:7101 --reason 'wrong node'

Ask the node that owns the slots; it goes on to serve them. The other node can be asked if that one is
gone. Once the hand-over is being committed it is too late: that is refused with exit code 1.";

const RESOLVE_EXAMPLES: &str = "\
Examples:
  See what would happen; nothing is done:
    nodectl migrate resolve m-42 --at 127.0.0.1:7101 --discard --reason 'disk of n2 is lost'

  Do it:
    nodectl migrate resolve m-42 --at 127.0.0.1:7101 --discard --reason 'disk of n2 is lost' --yes

Only for a migration whose other node is gone for good, so that the nodes cannot find out the outcome.
Deciding wrongly loses acknowledged writes. Without --yes, or both --attempt and --store-id, it says
what it would do, and exits with 2.";

/// Move slots between nodes while clients write.
#[derive(Debug, clap::Subcommand)]
#[command(subcommand_required = true, arg_required_else_help = true, after_help = EXAMPLES)]
pub(crate) enum Migrate {
    /// Start to move slots to another node, or join a migration that was started
    #[command(after_help = START_EXAMPLES)]
    Start(Box<Start>),
    /// List the migrations of a node, active ones first
    #[command(after_help = LIST_EXAMPLES)]
    List(List),
    /// Show all that a node knows of one migration, active or finished
    #[command(after_help = PROGRESS_EXAMPLES)]
    Progress(One),
    /// Follow one migration until it ends, through restarts of the node
    #[command(after_help = WATCH_EXAMPLES)]
    Watch(Watch),
    /// Hand the slots over as soon as the other node has caught up
    #[command(after_help = COMPLETE_EXAMPLES)]
    Complete(Complete),
    /// Stop a migration and undo it
    #[command(after_help = CANCEL_EXAMPLES)]
    Cancel(Cancel),
    /// Decide who owns the slots, where the other node is gone for good
    #[command(after_help = RESOLVE_EXAMPLES)]
    Resolve(Resolve),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Start {
    /// gRPC address of the node that owns the slots
    #[arg(long, value_name = "ADDR")]
    pub(crate) from: Address,

    /// The node that takes them over, and the address at which the first one reaches it
    #[arg(long, value_name = "NODE_ID=ADDR")]
    pub(crate) to: Target,

    /// The slots that move, first and last
    #[arg(long, value_name = "A-B")]
    pub(crate) slots: SlotRange,

    /// Name of the migration; the same name and options join it. Default: a new one, which is printed
    #[arg(long, value_name = "ID")]
    pub(crate) id: Option<MigrationId>,

    /// Do not hand over by itself: wait for `nodectl migrate complete`
    #[arg(long)]
    pub(crate) manual: bool,

    #[command(flatten)]
    pub(crate) limits: Limits,

    /// The shard that gives the slots up. Default: slots-A-B
    #[arg(long, value_name = "ID")]
    pub(crate) source_shard: Option<ShardId>,

    /// The shard that takes them over. Default: slots-A-B
    #[arg(long, value_name = "ID")]
    pub(crate) target_shard: Option<ShardId>,

    /// The node that must answer at --from; another one refuses. Default: whoever does
    #[arg(long, value_name = "ID")]
    pub(crate) source_node: Option<NodeId>,

    /// Who goes first when a node has more to do than it can
    #[arg(long, value_enum, default_value_t = Priority::Rebalance)]
    pub(crate) priority: Priority,

    /// Follow it until it ends
    #[arg(long)]
    pub(crate) wait: bool,

    #[command(flatten)]
    pub(crate) asking: Asking,
}

/// How much a migration may take.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct Limits {
    /// Most bytes per second, copy and changes together, such as 50MiB. Default: no limit
    #[arg(long, value_name = "SIZE")]
    pub(crate) rate: Option<Rate>,

    /// Longest time that writes wait at the hand-over before it is put off: 1ms to 1m. Default: 500ms
    #[arg(long, value_name = "TIME", value_parser = freeze)]
    pub(crate) freeze: Option<Duration>,
}

impl From<Limits> for proto::node::MigrationLimits {
    fn from(limits: Limits) -> Self {
        Self {
            max_bytes_per_second: limits.rate.map(|rate| rate.0.get()),
            freeze_timeout_ms: limits.freeze.map(proto::common::clock::millis),
            ..Self::default()
        }
    }
}

/// How long an answer may take, and how long a node may be away.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct Asking {
    /// Longest wait for an answer: 500ms, 10s, 1m
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = positive_time)]
    pub(crate) timeout: Duration,

    /// While following: go on trying this long when the node goes away: 30s, 5m, 2h, or forever
    #[arg(long, value_name = "TIME", default_value = "5m")]
    pub(crate) retry_for: Patience,
}

#[derive(Debug, clap::Args)]
pub(crate) struct List {
    #[command(flatten)]
    pub(crate) node: Node,

    /// Leave out those that have ended
    #[arg(long)]
    pub(crate) active: bool,

    /// Only those whose slots come in (in) or go out (out)
    #[arg(long, value_enum)]
    pub(crate) direction: Option<Direction>,
}

/// A migration at a node.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct One {
    /// The migration
    #[arg(value_name = "ID")]
    pub(crate) id: MigrationId,

    #[command(flatten)]
    pub(crate) node: Node,

    /// Which one, where a node has this ID in both directions. Default: the one that goes out
    #[arg(long, value_enum)]
    pub(crate) direction: Option<Direction>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Watch {
    #[command(flatten)]
    pub(crate) one: One,

    /// Go on trying this long when the node goes away: 30s, 5m, 2h, or forever
    #[arg(long, value_name = "TIME", default_value = "5m")]
    pub(crate) retry_for: Patience,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Complete {
    /// The migration
    #[arg(value_name = "ID")]
    pub(crate) id: MigrationId,

    #[command(flatten)]
    pub(crate) node: Node,

    /// How long the node goes on trying: 1ms to 1h
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = deadline)]
    pub(crate) deadline: Duration,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Cancel {
    #[command(flatten)]
    pub(crate) one: One,

    /// Why; kept in the node's history, at most 256 bytes of it
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) reason: String,
}

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("decision").required(true).args(["commit", "discard"]))]
pub(crate) struct Resolve {
    #[command(flatten)]
    pub(crate) one: One,

    /// The target owns the slots
    #[arg(long)]
    pub(crate) commit: bool,

    /// The source owns the slots
    #[arg(long)]
    pub(crate) discard: bool,

    /// Why; kept in the node's history; 1 to 256 bytes
    #[arg(long, value_name = "TEXT", value_parser = reason)]
    pub(crate) reason: String,

    /// The attempt that you saw: nothing happened since. Default, with --yes: what the node shows now
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) attempt: Option<u64>,

    /// The store of the other node that you vouch for, in hexadecimal. Default, with --yes: what the
    /// node shows now
    #[arg(long, value_name = "HEX")]
    pub(crate) store_id: Option<StoreId>,

    /// Do it, with the attempt and the store that the node shows now
    #[arg(long)]
    pub(crate) yes: bool,
}

/// A node, and where it is reached.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) node: NodeId,
    pub(crate) address: Address,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (node, address) = text.split_once('=').ok_or_else(|| {
            "write the node's ID and its gRPC address, such as n2=127.0.0.1:7102".to_owned()
        })?;
        Ok(Self { node: NodeId::new(node).map_err(|error| error.to_string())?, address: address.parse()? })
    }
}

/// 16 bytes that a node made with its data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoreId(pub(crate) Vec<u8>);

impl FromStr for StoreId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.as_bytes();
        let bytes: Option<Vec<u8>> = digits
            .chunks(2)
            .map(|pair| match pair {
                [high, low] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                    u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()
                }
                _ => None,
            })
            .collect();
        bytes
            .filter(|bytes| bytes.len() == 16)
            .map(Self)
            .ok_or_else(|| "write 32 hexadecimal digits, as `nodectl migrate progress` shows them".to_owned())
    }
}

fn between(text: &str, most: Duration, bounds: &str) -> Result<Duration, String> {
    let time = positive_time(text)?;
    if (Duration::from_millis(1)..=most).contains(&time) { Ok(time) } else { Err(bounds.to_owned()) }
}

fn freeze(text: &str) -> Result<Duration, String> {
    between(text, Duration::from_secs(60), "must be from 1ms to 1m")
}

fn deadline(text: &str) -> Result<Duration, String> {
    between(text, Duration::from_secs(3600), "must be from 1ms to 1h")
}

fn reason(text: &str) -> Result<String, String> {
    match text.len() {
        0 => Err("say why: it is kept in the node's history".to_owned()),
        1..=256 => Ok(text.to_owned()),
        length => Err(format!("is {length} bytes long; at most 256 are kept")),
    }
}

//! The command line of `nodectl drain`.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::address::Address;
use crate::args::{Priority, positive_time};
use crate::failure::Failure;
use crate::migrate::args::{Asking, Limits, Target};

pub(crate) const DRAIN_EXAMPLES: &str = "\
Examples:
  Move everything off a node, half of it to each of two others:
    nodectl drain 127.0.0.1:7101 --to n2=127.0.0.1:7102 --to n3=127.0.0.1:7103 --rate 50MiB

  See what would be moved, and where to:
    nodectl drain 127.0.0.1:7101 --to n2=127.0.0.1:7102 --dry-run

It exits with 0 only when the node itself says that it can be stopped without loss, and with 1 and the
reasons otherwise. It does not stop the node. Clients read and write all the time. Ctrl-C stops the
waiting and not the migrations; the same command again joins them and goes on.";

#[derive(Debug, clap::Args)]
pub(crate) struct Drain {
    /// gRPC address of the node to empty
    #[arg(value_name = "ADDR")]
    pub(crate) address: Address,

    /// A node that takes slots over, and the address at which the drained one reaches it; may be given
    /// more than once, each gets its share
    #[arg(long, value_name = "NODE_ID=ADDR", required = true)]
    pub(crate) to: Vec<Target>,

    /// Migrations at the same time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = parallel, allow_negative_numbers = true)]
    pub(crate) parallel: usize,

    #[command(flatten)]
    pub(crate) limits: Limits,

    /// Who goes first when a node has more to do than it can
    #[arg(long, value_enum, default_value_t = Priority::Rebalance)]
    pub(crate) priority: Priority,

    /// At the end: wait this long for the node to say that it is safe to stop
    #[arg(long, value_name = "TIME", default_value = "1m", value_parser = positive_time)]
    pub(crate) settle: Duration,

    /// Say what would be moved, and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,

    #[command(flatten)]
    pub(crate) asking: Asking,
}

fn parallel(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| (1..=64).contains(n)).ok_or_else(|| "must be from 1 to 64".to_owned())
}

/// Refuses what each option by itself could not.
pub(super) fn check(command: &Drain) -> Result<(), Failure> {
    let mut nodes = BTreeSet::new();
    match command.to.iter().find(|target| !nodes.insert(target.node.as_str())) {
        Some(twice) => {
            Err(Failure::usage(format!("'--to <NODE_ID=ADDR>': {} is given more than once", twice.node)))
        }
        None => Ok(()),
    }
}

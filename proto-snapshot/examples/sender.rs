//! The smallest node that sends a snapshot: a file or a directory, to one receiver.
//!
//! ```text
//! cargo run -p proto-snapshot --features client,channel --example sender -- PATH ADDR [--option value]...
//! ```
//!
//! When the receiver has installed it, it prints one line, `installed N bytes in M files`; what goes wrong for good ends it
//! with status 1. Options: `--transfer-id`, `--target-shard`, `--lanes`, `--give-up-ms`.

use std::path::PathBuf;
use std::time::Duration;

use proto_common::ids::{NodeId, ShardId, TransferId};
use proto_common::slots::SlotRange;
use proto_common::v1::Priority;
use proto_snapshot::sender::{SenderOptions, SnapshotSender, SnapshotToSend};
use proto_snapshot::source::{DirectorySource, FileSource};
use proto_snapshot::spec::SnapshotPoint;

type AnyError = Box<dyn std::error::Error>;

struct Arguments {
    path: PathBuf,
    address: String,
    snapshot: SnapshotToSend,
    options: SenderOptions,
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Arguments, AnyError> {
    let (Some(path), Some(address)) = (args.next(), args.next()) else {
        return Err("usage: sender PATH ADDR [--option value]...".into());
    };
    let mut snapshot = SnapshotToSend {
        transfer_id: TransferId::new("t1")?,
        source_shard: ShardId::new("s1")?,
        target_shard: ShardId::new("s2")?,
        source_node: NodeId::new("sender")?,
        target_node: None,
        slots: SlotRange::new(8192, 16384)?,
        point: SnapshotPoint { term: 1, index: 1 },
        fence: None,
        priority: Priority::Split,
    };
    let mut options = SenderOptions::default();
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--transfer-id" => snapshot.transfer_id = TransferId::new(&value)?,
            "--target-shard" => snapshot.target_shard = ShardId::new(&value)?,
            "--lanes" => options.lanes = value.parse()?,
            "--give-up-ms" => options.give_up_after = Some(Duration::from_millis(value.parse()?)),
            _ => return Err(format!("unknown option {name}").into()),
        }
    }
    Ok(Arguments { path: path.into(), address, snapshot, options })
}

#[tokio::main]
async fn main() -> Result<(), AnyError> {
    let Arguments { path, address, snapshot, options } = parse(std::env::args().skip(1))?;
    let sender = SnapshotSender::connect(&address)?.options(options);
    let mut transfer = if path.is_dir() {
        sender.send(snapshot, DirectorySource::new(path))?
    } else {
        sender.send(snapshot, FileSource::new(path))?
    };
    let installed = transfer.join().await?;
    println!("installed {} bytes in {} files", installed.total_bytes, installed.file_count);
    Ok(())
}

//! Reads every key back through the Redis port of the node that owns it.

use anyhow::{Context as _, bail};
use bytes::Bytes;
use redis_protocol::resp2::types::BytesFrame;

use super::client::{Client, text};
use super::load::Loaded;
use super::load_gen::{History, judge};
use crate::common::{SLOT_COUNT, slot_of};

/// Keys that are asked for before their values are read.
const BATCH: usize = 1000;
/// Differences that are told in full.
const SHOWN: usize = 10;

/// What was found.
#[derive(Debug, Default)]
pub struct Verified {
    /// Keys that were read and are as they should be.
    pub keys: u64,
    /// Keys with an expiry that are gone.
    pub expired: u64,
    /// Keys that are not as they should be, those of lost writes included.
    pub wrong: u64,
    /// Keys whose last acknowledged write is missing.
    pub lost: u64,
    /// The first of them, in words.
    pub differences: Vec<String>,
}

impl Verified {
    fn differs(&mut self, what: String) {
        self.wrong += 1;
        if self.differences.len() < SHOWN {
            self.differences.push(what);
        }
    }
}

/// Which node has which slot, as all nodes say. They must agree.
///
/// # Errors
///
/// They do not, or a slot has no owner.
pub async fn owners(nodes: &[String]) -> anyhow::Result<Vec<String>> {
    let mut agreed: Option<Vec<String>> = None;
    for node in nodes {
        let reply = Client::connect(node).await?.call(&["CLUSTER", "SLOTS"]).await?;
        let owners =
            slots(&reply).with_context(|| format!("CLUSTER SLOTS of {node} cannot be understood"))?;
        match &agreed {
            Some(agreed) => {
                if let Some((slot, (one, other))) =
                    agreed.iter().zip(&owners).enumerate().find(|(_, (one, other))| one != other)
                {
                    let who =
                        |owner: &str| if owner.is_empty() { "nobody".to_owned() } else { owner.to_owned() };
                    bail!(
                        "the nodes do not agree who owns slot {slot}: {} by another node, {} by {node}",
                        who(one),
                        who(other)
                    );
                }
            }
            None => agreed = Some(owners),
        }
    }
    let owners = agreed.context("there are no nodes")?;
    match owners.iter().position(String::is_empty) {
        Some(slot) => bail!("slot {slot} has no owner"),
        None => Ok(owners),
    }
}

fn slots(reply: &BytesFrame) -> Option<Vec<String>> {
    let BytesFrame::Array(ranges) = reply else { return None };
    let mut owners = vec![String::new(); usize::from(SLOT_COUNT)];
    for range in ranges {
        let BytesFrame::Array(range) = range else { return None };
        let [BytesFrame::Integer(start), BytesFrame::Integer(end), BytesFrame::Array(node), ..] =
            range.as_slice()
        else {
            return None;
        };
        let [host, BytesFrame::Integer(port), ..] = node.as_slice() else { return None };
        let owner = format!("{}:{port}", text(host)?);
        let (start, end) = (usize::try_from(*start).ok()?, usize::try_from(*end).ok()?);
        owners.get_mut(start..=end)?.fill(owner);
    }
    Some(owners)
}

/// Compares all keys. `progress` is told how many were read.
///
/// # Errors
///
/// A node cannot be read.
pub async fn verify(
    loaded: &Loaded,
    histories: &[History],
    owners: &[String],
    progress: impl Fn(u64),
) -> anyhow::Result<Verified> {
    let mut nodes: Vec<&String> = owners.iter().collect();
    nodes.sort();
    nodes.dedup();
    let mut verified = Verified::default();
    for node in nodes {
        let mut client = Client::connect(node).await?;
        let mine = |key: &Bytes| owners.get(usize::from(slot_of(key))) == Some(node);

        let keys: Vec<_> = loaded.keys.iter().filter(|(key, _)| mine(key)).collect();
        for batch in keys.chunks(BATCH) {
            let values = get(&mut client, batch.iter().map(|(key, _)| *key)).await?;
            for ((key, expected), value) in batch.iter().zip(values) {
                match value {
                    Ok(Some(value)) if expected.is(&value) => verified.keys += 1,
                    Ok(None) if expected.expires => verified.expired += 1,
                    other => verified.differs(difference(key, node, expected.len, &other)),
                }
            }
            progress(verified.keys);
        }

        let written: Vec<_> = histories.iter().filter(|history| mine(&history.key)).collect();
        for batch in written.chunks(BATCH) {
            let values = get(&mut client, batch.iter().map(|history| &history.key)).await?;
            for (history, value) in batch.iter().zip(values) {
                let wrong = match value {
                    Ok(value) => judge(history, value.as_deref()),
                    Err(error) => Some(format!("{}: {error}", String::from_utf8_lossy(&history.key))),
                };
                match wrong {
                    None => verified.keys += 1,
                    Some(wrong) => {
                        verified.lost += 1;
                        verified.differs(format!("acknowledged write lost at {node}: {wrong}"));
                    }
                }
            }
        }
    }
    Ok(verified)
}

fn difference(key: &[u8], node: &str, len: usize, found: &Result<Option<Bytes>, String>) -> String {
    let key = String::from_utf8_lossy(&key[..key.len().min(80)]);
    match found {
        Ok(Some(value)) => {
            format!("{key} at {node}: {} bytes that are not the {len} that were written", value.len())
        }
        Ok(None) => format!("{key} at {node}: missing"),
        Err(error) => format!("{key} at {node}: {error}"),
    }
}

async fn get(
    client: &mut Client,
    keys: impl Iterator<Item = &Bytes> + Clone,
) -> anyhow::Result<Vec<Result<Option<Bytes>, String>>> {
    for key in keys.clone() {
        client.push(&[b"GET".as_slice(), key])?;
    }
    client.send().await?;
    let mut values = Vec::new();
    for _ in keys {
        values.push(match client.reply().await? {
            BytesFrame::BulkString(value) => Ok(Some(value)),
            BytesFrame::Null => Ok(None),
            other => Err(text(&other).unwrap_or("no value").to_owned()),
        });
    }
    Ok(values)
}

//! Clients that write while the slots move, and the check that nothing which was acknowledged to them is missing.
//!
//! Each key has one writer, which counts up. A value that is read later must be at least the last one that was acknowledged, and at
//! most the last one that was tried.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use redis_protocol::resp2::types::BytesFrame;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::client::{Client, text};
use super::latency::{Latencies, Period};
use crate::common::{SlotRange, slot_of};

/// Writers at the same time.
const WRITERS: usize = 8;
/// Keys of each, half of them in the slots that move.
const KEYS: usize = 32;
/// Pause before a refused or broken write is tried again.
const PAUSE: Duration = Duration::from_millis(20);

/// One key's history.
#[derive(Debug, Clone)]
pub struct History {
    /// The key.
    pub key: Bytes,
    /// The last value that was acknowledged; 0 is none.
    pub acknowledged: u64,
    /// The last value that was sent.
    pub tried: u64,
}

/// What the writers did.
#[derive(Debug, Default)]
pub struct Written {
    /// Of all keys.
    pub histories: Vec<History>,
    /// Acknowledged writes.
    pub acknowledged: u64,
    /// Times from a first try to the acknowledgement, for keys that stay.
    pub staying: Latencies,
    /// The same for keys that move.
    pub moving: Latencies,
    /// Writes that were answered with MOVED.
    pub moved: u64,
    /// Writes of which the outcome is not known, since the connection broke.
    pub unknown: u64,
}

/// Writers that run.
#[derive(Debug)]
pub struct LoadGenerator {
    stop: CancellationToken,
    period: watch::Sender<Period>,
    writers: JoinSet<anyhow::Result<Written>>,
}

impl LoadGenerator {
    /// Starts to write to the node at `address`, to keys of all slots that begin with `prefix`.
    #[must_use]
    pub fn start(address: &str, prefix: &str, moving: SlotRange) -> Self {
        Self::within(SlotRange::FULL, address, prefix, moving)
    }

    /// The same, to keys whose slots are in `slots`.
    #[must_use]
    pub fn within(slots: SlotRange, address: &str, prefix: &str, moving: SlotRange) -> Self {
        let stop = CancellationToken::new();
        let period = watch::Sender::new(Period::default());
        let mut writers = JoinSet::new();
        for writer in 0..WRITERS {
            let keys = keys(prefix, writer, slots, moving);
            let writer = Writer { stop: stop.clone(), period: period.subscribe() };
            writers.spawn(write(address.to_owned(), keys, moving, writer));
        }
        Self { stop, period, writers }
    }

    /// Writes that begin from now on belong to `period`.
    pub fn enter(&self, period: Period) {
        self.period.send_replace(period);
    }

    /// Lets every writer end its present write, and returns what all have done.
    ///
    /// # Errors
    ///
    /// A writer was answered with what it did not expect.
    pub async fn finish(mut self) -> anyhow::Result<Written> {
        self.stop.cancel();
        let mut all = Written::default();
        while let Some(written) = self.writers.join_next().await {
            let written = written.context("a writer panicked")??;
            all.histories.extend(written.histories);
            all.acknowledged += written.acknowledged;
            all.staying.add(&written.staying)?;
            all.moving.add(&written.moving)?;
            all.moved += written.moved;
            all.unknown += written.unknown;
        }
        Ok(all)
    }
}

/// Keys of one writer with slots in `slots`, as many that move as that stay.
fn keys(prefix: &str, writer: usize, slots: SlotRange, moving: SlotRange) -> Vec<History> {
    let of = |moves: bool| {
        // Of the two one may be impossible to reach: all slots move.
        let possible = slots.iter().any(|slot| moving.contains(slot) == moves);
        (0u64..)
            .map(|n| Bytes::from(format!("{prefix}{writer}:{n}")))
            .filter(move |key| slots.contains(slot_of(key)) && moving.contains(slot_of(key)) == moves)
            .take(if possible { KEYS / 2 } else { 0 })
            .map(|key| History { key, acknowledged: 0, tried: 0 })
    };
    of(true).chain(of(false)).collect()
}

/// What a writer is told.
#[derive(Debug, Clone)]
struct Writer {
    stop: CancellationToken,
    period: watch::Receiver<Period>,
}

async fn write(
    first: String,
    mut histories: Vec<History>,
    moving: SlotRange,
    writer: Writer,
) -> anyhow::Result<Written> {
    // Two connections, so that a held write does not stop the writes of the keys that stay: in turn they would.
    let (moves, stays): (Vec<_>, Vec<_>) =
        histories.drain(..).partition(|history| moving.contains(slot_of(&history.key)));
    let (moves, stays) =
        tokio::join!(write_keys(first.clone(), moves, writer.clone()), write_keys(first, stays, writer));
    let (moves, stays) = (moves?, stays?);
    Ok(Written {
        acknowledged: moves.acknowledged + stays.acknowledged,
        moved: moves.moved + stays.moved,
        unknown: moves.unknown + stays.unknown,
        moving: moves.latencies,
        staying: stays.latencies,
        histories: moves.histories.into_iter().chain(stays.histories).collect(),
    })
}

#[derive(Default)]
struct Part {
    histories: Vec<History>,
    acknowledged: u64,
    latencies: Latencies,
    moved: u64,
    unknown: u64,
}

async fn write_keys(mut address: String, histories: Vec<History>, writer: Writer) -> anyhow::Result<Part> {
    let mut part = Part { histories, ..Part::default() };
    let mut connection: Option<Client> = None;
    for turn in 0.. {
        let count = part.histories.len();
        let Some(history) = part.histories.get_mut(turn % count.max(1)) else { break };
        if writer.stop.is_cancelled() {
            break;
        }
        history.tried += 1;
        let value = history.tried.to_string();
        let period = *writer.period.borrow();
        let since = Instant::now();
        loop {
            let answered = async {
                let client = match connection.take() {
                    Some(client) => connection.insert(client),
                    None => connection.insert(Client::connect(&address).await?),
                };
                client.call(&[b"SET".as_slice(), &history.key, value.as_bytes()]).await
            };
            match answered.await {
                Ok(BytesFrame::SimpleString(_)) => {
                    history.acknowledged = history.tried;
                    part.acknowledged += 1;
                    part.latencies.record(period, since.elapsed())?;
                    break;
                }
                Ok(frame) => {
                    let error = text(&frame).unwrap_or("no text").to_owned();
                    if let Some(moved) = error.strip_prefix("MOVED ") {
                        part.moved += 1;
                        address =
                            moved.split_whitespace().nth(1).context("MOVED without an address")?.to_owned();
                        connection = None;
                    } else if error.starts_with("TRYAGAIN") || error.starts_with("CLUSTERDOWN") {
                        tokio::time::sleep(PAUSE).await;
                    } else {
                        bail!("a write was answered with {error:?}");
                    }
                }
                Err(_) => {
                    // Done or not: a later value will tell.
                    connection = None;
                    part.unknown += 1;
                    tokio::time::sleep(PAUSE).await;
                    break;
                }
            }
        }
    }
    Ok(part)
}

/// What is wrong with the value that was read for a key, if anything.
#[must_use]
pub fn judge(history: &History, value: Option<&[u8]>) -> Option<String> {
    let key = String::from_utf8_lossy(&history.key);
    let History { acknowledged, tried, .. } = history;
    match value {
        None if *acknowledged == 0 => None,
        None => Some(format!("{key} is missing, {acknowledged} was acknowledged")),
        Some(value) => {
            let number = std::str::from_utf8(value).ok().and_then(|text| text.parse::<u64>().ok());
            match number {
                Some(number) if (*acknowledged..=*tried).contains(&number) => None,
                _ => Some(format!(
                    "{key} is {:?}, {acknowledged} was acknowledged and {tried} was tried last",
                    String::from_utf8_lossy(&value[..value.len().min(40)])
                )),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_write_is_found() {
        let history = History { key: Bytes::from_static(b"k"), acknowledged: 5, tried: 7 };
        for (value, fine) in [
            (Some("5"), true),
            (Some("6"), true),
            (Some("7"), true),
            (Some("4"), false),
            (Some("8"), false),
            (Some("x"), false),
            (None, false),
        ] {
            assert_eq!(judge(&history, value.map(str::as_bytes)).is_none(), fine, "{value:?}");
        }
        let never = History { acknowledged: 0, tried: 1, ..history };
        assert_eq!(judge(&never, None), None);
    }

    #[test]
    fn half_of_the_keys_move() {
        let range = |text: &str| text.parse::<SlotRange>().unwrap();
        let moves = |keys: &[History], moving: SlotRange| {
            keys.iter().filter(|history| moving.contains(slot_of(&history.key))).count()
        };
        let moving = range("8192-16383");
        let all = keys("p:", 3, SlotRange::FULL, moving);
        assert_eq!((all.len(), moves(&all, moving)), (KEYS, KEYS / 2));

        let slots = range("8192-16383");
        let moving = range("12288-16383");
        let some = keys("p:", 3, slots, moving);
        assert_eq!((some.len(), moves(&some, moving)), (KEYS, KEYS / 2));
        assert!(some.iter().all(|history| slots.contains(slot_of(&history.key))));

        let none_stay = keys("p:", 3, slots, SlotRange::FULL);
        assert_eq!((none_stay.len(), moves(&none_stay, slots)), (KEYS / 2, KEYS / 2));
    }
}

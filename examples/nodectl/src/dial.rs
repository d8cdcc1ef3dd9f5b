//! Connections to a node that may be away: waits for it, and says so.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use proto::common::connect::Connect;
use proto::common::dial::{Dial, NodeChannel};
use proto::common::error::Error;
use proto::common::ids::TransferId;
use proto::common::retry::Backoff;
use proto::node::{Direction, TransferPhase};
use proto::snapshot::transfers::Transfers;

use crate::args::Patience;

/// Why nothing happens at the moment.
#[derive(Debug, Clone)]
pub(crate) struct Wait {
    /// What went wrong last.
    pub(crate) error: Error,
    /// Time until the next try, where it is known.
    pub(crate) next_try: Option<Duration>,
}

/// Pauses between tries to connect: soon enough that a node which is restarted is not kept waiting.
pub(crate) fn pauses() -> Backoff {
    Backoff {
        initial: Duration::from_millis(250),
        max: Duration::from_secs(5),
        // One person's tool meets few others: most of the wait is fixed, so that what is shown is true.
        jitter: 0.2,
        ..Backoff::default()
    }
}

/// Connects for the sender of one transfer. While that transfer cannot go on at all, it goes on trying by itself, because
/// only so it knows when the next try is; lanes of a transfer that runs get their error at once.
#[derive(Debug)]
pub(crate) struct Dialer {
    dial: Dial,
    patience: Patience,
    transfers: Transfers,
    id: TransferId,
    wait: Mutex<Option<(Error, Instant)>>,
}

impl Dialer {
    /// Connects by `dial` for the transfer `id`, which `transfers` shows.
    pub(crate) fn new(dial: Dial, patience: Patience, transfers: Transfers, id: TransferId) -> Self {
        Self { dial, patience, transfers, id, wait: Mutex::new(None) }
    }

    /// What it waits for, if it does.
    pub(crate) fn wait(&self) -> Option<Wait> {
        let wait = self.wait.lock().unwrap_or_else(PoisonError::into_inner);
        wait.as_ref().map(|(error, until)| Wait {
            error: error.clone(),
            next_try: Some(until.saturating_duration_since(Instant::now())),
        })
    }

    fn set(&self, wait: Option<(Error, Instant)>) {
        *self.wait.lock().unwrap_or_else(PoisonError::into_inner) = wait;
    }

    fn stands_still(&self) -> bool {
        let shown = self.transfers.registry().get(Some(Direction::Out), self.id.as_str());
        shown.is_none_or(|transfer| transfer.phase() == TransferPhase::Pending)
    }
}

impl Connect for Dialer {
    type Channel = NodeChannel;

    async fn connect(&self) -> Result<NodeChannel, Error> {
        let since = Instant::now();
        let mut backoff = pauses().start();
        loop {
            let error = match Connect::connect(&self.dial).await {
                Ok(channel) => {
                    self.set(None);
                    return Ok(channel);
                }
                Err(error) => error,
            };
            if !self.stands_still() {
                return Err(error);
            }
            let Some(pause) = backoff.next(&error) else { return Err(error) };
            let left = self.patience.0.map(|patience| patience.saturating_sub(since.elapsed()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(error);
            }
            let pause = left.map_or(pause, |left| pause.min(left));
            self.set(Some((error, Instant::now() + pause)));
            tokio::time::sleep(pause).await;
        }
    }
}

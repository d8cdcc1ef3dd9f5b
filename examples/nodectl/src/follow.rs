//! Something that a node tells of again and again, followed to its end and through restarts of the node.

use std::time::Instant;

use proto::common::error::{CommonReason, Error};
use tonic::Streaming;

use crate::args::Patience;
use crate::dial::{Wait, pauses};

/// Where a followed task stands.
pub(crate) trait Follow: Default {
    /// What the node sends.
    type Message;

    /// The state in a message.
    fn unpack(message: Self::Message) -> Self;

    /// There is nothing more to wait for.
    fn has_ended(&self) -> bool;
}

/// Calls `show` with each state, and with the reason while the node is away, until the task has ended; returns its last
/// state, or none if `show` says that nobody looks any more.
pub(crate) async fn follow<T: Follow>(
    patience: Patience,
    open: impl AsyncFn() -> Result<Streaming<T::Message>, Error>,
    mut show: impl FnMut(&T, Option<&Wait>) -> bool,
) -> Result<Option<T>, Error> {
    let mut stream = open().await?;
    let mut backoff = pauses().start();
    let mut seen = T::default();
    let mut moved = Instant::now();
    loop {
        let mut error = match stream.message().await.map_err(Error::from) {
            Ok(Some(message)) => {
                seen = T::unpack(message);
                moved = Instant::now();
                backoff.reset();
                if !show(&seen, None) {
                    return Ok(None);
                }
                if seen.has_ended() {
                    return Ok(Some(seen));
                }
                continue;
            }
            Ok(None) => Error::new(CommonReason::Unavailable, "the node ended the watch"),
            Err(error) => error,
        };
        stream = loop {
            let Some(pause) = backoff.next(&error) else { return Err(error) };
            if patience.0.is_some_and(|patience| moved.elapsed() + pause > patience) {
                return Err(error);
            }
            if !show(&seen, Some(&Wait { error, next_try: Some(pause) })) {
                return Ok(None);
            }
            tokio::time::sleep(pause).await;
            match open().await {
                Ok(stream) => break stream,
                Err(again) => error = again,
            }
        };
    }
}

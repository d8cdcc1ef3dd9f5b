//! `nodectl progress`, once or until the transfer ends.

use std::time::Instant;

use proto::common::error::{CommonReason, Error};
use proto::node::{
    GetTransferProgressRequest, TransferPhase, TransferProgress, WatchTransferProgressRequest,
};
use tonic::Streaming;

use crate::advice;
use crate::args::{Progress, wire_direction};
use crate::call;
use crate::dial::{Wait, pauses};
use crate::document::{TransferDocument, phase_word};
use crate::failure::Failure;
use crate::human;
use crate::live::Live;
use crate::output::Output;
use crate::table;

pub(crate) async fn run(command: Progress, output: &mut Output) -> Result<(), Failure> {
    let explained = |error: Error| {
        let help = advice::about(&error, &command.node.at.to_string());
        Failure::from(error).about(command.transfer_id.as_str()).help(help)
    };
    if command.watch {
        let last = watch(&command, output).await.map_err(explained)?;
        return last.map_or(Ok(()), |last| outcome(&last, output));
    }
    let request = GetTransferProgressRequest {
        transfer_id: command.transfer_id.to_string(),
        direction: wire_direction(command.direction),
    };
    let asked = call::ask(&command.node.at, command.node.timeout, async |mut client| {
        Ok(client.get_transfer_progress(request).await?.into_inner().transfer)
    });
    let transfer = asked.await.map_err(explained)?.unwrap_or_default();
    if output.json() {
        output.document(&TransferDocument::from(&transfer));
    } else {
        output.text(&table::facts(&transfer));
    }
    Ok(())
}

/// Follows the transfer to its end, through restarts of the node; returns its last state, or none if nobody reads on.
async fn watch(command: &Progress, output: &mut Output) -> Result<Option<TransferProgress>, Error> {
    let mut live = Live::new(output, &command.node.at);
    let mut stream = open(command).await?;
    let mut backoff = pauses().start();
    let mut seen = TransferProgress::default();
    let mut moved = Instant::now();
    loop {
        let error = match stream.message().await.map_err(Error::from) {
            Ok(Some(message)) => {
                seen = message.transfer.unwrap_or_default();
                moved = Instant::now();
                backoff.reset();
                live.show(output, &seen, None);
                if output.is_broken() {
                    return Ok(None);
                }
                continue;
            }
            Ok(None) if seen.is_finished() => return Ok(Some(seen)),
            Ok(None) => Error::new(CommonReason::Unavailable, "the node ended the watch"),
            Err(error) => error,
        };
        stream = reopen(command, output, &mut live, &seen, error, &mut backoff, moved).await?;
    }
}

async fn open(command: &Progress) -> Result<Streaming<proto::node::WatchTransferProgressResponse>, Error> {
    let request = WatchTransferProgressRequest {
        transfer_id: command.transfer_id.to_string(),
        direction: wire_direction(command.direction),
    };
    call::ask(&command.node.at, command.node.timeout, async |mut client| {
        Ok(client.watch_transfer_progress(request).await?.into_inner())
    })
    .await
}

/// Waits for the node, and says so.
async fn reopen(
    command: &Progress,
    output: &mut Output,
    live: &mut Live,
    seen: &TransferProgress,
    mut error: Error,
    backoff: &mut proto::common::retry::BackoffState,
    moved: Instant,
) -> Result<Streaming<proto::node::WatchTransferProgressResponse>, Error> {
    loop {
        let Some(pause) = backoff.next(&error) else { return Err(error) };
        if command.retry_for.0.is_some_and(|patience| moved.elapsed() + pause > patience) {
            return Err(error);
        }
        live.show(output, seen, Some(&Wait { error, next_try: Some(pause) }));
        tokio::time::sleep(pause).await;
        match open(command).await {
            Ok(stream) => return Ok(stream),
            Err(again) => error = again,
        }
    }
}

/// Whether a transfer that has ended did what it was meant to.
fn outcome(last: &TransferProgress, output: &mut Output) -> Result<(), Failure> {
    let progress = last.progress.clone().unwrap_or_default();
    if last.phase() == TransferPhase::Installed {
        if output.terminal() {
            output.line(&human::line(last));
        }
        return Ok(());
    }
    let error = progress.error.map_or_else(
        || Error::with_code(proto::common::error::Code::Aborted, "TRANSFER_ENDED", "it gave no reason"),
        Error::from,
    );
    let message =
        format!("{} is {}: {}", human::safe(&last.transfer_id), phase_word(last.phase), error.message());
    let mut told = Error::with_code(error.code(), error.reason().to_owned(), message);
    for (name, value) in error.metadata_map() {
        told = told.metadata(name, value);
    }
    Err(Failure::from(told).about(last.transfer_id.as_str()))
}

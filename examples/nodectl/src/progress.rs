//! `nodectl progress`, once or until the transfer ends.

use proto::common::error::Error;
use proto::node::{
    GetTransferProgressRequest, TransferPhase, TransferProgress, WatchTransferProgressRequest,
    WatchTransferProgressResponse,
};
use tonic::Streaming;

use crate::advice;
use crate::args::{Progress, wire_direction};
use crate::call::{self, headed};
use crate::document::{TransferDocument, phase_word};
use crate::failure::Failure;
use crate::follow::{Follow, follow};
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
    follow(
        command.retry_for,
        async || open(command).await,
        |seen, wait| {
            live.show(output, seen, wait);
            !output.is_broken()
        },
    )
    .await
}

impl Follow for TransferProgress {
    type Message = WatchTransferProgressResponse;

    fn unpack(message: Self::Message) -> Self {
        message.transfer.unwrap_or_default()
    }

    fn has_ended(&self) -> bool {
        self.is_finished()
    }
}

async fn open(command: &Progress) -> Result<Streaming<WatchTransferProgressResponse>, Error> {
    let request = WatchTransferProgressRequest {
        transfer_id: command.transfer_id.to_string(),
        direction: wire_direction(command.direction),
    };
    call::ask(&command.node.at, command.node.timeout, async |mut client| {
        Ok(client.watch_transfer_progress(request).await?.into_inner())
    })
    .await
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
    let what = format!("{} is {}", human::safe(&last.transfer_id), phase_word(last.phase));
    Err(Failure::from(headed(&error, &what)).about(last.transfer_id.as_str()))
}

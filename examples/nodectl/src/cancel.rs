//! `nodectl cancel`.

use proto::node::{CancelTransferRequest, TransferPhase};

use crate::advice;
use crate::args::{Cancel, wire_direction};
use crate::call;
use crate::document::{TransferDocument, phase_word};
use crate::failure::Failure;
use crate::human;
use crate::output::Output;

pub(crate) async fn run(command: Cancel, output: &mut Output) -> Result<(), Failure> {
    let Cancel { transfer_id, node, reason, direction } = command;
    let request = CancelTransferRequest {
        transfer_id: transfer_id.to_string(),
        direction: wire_direction(direction),
        reason,
    };
    let asked = call::ask(&node.at, node.timeout, async |mut client| {
        Ok(client.cancel_transfer(request).await?.into_inner().transfer)
    });
    let transfer = asked.await.map_err(|error| {
        let help = advice::about(&error, &node.at.to_string());
        Failure::from(error).about(transfer_id.as_str()).help(help)
    })?;
    let transfer = transfer.unwrap_or_default();
    if output.json() {
        output.document(&TransferDocument::from(&transfer));
    } else if transfer.phase() == TransferPhase::Cancelled {
        let held = transfer.progress.as_ref().map_or(0, |progress| progress.bytes_done);
        output.line(&format!("{transfer_id} is cancelled; {} of it were deleted", human::bytes(held)));
    } else {
        output.line(&format!("{transfer_id} had ended before: {}", phase_word(transfer.phase)));
    }
    Ok(())
}

//! `nodectl transfers`.

use proto::node::{ListTransfersRequest, TransferProgress};

use crate::advice;
use crate::args::{Transfers, wire_direction};
use crate::call;
use crate::document::ListDocument;
use crate::failure::Failure;
use crate::output::Output;
use crate::table;

/// Transfers per page: below the largest message, however long their errors are.
const PAGE: u32 = 100;

pub(crate) async fn run(command: Transfers, output: &mut Output) -> Result<(), Failure> {
    let Transfers { node, active, direction } = command;
    let asked = call::ask(&node.at, node.timeout, async |mut client| {
        let mut transfers: Vec<TransferProgress> = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = ListTransfersRequest {
                page_size: PAGE,
                page_token,
                direction: wire_direction(direction),
                active_only: active,
            };
            let page = client.list_transfers(request).await?.into_inner();
            // A node that goes on for ever runs into the time limit, one that repeats itself ends here.
            let empty = page.transfers.is_empty();
            transfers.extend(page.transfers);
            page_token = page.next_page_token;
            if page_token.is_empty() || empty {
                return Ok(transfers);
            }
        }
    });
    let transfers = asked.await.map_err(|error| {
        let help = advice::about(&error, &node.at.to_string());
        Failure::from(error).help(help)
    })?;
    if output.json() {
        output.document(&ListDocument { transfers: transfers.iter().map(Into::into).collect() });
    } else if !output.terminal() {
        output.text(&table::lines(&transfers));
    } else if transfers.is_empty() {
        output.line(&format!("{} has no {}transfers", node.at, if active { "active " } else { "" }));
    } else {
        let (_, width) = console::Term::stdout().size();
        output.text(&table::table(&transfers, width));
    }
    Ok(())
}

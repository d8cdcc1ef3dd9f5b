//! `nodectl transfers`.

use proto::node::ListTransfersRequest;
use proto::snapshot::limits::{LIST_PAGE, SMALL_LIST_PAGE};

use crate::advice;
use crate::args::{Transfers, wire_direction};
use crate::call;
use crate::document::ListDocument;
use crate::failure::Failure;
use crate::output::Output;
use crate::table;

pub(crate) async fn run(command: Transfers, output: &mut Output) -> Result<(), Failure> {
    let Transfers { node, active, direction } = command;
    let asked = call::ask(&node.at, node.timeout, async |mut client| {
        call::all_pages("transfers", [LIST_PAGE, SMALL_LIST_PAGE], async |page_size, page_token| {
            let direction = wire_direction(direction);
            let request = ListTransfersRequest { page_size, page_token, direction, active_only: active };
            let page = client.list_transfers(request).await?.into_inner();
            Ok((page.transfers, page.next_page_token))
        })
        .await
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

//! `nodectl status`, once or again and again.

use proto::common::error::Error;
use proto::health::limits::MAX_ANSWER_BYTES;
use proto::node::health_service_client::HealthServiceClient;
use proto::node::{GetNodeStatusRequest, GetNodeStatusResponse};

use crate::address::Address;
use crate::args::Status;
use crate::bounds::Told;
use crate::call;
use crate::failure::Failure;
use crate::node_document::{NodeStatusDocument, StatusListDocument};
use crate::node_table;
use crate::nodes::{Answered, ask_all};
use crate::output::Output;

/// Pages that are read of one node; a node that goes on for ever is cut there. A map of 16384 single slots takes 17.
const PAGES: usize = 100;

pub(crate) async fn run(command: Status, output: &mut Output) -> Result<(), Failure> {
    let Status { nodes, watch, interval } = command;
    let screen = (watch && output.terminal()).then(console::Term::stdout);
    if let Some(screen) = &screen {
        let _ = screen.clear_screen();
    }
    loop {
        let answers = ask_all(&nodes, |address| ask(address, nodes.timeout)).await;
        if let Some(screen) = &screen {
            // What stood there is overwritten, not erased first: nothing flickers.
            let _ = screen.move_cursor_to(0, 0);
            let (_, width) = screen.size();
            for line in node_table::status(&answers, width).lines() {
                let _ = screen.clear_line();
                output.line(line);
            }
            let _ = screen.clear_to_end_of_screen();
        } else {
            show(&answers, output);
        }
        if !watch || output.is_broken() {
            return Ok(());
        }
        tokio::time::sleep(interval).await;
    }
}

/// The whole status of one node, all pages in one.
pub(crate) async fn ask(
    address: Address,
    timeout: std::time::Duration,
) -> Result<GetNodeStatusResponse, Error> {
    call::ask_over(&address, timeout, async |channel| {
        let mut client = HealthServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
        let mut whole: Option<GetNodeStatusResponse> = None;
        let mut page_token = String::new();
        let mut told = Told::default();
        for _ in 0..PAGES {
            let request = GetNodeStatusRequest { page_token, ..Default::default() };
            let mut page = client.get_node_status(request).await?.into_inner();
            page_token = std::mem::take(&mut page.next_page_token);
            page.status.as_mut().map_or(Ok(()), |status| told.add(status))?;
            match whole.as_mut().and_then(|whole| whole.status.as_mut()) {
                Some(status) => {
                    let more = page.status.unwrap_or_default();
                    status.shards.extend(more.shards);
                    status.slot_owners.extend(more.slot_owners);
                    status.transfers.extend(more.transfers);
                    status.migrations.extend(more.migrations);
                    status.peers.extend(more.peers);
                }
                None => whole = Some(page),
            }
            if page_token.is_empty() {
                break;
            }
        }
        Ok(whole.unwrap_or_default())
    })
    .await
}

fn show(answers: &[Answered<GetNodeStatusResponse>], output: &mut Output) {
    if output.json() {
        output
            .document(&StatusListDocument { nodes: answers.iter().map(NodeStatusDocument::from).collect() });
    } else if output.terminal() {
        let (_, width) = console::Term::stdout().size();
        output.text(&node_table::status(answers, width));
    } else {
        output.text(&node_table::status_lines(answers));
    }
}

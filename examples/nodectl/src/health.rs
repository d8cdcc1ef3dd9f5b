//! `nodectl health`.

use proto::common::error::{Code, Error};
use proto::health::Reason;
use proto::health::limits::MAX_ANSWER_BYTES;
use proto::node::health_service_client::HealthServiceClient;
use proto::node::{HealthCheckRequest, HealthCheckResponse, HealthStatus};

use crate::args::Health;
use crate::bounds;
use crate::call;
use crate::failure::Failure;
use crate::node_document::{HealthListDocument, NodeHealthDocument};
use crate::node_table;
use crate::nodes::{Answered, ask_all};
use crate::output::Output;

pub(crate) async fn run(command: Health, output: &mut Output) -> Result<(), Failure> {
    let Health { nodes, service } = command;
    let answers = ask_all(&nodes, |address| {
        let request = HealthCheckRequest { service: service.clone(), ..Default::default() };
        async move {
            call::ask_over(&address, nodes.timeout, async |channel| {
                let mut client =
                    HealthServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
                let mut answer = client.health_check(request).await?.into_inner();
                answer.health.as_mut().map_or(Ok(()), bounds::report)?;
                Ok(answer)
            })
            .await
        }
    })
    .await;
    // The same for every node, and no state of health: it is the question that is wrong.
    if let Some(error) =
        answers.iter().find_map(|one| one.answer.as_ref().err().filter(|error| is_wrong(error)))
    {
        let help = "name liveness, readiness, startup, or one of the components that `nodectl health ADDR --json` lists";
        return Err(Failure::from(error.clone()).help(Some(help.to_owned())));
    }
    let sick = answers.iter().filter(|one| !is_healthy(one)).count();
    if output.json() {
        output.document(&HealthListDocument {
            healthy: sick == 0,
            nodes: answers.iter().map(NodeHealthDocument::from).collect(),
        });
    } else if output.terminal() {
        let (_, width) = console::Term::stdout().size();
        output.text(&node_table::health(&answers, width));
    } else {
        output.text(&node_table::health_lines(&answers));
    }
    match sick {
        0 => Ok(()),
        sick => Err(Failure::verdict(format!("{sick} of {} nodes not healthy", answers.len()))),
    }
}

fn is_wrong(error: &Error) -> bool {
    error.is(Reason::UnknownService) || error.code() == Code::InvalidArgument
}

fn is_healthy(one: &Answered<HealthCheckResponse>) -> bool {
    let health = one.answer.as_ref().ok().and_then(|answer| answer.health.as_ref());
    health.is_some_and(|health| health.status() == HealthStatus::Healthy)
}

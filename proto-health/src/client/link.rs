//! The connection to one peer: opens it, follows the heartbeats, opens a new one when it stalls or breaks.

use std::sync::Arc;
use std::time::Duration;

use proto_common::connect::{Connect, GrpcChannel};
use proto_common::error::{Code, Error};
use proto_common::retry::Backoff;
use tokio::task::coop::cooperative;
use tokio::time::{Instant, sleep, timeout};

use crate::client::monitor::Shared;
use crate::client::options::Heartbeats;
use crate::client::peer::{Answer, Opinion};
use crate::limits::{MAX_HEARTBEAT_BYTES, MAX_PEER_ANSWER_BYTES, PEER_PAGE};
use crate::v1::health_service_client::HealthServiceClient;
use crate::v1::{
    GetNodeStatusRequest, HealthCheckRequest, NodeStatusSection, PeerState, WatchHealthRequest,
    WatchHealthResponse,
};

/// Between two frames of a watch. A peer sends one for each heartbeat and each change; what comes faster waits on its side.
const PAUSE: Duration = Duration::from_millis(1);

/// Pages of a peer's list of peers that are read; more would be more than anybody watches.
const OPINION_PAGES: usize = 40;

/// Follows the peer at `address` for ever.
pub(crate) async fn run<C: Connect>(shared: Arc<Shared>, address: Arc<str>, connect: C) {
    let options = &shared.options;
    // Those that are added together do not come together.
    sleep(options.heartbeat.mul_f64(fastrand::f64())).await;
    let backoff = Backoff {
        initial: Duration::from_millis(200).min(options.reconnect_max),
        max: options.reconnect_max,
        jitter: 0.5,
        ..Backoff::default()
    };
    let mut pauses = backoff.start();
    let mut doubtful = false;
    loop {
        let error = match open(&shared, &connect, doubtful).await {
            Ok(channel) => {
                let client =
                    HealthServiceClient::new(channel).max_decoding_message_size(MAX_PEER_ANSWER_BYTES);
                let mut heard = false;
                let ended = match options.heartbeats {
                    Heartbeats::Watch => watch(&shared, &address, client, &mut heard).await,
                    Heartbeats::Poll => poll(&shared, &address, client, &mut heard).await,
                };
                if heard {
                    pauses.reset();
                }
                ended
            }
            Err(error) => error,
        };
        doubtful = !shared.has_answered(&address);
        shared.disconnected(&address, error.message());
        // Any error is worth another try here: a monitor that has given up watches nobody.
        let error = error.retry_after(Duration::ZERO);
        let mut pause = pauses.next(&error).unwrap_or(options.reconnect_max);
        if shared.state(&address) == Some(PeerState::Left) {
            // It goes away, and nobody is in a hurry to see it come back.
            pause = options.reconnect_max.mul_f64(0.5 + fastrand::f64() / 2.0);
        }
        sleep(pause).await;
    }
}

async fn open<C: Connect>(shared: &Shared, connect: &C, doubtful: bool) -> Result<C::Channel, Error> {
    let _places = match doubtful {
        true => shared.doubtful_place().await,
        false => (None, shared.place().await),
    };
    let limit = shared.options.connect_timeout;
    timeout(limit, connect.connect()).await.unwrap_or_else(|_| Err(late("no connection", limit)))
}

fn late(what: &str, limit: Duration) -> Error {
    let message = format!("{what} within {} ms", limit.as_millis());
    Error::with_code(Code::DeadlineExceeded, "DEADLINE_EXCEEDED", message)
}

/// Until the stream ends, breaks or stalls; says why.
async fn watch<T: GrpcChannel>(
    shared: &Shared,
    address: &str,
    mut client: HealthServiceClient<T>,
    heard: &mut bool,
) -> Error {
    let options = &shared.options;
    let request = WatchHealthRequest {
        service: String::new(),
        from: shared.from.to_string(),
        heartbeat_ms: options.heartbeat_ms(),
        omit_components: true,
    };
    let asked = Instant::now();
    let mut heartbeats = client.clone().max_decoding_message_size(MAX_HEARTBEAT_BYTES);
    let opened = timeout(options.connect_timeout, heartbeats.watch_health(request)).await;
    let mut frames = match opened {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => return Error::from(&status),
        Err(_) => return late("no answer", options.connect_timeout),
    };
    let mut round_trip = Some(asked);
    let asking = async {
        match options.opinions_interval {
            Some(interval) => loop {
                sleep(interval.mul_f64(0.75 + fastrand::f64() / 2.0)).await;
                opinion(shared, address, &mut client).await;
            },
            None => std::future::pending().await,
        }
    };
    tokio::pin!(asking);
    loop {
        let next = tokio::select! {
            next = timeout(options.stall(), cooperative(frames.message())) => next,
            never = &mut asking => never,
        };
        match next {
            Ok(Ok(Some(WatchHealthResponse { origin, health, last_frame }))) => {
                *heard = true;
                let round_trip = round_trip.take().map(|asked| asked.elapsed());
                shared.answered(address, Answer { origin, health, heartbeat: true, last_frame, round_trip });
                sleep(PAUSE).await;
            }
            Ok(Ok(None)) => return Error::with_code(Code::Unavailable, "UNAVAILABLE", "its watch ended"),
            Ok(Err(status)) => return Error::from(&status),
            Err(_) => return late("nothing arrived on its connection", options.stall()),
        }
    }
}

/// One call for each heartbeat, until one fails; says why.
async fn poll<T: GrpcChannel>(
    shared: &Shared,
    address: &str,
    mut client: HealthServiceClient<T>,
    heard: &mut bool,
) -> Error {
    let options = &shared.options;
    let mut checks = client.clone().max_decoding_message_size(MAX_HEARTBEAT_BYTES);
    let mut next_opinion = options.opinions_interval.map(|interval| Instant::now() + interval);
    let mut due = Instant::now();
    loop {
        tokio::time::sleep_until(due).await;
        due += options.heartbeat;
        let request = HealthCheckRequest {
            service: String::new(),
            from: shared.from.to_string(),
            omit_components: true,
        };
        let asked = Instant::now();
        let answer = {
            let _place = shared.place().await;
            timeout(options.stall(), checks.health_check(request)).await
        };
        match answer {
            Ok(Ok(answer)) => {
                *heard = true;
                let answer = answer.into_inner();
                let round_trip = Some(asked.elapsed());
                let (origin, health) = (answer.origin, answer.health);
                shared.answered(
                    address,
                    Answer { origin, health, heartbeat: true, last_frame: false, round_trip },
                );
            }
            Ok(Err(status)) => return Error::from(&status),
            Err(_) => return late("no answer", options.stall()),
        }
        if next_opinion.is_some_and(|at| Instant::now() >= at) {
            opinion(shared, address, &mut client).await;
            next_opinion = options.opinions_interval.map(|interval| Instant::now() + interval);
        }
        // What has been missed is not made up for.
        due = due.max(Instant::now());
    }
}

/// Asks what the peer thinks of this node. No answer is no opinion; whether it lives, the heartbeats say.
async fn opinion<T: GrpcChannel>(shared: &Shared, address: &str, client: &mut HealthServiceClient<T>) {
    let _place = shared.place().await;
    let mut page_token = String::new();
    let mut found = None;
    for _ in 0..OPINION_PAGES {
        let request = GetNodeStatusRequest {
            sections: vec![NodeStatusSection::Peers.into()],
            page_size: PEER_PAGE,
            page_token,
            from: shared.from.to_string(),
        };
        let asked = Instant::now();
        let answer = timeout(shared.options.connect_timeout, client.get_node_status(request)).await;
        let Ok(Ok(answer)) = answer else { break };
        let answer = answer.into_inner();
        let round_trip = Some(asked.elapsed());
        shared.answered(address, Answer { origin: answer.origin, round_trip, ..Answer::default() });
        let peers = answer.status.map(|status| status.peers).unwrap_or_default();
        if let Some(me) = peers.into_iter().find(|peer| peer.node_id == shared.from.as_str()) {
            found = Some(Opinion {
                state: me.state(),
                last_heard_from_unix_ms: me.last_heard_from_unix_ms,
                unix_ms: shared.clock.unix_ms(),
            });
            break;
        }
        page_token = answer.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    shared.opinion(address, found);
}

#[cfg(test)]
mod tests {
    use proto_common::ids::NodeId;
    use tokio::sync::mpsc;
    use tonic::transport::Channel;

    use super::*;
    use crate::client::{MonitorOptions, PeerMonitor};

    /// Says when it is asked, and connects to nobody.
    struct Nobody(mpsc::Sender<()>);

    impl Connect for Nobody {
        type Channel = Channel;

        async fn connect(&self) -> Result<Channel, Error> {
            self.0.send(()).await.unwrap();
            std::future::pending().await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_peer_is_not_kept_waiting_by_those_that_nobody_ever_heard_of() {
        const STRANGERS: usize = 200;
        let mut options = MonitorOptions::default();
        (options.concurrency, options.connect_timeout) = (4, Duration::from_secs(3));
        let heartbeat = options.heartbeat;
        let monitor = PeerMonitor::start(NodeId::new("n1").unwrap(), options);
        let (asked, mut strangers) = mpsc::channel(10_000);
        for number in 0..STRANGERS {
            monitor.add(&format!("127.0.0.1:{number}"), None, Nobody(asked.clone())).unwrap();
        }
        // Each once, and then it is the turn of the next ones again.
        for _ in 0..STRANGERS + 4 {
            strangers.recv().await.unwrap();
        }
        let (asked, mut newcomer) = mpsc::channel(1);
        let began = Instant::now();
        monitor.add("127.0.0.1:60000", None, Nobody(asked)).unwrap();
        newcomer.recv().await.unwrap();
        assert!(began.elapsed() <= heartbeat + Duration::from_secs(4), "{:?}", began.elapsed());
        let more = Instant::now();
        for _ in 0..8 {
            strangers.recv().await.unwrap();
        }
        assert!(more.elapsed() <= Duration::from_secs(20), "they are not forgotten");
        monitor.stop().await;
    }
}

//! What became of a transfer: asked of the target, until it answers.

use std::time::Duration;

use proto::common::connect::Connect as _;
use proto::common::dial::{Dial, Dialer, NodeChannel};
use proto::common::error::{CommonReason, Error};
use proto::common::retry::Backoff;
use proto::common::text::{hex, printable};
use proto::node::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto::node::{
    CancelTransferRequest, Direction, GetTransferProgressRequest, NodeIdentity, TransferPhase,
    TransferProgress,
};
use proto::snapshot::Reason;
use proto::snapshot::limits::MAX_ANSWER_BYTES;
use proto::snapshot::sender::SnapshotToSend;

use crate::common::NodeId;
use crate::migrate::slot_map::ask_whole;
use crate::store::{Claim, Ownership};

/// Between two questions where the answer was of no use.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How long whoever begins a split waits for the target to say who it is.
const IDENTIFY: Duration = Duration::from_secs(10);
/// How long the target has for each answer. It may be reading back what it has staged before it answers a cancel.
const PATIENCE: Duration = Duration::from_secs(30);

/// The node that the slots go to, and the way to it.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub(super) dialer: Dialer,
    pub(super) address: String,
    pub(super) node: NodeId,
}

impl Target {
    pub(super) fn dial(&self) -> Result<Dial, Error> {
        self.dialer.to(&self.address, Some(&self.node))
    }
}

/// What the target says of the transfer of a split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// It has taken everything.
    Installed,
    /// It has everything, and is about to.
    Installing,
    /// It has a part.
    Partial,
    /// It has ended without taking over, and will not.
    Ended,
    /// It knows nothing of it.
    Unknown,
    /// Under its ID it knows another transfer, so nothing of this one: IDs are no secret, and any peer may begin one under an ID that it has seen.
    Anothers,
}

impl Answer {
    /// What `told` says of the transfer of `split`.
    fn of(told: &TransferProgress, split: &SnapshotToSend) -> Self {
        if !is_of(told, split) {
            return Self::Anothers;
        }
        match told.phase() {
            TransferPhase::Installed => Self::Installed,
            TransferPhase::Installing | TransferPhase::Verifying => Self::Installing,
            TransferPhase::Cancelled | TransferPhase::Expired | TransferPhase::Failed => Self::Ended,
            _ => Self::Partial,
        }
    }
}

/// Whether a transfer under the ID of `split` is that of the split: the target has compared the source's name with its certificate.
fn is_of(told: &TransferProgress, split: &SnapshotToSend) -> bool {
    told.source_node_id == split.source_node.as_str()
        && told.source_shard_id == split.source_shard.as_str()
        && told.target_shard_id == split.target_shard.as_str()
        && told.slots == Some(split.slots.into())
        && told.snapshot_term == split.point.term
        && told.snapshot_index == split.point.index
}

/// Why there is no answer yet.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unanswered {
    /// The question failed.
    #[error(transparent)]
    Failed(#[from] Error),
    /// Whoever answers is not who was asked at the start: what it does or does not know is no evidence.
    #[error(
        "node {node} answers with store {found}, the split began with store {expected}: only an operator knows what became of that one. \
         Bring it back, or say SPLIT RESOLVE"
    )]
    Stranger { node: String, found: String, expected: String },
}

impl Unanswered {
    fn stranger(node: &str, found: &[u8], expected: &[u8]) -> Self {
        Self::Stranger {
            node: printable(node, 128),
            found: printable(&hex(found), 64),
            expected: hex(expected),
        }
    }
}

/// Asks once, for what the node with the data directory `store` says.
async fn ask(target: &Target, split: &SnapshotToSend, store: &[u8]) -> Result<Answer, Unanswered> {
    let question = question(target, split.transfer_id.as_str());
    let (told, NodeIdentity { node_id, store_id, .. }) = in_time(target, question).await?;
    if store.is_empty() || store_id != store {
        return Err(Unanswered::stranger(&node_id, &store_id, store));
    }
    Ok(told.map_or(Answer::Unknown, |told| Answer::of(&told, split)))
}

/// What comes of asking the target something, unless that takes too long.
async fn in_time<T>(target: &Target, asked: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout(PATIENCE, asked).await.unwrap_or_else(|_| {
        let sentence = format!("node {} has not answered for {PATIENCE:?}", target.node);
        Err(Error::new(CommonReason::Unavailable, sentence))
    })
}

/// What the owners of slots tell of a hand-over, whatever the target remembers of the transfer that did it. They are never forgotten, and epochs only rise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// The target took the slots over, and has them.
    Yes,
    /// The target took them over and handed some of them on, or never had those: nodes learn of owners from each other, so somebody may have said so who never
    /// had them.
    Elsewhere,
    /// It did not.
    No,
    /// Some of them, or somebody else at the same epoch: no hand-over leaves that.
    Unclear,
}

/// Asks the target once who owns the slots of `claim`, for what the node with the data directory `store` says. `me` would have handed them over.
pub(super) async fn taken(
    target: &Target,
    me: &NodeId,
    claim: &Claim,
    store: &[u8],
) -> Result<Taken, Unanswered> {
    let asked = async { ask_whole(target.dial()?.connect().await?, me).await };
    let (found, ownership) = in_time(target, asked).await?;
    if store.is_empty() || found != store {
        return Err(Unanswered::stranger(target.node.as_str(), &found, store));
    }
    Ok(taken_by(&ownership, me, claim))
}

fn taken_by(known: &Ownership, me: &NodeId, claim: &Claim) -> Taken {
    // What came after it counts as well.
    let of = |slot| match known.of(slot) {
        Some(now) if now.epoch < claim.epoch || now.owner == *me => Taken::No,
        Some(now) if now.owner == claim.owner => Taken::Yes,
        Some(now) if now.epoch > claim.epoch => Taken::Elsewhere,
        Some(_) => Taken::Unclear,
        None => Taken::No,
    };
    let together = |one, other| match (one, other) {
        (one, other) if one == other => one,
        (Taken::Yes, Taken::Elsewhere) | (Taken::Elsewhere, Taken::Yes) => Taken::Elsewhere,
        _ => Taken::Unclear,
    };
    claim.range.iter().map(of).reduce(together).unwrap_or(Taken::Unclear)
}

/// What is told of the transfer under an ID, if any is known, and by whom.
async fn question(
    target: &Target,
    transfer: &str,
) -> Result<(Option<TransferProgress>, NodeIdentity), Error> {
    let request =
        GetTransferProgressRequest { transfer_id: transfer.into(), direction: Direction::In.into() };
    let asked = connect(target).await?.get_transfer_progress(request).await;
    match asked.map_err(Error::from) {
        Ok(reply) => {
            let reply = reply.into_inner();
            Ok((Some(reply.transfer.unwrap_or_default()), reply.node.unwrap_or_default()))
        }
        Err(error) if error.is(Reason::TransferNotFound) => {
            let said = |key: &str| error.metadata_map().get(key).map(String::as_str).unwrap_or_default();
            let identity = NodeIdentity {
                node_id: said("node_id").into(),
                store_id: unhex(said("store_id")).unwrap_or_default().into(),
                ..NodeIdentity::default()
            };
            Ok((None, identity))
        }
        Err(error) => Err(error),
    }
}

/// The store of the node at `address`, which must be `target`, and know nothing of `transfer` yet.
pub(super) async fn identify(
    dialer: &Dialer,
    address: &str,
    target: &NodeId,
    transfer: &str,
) -> Result<Vec<u8>, String> {
    let asked = Target { dialer: dialer.clone(), address: address.to_owned(), node: target.clone() };
    let asked = tokio::time::timeout(IDENTIFY, question(&asked, transfer)).await;
    let answered = asked.map_err(|_| format!("node {target} does not answer at {address}"))?;
    let (told, NodeIdentity { node_id, store_id, .. }) =
        answered.map_err(|error| format!("node {target} cannot be asked at {address}: {error}"))?;
    if node_id != target.as_str() {
        return Err(format!("node {} answers at {address}, not {target}", printable(&node_id, 128)));
    }
    if store_id.is_empty() {
        return Err(format!("node {target} does not say which store it has"));
    }
    if told.is_some() {
        return Err(format!("node {target} knows a transfer {transfer} already"));
    }
    Ok(store_id.into())
}

/// Asks until there is an answer of the node with the data directory `store`.
pub(super) async fn ask_until_answered(
    target: &Target,
    split: &SnapshotToSend,
    store: &[u8],
    mut failed: impl FnMut(&Unanswered),
) -> Answer {
    let mut pauses = Backoff::default().start();
    loop {
        let unanswered = match ask(target, split, store).await {
            Ok(answer) => return answer,
            Err(unanswered) => unanswered,
        };
        failed(&unanswered);
        let pause = match &unanswered {
            // Also after an error that says that asking again is of no use: the slots are held until there is an answer.
            Unanswered::Failed(error) => pauses.next(error).unwrap_or(ASK_AGAIN),
            Unanswered::Stranger { .. } => ASK_AGAIN,
        };
        tokio::time::sleep(pause).await;
    }
}

/// Has the target discard what it has. An error may mean that it is too late; ask again.
pub(super) async fn cancel(target: &Target, transfer: &str) -> Result<(), Error> {
    let request = CancelTransferRequest { transfer_id: transfer.into(), ..CancelTransferRequest::default() };
    let asked = async { connect(target).await?.cancel_transfer(request).await.map_err(Error::from) };
    in_time(target, asked).await.map(drop)
}

async fn connect(target: &Target) -> Result<SplitSnapshotServiceClient<NodeChannel>, Error> {
    let channel = target.dial()?.connect().await?;
    Ok(SplitSnapshotServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES))
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes().chunks(2);
    digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use proto::node::Priority;
    use proto::snapshot::spec::SnapshotPoint;

    use super::*;

    #[test]
    fn whether_slots_were_taken_over_is_told_by_their_epochs() {
        let claim = |range: &str, owner: &str, epoch| Claim {
            range: range.parse().unwrap(),
            owner: owner.parse().unwrap(),
            epoch,
        };
        // n1 would hand them over to n2.
        let split = claim("100-199", "n2", 7);
        for (known, expected) in [
            (vec![], Taken::No),
            (vec![claim("0-16383", "n1", 6)], Taken::No),
            // From another node that had them long before.
            (vec![claim("0-16383", "n2", 5)], Taken::No),
            // This node got them back, or keeps them since an operator said so.
            (vec![claim("0-199", "n1", 8)], Taken::No),
            (vec![claim("100-199", "n2", 7)], Taken::Yes),
            (vec![claim("0-150", "n2", 9), claim("151-300", "n2", 8)], Taken::Yes),
            // It went on from there; or n3 only says so.
            (vec![claim("0-150", "n2", 9), claim("151-300", "n3", 8)], Taken::Elsewhere),
            (vec![claim("0-16383", "n3", 8)], Taken::Elsewhere),
            (vec![claim("0-150", "n3", 8), claim("151-199", "n1", 6)], Taken::Unclear),
            (vec![claim("100-199", "n3", 7)], Taken::Unclear),
            (vec![claim("100-150", "n2", 7)], Taken::Unclear),
            (vec![claim("100-150", "n1", 6), claim("151-199", "n2", 7)], Taken::Unclear),
        ] {
            let mut ownership = Ownership::default();
            ownership.adopt_all(&known);
            assert_eq!(taken_by(&ownership, &"n1".parse().unwrap(), &split), expected, "{known:?}");
        }
    }

    /// Any peer may begin a transfer under the ID of a split, which is no secret, or have an end of one in the history.
    #[test]
    fn a_transfer_is_that_of_a_split_only_with_its_specification() {
        let split = SnapshotToSend {
            transfer_id: "split-1".parse().unwrap(),
            source_shard: "slots-0-16383".parse().unwrap(),
            target_shard: "slots-100-199-n1".parse().unwrap(),
            source_node: "n1".parse().unwrap(),
            target_node: None,
            slots: "100-199".parse().unwrap(),
            point: SnapshotPoint { term: 7, index: 1000 },
            fence: None,
            priority: Priority::Split,
        };
        let own = TransferProgress {
            transfer_id: "split-1".into(),
            source_shard_id: "slots-0-16383".into(),
            target_shard_id: "slots-100-199-n1".into(),
            source_node_id: "n1".into(),
            slots: Some(split.slots.into()),
            snapshot_term: 7,
            snapshot_index: 1000,
            phase: TransferPhase::Installed.into(),
            ..TransferProgress::default()
        };
        let changed = |change: fn(&mut TransferProgress)| {
            let mut told = own.clone();
            change(&mut told);
            Answer::of(&told, &split)
        };
        for (phase, expected) in [
            (TransferPhase::Installed, Answer::Installed),
            (TransferPhase::Verifying, Answer::Installing),
            (TransferPhase::Installing, Answer::Installing),
            (TransferPhase::Transferring, Answer::Partial),
            (TransferPhase::Interrupted, Answer::Partial),
            (TransferPhase::Cancelled, Answer::Ended),
            (TransferPhase::Expired, Answer::Ended),
            (TransferPhase::Failed, Answer::Ended),
        ] {
            let phase = |node: &str| TransferProgress {
                phase: phase.into(),
                source_node_id: node.into(),
                ..own.clone()
            };
            assert_eq!(Answer::of(&phase("n1"), &split), expected);
            assert_eq!(Answer::of(&phase("n3"), &split), Answer::Anothers);
        }
        assert_eq!(changed(|told| told.source_shard_id = "x".into()), Answer::Anothers);
        assert_eq!(changed(|told| told.target_shard_id = "x".into()), Answer::Anothers);
        assert_eq!(changed(|told| told.slots = None), Answer::Anothers);
        assert_eq!(changed(|told| told.snapshot_term = 8), Answer::Anothers);
        assert_eq!(changed(|told| told.snapshot_index = 999), Answer::Anothers);
        assert_eq!(Answer::of(&TransferProgress::default(), &split), Answer::Anothers);
    }

    #[tokio::test(start_paused = true)]
    async fn a_target_that_does_not_answer_is_not_waited_for_longer_than_that() {
        let target =
            Target { dialer: Dialer::plaintext(), address: String::new(), node: "n2".parse().unwrap() };
        let error = in_time(&target, std::future::pending::<Result<(), Error>>()).await.unwrap_err();
        assert!(error.is(CommonReason::Unavailable) && error.is_retryable(), "{error:?}");
    }

    #[test]
    fn a_store_id_is_read_back() {
        let store = [0_u8, 1, 0xab, 0xff];
        assert_eq!(unhex(&hex(&store)).unwrap(), store);
        assert_eq!(unhex("xy"), None);
        assert_eq!(unhex("é"), None);
    }
}

//! Claims an attempt, opens its stream, and makes sure that the right node answers.

use std::sync::Arc;
use std::time::Duration;

use proto_common::clock::now_unix_ms;
use proto_common::error::Error;
use proto_common::ids::RANDOM_ID_LEN;
use proto_common::text::{hex, printable};
use proto_common::v1::NodeIdentity;
use tokio::time::{Instant, timeout};

use super::FEATURES;
use super::dial::Dial;
use super::link::{Link, unexpected};
use super::task::{Halt, Task, another_node};
use crate::Reason;
use crate::source::MigrationSource;
use crate::v1::transfer_migration_data_request::{Header, Purpose};
use crate::v1::transfer_migration_data_response::Accepted;
use crate::v1::{MigrationDecision, MigrationState};

/// How long a target may take to tell the outcome: reads and writes wait for it, and over another connection it may come at once.
pub(super) const OUTCOME_TIMEOUT: Duration = Duration::from_secs(5);

impl<S: MigrationSource, D: Dial> Task<S, D> {
    /// A stream of the next attempt. The attempt is saved before anybody hears of it, and none is claimed where nobody can: an operator
    /// who decides about a target that is gone names the attempt that was seen.
    pub(super) async fn open(&mut self, purpose: Purpose) -> Result<Link, Halt> {
        self.change().connected = false;
        let before = self.shown().attempt;
        let attempt = before.checked_add(1).ok_or_else(no_attempt_left)?;
        if std::mem::take(&mut self.no_place) {
            // It was there. From now on and not from that answer: a pause that is longer than the timeout may lie between.
            self.began = Instant::now();
        }
        // A node that swallows what is sent must not keep a migration pending for longer than the caller said.
        let patience = match self.state() {
            MigrationState::Pending => self.limits.accept_timeout.saturating_sub(self.began.elapsed()),
            MigrationState::Committing => OUTCOME_TIMEOUT,
            _ => Duration::MAX,
        };
        let began = Instant::now();
        let channel = self.dial(patience).await?;
        self.change().attempt = attempt;
        self.save().await?;
        let header = self.header(purpose);
        let opening = timeout(patience.saturating_sub(began.elapsed()), Link::open(channel, header));
        let opened = self.meanwhile(opening).await?.unwrap_or_else(|_| Err(silent()));
        let opened = opened.and_then(|link| self.check_target(&link.accepted).map(|()| link));
        if opened.as_ref().is_err_and(another_node) {
            // The target has not heard of it, and an operator can go on naming the attempt that it has heard of.
            self.change().attempt = before;
        }
        let link = opened?;
        if self.shown().peer.is_none() {
            self.change().peer = link.accepted.target.clone().map(|target| NodeIdentity {
                cluster_id: printable(&target.cluster_id, 128),
                version: printable(&target.version, 64),
                ..target
            });
            self.save().await?;
        }
        let skew = i128::from(link.accepted.sent_unix_ms) - i128::from(now_unix_ms());
        let progress = self.change();
        progress.clock_skew_ms = i64::try_from(skew).ok();
        progress.connected = true;
        self.show();
        Ok(link)
    }

    pub(super) async fn dial(&mut self, patience: Duration) -> Result<D::Channel, Halt> {
        let (inner, node) = (Arc::clone(&self.inner), self.spec.target_node.clone());
        let address = self.shown().target_address.clone();
        let dialling = timeout(patience, async move { inner.dial.dial(&node, &address).await });
        Ok(self.meanwhile(dialling).await?.unwrap_or_else(|_| Err(silent()))?)
    }

    fn header(&self, purpose: Purpose) -> Header {
        let shown = self.shown();
        Header {
            migration_id: self.id.to_string(),
            spec: Some(self.spec.clone().into()),
            purpose: purpose.into(),
            source: Some(self.inner.identity.clone()),
            target_store_id: shown.peer.as_ref().map(|peer| peer.store_id.clone()).unwrap_or_default(),
            fence: None,
            attempt: shown.attempt,
            session: self.inner.session.clone(),
            copy: shown.copy.max(1),
            base_seq: self.record.base_seq,
            priority: shown.priority,
            estimated_keys: shown.progress.as_ref().and_then(|progress| progress.items_total),
            estimated_bytes: shown.progress.as_ref().and_then(|progress| progress.bytes_total),
            sent_unix_ms: now_unix_ms(),
            required_features: Vec::new(),
            supported_features: FEATURES.map(str::to_owned).to_vec(),
        }
    }

    /// Is it the node, the cluster and the store that the migration began with?
    fn check_target(&self, accepted: &Accepted) -> Result<(), Error> {
        if let Some(feature) =
            accepted.required_features.iter().find(|feature| !FEATURES.contains(&feature.as_str()))
        {
            let feature = printable(feature, 64);
            let text = format!("the target requires the feature {feature}, which this node does not have");
            return Err(Reason::UnsupportedFeature.error(text).metadata("feature", feature));
        }
        let found = accepted.target.clone().unwrap_or_default();
        if found.node_id != self.spec.target_node.as_str() {
            let shown = printable(&found.node_id, 128);
            let text = format!(
                "{} answers at {} where {} was expected",
                shown,
                self.shown().target_address,
                self.spec.target_node
            );
            return Err(Reason::WrongNode.error(text).metadata("node_id", shown));
        }
        if found.store_id.len() != RANDOM_ID_LEN {
            let bytes = found.store_id.len();
            return Err(unexpected(&format!(
                "the target's store ID has {bytes} bytes instead of {RANDOM_ID_LEN}"
            )));
        }
        let mine = &self.inner.identity;
        if !mine.cluster_id.is_empty() && !found.cluster_id.is_empty() && mine.cluster_id != found.cluster_id
        {
            let shown = printable(&found.cluster_id, 128);
            let text =
                format!("{} belongs to cluster {shown}, this node to {}", found.node_id, mine.cluster_id);
            return Err(Reason::WrongCluster.error(text).metadata("cluster_id", shown));
        }
        match &self.shown().peer {
            Some(NodeIdentity { store_id, .. }) if *store_id != found.store_id => {
                let id = hex(&found.store_id);
                let text = format!(
                    "{} came back with another store than the one that the migration began with; what was staged or decided \
                     there cannot be found out from it",
                    found.node_id
                );
                Err(Reason::StoreChanged.error(text).metadata("store_id", id))
            }
            _ => self.check_commit(accepted),
        }
    }

    /// A target may know of an earlier migration with this ID that this node has forgotten: what was committed then was given back since, at a higher epoch. A
    /// migration that has ended here may have a higher one by an operator's word, and only tells the target.
    fn check_commit(&self, accepted: &Accepted) -> Result<(), Error> {
        let committed = match (&accepted.committed, accepted.decision()) {
            (Some(committed), _) => committed,
            (None, MigrationDecision::Committed) => {
                return Err(unexpected("the target does not say what it committed"));
            }
            (None, _) => return Ok(()),
        };
        if self.state().is_final() || committed.slot_epoch >= self.new_slot_epoch() {
            return Ok(());
        }
        let text = format!(
            "{} committed a migration of this ID at slot epoch {}, and the slots have come back since, at {}; choose another ID",
            self.spec.target_node,
            committed.slot_epoch,
            self.shown().slot_epoch
        );
        Err(Reason::SpecificationMismatch.error(text).metadata("field", "migration_id"))
    }

    /// Makes sure that changes are logged before the first row is read. From then on the store logs them until the migration ends.
    pub(super) async fn open_log(&mut self) -> Result<(), Halt> {
        if self.shown().copy > 0 {
            return Ok(());
        }
        self.check_owner()?;
        let (source, id, slots) = (Arc::clone(&self.inner.source), self.id.clone(), self.spec.slots);
        let base = self.meanwhile(async move { source.open_log(&id, slots, None).await }).await??;
        self.record.base_seq = base;
        let progress = self.change();
        (progress.copy, progress.durable_seq) = (1, base);
        Ok(())
    }

    /// Makes sure that the log reaches back to what the target has. Only the target knows that: a source that restarts has seen fewer
    /// acknowledgements than it dropped changes for.
    pub(super) async fn go_on_with_log(&mut self, from: u64) -> Result<(), Halt> {
        let (source, id, slots) = (Arc::clone(&self.inner.source), self.id.clone(), self.spec.slots);
        match self.meanwhile(async move { source.open_log(&id, slots, Some(from)).await }).await? {
            Ok(_) => Ok(()),
            Err(error) if error.is(Reason::LogLost) => {
                self.copy_again(error.message()).await?;
                Err(Halt::Changed)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// PENDING and up to FREEZING: `Accepted` says who decides from here on.
    pub(super) fn in_transfer(&self) -> bool {
        matches!(
            self.state(),
            MigrationState::Pending
                | MigrationState::Copying
                | MigrationState::CatchingUp
                | MigrationState::Ready
                | MigrationState::Freezing
        )
    }
}

pub(super) fn silent() -> Error {
    Reason::TargetUnreachable.error("it took the connection and did not answer")
}

/// Only a number that the target told leads here: streams alone never count so far.
fn no_attempt_left() -> Error {
    let text = "the target told of the highest attempt that there is, behind which no stream can come";
    Reason::Superseded.error(text).metadata("attempt", u64::MAX.to_string())
}

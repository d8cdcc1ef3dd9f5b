//! Who may call what.
//!
//! [`Guarded`] stands in front of a service. Before a byte of a request is decoded it finds out who calls ([`Peer`]), refuses another
//! cluster, and asks the [`Authorizer`]. The handler finds the [`Caller`] in the request's extensions, holds what a message claims
//! against it, and asks again with the shards and slots that the message names.
//!
//! | violation | code | reason |
//! |---|---|---|
//! | no certificate, or one that names nobody, where one is needed; plaintext from another machine, unless that is allowed | UNAUTHENTICATED | UNAUTHENTICATED |
//! | certificate or metadata [`CLUSTER_METADATA`] of another cluster; metadata `cluster_id` | FAILED_PRECONDITION | WRONG_CLUSTER |
//! | the role may not call the method, or not for these shards and slots; metadata `method`, `role` | PERMISSION_DENIED | PERMISSION_DENIED |
//! | a message claims another node than the certificate's; metadata `node_id` | PERMISSION_DENIED | PERMISSION_DENIED |
//! | a node touches a task of other nodes; metadata `node_id` | PERMISSION_DENIED | PERMISSION_DENIED |

mod answers;
mod guarded;
mod roles;

use std::sync::Arc;

use tonic::codegen::http;

pub use answers::{UNTAKEN, UNTAKEN_PER_PEER};
pub use guarded::Guarded;
pub use roles::{READS, RoleTable};

pub use crate::peer::CLUSTER_METADATA;

use crate::error::{CommonReason, Error};
use crate::ids::{ClusterId, NodeId, ShardId};
use crate::peer::{Peer, PeerIdentity, Role};
use crate::slots::SlotRange;
use crate::text::printable;
use crate::v1;

/// A call, before it is answered.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Call<'a> {
    /// Who calls.
    pub peer: &'a Peer,
    /// Full name of the service, such as `node.health.v1.HealthService`.
    pub service: &'a str,
    /// Name of the method, such as `HealthCheck`.
    pub method: &'a str,
    /// The shards that the request names; none before it is read, and where it names none.
    pub shards: &'a [&'a ShardId],
    /// The slots that the request names.
    pub slots: Option<SlotRange>,
}

impl<'a> Call<'a> {
    /// A call whose request is not read yet.
    #[must_use]
    pub fn new(peer: &'a Peer, service: &'a str, method: &'a str) -> Self {
        Self { peer, service, method, shards: &[], slots: None }
    }
}

/// Decides per call: once before the request is read, and once more where it names shards or slots.
pub trait Authorizer: Send + Sync + 'static {
    /// Lets the call pass.
    ///
    /// # Errors
    ///
    /// Why not: [`CommonReason::Unauthenticated`] or [`CommonReason::PermissionDenied`].
    fn authorize(&self, call: &Call<'_>) -> Result<(), Error>;

    /// The role that a certificate's owner has here: what decides whose tasks it may [touch](Caller::is_party). Default: the
    /// certificate's.
    fn role(&self, identity: &PeerIdentity) -> Role {
        identity.role
    }
}

impl<A: Authorizer + ?Sized> Authorizer for Box<A> {
    fn authorize(&self, call: &Call<'_>) -> Result<(), Error> {
        (**self).authorize(call)
    }

    fn role(&self, identity: &PeerIdentity) -> Role {
        (**self).role(identity)
    }
}

/// Everybody on this machine may do everything, and whoever has a certificate of the cluster. A caller in plaintext from an address that
/// is not loopback may do nothing, wherever the server listens; nor may one by TLS that tonic does itself, which shows its certificate to nobody
/// here. Connections without addresses, such as those in memory, are this machine's.
#[derive(Debug, Clone, Copy, Default)]
pub struct AllowLocal;

impl Authorizer for AllowLocal {
    fn authorize(&self, call: &Call<'_>) -> Result<(), Error> {
        let from = call.peer.address().map(|address| address.ip().to_canonical());
        match from {
            Some(from) if call.peer.identity().is_none() && !from.is_loopback() => {
                let message = format!(
                    "the caller is at {from} and has shown no certificate; in plaintext this node serves its own machine only"
                );
                Err(Error::new(CommonReason::Unauthenticated, message))
            }
            _ => Ok(()),
        }
    }
}

/// Everybody may do everything, from wherever. For plaintext in a network that nobody else reaches; elsewhere it gives the data away.
#[derive(Debug, Clone, Copy, Default)]
pub struct AllowAll;

impl Authorizer for AllowAll {
    fn authorize(&self, _call: &Call<'_>) -> Result<(), Error> {
        Ok(())
    }
}

/// Everybody with a certificate of the cluster may do everything, whatever the role.
#[derive(Debug, Clone, Copy, Default)]
pub struct SameCluster;

impl Authorizer for SameCluster {
    /// The cluster itself is compared before.
    fn authorize(&self, call: &Call<'_>) -> Result<(), Error> {
        call.peer.identity().map(|_| ()).ok_or_else(unauthenticated)
    }
}

/// The cluster of a node, and who may call there. Cheap to clone.
#[derive(Clone)]
pub struct Access {
    cluster: Option<ClusterId>,
    authorizer: Arc<dyn Authorizer>,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Access").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

/// [`AllowLocal`], in the cluster without a name.
impl Default for Access {
    fn default() -> Self {
        Self::new(None, AllowLocal)
    }
}

impl Access {
    /// Calls of `cluster` are decided on by `authorizer`.
    pub fn new(cluster: Option<ClusterId>, authorizer: impl Authorizer) -> Self {
        Self { cluster, authorizer: Arc::new(authorizer) }
    }

    fn cluster_name(&self) -> &str {
        self.cluster.as_ref().map_or("", ClusterId::as_str)
    }

    /// What can be decided before the request is read.
    fn admit(&self, peer: &Peer, service: &str, method: &str, meant: Option<&[u8]>) -> Result<(), Error> {
        if let Some(meant) = meant
            && meant != self.cluster_name().as_bytes()
        {
            return Err(self.wrong_cluster("the call is meant for", &String::from_utf8_lossy(meant)));
        }
        if let Some(identity) = peer.identity() {
            if identity.cluster != self.cluster {
                return Err(self.wrong_cluster("the certificate is of", identity.cluster_name()));
            }
        } else if peer.is_encrypted() {
            return Err(unauthenticated());
        }
        self.authorizer.authorize(&Call::new(peer, service, method))
    }

    fn wrong_cluster(&self, what: &str, theirs: &str) -> Error {
        let ours = self.cluster_name();
        let message = format!(
            "{what} cluster \"{}\", this node is of \"{ours}\"; check the address",
            printable(theirs, 128)
        );
        Error::new(CommonReason::WrongCluster, message).metadata("cluster_id", ours)
    }
}

fn unauthenticated() -> Error {
    let message = "the caller has shown no certificate that names a node, an operator or an observer";
    Error::new(CommonReason::Unauthenticated, message)
}

/// Whoever made a request that has passed [`Guarded`]; in its extensions. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Caller {
    peer: Peer,
    access: Access,
    service: &'static str,
    method: Arc<str>,
}

impl Caller {
    /// The caller of a request.
    ///
    /// # Errors
    ///
    /// `INTERNAL` if the request has not come through [`Guarded`]: then nobody has decided about it.
    pub fn of(extensions: &http::Extensions) -> Result<Self, Error> {
        extensions.get::<Self>().cloned().ok_or_else(|| {
            Error::new(CommonReason::Internal, "the service was reached around its guard, which is a defect")
        })
    }

    /// Who it is.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Holds `field`, in which the caller says which node it is, against its certificate: the name, and the [role](Authorizer::role), since
    /// an operator or observer of the same name is not that node.
    ///
    /// # Errors
    ///
    /// `PERMISSION_DENIED`. A caller without certificate may claim what it wants.
    pub fn claims(&self, field: &str, claimed: &NodeId) -> Result<(), Error> {
        self.claims_as(&[Role::Node], field, claimed)
    }

    /// The same of who sends a snapshot, which operators do, too, in their own name. Operators need names that no node has, since transfers
    /// are told apart by them.
    ///
    /// # Errors
    ///
    /// As [`claims`](Self::claims).
    pub fn sends_as(&self, field: &str, claimed: &NodeId) -> Result<(), Error> {
        self.claims_as(&[Role::Node, Role::Operator], field, claimed)
    }

    fn claims_as(&self, roles: &[Role], field: &str, claimed: &NodeId) -> Result<(), Error> {
        match self.peer.identity() {
            Some(identity)
                if identity.id != *claimed || !roles.contains(&self.access.authorizer.role(identity)) =>
            {
                let message = format!("{field} is {claimed}, the caller's certificate is that of {identity}");
                Err(Error::new(CommonReason::PermissionDenied, message)
                    .violation(field, format!("is not {identity}"))
                    .metadata("node_id", identity.id.as_str()))
            }
            _ => Ok(()),
        }
    }

    /// Holds the caller of a call about `task` against the node at its other end. Whoever has another [role](Authorizer::role) than that of
    /// a node may touch all that it allows.
    ///
    /// # Errors
    ///
    /// `PERMISSION_DENIED`.
    pub fn is_party(&self, task: &str, other_end: &str) -> Result<(), Error> {
        match self.peer.identity() {
            Some(identity)
                if self.access.authorizer.role(identity) == Role::Node
                    && identity.id.as_str() != other_end =>
            {
                let message =
                    format!("{task} is not one of {identity}; only its own nodes and operators may touch it");
                Err(Error::new(CommonReason::PermissionDenied, message)
                    .metadata("node_id", identity.id.as_str()))
            }
            _ => Ok(()),
        }
    }

    /// [`may`](Self::may) for the shards and slots of a message. Those that are none are left to whoever checks the message.
    ///
    /// # Errors
    ///
    /// As the [`Authorizer`] says.
    pub fn may_named(&self, shards: [&str; 2], slots: Option<v1::SlotRange>) -> Result<(), Error> {
        let shards = shards.map(ShardId::new);
        let shards: Vec<&ShardId> = shards.iter().flatten().collect();
        self.may(&shards, slots.and_then(|slots| SlotRange::try_from(slots).ok()))
    }

    /// Asks whether the caller may do that to these shards and slots.
    ///
    /// # Errors
    ///
    /// As the [`Authorizer`] says.
    pub fn may(&self, shards: &[&ShardId], slots: Option<SlotRange>) -> Result<(), Error> {
        let Self { peer, access, service, method } = self;
        access.authorizer.authorize(&Call { peer, service, method, shards, slots })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_that_of_a_node_only_in_its_role() {
        let caller = |uri: &str| Caller {
            peer: Peer::certified(Some(uri.parse().unwrap()), None),
            access: Access::new(Some("c1".parse().unwrap()), SameCluster),
            service: "node.health.v1.HealthService",
            method: "HealthCheck".into(),
        };
        let n1 = "n1".parse().unwrap();
        for (uri, is_node, sends) in [
            ("node://c1/n1", true, true),
            ("operator://c1/n1", false, true),
            ("observer://c1/n1", false, false),
            ("node://c1/n2", false, false),
            ("operator://c1/alice", false, false),
        ] {
            let caller = caller(uri);
            for (decided, expected) in
                [(caller.claims("from", &n1), is_node), (caller.sends_as("from", &n1), sends)]
            {
                match decided {
                    Ok(()) => assert!(expected, "{uri}"),
                    Err(error) => {
                        assert!(!expected && error.is(CommonReason::PermissionDenied), "{uri}: {error}");
                        assert!(error.message().contains(uri), "{error}");
                    }
                }
            }
        }
    }
}

//! Who a peer is, by its certificate.
//!
//! A certificate names its owner in a SAN URI: `node://CLUSTER/NODE_ID` for a node, `operator://CLUSTER/NAME` and
//! `observer://CLUSTER/NAME` for people and tools. The cluster is empty (`node:///n1`) where clusters are not named. A certificate
//! without such a URI is that of the node whose ID its first DNS name is, in the cluster without a name. One with two such URIs that differ, or
//! with one that is not as it should be, names nobody.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

use crate::ids::{ClusterId, NodeId};
use crate::text::printable;

/// gRPC metadata in which a client may name the cluster that it means. A server of another cluster refuses the call; so a
/// wrong address is found out also in plaintext.
pub const CLUSTER_METADATA: &str = "node-cluster-id";

/// What a peer is there for. What each may do is for an `Authorizer` to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Role {
    /// A node of the cluster: sends and receives data.
    Node,
    /// A person or tool that starts, completes and cancels what moves.
    Operator,
    /// A person or tool that looks.
    Observer,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Node, Self::Operator, Self::Observer];

    /// The scheme of the URI that names one.
    #[must_use]
    pub const fn scheme(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Operator => "operator",
            Self::Observer => "observer",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.scheme())
    }
}

/// Whom a certificate names.
///
/// ```
/// use proto_common::peer::{PeerIdentity, Role};
/// let identity: PeerIdentity = "node://prod/n1".parse()?;
/// assert_eq!((identity.role, identity.id.as_str()), (Role::Node, "n1"));
/// assert_eq!(identity.to_string(), "node://prod/n1");
/// assert!("https://prod/n1".parse::<PeerIdentity>().is_err());
/// # Ok::<(), proto_common::peer::PeerIdentityError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerIdentity {
    /// What it is there for.
    pub role: Role,
    /// The cluster that it belongs to; `None` where clusters are not named.
    pub cluster: Option<ClusterId>,
    /// The ID of the node, or the name of the operator or observer.
    pub id: NodeId,
}

/// Why a URI names nobody.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("\"{shown}\" is not node://CLUSTER/NODE_ID, operator://CLUSTER/NAME or observer://CLUSTER/NAME")]
pub struct PeerIdentityError {
    shown: String,
}

impl PeerIdentity {
    /// The name of the cluster, empty if it has none.
    #[must_use]
    pub fn cluster_name(&self) -> &str {
        self.cluster.as_ref().map_or("", ClusterId::as_str)
    }
}

impl FromStr for PeerIdentity {
    type Err = PeerIdentityError;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (scheme, rest) = uri.split_once("://")?;
            let role = Role::ALL.into_iter().find(|role| role.scheme() == scheme)?;
            let (cluster, id) = rest.split_once('/')?;
            let cluster = if cluster.is_empty() { None } else { Some(ClusterId::new(cluster).ok()?) };
            Some(Self { role, cluster, id: NodeId::new(id).ok()? })
        };
        parse().ok_or_else(|| PeerIdentityError { shown: printable(uri, 256) })
    }
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}/{}", self.role, self.cluster_name(), self.id)
    }
}

/// The other end of a connection, as a server sees it. Cheap to clone.
///
/// The TLS listener puts one into the extensions of every request; a request without one came over a connection that proves
/// nothing.
#[derive(Debug, Clone, Default)]
pub struct Peer {
    identity: Option<Arc<PeerIdentity>>,
    address: Option<SocketAddr>,
    encrypted: bool,
}

impl Peer {
    /// A peer that has shown no certificate.
    #[must_use]
    pub fn anonymous() -> Self {
        Self::default()
    }

    /// A peer that is connected from `address` without TLS.
    #[must_use]
    pub fn plaintext(address: Option<SocketAddr>) -> Self {
        Self { address, ..Self::default() }
    }

    /// A peer that has proved by its certificate to be `identity`; `None` if that names nobody.
    #[must_use]
    pub fn certified(identity: Option<PeerIdentity>, address: Option<SocketAddr>) -> Self {
        Self { identity: identity.map(Arc::new), address, encrypted: true }
    }

    /// Whom its certificate names.
    #[must_use]
    pub fn identity(&self) -> Option<&PeerIdentity> {
        self.identity.as_deref()
    }

    /// From where it is connected, if that is known.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Whose share of what is limited by peer it gets.
    #[must_use]
    pub fn key(&self) -> PeerKey {
        match (&self.identity, self.address) {
            (Some(identity), _) => PeerKey::Identity(Arc::clone(identity)),
            (None, Some(address)) => PeerKey::Address(address.ip()),
            (None, None) => PeerKey::Unknown,
        }
    }

    /// Whether it is connected by TLS.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.encrypted
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.identity {
            Some(identity) => write!(f, "{identity}"),
            None => f.write_str("a peer without identity"),
        }
    }
}

/// What tells peers apart where each has a share: the owner of the certificate, however it is connected; without one, the address. Cheap to
/// clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PeerKey {
    /// Whom the certificate names.
    Identity(Arc<PeerIdentity>),
    /// From where it is connected.
    Address(IpAddr),
    /// Connected by something that has no addresses; all of these are one peer.
    Unknown,
}

impl fmt::Display for PeerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Identity(identity) => write!(f, "{identity}"),
            Self::Address(address) => write!(f, "{address}"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_name_peers() {
        for uri in ["node://c1/n1", "node:///n1", "operator://c1/alice", "observer:///grafana"] {
            assert_eq!(uri.parse::<PeerIdentity>().unwrap().to_string(), uri);
        }
        for uri in [
            "",
            "node://n1",
            "node://c1/",
            "node://c1/n1/x",
            "node://c/../n1",
            "NODE://c1/n1",
            "spiffe://c/n",
        ] {
            assert!(uri.parse::<PeerIdentity>().is_err(), "{uri}");
        }
    }

    #[test]
    fn a_certificate_has_one_share_wherever_its_owner_is_connected() {
        let at = |port| Some(SocketAddr::from(([10, 0, 0, 1], port)));
        let n1 = |port| Peer::certified(Some("node://c1/n1".parse().unwrap()), at(port)).key();
        assert_eq!(n1(1), n1(2));
        assert_ne!(n1(1), Peer::plaintext(at(1)).key());
        assert_eq!(Peer::plaintext(at(1)).key(), Peer::plaintext(at(2)).key());
        let shown = [n1(1), Peer::plaintext(at(1)).key(), Peer::anonymous().key()].map(|key| key.to_string());
        assert_eq!(shown, ["node://c1/n1", "10.0.0.1", "unknown"]);
    }
}

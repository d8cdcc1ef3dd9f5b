//! What a certificate says: whom it names, who signed it, until when.

use std::time::{Duration, SystemTime};

use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use super::chain::MAX_INTERMEDIATES;
use super::error::{self, TlsError};
use super::files::Names;
use super::provider;
use crate::ids::NodeId;
use crate::peer::{PeerIdentity, Role};

/// Whom it names: the SAN URI of one of our schemes, and where there is none, the first DNS name, which must be an ID (one with a wildcard is none).
///
/// Nobody, where such a URI is not as it should be, another one names somebody else, or there is one and none can be read: what is meant is for who signs to say, and a mistake there must
/// not make a node of an observer.
pub(super) fn identity(certificate: &CertificateDer<'_>) -> Option<PeerIdentity> {
    let parsed = EndEntityCert::try_from(certificate).ok()?;
    let mut named = parsed.valid_uri_names().filter(|uri| is_ours(uri)).map(str::parse::<PeerIdentity>);
    if let Some(first) = named.next() {
        let first = first.ok()?;
        return named.all(|other| other.as_ref() == Ok(&first)).then_some(first);
    }
    if mentions_ours(certificate) {
        return None;
    }
    let id = NodeId::new(parsed.valid_dns_names().next()?).ok()?;
    Some(PeerIdentity { role: Role::Node, cluster: None, id })
}

/// Whether the URI is meant to name a peer; schemes are told apart whatever their case (RFC 3986, 3.1), although only one is taken.
fn is_ours(uri: &str) -> bool {
    let scheme = uri.split(':').next().unwrap_or_default();
    Role::ALL.iter().any(|role| scheme.eq_ignore_ascii_case(role.scheme()))
}

/// Whether such a URI stands somewhere in it all the same: webpki shows none that is not UTF-8, and none that stands in the place of another kind of name.
fn mentions_ours(certificate: &[u8]) -> bool {
    Role::ALL.iter().any(|role| {
        let start = format!("{}://", role.scheme());
        certificate.windows(start.len()).any(|bytes| bytes.eq_ignore_ascii_case(start.as_bytes()))
    })
}

/// Checks that peers will take it, as a server's and as a client's.
pub(super) fn check_own(
    chain: &[CertificateDer<'_>],
    roots: &RootCertStore,
    now: SystemTime,
    names: &Names,
) -> Result<(), TlsError> {
    for usage in [KeyUsage::server_auth(), KeyUsage::client_auth()] {
        verify(chain, roots, now, usage).map_err(|problem| error::of_own(problem, now, names))?;
    }
    Ok(())
}

/// When the chain ends, found by asking whether it is valid in the year 2500.
pub(super) fn expires(chain: &[CertificateDer<'_>], roots: &RootCertStore) -> Option<SystemTime> {
    let far = SystemTime::UNIX_EPOCH + Duration::from_secs(16_725_225_600);
    match verify(chain, roots, far, KeyUsage::client_auth()) {
        Err(webpki::Error::CertExpired { not_after, .. }) => {
            SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(not_after.as_secs()))
        }
        _ => None,
    }
}

fn verify(
    chain: &[CertificateDer<'_>],
    roots: &RootCertStore,
    now: SystemTime,
    usage: KeyUsage,
) -> Result<(), webpki::Error> {
    let Some((first, rest)) = chain.split_first() else { return Err(webpki::Error::BadDer) };
    if rest.len() > MAX_INTERMEDIATES {
        return Err(webpki::Error::MaximumPathDepthExceeded);
    }
    let now = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
    let algorithms = provider().signature_verification_algorithms;
    EndEntityCert::try_from(first)?
        .verify_for_usage(algorithms.all, &roots.roots, rest, now, usage, None, None)
        .map(|_| ())
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, CustomExtension, KeyPair};

    use super::*;

    /// A certificate with these names, each with its tag and of less than 128 bytes.
    fn named(names: &[(u8, &[u8])]) -> Option<PeerIdentity> {
        let sequence =
            |tag: u8, content: &[u8]| [&[tag, u8::try_from(content.len()).unwrap()], content].concat();
        let names: Vec<u8> = names.iter().flat_map(|(tag, name)| sequence(*tag, name)).collect();
        let mut params = CertificateParams::default();
        params.custom_extensions =
            vec![CustomExtension::from_oid_content(&[2, 5, 29, 17], sequence(0x30, &names))];
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        identity(certificate.der())
    }

    #[test]
    fn a_name_that_cannot_be_read_makes_a_node_of_nobody() {
        const DNS: u8 = 0x82;
        const URI: u8 = 0x86;
        let node = |name: &str| Some(format!("node://c1/{name}").parse::<PeerIdentity>().unwrap());
        assert_eq!(named(&[(URI, b"node://c1/n1"), (DNS, b"n2")]), node("n1"));
        let by_dns = named(&[(URI, b"https://example.org"), (DNS, b"n2")]).unwrap();
        assert_eq!((by_dns.role, by_dns.id.as_str()), (Role::Node, "n2"));
        for unreadable in [&b"observer://c1/\xff"[..], b"Observer://c1/\xff", b"node://\xc3/n2"] {
            assert_eq!(named(&[(URI, unreadable), (DNS, b"n2")]), None, "{unreadable:?}");
        }
    }
}

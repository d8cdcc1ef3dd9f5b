//! A CA and what it signs, made anew in each test.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};

/// Seconds.
pub(crate) const DAY: i64 = 86_400;

/// Seconds since the Unix epoch.
pub(crate) fn now() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    i64::try_from(now.as_secs()).unwrap()
}

/// What a certificate says.
pub(crate) struct Issue {
    pub(crate) uri: Option<String>,
    pub(crate) dns: Vec<String>,
    /// Further URIs, behind the first.
    pub(crate) more: Vec<String>,
    pub(crate) not_before: i64,
    pub(crate) not_after: i64,
}

impl Issue {
    /// A certificate of that URI, valid now.
    pub(crate) fn uri(uri: &str) -> Self {
        Self {
            uri: Some(uri.to_owned()),
            dns: Vec::new(),
            more: Vec::new(),
            not_before: now() - 60,
            not_after: now() + DAY,
        }
    }

    /// A certificate of a node of cluster c1.
    pub(crate) fn node(id: &str) -> Self {
        Self::uri(&format!("node://c1/{id}"))
    }
}

pub(crate) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Ca {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    pub(crate) fn pem(&self) -> String {
        self.pem.clone()
    }

    /// Certificate and key, in PEM form.
    pub(crate) fn issue(&self, issue: &Issue) -> (String, String) {
        let mut params = CertificateParams::default();
        let at = |unix: i64| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(unix.try_into().unwrap());
        (params.not_before, params.not_after) = (at(issue.not_before), at(issue.not_after));
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "test");
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let uri = |uri: &String| SanType::URI(uri.as_str().try_into().unwrap());
        let uris = issue.uri.iter().chain(&issue.more).map(uri);
        let dns = issue.dns.iter().map(|dns| SanType::DnsName(dns.as_str().try_into().unwrap()));
        params.subject_alt_names = dns.chain(uris).collect();
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

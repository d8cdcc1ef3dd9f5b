//! Where certificates and keys come from, and how messages name that.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustls::RootCertStore;
use rustls::pki_types::pem::{Error as PemError, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::error::{TlsError, TlsProblem};

/// Largest file that is read: many times what a chain or a bundle of CAs takes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the CAs whose signature is trusted: the cluster's, and while it is replaced, the old and the new one.
    pub ca: PathBuf,
    /// The own certificate, then those between it and the CA, if any.
    pub certificate: PathBuf,
    /// The private key of the own certificate (PKCS#8, SEC1 or PKCS#1).
    pub key: PathBuf,
}

/// The same as [`TlsFiles`], in memory.
#[derive(Clone)]
pub struct TlsPem {
    /// As [`TlsFiles::ca`].
    pub ca: Vec<u8>,
    /// As [`TlsFiles::certificate`].
    pub certificate: Vec<u8>,
    /// As [`TlsFiles::key`].
    pub key: Vec<u8>,
}

impl std::fmt::Debug for TlsPem {
    /// Never the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsPem(..)")
    }
}

/// How messages name the three.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    pub(crate) ca: String,
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// What tells one state of the files from another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp([(u64, u64, i64, i64, i64, i64); 3]);

/// What was read.
pub(super) struct Read {
    ca: Vec<u8>,
    certificate: Vec<u8>,
    key: Vec<u8>,
    pub(super) names: Names,
}

impl From<TlsPem> for Read {
    fn from(TlsPem { ca, certificate, key }: TlsPem) -> Self {
        let names = Names {
            ca: "the CA".to_owned(),
            certificate: "the certificate".to_owned(),
            key: "the key".to_owned(),
        };
        Self { ca, certificate, key, names }
    }
}

impl TlsFiles {
    pub(super) fn read(&self) -> Result<Read, TlsError> {
        let Self { ca, certificate, key } = self;
        let name = |path: &Path| path.display().to_string();
        Ok(Read {
            ca: read(ca)?,
            certificate: read(certificate)?,
            key: read(key)?,
            names: Names { ca: name(ca), certificate: name(certificate), key: name(key) },
        })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let unreadable = |error: std::io::Error| {
        TlsError::new(TlsProblem::Unreadable, format!("{} cannot be read: {error}", path.display()))
    };
    let len = std::fs::metadata(path).map_err(unreadable)?.len();
    if len > MAX_FILE_BYTES {
        let what = format!("{} has {len} bytes, which no certificate or key has", path.display());
        return Err(TlsError::new(TlsProblem::Malformed, what));
    }
    std::fs::read(path).map_err(unreadable)
}

impl Stamp {
    /// `None` while one of them is not there.
    pub(super) fn of(files: &TlsFiles) -> Option<Self> {
        let TlsFiles { ca, certificate, key } = files;
        let of = |path: &Path| {
            let found = std::fs::metadata(path).ok()?;
            let (modified, changed) =
                ((found.mtime(), found.mtime_nsec()), (found.ctime(), found.ctime_nsec()));
            Some((found.ino(), found.len(), modified.0, modified.1, changed.0, changed.1))
        };
        Some(Self([of(ca)?, of(certificate)?, of(key)?]))
    }
}

impl Read {
    pub(super) fn roots(&self) -> Result<RootCertStore, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.ca, &self.names.ca)? {
            roots.add(certificate).map_err(|error| self.names.ca_refused(&error.to_string()))?;
        }
        Ok(roots)
    }

    /// At least one.
    pub(super) fn chain(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        certificates(&self.certificate, &self.names.certificate)
    }

    pub(super) fn key(&self) -> Result<PrivateKeyDer<'static>, TlsError> {
        PrivateKeyDer::from_pem_slice(&self.key).map_err(|error| {
            let what = match error {
                PemError::NoItemsFound => "holds no private key in PEM form".to_owned(),
                error => format!("is damaged: {error}"),
            };
            TlsError::new(TlsProblem::Malformed, format!("{} {what}", self.names.key))
        })
    }
}

fn certificates(pem: &[u8], name: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let refused = |what: String| TlsError::new(TlsProblem::Malformed, format!("{name} {what}"));
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|error| refused(format!("is damaged: {error}")))?;
    if found.is_empty() {
        return Err(refused("holds no certificate in PEM form".to_owned()));
    }
    Ok(found)
}

impl Names {
    pub(super) fn ca_refused(&self, why: &str) -> TlsError {
        TlsError::new(TlsProblem::Malformed, format!("{} cannot be used: {why}", self.ca))
    }

    pub(super) fn key_refused(&self, error: rustls::Error) -> TlsError {
        match error {
            rustls::Error::InconsistentKeys(_) => TlsError::new(
                TlsProblem::KeyMismatch,
                format!(
                    "key does not match certificate: {} is not the key of {}",
                    self.key, self.certificate
                ),
            ),
            error => TlsError::new(TlsProblem::Malformed, format!("{} cannot be used: {error}", self.key)),
        }
    }
}

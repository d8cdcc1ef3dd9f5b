//! Mutual TLS between nodes: certificates that prove who a peer is, replaced without a restart.
//!
//! | question | where |
//! |---|---|
//! | where do certificates come from, and when are they replaced? | [`Tls`] |
//! | what is wrong with a file? | [`TlsError`] |
//! | how are connections accepted? | `TlsIncoming` (feature `listen`) |
//! | how are connections made? | [`dial`](crate::dial) (feature `channel`) |
//!
//! Fixed on purpose: TLS 1.3 only (all peers are of one make, nothing older has to connect), ALPN `h2`, both sides show a certificate,
//! no session resumption (connections live long, and a resumed session would outlive a certificate), *ring* as the provider (it needs
//! no tool but a C compiler).
//!
//! Not checked: revocation lists. A certificate that is lost is out when it expires, or when the CA is replaced; so keep them
//! short-lived.

mod certificate;
mod chain;
mod error;
mod files;

#[cfg(all(feature = "client", feature = "channel"))]
pub(crate) mod connect;
#[cfg(feature = "listen")]
mod incoming;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use rustls::crypto::CryptoProvider;
#[cfg(feature = "listen")]
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};

pub use error::{TlsError, TlsProblem};
pub use files::{TlsFiles, TlsPem};
#[cfg(feature = "listen")]
pub use incoming::{TlsConnection, TlsIncoming, TlsLimits};

use self::files::{Read, Stamp};
use crate::peer::PeerIdentity;

/// The only protocol that is spoken inside.
const ALPN: &[u8] = b"h2";

/// How often files should be looked at, which costs three calls of `stat`; for [`Tls::follow`].
pub const RELOAD_INTERVAL: Duration = Duration::from_secs(1);

/// The certificate of this process, its key, and the CAs that it trusts. Cheap to clone; all clones are one.
///
/// ```no_run
/// # async fn example() -> Result<(), proto_common::tls::TlsError> {
/// use proto_common::tls::{RELOAD_INTERVAL, Tls, TlsFiles};
/// let tls = Tls::from_files(TlsFiles { ca: "ca.crt".into(), certificate: "n1.crt".into(), key: "n1.key".into() })?;
/// println!("this is {}", tls.identity());
/// let following = tls.clone();
/// tokio::spawn(async move { following.follow(RELOAD_INTERVAL, |outcome| println!("{outcome:?}")).await });
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Tls(Arc<Shared>);

struct Shared {
    files: Option<TlsFiles>,
    current: RwLock<Arc<Loaded>>,
    /// Of the files that `current` was read from, or that were refused last. Whoever reloads holds it.
    tried: Mutex<Tried>,
}

struct Tried {
    stamp: Option<Stamp>,
    refused: Option<String>,
}

/// What one connection is made with.
pub(crate) struct Loaded {
    pub(crate) identity: PeerIdentity,
    /// When the own certificate, or one that it depends on, ends.
    pub(crate) expires: Option<SystemTime>,
    #[cfg(all(feature = "client", feature = "channel"))]
    pub(crate) roots: Arc<rustls::RootCertStore>,
    #[cfg(all(feature = "client", feature = "channel"))]
    pub(crate) key: Arc<SingleCertAndKey>,
    #[cfg(feature = "listen")]
    pub(crate) server: Arc<rustls::ServerConfig>,
    /// How messages name the files.
    #[cfg(all(feature = "client", feature = "channel"))]
    pub(crate) names: files::Names,
}

impl std::fmt::Debug for Tls {
    /// Never the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("identity", &self.identity()).finish_non_exhaustive()
    }
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

impl Tls {
    /// From files, which [`reload`](Self::reload) and [`follow`](Self::follow) read again.
    ///
    /// Reads files; call it where blocking is fine.
    ///
    /// # Errors
    ///
    /// Each names the file and what is wrong: not there, not PEM, expired, not yet valid, not signed by the CA, key of another
    /// certificate, a certificate that names nobody.
    pub fn from_files(files: TlsFiles) -> Result<Self, TlsError> {
        let stamp = Stamp::of(&files);
        let loaded = load(&files.read()?)?;
        Ok(Self::new(loaded, Some(files), stamp))
    }

    /// From memory. It can't be reloaded; make another one.
    ///
    /// # Errors
    ///
    /// As [`from_files`](Self::from_files).
    pub fn from_pem(pem: TlsPem) -> Result<Self, TlsError> {
        Ok(Self::new(load(&pem.into())?, None, None))
    }

    fn new(loaded: Loaded, files: Option<TlsFiles>, stamp: Option<Stamp>) -> Self {
        Self(Arc::new(Shared {
            files,
            current: RwLock::new(Arc::new(loaded)),
            tried: Mutex::new(Tried { stamp, refused: None }),
        }))
    }

    pub(crate) fn current(&self) -> Arc<Loaded> {
        Arc::clone(&self.0.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whom the own certificate names.
    #[must_use]
    pub fn identity(&self) -> PeerIdentity {
        self.current().identity.clone()
    }

    /// When the own certificate, or one of the CA's that it depends on, expires.
    #[must_use]
    pub fn expires(&self) -> Option<SystemTime> {
        self.current().expires
    }

    /// Reads the files again, changed or not. New connections use what they hold now; open ones go on with what they have.
    ///
    /// Reads files; call it where blocking is fine. Does nothing for what came from memory.
    ///
    /// # Errors
    ///
    /// As [`from_files`](Self::from_files), and [`TlsProblem::OtherIdentity`] for a certificate that names somebody else than the one
    /// before; then all stays as it was.
    pub fn reload(&self) -> Result<(), TlsError> {
        let Some(files) = &self.0.files else { return Ok(()) };
        let mut tried = self.tried();
        // Before the files are read: what changes meanwhile is found to have changed.
        tried.stamp = Stamp::of(files);
        let replaced = files.read().and_then(|read| load(&read)).and_then(|loaded| self.replace(loaded));
        tried.refused = replaced.as_ref().err().map(ToString::to_string);
        replaced
    }

    fn replace(&self, loaded: Loaded) -> Result<(), TlsError> {
        let mut current = self.0.current.write().unwrap_or_else(PoisonError::into_inner);
        if loaded.identity != current.identity {
            return Err(error::other_identity(&current.identity, &loaded.identity));
        }
        *current = Arc::new(loaded);
        Ok(())
    }

    fn tried(&self) -> MutexGuard<'_, Tried> {
        self.0.tried.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`reload`](Self::reload), if a file differs in time, size or inode from what was read last, or was refused last.
    /// `None`: nothing is new, and nothing is newly wrong.
    ///
    /// # Errors
    ///
    /// As `reload`; the same error is told once.
    pub fn reload_if_changed(&self) -> Option<Result<(), TlsError>> {
        let files = self.0.files.as_ref()?;
        let refused = {
            let tried = self.tried();
            // A file that was half written may be whole now although its time is the same.
            if tried.refused.is_none() && tried.stamp == Stamp::of(files) {
                return None;
            }
            tried.refused.clone()
        };
        match self.reload() {
            Err(error) if refused == Some(error.to_string()) => None,
            outcome => Some(outcome),
        }
    }

    /// Looks at the files every `interval` and [reloads](Self::reload_if_changed) them; `tell` hears of each outcome. Never returns
    /// for files, and at once for what came from memory. Cancel safe.
    pub async fn follow(&self, interval: Duration, mut tell: impl FnMut(Result<(), TlsError>)) {
        while self.0.files.is_some() {
            tokio::time::sleep(interval).await;
            let tls = self.clone();
            if let Ok(Some(outcome)) = tokio::task::spawn_blocking(move || tls.reload_if_changed()).await {
                tell(outcome);
            }
        }
    }
}

fn load(read: &Read) -> Result<Loaded, TlsError> {
    let provider = provider();
    let (roots, chain, key) = (read.roots()?, read.chain()?, read.key()?);
    let now = SystemTime::now();
    certificate::check_own(&chain, &roots, now, &read.names)?;
    let identity =
        certificate::identity(&chain[0]).ok_or_else(|| error::nameless(&read.names.certificate))?;
    let expires = certificate::expires(&chain, &roots);
    let key = CertifiedKey::from_der(chain, key, &provider).map_err(|error| read.names.key_refused(error))?;
    let key = Arc::new(SingleCertAndKey::from(key));
    let roots = Arc::new(roots);
    #[cfg(feature = "listen")]
    let server = {
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| read.names.ca_refused(&error.to_string()))?;
        let mut server = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| read.names.ca_refused(&error.to_string()))?
            .with_client_cert_verifier(Arc::new(chain::ShortChains(verifier)))
            .with_cert_resolver(Arc::clone(&key) as Arc<dyn rustls::server::ResolvesServerCert>);
        server.alpn_protocols = vec![ALPN.to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Arc::new(server)
    };
    Ok(Loaded {
        identity,
        expires,
        #[cfg(all(feature = "client", feature = "channel"))]
        roots,
        #[cfg(all(feature = "client", feature = "channel"))]
        key,
        #[cfg(feature = "listen")]
        server,
        #[cfg(all(feature = "client", feature = "channel"))]
        names: read.names.clone(),
    })
}

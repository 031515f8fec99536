//! TLS, and the only door to rustls: server side for listeners, client side for upstreams.
//!
//! Promises: TLS 1.2 and 1.3 only; the ring provider is passed explicitly, never installed for the process; ChaCha20-Poly1305 goes
//! first where the processor has no AES instructions (a Raspberry Pi 4 and older), by our order, not the peer's. A [`Server`] never
//! changes: reload builds another one and swaps it, connections keep the one they began with. Private keys that others may read are refused.
//!
//! A client certificate is asked for, not demanded, and any self-signed one will do: the handshake proves that the peer holds its key,
//! and the registry decides what that key means. Names and dates in it are not looked at.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{CipherSuite, DigitallySignedStruct, DistinguishedName, InconsistentKeys, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// A TLS stream of the server side.
pub type ServerStream<IO> = tokio_rustls::server::TlsStream<IO>;
/// A TLS stream of the client side.
pub type ClientStream<IO> = tokio_rustls::client::TlsStream<IO>;

/// RFC 9266 section 4.2: 32 bytes under this label, with an empty context.
const EXPORTER_LABEL: &[u8] = b"EXPORTER-Channel-Binding";
/// No certificate chain or bundle of roots is larger; a bigger file is not what it claims.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// An Ed25519 SubjectPublicKeyInfo up to the key itself (RFC 8410 section 4).
const ED25519_SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// An application protocol by its ALPN name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alpn {
    Mqtt,
    Http2,
    Http1,
    Coap,
}

impl Alpn {
    /// The registered protocol name.
    pub const fn name(self) -> &'static [u8] {
        match self {
            Alpn::Mqtt => b"mqtt",
            Alpn::Http2 => b"h2",
            Alpn::Http1 => b"http/1.1",
            Alpn::Coap => b"coap",
        }
    }

    fn from_name(name: &[u8]) -> Option<Self> {
        [Alpn::Mqtt, Alpn::Http2, Alpn::Http1, Alpn::Coap].into_iter().find(|alpn| alpn.name() == name)
    }
}

/// What a finished handshake says about the peer.
#[derive(Clone, Debug)]
pub struct TlsInfo {
    /// Agreed on by ALPN; `None` when the client offered none.
    pub alpn: Option<Alpn>,
    /// The channel binding `tls-exporter` (RFC 9266): the same at both ends of this connection, and nowhere else. Not a secret, but not to be logged.
    pub exporter: [u8; 32],
    /// The key of the client's certificate, which the handshake proved it holds, when it is an Ed25519 key.
    pub client_key: Option<[u8; 32]>,
}

/// Where an identity for TLS comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyPair {
    /// PEM, end-entity certificate first, then the intermediates.
    pub certificate: PathBuf,
    /// PEM: PKCS #8, PKCS #1 or SEC 1; not encrypted.
    pub key: PathBuf,
}

/// Why there is no TLS. All are the operator's to mend.
#[derive(Debug)]
pub enum Error {
    /// The file cannot be read.
    File { path: PathBuf, source: io::Error },
    /// The file is larger than any certificate file is.
    TooLarge { path: PathBuf, bytes_max: u64 },
    /// No certificate in the file.
    NoCertificate { path: PathBuf },
    /// A certificate in the file is not one.
    BadCertificate { path: PathBuf },
    /// No private key in the file, or an encrypted one.
    NoKey { path: PathBuf },
    /// A key of a kind that is not supported.
    BadKey { path: PathBuf, source: rustls::Error },
    /// Anyone on the machine may read the key.
    KeyReadable { path: PathBuf, mode: u32 },
    /// The key belongs to another certificate.
    KeyMismatch { certificate: PathBuf, key: PathBuf },
    /// The platform's list of certificate authorities is empty or unreadable.
    NoRoots,
    /// Neither a host name nor an address.
    BadServerName { name: String },
    /// The library refused the combination.
    Setup { source: rustls::Error },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::File { path, source } => write!(f, "cannot read {}: {source}", path.display()),
            Error::TooLarge { path, bytes_max } => {
                write!(f, "{} is larger than {bytes_max} bytes and no PEM file of ours", path.display())
            }
            Error::NoCertificate { path } => {
                write!(f, "{} contains no certificate (expected PEM, BEGIN CERTIFICATE)", path.display())
            }
            Error::BadCertificate { path } => {
                write!(f, "{} contains a certificate that does not parse", path.display())
            }
            Error::NoKey { path } => {
                write!(f, "{} contains no unencrypted private key (expected PEM, BEGIN PRIVATE KEY)", path.display())
            }
            Error::BadKey { path, source } => write!(f, "the key in {} cannot be used: {source}", path.display()),
            Error::KeyReadable { path, mode } => write!(
                f,
                "the private key {} is open to every user (mode {mode:04o}); run chmod 600 on it",
                path.display()
            ),
            Error::KeyMismatch { certificate, key } => {
                write!(f, "the key {} does not belong to the certificate {}", key.display(), certificate.display())
            }
            Error::NoRoots => f.write_str("no certificate authorities found on this system; name a ca_file"),
            Error::BadServerName { name } => write!(f, "\"{name}\" is neither a host name nor an address"),
            Error::Setup { source } => write!(f, "TLS cannot be set up: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::File { source, .. } => Some(source),
            Error::BadKey { source, .. } | Error::Setup { source } => Some(source),
            Error::TooLarge { .. }
            | Error::NoCertificate { .. }
            | Error::BadCertificate { .. }
            | Error::NoKey { .. }
            | Error::KeyReadable { .. }
            | Error::KeyMismatch { .. }
            | Error::NoRoots
            | Error::BadServerName { .. } => None,
        }
    }
}

/// The server side of one listener. Cheap to clone.
#[derive(Clone)]
pub struct Server {
    acceptor: TlsAcceptor,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Server")
    }
}

impl Server {
    /// Reads certificate and key and prepares a server that offers `alpn` in this order.
    ///
    /// Blocks on file reads. With `ask_for_certificate` a client may identify itself by certificate.
    ///
    /// # Errors
    /// See [`Error`]; the files are read now, so that a bad one is found at start or reload, not by a device.
    pub fn new(identity: &KeyPair, alpn: &[Alpn], ask_for_certificate: bool) -> Result<Self, Error> {
        let (provider, ours_first) = provider();
        let certified = certified_key(identity, &provider)?;
        let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(rustls::ALL_VERSIONS)
            .map_err(|source| Error::Setup { source })?;
        let builder = if ask_for_certificate {
            builder.with_client_cert_verifier(Arc::new(AnyCertificate(provider.signature_verification_algorithms)))
        } else {
            builder.with_no_client_auth()
        };
        let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
        config.alpn_protocols = alpn.iter().map(|alpn| alpn.name().to_vec()).collect();
        config.ignore_client_order = ours_first;
        // Stateless: a device that comes back skips the signature, and a million of them cost no memory here.
        config.ticketer = rustls::crypto::ring::Ticketer::new().map_err(|source| Error::Setup { source })?;
        config.send_tls13_tickets = 1;
        Ok(Server { acceptor: TlsAcceptor::from(Arc::new(config)) })
    }

    /// Performs the handshake. The deadline is the caller's.
    ///
    /// # Errors
    /// What the peer or the network did wrong; the alert has been sent.
    ///
    /// # Cancel safety
    /// Dropping the future drops the connection.
    pub async fn accept<IO>(&self, io: IO) -> io::Result<(ServerStream<IO>, TlsInfo)>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let stream = self.acceptor.accept(io).await?;
        let (_, connection) = stream.get_ref();
        let exporter =
            connection.export_keying_material([0; 32], EXPORTER_LABEL, Some(&[])).map_err(io::Error::other)?;
        let info = TlsInfo {
            alpn: connection.alpn_protocol().and_then(Alpn::from_name),
            exporter,
            client_key: connection.peer_certificates().and_then(|chain| chain.first()).and_then(ed25519_key),
        };
        Ok((stream, info))
    }
}

/// Whom a client trusts and who it is.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ClientConfig {
    /// PEM file of certificate authorities; `None`: those of the platform.
    pub ca_file: Option<PathBuf>,
    /// A certificate for upstreams that ask for one.
    pub identity: Option<KeyPair>,
    /// Offered in this order.
    pub alpn: Vec<Alpn>,
}

/// The client side towards one upstream. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    connector: TlsConnector,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}

impl Client {
    /// Reads roots and identity. Blocks on file reads.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn new(config: &ClientConfig) -> Result<Self, Error> {
        let (provider, _) = provider();
        let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(rustls::ALL_VERSIONS)
            .map_err(|source| Error::Setup { source })?
            .with_root_certificates(roots(config.ca_file.as_deref())?);
        let mut client = match &config.identity {
            None => builder.with_no_client_auth(),
            Some(identity) => {
                let certified = certified_key(identity, &provider)?;
                builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
            }
        };
        client.alpn_protocols = config.alpn.iter().map(|alpn| alpn.name().to_vec()).collect();
        Ok(Client { connector: TlsConnector::from(Arc::new(client)) })
    }

    /// Performs the handshake with the server that must prove to be `host` (a name or an address). Returns the agreed ALPN.
    ///
    /// # Errors
    /// The certificate, the peer or the network; `InvalidInput` when `host` is no host.
    pub async fn connect<IO>(&self, host: &str, io: IO) -> io::Result<(ClientStream<IO>, Option<Alpn>)>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let name = server_name(host).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let stream = self.connector.connect(name, io).await?;
        let alpn = stream.get_ref().1.alpn_protocol().and_then(Alpn::from_name);
        Ok((stream, alpn))
    }
}

/// Accepts any client certificate whose key the client holds.
#[derive(Debug)]
struct AnyCertificate(WebPkiSupportedAlgorithms);

impl ClientCertVerifier for AnyCertificate {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        ParsedCertificate::try_from(end_entity)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

/// Ring, with the cipher suites in the order that suits this processor, and whether that order is worth insisting on.
fn provider() -> (Arc<CryptoProvider>, bool) {
    let mut provider = rustls::crypto::ring::default_provider();
    let slow_aes = !has_aes();
    if slow_aes {
        // A stable sort: ChaCha20 first, the rest as the library ranks it; TLS 1.3 suites are tried by version anyway.
        provider.cipher_suites.sort_by_key(|suite| !is_chacha20(suite.suite()));
    }
    (Arc::new(provider), slow_aes)
}

fn is_chacha20(suite: CipherSuite) -> bool {
    matches!(
        suite,
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
            | CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
            | CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256
    )
}

#[cfg(target_arch = "x86_64")]
fn has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes")
}

#[cfg(target_arch = "aarch64")]
fn has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn has_aes() -> bool {
    false
}

fn certified_key(identity: &KeyPair, provider: &CryptoProvider) -> Result<CertifiedKey, Error> {
    let chain = certificates(&identity.certificate)?;
    refuse_open_key(&identity.key)?;
    let pem = read(&identity.key)?;
    let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| Error::NoKey { path: identity.key.clone() })?;
    CertifiedKey::from_der(chain, key, provider).map_err(|source| match source {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            Error::KeyMismatch { certificate: identity.certificate.clone(), key: identity.key.clone() }
        }
        rustls::Error::InvalidCertificate(_) => Error::BadCertificate { path: identity.certificate.clone() },
        source => Error::BadKey { path: identity.key.clone(), source },
    })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let pem = read(path)?;
    let chain = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| Error::BadCertificate { path: path.to_owned() })?;
    if chain.is_empty() {
        return Err(Error::NoCertificate { path: path.to_owned() });
    }
    Ok(chain)
}

fn roots(ca_file: Option<&Path>) -> Result<rustls::RootCertStore, Error> {
    let mut store = rustls::RootCertStore::empty();
    match ca_file {
        Some(path) => {
            for certificate in certificates(path)? {
                store.add(certificate).map_err(|_| Error::BadCertificate { path: path.to_owned() })?;
            }
        }
        None => {
            // Some roots of a platform may not parse; the others still count.
            let found = rustls_native_certs::load_native_certs();
            let (added, _ignored) = store.add_parsable_certificates(found.certs);
            if added == 0 {
                return Err(Error::NoRoots);
            }
        }
    }
    Ok(store)
}

fn server_name(host: &str) -> Result<ServerName<'static>, Error> {
    let refuse = || Error::BadServerName { name: host.to_owned() };
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    match bare.parse::<IpAddr>() {
        Ok(address) => Ok(ServerName::IpAddress(address.into())),
        Err(_) => ServerName::try_from(bare.to_owned()).map_err(|_| refuse()),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::File { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path).map_err(failed)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(Error::TooLarge { path: path.to_owned(), bytes_max: FILE_BYTES_MAX });
    }
    Ok(bytes)
}

/// A key that its group may read is common practice (`ssl-cert`); one that everybody may read is a mistake.
#[cfg(unix)]
fn refuse_open_key(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    let mode =
        std::fs::metadata(path).map_err(|source| Error::File { path: path.to_owned(), source })?.permissions().mode()
            & 0o7777;
    if mode & 0o007 != 0 {
        return Err(Error::KeyReadable { path: path.to_owned(), mode });
    }
    Ok(())
}

#[cfg(not(unix))]
fn refuse_open_key(_path: &Path) -> Result<(), Error> {
    Ok(())
}

/// The Ed25519 key of a certificate, if it has one.
fn ed25519_key(certificate: &CertificateDer<'_>) -> Option<[u8; 32]> {
    let spki = ParsedCertificate::try_from(certificate).ok()?.subject_public_key_info();
    spki.strip_prefix(ED25519_SPKI_PREFIX.as_slice())?.try_into().ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// A self-signed identity for `localhost` in `folder`.
    pub(crate) fn identity(folder: &Path, name: &str) -> KeyPair {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        write(folder, name, &made.cert.pem(), &made.signing_key.serialize_pem())
    }

    fn write(folder: &Path, name: &str, certificate: &str, key: &str) -> KeyPair {
        let pair = KeyPair { certificate: folder.join(format!("{name}.crt")), key: folder.join(format!("{name}.key")) };
        std::fs::write(&pair.certificate, certificate).unwrap();
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        options.open(&pair.key).unwrap().write_all(key.as_bytes()).unwrap();
        pair
    }

    fn ed25519_identity(folder: &Path, name: &str) -> (KeyPair, [u8; 32]) {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let certificate =
            rcgen::CertificateParams::new(vec!["sensor-1".to_owned()]).unwrap().self_signed(&key).unwrap();
        let public: [u8; 32] = key.public_key_raw().try_into().unwrap();
        (write(folder, name, &certificate.pem(), &key.serialize_pem()), public)
    }

    async fn handshake(server: &Server, client: &Client) -> io::Result<(TlsInfo, Option<Alpn>, [u8; 32])> {
        let (near, far) = tokio::io::duplex(4096);
        let server = server.clone();
        let accepting = tokio::spawn(async move {
            let (mut stream, info) = server.accept(far).await?;
            let mut ping = [0; 4];
            stream.read_exact(&mut ping).await?;
            stream.write_all(&ping).await?;
            io::Result::Ok(info)
        });
        let (mut stream, alpn) = client.connect("localhost", near).await?;
        stream.write_all(b"ping").await?;
        let mut pong = [0; 4];
        stream.read_exact(&mut pong).await?;
        let binding = stream.get_ref().1.export_keying_material([0; 32], EXPORTER_LABEL, Some(&[])).unwrap();
        Ok((accepting.await.unwrap()?, alpn, binding))
    }

    #[tokio::test]
    async fn both_ends_agree_on_the_protocol_and_the_channel_binding() {
        let folder = tempfile::tempdir().unwrap();
        let pair = identity(folder.path(), "gateway");
        let server = Server::new(&pair, &[Alpn::Mqtt, Alpn::Http2], true).unwrap();
        let config = ClientConfig {
            ca_file: Some(pair.certificate.clone()),
            alpn: vec![Alpn::Http1, Alpn::Http2],
            ..ClientConfig::default()
        };
        let (info, alpn, binding) = handshake(&server, &Client::new(&config).unwrap()).await.unwrap();
        assert_eq!((info.alpn, alpn), (Some(Alpn::Http2), Some(Alpn::Http2)));
        assert_eq!(info.exporter, binding);
        assert_ne!(binding, [0; 32]);
        assert_eq!(info.client_key, None);
    }

    #[tokio::test]
    async fn a_self_signed_ed25519_client_certificate_shows_its_key() {
        let folder = tempfile::tempdir().unwrap();
        let pair = identity(folder.path(), "gateway");
        let (device, public) = ed25519_identity(folder.path(), "device");
        let config =
            ClientConfig { ca_file: Some(pair.certificate.clone()), identity: Some(device), ..ClientConfig::default() };
        let client = Client::new(&config).unwrap();
        let (info, alpn, _) = handshake(&Server::new(&pair, &[], true).unwrap(), &client).await.unwrap();
        assert_eq!((info.client_key, info.alpn, alpn), (Some(public), None, None));
        let (info, ..) = handshake(&Server::new(&pair, &[], false).unwrap(), &client).await.unwrap();
        assert_eq!(info.client_key, None, "not asked for, not sent");
    }

    #[tokio::test]
    async fn a_server_that_is_not_trusted_or_not_the_one_named_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let pair = identity(folder.path(), "gateway");
        let other = identity(folder.path(), "other");
        let server = Server::new(&pair, &[], false).unwrap();
        let config = ClientConfig { ca_file: Some(other.certificate), ..ClientConfig::default() };
        assert!(handshake(&server, &Client::new(&config).unwrap()).await.is_err());
        let config = ClientConfig { ca_file: Some(pair.certificate), ..ClientConfig::default() };
        let (near, far) = tokio::io::duplex(4096);
        tokio::spawn(async move { server.accept(far).await.map(|_| ()) });
        assert!(Client::new(&config).unwrap().connect("example.org", near).await.is_err());
    }

    #[test]
    fn every_mistake_with_the_files_is_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let good = identity(folder.path(), "good");
        let other = identity(folder.path(), "other");
        let build = |certificate: &Path, key: &Path| {
            let pair = KeyPair { certificate: certificate.to_owned(), key: key.to_owned() };
            Server::new(&pair, &[], false).unwrap_err()
        };
        let missing = folder.path().join("missing.crt");
        assert!(matches!(build(&missing, &good.key), Error::File { path, .. } if path == missing));
        assert!(matches!(build(&good.certificate, &missing), Error::File { path, .. } if path == missing));
        assert!(matches!(build(&good.key, &good.key), Error::NoCertificate { .. }));
        assert!(matches!(build(&good.certificate, &other.key), Error::KeyMismatch { .. }));
        let open = folder.path().join("open.key");
        std::fs::copy(&good.key, &open).unwrap();
        std::fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        let error = build(&good.certificate, &open);
        assert!(matches!(error, Error::KeyReadable { mode: 0o644, .. }), "{error}");
        assert!(error.to_string().contains("0644"));
        let garbage =
            write(folder.path(), "garbage", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "no key");
        assert!(matches!(build(&garbage.certificate, &good.key), Error::BadCertificate { .. }));
        assert!(matches!(build(&good.certificate, &garbage.key), Error::NoKey { .. }));
    }

    #[test]
    fn chacha20_comes_first_where_aes_is_slow() {
        let mut provider = rustls::crypto::ring::default_provider();
        provider.cipher_suites.sort_by_key(|suite| !is_chacha20(suite.suite()));
        let chacha = provider.cipher_suites.iter().take_while(|suite| is_chacha20(suite.suite())).count();
        assert_eq!(chacha, 3);
        assert_eq!(provider.cipher_suites.len(), rustls::crypto::ring::DEFAULT_CIPHER_SUITES.len());
        assert_eq!(super::provider().1, !has_aes());
    }

    #[test]
    fn hosts_are_names_or_addresses() {
        for good in ["localhost", "broker.example", "192.0.2.1", "2001:db8::1", "[2001:db8::1]"] {
            assert!(server_name(good).is_ok(), "{good}");
        }
        for bad in ["", "a b", "http://x", "x:1"] {
            assert!(matches!(server_name(bad), Err(Error::BadServerName { .. })), "{bad}");
        }
    }
}

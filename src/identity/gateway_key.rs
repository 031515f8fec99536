//! `gateway.key`: the gateway's own Ed25519 key, PKCS#8 in PEM, readable by its owner alone.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use tidegate_auth::keyfile::{public_to_pem, secret_from_text, secret_to_pem};
use tidegate_auth::{GatewayId, PublicKey, SecretKey, Zeroizing};

use super::error::Error;
use super::registry::Registry;

/// The gateway's identity, which devices pin.
pub struct GatewayKey {
    pub(super) secret: SecretKey,
    pub public: PublicKey,
    pub id: GatewayId,
}

impl GatewayKey {
    pub const FILE: &str = "gateway.key";
    /// The public half beside it, for devices and for people who carry it to them.
    pub const PUBLIC_FILE: &str = "gateway.pub";

    /// Reads `gateway.key` in `data_dir`; makes it if there is none and no device could have pinned one.
    ///
    /// # Errors
    /// For a key that others can read, that is none, or that is missing while the registry has devices.
    pub fn open(data_dir: &Path, registry: &Registry) -> Result<GatewayKey, Error> {
        let path = data_dir.join(GatewayKey::FILE);
        match fs::symlink_metadata(&path) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {
                if registry.device_count()? > 0 {
                    return Err(Error::GatewayKeyLost { path });
                }
                let secret = SecretKey::from_seed(&super::random()?);
                match write_new(&path, secret_to_pem(&secret).as_bytes(), 0o600) {
                    // Another process was first; its key is the key.
                    Err(Error::Io { source, .. }) if source.kind() == ErrorKind::AlreadyExists => {}
                    other => other?,
                }
            }
            Err(error) => return Err(Error::io("read", &path)(error)),
        }
        let secret = read_secret(&path)?;
        let public = secret.public();
        let public_path = data_dir.join(GatewayKey::PUBLIC_FILE);
        let pem = public_to_pem(&public);
        if fs::read_to_string(&public_path).ok().as_deref() != Some(&pem) {
            // A convenience: a read-only directory is no reason to stop.
            if let Err(error) = fs::write(&public_path, pem) {
                tracing::debug!(%error, "gateway.pub not written");
            }
        }
        Ok(GatewayKey { id: GatewayId::of(&public), public, secret })
    }
}

impl fmt::Debug for GatewayKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GatewayKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Reads a private key from a file that only its owner can read.
///
/// # Errors
/// If the file cannot be read, can be read by others, or is no key.
pub fn read_secret(path: &Path) -> Result<SecretKey, Error> {
    // Judged on the open file, so that what was judged is what is read.
    let file = File::open(path).map_err(Error::io("read", path))?;
    let metadata = file.metadata().map_err(Error::io("read", path))?;
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(Error::Permissions { path: path.to_owned(), mode });
    }
    let mut text = key_text();
    file.take(KEY_FILE_BYTES_MAX).read_to_string(&mut text).map_err(Error::io("read", path))?;
    secret_from_text(&text).map_err(|source| Error::GatewayKey { path: path.to_owned(), source })
}

/// Writes a file that must not exist yet, whole or not at all, and on the disk when this returns.
///
/// # Errors
/// With kind `AlreadyExists` if it does, and if it cannot be written.
pub fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    let draft = draft_of(path)?;
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        // Unlike a rename, a link never replaces what is there.
        fs::hard_link(&draft, path)
    })();
    // The draft is ours alone; if it cannot be removed, it is only litter.
    let _ = fs::remove_file(&draft);
    written.map_err(Error::io("write", path))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io("write", folder))
}

/// A name beside `path` that nobody else has.
pub(super) fn draft_of(path: &Path) -> Result<PathBuf, Error> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", tidegate_auth::text::hex(&super::random::<8>()?)));
    Ok(path.with_file_name(name))
}

/// Room for a key's text up front, so that reading it leaves no copy behind in a smaller buffer.
fn key_text() -> Zeroizing<String> {
    Zeroizing::new(String::with_capacity(4096))
}

const KEY_FILE_BYTES_MAX: u64 = 4096;

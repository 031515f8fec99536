//! What can be wrong with the files behind identity. Always the operator's to see; a device gets a `Reject`.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use tidegate_auth::keyfile::KeyTextError;
use tidegate_auth::{KeyId, PublicKey};

use crate::message::DeviceId;

/// Why the registry, the gateway's key or the memory of used JWTs cannot be opened or changed.
#[derive(Debug)]
pub enum Error {
    Io {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// A key file that others can read.
    Permissions {
        path: PathBuf,
        mode: u32,
    },
    GatewayKey {
        path: PathBuf,
        source: KeyTextError,
    },
    /// Devices have pinned an identity whose key is gone; a fresh one would lock them out.
    GatewayKeyLost {
        path: PathBuf,
    },
    /// Readable as SQLite, and not a registry.
    NotOurs {
        path: PathBuf,
    },
    Corrupt {
        path: PathBuf,
        detail: String,
    },
    /// Written by a later version.
    TooNew {
        path: PathBuf,
        version: u32,
    },
    Store {
        doing: &'static str,
        path: PathBuf,
        source: rusqlite::Error,
    },
    DeviceExists(DeviceId),
    UnknownDevice(DeviceId),
    KeyTaken {
        key: PublicKey,
        device: DeviceId,
    },
    TooManyKeys(DeviceId),
    UnknownKey {
        device: DeviceId,
        key_id: KeyId,
    },
    /// The operating system gave no random bytes.
    Random(String),
    Thread(io::Error),
}

/// Whose fault an error is, which decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// A file or an argument is wrong: exit code 1.
    Input,
    /// The machine cannot do it now: exit code 75.
    Machine,
}

impl Error {
    pub fn blame(&self) -> Blame {
        match self {
            Error::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => Blame::Input,
            Error::Io { .. } | Error::Store { .. } | Error::Random(_) | Error::Thread(_) => Blame::Machine,
            Error::Permissions { .. }
            | Error::GatewayKey { .. }
            | Error::GatewayKeyLost { .. }
            | Error::NotOurs { .. }
            | Error::Corrupt { .. }
            | Error::TooNew { .. }
            | Error::DeviceExists(_)
            | Error::UnknownDevice(_)
            | Error::KeyTaken { .. }
            | Error::TooManyKeys(_)
            | Error::UnknownKey { .. } => Blame::Input,
        }
    }

    /// For `map_err`: an IO error while `doing` something with `path`.
    pub(super) fn io<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + use<'a> {
        move |source| Error::Io { doing, path: path.to_owned(), source }
    }

    /// For `map_err`: SQLite's error while `doing` something with `path`; damage is told apart from what may pass.
    pub(super) fn store<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(rusqlite::Error) -> Error + use<'a> {
        use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
        move |source| match source.sqlite_error_code() {
            Some(DatabaseCorrupt | NotADatabase) => {
                Error::Corrupt { path: path.to_owned(), detail: source.to_string() }
            }
            Some(_) | None => Error::Store { doing, path: path.to_owned(), source },
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Io { doing, path, source } => write!(f, "cannot {doing} {}: {source}", path.display()),
            Error::Permissions { path, mode } => write!(
                f,
                "{} can be read by others (mode {mode:04o}); run: chmod 600 {}",
                path.display(),
                path.display()
            ),
            Error::GatewayKey { path, source } => write!(f, "{} is {source}", path.display()),
            Error::GatewayKeyLost { path } => write!(
                f,
                "{} is missing, but the registry has devices that know this gateway by it; restore it from a backup, \
                 or move registry.db away to begin anew",
                path.display()
            ),
            Error::NotOurs { path } => write!(f, "{} is not a tidegate file", path.display()),
            Error::Corrupt { path, detail } => {
                write!(f, "{} is damaged ({detail}); restore it from a backup", path.display())
            }
            Error::TooNew { path, version } => {
                write!(f, "{} was written by a later tidegate (format {version}); use that version", path.display())
            }
            Error::Store { doing, path, source } => write!(f, "cannot {doing} {}: {source}", path.display()),
            Error::DeviceExists(id) => write!(f, "device {id} exists already"),
            Error::UnknownDevice(id) => write!(f, "there is no device {id}"),
            Error::KeyTaken { key, device } => {
                write!(f, "the key {} belongs to device {device} already", key.key_id())
            }
            Error::TooManyKeys(id) => write!(f, "device {id} has four keys already; remove one first"),
            Error::UnknownKey { device, key_id } => write!(f, "device {device} has no key {key_id}"),
            Error::Random(detail) => write!(f, "the system gave no random bytes: {detail}"),
            Error::Thread(source) => write!(f, "cannot start the thread that watches the registry: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } | Error::Thread(source) => Some(source),
            Error::GatewayKey { source, .. } => Some(source),
            Error::Store { source, .. } => Some(source),
            Error::Permissions { .. }
            | Error::GatewayKeyLost { .. }
            | Error::NotOurs { .. }
            | Error::Corrupt { .. }
            | Error::TooNew { .. }
            | Error::DeviceExists(_)
            | Error::UnknownDevice(_)
            | Error::KeyTaken { .. }
            | Error::TooManyKeys(_)
            | Error::UnknownKey { .. }
            | Error::Random(_) => None,
        }
    }
}

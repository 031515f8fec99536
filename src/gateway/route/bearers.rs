//! `auth = "jwt"`: tokens of an identity provider, which need no registry of ours.
//!
//! The provider's keys are read from a file, again when the file changes; while it cannot be read, or has no key in it, the keys that were there stay.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tidegate_auth::provider::{KeySet, Refusal, SET_BYTES_MAX, Wanted};

/// `jwt`: whose tokens a route with auth = "jwt" takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What `iss` has to be, letter by letter.
    #[schemars(length(min = 1, max = 1024))]
    pub issuer: String,
    /// What `aud` has to name, one of these.
    #[schemars(length(min = 1, max = 64))]
    pub audiences: Vec<String>,
    /// The provider's keys, a JWK Set (RFC 7517) with keys for HS256, ES256 or EdDSA; looked at every few seconds. When it cannot be read, the keys that were read
    /// before stay.
    #[schemars(extend("format" = "path"))]
    pub jwks_file: PathBuf,
    /// How far the provider's clock may be ahead of ours, or behind, in seconds. A token beyond that is refused with 401.
    #[serde(default = "skew")]
    #[schemars(range(min = 0, max = 3600))]
    pub clock_skew_secs: u32,
}

const fn skew() -> u32 {
    60
}

impl Config {
    /// # Errors
    /// What is wrong with the file, as a lowercase clause.
    pub fn read(&self) -> Result<KeySet, String> {
        let about = fs::metadata(&self.jwks_file).map_err(|error| format!("cannot be read: {error}"))?;
        if about.len() > SET_BYTES_MAX as u64 {
            return Err(tidegate_auth::provider::SetError::TooLarge.to_string());
        }
        let text = fs::read(&self.jwks_file).map_err(|error| format!("cannot be read: {error}"))?;
        KeySet::parse(&text).map_err(|error| error.to_string())
    }
}

/// The tokens that one route takes.
#[derive(Debug)]
pub struct Bearers {
    config: Config,
    keys: ArcSwap<KeySet>,
    /// Of the file that was looked at last.
    modified: Mutex<Option<SystemTime>>,
}

impl Bearers {
    pub fn new(config: &Config) -> Self {
        let bearers = Bearers { config: config.clone(), keys: ArcSwap::default(), modified: Mutex::default() };
        bearers.refresh();
        bearers
    }

    /// Reads the keys again if their file has changed.
    pub fn refresh(&self) {
        let modified = fs::metadata(&self.config.jwks_file).and_then(|about| about.modified()).ok();
        let mut known = self.modified.lock();
        if modified.is_some() && *known == modified {
            return;
        }
        // What is missing is said once, until it is there.
        let is_new = known.is_some() || modified.is_some();
        *known = modified;
        match self.config.read() {
            Ok(keys) => self.keys.store(Arc::new(keys)),
            Err(error) if is_new => {
                tracing::error!(file = %self.config.jwks_file.display(), error, "jwks_file: the keys that were there stay");
            }
            Err(_) => {}
        }
    }

    /// Whether a token is good now.
    ///
    /// # Errors
    /// [`Refusal`], for the log.
    pub fn believe(&self, token: &str, now_unix: u64) -> Result<(), Refusal> {
        let wanted = Wanted {
            issuer: &self.config.issuer,
            audiences: &self.config.audiences,
            now_unix,
            clock_skew_secs: self.config.clock_skew_secs.into(),
            es256: is_es256,
        };
        self.keys.load().believe(token, &wanted).map(|_| ())
    }
}

fn is_es256(point: &[u8], signed: &[u8], signature: &[u8]) -> bool {
    let key = ring::signature::UnparsedPublicKey::new(&ring::signature::ECDSA_P256_SHA256_FIXED, point);
    key.verify(signed, signature).is_ok()
}

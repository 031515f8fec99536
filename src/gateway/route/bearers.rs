//! `auth = "jwt"`: tokens of an identity provider, which need no registry of ours.
//!
//! The provider's keys are read from a file, again when the file changes, or fetched from an upstream, again after a while and when a token names a key that is not known.
//! While they cannot be had, or there is no key among them, the keys that were there stay. Whoever fetches asks [`Bearers::is_due`] and hands over what came; here is no IO but for files.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use portable_atomic::{AtomicBool, Ordering};
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
    /// before stay. This, or `jwks_upstream`.
    #[serde(default)]
    #[schemars(extend("format" = "path"))]
    pub jwks_file: Option<PathBuf>,
    /// The upstream, of kind "http", from which the keys are fetched instead. While it cannot be reached, the keys that were fetched before stay; without any,
    /// every token is refused.
    #[serde(default)]
    pub jwks_upstream: String,
    /// What the upstream is asked for.
    #[serde(default = "well_known")]
    #[schemars(regex(pattern = r"^/[^?#]*$"))]
    pub jwks_path: String,
    /// Seconds after which fetched keys are fetched again.
    #[serde(default = "refresh_secs")]
    #[schemars(range(min = 1, max = 604800))]
    pub jwks_refresh_secs: u32,
    /// Seconds between two fetches at least, when one has failed or a token names a key that is not known.
    #[serde(default = "retry_secs")]
    #[schemars(range(min = 1, max = 3600))]
    pub jwks_retry_secs: u32,
    /// How far the provider's clock may be ahead of ours, or behind, in seconds. A token beyond that is refused with 401.
    #[serde(default = "skew")]
    #[schemars(range(min = 0, max = 3600))]
    pub clock_skew_secs: u32,
}

const fn skew() -> u32 {
    60
}

fn well_known() -> String {
    "/.well-known/jwks.json".into()
}

const fn refresh_secs() -> u32 {
    3600
}

const fn retry_secs() -> u32 {
    30
}

impl Config {
    /// # Errors
    /// What is wrong with the source of the keys, as a clause.
    pub fn check(&self) -> Result<(), String> {
        match (&self.jwks_file, self.jwks_upstream.is_empty()) {
            (Some(file), true) => {
                read(file).map(|_| ()).map_err(|error| format!("jwks_file {}: {error}", file.display()))
            }
            (None, false) => Ok(()),
            (None, true) => Err("whose keys? name `jwks_file` or `jwks_upstream`".into()),
            (Some(_), false) => Err("`jwks_file` and `jwks_upstream` exclude each other".into()),
        }
    }
}

fn read(file: &Path) -> Result<KeySet, String> {
    let about = fs::metadata(file).map_err(|error| format!("cannot be read: {error}"))?;
    if about.len() > SET_BYTES_MAX as u64 {
        return Err(tidegate_auth::provider::SetError::TooLarge.to_string());
    }
    let text = fs::read(file).map_err(|error| format!("cannot be read: {error}"))?;
    KeySet::parse(&text).map_err(|error| error.to_string())
}

/// The tokens that one route takes.
#[derive(Debug)]
pub struct Bearers {
    config: Config,
    keys: ArcSwap<KeySet>,
    /// Of the file that was looked at last.
    modified: Mutex<Option<SystemTime>>,
    fetches: Mutex<Fetches>,
    /// A token named a key that is not known.
    is_unknown: AtomicBool,
}

/// When keys were fetched, and are to be again.
#[derive(Clone, Copy, Debug, Default)]
struct Fetches {
    last: Option<Instant>,
    next: Option<Instant>,
}

impl Bearers {
    pub fn new(config: &Config) -> Self {
        let bearers = Bearers {
            config: config.clone(),
            keys: ArcSwap::default(),
            modified: Mutex::default(),
            fetches: Mutex::default(),
            is_unknown: AtomicBool::new(false),
        };
        bearers.refresh();
        bearers
    }

    /// The most that is taken of a provider's answer.
    pub const SET_BYTES_MAX: usize = SET_BYTES_MAX;

    /// Whether the keys come from a file.
    pub fn reads_file(&self) -> bool {
        self.config.jwks_file.is_some()
    }

    /// The upstream, and what it is asked for.
    pub fn source(&self) -> (&str, &str) {
        (&self.config.jwks_upstream, &self.config.jwks_path)
    }

    /// Whether the keys are to be fetched now; then it counts as begun.
    pub fn is_due(&self, now: Instant) -> bool {
        if self.config.jwks_upstream.is_empty() {
            return false;
        }
        let mut fetches = self.fetches.lock();
        let pause = Duration::from_secs(self.config.jwks_retry_secs.into());
        let is_time = fetches.next.is_none_or(|next| now >= next);
        let is_allowed = fetches.last.is_none_or(|last| now >= last + pause);
        let is_due = is_time || is_allowed && self.is_unknown.load(Ordering::Relaxed);
        if !is_due {
            return false;
        }
        self.is_unknown.store(false, Ordering::Relaxed);
        *fetches = Fetches { last: Some(now), next: Some(now + pause) };
        true
    }

    /// Takes keys that were fetched.
    ///
    /// # Errors
    /// What is wrong with them; those that were there stay.
    pub fn learn(&self, set: &[u8], now: Instant) -> Result<(), String> {
        let keys = KeySet::parse(set).map_err(|error| error.to_string())?;
        self.keys.store(Arc::new(keys));
        self.fetches.lock().next = Some(now + Duration::from_secs(self.config.jwks_refresh_secs.into()));
        Ok(())
    }

    /// Goes on with the keys of the same provider, after a reload.
    pub fn take_over(&self, old: &Bearers) {
        if self.config == old.config {
            self.keys.store(old.keys.load_full());
            *self.fetches.lock() = *old.fetches.lock();
        }
    }

    /// Reads the keys again if their file has changed. Blocks.
    pub fn refresh(&self) {
        let Some(file) = &self.config.jwks_file else { return };
        let modified = fs::metadata(file).and_then(|about| about.modified()).ok();
        let mut known = self.modified.lock();
        if modified.is_some() && *known == modified {
            return;
        }
        // What is missing is said once, until it is there.
        let is_new = known.is_some() || modified.is_some();
        *known = modified;
        match read(file) {
            Ok(keys) => self.keys.store(Arc::new(keys)),
            Err(error) if is_new => {
                tracing::error!(file = %file.display(), error, "jwks_file: the keys that were there stay");
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
        let believed = self.keys.load().believe(token, &wanted).map(|_| ());
        if believed == Err(Refusal::UnknownKey) {
            self.is_unknown.store(true, Ordering::Relaxed);
        }
        believed
    }
}

fn is_es256(point: &[u8], signed: &[u8], signature: &[u8]) -> bool {
    let key = ring::signature::UnparsedPublicKey::new(&ring::signature::ECDSA_P256_SHA256_FIXED, point);
    key.verify(signed, signature).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: &str = include_str!("../../../tests/data/jwt/jwks.json");

    #[test]
    fn keys_are_fetched_at_first_after_a_while_and_for_an_unknown_one_but_not_all_the_time() {
        let config = r#"{ "issuer": "https://idp.example", "audiences": ["api"], "jwks_upstream": "idp", "jwks_refresh_secs": 100, "jwks_retry_secs": 10 }"#;
        let config: Config = serde_json::from_str(config).unwrap();
        assert_eq!(config.check(), Ok(()));
        let bearers = Bearers::new(&config);
        let start = Instant::now();
        let at = |secs| start + Duration::from_secs(secs);
        assert!(bearers.is_due(at(0)) && !bearers.is_due(at(0)), "once");
        assert!(!bearers.is_due(at(9)) && bearers.is_due(at(10)), "again when nothing came");
        assert!(bearers.learn(b"{}", at(10)).is_err());
        bearers.learn(KEYS.as_bytes(), at(10)).unwrap();
        let tokens: serde_json::Value =
            serde_json::from_str(include_str!("../../../tests/data/jwt/tokens.json")).unwrap();
        let token = tokens["good_es256"].as_str().unwrap();
        assert_ne!(bearers.believe(token, 0), Err(Refusal::UnknownKey));
        assert!(!bearers.is_due(at(109)) && bearers.is_due(at(110)), "they grow old");
        bearers
            .learn(br#"{"keys":[{"kty":"oct","k":"MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE"}]}"#, at(110))
            .unwrap();
        assert_eq!(bearers.believe(token, 0), Err(Refusal::UnknownKey));
        assert!(!bearers.is_due(at(119)) && bearers.is_due(at(120)), "an unknown key is asked for, in time");
        assert!(!bearers.is_due(at(121)));
        let after = Bearers::new(&config);
        after.take_over(&bearers);
        assert!(!after.is_due(at(121)), "a reload fetches nothing");
    }
}

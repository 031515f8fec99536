//! Who is who: the registry of devices, the gateway's own key, and every way to log in.
//!
//! Promises:
//! - A look-up reads a snapshot in memory and never waits, on the disk or on another thread.
//! - A change that `tidegate device` makes to `registry.db` is seen by a running gateway within `registry_poll_ms`.
//! - Unknown device, revoked device and wrong proof are one answer that costs one time: exactly the same work is done, on a key that nobody has.
//! - A proof works once, over a restart too. A revocation holds at once: the `generation` in tokens and sessions no longer matches.
//! - A registry that cannot be read is an error with a name. It is never replaced by an empty one.
//!
//! It deliberately decides nothing about what a device may do (that is policy) and keeps no session (that is the session table).
//! The rules of each proof are in the pure crate `tidegate-auth`; this module adds state, keys, clock and randomness.
//!
//! Cost: a token on a request is one HMAC and two map look-ups, about 1 us; a login is one or two Ed25519 operations, 60 to 100 us on a PC and
//! five times that on a Pi, on the calling thread and behind `verify_concurrency_max`.

mod clock;
mod config;
mod error;
mod flows;
mod gateway_key;
mod login;
mod registry;
mod replay;
mod signed;
mod snapshot;
mod watch;

#[cfg(test)]
mod store_tests;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tidegate_auth::{ChallengeKeys, TokenKey, UsedSet};

use crate::message::{Device, DeviceId};

pub use clock::Now;
pub use config::Config;
pub use error::{Blame, Error};
pub use flows::{MqttPending, MqttStep, OauthError};
pub use gateway_key::GatewayKey;
pub use login::{Channel, Login};
pub use registry::{KeyRecord, NewDevice, NewKey, Record, Registry};
pub use signed::{NotTaken, SignedMessage};
/// The engine, for those who speak the other side of these flows: the command line, the demo, tests.
pub use tidegate_auth as auth;
pub use tidegate_auth::{GatewayId, KeyId, PublicKey};

/// The registry's one owner in a running gateway. Cheap to share as `Arc<Identity>`; every method takes `&self`.
pub struct Identity {
    shared: Arc<Shared>,
    watch: watch::Watch,
}

/// What logging in needs, shared with the thread that watches the registry.
struct Shared {
    gateway: GatewayKey,
    token_key: TokenKey,
    /// Stands in for the key of a device that does not exist; its private half is forgotten.
    nobody: PublicKey,
    config: ArcSwap<Config>,
    devices: ArcSwap<snapshot::Snapshot>,
    challenge_keys: Mutex<ChallengeKeys>,
    used_challenges: Mutex<UsedSet>,
    used_jti: Mutex<UsedSet>,
    sequences: Mutex<signed::Sequences>,
    verifications: AtomicU32,
}

impl Identity {
    /// Opens `registry.db` and `gateway.key` in `data_dir`, makes them if neither exists yet, and starts to watch the registry.
    ///
    /// # Errors
    /// For a registry or a key that cannot be read or must not be used as it is; see [`Error`].
    pub fn open(data_dir: &Path, config: &Config) -> Result<Identity, Error> {
        let registry = Registry::open(data_dir)?;
        let gateway = GatewayKey::open(data_dir, &registry)?;
        let devices = registry.load()?;
        let now = Now::read();
        let mut used_jti = UsedSet::new(size(config.jti_max), size(config.jti_per_device_max));
        let mut sequences = signed::Sequences::default();
        let replay = replay::Replay::open(data_dir, &mut used_jti, &mut sequences, now)?;
        let shared = Arc::new(Shared {
            token_key: TokenKey::derive(&gateway.secret, TOKEN_EPOCH),
            nobody: auth::SecretKey::from_seed(&random()?).public(),
            gateway,
            config: ArcSwap::from_pointee(config.clone()),
            devices: ArcSwap::from_pointee(devices),
            challenge_keys: Mutex::new(ChallengeKeys::new(0, random()?, now.boot_secs)),
            used_challenges: Mutex::new(UsedSet::new(
                size(config.used_challenges_max),
                size(config.used_challenges_per_device_max),
            )),
            used_jti: Mutex::new(used_jti),
            sequences: Mutex::new(sequences),
            verifications: AtomicU32::new(0),
        });
        let watch = watch::Watch::start(Arc::clone(&shared), registry, replay)?;
        Ok(Identity { shared, watch })
    }

    pub fn gateway(&self) -> &GatewayKey {
        &self.shared.gateway
    }

    /// The gateway's id as people and devices write it: 64 hex digits.
    pub fn gateway_id_hex(&self) -> String {
        self.shared.gateway.id.to_string()
    }

    /// The device with this id, if it exists and is enabled.
    pub fn device(&self, id: &DeviceId) -> Option<Arc<Device>> {
        let devices = self.shared.devices.load();
        devices.by_id(id).filter(|entry| entry.enabled).map(|entry| Arc::clone(&entry.device))
    }

    /// The device with this row number, if it exists and is enabled.
    pub fn by_index(&self, index: u32) -> Option<Arc<Device>> {
        let devices = self.shared.devices.load();
        devices.by_index(index).filter(|entry| entry.enabled).map(|entry| Arc::clone(&entry.device))
    }

    /// The enabled device that has registered this key, for certificates and raw public keys pinned in the registry.
    pub fn by_public_key(&self, key: &PublicKey, now: Now) -> Option<Arc<Device>> {
        let devices = self.shared.devices.load();
        let entry = devices.by_public_key(key).filter(|entry| entry.enabled)?;
        entry.keys.iter().any(|k| k.public == *key && k.is_valid(now)).then(|| Arc::clone(&entry.device))
    }

    /// Whether a session's copy of a device still stands: not revoked, no key changed since. Two map look-ups; compare
    /// [`registry_version`](Self::registry_version) first where even that is too much.
    pub fn is_current(&self, device: &Device) -> bool {
        self.shared.devices.load().is_current(device)
    }

    /// Grows with every change of the registry that was taken over.
    pub fn registry_version(&self) -> u64 {
        self.shared.devices.load().version
    }

    /// Devices known, enabled or not.
    pub fn device_count(&self) -> usize {
        self.shared.devices.load().len()
    }

    /// Takes over what has changed in the registry, now instead of at the next look.
    ///
    /// # Errors
    /// If the registry cannot be read; what was known before stays.
    pub fn refresh(&self) -> Result<(), Error> {
        self.watch.refresh(&self.shared)
    }

    /// Takes over a new configuration. What has been issued keeps its life.
    pub fn reconfigure(&self, config: &Config) {
        self.shared.used_jti.lock().set_bounds(size(config.jti_max), size(config.jti_per_device_max));
        self.shared
            .used_challenges
            .lock()
            .set_bounds(size(config.used_challenges_max), size(config.used_challenges_per_device_max));
        self.shared.config.store(Arc::new(config.clone()));
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("gateway", &self.shared.gateway).finish_non_exhaustive()
    }
}

/// One of the verifications under way; gives its place back when it ends.
struct Verifying<'a>(&'a AtomicU32);

impl Drop for Verifying<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Shared {
    /// A place among at most `verify_concurrency_max`, if one is free.
    fn begin_verification(&self) -> Option<Verifying<'_>> {
        let place = Verifying(&self.verifications);
        let taken = self.verifications.fetch_add(1, Ordering::AcqRel);
        // Dropping `place` gives it back.
        (taken < self.config.load().verify_concurrency_max).then_some(place)
    }
}

fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| Error::Random(error.to_string()))?;
    Ok(bytes)
}

fn size(bound: u32) -> usize {
    usize::try_from(bound).unwrap_or(usize::MAX)
}

/// Raise it to void every token that older versions issued.
const TOKEN_EPOCH: u8 = 0;

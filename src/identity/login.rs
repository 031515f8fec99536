//! The proofs, whatever protocol carries them: a signed transcript, a JWT, a token.
//!
//! Every path does the same work whoever asks: find a key or take nobody's, verify once, and only then look whether it was somebody.

use std::sync::Arc;
use std::time::Duration;

use tidegate_auth::challenge::{Asker, Peer, random_of};
use tidegate_auth::jwt::{self, Expected, Freshness, Unverified};
use tidegate_auth::{Challenge, ClientNonce, KeyId, NotFresh, Proto, Signature, Token, Transcript, UsedSet, text};

use super::clock::Now;
use super::replay::{Used, UsedJti};
use super::snapshot::{Entry, Key};
use super::{Identity, Shared};
use crate::message::{Device, DeviceId, Protocol, Reject};
use crate::telemetry::meters;

/// A device has proved itself.
#[derive(Clone, Debug)]
pub struct Login {
    pub device: Arc<Device>,
    /// The key that it did so with.
    pub key_id: KeyId,
    /// How long that holds, from now; the connection is closed then, or the client proves itself again.
    pub lifetime: Duration,
    /// The same as a moment, in unix seconds.
    pub expires_unix: u64,
}

impl Login {
    /// The same login for a shorter time.
    pub(super) fn at_most(mut self, lifetime_secs: u64, now: Now) -> Self {
        let lifetime = Duration::from_secs(lifetime_secs);
        if lifetime < self.lifetime {
            self.lifetime = lifetime;
            self.expires_unix = now.unix_secs.saturating_add(lifetime_secs);
        }
        self
    }
}

/// What a connection offers to bind a proof to.
#[derive(Clone, Debug, Default)]
pub struct Channel {
    /// RFC 9266; inside TLS 1.3.
    pub tls_exporter: Option<[u8; 32]>,
    /// RFC 5929: the hash of the gateway's certificate.
    pub tls_server_end_point: Option<Vec<u8>>,
}

impl Channel {
    /// The bytes for this kind of binding, none if this channel has no such thing.
    pub(super) fn binding(&self, cb_type: tidegate_auth::CbType) -> Option<&[u8]> {
        use tidegate_auth::CbType;
        match cb_type {
            CbType::None => Some(&[]),
            CbType::TlsExporter => self.tls_exporter.as_ref().map(<[u8; 32]>::as_slice),
            CbType::TlsServerEndPoint => self.tls_server_end_point.as_deref(),
            CbType::OscoreExporter | CbType::DtlsExporter => None,
        }
    }
}

/// Who claims to be asking: somebody, or nobody, with the key to verify against in either case.
pub(super) struct Claimant {
    entry: Option<Arc<Entry>>,
    key: Key,
}

impl Claimant {
    /// What the used-sets file this claimant's logins under.
    fn owner(&self) -> u32 {
        self.entry.as_ref().map_or(u32::MAX, |entry| entry.device.index)
    }

    #[cfg(test)]
    pub(super) fn is_nobody_with(&self, key: tidegate_auth::PublicKey) -> bool {
        self.entry.is_none() && self.key.public == key
    }

    /// What a proof is verified with.
    pub(super) fn key(&self) -> &tidegate_auth::PublicKey {
        &self.key.public
    }

    /// A proof by this claimant's key holds; was it anybody?
    pub(super) fn admit(self, now: Now, lifetime_secs: u64) -> Result<Login, Reject> {
        let Some(entry) = self.entry else { return Err(Reject::Unauthenticated) };
        let of_key = self.key.not_after.map_or(u64::MAX, |until| until.saturating_sub(now.unix_secs));
        let lifetime_secs = lifetime_secs.min(of_key);
        Ok(Login {
            device: Arc::clone(&entry.device),
            key_id: self.key.id,
            lifetime: Duration::from_secs(lifetime_secs),
            expires_unix: now.unix_secs.saturating_add(lifetime_secs),
        })
    }
}

/// A challenge flow's proof.
pub(super) struct Proof<'a> {
    pub(super) transcript: Transcript<'a>,
    pub(super) signature: &'a Signature,
    pub(super) lifetime_secs: u64,
}

impl Shared {
    /// The enabled device's valid key of this id; otherwise nobody with nobody's key.
    pub(super) fn claimant(&self, device_id: &str, key_id: KeyId, now: Now) -> Claimant {
        let entry = self.enabled(device_id);
        let key = entry.as_ref().and_then(|entry| entry.keys.iter().find(|k| k.id == key_id && k.is_valid(now)));
        match (key.copied(), entry) {
            (Some(key), Some(entry)) => Claimant { entry: Some(entry), key },
            (None, _) | (_, None) => Claimant { entry: None, key: self.nobody() },
        }
    }

    fn enabled(&self, device_id: &str) -> Option<Arc<Entry>> {
        let id = DeviceId::parse(device_id).ok()?;
        self.devices.load().by_id(&id).filter(|entry| entry.enabled).cloned()
    }

    fn nobody(&self) -> Key {
        Key { public: self.nobody, id: KeyId([0; 8]), not_before: None, not_after: None }
    }

    /// Verifies a signed transcript: one verification, whoever it is.
    pub(super) fn verify_proof(&self, claimant: Claimant, proof: &Proof<'_>, now: Now) -> Result<Login, Reject> {
        let _place = self.begin_verification().ok_or_else(busy)?;
        let holds = proof.transcript.verify(&claimant.key.public, proof.signature);
        if holds { claimant.admit(now, proof.lifetime_secs) } else { Err(Reject::Unauthenticated) }
    }

    /// Opens a stateless challenge and looks whether it was used; gives the second since boot at which it ends.
    pub(super) fn open_challenge(&self, challenge: &Challenge, asker: &Asker<'_>, now: Now) -> Result<u32, Reject> {
        let ttl = self.config.load().challenge_ttl_secs;
        self.challenge_keys.lock().open(now.boot_secs, ttl, challenge, asker).map_err(|error| {
            tracing::debug!(%error, "challenge refused");
            Reject::Unauthenticated
        })
    }

    /// Verifies a proof over a stateless challenge, and uses the challenge up.
    pub(super) fn verify_challenge_proof(
        &self,
        challenge: &Challenge,
        asker: &Asker<'_>,
        claimant: Claimant,
        proof: &Proof<'_>,
        now: Now,
    ) -> Result<Login, Reject> {
        let ends_at = self.open_challenge(challenge, asker, now)?;
        let id = random_of(challenge).ok_or(Reject::Unauthenticated)?;
        let owner = claimant.owner();
        if self.used_challenges.lock().contains(owner, &id) {
            return Err(Reject::Unauthenticated);
        }
        let login = self.verify_proof(claimant, proof, now)?;
        // Two answers at once may both have come this far; one of them is the first to be remembered.
        let mut used = self.used_challenges.lock();
        insert(&mut used, owner, id, u64::from(ends_at), u64::from(now.boot_secs), USED_CHALLENGES)?;
        Ok(login)
    }

    /// A token for a login, over one protocol.
    pub(super) fn token_for(
        &self,
        login: &Login,
        proto: Proto,
    ) -> Result<[u8; tidegate_auth::token::TOKEN_BYTES], Reject> {
        let token = Token {
            expires_unix: u32::try_from(login.expires_unix).unwrap_or(u32::MAX),
            device_index: login.device.index,
            generation: login.device.generation,
            protocol_mask: proto.mask(),
            key_id: login.key_id,
            random: super::random().map_err(|error| {
                tracing::error!(%error, "no token issued");
                Reject::Full { limit: "entropy", retry_after: RETRY_AFTER }
            })?,
        };
        Ok(self.token_key.seal(&token))
    }
}

impl Identity {
    /// Verifies a bearer token, in base64url as it stands in `Authorization: Bearer` and in CoAP's `t=`.
    ///
    /// # Errors
    /// `Unauthenticated` if it is not ours, has expired, is for another protocol, or its device has been revoked or changed since.
    pub fn verify_token(&self, token: &[u8], protocol: Protocol, now: Now) -> Result<Arc<Device>, Reject> {
        self.verify_token_until(token, protocol, now).map(|(device, _)| device)
    }

    /// The same, with the unix second at which the token ends.
    ///
    /// # Errors
    /// As [`verify_token`](Self::verify_token).
    pub fn verify_token_until(&self, token: &[u8], protocol: Protocol, now: Now) -> Result<(Arc<Device>, u64), Reject> {
        let proto = proto(protocol).ok_or(Reject::Unauthenticated)?;
        let token = self.shared.token_key.verify_text(token, proto, now.unix_secs).map_err(|error| {
            tracing::debug!(%error, "token refused");
            Reject::Unauthenticated
        })?;
        let devices = self.shared.devices.load();
        let entry = devices.by_index(token.device_index).ok_or(Reject::Unauthenticated)?;
        if !entry.enabled || entry.device.generation != token.generation {
            return Err(Reject::Unauthenticated);
        }
        Ok((Arc::clone(&entry.device), u64::from(token.expires_unix)))
    }

    /// Logs a device in by a JWT: the Password of an MQTT CONNECT. `username` and `client_id` as sent.
    ///
    /// # Errors
    /// `Unauthenticated`, whatever was wrong; `TooFast` and `Full` when a limit is reached, `Full` only after a good signature.
    pub fn login_jwt(
        &self,
        username: Option<&str>,
        client_id: &str,
        password: &[u8],
        now: Now,
    ) -> Result<Login, Reject> {
        let device_id = self.mqtt_device_id(username, client_id);
        self.counted(Protocol::Mqtt, self.verify_jwt(password, device_id, now))
    }

    /// Verifies a JWT and uses it up. Its subject must be `device_id`, if that is given.
    pub(super) fn verify_jwt(&self, jwt: &[u8], device_id: Option<&str>, now: Now) -> Result<Login, Reject> {
        let shared = &self.shared;
        let config = shared.config.load();
        let refuse = |error: jwt::JwtError| {
            tracing::debug!(%error, "JWT refused");
            Reject::Unauthenticated
        };
        let unverified = Unverified::parse(jwt).map_err(refuse)?;
        let expected = Expected {
            gateway_id: &shared.gateway.id,
            now_unix: now.unix_secs,
            clock_skew_secs: config.clock_skew_secs.into(),
            life_secs_max: config.jwt_ttl_secs_max.into(),
        };
        let grant = unverified.check(&expected).map_err(refuse)?;
        let subject = unverified.claims().sub.as_str();
        if device_id.is_some_and(|id| id != subject) {
            return Err(Reject::Unauthenticated);
        }
        let challenge = match grant.freshness {
            Freshness::Clock { .. } => None,
            Freshness::Challenge { challenge, client_nonce } => {
                Some(self.open_jwt_challenge(challenge, &client_nonce, subject, now)?)
            }
        };
        let claimant = shared.jwt_claimant(&unverified, subject, now)?;
        let owner = claimant.owner();
        let lifetime_secs = grant.expires_unix.saturating_sub(now.unix_secs);
        let login = claimant.admit(now, lifetime_secs)?;
        match (grant.freshness, challenge) {
            (_, Some((id, ends_at))) => {
                let mut used = shared.used_challenges.lock();
                insert(&mut used, owner, id, u64::from(ends_at), u64::from(now.boot_secs), USED_CHALLENGES)?;
            }
            (Freshness::Clock { jti }, None) => {
                let expires_unix = grant.expires_unix;
                insert(&mut shared.used_jti.lock(), owner, jti, expires_unix, now.unix_secs, USED_JTI)?;
                self.watch.remember(Used::Jti(UsedJti { device_index: owner, jti, expires_unix }));
            }
            // A challenge was opened above, or we are not here.
            (Freshness::Challenge { .. }, None) => return Err(Reject::Unauthenticated),
        }
        Ok(login)
    }

    /// Opens the challenge in a JWT's `nonce`, which was asked for over HTTP.
    fn open_jwt_challenge(
        &self,
        challenge: &str,
        client_nonce: &ClientNonce,
        subject: &str,
        now: Now,
    ) -> Result<([u8; 16], u32), Reject> {
        let challenge: Challenge = text::from_text(challenge).ok_or(Reject::Unauthenticated)?;
        let asker = Asker { proto: Proto::Http, device_id: subject, client_nonce, peer: Peer::Any };
        let ends_at = self.shared.open_challenge(&challenge, &asker, now)?;
        Ok((random_of(&challenge).ok_or(Reject::Unauthenticated)?, ends_at))
    }

    /// Counts a login by its outcome.
    pub(super) fn counted<T>(&self, protocol: Protocol, outcome: Result<T, Reject>) -> Result<T, Reject> {
        let meters = meters().of(protocol);
        match &outcome {
            Ok(_) => meters.logins_accepted.increment(1),
            Err(_) => meters.logins_refused.increment(1),
        }
        outcome
    }

    /// Which device an MQTT client says it is: by its Username, or else its Client Identifier up to a `/`.
    pub fn mqtt_device_id<'a>(&self, username: Option<&'a str>, client_id: &'a str) -> Option<&'a str> {
        if self.shared.config.load().google_client_ids
            && let Some(device) = google_device(client_id)
        {
            return Some(device);
        }
        let id = match username {
            Some(name) if !name.is_empty() => name,
            Some(_) | None => client_id.split('/').next().unwrap_or_default(),
        };
        // An id that cannot exist is still an id: it belongs to nobody, and fails like nobody's.
        Some(id)
    }
}

impl Shared {
    /// Whose signature a JWT carries. A named key costs one verification. Without a name each of up to four keys is tried, and
    /// four verifications are done whoever it is.
    fn jwt_claimant(&self, jwt: &Unverified<'_>, subject: &str, now: Now) -> Result<Claimant, Reject> {
        let _place = self.begin_verification().ok_or_else(busy)?;
        if let Some(key_id) = jwt.key_id() {
            let claimant = self.claimant(subject, key_id, now);
            return if jwt.is_signed_by(&claimant.key.public) { Ok(claimant) } else { Err(Reject::Unauthenticated) };
        }
        let entry = self.enabled(subject);
        let keys = entry.iter().flat_map(|entry| entry.keys.iter()).copied().filter(|key| key.is_valid(now));
        let mut found = None;
        for key in keys.chain(std::iter::repeat(self.nobody())).take(super::Registry::KEYS_MAX) {
            if jwt.is_signed_by(&key.public) && key.public != self.nobody {
                found = Some(key);
            }
        }
        let key = found.ok_or(Reject::Unauthenticated)?;
        Ok(Claimant { entry, key })
    }
}

/// The names of the bounds of a used-set: of the whole, of one device.
type Bounds = (&'static str, &'static str);

fn insert(
    used: &mut UsedSet,
    owner: u32,
    id: [u8; 16],
    expires: u64,
    now: u64,
    (whole, share): Bounds,
) -> Result<(), Reject> {
    used.insert(owner, id, expires, now).map_err(|why| match why {
        NotFresh::Used => Reject::Unauthenticated,
        NotFresh::OwnerFull => Reject::TooFast { limit: share, retry_after: RETRY_AFTER },
        NotFresh::Full => Reject::Full { limit: whole, retry_after: RETRY_AFTER },
    })
}

pub(super) fn busy() -> Reject {
    Reject::TooFast { limit: "verify_concurrency_max", retry_after: Duration::from_secs(1) }
}

pub(super) const fn proto(protocol: Protocol) -> Option<Proto> {
    match protocol {
        Protocol::Http => Some(Proto::Http),
        Protocol::Mqtt => Some(Proto::Mqtt),
        Protocol::Coap => Some(Proto::Coap),
        Protocol::Gateway => None,
    }
}

/// `projects/P/locations/L/registries/R/devices/DEVICE`.
fn google_device(client_id: &str) -> Option<&str> {
    let mut levels = client_id.split('/');
    for word in ["projects", "locations", "registries"] {
        (levels.next()? == word && !levels.next()?.is_empty()).then_some(())?;
    }
    (levels.next()? == "devices").then_some(())?;
    let device = levels.next()?;
    levels.next().is_none().then_some(device)
}

const USED_JTI: Bounds = ("jti_max", "jti_per_device_max");
const USED_CHALLENGES: Bounds = ("used_challenges_max", "used_challenges_per_device_max");
const RETRY_AFTER: Duration = Duration::from_secs(10);

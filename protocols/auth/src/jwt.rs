//! The one kind of JWT in the contract: compact JWS, `EdDSA` or `Ed25519` (RFC 9864), signed by the device itself.
//!
//! A verifier that knows one algorithm cannot be talked into another, and takes no key from the token: the header may name a key (`kid`), never bring
//! one. Claims: `iss` and `sub` are the device id, `aud` is the gateway, `iat` and `exp` bound its life, `jti` makes it work once.
//!
//! With a `nonce` the device needs no clock: `nonce` is a challenge that it got over HTTP, `jti` the client nonce that it sent for it, and of `iat` and
//! `exp` only the difference counts. Reasons for own code instead of a JWT library: ADR 030.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::keys::{GatewayId, KeyId, PublicKey, SecretKey, sha256};
use crate::{ClientNonce, Signature, text};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// A longer token is refused unread; one of ours has about 400 bytes.
pub const JWT_BYTES_MAX: usize = 4096;

/// A token that is well-formed, of the right algorithm, and not yet believed.
pub struct Unverified<'a> {
    signed: &'a [u8],
    signature: Signature,
    key_id: Option<KeyId>,
    claims: Claims,
}

/// The claims of the contract. Unknown claims are ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Claims {
    pub iss: String,
    pub sub: String,
    pub aud: Audience,
    pub iat: NumericDate,
    pub exp: NumericDate,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbf: Option<NumericDate>,
    pub jti: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nonce: Option<String>,
}

/// RFC 7519 section 4.1.3: one string, or several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Audience {
    One(String),
    Several(Vec<String>),
}

impl Audience {
    fn names(&self, gateway: &GatewayId) -> bool {
        match self {
            Audience::One(name) => gateway.is_named_by(name),
            Audience::Several(names) => names.iter().any(|name| gateway.is_named_by(name)),
        }
    }
}

/// Seconds since 1970 (RFC 7519 section 2); a fraction is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "serde_json::Number")]
pub struct NumericDate(pub u64);

impl TryFrom<serde_json::Number> for NumericDate {
    type Error = &'static str;

    fn try_from(number: serde_json::Number) -> Result<Self, Self::Error> {
        const YEAR_9999: f64 = 253_402_300_800.0;
        if let Some(whole) = number.as_u64() {
            return Ok(NumericDate(whole));
        }
        match number.as_f64() {
            // In this range the conversion is exact but for the fraction.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            Some(seconds) if (0.0..YEAR_9999).contains(&seconds) => Ok(NumericDate(seconds as u64)),
            Some(_) | None => Err("not a date"),
        }
    }
}

/// Why a token is refused, for our log and our tests; a device is told nothing of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JwtError {
    /// Over [`JWT_BYTES_MAX`], not three parts of base64url, or not the JSON of the contract.
    Malformed,
    /// Another algorithm, or a header parameter that must be understood (`crit`) and is not.
    UnsupportedHeader,
    /// `iss` and `sub` differ.
    IssuerIsNotSubject,
    /// Meant for someone else.
    WrongAudience,
    /// `iat` or `nbf` lies in the future.
    NotYetValid,
    Expired,
    /// `exp` is not after `iat`, or too long after it.
    LifeTooLong,
}

impl fmt::Display for JwtError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            JwtError::Malformed => "not a JWT with the claims iss, sub, aud, iat, exp and jti",
            JwtError::UnsupportedHeader => "a JWT whose header is not alg EdDSA or Ed25519",
            JwtError::IssuerIsNotSubject => "a JWT whose iss is not its sub",
            JwtError::WrongAudience => "a JWT for another audience",
            JwtError::NotYetValid => "a JWT from the future",
            JwtError::Expired => "an expired JWT",
            JwtError::LifeTooLong => "a JWT whose exp is not after iat, or too long after it",
        })
    }
}

impl std::error::Error for JwtError {}

/// What a token is checked against besides its signature.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    pub gateway_id: &'a GatewayId,
    pub now_unix: u64,
    /// How far `iat` and `nbf` may lie in our future: the device's clock may be ahead of ours.
    pub clock_skew_secs: u64,
    /// `exp - iat` at most.
    pub life_secs_max: u64,
}

/// What makes a token fresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness<'a> {
    /// By the clock: the `jti` must be remembered until `expires_unix`.
    Clock { jti: [u8; 16] },
    /// By a challenge of ours, to be opened with the client nonce and used once.
    Challenge { challenge: &'a str, client_nonce: ClientNonce },
}

/// A token's outcome, once its signature holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant<'a> {
    pub freshness: Freshness<'a>,
    /// The login ends here.
    pub expires_unix: u64,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: Option<String>,
    #[serde(default)]
    crit: Option<serde_json::Value>,
}

impl<'a> Unverified<'a> {
    /// Takes a compact JWS apart. Costs no cryptography.
    ///
    /// # Errors
    /// For anything but the form and the algorithm of the contract.
    pub fn parse(jwt: &'a [u8]) -> Result<Self, JwtError> {
        if jwt.len() > JWT_BYTES_MAX {
            return Err(JwtError::Malformed);
        }
        let mut dots = jwt.iter().enumerate().filter(|(_, byte)| **byte == b'.').map(|(at, _)| at);
        let (Some(first), Some(second), None) = (dots.next(), dots.next(), dots.next()) else {
            return Err(JwtError::Malformed);
        };
        let part = |from: usize, to: usize| jwt.get(from..to).ok_or(JwtError::Malformed);
        let header: Header = json(part(0, first)?)?;
        if header.crit.is_some() || !matches!(header.alg.as_str(), "EdDSA" | "Ed25519") {
            return Err(JwtError::UnsupportedHeader);
        }
        let claims = json(part(first.saturating_add(1), second)?)?;
        let signature = std::str::from_utf8(part(second.saturating_add(1), jwt.len())?)
            .ok()
            .and_then(text::from_base64url)
            .ok_or(JwtError::Malformed)?;
        let key_id = header.kid.as_deref().and_then(text::from_text).map(KeyId);
        Ok(Unverified { signed: part(0, second)?, signature, key_id, claims })
    }

    /// Which key signed, if the header says so in our spelling; any other `kid` is as none.
    pub const fn key_id(&self) -> Option<KeyId> {
        self.key_id
    }

    pub const fn claims(&self) -> &Claims {
        &self.claims
    }

    /// Everything but the signature, and so nothing that depends on a registry.
    ///
    /// # Errors
    /// Names the first rule that the claims break.
    pub fn check(&self, expected: &Expected<'_>) -> Result<Grant<'_>, JwtError> {
        let claims = &self.claims;
        if claims.iss != claims.sub {
            return Err(JwtError::IssuerIsNotSubject);
        }
        if !claims.aud.names(expected.gateway_id) {
            return Err(JwtError::WrongAudience);
        }
        if claims.jti.is_empty() {
            return Err(JwtError::Malformed);
        }
        let life_secs = claims.exp.0.saturating_sub(claims.iat.0);
        if life_secs == 0 || life_secs > expected.life_secs_max {
            return Err(JwtError::LifeTooLong);
        }
        if let Some(challenge) = &claims.nonce {
            let client_nonce = text::from_text(&claims.jti).ok_or(JwtError::Malformed)?;
            let expires_unix = expected.now_unix.saturating_add(life_secs);
            return Ok(Grant { freshness: Freshness::Challenge { challenge, client_nonce }, expires_unix });
        }
        let latest = expected.now_unix.saturating_add(expected.clock_skew_secs);
        if claims.iat.0 > latest || claims.nbf.is_some_and(|nbf| nbf.0 > latest) {
            return Err(JwtError::NotYetValid);
        }
        if expected.now_unix >= claims.exp.0 {
            return Err(JwtError::Expired);
        }
        let [jti, _] = halves(sha256(claims.jti.as_bytes()));
        Ok(Grant { freshness: Freshness::Clock { jti }, expires_unix: claims.exp.0 })
    }

    /// Whether `key` signed it; costs one verification.
    #[must_use]
    pub fn is_signed_by(&self, key: &PublicKey) -> bool {
        key.verify(self.signed, &self.signature)
    }
}

/// Signs `claims` with a device's key and names the key in the header.
pub fn sign(claims: &Claims, key: &SecretKey) -> String {
    let header = format!(r#"{{"alg":"EdDSA","typ":"JWT","kid":"{}"}}"#, key.public().key_id());
    let claims = serde_json::to_vec(claims).expect("strings and whole numbers always have a JSON form");
    let mut jwt = format!("{}.{}", text::base64url(header.as_bytes()), text::base64url(&claims));
    let signature = key.sign(jwt.as_bytes());
    jwt.push('.');
    jwt.push_str(&text::base64url(&signature));
    jwt
}

fn json<T: for<'de> Deserialize<'de>>(part: &[u8]) -> Result<T, JwtError> {
    let bytes = URL_SAFE_NO_PAD.decode(part).map_err(|_| JwtError::Malformed)?;
    serde_json::from_slice(&bytes).map_err(|_| JwtError::Malformed)
}

fn halves(hash: [u8; 32]) -> [[u8; 16]; 2] {
    let mut halves = [[0; 16]; 2];
    for (to, from) in halves.iter_mut().flatten().zip(hash) {
        *to = from;
    }
    halves
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: u64 = 1_795_132_800;

    fn key() -> SecretKey {
        SecretKey::from_seed(&[3; 32])
    }

    fn gateway() -> GatewayId {
        GatewayId([0xcd; 32])
    }

    fn claims() -> Claims {
        Claims {
            iss: "sensor-1".into(),
            sub: "sensor-1".into(),
            aud: Audience::One(gateway().audience()),
            iat: NumericDate(NOW),
            exp: NumericDate(NOW + 3600),
            nbf: None,
            jti: "once".into(),
            nonce: None,
        }
    }

    fn check(claims: &Claims, now_unix: u64) -> Result<u64, JwtError> {
        let jwt = sign(claims, &key());
        let gateway_id = gateway();
        let expected = Expected { gateway_id: &gateway_id, now_unix, clock_skew_secs: 60, life_secs_max: 86_400 };
        Unverified::parse(jwt.as_bytes()).unwrap().check(&expected).map(|grant| grant.expires_unix)
    }

    /// A token with this header and these claims, properly signed.
    fn forge(header: &str, claims: &str) -> String {
        let signed = format!("{}.{}", text::base64url(header.as_bytes()), text::base64url(claims.as_bytes()));
        let signature = text::base64url(&key().sign(signed.as_bytes()));
        format!("{signed}.{signature}")
    }

    fn claims_json() -> String {
        serde_json::to_string(&claims()).unwrap()
    }

    #[test]
    fn a_token_of_ours_is_accepted_under_both_names_of_the_algorithm() {
        let jwt = sign(&claims(), &key());
        let unverified = Unverified::parse(jwt.as_bytes()).unwrap();
        assert!(unverified.is_signed_by(&key().public()));
        assert!(!unverified.is_signed_by(&SecretKey::from_seed(&[4; 32]).public()));
        assert_eq!(unverified.key_id(), Some(key().public().key_id()));
        for alg in ["EdDSA", "Ed25519"] {
            let jwt = forge(&format!(r#"{{"alg":"{alg}"}}"#), &claims_json());
            assert!(Unverified::parse(jwt.as_bytes()).unwrap().is_signed_by(&key().public()));
        }
    }

    #[test]
    fn the_example_of_rfc_8037_verifies() {
        let key = text::from_base64url("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo").unwrap();
        let jws = "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc";
        let signature = "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg";
        let signature = text::from_base64url(signature).unwrap();
        assert!(PublicKey::register(key).unwrap().verify(jws.as_bytes(), &signature));
    }

    #[test]
    fn no_other_algorithm_and_no_critical_header_is_accepted() {
        for header in [
            r#"{"alg":"none"}"#,
            r#"{"alg":"HS256"}"#,
            r#"{"alg":"eddsa"}"#,
            r#"{"alg":"Ed448"}"#,
            r#"{"alg":"EdDSA","crit":["b64"],"b64":false}"#,
            r#"{"alg":"EdDSA","crit":[]}"#,
        ] {
            let refusal = Unverified::parse(forge(header, &claims_json()).as_bytes()).err();
            assert_eq!(refusal, Some(JwtError::UnsupportedHeader), "{header}");
        }
        for header in ["{}", r#"{"alg":"EdDSA","alg":"none"}"#, "[]", "", r#"{"alg":1}"#] {
            let refusal = Unverified::parse(forge(header, &claims_json()).as_bytes()).err();
            assert_eq!(refusal, Some(JwtError::Malformed), "{header}");
        }
    }

    #[test]
    fn a_key_in_the_header_is_not_a_key() {
        let header = r#"{"alg":"EdDSA","jwk":{"kty":"OKP"},"jku":"https://evil.example","kid":"of my own"}"#;
        let jwt = forge(header, &claims_json());
        assert_eq!(Unverified::parse(jwt.as_bytes()).unwrap().key_id(), None);
    }

    #[test]
    fn a_missing_or_doubled_claim_is_malformed() {
        let full: serde_json::Value = serde_json::from_str(&claims_json()).unwrap();
        for name in ["iss", "sub", "aud", "iat", "exp", "jti"] {
            let mut less = full.clone();
            less.as_object_mut().unwrap().remove(name);
            let jwt = forge(r#"{"alg":"EdDSA"}"#, &less.to_string());
            assert_eq!(Unverified::parse(jwt.as_bytes()).err(), Some(JwtError::Malformed), "{name}");
        }
        let doubled = claims_json().replacen('{', r#"{"sub":"admin","#, 1);
        let jwt = forge(r#"{"alg":"EdDSA"}"#, &doubled);
        assert_eq!(Unverified::parse(jwt.as_bytes()).err(), Some(JwtError::Malformed));
    }

    #[test]
    fn the_edges_of_time_are_exact() {
        assert_eq!(check(&claims(), NOW), Ok(NOW + 3600));
        assert_eq!(check(&claims(), NOW + 3599), Ok(NOW + 3600));
        assert_eq!(check(&claims(), NOW + 3600), Err(JwtError::Expired));
        assert_eq!(check(&claims(), NOW - 60), Ok(NOW + 3600));
        assert_eq!(check(&claims(), NOW - 61), Err(JwtError::NotYetValid));
        let later = Claims { nbf: Some(NumericDate(NOW + 100)), ..claims() };
        assert_eq!(check(&later, NOW), Err(JwtError::NotYetValid));
        assert_eq!(check(&later, NOW + 40), Ok(NOW + 3600));
    }

    #[test]
    fn a_life_over_the_maximum_is_refused() {
        let of = |life| Claims { exp: NumericDate(NOW + life), ..claims() };
        assert_eq!(check(&of(86_400), NOW), Ok(NOW + 86_400));
        assert_eq!(check(&of(86_401), NOW), Err(JwtError::LifeTooLong));
        assert_eq!(check(&of(0), NOW), Err(JwtError::LifeTooLong));
        assert_eq!(check(&Claims { exp: NumericDate(1), ..claims() }, NOW), Err(JwtError::LifeTooLong));
        let forever = Claims { iat: NumericDate(0), exp: NumericDate(u64::MAX), ..claims() };
        assert_eq!(check(&forever, NOW), Err(JwtError::LifeTooLong));
    }

    #[test]
    fn the_audience_may_be_one_of_several_and_must_be_ours() {
        let several = Audience::Several(vec!["https://cloud.example".into(), gateway().audience()]);
        assert!(check(&Claims { aud: several, ..claims() }, NOW).is_ok());
        for aud in [Audience::One("urn:tidegate:00".into()), Audience::One(String::new()), Audience::Several(vec![])] {
            assert_eq!(check(&Claims { aud, ..claims() }, NOW), Err(JwtError::WrongAudience));
        }
    }

    #[test]
    fn issuer_and_subject_are_the_same_device() {
        assert_eq!(check(&Claims { iss: "other".into(), ..claims() }, NOW), Err(JwtError::IssuerIsNotSubject));
        assert_eq!(check(&Claims { jti: String::new(), ..claims() }, NOW), Err(JwtError::Malformed));
    }

    #[test]
    fn with_a_challenge_only_the_length_of_life_counts() {
        let nonce = [0xa0; 16];
        let clockless = Claims {
            iat: NumericDate(0),
            exp: NumericDate(600),
            jti: text::base64url(&nonce),
            nonce: Some("challenge".into()),
            ..claims()
        };
        let jwt = sign(&clockless, &key());
        let gateway_id = gateway();
        let expected = Expected { gateway_id: &gateway_id, now_unix: NOW, clock_skew_secs: 0, life_secs_max: 600 };
        let unverified = Unverified::parse(jwt.as_bytes()).unwrap();
        let freshness = Freshness::Challenge { challenge: "challenge", client_nonce: nonce };
        assert_eq!(unverified.check(&expected), Ok(Grant { freshness, expires_unix: NOW + 600 }));
        assert_eq!(check(&Claims { jti: "not a nonce".into(), ..clockless }, NOW), Err(JwtError::Malformed));
    }

    #[test]
    fn a_date_may_have_a_fraction_and_nothing_else() {
        let date = |text: &str| serde_json::from_str::<NumericDate>(text).ok();
        assert_eq!(date("1795132800.75"), Some(NumericDate(NOW)));
        assert_eq!(date("1.7951328e9"), Some(NumericDate(NOW)));
        for bad in ["-1", "-0.5", "1e300", "\"1\"", "null", "true"] {
            assert_eq!(date(bad), None, "{bad}");
        }
    }

    #[test]
    fn anything_but_three_parts_is_malformed() {
        let jwt = sign(&claims(), &key());
        let long = format!("{jwt}{}", "A".repeat(JWT_BYTES_MAX));
        for bad in
            ["", ".", "..", "...", &jwt[1..], &format!("{jwt}."), &format!("{jwt}A"), &jwt.replace('.', ""), &long]
        {
            assert_eq!(Unverified::parse(bad.as_bytes()).err(), Some(JwtError::Malformed), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_flipped_bit_fails(position: prop::sample::Index, bit in 0u8..8) {
            let mut jwt = sign(&claims(), &key()).into_bytes();
            let at = position.index(jwt.len());
            jwt[at] ^= 1 << bit;
            let accepted = Unverified::parse(&jwt).is_ok_and(|jwt| jwt.is_signed_by(&key().public()));
            prop_assert!(!accepted);
        }

        #[test]
        fn arbitrary_bytes_never_panic(jwt: Vec<u8>, header: String, claims: String) {
            let _ = Unverified::parse(&jwt).map(|_| ());
            let _ = Unverified::parse(forge(&header, &claims).as_bytes()).map(|_| ());
        }
    }
}

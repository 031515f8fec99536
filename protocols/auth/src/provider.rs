//! JWTs of an identity provider: its keys as a JWK Set (RFC 7517), its tokens as compact JWS with `HS256`, `ES256` or `EdDSA` (RFC 7518, RFC 8037).
//!
//! The key decides the algorithm, never the token: a token's `alg` has to be the one that its key is for, so an `ES256` key cannot be taken for an HMAC secret.
//! No key is taken from a token, `crit` is refused, and so is a member that stands there twice.
//!
//! Not here: fetching the set, and tokens of the gateway's own devices ([`crate::jwt`]).

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use serde::Deserialize;
use sha2::Sha256;

use crate::jwt::NumericDate;

/// A longer token is refused unread.
pub const TOKEN_BYTES_MAX: usize = 8192;
/// A larger set is refused unread, and one with more keys.
pub const SET_BYTES_MAX: usize = 256 << 10;
pub const SET_KEYS_MAX: usize = 64;

/// The keys of a provider that its tokens may be signed with.
#[derive(Debug, Default)]
pub struct KeySet(Vec<Key>);

struct Key {
    id: Option<String>,
    material: Material,
}

enum Material {
    /// At least as long as the hash (RFC 7518 section 3.2).
    Hs256(Vec<u8>),
    /// Uncompressed point.
    Es256([u8; 65]),
    Ed25519(ed25519_dalek::VerifyingKey),
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} key {:?}", self.material.algorithm(), self.id)
    }
}

/// Why a set is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetError {
    TooLarge,
    Malformed,
    /// It has a private key in it, which no gateway should see.
    Private,
    /// None of its keys is of a kind that is known here.
    NoKey,
}

impl fmt::Display for SetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SetError::TooLarge => "larger than 256 KiB, or more than 64 keys",
            SetError::Malformed => "not a JWK Set: {\"keys\": [...]}",
            SetError::Private => "it has a private key in it; only public keys and shared secrets belong there",
            SetError::NoKey => {
                "no key for HS256 (oct, 32 bytes or more), ES256 (EC P-256) or EdDSA (OKP Ed25519) in it"
            }
        })
    }
}

impl std::error::Error for SetError {}

/// What a token is checked against besides its signature.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    pub issuer: &'a str,
    /// One of these has to be in `aud`.
    pub audiences: &'a [String],
    pub now_unix: u64,
    /// How far `exp` may lie in our past, and `nbf` and `iat` in our future.
    pub clock_skew_secs: u64,
    pub es256: VerifyEs256,
}

/// Whether a signature of ES256 (RFC 7518 section 3.4: 64 bytes) is by the key at this point (uncompressed) over these bytes; the arguments in this order
/// are point, bytes, signature. Handed in, for whoever has TLS has this already, and with it what an engine must not have.
pub type VerifyEs256 = fn(&[u8], &[u8], &[u8]) -> bool;

/// Why a token is refused, for the log; its bearer learns `invalid_token`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    Malformed,
    /// Not HS256, ES256 or EdDSA, or with a `crit`.
    UnsupportedHeader,
    /// There is no key of that `kid` and kind: the provider may have new ones.
    UnknownKey,
    WrongSignature,
    WrongIssuer,
    WrongAudience,
    NotYetValid,
    Expired,
}

/// What a token says that can be believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Believed {
    pub subject: String,
    pub expires_unix: u64,
}

#[derive(Deserialize)]
struct Set {
    keys: Vec<Jwk>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    #[serde(default)]
    kid: Option<String>,
    #[serde(default, rename = "use")]
    usage: Option<String>,
    #[serde(default)]
    alg: Option<String>,
    #[serde(default)]
    crv: Option<String>,
    #[serde(default)]
    x: Option<String>,
    #[serde(default)]
    y: Option<String>,
    #[serde(default)]
    k: Option<String>,
    #[serde(default)]
    d: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: Option<String>,
    #[serde(default)]
    crit: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct Claims {
    iss: String,
    #[serde(default)]
    sub: String,
    #[serde(default)]
    aud: Option<Audience>,
    exp: NumericDate,
    #[serde(default)]
    nbf: Option<NumericDate>,
    #[serde(default)]
    iat: Option<NumericDate>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Several(Vec<String>),
}

impl KeySet {
    /// Reads a set. Keys of kinds that are not known here, or not for signatures, are left out (RFC 7517 section 5).
    ///
    /// # Errors
    /// [`SetError`].
    pub fn parse(text: &[u8]) -> Result<KeySet, SetError> {
        if text.len() > SET_BYTES_MAX {
            return Err(SetError::TooLarge);
        }
        let set: Set = serde_json::from_slice(text).map_err(|_| SetError::Malformed)?;
        if set.keys.len() > SET_KEYS_MAX {
            return Err(SetError::TooLarge);
        }
        if set.keys.iter().any(|jwk| jwk.d.is_some()) {
            return Err(SetError::Private);
        }
        let keys: Vec<Key> = set.keys.into_iter().filter_map(Key::of).collect();
        if keys.is_empty() { Err(SetError::NoKey) } else { Ok(KeySet(keys)) }
    }

    /// Believes a token, or says why not.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn believe(&self, token: &str, wanted: &Wanted<'_>) -> Result<Believed, Refusal> {
        let payload = self.payload(token, wanted.es256)?;
        let claims: Claims = serde_json::from_slice(&payload).map_err(|_| Refusal::Malformed)?;
        if claims.iss != wanted.issuer {
            return Err(Refusal::WrongIssuer);
        }
        let is_for_us = |name: &String| wanted.audiences.contains(name);
        let named = match &claims.aud {
            None => false,
            Some(Audience::One(name)) => is_for_us(name),
            Some(Audience::Several(names)) => names.iter().any(is_for_us),
        };
        if !named {
            return Err(Refusal::WrongAudience);
        }
        let latest = wanted.now_unix.saturating_add(wanted.clock_skew_secs);
        if [claims.nbf, claims.iat].into_iter().flatten().any(|from| from.0 > latest) {
            return Err(Refusal::NotYetValid);
        }
        if claims.exp.0.saturating_add(wanted.clock_skew_secs) <= wanted.now_unix {
            return Err(Refusal::Expired);
        }
        Ok(Believed { subject: claims.sub, expires_unix: claims.exp.0 })
    }

    /// What is signed, if it is.
    fn payload(&self, token: &str, es256: VerifyEs256) -> Result<Vec<u8>, Refusal> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(Refusal::Malformed);
        }
        let (signed, signature) = token.rsplit_once('.').ok_or(Refusal::Malformed)?;
        let (header, payload) = signed.split_once('.').ok_or(Refusal::Malformed)?;
        let header: Header = serde_json::from_slice(&decode(header)?).map_err(|_| Refusal::Malformed)?;
        let signature = decode(signature)?;
        let algorithm = match header.alg.as_str() {
            // RFC 9864 names the curve.
            "Ed25519" => "EdDSA",
            known @ ("HS256" | "ES256" | "EdDSA") => known,
            _ => return Err(Refusal::UnsupportedHeader),
        };
        if header.crit.is_some() {
            return Err(Refusal::UnsupportedHeader);
        }
        let fits = |key: &&Key| {
            key.material.algorithm() == algorithm && header.kid.as_ref().is_none_or(|kid| key.id.as_ref() == Some(kid))
        };
        let mut keys = self.0.iter().filter(fits).peekable();
        if keys.peek().is_none() {
            return Err(Refusal::UnknownKey);
        }
        if !keys.any(|key| key.material.verifies(signed.as_bytes(), &signature, es256)) {
            return Err(Refusal::WrongSignature);
        }
        decode(payload)
    }
}

impl Key {
    fn of(jwk: Jwk) -> Option<Key> {
        if jwk.usage.as_deref().is_some_and(|usage| usage != "sig") {
            return None;
        }
        let bytes = |text: &Option<String>| URL_SAFE_NO_PAD.decode(text.as_deref()?).ok();
        let material = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
            ("oct", _) => Material::Hs256(bytes(&jwk.k).filter(|secret| secret.len() >= 32)?),
            ("EC", Some("P-256")) => {
                let (x, y): ([u8; 32], [u8; 32]) = (bytes(&jwk.x)?.try_into().ok()?, bytes(&jwk.y)?.try_into().ok()?);
                let mut point = [4; 65];
                point[1..33].copy_from_slice(&x);
                point[33..].copy_from_slice(&y);
                Material::Es256(point)
            }
            ("OKP", Some("Ed25519")) => {
                let key = ed25519_dalek::VerifyingKey::from_bytes(&bytes(&jwk.x)?.try_into().ok()?).ok()?;
                Material::Ed25519(Some(key).filter(|key| !key.is_weak())?)
            }
            _ => return None,
        };
        let named = jwk.alg.as_deref().map(|alg| if alg == "Ed25519" { "EdDSA" } else { alg });
        named.is_none_or(|alg| alg == material.algorithm()).then_some(Key { id: jwk.kid, material })
    }
}

impl Material {
    const fn algorithm(&self) -> &'static str {
        match self {
            Material::Hs256(_) => "HS256",
            Material::Es256(_) => "ES256",
            Material::Ed25519(_) => "EdDSA",
        }
    }

    fn verifies(&self, signed: &[u8], signature: &[u8], es256: VerifyEs256) -> bool {
        match self {
            Material::Hs256(secret) => Hmac::<Sha256>::new_from_slice(secret)
                .is_ok_and(|mac| mac.chain_update(signed).verify_slice(signature).is_ok()),
            Material::Es256(point) => es256(point, signed, signature),
            Material::Ed25519(key) => ed25519_dalek::Signature::from_slice(signature)
                .is_ok_and(|signature| key.verify_strict(signed, &signature).is_ok()),
        }
    }
}

/// Without padding, and without bits that say nothing (RFC 7515 section 2).
fn decode(text: &str) -> Result<Vec<u8>, Refusal> {
    URL_SAFE_NO_PAD.decode(text).map_err(|_| Refusal::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7515 appendix A.1 and A.3, RFC 8037 appendix A.4.
    const HS256: &str = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
    const ES256: &str = "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q";
    const EDDSA: &str = "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg";
    const OCT: &str =
        r#"{"kty":"oct","k":"AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"}"#;
    const EC: &str = r#"{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}"#;
    const OKP: &str = r#"{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#;

    fn es256(point: &[u8], signed: &[u8], signature: &[u8]) -> bool {
        let key = ring::signature::UnparsedPublicKey::new(&ring::signature::ECDSA_P256_SHA256_FIXED, point);
        key.verify(signed, signature).is_ok()
    }

    fn set(keys: &[&str]) -> KeySet {
        KeySet::parse(format!("{{\"keys\":[{}]}}", keys.join(",")).as_bytes()).unwrap()
    }

    #[test]
    fn what_the_rfcs_have_signed_is_believed_by_its_own_key_alone() {
        for (token, key) in [(HS256, OCT), (ES256, EC), (EDDSA, OKP)] {
            assert!(set(&[key]).payload(token, es256).is_ok());
            assert!(set(&[OCT, EC, OKP]).payload(token, es256).is_ok());
            for other in [OCT, EC, OKP].iter().filter(|other| **other != key) {
                assert_eq!(set(&[other]).payload(token, es256), Err(Refusal::UnknownKey));
            }
        }
    }

    #[test]
    fn every_changed_bit_is_found() {
        let keys = set(&[OCT, EC, OKP]);
        for token in [HS256, ES256, EDDSA] {
            for at in 0..token.len() {
                let mut bytes = token.as_bytes().to_vec();
                bytes[at] ^= 1;
                let Ok(changed) = String::from_utf8(bytes) else { continue };
                assert!(keys.payload(&changed, es256).is_err(), "{at} of {token}");
            }
        }
    }

    fn hs256(header: &str, claims: &str) -> String {
        let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        let mac = Hmac::<Sha256>::new_from_slice(&[7; 32]).unwrap().chain_update(&signed).finalize();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(mac.into_bytes()))
    }

    fn judged(header: &str, claims: &str) -> Result<Believed, Refusal> {
        let key = format!(r#"{{"kty":"oct","kid":"a","k":"{}"}}"#, URL_SAFE_NO_PAD.encode([7; 32]));
        let audiences = ["api".to_owned()];
        let wanted = Wanted { issuer: "idp", audiences: &audiences, now_unix: 1000, clock_skew_secs: 10, es256 };
        set(&[&key]).believe(&hs256(header, claims), &wanted)
    }

    #[test]
    fn claims_are_judged_by_issuer_audience_and_time() {
        let header = r#"{"alg":"HS256","kid":"a"}"#;
        let believed = judged(header, r#"{"iss":"idp","sub":"s","aud":["x","api"],"exp":1001,"nbf":1010,"iat":900}"#);
        assert_eq!(believed, Ok(Believed { subject: "s".into(), expires_unix: 1001 }));
        for (claims, refusal) in [
            (r#"{"iss":"other","aud":"api","exp":2000}"#, Refusal::WrongIssuer),
            (r#"{"iss":"idp","aud":"x","exp":2000}"#, Refusal::WrongAudience),
            (r#"{"iss":"idp","exp":2000}"#, Refusal::WrongAudience),
            (r#"{"iss":"idp","aud":"api","exp":990}"#, Refusal::Expired),
            (r#"{"iss":"idp","aud":"api","exp":2000,"nbf":1011}"#, Refusal::NotYetValid),
            (r#"{"iss":"idp","aud":"api","exp":2000,"iat":1011}"#, Refusal::NotYetValid),
            (r#"{"iss":"idp","aud":"api"}"#, Refusal::Malformed),
            (r#"{"iss":"idp","aud":"api","exp":"2000"}"#, Refusal::Malformed),
            (r#"{"iss":"idp","iss":"idp","aud":"api","exp":2000}"#, Refusal::Malformed),
        ] {
            assert_eq!(judged(header, claims), Err(refusal), "{claims}");
        }
    }

    #[test]
    fn a_header_cannot_talk_anybody_into_anything() {
        let claims = r#"{"iss":"idp","aud":"api","exp":2000}"#;
        assert!(judged(r#"{"alg":"HS256"}"#, claims).is_ok(), "without kid every key of the kind is tried");
        for (header, refusal) in [
            (r#"{"alg":"none"}"#, Refusal::UnsupportedHeader),
            (r#"{"alg":"HS384"}"#, Refusal::UnsupportedHeader),
            (r#"{"alg":"hs256"}"#, Refusal::UnsupportedHeader),
            (r#"{"alg":"RS256"}"#, Refusal::UnsupportedHeader),
            (r#"{"alg":"HS256","crit":["b64"],"b64":false}"#, Refusal::UnsupportedHeader),
            (r#"{"alg":"HS256","kid":"b"}"#, Refusal::UnknownKey),
            (r#"{"alg":"ES256","kid":"a"}"#, Refusal::UnknownKey),
            (r#"{"alg":"HS256","alg":"HS256"}"#, Refusal::Malformed),
            (r#"{}"#, Refusal::Malformed),
        ] {
            assert_eq!(judged(header, claims), Err(refusal), "{header}");
        }
    }

    #[test]
    fn a_set_is_read_strictly_and_what_is_unknown_in_it_is_left_out() {
        let parse = |text: &str| KeySet::parse(text.as_bytes()).map(|set| set.0.len());
        assert_eq!(parse(&format!(r#"{{"keys":[{{"kty":"RSA","n":"AQAB","e":"AQAB"}},{EC}]}}"#)), Ok(1));
        assert_eq!(parse(r#"{"keys":[{"kty":"oct","k":"c2hvcnQ"}]}"#), Err(SetError::NoKey));
        assert_eq!(
            parse(&EC.replace("{\"kty\"", "{\"keys\":[{\"use\":\"enc\",\"kty\"").replace("}", "}]}")),
            Err(SetError::NoKey)
        );
        assert_eq!(
            parse(&OKP.replace("{\"kty\"", "{\"keys\":[{\"d\":\"x\",\"kty\"").replace("}", "}]}")),
            Err(SetError::Private)
        );
        assert_eq!(
            parse(&EC.replace("{\"kty\"", "{\"keys\":[{\"alg\":\"HS256\",\"kty\"").replace("}", "}]}")),
            Err(SetError::NoKey)
        );
        assert_eq!(parse("[]"), Err(SetError::Malformed));
        assert_eq!(parse(&" ".repeat(SET_BYTES_MAX + 1)), Err(SetError::TooLarge));
        let many = vec![EC; SET_KEYS_MAX + 1].join(",");
        assert_eq!(parse(&format!("{{\"keys\":[{many}]}}")), Err(SetError::TooLarge));
    }
}

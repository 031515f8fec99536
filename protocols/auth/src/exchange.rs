//! The bodies of the challenge flow, for both ends: JSON on HTTP, CBOR on CoAP.
//!
//! ```text
//! HTTP  POST /auth/challenge {device_id, client_nonce}                                            -> {challenge, gateway_id, expires_in}
//!       POST /auth/session   {device_id, key_id, client_nonce, challenge, cb_type, signature}     -> {access_token, token_type, expires_in, gateway_signature}
//! CoAP  POST /auth/c  [device_id, client_nonce]                                                   -> 38 bytes
//!       POST /auth/s  [device_id, client_nonce, key_id, challenge, sig]                           -> {1: token, 2: lifetime_s, 3: gateway sig}
//! ```
//! In JSON, bytes may come as hex or as base64url; they leave as base64url, ids (`gateway_id`) as hex.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::cbor::{Reader, Writer};
use crate::challenge::{CHALLENGE_BYTES, Challenge};
use crate::keys::{GatewayId, KeyId};
use crate::token::TOKEN_BYTES;
use crate::transcript::CbType;
use crate::{ClientNonce, Signature, text};

/// `POST /auth/challenge` and `POST /auth/c`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChallengeRequest {
    pub device_id: String,
    #[serde(with = "base64url")]
    pub client_nonce: ClientNonce,
}

/// The HTTP answer to it; CoAP's is the bare challenge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChallengeAnswer {
    #[serde(with = "base64url")]
    pub challenge: Challenge,
    #[serde(with = "hex_id")]
    pub gateway_id: GatewayId,
    /// Seconds.
    pub expires_in: u32,
}

/// `POST /auth/session` and `POST /auth/s`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRequest {
    pub device_id: String,
    #[serde(with = "hex_key_id")]
    pub key_id: KeyId,
    #[serde(with = "base64url")]
    pub client_nonce: ClientNonce,
    #[serde(with = "base64url")]
    pub challenge: Challenge,
    /// Always 0 on CoAP.
    #[serde(default = "unbound", with = "cb_byte")]
    pub cb_type: CbType,
    #[serde(with = "base64url")]
    pub signature: Signature,
}

/// The answer to it; with OAuth's member names (RFC 6749 section 5.1), so that any OAuth client can read it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionAnswer {
    #[serde(with = "base64url")]
    pub access_token: [u8; TOKEN_BYTES],
    pub token_type: TokenType,
    /// Seconds.
    pub expires_in: u32,
    /// Absent where no transcript was signed, as with a JWT.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "optional_base64url")]
    pub gateway_signature: Option<Signature>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenType {
    Bearer,
}

impl ChallengeRequest {
    pub fn from_cbor(body: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(body);
        (reader.array()? == 2).then_some(())?;
        let device_id = reader.text()?.to_owned();
        let client_nonce = reader.bytes()?.try_into().ok()?;
        reader.end()?;
        Some(ChallengeRequest { device_id, client_nonce })
    }

    pub fn to_cbor(&self) -> Vec<u8> {
        Writer::default().array(2).text(&self.device_id).bytes(&self.client_nonce).finish()
    }
}

impl SessionRequest {
    pub fn from_cbor(body: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(body);
        (reader.array()? == 5).then_some(())?;
        let device_id = reader.text()?.to_owned();
        let client_nonce = reader.bytes()?.try_into().ok()?;
        let key_id = KeyId(reader.bytes()?.try_into().ok()?);
        let challenge: [u8; CHALLENGE_BYTES] = reader.bytes()?.try_into().ok()?;
        let signature = reader.bytes()?.try_into().ok()?;
        reader.end()?;
        Some(SessionRequest { device_id, key_id, client_nonce, challenge, cb_type: CbType::None, signature })
    }

    pub fn to_cbor(&self) -> Vec<u8> {
        Writer::default()
            .array(5)
            .text(&self.device_id)
            .bytes(&self.client_nonce)
            .bytes(&self.key_id.0)
            .bytes(&self.challenge)
            .bytes(&self.signature)
            .finish()
    }
}

impl SessionAnswer {
    pub fn to_cbor(&self) -> Vec<u8> {
        let pairs = if self.gateway_signature.is_some() { 3 } else { 2 };
        let body = Writer::default().map(pairs).uint(1).bytes(&self.access_token);
        let body = body.uint(2).uint(u64::from(self.expires_in));
        match &self.gateway_signature {
            Some(signature) => body.uint(3).bytes(signature).finish(),
            None => body.finish(),
        }
    }

    pub fn from_cbor(body: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(body);
        let pairs = reader.map()?;
        let access_token = (reader.uint()? == 1).then(|| reader.bytes()?.try_into().ok())??;
        let expires_in = (reader.uint()? == 2).then(|| u32::try_from(reader.uint()?).ok())??;
        let gateway_signature = match pairs {
            2 => None,
            3 => Some((reader.uint()? == 3).then(|| reader.bytes()?.try_into().ok())??),
            _ => return None,
        };
        reader.end()?;
        Some(SessionAnswer { access_token, token_type: TokenType::Bearer, expires_in, gateway_signature })
    }
}

const fn unbound() -> CbType {
    CbType::None
}

fn fixed<'de, const N: usize, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; N], D::Error> {
    let text = String::deserialize(deserializer)?;
    text::from_text(&text).ok_or_else(|| D::Error::custom(format_args!("not {N} bytes in hex or base64url")))
}

mod base64url {
    use super::{Deserializer, Serializer, fixed, text};

    pub(super) fn serialize<const N: usize, S: Serializer>(bytes: &[u8; N], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&text::base64url(bytes))
    }

    pub(super) fn deserialize<'de, const N: usize, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; N], D::Error> {
        fixed(deserializer)
    }
}

mod optional_base64url {
    use super::{Deserializer, Serializer, Signature, fixed, text};

    #[allow(clippy::ref_option)] // The signature that serde asks for.
    pub(super) fn serialize<S: Serializer>(bytes: &Option<Signature>, serializer: S) -> Result<S::Ok, S::Error> {
        match bytes {
            Some(bytes) => serializer.serialize_str(&text::base64url(bytes)),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Signature>, D::Error> {
        fixed(deserializer).map(Some)
    }
}

mod hex_id {
    use super::{Deserializer, GatewayId, Serializer, fixed};

    pub(super) fn serialize<S: Serializer>(id: &GatewayId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<GatewayId, D::Error> {
        fixed(deserializer).map(GatewayId)
    }
}

mod hex_key_id {
    use super::{Deserializer, KeyId, Serializer, fixed};

    pub(super) fn serialize<S: Serializer>(id: &KeyId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<KeyId, D::Error> {
        fixed(deserializer).map(KeyId)
    }
}

mod cb_byte {
    use super::{CbType, Deserialize as _, Deserializer, Serializer};
    use serde::de::Error as _;

    pub(super) fn serialize<S: Serializer>(cb_type: &CbType, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(*cb_type as u8)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<CbType, D::Error> {
        let byte = u8::deserialize(deserializer)?;
        CbType::from_byte(byte).ok_or_else(|| D::Error::custom("not a channel binding type"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn session_request() -> SessionRequest {
        SessionRequest {
            device_id: "sensor-0042".into(),
            key_id: KeyId([1; 8]),
            client_nonce: [2; 16],
            challenge: [3; CHALLENGE_BYTES],
            cb_type: CbType::None,
            signature: [4; 64],
        }
    }

    fn session_answer(gateway_signature: Option<Signature>) -> SessionAnswer {
        SessionAnswer {
            access_token: [5; TOKEN_BYTES],
            token_type: TokenType::Bearer,
            expires_in: 900,
            gateway_signature,
        }
    }

    #[test]
    fn json_bodies_read_back_and_take_hex_too() {
        let request = session_request();
        let json = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<SessionRequest>(&json).unwrap(), request);
        let hex = json.replace(&text::base64url(&[2; 16]), &"02".repeat(16));
        assert!(hex.len() > json.len());
        assert_eq!(serde_json::from_str::<SessionRequest>(&hex).unwrap(), request);
        for answer in [session_answer(None), session_answer(Some([6; 64]))] {
            let json = serde_json::to_string(&answer).unwrap();
            assert!(json.contains(r#""token_type":"Bearer""#), "{json}");
            assert_eq!(serde_json::from_str::<SessionAnswer>(&json).unwrap(), answer);
        }
    }

    #[test]
    fn cbor_bodies_read_back() {
        let request = session_request();
        assert_eq!(SessionRequest::from_cbor(&request.to_cbor()), Some(request));
        let ask = ChallengeRequest { device_id: "a".into(), client_nonce: [2; 16] };
        assert_eq!(ChallengeRequest::from_cbor(&ask.to_cbor()), Some(ask.clone()));
        for answer in [session_answer(None), session_answer(Some([6; 64]))] {
            assert_eq!(SessionAnswer::from_cbor(&answer.to_cbor()), Some(answer));
        }
    }

    #[test]
    fn a_body_of_the_wrong_shape_is_refused() {
        let good = ChallengeRequest { device_id: "a".into(), client_nonce: [2; 16] }.to_cbor();
        let mut long = good.clone();
        long.push(0);
        for bad in [&good[..good.len() - 1], &long, &[0x80], &[]] {
            assert_eq!(ChallengeRequest::from_cbor(bad), None);
        }
        let bad_type = serde_json::to_string(&session_request()).unwrap().replace(r#""cb_type":0"#, r#""cb_type":9"#);
        assert!(serde_json::from_str::<SessionRequest>(&bad_type).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bodies_never_panic(body: Vec<u8>) {
            let _ = ChallengeRequest::from_cbor(&body);
            let _ = SessionRequest::from_cbor(&body);
            let _ = SessionAnswer::from_cbor(&body);
            let _ = serde_json::from_slice::<SessionRequest>(&body);
        }
    }
}

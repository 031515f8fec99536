//! The bearer token: 43 bytes that say which device has logged in, until when, and for which protocol.
//!
//! ```text
//! 01 | epoch | exp u32 | device index u32 | generation u32 | protocol mask | cnf 8 | random 4 | HMAC 16
//! tag = HMAC-SHA256(K[epoch], "tidegate-token/1" 00 | the 27 bytes before)[0..16]
//! ```
//! `cnf` is the id of the device key that logged in. The key is derived from the gateway's own, so a token outlives a restart but not a change of that
//! key. Revocation is not in here: the caller compares `generation` with the registry, on every use.

use std::fmt;

use hmac::{Hmac, Mac as _};
use sha2::Sha256;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use crate::challenge::{hmac, truncate};
use crate::keys::{KeyId, SecretKey};
use crate::text;
use crate::transcript::Proto;

pub const TOKEN_BYTES: usize = BODY_BYTES + TAG_BYTES;
/// Length of a token as base64url.
pub const TOKEN_CHARS: usize = (TOKEN_BYTES * 4).div_ceil(3);

/// What a token says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// Unix seconds; the token is good before this second.
    pub expires_unix: u32,
    pub device_index: u32,
    pub generation: u32,
    /// Union of [`Proto::mask`].
    pub protocol_mask: u8,
    pub key_id: KeyId,
    /// Makes two tokens of one second differ.
    pub random: [u8; 4],
}

/// Why a token is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenError {
    /// Not 43 bytes in base64url, or of another version.
    Malformed,
    Forged,
    Expired,
    /// Issued for another protocol.
    WrongProtocol,
}

impl fmt::Display for TokenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TokenError::Malformed => "not a token",
            TokenError::Forged => "not a token of this gateway",
            TokenError::Expired => "the token has expired",
            TokenError::WrongProtocol => "the token is for another protocol",
        })
    }
}

impl std::error::Error for TokenError {}

/// The key that seals tokens.
pub struct TokenKey {
    epoch: u8,
    /// Has read the key and the domain: half the work of a tag. Wiped when it is dropped.
    begun: Hmac<Sha256>,
}

impl TokenKey {
    /// The key of one epoch, derived from the gateway's private key. A new epoch voids every token at once.
    pub fn derive(gateway: &SecretKey, epoch: u8) -> Self {
        let mut mac = hmac(gateway.seed());
        mac.update(KEY_DOMAIN);
        mac.update(&[epoch]);
        let key = Zeroizing::new(mac.finalize().into_bytes().into());
        let mut begun = hmac(&key);
        begun.update(DOMAIN);
        TokenKey { epoch, begun }
    }

    pub fn seal(&self, token: &Token) -> [u8; TOKEN_BYTES] {
        let mut bytes = [0; TOKEN_BYTES];
        let body = [VERSION, self.epoch]
            .into_iter()
            .chain(token.expires_unix.to_be_bytes())
            .chain(token.device_index.to_be_bytes())
            .chain(token.generation.to_be_bytes())
            .chain([token.protocol_mask])
            .chain(token.key_id.0)
            .chain(token.random);
        for (to, from) in bytes.iter_mut().zip(body) {
            *to = from;
        }
        if let Some((body, tag)) = bytes.split_first_chunk_mut::<BODY_BYTES>() {
            tag.copy_from_slice(&self.tag(body));
        }
        bytes
    }

    /// Reads a token that is ours, not expired, and for this protocol.
    ///
    /// # Errors
    /// For anything else; the tag is checked before anything inside is believed.
    pub fn verify(&self, bytes: &[u8], proto: Proto, now_unix: u64) -> Result<Token, TokenError> {
        let Some((body, tag)) = bytes.split_first_chunk::<BODY_BYTES>() else { return Err(TokenError::Malformed) };
        if body.first() != Some(&VERSION) || tag.len() != TAG_BYTES {
            return Err(TokenError::Malformed);
        }
        let is_ours = self.tag(body).as_slice().ct_eq(tag) & body.get(1).unwrap_or(&0).ct_eq(&self.epoch);
        if !bool::from(is_ours) {
            return Err(TokenError::Forged);
        }
        let token = Token::read(body);
        if now_unix >= u64::from(token.expires_unix) {
            return Err(TokenError::Expired);
        }
        if token.protocol_mask & proto.mask() == 0 {
            return Err(TokenError::WrongProtocol);
        }
        Ok(token)
    }

    /// The same for a token in base64url, as it stands in `Authorization: Bearer` and in CoAP's `t=`.
    ///
    /// # Errors
    /// As [`verify`](Self::verify).
    pub fn verify_text(&self, text: &[u8], proto: Proto, now_unix: u64) -> Result<Token, TokenError> {
        let text = std::str::from_utf8(text).map_err(|_| TokenError::Malformed)?;
        let bytes: [u8; TOKEN_BYTES] = text::from_base64url(text).ok_or(TokenError::Malformed)?;
        self.verify(&bytes, proto, now_unix)
    }

    fn tag(&self, body: &[u8; BODY_BYTES]) -> [u8; TAG_BYTES] {
        let mut mac = self.begun.clone();
        mac.update(body);
        truncate(mac)
    }
}

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenKey").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

impl Token {
    fn read(body: &[u8; BODY_BYTES]) -> Self {
        let [
            _version,
            _epoch,
            e0,
            e1,
            e2,
            e3,
            i0,
            i1,
            i2,
            i3,
            g0,
            g1,
            g2,
            g3,
            protocol_mask,
            k0,
            k1,
            k2,
            k3,
            k4,
            k5,
            k6,
            k7,
            r0,
            r1,
            r2,
            r3,
        ] = *body;
        Token {
            expires_unix: u32::from_be_bytes([e0, e1, e2, e3]),
            device_index: u32::from_be_bytes([i0, i1, i2, i3]),
            generation: u32::from_be_bytes([g0, g1, g2, g3]),
            protocol_mask,
            key_id: KeyId([k0, k1, k2, k3, k4, k5, k6, k7]),
            random: [r0, r1, r2, r3],
        }
    }
}

const DOMAIN: &[u8] = b"tidegate-token/1\0";
const KEY_DOMAIN: &[u8] = b"tidegate-token-key/1\0";
const VERSION: u8 = 1;
const BODY_BYTES: usize = 27;
const TAG_BYTES: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> TokenKey {
        TokenKey::derive(&SecretKey::from_seed(&[5; 32]), 0)
    }

    const TOKEN: Token = Token {
        expires_unix: 1_000,
        device_index: 0x0102_0304,
        generation: 0x0506_0708,
        protocol_mask: Proto::Http.mask(),
        key_id: KeyId([9; 8]),
        random: [10; 4],
    };

    #[test]
    fn a_token_is_43_bytes_in_the_order_of_the_contract() {
        let bytes = key().seal(&TOKEN);
        let body = [1, 0, 0, 0, 3, 0xe8, 1, 2, 3, 4, 5, 6, 7, 8, 2, 9, 9, 9, 9, 9, 9, 9, 9, 10, 10, 10, 10];
        assert_eq!(bytes.len(), 43);
        assert_eq!(bytes[..27], body);
        assert_eq!(key().verify(&bytes, Proto::Http, 999), Ok(TOKEN));
        assert_eq!(key().verify_text(text::base64url(&bytes).as_bytes(), Proto::Http, 999), Ok(TOKEN));
        assert_eq!(text::base64url(&bytes).len(), TOKEN_CHARS);
    }

    #[test]
    fn a_token_ends_at_its_second() {
        let bytes = key().seal(&TOKEN);
        assert_eq!(key().verify(&bytes, Proto::Http, 1_000), Err(TokenError::Expired));
        assert_eq!(key().verify(&bytes, Proto::Http, u64::MAX), Err(TokenError::Expired));
    }

    #[test]
    fn a_token_is_for_its_protocols_only() {
        let bytes = key().seal(&TOKEN);
        assert_eq!(key().verify(&bytes, Proto::Coap, 0), Err(TokenError::WrongProtocol));
        let both = key().seal(&Token { protocol_mask: Proto::Http.mask() | Proto::Coap.mask(), ..TOKEN });
        assert!(key().verify(&both, Proto::Coap, 0).is_ok());
        assert_eq!(key().verify(&both, Proto::Mqtt, 0), Err(TokenError::WrongProtocol));
    }

    #[test]
    fn another_gateway_and_another_epoch_refuse_it() {
        let bytes = key().seal(&TOKEN);
        let other_gateway = TokenKey::derive(&SecretKey::from_seed(&[6; 32]), 0);
        let next_epoch = TokenKey::derive(&SecretKey::from_seed(&[5; 32]), 1);
        for key in [other_gateway, next_epoch] {
            assert_eq!(key.verify(&bytes, Proto::Http, 0), Err(TokenError::Forged));
        }
    }

    proptest! {
        #[test]
        fn what_was_sealed_is_read_back(
            expires_unix in 1u32.., device_index: u32, generation: u32, key_id: [u8; 8], random: [u8; 4],
        ) {
            let token = Token { expires_unix, device_index, generation, key_id: KeyId(key_id), random, ..TOKEN };
            prop_assert_eq!(key().verify(&key().seal(&token), Proto::Http, u64::from(expires_unix) - 1), Ok(token));
        }

        #[test]
        fn any_flipped_bit_is_refused(bit in 0usize..TOKEN_BYTES * 8) {
            let mut bytes = key().seal(&TOKEN);
            bytes[bit / 8] ^= 1 << (bit % 8);
            let refusal = key().verify(&bytes, Proto::Http, 0).unwrap_err();
            prop_assert!(matches!(refusal, TokenError::Forged | TokenError::Malformed));
        }

        #[test]
        fn arbitrary_bytes_are_refused_without_panic(bytes: Vec<u8>, now: u64) {
            prop_assert!(key().verify(&bytes, Proto::Http, now).is_err());
            prop_assert!(key().verify_text(&bytes, Proto::Http, now).is_err());
        }
    }
}

//! What is signed, in every challenge flow.
//!
//! ```text
//! lp(x) = u16 big-endian length || x
//! T = lp(gateway_id) lp(device_id) lp(key_id) lp(client_nonce 16) lp(challenge) lp(channel_binding) lp(ctx)
//! M = "tidegate-device-auth/1" 00 | suite 01 | proto | cb_type | SHA-256(T)                               58 bytes
//! gateway's proof: "tidegate-gateway-auth/1" 00 | 01 | proto | cb_type | SHA-256(T) | SHA-256(signature)   91 bytes
//! ```
//! Every part has its length in front, so no two transcripts have the same bytes; the domain string keeps a signature from meaning anything in
//! another protocol, and a gateway's from passing for a device's.

use std::fmt;

use sha2::{Digest as _, Sha256};

use crate::keys::{GatewayId, KeyId, PublicKey, SecretKey, sha256};
use crate::{ClientNonce, Signature};

/// The protocol that a proof is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Proto {
    Http = 1,
    Mqtt = 2,
    Coap = 3,
}

impl Proto {
    /// This protocol's bit in a token's mask.
    pub const fn mask(self) -> u8 {
        1 << (self as u8)
    }
}

/// What binds a proof to the channel that it travels in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CbType {
    None = 0,
    /// RFC 9266.
    TlsExporter = 1,
    /// RFC 5929 section 4.
    TlsServerEndPoint = 2,
    /// Exporter of OSCORE or EDHOC.
    OscoreExporter = 3,
    DtlsExporter = 4,
}

impl CbType {
    pub const fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => CbType::None,
            1 => CbType::TlsExporter,
            2 => CbType::TlsServerEndPoint,
            3 => CbType::OscoreExporter,
            4 => CbType::DtlsExporter,
            _ => return None,
        })
    }
}

/// Everything that a proof speaks about.
#[derive(Clone, Copy, Debug)]
pub struct Transcript<'a> {
    pub proto: Proto,
    pub cb_type: CbType,
    pub gateway_id: &'a GatewayId,
    pub device_id: &'a str,
    pub key_id: KeyId,
    pub client_nonce: &'a ClientNonce,
    /// 38 bytes on HTTP and CoAP, 32 on MQTT, none where the channel binding takes its place.
    pub challenge: &'a [u8],
    /// Empty exactly if `cb_type` is `None`.
    pub channel_binding: &'a [u8],
    /// MQTT: the Client Identifier as sent. Otherwise empty.
    pub ctx: &'a [u8],
}

/// A part of a transcript is longer than 65,535 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong;

impl fmt::Display for TooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a part of the transcript is longer than 65535 bytes")
    }
}

impl std::error::Error for TooLong {}

impl Transcript<'_> {
    fn parts(&self) -> [&[u8]; 7] {
        [
            &self.gateway_id.0,
            self.device_id.as_bytes(),
            &self.key_id.0,
            self.client_nonce,
            self.challenge,
            self.channel_binding,
            self.ctx,
        ]
    }

    /// `T`, for documents and tests; signing hashes it without building it.
    ///
    /// # Errors
    /// If a part is longer than 65,535 bytes.
    pub fn encode(&self) -> Result<Vec<u8>, TooLong> {
        let mut bytes = Vec::new();
        for part in self.parts() {
            bytes.extend_from_slice(&length(part)?);
            bytes.extend_from_slice(part);
        }
        Ok(bytes)
    }

    fn digest(&self) -> Result<[u8; 32], TooLong> {
        let mut hash = Sha256::new();
        for part in self.parts() {
            hash.update(length(part)?);
            hash.update(part);
        }
        Ok(hash.finalize().into())
    }

    /// `M`, which the device signs.
    ///
    /// # Errors
    /// If a part is longer than 65,535 bytes.
    pub fn message(&self) -> Result<[u8; MESSAGE_BYTES], TooLong> {
        Ok(concat([DEVICE_DOMAIN, &self.header(), &self.digest()?]))
    }

    /// What the gateway signs in return, over the device's `signature`.
    ///
    /// # Errors
    /// If a part is longer than 65,535 bytes.
    pub fn gateway_message(&self, signature: &Signature) -> Result<[u8; GATEWAY_MESSAGE_BYTES], TooLong> {
        Ok(concat([GATEWAY_DOMAIN, &self.header(), &self.digest()?, &sha256(signature)]))
    }

    /// The device's proof.
    ///
    /// # Errors
    /// If a part is longer than 65,535 bytes.
    pub fn sign(&self, device: &SecretKey) -> Result<Signature, TooLong> {
        Ok(device.sign(&self.message()?))
    }

    /// Whether `signature` is `device`'s proof; always costs one verification.
    #[must_use]
    pub fn verify(&self, device: &PublicKey, signature: &Signature) -> bool {
        self.message().is_ok_and(|message| device.verify(&message, signature))
    }

    /// The gateway's proof, in return for the device's.
    ///
    /// # Errors
    /// If a part is longer than 65,535 bytes.
    pub fn sign_as_gateway(&self, gateway: &SecretKey, signature: &Signature) -> Result<Signature, TooLong> {
        Ok(gateway.sign(&self.gateway_message(signature)?))
    }

    /// For the device's side: whether the gateway with this key answered to `signature`.
    #[must_use]
    pub fn verify_gateway(&self, gateway: &PublicKey, signature: &Signature, proof: &Signature) -> bool {
        self.gateway_message(signature).is_ok_and(|message| gateway.verify(&message, proof))
    }

    const fn header(&self) -> [u8; 3] {
        [SUITE_ED25519_SHA256, self.proto as u8, self.cb_type as u8]
    }
}

fn length(part: &[u8]) -> Result<[u8; 2], TooLong> {
    u16::try_from(part.len()).map(u16::to_be_bytes).map_err(|_| TooLong)
}

/// Joins parts whose lengths are constants that add up to `N`.
fn concat<const N: usize, const PARTS: usize>(parts: [&[u8]; PARTS]) -> [u8; N] {
    debug_assert_eq!(parts.iter().map(|p| p.len()).sum::<usize>(), N);
    let mut out = [0; N];
    for (to, from) in out.iter_mut().zip(parts.into_iter().flatten()) {
        *to = *from;
    }
    out
}

const DEVICE_DOMAIN: &[u8] = b"tidegate-device-auth/1\0";
const GATEWAY_DOMAIN: &[u8] = b"tidegate-gateway-auth/1\0";
const SUITE_ED25519_SHA256: u8 = 1;
const MESSAGE_BYTES: usize = DEVICE_DOMAIN.len() + 3 + 32;
const GATEWAY_MESSAGE_BYTES: usize = GATEWAY_DOMAIN.len() + 3 + 32 + 32;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_messages_have_the_lengths_of_the_contract() {
        assert_eq!(MESSAGE_BYTES, 58);
        assert_eq!(GATEWAY_MESSAGE_BYTES, 91);
    }

    #[test]
    fn a_part_that_does_not_fit_its_length_is_an_error_and_verifies_nothing() {
        let key = SecretKey::from_seed(&[1; 32]);
        let long = vec![0; 65_536];
        let transcript = Transcript {
            proto: Proto::Mqtt,
            cb_type: CbType::None,
            gateway_id: &GatewayId([0; 32]),
            device_id: "a",
            key_id: KeyId([0; 8]),
            client_nonce: &[0; 16],
            challenge: &[],
            channel_binding: &[],
            ctx: &long,
        };
        assert_eq!(transcript.sign(&key), Err(TooLong));
        assert!(!transcript.verify(&key.public(), &[0; 64]));
    }

    proptest! {
        /// The heart of `lp`: two different lists of parts never have the same bytes.
        #[test]
        fn parts_cannot_be_shifted_into_each_other(
            device_id in "[a-z]{0,4}", challenge in proptest::collection::vec(0u8..3, 0..4),
            binding in proptest::collection::vec(0u8..3, 0..4), ctx in proptest::collection::vec(0u8..3, 0..4),
            device_id2 in "[a-z]{0,4}", challenge2 in proptest::collection::vec(0u8..3, 0..4),
            binding2 in proptest::collection::vec(0u8..3, 0..4), ctx2 in proptest::collection::vec(0u8..3, 0..4),
        ) {
            let gateway_id = GatewayId([9; 32]);
            let of = |device_id, challenge, channel_binding, ctx| {
                Transcript {
                    proto: Proto::Http, cb_type: CbType::None, gateway_id: &gateway_id, device_id, key_id: KeyId([1; 8]),
                    client_nonce: &[2; 16], challenge, channel_binding, ctx,
                }.message().unwrap()
            };
            let same = (&device_id, &challenge, &binding, &ctx) == (&device_id2, &challenge2, &binding2, &ctx2);
            let first = of(&device_id, &challenge, &binding, &ctx);
            let second = of(&device_id2, &challenge2, &binding2, &ctx2);
            prop_assert_eq!(first == second, same);
        }
    }
}

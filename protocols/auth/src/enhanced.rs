//! The Authentication Data (0x16) of MQTT 5 enhanced authentication, for both ends; modelled on RFC 9431.
//!
//! ```text
//! CONNECT          01 | cb_type | client_nonce 16 | key_id 8
//! S->C AUTH 0x18   01 | challenge 32 | gateway_id 32
//! C->S AUTH 0x18   01 | sig 64
//! CONNACK 0x00     01 | gateway sig 64
//! CONNECT in TLS   02 | 01 | client_nonce 16 | key_id 8 | sig 64        no challenge: the channel binding is fresh by itself
//! ```

use crate::keys::{GatewayId, KeyId};
use crate::transcript::CbType;
use crate::{ClientNonce, Signature};

/// The Authentication Method (0x15).
pub const METHOD: &str = "TIDEGATE-ED25519-1";

/// Random bytes that the connection holds until they are answered.
pub type MqttChallenge = [u8; 32];

/// What a client opens with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opening {
    pub cb_type: CbType,
    pub client_nonce: ClientNonce,
    pub key_id: KeyId,
    /// Present in form 02: the proof comes at once, over the channel binding and an empty challenge.
    pub signature: Option<Signature>,
}

impl Opening {
    /// Reads either form, exactly.
    pub fn parse(data: &[u8]) -> Option<Self> {
        let (&[form, cb_type], rest) = data.split_first_chunk()?;
        let (&client_nonce, rest) = rest.split_first_chunk()?;
        let (&key_id, rest) = rest.split_first_chunk()?;
        let cb_type = CbType::from_byte(cb_type)?;
        let signature = match (form, cb_type) {
            (FORM_CHALLENGE, _) if rest.is_empty() => None,
            (FORM_BOUND, CbType::TlsExporter) => Some(rest.try_into().ok()?),
            (_, _) => return None,
        };
        Some(Opening { cb_type, client_nonce, key_id: KeyId(key_id), signature })
    }

    pub fn encode(&self) -> Vec<u8> {
        let form = if self.signature.is_some() { FORM_BOUND } else { FORM_CHALLENGE };
        let mut data = vec![form, self.cb_type as u8];
        data.extend_from_slice(&self.client_nonce);
        data.extend_from_slice(&self.key_id.0);
        data.extend(self.signature.iter().flatten());
        data
    }
}

/// The gateway's question.
pub fn encode_challenge(challenge: &MqttChallenge, gateway_id: &GatewayId) -> Vec<u8> {
    [&[FORM_CHALLENGE], challenge.as_slice(), &gateway_id.0].concat()
}

/// Reads the gateway's question, for the device's side.
pub fn parse_challenge(data: &[u8]) -> Option<(MqttChallenge, GatewayId)> {
    let (&[FORM_CHALLENGE], rest) = data.split_first_chunk()? else { return None };
    let (&challenge, rest) = rest.split_first_chunk()?;
    Some((challenge, GatewayId(rest.try_into().ok()?)))
}

/// The device's answer, and the gateway's proof in return: they have one form.
pub fn encode_signature(signature: &Signature) -> Vec<u8> {
    [&[FORM_CHALLENGE], signature.as_slice()].concat()
}

/// Reads either of them.
pub fn parse_signature(data: &[u8]) -> Option<Signature> {
    let (&[FORM_CHALLENGE], rest) = data.split_first_chunk()? else { return None };
    rest.try_into().ok()
}

const FORM_CHALLENGE: u8 = 1;
const FORM_BOUND: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_openings_have_the_lengths_of_the_contract() {
        let opening = Opening { cb_type: CbType::None, client_nonce: [1; 16], key_id: KeyId([2; 8]), signature: None };
        let bound = Opening { cb_type: CbType::TlsExporter, signature: Some([3; 64]), ..opening };
        assert_eq!((opening.encode().len(), bound.encode().len()), (26, 90));
        assert_eq!((opening.encode()[..2].to_vec(), bound.encode()[..2].to_vec()), (vec![1, 0], vec![2, 1]));
        for opening in [opening, bound] {
            assert_eq!(Opening::parse(&opening.encode()), Some(opening));
        }
        // Form 02 without a binding would be a signature without any freshness.
        let unbound = Opening { cb_type: CbType::None, ..bound };
        assert_eq!(Opening::parse(&unbound.encode()), None);
    }

    #[test]
    fn challenge_and_signature_read_back() {
        let data = encode_challenge(&[4; 32], &GatewayId([5; 32]));
        assert_eq!(data.len(), 65);
        assert_eq!(parse_challenge(&data), Some(([4; 32], GatewayId([5; 32]))));
        assert_eq!(encode_signature(&[6; 64]).len(), 65);
        assert_eq!(parse_signature(&encode_signature(&[6; 64])), Some([6; 64]));
    }

    proptest! {
        #[test]
        fn only_exact_lengths_are_read(data in proptest::collection::vec(0u8..5, 0..100)) {
            if let Some(opening) = Opening::parse(&data) {
                prop_assert_eq!(opening.encode(), data.clone());
            }
            prop_assert!(parse_challenge(&data).is_none() || data.len() == 65);
            prop_assert!(parse_signature(&data).is_none() || data.len() == 65);
        }
    }
}

//! `auth-vectors.json`, the contract's own test cases, through the public interface.

#![allow(clippy::unwrap_used)] // A vector that cannot be read is a failed test.

use serde::Deserialize;
use tidegate_auth::challenge::{Asker, ChallengeKeys, Peer};
use tidegate_auth::text::{from_hex, hex};
use tidegate_auth::transcript::{CbType, Proto, Transcript};
use tidegate_auth::{GatewayId, PublicKey, SecretKey};

#[derive(Deserialize)]
struct Vectors {
    device_seed: String,
    gateway_seed: String,
    device_public: String,
    gateway_public: String,
    gateway_id: String,
    key_id: String,
    device_id: String,
    client_nonce: String,
    challenge_key: String,
    challenge_random: String,
    challenge_time: u32,
    coap_peer: String,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    proto: u8,
    cb_type: u8,
    channel_binding: String,
    ctx: String,
    challenge: String,
    transcript: String,
    message: String,
    signature: String,
    gateway_message: String,
    gateway_signature: String,
}

fn bytes(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2));
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect()
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("data/auth-vectors.json")).unwrap()
}

fn proto(byte: u8) -> Proto {
    [Proto::Http, Proto::Mqtt, Proto::Coap].into_iter().find(|proto| *proto as u8 == byte).unwrap()
}

/// `IPv6-mapped address (16) || port (2)` back into an address.
fn peer(text: &str) -> Peer {
    let raw: [u8; 18] = from_hex(text).unwrap();
    let ip = std::net::Ipv6Addr::from(<[u8; 16]>::try_from(&raw[..16]).unwrap());
    let port = u16::from_be_bytes([raw[16], raw[17]]);
    Peer::Address(std::net::SocketAddr::new(ip.to_canonical(), port))
}

#[test]
fn keys_and_ids_are_those_of_the_vectors() {
    let v = vectors();
    let device = SecretKey::from_seed(&from_hex(&v.device_seed).unwrap());
    let gateway = SecretKey::from_seed(&from_hex(&v.gateway_seed).unwrap());
    assert_eq!(hex(device.public().as_bytes()), v.device_public);
    assert_eq!(hex(gateway.public().as_bytes()), v.gateway_public);
    assert_eq!(GatewayId::of(&gateway.public()).to_string(), v.gateway_id);
    assert_eq!(device.public().key_id().to_string(), v.key_id);
    assert!(PublicKey::register(*device.public().as_bytes()).is_ok());
}

#[test]
fn every_case_has_the_transcript_message_and_signatures_of_the_vectors() {
    let v = vectors();
    let device = SecretKey::from_seed(&from_hex(&v.device_seed).unwrap());
    let gateway = SecretKey::from_seed(&from_hex(&v.gateway_seed).unwrap());
    let gateway_id = GatewayId(from_hex(&v.gateway_id).unwrap());
    let client_nonce = from_hex(&v.client_nonce).unwrap();
    assert_eq!(v.cases.len(), 4);
    for case in &v.cases {
        let (challenge, channel_binding) = (bytes(&case.challenge), bytes(&case.channel_binding));
        let transcript = Transcript {
            proto: proto(case.proto),
            cb_type: CbType::from_byte(case.cb_type).unwrap(),
            gateway_id: &gateway_id,
            device_id: &v.device_id,
            key_id: device.public().key_id(),
            client_nonce: &client_nonce,
            challenge: &challenge,
            channel_binding: &channel_binding,
            ctx: case.ctx.as_bytes(),
        };
        assert_eq!(hex(&transcript.encode().unwrap()), case.transcript, "{}", case.name);
        assert_eq!(hex(&transcript.message().unwrap()), case.message, "{}", case.name);
        let signature = transcript.sign(&device).unwrap();
        assert_eq!(hex(&signature), case.signature, "{}", case.name);
        assert!(transcript.verify(&device.public(), &signature), "{}", case.name);
        assert_eq!(hex(&transcript.gateway_message(&signature).unwrap()), case.gateway_message, "{}", case.name);
        let proof = transcript.sign_as_gateway(&gateway, &signature).unwrap();
        assert_eq!(hex(&proof), case.gateway_signature, "{}", case.name);
        assert!(transcript.verify_gateway(&gateway.public(), &signature, &proof), "{}", case.name);

        // What holds for one case holds for no other protocol, binding, key or client identifier.
        for other in [
            Transcript { proto: proto(case.proto % 3 + 1), ..transcript },
            Transcript { cb_type: CbType::DtlsExporter, ..transcript },
            Transcript { ctx: b"another", ..transcript },
            Transcript { device_id: "sensor-0043", ..transcript },
            Transcript { channel_binding: b"another", ..transcript },
        ] {
            assert!(!other.verify(&device.public(), &signature), "{}", case.name);
            assert!(!other.verify_gateway(&gateway.public(), &signature, &proof), "{}", case.name);
        }
        // The gateway's signature does not pass for the device's, nor the other way round.
        assert!(!transcript.verify(&gateway.public(), &proof), "{}", case.name);
        assert!(!transcript.verify_gateway(&device.public(), &signature, &signature), "{}", case.name);
    }
}

#[test]
fn the_stateless_challenges_are_those_of_the_vectors() {
    let v = vectors();
    let keys = ChallengeKeys::new(0, from_hex(&v.challenge_key).unwrap(), v.challenge_time);
    let client_nonce = from_hex(&v.client_nonce).unwrap();
    for (name, proto, peer) in [("http plain", Proto::Http, Peer::Any), ("coap plain", Proto::Coap, peer(&v.coap_peer))]
    {
        let case = v.cases.iter().find(|case| case.name == name).unwrap();
        let asker = Asker { proto, device_id: &v.device_id, client_nonce: &client_nonce, peer };
        let challenge = keys.seal(v.challenge_time, from_hex(&v.challenge_random).unwrap(), &asker);
        assert_eq!(hex(&challenge), case.challenge, "{name}");
        assert_eq!(keys.open(v.challenge_time + 59, 60, &challenge, &asker), Ok(v.challenge_time + 60));
    }
}

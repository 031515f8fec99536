//! Challenges and the bodies around them (CBOR, JSON, MQTT's authentication data, key files): strict, total, and their own inverse.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate_auth::challenge::Asker;
use tidegate_auth::enhanced::{Opening, parse_challenge, parse_signature};
use tidegate_auth::exchange::{ChallengeRequest, SessionAnswer, SessionRequest};
use tidegate_auth::{ChallengeKeys, Peer, Proto, keyfile};

fuzz_target!(|data: &[u8]| {
    let keys = ChallengeKeys::new(1, [3; 32], 100);
    let asker = Asker { proto: Proto::Coap, device_id: "sensor", client_nonce: &[4; 16], peer: Peer::Any };
    let sealed = keys.seal(100, [5; 16], &asker);
    assert_eq!(keys.open(130, 60, data, &asker).is_ok(), data == sealed);
    let mut changed = sealed;
    for (byte, flip) in changed.iter_mut().zip(data) {
        *byte ^= flip;
    }
    assert_eq!(keys.open(130, 60, &changed, &asker).is_ok(), changed == sealed);

    if let Some(request) = ChallengeRequest::from_cbor(data) {
        assert!(ChallengeRequest::from_cbor(&request.to_cbor()) == Some(request));
    }
    if let Some(request) = SessionRequest::from_cbor(data) {
        assert!(SessionRequest::from_cbor(&request.to_cbor()) == Some(request));
    }
    if let Some(answer) = SessionAnswer::from_cbor(data) {
        assert!(SessionAnswer::from_cbor(&answer.to_cbor()) == Some(answer));
    }
    if let Some(opening) = Opening::parse(data) {
        assert_eq!(opening.encode(), data);
    }
    let _ = (parse_challenge(data), parse_signature(data));
    if let Ok(text) = std::str::from_utf8(data) {
        if let Ok(secret) = keyfile::secret_from_text(text) {
            let again = keyfile::secret_from_text(&keyfile::secret_to_pem(&secret));
            assert!(again.is_ok_and(|again| again.seed() == secret.seed()));
        }
        let _ = keyfile::public_from_text(text);
    }
});

//! Identity through its public face: a data directory, a registry, devices that prove themselves.
#![allow(clippy::indexing_slicing)]

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use tidegate_auth::enhanced::{self, Opening};
use tidegate_auth::exchange::{ChallengeAnswer, ChallengeRequest, SessionAnswer, SessionRequest};
use tidegate_auth::jwt::{Audience, Claims, NumericDate, sign};
use tidegate_auth::{CbType, Proto, PublicKey, SecretKey, Transcript, text};

use super::*;
use crate::message::{Protocol, Reject};

const NOW: Now = Now { unix_secs: 1_795_132_800, boot_secs: 5_000 };
const NONCE: [u8; 16] = [0xa0; 16];
const PEER: &str = "192.0.2.5:49152";

fn later(secs: u32) -> Now {
    Now { unix_secs: NOW.unix_secs + u64::from(secs), boot_secs: NOW.boot_secs + secs }
}

fn secret(seed: u8) -> SecretKey {
    SecretKey::from_seed(&[seed; 32])
}

fn id(text: &str) -> DeviceId {
    DeviceId::parse(text).unwrap()
}

fn new_key(secret: &SecretKey) -> NewKey {
    NewKey { public: secret.public(), not_before: None, not_after: None }
}

fn new_device(name: &str, seed: u8) -> NewDevice {
    NewDevice {
        id: id(name),
        role: "sensor".into(),
        attributes: vec![("site".into(), "north".into())],
        keys: vec![new_key(&secret(seed))],
    }
}

/// A data directory with the devices `sensor-1` (key 1) and `sensor-2` (key 2).
fn house() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut registry = Registry::open(dir.path()).unwrap();
    GatewayKey::open(dir.path(), &registry).unwrap();
    registry.add(&[new_device("sensor-1", 1), new_device("sensor-2", 2)], NOW.unix_secs, |_| {}).unwrap();
    dir
}

fn open(dir: &Path) -> Identity {
    open_with(dir, |_| {})
}

fn open_with(dir: &Path, change: impl FnOnce(&mut Config)) -> Identity {
    let mut config = Config::default();
    change(&mut config);
    Identity::open(dir, &config).unwrap()
}

fn claims(identity: &Identity, device: &str, jti: &str) -> Claims {
    Claims {
        iss: device.into(),
        sub: device.into(),
        aud: Audience::One(identity.gateway().id.audience()),
        iat: NumericDate(NOW.unix_secs),
        exp: NumericDate(NOW.unix_secs + 3600),
        nbf: None,
        jti: jti.into(),
        nonce: None,
    }
}

fn jwt(identity: &Identity, device: &str, seed: u8, jti: &str) -> String {
    sign(&claims(identity, device, jti), &secret(seed))
}

/// Both halves of the HTTP challenge flow, by a device that does everything right with this key.
fn http_request(identity: &Identity, device: &str, seed: u8, now: Now) -> SessionRequest {
    let ask = ChallengeRequest { device_id: device.into(), client_nonce: NONCE };
    let answer = identity.http_challenge(&serde_json::to_vec(&ask).unwrap(), now).unwrap();
    let answer: ChallengeAnswer = serde_json::from_slice(&answer).unwrap();
    let key = secret(seed);
    let transcript = Transcript {
        proto: Proto::Http,
        cb_type: CbType::None,
        gateway_id: &answer.gateway_id,
        device_id: device,
        key_id: key.public().key_id(),
        client_nonce: &NONCE,
        challenge: &answer.challenge,
        channel_binding: &[],
        ctx: &[],
    };
    SessionRequest {
        device_id: device.into(),
        key_id: key.public().key_id(),
        client_nonce: NONCE,
        challenge: answer.challenge,
        cb_type: CbType::None,
        signature: transcript.sign(&key).unwrap(),
    }
}

fn http_session(identity: &Identity, request: &SessionRequest, now: Now) -> Result<SessionAnswer, Reject> {
    let body = serde_json::to_vec(request).unwrap();
    let answer = identity.http_session(&body, &Channel::default(), now)?;
    Ok(serde_json::from_slice(&answer).unwrap())
}

fn coap_request(identity: &Identity, device: &str, seed: u8, now: Now) -> SessionRequest {
    let peer: SocketAddr = PEER.parse().unwrap();
    let ask = ChallengeRequest { device_id: device.into(), client_nonce: NONCE };
    let challenge = identity.coap_challenge(&ask.to_cbor(), peer, now).unwrap();
    let key = secret(seed);
    let transcript = Transcript {
        proto: Proto::Coap,
        cb_type: CbType::None,
        gateway_id: &identity.gateway().id,
        device_id: device,
        key_id: key.public().key_id(),
        client_nonce: &NONCE,
        challenge: &challenge,
        channel_binding: &[],
        ctx: &[],
    };
    SessionRequest {
        device_id: device.into(),
        key_id: key.public().key_id(),
        client_nonce: NONCE,
        challenge,
        cb_type: CbType::None,
        signature: transcript.sign(&key).unwrap(),
    }
}

fn opening(seed: u8) -> Opening {
    let key_id = secret(seed).public().key_id();
    Opening { cb_type: CbType::None, client_nonce: NONCE, key_id, signature: None }
}

/// The device's signature in an MQTT authentication.
fn mqtt_signature(
    identity: &Identity,
    device: &str,
    client_id: &str,
    seed: u8,
    opening: &Opening,
    challenge: &[u8],
    binding: &[u8],
) -> tidegate_auth::Signature {
    let transcript = Transcript {
        proto: Proto::Mqtt,
        cb_type: opening.cb_type,
        gateway_id: &identity.gateway().id,
        device_id: device,
        key_id: opening.key_id,
        client_nonce: &NONCE,
        challenge,
        channel_binding: binding,
        ctx: client_id.as_bytes(),
    };
    transcript.sign(&secret(seed)).unwrap()
}

/// The whole MQTT 5 flow.
fn mqtt(identity: &Identity, device: &str, seed: u8, answer_at: Now) -> Result<(Login, Vec<u8>), Reject> {
    let opening = opening(seed);
    let channel = Channel::default();
    let step = identity.mqtt_begin(Some(device), "client-7", &opening.encode(), &channel, NOW)?;
    let MqttStep::Challenge { data, pending } = step else { panic!("no challenge") };
    let (challenge, gateway_id) = enhanced::parse_challenge(&data).unwrap();
    assert_eq!(gateway_id, identity.gateway().id);
    let signature = mqtt_signature(identity, device, "client-7", seed, &opening, &challenge, &[]);
    identity.mqtt_answer(pending, &enhanced::encode_signature(&signature), &channel, answer_at)
}

// Logging in.

#[test]
fn a_jwt_logs_in_once_and_until_it_expires() {
    let dir = house();
    let identity = open(dir.path());
    let token = jwt(&identity, "sensor-1", 1, "a");
    let login = identity.login_jwt(Some("sensor-1"), "whatever", token.as_bytes(), later(10)).unwrap();
    assert_eq!(login.device.id, id("sensor-1"));
    assert_eq!((login.lifetime, login.expires_unix), (Duration::from_secs(3590), NOW.unix_secs + 3600));
    let again = identity.login_jwt(Some("sensor-1"), "whatever", token.as_bytes(), later(11));
    assert_eq!(again.unwrap_err(), Reject::Unauthenticated);
    let old = jwt(&identity, "sensor-1", 1, "b");
    assert_eq!(
        identity.login_jwt(Some("sensor-1"), "", old.as_bytes(), later(3600)).unwrap_err(),
        Reject::Unauthenticated
    );
}

#[test]
fn an_mqtt_client_is_named_by_its_username_or_its_client_identifier() {
    let dir = house();
    let identity = open(dir.path());
    for (n, (username, client_id)) in
        [(Some("sensor-1"), "x"), (None, "sensor-1"), (Some(""), "sensor-1/2nd"), (None, "sensor-1/a/b")]
            .iter()
            .enumerate()
    {
        let token = jwt(&identity, "sensor-1", 1, &format!("{n}"));
        assert!(identity.login_jwt(*username, client_id, token.as_bytes(), NOW).is_ok(), "{username:?} {client_id}");
    }
    for (username, client_id) in [(Some("sensor-2"), "sensor-1"), (None, "sensor-2"), (None, ""), (None, "/sensor-1")] {
        let token = jwt(&identity, "sensor-1", 1, "fresh");
        let refusal = identity.login_jwt(username, client_id, token.as_bytes(), NOW).unwrap_err();
        assert_eq!(refusal, Reject::Unauthenticated, "{username:?} {client_id}");
    }
}

#[test]
fn google_client_identifiers_are_understood_if_asked_for() {
    let dir = house();
    let client_id = "projects/p/locations/l/registries/r/devices/sensor-1";
    let off = open(dir.path());
    assert_eq!(off.mqtt_device_id(None, client_id), Some("projects"));
    drop(off);
    let identity = open_with(dir.path(), |config| config.google_client_ids = true);
    let token = jwt(&identity, "sensor-1", 1, "a");
    assert!(identity.login_jwt(Some("unused"), client_id, token.as_bytes(), NOW).is_ok());
    for bad in ["projects/p/locations/l/registries/r/devices", "projects/p/x/l/registries/r/devices/d", "projects//a"] {
        assert_ne!(identity.mqtt_device_id(None, bad), Some("d"), "{bad}");
    }
}

#[test]
fn a_used_jwt_stays_used_over_a_restart() {
    let dir = house();
    let identity = open(dir.path());
    // The store is filled again by the wall clock, so this one is of today.
    let now = Now::read();
    let fresh = Claims {
        iat: NumericDate(now.unix_secs),
        exp: NumericDate(now.unix_secs + 3600),
        ..claims(&identity, "sensor-1", "once")
    };
    let token = sign(&fresh, &secret(1));
    identity.login_jwt(Some("sensor-1"), "", token.as_bytes(), now).unwrap();
    drop(identity);
    let identity = open(dir.path());
    let again = identity.login_jwt(Some("sensor-1"), "", token.as_bytes(), now).unwrap_err();
    assert_eq!(again, Reject::Unauthenticated);
    // Another one of the same device still works.
    let other = sign(&Claims { jti: "twice".into(), ..fresh }, &secret(1));
    assert!(identity.login_jwt(Some("sensor-1"), "", other.as_bytes(), now).is_ok());
}

#[test]
fn a_jwt_without_a_clock_carries_a_challenge_that_works_once() {
    let dir = house();
    let identity = open(dir.path());
    let ask = ChallengeRequest { device_id: "sensor-1".into(), client_nonce: NONCE };
    let answer = identity.http_challenge(&serde_json::to_vec(&ask).unwrap(), NOW).unwrap();
    let answer: ChallengeAnswer = serde_json::from_slice(&answer).unwrap();
    let clockless = Claims {
        iat: NumericDate(0),
        exp: NumericDate(600),
        jti: text::base64url(&NONCE),
        nonce: Some(text::base64url(&answer.challenge)),
        ..claims(&identity, "sensor-1", "")
    };
    let token = sign(&clockless, &secret(1));
    let expired = identity.login_jwt(None, "sensor-1", token.as_bytes(), later(60)).unwrap_err();
    assert_eq!(expired, Reject::Unauthenticated);
    let login = identity.login_jwt(None, "sensor-1", token.as_bytes(), later(59)).unwrap();
    assert_eq!(login.lifetime, Duration::from_secs(600));
    assert!(identity.login_jwt(None, "sensor-1", token.as_bytes(), later(59)).is_err());
    // Somebody else's challenge.
    let stolen = sign(&Claims { iss: "sensor-2".into(), sub: "sensor-2".into(), ..clockless }, &secret(2));
    assert!(identity.login_jwt(None, "sensor-2", stolen.as_bytes(), later(1)).is_err());
}

#[test]
fn an_mqtt_5_client_and_the_gateway_prove_themselves_to_each_other() {
    let dir = house();
    let identity = open(dir.path());
    let (login, data) = mqtt(&identity, "sensor-1", 1, later(59)).unwrap();
    assert_eq!(login.device.id, id("sensor-1"));
    assert_eq!(login.lifetime, Duration::from_secs(86_400));
    assert!(enhanced::parse_signature(&data).is_some());
    assert_eq!(mqtt(&identity, "sensor-1", 1, later(60)).unwrap_err(), Reject::Unauthenticated);
    assert_eq!(mqtt(&identity, "sensor-1", 2, NOW).unwrap_err(), Reject::Unauthenticated);
    assert_eq!(mqtt(&identity, "nobody", 1, NOW).unwrap_err(), Reject::Unauthenticated);
}

#[test]
fn inside_tls_one_step_is_enough_and_bound_to_the_channel() {
    let dir = house();
    let identity = open(dir.path());
    let channel = Channel { tls_exporter: Some([0x22; 32]), tls_server_end_point: None };
    let unsigned = Opening { cb_type: CbType::TlsExporter, ..opening(1) };
    let signature = mqtt_signature(&identity, "sensor-1", "sensor-1", 1, &unsigned, &[], &[0x22; 32]);
    let data = Opening { signature: Some(signature), ..unsigned }.encode();
    let step = identity.mqtt_begin(None, "sensor-1", &data, &channel, NOW).unwrap();
    let MqttStep::Done { login, data: proof } = step else { panic!("a challenge") };
    assert_eq!(login.device.id, id("sensor-1"));
    let transcript = Transcript {
        proto: Proto::Mqtt,
        cb_type: CbType::TlsExporter,
        gateway_id: &identity.gateway().id,
        device_id: "sensor-1",
        key_id: unsigned.key_id,
        client_nonce: &NONCE,
        challenge: &[],
        channel_binding: &[0x22; 32],
        ctx: b"sensor-1",
    };
    let proof = enhanced::parse_signature(&proof).unwrap();
    assert!(transcript.verify_gateway(&identity.gateway().public, &signature, &proof));
    // Another connection, and one without TLS.
    let elsewhere = Channel { tls_exporter: Some([0x23; 32]), tls_server_end_point: None };
    for channel in [elsewhere, Channel::default()] {
        let refusal = identity.mqtt_begin(None, "sensor-1", &data, &channel, NOW).unwrap_err();
        assert_eq!(refusal, Reject::Unauthenticated);
    }
    assert!(matches!(identity.mqtt_begin(None, "a", &[1, 2, 3], &channel, NOW), Err(Reject::Malformed { .. })));
}

#[test]
fn the_http_flow_ends_in_a_token_for_http_alone() {
    let dir = house();
    let identity = open(dir.path());
    let request = http_request(&identity, "sensor-1", 1, NOW);
    let answer = http_session(&identity, &request, later(30)).unwrap();
    assert_eq!(answer.expires_in, 900);
    let token = text::base64url(&answer.access_token);
    let device = identity.verify_token(token.as_bytes(), Protocol::Http, later(30)).unwrap();
    assert_eq!(device.id, id("sensor-1"));
    for protocol in [Protocol::Coap, Protocol::Mqtt, Protocol::Gateway] {
        assert!(identity.verify_token(token.as_bytes(), protocol, later(30)).is_err(), "{protocol:?}");
    }
    assert!(identity.verify_token(token.as_bytes(), Protocol::Http, later(929)).is_ok());
    assert!(identity.verify_token(token.as_bytes(), Protocol::Http, later(930)).is_err());
    let transcript = Transcript {
        proto: Proto::Http,
        cb_type: CbType::None,
        gateway_id: &identity.gateway().id,
        device_id: "sensor-1",
        key_id: request.key_id,
        client_nonce: &NONCE,
        challenge: &request.challenge,
        channel_binding: &[],
        ctx: &[],
    };
    let proof = answer.gateway_signature.unwrap();
    assert!(transcript.verify_gateway(&identity.gateway().public, &request.signature, &proof));
}

#[test]
fn a_challenge_works_once_and_for_sixty_seconds() {
    let dir = house();
    let identity = open(dir.path());
    let request = http_request(&identity, "sensor-1", 1, NOW);
    assert_eq!(http_session(&identity, &request, later(60)).unwrap_err(), Reject::Unauthenticated);
    assert!(http_session(&identity, &request, later(59)).is_ok());
    assert_eq!(http_session(&identity, &request, later(59)).unwrap_err(), Reject::Unauthenticated);
}

#[test]
fn a_failed_answer_does_not_use_the_challenge_up() {
    let dir = house();
    let identity = open(dir.path());
    let request = http_request(&identity, "sensor-1", 1, NOW);
    let mut wrong = request.clone();
    wrong.signature[0] ^= 1;
    assert!(http_session(&identity, &wrong, NOW).is_err());
    assert!(identity.shared.used_challenges.lock().is_empty());
    assert!(http_session(&identity, &request, NOW).is_ok());
}

#[test]
fn the_coap_flow_is_bound_to_the_peer_that_asked() {
    let dir = house();
    let identity = open(dir.path());
    let request = coap_request(&identity, "sensor-1", 1, NOW).to_cbor();
    let stranger = "192.0.2.5:49153".parse().unwrap();
    assert_eq!(identity.coap_session(&request, stranger, NOW).unwrap_err(), Reject::Unauthenticated);
    let answer = identity.coap_session(&request, PEER.parse().unwrap(), NOW).unwrap();
    let answer = SessionAnswer::from_cbor(&answer).unwrap();
    let token = text::base64url(&answer.access_token);
    assert!(identity.verify_token(token.as_bytes(), Protocol::Coap, NOW).is_ok());
    assert!(identity.verify_token(token.as_bytes(), Protocol::Http, NOW).is_err());
    assert!(identity.coap_session(&request, PEER.parse().unwrap(), NOW).is_err());
}

#[test]
fn an_http_challenge_answers_nothing_on_coap() {
    let dir = house();
    let identity = open(dir.path());
    let http = http_request(&identity, "sensor-1", 1, NOW);
    assert!(identity.coap_session(&http.to_cbor(), PEER.parse().unwrap(), NOW).is_err());
}

#[test]
fn oauth_client_credentials_give_a_token() {
    let dir = house();
    let identity = open(dir.path());
    let form = |assertion: &str, extra: &str| {
        format!(
            "grant_type=client_credentials&client_assertion_type=\
             urn%3Aietf%3Aparams%3Aoauth%3Aclient-assertion-type%3Ajwt-bearer&client_assertion={assertion}{extra}"
        )
    };
    let assertion = jwt(&identity, "sensor-1", 1, "a");
    let answer = identity.oauth_token(form(&assertion, "&client_id=sensor-1&scope=x").as_bytes(), NOW).unwrap();
    let answer: SessionAnswer = serde_json::from_slice(&answer).unwrap();
    assert_eq!((answer.expires_in, answer.gateway_signature), (900, None));
    let token = text::base64url(&answer.access_token);
    assert!(identity.verify_token(token.as_bytes(), Protocol::Http, later(899)).is_ok());
    assert!(identity.verify_token(token.as_bytes(), Protocol::Http, later(900)).is_err());

    let code = |body: &str| identity.oauth_token(body.as_bytes(), NOW).unwrap_err().code;
    let fresh = jwt(&identity, "sensor-1", 1, "b");
    assert_eq!(code(&form(&assertion, "")), "invalid_client");
    assert_eq!(code(&form(&fresh, "&client_id=sensor-2")), "invalid_client");
    assert_eq!(code(&form(&fresh, "&client_id=a&client_id=b")), "invalid_request");
    assert_eq!(code(&form(&fresh, "&client_id=%zz")), "invalid_request");
    assert_eq!(code("grant_type=password"), "unsupported_grant_type");
    assert_eq!(code("grant_type=client_credentials"), "invalid_request");
    assert_eq!(code(""), "unsupported_grant_type");
    let refusal = identity.oauth_token(b"", NOW).unwrap_err();
    assert_eq!(refusal.body(), br#"{"error":"unsupported_grant_type"}"#);
}

// Being nobody.

#[test]
fn unknown_revoked_and_wrong_are_one_answer_after_one_verification() {
    let dir = house();
    Registry::open(dir.path()).unwrap().set_enabled(&id("sensor-2"), false).unwrap();
    let identity = open(dir.path());
    // Unknown device, revoked device with the right key, known device with a key of another, known device with a wrong signature.
    for (device, seed) in [("nobody", 1), ("sensor-2", 2), ("sensor-1", 2)] {
        let claimant = identity.shared.claimant(device, secret(seed).public().key_id(), NOW);
        assert!(claimant.is_nobody_with(identity.shared.nobody), "{device}");
        let request = http_request(&identity, device, seed, NOW);
        assert_eq!(http_session(&identity, &request, NOW).unwrap_err(), Reject::Unauthenticated);
        let token = jwt(&identity, device, seed, "a");
        let refusal = identity.login_jwt(Some(device), "", token.as_bytes(), NOW).unwrap_err();
        assert_eq!(refusal, Reject::Unauthenticated);
        assert_eq!(mqtt(&identity, device, seed, NOW).unwrap_err(), Reject::Unauthenticated);
    }
}

#[test]
fn whoever_knew_nobodys_key_would_still_be_nobody() {
    let dir = house();
    let identity = open(dir.path());
    let claimant = identity.shared.claimant("nobody", secret(9).public().key_id(), NOW);
    assert_eq!(claimant.admit(NOW, 60).unwrap_err(), Reject::Unauthenticated);
}

#[test]
fn a_key_outside_its_time_belongs_to_nobody() {
    let dir = house();
    let mut registry = Registry::open(dir.path()).unwrap();
    let timed = NewKey {
        public: secret(3).public(),
        not_before: Some(NOW.unix_secs + 10),
        not_after: Some(NOW.unix_secs + 20),
    };
    registry.add_key(&id("sensor-1"), &timed, NOW.unix_secs).unwrap();
    let identity = open(dir.path());
    for (secs, holds) in [(9, false), (10, true), (19, true), (20, false)] {
        let request = http_request(&identity, "sensor-1", 3, later(secs));
        assert_eq!(http_session(&identity, &request, later(secs)).is_ok(), holds, "{secs}");
        // And without a key id, where every key is tried.
        let no_kid = strip_kid(&jwt(&identity, "sensor-1", 3, &format!("{secs}")), &secret(3));
        assert_eq!(identity.login_jwt(None, "sensor-1", no_kid.as_bytes(), later(secs)).is_ok(), holds, "{secs}");
        assert_eq!(identity.by_public_key(&secret(3).public(), later(secs)).is_some(), holds, "{secs}");
    }
    // What it opens does not outlive it.
    let request = http_request(&identity, "sensor-1", 3, later(15));
    assert_eq!(http_session(&identity, &request, later(15)).unwrap().expires_in, 5);
}

/// The same claims, signed again under a header without `kid`.
fn strip_kid(jwt: &str, key: &SecretKey) -> String {
    let claims = jwt.split('.').nth(1).unwrap();
    let signed = format!("{}.{claims}", text::base64url(br#"{"alg":"EdDSA"}"#));
    let signature = text::base64url(&key.sign(signed.as_bytes()));
    format!("{signed}.{signature}")
}

#[test]
fn a_jwt_without_a_key_id_is_tried_against_every_key() {
    let dir = house();
    Registry::open(dir.path()).unwrap().add_key(&id("sensor-1"), &new_key(&secret(3)), NOW.unix_secs).unwrap();
    let identity = open(dir.path());
    for seed in [1, 3] {
        let token = strip_kid(&jwt(&identity, "sensor-1", seed, &format!("{seed}")), &secret(seed));
        let login = identity.login_jwt(None, "sensor-1", token.as_bytes(), NOW).unwrap();
        assert_eq!(login.key_id, secret(seed).public().key_id());
    }
    let token = strip_kid(&jwt(&identity, "sensor-1", 2, "x"), &secret(2));
    assert!(identity.login_jwt(None, "sensor-1", token.as_bytes(), NOW).is_err());
}

// Limits.

#[test]
fn over_the_concurrent_verifications_a_login_is_too_fast_and_places_come_back() {
    let dir = house();
    let identity = open_with(dir.path(), |config| config.verify_concurrency_max = 1);
    let place = identity.shared.begin_verification().unwrap();
    let request = http_request(&identity, "sensor-1", 1, NOW);
    let refusal = http_session(&identity, &request, NOW).unwrap_err();
    assert!(matches!(refusal, Reject::TooFast { limit: "verify_concurrency_max", .. }), "{refusal:?}");
    drop(place);
    assert!(http_session(&identity, &request, NOW).is_ok());
    assert!(identity.shared.begin_verification().is_some());
}

#[test]
fn full_used_sets_refuse_by_the_name_of_their_key() {
    let dir = house();
    let identity = open_with(dir.path(), |config| {
        (config.jti_max, config.jti_per_device_max) = (2, 1);
        (config.used_challenges_max, config.used_challenges_per_device_max) = (2, 1);
    });
    let by_jwt = |device: &str, seed, jti: &str| {
        identity.login_jwt(Some(device), "", jwt(&identity, device, seed, jti).as_bytes(), NOW).map(|_| ())
    };
    assert_eq!(by_jwt("sensor-1", 1, "a"), Ok(()));
    assert!(matches!(by_jwt("sensor-1", 1, "b"), Err(Reject::TooFast { limit: "jti_per_device_max", .. })));
    assert_eq!(by_jwt("sensor-2", 2, "a"), Ok(()));
    assert!(matches!(by_jwt("sensor-2", 2, "b"), Err(Reject::Full { limit: "jti_max", .. })));

    let by_challenge =
        |device: &str, seed| http_session(&identity, &http_request(&identity, device, seed, NOW), NOW).map(|_| ());
    assert_eq!(by_challenge("sensor-1", 1), Ok(()));
    let refusal = by_challenge("sensor-1", 1).unwrap_err();
    assert!(matches!(refusal, Reject::TooFast { limit: "used_challenges_per_device_max", .. }), "{refusal:?}");
    assert_eq!(by_challenge("sensor-2", 2), Ok(()));
    assert!(matches!(by_challenge("sensor-2", 2), Err(Reject::Full { limit: "used_challenges_max", .. })));
}

#[test]
fn bodies_that_are_not_of_the_contract_are_malformed() {
    let dir = house();
    let identity = open(dir.path());
    let peer: SocketAddr = PEER.parse().unwrap();
    let long = ChallengeRequest { device_id: "x".repeat(129), client_nonce: NONCE };
    for body in [&b""[..], b"{}", b"null", b"[1,2]", &serde_json::to_vec(&long).unwrap()] {
        assert!(matches!(identity.http_challenge(body, NOW), Err(Reject::Malformed { .. })));
        assert!(matches!(identity.http_session(body, &Channel::default(), NOW), Err(Reject::Malformed { .. })));
        assert!(matches!(identity.coap_challenge(body, peer, NOW), Err(Reject::Malformed { .. })));
        assert!(matches!(identity.coap_session(body, peer, NOW), Err(Reject::Malformed { .. })));
    }
    assert!(identity.coap_challenge(&long.to_cbor(), peer, NOW).is_err());
}

#[test]
fn challenge_keys_rotate_and_the_challenge_before_still_opens() {
    let dir = house();
    let identity = open(dir.path());
    let start = Now::read().boot_secs;
    let at = |secs| Now { boot_secs: start + secs, ..NOW };
    let before = http_request(&identity, "sensor-1", 1, at(599));
    let after = http_request(&identity, "sensor-1", 1, at(601));
    assert!(http_session(&identity, &before, at(602)).is_ok());
    assert!(http_session(&identity, &after, at(602)).is_ok());
}

// A registry that changes while the gateway runs.

fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_change_by_another_process_is_seen_by_a_running_gateway() {
    let dir = house();
    let identity = open_with(dir.path(), |config| config.registry_poll_ms = 50);
    let request = http_request(&identity, "sensor-1", 1, NOW);
    let token = text::base64url(&http_session(&identity, &request, NOW).unwrap().access_token);
    let device = identity.device(&id("sensor-1")).unwrap();
    assert!(identity.is_current(&device));
    assert!(identity.verify_token(token.as_bytes(), Protocol::Http, NOW).is_ok());
    let version = identity.registry_version();

    // A second connection to the file is what another process is.
    let mut registry = Registry::open(dir.path()).unwrap();
    registry.set_enabled(&id("sensor-1"), false).unwrap();
    eventually("the revocation is not seen", || !identity.is_current(&device));
    assert!(identity.registry_version() > version);
    assert!(identity.device(&id("sensor-1")).is_none() && identity.by_index(device.index).is_none());
    let refusal = identity.verify_token(token.as_bytes(), Protocol::Http, NOW).unwrap_err();
    assert_eq!(refusal, Reject::Unauthenticated);

    // Enabled again, the device may come back, and what was issued before may not.
    registry.set_enabled(&id("sensor-1"), true).unwrap();
    eventually("the device is not back", || identity.device(&id("sensor-1")).is_some());
    assert!(!identity.is_current(&device));
    assert!(identity.verify_token(token.as_bytes(), Protocol::Http, NOW).is_err());

    registry.add(&[new_device("sensor-3", 3)], NOW.unix_secs, |_| {}).unwrap();
    eventually("the new device is not seen", || identity.device(&id("sensor-3")).is_some());
    assert_eq!(identity.device_count(), 3);
    // The untouched one was not touched.
    assert_eq!(identity.device(&id("sensor-2")).unwrap().generation, 1);
}

#[test]
fn a_removed_key_no_longer_logs_in_and_an_added_one_does() {
    let dir = house();
    let identity = open(dir.path());
    let mut registry = Registry::open(dir.path()).unwrap();
    registry.add_key(&id("sensor-1"), &new_key(&secret(3)), NOW.unix_secs).unwrap();
    registry.remove_key(&id("sensor-1"), secret(1).public().key_id()).unwrap();
    identity.refresh().unwrap();
    assert!(http_session(&identity, &http_request(&identity, "sensor-1", 3, NOW), NOW).is_ok());
    assert!(http_session(&identity, &http_request(&identity, "sensor-1", 1, NOW), NOW).is_err());
    assert!(identity.by_public_key(&secret(1).public(), NOW).is_none());
    let owner = identity.by_public_key(&secret(3).public(), NOW).unwrap();
    assert_eq!((owner.id.clone(), owner.generation), (id("sensor-1"), 3));
}

#[test]
fn a_new_configuration_holds_for_what_is_issued_next() {
    let dir = house();
    let identity = open(dir.path());
    identity.reconfigure(&Config { token_ttl_secs: 30, ..Config::default() });
    let answer = http_session(&identity, &http_request(&identity, "sensor-1", 1, NOW), NOW).unwrap();
    assert_eq!(answer.expires_in, 30);
}

#[test]
fn a_token_outlives_a_restart_and_a_challenge_does_not() {
    let dir = house();
    let identity = open(dir.path());
    let request = http_request(&identity, "sensor-1", 1, NOW);
    let token = text::base64url(&http_session(&identity, &request, NOW).unwrap().access_token);
    let unanswered = http_request(&identity, "sensor-1", 1, NOW);
    drop(identity);
    let identity = open(dir.path());
    assert!(identity.verify_token(token.as_bytes(), Protocol::Http, NOW).is_ok());
    assert!(http_session(&identity, &unanswered, NOW).is_err());
}

#[test]
fn nothing_secret_is_printed() {
    let dir = house();
    let identity = open(dir.path());
    let printed = format!("{identity:?} {:?}", identity.shared.token_key);
    let secret_hex = text::hex(identity.shared.gateway.secret.seed());
    assert!(!printed.contains(&secret_hex));
    assert!(printed.contains(&identity.gateway().id.to_string()));
    let _: PublicKey = identity.gateway().public;
}

// Signed messages.

#[test]
fn a_signed_message_works_once_over_a_restart_too_and_for_its_device_only() {
    let dir = house();
    let sign = |identity: &Identity, seed: u8, device: &str, sequence: u64| {
        let gateway_id = &identity.gateway().id;
        let purpose = tidegate_auth::cose::Purpose { method: 2, path: &["t"], gateway_id };
        tidegate_auth::cose::sign(&secret(seed), device, sequence, None, b"21", &purpose)
    };
    let identity = open(dir.path());
    let refused = || Some(NotTaken::Reject(Reject::Unauthenticated));
    let body = sign(&identity, 1, "sensor-1", 5);
    let taken = identity.coap_signed(&body, 2, &["t"], NOW).unwrap();
    assert_eq!((taken.device.id.as_str(), taken.payload), ("sensor-1", &b"21"[..]));
    assert_eq!(identity.coap_signed(&body, 2, &["t"], NOW).err(), Some(NotTaken::Used));
    assert_eq!(identity.coap_signed(&body, 2, &["e"], NOW).err(), refused(), "another path");
    for (seed, device) in [(2, "sensor-1"), (1, "sensor-2"), (1, "nobody")] {
        let body = sign(&identity, seed, device, 6);
        assert_eq!(identity.coap_signed(&body, 2, &["t"], NOW).err(), refused(), "{seed} {device}");
    }
    assert_eq!(identity.coap_signed(b"\x84", 2, &["t"], NOW).err(), refused());
    drop(identity);
    let identity = open(dir.path());
    assert_eq!(identity.coap_signed(&body, 2, &["t"], NOW).err(), Some(NotTaken::Used));
    let next = sign(&identity, 1, "sensor-1", 6);
    assert!(identity.coap_signed(&next, 2, &["t"], NOW).is_ok());
}

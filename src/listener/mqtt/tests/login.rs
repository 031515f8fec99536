//! Who gets in, who does not, and for how long.

use std::time::Duration;

use tidegate_auth::enhanced::{self, Opening};
use tidegate_auth::{CbType, Proto, Transcript};
use tidegate_mqtt::{Property, Reason};
use tokio::io::AsyncWriteExt;

use super::client::Said;
use super::*;

const NONCE: [u8; 16] = [5; 16];

fn transcript<'a>(
    fixture: &'a Fixture,
    id: &'a str,
    cb_type: CbType,
    challenge: &'a [u8],
    binding: &'a [u8],
) -> Transcript<'a> {
    Transcript {
        proto: Proto::Mqtt,
        cb_type,
        gateway_id: &fixture.gateway.identity.gateway().id,
        device_id: id,
        key_id: key(id).public().key_id(),
        client_nonce: &NONCE,
        challenge,
        channel_binding: binding,
        ctx: id.as_bytes(),
    }
}

fn opening(id: &str) -> Vec<u8> {
    Opening { cb_type: CbType::None, client_nonce: NONCE, key_id: key(id).public().key_id(), signature: None }.encode()
}

fn answer_to(fixture: &Fixture, id: &str, question: &[u8]) -> Vec<u8> {
    let (challenge, _) = enhanced::parse_challenge(question).unwrap();
    let signature = transcript(fixture, id, CbType::None, &challenge, &[]).sign(&key(id)).unwrap();
    enhanced::encode_signature(&signature)
}

#[tokio::test]
async fn a_jwt_is_a_password_once() {
    for version in VERSIONS {
        let fixture = Fixture::new();
        let jwt = fixture.jwt("a", 600);
        let mut client = fixture.dial(version);
        client.connect("a").password(&jwt).send().await;
        client.accepted().await;
        let mut again = fixture.dial(version);
        again.connect("a").password(&jwt).send().await;
        assert_eq!(again.refused().await, Reason::NotAuthorized);
        let mut other = fixture.dial(version);
        other.connect("b").password(&fixture.jwt("a", 600)).send().await;
        assert_eq!(other.refused().await, Reason::NotAuthorized);
        let mut nobody = fixture.dial(version);
        nobody.connect("a").send().await;
        assert_eq!(nobody.refused().await, Reason::NotAuthorized);
    }
}

#[tokio::test(start_paused = true)]
async fn the_connection_ends_with_its_jwt() {
    for (version, expected) in [(Version::V5, Some(Reason::NotAuthorized)), (Version::V311, None)] {
        let fixture = Fixture::new();
        let mut client = fixture.dial(version);
        client.connect("a").password(&fixture.jwt("a", 30)).send().await;
        client.accepted().await;
        let began = tokio::time::Instant::now();
        if let Some(reason) = expected {
            assert_eq!(client.next().await, Said::Disconnect(reason));
        }
        assert_eq!(client.next().await, Said::Closed);
        let lived = began.elapsed();
        assert!(lived > Duration::from_secs(28) && lived < Duration::from_secs(33), "{lived:?}");
    }
}

#[tokio::test]
async fn enhanced_authentication_proves_both_sides() {
    let fixture = Fixture::new();
    let mut client = fixture.dial(Version::V5);
    let opening = opening("a");
    let auth = [Property::AuthMethod(enhanced::METHOD), Property::AuthData(&opening)];
    client.connect("a").property(auth[0]).property(auth[1]).send().await;
    let Said::Auth(Reason::ContinueAuthentication, question) = client.next().await else { panic!("no challenge") };
    let answer = answer_to(&fixture, "a", &question);
    client.auth(Reason::ContinueAuthentication, enhanced::METHOD, &answer).await;
    let (_, properties) = client.accepted().await;
    assert!(properties.iter().any(|p| p.starts_with("AuthData")), "the gateway's own proof: {properties:?}");

    // And again, while the session lives.
    client.auth(Reason::ReAuthenticate, enhanced::METHOD, &opening).await;
    let Said::Auth(Reason::ContinueAuthentication, question) = client.next().await else { panic!("no challenge") };
    let answer = answer_to(&fixture, "a", &question);
    client.auth(Reason::ContinueAuthentication, enhanced::METHOD, &answer).await;
    assert!(matches!(client.next().await, Said::Auth(Reason::Success, _)));
    client.quiet().await;

    // A wrong answer ends it.
    client.auth(Reason::ReAuthenticate, enhanced::METHOD, &opening).await;
    assert!(matches!(client.next().await, Said::Auth(Reason::ContinueAuthentication, _)));
    client.auth(Reason::ContinueAuthentication, enhanced::METHOD, &answer).await;
    assert_eq!(client.next().await, Said::Disconnect(Reason::NotAuthorized));
    assert_eq!(client.next().await, Said::Closed);
}

#[tokio::test]
async fn a_wrong_proof_and_an_unknown_method_are_refused() {
    let fixture = Fixture::new();
    let opening = opening("a");
    let mut wrong = fixture.dial(Version::V5);
    wrong
        .connect("a")
        .property(Property::AuthMethod(enhanced::METHOD))
        .property(Property::AuthData(&opening))
        .send()
        .await;
    assert!(matches!(wrong.next().await, Said::Auth(..)));
    wrong.auth(Reason::ContinueAuthentication, enhanced::METHOD, &[1; 65]).await;
    assert_eq!(wrong.refused().await, Reason::NotAuthorized);
    let mut unknown = fixture.dial(Version::V5);
    unknown.connect("a").property(Property::AuthMethod("SCRAM-SHA-1")).send().await;
    assert_eq!(unknown.refused().await, Reason::BadAuthenticationMethod);
}

#[tokio::test]
async fn inside_tls_one_message_proves_the_key_and_its_channel() {
    let fixture = Fixture::new();
    let exporter = [9; 32];
    for (binding, good) in [([9; 32], true), ([8; 32], false)] {
        let signature = transcript(&fixture, "a", CbType::TlsExporter, &[], &binding).sign(&key("a")).unwrap();
        let key_id = key("a").public().key_id();
        let signature = Some(signature);
        let data = Opening { cb_type: CbType::TlsExporter, client_nonce: NONCE, key_id, signature }.encode();
        let tls = TlsInfo { alpn: None, exporter, client_key: None };
        let mut client = fixture.dial_tls(Version::V5, Some(tls), 1 << 16);
        client
            .connect("a")
            .property(Property::AuthMethod(enhanced::METHOD))
            .property(Property::AuthData(&data))
            .send()
            .await;
        if good {
            client.accepted().await;
        } else {
            assert_eq!(client.refused().await, Reason::NotAuthorized);
        }
    }
}

#[tokio::test]
async fn a_certificate_with_a_registered_key_is_a_login() {
    for version in VERSIONS {
        let fixture = Fixture::new();
        let tls = |id: &str| TlsInfo { alpn: None, exporter: [9; 32], client_key: Some(*key(id).public().as_bytes()) };
        let mut client = fixture.dial_tls(version, Some(tls("a")), 1 << 16);
        client.connect("any-name").username(None).send().await;
        client.accepted().await;
        client.publish("t", "x", tidegate_mqtt::Qos::AtLeastOnce, 1).await;
        assert!(matches!(client.next().await, Said::Puback(1, _)));
        let mut other = fixture.dial_tls(version, Some(tls("a")), 1 << 16);
        other.connect("b").send().await;
        assert_eq!(other.refused().await, Reason::NotAuthorized);
        let mut stranger = fixture.dial_tls(version, Some(tls("nobody")), 1 << 16);
        stranger.connect("x").username(None).send().await;
        assert_eq!(stranger.refused().await, Reason::NotAuthorized);
    }
}

#[tokio::test]
async fn strangers_come_in_only_where_they_have_a_role() {
    for version in VERSIONS {
        let fixture = Fixture::with(|_| {}, |identity| identity.anonymous_role = "guest".into(), &[]);
        let mut guest = fixture.dial(version);
        guest.connect("").username(None).send().await;
        let (_, properties) = guest.accepted().await;
        if version == Version::V5 {
            assert!(properties.iter().any(|p| p.starts_with("AssignedClientId(\"tidegate-")), "{properties:?}");
        }
        guest.subscribe(&[("plant/x", tidegate_mqtt::Qos::AtMostOnce)]).await;
        guest.publish("plant/x", "hi", tidegate_mqtt::Qos::AtMostOnce, 0).await;
        assert_eq!(guest.next().await.message(), "plant/x=hi");
        // What is shown has to be right even where nothing need be shown.
        let mut liar = fixture.dial(version);
        liar.connect("a").password("secret").send().await;
        assert_eq!(liar.refused().await, Reason::NotAuthorized);
    }
}

#[tokio::test]
async fn too_many_logins_from_one_address_are_slowed_down() {
    use crate::units::Rate;
    for (version, reason) in [(Version::V5, Reason::ConnectionRateExceeded), (Version::V311, Reason::ServerUnavailable)]
    {
        let fixture = Fixture::with(|limits| limits.auth_rate_per_address = Rate::per_second(1, 1), |_| {}, &[]);
        let mut first = fixture.dial(version);
        first.connect("a").password("wrong").send().await;
        assert_eq!(first.refused().await, Reason::NotAuthorized);
        let mut second = fixture.dial(version);
        second.connect("a").password("wrong").send().await;
        assert_eq!(second.refused().await, reason);
    }
}

#[tokio::test(start_paused = true)]
async fn who_does_not_finish_connecting_is_closed() {
    let fixture = Fixture::new();
    let mut silent = fixture.dial(Version::V5);
    assert_eq!(silent.next().await, Said::Closed);
    let mut drip = fixture.dial(Version::V5);
    drip.io.write_all(&[0x10, 0x20, 0x00, 0x04]).await.unwrap();
    assert_eq!(drip.next().await, Said::Closed);
    let mut stuck = fixture.dial(Version::V5);
    let opening = opening("a");
    stuck
        .connect("a")
        .property(Property::AuthMethod(enhanced::METHOD))
        .property(Property::AuthData(&opening))
        .send()
        .await;
    assert!(matches!(stuck.next().await, Said::Auth(..)));
    assert_eq!(stuck.next().await, Said::Closed);
}

#[tokio::test]
async fn what_is_not_mqtt_is_closed_at_once() {
    let fixture = Fixture::new();
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0x10, 0xff, 0xff, 0xff, 0xff, 0xff], &[0xC0, 0x00]] {
        let mut client = fixture.dial(Version::V5);
        client.io.write_all(bytes).await.unwrap();
        while client.next().await != Said::Closed {}
    }
}

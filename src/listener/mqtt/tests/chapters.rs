//! Normative statements that no other test holds, in the order of the specification's chapters. `docs/conformance/mqtt.md` lists them all.

use std::time::Duration;

use tidegate_mqtt::{Ack, Packet, PropertiesBuf, Property, Qos, Reason};
use tokio::io::AsyncWriteExt;

use super::client::{Client, Said, ack, id};
use super::*;

/// A reader of everything under `plant/`.
async fn reader(fixture: &Fixture, qos: Qos) -> Client {
    let mut reader = fixture.login(Version::V5, "op").await;
    reader.subscribe(&[("plant/#", qos)]).await;
    reader
}

/// A client whose session outlives its connection.
async fn lasting(fixture: &Fixture, version: Version, id: &str, secs: u32) -> (bool, Client) {
    let mut client = fixture.dial(version);
    let jwt = fixture.jwt(id, 600);
    client.connect(id).password(&jwt).keep().property(Property::SessionExpiry(secs)).send().await;
    let (present, _) = client.accepted().await;
    (present, client)
}

#[tokio::test]
async fn topics_are_passed_on_as_they_are_written() {
    // [MQTT-1.5.4-3] and [MQTT-4.7.3-4]: neither the byte order mark nor case, empty levels or composition are touched.
    for version in VERSIONS {
        let fixture = Fixture::new();
        let mut client = fixture.login(version, "a").await;
        client.subscribe(&[("plant/#", Qos::AtMostOnce)]).await;
        for topic in ["plant/\u{feff}x", "plant//x/", "plant/X", "plant/e\u{301}", "plant/\u{e9}", "plant/ x "] {
            client.publish(topic, "1", Qos::AtMostOnce, 0).await;
            assert_eq!(client.next().await.message(), format!("{topic}=1"));
        }
    }
}

#[tokio::test]
async fn what_follows_a_refused_connect_is_not_looked_at() {
    // [MQTT-3.1.4-6]
    for version in VERSIONS {
        let fixture = Fixture::with(|_| {}, |identity| identity.anonymous_role = "guest".into(), &[]);
        let mut reader = reader(&fixture, Qos::AtMostOnce).await;
        let mut stranger = fixture.dial(version);
        stranger.connect("a").password("wrong").send().await;
        let publish = tidegate_mqtt::Publish {
            dup: false,
            qos: Qos::AtMostOnce,
            retain: false,
            topic: "plant/x",
            packet_id: None,
            properties: tidegate_mqtt::Properties::EMPTY,
            payload: b"smuggled",
        };
        let bytes = stranger.bytes(Packet::Publish(publish));
        // The gateway may have closed already.
        let _ = stranger.io.write_all(&bytes).await;
        assert_eq!(stranger.refused().await, Reason::NotAuthorized);
        reader.quiet().await;
    }
}

#[tokio::test]
async fn packets_behind_an_accepted_connect_wait_for_it() {
    for version in VERSIONS {
        let fixture = Fixture::new();
        let mut client = fixture.dial(version);
        client.connect("a").password(&fixture.jwt("a", 600)).send().await;
        client.publish("plant/x", "early", Qos::AtLeastOnce, 1).await;
        client.send(Packet::Pingreq).await;
        client.accepted().await;
        assert!(matches!(client.next().await, Said::Puback(1, _)));
        assert_eq!(client.next().await, Said::Pingresp);
    }
}

#[tokio::test]
async fn a_connack_says_no_more_than_was_asked_for() {
    // [MQTT-3.1.2-28], [MQTT-4.12.0-6], [MQTT-3.2.2-22]
    let fixture = Fixture::new();
    let mut client = fixture.dial(Version::V5);
    client.connect("a").password(&fixture.jwt("a", 600)).property(Property::RequestResponseInfo(false)).send().await;
    let (present, properties) = client.accepted().await;
    assert!(!present);
    for absent in
        ["ResponseInfo", "AuthMethod", "ServerKeepAlive", "AssignedClientId", "SessionExpiry", "ServerReference"]
    {
        assert!(!properties.iter().any(|p| p.starts_with(absent)), "{absent}: {properties:?}");
    }
}

#[tokio::test]
async fn a_keep_alive_over_the_limit_is_answered_with_the_gateways_own() {
    // [MQTT-3.1.2-21]: the client is told; [MQTT-3.1.2-22] then counts with it.
    for asked in [0, 50_000] {
        let fixture = Fixture::new();
        let mut client = fixture.dial(Version::V5);
        client.connect("a").password(&fixture.jwt("a", 600)).keep_alive(asked).send().await;
        let (_, properties) = client.accepted().await;
        assert!(properties.contains(&"ServerKeepAlive(3600)".to_owned()), "{asked}: {properties:?}");
    }
}

#[tokio::test]
async fn a_session_expiry_over_the_limit_is_cut_and_said() {
    use crate::units::Age;
    let fixture = Fixture::with(|limits| limits.session_expiry_max = Age::from_secs(100), |_| {}, &[]);
    let mut client = fixture.dial(Version::V5);
    client.connect("a").password(&fixture.jwt("a", 600)).property(Property::SessionExpiry(u32::MAX)).send().await;
    let (_, properties) = client.accepted().await;
    assert!(properties.contains(&"SessionExpiry(100)".to_owned()), "{properties:?}");
}

#[tokio::test]
async fn assigned_client_identifiers_are_never_the_same() {
    // [MQTT-3.1.3-7], [MQTT-3.2.2-16]
    let fixture = Fixture::new();
    let mut names = std::collections::HashSet::new();
    let mut clients = Vec::new();
    for _ in 0..5 {
        let mut client = fixture.dial(Version::V5);
        client.connect("").username(Some("a")).password(&fixture.jwt("a", 600)).send().await;
        let (_, properties) = client.accepted().await;
        names.insert(properties.into_iter().find(|p| p.starts_with("AssignedClientId")).unwrap());
        clients.push(client);
    }
    assert_eq!(names.len(), 5);
    for client in &mut clients {
        client.quiet().await;
    }
}

#[tokio::test]
async fn a_311_client_without_a_name_must_not_want_to_be_remembered() {
    // MQTT 3.1.1 [MQTT-3.1.3-8]
    let fixture = Fixture::new();
    let mut client = fixture.dial(Version::V311);
    client.connect("").username(Some("a")).password(&fixture.jwt("a", 600)).keep().send().await;
    assert_eq!(client.refused().await, Reason::ClientIdentifierNotValid);
    let mut clean = fixture.dial(Version::V311);
    clean.connect("").username(Some("a")).password(&fixture.jwt("a", 600)).send().await;
    assert!(!clean.accepted().await.0);
}

#[tokio::test]
async fn a_will_is_a_message_like_any_other() {
    // [MQTT-3.1.2-14], [MQTT-3.1.2-15], [MQTT-3.1.3-10]
    for retain in [false, true] {
        let fixture = Fixture::new();
        let mut reader = reader(&fixture, Qos::ExactlyOnce).await;
        let properties = [
            Property::ContentType("text/plain"),
            Property::User("z", "1"),
            Property::User("a", "2"),
            Property::User("z", "3"),
        ];
        let mut client = fixture.dial(Version::V5);
        let jwt = fixture.jwt("a", 600);
        client
            .connect("a")
            .password(&jwt)
            .will("plant/will", "gone", Qos::AtLeastOnce, retain, &properties)
            .send()
            .await;
        client.accepted().await;
        client.vanish().await;
        let Said::Publish { topic, payload, qos, properties: got, .. } = reader.next().await else { panic!("no will") };
        assert_eq!((topic.as_str(), payload.as_str(), qos), ("plant/will", "gone", Qos::AtLeastOnce));
        let expected: Vec<String> = properties.iter().map(|p| format!("{p:?}")).collect();
        assert_eq!(got, expected);
        let mut late = fixture.login(Version::V5, "b").await;
        late.subscribe(&[("plant/will", Qos::AtMostOnce)]).await;
        if retain {
            assert_eq!(late.next().await.message(), "plant/will=gone");
        }
        late.quiet().await;
    }
}

#[tokio::test]
async fn a_will_follows_every_close_but_a_plain_goodbye() {
    // [MQTT-3.1.2-8], [MQTT-3.1.2-10], [MQTT-3.14.4-3]
    let fixture = Fixture::new();
    let mut reader = reader(&fixture, Qos::AtMostOnce).await;
    for (how, due) in [(Reason::DisconnectWithWill, true), (Reason::Success, false), (Reason::UnspecifiedError, true)] {
        let mut client = fixture.dial(Version::V5);
        let jwt = fixture.jwt("a", 600);
        client.connect("a").password(&jwt).will("plant/will", how.as_str(), Qos::AtMostOnce, false, &[]).send().await;
        client.accepted().await;
        client.disconnect(how, &[]).await;
        assert_eq!(client.next().await, Said::Closed);
        if due {
            assert_eq!(reader.next().await.message(), format!("plant/will={}", how.as_str()));
        }
        reader.quiet().await;
    }
    // Broken off by the gateway, for an error of the client.
    let mut client = fixture.dial(Version::V5);
    let jwt = fixture.jwt("a", 600);
    client.connect("a").password(&jwt).will("plant/will", "error", Qos::AtMostOnce, false, &[]).send().await;
    client.accepted().await;
    client.io.write_all(&[0x00, 0x00]).await.unwrap();
    assert_eq!(client.next().await, Said::Disconnect(Reason::MalformedPacket));
    assert_eq!(reader.next().await.message(), "plant/will=error");
}

#[tokio::test]
async fn a_second_connect_and_what_only_servers_send_are_protocol_errors() {
    // [MQTT-3.1.0-2], [MQTT-4.13.1-1]
    for version in VERSIONS {
        for bytes in [&b"\x10\x0c\0\x04MQTT\x04\x02\0\0\0\0"[..], b"\xd0\0", b"\x20\x02\0\0"] {
            let fixture = Fixture::new();
            let mut client = fixture.login(version, "a").await;
            client.io.write_all(bytes).await.unwrap();
            if version == Version::V5 {
                let Said::Disconnect(reason) = client.next().await else { panic!("no DISCONNECT for {bytes:?}") };
                assert!(matches!(reason, Reason::ProtocolError | Reason::MalformedPacket), "{bytes:?}: {reason:?}");
            }
            assert_eq!(client.next().await, Said::Closed, "{bytes:?}");
        }
    }
}

#[tokio::test]
async fn a_retained_message_is_the_last_one_with_the_flag() {
    // [MQTT-3.3.1-5], [MQTT-3.3.1-6], [MQTT-3.3.1-7], [MQTT-3.3.1-8]
    for version in VERSIONS {
        let fixture = Fixture::new();
        let mut client = fixture.login(version, "a").await;
        for (payload, retain) in [("first", true), ("second", true), ("not kept", false)] {
            client.publish_with("plant/x", payload, Qos::AtLeastOnce, 1, retain, &[]).await;
            assert!(matches!(client.next().await, Said::Puback(1, _)));
        }
        client.subscribe(&[("plant/x", Qos::AtLeastOnce)]).await;
        assert_eq!(client.next().await.message(), "plant/x=second");
        client.puback(1).await;
        client.unsubscribe("plant/x").await;
        client.publish_with("plant/x", "", Qos::AtLeastOnce, 2, true, &[]).await;
        assert!(matches!(client.next().await, Said::Puback(2, _)));
        client.subscribe(&[("plant/x", Qos::AtLeastOnce)]).await;
        client.quiet().await;
    }
}

#[tokio::test]
async fn a_message_comes_at_the_lower_of_both_qualities() {
    // [MQTT-3.8.4-8], [MQTT-3.3.4-2], [MQTT-4.8.2-3]
    let qualities = [Qos::AtMostOnce, Qos::AtLeastOnce, Qos::ExactlyOnce];
    for filter in ["plant/#", "$share/g/plant/#"] {
        for granted in qualities {
            let fixture = Fixture::new();
            let mut reader = fixture.login(Version::V5, "op").await;
            reader.subscribe(&[(filter, granted)]).await;
            let mut writer = fixture.login(Version::V5, "a").await;
            for published in qualities {
                writer.publish("plant/x", "1", published, 1).await;
                let Said::Publish { qos, .. } = reader.next().await else { panic!("no message") };
                assert_eq!(qos, published.min(granted), "{filter}");
                match published {
                    Qos::AtMostOnce => {}
                    Qos::AtLeastOnce => assert!(matches!(writer.next().await, Said::Puback(1, _))),
                    Qos::ExactlyOnce => {
                        assert!(matches!(writer.next().await, Said::Pubrec(1, _)));
                        writer.send(Packet::Pubrel(ack(1))).await;
                        assert_eq!(writer.next().await, Said::Pubcomp(1, Reason::Success));
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn a_reason_string_that_would_be_too_large_is_left_out() {
    // [MQTT-3.4.2-2], [MQTT-3.9.2-1]: the answer itself still comes.
    let fixture = Fixture::new();
    let mut client = fixture.login_with("a", Property::MaximumPacketSize(20)).await;
    client.publish("plant/forbidden", "x", Qos::AtLeastOnce, 1).await;
    assert_eq!(client.next().await, Said::Puback(1, Reason::NotAuthorized));
    assert_eq!(client.subscribe(&[("dev/b/#", Qos::AtMostOnce)]).await, [Reason::NotAuthorized]);
}

#[tokio::test]
async fn a_subscription_made_again_replaces_the_first() {
    // [MQTT-3.8.4-3], [MQTT-3.8.4-4]
    for version in VERSIONS {
        let fixture = Fixture::new();
        fixture.emit("plant/x", "kept", true);
        let mut client = fixture.login(version, "a").await;
        for qos in [Qos::AtMostOnce, Qos::ExactlyOnce, Qos::AtMostOnce] {
            client.subscribe(&[("plant/x", qos)]).await;
            assert_eq!(client.next().await.message(), "plant/x=kept");
        }
        fixture.emit("plant/x", "new", false);
        let Said::Publish { qos, payload, .. } = client.next().await else { panic!("no message") };
        assert_eq!((qos, payload.as_str()), (Qos::AtMostOnce, "new"));
        client.unsubscribe("plant/x").await;
        fixture.emit("plant/x", "unheard", false);
        client.quiet().await;
    }
}

#[tokio::test]
async fn an_unsubscribe_takes_each_filter_character_by_character() {
    // [MQTT-3.10.4-1], [MQTT-3.10.4-2], [MQTT-3.10.4-5], [MQTT-3.10.4-6]
    let fixture = Fixture::new();
    let mut client = fixture.login(Version::V5, "a").await;
    client.subscribe(&[("plant/+", Qos::AtMostOnce), ("plant/x", Qos::AtMostOnce)]).await;
    assert_eq!(client.unsubscribe("plant/#").await, [Reason::NoSubscriptionExisted]);
    assert_eq!(client.unsubscribe("plant/+").await, [Reason::Success]);
    fixture.emit("plant/x", "1", false);
    fixture.emit("plant/y", "2", false);
    assert_eq!(client.next().await.message(), "plant/x=1");
    client.quiet().await;
}

#[tokio::test]
async fn what_is_on_its_way_is_finished_after_an_unsubscribe() {
    // [MQTT-3.10.4-3]
    for version in VERSIONS {
        let fixture = Fixture::new();
        let (_, mut client) = lasting(&fixture, version, "a", 600).await;
        client.subscribe(&[("plant/#", Qos::ExactlyOnce)]).await;
        let mut writer = fixture.login(version, "b").await;
        writer.publish("plant/x", "1", Qos::ExactlyOnce, 1).await;
        assert!(matches!(writer.next().await, Said::Pubrec(1, _)));
        assert_eq!(client.next().await.message(), "plant/x=1");
        client.unsubscribe("plant/#").await;
        client.vanish().await;
        let (present, mut client) = lasting(&fixture, version, "a", 600).await;
        assert!(present);
        assert!(matches!(client.next().await, Said::Publish { dup: true, qos: Qos::ExactlyOnce, .. }));
        client.send(Packet::Pubrec(ack(1))).await;
        assert_eq!(client.next().await, Said::Pubrel(1, Reason::Success));
        client.send(Packet::Pubcomp(ack(1))).await;
        client.quiet().await;
    }
}

#[tokio::test]
async fn a_session_ends_when_its_time_is_over() {
    // [MQTT-4.1.0-2], [MQTT-3.1.2-23]
    let fixture = Fixture::new();
    let (_, mut client) = lasting(&fixture, Version::V5, "a", 600).await;
    client.subscribe(&[("plant/#", Qos::AtLeastOnce)]).await;
    // The last word counts: it may shorten.
    client.disconnect(Reason::Success, &[Property::SessionExpiry(100)]).await;
    assert_eq!(client.next().await, Said::Closed);
    client.vanish().await;
    fixture.gateway.tick(now() + Duration::from_secs(90));
    assert_eq!(fixture.gateway.sessions.counts(), (0, 1));
    fixture.gateway.tick(now() + Duration::from_secs(110));
    assert_eq!(fixture.gateway.sessions.counts(), (0, 0));
    let (present, _client) = lasting(&fixture, Version::V5, "a", 600).await;
    assert!(!present);
}

#[tokio::test]
async fn a_qos_2_exchange_goes_on_although_its_message_has_expired() {
    // [MQTT-4.3.3-7], [MQTT-4.3.3-13]
    let fixture = Fixture::new();
    let mut reader = reader(&fixture, Qos::ExactlyOnce).await;
    let mut writer = fixture.login(Version::V5, "a").await;
    writer.publish_with("plant/x", "1", Qos::ExactlyOnce, 1, false, &[Property::MessageExpiry(1)]).await;
    assert!(matches!(writer.next().await, Said::Pubrec(1, _)));
    assert_eq!(reader.next().await.message(), "plant/x=1");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    reader.send(Packet::Pubrec(ack(1))).await;
    assert_eq!(reader.next().await, Said::Pubrel(1, Reason::Success));
    writer.send(Packet::Pubrel(ack(1))).await;
    assert_eq!(writer.next().await, Said::Pubcomp(1, Reason::Success));
}

#[tokio::test]
async fn a_message_that_the_client_refuses_is_not_sent_again() {
    // [MQTT-4.4.0-2], [MQTT-4.8.2-6]
    for qos in [Qos::AtLeastOnce, Qos::ExactlyOnce] {
        let fixture = Fixture::new();
        let (_, mut client) = lasting(&fixture, Version::V5, "a", 600).await;
        client.subscribe(&[("$share/g/plant/#", qos)]).await;
        let mut writer = fixture.login(Version::V5, "b").await;
        writer.publish("plant/x", "1", qos, 1).await;
        assert_eq!(client.next().await.message(), "plant/x=1");
        let mut other = fixture.login(Version::V5, "op").await;
        other.subscribe(&[("$share/g/plant/#", qos)]).await;
        let list = PropertiesBuf::new();
        let refusal = Ack { packet_id: id(1), reason: Reason::QuotaExceeded, properties: list.as_properties() };
        client.send(if qos == Qos::AtLeastOnce { Packet::Puback(refusal) } else { Packet::Pubrec(refusal) }).await;
        client.quiet().await;
        client.vanish().await;
        let (_, mut client) = lasting(&fixture, Version::V5, "a", 600).await;
        client.quiet().await;
        other.quiet().await;
    }
}

#[tokio::test]
async fn a_shared_qos_2_message_stays_with_the_member_that_has_begun_it() {
    // [MQTT-4.8.2-4], [MQTT-4.8.2-5]
    for (secs, comes_back) in [(600, true), (0, false)] {
        let fixture = Fixture::new();
        let (_, mut client) = lasting(&fixture, Version::V5, "a", secs).await;
        client.subscribe(&[("$share/g/plant/#", Qos::ExactlyOnce)]).await;
        let mut writer = fixture.login(Version::V5, "b").await;
        writer.publish("plant/x", "1", Qos::ExactlyOnce, 1).await;
        assert_eq!(client.next().await.message(), "plant/x=1");
        let mut other = fixture.login(Version::V5, "op").await;
        other.subscribe(&[("$share/g/plant/#", Qos::ExactlyOnce)]).await;
        client.vanish().await;
        other.quiet().await;
        let (present, mut client) = lasting(&fixture, Version::V5, "a", 600).await;
        assert_eq!(present, comes_back);
        if comes_back {
            assert!(matches!(client.next().await, Said::Publish { dup: true, .. }));
        }
        client.quiet().await;
        other.quiet().await;
    }
}

#[tokio::test]
async fn what_a_member_of_a_shared_subscription_leaves_goes_to_another() {
    // Section 4.8.2: at QoS 1, when its session has ended.
    for (member_secs, heir_secs) in [(0, 0), (0, 600), (600, 0), (600, 600)] {
        let fixture = Fixture::new();
        let (_, mut member) = lasting(&fixture, Version::V5, "a", member_secs).await;
        member.subscribe(&[("$share/g/plant/#", Qos::AtLeastOnce)]).await;
        let mut writer = fixture.login(Version::V5, "b").await;
        for number in 1..=3 {
            writer.publish("plant/x", &number.to_string(), Qos::AtLeastOnce, number).await;
            assert_eq!(member.next().await.message(), format!("plant/x={number}"));
        }
        member.puback(1).await;
        let (_, mut heir) = lasting(&fixture, Version::V5, "op", heir_secs).await;
        heir.subscribe(&[("$share/g/plant/#", Qos::AtLeastOnce)]).await;
        member.quiet().await;
        member.vanish().await;
        if member_secs > 0 {
            // It may come back for them.
            heir.quiet().await;
            fixture.login(Version::V5, "a").await.quiet().await;
        }
        for number in 2..=3 {
            assert_eq!(heir.next().await.message(), format!("plant/x={number}"), "{member_secs} {heir_secs}");
        }
        heir.quiet().await;
    }
}

#[tokio::test]
async fn messages_of_a_topic_keep_their_order_at_every_quality() {
    // [MQTT-4.6.0-5], [MQTT-4.6.0-6]
    for version in VERSIONS {
        for qos in [Qos::AtMostOnce, Qos::AtLeastOnce, Qos::ExactlyOnce] {
            let fixture = Fixture::new();
            let mut reader = fixture.login(version, "op").await;
            reader.subscribe(&[("plant/#", qos)]).await;
            let mut writer = fixture.login(version, "a").await;
            for number in 1..=40_u16 {
                writer.publish("plant/x", &number.to_string(), qos, number).await;
            }
            for number in 1..=40_u16 {
                let said = reader.next().await;
                assert_eq!(said.message(), format!("plant/x={number}"));
                match (qos, said) {
                    (Qos::AtLeastOnce, Said::Publish { id: Some(id), .. }) => reader.puback(id.get()).await,
                    (Qos::ExactlyOnce, Said::Publish { id: Some(id), .. }) => {
                        reader.send(Packet::Pubrec(ack(id.get()))).await;
                    }
                    _ => {}
                }
            }
        }
    }
}

#[tokio::test]
async fn a_dropped_publish_is_acknowledged_to_a_311_client_where_the_operator_says_so() {
    use crate::gateway::Mqtt311Refused;
    let fixture = Fixture::configured(|config| config.mqtt311_refused = Mqtt311Refused::Drop);
    let mut reader = reader(&fixture, Qos::AtMostOnce).await;
    let mut client = fixture.login(Version::V311, "a").await;
    client.publish("plant/forbidden", "x", Qos::AtLeastOnce, 1).await;
    assert_eq!(client.next().await, Said::Puback(1, Reason::Success));
    client.publish("plant/forbidden", "x", Qos::ExactlyOnce, 2).await;
    assert_eq!(client.next().await, Said::Pubrec(2, Reason::Success));
    client.quiet().await;
    reader.quiet().await;
}

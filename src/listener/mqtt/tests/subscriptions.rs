//! What MQTT 5 lets a subscriber ask for.

use std::time::Duration;

use tidegate_mqtt::{Property, Qos, Reason, RetainHandling, SubscribeOptions};

use super::client::{Client, Said, id};
use super::*;

fn at(qos: Qos) -> SubscribeOptions {
    SubscribeOptions { qos, ..SubscribeOptions::default() }
}

fn properties(said: &Said) -> &[String] {
    match said {
        Said::Publish { properties, .. } => properties,
        other => panic!("not a message: {other:?}"),
    }
}

fn retain(said: &Said) -> bool {
    match said {
        Said::Publish { retain, .. } => *retain,
        other => panic!("not a message: {other:?}"),
    }
}

#[tokio::test]
async fn a_group_shares_the_messages_and_gets_each_once() {
    for version in VERSIONS {
        let fixture = Fixture::new();
        let mut members = [fixture.login(version, "a").await, fixture.login(version, "b").await];
        for member in &mut members {
            member.subscribe(&[("$share/g/plant/#", Qos::AtLeastOnce)]).await;
        }
        for payload in ["1", "2", "3", "4"] {
            fixture.emit("plant/x", payload, false);
        }
        let mut got = Vec::new();
        for member in &mut members {
            for packet in 1..=2 {
                got.push(member.next().await.message());
                member.puback(packet).await;
            }
            member.quiet().await;
        }
        got.sort();
        assert_eq!(got, ["plant/x=1", "plant/x=2", "plant/x=3", "plant/x=4"]);
    }
}

#[tokio::test]
async fn a_member_that_is_away_is_spared_while_others_are_here() {
    let fixture = Fixture::new();
    let mut away = fixture.dial(Version::V5);
    let jwt = fixture.jwt("a", 600);
    away.connect("a").password(&jwt).property(Property::SessionExpiry(600)).send().await;
    away.accepted().await;
    away.subscribe(&[("$share/g/plant/#", Qos::AtLeastOnce)]).await;
    away.vanish().await;
    let mut here = fixture.login(Version::V5, "b").await;
    here.subscribe(&[("$share/g/plant/#", Qos::AtLeastOnce)]).await;
    for payload in ["1", "2", "3"] {
        fixture.emit("plant/x", payload, false);
        assert_eq!(here.next().await.message(), format!("plant/x={payload}"));
    }
}

#[tokio::test]
async fn identifiers_say_which_subscriptions_matched() {
    let fixture = Fixture::new();
    let mut client = fixture.login(Version::V5, "a").await;
    client.subscribe_with(&[("plant/#", at(Qos::AtMostOnce))], &[Property::SubscriptionId(7)]).await;
    client.subscribe_with(&[("plant/+", at(Qos::AtLeastOnce))], &[Property::SubscriptionId(9)]).await;
    client.subscribe_with(&[("plant/+/y", at(Qos::AtMostOnce))], &[]).await;
    fixture.emit("plant/x", "1", false);
    // One copy, at the higher quality of service, with both identifiers.
    let said = client.next().await;
    assert_eq!(properties(&said), ["SubscriptionId(7)", "SubscriptionId(9)"]);
    assert!(matches!(said, Said::Publish { qos: Qos::AtLeastOnce, .. }));
    fixture.emit("plant/x/y", "2", false);
    assert_eq!(properties(&client.next().await), ["SubscriptionId(7)"]);
    // A subscription made again has the new identifier only ([MQTT-3.8.4-3]).
    client.subscribe_with(&[("plant/#", at(Qos::AtMostOnce))], &[]).await;
    fixture.emit("plant/x/y", "3", false);
    assert!(properties(&client.next().await).is_empty());
}

#[tokio::test]
async fn no_local_spares_the_publisher_its_own_messages() {
    let fixture = Fixture::new();
    let mut client = fixture.login(Version::V5, "a").await;
    client.publish_with("plant/kept", "own", Qos::AtLeastOnce, 1, true, &[]).await;
    assert!(matches!(client.next().await, Said::Puback(1, _)));
    let options = SubscribeOptions { no_local: true, ..at(Qos::AtLeastOnce) };
    client.subscribe_with(&[("plant/#", options)], &[]).await;
    client.publish("plant/x", "own", Qos::AtMostOnce, 0).await;
    client.quiet().await;
    fixture.emit("plant/x", "other", false);
    assert_eq!(client.next().await.message(), "plant/x=other");
}

#[tokio::test]
async fn the_retain_flag_is_kept_for_who_asks() {
    let fixture = Fixture::new();
    let mut plain = fixture.login(Version::V5, "a").await;
    plain.subscribe(&[("plant/#", Qos::AtMostOnce)]).await;
    let mut keeping = fixture.login(Version::V5, "b").await;
    let options = SubscribeOptions { retain_as_published: true, ..at(Qos::AtMostOnce) };
    keeping.subscribe_with(&[("plant/#", options)], &[]).await;
    fixture.emit("plant/x", "1", true);
    assert!(!retain(&plain.next().await));
    assert!(retain(&keeping.next().await));
    // As an answer to a subscription it is always set ([MQTT-3.3.1-8]).
    plain.unsubscribe("plant/#").await;
    plain.subscribe(&[("plant/x", Qos::AtMostOnce)]).await;
    assert!(retain(&plain.next().await));
}

#[tokio::test]
async fn retained_messages_come_when_they_are_asked_for() {
    let fixture = Fixture::new();
    fixture.emit("plant/x", "kept", true);
    let mut client = fixture.login(Version::V5, "a").await;
    let handling = |retain_handling| SubscribeOptions { retain_handling, ..at(Qos::AtMostOnce) };
    for (options, comes) in [
        (handling(RetainHandling::DoNotSend), false),
        (handling(RetainHandling::Send), true),
        (handling(RetainHandling::SendIfNew), false),
        (handling(RetainHandling::Send), true),
    ] {
        client.subscribe_with(&[("plant/+", options)], &[]).await;
        if comes {
            assert_eq!(client.next().await.message(), "plant/x=kept");
        }
        client.quiet().await;
    }
    client.unsubscribe("plant/+").await;
    client.subscribe_with(&[("plant/+", handling(RetainHandling::SendIfNew))], &[]).await;
    assert_eq!(client.next().await.message(), "plant/x=kept");
    // Never for a shared subscription.
    client.subscribe(&[("$share/g/plant/#", Qos::AtMostOnce)]).await;
    client.quiet().await;
    // An empty payload takes it away ([MQTT-3.3.1-6]), and is a message like any other.
    client.publish_with("plant/x", "", Qos::AtMostOnce, 0, true, &[]).await;
    assert_eq!(client.next().await.message(), "plant/x=");
    assert_eq!(client.next().await.message(), "plant/x=");
    client.subscribe(&[("plant/x", Qos::AtMostOnce)]).await;
    client.quiet().await;
}

#[tokio::test]
async fn a_message_carries_its_properties_to_mqtt_5_alone() {
    let fixture = Fixture::new();
    let mut five = fixture.login(Version::V5, "a").await;
    five.subscribe(&[("plant/#", Qos::AtMostOnce)]).await;
    let mut old = fixture.login(Version::V311, "b").await;
    old.subscribe(&[("plant/#", Qos::AtMostOnce)]).await;
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let sent = [
        Property::PayloadIsUtf8(true),
        Property::MessageExpiry(100),
        Property::ContentType("text/plain"),
        Property::ResponseTopic("plant/answer"),
        Property::Correlation(&[1, 2, 3]),
        Property::User("k", "1"),
        Property::User("traceparent", traceparent),
        Property::User("k", "2"),
    ];
    let mut writer = fixture.login(Version::V5, "op").await;
    writer.publish_with("plant/x", "text", Qos::AtMostOnce, 0, false, &sent).await;
    let said = five.next().await;
    let mut got = properties(&said).to_vec();
    let mut expected: Vec<String> = sent.iter().map(|p| format!("{p:?}")).collect();
    got.sort();
    expected.sort();
    assert_eq!(got, expected);
    // The order of the user's own properties stands ([MQTT-3.3.2-18]).
    let own: Vec<&String> = properties(&said).iter().filter(|p| p.contains("\"k\"")).collect();
    assert_eq!(own, ["User(\"k\", \"1\")", "User(\"k\", \"2\")"]);
    assert_eq!(old.next().await.message(), "plant/x=text");
}

#[tokio::test]
async fn a_payload_that_is_not_the_text_it_claims_to_be_ends_the_connection() {
    let fixture = Fixture::new();
    let mut client = fixture.login(Version::V5, "a").await;
    let list: tidegate_mqtt::PropertiesBuf = [Property::PayloadIsUtf8(true)].into_iter().collect();
    let publish = tidegate_mqtt::Publish {
        dup: false,
        qos: Qos::AtMostOnce,
        retain: false,
        topic: "plant/x",
        packet_id: None,
        properties: list.as_properties(),
        payload: &[0xff, 0xfe],
    };
    client.send(tidegate_mqtt::Packet::Publish(publish)).await;
    assert_eq!(client.next().await, Said::Disconnect(Reason::PayloadFormatInvalid));
    assert_eq!(client.next().await, Said::Closed);
}

#[tokio::test]
async fn a_message_that_waited_too_long_is_not_delivered() {
    let fixture = Fixture::new();
    let mut away = fixture.login_with("a", Property::SessionExpiry(600)).await;
    away.subscribe(&[("plant/#", Qos::AtLeastOnce)]).await;
    away.vanish().await;
    let mut writer = fixture.login(Version::V5, "b").await;
    for (payload, secs) in [("short", 1), ("long", 100)] {
        writer.publish_with("plant/x", payload, Qos::AtLeastOnce, 1, false, &[Property::MessageExpiry(secs)]).await;
        assert!(matches!(writer.next().await, Said::Puback(1, _)));
    }
    // By the wall clock, which a test cannot stop.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let mut back = fixture.dial(Version::V5);
    back.connect("a").password(&fixture.jwt("a", 600)).keep().property(Property::SessionExpiry(600)).send().await;
    assert!(back.accepted().await.0);
    let said = back.next().await;
    assert_eq!(said.message(), "plant/x=long");
    let left = properties(&said)[0].trim_start_matches("MessageExpiry(").trim_end_matches(')').parse::<u32>().unwrap();
    assert!((90..100).contains(&left), "{left}");
}

#[tokio::test]
async fn topics_have_aliases_both_ways() {
    let fixture = Fixture::new();
    let mut client = fixture.dial(Version::V5);
    client.connect("a").password(&fixture.jwt("a", 600)).property(Property::TopicAliasMaximum(1)).send().await;
    let (_, granted) = client.accepted().await;
    assert!(granted.contains(&"TopicAliasMaximum(16)".to_owned()), "{granted:?}");
    client.subscribe(&[("plant/#", Qos::AtMostOnce)]).await;
    client.publish_with("plant/long", "1", Qos::AtMostOnce, 0, false, &[Property::TopicAlias(3)]).await;
    client.publish_with("", "2", Qos::AtMostOnce, 0, false, &[Property::TopicAlias(3)]).await;
    let said = client.next().await;
    assert_eq!((said.message(), properties(&said)), ("plant/long=1".to_owned(), &["TopicAlias(1)".to_owned()][..]));
    let said = client.next().await;
    assert_eq!((said.message(), properties(&said)), ("=2".to_owned(), &["TopicAlias(1)".to_owned()][..]));
    // Only one alias was allowed: other topics go in full.
    fixture.emit("plant/other", "3", false);
    let said = client.next().await;
    assert_eq!((said.message(), properties(&said).len()), ("plant/other=3".to_owned(), 0));
    client.publish_with("plant/x", "4", Qos::AtMostOnce, 0, false, &[Property::TopicAlias(17)]).await;
    assert_eq!(client.next().await, Said::Disconnect(Reason::TopicAliasInvalid));
}

#[tokio::test]
async fn a_client_is_sent_no_packet_that_it_finds_too_large() {
    let fixture = Fixture::new();
    let mut client = fixture.login_with("a", Property::MaximumPacketSize(60)).await;
    client.subscribe(&[("plant/#", Qos::AtLeastOnce)]).await;
    fixture.emit("plant/x", "this payload makes a packet of more than sixty bytes, all in all", false);
    fixture.emit("plant/x", "small", false);
    let said = client.next().await;
    assert_eq!(said.message(), "plant/x=small");
    assert!(matches!(said, Said::Publish { id: Some(first), .. } if first == id(1)));
}

#[tokio::test]
async fn at_most_receive_maximum_messages_are_on_their_way() {
    let fixture = Fixture::new();
    let mut client = fixture.login_with("a", Property::ReceiveMaximum(2)).await;
    client.subscribe(&[("plant/#", Qos::AtLeastOnce)]).await;
    for payload in ["1", "2", "3"] {
        fixture.emit("plant/x", payload, false);
    }
    for payload in ["1", "2"] {
        assert_eq!(client.next().await.message(), format!("plant/x={payload}"));
    }
    client.quiet().await;
    client.puback(1).await;
    assert_eq!(client.next().await.message(), "plant/x=3");
}

#[tokio::test]
async fn operators_see_how_the_gateway_is_doing() {
    let fixture = Fixture::new();
    let mut operator = fixture.login(Version::V5, "op").await;
    assert_eq!(operator.subscribe(&[("$SYS/broker/clients/+", Qos::AtMostOnce)]).await, [Reason::Success]);
    let mut all = Vec::new();
    for _ in 0..6 {
        all.push(operator.next().await.message());
    }
    assert!(all.contains(&"$SYS/broker/clients/connected=1".to_owned()), "{all:?}");
    operator.quiet().await;
    fixture.gateway.tick(now() + Duration::from_secs(60));
    assert!(operator.next().await.message().starts_with("$SYS/broker/clients/"));
    // A filter that begins with a wildcard does not see them ([MQTT-4.7.2-1]).
    let mut other = fixture.login(Version::V5, "op2").await;
    assert_eq!(other.subscribe(&[("#", Qos::AtMostOnce)]).await, [Reason::Success]);
    fixture.gateway.tick(now() + Duration::from_secs(120));
    let mut seen = Vec::new();
    seen_until_quiet(&mut other, &mut seen).await;
    assert!(seen.iter().all(|topic| !topic.starts_with('$')), "{seen:?}");
}

/// Collects what is on its way.
async fn seen_until_quiet(client: &mut Client, seen: &mut Vec<String>) {
    client.send(tidegate_mqtt::Packet::Pingreq).await;
    loop {
        match client.next().await {
            Said::Pingresp => return,
            said => seen.push(said.message()),
        }
    }
}

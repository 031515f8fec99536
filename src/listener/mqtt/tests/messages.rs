//! Publishing and subscribing.

use tidegate_mqtt::{Packet, Qos, Reason};
use tokio::io::AsyncWriteExt;

use super::client::{Said, ack};
use super::*;

#[tokio::test]
async fn a_publish_reaches_a_subscriber_at_every_qos_and_version() {
    for version in VERSIONS {
        let fixture = Fixture::new();
        let mut reader = fixture.login(version, "op").await;
        assert_eq!(reader.subscribe(&[("dev/+/telemetry/#", Qos::AtLeastOnce)]).await, [Reason::GrantedQos1]);
        let mut writer = fixture.login(version, "a").await;
        writer.publish("telemetry/temp", "0", Qos::AtMostOnce, 0).await;
        writer.publish("t/temp", "1", Qos::AtLeastOnce, 7).await;
        writer.publish("dev/a/telemetry/temp", "2", Qos::ExactlyOnce, 8).await;
        assert_eq!(writer.next().await, Said::Puback(7, Reason::Success));
        assert_eq!(writer.next().await, Said::Pubrec(8, Reason::Success));
        writer.send(Packet::Pubrel(ack(8))).await;
        assert_eq!(writer.next().await, Said::Pubcomp(8, Reason::Success));
        for (number, qos) in [(0, Qos::AtMostOnce), (1, Qos::AtLeastOnce), (2, Qos::AtLeastOnce)] {
            let Said::Publish { topic, payload, qos: got, .. } = reader.next().await else { panic!("no message") };
            assert_eq!((topic.as_str(), payload, got), ("dev/a/telemetry/temp", number.to_string(), qos));
        }
        reader.puback(1).await;
        reader.puback(2).await;
        reader.quiet().await;
    }
}

#[tokio::test]
async fn a_message_nobody_hears_is_acknowledged_as_such() {
    let fixture = Fixture::new();
    let mut five = fixture.login(Version::V5, "a").await;
    five.publish("plant/x", "1", Qos::AtLeastOnce, 1).await;
    assert_eq!(five.next().await, Said::Puback(1, Reason::NoMatchingSubscribers));
    let mut old = fixture.login(Version::V311, "b").await;
    old.publish("plant/x", "1", Qos::AtLeastOnce, 1).await;
    assert_eq!(old.next().await, Said::Puback(1, Reason::Success));
}

#[tokio::test]
async fn a_message_for_the_disk_is_acknowledged_in_order_after_its_commit() {
    for version in VERSIONS {
        let fixture = Fixture::with(|_| {}, |_| {}, &["plant/stored/#"]);
        let mut client = fixture.login(version, "a").await;
        let mut bytes = Vec::new();
        for packet in 1..=20_u16 {
            // Every other message needs no disk and could be acknowledged at once: it waits for its turn.
            let topic = if packet % 2 == 0 { "plant/other" } else { "plant/stored/x" };
            bytes.extend(client.bytes(Packet::Publish(tidegate_mqtt::Publish {
                dup: false,
                qos: Qos::AtLeastOnce,
                retain: false,
                topic,
                packet_id: Some(client::id(packet)),
                properties: tidegate_mqtt::Properties::EMPTY,
                payload: b"x",
            })));
        }
        client.io.write_all(&bytes).await.unwrap();
        for packet in 1..=20_u16 {
            let Said::Puback(got, reason) = client.next().await else { panic!("no PUBACK") };
            assert_eq!(got, packet);
            assert!(!reason.is_error());
        }
    }
}

#[tokio::test]
async fn a_refused_publish_is_answered_with_its_reason() {
    let fixture = Fixture::new();
    let mut client = fixture.login(Version::V5, "a").await;
    for (topic, payload, reason) in [
        ("dev/b/telemetry", "x", Reason::NotAuthorized),
        ("plant/forbidden", "x", Reason::NotAuthorized),
        ("small/x", "12345", Reason::QuotaExceeded),
        ("c/res/7", "x", Reason::TopicNameInvalid),
        ("$SYS/x", "x", Reason::NotAuthorized),
    ] {
        client.publish(topic, payload, Qos::AtLeastOnce, 3).await;
        assert_eq!(client.next().await, Said::Puback(3, reason), "{topic}");
    }
    client.publish("slow/x", "1", Qos::AtLeastOnce, 3).await;
    assert_eq!(client.next().await, Said::Puback(3, Reason::NoMatchingSubscribers));
    client.publish("slow/x", "2", Qos::ExactlyOnce, 3).await;
    assert_eq!(client.next().await, Said::Pubrec(3, Reason::QuotaExceeded));
    // At QoS 0 nobody is told, and the connection goes on.
    client.publish("plant/forbidden", "x", Qos::AtMostOnce, 0).await;
    client.quiet().await;
}

#[tokio::test]
async fn a_311_client_is_closed_for_what_it_may_not_do() {
    for (topic, payload) in [("dev/b/telemetry", "x"), ("small/x", "12345"), ("c/res/7", "x")] {
        let fixture = Fixture::new();
        let mut client = fixture.login(Version::V311, "a").await;
        client.publish(topic, payload, Qos::AtLeastOnce, 3).await;
        assert_eq!(client.next().await, Said::Closed, "{topic}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_311_client_that_is_too_fast_waits_and_loses_nothing() {
    let fixture = Fixture::new();
    let mut client = fixture.login(Version::V311, "a").await;
    let began = tokio::time::Instant::now();
    for packet in 1..=4 {
        client.publish("slow/x", "1", Qos::AtLeastOnce, packet).await;
    }
    client.send(Packet::Pingreq).await;
    for packet in 1..=4 {
        assert_eq!(client.next().await, Said::Puback(packet, Reason::Success));
    }
    assert_eq!(client.next().await, Said::Pingresp);
    assert!(began.elapsed() >= std::time::Duration::from_secs(2), "four messages at one a second");
}

#[tokio::test]
async fn subscriptions_are_granted_refused_and_ended_one_by_one() {
    for (version, denied) in [(Version::V311, Reason::UnspecifiedError), (Version::V5, Reason::NotAuthorized)] {
        let fixture = Fixture::new();
        let mut client = fixture.login(version, "a").await;
        let wanted =
            [("dev/a/telemetry/#", Qos::ExactlyOnce), ("dev/b/#", Qos::AtMostOnce), ("plant/+", Qos::AtMostOnce)];
        assert_eq!(client.subscribe(&wanted).await, [Reason::GrantedQos2, denied, Reason::Success]);
        fixture.emit("plant/x", "heard", false);
        assert_eq!(client.next().await.message(), "plant/x=heard");
        let ended = client.unsubscribe("plant/+").await;
        let again = client.unsubscribe("plant/+").await;
        if version == Version::V5 {
            assert_eq!((ended, again), (vec![Reason::Success], vec![Reason::NoSubscriptionExisted]));
        }
        fixture.emit("plant/x", "not heard", false);
        client.quiet().await;
    }
}

#[tokio::test]
async fn commands_come_by_the_short_name_they_were_subscribed_with() {
    for version in VERSIONS {
        let fixture = Fixture::new();
        let mut device = fixture.login(version, "a").await;
        device.subscribe(&[("c/#", Qos::AtLeastOnce)]).await;
        let mut operator = fixture.login(version, "op").await;
        operator.subscribe(&[("dev/+/cmd-res/#", Qos::AtLeastOnce)]).await;
        operator.publish("dev/a/cmd/17/reboot", "now", Qos::AtLeastOnce, 1).await;
        assert_eq!(device.next().await.message(), "c/17/reboot=now");
        device.publish("c/res/17/200", "done", Qos::AtLeastOnce, 1).await;
        assert_eq!(operator.next().await, Said::Puback(1, Reason::Success));
        assert_eq!(operator.next().await.message(), "dev/a/cmd-res/17/200=done");
    }
}

#[tokio::test]
async fn a_large_message_crosses_in_pieces() {
    let fixture = Fixture::new();
    let mut client = fixture.login(Version::V5, "a").await;
    client.subscribe(&[("plant/big", Qos::AtMostOnce)]).await;
    let payload = "z".repeat(200_000);
    client.publish("plant/big", &payload, Qos::AtMostOnce, 0).await;
    assert_eq!(client.next().await.message().len(), "plant/big=".len() + payload.len());
    client.quiet().await;
}

#[tokio::test]
async fn a_packet_over_the_limit_is_told_so() {
    let fixture = Fixture::with(|limits| limits.packet_bytes_max = 1000, |_| {}, &[]);
    let mut client = fixture.login(Version::V5, "a").await;
    client.publish("plant/x", &"z".repeat(1000), Qos::AtMostOnce, 0).await;
    assert_eq!(client.next().await, Said::Disconnect(Reason::PacketTooLarge));
    assert_eq!(client.next().await, Said::Closed);
    let mut old = fixture.login(Version::V311, "b").await;
    old.publish("plant/x", &"z".repeat(1000), Qos::AtMostOnce, 0).await;
    assert_eq!(old.next().await, Said::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_does_not_acknowledge_is_disconnected_and_its_publishers_are_answered() {
    let small = |limits: &mut Limits| {
        limits.in_flight_max = 2;
        limits.outbox_messages_max = 4;
    };
    let fixture = Fixture::with(small, |_| {}, &[]);
    let mut reader = fixture.login(Version::V5, "op").await;
    reader.subscribe(&[("plant/#", Qos::AtLeastOnce)]).await;
    let mut writer = fixture.login(Version::V5, "a").await;
    let mut waiting = false;
    for packet in 1..=12 {
        writer.publish("plant/x", "1", Qos::AtLeastOnce, packet).await;
        // Acknowledged at once as long as the reader has room; then withheld.
        match tokio::time::timeout(std::time::Duration::from_secs(5), writer.next()).await {
            Ok(said) => assert_eq!(said, Said::Puback(packet, Reason::Success)),
            Err(_) => {
                assert_eq!(writer.next().await, Said::Puback(packet, Reason::Success));
                waiting = true;
                break;
            }
        }
    }
    assert!(waiting, "the writer was never slowed down");
    for _ in 0..2 {
        assert_eq!(reader.next().await.message(), "plant/x=1");
    }
    assert_eq!(reader.next().await, Said::Disconnect(Reason::QuotaExceeded));
    assert_eq!(reader.next().await, Said::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_read_is_closed_and_costs_a_bounded_buffer() {
    let fixture = Fixture::new();
    let mut reader = fixture.dial_tls(Version::V5, None, 4096);
    reader.connect("op").password(&fixture.jwt("op", 600)).keep_alive(0).send().await;
    reader.accepted().await;
    reader.subscribe(&[("plant/#", Qos::AtMostOnce)]).await;
    for _ in 0..2000 {
        fixture.emit("plant/x", "a payload that fills the pipe and then the outbox", false);
    }
    let began = tokio::time::Instant::now();
    // Not one byte is read until the gateway has given up.
    reader.served.await.unwrap();
    assert!(began.elapsed() >= std::time::Duration::from_secs(19));
    assert_eq!(fixture.gateway.sessions.live().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_subscriber_that_reads_misses_nothing_of_a_publisher_that_is_faster() {
    let fixture = Fixture::with(|limits| limits.outbox_messages_max = 8, |_| {}, &[]);
    let mut reader = fixture.login(Version::V5, "op").await;
    reader.subscribe(&[("plant/#", Qos::AtMostOnce)]).await;
    let mut writer = fixture.login(Version::V5, "a").await;
    for n in 0..150 {
        writer.publish("plant/x", &n.to_string(), Qos::AtMostOnce, 0).await;
    }
    for n in 0..150 {
        assert_eq!(reader.next().await.message(), format!("plant/x={n}"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_subscriber_that_does_not_read_holds_its_publisher_up_once() {
    let fixture = Fixture::with(|limits| limits.outbox_messages_max = 8, |_| {}, &[]);
    let mut reader = fixture.dial_tls(Version::V5, None, 256);
    reader.connect("op").password(&fixture.jwt("op", 600)).keep_alive(0).send().await;
    reader.accepted().await;
    reader.subscribe(&[("plant/#", Qos::AtMostOnce)]).await;
    let mut writer = fixture.login(Version::V5, "a").await;
    let began = tokio::time::Instant::now();
    for _ in 0..150 {
        writer.publish("plant/x", &"z".repeat(1000), Qos::AtMostOnce, 0).await;
    }
    writer.publish("plant/x", "the last", Qos::AtLeastOnce, 7).await;
    assert_eq!(writer.next().await, Said::Puback(7, Reason::Success));
    let took = began.elapsed();
    assert!(took >= std::time::Duration::from_millis(100), "it never waited");
    assert!(took < std::time::Duration::from_millis(200), "{took:?}");
}

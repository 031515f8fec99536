//! How sessions begin, end, and go on.

use std::time::Duration;

use tidegate_mqtt::{Packet, Property, Qos, Reason};

use super::client::{Client, Said, ack};
use super::*;

/// A client that comes back to its session.
async fn come_back(fixture: &Fixture, version: Version, id: &str) -> (bool, Client) {
    let mut client = fixture.dial(version);
    let jwt = fixture.jwt(id, 600);
    client.connect(id).password(&jwt).keep().property(Property::SessionExpiry(600)).send().await;
    let (present, _) = client.accepted().await;
    (present, client)
}

#[tokio::test]
async fn a_session_that_is_kept_brings_what_was_missed() {
    for version in VERSIONS {
        let fixture = Fixture::new();
        let (present, mut client) = come_back(&fixture, version, "a").await;
        assert!(!present);
        client.subscribe(&[("plant/#", Qos::AtLeastOnce)]).await;
        client.vanish().await;
        for payload in ["1", "2", "3"] {
            fixture.emit("plant/x", payload, false);
        }
        let (present, mut client) = come_back(&fixture, version, "a").await;
        assert!(present);
        for payload in ["1", "2", "3"] {
            assert_eq!(client.next().await.message(), format!("plant/x={payload}"));
        }
        // The first was taken, the others are sent again under their identifiers.
        client.puback(1).await;
        client.quiet().await;
        client.vanish().await;
        let (_, mut client) = come_back(&fixture, version, "a").await;
        for (id, payload) in [(2, "2"), (3, "3")] {
            let Said::Publish { id: got, dup, payload: text, .. } = client.next().await else { panic!("no message") };
            assert_eq!((got, dup, text.as_str()), (Some(client::id(id)), true, payload));
        }
        // A clean start throws it all away.
        client.vanish().await;
        let mut clean = fixture.login(version, "a").await;
        fixture.emit("plant/x", "4", false);
        clean.quiet().await;
    }
}

#[tokio::test]
async fn a_qos_2_message_is_not_taken_twice_over_two_connections() {
    for version in VERSIONS {
        let fixture = Fixture::with(|_| {}, |_| {}, &["plant/#"]);
        let mut reader = fixture.login(version, "op").await;
        reader.subscribe(&[("plant/#", Qos::AtMostOnce)]).await;
        let (_, mut client) = come_back(&fixture, version, "a").await;
        client.publish("plant/x", "once", Qos::ExactlyOnce, 7).await;
        // Gone before the commit was answered.
        client.vanish().await;
        let (_, mut client) = come_back(&fixture, version, "a").await;
        client.publish("plant/x", "once", Qos::ExactlyOnce, 7).await;
        assert_eq!(client.next().await, Said::Pubrec(7, Reason::Success));
        client.send(Packet::Pubrel(ack(7))).await;
        assert_eq!(client.next().await, Said::Pubcomp(7, Reason::Success));
        assert_eq!(reader.next().await.message(), "plant/x=once");
        reader.quiet().await;
    }
}

#[tokio::test]
async fn the_same_client_again_takes_over() {
    for version in VERSIONS {
        let fixture = Fixture::new();
        let mut first = fixture.login(version, "a").await;
        let mut second = fixture.login(version, "a").await;
        if version == Version::V5 {
            assert_eq!(first.next().await, Said::Disconnect(Reason::SessionTakenOver));
        }
        assert_eq!(first.next().await, Said::Closed);
        second.quiet().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_client_is_closed_after_one_and_a_half_keep_alives() {
    for version in VERSIONS {
        let fixture = Fixture::new();
        let mut client = fixture.dial(version);
        client.connect("a").password(&fixture.jwt("a", 600)).keep_alive(10).send().await;
        client.accepted().await;
        tokio::time::sleep(Duration::from_secs(14)).await;
        client.quiet().await;
        let began = tokio::time::Instant::now();
        if version == Version::V5 {
            assert_eq!(client.next().await, Said::Disconnect(Reason::KeepAliveTimeout));
        }
        assert_eq!(client.next().await, Said::Closed);
        let lived = began.elapsed().as_secs();
        assert!((15..18).contains(&lived), "{lived}");
    }
}

#[tokio::test]
async fn a_will_speaks_for_who_vanishes_and_not_for_who_says_goodbye() {
    for version in VERSIONS {
        let fixture = Fixture::new();
        let mut reader = fixture.login(version, "op").await;
        reader.subscribe(&[("plant/#", Qos::AtMostOnce)]).await;
        for (goodbye, payload) in [(true, "unheard"), (false, "gone")] {
            let mut client = fixture.dial(version);
            let jwt = fixture.jwt("a", 600);
            client.connect("a").password(&jwt).will("plant/a", payload, Qos::AtLeastOnce, false, &[]).send().await;
            client.accepted().await;
            if goodbye {
                client.disconnect(Reason::Success, &[]).await;
            }
            client.vanish().await;
        }
        assert_eq!(reader.next().await.message(), "plant/a=gone");
        reader.quiet().await;
    }
}

#[tokio::test]
async fn a_drain_answers_first_and_says_why() {
    for version in VERSIONS {
        let fixture = Fixture::with(|_| {}, |_| {}, &["plant/#"]);
        let mut client = fixture.login(version, "a").await;
        client.publish("plant/x", "1", Qos::AtLeastOnce, 1).await;
        client.quiet_after_puback(1).await;
        fixture.gateway.drain();
        fixture.shutdown.cancel();
        if version == Version::V5 {
            assert_eq!(client.next().await, Said::Disconnect(Reason::ServerShuttingDown));
        }
        assert_eq!(client.next().await, Said::Closed);
        let mut late = fixture.dial(version);
        assert_eq!(late.next().await, Said::Closed);
    }
}

#[tokio::test]
async fn a_revoked_device_is_disconnected() {
    let fixture = Fixture::new();
    let mut client = fixture.login(Version::V5, "a").await;
    Registry::open(fixture.folder.path()).unwrap().set_enabled(&DeviceId::parse("a").unwrap(), false).unwrap();
    fixture.gateway.identity.refresh().unwrap();
    client.publish("plant/x", "1", Qos::AtLeastOnce, 1).await;
    assert_eq!(client.next().await, Said::Disconnect(Reason::NotAuthorized));
    assert_eq!(client.next().await, Said::Closed);
}

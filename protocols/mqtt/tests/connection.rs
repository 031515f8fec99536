//! One connection at a time: what it tells the application, what it tells the client, and what ends it.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use Version::{V5, V311};
use common::{Bench, Note, ack, bytes_of, connect, id, publish, publish_with, subscribe};
use tidegate_mqtt::{
    Accept, Auth, Cause, Close, Config, Connect, Connection, Disconnect, Error, Event, Handle, Packet, Properties,
    PropertiesBuf, Property, Published, Qos, Reason, SessionState, Stage, Version, Will,
};

fn handle(event: &Event<Note>) -> Handle {
    match event {
        Event::Publish(p) => p.handle.unwrap(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_connection_is_small() {
    let bytes = size_of::<Connection<std::sync::Arc<u8>>>();
    assert!(bytes <= 300, "{bytes}");
}

#[test]
fn a_plain_publish_arrives_whole_and_allocates_no_parts() {
    for version in [V311, V5] {
        let mut b = Bench::connected(version, Config::default(), &[]);
        let events = b.feed(&publish(version, "dev/a/t", Qos::AtMostOnce, 0, b"21.5"));
        let [Event::Publish(p)] = &events[..] else { panic!("{events:?}") };
        assert_eq!((p.topic(), p.payload(), p.handle, p.qos), ("dev/a/t", &b"21.5"[..], None, Qos::AtMostOnce));
        assert_eq!((p.topic_bytes(), &p.payload_shared()[..]), (&b"dev/a/t"[..], &b"21.5"[..]));
        assert!(b.out.is_empty());
    }
}

#[test]
fn the_connack_says_every_limit_that_differs_from_the_default() {
    let config = Config { retain_available: false, keep_alive_max_secs: 30, ..Config::default() };
    let mut b = Bench::new(config);
    b.version = V5;
    b.feed(&connect(V5, "", &[]));
    let accept = Accept { assigned_client_id: Some("auto-1"), session_expiry_secs: Some(9), ..Accept::default() };
    b.conn.accept(accept, &mut b.out);
    let mut seen = Vec::new();
    b.sent_packets(|p| {
        let Packet::Connack(c) = p else { panic!("{p:?}") };
        assert_eq!((c.reason, c.session_present), (Reason::Success, false));
        seen.extend(c.properties.iter().map(|p| format!("{p:?}")));
    });
    for expected in [
        "SessionExpiry(9)",
        "ReceiveMaximum(256)",
        "RetainAvailable(false)",
        "MaximumPacketSize(262144)",
        "AssignedClientId(\"auto-1\")",
        "TopicAliasMaximum(16)",
        "ServerKeepAlive(30)",
    ] {
        assert!(seen.iter().any(|s| s == expected), "{expected} is not in {seen:?}");
    }
    assert_eq!(b.deadline(), Some(b.now + Duration::from_secs(45)));
}

#[test]
fn acknowledgements_leave_in_the_order_of_the_publishes() {
    let mut b = Bench::connected(V5, Config::default(), &[]);
    let mut handles = Vec::new();
    for (n, qos) in [(7, Qos::AtLeastOnce), (8, Qos::ExactlyOnce), (9, Qos::AtLeastOnce)] {
        handles.push(handle(&b.feed(&publish(V5, "t", qos, n, b""))[0]));
    }
    b.conn.ack(handles[2], Reason::NoMatchingSubscribers, None, &mut b.out);
    b.conn.ack(handles[1], Reason::Success, None, &mut b.out);
    assert!(b.out.is_empty(), "the first one is not decided");
    b.conn.ack(handles[0], Reason::QuotaExceeded, Some("spool is full"), &mut b.out);
    assert_eq!(b.sent(), b"\x40\x14\0\x07\x97\x10\x1f\0\x0dspool is full\x50\x02\0\x08\x40\x03\0\x09\x10");
    // Twice, or unknown: nothing happens.
    b.conn.ack(handles[1], Reason::Success, None, &mut b.out);
    b.conn.ack(Handle::from_token(1 << 40), Reason::Success, None, &mut b.out);
    assert!(b.out.is_empty());
    assert_eq!(b.conn.waiting(), 0);
}

#[test]
fn a_client_without_problem_information_gets_no_reason_string() {
    let mut b = Bench::connected(V5, Config::default(), &[Property::RequestProblemInfo(false)]);
    let events = b.feed(&publish(V5, "t", Qos::AtLeastOnce, 1, b""));
    b.conn.ack(handle(&events[0]), Reason::NotAuthorized, Some("rule"), &mut b.out);
    assert_eq!(b.sent(), b"\x40\x03\0\x01\x87");
}

#[test]
fn a_repeated_qos_2_publish_is_delivered_once() {
    for version in [V311, V5] {
        let mut b = Bench::connected(version, Config::default(), &[]);
        let first = publish(version, "t", Qos::ExactlyOnce, 5, b"x");
        let again = publish_with(version, "t", Qos::ExactlyOnce, 5, b"x", &[], true);
        let events = b.feed(&first);
        assert!(b.feed(&again).is_empty(), "still undecided");
        assert!(b.out.is_empty());
        b.conn.ack(handle(&events[0]), Reason::Success, None, &mut b.out);
        assert_eq!(b.sent(), [0x50, 2, 0, 5]);
        assert!(b.feed(&again).is_empty(), "accepted and not released");
        assert_eq!(b.sent(), [0x50, 2, 0, 5]);
        b.feed(&ack(Packet::Pubrel, 5));
        assert_eq!(b.sent(), [0x70, 2, 0, 5]);
        assert_eq!(b.feed(&first).len(), 1, "released: a new message");
        // PUBREL for nothing.
        b.feed(&ack(Packet::Pubrel, 6));
        let expected: &[u8] = if version == V5 { &[0x70, 3, 0, 6, 0x92] } else { &[0x70, 2, 0, 6] };
        assert_eq!(b.sent(), expected);
    }
}

#[test]
fn a_refused_qos_2_publish_frees_its_identifier_in_5_only() {
    for (version, events_again) in [(V5, 1), (V311, 0)] {
        let mut b = Bench::connected(version, Config::default(), &[]);
        let bytes = publish(version, "t", Qos::ExactlyOnce, 5, b"x");
        let events = b.feed(&bytes);
        b.conn.ack(handle(&events[0]), Reason::QuotaExceeded, None, &mut b.out);
        assert_eq!(b.feed(&bytes).len(), events_again);
    }
}

#[test]
fn a_5_client_over_the_receive_maximum_is_closed_and_a_311_client_is_paused() {
    let config = Config { receive_maximum: 2, ..Config::default() };
    let mut b = Bench::connected(V5, config.clone(), &[]);
    b.feed(&publish(V5, "t", Qos::AtLeastOnce, 1, b""));
    b.feed(&publish(V5, "t", Qos::ExactlyOnce, 2, b""));
    let close = b.feed_to_close(&publish(V5, "t", Qos::AtLeastOnce, 3, b""));
    assert_eq!(
        close,
        Close { cause: Cause::Error(Error::ReceiveMaximum { max: 2 }), will: true, session_expiry_secs: None }
    );
    assert_eq!(b.sent(), [0xE0, 2, 0x93, 0]);

    let mut b = Bench::connected(V311, config, &[]);
    let mut bytes = Vec::new();
    for n in 1..=3 {
        bytes.extend(publish(V311, "t", Qos::AtLeastOnce, n, b""));
    }
    let events = b.feed(&bytes);
    assert_eq!(events.len(), 2);
    assert!(b.conn.paused());
    // A pause of our own making is not the client's silence.
    b.now += Duration::from_secs(600);
    b.conn.handle_timeout(b.now, &mut b.out);
    assert!(!b.conn.is_closed());
    b.conn.ack(handle(&events[0]), Reason::Success, None, &mut b.out);
    assert!(!b.conn.paused());
    assert_eq!(b.feed(b"").len(), 1);
}

#[test]
fn topic_aliases_are_kept_per_connection_and_bounded() {
    let mut b = Bench::connected(V5, Config { topic_alias_maximum: 2, ..Config::default() }, &[]);
    let alias = |topic, n| publish_with(V5, topic, Qos::AtMostOnce, 0, b"", &[Property::TopicAlias(n)], false);
    for (topic, expected) in [("a/b", "a/b"), ("", "a/b"), ("c", "c"), ("", "c")] {
        let events = b.feed(&alias(topic, 2));
        let [Event::Publish(p)] = &events[..] else { panic!() };
        assert_eq!(p.topic(), expected);
    }
    assert_eq!(b.feed_to_close(&alias("", 1)).cause, Cause::Error(Error::TopicAlias));
    assert_eq!(b.sent(), [0xE0, 2, 0x94, 0]);
    let mut b = Bench::connected(V5, Config { topic_alias_maximum: 2, ..Config::default() }, &[]);
    assert_eq!(b.feed_to_close(&alias("a", 3)).cause, Cause::Error(Error::TopicAlias));
}

#[test]
fn outgoing_topics_are_aliased_only_for_a_client_that_allows_it() {
    let note = Note::new("a/long/topic", b"x");
    let mut b = Bench::connected(V5, Config::default(), &[Property::TopicAliasMaximum(1)]);
    for _ in 0..2 {
        assert_eq!(b.conn.publish(b.now, &note, Qos::AtMostOnce, false, &mut b.out), Published::Sent);
    }
    b.conn.publish(b.now, &Note::new("another", b"y"), Qos::AtMostOnce, false, &mut b.out);
    let mut seen = Vec::new();
    b.sent_packets(|p| {
        let Packet::Publish(p) = p else { panic!() };
        seen.push((p.topic.to_owned(), p.properties.iter().count()));
    });
    assert_eq!(seen, [("a/long/topic".to_owned(), 1), (String::new(), 1), ("another".to_owned(), 0)]);
}

#[test]
fn the_window_is_the_smaller_of_both_limits_and_opens_with_each_answer() {
    let mut b = Bench::connected(V5, Config::default(), &[Property::ReceiveMaximum(2)]);
    let note = Note::new("t", b"x");
    assert_eq!(b.conn.window(), 2);
    for qos in [Qos::AtLeastOnce, Qos::ExactlyOnce] {
        assert_eq!(b.conn.publish(b.now, &note, qos, false, &mut b.out), Published::Sent);
    }
    assert_eq!(b.sent(), b"\x32\x07\0\x01t\0\x01\0x\x34\x07\0\x01t\0\x02\0x");
    assert_eq!(b.conn.publish(b.now, &note, Qos::AtLeastOnce, false, &mut b.out), Published::WindowFull);
    assert_eq!(b.conn.publish(b.now, &note, Qos::AtMostOnce, false, &mut b.out), Published::Sent);
    b.out.clear();
    let events = b.feed(&ack(Packet::Puback, 1));
    assert!(matches!(&events[..], [Event::Delivered { message, reason: Reason::Success }] if *message == note));
    let events = b.feed(&ack(Packet::Pubrec, 2));
    assert!(matches!(&events[..], [Event::Delivered { .. }]));
    assert_eq!(b.sent(), [0x62, 2, 0, 2]);
    assert_eq!(b.conn.window(), 1);
    assert!(b.feed(&ack(Packet::Pubrec, 2)).is_empty(), "PUBREL again, no second event");
    assert_eq!(b.sent(), [0x62, 2, 0, 2]);
    b.feed(&ack(Packet::Pubcomp, 2));
    assert_eq!(b.conn.window(), 2);
    // Answers to nothing.
    assert!(b.feed(&ack(Packet::Puback, 77)).is_empty());
    b.feed(&ack(Packet::Pubrec, 77));
    assert_eq!(b.sent(), [0x62, 3, 0, 77, 0x92]);
    assert!(!b.conn.is_closed());
}

#[test]
fn packet_identifiers_go_round_the_corner_and_skip_0() {
    let mut b = Bench::connected(V311, Config::default(), &[]);
    let note = Note::new("t", b"");
    for round in 0..65_537_u32 {
        b.conn.publish(b.now, &note, Qos::AtLeastOnce, false, &mut b.out);
        let sent = b.sent();
        let n = u16::from_be_bytes([sent[5], sent[6]]);
        assert_eq!(u32::from(n), round % 65_535 + 1);
        b.feed(&ack(Packet::Puback, n));
    }
}

#[test]
fn a_message_over_the_clients_maximum_is_not_sent() {
    let mut b = Bench::connected(V5, Config::default(), &[Property::MaximumPacketSize(20)]);
    let fits = Note::new("t", &[0; 14]);
    let too_large = Note::new("t", &[0; 15]);
    assert_eq!(b.conn.publish(b.now, &fits, Qos::AtMostOnce, false, &mut b.out), Published::Sent);
    assert_eq!(b.sent().len(), 20);
    for qos in [Qos::AtMostOnce, Qos::AtLeastOnce] {
        let mut out = bytes::BytesMut::new();
        assert_eq!(b.conn.publish(b.now, &too_large, qos, false, &mut out), Published::TooLarge);
        assert!(out.is_empty());
    }
    assert_eq!(b.conn.window(), 128, "what was not sent is not in flight");
}

#[test]
fn a_resumed_session_repeats_what_was_not_finished_in_order() {
    let mut b = Bench::connected(V311, Config::default(), &[]);
    for (n, qos) in [(1, Qos::AtLeastOnce), (2, Qos::ExactlyOnce), (3, Qos::ExactlyOnce), (4, Qos::AtLeastOnce)] {
        b.conn.publish(b.now, &Note::new("t", &[n]), qos, false, &mut b.out);
    }
    b.feed(&ack(Packet::Puback, 1));
    b.feed(&ack(Packet::Pubrec, 2));
    let events = b.feed(&publish(V311, "up", Qos::ExactlyOnce, 9, b""));
    b.conn.handle_eof();
    // The decision comes after the close and still counts.
    b.conn.ack(handle(&events[0]), Reason::Success, None, &mut b.out);
    assert_eq!(b.close().unwrap().cause, Cause::Eof);
    let session = b.conn.take_session();
    let stages: Vec<_> = session.in_flight().map(|(id, stage, _, m)| (id.get(), stage, m.is_some())).collect();
    assert_eq!(stages, [(2, Stage::Pubcomp, false), (3, Stage::Pubrec, true), (4, Stage::Puback, true)]);

    let mut b = Bench::new(Config::default());
    b.feed(&connect(V311, "c", &[]));
    b.conn.accept(Accept { session: Some(session), ..Accept::default() }, &mut b.out);
    b.deadline();
    assert_eq!(b.sent(), b"\x20\x02\x01\0\x62\x02\0\x02\x3c\x06\0\x01t\0\x03\x03\x3a\x06\0\x01t\0\x04\x04");
    // The client repeats what it has no answer for.
    assert!(b.feed(&publish_with(V311, "up", Qos::ExactlyOnce, 9, b"", &[], true)).is_empty());
    assert_eq!(b.sent(), [0x50, 2, 0, 9]);
    b.conn.publish(b.now, &Note::new("t", b""), Qos::AtLeastOnce, false, &mut b.out);
    assert_eq!(b.sent(), b"\x32\x05\0\x01t\0\x05", "identifiers go on where they were");
}

#[test]
fn redelivery_respects_a_smaller_window_and_packet_size() {
    let mut session = SessionState::new();
    for n in 1..=4 {
        let payload = vec![n; if n == 2 { 100 } else { 1 }];
        assert!(session.restore_in_flight(id(n.into()), Stage::Puback, false, Some(Note::new("t", &payload))));
    }
    assert!(!session.restore_in_flight(id(4), Stage::Puback, false, Some(Note::new("t", b""))), "there already");
    assert!(!session.restore_in_flight(id(9), Stage::Pubrec, false, None), "nothing to send");
    let mut b = Bench::new(Config::default());
    b.version = V5;
    b.feed(&connect(V5, "c", &[Property::ReceiveMaximum(2), Property::MaximumPacketSize(50)]));
    b.conn.accept(Accept { session: Some(session), ..Accept::default() }, &mut b.out);
    b.out.clear();
    let dropped = b.feed(b"");
    assert!(matches!(&dropped[..], [Event::Delivered { reason: Reason::PacketTooLarge, .. }]));
    let sent = |b: &mut Bench| {
        let mut ids = Vec::new();
        b.sent_packets(|p| {
            let Packet::Publish(p) = p else { panic!() };
            assert!(p.dup);
            ids.push(p.packet_id.unwrap().get());
        });
        ids
    };
    assert_eq!(sent(&mut b), [1, 3]);
    assert_eq!(b.conn.window(), 0);
    b.feed(&ack(Packet::Puback, 1));
    assert_eq!(sent(&mut b), [4]);
    b.feed(&ack(Packet::Puback, 3));
    assert_eq!(b.conn.window(), 1);
}

#[test]
fn subscribe_and_unsubscribe_wait_for_the_application() {
    let mut b = Bench::connected(V5, Config::default(), &[]);
    let events = b.feed(&subscribe(V5, 3, &["a/+", "$share/g/b/#"]));
    let [Event::Subscribe(s)] = &events[..] else { panic!() };
    let filters: Vec<_> = s.subscriptions.iter().map(|s| &*s.filter).collect();
    assert_eq!((s.packet_id, filters), (id(3), vec!["a/+", "$share/g/b/#"]));
    assert!(b.out.is_empty());
    b.conn.suback(id(3), &[Reason::GrantedQos1, Reason::NotAuthorized], None, &mut b.out);
    assert_eq!(b.sent(), [0x90, 5, 0, 3, 0, 1, 0x87]);
    let events = b.feed(b"\xa2\x08\0\x04\0\0\x03a/+");
    let [Event::Unsubscribe(u)] = &events[..] else { panic!() };
    assert_eq!(&*u.filters[0], "a/+");
    b.conn.unsuback(u.packet_id, &[Reason::Success], None, &mut b.out);
    assert_eq!(b.sent(), [0xB0, 4, 0, 4, 0, 0]);
}

#[test]
fn silence_ends_the_connection_after_one_and_a_half_keep_alives() {
    let mut b = Bench::connected(V5, Config::default(), &[]);
    let deadline = b.deadline().unwrap();
    assert_eq!(deadline, b.now + Duration::from_secs(90));
    b.now += Duration::from_secs(89);
    b.feed(&[0xC0, 0]);
    assert_eq!(b.sent(), [0xD0, 0]);
    b.conn.handle_timeout(deadline, &mut b.out);
    assert!(!b.conn.is_closed(), "the ping moved it");
    b.now = b.deadline().unwrap();
    b.conn.handle_timeout(b.now, &mut b.out);
    assert_eq!(b.sent(), [0xE0, 2, 0x8D, 0]);
    assert_eq!(b.close().unwrap(), Close { cause: Cause::KeepAliveTimeout, will: true, session_expiry_secs: None });
    assert_eq!(b.deadline(), None, "said once");
}

#[test]
fn a_stranger_that_does_not_finish_connecting_is_closed_silently() {
    let mut b = Bench::new(Config::default());
    b.feed(&connect(V5, "c", &[])[..5]);
    b.now = b.deadline().unwrap();
    b.conn.handle_timeout(b.now, &mut b.out);
    assert_eq!(b.close().unwrap(), Close { cause: Cause::ConnectTimeout, will: false, session_expiry_secs: None });
    assert!(b.out.is_empty());
}

#[test]
fn the_first_packet_is_connect_and_there_is_no_second() {
    let mut b = Bench::new(Config::default());
    assert!(matches!(b.feed_to_close(&[0xC0]).cause, Cause::Error(Error::Protocol(_))));
    assert!(b.out.is_empty());

    let mut b = Bench::connected(V5, Config::default(), &[]);
    assert_eq!(b.feed_to_close(&connect(V5, "c", &[])).cause, Cause::Error(Error::Protocol("second CONNECT")));
    assert_eq!(b.sent(), [0xE0, 2, 0x82, 0]);

    let mut b = Bench::connected(V311, Config::default(), &[]);
    b.feed_to_close(&connect(V311, "c", &[]));
    assert!(b.out.is_empty(), "3.1.1 has no DISCONNECT from the server");
}

#[test]
fn a_bad_connect_is_answered_in_the_clients_own_version() {
    for (bytes, expected) in [
        (&b"\x10\x0c\0\x04MQTT\x06\x02\0\0\0\0"[..], &[0x20, 3, 0, 0x84, 0][..]),
        (b"\x10\x0e\0\x06MQIsdp\x03\x02\0\0\0\0", &[0x20, 2, 0, 1]),
        (b"\x10\x0c\0\x04MQTT\x04\x00\0\0\0\0", &[0x20, 2, 0, 2]),
        (b"\x10\x0d\0\x04MQTT\x05\x03\0\0\0\0\0", &[0x20, 3, 0, 0x81, 0]),
        (b"\x10\x10\0\x04MQTT\x05\x02\0\0\x03\x21\0\0\0\0", &[0x20, 3, 0, 0x82, 0]),
        (b"\x10\x0d\0\x04MQTT\x04\x03\0\0\0\0\0", &[]),
        (b"\x10\x05\0\x03abc", &[]),
    ] {
        let mut b = Bench::new(Config::default());
        let close = b.feed_to_close(bytes);
        assert!(matches!(close, Close { cause: Cause::Error(_), will: false, .. }));
        assert_eq!(b.sent(), expected, "{bytes:?}");
    }
}

#[test]
fn a_refusal_is_a_connack_and_no_will() {
    for (version, expected) in [(V311, &[0x20, 2, 0, 5][..]), (V5, &[0x20, 3, 0, 0x87, 0])] {
        let mut b = Bench::new(Config::default());
        b.feed(&connect(version, "c", &[]));
        assert!(b.conn.paused());
        assert!(b.feed(&[0xC0, 0]).is_empty(), "nothing is read before the decision");
        b.conn.refuse(Reason::NotAuthorized, None, &mut b.out);
        assert_eq!(b.sent(), expected);
        let close = b.close().unwrap();
        assert_eq!((close.cause, close.will), (Cause::Refused(Reason::NotAuthorized), false));
        b.conn.accept(Accept::default(), &mut b.out);
        assert!(b.out.is_empty(), "too late");
    }
}

fn auth_packet(reason: Reason, method: &str, data: &[u8]) -> Vec<u8> {
    let list: PropertiesBuf = [Property::AuthMethod(method), Property::AuthData(data)].into_iter().collect();
    bytes_of(V5, Packet::Auth(Auth { reason, properties: list.as_properties() }))
}

fn sent_auth(b: &mut Bench) -> (Reason, Vec<u8>) {
    let mut seen = None;
    b.sent_packets(|p| {
        let (reason, properties) = match p {
            Packet::Auth(a) => (a.reason, a.properties),
            Packet::Connack(c) => (c.reason, c.properties),
            other => panic!("{other:?}"),
        };
        let data = properties.iter().find_map(|p| if let Property::AuthData(d) = p { Some(d.to_vec()) } else { None });
        seen = Some((reason, data.unwrap_or_default()));
    });
    seen.unwrap()
}

#[test]
fn enhanced_authentication_and_its_repetition_run_as_section_4_12_says() {
    let mut b = Bench::new(Config::default());
    b.version = V5;
    let events = b.feed(&connect(V5, "c", &[Property::AuthMethod("M"), Property::AuthData(b"1")]));
    let [Event::Connect(c)] = &events[..] else { panic!() };
    let (method, data) = c.auth.as_ref().unwrap();
    assert_eq!((&**method, data.expose()), ("M", &b"1"[..]));
    b.conn.challenge(b"2", &mut b.out);
    assert_eq!(sent_auth(&mut b), (Reason::ContinueAuthentication, b"2".to_vec()));
    let events = b.feed(&auth_packet(Reason::ContinueAuthentication, "M", b"3"));
    assert!(matches!(&events[..], [Event::Auth { data }] if data.expose() == b"3"));
    b.conn.accept(Accept { auth_data: Some(b"4"), ..Accept::default() }, &mut b.out);
    assert_eq!(sent_auth(&mut b), (Reason::Success, b"4".to_vec()));

    // Again, while other packets flow.
    let events = b.feed(&auth_packet(Reason::ReAuthenticate, "M", b"5"));
    assert!(matches!(&events[..], [Event::Reauthenticate { data }] if data.expose() == b"5"));
    b.conn.challenge(b"6", &mut b.out);
    assert_eq!(sent_auth(&mut b).0, Reason::ContinueAuthentication);
    assert_eq!(b.feed(&publish(V5, "t", Qos::AtMostOnce, 0, b"")).len(), 1);
    assert_eq!(b.deadline(), Some(b.now + Duration::from_secs(10)));
    assert_eq!(b.feed(&auth_packet(Reason::ContinueAuthentication, "M", b"7")).len(), 1);
    b.conn.auth_success(b"8", &mut b.out);
    assert_eq!(sent_auth(&mut b), (Reason::Success, b"8".to_vec()));
    assert_eq!(b.deadline(), Some(b.now + Duration::from_secs(90)));

    let close = b.feed_to_close(&auth_packet(Reason::ReAuthenticate, "other", b""));
    assert!(matches!(close.cause, Cause::Error(Error::Protocol(_))));
}

#[test]
fn nothing_but_auth_is_taken_between_challenge_and_answer() {
    let start = || {
        let mut b = Bench::new(Config::default());
        b.feed(&connect(V5, "c", &[Property::AuthMethod("M")]));
        b.conn.challenge(b"2", &mut b.out);
        b.out.clear();
        b
    };
    let mut b = start();
    let close = b.feed_to_close(&publish(V5, "t", Qos::AtMostOnce, 0, b""));
    assert_eq!((close.will, b.sent()), (false, vec![0x20, 3, 0, 0x82, 0]));
    let mut b = start();
    b.feed_to_close(&auth_packet(Reason::ReAuthenticate, "M", b""));
    // Without a method in CONNECT there is no AUTH at all.
    let mut b = Bench::connected(V5, Config::default(), &[]);
    b.feed_to_close(&auth_packet(Reason::ReAuthenticate, "M", b""));
    assert_eq!(b.sent(), [0xE0, 2, 0x82, 0]);
    // An unfinished re-authentication ends at its deadline.
    let mut b = start();
    b.feed(&auth_packet(Reason::ContinueAuthentication, "M", b""));
    b.conn.accept(Accept::default(), &mut b.out);
    b.feed(&auth_packet(Reason::ReAuthenticate, "M", b""));
    b.out.clear();
    b.now += Duration::from_secs(10);
    b.conn.handle_timeout(b.now, &mut b.out);
    assert_eq!(b.sent(), [0xE0, 2, 0x87, 0]);
    assert_eq!(b.close().unwrap().cause, Cause::ConnectTimeout);
}

#[test]
fn a_will_is_due_unless_the_client_said_a_plain_goodbye() {
    let properties: PropertiesBuf = [Property::WillDelay(5), Property::ContentType("text/plain")].into_iter().collect();
    let will = Will {
        qos: Qos::AtLeastOnce,
        retain: true,
        properties: properties.as_properties(),
        topic: "gone",
        payload: b"bye",
    };
    let bytes = bytes_of(
        V5,
        Packet::Connect(Connect {
            version: V5,
            clean_start: true,
            keep_alive: 0,
            properties: Properties::EMPTY,
            client_id: "c",
            will: Some(will),
            username: Some("u"),
            password: Some(b"secret"),
        }),
    );
    let start = || {
        let mut b = Bench::new(Config::default());
        let events = b.feed(&bytes);
        let [Event::Connect(c)] = &events[..] else { panic!() };
        assert!(!format!("{c:?}").contains("secret"));
        let will = c.will.clone().unwrap();
        assert_eq!((&*will.topic, &will.payload[..], will.delay_secs, will.retain), ("gone", &b"bye"[..], 5, true));
        b.conn.accept(Accept::default(), &mut b.out);
        b
    };
    let bye = |reason| bytes_of(V5, Packet::Disconnect(Disconnect { reason, properties: Properties::EMPTY }));
    assert!(!start().feed_to_close(&bye(Reason::Success)).will);
    assert!(start().feed_to_close(&bye(Reason::DisconnectWithWill)).will);
    let mut b = start();
    b.conn.handle_eof();
    assert!(b.close().unwrap().will);
    let mut b = start();
    b.conn.disconnect(Reason::SessionTakenOver, None, &mut b.out);
    assert!(b.close().unwrap().will);
}

#[test]
fn a_goodbye_cannot_make_a_session_last_that_was_to_end() {
    let list: PropertiesBuf = [Property::SessionExpiry(60)].into_iter().collect();
    let bye = Disconnect { reason: Reason::Success, properties: list.as_properties() };
    let bytes = bytes_of(V5, Packet::Disconnect(bye));
    let mut b = Bench::connected(V5, Config::default(), &[]);
    assert!(matches!(b.feed_to_close(&bytes).cause, Cause::Error(Error::Protocol(_))));
    let mut b = Bench::connected(V5, Config::default(), &[Property::SessionExpiry(5)]);
    assert_eq!(b.feed_to_close(&bytes).session_expiry_secs, Some(60));
    assert_eq!(b.conn.session_expiry_secs(), 60);
}

#[test]
fn every_limit_ends_the_connection_with_its_reason() {
    let config = Config {
        packet_bytes_max: 200,
        topic_bytes_max: 10,
        topic_levels_max: 3,
        subscriptions_per_packet_max: 2,
        user_properties_max: 1,
        maximum_qos: Qos::AtLeastOnce,
        retain_available: false,
        wildcard_available: false,
        shared_available: false,
        subscription_ids_available: false,
        ..Config::default()
    };
    let user = [Property::User("a", "b"), Property::User("a", "b")];
    let topic = |t: &str| publish(V5, t, Qos::AtMostOnce, 0, b"");
    let cases: Vec<(Vec<u8>, u8)> = vec![
        (publish(V5, "t", Qos::AtMostOnce, 0, &[0; 200]), 0x95),
        (topic("12345678901"), 0x90),
        (topic("a/b/c/d"), 0x90),
        (publish_with(V5, "t", Qos::AtMostOnce, 0, b"", &user, false), 0x97),
        (publish(V5, "t", Qos::ExactlyOnce, 1, b""), 0x9B),
        (b"\x31\x04\0\x01t\0".to_vec(), 0x9A),
        (subscribe(V5, 1, &["a", "b", "c"]), 0x97),
        (subscribe(V5, 1, &["12345678901"]), 0x8F),
        (subscribe(V5, 1, &["a/b/c/d"]), 0x8F),
        (subscribe(V5, 1, &["a/#"]), 0xA2),
        (subscribe(V5, 1, &["$share/g/a"]), 0x9E),
        (subscribe(V5, 1, &["a#"]), 0x8F),
        (b"\x82\x09\0\x01\x02\x0b\x07\0\x01a\0".to_vec(), 0xA1),
        (publish_with(V5, "t", Qos::AtMostOnce, 0, b"\xff", &[Property::PayloadIsUtf8(true)], false), 0x99),
        (publish_with(V5, "t", Qos::AtMostOnce, 0, b"", &[Property::SubscriptionId(1)], false), 0x82),
        (b"\xd0\0".to_vec(), 0x82),
        (b"\x30\xff\xff\xff\xff\x01".to_vec(), 0x81),
    ];
    for (bytes, code) in cases {
        let config = Config { topic_bytes_max: if code == 0x9E { 99 } else { 10 }, ..config.clone() };
        let mut b = Bench::connected(V5, config, &[]);
        assert!(matches!(b.feed_to_close(&bytes).cause, Cause::Error(_)));
        assert_eq!(b.sent(), [0xE0, 2, code, 0], "{bytes:?}");
    }
}

#[test]
fn a_stranger_may_not_send_as_much_as_a_client() {
    let mut b = Bench::new(Config { connect_bytes_max: 100, ..Config::default() });
    let close = b.feed_to_close(&[0x10, 100]);
    assert_eq!(close.cause, Cause::Error(Error::PacketTooLarge { bytes: 102, bytes_max: 100 }));
    assert!(b.out.is_empty());
}

//! Packets as bytes, against the specifications: what is read, what is written, what is refused.
#![allow(clippy::unwrap_used)]

use bytes::BytesMut;
use tidegate_mqtt::{
    Ack, Connack, Connect, Disconnect, Error, Packet, PacketId, Properties, PropertiesBuf, Property, Publish, Qos,
    Reason, SubscribeOptions, Version, decode,
};

const MAX: usize = 268_435_460;

fn one(version: Version, bytes: &[u8]) -> Result<Packet<'_>, Error> {
    let (packet, taken) = decode(bytes, version, MAX)?.expect("a whole packet");
    assert_eq!(taken, bytes.len());
    Ok(packet)
}

fn bytes_of(version: Version, packet: Packet<'_>) -> Vec<u8> {
    let mut out = BytesMut::new();
    packet.encode(version, &mut out).unwrap();
    out.to_vec()
}

#[track_caller]
fn same(version: Version, bytes: &[u8], packet: Packet<'_>) {
    assert_eq!(one(version, bytes).unwrap(), packet);
    assert_eq!(bytes_of(version, packet), bytes);
}

fn id(n: u16) -> PacketId {
    PacketId::new(n).unwrap()
}

#[test]
fn a_311_connect_with_everything_reads_as_figure_3_6_shows() {
    let bytes = b"\x10\x26\0\x04MQTT\x04\xce\0\x0a\0\x03cid\0\x04will\0\x03bye\0\x04user\0\x04pass";
    let Packet::Connect(c) = one(Version::V5, bytes).unwrap() else { panic!() };
    assert_eq!((c.version, c.clean_start, c.keep_alive, c.client_id), (Version::V311, true, 10, "cid"));
    let will = c.will.unwrap();
    assert_eq!((will.qos, will.retain, will.topic, will.payload), (Qos::AtLeastOnce, false, "will", &b"bye"[..]));
    assert_eq!((c.username, c.password), (Some("user"), Some(&b"pass"[..])));
    assert_eq!(bytes_of(Version::V311, Packet::Connect(c)), bytes);
}

#[test]
fn a_5_connect_carries_its_properties() {
    let list: PropertiesBuf =
        [Property::SessionExpiry(10), Property::ReceiveMaximum(20), Property::User("k", "v")].into_iter().collect();
    let bytes = b"\x10\x1f\0\x04MQTT\x05\x02\0\x3c\x0f\x11\0\0\0\x0a\x21\0\x14\x26\0\x01k\0\x01v\0\x03abc";
    same(
        Version::V5,
        bytes,
        Packet::Connect(Connect {
            version: Version::V5,
            clean_start: true,
            keep_alive: 60,
            properties: list.as_properties(),
            client_id: "abc",
            will: None,
            username: None,
            password: None,
        }),
    );
}

#[test]
fn publishes_of_both_versions_read_and_write() {
    let plain = Publish {
        dup: false,
        qos: Qos::AtMostOnce,
        retain: true,
        topic: "a/b",
        packet_id: None,
        properties: Properties::EMPTY,
        payload: b"hi",
    };
    same(Version::V311, b"\x31\x07\0\x03a/bhi", Packet::Publish(plain));
    same(Version::V5, b"\x31\x08\0\x03a/b\0hi", Packet::Publish(plain));
    let again = Publish { dup: true, qos: Qos::ExactlyOnce, retain: false, packet_id: Some(id(10)), ..plain };
    same(Version::V311, b"\x3c\x09\0\x03a/b\0\x0ahi", Packet::Publish(again));
    let list: PropertiesBuf = [Property::TopicAlias(3)].into_iter().collect();
    let aliased = Publish { topic: "", properties: list.as_properties(), payload: b"", ..plain };
    same(Version::V5, b"\x31\x06\0\0\x03\x23\0\x03", Packet::Publish(aliased));
}

#[test]
fn acknowledgements_leave_out_what_goes_without_saying() {
    let ok = Ack { packet_id: id(0x1234), reason: Reason::Success, properties: Properties::EMPTY };
    for (first, packet) in [
        (0x40, Packet::Puback(ok)),
        (0x50, Packet::Pubrec(ok)),
        (0x62, Packet::Pubrel(ok)),
        (0x70, Packet::Pubcomp(ok)),
    ] {
        same(Version::V311, &[first, 2, 0x12, 0x34], packet);
        same(Version::V5, &[first, 2, 0x12, 0x34], packet);
        // The longer forms of the same.
        assert_eq!(one(Version::V5, &[first, 3, 0x12, 0x34, 0]).unwrap(), packet);
        assert_eq!(one(Version::V5, &[first, 4, 0x12, 0x34, 0, 0]).unwrap(), packet);
    }
    let no = Ack { reason: Reason::NotAuthorized, ..ok };
    same(Version::V5, &[0x40, 3, 0x12, 0x34, 0x87], Packet::Puback(no));
    let list: PropertiesBuf = [Property::ReasonString("no")].into_iter().collect();
    let why = Ack { properties: list.as_properties(), ..no };
    same(Version::V5, b"\x40\x09\x12\x34\x87\x05\x1f\0\x02no", Packet::Puback(why));
}

#[test]
fn subscriptions_and_their_answers_read_and_write() {
    let Packet::Subscribe(s) = one(Version::V311, b"\x82\x0e\0\x0a\0\x03a/b\x01\0\x03c/d\x02").unwrap() else {
        panic!()
    };
    let filters: Vec<_> = s.filters.iter().map(|(f, o)| (f, o.qos)).collect();
    assert_eq!(filters, [("a/b", Qos::AtLeastOnce), ("c/d", Qos::ExactlyOnce)]);
    assert_eq!(bytes_of(Version::V311, Packet::Subscribe(s)), b"\x82\x0e\0\x0a\0\x03a/b\x01\0\x03c/d\x02");

    let Packet::Subscribe(s) = one(Version::V5, b"\x82\x0b\0\x0a\x02\x0b\x07\0\x03a/b\x2d").unwrap() else { panic!() };
    let (_, options) = s.filters.iter().next().unwrap();
    assert_eq!(options, SubscribeOptions::from_bits(0x2d).unwrap());
    assert!(options.no_local && options.retain_as_published);
    assert_eq!(s.properties.iter().collect::<Vec<_>>(), [Property::SubscriptionId(7)]);

    for bytes in [&b"\x90\x05\0\x0a\0\x02\x80"[..], b"\x90\x03\0\x0a\x01"] {
        assert_eq!(bytes_of(Version::V311, one(Version::V311, bytes).unwrap()), bytes);
    }
    let bytes = b"\x90\x05\0\x0a\0\x02\x87";
    assert_eq!(bytes_of(Version::V5, one(Version::V5, bytes).unwrap()), bytes);
    // 3.1.1 knows one failure only.
    assert_eq!(bytes_of(Version::V311, one(Version::V5, bytes).unwrap()), b"\x90\x04\0\x0a\x02\x80");
    for (version, bytes) in [(Version::V311, &b"\xb0\x02\0\x0a"[..]), (Version::V5, b"\xb0\x05\0\x0a\0\0\x11")] {
        assert_eq!(bytes_of(version, one(version, bytes).unwrap()), bytes);
    }
    let bytes = b"\xa2\x07\0\x0a\0\x03a/b";
    assert_eq!(bytes_of(Version::V311, one(Version::V311, bytes).unwrap()), bytes);
}

#[test]
fn connack_and_disconnect_of_both_versions_read_and_write() {
    let no = Connack { session_present: false, reason: Reason::NotAuthorized, properties: Properties::EMPTY };
    same(Version::V311, &[0x20, 2, 0, 5], Packet::Connack(no));
    same(Version::V5, &[0x20, 3, 0, 0x87, 0], Packet::Connack(no));
    let yes = Connack { session_present: true, reason: Reason::Success, properties: Properties::EMPTY };
    same(Version::V311, &[0x20, 2, 1, 0], Packet::Connack(yes));
    let bye = Disconnect { reason: Reason::Success, properties: Properties::EMPTY };
    same(Version::V311, &[0xE0, 0], Packet::Disconnect(bye));
    same(Version::V5, &[0xE0, 0], Packet::Disconnect(bye));
    let taken = Disconnect { reason: Reason::SessionTakenOver, ..bye };
    same(Version::V5, &[0xE0, 2, 0x8E, 0], Packet::Disconnect(taken));
    assert_eq!(one(Version::V5, &[0xE0, 1, 0x8E]).unwrap(), Packet::Disconnect(taken));
    same(Version::V5, &[0xC0, 0], Packet::Pingreq);
    same(Version::V311, &[0xD0, 0], Packet::Pingresp);
}

#[test]
fn what_the_specifications_forbid_is_refused() {
    use Version::{V5, V311};
    let cases: &[(Version, &[u8], &str)] = &[
        (V311, b"\x00\0", "reserved type 0"),
        (V311, b"\xf0\0", "AUTH does not exist in 3.1.1"),
        (V311, b"\xc1\0", "PINGREQ with flags"),
        (V311, b"\xc0\x01\0", "PINGREQ with a body"),
        (V311, b"\x80\x06\0\x01\0\x01a\0", "SUBSCRIBE without flag 2"),
        (V311, b"\x82\x02\0\x01", "SUBSCRIBE without a filter"),
        (V311, b"\x82\x06\0\0\0\x01a\0", "SUBSCRIBE with identifier 0"),
        (V311, b"\x82\x06\0\x01\0\x01a\x03", "SUBSCRIBE with QoS 3"),
        (V311, b"\x82\x06\0\x01\0\x01a\x04", "SUBSCRIBE with reserved bits"),
        (V5, b"\x82\x07\0\x01\0\0\x01a\x30", "retain handling 3"),
        (V5, b"\x82\x07\0\x01\0\0\x01a\xc0", "reserved option bits"),
        (V5, b"\x82\x11\0\x01\0\0\x0b$share/g/tt\x04", "no local on a shared subscription"),
        (V311, b"\x82\x07\0\x01\0\x02a#\0", "wildcard inside a level"),
        (V311, b"\x36\x05\0\x01a\0\x01", "QoS 3"),
        (V311, b"\x38\x03\0\x01a", "DUP on QoS 0"),
        (V311, b"\x32\x05\0\x01a\0\0", "PUBLISH with identifier 0"),
        (V311, b"\x32\x04\0\x01a\0", "PUBLISH cut in its identifier"),
        (V311, b"\x30\x03\0\x01+", "wildcard in a topic name"),
        (V311, b"\x30\x02\0\0", "empty topic in 3.1.1"),
        (V5, b"\x30\x03\0\0\0", "empty topic without an alias"),
        (V311, b"\x30\x03\0\x01\0", "NUL in a topic"),
        (V311, b"\x30\x04\0\x02\xc3\x28", "broken UTF-8"),
        (V311, b"\x30\x05\0\x03\xed\xa0\x80", "a surrogate"),
        (V311, b"\x30\x03\0\x05a", "topic longer than the packet"),
        (V5, b"\x30\x06\0\x01a\x02\x23\0", "property cut short"),
        (V5, b"\x30\x07\0\x01a\x03\x23\0\0", "topic alias 0"),
        (V5, b"\x30\x0a\0\x01a\x06\x23\0\x01\x23\0\x01", "topic alias twice"),
        (V5, b"\x30\x06\0\x01a\x02\x01\x02", "payload format 2"),
        (V5, b"\x30\x09\0\x01a\x05\x11\0\0\0\x01", "session expiry on a PUBLISH"),
        (V5, b"\x30\x06\0\x01a\x02\x7f\0", "unknown property"),
        (V5, b"\x30\x05\0\x01a\x80\0", "property length not in its shortest form"),
        (V5, b"\x30\x84\0\0\x01a\0", "remaining length not in its shortest form"),
        (V5, b"\x30\x08\0\x01a\x04\x08\0\x01#", "response topic with a wildcard"),
        (V5, b"\x30\x06\0\x01a\x02\x0b\0", "subscription identifier 0"),
        (V5, b"\x40\x03\0\x01\x01", "PUBACK with a SUBACK's reason"),
        (V5, b"\x60\x02\0\x01", "PUBREL without flag 2"),
        (V5, b"\x62\x03\0\x01\x80", "PUBREL with another packet's reason"),
        (V311, b"\x40\x03\0\x01\0", "a 3.1.1 PUBACK with a reason"),
        (V311, b"\x90\x03\0\x01\x03", "SUBACK with return code 3"),
        (V311, b"\x20\x02\x02\0", "CONNACK with reserved flags"),
        (V311, b"\x20\x02\x01\x05", "session present on a refusal"),
        (V311, b"\x20\x02\0\x06", "CONNACK with return code 6"),
        (V5, b"\xe0\x02\x01\0", "DISCONNECT with a SUBACK's reason"),
        (V5, b"\xf0\x02\x80\0", "AUTH with an error"),
        (V311, b"\x10\x0c\0\x04MQTT\x04\x03\0\0\0\0", "reserved connect flag"),
        (V311, b"\x10\x0c\0\x04MQTT\x04\x42\0\0\0\0", "3.1.1 password without a user name"),
        (V311, b"\x10\x0c\0\x04MQTT\x04\x0a\0\0\0\0", "will QoS without a will"),
        (V311, b"\x10\x0c\0\x04MQTT\x04\x22\0\0\0\0", "will retain without a will"),
        (V311, b"\x10\x0c\0\x04MQTT\x04\x1e\0\0\0\0", "will QoS 3"),
        (V311, b"\x10\x0c\0\x04MQTT\x04\x82\0\0\0\0", "user name that is not there"),
        (V311, b"\x10\x0d\0\x04MQTT\x04\x02\0\0\0\0\0", "bytes after the payload"),
        (V311, b"\x10\x0c\0\x04mqtt\x04\x02\0\0\0\0", "another protocol"),
        (V5, b"\x10\x10\0\x04MQTT\x05\x02\0\0\x03\x21\0\0\0\0", "receive maximum 0"),
        (V5, b"\x10\x11\0\x04MQTT\x05\x02\0\0\x04\x16\0\x01x\0\0", "authentication data without a method"),
    ];
    for (version, bytes, what) in cases {
        let result = decode(bytes, *version, MAX);
        assert!(result.is_err(), "{what}: {result:?}");
    }
}

#[test]
fn other_protocol_levels_are_told_apart_from_nonsense() {
    for (bytes, level) in
        [(&b"\x10\x0e\0\x06MQIsdp\x03\x02\0\0\0\0"[..], 3), (b"\x10\x0c\0\x04MQTT\x06\x02\0\0\0\0", 6)]
    {
        assert_eq!(decode(bytes, Version::V311, MAX), Err(Error::UnsupportedVersion(level)));
    }
}

#[test]
fn a_padded_length_is_read_in_311_only() {
    // The clause on the shortest form is new in 5; some small 3.1.1 clients always write two bytes.
    let bytes = b"\x30\x83\0\0\x01a";
    assert!(matches!(decode(bytes, Version::V311, MAX), Ok(Some((Packet::Publish(_), 6)))));
    assert!(decode(bytes, Version::V5, MAX).is_err());
}

#[test]
fn a_packet_over_the_limit_is_refused_before_its_body_is_there() {
    assert_eq!(
        decode(b"\x30\x80\x80\x04", Version::V311, 65_536),
        Err(Error::PacketTooLarge { bytes: 65_540, bytes_max: 65_536 })
    );
    assert_eq!(decode(b"\x30\xfc\xff\x03", Version::V311, 65_536), Ok(None));
    assert!(matches!(decode(b"\x30\xff\xff\xff\xff", Version::V311, MAX), Err(Error::Malformed(_))));
    for cut in 0..4 {
        assert_eq!(decode(&b"\x30\xff\xff\xff"[..cut], Version::V311, MAX), Ok(None));
    }
}

//! Properties of the codec over all packets: what is written is read back, and no input makes it panic.
#![allow(clippy::unwrap_used)]

use bytes::BytesMut;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use tidegate_mqtt::{
    Ack, Auth, Connack, Connect, Disconnect, FiltersBuf, Packet, PacketId, PropertiesBuf, Property, Publish, Qos,
    Reason, Reasons, RetainHandling, Suback, Subscribe, SubscribeOptions, Unsuback, Unsubscribe, Version, Will, decode,
};

const MAX: usize = 268_435_460;

/// Owned values of every field any packet has; each test case picks what its packet needs.
#[derive(Clone, Debug)]
struct Fields {
    version: Version,
    id: PacketId,
    flags: (bool, bool, bool),
    qos: Qos,
    n16: u16,
    topic: String,
    texts: (String, String),
    blob: Vec<u8>,
    second: Option<Vec<u8>>,
    filters: Vec<(String, SubscribeOptions)>,
    reason: usize,
    list: Vec<Prop>,
}

#[derive(Clone, Debug)]
struct Prop {
    kind: u8,
    n: u32,
    text: String,
    blob: Vec<u8>,
}

fn text() -> impl Strategy<Value = String> {
    "[^\\x00]{0,12}"
}

fn name() -> impl Strategy<Value = String> {
    "[^\\x00+#]{1,24}"
}

fn fields() -> impl Strategy<Value = Fields> {
    let options =
        (0..3_u8, any::<bool>(), any::<bool>(), 0..3_u8).prop_map(|(qos, no_local, rap, rh)| SubscribeOptions {
            qos: Qos::from_u8(qos).unwrap(),
            no_local,
            retain_as_published: rap,
            retain_handling: [RetainHandling::Send, RetainHandling::SendIfNew, RetainHandling::DoNotSend]
                [usize::from(rh)],
        });
    let filter = prop_oneof![
        "[a-z/]{1,8}".prop_map(|s| s),
        Just("#".to_owned()),
        Just("+/a/#".to_owned()),
        Just("$SYS/+".to_owned())
    ];
    let prop = (0..27_u8, any::<u32>(), name(), vec(any::<u8>(), 0..20)).prop_map(|(kind, n, text, blob)| Prop {
        kind,
        n,
        text,
        blob,
    });
    (
        (any::<bool>(), 1..=u16::MAX, any::<(bool, bool, bool)>(), 0..3_u8, any::<u16>(), name(), (text(), text())),
        (vec(any::<u8>(), 0..300), option::of(vec(any::<u8>(), 0..30)), vec((filter, options), 1..5), 0..1000_usize),
        vec(prop, 0..8),
    )
        .prop_map(|((v5, id, flags, qos, n16, topic, texts), (blob, second, filters, reason), list)| Fields {
            version: if v5 { Version::V5 } else { Version::V311 },
            id: PacketId::new(id).unwrap(),
            flags,
            qos: Qos::from_u8(qos).unwrap(),
            n16,
            topic,
            texts,
            blob,
            second,
            filters,
            reason,
            list,
        })
}

impl Prop {
    fn view(&self) -> Property<'_> {
        let (n, n16, flag) = (self.n, self.n as u16, self.n & 1 == 1);
        match self.kind {
            0 => Property::PayloadIsUtf8(flag),
            1 => Property::MessageExpiry(n),
            2 => Property::ContentType(&self.text),
            3 => Property::ResponseTopic(&self.text),
            4 => Property::Correlation(&self.blob),
            5 => Property::SubscriptionId(1 + n % 268_435_455),
            6 => Property::SessionExpiry(n),
            7 => Property::AssignedClientId(&self.text),
            8 => Property::ServerKeepAlive(n16),
            9 => Property::AuthMethod(&self.text),
            10 => Property::AuthData(&self.blob),
            11 => Property::RequestProblemInfo(flag),
            12 => Property::WillDelay(n),
            13 => Property::RequestResponseInfo(flag),
            14 => Property::ResponseInfo(&self.text),
            15 => Property::ServerReference(&self.text),
            16 => Property::ReasonString(&self.text),
            17 => Property::ReceiveMaximum(n16.max(1)),
            18 => Property::TopicAliasMaximum(n16),
            19 => Property::TopicAlias(n16.max(1)),
            20 => Property::MaximumQos(n16 as u8 & 1),
            21 => Property::RetainAvailable(flag),
            22 => Property::User(&self.text, &self.text),
            23 => Property::MaximumPacketSize(n.max(1)),
            24 => Property::WildcardAvailable(flag),
            25 => Property::SubscriptionIdsAvailable(flag),
            _ => Property::SharedAvailable(flag),
        }
    }
}

/// The properties out of the pool whose kinds the packet may have, each once (user properties as often as drawn).
fn list(f: &Fields, kinds: &[u8]) -> PropertiesBuf {
    if f.version == Version::V311 {
        return PropertiesBuf::new();
    }
    let mut seen = Vec::new();
    let chosen = f.list.iter().filter(|p| {
        let allowed = (kinds.contains(&p.kind) && !seen.contains(&p.kind)) || p.kind == 22;
        seen.push(p.kind);
        allowed
    });
    let chosen: Vec<_> = chosen.collect();
    // Authentication data needs its method.
    let method = chosen.iter().any(|p| p.kind == 9);
    chosen.into_iter().filter(|p| p.kind != 10 || method).map(Prop::view).collect()
}

fn pick(f: &Fields, reasons: &[Reason]) -> Reason {
    if f.version == Version::V311 { Reason::Success } else { reasons[f.reason % reasons.len()] }
}

#[track_caller]
fn round_trip(version: Version, packet: Packet<'_>) {
    let mut out = BytesMut::new();
    packet.encode(version, &mut out).unwrap();
    let (read, taken) = decode(&out, version, MAX).unwrap().unwrap();
    assert_eq!(taken, out.len());
    assert_eq!(read, packet);
    // Identical bytes again, so the encoder has one form for one packet.
    let mut again = BytesMut::new();
    read.encode(version, &mut again).unwrap();
    assert_eq!(out, again);
    for cut in 0..out.len().min(64) {
        assert_eq!(decode(&out[..cut], version, MAX), Ok(None), "a part is no packet");
    }
}

proptest! {
    #[test]
    fn connect_round_trips(f in fields()) {
        let properties = list(&f, &[6, 9, 10, 11, 13, 17, 18, 23]);
        let will_list = list(&f, &[0, 1, 2, 3, 4, 12]);
        let will = f.flags.1.then(|| Will {
            qos: f.qos, retain: f.flags.2, properties: will_list.as_properties(), topic: &f.topic, payload: &f.blob,
        });
        let username = (f.flags.2 || f.second.is_some()).then_some(f.texts.1.as_str());
        round_trip(f.version, Packet::Connect(Connect {
            version: f.version, clean_start: f.flags.0, keep_alive: f.n16, properties: properties.as_properties(),
            client_id: &f.texts.0, will, username, password: f.second.as_deref(),
        }));
    }

    #[test]
    fn connack_round_trips(f in fields()) {
        let properties = list(&f, &[6, 7, 8, 9, 10, 14, 15, 16, 17, 18, 20, 21, 23, 24, 25, 26]);
        let reason = pick(&f, &[Reason::Success, Reason::NotAuthorized, Reason::ServerBusy, Reason::BadAuthenticationMethod]);
        let session_present = f.flags.0 && reason == Reason::Success;
        round_trip(f.version, Packet::Connack(Connack { session_present, reason, properties: properties.as_properties() }));
    }

    #[test]
    fn publish_round_trips(f in fields()) {
        let properties = list(&f, &[0, 1, 2, 3, 4, 5, 19]);
        let above = f.qos != Qos::AtMostOnce;
        round_trip(f.version, Packet::Publish(Publish {
            dup: f.flags.0 && above, qos: f.qos, retain: f.flags.1, topic: &f.topic, packet_id: above.then_some(f.id),
            properties: properties.as_properties(), payload: &f.blob,
        }));
    }

    #[test]
    fn acknowledgements_round_trip(f in fields(), kind in 0..4) {
        let properties = list(&f, &[16]);
        let received = pick(&f, &[Reason::Success, Reason::NoMatchingSubscribers, Reason::QuotaExceeded]);
        let released = pick(&f, &[Reason::Success, Reason::PacketIdentifierNotFound]);
        let ack = |reason| Ack { packet_id: f.id, reason, properties: properties.as_properties() };
        round_trip(f.version, match kind {
            0 => Packet::Puback(ack(received)),
            1 => Packet::Pubrec(ack(received)),
            2 => Packet::Pubrel(ack(released)),
            _ => Packet::Pubcomp(ack(released)),
        });
    }

    #[test]
    fn subscriptions_round_trip(f in fields()) {
        let properties = list(&f, &[5]);
        let mut filters = FiltersBuf::for_subscribe();
        for (filter, options) in &f.filters {
            let old = SubscribeOptions { qos: options.qos, ..Default::default() };
            filters.push(filter, if f.version == Version::V5 { *options } else { old }).unwrap();
        }
        round_trip(f.version, Packet::Subscribe(Subscribe {
            packet_id: f.id, properties: properties.as_properties(), filters: filters.as_filters(),
        }));
        let properties = list(&f, &[]);
        let mut filters = FiltersBuf::for_unsubscribe();
        for (filter, options) in &f.filters {
            filters.push(filter, *options).unwrap();
        }
        round_trip(f.version, Packet::Unsubscribe(Unsubscribe {
            packet_id: f.id, properties: properties.as_properties(), filters: filters.as_filters(),
        }));
    }

    #[test]
    fn subscription_answers_round_trip(f in fields()) {
        let properties = list(&f, &[16]);
        let granted = [Reason::Success, Reason::GrantedQos1, Reason::GrantedQos2, Reason::UnspecifiedError];
        let reasons: Vec<_> = f.filters.iter().enumerate().map(|(i, _)| granted[(f.reason + i) % 4]).collect();
        round_trip(f.version, Packet::Suback(Suback {
            packet_id: f.id, properties: properties.as_properties(), reasons: Reasons::new(&reasons),
        }));
        let none = [Reason::Success, Reason::NoSubscriptionExisted, Reason::NotAuthorized];
        let reasons: Vec<_> = f.filters.iter().enumerate().map(|(i, _)| none[(f.reason + i) % 3]).collect();
        let reasons = if f.version == Version::V5 { &reasons[..] } else { &[] };
        round_trip(f.version, Packet::Unsuback(Unsuback {
            packet_id: f.id, properties: properties.as_properties(), reasons: Reasons::new(reasons),
        }));
    }

    #[test]
    fn goodbyes_and_auth_round_trip(f in fields()) {
        let properties = list(&f, &[6, 15, 16]);
        let reason = pick(&f, &[Reason::Success, Reason::DisconnectWithWill, Reason::SessionTakenOver]);
        round_trip(f.version, Packet::Disconnect(Disconnect { reason, properties: properties.as_properties() }));
        round_trip(f.version, Packet::Pingreq);
        round_trip(f.version, Packet::Pingresp);
        if f.version == Version::V5 {
            let properties = list(&f, &[9, 10, 16]);
            let reason = pick(&f, &[Reason::Success, Reason::ContinueAuthentication, Reason::ReAuthenticate]);
            round_trip(f.version, Packet::Auth(Auth { reason, properties: properties.as_properties() }));
        }
    }

    /// Bytes near a packet: a known type and a right length, so that the body decoders are reached.
    #[test]
    fn no_body_makes_decoding_panic(first in any::<u8>(), body in vec(any::<u8>(), 0..100), v5 in any::<bool>()) {
        let mut bytes = vec![first, body.len() as u8];
        bytes.extend(&body);
        let version = if v5 { Version::V5 } else { Version::V311 };
        if let Ok(Some((packet, taken))) = decode(&bytes, version, MAX) {
            prop_assert_eq!(taken, bytes.len());
            // What is accepted can be written, and reads back as the same.
            let written = match packet { Packet::Connect(c) => c.version, _ => version };
            let mut out = BytesMut::new();
            packet.encode(written, &mut out).unwrap();
            prop_assert_eq!(decode(&out, version, MAX).unwrap().unwrap().0, packet);
        }
    }

    #[test]
    fn a_changed_byte_never_makes_decoding_panic(f in fields(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let properties = list(&f, &[0, 1, 2, 3, 4, 5, 19]);
        let mut out = BytesMut::new();
        Packet::Publish(Publish {
            dup: false, qos: Qos::AtMostOnce, retain: false, topic: &f.topic, packet_id: None,
            properties: properties.as_properties(), payload: &f.blob,
        }).encode(f.version, &mut out).unwrap();
        let at = at.index(out.len());
        out[at] = byte;
        let _ = decode(&out, f.version, MAX);
    }
}

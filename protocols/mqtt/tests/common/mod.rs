//! What the connection tests share: a message type, and packets from the client as bytes.
#![allow(clippy::unwrap_used, clippy::type_complexity, dead_code)]

use std::sync::Arc;
use std::time::Instant;

use bytes::BytesMut;
use tidegate_mqtt::{
    Accept, Ack, Close, Config, Connect, Connection, Event, FiltersBuf, Outgoing, Output, Packet, PacketId, Properties,
    PropertiesBuf, Property, PropertySink, Publish, Qos, Reason, Subscribe, SubscribeOptions, Version, decode,
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note(pub Arc<Parts>);

/// Topic, payload, user properties and the packet identifier that the application has given it.
type Parts = (String, Vec<u8>, Vec<(String, String)>, Option<PacketId>);

impl Note {
    pub fn new(topic: &str, payload: &[u8]) -> Self {
        Note(Arc::new((topic.into(), payload.into(), Vec::new(), None)))
    }
}

impl Outgoing for Note {
    fn topic(&self) -> &str {
        &self.0.0
    }

    fn payload(&self) -> &[u8] {
        &self.0.1
    }

    fn packet_id(&self) -> Option<PacketId> {
        self.0.3
    }

    fn properties(&self, _: Instant, sink: &mut PropertySink<'_>) {
        for (key, value) in &self.0.2 {
            sink.push(Property::User(key, value));
        }
    }
}

/// One connection with the buffers around it and a clock of its own.
pub struct Bench {
    pub conn: Connection<Note>,
    pub now: Instant,
    pub input: BytesMut,
    pub out: BytesMut,
    pub version: Version,
}

pub fn id(n: u16) -> PacketId {
    PacketId::new(n).unwrap()
}

pub fn bytes_of(version: Version, packet: Packet<'_>) -> Vec<u8> {
    let mut out = BytesMut::new();
    packet.encode(version, &mut out).unwrap();
    out.to_vec()
}

pub fn connect(version: Version, client_id: &str, properties: &[Property<'_>]) -> Vec<u8> {
    let list: PropertiesBuf = properties.iter().copied().collect();
    bytes_of(
        version,
        Packet::Connect(Connect {
            version,
            clean_start: true,
            keep_alive: 60,
            properties: list.as_properties(),
            client_id,
            will: None,
            username: None,
            password: None,
        }),
    )
}

pub fn publish(version: Version, topic: &str, qos: Qos, packet: u16, payload: &[u8]) -> Vec<u8> {
    publish_with(version, topic, qos, packet, payload, &[], false)
}

pub fn publish_with(
    version: Version,
    topic: &str,
    qos: Qos,
    packet: u16,
    payload: &[u8],
    properties: &[Property<'_>],
    dup: bool,
) -> Vec<u8> {
    let list: PropertiesBuf = properties.iter().copied().collect();
    let packet_id = (qos != Qos::AtMostOnce).then(|| id(packet));
    let properties = list.as_properties();
    bytes_of(version, Packet::Publish(Publish { dup, qos, retain: false, topic, packet_id, properties, payload }))
}

pub fn subscribe(version: Version, packet: u16, filters: &[&str]) -> Vec<u8> {
    let mut list = FiltersBuf::for_subscribe();
    for filter in filters {
        list.push(filter, SubscribeOptions::default()).unwrap();
    }
    let packet = Subscribe { packet_id: id(packet), properties: Properties::EMPTY, filters: list.as_filters() };
    bytes_of(version, Packet::Subscribe(packet))
}

pub fn ack(packet: fn(Ack<'static>) -> Packet<'static>, n: u16) -> Vec<u8> {
    let ok = Ack { packet_id: id(n), reason: Reason::Success, properties: Properties::EMPTY };
    bytes_of(Version::V311, packet(ok))
}

impl Bench {
    pub fn new(config: Config) -> Self {
        let now = Instant::now();
        let conn = Connection::new(Arc::new(config), now);
        Bench { conn, now, input: BytesMut::new(), out: BytesMut::new(), version: Version::V311 }
    }

    /// Connected and accepted; the CONNACK is taken away.
    pub fn connected(version: Version, config: Config, properties: &[Property<'_>]) -> Self {
        let mut bench = Bench::new(config);
        bench.version = version;
        let events = bench.feed(&connect(version, "c", properties));
        assert!(matches!(events[..], [Event::Connect(_)]));
        bench.conn.accept(Accept::default(), &mut bench.out);
        bench.out.clear();
        bench
    }

    /// Feeds bytes and gathers events, until nothing more happens.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Event<Note>> {
        self.input.extend_from_slice(bytes);
        let mut events = Vec::new();
        loop {
            let took = self.conn.handle_input(self.now, &mut self.input, &mut self.out);
            while let Output::Event(event) = self.conn.poll_output(self.now, &mut self.out) {
                events.push(event);
            }
            if !took || self.conn.is_closed() {
                return events;
            }
        }
    }

    /// Feeds bytes that must end the connection, and tells how; `feed` has to have been used before for anything else.
    pub fn feed_to_close(&mut self, bytes: &[u8]) -> Close {
        self.input.extend_from_slice(bytes);
        while self.conn.handle_input(self.now, &mut self.input, &mut self.out) {
            loop {
                match self.conn.poll_output(self.now, &mut self.out) {
                    Output::Event(_) => {}
                    Output::Close(close) => return close,
                    Output::Timeout(_) => break,
                }
            }
        }
        panic!("still open");
    }

    pub fn close(&mut self) -> Option<Close> {
        match self.conn.poll_output(self.now, &mut self.out) {
            Output::Close(close) => Some(close),
            Output::Event(_) | Output::Timeout(_) => None,
        }
    }

    pub fn deadline(&mut self) -> Option<Instant> {
        match self.conn.poll_output(self.now, &mut self.out) {
            Output::Timeout(at) => at,
            other => panic!("{other:?}"),
        }
    }

    pub fn sent(&mut self) -> Vec<u8> {
        self.out.split().to_vec()
    }

    /// The packets written since the last time, as `{:?}` of their kinds, for short assertions.
    pub fn sent_packets(&mut self, mut each: impl FnMut(Packet<'_>)) {
        let bytes = self.sent();
        let mut rest = &bytes[..];
        while let Some((packet, taken)) = decode(rest, self.version, usize::MAX).unwrap() {
            each(packet);
            rest = &rest[taken..];
        }
        assert!(rest.is_empty());
    }
}

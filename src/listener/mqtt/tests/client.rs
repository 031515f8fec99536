//! A client that says exactly what it is told to.

use std::collections::VecDeque;

use tidegate_mqtt::{
    Ack, Auth, Connect, Disconnect, FiltersBuf, Packet, PacketId, Properties, PropertiesBuf, Property, Publish, Qos,
    Reason, Subscribe, SubscribeOptions, Unsubscribe, Version, Will, decode,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;

/// What the gateway said.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    Connack {
        present: bool,
        reason: Reason,
        properties: Vec<String>,
    },
    Publish {
        topic: String,
        payload: String,
        qos: Qos,
        retain: bool,
        dup: bool,
        id: Option<PacketId>,
        properties: Vec<String>,
    },
    Puback(u16, Reason),
    Pubrec(u16, Reason),
    Pubrel(u16, Reason),
    Pubcomp(u16, Reason),
    Suback(u16, Vec<Reason>),
    Unsuback(u16, Vec<Reason>),
    Pingresp,
    Disconnect(Reason),
    Auth(Reason, Vec<u8>),
    Closed,
}

impl Said {
    /// Topic and payload of a message, as one text.
    pub fn message(&self) -> String {
        match self {
            Said::Publish { topic, payload, .. } => format!("{topic}={payload}"),
            other => panic!("not a message: {other:?}"),
        }
    }
}

pub struct Client {
    pub io: DuplexStream,
    pub version: Version,
    read: BytesMut,
    said: VecDeque<Said>,
    pub served: tokio::task::JoinHandle<()>,
}

pub fn id(n: u16) -> PacketId {
    PacketId::new(n).unwrap()
}

impl Client {
    pub fn new(io: DuplexStream, version: Version, served: tokio::task::JoinHandle<()>) -> Self {
        Client { io, version, read: BytesMut::new(), said: VecDeque::new(), served }
    }

    pub fn bytes(&self, packet: Packet<'_>) -> Vec<u8> {
        let mut out = BytesMut::new();
        packet.encode(self.version, &mut out).unwrap();
        out.to_vec()
    }

    pub async fn send(&mut self, packet: Packet<'_>) {
        let bytes = self.bytes(packet);
        self.io.write_all(&bytes).await.unwrap();
    }

    /// A CONNECT to be filled in; `id` is user name and client identifier.
    pub fn connect<'a>(&'a mut self, id: &'a str) -> Connecting<'a> {
        Connecting {
            connect: Connect {
                version: self.version,
                clean_start: true,
                keep_alive: 60,
                properties: Properties::EMPTY,
                client_id: id,
                will: None,
                username: Some(id),
                password: None,
            },
            password: String::new(),
            properties: Vec::new(),
            will: None,
            client: self,
        }
    }

    /// The next packet, or the end.
    pub async fn next(&mut self) -> Said {
        loop {
            if let Some(said) = self.said.pop_front() {
                return said;
            }
            while let Some((packet, bytes)) = decode(&self.read, self.version, 1 << 24).unwrap() {
                let said = said(packet);
                self.said.push_back(said);
                bytes::Buf::advance(&mut self.read, bytes);
            }
            if self.said.is_empty() {
                match self.io.read_buf(&mut self.read).await {
                    Ok(0) | Err(_) => return Said::Closed,
                    Ok(_) => {}
                }
            }
        }
    }

    pub async fn accepted(&mut self) -> (bool, Vec<String>) {
        match self.next().await {
            Said::Connack { present, reason: Reason::Success, properties } => (present, properties),
            other => panic!("not accepted: {other:?}"),
        }
    }

    pub async fn refused(&mut self) -> Reason {
        let reason = match self.next().await {
            Said::Connack { present: false, reason, .. } => reason,
            other => panic!("not refused: {other:?}"),
        };
        assert_eq!(self.next().await, Said::Closed);
        reason
    }

    pub async fn publish(&mut self, topic: &str, payload: &str, qos: Qos, packet: u16) {
        self.publish_with(topic, payload, qos, packet, false, &[]).await;
    }

    pub async fn publish_with(
        &mut self,
        topic: &str,
        payload: &str,
        qos: Qos,
        packet: u16,
        retain: bool,
        properties: &[Property<'_>],
    ) {
        let list: PropertiesBuf = properties.iter().copied().collect();
        let packet_id = (qos != Qos::AtMostOnce).then(|| id(packet));
        let properties = list.as_properties();
        let payload = payload.as_bytes();
        self.send(Packet::Publish(Publish { dup: false, qos, retain, topic, packet_id, properties, payload })).await;
    }

    /// Subscribes and waits for the answer.
    pub async fn subscribe(&mut self, filters: &[(&str, Qos)]) -> Vec<Reason> {
        let options = |qos: &Qos| SubscribeOptions { qos: *qos, ..SubscribeOptions::default() };
        let filters: Vec<_> = filters.iter().map(|(filter, qos)| (*filter, options(qos))).collect();
        self.subscribe_with(&filters, &[]).await
    }

    pub async fn subscribe_with(
        &mut self,
        filters: &[(&str, SubscribeOptions)],
        properties: &[Property<'_>],
    ) -> Vec<Reason> {
        let list: PropertiesBuf = properties.iter().copied().collect();
        let mut all = FiltersBuf::for_subscribe();
        for (filter, options) in filters {
            all.push(filter, *options).unwrap();
        }
        let subscribe = Subscribe { packet_id: id(900), properties: list.as_properties(), filters: all.as_filters() };
        self.send(Packet::Subscribe(subscribe)).await;
        match self.next().await {
            Said::Suback(900, reasons) => reasons,
            other => panic!("not a SUBACK: {other:?}"),
        }
    }

    pub async fn unsubscribe(&mut self, filter: &str) -> Vec<Reason> {
        let mut all = FiltersBuf::for_unsubscribe();
        all.push(filter, SubscribeOptions::default()).unwrap();
        let unsubscribe = Unsubscribe { packet_id: id(901), properties: Properties::EMPTY, filters: all.as_filters() };
        self.send(Packet::Unsubscribe(unsubscribe)).await;
        match self.next().await {
            Said::Unsuback(901, reasons) => reasons,
            other => panic!("not an UNSUBACK: {other:?}"),
        }
    }

    pub async fn puback(&mut self, packet: u16) {
        self.send(Packet::Puback(ack(packet))).await;
    }

    pub async fn disconnect(&mut self, reason: Reason, properties: &[Property<'_>]) {
        let list: PropertiesBuf = properties.iter().copied().collect();
        self.send(Packet::Disconnect(Disconnect { reason, properties: list.as_properties() })).await;
    }

    pub async fn auth(&mut self, reason: Reason, method: &str, data: &[u8]) {
        let list: PropertiesBuf = [Property::AuthMethod(method), Property::AuthData(data)].into_iter().collect();
        self.send(Packet::Auth(Auth { reason, properties: list.as_properties() })).await;
    }

    /// Says nothing more, not even goodbye, and waits until the gateway has noticed.
    pub async fn vanish(self) {
        drop(self.io);
        self.served.await.unwrap();
    }

    /// The message is acknowledged, and nothing else comes.
    pub async fn quiet_after_puback(&mut self, packet: u16) {
        match self.next().await {
            Said::Puback(got, reason) if got == packet && !reason.is_error() => self.quiet().await,
            other => panic!("not acknowledged: {other:?}"),
        }
    }

    /// Nothing is on its way: a PING is answered by a PONG alone.
    pub async fn quiet(&mut self) {
        self.send(Packet::Pingreq).await;
        assert_eq!(self.next().await, Said::Pingresp);
    }
}

pub fn ack(packet: u16) -> Ack<'static> {
    Ack { packet_id: id(packet), reason: Reason::Success, properties: Properties::EMPTY }
}

/// A CONNECT being written.
pub struct Connecting<'a> {
    pub connect: Connect<'a>,
    password: String,
    properties: Vec<Property<'a>>,
    will: Option<(&'a str, &'a str, Qos, bool, Vec<Property<'a>>)>,
    client: &'a mut Client,
}

impl<'a> Connecting<'a> {
    pub fn password(mut self, password: &str) -> Self {
        self.password = password.to_owned();
        self
    }

    pub fn username(mut self, username: Option<&'a str>) -> Self {
        self.connect.username = username;
        self
    }

    pub fn keep(mut self) -> Self {
        self.connect.clean_start = false;
        self
    }

    pub fn keep_alive(mut self, secs: u16) -> Self {
        self.connect.keep_alive = secs;
        self
    }

    pub fn property(mut self, property: Property<'a>) -> Self {
        self.properties.push(property);
        self
    }

    pub fn will(
        mut self,
        topic: &'a str,
        payload: &'a str,
        qos: Qos,
        retain: bool,
        properties: &[Property<'a>],
    ) -> Self {
        self.will = Some((topic, payload, qos, retain, properties.to_vec()));
        self
    }

    pub async fn send(self) {
        let Connecting { mut connect, password, properties, will, client } = self;
        let list: PropertiesBuf = properties.into_iter().collect();
        connect.properties = list.as_properties();
        if !password.is_empty() {
            connect.password = Some(password.as_bytes());
        }
        let of_will: PropertiesBuf = will.iter().flat_map(|will| will.4.iter().copied()).collect();
        connect.will = will.as_ref().map(|(topic, payload, qos, retain, _)| Will {
            topic,
            payload: payload.as_bytes(),
            qos: *qos,
            retain: *retain,
            properties: of_will.as_properties(),
        });
        client.send(Packet::Connect(connect)).await;
    }
}

fn said(packet: Packet<'_>) -> Said {
    let list = |properties: Properties<'_>| properties.iter().map(|p| format!("{p:?}")).collect();
    match packet {
        Packet::Connack(p) => {
            Said::Connack { present: p.session_present, reason: p.reason, properties: list(p.properties) }
        }
        Packet::Publish(p) => Said::Publish {
            topic: p.topic.into(),
            payload: String::from_utf8_lossy(p.payload).into(),
            qos: p.qos,
            retain: p.retain,
            dup: p.dup,
            id: p.packet_id,
            properties: list(p.properties),
        },
        Packet::Puback(p) => Said::Puback(p.packet_id.get(), p.reason),
        Packet::Pubrec(p) => Said::Pubrec(p.packet_id.get(), p.reason),
        Packet::Pubrel(p) => Said::Pubrel(p.packet_id.get(), p.reason),
        Packet::Pubcomp(p) => Said::Pubcomp(p.packet_id.get(), p.reason),
        Packet::Suback(p) => Said::Suback(p.packet_id.get(), p.reasons.iter().collect()),
        Packet::Unsuback(p) => Said::Unsuback(p.packet_id.get(), p.reasons.iter().collect()),
        Packet::Pingresp => Said::Pingresp,
        Packet::Disconnect(p) => Said::Disconnect(p.reason),
        Packet::Auth(p) => {
            let data =
                p.properties.iter().find_map(|p| if let Property::AuthData(d) = p { Some(d.to_vec()) } else { None });
            Said::Auth(p.reason, data.unwrap_or_default())
        }
        other => panic!("not a server's packet: {other:?}"),
    }
}

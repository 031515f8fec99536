//! `kill -9` under a persistent MQTT session: what is acknowledged and not taken is there after the restart, in its order, under its packet identifiers; what
//! was completed at `QoS` 2 does not come again. The real binary, and a client that is not ours.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;

use support::mqtt::{CONNACK, MqttClient, PUBACK, Packet, SUBACK, connect_body, text};
use support::{Device, Gateway, Wanted};

const PUBREC: u8 = 0x50;
const PUBREL: u8 = 0x62;
const PUBCOMP: u8 = 0x70;

/// A PUBLISH from the gateway.
#[derive(Debug)]
struct Message {
    dup: bool,
    qos: u8,
    id: [u8; 2],
    payload: String,
}

/// A client that stays after its connection, in one version of the protocol.
struct Peer {
    client: MqttClient,
    v5: bool,
    /// As CONNACK said.
    resumed: bool,
}

impl Peer {
    fn connect(gateway: &Gateway, device: &Device, v5: bool) -> Peer {
        let mut client = MqttClient::open(gateway.plain, v5).unwrap();
        let mut body = connect_body(&device.id, &device.id, &gateway.jwt(device), v5);
        // Behind "MQTT" and the version: not clean. In MQTT 5 the session has to be asked for: Session Expiry Interval, 600 s.
        body[7] &= !2;
        if v5 {
            body[10] = 5;
            body.splice(11..11, [0x11, 0, 0, 2, 88]);
        }
        client.send(0x10, &body).unwrap();
        let connack = client.read_packet().unwrap();
        assert_eq!((connack.first, connack.body[1]), (CONNACK, 0), "{connack:?}");
        Peer { client, v5, resumed: connack.body[0] == 1 }
    }

    fn subscribe(&mut self, filter: &str) {
        let mut body = vec![0, 1];
        body.extend(self.v5.then_some(0));
        body.extend(text(filter));
        body.push(2);
        self.client.send(0x82, &body).unwrap();
        let suback = self.client.read_packet().unwrap();
        assert_eq!((suback.first, suback.body.last()), (SUBACK, Some(&2)));
    }

    fn send_publish(&mut self, qos: u8, dup: bool, id: u16, payload: &str) {
        let mut body = text("plant/x");
        body.extend(id.to_be_bytes());
        body.extend(self.v5.then_some(0));
        body.extend_from_slice(payload.as_bytes());
        self.client.send(0x30 | qos << 1 | if dup { 8 } else { 0 }, &body).unwrap();
    }

    /// Publishes and is told that it was accepted.
    fn publish(&mut self, qos: u8, id: u16, payload: &str) {
        self.send_publish(qos, false, id, payload);
        if qos == 1 {
            return self.expect(PUBACK, id.to_be_bytes());
        }
        self.expect(PUBREC, id.to_be_bytes());
        self.client.send(PUBREL, &id.to_be_bytes()).unwrap();
        self.expect(PUBCOMP, id.to_be_bytes());
    }

    #[track_caller]
    fn expect(&mut self, first: u8, id: [u8; 2]) {
        let packet = self.client.read_packet().unwrap();
        assert!(packet.first == first && packet.body.starts_with(&id), "{first:#x} of {id:?}, not {packet:?}");
        assert!(packet.body.get(2).is_none_or(|reason| *reason < 0x80), "{packet:?}");
    }

    fn message(&self, packet: &Packet) -> Message {
        assert_eq!(packet.first & 0xF0, 0x30, "{packet:?}");
        let at = 2 + usize::from(u16::from_be_bytes([packet.body[0], packet.body[1]]));
        // Properties here are few: their length fits one byte.
        let properties = if self.v5 { 1 + usize::from(packet.body[at + 2]) } else { 0 };
        let payload = String::from_utf8(packet.body[at + 2 + properties..].to_vec()).unwrap();
        let qos = packet.first >> 1 & 3;
        Message { dup: packet.first & 8 != 0, qos, id: [packet.body[at], packet.body[at + 1]], payload }
    }

    fn read(&mut self) -> Message {
        let packet = self.client.read_packet().unwrap();
        self.message(&packet)
    }

    /// Takes messages, each to the end of its handshake, until it has one with this payload. PUBREL of earlier messages is answered.
    fn take_until(&mut self, last: &str) -> Vec<Message> {
        let mut messages: Vec<Message> = Vec::new();
        let mut completed = BTreeSet::new();
        loop {
            let packet = self.client.read_packet().unwrap();
            match packet.first {
                PUBREL => {
                    let id = [packet.body[0], packet.body[1]];
                    self.client.send(PUBCOMP, &id).unwrap();
                    completed.insert(id);
                }
                _ => {
                    let message = self.message(&packet);
                    self.client.send(if message.qos == 1 { PUBACK } else { PUBREC }, &message.id).unwrap();
                    messages.push(message);
                }
            }
            let taken = |m: &Message| m.qos == 1 || completed.contains(&m.id);
            if messages.last().is_some_and(|m| m.payload == last) && messages.iter().all(taken) {
                return messages;
            }
        }
    }
}

fn survives(v5: bool) {
    let mut gateway = Gateway::start(&Wanted::default());
    let [reader, writer] = ["reader", "writer"].map(|id| gateway.add_device(id));
    let mut subscriber = Peer::connect(&gateway, &reader, v5);
    assert!(!subscriber.resumed);
    subscriber.subscribe("plant/#");
    let mut publisher = Peer::connect(&gateway, &writer, v5);

    // Connected: one message is taken, one is not answered, one is between PUBREC and PUBCOMP, one is not answered at QoS 2.
    let mut ids = Vec::new();
    for (id, (qos, payload)) in
        [(1, "taken"), (1, "unanswered 1"), (2, "received"), (2, "unanswered 2")].iter().enumerate()
    {
        publisher.publish(*qos, 1 + id as u16, payload);
        let message = subscriber.read();
        assert!(!message.dup && message.qos == *qos && message.payload == *payload, "{message:?}");
        match *payload {
            "taken" => subscriber.client.send(PUBACK, &message.id).unwrap(),
            "received" => {
                subscriber.client.send(PUBREC, &message.id).unwrap();
                subscriber.expect(PUBREL, message.id);
            }
            _ => {}
        }
        ids.push(message.id);
    }
    drop(subscriber);

    // Away: a queue, and a message whose PUBREL is still to come.
    let queue: Vec<String> = (0..60).map(|n| format!("queued {n}")).collect();
    for (n, payload) in queue.iter().enumerate() {
        publisher.publish(1 + (n % 2) as u8, 10 + n as u16, payload);
    }
    publisher.send_publish(2, false, 999, "once");
    publisher.expect(PUBREC, 999_u16.to_be_bytes());
    gateway.kill();
    drop(publisher);
    gateway.run();

    let mut publisher = Peer::connect(&gateway, &writer, v5);
    assert!(publisher.resumed);
    publisher.send_publish(2, true, 999, "once");
    publisher.expect(PUBREC, 999_u16.to_be_bytes());
    publisher.client.send(PUBREL, &999_u16.to_be_bytes()).unwrap();
    publisher.expect(PUBCOMP, 999_u16.to_be_bytes());

    let mut subscriber = Peer::connect(&gateway, &reader, v5);
    assert!(subscriber.resumed);
    // What was received is completed, not sent again.
    subscriber.expect(PUBREL, ids[2]);
    subscriber.client.send(PUBCOMP, &ids[2]).unwrap();
    let messages = subscriber.take_until("once");
    let again: Vec<&Message> = messages.iter().filter(|m| m.dup).collect();
    assert_eq!(again.iter().map(|m| &m.payload[..]).collect::<Vec<_>>(), ["unanswered 1", "unanswered 2"]);
    assert_eq!(again.iter().map(|m| m.id).collect::<Vec<_>>(), [ids[1], ids[3]]);
    let fresh: Vec<&str> = messages.iter().filter(|m| !m.dup).map(|m| &m.payload[..]).collect();
    assert_eq!(fresh, queue.iter().map(|p| &p[..]).chain(["once"]).collect::<Vec<_>>());

    // Killed at once: what the gateway has not yet noted as taken may come again at QoS 1, marked; nothing does at QoS 2.
    gateway.kill();
    drop(subscriber);
    gateway.run();
    let mut subscriber = Peer::connect(&gateway, &reader, v5);
    assert!(subscriber.resumed);
    let mut publisher = Peer::connect(&gateway, &writer, v5);
    publisher.publish(1, 1, "the end");
    let mut messages = subscriber.take_until("the end");
    assert!(!messages.pop().unwrap().dup);
    assert!(messages.iter().all(|m| m.qos == 1 && m.dup), "{messages:?}");
}

#[test]
fn a_persistent_session_of_mqtt_5_survives_kill_9() {
    survives(true);
}

#[test]
fn a_persistent_session_of_mqtt_3_1_1_survives_kill_9() {
    survives(false);
}

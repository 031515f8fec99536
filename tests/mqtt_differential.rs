//! The same bytes to Tidegate, to mosquitto and to rumqttd; every difference between their answers is explained below, and an explanation that
//! is no longer needed is an error too.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use serde_json::json;
use support::{Gateway, Wanted};
use tidegate_mqtt::{Packet, Properties, Property, Version, decode};

/// One conversation: what the client writes, each piece after the answers to the one before.
struct Script {
    name: &'static str,
    version: Version,
    pieces: Vec<Vec<u8>>,
}

/// Where a peer answers otherwise, and why we do as we do.
const EXPLAINED: &[(Peer, &str, &[&str])] = &[
    (
        Peer::Mosquitto,
        "the order of an acknowledgement and of the message itself is free",
        &[
            "qos 1 to oneself 3.1.1",
            "qos 1 to oneself 5",
            "granted qos is the limit 3.1.1",
            "granted qos is the limit 5",
        ],
    ),
    (
        Peer::Mosquitto,
        "it lets pass what is forbidden: [MQTT-2.1.3-1], [MQTT-3.3.1-2], [MQTT-1.5.5-1], [MQTT-3.3.2-14], [MQTT-3.3.4-6], [MQTT-3.4.2-1], [MQTT-3.8.3-4], \
         [MQTT-4.8.2-1], [MQTT-4.8.2-2], sections 3.3.2.3.2 and 4.13",
        &[
            "dup at qos 0 3.1.1",
            "dup at qos 0 5",
            "flags on a ping 3.1.1",
            "flags on a ping 5",
            "server's packet 3.1.1",
            "server's packet 5",
            "subscription identifier from a client",
            "no local on a shared subscription",
            "share without a filter",
            "share with a wildcard name",
            "payload format 2",
            "response topic with a wildcard",
            "length not in its shortest form",
            "puback with a reason of suback",
        ],
    ),
    (
        Peer::Mosquitto,
        "a server may look whether a payload is the text that it claims to be (section 3.3.2.3.2), and we do",
        &["payload that is not text"],
    ),
    (
        Peer::Mosquitto,
        "it closes without a word; we say why",
        &[
            "second connect 5",
            "connack from a client 5",
            "length of five bytes 5",
            "property twice",
            "auth without a method",
            "goodbye with an unknown reason",
        ],
    ),
    (
        Peer::Mosquitto,
        "it says a more general reason, or takes malformed for a protocol error and the other way round",
        &[
            "identifier 0 5",
            "wildcard in a topic name 5",
            "topic of nothing 5",
            "subscribe to nothing 5",
            "hash before the end 5",
            "plus inside a level 5",
            "empty filter 5",
            "unsubscribe without a filter 5",
            "reserved type 5",
            "topic alias 0",
            "topic alias unknown",
            "subscription identifier 0",
            "property of another packet",
        ],
    ),
    (
        Peer::Mosquitto,
        "it does not say at QoS 2 that nobody listens, nor that an identifier is not in use",
        &["qos 2 twice 5", "pubrel of nothing 5", "pubrec of nothing 5"],
    ),
    (
        Peer::Mosquitto,
        "one message for each matching subscription is allowed (section 3.3.4); one for all, with all their identifiers, costs less",
        &["overlapping filters 5"],
    ),
    (
        Peer::Mosquitto,
        "what begins with $ is for the server's own use (section 4.7.2), so nobody else publishes there, and a 3.1.1 client hears no by the close",
        &["dollar topics are shielded 3.1.1"],
    ),
    (
        Peer::Rumqttd,
        "what begins with $ is for the server's own use (section 4.7.2), so nobody else publishes there, and a 3.1.1 client hears no by the close",
        &["dollar topics are shielded 3.1.1"],
    ),
    (
        Peer::Mosquitto,
        "it speaks MQTT 3.1 too, and refuses other levels in the words of 3.1.1; section 3.1.2.2 wants those of 5",
        &["level 3", "level 6"],
    ),
    (
        Peer::Rumqttd,
        "the order of an acknowledgement and of the message itself is free, and that of properties (section 2.2.2.2)",
        &["qos 2 to oneself 3.1.1", "qos 2 to oneself 5", "properties travel"],
    ),
    (
        Peer::Rumqttd,
        "it lets pass, in silence or with an answer, what is forbidden",
        &[
            "second connect 3.1.1",
            "second connect 5",
            "dup at qos 0 3.1.1",
            "dup at qos 0 5",
            "wildcard in a topic name 3.1.1",
            "wildcard in a topic name 5",
            "topic of nothing 3.1.1",
            "topic of nothing 5",
            "nul in a topic 3.1.1",
            "nul in a topic 5",
            "subscribe without its flag 3.1.1",
            "subscribe without its flag 5",
            "subscribe with identifier 0 3.1.1",
            "subscribe with identifier 0 5",
            "hash before the end 3.1.1",
            "hash before the end 5",
            "plus inside a level 3.1.1",
            "plus inside a level 5",
            "empty filter 3.1.1",
            "empty filter 5",
            "unsubscribe without a filter 3.1.1",
            "unsubscribe without a filter 5",
            "server's packet 3.1.1",
            "server's packet 5",
            "connack from a client 3.1.1",
            "flags on a ping 3.1.1",
            "flags on a ping 5",
            "reserved connect flag",
            "password without a user",
            "connect with bytes to spare",
            "no local on a shared subscription",
            "share without a filter",
            "share with a wildcard name",
            "reserved option bits",
            "payload that is not text",
            "payload format 2",
            "property twice",
            "response topic with a wildcard",
            "length not in its shortest form",
        ],
    ),
    (
        Peer::Rumqttd,
        "an acknowledgement of nothing ends its connection; sections 3.5 to 3.7 have an answer for it, and a client that was restarted sends such",
        &[
            "pubrel of nothing 3.1.1",
            "pubrel of nothing 5",
            "puback of nothing 3.1.1",
            "puback of nothing 5",
            "pubrec of nothing 3.1.1",
            "pubrec of nothing 5",
            "pubcomp of nothing 3.1.1",
            "pubcomp of nothing 5",
        ],
    ),
    (
        Peer::Rumqttd,
        "it closes without a word; we say why",
        &[
            "qos 3 5",
            "identifier 0 5",
            "broken utf-8 in a topic 5",
            "subscribe to nothing 5",
            "subscribe at qos 3 5",
            "connack from a client 5",
            "reserved type 5",
            "length of five bytes 5",
            "level 3",
            "level 6",
            "retain handling 3",
            "property of another packet",
            "unknown property",
            "auth without a method",
            "goodbye that makes the session last",
            "goodbye with an unknown reason",
            "puback with a reason of suback",
        ],
    ),
    (
        Peer::Rumqttd,
        "its DISCONNECT has a byte too many",
        &[
            "topic alias 0",
            "topic alias unknown",
            "topic alias too high",
            "subscription identifier 0",
            "subscription identifier from a client",
        ],
    ),
    (
        Peer::Rumqttd,
        "it does not do this: No Local, Retain As Published, reasons of MQTT 5 for nobody listening, UNSUBACK for what was not subscribed to",
        &[
            "no local",
            "retain as published",
            "nobody listens 5",
            "qos 2 twice 5",
            "unsubscribe from nothing 3.1.1",
            "unsubscribe from nothing 5",
        ],
    ),
    (
        Peer::Rumqttd,
        "one message for each matching subscription is allowed (section 3.3.4); one for all, with all their identifiers, costs less",
        &["overlapping filters 3.1.1", "overlapping filters 5"],
    ),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    Mosquitto,
    Rumqttd,
}

#[test]
fn every_difference_to_mosquitto_and_rumqttd_is_explained() {
    let wanted = Wanted {
        limits: "auth_rate_per_address = \"100000/s\"\n".into(),
        extra: "\n[identity]\nanonymous_role = \"guest\"\n".into(),
        ..Wanted::default()
    };
    let mut gateway = Gateway::prepare(&wanted);
    let policy = "[[rule]]\nname = \"all\"\nwho = [\"anyone\"]\ndo = [\"publish\", \"subscribe\", \"read\"]\non = [\"#\", \"/#\"]\n";
    std::fs::write(gateway.path("policy.toml"), policy).unwrap();
    gateway.run();
    let folder = tempfile::tempdir().unwrap();
    let (_mosquitto, mosquitto) = support::mosquitto(folder.path());
    let rumqttd = rumqttd();
    let scripts = scripts();
    let peers = Peers { tidegate: gateway.plain, mosquitto, rumqttd };
    let ours = transcripts(&scripts, |version| peers.of(None, version));
    let mut faults = Vec::new();
    for peer in [Peer::Mosquitto, Peer::Rumqttd] {
        let theirs = transcripts(&scripts, |version| peers.of(Some(peer), version));
        for script in &scripts {
            let name = script.name;
            let explained = EXPLAINED.iter().find(|(who, _, names)| *who == peer && names.contains(&name));
            let (mut ours, mut theirs) = (ours[name].clone(), theirs[name].clone());
            if (ours == theirs) == explained.is_some() {
                // Once more, alone and with more patience, before a slow machine is taken for a fault.
                let again = |address| transcript(address, script, PATIENT);
                (ours, theirs) = (again(peers.of(None, script.version)), again(peers.of(Some(peer), script.version)));
            }
            match (ours == theirs, explained) {
                (true, None) | (false, Some(_)) => {}
                (true, Some((_, why, _))) => faults.push(format!("{name}: {peer:?} answers as we do, but: {why}")),
                (false, None) => {
                    faults.push(format!("{name}: {peer:?}\n    ours   {ours:?}\n    theirs {theirs:?}"));
                }
            }
        }
    }
    for name in EXPLAINED.iter().flat_map(|(_, _, names)| *names) {
        assert!(scripts.iter().any(|script| script.name == *name), "{name} is no script");
    }
    assert!(faults.is_empty(), "{} differences\n{}", faults.len(), faults.join("\n"));
}

/// What a server says to every script. Those of one version run at once; both versions use the same topics.
fn transcripts(scripts: &[Script], of: impl Fn(Version) -> SocketAddr) -> HashMap<&'static str, Vec<String>> {
    let mut said = HashMap::new();
    for version in [Version::V311, Version::V5] {
        let address = of(version);
        thread::scope(|scope| {
            let of_version = scripts.iter().filter(|script| script.version == version);
            let running: Vec<_> = of_version
                .map(|script| scope.spawn(move || (script.name, transcript(address, script, QUIET))))
                .collect();
            said.extend(running.into_iter().map(|thread| thread.join().unwrap()));
        });
    }
    said
}

impl Peers {
    fn of(&self, peer: Option<Peer>, version: Version) -> SocketAddr {
        match peer {
            None => self.tidegate,
            Some(Peer::Mosquitto) => self.mosquitto,
            Some(Peer::Rumqttd) => self.rumqttd[usize::from(version == Version::V5)],
        }
    }
}

struct Peers {
    tidegate: SocketAddr,
    mosquitto: SocketAddr,
    /// 3.1.1 and 5.
    rumqttd: [SocketAddr; 2],
}

/// rumqttd in this process, each version on its own port; its threads end with the process.
fn rumqttd() -> [SocketAddr; 2] {
    let addresses = [support::free_address(), support::free_address()];
    let server = |name: &str, address: SocketAddr| {
        json!({ name: {
            "name": name, "listen": address.to_string(), "next_connection_delay_ms": 1,
            "connections": {
                "connection_timeout_ms": 5000, "max_payload_size": 262_144, "max_inflight_count": 100,
                "dynamic_filters": true,
            },
        } })
    };
    let config: rumqttd::Config = serde_json::from_value(json!({
        "id": 0,
        "router": {
            "max_connections": 1000, "max_outgoing_packet_count": 200, "max_segment_size": 1_048_576, "max_segment_count": 10,
        },
        "v4": server("v4", addresses[0]),
        "v5": server("v5", addresses[1]),
    }))
    .unwrap();
    thread::spawn(move || {
        // If it cannot start, the wait below says so.
        let _ = rumqttd::Broker::new(config).start();
    });
    for address in addresses {
        support::wait_until("rumqttd listens", || TcpStream::connect(address).is_ok());
    }
    addresses
}

/// What a server says to a script, packet by packet.
fn transcript(server: SocketAddr, script: &Script, quiet: Duration) -> Vec<String> {
    let mut stream = TcpStream::connect(server).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(quiet)).unwrap();
    let (mut said, mut read) = (Vec::new(), Vec::new());
    'pieces: for piece in &script.pieces {
        if stream.write_all(piece).is_err() {
            break;
        }
        loop {
            let mut chunk = [0; 4096];
            match stream.read(&mut chunk) {
                Ok(0) => {
                    said.push("closed".to_owned());
                    break 'pieces;
                }
                Ok(count) => read.extend_from_slice(&chunk[..count]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
                // A reset is a close with something unread.
                Err(_) => {
                    said.push("closed".to_owned());
                    break 'pieces;
                }
            }
            while let Ok(Some((packet, bytes))) = decode(&read, script.version, 1 << 20) {
                said.push(word(&packet));
                read.drain(..bytes);
            }
        }
    }
    if !read.is_empty() {
        said.push("unreadable".to_owned());
    }
    said
}

/// Silence after which a server is taken to have said everything.
const QUIET: Duration = Duration::from_millis(500);
const PATIENT: Duration = Duration::from_secs(3);

/// A packet without what servers may choose freely: their limits in CONNACK, reason strings.
fn word(packet: &Packet<'_>) -> String {
    let list = |properties: Properties<'_>| {
        let shown = properties.iter().filter(|p| !matches!(p, Property::ReasonString(_)));
        shown.map(|p| format!(" {p:?}")).collect::<String>()
    };
    match packet {
        Packet::Connack(p) => format!("CONNACK {:?} present={}", p.reason, p.session_present),
        Packet::Publish(p) => format!(
            "PUBLISH {} {:?} {:?} dup={} retain={}{}",
            p.topic,
            String::from_utf8_lossy(p.payload),
            p.qos,
            p.dup,
            p.retain,
            list(p.properties)
        ),
        Packet::Puback(p) => format!("PUBACK {} {:?}", p.packet_id.get(), p.reason),
        Packet::Pubrec(p) => format!("PUBREC {} {:?}", p.packet_id.get(), p.reason),
        Packet::Pubrel(p) => format!("PUBREL {} {:?}", p.packet_id.get(), p.reason),
        Packet::Pubcomp(p) => format!("PUBCOMP {} {:?}", p.packet_id.get(), p.reason),
        Packet::Suback(p) => format!("SUBACK {} {:?}", p.packet_id.get(), p.reasons.iter().collect::<Vec<_>>()),
        Packet::Unsuback(p) => format!("UNSUBACK {} {:?}", p.packet_id.get(), p.reasons.iter().collect::<Vec<_>>()),
        Packet::Pingresp => "PINGRESP".to_owned(),
        Packet::Disconnect(p) => format!("DISCONNECT {:?}{}", p.reason, list(p.properties)),
        other => format!("{other:?}"),
    }
}

// Packets as bytes, written here once more, so that a mistake in our own encoder would show.

fn packet(first: u8, body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    assert!(body.len() < 128, "one byte of length");
    let mut packet = vec![first, body.len() as u8];
    packet.extend(body);
    packet
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u16).to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

const V4: &[u8] = &[];

/// `v5`: a property list with its length, or nothing in 3.1.1.
fn connect(level: u8, client: &str) -> Vec<u8> {
    let properties: &[u8] = if level == 5 { &[0] } else { V4 };
    packet(0x10, &[&text("MQTT"), &[level, 2, 0, 60], properties, &text(client)])
}

fn publish(flags: u8, topic: &str, id: Option<u16>, properties: &[u8], payload: &str) -> Vec<u8> {
    let id = id.map(u16::to_be_bytes).map(|b| b.to_vec()).unwrap_or_default();
    packet(0x30 | flags, &[&text(topic), &id, properties, payload.as_bytes()])
}

fn subscribe(id: u16, properties: &[u8], filter: &str, options: u8) -> Vec<u8> {
    packet(0x82, &[&id.to_be_bytes(), properties, &text(filter), &[options]])
}

fn unsubscribe(id: u16, properties: &[u8], filter: &str) -> Vec<u8> {
    packet(0xA2, &[&id.to_be_bytes(), properties, &text(filter)])
}

const PING: &[u8] = &[0xC0, 0];

/// In both versions: the name ends in ` 3.1.1` or ` 5`, and so does the client; the property list is empty.
fn scripts() -> Vec<Script> {
    let mut all = Vec::new();
    for (version, level, none) in [(Version::V311, 4, V4), (Version::V5, 5, &[0][..])] {
        let five = version == Version::V5;
        let mut add = |name: &'static str, pieces: Vec<Vec<u8>>| {
            let mut whole = vec![connect(level, &name.replace(' ', "-"))];
            whole.extend(pieces);
            all.push(Script { name, version, pieces: whole });
        };
        // Names stand in the table of explanations, so they are written out.
        macro_rules! both {
            ($name:literal, $($piece:expr),+ $(,)?) => {
                add(if five { concat!($name, " 5") } else { concat!($name, " 3.1.1") }, vec![$($piece),+])
            };
        }
        both!("ping", PING.to_vec());
        both!("second connect", connect(level, "again"));
        both!("qos 0 to oneself", subscribe(1, none, "d/q0", 0), publish(0, "d/q0", None, none, "x"));
        both!(
            "qos 1 to oneself",
            subscribe(1, none, "d/q1", 1),
            publish(2, "d/q1", Some(9), none, "x"),
            vec![0x40, 2, 0, 1],
            PING.to_vec()
        );
        both!(
            "qos 2 to oneself",
            subscribe(1, none, "d/q2", 2),
            publish(4, "d/q2", Some(9), none, "x"),
            vec![0x62, 2, 0, 9],
            vec![0x50, 2, 0, 1],
            vec![0x70, 2, 0, 1],
            PING.to_vec()
        );
        both!("granted qos is the limit", subscribe(1, none, "d/g", 0), publish(2, "d/g", Some(3), none, "x"));
        both!(
            "qos 2 twice",
            publish(4, "d/t", Some(7), none, "x"),
            publish(12, "d/t", Some(7), none, "x"),
            vec![0x62, 2, 0, 7]
        );
        both!("qos 3", publish(6, "d/q3", Some(1), none, "x"));
        both!("identifier 0", publish(2, "d/i", Some(0), none, "x"));
        both!("dup at qos 0", publish(8, "d/dup", None, none, "x"), PING.to_vec());
        both!("wildcard in a topic name", publish(0, "d/+", None, none, "x"));
        both!("topic of nothing", publish(0, "", None, none, "x"));
        both!("nul in a topic", publish(0, "d/\0", None, none, "x"));
        both!("broken utf-8 in a topic", packet(0x30, &[&[0, 2, 0xC3, 0x28], none, b"x"]));
        both!("nobody listens", publish(2, "d/nobody", Some(1), none, "x"));
        both!("pubrel of nothing", vec![0x62, 2, 0, 5], PING.to_vec());
        both!("puback of nothing", vec![0x40, 2, 0, 5], PING.to_vec());
        both!("pubrec of nothing", vec![0x50, 2, 0, 5], PING.to_vec());
        both!("pubcomp of nothing", vec![0x70, 2, 0, 5], PING.to_vec());
        both!("subscribe without its flag", packet(0x80, &[&[0, 1], none, &text("d"), &[0]]));
        both!("subscribe to nothing", packet(0x82, &[&[0, 1], none]));
        both!("subscribe at qos 3", subscribe(1, none, "d", 3));
        both!("subscribe with identifier 0", subscribe(0, none, "d", 0));
        both!("hash before the end", subscribe(1, none, "d/#/x", 0), PING.to_vec());
        both!("plus inside a level", subscribe(1, none, "d/x+", 0), PING.to_vec());
        both!("empty filter", subscribe(1, none, "", 0), PING.to_vec());
        both!(
            "two filters, one packet",
            packet(0x82, &[&[0, 1], none, &text("d/a"), &[1], &text("d/b"), &[2]]),
            unsubscribe(2, none, "d/a")
        );
        both!("subscribe again", subscribe(1, none, "d/again", 1), subscribe(2, none, "d/again", 0));
        both!("unsubscribe from nothing", unsubscribe(1, none, "d/never"));
        both!("unsubscribe without a filter", packet(0xA2, &[&[0, 1], none]));
        both!(
            "unsubscribed is silent",
            subscribe(1, none, "d/u", 0),
            unsubscribe(2, none, "d/u"),
            publish(0, "d/u", None, none, "x"),
            PING.to_vec()
        );
        both!(
            "overlapping filters",
            subscribe(1, none, "d/o/#", 0),
            subscribe(2, none, "d/o/+", 0),
            publish(0, "d/o/x", None, none, "x"),
            PING.to_vec()
        );
        both!(
            "hash sees the parent",
            subscribe(1, none, "d/parent/#", 0),
            publish(0, "d/parent", None, none, "x"),
            PING.to_vec()
        );
        both!(
            "dollar topics are shielded",
            subscribe(1, none, "+/shielded", 0),
            publish(0, "$dollar/shielded", None, none, "x"),
            PING.to_vec()
        );
        both!(
            "retained",
            publish(1, if five { "d/kept5" } else { "d/kept4" }, None, none, "kept"),
            subscribe(1, none, if five { "d/kept5" } else { "d/kept4" }, 0),
            publish(1, if five { "d/kept5" } else { "d/kept4" }, None, none, ""),
            unsubscribe(2, none, if five { "d/kept5" } else { "d/kept4" }),
            subscribe(3, none, if five { "d/kept5" } else { "d/kept4" }, 0),
            PING.to_vec()
        );
        both!("server's packet", vec![0xD0, 0]);
        both!("connack from a client", vec![0x20, 2, 0, 0]);
        both!("reserved type", vec![0x00, 0]);
        both!("flags on a ping", vec![0xC1, 0]);
        both!("length of five bytes", vec![0x30, 0xFF, 0xFF, 0xFF, 0xFF, 0x01]);
        both!("goodbye", vec![0xE0, 0]);
        both!("talk after goodbye", [&[0xE0, 0][..], PING].concat());
    }
    // Openings.
    let mut open = |name, version, pieces| all.push(Script { name, version, pieces });
    open("not a connect", Version::V311, vec![PING.to_vec()]);
    open("another protocol", Version::V311, vec![packet(0x10, &[&text("MQXX"), &[4, 2, 0, 60], &text("x1")])]);
    open("level 3", Version::V311, vec![packet(0x10, &[&text("MQIsdp"), &[3, 2, 0, 60], &text("x2")])]);
    open("level 6", Version::V5, vec![packet(0x10, &[&text("MQTT"), &[6, 2, 0, 60], &[0], &text("x3")])]);
    open("reserved connect flag", Version::V311, vec![packet(0x10, &[&text("MQTT"), &[4, 3, 0, 60], &text("x4")])]);
    open(
        "no name and no clean session",
        Version::V311,
        vec![packet(0x10, &[&text("MQTT"), &[4, 0, 0, 60], &text("")])],
    );
    open("no name", Version::V311, vec![connect(4, "")]);
    open(
        "password without a user",
        Version::V311,
        vec![packet(0x10, &[&text("MQTT"), &[4, 0x42, 0, 60], &text("x5"), &text("p")])],
    );
    open(
        "will qos 3",
        Version::V311,
        vec![packet(0x10, &[&text("MQTT"), &[4, 0x1E, 0, 60], &text("x6"), &text("w"), &text("p")])],
    );
    open(
        "connect with bytes to spare",
        Version::V311,
        vec![packet(0x10, &[&text("MQTT"), &[4, 2, 0, 60], &text("x7"), &[0]])],
    );
    open(
        "a session goes on",
        Version::V311,
        vec![
            packet(0x10, &[&text("MQTT"), &[4, 0, 0, 60], &text("goes-on")]),
            subscribe(1, V4, "d/s", 1),
            vec![0xE0, 0],
        ],
    );
    // MQTT 5 alone.
    let mut five = |name: &'static str, pieces: Vec<Vec<u8>>| {
        let mut whole = vec![connect(5, &name.replace(' ', "-"))];
        whole.extend(pieces);
        all.push(Script { name, version: Version::V5, pieces: whole });
    };
    five(
        "topic alias",
        vec![
            subscribe(1, &[0], "d/alias", 0),
            publish(0, "d/alias", None, &[3, 0x23, 0, 1], "1"),
            publish(0, "", None, &[3, 0x23, 0, 1], "2"),
        ],
    );
    five("topic alias 0", vec![publish(0, "d", None, &[3, 0x23, 0, 0], "x")]);
    five("topic alias unknown", vec![publish(0, "", None, &[3, 0x23, 0, 2], "x")]);
    five("topic alias too high", vec![publish(0, "d", None, &[3, 0x23, 0xFF, 0xFF], "x")]);
    five("subscription identifier", vec![subscribe(1, &[2, 0x0B, 7], "d/si", 0), publish(0, "d/si", None, &[0], "x")]);
    five("subscription identifier 0", vec![subscribe(1, &[2, 0x0B, 0], "d/si0", 0)]);
    five("subscription identifier from a client", vec![publish(0, "d/si", None, &[2, 0x0B, 7], "x")]);
    five("no local", vec![subscribe(1, &[0], "d/nl", 4), publish(0, "d/nl", None, &[0], "x"), PING.to_vec()]);
    five("no local on a shared subscription", vec![subscribe(1, &[0], "$share/g/d/nl", 4)]);
    five(
        "shared subscription",
        vec![subscribe(1, &[0], "$share/g/d/sh", 0), publish(0, "d/sh", None, &[0], "x"), PING.to_vec()],
    );
    five("share without a filter", vec![subscribe(1, &[0], "$share/g", 0), PING.to_vec()]);
    five("share with a wildcard name", vec![subscribe(1, &[0], "$share/+/d", 0), PING.to_vec()]);
    five("retain handling 3", vec![subscribe(1, &[0], "d", 0x30)]);
    five("reserved option bits", vec![subscribe(1, &[0], "d", 0xC0)]);
    five(
        "retain as published",
        vec![subscribe(1, &[0], "d/rap", 8), publish(1, "d/rap", None, &[0], "x"), publish(1, "d/rap", None, &[0], "")],
    );
    five("payload that is not text", vec![packet(0x30, &[&text("d/p"), &[2, 1, 1], &[0xFF]]), PING.to_vec()]);
    five("payload format 2", vec![publish(0, "d/p", None, &[2, 1, 2], "x")]);
    five("property twice", vec![publish(0, "d/p", None, &[4, 1, 1, 1, 1], "x")]);
    five("property of another packet", vec![publish(0, "d/p", None, &[5, 0x11, 0, 0, 0, 1], "x")]);
    five("unknown property", vec![publish(0, "d/p", None, &[2, 0x7F, 0], "x")]);
    five(
        "properties travel",
        vec![
            subscribe(1, &[0], "d/pt", 0),
            publish(
                0,
                "d/pt",
                None,
                &[&[21, 1, 1, 3, 0, 1, b't', 8, 0, 1, b'r', 9, 0, 1, 7][..], &[0x26, 0, 1, b'k', 0, 1, b'v']].concat(),
                "x",
            ),
        ],
    );
    five("response topic with a wildcard", vec![publish(0, "d", None, &[4, 8, 0, 1, b'#'], "x")]);
    five("auth without a method", vec![vec![0xF0, 2, 0x19, 0]]);
    five("goodbye that makes the session last", vec![packet(0xE0, &[&[0, 5, 0x11, 0, 0, 0, 9]])]);
    five("goodbye with an unknown reason", vec![packet(0xE0, &[&[0x55, 0]])]);
    five("length not in its shortest form", vec![vec![0x30, 0x84, 0x00, 0, 1, b'd', 0]]);
    five("puback with a reason of suback", vec![packet(0x40, &[&[0, 1, 1, 0]])]);
    all
}

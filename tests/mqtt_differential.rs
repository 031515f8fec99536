//! The same bytes to Tidegate, to mosquitto and to rumqttd; every difference between their answers is explained below, and an explanation that
//! is no longer needed is an error too.
#![allow(clippy::unwrap_used)]

mod support;

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
const EXPLAINED: &[(&str, Peer, &str)] = &[];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    Mosquitto,
    Rumqttd,
}

#[test]
fn every_difference_to_mosquitto_and_rumqttd_is_explained() {
    let wanted = Wanted { extra: "\n[identity]\nanonymous_role = \"guest\"\n".into(), ..Wanted::default() };
    let mut gateway = Gateway::prepare(&wanted);
    let policy = "[[rule]]\nname = \"all\"\nwho = [\"anyone\"]\ndo = [\"publish\", \"subscribe\", \"read\"]\non = [\"#\", \"/#\"]\n";
    std::fs::write(gateway.path("policy.toml"), policy).unwrap();
    gateway.run();
    let folder = tempfile::tempdir().unwrap();
    let (_mosquitto, mosquitto) = support::mosquitto(folder.path());
    let rumqttd = rumqttd();
    let scripts = scripts();
    let transcripts = |of: fn(&Peers, Version) -> SocketAddr| {
        let peers = Peers { tidegate: gateway.plain, mosquitto, rumqttd };
        thread::scope(|scope| {
            let running: Vec<_> = scripts
                .iter()
                .map(|script| scope.spawn(move || transcript(of(&peers, script.version), script)))
                .collect();
            running.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        })
    };
    let ours = transcripts(|peers, _| peers.tidegate);
    let mut faults = Vec::new();
    for (peer, theirs) in [
        (Peer::Mosquitto, transcripts(|peers, _| peers.mosquitto)),
        (Peer::Rumqttd, transcripts(|peers, version| peers.rumqttd[usize::from(version == Version::V5)])),
    ] {
        for ((script, ours), theirs) in scripts.iter().zip(&ours).zip(&theirs) {
            let explained = EXPLAINED.iter().any(|(name, who, _)| *name == script.name && *who == peer);
            match (ours == theirs, explained) {
                (true, false) | (false, true) => {}
                (true, true) => {
                    faults.push(format!("{}: {peer:?} answers as we do, the explanation can go", script.name))
                }
                (false, false) => {
                    faults.push(format!("{}: {peer:?}\n    ours   {ours:?}\n    theirs {theirs:?}", script.name))
                }
            }
        }
    }
    for (name, _, _) in EXPLAINED {
        assert!(scripts.iter().any(|script| script.name == *name), "{name} is no script");
    }
    assert!(faults.is_empty(), "{} differences\n{}", faults.len(), faults.join("\n"));
}

#[derive(Clone, Copy)]
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
fn transcript(server: SocketAddr, script: &Script) -> Vec<String> {
    let mut stream = TcpStream::connect(server).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(QUIET)).unwrap();
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
        said.push(format!("unreadable {read:02x?}"));
    }
    said
}

/// Silence after which a server is taken to have said everything.
const QUIET: Duration = Duration::from_millis(500);

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
                &[&[22, 1, 1, 3, 0, 1, b't', 8, 0, 1, b'r', 9, 0, 1, 7][..], &[0x26, 0, 1, b'k', 0, 1, b'v']].concat(),
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

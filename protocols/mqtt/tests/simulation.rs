//! A client model and the server's connection over a stream that splits, breaks and loses, in virtual time, from a seed.
//!
//! What must hold, whatever happens: an accepted QoS 1 message was seen at least once, a QoS 2 message exactly once, first sights come in
//! the order of sending, answers to one connection's PUBLISHes come in their order, and all of it for both directions. A failure prints
//! its seed; `TIDEGATE_SEED=n` replays it.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use common::Note;
use tidegate_mqtt::{
    Accept, Ack, Config, Connect, Connection, Event, Handle, Output, Packet, PacketId, Properties, PropertiesBuf,
    Property, Publish, Published, Qos, Reason, SessionState, Version, decode,
};

/// xorshift64*: enough for choices, the same everywhere.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Answer,
    Complete,
}

struct Client {
    version: Version,
    connected: bool,
    next_id: u16,
    /// Own messages that the server has not finished with, in the order of sending.
    in_flight: VecDeque<(PacketId, Qos, u32, Step)>,
    /// Identifiers of PUBLISHes on this connection whose answer is due, in order.
    owed: VecDeque<PacketId>,
    to_send: VecDeque<(Qos, u32)>,
    /// Incoming QoS 2 identifiers between PUBREC and PUBREL.
    held: BTreeSet<PacketId>,
    received: Vec<(Qos, u32)>,
    accepted: BTreeSet<u32>,
    refused: BTreeSet<u32>,
    window: usize,
    out: BytesMut,
}

fn topic(qos: Qos) -> &'static str {
    ["q0", "q1", "q2"][qos as usize]
}

impl Client {
    fn send(&mut self, packet: Packet<'_>) {
        packet.encode(self.version, &mut self.out).unwrap();
    }

    fn connect(&mut self, window: usize) {
        self.connected = false;
        self.owed.clear();
        self.out.clear();
        self.window = window;
        let list: PropertiesBuf =
            [Property::SessionExpiry(1000), Property::ReceiveMaximum(window as u16)].into_iter().collect();
        let properties = if self.version == Version::V5 { list.as_properties() } else { Properties::EMPTY };
        self.send(Packet::Connect(Connect {
            version: self.version,
            clean_start: false,
            keep_alive: 100,
            properties,
            client_id: "sim",
            will: None,
            username: None,
            password: None,
        }));
    }

    fn publish(&mut self, id: PacketId, qos: Qos, n: u32, dup: bool) {
        let payload = n.to_be_bytes();
        let packet_id = Some(id);
        self.owed.push_back(id);
        let properties = Properties::EMPTY;
        self.send(Packet::Publish(Publish {
            dup,
            qos,
            retain: false,
            topic: topic(qos),
            packet_id,
            properties,
            payload: &payload,
        }));
    }

    fn ack(&mut self, kind: fn(Ack<'static>) -> Packet<'static>, id: PacketId) {
        self.send(kind(Ack { packet_id: id, reason: Reason::Success, properties: Properties::EMPTY }));
    }

    /// Sends something new, if the server's window (8, see the configuration below) allows.
    fn produce(&mut self) {
        if !self.connected || self.in_flight.len() >= 8 {
            return;
        }
        if let Some((qos, n)) = self.to_send.pop_front() {
            let id = PacketId::new(self.next_id).unwrap();
            self.next_id = self.next_id.checked_add(1).unwrap_or(1);
            self.in_flight.push_back((id, qos, n, Step::Answer));
            self.publish(id, qos, n, false);
        }
    }

    fn take(&mut self, packet: Packet<'_>) {
        match packet {
            Packet::Connack(c) => {
                assert_eq!(c.reason, Reason::Success);
                self.connected = true;
                for (id, qos, n, step) in self.in_flight.clone() {
                    match step {
                        Step::Answer => self.publish(id, qos, n, true),
                        Step::Complete => self.ack(Packet::Pubrel, id),
                    }
                }
            }
            Packet::Puback(a) => self.answered(a, Qos::AtLeastOnce),
            Packet::Pubrec(a) => self.answered(a, Qos::ExactlyOnce),
            Packet::Pubcomp(a) => {
                let at = self.in_flight.iter().position(|e| e.0 == a.packet_id).unwrap();
                assert_eq!(self.in_flight.remove(at).unwrap().3, Step::Complete);
            }
            Packet::Publish(p) => {
                let n = u32::from_be_bytes(p.payload.try_into().unwrap());
                assert_eq!(p.topic, topic(p.qos));
                match (p.qos, p.packet_id) {
                    (Qos::AtMostOnce, _) => self.received.push((p.qos, n)),
                    (Qos::AtLeastOnce, Some(id)) => {
                        self.received.push((p.qos, n));
                        self.ack(Packet::Puback, id);
                    }
                    (_, Some(id)) => {
                        if self.held.insert(id) {
                            self.received.push((p.qos, n));
                        }
                        self.ack(Packet::Pubrec, id);
                    }
                    (_, None) => panic!("no identifier"),
                }
            }
            Packet::Pubrel(a) => {
                self.held.remove(&a.packet_id);
                self.ack(Packet::Pubcomp, a.packet_id);
            }
            Packet::Pingresp => {}
            other => panic!("{other:?}"),
        }
    }

    fn answered(&mut self, a: Ack<'_>, qos: Qos) {
        assert_eq!(self.owed.pop_front(), Some(a.packet_id), "answers come in order");
        let at = self.in_flight.iter().position(|e| e.0 == a.packet_id).unwrap();
        let entry = &mut self.in_flight[at];
        assert_eq!((entry.1, entry.3), (qos, Step::Answer));
        if a.reason.is_error() {
            self.refused.insert(entry.2);
            self.in_flight.remove(at);
            return;
        }
        self.accepted.insert(entry.2);
        if qos == Qos::ExactlyOnce {
            entry.3 = Step::Complete;
            self.ack(Packet::Pubrel, a.packet_id);
        } else {
            self.in_flight.remove(at);
        }
    }
}

/// The gateway's part: decides late and out of order, keeps the session between connections.
#[derive(Default)]
struct App {
    session: Option<SessionState<Note>>,
    undecided: Vec<(Handle, Qos, u32)>,
    seen: Vec<(Qos, u32)>,
    accepted: BTreeMap<u32, u32>,
    refused: BTreeSet<u32>,
    to_send: VecDeque<(Qos, u32)>,
    delivered: usize,
    /// The session is written down: PUBREL (true) and PUBCOMP wait for that.
    stored: bool,
    unwritten: VecDeque<(bool, PacketId)>,
}

impl App {
    fn decide(&mut self, conn: &mut Connection<Note>, out: &mut BytesMut, chance: &mut Chance, refusals: bool) {
        match self.unwritten.pop_front() {
            Some((true, id)) => conn.release(id, out),
            Some((false, id)) => conn.complete(id, out),
            None => {}
        }
        if self.undecided.is_empty() {
            return;
        }
        let (handle, _, n) = self.undecided.swap_remove(chance.below(self.undecided.len()));
        if refusals && chance.one_in(12) && !self.accepted.contains_key(&n) {
            self.refused.insert(n);
            conn.ack(handle, Reason::QuotaExceeded, Some("full"), out);
        } else {
            *self.accepted.entry(n).or_default() += 1;
            conn.ack(handle, Reason::Success, None, out);
        }
    }

    fn publish(&mut self, conn: &mut Connection<Note>, now: Instant, out: &mut BytesMut) {
        while let Some((qos, n)) = self.to_send.front().copied() {
            let id = PacketId::new(n as u16).filter(|_| self.stored);
            let note = Note(Arc::new((topic(qos).into(), n.to_be_bytes().into(), Vec::new(), id)));
            match conn.publish(now, &note, qos, false, out) {
                Published::Sent => self.to_send.pop_front(),
                Published::WindowFull | Published::Closed => return,
                Published::TooLarge => panic!("no limit was set"),
            };
        }
    }
}

fn events(conn: &mut Connection<Note>, app: &mut App, now: Instant, out: &mut BytesMut) {
    loop {
        match conn.poll_output(now, out) {
            Output::Event(Event::Connect(c)) => {
                assert_eq!(&*c.client_id, "sim");
                conn.accept(Accept { session: app.session.take(), stored: app.stored, ..Accept::default() }, out);
            }
            Output::Event(Event::Publish(p)) => {
                let n = u32::from_be_bytes(p.payload().try_into().unwrap());
                assert_eq!(p.topic(), topic(p.qos));
                app.seen.push((p.qos, n));
                app.undecided.push((p.handle.unwrap(), p.qos, n));
            }
            Output::Event(Event::Delivered { reason, message }) => {
                assert_eq!(reason, Reason::Success);
                app.delivered += 1;
                if let (Some(id), true) = (message.0.3, message.0.0 == topic(Qos::ExactlyOnce)) {
                    app.unwritten.push_back((true, id));
                }
            }
            Output::Event(Event::Released { packet_id }) => app.unwritten.push_back((false, packet_id)),
            Output::Event(Event::Completed { .. }) => {}
            Output::Event(other) => panic!("{other:?}"),
            Output::Close(close) => panic!("closed: {close:?}"),
            Output::Timeout(_) => return,
        }
    }
}

/// First sights of each message, per quality of service, come in the order of sending.
fn check_order(seen: &[(Qos, u32)], what: &str) {
    for qos in [Qos::AtLeastOnce, Qos::ExactlyOnce] {
        let mut known = BTreeSet::new();
        let first: Vec<u32> = seen.iter().filter(|s| s.0 == qos && known.insert(s.1)).map(|s| s.1).collect();
        assert!(first.is_sorted(), "{what} at {qos:?}: {first:?}");
    }
}

fn run(seed: u64) {
    let mut chance = Chance(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let version = if seed.is_multiple_of(2) { Version::V311 } else { Version::V5 };
    let config = Arc::new(Config { receive_maximum: 8, in_flight_max: 8, burst_bytes_max: 40, ..Config::default() });
    let count = 40;
    let mut messages = |offset: u32| -> VecDeque<(Qos, u32)> {
        (0..count).map(|n| (Qos::from_u8(1 + chance.below(2) as u8).unwrap(), offset + n)).collect()
    };
    let up = messages(0);
    let down = messages(1000);
    let mut client = Client {
        version,
        connected: false,
        next_id: 65_520,
        in_flight: VecDeque::new(),
        owed: VecDeque::new(),
        to_send: up.clone(),
        held: BTreeSet::new(),
        received: Vec::new(),
        accepted: BTreeSet::new(),
        refused: BTreeSet::new(),
        window: 8,
        out: BytesMut::new(),
    };
    let stored = seed % 4 >= 2;
    let mut app = App { to_send: down.clone(), session: Some(SessionState::new()), stored, ..App::default() };
    let mut now = Instant::now();
    let mut breaks = 6;
    let mut rounds = 0;
    loop {
        // One connection.
        let mut conn = Connection::<Note>::new(config.clone(), now);
        client.connect(1 + chance.below(8));
        let (mut to_server, mut to_client) = (BytesMut::new(), BytesMut::new());
        let (mut server_in, mut client_in) = (BytesMut::new(), BytesMut::new());
        let mut quiet = 0;
        loop {
            rounds += 1;
            assert!(rounds < 100_000, "no end: {} left", client.in_flight.len());
            now += Duration::from_millis(chance.below(50) as u64);
            if breaks > 0 && chance.one_in(60) {
                break;
            }
            let mut moved = false;
            match chance.below(6) {
                0 => client.produce(),
                1 => app.decide(&mut conn, &mut to_client, &mut chance, version == Version::V5),
                2 if conn.is_connected() => app.publish(&mut conn, now, &mut to_client),
                3 => {
                    to_server.unsplit(client.out.split());
                    let n = chance.below(to_server.len() + 1);
                    server_in.extend_from_slice(&to_server.split_to(n));
                    moved = n > 0;
                }
                4 => {
                    while conn.handle_input(now, &mut server_in, &mut to_client) {
                        events(&mut conn, &mut app, now, &mut to_client);
                        moved = true;
                    }
                    events(&mut conn, &mut app, now, &mut to_client);
                }
                _ => {
                    let n = chance.below(to_client.len() + 1);
                    client_in.extend_from_slice(&to_client.split_to(n));
                    while let Some((packet, taken)) = decode(&client_in.clone(), version, usize::MAX).unwrap() {
                        client.take(packet);
                        let _ = client_in.split_to(taken);
                        moved = true;
                    }
                }
            }
            conn.handle_timeout(now, &mut to_client);
            let idle = !moved && to_server.is_empty() && client.out.is_empty() && to_client.is_empty();
            let done = client.to_send.is_empty() && client.in_flight.is_empty() && app.to_send.is_empty();
            quiet = if idle { quiet + 1 } else { 0 };
            if done
                && app.delivered + app.to_send.len() >= down.len()
                && quiet > 60
                && app.undecided.is_empty()
                && app.unwritten.is_empty()
            {
                // All said: nothing may be left in flight.
                assert!(conn.take_session().in_flight().next().is_none());
                verify(&client, &app, &up, &down);
                return;
            }
            if idle && quiet % 200 == 199 {
                // Both wait: a ping keeps the connection.
                client.send(Packet::Pingreq);
            }
        }
        // The break: what was on its way is lost, and decisions may still come.
        breaks -= 1;
        conn.handle_eof();
        while !app.undecided.is_empty() && !chance.one_in(3) {
            app.decide(&mut conn, &mut to_client, &mut chance, false);
        }
        app.undecided.clear();
        app.unwritten.clear();
        if conn.is_connected() || app.session.is_none() {
            app.session = Some(conn.take_session());
        }
    }
}

fn verify(client: &Client, app: &App, up: &VecDeque<(Qos, u32)>, down: &VecDeque<(Qos, u32)>) {
    for (qos, n) in up {
        let times = app.accepted.get(n).copied().unwrap_or(0);
        assert!(client.accepted.contains(n) || client.refused.contains(n), "{n} never got an answer");
        if client.accepted.contains(n) {
            assert!(times >= 1, "{n} was acknowledged and not accepted");
        }
        if *qos == Qos::ExactlyOnce {
            assert!(times <= 1, "{n} was accepted {times} times");
        }
        if client.refused.contains(n) && *qos == Qos::ExactlyOnce {
            assert_eq!(times, 0, "{n} was refused and accepted");
        }
    }
    for (qos, n) in down {
        let times = client.received.iter().filter(|r| r.1 == *n).count();
        assert!(times >= 1, "{n} never arrived");
        if *qos == Qos::ExactlyOnce {
            assert_eq!(times, 1, "{n} arrived {times} times");
        }
    }
    check_order(&app.seen, "up");
    check_order(&client.received, "down");
}

#[test]
fn nothing_is_lost_doubled_or_reordered_whatever_the_stream_does() {
    let replay = std::env::var("TIDEGATE_SEED").ok().and_then(|s| s.parse().ok());
    let seeds = replay.map_or(0..400, |seed: u64| seed..seed + 1);
    for seed in seeds {
        let outcome = std::panic::catch_unwind(|| run(seed));
        assert!(outcome.is_ok(), "replay with TIDEGATE_SEED={seed}");
    }
}

/// The same bytes in any pieces are the same packets.
#[test]
fn how_the_input_is_split_makes_no_difference() {
    use Version::V5;
    let mut bytes = common::connect(V5, "c", &[]);
    for n in 1..50_u16 {
        let payload = vec![n as u8; usize::from(n) * 7];
        bytes.extend(common::publish(V5, "a/b", Qos::from_u8((n % 3) as u8).unwrap(), n, &payload));
        bytes.extend(common::subscribe(V5, n, &["x/+", "y/#"]));
    }
    let transcript = |pieces: &mut dyn FnMut() -> usize| {
        let now = Instant::now();
        let mut conn = Connection::<Note>::new(Arc::new(Config::default()), now);
        let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
        let mut log = String::new();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (head, tail) = rest.split_at(pieces().clamp(1, rest.len()));
            input.extend_from_slice(head);
            rest = tail;
            while conn.handle_input(now, &mut input, &mut out) {
                while let Output::Event(event) = conn.poll_output(now, &mut out) {
                    if matches!(event, Event::Connect(_)) {
                        conn.accept(Accept::default(), &mut out);
                    }
                    log.push_str(&format!("{event:?}\n"));
                }
            }
        }
        assert!(!conn.is_closed());
        log
    };
    let whole = transcript(&mut || usize::MAX);
    assert_eq!(whole.lines().count(), 99);
    assert_eq!(transcript(&mut || 1), whole);
    for seed in 1..20 {
        let mut chance = Chance(seed);
        assert_eq!(transcript(&mut || 1 + chance.below(40)), whole, "seed {seed}");
    }
}

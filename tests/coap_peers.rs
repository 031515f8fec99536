//! Many peers on one port: each comes from an address and a port of its own, asks once, and is never heard of again. What the gateway keeps of them stays
//! within the configured bounds, whatever they ask for.
//!
//! `TIDEGATE_PEERS=100000 cargo test --release --test coap_peers -- --nocapture` is the full form; it prints what it has measured.
#![allow(clippy::unwrap_used)]

mod support;

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use coap_lite::{CoapOption, MessageClass, MessageType, Packet, RequestType};
use support::coap::CoapClient;
use support::{Gateway, Wanted};

const WORKERS: u64 = 2;
const SESSIONS: u64 = 256;
const EXCHANGES: u64 = 1024;
const OBSERVERS: u64 = 64;
const BUCKETS: u64 = 1024;
const BODIES_KB: u64 = 256;
const AT_ONCE: usize = 8;

/// The sum of `docs/limits.md` for what a CoAP peer can make grow, in kB.
const BOUND_KB: u64 =
    WORKERS * (EXCHANGES + OBSERVERS / 2 + BODIES_KB) + WORKERS * SESSIONS * 2 + 3 * BUCKETS * 64 / 1024;
/// What the allocator and the threads take beside it, once.
const ONCE_KB: u64 = 6 * 1024;
/// What may come between a quarter of the peers and all of them: less than 150 bytes for each of the short form's.
const LATER_KB: u64 = 2 * 1024;

/// What a peer asks, and the codes that may answer it.
fn question(at: u32, token: &str) -> (Packet, &'static [&'static str]) {
    let credential = format!("t={token}");
    let (method, path, query, codes): (_, &[&str], _, &[_]) = match at % 5 {
        0 => (RequestType::Put, &["ps", "dev", "many", "x"], credential, &["2.04"]),
        1 => (RequestType::Get, &[".well-known", "core"], String::new(), &["2.05"]),
        2 => (RequestType::Get, &["s"], "t=bm90IGEgdG9rZW4".to_owned(), &["4.01", "4.29"]),
        3 => (RequestType::Get, &["s"], credential, &["2.05"]),
        // The first block of a body whose others never come.
        _ => (RequestType::Post, &["t"], credential, &["2.31", "5.03"]),
    };
    let mut packet = Packet::new();
    packet.header.set_type(MessageType::Confirmable);
    packet.header.code = MessageClass::Request(method);
    packet.header.message_id = at as u16;
    packet.set_token(at.to_be_bytes().to_vec());
    path.iter().for_each(|segment| packet.add_option(CoapOption::UriPath, segment.as_bytes().to_vec()));
    if !query.is_empty() {
        packet.add_option(CoapOption::UriQuery, query.into_bytes());
    }
    match at % 5 {
        0 => packet.payload = b"1".to_vec(),
        3 => packet.add_option(CoapOption::Observe, vec![]),
        4 => {
            packet.add_option(CoapOption::Block1, vec![0x0A]);
            packet.payload = vec![b'x'; 64];
        }
        _ => {}
    }
    (packet, codes)
}

/// Asks from many addresses, some at a time.
fn ask_all(gateway: SocketAddr, peers: Range<u32>, token: &str) {
    thread::scope(|scope| {
        for first in 0..AT_ONCE {
            let peers = peers.clone();
            scope.spawn(move || peers.skip(first).step_by(AT_ONCE).for_each(|at| ask(gateway, at, token)));
        }
    });
}

/// Asks from an address that no other peer has, and sends again what was lost.
fn ask(gateway: SocketAddr, at: u32, token: &str) {
    let [high, middle, low] = [(at >> 16) as u8, (at >> 8) as u8, at as u8];
    let socket = UdpSocket::bind((Ipv4Addr::new(127, 1 + high, middle, low), 0)).unwrap();
    socket.connect(gateway).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let (question, codes) = question(at, token);
    let mut buffer = [0; 2048];
    for _ in 0..5 {
        socket.send(&question.to_bytes().unwrap()).unwrap();
        let Ok(length) = socket.recv(&mut buffer) else { continue };
        let answer = Packet::from_bytes(&buffer[..length]).unwrap();
        assert_eq!(answer.get_token(), question.get_token(), "peer {at}");
        let code = answer.header.get_code();
        assert!(codes.contains(&code.as_str()), "peer {at}: {code}");
        return;
    }
    panic!("peer {at} was never answered");
}

#[test]
fn peers_without_number_grow_nothing_beyond_its_bound() {
    let peers: u32 =
        std::env::var("TIDEGATE_PEERS").map_or(20_000, |peers| peers.parse().expect("TIDEGATE_PEERS is a number"));
    assert!((1_000..=8_000_000).contains(&peers), "a loopback address for each of 1,000 to 8,000,000 peers");
    let limits = format!(
        "coap_sessions_max = {SESSIONS}\nexchanges_max = {EXCHANGES}\nobservers_max = {OBSERVERS}\nbuckets_max = {BUCKETS}\n\
         blockwise_bytes_max = \"64KiB\"\nblockwise_bytes_total_max = \"{BODIES_KB}KiB\"\n"
    );
    let gateway = Gateway::start(&Wanted { limits, ..Wanted::default() });
    let device = gateway.add_device("many");
    let token = gateway.coap_token(&mut CoapClient::connect(gateway.coap).unwrap(), &device);
    let sessions = || gateway.metric("tidegate_sessions_open", "coap") as u64;
    let (before, began) = (gateway.resident_kb(), Instant::now());
    ask_all(gateway.coap, 0..peers / 4, &token);
    let (quarter, open) = (gateway.resident_kb(), sessions());
    assert!(open <= WORKERS * SESSIONS, "{open} sessions");
    // The tables are full: that is what is measured here.
    assert!(open > SESSIONS, "only {open} sessions");
    ask_all(gateway.coap, peers / 4..peers, &token);
    let (after, open, took) = (gateway.resident_kb(), sessions(), began.elapsed().as_secs_f64());
    println!(
        "{peers} peers in {took:.1} s, {open} sessions; resident {before} kB before, {quarter} kB at a quarter, {after} kB after; bound {BOUND_KB} kB"
    );
    assert!(open <= WORKERS * SESSIONS, "{open} sessions");
    assert!(after <= before + BOUND_KB + ONCE_KB, "{before} kB before, {after} kB after");
    assert!(after <= quarter + LATER_KB, "{quarter} kB at a quarter, {after} kB after");
}

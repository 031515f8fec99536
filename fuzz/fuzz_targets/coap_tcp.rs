//! One connection of CoAP over TCP against any byte stream, cut anywhere, with an application that answers in varying ways.
//! The first two bytes steer cuts and decisions. What comes back must be messages that another connection of ours reads, within the limits.
#![no_main]

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use tidegate_coap::client::Call;
use tidegate_coap::endpoint::Delivery;
use tidegate_coap::tcp::{Config, Connection, Received};
use tidegate_coap::{Code, Event, Notification, Observe, ObserverId, Response};

fuzz_target!(|data: &[u8]| {
    let [cut, mood, stream @ ..] = data else { return };
    let peer = SocketAddr::from((Ipv4Addr::LOCALHOST, 5000));
    let config = Config {
        message_bytes_max: 4096,
        output_bytes_max: 8192,
        requests_max: 4,
        observers_max: 3,
        ..Config::default()
    };
    let mut connection = Connection::new(config.clone(), peer);
    // Two calls of our own are under way, one of them an observation.
    let asks = mood & 16 == 0;
    for observe in [false, true].into_iter().filter(|_| asks) {
        let call = Call { observe, ..Call::get(vec!["a".into()], Duration::from_secs(5)) };
        connection.call(call).expect("there is room for two");
    }
    let mut observers: Vec<ObserverId> = Vec::new();
    let mut waiting = Vec::new();
    let (mut input, mut sent) = (Vec::new(), Vec::new());
    let mut aborted = false;
    'stream: for (round, chunk) in stream.chunks(usize::from(*cut).max(1)).enumerate() {
        input.extend_from_slice(chunk);
        while connection.wants_input() {
            let (taken, received) = match connection.handle_input(&input) {
                Ok(Some(taken)) => taken,
                Ok(None) => break,
                Err(_) => {
                    aborted = true;
                    break 'stream;
                }
            };
            assert!(taken > 0 && taken <= input.len());
            match received {
                Received::Nothing => {}
                Received::Closing => break 'stream,
                Received::Reply(_) => assert!(asks, "nothing was asked"),
                Received::Request(request) => {
                    let body = [b'x'; 5000];
                    let length = usize::from(*mood) * 16 + round % 700;
                    let answer = Response::new(Code::CONTENT).content(Some(0), &body[..length]);
                    let (handle, observe) = (request.handle, request.observe);
                    if observe == Some(Observe::Register) && mood & 1 == 0 {
                        observers.extend(connection.observe(handle, &answer).expect("it is open"));
                    } else if mood & 2 == 0 {
                        connection.respond(handle, &answer).expect("it is open");
                    } else {
                        waiting.push(handle);
                    }
                }
            }
            input.drain(..taken);
            assert!(connection.open_requests() <= config.requests_max);
        }
        if mood & 4 == 0 {
            if let Some(handle) = waiting.pop() {
                connection.respond(handle, &Response::new(Code::FORBIDDEN).diagnostic("no")).expect("it is open");
                assert!(connection.respond(handle, &Response::new(Code::FORBIDDEN)).is_err(), "answered twice");
            }
        }
        for observer in &observers {
            let delivery = if mood & 8 == 0 { Delivery::Latest } else { Delivery::Each { ticket: 1 } };
            let value = Bytes::from_static(&[b'v'; 300]);
            let _ = connection.notify(*observer, &Notification { delivery, ..Notification::content(None, value) });
        }
        while let Some(event) = connection.poll_event() {
            if let Event::ObserverGone { observer, .. } = event {
                observers.retain(|known| *known != observer);
            }
        }
        assert!(observers.len() <= config.observers_max);
        // A peer that reads slowly: some of it, or nothing.
        let bytes = connection.output().len().min(usize::from(*mood) * 8);
        sent.extend_from_slice(&connection.output()[..bytes]);
        connection.handle_sent(bytes);
    }
    sent.extend_from_slice(connection.output());
    reads_whole(&sent, peer, aborted);
});

/// What we send, read by the engine itself: a CSM first, whole messages, and an Abort last exactly when we gave up.
fn reads_whole(sent: &[u8], peer: SocketAddr, aborted: bool) {
    let limits = Config { message_bytes_max: 1 << 20, output_bytes_max: usize::MAX, ..Config::default() };
    let mut other = Connection::new(limits, peer);
    let mut left = sent;
    let mut closing = false;
    while !left.is_empty() {
        assert!(!closing, "something follows our Abort");
        let (taken, received) = other.handle_input(left).expect("what we send is CoAP").expect("and whole");
        closing = matches!(received, Received::Closing);
        left = &left[taken..];
    }
    assert_eq!(closing, aborted);
}

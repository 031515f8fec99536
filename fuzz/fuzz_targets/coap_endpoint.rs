//! The CoAP endpoint against any sequence of datagrams from three peers, with time passing and an application that answers in varying ways.
//! Input: records of `steer, length, bytes`. Everything sent must be valid CoAP, and what is kept stays within the limits.
#![no_main]

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use tidegate_coap::endpoint::{Config, Delivery, Received};
use tidegate_coap::{Code, Endpoint, Event, MessageView, Notification, Observe, ObserverId, Output, Response};

fuzz_target!(|data: &[u8]| {
    let mut now = Instant::now();
    let config =
        Config { exchanges_max: 64, requests_max: 16, observers_max: 8, outgoing_max: 16, ..Config::default() };
    let limits = (config.exchanges_max, config.requests_max, config.outgoing_max);
    let mut endpoint = Endpoint::new(config, now, [7; 32]);
    let mut observers: Vec<ObserverId> = Vec::new();
    let mut waiting = Vec::new();
    let mut left = data;
    while let [steer, length, rest @ ..] = left {
        let (datagram, rest) = rest.split_at(usize::from(*length).min(rest.len()));
        left = rest;
        now += Duration::from_millis(u64::from(*steer) * 40);
        endpoint.handle_timeout(now);
        let peer = SocketAddr::from((Ipv4Addr::LOCALHOST, 5000 + u16::from(steer % 3)));
        match endpoint.handle_datagram(now, peer, datagram) {
            Received::Nothing | Received::Reply(_) => {}
            Received::Upload(request) if steer & 4 == 0 => {
                endpoint.accept_upload(now, &request).expect("a request just received can be answered");
            }
            Received::Request(request) | Received::Upload(request) => {
                let answer = Response::new(Code::CONTENT).content(Some(0), &[b'x'; 2000][..usize::from(*length) * 7]);
                if request.observe == Some(Observe::Register) && steer & 8 == 0 {
                    observers.extend(endpoint.observe(now, request.handle, &answer).expect("it is open"));
                } else if steer & 16 == 0 {
                    endpoint.respond(now, request.handle, &answer).expect("it is open");
                } else {
                    waiting.push(request.handle);
                }
            }
        }
        if steer & 32 != 0 {
            if let Some(handle) = waiting.pop() {
                let _ = endpoint.respond(now, handle, &Response::new(Code::FORBIDDEN).diagnostic("no"));
            }
            for observer in &observers {
                let delivery = if steer & 64 == 0 { Delivery::Latest } else { Delivery::Each { ticket: 1 } };
                let value = Bytes::from_static(b"value");
                let notification = Notification { delivery, ..Notification::content(None, value) };
                let _ = endpoint.notify(now, *observer, notification);
            }
        }
        drain(&mut endpoint, &mut observers);
        let counters = endpoint.counters();
        assert!(counters.exchanges <= limits.0, "{counters:?}");
        assert!(counters.requests_open <= limits.1, "{counters:?}");
        assert!(counters.outgoing <= limits.2, "{counters:?}");
    }
});

fn drain(endpoint: &mut Endpoint, observers: &mut Vec<ObserverId>) {
    loop {
        match endpoint.poll_output() {
            Output::Timeout(_) => return,
            Output::Transmit { bytes, .. } => {
                MessageView::parse(bytes).expect("what we send is CoAP");
            }
            Output::Event(Event::ObserverGone { observer, .. }) => observers.retain(|known| *known != observer),
            Output::Event(Event::Delivered { .. } | Event::Refresh { .. } | Event::CallFailed { .. }) => {}
        }
    }
}

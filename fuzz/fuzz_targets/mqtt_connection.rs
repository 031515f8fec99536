//! One MQTT connection against any byte stream, cut anywhere, with an application that answers everything in varying ways.
//! The first two bytes steer cuts and decisions, the rest is what the client sends. Everything that comes back must be valid packets.
#![no_main]

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use tidegate_mqtt::{Accept, Config, Connection, Event, Outgoing, Output, Qos, Reason, decode};

#[derive(Clone)]
struct Small;

impl Outgoing for Small {
    fn topic(&self) -> &str {
        "a/b"
    }

    fn payload(&self) -> &[u8] {
        b"payload"
    }
}

fuzz_target!(|data: &[u8]| {
    let [cut, mood, stream @ ..] = data else { return };
    let mut now = Instant::now();
    let config = Config { packet_bytes_max: 4096, connect_bytes_max: 2048, receive_maximum: 4, ..Config::default() };
    let mut connection: Connection<Small> = Connection::new(Arc::new(config), now);
    let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
    let mut sent = BytesMut::new();
    for chunk in stream.chunks(usize::from(*cut).max(1)) {
        input.extend_from_slice(chunk);
        now += Duration::from_millis(u64::from(*mood));
        connection.handle_timeout(now, &mut out);
        let mut rounds = 0;
        loop {
            let took = connection.handle_input(now, &mut input, &mut out);
            drain(&mut connection, now, *mood, &mut out);
            sent.extend_from_slice(&out.split());
            rounds += 1;
            assert!(rounds <= stream.len() + 2, "takes packets for ever");
            if !took {
                break;
            }
        }
        assert!(input.len() <= 4096 + usize::from(*cut) + 5 || connection.paused() || connection.is_closed());
        if connection.is_connected() {
            let qos = [Qos::AtMostOnce, Qos::AtLeastOnce, Qos::ExactlyOnce][usize::from(*mood) % 3];
            let _ = connection.publish(now, &Small, qos, false, &mut out);
        }
    }
    connection.handle_eof();
    drain(&mut connection, now, *mood, &mut out);
    assert!(connection.is_closed());
    sent.extend_from_slice(&out);
    let mut left: &[u8] = &sent;
    while !left.is_empty() {
        let (_, taken) = decode(left, connection.version(), 1 << 20).expect("a valid packet").expect("a whole packet");
        left = &left[taken..];
    }
});

fn drain(connection: &mut Connection<Small>, now: Instant, mood: u8, out: &mut BytesMut) {
    loop {
        match connection.poll_output(now, out) {
            Output::Timeout(_) => return,
            Output::Close(_) => {}
            Output::Event(event) => answer(connection, event, mood, out),
        }
    }
}

fn answer(connection: &mut Connection<Small>, event: Event<Small>, mood: u8, out: &mut BytesMut) {
    let accept = || Accept { stored: mood & 128 != 0, ..Accept::default() };
    let reason = if mood & 8 == 0 { Reason::Success } else { Reason::NotAuthorized };
    match event {
        Event::Connect(connect) => {
            if mood & 16 != 0 {
                connection.refuse(Reason::NotAuthorized, None, out);
            } else if connect.auth.is_some() && mood & 32 == 0 {
                connection.challenge(b"challenge", out);
            } else {
                let assigned = connect.client_id.is_empty().then_some("assigned");
                connection.accept(Accept { assigned_client_id: assigned, ..accept() }, out);
            }
        }
        Event::Auth { .. } if connection.is_connected() => connection.auth_success(b"proof", out),
        Event::Auth { .. } => connection.accept(Accept { auth_data: Some(b"proof"), ..accept() }, out),
        Event::Reauthenticate { .. } => connection.challenge(b"again", out),
        Event::Publish(publish) => {
            let _ = (publish.topic(), publish.payload_shared(), publish.properties().user().count());
            // Sometimes the application is never ready: reading must pause rather than pile up.
            if let Some(handle) = publish.handle.filter(|_| mood & 64 == 0) {
                connection.ack(handle, reason, None, out);
            }
        }
        Event::Subscribe(subscribe) => {
            let reasons: Vec<Reason> = subscribe.subscriptions.iter().map(|s| s.qos.granted()).collect();
            connection.suback(subscribe.packet_id, &reasons, None, out);
        }
        Event::Unsubscribe(unsubscribe) => {
            let reasons = vec![Reason::Success; unsubscribe.filters.len()];
            connection.unsuback(unsubscribe.packet_id, &reasons, Some("gone"), out);
        }
        Event::Released { packet_id } => connection.complete(packet_id, out),
        Event::Delivered { .. } | Event::Completed { .. } => {}
    }
}

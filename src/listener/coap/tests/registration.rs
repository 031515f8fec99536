//! Devices that register what they serve: one socket or connection is the device, asked by the gateway.

use bytes::Bytes;

use super::tcp::Stream;
use super::*;
use crate::gateway::{Reach, ReachFault, Reached};

fn id(text: &str) -> DeviceId {
    DeviceId::parse(text).unwrap()
}

/// A request of somebody's to a registered device, under way.
fn reach(fixture: &Fixture, device: &str, target: &'static str) -> tokio::task::JoinHandle<Reached> {
    let door: Arc<dyn Reach> = fixture.gateway.reach(&id(device), Instant::now()).expect("it is registered");
    let mut request = http::Request::new(Bytes::new());
    *request.uri_mut() = http::Uri::from_static(target);
    let device = id(device);
    let timeout = fixture.gateway.device_timeout();
    tokio::spawn(async move { door.reach(&device, request, timeout).await })
}

impl Peer {
    /// The gateway's next request, with its path.
    async fn asked(&mut self) -> (Packet, String) {
        loop {
            let packet = self.next().await;
            if matches!(packet.header.code, MessageClass::Request(_)) {
                let segments = packet.get_option(CoapOption::UriPath).into_iter().flatten();
                let path: Vec<_> = segments.map(|segment| String::from_utf8(segment.clone()).unwrap()).collect();
                return (packet, path.join("/"));
            }
        }
    }

    async fn reply(&mut self, asked: &Packet, observe: Option<u8>, payload: &[u8]) {
        let mut reply = Packet::new();
        reply.header.set_type(MessageType::Acknowledgement);
        reply.header.code = MessageClass::Response(ResponseType::Content);
        reply.header.message_id = asked.header.message_id;
        reply.set_token(asked.get_token().to_vec());
        if let Some(sequence) = observe {
            reply.add_option(CoapOption::Observe, vec![sequence]);
        }
        reply.payload = payload.to_vec();
        self.socket.send(&reply.to_bytes().unwrap()).await.unwrap();
    }

    async fn notify(&mut self, asked: &Packet, sequence: u8, payload: &[u8]) {
        self.message_id += 1;
        let mut notification = Packet::new();
        notification.header.set_type(MessageType::NonConfirmable);
        notification.header.code = MessageClass::Response(ResponseType::Content);
        notification.header.message_id = self.message_id;
        notification.set_token(asked.get_token().to_vec());
        notification.add_option(CoapOption::Observe, vec![sequence]);
        notification.payload = payload.to_vec();
        self.socket.send(&notification.to_bytes().unwrap()).await.unwrap();
    }
}

/// Links that the gateway does not ask for by itself.
const QUIET: &[u8] = b"</.well-known/core>;ct=40";

#[tokio::test]
async fn a_registration_is_its_devices_own_and_at_the_address_that_it_comes_from() {
    let fixture = Fixture::new();
    let (mut a, token) = fixture.device("a").await;
    let address = a.socket.local_addr().unwrap();
    let port = address.port();
    for (query, payload, expected) in [
        ("ep=b".to_owned(), QUIET, "4.03"),
        ("base=coap://203.0.113.9".to_owned(), QUIET, "4.00"),
        (format!("base=coap://localhost:{port}"), QUIET, "4.00"),
        (format!("base=coap://{address}@203.0.113.9"), QUIET, "4.00"),
        ("lt=0".to_owned(), QUIET, "4.00"),
        ("lt=1&lt=2".to_owned(), QUIET, "4.00"),
        ("et=\"x".to_owned(), QUIET, "4.00"),
        (String::new(), b"no links", "4.00"),
        (format!("ep=a&base=coap://{address}&lt=60&et=thermo"), QUIET, "2.01"),
    ] {
        let answer = a.ask(post(&format!("rd?{query}&t={token}")).payload(payload)).await;
        assert_eq!(code(&answer), expected, "{query}");
        if expected == "2.01" {
            assert_eq!(location(&answer), "rd/a");
        }
    }
    let other_format = post(&format!("rd?t={token}")).option(CoapOption::ContentFormat, &[50]).payload(b"{}");
    assert_eq!(code(&a.ask(other_format).await), "4.15");
    assert_eq!(code(&fixture.peer().await.ask(post("rd?ep=a").payload(QUIET)).await), "4.01");
    let (mut b, other) = fixture.device("b").await;
    let delete = |token: &str| request(RequestType::Delete, &format!("rd/a?t={token}"));
    assert_eq!(code(&b.ask(post(&format!("rd/a?t={other}"))).await), "4.04");
    assert_eq!(code(&b.ask(delete(&other)).await), "4.04");
    assert_eq!(code(&a.ask(post(&format!("rd/a?lt=30&t={token}"))).await), "2.04");
    assert_eq!(code(&a.ask(delete(&token)).await), "2.02");
    assert_eq!(code(&a.ask(post(&format!("rd/a?t={token}"))).await), "4.04");
    fixture.stop().await;
}

#[tokio::test]
async fn the_bounds_of_the_directory_are_kept() {
    let fixture = Fixture::with(
        |limits| {
            limits.directory_registrations_max = 1;
            limits.directory_links_max = 2;
            limits.directory_registration_bytes_max = crate::units::ByteSize(64);
        },
        &[],
    );
    let (mut a, token) = fixture.device("a").await;
    let (mut b, other) = fixture.device("b").await;
    let register = async |peer: &mut Peer, token: &str, links: &str| {
        code(&peer.ask(post(&format!("rd?t={token}")).payload(links.as_bytes())).await)
    };
    let long = format!("</.well-known/core>;title=\"{}\"", "x".repeat(64));
    assert_eq!(register(&mut a, &token, &long).await, "4.13");
    assert_eq!(register(&mut a, &token, "</a>,</b>,</c>").await, "4.00");
    assert_eq!(register(&mut a, &token, "</.well-known/core>").await, "2.01");
    assert_eq!(register(&mut b, &other, "</.well-known/core>").await, "5.03");
    assert_eq!(register(&mut a, &token, "</.well-known/core>").await, "2.01");
    fixture.stop().await;
}

#[tokio::test]
async fn an_observed_resource_becomes_messages_until_its_registration_ends() {
    let fixture = Fixture::new();
    let (mut a, token) = fixture.device("a").await;
    let (mut operator, operators) = fixture.device("op").await;
    let (mut b, other) = fixture.device("b").await;
    let links = "</t>;obs;rt=\"temp\",<http://203.0.113.9/x>;obs";
    assert_eq!(code(&a.ask(post(&format!("rd?t={token}")).payload(links.as_bytes())).await), "2.01");
    let (asked, path) = a.asked().await;
    assert_eq!((path.as_str(), option(&asked, CoapOption::Observe)), ("t", Some(vec![])));
    assert!(option(&asked, CoapOption::UriQuery).is_none(), "no credential goes to a device");
    a.reply(&asked, Some(1), b"21").await;
    let value = format!("ps/dev/a/coap/t?t={operators}");
    let mut until = async |expected: &str| {
        loop {
            let answer = operator.ask(get(&value)).await;
            if answer.payload == expected.as_bytes() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    until("21").await;
    a.notify(&asked, 3, b"23").await;
    until("23").await;
    // Who may not read the value is not shown the link.
    let found = operator.ask(get(&format!("rd-lookup/res?rt=temp&t={operators}"))).await;
    let expected = format!("<coap://{}/t>;obs;rt=\"temp\"", a.socket.local_addr().unwrap());
    assert_eq!(String::from_utf8(found.payload).unwrap(), expected);
    assert!(b.ask(get(&format!("rd-lookup/res?t={other}"))).await.payload.is_empty());
    assert!(b.ask(get(&format!("rd-lookup/ep?t={other}"))).await.payload.is_empty());

    assert_eq!(code(&a.ask(request(RequestType::Delete, &format!("rd/a?t={token}"))).await), "2.02");
    // The next notification may still be taken, but not published; once the gateway has hung up, it is reset.
    for sequence in 4..=255 {
        a.notify(&asked, sequence, b"late").await;
        let answer = tokio::time::timeout(Duration::from_millis(100), a.next()).await;
        if answer.is_ok_and(|packet| packet.header.get_type() == MessageType::Reset) {
            let value = operator.ask(get(&value)).await;
            assert_eq!(value.payload, b"23");
            return fixture.stop().await;
        }
    }
    panic!("the notifications were never reset");
}

#[tokio::test]
async fn the_links_of_a_simple_registration_are_fetched() {
    let fixture = Fixture::new();
    let (mut a, token) = fixture.device("a").await;
    assert_eq!(code(&a.ask(post(&format!(".well-known/rd?lt=60&t={token}"))).await), "2.04");
    let (asked, path) = a.asked().await;
    assert_eq!(path, ".well-known/core");
    a.reply(&asked, None, QUIET).await;
    let found = loop {
        let found = a.ask(get(&format!("rd-lookup/ep?t={token}"))).await;
        if !found.payload.is_empty() {
            break String::from_utf8(found.payload).unwrap();
        }
    };
    assert!(found.starts_with("</rd/a>;ep=\"a\";base=\"coap://127.0.0.1:") && found.contains(";lt=60;"), "{found}");
    fixture.stop().await;
}

#[tokio::test]
async fn a_device_is_asked_at_its_address_and_silence_and_resets_are_told_apart() {
    // Tests share one recorder, so others may count as well.
    crate::telemetry::install_metrics();
    let counted = |outcome: &str| {
        let sample = format!("tidegate_device_requests_total{{outcome=\"{outcome}\"}} ");
        let text = crate::telemetry::render();
        text.lines().find_map(|line| line.strip_prefix(&sample)?.parse::<u64>().ok()).unwrap_or(0)
    };
    let outcomes = ["answered", "reset", "timed_out"];
    let before = outcomes.map(counted);
    let fixture = Fixture::with(|limits| limits.device_request_timeout_ms = 1000, &[]);
    let (mut a, token) = fixture.device("a").await;
    assert!(fixture.gateway.reach(&id("a"), Instant::now()).is_none());
    assert_eq!(code(&a.ask(post(&format!("rd?t={token}")).payload(QUIET)).await), "2.01");
    let answered = reach(&fixture, "a", "/x/y%20z?q=1");
    let (asked, path) = a.asked().await;
    assert_eq!((path.as_str(), option(&asked, CoapOption::UriQuery)), ("x/y z", Some(b"q=1".to_vec())));
    a.reply(&asked, None, b"here").await;
    let response = answered.await.unwrap().unwrap();
    assert_eq!((response.status().as_u16(), &response.body()[..]), (200, &b"here"[..]));

    let refused = reach(&fixture, "a", "/x");
    let (asked, _) = a.asked().await;
    a.acknowledge(&asked, MessageType::Reset).await;
    assert_eq!(refused.await.unwrap().unwrap_err(), ReachFault::Refused);
    assert_eq!(reach(&fixture, "a", "/x").await.unwrap().unwrap_err(), ReachFault::TimedOut);
    let bad = reach(&fixture, "a", "/%2e%2e/x").await.unwrap().unwrap_err();
    assert_eq!(bad, ReachFault::Unmappable(http::StatusCode::BAD_REQUEST));
    for (outcome, before) in std::iter::zip(outcomes, before) {
        assert!(counted(outcome) > before, "{outcome}");
    }

    Registry::open(fixture.folder.path()).unwrap().set_enabled(&id("a"), false).unwrap();
    fixture.gateway.identity.refresh().unwrap();
    assert!(fixture.gateway.reach(&id("a"), Instant::now()).is_none(), "revoked");
    fixture.stop().await;
}

#[tokio::test]
async fn over_tcp_a_device_is_asked_through_its_connection_and_forgotten_with_it() {
    let fixture = Fixture::new();
    let (_, token) = fixture.device("a").await;
    let mut stream: Stream = fixture.connect().await;
    let answer = stream.ask("0.02", &format!("rd?t={token}"), b"</x>").await;
    assert_eq!(answer.code, "2.01");
    // What cannot be observed is read once.
    let asked = stream.next().await;
    assert_eq!((asked.code.as_str(), asked.token.len()), ("0.01", 8));
    stream.send("2.05", &asked.token, &[], b"value").await;
    let answered = reach(&fixture, "a", "/y");
    let asked = stream.next().await;
    assert_eq!(asked.option(11), Some(&b"y"[..]));
    stream.send("4.04", &asked.token, &[], b"").await;
    assert_eq!(answered.await.unwrap().unwrap().status().as_u16(), 404);
    let read = stream.ask("0.01", &format!("ps/dev/a/coap/x?t={token}"), b"").await;
    assert_eq!((read.code.as_str(), &read.payload[..]), ("2.05", &b"value"[..]));
    let unanswered = reach(&fixture, "a", "/y");
    stream.next().await;
    stream.end().await;
    assert_eq!(unanswered.await.unwrap().unwrap_err(), ReachFault::Refused);
    assert!(fixture.gateway.reach(&id("a"), Instant::now()).is_none());
    fixture.stop().await;
}

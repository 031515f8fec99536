//! One endpoint, one scripted peer, virtual time: what the message layer, Observe and block-wise transfer owe a client, clause by clause.

#![allow(clippy::unwrap_used)]

mod scripted;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tidegate_coap::endpoint::Delivery;
use tidegate_coap::option::number;
use tidegate_coap::{
    Block, Builder, Code, Config, Endpoint, Event, GoneReason, Handle, Kind, Notification, NotifyError, Observe,
    ObserverId, Output, Received, Response,
};

use scripted::Message;

/// What the application got.
#[derive(Clone, Debug)]
struct Got {
    handle: Handle,
    path: String,
    payload: Vec<u8>,
    observe: Option<Observe>,
    upload: bool,
}

struct Bench {
    endpoint: Endpoint,
    now: Instant,
    peer: SocketAddr,
    next_id: u16,
}

impl Bench {
    fn new(config: Config) -> Self {
        let now = Instant::now();
        Bench {
            endpoint: Endpoint::new(config, now, [9; 32]),
            now,
            peer: "192.0.2.7:40000".parse().unwrap(),
            next_id: 1,
        }
    }

    fn known(config: Config) -> Self {
        let mut bench = Bench::new(config);
        bench.endpoint.validate(bench.now, bench.peer);
        bench
    }

    fn raw(&mut self, datagram: &[u8]) -> Option<Got> {
        let (upload, request) = match self.endpoint.handle_datagram(self.now, self.peer, datagram) {
            Received::Nothing | Received::Reply(_) => return None,
            Received::Request(request) => (false, request),
            Received::Upload(request) => {
                self.endpoint.accept_upload(self.now, &request).unwrap();
                (true, request)
            }
        };
        Some(Got {
            handle: request.handle,
            path: request.path.join(0),
            payload: request.payload.to_vec(),
            observe: request.observe,
            upload,
        })
    }

    fn ask(&mut self, kind: Kind, code: Code, options: &[(u16, &[u8])], payload: &[u8]) -> Option<Got> {
        self.next_id += 1;
        let datagram = request(kind, code, self.next_id, b"tk", options, payload);
        self.raw(&datagram)
    }

    fn get(&mut self) -> Got {
        self.ask(Kind::Confirmable, Code::GET, &[(number::URI_PATH, b"x")], b"").unwrap()
    }

    fn respond(&mut self, got: &Got, response: &Response<'_>) {
        self.endpoint.respond(self.now, got.handle, response).unwrap();
    }

    /// Everything sent, checking that nothing else is pending.
    fn sent(&mut self) -> Vec<Message> {
        let mut sent = Vec::new();
        loop {
            match self.endpoint.poll_output() {
                Output::Transmit { bytes, .. } => sent.push(Message::read(bytes)),
                Output::Event(event) => panic!("an event that the test does not expect: {event:?}"),
                Output::Timeout(_) => return sent,
            }
        }
    }

    fn one(&mut self) -> Message {
        scripted::one(self.sent())
    }

    fn events(&mut self) -> Vec<Event> {
        scripted::events(&mut self.endpoint)
    }

    fn advance(&mut self, by: Duration) {
        scripted::advance(&mut self.endpoint, &mut self.now, by);
    }

    fn empty(&mut self, kind: Kind, message_id: u16) {
        let mut datagram = Vec::new();
        Builder::datagram(&mut datagram, kind, Code::EMPTY, message_id, &[]).payload(&[]);
        assert!(self.raw(&datagram).is_none());
    }

    fn observe(&mut self, token: &[u8], response: &Response<'_>) -> Option<ObserverId> {
        self.next_id += 1;
        let options = [(number::OBSERVE, &b""[..]), (number::URI_PATH, b"x")];
        let got = self.raw(&request(Kind::Confirmable, Code::GET, self.next_id, token, &options, b"")).unwrap();
        assert_eq!(got.observe, Some(Observe::Register));
        self.endpoint.observe(self.now, got.handle, response).unwrap()
    }

    fn notify(&mut self, observer: ObserverId, payload: &'static [u8], delivery: Delivery) -> Result<(), NotifyError> {
        let notification = Notification { delivery, ..Notification::content(Some(0), Bytes::from_static(payload)) };
        self.endpoint.notify(self.now, observer, notification)
    }
}

fn request(kind: Kind, code: Code, id: u16, token: &[u8], options: &[(u16, &[u8])], payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut builder = Builder::datagram(&mut out, kind, code, id, token);
    for (number, value) in options {
        builder = builder.option(*number, value);
    }
    builder.payload(payload);
    out
}

const CHANGED: Response<'static> = Response::new(Code::CHANGED);
const CONTENT: Response<'static> = Response::new(Code::CONTENT).content(Some(0), b"22.3 C");

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[test]
fn an_answer_in_time_travels_in_the_acknowledgement() {
    let mut bench = Bench::new(Config::default());
    let got = bench.get();
    bench.respond(&got, &CONTENT);
    let answer = bench.one();
    assert_eq!((answer.kind, answer.code, answer.message_id), (Kind::Acknowledgement, Code::CONTENT, bench.next_id));
    assert_eq!((&answer.token[..], &answer.payload[..]), (&b"tk"[..], &b"22.3 C"[..]));
    assert_eq!(bench.endpoint.respond(bench.now, got.handle, &CONTENT), Err(tidegate_coap::Gone));
    bench.advance(seconds(10));
    assert_eq!(bench.sent(), []);
    assert_eq!(bench.endpoint.next_timeout(), None, "nothing is left to wait for");
}

#[test]
fn a_duplicate_gets_the_same_bytes_and_the_application_does_not_see_it() {
    let mut bench = Bench::new(Config::default());
    let datagram = request(Kind::Confirmable, Code::POST, 77, b"t", &[(number::URI_PATH, b"t")], b"1");
    let got = bench.raw(&datagram).unwrap();
    assert!(bench.raw(&datagram).is_none(), "still with the application");
    assert_eq!(bench.sent(), []);
    bench.respond(&got, &CHANGED);
    let first = bench.one();
    bench.advance(seconds(246));
    assert!(bench.raw(&datagram).is_none());
    assert_eq!(bench.one(), first);
    bench.advance(seconds(3));
    assert!(bench.raw(&datagram).is_some(), "after EXCHANGE_LIFETIME the message id may be used again");
}

#[test]
fn the_same_message_id_on_another_request_is_a_new_request_and_not_answered_from_memory() {
    let mut bench = Bench::new(Config::default());
    // Two devices behind one address translator, which gives the second one the first one's port; both count from 1 and use no token.
    let first =
        request(Kind::Confirmable, Code::GET, 1, b"", &[(number::URI_PATH, b"s"), (number::URI_QUERY, b"t=A")], b"");
    let second =
        request(Kind::Confirmable, Code::GET, 1, b"", &[(number::URI_PATH, b"s"), (number::URI_QUERY, b"t=B")], b"");
    for (datagram, payload) in [(&first, b"a"), (&second, b"b")] {
        let got = bench.raw(datagram).expect("a request of its own");
        bench.respond(&got, &Response::new(Code::CONTENT).content(None, payload));
        assert_eq!(bench.one().payload, payload);
    }
    for (datagram, payload) in [(&first, b"a"), (&second, b"b")] {
        assert!(bench.raw(datagram).is_none(), "each retransmission is recognised");
        assert_eq!(bench.one().payload, payload);
    }
}

#[test]
fn a_late_answer_is_acknowledged_first_and_then_sent_until_acknowledged() {
    let mut bench = Bench::new(Config::default());
    let datagram = request(Kind::Confirmable, Code::GET, 500, b"t", &[], b"");
    let got = bench.raw(&datagram).unwrap();
    bench.advance(seconds(1));
    let ack = bench.one();
    assert_eq!((ack.kind, ack.code, ack.message_id), (Kind::Acknowledgement, Code::EMPTY, 500));
    assert!(bench.raw(&datagram).is_none());
    assert_eq!(bench.one(), ack, "a duplicate is acknowledged again");
    bench.respond(&got, &CONTENT);
    let answer = bench.one();
    assert_eq!((answer.kind, answer.code, &answer.token[..]), (Kind::Confirmable, Code::CONTENT, &b"t"[..]));
    assert_ne!(answer.message_id, 500);
    bench.advance(seconds(3));
    assert_eq!(bench.one(), answer, "retransmitted between 2 and 3 s");
    bench.empty(Kind::Acknowledgement, answer.message_id);
    bench.advance(seconds(100));
    assert_eq!(bench.sent(), []);
    assert_eq!(bench.endpoint.counters().outgoing, 0);
}

#[test]
fn an_unacknowledged_answer_is_given_up_after_four_retransmissions_within_93_seconds() {
    let mut bench = Bench::new(Config::default());
    let got = bench.get();
    bench.advance(seconds(1));
    bench.respond(&got, &CONTENT);
    let start = bench.now;
    assert_eq!(bench.sent().len(), 2);
    let mut waits = Vec::new();
    let mut last = start;
    while let Some(at) = bench.endpoint.next_timeout() {
        bench.now = at;
        bench.endpoint.handle_timeout(at);
        waits.push(at - last);
        last = at;
    }
    assert_eq!((bench.sent().len(), waits.len()), (4, 5));
    assert!(waits[0] >= seconds(2) && waits[0] <= seconds(3), "{waits:?}");
    assert!(waits.windows(2).all(|pair| pair[1] == pair[0] * 2), "{waits:?}");
    assert!(last - start <= seconds(93), "MAX_TRANSMIT_WAIT");
    assert_eq!(bench.endpoint.counters().given_up, 1);
}

#[test]
fn a_reset_ends_a_separate_answer() {
    let mut bench = Bench::new(Config::default());
    let got = bench.get();
    bench.advance(seconds(1));
    bench.respond(&got, &CONTENT);
    let answer = bench.sent().remove(1);
    bench.empty(Kind::Reset, answer.message_id);
    bench.advance(seconds(100));
    assert_eq!(bench.sent(), []);
}

#[test]
fn a_non_is_answered_by_a_non_and_its_duplicate_is_ignored() {
    let mut bench = Bench::new(Config::default());
    let datagram = request(Kind::NonConfirmable, Code::GET, 9, b"n", &[], b"");
    let got = bench.raw(&datagram).unwrap();
    bench.advance(seconds(5));
    assert_eq!(bench.sent(), [], "a NON is never acknowledged");
    bench.respond(&got, &CONTENT);
    let answer = bench.one();
    assert_eq!((answer.kind, answer.code, &answer.token[..]), (Kind::NonConfirmable, Code::CONTENT, &b"n"[..]));
    assert!(bench.raw(&datagram).is_none());
    assert_eq!(bench.sent(), []);
}

#[test]
fn long_tokens_come_back_and_one_that_is_too_long_is_answered_4_00_with_it() {
    let mut bench = Bench::new(Config::default());
    for length in [9, 12, 13, 22, 23, 256] {
        let token = vec![7; length];
        let get = request(Kind::Confirmable, Code::GET, 9 + length as u16, &token, &[], &[]);
        let got = bench.raw(&get).unwrap();
        bench.respond(&got, &Response::new(Code::CONTENT).content(None, b"v"));
        let answer = bench.one();
        assert_eq!((answer.code, &answer.token[..]), (Code::CONTENT, &token[..]));
        assert!(bench.raw(&get).is_none());
        assert_eq!(bench.one(), answer, "a duplicate gets the same");
    }
    for (kind, answered) in [(Kind::Confirmable, Kind::Acknowledgement), (Kind::NonConfirmable, Kind::NonConfirmable)] {
        for length in [257, 268, 269, 1000] {
            let token = vec![7; length];
            assert!(bench.raw(&request(kind, Code::GET, 77, &token, &[], &[])).is_none());
            let answer = bench.one();
            assert_eq!((answer.kind, answer.code, &answer.token[..]), (answered, Code::BAD_REQUEST, &token[..]));
        }
    }
}

#[test]
fn an_observer_with_a_long_token_is_notified_and_removed_by_it() {
    let mut bench = Bench::known(Config::default());
    let token = [5; 200];
    let observer = bench.observe(&token, &CONTENT).unwrap();
    assert_eq!(bench.one().token, token);
    bench.notify(observer, b"2", Delivery::Latest).unwrap();
    assert_eq!(bench.one().token, token);
    let options = [(number::OBSERVE, &b"\x01"[..]), (number::URI_PATH, b"x")];
    let got = bench.raw(&request(Kind::Confirmable, Code::GET, 900, &token, &options, b"")).unwrap();
    assert_eq!(bench.events(), [Event::ObserverGone { observer, reason: GoneReason::Deregistered }]);
    bench.respond(&got, &CONTENT);
    assert_eq!(bench.one().token, token);
}

#[test]
fn two_bodies_with_their_own_request_tags_do_not_mix() {
    let mut bench = Bench::known(Config::default());
    let mut block = |tag: &[u8], n: u8, more: bool, piece: &[u8]| {
        let value = [n << 4 | u8::from(more) << 3];
        let options: [(u16, &[u8]); 3] =
            [(number::URI_PATH, b"x"), (number::BLOCK1, &value[..]), (number::REQUEST_TAG, tag)];
        bench.ask(Kind::Confirmable, Code::PUT, &options, piece)
    };
    assert!(block(b"1", 0, true, &[1; 16]).is_some_and(|got| got.upload));
    assert!(block(b"2", 0, true, &[2; 16]).is_some_and(|got| got.upload));
    let first = block(b"1", 1, false, b"one").unwrap();
    let second = block(b"2", 1, false, b"two").unwrap();
    assert_eq!(first.payload, [&[1; 16][..], b"one"].concat());
    assert_eq!(second.payload, [&[2; 16][..], b"two"].concat());
}

#[test]
fn a_ping_is_reset_and_strays_are_dropped() {
    let mut bench = Bench::new(Config::default());
    bench.empty(Kind::Confirmable, 0x1234);
    let pong = bench.one();
    assert_eq!((pong.kind, pong.code, pong.message_id), (Kind::Reset, Code::EMPTY, 0x1234));
    bench.empty(Kind::Acknowledgement, 5);
    bench.empty(Kind::Reset, 5);
    assert!(bench.raw(&request(Kind::NonConfirmable, Code::CONTENT, 6, b"", &[], b"x")).is_none());
    assert_eq!(bench.sent(), []);
    assert!(bench.raw(&request(Kind::Confirmable, Code::CONTENT, 7, b"", &[], b"x")).is_none());
    assert_eq!(bench.one().kind, Kind::Reset, "a confirmable response that nobody asked for");
    assert_eq!((bench.endpoint.counters().pings, bench.endpoint.counters().stray), (1, 4));
}

#[test]
fn malformed_datagrams_are_reset_when_confirmable_and_ignored_otherwise() {
    let mut bench = Bench::new(Config::default());
    assert!(bench.raw(b"\x40\x01\xab\xcd\xff").is_none());
    let reset = bench.one();
    assert_eq!((reset.kind, reset.message_id), (Kind::Reset, 0xabcd));
    for ignored in [&b"\x50\x01\xab\xcd\xff"[..], b"", b"\x00\x01\0\0", b"\x16\xfe\xfd\0\0\0\0"] {
        assert!(bench.raw(ignored).is_none());
        assert_eq!(bench.sent(), [], "{ignored:?}");
    }
    assert_eq!(bench.endpoint.counters().malformed, 5);
}

#[test]
fn an_unknown_critical_option_is_refused_by_4_02_and_in_a_non_by_silence() {
    let mut bench = Bench::new(Config::default());
    let option = [(number::OSCORE, &b""[..])];
    assert!(bench.ask(Kind::Confirmable, Code::GET, &option, b"").is_none());
    assert_eq!(bench.one().code, Code::BAD_OPTION);
    assert!(bench.ask(Kind::NonConfirmable, Code::GET, &option, b"").is_none());
    assert_eq!(bench.sent(), []);
    assert!(bench.ask(Kind::Confirmable, Code::GET, &[(number::URI_PATH, b"a/b")], b"").is_none());
    assert_eq!(bench.one().code, Code::BAD_REQUEST);
    assert!(bench.ask(Kind::Confirmable, Code::new(0, 9), &[], b"").is_none());
    assert_eq!(bench.one().code, Code::METHOD_NOT_ALLOWED);
    assert!(bench.ask(Kind::Confirmable, Code::GET, &[(number::PROXY_URI, b"coap://x/")], b"").is_none());
    assert_eq!(bench.one().code, Code::PROXYING_NOT_SUPPORTED);
}

#[test]
fn no_response_silences_the_classes_it_names_but_not_the_acknowledgement() {
    let mut bench = Bench::new(Config::default());
    let quiet = [(number::NO_RESPONSE, &[2u8][..])];
    let got = bench.ask(Kind::NonConfirmable, Code::POST, &quiet, b"1").unwrap();
    bench.respond(&got, &CHANGED);
    assert_eq!(bench.sent(), []);
    let got = bench.ask(Kind::NonConfirmable, Code::POST, &quiet, b"1").unwrap();
    bench.respond(&got, &Response::new(Code::FORBIDDEN));
    assert_eq!(bench.one().code, Code::FORBIDDEN);
    let got = bench.ask(Kind::Confirmable, Code::POST, &quiet, b"1").unwrap();
    bench.respond(&got, &CHANGED);
    assert_eq!(bench.one().code, Code::EMPTY);
}

#[test]
fn a_stranger_gets_an_echo_instead_of_a_long_answer_and_the_answer_once_it_comes_back() {
    let mut bench = Bench::new(Config::default());
    let long = [7u8; 600];
    let response = Response::new(Code::CONTENT).content(Some(42), &long);
    let got = bench.get();
    bench.respond(&got, &response);
    let refused = bench.one();
    assert_eq!(refused.code, Code::UNAUTHORIZED);
    let echo = refused.options.iter().find(|(n, _)| *n == number::ECHO).unwrap().1.clone();
    let options = [(number::URI_PATH, &b"x"[..]), (number::ECHO, &echo)];
    let got = bench.ask(Kind::Confirmable, Code::GET, &options, b"").unwrap();
    bench.respond(&got, &response);
    assert_eq!(bench.one().payload, long);
    bench.peer = "192.0.2.8:40000".parse().unwrap();
    let got = bench.ask(Kind::Confirmable, Code::GET, &options, b"").unwrap();
    bench.respond(&got, &response);
    assert_eq!(bench.one().code, Code::UNAUTHORIZED, "the echo of another peer");
    let got = bench.ask(Kind::Confirmable, Code::POST, &[], b"x").unwrap();
    bench.respond(&got, &response);
    let short = bench.one();
    assert_eq!((short.code, short.payload.len()), (Code::CONTENT, 0), "what had an effect is not to be repeated");
}

#[test]
fn a_long_answer_is_sliced_by_the_askers_block_size_with_one_etag() {
    let mut bench = Bench::known(Config::default());
    let body: Vec<u8> = (0..1500u32).map(|n| n as u8).collect();
    let response = Response::new(Code::CONTENT).content(Some(42), &body);
    let mut read = Vec::new();
    let mut etags = Vec::new();
    for n in 0.. {
        let block = Block { number: n, more: false, exponent: 2 };
        let bits = block.bits().to_be_bytes();
        let options = [(number::URI_PATH, &b"x"[..]), (number::BLOCK2, &bits[1..])];
        let got = bench.ask(Kind::Confirmable, Code::GET, &options, b"").unwrap();
        bench.respond(&got, &response);
        let answer = bench.one();
        assert_eq!(answer.code, Code::CONTENT);
        etags.push(answer.option(number::ETAG).unwrap());
        read.extend_from_slice(&answer.payload);
        let bits = answer.option(number::BLOCK2).unwrap();
        assert_eq!((bits >> 4, bits & 7), (u64::from(n), 2));
        if bits & 8 == 0 {
            break;
        }
    }
    assert_eq!(read, body);
    assert!(etags.windows(2).all(|pair| pair[0] == pair[1]));
    let past = [(number::URI_PATH, &b"x"[..]), (number::BLOCK2, &[0x02, 0x02])];
    let got = bench.ask(Kind::Confirmable, Code::GET, &past, b"").unwrap();
    bench.respond(&got, &response);
    assert_eq!(bench.one().code, Code::BAD_REQUEST, "behind the end");
}

#[test]
fn block_number_two_to_the_twentieth_less_one_is_answered() {
    let mut bench = Bench::known(Config::default());
    let body = vec![1u8; 1 << 24];
    let options = [(number::URI_PATH, &b"x"[..]), (number::BLOCK2, &[0xff, 0xff, 0xf0])];
    let got = bench.ask(Kind::Confirmable, Code::GET, &options, b"").unwrap();
    bench.respond(&got, &Response::new(Code::CONTENT).content(None, &body));
    let answer = bench.one();
    assert_eq!((answer.payload.len(), answer.option(number::BLOCK2)), (16, Some(0xff_fff0)));
}

#[test]
fn the_rest_of_a_long_answer_to_a_post_comes_without_asking_the_application_again() {
    let mut bench = Bench::known(Config::default());
    let body = [5u8; 2500];
    let got = bench.ask(Kind::Confirmable, Code::POST, &[(number::URI_PATH, b"x")], b"do").unwrap();
    bench.respond(&got, &Response::new(Code::CHANGED).content(Some(60), &body).etag(b"theirs"));
    let first = bench.one();
    let mut read = first.payload.clone();
    for n in 1..=2u8 {
        let options = [(number::URI_PATH, &b"x"[..]), (number::BLOCK2, &[n << 4 | 6])];
        assert!(bench.ask(Kind::Confirmable, Code::POST, &options, b"").is_none());
        let answer = bench.one();
        assert_eq!((answer.code, answer.option(number::CONTENT_FORMAT)), (Code::CHANGED, Some(60)));
        assert_eq!(answer.option(number::ETAG), first.option(number::ETAG), "blocks of one version say so");
        read.extend_from_slice(&answer.payload);
    }
    assert_eq!(read, body);
    assert_eq!(bench.endpoint.counters().blockwise_bytes, 0);
    let again = [(number::URI_PATH, &b"x"[..]), (number::BLOCK2, &[1 << 4 | 6])];
    assert!(bench.ask(Kind::Confirmable, Code::POST, &again, b"").is_none());
    assert_eq!(bench.one().code, Code::REQUEST_ENTITY_INCOMPLETE);
}

#[test]
fn a_stranger_is_asked_for_an_echo_before_the_rest_of_a_long_answer_and_then_gets_it() {
    let mut bench = Bench::new(Config::default());
    let body = [5u8; 1500];
    let got = bench.ask(Kind::Confirmable, Code::POST, &[(number::URI_PATH, b"x")], &[1; 600]).unwrap();
    bench.respond(&got, &Response::new(Code::CHANGED).content(None, &body));
    assert_eq!(bench.one().payload.len(), 1024, "not three times the question");
    let path_and_block = [(number::URI_PATH, &b"x"[..]), (number::BLOCK2, &[1 << 4 | 6])];
    assert!(bench.ask(Kind::Confirmable, Code::POST, &path_and_block, b"").is_none());
    let refused = bench.one();
    assert_eq!((refused.code, refused.payload.len()), (Code::UNAUTHORIZED, 0));
    let echo = refused.options.iter().find(|(n, _)| *n == number::ECHO).unwrap().1.clone();
    let with_echo = [path_and_block[0], path_and_block[1], (number::ECHO, &echo)];
    assert!(bench.ask(Kind::Confirmable, Code::POST, &with_echo, b"").is_none());
    assert_eq!(bench.one().payload, body[1024..]);
}

#[test]
fn a_get_whose_answer_is_kept_is_asked_for_once() {
    let mut bench = Bench::known(Config::default());
    let body = [5u8; 2500];
    let datagram = request(Kind::Confirmable, Code::GET, 1, b"tk", &[(number::URI_PATH, b"x")], b"");
    let Received::Request(asked) = bench.endpoint.handle_datagram(bench.now, bench.peer, &datagram) else {
        panic!("a request")
    };
    bench.endpoint.keep_answer(&asked);
    let answer = Response::new(Code::CONTENT).content(Some(60), &body).etag(b"theirs");
    bench.endpoint.respond(bench.now, asked.handle, &answer).unwrap();
    let first = bench.one();
    let mut read = first.payload.clone();
    for n in 1..=2u8 {
        let options = [(number::URI_PATH, &b"x"[..]), (number::BLOCK2, &[n << 4 | 6])];
        assert!(bench.ask(Kind::Confirmable, Code::GET, &options, b"").is_none());
        let answer = bench.one();
        assert_eq!(answer.option(number::ETAG), first.option(number::ETAG), "blocks of one version say so");
        read.extend_from_slice(&answer.payload);
    }
    assert_eq!(read, body);
}

fn put_block(bench: &mut Bench, number_: u32, more: bool, piece: &[u8]) -> Option<Got> {
    let exponent = 2;
    let bits = Block { number: number_, more, exponent }.bits().to_be_bytes();
    let skip = bits.iter().take_while(|b| **b == 0).count();
    bench.ask(Kind::Confirmable, Code::PUT, &[(number::URI_PATH, b"x"), (number::BLOCK1, &bits[skip..])], piece)
}

#[test]
fn a_body_in_blocks_comes_to_the_application_once_and_whole() {
    let mut bench = Bench::new(Config::default());
    let body: Vec<u8> = (0..200).collect();
    assert!(put_block(&mut bench, 0, true, &body[..64]).unwrap().upload);
    let answer = bench.one();
    assert_eq!((answer.code, answer.option(number::BLOCK1)), (Code::CONTINUE, Some(8 | 2)));
    assert!(put_block(&mut bench, 1, true, &body[64..128]).is_none());
    assert!(put_block(&mut bench, 2, true, &body[128..192]).is_none());
    assert_eq!(bench.sent().len(), 2);
    let got = put_block(&mut bench, 3, false, &body[192..]).unwrap();
    assert_eq!((got.payload.as_slice(), got.path.as_str(), got.upload), (&body[..], "x", false));
    bench.respond(&got, &CHANGED);
    let answer = bench.one();
    assert_eq!((answer.code, answer.option(number::BLOCK1)), (Code::CHANGED, Some(3 << 4 | 2)));
    assert_eq!(bench.endpoint.counters().blockwise_bytes, 0);
}

#[test]
fn a_block_that_continues_nothing_and_a_body_that_is_too_large_are_refused() {
    let mut bench = Bench::new(Config { body_bytes_max: 150, ..Config::default() });
    assert!(put_block(&mut bench, 1, true, &[0; 64]).is_none());
    assert_eq!(bench.one().code, Code::REQUEST_ENTITY_INCOMPLETE);
    put_block(&mut bench, 0, true, &[0; 64]);
    put_block(&mut bench, 1, true, &[0; 64]);
    bench.sent();
    assert!(put_block(&mut bench, 2, true, &[0; 64]).is_none());
    let refused = bench.one();
    assert_eq!((refused.code, refused.option(number::SIZE1)), (Code::REQUEST_ENTITY_TOO_LARGE, Some(150)));
    assert!(put_block(&mut bench, 0, true, &[0; 63]).is_none());
    assert_eq!(bench.one().code, Code::BAD_REQUEST, "a block that is not full but not the last");
    put_block(&mut bench, 0, true, &[0; 64]);
    bench.sent();
    bench.advance(seconds(61));
    assert!(put_block(&mut bench, 1, true, &[0; 64]).is_none());
    assert_eq!(bench.one().code, Code::REQUEST_ENTITY_INCOMPLETE, "the transfer stalled for too long");
    assert_eq!(bench.endpoint.counters().blockwise_bytes, 0);
}

#[test]
fn an_upload_that_the_application_refuses_keeps_nothing() {
    let mut bench = Bench::new(Config::default());
    let datagram = request(Kind::Confirmable, Code::PUT, 1, b"", &[(number::BLOCK1, &[8])], &[0; 16]);
    let Received::Upload(request) = bench.endpoint.handle_datagram(bench.now, bench.peer, &datagram) else {
        panic!("the first block is shown to the application");
    };
    let handle = request.handle;
    bench.endpoint.respond(bench.now, handle, &Response::new(Code::UNAUTHORIZED)).unwrap();
    let refused = bench.one();
    assert_eq!((refused.code, refused.option(number::BLOCK1)), (Code::UNAUTHORIZED, Some(0)));
    assert_eq!(bench.endpoint.counters().blockwise_bytes, 0);
}

#[test]
fn a_large_first_block_is_taken_and_the_client_is_told_our_size() {
    let mut bench = Bench::new(Config { block_bytes_max: 32, ..Config::default() });
    put_block(&mut bench, 0, true, &[1; 64]);
    let answer = bench.one();
    assert_eq!((answer.code, answer.option(number::BLOCK1)), (Code::CONTINUE, Some(8 | 1)));
    let options = [(number::URI_PATH, &b"x"[..]), (number::BLOCK1, &[2 << 4 | 1])];
    let got = bench.ask(Kind::Confirmable, Code::PUT, &options, &[2; 32]).unwrap();
    assert_eq!(got.payload, [[1u8; 32], [1; 32], [2; 32]].concat());
}

#[test]
fn observers_get_values_in_sequence_and_the_first_is_confirmed() {
    let mut bench = Bench::new(Config { observe_confirm_every: 3, ..Config::default() });
    let observer = bench.observe(b"ob", &CONTENT).unwrap();
    assert_eq!(bench.one().option(number::OBSERVE), Some(1));
    let mut kinds = Vec::new();
    for n in 2..9 {
        bench.notify(observer, b"v", Delivery::Latest).unwrap();
        let notification = bench.one();
        assert_eq!((notification.option(number::OBSERVE), &notification.token[..]), (Some(n), &b"ob"[..]));
        kinds.push(notification.kind == Kind::Confirmable);
        if notification.kind == Kind::Confirmable {
            bench.empty(Kind::Acknowledgement, notification.message_id);
        }
    }
    assert_eq!(kinds, [true, false, false, true, false, false, true]);
}

#[test]
fn a_slow_observer_gets_the_latest_value_only() {
    let mut bench = Bench::new(Config::default());
    let observer = bench.observe(b"ob", &CONTENT).unwrap();
    bench.notify(observer, b"1", Delivery::Latest).unwrap();
    let first = bench.sent().remove(1);
    bench.notify(observer, b"2", Delivery::Latest).unwrap();
    bench.notify(observer, b"3", Delivery::Latest).unwrap();
    assert_eq!(bench.sent(), []);
    bench.advance(seconds(3));
    let newer = bench.one();
    assert_eq!((&newer.payload[..], newer.kind), (&b"3"[..], Kind::Confirmable), "RFC 7641 section 4.5.2");
    assert_ne!(newer.message_id, first.message_id);
    bench.notify(observer, b"4", Delivery::Latest).unwrap();
    bench.empty(Kind::Acknowledgement, newer.message_id);
    assert_eq!(bench.one().payload, b"4");
    assert_eq!(bench.endpoint.counters().conflated, 1);
}

#[test]
fn values_that_must_arrive_are_confirmed_one_after_the_other() {
    let mut bench = Bench::new(Config { observe_queue_max: 2, ..Config::default() });
    let observer = bench.observe(b"ob", &CONTENT).unwrap();
    bench.sent();
    for ticket in 1..=3 {
        bench.notify(observer, b"c", Delivery::Each { ticket }).unwrap();
    }
    assert_eq!(bench.notify(observer, b"c", Delivery::Each { ticket: 4 }), Err(NotifyError::Full));
    for ticket in 1..=3 {
        let mut batch = tidegate_coap::Batch::new();
        bench.endpoint.swap_batch(&mut batch);
        assert_eq!(batch.len(), 1);
        let sent = Message::read(batch.get(0).unwrap().1);
        bench.empty(Kind::Acknowledgement, sent.message_id);
        assert_eq!(bench.events(), [Event::Delivered { observer, ticket }]);
    }
    assert_eq!(bench.sent(), []);
}

#[test]
fn an_observer_goes_by_deregistering_by_reset_and_by_silence() {
    let mut bench = Bench::new(Config::default());
    let gone = |observer, reason| vec![Event::ObserverGone { observer, reason }];

    let observer = bench.observe(b"ob", &CONTENT).unwrap();
    bench.next_id += 1;
    let options = [(number::OBSERVE, &[1u8][..]), (number::URI_PATH, b"x")];
    let got = bench.raw(&request(Kind::Confirmable, Code::GET, bench.next_id, b"ob", &options, b"")).unwrap();
    assert_eq!(got.observe, Some(Observe::Deregister));
    assert_eq!(bench.events(), gone(observer, GoneReason::Deregistered));
    bench.respond(&got, &CONTENT);
    assert_eq!(bench.sent().pop().unwrap().option(number::OBSERVE), None);

    let observer = bench.observe(b"ob", &CONTENT).unwrap();
    bench.notify(observer, b"1", Delivery::Latest).unwrap();
    let confirmable = bench.sent().pop().unwrap();
    bench.empty(Kind::Acknowledgement, confirmable.message_id);
    bench.notify(observer, b"2", Delivery::Latest).unwrap();
    let non = bench.one();
    assert_eq!(non.kind, Kind::NonConfirmable);
    bench.empty(Kind::Reset, non.message_id);
    assert_eq!(bench.events(), gone(observer, GoneReason::Reset));

    let observer = bench.observe(b"ob", &CONTENT).unwrap();
    bench.notify(observer, b"1", Delivery::Latest).unwrap();
    bench.advance(seconds(93));
    assert_eq!(bench.events(), gone(observer, GoneReason::TimedOut));
    assert_eq!(bench.notify(observer, b"2", Delivery::Latest), Err(NotifyError::Gone));
    assert_eq!(bench.endpoint.counters().observers, 0);
}

#[test]
fn registering_again_with_the_same_token_replaces_and_the_sequence_goes_on() {
    let mut bench = Bench::new(Config::default());
    let first = bench.observe(b"ob", &CONTENT).unwrap();
    bench.notify(first, b"1", Delivery::Latest).unwrap();
    assert_eq!(bench.sent().pop().unwrap().option(number::OBSERVE), Some(2));
    let second = bench.observe(b"ob", &CONTENT).unwrap();
    assert_eq!(bench.events(), [Event::ObserverGone { observer: first, reason: GoneReason::Replaced }]);
    assert_eq!(bench.one().option(number::OBSERVE), Some(3));
    assert_eq!(bench.endpoint.counters().outgoing, 0, "what was in flight for the first is not retransmitted");
    bench.notify(second, b"2", Delivery::Latest).unwrap();
    assert_eq!(bench.one().option(number::OBSERVE), Some(4));
}

#[test]
fn beyond_the_limit_of_observers_a_registration_is_a_plain_get() {
    let mut bench = Bench::new(Config { observers_max: 3, observers_peer_max: 2, ..Config::default() });
    assert!(bench.observe(b"1", &CONTENT).is_some());
    assert!(bench.observe(b"2", &CONTENT).is_some());
    bench.sent();
    assert!(bench.observe(b"3", &CONTENT).is_none(), "of one peer");
    assert_eq!(bench.one().option(number::OBSERVE), None);
    bench.peer.set_port(1);
    assert!(bench.observe(b"1", &CONTENT).is_some());
    assert!(bench.observe(b"2", &CONTENT).is_none(), "of all");
    bench.peer.set_port(2);
    assert!(bench.observe(b"2", &Response::new(Code::NOT_FOUND)).is_none(), "an error registers nobody");
}

#[test]
fn an_error_notification_ends_the_observation_and_is_confirmed() {
    let mut bench = Bench::new(Config::default());
    let observer = bench.observe(b"ob", &CONTENT).unwrap();
    bench.sent();
    let end = Notification::ended(Code::UNAUTHORIZED);
    bench.endpoint.notify(bench.now, observer, end).unwrap();
    assert_eq!(bench.events(), [Event::ObserverGone { observer, reason: GoneReason::Ended }]);
    let last = bench.one();
    assert_eq!((last.kind, last.code, last.option(number::OBSERVE)), (Kind::Confirmable, Code::UNAUTHORIZED, None));
}

#[test]
fn a_command_says_in_its_location_what_it_is() {
    let mut bench = Bench::new(Config::default());
    let observer = bench.observe(b"ob", &CONTENT).unwrap();
    bench.sent();
    let command = Notification {
        location: Some("c/7/reboot".into()),
        delivery: Delivery::Each { ticket: 1 },
        ..Notification::content(None, Bytes::from_static(b"now"))
    };
    bench.endpoint.notify(bench.now, observer, command).unwrap();
    let sent = bench.one();
    let location: Vec<_> =
        sent.options.iter().filter(|(n, _)| *n == number::LOCATION_PATH).map(|(_, v)| &v[..]).collect();
    assert_eq!(location, [&b"c"[..], b"7", b"reboot"]);
}

#[test]
fn observers_of_one_peer_take_turns_and_none_is_forgotten_when_another_goes() {
    let mut bench = Bench::new(Config::default());
    let a = bench.observe(b"a", &CONTENT).unwrap();
    let b = bench.observe(b"b", &CONTENT).unwrap();
    bench.sent();
    bench.notify(a, b"1", Delivery::Latest).unwrap();
    assert_eq!(bench.one().token, b"a");
    bench.notify(b, b"2", Delivery::Latest).unwrap();
    assert_eq!(bench.sent(), [], "NSTART is 1");
    bench.endpoint.forget(bench.now, a);
    assert_eq!(bench.one().token, b"b");
}

#[test]
fn an_observer_that_has_not_confirmed_for_long_is_refreshed() {
    let mut bench = Bench::new(Config::default());
    let observer = bench.observe(b"ob", &CONTENT).unwrap();
    bench.sent();
    bench.advance(seconds(3601));
    assert_eq!(bench.events(), [Event::Refresh { observer }]);
    bench.notify(observer, b"v", Delivery::Latest).unwrap();
    assert_eq!(bench.one().kind, Kind::Confirmable);
}

#[test]
fn a_full_request_table_says_when_to_come_back() {
    let mut bench = Bench::new(Config { requests_max: 2, ..Config::default() });
    let first = bench.get();
    bench.get();
    assert!(bench.ask(Kind::Confirmable, Code::GET, &[], b"").is_none());
    let full = bench.one();
    assert_eq!((full.code, full.option(number::MAX_AGE)), (Code::SERVICE_UNAVAILABLE, Some(2)));
    bench.respond(&first, &CONTENT);
    bench.get();
}

#[test]
fn a_hundred_thousand_peers_do_not_grow_the_tables_beyond_their_limits() {
    let config = Config { exchanges_max: 1000, peers_max: 500, ..Config::default() };
    let mut bench = Bench::new(config);
    let datagram = request(Kind::Confirmable, Code::POST, 1, b"t", &[(number::URI_PATH, b"t")], b"1");
    let mut batch = tidegate_coap::Batch::new();
    for n in 0..100_000u32 {
        bench.peer = SocketAddr::from((std::net::Ipv4Addr::from(0x0a00_0000 + n), 5683));
        let got = bench.raw(&datagram).unwrap();
        bench.endpoint.validate(bench.now, bench.peer);
        bench.respond(&got, &CHANGED);
        bench.endpoint.swap_batch(&mut batch);
        assert_eq!(batch.len(), 1);
        bench.now += Duration::from_micros(600);
    }
    let counters = bench.endpoint.counters();
    assert_eq!((counters.exchanges, counters.requests_open), (1000, 0));
    assert!(counters.peers_validated <= 500);
    assert_eq!(counters.exchanges_evicted, 99_000);
}

#[test]
fn the_memory_bound_follows_from_the_limits() {
    let small = Config { exchanges_max: 100, exchange_bytes_max: 1000, ..Config::default() };
    assert!(small.memory_bytes_max() < Config::default().memory_bytes_max());
    assert!(Config::default().memory_bytes_max() < 64 << 20, "{}", Config::default().memory_bytes_max());
}

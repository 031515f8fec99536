//! The endpoint as a client, one scripted device, virtual time: calls, answers in blocks, observed resources; the same over TCP.

#![allow(clippy::unwrap_used)]

mod scripted;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tidegate_coap::client::{Call, CallError, CallId, CallsFull};
use tidegate_coap::option::number;
use tidegate_coap::tcp::{self, Connection};
use tidegate_coap::{Builder, Code, Config, Endpoint, Event, Kind, Received};

use scripted::Message;

/// A reply as the application reads it: call, code, payload, whether more will come.
type Got = (CallId, Code, Vec<u8>, bool);

struct Bench {
    endpoint: Endpoint,
    now: Instant,
    device: SocketAddr,
}

impl Bench {
    fn new() -> Self {
        Bench::with(Config::default())
    }

    fn with(config: Config) -> Self {
        let now = Instant::now();
        let device = "192.0.2.7:5683".parse().unwrap();
        Bench { endpoint: Endpoint::new(config, now, [9; 32]), now, device }
    }

    fn begin(&mut self, call: Call) -> CallId {
        self.endpoint.call(self.now, self.device, call).unwrap()
    }

    /// A GET of `/sensors/temp` and its request.
    fn called(&mut self, observe: bool) -> (CallId, Message) {
        let id = self.begin(Call { observe, ..get() });
        let asked = self.one();
        assert_eq!((asked.kind, asked.code, asked.token.len()), (Kind::Confirmable, Code::GET, 8));
        (id, asked)
    }

    fn sent(&mut self) -> Vec<Message> {
        let mut batch = Default::default();
        self.endpoint.swap_batch(&mut batch);
        batch.iter().map(|(_, bytes)| Message::read(bytes)).collect()
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

    /// The device answers.
    fn give(
        &mut self,
        kind: Kind,
        code: Code,
        id: u16,
        token: &[u8],
        options: &[(u16, &[u8])],
        payload: &[u8],
    ) -> Option<Got> {
        let mut datagram = Vec::new();
        let mut builder = Builder::datagram(&mut datagram, kind, code, id, token);
        for (number, value) in options {
            builder = builder.option(*number, value);
        }
        builder.payload(payload);
        match self.endpoint.handle_datagram(self.now, self.device, &datagram) {
            Received::Reply(reply) => Some((reply.call, reply.code, reply.payload.to_vec(), reply.observed)),
            Received::Nothing => None,
            other => panic!("{other:?}"),
        }
    }

    fn acknowledge(&mut self, asked: &Message, options: &[(u16, &[u8])], payload: &[u8]) -> Option<Got> {
        self.give(Kind::Acknowledgement, Code::CONTENT, asked.message_id, &asked.token, options, payload)
    }

    fn empty(&mut self, kind: Kind, message_id: u16) {
        assert_eq!(self.give(kind, Code::EMPTY, message_id, &[], &[], &[]), None);
    }
}

fn get() -> Call {
    Call::get(vec!["sensors".into(), "temp".into()], seconds(120))
}

fn seconds(s: u64) -> Duration {
    Duration::from_secs(s)
}

#[test]
fn a_call_is_answered_in_the_acknowledgement_or_later() {
    let mut bench = Bench::new();
    let (id, asked) = bench.called(false);
    assert_eq!(bench.acknowledge(&asked, &[], b"21"), Some((id, Code::CONTENT, b"21".to_vec(), false)));
    assert_eq!(bench.acknowledge(&asked, &[], b"21"), None, "once");
    assert!(bench.sent().is_empty());

    let (id, asked) = bench.called(false);
    bench.empty(Kind::Acknowledgement, asked.message_id);
    bench.advance(seconds(30));
    assert!(bench.sent().is_empty(), "acknowledged, so not sent again");
    let separate = |bench: &mut Bench| bench.give(Kind::Confirmable, Code::CONTENT, 500, &asked.token, &[], b"22");
    assert_eq!(separate(&mut bench), Some((id, Code::CONTENT, b"22".to_vec(), false)));
    let acknowledgement = bench.one();
    assert_eq!((acknowledgement.kind, acknowledgement.message_id), (Kind::Acknowledgement, 500));
    assert_eq!(separate(&mut bench), None);
    assert_eq!(bench.one().kind, Kind::Acknowledgement, "its acknowledgement was lost");
    assert_eq!(bench.endpoint.next_timeout(), None, "nothing is left to do");
}

#[test]
fn an_answer_with_another_token_or_from_another_peer_is_no_answer() {
    let mut bench = Bench::new();
    let (id, asked) = bench.called(false);
    assert_eq!(bench.give(Kind::NonConfirmable, Code::CONTENT, 1, &[0; 8], &[], b"x"), None);
    let here = std::mem::replace(&mut bench.device, "192.0.2.66:1".parse().unwrap());
    assert_eq!(bench.give(Kind::Confirmable, Code::CONTENT, 2, &asked.token, &[], b"x"), None);
    assert_eq!(bench.one().kind, Kind::Reset);
    bench.device = here;
    let got = bench.give(Kind::NonConfirmable, Code::CONTENT, 3, &asked.token, &[], b"x");
    assert_eq!(got.map(|(call, ..)| call), Some(id));
}

#[test]
fn a_call_is_sent_five_times_within_93_seconds_and_then_fails() {
    let mut bench = Bench::new();
    let (id, first) = bench.called(false);
    bench.advance(seconds(100));
    let again = bench.sent();
    assert_eq!(again.len(), 4);
    assert!(again.iter().all(|m| (m.message_id, &m.token) == (first.message_id, &first.token)));
    assert_eq!(bench.events(), [Event::CallFailed { call: id, error: CallError::TimedOut }]);
    // Acknowledged, and no answer.
    let (id, asked) = bench.called(false);
    bench.empty(Kind::Acknowledgement, asked.message_id);
    bench.advance(seconds(119));
    assert_eq!(bench.events(), []);
    bench.advance(seconds(2));
    assert_eq!(bench.events(), [Event::CallFailed { call: id, error: CallError::TimedOut }]);
}

#[test]
fn a_reset_or_an_unknown_critical_option_fails_the_call() {
    let mut bench = Bench::new();
    let (id, asked) = bench.called(false);
    bench.empty(Kind::Reset, asked.message_id);
    assert_eq!(bench.events(), [Event::CallFailed { call: id, error: CallError::Reset }]);
    let (id, asked) = bench.called(false);
    assert_eq!(bench.acknowledge(&asked, &[(2001, b"x")], b"21"), None);
    assert_eq!(bench.events(), [Event::CallFailed { call: id, error: CallError::Broken }]);
}

#[test]
fn calls_to_one_peer_take_turns_and_are_bounded() {
    let mut bench = Bench::with(Config { calls_peer_max: 3, calls_max: 4, ..Config::default() });
    let ids: Vec<_> = (0..3).map(|_| bench.begin(get())).collect();
    assert_eq!(bench.endpoint.call(bench.now, bench.device, get()), Err(CallsFull));
    let first = bench.one();
    bench.empty(Kind::Acknowledgement, first.message_id);
    let second = bench.one();
    bench.endpoint.hang_up(bench.now, ids[1]);
    let third = bench.one();
    assert!(third.token != second.token && third.message_id != second.message_id);
    assert_eq!(bench.acknowledge(&third, &[], b"3").map(|(id, ..)| id), Some(ids[2]));
    let late = bench.give(Kind::NonConfirmable, Code::CONTENT, 9, &first.token, &[], b"1");
    assert_eq!(late.map(|(id, ..)| id), Some(ids[0]));
    assert_eq!(bench.endpoint.counters().calls, 0);
    // All together.
    for host in 1..=4 {
        bench.endpoint.call(bench.now, SocketAddr::from(([192, 0, 2, host], 1)), get()).unwrap();
    }
    assert_eq!(bench.endpoint.call(bench.now, bench.device, get()), Err(CallsFull));
}

#[test]
fn an_answer_in_blocks_is_fetched_whole_and_mixed_versions_are_refused() {
    let mut bench = Bench::new();
    let (id, first) = bench.called(false);
    let block = |value: &'static [u8], etag: &'static [u8]| [(number::ETAG, etag), (number::BLOCK2, value)];
    assert_eq!(bench.acknowledge(&first, &block(&[0x08], b"a"), &[1; 16]), None);
    let second = bench.one();
    assert_eq!((second.option(number::BLOCK2), &second.token), (Some(0x10), &first.token));
    let whole = [&[1; 16][..], b"end"].concat();
    assert_eq!(bench.acknowledge(&second, &block(&[0x10], b"a"), b"end"), Some((id, Code::CONTENT, whole, false)));

    let (id, first) = bench.called(false);
    assert_eq!(bench.acknowledge(&first, &block(&[0x08], b"a"), &[1; 16]), None);
    let second = bench.one();
    assert_eq!(bench.acknowledge(&second, &block(&[0x10], b"b"), b"end"), None);
    assert_eq!(bench.events(), [Event::CallFailed { call: id, error: CallError::Broken }]);
}

#[test]
fn an_answer_that_never_ends_is_given_up_at_the_limit() {
    let mut bench = Bench::with(Config { body_bytes_max: 100, ..Config::default() });
    let (id, mut asked) = bench.called(false);
    for number in 0u8..6 {
        assert_eq!(bench.acknowledge(&asked, &[(number::BLOCK2, &[number << 4 | 8])], &[1; 16]), None);
        asked = bench.one();
    }
    assert_eq!(bench.acknowledge(&asked, &[(number::BLOCK2, &[6 << 4 | 8])], &[1; 16]), None);
    assert_eq!(bench.events(), [Event::CallFailed { call: id, error: CallError::TooLarge }]);
}

#[test]
fn a_long_payload_goes_up_in_blocks_of_the_size_that_the_device_wants() {
    let mut bench = Bench::new();
    let payload: Vec<u8> = (0..2500u32).map(|n| n as u8).collect();
    let id = bench.begin(Call { code: Code::PUT, payload: payload.clone(), ..get() });
    let mut asked = bench.one();
    assert_eq!((asked.option(number::BLOCK1), asked.option(number::SIZE1)), (Some(0x0e), Some(2500)));
    let mut got = asked.payload.clone();
    while let Some(sent) = asked.option(number::BLOCK1).filter(|sent| sent & 8 == 8) {
        // The number of what was sent; half the size from here on: 512 bytes are exponent 5.
        let value = [((sent & !7 | 5) >> 8) as u8, (sent & !7 | 5) as u8];
        let options: [(u16, &[u8]); 1] = [(number::BLOCK1, &value)];
        let (id, token) = (asked.message_id, asked.token.clone());
        assert_eq!(bench.give(Kind::Acknowledgement, Code::CONTINUE, id, &token, &options, &[]), None);
        asked = bench.one();
        got.extend_from_slice(&asked.payload);
    }
    assert!(got == payload, "{} bytes", got.len());
    let changed = bench.give(Kind::Acknowledgement, Code::CHANGED, asked.message_id, &asked.token, &[], &[]);
    assert_eq!(changed, Some((id, Code::CHANGED, vec![], false)));
}

#[test]
fn an_observed_resource_goes_on_replying_in_order_until_it_is_hung_up() {
    let mut bench = Bench::new();
    let (id, asked) = bench.called(true);
    assert_eq!(asked.option(number::OBSERVE), Some(0));
    let first = bench.acknowledge(&asked, &[(number::OBSERVE, &[5])], b"a");
    assert_eq!(first, Some((id, Code::CONTENT, b"a".to_vec(), true)));
    let notify = |bench: &mut Bench, kind, sequence: u8, payload: &[u8]| {
        let id = 600 + u16::from(sequence);
        bench.give(kind, Code::CONTENT, id, &asked.token, &[(number::OBSERVE, &[sequence])], payload)
    };
    let third = notify(&mut bench, Kind::NonConfirmable, 7, b"c");
    assert_eq!(third, Some((id, Code::CONTENT, b"c".to_vec(), true)));
    assert_eq!(notify(&mut bench, Kind::NonConfirmable, 6, b"b"), None, "older than what is known");
    bench.endpoint.hang_up(bench.now, id);
    for kind in [Kind::Confirmable, Kind::NonConfirmable] {
        assert_eq!(notify(&mut bench, kind, 8, b"d"), None);
        assert_eq!(bench.one().kind, Kind::Reset);
    }
}

#[test]
fn what_is_observed_and_silent_for_its_max_age_is_asked_again_and_then_given_up() {
    let mut bench = Bench::new();
    let (id, asked) = bench.called(true);
    let options: [(u16, &[u8]); 2] = [(number::OBSERVE, &[200]), (number::MAX_AGE, &[60])];
    assert!(bench.acknowledge(&asked, &options, b"a").is_some());
    bench.advance(seconds(69));
    assert!(bench.sent().is_empty());
    bench.advance(seconds(2));
    let again = bench.one();
    assert_eq!((again.option(number::OBSERVE), &again.token), (Some(0), &asked.token));
    // A device that was restarted counts from the beginning.
    let renewed = bench.acknowledge(&again, &[(number::OBSERVE, &[1])], b"b");
    assert_eq!(renewed, Some((id, Code::CONTENT, b"b".to_vec(), true)));
    bench.advance(seconds(300));
    assert_eq!(bench.events(), [Event::CallFailed { call: id, error: CallError::TimedOut }]);
}

#[test]
fn an_error_or_an_answer_without_observe_ends_the_observation() {
    let mut bench = Bench::new();
    let (id, asked) = bench.called(true);
    assert!(bench.acknowledge(&asked, &[(number::OBSERVE, &[5])], b"a").is_some());
    let gone = bench.give(Kind::NonConfirmable, Code::NOT_FOUND, 700, &asked.token, &[], b"");
    assert_eq!(gone, Some((id, Code::NOT_FOUND, vec![], false)));
    assert_eq!(bench.endpoint.counters().calls, 0);
    let (id, asked) = bench.called(true);
    assert_eq!(bench.acknowledge(&asked, &[], b"a"), Some((id, Code::CONTENT, b"a".to_vec(), false)));
}

#[test]
fn over_tcp_an_answer_comes_in_blocks_of_many_times_1024_bytes() {
    let mut connection = Connection::new(tcp::Config::default(), "192.0.2.7:1".parse().unwrap());
    connection.handle_input(&frame(Code::CSM, &[], &[])).unwrap();
    connection.handle_sent(connection.output().len());
    let id = connection.call(Call::get(vec!["a".into()], seconds(1))).unwrap();
    let token = connection.output()[2..10].to_vec();
    connection.handle_sent(connection.output().len());
    // Block2 (23) is number, more, exponent 7; the message is longer than the short frames of the other tests.
    let long = |block: u8, payload: &[u8]| {
        let body = [&[0xd1, 10, block, 0xff][..], payload].concat();
        let extended = u16::try_from(body.len() - 269).unwrap().to_be_bytes();
        [&[14 << 4 | 8, extended[0], extended[1], Code::CONTENT.0][..], &token, &body].concat()
    };
    let (first, last) = (long(0x0f, &[1; 2048]), long(0x27, &[2; 300]));
    let first = connection.handle_input(&first);
    assert!(matches!(first, Ok(Some((_, tcp::Received::Nothing)))), "{first:?}");
    assert_eq!(connection.output(), frame(Code::GET, &token, b"\xb1a\xc1\x27"), "block 2");
    let Ok(Some((_, tcp::Received::Reply(reply)))) = connection.handle_input(&last) else { panic!() };
    assert_eq!((reply.call, reply.payload.len()), (id, 2348));
}

/// A frame of RFC 8323 with fewer than 13 bytes behind the token.
fn frame(code: Code, token: &[u8], body: &[u8]) -> Vec<u8> {
    let head = [(body.len() as u8) << 4 | token.len() as u8, code.0];
    [&head[..], token, body].concat()
}

#[test]
fn over_tcp_a_call_is_answered_by_its_token_and_an_observation_is_ended_by_observe_1() {
    let mut connection = Connection::new(tcp::Config::default(), "192.0.2.7:1".parse().unwrap());
    connection.handle_input(&frame(Code::CSM, &[], &[])).unwrap();
    connection.handle_sent(connection.output().len());
    let id = connection.call(Call { observe: true, ..Call::get(vec!["a".into()], seconds(1)) }).unwrap();
    let asked = connection.output().to_vec();
    connection.handle_sent(asked.len());
    let token = asked[2..10].to_vec();
    assert_eq!(asked, frame(Code::GET, &token, b"\x60\x51a"));
    for (number, payload) in [(9, b"x"), (3, b"y")] {
        let input = frame(Code::CONTENT, &token, &[0x61, number, 0xff, payload[0]]);
        let Ok(Some((_, tcp::Received::Reply(reply)))) = connection.handle_input(&input) else { panic!() };
        assert_eq!((reply.call, &reply.payload[..], reply.observed), (id, &payload[..], true), "in the order of TCP");
    }
    connection.hang_up(id);
    assert_eq!(connection.output(), frame(Code::GET, &token, b"\x61\x01\x51a"));
    let late = frame(Code::CONTENT, &token, b"\xffx");
    assert!(matches!(connection.handle_input(&late), Ok(Some((_, tcp::Received::Nothing)))));
}

//! The endpoint as a client: calls, answers in blocks, observed resources.

#![allow(clippy::unwrap_used)]

mod bench;

use bench::{Bench, Message, request, seconds};
use tidegate_coap::client::{Call, CallError, CallId};
use tidegate_coap::option::number;
use tidegate_coap::{Code, Config, Event, Kind, Received};

/// A device that is called: reads what we ask and answers.
fn reply(kind: Kind, code: Code, id: u16, token: &[u8], options: &[(u16, &[u8])], payload: &[u8]) -> Vec<u8> {
    request(kind, code, id, token, options, payload)
}

fn called(bench: &mut Bench, observe: bool) -> (CallId, Message) {
    let call = Call { observe, ..Call::get(vec!["sensors".into(), "temp".into()]) };
    let id = bench.endpoint.call(bench.now, bench.peer, call).unwrap();
    let asked = bench.one();
    assert_eq!((asked.kind, asked.code, asked.token.len()), (Kind::Confirmable, Code::GET, 8));
    (id, asked)
}

/// Gives a datagram in and shows the reply: call, code, payload, observed.
fn got_reply(bench: &mut Bench, datagram: &[u8]) -> Option<(CallId, Code, Vec<u8>, bool)> {
    match bench.endpoint.handle_datagram(bench.now, bench.peer, datagram) {
        Received::Reply(reply) => Some((reply.call, reply.code, reply.payload.to_vec(), reply.observed)),
        _ => None,
    }
}

#[test]
fn a_call_is_answered_in_the_acknowledgement_or_later() {
    let mut bench = Bench::new(Config::default());
    let (id, asked) = called(&mut bench, false);
    let answer = reply(Kind::Acknowledgement, Code::CONTENT, asked.message_id, &asked.token, &[], b"21");
    assert_eq!(got_reply(&mut bench, &answer), Some((id, Code::CONTENT, b"21".to_vec(), false)));
    assert_eq!(got_reply(&mut bench, &answer), None, "once");
    assert!(bench.sent().is_empty());

    let (id, asked) = called(&mut bench, false);
    bench.empty(Kind::Acknowledgement, asked.message_id);
    bench.advance(seconds(30));
    assert!(bench.sent().is_empty(), "acknowledged, so not sent again");
    let answer = reply(Kind::Confirmable, Code::CONTENT, 500, &asked.token, &[], b"22");
    assert_eq!(got_reply(&mut bench, &answer), Some((id, Code::CONTENT, b"22".to_vec(), false)));
    let acknowledgement = bench.one();
    assert_eq!((acknowledgement.kind, acknowledgement.message_id), (Kind::Acknowledgement, 500));
}

#[test]
fn an_answer_with_another_token_or_from_another_peer_is_no_answer() {
    let mut bench = Bench::new(Config::default());
    let (id, asked) = called(&mut bench, false);
    let forged = reply(Kind::NonConfirmable, Code::CONTENT, 1, &[0; 8], &[], b"x");
    assert_eq!(got_reply(&mut bench, &forged), None);
    let right = reply(Kind::NonConfirmable, Code::CONTENT, 2, &asked.token, &[], b"x");
    let here = std::mem::replace(&mut bench.peer, "192.0.2.66:1".parse().unwrap());
    assert_eq!(got_reply(&mut bench, &right), None);
    bench.peer = here;
    assert_eq!(got_reply(&mut bench, &right).map(|(call, ..)| call), Some(id));
}

#[test]
fn a_call_without_an_answer_fails_and_one_that_is_reset_too() {
    let mut bench = Bench::new(Config::default());
    let (id, _) = called(&mut bench, false);
    bench.advance(seconds(100));
    bench.endpoint.swap_batch(&mut Default::default());
    assert_eq!(bench.events(), [Event::CallFailed { call: id, error: CallError::TimedOut }]);
    let (id, asked) = called(&mut bench, false);
    bench.empty(Kind::Reset, asked.message_id);
    assert_eq!(bench.events(), [Event::CallFailed { call: id, error: CallError::Reset }]);
    let (id, asked) = called(&mut bench, false);
    bench.empty(Kind::Acknowledgement, asked.message_id);
    bench.advance(seconds(121));
    assert_eq!(bench.events(), [Event::CallFailed { call: id, error: CallError::TimedOut }]);
}

#[test]
fn an_answer_in_blocks_is_fetched_whole_and_mixed_versions_are_refused() {
    let mut bench = Bench::new(Config::default());
    let (id, first) = called(&mut bench, false);
    let block = |asked: &Message, value: u8, etag: &[u8], piece: &[u8]| {
        let options: [(u16, &[u8]); 2] = [(number::ETAG, etag), (number::BLOCK2, &[value])];
        reply(Kind::Acknowledgement, Code::CONTENT, asked.message_id, &asked.token, &options, piece)
    };
    assert_eq!(got_reply(&mut bench, &block(&first, 0x08, b"a", &[1; 16])), None);
    let second = bench.one();
    assert_eq!((second.option(number::BLOCK2), &second.token), (Some(0x10), &first.token));
    let whole = [&[1; 16][..], b"end"].concat();
    assert_eq!(got_reply(&mut bench, &block(&second, 0x10, b"a", b"end")), Some((id, Code::CONTENT, whole, false)));

    let (id, first) = called(&mut bench, false);
    assert_eq!(got_reply(&mut bench, &block(&first, 0x08, b"a", &[1; 16])), None);
    let second = bench.one();
    assert_eq!(got_reply(&mut bench, &block(&second, 0x10, b"b", b"end")), None);
    assert_eq!(bench.events(), [Event::CallFailed { call: id, error: CallError::Broken }]);
}

#[test]
fn an_observed_resource_goes_on_replying_in_order_until_it_is_hung_up() {
    let mut bench = Bench::new(Config::default());
    let (id, asked) = called(&mut bench, true);
    assert_eq!(asked.option(number::OBSERVE), Some(0));
    let first =
        reply(Kind::Acknowledgement, Code::CONTENT, asked.message_id, &asked.token, &[(number::OBSERVE, &[5])], b"a");
    assert_eq!(got_reply(&mut bench, &first), Some((id, Code::CONTENT, b"a".to_vec(), true)));
    let notification = |sequence: u8, payload: &[u8]| {
        let options: [(u16, &[u8]); 1] = [(number::OBSERVE, &[sequence])];
        reply(Kind::NonConfirmable, Code::CONTENT, 600 + u16::from(sequence), &asked.token, &options, payload)
    };
    assert_eq!(got_reply(&mut bench, &notification(7, b"c")), Some((id, Code::CONTENT, b"c".to_vec(), true)));
    assert_eq!(got_reply(&mut bench, &notification(6, b"b")), None, "older than what is known");
    bench.endpoint.hang_up(id);
    let late = reply(Kind::Confirmable, Code::CONTENT, 700, &asked.token, &[(number::OBSERVE, &[8])], b"d");
    assert_eq!(got_reply(&mut bench, &late), None);
    assert_eq!(bench.one().kind, Kind::Reset);
}

//! Bodies in blocks over a reliable transport (RFC 8323 section 6).

use super::tests::{Sent, frame, sent};
use super::*;
use crate::option::number;

/// A connection whose peer takes messages of `bytes`, in blocks too.
fn in_blocks(bytes: u16) -> Connection {
    let mut connection = Connection::new(Config::default(), "192.0.2.1:1".parse().unwrap());
    connection.handle_sent(usize::MAX);
    let csm = frame(Code::CSM, b"", &[(2, &bytes.to_be_bytes()), (4, b"")], b"");
    connection.handle_input(&csm).unwrap();
    connection
}

fn option(sent: &Sent, number: u16) -> Option<u64> {
    sent.2.iter().find(|(n, _)| *n == number).and_then(|(_, value)| option::uint(value))
}

#[test]
fn a_long_answer_goes_out_in_several_blocks_of_each_message() {
    let mut connection = in_blocks(4000);
    let body: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
    let (mut got, mut asked) = (Vec::new(), vec![]);
    for (number, more) in [(0u32, true), (3, true), (6, true), (9, false)] {
        let options: Vec<(u16, &[u8])> =
            [(number::URI_PATH, &b"x"[..])].into_iter().chain(asked.iter().map(|v: &Vec<u8>| (23, &v[..]))).collect();
        let get = frame(Code::GET, b"t", &options, b"");
        let Ok(Some((_, Received::Request(request)))) = connection.handle_input(&get) else { panic!() };
        connection.respond(request.handle, &Response::new(Code::CONTENT).content(None, &body)).unwrap();
        let answer = sent(&mut connection).remove(0);
        let block = u64::from(number) << 4 | u64::from(more) << 3 | 7;
        assert_eq!(option(&answer, number::BLOCK2), Some(block), "block {number}");
        got.extend_from_slice(&answer.3);
        asked = vec![vec![((got.len() / 1024) << 4) as u8 | 7]];
    }
    assert!(got == body);
}

#[test]
fn a_post_answered_in_blocks_has_its_effect_once() {
    let mut connection = in_blocks(4000);
    let post = frame(Code::POST, b"t", &[(number::URI_PATH, b"x")], b"do");
    let Ok(Some((_, Received::Request(request)))) = connection.handle_input(&post) else { panic!() };
    connection.respond(request.handle, &Response::new(Code::CHANGED).content(None, &[5; 5000])).unwrap();
    let first = sent(&mut connection).remove(0);
    assert_eq!((first.0, first.3.len(), option(&first, number::BLOCK2)), (Code::CHANGED, 3072, Some(0x0f)));
    let rest = frame(Code::POST, b"t", &[(number::URI_PATH, b"x"), (number::BLOCK2, &[0x37])], b"");
    assert!(matches!(connection.handle_input(&rest), Ok(Some((_, Received::Nothing)))));
    let last = sent(&mut connection).remove(0);
    assert_eq!((last.0, last.3.len(), option(&last, number::BLOCK2)), (Code::CHANGED, 1928, Some(0x37)));
    assert!(matches!(connection.handle_input(&rest), Ok(Some((_, Received::Nothing)))));
    assert_eq!(sent(&mut connection).remove(0).0, Code::REQUEST_ENTITY_INCOMPLETE, "it is over");
}

#[test]
fn a_body_in_blocks_of_any_size_comes_whole_and_within_its_bound() {
    let mut connection = in_blocks(4000);
    let put = |number: u32, more: bool, exponent: u8, tag: &[u8], piece: &[u8]| {
        let block = Block { number, more, exponent }.bits().to_be_bytes();
        let options: [(u16, &[u8]); 3] =
            [(number::URI_PATH, b"x"), (number::BLOCK1, &block[1..]), (number::REQUEST_TAG, tag)];
        frame(Code::PUT, b"t", &options, piece)
    };
    // Two at a time, told apart by Request-Tag: several blocks in a message, and single ones.
    for message in
        [put(0, true, 7, b"a", &[1; 3072]), put(0, true, 2, b"b", &[2; 64]), put(3, true, 7, b"a", &[1; 1024])]
    {
        assert!(matches!(connection.handle_input(&message), Ok(Some((_, Received::Nothing)))));
        let answer = sent(&mut connection).remove(0);
        assert_eq!((answer.0, option(&answer, number::BLOCK1).unwrap() & 8), (Code::CONTINUE, 8));
    }
    for (message, length) in [(put(4, false, 7, b"a", &[1; 1500]), 5596), (put(1, false, 2, b"b", b"end"), 67)] {
        let Ok(Some((_, Received::Request(request)))) = connection.handle_input(&message) else { panic!() };
        assert_eq!(request.payload.len(), length);
        connection.respond(request.handle, &Response::new(Code::CHANGED)).unwrap();
        let answer = sent(&mut connection).remove(0);
        assert_eq!((answer.0, option(&answer, number::BLOCK1).unwrap() & 8), (Code::CHANGED, 0));
    }
    for (message, code) in [
        (put(0, true, 7, b"", &[1; 1000]), Code::BAD_REQUEST),
        (put(0, true, 7, b"", b""), Code::BAD_REQUEST),
        (put(5, true, 7, b"", &[1; 1024]), Code::REQUEST_ENTITY_INCOMPLETE),
    ] {
        assert!(matches!(connection.handle_input(&message), Ok(Some((_, Received::Nothing)))));
        assert_eq!(sent(&mut connection).remove(0).0, code);
    }
    let mut answers = Vec::new();
    for number in (0..260).step_by(20) {
        assert!(connection.handle_input(&put(number, true, 7, b"long", &[1; 20 << 10])).is_ok());
        answers.push(sent(&mut connection).remove(0));
    }
    assert!(answers[..12].iter().all(|answer| answer.0 == Code::CONTINUE));
    assert_eq!((answers[12].0, option(&answers[12], number::SIZE1)), (Code::REQUEST_ENTITY_TOO_LARGE, Some(256 << 10)));
}

//! Requests to a group (RFC 7252 section 8): who is there, and what does it serve.
//!
//! A request to a group reaches many, and the address it comes from may be anybody's. So little is answered: only what a non-confirmable GET asks, never
//! by an error or a reset, never with nothing to say; each address once at a time; after a random part of the leisure, so that not all members answer
//! at once; and with no more than anybody gets (136 bytes, or three times the question): a longer answer is its first block, whose rest is asked for by
//! unicast (RFC 7959 section 2.8).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::answer::ANSWER_BYTES_ALWAYS;
use crate::block::Block;
use crate::build::Builder;
use crate::endpoint::Handle;
use crate::message::{Kind, MessageView, TOKEN_BYTES_MAX};
use crate::option::number;
use crate::peer::{self, MessageIds, PeerKey, Secret};
use crate::request::{self, Observe, Request};
use crate::response::{self, Added, Response};
use crate::slots::Slot;

/// Limits and times of a group's member.
#[derive(Clone, Debug)]
pub struct Config {
    /// DEFAULT_LEISURE: the time over which the members of a group spread their answers.
    pub leisure: Duration,
    /// Answers that wait for their time; beyond, requests are ignored.
    pub waiting_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config { leisure: Duration::from_secs(5), waiting_max: 64 }
    }
}

/// What a datagram to the group asks, and how it is answered.
#[derive(Debug)]
pub struct Group {
    config: Config,
    secret: Secret,
    message_ids: MessageIds,
    /// By time, and who waits.
    answers: BTreeMap<(Instant, SocketAddr), Vec<u8>>,
}

impl Group {
    /// `seed` must be secret and new for each start.
    pub fn new(config: Config, seed: [u8; 32]) -> Self {
        let mut secret = Secret::new(seed);
        let message_ids = MessageIds::new(&mut secret);
        Group { config, secret, message_ids, answers: BTreeMap::new() }
    }

    /// A request that may be worth an answer; everything else is ignored in silence (sections 8.1 and 8.2). The handle in it means nothing.
    pub fn handle_datagram<'d>(&self, peer: SocketAddr, datagram: &'d [u8]) -> Option<Request<'d>> {
        if peer::is_multicast(peer) || peer.port() == 0 || self.answers.len() >= self.config.waiting_max {
            return None;
        }
        // One answer is on its way: to a duplicate, or to who asks on.
        if self.answers.keys().any(|(_, waiting)| *waiting == peer) {
            return None;
        }
        let MessageView { kind, contents, .. } = MessageView::parse(datagram).ok()?;
        if kind != Kind::NonConfirmable || contents.code != crate::Code::GET || contents.token.len() > TOKEN_BYTES_MAX {
            return None;
        }
        let inspected = request::inspect(contents).ok()?;
        let is_plain = inspected.block1.is_none() && inspected.observe != Some(Observe::Register);
        let is_first = inspected.block2.is_none_or(|block| block.number == 0);
        if !is_plain || !is_first || inspected.no_response & SUCCESS != 0 {
            return None;
        }
        Some(Request {
            handle: Handle(Slot::from_bits(0)),
            peer,
            confirmable: false,
            contents,
            path: inspected.path,
            payload: contents.payload.into(),
            observe: None,
        })
    }

    /// Takes the answer, to be sent at a time within the leisure. An error or an empty answer is not sent (section 8.2).
    pub fn respond(&mut self, now: Instant, request: &Request<'_>, asked_bytes: usize, response: &Response<'_>) {
        if !response.code.is_success() || response.payload.is_empty() {
            return;
        }
        let message_id = self.message_ids.next(&self.secret, PeerKey::new(request.peer));
        let asked = request.contents.first(number::BLOCK2).and_then(Block::parse);
        let bytes_max = ANSWER_BYTES_ALWAYS.max(3 * asked_bytes);
        let largest = asked.map_or(EXPONENT_MAX, |block| block.exponent.min(EXPONENT_MAX));
        for exponent in (0..=largest).rev() {
            let bytes = write(request, message_id, exponent, asked.is_some(), response);
            if bytes.len() <= bytes_max {
                let leisure_nanos = u64::try_from(self.config.leisure.as_nanos()).unwrap_or(u64::MAX).max(1);
                let at = now + Duration::from_nanos(self.secret.random() % leisure_nanos);
                self.answers.insert((at, request.peer), bytes);
                return;
            }
        }
    }

    /// When to call [`Group::take_due`].
    pub fn next_due(&self) -> Option<Instant> {
        self.answers.keys().next().map(|(at, _)| *at)
    }

    /// An answer whose time has come.
    pub fn take_due(&mut self, now: Instant) -> Option<(SocketAddr, Vec<u8>)> {
        let first = self.answers.first_entry().filter(|first| first.key().0 <= now)?;
        let ((_, peer), bytes) = first.remove_entry();
        Some((peer, bytes))
    }
}

fn write(request: &Request<'_>, message_id: u16, exponent: u8, wants_block: bool, response: &Response<'_>) -> Vec<u8> {
    let payload = response.payload;
    let size = 16usize << exponent;
    let more = payload.len() > size;
    let block2 = (more || wants_block).then(|| Block { number: 0, more, exponent }.bits());
    let added = Added { block2, size2: block2.and(u32::try_from(payload.len()).ok()), ..Added::default() };
    let mut out = Vec::new();
    let token = request.contents.token;
    let builder = Builder::datagram(&mut out, Kind::NonConfirmable, response.code, message_id, token);
    response::write(response, added, payload.get(..size).unwrap_or(payload), builder);
    out
}

/// RFC 7967: the bit of 2.xx.
const SUCCESS: u8 = 2;
/// Blocks of 1024 bytes.
const EXPONENT_MAX: u8 = 6;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Code;

    const TEXT: Response<'static> = Response::new(Code::CONTENT).content(Some(40), b"</a>,</b>");

    fn peer(n: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], n))
    }

    fn asked(kind: Kind, code: Code, options: &[(u16, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut builder = Builder::datagram(&mut out, kind, code, 7, b"tok");
        for (number, value) in options {
            builder = builder.option(*number, value);
        }
        builder.payload(&[]);
        out
    }

    fn discovery() -> Vec<u8> {
        asked(Kind::NonConfirmable, Code::GET, &[(number::URI_PATH, b".well-known"), (number::URI_PATH, b"core")])
    }

    /// The time of the answer, and its datagram.
    fn answer(
        group: &mut Group,
        now: Instant,
        n: u16,
        datagram: &[u8],
        response: &Response<'_>,
    ) -> (Duration, Vec<u8>) {
        let request = group.handle_datagram(peer(n), datagram).unwrap();
        group.respond(now, &request, datagram.len(), response);
        let at = group.next_due().unwrap();
        let (to, bytes) = group.take_due(at).unwrap();
        assert_eq!(to, peer(n));
        (at - now, bytes)
    }

    #[test]
    fn a_group_is_answered_by_non_at_times_spread_over_the_leisure() {
        let (mut group, now) = (Group::new(Config::default(), [1; 32]), Instant::now());
        let mut times = Vec::new();
        for n in 1..=100 {
            let (after, bytes) = answer(&mut group, now, n, &discovery(), &TEXT);
            let view = MessageView::parse(&bytes).unwrap();
            assert_eq!((view.kind, view.contents.code), (Kind::NonConfirmable, Code::CONTENT));
            assert_eq!((view.contents.token, view.contents.payload), (&b"tok"[..], TEXT.payload));
            assert!(after < Duration::from_secs(5));
            times.push(after.as_secs());
        }
        assert!((0..5).all(|second| times.contains(&second)), "{times:?}");
    }

    #[test]
    fn what_is_no_plain_non_get_is_ignored_in_silence() {
        let group = Group::new(Config::default(), [1; 32]);
        let path = (number::URI_PATH, &b"x"[..]);
        let non = |code, options: &[(u16, &[u8])]| asked(Kind::NonConfirmable, code, options);
        assert!(group.handle_datagram(peer(1), &non(Code::GET, &[path])).is_some());
        for datagram in [
            asked(Kind::Confirmable, Code::GET, &[path]),
            asked(Kind::Confirmable, Code::EMPTY, &[])[..4].to_vec(),
            non(Code::POST, &[path]),
            non(Code::GET, &[(9, b""), path]),
            non(Code::GET, &[(number::OBSERVE, b""), path]),
            non(Code::GET, &[path, (number::BLOCK2, &[0x16])]),
            non(Code::GET, &[path, (number::NO_RESPONSE, &[2])]),
            non(Code::CONTENT, &[]),
            b"\x50\x01\0\0\xff".to_vec(),
            Vec::new(),
        ] {
            assert!(group.handle_datagram(peer(1), &datagram).is_none(), "{datagram:02x?}");
        }
        assert!(group.handle_datagram("224.0.0.1:5683".parse().unwrap(), &discovery()).is_none());
        assert!(group.handle_datagram(peer(0), &discovery()).is_none());
    }

    #[test]
    fn errors_and_nothing_are_not_said_to_a_group() {
        let mut group = Group::new(Config::default(), [1; 32]);
        let datagram = discovery();
        for response in [Response::new(Code::NOT_FOUND).diagnostic("no"), Response::new(Code::CONTENT)] {
            let request = group.handle_datagram(peer(1), &datagram).unwrap();
            group.respond(Instant::now(), &request, datagram.len(), &response);
            assert_eq!(group.next_due(), None);
        }
    }

    #[test]
    fn a_long_answer_is_its_first_block_and_never_more_than_three_times_the_question() {
        let (mut group, now) = (Group::new(Config::default(), [1; 32]), Instant::now());
        let long = vec![b'x'; 5000];
        let (_, bytes) =
            answer(&mut group, now, 1, &discovery(), &Response::new(Code::CONTENT).content(Some(40), &long));
        let view = MessageView::parse(&bytes).unwrap();
        assert!(bytes.len() <= 136 && view.contents.payload.len() == 64, "{}", bytes.len());
        assert_eq!(view.contents.uint(number::BLOCK2), Some(0x0a));
        assert_eq!(view.contents.uint(number::SIZE2), Some(5000));
        let mut smallest = discovery();
        smallest.extend_from_slice(&[0xc0]);
        let (_, bytes) = answer(&mut group, now, 1, &smallest, &TEXT);
        assert_eq!(MessageView::parse(&bytes).unwrap().contents.uint(number::BLOCK2), Some(0));
    }

    #[test]
    fn each_address_has_one_answer_waiting_and_all_together_are_bounded() {
        let (mut group, now) = (Group::new(Config::default(), [1; 32]), Instant::now());
        let datagram = discovery();
        for n in 1..=64 {
            let request = group.handle_datagram(peer(n), &datagram).unwrap();
            group.respond(now, &request, datagram.len(), &TEXT);
            assert!(group.handle_datagram(peer(n), &datagram).is_none());
        }
        assert!(group.handle_datagram(peer(65), &datagram).is_none());
        let mut sent = 0;
        while group.take_due(now + Duration::from_secs(5)).is_some() {
            sent += 1;
        }
        assert_eq!(sent, 64);
        assert!(group.handle_datagram(peer(1), &datagram).is_some());
    }
}

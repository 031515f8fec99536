//! What holds for every message: nothing panics, what is built reads back, and coap-lite reads the same from everything well-formed.

#![allow(clippy::unwrap_used)]

use std::time::Instant;

use proptest::prelude::*;
use tidegate_coap::option::number;
use tidegate_coap::uri::Path;
use tidegate_coap::{Builder, Code, Config, Endpoint, Kind, MessageView, Output, Received, Response};

#[derive(Clone, Debug)]
struct Draft {
    kind: Kind,
    code: u8,
    message_id: u16,
    token: Vec<u8>,
    options: Vec<(u16, Vec<u8>)>,
    payload: Vec<u8>,
}

impl Draft {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut builder = Builder::datagram(&mut out, self.kind, Code(self.code), self.message_id, &self.token);
        for (number, value) in &self.options {
            builder = builder.option(*number, value);
        }
        builder.payload(&self.payload);
        out
    }
}

fn known_number() -> impl Strategy<Value = u16> {
    prop::sample::select(vec![
        number::IF_MATCH,
        number::URI_HOST,
        number::ETAG,
        number::OBSERVE,
        number::URI_PATH,
        number::CONTENT_FORMAT,
        number::URI_QUERY,
        number::ACCEPT,
        number::BLOCK1,
        number::BLOCK2,
        number::SIZE1,
        number::ECHO,
        number::NO_RESPONSE,
    ])
}

fn draft() -> impl Strategy<Value = Draft> {
    let bytes = |max| prop::collection::vec(any::<u8>(), 0..max);
    let short = prop_oneof![4 => bytes(4), 1 => bytes(300)];
    let option = (prop_oneof![4 => known_number(), 1 => any::<u16>()], short);
    let code = prop::sample::select(vec![1u8, 2, 3, 4, 5, 6, 7, 8]);
    let kind = prop::sample::select(vec![Kind::Confirmable, Kind::NonConfirmable]);
    (kind, code, any::<u16>(), bytes(9), prop::collection::vec(option, 0..8), bytes(64)).prop_map(
        |(kind, code, message_id, token, mut options, payload)| {
            options.sort_by_key(|(number, _)| *number);
            Draft { kind, code, message_id, token, options, payload }
        },
    )
}

/// Feeds one datagram and answers whatever comes of it; every transmission must parse.
fn exercise(endpoint: &mut Endpoint, now: Instant, datagram: &[u8], body: &[u8]) {
    let peer = "192.0.2.1:5683".parse().expect("an address");
    let response = Response::new(Code::CONTENT).content(Some(0), body);
    match endpoint.handle_datagram(now, peer, datagram) {
        Received::Nothing => {}
        Received::Request(request) => {
            let _ = request.path.join(0);
            let _ = request.query().pairs().count();
            let handle = request.handle;
            match request.observe {
                Some(_) => drop(endpoint.observe(now, handle, &response)),
                None => drop(endpoint.respond(now, handle, &response)),
            }
        }
        Received::Upload(request) => drop(endpoint.accept_upload(now, &request)),
        Received::Reply(_) => {}
    }
    loop {
        match endpoint.poll_output() {
            Output::Transmit { bytes, .. } => {
                MessageView::parse(bytes).expect("we send well-formed messages");
                assert!(bytes.len() <= 136.max(3 * datagram.len()), "an answer to a stranger is bounded");
            }
            Output::Event(_) => {}
            Output::Timeout(_) => break,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_never_panic_and_accessors_never_fail(datagram in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(view) = MessageView::parse(&datagram) {
            let _ = (view.contents.content_format(), view.contents.observe(), view.contents.uri_host());
            let _ = view.contents.options().count();
            let _ = Path::of(view.contents).map(|path| path.join(0));
        }
        let now = Instant::now();
        let mut endpoint = Endpoint::new(Config::default(), now, [1; 32]);
        exercise(&mut endpoint, now, &datagram, &[0; 2000]);
    }

    #[test]
    fn what_is_built_reads_back(draft in draft()) {
        let datagram = draft.encode();
        let view = MessageView::parse(&datagram).unwrap();
        prop_assert_eq!((view.kind, view.contents.code.0, view.message_id), (draft.kind, draft.code, draft.message_id));
        prop_assert_eq!(view.contents.token, &draft.token[..]);
        let options: Vec<_> = view.contents.options().map(|(n, v)| (n, v.to_vec())).collect();
        prop_assert_eq!(options, draft.options);
        prop_assert_eq!(view.contents.payload, &draft.payload[..]);
    }

    #[test]
    fn coap_lite_reads_the_same_from_well_formed_messages(draft in draft()) {
        let datagram = draft.encode();
        let packet = coap_lite::Packet::from_bytes(&datagram).unwrap();
        prop_assert_eq!(packet.header.message_id, draft.message_id);
        prop_assert_eq!(packet.get_token(), &draft.token[..]);
        prop_assert_eq!(&packet.payload, &draft.payload);
        let theirs: Vec<(u16, Vec<u8>)> = packet
            .options()
            .flat_map(|(number, values)| values.iter().map(move |value| (*number, value.clone())))
            .collect();
        prop_assert_eq!(theirs, draft.options);
    }

    #[test]
    fn what_coap_lite_builds_we_read(path in "[a-z]{1,8}(/[a-z]{1,8}){0,3}", payload in prop::collection::vec(any::<u8>(), 0..50)) {
        let mut request: coap_lite::CoapRequest<()> = coap_lite::CoapRequest::new();
        request.set_method(coap_lite::RequestType::Put);
        request.set_path(&path);
        request.message.header.message_id = 7;
        request.message.payload = payload.clone();
        let datagram = request.message.to_bytes().unwrap();
        let view = MessageView::parse(&datagram).unwrap();
        prop_assert_eq!(view.contents.code, Code::PUT);
        prop_assert_eq!(Path::of(view.contents).unwrap().join(0), path);
        prop_assert_eq!(view.contents.payload, &payload[..]);
    }

    #[test]
    fn a_run_of_plausible_and_damaged_messages_never_panics(
        drafts in prop::collection::vec((draft(), any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..20),
    ) {
        let now = Instant::now();
        let config = Config { observers_max: 3, requests_max: 2, blockwise_bytes_max: 2000, ..Config::default() };
        let mut endpoint = Endpoint::new(config, now, [1; 32]);
        for (draft, at, byte, damage) in &drafts {
            let mut datagram = draft.encode();
            if *damage {
                let at = at.index(datagram.len());
                datagram[at] = *byte;
            }
            exercise(&mut endpoint, now, &datagram, &[3; 100]);
        }
        prop_assert!(endpoint.counters().requests_open == 0);
    }

    #[test]
    fn a_stream_in_any_pieces_is_the_same_stream_and_arbitrary_bytes_never_panic(
        drafts in prop::collection::vec(draft(), 0..6),
        junk in prop::collection::vec(any::<u8>(), 0..40),
        cut in 1usize..40,
    ) {
        let mut stream = vec![0x00, Code::CSM.0];
        for draft in &drafts {
            let mut datagram = draft.encode();
            let body = datagram.split_off(4 + draft.token.len());
            // Option bodies of at most 65804 bytes fit the two-byte length.
            stream.push(14 << 4 | draft.token.len() as u8);
            match body.len().checked_sub(269) {
                Some(length) => stream.extend_from_slice(&(length as u16).to_be_bytes()),
                None => {
                    let at = stream.len() - 1;
                    stream[at] = 13 << 4 | draft.token.len() as u8;
                    match body.len().checked_sub(13) {
                        Some(length) => stream.push(length as u8),
                        None => stream[at] = (body.len() as u8) << 4 | draft.token.len() as u8,
                    }
                }
            }
            stream.push(draft.code);
            stream.extend_from_slice(&draft.token);
            stream.extend_from_slice(&body);
        }
        stream.extend_from_slice(&junk);
        let whole = run_stream(&stream, stream.len());
        prop_assert_eq!(run_stream(&stream, cut), whole);
    }
}

/// Feeds `stream` in pieces and answers each request; returns everything sent.
fn run_stream(stream: &[u8], piece: usize) -> Vec<u8> {
    use tidegate_coap::tcp;
    let mut connection = tcp::Connection::new(tcp::Config::default(), "192.0.2.1:1".parse().unwrap());
    let (mut input, mut sent) = (Vec::new(), Vec::new());
    for chunk in stream.chunks(piece.max(1)) {
        input.extend_from_slice(chunk);
        loop {
            let consumed = match connection.handle_input(&input) {
                Ok(None) => break,
                Err(_) => {
                    sent.extend_from_slice(connection.output());
                    return sent;
                }
                Ok(Some((consumed, tcp::Received::Request(request)))) => {
                    let handle = request.handle;
                    connection.observe(handle, &Response::new(Code::CONTENT).content(Some(0), b"x")).unwrap();
                    consumed
                }
                Ok(Some((consumed, _))) => consumed,
            };
            input.drain(..consumed);
            sent.extend_from_slice(connection.output());
            connection.handle_sent(usize::MAX / 2);
        }
    }
    sent
}

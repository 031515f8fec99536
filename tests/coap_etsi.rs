//! The ETSI plugtest cases for CoAP (CORE, LINK, BLOCK, OBS) as a table, against the whole binary: each by its number, or with the reason why it does not
//! apply. Messages are written and read by `coap-lite`, which shares nothing with the gateway's engine.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::thread;
use std::time::Duration;

use coap_lite::{CoapOption, MessageClass, MessageType, Packet};
use support::coap::CoapClient;
use support::{Gateway, PATIENCE, Wanted};

enum Case {
    Run(fn(&mut Client)),
    /// Held by another test, or nothing that this gateway has.
    Not(&'static str),
}

use Case::{Not, Run};

const NO_LOCATION: &str =
    "topics have the names that clients give them; nothing answers with a location of its own making";
const TIME: &str = "minutes pass; held in virtual time by the tests of protocols/coap";

const CASES: [(&str, Case); 55] = [
    ("CORE_01", Run(|c| c.get(CON))),
    ("CORE_02", Run(|c| c.delete(CON))),
    ("CORE_03", Run(|c| c.put(CON))),
    ("CORE_04", Run(|c| c.post(CON))),
    ("CORE_05", Run(|c| c.get(NON))),
    ("CORE_06", Run(|c| c.delete(NON))),
    ("CORE_07", Run(|c| c.put(NON))),
    ("CORE_08", Run(|c| c.post(NON))),
    ("CORE_09", Run(|c| c.separate(b"tk"))),
    ("CORE_10", Run(|c| c.token(b"a"))),
    ("CORE_11", Run(|c| c.separate(b"12345678"))),
    ("CORE_12", Run(|c| c.token(b""))),
    ("CORE_13", Run(Client::path_of_several_segments)),
    ("CORE_14", Run(Client::query_of_several_arguments)),
    ("CORE_15", Run(Client::piggybacked_over_loss)),
    ("CORE_16", Run(Client::separate_over_loss)),
    ("CORE_17", Run(Client::separate_non)),
    ("CORE_18", Not(NO_LOCATION)),
    ("CORE_19", Not(NO_LOCATION)),
    ("CORE_20", Run(Client::accept)),
    ("CORE_21", Run(|c| c.etag(&["ps", "plant", "etag"]))),
    ("CORE_22", Run(Client::if_match)),
    ("CORE_23", Run(Client::if_none_match)),
    ("CORE_24", Not("RFC 7252 section 10.1 asks for no location of what an HTTP upstream creates")),
    ("CORE_25", Not("RFC 7252 section 10.1 asks for no location of what an HTTP upstream creates")),
    ("CORE_26", Run(Client::proxied_accept)),
    ("CORE_27", Run(Client::proxied_etag)),
    ("CORE_28", Run(Client::proxied_if_match)),
    ("CORE_29", Run(Client::proxied_if_none_match)),
    ("CORE_30", Run(Client::proxied_max_age)),
    ("CORE_31", Run(Client::ping)),
    ("LINK_01", Run(|c| c.links(&[".well-known", "core"], "", &["</t>", "</ps/plant/linked>"], &[]))),
    ("LINK_02", Run(|c| c.core("rt=tidegate.telemetry", &["</t>"], &["</e>", "</ps"]))),
    ("LINK_03", Run(|c| c.core("rt=core.ps.data", &["</ps/plant/linked>"], &["</t>"]))),
    ("LINK_04", Run(|c| c.core("rt=tidegate*", &["</t>", "</e>"], &["</ps"]))),
    ("LINK_05", Run(|c| c.core("if=sensor", &[], &["<"]))),
    ("LINK_06", Run(|c| c.core("sz=*", &[], &["<"]))),
    ("LINK_07", Run(|c| c.core("href=/t", &["</t>"], &["</e>", "</ps"]))),
    ("LINK_08", Run(|c| c.core("href=/ps*", &["</ps>", "</ps/plant/linked>"], &["</t>"]))),
    ("LINK_09", Run(|c| c.links(&["ps"], "", &["</ps/plant/linked>"], &["</t>"]))),
    ("BLOCK_01", Run(|c| c.long_get(Some(2)))),
    ("BLOCK_02", Run(|c| c.long_get(None))),
    ("BLOCK_03", Run(|c| c.long_put(PUT))),
    ("BLOCK_04", Run(|c| c.long_put(POST))),
    ("BLOCK_05", Run(Client::long_both_ways)),
    ("BLOCK_06", Run(|c| c.long_get(Some(0)))),
    ("OBS_01", Run(|c| c.observe(CON))),
    ("OBS_02", Run(|c| c.observe(NON))),
    ("OBS_03", Run(Client::observe_until_deregistered)),
    ("OBS_04", Not("the client's: it registers again after Max-Age")),
    ("OBS_05", Not(TIME)),
    ("OBS_06", Run(Client::observe_until_reset)),
    ("OBS_07", Not("a topic outlives its value: who observes it waits for the next")),
    ("OBS_08", Run(Client::observe_until_the_format_changes)),
    ("OBS_09", Run(Client::observe_what_he_changes)),
];

#[test]
fn every_case_passes_or_says_why_not() {
    let mut numbers = CASES.iter().map(|(name, _)| *name);
    for (group, last) in [("CORE", 31), ("LINK", 9), ("BLOCK", 6), ("OBS", 9)] {
        for number in 1..=last {
            assert_eq!(numbers.next(), Some(&*format!("{group}_{number:02}")));
        }
    }
    let extra = format!(
        "\n[telemetry]\naccess_log = \"access.log\"\n\
         \n[[upstream]]\nname = \"site\"\nkind = \"http\"\nendpoints = [{{ url = \"http://{}\" }}]\n\
         \n[[route]]\nname = \"api\"\npath_prefix = \"/api\"\nto = \"site\"\nauth = \"none\"\nrewrite = \"/\"\n",
        origin()
    );
    let gateway = Gateway::start(&Wanted { extra, ..Wanted::default() });
    let device = gateway.add_device("etsi");
    let token = gateway.coap_token(&mut CoapClient::connect(gateway.coap).unwrap(), &device);
    let mut failed = Vec::new();
    for (name, case) in CASES {
        match case {
            Run(run) => {
                let (to, credential) = (gateway.coap, format!("t={token}"));
                let outcome = thread::spawn(move || run(&mut Client::new(to, credential))).join();
                match outcome {
                    Ok(()) => eprintln!("TD_COAP_{name}: passed"),
                    Err(_) => failed.push(name),
                }
            }
            Not(why) => eprintln!("TD_COAP_{name}: does not apply: {why}"),
        }
    }
    assert!(failed.is_empty(), "failed: {failed:?}\n{}", gateway.log());
    // What went along the route is in the access log, as CoAP.
    support::wait_until("the access log", || {
        let lines = std::fs::read_to_string(gateway.path("access.log")).unwrap_or_default();
        lines
            .lines()
            .any(|line| line.contains("/query?first=1&second=2") && line.contains("CoAP") && line.contains(" api "))
    });
}

#[test]
fn a_socket_on_every_address_answers_from_the_one_that_was_asked() {
    let bind = support::free_address();
    let port = bind.port();
    let extra = format!(
        "\n[[listener]]\nname = \"all\"\nbind = \"0.0.0.0:{port}\"\ntransport = \"udp\"\nallow_public = true\n"
    );
    let _gateway = Gateway::start(&Wanted { extra, ..Wanted::default() });
    // From one port to several addresses, and back to the first.
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    for (id, address) in
        [[127, 0, 0, 1], [127, 0, 0, 2], [127, 0, 0, 3], [127, 0, 0, 1], [127, 0, 0, 3]].into_iter().enumerate()
    {
        let to = SocketAddr::from((address, port));
        socket.send_to(&[0x40, 0, 7, id as u8], to).unwrap();
        let mut answer = [0; 100];
        let (length, from) = socket.recv_from(&mut answer).unwrap();
        assert_eq!((&answer[..length], from), (&[0x70, 0, 7, id as u8][..], to));
    }
}

const CON: MessageType = MessageType::Confirmable;
const NON: MessageType = MessageType::NonConfirmable;
const GET: u8 = 1;
const POST: u8 = 2;
const PUT: u8 = 3;
const DELETE: u8 = 4;

/// A message with what the cases look at.
struct Said {
    kind: MessageType,
    code: String,
    id: u16,
    token: Vec<u8>,
    packet: Packet,
}

impl Said {
    fn option(&self, option: CoapOption) -> Option<Vec<u8>> {
        self.packet.get_option(option).and_then(|values| values.front().cloned())
    }

    fn uint(&self, option: CoapOption) -> Option<u32> {
        Some(self.option(option)?.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte)))
    }

    fn payload(&self) -> &[u8] {
        &self.packet.payload
    }
}

struct Client {
    socket: UdpSocket,
    credential: String,
    next_id: u16,
    token: Vec<u8>,
}

type Options<'o> = &'o [(CoapOption, &'o [u8])];

impl Client {
    fn new(to: SocketAddr, credential: String) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(to).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Client { socket, credential, next_id: 1, token: b"tk".to_vec() }
    }

    fn write(&mut self, kind: MessageType, method: u8, path: &[&str], options: Options<'_>, payload: &[u8]) -> Vec<u8> {
        self.next_id += 1;
        let mut packet = Packet::new();
        packet.header.set_type(kind);
        packet.header.code = MessageClass::from(method);
        packet.header.message_id = self.next_id;
        packet.set_token(self.token.clone());
        for segment in path {
            packet.add_option(CoapOption::UriPath, segment.as_bytes().to_vec());
        }
        // A stranger begins no body in blocks.
        if path.first() != Some(&"api") || path.last() == Some(&"echo") {
            packet.add_option(CoapOption::UriQuery, self.credential.clone().into_bytes());
        }
        for (option, value) in options {
            packet.add_option(*option, value.to_vec());
        }
        packet.payload = payload.to_vec();
        packet.to_bytes().unwrap()
    }

    fn hear(&self) -> Said {
        let mut buffer = [0; 2048];
        let length = self.socket.recv(&mut buffer).unwrap();
        let packet = Packet::from_bytes(&buffer[..length]).unwrap();
        Said {
            kind: packet.header.get_type(),
            code: packet.header.get_code(),
            id: packet.header.message_id,
            token: packet.get_token().to_vec(),
            packet,
        }
    }

    fn empty(&self, kind: u8, id: u16) {
        let [high, low] = id.to_be_bytes();
        self.socket.send(&[0x40 | kind << 4, 0, high, low]).unwrap();
    }

    /// One exchange whose answer comes at once, in an acknowledgement or as NON; with its Echo, should one be asked for.
    fn ask(&mut self, kind: MessageType, method: u8, path: &[&str], options: Options<'_>, payload: &[u8]) -> Said {
        let answer = self.ask_once(kind, method, path, options, payload);
        let Some(echo) = answer.option(CoapOption::Unknown(252)) else { return answer };
        let options = [options, &[(CoapOption::Unknown(252), &echo)]].concat();
        self.ask_once(kind, method, path, &options, payload)
    }

    fn ask_once(&mut self, kind: MessageType, method: u8, path: &[&str], options: Options<'_>, payload: &[u8]) -> Said {
        let asked = self.write(kind, method, path, options, payload);
        self.socket.send(&asked).unwrap();
        let mut answer = self.hear();
        if answer.code == "0.00" {
            answer = self.hear();
            self.empty(2, answer.id);
        } else if kind == CON {
            assert_eq!((answer.kind, answer.id), (MessageType::Acknowledgement, self.next_id));
        } else {
            assert_eq!(answer.kind, NON);
        }
        assert_eq!(answer.token, self.token);
        answer
    }

    #[track_caller]
    fn expect(
        &mut self,
        code: &str,
        kind: MessageType,
        method: u8,
        path: &[&str],
        options: Options<'_>,
        payload: &[u8],
    ) -> Said {
        let answer = self.ask(kind, method, path, options, payload);
        assert_eq!(answer.code, code, "{}", String::from_utf8_lossy(answer.payload()));
        answer
    }

    fn get(&mut self, kind: MessageType) {
        let path = ["ps", "plant", "got"];
        self.expect("2.04", CON, PUT, &path, &[(CoapOption::ContentFormat, b"")], b"21.5");
        let answer = self.expect("2.05", kind, GET, &path, &[], b"");
        assert_eq!((answer.payload(), answer.uint(CoapOption::ContentFormat)), (&b"21.5"[..], Some(0)));
    }

    fn put(&mut self, kind: MessageType) {
        let path = ["ps", "plant", "put"];
        self.expect("2.04", kind, PUT, &path, &[], b"new");
        assert_eq!(self.expect("2.05", CON, GET, &path, &[], b"").payload(), b"new");
    }

    fn post(&mut self, kind: MessageType) {
        self.expect("2.04", kind, POST, &["t"], &[], b"22.0");
    }

    fn delete(&mut self, kind: MessageType) {
        let path = ["ps", "plant", "deleted"];
        self.expect("2.04", CON, PUT, &path, &[], b"x");
        self.expect("2.02", kind, DELETE, &path, &[], b"");
        self.expect("4.04", CON, GET, &path, &[], b"");
    }

    fn token(&mut self, token: &[u8]) {
        self.token = token.to_vec();
        self.get(CON);
    }

    fn separate(&mut self, token: &[u8]) {
        self.token = token.to_vec();
        let asked = self.write(CON, GET, &["api", "slow"], &[], b"");
        self.socket.send(&asked).unwrap();
        let acknowledgement = self.hear();
        assert_eq!((acknowledgement.kind, &*acknowledgement.code), (MessageType::Acknowledgement, "0.00"));
        assert_eq!((acknowledgement.id, acknowledgement.token.len()), (self.next_id, 0));
        let answer = self.hear();
        assert_eq!((answer.kind, &*answer.code, &answer.token), (CON, "2.05", &self.token));
        assert_eq!(answer.payload(), b"GET /slow");
        self.empty(2, answer.id);
    }

    fn path_of_several_segments(&mut self) {
        let path = ["ps", "plant", "seg1", "seg2", "seg3"];
        self.expect("2.04", CON, PUT, &path, &[], b"deep");
        assert_eq!(self.expect("2.05", CON, GET, &path, &[], b"").payload(), b"deep");
    }

    fn query_of_several_arguments(&mut self) {
        let query: Options<'_> = &[(CoapOption::UriQuery, b"first=1"), (CoapOption::UriQuery, b"second=2")];
        assert_eq!(
            self.expect("2.05", CON, GET, &["api", "query"], query, b"").payload(),
            b"GET /query?first=1&second=2"
        );
    }

    fn piggybacked_over_loss(&mut self) {
        let asked = self.write(CON, POST, &["t"], &[], b"once");
        self.socket.send(&asked).unwrap();
        let lost = self.hear();
        self.socket.send(&asked).unwrap();
        let again = self.hear();
        assert_eq!((lost.id, &lost.code, &lost.token), (again.id, &again.code, &again.token));
        assert_eq!(lost.code, "2.04");
    }

    fn separate_over_loss(&mut self) {
        let asked = self.write(CON, GET, &["api", "slow"], &[], b"");
        self.socket.send(&asked).unwrap();
        assert_eq!(self.hear().code, "0.00");
        let lost = self.hear();
        assert_eq!(lost.code, "2.05");
        let again = self.hear();
        assert_eq!((again.kind, again.id, again.payload()), (CON, lost.id, lost.payload()));
        self.empty(2, again.id);
    }

    fn separate_non(&mut self) {
        let answer = self.ask_once(NON, GET, &["api", "slow"], &[], b"");
        assert_eq!((answer.kind, &*answer.code, answer.payload()), (NON, "2.05", &b"GET /slow"[..]));
    }

    fn accept(&mut self) {
        let path = ["ps", "plant", "formats"];
        self.expect("2.04", CON, PUT, &path, &[(CoapOption::ContentFormat, b"")], b"text");
        let text = self.expect("2.05", CON, GET, &path, &[(CoapOption::Accept, b"")], b"");
        assert_eq!(text.uint(CoapOption::ContentFormat), Some(0));
        self.expect("4.06", CON, GET, &path, &[(CoapOption::Accept, &[41])], b"");
    }

    fn etag(&mut self, path: &[&str]) {
        self.expect("2.04", CON, PUT, path, &[], b"one");
        let tag = self.expect("2.05", CON, GET, path, &[], b"").option(CoapOption::ETag).unwrap();
        let valid = self.expect("2.03", CON, GET, path, &[(CoapOption::ETag, &tag)], b"");
        assert_eq!((valid.option(CoapOption::ETag).as_ref(), valid.payload()), (Some(&tag), &b""[..]));
        self.expect("2.04", CON, PUT, path, &[], b"two");
        let changed = self.expect("2.05", CON, GET, path, &[(CoapOption::ETag, &tag)], b"");
        assert_ne!(changed.option(CoapOption::ETag), Some(tag));
    }

    fn if_match(&mut self) {
        let path = ["ps", "plant", "match"];
        self.expect("2.04", CON, PUT, &path, &[], b"one");
        let tag = self.expect("2.05", CON, GET, &path, &[], b"").option(CoapOption::ETag).unwrap();
        self.expect("2.04", CON, PUT, &path, &[(CoapOption::IfMatch, &tag)], b"two");
        self.expect("4.12", CON, PUT, &path, &[(CoapOption::IfMatch, &tag)], b"three");
        assert_eq!(self.expect("2.05", CON, GET, &path, &[], b"").payload(), b"two");
    }

    fn if_none_match(&mut self) {
        let path = ["ps", "plant", "new"];
        self.expect("2.04", CON, PUT, &path, &[(CoapOption::IfNoneMatch, b"")], b"one");
        self.expect("4.12", CON, PUT, &path, &[(CoapOption::IfNoneMatch, b"")], b"two");
        assert_eq!(self.expect("2.05", CON, GET, &path, &[], b"").payload(), b"one");
    }

    fn proxied_accept(&mut self) {
        let answer = self.expect("2.05", CON, GET, &["api", "accept"], &[(CoapOption::Accept, &[50])], b"");
        assert_eq!(answer.payload(), b"application/json");
    }

    fn proxied_etag(&mut self) {
        let path = ["api", "tagged"];
        let tag = self.expect("2.05", CON, GET, &path, &[], b"").option(CoapOption::ETag).unwrap();
        let valid = self.expect("2.03", CON, GET, &path, &[(CoapOption::ETag, &tag)], b"");
        assert_eq!(valid.payload(), b"");
    }

    fn proxied_if_match(&mut self) {
        let answer = self.expect("2.04", CON, PUT, &["api", "condition"], &[(CoapOption::IfMatch, b"")], b"x");
        assert_eq!(answer.payload(), b"if-match *");
    }

    fn proxied_if_none_match(&mut self) {
        let answer = self.expect("2.04", CON, PUT, &["api", "condition"], &[(CoapOption::IfNoneMatch, b"")], b"x");
        assert_eq!(answer.payload(), b"if-none-match *");
    }

    fn proxied_max_age(&mut self) {
        assert_eq!(self.expect("2.05", CON, GET, &["api", "x"], &[], b"").uint(CoapOption::MaxAge), Some(30));
    }

    fn ping(&mut self) {
        self.empty(0, 777);
        let pong = self.hear();
        assert_eq!((pong.kind, &*pong.code, pong.id), (MessageType::Reset, "0.00", 777));
    }

    fn core(&mut self, filter: &str, shown: &[&str], hidden: &[&str]) {
        self.links(&[".well-known", "core"], filter, shown, hidden);
    }

    fn links(&mut self, path: &[&str], filter: &str, shown: &[&str], hidden: &[&str]) {
        self.expect("2.04", CON, PUT, &["ps", "plant", "linked"], &[(CoapOption::UriQuery, b"retain=1")], b"x");
        let query = [(CoapOption::UriQuery, filter.as_bytes())];
        let query = if filter.is_empty() { &[][..] } else { &query };
        let mut text = Vec::new();
        for number in 0.. {
            let block = [number << 4 | 6];
            let options = [query, &[(CoapOption::Block2, &block[..])]].concat();
            let answer = self.expect("2.05", CON, GET, path, &options, b"");
            assert_eq!(answer.uint(CoapOption::ContentFormat), Some(40));
            text.extend_from_slice(answer.payload());
            if answer.uint(CoapOption::Block2).is_none_or(|block| block & 8 == 0) {
                break;
            }
        }
        let text = String::from_utf8(text).unwrap();
        assert!(shown.iter().all(|link| text.contains(link)), "{text}");
        assert!(!hidden.iter().any(|link| text.contains(link)), "{text}");
    }

    /// Puts a long value by blocks of 64 bytes, and its last answer.
    fn upload(&mut self, method: u8, path: &[&str], body: &[u8]) -> Said {
        let mut last = None;
        let pieces: Vec<&[u8]> = body.chunks(64).collect();
        for (number, piece) in pieces.iter().enumerate() {
            let more = number + 1 < pieces.len();
            let bits = (number << 4 | usize::from(more) << 3 | 2) as u32;
            let block = bits.to_be_bytes();
            let code = if more { "2.31" } else { "2.04" };
            let answer = self.expect(code, CON, method, path, &[(CoapOption::Block1, &block[1..])], piece);
            assert_eq!(answer.uint(CoapOption::Block1), Some(bits));
            last = Some(answer);
        }
        last.unwrap()
    }

    /// Fetches what lies behind `begun` by blocks of the size that its Block2 says.
    fn download(&mut self, method: u8, path: &[&str], begun: Option<Said>, wanted: Option<u32>) -> Vec<u8> {
        let mut body = Vec::new();
        let mut exponent = wanted.unwrap_or(6);
        let mut next = begun;
        loop {
            let answer = match next.take() {
                Some(answer) => answer,
                None => {
                    let bits = ((body.len() >> (exponent + 4)) as u32) << 4 | exponent;
                    let code = if method == GET { "2.05" } else { "2.04" };
                    self.expect(code, CON, method, path, &[(CoapOption::Block2, &bits.to_be_bytes()[1..])], b"")
                }
            };
            body.extend_from_slice(answer.payload());
            let Some(block) = answer.uint(CoapOption::Block2).filter(|block| block & 8 != 0) else { return body };
            assert!(wanted.is_none_or(|wanted| block & 7 == wanted));
            exponent = block & 7;
        }
    }

    fn long_get(&mut self, exponent: Option<u32>) {
        let (path, long) = (["ps", "plant", "long"], long());
        self.upload(PUT, &path, &long);
        // Without Block2 in the question, the gateway begins with its own size.
        let begun = exponent.is_none().then(|| self.expect("2.05", CON, GET, &path, &[], b""));
        assert!(begun.as_ref().is_none_or(|begun| begun.uint(CoapOption::Block2) == Some(0x0e)));
        assert!(self.download(GET, &path, begun, exponent) == long);
    }

    fn long_put(&mut self, method: u8) {
        let (path, long) = (["ps", "plant", "uploaded"], long());
        self.upload(method, &path, &long);
        assert!(self.download(GET, &path, None, None) == long);
    }

    fn long_both_ways(&mut self) {
        let (path, long) = (["api", "echo"], long());
        let begun = self.upload(POST, &path, &long);
        assert!(begun.uint(CoapOption::Block2).is_some_and(|block| block & 8 != 0));
        assert!(self.download(POST, &path, Some(begun), None) == long);
    }

    /// Registers, and the sequence of the first answer.
    fn register(&mut self, kind: MessageType, path: &[&str]) -> u32 {
        self.token = b"obs".to_vec();
        let first = self.expect("2.05", kind, GET, path, &[(CoapOption::Observe, b"")], b"");
        self.token = b"tk".to_vec();
        first.uint(CoapOption::Observe).expect("registered")
    }

    /// Changes the value by itself; the next notification, acknowledged.
    fn change(&mut self, path: &[&str], value: &[u8]) -> Said {
        let asked = self.write(CON, PUT, path, &[], value);
        self.socket.send(&asked).unwrap();
        // The answer and the notification come in any order.
        let (mut answered, mut notified) = (false, None);
        while !answered || notified.is_none() {
            let said = self.hear();
            match &*said.token {
                b"obs" => {
                    if said.kind == CON {
                        self.empty(2, said.id);
                    }
                    assert_eq!((&*said.code, said.payload()), ("2.05", value));
                    notified = Some(said);
                }
                _ => {
                    assert_eq!(said.code, "2.04");
                    answered = true;
                }
            }
        }
        notified.unwrap()
    }

    fn observe(&mut self, kind: MessageType) {
        let path = ["ps", "plant", "observed"];
        self.expect("2.04", CON, PUT, &path, &[], b"0");
        let mut last = self.register(kind, &path);
        for value in [b"1", b"2", b"3"] {
            let sequence = self.change(&path, value).uint(CoapOption::Observe).unwrap();
            assert!(sequence > last);
            last = sequence;
        }
    }

    /// Nothing but answers comes from here on.
    fn expect_no_more(&mut self, path: &[&str]) {
        self.expect("2.04", CON, PUT, path, &[], b"unheard");
        for _ in 0..3 {
            self.expect("2.05", CON, GET, path, &[], b"");
        }
    }

    fn observe_until_deregistered(&mut self) {
        let path = ["ps", "plant", "left"];
        self.expect("2.04", CON, PUT, &path, &[], b"0");
        self.register(CON, &path);
        self.change(&path, b"1");
        self.token = b"obs".to_vec();
        let last = self.expect("2.05", CON, GET, &path, &[(CoapOption::Observe, &[1])], b"");
        assert_eq!(last.option(CoapOption::Observe), None);
        self.token = b"tk".to_vec();
        self.expect_no_more(&path);
    }

    fn observe_until_reset(&mut self) {
        let path = ["ps", "plant", "reset"];
        self.expect("2.04", CON, PUT, &path, &[], b"0");
        self.register(CON, &path);
        self.change(&path, b"1");
        let asked = self.write(CON, PUT, &path, &[], b"2");
        self.socket.send(&asked).unwrap();
        for _ in 0..2 {
            let said = self.hear();
            if said.token == b"obs" {
                self.empty(3, said.id);
            }
        }
        self.expect_no_more(&path);
    }

    fn observe_until_the_format_changes(&mut self) {
        let path = ["ps", "plant", "format"];
        self.expect("2.04", CON, PUT, &path, &[(CoapOption::ContentFormat, b"")], b"0");
        self.register(CON, &path);
        let asked = self.write(CON, PUT, &path, &[(CoapOption::ContentFormat, &[50])], b"{}");
        self.socket.send(&asked).unwrap();
        for _ in 0..2 {
            let said = self.hear();
            if said.token == b"obs" {
                assert_eq!((&*said.code, said.option(CoapOption::Observe)), ("4.06", None));
                self.empty(2, said.id);
            }
        }
        self.expect_no_more(&path);
    }

    fn observe_what_he_changes(&mut self) {
        self.observe(CON);
    }
}

fn long() -> Vec<u8> {
    b"0123456789abcdef".repeat(100)
}

/// An HTTP server that says what it was asked.
fn origin() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            thread::spawn(move || answer(&mut BufReader::new(stream.unwrap())));
        }
    });
    address
}

/// One request of a connection.
fn answer(stream: &mut BufReader<std::net::TcpStream>) {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).unwrap_or(0) == 0 {
            return;
        }
    }
    let header = |name: &str| {
        let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with(&format!("{name}: ")));
        line.map(|line| line[name.len() + 2..].to_owned())
    };
    let mut body = vec![0; header("content-length").map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).unwrap();
    let asked = head.lines().next().unwrap_or_default().trim_end_matches(" HTTP/1.1");
    let said = match asked {
        "GET /slow" => {
            thread::sleep(Duration::from_millis(600));
            asked.to_owned()
        }
        "POST /echo" => String::from_utf8(body).unwrap(),
        "GET /accept" => header("accept").unwrap_or_default(),
        "PUT /condition" => ["if-match", "if-none-match"]
            .iter()
            .filter_map(|name| header(name).map(|value| format!("{name} {value}")))
            .collect(),
        _ => asked.to_owned(),
    };
    let format = if asked == "GET /accept" { "application/json" } else { "text/plain" };
    let head = format!(
        "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: {format}\r\netag: \"1\"\r\ncache-control: max-age=30\r\n"
    );
    let answer = format!("{head}content-length: {}\r\n\r\n{said}", said.len());
    // A health check may not wait for it.
    let _ = stream.get_mut().write_all(answer.as_bytes());
}

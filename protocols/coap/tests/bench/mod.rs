//! One endpoint, one scripted peer, virtual time.
#![allow(dead_code, clippy::unwrap_used)]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tidegate_coap::endpoint::Delivery;
use tidegate_coap::option::number;
use tidegate_coap::{
    Builder, Code, Config, Endpoint, Event, Handle, Kind, MessageView, Notification, NotifyError, Observe, ObserverId,
    Output, Received, Response,
};

/// A message as the peer reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub kind: Kind,
    pub code: Code,
    pub message_id: u16,
    pub token: Vec<u8>,
    pub options: Vec<(u16, Vec<u8>)>,
    pub payload: Vec<u8>,
}

impl Message {
    pub fn read(datagram: &[u8]) -> Self {
        let view = MessageView::parse(datagram).expect("we send well-formed messages");
        Message {
            kind: view.kind,
            code: view.contents.code,
            message_id: view.message_id,
            token: view.contents.token.to_vec(),
            options: view.contents.options().map(|(n, v)| (n, v.to_vec())).collect(),
            payload: view.contents.payload.to_vec(),
        }
    }

    pub fn option(&self, number: u16) -> Option<u64> {
        let value = self.options.iter().find(|(n, _)| *n == number)?;
        tidegate_coap::option::uint(&value.1)
    }
}

/// What the application got.
#[derive(Clone, Debug)]
pub struct Got {
    pub handle: Handle,
    pub path: String,
    pub payload: Vec<u8>,
    pub observe: Option<Observe>,
    pub upload: bool,
}

pub struct Bench {
    pub endpoint: Endpoint,
    pub now: Instant,
    pub peer: SocketAddr,
    pub next_id: u16,
}

impl Bench {
    pub fn new(config: Config) -> Self {
        let now = Instant::now();
        Bench {
            endpoint: Endpoint::new(config, now, [9; 32]),
            now,
            peer: "192.0.2.7:40000".parse().unwrap(),
            next_id: 1,
        }
    }

    pub fn known(config: Config) -> Self {
        let mut bench = Bench::new(config);
        bench.endpoint.validate(bench.now, bench.peer);
        bench
    }

    pub fn raw(&mut self, datagram: &[u8]) -> Option<Got> {
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

    pub fn ask(&mut self, kind: Kind, code: Code, options: &[(u16, &[u8])], payload: &[u8]) -> Option<Got> {
        self.next_id += 1;
        let datagram = request(kind, code, self.next_id, b"tk", options, payload);
        self.raw(&datagram)
    }

    pub fn get(&mut self) -> Got {
        self.ask(Kind::Confirmable, Code::GET, &[(number::URI_PATH, b"x")], b"").unwrap()
    }

    pub fn respond(&mut self, got: &Got, response: &Response<'_>) {
        self.endpoint.respond(self.now, got.handle, response).unwrap();
    }

    /// Everything sent, checking that nothing else is pending.
    pub fn sent(&mut self) -> Vec<Message> {
        let mut sent = Vec::new();
        loop {
            match self.endpoint.poll_output() {
                Output::Transmit { bytes, .. } => sent.push(Message::read(bytes)),
                Output::Event(event) => panic!("an event that the test does not expect: {event:?}"),
                Output::Timeout(_) => return sent,
            }
        }
    }

    pub fn one(&mut self) -> Message {
        let mut sent = self.sent();
        assert_eq!(sent.len(), 1, "{sent:?}");
        sent.remove(0)
    }

    pub fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.endpoint.poll_event()).collect()
    }

    pub fn advance(&mut self, by: Duration) {
        let end = self.now + by;
        while let Some(at) = self.endpoint.next_timeout().filter(|at| *at <= end) {
            self.now = at.max(self.now);
            self.endpoint.handle_timeout(self.now);
        }
        self.now = end;
    }

    pub fn empty(&mut self, kind: Kind, message_id: u16) {
        let mut datagram = Vec::new();
        Builder::datagram(&mut datagram, kind, Code::EMPTY, message_id, &[]).payload(&[]);
        assert!(self.raw(&datagram).is_none());
    }

    pub fn observe(&mut self, token: &[u8], response: &Response<'_>) -> Option<ObserverId> {
        self.next_id += 1;
        let options = [(number::OBSERVE, &b""[..]), (number::URI_PATH, b"x")];
        let got = self.raw(&request(Kind::Confirmable, Code::GET, self.next_id, token, &options, b"")).unwrap();
        assert_eq!(got.observe, Some(Observe::Register));
        self.endpoint.observe(self.now, got.handle, response).unwrap()
    }

    pub fn notify(
        &mut self,
        observer: ObserverId,
        payload: &'static [u8],
        delivery: Delivery,
    ) -> Result<(), NotifyError> {
        let notification = Notification { delivery, ..Notification::content(Some(0), Bytes::from_static(payload)) };
        self.endpoint.notify(self.now, observer, notification)
    }
}

pub fn request(kind: Kind, code: Code, id: u16, token: &[u8], options: &[(u16, &[u8])], payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut builder = Builder::datagram(&mut out, kind, code, id, token);
    for (number, value) in options {
        builder = builder.option(*number, value);
    }
    builder.payload(payload);
    out
}

const CHANGED: Response<'static> = Response::new(Code::CHANGED);
pub const CONTENT: Response<'static> = Response::new(Code::CONTENT).content(Some(0), b"22.3 C");

pub fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

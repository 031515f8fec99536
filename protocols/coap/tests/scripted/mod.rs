//! What the tests with one scripted peer have in common: messages as the peer reads them, and virtual time.

use std::time::{Duration, Instant};

use tidegate_coap::{Code, Endpoint, Event, Kind, MessageView};

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

/// The only one of what was sent.
pub fn one(mut sent: Vec<Message>) -> Message {
    assert_eq!(sent.len(), 1, "{sent:?}");
    sent.remove(0)
}

pub fn events(endpoint: &mut Endpoint) -> Vec<Event> {
    std::iter::from_fn(|| endpoint.poll_event()).collect()
}

/// Lets time pass, with all that is due on the way.
pub fn advance(endpoint: &mut Endpoint, now: &mut Instant, by: Duration) {
    let end = *now + by;
    while let Some(at) = endpoint.next_timeout().filter(|at| *at <= end) {
        *now = at.max(*now);
        endpoint.handle_timeout(*now);
    }
    *now = end;
}

//! Answers, and refusals as answers: one arm per [`Reject`], by the table of the wire contract.
//!
//! A known device is told the rule or limit that decided, in a diagnostic payload (RFC 7252 section 5.5.2). A stranger is told no.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tidegate_coap::{Code, Response, content};

use super::call::NoCall;
use crate::message::{DeviceId, Message, MessageId, Reject};

/// An answer on its way into the engine.
#[derive(Clone, Debug)]
pub struct Answer {
    pub code: Code,
    pub etag: Option<[u8; 8]>,
    pub content_format: Option<u16>,
    pub max_age: Option<u32>,
    pub size1: Option<u32>,
    /// The registration of this device is where to find what was made.
    pub location: Option<DeviceId>,
    pub payload: Payload,
}

#[derive(Clone, Debug)]
pub enum Payload {
    None,
    Bytes(Bytes),
    /// The payload of a message, which is shared with it.
    Value(Arc<Message>),
    Text(String),
    Static(&'static str),
}

impl Answer {
    pub const fn new(code: Code) -> Self {
        Answer {
            code,
            etag: None,
            content_format: None,
            max_age: None,
            size1: None,
            location: None,
            payload: Payload::None,
        }
    }

    pub fn content(code: Code, format: u16, payload: impl Into<Bytes>) -> Self {
        Answer { content_format: Some(format), payload: Payload::Bytes(payload.into()), ..Answer::new(code) }
    }

    /// The last value of a topic.
    pub fn value(message: Arc<Message>) -> Self {
        Answer {
            etag: Some(etag(message.id)),
            content_format: format_of(&message),
            payload: Payload::Value(message),
            ..Answer::new(Code::CONTENT)
        }
    }

    /// `known`: the caller has proved who it is, and may learn why.
    pub fn refusal(reject: &Reject, known: bool) -> Self {
        let mut answer = Answer::new(code(reject));
        match reject {
            Reject::TooFast { retry_after, .. } | Reject::Full { retry_after, .. } => {
                answer.max_age = Some(whole_seconds(*retry_after));
            }
            Reject::ShuttingDown => answer.max_age = Some(1),
            Reject::TooLarge { bytes_max, .. } => {
                answer.size1 = Some(u32::try_from(*bytes_max).unwrap_or(u32::MAX));
            }
            Reject::Unauthenticated | Reject::Forbidden { .. } | Reject::Malformed { .. } | Reject::NotFound => {}
        }
        if known {
            answer.payload = Payload::Text(reject.to_string());
        }
        answer
    }

    /// `known` as for [`Answer::refusal`].
    pub fn no_call(no_call: NoCall, known: bool) -> Self {
        match no_call {
            NoCall::NotFound => Answer::refusal(&Reject::NotFound, known),
            NoCall::Method => Answer::new(Code::METHOD_NOT_ALLOWED),
            NoCall::Malformed(what) => Answer::refusal(&Reject::Malformed { what }, known),
        }
    }

    /// Gives the answer with its location to `send`.
    pub fn with_location<T>(&self, send: impl FnOnce(&Response<'_>) -> T) -> T {
        match &self.location {
            Some(device) => send(&Response { location_path: &["rd", device.as_str()], ..self.response() }),
            None => send(&self.response()),
        }
    }

    pub fn response(&self) -> Response<'_> {
        let payload = match &self.payload {
            Payload::None => &[],
            Payload::Bytes(bytes) => &bytes[..],
            Payload::Value(message) => &message.payload[..],
            Payload::Text(text) => text.as_bytes(),
            Payload::Static(text) => text.as_bytes(),
        };
        Response {
            etag: self.etag.as_ref().map_or(&[], |etag| &etag[..]),
            max_age: self.max_age,
            size1: self.size1,
            ..Response::new(self.code).content(self.content_format, payload)
        }
    }
}

/// The Content-Format of a message; none where the registry has no number for its type.
pub fn format_of(message: &Message) -> Option<u16> {
    message.content_type().and_then(content::format_of)
}

/// An entity tag has 8 bytes: 16 bits of the epoch and 48 of the sequence, which no last value outlives.
pub fn etag(id: MessageId) -> [u8; 8] {
    (u64::from(id.epoch) << 48 | (id.seq & 0xffff_ffff_ffff)).to_be_bytes()
}

/// The table of the wire contract.
pub const fn code(reject: &Reject) -> Code {
    match reject {
        Reject::Unauthenticated => Code::UNAUTHORIZED,
        Reject::Forbidden { .. } => Code::FORBIDDEN,
        Reject::TooFast { .. } => Code::TOO_MANY_REQUESTS,
        Reject::TooLarge { .. } => Code::REQUEST_ENTITY_TOO_LARGE,
        Reject::Full { .. } | Reject::ShuttingDown => Code::SERVICE_UNAVAILABLE,
        Reject::Malformed { .. } => Code::BAD_REQUEST,
        Reject::NotFound => Code::NOT_FOUND,
    }
}

/// Never "now".
fn whole_seconds(after: Duration) -> u32 {
    u32::try_from(after.as_millis().div_ceil(1000)).unwrap_or(u32::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reject_has_the_code_of_the_contract() {
        let wait = Duration::from_millis(1500);
        for (reject, expected, max_age, size1) in [
            (Reject::Unauthenticated, "4.01", None, None),
            (Reject::Forbidden { rule: None }, "4.03", None, None),
            (Reject::TooFast { limit: "x", retry_after: wait }, "4.29", Some(2), None),
            (Reject::TooLarge { limit: "x", bytes_max: 7 }, "4.13", None, Some(7)),
            (Reject::Full { limit: "x", retry_after: Duration::ZERO }, "5.03", Some(1), None),
            (Reject::Malformed { what: "x" }, "4.00", None, None),
            (Reject::NotFound, "4.04", None, None),
            (Reject::ShuttingDown, "5.03", Some(1), None),
        ] {
            let answer = Answer::refusal(&reject, false);
            assert_eq!((answer.code.to_string().as_str(), answer.max_age, answer.size1), (expected, max_age, size1));
            assert!(answer.response().payload.is_empty(), "a stranger learns no more than the code");
            assert!(!Answer::refusal(&reject, true).response().payload.is_empty());
        }
    }

    #[test]
    fn entity_tags_of_two_messages_differ() {
        let id = |epoch, seq| MessageId { epoch, seq };
        assert_ne!(etag(id(1, 2)), etag(id(2, 1)));
        assert_ne!(etag(id(1, 2)), etag(id(1, 3)));
    }
}

//! Messages as request bodies: CloudEvents 1.0, structured (JSON event format) or binary (HTTP binding, section 3.1).

use std::borrow::Cow;
use std::collections::HashMap;

use base64::Engine;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde::de::IgnoredAny;
use sha2::{Digest, Sha256};

use super::template::Template;
use super::{BatchFormat, event};
use crate::message::Message;
use crate::spool::Stored;

/// One request, ready to be sent as often as it takes.
#[derive(Clone, Debug)]
pub struct Post {
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// Messages that go into one request, by their places in the batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    pub path: String,
    pub members: Vec<usize>,
}

/// Splits a batch into requests. Messages of one path keep their order; groups come in the order of their first messages.
pub fn group(records: &[Stored], template: &Template, gateway: &str, format: BatchFormat) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut known: HashMap<String, usize> = HashMap::new();
    let mut path = String::new();
    for (index, record) in records.iter().enumerate() {
        if index == 0 || !template.is_constant() {
            template.path(&record.message, gateway, &mut path);
        }
        let group = known.get(&path).filter(|_| format != BatchFormat::Single);
        match group.and_then(|group| groups.get_mut(*group)) {
            Some(group) => group.members.push(index),
            None => {
                known.insert(path.clone(), groups.len());
                groups.push(Group { path: path.clone(), members: vec![index] });
            }
        }
    }
    groups
}

/// Encodes `messages`, at least one, of which there is only one with [`BatchFormat::Single`].
pub fn encode(messages: &[&Message], path: &str, gateway: &str, format: BatchFormat) -> Post {
    let mut headers = HeaderMap::new();
    let body = match format {
        BatchFormat::Single => match messages.first() {
            Some(message) => {
                binary_headers(message, gateway, &mut headers);
                message.payload.clone()
            }
            None => Bytes::new(),
        },
        BatchFormat::Ndjson | BatchFormat::Json => {
            let bytes: usize = messages.iter().map(|message| message.payload.len() + EVENT_BYTES).sum();
            let mut body = Vec::with_capacity(bytes);
            let array = format == BatchFormat::Json;
            for (n, message) in messages.iter().enumerate() {
                if array {
                    body.push(if n == 0 { b'[' } else { b',' });
                }
                structured(message, gateway, &mut body);
                if !array {
                    body.push(b'\n');
                }
            }
            if array {
                body.push(b']');
            }
            let content_type = if array { "application/cloudevents-batch+json" } else { "application/x-ndjson" };
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
            headers.insert(IDEMPOTENCY_KEY, batch_key(messages, gateway));
            body.into()
        }
    };
    Post { path: path.to_owned(), headers, body }
}

/// The same for the same messages, whenever they are sent.
fn batch_key(messages: &[&Message], gateway: &str) -> HeaderValue {
    let mut hash = Sha256::new();
    for message in messages {
        hash.update(message.id.epoch.to_be_bytes());
        hash.update(message.id.seq.to_be_bytes());
    }
    let digest: String = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    text_value(&format!("{gateway}/{digest}"))
}

/// CloudEvents JSON event format, on one line.
fn structured(message: &Message, gateway: &str, out: &mut Vec<u8>) {
    let payload = &*message.payload;
    let content_type = message.content_type();
    let claims_json = content_type.is_none_or(is_json);
    let (encoding, assumed) = if claims_json && serde_json::from_slice::<IgnoredAny>(payload).is_ok() {
        (Data::Json, None)
    } else if let Ok(text) = std::str::from_utf8(payload) {
        // Without a content type `data` would be read as JSON, which this is not.
        (Data::Text(text), Some("text/plain"))
    } else {
        (Data::Bytes, Some("application/octet-stream"))
    };
    out.push(b'{');
    let mut comma = false;
    for (name, value) in event::attributes(message, gateway) {
        member(&name, &value, &mut comma, out);
    }
    if let Some(content_type) = content_type.or(assumed) {
        member("datacontenttype", content_type, &mut comma, out);
    }
    for (name, value) in extensions(message) {
        member(name, value, &mut comma, out);
    }
    match encoding {
        Data::Json => {
            out.extend_from_slice(b",\"data\":");
            // In valid JSON a line break stands only between tokens.
            out.extend(payload.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }));
        }
        Data::Text(text) => {
            out.extend_from_slice(b",\"data\":");
            quote(text, out);
        }
        Data::Bytes => {
            out.extend_from_slice(b",\"data_base64\":\"");
            out.extend_from_slice(base64::engine::general_purpose::STANDARD.encode(payload).as_bytes());
            out.push(b'"');
        }
    }
    out.push(b'}');
}

enum Data<'a> {
    Json,
    Text(&'a str),
    Bytes,
}

fn member(name: &str, value: &str, comma: &mut bool, out: &mut Vec<u8>) {
    if std::mem::replace(comma, true) {
        out.push(b',');
    }
    quote(name, out);
    out.push(b':');
    quote(value, out);
}

fn quote(text: &str, out: &mut Vec<u8>) {
    // Writing to a Vec cannot fail, and a str is always JSON.
    let _ = serde_json::to_writer(out, text);
}

/// `application/json` and `+json` types, whatever their parameters.
fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or("").trim();
    essence.eq_ignore_ascii_case("application/json")
        || essence.len() > 5 && essence.get(essence.len() - 5..).is_some_and(|end| end.eq_ignore_ascii_case("+json"))
}

/// CloudEvents HTTP binding, binary mode.
fn binary_headers(message: &Message, gateway: &str, headers: &mut HeaderMap) {
    for (name, value) in event::attributes(message, gateway) {
        if let Ok(name) = HeaderName::try_from(format!("ce-{name}")) {
            headers.insert(name, percent_value(&value));
        }
    }
    headers.insert(IDEMPOTENCY_KEY, text_value(&event::id(message, gateway)));
    let content_type = message.content_type().and_then(|text| HeaderValue::try_from(text).ok());
    headers.insert(
        header::CONTENT_TYPE,
        content_type.unwrap_or_else(|| HeaderValue::from_static("application/octet-stream")),
    );
    for (name, value) in extensions(message) {
        let name = if name == TRACEPARENT {
            Ok(HeaderName::from_static(TRACEPARENT))
        } else {
            format!("ce-{name}").try_into()
        };
        if let Ok(name) = name {
            headers.insert(name, percent_value(value));
        }
    }
}

/// The trace, and user properties whose names CloudEvents allows for extension attributes (lower-case letters and digits).
fn extensions(message: &Message) -> impl Iterator<Item = (&str, &str)> {
    let properties = message.properties.as_deref();
    let trace = properties.and_then(|p| p.traceparent.as_deref()).map(|trace| (TRACEPARENT, trace));
    let user = properties.into_iter().flat_map(|p| &p.user).map(|(name, value)| (&**name, &**value));
    let allowed = |name: &str| {
        let well_formed = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        (1..=EXTENSION_NAME_BYTES_MAX).contains(&name.len()) && well_formed && !RESERVED.contains(&name)
    };
    trace.into_iter().chain(user.filter(move |(name, _)| allowed(name)))
}

/// HTTP binding, section 3.1.3.2: what is not visible ASCII, and `"` and `%`, is percent-encoded.
fn percent_value(text: &str) -> HeaderValue {
    const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'%');
    text_value(&Cow::from(utf8_percent_encode(text, ENCODED)))
}

/// For text that is visible ASCII by its making.
fn text_value(text: &str) -> HeaderValue {
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// draft-ietf-httpapi-idempotency-key-header.
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const TRACEPARENT: &str = "traceparent";
/// What an event's own members are called, and what the trace is.
const RESERVED: [&str; 10] =
    ["id", "source", "type", "time", "specversion", "subject", "datacontenttype", "dataschema", "data", TRACEPARENT];
/// CloudEvents asks for 20 characters at most.
const EXTENSION_NAME_BYTES_MAX: usize = 20;
/// What the attributes of one event take, roughly.
const EVENT_BYTES: usize = 320;

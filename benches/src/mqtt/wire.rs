//! The few bytes of MQTT 3.1.1 that a load needs, written by hand so that the generator costs next to nothing.

/// What a server sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    Connack { code: u8 },
    Suback { code: u8 },
    Puback { id: u16 },
    Publish { id: Option<u16>, payload: &'a [u8] },
    Other,
}

pub fn connect(client_id: &str, login: Option<(&str, &str)>) -> Vec<u8> {
    let flags = if login.is_some() { 0b1100_0010 } else { 0b0000_0010 };
    let mut body = vec![0, 4, b'M', b'Q', b'T', b'T', 4, flags, 0x0E, 0x10];
    push_text(&mut body, client_id);
    if let Some((user, password)) = login {
        push_text(&mut body, user);
        push_text(&mut body, password);
    }
    packet(0x10, &body)
}

pub fn subscribe(filter: &str, qos: u8) -> Vec<u8> {
    let mut body = vec![0, 1];
    push_text(&mut body, filter);
    body.push(qos);
    packet(0x82, &body)
}

pub fn puback(id: u16) -> [u8; 4] {
    let [high, low] = id.to_be_bytes();
    [0x40, 2, high, low]
}

/// A PUBLISH whose packet id (for `QoS` 1) and payload are patched in before each sending.
pub struct PublishTemplate {
    bytes: Vec<u8>,
    id_at: Option<usize>,
    payload_at: usize,
}

impl PublishTemplate {
    pub fn new(topic: &str, qos: u8, payload_bytes: usize) -> Self {
        let mut body = Vec::new();
        push_text(&mut body, topic);
        if qos > 0 {
            body.extend([0, 0]);
        }
        let header = body.len();
        body.resize(header + payload_bytes, b'.');
        let bytes = packet(0x30 | (qos << 1), &body);
        let payload_at = bytes.len() - payload_bytes;
        PublishTemplate { id_at: (qos > 0).then_some(payload_at.saturating_sub(2)), payload_at, bytes }
    }

    /// Appends one message. `payload` goes to the payload's beginning.
    pub fn append(&self, out: &mut Vec<u8>, id: u16, payload: &[u8]) {
        let start = out.len();
        out.extend_from_slice(&self.bytes);
        let message = &mut out[start..];
        if let Some(at) = self.id_at {
            message[at..at + 2].copy_from_slice(&id.to_be_bytes());
        }
        message[self.payload_at..self.payload_at + payload.len()].copy_from_slice(payload);
    }
}

/// Hands every whole packet to `each` and says how many bytes they took.
pub fn scan(input: &[u8], mut each: impl FnMut(Frame<'_>)) -> usize {
    let mut taken = 0;
    while let Some((first, body, length)) = split(&input[taken..]) {
        taken += length;
        each(frame(first, body));
    }
    taken
}

fn frame(first: u8, body: &[u8]) -> Frame<'_> {
    match (first >> 4, body) {
        (2, [_, code, ..]) => Frame::Connack { code: *code },
        (9, [_, _, code, ..]) => Frame::Suback { code: *code },
        (4, [high, low, ..]) => Frame::Puback { id: u16::from_be_bytes([*high, *low]) },
        (3, [high, low, rest @ ..]) => publish(first, u16::from_be_bytes([*high, *low]), rest).unwrap_or(Frame::Other),
        _ => Frame::Other,
    }
}

fn publish(first: u8, topic_bytes: u16, rest: &[u8]) -> Option<Frame<'_>> {
    let after = rest.get(usize::from(topic_bytes)..)?;
    if first & 0b0110 == 0 {
        return Some(Frame::Publish { id: None, payload: after });
    }
    let (id, payload) = after.split_first_chunk::<2>()?;
    Some(Frame::Publish { id: Some(u16::from_be_bytes(*id)), payload })
}

/// First byte, body and whole length of the first packet, if it is whole.
fn split(input: &[u8]) -> Option<(u8, &[u8], usize)> {
    let first = *input.first()?;
    let mut remaining = 0_usize;
    for at in 0..4 {
        let byte = *input.get(1 + at)?;
        remaining |= usize::from(byte & 0x7F) << (7 * at);
        if byte & 0x80 == 0 {
            let start = 2 + at;
            return Some((first, input.get(start..start + remaining)?, start + remaining));
        }
    }
    None
}

fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    let mut length = body.len();
    loop {
        let more = length >= 0x80;
        bytes.push((length & 0x7F) as u8 | if more { 0x80 } else { 0 });
        length >>= 7;
        if !more {
            break;
        }
    }
    bytes.extend_from_slice(body);
    bytes
}

fn push_text(body: &mut Vec<u8>, text: &str) {
    let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
    body.extend_from_slice(&length.to_be_bytes());
    body.extend_from_slice(&text.as_bytes()[..usize::from(length)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let template = PublishTemplate::new("a/b", 1, 200);
        let mut bytes = Vec::new();
        template.append(&mut bytes, 7, b"hello");
        bytes.extend(puback(9));
        let partial = bytes.len();
        bytes.extend(PublishTemplate::new("x", 0, 3).bytes);
        bytes.pop();
        let mut seen = Vec::new();
        let taken = scan(&bytes, |frame| {
            seen.push(match frame {
                Frame::Publish { id, payload } => (id, payload[..5].to_vec()),
                Frame::Puback { id } => (Some(id), Vec::new()),
                other => panic!("{other:?}"),
            });
        });
        assert_eq!(taken, partial);
        assert_eq!(seen, [(Some(7), b"hello".to_vec()), (Some(9), Vec::new())]);
    }

    #[test]
    fn connect_is_as_the_specification_writes_it() {
        let bytes = connect("c", Some(("u", "p")));
        assert_eq!(bytes, b"\x10\x13\x00\x04MQTT\x04\xC2\x0E\x10\x00\x01c\x00\x01u\x00\x01p");
        assert_eq!(subscribe("t", 1), b"\x82\x06\x00\x01\x00\x01t\x01");
    }
}

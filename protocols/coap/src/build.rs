//! Writes a message to the end of a caller's buffer: the mirror of [`crate::message`].

use crate::code::Code;
use crate::message::{Kind, PAYLOAD_MARKER};

/// Appends one message. Options must come in ascending order of their numbers, which the callers in this crate fix in their code.
#[derive(Debug)]
pub struct Builder<'b> {
    out: &'b mut Vec<u8>,
    number: u16,
}

impl<'b> Builder<'b> {
    /// Begins a datagram. A token has at most 65804 bytes, as every one has that came out of a parsed message.
    pub fn datagram(out: &'b mut Vec<u8>, kind: Kind, code: Code, message_id: u16, token: &[u8]) -> Self {
        let at = out.len();
        let [id_high, id_low] = message_id.to_be_bytes();
        out.extend_from_slice(&[0x40 | (kind as u8) << 4, code.0, id_high, id_low]);
        let length = extend(out, token.len());
        if let Some(head) = out.get_mut(at) {
            *head |= length;
        }
        out.extend_from_slice(token);
        Builder { out, number: 0 }
    }

    /// Begins after a header that somebody else wrote (RFC 8323 frames).
    pub fn body(out: &'b mut Vec<u8>) -> Self {
        Builder { out, number: 0 }
    }

    /// Appends one option; `number` must not be below the one before.
    pub fn option(self, number: u16, value: &[u8]) -> Self {
        debug_assert!(number >= self.number, "options ascend");
        let delta = number.saturating_sub(self.number);
        let at = self.out.len();
        self.out.push(0);
        let high = extend(self.out, usize::from(delta));
        let low = extend(self.out, value.len());
        if let Some(head) = self.out.get_mut(at) {
            *head = high << 4 | low;
        }
        self.out.extend_from_slice(value);
        Builder { out: self.out, number }
    }

    /// Appends an unsigned integer in its shortest form: zero is the empty value (section 3.2).
    pub fn uint(self, number: u16, value: u32) -> Self {
        let bytes = value.to_be_bytes();
        let zeros = (value.leading_zeros() / 8) as usize;
        self.option(number, bytes.get(zeros..).unwrap_or_default())
    }

    /// Appends the option where there is a value.
    pub fn uint_if(self, number: u16, value: Option<u32>) -> Self {
        match value {
            Some(value) => self.uint(number, value),
            None => self,
        }
    }

    /// Ends the message; an empty payload has no marker.
    pub fn payload(self, payload: &[u8]) {
        if !payload.is_empty() {
            self.out.push(PAYLOAD_MARKER);
            self.out.extend_from_slice(payload);
        }
    }
}

/// The nibble of a delta or length (of an option, or by RFC 8974 of a token), after writing its extension. Values above 65804 cannot be written; the largest stands for them.
pub(crate) fn extend(out: &mut Vec<u8>, value: usize) -> u8 {
    debug_assert!(value <= 269 + 65535, "options are at most 65804 bytes");
    match value {
        0..=12 => value as u8,
        13..=268 => {
            out.push((value - 13) as u8);
            13
        }
        _ => {
            out.extend_from_slice(&u16::try_from(value - 269).unwrap_or(u16::MAX).to_be_bytes());
            14
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::MessageView;
    use crate::option::number;

    #[test]
    fn the_answer_of_rfc_7252_figure_16_is_built_byte_for_byte() {
        let mut out = Vec::new();
        Builder::datagram(&mut out, Kind::Acknowledgement, Code::CONTENT, 0x7d34, &[]).payload(b"22.3 C");
        assert_eq!(out, b"\x60\x45\x7d\x34\xff22.3 C");
    }

    #[test]
    fn options_of_every_delta_and_length_class_read_back() {
        let long = vec![7; 300];
        let mut out = Vec::new();
        Builder::datagram(&mut out, Kind::NonConfirmable, Code::POST, 1, b"tok")
            .option(number::URI_PATH, b"")
            .option(number::URI_PATH, &long[..13])
            .uint(number::MAX_AGE, 0)
            .uint(number::MAX_AGE, 256)
            .option(number::SIZE1, b"abcd")
            .option(number::NO_RESPONSE, b"x")
            .option(2000, &long)
            .payload(b"p");
        let view = MessageView::parse(&out).unwrap();
        let read: Vec<_> = view.contents.options().collect();
        assert_eq!(
            read,
            [(11, &b""[..]), (11, &long[..13]), (14, b""), (14, &[1, 0]), (60, b"abcd"), (258, b"x"), (2000, &long),]
        );
        assert_eq!((view.contents.token, view.contents.payload), (&b"tok"[..], &b"p"[..]));
    }
}

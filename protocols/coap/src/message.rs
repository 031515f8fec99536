//! A strict, borrowed view of one message (RFC 7252 section 3). Parsing checks the whole format once, allocates nothing and copies nothing;
//! the accessors walk the options again and cannot fail.

use std::fmt;

use crate::code::Code;
use crate::content;
use crate::option::{self, number};

/// Message type: how the message layer treats a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Confirmable = 0,
    NonConfirmable = 1,
    Acknowledgement = 2,
    Reset = 3,
}

/// Why a datagram is not a CoAP message. What the message layer owes the sender depends on [`FormatError::reset`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FormatError {
    pub what: &'static str,
    /// The message id to reset: the header was readable and the message confirmable (RFC 7252 section 4.2). Otherwise it is ignored.
    pub reset: Option<u16>,
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what)
    }
}

impl std::error::Error for FormatError {}

/// One datagram, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageView<'d> {
    pub kind: Kind,
    pub message_id: u16,
    pub contents: Contents<'d>,
}

/// What a message says, apart from how it travels: the same over UDP and TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents<'d> {
    pub code: Code,
    /// 0 to 8 bytes, and by RFC 8974 up to 65804.
    pub token: &'d [u8],
    /// Encoded options, already checked: [`Contents::options`] walks them.
    options: &'d [u8],
    pub payload: &'d [u8],
}

impl<'d> MessageView<'d> {
    /// Checks and borrows one datagram.
    ///
    /// # Errors
    /// Everything that RFC 7252 calls a message format error: another version, the reserved token length 15, a reserved class, an empty message with
    /// anything behind its header, the reserved option nibble 15, an option beyond the end, an option number above 65535, a payload marker without a
    /// payload, and types that cannot carry the code (section 4.2 and 4.3, table 1).
    pub fn parse(datagram: &'d [u8]) -> Result<Self, FormatError> {
        let [first, code, id_high, id_low, rest @ ..] = datagram else {
            return Err(FormatError { what: "shorter than a header", reset: None });
        };
        let code = Code(*code);
        let message_id = u16::from_be_bytes([*id_high, *id_low]);
        // Section 3: a message of another version is silently ignored.
        if first >> 6 != 1 {
            return Err(FormatError { what: "unknown version", reset: None });
        }
        let kind = match first >> 4 & 3 {
            0 => Kind::Confirmable,
            1 => Kind::NonConfirmable,
            2 => Kind::Acknowledgement,
            _ => Kind::Reset,
        };
        let reset = (kind == Kind::Confirmable).then_some(message_id);
        let token_length = first & 15;
        let fits = match kind {
            Kind::Confirmable => code == Code::EMPTY || code.is_request() || code.is_response(),
            Kind::NonConfirmable => code.is_request() || code.is_response(),
            Kind::Acknowledgement => code == Code::EMPTY || code.is_response(),
            Kind::Reset => code == Code::EMPTY,
        };
        if !fits {
            return Err(FormatError { what: "code does not fit the type", reset });
        }
        if code == Code::EMPTY && (token_length != 0 || !rest.is_empty()) {
            return Err(FormatError { what: "empty message with content", reset });
        }
        let contents = Contents::parse(code, token_length, rest).map_err(|what| FormatError { what, reset })?;
        Ok(MessageView { kind, message_id, contents })
    }
}

impl<'d> Contents<'d> {
    /// Checks token, options and payload: what follows the fixed header in every transport. `token_length` is the header's nibble, which
    /// RFC 8974 section 2.1 extends as those of options are.
    pub(crate) fn parse(code: Code, token_length: u8, rest: &'d [u8]) -> Result<Self, &'static str> {
        let (token_bytes, rest) = extended(token_length, rest)?;
        let (token, body) = rest.split_at_checked(token_bytes as usize).ok_or("token beyond the end")?;
        let mut left = body;
        let mut option_number = 0u32;
        while let Some((&head, tail)) = left.split_first() {
            if head == PAYLOAD_MARKER {
                if tail.is_empty() {
                    return Err("payload marker without payload");
                }
                let options = body.get(..body.len() - left.len()).unwrap_or_default();
                return Ok(Contents { code, token, options, payload: tail });
            }
            let (delta, tail) = extended(head >> 4, tail)?;
            let (length, tail) = extended(head & 15, tail)?;
            option_number += delta;
            if option_number > u32::from(u16::MAX) {
                return Err("option number above 65535");
            }
            left = tail.get(length as usize..).ok_or("option beyond the end")?;
        }
        Ok(Contents { code, token, options: body, payload: &[] })
    }

    /// All options in order of their numbers.
    pub fn options(&self) -> Options<'d> {
        Options { left: self.options, number: 0 }
    }

    /// The values of every occurrence of one option.
    pub fn all(&self, number: u16) -> impl Iterator<Item = &'d [u8]> + use<'d> {
        self.options().skip_while(move |(n, _)| *n < number).take_while(move |(n, _)| *n == number).map(|(_, v)| v)
    }

    /// The first occurrence of one option.
    pub fn first(&self, number: u16) -> Option<&'d [u8]> {
        self.all(number).next()
    }

    /// An option of at most four bytes as a number; one that is too long counts as absent.
    pub fn uint(&self, number: u16) -> Option<u32> {
        self.first(number).and_then(option::uint32)
    }

    pub fn content_format(&self) -> Option<u16> {
        self.uint(number::CONTENT_FORMAT).and_then(|v| u16::try_from(v).ok())
    }

    /// The media type by the IANA table; `None` when absent or not registered there.
    pub fn media_type(&self) -> Option<&'static str> {
        self.content_format().and_then(content::media_type)
    }

    pub fn accept(&self) -> Option<u16> {
        self.uint(number::ACCEPT).and_then(|v| u16::try_from(v).ok())
    }

    pub fn max_age(&self) -> Option<u32> {
        self.uint(number::MAX_AGE)
    }

    /// 0 registers, 1 deregisters in a request; the sequence number in a notification (RFC 7641 section 2).
    pub fn observe(&self) -> Option<u32> {
        self.uint(number::OBSERVE)
    }

    pub fn uri_host(&self) -> Option<&'d str> {
        self.first(number::URI_HOST).and_then(|v| std::str::from_utf8(v).ok())
    }
}

/// Iterator over `(number, value)`.
#[derive(Clone, Debug)]
pub struct Options<'d> {
    left: &'d [u8],
    number: u32,
}

impl<'d> Iterator for Options<'d> {
    type Item = (u16, &'d [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        // The bytes passed `Contents::parse`; should they not have, the walk ends early instead of failing.
        let (&head, tail) = self.left.split_first()?;
        let (delta, tail) = extended(head >> 4, tail).ok()?;
        let (length, tail) = extended(head & 15, tail).ok()?;
        let (value, tail) = tail.split_at_checked(length as usize)?;
        self.number += delta;
        self.left = tail;
        Some((u16::try_from(self.number).ok()?, value))
    }
}

/// A delta or length nibble with its extension (section 3.1; RFC 8974 section 2.1 for tokens). At most 65804, so that a sum of two fits `u32`.
#[inline]
fn extended(nibble: u8, tail: &[u8]) -> Result<(u32, &[u8]), &'static str> {
    match nibble {
        0..=12 => Ok((u32::from(nibble), tail)),
        13 => match tail {
            [a, tail @ ..] => Ok((13 + u32::from(*a), tail)),
            [] => Err("extended length beyond the end"),
        },
        14 => match tail {
            [a, b, tail @ ..] => Ok((269 + u32::from(u16::from_be_bytes([*a, *b])), tail)),
            _ => Err("extended length beyond the end"),
        },
        _ => Err("reserved nibble"),
    }
}

/// The longest token of a request that is handled; one with a longer token is answered 4.00 (RFC 8974 section 2.2.2).
pub const TOKEN_BYTES_MAX: usize = 256;
pub(crate) const PAYLOAD_MARKER: u8 = 0xff;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_of_rfc_7252_figure_16_parses() {
        let view = MessageView::parse(b"\x40\x01\x7d\x34\xbbtemperature").unwrap();
        assert_eq!((view.kind, view.message_id, view.contents.code), (Kind::Confirmable, 0x7d34, Code::GET));
        assert!(view.contents.token.is_empty() && view.contents.payload.is_empty());
        assert_eq!(view.contents.options().collect::<Vec<_>>(), [(number::URI_PATH, &b"temperature"[..])]);
    }

    #[test]
    fn the_piggybacked_answer_of_rfc_7252_figure_17_parses() {
        let view = MessageView::parse(b"\x61\x45\x7d\x35\x20\xff22.3 C").unwrap();
        assert_eq!((view.kind, view.contents.code), (Kind::Acknowledgement, Code::CONTENT));
        assert_eq!((view.contents.token, view.contents.payload), (&b"\x20"[..], &b"22.3 C"[..]));
    }

    #[test]
    fn extended_deltas_and_lengths_parse_at_their_edges() {
        // Number 269 + 0xffff is above 65535 by 269; 65535 itself is 269 + 0xfef2.
        let view = MessageView::parse(b"\x40\x01\0\0\xe0\xfe\xf2").unwrap();
        assert_eq!(view.contents.options().collect::<Vec<_>>(), [(65535, &b""[..])]);
        assert_eq!(MessageView::parse(b"\x40\x01\0\0\xe0\xfe\xf3").unwrap_err().what, "option number above 65535");
        let mut long = b"\x40\x01\0\0\xbd\xff".to_vec();
        long.extend_from_slice(&[b'x'; 268]);
        assert_eq!(MessageView::parse(&long).unwrap().contents.first(number::URI_PATH).unwrap().len(), 268);
        long.pop();
        assert_eq!(MessageView::parse(&long).unwrap_err().what, "option beyond the end");
    }

    #[test]
    fn tokens_of_every_length_class_of_rfc_8974_read_back() {
        let classes: [(&[u8], usize); 5] = [
            (b"\x4c\x01\0\0", 12),
            (b"\x4d\x01\0\0\0", 13),
            (b"\x4d\x01\0\0\xff", 268),
            (b"\x4e\x01\0\0\0\0", 269),
            (b"\x4e\x01\0\0\xff\xff", 65_804),
        ];
        for (header, length) in classes {
            let token = vec![7; length];
            let datagram = [header, &token, b"\xb1x"].concat();
            let view = MessageView::parse(&datagram).unwrap();
            assert_eq!((view.contents.token, view.contents.first(number::URI_PATH)), (&token[..], Some(&b"x"[..])));
            let mut built = Vec::new();
            crate::Builder::datagram(&mut built, Kind::Confirmable, Code::GET, 0, &token)
                .option(number::URI_PATH, b"x")
                .payload(&[]);
            assert_eq!(built, datagram, "{length}");
        }
    }

    #[test]
    fn format_errors_are_refused_and_say_whether_a_reset_is_due() {
        let cases: &[(&[u8], Option<u16>)] = &[
            (b"", None),
            (b"\x40\x01\x12", None),
            (b"\x00\x01\x12\x34", None),
            (b"\x80\x01\x12\x34", None),
            (b"\x49\x01\x12\x3412345678", Some(0x1234)),
            (b"\x4d\x01\x12\x34", Some(0x1234)),
            (b"\x4e\x01\x12\x34\0", Some(0x1234)),
            (b"\x4e\x01\x12\x34\xff\xff1", Some(0x1234)),
            (b"\x4f\x01\x12\x34123456789012345", Some(0x1234)),
            (b"\x42\x01\x12\x34\x01", Some(0x1234)),
            (b"\x40\x00\x12\x34\x00", Some(0x1234)),
            (b"\x41\x00\x12\x34\x00", Some(0x1234)),
            (b"\x40\x20\x12\x34", Some(0x1234)),
            (b"\x40\xc1\x12\x34", Some(0x1234)),
            (b"\x40\xe1\x12\x34", Some(0x1234)),
            (b"\x40\x01\x12\x34\xff", Some(0x1234)),
            (b"\x40\x01\x12\x34\xf0", Some(0x1234)),
            (b"\x40\x01\x12\x34\x0f", Some(0x1234)),
            (b"\x40\x01\x12\x34\xd0", Some(0x1234)),
            (b"\x40\x01\x12\x34\xe0\x01", Some(0x1234)),
            (b"\x40\x01\x12\x34\xb4abc", Some(0x1234)),
            (b"\x50\x00\x12\x34", None),
            (b"\x60\x01\x12\x34", None),
            (b"\x70\x45\x12\x34", None),
            (b"\x50\x01\x12\x34\xff", None),
        ];
        for (datagram, reset) in cases {
            let error = MessageView::parse(datagram).unwrap_err();
            assert_eq!(error.reset, *reset, "{datagram:02x?}: {error}");
        }
    }

    #[test]
    fn typed_accessors_read_the_first_value_and_ignore_what_is_too_long() {
        let view = MessageView::parse(b"\x40\x02\0\0\xc1\x32\x21\x3c").unwrap();
        assert_eq!((view.contents.content_format(), view.contents.media_type()), (Some(50), Some("application/json")));
        assert_eq!(view.contents.max_age(), Some(60));
        let view = MessageView::parse(b"\x40\x02\0\0\xc3\x01\0\x32").unwrap();
        assert_eq!(view.contents.content_format(), None);
    }
}

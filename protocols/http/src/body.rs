//! Bodies on an HTTP/1.1 connection: how long they are, and taking an answer's apart (RFC 9112 sections 6 and 7).

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::response::Malformed;

/// Where a body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// After so many bytes; 0 is no body.
    Exactly(u64),
    /// Where its last chunk says so.
    Chunked,
    /// Where the connection ends; answers alone.
    UntilClose,
}

/// Takes an answer's body from what comes after its head.
#[derive(Debug)]
pub struct Decoder(State);

#[derive(Debug)]
enum State {
    Left(u64),
    ChunkSize,
    ChunkData(u64),
    /// The line end after a chunk's data.
    ChunkEnd,
    Trailer,
    UntilClose,
    Ended,
}

/// What comes next in a body.
#[derive(Debug)]
pub enum Piece {
    Data(Bytes),
    /// The last thing of a chunked body that has some.
    Trailers(HeaderMap),
    /// More bytes are needed.
    Wanting,
    End,
}

/// A chunk's size with its extensions, which nobody uses.
const CHUNK_LINE_BYTES_MAX: usize = 1024;
/// Fits 64 bits with no room for tricks at their end.
const CHUNK_DIGITS_MAX: usize = 15;
const TRAILER_BYTES_MAX: usize = 16 << 10;
const TRAILERS_MAX: usize = 64;

impl Decoder {
    pub fn new(length: Length) -> Self {
        Decoder(match length {
            Length::Exactly(0) => State::Ended,
            Length::Exactly(bytes) => State::Left(bytes),
            Length::Chunked => State::ChunkSize,
            Length::UntilClose => State::UntilClose,
        })
    }

    /// Whether all of it has been taken.
    pub fn is_ended(&self) -> bool {
        matches!(self.0, State::Ended)
    }

    /// Bytes still to come, where the head has said so.
    pub fn left(&self) -> Option<u64> {
        match self.0 {
            State::Ended => Some(0),
            State::Left(bytes) => Some(bytes),
            State::ChunkSize | State::ChunkData(_) | State::ChunkEnd | State::Trailer | State::UntilClose => None,
        }
    }

    /// Bytes that can be read at once without reading beyond what is known to be the body's; 0 if nothing is known.
    pub fn expected(&self) -> u64 {
        match self.0 {
            State::Left(bytes) | State::ChunkData(bytes) => bytes,
            State::ChunkSize | State::ChunkEnd | State::Trailer | State::UntilClose | State::Ended => 0,
        }
    }

    /// Takes the next piece from the front of `buffer`.
    ///
    /// # Errors
    /// [`Malformed`]; the connection is of no use any more.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Piece, Malformed> {
        loop {
            match self.0 {
                State::Ended => return Ok(Piece::End),
                _ if buffer.is_empty() => return Ok(Piece::Wanting),
                State::UntilClose => return Ok(Piece::Data(buffer.split().freeze())),
                State::Left(left) => {
                    let (data, left) = take(buffer, left);
                    self.0 = if left == 0 { State::Ended } else { State::Left(left) };
                    return Ok(Piece::Data(data));
                }
                State::ChunkData(left) => {
                    let (data, left) = take(buffer, left);
                    self.0 = if left == 0 { State::ChunkEnd } else { State::ChunkData(left) };
                    return Ok(Piece::Data(data));
                }
                State::ChunkEnd => match buffer.get(..2) {
                    Some(b"\r\n") => {
                        let _ = buffer.split_to(2);
                        self.0 = State::ChunkSize;
                    }
                    None if buffer.starts_with(b"\r") => return Ok(Piece::Wanting),
                    Some(_) | None => return Err(Malformed("a chunk that does not end where it says")),
                },
                State::ChunkSize => {
                    let Some(line) = take_line(buffer)? else { return Ok(Piece::Wanting) };
                    self.0 = match chunk_size(&line)? {
                        0 => State::Trailer,
                        bytes => State::ChunkData(bytes),
                    };
                }
                State::Trailer => {
                    let Some(trailers) = take_trailers(buffer)? else { return Ok(Piece::Wanting) };
                    self.0 = State::Ended;
                    if !trailers.is_empty() {
                        return Ok(Piece::Trailers(trailers));
                    }
                }
            }
        }
    }

    /// The connection has ended.
    ///
    /// # Errors
    /// The body has not: what came of it is not all.
    pub fn close(&mut self) -> Result<(), Malformed> {
        match self.0 {
            State::Ended | State::UntilClose => {
                self.0 = State::Ended;
                Ok(())
            }
            State::Left(_) | State::ChunkSize | State::ChunkData(_) | State::ChunkEnd | State::Trailer => {
                Err(Malformed("the answer ends early"))
            }
        }
    }
}

fn take(buffer: &mut BytesMut, left: u64) -> (Bytes, u64) {
    let taken = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
    (buffer.split_to(taken).freeze(), left - taken as u64)
}

/// A line without its end.
fn take_line(buffer: &mut BytesMut) -> Result<Option<BytesMut>, Malformed> {
    let Some(feed) = buffer.iter().take(CHUNK_LINE_BYTES_MAX).position(|b| *b == b'\n') else {
        let is_long = buffer.len() >= CHUNK_LINE_BYTES_MAX;
        return if is_long { Err(Malformed("a chunk's size that does not end")) } else { Ok(None) };
    };
    let mut line = buffer.split_to(feed + 1);
    line.truncate(feed);
    if line.last() != Some(&b'\r') {
        return Err(Malformed("a line feed alone"));
    }
    line.truncate(feed - 1);
    Ok(Some(line))
}

/// RFC 9112 section 7.1.1: white space may stand before an extension, and nowhere else.
fn chunk_size(line: &[u8]) -> Result<u64, Malformed> {
    let digits = match line.iter().position(|b| *b == b';') {
        Some(at) => line.get(..at).unwrap_or_default().trim_ascii_end(),
        None => line,
    };
    let is_number = (1..=CHUNK_DIGITS_MAX).contains(&digits.len()) && digits.iter().all(u8::is_ascii_hexdigit);
    let digits = std::str::from_utf8(digits).ok().filter(|_| is_number);
    digits.and_then(|digits| u64::from_str_radix(digits, 16).ok()).ok_or(Malformed("a chunk's size that is no number"))
}

fn take_trailers(buffer: &mut BytesMut) -> Result<Option<HeaderMap>, Malformed> {
    let mut lines = [httparse::EMPTY_HEADER; TRAILERS_MAX];
    match httparse::parse_headers(buffer, &mut lines) {
        Ok(httparse::Status::Complete((bytes, lines))) => {
            let mut trailers = HeaderMap::with_capacity(lines.len());
            for line in lines {
                let name = HeaderName::from_bytes(line.name.as_bytes());
                let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(line.value)) else {
                    return Err(Malformed("a trailer"));
                };
                trailers.append(name, value);
            }
            let _ = buffer.split_to(bytes);
            Ok(Some(trailers))
        }
        Ok(httparse::Status::Partial) if buffer.len() < TRAILER_BYTES_MAX => Ok(None),
        Ok(httparse::Status::Partial) => Err(Malformed("trailers that do not end")),
        Err(_) => Err(Malformed("trailers")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What is read when `text` comes in pieces of `step` bytes: data, trailers, whether it ended, and what is left.
    fn read(length: Length, text: &[u8], step: usize) -> Result<(Vec<u8>, usize, bool, Vec<u8>), Malformed> {
        let (mut decoder, mut buffer) = (Decoder::new(length), BytesMut::new());
        let (mut data, mut trailers) = (Vec::new(), 0);
        for piece in text.chunks(step.max(1)) {
            buffer.extend_from_slice(piece);
            loop {
                match decoder.next(&mut buffer)? {
                    Piece::Data(bytes) => data.extend_from_slice(&bytes),
                    Piece::Trailers(headers) => trailers = headers.len(),
                    Piece::Wanting | Piece::End => break,
                }
            }
        }
        Ok((data, trailers, decoder.is_ended(), buffer.to_vec()))
    }

    #[test]
    fn bodies_of_every_kind_whole_and_byte_by_byte() {
        let cases: [(Length, &str, &str, usize, bool, &str); 5] = [
            (Length::Exactly(3), "abcHTTP", "abc", 0, true, "HTTP"),
            (Length::Exactly(0), "HTTP", "", 0, true, "HTTP"),
            (Length::Chunked, "3\r\nabc\r\nA ;x=1\r\n0123456789\r\n000\r\n\r\nH", "abc0123456789", 0, true, "H"),
            (Length::Chunked, "1\r\na\r\n0\r\ngrpc-status: 0\r\nx: y\r\n\r\n", "a", 2, true, ""),
            (Length::UntilClose, "abc", "abc", 0, false, ""),
        ];
        for (length, text, data, trailers, ended, left) in cases {
            for step in [1, 2, 5, text.len()] {
                let expected = (data.as_bytes().to_vec(), trailers, ended, left.as_bytes().to_vec());
                assert_eq!(read(length, text.as_bytes(), step), Ok(expected), "{text:?} by {step}");
            }
        }
    }

    #[test]
    fn chunks_with_two_readings_are_refused() {
        for bad in [
            "0x3\r\nabc\r\n",
            "-1\r\n",
            "\r\n",
            "3 \r\nabc\r\n",
            " 3\r\nabc\r\n",
            "3\nabc\r\n",
            "3\r\nabcd\r\n",
            "3\r\nabc\n",
            "10000000000000003\r\nabc\r\n",
            "g\r\n",
            "0\r\na : b\r\n\r\n",
            "0\r\na\r\n\r\n",
        ] {
            for step in [1, bad.len()] {
                assert!(read(Length::Chunked, bad.as_bytes(), step).is_err(), "{bad:?} by {step}");
            }
        }
        let endless = format!("1;{}", "x".repeat(2000));
        assert!(read(Length::Chunked, endless.as_bytes(), 100).is_err());
        let trailers = format!("0\r\n{}", "a: bbbbbbbbbbbbbbbbbbbb\r\n".repeat(2000));
        assert!(read(Length::Chunked, trailers.as_bytes(), 1000).is_err());
    }

    #[test]
    fn only_what_is_whole_may_end_with_the_connection() {
        assert!(Decoder::new(Length::UntilClose).close().is_ok() && Decoder::new(Length::Exactly(0)).close().is_ok());
        assert!(Decoder::new(Length::Exactly(1)).close().is_err() && Decoder::new(Length::Chunked).close().is_err());
    }

    proptest! {
        #[test]
        fn chunks_carry_what_was_put_in(pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..50), 0..8), step in 1_usize..40) {
            let mut text = Vec::new();
            for piece in &pieces {
                text.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
                text.extend_from_slice(piece);
                text.extend_from_slice(b"\r\n");
            }
            text.extend_from_slice(b"0\r\n\r\nnext");
            let (data, _, ended, left) = read(Length::Chunked, &text, step).unwrap();
            prop_assert_eq!((data, ended, left), (pieces.concat(), true, b"next".to_vec()));
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100), step in 1_usize..20) {
            for length in [Length::Chunked, Length::Exactly(20), Length::UntilClose] {
                let _ = read(length, &bytes, step);
            }
        }
    }
}

//! Where one request ends and the next begins on an HTTP/1 connection, and what two parsers could disagree about (RFC 9112 sections 2.2, 5, 6, 7.1, 11.2).
//!
//! An observer, not a parser: it follows the bytes beside the server's parser and refuses every form that programs read differently, so that
//! what it lets pass has one reading. It keeps at most [`LINE_BYTES_KEPT`] bytes of an unfinished line.

/// Follows the requests of one connection.
#[derive(Clone, Debug)]
pub struct Framing {
    state: State,
    /// The beginning of a line that is not whole yet.
    line: Vec<u8>,
    /// Its bytes so far, kept or not.
    line_bytes: usize,
    last: u8,
    head: Head,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    RequestLine,
    Header,
    Body(u64),
    ChunkSize,
    ChunkData(u64),
    /// After a chunk's data: CR and LF, of which so many came.
    ChunkEnd(u8),
    Trailer,
}

#[derive(Clone, Copy, Debug, Default)]
struct Head {
    length: Option<u64>,
    chunked: bool,
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ambiguity {
    /// LF without CR before it.
    BareLineFeed,
    /// A header line that begins with white space.
    FoldedLine,
    SpaceBeforeColon,
    /// `Content-Length` that is not one number, or stands twice.
    ContentLength,
    /// `Transfer-Encoding` other than `chunked`, or twice.
    TransferEncoding,
    /// Both of them.
    LengthAndChunked,
    /// `#` in a request line: a target has no fragment (RFC 9112 section 3.2), and some programs cut there where others go on.
    Fragment,
    /// A chunk whose size is not a hexadecimal number, or whose end is not where it should be.
    Chunk,
}

impl Ambiguity {
    /// A lowercase clause.
    pub const fn as_str(self) -> &'static str {
        match self {
            Ambiguity::BareLineFeed => "a line feed alone",
            Ambiguity::FoldedLine => "a folded header line",
            Ambiguity::SpaceBeforeColon => "white space before a header's colon",
            Ambiguity::ContentLength => "content-length that is not one number",
            Ambiguity::TransferEncoding => "transfer-encoding other than chunked",
            Ambiguity::LengthAndChunked => "content-length and transfer-encoding together",
            Ambiguity::Fragment => "a fragment in the target",
            Ambiguity::Chunk => "a malformed chunk",
        }
    }
}

/// Bytes up to which are harmless, and what comes then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    pub at: usize,
    pub what: Ambiguity,
    /// Whether it stands in a body, so that the request's head was passed on already.
    pub in_body: bool,
}

/// Longer than any framing header that is well formed.
pub const LINE_BYTES_KEPT: usize = 128;
/// A chunk's size with its extensions, which nobody uses.
const CHUNK_LINE_BYTES_MAX: usize = 1024;

impl Default for Framing {
    fn default() -> Self {
        Framing { state: State::RequestLine, line: Vec::new(), line_bytes: 0, last: 0, head: Head::default() }
    }
}

impl Framing {
    /// Follows the next bytes of the connection.
    ///
    /// # Errors
    /// The first thing that is ambiguous; the connection is to be closed then.
    pub fn follow(&mut self, bytes: &[u8]) -> Result<(), Found> {
        let mut at = 0;
        while let Some(rest) = bytes.get(at..)
            && !rest.is_empty()
        {
            let taken = match self.state {
                State::Body(left) => self.skip(rest, left, State::RequestLine, State::Body),
                State::ChunkData(left) => self.skip(rest, left, State::ChunkEnd(0), State::ChunkData),
                State::ChunkEnd(seen) => self.chunk_end(rest, seen).map_err(|what| self.found(at, what))?,
                State::RequestLine | State::Header | State::ChunkSize | State::Trailer => {
                    self.line(rest).map_err(|(offset, what)| self.found(at + offset, what))?
                }
            };
            at += taken;
        }
        Ok(())
    }

    fn found(&self, at: usize, what: Ambiguity) -> Found {
        Found { at, what, in_body: !matches!(self.state, State::RequestLine | State::Header) }
    }

    fn skip(&mut self, rest: &[u8], left: u64, then: State, still: fn(u64) -> State) -> usize {
        let taken = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
        let left = left - taken as u64;
        self.state = if left == 0 { then } else { still(left) };
        taken
    }

    fn chunk_end(&mut self, rest: &[u8], seen: u8) -> Result<usize, Ambiguity> {
        let (expected, next) = if seen == 0 { (b'\r', State::ChunkEnd(1)) } else { (b'\n', State::ChunkSize) };
        if rest.first() != Some(&expected) {
            return Err(Ambiguity::Chunk);
        }
        self.state = next;
        Ok(1)
    }

    /// Takes up to the end of a line; the error's offset is where the bytes stop being harmless.
    fn line(&mut self, rest: &[u8]) -> Result<usize, (usize, Ambiguity)> {
        let feed = rest.iter().position(|b| *b == b'\n');
        if self.state == State::RequestLine
            && let Some(at) = rest.iter().take(feed.unwrap_or(rest.len())).position(|b| *b == b'#')
        {
            return Err((at, Ambiguity::Fragment));
        }
        let Some(feed) = feed else {
            self.keep(rest)?;
            return Ok(rest.len());
        };
        let (piece, _) = rest.split_at(feed);
        let before = piece.last().copied().unwrap_or(if self.line_bytes == 0 { 0 } else { self.last });
        if before != b'\r' {
            return Err((feed, Ambiguity::BareLineFeed));
        }
        // The verdict comes before the line feed, so that the server's parser never sees the line end.
        if self.line_bytes == 0 {
            let text = piece.split_last().map_or(piece, |(_, text)| text);
            self.end_of_line(text, text.len()).map_err(|what| (feed, what))?;
        } else {
            self.keep(piece).map_err(|(_, what)| (feed, what))?;
            let mut text = std::mem::take(&mut self.line);
            let whole = self.line_bytes - 1;
            text.truncate(whole);
            let ended = self.end_of_line(&text, whole);
            text.clear();
            // Its room is used again.
            self.line = text;
            ended.map_err(|what| (feed, what))?;
        }
        self.line_bytes = 0;
        Ok(feed + 1)
    }

    fn keep(&mut self, piece: &[u8]) -> Result<(), (usize, Ambiguity)> {
        let room = LINE_BYTES_KEPT.saturating_sub(self.line.len());
        self.line.extend_from_slice(piece.get(..room).unwrap_or(piece));
        self.line_bytes += piece.len();
        self.last = piece.last().copied().unwrap_or(self.last);
        if self.state == State::ChunkSize && self.line_bytes > CHUNK_LINE_BYTES_MAX {
            return Err((0, Ambiguity::Chunk));
        }
        Ok(())
    }

    /// `text` is the line without its end, cut off after [`LINE_BYTES_KEPT`] if it came in pieces; `whole` its true length.
    fn end_of_line(&mut self, text: &[u8], whole: usize) -> Result<(), Ambiguity> {
        match self.state {
            State::RequestLine => {
                // RFC 9112 section 2.2: empty lines before a request are ignored.
                if whole > 0 {
                    self.head = Head::default();
                    self.state = State::Header;
                }
                Ok(())
            }
            State::Header if whole == 0 => self.end_of_head(),
            State::Header => self.header(text, whole),
            State::ChunkSize => self.chunk_size(text, whole),
            State::Trailer if whole == 0 => {
                self.state = State::RequestLine;
                Ok(())
            }
            State::Trailer => name_of(text).map(|_| ()),
            // These have no lines.
            State::Body(_) | State::ChunkData(_) | State::ChunkEnd(_) => Ok(()),
        }
    }

    fn header(&mut self, text: &[u8], whole: usize) -> Result<(), Ambiguity> {
        let (name, value) = name_of(text)?;
        if name.eq_ignore_ascii_case(b"content-length") {
            let length = number(value).filter(|_| whole == text.len() && self.head.length.is_none());
            self.head.length = Some(length.ok_or(Ambiguity::ContentLength)?);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            let chunked = whole == text.len() && value.eq_ignore_ascii_case(b"chunked") && !self.head.chunked;
            if !chunked {
                return Err(Ambiguity::TransferEncoding);
            }
            self.head.chunked = true;
        }
        Ok(())
    }

    fn end_of_head(&mut self) -> Result<(), Ambiguity> {
        self.state = match self.head {
            Head { length: Some(_), chunked: true } => return Err(Ambiguity::LengthAndChunked),
            Head { length: None | Some(0), chunked: false } => State::RequestLine,
            Head { length: Some(bytes), chunked: false } => State::Body(bytes),
            Head { length: None, chunked: true } => State::ChunkSize,
        };
        Ok(())
    }

    fn chunk_size(&mut self, text: &[u8], whole: usize) -> Result<(), Ambiguity> {
        if whole > CHUNK_LINE_BYTES_MAX {
            return Err(Ambiguity::Chunk);
        }
        let digits = text.iter().position(|b| *b == b';').and_then(|at| text.get(..at)).unwrap_or(text);
        // RFC 9112 section 7.1.1 lets white space stand before an extension, and nowhere else.
        let digits = if digits.len() < text.len() { trim(digits) } else { digits };
        let is_number = (1..=CHUNK_DIGITS_MAX).contains(&digits.len()) && digits.iter().all(u8::is_ascii_hexdigit);
        let size = std::str::from_utf8(digits).ok().filter(|_| is_number);
        let size = size.and_then(|digits| u64::from_str_radix(digits, 16).ok()).ok_or(Ambiguity::Chunk)?;
        self.state = if size == 0 { State::Trailer } else { State::ChunkData(size) };
        Ok(())
    }
}

/// Fits 64 bits with no room for tricks at their end.
const CHUNK_DIGITS_MAX: usize = 15;

/// A header line's name and value. A line without colon is the server's parser's affair.
fn name_of(text: &[u8]) -> Result<(&[u8], &[u8]), Ambiguity> {
    if matches!(text.first(), Some(b' ' | b'\t')) {
        return Err(Ambiguity::FoldedLine);
    }
    let Some(colon) = text.iter().position(|b| *b == b':') else { return Ok((text, &[])) };
    let (name, value) = text.split_at(colon);
    if matches!(name.last(), Some(b' ' | b'\t')) {
        return Err(Ambiguity::SpaceBeforeColon);
    }
    Ok((name, trim(value.get(1..).unwrap_or_default())))
}

/// Space and tab, and nothing else (RFC 9110 section 5.6.3).
fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

fn number(value: &[u8]) -> Option<u64> {
    const DIGITS_MAX: usize = 18;
    let fits = (1..=DIGITS_MAX).contains(&value.len()) && value.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(value).ok().filter(|_| fits)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn verdict(bytes: &[u8]) -> Option<Ambiguity> {
        Framing::default().follow(bytes).err().map(|found| found.what)
    }

    const GOOD: &[&str] = &[
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nReferer: /#b\r\n\r\n",
        "\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\na\nb\ncGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n3\r\na\nb\r\nA;x=\"y\"\r\n0123456789\r\n0\r\nX: y\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        "POST / HTTP/1.1\r\nhost:a\r\ncontent-length:0\r\nx-transfer-encoding: gzip\r\n\r\n",
        "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2 ;ext\r\nab\r\n000\r\n\r\n",
    ];

    const BAD: &[(&str, Ambiguity)] = &[
        ("GET / HTTP/1.1\nHost: a\r\n\r\n", Ambiguity::BareLineFeed),
        ("GET / HTTP/1.1\r\nHost: a\n\r\n", Ambiguity::BareLineFeed),
        ("GET / HTTP/1.1\r\nHost: a\r\n\n", Ambiguity::BareLineFeed),
        ("\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", Ambiguity::BareLineFeed),
        ("GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", Ambiguity::Fragment),
        ("GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n folded\r\n\r\n", Ambiguity::FoldedLine),
        ("GET / HTTP/1.1\r\n Host: a\r\n\r\n", Ambiguity::FoldedLine),
        ("GET / HTTP/1.1\r\nX: 1\r\n\t\r\n\r\n", Ambiguity::FoldedLine),
        ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", Ambiguity::SpaceBeforeColon),
        ("POST / HTTP/1.1\r\nTransfer-Encoding\t: chunked\r\n\r\n", Ambiguity::SpaceBeforeColon),
        ("POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n", Ambiguity::ContentLength),
        ("POST / HTTP/1.1\r\nContent-Length: 5, 5\r\n\r\n", Ambiguity::ContentLength),
        ("POST / HTTP/1.1\r\nContent-Length: +5\r\n\r\n", Ambiguity::ContentLength),
        ("POST / HTTP/1.1\r\nContent-Length: 0x5\r\n\r\n", Ambiguity::ContentLength),
        ("POST / HTTP/1.1\r\nContent-Length:\r\n\r\n", Ambiguity::ContentLength),
        ("POST / HTTP/1.1\r\nContent-Length: 5 5\r\n\r\n", Ambiguity::ContentLength),
        ("POST / HTTP/1.1\r\nContent-Length: 9999999999999999999\r\n\r\n", Ambiguity::ContentLength),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", Ambiguity::TransferEncoding),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n", Ambiguity::TransferEncoding),
        (
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
            Ambiguity::TransferEncoding,
        ),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: \x0bchunked\r\n\r\n", Ambiguity::TransferEncoding),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\x0c\r\n\r\n", Ambiguity::TransferEncoding),
        ("POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", Ambiguity::LengthAndChunked),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n", Ambiguity::LengthAndChunked),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n", Ambiguity::Chunk),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", Ambiguity::Chunk),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n\r\n", Ambiguity::Chunk),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3 \r\nabc\r\n", Ambiguity::Chunk),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\nabc\r\n", Ambiguity::BareLineFeed),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;x\nabc\r\n", Ambiguity::BareLineFeed),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n", Ambiguity::Chunk),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\n", Ambiguity::Chunk),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000003\r\nabc\r\n", Ambiguity::Chunk),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\n", Ambiguity::BareLineFeed),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX : y\r\n", Ambiguity::SpaceBeforeColon),
    ];

    #[test]
    fn well_formed_requests_pass_whole_and_byte_by_byte() {
        for good in GOOD {
            assert_eq!(verdict(good.as_bytes()), None, "{good:?}");
            let mut framing = Framing::default();
            for byte in good.as_bytes() {
                assert_eq!(framing.follow(&[*byte]), Ok(()), "{good:?}");
            }
            assert_eq!(framing.state, State::RequestLine, "{good:?}");
        }
    }

    #[test]
    fn what_two_parsers_read_differently_is_named() {
        for (bad, what) in BAD {
            assert_eq!(verdict(bad.as_bytes()), Some(*what), "{bad:?}");
        }
        let long = format!("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;{}", "x".repeat(1100));
        assert_eq!(verdict(long.as_bytes()), Some(Ambiguity::Chunk));
    }

    #[test]
    fn the_end_of_a_bad_line_is_never_handed_on() {
        for (bad, _) in BAD {
            let found = Framing::default().follow(bad.as_bytes()).unwrap_err();
            let in_head = !found.in_body;
            let harmless = &bad[..found.at];
            assert!(!in_head || !harmless.ends_with("\r\n\r\n"), "{bad:?} {found:?}");
        }
    }

    fn stream() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            proptest::sample::select(GOOD).prop_map(|text| text.as_bytes().to_vec()),
            proptest::sample::select(BAD).prop_map(|(text, _)| text.as_bytes().to_vec()),
            proptest::collection::vec(any::<u8>(), 0..40),
        ];
        proptest::collection::vec(part, 1..4).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn the_verdict_does_not_depend_on_how_the_bytes_arrive(bytes in stream(), cut in 1..50usize) {
            let whole = Framing::default().follow(&bytes);
            let mut framing = Framing::default();
            let mut pieces = Ok(());
            for (index, piece) in bytes.chunks(cut).enumerate() {
                pieces = framing.follow(piece).map_err(|found| Found { at: found.at + index * cut, ..found });
                prop_assert!(framing.line.len() <= LINE_BYTES_KEPT);
                if pieces.is_err() {
                    break;
                }
            }
            prop_assert_eq!(whole, pieces);
        }
    }
}

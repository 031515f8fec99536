//! The head of an answer (RFC 9112 sections 4 to 6), and what it says about the body and the connection.

use std::mem::MaybeUninit;

use bytes::{Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version};

use crate::body::Length;

/// An answer's head.
#[derive(Debug)]
pub struct Head {
    pub status: StatusCode,
    pub version: Version,
    pub headers: HeaderMap,
    pub length: Length,
    /// Whether the connection can take another request after this answer (RFC 9112 section 9.3).
    pub keep_alive: bool,
}

/// What came is no answer that has one reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

/// `Via`, a request id, what is left of a rate.
const ADDED_ON_THE_WAY: usize = 4;
/// Header lines of one answer.
pub const HEADERS_MAX: usize = 100;

/// Takes the head of the answer to a request with `method` from the front of `buffer`; `None`: it is not whole yet.
///
/// # Errors
/// [`Malformed`]; the connection is of no use any more.
pub fn take_head(buffer: &mut BytesMut, method: &Method) -> Result<Option<Head>, Malformed> {
    if buffer.is_empty() {
        return Ok(None);
    }
    let mut lines = [const { MaybeUninit::uninit() }; HEADERS_MAX];
    let mut parsed = httparse::Response::new(&mut []);
    let status = httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut parsed, buffer, &mut lines);
    let bytes = match status {
        Ok(httparse::Status::Complete(bytes)) => bytes,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Malformed("an answer with too many headers")),
        Err(_) => return Err(Malformed("no HTTP answer")),
    };
    let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or(Malformed("no status"))?;
    let version = if parsed.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
    // Where each value stands, so that it is a piece of the buffer and no copy.
    let start = buffer.as_ptr().addr();
    let mut places = Vec::with_capacity(parsed.headers.len());
    for line in &*parsed.headers {
        let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|_| Malformed("a header without name"))?;
        let from = line.value.as_ptr().addr().wrapping_sub(start);
        places.push((name, from, from.wrapping_add(line.value.len())));
    }
    let head: Bytes = buffer.split_to(bytes).freeze();
    // What a gateway adds to them finds room.
    let mut headers = HeaderMap::with_capacity(places.len() + ADDED_ON_THE_WAY);
    for (name, from, to) in places {
        // An empty value may stand anywhere.
        let value = if from < to && to <= head.len() { head.slice(from..to) } else { Bytes::new() };
        let value = HeaderValue::from_maybe_shared(value).map_err(|_| Malformed("a header's value"))?;
        headers.append(name, value);
    }
    let length = length(status, version, method, &headers)?;
    let keep_alive = length != Length::UntilClose && persists(version, &headers);
    Ok(Some(Head { status, version, headers, length, keep_alive }))
}

/// RFC 9112 section 6.3.
fn length(status: StatusCode, version: Version, method: &Method, headers: &HeaderMap) -> Result<Length, Malformed> {
    let mut said = None;
    for value in headers.get_all(CONTENT_LENGTH) {
        // A list of equal numbers is one number; anything else can be read in two ways.
        for number in value.as_bytes().split(|b| *b == b',') {
            let number = decimal(number.trim_ascii()).ok_or(Malformed("content-length that is no number"))?;
            if said.replace(number).is_some_and(|before| before != number) {
                return Err(Malformed("two content-lengths"));
            }
        }
    }
    let mut encodings = headers.get_all(TRANSFER_ENCODING).iter();
    let encoding = encodings.next();
    let bodiless = *method == Method::HEAD
        || status.is_informational()
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    match (encoding, said) {
        _ if bodiless => Ok(Length::Exactly(0)),
        (Some(_), Some(_)) => Err(Malformed("content-length and transfer-encoding together")),
        (Some(encoding), None) => {
            let chunked = encoding.as_bytes().eq_ignore_ascii_case(b"chunked") && encodings.next().is_none();
            // Other codings are never asked for, and HTTP/1.0 knows none.
            if chunked && version == Version::HTTP_11 {
                Ok(Length::Chunked)
            } else {
                Err(Malformed("transfer-encoding other than chunked"))
            }
        }
        (None, Some(bytes)) => Ok(Length::Exactly(bytes)),
        (None, None) => Ok(Length::UntilClose),
    }
}

fn persists(version: Version, headers: &HeaderMap) -> bool {
    let says = |option: &[u8]| {
        let mut options = headers.get_all(CONNECTION).iter().flat_map(|value| value.as_bytes().split(|b| *b == b','));
        options.any(|said| said.trim_ascii().eq_ignore_ascii_case(option))
    };
    !says(b"close") && (version == Version::HTTP_11 || says(b"keep-alive"))
}

fn decimal(digits: &[u8]) -> Option<u64> {
    const DIGITS_MAX: usize = 18;
    let fits = (1..=DIGITS_MAX).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
    fits.then(|| digits.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0')))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str, method: &Method) -> Result<Option<Head>, Malformed> {
        take_head(&mut BytesMut::from(text), method)
    }

    fn framed(lines: &str) -> Result<(Length, bool), Malformed> {
        let head = parse(&format!("HTTP/1.1 200 OK\r\n{lines}\r\n"), &Method::GET)?.unwrap();
        Ok((head.length, head.keep_alive))
    }

    #[test]
    fn a_head_is_taken_and_the_body_left() {
        let mut buffer =
            BytesMut::from("HTTP/1.1 404 Gone fishing\r\nA:  x y \r\na: \r\nContent-Length: 3\r\n\r\nabcHTTP");
        let head = take_head(&mut buffer, &Method::GET).unwrap().unwrap();
        assert_eq!((head.status, head.version), (StatusCode::NOT_FOUND, Version::HTTP_11));
        let values: Vec<_> = head.headers.get_all("a").iter().map(HeaderValue::as_bytes).collect();
        assert_eq!(values, [&b"x y"[..], b""]);
        assert_eq!((head.length, head.keep_alive, &buffer[..]), (Length::Exactly(3), true, &b"abcHTTP"[..]));
    }

    #[test]
    fn a_body_has_one_length() {
        assert_eq!(framed("content-length: 5\r\n"), Ok((Length::Exactly(5), true)));
        assert_eq!(framed("content-length: 5, 5\r\ncontent-length: 5\r\n"), Ok((Length::Exactly(5), true)));
        assert_eq!(framed("transfer-encoding: Chunked\r\n"), Ok((Length::Chunked, true)));
        assert_eq!(framed(""), Ok((Length::UntilClose, false)));
        assert_eq!(framed("content-length: 0\r\nconnection: x, Close\r\n"), Ok((Length::Exactly(0), false)));
        for bad in [
            "content-length: 5, 6\r\n",
            "content-length: 5\r\ncontent-length: 6\r\n",
            "content-length: +5\r\n",
            "content-length: \r\n",
            "content-length: 5,\r\n",
            "content-length: 9999999999999999999\r\n",
            "content-length: 5\r\ntransfer-encoding: chunked\r\n",
            "transfer-encoding: gzip, chunked\r\n",
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
            "transfer-encoding: identity\r\n",
            "a : b\r\n",
            "a: b\r\n folded\r\n",
            "a: \0\r\n",
        ] {
            assert!(framed(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn some_answers_have_no_body_whatever_they_say() {
        let lines = "content-length: 5\r\n\r\n";
        for (status, method) in [(200, Method::HEAD), (204, Method::GET), (304, Method::GET), (100, Method::POST)] {
            let head = parse(&format!("HTTP/1.1 {status} x\r\n{lines}"), &method).unwrap().unwrap();
            assert_eq!(head.length, Length::Exactly(0), "{status} {method}");
        }
    }

    #[test]
    fn http_1_0_closes_unless_it_says_otherwise() {
        let old = |lines: &str| parse(&format!("HTTP/1.0 200 OK\r\n{lines}\r\n"), &Method::GET);
        assert!(!old("content-length: 1\r\n").unwrap().unwrap().keep_alive);
        assert!(old("content-length: 1\r\nconnection: Keep-Alive\r\n").unwrap().unwrap().keep_alive);
        assert!(old("transfer-encoding: chunked\r\n").is_err());
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        for bad in ["SSH-2.0-x\r\n", "HTTP/2.0 200 OK\r\n\r\n", "HTTP/1.1 20 OK\r\n\r\n", "HTTP/1.1 099 OK\r\n\r\n"] {
            assert!(parse(bad, &Method::GET).is_err(), "{bad:?}");
        }
        let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(HEADERS_MAX + 1));
        assert_eq!(parse(&many, &Method::GET).unwrap_err(), Malformed("an answer with too many headers"));
    }

    proptest! {
        #[test]
        fn a_head_in_pieces_is_the_same_head(cut in 0_usize..100) {
            let text = "HTTP/1.1 200 OK\r\nserver: x\r\ncontent-length: 10\r\nx-y: z\r\n\r\n0123456789";
            let mut buffer = BytesMut::from(text.get(..cut).unwrap_or(text));
            let first = take_head(&mut buffer, &Method::GET).unwrap();
            prop_assert_eq!(first.is_some(), cut >= text.len() - 10);
            if first.is_none() {
                buffer.extend_from_slice(&text.as_bytes()[cut..]);
                let head = take_head(&mut buffer, &Method::GET).unwrap().unwrap();
                prop_assert_eq!((head.headers.len(), &buffer[..]), (3, &b"0123456789"[..]));
            }
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = take_head(&mut BytesMut::from(&bytes[..]), &Method::GET);
            let mut lines = BytesMut::from("HTTP/1.1 200 OK\r\n");
            lines.extend_from_slice(&bytes);
            let _ = take_head(&mut lines, &Method::GET);
        }
    }
}

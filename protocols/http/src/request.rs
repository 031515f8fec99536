//! A request's head in HTTP/1.1's words (RFC 9112 sections 3 and 5).

use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderMap, Method};

use crate::body::Length;

/// Appends the head of a request in origin-form to `out`.
///
/// `target` is a path with its query; one without a path gets its slash (RFC 9112 section 3.2.1). How long the body is says `length` alone: what `headers` say of it is left out.
pub fn write_head(out: &mut Vec<u8>, method: &Method, target: &str, headers: &HeaderMap, length: Length) {
    out.extend_from_slice(method.as_str().as_bytes());
    out.push(b' ');
    if target.is_empty() || target.starts_with('?') {
        out.push(b'/');
    }
    out.extend_from_slice(target.as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
    for (name, value) in headers {
        if *name == CONTENT_LENGTH || *name == TRANSFER_ENCODING {
            continue;
        }
        out.extend_from_slice(name.as_str().as_bytes());
        out.extend_from_slice(b": ");
        out.extend_from_slice(value.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    match length {
        // RFC 9110 section 8.6: said where a body would have had a meaning, or where the asker said it.
        Length::Exactly(0) => {
            let expects_one = matches!(*method, Method::POST | Method::PUT | Method::PATCH);
            if expects_one || headers.contains_key(CONTENT_LENGTH) {
                out.extend_from_slice(b"content-length: 0\r\n");
            }
        }
        Length::Exactly(bytes) => {
            out.extend_from_slice(b"content-length: ");
            write_decimal(out, bytes);
            out.extend_from_slice(b"\r\n");
        }
        Length::Chunked | Length::UntilClose => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
    }
    out.extend_from_slice(b"\r\n");
}

fn write_decimal(out: &mut Vec<u8>, mut number: u64) {
    const DIGITS_MAX: usize = 20;
    let mut digits = [b'0'; DIGITS_MAX];
    let mut at = DIGITS_MAX;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
        at -= 1;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(digits.get(at..).unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn head(method: Method, headers: &[(&'static str, &'static str)], length: Length) -> String {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, HeaderValue::from_static(value));
        }
        let mut out = Vec::new();
        write_head(&mut out, &method, "/a?b", &map, length);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_length_is_said_once_and_by_us() {
        let lying = [("host", "a"), ("content-length", "7"), ("transfer-encoding", "gzip"), ("x", "1"), ("x", "2")];
        assert_eq!(
            head(Method::POST, &lying, Length::Exactly(12_345)),
            "POST /a?b HTTP/1.1\r\nhost: a\r\nx: 1\r\nx: 2\r\ncontent-length: 12345\r\n\r\n"
        );
        let chunked = head(Method::PUT, &lying, Length::Chunked);
        assert!(chunked.ends_with("\r\ntransfer-encoding: chunked\r\n\r\n") && !chunked.contains("content-length"));
    }

    #[test]
    fn an_empty_body_is_said_where_one_is_expected() {
        let host = [("host", "a")];
        assert_eq!(head(Method::GET, &host, Length::Exactly(0)), "GET /a?b HTTP/1.1\r\nhost: a\r\n\r\n");
        assert!(head(Method::POST, &host, Length::Exactly(0)).contains("\r\ncontent-length: 0\r\n"));
        let said = head(Method::DELETE, &[("host", "a"), ("content-length", "0")], Length::Exactly(0));
        assert!(said.contains("\r\ncontent-length: 0\r\n"));
    }

    #[test]
    fn a_target_has_a_path() {
        for (target, expected) in [("", "GET / "), ("?a", "GET /?a "), ("/b", "GET /b "), ("*", "GET * ")] {
            let mut out = Vec::new();
            write_head(&mut out, &Method::GET, target, &HeaderMap::new(), Length::Exactly(0));
            assert!(out.starts_with(expected.as_bytes()), "{target:?}");
        }
    }

    #[test]
    fn decimals() {
        for number in [0, 9, 10, 4_294_967_296, u64::MAX] {
            let mut out = Vec::new();
            write_decimal(&mut out, number);
            assert_eq!(String::from_utf8(out).unwrap(), number.to_string());
        }
    }
}

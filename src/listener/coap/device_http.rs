//! HTTP requests to CoAP devices, and their answers (RFC 8075 section 7).
//!
//! | HTTP | CoAP |
//! |---|---|
//! | GET and HEAD, POST, PUT, DELETE, PATCH | GET, POST, PUT, DELETE, PATCH |
//! | path, query | Uri-Path, Uri-Query, decoded segment by segment |
//! | `Content-Type`, `Accept` | Content-Format, Accept, by the IANA table |
//! | `ETag`, `If-None-Match`, `If-Match` | ETag, If-Match: the bytes in hex digits, in quotes; `If-None-Match: *` If-None-Match |
//! | `Cache-Control: max-age`, `Retry-After` | Max-Age, of 2.05 and of 5.03 and 4.29 |
//! | `Location` | Location-Path, below `/hc/DEVICE` |

use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCEPT, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_MATCH,
    IF_NONE_MATCH, LOCATION, RETRY_AFTER,
};
use http::{Method, StatusCode};
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use tidegate_coap::client::{Call, Reply};
use tidegate_coap::{Code, content};

use crate::message::DeviceId;

/// The request for the device.
///
/// # Errors
/// The status that says what cannot be said to it.
pub fn to_coap(request: &http::Request<Bytes>, timeout: Duration) -> Result<Call, StatusCode> {
    let code = match *request.method() {
        Method::GET | Method::HEAD => Code::GET,
        Method::POST => Code::POST,
        Method::PUT => Code::PUT,
        Method::DELETE => Code::DELETE,
        Method::PATCH => Code::PATCH,
        _ => return Err(StatusCode::NOT_IMPLEMENTED),
    };
    let path = request.uri().path().trim_start_matches('/');
    let path = match path {
        "" => Vec::new(),
        path => {
            path.split('/').map(|text| segment(text, true)).collect::<Option<_>>().ok_or(StatusCode::BAD_REQUEST)?
        }
    };
    let query = request.uri().query().unwrap_or_default().split('&').filter(|argument| !argument.is_empty());
    let query = query.map(|text| segment(text, false)).collect::<Option<_>>().ok_or(StatusCode::BAD_REQUEST)?;
    let headers = request.headers();
    if headers.contains_key(CONTENT_ENCODING) {
        return Err(StatusCode::UNSUPPORTED_MEDIA_TYPE);
    }
    let content_format = match text(headers, &CONTENT_TYPE)? {
        Some(media_type) if !request.body().is_empty() => {
            Some(content::format_of(media_type).ok_or(StatusCode::UNSUPPORTED_MEDIA_TYPE)?)
        }
        Some(_) | None => None,
    };
    let is_get = code == Code::GET;
    let none_match = tags(headers, &IF_NONE_MATCH)?;
    let if_match = tags(headers, &IF_MATCH)?;
    Ok(Call {
        path,
        query,
        // A tag for any value is the empty one (RFC 7252 section 5.10.8.1).
        if_match: if_match.into_iter().map(Option::unwrap_or_default).collect(),
        if_none_match: !is_get && none_match.contains(&None),
        etags: if is_get { none_match.into_iter().flatten().collect() } else { Vec::new() },
        content_format,
        accept: accept(headers)?,
        payload: request.body().to_vec(),
        code,
        ..Call::get(Vec::new(), timeout)
    })
}

/// The device's answer.
pub fn from_coap(device: &DeviceId, reply: &Reply<'_>) -> http::Response<Bytes> {
    let mut response = http::Response::new(Bytes::copy_from_slice(&reply.payload));
    let status = status(reply.code, reply.payload.is_empty());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    if !reply.payload.is_empty() {
        // An error's text has no format of its own (RFC 7252 section 5.5.2).
        let format = reply.content_format.or((!reply.code.is_success()).then_some(content::TEXT_PLAIN));
        let media_type = match format.map(|format| (format, content::media_type(format))) {
            Some((content::TEXT_PLAIN, _)) => HeaderValue::from_static("text/plain; charset=utf-8"),
            Some((_, Some(media_type))) => HeaderValue::from_static(media_type),
            // RFC 8075 section 6.2: a format without a name.
            Some((format, None)) => HeaderValue::try_from(format!("application/coap-payload;cf={format}"))
                .unwrap_or(HeaderValue::from_static("application/octet-stream")),
            None => HeaderValue::from_static("application/octet-stream"),
        };
        headers.insert(CONTENT_TYPE, media_type);
    }
    let mut say = |name: HeaderName, text: String| {
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(name, value);
        }
    };
    if !reply.etag.is_empty() {
        say(ETAG, format!("\"{}\"", reply.etag.iter().map(|byte| format!("{byte:02x}")).collect::<String>()));
    }
    // RFC 7252 section 5.10.5: 60 s where nothing is said.
    let max_age = reply.max_age.unwrap_or(60);
    match reply.code {
        Code::CONTENT | Code::VALID => say(CACHE_CONTROL, format!("private, max-age={max_age}")),
        Code::SERVICE_UNAVAILABLE | Code::TOO_MANY_REQUESTS => say(RETRY_AFTER, max_age.to_string()),
        _ => {}
    }
    if reply.code == Code::CREATED && !reply.location.is_empty() {
        let path = reply.location.iter().map(|segment| percent_encode(segment, NON_ALPHANUMERIC).to_string());
        say(LOCATION, format!("/hc/{device}/{}", path.collect::<Vec<_>>().join("/")));
    }
    response
}

/// RFC 8075 section 7, table 2.
fn status(code: Code, is_empty: bool) -> StatusCode {
    match code {
        Code::CREATED => StatusCode::CREATED,
        Code::DELETED | Code::CHANGED if is_empty => StatusCode::NO_CONTENT,
        Code::DELETED | Code::CHANGED | Code::CONTENT => StatusCode::OK,
        Code::VALID => StatusCode::NOT_MODIFIED,
        // HTTP's 401 would ask for a credential that the device does not take.
        Code::UNAUTHORIZED | Code::FORBIDDEN => StatusCode::FORBIDDEN,
        Code::NOT_FOUND => StatusCode::NOT_FOUND,
        // A 405 would have to name the methods, which the device does not.
        Code::METHOD_NOT_ALLOWED => StatusCode::BAD_REQUEST,
        Code::NOT_ACCEPTABLE => StatusCode::NOT_ACCEPTABLE,
        Code::CONFLICT => StatusCode::CONFLICT,
        Code::PRECONDITION_FAILED => StatusCode::PRECONDITION_FAILED,
        Code::REQUEST_ENTITY_TOO_LARGE => StatusCode::PAYLOAD_TOO_LARGE,
        Code::UNSUPPORTED_CONTENT_FORMAT => StatusCode::UNSUPPORTED_MEDIA_TYPE,
        Code::UNPROCESSABLE_ENTITY => StatusCode::UNPROCESSABLE_ENTITY,
        Code::TOO_MANY_REQUESTS => StatusCode::TOO_MANY_REQUESTS,
        Code::INTERNAL_SERVER_ERROR => StatusCode::INTERNAL_SERVER_ERROR,
        Code::NOT_IMPLEMENTED => StatusCode::NOT_IMPLEMENTED,
        Code::SERVICE_UNAVAILABLE => StatusCode::SERVICE_UNAVAILABLE,
        Code::GATEWAY_TIMEOUT => StatusCode::GATEWAY_TIMEOUT,
        code if code.class() == 4 => StatusCode::BAD_REQUEST,
        _ => StatusCode::BAD_GATEWAY,
    }
}

/// What an option of 255 bytes takes; in a path nothing that could be taken for another one.
fn segment(text: &str, in_path: bool) -> Option<String> {
    let broken = text.match_indices('%').any(|(at, _)| {
        !text.get(at + 1..at + 3).is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
    });
    let decoded = percent_decode_str(text).decode_utf8().ok()?;
    let is_other_path = in_path && (decoded.contains(['/', '\0']) || decoded == "." || decoded == "..");
    (!broken && !is_other_path && decoded.len() <= 255).then(|| decoded.into_owned())
}

fn text<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Result<Option<&'h str>, StatusCode> {
    headers.get(name).map(|value| value.to_str().map_err(|_| StatusCode::BAD_REQUEST)).transpose()
}

/// Entity tags of a condition; `None` stands for `*`. One that no device has made matches nothing.
fn tags(headers: &HeaderMap, name: &HeaderName) -> Result<Vec<Option<Vec<u8>>>, StatusCode> {
    let Some(list) = text(headers, name)? else { return Ok(Vec::new()) };
    let mut tags = Vec::new();
    for tag in list.split(',').map(str::trim) {
        if tag == "*" {
            tags.push(None);
            continue;
        }
        let digits = tag.trim_start_matches("W/").trim_matches('"');
        match bytes_of(digits) {
            Some(bytes) => tags.push(Some(bytes)),
            None if *name == IF_MATCH => return Err(StatusCode::PRECONDITION_FAILED),
            None => {}
        }
    }
    if tags.len() > TAGS_MAX { Err(StatusCode::BAD_REQUEST) } else { Ok(tags) }
}

fn bytes_of(digits: &str) -> Option<Vec<u8>> {
    if digits.is_empty() || digits.len() > 16 || digits.len() % 2 == 1 || !digits.is_ascii() {
        return None;
    }
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok()).collect()
}

/// The one format that is asked for; none where anything will do.
fn accept(headers: &HeaderMap) -> Result<Option<u16>, StatusCode> {
    let Some(list) = text(headers, &ACCEPT)? else { return Ok(None) };
    let mut types = list.split(',').map(|range| range.split(';').next().unwrap_or_default().trim());
    if types.clone().any(|range| range.contains('*') || range.is_empty()) {
        return Ok(None);
    }
    types.find_map(content::format_of).map(Some).ok_or(StatusCode::NOT_ACCEPTABLE)
}

/// RFC 7252 section 5.10: each is an option.
const TAGS_MAX: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn call(
        method: Method,
        uri: &str,
        headers: &[(HeaderName, &str)],
        body: &'static [u8],
    ) -> Result<Call, StatusCode> {
        let mut request = http::Request::new(Bytes::from_static(body));
        *request.method_mut() = method;
        *request.uri_mut() = uri.parse().unwrap();
        for (name, value) in headers {
            request.headers_mut().insert(name, HeaderValue::from_str(value).unwrap());
        }
        to_coap(&request, Duration::from_secs(1))
    }

    #[test]
    fn a_request_is_mapped_as_rfc_8075_says() {
        let headers = [
            (CONTENT_TYPE, "application/json"),
            (ACCEPT, "text/html, application/cbor;q=0.5"),
            (IF_MATCH, "\"0aff\", *"),
        ];
        let put = call(Method::PUT, "/a/b%20c/?x=1&y%26", &headers, b"{}").unwrap();
        assert_eq!(
            (put.code, put.path, put.query),
            (Code::PUT, vec!["a".into(), "b c".into(), "".into()], vec!["x=1".to_owned(), "y&".to_owned()])
        );
        assert_eq!((put.content_format, put.accept, &put.payload[..]), (Some(50), Some(60), &b"{}"[..]));
        assert_eq!(put.if_match, [vec![0x0a, 0xff], vec![]]);
        let get = call(Method::GET, "/", &[(IF_NONE_MATCH, "\"01\", \"not ours\""), (ACCEPT, "*/*")], b"").unwrap();
        assert_eq!((get.etags, get.accept, get.path.len()), (vec![vec![1]], None, 0));
        assert!(call(Method::POST, "/", &[(IF_NONE_MATCH, "*")], b"").unwrap().if_none_match);
    }

    #[test]
    fn what_cannot_be_said_to_a_device_has_its_status() {
        for (method, uri, headers, status) in [
            (Method::OPTIONS, "/a", vec![], 501),
            (Method::GET, "/a%2fb", vec![], 400),
            (Method::GET, "/%2e%2e/b", vec![], 400),
            (Method::GET, "/%zz", vec![], 400),
            (Method::GET, "/%ff", vec![], 400),
            (Method::PUT, "/a", vec![(CONTENT_TYPE, "text/unknown")], 415),
            (Method::PUT, "/a", vec![(CONTENT_ENCODING, "gzip")], 415),
            (Method::GET, "/a", vec![(ACCEPT, "text/unknown")], 406),
            (Method::PUT, "/a", vec![(IF_MATCH, "\"not ours\"")], 412),
        ] {
            assert_eq!(call(method, uri, &headers, b"x").unwrap_err().as_u16(), status, "{uri} {headers:?}");
        }
        let long = format!("/{}", "x".repeat(256));
        assert_eq!(call(Method::GET, &long, &[], b"").unwrap_err(), StatusCode::BAD_REQUEST);
    }
}

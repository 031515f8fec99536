//! CoAP requests along `[[route]]`s to HTTP upstreams (RFC 7252 section 10.1; the codes by RFC 8075 section 7, read backwards).
//!
//! | CoAP | HTTP |
//! |---|---|
//! | GET, POST, PUT, DELETE | the same |
//! | PATCH, iPATCH | PATCH |
//! | Uri-Path, Uri-Query without `t=` | path and query, percent-encoded |
//! | Uri-Host | host, for the choice of the route |
//! | Content-Format, Accept | `Content-Type`, `Accept`, by the IANA table |
//! | If-None-Match, empty If-Match | `If-None-Match: *`, `If-Match: *` |
//! | ETag of 8 bytes | a hash of `ETag`; an answer that the asker has already is 2.03 |
//! | Max-Age | `Cache-Control: max-age`, `Retry-After` |
//!
//! Deliberately not here: FETCH, for which HTTP has no method, and observing what an upstream has.

use std::hash::{Hash, Hasher};

use bytes::Bytes;
use http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue, IF_MATCH, IF_NONE_MATCH};
use http::{Method, StatusCode};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use tidegate_coap::option::number;
use tidegate_coap::{Code, Request, content};

use super::answer::{Answer, Payload};
use crate::gateway::UpstreamFault;
use crate::gateway::cached::age_of;
use crate::listener::RelayFault;
use crate::message::Action;

/// A request on its way to HTTP.
pub struct Mapped {
    pub request: http::Request<Bytes>,
    pub host: Option<String>,
    /// What the answer has to know of the question.
    pub asked: Asked,
}

/// See [`Mapped::asked`].
pub struct Asked {
    code: Code,
    known_tags: Vec<[u8; 8]>,
}

impl Asked {
    pub fn of(request: &Request<'_>) -> Self {
        let known_tags = request.contents.all(number::ETAG).filter_map(|tag| tag.try_into().ok()).collect();
        Asked { code: request.code(), known_tags }
    }
}

/// The method under which routes and policy know a CoAP method.
pub fn method(code: Code) -> Option<(Method, Action)> {
    Some(match code {
        Code::GET => (Method::GET, Action::Get),
        Code::POST => (Method::POST, Action::Post),
        Code::PUT => (Method::PUT, Action::Put),
        Code::DELETE => (Method::DELETE, Action::Delete),
        Code::PATCH | Code::IPATCH => (Method::PATCH, Action::Patch),
        _ => return None,
    })
}

/// The path and query of a request as HTTP writes them.
pub fn target(request: &Request<'_>) -> String {
    let mut target = String::with_capacity(64);
    if request.path.is_empty() {
        target.push('/');
    }
    for segment in request.path.segments() {
        target.push('/');
        target.extend(utf8_percent_encode(segment, IN_PATH));
    }
    let mut separator = '?';
    for (name, value) in request.query().pairs().filter(|(name, _)| *name != "t") {
        target.push(separator);
        separator = '&';
        target.extend(utf8_percent_encode(name, IN_NAME));
        if !value.is_empty() {
            target.push('=');
            target.extend(utf8_percent_encode(value, IN_VALUE));
        }
    }
    target
}

/// What is percent-encoded in a path segment (RFC 3986 section 3.3), and in the name and the value of a query parameter (section 3.4).
const IN_PATH: &AsciiSet = &IN_VALUE.remove(b'+').remove(b'&').add(b'/').add(b'?');
const IN_NAME: &AsciiSet = &IN_VALUE.add(b'=');
const IN_VALUE: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b'!')
    .remove(b'$')
    .remove(b'\'')
    .remove(b'(')
    .remove(b')')
    .remove(b'*')
    .remove(b',')
    .remove(b';')
    .remove(b':')
    .remove(b'@')
    .remove(b'/')
    .remove(b'?')
    .remove(b'=');

/// RFC 8768: counts this hop. A request that may make no more is answered 5.08; 0 is no count of hops.
///
/// # Errors
/// The answer.
pub fn check_hops(request: &Request<'_>) -> Result<(), Answer> {
    match request.contents.first(number::HOP_LIMIT) {
        None | Some([2..=u8::MAX]) => Ok(()),
        Some([1]) => Err(Answer::new(Code::HOP_LIMIT_REACHED)),
        Some(_) => Err(Answer::new(Code::BAD_REQUEST)),
    }
}

/// Maps a request; `target` is its [`target`].
///
/// # Errors
/// The answer that says what HTTP cannot express.
pub fn to_http(request: &Request<'_>, target: &str) -> Result<Mapped, Answer> {
    let (method, _) = method(request.code()).ok_or(Answer::new(Code::NOT_IMPLEMENTED))?;
    let mut headers = HeaderMap::new();
    if let Some(format) = request.content_format() {
        let media_type = content::media_type(format).ok_or(Answer::new(Code::UNSUPPORTED_CONTENT_FORMAT))?;
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    }
    if let Some(format) = request.contents.accept() {
        let media_type = content::media_type(format).ok_or(Answer::new(Code::NOT_ACCEPTABLE))?;
        headers.insert(ACCEPT, HeaderValue::from_static(media_type));
    }
    if request.contents.first(number::IF_NONE_MATCH).is_some() {
        headers.insert(IF_NONE_MATCH, HeaderValue::from_static("*"));
    }
    for tag in request.contents.all(number::IF_MATCH) {
        if !tag.is_empty() {
            // The upstream's own tag is not known from ours.
            return Err(Answer::new(Code::NOT_IMPLEMENTED));
        }
        headers.insert(IF_MATCH, HeaderValue::from_static("*"));
    }
    let body = Bytes::copy_from_slice(&request.payload);
    let mut mapped = http::Request::new(body);
    *mapped.method_mut() = method;
    *mapped.uri_mut() = target.parse().map_err(|_| Answer::new(Code::BAD_REQUEST))?;
    *mapped.headers_mut() = headers;
    let host = request.contents.uri_host().map(str::to_owned);
    Ok(Mapped { request: mapped, host, asked: Asked::of(request) })
}

/// What came back, as CoAP.
pub fn from_http(asked: &Asked, outcome: Result<http::Response<Bytes>, RelayFault>, known: bool) -> Answer {
    let response = match outcome {
        Ok(response) => response,
        Err(RelayFault::Reject(reject)) => return Answer::refusal(&reject, known),
        Err(RelayFault::AnswerTooLarge) => {
            return Answer { payload: Payload::Static("answer too large"), ..Answer::new(Code::BAD_GATEWAY) };
        }
        Err(RelayFault::Upstream(fault)) => return Answer::new(fault_code(fault)),
    };
    let (parts, body) = response.into_parts();
    let mut answer = Answer::new(code(asked.code, parts.status));
    answer.max_age = max_age(&parts.headers);
    if answer.code.class() == 4 || answer.code.class() == 5 {
        // Only text is a diagnostic (RFC 7252 section 5.5.2); everything else says what it is.
        let format = format(&parts.headers);
        if format.is_some_and(|format| format != content::TEXT_PLAIN) {
            answer.content_format = format;
        }
        if answer.content_format.is_some() || std::str::from_utf8(&body).is_ok() {
            answer.payload = Payload::Bytes(body);
        }
        return answer;
    }
    answer.etag = parts.headers.get(ETAG).map(|tag| hash(tag.as_bytes()));
    if asked.code == Code::GET && answer.etag.is_some_and(|tag| asked.known_tags.contains(&tag)) {
        answer.code = Code::VALID;
        return answer;
    }
    answer.content_format = format(&parts.headers).filter(|_| !body.is_empty());
    answer.payload = Payload::Bytes(body);
    answer
}

fn format(headers: &HeaderMap) -> Option<u16> {
    headers.get(CONTENT_TYPE)?.to_str().ok().and_then(content::format_of)
}

fn hash(tag: &[u8]) -> [u8; 8] {
    let mut hasher = std::hash::DefaultHasher::new();
    tag.hash(&mut hasher);
    hasher.finish().to_be_bytes()
}

/// How long the answer is fresh; an error's, when to come back.
fn max_age(headers: &HeaderMap) -> Option<u32> {
    if let Some(after) = headers.get(http::header::RETRY_AFTER) {
        return after.to_str().ok()?.trim().parse().ok();
    }
    let mut directives = headers
        .get_all(CACHE_CONTROL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim);
    directives
        .find_map(|directive| {
            if directive.eq_ignore_ascii_case("no-cache") || directive.eq_ignore_ascii_case("no-store") {
                return Some(0);
            }
            let (name, value) = directive.split_once('=')?;
            if name.eq_ignore_ascii_case("max-age") { value.trim_matches('"').parse().ok() } else { None }
        })
        // What a cache has kept has used up a part of it.
        .map(|max_age: u32| max_age.saturating_sub(age_of(headers).as_secs().try_into().unwrap_or(u32::MAX)))
}

/// RFC 8075 section 7, table 2, read backwards. A status without a code of its own falls to the first of its class; a redirection is nothing that CoAP could
/// follow, so it is a gateway's failure.
fn code(asked: Code, status: StatusCode) -> Code {
    let done = match asked {
        Code::GET => Code::CONTENT,
        Code::DELETE => Code::DELETED,
        _ => Code::CHANGED,
    };
    match status.as_u16() {
        201 if asked != Code::GET => Code::CREATED,
        200..=299 => done,
        304 => Code::VALID,
        401 => Code::UNAUTHORIZED,
        403 => Code::FORBIDDEN,
        404 | 410 => Code::NOT_FOUND,
        405 => Code::METHOD_NOT_ALLOWED,
        406 => Code::NOT_ACCEPTABLE,
        408 | 504 => Code::GATEWAY_TIMEOUT,
        409 => Code::CONFLICT,
        412 => Code::PRECONDITION_FAILED,
        413 => Code::REQUEST_ENTITY_TOO_LARGE,
        415 => Code::UNSUPPORTED_CONTENT_FORMAT,
        422 => Code::UNPROCESSABLE_ENTITY,
        429 => Code::TOO_MANY_REQUESTS,
        400..=499 => Code::BAD_REQUEST,
        501 => Code::NOT_IMPLEMENTED,
        502 => Code::BAD_GATEWAY,
        503 => Code::SERVICE_UNAVAILABLE,
        500..=599 => Code::INTERNAL_SERVER_ERROR,
        _ => Code::BAD_GATEWAY,
    }
}

const fn fault_code(fault: UpstreamFault) -> Code {
    match fault {
        UpstreamFault::Unreachable => Code::BAD_GATEWAY,
        UpstreamFault::Unavailable => Code::SERVICE_UNAVAILABLE,
        UpstreamFault::Timeout => Code::GATEWAY_TIMEOUT,
        UpstreamFault::RequestBody => Code::BAD_REQUEST,
    }
}

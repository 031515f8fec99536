//! Who asks, and the exchanges by which a device gets its token.

use std::sync::Arc;
use std::time::Instant;

use http::header::{AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderValue, PRAGMA};
use http::{Response, StatusCode};

use super::body::Body;
use super::call::Call;
use super::problem::{Refused, status};
use crate::gateway::{Channel, Gateway, Now, PublicKey};
use crate::listener::ConnectionInfo;
use crate::message::{Device, Protocol, Reject};
use crate::telemetry::meters;

/// A request for a token is smaller: an assertion is at most 4096 bytes.
pub const BODY_BYTES_MAX: usize = 16 * 1024;

/// The device behind a request: by its bearer token, or else by the certificate of its connection. `None`: it shows nothing.
///
/// # Errors
/// [`Reject::Unauthenticated`] for a credential that does not hold; what is shown has to be right even where nothing need be shown.
pub fn identify(gateway: &Gateway, conn: &ConnectionInfo, headers: &HeaderMap) -> Result<Option<Arc<Device>>, Reject> {
    let mut shown = headers.get_all(AUTHORIZATION).iter();
    match (shown.next(), shown.next()) {
        (None, _) => {
            let key = conn.tls.as_ref().and_then(|tls| tls.client_key);
            Ok(key.and_then(|key| gateway.identity.by_public_key(&PublicKey::register(key).ok()?, Now::read())))
        }
        (Some(authorization), None) => {
            let token = bearer(authorization).ok_or(Reject::Unauthenticated)?;
            gateway.identity.verify_token(token, Protocol::Http, Now::read()).map(Some)
        }
        (Some(_), Some(_)) => Err(Reject::Unauthenticated),
    }
}

/// RFC 6750 section 2.1; the scheme without case (RFC 9110 section 11.1).
pub fn bearer(value: &HeaderValue) -> Option<&[u8]> {
    let (scheme, token) = value.as_bytes().split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
}

/// Answers one of the token calls.
pub fn exchange(gateway: &Gateway, conn: &ConnectionInfo, call: &Call, body: &[u8]) -> Response<Body> {
    let now = Now::read();
    let answer = gateway.admit_login(conn.peer.ip(), Instant::now()).and_then(|()| match call {
        Call::Challenge => gateway.identity.http_challenge(body, now),
        Call::Session => {
            let exporter = conn.tls.as_ref().map(|tls| tls.exporter);
            let channel = Channel { tls_exporter: exporter, ..Channel::default() };
            gateway.identity.http_session(body, &channel, now)
        }
        _ => Err(Reject::NotFound),
    });
    match answer {
        Ok(json) => token_response(StatusCode::OK, json),
        Err(reject) => {
            meters().http.reject(&reject);
            Refused::Reject(reject).response(false)
        }
    }
}

/// `POST /oauth2/token`; its refusals have the form of RFC 6749 section 5.2.
pub fn oauth(gateway: &Gateway, conn: &ConnectionInfo, body: &[u8]) -> Response<Body> {
    if let Err(reject) = gateway.admit_login(conn.peer.ip(), Instant::now()) {
        meters().http.reject(&reject);
        return Refused::Reject(reject).response(false);
    }
    match gateway.identity.oauth_token(body, Now::read()) {
        Ok(json) => token_response(StatusCode::OK, json),
        Err(error) => {
            meters().http.reject(&error.reject);
            let mut response = Refused::Reject(error.reject.clone()).response(false);
            let body = error.body();
            *response.body_mut() = Body::from(body);
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(CONTENT_TYPE, json);
            *response.status_mut() = status(&error.reject);
            not_to_be_stored(response.headers_mut());
            response
        }
    }
}

fn token_response(status: StatusCode, json: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Body::from(json));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    not_to_be_stored(headers);
    response
}

/// RFC 6749 section 5.1.
fn not_to_be_stored(headers: &mut HeaderMap) {
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(PRAGMA, HeaderValue::from_static("no-cache"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bearer_token_is_found_whatever_the_case_of_its_scheme() {
        let value = |text: &'static str| HeaderValue::from_static(text);
        assert_eq!(bearer(&value("Bearer abc")), Some(&b"abc"[..]));
        assert_eq!(bearer(&value("bearer  abc ")), Some(&b"abc"[..]));
        for bad in ["Basic abc", "Bearer", "", "Bearerabc x"] {
            assert_eq!(bearer(&value(bad)), None, "{bad}");
        }
    }
}

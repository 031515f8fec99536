//! MQTT over WebSocket: the opening handshake (RFC 6455 section 4.2), after which the stream is not HTTP's any more.

use http::header::{
    CONNECTION, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::body::Body;

/// The stream after the handshake; what the client sent early is read first.
pub type Upgraded = TokioIo<hyper::upgrade::Upgraded>;

/// A handshake that has been answered, until hyper lets go of the stream.
#[derive(Debug, Default)]
pub struct Upgrade {
    pending: Mutex<Option<OnUpgrade>>,
}

/// Whether a request asks to become a WebSocket.
pub fn is_websocket<B>(request: &Request<B>) -> bool {
    request.version() == Version::HTTP_11
        && request.method() == Method::GET
        && has_token(request.headers(), &UPGRADE, "websocket")
        && has_token(request.headers(), &CONNECTION, "upgrade")
}

impl Upgrade {
    /// Answers the handshake. `None` if it is not one for MQTT ([MQTT-6.0.0-3]: the subprotocol is `mqtt`).
    pub fn begin(&self, mut request: Request<Incoming>) -> Option<Response<Body>> {
        let headers = request.headers();
        if !has_token(headers, &SEC_WEBSOCKET_PROTOCOL, "mqtt") {
            return None;
        }
        if headers.get(SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
            let mut response = Response::new(Body::Empty);
            *response.status_mut() = StatusCode::UPGRADE_REQUIRED;
            response.headers_mut().insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
            return Some(response);
        }
        let accept = derive_accept_key(headers.get(SEC_WEBSOCKET_KEY)?.as_bytes());
        let mut response = Response::new(Body::Empty);
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let answer = response.headers_mut();
        answer.insert(UPGRADE, HeaderValue::from_static("websocket"));
        answer.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        answer.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("mqtt"));
        answer.insert(SEC_WEBSOCKET_ACCEPT, HeaderValue::try_from(accept).ok()?);
        *self.pending.lock() = Some(hyper::upgrade::on(&mut request));
        Some(response)
    }

    /// The stream, if there was a handshake and its answer went out. To be called after the HTTP connection has ended.
    pub async fn finish(&self) -> Option<Upgraded> {
        let pending = self.pending.lock().take()?;
        pending.await.ok().map(TokioIo::new)
    }
}

/// Whether a comma-separated header has `token`, without case.
fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|item| item.trim().eq_ignore_ascii_case(token))
}

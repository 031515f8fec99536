//! Fetches the keys of an identity provider (JWK Set, RFC 7517) like any other request: health, retries, TLS and limits of its upstream hold.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::ACCEPT;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use tokio::time::timeout_at;

use super::{Answer, Proxy, ProxyBody};

/// For head and body together.
const FETCH_WITHIN: Duration = Duration::from_secs(10);

/// The answer to a GET of `path`, whole and at most `bytes_max` large.
///
/// # Errors
/// Why there is none, as a clause.
pub async fn fetch(proxy: &Proxy, to: &str, path: &str, bytes_max: usize) -> Result<Bytes, String> {
    let deadline = Instant::now() + FETCH_WITHIN;
    let body = ProxyBody::new(Empty::new().map_err(|never| match never {}));
    let request = Request::get(path).header(ACCEPT, "application/jwk-set+json, application/json").body(body);
    let request = request.map_err(|error| error.to_string())?;
    let whole = async {
        let asked = proxy.exchange(to, 0, request, deadline).await;
        let Answer { response, .. } = asked.map_err(|fault| format!("no answer: {fault:?}"))?;
        if response.status() != StatusCode::OK {
            return Err(format!("status {}", response.status().as_u16()));
        }
        let (mut body, mut set) = (response.into_body(), BytesMut::new());
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(|error| error.to_string())?.into_data() else { continue };
            if set.len() + data.len() > bytes_max {
                return Err(format!("more than {bytes_max} bytes"));
            }
            set.extend_from_slice(&data);
        }
        Ok(set.freeze())
    };
    timeout_at(deadline.into(), whole).await.unwrap_or_else(|_| Err("no whole answer in time".into()))
}

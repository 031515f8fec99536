//! Refusals as HTTP answers: `application/problem+json` (RFC 9457), one arm per [`Reject`].
//!
//! A known device is told the rule or limit that decided. A stranger is told no.

use std::time::Duration;

use http::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{Response, StatusCode};
use serde_json::{Map, Value};

use super::body::Body;
use super::call::NoCall;
use crate::gateway::UpstreamFault;
use crate::message::Reject;

/// Why a request was refused, beyond what every protocol shares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    Reject(Reject),
    /// The resource has other methods.
    Method(&'static str),
    /// The body did not come within `body_timeout_ms`.
    BodyTimeout,
    /// The body ended early, or its framing is broken: the connection is lost.
    BodyBroken,
    /// The outcome is not known: the commit, or a slow subscriber, took longer than `write_timeout_ms`.
    NoOutcome,
    /// Nothing of ours and no route.
    NoRoute,
    /// The listener speaks WebSocket only.
    UpgradeRequired,
    /// A method that the gateway does not pass on.
    NotImplemented,
    /// The request has been here before: an upstream leads back to the gateway.
    Loop,
    /// The request has something that cannot be said to a CoAP device.
    Unmappable(StatusCode),
    /// A route wants a token of an identity provider, and this is none of its (RFC 6750 section 3.1).
    Token,
    /// The request plane's other side failed.
    Upstream(UpstreamFault),
}

impl From<Reject> for Refused {
    fn from(reject: Reject) -> Self {
        Refused::Reject(reject)
    }
}

impl From<NoCall> for Refused {
    fn from(no_call: NoCall) -> Self {
        match no_call {
            NoCall::Malformed(what) => Refused::Reject(Reject::Malformed { what }),
            NoCall::Method(allowed) => Refused::Method(allowed),
        }
    }
}

impl Refused {
    pub fn status(&self) -> StatusCode {
        match self {
            Refused::Reject(reject) => status(reject),
            Refused::Method(_) => StatusCode::METHOD_NOT_ALLOWED,
            Refused::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            Refused::BodyBroken => StatusCode::BAD_REQUEST,
            Refused::NoOutcome => StatusCode::SERVICE_UNAVAILABLE,
            Refused::NoRoute => StatusCode::NOT_FOUND,
            Refused::UpgradeRequired => StatusCode::UPGRADE_REQUIRED,
            Refused::NotImplemented => StatusCode::NOT_IMPLEMENTED,
            Refused::Token => StatusCode::UNAUTHORIZED,
            Refused::Loop => StatusCode::LOOP_DETECTED,
            Refused::Unmappable(status) => *status,
            Refused::Upstream(UpstreamFault::Unreachable) => StatusCode::BAD_GATEWAY,
            Refused::Upstream(UpstreamFault::Unavailable) => StatusCode::SERVICE_UNAVAILABLE,
            Refused::Upstream(UpstreamFault::Timeout) => StatusCode::GATEWAY_TIMEOUT,
            Refused::Upstream(UpstreamFault::RequestBody) => StatusCode::BAD_REQUEST,
        }
    }

    /// The answer. `known`: the caller has proved who it is, and may learn why.
    pub fn response(&self, known: bool) -> Response<Body> {
        let status = self.status();
        let mut problem = Map::new();
        problem.insert("type".into(), "about:blank".into());
        problem.insert("title".into(), status.canonical_reason().unwrap_or("Refused").into());
        problem.insert("status".into(), status.as_u16().into());
        if let (true, Refused::Reject(reject)) = (known, self) {
            problem.insert("detail".into(), reject.to_string().into());
            problem.insert("reason".into(), reject.reason().into());
            if let Some((name, value)) = decided_by(reject) {
                problem.insert(name.into(), value);
            }
        }
        let body = Value::Object(problem).to_string();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        match self {
            Refused::Reject(Reject::Unauthenticated) => {
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"tidegate\""));
            }
            Refused::Token => {
                let says = "Bearer realm=\"tidegate\", error=\"invalid_token\"";
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static(says));
            }
            Refused::Reject(Reject::TooFast { retry_after, .. } | Reject::Full { retry_after, .. }) => {
                headers.insert(RETRY_AFTER, whole_seconds(*retry_after));
            }
            Refused::Reject(Reject::ShuttingDown) => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Refused::NoOutcome | Refused::Upstream(UpstreamFault::Unavailable) => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            Refused::Method(allowed) => {
                headers.insert(ALLOW, HeaderValue::from_static(allowed));
            }
            Refused::BodyTimeout | Refused::BodyBroken | Refused::Upstream(UpstreamFault::RequestBody) => {
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Refused::UpgradeRequired => {
                headers.insert(http::header::UPGRADE, HeaderValue::from_static("websocket"));
                headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
            }
            Refused::Reject(
                Reject::Forbidden { .. } | Reject::TooLarge { .. } | Reject::Malformed { .. } | Reject::NotFound,
            )
            | Refused::NoRoute
            | Refused::NotImplemented
            | Refused::Loop
            | Refused::Unmappable(_)
            | Refused::Upstream(UpstreamFault::Unreachable | UpstreamFault::Timeout) => {}
        }
        response
    }
}

/// The table of the wire contract.
pub fn status(reject: &Reject) -> StatusCode {
    match reject {
        Reject::Unauthenticated => StatusCode::UNAUTHORIZED,
        Reject::Forbidden { .. } => StatusCode::FORBIDDEN,
        Reject::TooFast { .. } => StatusCode::TOO_MANY_REQUESTS,
        Reject::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
        Reject::Full { .. } | Reject::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
        Reject::Malformed { .. } => StatusCode::BAD_REQUEST,
        Reject::NotFound => StatusCode::NOT_FOUND,
    }
}

fn decided_by(reject: &Reject) -> Option<(&'static str, Value)> {
    match reject {
        Reject::Forbidden { rule } => Some(("rule", rule.as_deref().map_or(Value::Null, Value::from))),
        Reject::TooFast { limit, .. } | Reject::TooLarge { limit, .. } | Reject::Full { limit, .. } => {
            Some(("limit", (*limit).into()))
        }
        Reject::Unauthenticated | Reject::Malformed { .. } | Reject::NotFound | Reject::ShuttingDown => None,
    }
}

/// RFC 9110 section 10.2.3: whole seconds, and never "now".
fn whole_seconds(after: Duration) -> HeaderValue {
    HeaderValue::from(u64::try_from(after.as_millis().div_ceil(1000)).unwrap_or(u64::MAX).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(response: Response<Body>) -> Value {
        assert_eq!(response.headers()[CONTENT_TYPE], "application/problem+json");
        let Body::Full(bytes) = response.into_body() else { panic!("not a whole body") };
        serde_json::from_slice(&bytes).unwrap()
    }

    #[test]
    fn every_reject_has_the_status_of_the_contract() {
        let second = Duration::from_secs(1);
        let cases = [
            (Reject::Unauthenticated, 401),
            (Reject::Forbidden { rule: None }, 403),
            (Reject::TooFast { limit: "x", retry_after: second }, 429),
            (Reject::TooLarge { limit: "x", bytes_max: 1 }, 413),
            (Reject::Full { limit: "x", retry_after: second }, 503),
            (Reject::Malformed { what: "x" }, 400),
            (Reject::NotFound, 404),
            (Reject::ShuttingDown, 503),
        ];
        for (reject, expected) in cases {
            let response = Refused::Reject(reject.clone()).response(true);
            assert_eq!(response.status().as_u16(), expected);
            let wants_retry = matches!(expected, 429 | 503);
            assert_eq!(response.headers().contains_key(RETRY_AFTER), wants_retry, "{reject}");
            assert_eq!(response.headers().contains_key(WWW_AUTHENTICATE), expected == 401);
            assert_eq!(json(response)["reason"], reject.reason());
        }
    }

    #[test]
    fn a_known_device_learns_the_rule_and_a_stranger_nothing() {
        let refused = Refused::Reject(Reject::Forbidden { rule: Some("no nights".into()) });
        assert_eq!(json(refused.response(true))["rule"], "no nights");
        let to_stranger = refused.response(false);
        assert_eq!(json(to_stranger).as_object().unwrap().keys().collect::<Vec<_>>(), ["status", "title", "type"]);
    }

    #[test]
    fn waiting_is_told_in_whole_seconds_rounded_up() {
        for (millis, expected) in [(0, "1"), (1, "1"), (1000, "1"), (1001, "2"), (59_999, "60")] {
            assert_eq!(whole_seconds(Duration::from_millis(millis)), expected);
        }
    }
}

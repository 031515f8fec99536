//! What a client gets of a kept answer, with `Age` and `Cache-Status` (RFC 9211).

use std::sync::Arc;

use http::header::{AGE, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use http_body_util::{BodyExt, Full};

use super::asked::Asked;
use super::{CacheOutcome, empty};
use crate::cache::response::{Entry, is_known};
use crate::gateway::ProxyBody;
use crate::telemetry::meters;

/// A kept answer for whoever has `asked`. `status` is the upstream's, where it has been asked.
pub(super) fn give(
    entry: &Arc<Entry>,
    asked: &Asked,
    now_ms: u64,
    outcome: CacheOutcome,
    status: Option<StatusCode>,
) -> Response<ProxyBody> {
    let age = entry.age(now_ms);
    let known = entry.status == StatusCode::OK && is_known(&asked.tags, asked.since.as_ref(), &entry.headers);
    let body = match known || asked.is_head || entry.body.is_empty() {
        true => empty(),
        false => ProxyBody::new(Full::new(entry.body.clone()).map_err(|never| match never {})),
    };
    let mut response = Response::new(body);
    *response.status_mut() = if known { StatusCode::NOT_MODIFIED } else { entry.status };
    let headers = response.headers_mut();
    headers.clone_from(&entry.headers);
    headers.insert(AGE, HeaderValue::from(age.as_secs()));
    if known {
        headers.remove(CONTENT_TYPE);
        headers.remove(CONTENT_ENCODING);
    } else if entry.status != StatusCode::NO_CONTENT {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(entry.body.len()));
    }
    let fresh = i64::try_from(entry.terms.fresh.as_secs()).unwrap_or(i64::MAX);
    let ttl = fresh.saturating_sub(i64::try_from(age.as_secs()).unwrap_or(i64::MAX));
    let upstream = status.map(|status| format!(";fwd=stale;fwd-status={}", status.as_u16())).unwrap_or_default();
    let said = match outcome {
        CacheOutcome::Hit | CacheOutcome::Stale => format!("hit;ttl={ttl}{upstream}"),
        CacheOutcome::Shared => format!("fwd=miss;collapsed;ttl={ttl}"),
        CacheOutcome::Revalidated => format!("fwd=stale;fwd-status=304;ttl={ttl}"),
        CacheOutcome::Miss | CacheOutcome::Bypass => format!("fwd=miss;stored;ttl={ttl}"),
    };
    mark(&mut response, outcome, &said);
    response
}

/// Says and counts how the cache took part.
pub(super) fn mark(response: &mut Response<ProxyBody>, outcome: CacheOutcome, said: &str) {
    meters().cache(outcome.as_str());
    response.extensions_mut().insert(outcome);
    if let Ok(value) = HeaderValue::try_from(format!("tidegate;{said}")) {
        // After what caches nearer to the origin have said.
        response.headers_mut().append(CACHE_STATUS, value);
    }
}

pub(super) const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

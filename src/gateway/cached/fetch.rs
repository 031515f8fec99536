//! Asking the upstream, and keeping what it says.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::{
    AGE, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderName, IF_MODIFIED_SINCE,
    IF_NONE_MATCH, LAST_MODIFIED, TE, TRAILER,
};
use http::{HeaderMap, Request, Response, StatusCode};
use hyper::body::Body as _;
use tidegate_http::hop_by_hop;

use super::answer::{CACHE_STATUS, give, mark};
use super::asked::Asked;
use super::flight::{Landed, Lead};
use super::tee::Tee;
use super::{Answer, CacheOutcome, Cached, Draft, Fetch, clock, empty};
use crate::cache::response::{Audience, Entry, age_of, is_about};
use crate::gateway::{ProxyBody, UpstreamFault};

/// What is there already when the upstream is asked.
#[derive(Clone, Default)]
pub(super) struct There {
    /// To be compared with.
    pub found: Option<Arc<Entry>>,
    /// To be given if the upstream fails.
    pub fallback: Option<Arc<Entry>>,
}

/// When the upstream was asked.
#[derive(Clone, Copy)]
struct Began {
    at: Instant,
    /// The count of invalidations.
    seq: u64,
}

impl Cached {
    pub(super) async fn fetch(self: &Arc<Self>, fetch: &Fetch, there: There, lead: Option<Lead>) -> Answer {
        let asked = &fetch.asked;
        let began = Began { at: clock(), seq: self.memory.seq() };
        let mut head = fetch.head.clone();
        let mut validated = false;
        match &there.found {
            Some(entry) => {
                for (kept, name) in [(ETAG, IF_NONE_MATCH), (LAST_MODIFIED, IF_MODIFIED_SINCE)] {
                    if let Some(value) = entry.headers.get(kept) {
                        head.headers.insert(name, value.clone());
                        validated = true;
                    }
                }
            }
            // What is hardly going to be kept may as well be the 304 that the client hopes for.
            None if lead.is_none() && self.is_alone(asked.shared, self.now_ms()) => put_back(&mut head.headers, asked),
            None => {}
        }
        let ask = |head| {
            let request = Request::from_parts(head, empty());
            fetch.exchange.exchange(&fetch.to, fetch.balancing, request, fetch.deadline)
        };
        let mut answered = ask(head).await;
        if let (Ok(response), Some(entry), true) = (&answered, &there.found, validated)
            && response.status() == StatusCode::NOT_MODIFIED
        {
            if is_about(&entry.headers, response.headers()) {
                let refreshed = self.refresh(fetch, entry, response.headers(), began);
                if let Some(lead) = lead {
                    lead.land(refreshed.clone().map_or(Landed::NotKept, Landed::Kept));
                }
                let entry = refreshed.as_ref().unwrap_or(entry);
                return Ok(give(entry, asked, self.now_ms(), CacheOutcome::Revalidated, None));
            }
            // It is about something that is not here.
            answered = ask(fetch.head.clone()).await;
        }
        match answered {
            Err(fault) => {
                if let Some(lead) = lead {
                    lead.land(Landed::Failed(fault));
                }
                self.fall_back(fetch, there.fallback, None).ok_or(fault)
            }
            Ok(response) if is_trouble(response.status()) && there.fallback.is_some() => {
                if let Some(lead) = lead {
                    lead.land(Landed::Failed(UpstreamFault::Unavailable));
                }
                self.fall_back(fetch, there.fallback, Some(response.status())).ok_or(UpstreamFault::Unavailable)
            }
            Ok(response) => self.pass(fetch, response, there, began, lead).await,
        }
    }

    /// A stale answer instead of an error, and for a while without asking.
    fn fall_back(
        &self,
        fetch: &Fetch,
        stale: Option<Arc<Entry>>,
        status: Option<StatusCode>,
    ) -> Option<Response<ProxyBody>> {
        let stale = stale?;
        let now_ms = self.now_ms();
        stale.rest(now_ms.saturating_add(u64::try_from(fetch.rule.stale_retry.as_millis()).unwrap_or(u64::MAX)));
        Some(give(&stale, &fetch.asked, now_ms, CacheOutcome::Stale, status))
    }

    /// RFC 9111 section 4.3.4: what is kept, with what the 304 says. `None`: it is no longer to be kept.
    fn refresh(&self, fetch: &Fetch, old: &Entry, said: &HeaderMap, began: Began) -> Option<Arc<Entry>> {
        let mut headers = old.headers.clone();
        let said = storable(said.clone());
        for name in said.keys().filter(|name| !OF_THE_BODY.contains(name)) {
            headers.remove(name);
            for value in said.get_all(name) {
                headers.append(name.clone(), value.clone());
            }
        }
        let asked = &fetch.asked;
        let known = asked.own.is_some();
        let terms = fetch.rule.terms(&asked.conditions_of_keeping, known, old.status, &headers);
        let Some((terms, audience)) = terms else {
            self.forget(asked);
            return None;
        };
        let key = asked.key(audience)?;
        if key != old.key {
            self.forget(asked);
        }
        let (age, at_ms) = self.age(said.get(AGE).map_or(Duration::ZERO, |_| age_of(&said)), began);
        let draft = Draft { key, url: old.url.clone(), status: old.status, headers, terms, age, at_ms, seq: began.seq };
        Some(self.keep(draft, old.body.clone()))
    }

    /// An answer with a body: kept on its way, if that is allowed.
    async fn pass(
        self: &Arc<Self>,
        fetch: &Fetch,
        mut response: Response<ProxyBody>,
        there: There,
        began: Began,
        lead: Option<Lead>,
    ) -> Answer {
        let asked = &fetch.asked;
        let fwd = if there.found.is_some() { "stale" } else { "miss" };
        let status = response.status();
        let known = asked.own.is_some();
        let terms = fetch.rule.terms(&asked.conditions_of_keeping, known, status, response.headers());
        let hint = response.body().size_hint();
        let too_large = hint.lower() > fetch.rule.entry_bytes_max;
        let keep = terms.filter(|_| !too_large).and_then(|(terms, audience)| Some((terms, asked.key(audience)?)));
        let Some((terms, key)) = keep else {
            if !status.is_server_error() && status != StatusCode::NOT_MODIFIED {
                self.forget(asked);
            }
            self.leave_alone(asked.shared);
            if let Some(lead) = lead {
                lead.land(Landed::NotKept);
            }
            mark(&mut response, CacheOutcome::Miss, &format!("fwd={fwd};fwd-status={}", status.as_u16()));
            return Ok(response);
        };
        if key != asked.shared {
            // Others who ask now are others' devices: they gain nothing by waiting.
            self.leave_alone(asked.shared);
        }
        let (parts, body) = response.into_parts();
        let (age, at_ms) = self.age(age_of(&parts.headers), began);
        let headers = storable(parts.headers.clone());
        let url = asked.url.clone();
        let draft = Draft { key, url, status, headers, terms, age, at_ms, seq: began.seq };
        let mut tee = Tee::new(body, self.clone(), draft, fetch.rule.entry_bytes_max, lead);
        if hint.exact().is_some() {
            // Read at once: who waits for it does not wait for this client, and what breaks off is no half answer.
            match tee.fill(fetch.deadline.into()).await {
                Ok(Some(entry)) => {
                    let mut whole = give(&entry, asked, self.now_ms(), CacheOutcome::Miss, None);
                    whole.extensions_mut().extend(parts.extensions);
                    whole.extensions_mut().insert(CacheOutcome::Miss);
                    return Ok(whole);
                }
                Ok(None) => {}
                Err(_) => {
                    drop(tee);
                    let fault = UpstreamFault::Unreachable;
                    return self.fall_back(fetch, there.fallback, None).ok_or(fault);
                }
            }
        }
        let mut response = Response::from_parts(parts, ProxyBody::new(tee));
        mark(&mut response, CacheOutcome::Miss, &format!("fwd={fwd};fwd-status={};stored", status.as_u16()));
        Ok(response)
    }

    /// How old an answer is now (RFC 9111 section 4.2.3): what it says, and how long it took to come. `Date` is not believed: an edge box may have no clock.
    fn age(&self, said: Duration, began: Began) -> (Duration, u64) {
        (said.saturating_add(clock().saturating_duration_since(began.at)), self.now_ms())
    }
}

impl Asked {
    fn key(&self, audience: Audience) -> Option<crate::cache::response::Key> {
        match audience {
            Audience::All => Some(self.shared),
            Audience::Asker => self.own,
        }
    }
}

/// The client's own conditions, for an upstream whose answer is going to the client alone.
pub(super) fn put_back(headers: &mut HeaderMap, asked: &Asked) {
    for tag in &asked.tags {
        headers.append(IF_NONE_MATCH, tag.clone());
    }
    if let Some(since) = &asked.since {
        headers.insert(IF_MODIFIED_SINCE, since.clone());
    }
}

/// RFC 5861 section 4: what a stale answer is better than.
pub(super) fn is_trouble(status: StatusCode) -> bool {
    matches!(status.as_u16(), 500 | 502 | 503 | 504)
}

/// RFC 9111 section 3.1: without what is for one connection, or for one request.
fn storable(mut headers: HeaderMap) -> HeaderMap {
    let named: Vec<String> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(hop_by_hop::connection_options)
        .collect();
    for name in hop_by_hop::NAMES.into_iter().chain(named.iter().map(String::as_str)) {
        headers.remove(name);
    }
    for name in &NOT_KEPT {
        headers.remove(name);
    }
    headers
}

static NOT_KEPT: [HeaderName; 5] = [TE, TRAILER, CONTENT_LENGTH, CACHE_STATUS, HeaderName::from_static("x-request-id")];
/// What a 304 does not change.
static OF_THE_BODY: [HeaderName; 3] = [CONTENT_LENGTH, CONTENT_ENCODING, CONTENT_RANGE];

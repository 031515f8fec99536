//! The rules of a shared HTTP cache (RFC 9111, RFC 5861): what may be kept, for how long, and what a request may be given of it.
//!
//! What may be kept and how long it is fresh is decided by the crate `http-cache-semantics`, on headers that have been read strictly before
//! ([`Directives`]); where the two disagree the stricter wins (docs/adr/0053). Stricter than the RFC: nothing with `Set-Cookie` is kept, nothing is
//! kept by heuristics, and the answer to a request with credentials only if it says `public` or `s-maxage`.
//!
//! Times are milliseconds of one monotonic clock.

mod config;
mod directives;
mod entry;

use std::time::{Duration, SystemTime};

use http::header::{
    AGE, AUTHORIZATION, CACHE_CONTROL, CONTENT_RANGE, CONTENT_TYPE, ETAG, EXPIRES, LAST_MODIFIED, SET_COOKIE, VARY,
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_cache_semantics::{CacheOptions, CachePolicy};

pub use config::Config;
pub use directives::Directives;
pub use entry::{Damaged, Entry, Key};

use crate::units::ByteSize;
use directives::seconds;

/// `cache` of a route, as requests meet it.
#[derive(Clone, Debug)]
pub struct Rule {
    ttl: Duration,
    stale_while_revalidate: Duration,
    stale_if_error: Duration,
    pub stale_retry: Duration,
    pub entry_bytes_max: u64,
}

/// How long a kept answer may be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Age up to which it is fresh.
    pub fresh: Duration,
    /// How long after that it may be given while a new one is fetched.
    pub while_revalidate: Duration,
    /// How long after that it may be given when none can be fetched.
    pub if_error: Duration,
    /// A client's `max-stale` does not count.
    pub must_revalidate: bool,
}

/// What a request may be given of a kept answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    Fresh,
    /// At once, while a new one is fetched.
    WhileRevalidate,
    /// Only after the upstream has been asked; `if_error`: also if that fails.
    Ask {
        if_error: bool,
    },
}

/// Who an answer may be for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// Everybody who may use the route.
    All,
    /// The one who asked: kept where only they are given it.
    Asker,
}

impl Rule {
    pub fn new(config: &Config) -> Self {
        Rule {
            ttl: seconds(config.ttl_secs.into()),
            stale_while_revalidate: seconds(config.stale_while_revalidate_secs.into()),
            stale_if_error: seconds(config.stale_if_error_secs.into()),
            stale_retry: seconds(config.stale_retry_secs.into()),
            entry_bytes_max: ByteSize::bytes(config.entry_bytes_max),
        }
    }

    /// Whether an answer to a GET may be kept, for whom and on what terms; `None`: not at all. `asked` are the request's headers, `known` whether the gateway
    /// knows who asked.
    pub fn terms(
        &self,
        asked: &HeaderMap,
        known: bool,
        status: StatusCode,
        headers: &HeaderMap,
    ) -> Option<(Terms, Audience)> {
        let said = Directives::of(headers);
        let barred = said.no_store
            || said.private
            || Directives::of(asked).no_store
            || headers.contains_key(SET_COOKIE)
            || headers.contains_key(CONTENT_RANGE)
            || varies_beyond_the_key(headers)
            || is_event_stream(headers);
        if barred || (asked.contains_key(AUTHORIZATION) && !said.is_for_all()) {
            return None;
        }
        let policy = policy(asked, status, headers, &said)?;
        if !policy.is_storable() {
            return None;
        }
        let explicit = said.max_age.is_some() || said.s_maxage.is_some() || headers.contains_key(EXPIRES);
        let fresh = match explicit || said.no_cache {
            true => policy.time_to_live(SystemTime::UNIX_EPOCH),
            false if TTL_STATUSES.contains(&status.as_u16()) => self.ttl,
            false => Duration::ZERO,
        };
        // RFC 9111 sections 4.2.4 and 5.2.2.10: no stale answer where one of these forbids it.
        let strict = said.must_revalidate || said.proxy_revalidate || said.no_cache || said.s_maxage.is_some();
        let stale = |said: Option<u64>, otherwise| match strict {
            true => Duration::ZERO,
            false => said.map_or(otherwise, seconds),
        };
        let terms = Terms {
            fresh,
            while_revalidate: stale(said.stale_while_revalidate, self.stale_while_revalidate),
            if_error: stale(said.stale_if_error, self.stale_if_error),
            must_revalidate: strict,
        };
        // What says nothing and has no time of its own is of use only as something to compare with.
        let validator = headers.contains_key(ETAG) || headers.contains_key(LAST_MODIFIED);
        let lasting = !fresh.is_zero() || (explicit && !terms.if_error.is_zero());
        if !lasting && !(validator && (explicit || said.no_cache)) {
            return None;
        }
        let audience = if known && !said.is_for_all() { Audience::Asker } else { Audience::All };
        Some((terms, audience))
    }
}

impl Terms {
    /// What a request that says `asks` may be given of an answer of that age.
    pub fn permit(&self, asks: &Directives, age: Duration) -> Use {
        let stale_for = age.saturating_sub(self.fresh);
        let is_fresh = age < self.fresh;
        let if_error = is_fresh || stale_for <= self.if_error && !self.if_error.is_zero();
        let ask = Use::Ask { if_error };
        if asks.no_cache || asks.max_age.is_some_and(|max| age > seconds(max)) {
            return ask;
        }
        if is_fresh {
            let left = self.fresh.saturating_sub(age);
            return if asks.min_fresh.is_some_and(|min| left < seconds(min)) { ask } else { Use::Fresh };
        }
        if asks.min_fresh.is_some() {
            return ask;
        }
        if !self.must_revalidate && asks.max_stale.is_some_and(|max| stale_for <= seconds(max)) {
            return Use::Fresh;
        }
        if stale_for < self.while_revalidate {
            return Use::WhileRevalidate;
        }
        ask
    }

    /// The age beyond which the answer is of no use except to compare with.
    pub fn usable(&self) -> Duration {
        self.fresh + self.if_error.max(self.while_revalidate)
    }
}

/// What the answer's own `Age` says; nonsense is very old.
pub fn age_of(headers: &HeaderMap) -> Duration {
    let Some(age) = headers.get(AGE) else { return Duration::ZERO };
    let digits = age.to_str().unwrap_or_default().trim();
    seconds(digits.parse().unwrap_or(directives::SECONDS_MAX))
}

/// Whether a 304 is about the answer that is kept (RFC 9111 section 4.3.4).
pub fn is_about(kept: &HeaderMap, fresh: &HeaderMap) -> bool {
    let opaque = |headers: &HeaderMap| headers.get(ETAG).map(|tag| weak(tag.as_bytes()).to_vec());
    match (opaque(kept), opaque(fresh)) {
        (Some(kept), Some(fresh)) => kept == fresh,
        (None, Some(_)) => false,
        (_, None) => fresh.get(LAST_MODIFIED).is_none_or(|at| kept.get(LAST_MODIFIED) == Some(at)),
    }
}

/// Whether `If-None-Match`, or without it `If-Modified-Since`, says that the asker has the answer (RFC 9110 sections 13.1.2 and 13.1.3).
pub fn is_known(tags: &[HeaderValue], since: Option<&HeaderValue>, kept: &HeaderMap) -> bool {
    if tags.is_empty() {
        // The date is compared as text: another one gets the whole answer, which is always right.
        return since.is_some_and(|since| kept.get(LAST_MODIFIED) == Some(since));
    }
    is_listed(tags, kept.get(ETAG).map(HeaderValue::as_bytes))
}

/// Whether the lines of an `If-None-Match` name the tag of what there is, compared weakly (RFC 9110 section 13.1.2).
pub fn is_listed<'h>(lines: impl IntoIterator<Item = &'h HeaderValue>, own: Option<&[u8]>) -> bool {
    let own = own.map(weak);
    let lines = lines.into_iter().flat_map(|line| line.as_bytes().split(|byte| *byte == b','));
    lines.map(<[u8]>::trim_ascii).any(|tag| tag == b"*" || Some(weak(tag)) == own)
}

fn weak(tag: &[u8]) -> &[u8] {
    tag.strip_prefix(b"W/").unwrap_or(tag)
}

/// The library's view: it gets directives in one spelling, and no `Age`, whose sums it does not check.
fn policy(asked: &HeaderMap, status: StatusCode, headers: &HeaderMap, said: &Directives) -> Option<CachePolicy> {
    let mut request = Request::new(());
    *request.method_mut() = Method::GET;
    if let Some(credentials) = asked.get(AUTHORIZATION) {
        request.headers_mut().insert(AUTHORIZATION, credentials.clone());
    }
    let mut response = Response::new(());
    *response.status_mut() = status;
    *response.headers_mut() = headers.clone();
    response.headers_mut().remove(AGE);
    if headers.contains_key(CACHE_CONTROL) {
        let mut text = String::new();
        let flags =
            [(said.public, "public,"), (said.no_cache, "no-cache,"), (said.must_revalidate, "must-revalidate,")];
        flags.iter().filter(|(set, _)| *set).for_each(|(_, name)| text.push_str(name));
        for (name, value) in [("max-age", said.max_age), ("s-maxage", said.s_maxage)] {
            text.extend(value.map(|value| format!("{name}={value},")));
        }
        response.headers_mut().insert(CACHE_CONTROL, HeaderValue::try_from(text).ok()?);
    }
    let options = CacheOptions {
        shared: true,
        cache_heuristic: 0.0,
        immutable_min_time_to_live: Duration::ZERO,
        ignore_cargo_cult: false,
    };
    Some(CachePolicy::new_options(&request, &response, SystemTime::UNIX_EPOCH, options))
}

/// Everything that is sent to the upstream is in the key, but for who asks (`gateway::cached`): so any `Vary` is met, except for these.
fn varies_beyond_the_key(headers: &HeaderMap) -> bool {
    headers.get_all(VARY).iter().any(|value| match value.to_str() {
        Ok(text) => text.split(',').map(str::trim).any(|name| {
            ["*", "cookie", "authorization", "x-forwarded-for", "forwarded", "x-real-ip"]
                .iter()
                .any(|beyond| name.eq_ignore_ascii_case(beyond))
        }),
        Err(_) => true,
    })
}

/// Never at its end, so never whole.
fn is_event_stream(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().to_ascii_lowercase().starts_with(b"text/event-stream"))
}

/// What `ttl_secs` is for.
const TTL_STATUSES: [u16; 6] = [200, 203, 204, 300, 301, 308];

#[cfg(test)]
mod tests;

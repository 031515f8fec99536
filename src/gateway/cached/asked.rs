//! A request as the cache sees it, and what becomes of its headers.
//!
//! A kept answer must not depend on who happened to ask first. So what a client can say and an upstream could repeat is either in the key, or taken out of
//! what the upstream is asked, or makes the request go around the cache.

use http::header::{
    ACCEPT, AUTHORIZATION, CACHE_CONTROL, COOKIE, HeaderName, HeaderValue, IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH,
    IF_RANGE, IF_UNMODIFIED_SINCE, RANGE, UPGRADE,
};
use http::request::Parts;
use http::{HeaderMap, Method, Uri};
use sha2::{Digest, Sha256};

use crate::cache::response::{Directives, Key};
use crate::gateway::canonical_path;

/// A GET or HEAD that may be answered by the cache.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    /// For an answer that is for everybody.
    pub shared: Key,
    /// For an answer to this device alone.
    pub own: Option<Key>,
    pub url: Box<str>,
    pub says: Directives,
    pub is_head: bool,
    pub tags: Vec<HeaderValue>,
    pub since: Option<HeaderValue>,
    /// `Authorization` and `Cache-Control`, which decide about keeping the answer.
    pub conditions_of_keeping: HeaderMap,
}

impl Asked {
    /// Whether an answer that is kept under `key` is for whoever asks this.
    pub(super) fn takes(&self, key: Key) -> bool {
        key == self.shared || Some(key) == self.own
    }
}

pub(super) enum Way {
    Cache(Box<Asked>),
    /// Neither given from the cache nor kept.
    Around,
    /// Changes what is behind the URL, if it succeeds.
    Change(u128),
}

/// The URL that a client has asked for, as purging names it.
pub fn url(is_tls: bool, host: Option<&str>, uri: &Uri) -> String {
    let scheme = if is_tls { "https" } else { "http" };
    let host = host.unwrap_or_default().to_ascii_lowercase();
    let path = canonical_path(uri.path());
    let mut url = format!("{scheme}://{host}{}", path.as_deref().unwrap_or(uri.path()));
    if let Some(query) = uri.query() {
        url.push('?');
        url.push_str(query);
    }
    url
}

pub(super) fn page(url: &str) -> u128 {
    let path_and_query = url.split_once("://").map_or(url, |(_, rest)| rest);
    cut(Sha256::digest(path_and_query))
}

impl Way {
    /// Looks at a request as the upstream is going to see it, and takes out of it what a kept answer must not depend on.
    pub(super) fn of(parts: &mut Parts, has_body: bool, url: &str, route: &str, device: Option<&str>) -> Way {
        let is_head = parts.method == Method::HEAD;
        if !is_head && parts.method != Method::GET {
            return if parts.method.is_safe() { Way::Around } else { Way::Change(page(url)) };
        }
        let headers = &parts.headers;
        let says = Directives::of(headers);
        if has_body || says.no_store || AROUND.iter().any(|name| headers.contains_key(name)) {
            return Way::Around;
        }
        let tags = headers.get_all(IF_NONE_MATCH).iter().cloned().collect();
        let since = headers.get(IF_MODIFIED_SINCE).cloned();
        let mut conditions_of_keeping = HeaderMap::new();
        for name in [AUTHORIZATION, CACHE_CONTROL] {
            if let Some(value) = headers.get(&name) {
                conditions_of_keeping.insert(name, value.clone());
            }
        }
        // What says that anything will do is as good as nothing.
        if parts.headers.get(ACCEPT).is_some_and(|accept| accept == "*/*") && single(&parts.headers, &ACCEPT) {
            parts.headers.remove(ACCEPT);
        }
        let unwanted = |name: &&HeaderName| {
            let name = name.as_str();
            TAKEN_OUT.contains(&name) || name.starts_with("sec-fetch-") || name.starts_with("sec-ch-")
        };
        while let Some(name) = parts.headers.keys().find(unwanted).cloned() {
            parts.headers.remove(name);
        }
        let page = page(url);
        let mut hash = variant(url, route, parts);
        let shared = Key { page, variant: cut(hash.clone().finalize()) };
        let own = device.map(|device| {
            put(&mut hash, device.as_bytes());
            Key { page, variant: cut(hash.finalize()) }
        });
        Way::Cache(Box::new(Asked { shared, own, url: url.into(), says, is_head, tags, since, conditions_of_keeping }))
    }
}

/// Over everything that makes a difference to the upstream.
fn variant(url: &str, route: &str, parts: &Parts) -> Sha256 {
    let mut hash = Sha256::new();
    for text in [url, route, &parts.uri.to_string()] {
        put(&mut hash, text.as_bytes());
    }
    let keyed = |(name, _): &(&HeaderName, &HeaderValue)| !UNKEYED.contains(&name.as_str());
    let mut headers: Vec<(&HeaderName, &HeaderValue)> = parts.headers.iter().filter(keyed).collect();
    // Stable: the lines of one name stay in their order.
    headers.sort_by_key(|(name, _)| name.as_str());
    for (name, value) in headers {
        put(&mut hash, name.as_str().as_bytes());
        put(&mut hash, value.as_bytes());
    }
    hash
}

fn put(hash: &mut Sha256, text: &[u8]) {
    hash.update((text.len() as u64).to_be_bytes());
    hash.update(text);
}

fn cut(digest: impl AsRef<[u8]>) -> u128 {
    digest.as_ref().iter().take(16).fold(0, |sum, byte| sum << 8 | u128::from(*byte))
}

fn single(headers: &HeaderMap, name: &HeaderName) -> bool {
    headers.get_all(name).iter().count() == 1
}

/// A request with one of these is for the upstream alone.
static AROUND: [HeaderName; 6] = [RANGE, IF_RANGE, IF_MATCH, IF_UNMODIFIED_SINCE, COOKIE, UPGRADE];

/// What the upstream is not told when its answer may be kept: what differs from client to client without making a difference, what a client could have
/// an upstream repeat to others, and what the cache says itself.
const TAKEN_OUT: [&str; 17] = [
    "user-agent",
    "referer",
    "from",
    "dnt",
    "priority",
    "upgrade-insecure-requests",
    "tracestate",
    "baggage",
    "x-request-id",
    "forwarded",
    "x-forwarded-for",
    "x-real-ip",
    "content-length",
    "if-none-match",
    "if-modified-since",
    "cache-control",
    "pragma",
];

/// What is sent and not in the key: said by the gateway alone or in a narrow form, or looked at where it is decided what is kept (`Authorization`).
const UNKEYED: [&str; 6] = ["via", "te", "traceparent", "tidegate-device", "tidegate-role", "authorization"];

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn asked(target: &str, headers: &[(&str, &str)], device: Option<&str>) -> (Way, Parts) {
        let mut request = Request::builder().uri(target);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut parts = request.body(()).unwrap().into_parts().0;
        let url = url(false, Some("G"), &parts.uri);
        (Way::of(&mut parts, false, &url, "r", device), parts)
    }

    fn key(target: &str, headers: &[(&str, &str)]) -> Key {
        let (Way::Cache(asked), _) = asked(target, headers, None) else { panic!("around") };
        asked.shared
    }

    #[test]
    fn whatever_the_upstream_sees_is_in_the_key() {
        let plain = key("/a", &[]);
        for (target, headers) in [
            ("/b", &[][..]),
            ("/a?", &[]),
            ("/a?x", &[]),
            ("/a", &[("accept", "text/plain")]),
            ("/a", &[("accept-encoding", "gzip")]),
            ("/a", &[("x-original-url", "/admin")]),
            ("/a", &[("x-forwarded-host", "evil")]),
            ("/a", &[("x-forwarded-proto", "https")]),
            ("/a", &[("x-http-method-override", "POST")]),
            ("/a", &[("origin", "https://evil")]),
        ] {
            assert_ne!(key(target, headers), plain, "{target} {headers:?}");
        }
        // Lines cannot be moved from one header to the next.
        assert_ne!(key("/a", &[("x-a", "b"), ("x-c", "d")]), key("/a", &[("x-a", "bx-cd")]));
        assert_ne!(key("/a", &[("accept", "a"), ("accept", "b")]), key("/a", &[("accept", "a"), ("accept", "c")]));
    }

    #[test]
    fn what_is_not_in_the_key_is_not_sent() {
        let noise = [
            ("user-agent", "x"),
            ("referer", "x"),
            ("x-forwarded-for", "1.2.3.4"),
            ("cache-control", "max-age=0"),
            ("sec-fetch-mode", "cors"),
            ("x-request-id", "evil"),
            ("if-none-match", "\"a\""),
            ("accept", "*/*"),
        ];
        let (way, parts) = asked("/a", &noise, None);
        let Way::Cache(asked) = way else { panic!("around") };
        assert_eq!(asked.shared, key("/a", &[]));
        assert!(parts.headers.is_empty(), "{:?}", parts.headers);
        assert_eq!((asked.tags.len(), asked.says.max_age), (1, Some(0)));
    }

    #[test]
    fn what_concerns_one_client_goes_around() {
        for name in ["cookie", "range", "if-match", "if-unmodified-since", "if-range"] {
            assert!(matches!(asked("/a", &[(name, "x")], None).0, Way::Around), "{name}");
        }
        assert!(matches!(asked("/a", &[("cache-control", "no-store")], None).0, Way::Around));
    }

    #[test]
    fn devices_have_keys_of_their_own_on_one_page() {
        let own = |device| match asked("/a", &[], Some(device)).0 {
            Way::Cache(asked) => (asked.shared, asked.own.unwrap()),
            Way::Around | Way::Change(_) => panic!("around"),
        };
        let ((shared, a), (same, b)) = (own("a"), own("b"));
        assert_eq!((shared, shared.page, a.page), (same, a.page, b.page));
        assert!(a != b && a != shared);
    }

    #[test]
    fn one_spelling_is_one_page() {
        let at = |target: &str| page(&url(true, Some("G:80"), &target.parse().unwrap()));
        assert_eq!(at("/%61pi?x"), at("/api?x"));
        assert_ne!(at("/api?x"), at("/api?y"));
        assert_eq!(url(true, Some("G:80"), &"/%61?b".parse().unwrap()), "https://g:80/a?b");
    }
}

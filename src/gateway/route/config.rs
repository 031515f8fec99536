//! One `[[route]]` of the configuration.

use std::collections::BTreeMap;

use http::header::{HeaderName, HeaderValue};
use http::{Method, StatusCode};
use serde::{Deserialize, Serialize};

use super::bearers::Config as Jwt;
use super::connect::Target;
use super::template::Template;
use crate::cache::response::Config as CacheConfig;
use crate::network::Network;
use crate::units::{ByteSize, Quota};

/// One `[[route]]`: an exact path wins over prefixes, the longest prefix over shorter ones, then the order of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The route's name, for logs and messages.
    #[schemars(length(min = 1, max = 64))]
    pub name: String,
    /// The host asked for, without port: "*" is any, "*.example.org" any below example.org, anything else that host alone.
    pub host: String,
    /// The path or its beginning, by whole segments: "/api" and "/api/" match /api and /api/x, not /apix.
    pub path_prefix: String,
    /// The whole path; instead of `path_prefix`.
    pub path: String,
    /// The methods it takes; empty: all.
    pub methods: Vec<String>,
    /// Headers that a request must have, each with this value; "*" is any value.
    pub headers: BTreeMap<String, String>,
    /// The upstream, by name; of kind "http". A route has this, `redirect` or `answer`.
    pub to: String,
    /// Sends the client elsewhere.
    pub redirect: Option<Redirect>,
    /// Answers here.
    pub answer: Option<FixedAnswer>,
    /// Makes the route one for CONNECT (RFC 9110 section 9.3.6): where a tunnel may lead, "HOST:PORT" or "*.example.org:PORT" for any host below. Everything else
    /// is refused with 403. Bytes go through unseen; `timeout_ms` holds for the connection, `idle_timeout_ms` for the tunnel. The client shows its token in
    /// `Proxy-Authorization`, and policy rules know the target by CONNECT on "HOST:PORT".
    pub connect: Vec<String>,
    /// What the upstream sees instead of `path_prefix` (or `path`): "/" strips it. Without it the path stays as it came.
    #[schemars(regex(pattern = r"^/[^?#]*$"))]
    pub rewrite: Option<String>,
    /// Who may use it: "device" for authenticated devices whom a policy rule allows the method on the path, "jwt" for bearers of
    /// a token of an identity provider (`jwt`), without policy rules, "none" for anybody.
    pub auth: Auth,
    /// With auth = "jwt": whose tokens.
    pub jwt: Option<Jwt>,
    /// Networks that may use it; empty: all. Others get 403.
    pub allow: Vec<Network>,
    /// Networks that may not use it, whatever `allow` says.
    pub deny: Vec<Network>,
    /// Requests over this route, for each that `rate_by` tells apart. 429 beyond it; every answer says how much is left (`RateLimit`).
    /// "30/m burst 10" is a token bucket, which refills evenly; "30/m sliding" is a window: at most 30 in any minute, wherever it begins, and a used one comes
    /// back at most a seventh of a minute after its minute is over.
    pub rate: Option<Quota>,
    /// Whom `rate` counts: "address" (IPv6: a /64), "device" (an address where nobody is known), "route" (all together), or "header:NAME".
    #[schemars(regex(pattern = r"^(address|device|route|header:[A-Za-z0-9!#$%&'*+.^_`|~-]+)$"))]
    pub rate_by: String,
    /// Milliseconds from the request's head to that of the upstream's answer, connecting and retries included. Reached: 504.
    #[schemars(range(min = 1, max = 3_600_000))]
    pub timeout_ms: u32,
    /// Milliseconds without one byte of the answer's body, or in either direction after an upgrade (WebSocket). Reached: the connection is cut. Event
    /// streams that are silent for longer need more.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub idle_timeout_ms: u32,
    /// The largest request body; without it `limits.body_bytes_max` holds. 413 beyond it.
    pub body_bytes_max: Option<ByteSize>,
    /// Whether the upstream sees the Host that the client asked for; otherwise it sees its endpoint's own, and the client's in X-Forwarded-Host.
    pub preserve_host: bool,
    /// Changes to the request's headers, last of all, so also to those the gateway sets.
    pub request_headers: HeaderEdits,
    /// Changes to the answer's headers, whoever gives it.
    pub response_headers: HeaderEdits,
    /// Lets pages of other origins use it (Fetch standard, CORS): preflights are answered here, and the upstream's own CORS headers are replaced.
    pub cors: Option<Cors>,
    /// Keeps answers to GET and gives them again, also while the upstream is down; `cache = {}` keeps what says itself for how long.
    pub cache: Option<CacheConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            name: String::new(),
            host: "*".into(),
            path_prefix: "/".into(),
            path: String::new(),
            methods: Vec::new(),
            headers: BTreeMap::new(),
            to: String::new(),
            redirect: None,
            answer: None,
            connect: Vec::new(),
            rewrite: None,
            auth: Auth::default(),
            jwt: None,
            allow: Vec::new(),
            deny: Vec::new(),
            rate: None,
            rate_by: "address".into(),
            timeout_ms: 30_000,
            idle_timeout_ms: 60_000,
            body_bytes_max: None,
            preserve_host: false,
            request_headers: HeaderEdits::default(),
            response_headers: HeaderEdits::default(),
            cors: None,
            cache: None,
        }
    }
}

/// Who may use a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Auth {
    #[default]
    Device,
    Jwt,
    None,
}

/// `redirect`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Redirect {
    /// Where to: {host} is the host asked for without its port, {path} the path and {rest} what follows the prefix, {query} the query with its ?.
    /// "https://{host}{path}{query}" changes the scheme alone.
    pub to: String,
    /// 301, 302, 303, 307 or 308.
    #[serde(default = "permanently")]
    #[schemars(range(min = 301, max = 308))]
    pub status: u16,
}

const fn permanently() -> u16 {
    308
}

/// `answer`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FixedAnswer {
    /// The status of the answer.
    #[schemars(range(min = 200, max = 599))]
    pub status: u16,
    /// The media type of `body`.
    pub content_type: String,
    /// The text that is sent.
    #[schemars(length(max = 65536))]
    pub body: String,
}

impl Default for FixedAnswer {
    fn default() -> Self {
        FixedAnswer { status: 200, content_type: "text/plain; charset=utf-8".into(), body: String::new() }
    }
}

/// `request_headers`, `response_headers`: first `remove`, then `set`.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HeaderEdits {
    /// Headers to be set, replacing what is there. In a value {device}, {peer}, {host}, {path}, {query}, {route} and {request_id} are filled in.
    pub set: BTreeMap<String, String>,
    /// Headers to be removed.
    pub remove: Vec<String>,
}

/// `cors`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Cors {
    /// Origins whose pages may read answers: "https://app.example", "https://*.example" for any below, or "*" alone for all.
    pub origins: Vec<String>,
    /// Methods they may use beyond GET, HEAD and POST.
    pub methods: Vec<String>,
    /// Request headers they may send beyond the simple ones; "*" is any.
    pub headers: Vec<String>,
    /// Answer headers they may read beyond the simple ones.
    pub expose: Vec<String>,
    /// Whether they may send cookies and credentials; then `origins` must name them.
    pub credentials: bool,
    /// Seconds for which a browser may remember the answer to a preflight.
    #[schemars(range(min = 0, max = 86_400))]
    pub max_age_secs: u32,
}

impl Default for Cors {
    fn default() -> Self {
        Cors {
            origins: Vec::new(),
            methods: Vec::new(),
            headers: Vec::new(),
            expose: Vec::new(),
            credentials: false,
            max_age_secs: 600,
        }
    }
}

/// Headers that say how long a message is or that concern one connection: nobody may set them by hand.
const NOT_TO_BE_SET: [&str; 7] =
    ["content-length", "transfer-encoding", "connection", "keep-alive", "upgrade", "te", "trailer"];

impl Config {
    /// What cannot work although every key by itself is well formed: the key, and a lowercase clause.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        let mut add = |key, text: String| problems.push((key, text));
        match [!self.to.is_empty(), self.redirect.is_some(), self.answer.is_some(), !self.connect.is_empty()]
            .into_iter()
            .filter(|has| *has)
            .count()
        {
            0 => add("to", "a route needs an upstream in `to`, or `redirect`, `answer` or `connect`".into()),
            1 => {}
            _ => add("to", "`to`, `redirect`, `answer` and `connect` exclude each other".into()),
        }
        for target in &self.connect {
            if Target::parse(target).is_none() {
                add("connect", format!("`{target}` is not HOST:PORT, *.DOMAIN:PORT or [IPV6]:PORT"));
            }
        }
        if !self.connect.is_empty() && !self.is_for_any_request() {
            add(
                "connect",
                "a tunnel has no host, path, method, cache, cors, rewrite or header edits of its own".into(),
            );
        }
        if !self.path.is_empty() && !self.path.starts_with('/') {
            add("path", "not a path; a path begins with /".into());
        }
        if !self.path.is_empty() && self.path_prefix != "/" {
            add("path", "`path` and `path_prefix` exclude each other".into());
        }
        if self.rewrite.is_some() && self.to.is_empty() {
            add("rewrite", "there is no upstream that would see it".into());
        }
        if self.cache.is_some() && self.to.is_empty() {
            add("cache", "there is no upstream whose answers it would keep".into());
        }
        if self.rate_by == "device" && self.auth != Auth::Device {
            add("rate_by", "a device is known with auth = \"device\" alone".into());
        }
        match (&self.jwt, self.auth) {
            (Some(jwt), Auth::Jwt) => {
                if let Err(error) = jwt.check() {
                    add("jwt", error);
                }
            }
            (None, Auth::Jwt) => add(
                "auth",
                "\"jwt\" needs to know whose: jwt = { issuer, audiences, jwks_file } or jwks_upstream".into(),
            ),
            (Some(_), Auth::Device | Auth::None) => add("jwt", "only auth = \"jwt\" looks at it".into()),
            (None, Auth::Device | Auth::None) => {}
        }
        for (key, name) in self.header_names() {
            if HeaderName::try_from(name).is_err() {
                add(key, format!("`{name}` is not the name of a header"));
            } else if NOT_TO_BE_SET.contains(&name.to_ascii_lowercase().as_str()) && key != "headers" {
                add(key, format!("`{name}` is not for a route to change"));
            }
        }
        for (key, edits) in [("request_headers", &self.request_headers), ("response_headers", &self.response_headers)] {
            for text in edits.set.values() {
                if let Err(unknown) = Template::parse(text, &HEADER_WORDS) {
                    add(key, format!("{unknown}; known are {}", known(&HEADER_WORDS)));
                }
                if HeaderValue::from_str(text).is_err() {
                    add(key, "a header's value has no line breaks".into());
                }
            }
        }
        if let Some(redirect) = &self.redirect {
            if ![301, 302, 303, 307, 308].contains(&redirect.status) {
                add("redirect", "not a redirect; allowed are 301, 302, 303, 307, 308".into());
            }
            if let Err(unknown) = Template::parse(&redirect.to, &REDIRECT_WORDS) {
                add("redirect", format!("{unknown}; known are {}", known(&REDIRECT_WORDS)));
            }
        }
        if let Some(answer) = &self.answer
            && (StatusCode::from_u16(answer.status).is_err() || HeaderValue::from_str(&answer.content_type).is_err())
        {
            add("answer", "not a status or not a media type".into());
        }
        if let Some(cors) = &self.cors {
            if cors.origins.is_empty() {
                add("cors", "name at least one origin, or \"*\"".into());
            }
            if cors.credentials && cors.origins.iter().any(|origin| origin == "*") {
                add("cors", "with credentials every origin must be named".into());
            }
            for method in &cors.methods {
                if Method::from_bytes(method.as_bytes()).is_err() {
                    add("cors", format!("`{method}` is not a method"));
                }
            }
        }
        problems
    }

    /// Whether nothing is set that only a request which is looked into can have.
    fn is_for_any_request(&self) -> bool {
        let any = Config::default();
        self.host == any.host
            && self.path_prefix == any.path_prefix
            && self.path.is_empty()
            && self.methods.is_empty()
            && self.cache.is_none()
            && self.cors.is_none()
            && self.rewrite.is_none()
            && self.request_headers == any.request_headers
            && self.response_headers == any.response_headers
    }

    fn header_names(&self) -> Vec<(&'static str, &str)> {
        let mut names: Vec<(&'static str, &str)> = self.headers.keys().map(|name| ("headers", name.as_str())).collect();
        for (key, edits) in [("request_headers", &self.request_headers), ("response_headers", &self.response_headers)] {
            names.extend(edits.set.keys().chain(&edits.remove).map(|name| (key, name.as_str())));
        }
        if let Some(cors) = &self.cors {
            let named = cors.headers.iter().chain(&cors.expose).filter(|name| *name != "*");
            names.extend(named.map(|name| ("cors", name.as_str())));
        }
        names
    }
}

/// What may stand in a header's value, and in a redirect.
pub(super) const HEADER_WORDS: [&str; 7] = ["device", "peer", "host", "path", "query", "route", "request_id"];
pub(super) const REDIRECT_WORDS: [&str; 4] = ["host", "path", "rest", "query"];

fn known(words: &[&str]) -> String {
    words.iter().map(|word| format!("{{{word}}}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn keys(value: serde_json::Value) -> Vec<&'static str> {
        let config: Config = serde_json::from_value(value).unwrap();
        config.problems().into_iter().map(|(key, _)| key).collect()
    }

    #[test]
    fn what_an_operator_writes_is_understood() {
        let good = [
            json!({ "name": "a", "to": "cloud", "path_prefix": "/api/", "rewrite": "/", "rate": "10/s burst 20", "rate_by": "header:x-key",
                    "request_headers": { "set": { "x-device": "{device}", "x-braces": "{{x}}" }, "remove": ["cookie"] },
                    "cors": { "origins": ["https://app.example"], "methods": ["PUT"], "credentials": true } }),
            json!({ "name": "b", "redirect": { "to": "https://{host}{path}{query}" }, "auth": "none" }),
            json!({ "name": "c", "path": "/robots.txt", "answer": { "body": "User-agent: *\nDisallow: /\n" }, "auth": "none" }),
            json!({ "name": "t", "connect": ["a.example:443", "*.b.example:8883", "[::1]:22"], "deny": ["10.0.0.0/8"] }),
            json!({ "name": "d", "to": "cloud", "headers": { "x-version": "2", "x-any": "*" }, "allow": ["10.0.0.0/8"] }),
        ];
        for good in good {
            assert_eq!(keys(good.clone()), Vec::<&str>::new(), "{good}");
        }
    }

    #[test]
    fn what_cannot_work_is_named_by_its_key() {
        let bad = [
            (json!({ "name": "a" }), "to"),
            (json!({ "name": "a", "to": "x", "answer": {} }), "to"),
            (json!({ "name": "a", "to": "x", "connect": ["a:1"] }), "to"),
            (json!({ "name": "a", "connect": ["a.example"] }), "connect"),
            (json!({ "name": "a", "connect": ["*:443"] }), "connect"),
            (json!({ "name": "a", "connect": ["a:0"] }), "connect"),
            (json!({ "name": "a", "connect": ["u@a:443"] }), "connect"),
            (json!({ "name": "a", "connect": ["a:443"], "path": "/x" }), "connect"),
            (json!({ "name": "a", "to": "x", "path": "api" }), "path"),
            (json!({ "name": "a", "to": "x", "path": "/a", "path_prefix": "/b" }), "path"),
            (json!({ "name": "a", "answer": {}, "rewrite": "/" }), "rewrite"),
            (json!({ "name": "a", "answer": {}, "cache": {} }), "cache"),
            (json!({ "name": "a", "to": "x", "auth": "jwt" }), "auth"),
            (
                json!({ "name": "a", "to": "x", "auth": "jwt", "jwt": { "issuer": "i", "audiences": ["a"], "jwks_file": "/nonexistent" } }),
                "jwt",
            ),
            (json!({ "name": "a", "to": "x", "auth": "jwt", "jwt": { "issuer": "i", "audiences": ["a"] } }), "jwt"),
            (
                json!({ "name": "a", "to": "x", "auth": "jwt", "jwt": { "issuer": "i", "audiences": ["a"], "jwks_file": "x", "jwks_upstream": "y" } }),
                "jwt",
            ),
            (json!({ "name": "a", "to": "x", "jwt": { "issuer": "i", "audiences": ["a"], "jwks_file": "x" } }), "jwt"),
            (json!({ "name": "a", "to": "x", "auth": "none", "rate_by": "device" }), "rate_by"),
            (json!({ "name": "a", "to": "x", "headers": { "a b": "*" } }), "headers"),
            (
                json!({ "name": "a", "to": "x", "request_headers": { "set": { "Content-Length": "5" } } }),
                "request_headers",
            ),
            (json!({ "name": "a", "to": "x", "request_headers": { "set": { "x": "{who}" } } }), "request_headers"),
            (
                json!({ "name": "a", "to": "x", "response_headers": { "set": { "x": "a\r\nb: c" } } }),
                "response_headers",
            ),
            (json!({ "name": "a", "redirect": { "to": "/x", "status": 304 } }), "redirect"),
            (json!({ "name": "a", "redirect": { "to": "{scheme}" } }), "redirect"),
            (json!({ "name": "a", "to": "x", "cors": { "origins": [] } }), "cors"),
            (json!({ "name": "a", "to": "x", "cors": { "origins": ["*"], "credentials": true } }), "cors"),
        ];
        for (bad, key) in bad {
            assert_eq!(keys(bad.clone()), [key], "{bad}");
        }
    }
}

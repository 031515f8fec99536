//! Headers of a request and an answer that pass through: what ends here, what is added, what is never believed.

use http::header::{
    AUTHORIZATION, CONNECTION, COOKIE, EXPECT, Entry, FORWARDED, HOST, HeaderMap, HeaderName, HeaderValue, TE, UPGRADE,
    VIA,
};
use http::{Version, uri};
use parking_lot::Mutex;
use std::net::IpAddr;
use tidegate_http::{forwarded, hop_by_hop, traceparent};

use crate::gateway::RateLeft;

/// The gateway in `Via` (RFC 9110 section 7.6.3), written once.
#[derive(Debug)]
pub struct Via {
    name: String,
    http_1_0: HeaderValue,
    http_1_1: HeaderValue,
    http_2: HeaderValue,
}

impl Via {
    /// `name` is a pseudonym; one that no header can carry becomes `tidegate`.
    pub fn new(name: String) -> Self {
        let is_sayable = HeaderValue::from_str(&name).is_ok();
        let name = if is_sayable { name } else { "tidegate".to_owned() };
        let entry = |version: &str| {
            HeaderValue::try_from(format!("{version} {name}")).unwrap_or_else(|_| HeaderValue::from_static("tidegate"))
        };
        Via { http_1_0: entry("1.0"), http_1_1: entry("1.1"), http_2: entry("2"), name }
    }

    /// What is added to a message received in `version`.
    fn entry(&self, version: Version) -> &HeaderValue {
        match version {
            Version::HTTP_2 => &self.http_2,
            Version::HTTP_10 => &self.http_1_0,
            _ => &self.http_1_1,
        }
    }
}

/// Where requests come from, as upstreams are told. One for a connection: what does not change from request to request is written once.
#[derive(Debug)]
pub struct Whence {
    peer: IpAddr,
    scheme: &'static str,
    /// For `X-Forwarded-For`.
    address: HeaderValue,
    /// The host asked for last, and the element of `Forwarded` that goes with it.
    last: Mutex<Option<(Option<HeaderValue>, HeaderValue)>>,
}

impl Whence {
    pub fn new(peer: IpAddr, is_tls: bool) -> Self {
        let peer = peer.to_canonical();
        Whence {
            scheme: if is_tls { "https" } else { "http" },
            // An address is plain text.
            address: HeaderValue::try_from(peer.to_string()).unwrap_or_else(|_| HeaderValue::from_static("unknown")),
            last: Mutex::default(),
            peer,
        }
    }

    /// RFC 7239's element for a request to `host`.
    fn element(&self, host: Option<&HeaderValue>) -> HeaderValue {
        let mut last = self.last.lock();
        if let Some((known, element)) = &*last
            && known.as_ref() == host
        {
            return element.clone();
        }
        let text = forwarded::element(self.peer, self.scheme, host.and_then(|host| host.to_str().ok()));
        let element = HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static("for=unknown"));
        *last = Some((host.cloned(), element.clone()));
        element
    }
}

/// What is said about a request towards the upstream.
#[derive(Debug)]
pub struct Passing<'a> {
    pub whence: &'a Whence,
    /// The host asked for, with its port.
    pub host: Option<HeaderValue>,
    pub preserve_host: bool,
    /// Whether the peer's own `Forwarded` and `X-Forwarded-*` are believed and added to. Otherwise they are replaced.
    pub is_proxy: bool,
    pub via: &'a Via,
    /// The authenticated device and its role.
    pub device: Option<(&'a str, &'a str)>,
    /// The bearer token was for the gateway and ends here.
    pub hide_authorization: bool,
    pub request_id: &'a HeaderValue,
    /// The protocol the client wants to change to, which the upstream may grant.
    pub upgrade: Option<HeaderValue>,
    pub version: Version,
}

/// Turns a client's headers into those for the upstream.
pub fn towards_upstream(headers: &mut HeaderMap, passing: &Passing<'_>) {
    let wants_trailers = headers.get_all(TE).iter().any(|te| te.as_bytes().eq_ignore_ascii_case(b"trailers"));
    strip(headers, |name| {
        // Expect is answered here: the client gets its 100 when its body is first asked for.
        [&TE, &EXPECT, &HOST].contains(&name)
            || OURS.contains(name)
            || (passing.hide_authorization && *name == AUTHORIZATION)
            || (!passing.is_proxy && WHERE_FROM.contains(name))
    });
    drop_lookalikes(headers);
    if wants_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if passing.version == Version::HTTP_2 {
        join_cookies(headers);
    }
    if let Some(upgrade) = &passing.upgrade {
        headers.insert(UPGRADE, upgrade.clone());
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
    if let Some((id, role)) = passing.device {
        // Ids and roles have no character that a header has not; one that had is left out.
        for (name, text) in [(DEVICE, id), (ROLE, role)] {
            if let Ok(value) = HeaderValue::from_str(text) {
                headers.insert(name, value);
            }
        }
    }
    if let (true, Some(host)) = (passing.preserve_host, &passing.host) {
        headers.insert(HOST, host.clone());
    }
    say_where_from(headers, passing);
    headers.insert(X_REQUEST_ID, passing.request_id.clone());
    // RFC 9110 section 7.6.3, and W3C Trace Context section 3.2: what is not one is not passed on.
    append(headers, VIA, passing.via.entry(passing.version));
    if headers.get_all(TRACEPARENT).iter().count() != 1
        || !headers[TRACEPARENT].to_str().is_ok_and(traceparent::is_valid)
    {
        headers.remove(TRACEPARENT);
        headers.remove(TRACESTATE);
    }
}

/// Turns an upstream's headers into those for the client. `upgrade`: the answer grants one.
pub fn towards_client(headers: &mut HeaderMap, via: &Via, version: Version, upgrade: bool, request_id: &HeaderValue) {
    let granted = headers.get(UPGRADE).filter(|_| upgrade).cloned();
    strip(headers, |_| false);
    if let Some(granted) = granted {
        headers.insert(UPGRADE, granted);
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
    append(headers, VIA, via.entry(version));
    if let Entry::Vacant(entry) = headers.entry(X_REQUEST_ID) {
        entry.insert(request_id.clone());
    }
}

/// What is left of a route's rate (draft-ietf-httpapi-ratelimit-headers).
pub fn say_rate(headers: &mut HeaderMap, route: &str, rate: Option<RateLeft>) {
    let Some(RateLeft { quota, window, left, reset }) = rate else { return };
    let is_plain = |c: char| c.is_ascii_graphic() && !matches!(c, '"' | '\\');
    let name = if route.chars().all(is_plain) { route } else { "route" };
    let seconds = reset.as_secs() + u64::from(reset.subsec_nanos() > 0);
    set(headers, RATELIMIT_POLICY, &format!("\"{name}\";q={quota};w={}", window.as_secs()));
    set(headers, RATELIMIT, &format!("\"{name}\";r={left};t={seconds}"));
}

/// Whether a request has passed here already, so that the upstream is, by some way, the gateway itself.
pub fn is_loop(headers: &HeaderMap, via: &Via) -> bool {
    let values = headers.get_all(VIA).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|hop| hop.split_ascii_whitespace().nth(1) == Some(&via.name))
}

/// The client's own id for the request, if it can stand in a log and a header.
pub fn request_id(headers: &HeaderMap) -> Option<HeaderValue> {
    const BYTES_MAX: usize = 128;
    let value = headers.get(X_REQUEST_ID)?;
    let fits = (1..=BYTES_MAX).contains(&value.len());
    (fits && value.as_bytes().iter().all(u8::is_ascii_graphic)).then(|| value.clone())
}

/// The host asked for, with its port: of the target if it names one (RFC 9112 section 3.2.2), else of `Host`.
pub fn host<'a>(uri: &'a uri::Uri, headers: &'a HeaderMap) -> Option<&'a str> {
    let authority = uri.authority().map(uri::Authority::as_str);
    authority.or_else(|| headers.get(HOST)?.to_str().ok())
}

/// The same, for a header.
pub fn host_value(uri: &uri::Uri, headers: &HeaderMap) -> Option<HeaderValue> {
    match uri.authority() {
        Some(authority) => HeaderValue::from_str(authority.as_str()).ok(),
        None => headers.get(HOST).filter(|host| host.to_str().is_ok()).cloned(),
    }
}

/// Whether everybody finds the same host: `Host` and the target's are one each (RFC 9112 section 3.2, RFC 9110 section 4.2.4), and over HTTP/2
/// `Host` says what `:authority` says (RFC 9113 section 8.3.1).
pub fn is_host_unambiguous(version: Version, uri: &uri::Uri, headers: &HeaderMap) -> bool {
    if !uri.authority().is_none_or(|authority| is_authority(authority.as_str().as_bytes())) {
        return false;
    }
    let Some(host) = headers.get(HOST) else { return true };
    // In HTTP/1.1 the target wins whatever Host says (section 3.2.2), and what is passed on is made from it.
    is_authority(host.as_bytes())
        && (version != Version::HTTP_2 || uri.authority().is_none_or(|authority| host == authority.as_str()))
}

/// Whether a text is a host with or without a port (RFC 3986 section 3.2), so that it reads as one wherever it is put. A user's name is none of it.
pub fn is_authority(text: &[u8]) -> bool {
    let is_of_name = |b: &u8| b.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=".contains(b);
    let port = if let Some(inside) = text.strip_prefix(b"[") {
        let Some(end) = inside.iter().position(|b| *b == b']') else { return false };
        let (address, rest) = inside.split_at(end);
        if address.is_empty() || !address.iter().all(|b| is_of_name(b) || *b == b':') {
            return false;
        }
        rest.get(1..).unwrap_or_default()
    } else {
        let (name, rest) = text.split_at(text.iter().position(|b| *b == b':').unwrap_or(text.len()));
        if !name.iter().all(is_of_name) {
            return false;
        }
        rest
    };
    match port {
        [] => true,
        [b':', digits @ ..] => digits.iter().all(u8::is_ascii_digit),
        _ => false,
    }
}

/// Removes what ends at this hop, and what else `ends_here`.
fn strip(headers: &mut HeaderMap, ends_here: impl Fn(&HeaderName) -> bool) {
    // Most requests name nothing, and nothing is allocated for them.
    if headers.contains_key(CONNECTION) {
        let named: Vec<String> = headers
            .get_all(CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(hop_by_hop::connection_options)
            .collect();
        for name in named {
            headers.remove(name.as_str());
        }
    }
    // One look at each name that is there costs less than one for each that may be.
    let is_unwanted = |name: &&HeaderName| hop_by_hop::is_hop_by_hop(name.as_str()) || ends_here(name);
    while let Some(name) = headers.keys().find(is_unwanted).cloned() {
        headers.remove(name);
    }
}

/// Backends that follow CGI read `X_Forwarded_For` as `X-Forwarded-For`: nobody may say in that spelling what only the gateway says.
fn drop_lookalikes(headers: &mut HeaderMap) {
    let meant = |name: &HeaderName| name.as_str().replace('_', "-");
    let is_lookalike = |name: &&HeaderName| {
        name.as_str().contains('_') && SET_HERE.iter().chain(&OURS).any(|set_here| meant(name) == set_here.as_str())
    };
    let lookalikes: Vec<HeaderName> = headers.keys().filter(is_lookalike).cloned().collect();
    for name in lookalikes {
        headers.remove(name);
    }
}

/// RFC 9113 section 8.2.3: HTTP/2 may cut a cookie into crumbs, HTTP/1.1 may not.
fn join_cookies(headers: &mut HeaderMap) {
    let crumbs: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if crumbs.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..]))
    {
        headers.insert(COOKIE, joined);
    }
}

fn say_where_from(headers: &mut HeaderMap, passing: &Passing<'_>) {
    let Whence { scheme, address, .. } = passing.whence;
    let element = passing.whence.element(passing.host.as_ref());
    if passing.is_proxy {
        append(headers, X_FORWARDED_FOR, address);
        append(headers, FORWARDED, &element);
    } else {
        headers.insert(X_FORWARDED_FOR, address.clone());
        headers.insert(FORWARDED, element);
    }
    // The outermost proxy has said how the client came; a client has not.
    if let Entry::Vacant(entry) = headers.entry(X_FORWARDED_PROTO) {
        entry.insert(HeaderValue::from_static(scheme));
    }
    if let Some(host) = &passing.host
        && let Entry::Vacant(entry) = headers.entry(X_FORWARDED_HOST)
    {
        entry.insert(host.clone());
    }
}

/// Adds to a comma-separated list, as one line.
fn append(headers: &mut HeaderMap, name: HeaderName, entry: &HeaderValue) {
    match headers.entry(name) {
        Entry::Vacant(vacant) => {
            vacant.insert(entry.clone());
        }
        Entry::Occupied(mut occupied) => {
            let mut list: Vec<u8> = Vec::new();
            for value in occupied.iter() {
                list.extend_from_slice(value.as_bytes());
                list.extend_from_slice(b", ");
            }
            list.extend_from_slice(entry.as_bytes());
            if let Ok(value) = HeaderValue::from_bytes(&list) {
                occupied.insert(value);
            }
        }
    }
}

fn set(headers: &mut HeaderMap, name: HeaderName, text: &str) {
    if let Ok(value) = HeaderValue::from_str(text) {
        headers.insert(name, value);
    }
}

pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Who the gateway found the client to be. A client cannot set them.
const DEVICE: HeaderName = HeaderName::from_static("tidegate-device");
const ROLE: HeaderName = HeaderName::from_static("tidegate-role");
static OURS: [HeaderName; 2] = [DEVICE, ROLE];
/// What a client may not say of itself; the first two are set here anew.
static WHERE_FROM: [HeaderName; 6] =
    [X_FORWARDED_FOR, FORWARDED, X_FORWARDED_PROTO, X_FORWARDED_HOST, X_FORWARDED_PORT, X_REAL_IP];
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const RATELIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATELIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
/// What the gateway or the framing of a message says.
static SET_HERE: [HeaderName; 9] = [
    X_FORWARDED_FOR,
    X_FORWARDED_PROTO,
    X_FORWARDED_HOST,
    X_FORWARDED_PORT,
    X_REAL_IP,
    X_REQUEST_ID,
    http::header::CONTENT_LENGTH,
    http::header::TRANSFER_ENCODING,
    AUTHORIZATION,
];
const X_REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    fn assert_has(headers: &HeaderMap, expected: &[(&str, &str)]) {
        for (name, value) in expected {
            assert_eq!(headers[*name], *value, "{name}");
        }
    }

    fn whence(is_tls: bool) -> &'static Whence {
        Box::leak(Box::new(Whence::new(IpAddr::from([192, 0, 2, 1]), is_tls)))
    }

    fn via() -> &'static Via {
        Box::leak(Box::new(Via::new("g-1".into())))
    }

    fn passing(id: &HeaderValue) -> Passing<'_> {
        Passing {
            whence: whence(true),
            host: Some(HeaderValue::from_static("gateway.example:8443")),
            preserve_host: false,
            is_proxy: false,
            via: via(),
            device: None,
            hide_authorization: false,
            request_id: id,
            upgrade: None,
            version: Version::HTTP_11,
        }
    }

    #[test]
    fn what_concerns_one_connection_ends_here() {
        let mut h = headers(&[
            ("connection", "close, X-Secret, Authorization"),
            ("x-secret", "1"),
            ("authorization", "Basic x"),
            ("keep-alive", "5"),
            ("te", "gzip"),
            ("te", "Trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("expect", "100-continue"),
            ("proxy-authorization", "x"),
            ("host", "gateway.example:8443"),
            ("accept", "*/*"),
        ]);
        let id = HeaderValue::from_static("r1");
        towards_upstream(&mut h, &passing(&id));
        let mut names: Vec<&str> = h.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        let expected = [
            "accept",
            "authorization",
            "forwarded",
            "te",
            "via",
            "x-forwarded-for",
            "x-forwarded-host",
            "x-forwarded-proto",
            "x-request-id",
        ];
        assert_eq!(names, expected);
        assert_has(&h, &[("te", "trailers"), ("via", "1.1 g-1")]);
    }

    #[test]
    fn a_client_cannot_say_where_it_comes_from_and_a_proxy_can() {
        let claims = [
            ("x-forwarded-for", "10.0.0.1"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "inner"),
            ("forwarded", "for=10.0.0.1"),
            ("x-real-ip", "10.0.0.1"),
            ("tidegate-device", "admin"),
            ("tidegate-role", "operator"),
        ];
        let id = HeaderValue::from_static("r1");
        let mut from_client = headers(&claims);
        towards_upstream(&mut from_client, &Passing { whence: whence(false), ..passing(&id) });
        assert_eq!(from_client["x-forwarded-for"], "192.0.2.1");
        assert_eq!(from_client["x-forwarded-proto"], "http");
        assert_eq!(from_client["x-forwarded-host"], "gateway.example:8443");
        assert_eq!(from_client["forwarded"], "for=192.0.2.1;proto=http;host=\"gateway.example:8443\"");
        assert!(!from_client.contains_key("x-real-ip"));
        assert!(!from_client.contains_key("tidegate-device") && !from_client.contains_key("tidegate-role"));

        let mut from_proxy = headers(&claims);
        towards_upstream(&mut from_proxy, &Passing { is_proxy: true, whence: whence(false), ..passing(&id) });
        assert_eq!(from_proxy["x-forwarded-for"], "10.0.0.1, 192.0.2.1");
        assert_has(&from_proxy, &[("x-forwarded-proto", "https"), ("x-forwarded-host", "inner")]);
        assert!(from_proxy["forwarded"].to_str().unwrap().starts_with("for=10.0.0.1, for=192.0.2.1;"));
        assert!(!from_proxy.contains_key("tidegate-device"));
    }

    #[test]
    fn an_underscore_is_no_way_round() {
        let mut h =
            headers(&[("tidegate_device", "op"), ("x_forwarded-for", "1"), ("content_length", "5"), ("api_key", "k")]);
        let id = HeaderValue::from_static("r1");
        towards_upstream(&mut h, &passing(&id));
        let left: Vec<&str> = h.keys().map(HeaderName::as_str).filter(|name| name.contains('_')).collect();
        assert_eq!(left, ["api_key"]);
    }

    #[test]
    fn a_host_has_one_reading() {
        let origin: uri::Uri = "/x".parse().unwrap();
        let absolute: uri::Uri = "https://a.example/x".parse().unwrap();
        for good in ["a.example:80", "[::1]:80", ""] {
            assert!(is_host_unambiguous(Version::HTTP_2, &origin, &headers(&[("host", good)])), "{good}");
        }
        for bad in ["a b", "a/b", "user@a", "a\\b", "a?b", "a#b"] {
            assert!(!is_host_unambiguous(Version::HTTP_2, &origin, &headers(&[("host", bad)])), "{bad}");
        }
        assert!(is_host_unambiguous(Version::HTTP_2, &absolute, &headers(&[("host", "a.example")])));
        assert!(!is_host_unambiguous(Version::HTTP_2, &absolute, &headers(&[("host", "b.example")])));
        assert!(is_host_unambiguous(Version::HTTP_2, &absolute, &HeaderMap::new()));
        let with_user: uri::Uri = "https://u@a.example/x".parse().unwrap();
        for version in [Version::HTTP_11, Version::HTTP_2] {
            assert!(!is_host_unambiguous(version, &with_user, &HeaderMap::new()));
        }
    }

    #[test]
    fn a_host_from_elsewhere_has_to_read_as_one() {
        for good in ["a.example:8080", "[::1]:80", "[fe80::1%25eth0]", "a:", "a", ""] {
            assert!(is_authority(good.as_bytes()), "{good:?}");
        }
        for bad in [
            "a:x",
            "a:80:80",
            "::1",
            "[::1",
            "[]",
            "[::1]80",
            "[::1]a:80",
            "a]",
            "a[::1]",
            "a b",
            "a/b",
            "a?b",
            "a#b",
            "u@h",
            "a\tb",
            "\u{e9}",
        ] {
            assert!(!is_authority(bad.as_bytes()), "{bad:?}");
        }
    }

    #[test]
    fn the_upstream_learns_the_device_and_not_its_token() {
        let id = HeaderValue::from_static("r1");
        let mut h = headers(&[("authorization", "Bearer t"), ("host", "g"), ("cookie", "a=1"), ("cookie", "b=2")]);
        let known = Passing {
            device: Some(("d1", "sensor")),
            hide_authorization: true,
            preserve_host: true,
            version: Version::HTTP_2,
            ..passing(&id)
        };
        towards_upstream(&mut h, &known);
        assert!(!h.contains_key("authorization"));
        assert_has(&h, &[("tidegate-device", "d1"), ("tidegate-role", "sensor")]);
        assert_has(&h, &[("host", "gateway.example:8443"), ("cookie", "a=1; b=2"), ("via", "2 g-1")]);
    }

    #[test]
    fn a_trace_that_is_none_is_not_passed_on() {
        let id = HeaderValue::from_static("r1");
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let mut kept = headers(&[("traceparent", good), ("tracestate", "a=1")]);
        towards_upstream(&mut kept, &passing(&id));
        assert_has(&kept, &[("traceparent", good), ("tracestate", "a=1")]);
        for bad in [&[("traceparent", "x"), ("tracestate", "a=1")][..], &[("traceparent", good), ("traceparent", good)]]
        {
            let mut dropped = headers(bad);
            towards_upstream(&mut dropped, &passing(&id));
            assert!(!dropped.contains_key("traceparent") && !dropped.contains_key("tracestate"));
        }
    }

    #[test]
    fn an_answer_loses_its_hop_and_gains_the_request_id() {
        let id = HeaderValue::from_static("r1");
        let mut h =
            headers(&[("connection", "keep-alive"), ("upgrade", "websocket"), ("via", "1.1 cdn"), ("etag", "x")]);
        towards_client(&mut h, via(), Version::HTTP_11, false, &id);
        assert_has(&h, &[("via", "1.1 cdn, 1.1 g-1"), ("x-request-id", "r1"), ("etag", "x")]);
        assert!(!h.contains_key("upgrade") && !h.contains_key("connection"));
        let mut switched = headers(&[("connection", "Upgrade"), ("upgrade", "websocket"), ("x-request-id", "own")]);
        towards_client(&mut switched, via(), Version::HTTP_11, true, &id);
        assert_has(&switched, &[("upgrade", "websocket"), ("connection", "upgrade")]);
        assert_eq!(switched["x-request-id"], "own");
    }

    #[test]
    fn a_loop_is_seen_by_its_own_name() {
        assert!(is_loop(&headers(&[("via", "1.1 a, 2 g-1")]), via()));
        assert!(is_loop(&headers(&[("via", "1.1 a"), ("via", "1.1 g-1 (comment)")]), via()));
        assert!(!is_loop(&headers(&[("via", "1.1 g-12, g-1")]), via()));
    }

    #[test]
    fn a_request_id_is_kept_if_it_can_stand_in_a_log() {
        assert_eq!(request_id(&headers(&[("x-request-id", "abc-1")])).unwrap(), "abc-1");
        for bad in ["", "a b", "\t"] {
            assert_eq!(request_id(&headers(&[("x-request-id", bad)])), None, "{bad:?}");
        }
        let long: &'static str = "x".repeat(129).leak();
        assert_eq!(request_id(&headers(&[("x-request-id", long)])), None);
    }

    #[test]
    fn the_target_names_the_host_before_the_header_does() {
        let absolute: uri::Uri = "http://a.example:80/x".parse().unwrap();
        let origin: uri::Uri = "/x".parse().unwrap();
        let h = headers(&[("host", "b.example")]);
        assert_eq!((host(&absolute, &h), host(&origin, &h)), (Some("a.example:80"), Some("b.example")));
        assert_eq!(host(&origin, &HeaderMap::new()), None);
        assert_eq!(host_value(&absolute, &h).unwrap(), "a.example:80");
        assert_eq!(host_value(&origin, &h).unwrap(), "b.example");
        assert_eq!(host_value(&origin, &HeaderMap::new()), None);
    }

    #[test]
    fn each_host_has_its_own_element() {
        let from = Whence::new(IpAddr::from([192, 0, 2, 1]), false);
        for host in ["a", "a", "b", "a"] {
            let expected = format!("for=192.0.2.1;proto=http;host=\"{host}\"");
            assert_eq!(from.element(Some(&HeaderValue::from_static(host))), expected);
        }
        assert_eq!(from.element(None), "for=192.0.2.1;proto=http");
    }
}

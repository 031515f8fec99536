//! What a request asks for, read from method, path and query alone.
//!
//! A path is split at its slashes before it is decoded, and a slash or a dot segment that hides behind `%` is refused: what a proxy in front saw
//! is then what policy sees here.

use std::borrow::Cow;
use std::time::Duration;

use http::Method;

use crate::gateway::{Address, Part};
use crate::message::Qos;

/// A request to the gateway itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// `POST /auth/challenge`
    Challenge,
    /// `POST /auth/session`
    Session,
    /// `POST /oauth2/token`
    Token,
    /// `POST /telemetry`, `POST /topics/T`, `PUT /state`...
    Publish { target: Target, qos: Qos, retain: bool },
    /// `GET /topics/T`, `GET /state`
    Read { target: Target },
    /// `GET /topics/FILTER` with `Accept: text/event-stream`
    Follow { filter: String },
    /// `GET /command?wait=SECONDS`
    Command { wait: Duration },
}

/// Where a message goes or a value stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The mirror: a topic as MQTT would name it.
    Topic(String),
    /// The device API.
    Device(Part, Option<String>),
}

impl Target {
    pub fn address(&self) -> Address<'_> {
        match self {
            Target::Topic(topic) => Address::from_mqtt(topic),
            Target::Device(part, rest) => Address::Device(*part, rest.as_deref()),
        }
    }
}

/// Why a path of ours is no call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoCall {
    /// The request is malformed.
    Malformed(&'static str),
    /// There is such a resource, with these methods.
    Method(&'static str),
}

/// What stands before the names of the API, as `[gateway] device_api_prefix` says.
#[derive(Clone, Debug)]
pub struct Prefix(String);

impl Prefix {
    pub fn new(configured: &str) -> Self {
        Prefix(configured.trim_end_matches('/').to_owned())
    }

    /// The part of a path below the prefix, without its slash.
    pub fn strip<'a>(&self, path: &'a str) -> Option<&'a str> {
        path.strip_prefix(self.0.as_str())?.strip_prefix('/')
    }

    /// The path as a client knows it; `path` begins with a slash.
    pub fn before(&self, path: &str) -> String {
        format!("{}{path}", self.0)
    }
}

/// Reads a path below the prefix. `None`: no name of ours, so perhaps a route's.
pub fn parse(method: &Method, path: &str, query: Option<&str>, event_stream: bool) -> Option<Result<Call, NoCall>> {
    let (name, rest) = match path.split_once('/') {
        Some((name, rest)) => (name, Some(rest)),
        None => (path, None),
    };
    Some(match (name, rest) {
        ("auth", Some("challenge")) => only(method, Call::Challenge),
        ("auth", Some("session")) => only(method, Call::Session),
        ("oauth2", Some("token")) => only(method, Call::Token),
        ("telemetry", rest) => device_post(method, Part::Telemetry, rest, query),
        ("event", rest) => device_post(method, Part::Event, rest, query),
        ("state", None) => state(method, query),
        ("command", None) => command(method, query),
        ("command", Some(rest)) => answer(method, rest.strip_prefix("res/")?, query),
        ("topics", Some(topic)) => mirror(method, topic, query, event_stream),
        _ => return None,
    })
}

/// Whether the gateway itself answers a path below the prefix, so that no route sees it; with `below`, whatever follows it too.
pub fn is_own(path: &str, below: bool) -> bool {
    let is_name =
        |path: &str| parse(&Method::GET, path, None, false).is_some() || super::device::Target::parse(path).is_some();
    is_name(path) && (!below || is_name(&format!("{path}/x")))
}

fn only(method: &Method, call: Call) -> Result<Call, NoCall> {
    if method == Method::POST { Ok(call) } else { Err(NoCall::Method("POST")) }
}

fn device_post(method: &Method, part: Part, rest: Option<&str>, query: Option<&str>) -> Result<Call, NoCall> {
    if method != Method::POST {
        return Err(NoCall::Method("POST"));
    }
    let rest = rest.map(|rest| segments(rest, false)).transpose()?;
    let Query { qos, retain, .. } = Query::parse(query)?;
    Ok(Call::Publish { target: Target::Device(part, rest), qos, retain: retain.unwrap_or(false) })
}

fn state(method: &Method, query: Option<&str>) -> Result<Call, NoCall> {
    let target = Target::Device(Part::State, None);
    match *method {
        Method::GET | Method::HEAD => Ok(Call::Read { target }),
        // The state is the last value: it is always kept.
        Method::PUT => Ok(Call::Publish { target, qos: Query::parse(query)?.qos, retain: true }),
        _ => Err(NoCall::Method("GET, HEAD, PUT")),
    }
}

fn command(method: &Method, query: Option<&str>) -> Result<Call, NoCall> {
    if method != Method::GET {
        return Err(NoCall::Method("GET"));
    }
    Ok(Call::Command { wait: Duration::from_secs(Query::parse(query)?.wait.unwrap_or(0).into()) })
}

fn answer(method: &Method, request: &str, query: Option<&str>) -> Result<Call, NoCall> {
    if method != Method::POST {
        return Err(NoCall::Method("POST"));
    }
    let Query { qos, status, .. } = Query::parse(query)?;
    let status = status.ok_or(NoCall::Malformed("an answer needs ?status="))?;
    let request = segments(request, false)?;
    Ok(Call::Publish { target: Target::Device(Part::Answer, Some(format!("{request}/{status}"))), qos, retain: false })
}

fn mirror(method: &Method, topic: &str, query: Option<&str>, event_stream: bool) -> Result<Call, NoCall> {
    let topic = segments(topic, true)?;
    if topic.is_empty() {
        return Err(NoCall::Malformed("an empty topic"));
    }
    match *method {
        Method::GET if event_stream && is_filter(&topic) => Ok(Call::Follow { filter: topic }),
        Method::GET if event_stream => Err(NoCall::Malformed("not a topic filter")),
        Method::GET | Method::HEAD => Ok(Call::Read { target: Target::Topic(topic) }),
        Method::POST | Method::PUT => {
            let Query { qos, retain, .. } = Query::parse(query)?;
            Ok(Call::Publish { target: Target::Topic(topic), qos, retain: retain.unwrap_or(false) })
        }
        _ => Err(NoCall::Method("GET, HEAD, POST, PUT")),
    }
}

/// Decodes each segment by itself. Empty ones are levels of a topic like any other, but no names of the device API.
fn segments(path: &str, empty_allowed: bool) -> Result<String, NoCall> {
    let mut decoded = String::with_capacity(path.len());
    for (index, segment) in path.split('/').enumerate() {
        let text = decode(segment)?;
        if text.contains('/') {
            return Err(NoCall::Malformed("an encoded slash"));
        }
        if text == "." || text == ".." {
            return Err(NoCall::Malformed("a dot segment"));
        }
        if text.is_empty() && !empty_allowed {
            return Err(NoCall::Malformed("an empty path segment"));
        }
        if index > 0 {
            decoded.push('/');
        }
        decoded.push_str(&text);
    }
    Ok(decoded)
}

/// RFC 3986 section 2.1, strictly: a `%` without two digits is an error, and so is what is not UTF-8.
fn decode(text: &str) -> Result<Cow<'_, str>, NoCall> {
    if !text.contains('%') {
        return Ok(Cow::Borrowed(text));
    }
    let digit = |byte: Option<u8>| byte.and_then(|b| char::from(b).to_digit(16)).and_then(|d| u8::try_from(d).ok());
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let (high, low) = (digit(bytes.next()), digit(bytes.next()));
            let (high, low) = high.zip(low).ok_or(NoCall::Malformed("a broken percent encoding"))?;
            decoded.push(high << 4 | low);
        } else {
            decoded.push(byte);
        }
    }
    String::from_utf8(decoded).map(Cow::Owned).map_err(|_| NoCall::Malformed("a path that is not UTF-8"))
}

/// MQTT 5 section 4.7.1: `#` only as the last level, `+` only as a whole level.
fn is_filter(text: &str) -> bool {
    let mut levels = text.split('/').peekable();
    while let Some(level) = levels.next() {
        let last = levels.peek().is_none();
        let whole_wildcard = level == "+" || (level == "#" && last);
        if level.contains(['+', '#']) && !whole_wildcard {
            return false;
        }
    }
    // A shared subscription is one session's part of a group's work; an event stream has no way to give work back.
    !text.contains('\0') && text.len() <= 65_535 && !text.starts_with("$share/")
}

/// The parameters we know; others are not ours to judge.
#[derive(Debug, Default)]
struct Query {
    qos: Qos,
    retain: Option<bool>,
    wait: Option<u16>,
    status: Option<String>,
}

impl Query {
    fn parse(query: Option<&str>) -> Result<Self, NoCall> {
        let (mut qos, mut parsed) = (None, Query::default());
        for pair in query.unwrap_or_default().split('&') {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let fresh = match name {
                "qos" => qos
                    .replace(match value {
                        "0" => Qos::AtMostOnce,
                        "1" => Qos::AtLeastOnce,
                        _ => return Err(NoCall::Malformed("qos is 0 or 1")),
                    })
                    .is_none(),
                "retain" => parsed
                    .retain
                    .replace(match value {
                        "1" | "true" => true,
                        "0" | "false" => false,
                        _ => return Err(NoCall::Malformed("retain is 0 or 1")),
                    })
                    .is_none(),
                "wait" => {
                    let seconds = value.parse().map_err(|_| NoCall::Malformed("wait is a number of seconds"))?;
                    parsed.wait.replace(seconds).is_none()
                }
                "status" => {
                    let status = segments(value, false)?;
                    if status.contains('/') {
                        return Err(NoCall::Malformed("status is one word"));
                    }
                    parsed.status.replace(status).is_none()
                }
                _ => true,
            };
            if !fresh {
                return Err(NoCall::Malformed("a parameter given twice"));
            }
        }
        parsed.qos = qos.unwrap_or(Qos::AtLeastOnce);
        Ok(parsed)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn call(method: Method, target: &str) -> Option<Result<Call, NoCall>> {
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (target, None),
        };
        parse(&method, Prefix::new("/").strip(path)?, query, false)
    }

    fn publish(method: Method, target: &str) -> (Target, Qos, bool) {
        match call(method, target) {
            Some(Ok(Call::Publish { target, qos, retain })) => (target, qos, retain),
            other => panic!("{target}: {other:?}"),
        }
    }

    fn device(part: Part, rest: &str) -> Target {
        Target::Device(part, (!rest.is_empty()).then(|| rest.to_owned()))
    }

    #[test]
    fn the_device_api_of_the_contract() {
        let at_least_once = Qos::AtLeastOnce;
        let cases = [
            (Method::POST, "/telemetry", device(Part::Telemetry, ""), at_least_once, false),
            (Method::POST, "/telemetry/temp/in?qos=0", device(Part::Telemetry, "temp/in"), Qos::AtMostOnce, false),
            (Method::POST, "/event/door%20open", device(Part::Event, "door open"), at_least_once, false),
            (Method::PUT, "/state", device(Part::State, ""), at_least_once, true),
            (Method::POST, "/command/res/7?status=200", device(Part::Answer, "7/200"), at_least_once, false),
            (Method::POST, "/topics/a/b?qos=1&retain=1", Target::Topic("a/b".into()), at_least_once, true),
            (Method::PUT, "/topics//a/", Target::Topic("/a/".into()), at_least_once, false),
        ];
        for (method, path, target, qos, retain) in cases {
            assert_eq!(publish(method, path), (target, qos, retain), "{path}");
        }
        assert_eq!(call(Method::POST, "/auth/challenge"), Some(Ok(Call::Challenge)));
        assert_eq!(call(Method::POST, "/auth/session"), Some(Ok(Call::Session)));
        assert_eq!(call(Method::POST, "/oauth2/token"), Some(Ok(Call::Token)));
        assert_eq!(call(Method::GET, "/command?wait=30"), Some(Ok(Call::Command { wait: Duration::from_secs(30) })));
        assert_eq!(call(Method::HEAD, "/state"), Some(Ok(Call::Read { target: device(Part::State, "") })));
    }

    #[test]
    fn other_paths_are_left_to_the_routes() {
        for path in ["/", "/api/v1/x", "/telemetryx", "/auth", "/auth/other", "/topics", "/command/other", "/state/x"] {
            assert_eq!(call(Method::GET, path), None, "{path}");
        }
        let prefix = Prefix::new("/gw");
        assert_eq!(prefix.strip("/gw/telemetry"), Some("telemetry"));
        assert_eq!(prefix.before("/hc/lamp-1/a"), "/gw/hc/lamp-1/a");
        assert_eq!(Prefix::new("/").before("/hc/lamp-1/a"), "/hc/lamp-1/a");
        for path in ["/telemetry", "/gwx/telemetry", "/gw"] {
            assert_eq!(prefix.strip(path), None, "{path}");
        }
    }

    #[test]
    fn what_a_proxy_could_read_otherwise_is_refused() {
        for path in [
            "/topics/a%2Fb",
            "/topics/a%2fb",
            "/topics/../b",
            "/topics/a/%2e%2E/b",
            "/topics/./b",
            "/topics/%zz",
            "/topics/%4",
            "/topics/%ff",
            "/topics/",
            "/telemetry/",
            "/telemetry/a//b",
            "/telemetry?qos=2",
            "/telemetry?qos=1&qos=0",
            "/topics/a?retain=yes",
            "/command/res/7",
            "/command/res/7?status=",
            "/command/res/7?status=a%2Fb",
        ] {
            assert!(matches!(call(Method::POST, path), Some(Err(NoCall::Malformed(_)))), "{path}");
        }
    }

    #[test]
    fn a_wrong_method_names_the_right_ones() {
        assert_eq!(call(Method::GET, "/telemetry"), Some(Err(NoCall::Method("POST"))));
        assert_eq!(call(Method::DELETE, "/topics/a"), Some(Err(NoCall::Method("GET, HEAD, POST, PUT"))));
        assert_eq!(call(Method::POST, "/state"), Some(Err(NoCall::Method("GET, HEAD, PUT"))));
    }

    #[test]
    fn an_event_stream_takes_filters() {
        let follow = |path: &str| parse(&Method::GET, path, None, true);
        assert_eq!(follow("topics/dev/+/telemetry/%23"), Some(Ok(Call::Follow { filter: "dev/+/telemetry/#".into() })));
        for bad in ["topics/%23/a", "topics/a%23", "topics/a+/b", "topics/$share/g/a"] {
            assert_eq!(follow(bad), Some(Err(NoCall::Malformed("not a topic filter"))), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_path_panics_and_no_topic_gains_a_level(path in "[a-z/%0-9A-F.+#?&=]{0,60}") {
            let target = format!("/topics/{path}");
            if let Some(Ok(Call::Publish { target: Target::Topic(topic), .. })) = call(Method::POST, &target) {
                let raw = path.split('?').next().unwrap_or_default();
                prop_assert_eq!(topic.split('/').count(), raw.split('/').count());
            }
        }
    }
}

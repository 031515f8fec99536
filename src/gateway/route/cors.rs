//! `cors`: pages of other origins may use a route (Fetch standard, section 3.2).

use bytes::Bytes;
use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, HeaderMap, HeaderName, HeaderValue, ORIGIN, VARY,
};
use http::{Method, Response, StatusCode, response};

use super::config::{Config, Cors as CorsConfig};
use super::step::{Kept, Step, Visit};

#[derive(Debug)]
pub(super) struct Cors {
    /// `None`: all.
    origins: Option<Vec<Origin>>,
    methods: HeaderValue,
    /// `None`: whatever is asked for.
    headers: Option<HeaderValue>,
    expose: Option<HeaderValue>,
    credentials: bool,
    max_age: HeaderValue,
}

#[derive(Debug)]
enum Origin {
    Exactly(Box<str>),
    /// `https://` and `.example`.
    Below(Box<str>, Box<str>),
}

/// The method that a preflight asks for; `None` if it is none.
pub(super) fn preflighted<'h>(method: &Method, headers: &'h HeaderMap) -> Option<&'h str> {
    if method != Method::OPTIONS || !headers.contains_key(ORIGIN) {
        return None;
    }
    headers.get(ACCESS_CONTROL_REQUEST_METHOD)?.to_str().ok()
}

impl Cors {
    pub fn of(config: &Config) -> Option<Self> {
        let cors: &CorsConfig = config.cors.as_ref()?;
        let any = cors.origins.iter().any(|origin| origin == "*");
        let parse = |origin: &String| match origin.split_once("://*.") {
            Some((scheme, domain)) => Origin::Below(format!("{scheme}://").into(), format!(".{domain}").into()),
            None => Origin::Exactly(origin.as_str().into()),
        };
        let list = |names: &[String]| HeaderValue::try_from(names.join(", ")).ok();
        let mut methods: Vec<String> = ["GET", "HEAD", "POST"].map(str::to_owned).to_vec();
        methods.extend(cors.methods.iter().cloned());
        Some(Cors {
            origins: (!any).then(|| cors.origins.iter().map(parse).collect()),
            methods: list(&methods)?,
            headers: if cors.headers.iter().any(|name| name == "*") { None } else { list(&cors.headers) },
            expose: list(&cors.expose).filter(|names| !names.is_empty()),
            credentials: cors.credentials,
            max_age: HeaderValue::from(cors.max_age_secs),
        })
    }

    fn allows(&self, origin: &HeaderValue) -> bool {
        let Some(origins) = &self.origins else { return true };
        let Ok(origin) = origin.to_str() else { return false };
        origins.iter().any(|allowed| match allowed {
            Origin::Exactly(allowed) => **allowed == *origin,
            Origin::Below(scheme, domain) => origin
                .strip_prefix(&**scheme)
                .is_some_and(|host| host.len() > domain.len() && host.ends_with(&**domain) && !host.contains('/')),
        })
    }

    fn say(&self, headers: &mut HeaderMap, origin: Option<&HeaderValue>) {
        if self.origins.is_some() {
            // A cache must not give one origin the answer for another.
            headers.append(VARY, HeaderValue::from_static("Origin"));
        }
        let Some(origin) = origin.filter(|origin| self.allows(origin)) else { return };
        let named = if self.origins.is_some() { origin.clone() } else { HeaderValue::from_static("*") };
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, named);
        if self.credentials {
            headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
    }
}

impl Step for Cors {
    fn before_admission(&self, visit: &Visit<'_>) -> Option<Response<Bytes>> {
        preflighted(visit.method, visit.headers)?;
        let mut response = Response::new(Bytes::new());
        *response.status_mut() = StatusCode::NO_CONTENT;
        let headers = response.headers_mut();
        // Without the origin's name a browser goes no further.
        if visit.headers.get(ORIGIN).is_some_and(|origin| self.allows(origin)) {
            headers.insert(ACCESS_CONTROL_ALLOW_METHODS, self.methods.clone());
            headers.insert(ACCESS_CONTROL_MAX_AGE, self.max_age.clone());
            let wanted = || visit.headers.get(ACCESS_CONTROL_REQUEST_HEADERS).cloned();
            if let Some(allowed) = self.headers.clone().or_else(wanted).filter(|names| !names.is_empty()) {
                headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, allowed);
            }
        }
        Some(response)
    }

    fn after_upstream(&self, head: &mut response::Parts, kept: &Kept) {
        let preflight = head.headers.contains_key(ACCESS_CONTROL_MAX_AGE) && head.status == StatusCode::NO_CONTENT;
        // Two programs that both speak for the origin would contradict each other.
        for name in OF_UPSTREAM {
            head.headers.remove(name);
        }
        self.say(&mut head.headers, kept.origin.as_ref());
        if let (false, Some(expose)) = (preflight, &self.expose) {
            head.headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, expose.clone());
        }
    }
}

const OF_UPSTREAM: [HeaderName; 3] =
    [ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_EXPOSE_HEADERS];

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::{answered, head, kept};
    use super::*;

    fn cors(value: Value) -> Cors {
        let config: Config = serde_json::from_value(json!({ "name": "r", "to": "x", "cors": value })).unwrap();
        assert_eq!(config.problems(), []);
        Cors::of(&config).unwrap()
    }

    /// Status and headers of a preflight as the client sees them.
    fn preflight(cors: &Cors, origin: &'static str) -> response::Parts {
        let asked = head(
            "OPTIONS",
            "/x",
            &[("origin", origin), ("access-control-request-method", "PUT"), ("access-control-request-headers", "x-a")],
        );
        let visit = Visit {
            method: &asked.method,
            path: "/x",
            query: None,
            host: None,
            peer: [192, 0, 2, 1].into(),
            headers: &asked.headers,
        };
        assert_eq!(preflighted(&asked.method, &asked.headers), Some("PUT"));
        let (mut answer, _) = cors.before_admission(&visit).unwrap().into_parts();
        cors.after_upstream(&mut answer, &Kept::of(&visit));
        answer
    }

    #[test]
    fn a_preflight_is_answered_for_a_known_origin_and_says_nothing_to_others() {
        let cors = cors(json!({ "origins": ["https://app.example", "https://*.lab.example"], "methods": ["PUT"], "headers": ["x-a", "x-b"], "credentials": true }));
        for origin in ["https://app.example", "https://a.b.lab.example"] {
            let answer = preflight(&cors, origin);
            assert_eq!(answer.status, 204);
            assert_eq!(answer.headers["access-control-allow-origin"], origin);
            assert_eq!(answer.headers["access-control-allow-methods"], "GET, HEAD, POST, PUT");
            assert_eq!(answer.headers["access-control-allow-headers"], "x-a, x-b");
            assert_eq!(answer.headers["access-control-allow-credentials"], "true");
            assert_eq!(answer.headers["vary"], "Origin");
        }
        for origin in ["https://evil.example", "http://app.example", "https://lab.example", "https://.lab.example", "https://x/.lab.example", "null"] {
            let answer = preflight(&cors, origin);
            assert!(!answer.headers.keys().any(|name| name.as_str().starts_with("access-control")), "{origin}: {answer:?}");
        }
    }

    #[test]
    fn any_origin_gets_a_star_and_the_headers_it_asks_for() {
        let cors = cors(json!({ "origins": ["*"], "headers": ["*"] }));
        let answer = preflight(&cors, "https://anyone");
        assert_eq!(answer.headers["access-control-allow-origin"], "*");
        assert_eq!(answer.headers["access-control-allow-headers"], "x-a");
        assert!(!answer.headers.contains_key("vary"));
    }

    #[test]
    fn answers_say_what_the_gateway_allows_and_not_what_the_upstream_did() {
        let cors = cors(json!({ "origins": ["https://app.example"], "expose": ["etag"] }));
        let mut answer = answered(&[("access-control-allow-origin", "*"), ("vary", "Accept")]);
        cors.after_upstream(&mut answer, &Kept { origin: Some(HeaderValue::from_static("https://app.example")), ..kept("/") });
        assert_eq!(answer.headers["access-control-allow-origin"], "https://app.example");
        assert_eq!(answer.headers["access-control-expose-headers"], "etag");
        assert_eq!(answer.headers.get_all("vary").iter().count(), 2);
        let mut without = answered(&[("access-control-allow-origin", "*")]);
        cors.after_upstream(&mut without, &kept("/"));
        assert!(!without.headers.contains_key("access-control-allow-origin"));
    }

    #[test]
    fn an_options_request_of_its_own_is_no_preflight() {
        let own = head("OPTIONS", "/", &[("origin", "https://a")]);
        assert_eq!(preflighted(&own.method, &own.headers), None);
    }
}

//! `request_headers` and `response_headers`.

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Response, request, response};

use super::config::{Config, HEADER_WORDS, HeaderEdits};
use super::step::{Kept, Step};
use super::template::Template;

#[derive(Debug)]
pub(super) struct Edits {
    request: Changes,
    response: Changes,
    route: Box<str>,
}

#[derive(Debug, Default)]
struct Changes {
    remove: Vec<HeaderName>,
    set: Vec<(HeaderName, Template)>,
}

impl Edits {
    pub fn of(config: &Config) -> Option<Self> {
        let none = HeaderEdits::default();
        if config.request_headers == none && config.response_headers == none {
            return None;
        }
        Some(Edits {
            request: Changes::of(&config.request_headers),
            response: Changes::of(&config.response_headers),
            route: config.name.as_str().into(),
        })
    }
}

impl Changes {
    /// What is not well formed was reported when the configuration was checked.
    fn of(edits: &HeaderEdits) -> Self {
        let name = |name: &String| HeaderName::try_from(name).ok();
        let set = |(header, text): (&String, &String)| Some((name(header)?, Template::parse(text, &HEADER_WORDS).ok()?));
        Changes { remove: edits.remove.iter().filter_map(name).collect(), set: edits.set.iter().filter_map(set).collect() }
    }

    fn apply(&self, headers: &mut HeaderMap, kept: &Kept, route: &str) {
        for name in &self.remove {
            headers.remove(name);
        }
        if self.set.is_empty() {
            return;
        }
        let peer = kept.peer.to_string();
        let request_id = kept.request_id.as_ref().and_then(|id| id.to_str().ok()).unwrap_or_default();
        let text = |text: &'_ Option<Box<str>>| text.as_deref().unwrap_or_default().to_owned();
        let (device, host, query) = (text(&kept.device), text(&kept.host), text(&kept.query));
        // In the order of `HEADER_WORDS`.
        let values = [&device, &peer, &host, &*kept.path, &query, route, request_id];
        for (name, template) in &self.set {
            let value = template.fill(|index| values.get(index).copied().unwrap_or_default());
            // What a client sent may be no header's value; then there is none, rather than half of one.
            match HeaderValue::try_from(value) {
                Ok(value) => headers.insert(name, value),
                Err(_) => headers.remove(name),
            };
        }
    }
}

impl Step for Edits {
    fn before_upstream(&self, head: &mut request::Parts, kept: &Kept) -> Option<Response<Bytes>> {
        self.request.apply(&mut head.headers, kept, &self.route);
        None
    }

    fn after_upstream(&self, head: &mut response::Parts, kept: &Kept) {
        self.response.apply(&mut head.headers, kept, &self.route);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::{answered, head, kept};
    use super::*;

    #[test]
    fn headers_are_removed_and_set_with_what_is_known() {
        let config: Config = serde_json::from_value(json!({
            "name": "r",
            "request_headers": { "remove": ["Cookie"], "set": { "X-Who": "{device}@{peer} {route} {request_id}", "accept": "{{}}" } },
            "response_headers": { "remove": ["server"], "set": { "strict-transport-security": "max-age=1" } },
        }))
        .unwrap();
        let step = Edits::of(&config).unwrap();
        let mut asked = head("GET", "/", &[("cookie", "a"), ("accept", "*/*")]);
        step.before_upstream(&mut asked, &kept("/"));
        assert!(!asked.headers.contains_key("cookie"));
        assert_eq!(asked.headers["x-who"], "d1@192.0.2.1 r id1");
        assert_eq!(asked.headers["accept"], "{}");
        let mut answer = answered(&[("server", "x")]);
        step.after_upstream(&mut answer, &kept("/"));
        assert!(!answer.headers.contains_key("server"));
        assert_eq!(answer.headers["strict-transport-security"], "max-age=1");
        assert!(Edits::of(&Config::default()).is_none());
    }
}

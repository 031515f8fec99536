//! `rewrite`: the upstream sees another beginning of the path.

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{Response, Uri, request};

use super::config::Config;
use super::step::{Kept, Step};

#[derive(Debug)]
pub(super) struct Rewrite {
    /// Without its last slash.
    to: Box<str>,
    /// Segments of the path that are replaced.
    segments: usize,
}

impl Rewrite {
    pub fn of(config: &Config) -> Option<Self> {
        let to = config.rewrite.as_deref()?.trim_end_matches('/');
        let matched = if config.path.is_empty() { &config.path_prefix } else { &config.path };
        let segments = matched.split('/').filter(|segment| !segment.is_empty()).count();
        Some(Rewrite { to: to.into(), segments })
    }
}

impl Step for Rewrite {
    fn before_upstream(&self, head: &mut request::Parts, _: &Kept) -> Option<Response<Bytes>> {
        let rest = rest(head.uri.path(), self.segments);
        let path = if rest.is_empty() && self.to.is_empty() { "/" } else { "" };
        let query = head.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        let target = format!("{}{rest}{path}{query}", self.to);
        // The parts are those of a valid target; were the whole none, the path stays as it came.
        if let Ok(target) = PathAndQuery::try_from(target) {
            head.uri = Uri::from(target);
        }
        None
    }
}

/// What follows the first `segments` of a path, with its slash. The path is as it came: routes are found by the canonical one, which has the same segments.
pub(super) fn rest(path: &str, segments: usize) -> &str {
    let mut slashes = path.match_indices('/').map(|(at, _)| at);
    slashes.nth(segments).and_then(|at| path.get(at..)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{head, kept};
    use super::*;

    fn rewritten(config: Config, target: &str) -> String {
        let step = Rewrite::of(&config).unwrap();
        let mut head = head("GET", target, &[]);
        assert!(step.before_upstream(&mut head, &kept(target)).is_none());
        head.uri.to_string()
    }

    #[test]
    fn the_prefix_is_replaced_and_the_rest_stays() {
        let strip =
            || Config { path_prefix: "/api/".into(), rewrite: Some("/".into()), to: "x".into(), ..Config::default() };
        assert_eq!(rewritten(strip(), "/api/a/b?c=d"), "/a/b?c=d");
        assert_eq!(rewritten(strip(), "/api"), "/");
        assert_eq!(rewritten(strip(), "/api?x"), "/?x");
        assert_eq!(rewritten(strip(), "/%61pi/a"), "/a", "however it is spelt");
        assert_eq!(rewritten(strip(), "/api/"), "/");
        let deeper = Config { path_prefix: "/a/b".into(), rewrite: Some("/v2/x/".into()), ..strip() };
        assert_eq!(rewritten(deeper, "/a/b/c%20d"), "/v2/x/c%20d");
        let exact = Config { path: "/old".into(), path_prefix: "/".into(), rewrite: Some("/new".into()), ..strip() };
        assert_eq!(rewritten(exact, "/old?q"), "/new?q");
        let added = Config { path_prefix: "/".into(), rewrite: Some("/site".into()), ..strip() };
        assert_eq!(rewritten(added, "/a"), "/site/a");
    }
}

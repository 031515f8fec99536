//! Routes that no request ever reaches, because others take all they would: for `tidegate check`.

use std::cmp::Reverse;

use super::config::Config;
use super::{Host, Path};

/// For each route that is never used: its index, and those of the routes that take its requests, in the order in which they are asked.
pub fn shadowed(configs: &[Config]) -> Vec<(usize, Vec<usize>)> {
    let mut order: Vec<(usize, &Config, Path)> =
        // A tunnel's target is no path, and two routes may well share one.
        (configs.iter().enumerate().filter(|(_, config)| config.connect.is_empty()))
            .map(|(index, config)| (index, config, Path::of(config)))
            .collect();
    order.sort_by_key(|(_, _, path)| Reverse(path.rank()));
    let found = order.iter().enumerate().filter_map(|(at, (index, config, path))| {
        // A shorter prefix is asked later, so only the same path can take everything before it.
        let earlier =
            order.iter().take(at).filter(|(_, other, other_path)| other_path == path && includes(other, config));
        let mut left: Option<Vec<String>> = (!config.methods.is_empty())
            .then(|| config.methods.iter().map(|method| method.to_ascii_uppercase()).collect());
        let mut by = Vec::new();
        for (other_index, other, _) in earlier {
            if other.methods.is_empty() {
                by.push(*other_index);
                return Some((*index, by));
            }
            // All methods are more than can be listed.
            let Some(left) = &mut left else { continue };
            let before = left.len();
            left.retain(|method| !other.methods.iter().any(|taken| taken.eq_ignore_ascii_case(method)));
            if left.len() < before {
                by.push(*other_index);
            }
            if left.is_empty() {
                return Some((*index, by));
            }
        }
        None
    });
    let mut found: Vec<_> = found.collect();
    found.sort_unstable();
    found
}

/// Whether `outer` asks of host and headers no more than `inner` does.
fn includes(outer: &Config, inner: &Config) -> bool {
    Host::of(outer).includes(&Host::of(inner))
        && outer.headers.iter().all(|(name, value)| {
            let same = inner.headers.iter().filter(|(other, _)| other.eq_ignore_ascii_case(name));
            same.map(|(_, other)| other).any(|other| value == "*" || value == other)
        })
}

impl Host {
    fn includes(&self, inner: &Host) -> bool {
        match (self, inner) {
            (Host::Any, _) => true,
            (Host::Below(suffix), Host::Exactly(host)) => host.len() > suffix.len() && host.ends_with(&**suffix),
            (Host::Below(suffix), Host::Below(inner)) => inner.ends_with(&**suffix),
            (Host::Exactly(host), Host::Exactly(inner)) => host == inner,
            (Host::Below(_) | Host::Exactly(_), Host::Any) | (Host::Exactly(_), Host::Below(_)) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn found(routes: serde_json::Value) -> Vec<(usize, Vec<usize>)> {
        shadowed(&serde_json::from_value::<Vec<Config>>(routes).unwrap())
    }

    #[test]
    fn an_equal_route_is_never_used_and_a_longer_path_is_asked_first() {
        assert_eq!(found(json!([{ "path_prefix": "/a" }, { "path_prefix": "/a/" }])), [(1, vec![0])]);
        assert_eq!(found(json!([{ "path_prefix": "/" }, { "path_prefix": "/a" }, { "path": "/a" }])), []);
    }

    #[test]
    fn a_wider_host_takes_the_narrower_ones() {
        let hosts = |first: &str, second: &str| found(json!([{ "host": first }, { "host": second }]));
        for (first, second) in
            [("*", "a.b"), ("*.b", "a.b"), ("*.b", "*.a.b"), ("A.b", "a.B"), ("*", "*.b"), ("*.b", "*.b")]
        {
            assert_eq!(hosts(first, second), [(1, vec![0])], "{first} {second}");
        }
        for (first, second) in [("a.b", "*"), ("a.b", "*.b"), ("*.b", "b"), ("*.a.b", "*.b"), ("*.b", "xb")] {
            assert_eq!(hosts(first, second), [], "{first} {second}");
        }
    }

    #[test]
    fn methods_may_be_taken_by_several() {
        let get = json!({ "methods": ["GET"] });
        let rest = json!({ "methods": ["POST", "PUT"] });
        assert_eq!(found(json!([get, rest, { "methods": ["PUT", "GET"] }])), [(2, vec![0, 1])]);
        assert_eq!(found(json!([get, rest, { "methods": ["GET", "DELETE"] }])), []);
        assert_eq!(found(json!([get, rest, {}])), []);
    }

    #[test]
    fn a_route_that_asks_for_headers_takes_only_who_has_them() {
        let any = json!({ "headers": { "X-A": "*" } });
        let one = json!({ "headers": { "x-a": "1" } });
        assert_eq!(found(json!([any, one])), [(1, vec![0])]);
        assert_eq!(found(json!([{}, one])), [(1, vec![0])]);
        assert_eq!(found(json!([one, any])), []);
        assert_eq!(found(json!([one, {}])), []);
    }
}

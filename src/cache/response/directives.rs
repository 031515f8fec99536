//! `Cache-Control`, read strictly (RFC 9111 section 5.2).

use std::time::Duration;

use http::HeaderMap;
use http::header::{CACHE_CONTROL, PRAGMA};

/// The directives that this cache knows. Numbers are seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Directives {
    pub no_store: bool,
    /// Also with field names, which say less than the directive alone.
    pub no_cache: bool,
    pub private: bool,
    pub public: bool,
    pub must_revalidate: bool,
    pub proxy_revalidate: bool,
    pub only_if_cached: bool,
    pub max_age: Option<u64>,
    pub s_maxage: Option<u64>,
    pub min_fresh: Option<u64>,
    /// Without a value: any.
    pub max_stale: Option<u64>,
    pub stale_while_revalidate: Option<u64>,
    pub stale_if_error: Option<u64>,
}

impl Directives {
    /// Reads all the lines there are. What cannot be read stands for the strictest: a line that is no text for `no-store`, a number that is none for 0,
    /// and of two numbers the lower one counts.
    pub fn of(headers: &HeaderMap) -> Self {
        let mut all = Directives::default();
        for value in headers.get_all(CACHE_CONTROL) {
            match value.to_str() {
                Ok(text) => split(text).for_each(|directive| all.add(directive)),
                Err(_) => all.no_store = true,
            }
        }
        if !headers.contains_key(CACHE_CONTROL) {
            // Section 5.4.
            all.no_cache = headers.get_all(PRAGMA).iter().any(|value| {
                value.to_str().is_ok_and(|text| split(text).any(|pragma| pragma.eq_ignore_ascii_case("no-cache")))
            });
        }
        all
    }

    fn add(&mut self, directive: &str) {
        let (name, value) = match directive.split_once('=') {
            Some((name, value)) => (name.trim(), Some(value.trim().trim_matches('"'))),
            None => (directive, None),
        };
        // RFC 9111 section 1.2.2: what overflows is very long.
        let seconds = || match value.unwrap_or_default() {
            digits if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) => {
                digits.parse().unwrap_or(SECONDS_MAX).min(SECONDS_MAX)
            }
            _ => 0,
        };
        let lower = |known: &mut Option<u64>| *known = Some(known.map_or(seconds(), |known| known.min(seconds())));
        match name.to_ascii_lowercase().as_str() {
            "no-store" => self.no_store = true,
            "no-cache" => self.no_cache = true,
            "private" => self.private = true,
            "public" => self.public = true,
            "must-revalidate" => self.must_revalidate = true,
            "proxy-revalidate" => self.proxy_revalidate = true,
            "only-if-cached" => self.only_if_cached = true,
            "max-age" => lower(&mut self.max_age),
            "s-maxage" => lower(&mut self.s_maxage),
            "min-fresh" => self.min_fresh = Some(seconds()),
            "max-stale" => self.max_stale = Some(value.map_or(SECONDS_MAX, |_| seconds())),
            "stale-while-revalidate" => lower(&mut self.stale_while_revalidate),
            "stale-if-error" => lower(&mut self.stale_if_error),
            _ => {}
        }
    }

    /// Whether a shared cache may keep the answer to a request with credentials (section 3.5), by what the answer says in so many words.
    pub fn is_for_all(&self) -> bool {
        (self.public || self.s_maxage.is_some()) && !self.private
    }
}

/// The members of a list, cut at commas outside quotation marks.
fn split(text: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    text.split(move |c: char| {
        quoted ^= c == '"';
        c == ',' && !quoted
    })
    .map(str::trim)
    .filter(|member| !member.is_empty())
}

pub(super) fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds.min(SECONDS_MAX))
}

/// RFC 9111 section 1.2.2.
pub(super) const SECONDS_MAX: u64 = 1 << 31;

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn of(values: &[&str]) -> Directives {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(CACHE_CONTROL, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        Directives::of(&headers)
    }

    #[test]
    fn names_have_no_case_and_lists_may_have_quotes() {
        let d = of(&["Public, Max-Age=\"60\"", "x=\"a, no-store\", S-MAXAGE=5"]);
        assert_eq!((d.public, d.max_age, d.s_maxage, d.no_store), (true, Some(60), Some(5), false));
        assert!(of(&["PRIVATE=\"set-cookie, x\""]).private);
    }

    #[test]
    fn what_cannot_be_read_is_taken_strictly() {
        assert!(of(&["max-age=5, \u{e9}"]).no_store);
        for bad in ["max-age", "max-age=-1", "max-age=x", "max-age=1.5", "max-age="] {
            assert_eq!(of(&[bad]).max_age, Some(0), "{bad}");
        }
        assert_eq!(of(&["max-age=60, max-age=5"]).max_age, Some(5));
        assert_eq!(of(&["max-age=99999999999999999999999"]).max_age, Some(SECONDS_MAX));
        assert_eq!((of(&["max-stale"]).max_stale, of(&["max-stale=3"]).max_stale), (Some(SECONDS_MAX), Some(3)));
    }

    #[test]
    fn pragma_counts_where_nothing_newer_is_said() {
        let mut headers = HeaderMap::new();
        headers.insert(PRAGMA, HeaderValue::from_static("No-Cache"));
        assert!(Directives::of(&headers).no_cache);
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("max-age=1"));
        assert!(!Directives::of(&headers).no_cache);
    }
}

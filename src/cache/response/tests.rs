//! RFC 9111 and RFC 5861 as tables.

use bytes::Bytes;
use portable_atomic::AtomicU64;

use super::*;

fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        headers.append(*name, HeaderValue::from_static(value));
    }
    headers
}

fn rule(ttl: u32, swr: u32, sie: u32) -> Rule {
    let config =
        Config { ttl_secs: ttl, stale_while_revalidate_secs: swr, stale_if_error_secs: sie, ..Config::default() };
    Rule::new(&config)
}

fn secs(terms: Option<(Terms, Audience)>) -> Option<u64> {
    terms.map(|(terms, _)| terms.fresh.as_secs())
}

/// What is kept, and how long it is fresh; `None`: not kept.
#[test]
fn what_is_kept_and_for_how_long() {
    type Said = &'static [(&'static str, &'static str)];
    let cases: &[(u16, Said, Option<u64>)] = &[
        (200, &[("cache-control", "max-age=60")], Some(60)),
        (200, &[("cache-control", "Max-Age=60")], Some(60)),
        (200, &[("cache-control", "s-maxage=5, max-age=60")], Some(5)),
        (200, &[("cache-control", "max-age=60"), ("expires", "Thu, 01 Jan 1970 00:00:00 GMT")], Some(60)),
        (200, &[("date", "Thu, 01 Jan 2026 00:00:00 GMT"), ("expires", "Thu, 01 Jan 2026 00:01:00 GMT")], Some(60)),
        (200, &[("cache-control", "max-age=0"), ("etag", "\"a\"")], Some(0)),
        (200, &[("cache-control", "no-cache"), ("etag", "\"a\"")], Some(0)),
        // What says nothing gets the route's time, by status.
        (200, &[], Some(7)),
        (301, &[("location", "/x")], Some(7)),
        (404, &[], None),
        (404, &[("cache-control", "max-age=3")], Some(3)),
        (302, &[], None),
        (500, &[("cache-control", "max-age=3")], None),
        (206, &[("cache-control", "max-age=3")], None),
        // No heuristics.
        (200, &[("last-modified", "Thu, 01 Jan 1970 00:00:00 GMT")], Some(7)),
        // Never.
        (200, &[("cache-control", "no-store")], None),
        (200, &[("cache-control", "No-Store, max-age=60")], None),
        (200, &[("cache-control", "private, max-age=60")], None),
        (200, &[("cache-control", "PRIVATE")], None),
        (200, &[("cache-control", "max-age=60, private=\"x\"")], None),
        (200, &[("cache-control", "public, max-age=60"), ("set-cookie", "a=1")], None),
        (200, &[("cache-control", "max-age=60"), ("vary", "*")], None),
        (200, &[("cache-control", "max-age=60"), ("vary", "accept, Cookie")], None),
        (200, &[("cache-control", "max-age=60"), ("vary", "accept, user-agent")], Some(60)),
        (200, &[("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "max-age=60")], None),
        // Of no use at all.
        (200, &[("cache-control", "max-age=0")], None),
        (200, &[("expires", "0")], None),
        (200, &[("pragma", "no-cache")], None),
    ];
    for (status, said, expected) in cases {
        let status = StatusCode::from_u16(*status).unwrap();
        let terms = rule(7, 0, 0).terms(&HeaderMap::new(), false, status, &headers(said));
        assert_eq!(secs(terms), *expected, "{status} {said:?}");
    }
}

#[test]
fn without_a_time_of_the_route_only_answers_that_say_so_are_kept() {
    let ok = StatusCode::OK;
    assert_eq!(secs(rule(0, 0, 0).terms(&HeaderMap::new(), false, ok, &headers(&[("etag", "\"a\"")]))), None);
    assert_eq!(secs(rule(0, 0, 60).terms(&HeaderMap::new(), false, ok, &HeaderMap::new())), None);
    // Of use if the upstream fails, though never fresh.
    let zero = headers(&[("cache-control", "max-age=0")]);
    assert_eq!(secs(rule(0, 0, 60).terms(&HeaderMap::new(), false, ok, &zero)), Some(0));
}

#[test]
fn an_answer_for_one_asker_is_not_for_all() {
    let ok = StatusCode::OK;
    let audience = |asked: &HeaderMap, known, said: &[(&'static str, &'static str)]| {
        rule(7, 0, 0).terms(asked, known, ok, &headers(said)).map(|(_, audience)| audience)
    };
    let bearer = headers(&[("authorization", "Bearer x")]);
    let nothing = HeaderMap::new();
    assert_eq!(audience(&nothing, false, &[("cache-control", "max-age=9")]), Some(Audience::All));
    // RFC 9111 section 3.5, and what a mistake must not open: two ages are no must-revalidate.
    assert_eq!(audience(&bearer, false, &[("cache-control", "max-age=9")]), None);
    assert_eq!(audience(&bearer, false, &[("cache-control", "max-age=9, max-age=10")]), None);
    assert_eq!(audience(&bearer, false, &[]), None);
    assert_eq!(audience(&bearer, false, &[("cache-control", "max-age=9, public")]), Some(Audience::All));
    assert_eq!(audience(&bearer, false, &[("cache-control", "s-maxage=9")]), Some(Audience::All));
    // A device whom the gateway knows.
    assert_eq!(audience(&nothing, true, &[("cache-control", "max-age=9")]), Some(Audience::Asker));
    assert_eq!(audience(&nothing, true, &[]), Some(Audience::Asker));
    assert_eq!(audience(&nothing, true, &[("cache-control", "public, max-age=9")]), Some(Audience::All));
    assert_eq!(audience(&nothing, true, &[("cache-control", "private, max-age=9")]), None);
    // A client that wants nothing kept.
    assert_eq!(audience(&headers(&[("cache-control", "no-store")]), false, &[]), None);
}

#[test]
fn what_forbids_stale_answers_forbids_them() {
    for strict in ["must-revalidate, max-age=1", "proxy-revalidate, max-age=1", "no-cache", "s-maxage=1"] {
        let said = headers(&[("cache-control", strict), ("etag", "\"a\"")]);
        let (terms, _) = rule(7, 60, 60).terms(&HeaderMap::new(), false, StatusCode::OK, &said).unwrap();
        assert_eq!((terms.while_revalidate, terms.if_error), (Duration::ZERO, Duration::ZERO), "{strict}");
        assert!(terms.must_revalidate);
    }
    let said = headers(&[("cache-control", "max-age=1, stale-while-revalidate=2, stale-if-error=3")]);
    let (terms, _) = rule(7, 60, 60).terms(&HeaderMap::new(), false, StatusCode::OK, &said).unwrap();
    assert_eq!((terms.while_revalidate.as_secs(), terms.if_error.as_secs()), (2, 3));
}

/// RFC 9111 section 5.2.1 and RFC 5861: fresh for 10 s, while revalidating for 5 more, on errors for 100 more.
#[test]
fn what_a_request_is_given() {
    let terms = Terms {
        fresh: Duration::from_secs(10),
        while_revalidate: Duration::from_secs(5),
        if_error: Duration::from_secs(100),
        must_revalidate: false,
    };
    let strict = Terms { while_revalidate: Duration::ZERO, if_error: Duration::ZERO, must_revalidate: true, ..terms };
    let ask = |if_error| Use::Ask { if_error };
    let cases = [
        (terms, "", 0, Use::Fresh),
        (terms, "", 9, Use::Fresh),
        (terms, "", 10, Use::WhileRevalidate),
        (terms, "", 15, ask(true)),
        (terms, "", 110, ask(true)),
        (terms, "", 111, ask(false)),
        (terms, "no-cache", 0, ask(true)),
        (terms, "max-age=5", 5, Use::Fresh),
        (terms, "max-age=5", 6, ask(true)),
        (terms, "max-age=0", 1, ask(true)),
        (terms, "min-fresh=5", 5, Use::Fresh),
        (terms, "min-fresh=5", 6, ask(true)),
        (terms, "min-fresh=0", 12, ask(true)),
        (terms, "max-stale", 1000, Use::Fresh),
        (terms, "max-stale=20", 30, Use::Fresh),
        (terms, "max-stale=20", 31, ask(true)),
        (strict, "", 9, Use::Fresh),
        (strict, "", 10, ask(false)),
        (strict, "max-stale", 11, ask(false)),
    ];
    for (terms, asks, age, expected) in cases {
        let asks_for = Directives::of(&headers(&[("cache-control", asks)]));
        assert_eq!(terms.permit(&asks_for, Duration::from_secs(age)), expected, "{asks:?} at {age}");
    }
}

#[test]
fn a_304_and_a_condition_are_matched_by_validators() {
    let kept = headers(&[("etag", "W/\"a\""), ("last-modified", "Thu, 01 Jan 1970 00:00:00 GMT")]);
    assert!(is_about(&kept, &headers(&[("etag", "\"a\"")])));
    assert!(is_about(&kept, &HeaderMap::new()));
    assert!(!is_about(&kept, &headers(&[("etag", "\"b\"")])));
    assert!(!is_about(&HeaderMap::new(), &headers(&[("etag", "\"b\"")])));
    assert!(!is_about(&kept, &headers(&[("last-modified", "Thu, 01 Jan 1970 00:00:01 GMT")])));
    let known = |tags: &'static str, since: Option<&'static str>| {
        let tags: Vec<_> = (!tags.is_empty()).then(|| HeaderValue::from_static(tags)).into_iter().collect();
        is_known(&tags, since.map(HeaderValue::from_static).as_ref(), &kept)
    };
    assert!(known("\"x\", \"a\"", None) && known("*", None) && known("W/\"a\"", None));
    assert!(!known("\"x\"", Some("Thu, 01 Jan 1970 00:00:00 GMT")), "the tag decides alone");
    assert!(known("", Some("Thu, 01 Jan 1970 00:00:00 GMT")) && !known("", None));
}

#[test]
fn a_tag_is_compared_weakly_and_in_lists() {
    let listed = |line| is_listed([&HeaderValue::from_static(line)], Some(b"\"1-7\""));
    for yes in ["\"1-7\"", "W/\"1-7\"", "*", "\"0\", \"1-7\""] {
        assert!(listed(yes), "{yes}");
    }
    assert!(!listed("\"1-70\""));
}

#[test]
fn an_age_that_is_none_is_very_old() {
    assert_eq!(age_of(&headers(&[("age", "5")])).as_secs(), 5);
    assert_eq!(age_of(&HeaderMap::new()).as_secs(), 0);
    for nonsense in ["-1", "x", "99999999999999999999999"] {
        assert_eq!(age_of(&headers(&[("age", nonsense)])).as_secs(), 1 << 31, "{nonsense}");
    }
}

fn entry() -> Entry {
    Entry {
        key: Key { page: 1, variant: 2 },
        url: "http://g/x?y".into(),
        status: StatusCode::OK,
        headers: headers(&[("etag", "\"a\""), ("x", "1"), ("x", "2")]),
        body: Bytes::from_static(b"body"),
        terms: Terms {
            fresh: Duration::from_secs(10),
            while_revalidate: Duration::ZERO,
            if_error: Duration::from_secs(100),
            must_revalidate: false,
        },
        age: Duration::from_secs(3),
        at_ms: 5_000,
        seq: AtomicU64::new(9),
        rest_until_ms: AtomicU64::new(0),
    }
}

#[test]
fn an_entry_survives_the_disk_and_has_grown_older() {
    let entry = entry();
    let bytes = Bytes::from(entry.to_bytes(6_000, 1_000_000));
    let read = Entry::from_bytes(&bytes, entry.key, 100, 1_002_000).unwrap();
    assert_eq!(
        (&read.url, read.status, &read.headers, &read.body),
        (&entry.url, entry.status, &entry.headers, &entry.body)
    );
    assert_eq!((read.terms, read.age(100).as_secs()), (entry.terms, 6));
    assert_eq!(Entry::url_of(&bytes), Ok("http://g/x?y"));
    // The clock was set back: nobody knows how old it is.
    let read = Entry::from_bytes(&bytes, entry.key, 100, 999_999).unwrap();
    assert_eq!(read.permit(&Directives::default(), 100), Use::Ask { if_error: true });
}

#[test]
fn damage_is_found_wherever_it_is() {
    let entry = entry();
    let bytes = entry.to_bytes(0, 0);
    assert!(Entry::from_bytes(&bytes.clone().into(), Key { page: 1, variant: 3 }, 0, 0).is_err());
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1;
        assert!(Entry::from_bytes(&damaged.into(), entry.key, 0, 0).is_err(), "{at}");
        assert!(Entry::from_bytes(&bytes[..at].to_vec().into(), entry.key, 0, 0).is_err(), "{at}");
    }
}

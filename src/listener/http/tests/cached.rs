//! Routes with a cache, through the adapter: what the upstream is asked, and what clients are given.

use std::sync::atomic::AtomicUsize;

use tokio::time::advance;

use super::relay::{Pretend, sent, whole};
use super::*;
use crate::gateway::UpstreamFault;
use crate::units::ByteSize;

/// An upstream that answers by the path: `/r/STATUS/HEADERS`, the headers written as `name=value;...` with ` ` for `+`.
struct Origin {
    upstream: Arc<Pretend>,
    is_down: Arc<std::sync::atomic::AtomicBool>,
}

fn origin() -> Origin {
    let is_down = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (down, count) = (is_down.clone(), AtomicUsize::new(0));
    let upstream = Pretend::new(move |request: Request<_>| {
        let down = down.load(Ordering::Relaxed);
        let n = count.fetch_add(1, Ordering::Relaxed);
        async move {
            if down {
                return Err(UpstreamFault::Unreachable);
            }
            let query = request.uri().query().unwrap_or_default().to_owned();
            let mut response = Response::new(whole(format!("body {n}")));
            for pair in query.split(';').filter(|pair| !pair.is_empty()) {
                let (name, value) = pair.split_once(':').unwrap();
                let value = value.replace('+', " ");
                match name {
                    "status" => *response.status_mut() = value.parse().unwrap(),
                    name => {
                        let name = http::HeaderName::try_from(name).unwrap();
                        response.headers_mut().append(name, HeaderValue::try_from(value).unwrap());
                    }
                }
            }
            let tag = response.headers().get("etag").cloned();
            if tag.is_some() && request.headers().get("if-none-match") == tag.as_ref() {
                *response.status_mut() = http::StatusCode::NOT_MODIFIED;
                *response.body_mut() = whole("");
            }
            Ok(response)
        }
    });
    Origin { upstream, is_down }
}

fn cached(cache: Value) -> (Origin, Fixture) {
    let origin = origin();
    let routes = json!([
        { "name": "r", "path_prefix": "/r", "auth": "none", "to": "cloud", "cache": cache },
        { "name": "maps", "path_prefix": "/maps", "to": "cloud", "cache": cache },
    ]);
    let fixture =
        Fixture::routed(|limits| limits.cache_disk_bytes_max = ByteSize(0), &[], routes, Some(origin.upstream.clone()));
    (origin, fixture)
}

async fn get(fixture: &Fixture, path: &str, headers: &str) -> Answer {
    fixture.connect().ask("GET", path, headers, b"").await
}

fn status_of(answer: &Answer) -> &str {
    answer.headers["cache-status"].as_str()
}

#[tokio::test(start_paused = true)]
async fn a_fresh_answer_is_given_again_and_grows_older() {
    let (origin, fixture) = cached(json!({}));
    let path = "/r/a?cache-control:max-age=60;connection:x-hop;x-hop:1;x-request-id:theirs";
    let first = get(&fixture, path, "").await;
    assert_eq!((first.status, status_of(&first)), (200, "tidegate;fwd=miss;stored;ttl=60"));
    advance(Duration::from_secs(20)).await;
    let second = get(&fixture, path, "user-agent: other\r\n").await;
    assert_eq!((status_of(&second), second.headers["age"].as_str()), ("tidegate;hit;ttl=40", "20"));
    assert_eq!((&second.body, second.body.as_slice()), (&first.body, &b"body 0"[..]));
    assert!(!second.headers.contains_key("x-hop"));
    assert!(second.headers["via"].starts_with("1.1 tidegate-") && !second.headers["via"].contains(','));
    assert!(
        second.headers["x-request-id"] != "theirs" && second.headers["x-request-id"] != first.headers["x-request-id"]
    );
    advance(Duration::from_secs(40)).await;
    assert_eq!(get(&fixture, path, "").await.body, b"body 1");
    assert_eq!(origin.upstream.count(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_must_not_be_kept_is_asked_for_each_time() {
    let (origin, fixture) = cached(json!({ "ttl_secs": 60, "entry_bytes_max": 64 }));
    for (path, headers) in [
        ("/r?cache-control:no-store", ""),
        ("/r?cache-control:private", ""),
        ("/r?set-cookie:a=1", ""),
        ("/r?vary:*", ""),
        ("/r?status:404", ""),
        ("/r?status:500", ""),
        ("/r", "cookie: a=1\r\n"),
        ("/r", "range: bytes=0-1\r\n"),
        ("/r", "cache-control: no-store\r\n"),
        ("/r", "authorization: Bearer x\r\n"),
    ] {
        let before = origin.upstream.count();
        for _ in 0..2 {
            let answer = get(&fixture, path, headers).await;
            assert!(!status_of(&answer).contains("hit"), "{path} {headers}: {answer:?}");
        }
        assert_eq!(origin.upstream.count(), before + 2, "{path} {headers}");
    }
    // The clean one, after all that.
    get(&fixture, "/r", "").await;
    assert!(status_of(&get(&fixture, "/r", "").await).starts_with("tidegate;hit"));
}

#[tokio::test(start_paused = true)]
async fn a_body_above_the_bound_passes_through() {
    let (origin, fixture) = cached(json!({ "ttl_secs": 60, "entry_bytes_max": 4 }));
    for n in 0..2 {
        let answer = get(&fixture, "/r", "").await;
        assert_eq!(answer.body, format!("body {n}").into_bytes());
    }
    assert_eq!(origin.upstream.count(), 2);
}

#[tokio::test(start_paused = true)]
async fn nobody_can_put_something_under_the_key_of_another() {
    let (origin, fixture) = cached(json!({ "ttl_secs": 60 }));
    for poison in [
        "x-original-url: /admin\r\n",
        "x-forwarded-scheme: http\r\n",
        "x-http-method-override: DELETE\r\n",
        "accept-encoding: br\r\n",
        "origin: https://evil.example\r\n",
    ] {
        get(&fixture, "/r/p", poison).await;
    }
    let asked = origin.upstream.count();
    assert_eq!(get(&fixture, "/r/p", "").await.body, format!("body {asked}").into_bytes());
    // What is not in the key does not arrive.
    get(&fixture, "/r/q", "referer: x\r\nuser-agent: <script>\r\nx-forwarded-for: 1.2.3.4\r\nx-request-id: evil\r\n")
        .await;
    let seen = origin.upstream.last();
    for name in ["referer", "user-agent", "x-forwarded-for", "forwarded", "x-request-id", "content-length"] {
        assert!(!seen.headers.contains_key(name), "{name}");
    }
    assert_eq!(sent(&seen, "x-forwarded-host"), "gateway");
}

#[tokio::test(start_paused = true)]
async fn languages_do_not_mix() {
    let (origin, fixture) = cached(json!({}));
    let path = "/r?cache-control:max-age=60;vary:Accept-Language";
    let german = get(&fixture, path, "accept-language: de\r\n").await;
    let english = get(&fixture, path, "accept-language: en\r\n").await;
    assert_ne!(german.body, english.body);
    assert_eq!(get(&fixture, path, "accept-language: de\r\n").await.body, german.body);
    assert_eq!(origin.upstream.count(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_stale_answer_is_compared_and_lives_on() {
    let (origin, fixture) = cached(json!({}));
    let path = "/r?cache-control:max-age=10;etag:v1";
    get(&fixture, path, "").await;
    advance(Duration::from_secs(11)).await;
    let again = get(&fixture, path, "").await;
    assert_eq!((again.status, again.body.as_slice()), (200, &b"body 0"[..]));
    assert_eq!(status_of(&again), "tidegate;fwd=stale;fwd-status=304;ttl=10");
    assert_eq!(sent(&origin.upstream.last(), "if-none-match"), "v1");
    assert_eq!(status_of(&get(&fixture, path, "").await), "tidegate;hit;ttl=10");
    assert_eq!(origin.upstream.count(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_has_it_gets_304_from_here() {
    let (origin, fixture) = cached(json!({}));
    let path = "/r?cache-control:max-age=10;etag:v1";
    for _ in 0..2 {
        let mut peer = fixture.connect();
        peer.send("GET", path, "if-none-match: W/v1\r\n", b"").await;
        let answer = peer.answer().await;
        assert_eq!((answer.status, answer.body.len(), answer.headers["etag"].as_str()), (304, 0, "v1"));
    }
    assert_eq!(get(&fixture, path, "if-none-match: v2\r\n").await.status, 200);
    assert_eq!(origin.upstream.count(), 1);
    assert!(!origin.upstream.last().headers.contains_key("if-none-match"), "the whole answer was fetched");
}

#[tokio::test(start_paused = true)]
async fn what_the_client_asks_of_the_cache_counts() {
    let (origin, fixture) = cached(json!({}));
    let path = "/r?cache-control:max-age=60";
    let alone = get(&fixture, path, "cache-control: only-if-cached\r\n").await;
    assert_eq!((alone.status, origin.upstream.count()), (504, 0));
    get(&fixture, path, "").await;
    assert_eq!(get(&fixture, path, "cache-control: only-if-cached\r\n").await.body, b"body 0");
    assert_eq!(get(&fixture, path, "cache-control: no-cache\r\n").await.body, b"body 1");
    assert_eq!(get(&fixture, path, "pragma: no-cache\r\n").await.body, b"body 2");
    assert_eq!(get(&fixture, path, "").await.body, b"body 2", "what was fetched anew is kept");
}

#[tokio::test(start_paused = true)]
async fn while_the_upstream_is_down_the_last_answer_is_given() {
    let (origin, fixture) = cached(json!({ "ttl_secs": 5, "stale_if_error_secs": 600 }));
    get(&fixture, "/r/state", "").await;
    origin.is_down.store(true, Ordering::Relaxed);
    advance(Duration::from_secs(30)).await;
    let stale = get(&fixture, "/r/state", "").await;
    assert_eq!((stale.status, stale.body.as_slice()), (200, &b"body 0"[..]));
    assert_eq!((status_of(&stale), stale.headers["age"].as_str()), ("tidegate;hit;ttl=-25", "30"));
    assert_eq!(origin.upstream.count(), 2);
    // For a while nobody waits for the same failure again.
    get(&fixture, "/r/state", "").await;
    assert_eq!(origin.upstream.count(), 2);
    assert_eq!(get(&fixture, "/r/other", "").await.status, 502);
    advance(Duration::from_secs(576)).await;
    assert_eq!(get(&fixture, "/r/state", "").await.status, 502, "too old for that");
    origin.is_down.store(false, Ordering::Relaxed);
    assert_eq!(get(&fixture, "/r/state", "").await.status, 200);
}

#[tokio::test(start_paused = true)]
async fn an_error_of_the_upstream_is_no_better_than_a_stale_answer() {
    let status = Arc::new(AtomicUsize::new(200));
    let says = status.clone();
    let upstream = Pretend::new(move |_| {
        let status = u16::try_from(says.load(Ordering::Relaxed)).unwrap();
        async move {
            let mut response = Response::new(whole("x"));
            *response.status_mut() = http::StatusCode::from_u16(status).unwrap();
            Ok(response)
        }
    });
    let routes = json!([{ "name": "r", "auth": "none", "to": "cloud",
                          "cache": { "ttl_secs": 5, "stale_if_error_secs": 60, "stale_retry_secs": 0 } }]);
    let fixture = Fixture::routed(|limits| limits.cache_disk_bytes_max = ByteSize(0), &[], routes, Some(upstream));
    get(&fixture, "/r", "").await;
    advance(Duration::from_secs(6)).await;
    for (now, expected) in [(503, 200), (500, 200), (403, 403), (503, 503)] {
        status.store(now, Ordering::Relaxed);
        let answer = get(&fixture, "/r", "").await;
        assert_eq!(answer.status, expected, "{now}: 403 replaces what there was");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stale_answer_is_given_while_a_new_one_is_fetched() {
    let (origin, fixture) = cached(json!({ "stale_while_revalidate_secs": 60 }));
    let path = "/r?cache-control:max-age=5";
    get(&fixture, path, "").await;
    advance(Duration::from_secs(6)).await;
    let stale = get(&fixture, path, "").await;
    assert_eq!((stale.body.as_slice(), status_of(&stale)), (&b"body 0"[..], "tidegate;hit;ttl=-1"));
    while origin.upstream.count() < 2 {
        tokio::task::yield_now().await;
    }
    tokio::task::yield_now().await;
    assert_eq!(get(&fixture, path, "").await.body, b"body 1");
    assert_eq!(origin.upstream.count(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_hundred_at_once_are_one_request_to_the_upstream() {
    let (go, gate) = tokio::sync::watch::channel(false);
    let upstream = Pretend::new(move |_| {
        let mut gate = gate.clone();
        async move {
            gate.wait_for(|go| *go).await.unwrap();
            Ok(Response::new(whole("one")))
        }
    });
    let routes = json!([{ "name": "r", "auth": "none", "to": "cloud", "cache": { "ttl_secs": 5 } }]);
    let fixture =
        Fixture::routed(|limits| limits.cache_disk_bytes_max = ByteSize(0), &[], routes, Some(upstream.clone()));
    let mut peers: Vec<Peer> = (0..100).map(|_| fixture.connect()).collect();
    for peer in &mut peers {
        peer.send("GET", "/r", "", b"").await;
    }
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    assert_eq!(upstream.count(), 1);
    go.send(true).unwrap();
    let mut shared = 0;
    for peer in &mut peers {
        let answer = peer.answer().await;
        assert_eq!(answer.body, b"one");
        shared += usize::from(status_of(&answer).contains("collapsed"));
    }
    assert_eq!((upstream.count(), shared), (1, 99));
}

#[tokio::test(start_paused = true)]
async fn who_fetches_may_go_away_and_who_waits_too_long_fetches() {
    let first = Arc::new(AtomicUsize::new(0));
    let asked = first.clone();
    let upstream = Pretend::new(move |_| {
        let n = asked.fetch_add(1, Ordering::Relaxed);
        async move {
            if n == 0 {
                std::future::pending::<()>().await;
            }
            Ok(Response::new(whole(format!("{n}"))))
        }
    });
    let routes = json!([{ "name": "r", "auth": "none", "to": "cloud", "cache": { "ttl_secs": 5 } }]);
    let fixture = Fixture::routed(
        |limits| (limits.cache_wait_ms, limits.cache_disk_bytes_max) = (100, ByteSize(0)),
        &[],
        routes,
        Some(upstream.clone()),
    );
    let mut hanging = fixture.connect();
    hanging.send("GET", "/r", "", b"").await;
    while first.load(Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
    // The clock of the test goes on when nothing else does.
    let patient = get(&fixture, "/r", "").await;
    assert_eq!((patient.body.as_slice(), upstream.count()), (&b"1"[..], 2));
    drop(hanging);
    assert_eq!(get(&fixture, "/r", "").await.body, b"1");
}

#[tokio::test(start_paused = true)]
async fn a_change_makes_what_is_kept_invalid() {
    let (origin, fixture) = cached(json!({ "ttl_secs": 60 }));
    get(&fixture, "/r/a", "").await;
    get(&fixture, "/r/b", "").await;
    fixture.connect().ask("POST", "/r/a?status:500", "", b"x").await;
    fixture.connect().ask("OPTIONS", "/r/a", "", b"").await;
    assert_eq!(get(&fixture, "/r/a", "").await.body, b"body 0");
    fixture.connect().ask("DELETE", "/r/%61", "", b"").await;
    assert_eq!(get(&fixture, "/r/a", "").await.body, b"body 5");
    assert_eq!(get(&fixture, "/r/b", "").await.body, b"body 1");
    assert_eq!(origin.upstream.count(), 6);
}

#[tokio::test(start_paused = true)]
async fn what_is_purged_is_asked_for_again() {
    let (origin, fixture) = cached(json!({ "ttl_secs": 60 }));
    for path in ["/r/a/1", "/r/a/2", "/r/b"] {
        get(&fixture, path, "").await;
    }
    let cached = fixture.gateway.cached();
    assert_eq!((cached.purge("http://gateway/r/b", false).memory, cached.purge("/r/b", false).memory), (1, 0));
    assert_eq!((cached.purge("http://other/r/a", true).memory, cached.purge("/r/a/", true).memory), (0, 2));
    for path in ["/r/a/1", "/r/a/2", "/r/b"] {
        get(&fixture, path, "").await;
    }
    assert_eq!(origin.upstream.count(), 6);
    get(&fixture, "/r/b", "").await;
    assert_eq!((origin.upstream.count(), cached.purge("/nothing", false).memory), (6, 0));
    assert!(status_of(&get(&fixture, "/r/b", "").await).contains("hit"), "what is not meant stays");
}

#[tokio::test]
async fn a_devices_answer_is_its_own_unless_it_says_that_it_is_public() {
    let (origin, fixture) = cached(json!({ "ttl_secs": 60 }));
    let (a, b) = (bearer(&fixture.token("a").await), bearer(&fixture.token("b").await));
    let first = get(&fixture, "/maps/x", &a).await;
    assert_eq!(first.status, 200);
    assert!(!origin.upstream.last().headers.contains_key("authorization"));
    assert_ne!(get(&fixture, "/maps/x", &b).await.body, first.body);
    assert_eq!(get(&fixture, "/maps/x", &a).await.body, first.body);
    assert_eq!(origin.upstream.count(), 2);
    let public = "/maps/y?cache-control:public,+max-age=60";
    let shared = get(&fixture, public, &a).await;
    assert_eq!(get(&fixture, public, &b).await.body, shared.body);
    assert_eq!(get(&fixture, public, "").await.status, 401, "a stranger is asked who he is before anything else");
    assert_eq!(origin.upstream.count(), 3);
}

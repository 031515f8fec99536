//! What a route says about its requests and answers, through the adapter.

use super::relay::{Pretend, sent};
use super::*;

fn routed(route: Value) -> (Arc<Pretend>, Fixture) {
    let upstream = Pretend::echo();
    let mut whole = json!({ "name": "r", "path_prefix": "/r", "auth": "none" });
    whole.as_object_mut().unwrap().extend(route.as_object().unwrap().clone());
    let fixture = Fixture::routed(|_| {}, &[], json!([whole]), Some(upstream.clone()));
    (upstream, fixture)
}

#[tokio::test]
async fn a_prefix_is_stripped_and_headers_are_edited() {
    let (upstream, fixture) = routed(json!({
        "to": "cloud", "rewrite": "/",
        "request_headers": { "set": { "x-gateway": "{route} {peer}", "x-request-id": "mine" }, "remove": ["cookie"] },
        "response_headers": { "set": { "x-frame-options": "DENY" }, "remove": ["x-upstream"] },
    }));
    let mut peer = fixture.connect();
    let answer = peer.ask("GET", "/r/a?b", "cookie: c\r\n", b"").await;
    assert_eq!((answer.status, answer.headers["x-frame-options"].as_str()), (200, "DENY"));
    assert!(!answer.headers.contains_key("x-upstream"));
    let asked = upstream.last();
    assert_eq!((asked.uri.to_string().as_str(), sent(&asked, "x-gateway")), ("/a?b", "r 192.0.2.1"));
    assert_eq!(sent(&asked, "x-request-id"), "mine");
    assert!(!asked.headers.contains_key("cookie"));
}

#[tokio::test]
async fn redirects_and_fixed_answers_need_no_upstream() {
    let (upstream, fixture) = routed(json!({ "redirect": { "to": "https://{host}{path}{query}" } }));
    let answer = fixture.connect().ask("GET", "/r/x?y", "", b"").await;
    assert_eq!((answer.status, answer.headers["location"].as_str()), (308, "https://gateway/r/x?y"));
    assert_eq!(upstream.count(), 0);

    let (_, fixture) = routed(json!({ "answer": { "status": 503, "body": "back soon" } }));
    let mut peer = fixture.connect();
    let answer = peer.ask("GET", "/r", "", b"").await;
    assert_eq!((answer.status, &answer.body[..]), (503, &b"back soon"[..]));
    // A body that nobody reads does not stand in the way of the next request.
    assert_eq!(peer.ask("POST", "/r", "", &[b'x'; 1000]).await.status, 503);
    let head = peer.ask("GET", "/r", "", b"").await;
    assert_eq!(head.headers["content-type"], "text/plain; charset=utf-8");
}

#[tokio::test]
async fn a_fixed_answer_for_devices_is_for_devices() {
    let (_, fixture) = routed(json!({ "answer": { "body": "secret" }, "auth": "device" }));
    assert_eq!(fixture.connect().ask("GET", "/r", "", b"").await.status, 401);
}

#[tokio::test]
async fn cors_is_answered_before_anybody_is_asked_who_they_are_and_stands_on_refusals() {
    let (upstream, fixture) = routed(
        json!({ "to": "cloud", "auth": "device", "methods": ["PUT"], "cors": { "origins": ["https://app.example"], "methods": ["PUT"] } }),
    );
    let mut peer = fixture.connect();
    let origin = "origin: https://app.example\r\n";
    let asks = format!("{origin}access-control-request-method: PUT\r\n");
    let preflight = peer.ask("OPTIONS", "/r", &asks, b"").await;
    assert_eq!(
        (preflight.status, preflight.headers["access-control-allow-origin"].as_str()),
        (204, "https://app.example")
    );
    assert_eq!(preflight.headers["access-control-allow-methods"], "GET, HEAD, POST, PUT");
    let refused = peer.ask("PUT", "/r", origin, b"").await;
    assert_eq!((refused.status, refused.headers["access-control-allow-origin"].as_str()), (401, "https://app.example"));
    let stranger = peer.ask("OPTIONS", "/r", &asks.replace("app", "evil"), b"").await;
    assert!(!stranger.headers.contains_key("access-control-allow-origin"));
    assert_eq!(upstream.count(), 0);
}

#[tokio::test]
async fn a_routes_rate_is_told_with_every_answer_and_kept() {
    let (upstream, fixture) = routed(json!({ "to": "cloud", "rate": "2/m", "rate_by": "header:x-key" }));
    let mut peer = fixture.connect();
    let first = peer.ask("GET", "/r", "x-key: a\r\n", b"").await;
    assert_eq!((first.status, first.headers["ratelimit-policy"].as_str()), (200, "\"r\";q=2;w=60"));
    assert_eq!(first.headers["ratelimit"], "\"r\";r=1;t=30");
    peer.ask("GET", "/r", "x-key: a\r\n", b"").await;
    let third = peer.ask("GET", "/r", "x-key: a\r\n", b"").await;
    assert_eq!((third.status, third.headers["retry-after"].as_str()), (429, "30"));
    assert!(third.headers["ratelimit"].starts_with("\"r\";r=0;t="), "{third:?}");
    assert_eq!(peer.ask("GET", "/r", "x-key: b\r\n", b"").await.status, 200, "another key has its own");
    assert_eq!(upstream.count(), 3);
}

#[tokio::test]
async fn a_sliding_rate_holds_and_is_told_alike() {
    let (upstream, fixture) = routed(json!({ "to": "cloud", "rate": "2/h sliding", "rate_by": "header:x-key" }));
    let mut peer = fixture.connect();
    let first = peer.ask("GET", "/r", "x-key: a\r\n", b"").await;
    assert_eq!((first.status, first.headers["ratelimit-policy"].as_str()), (200, "\"r\";q=2;w=3600"));
    let left = first.headers["ratelimit"].strip_prefix("\"r\";r=1;t=").and_then(|t| t.parse::<u32>().ok());
    assert!(left.is_some_and(|t| (3600..=4115).contains(&t)), "{first:?}");
    peer.ask("GET", "/r", "x-key: a\r\n", b"").await;
    let third = peer.ask("GET", "/r", "x-key: a\r\n", b"").await;
    assert_eq!(third.status, 429);
    assert!(third.headers["retry-after"].parse::<u32>().is_ok_and(|t| (3600..=4115).contains(&t)), "{third:?}");
    assert!(third.headers["ratelimit"].starts_with("\"r\";r=0;t="), "{third:?}");
    assert_eq!(peer.ask("GET", "/r", "x-key: b\r\n", b"").await.status, 200, "another key has its own");
    assert_eq!(upstream.count(), 3);
}

#[tokio::test]
async fn a_route_may_be_closed_to_networks() {
    let (upstream, fixture) = routed(json!({ "to": "cloud", "deny": ["192.0.2.0/24"] }));
    assert_eq!(fixture.connect().ask("GET", "/r", "", b"").await.status, 403);
    let (_, open) = routed(json!({ "to": "cloud", "allow": ["192.0.2.0/24"] }));
    assert_eq!(open.connect().ask("GET", "/r", "", b"").await.status, 200);
    assert_eq!(upstream.count(), 0);
}

#[tokio::test]
async fn headers_choose_the_route() {
    let upstream = Pretend::echo();
    let routes = json!([
        { "name": "new", "headers": { "x-version": "2" }, "to": "new", "auth": "none" },
        { "name": "old", "to": "old", "auth": "none" },
        { "name": "exact", "path": "/version", "answer": { "body": "1" }, "auth": "none" },
    ]);
    let fixture = Fixture::routed(|_| {}, &[], routes, Some(upstream.clone()));
    let mut peer = fixture.connect();
    peer.ask("GET", "/", "x-version: 2\r\n", b"").await;
    peer.ask("GET", "/", "", b"").await;
    assert_eq!(upstream.to.lock().unwrap()[..], ["new", "old"]);
    assert_eq!(peer.ask("GET", "/version", "", b"").await.body, b"1");
}

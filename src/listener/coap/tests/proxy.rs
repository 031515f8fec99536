//! Requests along routes to HTTP upstreams, of which this one is played by the test.

use std::future::Future;
use std::pin::Pin;

use bytes::Bytes;
use parking_lot::Mutex;

use super::*;
use crate::gateway::{RouteAuth, RouteConfig, UpstreamFault};
use crate::listener::{RelayFault, Relayed};

type Reply = Box<dyn Fn(&Relayed) -> Result<http::Response<Bytes>, RelayFault> + Send + Sync>;

/// An upstream that answers by a function and remembers what it was asked.
struct Upstream {
    asked: Mutex<Vec<String>>,
    reply: Reply,
}

impl Relay for Upstream {
    fn relay(
        &self,
        relayed: Relayed,
    ) -> Pin<Box<dyn Future<Output = Result<http::Response<Bytes>, RelayFault>> + Send>> {
        let request = &relayed.request;
        let device = relayed.device.as_ref().map_or("nobody", |device| device.id.as_str());
        self.asked.lock().push(format!("{} {} by {device}", request.method(), request.uri()));
        let reply = (self.reply)(&relayed);
        Box::pin(async move { reply })
    }
}

fn route(path_prefix: &str, auth: RouteAuth) -> RouteConfig {
    let text = serde_json::json!({"name": path_prefix, "path_prefix": path_prefix, "to": "cloud"});
    RouteConfig { auth, ..serde_json::from_value(text).unwrap() }
}

fn fixture(
    reply: impl Fn(&Relayed) -> Result<http::Response<Bytes>, RelayFault> + Send + Sync + 'static,
) -> (Fixture, Arc<Upstream>) {
    let upstream = Arc::new(Upstream { asked: Mutex::default(), reply: Box::new(reply) });
    let routes = Routes::new(&[route("/api/", RouteAuth::Device), route("/open/", RouteAuth::None)]);
    (Fixture::with_routes(routes, upstream.clone()), upstream)
}

fn response(status: u16, headers: &[(&'static str, &'static str)], body: &'static str) -> http::Response<Bytes> {
    let mut response = http::Response::new(Bytes::from_static(body.as_bytes()));
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap();
    for (name, value) in headers {
        response.headers_mut().append(*name, http::HeaderValue::from_static(value));
    }
    response
}

#[tokio::test]
async fn a_device_reaches_an_upstream_by_route_and_policy() {
    let (fixture, upstream) = fixture(|relayed| {
        assert_eq!(relayed.request.headers()["content-type"], "application/json");
        assert_eq!(relayed.request.headers()["accept"], "application/cbor");
        assert_eq!(&relayed.request.body()[..], b"{}");
        Ok(response(201, &[("content-type", "application/cbor"), ("cache-control", "max-age=7")], "made"))
    });
    let (mut peer, t) = fixture.device("a").await;
    let ask = post(&format!("api/a/x y?q=1&t={t}&r")).payload(b"{}");
    let ask = ask.option(CoapOption::ContentFormat, &[50]).option(CoapOption::Accept, &[60]);
    let answer = peer.ask(ask).await;
    assert_eq!((code(&answer).as_str(), &answer.payload[..]), ("2.01", &b"made"[..]));
    assert_eq!(option(&answer, CoapOption::ContentFormat), Some(vec![60]));
    assert_eq!(option(&answer, CoapOption::MaxAge), Some(vec![7]));
    // The token is the gateway's and goes no further.
    assert_eq!(*upstream.asked.lock(), ["POST /api/a/x%20y?q=1&r by a"]);
    assert_eq!(code(&peer.ask(get(&format!("api/b/x?t={t}"))).await), "4.03", "no rule for another device's path");
    assert_eq!(code(&peer.ask(request(RequestType::Delete, &format!("api/a/x?t={t}"))).await), "4.03");
    let mut stranger = fixture.peer().await;
    assert_eq!(code(&stranger.ask(get("api/a/x")).await), "4.01");
    assert_eq!(upstream.asked.lock().len(), 1);
    fixture.stop().await;
}

#[tokio::test]
async fn an_answer_that_the_asker_has_already_is_2_03_and_a_long_one_is_asked_for_once() {
    let long: &'static str = "0123456789".repeat(300).leak();
    let (fixture, upstream) = fixture(move |relayed| {
        let body = if relayed.request.uri().path().ends_with("long") { long } else { "short" };
        Ok(response(200, &[("etag", "\"v1\""), ("content-type", "text/plain")], body))
    });
    let (mut peer, t) = fixture.device("a").await;
    let first = peer.ask(get(&format!("open/x?t={t}"))).await;
    let tag = option(&first, CoapOption::ETag).unwrap();
    let again = peer.ask(get(&format!("open/x?t={t}")).option(CoapOption::ETag, &tag)).await;
    assert_eq!((code(&again).as_str(), again.payload.len()), ("2.03", 0));
    upstream.asked.lock().clear();
    let mut whole = Vec::new();
    let mut tags = Vec::new();
    for number in 0..3u8 {
        let ask = get(&format!("open/long?t={t}"));
        let ask = if number == 0 { ask } else { ask.option(CoapOption::Block2, &[number << 4 | 6]) };
        let block = peer.ask(ask).await;
        assert_eq!(code(&block), "2.05");
        tags.push(option(&block, CoapOption::ETag));
        whole.extend(block.payload);
    }
    assert_eq!(whole, long.as_bytes());
    assert!(tags.iter().all(|tag| *tag == tags[0] && tag.is_some()), "blocks of one version say so");
    assert_eq!(upstream.asked.lock().len(), 1);
    fixture.stop().await;
}

#[tokio::test]
async fn what_upstreams_say_no_to_has_its_code() {
    let (fixture, _) = fixture(|relayed| match relayed.request.uri().path() {
        "/open/down" => Err(RelayFault::Upstream(UpstreamFault::Unreachable)),
        "/open/none" => Err(RelayFault::Upstream(UpstreamFault::Unavailable)),
        "/open/slow" => Err(RelayFault::Upstream(UpstreamFault::Timeout)),
        "/open/huge" => Err(RelayFault::AnswerTooLarge),
        path => {
            let status = path.rsplit('/').next().unwrap().parse().unwrap();
            Ok(response(status, &[("retry-after", "9")], "why"))
        }
    });
    let mut peer = fixture.peer().await;
    for (path, expected) in [
        ("down", "5.02"),
        ("none", "5.03"),
        ("slow", "5.04"),
        ("huge", "5.02"),
        ("204", "2.05"),
        ("302", "5.02"),
        ("304", "2.03"),
        ("400", "4.00"),
        ("401", "4.01"),
        ("403", "4.03"),
        ("404", "4.04"),
        ("405", "4.05"),
        ("406", "4.06"),
        ("409", "4.09"),
        ("410", "4.04"),
        ("412", "4.12"),
        ("413", "4.13"),
        ("415", "4.15"),
        ("418", "4.00"),
        ("422", "4.22"),
        ("429", "4.29"),
        ("500", "5.00"),
        ("501", "5.01"),
        ("502", "5.02"),
        ("503", "5.03"),
        ("504", "5.04"),
        ("599", "5.00"),
    ] {
        let answer = peer.ask(get(&format!("open/{path}"))).await;
        assert_eq!(code(&answer), expected, "{path}");
        if path == "503" {
            assert_eq!(option(&answer, CoapOption::MaxAge), Some(vec![9]));
        }
    }
    fixture.stop().await;
}

#[tokio::test]
async fn an_upstreams_error_is_a_diagnostic_if_it_is_text_and_itself_if_it_has_a_format() {
    let (fixture, _) = fixture(|relayed| {
        let mut refusal = response(404, &[], "why not");
        match relayed.request.uri().path() {
            "/open/json" => {
                refusal.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"))
            }
            "/open/noise" => {
                *refusal.body_mut() = Bytes::from_static(b"\xff\xfe");
                None
            }
            _ => None,
        };
        Ok(refusal)
    });
    let mut peer = fixture.peer().await;
    for (path, format, payload) in [("text", None, "why not"), ("json", Some(vec![50]), "why not"), ("noise", None, "")]
    {
        let answer = peer.ask(get(&format!("open/{path}"))).await;
        assert_eq!((code(&answer).as_str(), &answer.payload[..]), ("4.04", payload.as_bytes()), "{path}");
        assert_eq!(option(&answer, CoapOption::ContentFormat), format, "{path}");
    }
    fixture.stop().await;
}

#[tokio::test]
async fn what_http_cannot_express_is_said_before_anybody_is_asked() {
    let (fixture, upstream) = fixture(|_| Ok(response(200, &[], "")));
    let mut peer = fixture.peer().await;
    let unknown = [0xfd, 0xe8];
    for (ask, expected) in [
        (put("open/x").option(CoapOption::ContentFormat, &unknown).payload(b"x"), "4.15"),
        (get("open/x").option(CoapOption::Accept, &unknown), "4.06"),
        (put("open/x").option(CoapOption::IfMatch, &[1; 8]).payload(b"x"), "5.01"),
        (get("open/x").option(CoapOption::Unknown(16), &[1]), "5.08"),
        (get("open/x").option(CoapOption::Unknown(16), &[0]), "4.00"),
    ] {
        assert_eq!(code(&peer.ask(ask).await), expected);
    }
    assert!(upstream.asked.lock().is_empty());
    assert_eq!(code(&peer.ask(get("open/x").option(CoapOption::Unknown(16), &[2])).await), "2.05");
    assert_eq!(code(&peer.ask(put("open/x").option(CoapOption::IfNoneMatch, &[])).await), "2.04");
    fixture.stop().await;
}

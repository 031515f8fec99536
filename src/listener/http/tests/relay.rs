//! The request plane over in-memory pipes, with a pretend upstream behind it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Mutex;
use std::task::Poll;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Frame;
use tokio::sync::mpsc;

use super::*;
use crate::gateway::{BoxError, Dialled, Line, ProxyBody, ServedBy, UpstreamFault};
use std::task::Context;

type Answer = Result<Response<ProxyBody>, UpstreamFault>;
type Acting = Pin<Box<dyn Future<Output = Answer> + Send>>;
type Act = dyn Fn(Request<ProxyBody>) -> Acting + Send + Sync;

/// An upstream that does as it is told and notes what it is asked.
pub struct Pretend {
    act: Box<Act>,
    pub asked: Mutex<Vec<http::request::Parts>>,
    pub to: Mutex<Vec<String>>,
}

impl Exchange for Pretend {
    fn exchange<'a>(
        &'a self,
        to: &'a str,
        _key: u64,
        request: Request<ProxyBody>,
        deadline: Instant,
    ) -> Pin<Box<dyn Future<Output = Answer> + Send + 'a>> {
        let (parts, body) = request.into_parts();
        self.to.lock().unwrap().push(to.to_owned());
        self.asked.lock().unwrap().push(parts.clone());
        let acting = (self.act)(Request::from_parts(parts, body));
        // As the contract wants it: an answer, or none in time.
        Box::pin(async move {
            tokio::time::timeout_at(deadline.into(), acting).await.unwrap_or(Err(UpstreamFault::Timeout))
        })
    }

    /// Whatever is dialled echoes; nobody is at port 9.
    fn dial<'a>(
        &'a self,
        host: &'a str,
        port: u16,
        _deadline: Instant,
    ) -> Pin<Box<dyn Future<Output = Dialled> + Send + 'a>> {
        self.to.lock().unwrap().push(format!("{host} {port}"));
        Box::pin(async move {
            if port == 9 {
                return Err(UpstreamFault::Unreachable);
            }
            let (near, far) = tokio::io::duplex(64);
            tokio::spawn(async move {
                let (mut reading, mut writing) = tokio::io::split(far);
                let _ = tokio::io::copy(&mut reading, &mut writing).await;
                let _ = writing.shutdown().await;
            });
            Ok(Box::new(near) as Box<dyn Line>)
        })
    }
}

impl Pretend {
    pub fn new<F: Future<Output = Answer> + Send + 'static>(
        act: impl Fn(Request<ProxyBody>) -> F + Send + Sync + 'static,
    ) -> Arc<Self> {
        let act = Box::new(move |request| -> Acting { Box::pin(act(request)) });
        Arc::new(Pretend { act, asked: Mutex::default(), to: Mutex::default() })
    }

    /// Answers with what it is sent.
    pub fn echo() -> Arc<Self> {
        Pretend::new(|request| async move {
            let body = request.into_body().collect().await.map_err(|_| UpstreamFault::RequestBody)?;
            let mut response = Response::new(whole(body.to_bytes()));
            response.headers_mut().insert("x-upstream", HeaderValue::from_static("yes"));
            response.headers_mut().insert("connection", HeaderValue::from_static("close, x-private"));
            response.headers_mut().insert("x-private", HeaderValue::from_static("1"));
            response.extensions_mut().insert(ServedBy("http://u:1".into()));
            Ok(response)
        })
    }

    fn failing(fault: UpstreamFault) -> Arc<Self> {
        Pretend::new(move |_| async move { Err(fault) })
    }

    pub fn last(&self) -> http::request::Parts {
        self.asked.lock().unwrap().last().unwrap().clone()
    }

    pub fn count(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

pub fn whole(bytes: impl Into<Bytes>) -> ProxyBody {
    ProxyBody::new(Full::new(bytes.into()).map_err(|never| match never {}))
}

pub fn sent<'a>(asked: &'a http::request::Parts, name: &str) -> &'a str {
    asked.headers[name].to_str().unwrap()
}

/// A body that a test feeds piece by piece.
struct Fed(mpsc::UnboundedReceiver<Result<Frame<Bytes>, BoxError>>);

impl hyper::body::Body for Fed {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.0.poll_recv(cx)
    }
}

pub fn routes() -> Value {
    json!([
        { "name": "open", "path_prefix": "/open", "to": "cloud", "auth": "none", "timeout_ms": 2000, "idle_timeout_ms": 3000 },
        { "name": "small", "path_prefix": "/open/small", "to": "cloud", "auth": "none", "body_bytes_max": 8 },
        { "name": "api", "path_prefix": "/api", "to": "cloud", "methods": ["GET", "POST", "PUT", "PROPFIND"] },
        { "name": "site", "host": "www.example", "to": "site", "auth": "none", "preserve_host": true },
    ])
}

pub fn fixture(upstream: &Arc<Pretend>) -> Fixture {
    Fixture::routed(|_| {}, &[], routes(), Some(upstream.clone()))
}

#[tokio::test]
async fn a_request_goes_through_with_its_body_and_comes_back_with_its_answer() {
    let upstream = Pretend::echo();
    let fixture = fixture(&upstream);
    let mut peer = fixture.connect();
    let answer = peer.ask("POST", "/open/a%20b?q=1", "x-own: 1\r\nx-forwarded-for: 9.9.9.9\r\n", b"hello").await;
    assert_eq!((answer.status, &answer.body[..]), (200, &b"hello"[..]));
    assert_eq!(answer.headers["x-upstream"], "yes");
    assert!(answer.headers["via"].starts_with("1.1 tidegate-"));
    assert!(!answer.headers.contains_key("x-private"));
    let asked = upstream.last();
    assert_eq!((asked.method.as_str(), asked.uri.to_string().as_str()), ("POST", "/open/a%20b?q=1"));
    assert_eq!((sent(&asked, "x-own"), sent(&asked, "x-forwarded-for")), ("1", "192.0.2.1"));
    assert_eq!(asked.headers["x-request-id"].to_str().unwrap(), answer.headers["x-request-id"]);
    assert!(!asked.headers.contains_key("host"), "the endpoint's own host is sent");
    assert_eq!(upstream.to.lock().unwrap()[..], ["cloud"]);
    // The connection goes on.
    assert_eq!(peer.ask("GET", "/open", "", b"").await.status, 200);
    assert_eq!(fixture.shared.in_flight.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn routes_are_found_by_host_path_and_method_in_one_spelling() {
    let upstream = Pretend::echo();
    let fixture = fixture(&upstream);
    let token = bearer(&fixture.token("a").await);
    let mut peer = fixture.connect();
    for (target, headers, status) in [
        ("/opener", "", 404),
        ("/nothing", "", 404),
        // Under another name it is still the route that wants a device.
        ("/%61pi/x", "", 401),
        ("/open/../api/x", "", 400),
        ("/open/%2e%2e/api/x", "", 400),
        ("//api/x", "", 400),
        ("/open%2fx", "", 400),
    ] {
        assert_eq!(peer.ask("GET", target, headers, b"").await.status, status, "{target}");
    }
    assert_eq!(peer.ask("DELETE", "/api/x", &token, b"").await.status, 404, "no route takes the method");
    assert_eq!(peer.ask("TRACE", "/open", "", b"").await.status, 501);
    assert_eq!(upstream.count(), 0);
    // Absolute-form names the host (RFC 9112 section 3.2.2), whatever Host says.
    let absolute = peer.ask("GET", "http://www.example:81/x?y", "", b"").await;
    assert_eq!(absolute.status, 200);
    let asked = upstream.last();
    assert_eq!((sent(&asked, "host"), asked.uri.to_string().as_str()), ("www.example:81", "/x?y"));
}

#[tokio::test]
async fn a_device_is_admitted_by_policy_and_known_to_the_upstream_without_its_token() {
    let upstream = Pretend::echo();
    let fixture = fixture(&upstream);
    let token = fixture.token("a").await;
    let mut peer = fixture.connect();
    assert_eq!(peer.ask("GET", "/api/a/x", "", b"").await.status, 401);
    let spoofed = format!("{}tidegate-device: op\r\n", bearer(&token));
    assert_eq!(peer.ask("GET", "/api/a/x", &spoofed, b"").await.status, 200);
    let asked = upstream.last();
    assert_eq!((sent(&asked, "tidegate-device"), sent(&asked, "tidegate-role")), ("a", "sensor"));
    assert!(!asked.headers.contains_key("authorization"));
    let other = peer.ask("GET", "/api/b/x", &bearer(&token), b"").await;
    assert_eq!((other.status, other.json()["reason"].as_str()), (403, Some("forbidden")));
    let by_rule = peer.ask("POST", "/api/a/x", &bearer(&token), b"123456789").await;
    assert_eq!((by_rule.status, by_rule.json()["limit"].as_str()), (413, Some("bytes_max")));
    assert_eq!(peer.ask("PROPFIND", "/api/a/x", &bearer(&token), b"").await.status, 403, "no rule can name it");
    assert_eq!(upstream.count(), 1);
}

#[tokio::test]
async fn a_body_of_unknown_length_is_cut_off_at_its_bound() {
    let upstream = Pretend::echo();
    let fixture = fixture(&upstream);
    let token = bearer(&fixture.token("a").await);
    let announced = fixture.connect().ask("POST", "/open/small", "", b"123456789").await;
    assert_eq!((announced.status, upstream.count()), (413, 0));
    let chunked = "transfer-encoding: chunked\r\n\r\n5\r\n12345\r\n5\r\n67890\r\n0\r\n\r\n";
    for (target, headers, limit) in [("/open/small", "", Value::Null), ("/api/a/x", token.as_str(), "bytes_max".into())]
    {
        let mut peer = fixture.connect();
        let head = format!("POST {target} HTTP/1.1\r\nhost: g\r\n{headers}{chunked}");
        peer.io.write_all(head.as_bytes()).await.unwrap();
        let answer = peer.answer().await;
        assert_eq!((answer.status, &answer.json()["limit"]), (413, &limit), "{target}");
    }
    // Within the bound it passes.
    let mut peer = fixture.connect();
    peer.io
        .write_all(b"POST /open/small HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
        .await
        .unwrap();
    assert_eq!(peer.answer().await.body, b"abc");
}

#[tokio::test(start_paused = true)]
async fn a_body_that_stops_coming_and_one_that_breaks_off_are_the_clients_fault() {
    let upstream = Pretend::echo();
    let fixture = fixture(&upstream);
    let mut slow = fixture.connect();
    slow.io.write_all(b"POST /open HTTP/1.1\r\nhost: g\r\ncontent-length: 5\r\n\r\nab").await.unwrap();
    let answer = slow.answer().await;
    // The route's own deadline is the shorter one here.
    assert_eq!(answer.status, 504);
    let routes = json!([{ "name": "r", "to": "cloud", "auth": "none", "timeout_ms": 100_000 }]);
    let patient = Fixture::routed(|limits| limits.body_timeout_ms = 1000, &[], routes, Some(upstream.clone()));
    let mut slow = patient.connect();
    slow.io.write_all(b"POST /open HTTP/1.1\r\nhost: g\r\ncontent-length: 5\r\n\r\nab").await.unwrap();
    assert_eq!(slow.answer().await.status, 408);
    let mut broken = patient.connect();
    broken.io.write_all(b"POST /x HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n").await.unwrap();
    assert_eq!(broken.answer().await.status, 400);
    assert!(broken.is_closed().await);
}

#[tokio::test]
async fn expect_is_answered_only_when_the_upstream_wants_the_body() {
    let head = b"POST /open HTTP/1.1\r\nhost: g\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n";
    let fixture = fixture(&Pretend::failing(UpstreamFault::Unavailable));
    let mut refused = fixture.connect();
    refused.io.write_all(head).await.unwrap();
    assert_eq!(refused.answer().await.status, 503, "no 100 before it");

    let upstream = Pretend::echo();
    let fixture = super::relay::fixture(&upstream);
    let mut peer = fixture.connect();
    peer.io.write_all(head).await.unwrap();
    assert_eq!(peer.answer().await.status, 100);
    peer.io.write_all(b"ok").await.unwrap();
    assert_eq!(peer.answer().await.body, b"ok");
    assert!(!upstream.last().headers.contains_key("expect"));
}

#[tokio::test]
async fn each_fault_of_the_upstream_has_its_status() {
    for (fault, status) in
        [(UpstreamFault::Unreachable, 502), (UpstreamFault::Unavailable, 503), (UpstreamFault::Timeout, 504)]
    {
        let fixture = fixture(&Pretend::failing(fault));
        let mut peer = fixture.connect();
        let answer = peer.ask("GET", "/open", "", b"").await;
        assert_eq!((answer.status, answer.json()["status"].as_u64()), (status, Some(u64::from(status))));
        assert_eq!(answer.headers.contains_key("retry-after"), status == 503);
        assert_eq!(peer.ask("GET", "/open", "", b"").await.status, status, "the connection goes on");
    }
    let nobody = Fixture::routed(|_| {}, &[], routes(), None);
    assert_eq!(nobody.connect().ask("GET", "/open", "", b"").await.status, 503);
}

#[tokio::test(start_paused = true)]
async fn no_request_outlives_its_deadline() {
    let upstream = Pretend::new(|_| std::future::pending());
    let fixture = fixture(&upstream);
    let began = tokio::time::Instant::now();
    assert_eq!(fixture.connect().ask("GET", "/open", "", b"").await.status, 504);
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!(fixture.shared.in_flight.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn an_answer_streams_and_is_cut_when_it_stops_coming() {
    let (feed, body) = mpsc::unbounded_channel();
    let body = Mutex::new(Some(body));
    let upstream = Pretend::new(move |_| {
        let body = ProxyBody::new(Fed(body.lock().unwrap().take().unwrap()));
        async move { Ok(Response::new(body)) }
    });
    let fixture = fixture(&upstream);
    let mut peer = fixture.connect();
    peer.send("GET", "/open", "", b"").await;
    let head = peer.answer().await;
    assert_eq!((head.status, head.headers["transfer-encoding"].as_str()), (200, "chunked"));
    for _ in 0..5 {
        // Each piece arrives before the next is made; silence shorter than the limit is none.
        tokio::time::sleep(Duration::from_millis(2900)).await;
        feed.send(Ok(Frame::data("abc".into()))).unwrap();
        peer.until(b"3\r\nabc\r\n").await;
    }
    assert_eq!(fixture.shared.in_flight.load(Ordering::Relaxed), 1);
    assert!(peer.is_closed().await, "nothing for idle_timeout_ms");
    assert!(!peer.read.ends_with(b"0\r\n\r\n"), "and it does not look whole");
    assert_eq!(fixture.shared.in_flight.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn trailers_reach_a_client_that_takes_them() {
    let upstream = Pretend::new(|_| async {
        let (feed, body) = mpsc::unbounded_channel();
        let mut trailers = http::HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        feed.send(Ok(Frame::data("abc".into()))).unwrap();
        feed.send(Ok(Frame::trailers(trailers))).unwrap();
        let mut response = Response::new(ProxyBody::new(Fed(body)));
        response.headers_mut().insert("trailer", HeaderValue::from_static("grpc-status"));
        Ok(response)
    });
    let fixture = fixture(&upstream);
    let mut peer = fixture.connect();
    peer.send("GET", "/open", "te: trailers\r\n", b"").await;
    peer.answer().await;
    peer.until(b"3\r\nabc\r\n0\r\ngrpc-status: 0\r\n\r\n").await;
    assert_eq!(upstream.last().headers["te"], "trailers");
}

#[tokio::test]
async fn a_tunnel_is_copied_both_ways_and_ends_with_either_side() {
    // A real client connection towards a pretend upstream, so that there is something to upgrade.
    let (near, far) = tokio::io::duplex(1 << 12);
    let near = Mutex::new(Some(near));
    let upstream = Pretend::new(move |request| {
        let near = near.lock().unwrap().take().unwrap();
        async move {
            let io = hyper_util::rt::TokioIo::new(near);
            let (mut send, conn) = hyper::client::conn::http1::handshake(io).await.unwrap();
            tokio::spawn(conn.with_upgrades());
            let response = send.send_request(request).await.unwrap();
            Ok(response.map(|body| ProxyBody::new(body.map_err(Into::into))))
        }
    });
    let fixture = fixture(&upstream);
    let mut backend = Peer { io: far, read: Vec::new(), served: tokio::spawn(async { false }) };
    let mut peer = fixture.connect();
    let hello = "GET /open/ws HTTP/1.1\r\nhost: g\r\nconnection: keep-alive, Upgrade\r\nupgrade: websocket\r\n\
                 sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n";
    peer.io.write_all(hello.as_bytes()).await.unwrap();
    let head = String::from_utf8(backend.until(b"\r\n\r\n").await).unwrap();
    assert!(head.contains("upgrade: websocket\r\n") && head.contains("connection: upgrade\r\n"), "{head}");
    let granted = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: x\r\n\r\nhi";
    backend.io.write_all(granted.as_bytes()).await.unwrap();
    let answer = peer.answer().await;
    assert_eq!((answer.status, answer.headers["upgrade"].as_str()), (101, "websocket"));
    assert_eq!(answer.headers["sec-websocket-accept"], "x");
    peer.until(b"hi").await;
    peer.io.write_all(b"\x81\0ping").await.unwrap();
    backend.until(b"\x81\0ping").await;
    backend.io.write_all(b"pong").await.unwrap();
    peer.until(b"pong").await;
    assert_eq!(fixture.shared.in_flight.load(Ordering::Relaxed), 1);
    drop(backend.io);
    assert!(peer.is_closed().await);
    drop(peer.io);
    peer.served.await.unwrap();
    assert_eq!(fixture.shared.in_flight.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn an_upgrade_that_is_not_granted_is_an_answer() {
    let upstream = Pretend::echo();
    let fixture = fixture(&upstream);
    let mut peer = fixture.connect();
    let headers = "connection: upgrade\r\nupgrade: websocket\r\n";
    assert_eq!(peer.ask("GET", "/open", headers, b"").await.status, 200);
    assert_eq!(upstream.last().headers["upgrade"], "websocket");
    assert_eq!(peer.ask("GET", "/open", "connection: upgrade\r\nupgrade: h2c\r\n", b"").await.status, 200);
    assert!(!upstream.last().headers.contains_key("upgrade"));
}

#[tokio::test]
async fn a_request_that_has_been_here_is_not_sent_round_again() {
    let upstream = Pretend::echo();
    let fixture = fixture(&upstream);
    let mut peer = fixture.connect();
    peer.ask("GET", "/open", "", b"").await;
    let via = format!("via: {}\r\n", upstream.last().headers["via"].to_str().unwrap());
    assert_eq!(peer.ask("GET", "/open", &via, b"").await.status, 508);
    assert_eq!(upstream.count(), 1);
}

#[tokio::test]
async fn proxied_requests_have_a_limit_of_their_own() {
    let (feed, body) = mpsc::unbounded_channel();
    let body = Mutex::new(Some(body));
    let upstream = Pretend::new(move |_| {
        let body = body.lock().unwrap().take().map_or_else(|| whole(""), |body| ProxyBody::new(Fed(body)));
        async move { Ok(Response::new(body)) }
    });
    let fixture = Fixture::routed(|limits| limits.requests_in_flight_max = 1, &[], routes(), Some(upstream.clone()));
    let mut first = fixture.connect();
    first.send("GET", "/open", "", b"").await;
    first.answer().await;
    let full = fixture.connect().ask("GET", "/open", "", b"").await;
    assert_eq!((full.status, full.headers["retry-after"].as_str()), (503, "1"));
    drop(feed);
    first.until(b"0\r\n\r\n").await;
    assert_eq!(first.ask("GET", "/open", "", b"").await.status, 200);
}

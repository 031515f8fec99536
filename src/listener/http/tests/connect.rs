//! Tunnels by CONNECT.

use http_body_util::Empty;

use super::relay::Pretend;
use super::*;

fn tunnels(auth: &str) -> Value {
    json!([
        { "name": "tunnel", "connect": ["a.example:443", "*.b.example:8883", "[::1]:22", "nobody.example:9"], "auth": auth },
        { "name": "rest", "to": "cloud", "auth": "none" },
    ])
}

fn fixture(auth: &str) -> (Arc<Pretend>, Fixture) {
    let upstream = Pretend::echo();
    let fixture = Fixture::routed(|_| {}, &[], tunnels(auth), Some(upstream.clone()));
    (upstream, fixture)
}

async fn ask(peer: &mut Peer, target: &str, headers: &str) -> Answer {
    let head = format!("CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n{headers}\r\n");
    peer.io.write_all(head.as_bytes()).await.unwrap();
    peer.answer().await
}

#[tokio::test]
async fn a_tunnel_leads_where_a_route_allows_it_and_nowhere_else() {
    let (upstream, fixture) = fixture("none");
    let mut peer = fixture.connect();
    for target in ["a.example:80", "b.a.example:443", "b.example:8883", "127.0.0.1:443", "x@a.example:443x"] {
        let answer = ask(&mut peer, target, "").await;
        let expected = if target.contains('@') { 400 } else { 403 };
        assert_eq!(answer.status, expected, "{target}");
        if expected == 400 {
            peer = fixture.connect();
        }
    }
    for target in ["a.example", "x@a.example:443"] {
        assert_eq!(ask(&mut fixture.connect(), target, "").await.status, 400, "{target}");
    }
    assert!(upstream.to.lock().unwrap().is_empty(), "nobody was asked");
    let answer = ask(&mut peer, "a.example:443", "").await;
    assert_eq!(answer.status, 200);
    assert!(!answer.headers.contains_key("content-length") && !answer.headers.contains_key("transfer-encoding"));
    // Not a word of HTTP, and a bare line feed.
    peer.io.write_all(b"\x16\x03\n\0bytes").await.unwrap();
    assert_eq!(peer.until(b"bytes").await, b"\x16\x03\n\0bytes");
    peer.io.shutdown().await.unwrap();
    assert!(peer.is_closed().await);
    assert_eq!(upstream.to.lock().unwrap()[..], ["a.example 443"]);
    assert_eq!(ask(&mut fixture.connect(), "x.b.example:8883", "").await.status, 200);
    assert_eq!(ask(&mut fixture.connect(), "[::1]:22", "").await.status, 200);
    assert_eq!(ask(&mut fixture.connect(), "nobody.example:9", "").await.status, 502);
}

#[tokio::test]
async fn without_a_route_for_it_there_is_no_connect() {
    let upstream = Pretend::echo();
    let routes = json!([{ "name": "rest", "to": "cloud", "auth": "none" }]);
    let fixture = Fixture::routed(|_| {}, &[], routes, Some(upstream.clone()));
    assert_eq!(ask(&mut fixture.connect(), "a.example:443", "").await.status, 501);
    assert!(upstream.to.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_tunnel_is_no_way_for_other_requests_and_a_body_none_into_it() {
    let (upstream, fixture) = fixture("none");
    let mut peer = fixture.connect();
    assert_eq!(peer.ask("GET", "/", "", b"").await.status, 200);
    assert_eq!(upstream.to.lock().unwrap()[..], ["cloud"]);
    let answer = ask(&mut peer, "a.example:443", "content-length: 4\r\n").await;
    assert_eq!(answer.status, 400);
}

#[tokio::test]
async fn who_does_not_wait_for_the_answer_gets_no_tunnel() {
    let (_, fixture) = fixture("none");
    let mut peer = fixture.connect();
    let early = b"CONNECT a.example:443 HTTP/1.1\r\nhost: a.example:443\r\n\r\n\x16\x03\n\0";
    peer.io.write_all(early).await.unwrap();
    assert!(peer.is_closed().await);
    assert!(!peer.read.contains(&0), "{}", peer.read.escape_ascii());
}

#[tokio::test]
async fn a_device_shows_its_token_to_the_proxy_and_a_rule_has_to_allow_it() {
    let (upstream, fixture) = fixture("device");
    let token = fixture.token("a").await;
    let mut peer = fixture.connect();
    let stranger = ask(&mut peer, "a.example:443", "").await;
    assert_eq!(stranger.status, 407);
    assert!(stranger.headers["proxy-authenticate"].starts_with("Bearer"), "{stranger:?}");
    assert!(!stranger.headers.contains_key("www-authenticate"));
    let shows = format!("proxy-authorization: Bearer {token}\r\n");
    assert_eq!(ask(&mut fixture.connect(), "[::1]:22", &shows).await.status, 403, "no rule allows it");
    assert!(upstream.to.lock().unwrap().is_empty());
    assert_eq!(ask(&mut fixture.connect(), "a.example:443", &shows).await.status, 200);
}

#[tokio::test]
async fn over_http2_a_tunnel_is_one_stream_of_many() {
    let (_, fixture) = fixture("none");
    let (near, far) = tokio::io::duplex(1 << 16);
    let serving = serve_http2(far, BytesMut::new(), conn(None), fixture.context(), fixture.shutdown.clone());
    let served = tokio::spawn(serving);
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake::<_, _, Empty<bytes::Bytes>>(executor, TokioIo::new(near)).await.unwrap();
    tokio::spawn(connection);
    let connect = |target: &str| Request::connect(target).body(Empty::new()).unwrap();
    assert_eq!(sender.send_request(connect("c.example:443")).await.unwrap().status(), 403);
    let response = sender.send_request(connect("a.example:443")).await.unwrap();
    assert_eq!(response.status(), 200);
    let mut tunnel = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
    tunnel.write_all(b"\x16\x03\nbytes").await.unwrap();
    let mut back = [0; 8];
    tunnel.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"\x16\x03\nbytes");
    let beside = Request::get("http://gateway/x").body(Empty::new()).unwrap();
    assert_eq!(sender.send_request(beside).await.unwrap().status(), 200);
    tunnel.shutdown().await.unwrap();
    assert_eq!(tunnel.read(&mut back).await.unwrap(), 0, "the other side was told");
    drop((tunnel, sender));
    fixture.shutdown.cancel();
    served.await.unwrap();
}

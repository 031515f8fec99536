//! The request plane's side: what is streamed, retried, timed out, reused.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::super::{Answer, BoxError, Fault, Proxy, ProxyBody};
use super::backend::{Backend, Mood};
use super::{Tasks, Upstreams, upstream, wait_until};

pub fn proxy(urls: &[String], more: Value) -> (Proxy, Upstreams) {
    let upstreams = Upstreams::new(&[upstream(urls, more)]).unwrap();
    (upstreams.proxy(&Tasks::default()), upstreams)
}

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn full(text: &str) -> ProxyBody {
    ProxyBody::new(Full::new(Bytes::from(text.to_owned())).map_err(|never| match never {}))
}

pub fn request(method: Method, path: &str, body: &str) -> Request<ProxyBody> {
    let body = full(body);
    Request::builder().method(method).uri(path).body(body).unwrap()
}

pub async fn text(answer: Answer) -> Result<String, BoxError> {
    let body = answer.response.into_body().collect().await?;
    Ok(String::from_utf8(body.to_bytes().to_vec()).unwrap())
}

pub async fn ask(proxy: &Proxy, method: Method, path: &str, body: &str) -> Result<(u16, String), Fault> {
    let answer = proxy.exchange("cloud", 0, request(method, path, body), soon()).await?;
    let status = answer.response.status().as_u16();
    Ok((status, text(answer).await.unwrap()))
}

/// Serves one connection after the other with a function; counts connections.
async fn server<F, R>(answer: F) -> String
where
    F: Fn(Request<Incoming>) -> R + Clone + Send + 'static,
    R: Future<Output = Response<ProxyBody>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let answer = answer.clone();
            let service = hyper::service::service_fn(move |request| {
                let answered = answer(request);
                async move { Ok::<_, Infallible>(answered.await) }
            });
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });
    url
}

/// A body fed from outside.
pub struct Fed(pub mpsc::Receiver<Result<Frame<Bytes>, BoxError>>);

impl Body for Fed {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.0.poll_recv(cx)
    }
}

fn fed() -> (mpsc::Sender<Result<Frame<Bytes>, BoxError>>, ProxyBody) {
    let (feed, body) = mpsc::channel(1);
    (feed, ProxyBody::new(Fed(body)))
}

fn data(text: &'static str) -> Result<Frame<Bytes>, BoxError> {
    Ok(Frame::data(Bytes::from_static(text.as_bytes())))
}

#[tokio::test]
async fn bodies_stream_both_ways_while_both_are_open() {
    let url = server(|request| async { Response::new(ProxyBody::new(request.into_body().map_err(Into::into))) }).await;
    let (proxy, _) = proxy(&[url], json!({}));
    let (feed, body) = fed();
    let request = Request::post("/echo").body(body).unwrap();
    let answer = proxy.exchange("cloud", 0, request, soon()).await.unwrap();
    let mut back = answer.response.into_body();
    for piece in ["one", "two", "three"] {
        feed.send(data(piece)).await.unwrap();
        let frame = back.frame().await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), piece, "nothing waits for the end");
    }
    let mut trailers = http::HeaderMap::new();
    trailers.insert("x-sum", "3".parse().unwrap());
    feed.send(Ok(Frame::trailers(trailers))).await.unwrap();
    drop(feed);
    assert!(back.frame().await.is_none_or(|frame| frame.unwrap().is_trailers()));
}

#[tokio::test]
async fn a_large_body_arrives_whole_both_ways() {
    let url = server(|request| async { Response::new(ProxyBody::new(request.into_body().map_err(Into::into))) }).await;
    let (proxy, _) = proxy(&[url], json!({ "request_timeout_ms": 30000 }));
    let body: String = (0..300_000).map(|n| char::from(b'a' + (n % 26) as u8)).collect();
    for _ in 0..3 {
        let (status, back) = ask(&proxy, Method::POST, "/", &body).await.unwrap();
        assert!(status == 200 && back == body, "{} of {} bytes", back.len(), body.len());
    }
}

#[tokio::test]
async fn connections_are_reused_and_a_closed_one_is_replaced() {
    let backend = Backend::start(Mood::Well).await;
    let (proxy, upstreams) = proxy(&[backend.url()], json!({ "request_timeout_ms": 30000 }));
    for n in 0..20 {
        assert_eq!(ask(&proxy, Method::POST, "/x", &n.to_string()).await, Ok((200, "ok".into())));
    }
    assert_eq!(backend.connections(), 1);
    assert_eq!(backend.kept()[7].body, "7");
    let answer = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nbye";
    backend.set(Mood::Raw { answer, keep: true });
    assert_eq!(ask(&proxy, Method::POST, "/x", "").await, Ok((200, "bye".into())));
    backend.set(Mood::Well);
    // The backend has closed after its answer, unannounced.
    tokio::time::sleep(Duration::from_millis(50)).await;
    for _ in 0..3 {
        assert_eq!(ask(&proxy, Method::POST, "/x", "").await, Ok((200, "ok".into())));
    }
    assert_eq!(backend.connections(), 2);
    let described = upstreams.describe();
    assert_eq!(described[0]["worker_connections"], 1, "{described}");
    assert_eq!(described[0]["endpoints"][0]["in_flight"], 0, "{described}");
}

#[tokio::test]
async fn answers_without_a_body_leave_the_connection_in_order() {
    for status in ["204 No Content", "304 Not Modified"] {
        let connections = Arc::new(portable_atomic::AtomicU32::new(0));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let counted = connections.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                counted.fetch_add(1, portable_atomic::Ordering::Relaxed);
                tokio::spawn(async move {
                    let mut buffer = [0; 4096];
                    while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {
                        let answer = format!("HTTP/1.1 {status}\r\netag: \"1\"\r\n\r\n");
                        stream.write_all(answer.as_bytes()).await.unwrap();
                    }
                });
            }
        });
        let (proxy, _) = proxy(&[url], json!({}));
        for _ in 0..3 {
            let (_, body) = ask(&proxy, Method::GET, "/", "").await.unwrap();
            assert_eq!(body, "");
        }
        assert_eq!(connections.load(portable_atomic::Ordering::Relaxed), 1);
    }
}

fn dead_url() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[tokio::test]
async fn an_endpoint_that_cannot_be_reached_costs_no_request_not_even_a_post() {
    let backend = Backend::start(Mood::Well).await;
    let (proxy, _) = proxy(&[dead_url(), backend.url()], json!({ "retry": { "per_second_min": 100 } }));
    for n in 0..20 {
        assert_eq!(ask(&proxy, Method::POST, "/x", &n.to_string()).await, Ok((200, "ok".into())), "{n}");
    }
    let bodies: Vec<String> = backend.kept().into_iter().map(|received| received.body).collect();
    assert_eq!(bodies, (0..20).map(|n| n.to_string()).collect::<Vec<_>>());
}

#[tokio::test]
async fn nobody_to_ask_is_unavailable_and_nobody_there_unreachable() {
    let (one, _) = proxy(&[dead_url()], json!({}));
    assert_eq!(ask(&one, Method::GET, "/", "").await, Err(Fault::Unreachable));
    assert_eq!(one.exchange("other", 0, request(Method::GET, "/", ""), soon()).await.err(), Some(Fault::Unavailable));
}

#[tokio::test]
async fn what_may_have_had_an_effect_is_not_sent_again() {
    let broken = "HTTP/1.1 200 OK\r\ncontent-le";
    for (method, body, again) in [(Method::GET, "", true), (Method::POST, "", false), (Method::PUT, "x", false)] {
        let (bad, good) =
            (Backend::start(Mood::Raw { answer: broken, keep: true }).await, Backend::start(Mood::Well).await);
        let (proxy, _) = proxy(&[bad.url(), good.url()], json!({ "retry": { "per_second_min": 100 } }));
        let mut failed = 0;
        for _ in 0..4 {
            match ask(&proxy, method.clone(), "/", body).await {
                Ok(answer) => {
                    assert_eq!(answer, if method == Method::GET { (200, String::new()) } else { (200, "ok".into()) })
                }
                Err(fault) => {
                    assert_eq!(fault, Fault::Unreachable);
                    failed += 1;
                }
            }
        }
        assert_eq!(failed > 0, !again, "{method}");
    }
}

#[tokio::test]
async fn a_get_that_meets_503_goes_to_another_endpoint() {
    let bad = server(|_| async {
        let mut response = Response::new(full("no"));
        *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
        response
    })
    .await;
    let good = server(|_| async { Response::new(full("yes")) }).await;
    let (both, _) = proxy(&[bad.clone(), good], json!({ "retry": { "per_second_min": 100 } }));
    for _ in 0..4 {
        assert_eq!(ask(&both, Method::GET, "/", "").await, Ok((200, "yes".into())));
    }
    let (alone, _) = proxy(&[bad], json!({}));
    assert_eq!(
        ask(&alone, Method::GET, "/", "").await,
        Ok((503, "no".into())),
        "its own answer where there is no better"
    );
}

#[tokio::test]
async fn no_request_outlives_its_deadline() {
    for mood in [Mood::BlackHole, Mood::Drip(Duration::from_millis(500))] {
        let backend = Backend::start(mood).await;
        let (proxy, _) = proxy(&[backend.url()], json!({ "request_timeout_ms": 60000 }));
        let deadline = Instant::now() + Duration::from_millis(200);
        let answered = proxy.exchange("cloud", 0, request(Method::POST, "/", "x"), deadline).await;
        assert_eq!(answered.err(), Some(Fault::Timeout));
        assert!(deadline.elapsed() < Duration::from_secs(5));
    }
}

#[tokio::test]
async fn a_broken_answer_is_an_error_and_never_a_shorter_answer() {
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n64\r\nhalf",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhalf",
    ] {
        let backend = Backend::start(Mood::Raw { answer, keep: true }).await;
        let (proxy, upstreams) = proxy(&[backend.url()], json!({}));
        let answer = proxy.exchange("cloud", 0, request(Method::POST, "/", "x"), soon()).await.unwrap();
        assert!(text(answer).await.is_err());
        assert_eq!(upstreams.describe()[0]["endpoints"][0]["in_flight"], 0);
    }
}

#[tokio::test]
async fn a_body_that_fails_on_its_way_up_is_the_askers_fault() {
    let backend = Backend::start(Mood::Well).await;
    let (proxy, upstreams) =
        proxy(&[backend.url()], json!({ "eject": { "consecutive_errors": 1, "percent_max": 100 } }));
    for late in [false, true] {
        let (feed, body) = fed();
        if late {
            backend.set(Mood::Drip(Duration::from_secs(3600)));
            feed.send(data("begins well")).await.unwrap();
        }
        let asked = proxy.exchange("cloud", 0, Request::post("/").body(body).unwrap(), soon());
        let fail = async {
            feed.send(Err("gone".into())).await.unwrap();
            drop(feed);
        };
        let (answered, ()) = tokio::join!(asked, fail);
        assert_eq!(answered.err(), Some(Fault::RequestBody), "late: {late}");
    }
    assert_eq!(upstreams.describe()[0]["endpoints"][0]["state"], "available");
    backend.set(Mood::Well);
    assert_eq!(ask(&proxy, Method::POST, "/x", "y").await, Ok((200, "ok".into())));
}

#[tokio::test]
async fn an_answer_may_come_before_the_request_is_whole() {
    let url = server(|_| async {
        let mut response = Response::new(full("too much"));
        *response.status_mut() = http::StatusCode::PAYLOAD_TOO_LARGE;
        response
    })
    .await;
    let (proxy, _) = proxy(&[url], json!({}));
    let (feed, body) = fed();
    feed.send(data("some")).await.unwrap();
    let answer = proxy.exchange("cloud", 0, Request::post("/").body(body).unwrap(), soon()).await.unwrap();
    assert_eq!(answer.response.status(), 413);
    assert_eq!(text(answer).await.unwrap(), "too much");
    drop(feed);
    assert_eq!(ask(&proxy, Method::POST, "/", "").await, Ok((413, "too much".into())));
}

#[tokio::test]
async fn beyond_connections_max_requests_wait_for_one() {
    let url = server(|_| async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        Response::new(full("ok"))
    })
    .await;
    let (proxy, upstreams) = proxy(&[url], json!({ "connections_max": 2, "request_timeout_ms": 30000 }));
    let proxy = Arc::new(proxy);
    let mut asked = tokio::task::JoinSet::new();
    for _ in 0..10 {
        let proxy = proxy.clone();
        asked.spawn(async move { ask(&proxy, Method::GET, "/", "").await });
    }
    for answer in asked.join_all().await {
        assert_eq!(answer, Ok((200, "ok".into())));
    }
    assert_eq!(upstreams.describe()[0]["worker_connections"], 2);
}

#[tokio::test]
async fn an_idle_connection_is_closed_in_time() {
    let backend = Backend::start(Mood::Well).await;
    let (proxy, upstreams) = proxy(&[backend.url()], json!({ "idle_timeout_ms": 1 }));
    ask(&proxy, Method::POST, "/", "").await.unwrap();
    wait_until("it is closed", || upstreams.describe()[0]["worker_connections"] == 0).await;
}

#[tokio::test]
async fn no_answer_is_ever_mixed_with_another() {
    // Echoes the path; every few requests something goes wrong.
    let counter = Arc::new(portable_atomic::AtomicU32::new(0));
    let url = server(move |request| {
        let n = counter.fetch_add(1, portable_atomic::Ordering::Relaxed);
        async move {
            let path = request.uri().path().to_owned();
            let _ = request.into_body().collect().await;
            let pieces: VecDeque<Result<Frame<Bytes>, BoxError>> = match n % 5 {
                0 => VecDeque::from([Ok(Frame::data(path.clone().into())), Err("cut".into())]),
                1 => path.bytes().map(|byte| Ok(Frame::data(Bytes::copy_from_slice(&[byte])))).collect(),
                _ => VecDeque::from([Ok(Frame::data(path.clone().into()))]),
            };
            let (feed, body) = mpsc::channel(64);
            tokio::spawn(async move {
                for piece in pieces {
                    if n.is_multiple_of(3) {
                        tokio::task::yield_now().await;
                    }
                    if feed.send(piece).await.is_err() {
                        return;
                    }
                }
            });
            Response::new(ProxyBody::new(Fed(body)))
        }
    })
    .await;
    let (proxy, upstreams) =
        proxy(&[url], json!({ "breaker": { "requests_min": 1000000 }, "request_timeout_ms": 30000 }));
    let proxy = Arc::new(proxy);
    let mut asked = tokio::task::JoinSet::new();
    for n in 0..300 {
        let proxy = proxy.clone();
        asked.spawn(async move {
            let path = format!("/request-{n}");
            // A connection that is cut may be cut before its head.
            let Ok(answer) = proxy.exchange("cloud", 0, request(Method::POST, &path, "x"), soon()).await else {
                return 0;
            };
            if n % 7 == 0 {
                // An asker that goes away half way.
                return 0;
            }
            let Ok(body) = text(answer).await else { return 0 };
            assert_eq!(body, path);
            1
        });
    }
    let whole: u32 = asked.join_all().await.into_iter().sum();
    assert!(whole > 100, "{whole} of 300");
    assert_eq!(upstreams.describe()[0]["endpoints"][0]["in_flight"], 0);
}

#[tokio::test]
async fn a_connection_that_changes_its_protocol_is_handed_over() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut buffer = vec![0; 4096];
        let read = stream.read(&mut buffer).await.unwrap();
        let head = String::from_utf8_lossy(&buffer[..read]).to_ascii_lowercase();
        assert!(head.contains("upgrade: echo") && head.contains("connection: upgrade"), "{head}");
        stream.write_all(b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\nhello").await.unwrap();
        let (mut read, mut write) = stream.split();
        tokio::io::copy(&mut read, &mut write).await.unwrap();
    });
    let (proxy, _) = proxy(&[url], json!({}));
    let mut request = request(Method::GET, "/ws", "");
    request.headers_mut().insert("connection", "upgrade".parse().unwrap());
    request.headers_mut().insert("upgrade", "echo".parse().unwrap());
    let mut answer = proxy.exchange("cloud", 0, request, soon()).await.unwrap();
    assert_eq!(answer.response.status(), 101);
    let mut stream = TokioIo::new(hyper::upgrade::on(&mut answer.response).await.unwrap());
    stream.write_all(b" world").await.unwrap();
    let mut back = [0; 11];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"hello world");
}

#[tokio::test]
async fn the_host_is_the_endpoints_unless_one_is_given_and_headers_are_added() {
    let backend = Backend::start(Mood::Well).await;
    let (proxy, _) = proxy(&[backend.url()], json!({ "headers": { "x-key": "k" } }));
    ask(&proxy, Method::POST, "/a?b=c", "").await.unwrap();
    let mut named = request(Method::POST, "/", "");
    named.headers_mut().insert("host", "site.example".parse().unwrap());
    proxy.exchange("cloud", 0, named, soon()).await.unwrap();
    let kept = backend.kept();
    assert_eq!(kept[0].header("host"), Some(backend.address.to_string().as_str()));
    assert_eq!((kept[0].path.as_str(), kept[0].header("x-key")), ("/a?b=c", Some("k")));
    assert_eq!(kept[1].header("host"), Some("site.example"));
}

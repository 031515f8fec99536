//! TLS and HTTP/2 towards the upstream.

use std::convert::Infallible;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, Version};
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;

use super::super::{Fault, ProxyBody};
use super::{Gateway, Tasks, Upstreams, forward, message, upstream};
use crate::tls::{Alpn, KeyPair, Server};

/// What arrived.
#[derive(Default)]
struct Seen {
    versions: Vec<Version>,
    bodies: Vec<String>,
    connections: usize,
}

type Shared = Arc<Mutex<Seen>>;

/// A key and a certificate for localhost, which is also its own authority.
fn certificate(folder: &Path) -> KeyPair {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let pair = KeyPair { certificate: folder.join("cloud.crt"), key: folder.join("cloud.key") };
    std::fs::write(&pair.certificate, made.cert.pem()).unwrap();
    let mut key =
        std::fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&pair.key).unwrap();
    key.write_all(made.signing_key.serialize_pem().as_bytes()).unwrap();
    pair
}

async fn answer(request: Request<Incoming>, seen: Shared) -> Result<Response<ProxyBody>, Infallible> {
    seen.lock().versions.push(request.version());
    let path = request.uri().path().to_owned();
    let body = request.into_body().collect().await.unwrap().to_bytes();
    seen.lock().bodies.push(String::from_utf8_lossy(&body).into_owned());
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    let frames = [Ok(Frame::data(Bytes::from(path))), Ok(Frame::trailers(trailers))];
    let (feed, frames_of) = tokio::sync::mpsc::channel(2);
    for frame in frames {
        feed.send(frame).await.unwrap();
    }
    Ok(Response::new(ProxyBody::new(super::proxying::Fed(frames_of))))
}

async fn serve<IO>(io: IO, http2: bool, seen: Shared)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request| answer(request, seen.clone()));
    let io = TokioIo::new(io);
    // A client that goes away is no failure of the test.
    let _ = match http2 {
        true => hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await,
        false => hyper::server::conn::http1::Builder::new().serve_connection(io, service).await,
    };
}

/// A cloud behind TLS that speaks what ALPN agrees on, or a plain one that speaks HTTP/2 at once.
async fn cloud(tls: Option<&KeyPair>) -> (String, Shared) {
    let seen = Shared::default();
    let server = tls.map(|pair| Server::new(pair, &[Alpn::Http2, Alpn::Http1], false).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let scheme = if tls.is_some() { "https" } else { "http" };
    let shared = seen.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (server, seen) = (server.clone(), shared.clone());
            tokio::spawn(async move {
                seen.lock().connections += 1;
                match server {
                    Some(server) => {
                        let Ok((stream, info)) = server.accept(stream).await else { return };
                        serve(stream, info.alpn == Some(Alpn::Http2), seen).await;
                    }
                    None => serve(stream, true, seen).await,
                }
            });
        }
    });
    (format!("{scheme}://localhost:{port}"), seen)
}

fn trusting(pair: &KeyPair, more: Value) -> Value {
    let mut config = json!({ "ca_file": pair.certificate, "connect_timeout_ms": 5000, "request_timeout_ms": 10000 });
    super::merge(&mut config, more);
    config
}

#[tokio::test]
async fn deliveries_speak_what_tls_agrees_on() {
    let folder = tempfile::tempdir().unwrap();
    let pair = certificate(folder.path());
    for (http2, version) in [("auto", Version::HTTP_2), ("never", Version::HTTP_11)] {
        let (url, seen) = cloud(Some(&pair)).await;
        let health = json!({ "path": "/healthz", "interval_ms": 100 });
        let config = upstream(&[url], trusting(&pair, json!({ "http2": http2, "health": health })));
        let gateway = Gateway::start(&config, &forward(json!({})));
        for n in 0..5 {
            gateway.append(&message(n, "d", &n.to_string()));
        }
        gateway.drained().await;
        let seen = seen.lock();
        assert!(seen.versions.iter().all(|seen| *seen == version), "{:?}", seen.versions);
        assert_eq!(seen.bodies.concat().lines().count(), 5);
    }
}

#[tokio::test]
async fn requests_share_one_http2_connection_and_keep_their_trailers() {
    let folder = tempfile::tempdir().unwrap();
    let pair = certificate(folder.path());
    for tls in [true, false] {
        let (url, seen) = cloud(tls.then_some(&pair)).await;
        let more =
            if tls { trusting(&pair, json!({})) } else { json!({ "http2": "always", "request_timeout_ms": 10000 }) };
        let upstreams = Upstreams::new(&[upstream(&[url], more)]).unwrap();
        let proxy = Arc::new(upstreams.proxy(&Tasks::default()));
        let ask = |n: usize| {
            let proxy = proxy.clone();
            async move {
                let request = Request::get(format!("/{n}")).body(ProxyBody::default()).unwrap();
                let answer =
                    proxy.exchange("cloud", 0, request, Instant::now() + Duration::from_secs(30)).await.unwrap();
                let body = answer.response.into_body().collect().await.unwrap();
                assert_eq!(body.trailers().unwrap()["grpc-status"], "0");
                assert_eq!(body.to_bytes(), format!("/{n}"));
            }
        };
        ask(0).await;
        let mut asked = tokio::task::JoinSet::new();
        (1..20).for_each(|n| drop(asked.spawn(ask(n))));
        asked.join_all().await;
        let seen = seen.lock();
        assert_eq!((seen.connections, seen.versions.len()), (1, 20));
        assert!(seen.versions.iter().all(|version| *version == Version::HTTP_2));
    }
}

#[tokio::test]
async fn an_upstream_that_cannot_prove_its_name_gets_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let pair = certificate(folder.path());
    let other: PathBuf = folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let (url, seen) = cloud(Some(&pair)).await;
    let config = upstream(std::slice::from_ref(&url), trusting(&certificate(&other), json!({})));
    let proxy = Upstreams::new(std::slice::from_ref(&config)).unwrap().proxy(&Tasks::default());
    let request = Request::get("/").body(ProxyBody::default()).unwrap();
    let answered = proxy.exchange("cloud", 0, request, Instant::now() + Duration::from_secs(30)).await;
    assert_eq!(answered.err(), Some(Fault::Unreachable));
    let wrong_name = upstream(&[url.replace("localhost", "127.0.0.1")], trusting(&pair, json!({})));
    let proxy = Upstreams::new(&[wrong_name]).unwrap().proxy(&Tasks::default());
    let request = Request::get("/").body(ProxyBody::default()).unwrap();
    let answered = proxy.exchange("cloud", 0, request, Instant::now() + Duration::from_secs(30)).await;
    assert_eq!(answered.err(), Some(Fault::Unreachable));
    assert!(seen.lock().versions.is_empty());
}

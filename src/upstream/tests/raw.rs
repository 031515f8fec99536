//! What passes over a connection to an upstream, byte by byte: peers that say by script what no library would.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::BodyExt;
use hyper::body::Frame;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::super::{BoxError, Fault, Proxy, ProxyBody, Upstreams};
use super::proxying::{Fed, ask, proxy, request, soon, text};

/// What a peer does once a connection's next request has come, up to the end of its head or of what it is told to wait for.
#[derive(Clone, Copy)]
enum Does {
    Says(&'static str),
    SaysSlowly(&'static str),
    /// Waits until this has come too.
    Awaits(&'static str),
    Closes,
}

/// A peer that follows one script for each connection, in order of their coming, and what it has received.
async fn peer(scripts: &'static [&'static [Does]]) -> (Proxy, Upstreams, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (tell, told) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        for script in scripts {
            let (mut stream, _) = listener.accept().await.unwrap();
            let tell = tell.clone();
            tokio::spawn(async move {
                let mut came = String::new();
                let mut buffer = [0; 4096];
                for step in *script {
                    match step {
                        Does::Awaits(what) => {
                            while !came.contains(what) {
                                let read = stream.read(&mut buffer).await.unwrap();
                                assert!(read > 0, "{came:?} ended before {what:?}");
                                came.push_str(std::str::from_utf8(&buffer[..read]).unwrap());
                            }
                            tell.send(std::mem::take(&mut came)).unwrap();
                        }
                        Does::Says(text) => stream.write_all(text.as_bytes()).await.unwrap(),
                        Does::SaysSlowly(text) => {
                            for byte in text.bytes() {
                                stream.write_all(&[byte]).await.unwrap();
                                tokio::task::yield_now().await;
                            }
                        }
                        Does::Closes => return,
                    }
                }
                // Keeps what it has to say to itself, and the connection open.
                std::future::pending::<()>().await;
            });
        }
    });
    let (proxy, upstreams) = proxy(&[url], json!({ "request_timeout_ms": 30000, "retry": { "attempts_max": 1 } }));
    (proxy, upstreams, told)
}

/// The one answer of a peer that answers every first request with `says`.
async fn answer_to(says: &'static [Does]) -> Result<Result<(u16, String), BoxError>, Fault> {
    let scripts: &'static [&'static [Does]] = Box::leak(Box::new([says]));
    let (proxy, _upstreams, _told) = peer(scripts).await;
    let answer = proxy.exchange("cloud", 0, request(Method::POST, "/", "x"), soon()).await?;
    let status = answer.response.status().as_u16();
    Ok(text(answer).await.map(|text| (status, text)))
}

const HEAD_END: Does = Does::Awaits("\r\n\r\n");
const OK: Does = Does::Says("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");

#[tokio::test]
async fn a_request_is_said_in_one_way() {
    let (proxy, _upstreams, mut told) = peer(&[&[HEAD_END, OK, HEAD_END, OK]]).await;
    let mut post = request(Method::POST, "/a?b=c", "body");
    post.headers_mut().insert("content-length", "4".parse().unwrap());
    post.headers_mut().insert("host", "site".parse().unwrap());
    proxy.exchange("cloud", 0, post, soon()).await.unwrap().response.into_body().collect().await.unwrap();
    assert_eq!(told.recv().await.unwrap(), "POST /a?b=c HTTP/1.1\r\nhost: site\r\ncontent-length: 4\r\n\r\nbody");
    // The second one comes over the same connection.
    let mut get = request(Method::GET, "/", "");
    get.headers_mut().insert("host", "site".parse().unwrap());
    proxy.exchange("cloud", 0, get, soon()).await.unwrap();
    assert_eq!(told.recv().await.unwrap(), "GET / HTTP/1.1\r\nhost: site\r\n\r\n");
}

#[tokio::test]
async fn a_body_of_unknown_length_goes_in_chunks_with_its_trailers() {
    let (proxy, _upstreams, mut told) = peer(&[&[Does::Awaits("0\r\nx-sum: 7\r\n\r\n"), OK]]).await;
    let (feed, body) = mpsc::channel(4);
    let mut trailers = http::HeaderMap::new();
    trailers.insert("x-sum", "7".parse().unwrap());
    trailers.insert("content-length", "7".parse().unwrap());
    trailers.insert("x-hidden", "7".parse().unwrap());
    let large = "l".repeat(5000);
    for frame in [Frame::data(Bytes::from_static(b"one")), Frame::data(large.clone().into()), Frame::trailers(trailers)]
    {
        feed.send(Ok(frame)).await.unwrap();
    }
    drop(feed);
    let request = Request::post("/")
        .header("host", "a")
        .header("trailer", "X-Sum, content-length")
        .body(ProxyBody::new(Fed(body)))
        .unwrap();
    assert_eq!(proxy.exchange("cloud", 0, request, soon()).await.unwrap().response.status(), 200);
    let expected = format!(
        "POST / HTTP/1.1\r\nhost: a\r\ntrailer: X-Sum, content-length\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n1388\r\n{large}\r\n0\r\nx-sum: 7\r\n\r\n"
    );
    assert_eq!(told.recv().await.unwrap(), expected);
}

#[tokio::test]
async fn interim_answers_are_passed_over_up_to_a_number() {
    const EARLY: &str = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n";
    let few = [HEAD_END, Does::Says("HTTP/1.1 100 Continue\r\n\r\n"), Does::SaysSlowly(EARLY), OK];
    assert_eq!(answer_to(few.to_vec().leak()).await.unwrap().unwrap(), (200, "ok".into()));
    let storm: Vec<Does> = [HEAD_END].into_iter().chain([Does::Says(EARLY); 17]).chain([OK]).collect();
    assert_eq!(answer_to(storm.leak()).await.unwrap_err(), Fault::Unreachable);
    let switched = [HEAD_END, Does::Says("HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n")];
    assert_eq!(answer_to(switched.to_vec().leak()).await.unwrap_err(), Fault::Unreachable, "nobody asked for it");
}

#[tokio::test]
async fn an_answer_may_come_byte_by_byte_and_in_every_framing() {
    let whole: [&[Does]; 4] = [
        &[HEAD_END, Does::SaysSlowly("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")],
        &[
            HEAD_END,
            Does::SaysSlowly(
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no\r\n1;a=b\r\nk\r\n0\r\nx: y\r\n\r\n",
            ),
        ],
        &[HEAD_END, Does::Says("HTTP/1.1 200 OK\r\n\r\nok"), Does::Closes],
        &[HEAD_END, Does::Says("HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok")],
    ];
    for says in whole {
        assert_eq!(answer_to(says.to_vec().leak()).await.unwrap().unwrap(), (200, "ok".into()));
    }
}

#[tokio::test]
async fn half_an_answer_is_never_a_whole_one() {
    let broken: [&[Does]; 4] = [
        &[HEAD_END, Does::Says("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok"), Does::Closes],
        &[HEAD_END, Does::Says("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n"), Does::Closes],
        &[HEAD_END, Does::Says("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n"), Does::Closes],
        &[HEAD_END, Does::Says("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nokay")],
    ];
    for says in broken {
        assert!(answer_to(says.to_vec().leak()).await.unwrap().is_err());
    }
    let headless: [&[Does]; 5] = [
        &[HEAD_END, Does::Closes],
        &[HEAD_END, Does::Says("HTTP/1.1 200 OK\r\ncontent-le"), Does::Closes],
        &[HEAD_END, Does::Says("garbage\r\n\r\n")],
        &[HEAD_END, Does::Says("HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok")],
        &[HEAD_END, Does::Says("HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\nok")],
    ];
    for says in headless {
        assert_eq!(answer_to(says.to_vec().leak()).await.unwrap_err(), Fault::Unreachable);
    }
}

#[tokio::test]
async fn a_head_has_a_bound() {
    let endless: Vec<Does> =
        [HEAD_END, Does::Says("HTTP/1.1 200 OK\r\nx: ")].into_iter().chain([Does::Says(KILOBYTE); 65]).collect();
    assert_eq!(answer_to(endless.leak()).await.unwrap_err(), Fault::Unreachable);
}

#[tokio::test]
async fn a_connection_with_something_left_on_it_is_not_used_again() {
    let scripts: &[&[Does]] = &[
        // One byte too much belongs to nobody.
        &[HEAD_END, Does::Says("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nonex")],
        &[HEAD_END, Does::Says("HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\ntwo")],
        &[HEAD_END, Does::Says("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nthree"), Does::Closes],
        &[HEAD_END, Does::Says("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nfour")],
    ];
    let (proxy, _upstreams, _told) = peer(scripts).await;
    for expected in ["one", "two", "three", "four"] {
        assert_eq!(ask(&proxy, Method::POST, "/", "x").await, Ok((200, expected.into())));
        // The peer's close has to be seen, or it is a race that no client wins.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_body_that_is_not_as_long_as_it_says_is_the_askers_fault() {
    struct Lies(Fed, u64);
    impl hyper::body::Body for Lies {
        type Data = Bytes;
        type Error = BoxError;
        fn poll_frame(
            mut self: std::pin::Pin<&mut Self>,
            cx: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<Frame<Bytes>, BoxError>>> {
            std::pin::Pin::new(&mut self.0).poll_frame(cx)
        }
        fn size_hint(&self) -> hyper::body::SizeHint {
            hyper::body::SizeHint::with_exact(self.1)
        }
    }
    for said in [2, 4] {
        let (proxy, _upstreams, _told) = peer(&[&[HEAD_END]]).await;
        let (feed, body) = mpsc::channel(1);
        let body = ProxyBody::new(Lies(Fed(body), said));
        let asked = tokio::spawn(async move {
            proxy.exchange("cloud", 0, Request::post("/").body(body).unwrap(), soon()).await.map(|_| ())
        });
        feed.send(Ok(Frame::data(Bytes::from_static(b"abc")))).await.unwrap();
        drop(feed);
        assert_eq!(asked.await.unwrap(), Err(Fault::RequestBody), "{said}");
    }
}

const KILOBYTE: &str = match std::str::from_utf8(&[b'x'; 1024]) {
    Ok(text) => text,
    Err(_) => "",
};

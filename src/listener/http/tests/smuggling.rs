//! Requests that two programs read differently: each is refused with 400, the connection closed, and nothing of it reaches an upstream or is answered
//! as a second request.

use super::relay::Pretend;
use super::*;

/// What stands behind the request under test: a second request that must never be served.
const SMUGGLED: &str = "GET /open/smuggled HTTP/1.1\r\nHost: g\r\n\r\n";

/// Name, and the bytes up to what is smuggled.
const CORPUS: &[(&str, &str)] = &[
    (
        "length and chunked",
        "POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "chunked and length",
        "POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n",
    ),
    ("two lengths", "POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: 0\r\nContent-Length: 44\r\n\r\n"),
    ("one length twice", "POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n"),
    ("a list of lengths", "POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: 0, 44\r\n\r\n"),
    ("a signed length", "POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: +0\r\n\r\n"),
    ("a negative length", "POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: -1\r\n\r\n"),
    ("an empty length", "POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: \r\n\r\n"),
    ("a length in hex", "POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: 0x2c\r\n\r\n"),
    ("a length with a space before the colon", "POST /open HTTP/1.1\r\nHost: g\r\nContent-Length : 44\r\n\r\n"),
    ("a header with a tab before the colon", "GET /open HTTP/1.1\r\nHost: g\r\nX-A\t: 1\r\n\r\n"),
    ("a folded header", "POST /open HTTP/1.1\r\nHost: g\r\nX-A: 1\r\n Content-Length: 44\r\n\r\n"),
    ("a folded first header", "POST /open HTTP/1.1\r\n Host: g\r\n\r\n"),
    ("transfer-encoding folded", "POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n"),
    (
        "another coding before chunked",
        "POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    ),
    ("chunked not last", "POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
    (
        "chunked twice",
        "POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    ("nearly chunked", "POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    ("chunked in HTTP/1.0", "POST /open HTTP/1.0\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("bare line feeds", "GET /open HTTP/1.1\nHost: g\n\n"),
    ("one bare line feed", "GET /open HTTP/1.1\r\nHost: g\nX: y\r\n\r\n"),
    ("a head that ends in a bare line feed", "GET /open HTTP/1.1\r\nHost: g\r\n\n"),
    ("a bare carriage return in a value", "GET /open HTTP/1.1\r\nHost: g\r\nX: a\rContent-Length: 44\r\n\r\n"),
    ("a NUL in a value", "GET /open HTTP/1.1\r\nHost: g\r\nX: a\0b\r\n\r\n"),
    ("a NUL in a name", "GET /open HTTP/1.1\r\nHost: g\r\nX\0: a\r\n\r\n"),
    ("a header without colon", "GET /open HTTP/1.1\r\nHost: g\r\nContent-Length\r\n\r\n"),
    ("a header without name", "GET /open HTTP/1.1\r\nHost: g\r\n: a\r\n\r\n"),
    ("a space in the target", "GET /open /x HTTP/1.1\r\nHost: g\r\n\r\n"),
    ("two spaces after the method", "GET  /open HTTP/1.1\r\nHost: g\r\n\r\n"),
    ("no version", "GET /open\r\nHost: g\r\n\r\n"),
    ("a version of the future", "GET /open HTTP/3.0\r\nHost: g\r\n\r\n"),
    ("a lower-case version", "GET /open http/1.1\r\nHost: g\r\n\r\n"),
    ("a chunk size with 0x", "POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n"),
    ("a chunk size with a sign", "POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n-0\r\n\r\n"),
    ("a chunk size of spaces", "POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n   \r\n\r\n"),
    (
        "a chunk size with a space behind",
        "POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n0 \r\n\r\n",
    ),
    (
        "a chunk size beyond 64 bits",
        "POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000000\r\n\r\n",
    ),
    (
        "a chunk longer than it says",
        "POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
    ),
    (
        "a chunk size that ends in a bare line feed",
        "POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n0\n\n",
    ),
    (
        "a chunk extension with a bare line feed",
        "POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n0;a\n\r\n\r\n",
    ),
    (
        "a trailer with a space before the colon",
        "POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX : y\r\n\r\n",
    ),
    ("no host", "GET /open HTTP/1.1\r\n\r\n"),
    ("two hosts", "GET /open HTTP/1.1\r\nHost: g\r\nHost: h\r\n\r\n"),
    ("a host with a path", "GET /open HTTP/1.1\r\nHost: g/x\r\n\r\n"),
    ("a host with a user", "GET /open HTTP/1.1\r\nHost: a@g\r\n\r\n"),
];

/// Those that are well framed, so that the connection may live.
const ONLY_REFUSED: [&str; 4] = ["no host", "two hosts", "a host with a path", "a host with a user"];

#[tokio::test]
async fn a_request_with_two_readings_is_refused_and_nothing_after_it_is_read() {
    let upstream = Pretend::echo();
    let fixture = super::relay::fixture(&upstream);
    for (name, bytes) in CORPUS {
        // All at once, and cut in two at every place, must be the same.
        for cut in [0, bytes.len() / 3, bytes.len() / 2, bytes.len() - 1] {
            let mut peer = fixture.connect();
            let all = format!("{bytes}{SMUGGLED}");
            peer.io.write_all(&all.as_bytes()[..cut]).await.unwrap();
            tokio::task::yield_now().await;
            // The gateway may have closed by now.
            let _ = peer.io.write_all(&all.as_bytes()[cut..]).await;
            let answer = peer.answer().await;
            assert_eq!(answer.status, 400, "{name}, cut at {cut}");
            if ONLY_REFUSED.contains(name) {
                continue;
            }
            let _ = peer.io.read_to_end(&mut peer.read).await;
            let after = String::from_utf8_lossy(&peer.read).into_owned();
            assert!(!after.contains("HTTP/1.1"), "{name}, cut at {cut}: answered twice: {after}");
            for asked in upstream.asked.lock().unwrap().iter() {
                assert!(!asked.uri.path().contains("smuggled"), "{name}, cut at {cut}");
            }
        }
    }
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order_up_to_the_one_that_is_refused() {
    let upstream = Pretend::echo();
    let fixture = super::relay::fixture(&upstream);
    let mut peer = fixture.connect();
    let bytes = "POST /open/1 HTTP/1.1\r\nHost: g\r\nContent-Length: 1\r\n\r\n1\
                 POST /open/2 HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n2\r\n0\r\n\r\n\
                 POST /open/3 HTTP/1.1\r\nHost: g\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n3";
    peer.io.write_all(bytes.as_bytes()).await.unwrap();
    assert_eq!(peer.answer().await.body, b"1");
    assert_eq!(peer.answer().await.body, b"2");
    assert_eq!(peer.answer().await.status, 400);
    assert!(peer.is_closed().await);
    assert_eq!(upstream.count(), 2);
}

#[tokio::test]
async fn a_head_has_a_size_and_a_number_of_fields() {
    let fixture = Fixture::with(
        |limits| {
            limits.header_bytes_max = 2048;
            limits.headers_max = 20;
        },
        &[],
    );
    let mut large = fixture.connect();
    let _ =
        large.io.write_all(format!("GET / HTTP/1.1\r\nhost: g\r\nx: {}\r\n\r\n", "y".repeat(3000)).as_bytes()).await;
    assert_eq!(large.answer().await.status, 431);
    assert!(large.is_closed().await);
    let mut many = fixture.connect();
    let fields: String = (0..30).map(|n| format!("x{n}: y\r\n")).collect();
    many.io.write_all(format!("GET / HTTP/1.1\r\nhost: g\r\n{fields}\r\n").as_bytes()).await.unwrap();
    assert_eq!(many.answer().await.status, 431);
    assert!(many.is_closed().await);
    let mut endless = fixture.connect();
    let _ = endless.io.write_all(format!("GET /{}", "x".repeat(20_000)).as_bytes()).await;
    assert!([414, 431].contains(&endless.answer().await.status));
}

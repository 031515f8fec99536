//! HTTP/2 by raw frames: what a peer may not do ends the stream or the connection (RFC 9113), floods end it too, and the next client is served.

use tokio::io::AsyncWrite;

use super::relay::Pretend;
use super::*;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const FRAME_SIZE_ERROR: u32 = 6;
const REFUSED_STREAM: u32 = 7;
const COMPRESSION_ERROR: u32 = 9;
const ENHANCE_YOUR_CALM: u32 = 11;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// `:method`, `:scheme http`, `:path`, `:authority g`, without Huffman or tables of its own (RFC 7541).
fn head(method: u8, path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let mut block = vec![method, 0x86];
    literal(&mut block, 0x04, path);
    literal(&mut block, 0x01, "g");
    for (name, value) in more {
        block.push(0);
        text(&mut block, name);
        text(&mut block, value);
    }
    block
}

const GET: u8 = 0x82;
const POST: u8 = 0x83;

fn literal(block: &mut Vec<u8>, index: u8, value: &str) {
    block.push(index);
    text(block, value);
}

fn text(block: &mut Vec<u8>, text: &str) {
    let length = text.len();
    if length < 127 {
        block.push(u8::try_from(length).unwrap());
    } else {
        block.push(127);
        let mut rest = length - 127;
        while rest >= 128 {
            block.push(u8::try_from(rest % 128).unwrap() | 0x80);
            rest /= 128;
        }
        block.push(u8::try_from(rest).unwrap());
    }
    block.extend(text.as_bytes());
}

/// A frame as it came.
#[derive(Debug)]
struct Came {
    kind: u8,
    stream: u32,
    payload: Vec<u8>,
}

struct Raw {
    io: DuplexStream,
    served: tokio::task::JoinHandle<()>,
}

impl Raw {
    async fn connect(fixture: &Fixture, buffer: usize) -> Raw {
        let (near, far) = tokio::io::duplex(buffer);
        let serving = serve_http2(far, BytesMut::new(), conn(None), fixture.context(), fixture.shutdown.clone());
        let mut raw = Raw { io: near, served: tokio::spawn(serving) };
        raw.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        raw.send(&frame(SETTINGS, 0, 0, &[])).await;
        raw
    }

    /// The peer may have closed: what it said is read afterwards.
    async fn send(&mut self, bytes: &[u8]) {
        let _ = self.io.write_all(bytes).await;
    }

    async fn came(&mut self) -> Option<Came> {
        let mut head = [0; 9];
        self.io.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; length];
        self.io.read_exact(&mut payload).await.ok()?;
        let stream = u32::from_be_bytes(head[5..9].try_into().unwrap());
        Some(Came { kind: head[3], stream, payload })
    }

    /// The error code of the GOAWAY before the connection closes; 0 if there was none or it was a polite one.
    async fn goes_away(&mut self) -> u32 {
        let mut code = 0;
        while let Some(came) = self.came().await {
            if came.kind == GOAWAY {
                code = u32::from_be_bytes(came.payload[4..8].try_into().unwrap());
            }
        }
        code
    }

    /// The error code of the RST_STREAM for `stream`, or of a GOAWAY, and whether it was the latter.
    async fn refuses(&mut self, stream: u32) -> (u32, bool) {
        loop {
            let came = self.came().await.expect("closed without a word");
            let code = |at: usize| u32::from_be_bytes(came.payload[at..at + 4].try_into().unwrap());
            match came.kind {
                GOAWAY => return (code(4), true),
                RST_STREAM if came.stream == stream => return (code(0), false),
                _ => {}
            }
        }
    }

    /// The first byte of the answer's header block: 0x88 is 200, 0x8d is 404.
    async fn status(&mut self, stream: u32) -> u8 {
        loop {
            let came = self.came().await.expect("closed");
            if came.kind == HEADERS && came.stream == stream {
                return came.payload[0];
            }
        }
    }
}

/// Another client gets its answer.
async fn is_alive(fixture: &Fixture) {
    let mut raw = Raw::connect(fixture, 1 << 16).await;
    raw.send(&frame(HEADERS, END_STREAM | END_HEADERS, 1, &head(GET, "/open", &[]))).await;
    assert_eq!(raw.status(1).await, 0x88);
}

#[tokio::test]
async fn a_request_by_hand_is_answered() {
    let fixture = super::relay::fixture(&Pretend::echo());
    is_alive(&fixture).await;
    let mut raw = Raw::connect(&fixture, 1 << 16).await;
    // Padded, with a priority, cut into HEADERS and CONTINUATION.
    let block = head(GET, "/nothing", &[("te", "trailers")]);
    let mut first = vec![2, 0, 0, 0, 0, 15];
    first.extend(&block[..3]);
    first.extend([0, 0]);
    raw.send(&frame(HEADERS, END_STREAM | 0x8 | 0x20, 1, &first)).await;
    raw.send(&frame(CONTINUATION, END_HEADERS, 1, &block[3..])).await;
    assert_eq!(raw.status(1).await, 0x8d);
}

#[tokio::test]
async fn what_breaks_the_connections_rules_ends_the_connection() {
    let fixture = super::relay::fixture(&Pretend::echo());
    let get = frame(HEADERS, END_STREAM | END_HEADERS, 1, &head(GET, "/open", &[]));
    // Of two codes the first is the RFC's, the second what h2 says in its place.
    let cases: Vec<(&str, Vec<u8>, &[u32])> = vec![
        ("data on stream 0", frame(DATA, 0, 0, b"x"), &[PROTOCOL_ERROR]),
        ("data on an idle stream", frame(DATA, 0, 1, b"x"), &[PROTOCOL_ERROR]),
        ("headers on stream 0", frame(HEADERS, END_HEADERS, 0, &head(GET, "/", &[])), &[PROTOCOL_ERROR]),
        ("headers on an even stream", frame(HEADERS, END_HEADERS, 2, &head(GET, "/", &[])), &[PROTOCOL_ERROR]),
        (
            "a stream number that goes back",
            [frame(HEADERS, 5, 3, &head(GET, "/open", &[])), get.clone()].concat(),
            &[PROTOCOL_ERROR, 5],
        ),
        ("a continuation of nothing", frame(CONTINUATION, END_HEADERS, 1, b""), &[PROTOCOL_ERROR]),
        (
            "another frame between headers",
            [frame(HEADERS, 0, 1, &head(GET, "/", &[])), frame(PING, 0, 0, &[0; 8])].concat(),
            &[PROTOCOL_ERROR],
        ),
        ("a window update of nothing", frame(WINDOW_UPDATE, 0, 0, &[0; 4]), &[PROTOCOL_ERROR]),
        ("a window beyond 2^31", frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]), &[FLOW_CONTROL_ERROR]),
        ("settings of a strange length", frame(SETTINGS, 0, 0, &[0; 5]), &[FRAME_SIZE_ERROR, PROTOCOL_ERROR]),
        ("settings on a stream", frame(SETTINGS, 0, 1, &[]), &[PROTOCOL_ERROR]),
        ("an acknowledgement with content", frame(SETTINGS, 1, 0, &[0; 6]), &[FRAME_SIZE_ERROR, PROTOCOL_ERROR]),
        ("a ping of 7 bytes", frame(PING, 0, 0, &[0; 7]), &[FRAME_SIZE_ERROR, PROTOCOL_ERROR]),
        ("a reset of an idle stream", frame(RST_STREAM, 0, 1, &[0; 4]), &[PROTOCOL_ERROR]),
        (
            "a frame beyond the size",
            [0, 0x40, 1, DATA, 0, 0, 0, 0, 1].into_iter().chain(vec![0; 0x4001]).collect(),
            &[FRAME_SIZE_ERROR],
        ),
        (
            "a header block that is none",
            frame(HEADERS, 5, 1, &[0xff, 0xff, 0xff, 0xff, 0xff]),
            &[COMPRESSION_ERROR, PROTOCOL_ERROR],
        ),
        ("a push from a client", frame(5, END_HEADERS, 1, &[0, 0, 0, 2, 0x82]), &[PROTOCOL_ERROR]),
        ("a preface twice", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), &[PROTOCOL_ERROR, FRAME_SIZE_ERROR]),
    ];
    for (name, bytes, codes) in cases {
        let mut raw = Raw::connect(&fixture, 1 << 17).await;
        raw.send(&bytes).await;
        let code = raw.goes_away().await;
        assert!(codes.contains(&code), "{name}: {code}");
        raw.served.await.unwrap();
    }
    is_alive(&fixture).await;
}

#[tokio::test]
async fn what_breaks_a_requests_rules_ends_it_and_at_most_its_connection() {
    let upstream = Pretend::echo();
    let fixture = super::relay::fixture(&upstream);
    let post = |more: &[(&str, &str)]| frame(HEADERS, END_HEADERS, 1, &head(POST, "/open", more));
    let get = |more: &[(&str, &str)]| frame(HEADERS, END_STREAM | END_HEADERS, 1, &head(GET, "/open", more));
    // What h2 finds while it reads a header block ends the connection, as RFC 9113 section 5.4 lets it.
    let cases: Vec<(&str, Vec<u8>, bool)> = vec![
        ("connection", get(&[("connection", "close")]), false),
        ("transfer-encoding", get(&[("transfer-encoding", "chunked")]), false),
        ("keep-alive", get(&[("keep-alive", "5")]), false),
        ("te beyond trailers", get(&[("te", "gzip")]), false),
        ("an upper-case name", get(&[("X-A", "b")]), true),
        ("a pseudo-header nobody knows", get(&[(":color", "b")]), true),
        ("a pseudo-header behind others", get(&[("a", "b"), (":path", "/x")]), false),
        ("a line break in a value", get(&[("a", "b\r\nc: d")]), true),
        (
            "less body than announced",
            [post(&[("content-length", "5")]), frame(DATA, END_STREAM, 1, b"abc")].concat(),
            false,
        ),
        (
            "more body than announced",
            [post(&[("content-length", "2")]), frame(DATA, END_STREAM, 1, b"abc")].concat(),
            false,
        ),
    ];
    for (name, bytes, ends_connection) in cases {
        let mut raw = Raw::connect(&fixture, 1 << 16).await;
        raw.send(&bytes).await;
        let (code, connection_ends) = raw.refuses(1).await;
        assert_eq!((code, connection_ends), (PROTOCOL_ERROR, ends_connection), "{name}");
        if !connection_ends {
            raw.send(&frame(HEADERS, END_STREAM | END_HEADERS, 3, &head(GET, "/open", &[]))).await;
            assert_eq!(raw.status(3).await, 0x88, "{name}");
        }
        is_alive(&fixture).await;
    }
    for asked in upstream.asked.lock().unwrap().iter() {
        assert!(!asked.headers.contains_key("transfer-encoding") && !asked.headers.contains_key("connection"));
    }
}

#[tokio::test]
async fn a_rapid_reset_ends_the_connection() {
    let fixture = super::relay::fixture(&Pretend::echo());
    let mut raw = Raw::connect(&fixture, 1 << 20).await;
    let mut flood = Vec::new();
    for stream in (1..4001).step_by(2) {
        flood.extend(frame(HEADERS, END_STREAM | END_HEADERS, stream, &head(GET, "/open", &[])));
        flood.extend(frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
    }
    raw.send(&flood).await;
    assert_eq!(raw.goes_away().await, ENHANCE_YOUR_CALM);
    raw.served.await.unwrap();
    is_alive(&fixture).await;
}

#[tokio::test]
async fn headers_without_end_end_the_connection() {
    let fixture = super::relay::fixture(&Pretend::echo());
    let mut raw = Raw::connect(&fixture, 1 << 16).await;
    raw.send(&frame(HEADERS, END_STREAM, 1, &head(GET, "/open", &[]))).await;
    let mut block = Vec::new();
    for n in 0..100 {
        block.push(0);
        text(&mut block, &format!("x{n}"));
        text(&mut block, &"y".repeat(100));
    }
    let (mut reading, mut writing) = tokio::io::split(raw.io);
    let drain = tokio::spawn(async move {
        let mut everything = Vec::new();
        let _ = reading.read_to_end(&mut everything).await;
        everything
    });
    // 100 MB, if it were let.
    let mut sent = 0;
    for _ in 0..10_000 {
        if writing.write_all(&frame(CONTINUATION, 0, 1, &block)).await.is_err() {
            break;
        }
        sent += block.len();
    }
    assert!(sent < 10_000_000, "{sent} bytes of headers were taken");
    raw.served.await.unwrap();
    drain.await.unwrap();
    is_alive(&fixture).await;
}

#[tokio::test]
async fn a_header_bomb_does_not_go_off() {
    let upstream = Pretend::echo();
    let fixture = super::relay::fixture(&upstream);
    let mut raw = Raw::connect(&fixture, 1 << 17).await;
    // One large entry in the table, then named ten thousand times at one byte each.
    let mut block = head(GET, "/open", &[]);
    block.push(0x40);
    text(&mut block, "x-bomb");
    text(&mut block, &"y".repeat(3000));
    block.extend(vec![0xbe; 10_000]);
    raw.send(&frame(HEADERS, END_STREAM | END_HEADERS, 1, &block)).await;
    // 431, or the stream or connection ends; nothing of 30 MB is kept or passed on.
    let refused = loop {
        match raw.came().await {
            None => break true,
            Some(came) if came.kind == GOAWAY || (came.stream == 1 && came.kind == RST_STREAM) => break true,
            Some(came) if came.kind == HEADERS && came.stream == 1 => break came.payload[0] != 0x88,
            Some(_) => {}
        }
    };
    assert!(refused);
    assert_eq!(upstream.count(), 0);
    is_alive(&fixture).await;
}

#[tokio::test]
async fn one_stream_too_many_is_refused_alone() {
    let upstream = Pretend::new(|_| std::future::pending());
    let fixture = Fixture::routed(|limits| limits.http2_streams_max = 4, &[], super::relay::routes(), Some(upstream));
    let mut raw = Raw::connect(&fixture, 1 << 16).await;
    // The limit counts once it has been told.
    raw.send(&frame(SETTINGS, 1, 0, &[])).await;
    for stream in [1, 3, 5, 7, 9] {
        raw.send(&frame(HEADERS, END_STREAM | END_HEADERS, stream, &head(GET, "/open", &[]))).await;
    }
    assert_eq!(raw.refuses(9).await, (REFUSED_STREAM, false));
}

#[tokio::test]
async fn data_beyond_the_window_ends_the_connection() {
    let upstream = Pretend::new(|_| std::future::pending());
    let fixture = super::relay::fixture(&upstream);
    let mut raw = Raw::connect(&fixture, 1 << 20).await;
    raw.send(&frame(HEADERS, END_HEADERS, 1, &head(POST, "/open", &[]))).await;
    let mut flood = Vec::new();
    for _ in 0..64 {
        flood.extend(frame(DATA, 0, 1, &[0; 16_000]));
    }
    raw.send(&flood).await;
    let mut code = 0;
    while let Some(came) = raw.came().await {
        if (came.kind == RST_STREAM && came.stream == 1) || came.kind == GOAWAY {
            let at = came.payload.len().min(8) - 4;
            code = u32::from_be_bytes(came.payload[at..at + 4].try_into().unwrap());
            break;
        }
    }
    assert_eq!(code, FLOW_CONTROL_ERROR);
}

/// Sends without reading, so that answers pile up at the gateway; true if it stops taking and closes in time.
async fn is_stopped(fixture: &Fixture, piece: &[u8]) -> bool {
    let raw = Raw::connect(fixture, 1 << 12).await;
    let (_reading, mut writing) = tokio::io::split(raw.io);
    let flood = async { while writing.write_all(piece).await.is_ok() {} };
    tokio::time::timeout(Duration::from_secs(300), flood).await.is_ok()
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_asks_and_never_reads_is_closed_at_the_write_deadline() {
    let fixture = super::relay::fixture(&Pretend::echo());
    assert!(is_stopped(&fixture, &frame(PING, 0, 0, &[7; 8])).await, "PING");
    assert!(is_stopped(&fixture, &frame(SETTINGS, 0, 0, &[])).await, "SETTINGS");
    is_alive(&fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_says_nothing_or_drips_is_closed_at_the_idle_deadline() {
    let fixture = super::relay::fixture(&Pretend::echo());
    let mut silent = Raw::connect(&fixture, 1 << 12).await;
    let began = tokio::time::Instant::now();
    silent.goes_away().await;
    assert!(began.elapsed() <= Duration::from_secs(130), "{:?}", began.elapsed());

    let raw = Raw::connect(&fixture, 1 << 16).await;
    let (mut reading, writing) = tokio::io::split(raw.io);
    let dripping = tokio::spawn(drip(writing));
    let began = tokio::time::Instant::now();
    let mut everything = Vec::new();
    let _ = reading.read_to_end(&mut everything).await;
    assert!(began.elapsed() <= Duration::from_secs(130), "{:?}", began.elapsed());
    dripping.abort();
}

/// One request that never ends, a byte at a time.
async fn drip(mut writing: impl AsyncWrite + Unpin) {
    let bytes = frame(HEADERS, END_STREAM, 1, &head(GET, &format!("/{}", "x".repeat(200)), &[]));
    for byte in bytes {
        tokio::time::sleep(Duration::from_secs(5)).await;
        if writing.write_all(&[byte]).await.is_err() {
            return;
        }
    }
}

//! Detection over in-memory pipes in virtual time, and the whole accept path over real sockets.

pub(super) mod fixture;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::Instant;

use super::*;
use crate::tls::tests::identity;
use crate::tls::{Client, ClientConfig};

fn listener(config: Config) -> Arc<Listener> {
    Arc::new(Listener::new(Config { name: "test".into(), ..config }).unwrap())
}

fn tls_config(folder: &Path) -> Config {
    let pair = identity(folder, "gateway");
    Config {
        name: "tls".into(),
        transport: TransportKind::Tls,
        certificate: Some(pair.certificate),
        key: Some(pair.key),
        ..Config::default()
    }
}

fn conn(listener: &Arc<Listener>) -> ConnectionInfo {
    ConnectionInfo {
        peer: "192.0.2.1:4000".parse().unwrap(),
        local: "192.0.2.2:1883".parse().unwrap(),
        listener: listener.clone(),
        tls: None,
    }
}

type Outcome = (Result<Detected<DuplexStream>, Refusal>, ConnectionInfo);

/// Runs detection against `peer`, which is given the other end.
async fn detecting<F: Future<Output = ()> + Send + 'static>(
    listener: &Arc<Listener>,
    peer: impl FnOnce(DuplexStream) -> F,
) -> Outcome {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let mut conn = conn(listener);
    tokio::spawn(peer(near));
    let admit = |address: IpAddr| match address {
        IpAddr::V4(v4) if v4.octets() == [203, 0, 113, 66] => Err(Refusal::AddressFilter),
        _ => Ok(()),
    };
    let detected = detect(far, &mut conn, &Limits::default(), admit).await;
    (detected, conn)
}

async fn detecting_bytes(config: Config, bytes: &'static [u8]) -> Outcome {
    detecting(&listener(config), move |mut io| async move {
        io.write_all(bytes).await.unwrap();
        // Held open: silence, not the end of the stream, must decide.
        std::future::pending::<()>().await;
    })
    .await
}

#[tokio::test(start_paused = true)]
async fn each_protocol_is_recognised_and_nothing_of_it_is_lost() {
    let cases: [(&[u8], Spoken); 4] = [
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", Spoken::Http1),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0", Spoken::Http2),
        (b"\x10\x0c\0\x04MQTT\x04\x02\0\x3c\0\0", Spoken::Mqtt),
        (b"\x50\xe1\x23\x10\0\0\x20", Spoken::CoapTcp),
    ];
    for (bytes, spoken) in cases {
        let detected = detecting_bytes(Config::default(), bytes).await.0.unwrap();
        assert_eq!((detected.spoken, &detected.prefix[..]), (spoken, bytes));
    }
}

#[tokio::test(start_paused = true)]
async fn silence_and_a_slow_drip_end_at_the_deadline() {
    let began = Instant::now();
    let (silent, _) = detecting_bytes(Config::default(), b"").await;
    assert_eq!(silent.unwrap_err(), Refusal::Silent);
    assert_eq!(began.elapsed(), Duration::from_secs(5));

    let began = Instant::now();
    let (drip, _) = detecting(&listener(Config::default()), |mut io| async move {
        for _ in 0..30 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if io.write_all(b"G").await.is_err() {
                return;
            }
        }
    })
    .await;
    assert_eq!(drip.unwrap_err(), Refusal::Silent);
    assert_eq!(began.elapsed(), Duration::from_secs(5));
}

#[tokio::test(start_paused = true)]
async fn strangers_are_told_apart() {
    let cases: [(&[u8], Refusal); 5] = [
        (b"SSH-2.0-OpenSSH_9.2\r\n", Refusal::Unknown),
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", Refusal::TlsOnPlain),
        (b"PROXY TCP4 203.0.113.7 192.0.2.2 5 6\r\nGET / HTTP/1.1\r\n", Refusal::ProxyHeader),
        (b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0", Refusal::ProxyHeader),
        (b"\xff\xff\xff\xff\xff\xff", Refusal::Unknown),
    ];
    for (bytes, refusal) in cases {
        assert_eq!(detecting_bytes(Config::default(), bytes).await.0.unwrap_err(), refusal);
    }
    let (scan, _) = detecting(&listener(Config::default()), |io| async move { drop(io) }).await;
    assert_eq!(scan.unwrap_err(), Refusal::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_protocol_that_the_listener_does_not_offer_is_refused() {
    let only_mqtt = Config { protocols: vec![ProtocolName::Mqtt], ..Config::default() };
    let (http, _) = detecting_bytes(only_mqtt, b"GET / HTTP/1.1\r\n").await;
    assert_eq!(http.unwrap_err(), Refusal::ProtocolNotOffered);
    let only_websocket = Config { protocols: vec![ProtocolName::Websocket], ..Config::default() };
    assert_eq!(detecting_bytes(only_websocket.clone(), b"GET / HTTP/1.1\r\n").await.0.unwrap().spoken, Spoken::Http1);
    let (http2, _) = detecting_bytes(only_websocket, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    assert_eq!(http2.unwrap_err(), Refusal::ProtocolNotOffered);
}

fn behind_proxy() -> Config {
    Config { proxy_protocol_from: vec!["192.0.2.0/24".parse().unwrap()], ..Config::default() }
}

#[tokio::test(start_paused = true)]
async fn a_trusted_proxys_header_names_the_device() {
    let v1: &[u8] = b"PROXY TCP4 203.0.113.7 198.51.100.2 5000 6000\r\nGET / HTTP/1.1\r\n";
    let v2: &[u8] =
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xcb\0\x71\x07\xc6\x33\x64\x02\x13\x88\x17\x70GET / HTTP/1.1\r\n";
    for bytes in [v1, v2] {
        let (detected, conn) = detecting_bytes(behind_proxy(), bytes).await;
        let detected = detected.unwrap();
        assert_eq!(&detected.prefix[..], b"GET / HTTP/1.1\r\n");
        assert_eq!(conn.peer, "203.0.113.7:5000".parse().unwrap());
        assert_eq!(conn.local, "198.51.100.2:6000".parse().unwrap());
    }
    // The proxy's own health check, and a device that came directly.
    for bytes in [&b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0GET / HTTP/1.1\r\n"[..], b"GET / HTTP/1.1\r\n"] {
        let (detected, conn) = detecting_bytes(behind_proxy(), bytes).await;
        assert!(detected.is_ok());
        assert_eq!(conn.peer, "192.0.2.1:4000".parse().unwrap());
    }
}

#[tokio::test(start_paused = true)]
async fn a_proxy_header_is_bounded_and_checked_and_its_address_is_asked_about() {
    let cases: [(&[u8], Refusal); 5] = [
        (b"PROXY TCP4 203.0.113.66 198.51.100.2 5000 6000\r\nGET / HTTP/1.1\r\n", Refusal::AddressFilter),
        (b"PROXY TCP9 nonsense\r\nGET / HTTP/1.1\r\n", Refusal::ProxyHeader),
        (b"PROXY UNKNOWN\r\nPROXY UNKNOWN\r\n", Refusal::ProxyHeader),
        (b"PROXY TCP4 203.0.113.7", Refusal::Silent),
        (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff", Refusal::Silent),
    ];
    for (bytes, refusal) in cases {
        let (detected, _) = detecting_bytes(behind_proxy(), bytes).await;
        assert_eq!(detected.unwrap_err(), refusal, "{}", bytes.escape_ascii());
    }
    let (endless, _) = detecting(&listener(behind_proxy()), |mut io| async move {
        let _ = io.write_all(b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff").await;
        let _ = io.write_all(&[b'A'; 70_000]).await;
        std::future::pending::<()>().await;
    })
    .await;
    assert_eq!(endless.unwrap_err(), Refusal::SniffBytesMax);
}

#[tokio::test]
async fn inside_tls_alpn_decides_first_and_the_first_bytes_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    let config = tls_config(folder.path());
    let ca_file = config.certificate.clone();
    let listener = listener(config);
    let cases: [(Vec<Alpn>, &'static [u8], Spoken); 4] = [
        (vec![Alpn::Mqtt], b"", Spoken::Mqtt),
        (vec![Alpn::Http1, Alpn::Http2], b"", Spoken::Http2),
        (vec![], b"GET / HTTP/1.1\r\n", Spoken::Http1),
        (vec![], b"\x10\x0c\0\x04MQTT\x04\x02\0\x3c\0\0", Spoken::Mqtt),
    ];
    for (alpn, bytes, spoken) in cases {
        let client =
            Client::new(&ClientConfig { ca_file: ca_file.clone(), alpn: alpn.clone(), identity: None }).unwrap();
        let (detected, conn) = detecting(&listener, move |io| async move {
            let (mut io, _) = client.connect("localhost", io).await.unwrap();
            io.write_all(bytes).await.unwrap();
            io.flush().await.unwrap();
            let mut echo = [0; 2];
            io.read_exact(&mut echo).await.unwrap();
            assert_eq!(&echo, b"ok");
        })
        .await;
        let mut detected = detected.unwrap();
        assert_eq!((detected.spoken, &detected.prefix[..]), (spoken, bytes));
        assert_eq!(conn.tls.unwrap().alpn.is_some(), !alpn.is_empty());
        detected.io.write_all(b"ok").await.unwrap();
        detected.io.flush().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_tls_listener_refuses_plain_text_and_bounds_the_handshake() {
    let folder = tempfile::tempdir().unwrap();
    let listener = listener(tls_config(folder.path()));
    let (plain, _) = detecting(&listener, |mut io| async move {
        io.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        std::future::pending::<()>().await;
    })
    .await;
    assert_eq!(plain.unwrap_err(), Refusal::PlainOnTls);

    let began = Instant::now();
    let (stuck, _) = detecting(&listener, |mut io| async move {
        io.write_all(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03").await.unwrap();
        std::future::pending::<()>().await;
    })
    .await;
    assert_eq!(stuck.unwrap_err(), Refusal::TlsTimeout);
    assert_eq!(began.elapsed(), Duration::from_secs(10));

    let (broken, _) = detecting(&listener, |mut io| async move {
        io.write_all(b"\x16\x03\x01\0\x05\x01\0\0\x01\0").await.unwrap();
        std::future::pending::<()>().await;
    })
    .await;
    assert_eq!(broken.unwrap_err(), Refusal::TlsHandshake);
}

#[tokio::test]
async fn a_renewed_certificate_is_taken_up_and_a_bad_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let config = tls_config(folder.path());
    let (certificate, key) = (config.certificate.clone().unwrap(), config.key.clone().unwrap());
    let listener = listener(config);
    let before = listener.tls().unwrap();
    std::fs::write(&certificate, "nothing").unwrap();
    assert!(matches!(listener.reload_tls(), Err(Error::Tls { .. })));
    assert!(Arc::ptr_eq(&before, &listener.tls().unwrap()));
    let renewed = identity(folder.path(), "renewed");
    std::fs::rename(renewed.certificate, &certificate).unwrap();
    std::fs::rename(renewed.key, key).unwrap();
    listener.reload_tls().unwrap();
    let client = Client::new(&ClientConfig { ca_file: Some(certificate), ..ClientConfig::default() }).unwrap();
    let (detected, _) = detecting(&listener, move |io| async move {
        let (mut io, _) = client.connect("localhost", io).await.unwrap();
        io.write_all(b"GET / ").await.unwrap();
        std::future::pending::<()>().await;
    })
    .await;
    assert_eq!(detected.unwrap().spoken, Spoken::Http1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_input_panics_or_outlives_its_deadlines(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        header in prop::sample::select(vec![
            &b""[..], b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ::1 ", b"\r\n\r\n\0\r\nQUIT\n", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x21\0\x24", b"\x16\x03\x01\0\x40\x01\0",
        ]),
        cut in 1..64usize,
    ) {
        let mut input = header.to_vec();
        input.extend_from_slice(&bytes);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async move {
            let began = Instant::now();
            let _ = detecting(&listener(behind_proxy()), move |mut io| async move {
                for piece in input.chunks(cut) {
                    if io.write_all(piece).await.is_err() { return; }
                    tokio::task::yield_now().await;
                }
                std::future::pending::<()>().await;
            }).await;
            assert!(began.elapsed() <= Duration::from_secs(20));
        });
    }
}

/// Greets with what it recognised, then waits for the peer or the shutdown.
#[derive(Clone)]
struct Greeter {
    limits: Limits,
}

impl Serve for Greeter {
    fn limits(&self) -> Limits {
        self.limits.clone()
    }

    fn admit(&self, _peer: IpAddr) -> Result<(), Refusal> {
        Ok(())
    }

    fn serve<IO>(
        &self,
        spoken: Spoken,
        mut io: IO,
        prefix: BytesMut,
        _conn: ConnectionInfo,
        shutdown: CancellationToken,
    ) -> Serving
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        Box::pin(async move {
            assert!(!prefix.starts_with(b"GET /panic"), "on purpose");
            let _ = io.write_all(format!("{spoken:?}\n").as_bytes()).await;
            if prefix.starts_with(b"GET /deaf") {
                std::future::pending::<()>().await;
            }
            let mut rest = [0; 64];
            tokio::select! {
                _ = io.read(&mut rest) => {}
                () = shutdown.cancelled() => { let _ = io.write_all(b"bye\n").await; }
            }
        })
    }

    async fn serve_group(&self, _: std::net::UdpSocket, _: Arc<Listener>, _: CancellationToken) {}

    async fn serve_datagrams(&self, socket: std::net::UdpSocket, _: Arc<Listener>, shutdown: CancellationToken) {
        let socket = tokio::net::UdpSocket::from_std(socket).unwrap();
        let mut buffer = [0; 64];
        loop {
            tokio::select! {
                received = socket.recv_from(&mut buffer) => {
                    let (length, peer) = received.unwrap();
                    socket.send_to(&buffer[..length], peer).await.unwrap();
                }
                () = shutdown.cancelled() => return,
            }
        }
    }
}

struct Running {
    addresses: Vec<SocketAddr>,
    shutdown: CancellationToken,
    workers: worker::Workers,
    permits: Arc<Permits>,
}

fn running(limits: Limits) -> Running {
    let any = |name: &str, transport| Config {
        name: name.into(),
        bind: "127.0.0.1:0".parse().unwrap(),
        transport,
        ..Config::default()
    };
    let bound = bind(&[any("plain", TransportKind::Tcp), any("coap", TransportKind::Udp)], 2).unwrap();
    let shares = parking_lot::Mutex::new(bound.sockets.into_iter().map(Some).collect::<Vec<_>>());
    let permits = Arc::new(Permits::default());
    let shared = permits.clone();
    let shutdown = CancellationToken::new();
    let workers = worker::start(2, shutdown.clone(), move |worker| {
        let sockets = shares.lock()[worker.index].take().unwrap();
        run(worker, sockets, shared.clone(), Greeter { limits: limits.clone() })
    })
    .unwrap();
    Running { addresses: bound.addresses, shutdown, workers, permits }
}

fn greeting(stream: &mut TcpStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap_or(0) == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

#[test]
fn a_listener_serves_limits_survives_a_panic_and_drains() {
    let running = running(Limits { connections_per_address_max: 3, drain_timeout_ms: 300, ..Limits::default() });
    let connect = |request: &[u8]| {
        let mut stream = TcpStream::connect(running.addresses[0]).unwrap();
        stream.write_all(request).unwrap();
        stream
    };
    let wait_for_open = |count| {
        let began = std::time::Instant::now();
        while running.permits.open() != count {
            assert!(began.elapsed() < Duration::from_secs(10), "{} open", running.permits.open());
            std::thread::yield_now();
        }
    };
    assert_eq!(greeting(&mut connect(b"GET /panic HTTP/1.1\r\n")), "");
    wait_for_open(0);
    let mut held: Vec<TcpStream> = (0..3).map(|_| connect(b"GET / HTTP/1.1\r\n")).collect();
    for stream in &mut held {
        assert_eq!(greeting(stream), "Http1");
    }
    assert_eq!(greeting(&mut connect(b"GET / HTTP/1.1\r\n")), "", "the fourth from one address is closed");
    held.pop();
    wait_for_open(2);
    let mut deaf = connect(b"GET /deaf HTTP/1.1\r\n");
    assert_eq!(greeting(&mut deaf), "Http1");

    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    udp.send_to(b"ping", running.addresses[1]).unwrap();
    let mut pong = [0; 8];
    udp.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    assert_eq!(udp.recv(&mut pong).unwrap(), 4);

    let (tell, told) = mpsc::channel();
    let Running { shutdown, workers, addresses, .. } = running;
    let joining = std::thread::spawn(move || tell.send(workers.join()));
    shutdown.cancel();
    for stream in &mut held {
        assert_eq!(greeting(stream), "bye");
    }
    assert_eq!(greeting(&mut deaf), "", "closed at the drain deadline");
    assert_eq!(told.recv_timeout(Duration::from_secs(10)).unwrap(), Ok(()));
    joining.join().unwrap().unwrap();
    assert!(TcpStream::connect(addresses[0]).is_err(), "nobody listens any more");
}

#[test]
fn one_port_that_is_taken_fails_all_listeners_and_names_the_one() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let free = Config { name: "free".into(), bind: "127.0.0.1:0".parse().unwrap(), ..Config::default() };
    let blocked = Config { name: "blocked".into(), bind: taken.local_addr().unwrap(), ..Config::default() };
    let error = bind(&[free, blocked], 2).unwrap_err();
    assert!(
        matches!(&error, Error::Bind { listener, source: worker::Error::PortTaken { .. } } if listener == "blocked")
    );
    assert!(error.to_string().contains("in use"), "{error}");
}

//! curl, unmodified, against the real binary.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use support::cloud::Cloud;
use support::{Gateway, Running, Wanted, free_address, program, said, stdout, wait_until};

const PACKAGE: &str = "Debian package curl";

/// curl's body and, on the last line, the status.
fn curl(arguments: &[&str]) -> (u16, String) {
    let mut words = vec!["curl", "-sS", "-m", "20", "-w", "\n%{http_code}"];
    words.extend(arguments);
    let output = program(PACKAGE, &words);
    assert!(output.status.success(), "{words:?}: {}", said(&output));
    let text = stdout(&output);
    let (body, status) = text.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), body.to_owned())
}

#[test]
fn curl_logs_in_by_oauth_publishes_and_reads_back() {
    let cloud = Cloud::start();
    let gateway = Gateway::start(&Wanted { cloud: vec![cloud.url()], ..Wanted::default() });
    let device = gateway.add_device("curl-1");
    let base = format!("http://{}", gateway.plain);
    let assertion = format!("client_assertion={}", gateway.jwt(&device));
    let login = [
        "-d",
        "grant_type=client_credentials",
        "--data-urlencode",
        "client_assertion_type=urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
        "--data-urlencode",
        &assertion,
        &format!("{base}/oauth2/token"),
    ];
    let (status, body) = curl(&login);
    assert_eq!(status, 200, "{body}");
    let answer: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(answer["token_type"], "Bearer");
    let (status, body) = curl(&login);
    assert!([400, 401].contains(&status), "a jti works once: {status} {body}");
    let bearer = format!("Authorization: Bearer {}", answer["access_token"].as_str().unwrap());

    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let payload = format!("from curl {version}");
        let (status, body) = curl(&[
            version,
            "-H",
            &bearer,
            "-H",
            "Content-Type: text/plain",
            "-d",
            &payload,
            &format!("{base}/telemetry/room"),
        ]);
        assert_eq!(status, 202, "{version}: {body}");
        wait_until("it arrives", || cloud.by_body().contains_key(&payload));
    }

    let topic = format!("{base}/topics/plant/curl/temp");
    assert_eq!(curl(&["-H", &bearer, "-X", "PUT", "-d", "21.5", &format!("{topic}?retain=1")]).0, 202);
    wait_until("the value is there", || curl(&["-H", &bearer, &topic]) == (200, "21.5".to_owned()));
    let (status, problem) = curl(&["-H", &bearer, "-d", "x", &format!("{base}/topics/dev/other/telemetry")]);
    assert_eq!(status, 403);
    let problem: serde_json::Value = serde_json::from_str(&problem).unwrap();
    assert_eq!(problem["status"], 403, "RFC 9457: {problem}");
    let (status, body) = curl(&["-d", "x", &format!("{base}/telemetry")]);
    assert_eq!(status, 401);
    assert!(!body.contains("curl-1"), "a stranger learns nothing: {body}");
}

#[test]
fn curl_follows_an_event_stream_that_mqtt_feeds() {
    let gateway = Gateway::start(&Wanted::default());
    let (reader, writer) = (gateway.add_device("reader"), gateway.add_device("writer"));
    let bearer = format!("Authorization: Bearer {}", gateway.bearer(&reader));
    let url = format!("http://{}/topics/plant/%2B/temp", gateway.plain);
    let mut child = Command::new("curl")
        .args(["-sSN", "-m", "25", "-H", &bearer, "-H", "Accept: text/event-stream", &url])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect(PACKAGE);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let _curl = Running(child);
    let mut mqtt = gateway.mqtt(&writer, true);
    let sender = std::thread::spawn(move || {
        // Until the stream is open nobody listens, and 0x10 says so.
        for n in 0..400 {
            if mqtt.publish_and_wait("plant/a/temp", format!("value {n}").as_bytes()).unwrap() == 0 {
                return n;
            }
            std::thread::sleep(std::time::Duration::from_millis(25));
        }
        panic!("nobody ever subscribed");
    });
    let line =
        lines.by_ref().map(|l| l.unwrap()).find(|l| l.starts_with("data:")).expect("the stream ended without data");
    let heard = sender.join().unwrap();
    assert!(line.contains(&format!("value {heard}")), "{line}");
}

#[test]
fn curl_goes_through_a_tunnel_where_one_is_allowed() {
    let cloud = Cloud::start();
    let target = cloud.url().replace("http://", "");
    let extra = format!("[[route]]\nname = \"out\"\nconnect = [\"{target}\"]\nauth = \"none\"\n");
    let gateway = Gateway::start(&Wanted { extra, ..Wanted::default() });
    let proxy = format!("http://{}", gateway.plain);
    let words = ["--proxytunnel", "-x", &proxy, "--noproxy", "", "-H", "ce-id: 1", "-d", "through"];
    let (status, body) = curl(&[&words[..], &[&format!("{}/t", cloud.url())]].concat());
    assert_eq!(status, 200, "{body}");
    assert!(cloud.by_body().contains_key("through"));
    let denied = ["curl", "-sS", "-m", "20", "--proxytunnel", "-x", &proxy, "--noproxy", "", "http://127.0.0.1:1/"];
    let output = program(PACKAGE, &denied);
    assert!(!output.status.success() && said(&output).contains("403"), "{}", said(&output));
}

#[test]
fn haproxys_proxy_headers_name_the_client_and_a_strangers_do_not() {
    let [behind, v1, v2] = [(); 3].map(|()| free_address());
    let extra = format!(
        "[[listener]]\nname = \"behind\"\nbind = \"{behind}\"\nproxy_protocol_from = [\"127.0.0.1/32\"]\n\n[[route]]\nname = \"who\"\n\
         path = \"/who\"\nauth = \"none\"\nanswer = {{ body = \"x\" }}\nresponse_headers = {{ set = {{ x-peer = \"{{peer}}\" }} }}\n"
    );
    let gateway = Gateway::start(&Wanted { extra, ..Wanted::default() });
    let config = format!(
        "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 20s\n  timeout server 20s\n\
         frontend v1\n  bind {v1}\n  default_backend v1\nbackend v1\n  server s {behind} send-proxy\n\
         frontend v2\n  bind {v2}\n  default_backend v2\nbackend v2\n  server s {behind} send-proxy-v2\n"
    );
    let file = gateway.path("haproxy.cfg");
    std::fs::write(&file, config).unwrap();
    let child = Command::new("haproxy").args(["-q", "-db", "-f"]).arg(&file).spawn().expect("Debian package haproxy");
    let _haproxy = Running(child);
    for front in [v1, v2] {
        wait_until("haproxy listens", || std::net::TcpStream::connect(front).is_ok());
        let url = format!("http://{front}/who");
        let (status, head) = curl(&["--noproxy", "*", "--interface", "127.0.0.5", "-D", "-", "-o", "/dev/null", &url]);
        assert_eq!(status, 200);
        assert!(head.contains("x-peer: 127.0.0.5"), "{head}");
    }
    let url = format!("http://{behind}/who");
    let words = ["curl", "-sS", "-m", "20", "--noproxy", "*", "--haproxy-protocol", "--interface", "127.0.0.6", &url];
    assert!(!program(PACKAGE, &words).status.success(), "whoever is not trusted may not say who it is");
}

/// h2load's requests that were answered 2xx, of how many.
fn h2load(words: &[&str]) -> (u64, u64) {
    let mut all = vec!["h2load", "-t2"];
    all.extend(words);
    let output = program("Debian package nghttp2-client", &all);
    assert!(output.status.success(), "{all:?}: {}", said(&output));
    let text = stdout(&output);
    let number = |line: &str, before: &str| -> u64 {
        let line = text.lines().find(|l| l.starts_with(line)).unwrap_or_else(|| panic!("no {line:?} in\n{text}"));
        let words: Vec<&str> = line.split([' ', ',']).filter(|word| !word.is_empty()).collect();
        let at = words.iter().position(|word| *word == before).unwrap_or_else(|| panic!("{line}"));
        words[at - 1].parse().unwrap()
    };
    assert_eq!(number("requests:", "errored"), 0, "{text}");
    (number("status codes:", "2xx"), number("requests:", "total"))
}

#[test]
fn h2load_is_served_every_request_with_and_without_tls() {
    let origin = support::chaos::ChaosOrigin::start();
    let tls = support::free_address();
    let extra = format!(
        "[[listener]]\nname = \"tls\"\nbind = \"{tls}\"\ntransport = \"tls\"\ncertificate = \"gateway.crt\"\nkey = \"gateway.key\"\n\n\
         [[upstream]]\nname = \"site\"\nkind = \"http\"\nendpoints = [{{ url = \"{}\" }}]\n\n\
         [[route]]\nname = \"site\"\npath_prefix = \"/api/\"\nto = \"site\"\nauth = \"none\"\n",
        origin.url()
    );
    let mut gateway = Gateway::prepare(&Wanted { extra, ..Wanted::default() });
    for what in ["ca", "gateway"] {
        let folder = gateway.folder.path().display().to_string();
        let made = program("tidegate", &[env!("CARGO_BIN_EXE_tidegate"), "cert", what, "--out", &folder]);
        assert!(made.status.success(), "{}", said(&made));
    }
    gateway.run();
    let (plain, tls) = (format!("http://{}/api/Well/1", gateway.plain), format!("https://{tls}/api/Well/1"));
    for (what, words) in [
        ("HTTP/2, prior knowledge", &["-n4000", "-c20", "-m10", &plain][..]),
        ("HTTP/2, ALPN", &["-n4000", "-c20", "-m10", &tls]),
        ("one connection, many streams", &["-t1", "-n4000", "-c1", "-m100", &tls]),
        ("small windows", &["-n1000", "-c10", "-m10", "-w10", "-W10", &plain]),
        ("bodies", &["-n1000", "-c10", "-m10", "-d", "tidegate.toml", &plain]),
        ("HTTP/1.1", &["--h1", "-n2000", "-c20", &plain]),
        ("HTTP/1.1 over TLS", &["--h1", "-n2000", "-c20", &tls]),
    ] {
        // The body is any file; the program runs where the test does.
        let file = gateway.path("tidegate.toml").display().to_string();
        let words: Vec<&str> = words.iter().map(|word| if *word == "tidegate.toml" { &*file } else { *word }).collect();
        let (well, all) = h2load(&words);
        assert_eq!(well, all, "{what}");
    }
    let served = gateway.metric("tidegate_requests_total", "");
    assert!(served >= 18_000.0, "{served}");
}

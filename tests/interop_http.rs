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

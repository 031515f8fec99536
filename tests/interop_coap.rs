//! libcoap's coap-client and aiocoap, unmodified, against the real binary.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::thread;

use support::cloud::Cloud;
use support::coap::CoapClient;
use support::{Gateway, Running, Wanted, program, said, stdout, wait_until};

const PACKAGE: &str = "Debian package libcoap3-bin";

fn coap_client(arguments: &[&str]) -> String {
    let mut words = vec!["coap-client-notls", "-B", "10"];
    words.extend(arguments);
    let output = program(PACKAGE, &words);
    // What it prints of errors goes to standard error, with the code.
    format!("{}{}", stdout(&output), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn coap_client_publishes_reads_and_is_told_no() {
    let cloud = Cloud::start();
    let gateway = Gateway::start(&Wanted { cloud: vec![cloud.url()], ..Wanted::default() });
    let device = gateway.add_device("coap-1");
    let token = gateway.coap_token(&mut CoapClient::connect(gateway.coap).unwrap(), &device);
    let base = format!("coap://{}", gateway.coap);

    assert_eq!(coap_client(&["-m", "post", "-e", "confirmable", &format!("{base}/t/room?t={token}")]).trim(), "");
    assert_eq!(coap_client(&["-N", "-m", "post", "-e", "unconfirmable", &format!("{base}/t?t={token}")]).trim(), "");
    wait_until("both arrive", || cloud.by_body().len() == 2);

    let topic = format!("{base}/ps/plant/coap/temp?t={token}");
    assert_eq!(coap_client(&["-m", "put", "-e", "21.5", &topic]).trim(), "");
    assert_eq!(coap_client(&["-m", "get", &topic]).trim(), "21.5");
    let refused = coap_client(&["-m", "put", "-e", "x", &format!("{base}/ps/dev/other/telemetry?t={token}")]);
    assert!(refused.contains("4.03"), "{refused}");
    let stranger = coap_client(&["-m", "post", "-e", "x", &format!("{base}/t")]);
    assert!(stranger.contains("4.01"), "{stranger}");
    let listed = coap_client(&["-m", "get", &format!("{base}/.well-known/core?t={token}")]);
    assert!(listed.contains("</"), "{listed}");
}

#[test]
fn coap_client_deletes_searches_and_patches() {
    let gateway = Gateway::start(&Wanted::default());
    let device = gateway.add_device("coap-5");
    let token = gateway.coap_token(&mut CoapClient::connect(gateway.coap).unwrap(), &device);
    for base in [format!("coap://{}", gateway.coap), format!("coap+tcp://{}", gateway.plain)] {
        let value = format!("{base}/ps/plant/json?t={token}");
        let kept = format!("{base}/ps/plant/json?t={token}&retain=1");
        assert_eq!(coap_client(&["-m", "put", "-t", "50", "-e", r#"{"a":1,"b":2}"#, &kept]).trim(), "");
        assert_eq!(coap_client(&["-m", "ipatch", "-t", "52", "-e", r#"{"a":null,"b":3}"#, &value]).trim(), "");
        assert_eq!(coap_client(&["-m", "get", &value]).trim(), r#"{"b":3}"#);
        let found = coap_client(&["-m", "fetch", "-t", "0", "-e", "plant/#", &format!("{base}/ps?t={token}")]);
        assert!(found.contains("</ps/plant/json>"), "{found}");
        let nothing = coap_client(&["-m", "fetch", "-t", "0", "-e", "plant/none", &format!("{base}/ps?t={token}")]);
        assert!(!nothing.contains('<'), "{nothing}");
        assert_eq!(coap_client(&["-m", "delete", &value]).trim(), "");
        assert!(coap_client(&["-m", "get", &value]).contains("4.04"));
    }
}

#[test]
fn coap_client_gets_through_where_three_datagrams_in_ten_are_lost() {
    let gateway = Gateway::start(&Wanted::default());
    let device = gateway.add_device("coap-6");
    let token = gateway.coap_token(&mut CoapClient::connect(gateway.coap).unwrap(), &device);
    let url = format!("coap://{}/ps/plant/lossy?t={token}", gateway.coap);
    // In less than one of a hundred runs it loses as many in a row as RFC 7252 lets it send.
    let through = |words: &[&str], wanted: &str| {
        (0..3).any(|_| coap_client(&[&["-l", "30%", "-B", "25"], words].concat()).trim() == wanted)
    };
    for value in ["one", "two", "three"] {
        assert!(through(&["-m", "put", "-e", value, &url], ""), "{value}");
        assert!(through(&["-m", "get", &url], value), "{value}");
    }
}

#[test]
fn coap_client_sends_long_bodies_in_blocks_over_loss_and_over_tcp() {
    let gateway = Gateway::start(&Wanted::default());
    let device = gateway.add_device("coap-2");
    let token = gateway.coap_token(&mut CoapClient::connect(gateway.coap).unwrap(), &device);
    let long = "0123456789abcdef".repeat(400);
    let file = gateway.path("long.txt");
    std::fs::write(&file, &long).unwrap();
    let file = file.to_str().unwrap();
    let (udp, tcp) = (format!("coap://{}/ps/plant", gateway.coap), format!("coap+tcp://{}/ps/plant", gateway.plain));
    // The address that asks has shown nothing but a token: the client is sent an Echo first, and brings it back by itself.
    for (name, base, options) in [
        ("plain", &udp, &[][..]),
        ("small-blocks", &udp, &["-b", "64"]),
        // Its first and fourth datagram are lost.
        ("loss", &udp, &["-l", "1,4", "-B", "25"]),
        ("tcp", &tcp, &[]),
    ] {
        let url = format!("{base}/{name}?t={token}");
        let put = [options, &["-m", "put", "-f", file, &url]].concat();
        assert_eq!(coap_client(&put).trim(), "", "{name}");
        let got = coap_client(&[options, &["-m", "get", &url]].concat());
        assert!(got.trim() == long, "{name}: {} bytes, {}", got.len(), got.get(..80).unwrap_or(&got));
    }
    let stranger = coap_client(&["-m", "post", "-e", "x", &format!("coap+tcp://{}/t", gateway.plain)]);
    assert!(stranger.contains("4.01"), "{stranger}");
}

/// An HTTP server that says what it was asked, and at `/long` a long text.
fn origin(long: &'static str) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            // One request a connection.
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                if stream.read_line(&mut head).unwrap() == 0 {
                    break;
                }
            }
            let header = |name: &str| {
                let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with(&format!("{name}: ")));
                line.map_or("", |line| &line[name.len() + 2..])
            };
            let mut body = vec![0; header("content-length").parse().unwrap_or(0)];
            stream.read_exact(&mut body).unwrap();
            let asked = head.lines().next().unwrap_or_default().trim_end_matches(" HTTP/1.1");
            let answer = match asked {
                "GET /long" => long.to_owned(),
                "POST /echo" => String::from_utf8(body).unwrap(),
                _ => format!("{asked} {} {}", header("content-type"), String::from_utf8_lossy(&body)),
            };
            let head = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/plain\r\netag: \"1\"\r\n";
            let answer = format!("{head}content-length: {}\r\n\r\n{answer}", answer.len());
            // A health check may not wait for it.
            let _ = stream.get_mut().write_all(answer.as_bytes());
        }
    });
    address
}

#[test]
fn coap_client_reaches_an_http_upstream_along_a_route() {
    let long: &'static str = "0123456789abcdef".repeat(400).leak();
    let extra = format!(
        "\n[[upstream]]\nname = \"site\"\nkind = \"http\"\nendpoints = [{{ url = \"http://{}\" }}]\n\n\
         [[route]]\nname = \"api\"\npath_prefix = \"/api\"\nto = \"site\"\nauth = \"none\"\nrewrite = \"/\"\n\n\
         [[route]]\nname = \"own\"\npath_prefix = \"/own\"\nto = \"site\"\n",
        origin(long)
    );
    let gateway = Gateway::start(&Wanted { extra, ..Wanted::default() });
    let file = gateway.path("long.txt");
    std::fs::write(&file, long).unwrap();
    let file = file.to_str().unwrap();
    let device = gateway.add_device("coap-4");
    let token = gateway.coap_token(&mut CoapClient::connect(gateway.coap).unwrap(), &device);
    for base in [format!("coap://{}", gateway.coap), format!("coap+tcp://{}", gateway.plain)] {
        let get = coap_client(&["-m", "get", &format!("{base}/api/x%20y?a=b")]);
        assert_eq!(get.trim(), "GET /x%20y?a=b", "{base}");
        let put = coap_client(&["-m", "put", "-t", "50", "-e", "{}", &format!("{base}/api/x")]);
        assert_eq!(put.trim(), "PUT /x application/json {}", "{base}");
        assert!(coap_client(&["-m", "get", &format!("{base}/api/long")]).trim() == long, "{base}");
        let echo = coap_client(&["-m", "post", "-f", file, &format!("{base}/api/echo?t={token}")]);
        assert!(
            echo.trim() == long,
            "{base}: {} bytes, {}",
            echo.len(),
            echo.get(echo.len().saturating_sub(90)..).unwrap_or(&echo)
        );
        let refused = coap_client(&["-m", "get", &format!("{base}/own/x?t={token}")]);
        assert!(refused.contains("4.03"), "{refused}");
        assert!(coap_client(&["-m", "get", &format!("{base}/own/x")]).contains("4.01"));
        assert!(coap_client(&["-m", "get", &format!("{base}/other?t={token}")]).contains("4.04"));
    }
}

#[test]
fn coap_client_observes_what_mqtt_publishes() {
    let gateway = Gateway::start(&Wanted::default());
    let (reader, writer) = (gateway.add_device("reader"), gateway.add_device("writer"));
    let token = gateway.coap_token(&mut CoapClient::connect(gateway.coap).unwrap(), &reader);
    let url = format!("coap://{}/ps/plant/a/temp?t={token}", gateway.coap);
    let mut mqtt = gateway.mqtt(&writer, true);
    mqtt.publish_and_wait("plant/a/temp", b"first\n").unwrap();
    let mut child = Command::new("coap-client-notls")
        .args(["-m", "get", "-s", "20", "-B", "25", &url])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect(PACKAGE);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let _observer = Running(child);
    // libcoap prints a notification when it comes.
    let sender = std::thread::spawn(move || {
        for n in 0..200 {
            if mqtt.publish_and_wait("plant/a/temp", format!("second {n}\n").as_bytes()).unwrap() == 0 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        panic!("nobody ever observed");
    });
    assert!(lines.by_ref().map(|l| l.unwrap()).any(|l| l.contains("second")), "no notification was printed");
    sender.join().unwrap();
}

#[test]
fn aiocoap_proves_its_key_and_speaks_everything() {
    let cloud = Cloud::start();
    let gateway = Gateway::start(&Wanted { cloud: vec![cloud.url()], ..Wanted::default() });
    let device = gateway.add_device("aiocoap-1");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop/coap_device.py");
    let tcp = gateway.plain.port().to_string();
    let (port, key) = (gateway.coap.port().to_string(), device.key.to_str().unwrap().to_owned());
    let output =
        program("PyPI aiocoap", &[&support::python(), script, &port, &device.id, &key, &gateway.id_hex(&device), &tcp]);
    assert!(output.status.success() && stdout(&output).ends_with("ok\n"), "{}", said(&output));
    let long = "long ".repeat(1000);
    wait_until("telemetry arrives", || {
        let arrived = cloud.by_body();
        arrived.contains_key("from aiocoap") && arrived.contains_key(&long)
    });
}

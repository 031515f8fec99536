//! The request plane through the running gateway: a route, a real upstream, real clients.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

use support::cloud::{Cloud, Mood};
use support::http::{self, HttpClient};
use support::{Gateway, Wanted};

/// A gateway that passes `/api` on to `upstreams`, for anybody, and `/own` for devices.
fn gateway(upstreams: &[String], more: &str) -> Gateway {
    let endpoints: Vec<String> = upstreams.iter().map(|url| format!("{{ url = \"{url}\" }}")).collect();
    let extra = format!(
        "[[upstream]]\nname = \"site\"\nkind = \"http\"\nendpoints = [{}]\nretry = {{ per_second_min = 100 }}\n{more}\n\
         [[route]]\nname = \"api\"\npath_prefix = \"/api\"\nto = \"site\"\nauth = \"none\"\ntimeout_ms = 2000\n\n\
         [[route]]\nname = \"own\"\npath_prefix = \"/own\"\nto = \"site\"\n",
        endpoints.join(", ")
    );
    Gateway::start(&Wanted { extra, ..Wanted::default() })
}

#[test]
fn a_request_goes_through_with_its_body_and_says_where_it_came_from() {
    let cloud = Cloud::start();
    let gateway = gateway(&[cloud.url()], "");
    let mut client = HttpClient::connect(gateway.plain).unwrap();
    for n in 0..20 {
        let response = client.request("POST", "/api/x?y=z", &[("ce-id", "1")], format!("{n}").as_bytes()).unwrap();
        assert_eq!(response.status, 200, "{response:?}");
    }
    let arrived = cloud.arrived();
    assert_eq!(arrived.len(), 20);
    assert!(arrived.iter().all(|a| a.path == "/api/x?y=z"));
    assert_eq!(arrived[7].body, "7");
    assert_eq!(http::once(gateway.plain, "GET", "/own/x", &[], b"").unwrap().status, 401, "only for devices");
    assert_eq!(http::once(gateway.plain, "GET", "/other", &[], b"").unwrap().status, 404);
}

#[test]
fn an_upstream_in_trouble_is_told_apart() {
    let cloud = Cloud::start();
    let gateway = gateway(&[cloud.url()], "connect_timeout_ms = 1000");
    let post = || http::once(gateway.plain, "POST", "/api", &[("ce-id", "1")], b"x").unwrap().status;
    assert_eq!(post(), 200);
    for (mood, status) in [(Mood::Status(418), 418), (Mood::Reset, 502), (Mood::Down, 502), (Mood::Slow(5000), 504)] {
        cloud.set(mood);
        assert_eq!(post(), status, "{mood:?}");
    }
    cloud.set(Mood::Well);
    assert_eq!(post(), 200);
}

#[test]
fn one_endpoint_of_two_is_enough_for_every_request() {
    let cloud = Cloud::start();
    let dead = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let gateway = gateway(&[format!("http://{dead}"), cloud.url()], "balance = \"round_robin\"");
    let mut client = HttpClient::connect(gateway.plain).unwrap();
    for _ in 0..20 {
        assert_eq!(client.request("POST", "/api", &[("ce-id", "1")], b"x").unwrap().status, 200);
    }
    assert_eq!(cloud.arrived().len(), 20);
}

#[test]
fn an_upgraded_connection_is_a_tunnel() {
    let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = upstream.local_addr().unwrap();
    let served = thread::spawn(move || {
        let (mut stream, _) = upstream.accept().unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n").unwrap();
        let mut text = [0; 5];
        stream.read_exact(&mut text).unwrap();
        stream.write_all(&text).unwrap();
        String::from_utf8(head).unwrap().to_ascii_lowercase()
    });
    let gateway = gateway(&[format!("http://{address}")], "");
    let mut client = TcpStream::connect(gateway.plain).unwrap();
    client.write_all(b"GET /api/ws HTTP/1.1\r\nHost: gateway\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        answer.push(byte[0]);
    }
    let answer = String::from_utf8(answer).unwrap().to_ascii_lowercase();
    assert!(answer.starts_with("http/1.1 101") && answer.contains("upgrade: echo"), "{answer}");
    client.write_all(b"hello").unwrap();
    let mut back = [0; 5];
    client.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"hello");
    let head = served.join().unwrap();
    assert!(head.contains("upgrade: echo") && head.contains("x-forwarded-for: 127.0.0.1"), "{head}");
}

#[test]
fn keys_of_a_provider_are_fetched_again_for_an_unknown_one_and_kept_while_it_is_away() {
    const OTHER: &str = r#"{"keys":[{"kty":"oct","k":"MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE"}]}"#;
    let provider = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = provider.local_addr().unwrap();
    let served = thread::spawn(move || {
        let mut asked = Vec::new();
        for set in [OTHER, include_str!("data/jwt/jwks.json")] {
            let (mut stream, _) = provider.accept().unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                head.push(byte[0]);
            }
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{set}", set.len());
            stream.write_all(answer.as_bytes()).unwrap();
            asked.push(String::from_utf8(head).unwrap());
        }
        // Then it is gone.
        asked
    });
    let extra = format!(
        "[[upstream]]\nname = \"idp\"\nkind = \"http\"\nendpoints = [{{ url = \"http://{address}\" }}]\n\n\
         [[route]]\nname = \"in\"\npath = \"/in\"\nanswer = {{ body = \"in\" }}\nauth = \"jwt\"\n\
         jwt = {{ issuer = \"https://idp.example\", audiences = [\"api\"], jwks_upstream = \"idp\", jwks_path = \"/keys\", jwks_retry_secs = 1 }}\n"
    );
    let gateway = Gateway::start(&Wanted { extra, ..Wanted::default() });
    let tokens: serde_json::Value = serde_json::from_str(include_str!("data/jwt/tokens.json")).unwrap();
    let bearer = format!("Bearer {}", tokens["good_es256"].as_str().unwrap());
    let ask = || http::once(gateway.plain, "GET", "/in", &[("authorization", &bearer)], b"").unwrap().status;
    support::wait_until("the key is there", || ask() == 200);
    let asked = served.join().unwrap();
    assert!(asked.iter().all(|head| head.starts_with("GET /keys HTTP/1.1")), "{asked:?}");
    assert_eq!(ask(), 200);
    gateway.command_ok(&["check"]);
    support::signal(gateway.pid(), "HUP");
    support::wait_until("it has reloaded", || gateway.log().contains("configuration reloaded"));
    assert_eq!(ask(), 200, "the provider is away, and its keys are kept");
}

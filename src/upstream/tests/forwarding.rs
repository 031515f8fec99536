//! What becomes of messages when the backend fails, refuses, comes back.

use std::collections::HashSet;
use std::net::{Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

use serde_json::json;

use super::backend::{Backend, Mood};
use super::{Gateway, forward, message, upstream, wait_until};
use crate::spool::{self, Reason, Spool};

const MESSAGES: u64 = 25;

fn expected(messages: u64) -> Vec<(String, String)> {
    (0..messages).map(|n| (format!("gw/7/{n}"), n.to_string())).collect()
}

/// Events in the order of their first arrival; a repetition has to be the same.
fn once(events: Vec<(String, String)>) -> Vec<(String, String)> {
    let mut seen = HashSet::new();
    let events: Vec<_> = events.into_iter().filter(|event| seen.insert(event.clone())).collect();
    let ids: HashSet<&String> = events.iter().map(|(id, _)| id).collect();
    assert_eq!(ids.len(), events.len(), "one id, two messages");
    events
}

/// Forwards while the backend is in `mood`, until it has failed some; then lets it recover.
async fn nothing_is_lost_while(mood: Mood) {
    let backend = Backend::start(mood.clone()).await;
    let gateway = Gateway::start(&upstream(&[backend.url()], json!({})), &forward(json!({})));
    for n in 0..MESSAGES {
        gateway.append(&message(n, "d", &n.to_string()));
    }
    // A reset comes before the request is read.
    let tried = || if mood == Mood::Reset { backend.connections() } else { backend.requests() };
    wait_until("two tries", || tried() >= 2).await;
    backend.set(Mood::Well);
    gateway.drained().await;
    assert_eq!(once(backend.events()), expected(MESSAGES));
    assert_eq!(gateway.lost(), []);
}

#[tokio::test]
async fn nothing_is_lost_to_500() {
    nothing_is_lost_while(Mood::Status(500)).await;
}

#[tokio::test]
async fn nothing_is_lost_to_429() {
    nothing_is_lost_while(Mood::Status(429)).await;
}

#[tokio::test]
async fn nothing_is_lost_to_a_redirect() {
    nothing_is_lost_while(Mood::Status(302)).await;
}

#[tokio::test]
async fn nothing_is_lost_to_expired_credentials_or_a_wrong_path() {
    for status in [401, 403, 404] {
        nothing_is_lost_while(Mood::Status(status)).await;
    }
}

#[tokio::test]
async fn nothing_is_lost_to_resets() {
    nothing_is_lost_while(Mood::Reset).await;
}

#[tokio::test]
async fn nothing_is_lost_to_a_black_hole() {
    nothing_is_lost_while(Mood::BlackHole).await;
}

#[tokio::test]
async fn nothing_is_lost_to_an_answer_that_drips_beyond_the_timeout() {
    nothing_is_lost_while(Mood::Drip(Duration::from_millis(100))).await;
}

#[tokio::test]
async fn nothing_is_lost_to_half_a_body() {
    let answer = "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n0123456789";
    nothing_is_lost_while(Mood::Raw { answer, keep: false }).await;
}

#[tokio::test]
async fn nothing_is_lost_to_half_a_chunk() {
    let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n10\r\n0123";
    nothing_is_lost_while(Mood::Raw { answer, keep: false }).await;
}

#[tokio::test]
async fn nothing_is_lost_to_an_answer_that_is_not_http() {
    for answer in ["", "220 mail.example ESMTP\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 1, 2\r\n\r\nx", "HTTP/1.1 200"]
    {
        nothing_is_lost_while(Mood::Raw { answer, keep: false }).await;
    }
}

#[tokio::test]
async fn what_was_stored_but_not_answered_comes_again_under_the_same_id() {
    nothing_is_lost_while(Mood::Raw { answer: "", keep: true }).await;
}

#[tokio::test]
async fn an_answer_longer_than_it_says_spoils_only_its_connection() {
    let answer = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok and HTTP/1.1 500 this\r\ncontent-length: 0\r\n\r\n";
    let backend = Backend::start(Mood::Raw { answer, keep: true }).await;
    let gateway = Gateway::start(&upstream(&[backend.url()], json!({})), &forward(json!({})));
    for n in 0..MESSAGES {
        gateway.append(&message(n, "d", &n.to_string()));
    }
    gateway.drained().await;
    assert_eq!(once(backend.events()), expected(MESSAGES));
}

#[tokio::test]
async fn a_backend_that_was_never_there_gets_everything_once_it_is() {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let gateway = Gateway::start(&upstream(&[format!("http://{address}")], json!({})), &forward(json!({})));
    for n in 0..MESSAGES {
        gateway.append(&message(n, "d", &n.to_string()));
    }
    let stats = || gateway.upstreams.describe().to_string();
    assert!(stats().contains("\"state\":\"available\""), "{}", stats());
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(gateway.spool.stats().iter().any(|sink| sink.queued_records == MESSAGES));
    assert_eq!(gateway.lost(), []);
}

#[tokio::test]
async fn connections_are_used_again() {
    let backend = Backend::start(Mood::Well).await;
    let gateway =
        Gateway::start(&upstream(&[backend.url()], json!({})), &forward(json!({ "batch": { "format": "single" } })));
    for n in 0..MESSAGES {
        gateway.append(&message(n, "d", &n.to_string()));
    }
    gateway.drained().await;
    assert_eq!((backend.requests() as u64, backend.connections()), (MESSAGES, 1));
}

#[tokio::test]
async fn no_drain_waits_for_a_connection_that_is_kept() {
    let backend = Backend::start(Mood::Well).await;
    let health = json!({ "interval_ms": 100 });
    let gateway = Gateway::start(&upstream(&[backend.url()], json!({ "health": health })), &forward(json!({})));
    let proxy = gateway.upstreams.proxy(&gateway.tasks);
    gateway.append(&message(0, "d", "0"));
    gateway.drained().await;
    let body = super::super::ProxyBody::default();
    let request = http::Request::post("/").body(body).unwrap();
    proxy.exchange("cloud", 0, request, Instant::now() + Duration::from_secs(30)).await.unwrap();
    let began = Instant::now();
    assert_eq!(gateway.tasks.drain(Duration::from_secs(60)).await.remaining, 0);
    assert!(began.elapsed() < Duration::from_secs(30));
}

#[tokio::test]
async fn the_message_that_is_refused_is_found_and_the_rest_goes_through() {
    for (format, status, reason) in [("ndjson", 400, Reason::Rejected), ("single", 413, Reason::TooLarge)] {
        let backend = Backend::start(Mood::Dislikes("poison", status)).await;
        let rule =
            forward(json!({ "refusals_max": 2, "batch": { "records_max": 16, "linger_ms": 50, "format": format } }));
        let gateway = Gateway::start(&upstream(&[backend.url()], json!({})), &rule);
        for n in 0..16 {
            let payload = if n == 5 { "\"poison\"".to_owned() } else { n.to_string() };
            gateway.append(&message(n, "d", &payload));
        }
        gateway.drained().await;
        let kept = backend.kept();
        let bodies: String = kept.iter().map(|received| received.body.as_str()).collect();
        assert!(!bodies.contains("poison"));
        if format == "ndjson" {
            let mut wanted = expected(16);
            wanted.remove(5);
            assert_eq!(backend.events(), wanted, "in order, each once");
        } else {
            assert_eq!(bodies, "012346789101112131415");
        }
        assert_eq!(gateway.lost(), [(reason, 1)]);
    }
}

#[tokio::test]
async fn one_endpoint_of_two_is_enough_and_takes_over_at_once() {
    let (good, bad) = (Backend::start(Mood::Well).await, Backend::start(Mood::Status(503)).await);
    let config = upstream(&[bad.url(), good.url()], json!({ "retry": { "per_second_min": 1000 } }));
    let gateway = Gateway::start(&config, &forward(json!({ "batch": { "records_max": 1, "linger_ms": 0 } })));
    for n in 0..MESSAGES {
        gateway.append(&message(n, "d", &n.to_string()));
    }
    gateway.drained().await;
    assert_eq!(good.events(), expected(MESSAGES));
    assert!(bad.requests() <= 6, "ejected after five errors in a row, {} requests", bad.requests());
}

#[tokio::test]
async fn the_wait_that_the_upstream_asks_for_is_kept() {
    let answer = "HTTP/1.1 503 Busy\r\nretry-after: 2\r\ncontent-length: 0\r\n\r\n";
    let backend = Backend::start(Mood::Raw { answer, keep: false }).await;
    let gateway = Gateway::start(&upstream(&[backend.url()], json!({})), &forward(json!({})));
    gateway.append(&message(0, "d", "0"));
    wait_until("the first try", || backend.requests() == 1).await;
    let began = Instant::now();
    backend.set(Mood::Well);
    gateway.drained().await;
    assert!(began.elapsed() >= Duration::from_millis(1900), "{:?}", began.elapsed());
}

#[tokio::test]
async fn an_unhealthy_endpoint_gets_nothing_and_its_return_ends_the_wait() {
    let backend = Backend::start(Mood::Status(500)).await;
    let health =
        json!({ "path": "/healthz", "interval_ms": 100, "timeout_ms": 400, "unhealthy_after": 1, "healthy_after": 1 });
    let config = upstream(&[backend.url()], json!({ "health": health, "required_for_ready": true }));
    let gateway = Gateway::start(&config, &forward(json!({})));
    let ready = || gateway.upstreams.required_checks();
    wait_until("it is unhealthy", || !ready()[0].1).await;
    let requests = backend.requests();
    for n in 0..MESSAGES {
        gateway.append(&message(n, "d", &n.to_string()));
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(backend.requests(), requests);
    assert!(gateway.upstreams.describe().to_string().contains("unhealthy"));
    backend.set(Mood::Well);
    gateway.drained().await;
    assert!(ready()[0].1, "{:?}", ready());
    assert_eq!(backend.events(), expected(MESSAGES));
}

#[test]
fn a_gateway_killed_in_the_middle_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let rule = forward(json!({ "delivery": "disk", "batch": { "records_max": 3, "linger_ms": 0 } }));
    // The cloud lives on while the gateway's runtime dies.
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let server = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        server.block_on(async {
            tell.send(Backend::start(Mood::Well).await).unwrap();
            std::future::pending::<()>().await;
        });
    });
    let backend = told.recv().unwrap();
    let config = upstream(&[backend.url()], json!({}));
    let mut sent = 0;
    for round in 0..5 {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let spool = Spool::open(folder.path(), spool::Config::default(), vec![rule.sink()]).unwrap();
        runtime.block_on(async {
            let upstreams = super::Upstreams::new(std::slice::from_ref(&config)).unwrap();
            let tasks = super::Tasks::default();
            let rules = std::slice::from_ref(&rule);
            super::super::spawn(&tasks, &upstreams, rules, &spool, "gw", super::Arc::new(super::NoDownlink));
            for _ in 0..20 {
                spool.append(&message(sent, "d", &sent.to_string()), &[spool.sink("rule").unwrap()], None, 0).unwrap();
                sent += 1;
            }
            let before = backend.requests();
            if round < 4 {
                wait_until("some are sent", || backend.requests() > before + 1).await;
            } else {
                let done = |sink: &spool::SinkStats| sink.appended == sent && sink.queued_records == 0;
                wait_until("all are sent", || spool.stats().iter().all(done)).await;
            }
        });
        // Tasks die where they are.
        drop(runtime);
        spool.close();
    }
    assert_eq!(once(backend.events()), expected(sent));
    drop(backend);
}

//! The request plane while its upstreams misbehave or come and go: no request outlives its deadline, no client gets another one's answer or half an
//! answer as a whole one, and no request fails that a healthy endpoint could have answered.
//!
//! `TIDEGATE_CHAOS_SECONDS` makes the first test that long instead of a fixed number of requests.
#![allow(clippy::unwrap_used)]

mod support;

use std::net::{SocketAddr, TcpListener};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use support::chaos::{ChaosOrigin, Fault, body_of};
use support::http::{HttpClient, Response};
use support::{Gateway, Wanted, http, wait_until};

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

fn upstream(name: &str, urls: &[String], more: &str) -> String {
    let endpoints: Vec<String> = urls.iter().map(|url| format!("{{ url = \"{url}\" }}")).collect();
    format!(
        "[[upstream]]\nname = \"{name}\"\nkind = \"http\"\nendpoints = [{}]\nconnect_timeout_ms = 500\n\
         retry = {{ per_second_min = 10000 }}\n{more}\n\n\
         [[route]]\nname = \"{name}\"\npath_prefix = \"/{name}/\"\nto = \"{name}\"\nauth = \"none\"\ntimeout_ms = 1500\nidle_timeout_ms = 1500\n\n",
        endpoints.join(", ")
    )
}

/// What a client may be told; `None` stands for a connection that is cut, so that it sees that there is no whole answer.
fn allowed(fault: Fault, method: &str) -> &'static [Option<u16>] {
    match fault {
        // What may have had an effect is not sent again.
        Fault::Well | Fault::SlowBytes | Fault::ClosesAfter | Fault::HalfClose if method == "POST" => {
            &[Some(200), Some(502)]
        }
        Fault::Well | Fault::SlowBytes | Fault::ClosesAfter | Fault::HalfClose => &[Some(200)],
        Fault::TooLong | Fault::Storm => &[Some(200), Some(502)],
        Fault::BlackHole => &[Some(504), Some(502)],
        Fault::EndlessStorm => &[Some(504), Some(502)],
        Fault::ResetAtOnce | Fault::Garbage | Fault::HugeHead => &[Some(502)],
        Fault::Stalls | Fault::ResetInBody | Fault::TooShort | Fault::BadChunk => &[None, Some(502)],
        Fault::Early => &[Some(413), Some(502), None],
    }
}

/// One request; whether what came is allowed, and the client's connection is left in a state to go on.
fn ask(client: &mut Option<HttpClient>, to: SocketAddr, fault: Fault, method: &str) -> Result<(), String> {
    let id = NEXT_ID.fetch_add(1, Ordering::Relaxed).to_string();
    let path = format!("/api/{fault:?}/{id}");
    let body =
        if method == "POST" { "x".repeat(if fault == Fault::Early { 300_000 } else { 100 }) } else { String::new() };
    if client.is_none() {
        *client = HttpClient::connect(to).ok();
    }
    let began = Instant::now();
    let connection = client.as_mut().ok_or_else(|| format!("{path}: no connection to the gateway"))?;
    // The client's own patience is ten times the deadline: what ends by it hangs.
    let answer = connection.request(method, &path, &[], body.as_bytes());
    let told = match &answer {
        Ok(response) => Some(response.status),
        Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
            return Err(format!("{method} {path}: hangs after {:?}", began.elapsed()));
        }
        Err(_) => None,
    };
    if answer.as_ref().map_or(true, |response| response.header("connection") == Some("close")) {
        *client = None;
    }
    if !allowed(fault, method).contains(&told) {
        return Err(format!("{method} {path}: {answer:?}"));
    }
    match answer {
        Ok(response) if [200, 413].contains(&response.status) && !is_answer_to(&response, &id) => {
            Err(format!("{method} {path}: another one's answer: {response:?}"))
        }
        _ => Ok(()),
    }
}

fn is_answer_to(response: &Response, id: &str) -> bool {
    response.header("x-id") == Some(id) && response.body == body_of(id)
}

#[test]
fn no_request_hangs_and_no_answer_is_mixed_up_whatever_the_upstream_does() {
    let origin = ChaosOrigin::start();
    // With its breaker an endpoint in such trouble would soon get nothing more to spoil.
    let extra = upstream("api", &[origin.url()], "breaker = { requests_min = 1000000 }\nconnections_max = 1000");
    let limits = "connections_per_address_max = 1000\n".to_owned();
    let gateway = Gateway::start(&Wanted { extra, limits, ..Wanted::default() });
    let seconds = std::env::var("TIDEGATE_CHAOS_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    let until = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    const CLIENTS: u64 = 24;
    const REQUESTS: u64 = 60;
    let faults = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for seed in 0..CLIENTS {
            let (gateway, faults) = (&gateway, &faults);
            scope.spawn(move || {
                let mut client = None;
                let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
                for n in 0.. {
                    if until.map_or(n >= REQUESTS, |until| Instant::now() >= until) {
                        break;
                    }
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    // Half of the requests are to be served well, over connections that others have spoilt.
                    let number = usize::try_from(random >> 33).unwrap();
                    let fault = if number % 2 == 0 { Fault::Well } else { Fault::ALL[number / 2 % Fault::ALL.len()] };
                    let method = if number / 64 % 4 == 0 { "POST" } else { "GET" };
                    if let Err(what) = ask(&mut client, gateway.plain, fault, method) {
                        faults.lock().unwrap().push(what);
                    }
                }
            });
        }
    });
    let faults = faults.into_inner().unwrap();
    assert!(faults.is_empty(), "{} of {}\n{}", faults.len(), NEXT_ID.load(Ordering::Relaxed), faults.join("\n"));
    assert!(gateway.is_ready());
}

#[test]
fn an_endpoint_that_does_not_connect_costs_no_more_than_the_deadline() {
    let origin = ChaosOrigin::start();
    let refuses = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    // A listener that nobody accepts from, its queue full: a SYN to it is not answered.
    let full = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    full.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    full.listen(0).unwrap();
    let silent = full.local_addr().unwrap().as_socket().unwrap();
    let _queued: Vec<_> =
        (0..4).map(|_| std::net::TcpStream::connect_timeout(&silent, Duration::from_millis(200))).collect();
    let (refuses, silent) = (format!("http://{refuses}"), format!("http://{silent}"));
    let extra = [
        upstream("refused", std::slice::from_ref(&refuses), ""),
        upstream("silent", std::slice::from_ref(&silent), ""),
        upstream("api", &[refuses, silent, origin.url()], "balance = \"round_robin\""),
    ];
    let gateway = Gateway::start(&Wanted { extra: extra.concat(), ..Wanted::default() });
    for (path, statuses) in [("/refused/x", [502, 503]), ("/silent/x", [502, 504])] {
        let status = http::once(gateway.plain, "GET", path, &[], b"").unwrap().status;
        assert!(statuses.contains(&status), "{path}: {status}");
    }
    let mut client = None;
    for _ in 0..30 {
        ask(&mut client, gateway.plain, Fault::Well, "GET").unwrap();
    }
}

/// Clients that ask all the time, and every request that failed.
struct Load {
    stop: AtomicBool,
    done: AtomicU64,
    failed: Mutex<Vec<String>>,
}

impl Load {
    fn run(&self, to: SocketAddr) {
        let mut client = None;
        while !self.stop.load(Ordering::Relaxed) {
            if let Err(what) = ask(&mut client, to, Fault::Well, "GET") {
                self.failed.lock().unwrap().push(what);
            }
            self.done.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Lets the clients go on for a while.
    fn goes_on(&self) {
        let from = self.done.load(Ordering::Relaxed);
        wait_until("the clients go on", || self.done.load(Ordering::Relaxed) > from + 400);
    }
}

#[test]
fn endpoints_die_and_return_under_load_and_no_request_fails() {
    let more = "balance = \"round_robin\"\n\
                health = { path = \"/api/Well/0\", interval_ms = 200, timeout_ms = 1000, unhealthy_after = 2, healthy_after = 1 }\n\
                eject = { base_ms = 1000, max_ms = 1000 }\nslow_start_ms = 0";
    let mut origins: Vec<ChaosOrigin> = (0..3).map(|_| ChaosOrigin::start()).collect();
    let urls: Vec<String> = origins.iter().map(ChaosOrigin::url).collect();
    let gateway = Gateway::start(&Wanted { extra: upstream("api", &urls, more), ..Wanted::default() });
    let load = Load { stop: AtomicBool::new(false), done: AtomicU64::new(0), failed: Mutex::default() };
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| load.run(gateway.plain));
        }
        // Whatever fails below, the clients end.
        let _ends = Ends(&load.stop);
        load.goes_on();
        for round in 0..6 {
            // One dies, and in every second round another one with it.
            let dead: Vec<SocketAddr> = (0..=round % 2).map(|_| origins.remove(0).address).collect();
            load.goes_on();
            for address in dead {
                origins.push(ChaosOrigin::start_at(address));
                let returned = origins.last().unwrap();
                wait_until("the one that returned is asked by clients", || returned.requests() > 50);
            }
            load.goes_on();
        }
    });
    let failed = load.failed.into_inner().unwrap();
    assert!(
        failed.is_empty(),
        "{} of {} failed\n{}",
        failed.len(),
        load.done.load(Ordering::Relaxed),
        failed.join("\n")
    );
}

struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

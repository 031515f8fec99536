//! HTTP through a proxy, by transport, body and number of connections: GET of a file that an nginx on the load's core serves. The load is h2load's;
//! for connections opened anew it is wrk's.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::compare::{Contender, Options};
use crate::folder::Folder;
use crate::gateway::{Gateway, Setup};
use crate::peers::{Peer, Server};
use crate::process::{LOAD_CORE, Process, SERVER_CORE, can_pin, find_program, free_address};
use crate::report::{Sample, Section};
use crate::{Failure, Result};

/// How the client's side speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Http1,
    Http1Tls,
    Http2Tls,
}

/// What every request asks for, and whether the proxy may keep it.
#[derive(Clone, Copy)]
struct Load {
    transport: Transport,
    file: &'static str,
    cached: bool,
}

pub fn run(options: &Options) -> Section {
    let mut section = Section::new("HTTP proxy by transport and body, one origin", "request");
    for (program, package) in [("h2load", "nghttp2-client"), ("wrk", "wrk"), ("nginx", "nginx-light")] {
        if find_program(program).is_none() {
            section.remarks.push(format!("{program} is missing: `apt-get install {package}`."));
            return section;
        }
    }
    let contenders = options.contenders(&[Peer::Nginx, Peer::Haproxy], &mut section);
    let bars = [(Peer::Nginx, 1.0)];
    for (transport, name) in
        [(Transport::Http1, "HTTP/1.1"), (Transport::Http1Tls, "HTTP/1.1, TLS"), (Transport::Http2Tls, "HTTP/2, TLS")]
    {
        for (file, size) in [("0", "0 B"), ("1k", "1 kB"), ("1m", "1 MB")] {
            for connections in [64, 400] {
                let load = Load { transport, file, cached: false };
                let words = [format!("-c{connections}")];
                options.compare(
                    &mut section,
                    &format!("{name}, {size}, {connections} connections"),
                    &contenders,
                    &bars,
                    |who| {
                        load.run(who, |server, address| {
                            h2load(options, server, &load.url(address), transport, &words, options.seconds)
                        })
                    },
                );
            }
        }
    }
    for (transport, name) in [(Transport::Http1, "plain"), (Transport::Http1Tls, "TLS")] {
        let load = Load { transport, file: "0", cached: false };
        options.compare(
            &mut section,
            &format!("a connection a request, {name}, 64 at once"),
            &contenders,
            &bars,
            |who| load.run(who, |server, address| anew(options, server, &load.url(address))),
        );
    }
    let load = Load { transport: Transport::Http1, file: "1k", cached: false };
    options.compare(
        &mut section,
        "10000 connections, HTTP/1.1, 1 kB, one request in 4 s each",
        &contenders,
        &bars,
        |who| {
            // Enough time for every connection to be opened and asked over once and again.
            load.run(who, |server, address| {
                h2load(
                    options,
                    server,
                    &load.url(address),
                    load.transport,
                    &["-c10000".into(), "--rps=0.25".into()],
                    options.seconds.max(10.0),
                )
            })
        },
    );
    let cache: Vec<Contender> =
        contenders.into_iter().filter(|who| !matches!(who, Contender::Peer(Peer::Haproxy))).collect();
    let load = Load { transport: Transport::Http1, file: "1k", cached: true };
    options.compare(&mut section, "cache hit, HTTP/1.1, 1 kB, 64 connections", &cache, &bars, |who| {
        load.run(who, |server, address| {
            h2load(options, server, &load.url(address), load.transport, &["-c64".into()], options.seconds)
        })
    });
    section.remarks.push(
        "Tidegate checks a bearer token (nobody else does), policy, limits and metrics; the cache is in memory at Tidegate, and nginx's `proxy_cache` on a disk \
         that the kernel holds in memory. At 10000 connections PSS is that of all of them."
            .into(),
    );
    section
        .remarks
        .push("Pingora is not measured: it is a library, to be written into a program (`cargo add pingora`, with cmake), and no dependency of this suite.".into());
    section
}

impl Load {
    fn url(&self, address: SocketAddr) -> String {
        let scheme = if self.transport == Transport::Http1 { "http" } else { "https" };
        format!("{scheme}://{address}/telemetry/{}", self.file)
    }

    /// Starts origin and server, and measures.
    fn run(
        &self,
        contender: &Contender,
        measure: impl FnOnce(&Started, SocketAddr) -> Result<Sample>,
    ) -> Result<Sample> {
        let folder = Folder::new()?;
        let (_origin, origin) = origin(folder.path())?;
        let started = match contender {
            Contender::Peer(peer) => {
                let certificates = certificates(folder.path())?;
                peer_before(*peer, origin, folder.path(), &certificates, self)?
            }
            Contender::Tidegate { binary, .. } => {
                let output = folder.path().display().to_string();
                for what in ["ca", "gateway"] {
                    let made = Command::new(binary).args(["cert", what, "--out", &output]).output()?;
                    if !made.status.success() {
                        return Err(Failure::new(format!(
                            "tidegate cert {what}: {}",
                            String::from_utf8_lossy(&made.stderr)
                        )));
                    }
                }
                let tls = free_address()?;
                let cache = if self.cached { "cache = { ttl_secs = 3600 }\n" } else { "" };
                // A cache that is shared keeps nothing for bearers of a token, so who is cached for is anybody.
                let auth = if self.cached { "none" } else { "device" };
                let tables = format!(
                    "[[listener]]\nname = \"tls\"\nbind = \"{tls}\"\ntransport = \"tls\"\ncertificate = \"{output}/gateway.crt\"\nkey = \"{output}/gateway.key\"\n\n\
                     [[upstream]]\nname = \"origin\"\nkind = \"http\"\nendpoints = [{{ url = \"http://{origin}\" }}]\nconnections_max = 1000\nwaiting_max = 20000\n\n\
                     [[route]]\nname = \"files\"\npath_prefix = \"/telemetry/\"\nto = \"origin\"\nauth = \"{auth}\"\n{cache}"
                );
                let setup = Setup { devices: 1, tables: &tables, gateway: "device_api_prefix = \"/gw\"", workers: 1 };
                let (server, login) = Gateway::prepare(binary, setup)?.start()?;
                let token = if self.cached { None } else { Some(login.bearer(server.address, "/gw", 0)?) };
                let address = server.address;
                Started { server, plain: address, tls, token, is_cached: self.cached }
            }
        };
        let address = if self.transport == Transport::Http1 { started.plain } else { started.tls };
        measure(&started, address)
    }
}

/// A server ready for load.
struct Started {
    server: Server,
    plain: SocketAddr,
    tls: SocketAddr,
    token: Option<String>,
    is_cached: bool,
}

impl Started {
    fn header(&self) -> String {
        // A shared cache gives nothing to who shows a token (RFC 9111 section 3.5), so there is none where a cache is measured.
        let name = if self.is_cached { "X-Token" } else { "Authorization" };
        format!("{name}: Bearer {}", self.token.as_deref().unwrap_or("x"))
    }
}

/// An nginx that serves three files, on the load's core.
fn origin(folder: &Path) -> Result<(Process, SocketAddr)> {
    let files = folder.join("files/telemetry");
    fs::create_dir_all(&files)?;
    for (name, bytes) in [("0", 0), ("1k", 1000), ("1m", 1_000_000)] {
        fs::write(files.join(name), vec![b'x'; bytes])?;
    }
    let address = free_address()?;
    let at = folder.display();
    let server = format!(
        "  sendfile on;\n  open_file_cache max=100;\n  server {{\n    listen {address} backlog=4096;\n    root {at}/files;\n    \
         add_header Cache-Control \"max-age=3600\";\n  }}\n"
    );
    start_nginx(folder, "origin", &server, LOAD_CORE, address).map(|process| (process, address))
}

fn start_nginx(folder: &Path, name: &str, servers: &str, core: usize, address: SocketAddr) -> Result<Process> {
    let at = folder.display();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("  {kind}_temp_path {at}/{name}-{kind};\n"))
        .concat();
    let text = format!(
        "user root;\ndaemon off;\nworker_processes 1;\nworker_rlimit_nofile 20000;\npid {at}/{name}.pid;\nevents {{ worker_connections 19900; }}\nhttp {{\n  \
         access_log off;\n  keepalive_requests 1000000000;\n{temporary}{servers}}}\n"
    );
    let config = folder.join(format!("{name}.conf"));
    fs::write(&config, text)?;
    let program = find_program("nginx").ok_or_else(|| Failure::new("nginx is missing: apt-get install nginx-light"))?;
    let log = folder.join(format!("{name}.log"));
    let mut process = Process::start(&program, &["-c", &config.display().to_string(), "-e", "stderr"], core, &log)?;
    process.wait_for_tcp(address, &log)?;
    Ok(process)
}

/// A certificate and its key, in one file, by openssl.
fn certificates(folder: &Path) -> Result<String> {
    let file = |name: &str| folder.join(name).display().to_string();
    let (certificate, key) = (file("peer.crt"), file("peer.key"));
    // ECDSA P-256, as Tidegate's.
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=localhost", "-keyout", &key, "-out", &certificate])
        .output()
        .map_err(|error| Failure::new(format!("openssl: {error}")))?;
    if !made.status.success() {
        return Err(Failure::new(format!("openssl: {}", String::from_utf8_lossy(&made.stderr))));
    }
    let both = file("peer.pem");
    fs::write(&both, [fs::read(&certificate)?, fs::read(&key)?].concat())?;
    Ok(both)
}

fn peer_before(peer: Peer, origin: SocketAddr, folder: &Path, pem: &str, load: &Load) -> Result<Started> {
    let (plain, tls) = (free_address()?, free_address()?);
    let of_server = Folder::new()?;
    let process = match peer {
        Peer::Nginx => {
            let at = of_server.path().display();
            let (zone, cache) = if load.cached {
                (
                    format!("  proxy_cache_path {at}/cache keys_zone=all:10m;\n"),
                    "proxy_cache all; proxy_cache_valid 200 1h; add_header X-Cache $upstream_cache_status;",
                )
            } else {
                (String::new(), "")
            };
            let servers = format!(
                "{zone}  upstream origin {{\n    server {origin};\n    keepalive 512;\n  }}\n  server {{\n    listen {plain} backlog=4096;\n    \
                 listen {tls} ssl http2 backlog=4096;\n    ssl_certificate {pem};\n    ssl_certificate_key {pem};\n    location / {{\n      \
                 proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_set_header X-Forwarded-For $remote_addr; {cache}\n    }}\n  }}\n"
            );
            start_nginx(of_server.path(), "peer", &servers, SERVER_CORE, plain)?
        }
        Peer::Haproxy => {
            let config = of_server.path().join("config");
            let text = format!(
                "global\n  nbthread 1\n  maxconn 10500\n  no strict-limits\n  ssl-server-verify none\ndefaults\n  mode http\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n  \
                 option http-keep-alive\n  http-reuse always\nfrontend front\n  bind {plain}\n  bind {tls} ssl crt {pem} alpn h2,http/1.1\n  option forwardfor\n  \
                 default_backend origin\nbackend origin\n  server origin {origin} maxconn 1000\n"
            );
            fs::write(&config, text)?;
            let program =
                find_program("haproxy").ok_or_else(|| Failure::new("haproxy is missing: apt-get install haproxy"))?;
            let log = folder.join("haproxy.log");
            let mut process =
                Process::start(&program, &["-db", "-f", &config.display().to_string()], SERVER_CORE, &log)?;
            process.wait_for_tcp(plain, &log)?;
            process
        }
        Peer::Mosquitto | Peer::Rumqttd | Peer::Libcoap => return Err(Failure::new("no proxy")),
    };
    Ok(Started { server: Server::new(process, plain, of_server), plain, tls, token: None, is_cached: load.cached })
}

/// `program` on the load's core.
fn on_load_core(program: &str) -> Result<Command> {
    let found = find_program(program).ok_or_else(|| Failure::new(format!("{program} is missing")))?;
    if !can_pin() {
        return Ok(Command::new(found));
    }
    let mut command = Command::new("taskset");
    command.args(["-c", &LOAD_CORE.to_string(), &found]);
    Ok(command)
}

fn h2load(
    options: &Options,
    started: &Started,
    url: &str,
    transport: Transport,
    words: &[String],
    seconds: f64,
) -> Result<Sample> {
    let folder = Folder::new()?;
    let log = folder.path().join("requests");
    let run = |seconds: f64, log: Option<&Path>| -> Result<_> {
        let mut command = on_load_core("h2load")?;
        if transport != Transport::Http2Tls {
            command.arg("--h1");
        }
        if let Some(log) = log {
            command.arg(format!("--log-file={}", log.display()));
        }
        command.args(["-t1", "-m1", "-D", &format!("{:.0}", seconds.max(1.0)), "-H", &started.header()]);
        Ok(command.args(words).arg(url).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
    };
    // Buffers and upstream connections are made, and the cache is filled, before the clock starts.
    if !words.iter().any(|word| word.starts_with("--rps")) {
        run(1.0, None)?.wait_with_output()?;
    }
    let process = &started.server.process;
    let (cpu, start) = (process.cpu_seconds(), Instant::now());
    let load = run(seconds, Some(&log))?;
    thread::sleep(Duration::from_secs_f64(seconds.max(options.seconds) * 0.7));
    let pss_bytes = process.pss_bytes();
    let output = load.wait_with_output()?;
    let (seconds, cpu_after) = (start.elapsed().as_secs_f64(), process.cpu_seconds());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let count = |line: &str, before: &str| -> Option<u64> {
        let line = said.lines().find(|text| text.starts_with(line))?;
        let words: Vec<&str> = line.split([' ', ',']).filter(|word| !word.is_empty()).collect();
        let at = words.iter().position(|word| *word == before)?;
        words.get(at.checked_sub(1)?)?.parse().ok()
    };
    let well = count("status codes:", "2xx").unwrap_or(0);
    let bad = count("requests:", "failed").unwrap_or(0)
        + ["3xx", "4xx", "5xx"].iter().filter_map(|class| count("status codes:", class)).sum::<u64>();
    if well == 0 {
        return Err(Failure::new(format!(
            "h2load: nothing went well: {said}{}",
            String::from_utf8_lossy(&output.stderr)
        )));
    }
    Ok(Sample {
        units: well,
        seconds,
        cpu_seconds: cpu_after - cpu,
        p99_us: p99_us(&fs::read_to_string(&log).unwrap_or_default()),
        pss_bytes: Some(pss_bytes),
        lost: None,
        notes: if bad > 0 { vec![format!("{bad} not served")] } else { Vec::new() },
    })
}

/// Of h2load's log: start, status, microseconds.
fn p99_us(log: &str) -> Option<f64> {
    let mut took: Vec<u64> = log.lines().filter_map(|line| line.split('\t').nth(2)?.parse().ok()).collect();
    took.sort_unstable();
    Some(*took.get((took.len() * 99 / 100).min(took.len().checked_sub(1)?))? as f64)
}

/// A request on a connection of its own, by wrk.
fn anew(options: &Options, started: &Started, url: &str) -> Result<Sample> {
    let process = &started.server.process;
    let (cpu, start) = (process.cpu_seconds(), Instant::now());
    let seconds = format!("-d{:.0}s", options.seconds.max(1.0));
    let output = on_load_core("wrk")?
        .args(["-t1", "-c64", "--latency", &seconds, "-H", "Connection: close", "-H", &started.header(), url])
        .output()?;
    let (seconds, cpu_after) = (start.elapsed().as_secs_f64(), process.cpu_seconds());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let done = said.lines().find_map(|line| line.trim().split_once(" requests in ")?.0.parse().ok());
    let refused =
        said.lines().find_map(|line| line.trim().strip_prefix("Non-2xx or 3xx responses: ")?.parse::<u64>().ok());
    if let Some(refused) = refused {
        return Err(Failure::new(format!("{refused} were refused: {said}")));
    }
    let units = done.ok_or_else(|| Failure::new(format!("wrk: {said}{}", String::from_utf8_lossy(&output.stderr))))?;
    Ok(Sample {
        units,
        seconds,
        cpu_seconds: cpu_after - cpu,
        p99_us: said.lines().find_map(|line| duration_us(line.trim().strip_prefix("99%")?.trim())),
        pss_bytes: Some(process.pss_bytes()),
        lost: None,
        notes: Vec::new(),
    })
}

/// wrk's way to write a time, as `1.20ms`.
fn duration_us(text: &str) -> Option<f64> {
    let at = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(at);
    let factor = match unit {
        "us" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        "m" => 6e7,
        _ => return None,
    };
    number.parse::<f64>().ok().map(|number| number * factor)
}

#[cfg(test)]
mod tests {
    #[test]
    fn figures_are_read_from_the_programs() {
        assert_eq!(super::duration_us("1.20ms"), Some(1200.0));
        assert_eq!(super::duration_us("980us"), Some(980.0));
        let log: String = (1..=100).map(|n| format!("0\t200\t{n}\n")).collect();
        assert_eq!(super::p99_us(&log), Some(100.0));
        assert_eq!(super::p99_us(""), None);
    }
}

//! HTTP through a proxy: a 105-byte JSON POST to `/telemetry/...`, two origins that answer 202. The load is wrk's.

use std::fmt::Write;
use std::fs;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::compare::{Contender, Options};
use crate::folder::Folder;
use crate::gateway::{Gateway, Setup};
use crate::peers::{Origins, Peer};
use crate::process::{LOAD_CORE, Process, can_pin, find_program};
use crate::report::{Fact, Ordering, Sample, Section};
use crate::{Failure, Result};

const BODY: &str =
    r#"{"device":"bench-00000","room":"greenhouse-1","celsius":21.53,"humidity":0.6134,"battery":3.71,"n":12345}"#;
/// As many devices as connections, up to this. wrk sends their tokens in turn over every connection, where a device has its own; the gateway
/// remembers this many of a connection, and would begin a session with each request beyond.
const DEVICES_MAX: usize = 16;

pub fn run(options: &Options) -> Section {
    let mut section = Section::new("HTTP/1.1 proxy, 105-byte POST, two origins", "request");
    if find_program("wrk").is_none() {
        section.remarks.push("wrk is missing: `apt-get install wrk`.".into());
        return section;
    }
    let contenders = options.contenders(&[Peer::Nginx, Peer::Haproxy], &mut section);
    for connections in [64, 400] {
        let load = format!("{connections} connections");
        options.compare(&mut section, &load, &contenders, &[(Peer::Nginx, 1.0)], |contender| {
            proxied(options, contender, connections)
        });
        if connections == 400 {
            memory(&mut section, &load);
        }
    }
    let own: Vec<_> = options.own().collect();
    let load = "message plane: device API, memory class, 64 connections";
    options.compare(&mut section, load, &own, &[], |contender| ingested(options, contender, 64));
    section
        .remarks
        .push("Pingora is not included: it is a library that needs cmake, and no dependency of this suite.".into());
    section
}

/// Memory at 400 connections, as a part of nginx's.
fn memory(section: &mut Section, load: &str) {
    let of = |name: &str| {
        let row = section.rows.iter().find(|row| row.load == load && row.server == name)?;
        row.outcome.as_ref().ok()?.pss_bytes
    };
    if let (Some(ours), Some(nginx)) = (of("tidegate"), of("nginx")) {
        section.facts.push(Fact {
            what: format!("PSS at {load}, as a part of nginx's"),
            server: "tidegate".into(),
            value: ours / nginx,
            unit: "",
            bar: Some((Ordering::AtMost, 1.0)),
        });
    }
}

fn proxied(options: &Options, contender: &Contender, connections: usize) -> Result<Sample> {
    let origins = Origins::start()?;
    let devices = connections.min(DEVICES_MAX);
    match contender {
        Contender::Peer(peer) => {
            let server = peer.start(&origins.addresses)?;
            // The same bytes as for Tidegate; nobody reads the token.
            let tokens = vec!["x".repeat(58); devices];
            wrk(options, &server.process, server.address, "/telemetry/room", &tokens, connections)
        }
        Contender::Tidegate { binary, .. } => {
            let endpoints: Vec<_> =
                origins.addresses.iter().map(|origin| format!("{{ url = \"http://{origin}\" }}")).collect();
            let tables = format!(
                "[[upstream]]\nname = \"origins\"\nkind = \"http\"\nbalance = \"round_robin\"\nendpoints = [{}]\nconnections_max = 1000\n\n\
                 [[route]]\nname = \"telemetry\"\npath_prefix = \"/telemetry/\"\nmethods = [\"POST\"]\nto = \"origins\"\nauth = \"device\"\n",
                endpoints.join(", ")
            );
            // The device API moves aside, so that its paths are the proxied site's.
            let setup = Setup { devices, tables: &tables, gateway: "device_api_prefix = \"/gw\"", workers: 1 };
            let (server, login) = Gateway::prepare(binary, setup)?.start()?;
            let tokens =
                (0..devices).map(|index| login.bearer(server.address, "/gw", index)).collect::<Result<Vec<_>>>()?;
            wrk(options, &server.process, server.address, "/telemetry/room", &tokens, connections)
        }
    }
}

/// The same POST into the message plane, which acknowledges, batches and forwards it.
fn ingested(options: &Options, contender: &Contender, connections: usize) -> Result<Sample> {
    let Contender::Tidegate { binary, .. } = contender else { return Err(Failure::new("peers have no message plane")) };
    let origins = Origins::start()?;
    let endpoints: Vec<_> = origins.addresses.iter().map(|origin| format!("{{ url = \"http://{origin}\" }}")).collect();
    let tables = format!(
        "[[upstream]]\nname = \"origins\"\nkind = \"http\"\nendpoints = [{}]\n\n[[forward]]\nname = \"telemetry\"\ntopics = [\"dev/+/telemetry/#\"]\n\
         to = \"origins\"\npath = \"/ingest\"\ndelivery = \"memory\"\nbatch = {{ records_max = 500, linger_ms = 50, format = \"ndjson\" }}\n",
        endpoints.join(", ")
    );
    let devices = connections.min(DEVICES_MAX);
    let (server, login) = Gateway::prepare(binary, Setup { devices, tables: &tables, ..Setup::default() })?.start()?;
    let tokens = (0..devices).map(|index| login.bearer(server.address, "", index)).collect::<Result<Vec<_>>>()?;
    wrk(options, &server.process, server.address, "/telemetry/room", &tokens, connections)
}

fn wrk(
    options: &Options,
    process: &Process,
    address: SocketAddr,
    path: &str,
    tokens: &[String],
    connections: usize,
) -> Result<Sample> {
    let folder = Folder::new()?;
    let script = folder.path().join("load.lua");
    fs::write(&script, lua(path, tokens)?)?;
    let program = find_program("wrk").ok_or_else(|| Failure::new("wrk is missing: apt-get install wrk"))?;
    let seconds = format!("{:.0}s", options.seconds.max(1.0).round());
    let run = |seconds: &str| {
        let mut command = if can_pin() {
            let mut command = Command::new("taskset");
            command.args(["-c", &LOAD_CORE.to_string(), &program]);
            command
        } else {
            Command::new(&program)
        };
        command
            .args(["-t1", &format!("-c{connections}"), &format!("-d{seconds}"), "-s", &script.display().to_string()])
            .arg(format!("http://{address}"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
    };
    // Buffers and upstream connections are made before the clock starts.
    run("1s")?.wait_with_output()?;
    let (cpu, start) = (process.cpu_seconds(), Instant::now());
    let load = run(&seconds)?;
    thread::sleep(Duration::from_secs_f64(options.seconds.max(1.0) * 0.7));
    let pss_bytes = process.pss_bytes();
    let output = load.wait_with_output()?;
    let (seconds, cpu_after) = (start.elapsed().as_secs_f64(), process.cpu_seconds());
    let said = String::from_utf8_lossy(&output.stdout);
    let summary: Value = said
        .lines()
        .find_map(|line| serde_json::from_str(line.strip_prefix("RESULT ")?).ok())
        .ok_or_else(|| Failure::new(format!("wrk failed: {said}{}", String::from_utf8_lossy(&output.stderr))))?;
    let number = |key: &str| summary[key].as_f64().unwrap_or_default();
    let bad = number("errors");
    let done = number("requests");
    if bad > done / 2.0 {
        return Err(Failure::new(format!("{bad} of {done} requests failed: {summary}")));
    }
    Ok(Sample {
        units: done as u64,
        seconds,
        cpu_seconds: cpu_after - cpu,
        p99_us: summary["p99_us"].as_f64(),
        pss_bytes: Some(pss_bytes),
        lost: None,
        notes: if bad > 0.0 { vec![format!("{bad} errors")] } else { Vec::new() },
    })
}

fn lua(path: &str, tokens: &[String]) -> Result<String> {
    let mut text = format!("local body = [[{BODY}]]\nlocal tokens = {{\n");
    for token in tokens {
        writeln!(text, "  \"{token}\",")?;
    }
    write!(
        text,
        r#"}}
local requests, at = {{}}, 0
function init()
  for i, token in ipairs(tokens) do
    requests[i] = wrk.format("POST", "{path}", {{
      ["Authorization"] = "Bearer " .. token, ["Content-Type"] = "application/json",
    }}, body)
  end
end
function request()
  at = at % #requests + 1
  return requests[at]
end
function done(summary, latency)
  local e = summary.errors
  print(string.format('RESULT {{"requests":%d,"p99_us":%f,"errors":%d,"status":%d,"timeout":%d}}',
    summary.requests, latency:percentile(99), e.connect + e.read + e.write + e.status + e.timeout, e.status, e.timeout))
end
"#
    )?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_body_has_the_size_that_the_method_names() {
        assert_eq!(super::BODY.len(), 105);
    }
}

//! The servers that Tidegate is measured against, each as its own documentation would set it up for speed: one worker, no logs.

use std::fs;
use std::net::SocketAddr;

use serde_json::json;

use crate::folder::Folder;
use crate::process::{LOAD_CORE, Process, SERVER_CORE, find_program, free_address};
use crate::{Failure, Result};

/// Something to compare with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    Nginx,
    Haproxy,
    Mosquitto,
    Rumqttd,
    Libcoap,
}

/// A server under load: a peer or Tidegate.
pub struct Server {
    pub process: Process,
    pub address: SocketAddr,
    // Dropped after the process.
    _folder: Folder,
}

impl Server {
    pub fn new(process: Process, address: SocketAddr, folder: Folder) -> Self {
        Server { process, address, _folder: folder }
    }
}

impl Peer {
    pub const fn name(self) -> &'static str {
        match self {
            Peer::Nginx => "nginx",
            Peer::Haproxy => "haproxy",
            Peer::Mosquitto => "mosquitto",
            Peer::Rumqttd => "rumqttd",
            Peer::Libcoap => "libcoap",
        }
    }

    const fn program(self) -> Option<&'static str> {
        match self {
            Peer::Nginx => Some("nginx"),
            Peer::Haproxy => Some("haproxy"),
            Peer::Mosquitto => Some("mosquitto"),
            // Linked into this program.
            Peer::Rumqttd => None,
            Peer::Libcoap => Some("coap-server-notls"),
        }
    }

    /// What to run where it is missing.
    pub const fn install(self) -> &'static str {
        match self {
            Peer::Nginx => "apt-get install nginx-light",
            Peer::Haproxy => "apt-get install haproxy",
            Peer::Mosquitto => "apt-get install mosquitto",
            Peer::Rumqttd => "cargo build",
            Peer::Libcoap => "apt-get install libcoap3-bin",
        }
    }

    pub fn is_installed(self) -> bool {
        self.program().is_none_or(|program| find_program(program).is_some())
    }

    fn path(self) -> Result<String> {
        match self.program() {
            Some(program) => {
                find_program(program).ok_or_else(|| Failure::new(format!("{program} is missing: {}", self.install())))
            }
            None => Ok(own_path()),
        }
    }

    /// Starts it. `origins` are for the proxies.
    pub fn start(self, origins: &[SocketAddr]) -> Result<Server> {
        let folder = Folder::new()?;
        let address = free_address()?;
        let file = |name: &str| folder.path().join(name).display().to_string();
        let config = file("config");
        let (text, arguments): (String, Vec<String>) = match self {
            Peer::Nginx => (nginx(address, origins, folder.path()), words(&["-c", &config, "-e", "stderr"])),
            Peer::Haproxy => (haproxy(address, origins), words(&["-db", "-f", &config])),
            Peer::Mosquitto => (mosquitto(address), words(&["-c", &config])),
            Peer::Rumqttd => (rumqttd(address).to_string(), words(&[RUMQTTD, &config])),
            Peer::Libcoap => {
                let (host, port) = (address.ip().to_string(), address.port().to_string());
                (String::new(), words(&["-A", &host, "-p", &port, "-v", "0"]))
            }
        };
        fs::write(&config, text)?;
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let log = folder.path().join("log");
        let mut process = Process::start(&self.path()?, &arguments, SERVER_CORE, &log)?;
        match self {
            Peer::Libcoap => process.wait_until(&log, || crate::coap::answers_ping(address))?,
            Peer::Nginx | Peer::Haproxy | Peer::Mosquitto | Peer::Rumqttd => process.wait_for_tcp(address, &log)?,
        }
        Ok(Server::new(process, address, folder))
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

/// First arguments with which this program becomes another one.
pub const RUMQTTD: &str = "serve-rumqttd";
pub const ORIGINS: &str = "serve-origins";

/// This program, also after cargo has replaced its file.
pub fn own_path() -> String {
    format!("/proc/{}/exe", std::process::id())
}

fn nginx(address: SocketAddr, origins: &[SocketAddr], folder: &std::path::Path) -> String {
    let servers: String = origins.iter().map(|origin| format!("    server {origin};\n")).collect();
    let folder = folder.display();
    let upstream = if servers.is_empty() {
        String::new()
    } else {
        format!("  upstream origins {{\n{servers}    keepalive 512;\n  }}\n")
    };
    let location = if servers.is_empty() {
        "return 202;"
    } else {
        "proxy_pass http://origins; proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_set_header X-Forwarded-For $remote_addr;"
    };
    format!(
        "daemon off;\nworker_processes 1;\npid {folder}/pid;\nevents {{ worker_connections 20000; }}\nhttp {{\n  access_log off;\n  \
         keepalive_requests 1000000000;\n  client_body_temp_path {folder}/body;\n  proxy_temp_path {folder}/proxy;\n  \
         fastcgi_temp_path {folder}/fastcgi;\n  uwsgi_temp_path {folder}/uwsgi;\n  scgi_temp_path {folder}/scgi;\n{upstream}  \
         server {{\n    listen {address} backlog=4096;\n    location / {{ {location} }}\n  }}\n}}\n"
    )
}

fn haproxy(address: SocketAddr, origins: &[SocketAddr]) -> String {
    let servers: String =
        origins.iter().enumerate().map(|(at, origin)| format!("  server origin{at} {origin}\n")).collect();
    format!(
        "global\n  nbthread 1\n  maxconn 8000\ndefaults\n  mode http\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n  \
         option http-keep-alive\n  http-reuse always\nfrontend front\n  bind {address}\n  option forwardfor\n  default_backend origins\n\
         backend origins\n  balance roundrobin\n{servers}"
    )
}

fn mosquitto(address: SocketAddr) -> String {
    // Logs and `$SYS` off, no Nagle delay; queue limits as shipped.
    format!(
        "listener {} {}\nallow_anonymous true\nset_tcp_nodelay true\nsys_interval 0\nlog_dest none\nuser root\n",
        address.port(),
        address.ip()
    )
}

fn rumqttd(address: SocketAddr) -> serde_json::Value {
    json!({
        "id": 0,
        "router": {
            "id": 0, "max_connections": 20_000, "max_outgoing_packet_count": 200,
            "max_segment_size": 100 << 20, "max_segment_count": 10,
        },
        "v4": { "1": {
            "name": "bench", "listen": address.to_string(), "next_connection_delay_ms": 0,
            "connections": {
                "connection_timeout_ms": 60_000, "max_payload_size": 262_144, "max_inflight_count": 200, "dynamic_filters": true,
            },
        }},
    })
}

/// Becomes rumqttd with the configuration in `path`.
pub fn serve_rumqttd(path: &str) -> Result<()> {
    let config: rumqttd::Config = serde_json::from_str(&fs::read_to_string(path)?)?;
    rumqttd::Broker::new(config).start().map_err(|error| Failure::new(format!("rumqttd: {error}")))
}

/// Two web servers behind the proxies, in one process on the load's core.
pub struct Origins {
    pub addresses: Vec<SocketAddr>,
    _process: Process,
    _folder: Folder,
}

impl Origins {
    pub fn start() -> Result<Self> {
        let folder = Folder::new()?;
        let addresses = vec![free_address()?, free_address()?];
        let texts: Vec<_> = addresses.iter().map(SocketAddr::to_string).collect();
        let mut arguments = vec![ORIGINS];
        arguments.extend(texts.iter().map(String::as_str));
        let log = folder.path().join("log");
        let mut process = Process::start(&own_path(), &arguments, LOAD_CORE, &log)?;
        for address in &addresses {
            process.wait_for_tcp(*address, &log)?;
        }
        Ok(Origins { addresses, _process: process, _folder: folder })
    }
}

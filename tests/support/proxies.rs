//! nginx and HAProxy on free ports before one origin, set up as their own documentation would.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};

use super::{Running, free_address, wait_until};

/// Starts nginx; the test fails, with the package's name, where it is not installed. A silent peer is closed after `patience_secs`.
pub fn nginx(folder: &Path, origin: SocketAddr, patience_secs: u32) -> (Running, SocketAddr) {
    let address = free_address();
    let file = folder.join("nginx.conf");
    let at = folder.display();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("  {name}_temp_path {at}/{name};\n"))
        .concat();
    let text = format!(
        "daemon off;\nmaster_process off;\npid {at}/nginx.pid;\nerror_log {at}/nginx.log;\nevents {{}}\nhttp {{\n{temporary}  access_log off;\n  \
         client_header_timeout {patience_secs};\n  client_body_timeout {patience_secs};\n  keepalive_timeout {patience_secs};\n  \
         server {{\n    listen {address};\n    location / {{\n      proxy_pass http://{origin};\n      proxy_http_version 1.1;\n      \
         proxy_set_header Connection \"\";\n      proxy_set_header Host $host;\n    }}\n  }}\n}}\n"
    );
    fs::write(&file, text).unwrap();
    let log = folder.join("nginx.log").display().to_string();
    start("nginx", &["-e", &log, "-c", &file.display().to_string()], address)
}

/// Starts HAProxy, likewise.
pub fn haproxy(folder: &Path, origin: SocketAddr, patience_secs: u32) -> (Running, SocketAddr) {
    let address = free_address();
    let file = folder.join("haproxy.cfg");
    let text = format!(
        "global\n  maxconn 1000\ndefaults\n  mode http\n  timeout connect 5s\n  timeout client {patience_secs}s\n  timeout server 5s\n  \
         timeout http-request {patience_secs}s\nfrontend front\n  bind {address}\n  default_backend origin\nbackend origin\n  server origin {origin}\n"
    );
    fs::write(&file, text).unwrap();
    start("haproxy", &["-db", "-f", &file.display().to_string()], address)
}

fn start(program: &str, words: &[&str], address: SocketAddr) -> (Running, SocketAddr) {
    let path = format!("{}:/usr/sbin:/usr/local/sbin", std::env::var("PATH").unwrap());
    let mut command = Command::new(program);
    command.env("PATH", path).args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().unwrap_or_else(|e| panic!("{program} (Debian package {program}): {e}"));
    let running = Running(child);
    wait_until(program, || TcpStream::connect(address).is_ok());
    (running, address)
}

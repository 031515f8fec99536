//! Tidegate under measurement: the release build, with authentication, policy, rate limits and metrics switched on.

use std::fmt::Write;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tidegate_auth::jwt::{self, Audience, Claims, NumericDate};
use tidegate_auth::{GatewayId, SecretKey, keyfile, text};

use crate::folder::Folder;
use crate::peers::Server;
use crate::process::{Process, SERVER_CORE};
use crate::{Failure, Result};

/// What a measurement needs beyond the common configuration.
#[derive(Clone, Copy, Default)]
pub struct Setup<'a> {
    /// Devices that publish (`bench-N`) and devices that watch all telemetry (`watch-N`), as many of each.
    pub devices: usize,
    /// Further tables: upstreams, forward rules, routes.
    pub tables: &'a str,
    /// Further keys of `[gateway]`.
    pub gateway: &'a str,
    /// Worker threads; 0 means one.
    pub workers: usize,
}

/// How a device of the suite proves itself to the gateway.
pub struct Devices {
    gateway_id: GatewayId,
    /// Where the gateway speaks CoAP over UDP.
    pub coap: SocketAddr,
}

/// A gateway's folder, which outlives its process.
pub struct Gateway {
    binary: PathBuf,
    folder: Folder,
}

/// A device's part in a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Sensor,
    Watcher,
}

impl Gateway {
    /// Writes configuration and policy, and registers the devices with `tidegate device import`.
    pub fn prepare(binary: &Path, setup: Setup<'_>) -> Result<Self> {
        let folder = Folder::new()?;
        let write = |name: &str, text: String| fs::write(folder.path().join(name), text);
        write("tidegate.toml", configuration(setup))?;
        write("policy.toml", policy())?;
        let mut list = String::from("id,role,public_key\n");
        for index in 0..setup.devices.max(1) {
            for role in [Role::Sensor, Role::Watcher] {
                let public = text::hex(secret_key(role, index).public().as_bytes());
                writeln!(list, "{},{},{public}", device_id(role, index), role.as_str())?;
            }
        }
        write("devices.csv", list)?;
        let gateway = Gateway { binary: binary.to_owned(), folder };
        gateway.command(&["device", "import", &gateway.path("devices.csv")])?;
        Ok(gateway)
    }

    /// Starts `tidegate run` and waits until it listens.
    pub fn start(self) -> Result<(Server, Devices)> {
        let (process, address, devices) = self.launch()?;
        Ok((Server::new(process, address, self.folder), devices))
    }

    /// The same, for a folder that is to be started again later.
    pub fn launch(&self) -> Result<(Process, SocketAddr, Devices)> {
        let running = PathBuf::from(self.path("data/running.json"));
        fs::remove_file(&running).ok();
        let log = PathBuf::from(self.path("log"));
        let config = self.path("tidegate.toml");
        let binary = self.binary.display().to_string();
        let mut process = Process::start(&binary, &["run", "--config", &config], SERVER_CORE, &log)?;
        let mut found = None;
        process.wait_until(&log, || {
            found = fs::read_to_string(&running).ok().and_then(|text| serde_json::from_str::<Value>(&text).ok());
            found.is_some()
        })?;
        let facts = found.unwrap_or_default();
        let listener = |at: usize| -> Result<SocketAddr> {
            let address = facts["listeners"][at]["address"].as_str().and_then(|text| text.parse().ok());
            address.ok_or_else(|| Failure::new(format!("{} names no listener {at}", running.display())))
        };
        let (address, coap) = (listener(0)?, listener(1)?);
        let key = keyfile::secret_from_text(&fs::read_to_string(self.path("data/gateway.key"))?)
            .map_err(|error| Failure::new(format!("the gateway's key: {error}")))?;
        Ok((process, address, Devices { gateway_id: GatewayId::of(&key.public()), coap }))
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn command(&self, arguments: &[&str]) -> Result<()> {
        let config = self.path("tidegate.toml");
        let output = Command::new(&self.binary).args(arguments).args(["--config", &config]).output()?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(Failure::new(format!("tidegate {}: {said}", arguments.join(" "))))
    }
}

/// TCP first, UDP second.
fn configuration(setup: Setup<'_>) -> String {
    let workers = setup.workers.max(1);
    let Setup { tables, gateway, .. } = setup;
    // Limits are switched on and count; they are set where this load does not reach them.
    format!(
        r#"[gateway]
name = "bench"
data_dir = "data"
workers = {workers}
{gateway}

[[listener]]
name = "plain"
bind = "127.0.0.1:0"
transport = "tcp"

[[listener]]
name = "coap"
bind = "127.0.0.1:0"
transport = "udp"

[admin]
bind = "127.0.0.1:0"
token = "for-the-benchmark"

[policy]
files = ["policy.toml"]

[limits]
connections_max = 50000
connections_per_address_max = 50000
rate_per_device = "100000000/s burst 200000000"
rate_per_address = "100000000/s burst 200000000"
auth_rate_per_address = "1000000/s burst 2000000"
coap_sessions_max = 16384

[telemetry]
log = "warn"

{tables}
"#
    )
}

/// The rules that decide, among others that do not apply.
fn policy() -> String {
    let mut text = String::from(
        r#"[[rule]]
name = "sensors have their own space"
who  = ["role:sensor"]
do   = ["publish", "subscribe", "read"]
on   = ["dev/{device}/#"]
bytes_max = 65536
rate = "100000000/s burst 200000000"

[[rule]]
name = "watchers see all telemetry"
who  = ["role:watcher"]
do   = ["subscribe", "read"]
on   = ["dev/+/telemetry/#"]

[[rule]]
name = "sensors use the proxy"
who  = ["role:sensor"]
do   = ["GET", "POST"]
on   = ["/telemetry/**"]
"#,
    );
    for number in 0..20 {
        writeln!(
            text,
            "\n[[rule]]\nname = \"site {number}\"\nwho = [\"attr:site={number}\"]\ndo = [\"publish\", \"read\"]\non = [\"site/{number}/#\"]"
        )
        .ok();
    }
    text
}

impl Role {
    pub const fn as_str(self) -> &'static str {
        match self {
            Role::Sensor => "sensor",
            Role::Watcher => "watcher",
        }
    }
}

/// The same length for every device, so that topics have one.
pub fn device_id(role: Role, index: usize) -> String {
    match role {
        Role::Sensor => format!("bench-{index:05}"),
        Role::Watcher => format!("watch-{index:05}"),
    }
}

/// Keys for measuring only: anybody can make them.
fn secret_key(role: Role, index: usize) -> SecretKey {
    let mut seed = [role as u8 + 1; 32];
    seed[..8].copy_from_slice(&(index as u64).to_le_bytes());
    SecretKey::from_seed(&seed)
}

impl Devices {
    /// A JWT for an MQTT password or an OAuth assertion; works once.
    pub fn jwt(&self, role: Role, index: usize) -> Result<String> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let mut unique = [0; 16];
        unique[..8].copy_from_slice(&SERIAL.fetch_add(1, Ordering::Relaxed).to_le_bytes());
        unique[8..].copy_from_slice(&(now.as_nanos() as u64).to_le_bytes());
        let id = device_id(role, index);
        let claims = Claims {
            iss: id.clone(),
            sub: id,
            aud: Audience::One(self.gateway_id.audience()),
            iat: NumericDate(now.as_secs()),
            exp: NumericDate(now.as_secs() + 3600),
            nbf: None,
            jti: text::base64url(&unique),
            nonce: None,
        };
        Ok(jwt::sign(&claims, &secret_key(role, index)))
    }

    /// A bearer token, from `POST {prefix}/oauth2/token`.
    pub fn bearer(&self, gateway: SocketAddr, prefix: &str, index: usize) -> Result<String> {
        use std::io::{Read, Write};
        let assertion = self.jwt(Role::Sensor, index)?;
        let form = format!(
            "grant_type=client_credentials&client_assertion_type=urn%3Aietf%3Aparams%3Aoauth%3Aclient-assertion-type%3Ajwt-bearer\
             &client_assertion={assertion}"
        );
        let mut stream = std::net::TcpStream::connect(gateway)?;
        write!(
            stream,
            "POST {prefix}/oauth2/token HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\nContent-Type: application/x-www-form-urlencoded\r\n\
             Content-Length: {}\r\n\r\n{form}",
            form.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        let token =
            serde_json::from_str::<Value>(body).ok().and_then(|json| Some(json["access_token"].as_str()?.to_owned()));
        token.ok_or_else(|| Failure::new(format!("no bearer token: {answer}")))
    }

    pub fn secret_key(&self, role: Role, index: usize) -> SecretKey {
        secret_key(role, index)
    }

    pub fn gateway_id(&self) -> &GatewayId {
        &self.gateway_id
    }
}

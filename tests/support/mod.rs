//! The harness of the integration tests: the real `tidegate` binary on free ports in a temporary folder, and clients that are
//! independent of our engines. Waits by polling with a deadline; stops only what it started.
#![allow(dead_code, clippy::unwrap_used)]

pub mod chaos;
pub mod cloud;
pub mod coap;
pub mod http;
pub mod mqtt;
pub mod origin;
pub mod proxies;

use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How long anything local may take before a test gives up; generous, because CI machines are small and shared.
pub const PATIENCE: Duration = Duration::from_secs(30);

const POLICY: &str = r#"
[[rule]]
name = "sensors own their branch"
who = ["role:sensor"]
do = ["publish", "subscribe", "read"]
on = ["dev/{device}/#"]

[[rule]]
name = "sensors share the plant"
who = ["role:sensor"]
do = ["publish", "subscribe", "read"]
on = ["plant/#"]
"#;

pub const ADMIN_TOKEN: &str = "an-admin-token-for-tests";

/// A gateway's folder, configuration and, while it runs, its process.
pub struct Gateway {
    pub folder: tempfile::TempDir,
    /// MQTT, HTTP, WebSocket and CoAP over TCP.
    pub plain: SocketAddr,
    /// CoAP over UDP.
    pub coap: SocketAddr,
    pub admin: SocketAddr,
    child: Option<Child>,
    /// Program and arguments to put in front of the binary, such as `prlimit --fsize=...`.
    wrapper: Vec<String>,
}

/// What a test wants of its gateway beyond the defaults.
#[derive(Clone, Default)]
pub struct Wanted {
    /// HTTP endpoints of the upstream `cloud`, to which telemetry and events go; none: nothing is forwarded.
    pub cloud: Vec<String>,
    /// Further keys for the `[[forward]]` table.
    pub forward: String,
    /// Further keys of tables, as `--set` takes them.
    pub set: Vec<String>,
    /// Further TOML at the end of the file.
    pub extra: String,
    /// Keys for the `[limits]` table.
    pub limits: String,
    pub wrapper: Vec<String>,
    /// Where the data folder is, if not `data` beside the configuration.
    pub data_dir: Option<PathBuf>,
}

impl Gateway {
    /// Writes a configuration and starts on it; fails the test if it is not ready in time.
    pub fn start(wanted: &Wanted) -> Gateway {
        let mut gateway = Gateway::prepare(wanted);
        gateway.run();
        gateway
    }

    /// Only the folder and the configuration.
    pub fn prepare(wanted: &Wanted) -> Gateway {
        let [plain, coap, admin] = [free_address(), free_address(), free_address()];
        let folder = tempfile::Builder::new().prefix("tidegate-test-").tempdir().unwrap();
        let gateway = Gateway { folder, plain, coap, admin, child: None, wrapper: wanted.wrapper.clone() };
        fs::write(gateway.path("policy.toml"), POLICY).unwrap();
        fs::write(gateway.path("tidegate.toml"), gateway.configuration(wanted)).unwrap();
        gateway
    }

    fn configuration(&self, wanted: &Wanted) -> String {
        let data = wanted.data_dir.clone().unwrap_or_else(|| self.path("data"));
        let mut text = format!(
            "[gateway]\nname = \"test\"\ndata_dir = {:?}\nworkers = 2\n\n\
             [[listener]]\nname = \"plain\"\nbind = \"{}\"\ntransport = \"tcp\"\n\n\
             [[listener]]\nname = \"coap\"\nbind = \"{}\"\ntransport = \"udp\"\n\n\
             [admin]\nbind = \"{}\"\ntoken = \"{ADMIN_TOKEN}\"\n\n\
             [policy]\nfiles = [\"policy.toml\"]\n\n",
            data, self.plain, self.coap, self.admin
        );
        // Tests share one loopback address and log in often.
        write!(text, "[limits]\nrate_per_device = \"100000/s\"\nrate_per_address = \"100000/s\"\n{}\n", wanted.limits)
            .unwrap();
        if !wanted.cloud.is_empty() {
            let endpoints: Vec<String> = wanted.cloud.iter().map(|url| format!("{{ url = {url:?} }}")).collect();
            write!(
                text,
                "\n[[upstream]]\nname = \"cloud\"\nkind = \"http\"\nendpoints = [{}]\n\
                 health = {{ path = \"/healthz\", interval_ms = 200, timeout_ms = 500, unhealthy_after = 2, healthy_after = 1 }}\n\n\
                 [[forward]]\nname = \"everything\"\ntopics = [\"dev/+/telemetry/#\", \"dev/+/event/#\", \"plant/#\"]\n\
                 to = \"cloud\"\npath = \"/ingest\"\ndelivery = \"disk\"\n{}\n",
                endpoints.join(", "),
                wanted.forward
            )
            .unwrap();
        }
        text + &wanted.extra
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts the process and waits until `/readyz` says yes.
    pub fn run(&mut self) {
        self.spawn();
        self.wait_ready();
    }

    /// Starts the process without waiting.
    pub fn spawn(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("log")).unwrap();
        let mut words = self.wrapper.clone();
        words.extend(tidegate());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(["run", "--config"]).arg(self.path("tidegate.toml"));
        command.env("NO_COLOR", "1").current_dir(self.folder.path());
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().unwrap());
    }

    /// Waits until `/readyz` says yes.
    pub fn wait_ready(&mut self) {
        let from = Instant::now();
        while !self.is_ready() {
            if let Some(status) = self.child.as_mut().and_then(|c| c.try_wait().unwrap()) {
                panic!("the gateway stopped with {status}\n{}", self.log());
            }
            assert!(from.elapsed() < PATIENCE, "the gateway is not ready\n{}", self.log());
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn is_ready(&self) -> bool {
        http::once(self.admin, "GET", "/readyz", &[], b"").is_ok_and(|r| r.status == 200)
    }

    /// What it has said so far, over all its lives.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGTERM, and the exit status after the drain.
    pub fn terminate(&mut self) -> ExitStatus {
        signal(self.pid(), "TERM");
        self.wait()
    }

    /// Waits for the end of the process by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        let from = Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            if from.elapsed() > PATIENCE {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("the gateway does not stop\n{}", self.log());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|c| c.try_wait().unwrap().is_none())
    }

    /// Runs another `tidegate` command on this configuration.
    pub fn command(&self, arguments: &[&str]) -> Output {
        let words = tidegate();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(arguments).arg("--config").arg(self.path("tidegate.toml"));
        command.env("NO_COLOR", "1").current_dir(self.folder.path()).stdin(Stdio::null()).output().unwrap()
    }

    /// The same, which has to succeed; returns standard output.
    pub fn command_ok(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "tidegate {arguments:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
        said
    }

    /// Registers a device with the role `sensor` and a fresh key, as an operator would.
    pub fn add_device(&self, id: &str) -> Device {
        self.command_ok(&["device", "add", id, "--role", "sensor"]);
        let key = self.path(&format!("{id}.key"));
        assert!(key.exists(), "device add left no {}", key.display());
        Device { id: id.to_owned(), key }
    }

    /// A fresh JWT, as an operator would make it; each works once.
    pub fn jwt(&self, device: &Device) -> String {
        let key = device.key.to_str().unwrap();
        self.command_ok(&["device", "token", &device.id, "--key", key]).trim().to_owned()
    }

    /// A bearer token, by the OAuth door.
    pub fn bearer(&self, device: &Device) -> String {
        let jwt = self.jwt(device);
        let form = format!(
            "grant_type=client_credentials&client_assertion_type=\
             urn%3Aietf%3Aparams%3Aoauth%3Aclient-assertion-type%3Ajwt-bearer&client_assertion={jwt}"
        );
        let headers = [("Content-Type", "application/x-www-form-urlencoded")];
        let response = http::once(self.plain, "POST", "/oauth2/token", &headers, form.as_bytes()).unwrap();
        assert_eq!(response.status, 200, "{response:?}");
        let answer: serde_json::Value = serde_json::from_str(&response.body).unwrap();
        answer["access_token"].as_str().unwrap().to_owned()
    }

    /// The gateway's id. A device has it from its provisioning; here it is asked for where it is told.
    pub fn id_hex(&self, device: &Device) -> String {
        let nonce = tidegate_auth::text::base64url(&rand_bytes::<16>());
        let asked = format!("{{\"device_id\":\"{}\",\"client_nonce\":\"{nonce}\"}}", device.id);
        let json = [("Content-Type", "application/json")];
        let answer = http::once(self.plain, "POST", "/auth/challenge", &json, asked.as_bytes()).unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
        let answer: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
        answer["gateway_id"].as_str().unwrap().to_owned()
    }

    /// A bearer token for CoAP, by the challenge over UDP; good on any socket.
    pub fn coap_token(&self, client: &mut coap::CoapClient, device: &Device) -> String {
        use tidegate_auth::exchange::{ChallengeRequest, SessionAnswer, SessionRequest};
        use tidegate_auth::{CbType, GatewayId, Proto, Transcript, keyfile, text};
        let client_nonce: [u8; 16] = rand_bytes();
        let request = ChallengeRequest { device_id: device.id.clone(), client_nonce };
        let gateway_id = GatewayId(text::from_text(&self.id_hex(device)).unwrap());
        let answer = client.request(coap::POST, "auth/c", &[], &request.to_cbor()).unwrap();
        assert_eq!(answer.code, (2, 5), "{answer:?}");
        let key = keyfile::secret_from_text(&fs::read_to_string(&device.key).unwrap()).unwrap();
        let transcript = Transcript {
            proto: Proto::Coap,
            cb_type: CbType::None,
            gateway_id: &gateway_id,
            device_id: &device.id,
            key_id: key.public().key_id(),
            client_nonce: &client_nonce,
            challenge: &answer.payload,
            channel_binding: b"",
            ctx: b"",
        };
        let signature = key.sign(&transcript.message().unwrap());
        let request = SessionRequest {
            device_id: device.id.clone(),
            key_id: key.public().key_id(),
            client_nonce,
            challenge: answer.payload[..].try_into().unwrap(),
            cb_type: CbType::None,
            signature,
        };
        let answer = client.request(coap::POST, "auth/s", &[], &request.to_cbor()).unwrap();
        assert_eq!(answer.code, (2, 4), "{answer:?}");
        text::base64url(&SessionAnswer::from_cbor(&answer.payload).unwrap().access_token)
    }

    pub fn mqtt(&self, device: &Device, v5: bool) -> mqtt::MqttClient {
        mqtt::MqttClient::connect(self.plain, &device.id, &self.jwt(device), v5).unwrap()
    }

    /// The text of `/metrics`.
    pub fn metrics(&self) -> String {
        http::once(self.admin, "GET", "/metrics", &[], b"").unwrap().body
    }

    /// The sum of all samples of one metric whose labels contain `label` (empty: all).
    pub fn metric(&self, name: &str, label: &str) -> f64 {
        let text = self.metrics();
        let samples = text.lines().filter(|l| {
            let rest = l.strip_prefix(name).unwrap_or("x");
            (rest.starts_with('{') || rest.starts_with(' ')) && l.contains(label)
        });
        samples.filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Resident memory of the process, in kB.
    pub fn resident_kb(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
            if thread::panicking() {
                eprintln!("--- log of the gateway\n{}", tail(&self.log(), 60));
            }
        }
    }
}

/// The program under test and what goes in front of it: an emulator, when `cross/smoke.sh` sets `TIDEGATE_TEST_PROGRAM`.
fn tidegate() -> Vec<String> {
    match std::env::var("TIDEGATE_TEST_PROGRAM") {
        Ok(words) => words.split_whitespace().map(str::to_owned).collect(),
        Err(_) => vec![env!("CARGO_BIN_EXE_tidegate").to_owned()],
    }
}

/// Random enough for a nonce in a test.
fn rand_bytes<const N: usize>() -> [u8; N] {
    use std::io::Read;
    let mut bytes = [0; N];
    fs::File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    bytes
}

/// A registered device with its private key.
#[derive(Clone, Debug)]
pub struct Device {
    pub id: String,
    pub key: PathBuf,
}

/// Waits until `condition` holds; fails the test with `what` if it does not in time.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let from = Instant::now();
    while !condition() {
        assert!(from.elapsed() < PATIENCE, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Sends a signal by name to a process of ours.
pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap();
    assert!(status.success(), "kill -{name} {pid}");
}

/// A loopback address whose port is free for TCP and UDP, below the range from which the system takes ports by itself, so
/// that it is still free after a restart.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    const FIRST: u16 = 10_000;
    const COUNT: u16 = 20_000;
    // Test processes start at different places; collisions are found by binding.
    let start = u16::try_from(u64::from(std::process::id()) * 251 % u64::from(COUNT)).unwrap();
    for _ in 0..COUNT {
        let offset = (u32::from(start) + u32::from(NEXT.fetch_add(1, Ordering::Relaxed))) % u32::from(COUNT);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, FIRST + u16::try_from(offset).unwrap()));
        if TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() {
            return address;
        }
    }
    panic!("no free port");
}

/// A child process that is killed when the test ends.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a mosquitto broker on a free port; the test fails, with the package's name, where it is not installed.
pub fn mosquitto(folder: &Path) -> (Running, SocketAddr) {
    let address = free_address();
    let file = folder.join("mosquitto.conf");
    fs::write(&file, format!("listener {} 127.0.0.1\nallow_anonymous true\n", address.port())).unwrap();
    let path = format!("{}:/usr/sbin:/usr/local/sbin", std::env::var("PATH").unwrap());
    let mut command = Command::new("mosquitto");
    command.env("PATH", path).arg("-c").arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().unwrap_or_else(|e| panic!("mosquitto (Debian package mosquitto): {e}"));
    let running = Running(child);
    wait_until("mosquitto listens", || std::net::TcpStream::connect(address).is_ok());
    (running, address)
}

/// Runs a program to its end with a deadline; the test fails, with the package's name, where it is not installed.
pub fn program(package: &str, words: &[&str]) -> Output {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap_or_else(|e| panic!("{} ({package}): {e}", words[0]));
    let (pid, (done, wait)) = (child.id(), std::sync::mpsc::channel());
    thread::spawn(move || done.send(child.wait_with_output()));
    match wait.recv_timeout(PATIENCE) {
        Ok(output) => output.unwrap(),
        Err(_) => {
            signal(pid, "KILL");
            panic!("{words:?} does not end");
        }
    }
}

/// The Python of `target/venv`, which `./ci.sh interop` fills from PyPI, or the system's.
pub fn python() -> String {
    std::env::var("TIDEGATE_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned())
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn said(output: &Output) -> String {
    format!("{}\n{}{}", output.status, stdout(output), String::from_utf8_lossy(&output.stderr))
}

/// The last lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

//! CoAP over UDP: confirmable GET and PUT, each client with one request on its way.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use mio::{Events, Interest, Poll, Token};
use tidegate_auth::exchange::{ChallengeRequest, SessionAnswer, SessionRequest};
use tidegate_auth::{CbType, Proto, Transcript, text};

use crate::compare::{Contender, Options};
use crate::gateway::{Devices, Gateway, Role, Setup, device_id};
use crate::histogram::Histogram;
use crate::peers::Peer;
use crate::process::Process;
use crate::report::{Sample, Section};
use crate::{Failure, Result};

const GET: u8 = 1;
const POST: u8 = 2;
const PUT: u8 = 3;
const PAYLOAD: &[u8; 64] = b"{\"celsius\":21.53,\"humidity\":0.6134,\"battery\":3.71,\"n\":12345678}.";
/// RFC 7252 section 4.8.
const ACK_TIMEOUT: Duration = Duration::from_secs(2);
/// Message ids of one endpoint must not come again within 247 s: after so many a client takes a new port.
const REQUESTS_PER_PORT: u32 = 60_000;
const WARM_UP: Duration = Duration::from_millis(500);
const CLIENTS_AT_ONCE: usize = 32;

pub fn run(options: &Options) -> Section {
    let mut section = Section::new("CoAP over UDP, confirmable, one request at a time per client", "request");
    let contenders = options.contenders(&[Peer::Libcoap], &mut section);
    for (load, bar) in [(Load::Get, Some(0.45)), (Load::Put, Some(0.45)), (Load::PutState, None)] {
        let method = load.method();
        let bars: Vec<_> = bar.map(|bar| (Peer::Libcoap, bar)).into_iter().collect();
        for clients in [32, 256, 2_000] {
            let name = format!("{}, {clients} clients", load.name());
            options.compare(&mut section, &name, &contenders, &bars, |contender| match contender {
                Contender::Peer(peer) => {
                    let server = peer.start(&[])?;
                    let path = if method == GET { "time" } else { "example_data" };
                    let message = request(method, &[path], None, payload(method));
                    let device = || Device::new(server.address, message.clone());
                    let devices = (0..clients).map(|_| device()).collect::<Result<_>>()?;
                    measure(options, &server.process, server.address, devices)
                }
                Contender::Tidegate { binary, .. } => {
                    let setup = Setup { devices: clients, ..Setup::default() };
                    let (server, registered) = Gateway::prepare(binary, setup)?.start()?;
                    let devices = (0..clients).map(|index| log_in(&registered, index, load)).collect::<Result<_>>()?;
                    measure(options, &server.process, registered.coap, devices)
                }
            });
        }
    }
    section.remarks.extend([
        "GET: libcoap's `/time` (15 bytes), Tidegate's `/s` (the device's state, 64 bytes). Tidegate's requests carry a token of 58 bytes.".into(),
        "PUT: libcoap's `/example_data`, Tidegate's `/ps/dev/DEVICE/reading`. Both keep the value in memory, where a GET finds it.".into(),
        "2000 clients: the kernel's receive buffer (208 KiB unless raised) holds some 270 requests. Who finds it full waits ACK_TIMEOUT and is `sent again`, at either server."
            .into(),
        "PUT of state: the same libcoap, Tidegate's `/s`, which is on disk (fsync) before the answer goes out. There is no bar: libcoap promises nothing like it."
            .into(),
    ]);
    section
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    Get,
    /// A value that is kept in memory.
    Put,
    /// A value that is on disk before it is acknowledged.
    PutState,
}

impl Load {
    const fn name(self) -> &'static str {
        match self {
            Load::Get => "GET",
            Load::Put => "PUT, 64 bytes",
            Load::PutState => "PUT of state, fsync, 64 bytes",
        }
    }

    const fn method(self) -> u8 {
        match self {
            Load::Get => GET,
            Load::Put | Load::PutState => PUT,
        }
    }
}

fn payload(method: u8) -> &'static [u8] {
    if method == GET { b"" } else { PAYLOAD }
}

/// A device: one port for as long as message ids allow, from logging in to the last request. The system hands a closed port out again at once, and a
/// server would take the message ids of its new owner for retransmissions of the old one's (RFC 7252 section 4.5).
struct Device {
    socket: UdpSocket,
    /// The message id used last.
    number: u16,
    /// What it asks again and again.
    message: Vec<u8>,
}

impl Device {
    fn new(server: SocketAddr, message: Vec<u8>) -> Result<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(server)?;
        socket.set_read_timeout(Some(ACK_TIMEOUT))?;
        Ok(Device { socket, number: 0, message })
    }

    /// One request and the payload of its success.
    fn ask(&mut self, mut message: Vec<u8>) -> Result<Vec<u8>> {
        self.number += 1;
        number_it(&mut message, self.number);
        let mut buffer = [0; 1500];
        for _ in 0..3 {
            self.socket.send(&message)?;
            let Ok(count) = self.socket.recv(&mut buffer) else { continue };
            let answer = &buffer[..count];
            let code = answer.get(1).copied().unwrap_or_default();
            if code >> 5 != 2 {
                return Err(Failure::new(format!("answer {}.{:02}", code >> 5, code & 31)));
            }
            let payload = answer.iter().skip(8).position(|byte| *byte == 0xFF).map_or(count, |at| at + 9);
            return Ok(answer[payload..].to_vec());
        }
        Err(Failure::new("no answer"))
    }
}

/// The challenge flow of the wire contract, and for GET a state to read. Gives the device with its request, which carries the token.
fn log_in(devices: &Devices, index: usize, load: Load) -> Result<Device> {
    let id = device_id(Role::Sensor, index);
    let key = devices.secret_key(Role::Sensor, index);
    let mut client_nonce = [7; 16];
    client_nonce[..8].copy_from_slice(&(index as u64).to_le_bytes());
    let mut device = Device::new(devices.coap, Vec::new())?;
    let question = ChallengeRequest { device_id: id.clone(), client_nonce }.to_cbor();
    let answer = device.ask(request(POST, &["auth", "c"], None, &question))?;
    let challenge: [u8; 38] = answer.as_slice().try_into().map_err(|_| Failure::new("no challenge from /auth/c"))?;
    let transcript = Transcript {
        proto: Proto::Coap,
        cb_type: CbType::None,
        gateway_id: devices.gateway_id(),
        device_id: &id,
        key_id: key.public().key_id(),
        client_nonce: &client_nonce,
        challenge: &challenge,
        channel_binding: &[],
        ctx: &[],
    };
    let signature = transcript.sign(&key).map_err(|error| Failure::new(error.to_string()))?;
    let key_id = key.public().key_id();
    let proof =
        SessionRequest { device_id: id.clone(), key_id, client_nonce, challenge, cb_type: CbType::None, signature }
            .to_cbor();
    let answer = device.ask(request(POST, &["auth", "s"], None, &proof))?;
    let session = SessionAnswer::from_cbor(&answer).ok_or_else(|| Failure::new("no token from /auth/s"))?;
    let query = format!("t={}", text::base64url(&session.access_token));
    let method = load.method();
    if load == Load::Get {
        device.ask(request(PUT, &["s"], Some(&query), PAYLOAD))?;
    }
    device.message = match load {
        Load::Get | Load::PutState => request(method, &["s"], Some(&query), payload(method)),
        Load::Put => request(method, &["ps", "dev", &id, "reading"], Some(&query), payload(method)),
    };
    Ok(device)
}

/// An empty confirmable message, which every server answers by a reset.
pub fn answers_ping(address: SocketAddr) -> bool {
    let exchange = || -> std::io::Result<bool> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(address)?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        socket.send(&[0x40, 0, 0, 1])?;
        let mut answer = [0; 16];
        Ok(socket.recv(&mut answer)? >= 4)
    };
    exchange().unwrap_or(false)
}

/// A confirmable request with a token of four bytes; message id and token are set by `number_it`.
fn request(method: u8, path: &[&str], query: Option<&str>, payload: &[u8]) -> Vec<u8> {
    let mut message = vec![0x44, method, 0, 0, 0, 0, 0, 0];
    let mut last = 0;
    let mut option = |number: u8, value: &[u8]| {
        let delta = (number - last) << 4;
        match u8::try_from(value.len()) {
            Ok(length @ 0..=12) => message.push(delta | length),
            length => message.extend([delta | 13, length.unwrap_or(u8::MAX) - 13]),
        }
        message.extend_from_slice(value);
        last = number;
    };
    path.iter().for_each(|segment| option(11, segment.as_bytes()));
    if let Some(query) = query {
        option(15, query.as_bytes());
    }
    if !payload.is_empty() {
        message.push(0xFF);
        message.extend_from_slice(payload);
    }
    message
}

fn number_it(message: &mut [u8], number: u16) {
    let bytes = number.to_be_bytes();
    message[2..4].copy_from_slice(&bytes);
    message[4..6].copy_from_slice(&bytes);
}

struct Client {
    socket: mio::net::UdpSocket,
    message: Vec<u8>,
    number: u16,
    on_this_port: u32,
    sent: Instant,
    tries: u32,
}

#[derive(Default)]
struct Counts {
    answered: u64,
    refused: u64,
    again: u64,
}

struct Generator {
    poll: Poll,
    events: Events,
    clients: Vec<Client>,
    server: SocketAddr,
    counts: Counts,
    latency: Histogram,
}

fn measure(options: &Options, process: &Process, server: SocketAddr, devices: Vec<Device>) -> Result<Sample> {
    let mut load = Generator {
        poll: Poll::new()?,
        events: Events::with_capacity(1024),
        clients: Vec::new(),
        server,
        counts: Counts::default(),
        latency: Histogram::new(),
    };
    for Device { socket, number, message } in devices {
        let socket = load.watch(socket, load.clients.len())?;
        load.clients.push(Client {
            socket,
            message,
            number,
            on_this_port: number.into(),
            sent: Instant::now(),
            tries: 0,
        });
    }
    // Not all at once: what overflows the server's receive buffer is not sent again before ACK_TIMEOUT. A small load then has all its clients at work.
    for at in 0..load.clients.len() {
        load.next(at)?;
        if at % CLIENTS_AT_ONCE == CLIENTS_AT_ONCE - 1 {
            load.run(Duration::from_millis(2))?;
        }
    }
    load.run(WARM_UP)?;
    load.latency.clear();
    load.counts = Counts::default();
    let (cpu, start) = (process.cpu_seconds(), Instant::now());
    load.run(Duration::from_secs_f64(options.seconds))?;
    let (seconds, cpu_after) = (start.elapsed().as_secs_f64(), process.cpu_seconds());
    let Counts { answered, refused, again } = load.counts;
    if refused > answered / 100 {
        return Err(Failure::new(format!("{refused} of {answered} requests refused")));
    }
    let mut notes = Vec::new();
    if again > 0 {
        notes.push(format!("{again} sent again"));
    }
    Ok(Sample {
        units: answered,
        seconds,
        cpu_seconds: cpu_after - cpu,
        p99_us: load.latency.quantile_us(0.99),
        pss_bytes: Some(process.pss_bytes()),
        lost: None,
        notes,
    })
}

impl Generator {
    fn open(&self, token: usize) -> Result<mio::net::UdpSocket> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(self.server)?;
        self.watch(socket, token)
    }

    fn watch(&self, socket: UdpSocket, token: usize) -> Result<mio::net::UdpSocket> {
        socket.set_nonblocking(true)?;
        let mut socket = mio::net::UdpSocket::from_std(socket);
        self.poll.registry().register(&mut socket, Token(token), Interest::READABLE)?;
        Ok(socket)
    }

    fn run(&mut self, duration: Duration) -> Result<()> {
        let end = Instant::now() + duration;
        let mut check = Instant::now() + ACK_TIMEOUT / 4;
        let mut buffer = [0; 1500];
        loop {
            self.poll.poll(&mut self.events, Some(Duration::from_millis(20)))?;
            let ready: Vec<usize> = self.events.iter().map(|event| event.token().0).collect();
            let now = Instant::now();
            for at in ready {
                self.receive(at, now, &mut buffer)?;
            }
            if now > check {
                check = now + ACK_TIMEOUT / 4;
                self.send_again(now)?;
            }
            if now > end {
                return Ok(());
            }
        }
    }

    fn receive(&mut self, at: usize, now: Instant, buffer: &mut [u8]) -> Result<()> {
        loop {
            let client = &mut self.clients[at];
            let count = match client.socket.recv(buffer) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(Failure::new(format!("the server is gone: {error}"))),
            };
            let Some([kind, code, high, low]) = buffer.get(..4).filter(|_| count >= 4) else { continue };
            // A piggy-backed answer; what belongs to an earlier try is not counted again.
            if kind & 0xF0 == 0x60 && u16::from_be_bytes([*high, *low]) == client.number {
                self.latency.add((now - client.sent).as_nanos() as u64);
                self.counts.answered += 1;
                self.counts.refused += u64::from(code >> 5 != 2);
                self.next(at)?;
            }
        }
    }

    fn next(&mut self, at: usize) -> Result<()> {
        if self.clients[at].on_this_port >= REQUESTS_PER_PORT {
            self.clients[at].socket = self.open(at)?;
            self.clients[at].on_this_port = 0;
        }
        let client = &mut self.clients[at];
        client.on_this_port += 1;
        client.number = client.number.wrapping_add(1);
        number_it(&mut client.message, client.number);
        client.tries = 0;
        client.send()
    }

    fn send_again(&mut self, now: Instant) -> Result<()> {
        for client in &mut self.clients {
            if now.saturating_duration_since(client.sent) > ACK_TIMEOUT * (1 << client.tries.min(4)) {
                client.tries += 1;
                self.counts.again += 1;
                client.send()?;
            }
        }
        Ok(())
    }
}

impl Client {
    fn send(&mut self) -> Result<()> {
        self.sent = Instant::now();
        match self.socket.send(&self.message) {
            Ok(_) => Ok(()),
            // Lost, as on any link: it is sent again.
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(Failure::new(format!("the server is gone: {error}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_its_options_in_order() {
        let bytes = request(PUT, &["s"], Some("t=abcdefghijklm"), b"x");
        assert_eq!(bytes, b"\x44\x03\x00\x00\x00\x00\x00\x00\xB1s\x4D\x02t=abcdefghijklm\xFFx");
    }
}

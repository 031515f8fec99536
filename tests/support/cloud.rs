//! A pretend cloud: an HTTP/1.1 backend that keeps every message by its id and misbehaves on request.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// What the backend does with a delivery. Health checks (`GET`) are answered 200 except while it is `Down`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// Stores and answers 200.
    Well,
    /// Closes every connection at once.
    Down,
    /// Stores, then answers after this many milliseconds.
    Slow(u64),
    /// Answers with this status and stores nothing.
    Status(u16),
    /// Reads the request, stores nothing, resets the connection (RST).
    Reset,
    /// Stores nothing, promises 1,000 bytes of answer, sends 10 and closes.
    HalfBody,
    /// Stores, and closes without an answer: the gateway has to send it again.
    StoreThenClose,
}

/// One message as it arrived, the headers and body fields of the wire contract taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrived {
    pub id: String,
    pub path: String,
    pub body: String,
}

#[derive(Default)]
struct State {
    arrived: Vec<Arrived>,
    mood: Option<Mood>,
}

pub struct Cloud {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    requests: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

impl Cloud {
    pub fn start() -> Cloud {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let cloud = Cloud {
            address: listener.local_addr().unwrap(),
            state: Arc::default(),
            requests: Arc::default(),
            stop: Arc::default(),
        };
        let (state, requests, stop) = (cloud.state.clone(), cloud.requests.clone(), cloud.stop.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let (Ok(stream), state, requests) = (stream, state.clone(), requests.clone()) else { continue };
                thread::spawn(move || serve(&stream, &state, &requests));
            }
        });
        cloud
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn set(&self, mood: Mood) {
        self.state.lock().unwrap().mood = Some(mood);
    }

    pub fn arrived(&self) -> Vec<Arrived> {
        self.state.lock().unwrap().arrived.clone()
    }

    /// Deliveries tried so far, whatever became of them.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    /// Body to the ids under which it arrived, one per arrival.
    pub fn by_body(&self) -> BTreeMap<String, Vec<String>> {
        let mut map: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for message in self.arrived() {
            map.entry(message.body).or_default().push(message.id);
        }
        map
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the accept loop; if that fails there is nobody to wake.
        drop(TcpStream::connect(self.address));
    }
}

struct Request {
    method: String,
    path: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Request {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

fn serve(stream: &TcpStream, state: &Mutex<State>, requests: &AtomicUsize) {
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.set_nodelay(true).unwrap();
    let mut reader = BufReader::new(stream);
    let mood = |state: &Mutex<State>| state.lock().unwrap().mood.unwrap_or(Mood::Well);
    while mood(state) != Mood::Down {
        let Some(request) = read_request(&mut reader) else { return };
        if request.method == "GET" {
            if mood(state) == Mood::Down || answer(stream, 200).is_none() {
                return;
            }
            continue;
        }
        requests.fetch_add(1, Ordering::Relaxed);
        let mood = mood(state);
        if matches!(mood, Mood::Well | Mood::Slow(_) | Mood::StoreThenClose) {
            state.lock().unwrap().arrived.extend(messages(&request));
        }
        match mood {
            Mood::Well => {
                if answer(stream, 200).is_none() {
                    return;
                }
            }
            Mood::Slow(ms) => {
                thread::sleep(Duration::from_millis(ms));
                if answer(stream, 200).is_none() {
                    return;
                }
            }
            Mood::Status(status) => {
                if answer(stream, status).is_none() {
                    return;
                }
            }
            Mood::Reset => {
                // Closing with unread input makes the kernel send RST; linger(0) is not in std.
                let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
                return;
            }
            Mood::HalfBody => {
                let mut stream = stream;
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n0123456789");
                return;
            }
            Mood::StoreThenClose | Mood::Down => return,
        }
    }
}

fn answer(mut stream: &TcpStream, status: u16) -> Option<()> {
    stream.write_all(format!("HTTP/1.1 {status} Pretend\r\nContent-Length: 0\r\n\r\n").as_bytes()).ok()
}

fn read_request(reader: &mut BufReader<&TcpStream>) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut request = Request { method, path, headers, body: Vec::new() };
    if request.header("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked")) {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size).ok()?;
            let size = usize::from_str_radix(size.trim(), 16).ok()?;
            let mut chunk = vec![0; size + 2];
            reader.read_exact(&mut chunk).ok()?;
            if size == 0 {
                break;
            }
            request.body.extend_from_slice(&chunk[..size]);
        }
    } else if let Some(length) = request.header("content-length") {
        request.body = vec![0; length.parse().ok()?];
        reader.read_exact(&mut request.body).ok()?;
    }
    Some(request)
}

/// One message in binary mode (the id is a header), or one a line.
fn messages(request: &Request) -> Vec<Arrived> {
    let body = String::from_utf8_lossy(&request.body).into_owned();
    if let Some(id) = request.header("ce-id") {
        return vec![Arrived { id: id.to_owned(), path: request.path.clone(), body }];
    }
    let lines = body.lines().filter(|l| !l.trim().is_empty());
    lines
        .map(|line| {
            let json: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
            let text = |key: &str| json.get(key).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
            let body = match json.get("data") {
                Some(serde_json::Value::String(text)) => text.clone(),
                Some(other) => other.to_string(),
                None => unbase64(&text("data_base64")),
            };
            Arrived { id: text("id"), path: request.path.clone(), body }
        })
        .collect()
}

fn unbase64(text: &str) -> String {
    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::STANDARD.decode(text).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

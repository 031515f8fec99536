//! An HTTP backend that can be told how to fail.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// What happens to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mood {
    /// Kept, answered 200, connection kept.
    Well,
    /// Answered with these bytes after the request was read; kept if `keep`; then closed.
    Raw { answer: &'static str, keep: bool },
    /// Answered with this status, not kept.
    Status(u16),
    /// Read and never answered.
    BlackHole,
    /// Kept, answered one byte at a time with this pause.
    Drip(Duration),
    /// Not read, reset.
    Reset,
    /// Refuses bodies that contain this text with this status.
    Dislikes(&'static str, u16),
}

#[derive(Clone, Debug)]
pub struct Received {
    pub method: String,
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Received {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

#[derive(Default)]
struct Shared {
    mood: Option<Mood>,
    kept: Vec<Received>,
    requests: usize,
    connections: usize,
}

pub struct Backend {
    pub address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Backend {
    pub async fn start(mood: Mood) -> Backend {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Mutex::new(Shared { mood: Some(mood), ..Shared::default() }));
        let state = shared.clone();
        let accepting = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                state.lock().connections += 1;
                tokio::spawn(serve(stream, state.clone()));
            }
        });
        Backend { address, shared, accepting }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn set(&self, mood: Mood) {
        self.shared.lock().mood = Some(mood);
    }

    /// POSTs that came, whatever became of them.
    pub fn requests(&self) -> usize {
        self.shared.lock().requests
    }

    pub fn connections(&self) -> usize {
        self.shared.lock().connections
    }

    pub fn kept(&self) -> Vec<Received> {
        self.shared.lock().kept.clone()
    }

    /// The events of every body that was kept, in order, as id and data.
    pub fn events(&self) -> Vec<(String, String)> {
        let lines = |body: &str| body.lines().map(str::to_owned).collect::<Vec<_>>();
        let events = self.kept().iter().flat_map(|received| lines(&received.body)).collect::<Vec<_>>();
        events
            .iter()
            .map(|line| {
                let event: serde_json::Value = serde_json::from_str(line).unwrap();
                (event["id"].as_str().unwrap().to_owned(), event["data"].to_string())
            })
            .collect()
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn serve(stream: TcpStream, shared: Arc<Mutex<Shared>>) {
    let mut stream = BufReader::new(stream);
    loop {
        let mood = shared.lock().mood.clone().unwrap();
        if mood == Mood::Reset {
            // Closing with unread input sends RST; linger does for certain.
            let _ = socket2::SockRef::from(stream.get_ref()).set_linger(Some(Duration::ZERO));
            return;
        }
        let Some(received) = read(&mut stream).await else { return };
        let mood = shared.lock().mood.clone().unwrap();
        if received.method == "GET" {
            let well = !matches!(mood, Mood::Status(_) | Mood::BlackHole);
            if !well || stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.is_err() {
                return;
            }
            continue;
        }
        shared.lock().requests += 1;
        let keep = |received: &Received| shared.lock().kept.push(received.clone());
        let status = match &mood {
            Mood::Well => 200,
            Mood::Status(status) => *status,
            Mood::Dislikes(text, status) if received.body.contains(text) => *status,
            Mood::Dislikes(..) => 200,
            Mood::Raw { answer, keep: wanted } => {
                if *wanted {
                    keep(&received);
                }
                let _ = stream.write_all(answer.as_bytes()).await;
                return;
            }
            Mood::BlackHole => {
                // Holds the connection open until the other side gives up.
                let _ = stream.read(&mut [0]).await;
                return;
            }
            Mood::Drip(pause) => {
                keep(&received);
                for byte in b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok" {
                    tokio::time::sleep(*pause).await;
                    if stream.write_all(&[*byte]).await.is_err() {
                        return;
                    }
                }
                continue;
            }
            Mood::Reset => return,
        };
        if status == 200 {
            keep(&received);
        }
        let answer = format!("HTTP/1.1 {status} Said\r\ncontent-length: 2\r\n\r\nok");
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

async fn read(stream: &mut BufReader<TcpStream>) -> Option<Received> {
    let mut line = String::new();
    stream.read_line(&mut line).await.ok().filter(|read| *read > 0)?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await.ok().filter(|read| *read > 0)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut received = Received { method, path, headers, body: String::new() };
    let length = received.header("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    received.body = String::from_utf8_lossy(&body).into_owned();
    Some(received)
}

//! An origin that keeps what it was asked, byte by byte as it came, and answers 200.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// A whole request; one that was broken off is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The request line and the header lines, without line ends.
    pub head: Vec<String>,
    /// Without its framing.
    pub body: Vec<u8>,
    pub trailers: Vec<String>,
}

impl Asked {
    /// Method and target.
    pub fn line(&self) -> &str {
        self.head[0].rsplit_once(' ').map_or(&self.head[0], |(line, _)| line)
    }

    /// Names, in lower case, and values.
    pub fn headers(&self) -> impl Iterator<Item = (String, &str)> {
        let pair = |line: &'_ String| {
            line.split_once(':').map_or((line.len(), line.len()), |(name, _)| (name.len(), name.len() + 1))
        };
        self.head[1..].iter().map(move |line| (line[..pair(line).0].to_ascii_lowercase(), line[pair(line).1..].trim()))
    }

    pub fn header(&self, wanted: &str) -> Option<&str> {
        self.headers().find(|(name, _)| name == wanted).map(|(_, value)| value)
    }
}

pub struct Origin {
    pub address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Origin {
    pub fn start() -> Origin {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let origin = Origin { address: listener.local_addr().unwrap(), asked: Arc::default() };
        let asked = origin.asked.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let asked = asked.clone();
                thread::spawn(move || serve(&stream, &asked));
            }
        });
        origin
    }

    /// What came since it was last called.
    pub fn take(&self) -> Vec<Asked> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

fn serve(mut stream: &TcpStream, asked: &Mutex<Vec<Asked>>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    loop {
        let head = lines(&mut reader)?;
        let mut request = Asked { head, body: Vec::new(), trailers: Vec::new() };
        let length = request.header("content-length").and_then(|length| length.parse::<usize>().ok());
        if request.header("transfer-encoding").is_some() {
            loop {
                let line = line(&mut reader)?;
                let size = line.split(';').next().unwrap_or_default().trim();
                let size = usize::from_str_radix(size, 16).map_err(|_| io::ErrorKind::InvalidData)?;
                if size == 0 {
                    break;
                }
                let from = request.body.len();
                request.body.resize(from + size, 0);
                reader.read_exact(&mut request.body[from..])?;
                reader.read_exact(&mut [0; 2])?;
            }
            request.trailers = lines_or_none(&mut reader)?;
        } else if let Some(length) = length {
            request.body.resize(length, 0);
            reader.read_exact(&mut request.body)?;
        }
        let is_head = request.head[0].starts_with("HEAD ");
        asked.lock().unwrap().push(request);
        let body = if is_head { "" } else { "ok" };
        stream.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{body}").as_bytes())?;
    }
}

/// Up to the empty line; at least one.
fn lines(reader: &mut impl BufRead) -> io::Result<Vec<String>> {
    let first = line(reader)?;
    let mut lines = vec![first];
    lines.extend(lines_or_none(reader)?);
    Ok(lines)
}

fn lines_or_none(reader: &mut impl BufRead) -> io::Result<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let line = line(reader)?;
        if line.is_empty() {
            return Ok(lines);
        }
        lines.push(line);
    }
}

/// A line without its CRLF; a bare line feed ends none.
fn line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = Vec::new();
    loop {
        if reader.read_until(b'\n', &mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if line.ends_with(b"\r\n") {
            line.truncate(line.len() - 2);
            return Ok(line.escape_ascii().to_string());
        }
    }
}

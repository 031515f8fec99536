//! A web server that answers 202 to everything, in one thread: as little as an origin can cost.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};

use crate::Result;

const ANSWER: &[u8] = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n";
const HEALTHY: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
}

/// Serves until the process is ended.
pub fn serve(addresses: &[String]) -> Result<()> {
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(1024);
    let mut listeners = Vec::new();
    for address in addresses {
        let mut listener = TcpListener::bind(address.parse::<SocketAddr>()?)?;
        poll.registry().register(&mut listener, Token(listeners.len()), Interest::READABLE)?;
        listeners.push(listener);
    }
    let mut connections: Vec<Option<Connection>> = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        poll.poll(&mut events, Some(Duration::from_secs(1)))?;
        for event in &events {
            let at = event.token().0;
            if let Some(listener) = listeners.get(at) {
                while let Ok((mut stream, _)) = listener.accept() {
                    stream.set_nodelay(true)?;
                    let slot = free_slot(&mut connections);
                    poll.registry().register(&mut stream, Token(listeners.len() + slot), Interest::READABLE)?;
                    connections[slot] = Some(Connection { stream, input: Vec::new() });
                }
                continue;
            }
            let slot = &mut connections[at - listeners.len()];
            if slot.as_mut().is_some_and(|connection| !connection.serve(&mut buffer)) {
                *slot = None;
            }
        }
    }
}

fn free_slot(connections: &mut Vec<Option<Connection>>) -> usize {
    match connections.iter().position(Option::is_none) {
        Some(slot) => slot,
        None => {
            connections.push(None);
            connections.len() - 1
        }
    }
}

impl Connection {
    /// Reads until nothing is left; false when the connection is over. Answers are few and small, so they always fit the socket's buffer.
    fn serve(&mut self, buffer: &mut [u8]) -> bool {
        loop {
            match self.stream.read(buffer) {
                Ok(0) => return false,
                Ok(count) => {
                    self.input.extend_from_slice(&buffer[..count]);
                    let mut answers = Vec::new();
                    let mut taken = 0;
                    while let Some((length, is_get)) = request_length(&self.input[taken..]) {
                        answers.extend_from_slice(if is_get { HEALTHY } else { ANSWER });
                        taken += length;
                    }
                    self.input.drain(..taken);
                    if self.stream.write_all(&answers).is_err() {
                        return false;
                    }
                    if count < buffer.len() {
                        // Epoll reports again if more has come meanwhile.
                        return true;
                    }
                }
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
        }
    }
}

/// Bytes of the first whole request, and whether it is a GET; none if it is not whole yet.
pub fn request_length(input: &[u8]) -> Option<(usize, bool)> {
    let head = find(input, b"\r\n\r\n")? + 4;
    let is_get = input.starts_with(b"GET ");
    if let Some(value) = header(&input[..head], b"content-length:") {
        let body: usize = std::str::from_utf8(value).ok()?.trim().parse().ok()?;
        return (input.len() >= head + body).then_some((head + body, is_get));
    }
    if header(&input[..head], b"transfer-encoding:").is_some() {
        let end = find(&input[head..], b"0\r\n\r\n")? + 5;
        return Some((head + end, is_get));
    }
    Some((head, is_get))
}

fn header<'a>(head: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    head.split(|byte| *byte == b'\n').find_map(|line| {
        let (found, value) = line.split_at_checked(name.len())?;
        found.eq_ignore_ascii_case(name).then_some(value)
    })
}

fn find(input: &[u8], what: &[u8]) -> Option<usize> {
    input.windows(what.len()).position(|window| window == what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_ends_with_its_body() {
        assert_eq!(request_length(b"GET / HTTP/1.1\r\n"), None);
        assert_eq!(request_length(b"GET / HTTP/1.1\r\n\r\nGET"), Some((18, true)));
        assert_eq!(request_length(b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nab"), None);
        assert_eq!(request_length(b"POST / HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc"), Some((41, false)));
        assert_eq!(
            request_length(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"),
            Some((58, false))
        );
    }
}

//! The least CoAP client that a test needs: one request in flight over UDP, independent of our own engine.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

pub struct CoapClient {
    socket: UdpSocket,
    message_id: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// `(2, 4)` is 2.04.
    pub code: (u8, u8),
    pub options: Vec<(u16, Vec<u8>)>,
    pub payload: Vec<u8>,
}

pub const GET: u8 = 1;
pub const POST: u8 = 2;
pub const PUT: u8 = 3;

impl CoapClient {
    pub fn connect(to: SocketAddr) -> io::Result<CoapClient> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        let message_id = socket.local_addr()?.port();
        Ok(CoapClient { socket, message_id })
    }

    pub fn set_timeout(&self, timeout: Duration) {
        self.socket.set_read_timeout(Some(timeout)).unwrap();
    }

    /// Sends a confirmable request once, without repeating it, and waits for its answer.
    pub fn request(&mut self, method: u8, path: &str, queries: &[&str], payload: &[u8]) -> io::Result<Answer> {
        self.message_id = self.message_id.wrapping_add(1);
        let token = self.message_id.to_be_bytes();
        let mut datagram = vec![0x42, method];
        datagram.extend(self.message_id.to_be_bytes());
        datagram.extend(token);
        let mut last = 0;
        for segment in path.split('/').filter(|s| !s.is_empty()) {
            option(&mut datagram, &mut last, 11, segment.as_bytes());
        }
        for query in queries {
            option(&mut datagram, &mut last, 15, query.as_bytes());
        }
        if !payload.is_empty() {
            datagram.push(0xFF);
            datagram.extend_from_slice(payload);
        }
        self.send(&datagram)?;
        loop {
            let reply = self.receive()?;
            if let Some((message_type, message_id, got, answer)) = parse(&reply) {
                let empty_ack = message_type == 2 && answer.code == (0, 0);
                if message_type == 0 {
                    let mut ack = vec![0x60, 0];
                    ack.extend(message_id.to_be_bytes());
                    self.send(&ack)?;
                }
                if !empty_ack && got == token {
                    return Ok(answer);
                }
            }
        }
    }

    pub fn send(&self, datagram: &[u8]) -> io::Result<()> {
        self.socket.send(datagram).map(|_| ())
    }

    pub fn receive(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; 65_536];
        let length = self.socket.recv(&mut buffer)?;
        buffer.truncate(length);
        Ok(buffer)
    }
}

fn option(datagram: &mut Vec<u8>, last: &mut u16, number: u16, value: &[u8]) {
    let extended = |n: usize| match n {
        0..=12 => (u8::try_from(n).unwrap(), vec![]),
        13..=268 => (13, vec![u8::try_from(n - 13).unwrap()]),
        _ => (14, u16::try_from(n - 269).unwrap().to_be_bytes().to_vec()),
    };
    let (delta, delta_more) = extended(usize::from(number - *last));
    let (length, length_more) = extended(value.len());
    datagram.push(delta << 4 | length);
    datagram.extend(delta_more);
    datagram.extend(length_more);
    datagram.extend_from_slice(value);
    *last = number;
}

/// Type, message id, token and the rest; None for what is not CoAP.
fn parse(bytes: &[u8]) -> Option<(u8, u16, Vec<u8>, Answer)> {
    let (&first, &code) = (bytes.first()?, bytes.get(1)?);
    let message_id = u16::from_be_bytes([*bytes.get(2)?, *bytes.get(3)?]);
    let token_length = usize::from(first & 15);
    let token = bytes.get(4..4 + token_length)?.to_vec();
    let mut at = 4 + token_length;
    let (mut number, mut options, mut payload) = (0u16, Vec::new(), Vec::new());
    while let Some(&head) = bytes.get(at) {
        at += 1;
        if head == 0xFF {
            payload = bytes[at..].to_vec();
            break;
        }
        let mut number_of = |nibble: u8| -> Option<u16> {
            match nibble {
                13 => {
                    at += 1;
                    Some(u16::from(*bytes.get(at - 1)?) + 13)
                }
                14 => {
                    at += 2;
                    Some(u16::from_be_bytes([*bytes.get(at - 2)?, *bytes.get(at - 1)?]) + 269)
                }
                15 => None,
                n => Some(u16::from(n)),
            }
        };
        number += number_of(head >> 4)?;
        let length = usize::from(number_of(head & 15)?);
        options.push((number, bytes.get(at..at + length)?.to_vec()));
        at += length;
    }
    Some((first >> 4 & 3, message_id, token, Answer { code: (code >> 5, code & 31), options, payload }))
}

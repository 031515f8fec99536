//! The least MQTT client that a test needs: blocking, 3.1.1 or 5, independent of our own engine.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

pub struct MqttClient {
    pub stream: TcpStream,
    v5: bool,
    packet_id: u16,
}

/// A packet from the gateway: type and flags, then everything behind the remaining length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub first: u8,
    pub body: Vec<u8>,
}

pub const CONNACK: u8 = 0x20;
pub const PUBACK: u8 = 0x40;
pub const SUBACK: u8 = 0x90;
pub const PINGRESP: u8 = 0xD0;

impl MqttClient {
    /// Connects and logs in; the error of a refusal is `ConnectionRefused` with the code.
    pub fn connect(to: SocketAddr, device: &str, token: &str, v5: bool) -> io::Result<MqttClient> {
        let mut client = MqttClient::open(to, v5)?;
        client.send(0x10, &connect_body(device, device, token, v5))?;
        let connack = client.read_packet()?;
        match (connack.first, connack.body.get(1)) {
            (CONNACK, Some(0)) => Ok(client),
            (CONNACK, Some(code)) => {
                Err(io::Error::new(io::ErrorKind::ConnectionRefused, format!("CONNACK {code:#04x}")))
            }
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("not a CONNACK: {connack:?}"))),
        }
    }

    /// Only the TCP connection.
    pub fn open(to: SocketAddr, v5: bool) -> io::Result<MqttClient> {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.set_write_timeout(Some(Duration::from_secs(10)))?;
        stream.set_nodelay(true)?;
        Ok(MqttClient { stream, v5, packet_id: 0 })
    }

    pub fn send(&mut self, first: u8, body: &[u8]) -> io::Result<()> {
        let mut packet = vec![first];
        packet.extend(remaining_length(body.len()));
        packet.extend_from_slice(body);
        self.stream.write_all(&packet)
    }

    /// Sends one QoS 1 message and returns its packet id; the acknowledgement is the caller's to read.
    pub fn publish(&mut self, topic: &str, payload: &[u8]) -> io::Result<u16> {
        self.packet_id = self.packet_id.checked_add(1).unwrap_or(1);
        let mut body = text(topic);
        body.extend(self.packet_id.to_be_bytes());
        if self.v5 {
            body.push(0);
        }
        body.extend_from_slice(payload);
        self.send(0x32, &body)?;
        Ok(self.packet_id)
    }

    /// Sends one QoS 1 message and waits for its acknowledgement; returns the reason code, 0 in 3.1.1.
    pub fn publish_and_wait(&mut self, topic: &str, payload: &[u8]) -> io::Result<u8> {
        let id = self.publish(topic, payload)?;
        loop {
            let packet = self.read_packet()?;
            if packet.first == PUBACK && packet.body.starts_with(&id.to_be_bytes()) {
                return Ok(packet.body.get(2).copied().unwrap_or(0));
            }
        }
    }

    /// Subscribes at QoS 1; returns the granted code.
    pub fn subscribe(&mut self, filter: &str) -> io::Result<u8> {
        self.packet_id = self.packet_id.checked_add(1).unwrap_or(1);
        let mut body = self.packet_id.to_be_bytes().to_vec();
        if self.v5 {
            body.push(0);
        }
        body.extend(text(filter));
        body.push(1);
        self.send(0x82, &body)?;
        loop {
            let packet = self.read_packet()?;
            if packet.first == SUBACK {
                return packet.body.last().copied().ok_or_else(|| io::ErrorKind::InvalidData.into());
            }
        }
    }

    /// Waits for a PUBLISH, acknowledges it, and returns topic and payload.
    pub fn read_publish(&mut self) -> io::Result<(String, Vec<u8>)> {
        loop {
            let packet = self.read_packet()?;
            if packet.first & 0xF0 != 0x30 {
                continue;
            }
            let qos = packet.first >> 1 & 3;
            let length = usize::from(u16::from_be_bytes([packet.body[0], packet.body[1]]));
            let topic = String::from_utf8_lossy(&packet.body[2..2 + length]).into_owned();
            let mut rest = &packet.body[2 + length..];
            if qos > 0 {
                self.send(PUBACK, &rest[..2])?;
                rest = &rest[2..];
            }
            if self.v5 {
                // Tests here use few properties: their length fits one byte.
                rest = &rest[1 + usize::from(rest[0])..];
            }
            return Ok((topic, rest.to_vec()));
        }
    }

    pub fn read_packet(&mut self) -> io::Result<Packet> {
        let mut byte = [0];
        self.stream.read_exact(&mut byte)?;
        let first = byte[0];
        let (mut length, mut shift) = (0usize, 0);
        loop {
            self.stream.read_exact(&mut byte)?;
            length |= usize::from(byte[0] & 0x7F) << shift;
            shift += 7;
            if byte[0] & 0x80 == 0 {
                break;
            }
            if shift > 21 {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        Ok(Packet { first, body })
    }
}

pub fn text(text: &str) -> Vec<u8> {
    let mut out = u16::try_from(text.len()).unwrap().to_be_bytes().to_vec();
    out.extend_from_slice(text.as_bytes());
    out
}

pub fn connect_body(client_id: &str, username: &str, password: &str, v5: bool) -> Vec<u8> {
    let mut body = text("MQTT");
    body.extend([if v5 { 5 } else { 4 }, 0xC2, 0, 30]);
    if v5 {
        body.push(0);
    }
    for part in [client_id, username, password] {
        body.extend(text(part));
    }
    body
}

fn remaining_length(mut length: usize) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let byte = u8::try_from(length & 0x7F).unwrap();
        length >>= 7;
        out.push(if length > 0 { byte | 0x80 } else { byte });
        if length == 0 {
            return out;
        }
    }
}

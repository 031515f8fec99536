//! CoAP over TCP, through a pipe.

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;
use crate::listener::ConnectionInfo;
use crate::listener::coap::serve;

impl Fixture {
    /// A new connection over TCP, with the CSM exchanged.
    pub(super) async fn connect(&self) -> Stream {
        let (near, far) = tokio::io::duplex(1 << 16);
        let conn = ConnectionInfo {
            peer: SocketAddr::from(([192, 0, 2, 1], 4000)),
            local: SocketAddr::from(([192, 0, 2, 2], 1883)),
            listener: Arc::new(Listener::new(ListenerConfig { name: "tcp".into(), ..Default::default() }).unwrap()),
            tls: None,
        };
        let context = Context { gateway: self.gateway.clone(), relay: None };
        let serving = serve(far, Default::default(), conn, context, self.shutdown.clone());
        let mut stream = Stream { io: near, read: Vec::new(), served: tokio::spawn(serving) };
        assert_eq!(stream.next().await.code, "7.01");
        stream.send("7.01", b"", &[], b"").await;
        stream
    }
}

/// A client of CoAP over TCP that writes its frames by hand (RFC 8323 section 3.2).
pub(super) struct Stream {
    io: DuplexStream,
    read: Vec<u8>,
    served: tokio::task::JoinHandle<()>,
}

#[derive(Debug)]
pub(super) struct Frame {
    pub code: String,
    pub token: Vec<u8>,
    options: Vec<(u16, Vec<u8>)>,
    pub payload: Vec<u8>,
}

impl Frame {
    pub fn option(&self, number: u16) -> Option<&[u8]> {
        self.options.iter().find(|(n, _)| *n == number).map(|(_, value)| &value[..])
    }
}

const OBSERVE: u16 = 6;
const LOCATION_PATH: u16 = 8;
const URI_PATH: u16 = 11;
const URI_QUERY: u16 = 15;

impl Stream {
    pub async fn send(&mut self, code: &str, token: &[u8], options: &[(u16, &[u8])], payload: &[u8]) {
        let mut body = Vec::new();
        let mut last = 0;
        for (number, value) in options {
            let (delta, length) = (number - last, value.len());
            assert!(delta < 13 && length < 269);
            if length < 13 {
                body.push((delta << 4) as u8 | length as u8);
            } else {
                body.extend([(delta << 4) as u8 | 13, (length - 13) as u8]);
            }
            body.extend_from_slice(value);
            last = *number;
        }
        if !payload.is_empty() {
            body.push(0xff);
            body.extend_from_slice(payload);
        }
        let tkl = token.len() as u8;
        let mut frame = match body.len() {
            short @ 0..=12 => vec![(short as u8) << 4 | tkl],
            more @ 13..=268 => vec![13 << 4 | tkl, (more - 13) as u8],
            long @ 269..=65_804 => {
                let [a, b] = ((long - 269) as u16).to_be_bytes();
                vec![14 << 4 | tkl, a, b]
            }
            huge => {
                let mut head = vec![15 << 4 | tkl];
                head.extend(((huge - 65_805) as u32).to_be_bytes());
                head
            }
        };
        let (class, detail) = code.split_once('.').unwrap();
        frame.push(class.parse::<u8>().unwrap() << 5 | detail.parse::<u8>().unwrap());
        frame.extend_from_slice(token);
        frame.extend(body);
        self.io.write_all(&frame).await.unwrap();
    }

    async fn request(&mut self, method: &str, token: &[u8], target: &str, observe: Option<&[u8]>, payload: &[u8]) {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let mut options: Vec<(u16, &[u8])> = observe.iter().map(|value| (OBSERVE, *value)).collect();
        options.extend(path.split('/').map(|segment| (URI_PATH, segment.as_bytes())));
        options.extend(query.split('&').filter(|a| !a.is_empty()).map(|argument| (URI_QUERY, argument.as_bytes())));
        self.send(method, token, &options, payload).await;
    }

    pub async fn ask(&mut self, method: &str, target: &str, payload: &[u8]) -> Frame {
        self.request(method, b"ask", target, None, payload).await;
        loop {
            let frame = self.next().await;
            if frame.token == b"ask" {
                return frame;
            }
        }
    }

    /// Closes the connection and waits until the gateway has done so too.
    pub async fn end(self) {
        drop(self.io);
        self.served.await.unwrap();
    }

    pub async fn next(&mut self) -> Frame {
        tokio::time::timeout(Duration::from_secs(20), async {
            loop {
                if let Some((frame, bytes)) = parse(&self.read) {
                    self.read.drain(..bytes);
                    return frame;
                }
                assert!(self.io.read_buf(&mut self.read).await.unwrap() > 0, "the connection ended");
            }
        })
        .await
        .expect("no message came")
    }
}

fn parse(bytes: &[u8]) -> Option<(Frame, usize)> {
    let (&first, rest) = bytes.split_first()?;
    let (extension, length) = match first >> 4 {
        13 => (1, 13 + usize::from(*rest.first()?)),
        14 => (2, 269 + usize::from(u16::from_be_bytes(*rest.first_chunk()?))),
        15 => (4, 65_805 + u32::from_be_bytes(*rest.first_chunk()?) as usize),
        short => (0, usize::from(short)),
    };
    let tkl = usize::from(first & 15);
    let all = 2 + extension + tkl + length;
    let message = bytes.get(..all)?;
    let code = message[1 + extension];
    let token = message[2 + extension..2 + extension + tkl].to_vec();
    // coap-lite reads the rest as it stands in a datagram.
    let mut datagram = vec![0x40, 0x01, 0, 0];
    datagram.extend_from_slice(&message[2 + extension + tkl..]);
    let packet = Packet::from_bytes(&datagram).unwrap();
    let options = packet.options().flat_map(|(n, values)| values.iter().map(|v| (*n, v.clone()))).collect();
    let code = format!("{}.{:02}", code >> 5, code & 31);
    Some((Frame { code, token, options, payload: packet.payload }, all))
}

#[tokio::test]
async fn over_tcp_a_device_publishes_reads_and_observes() {
    let fixture = Fixture::new();
    let (_, t) = fixture.device("op").await;
    let mut stream = fixture.connect().await;
    let long = "long ".repeat(10_000);
    assert_eq!(stream.ask("0.03", &format!("ps/plant/long?t={t}"), long.as_bytes()).await.code, "2.04");
    assert_eq!(stream.ask("0.02", "t", b"x").await.code, "4.01");
    stream.request("0.01", b"ob", &format!("ps/plant/x?t={t}"), Some(&[]), b"").await;
    let first = stream.next().await;
    assert_eq!((first.code.as_str(), first.option(OBSERVE).is_some()), ("2.05", true));
    fixture.emit("plant/x", "new");
    let notification = stream.next().await;
    assert_eq!((&notification.token[..], &notification.payload[..]), (&b"ob"[..], &b"new"[..]));
    stream.send("7.02", b"ping", &[], b"").await;
    let pong = stream.next().await;
    assert_eq!((pong.code.as_str(), &pong.token[..]), ("7.03", &b"ping"[..]));
    drop(stream.io);
    stream.served.await.unwrap();
    assert_eq!(fixture.gateway.hub.subscriptions(), 0);
    fixture.stop().await;
}

#[tokio::test]
async fn over_tcp_a_long_value_comes_in_blocks_to_who_takes_no_more() {
    let fixture = Fixture::new();
    let (_, t) = fixture.device("op").await;
    let mut stream = fixture.connect().await;
    // Our peer has not said that it takes more than 1152 bytes.
    assert_eq!(stream.ask("0.03", &format!("ps/plant/long?t={t}"), &[7; 3000]).await.code, "2.04");
    let first = stream.ask("0.01", &format!("ps/plant/long?t={t}"), b"").await;
    assert_eq!((first.payload.len(), first.option(23)), (1024, Some(&[0x0e][..])));
    fixture.stop().await;
}

#[tokio::test]
async fn over_tcp_every_command_arrives_and_a_stop_is_announced() {
    let fixture = Fixture::new();
    let (_, t) = fixture.device("a").await;
    let mut stream = fixture.connect().await;
    stream.request("0.01", b"c", &format!("c?t={t}"), Some(&[]), b"").await;
    assert_eq!(stream.next().await.code, "2.05");
    for n in 0..40 {
        fixture.emit(&format!("dev/a/cmd/{n}/blink"), "now");
    }
    for n in 0..40 {
        let command = stream.next().await;
        let path: Vec<_> = command.options.iter().filter(|(number, _)| *number == LOCATION_PATH).collect();
        assert_eq!(path[1].1, n.to_string().as_bytes());
    }
    fixture.shutdown.cancel();
    // The gateway says goodbye, and the observation ends.
    let mut codes = vec![stream.next().await.code, stream.next().await.code];
    codes.sort();
    assert_eq!(codes, ["5.03", "7.04"]);
    stream.served.await.unwrap();
    fixture.stop().await;
}

#[tokio::test]
async fn over_tcp_what_breaks_the_rules_is_aborted() {
    let fixture = Fixture::new();
    let mut stream = fixture.connect().await;
    // A payload marker without a payload.
    stream.io.write_all(&[0x10, 0x01, 0xff]).await.unwrap();
    assert_eq!(stream.next().await.code, "7.05");
    stream.served.await.unwrap();
    let mut stream = fixture.connect().await;
    stream.send("7.04", b"", &[], b"").await;
    stream.served.await.unwrap();
    fixture.stop().await;
}

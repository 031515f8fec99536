//! The load: every client of a run in one thread, sockets without blocking, packets encoded ahead.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

use super::wire::{Frame, PublishTemplate, connect, puback, scan, subscribe};
use crate::histogram::Histogram;
use crate::{Failure, Result};

/// The payload's beginning says when, by whom and with which number it was sent.
const STAMP_BYTES: usize = 16;
/// Messages per write of a flood.
const FLOOD_BATCH: usize = 128;
/// Reads from one connection before the others have their turn.
const READS_PER_TURN: usize = 4;

/// When a publisher sends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// As much as the connection takes.
    Flood,
    /// `QoS` 1 with so many messages unacknowledged.
    Window(u32),
    /// So many messages a second.
    PerSecond(f64),
}

/// What one client says first.
pub struct Login {
    pub client_id: String,
    pub credentials: Option<(String, String)>,
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub sent: u64,
    pub acknowledged: u64,
    pub delivered: u64,
}

pub struct Engine {
    payload_bytes: usize,
    poll: Poll,
    events: Events,
    clients: Vec<Client>,
    /// By publisher: which messages were acknowledged, and which arrived.
    ledgers: Vec<Ledger>,
    pace: Pace,
    started: Instant,
    counts: Counts,
    pub latency: Histogram,
}

struct Client {
    stream: TcpStream,
    input: Vec<u8>,
    output: Vec<u8>,
    written: usize,
    readable: bool,
    writable: bool,
    publisher: Option<Publisher>,
}

struct Publisher {
    index: usize,
    template: PublishTemplate,
    next: u32,
    outstanding: u32,
    due_nanos: u64,
}

/// What became of one publisher's messages.
#[derive(Default)]
pub struct Ledger {
    pub acknowledged: Bits,
    pub arrived: Bits,
}

/// A set of message numbers.
#[derive(Default)]
pub struct Bits(Vec<u64>);

impl Bits {
    /// False if it was set already.
    pub fn set(&mut self, at: u32) -> bool {
        let word = at as usize / 64;
        if word >= self.0.len() {
            self.0.resize(word + 1024, 0);
        }
        let (bit, before) = (1 << (at % 64), self.0[word]);
        self.0[word] |= bit;
        before & bit == 0
    }

    /// How many are set here and not there.
    pub fn without(&self, other: &Bits) -> u64 {
        let others = other.0.iter().copied().chain(std::iter::repeat(0));
        self.0.iter().zip(others).map(|(mine, other)| u64::from((mine & !other).count_ones())).sum()
    }
}

impl Engine {
    pub fn new(pace: Pace, payload_bytes: usize) -> Result<Self> {
        Ok(Engine {
            payload_bytes: payload_bytes.max(STAMP_BYTES),
            poll: Poll::new()?,
            events: Events::with_capacity(1024),
            clients: Vec::new(),
            ledgers: Vec::new(),
            pace,
            started: Instant::now(),
            counts: Counts::default(),
            latency: Histogram::new(),
        })
    }

    pub fn add_subscriber(&mut self, server: SocketAddr, login: &Login, filter: &str, qos: u8) -> Result<()> {
        let mut stream = open(server, login)?;
        stream.write_all(&subscribe(filter, qos))?;
        match answer(&mut stream)? {
            Frame::Suback { code: 0..=2 } => self.add(stream, None),
            other => Err(Failure::new(format!("subscription to {filter} answered by {other:?}"))),
        }
    }

    pub fn add_publisher(&mut self, server: SocketAddr, login: &Login, topic: &str, qos: u8) -> Result<()> {
        let stream = open(server, login)?;
        let index = self.ledgers.len();
        self.ledgers.push(Ledger::default());
        let template = PublishTemplate::new(topic, qos, self.payload_bytes);
        self.add(stream, Some(Publisher { index, template, next: 0, outstanding: 0, due_nanos: 0 }))
    }

    fn add(&mut self, stream: std::net::TcpStream, publisher: Option<Publisher>) -> Result<()> {
        stream.set_nonblocking(true)?;
        let mut stream = TcpStream::from_std(stream);
        let token = Token(self.clients.len());
        self.poll.registry().register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
        self.clients.push(Client {
            stream,
            input: Vec::with_capacity(64 << 10),
            output: Vec::with_capacity(64 << 10),
            written: 0,
            readable: true,
            writable: true,
            publisher,
        });
        Ok(())
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Acknowledged to the publisher and not seen by the subscriber. For loads in which every message has one subscriber.
    pub fn lost(&self) -> u64 {
        self.ledgers.iter().map(|ledger| ledger.acknowledged.without(&ledger.arrived)).sum()
    }

    /// Spreads the first messages of paced publishers over one interval, so that they do not come in bursts.
    pub fn begin(&mut self) {
        let Pace::PerSecond(rate) = self.pace else { return };
        let interval = (1e9 / rate) as u64;
        let (now, publishers) = (self.now(), self.ledgers.len().max(1) as u64);
        for publisher in self.clients.iter_mut().filter_map(|client| client.publisher.as_mut()) {
            publisher.due_nanos = now + interval * publisher.index as u64 / publishers;
        }
    }

    /// Sends and receives for `duration`.
    ///
    /// # Errors
    /// A connection ended.
    pub fn run(&mut self, duration: Duration) -> Result<()> {
        let end = self.now() + duration.as_nanos() as u64;
        while self.now() < end {
            self.turn(true)?;
        }
        Ok(())
    }

    /// Receives what is still on its way, until nothing has come for a while.
    pub fn settle(&mut self, quiet: Duration, at_most: Duration) -> Result<()> {
        let end = Instant::now() + at_most;
        let mut last = (self.counts.delivered + self.counts.acknowledged, Instant::now());
        while Instant::now() < end && last.1.elapsed() < quiet {
            self.turn(false)?;
            let now = self.counts.delivered + self.counts.acknowledged;
            if now != last.0 {
                last = (now, Instant::now());
            }
        }
        Ok(())
    }

    /// Reads what a server that is no more has sent.
    pub fn drain(&mut self) {
        for client in &mut self.clients {
            client.readable = true;
            while client.readable && client.receive(0, &mut self.counts, &mut self.ledgers, &mut self.latency).is_ok() {
            }
        }
    }

    pub fn ledgers(&self) -> &[Ledger] {
        &self.ledgers
    }

    fn now(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    fn turn(&mut self, publishing: bool) -> Result<()> {
        let busy = self.clients.iter().any(|client| {
            client.readable || client.writable && publishing && self.pace == Pace::Flood && client.publisher.is_some()
        });
        // Waiting has a grain of a millisecond, too coarse for a pace: that one spins, on a core of its own.
        let spin = busy || publishing && matches!(self.pace, Pace::PerSecond(_));
        self.poll.poll(&mut self.events, Some(if spin { Duration::ZERO } else { Duration::from_millis(5) }))?;
        for event in &self.events {
            let client = &mut self.clients[event.token().0];
            client.readable |= event.is_readable() || event.is_read_closed();
            client.writable |= event.is_writable();
        }
        let pace = self.pace;
        let now = self.started.elapsed().as_nanos() as u64;
        let (counts, ledgers, latency) = (&mut self.counts, &mut self.ledgers, &mut self.latency);
        for client in &mut self.clients {
            if client.readable {
                client.receive(now, counts, ledgers, latency)?;
            }
            if publishing && client.publisher.is_some() && client.output.is_empty() && client.writable {
                client.fill(pace, now, counts);
            }
            if client.writable && !client.output.is_empty() {
                client.flush()?;
            }
        }
        Ok(())
    }
}

impl Client {
    fn receive(
        &mut self,
        now: u64,
        counts: &mut Counts,
        ledgers: &mut [Ledger],
        latency: &mut Histogram,
    ) -> Result<()> {
        for _ in 0..READS_PER_TURN {
            let filled = self.input.len();
            let room = (64 << 10) - filled;
            self.input.resize(filled + room, 0);
            let read = self.stream.read(&mut self.input[filled..]);
            let count = match read {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.input.truncate(filled);
                    self.readable = false;
                    return Ok(());
                }
                Err(error) => return Err(Failure::new(format!("a connection broke: {error}"))),
            };
            if count == 0 {
                return Err(Failure::new("the server closed a connection"));
            }
            self.input.truncate(filled + count);
            let (output, publisher) = (&mut self.output, &mut self.publisher);
            let taken = scan(&self.input, |frame| match frame {
                Frame::Publish { id, payload } => {
                    counts.delivered += 1;
                    if let Some((sent, sender, number)) = stamp(payload) {
                        latency.add(now.saturating_sub(sent));
                        if id.is_some()
                            && let Some(ledger) = ledgers.get_mut(sender)
                        {
                            ledger.arrived.set(number);
                        }
                    }
                    if let Some(id) = id {
                        output.extend_from_slice(&puback(id));
                    }
                }
                Frame::Puback { id } => {
                    counts.acknowledged += 1;
                    if let Some(publisher) = publisher {
                        publisher.outstanding = publisher.outstanding.saturating_sub(1);
                        ledgers[publisher.index].acknowledged.set(publisher.number_of(id));
                    }
                }
                Frame::Connack { .. } | Frame::Suback { .. } | Frame::Other => {}
            });
            self.input.copy_within(taken.., 0);
            self.input.truncate(filled + count - taken);
            if count < room {
                // Epoll reports again when more has come.
                self.readable = false;
                return Ok(());
            }
        }
        Ok(())
    }

    fn fill(&mut self, pace: Pace, now: u64, counts: &mut Counts) {
        let Some(publisher) = &mut self.publisher else { return };
        let before = publisher.next;
        match pace {
            Pace::Flood => (0..FLOOD_BATCH).for_each(|_| publisher.append(&mut self.output, now)),
            Pace::Window(window) => {
                while publisher.outstanding < window {
                    publisher.outstanding += 1;
                    publisher.append(&mut self.output, now);
                }
            }
            Pace::PerSecond(rate) => {
                while publisher.due_nanos <= now {
                    // From when it was due, so that a stall of the load does not hide one of the server.
                    publisher.append(&mut self.output, publisher.due_nanos);
                    publisher.due_nanos += (1e9 / rate) as u64;
                }
            }
        }
        counts.sent += u64::from(publisher.next - before);
    }

    fn flush(&mut self) -> Result<()> {
        while self.written < self.output.len() {
            match self.stream.write(&self.output[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.writable = false;
                    return Ok(());
                }
                Err(error) => return Err(Failure::new(format!("a connection broke: {error}"))),
            }
        }
        self.output.clear();
        self.written = 0;
        Ok(())
    }
}

impl Publisher {
    fn append(&mut self, output: &mut Vec<u8>, sent: u64) {
        let mut head = [0; STAMP_BYTES];
        head[..8].copy_from_slice(&sent.to_le_bytes());
        head[8..12].copy_from_slice(&(self.index as u32).to_le_bytes());
        head[12..].copy_from_slice(&self.next.to_le_bytes());
        self.template.append(output, packet_id(self.next), &head);
        self.next += 1;
    }

    /// The newest message with that packet id; windows are far smaller than the ids' range.
    fn number_of(&self, id: u16) -> u32 {
        let newest = self.next.saturating_sub(1);
        let back = (u32::from(packet_id(newest)) + IDS - u32::from(id)) % IDS;
        newest.saturating_sub(back)
    }
}

const IDS: u32 = 65_535;

fn packet_id(number: u32) -> u16 {
    (number % IDS + 1) as u16
}

/// When, by whom and with which number a payload was sent.
pub fn stamp(payload: &[u8]) -> Option<(u64, usize, u32)> {
    let (sent, rest) = payload.split_first_chunk::<8>()?;
    let (sender, rest) = rest.split_first_chunk::<4>()?;
    let (number, _) = rest.split_first_chunk::<4>()?;
    Some((u64::from_le_bytes(*sent), u32::from_le_bytes(*sender) as usize, u32::from_le_bytes(*number)))
}

/// Connects and logs in.
pub fn open(server: SocketAddr, login: &Login) -> Result<std::net::TcpStream> {
    let mut stream = std::net::TcpStream::connect(server)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let credentials = login.credentials.as_ref().map(|(user, password)| (user.as_str(), password.as_str()));
    stream.write_all(&connect(&login.client_id, credentials))?;
    match answer(&mut stream)? {
        Frame::Connack { code: 0 } => Ok(stream),
        other => Err(Failure::new(format!("{}: CONNECT answered by {other:?}", login.client_id))),
    }
}

/// The one small packet that answers a CONNECT or SUBSCRIBE.
pub fn answer(stream: &mut std::net::TcpStream) -> Result<Frame<'static>> {
    let mut head = [0; 2];
    stream.read_exact(&mut head).map_err(|error| Failure::new(format!("no answer from the server: {error}")))?;
    let mut packet = head.to_vec();
    packet.resize(2 + usize::from(head[1] & 0x7F), 0);
    stream.read_exact(&mut packet[2..])?;
    let mut found = Frame::Other;
    scan(&packet, |frame| {
        found = match frame {
            Frame::Connack { code } => Frame::Connack { code },
            Frame::Suback { code } => Frame::Suback { code },
            Frame::Puback { .. } | Frame::Publish { .. } | Frame::Other => Frame::Other,
        };
    });
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledgement_names_the_newest_message_with_its_id() {
        let publisher = |next| Publisher {
            index: 0,
            template: PublishTemplate::new("t", 1, 64),
            next,
            outstanding: 0,
            due_nanos: 0,
        };
        for next in [1_u32, 64, 65_535, 65_536, 200_000] {
            for number in next.saturating_sub(64)..next {
                assert_eq!(publisher(next).number_of(packet_id(number)), number);
            }
        }
    }

    #[test]
    fn lost_is_what_was_acknowledged_and_did_not_arrive() {
        let mut ledger = Ledger::default();
        [1, 2, 70, 100_000].into_iter().for_each(|number| assert!(ledger.acknowledged.set(number)));
        [2, 5, 70].into_iter().for_each(|number| assert!(ledger.arrived.set(number)));
        assert_eq!(ledger.acknowledged.without(&ledger.arrived), 2);
    }
}

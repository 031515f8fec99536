//! The bridge to an MQTT broker, and the only door to rumqttc.
//!
//! The spool is the truth, rumqttc a way to the broker: each forward rule has a connection of its own with a clean session; a message is
//! done when the PUBACK of its packet id has come, and is acknowledged to the spool in order; when anything goes wrong, client and event loop
//! are thrown away, the reader is rewound to the first unacknowledged message, and a new connection starts from there. rumqttc's own
//! retransmission is never relied on (it lost 76 of 50,000 `QoS` 1 messages over a broker's kill -9).
//!
//! Downlink has a connection of its own, with a session that the broker keeps: a message is acknowledged to the broker after the gateway has it.
//!
//! TLS goes through a relay of ours on a Unix socket in a private folder, so that rumqttc needs no TLS stack and rustls keeps one door.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use backon::BackoffBuilder;
use bytes::Bytes;
use metrics::Counter;
use portable_atomic::{AtomicU32, Ordering};
use rumqttc::v5::mqttbytes::QoS as Qos5;
use rumqttc::v5::mqttbytes::v5::{ConnectProperties, Packet as Packet5, PubAckReason, PublishProperties};
use rumqttc::{Outgoing, Packet, QoS, Transport, v5};
use tokio::net::{TcpStream, UnixListener};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::pace::Pace;
use super::{Config, ForwardConfig, MqttVersion};
use crate::message::Message;
use crate::spool::{Cursor, Reader, Reason, Stored};
use crate::telemetry;
use crate::tls;

/// Where a broker is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub host: String,
    pub port: u16,
    pub tls: bool,
}

impl Endpoint {
    /// Reads `mqtt://HOST[:1883]` or `mqtts://HOST[:8883]`.
    pub fn parse(url: &str) -> Option<Self> {
        let uri: http::Uri = url.parse().ok()?;
        let tls = match uri.scheme_str()? {
            "mqtt" => false,
            "mqtts" => true,
            _ => return None,
        };
        let port = uri.port_u16().unwrap_or(if tls { 8883 } else { 1883 });
        let host = uri.host()?.trim_start_matches('[').trim_end_matches(']').to_owned();
        (uri.path().is_empty() || uri.path() == "/").then_some(Endpoint { host, port, tls })
    }
}

/// What comes down from a broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    pub topic: String,
    pub payload: Bytes,
    pub retain: bool,
}

/// Who takes what comes down.
pub trait Downlink: Send + Sync {
    /// Takes one message; called from the control runtime and must not block.
    fn received(&self, upstream: &str, message: Received);
}

/// The connections to one broker.
#[derive(Debug, Default)]
pub struct Links {
    wanted: AtomicU32,
    up: AtomicU32,
}

impl Links {
    /// Connections that stand, of those that are wanted.
    pub fn count(&self) -> (u32, u32) {
        (self.up.load(Ordering::Relaxed), self.wanted.load(Ordering::Relaxed))
    }
}

/// One broker as several connections use it.
#[derive(Clone)]
pub struct Broker {
    pub config: Arc<Config>,
    pub links: Arc<Links>,
    pub endpoints: Arc<[Endpoint]>,
    /// For `mqtts`.
    pub tls: Option<tls::Client>,
    pub gateway_name: Arc<str>,
    /// Where the relay's socket may be made: readable by this user alone.
    pub private_dir: PathBuf,
}

impl Broker {
    fn client_id(&self, suffix: &str) -> String {
        let base = if self.config.client_id.is_empty() { &*self.gateway_name } else { &self.config.client_id };
        if suffix.is_empty() { base.to_owned() } else { format!("{base}-{suffix}") }
    }

    /// Forwards what `reader` brings until `shutdown`.
    pub async fn forward(self, rule: ForwardConfig, reader: Reader, shutdown: CancellationToken) {
        let window = usize::from(self.config.in_flight_max);
        let outcome = |outcome: &'static str| metrics::counter!(telemetry::UPSTREAM_REQUESTS_TOTAL, "upstream" => self.config.name.clone(), "outcome" => outcome);
        let mut uplink = Uplink {
            pace: Pace::new(&rule.queue.replay_rate_max, reader.appended(), Instant::now().into_std()),
            rule: &rule,
            gateway: &self.gateway_name,
            reader,
            window: VecDeque::new(),
            size: window,
            packet_bytes_max: usize::MAX,
            taken: outcome("ok"),
            refused: outcome("refused"),
        };
        let session = Session { broker: &self, client_id: self.client_id(&rule.name), clean: true };
        session.keep_up(&mut uplink, &shutdown).await;
    }

    /// Subscribes to the configured filters and hands what arrives to `downlink` until `shutdown`.
    pub async fn listen(self, downlink: Arc<dyn Downlink>, shutdown: CancellationToken) {
        let mut listening = Listening { broker: &self, downlink };
        let session = Session { broker: &self, client_id: self.client_id(""), clean: false };
        session.keep_up(&mut listening, &shutdown).await;
    }
}

/// A connection that is made again and again.
struct Session<'a> {
    broker: &'a Broker,
    client_id: String,
    clean: bool,
}

/// What is done over one connection, until it breaks.
trait Work {
    /// Runs until the connection breaks; the text says how. Tells `standing` once it stands.
    async fn run(&mut self, link: &mut Link, standing: &mut Standing<'_>) -> String;
}

/// Whether a connection stands; counted until it is dropped.
struct Standing<'a> {
    links: &'a Links,
    stands: bool,
}

impl Standing<'_> {
    fn set(&mut self) {
        if !std::mem::replace(&mut self.stands, true) {
            self.links.up.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        if self.stands {
            self.links.up.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Session<'_> {
    async fn keep_up(&self, work: &mut impl Work, shutdown: &CancellationToken) {
        let upstream = self.broker.config.name.clone();
        let links = &self.broker.links;
        links.wanted.fetch_add(1, Ordering::Relaxed);
        let mut pauses = pauses();
        for endpoint in self.broker.endpoints.iter().cycle() {
            let mut standing = Standing { links, stands: false };
            let broken = tokio::select! {
                broken = self.once(endpoint, work, &mut standing) => broken,
                () = shutdown.cancelled() => return,
            };
            if standing.stands {
                pauses = self::pauses();
            }
            drop(standing);
            metrics::counter!(telemetry::UPSTREAM_REQUESTS_TOTAL, "upstream" => upstream.clone(), "outcome" => "error")
                .increment(1);
            let pause = pauses.next().unwrap_or(PAUSE_MAX);
            tracing::warn!(
                upstream,
                endpoint = endpoint.host,
                error = broken,
                pause_ms = pause.as_millis() as u64,
                "mqtt upstream lost, what was not acknowledged is sent again"
            );
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    async fn once(&self, endpoint: &Endpoint, work: &mut impl Work, standing: &mut Standing<'_>) -> String {
        let relay = match &self.broker.tls {
            Some(tls) if endpoint.tls => match Relay::start(&self.broker.private_dir, &self.client_id, endpoint, tls) {
                Ok(relay) => Some(relay),
                Err(error) => return format!("cannot make the TLS relay: {error}"),
            },
            _ => None,
        };
        let mut link = Link::open(self, endpoint, relay.as_ref().map(|relay| relay.path.as_path()));
        work.run(&mut link, standing).await
    }
}

/// A message sent or about to be sent.
struct InFlight {
    stored: Stored,
    state: Sending,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Sending {
    /// Handed to rumqttc, which has not given it a packet id.
    Queued,
    Sent(u16),
    Done,
}

struct Uplink<'a> {
    rule: &'a ForwardConfig,
    gateway: &'a str,
    reader: Reader,
    window: VecDeque<InFlight>,
    size: usize,
    /// How fast a backlog goes out.
    pace: Pace,
    /// What the broker takes at most (MQTT 5, Maximum Packet Size).
    packet_bytes_max: usize,
    taken: Counter,
    refused: Counter,
}

impl Work for Uplink<'_> {
    async fn run(&mut self, link: &mut Link, standing: &mut Standing<'_>) -> String {
        self.window.clear();
        self.reader.rewind();
        let mut held_until: Option<Instant> = None;
        loop {
            let room = if standing.stands && held_until.is_none() { self.size - self.window.len() } else { 0 };
            tokio::select! {
                event = link.poll() => match event {
                    Ok(Event::Connected(packet_bytes_max)) => {
                        standing.set();
                        self.packet_bytes_max = packet_bytes_max;
                    }
                    Ok(Event::Sent(id)) => self.sent(id),
                    Ok(Event::Acknowledged(id, verdict)) => {
                        if let Err(broken) = self.acknowledged(id, verdict) {
                            return broken;
                        }
                    }
                    Ok(Event::Received(..) | Event::Other) => {}
                    Err(broken) => return broken,
                },
                batch = self.reader.next_batch(room, BATCH_BYTES_MAX, Duration::ZERO), if room > 0 => {
                    let Some(batch) = batch else { return "the spool is closed".into() };
                    held_until = self.hold(batch.records.len(), batch.replayed);
                    for stored in batch.records {
                        if let Err(broken) = self.publish(link, stored) {
                            return broken;
                        }
                    }
                    // What was not sent may have been all there was.
                    self.acknowledge_done();
                }
                () = async { tokio::time::sleep_until(held_until.unwrap_or_else(Instant::now)).await }, if held_until.is_some() => held_until = None,
            }
        }
    }
}

impl Uplink<'_> {
    /// Until when no more is read, if a backlog is being replayed.
    fn hold(&mut self, records: usize, replayed: bool) -> Option<Instant> {
        let (appended, now) = (self.reader.appended(), Instant::now());
        if !replayed {
            self.pace.live(appended, now.into_std());
            return None;
        }
        let pause = self.pace.take(records, appended, now.into_std());
        (!pause.is_zero()).then(|| now + pause)
    }

    fn publish(&mut self, link: &Link, stored: Stored) -> Result<(), String> {
        let topic = topic_of(&self.rule.topic, &stored.message, self.gateway);
        if stored.message.cost_bytes() + topic.len() + PACKET_OVERHEAD_BYTES > self.packet_bytes_max {
            // The broker would close the connection over it, again and again.
            self.give_up(&stored, Reason::TooLarge, "larger than the broker takes");
            self.window.push_back(InFlight { stored, state: Sending::Done });
            return Ok(());
        }
        link.publish(topic, &stored.message, self.gateway)?;
        self.window.push_back(InFlight { stored, state: Sending::Queued });
        Ok(())
    }

    fn give_up(&mut self, stored: &Stored, reason: Reason, why: &str) {
        let (rule, topic) = (&self.rule.name, &stored.message.topic);
        tracing::error!(rule, %topic, why, "broker refuses a message for good, it is in the loss ledger");
        self.reader.lose(std::slice::from_ref(stored), reason);
        self.refused.increment(1);
    }

    /// rumqttc takes requests in order, so the id belongs to the first that has none.
    fn sent(&mut self, id: u16) {
        if let Some(next) = self.window.iter_mut().find(|entry| entry.state == Sending::Queued) {
            next.state = Sending::Sent(id);
        }
    }

    fn acknowledged(&mut self, id: u16, verdict: Verdict) -> Result<(), String> {
        let Some(entry) = self.window.iter_mut().find(|entry| entry.state == Sending::Sent(id)) else { return Ok(()) };
        match verdict {
            Verdict::Taken => {
                entry.state = Sending::Done;
                self.taken.increment(1);
            }
            Verdict::NotNow(reason) => return Err(format!("the broker does not take messages now: {reason}")),
            Verdict::Never(reason) => {
                entry.state = Sending::Done;
                let stored = entry.stored.clone();
                self.give_up(&stored, Reason::Rejected, &reason);
            }
        }
        self.acknowledge_done();
        Ok(())
    }

    /// Tells the spool how far everything is done, in order.
    fn acknowledge_done(&mut self) {
        let mut done: Option<Cursor> = None;
        while self.window.front().is_some_and(|entry| entry.state == Sending::Done) {
            done = self.window.pop_front().map(|entry| entry.stored.cursor).or(done);
        }
        if let Some(cursor) = done {
            self.reader.done(cursor);
        }
    }
}

struct Listening<'a> {
    broker: &'a Broker,
    downlink: Arc<dyn Downlink>,
}

impl Work for Listening<'_> {
    async fn run(&mut self, link: &mut Link, standing: &mut Standing<'_>) -> String {
        loop {
            match link.poll().await {
                Ok(Event::Connected(_)) => {
                    standing.set();
                    if let Err(broken) = link.subscribe(&self.broker.config.subscribe) {
                        return broken;
                    }
                }
                Ok(Event::Received(message, ack)) => {
                    self.downlink.received(&self.broker.config.name, message);
                    if let Err(broken) = link.ack(&ack) {
                        return broken;
                    }
                }
                Ok(Event::Sent(_) | Event::Acknowledged(..) | Event::Other) => {}
                Err(broken) => return broken,
            }
        }
    }
}

/// One connection by either version of the protocol.
enum Link {
    V311(rumqttc::AsyncClient, Box<rumqttc::EventLoop>),
    V5(v5::AsyncClient, Box<v5::EventLoop>),
}

enum Event {
    /// With the largest packet that the broker takes.
    Connected(usize),
    Sent(u16),
    Acknowledged(u16, Verdict),
    Received(Received, Box<AckOf>),
    Other,
}

/// The packet to acknowledge once its message is taken.
enum AckOf {
    V311(rumqttc::Publish),
    V5(v5::mqttbytes::v5::Publish),
}

enum Verdict {
    Taken,
    NotNow(String),
    Never(String),
}

impl Link {
    fn open(session: &Session<'_>, endpoint: &Endpoint, relay: Option<&Path>) -> Link {
        let config = &session.broker.config;
        let host = relay.map_or_else(|| endpoint.host.clone(), |path| path.display().to_string());
        let transport = if relay.is_some() { Transport::unix() } else { Transport::tcp() };
        let keep_alive = Duration::from_secs(30);
        let queue = usize::from(config.in_flight_max) * 2 + 16;
        match config.mqtt_version {
            MqttVersion::V311 => {
                let mut options = rumqttc::MqttOptions::new(&session.client_id, host, endpoint.port);
                options.set_transport(transport).set_keep_alive(keep_alive).set_clean_session(session.clean);
                options.set_inflight(config.in_flight_max).set_manual_acks(true);
                options.set_max_packet_size(PACKET_BYTES_MAX, PACKET_BYTES_MAX);
                if !config.username.is_empty() {
                    options.set_credentials(&config.username, &config.password);
                }
                let (client, mut events) = rumqttc::AsyncClient::new(options, queue);
                let mut network = rumqttc::NetworkOptions::new();
                network.set_connection_timeout(connect_secs(config)).set_tcp_nodelay(true);
                events.set_network_options(network);
                Link::V311(client, Box::new(events))
            }
            MqttVersion::V5 => {
                let mut options = v5::MqttOptions::new(&session.client_id, host, endpoint.port);
                options.set_transport(transport).set_keep_alive(keep_alive).set_clean_start(session.clean);
                options.set_outgoing_inflight_upper_limit(config.in_flight_max).set_manual_acks(true);
                options.set_connection_timeout(connect_secs(config));
                let mut properties = ConnectProperties::new();
                properties.max_packet_size = u32::try_from(PACKET_BYTES_MAX).ok();
                properties.session_expiry_interval = (!session.clean).then_some(u32::MAX);
                options.set_connect_properties(properties);
                if !config.username.is_empty() {
                    options.set_credentials(&config.username, &config.password);
                }
                let (client, events) = v5::AsyncClient::new(options, queue);
                Link::V5(client, Box::new(events))
            }
        }
    }

    /// The next event. Cancel safe: rumqttc keeps what it has read, and its queue of requests is ours.
    async fn poll(&mut self) -> Result<Event, String> {
        match self {
            Link::V311(_, events) => Ok(match events.poll().await.map_err(|error| error.to_string())? {
                rumqttc::Event::Incoming(Packet::ConnAck(_)) => Event::Connected(PACKET_BYTES_MAX),
                rumqttc::Event::Incoming(Packet::PubAck(ack)) => Event::Acknowledged(ack.pkid, Verdict::Taken),
                rumqttc::Event::Incoming(Packet::Publish(publish)) => Event::Received(
                    Received { topic: publish.topic.clone(), payload: publish.payload.clone(), retain: publish.retain },
                    Box::new(AckOf::V311(publish)),
                ),
                rumqttc::Event::Outgoing(Outgoing::Publish(id)) => Event::Sent(id),
                rumqttc::Event::Incoming(_) | rumqttc::Event::Outgoing(_) => Event::Other,
            }),
            Link::V5(_, events) => Ok(match events.poll().await.map_err(|error| error.to_string())? {
                v5::Event::Incoming(Packet5::ConnAck(ack)) => {
                    let told = ack.properties.and_then(|properties| properties.max_packet_size);
                    let told = told.and_then(|bytes| usize::try_from(bytes).ok());
                    Event::Connected(told.unwrap_or(PACKET_BYTES_MAX).min(PACKET_BYTES_MAX))
                }
                v5::Event::Incoming(Packet5::PubAck(ack)) => Event::Acknowledged(ack.pkid, verdict(ack.reason)),
                v5::Event::Incoming(Packet5::Publish(publish)) => Event::Received(
                    Received {
                        topic: String::from_utf8_lossy(&publish.topic).into_owned(),
                        payload: publish.payload.clone(),
                        retain: publish.retain,
                    },
                    Box::new(AckOf::V5(publish)),
                ),
                v5::Event::Outgoing(Outgoing::Publish(id)) => Event::Sent(id),
                v5::Event::Incoming(_) | v5::Event::Outgoing(_) => Event::Other,
            }),
        }
    }

    fn publish(&self, topic: String, message: &Message, gateway: &str) -> Result<(), String> {
        let sent = match self {
            Link::V311(client, _) => client
                .try_publish(topic, QoS::AtLeastOnce, message.retain, message.payload.clone())
                .map_err(|error| error.to_string()),
            Link::V5(client, _) => client
                .try_publish_with_properties(
                    topic,
                    Qos5::AtLeastOnce,
                    message.retain,
                    message.payload.clone(),
                    properties(message, gateway),
                )
                .map_err(|error| error.to_string()),
        };
        sent.map_err(|error| format!("rumqttc does not take a message: {error}"))
    }

    fn subscribe(&self, filters: &[String]) -> Result<(), String> {
        filters.iter().try_for_each(|filter| match self {
            Link::V311(client, _) => client.try_subscribe(filter, QoS::AtLeastOnce).map_err(|error| error.to_string()),
            Link::V5(client, _) => client.try_subscribe(filter, Qos5::AtLeastOnce).map_err(|error| error.to_string()),
        })
    }

    fn ack(&self, ack: &AckOf) -> Result<(), String> {
        match (self, ack) {
            (Link::V311(client, _), AckOf::V311(publish)) => client.try_ack(publish).map_err(|error| error.to_string()),
            (Link::V5(client, _), AckOf::V5(publish)) => client.try_ack(publish).map_err(|error| error.to_string()),
            (Link::V311(..), AckOf::V5(_)) | (Link::V5(..), AckOf::V311(_)) => Ok(()),
        }
    }
}

/// What a broker's reason means for the message. What may pass is tried again; what is about the message itself is final.
fn verdict(reason: PubAckReason) -> Verdict {
    match reason {
        PubAckReason::Success | PubAckReason::NoMatchingSubscribers => Verdict::Taken,
        PubAckReason::TopicNameInvalid | PubAckReason::PayloadFormatInvalid => Verdict::Never(format!("{reason:?}")),
        PubAckReason::UnspecifiedError
        | PubAckReason::ImplementationSpecificError
        | PubAckReason::NotAuthorized
        | PubAckReason::PacketIdentifierInUse
        | PubAckReason::QuotaExceeded => Verdict::NotNow(format!("{reason:?}")),
    }
}

/// CloudEvents 1.0 in binary mode (MQTT protocol binding, section 3.1) beside what the message brought itself.
fn properties(message: &Message, gateway: &str) -> PublishProperties {
    let own = message.properties.as_deref();
    let mut user = super::event::attributes(message, gateway);
    if let Some(own) = own {
        user.extend(own.user.iter().map(|(key, value)| (key.to_string(), value.to_string())));
        user.extend(own.traceparent.iter().map(|trace| ("traceparent".to_owned(), trace.to_string())));
    }
    PublishProperties {
        payload_format_indicator: own.filter(|p| p.payload_is_utf8).map(|_| 1),
        response_topic: own.and_then(|p| p.response_topic.as_deref()).map(str::to_owned),
        correlation_data: own.and_then(|p| p.correlation.clone()),
        content_type: message.content_type().map(str::to_owned),
        user_properties: user,
        ..PublishProperties::default()
    }
}

fn topic_of(template: &str, message: &Message, gateway: &str) -> String {
    let device = message.origin.device.as_ref().map_or("", |device| device.as_str());
    template.replace("{device}", device).replace("{gateway}", gateway).replace("{topic}", message.topic.as_str())
}

fn connect_secs(config: &Config) -> u64 {
    u64::from(config.connect_timeout_ms.div_ceil(1000))
}

/// Passes bytes between rumqttc on a Unix socket and the broker behind TLS; ends with its connection.
struct Relay {
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Relay {
    fn start(dir: &Path, client_id: &str, endpoint: &Endpoint, tls: &tls::Client) -> std::io::Result<Self> {
        let name: String = client_id.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        // Unix socket paths end at 107 bytes.
        let path = dir.join(format!("relay-{:.40}.sock", name));
        std::fs::remove_file(&path).ok();
        let listener = UnixListener::bind(&path)?;
        let (endpoint, tls) = (endpoint.clone(), tls.clone());
        let task = tokio::spawn(async move {
            let relayed = async {
                let (mut near, _) = listener.accept().await?;
                let stream = TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await?;
                stream.set_nodelay(true)?;
                let (mut far, _) = tls.connect(&endpoint.host, stream).await?;
                tokio::io::copy_bidirectional(&mut near, &mut far).await.map(|_| ())
            };
            if let Err(error) = relayed.await {
                tracing::warn!(broker = endpoint.host, %error, "tls relay to the mqtt upstream ended");
            }
        });
        Ok(Relay { path, task })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
        std::fs::remove_file(&self.path).ok();
    }
}

/// Half a second, doubling up to a minute, each drawn up to twice as long so that a fleet does not come back at once.
fn pauses() -> backon::ExponentialBackoff {
    let builder = backon::ExponentialBuilder::default().with_min_delay(Duration::from_millis(500));
    builder.with_max_delay(PAUSE_MAX).without_max_times().with_jitter().build()
}

const PAUSE_MAX: Duration = Duration::from_secs(60);
const BATCH_BYTES_MAX: usize = 1 << 20;
/// Both ways; above every `packet_bytes_max` that a device may have.
const PACKET_BYTES_MAX: usize = 16 << 20;
/// What the event's attributes and the packet's own header take, roughly, beside what a message costs.
const PACKET_OVERHEAD_BYTES: usize = 384;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broker_addresses_are_read_with_their_default_ports() {
        let endpoint = |host: &str, port, tls| Some(Endpoint { host: host.into(), port, tls });
        assert_eq!(Endpoint::parse("mqtt://broker.example"), endpoint("broker.example", 1883, false));
        assert_eq!(Endpoint::parse("mqtts://broker.example/"), endpoint("broker.example", 8883, true));
        assert_eq!(Endpoint::parse("mqtt://[::1]:99"), endpoint("::1", 99, false));
        for bad in ["http://x", "mqtt://", "broker", "mqtt://x/path", ""] {
            assert_eq!(Endpoint::parse(bad), None, "{bad}");
        }
    }
}

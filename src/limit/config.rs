//! The `[limits]` table.

use serde::{Deserialize, Serialize};

use crate::units::{Age, ByteSize, Rate};

/// Every limit of the gateway. The defaults suit a Raspberry Pi with 1 GB.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    // Connections and time.
    /// TCP connections open at once over all listeners. One more is closed at accept, and counted.
    #[schemars(range(min = 1, max = 1000000))]
    pub connections_max: u32,
    /// TCP connections open at once from one address (IPv6: one /64). One more is closed at accept, and counted.
    #[schemars(range(min = 1, max = 1000000))]
    pub connections_per_address_max: u32,
    /// Bytes read to tell the protocol apart. A peer still unknown after them is closed.
    #[schemars(range(min = 64, max = 65536))]
    pub sniff_bytes_max: u32,
    /// Time to show the protocol, from accept, and again inside TLS. A silent peer is closed then.
    #[schemars(range(min = 10, max = 600000))]
    pub sniff_timeout_ms: u32,
    /// Time for a TLS or DTLS handshake. The connection is closed then.
    #[schemars(range(min = 100, max = 600000))]
    pub handshake_timeout_ms: u32,
    /// Time from the recognised protocol to a finished authentication (MQTT: CONNECT to CONNACK; a challenge lives 60
    /// s whatever this says). The connection is closed then.
    #[schemars(range(min = 100, max = 600000))]
    pub auth_timeout_ms: u32,
    /// Time for one HTTP request head or one whole MQTT packet to arrive, from its first byte. The connection is
    /// closed then.
    #[schemars(range(min = 100, max = 600000))]
    pub header_timeout_ms: u32,
    /// Time without one byte of a promised HTTP body. The request is answered 408 and the connection closed.
    #[schemars(range(min = 100, max = 3600000))]
    pub body_timeout_ms: u32,
    /// Time without one byte accepted by a peer that has output waiting. The connection is closed then.
    #[schemars(range(min = 100, max = 600000))]
    pub write_timeout_ms: u32,
    /// Quiet time after which an HTTP, WebSocket or CoAP connection without a request under way is closed. MQTT
    /// follows the client's keep-alive instead.
    pub idle_timeout: Age,
    /// Longest MQTT keep-alive granted; a client that asks for more, or for none, gets this one (MQTT 5: Server Keep
    /// Alive).
    pub keep_alive_max: Age,
    /// Time for connections to finish at shutdown or when a listener goes. What is left is closed then.
    #[schemars(range(min = 0, max = 600000))]
    pub drain_timeout_ms: u32,
    // Sizes of what one peer may send.
    /// One MQTT packet, or the payload of one message over any protocol. MQTT: DISCONNECT 0x95; HTTP: 413; CoAP:
    /// 4.13.
    #[schemars(range(min = 256, max = 268435455))]
    pub packet_bytes_max: u32,
    /// The head of one HTTP request. 431 beyond it.
    #[schemars(range(min = 1024, max = 1048576))]
    pub header_bytes_max: u32,
    /// Header fields of one HTTP request. 431 beyond it.
    #[schemars(range(min = 8, max = 1000))]
    pub headers_max: u32,
    /// Streams open at once on one HTTP/2 connection. The client is told, and one more is reset with REFUSED_STREAM.
    #[schemars(range(min = 1, max = 10000))]
    pub http2_streams_max: u32,
    /// Streams that an HTTP/2 peer has reset before the gateway could look at them, or has made the gateway reset. The connection is closed with
    /// ENHANCE_YOUR_CALM beyond it.
    #[schemars(range(min = 1, max = 100000))]
    pub http2_resets_max: u32,
    /// Bytes that one HTTP/2 stream may send ahead of what is read (RFC 9113 section 5.2). The sender waits then.
    #[schemars(range(min = 65535, max = 16777216))]
    pub http2_stream_window_bytes: u32,
    /// Bytes that all streams of an HTTP/2 connection together may send ahead of what is read. The sender waits then.
    #[schemars(range(min = 65535, max = 67108864))]
    pub http2_connection_window_bytes: u32,
    /// Bytes of answers kept per HTTP/2 stream for a peer that does not take them. The answer waits then.
    #[schemars(range(min = 1024, max = 16777216))]
    pub http2_send_buffer_bytes: u32,
    /// The body of one proxied HTTP request. 413 beyond it.
    pub body_bytes_max: ByteSize,
    /// A topic or a filter. The message or subscription is refused as malformed.
    #[schemars(range(min = 16, max = 65535))]
    pub topic_bytes_max: u32,
    /// Levels of a topic or a filter. The message or subscription is refused as malformed.
    #[schemars(range(min = 2, max = 256))]
    pub topic_levels_max: u32,
    /// MQTT 5 topic aliases a client may define; 0 offers none.
    #[schemars(range(min = 0, max = 65535))]
    pub topic_aliases_max: u16,
    // Sessions and what waits for them.
    /// Live sessions and security contexts over all protocols. A new one is refused: CONNACK 0x97, 503, 5.03.
    #[schemars(range(min = 1, max = 10000000))]
    pub sessions_max: u32,
    /// Longest MQTT session expiry granted; the session and its queue are deleted then.
    pub session_expiry_max: Age,
    /// MQTT sessions kept while their client is away. A new client then gets a session that ends with its connection.
    #[schemars(range(min = 0, max = 10000000))]
    pub persistent_sessions_max: u32,
    /// Unacknowledged QoS 1 and 2 messages per connection and direction (MQTT Receive Maximum). Towards the client
    /// further ones wait; MQTT 5: DISCONNECT 0x93 for a client that exceeds it; 3.1.1: reads pause.
    #[schemars(range(min = 1, max = 65535))]
    pub in_flight_max: u16,
    /// Output waiting for one connected subscriber. QoS 0 messages are dropped beyond it, and counted; QoS 1 and 2 go
    /// to its session queue.
    pub outbox_bytes_max: ByteSize,
    /// Messages waiting for one connected subscriber; beyond it as `outbox_bytes_max`.
    #[schemars(range(min = 1, max = 1000000))]
    pub outbox_messages_max: u32,
    /// Time that a connected subscriber may take nothing while above `outbox_messages_max` or `outbox_bytes_max`, or stay above half of them while
    /// publishers wait for it. It is disconnected then (MQTT 5: 0x97), and the publishers are answered.
    #[schemars(range(min = 100, max = 3600000))]
    pub slow_reader_timeout_ms: u32,
    /// Time that an MQTT publisher is not read from while more than half of `outbox_messages_max` or `outbox_bytes_max` waits for a connected subscriber
    /// of its QoS 0 messages. A subscriber that does not come down to a quarter by then is waited for no longer, until it has; what it misses is dropped.
    #[schemars(range(max = 10000))]
    pub crowded_wait_ms: u32,
    /// Output waiting for all subscribers together. QoS 0 messages are dropped beyond it, and counted; QoS 1 and 2 are acknowledged when their
    /// subscriber has come down to half of its own bound, and refused at four times this one.
    pub outbox_bytes_total_max: ByteSize,
    /// QoS 1 and 2 messages kept for one session whose client is away or slow. The oldest is dropped beyond it, and
    /// counted.
    pub session_queue_bytes_max: ByteSize,
    /// QoS 1 and 2 messages kept for one session; beyond it as `session_queue_bytes_max`.
    #[schemars(range(min = 1, max = 1000000))]
    pub session_queue_messages_max: u32,
    /// Subscriptions of one session. SUBACK 0x97 (3.1.1: 0x80), 503, 5.03 beyond it.
    #[schemars(range(min = 1, max = 100000))]
    pub subscriptions_per_session_max: u32,
    /// Subscriptions of all sessions together; beyond it as `subscriptions_per_session_max`.
    #[schemars(range(min = 1, max = 10000000))]
    pub subscriptions_max: u32,
    /// HTTP event streams and waiting `GET /command` open at once. 503 beyond it.
    #[schemars(range(min = 1, max = 1000000))]
    pub event_streams_max: u32,
    /// Commands waiting for one device. The sender of one more is refused as full.
    #[schemars(range(min = 1, max = 10000))]
    pub commands_per_device_max: u32,
    /// Topics with a last value. A message that would add one is refused as full; known topics go on changing.
    #[schemars(range(min = 1, max = 10000000))]
    pub retained_messages_max: u32,
    /// Bytes of all last values. A message that would exceed it is refused as full; nothing is thrown out to make
    /// room.
    pub retained_bytes_max: ByteSize,
    // CoAP.
    /// Exchanges remembered per worker for deduplication and retransmission. The oldest finished one goes first; when
    /// all are open, a new request gets 5.03.
    #[schemars(range(min = 16, max = 1000000))]
    pub exchanges_max: u32,
    /// CoAP sessions per worker: a device at one address and port. The one not used for longest makes room; when all of
    /// them observe something, a new device gets 5.03.
    #[schemars(range(min = 16, max = 1000000))]
    pub coap_sessions_max: u32,
    /// One body assembled from or served in blocks (RFC 7959). 4.13 beyond it.
    pub blockwise_bytes_max: ByteSize,
    /// All unfinished block-wise bodies of one worker. 5.03 beyond it.
    pub blockwise_bytes_total_max: ByteSize,
    /// Time without the next block. The unfinished body is thrown away then; the next block gets 4.08.
    #[schemars(range(min = 1000, max = 600000))]
    pub blockwise_timeout_ms: u32,
    /// CoAP observations per worker. A further request gets a plain answer without Observe (RFC 7641 section 4.1).
    #[schemars(range(min = 1, max = 1000000))]
    pub observers_max: u32,
    /// CoAP observations per peer; beyond it as `observers_max`.
    #[schemars(range(min = 1, max = 10000))]
    pub observers_per_peer_max: u32,
    /// Devices that say over CoAP what they serve (`/rd`). One more gets 5.03.
    #[schemars(range(min = 1, max = 1000000))]
    pub directory_registrations_max: u32,
    /// Links of one registration. 4.00 beyond it.
    #[schemars(range(min = 1, max = 10000))]
    pub directory_links_max: u32,
    /// The links of one registration, as text. 4.13 beyond it.
    pub directory_registration_bytes_max: ByteSize,
    /// Requests to devices and observed resources of devices, per worker. One more request gets 503; one more resource is not observed.
    #[schemars(range(min = 1, max = 1000000))]
    pub device_requests_max: u32,
    /// Requests to one device and observed resources of it; beyond it as `device_requests_max`.
    #[schemars(range(min = 1, max = 10000))]
    pub device_requests_per_device_max: u32,
    /// Time for a CoAP device to answer a request (RFC 7252 itself gives up after 93 s). 504 then.
    #[schemars(range(min = 1000, max = 600000))]
    pub device_request_timeout_ms: u32,
    // Rates.
    /// Messages and requests of one device. PUBACK 0x97 (3.1.1: withheld, reads paused), 429, 4.29.
    pub rate_per_device: Rate,
    /// Messages, requests and new connections from one address (IPv6: one /64); beyond it as `rate_per_device`, and a
    /// new connection is closed.
    pub rate_per_address: Rate,
    /// Login attempts from one address (IPv6: one /64). 429, 4.29, CONNACK 0x9F (3.1.1: 3) beyond it.
    pub auth_rate_per_address: Rate,
    /// Rate buckets kept per kind of key. At the bound full buckets make room; when none is, new keys share one
    /// bucket per shard.
    #[schemars(range(min = 64, max = 10000000))]
    pub buckets_max: u32,
    // Caches and storage.
    /// Latest messages of topics that are not retained, kept for `GET /topics/T` and its like. The least used topics go.
    pub last_values_bytes_max: ByteSize,
    /// All queues on disk together: the sum of `queue.bytes_max` over all `[[forward]]`. A configuration whose queues could hold more is refused, so
    /// that the disk cannot be promised twice.
    pub spool_bytes_max: ByteSize,
    /// Proxied requests under way at once. 503 with Retry-After beyond it.
    #[schemars(range(min = 1, max = 1000000))]
    pub requests_in_flight_max: u32,
    /// Answers of routes with a `cache` kept in memory, headers and 512 bytes each included; read when the first is kept. The least used make room.
    pub cache_memory_bytes_max: ByteSize,
    /// The same on disk, in the folder `cache` of the data folder, so that they survive a restart; 0 keeps none there. Files are counted by blocks of 4 KiB, and
    /// those not used for longest make room.
    pub cache_disk_bytes_max: ByteSize,
    /// Seconds between two writes of one URL's answer to the disk, to spare an SD card; an answer that is of no use for as long is not written at all.
    #[schemars(range(min = 1, max = 86400))]
    pub cache_disk_interval_secs: u32,
    /// Requests that wait for an answer which another request is fetching into a route's `cache`. One more fetches it itself.
    #[schemars(range(min = 0, max = 1000000))]
    pub cache_waiting_max: u32,
    /// Time that such a request waits. It fetches the answer itself then.
    #[schemars(range(min = 1, max = 600000))]
    pub cache_wait_ms: u32,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            connections_max: 10_000,
            connections_per_address_max: 1_000,
            sniff_bytes_max: 1_024,
            sniff_timeout_ms: 5_000,
            handshake_timeout_ms: 10_000,
            auth_timeout_ms: 10_000,
            header_timeout_ms: 10_000,
            body_timeout_ms: 30_000,
            write_timeout_ms: 20_000,
            idle_timeout: Age::from_secs(120),
            keep_alive_max: Age::from_secs(3_600),
            drain_timeout_ms: 10_000,
            packet_bytes_max: 262_144,
            header_bytes_max: 16_384,
            headers_max: 100,
            http2_streams_max: 100,
            http2_resets_max: 64,
            http2_stream_window_bytes: 65_535,
            http2_connection_window_bytes: 262_144,
            http2_send_buffer_bytes: 65_536,
            body_bytes_max: ByteSize(1 << 20),
            topic_bytes_max: 1_024,
            topic_levels_max: 32,
            topic_aliases_max: 16,
            sessions_max: 20_000,
            session_expiry_max: Age::from_secs(7 * 86_400),
            persistent_sessions_max: 10_000,
            in_flight_max: 64,
            outbox_bytes_max: ByteSize(256 << 10),
            outbox_messages_max: 1_000,
            slow_reader_timeout_ms: 30_000,
            crowded_wait_ms: 100,
            outbox_bytes_total_max: ByteSize(64 << 20),
            session_queue_bytes_max: ByteSize(1 << 20),
            session_queue_messages_max: 1_000,
            subscriptions_per_session_max: 100,
            subscriptions_max: 100_000,
            event_streams_max: 256,
            commands_per_device_max: 16,
            retained_messages_max: 10_000,
            retained_bytes_max: ByteSize(16 << 20),
            exchanges_max: 4_096,
            coap_sessions_max: 4_096,
            blockwise_bytes_max: ByteSize(256 << 10),
            blockwise_bytes_total_max: ByteSize(4 << 20),
            blockwise_timeout_ms: 60_000,
            observers_max: 1_000,
            observers_per_peer_max: 32,
            directory_registrations_max: 500,
            directory_links_max: 64,
            directory_registration_bytes_max: ByteSize(8 << 10),
            device_requests_max: 1_000,
            device_requests_per_device_max: 64,
            device_request_timeout_ms: 30_000,
            rate_per_device: Rate::per_second(100, 200),
            rate_per_address: Rate::per_second(1_000, 2_000),
            auth_rate_per_address: Rate::per_second(10, 50),
            buckets_max: 65_536,
            last_values_bytes_max: ByteSize(4 << 20),
            spool_bytes_max: ByteSize(4 << 30),
            requests_in_flight_max: 4_096,
            cache_memory_bytes_max: ByteSize(8 << 20),
            cache_disk_bytes_max: ByteSize(64 << 20),
            cache_disk_interval_secs: 60,
            cache_waiting_max: 1_024,
            cache_wait_ms: 10_000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema() -> serde_json::Value {
        serde_json::to_value(schemars::schema_for!(Config)).unwrap()
    }

    #[test]
    fn every_limit_is_explained() {
        let schema = schema();
        for (key, property) in schema["properties"].as_object().unwrap() {
            let text = property["description"].as_str().unwrap_or_default();
            assert!(text.len() > 20 && text.ends_with('.'), "{key}: {text}");
        }
    }

    #[test]
    fn every_default_lies_in_its_own_range() {
        let schema = schema();
        let defaults = serde_json::to_value(Config::default()).unwrap();
        let mut ranged = 0;
        for (key, property) in schema["properties"].as_object().unwrap() {
            let Some(value) = defaults[key].as_u64() else { continue };
            let (min, max) = (property["minimum"].as_u64().unwrap(), property["maximum"].as_u64().unwrap());
            assert!((min..=max).contains(&value), "{key} = {value} is outside {min}..={max}");
            ranged += 1;
        }
        assert!(ranged > 20);
    }

    #[test]
    fn an_unknown_limit_is_refused() {
        let error = serde_json::from_str::<Config>(r#"{ "conections_max": 1 }"#).unwrap_err();
        assert!(error.to_string().contains("conections_max"));
    }
}

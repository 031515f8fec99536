//! The limits and offers of the server's side of one connection.

use std::time::Duration;

use crate::packet::Qos;

/// Shared by all connections of a listener. `0` never means infinity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// From the first byte to the accepted CONNECT, enhanced authentication included; also for each re-authentication. Then the connection is closed.
    pub connect_timeout: Duration,
    /// Largest CONNECT packet, in bytes: what a stranger may make us hold.
    pub connect_bytes_max: usize,
    /// Largest packet after CONNECT, in bytes, header included; announced as Maximum Packet Size. A larger one closes the connection with 0x95.
    pub packet_bytes_max: usize,
    /// Longest topic name or filter, in bytes. A longer one closes the connection with 0x90 or 0x8F.
    pub topic_bytes_max: usize,
    /// Most levels in a topic name or filter.
    pub topic_levels_max: usize,
    /// QoS 1 and 2 messages from the client that may wait for the application's answer; announced as Receive Maximum. A MQTT 5 client that sends
    /// more is closed with 0x93; a 3.1.1 client is not read from until there is room.
    pub receive_maximum: u16,
    /// QoS 2 packet identifiers that a 3.1.1 client may leave without PUBREL. More closes the connection.
    pub unreleased_max: u16,
    /// QoS 1 and 2 messages to the client that may wait for its acknowledgement; the client's own Receive Maximum lowers it.
    pub in_flight_max: u16,
    /// Topic aliases the client may define; each keeps one topic in memory.
    pub topic_alias_maximum: u16,
    /// Topic aliases the server defines towards a client that allows them; each keeps one topic in memory.
    pub topic_alias_out_max: u16,
    /// Topic filters in one SUBSCRIBE or UNSUBSCRIBE. More closes the connection with 0x97.
    pub subscriptions_per_packet_max: usize,
    /// User properties in one packet. More closes the connection with 0x97.
    pub user_properties_max: usize,
    /// Longest keep-alive a MQTT 5 client gets; a longer one, or none, is answered with Server Keep Alive. 3.1.1 has no way to be told.
    pub keep_alive_max_secs: u16,
    /// Highest quality of service a client may publish with, and is granted.
    pub maximum_qos: Qos,
    pub retain_available: bool,
    pub wildcard_available: bool,
    pub shared_available: bool,
    pub subscription_ids_available: bool,
    /// Whether a payload that is declared to be UTF-8 is checked to be; a false declaration closes the connection with 0x99.
    pub payload_format_checked: bool,
    /// `poll_output` stops adding redeliveries when the caller's buffer holds this many bytes.
    pub burst_bytes_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            connect_timeout: Duration::from_secs(10),
            connect_bytes_max: 16 * 1024,
            packet_bytes_max: 256 * 1024,
            topic_bytes_max: 1024,
            topic_levels_max: 32,
            receive_maximum: 256,
            unreleased_max: 1024,
            in_flight_max: 128,
            topic_alias_maximum: 16,
            topic_alias_out_max: 16,
            subscriptions_per_packet_max: 64,
            user_properties_max: 32,
            keep_alive_max_secs: 3600,
            maximum_qos: Qos::ExactlyOnce,
            retain_available: true,
            wildcard_available: true,
            shared_available: true,
            subscription_ids_available: true,
            payload_format_checked: true,
            burst_bytes_max: 64 * 1024,
        }
    }
}

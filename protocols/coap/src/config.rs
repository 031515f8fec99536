//! The endpoint's limits, their sum, and what it counts.

use std::time::Duration;

use crate::answer::Asked;
use crate::exchange::Exchanges;
use crate::message::TOKEN_BYTES_MAX;

/// Limits and times. The defaults of the times are RFC 7252 section 4.8.
#[derive(Clone, Debug)]
pub struct Config {
    /// ACK_TIMEOUT: first wait for an acknowledgement.
    pub ack_timeout: Duration,
    /// ACK_RANDOM_FACTOR in percent, at least 100.
    pub ack_random_percent: u16,
    /// MAX_RETRANSMIT.
    pub retransmissions_max: u8,
    /// EXCHANGE_LIFETIME: how long a message id is remembered.
    pub exchange_lifetime: Duration,
    /// NSTART: unacknowledged notifications to one peer.
    pub nstart: usize,
    /// How long a confirmable request may stay unanswered before it is acknowledged empty.
    pub separate_after: Duration,
    /// Remembered exchanges; the oldest is forgotten first.
    pub exchanges_max: usize,
    /// Bytes of remembered answers; the oldest is forgotten first.
    pub exchange_bytes_max: usize,
    /// Requests with the application; beyond, 5.03.
    pub requests_max: usize,
    /// Confirmable messages of our own in flight; beyond, answers go out as NON and notifications wait.
    pub outgoing_max: usize,
    /// Observers; beyond, a registration is answered as a plain GET (RFC 7641 section 4.1).
    pub observers_max: usize,
    /// Observers of one peer.
    pub observers_peer_max: usize,
    /// Notifications that wait for one observer's acknowledgement, where each must arrive.
    pub observe_queue_max: usize,
    /// Payload bytes of all waiting notifications.
    pub observe_bytes_max: usize,
    /// Every so many notifications one is confirmable.
    pub observe_confirm_every: u16,
    /// And at least one in this time (RFC 7641 section 4.5: 24 hours at most).
    pub observe_confirm_after: Duration,
    /// Largest block and largest unblocked payload: 16 to 1024, a power of two.
    pub block_bytes_max: usize,
    /// Largest body put together from blocks; beyond, 4.13 with Size1.
    pub body_bytes_max: usize,
    /// Bodies in transfer, all together; beyond, 5.03.
    pub blockwise_bytes_max: usize,
    /// Bodies in transfer of one peer.
    pub blockwise_peer_bytes_max: usize,
    /// A body that does not go on for this long is dropped.
    pub blockwise_lifetime: Duration,
    /// Calls of ours that are open or observe; beyond, none is begun.
    pub calls_max: usize,
    /// Calls to one peer; beyond, none is begun.
    pub calls_peer_max: usize,
    /// Peers remembered as validated; the oldest is forgotten first.
    pub peers_max: usize,
    /// How long a peer stays validated, and how long an Echo value counts.
    pub peer_lifetime: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            ack_timeout: Duration::from_secs(2),
            ack_random_percent: 150,
            retransmissions_max: 4,
            exchange_lifetime: Duration::from_secs(247),
            nstart: 1,
            separate_after: Duration::from_millis(250),
            exchanges_max: 65_536,
            exchange_bytes_max: 4 << 20,
            requests_max: 4096,
            outgoing_max: 1024,
            observers_max: 4096,
            observers_peer_max: 64,
            observe_queue_max: 16,
            observe_bytes_max: 1 << 20,
            observe_confirm_every: 16,
            observe_confirm_after: Duration::from_secs(3600),
            block_bytes_max: 1024,
            body_bytes_max: 256 << 10,
            blockwise_bytes_max: 4 << 20,
            blockwise_peer_bytes_max: 512 << 10,
            blockwise_lifetime: Duration::from_secs(60),
            calls_max: 1024,
            calls_peer_max: 64,
            peers_max: 16_384,
            peer_lifetime: Duration::from_secs(900),
        }
    }
}

impl Config {
    /// Upper bound of what the endpoint keeps because of peers, from the limits alone: tables at their full size, with the slack of growing vectors.
    pub fn memory_bytes_max(&self) -> usize {
        let exchanges = self.exchanges_max * Exchanges::ENTRY_BYTES + self.exchange_bytes_max;
        let requests = self.requests_max * (size_of::<Asked>() + 32 + TOKEN_BYTES_MAX);
        let outgoing = self.outgoing_max * (self.block_bytes_max + 512 + TOKEN_BYTES_MAX);
        let observers = self.observers_max * (512 + TOKEN_BYTES_MAX) + self.observe_bytes_max;
        let peers = self.peers_max * 128;
        let calls = self.calls_max * 1024;
        2 * (exchanges + requests + outgoing + observers + peers + calls) + 3 * self.blockwise_bytes_max
    }
}

/// What happened so far; monotone, except the last group.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    pub received: u64,
    pub requests: u64,
    pub malformed: u64,
    /// Well-formed, but nothing to do with us: stray ACK, RST or response, empty NON.
    pub stray: u64,
    pub pings: u64,
    pub duplicates: u64,
    pub replayed: u64,
    pub refused: u64,
    pub separate: u64,
    pub retransmitted: u64,
    pub given_up: u64,
    pub exchanges_evicted: u64,
    pub requests_full: u64,
    pub outgoing_full: u64,
    pub echoes: u64,
    pub bodies_expired: u64,
    pub notifications: u64,
    pub conflated: u64,
    pub exchanges: usize,
    pub requests_open: usize,
    pub outgoing: usize,
    pub observers: usize,
    pub blockwise_bytes: usize,
    pub peers_validated: usize,
    pub calls: usize,
}

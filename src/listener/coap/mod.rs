//! CoAP (RFC 7252): the device API, the mirror and the challenge flow of the wire contract, over UDP and TCP.
//!
//! ```text
//! datagrams > engine (tidegate_coap: dedup, retransmission, blocks, observe) > service (who, what, gateway) > engine > datagrams
//! ```
//! Promises: 2.04 to a confirmable request only once the delivery class holds, in the acknowledgement where that is quick and in a separate response where
//! it is not; a refusal names the rule or limit to who may know it and nothing to a stranger; everything that peers can make grow is bounded by a key of
//! `[limits]`.
//!
//! Cost of a confirmable `POST /t` in a session that exists: a share of two system calls, the engine's parse and dedup, one HMAC for the token, two
//! look-ups, and what the gateway's publish costs.
//!
//! Deliberately not here: what a message means (`gateway`), proofs (`identity`), DTLS and OSCORE.

mod answer;
mod call;
mod contexts;
mod datagrams;
mod device_http;
mod devices;
mod engine;
mod links;
mod multicast;
mod observations;
mod patch;
mod proxy;
mod service;
mod stream;
mod timer;
mod udp;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::gateway::Gateway;
use crate::listener::Relay;

pub use multicast::serve_group;
pub use stream::serve;
pub use udp::serve_datagrams;

/// What an engine is served with.
#[derive(Clone)]
pub struct Context {
    pub gateway: Arc<Gateway>,
    /// The worker's own way to the upstreams; `None` where there are none.
    pub relay: Option<Arc<dyn Relay>>,
}

#![forbid(unsafe_code)]
//! A CoAP engine without IO, the server's side and calls to devices: RFC 7252 with Observe (RFC 7641), block-wise transfer (RFC 7959), No-Response (RFC 7967),
//! Echo (RFC 9175), and CoAP over TCP (RFC 8323).
//!
//! Datagrams go in with the time and the peer; requests come out as borrowed views; answers, acknowledgements, retransmissions and
//! notifications come out of [`Endpoint::poll_output`]. There is no clock, socket, task or source of randomness in here: the caller passes
//! `now` and one secret seed. Everything that a peer can make grow is bounded by a field of [`Config`], and [`Config::memory_bytes_max`] is the sum.
//!
//! Deliberately not here: who may do what (the application decides on each [`Request`]), DTLS and OSCORE.

mod answer;
mod bert;
pub mod block;
pub mod build;
pub mod client;
pub mod code;
mod config;
pub mod content;
pub mod endpoint;
mod exchange;
pub mod message;
pub mod multicast;
mod observe;
pub mod option;
mod outgoing;
mod peer;
mod request;
mod response;
mod slots;
pub mod tcp;
pub mod uri;

pub use block::Block;
pub use build::Builder;
pub use code::Code;
pub use endpoint::{
    Config, Counters, Endpoint, Event, Gone, GoneReason, Handle, Notification, NotifyError, ObserverId, Output,
    Received,
};
pub use message::{Contents, FormatError, Kind, MessageView};
pub use outgoing::Batch;
pub use request::{Observe, Refused, Request};
pub use response::Response;

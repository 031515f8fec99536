//! MQTT 3.1.1 and 5, the server's side, without IO: one packet model, a strict codec, topic rules, and the state machine of one connection.
//!
//! # Promises
//! - Decoding never panics, never reads past the frame, borrows from the input and allocates nothing; what it accepts, [`Packet::encode`] writes back.
//! - A frame larger than the limit is refused as soon as its fixed header is there.
//! - An acknowledgement is the application's decision ([`Connection::ack`]), sent in the order of the PUBLISHes whatever order the decisions come in.
//! - Everything a peer can make grow has a limit in [`Config`].
//!
//! # Deliberately not
//! No sockets, no clock (`now` is passed in), no randomness, no subscriptions, no retained messages, no authentication: those are the gateway's.
//!
//! # Driving a connection
//! Call [`Connection::handle_input`] with what was read; when it returns true it took one packet: drain [`Connection::poll_output`] until
//! [`Output::Timeout`], then call it again. Every call that can write takes `out`, the caller's buffer, so that many packets leave in one write
//! and an idle connection owns no buffer.
//!
//! # Cost of one QoS 0 PUBLISH of 64 bytes
//! Decode: no allocation, no copy, one reference count on the read buffer. Encode: one copy of topic and payload into `out`, no allocation.
#![forbid(unsafe_code)]

mod config;
mod connection;
mod decode;
mod encode;
mod error;
mod event;
mod inbound;
mod outbound;
mod packet;
mod property;
mod reason;
mod session;
pub mod topic;

pub use config::Config;
pub use connection::{Accept, Connection};
pub use decode::{Frame, decode};
pub use encode::EncodeError;
pub use error::Error;
pub use event::{
    Cause, Close, ConnectEvent, Event, Handle, Output, PublishEvent, Published, Secret, SubscribeEvent, Subscription,
    UnsubscribeEvent, WillMessage,
};
pub use outbound::Outgoing;
pub use packet::{
    Ack, Auth, Connack, Connect, Disconnect, Filters, FiltersBuf, Packet, PacketId, Publish, Qos, Reasons,
    RetainHandling, Suback, Subscribe, SubscribeOptions, Unsuback, Unsubscribe, Version, Will,
};
pub use property::{Context, Properties, PropertiesBuf, Property, PropertySink};
pub use reason::Reason;
pub use session::{SessionState, Stage};

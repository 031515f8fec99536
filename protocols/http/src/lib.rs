//! HTTP/1.1 as a gateway needs it beside hyper: the client's side of a connection ([`request`], [`response`], [`body`]), an observer that refuses
//! what two parsers read differently ([`framing`]), and the rules for what passes: which headers end here, which say where a request came from,
//! and which carry a trace.
//!
//! No IO, no clock: bytes go in, heads and pieces of bodies come out.

#![forbid(unsafe_code)]

pub mod body;
pub mod forwarded;
pub mod framing;
pub mod hop_by_hop;
pub mod request;
pub mod response;
pub mod traceparent;

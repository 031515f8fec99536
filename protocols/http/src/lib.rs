//! The rules of HTTP that hyper leaves to a gateway, as pure functions over text: which headers end here, which say where a request
//! came from, and which carry a trace.
//!
//! No header map, no body, no IO: callers bring the values and keep theirs.

#![forbid(unsafe_code)]

pub mod forwarded;
pub mod framing;
pub mod hop_by_hop;
pub mod traceparent;

//! Requests that did not come over HTTP and go along a `[[route]]` all the same.

use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;

use crate::gateway::{Kept, Route, UpstreamFault};
use crate::message::{Device, Reject};

/// A request that has been admitted.
pub struct Relayed {
    pub route: Arc<Route>,
    /// In origin-form, with what the asker's own protocol said of the body and of the answer it wants.
    pub request: http::Request<Bytes>,
    pub peer: IpAddr,
    pub is_tls: bool,
    /// The host asked for.
    pub host: Option<String>,
    pub device: Option<Arc<Device>>,
    /// For the steps of the route.
    pub kept: Kept,
    /// The asker's protocol takes no larger answer.
    pub answer_bytes_max: usize,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RelayFault {
    Reject(Reject),
    Upstream(UpstreamFault),
    /// The answer is larger than the asker's protocol takes.
    AnswerTooLarge,
}

/// A worker's way to the upstreams, for adapters that do not speak HTTP.
pub trait Relay: Send + Sync {
    /// # Cancel safety
    /// A dropped future abandons the request.
    fn relay(
        &self,
        relayed: Relayed,
    ) -> Pin<Box<dyn Future<Output = Result<http::Response<Bytes>, RelayFault>> + Send>>;
}

//! The steps of a route's way, in which requests and answers are looked at and changed.
//!
//! ```text
//! route found > before_admission > who, policy, rates, size > before_upstream > upstream > after_upstream > client
//! ```
//! A step that answers ends the way; `after_upstream` is then still called, as it is for every refusal, so that what an answer needs (CORS)
//! is on all of them. Steps are made once, from the configuration ([`of`]), shared by all workers, and do no IO.
//!
//! To add one: a file beside this one with a type that is a [`Step`], its keys in [`Config`], and a line in [`of`].

use std::fmt;
use std::net::IpAddr;

use bytes::Bytes;
use http::header::{HeaderMap, HeaderValue};
use http::{Method, Response, request, response};

use super::config::Config;
use super::{cors, edits, fixed, rewrite};

/// A request as it came.
#[derive(Clone, Copy, Debug)]
pub struct Visit<'v> {
    pub method: &'v Method,
    /// As it came, percent-encoded.
    pub path: &'v str,
    pub query: Option<&'v str>,
    /// With its port.
    pub host: Option<&'v str>,
    pub peer: IpAddr,
    pub headers: &'v HeaderMap,
}

/// What is known of a request that has been admitted, and kept for its answer.
#[derive(Clone, Debug)]
pub struct Kept {
    pub peer: IpAddr,
    pub device: Option<Box<str>>,
    pub host: Option<Box<str>>,
    pub path: Box<str>,
    pub query: Option<Box<str>>,
    pub request_id: Option<HeaderValue>,
    pub origin: Option<HeaderValue>,
}

impl Kept {
    pub fn of(visit: &Visit<'_>) -> Self {
        Kept {
            peer: visit.peer,
            device: None,
            host: visit.host.map(Into::into),
            path: visit.path.into(),
            query: visit.query.map(Into::into),
            request_id: None,
            origin: visit.headers.get(http::header::ORIGIN).cloned(),
        }
    }
}

/// One step. Every method has a default that does nothing.
pub trait Step: fmt::Debug + Send + Sync {
    /// Before anybody is asked who they are.
    fn before_admission(&self, visit: &Visit<'_>) -> Option<Response<Bytes>> {
        let _ = visit;
        None
    }

    /// `head` is what the upstream is going to see.
    fn before_upstream(&self, head: &mut request::Parts, kept: &Kept) -> Option<Response<Bytes>> {
        let _ = (head, kept);
        None
    }

    /// `head` is what the client is going to see.
    fn after_upstream(&self, head: &mut response::Parts, kept: &Kept) {
        let _ = (head, kept);
    }
}

/// The steps that a route asks for, in their order.
pub(super) fn of(config: &Config) -> Box<[Box<dyn Step>]> {
    let mut steps: Vec<Box<dyn Step>> = Vec::new();
    steps.extend(cors::Cors::of(config).map(|step| Box::new(step) as Box<dyn Step>));
    steps.extend(fixed::Redirect::of(config).map(|step| Box::new(step) as Box<dyn Step>));
    steps.extend(fixed::Fixed::of(config).map(|step| Box::new(step) as Box<dyn Step>));
    steps.extend(rewrite::Rewrite::of(config).map(|step| Box::new(step) as Box<dyn Step>));
    steps.extend(edits::Edits::of(config).map(|step| Box::new(step) as Box<dyn Step>));
    steps.into()
}

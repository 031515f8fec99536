//! `/hc/DEVICE/PATH`: HTTP requests to CoAP devices that have registered themselves (RFC 8075).
//!
//! The default mapping of RFC 8075 section 5.3 writes the whole URI behind `/hc/`; here its host is the device: `/hc/coap://DEVICE/PATH` is the same as
//! `/hc/DEVICE/PATH`. No other host is ever asked. Policy knows the request as its method and `/hc/DEVICE/PATH`.

use std::time::Instant;

use http::header::{ACCEPT, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, IF_MATCH, IF_NONE_MATCH, LOCATION};
use http::{Method, Request, Response, Uri};
use hyper::body::Incoming;

use super::body::Body;
use super::problem::Refused;
use super::relay::lower;
use super::{Connection, Facts};
use crate::gateway::{BodySize, ReachFault, UpstreamFault};
use crate::message::{DeviceId, Reject};

/// A device and what is asked of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    device: DeviceId,
    /// As it came, with its slash.
    path: String,
}

impl Target {
    /// Reads a path below the prefix of the device API; `None` where it names no device.
    pub fn parse(path: &str) -> Option<Self> {
        let rest = path.strip_prefix("hc/")?;
        let rest = rest.strip_prefix("coap://").unwrap_or(rest);
        let (device, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let path = if path.is_empty() { "/" } else { path };
        Some(Target { device: DeviceId::parse(device).ok()?, path: path.to_owned() })
    }
}

impl Connection {
    /// Asks a device.
    pub async fn ask_device(
        &self,
        request: Request<Incoming>,
        target: Target,
        facts: &mut Facts,
    ) -> Result<Response<Body>, Refused> {
        let Target { device: asked, path } = target;
        let (parts, body) = request.into_parts();
        let bytes_max = self.limits.blockwise_bytes_max.bytes();
        let resource = format!("/hc/{asked}{path}");
        let what = (&parts.method, &*resource);
        let by_rule = self.admit(what, &parts.headers, BodySize::UpTo(bytes_max), facts, Instant::now()).await?;
        // Who may not ask does not learn who is there.
        let reach = self.gateway.reach(&asked, Instant::now()).ok_or(Reject::NotFound)?;
        let _slot = self.shared.request_slot(self.limits.requests_in_flight_max)?;
        let (limit, bytes_max) = lower(by_rule, ("blockwise_bytes_max", bytes_max));
        let body = self.body(body, limit, usize::try_from(bytes_max).unwrap_or(usize::MAX)).await?;
        let uri = match parts.uri.query() {
            Some(query) => format!("{path}?{query}"),
            None => path,
        };
        let mut mapped = Request::new(body);
        *mapped.method_mut() = parts.method.clone();
        *mapped.uri_mut() = Uri::try_from(uri).map_err(|_| Reject::Malformed { what: "a path that is no URI" })?;
        *mapped.headers_mut() = heard_by_device(&parts.headers);
        let mut response = reach.reach(&asked, mapped, self.gateway.device_timeout()).await.map_err(refused)?;
        if let Some(location) = response.headers().get(LOCATION).and_then(|value| value.to_str().ok())
            && let Ok(location) = self.shared.prefix.before(location).parse()
        {
            response.headers_mut().insert(LOCATION, location);
        }
        let is_head = parts.method == Method::HEAD;
        Ok(response.map(|body| if is_head || body.is_empty() { Body::Empty } else { Body::from(body) }))
    }
}

/// The fields that CoAP has options for. Credentials are the gateway's business.
fn heard_by_device(headers: &HeaderMap) -> HeaderMap {
    let mut heard = HeaderMap::new();
    for name in [ACCEPT, CONTENT_ENCODING, CONTENT_TYPE, IF_MATCH, IF_NONE_MATCH] {
        for value in headers.get_all(&name) {
            heard.append(name.clone(), value.clone());
        }
    }
    heard
}

fn refused(fault: ReachFault) -> Refused {
    match fault {
        ReachFault::TimedOut => Refused::Upstream(UpstreamFault::Timeout),
        ReachFault::Refused | ReachFault::AnswerTooLarge => Refused::Upstream(UpstreamFault::Unreachable),
        ReachFault::Full => Refused::Upstream(UpstreamFault::Unavailable),
        ReachFault::Unmappable(status) => Refused::Unmappable(status),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_is_the_host_of_the_default_mapping() {
        let target = |path| Target::parse(path).map(|t| (t.device.to_string(), t.path));
        let expected = Some(("lamp-1".to_owned(), "/a/b%20c".to_owned()));
        assert_eq!(target("hc/lamp-1/a/b%20c"), expected);
        assert_eq!(target("hc/coap://lamp-1/a/b%20c"), expected);
        assert_eq!(target("hc/lamp-1"), Some(("lamp-1".to_owned(), "/".to_owned())));
        for none in ["hc/", "hc", "hcx/lamp-1", "hc/coap://", "hc/http://x/y@z", "hc/a%20b/c", "hc/../x", "topics/x"] {
            assert!(target(none).is_none() || none == "hc/http://x/y@z", "{none}");
        }
        // A scheme that is none of ours is read as a name, which no device has registered.
        assert_eq!(target("hc/coaps://lamp-1/a"), Some(("coaps:".to_owned(), "//lamp-1/a".to_owned())));
    }
}

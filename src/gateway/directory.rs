//! Devices that say what they serve (RFC 9176), and the way to ask them.
//!
//! Who registers is known from authentication. A device may register what it may publish: what it serves appears below `dev/DEVICE/coap`, and whoever may
//! read a topic there sees the link that stands for it.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::publish::forbidden;
use super::{Action, Client, Device, DeviceId, Gateway, Reject, wall_ms};
use crate::directory::{self, Link, NotLinks, Offer, Renewal, Wanted};

/// Why a device did not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReachFault {
    /// Not in time.
    TimedOut,
    /// It, or its connection, says that there is nobody to answer; or its answer cannot be understood.
    Refused,
    /// As many requests to it are under way as may be.
    Full,
    /// The answer is larger than `blockwise_bytes_max`.
    AnswerTooLarge,
    /// The request has something that cannot be said to it: the status says what.
    Unmappable(http::StatusCode),
}

/// The outcome of asking a device.
pub type Reached = Result<http::Response<Bytes>, ReachFault>;

/// A way to a registered device, owned by who talks to it.
pub trait Reach: Send + Sync {
    /// Asks the device: method, path and query of the request are the device's own, its headers are what HTTP says of body and answer.
    ///
    /// # Cancel safety
    /// A dropped future abandons the request.
    fn reach(
        &self,
        device: &DeviceId,
        request: http::Request<Bytes>,
        timeout: Duration,
    ) -> Pin<Box<dyn Future<Output = Reached> + Send>>;
}

impl fmt::Debug for dyn Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reach")
    }
}

/// What a device says of itself beside its links.
pub struct Endpoint<'q> {
    /// All query parameters but the credential, as they came.
    pub parameters: &'q [(&'q str, &'q str)],
    /// Where the request came from, as a URI without a path.
    pub base: String,
    pub via: Arc<dyn Reach>,
}

/// What `parameters` of a registration say.
struct Said {
    ep: Option<Box<str>>,
    sector: Option<Box<str>>,
    lifetime_secs: Option<u32>,
    attributes: Vec<(Box<str>, Box<str>)>,
}

impl Gateway {
    /// Takes a device's registration in (RFC 9176 section 5), in the place of an older one. Gives its serial number and its links.
    ///
    /// # Errors
    /// As a publish below `dev/DEVICE/coap`; [`Reject::Forbidden`] for an `ep` that is not the device, [`Reject::Malformed`], [`Reject::TooLarge`],
    /// [`Reject::Full`]. Counted here.
    pub fn register_endpoint(
        &self,
        client: &mut Client,
        endpoint: Endpoint<'_>,
        links: &[u8],
        now: Instant,
    ) -> Result<(u64, Vec<Link>), Reject> {
        self.counted(client, |client| {
            let device = self.admit_endpoint(client, links.len(), now)?;
            let limits = self.limits();
            let bytes_max = limits.directory_registration_bytes_max.bytes();
            if links.len() as u64 > bytes_max {
                return Err(Reject::TooLarge { limit: "directory_registration_bytes_max", bytes_max });
            }
            let said = said(&endpoint, &device.id)?;
            let links_max = limits.directory_links_max as usize;
            let links = directory::parse(links, links_max).map_err(|error| match error {
                NotLinks::Malformed(what) => Reject::Malformed { what },
                NotLinks::TooMany => Reject::Malformed { what: "more links than directory_links_max" },
            })?;
            let offer = Offer {
                sector: said.sector,
                lifetime_secs: said.lifetime_secs,
                base: endpoint.base.into(),
                attributes: said.attributes,
                links: links.clone(),
                via: endpoint.via,
            };
            let registrations_max = limits.directory_registrations_max as usize;
            let serial = self.directory.lock().register(device, offer, registrations_max, now);
            let full = |_| Reject::Full { limit: "directory_registrations_max", retry_after: FULL_RETRY };
            Ok((serial.map_err(full)?, links))
        })
    }

    /// Renews the registration `id` of the caller (RFC 9176 section 5.3.1), which is another one from then on where the device has another address.
    ///
    /// # Errors
    /// [`Reject::NotFound`] where the caller has none of this name; otherwise as [`register_endpoint`](Gateway::register_endpoint).
    pub fn renew_endpoint(
        &self,
        client: &mut Client,
        id: &str,
        endpoint: Endpoint<'_>,
        now: Instant,
    ) -> Result<(u64, Vec<Link>), Reject> {
        self.counted(client, |client| {
            let device = self.admit_endpoint(client, 0, now)?;
            if device.id.as_str() != id {
                return Err(Reject::NotFound);
            }
            let said = said(&endpoint, &device.id)?;
            let renewal = Renewal {
                lifetime_secs: said.lifetime_secs,
                base: endpoint.base.into(),
                attributes: said.attributes,
                via: endpoint.via,
            };
            let mut directory = self.directory.lock();
            let row = directory.renew(&device.id, renewal, now).ok_or(Reject::NotFound)?;
            Ok((row.serial, row.links.clone()))
        })
    }

    /// Removes the registration `id` of the caller.
    ///
    /// # Errors
    /// [`Reject::NotFound`] where the caller has none of this name, and as any message.
    pub fn remove_endpoint(&self, client: &mut Client, id: &str, now: Instant) -> Result<(), Reject> {
        self.counted(client, |client| {
            let device = self.admit_endpoint(client, 0, now)?;
            if device.id.as_str() != id {
                return Err(Reject::NotFound);
            }
            self.directory.lock().remove(&device.id).map(drop).ok_or(Reject::NotFound)
        })
    }

    /// Removes a registration whose device has gone.
    pub fn end_endpoint(&self, device: &DeviceId, serial: u64, now: Instant) {
        let mut directory = self.directory.lock();
        if directory.find(device, now).is_some_and(|row| row.serial == serial) {
            directory.remove(device);
        }
    }

    /// Whether what was registered under `serial` still stands.
    pub fn is_registered(&self, device: &Device, serial: u64, now: Instant) -> bool {
        self.identity.is_current(device)
            && self.directory.lock().find(&device.id, now).is_some_and(|row| row.serial == serial)
    }

    /// The registered resources that the caller may read, in link format.
    pub fn registered_resources(&self, client: &Client, wanted: &Wanted<'_>, now: Instant) -> String {
        self.directory.lock().resources(wanted, now, |device, link| self.may_see(client, device, link))
    }

    /// The registered devices of which the caller may read something, and the caller itself.
    pub fn registered_endpoints(&self, client: &Client, wanted: &Wanted<'_>, now: Instant) -> String {
        let own = client.caller.device.as_ref().map(|device| &device.id);
        let is_own = |device: &DeviceId| own == Some(device);
        self.directory.lock().endpoints(wanted, now, is_own, |device, link| self.may_see(client, device, link))
    }

    /// The way to a registered device that is still what it was when it registered.
    pub fn reach(&self, device: &DeviceId, now: Instant) -> Option<Arc<dyn Reach>> {
        let directory = self.directory.lock();
        let row = directory.find(device, now)?;
        self.identity.is_current(&row.device).then(|| row.via.clone())
    }

    /// How long a device has for an answer.
    pub fn device_timeout(&self) -> Duration {
        Duration::from_millis(self.limits().device_request_timeout_ms.into())
    }

    fn may_see(&self, client: &Client, device: &DeviceId, link: &Link) -> bool {
        self.may_read(client, &format!("dev/{device}/{}", link.topic_level()))
    }

    fn counted<T>(&self, client: &mut Client, act: impl FnOnce(&mut Client) -> Result<T, Reject>) -> Result<T, Reject> {
        let result = act(client);
        if let Err(reject) = &result {
            self.note_reject(client, reject);
        }
        result
    }

    /// Admission as for a message below `dev/DEVICE/coap`.
    ///
    /// # Errors
    /// As for that message.
    pub fn admit_endpoint(&self, client: &mut Client, size: usize, now: Instant) -> Result<Arc<Device>, Reject> {
        if self.is_draining() {
            return Err(Reject::ShuttingDown);
        }
        self.check_current(client)?;
        let device = client.caller.device.clone().ok_or(Reject::Forbidden { rule: None })?;
        let snapshot = self.snapshot.load();
        let now_ms = wall_ms();
        client.seen(now_ms);
        self.charge(client, &snapshot, now)?;
        let topic = format!("dev/{}/coap", device.id);
        let decision = self.decide(client, &snapshot, Action::Publish, &topic, size, now_ms);
        if !decision.is_allowed() {
            return Err(forbidden(&snapshot, &decision));
        }
        self.check_decision(client, &snapshot, &decision, size, now)?;
        Ok(device)
    }
}

/// # Errors
/// [`Reject::Forbidden`] for another device's name, [`Reject::Malformed`] for what would break out of a listing, for another host's address, and for too
/// much of anything.
fn said(endpoint: &Endpoint<'_>, device: &DeviceId) -> Result<Said, Reject> {
    let malformed = |what| Err(Reject::Malformed { what });
    let mut said = Said { ep: None, sector: None, lifetime_secs: None, attributes: Vec::new() };
    for (name, value) in endpoint.parameters {
        let is_name =
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        if !is_name || value.chars().any(|c| c.is_control() || matches!(c, '"' | '\\')) {
            return malformed("a parameter that cannot be listed");
        }
        match *name {
            "ep" if *value != device.as_str() => return Err(Reject::Forbidden { rule: None }),
            "ep" if said.ep.is_some() => return malformed("a parameter given twice"),
            "ep" => said.ep = Some((*value).into()),
            "d" if said.sector.is_some() || value.is_empty() || value.len() > SECTOR_BYTES_MAX => {
                return malformed("d is one name of up to 63 bytes");
            }
            "d" => said.sector = Some((*value).into()),
            "lt" => match value.parse() {
                Ok(secs @ 1..) if said.lifetime_secs.is_none() => said.lifetime_secs = Some(secs),
                Ok(_) | Err(_) => return malformed("lt is a number of seconds, from 1 to 4294967295"),
            },
            // What this names would be shown to others, and asked: only where the request came from is known to be the device.
            "base" if *value != endpoint.base => return malformed("base is not where the request came from"),
            "base" => {}
            "page" | "count" | "rt" | "href" => return malformed("a parameter of lookups"),
            _ if said.attributes.len() >= ATTRIBUTES_MAX => return malformed("too many parameters"),
            _ => said.attributes.push(((*name).into(), (*value).into())),
        }
    }
    Ok(said)
}

const FULL_RETRY: Duration = Duration::from_secs(60);
/// RFC 9176 section 5.
const SECTOR_BYTES_MAX: usize = 63;
const ATTRIBUTES_MAX: usize = 8;

//! The resource directory (RFC 9176): what devices have said they serve, for as long as they keep saying it.
//!
//! One registration for each device, under its own id: a device that registers again replaces what it said before, so the table is no longer than the
//! registry and a device cannot take another's place. Pure: `now` is passed in, who may see what is asked of the caller, and `V` is the way to the
//! device, of which nothing is known here.

mod link;

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use link::{Link, NotLinks, fits, parse};

use crate::message::{Device, DeviceId};

/// What a device registers.
#[derive(Clone, Debug)]
pub struct Offer<V> {
    /// `d`: a name for a group of devices.
    pub sector: Option<Box<str>>,
    /// `None`: [`LIFETIME_DEFAULT_SECS`].
    pub lifetime_secs: Option<u32>,
    /// Where its resources are, as a URI without a path.
    pub base: Box<str>,
    /// What else it says of itself: `et` and its like.
    pub attributes: Vec<(Box<str>, Box<str>)>,
    pub links: Vec<Link>,
    pub via: V,
}

/// What a registered device changes: the address is that of its last request.
#[derive(Clone, Debug)]
pub struct Renewal<V> {
    pub lifetime_secs: Option<u32>,
    pub base: Box<str>,
    pub attributes: Vec<(Box<str>, Box<str>)>,
    pub via: V,
}

/// A device's entry.
#[derive(Debug)]
pub struct Registration<V> {
    /// Tells it from what the same device registered before and after.
    pub serial: u64,
    pub device: Arc<Device>,
    pub sector: Option<Box<str>>,
    pub base: Box<str>,
    pub attributes: Vec<(Box<str>, Box<str>)>,
    pub links: Vec<Link>,
    pub via: V,
    lifetime: Duration,
    expires: Instant,
}

/// The table is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// See the module's documentation.
#[derive(Debug)]
pub struct Directory<V> {
    rows: HashMap<DeviceId, Registration<V>>,
    expiries: BTreeSet<(Instant, DeviceId)>,
    serial: u64,
}

/// What a lookup asks for: every filter has to hold (RFC 9176 section 6.2).
#[derive(Clone, Debug, Default)]
pub struct Wanted<'q> {
    pub filters: Vec<(&'q str, &'q str)>,
    pub page: usize,
    /// Links on a page; `None`: all.
    pub count: Option<usize>,
}

impl<V> Default for Directory<V> {
    fn default() -> Self {
        Directory { rows: HashMap::new(), expiries: BTreeSet::new(), serial: 0 }
    }
}

impl<V> Directory<V> {
    /// Takes a registration in and gives its serial number.
    ///
    /// # Errors
    /// [`Full`] when it would be one more than `registrations_max`.
    pub fn register(
        &mut self,
        device: Arc<Device>,
        offer: Offer<V>,
        registrations_max: usize,
        now: Instant,
    ) -> Result<u64, Full> {
        self.expire(now);
        if self.rows.len() >= registrations_max && !self.rows.contains_key(&device.id) {
            return Err(Full);
        }
        self.remove(&device.id);
        self.serial += 1;
        let lifetime = seconds(offer.lifetime_secs.unwrap_or(LIFETIME_DEFAULT_SECS));
        let expires = now + lifetime;
        self.expiries.insert((expires, device.id.clone()));
        let Offer { sector, base, attributes, links, via, .. } = offer;
        let serial = self.serial;
        let id = device.id.clone();
        let row = Registration { serial, device, sector, base, attributes, links, via, lifetime, expires };
        self.rows.insert(id, row);
        Ok(serial)
    }

    /// Renews a registration; `None` where there is none. At another address it is another one.
    pub fn renew(&mut self, id: &DeviceId, renewal: Renewal<V>, now: Instant) -> Option<&Registration<V>> {
        self.expire(now);
        let row = self.rows.get_mut(id)?;
        if row.base != renewal.base {
            self.serial += 1;
            row.serial = self.serial;
        }
        self.expiries.remove(&(row.expires, id.clone()));
        row.lifetime = renewal.lifetime_secs.map_or(row.lifetime, seconds);
        row.expires = now + row.lifetime;
        row.base = renewal.base;
        row.via = renewal.via;
        if !renewal.attributes.is_empty() {
            row.attributes = renewal.attributes;
        }
        self.expiries.insert((row.expires, id.clone()));
        Some(row)
    }

    pub fn remove(&mut self, id: &DeviceId) -> Option<Registration<V>> {
        let row = self.rows.remove(id)?;
        self.expiries.remove(&(row.expires, id.clone()));
        Some(row)
    }

    pub fn find(&self, id: &DeviceId, now: Instant) -> Option<&Registration<V>> {
        self.rows.get(id).filter(|row| row.expires > now)
    }

    /// Forgets what is not kept up.
    pub fn expire(&mut self, now: Instant) {
        while let Some((at, id)) = self.expiries.first().cloned() {
            if at > now {
                break;
            }
            self.expiries.pop_first();
            self.rows.remove(&id);
        }
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The registered resources that `wanted` leaves of those that `is_visible` shows, in link format, with targets resolved (RFC 9176 section 6.3).
    pub fn resources(
        &self,
        wanted: &Wanted<'_>,
        now: Instant,
        is_visible: impl Fn(&DeviceId, &Link) -> bool,
    ) -> String {
        let mut page = Page::new(wanted);
        for row in self.sorted(now) {
            for link in &row.links {
                let holds = |(name, value): &(&str, &str)| row.has(name, value) || row.link_has(link, name, value);
                if wanted.filters.iter().all(holds) && is_visible(&row.device.id, link) && page.takes() {
                    let out = page.next();
                    // Writing to a String cannot fail.
                    let _ = write!(out, "<{}{}>", row.base, link.target);
                    for attribute in &link.attributes {
                        let _ = write!(out, ";{attribute}");
                    }
                }
            }
        }
        page.out
    }

    /// The registered devices (RFC 9176 section 6.4): of which something is visible, or that `is_own` says are the asker.
    pub fn endpoints(
        &self,
        wanted: &Wanted<'_>,
        now: Instant,
        is_own: impl Fn(&DeviceId) -> bool,
        is_visible: impl Fn(&DeviceId, &Link) -> bool,
    ) -> String {
        let mut page = Page::new(wanted);
        for row in self.sorted(now) {
            let id = &row.device.id;
            // An endpoint is found by its resources too, of which those count that may be seen.
            let links: Vec<&Link> = row.links.iter().filter(|link| is_own(id) || is_visible(id, link)).collect();
            let holds = |(name, value): &(&str, &str)| {
                row.has(name, value) || links.iter().any(|link| row.link_has(link, name, value))
            };
            if (is_own(id) || !links.is_empty()) && wanted.filters.iter().all(holds) && page.takes() {
                let out = page.next();
                let _ = write!(out, "</rd/{id}>;ep=\"{id}\";base=\"{}\"", row.base);
                for (name, value) in row.sector.iter().map(|d| ("d", d)).chain(row.own()) {
                    let _ = write!(out, ";{name}=\"{value}\"");
                }
                let _ = write!(out, ";lt={};rt=\"core.rd-ep\"", row.lifetime.as_secs());
            }
        }
        page.out
    }

    fn sorted(&self, now: Instant) -> Vec<&Registration<V>> {
        let mut rows: Vec<_> = self.rows.values().filter(|row| row.expires > now).collect();
        rows.sort_unstable_by_key(|row| row.serial);
        rows
    }
}

impl<V> Registration<V> {
    fn own(&self) -> impl Iterator<Item = (&str, &Box<str>)> {
        self.attributes.iter().map(|(name, value)| (&**name, value))
    }

    fn has(&self, name: &str, wanted: &str) -> bool {
        match name {
            "ep" => fits(self.device.id.as_str(), wanted),
            "d" => self.sector.as_deref().is_some_and(|sector| fits(sector, wanted)),
            "base" => fits(&self.base, wanted),
            "rt" if wanted == "core.rd-ep" => true,
            "href" => fits(&format!("/rd/{}", self.device.id), wanted),
            _ => self.own().any(|(own, value)| own == name && fits(value, wanted)),
        }
    }

    fn link_has(&self, link: &Link, name: &str, wanted: &str) -> bool {
        match name {
            "href" => fits(&link.target, wanted) || fits(&format!("{}{}", self.base, link.target), wanted),
            _ => link.has(name, wanted),
        }
    }
}

/// One page of a listing.
struct Page {
    out: String,
    skip: usize,
    left: usize,
}

impl Page {
    fn new(wanted: &Wanted<'_>) -> Self {
        let left = wanted.count.unwrap_or(LINKS_SHOWN_MAX).min(LINKS_SHOWN_MAX);
        Page { out: String::new(), skip: wanted.page.saturating_mul(left), left }
    }

    fn takes(&mut self) -> bool {
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        let takes = self.left > 0;
        self.left = self.left.saturating_sub(1);
        takes
    }

    fn next(&mut self) -> &mut String {
        if !self.out.is_empty() {
            self.out.push(',');
        }
        &mut self.out
    }
}

fn seconds(secs: u32) -> Duration {
    Duration::from_secs(secs.into())
}

/// RFC 9176 section 5: 25 hours.
pub const LIFETIME_DEFAULT_SECS: u32 = 90_000;

/// Links of one answer; more come on further pages.
const LINKS_SHOWN_MAX: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    fn device(id: &str) -> Arc<Device> {
        let id = DeviceId::parse(id).unwrap();
        Arc::new(Device { id, index: 1, generation: 1, role: "sensor".into(), attributes: Vec::new() })
    }

    fn offer(host: &str, links: &str) -> Offer<u8> {
        Offer {
            sector: Some("floor-1".into()),
            lifetime_secs: Some(60),
            base: format!("coap://{host}").into(),
            attributes: vec![("et".into(), "thermo".into())],
            links: parse(links.as_bytes(), 16).unwrap(),
            via: 0,
        }
    }

    fn filled(now: Instant) -> Directory<u8> {
        let mut directory = Directory::default();
        directory.register(device("a"), offer("192.0.2.1", "</t>;rt=\"temp\";obs,</h>;rt=\"hum\""), 2, now).unwrap();
        directory.register(device("b"), offer("192.0.2.2", "</t>;rt=\"temp x\""), 2, now).unwrap();
        directory
    }

    fn resources(directory: &Directory<u8>, filters: &[(&str, &str)], page: usize, count: Option<usize>) -> String {
        let wanted = Wanted { filters: filters.to_vec(), page, count };
        directory.resources(&wanted, directory.rows[&id("a")].expires - seconds(1), |_, _| true)
    }

    fn id(text: &str) -> DeviceId {
        DeviceId::parse(text).unwrap()
    }

    #[test]
    fn resources_are_found_by_their_own_and_their_devices_attributes_on_pages() {
        let directory = filled(Instant::now());
        let (at, ah, bt) = (
            "<coap://192.0.2.1/t>;rt=\"temp\";obs",
            "<coap://192.0.2.1/h>;rt=\"hum\"",
            "<coap://192.0.2.2/t>;rt=\"temp x\"",
        );
        let all = [at, ah, bt].join(",");
        for (filters, found) in [
            (&[][..], all.clone()),
            (&[("rt", "temp")], [at, bt].join(",")),
            (&[("rt", "temp"), ("ep", "b")], bt.into()),
            (&[("rt", "h*")], ah.into()),
            (&[("href", "/t"), ("et", "thermo")], [at, bt].join(",")),
            (&[("href", "coap://192.0.2.2/*")], bt.into()),
            (&[("d", "floor-1"), ("obs", "")], at.into()),
            (&[("d", "floor-2")], String::new()),
            (&[("ep", "*")], all),
        ] {
            assert_eq!(resources(&directory, filters, 0, None), found, "{filters:?}");
        }
        assert_eq!(resources(&directory, &[], 1, Some(1)), ah);
        assert_eq!(resources(&directory, &[], 1, Some(2)), bt);
        assert_eq!(resources(&directory, &[], 2, Some(2)), "");
        assert_eq!(resources(&directory, &[], usize::MAX, Some(2)), "");
        assert_eq!(resources(&directory, &[], 0, Some(0)), "");
    }

    #[test]
    fn only_what_may_be_seen_is_found_and_a_device_sees_itself() {
        let now = Instant::now();
        let directory = filled(now);
        let wanted = Wanted { filters: vec![("rt", "temp")], ..Wanted::default() };
        let nothing = |_: &DeviceId, _: &Link| false;
        assert_eq!(directory.resources(&wanted, now, nothing), "");
        assert_eq!(directory.endpoints(&Wanted::default(), now, |_| false, nothing), "");
        let hidden = |device: &DeviceId, link: &Link| device.as_str() == "a" && &*link.target == "/h";
        assert_eq!(directory.endpoints(&wanted, now, |_| false, hidden), "", "found by nothing that is hidden");
        assert_eq!(
            directory.endpoints(&Wanted::default(), now, |device| device.as_str() == "b", nothing),
            "</rd/b>;ep=\"b\";base=\"coap://192.0.2.2\";d=\"floor-1\";et=\"thermo\";lt=60;rt=\"core.rd-ep\""
        );
    }

    #[test]
    fn a_registration_lives_for_its_lifetime_unless_it_is_renewed_or_replaced() {
        let now = Instant::now();
        let mut directory = filled(now);
        let later = |secs| now + seconds(secs);
        assert!(directory.find(&id("a"), later(59)).is_some() && directory.find(&id("a"), later(60)).is_none());
        let renewal =
            |lifetime_secs| Renewal { lifetime_secs, base: "coap://192.0.2.9".into(), attributes: vec![], via: 1 };
        assert!(directory.renew(&id("a"), renewal(None), later(30)).is_some());
        directory.expire(later(60));
        assert_eq!(directory.len(), 1);
        let row = directory.find(&id("a"), later(89)).unwrap();
        assert_eq!((&*row.base, row.via, row.links.len(), row.attributes.len()), ("coap://192.0.2.9", 1, 2, 1));
        assert!(directory.renew(&id("a"), renewal(Some(5)), later(89)).is_some());
        assert!(directory.renew(&id("a"), renewal(None), later(95)).is_none(), "gone");
        assert!(directory.is_empty() && directory.expiries.is_empty());
    }

    #[test]
    fn the_table_is_bounded_and_a_device_replaces_what_it_said_itself() {
        let now = Instant::now();
        let mut directory = filled(now);
        let before = directory.find(&id("a"), now).unwrap().serial;
        assert_eq!(directory.register(device("c"), offer("192.0.2.3", "</t>"), 2, now), Err(Full));
        assert!(directory.register(device("a"), offer("192.0.2.1", "</new>"), 2, now).unwrap() > before);
        assert_eq!(directory.len(), 2);
        assert_eq!(directory.expiries.len(), 2);
        // What has ended makes room.
        assert!(directory.register(device("c"), offer("192.0.2.3", "</t>"), 2, now + seconds(60)).is_ok());
    }
}

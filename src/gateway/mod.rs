//! L4, the heart: admission for every protocol, and the order of the phases of the message plane.
//!
//! A publish goes through: is the device still current → device rate → route (policy, subscribers, sinks; cached per caller) → rule
//! rate → size → stamp → retain → spool → subscribers → acknowledgement. Each refusal is a [`Reject`], each success a [`Receipt`]; adapters
//! only render them. What takes time (a commit, a slow subscriber) is reported through the caller's [`Completion`].
//!
//! Cost of a repeated publish without forward rule: two atomic loads, one CAS (device bucket), a comparison of the topic, one
//! allocation for the message and one for its payload, then what the hub costs per subscriber.

mod address;
pub mod cached;
mod client;
mod config;
mod directory;
mod durable;
mod publish;
mod reassign;
mod restore;
mod route;
mod stored;
mod subscribe;
mod sys;
mod will;

use std::any::Any;
use std::collections::HashMap;
use std::hash::RandomState;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use portable_atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::directory::Directory;
use crate::hub::{Hub, QueueLimits};
use crate::identity::Identity;
use crate::limit::{self, KeyedBuckets, KeyedWindows};
use crate::message::{
    Action, Caller, CloseReason, Completion, Control, Device, DeviceId, Message, MessageId, Origin, Protocol, Qos,
    Receipt, Reject, Topic,
};
use crate::policy::Policy;
use crate::policy::address::Config as AddressFilter;
use crate::session::{Opening, SessionKey, Sessions};
use crate::spool::{SinkId, Spool};
use crate::telemetry::meters;

pub use address::{Address, Part};
pub use cached::{CacheOutcome, Cached, Errand};
pub use client::{Client, Resume};
pub use config::{Config, Mqtt311Refused, Workers};
pub use directory::{Endpoint, Reach, ReachFault, Reached};
use durable::Durable;
pub use durable::InFlight;
pub use publish::{Done, Draft, Published};
pub use route::step::{Kept, Visit};
pub use route::{
    Bearers, BodySize, BoxError, Dialled, Exchange, Line, ProxyBody, RateLeft, Route, RouteAuth, RouteConfig, Routes,
    ServedBy, UpstreamFault, asked_tunnel, canonical_path, shadowed as shadowed_routes,
};
pub use subscribe::{SendRetained, Subscribed};
pub use will::Will;

// What adapters need of the layers below, so that they import the gateway alone.
pub use crate::directory::{Link, Wanted};
pub use crate::hub::{Delivery, Drained, Filter, Outbox, OutboxLimits, SubscribeOptions, View, is_expired};
pub use crate::identity::{Channel, Login, MqttPending, MqttStep, NotTaken, Now, PublicKey};
pub use crate::limit::{AddressKey, Config as Limits};
pub use crate::session::Session;

/// What a reload replaces, all at once.
pub struct Rules {
    pub policy: Policy,
    pub address_filter: AddressFilter,
    pub limits: limit::Config,
    /// The request plane's table.
    pub routes: Routes,
    /// The role of callers who do not authenticate; empty: there are none.
    pub anonymous_role: Arc<str>,
}

struct Snapshot {
    version: u64,
    rules: Rules,
}

/// A forward rule as the gateway needs it: which topics go to which sink.
pub struct ForwardTopics {
    pub patterns: Vec<Box<str>>,
    pub sink: SinkId,
}

/// See the module's documentation. Shared by all workers.
pub struct Gateway {
    config: Config,
    pub identity: Arc<Identity>,
    pub hub: Arc<Hub>,
    pub sessions: Sessions<Resume>,
    pub spool: Spool,
    forwards: Vec<ForwardTopics>,
    snapshot: ArcSwap<Snapshot>,
    per_address: KeyedBuckets<AddressKey>,
    logins_per_address: KeyedBuckets<AddressKey>,
    per_rule: KeyedBuckets<(u32, u32)>,
    /// By route and whom its rate counts, hashed with a key that strangers do not know.
    per_route: KeyedBuckets<(u64, u64)>,
    per_route_windows: KeyedWindows<(u64, u64)>,
    route_hasher: RandomState,
    /// Not there before a route asks for it.
    cached: OnceLock<Arc<Cached>>,
    sequence: AtomicU64,
    /// Of the next persistent session.
    next_number: AtomicU32,
    /// What devices serve, with the way to each. Asked once a registration, a lookup or a request to a device, and held as briefly.
    directory: Mutex<Directory<Arc<dyn Reach>>>,
    backlog: stored::Backlog,
    reassigner: reassign::Reassigner,
    /// Sessions whose cursor is to be written.
    changed: Mutex<Vec<Arc<Outbox>>>,
    loader: Arc<stored::Loader>,
    /// Wills that wait for their delay, by the number of their session.
    wills: Mutex<HashMap<u32, will::Pending>>,
    draining: AtomicBool,
    started: Instant,
    sys: sys::Sys,
}

/// A session that is to begin.
pub struct Open<'a> {
    /// None for an anonymous caller.
    pub device: Option<Arc<Device>>,
    pub protocol: Protocol,
    pub peer: SocketAddr,
    /// The client's own name for the session: MQTT's Client Identifier, otherwise the peer's address.
    pub client: &'a str,
    /// Discards what an earlier session left.
    pub clean: bool,
    pub mailbox: Mailbox,
}

/// Where a session's messages go.
pub enum Mailbox {
    /// An outbox of its own, drained by its own task.
    Own,
    /// One outbox for many sessions of a worker (`CoAP`), told apart by their tags; `control` ends this one.
    Shared { outbox: Arc<Outbox>, control: Arc<dyn Control> },
}

/// A session that has begun.
pub struct Opened {
    pub client: Client,
    /// The engine's state of the session that continues; `None` if it is new.
    pub resumed: Option<Box<dyn Any + Send>>,
}

/// What is to be kept of a session that ends.
pub struct Keep {
    pub state: Box<dyn Any + Send>,
    /// `None`: for as long as the gateway runs.
    pub expiry: Option<Duration>,
}

impl Gateway {
    pub fn new(
        config: Config,
        identity: Arc<Identity>,
        spool: Spool,
        forwards: Vec<ForwardTopics>,
        rules: Rules,
        now: Instant,
    ) -> Self {
        let limits = &rules.limits;
        let hub = Arc::new(Hub::new(limits));
        let backlog = stored::Backlog::new(spool.clone());
        Gateway {
            sessions: Sessions::new(limits.sessions_max as usize, limits.persistent_sessions_max as usize),
            per_address: KeyedBuckets::new(limits.buckets_max as usize),
            logins_per_address: KeyedBuckets::new(limits.buckets_max as usize),
            per_rule: KeyedBuckets::new(limits.buckets_max as usize),
            per_route: KeyedBuckets::new(limits.buckets_max as usize),
            per_route_windows: KeyedWindows::new(limits.buckets_max as usize),
            route_hasher: RandomState::new(),
            cached: OnceLock::new(),
            config,
            identity,
            loader: Arc::new(stored::Loader(spool.clone())),
            spool,
            forwards,
            snapshot: ArcSwap::from_pointee(Snapshot { version: 1, rules }),
            sequence: AtomicU64::new(1),
            next_number: AtomicU32::new(1),
            directory: Mutex::default(),
            reassigner: reassign::Reassigner::new(hub.clone(), backlog.clone()),
            hub,
            backlog,
            changed: Mutex::default(),
            wills: Mutex::default(),
            draining: AtomicBool::new(false),
            started: now,
            sys: sys::Sys::default(),
        }
    }

    /// The cache of routes; made when first asked for.
    pub fn cached(&self) -> &Arc<Cached> {
        self.cached.get_or_init(|| Arc::new(Cached::new(&self.limits(), &self.config.data_dir)))
    }

    /// The same, if a route has asked for it.
    pub fn cached_if_used(&self) -> Option<&Arc<Cached>> {
        self.cached.get()
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The limits now in force.
    pub fn limits(&self) -> limit::Config {
        self.snapshot.load().rules.limits.clone()
    }

    /// Calls `look` with the rules now in force.
    pub fn with_rules<T>(&self, look: impl FnOnce(&Rules) -> T) -> T {
        look(&self.snapshot.load().rules)
    }

    /// Puts new rules in force for every message from now on.
    pub fn replace_rules(&self, rules: Rules) {
        let version = self.snapshot.load().version + 1;
        self.hub.waiting.set_max(rules.limits.outbox_bytes_total_max.in_memory());
        rules.routes.take_over(&self.snapshot.load().rules.routes);
        self.snapshot.store(Arc::new(Snapshot { version, rules }));
    }

    /// Nanoseconds since the start, as the buckets count them.
    pub fn nanos(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.started).as_nanos()).unwrap_or(u64::MAX)
    }

    /// Admits a peer by its address alone: once per connection, and per request of an unauthenticated peer.
    ///
    /// # Errors
    /// [`Reject::Forbidden`] by the address filter, [`Reject::TooFast`] over `rate_per_address`.
    pub fn admit_address(&self, peer: IpAddr, now: Instant) -> Result<(), Reject> {
        let snapshot = self.snapshot.load();
        if !snapshot.rules.address_filter.permits(peer) {
            return Err(Reject::Forbidden { rule: None });
        }
        let rate = snapshot.rules.limits.rate_per_address;
        self.per_address
            .check(&AddressKey::from(peer), self.nanos(now), rate, 1)
            .map_err(|retry_after| Reject::TooFast { limit: "rate_per_address", retry_after })
    }

    /// Admits one attempt to authenticate, before any signature is verified.
    ///
    /// # Errors
    /// [`Reject::TooFast`] over `auth_rate_per_address`.
    pub fn admit_login(&self, peer: IpAddr, now: Instant) -> Result<(), Reject> {
        let rate = self.snapshot.load().rules.limits.auth_rate_per_address;
        self.logins_per_address
            .check(&AddressKey::from(peer), self.nanos(now), rate, 1)
            .map_err(|retry_after| Reject::TooFast { limit: "auth_rate_per_address", retry_after })
    }

    /// The role of a caller who does not authenticate.
    ///
    /// # Errors
    /// [`Reject::Unauthenticated`] unless the configuration names one.
    pub fn anonymous_role(&self) -> Result<Arc<str>, Reject> {
        let role = self.snapshot.load().rules.anonymous_role.clone();
        if role.is_empty() { Err(Reject::Unauthenticated) } else { Ok(role) }
    }

    /// Begins a session that ends with its connection, or that only memory keeps; otherwise as [`open_persistent`](Gateway::open_persistent).
    ///
    /// # Errors
    /// As [`open_persistent`](Gateway::open_persistent).
    ///
    /// # Cancel safety
    /// Nothing has begun unless it completes.
    pub async fn open(&self, open: Open<'_>, now: Instant) -> Result<Opened, Reject> {
        self.open_persistent(open, 0, now).await
    }

    /// Begins a session that is kept on disk for `expiry_secs` after its connection, for ever at `u32::MAX`; a live one of the same client is taken over.
    ///
    /// # Errors
    /// [`Reject::Full`] at `sessions_max`, [`Reject::ShuttingDown`], [`Reject::Unauthenticated`] for an anonymous caller where there are none.
    ///
    /// # Cancel safety
    /// Nothing has begun unless it completes.
    pub async fn open_persistent(&self, open: Open<'_>, expiry_secs: u32, now: Instant) -> Result<Opened, Reject> {
        if self.is_draining() {
            return Err(Reject::ShuttingDown);
        }
        let role = match &open.device {
            Some(device) => device.role.clone(),
            None => self.anonymous_role()?,
        };
        let registry_version = self.identity.registry_version();
        let (limits, _) = self.outbox_limits();
        let key = SessionKey {
            device: open.device.as_ref().map(|d| d.id.clone()),
            protocol: open.protocol,
            client: open.client.into(),
        };
        let opening =
            Opening { key, device: open.device.as_ref(), peer: open.peer, clean: open.clean, now, now_ms: wall_ms() };
        let mut own = None;
        let opened = self
            .sessions
            .open(opening, |id, resumed| match open.mailbox {
                Mailbox::Shared { outbox, control } => {
                    own = Some(outbox);
                    control
                }
                Mailbox::Own => {
                    let outbox = match resumed {
                        Some(resume) => resume.outbox.clone(),
                        None if expiry_secs > 0 => self.persistent_outbox(id, self.new_number()),
                        None => Arc::new(Outbox::counted(id, limits, &self.hub.waiting)),
                    };
                    own = Some(outbox.clone());
                    outbox
                }
            })
            .await?;
        if let Some(discarded) = opened.discarded {
            self.discard(discarded);
        }
        meters().of(open.protocol).sessions.increment(1);
        let (filters, resumed) = match opened.resumed {
            Some(mut resume) => {
                resume.outbox.unpark();
                if let Some(state) = resume.state.downcast_mut::<InFlight>() {
                    state.received = resume.outbox.received_ids();
                }
                (resume.filters, Some(resume.state))
            }
            None => (Vec::new(), None),
        };
        let session = opened.session;
        // `control` always ran: it is what made the session.
        let outbox = own.unwrap_or_else(|| Arc::new(Outbox::counted(session.id, limits, &self.hub.waiting)));
        let durable = outbox.number().map(|number| {
            self.store_session(number, expiry_secs, &session.key, None);
            self.keep_will_back(number);
            let in_flight = resumed.as_ref().and_then(|state| state.downcast_ref::<InFlight>());
            let unreleased = in_flight.map(|state| state.unreleased.clone()).unwrap_or_default();
            Durable { number, expiry_secs, unreleased }
        });
        if let (true, Some(device)) = (opened.first_of_device, &open.device) {
            self.announce_presence(&device.id, Some(open.protocol), now);
        }
        let caller =
            Caller { device: open.device, role, protocol: open.protocol, peer: open.peer, session: session.id };
        let client = Client {
            caller,
            session,
            outbox,
            routes: client::TopicRoutes::default(),
            reads: crate::policy::DecisionCache::new(),
            registry_version,
            filters,
            durable,
            will: None,
            crowded: None,
            scratch: String::new(),
        };
        Ok(Opened { client, resumed })
    }

    /// Ends a session, keeping what the protocol asks to keep.
    pub fn close(&self, client: Client, keep: Option<Keep>, now: Instant) {
        let Client { session, outbox, filters, caller, durable, will, .. } = client;
        let kept = keep.as_ref().filter(|_| durable.is_some()).map(|keep| keep.expiry.unwrap_or(Duration::MAX));
        meters().of(caller.protocol).sessions.decrement(1);
        let keep = match keep {
            Some(keep) => {
                let expires = keep.expiry.map(|expiry| now + expiry);
                let state = match durable {
                    Some(durable) => self.park_session(durable, &session.key, &outbox, keep),
                    None => {
                        outbox.park();
                        keep.state
                    }
                };
                Some((Resume { outbox, filters, state }, expires))
            }
            None => {
                self.remove_subscriptions(&outbox, &filters);
                if let Some(Durable { number, unreleased, .. }) = durable {
                    self.forget_session(number, &outbox, &filters, &unreleased);
                }
                // A shared outbox lives on: it is not of this session.
                if outbox.session() == session.id {
                    self.reassign(outbox.end());
                }
                None
            }
        };
        let (last_of_device, refused) = self.sessions.close(&session, keep);
        if let Some(resume) = refused {
            tracing::warn!(session = session.id.0, "persistent_sessions_max reached, session state dropped");
            self.discard(resume);
        }
        if let Some(will) = will {
            self.end_will(*will, kept, now);
        }
        if let (true, Some(device)) = (last_of_device, &caller.device) {
            self.announce_presence(&device.id, None, now);
        }
    }

    /// Checks that the caller's credential still holds, as after every change of the registry.
    ///
    /// # Errors
    /// [`Reject::Unauthenticated`] once the device is revoked, disabled or has other keys.
    pub fn check_current(&self, client: &mut Client) -> Result<(), Reject> {
        let version = self.identity.registry_version();
        if client.registry_version == version {
            return Ok(());
        }
        if let Some(device) = &client.caller.device
            && !self.identity.is_current(device)
        {
            return Err(Reject::Unauthenticated);
        }
        client.registry_version = version;
        Ok(())
    }

    /// The work of every second: expired sessions, idle buckets, revoked devices, slow readers.
    pub fn tick(&self, now: Instant) {
        let nanos = self.nanos(now);
        for resume in self.sessions.sweep(now, nanos) {
            self.discard(resume);
        }
        for buckets in [&self.per_address, &self.logins_per_address] {
            buckets.sweep(nanos, BUCKETS_SWEPT);
        }
        self.per_rule.sweep(nanos, BUCKETS_SWEPT);
        self.per_route.sweep(nanos, BUCKETS_SWEPT);
        self.per_route_windows.sweep(nanos, BUCKETS_SWEPT);
        self.expire_retained(wall_ms());
        self.directory.lock().expire(now);
        self.store_cursors();
        self.publish_wills(now);
        self.publish_sys(now);
        self.sessions.close_where(CloseReason::NotAuthorized, |session| {
            session.device.as_ref().is_some_and(|device| !self.identity.is_current(device))
        });
    }

    /// Refuses new sessions and messages from now on, and tells the live sessions to end.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        self.sessions.close_where(CloseReason::ShuttingDown, |_| true);
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    fn outbox_limits(&self) -> (OutboxLimits, QueueLimits) {
        let snapshot = self.snapshot.load();
        let limits = &snapshot.rules.limits;
        let outbox = OutboxLimits {
            messages_max: limits.outbox_messages_max as usize,
            bytes_max: limits.outbox_bytes_max.in_memory(),
            crowded_wait: Duration::from_millis(limits.crowded_wait_ms.into()),
        };
        let queue = QueueLimits {
            messages_max: limits.session_queue_messages_max as usize,
            bytes_max: limits.session_queue_bytes_max.bytes(),
        };
        (outbox, queue)
    }

    fn discard(&self, resume: Resume) {
        self.remove_subscriptions(&resume.outbox, &resume.filters);
        if let Some(number) = resume.outbox.number() {
            let in_flight = resume.state.downcast_ref::<InFlight>();
            let unreleased = in_flight.map(|state| &state.unreleased[..]).unwrap_or_default();
            self.forget_session(number, &resume.outbox, &resume.filters, unreleased);
            self.hurry_will(number, Instant::now());
        }
    }

    fn remove_subscriptions(&self, outbox: &Outbox, filters: &[(Filter, u64)]) {
        for (filter, tag) in filters {
            self.hub.unsubscribe(filter, outbox.session(), *tag);
        }
    }

    fn announce_presence(&self, device: &DeviceId, protocol: Option<Protocol>, now: Instant) {
        if !self.config.presence || self.is_draining() {
            return;
        }
        let payload = match protocol {
            Some(protocol) => {
                format!(r#"{{"online":true,"protocol":"{}","since_ms":{}}}"#, protocol.as_str(), wall_ms())
            }
            None => format!(r#"{{"online":false,"since_ms":{}}}"#, wall_ms()),
        };
        if let Ok(topic) = Topic::parse(&format!("dev/{device}/presence"))
            && let Err(reject) = self.emit(topic, payload.into(), true, now)
        {
            tracing::debug!(device = device.as_str(), reason = %reject, "presence not announced");
        }
    }

    fn message_id(&self) -> MessageId {
        MessageId { epoch: self.spool.epoch(), seq: self.sequence.fetch_add(1, Ordering::Relaxed) }
    }
}

/// The wall clock, milliseconds since 1970; 0 before that.
pub fn wall_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Buckets looked at per second and shard: keeps the sweep short, and a full table is swept within a minute.
const BUCKETS_SWEPT: usize = 256;

#[cfg(test)]
mod tests;

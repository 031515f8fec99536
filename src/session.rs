//! The session table: who is connected, over which protocol, since when; and what is kept for who will come back.
//!
//! One owner for all protocols. A lock is taken when a session opens or ends and when an operator looks, never per message: what
//! changes with every message are the counters inside [`Session`].

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use portable_atomic::{AtomicU64, Ordering};
use tokio::sync::Notify;

use crate::limit::Gcra;
use crate::message::{CloseReason, Control, Device, DeviceId, Protocol, Reject, SessionId};

/// What distinguishes two sessions of one device: the protocol and the client's own name for it (the MQTT Client Identifier,
/// the `CoAP` or HTTP peer address). Scoped by the device, so that nobody can take over a stranger's session.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SessionKey {
    pub device: Option<DeviceId>,
    pub protocol: Protocol,
    pub client: Box<str>,
}

/// One live session, as every protocol sees it.
pub struct Session {
    pub id: SessionId,
    pub key: SessionKey,
    pub device: Option<Arc<Device>>,
    pub peer: SocketAddr,
    /// Wall clock, milliseconds since 1970.
    pub since_ms: u64,
    pub last_seen_ms: AtomicU64,
    /// Messages from the device.
    pub received: AtomicU64,
    /// Messages to the device.
    pub delivered: AtomicU64,
    pub refused: AtomicU64,
    /// Shared by all sessions of the device: its rate limit holds over all protocols together.
    pub standing: Arc<Standing>,
    control: Arc<dyn Control>,
}

impl Session {
    /// Tells the session's own task to end it.
    pub fn close(&self, reason: CloseReason) {
        self.control.close(reason);
    }
}

/// What all sessions of one device have in common.
#[derive(Default)]
pub struct Standing {
    pub bucket: Gcra,
}

/// What a session leaves behind for the client to come back to; `R` is the gateway's business.
struct Parked<R> {
    id: SessionId,
    resume: R,
    expires: Option<Instant>,
}

/// See the module's documentation.
pub struct Sessions<R> {
    sessions_max: usize,
    parked_max: usize,
    next: AtomicU64,
    inner: Mutex<Inner<R>>,
    /// Told whenever a session ends: a takeover waits for it.
    ended: Notify,
}

struct Inner<R> {
    live: HashMap<SessionId, Arc<Session>>,
    by_key: HashMap<SessionKey, SessionId>,
    parked: HashMap<SessionKey, Parked<R>>,
    devices: HashMap<DeviceId, DeviceEntry>,
}

struct DeviceEntry {
    standing: Arc<Standing>,
    live: u32,
}

/// A session that is about to begin.
pub struct Opening<'a> {
    pub key: SessionKey,
    pub device: Option<&'a Arc<Device>>,
    pub peer: SocketAddr,
    /// Discards what an earlier session with this key left.
    pub clean: bool,
    pub now: Instant,
    pub now_ms: u64,
}

/// A session that has begun.
pub struct Opened<R> {
    pub session: Arc<Session>,
    /// What the earlier session left, unless a clean start was asked for.
    pub resumed: Option<R>,
    /// What the earlier session left and a clean start or its expiry threw away: its subscriptions have to go.
    pub discarded: Option<R>,
    /// The device had no other live session.
    pub first_of_device: bool,
}

impl<R> Sessions<R> {
    /// A table for at most `sessions_max` live and `parked_max` parked sessions.
    pub fn new(sessions_max: usize, parked_max: usize) -> Self {
        Sessions {
            sessions_max,
            parked_max,
            next: AtomicU64::new(1),
            inner: Mutex::new(Inner {
                live: HashMap::new(),
                by_key: HashMap::new(),
                parked: HashMap::new(),
                devices: HashMap::new(),
            }),
            ended: Notify::new(),
        }
    }

    /// Begins a session. A live one with the same key is told to end first (takeover), and this waits until it has, so that what
    /// it leaves is complete.
    ///
    /// `control` is called with the session's id, which is the parked one's when that is resumed, and with what was resumed.
    ///
    /// # Errors
    /// [`Reject::Full`] at `sessions_max`, or when the old session does not end.
    ///
    /// # Cancel safety
    /// Nothing has begun unless it completes.
    pub async fn open(
        &self,
        opening: Opening<'_>,
        control: impl FnOnce(SessionId, Option<&R>) -> Arc<dyn Control>,
    ) -> Result<Opened<R>, Reject> {
        let deadline = tokio::time::sleep(TAKEOVER_TIMEOUT);
        tokio::pin!(deadline);
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            match self.live_with_key(&opening.key) {
                None => {
                    let mut inner = self.inner.lock();
                    // Somebody else may have opened the same key between the two locks.
                    if !inner.by_key.contains_key(&opening.key) {
                        return self.insert(&mut inner, opening, control);
                    }
                }
                Some(old) => old.close(CloseReason::TakenOver),
            }
            tokio::select! {
                () = &mut ended => {}
                () = &mut deadline => return Err(Reject::Full { limit: "takeover", retry_after: TAKEOVER_TIMEOUT }),
            }
        }
    }

    fn live_with_key(&self, key: &SessionKey) -> Option<Arc<Session>> {
        let inner = self.inner.lock();
        inner.by_key.get(key).and_then(|id| inner.live.get(id)).cloned()
    }

    fn insert(
        &self,
        inner: &mut Inner<R>,
        opening: Opening<'_>,
        control: impl FnOnce(SessionId, Option<&R>) -> Arc<dyn Control>,
    ) -> Result<Opened<R>, Reject> {
        if inner.live.len() >= self.sessions_max {
            return Err(Reject::Full { limit: "sessions_max", retry_after: FULL_RETRY });
        }
        let over = |parked: &Parked<R>| parked.expires.is_some_and(|at| at <= opening.now);
        let (resumed, discarded) = match inner.parked.remove(&opening.key) {
            Some(parked) if opening.clean || over(&parked) => (None, Some(parked.resume)),
            Some(parked) => (Some((parked.id, parked.resume)), None),
            None => (None, None),
        };
        let fresh = || SessionId(self.next.fetch_add(1, Ordering::Relaxed));
        let id = resumed.as_ref().map_or_else(fresh, |(id, _)| *id);
        let resumed = resumed.map(|(_, resume)| resume);
        let mut first_of_device = false;
        let standing = match opening.device {
            None => Arc::default(),
            Some(device) => {
                let entry = inner.devices.entry(device.id.clone());
                let entry = entry.or_insert_with(|| DeviceEntry { standing: Arc::default(), live: 0 });
                first_of_device = entry.live == 0;
                entry.live += 1;
                entry.standing.clone()
            }
        };
        let session = Arc::new(Session {
            id,
            control: control(id, resumed.as_ref()),
            key: opening.key.clone(),
            device: opening.device.cloned(),
            peer: opening.peer,
            since_ms: opening.now_ms,
            last_seen_ms: AtomicU64::new(opening.now_ms),
            received: AtomicU64::new(0),
            delivered: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            standing,
        });
        inner.by_key.insert(opening.key, id);
        inner.live.insert(id, session.clone());
        Ok(Opened { session, resumed, discarded, first_of_device })
    }

    /// Ends a session; true if the device has no other. With `keep`, what is to be found by the next session with this key, until
    /// the given instant (`None`: for ever). Gives back what could not be kept.
    pub fn close(&self, session: &Session, keep: Option<(R, Option<Instant>)>) -> (bool, Option<R>) {
        let mut inner = self.inner.lock();
        let mut last_of_device = false;
        if inner.live.remove(&session.id).is_some() {
            if inner.by_key.get(&session.key) == Some(&session.id) {
                inner.by_key.remove(&session.key);
            }
            if let Some(id) = &session.key.device
                && let Some(entry) = inner.devices.get_mut(id)
            {
                entry.live = entry.live.saturating_sub(1);
                last_of_device = entry.live == 0;
            }
        }
        let refused = match keep {
            Some((resume, expires)) if inner.parked.len() < self.parked_max => {
                inner.parked.insert(session.key.clone(), Parked { id: session.id, resume, expires });
                None
            }
            Some((resume, _)) => Some(resume),
            None => None,
        };
        drop(inner);
        self.ended.notify_waiters();
        (last_of_device, refused)
    }

    /// Puts back a session that an earlier run had parked; `resume` makes what it left from its new id. Gives it back when there is no room.
    ///
    /// # Errors
    /// What `resume` made, at `parked_max`.
    pub fn restore(
        &self,
        key: SessionKey,
        expires: Option<Instant>,
        resume: impl FnOnce(SessionId) -> R,
    ) -> Result<(), R> {
        let id = SessionId(self.next.fetch_add(1, Ordering::Relaxed));
        let resume = resume(id);
        let mut inner = self.inner.lock();
        if inner.parked.len() >= self.parked_max {
            return Err(resume);
        }
        inner.parked.insert(key, Parked { id, resume, expires });
        Ok(())
    }

    /// Forgets parked sessions whose time is over and the standing of devices long gone; gives back what they had left.
    pub fn sweep(&self, now: Instant, now_nanos: u64) -> Vec<R> {
        let mut inner = self.inner.lock();
        let over: Vec<SessionKey> = inner
            .parked
            .iter()
            .filter(|(_, parked)| parked.expires.is_some_and(|at| at <= now))
            .map(|(key, _)| key.clone())
            .collect();
        let left = over.iter().filter_map(|key| inner.parked.remove(key)).map(|parked| parked.resume).collect();
        // A full bucket is the same as no bucket, so it can go without handing out tokens.
        inner.devices.retain(|_, entry| entry.live > 0 || !entry.standing.bucket.is_full(now_nanos));
        left
    }

    /// All live sessions, in no order.
    pub fn live(&self) -> Vec<Arc<Session>> {
        self.inner.lock().live.values().cloned().collect()
    }

    /// The numbers of live and parked sessions.
    pub fn counts(&self) -> (usize, usize) {
        let inner = self.inner.lock();
        (inner.live.len(), inner.parked.len())
    }

    /// Tells every session for which `which` holds to end.
    pub fn close_where(&self, reason: CloseReason, which: impl Fn(&Session) -> bool) -> usize {
        let chosen: Vec<Arc<Session>> = self.live().into_iter().filter(|s| which(s)).collect();
        for session in &chosen {
            session.close(reason);
        }
        chosen.len()
    }
}

/// How long a takeover waits for the old session's task, which only has to notice.
const TAKEOVER_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);
const FULL_RETRY: std::time::Duration = std::time::Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[derive(Default)]
    struct Told(Mutex<Option<CloseReason>>, Notify);

    impl Control for Told {
        fn close(&self, reason: CloseReason) {
            *self.0.lock() = Some(reason);
            self.1.notify_one();
        }
    }

    fn device(id: &str) -> Arc<Device> {
        let id = DeviceId::parse(id).unwrap();
        Arc::new(Device { id, index: 1, generation: 0, role: "sensor".into(), attributes: vec![] })
    }

    fn opening<'a>(device: &'a Arc<Device>, client: &str, clean: bool) -> Opening<'a> {
        Opening {
            key: SessionKey { device: Some(device.id.clone()), protocol: Protocol::Mqtt, client: client.into() },
            device: Some(device),
            peer: ([127, 0, 0, 1], 1).into(),
            clean,
            now: Instant::now(),
            now_ms: 0,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_takeover_waits_until_the_old_session_has_left_its_state() {
        let sessions: Arc<Sessions<&'static str>> = Arc::new(Sessions::new(10, 10));
        let device = device("a");
        let told = Arc::new(Told::default());
        let first = sessions.open(opening(&device, "c", false), |_, _| told.clone()).await.unwrap();
        assert!(first.first_of_device && first.resumed.is_none());

        let old = {
            let (sessions, told) = (sessions.clone(), told.clone());
            tokio::spawn(async move {
                told.1.notified().await;
                sessions.close(&first.session, Some(("left", None)))
            })
        };
        let second = sessions.open(opening(&device, "c", false), |_, _| Arc::new(Told::default())).await.unwrap();
        assert_eq!(*told.0.lock(), Some(CloseReason::TakenOver));
        assert_eq!(second.resumed, Some("left"));
        assert_eq!(old.await.unwrap(), (true, None));
        assert_eq!(sessions.counts(), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_that_does_not_end_refuses_the_takeover() {
        let sessions: Sessions<()> = Sessions::new(10, 10);
        let device = device("a");
        let first = sessions.open(opening(&device, "c", true), |_, _| Arc::new(Told::default())).await.unwrap();
        let second = sessions.open(opening(&device, "c", true), |_, _| Arc::new(Told::default())).await;
        assert!(matches!(second, Err(Reject::Full { limit: "takeover", .. })));
        sessions.close(&first.session, None);
        assert!(sessions.open(opening(&device, "c", true), |_, _| Arc::new(Told::default())).await.is_ok());
    }

    #[tokio::test]
    async fn clean_start_and_expiry_discard_what_was_left() {
        let sessions: Sessions<u8> = Sessions::new(10, 10);
        let device = device("a");
        let control = |_: SessionId, _: Option<&u8>| -> Arc<dyn Control> { Arc::new(Told::default()) };
        let opened = sessions.open(opening(&device, "c", false), control).await.unwrap();
        sessions.close(&opened.session, Some((1, None)));
        let opened = sessions.open(opening(&device, "c", true), control).await.unwrap();
        assert_eq!((opened.resumed, opened.discarded), (None, Some(1)));

        let now = Instant::now();
        sessions.close(&opened.session, Some((3, Some(now))));
        let opened = sessions.open(opening(&device, "c", false), control).await.unwrap();
        assert_eq!((opened.resumed, opened.discarded), (None, Some(3)));

        sessions.close(&opened.session, Some((2, Some(now + Duration::from_secs(5)))));
        assert!(sessions.sweep(now, 0).is_empty());
        assert_eq!(sessions.sweep(now + Duration::from_secs(6), 0), [2]);
        assert_eq!(sessions.counts(), (0, 0));
    }

    #[tokio::test]
    async fn the_table_is_bounded_and_devices_do_not_share_keys() {
        let sessions: Sessions<()> = Sessions::new(2, 0);
        let (a, b) = (device("a"), device("b"));
        let control = |_: SessionId, _: Option<&()>| -> Arc<dyn Control> { Arc::new(Told::default()) };
        let first = sessions.open(opening(&a, "c", true), control).await.unwrap();
        let second = sessions.open(opening(&b, "c", true), control).await.unwrap();
        assert_ne!(first.session.id, second.session.id);
        let third = sessions.open(opening(&a, "d", true), control).await;
        assert!(matches!(third, Err(Reject::Full { limit: "sessions_max", .. })));
        // With no room to park, what was left is handed back.
        assert_eq!(sessions.close(&first.session, Some(((), None))), (true, Some(())));
    }

    #[tokio::test]
    async fn all_sessions_of_a_device_share_one_standing() {
        let sessions: Sessions<()> = Sessions::new(10, 10);
        let a = device("a");
        let control = |_: SessionId, _: Option<&()>| -> Arc<dyn Control> { Arc::new(Told::default()) };
        let one = sessions.open(opening(&a, "1", true), control).await.unwrap();
        let two = sessions.open(opening(&a, "2", true), control).await.unwrap();
        assert!(Arc::ptr_eq(&one.session.standing, &two.session.standing));
        assert!(one.first_of_device && !two.first_of_device);
        assert!(!sessions.close(&one.session, None).0);
        assert!(sessions.close(&two.session, None).0);
    }
}

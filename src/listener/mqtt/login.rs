//! CONNECT to CONNACK: who the client is, and which session it gets.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidegate_auth::enhanced;
use tidegate_mqtt::{Accept, ConnectEvent, PacketId, Reason, SessionState, Stage, Version};
use tokio::io::{AsyncRead, AsyncWrite};

use super::Shared;
use super::link::{Link, Out, now};
use super::{message, outcome};
use crate::gateway::{
    Channel, Client, Delivery, Gateway, InFlight, Login, Mailbox, MqttPending, MqttStep, Now, Open, PublicKey, wall_ms,
};
use crate::listener::ConnectionInfo;
use crate::message::{Device, Protocol, Reject};
use crate::telemetry::meters;

/// Names that a client gave itself, as a re-authentication needs them again.
#[derive(Clone)]
pub struct Names {
    pub username: Option<Box<str>>,
    pub client_id: Box<str>,
}

/// A client that may come in.
pub struct Known {
    /// None: anonymous.
    device: Option<Arc<Device>>,
    /// When it has to prove itself again.
    expires: Option<Instant>,
    /// The last data of an enhanced authentication.
    data: Option<Vec<u8>>,
}

impl Known {
    pub fn by(login: Login, data: Option<Vec<u8>>, now: Instant) -> Self {
        Known { device: Some(login.device), expires: now.checked_add(login.lifetime), data }
    }
}

/// What a CONNECT leads to.
pub enum Step {
    Known(Known),
    /// Send AUTH with this data, and wait for the client's.
    Challenge(Vec<u8>, Box<MqttPending>),
}

/// Finds out who a CONNECT is from: by enhanced authentication, by a JWT as password, by the certificate of its TLS, or not at all.
///
/// # Errors
/// The reason for CONNACK.
pub fn identify(
    gateway: &Gateway,
    conn: &ConnectionInfo,
    connect: &ConnectEvent,
    now: Instant,
) -> Result<Step, Reason> {
    let refuse = |reject: Reject| {
        meters().mqtt.reject(&reject);
        outcome::connack(&reject)
    };
    gateway.admit_login(conn.peer.ip(), now).map_err(refuse)?;
    let identity = &gateway.identity;
    let username = connect.username.as_deref();
    if let Some((method, data)) = &connect.auth {
        if &**method != enhanced::METHOD {
            return Err(Reason::BadAuthenticationMethod);
        }
        let step = identity.mqtt_begin(username, &connect.client_id, data.expose(), &channel(conn), Now::read());
        return Ok(match step.map_err(refuse)? {
            MqttStep::Challenge { data, pending } => Step::Challenge(data, pending),
            MqttStep::Done { login, data } => Step::Known(Known::by(login, Some(data), now)),
        });
    }
    if let Some(password) = &connect.password {
        let login = identity.login_jwt(username, &connect.client_id, password.expose(), Now::read());
        return Ok(Step::Known(Known::by(login.map_err(refuse)?, None, now)));
    }
    if let Some(device) = by_certificate(gateway, conn) {
        // A name that is not the certificate's is a mistake, and better heard of.
        if username.is_some_and(|name| !name.is_empty() && name != device.id.as_str()) {
            return Err(refuse(Reject::Unauthenticated));
        }
        return Ok(Step::Known(Known { device: Some(device), expires: None, data: None }));
    }
    gateway.anonymous_role().map_err(refuse)?;
    Ok(Step::Known(Known { device: None, expires: None, data: None }))
}

/// Takes the answer to a challenge.
///
/// # Errors
/// The reason for CONNACK, or for DISCONNECT in a re-authentication.
pub fn answer(
    gateway: &Gateway,
    conn: &Channel,
    pending: Box<MqttPending>,
    data: &[u8],
    now: Instant,
) -> Result<Known, Reason> {
    let answered = gateway.identity.mqtt_answer(pending, data, conn, Now::read());
    let (login, data) = answered.map_err(|reject| {
        meters().mqtt.reject(&reject);
        outcome::connack(&reject)
    })?;
    Ok(Known::by(login, Some(data), now))
}

/// What a proof can be bound to here.
pub fn channel(conn: &ConnectionInfo) -> Channel {
    Channel { tls_exporter: conn.tls.as_ref().map(|tls| tls.exporter), ..Channel::default() }
}

fn by_certificate(gateway: &Gateway, conn: &ConnectionInfo) -> Option<Arc<Device>> {
    let key = conn.tls.as_ref()?.client_key?;
    gateway.identity.by_public_key(&PublicKey::register(key).ok()?, Now::read())
}

/// A session that has begun.
pub struct Entered {
    pub client: Client,
    pub expires: Option<Instant>,
    /// What it asked for, when it asked for more than is granted.
    pub expiry_secs: u32,
    /// For a re-authentication; only who began with one may.
    pub names: Option<Box<Names>>,
}

/// Begins the session and says what CONNACK has to say.
///
/// # Errors
/// The reason for CONNACK.
///
/// # Cancel safety
/// Nothing has begun unless it completes.
pub async fn enter<IO: AsyncRead + AsyncWrite + Unpin>(
    shared: &Shared,
    gateway: &Gateway,
    conn: &ConnectionInfo,
    connect: Box<ConnectEvent>,
    known: Known,
    link: &mut Link<IO>,
) -> Result<(Entered, Out), Reason> {
    let ConnectEvent { version, clean_start, session_expiry_secs, client_id, username, auth, will, .. } = *connect;
    let Known { device, expires, data } = known;
    let assigned = client_id.is_empty().then(|| shared.assign_client_id());
    let granted = granted_expiry(gateway, session_expiry_secs);
    let open = Open {
        device,
        protocol: Protocol::Mqtt,
        peer: conn.peer,
        client: assigned.as_deref().unwrap_or(&client_id),
        clean: clean_start,
        mailbox: Mailbox::Own,
    };
    let opened = gateway.open_persistent(open, granted, now()).await.map_err(|reject| {
        meters().mqtt.reject(&reject);
        outcome::connack(&reject)
    })?;
    let mut client = opened.client;
    client.seen(wall_ms());
    if let Some(will) = will {
        // Refused it will never be published; the client is not refused for it.
        if let Err(reject) = gateway.set_will(&mut client, message::will(&will)) {
            gateway.note_reject(&client, &reject);
        }
    }
    let session = opened.resumed.map(resumed);
    let accept = Accept {
        session,
        stored: client.is_persistent(),
        assigned_client_id: assigned.as_deref(),
        session_expiry_secs: (granted != session_expiry_secs).then_some(granted),
        auth_data: data.as_deref(),
        ..Accept::default()
    };
    let mut out = link.begin();
    link.engine.accept(accept, &mut out.bytes);
    let names = (version == Version::V5 && auth.is_some()).then(|| Box::new(Names { username, client_id }));
    Ok((Entered { client, expires, expiry_secs: granted, names }, out))
}

/// The engine's state of a session that goes on. What the client has not answered comes out of the outbox again.
fn resumed(state: Box<dyn Any + Send>) -> SessionState<Delivery> {
    // Every session of this protocol was left by this module, so the state is of this type.
    let InFlight { received, unreleased, .. } = state.downcast().map(|state| *state).unwrap_or_default();
    let mut session = SessionState::new();
    for id in received.into_iter().filter_map(PacketId::new) {
        session.restore_in_flight(id, Stage::Pubcomp, false, None);
    }
    for id in unreleased.into_iter().filter_map(PacketId::new) {
        session.restore_unreleased(id);
    }
    session
}

/// The Session Expiry Interval that a client gets.
fn granted_expiry(gateway: &Gateway, wanted_secs: u32) -> u32 {
    if wanted_secs == 0 {
        return 0;
    }
    let limits = gateway.limits();
    let (_, parked) = gateway.sessions.counts();
    if parked >= limits.persistent_sessions_max as usize {
        return 0;
    }
    wanted_secs.min(u32::try_from(limits.session_expiry_max.0.as_secs()).unwrap_or(u32::MAX))
}

impl Known {
    /// Whether it is the same device, and until when and with what last data.
    pub fn renews(self, client: &Client) -> Option<(Option<Instant>, Vec<u8>)> {
        let same = match (&self.device, &client.caller.device) {
            (Some(new), Some(old)) => new.id == old.id,
            (None, _) | (_, None) => false,
        };
        same.then(|| (self.expires, self.data.unwrap_or_default()))
    }
}

/// The longest that a session is kept, after the client's last word on it.
pub fn keep_for(gateway: &Gateway, secs: u32) -> Option<Duration> {
    let max = gateway.limits().session_expiry_max.0;
    (secs > 0).then(|| Duration::from_secs(secs.into()).min(max))
}

//! CONNECT, enhanced authentication, CONNACK.

use bytes::BytesMut;

use super::{Connection, Phase, Reauth, reason_string};
use crate::error::Error;
use crate::event::{Cause, ConnectEvent, Event, Secret, WillMessage, user_properties};
use crate::inbound::Inbound;
use crate::outbound::{Outbound, Outgoing};
use crate::packet::{Auth, Connack, Connect, Disconnect, Packet, Qos, Version, Will};
use crate::property::{Properties, PropertiesBuf, Property};
use crate::reason::Reason;
use crate::session::SessionState;
use crate::topic;

/// What the server says yes with. `Default` is a plain yes to a new session.
#[derive(Debug)]
pub struct Accept<'a, M> {
    /// The session to go on with; None starts a new one. Ignored when the client asked for a clean start.
    pub session: Option<SessionState<M>>,
    /// The session is written down and outlives this process: PUBREL waits for [`Connection::release`], PUBCOMP for [`Connection::complete`], so that a
    /// QoS 2 handshake goes on where it was after a crash.
    pub stored: bool,
    /// For a client that sent an empty identifier.
    pub assigned_client_id: Option<&'a str>,
    /// When it is to be another than the client asked for, in seconds.
    pub session_expiry_secs: Option<u32>,
    /// Last data of the enhanced authentication.
    pub auth_data: Option<&'a [u8]>,
    pub response_info: Option<&'a str>,
    pub user: &'a [(&'a str, &'a str)],
}

impl<M> Default for Accept<'_, M> {
    fn default() -> Self {
        Accept {
            session: None,
            stored: false,
            assigned_client_id: None,
            session_expiry_secs: None,
            auth_data: None,
            response_info: None,
            user: &[],
        }
    }
}

impl<M: Outgoing> Connection<M> {
    pub(super) fn receive_connect(&mut self, connect: &Connect<'_>) -> Result<(), Error> {
        self.version = connect.version;
        if connect.client_id.is_empty() && connect.version == Version::V311 && !connect.clean_start {
            // `[MQTT-3.1.3-8]`
            return Err(Error::ClientId);
        }
        self.check_user_properties(connect.properties)?;
        if let Some(will) = &connect.will {
            self.check_will(will)?;
        }
        self.keep_alive = connect.keep_alive;
        let mut event = ConnectEvent {
            version: connect.version,
            clean_start: connect.clean_start,
            keep_alive: connect.keep_alive,
            session_expiry_secs: if connect.version == Version::V311 && !connect.clean_start { u32::MAX } else { 0 },
            client_id: connect.client_id.into(),
            username: connect.username.map(Box::from),
            password: connect.password.map(Secret::copy),
            auth: None,
            will: connect.will.as_ref().map(WillMessage::copy),
            request_response_info: false,
            user: user_properties(connect.properties),
        };
        let mut auth_data = Secret::default();
        let mut auth_method = None;
        for property in connect.properties.iter() {
            match property {
                Property::SessionExpiry(secs) => event.session_expiry_secs = secs,
                Property::ReceiveMaximum(max) => self.receive_maximum = max,
                Property::MaximumPacketSize(bytes) => self.packet_bytes_max = bytes,
                Property::TopicAliasMaximum(max) => self.aliases_out_max = max.min(self.config.topic_alias_out_max),
                Property::RequestProblemInfo(wanted) => self.problem_info = wanted,
                Property::RequestResponseInfo(wanted) => event.request_response_info = wanted,
                Property::AuthMethod(method) => auth_method = Some(method),
                Property::AuthData(data) => auth_data = Secret::copy(data),
                // The decoder lets nothing else into a CONNECT but user properties, which are taken above.
                _ => {}
            }
        }
        if let Some(method) = auth_method {
            self.auth_method = Some(method.into());
            event.auth = Some((method.into(), auth_data));
        }
        self.session_expiry_secs = event.session_expiry_secs;
        self.phase = Phase::Deciding;
        self.event = Some(Event::Connect(Box::new(event)));
        Ok(())
    }

    fn check_will(&self, will: &Will<'_>) -> Result<(), Error> {
        self.check_user_properties(will.properties)?;
        if will.topic.len() > self.config.topic_bytes_max {
            return Err(Error::TopicName("is over topic_bytes_max"));
        }
        if topic::levels(will.topic) > self.config.topic_levels_max {
            return Err(Error::TopicName("is over topic_levels_max"));
        }
        if will.qos > self.config.maximum_qos {
            return Err(Error::QosNotSupported);
        }
        if will.retain && !self.config.retain_available {
            return Err(Error::RetainNotSupported);
        }
        let is_utf8 = || std::str::from_utf8(will.payload).is_ok();
        let declared = will.properties.iter().any(|p| p == Property::PayloadIsUtf8(true));
        if declared && self.config.payload_format_checked && !is_utf8() {
            return Err(Error::PayloadFormat);
        }
        Ok(())
    }

    /// AUTH from the client, in the handshake or later (section 4.12).
    pub(super) fn receive_auth(&mut self, auth: &Auth<'_>) -> Result<(), Error> {
        let Some(expected) = &self.auth_method else {
            return Err(Error::Protocol("AUTH without an authentication method in CONNECT"));
        };
        let method = auth.properties.find(|p| if let Property::AuthMethod(m) = p { Some(m) } else { None });
        if method != Some(expected) {
            return Err(Error::Protocol("AUTH with another authentication method"));
        }
        let data = auth.properties.find(|p| if let Property::AuthData(d) = p { Some(d) } else { None });
        let data = Secret::copy(data.unwrap_or_default());
        match (self.phase, self.reauth, auth.reason) {
            (Phase::Challenged, _, Reason::ContinueAuthentication) => {
                self.phase = Phase::Deciding;
                self.event = Some(Event::Auth { data });
            }
            (Phase::Connected, Reauth::Challenged, Reason::ContinueAuthentication) => {
                self.reauth = Reauth::Deciding;
                self.event = Some(Event::Auth { data });
            }
            (Phase::Connected, Reauth::None, Reason::ReAuthenticate) => {
                self.reauth = Reauth::Deciding;
                self.handshake_deadline = self.last_input.checked_add(self.config.connect_timeout);
                self.event = Some(Event::Reauthenticate { data });
            }
            _ => return Err(Error::Protocol("AUTH out of turn")),
        }
        Ok(())
    }

    /// Answers [`Event::Connect`], [`Event::Auth`] or [`Event::Reauthenticate`] with AUTH 0x18: the client is to prove more. Ignored elsewhere, and
    /// when the client did not begin an enhanced authentication.
    pub fn challenge(&mut self, data: &[u8], out: &mut BytesMut) {
        let connected = match (self.phase, self.reauth) {
            (Phase::Deciding, _) => false,
            (Phase::Connected, Reauth::Deciding) => true,
            _ => return,
        };
        if !self.write_auth(Reason::ContinueAuthentication, data, out) {
            return;
        }
        if connected {
            self.reauth = Reauth::Challenged;
        } else {
            self.phase = Phase::Challenged;
        }
    }

    /// Ends a re-authentication with AUTH 0x00. Ignored elsewhere.
    pub fn auth_success(&mut self, data: &[u8], out: &mut BytesMut) {
        if self.phase == Phase::Connected
            && self.reauth == Reauth::Deciding
            && self.write_auth(Reason::Success, data, out)
        {
            self.reauth = Reauth::None;
            self.handshake_deadline = None;
        }
    }

    fn write_auth(&self, reason: Reason, data: &[u8], out: &mut BytesMut) -> bool {
        let Some(method) = &self.auth_method else { return false };
        let mut list = PropertiesBuf::new();
        let complete = list.push(Property::AuthMethod(method)).is_ok()
            && (data.is_empty() || list.push(Property::AuthData(data)).is_ok());
        complete && Packet::Auth(Auth { reason, properties: list.as_properties() }).encode(self.version, out).is_ok()
    }

    /// Says yes to the CONNECT. Ignored when no CONNECT waits for an answer. Redelivery of the session begins at the next `poll_output`.
    pub fn accept(&mut self, accept: Accept<'_, M>, out: &mut BytesMut) {
        if self.phase != Phase::Deciding {
            return;
        }
        let list = self.connack_properties(&accept);
        let packet = Packet::Connack(Connack {
            session_present: accept.session.is_some(),
            reason: Reason::Success,
            properties: list.as_properties(),
        });
        // Every value in the list was taken by `push`, so it is always written.
        let _ = packet.encode(self.version, out);
        if let Some(SessionState { in_flight, next_id, unreleased }) = accept.session {
            self.inbound = (!unreleased.is_empty()).then(|| Box::new(Inbound::resume(unreleased)));
            self.outbound = Some(Box::new(Outbound::resume(in_flight, next_id)));
        }
        self.stored = accept.stored;
        self.phase = Phase::Connected;
        self.handshake_deadline = None;
    }

    /// Says no to the CONNECT and closes. Ignored when no CONNECT waits for an answer.
    ///
    /// `text` becomes MQTT 5's reason string; a stranger should not get one.
    pub fn refuse(&mut self, reason: Reason, text: Option<&str>, out: &mut BytesMut) {
        if self.phase != Phase::Deciding {
            return;
        }
        let allowed = if reason.is_error() && reason.in_connack() { reason } else { Reason::UnspecifiedError };
        let list = reason_string(text, (self.packet_bytes_max as usize).saturating_sub(16));
        let properties = if self.version == Version::V5 { list.as_properties() } else { Properties::EMPTY };
        // Within the limits, see `reason_string`.
        let _ =
            Packet::Connack(Connack { session_present: false, reason: allowed, properties }).encode(self.version, out);
        self.finish(Cause::Refused(reason), None);
    }

    /// Everything that differs from what MQTT 5 takes for granted when it is not said (section 3.2.2.3).
    fn connack_properties(&mut self, accept: &Accept<'_, M>) -> PropertiesBuf {
        if self.version == Version::V311 {
            return PropertiesBuf::new();
        }
        let config = self.config.clone();
        let mut list = PropertiesBuf::new();
        let mut say = |property| {
            // Only a text above 65,535 bytes is refused, and that is better left out.
            let _ = list.push(property);
        };
        if let Some(secs) = accept.session_expiry_secs {
            self.session_expiry_secs = secs;
            say(Property::SessionExpiry(secs));
        }
        if config.receive_maximum < u16::MAX {
            say(Property::ReceiveMaximum(config.receive_maximum.max(1)));
        }
        if config.maximum_qos < Qos::ExactlyOnce {
            say(Property::MaximumQos(config.maximum_qos as u8));
        }
        if !config.retain_available {
            say(Property::RetainAvailable(false));
        }
        // The protocol's own limit is 5 + 268,435,455 bytes, so a limit that does not fit is none.
        if let Ok(bytes @ 1..) = u32::try_from(config.packet_bytes_max) {
            say(Property::MaximumPacketSize(bytes));
        }
        if let Some(id) = accept.assigned_client_id {
            say(Property::AssignedClientId(id));
        }
        if config.topic_alias_maximum > 0 {
            say(Property::TopicAliasMaximum(config.topic_alias_maximum));
        }
        for (available, property) in [
            (config.wildcard_available, Property::WildcardAvailable(false)),
            (config.subscription_ids_available, Property::SubscriptionIdsAvailable(false)),
            (config.shared_available, Property::SharedAvailable(false)),
        ] {
            if !available {
                say(property);
            }
        }
        if self.keep_alive == 0 || self.keep_alive > config.keep_alive_max_secs {
            self.keep_alive = config.keep_alive_max_secs;
            say(Property::ServerKeepAlive(self.keep_alive));
        }
        if let Some(info) = accept.response_info {
            say(Property::ResponseInfo(info));
        }
        if let Some(method) = &self.auth_method {
            say(Property::AuthMethod(method));
            if let Some(data) = accept.auth_data {
                say(Property::AuthData(data));
            }
        }
        for (key, value) in accept.user {
            say(Property::User(key, value));
        }
        list
    }

    /// DISCONNECT from the client (section 3.14).
    pub(super) fn receive_disconnect(&mut self, packet: &Disconnect<'_>) -> Result<(), Error> {
        let expiry = packet.properties.find(|p| if let Property::SessionExpiry(s) = p { Some(s) } else { None });
        if self.session_expiry_secs == 0 && expiry.is_some_and(|secs| secs > 0) {
            return Err(Error::Protocol("DISCONNECT makes a session last that was to end"));
        }
        if let Some(secs) = expiry {
            self.session_expiry_secs = secs;
        }
        self.finish(Cause::Disconnect(packet.reason), expiry);
        Ok(())
    }
}

//! A session while its client is connected: what comes in goes to the gateway, what the gateway has goes out.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tidegate_mqtt::{
    Close, Event, Handle, Output, PacketId, PublishEvent, Published, Reason, RetainHandling, Stage, SubscribeEvent,
    UnsubscribeEvent, Version,
};
use tokio::io::{AsyncRead, AsyncWrite};

use super::link::{Link, Written, earliest, now};
use super::login::{self, Entered, Names};
use super::outcome::{self, Refused};
use super::{Terms, message, note_end};
use crate::gateway::{
    self, Address, Channel, Client, Delivery, Draft, Drained, Gateway, InFlight, Keep, MqttPending, MqttStep, Now,
    Outbox, SendRetained, SubscribeOptions, is_expired, wall_ms,
};
use crate::message::{CloseReason, Completion, Qos, Receipt, Reject};
use crate::telemetry::meters;

/// See the module's documentation.
pub struct Session<IO> {
    link: Box<Link<IO>>,
    client: Client,
    gateway: Arc<Gateway>,
    terms: Arc<Terms>,
    /// The session's outbox, as the gateway wants it with every message.
    completion: Arc<dyn Completion>,
    /// In the upper bits of every token: an outcome for an earlier connection of the session is not taken for one of this.
    salt: u64,
    drained: Drained,
    /// Taken from the outbox and not sent, because the client's window or its socket is full.
    backlog: VecDeque<Delivery>,
    /// When the engine wants to be asked again.
    engine_deadline: Option<Instant>,
    /// When the client's proof ends.
    expires: Option<Instant>,
    /// The Session Expiry Interval that was granted.
    expiry_secs: u32,
    renewal: Option<Box<Renewal>>,
    held: Option<Box<Held>>,
    /// A subscriber that is waited for before more is read.
    crowded: Option<Crowded>,
    /// Answers that leave when what they say is on disk, by their token.
    waits: Vec<(u64, After)>,
    next_wait: u64,
    /// The session is to end, once what was published is answered, or at this instant.
    ending: Option<(CloseReason, Instant)>,
}

/// What a re-authentication needs.
struct Renewal {
    names: Names,
    channel: Channel,
    pending: Option<Box<MqttPending>>,
}

/// Why a 3.1.1 client is not read from.
struct Held {
    until: Instant,
    /// The message to try again; without one, the answer to an earlier message is missing for good, and the connection closes.
    message: Option<PublishEvent>,
}

/// A subscriber with much waiting.
struct Crowded {
    outbox: Arc<Outbox>,
    /// Its sign that this publisher is among those who wait.
    joined: Option<u32>,
    until: Instant,
}

/// What a persistent session's client is told when it is on disk.
enum After {
    Suback(Box<Suback>),
    Unsuback(PacketId, Vec<Reason>),
    /// PUBREL.
    Release(PacketId),
    /// PUBCOMP.
    Complete(PacketId),
}

struct Suback {
    packet_id: PacketId,
    reasons: Vec<Reason>,
    text: Option<String>,
    /// What was granted, to be taken back if it cannot be stored.
    granted: Vec<Box<str>>,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Session<IO> {
    pub fn new(
        link: Box<Link<IO>>,
        entered: Entered,
        gateway: Arc<Gateway>,
        connection: u64,
        terms: Arc<Terms>,
        channel: Option<Box<Channel>>,
    ) -> Self {
        let Entered { client, expires, expiry_secs, names } = entered;
        let renewal = names.zip(channel);
        Session {
            link,
            completion: client.outbox.clone(),
            client,
            gateway,
            terms,
            salt: connection << TOKEN_BITS,
            drained: Drained::default(),
            backlog: VecDeque::new(),
            engine_deadline: None,
            expires,
            expiry_secs,
            renewal: renewal
                .map(|(names, channel)| Box::new(Renewal { names: *names, channel: *channel, pending: None })),
            held: None,
            crowded: None,
            waits: Vec::new(),
            next_wait: 0,
            ending: None,
        }
    }

    /// Works until there is nothing to do; ready when the connection is over. `told_to_stop` asks whether the listener ends.
    pub fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut told_to_stop: impl FnMut(&mut Context<'_>) -> bool,
    ) -> Poll<Close> {
        for _ in 0..TURNS_MAX {
            let now = now();
            let mut out = self.link.begin();
            let turn = self.turn(cx, now, &mut out.bytes);
            let written = self.link.poll_write(cx, out, now);
            let mut busy = match turn {
                Ok(busy) => busy,
                Err(close) => return Poll::Ready(close),
            };
            match written {
                Ok(Written::Nothing | Written::Blocked) => {}
                Ok(Written::All) => busy = true,
                Err(_) => {
                    self.link.engine.handle_eof();
                    busy = true;
                }
            }
            if busy {
                continue;
            }
            if self.ending.is_none() && told_to_stop(cx) {
                self.begin_end(CloseReason::ShuttingDown, now);
                continue;
            }
            if self.link.poll_timer(cx, self.deadline()).is_pending() {
                return Poll::Pending;
            }
            let mut out = self.link.begin();
            self.on_time(now, &mut out.bytes);
            if self.link.poll_write(cx, out, now).is_err() {
                self.link.engine.handle_eof();
            }
        }
        // Others want the thread too.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// One round: what the outbox has, what the client sent, what may go out. True if there may be more at once.
    fn turn(&mut self, cx: &mut Context<'_>, now: Instant, out: &mut BytesMut) -> Result<bool, Close> {
        let mut busy = false;
        // Messages stay in the outbox, where they are counted, until there is room for them.
        let room = out.len() < OUT_BYTES_MAX && self.backlog.is_empty() && self.ending.is_none();
        let deliveries_max = if room { DELIVERIES_MAX } else { 0 };
        if self.client.outbox.poll_drain(cx, &mut self.drained, deliveries_max).is_ready() {
            busy = true;
            self.take_drained(now, out);
        }
        busy |= self.poll_crowded(cx, now);
        if self.may_read(out) && !self.link.input.is_empty() {
            let rest = std::mem::take(&mut self.link.input);
            self.feed(rest, now, out)?;
        }
        if self.may_read(out) {
            match self.link.poll_read(cx) {
                Poll::Ready(Ok(chunk)) if !chunk.is_empty() => {
                    busy = true;
                    self.client.seen(wall_ms());
                    self.feed(chunk, now, out)?;
                }
                Poll::Ready(_) => self.link.engine.handle_eof(),
                Poll::Pending => {}
            }
        }
        self.deliver(now, out);
        if let Some((reason, until)) = self.ending
            && (self.link.engine.waiting() == 0 || now >= until)
        {
            self.link.engine.disconnect(outcome::disconnect(reason), None, out);
        }
        self.events(now, out)?;
        Ok(busy)
    }

    /// Waits for a subscriber that has much waiting, a moment. True when that is over.
    fn poll_crowded(&mut self, cx: &mut Context<'_>, now: Instant) -> bool {
        let Some(Crowded { outbox, joined, until }) = &mut self.crowded else { return false };
        if outbox.poll_room(cx, joined, now).is_pending() && now < *until {
            return false;
        }
        self.crowded = None;
        true
    }

    fn may_read(&self, out: &BytesMut) -> bool {
        self.held.is_none()
            && self.crowded.is_none()
            && self.ending.is_none()
            && !self.link.engine.paused()
            && out.len() < OUT_BYTES_MAX
    }

    /// Hands one read to the engine, packet by packet.
    fn feed(&mut self, mut chunk: BytesMut, now: Instant, out: &mut BytesMut) -> Result<(), Close> {
        let mut whole = false;
        while self.held.is_none() && self.crowded.is_none() && self.link.engine.handle_input(now, &mut chunk, out) {
            whole = true;
            self.events(now, out)?;
        }
        let waits = self.held.is_some() || self.crowded.is_some() || self.link.engine.paused();
        self.link.keep(chunk, whole, waits, now);
        Ok(())
    }

    fn events(&mut self, now: Instant, out: &mut BytesMut) -> Result<(), Close> {
        loop {
            match self.link.engine.poll_output(now, out) {
                Output::Event(event) => self.on_event(event, now, out),
                Output::Close(close) => return Err(close),
                Output::Timeout(deadline) => {
                    self.engine_deadline = deadline;
                    return Ok(());
                }
            }
        }
    }

    fn on_event(&mut self, event: Event<Delivery>, now: Instant, out: &mut BytesMut) {
        match event {
            Event::Publish(event) => self.on_publish(event, now, out),
            Event::Subscribe(event) => self.on_subscribe(&event, now, out),
            Event::Unsubscribe(event) => self.on_unsubscribe(&event, out),
            Event::Delivered { message, reason } => {
                if reason.is_error() {
                    tracing::debug!(session = self.client.session.id.0, %reason, "message refused by the client");
                }
                match message.ticket.and_then(|ticket| PacketId::new(ticket.id())) {
                    Some(id) if message.qos == Qos::ExactlyOnce && !reason.is_error() => {
                        let token = self.wait_token();
                        let stored = self.gateway.received(&self.client, &message, (&self.completion, token));
                        self.after(token, After::Release(id), stored, out);
                    }
                    Some(_) | None => self.gateway.delivered(&self.client, &message),
                }
            }
            Event::Released { packet_id } => {
                let token = self.wait_token();
                let stored = self.gateway.released(&mut self.client, packet_id.get(), (&self.completion, token));
                self.after(token, After::Complete(packet_id), stored, out);
            }
            Event::Completed { packet_id } => self.gateway.completed(&self.client, packet_id.get()),
            Event::Reauthenticate { data } => self.on_reauthenticate(data.expose(), now, out),
            Event::Auth { data } => self.on_auth(data.expose(), now, out),
            // A second CONNECT is an error that the engine ends the connection with.
            Event::Connect(_) => {}
        }
    }

    // Messages from the client.

    fn on_publish(&mut self, event: PublishEvent, now: Instant, out: &mut BytesMut) {
        let draft = Draft {
            payload: payload(&event),
            qos: outcome::from_wire(event.qos),
            retain: event.retain,
            properties: message::properties(event.properties()),
        };
        let address = Address::from_mqtt(event.topic());
        let done = event.handle.map(|handle| (&self.completion, self.salt | handle.token()));
        let id = event
            .handle
            .filter(|_| draft.qos == Qos::ExactlyOnce)
            .and_then(|handle| self.link.engine.packet_id(handle));
        let published = match id {
            Some(id) => self.gateway.publish_once(&mut self.client, id.get(), address, draft, done, now),
            None => self.gateway.publish(&mut self.client, address, draft, done, now),
        };
        match published {
            Ok(gateway::Published::Done(receipt)) => {
                if let Some(handle) = event.handle {
                    self.link.engine.ack(handle, outcome::accepted(receipt), None, out);
                }
            }
            Ok(gateway::Published::Pending) => {}
            Err(reject) => self.on_refused(event, &reject, now, out),
        }
        if let Some(outbox) = self.client.take_crowded() {
            self.crowded = Some(Crowded { outbox, joined: None, until: now + self.terms.crowded_wait });
        }
    }

    fn on_refused(&mut self, event: PublishEvent, reject: &Reject, now: Instant, out: &mut BytesMut) {
        match self.refused(reject) {
            Refused::Answer(reason) => {
                if let Some(handle) = event.handle {
                    self.link.engine.ack(handle, reason, self.explain(reject).as_deref(), out);
                }
            }
            Refused::Hold(time) => {
                self.held = Some(Box::new(Held { until: now + time, message: Some(event.detached()) }));
            }
            Refused::Close(reason) => self.link.engine.disconnect(reason, self.explain(reject).as_deref(), out),
            Refused::Silence => {}
        }
    }

    fn refused(&self, reject: &Reject) -> Refused {
        match self.link.engine.version() {
            Version::V5 => outcome::refused_v5(reject),
            Version::V311 => outcome::refused_v311(reject, self.gateway.config().mqtt311_refused),
        }
    }

    /// What stands in the reason string: a stranger learns nothing.
    fn explain(&self, reject: &Reject) -> Option<String> {
        self.client.caller.device.is_some().then(|| reject.to_string())
    }

    /// An outcome that took time.
    fn on_outcome(&mut self, token: u64, outcome: Result<Receipt, Reject>, now: Instant, out: &mut BytesMut) {
        if token & !TOKEN_MASK != self.salt {
            return;
        }
        if token & WAIT_BIT != 0 {
            return self.on_stored(token, outcome, out);
        }
        let handle = Handle::from_token(token & TOKEN_MASK);
        let reject = match outcome {
            Ok(receipt) => return self.link.engine.ack(handle, outcome::accepted(receipt), None, out),
            Err(reject) => reject,
        };
        self.gateway.note_reject(&self.client, &reject);
        if let Some(id) = self.link.engine.packet_id(handle) {
            self.gateway.free_id(&mut self.client, id.get());
        }
        match self.refused(&reject) {
            Refused::Answer(reason) => self.link.engine.ack(handle, reason, self.explain(&reject).as_deref(), out),
            // The message is not here any more. The client sends it again when it comes back, so it is made to.
            Refused::Hold(time) => self.held = Some(Box::new(Held { until: now + time, message: None })),
            Refused::Close(reason) => self.link.engine.disconnect(reason, self.explain(&reject).as_deref(), out),
            Refused::Silence => {}
        }
    }

    fn wait_token(&mut self) -> u64 {
        self.next_wait = (self.next_wait + 1) & (WAIT_BIT - 1);
        self.salt | WAIT_BIT | self.next_wait
    }

    /// Says what is to be said now, or when `token` comes back.
    fn after(&mut self, token: u64, after: After, stored: Result<gateway::Published, Reject>, out: &mut BytesMut) {
        match stored {
            Ok(gateway::Published::Pending) => self.waits.push((token, after)),
            Ok(gateway::Published::Done(_)) => self.say(after, out),
            Err(reject) => self.cannot_say(after, &reject, out),
        }
    }

    fn on_stored(&mut self, token: u64, outcome: Result<Receipt, Reject>, out: &mut BytesMut) {
        let Some(at) = self.waits.iter().position(|(known, _)| *known == token) else { return };
        let (_, after) = self.waits.remove(at);
        match outcome {
            Ok(_) => self.say(after, out),
            Err(reject) => self.cannot_say(after, &reject, out),
        }
    }

    fn say(&mut self, after: After, out: &mut BytesMut) {
        match after {
            After::Suback(suback) => {
                let Suback { packet_id, reasons, text, .. } = *suback;
                self.link.engine.suback(packet_id, &reasons, text.as_deref(), out);
            }
            After::Unsuback(id, reasons) => self.link.engine.unsuback(id, &reasons, None, out),
            After::Release(id) => self.link.engine.release(id, out),
            After::Complete(id) => self.link.engine.complete(id, out),
        }
    }

    fn cannot_say(&mut self, after: After, reject: &Reject, out: &mut BytesMut) {
        match after {
            After::Suback(mut suback) => {
                for filter in &suback.granted {
                    self.gateway.unsubscribe(&mut self.client, filter, 0);
                }
                suback
                    .reasons
                    .iter_mut()
                    .filter(|reason| !reason.is_error())
                    .for_each(|r| *r = outcome::suback(reject));
                let text = self.explain(reject);
                self.link.engine.suback(suback.packet_id, &suback.reasons, text.as_deref(), out);
            }
            // It goes on, or is asked for again, when the client comes back.
            After::Unsuback(..) | After::Release(_) | After::Complete(_) => {
                self.link.engine.disconnect(Reason::QuotaExceeded, self.explain(reject).as_deref(), out);
            }
        }
    }

    fn on_subscribe(&mut self, event: &SubscribeEvent, now: Instant, out: &mut BytesMut) {
        let mut reasons = Vec::with_capacity(event.subscriptions.len());
        let (mut retained, mut granted) = (Vec::new(), Vec::new());
        let mut text = None;
        for wanted in &event.subscriptions {
            let options = SubscribeOptions {
                qos: outcome::from_wire(wanted.qos),
                no_local: wanted.no_local,
                retain_as_published: wanted.retain_as_published,
                identifier: event.subscription_id,
                ..SubscribeOptions::default()
            };
            let send = match wanted.retain_handling {
                RetainHandling::Send => SendRetained::Always,
                RetainHandling::SendIfNew => SendRetained::IfNew,
                RetainHandling::DoNotSend => SendRetained::Never,
            };
            match self.gateway.subscribe(&mut self.client, &wanted.filter, 0, options, send, now) {
                Ok(subscribed) => {
                    reasons.push(outcome::granted(subscribed.qos));
                    retained.extend(subscribed.retained);
                    granted.push(wanted.filter.clone());
                }
                Err(reject) => {
                    reasons.push(outcome::suback(&reject));
                    text = text.or_else(|| self.explain(&reject));
                }
            }
        }
        if self.client.is_persistent() {
            let token = self.wait_token();
            let stored = self.gateway.settle(&self.client, (&self.completion, token));
            let suback = Suback { packet_id: event.packet_id, reasons, text, granted };
            self.after(token, After::Suback(Box::new(suback)), stored, out);
        } else {
            self.link.engine.suback(event.packet_id, &reasons, text.as_deref(), out);
        }
        self.backlog.extend(retained);
    }

    fn on_unsubscribe(&mut self, event: &UnsubscribeEvent, out: &mut BytesMut) {
        let reasons: Vec<Reason> = event
            .filters
            .iter()
            .map(|filter| match self.gateway.unsubscribe(&mut self.client, filter, 0) {
                true => Reason::Success,
                false => Reason::NoSubscriptionExisted,
            })
            .collect();
        if self.client.is_persistent() {
            let token = self.wait_token();
            let stored = self.gateway.settle(&self.client, (&self.completion, token));
            self.after(token, After::Unsuback(event.packet_id, reasons), stored, out);
        } else {
            self.link.engine.unsuback(event.packet_id, &reasons, None, out);
        }
    }

    // Proofs renewed while the session lives.

    fn on_reauthenticate(&mut self, data: &[u8], now: Instant, out: &mut BytesMut) {
        let step = match &self.renewal {
            // The engine lets only those re-authenticate who began so.
            None => Err(Reject::Unauthenticated),
            Some(renewal) => self.gateway.admit_login(self.client.caller.peer.ip(), now).and_then(|()| {
                let Names { username, client_id } = &renewal.names;
                let identity = &self.gateway.identity;
                identity.mqtt_begin(username.as_deref(), client_id, data, &renewal.channel, Now::read())
            }),
        };
        match step {
            Ok(MqttStep::Challenge { data, pending }) => {
                if let Some(renewal) = &mut self.renewal {
                    renewal.pending = Some(pending);
                }
                self.link.engine.challenge(&data, out);
            }
            Ok(MqttStep::Done { login, data }) => self.renew(login::Known::by(login, Some(data), now), out),
            Err(reject) => {
                self.gateway.note_reject(&self.client, &reject);
                self.link.engine.disconnect(Reason::NotAuthorized, None, out);
            }
        }
    }

    fn on_auth(&mut self, data: &[u8], now: Instant, out: &mut BytesMut) {
        let pending = self.renewal.as_mut().and_then(|renewal| Some((renewal.pending.take()?, &renewal.channel)));
        let known = pending.map(|(pending, channel)| login::answer(&self.gateway, channel, pending, data, now));
        match known {
            Some(Ok(known)) => self.renew(known, out),
            Some(Err(_)) | None => self.link.engine.disconnect(Reason::NotAuthorized, None, out),
        }
    }

    fn renew(&mut self, known: login::Known, out: &mut BytesMut) {
        match known.renews(&self.client) {
            Some((expires, data)) => {
                self.expires = expires;
                self.link.engine.auth_success(&data, out);
            }
            None => self.link.engine.disconnect(Reason::NotAuthorized, None, out),
        }
    }

    // Messages to the client.

    fn take_drained(&mut self, now: Instant, out: &mut BytesMut) {
        let mut completions = std::mem::take(&mut self.drained.completions);
        for (token, outcome) in completions.drain(..) {
            self.on_outcome(token, outcome, now, out);
        }
        self.drained.completions = completions;
        if let Some(reason) = self.drained.close.take()
            && self.ending.is_none()
        {
            self.begin_end(reason, now);
        }
        if self.backlog.is_empty() {
            std::mem::swap(&mut self.backlog, &mut self.drained.deliveries);
        } else {
            self.backlog.append(&mut self.drained.deliveries);
        }
    }

    fn begin_end(&mut self, reason: CloseReason, now: Instant) {
        let patience = match reason {
            // What was published before is answered first.
            CloseReason::ShuttingDown | CloseReason::Administrative => self.terms.drain_timeout,
            // Somebody waits, or must not wait.
            CloseReason::TakenOver | CloseReason::NotAuthorized | CloseReason::TooSlow => Duration::ZERO,
        };
        self.ending = Some((reason, now + patience));
    }

    /// Sends as much of the backlog as the client takes.
    fn deliver(&mut self, now: Instant, out: &mut BytesMut) {
        let mut sent: u32 = 0;
        while let Some(delivery) = self.backlog.front() {
            if out.len() >= OUT_BYTES_MAX {
                break;
            }
            let properties = delivery.message.properties.is_some();
            if properties && is_expired(&delivery.message, wall_ms()) {
                meters().dropped_outbox.increment(1);
                self.gateway.delivered(&self.client, delivery);
                self.backlog.pop_front();
                continue;
            }
            let qos = outcome::to_wire(delivery.qos);
            match self.link.engine.publish(now, delivery, qos, delivery.retain, out) {
                Published::Sent => sent += 1,
                // [MQTT-3.1.2-25]: as if it had been delivered.
                Published::TooLarge => {
                    meters().dropped_outbox.increment(1);
                    self.gateway.delivered(&self.client, delivery);
                }
                Published::WindowFull | Published::Closed => break,
            }
            self.backlog.pop_front();
        }
        if sent > 0 {
            meters().mqtt.delivered.increment(sent.into());
            self.client.count_delivered(sent.into());
        }
    }

    // Time.

    fn deadline(&self) -> Option<Instant> {
        let held = self.held.as_ref().map(|held| held.until);
        let ending = self.ending.map(|(_, until)| until);
        let link = self.link.deadline(self.terms.packet_timeout, self.terms.write_timeout);
        let slow = self.slow_at();
        let crowded = self.crowded.as_ref().map(|crowded| crowded.until);
        [held, ending, link, slow, crowded, self.expires].into_iter().fold(self.engine_deadline, earliest)
    }

    /// When the client has been too slow a reader for too long.
    fn slow_at(&self) -> Option<Instant> {
        self.drained.slow_since.map(|since| since + self.terms.slow_timeout)
    }

    fn on_time(&mut self, now: Instant, out: &mut BytesMut) {
        if let Some(held) = self.held.take_if(|held| now >= held.until) {
            // Nothing was read, so the silence was ours.
            self.link.engine.excuse_silence(now);
            match held.message {
                Some(event) => self.on_publish(event, now, out),
                None => self.link.engine.disconnect(Reason::QuotaExceeded, None, out),
            }
        } else if self.held.is_some() {
            self.link.engine.excuse_silence(now);
        }
        let engine = &mut self.link.engine;
        if self.expires.is_some_and(|expires| now >= expires) {
            engine.disconnect(Reason::NotAuthorized, Some("the login has expired"), out);
        } else if self.link.is_partial_overdue(self.terms.packet_timeout, now) {
            self.link.engine.disconnect(Reason::UnspecifiedError, Some("over header_timeout_ms"), out);
        } else if self.link.is_stalled(self.terms.write_timeout, now) {
            self.link.engine.disconnect(Reason::QuotaExceeded, Some("over write_timeout_ms"), out);
        } else if self.slow_at().is_some_and(|at| now >= at) {
            self.link.engine.disconnect(Reason::QuotaExceeded, Some("over slow_reader_timeout_ms"), out);
        }
        self.link.engine.handle_timeout(now, out);
        self.shrink();
    }

    /// Gives back what a burst has taken.
    fn shrink(&mut self) {
        self.client.outbox.shrink();
        if self.backlog.is_empty() {
            self.backlog = VecDeque::new();
        }
        self.drained.deliveries = VecDeque::new();
        self.drained.completions = Vec::new();
    }

    // The end.

    /// Ends the session, keeping what is to be kept, and gives the transport back for the last words.
    pub async fn end(mut self: Box<Self>, close: Close) -> Box<Link<IO>> {
        note_end(&close);
        let secs = close.session_expiry_secs.unwrap_or(self.expiry_secs);
        let expiry = login::keep_for(&self.gateway, secs);
        if expiry.is_some() {
            self.settle().await;
        }
        let Session { mut link, mut client, gateway, backlog, .. } = *self;
        let now = now();
        if !close.will {
            gateway.cancel_will(&mut client);
        }
        let state = link.engine.take_session();
        let waits = |stage| matches!(stage, Stage::Puback | Stage::Pubrec);
        let sent = state.in_flight().filter(|(_, stage, ..)| waits(*stage)).map(|(id, ..)| id.get());
        let Some(expiry) = expiry else {
            // Others have no queue that has to know what was begun.
            if client.is_persistent() {
                client.outbox.park_sent(sent);
            }
            gateway.close(client, None, now);
            // [MQTT-4.8.2-5]: what was begun at QoS 2 is nobody else's.
            let unanswered = state.in_flight().filter(|(_, stage, ..)| *stage == Stage::Puback);
            gateway.reassign(unanswered.filter_map(|(.., delivery)| delivery.cloned()).chain(backlog));
            return link;
        };
        let sent = sent.collect();
        let unreleased = state.unreleased().map(PacketId::get).collect();
        let state = Box::new(InFlight { sent, unreleased, ..InFlight::default() });
        gateway.close(client, Some(Keep { state, expiry: Some(expiry) }), now);
        link
    }

    /// Waits for the outcomes of what was published, a moment: a QoS 2 message that was stored must be known as such when the client sends it again.
    async fn settle(&mut self) {
        let outbox = self.client.outbox.clone();
        let waited = async {
            let mut nowhere = BytesMut::new();
            while self.link.engine.waiting() > 0 {
                outbox.drain(&mut self.drained, 0).await;
                if self.drained.close.take().is_some() && self.drained.completions.is_empty() {
                    break;
                }
                for (token, outcome) in std::mem::take(&mut self.drained.completions) {
                    if let (Ok(receipt), true) = (outcome, token & !TOKEN_MASK == self.salt) {
                        let handle = Handle::from_token(token & TOKEN_MASK);
                        self.link.engine.ack(handle, outcome::accepted(receipt), None, &mut nowhere);
                    }
                }
            }
        };
        // What is not known by then, the client sends again.
        let _ = tokio::time::timeout(SETTLE_TIMEOUT, waited).await;
    }
}

/// The payload, shared with the packet only where that does not pin much more than itself. Small ones the gateway copies.
fn payload(event: &PublishEvent) -> Bytes {
    const COPIED_BY_GATEWAY: usize = 4096;
    const WORTH_SHARING: usize = 32 * 1024;
    let bytes = event.payload().len();
    if (COPIED_BY_GATEWAY..WORTH_SHARING).contains(&bytes) {
        Bytes::copy_from_slice(event.payload())
    } else {
        event.payload_shared()
    }
}

/// Output that may wait for the peer before nothing more is read, nor taken from the outbox.
const OUT_BYTES_MAX: usize = 64 * 1024;
/// Messages taken from the outbox at a time.
const DELIVERIES_MAX: usize = 256;
/// Turns before the thread's other tasks are let on.
const TURNS_MAX: usize = 8;
/// A token's lower bits are the engine's handle, one per message; a connection does not live to see 2^39 of them.
const TOKEN_BITS: u32 = 40;
const TOKEN_MASK: u64 = (1 << TOKEN_BITS) - 1;
/// Told apart from handles: what waits for the disk without a message.
const WAIT_BIT: u64 = 1 << (TOKEN_BITS - 1);
const SETTLE_TIMEOUT: Duration = Duration::from_secs(2);

//! Packets from the client, one after another.

use bytes::{BufMut, Bytes, BytesMut};

use super::{Connection, Phase};
use crate::decode::{Frame, Reader, publish};
use crate::encode::ack;
use crate::error::Error;
use crate::event::{Event, PublishEvent, SubscribeEvent, Subscription, UnsubscribeEvent, user_properties};
use crate::inbound::Admission;
use crate::outbound::Outgoing;
use crate::packet::{Ack, Packet, PacketId, Publish, Qos, Subscribe, Unsubscribe, Version};
use crate::property::{Properties, Property};
use crate::reason::Reason;
use crate::topic;

impl<M: Outgoing> Connection<M> {
    #[inline]
    pub(super) fn receive(&mut self, frame: Frame, packet: Bytes, out: &mut BytesMut) -> Result<(), Error> {
        if frame.first >> 4 == 3 && self.phase == Phase::Connected {
            return self.receive_publish(frame, packet, out);
        }
        self.receive_other(frame, &packet, out)
    }

    fn receive_other(&mut self, frame: Frame, bytes: &[u8], out: &mut BytesMut) -> Result<(), Error> {
        if self.phase == Phase::AwaitConnect {
            return self.receive_first(frame, bytes, out);
        }
        let packet = Packet::decode(frame, bytes, self.version)?;
        if self.phase == Phase::Challenged {
            return match packet {
                Packet::Auth(auth) => self.receive_auth(&auth),
                Packet::Disconnect(packet) => self.receive_disconnect(&packet),
                _ => Err(Error::Protocol("packet before the authentication is complete")),
            };
        }
        match packet {
            Packet::Connect(_) => Err(Error::Protocol("second CONNECT")),
            Packet::Puback(ack) => {
                let outbound = self.outbound.as_mut();
                if let Some(message) = outbound.map_or(Ok(None), |o| o.puback(ack.packet_id))? {
                    self.event = Some(Event::Delivered { message, reason: ack.reason });
                }
                Ok(())
            }
            Packet::Pubrec(ack) => self.receive_pubrec(&ack, out),
            Packet::Pubrel(packet) => {
                let known = self.inbound.as_mut().is_some_and(|i| i.release(packet.packet_id));
                if known && self.stored {
                    self.event = Some(Event::Released { packet_id: packet.packet_id });
                    return Ok(());
                }
                let reason = if known { Reason::Success } else { Reason::PacketIdentifierNotFound };
                self.reply(0x70, packet.packet_id, reason, out);
                Ok(())
            }
            Packet::Pubcomp(ack) => {
                if self.outbound.as_mut().map_or(Ok(false), |o| o.pubcomp(ack.packet_id))? {
                    self.event = Some(Event::Completed { packet_id: ack.packet_id });
                }
                Ok(())
            }
            Packet::Subscribe(packet) => self.receive_subscribe(&packet),
            Packet::Unsubscribe(packet) => self.receive_unsubscribe(&packet),
            Packet::Pingreq => {
                out.put_slice(&[0xD0, 0]);
                Ok(())
            }
            Packet::Disconnect(packet) => self.receive_disconnect(&packet),
            Packet::Auth(auth) => self.receive_auth(&auth),
            Packet::Publish(_) | Packet::Connack(_) | Packet::Suback(_) | Packet::Unsuback(_) | Packet::Pingresp => {
                Err(Error::Protocol("packet that only a server sends"))
            }
        }
    }

    /// CONNECT, and the CONNACK for one that cannot be read: 3.1.1 demands it for an unknown level (`[MQTT-3.1.2-2]`) and for a bad client
    /// identifier (`[MQTT-3.1.3-9]`), 5 allows it (`[MQTT-3.1.4-1]`).
    fn receive_first(&mut self, frame: Frame, bytes: &[u8], out: &mut BytesMut) -> Result<(), Error> {
        // The level stands at a fixed place, so an answer in the client's own version is possible even when the rest is broken.
        let level = bytes.get(frame.header_bytes..).and_then(|body| body.strip_prefix(b"\0\x04MQTT")?.first()).copied();
        if level == Some(5) {
            self.version = Version::V5;
        }
        let result = match Packet::decode(frame, bytes, self.version) {
            Ok(Packet::Connect(connect)) => self.receive_connect(&connect),
            Ok(_) => Err(Error::Protocol("first packet is not CONNECT")),
            Err(error) => Err(error),
        };
        if let Err(error @ (Error::UnsupportedVersion(_) | Error::ClientId)) = result
            && self.version == Version::V311
        {
            if level.is_some_and(|level| level > 5) {
                self.version = Version::V5;
            } else {
                self.connack_refusal(error.reason(), out);
            }
        }
        result
    }

    fn receive_publish(&mut self, frame: Frame, packet: Bytes, out: &mut BytesMut) -> Result<(), Error> {
        if self.version == Version::V5 && !frame.is_minimal() {
            return Err(Error::Malformed("remaining length is not in its shortest form"));
        }
        let body = packet.get(frame.header_bytes..).unwrap_or_default();
        let p = publish(frame.first & 0x0F, &mut Reader::new(body), self.version)?;
        if p.qos > self.config.maximum_qos {
            return Err(Error::QosNotSupported);
        }
        if p.retain && !self.config.retain_available {
            return Err(Error::RetainNotSupported);
        }
        if p.topic.len() > self.config.topic_bytes_max {
            return Err(Error::TopicName("is over topic_bytes_max"));
        }
        if topic::levels(p.topic) > self.config.topic_levels_max {
            return Err(Error::TopicName("is over topic_levels_max"));
        }
        // The parts stand at the packet's ends, so their places follow from their lengths; a packet is below 2^28 bytes.
        let payload_at = packet.len() - p.payload.len();
        let mut event = PublishEvent {
            handle: None,
            qos: p.qos,
            retain: p.retain,
            dup: p.dup,
            packet: Bytes::new(),
            topic_at: (frame.header_bytes + 2) as u32,
            topic_bytes: p.topic.len() as u32,
            properties_at: (payload_at - p.properties.as_bytes().len()) as u32,
            payload_at: payload_at as u32,
            alias: None,
        };
        if !p.properties.is_empty() {
            self.check_publish_properties(&p, &mut event)?;
        }
        if let Some(id) = p.packet_id {
            match self.admit(id, p.qos, out)? {
                None => return Ok(()),
                handle => event.handle = handle,
            }
        }
        event.packet = packet;
        self.event = Some(Event::Publish(event));
        Ok(())
    }

    fn check_publish_properties(&mut self, p: &Publish<'_>, event: &mut PublishEvent) -> Result<(), Error> {
        self.check_user_properties(p.properties)?;
        for property in p.properties.iter() {
            match property {
                Property::TopicAlias(alias) => {
                    if alias > self.config.topic_alias_maximum {
                        return Err(Error::TopicAlias);
                    }
                    let inbound = self.inbound.get_or_insert_default();
                    if p.topic.is_empty() {
                        event.alias = Some(inbound.alias(alias).ok_or(Error::TopicAlias)?);
                    } else {
                        inbound.set_alias(alias, p.topic);
                    }
                }
                Property::SubscriptionId(_) => {
                    return Err(Error::Protocol("subscription identifier from a client"));
                }
                Property::PayloadIsUtf8(true)
                    if self.config.payload_format_checked && std::str::from_utf8(p.payload).is_err() =>
                {
                    return Err(Error::PayloadFormat);
                }
                // The others are the application's.
                _ => {}
            }
        }
        Ok(())
    }

    /// Finds a place for a QoS 1 or 2 message; None when it is a repetition and needs no event.
    fn admit(&mut self, id: PacketId, qos: Qos, out: &mut BytesMut) -> Result<Option<crate::Handle>, Error> {
        let inbound = self.inbound.get_or_insert_default();
        let (in_flight, unreleased) = (inbound.in_flight(), inbound.unreleased());
        match inbound.admit(id, qos) {
            Admission::New(handle) => {
                let max = self.config.receive_maximum;
                if self.version == Version::V5 && in_flight >= usize::from(max) {
                    return Err(Error::ReceiveMaximum { max });
                }
                // A 3.1.1 client is paused instead, but nothing paces its PUBRELs.
                if self.version == Version::V311
                    && qos == Qos::ExactlyOnce
                    && unreleased >= usize::from(self.config.unreleased_max)
                {
                    return Err(Error::Limit("unreleased_max"));
                }
                Ok(Some(handle))
            }
            Admission::Repeated => {
                self.answer_ready(out);
                Ok(None)
            }
        }
    }

    fn receive_pubrec(&mut self, packet: &Ack<'_>, out: &mut BytesMut) -> Result<(), Error> {
        let outbound = self.outbound.as_mut();
        let (known, message) = outbound.map_or(Ok((false, None)), |o| o.pubrec(packet.packet_id, packet.reason))?;
        if let Some(message) = message {
            self.event = Some(Event::Delivered { message, reason: packet.reason });
            if self.stored {
                // The application says when.
                return Ok(());
            }
        }
        if !packet.reason.is_error() {
            let reason = if known { Reason::Success } else { Reason::PacketIdentifierNotFound };
            self.reply(0x62, packet.packet_id, reason, out);
        }
        Ok(())
    }

    fn receive_subscribe(&mut self, packet: &Subscribe<'_>) -> Result<(), Error> {
        self.check_user_properties(packet.properties)?;
        let subscription_id =
            packet.properties.find(|p| if let Property::SubscriptionId(id) = p { Some(id) } else { None });
        if subscription_id.is_some() && !self.config.subscription_ids_available {
            return Err(Error::SubscriptionIdsNotSupported);
        }
        let mut subscriptions = Vec::new();
        for (filter, options) in packet.filters.iter() {
            if subscriptions.len() >= self.config.subscriptions_per_packet_max {
                return Err(Error::Limit("subscriptions_per_packet_max"));
            }
            self.check_filter(filter)?;
            subscriptions.push(Subscription {
                filter: filter.into(),
                qos: options.qos.min(self.config.maximum_qos),
                no_local: options.no_local,
                retain_as_published: options.retain_as_published,
                retain_handling: options.retain_handling,
            });
        }
        self.event = Some(Event::Subscribe(Box::new(SubscribeEvent {
            packet_id: packet.packet_id,
            subscription_id,
            subscriptions,
            user: user_properties(packet.properties),
        })));
        Ok(())
    }

    fn receive_unsubscribe(&mut self, packet: &Unsubscribe<'_>) -> Result<(), Error> {
        self.check_user_properties(packet.properties)?;
        let mut filters = Vec::new();
        for (filter, _) in packet.filters.iter() {
            if filters.len() >= self.config.subscriptions_per_packet_max {
                return Err(Error::Limit("subscriptions_per_packet_max"));
            }
            filters.push(filter.into());
        }
        self.event = Some(Event::Unsubscribe(Box::new(UnsubscribeEvent {
            packet_id: packet.packet_id,
            filters,
            user: user_properties(packet.properties),
        })));
        Ok(())
    }

    fn check_filter(&self, filter: &str) -> Result<(), Error> {
        if filter.len() > self.config.topic_bytes_max {
            return Err(Error::TopicFilter("is over topic_bytes_max"));
        }
        if topic::levels(filter) > self.config.topic_levels_max {
            return Err(Error::TopicFilter("is over topic_levels_max"));
        }
        if !self.config.wildcard_available && topic::has_wildcard(filter) {
            return Err(Error::WildcardsNotSupported);
        }
        if !self.config.shared_available && topic::shared(filter).is_some() {
            return Err(Error::SharedNotSupported);
        }
        Ok(())
    }

    pub(super) fn check_user_properties(&self, properties: Properties<'_>) -> Result<(), Error> {
        if properties.user().nth(self.config.user_properties_max).is_some() {
            return Err(Error::Limit("user_properties_max"));
        }
        Ok(())
    }

    pub(super) fn reply(&self, first: u8, packet_id: PacketId, reason: Reason, out: &mut BytesMut) {
        // Without properties it is always written.
        let _ = ack(first, &Ack { packet_id, reason, properties: Properties::EMPTY }, self.version, out);
    }
}

//! Messages between the gateway's form and MQTT's.

use std::time::Instant;

use tidegate_http::traceparent;
use tidegate_mqtt::{Outgoing, PacketId, Properties as WireProperties, Property, PropertySink, WillMessage};

use super::outcome;
use crate::gateway::{Delivery, Draft, Will, wall_ms};
use crate::message::Properties;

/// The gateway's form of what a PUBLISH or a will carries beside its payload; `None` when there is nothing.
pub fn properties(wire: WireProperties<'_>) -> Option<Box<Properties>> {
    if wire.is_empty() {
        return None;
    }
    let mut properties = Box::<Properties>::default();
    for property in wire.iter() {
        match property {
            Property::PayloadIsUtf8(is) => properties.payload_is_utf8 = is,
            Property::MessageExpiry(secs) => properties.expiry_secs = Some(secs),
            Property::ContentType(text) => properties.content_type = Some(text.into()),
            Property::ResponseTopic(text) => properties.response_topic = Some(text.into()),
            Property::Correlation(data) => properties.correlation = Some(bytes::Bytes::copy_from_slice(data)),
            Property::User(TRACEPARENT, value) if traceparent::is_valid(value) => {
                properties.traceparent = Some(value.into());
            }
            Property::User(key, value) => properties.user.push((key.into(), value.into())),
            // Aliases and the will's delay are the connection's business; nothing else can stand here.
            _ => {}
        }
    }
    (*properties != Properties::default()).then_some(properties)
}

/// The gateway's form of a will.
pub fn will(will: &WillMessage) -> Will {
    let draft = Draft {
        payload: will.payload.clone(),
        qos: outcome::from_wire(will.qos),
        retain: will.retain,
        properties: properties(will.properties()),
    };
    Will { topic: will.topic.clone(), draft, delay_secs: will.delay_secs }
}

impl Outgoing for Delivery {
    fn topic(&self) -> &str {
        self.topic_parts().1
    }

    fn topic_prefix(&self) -> &str {
        self.topic_parts().0
    }

    fn payload(&self) -> &[u8] {
        &self.message.payload
    }

    fn packet_id(&self) -> Option<PacketId> {
        PacketId::new(self.ticket?.id())
    }

    fn repeated(&self) -> bool {
        self.repeated
    }

    fn properties(&self, _: Instant, sink: &mut PropertySink<'_>) {
        if let Some(properties) = &self.message.properties {
            if properties.payload_is_utf8 {
                sink.push(Property::PayloadIsUtf8(true));
            }
            if let Some(secs) = properties.expiry_secs {
                // [MQTT-3.3.2-6]: what is left of it.
                let waited_secs = wall_ms().saturating_sub(self.message.ingested_ms) / 1000;
                let left = u64::from(secs).saturating_sub(waited_secs);
                sink.push(Property::MessageExpiry(u32::try_from(left).unwrap_or(u32::MAX)));
            }
            if let Some(text) = &properties.content_type {
                sink.push(Property::ContentType(text));
            }
            if let Some(text) = &properties.response_topic {
                sink.push(Property::ResponseTopic(text));
            }
            if let Some(data) = &properties.correlation {
                sink.push(Property::Correlation(data));
            }
            if let Some(text) = &properties.traceparent {
                sink.push(Property::User(TRACEPARENT, text));
            }
            for (key, value) in &properties.user {
                sink.push(Property::User(key, value));
            }
        }
        for identifier in self.terms.identifiers.iter().flat_map(|all| all.iter()) {
            sink.push(Property::SubscriptionId(*identifier));
        }
    }
}

const TRACEPARENT: &str = "traceparent";

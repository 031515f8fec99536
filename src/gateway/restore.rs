//! What survives a restart: sessions (`durable`), and retained values, as rows of the spool.
//!
//! Rows are written with the group commit of the messages that change them. A retained value that a device published at `QoS` 1 or 2 is on disk
//! before it is acknowledged; at `QoS` 0 it follows within `ack_delay_ms`.

use std::sync::Arc;
use std::time::Instant;

use super::{DeviceId, Gateway, Message, Reject, wall_ms};
use crate::hub::{Filter, is_expired};
use crate::spool::{self, Kind, decode_message, encode_message};

impl Gateway {
    /// Takes back what the last run left in the spool. To be called once, before anything is served.
    ///
    /// # Errors
    /// The spool cannot be read.
    pub fn restore(&self, now: Instant) -> Result<(), spool::Error> {
        self.restore_retained()?;
        self.restore_sessions(now)?;
        self.end_presence(now);
        Ok(())
    }

    /// Keeps a message as its topic's last value, on disk as well if it is retained.
    pub(super) fn remember(&self, message: &Arc<Message>) -> Result<(), Reject> {
        self.hub.remember(message, message.ingested_ms, |is_there| {
            let value = is_there.then(|| encode_message(message));
            self.spool.set(Kind::Retained, message.topic.as_str().as_bytes(), value.as_deref());
        })
    }

    pub(super) fn expire_retained(&self, now_ms: u64) {
        self.hub.expire(now_ms, |topic| self.spool.set(Kind::Retained, topic.as_str().as_bytes(), None));
    }

    fn restore_retained(&self) -> Result<(), spool::Error> {
        let now_ms = wall_ms();
        let (mut restored, mut refused, mut damaged) = (0_u64, 0_u64, 0_u64);
        let mut over = Vec::new();
        self.spool.rows(Kind::Retained, |key, value| match decode_message(value) {
            Some(message) if is_expired(&message, now_ms) => over.push(Box::<[u8]>::from(key)),
            // Above a bound that was lowered: it stays on disk, in case that was a mistake.
            Some(message) => match self.hub.remember(&Arc::new(message), now_ms, |_| {}) {
                Ok(()) => restored += 1,
                Err(_) => refused += 1,
            },
            None => damaged += 1,
        })?;
        for key in over {
            self.spool.set(Kind::Retained, &key, None);
        }
        if refused > 0 {
            tracing::warn!(
                refused,
                "retained values do not fit retained_messages_max and retained_bytes_max, not loaded"
            );
        }
        if damaged > 0 {
            tracing::error!(damaged, "retained values are damaged, not loaded");
        }
        tracing::debug!(restored, "retained values loaded");
        Ok(())
    }

    /// Nobody is connected to a gateway that has just started, whatever the last one wrote before it was killed.
    fn end_presence(&self, now: Instant) {
        let Ok(filter) = Filter::parse("dev/+/presence") else { return };
        for message in self.hub.retained(&filter, wall_ms()) {
            let online = serde_json::from_slice::<Presence>(&message.payload).is_ok_and(|presence| presence.online);
            if let (true, Some(Ok(device))) = (online, message.topic.levels().nth(1).map(DeviceId::parse)) {
                self.announce_presence(&device, None, now);
            }
        }
    }
}

#[derive(serde::Deserialize)]
struct Presence {
    online: bool,
}

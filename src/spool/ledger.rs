//! What was lost and why: sums per sink, reason, device, start of the gateway and hour.

use std::collections::HashMap;

use serde::Serialize;

use crate::message::{DeviceId, Message};

/// Why messages left a queue without being delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// `queue.bytes_max` was reached and `when_full` is `drop_oldest`.
    QueueFull,
    /// Older than `queue.age_max`.
    Expired,
    /// The upstream says it will never take a message of this size.
    TooLarge,
    /// The upstream refused it for good, as often as the forward rule says.
    Rejected,
    /// The row on disk did not decode; its bytes are kept in the table `damaged`.
    Damaged,
    /// The operator dropped the sink.
    Dropped,
}

impl Reason {
    pub const ALL: [Reason; 6] =
        [Reason::QueueFull, Reason::Expired, Reason::TooLarge, Reason::Rejected, Reason::Damaged, Reason::Dropped];

    /// The word in the ledger, in metrics and in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Reason::QueueFull => "queue_full",
            Reason::Expired => "expired",
            Reason::TooLarge => "too_large",
            Reason::Rejected => "rejected",
            Reason::Damaged => "damaged",
            Reason::Dropped => "dropped",
        }
    }

    pub fn parse(word: &str) -> Option<Reason> {
        Reason::ALL.into_iter().find(|reason| reason.as_str() == word)
    }
}

/// One row of the ledger.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Loss {
    pub sink: String,
    pub reason: Reason,
    /// Empty: no device (anonymous or the gateway); [`SEVERAL`]: not kept apart.
    pub device: String,
    /// With `seq_first` and `seq_last`: the range of message ids the lost ones lie in. All zero where it is not known.
    pub epoch: u32,
    pub seq_first: u64,
    pub seq_last: u64,
    pub records: u64,
    pub bytes: u64,
    /// When it was noticed, milliseconds since 1970.
    pub first_ms: u64,
    pub last_ms: u64,
}

/// The device of a row that stands for several.
pub const SEVERAL: &str = "*";

/// Losses that are on their way to the ledger.
#[derive(Debug, Default)]
pub(super) struct Losses {
    rows: HashMap<Key, Sum>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub lane: usize,
    pub reason: Reason,
    pub device: Who,
    pub epoch: u32,
    pub hour: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Who {
    Nobody,
    Device(DeviceId),
    Several,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sum {
    pub seq_first: u64,
    pub seq_last: u64,
    pub records: u64,
    pub bytes: u64,
    pub first_ms: u64,
    pub last_ms: u64,
}

/// Rows that may wait in memory; beyond, new devices are not kept apart.
const ROWS_MAX: usize = 4096;

pub(super) const HOUR_MS: u64 = 3_600_000;

impl Losses {
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub fn rows(&self) -> impl Iterator<Item = (&Key, &Sum)> {
        self.rows.iter()
    }

    /// Enters one lost message.
    pub fn add(&mut self, lane: usize, reason: Reason, message: &Message, now_ms: u64) {
        let who = message.origin.device.clone().map_or(Who::Nobody, Who::Device);
        let seq = message.id.seq;
        let bytes = (message.topic.as_str().len() + message.payload.len()) as u64;
        let sum = Sum { seq_first: seq, seq_last: seq, records: 1, bytes, first_ms: now_ms, last_ms: now_ms };
        self.merge(Key { lane, reason, device: who, epoch: message.id.epoch, hour: now_ms / HOUR_MS }, sum);
    }

    /// Enters messages that nobody looked into.
    pub fn add_unread(&mut self, lane: usize, reason: Reason, records: u64, bytes: u64, now_ms: u64) {
        let key = Key { lane, reason, device: Who::Several, epoch: 0, hour: now_ms / HOUR_MS };
        self.merge(key, Sum { seq_first: 0, seq_last: 0, records, bytes, first_ms: now_ms, last_ms: now_ms });
    }

    /// Takes over everything from `other`.
    pub fn absorb(&mut self, other: Losses) {
        for (key, sum) in other.rows {
            self.merge(key, sum);
        }
    }

    fn merge(&mut self, mut key: Key, mut sum: Sum) {
        if self.rows.len() >= ROWS_MAX && !self.rows.contains_key(&key) {
            key = Key { device: Who::Several, epoch: 0, ..key };
            (sum.seq_first, sum.seq_last) = (0, 0);
        }
        self.rows.entry(key).and_modify(|known| known.merge(&sum)).or_insert(sum);
    }
}

impl Sum {
    fn merge(&mut self, other: &Sum) {
        self.seq_first = self.seq_first.min(other.seq_first);
        self.seq_last = self.seq_last.max(other.seq_last);
        self.records = self.records.saturating_add(other.records);
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.first_ms = self.first_ms.min(other.first_ms);
        self.last_ms = self.last_ms.max(other.last_ms);
    }
}

impl Who {
    pub fn as_str(&self) -> &str {
        match self {
            Who::Nobody => "",
            Who::Device(device) => device.as_str(),
            Who::Several => SEVERAL,
        }
    }
}

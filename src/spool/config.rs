//! `[spool]`, and what a forward rule says about its queue.

use serde::{Deserialize, Serialize};

use crate::units::{Age, ByteSize, Rate};

/// `[spool]`: how commits are gathered and what may wait in memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// A commit closes when it holds this many bytes, in bytes.
    #[schemars(range(min = 4096, max = 16_777_216))]
    pub commit_bytes_max: u32,
    /// The longest a commit waits for as many messages as the last one carried, in milliseconds. An idle spool commits at once.
    #[schemars(range(min = 0, max = 1000))]
    pub commit_delay_ms: u32,
    /// Bytes of messages that may wait for a commit. Reached: messages are refused as "full" until the disk has caught up.
    #[schemars(range(min = 65536, max = 268_435_456))]
    pub pending_bytes_max: u32,
    /// Messages that may wait for a commit. Reached: as `pending_bytes_max`.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub pending_records_max: u32,
    /// Bytes of the newest messages kept in memory for each sink, so that a sink that keeps up costs no reads. Also how much a sink with
    /// `delivery = "memory"` may hold that is not on disk yet. Reached: the oldest are read from disk; where the disk does not take them, messages are refused as "full".
    #[schemars(range(min = 65536, max = 268_435_456))]
    pub memory_bytes_per_sink_max: u32,
    /// How long a message with `delivery = "memory"` stays off the disk, in milliseconds. What the sink has taken by then is never written.
    #[schemars(range(min = 1, max = 3_600_000))]
    pub spill_after_ms: u32,
    /// How long acknowledgements from sinks gather before they are written, in milliseconds. A crash repeats at most what was acknowledged in that time, under the same ids.
    #[schemars(range(min = 1, max = 60_000))]
    pub ack_delay_ms: u32,
    /// Size of the write-ahead log at which it is copied into the database, in bytes. Larger writes less, smaller recovers faster after a crash.
    #[schemars(range(min = 262_144, max = 268_435_456))]
    pub wal_bytes_max: u32,
    /// Bytes on disk of all messages that wait for sessions. Reached: the oldest are dropped from every queue they are in, and counted.
    pub backlog_bytes_max: ByteSize,
    /// Rows in the loss ledger, one per sink, reason, device, start of the gateway and hour. Reached: the oldest tenth is folded into one row per sink and reason; counts are kept.
    #[schemars(range(min = 100, max = 1_000_000))]
    pub ledger_rows_max: u32,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            commit_bytes_max: 256 << 10,
            commit_delay_ms: 2,
            pending_bytes_max: 4 << 20,
            pending_records_max: 65_536,
            memory_bytes_per_sink_max: 1 << 20,
            spill_after_ms: 1000,
            ack_delay_ms: 500,
            wal_bytes_max: 4 << 20,
            backlog_bytes_max: ByteSize(512 << 20),
            ledger_rows_max: 10_000,
        }
    }
}

/// When a device is told "accepted".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Delivery {
    /// On receipt; a crash loses what was not spilled yet.
    Memory,
    /// When it is written but not synced: survives a crash of the gateway, not a power cut.
    Os,
    /// After the fsync of its commit: survives a power cut.
    #[default]
    Disk,
}

/// What a queue that has reached `bytes_max` does with the next message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WhenFull {
    /// The device is told "full" (503, 5.03, 0x97) and keeps the message.
    #[default]
    Refuse,
    /// The oldest messages go, into the loss ledger.
    DropOldest,
}

/// `queue` of one `[[forward]]`: how much it may hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct QueueConfig {
    /// Bytes on disk for this rule. Reached: `when_full` decides.
    pub bytes_max: ByteSize,
    /// How long a message may wait. Older ones are dropped and written to the loss ledger. A message stamped before the clock was set does not age.
    pub age_max: Age,
    /// `refuse`: the device is told "full" and keeps the message. `drop_oldest`: the oldest go, into the loss ledger.
    pub when_full: WhenFull,
    /// 0 to 9. While a rule with a higher priority replays a backlog to the same upstream, this one's backlog waits.
    #[schemars(range(min = 0, max = 9))]
    pub priority: u8,
    /// The most a backlog is replayed at, in messages, so that a cloud that has just come back is not run over.
    pub replay_rate_max: Rate,
}

impl Default for QueueConfig {
    fn default() -> Self {
        QueueConfig {
            bytes_max: ByteSize(1 << 30),
            age_max: Age::from_secs(7 * 86_400),
            when_full: WhenFull::Refuse,
            priority: 5,
            replay_rate_max: Rate::per_second(500, 500),
        }
    }
}

/// One queue: a forward rule's name and what it asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct SinkConfig {
    pub name: String,
    pub delivery: Delivery,
    pub queue: QueueConfig,
}

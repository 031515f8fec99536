//! One sink's queue as memory knows it: positions, the newest rows, and what the reader holds.
//!
//! Positions and bytes are counted from the creation of the sink and only grow, so that acknowledging, dropping and skipping may overlap in any order
//! and still count each byte once.

use std::collections::VecDeque;
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::config::{Delivery, QueueConfig, SinkConfig};
use super::eta::Eta;
use super::store;
use super::{SinkState, SinkStats};

/// One row of one sink. Positions count the sink's records since it was created; so do bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RowHead {
    pub(super) position: u64,
    pub(super) records: u32,
    pub(super) bytes_end: u64,
    pub(super) oldest_ms: u64,
    pub(super) newest_ms: u64,
}

impl RowHead {
    pub(super) fn end(&self) -> u64 {
        self.position.saturating_add(u64::from(self.records))
    }
}

/// One sink's queue.
pub(super) struct Lane {
    pub(super) name: String,
    pub(super) table: store::Table,
    pub(super) delivery: Delivery,
    pub(super) queue: QueueConfig,
    pub(super) orphaned: bool,
    pub(super) state: Mutex<LaneState>,
    pub(super) news: Notify,
    pub(super) eta: Mutex<Eta>,
}

pub(super) struct LaneState {
    /// Position of the first record that is not acknowledged.
    pub(super) acked: u64,
    /// Position behind the last readable record.
    pub(super) end: u64,
    pub(super) end_bytes: u64,
    /// `bytes_end` of the last row that is acknowledged entirely.
    pub(super) released_bytes: u64,
    /// Records that were not delivered, since the sink was created.
    pub(super) dropped: u64,
    /// The newest rows, without a gap up to `end`; whatever is before them is on disk.
    pub(super) tail: VecDeque<TailRow>,
    pub(super) tail_bytes: usize,
    pub(super) unstored_bytes: usize,
    pub(super) unstored_since: Option<Instant>,
    /// Rows the reader took that are not acknowledged entirely.
    pub(super) handed: VecDeque<RowHead>,
    /// Rows that were found damaged and will never be acknowledged by the reader.
    pub(super) skipped: Vec<RowHead>,
    /// The oldest row on disk, as far as known.
    pub(super) front: Option<RowHead>,
    pub(super) behind: bool,
    /// The reader sleeps until `end` gets there.
    pub(super) wake_at: u64,
}

pub(super) struct TailRow {
    pub(super) head: RowHead,
    pub(super) data: Bytes,
    pub(super) stored: bool,
}

impl Lane {
    pub(super) fn new(found: store::FoundLane, sinks: &[SinkConfig]) -> Lane {
        let config = sinks.iter().find(|sink| sink.name == found.name);
        let end = found.last.map_or(found.acked, |row| row.end()).max(found.acked);
        let end_bytes = found.last.map_or(0, |row| row.bytes_end);
        let released_bytes = found.front.map_or(end_bytes, |(row, bytes)| row.bytes_end.saturating_sub(bytes));
        Lane {
            name: found.name,
            table: found.table,
            delivery: config.map_or(Delivery::Disk, |c| c.delivery),
            queue: config.map_or_else(QueueConfig::default, |c| c.queue.clone()),
            orphaned: config.is_none(),
            state: Mutex::new(LaneState {
                acked: found.acked,
                end,
                end_bytes,
                released_bytes,
                dropped: found.dropped,
                tail: VecDeque::new(),
                tail_bytes: 0,
                unstored_bytes: 0,
                unstored_since: None,
                handed: VecDeque::new(),
                skipped: Vec::new(),
                front: found.front.map(|(row, _)| row),
                behind: found.front.is_some(),
                wake_at: 0,
            }),
            news: Notify::new(),
            eta: Mutex::default(),
        }
    }

    pub(super) fn stats(&self) -> SinkStats {
        let state = self.state.lock();
        SinkStats {
            name: self.name.clone(),
            state: match (self.orphaned, state.acked >= state.end, state.behind) {
                (true, _, _) => SinkState::Orphaned,
                (false, true, _) => SinkState::Empty,
                (false, false, true) => SinkState::Behind,
                (false, false, false) => SinkState::Live,
            },
            queued_records: state.end.saturating_sub(state.acked),
            queued_bytes: state.queued_bytes(),
            oldest_ms: state.oldest().map(|row| row.oldest_ms),
            appended: state.end,
            delivered: state.acked.saturating_sub(state.dropped),
            dropped: state.dropped,
        }
    }
}

impl LaneState {
    pub(super) fn queued_bytes(&self) -> u64 {
        self.end_bytes.saturating_sub(self.released_bytes)
    }

    /// Where the rows in memory begin.
    pub(super) fn tail_start(&self) -> u64 {
        self.tail.front().map_or(self.end, |row| row.head.position)
    }

    pub(super) fn oldest(&self) -> Option<RowHead> {
        if self.acked >= self.end {
            return None;
        }
        let tail = self.tail.front().filter(|row| row.head.position <= self.acked).map(|row| row.head);
        let known = |row: &&RowHead| row.end() > self.acked;
        tail.or_else(|| self.handed.front().filter(known).copied())
            .or_else(|| self.front.as_ref().filter(known).copied())
    }

    /// Acknowledges everything before `position`; returns the bytes that freed.
    pub(super) fn advance(&mut self, position: u64) -> u64 {
        let before = self.released_bytes;
        let mut released = before;
        self.acked = self.acked.max(position.min(self.end));
        while let Some(at) = self.skipped.iter().position(|row| row.position <= self.acked) {
            let row = self.skipped.swap_remove(at);
            self.acked = self.acked.max(row.end().min(self.end));
            released = released.max(row.bytes_end);
        }
        while let Some(head) = self.handed.pop_front_if(|head| head.end() <= self.acked) {
            released = released.max(head.bytes_end);
        }
        while let Some(row) = self.tail.pop_front_if(|row| row.head.end() <= self.acked) {
            released = released.max(row.head.bytes_end);
            self.forget(&row);
        }
        if self.acked >= self.end {
            released = self.end_bytes;
        }
        self.released_bytes = released.min(self.end_bytes);
        self.released_bytes.saturating_sub(before)
    }

    pub(super) fn forget(&mut self, row: &TailRow) {
        self.tail_bytes = self.tail_bytes.saturating_sub(row.data.len());
        if !row.stored {
            self.unstored_bytes = self.unstored_bytes.saturating_sub(row.data.len());
            if self.unstored_bytes == 0 {
                self.unstored_since = None;
            }
        }
    }

    /// Adds a row at the end. Beyond `memory_bytes_max` the oldest stored rows leave memory.
    pub(super) fn append(&mut self, row: TailRow, memory_bytes_max: usize) {
        self.end = row.head.end();
        self.end_bytes = row.head.bytes_end;
        self.tail_bytes += row.data.len();
        if !row.stored {
            self.unstored_bytes += row.data.len();
            self.unstored_since.get_or_insert_with(Instant::now);
        }
        self.tail.push_back(row);
        self.trim(memory_bytes_max);
    }

    pub(super) fn trim(&mut self, memory_bytes_max: usize) {
        while self.tail_bytes > memory_bytes_max
            && let Some(row) = self.tail.pop_front_if(|row| row.stored)
        {
            self.tail_bytes -= row.data.len();
            if self.front.is_none_or(|front| front.end() <= self.acked) {
                self.front = Some(row.head);
            }
        }
    }
}

//! What workers, the writer and the readers share: the inbox, its limits, and the open commit.
//!
//! One lock, held for an encoding or an exchange of pointers, never for IO.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use portable_atomic::AtomicU64;

use super::backlog::{self, OpenRow, POSITION_MAX};
use super::config::{Config, Delivery, WhenFull};
use super::lane::{Lane, RowHead};
use super::ledger::Losses;
use super::record::{self, Pack};
use super::rows::PendingRows;
use super::{Demand, SinkId, reader};
use crate::message::{Completion, Message, Receipt, Reject};

pub(super) struct Shared {
    pub(super) data_dir: PathBuf,
    pub(super) epoch: u32,
    pub(super) config: Config,
    /// The first so many lanes are configured; the rest are orphans.
    pub(super) configured: usize,
    pub(super) lanes: Vec<Lane>,
    pub(super) inbox: Mutex<Inbox>,
    pub(super) wake: Condvar,
    pub(super) losses: Mutex<Losses>,
    /// What the database has free within itself, as of the last look.
    pub(super) free_bytes: AtomicU64,
    /// Locked after `inbox` where both are.
    pub(super) backlog: Mutex<backlog::Rows>,
    /// Bounded by who asks: a reader and a session have one question at a time.
    pub(super) fetch: std::sync::mpsc::Sender<reader::Fetch>,
}

/// Retry advice where only an operator or time can help.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(5);

impl Shared {
    pub(super) fn lane(&self, sink: SinkId) -> Option<&Lane> {
        self.lanes.get(usize::from(sink.0)).filter(|_| usize::from(sink.0) < self.configured)
    }

    /// Admits somebody who waits for a commit and brings nothing.
    pub(super) fn admit_waiter(&self, inbox: &Inbox) -> Result<(), Reject> {
        if inbox.stopping || inbox.writer_gone {
            return Err(Reject::ShuttingDown);
        }
        if let Some(failure) = &inbox.failing {
            return Err(Reject::Full { limit: "spool", retry_after: failure.retry_after });
        }
        if inbox.records >= self.config.pending_records_max {
            return Err(Reject::Full { limit: "spool.pending_records_max", retry_after: Duration::from_secs(1) });
        }
        Ok(())
    }

    pub(super) fn admit(
        &self,
        inbox: &Inbox,
        message: &Message,
        demand: &Demand<'_>,
        durable: bool,
    ) -> Result<(), Reject> {
        let sinks = demand.sinks;
        let bytes = record::HEADER_BYTES + record::record_bytes_max(message) + backlog::index_bytes_max(demand.targets);
        let full = |limit, retry_after| Err(Reject::Full { limit, retry_after });
        if inbox.stopping || inbox.writer_gone {
            return Err(Reject::ShuttingDown);
        }
        if let (true, Some(failure)) = (durable, &inbox.failing) {
            return full("spool", failure.retry_after);
        }
        let pending_bytes_max = self.config.pending_bytes_max as usize;
        if bytes > pending_bytes_max {
            return Err(Reject::TooLarge { limit: "spool.pending_bytes_max", bytes_max: pending_bytes_max as u64 });
        }
        if inbox.bytes + bytes > pending_bytes_max || inbox.records >= self.config.pending_records_max {
            return full("spool.pending_bytes_max", Duration::from_secs(1));
        }
        if !demand.targets.is_empty() && inbox.position >= POSITION_MAX {
            return full("spool", RETRY_AFTER);
        }
        for &sink in sinks {
            let Some(lane) = self.lane(sink) else {
                return Err(Reject::NotFound);
            };
            let bytes_max = lane.queue.bytes_max.bytes();
            if bytes as u64 > bytes_max {
                return Err(Reject::TooLarge { limit: "queue.bytes_max", bytes_max });
            }
            let index = usize::from(sink.0);
            let queued = inbox.queued.get(index).copied().unwrap_or(0);
            if lane.queue.when_full == WhenFull::Refuse && queued + bytes as u64 > bytes_max {
                return full("queue.bytes_max", RETRY_AFTER);
            }
            if lane.delivery == Delivery::Memory {
                let limit = "spool.memory_bytes_per_sink_max";
                let memory_bytes_max = self.config.memory_bytes_per_sink_max as usize;
                if bytes > memory_bytes_max {
                    return Err(Reject::TooLarge { limit, bytes_max: memory_bytes_max as u64 });
                }
                if inbox.unstored.get(index).copied().unwrap_or(0) + bytes > memory_bytes_max {
                    return full(limit, RETRY_AFTER);
                }
            }
        }
        Ok(())
    }

    /// Encodes the message into the open commit. True when that closed it; and its position in the backlog.
    pub(super) fn push(&self, inbox: &mut Inbox, message: &Message, demand: &Demand<'_>, durable: bool) -> (bool, u64) {
        let lanes = self.lanes.len();
        let commit_bytes_max = self.config.commit_bytes_max as usize;
        if inbox.open().bytes >= commit_bytes_max {
            let fresh = inbox.spare.take().unwrap_or_default();
            inbox.groups.push_back(fresh);
        }
        let mut added = 0;
        let position = inbox.position;
        let Inbox { groups, queued, .. } = inbox;
        let Some(group) = groups.back_mut() else { return (false, 0) };
        group.packs.resize_with(lanes, Pack::default);
        for &sink in demand.sinks {
            let index = usize::from(sink.0);
            let (Some(lane), Some(pack), Some(queued)) =
                (self.lanes.get(index), group.packs.get_mut(index), queued.get_mut(index))
            else {
                continue;
            };
            let before = pack.bytes();
            if lane.delivery == Delivery::Memory && !durable {
                group.accepted.push((index, pack.records()));
            }
            pack.push(message);
            let bytes = pack.bytes() - before;
            *queued += bytes as u64;
            added += bytes;
            group.sync |= lane.delivery == Delivery::Disk;
        }
        if !demand.targets.is_empty() {
            if group.backlog.last().is_none_or(OpenRow::is_full) {
                group.backlog.push(OpenRow::new(position));
            }
            if let Some(row) = group.backlog.last_mut() {
                let before = row.bytes();
                row.push(message, demand.targets);
                let bytes = row.bytes() - before;
                let targets = u32::try_from(demand.targets.len()).unwrap_or(u32::MAX);
                self.backlog.lock().grew(row.first, targets, bytes);
                added += bytes;
            }
            inbox.position += 1;
        }
        group.sync |= demand.rows || !demand.targets.is_empty();
        group.durable |= durable;
        group.records += 1;
        group.bytes += added;
        let full = group.bytes >= commit_bytes_max;
        inbox.records += 1;
        inbox.bytes += added;
        (full, position)
    }

    pub(super) fn order(&self, order: Order) {
        let mut inbox = self.inbox.lock();
        inbox.orders.push(order);
        if inbox.writer_gone {
            // Nobody will read them: dropping an order drops its reply channel, which is the answer.
            inbox.orders.clear();
        }
        inbox.sleeping = false;
        self.wake.notify_one();
    }

    /// Tells the writer that something can be deleted in due time.
    pub(super) fn dirty(&self) {
        let mut inbox = self.inbox.lock();
        if !inbox.acks_dirty {
            inbox.acks_dirty = true;
            if inbox.sleeping {
                inbox.sleeping = false;
                self.wake.notify_one();
            }
        }
    }

    /// Tells the writer about acknowledgements to be written in due time, and the gauges about freed bytes.
    pub(super) fn freed(&self, index: usize, freed_bytes: u64, unstored_bytes: usize) {
        let mut inbox = self.inbox.lock();
        if let Some(queued) = inbox.queued.get_mut(index) {
            *queued = queued.saturating_sub(freed_bytes);
        }
        if let Some(unstored) = inbox.unstored.get_mut(index) {
            *unstored = unstored_bytes;
        }
        if !inbox.acks_dirty {
            inbox.acks_dirty = true;
            if inbox.sleeping {
                inbox.sleeping = false;
                self.wake.notify_one();
            }
        }
    }
}

/// What workers leave for the writer.
#[derive(Default)]
pub(super) struct Inbox {
    /// The last one is open. Never empty.
    pub(super) groups: VecDeque<Group>,
    pub(super) spare: Option<Group>,
    pub(super) records: u32,
    pub(super) bytes: usize,
    /// Bytes per lane, on disk, in memory and here.
    pub(super) queued: Vec<u64>,
    /// Bytes per lane that were accepted and are in memory only.
    pub(super) unstored: Vec<usize>,
    pub(super) orders: Vec<Order>,
    /// In the next commit, whichever that is.
    pub(super) rows: PendingRows,
    /// The backlog's next position.
    pub(super) position: u64,
    pub(super) acks_dirty: bool,
    pub(super) failing: Option<Failure>,
    pub(super) stopping: bool,
    pub(super) writer_gone: bool,
    pub(super) sleeping: bool,
    /// The writer sleeps until so many records wait.
    pub(super) wake_records: u32,
}

impl Inbox {
    pub(super) fn new(queued: Vec<u64>, position: u64) -> Inbox {
        Inbox {
            position,
            groups: VecDeque::from([Group::default()]),
            unstored: vec![0; queued.len()],
            queued,
            wake_records: 1,
            ..Inbox::default()
        }
    }

    pub(super) fn open(&mut self) -> &mut Group {
        if self.groups.is_empty() {
            self.groups.push_back(self.spare.take().unwrap_or_default());
        }
        let last = self.groups.len() - 1;
        &mut self.groups[last]
    }
}

/// The messages of one commit.
#[derive(Default)]
pub(super) struct Group {
    /// One per lane.
    pub(super) packs: Vec<Pack>,
    /// Records that were acknowledged on receipt, by lane and index in its pack: a failing disk must not lose them.
    pub(super) accepted: Vec<(usize, u32)>,
    /// For sessions.
    pub(super) backlog: Vec<OpenRow>,
    pub(super) waiters: Vec<Waiter>,
    pub(super) records: u32,
    pub(super) bytes: usize,
    /// Somebody waits for the commit.
    pub(super) durable: bool,
    /// Somebody waits for its fsync.
    pub(super) sync: bool,
}

pub(super) struct Waiter {
    pub(super) completion: Arc<dyn Completion>,
    pub(super) token: u64,
    pub(super) receipt: Receipt,
}

pub(super) enum Order {
    /// A row that does not decode: out of the queue, into `damaged`.
    Quarantine {
        lane: usize,
        head: RowHead,
    },
    Drop {
        lane: usize,
        reply: std::sync::mpsc::SyncSender<u64>,
    },
}

#[derive(Clone)]
pub(super) struct Failure {
    pub(super) detail: String,
    pub(super) retry_after: Duration,
}

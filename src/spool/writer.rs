//! The thread `spool`: gathers, commits, and only then tells anybody.
//!
//! How long to gather: as many messages as the last commit carried, at most `commit_delay_ms`; after an idle while, none. So one device waits for one
//! fsync, and sixty-four that send as soon as they are answered share one. While an fsync runs, the next commit fills by itself.

use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use metrics::{Counter, Histogram, counter, histogram};
use portable_atomic::Ordering;

use super::backlog::{OpenRow, Question};
use super::config::WhenFull;
use super::inbox::{Failure, Group, Order, Shared};
use super::lane::{LaneState, RowHead, TailRow};
use super::ledger::{Losses, Reason};
use super::reader::Fetch;
use super::record::{self, Pack};
use super::rows::PendingRows;
use super::store::{Ack, Commit, NewRow, Store};
use crate::message::Reject;
use crate::telemetry::{SPOOL_COMMIT_SECONDS, SPOOL_COMMITS_TOTAL, SPOOL_LOST_TOTAL};

pub(super) struct Writer {
    shared: Arc<Shared>,
    store: Box<dyn Store>,
    /// Messages in the last commit, and when it ended.
    last_records: u32,
    last_end: Instant,
    losses: Losses,
    /// Rows on their way; kept when a commit fails.
    rows: PendingRows,
    /// Last cursor written, per lane.
    written: Vec<(u64, u64)>,
    /// Reported by readers; then noted as lost; then moved, with the next acknowledgements.
    found_damaged: Vec<(usize, RowHead)>,
    quarantine: Vec<(usize, RowHead)>,
    /// Dropped sinks, answered when it is written.
    replies: Vec<(SyncSender<u64>, u64)>,
    more_to_delete: bool,
    acks_due: Option<Instant>,
    next_age_check: Instant,
    /// Estimate of the log's size.
    wal_bytes: u64,
    failures: u32,
    /// The last failure was for want of room.
    disk_full: bool,
    next_probe: Option<Instant>,
    commit_seconds: Histogram,
    commits_ok: Counter,
    commits_failed: Counter,
}

enum Work {
    Group(Group),
    Housekeeping,
    Stop,
}

/// A row that goes to disk with a commit.
struct Outgoing {
    lane: usize,
    head: RowHead,
    data: Bytes,
    /// Already in the tail, as one row or several.
    spilled: bool,
}

/// Ages are looked at this often.
const AGE_CHECK: Duration = Duration::from_secs(1);
/// Rows that one look may drop, per sink.
const EXPIRE_ROWS_MAX: usize = 64;
/// 2020-01-01: a message stamped earlier was stamped before the clock was set, and its age is not known.
const CLOCK_IS_SET_MS: u64 = 1_577_836_800_000;
const BACK_OFF_FIRST: Duration = Duration::from_millis(100);
const BACK_OFF_MAX: Duration = Duration::from_secs(5);
/// `drop_oldest` frees at least so much at a time, so that the ledger is not written with every commit.
const DROP_BYTES_MAX: u64 = 1 << 20;
/// Buffers kept for the next commit.
const KEEP_BYTES_MAX: usize = 64 << 10;

impl Writer {
    pub fn new(shared: Arc<Shared>, store: Box<dyn Store>) -> Writer {
        let written = shared.lanes.iter().map(|lane| lane.state.lock()).map(|s| (s.acked, s.dropped)).collect();
        let now = Instant::now();
        Writer {
            shared,
            store,
            last_records: 1,
            last_end: now,
            losses: Losses::default(),
            rows: PendingRows::default(),
            written,
            found_damaged: Vec::new(),
            quarantine: Vec::new(),
            replies: Vec::new(),
            more_to_delete: true,
            acks_due: Some(now),
            next_age_check: now + AGE_CHECK,
            wal_bytes: 0,
            failures: 0,
            disk_full: false,
            next_probe: None,
            commit_seconds: histogram!(SPOOL_COMMIT_SECONDS),
            commits_ok: counter!(SPOOL_COMMITS_TOTAL, "outcome" => "ok"),
            commits_failed: counter!(SPOOL_COMMITS_TOTAL, "outcome" => "failed"),
        }
    }

    pub fn run(mut self) {
        let _gone = Gone(Arc::clone(&self.shared));
        loop {
            match self.next_work() {
                Work::Group(group) => {
                    self.commit_group(group);
                    if self.housekeeping_due().is_some_and(|due| due <= Instant::now()) {
                        self.housekeeping(false);
                    }
                }
                Work::Housekeeping => self.housekeeping(false),
                Work::Stop => break,
            }
            if self.wal_bytes > u64::from(self.shared.config.wal_bytes_max) {
                self.checkpoint();
            }
        }
        self.housekeeping(true);
        for lane in &self.shared.lanes {
            let bytes = lane.state.lock().unstored_bytes;
            if bytes > 0 {
                tracing::error!(sink = lane.name, bytes, "messages in memory could not be written and are lost");
            }
        }
        if let Err(error) = self.store.checkpoint(true) {
            tracing::debug!(%error, "spool log could not be emptied at shutdown");
        }
    }

    /// Sleeps until there is something to do.
    fn next_work(&mut self) -> Work {
        let shared = Arc::clone(&self.shared);
        let delay = Duration::from_millis(u64::from(shared.config.commit_delay_ms));
        let mut gather_until = None;
        let mut inbox = shared.inbox.lock();
        loop {
            self.take_notes(&mut inbox);
            let now = Instant::now();
            let due = self.housekeeping_due();
            let mut wake_at = due;
            let mut ready = false;
            inbox.wake_records = 1;
            if let Some(group) = inbox.groups.front().filter(|group| group.records > 0) {
                let busy = now.duration_since(self.last_end) < delay * 4;
                let expected = if busy { self.last_records } else { 1 };
                // Without an fsync to share, time alone makes a commit worth its pages.
                let until = if group.sync { now + delay } else { self.last_end + delay };
                let until = *gather_until.get_or_insert(until);
                let full = inbox.groups.len() > 1 || group.bytes >= shared.config.commit_bytes_max as usize;
                let gathered = now >= until || (group.sync && group.records >= expected);
                ready = full || gathered || inbox.stopping || !group.durable;
                wake_at = Some(due.map_or(until, |due| due.min(until)));
                inbox.wake_records = if group.sync { expected } else { u32::MAX };
            } else if inbox.stopping {
                return Work::Stop;
            }
            if ready && let Some(group) = inbox.groups.pop_front() {
                inbox.records = inbox.records.saturating_sub(group.records);
                inbox.bytes = inbox.bytes.saturating_sub(group.bytes);
                return Work::Group(group);
            }
            if due.is_some_and(|due| due <= now) {
                return Work::Housekeeping;
            }
            inbox.sleeping = true;
            match wake_at {
                Some(at) => {
                    shared.wake.wait_until(&mut inbox, at);
                }
                None => shared.wake.wait(&mut inbox),
            }
            inbox.sleeping = false;
        }
    }

    /// Takes orders and flags out of the inbox.
    fn take_notes(&mut self, inbox: &mut super::inbox::Inbox) {
        let delay = Duration::from_millis(u64::from(self.shared.config.ack_delay_ms));
        let dirty = std::mem::take(&mut inbox.acks_dirty) || !inbox.rows.is_empty();
        if dirty && self.acks_due.is_none() {
            self.acks_due = Some(Instant::now() + delay);
        }
        for order in std::mem::take(&mut inbox.orders) {
            match order {
                Order::Quarantine { lane, head } => self.found_damaged.push((lane, head)),
                Order::Drop { lane, reply } => {
                    let dropped = self.drop_all(inbox, lane);
                    self.replies.push((reply, dropped));
                }
            }
            self.acks_due = Some(Instant::now());
        }
    }

    fn housekeeping_due(&self) -> Option<Instant> {
        let spill_after = Duration::from_millis(u64::from(self.shared.config.spill_after_ms));
        if self.next_probe.is_some() {
            return self.next_probe;
        }
        let mut due = self.acks_due;
        let mut sooner = |at: Instant| due = Some(due.map_or(at, |due| due.min(at)));
        for lane in &self.shared.lanes {
            let state = lane.state.lock();
            if state.end > state.acked {
                sooner(self.next_age_check);
            }
            if let Some(since) = state.unstored_since {
                let half = self.shared.config.memory_bytes_per_sink_max as usize / 2;
                sooner(if state.unstored_bytes > half { since } else { since + spill_after });
            }
        }
        due
    }

    fn commit_group(&mut self, mut group: Group) {
        self.set_aside();
        if !group.durable {
            self.keep_in_memory(&mut group);
        } else if self.next_probe.is_some() {
            // The disk failed a moment ago; the probe will say when it is back.
            self.refuse(&mut group);
        } else {
            match self.write(Some(&mut group), false) {
                Ok(()) => {
                    self.failures = 0;
                    for waiter in group.waiters.drain(..) {
                        answer(waiter.completion.as_ref(), waiter.token, Ok(waiter.receipt));
                    }
                    self.last_records = group.records.max(1);
                    self.last_end = Instant::now();
                }
                Err(error) => {
                    self.failed(&error);
                    self.refuse(&mut group);
                }
            }
        }
        self.recycle(group);
    }

    /// Messages that nobody waits for: readable now, on disk later.
    fn keep_in_memory(&mut self, group: &mut Group) {
        for (index, pack) in group.packs.iter_mut().enumerate() {
            if !pack.is_empty() {
                self.make_room(index, pack.bytes() as u64);
                self.append_unstored(index, pack);
            }
        }
    }

    fn append_unstored(&self, index: usize, pack: &mut Pack) {
        let Some(lane) = self.shared.lanes.get(index) else { return };
        let unstored = {
            let mut state = lane.state.lock();
            let head = next_row(&state, pack);
            let data = Bytes::copy_from_slice(pack.seal());
            let memory_bytes_max = self.shared.config.memory_bytes_per_sink_max as usize;
            state.append(TailRow { head, data, stored: false }, memory_bytes_max);
            wake_reader(&state, lane);
            state.unstored_bytes
        };
        if let Some(gauge) = self.shared.inbox.lock().unstored.get_mut(index) {
            *gauge = unstored;
        }
    }

    /// One transaction: the group's rows, what the same sinks have only in memory, and acknowledgements if they are due.
    fn write(&mut self, group: Option<&mut Group>, everything: bool) -> rusqlite::Result<()> {
        let shared = Arc::clone(&self.shared);
        let now = Instant::now();
        let mut outgoing = Vec::new();
        let mut sync = false;
        let mut packs: &mut [Pack] = &mut [];
        let mut backlog: &[OpenRow] = &[];
        if let Some(group) = group {
            sync = group.sync;
            packs = &mut group.packs;
            for row in &mut group.backlog {
                row.pack.seal();
            }
            backlog = &group.backlog;
        }
        for (index, lane) in shared.lanes.iter().enumerate() {
            let pack = packs.get_mut(index).filter(|pack| !pack.is_empty());
            if let Some(pack) = &pack {
                self.try_make_room(index, pack.bytes() as u64)?;
            }
            let state = lane.state.lock();
            let spill_after = Duration::from_millis(u64::from(shared.config.spill_after_ms));
            let half = shared.config.memory_bytes_per_sink_max as usize / 2;
            let due =
                state.unstored_since.is_some_and(|since| since + spill_after <= now) || state.unstored_bytes > half;
            if state.unstored_bytes > 0 && (pack.is_some() || due || everything) {
                spill(index, &state, shared.config.commit_bytes_max as usize, &mut outgoing);
            }
            if let Some(pack) = pack {
                let head = next_row(&state, pack);
                outgoing.push(Outgoing {
                    lane: index,
                    head,
                    data: Bytes::copy_from_slice(pack.seal()),
                    spilled: false,
                });
            }
        }
        // Whoever waits for a row has set it before joining the group, so it is here.
        self.rows.absorb(std::mem::take(&mut shared.inbox.lock().rows));
        let with_acks = everything || self.acks_due.is_some_and(|due| due <= now) || !self.losses.is_empty();
        self.transaction(&outgoing, backlog, sync, with_acks)?;
        if !backlog.is_empty() {
            let asked_again = shared.backlog.lock().stored(backlog);
            self.ask_again(asked_again);
        }
        for row in outgoing {
            let Some(lane) = shared.lanes.get(row.lane) else { continue };
            let mut state = lane.state.lock();
            let memory_bytes_max = shared.config.memory_bytes_per_sink_max as usize;
            if row.spilled {
                mark_stored(&mut state, &row.head, memory_bytes_max);
            } else {
                state.append(TailRow { head: row.head, data: row.data, stored: true }, memory_bytes_max);
            }
            wake_reader(&state, lane);
            let unstored = state.unstored_bytes;
            drop(state);
            if let Some(gauge) = shared.inbox.lock().unstored.get_mut(row.lane) {
                *gauge = unstored;
            }
        }
        Ok(())
    }

    /// Gives up the oldest messages for sessions beyond `backlog_bytes_max`; whoever wanted them finds them missing.
    fn make_backlog_room(&mut self) {
        let mut rows = self.shared.backlog.lock();
        let given_up = rows.make_room(self.shared.config.backlog_bytes_max.bytes());
        if given_up > 0 {
            self.acks_due = Some(Instant::now());
            tracing::warn!(
                rows = given_up,
                "spool.backlog_bytes_max reached, the oldest messages for sessions are dropped"
            );
        }
    }

    /// Questions for messages that were in a commit.
    fn ask_again(&self, questions: Vec<Question>) {
        for question in questions {
            // Without the reading thread there is nobody left to ask.
            let _ = self.shared.fetch.send(Fetch::Backlog(question));
        }
    }

    fn transaction(
        &mut self,
        outgoing: &[Outgoing],
        backlog: &[OpenRow],
        sync: bool,
        with_acks: bool,
    ) -> rusqlite::Result<()> {
        if !backlog.is_empty() {
            self.make_backlog_room();
        }
        let dead = if with_acks { self.shared.backlog.lock().take_dead() } else { Vec::new() };
        let result = self.try_transaction(outgoing, backlog, &dead, sync, with_acks);
        if result.is_err() && !dead.is_empty() {
            self.shared.backlog.lock().put_back(dead);
        }
        result
    }

    fn try_transaction(
        &mut self,
        outgoing: &[Outgoing],
        backlog: &[OpenRow],
        backlog_dead: &[u64],
        sync: bool,
        with_acks: bool,
    ) -> rusqlite::Result<()> {
        let shared = Arc::clone(&self.shared);
        let kept = Some(&self.rows).filter(|rows| !rows.is_empty());
        let backlog_end = shared.inbox.lock().position;
        let mut commit = Commit { sync, kept, backlog, backlog_dead, backlog_end, ..Commit::default() };
        let mut acked = Vec::new();
        if with_acks {
            // Cursors before losses: a reader notes the loss first, so whatever is acknowledged here has its entry below.
            for (index, lane) in shared.lanes.iter().enumerate() {
                let state = lane.state.lock();
                let now = (state.acked, state.dropped);
                if self.more_to_delete || self.written.get(index) != Some(&now) {
                    acked.push((index, now));
                    commit.acks.push(Ack { table: lane.table, acked: now.0, dropped: now.1 });
                }
            }
            self.losses.absorb(std::mem::take(&mut *shared.losses.lock()));
            let name = |lane: usize| shared.lanes.get(lane).map_or("", |lane| lane.name.as_str());
            commit.losses = self.losses.rows().map(|(key, sum)| (name(key.lane), key, sum)).collect();
            let damaged = self.quarantine.iter();
            commit.damaged = damaged
                .filter_map(|(lane, head)| shared.lanes.get(*lane).map(|lane| (lane.table, lane.name.as_str(), *head)))
                .collect();
            // The ledger's promise is durability.
            commit.sync |= !commit.losses.is_empty() || !commit.damaged.is_empty();
        }
        commit.rows = outgoing
            .iter()
            .filter_map(|row| {
                Some(NewRow { table: shared.lanes.get(row.lane)?.table, head: row.head, data: &row.data })
            })
            .collect();
        let nothing = commit.rows.is_empty() && commit.acks.is_empty() && commit.losses.is_empty();
        let nothing = nothing && commit.damaged.is_empty() && commit.kept.is_none();
        let more = if nothing && backlog.is_empty() && backlog_dead.is_empty() {
            false
        } else {
            let start = Instant::now();
            let result = self.store.commit(&commit);
            self.commit_seconds.record(start.elapsed().as_secs_f64());
            if result.is_ok() { &self.commits_ok } else { &self.commits_failed }.increment(1);
            result?
        };
        let data: usize = outgoing.iter().map(|row| row.data.len()).sum();
        // Four pages of tree, freelist and header beside the data.
        self.wal_bytes += data as u64 + 4 * 2072 * (1 + acked.len() as u64);
        let stored: usize = backlog.iter().map(OpenRow::bytes).sum();
        self.wal_bytes += stored as u64 + 4 * 2072 * (usize::from(!backlog.is_empty()) + backlog_dead.len()) as u64;
        // A row that changes rewrites its page.
        self.wal_bytes += (self.rows.bytes() + 2072 * self.rows.len()) as u64;
        if with_acks {
            for (sink, key, sum) in &commit.losses {
                counter!(SPOOL_LOST_TOTAL, "sink" => sink.to_string(), "reason" => key.reason.as_str())
                    .increment(sum.records);
            }
            for (index, now) in acked {
                if let Some(written) = self.written.get_mut(index) {
                    *written = now;
                }
            }
            self.losses = Losses::default();
            self.quarantine.clear();
            for (reply, records) in self.replies.drain(..) {
                let _ = reply.send(records);
            }
            let more = more || shared.backlog.lock().has_dead();
            self.more_to_delete = more;
            self.acks_due = more.then(Instant::now);
        }
        self.rows = PendingRows::default();
        Ok(())
    }

    fn housekeeping(&mut self, everything: bool) {
        if self.next_probe.is_some_and(|at| everything || at <= Instant::now()) {
            if self.disk_full {
                self.store.use_reserve();
            }
            // The log may be what fills the disk; copied, it is reused from its start.
            let _ = self.store.checkpoint(false);
            // What sinks have taken since makes room for the rest.
            self.set_aside();
            // Rows would take it again.
            let rows = std::mem::take(&mut self.rows);
            let _ = self.transaction(&[], &[], false, true);
            self.rows = rows;
            self.restore_reserve();
            if let Err(error) = self.store.probe() {
                self.failed(&error);
                return;
            }
            self.recovered();
        }
        if self.next_probe.is_some() {
            return;
        }
        self.set_aside();
        if self.next_age_check <= Instant::now() {
            self.expire();
            self.next_age_check = Instant::now() + AGE_CHECK;
        }
        loop {
            if let Err(error) = self.write(None, everything) {
                self.failed(&error);
                return;
            }
            if !(everything && self.more_to_delete) {
                return;
            }
        }
    }

    /// Damaged rows: into the ledger, and past them if they are in front.
    fn set_aside(&mut self) {
        let now_ms = now_ms();
        for (index, head) in std::mem::take(&mut self.found_damaged) {
            self.quarantine.push((index, head));
            let Some(lane) = self.shared.lanes.get(index) else { continue };
            self.losses.add_unread(index, Reason::Damaged, u64::from(head.records), 0, now_ms);
            let (freed, unstored) = {
                let mut state = lane.state.lock();
                state.dropped += u64::from(head.records);
                state.skipped.push(head);
                let acked = state.acked;
                (state.advance(acked), state.unstored_bytes)
            };
            self.shared.freed(index, freed, unstored);
        }
    }

    fn expire(&mut self) {
        let now_ms = now_ms();
        for index in 0..self.shared.lanes.len() {
            for _ in 0..EXPIRE_ROWS_MAX {
                let age_max_ms = match self.shared.lanes.get(index) {
                    Some(lane) if !lane.orphaned => lane.queue.age_max.0.as_millis(),
                    Some(_) | None => break,
                };
                let newest_ms = match self.front(index) {
                    Ok(Some(head)) => head.newest_ms,
                    Ok(None) => break,
                    Err(error) => return self.failed(&error),
                };
                let old = u128::from(now_ms.saturating_sub(newest_ms)) > age_max_ms;
                if !old || newest_ms < CLOCK_IS_SET_MS {
                    break;
                }
                if let Err(error) = self.drop_front(index, Reason::Expired) {
                    return self.failed(&error);
                }
            }
        }
    }

    /// The oldest row that is not acknowledged; keeps what the lane knows of it fresh.
    fn front(&mut self, index: usize) -> rusqlite::Result<Option<RowHead>> {
        let Some(lane) = self.shared.lanes.get(index) else { return Ok(None) };
        let acked = {
            let state = lane.state.lock();
            if state.acked >= state.end {
                return Ok(None);
            }
            if let Some(head) = state.oldest() {
                return Ok(Some(head));
            }
            state.acked
        };
        let head = self.store.head(lane.table, acked)?;
        lane.state.lock().front = head;
        Ok(head)
    }

    fn make_room(&mut self, index: usize, bytes: u64) {
        if let Err(error) = self.try_make_room(index, bytes) {
            self.failed(&error);
        }
    }

    /// For `drop_oldest`: drops rows until `bytes` fit. May leave the queue over its limit by one commit.
    fn try_make_room(&mut self, index: usize, bytes: u64) -> rusqlite::Result<()> {
        let Some(lane) = self.shared.lanes.get(index) else { return Ok(()) };
        if lane.queue.when_full != WhenFull::DropOldest {
            return Ok(());
        }
        let bytes_max = lane.queue.bytes_max.bytes();
        let queued = lane.state.lock().queued_bytes();
        if queued.saturating_add(bytes) <= bytes_max {
            return Ok(());
        }
        let goal = bytes_max.saturating_sub(bytes).saturating_sub((bytes_max / 16).min(DROP_BYTES_MAX));
        while self.shared.lanes.get(index).is_some_and(|lane| lane.state.lock().queued_bytes() > goal) {
            if !self.drop_front(index, Reason::QueueFull)? {
                break;
            }
        }
        Ok(())
    }

    /// Drops the oldest row into the ledger; false when there is none.
    fn drop_front(&mut self, index: usize, reason: Reason) -> rusqlite::Result<bool> {
        let shared = Arc::clone(&self.shared);
        let Some(lane) = shared.lanes.get(index) else { return Ok(false) };
        let (acked, in_memory) = {
            let state = lane.state.lock();
            if state.acked >= state.end {
                return Ok(false);
            }
            let row = state.tail.front().filter(|row| row.head.position <= state.acked);
            (state.acked, row.map(|row| (row.head, row.data.clone())))
        };
        let (head, data) = match in_memory {
            Some(row) => row,
            None => match self.store.row(lane.table, acked)? {
                Some(row) => row,
                None => return Ok(false),
            },
        };
        let now_ms = now_ms();
        let gone = head.end().saturating_sub(acked.max(head.position));
        match record::decode(&data) {
            Ok(messages) => {
                let already = usize::try_from(acked.saturating_sub(head.position)).unwrap_or(usize::MAX);
                for message in messages.iter().skip(already) {
                    self.losses.add(index, reason, message, now_ms);
                }
            }
            Err(_) => self.losses.add_unread(index, reason, gone, data.len() as u64, now_ms),
        }
        let (freed, unstored) = {
            let mut state = lane.state.lock();
            state.dropped += gone;
            if state.handed.front().is_none_or(|row| row.position > head.position) {
                // So that the bytes are released with the position.
                state.handed.push_front(head);
            }
            (state.advance(head.end()), state.unstored_bytes)
        };
        shared.freed(index, freed, unstored);
        tracing::debug!(sink = lane.name, reason = reason.as_str(), records = gone, "spool dropped messages");
        Ok(true)
    }

    /// The operator's order. The inbox is locked by the caller.
    fn drop_all(&mut self, inbox: &mut super::inbox::Inbox, index: usize) -> u64 {
        let Some(lane) = self.shared.lanes.get(index) else { return 0 };
        let mut state = lane.state.lock();
        let (records, bytes) = (state.end.saturating_sub(state.acked), state.queued_bytes());
        if records == 0 {
            return 0;
        }
        self.losses.add_unread(index, Reason::Dropped, records, bytes, now_ms());
        state.dropped += records;
        let end = state.end;
        let freed = state.advance(end);
        let gauges = (inbox.queued.get_mut(index), inbox.unstored.get_mut(index));
        if let (Some(queued), Some(unstored)) = gauges {
            *queued = queued.saturating_sub(freed);
            *unstored = 0;
        }
        tracing::info!(sink = lane.name, records, "spool sink dropped by the operator");
        records
    }

    /// Nothing of this group was stored: its messages are refused, except those that were accepted on receipt.
    fn refuse(&mut self, group: &mut Group) {
        for index in 0..group.packs.len() {
            let kept: Vec<u32> = group.accepted.iter().filter(|(lane, _)| *lane == index).map(|(_, at)| *at).collect();
            let Some(pack) = group.packs.get_mut(index).filter(|pack| !pack.is_empty()) else { continue };
            let bytes = pack.bytes();
            let mut rest = Pack::default();
            if !kept.is_empty()
                && let Ok(messages) = record::decode(&Bytes::copy_from_slice(pack.seal()))
            {
                for (at, message) in (0u32..).zip(&messages) {
                    if kept.binary_search(&at).is_ok() {
                        rest.push(message);
                    }
                }
            }
            if let Some(queued) = self.shared.inbox.lock().queued.get_mut(index) {
                *queued = queued.saturating_sub((bytes - rest.bytes().min(bytes)) as u64);
            }
            if !rest.is_empty() {
                self.append_unstored(index, &mut rest);
            }
        }
        if !group.backlog.is_empty() {
            let asked_again = self.shared.backlog.lock().refused(&group.backlog);
            self.ask_again(asked_again);
        }
        let retry_after = self.retry_after();
        for waiter in group.waiters.drain(..) {
            answer(waiter.completion.as_ref(), waiter.token, Err(Reject::Full { limit: "spool", retry_after }));
        }
    }

    fn retry_after(&self) -> Duration {
        BACK_OFF_FIRST.saturating_mul(1 << self.failures.min(8)).clamp(Duration::from_secs(1), BACK_OFF_MAX)
    }

    fn failed(&mut self, error: &rusqlite::Error) {
        self.disk_full |= error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull);
        self.failures = self.failures.saturating_add(1);
        let pause = BACK_OFF_FIRST.saturating_mul(1 << (self.failures - 1).min(8)).min(BACK_OFF_MAX);
        self.next_probe = Some(Instant::now() + pause);
        let failure = Failure { detail: error.to_string(), retry_after: self.retry_after() };
        let known = self.shared.inbox.lock().failing.replace(failure);
        if known.is_none() {
            tracing::error!(%error, "spool cannot be written, refusing messages");
        }
    }

    fn recovered(&mut self) {
        self.next_probe = None;
        self.disk_full = false;
        self.acks_due = Some(Instant::now());
        self.shared.inbox.lock().failing = None;
        tracing::info!("spool takes writes again");
    }

    fn checkpoint(&mut self) {
        if self.store.checkpoint(false).is_err() {
            self.store.use_reserve();
            if let Err(error) = self.store.checkpoint(false) {
                // The log holds everything; it grows until this works.
                tracing::warn!(%error, "spool log could not be copied into the database");
            }
        }
        self.restore_reserve();
        self.wal_bytes = 0;
    }

    fn restore_reserve(&mut self) {
        match self.store.restore_reserve() {
            Ok(free) => self.shared.free_bytes.store(free, Ordering::Relaxed),
            Err(error) => self.failed(&error),
        }
    }

    fn recycle(&self, mut group: Group) {
        for pack in &mut group.packs {
            pack.clear(KEEP_BYTES_MAX);
        }
        group.waiters.clear();
        group.accepted.clear();
        self.shared.inbox.lock().spare =
            Some(Group { packs: group.packs, waiters: group.waiters, accepted: group.accepted, ..Group::default() });
    }
}

/// The row that a pack becomes at the end of a lane.
fn next_row(state: &LaneState, pack: &Pack) -> RowHead {
    RowHead {
        position: state.end,
        records: pack.records(),
        bytes_end: state.end_bytes + pack.bytes() as u64,
        oldest_ms: pack.oldest_ms(),
        newest_ms: pack.newest_ms(),
    }
}

/// Joins what a lane has only in memory into rows of up to `bytes_max`.
fn spill(lane: usize, state: &LaneState, bytes_max: usize, outgoing: &mut Vec<Outgoing>) {
    let mut open: Option<(RowHead, Vec<u8>)> = None;
    let mut close = |open: &mut Option<(RowHead, Vec<u8>)>| {
        if let Some((head, data)) = open.take() {
            outgoing.push(Outgoing { lane, head, data: data.into(), spilled: true });
        }
    };
    for row in state.tail.iter().filter(|row| !row.stored) {
        let fits = |(head, data): &(RowHead, Vec<u8>)| {
            head.end() == row.head.position && data.len() + row.data.len() <= bytes_max
        };
        if !open.as_ref().is_some_and(fits) {
            close(&mut open);
        }
        let (head, data) = open.get_or_insert_with(|| (RowHead { records: 0, ..row.head }, Vec::new()));
        head.records += row.head.records;
        head.bytes_end = row.head.bytes_end;
        head.oldest_ms = head.oldest_ms.min(row.head.oldest_ms);
        head.newest_ms = head.newest_ms.max(row.head.newest_ms);
        data.extend_from_slice(&row.data);
    }
    close(&mut open);
}

/// The rows that `head` was joined from are on disk now.
fn mark_stored(state: &mut LaneState, head: &RowHead, memory_bytes_max: usize) {
    let mut stored = 0;
    for row in &mut state.tail {
        if !row.stored && row.head.position >= head.position && row.head.end() <= head.end() {
            row.stored = true;
            stored += row.data.len();
        }
    }
    state.unstored_bytes = state.unstored_bytes.saturating_sub(stored);
    if state.unstored_bytes == 0 {
        state.unstored_since = None;
    }
    state.trim(memory_bytes_max);
}

fn wake_reader(state: &LaneState, lane: &super::lane::Lane) {
    if state.end >= state.wake_at {
        lane.news.notify_one();
    }
}

/// A completion that panics must not take the queue with it.
fn answer(completion: &dyn crate::message::Completion, token: u64, outcome: Result<crate::message::Receipt, Reject>) {
    let call = std::panic::AssertUnwindSafe(|| completion.complete(token, outcome));
    if std::panic::catch_unwind(call).is_err() {
        tracing::error!("a completion panicked");
    }
}

pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Whatever ends the thread: nobody waits for it afterwards.
struct Gone(Arc<Shared>);

impl Drop for Gone {
    fn drop(&mut self) {
        let (groups, orders) = {
            let mut inbox = self.0.inbox.lock();
            inbox.writer_gone = true;
            (std::mem::take(&mut inbox.groups), std::mem::take(&mut inbox.orders))
        };
        drop(orders);
        // Nobody will answer them; dropped without the lock, for they may hold the last handle.
        let questions = self.0.backlog.lock().take_questions();
        drop(questions);
        for waiter in groups.into_iter().flat_map(|group| group.waiters) {
            answer(waiter.completion.as_ref(), waiter.token, Err(Reject::ShuttingDown));
        }
    }
}

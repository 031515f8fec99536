//! One sink's way out: batches from memory or from disk, in order, and their acknowledgement.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::backlog::{Answers, Question};
use super::inbox::{Order, Shared};
use super::lane::{Lane, RowHead};
use super::ledger::Reason;
use super::store::{Reads, Table};
use super::{record, writer};
use crate::message::Message;

/// Where a batch or a record ends; acknowledging it acknowledges everything before it in the same sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor(u64);

/// A message as it was appended (`origin.session` excepted), and where it ends.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    pub message: Message,
    pub cursor: Cursor,
}

/// Records in the order they were appended.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// At least one.
    pub records: Vec<Stored>,
    /// Behind the last record.
    pub cursor: Cursor,
    /// Some of it came from disk: the sink is catching up.
    pub replayed: bool,
}

/// Reads one sink. Starts, after every start of the gateway and after [`rewind`](Reader::rewind), at the first record that is not acknowledged.
pub struct Reader {
    shared: Arc<Shared>,
    index: usize,
    next: u64,
    /// The rest of the row at `next`, last record first.
    row: Vec<Stored>,
    row_is_replayed: bool,
    /// The batch being gathered; kept here so that a dropped call loses nothing.
    gathered: Vec<Stored>,
    gathered_bytes: usize,
    replayed: bool,
    linger_until: Option<Instant>,
}

/// A question to the reading thread.
pub(super) enum Fetch {
    Row { table: Table, position: u64, reply: oneshot::Sender<Fetched> },
    Backlog(Question),
    Stop,
}

pub(super) type Fetched = Result<Option<(RowHead, Bytes)>, String>;

/// The thread `spool-read`.
pub(super) fn serve(shared: &Shared, reads: Reads, fetches: &Receiver<Fetch>) {
    let mut answers = Answers::default();
    while let Ok(fetch) = fetches.recv() {
        match fetch {
            Fetch::Backlog(question) => answers.answer(&shared.backlog, &reads, question),
            Fetch::Row { table, position, reply } => {
                let row = reads.row(table, position).map_err(|error| error.to_string());
                let _ = reply.send(row);
            }
            Fetch::Stop => break,
        }
        if shared.inbox.lock().stopping {
            break;
        }
    }
}

/// What a look for the next row found.
enum Next {
    Row(RowHead, Bytes, bool),
    Nothing,
    Retry,
}

/// Pause after a failed read.
const READ_RETRY: Duration = Duration::from_secs(1);

impl Reader {
    pub(super) fn new(shared: Arc<Shared>, index: usize) -> Reader {
        Reader {
            shared,
            index,
            next: 0,
            row: Vec::new(),
            row_is_replayed: false,
            gathered: Vec::new(),
            gathered_bytes: 0,
            replayed: false,
            linger_until: None,
        }
    }

    /// Waits for a record, then up to `linger` for more. None when the spool is closed.
    ///
    /// A batch has 1 to `records_max` records and, unless it is a single one, at most `bytes_max` bytes of topics and payloads.
    /// May be called again before the batch is acknowledged: the next one follows it.
    ///
    /// # Cancel safety
    /// Safe: what was gathered is in the next call's batch.
    pub async fn next_batch(&mut self, records_max: usize, bytes_max: usize, linger: Duration) -> Option<Batch> {
        let records_max = records_max.max(1);
        let shared = Arc::clone(&self.shared);
        let lane = shared.lanes.get(self.index)?;
        loop {
            self.skip_dropped(lane);
            if self.gather(records_max, bytes_max) {
                return Some(self.batch());
            }
            let news = lane.news.notified();
            match self.load(lane, records_max).await {
                Next::Row(head, data, replayed) => self.open_row(lane, head, &data, replayed),
                Next::Retry | Next::Nothing if shared.inbox.lock().stopping => {
                    return if self.gathered.is_empty() { None } else { Some(self.batch()) };
                }
                Next::Retry => tokio::time::sleep(READ_RETRY).await,
                Next::Nothing if self.gathered.is_empty() => news.await,
                Next::Nothing => {
                    let asked = Instant::now() + linger;
                    let until = self.linger_until.map_or(asked, |until| until.min(asked));
                    self.linger_until = Some(until);
                    if Instant::now() >= until {
                        return Some(self.batch());
                    }
                    // Either way, what is there by then is gathered before the batch is closed.
                    let _ = tokio::time::timeout_at(until, news).await;
                }
            }
        }
    }

    /// Everything before the cursor was taken by the upstream. Written within `ack_delay_ms`; never blocks.
    pub fn done(&mut self, cursor: Cursor) {
        let Some(lane) = self.shared.lanes.get(self.index) else { return };
        let (freed, unstored) = {
            let mut state = lane.state.lock();
            (state.advance(cursor.0), state.unstored_bytes)
        };
        self.shared.freed(self.index, freed, unstored);
    }

    /// Notes messages that the upstream will never take. They stay queued until [`done`](Reader::done), which is written together with their entry in the ledger.
    pub fn lose(&mut self, records: &[Stored], reason: Reason) {
        let now_ms = writer::now_ms();
        let mut losses = self.shared.losses.lock();
        for record in records {
            losses.add(self.index, reason, &record.message, now_ms);
        }
        drop(losses);
        if let Some(lane) = self.shared.lanes.get(self.index) {
            lane.state.lock().dropped += records.len() as u64;
        }
    }

    /// Messages that the queue has taken in its life.
    pub fn appended(&self) -> u64 {
        self.shared.lanes.get(self.index).map_or(0, |lane| lane.state.lock().end)
    }

    /// Goes back to the first record that is not acknowledged.
    pub fn rewind(&mut self) {
        self.next = 0;
        self.row.clear();
        self.gathered.clear();
        self.gathered_bytes = 0;
        self.linger_until = None;
        if let Some(lane) = self.shared.lanes.get(self.index) {
            lane.state.lock().handed.clear();
        }
    }

    /// Moves from the open row to the batch; true when the batch is full.
    fn gather(&mut self, records_max: usize, bytes_max: usize) -> bool {
        while let Some(record) = self.row.last() {
            let bytes = record.message.topic.as_str().len() + record.message.payload.len();
            let full = self.gathered.len() >= records_max || self.gathered_bytes + bytes > bytes_max;
            if full && !self.gathered.is_empty() {
                return true;
            }
            if let Some(record) = self.row.pop() {
                self.next = record.cursor.0;
                self.gathered.push(record);
                self.gathered_bytes += bytes;
                self.replayed |= self.row_is_replayed;
            }
        }
        self.gathered.len() >= records_max || self.gathered_bytes >= bytes_max && !self.gathered.is_empty()
    }

    fn batch(&mut self) -> Batch {
        let records = std::mem::take(&mut self.gathered);
        self.gathered_bytes = 0;
        self.linger_until = None;
        let replayed = std::mem::take(&mut self.replayed);
        Batch { cursor: records.last().map_or(Cursor(self.next), |record| record.cursor), records, replayed }
    }

    /// Leaves behind what was dropped under our feet.
    fn skip_dropped(&mut self, lane: &Lane) {
        let acked = lane.state.lock().acked;
        if self.next < acked {
            self.next = acked;
        }
        while self.row.pop_if(|record| record.cursor.0 <= acked).is_some() {}
        if self.gathered.first().is_some_and(|record| record.cursor.0 <= acked) {
            self.gathered.retain(|record| record.cursor.0 > acked);
            self.gathered_bytes =
                self.gathered.iter().map(|r| r.message.topic.as_str().len() + r.message.payload.len()).sum();
        }
    }

    /// Finds the row at `next`: in memory, else on disk.
    async fn load(&mut self, lane: &Lane, records_max: usize) -> Next {
        let fetched = {
            let mut state = lane.state.lock();
            let next = self.next.max(state.acked);
            if next >= state.end {
                state.behind = false;
                let missing = records_max.saturating_sub(self.gathered.len()).max(1) as u64;
                // With a batch begun, waking for each message would be waste; the deadline wakes us anyway.
                state.wake_at =
                    if self.gathered.is_empty() { state.end + 1 } else { state.end.saturating_add(missing) };
                return Next::Nothing;
            }
            if next >= state.tail_start() {
                state.behind = false;
                let at = state.tail.partition_point(|row| row.head.end() <= next);
                let Some(row) = state.tail.get(at) else { return Next::Nothing };
                return Next::Row(row.head, row.data.clone(), false);
            }
            state.behind = true;
            next
        };
        let (reply, answer) = oneshot::channel();
        if self.shared.fetch.send(Fetch::Row { table: lane.table, position: fetched, reply }).is_err() {
            return Next::Retry;
        }
        match answer.await {
            Ok(Ok(Some((head, data)))) => Next::Row(head, data, true),
            Ok(Ok(None)) => self.nothing_stored(lane),
            Ok(Err(detail)) => {
                tracing::error!(sink = lane.name, detail, "spool cannot be read, trying again");
                Next::Retry
            }
            // The thread has stopped; so will we.
            Err(_) => Next::Retry,
        }
    }

    /// The disk has no row where one should be: it was dropped meanwhile, or the file was tampered with. Goes on with what is in memory.
    fn nothing_stored(&mut self, lane: &Lane) -> Next {
        let (missing, freed, unstored) = {
            let mut state = lane.state.lock();
            let start = state.tail_start();
            let missing = start.saturating_sub(state.acked.max(self.next));
            self.next = self.next.max(start);
            let freed = if self.gathered.is_empty() { state.advance(start) } else { 0 };
            (missing, freed, state.unstored_bytes)
        };
        if missing > 0 {
            tracing::error!(sink = lane.name, records = missing, "spool rows are missing");
            self.shared.losses.lock().add_unread(self.index, Reason::Damaged, missing, 0, writer::now_ms());
            lane.state.lock().dropped += missing;
        }
        self.shared.freed(self.index, freed, unstored);
        Next::Nothing
    }

    fn open_row(&mut self, lane: &Lane, head: RowHead, data: &Bytes, replayed: bool) {
        match record::decode(data) {
            Ok(messages) => {
                let mut state = lane.state.lock();
                if state.handed.back().is_none_or(|last| last.end() < head.end()) {
                    state.handed.push_back(head);
                }
                let from = self.next.max(state.acked);
                let positions = head.position..;
                let records = positions.zip(messages).map(|(at, message)| Stored { message, cursor: Cursor(at + 1) });
                self.row = records.filter(|record| record.cursor.0 > from).collect();
                self.row.reverse();
                self.row_is_replayed = replayed;
                if self.row.is_empty() {
                    // Fewer records than the row's own count: the rest does not exist.
                    self.next = head.end();
                }
            }
            Err(damage) => {
                tracing::error!(sink = lane.name, position = head.position, records = head.records, %damage, "spool row is damaged, set aside");
                self.next = head.end();
                self.shared.order(Order::Quarantine { lane: self.index, head });
            }
        }
    }
}

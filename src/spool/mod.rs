//! The durable store-and-forward queue: what an acknowledgement to a device rests on.
//!
//! Workers encode a record straight into the open commit of the inbox (one short lock, one copy, no allocation). One writer thread, `spool`, takes whole
//! commits, writes one packed row per sink in one SQLite transaction, and only then calls the completions. One reader per sink serves batches from
//! memory while it keeps up and from disk while it does not.
//!
//! Promises:
//! - `delivery = "disk"`: the completion is called after the fsync of the commit; the message survives `kill -9` and a power cut.
//!   `"os"`: after the write, not synced: survives `kill -9`, not a power cut. `"memory"`: accepted at once, readable at once, spilled to disk
//!   after `spill_after_ms` or at shutdown if the sink has not taken it by then.
//! - All sinks of one message are in one commit; a message with one `disk` sink waits for the fsync with all of them.
//! - FIFO per sink. At least once with a stable id: a lost acknowledgement only repeats messages under the same id.
//! - Whatever is thrown away is in the loss ledger, durably, with reason, device and sequence range, in the same commit.
//! - Memory is bounded: `pending_bytes_max` + sinks x (`memory_bytes_per_sink_max` + one batch) + SQLite's page caches (1 MiB).
//! - When the disk does not take a commit, its messages are refused, never acknowledged; what is stored stays readable.
//!
//! Deliberately not: exactly once, a query language, a file that shrinks (freed pages are reused; the file stays at its high-water mark).
//!
//! Cost per message: one lock, one encoding (a memcpy plus about 5 bytes), no allocation, 1/N of a commit. Per commit: one transaction, one fsync of the
//! WAL, about three pages beyond the data (leaf, page 1, freelist trunk).
//!
//! Measured (`bench.rs`, 2026-11-21, debug build with SQLite optimised, 2 cores at load 7, ext4, 200-byte payloads, `write_bytes` of `/proc/self/io` over
//! payload and topic): 64 closed-loop clients 18,300 acknowledgements/s with the uplink down and 2.69 bytes written per user byte, 17,600/s and 2.75 while
//! drained, on a disk that did 275 bare fsyncs/s: 1.04 of what 64 per fsync can give. 1,000 clients: 122,800/s and 2.12. One client: one fsync each.

mod backlog;
mod config;
mod eta;
mod inbox;
mod lane;
mod ledger;
mod reader;
mod record;
mod reserve;
mod rows;
mod store;
mod writer;

#[cfg(test)]
mod bench;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use metrics::{counter, gauge};
use parking_lot::{Condvar, Mutex};
use portable_atomic::{AtomicU64, Ordering};
use serde::Serialize;

pub use backlog::{Found, POSITION_MAX, Target};
pub use config::{Config, Delivery, QueueConfig, SinkConfig, WhenFull};
pub use ledger::{Loss, Reason, SEVERAL};
pub use reader::{Batch, Cursor, Reader, Stored};
pub use rows::{Kind, decode_message, encode_message};
pub use store::inspect;

use crate::message::{Completion, Message, Receipt, Reject};
use crate::telemetry::{
    SPOOL_APPENDED_TOTAL, SPOOL_BYTES, SPOOL_DELIVERED_TOTAL, SPOOL_ETA_SECONDS, SPOOL_OLDEST_SECONDS, SPOOL_RECORDS,
};
use inbox::{Inbox, Order, Shared, Waiter};
use lane::Lane;
use ledger::Losses;

/// A configured sink, valid for the [`Spool`] that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SinkId(u16);

/// What a message needs of the disk.
#[derive(Clone, Copy, Debug, Default)]
pub struct Demand<'a> {
    pub sinks: &'a [SinkId],
    /// Sessions that want it kept in the backlog.
    pub targets: &'a [Target<'a>],
    /// It is acknowledged only when the rows that were set for it are synced.
    pub rows: bool,
}

/// How an accepted message is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// Now; the completion is not called.
    Done,
    /// When the completion is called.
    Pending,
}

/// Why a spool cannot be opened or asked.
#[derive(Debug)]
pub enum Error {
    /// The directory or the file cannot be created, read or written.
    NotWritable {
        path: PathBuf,
        source: std::io::Error,
    },
    /// Another process has this spool open.
    InUse {
        path: PathBuf,
    },
    /// The file is not a spool.
    NotASpool {
        path: PathBuf,
    },
    /// The file was written by a newer version.
    TooNew {
        path: PathBuf,
        version: i64,
    },
    /// The file is damaged beyond single rows.
    Corrupt {
        path: PathBuf,
        source: rusqlite::Error,
    },
    /// SQLite failed otherwise.
    Store {
        path: PathBuf,
        source: rusqlite::Error,
    },
    /// Two sinks have one name, or there are more than 1,000.
    Sinks {
        name: String,
    },
    NoSuchSink {
        name: String,
    },
    Thread {
        source: std::io::Error,
    },
    /// The spool was closed, or its writer has ended.
    Closed,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NotWritable { path, source } => write!(f, "the spool cannot use {}: {source}", path.display()),
            Error::InUse { path } => write!(f, "the spool {} is in use by another process", path.display()),
            Error::NotASpool { path } => write!(
                f,
                "{} is not a spool of tidegate; move it away, or point gateway.data_dir elsewhere",
                path.display()
            ),
            Error::TooNew { path, version } => {
                write!(f, "the spool {} was written by a newer tidegate (format {version})", path.display())
            }
            Error::Corrupt { path, source } => write!(
                f,
                "the spool {} is damaged ({source}); nothing was changed: move it and its -wal file away to start empty, or try `sqlite3 {} .recover`",
                path.display(),
                path.display()
            ),
            Error::Store { path, source } => write!(f, "the spool {} failed: {source}", path.display()),
            Error::Sinks { name } => write!(f, "sink `{name}` is named twice, or there are more than 1000 sinks"),
            Error::NoSuchSink { name } => write!(f, "there is no sink `{name}`"),
            Error::Thread { source } => write!(f, "the spool cannot start a thread: {source}"),
            Error::Closed => f.write_str("the spool is closed"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::NotWritable { source, .. } | Error::Thread { source } => Some(source),
            Error::Corrupt { source, .. } | Error::Store { source, .. } => Some(source),
            Error::InUse { .. }
            | Error::NotASpool { .. }
            | Error::TooNew { .. }
            | Error::Sinks { .. }
            | Error::NoSuchSink { .. }
            | Error::Closed => None,
        }
    }
}

impl Error {
    /// Whether the same start can succeed later without anybody editing anything (exit code 75).
    pub fn can_retry(&self) -> bool {
        matches!(self, Error::InUse { .. } | Error::NotWritable { .. } | Error::Store { .. } | Error::Thread { .. })
    }
}

/// What a sink is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SinkState {
    /// Nothing queued.
    Empty,
    /// The reader is served from memory.
    Live,
    /// The reader works through what is only on disk, or has not started.
    Behind,
    /// In the file but not in the configuration: kept until `drop_sink`.
    Orphaned,
}

/// One sink in numbers; counts run since the sink was created.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SinkStats {
    pub name: String,
    pub state: SinkState,
    pub queued_records: u64,
    pub queued_bytes: u64,
    /// Ingest time of the oldest queued message, milliseconds since 1970.
    pub oldest_ms: Option<u64>,
    pub appended: u64,
    pub delivered: u64,
    pub dropped: u64,
}

/// Everything [`inspect`] finds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    pub sinks: Vec<SinkStats>,
    pub ledger: Vec<Loss>,
}

/// The spool, cheap to clone. Dropping the last handle closes it; [`close`](Spool::close) does so with a deadline of its own choosing.
#[derive(Clone)]
pub struct Spool(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Spool {
    /// The database in the data folder; SQLite keeps `-wal` and `-shm` beside it.
    pub const FILE: &str = store::FILE;

    /// Opens or creates `spool.db` in `data_dir`, counts this start, and starts the threads `spool` and `spool-read`.
    ///
    /// Instant whatever is queued: nothing is scanned. Sinks in the file that `sinks` does not name are kept, see [`SinkState::Orphaned`].
    ///
    /// # Errors
    /// Nothing is changed or deleted in any of the error cases.
    pub fn open(data_dir: &Path, config: Config, sinks: Vec<SinkConfig>) -> Result<Spool, Error> {
        let (store, found) = store::Sqlite::open(data_dir, &config, &sinks)?;
        Spool::start(data_dir, config, sinks, Box::new(store), found)
    }

    fn start(
        data_dir: &Path,
        config: Config,
        sinks: Vec<SinkConfig>,
        store: Box<dyn store::Store>,
        found: store::Found,
    ) -> Result<Spool, Error> {
        let path = data_dir.join(store::FILE);
        let lanes: Vec<Lane> = found.lanes.into_iter().map(|lane| Lane::new(lane, &sinks)).collect();
        let configured = sinks.len();
        let (fetch, fetches) = std::sync::mpsc::channel();
        let inbox = Inbox::new(lanes.iter().map(|lane| lane.state.lock().queued_bytes()).collect(), found.backlog_end);
        let shared = Arc::new(Shared {
            data_dir: data_dir.to_owned(),
            epoch: found.epoch,
            config,
            configured,
            lanes,
            inbox: Mutex::new(inbox),
            wake: Condvar::new(),
            losses: Mutex::new(Losses::default()),
            backlog: Mutex::default(),
            fetch,
            free_bytes: AtomicU64::new(0),
        });
        let pages = store::Reads::open(&path)?;
        let reads = Arc::clone(&shared);
        let mut threads = Vec::new();
        threads.push(spawn("spool-read", move || reader::serve(&reads, pages, &fetches))?);
        let writer = writer::Writer::new(Arc::clone(&shared), store);
        threads.push(spawn("spool", move || writer.run())?);
        Ok(Spool(Arc::new(Handle { shared, threads: Mutex::new(threads) })))
    }

    /// The number of this start: the `epoch` of every [`MessageId`](crate::message::MessageId) it stamps.
    pub fn epoch(&self) -> u32 {
        self.0.shared.epoch
    }

    /// The sink of that name, if it is configured.
    pub fn sink(&self, name: &str) -> Option<SinkId> {
        let shared = &self.0.shared;
        let index = shared.lanes.iter().take(shared.configured).position(|lane| lane.name == name)?;
        u16::try_from(index).ok().map(SinkId)
    }

    /// Takes one message for all of `sinks`, or for none. Never blocks.
    ///
    /// `Pending`: the completion is called exactly once, from the spool's thread, with the receipt or with `Reject::Full`. `Done`: it is not called.
    ///
    /// # Errors
    /// `Full` when a queue that refuses, the inbox or the disk has no room; `TooLarge` when no queue could ever hold it; `ShuttingDown` after [`close`](Spool::close).
    pub fn append(
        &self,
        message: &Message,
        sinks: &[SinkId],
        completion: Option<(Arc<dyn Completion>, u64)>,
        receivers: u32,
    ) -> Result<Accepted, Reject> {
        if sinks.is_empty() {
            return Ok(Accepted::Done);
        }
        self.store(message, Demand { sinks, ..Demand::default() }, completion, receivers).map(|(accepted, _)| accepted)
    }

    /// As [`append`](Spool::append), and puts the message into the backlog for `demand.targets`: gives its position there. With `demand.rows` also for a
    /// message that nobody takes, when it waits for rows that were [`set`](Spool::set) before.
    ///
    /// # Errors
    /// As [`append`](Spool::append).
    pub fn store(
        &self,
        message: &Message,
        demand: Demand<'_>,
        completion: Option<(Arc<dyn Completion>, u64)>,
        receivers: u32,
    ) -> Result<(Accepted, u64), Reject> {
        let shared = &*self.0.shared;
        let in_sinks =
            demand.sinks.iter().any(|&sink| shared.lane(sink).is_some_and(|l| l.delivery != Delivery::Memory));
        let durable = in_sinks || demand.rows || !demand.targets.is_empty();
        let mut inbox = shared.inbox.lock();
        shared.admit(&inbox, message, &demand, durable)?;
        let (full, position) = shared.push(&mut inbox, message, &demand, durable);
        let group = inbox.open();
        if durable && let Some((completion, token)) = completion {
            group.waiters.push(Waiter { completion, token, receipt: Receipt { id: message.id, receivers } });
        }
        if inbox.sleeping && (full || inbox.records >= inbox.wake_records) {
            // One wake-up per sleep, whatever arrives until the writer has the lock.
            inbox.sleeping = false;
            shared.wake.notify_one();
        }
        Ok((if durable { Accepted::Pending } else { Accepted::Done }, position))
    }

    /// A session has taken, or does not want any more, the message at this position of the backlog; once for each target.
    pub fn release(&self, position: u64) {
        if self.0.shared.backlog.lock().release(position) {
            self.0.shared.dirty();
        }
    }

    /// Asks for messages of the backlog, in the order of their positions. `reply` is called once, from the spool's reading thread, which it must not block, with
    /// the first of them or all: what is not on disk yet is left out, and when that is everything, it is called after the commit.
    pub fn fetch(&self, positions: Vec<u64>, reply: impl FnOnce(Vec<Found>) + Send + 'static) {
        let question = backlog::Question { positions, reply: Box::new(reply) };
        // Only a spool that was closed does not answer.
        let _ = self.0.shared.fetch.send(reader::Fetch::Backlog(question));
    }

    /// Shows every target of the backlog as it is on disk, with the message's position and cost; `wanted` says whether the session still wants it. What nobody
    /// wants is deleted. To be called once, at the start, before the first message is stored for a session.
    ///
    /// # Errors
    /// [`Error`] of the disk.
    pub fn backlog(&self, mut wanted: impl FnMut(u64, u32, Target<'_>) -> bool) -> Result<(), Error> {
        let shared = &*self.0.shared;
        store::read_backlog_index(&shared.data_dir, |first, records, bytes, index| {
            let mut live = 0_u32;
            let read = backlog::read_index(&index, records, |record, cost, target| {
                live += u32::from(wanted(first + u64::from(record), cost, target));
            });
            match read {
                Ok(()) => shared.backlog.lock().found(first, records, live, bytes),
                Err(damage) => tracing::error!(%damage, position = first, "backlog index is damaged, row left alone"),
            }
        })?;
        shared.dirty();
        Ok(())
    }

    /// Bytes of all messages that wait for sessions.
    pub fn backlog_bytes(&self) -> u64 {
        self.0.shared.backlog.lock().bytes()
    }

    /// Writes a row with the next commit, at the latest after `ack_delay_ms`; None deletes it. Never blocks and never fails: while the disk does not take it,
    /// it waits in memory.
    pub fn set(&self, kind: Kind, key: &[u8], value: Option<&[u8]>) {
        let shared = &*self.0.shared;
        let mut inbox = shared.inbox.lock();
        inbox.rows.set(kind, key, value);
        if inbox.sleeping && inbox.rows.len() == 1 {
            // So that the writer learns that something is due.
            inbox.sleeping = false;
            shared.wake.notify_one();
        }
    }

    /// Reports to `completion` when everything that was [`set`](Spool::set) before is synced.
    ///
    /// # Errors
    /// `Full` while the disk does not take commits, or when too many wait; `ShuttingDown` after [`close`](Spool::close).
    pub fn sync(&self, completion: Arc<dyn Completion>, token: u64, receipt: Receipt) -> Result<(), Reject> {
        let shared = &*self.0.shared;
        let mut inbox = shared.inbox.lock();
        shared.admit_waiter(&inbox)?;
        let group = inbox.open();
        group.waiters.push(Waiter { completion, token, receipt });
        group.records += 1;
        group.durable = true;
        group.sync = true;
        inbox.records += 1;
        if inbox.sleeping && inbox.records >= inbox.wake_records {
            inbox.sleeping = false;
            shared.wake.notify_one();
        }
        Ok(())
    }

    /// Shows every row of a kind as it is on disk, in the order of the keys. For the start: reads the disk, and does not see what waits for a commit.
    ///
    /// # Errors
    /// [`Error`] of the disk.
    pub fn rows(&self, kind: Kind, visit: impl FnMut(&[u8], &[u8])) -> Result<(), Error> {
        store::read_rows(&self.0.shared.data_dir, kind, visit)
    }

    /// The reader of one sink. There should be one; two would share the messages' acknowledgements.
    pub fn reader(&self, sink: SinkId) -> Reader {
        Reader::new(Arc::clone(&self.0.shared), usize::from(sink.0))
    }

    /// Every sink, orphaned ones last.
    pub fn stats(&self) -> Vec<SinkStats> {
        self.0.shared.lanes.iter().map(Lane::stats).collect()
    }

    /// Sets the gauges and counters of every sink; to be called before a scrape.
    pub fn export_metrics(&self) {
        let now_ms = writer::now_ms();
        for lane in &self.0.shared.lanes {
            let sink = lane.stats();
            let eta_secs = lane.eta.lock().secs(sink.queued_records, Instant::now());
            gauge!(SPOOL_ETA_SECONDS, "sink" => sink.name.clone()).set(eta_secs);
            let age_secs = sink.oldest_ms.map_or(0.0, |oldest| now_ms.saturating_sub(oldest) as f64 / 1000.0);
            gauge!(SPOOL_RECORDS, "sink" => sink.name.clone()).set(sink.queued_records as f64);
            gauge!(SPOOL_BYTES, "sink" => sink.name.clone()).set(sink.queued_bytes as f64);
            gauge!(SPOOL_OLDEST_SECONDS, "sink" => sink.name.clone()).set(age_secs);
            counter!(SPOOL_APPENDED_TOTAL, "sink" => sink.name.clone()).absolute(sink.appended);
            counter!(SPOOL_DELIVERED_TOTAL, "sink" => sink.name).absolute(sink.delivered);
        }
    }

    /// What was lost and why, newest hour first, at most `rows_max` rows. Reads the disk: not for a worker.
    pub fn ledger(&self, rows_max: usize) -> Result<Vec<Loss>, Error> {
        store::read_ledger(&self.0.shared.data_dir, rows_max)
    }

    /// Throws away what a sink holds, into the ledger as one entry. Returns the number of messages. Waits for the disk: not for a worker.
    pub fn drop_sink(&self, name: &str) -> Result<u64, Error> {
        let shared = &self.0.shared;
        let index = shared.lanes.iter().position(|lane| lane.name == name);
        let lane = index.ok_or_else(|| Error::NoSuchSink { name: name.to_owned() })?;
        let (reply, answer) = std::sync::mpsc::sync_channel(1);
        shared.order(Order::Drop { lane, reply });
        answer.recv().map_err(|_| Error::Closed)
    }

    /// For `/readyz`: the last commit succeeded, the writer lives, and the file system is writable with room for one more log, or the database has it
    /// within itself.
    pub fn healthy(&self) -> Result<(), Unhealthy> {
        {
            let inbox = self.0.shared.inbox.lock();
            if inbox.writer_gone || inbox.stopping {
                return Err(Unhealthy::Stopped);
            }
            if let Some(failure) = &inbox.failing {
                return Err(Unhealthy::Failing { detail: failure.detail.clone() });
            }
        }
        let shared = &self.0.shared;
        let within = shared.free_bytes.load(Ordering::Relaxed);
        let wanted = u64::from(shared.config.wal_bytes_max).saturating_sub(within);
        store::disk_has_room(&shared.data_dir, wanted)
    }

    /// Stops taking messages, commits what is pending, spills what is in memory, writes acknowledgements, and waits for it. Blocks.
    pub fn close(&self) {
        self.0.close();
    }
}

impl Handle {
    fn close(&self) {
        self.shared.inbox.lock().stopping = true;
        self.shared.wake.notify_all();
        for lane in &self.shared.lanes {
            lane.news.notify_waiters();
            lane.news.notify_one();
        }
        let threads = std::mem::take(&mut *self.threads.lock());
        let _ = self.shared.fetch.send(reader::Fetch::Stop);
        for thread in threads {
            // A completion may own the last handle, and then this runs on the writer's own thread.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.close();
    }
}

/// Why the spool is not ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unhealthy {
    /// The last commit failed.
    Failing {
        detail: String,
    },
    ReadOnly,
    NoSpace {
        bytes_free: u64,
    },
    Stopped,
}

impl fmt::Display for Unhealthy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unhealthy::Failing { detail } => write!(f, "the last commit failed: {detail}"),
            Unhealthy::ReadOnly => f.write_str("the file system is read-only"),
            Unhealthy::NoSpace { bytes_free } => write!(f, "only {bytes_free} bytes are free on the disk"),
            Unhealthy::Stopped => f.write_str("the spool is stopped"),
        }
    }
}

impl std::error::Error for Unhealthy {}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Error> {
    std::thread::Builder::new().name(name.into()).spawn(body).map_err(|source| Error::Thread { source })
}

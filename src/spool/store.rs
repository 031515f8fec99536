//! The SQL: one table of packed rows per sink, the loss ledger, damaged rows, and the count of starts.
//!
//! A row's key is the position of its first record, so appending is at the right edge of the tree, the cursor is a key, and what is acknowledged is one
//! range. `bytes_end` counts up, so that the size of a queue is a difference of two rows and opening scans nothing.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, Row, params};

use super::backlog::OpenRow;
use super::config::{Config, SinkConfig};
use super::lane::RowHead;
use super::ledger::{Key, Loss, Reason, SEVERAL, Sum};
use super::reserve::Reserve;
use super::rows::{Kind, PendingRows};
use super::{Error, Inspection, SinkState, SinkStats, Unhealthy};

pub(super) const FILE: &str = "spool.db";
const LOCK_FILE: &str = "spool.lock";

/// "Tide".
const APPLICATION_ID: i64 = 0x5469_6465;
/// One more than the migrations behind a file: format 2 has rows beside the queues, format 3 the backlog.
const FORMAT: i64 = MIGRATIONS.len() as i64;
/// A commit touches about three pages beyond its data, whatever their size. At 64 clients 4096 writes 3.2 bytes per user byte, 2048 2.7 and 1024 2.5,
/// the last at a third less throughput (`bench.rs`).
const PAGE_BYTES: u32 = 2048;
/// Acknowledged rows deleted in one transaction, per sink: at 256 KiB a row, 16 MiB of pages to free.
const DELETE_ROWS_MAX: u32 = 64;
/// Damaged rows kept for a look; older ones give way.
const DAMAGED_ROWS_MAX: u32 = 64;
const SINKS_MAX: usize = 1000;
/// A transaction that only notes deliveries: its pages, and the index of the log.
const RESERVE_EXTRA_BYTES: u64 = 128 << 10;
/// SQLite's own limit.
const PAGES_MAX: u32 = 4_294_967_294;

/// What makes format n + 1 of format n; an empty file is format 0.
const MIGRATIONS: [&str; 3] = [QUEUES, ROWS, BACKLOG];

const QUEUES: &str = "
    CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    INSERT INTO meta VALUES ('epoch', 0);
    CREATE TABLE sink (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, acked INTEGER NOT NULL, dropped INTEGER NOT NULL) STRICT;
    CREATE TABLE ledger (
        sink TEXT NOT NULL, reason TEXT NOT NULL, device TEXT NOT NULL, epoch INTEGER NOT NULL, hour INTEGER NOT NULL,
        seq_first INTEGER NOT NULL, seq_last INTEGER NOT NULL, records INTEGER NOT NULL, bytes INTEGER NOT NULL,
        first_ms INTEGER NOT NULL, last_ms INTEGER NOT NULL,
        PRIMARY KEY (sink, reason, device, epoch, hour)) STRICT, WITHOUT ROWID;
    CREATE TABLE damaged (id INTEGER PRIMARY KEY, sink TEXT NOT NULL, position INTEGER NOT NULL, records INTEGER NOT NULL, data BLOB NOT NULL) STRICT;
    CREATE TABLE probe (data BLOB NOT NULL) STRICT;
";

const ROWS: &str = "
    CREATE TABLE kept (kind INTEGER NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL, PRIMARY KEY (kind, key)) STRICT, WITHOUT ROWID;
";

const BACKLOG: &str = "
    INSERT INTO meta VALUES ('backlog_end', 0);
    CREATE TABLE backlog (position INTEGER PRIMARY KEY, data BLOB NOT NULL) STRICT;
    CREATE TABLE backlog_index (position INTEGER PRIMARY KEY, records INTEGER NOT NULL, bytes INTEGER NOT NULL, targets BLOB NOT NULL) STRICT;
";

/// The number in a sink's table name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Table(i64);

/// What [`Sqlite::open`] found.
pub(super) struct Found {
    pub epoch: u32,
    /// The configured sinks in their order, then the others.
    pub lanes: Vec<FoundLane>,
    /// The backlog's next position.
    pub backlog_end: u64,
}

pub(super) struct FoundLane {
    pub name: String,
    pub table: Table,
    pub acked: u64,
    pub dropped: u64,
    /// The row with the first record that is not acknowledged, and its bytes.
    pub front: Option<(RowHead, u64)>,
    pub last: Option<RowHead>,
}

/// One transaction of the writer.
#[derive(Default)]
pub(super) struct Commit<'a> {
    pub rows: Vec<NewRow<'a>>,
    pub acks: Vec<Ack>,
    pub losses: Vec<(&'a str, &'a Key, &'a Sum)>,
    pub damaged: Vec<(Table, &'a str, RowHead)>,
    pub kept: Option<&'a PendingRows>,
    pub backlog: &'a [OpenRow],
    /// Rows of the backlog to be deleted.
    pub backlog_dead: &'a [u64],
    /// Behind the last position that was ever given.
    pub backlog_end: u64,
    /// Wait for the disk.
    pub sync: bool,
}

pub(super) struct NewRow<'a> {
    pub table: Table,
    pub head: RowHead,
    pub data: &'a [u8],
}

#[derive(Clone, Copy)]
pub(super) struct Ack {
    pub table: Table,
    pub acked: u64,
    pub dropped: u64,
}

/// What the writer needs of a disk. A trait so that tests can make it fail and wait.
pub(super) trait Store: Send {
    /// One transaction. Returns whether acknowledged rows are left to delete.
    fn commit(&mut self, commit: &Commit<'_>) -> rusqlite::Result<bool>;
    /// The row that holds `position`, or the next one behind it.
    fn row(&mut self, table: Table, position: u64) -> rusqlite::Result<Option<(RowHead, Bytes)>>;
    /// The same without its data.
    fn head(&mut self, table: Table, position: u64) -> rusqlite::Result<Option<RowHead>>;
    /// Whether the disk takes and syncs 64 KiB.
    fn probe(&mut self) -> rusqlite::Result<()>;
    /// Copies the log into the database; `truncate` also empties it.
    fn checkpoint(&mut self, truncate: bool) -> rusqlite::Result<()>;
    /// Gives the reserve up, so that what has to be written on a full disk can be.
    fn use_reserve(&mut self);
    /// Takes as much of the reserve as there is room for, and keeps the database from growing beyond it. Returns the bytes that the
    /// database has free within itself.
    fn restore_reserve(&mut self) -> rusqlite::Result<u64>;
}

pub(super) struct Sqlite {
    connection: Connection,
    synchronous_full: bool,
    ledger_rows: u32,
    ledger_rows_max: u32,
    path: PathBuf,
    reserve: Reserve,
    #[cfg(test)]
    pages_max: Option<u32>,
    /// Held for the life of the store: two writers would give one position to two records.
    _lock: File,
}

impl Sqlite {
    pub fn open(data_dir: &Path, config: &Config, sinks: &[SinkConfig]) -> Result<(Sqlite, Found), Error> {
        for (index, sink) in sinks.iter().enumerate() {
            if sinks.iter().take(index).any(|other| other.name == sink.name) || index >= SINKS_MAX {
                return Err(Error::Sinks { name: sink.name.clone() });
            }
        }
        let path = data_dir.join(FILE);
        let lock = lock(data_dir)?;
        // The log once over, and what noting deliveries takes.
        let reserve = Reserve::new(data_dir, u64::from(config.wal_bytes_max) + RESERVE_EXTRA_BYTES);
        // SQLite gives the log and its index the mode of the database.
        let created = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&path);
        drop(created.map_err(|source| Error::NotWritable { path: path.clone(), source })?);
        let fault = |source| fault(&path, source);
        let connection = connect(&path, OpenFlags::SQLITE_OPEN_READ_WRITE).map_err(fault)?;
        let format = check_format(&connection, &path)?;
        connection
            .execute_batch(&format!(
                "PRAGMA page_size = {PAGE_BYTES}; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 0;
                 PRAGMA cache_size = -512;"
            ))
            .map_err(fault)?;
        let mut store = Sqlite {
            connection,
            synchronous_full: true,
            ledger_rows: 0,
            ledger_rows_max: config.ledger_rows_max,
            path: path.clone(),
            reserve,
            #[cfg(test)]
            pages_max: None,
            _lock: lock,
        };
        let found = store.begin(format, sinks).map_err(fault)?;
        store.restore_reserve().map_err(fault)?;
        // The names of the new files must survive a power cut as well as their contents.
        File::open(data_dir).and_then(|dir| dir.sync_all()).map_err(|source| Error::NotWritable { path, source })?;
        Ok((store, found))
    }

    /// A disk that is full at so many pages.
    #[cfg(test)]
    pub fn limit_pages(&mut self, pages: u32) {
        self.pages_max = Some(pages);
        let _ = self.connection.execute_batch(&format!("PRAGMA max_page_count = {pages}"));
    }

    fn begin(&mut self, format: usize, sinks: &[SinkConfig]) -> rusqlite::Result<Found> {
        let transaction = self.connection.transaction()?;
        for migration in MIGRATIONS.iter().skip(format) {
            transaction.execute_batch(migration)?;
        }
        if format < MIGRATIONS.len() {
            transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
            transaction.pragma_update(None, "user_version", FORMAT)?;
        }
        let epoch: u32 = transaction.query_row(
            "UPDATE meta SET value = value + 1 WHERE key = 'epoch' RETURNING value",
            [],
            |row| row.get(0),
        )?;
        for sink in sinks {
            transaction.execute("INSERT OR IGNORE INTO sink (name, acked, dropped) VALUES (?1, 0, 0)", [&sink.name])?;
        }
        let mut lanes = Vec::new();
        for (id, name, acked, dropped) in sink_rows(&transaction)? {
            let table = Table(id);
            transaction.execute_batch(&format!(
                "CREATE TABLE IF NOT EXISTS queue_{id} (position INTEGER PRIMARY KEY, records INTEGER NOT NULL, bytes_end INTEGER NOT NULL,
                 oldest_ms INTEGER NOT NULL, newest_ms INTEGER NOT NULL, data BLOB NOT NULL) STRICT"
            ))?;
            let last = last_row(&transaction, table)?;
            let front = row_at(&transaction, table, acked, "length(data)", |row| row.get::<_, i64>(5))?;
            let front = front.map(|(head, bytes)| (head, bytes.cast_unsigned()));
            let configured = sinks.iter().any(|sink| sink.name == name);
            if !configured && front.is_none() {
                transaction.execute_batch(&format!("DROP TABLE queue_{id}; DELETE FROM sink WHERE id = {id}"))?;
                continue;
            }
            lanes.push(FoundLane { name, table, acked, dropped, front, last });
        }
        self_count(&transaction, &mut self.ledger_rows)?;
        let backlog_end: i64 = transaction.query_row(
            "SELECT max(value, coalesce((SELECT position + records FROM backlog_index ORDER BY position DESC LIMIT 1), 0))
             FROM meta WHERE key = 'backlog_end'",
            [],
            |row| row.get(0),
        )?;
        transaction.commit()?;
        let rank = |lane: &FoundLane| sinks.iter().position(|sink| sink.name == lane.name).unwrap_or(usize::MAX);
        lanes.sort_by_key(rank);
        Ok(Found { epoch, lanes, backlog_end: backlog_end.cast_unsigned() })
    }
}

fn self_count(connection: &Connection, rows: &mut u32) -> rusqlite::Result<()> {
    *rows = connection.query_row("SELECT count(*) FROM ledger", [], |row| row.get(0))?;
    Ok(())
}

impl Store for Sqlite {
    fn commit(&mut self, commit: &Commit<'_>) -> rusqlite::Result<bool> {
        if commit.sync != self.synchronous_full {
            self.connection.execute_batch(if commit.sync {
                "PRAGMA synchronous = FULL"
            } else {
                "PRAGMA synchronous = NORMAL"
            })?;
            self.synchronous_full = commit.sync;
        }
        let transaction = self.connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let mut more = false;
        // Moved before what is acknowledged is deleted: a damaged row in front is passed over at once.
        for (Table(id), sink, head) in &commit.damaged {
            let position = head.position.cast_signed();
            transaction.execute(
                &format!("INSERT INTO damaged (sink, position, records, data) SELECT ?1, position, records, data FROM queue_{id} WHERE position = ?2"),
                params![sink, position],
            )?;
            transaction.execute(&format!("DELETE FROM queue_{id} WHERE position = ?1"), [position])?;
            transaction
                .execute("DELETE FROM damaged WHERE id <= (SELECT max(id) FROM damaged) - ?1", [DAMAGED_ROWS_MAX])?;
        }
        // Deleted before rows are added: the pages serve them.
        for ack in &commit.acks {
            let Table(id) = ack.table;
            let acked = ack.acked.cast_signed();
            transaction.prepare_cached("UPDATE sink SET acked = ?2, dropped = ?3 WHERE id = ?1")?.execute(params![
                id,
                acked,
                ack.dropped.cast_signed()
            ])?;
            let (edge, rows): (Option<i64>, u32) = transaction
                .prepare_cached(&format!(
                    "SELECT max(position), count(*) FROM (SELECT position FROM queue_{id}
                     WHERE position < ?1 AND position + records <= ?1 ORDER BY position LIMIT {DELETE_ROWS_MAX})"
                ))?
                .query_row([acked], |row| Ok((row.get(0)?, row.get(1)?)))?;
            if let Some(edge) = edge {
                transaction.prepare_cached(&format!("DELETE FROM queue_{id} WHERE position <= ?1"))?.execute([edge])?;
            }
            more |= rows == DELETE_ROWS_MAX;
        }
        for row in &commit.rows {
            let Table(id) = row.table;
            transaction.prepare_cached(&format!("INSERT INTO queue_{id} VALUES (?1, ?2, ?3, ?4, ?5, ?6)"))?.execute(
                params![
                    row.head.position.cast_signed(),
                    row.head.records,
                    row.head.bytes_end.cast_signed(),
                    row.head.oldest_ms.cast_signed(),
                    row.head.newest_ms.cast_signed(),
                    row.data,
                ],
            )?;
        }
        write_backlog(&transaction, commit)?;
        if let Some(rows) = commit.kept {
            write_rows(&transaction, rows)?;
        }
        let mut ledger_rows = self.ledger_rows;
        for (sink, key, sum) in &commit.losses {
            let row = params![
                sink,
                key.reason.as_str(),
                key.device.as_str(),
                key.epoch,
                key.hour.cast_signed(),
                sum.seq_first.cast_signed(),
                sum.seq_last.cast_signed(),
                sum.records.cast_signed(),
                sum.bytes.cast_signed(),
                sum.first_ms.cast_signed(),
                sum.last_ms.cast_signed()
            ];
            transaction
                .prepare_cached(
                    "INSERT INTO ledger VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)
                     ON CONFLICT DO UPDATE SET seq_first = min(seq_first, excluded.seq_first), seq_last = max(seq_last, excluded.seq_last),
                     records = records + excluded.records, bytes = bytes + excluded.bytes, last_ms = max(last_ms, excluded.last_ms)",
                )?
                .execute(row)?;
            // An upper bound is enough to know when to count.
            ledger_rows = ledger_rows.saturating_add(1);
        }
        if ledger_rows > self.ledger_rows_max {
            self_count(&transaction, &mut ledger_rows)?;
            if ledger_rows > self.ledger_rows_max {
                fold_ledger(&transaction, ledger_rows - self.ledger_rows_max + self.ledger_rows_max / 10)?;
                self_count(&transaction, &mut ledger_rows)?;
            }
        }
        transaction.commit()?;
        self.ledger_rows = ledger_rows;
        Ok(more)
    }

    fn row(&mut self, table: Table, position: u64) -> rusqlite::Result<Option<(RowHead, Bytes)>> {
        row_at(&self.connection, table, position, "data", data)
    }

    fn head(&mut self, table: Table, position: u64) -> rusqlite::Result<Option<RowHead>> {
        Ok(row_at(&self.connection, table, position, "NULL", |_| Ok(()))?.map(|(head, ())| head))
    }

    fn probe(&mut self) -> rusqlite::Result<()> {
        self.connection.execute_batch("PRAGMA synchronous = FULL")?;
        self.synchronous_full = true;
        self.connection.execute_batch("INSERT INTO probe VALUES (zeroblob(65536))")?;
        self.connection.execute_batch("DELETE FROM probe")
    }

    fn checkpoint(&mut self, truncate: bool) -> rusqlite::Result<()> {
        let mode = if truncate { "TRUNCATE" } else { "PASSIVE" };
        self.connection.query_row(&format!("PRAGMA wal_checkpoint({mode})"), [], |_| Ok(()))
    }

    fn use_reserve(&mut self) {
        self.reserve.release();
    }

    fn restore_reserve(&mut self) -> rusqlite::Result<u64> {
        self.reserve.take();
        // Pages that are in the log and not yet in the file are part of the growth.
        let on_disk = std::fs::metadata(&self.path).map_or(0, |file| file.len()) / u64::from(PAGE_BYTES);
        let kept = self.reserve.bytes().saturating_sub(RESERVE_EXTRA_BYTES);
        // What is written takes its room twice, in the log and in the file.
        let free = self.path.parent().and_then(|folder| bytes_free(folder).ok()).unwrap_or(0) / 2;
        let growth = kept.max(free) / u64::from(PAGE_BYTES);
        let pages_max = u32::try_from(on_disk + growth).unwrap_or(u32::MAX).min(PAGES_MAX);
        #[cfg(test)]
        let pages_max = self.pages_max.unwrap_or(u32::MAX).min(pages_max);
        // Never below what there is: SQLite sees to that.
        self.connection.query_row(&format!("PRAGMA max_page_count = {pages_max}"), [], |_| Ok(()))?;
        let free: u64 = self.connection.query_row("PRAGMA freelist_count", [], |row| row.get::<_, u32>(0))?.into();
        Ok(free * u64::from(PAGE_BYTES))
    }
}

fn write_backlog(connection: &Connection, commit: &Commit<'_>) -> rusqlite::Result<()> {
    // A cursor may be among the rows that is ahead of everything that was stored, and the last row among the dead; positions are never given again.
    if commit.kept.is_some() || !commit.backlog_dead.is_empty() {
        connection
            .prepare_cached("UPDATE meta SET value = ?1 WHERE key = 'backlog_end'")?
            .execute([commit.backlog_end.cast_signed()])?;
    }
    // Deleted before rows are added: the pages serve them.
    for first in commit.backlog_dead {
        for table in ["backlog", "backlog_index"] {
            let mut delete = connection.prepare_cached(&format!("DELETE FROM {table} WHERE position = ?1"))?;
            delete.execute([first.cast_signed()])?;
        }
    }
    for row in commit.backlog {
        let first = row.first.cast_signed();
        connection.prepare_cached("INSERT INTO backlog VALUES (?1, ?2)")?.execute(params![first, row.pack.data()])?;
        let bytes = i64::try_from(row.bytes()).unwrap_or(i64::MAX);
        connection.prepare_cached("INSERT INTO backlog_index VALUES (?1, ?2, ?3, ?4)")?.execute(params![
            first,
            row.pack.records(),
            bytes,
            row.index
        ])?;
    }
    Ok(())
}

fn write_rows(connection: &Connection, rows: &PendingRows) -> rusqlite::Result<()> {
    let mut put = connection.prepare_cached("INSERT OR REPLACE INTO kept VALUES (?1, ?2, ?3)")?;
    let mut remove = connection.prepare_cached("DELETE FROM kept WHERE kind = ?1 AND key = ?2")?;
    for (kind, key, value) in rows.iter() {
        match value {
            Some(value) => put.execute(params![kind as u8, key, value])?,
            None => remove.execute(params![kind as u8, key])?,
        };
    }
    Ok(())
}

/// Folds the oldest rows into one per sink and reason; the sums stay.
fn fold_ledger(connection: &Connection, rows: u32) -> rusqlite::Result<()> {
    connection.execute_batch(&format!(
        "CREATE TEMP TABLE folded AS SELECT * FROM ledger WHERE NOT (device = '{SEVERAL}' AND hour = 0) ORDER BY hour LIMIT {rows};
         INSERT INTO ledger SELECT sink, reason, '{SEVERAL}', 0, 0, 0, 0, sum(records), sum(bytes), min(first_ms), max(last_ms)
            FROM folded WHERE true GROUP BY sink, reason
            ON CONFLICT DO UPDATE SET records = records + excluded.records, bytes = bytes + excluded.bytes,
            first_ms = min(first_ms, excluded.first_ms), last_ms = max(last_ms, excluded.last_ms);
         DELETE FROM ledger WHERE (sink, reason, device, epoch, hour) IN (SELECT sink, reason, device, epoch, hour FROM folded);
         DROP TABLE folded;"
    ))
}

/// The reading thread's own connection.
pub(super) struct Reads(Connection);

impl Reads {
    pub fn open(path: &Path) -> Result<Reads, Error> {
        let connection = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE).map_err(|source| fault(path, source))?;
        connection
            .execute_batch("PRAGMA query_only = ON; PRAGMA cache_size = -256; PRAGMA wal_autocheckpoint = 0")
            .map_err(|source| fault(path, source))?;
        Ok(Reads(connection))
    }

    /// As [`Store::row`].
    pub fn row(&self, table: Table, position: u64) -> rusqlite::Result<Option<(RowHead, Bytes)>> {
        row_at(&self.0, table, position, "data", data)
    }

    /// The data of the backlog's row that begins at `first`.
    pub fn backlog_row(&self, first: u64) -> rusqlite::Result<Option<Bytes>> {
        let mut statement = self.0.prepare_cached("SELECT data FROM backlog WHERE position = ?1")?;
        let blob = |row: &Row<'_>| Ok(Bytes::copy_from_slice(row.get_ref(0)?.as_blob()?));
        statement.query_row([first.cast_signed()], blob).optional()
    }
}

/// Shows every row of a kind, in the order of the keys.
pub(super) fn read_rows(data_dir: &Path, kind: Kind, mut visit: impl FnMut(&[u8], &[u8])) -> Result<(), Error> {
    let path = data_dir.join(FILE);
    let mut read = || -> rusqlite::Result<()> {
        let connection = connect(&path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        let mut statement = connection.prepare("SELECT key, value FROM kept WHERE kind = ?1 ORDER BY key")?;
        let mut rows = statement.query([kind as u8])?;
        while let Some(row) = rows.next()? {
            visit(row.get_ref(0)?.as_blob()?, row.get_ref(1)?.as_blob()?);
        }
        Ok(())
    };
    read().map_err(|source| fault(&path, source))
}

/// Shows every row of the backlog's index: position, records, bytes, targets.
pub(super) fn read_backlog_index(data_dir: &Path, mut visit: impl FnMut(u64, u32, u32, Bytes)) -> Result<(), Error> {
    let path = data_dir.join(FILE);
    let mut read = || -> rusqlite::Result<()> {
        let connection = connect(&path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        let mut statement = connection.prepare("SELECT * FROM backlog_index ORDER BY position")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let bytes = u32::try_from(row.get::<_, i64>(2)?).unwrap_or(u32::MAX);
            let targets = Bytes::copy_from_slice(row.get_ref(3)?.as_blob()?);
            visit(row.get::<_, i64>(0)?.cast_unsigned(), row.get(1)?, bytes, targets);
        }
        Ok(())
    };
    read().map_err(|source| fault(&path, source))
}

/// The queues and the ledger of a data directory, whether or not a gateway runs on it.
pub fn inspect(data_dir: &Path) -> Result<Inspection, Error> {
    let path = data_dir.join(FILE);
    let ledger = read_ledger(data_dir, usize::MAX)?;
    let read = || -> rusqlite::Result<Vec<SinkStats>> {
        let connection = connect(&path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        let mut sinks = Vec::new();
        for (id, name, acked, dropped) in sink_rows(&connection)? {
            let last = last_row(&connection, Table(id))?;
            let front = row_at(&connection, Table(id), acked, "length(data)", |row| row.get::<_, i64>(5))?;
            let end = last.map_or(acked, |row| row.end()).max(acked);
            let before = front.map_or(0, |(head, bytes)| head.bytes_end.saturating_sub(bytes.cast_unsigned()));
            sinks.push(SinkStats {
                name,
                state: if end == acked { SinkState::Empty } else { SinkState::Behind },
                queued_records: end - acked,
                queued_bytes: front.and(last).map_or(0, |row| row.bytes_end.saturating_sub(before)),
                oldest_ms: front.map(|(head, _)| head.oldest_ms),
                appended: end,
                delivered: acked.saturating_sub(dropped),
                dropped,
            });
        }
        Ok(sinks)
    };
    Ok(Inspection { sinks: read().map_err(|source| fault(&path, source))?, ledger })
}

pub(super) fn read_ledger(data_dir: &Path, rows_max: usize) -> Result<Vec<Loss>, Error> {
    let path = data_dir.join(FILE);
    let read = || -> rusqlite::Result<Vec<Loss>> {
        let connection = connect(&path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        let mut statement =
            connection.prepare("SELECT * FROM ledger ORDER BY hour DESC, sink, reason, device, epoch LIMIT ?1")?;
        let rows = statement.query_map([i64::try_from(rows_max).unwrap_or(i64::MAX)], |row| {
            let unsigned = |index| row.get::<_, i64>(index).map(i64::cast_unsigned);
            Ok(Loss {
                sink: row.get(0)?,
                reason: Reason::parse(&row.get::<_, String>(1)?).unwrap_or(Reason::Damaged),
                device: row.get(2)?,
                epoch: row.get(3)?,
                seq_first: unsigned(5)?,
                seq_last: unsigned(6)?,
                records: unsigned(7)?,
                bytes: unsigned(8)?,
                first_ms: unsigned(9)?,
                last_ms: unsigned(10)?,
            })
        })?;
        rows.collect()
    };
    if !path.exists() {
        return Err(Error::NotWritable { path, source: io::ErrorKind::NotFound.into() });
    }
    read().map_err(|source| fault(&path, source))
}

/// A cheap look that writes nothing: SD cards die of probes.
pub(super) fn disk_has_room(data_dir: &Path, bytes_min: u64) -> Result<(), Unhealthy> {
    let bytes_free = bytes_free(data_dir)?;
    if bytes_free < bytes_min { Err(Unhealthy::NoSpace { bytes_free }) } else { Ok(()) }
}

fn bytes_free(folder: &Path) -> Result<u64, Unhealthy> {
    let stat = match nix::sys::statvfs::statvfs(folder) {
        Ok(stat) => stat,
        Err(errno) => return Err(Unhealthy::Failing { detail: errno.desc().to_owned() }),
    };
    if stat.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY) {
        return Err(Unhealthy::ReadOnly);
    }
    // The types differ between targets.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    let bytes = (stat.blocks_available() as u64).saturating_mul(stat.fragment_size() as u64);
    Ok(bytes)
}

fn lock(data_dir: &Path) -> Result<File, Error> {
    let path = data_dir.join(LOCK_FILE);
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(|source| Error::NotWritable { path: path.clone(), source })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(Error::InUse { path: data_dir.join(FILE) }),
        Err(std::fs::TryLockError::Error(source)) => Err(Error::NotWritable { path, source }),
    }
}

fn connect(path: &Path, flags: OpenFlags) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    connection.busy_timeout(Duration::from_secs(1))?;
    // A file from outside must not run SQL of its own, and a page is looked at before it is believed.
    connection.execute_batch(
        "PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON; PRAGMA temp_store = MEMORY; PRAGMA mmap_size = 0",
    )?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

/// The format of the file; 0 when it is empty and to be made a spool.
fn check_format(connection: &Connection, path: &Path) -> Result<usize, Error> {
    let number =
        |pragma| connection.query_row(pragma, [], |row| row.get::<_, i64>(0)).map_err(|source| fault(path, source));
    let (application, version) = (number("PRAGMA application_id")?, number("PRAGMA user_version")?);
    let tables = number("SELECT count(*) FROM sqlite_schema")?;
    match (application, version, tables) {
        (0, 0, 0) => Ok(0),
        (APPLICATION_ID, version @ 1..=FORMAT, _) => Ok(usize::try_from(version).unwrap_or(0)),
        (APPLICATION_ID, version, _) if version > FORMAT => Err(Error::TooNew { path: path.to_owned(), version }),
        _ => Err(Error::NotASpool { path: path.to_owned() }),
    }
}

fn fault(path: &Path, source: rusqlite::Error) -> Error {
    let path: PathBuf = path.to_owned();
    match source.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => Error::NotASpool { path },
        Some(ErrorCode::DatabaseCorrupt) => Error::Corrupt { path, source },
        Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => {
            Error::NotWritable { path, source: io::Error::new(io::ErrorKind::PermissionDenied, source) }
        }
        Some(ErrorCode::DiskFull) => {
            Error::NotWritable { path, source: io::Error::new(io::ErrorKind::StorageFull, source) }
        }
        // Our own tables missing or of another shape: somebody edited the file.
        None => Error::Corrupt { path, source },
        Some(_) => match &source {
            rusqlite::Error::SqliteFailure(error, _) if error.code == ErrorCode::Unknown => {
                Error::Corrupt { path, source }
            }
            _ => Error::Store { path, source },
        },
    }
}

fn sink_rows(connection: &Connection) -> rusqlite::Result<Vec<(i64, String, u64, u64)>> {
    let mut statement = connection.prepare("SELECT id, name, acked, dropped FROM sink ORDER BY id")?;
    let rows = statement.query_map([], |row| {
        let unsigned = |index| row.get::<_, i64>(index).map(i64::cast_unsigned);
        Ok((row.get(0)?, row.get(1)?, unsigned(2)?, unsigned(3)?))
    })?;
    rows.collect()
}

const HEAD: &str = "position, records, bytes_end, oldest_ms, newest_ms";

fn head(row: &Row<'_>) -> rusqlite::Result<RowHead> {
    let unsigned = |index| row.get::<_, i64>(index).map(i64::cast_unsigned);
    Ok(RowHead {
        position: unsigned(0)?,
        records: row.get(1)?,
        bytes_end: unsigned(2)?,
        oldest_ms: unsigned(3)?,
        newest_ms: unsigned(4)?,
    })
}

fn data(row: &Row<'_>) -> rusqlite::Result<Bytes> {
    Ok(Bytes::copy_from_slice(row.get_ref(5)?.as_blob()?))
}

fn last_row(connection: &Connection, Table(id): Table) -> rusqlite::Result<Option<RowHead>> {
    let sql = format!("SELECT {HEAD} FROM queue_{id} ORDER BY position DESC LIMIT 1");
    connection.prepare_cached(&sql)?.query_row([], head).optional()
}

/// The row that holds `position`, else the next one; `column` is the sixth, read by `read`.
fn row_at<T>(
    connection: &Connection,
    Table(id): Table,
    position: u64,
    column: &str,
    read: impl Fn(&Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<Option<(RowHead, T)>> {
    // Rows do not overlap: the last one that begins at or before the position is the only one that can hold it.
    let sql = format!(
        "SELECT {HEAD}, {column} FROM queue_{id} WHERE position >= coalesce((SELECT iif(position + records > ?1, position, ?1)
         FROM queue_{id} WHERE position <= ?1 ORDER BY position DESC LIMIT 1), ?1) ORDER BY position LIMIT 1"
    );
    connection.prepare_cached(&sql)?.query_row([position.cast_signed()], |row| Ok((head(row)?, read(row)?))).optional()
}

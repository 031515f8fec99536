//! `registry.db`: the devices and their keys, in SQLite. One of the two doors to it.
//!
//! The command line writes, a running gateway reads; either may be absent. Every writing transaction raises `revision` and stamps the rows that it
//! touched with it, so that a gateway with 100,000 devices reads one row after one revocation.

use std::fs::{self, DirBuilder, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension as _, Row, Transaction, TransactionBehavior, params};
use tidegate_auth::{KeyId, PublicKey};

use super::error::Error;
use super::snapshot::{Entry, Key, Snapshot};
use crate::message::{Device, DeviceId};

/// One connection to the registry.
pub struct Registry {
    path: PathBuf,
    connection: Connection,
}

/// A device to be added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDevice {
    pub id: DeviceId,
    pub role: String,
    pub attributes: Vec<(String, String)>,
    /// At most four.
    pub keys: Vec<NewKey>,
}

/// A key to be added, with the time in which it may be used: unix seconds, from inclusive, until exclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewKey {
    pub public: PublicKey,
    pub not_before: Option<u64>,
    pub not_after: Option<u64>,
}

/// A device as the registry has it, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub id: DeviceId,
    pub index: u32,
    pub role: String,
    pub attributes: Vec<(String, String)>,
    pub generation: u32,
    pub enabled: bool,
    pub created_unix: u64,
    pub keys: Vec<KeyRecord>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyRecord {
    pub public: PublicKey,
    pub not_before: Option<u64>,
    pub not_after: Option<u64>,
    pub added_unix: u64,
}

impl Registry {
    pub const FILE: &str = "registry.db";
    pub const KEYS_MAX: usize = 4;

    /// Opens the registry in `data_dir`, and makes an empty one, and the directory, if there is none.
    ///
    /// # Errors
    /// If the file is damaged, not ours, of a later version, or cannot be opened. It is never replaced.
    pub fn open(data_dir: &Path) -> Result<Registry, Error> {
        let path = data_dir.join(Registry::FILE);
        if !data_dir.is_dir() {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(data_dir);
            made.map_err(Error::io("make the directory", data_dir))?;
        }
        match fs::symlink_metadata(&path) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => create(&path)?,
            Err(error) => return Err(Error::io("read", &path)(error)),
        }
        let mut registry = Registry { connection: connect(&path)?, path };
        registry.check()?;
        Ok(registry)
    }

    fn check(&mut self) -> Result<(), Error> {
        let number = |name: &str| self.connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
        let application = number("application_id").map_err(Error::store("read", &self.path))?;
        let version = number("user_version").map_err(Error::store("read", &self.path))?;
        if application != i64::from(APPLICATION_ID) {
            return Err(Error::NotOurs { path: self.path.clone() });
        }
        let version = u32::try_from(version).unwrap_or(u32::MAX);
        if version > LATEST {
            return Err(Error::TooNew { path: self.path.clone(), version });
        }
        // Damage inside is found now, not in the middle of a login. Reading everything anyway, this costs little more.
        let verdict: String = self
            .connection
            .pragma_query_value(None, "quick_check", |row| row.get(0))
            .map_err(Error::store("check", &self.path))?;
        if verdict != "ok" {
            return Err(Error::Corrupt { path: self.path.clone(), detail: verdict });
        }
        migrate(&mut self.connection).map_err(Error::store("upgrade", &self.path))?;
        let durable = self.connection.execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA wal_autocheckpoint = 200;",
        );
        durable.map_err(Error::store("open", &self.path))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn device_count(&self) -> Result<u64, Error> {
        let count: i64 = self
            .connection
            .query_row("SELECT count(*) FROM device", [], |row| row.get(0))
            .map_err(Error::store("read", &self.path))?;
        Ok(u64::try_from(count).unwrap_or(0))
    }

    /// Adds devices, all or none. `progress` is called with the number done, after each.
    ///
    /// # Errors
    /// Names the first device or key that exists already.
    pub fn add(&mut self, devices: &[NewDevice], now_unix: u64, mut progress: impl FnMut(usize)) -> Result<(), Error> {
        let path = self.path.clone();
        self.change(|change, revision| {
            for (done, new) in devices.iter().enumerate() {
                let attributes = serde_json::Value::from_iter(new.attributes.iter().cloned()).to_string();
                let sql = "INSERT INTO device (id, role, attributes, generation, enabled, created, changed)
                           VALUES (?1, ?2, ?3, 1, 1, ?4, ?5) ON CONFLICT (id) DO NOTHING";
                let added = change
                    .prepare_cached(sql)
                    .and_then(|mut insert| {
                        insert.execute(params![new.id.as_str(), new.role, attributes, sql_time(now_unix), revision])
                    })
                    .map_err(Error::store("write", &path))?;
                if added == 0 {
                    return Err(Error::DeviceExists(new.id.clone()));
                }
                let index = change.last_insert_rowid();
                for key in &new.keys {
                    insert_key(change, &path, index, &new.id, key, now_unix)?;
                }
                progress(done.saturating_add(1));
            }
            Ok(())
        })
    }

    pub fn get(&self, id: &DeviceId) -> Result<Option<Record>, Error> {
        let mut found = self.select("WHERE device.id = ?1", &[&id.as_str()])?;
        Ok(found.pop())
    }

    /// Every device, by id.
    pub fn list(&self) -> Result<Vec<Record>, Error> {
        let mut records = self.select("", &[])?;
        records.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(records)
    }

    /// Revokes a device, or lets it in again. Its generation grows, so tokens and sessions from before are void either way.
    pub fn set_enabled(&mut self, id: &DeviceId, enabled: bool) -> Result<Record, Error> {
        let path = self.path.clone();
        self.change(|change, revision| {
            let sql = "UPDATE device SET enabled = ?2, generation = generation + 1, changed = ?3 WHERE id = ?1";
            let changed = change.execute(sql, params![id.as_str(), enabled, revision]);
            match changed.map_err(Error::store("write", &path))? {
                0 => Err(Error::UnknownDevice(id.clone())),
                _ => Ok(()),
            }
        })?;
        self.expect(id)
    }

    pub fn add_key(&mut self, id: &DeviceId, key: &NewKey, now_unix: u64) -> Result<Record, Error> {
        let path = self.path.clone();
        self.change(|change, revision| {
            let index = touch(change, &path, id, revision)?;
            insert_key(change, &path, index, id, key, now_unix)
        })?;
        self.expect(id)
    }

    pub fn remove_key(&mut self, id: &DeviceId, key_id: KeyId) -> Result<Record, Error> {
        let record = self.expect(id)?;
        let key = record.keys.iter().find(|key| key.public.key_id() == key_id);
        let public = key.ok_or_else(|| Error::UnknownKey { device: id.clone(), key_id })?.public;
        let path = self.path.clone();
        self.change(|change, revision| {
            let index = touch(change, &path, id, revision)?;
            let sql = "DELETE FROM device_key WHERE device = ?1 AND public_key = ?2";
            change.execute(sql, params![index, public.as_bytes()]).map_err(Error::store("write", &path))?;
            Ok(())
        })?;
        self.expect(id)
    }

    /// The device whose key this is.
    pub fn owner_of(&self, key: &PublicKey) -> Result<Option<DeviceId>, Error> {
        owner_of(&self.connection, &self.path, key)
    }

    fn expect(&self, id: &DeviceId) -> Result<Record, Error> {
        self.get(id)?.ok_or_else(|| Error::UnknownDevice(id.clone()))
    }

    /// One writing transaction, at a new revision; durable when it returns.
    fn change<T>(&mut self, body: impl FnOnce(&Transaction<'_>, i64) -> Result<T, Error>) -> Result<T, Error> {
        let path = self.path.clone();
        let store = || Error::store("write", &path);
        let change = self.connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(store())?;
        let sql = "UPDATE registry SET revision = revision + 1 RETURNING revision";
        let revision = change.query_row(sql, [], |row| row.get(0)).map_err(store())?;
        let outcome = body(&change, revision)?;
        change.commit().map_err(store())?;
        Ok(outcome)
    }

    // What a running gateway reads.

    /// Changes whenever another connection has committed, and costs no look at the tables.
    pub(super) fn data_version(&self) -> Result<i64, Error> {
        let version = self.connection.pragma_query_value(None, "data_version", |row| row.get(0));
        version.map_err(Error::store("read", &self.path))
    }

    pub(super) fn load(&self) -> Result<Snapshot, Error> {
        let mut snapshot = Snapshot::default();
        self.catch_up(&mut snapshot)?;
        snapshot.version = 1;
        Ok(snapshot)
    }

    /// Brings `snapshot` up to the registry's revision; true if that changed anything.
    pub(super) fn catch_up(&self, snapshot: &mut Snapshot) -> Result<bool, Error> {
        // One transaction, so that revision, devices and keys are of one moment.
        let view = self.connection.unchecked_transaction().map_err(Error::store("read", &self.path))?;
        let revision: i64 = view
            .query_row("SELECT revision FROM registry", [], |row| row.get(0))
            .map_err(Error::store("read", &self.path))?;
        let known = i64::try_from(snapshot.revision).unwrap_or(i64::MAX);
        if revision == known {
            return Ok(false);
        }
        for record in self.select("WHERE device.changed > ?1", &[&known])? {
            let role = snapshot.role(&record.role);
            snapshot.put(entry(record, role));
        }
        snapshot.revision = u64::try_from(revision).unwrap_or(0);
        snapshot.version = snapshot.version.saturating_add(1);
        Ok(true)
    }

    /// Devices that `filter` picks, with their keys.
    fn select(&self, filter: &str, values: &[&dyn rusqlite::ToSql]) -> Result<Vec<Record>, Error> {
        let sql = format!(
            "SELECT device.idx, device.id, role, attributes, generation, enabled, created,
                    public_key, not_before, not_after, added
             FROM device LEFT JOIN device_key ON device_key.device = device.idx {filter}
             ORDER BY device.idx, device_key.added, device_key.public_key"
        );
        let mut records: Vec<Record> = Vec::new();
        let mut statement = self.connection.prepare(&sql).map_err(Error::store("read", &self.path))?;
        let mut rows = statement.query(values).map_err(Error::store("read", &self.path))?;
        while let Some(row) = rows.next().map_err(Error::store("read", &self.path))? {
            let damaged = |error: RowError| Error::Corrupt { path: self.path.clone(), detail: error.to_string() };
            let index: u32 = row.get(0).map_err(|error| damaged(error.into()))?;
            if records.last().is_none_or(|last| last.index != index) {
                records.push(read_device(row, index).map_err(damaged)?);
            }
            if let (Some(record), Some(key)) = (records.last_mut(), read_key(row).map_err(damaged)?) {
                record.keys.push(key);
            }
        }
        Ok(records)
    }
}

/// Why a row does not say what we once wrote into it.
#[derive(Debug)]
enum RowError {
    Column(rusqlite::Error),
    DeviceId(String),
    Attributes(String),
}

impl From<rusqlite::Error> for RowError {
    fn from(error: rusqlite::Error) -> Self {
        RowError::Column(error)
    }
}

impl std::fmt::Display for RowError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RowError::Column(error) => error.fmt(f),
            RowError::DeviceId(id) => write!(f, "{id:?} is not a device id"),
            RowError::Attributes(id) => write!(f, "the attributes of {id} are not JSON"),
        }
    }
}

fn read_device(row: &Row<'_>, index: u32) -> Result<Record, RowError> {
    let id: String = row.get(1)?;
    let attributes: String = row.get(3)?;
    let attributes: std::collections::BTreeMap<String, String> =
        serde_json::from_str(&attributes).map_err(|_| RowError::Attributes(id.clone()))?;
    Ok(Record {
        id: DeviceId::parse(&id).map_err(|_| RowError::DeviceId(id))?,
        index,
        role: row.get(2)?,
        attributes: attributes.into_iter().collect(),
        generation: row.get(4)?,
        enabled: row.get(5)?,
        created_unix: time(row.get(6)?),
        keys: Vec::new(),
    })
}

fn read_key(row: &Row<'_>) -> Result<Option<KeyRecord>, RowError> {
    let Some(public) = row.get::<_, Option<[u8; 32]>>(7)? else { return Ok(None) };
    Ok(Some(KeyRecord {
        public: PublicKey::from_registered(public),
        not_before: row.get::<_, Option<i64>>(8)?.map(time),
        not_after: row.get::<_, Option<i64>>(9)?.map(time),
        added_unix: time(row.get(10)?),
    }))
}

fn entry(record: Record, role: Arc<str>) -> Entry {
    let key = |key: &KeyRecord| Key {
        public: key.public,
        id: key.public.key_id(),
        not_before: key.not_before,
        not_after: key.not_after,
    };
    Entry {
        enabled: record.enabled,
        keys: record.keys.iter().map(key).collect(),
        device: Arc::new(Device {
            id: record.id,
            index: record.index,
            generation: record.generation,
            role,
            attributes: record.attributes.into_iter().map(|(k, v)| (k.into(), v.into())).collect(),
        }),
    }
}

/// Marks a device's keys as changed, which voids what was issued before; gives its row number.
fn touch(change: &Transaction<'_>, path: &Path, id: &DeviceId, revision: i64) -> Result<i64, Error> {
    let sql = "UPDATE device SET generation = generation + 1, changed = ?2 WHERE id = ?1 RETURNING idx";
    let index = change.query_row(sql, params![id.as_str(), revision], |row| row.get(0)).optional();
    index.map_err(Error::store("write", path))?.ok_or_else(|| Error::UnknownDevice(id.clone()))
}

fn insert_key(
    change: &Transaction<'_>,
    path: &Path,
    index: i64,
    id: &DeviceId,
    key: &NewKey,
    now_unix: u64,
) -> Result<(), Error> {
    if let Some(device) = owner_of(change, path, &key.public)? {
        return Err(Error::KeyTaken { key: key.public, device });
    }
    let store = || Error::store("write", path);
    let sql = "SELECT count(*) FROM device_key WHERE device = ?1";
    let count: i64 =
        change.prepare_cached(sql).and_then(|mut q| q.query_row([index], |row| row.get(0))).map_err(store())?;
    if count >= Registry::KEYS_MAX as i64 {
        return Err(Error::TooManyKeys(id.clone()));
    }
    let sql = "INSERT INTO device_key (device, public_key, not_before, not_after, added) VALUES (?1, ?2, ?3, ?4, ?5)";
    let (from, until) = (key.not_before.map(sql_time), key.not_after.map(sql_time));
    let values = params![index, key.public.as_bytes(), from, until, sql_time(now_unix)];
    change.prepare_cached(sql).and_then(|mut insert| insert.execute(values)).map_err(store())?;
    Ok(())
}

fn owner_of(connection: &Connection, path: &Path, key: &PublicKey) -> Result<Option<DeviceId>, Error> {
    let sql = "SELECT device.id FROM device_key JOIN device ON device.idx = device_key.device WHERE public_key = ?1";
    let id: Option<String> = connection
        .prepare_cached(sql)
        .and_then(|mut query| query.query_row([key.as_bytes()], |row| row.get(0)).optional())
        .map_err(Error::store("read", path))?;
    let Some(id) = id else { return Ok(None) };
    let id = DeviceId::parse(&id)
        .map_err(|_| Error::Corrupt { path: path.to_owned(), detail: RowError::DeviceId(id).to_string() })?;
    Ok(Some(id))
}

/// SQLite's integers are signed.
fn sql_time(unix: u64) -> i64 {
    i64::try_from(unix).unwrap_or(i64::MAX)
}

fn time(sql: i64) -> u64 {
    u64::try_from(sql).unwrap_or(0)
}

fn connect(path: &Path) -> Result<Connection, Error> {
    // No SQLITE_OPEN_CREATE: what is not there stays not there.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    if fs::metadata(path).map_err(Error::io("read", path))?.len() == 0 {
        return Err(Error::Corrupt { path: path.to_owned(), detail: "it is empty".to_owned() });
    }
    let connection = Connection::open_with_flags(path, flags).map_err(Error::store("open", path))?;
    connection.busy_timeout(BUSY_TIMEOUT).map_err(Error::store("open", path))?;
    Ok(connection)
}

/// Makes an empty registry: whole and on the disk, or not at all.
fn create(path: &Path) -> Result<(), Error> {
    let draft = super::gateway_key::draft_of(path)?;
    let outcome = (|| {
        // SQLite gives its own companions the mode of the file itself.
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft);
        file.map_err(Error::io("create", path))?;
        let mut connection = Connection::open(&draft).map_err(Error::store("create", path))?;
        let identify = format!("PRAGMA synchronous = FULL; PRAGMA application_id = {APPLICATION_ID};");
        connection.execute_batch(&identify).map_err(Error::store("create", path))?;
        migrate(&mut connection).map_err(Error::store("create", path))?;
        connection.close().map_err(|(_, error)| Error::store("create", path)(error))?;
        match fs::hard_link(&draft, path) {
            // Another process was first; its registry is the registry.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            other => other.map_err(Error::io("create", path)),
        }
    })();
    let _ = fs::remove_file(&draft);
    outcome
}

fn migrate(connection: &mut Connection) -> rusqlite::Result<()> {
    let version = |connection: &Connection| -> rusqlite::Result<u32> {
        connection.pragma_query_value(None, "user_version", |row| row.get(0))
    };
    if version(connection)? >= LATEST {
        return Ok(());
    }
    let change = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Again, now that nobody else can be at it.
    let done = version(&change)?;
    for (number, sql) in (1..=LATEST).zip(MIGRATIONS).filter(|(number, _)| *number > done) {
        change.execute_batch(sql)?;
        change.pragma_update(None, "user_version", number)?;
    }
    change.commit()
}

const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// "TIDr" in ASCII.
const APPLICATION_ID: i32 = 0x5449_4472;
const LATEST: u32 = MIGRATIONS.len() as u32;
/// Applied in order, each once; the number done is SQLite's `user_version`.
const MIGRATIONS: [&str; 1] = [r"
CREATE TABLE registry (one INTEGER PRIMARY KEY CHECK (one = 1), revision INTEGER NOT NULL) STRICT;
INSERT INTO registry VALUES (1, 1);
-- AUTOINCREMENT: a row number that tokens carry is never given to another device.
CREATE TABLE device (
    idx        INTEGER PRIMARY KEY AUTOINCREMENT CHECK (idx BETWEEN 1 AND 4294967295),
    id         TEXT NOT NULL UNIQUE,
    role       TEXT NOT NULL,
    attributes TEXT NOT NULL,
    generation INTEGER NOT NULL CHECK (generation BETWEEN 1 AND 4294967295),
    enabled    INTEGER NOT NULL CHECK (enabled IN (0, 1)),
    created    INTEGER NOT NULL,
    changed    INTEGER NOT NULL
) STRICT;
CREATE INDEX device_changed ON device (changed);
CREATE TABLE device_key (
    device     INTEGER NOT NULL REFERENCES device (idx),
    public_key BLOB NOT NULL UNIQUE CHECK (length(public_key) = 32),
    not_before INTEGER,
    not_after  INTEGER,
    added      INTEGER NOT NULL,
    PRIMARY KEY (device, public_key)
) STRICT, WITHOUT ROWID;
"];

//! `replay.db`: the JWTs and the numbers of signed messages that have been used, so that they stay used over a restart. The other door to SQLite.
//!
//! What decides is the set in memory; this is its memory. The watching thread writes in batches, some 20 ms after the login at the latest, and
//! without an fsync for each: `kill -9` keeps what was written, a power cut may lose the last of it. So the worst case is a JWT that works twice
//! if the gateway or its power fails in the moment after its first use, and whoever holds it has read it off an unencrypted wire.
//! The file can be lost without harm to anything else: if it is damaged it is put aside and begun anew, with a warning.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, params};
use tidegate_auth::used_set::Id;
use tidegate_auth::{KeyId, UsedSet};

use super::clock::Now;
use super::error::Error;
use super::signed::Sequences;

/// The used JWTs on the disk.
pub(super) struct Replay {
    path: PathBuf,
    connection: Connection,
}

/// A JWT that has been used.
#[derive(Clone, Copy, Debug)]
pub(super) struct UsedJti {
    pub(super) device_index: u32,
    pub(super) jti: Id,
    pub(super) expires_unix: u64,
}

/// What has been used.
#[derive(Clone, Copy, Debug)]
pub(super) enum Used {
    Jti(UsedJti),
    /// The number of a signed message.
    Sequence {
        device_index: u32,
        key: KeyId,
        sequence: u64,
    },
}

impl Replay {
    const FILE: &str = "replay.db";

    /// Opens the file and fills `used` with what has not expired, and `sequences`.
    pub(super) fn open(
        data_dir: &Path,
        used: &mut UsedSet,
        sequences: &mut Sequences,
        now: Now,
    ) -> Result<Self, Error> {
        let path = data_dir.join(Replay::FILE);
        match Replay::try_open(&path, used, sequences, now) {
            Err(Error::Corrupt { detail, .. }) => {
                let aside = data_dir.join("replay.db.damaged");
                tracing::warn!(path = %path.display(), detail, "used tokens put aside, file is damaged");
                fs::rename(&path, aside).map_err(Error::io("put aside", &path))?;
                for companion in ["replay.db-wal", "replay.db-shm"] {
                    // They belong to the damaged file; usually there are none.
                    let _ = fs::remove_file(data_dir.join(companion));
                }
                Replay::try_open(&path, used, sequences, now)
            }
            other => other,
        }
    }

    fn try_open(path: &Path, used: &mut UsedSet, sequences: &mut Sequences, now: Now) -> Result<Self, Error> {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
        file.map_err(Error::io("open", path))?;
        let store = || Error::store("open", path);
        let connection = Connection::open(path).map_err(store())?;
        connection.busy_timeout(Duration::from_secs(5)).map_err(store())?;
        connection.execute_batch(SCHEMA).map_err(store())?;
        {
            let sql = "SELECT device, jti, expires FROM used WHERE expires > ?1";
            let mut statement = connection.prepare(sql).map_err(store())?;
            let mut rows = statement.query([sql_time(now.unix_secs)]).map_err(store())?;
            while let Some(row) = rows.next().map_err(store())? {
                let read = || Ok((row.get(0)?, row.get(1)?, row.get::<_, i64>(2)?));
                let (device_index, jti, expires) = read().map_err(store())?;
                let expires = u64::try_from(expires).unwrap_or(0);
                // More than a smaller bound admits: then logins by JWT wait until these have expired.
                let _ = used.insert(device_index, jti, expires, now.unix_secs);
            }
            let mut statement = connection.prepare("SELECT device, key, highest FROM sequence").map_err(store())?;
            let mut rows = statement.query([]).map_err(store())?;
            while let Some(row) = rows.next().map_err(store())? {
                let read = || Ok((row.get(0)?, row.get(1)?, row.get::<_, i64>(2)?));
                let (device_index, key, highest) = read().map_err(store())?;
                sequences.restore(device_index, KeyId(key), u64::try_from(highest).unwrap_or(0));
            }
        }
        Ok(Replay { path: path.to_owned(), connection })
    }

    /// Writes a batch.
    pub(super) fn remember(&mut self, batch: &[Used]) -> Result<(), Error> {
        let store = || Error::store("write", &self.path);
        let change = self.connection.transaction().map_err(store())?;
        for used in batch {
            match used {
                Used::Jti(used) => {
                    let sql = "INSERT OR REPLACE INTO used (device, jti, expires) VALUES (?1, ?2, ?3)";
                    let values = params![used.device_index, used.jti, sql_time(used.expires_unix)];
                    change.prepare_cached(sql).and_then(|mut insert| insert.execute(values)).map_err(store())?;
                }
                Used::Sequence { device_index, key, sequence } => {
                    let sql = "INSERT INTO sequence (device, key, highest) VALUES (?1, ?2, ?3)
                               ON CONFLICT (device, key) DO UPDATE SET highest = max(highest, excluded.highest)";
                    let values = params![device_index, key.0, i64::try_from(*sequence).unwrap_or(i64::MAX)];
                    change.prepare_cached(sql).and_then(|mut insert| insert.execute(values)).map_err(store())?;
                }
            }
        }
        change.commit().map_err(store())
    }

    /// Deletes what has expired, a bounded number at a time.
    pub(super) fn forget_expired(&mut self, now: Now) -> Result<(), Error> {
        let sql = "DELETE FROM used WHERE rowid IN (SELECT rowid FROM used WHERE expires <= ?1 LIMIT 5000)";
        self.connection.execute(sql, [sql_time(now.unix_secs)]).map_err(Error::store("write", &self.path))?;
        Ok(())
    }
}

fn sql_time(unix: u64) -> i64 {
    i64::try_from(unix).unwrap_or(i64::MAX)
}

const SCHEMA: &str = "
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS used (device INTEGER NOT NULL, jti BLOB NOT NULL, expires INTEGER NOT NULL, UNIQUE (device, jti)) STRICT;
CREATE TABLE IF NOT EXISTS sequence (device INTEGER NOT NULL, key BLOB NOT NULL, highest INTEGER NOT NULL, PRIMARY KEY (device, key)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS used_expires ON used (expires);
";

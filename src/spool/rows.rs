//! Small rows beside the queues: what has to survive with the messages and is looked up by name, last write wins.
//!
//! The spool does not know what is in them. Writes gather here until the next commit, so a row that changes a hundred times a second is written with
//! the commits that happen anyway, at most once in each. Memory is bounded by what the rows' owner may keep.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::record::{self, Pack};
use crate::message::Message;

/// Whose row it is: the first part of its key. The numbers are in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// A retained value; the key is its topic.
    Retained = 1,
    /// A persistent session; the key is its number, as in those that follow.
    Session = 2,
    /// A subscription; the number, and the filter.
    Subscription = 3,
    /// A number that only grows; the key is its name.
    Counter = 4,
    /// What a session has taken of its queue; the number.
    Cursor = 5,
    /// A packet identifier that a session's client has yet to release; the number and the identifier.
    Unreleased = 6,
    /// A client's will; the number.
    Will = 7,
}

/// Rows to be written, None to be deleted.
#[derive(Debug, Default)]
pub(super) struct PendingRows(BTreeMap<Key, Option<Box<[u8]>>>);

type Key = (Kind, Box<[u8]>);

impl PendingRows {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn set(&mut self, kind: Kind, key: &[u8], value: Option<&[u8]>) {
        self.0.insert((kind, key.into()), value.map(Box::from));
    }

    /// Takes over everything from `newer`.
    pub fn absorb(&mut self, newer: PendingRows) {
        if self.0.is_empty() {
            *self = newer;
        } else {
            self.0.extend(newer.0);
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (Kind, &[u8], Option<&[u8]>)> {
        self.0.iter().map(|((kind, key), value)| (*kind, &key[..], value.as_deref()))
    }

    /// For the estimate of the log's size.
    pub fn bytes(&self) -> usize {
        self.iter().map(|(_, key, value)| key.len() + value.map_or(0, <[u8]>::len)).sum()
    }
}

/// A message as the value of a row.
pub fn encode_message(message: &Message) -> Vec<u8> {
    let mut pack = Pack::default();
    pack.push(message);
    pack.seal().to_vec()
}

/// The message in a row; None when it is damaged.
pub fn decode_message(value: &[u8]) -> Option<Message> {
    record::decode(&Bytes::copy_from_slice(value)).ok()?.pop()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::Kind;
    use crate::spool::{Config, Spool};

    fn open(dir: &Path) -> Spool {
        Spool::open(dir, Config::default(), Vec::new()).unwrap()
    }

    fn rows(spool: &Spool) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let mut rows = BTreeMap::new();
        spool
            .rows(Kind::Retained, |key, value| {
                rows.insert(key.to_vec(), value.to_vec());
            })
            .unwrap();
        rows
    }

    #[test]
    fn the_last_write_of_a_row_wins_over_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let spool = open(dir.path());
        for n in 0..1000_u32 {
            spool.set(Kind::Retained, b"counter", Some(&n.to_be_bytes()));
        }
        spool.set(Kind::Retained, b"gone", Some(b"x"));
        spool.set(Kind::Retained, b"empty", Some(b""));
        drop(spool);
        let spool = open(dir.path());
        assert_eq!(rows(&spool)[&b"counter"[..]], 999_u32.to_be_bytes());
        spool.set(Kind::Retained, b"gone", None);
        spool.set(Kind::Retained, b"never there", None);
        drop(spool);
        let left = rows(&open(dir.path()));
        assert_eq!(left.keys().map(|key| &key[..]).collect::<Vec<_>>(), [&b"counter"[..], b"empty"]);
    }

    #[test]
    fn a_row_that_nobody_waits_for_is_written_in_due_time() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { ack_delay_ms: 1, ..Config::default() };
        let spool = Spool::open(dir.path(), config, Vec::new()).unwrap();
        spool.set(Kind::Retained, b"a", Some(b"1"));
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while rows(&spool).is_empty() {
            assert!(std::time::Instant::now() < deadline);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    #[test]
    fn a_spool_of_an_earlier_format_gains_what_it_lacks_and_keeps_what_it_has() {
        let of_format_2 = "DROP TABLE backlog; DROP TABLE backlog_index; DELETE FROM meta WHERE key = 'backlog_end'; PRAGMA user_version = 2";
        for (older, kept) in
            [(of_format_2, 2), (&format!("{of_format_2}; DROP TABLE kept; PRAGMA user_version = 1"), 1)]
        {
            let dir = tempfile::tempdir().unwrap();
            let spool = open(dir.path());
            spool.set(Kind::Retained, b"before", Some(b"1"));
            drop(spool);
            let file = rusqlite::Connection::open(dir.path().join("spool.db")).unwrap();
            file.execute_batch(older).unwrap();
            drop(file);
            let spool = open(dir.path());
            assert_eq!(spool.epoch(), 2);
            spool.backlog(|_, _, _| true).unwrap();
            spool.set(Kind::Retained, b"a", Some(b"1"));
            drop(spool);
            assert_eq!(rows(&open(dir.path())).len(), kept);
        }
    }
}

//! The backlog: messages that wait for sessions, stored once for all of them.
//!
//! A message's *position* is its name. A row holds the messages of one commit, up to [`ROW_BYTES`], and beside it stands a small row that names the
//! sessions of each. Rows are small so that reading one message costs little and one absent session holds little of what others have taken.
//!
//! ```text
//! index   for each record: cost varint | targets varint | the targets
//! target  session varint | id u16 le | flags u8 | note length varint, note, if flagged
//! ```
//!
//! In memory: how many of a row's messages are still wanted, by how many sessions. At none the row is deleted with the next commit. Whoever starts the
//! gateway reads the index once ([`Spool::backlog`](super::Spool::backlog)) and says which targets still want theirs; no message is read for that.

use std::collections::BTreeMap;

use bytes::Bytes;
use parking_lot::Mutex;

use super::record::{self, Damage, Input, Pack, put_varint};
use super::store::Reads;
use crate::message::Message;

/// A row closes when it holds this many bytes, in bytes.
const ROW_BYTES: usize = 16 << 10;
/// Positions are counted up to here, so that a position and a packet identifier fit one word.
pub const POSITION_MAX: u64 = (1 << 48) - 1;
/// Rows deleted in one transaction: 4 MiB of pages to free.
pub(super) const DELETE_ROWS_MAX: usize = 256;

/// A session that wants a message. The spool keeps what it is given and knows the session's number alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target<'a> {
    pub session: u32,
    /// The packet identifier that the message will have there.
    pub id: u16,
    /// The lower seven bits are free to use.
    pub flags: u8,
    pub note: &'a [u8],
}

const HAS_NOTE: u8 = 0x80;

/// A message that was asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    pub position: u64,
    /// None: it is not there any more, or damaged.
    pub message: Option<Message>,
}

/// A row of a commit that is being filled.
#[derive(Debug, Default)]
pub(super) struct OpenRow {
    pub first: u64,
    pub pack: Pack,
    pub index: Vec<u8>,
}

impl OpenRow {
    pub fn new(first: u64) -> OpenRow {
        OpenRow { first, ..OpenRow::default() }
    }

    pub fn is_full(&self) -> bool {
        self.pack.bytes() + self.index.len() >= ROW_BYTES
    }

    pub fn bytes(&self) -> usize {
        self.pack.bytes() + self.index.len()
    }

    pub fn push(&mut self, message: &Message, targets: &[Target<'_>]) {
        self.pack.push(message);
        put_varint(&mut self.index, message.cost_bytes() as u64);
        put_varint(&mut self.index, targets.len() as u64);
        for target in targets {
            put_varint(&mut self.index, u64::from(target.session));
            self.index.extend_from_slice(&target.id.to_le_bytes());
            let flags = target.flags & !HAS_NOTE;
            if target.note.is_empty() {
                self.index.push(flags);
            } else {
                self.index.push(flags | HAS_NOTE);
                put_varint(&mut self.index, target.note.len() as u64);
                self.index.extend_from_slice(target.note);
            }
        }
    }
}

/// An upper bound of what [`OpenRow::push`] adds to the index.
pub(super) fn index_bytes_max(targets: &[Target<'_>]) -> usize {
    if targets.is_empty() { 0 } else { 20 + targets.iter().map(|target| 18 + target.note.len()).sum::<usize>() }
}

/// Shows every target of an index row with the place of its message in the row and the message's cost.
pub(super) fn read_index(
    index: &Bytes,
    records: u32,
    mut visit: impl FnMut(u32, u32, Target<'_>),
) -> Result<(), Damage> {
    let mut input = Input::new(index.clone());
    for record in 0..records {
        let cost = u32::try_from(input.varint()?).unwrap_or(u32::MAX);
        for _ in 0..input.varint()? {
            let session = u32::try_from(input.varint()?).map_err(|_| Damage::Field("session"))?;
            let id = u16::from_le_bytes([input.byte()?, input.byte()?]);
            let flags = input.byte()?;
            let note = if flags & HAS_NOTE != 0 { input.bytes()? } else { Bytes::new() };
            visit(record, cost, Target { session, id, flags: flags & !HAS_NOTE, note: &note });
        }
    }
    if input.is_at_end() { Ok(()) } else { Err(Damage::Field("index")) }
}

/// What memory knows of the rows.
#[derive(Default)]
pub(super) struct Rows {
    rows: BTreeMap<u64, Row>,
    /// Of the rows that are stored or about to be.
    bytes: u64,
    /// Rows to be deleted from disk.
    dead: Vec<u64>,
    /// Questions for messages that are not on disk yet: asked again after the next commit.
    waiting: Vec<Question>,
}

#[derive(Clone, Copy, Debug)]
struct Row {
    records: u32,
    /// Messages times sessions that have not taken them.
    live: u32,
    bytes: u32,
    stored: bool,
}

/// Messages that somebody wants.
pub(super) struct Question {
    pub positions: Vec<u64>,
    pub reply: Box<dyn FnOnce(Vec<Found>) + Send>,
}

/// Positions, and where the row of each begins if it is still there.
type Places = Vec<(u64, Option<u64>)>;

enum Place {
    /// In the row of this position.
    Stored(u64),
    /// In a commit that is not over.
    NotYet,
    Gone,
}

impl Rows {
    /// Bytes of all rows.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A message was put into an open row: for so many sessions, and so many bytes.
    pub fn grew(&mut self, first: u64, targets: u32, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let row = self.rows.entry(first).or_insert(Row { records: 0, live: 0, bytes: 0, stored: false });
        row.records += 1;
        row.live = row.live.saturating_add(targets);
        row.bytes = row.bytes.saturating_add(bytes);
        self.bytes += u64::from(bytes);
    }

    /// A row that was found on disk.
    pub fn found(&mut self, first: u64, records: u32, live: u32, bytes: u32) {
        self.bytes += u64::from(bytes);
        self.rows.insert(first, Row { records, live, bytes, stored: true });
        if live == 0 {
            self.kill(first);
        }
    }

    /// The rows of a commit are on disk. Gives the questions that can be asked again.
    pub fn stored(&mut self, rows: &[OpenRow]) -> Vec<Question> {
        for OpenRow { first, .. } in rows {
            let Some(row) = self.rows.get_mut(first) else { continue };
            row.stored = true;
            if row.live == 0 {
                self.kill(*first);
            }
        }
        self.take_questions()
    }

    /// The rows of a commit did not get there.
    pub fn refused(&mut self, rows: &[OpenRow]) -> Vec<Question> {
        for OpenRow { first, .. } in rows {
            if let Some(row) = self.rows.remove(first) {
                self.bytes -= u64::from(row.bytes);
            }
        }
        self.take_questions()
    }

    /// One session has taken, or does not want any more, the message at `position`. True when a row can be deleted.
    pub fn release(&mut self, position: u64) -> bool {
        let Some((&first, row)) = self.rows.range_mut(..=position).next_back() else { return false };
        if position - first >= u64::from(row.records) {
            return false;
        }
        row.live = row.live.saturating_sub(1);
        let over = row.live == 0 && row.stored;
        if over {
            self.kill(first);
        }
        over
    }

    /// Gives up the oldest rows, and some more, when they are above `bytes_max`. Returns how many.
    pub fn make_room(&mut self, bytes_max: u64) -> u64 {
        let mut given_up = 0;
        if self.bytes <= bytes_max {
            return 0;
        }
        let goal = bytes_max - bytes_max / 16;
        while self.bytes > goal
            && let Some((&first, _)) = self.rows.iter().find(|(_, row)| row.stored)
        {
            given_up += 1;
            self.kill(first);
        }
        given_up
    }

    /// Questions that wait for a commit.
    pub fn take_questions(&mut self) -> Vec<Question> {
        std::mem::take(&mut self.waiting)
    }

    fn kill(&mut self, first: u64) {
        if let Some(row) = self.rows.remove(&first) {
            self.bytes -= u64::from(row.bytes);
            self.dead.push(first);
        }
    }

    /// Takes some of the rows that are to be deleted.
    pub fn take_dead(&mut self) -> Vec<u64> {
        let from = self.dead.len().saturating_sub(DELETE_ROWS_MAX);
        self.dead.split_off(from)
    }

    /// They were not deleted.
    pub fn put_back(&mut self, mut dead: Vec<u64>) {
        self.dead.append(&mut dead);
    }

    pub fn has_dead(&self) -> bool {
        !self.dead.is_empty()
    }

    fn place(&self, position: u64) -> Place {
        match self.rows.range(..=position).next_back() {
            Some((first, row)) if position - first < u64::from(row.records) => {
                if row.stored {
                    Place::Stored(*first)
                } else {
                    Place::NotYet
                }
            }
            Some(_) | None => Place::Gone,
        }
    }

    /// How many of the positions, from the first, can be answered now; when none, the question is kept.
    fn answerable(&mut self, question: Question) -> Option<(Question, Places)> {
        let mut places = Vec::with_capacity(question.positions.len());
        for &position in &question.positions {
            match self.place(position) {
                Place::Stored(first) => places.push((position, Some(first))),
                Place::Gone => places.push((position, None)),
                Place::NotYet => break,
            }
        }
        if places.is_empty() && !question.positions.is_empty() {
            self.waiting.push(question);
            return None;
        }
        Some((question, places))
    }
}

/// Answers questions on the reading thread; keeps the row that was read last, for the next session often wants of the same.
#[derive(Default)]
pub(super) struct Answers {
    last: Option<(u64, Bytes)>,
}

impl Answers {
    pub fn answer(&mut self, rows: &Mutex<Rows>, reads: &Reads, question: Question) {
        let Some((question, places)) = rows.lock().answerable(question) else { return };
        let mut found = Vec::with_capacity(places.len());
        for (position, first) in places {
            let message = match first.map_or(Ok(None), |first| self.message(reads, first, position)) {
                Ok(message) => message,
                Err(error) if found.is_empty() => {
                    tracing::error!(%error, "messages of a session cannot be read, trying again after the next commit");
                    return rows.lock().waiting.push(question);
                }
                Err(_) => break,
            };
            found.push(Found { position, message });
        }
        (question.reply)(found);
    }

    fn message(&mut self, reads: &Reads, first: u64, position: u64) -> rusqlite::Result<Option<Message>> {
        if self.last.as_ref().is_none_or(|(known, _)| *known != first) {
            self.last = reads.backlog_row(first)?.map(|row| (first, row));
            if let Some((_, row)) = &self.last
                && let Err(damage) = record::check(row)
            {
                tracing::error!(%damage, position = first, "backlog row is damaged, its messages are lost to their sessions");
                self.last = Some((first, Bytes::new()));
            }
        }
        let row = self.last.as_ref().map(|(_, row)| row);
        let index = u32::try_from(position - first).unwrap_or(u32::MAX);
        Ok(row.and_then(|row| record::nth(row, index).ok().flatten()))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use proptest::prelude::*;

    use super::super::tests::{PATIENCE, answers, eventually, message, open_faulty};
    use super::super::{Accepted, Config, Demand, Spool};
    use super::*;
    use crate::units::ByteSize;

    fn open(dir: &Path) -> Spool {
        Spool::open(dir, Config::default(), Vec::new()).unwrap()
    }

    fn target(session: u32, id: u16) -> Target<'static> {
        Target { session, id, flags: 1, note: &[] }
    }

    /// Stores and waits until it is on disk.
    fn store(spool: &Spool, seq: u64, payload: &'static str, targets: &[Target<'_>]) -> u64 {
        let (completion, answer) = answers();
        let demand = Demand { targets, ..Demand::default() };
        let stored = spool.store(&message(1, seq, payload), demand, Some((completion, 0)), 1);
        let (accepted, position) = stored.unwrap();
        assert_eq!(accepted, Accepted::Pending);
        answer.recv_timeout(PATIENCE).unwrap().1.unwrap();
        position
    }

    /// What is on disk now, as after `kill -9`.
    fn killed(dir: &Path) -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        for name in ["spool.db", "spool.db-wal"] {
            std::fs::copy(dir.join(name), copy.path().join(name)).unwrap();
        }
        copy
    }

    fn fetch(spool: &Spool, positions: &[u64]) -> Vec<Option<String>> {
        let (sender, found) = channel();
        spool.fetch(positions.to_vec(), move |all| sender.send(all).unwrap());
        let found = found.recv_timeout(PATIENCE).unwrap();
        assert!(found.iter().map(|f| f.position).eq(positions.iter().copied().take(found.len())));
        let text = |m: Message| String::from_utf8(m.payload.to_vec()).unwrap();
        found.into_iter().map(|f| f.message.map(text)).collect()
    }

    /// (position, session, id) of all that is on disk.
    fn targets(spool: &Spool, wanted: impl Fn(u64, u32) -> bool) -> Vec<(u64, u32, u16)> {
        let mut all = Vec::new();
        spool
            .backlog(|position, cost, target| {
                assert!(cost > 90 && target.flags == 1);
                all.push((position, target.session, target.id));
                wanted(position, target.session)
            })
            .unwrap();
        all
    }

    fn rows(dir: &Path) -> u32 {
        let file = rusqlite::Connection::open(dir.join("spool.db")).unwrap();
        file.query_row("SELECT count(*) FROM backlog", [], |row| row.get(0)).unwrap()
    }

    #[test]
    fn a_message_is_stored_once_for_all_its_sessions_and_read_after_a_kill() {
        let dir = tempfile::tempdir().unwrap();
        let spool = open(dir.path());
        let note = Target { note: b"c/", ..target(700, 65_535) };
        let one = store(&spool, 1, "one", &[target(1, 1), target(2, 9), note]);
        let two = store(&spool, 2, "two", &[target(1, 2)]);
        assert_eq!(fetch(&spool, &[one, two]), [Some("one".into()), Some("two".into())]);
        let copy = killed(dir.path());
        let spool = open(copy.path());
        let all = targets(&spool, |_, _| true);
        assert_eq!(all, [(one, 1, 1), (one, 2, 9), (one, 700, 65_535), (two, 1, 2)]);
        assert_eq!(fetch(&spool, &[two, 1000]), [Some("two".into()), None]);
        assert!(store(&spool, 3, "three", &[target(1, 3)]) > two);
    }

    #[test]
    fn a_row_goes_when_its_last_session_has_taken_it_and_its_positions_are_not_given_again() {
        let dir = tempfile::tempdir().unwrap();
        let spool = open(dir.path());
        let one = store(&spool, 1, "one", &[target(1, 1), target(2, 1)]);
        let two = store(&spool, 2, "two", &[target(1, 2)]);
        spool.release(one);
        spool.release(two);
        eventually("the second row is deleted", || rows(dir.path()) == 1);
        spool.release(one);
        eventually("the first row is deleted", || rows(dir.path()) == 0);
        assert_eq!((fetch(&spool, &[one]), spool.backlog_bytes()), (vec![None], 0));
        drop(spool);
        assert!(store(&open(dir.path()), 3, "three", &[target(1, 3)]) > two);
    }

    #[test]
    fn what_nobody_wants_at_the_start_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let spool = open(dir.path());
        let one = store(&spool, 1, "one", &[target(1, 1), target(2, 1)]);
        store(&spool, 2, "two", &[target(2, 2)]);
        drop(spool);
        let spool = open(dir.path());
        assert_eq!(targets(&spool, |_, session| session == 1).len(), 3);
        eventually("a row is deleted", || rows(dir.path()) == 1);
        assert_eq!(fetch(&spool, &[one]), [Some("one".into())]);
    }

    #[test]
    fn a_question_for_what_is_not_on_disk_yet_is_answered_after_the_commit() {
        let dir = tempfile::tempdir().unwrap();
        let (spool, control) = open_faulty(dir.path(), Config::default(), Vec::new());
        let stored = store(&spool, 1, "stored", &[target(1, 1)]);
        control.hold(true);
        let demand = |targets| Demand { targets, ..Demand::default() };
        let next = [target(1, 2)];
        let (_, held) = spool.store(&message(1, 2, "held"), demand(&next), None, 1).unwrap();
        let (sender, found) = channel();
        let other = sender.clone();
        spool.fetch(vec![held], move |all| sender.send(all).unwrap());
        spool.fetch(vec![stored, held], move |all| other.send(all).unwrap());
        // The one that can be answered in part is; the other is not.
        let part = found.recv_timeout(PATIENCE).unwrap();
        assert_eq!(part.iter().map(|f| f.position).collect::<Vec<_>>(), [stored]);
        assert!(found.try_recv().is_err());
        control.hold(false);
        let late = found.recv_timeout(PATIENCE).unwrap();
        assert_eq!(late.iter().map(|f| f.position).collect::<Vec<_>>(), [held]);
        assert!(late[0].message.is_some());
    }

    #[test]
    fn a_refused_commit_leaves_no_message_behind() {
        let dir = tempfile::tempdir().unwrap();
        let (spool, control) = open_faulty(dir.path(), Config::default(), Vec::new());
        control.fail(true);
        let (completion, answer) = answers();
        let targets = [target(1, 1)];
        let demand = Demand { targets: &targets, ..Demand::default() };
        let (_, position) = spool.store(&message(1, 1, "x"), demand, Some((completion, 0)), 1).unwrap();
        assert!(answer.recv_timeout(PATIENCE).unwrap().1.is_err());
        assert_eq!((fetch(&spool, &[position]), spool.backlog_bytes()), (vec![None], 0));
        control.fail(false);
        eventually("recovery", || spool.healthy().is_ok());
        assert_eq!(fetch(&spool, &[store(&spool, 2, "y", &[target(1, 2)])]), [Some("y".into())]);
    }

    #[test]
    fn the_oldest_give_way_at_the_bound() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { backlog_bytes_max: ByteSize(1 << 20), ..Config::default() };
        let spool = Spool::open(dir.path(), config, Vec::new()).unwrap();
        let targets = [target(1, 1)];
        let large = Arc::new(message(1, 1, vec![7; 20_000]));
        for _ in 0..100 {
            let demand = Demand { targets: &targets, ..Demand::default() };
            spool.store(&large, demand, None, 1).unwrap();
        }
        let last = store(&spool, 2, "last", &targets);
        assert!(spool.backlog_bytes() <= 1 << 20, "{}", spool.backlog_bytes());
        assert_eq!(fetch(&spool, &[0, last]), [None, Some("last".into())]);
        eventually("rows are deleted", || rows(dir.path()) < 60);
    }

    #[test]
    fn a_damaged_row_is_lost_alone() {
        let dir = tempfile::tempdir().unwrap();
        let spool = open(dir.path());
        let positions = [1, 2].map(|n| store(&spool, n, "x", &[target(1, n as u16)]));
        drop(spool);
        let file = rusqlite::Connection::open(dir.path().join("spool.db")).unwrap();
        let damage = "UPDATE backlog SET data = zeroblob(length(data)) WHERE position = ?1";
        file.execute(damage, [positions[0].cast_signed()]).unwrap();
        drop(file);
        let spool = open(dir.path());
        targets(&spool, |_, _| true);
        assert_eq!(fetch(&spool, &positions), [None, Some("x".into())]);
    }

    fn any_targets() -> impl Strategy<Value = Vec<(u32, u16, u8, Vec<u8>)>> {
        let note = prop::collection::vec(any::<u8>(), 0..20);
        prop::collection::vec((any::<u32>(), any::<u16>(), 0_u8..0x80, note), 0..20)
    }

    proptest! {
        #[test]
        fn an_index_reads_back_and_no_bytes_panic(records in prop::collection::vec(any_targets(), 0..8), noise: Vec<u8>) {
            let mut row = OpenRow::new(0);
            let mut expected = Vec::new();
            for (record, targets) in (0_u32..).zip(&records) {
                let lent: Vec<Target<'_>> =
                    targets.iter().map(|(session, id, flags, note)| Target { session: *session, id: *id, flags: *flags, note }).collect();
                let before = row.index.len();
                row.push(&message(1, 1, "x"), &lent);
                prop_assert!(lent.is_empty() || row.index.len() - before <= index_bytes_max(&lent));
                expected.extend(targets.iter().map(|t| (record, t.clone())));
            }
            let mut found = Vec::new();
            let index = Bytes::from(row.index);
            read_index(&index, records.len() as u32, |record, _, t| {
                found.push((record, (t.session, t.id, t.flags, t.note.to_vec())));
            }).unwrap();
            prop_assert_eq!(found, expected);
            let _ = read_index(&noise.into(), 1000, |_, _, _| {});
        }

        #[test]
        fn the_nth_record_is_the_same_as_when_all_are_decoded(payloads in prop::collection::vec(".{0,40}", 1..20)) {
            let mut pack = Pack::default();
            for (seq, payload) in (0..).zip(&payloads) {
                let mut message = message(1 + (seq % 3) as u32, seq * 7, payload.clone());
                if seq % 2 == 0 {
                    message.properties = Some(Box::new(crate::message::Properties {
                        content_type: Some("text/plain".into()),
                        expiry_secs: Some(9),
                        correlation: Some(Bytes::from_static(b"c")),
                        user: vec![("k".into(), "v".into())],
                        ..Default::default()
                    }));
                }
                pack.push(&message);
            }
            let row = Bytes::copy_from_slice(pack.seal());
            record::check(&row).unwrap();
            for (at, message) in (0..).zip(record::decode(&row).unwrap()) {
                prop_assert_eq!(record::nth(&row, at).unwrap(), Some(message));
            }
            prop_assert_eq!(record::nth(&row, payloads.len() as u32).unwrap(), None);
        }
    }
}

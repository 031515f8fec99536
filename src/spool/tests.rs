use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use proptest::prelude::*;

use super::lane::RowHead;
use super::store::{Commit, Sqlite, Store, Table};
use super::*;
use crate::message::{DeviceId, MessageId, Origin, Protocol, Qos, Topic};
use crate::units::{Age, ByteSize};

// ---- support ----

pub(super) fn message(epoch: u32, seq: u64, payload: impl Into<Bytes>) -> Message {
    let device = format!("d{}", seq % 3);
    Message {
        id: MessageId { epoch, seq },
        ingested_ms: writer::now_ms(),
        topic: Topic::parse(&format!("dev/{device}/telemetry")).unwrap(),
        payload: payload.into(),
        qos: Qos::AtLeastOnce,
        retain: false,
        origin: Origin { device: Some(DeviceId::parse(&device).unwrap()), protocol: Protocol::Mqtt, session: None },
        properties: None,
    }
}

fn sink(name: &str, delivery: Delivery) -> SinkConfig {
    SinkConfig { name: name.into(), delivery, queue: QueueConfig::default() }
}

fn open(dir: &Path, sinks: Vec<SinkConfig>) -> Spool {
    Spool::open(dir, Config::default(), sinks).unwrap()
}

/// Outcomes as they come.
pub(super) struct Answers(Mutex<Sender<(u64, Result<Receipt, Reject>)>>);

impl Completion for Answers {
    fn complete(&self, token: u64, outcome: Result<Receipt, Reject>) {
        let _ = self.0.lock().send((token, outcome));
    }
}

pub(super) type Outcome = (u64, Result<Receipt, Reject>);

pub(super) fn answers() -> (Arc<Answers>, Receiver<Outcome>) {
    let (sender, receiver) = channel();
    (Arc::new(Answers(Mutex::new(sender))), receiver)
}

pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// Appends and waits for the answer.
fn append(spool: &Spool, sinks: &[SinkId], message: &Message) -> Result<Receipt, Reject> {
    let (completion, answer) = answers();
    match spool.append(message, sinks, Some((completion, message.id.seq)), 1)? {
        Accepted::Done => Ok(Receipt { id: message.id, receivers: 1 }),
        Accepted::Pending => {
            let (token, outcome) = answer.recv_timeout(PATIENCE).unwrap();
            assert_eq!(token, message.id.seq);
            outcome
        }
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

/// What is there now; empty after a moment of nothing.
fn take(reader: &mut Reader, records_max: usize) -> Vec<Stored> {
    block_on(async {
        let batch = reader.next_batch(records_max, 1 << 20, Duration::ZERO);
        match tokio::time::timeout(Duration::from_millis(300), batch).await {
            Ok(Some(batch)) => batch.records,
            Ok(None) | Err(_) => Vec::new(),
        }
    })
}

fn take_all(reader: &mut Reader) -> Vec<Stored> {
    let mut all = Vec::new();
    loop {
        let more = take(reader, 1000);
        if more.is_empty() {
            return all;
        }
        all.extend(more);
    }
}

fn seqs(records: &[Stored]) -> Vec<u64> {
    records.iter().map(|record| record.message.id.seq).collect()
}

pub(super) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not come true");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A store that waits for permission before it commits, and fails on command.
struct Faulty {
    inner: Sqlite,
    control: Arc<Control>,
}

#[derive(Default)]
pub(super) struct Control {
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Control {
    pub(super) fn hold(&self, hold: bool) {
        self.state.lock().0 = hold;
        self.changed.notify_all();
    }

    pub(super) fn fail(&self, fail: bool) {
        self.state.lock().1 = fail;
    }

    fn pass(&self) -> rusqlite::Result<()> {
        let mut state = self.state.lock();
        self.changed.wait_while(&mut state, |(hold, _)| *hold);
        if state.1 {
            let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_FULL);
            return Err(rusqlite::Error::SqliteFailure(code, None));
        }
        Ok(())
    }
}

impl Store for Faulty {
    fn commit(&mut self, commit: &Commit<'_>) -> rusqlite::Result<bool> {
        self.control.pass()?;
        self.inner.commit(commit)
    }
    fn row(&mut self, table: Table, position: u64) -> rusqlite::Result<Option<(RowHead, Bytes)>> {
        self.inner.row(table, position)
    }
    fn head(&mut self, table: Table, position: u64) -> rusqlite::Result<Option<RowHead>> {
        self.inner.head(table, position)
    }
    fn probe(&mut self) -> rusqlite::Result<()> {
        self.control.pass()?;
        self.inner.probe()
    }
    fn checkpoint(&mut self, truncate: bool) -> rusqlite::Result<()> {
        self.inner.checkpoint(truncate)
    }
    fn use_reserve(&mut self) {
        self.inner.use_reserve();
    }
    fn restore_reserve(&mut self) -> rusqlite::Result<u64> {
        self.inner.restore_reserve()
    }
}

pub(super) fn open_faulty(dir: &Path, config: Config, sinks: Vec<SinkConfig>) -> (Spool, Arc<Control>) {
    let (inner, found) = Sqlite::open(dir, &config, &sinks).unwrap();
    let control = Arc::new(Control::default());
    let store = Faulty { inner, control: Arc::clone(&control) };
    (Spool::start(dir, config, sinks, Box::new(store), found).unwrap(), control)
}

// ---- acknowledgement ----

#[test]
fn a_message_is_acknowledged_and_readable_only_after_its_commit() {
    let dir = tempfile::tempdir().unwrap();
    let (spool, control) = open_faulty(dir.path(), Config::default(), vec![sink("a", Delivery::Disk)]);
    let id = spool.sink("a").unwrap();
    let mut reader = spool.reader(id);
    append(&spool, &[id], &message(1, 1, "first")).unwrap();
    control.hold(true);
    let (completion, answer) = answers();
    let pending = spool.append(&message(1, 2, "second"), &[id], Some((completion, 2)), 3).unwrap();
    assert_eq!(pending, Accepted::Pending);
    assert!(answer.recv_timeout(Duration::from_millis(200)).is_err());
    assert_eq!(seqs(&take_all(&mut reader)), [1]);
    control.hold(false);
    let receipt = Receipt { id: MessageId { epoch: 1, seq: 2 }, receivers: 3 };
    assert_eq!(answer.recv_timeout(PATIENCE).unwrap(), (2, Ok(receipt)));
    assert_eq!(seqs(&take_all(&mut reader)), [2]);
}

#[test]
fn a_failed_commit_refuses_its_messages_and_the_spool_recovers() {
    let dir = tempfile::tempdir().unwrap();
    let sinks = vec![sink("disk", Delivery::Disk), sink("memory", Delivery::Memory)];
    let (spool, control) = open_faulty(dir.path(), Config::default(), sinks);
    let (disk, memory) = (spool.sink("disk").unwrap(), spool.sink("memory").unwrap());
    append(&spool, &[disk], &message(1, 1, "kept")).unwrap();
    control.fail(true);
    // In one commit: one that is accepted on receipt, one that goes to both.
    control.hold(true);
    let first = append(&spool, &[memory], &message(1, 2, "on receipt"));
    assert!(first.is_ok());
    let (completion, answer) = answers();
    spool.append(&message(1, 3, "refused"), &[disk, memory], Some((completion, 3)), 1).unwrap();
    append(&spool, &[memory], &message(1, 4, "on receipt")).unwrap();
    control.hold(false);
    let (_, outcome) = answer.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(outcome, Err(Reject::Full { limit: "spool", .. })), "{outcome:?}");
    assert!(matches!(spool.healthy(), Err(Unhealthy::Failing { .. })));
    assert!(matches!(append(&spool, &[disk], &message(1, 5, "refused")), Err(Reject::Full { .. })));
    // Reading and the memory class go on.
    assert_eq!(seqs(&take_all(&mut spool.reader(disk))), [1]);
    append(&spool, &[memory], &message(1, 6, "on receipt")).unwrap();
    control.fail(false);
    eventually("recovery", || spool.healthy().is_ok());
    append(&spool, &[disk], &message(1, 7, "after")).unwrap();
    assert_eq!(seqs(&take_all(&mut spool.reader(disk))), [1, 7]);
    assert_eq!(seqs(&take_all(&mut spool.reader(memory))), [2, 4, 6]);
    spool.close();
    drop(spool);
    let spool = open(dir.path(), vec![sink("memory", Delivery::Memory), sink("disk", Delivery::Disk)]);
    assert_eq!(seqs(&take_all(&mut spool.reader(spool.sink("disk").unwrap()))), [1, 7]);
    assert_eq!(seqs(&take_all(&mut spool.reader(spool.sink("memory").unwrap()))), [2, 4, 6]);
}

#[test]
fn a_full_disk_refuses_keeps_what_it_has_and_recovers_as_it_drains() {
    let dir = tempfile::tempdir().unwrap();
    let sinks = vec![sink("a", Delivery::Disk)];
    let (mut store, found) = Sqlite::open(dir.path(), &Config::default(), &sinks).unwrap();
    store.limit_pages(120);
    let spool = Spool::start(dir.path(), Config::default(), sinks, Box::new(store), found).unwrap();
    let id = spool.sink("a").unwrap();
    let mut accepted = Vec::new();
    for seq in 0..200 {
        match append(&spool, &[id], &message(1, seq, vec![7; 8000])) {
            Ok(_) => accepted.push(seq),
            Err(reject) => {
                assert!(matches!(reject, Reject::Full { limit: "spool", .. }));
                break;
            }
        }
    }
    assert!(accepted.len() > 10 && accepted.len() < 60, "{}", accepted.len());
    assert!(spool.healthy().is_err());
    let mut reader = spool.reader(id);
    let batch = block_on(reader.next_batch(1000, 1 << 20, Duration::ZERO)).unwrap();
    assert_eq!(seqs(&batch.records), accepted);
    reader.done(batch.cursor);
    eventually("recovery", || {
        spool.healthy().is_ok() && append(&spool, &[id], &message(1, 999, vec![7; 8000])).is_ok()
    });
    assert_eq!(seqs(&take_all(&mut reader)).last(), Some(&999));
}

#[test]
fn sixty_four_clients_share_commits() {
    let dir = tempfile::tempdir().unwrap();
    let spool = open(dir.path(), vec![sink("a", Delivery::Disk)]);
    let id = spool.sink("a").unwrap();
    let (completion, answer) = answers();
    let mut outstanding = 64;
    for seq in 0..64 {
        spool.append(&message(1, seq, vec![1; 200]), &[id], Some((completion.clone(), seq)), 1).unwrap();
    }
    let mut next = 64;
    while outstanding > 0 {
        let (_, outcome) = answer.recv_timeout(PATIENCE).unwrap();
        outcome.unwrap();
        if next < 2000 {
            spool.append(&message(1, next, vec![1; 200]), &[id], Some((completion.clone(), next)), 1).unwrap();
            next += 1;
        } else {
            outstanding -= 1;
        }
    }
    let rows = rusqlite::Connection::open(dir.path().join("spool.db")).unwrap();
    let rows: u32 = rows.query_row("SELECT count(*) FROM queue_1", [], |row| row.get(0)).unwrap();
    assert!(rows < 400, "2000 messages took {rows} commits");
}

// ---- restart ----

#[test]
fn a_restart_keeps_order_ids_and_cursor_and_counts_the_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let sinks = || vec![sink("a", Delivery::Disk), sink("b", Delivery::Os)];
    let spool = open(dir.path(), sinks());
    assert_eq!(spool.epoch(), 1);
    let (a, b) = (spool.sink("a").unwrap(), spool.sink("b").unwrap());
    let sent: Vec<Message> = (0..50).map(|seq| message(1, seq, format!("{seq}"))).collect();
    for message in &sent {
        append(&spool, &[a, b], message).unwrap();
    }
    let mut reader = spool.reader(a);
    let first = take(&mut reader, 20);
    reader.done(first.last().unwrap().cursor);
    drop(reader);
    drop(spool);

    let spool = open(dir.path(), sinks());
    assert_eq!(spool.epoch(), 2);
    let stats = spool.stats();
    assert_eq!((stats[0].queued_records, stats[0].delivered, stats[0].appended), (30, 20, 50));
    assert_eq!(stats[1].queued_records, 50);
    assert!(stats[1].queued_bytes > 50 * 20);
    assert_eq!(stats[1].oldest_ms, Some(sent[0].ingested_ms));
    let rest: Vec<Message> = take_all(&mut spool.reader(a)).into_iter().map(|r| r.message).collect();
    assert_eq!(rest, sent[20..]);
    assert_eq!(take_all(&mut spool.reader(b)).len(), 50);
    assert_eq!(inspect(dir.path()).unwrap().sinks[0].queued_records, 30);
}

#[test]
fn opening_does_not_depend_on_how_much_is_queued() {
    let dir = tempfile::tempdir().unwrap();
    let spool = open(dir.path(), vec![sink("a", Delivery::Os)]);
    let id = spool.sink("a").unwrap();
    let mut seq = 0;
    while seq < 100_000 {
        match spool.append(&message(1, seq, vec![0; 100]), &[id], None, 1) {
            Ok(_) => seq += 1,
            Err(Reject::Full { .. }) => std::thread::sleep(Duration::from_millis(1)),
            Err(other) => panic!("{other}"),
        }
    }
    drop(spool);
    let start = Instant::now();
    let spool = open(dir.path(), vec![sink("a", Delivery::Os)]);
    assert_eq!(spool.stats()[0].queued_records, 100_000);
    // A scan of 12 MB with decoding takes far longer in this build.
    assert!(start.elapsed() < Duration::from_millis(300), "{:?}", start.elapsed());
    assert_eq!(seqs(&take(&mut spool.reader(spool.sink("a").unwrap()), 3)), [0, 1, 2]);
}

/// The body of the child of the test below: appends until it is killed and prints what was acknowledged.
#[test]
fn child_that_appends_until_it_is_killed() {
    let Ok(dir) = std::env::var("TIDEGATE_SPOOL_CHILD") else { return };
    let spool = open(Path::new(&dir), vec![sink("a", Delivery::Disk), sink("b", Delivery::Os)]);
    let (a, b) = (spool.sink("a").unwrap(), spool.sink("b").unwrap());
    let (completion, answer) = answers();
    let epoch = spool.epoch();
    for seq in 0..32 {
        spool.append(&message(epoch, seq, vec![3; 500]), &[a, b], Some((completion.clone(), seq)), 1).unwrap();
    }
    for next in 32.. {
        let (token, outcome) = answer.recv().unwrap();
        outcome.unwrap();
        println!("acked {epoch} {token}");
        spool.append(&message(epoch, next, vec![3; 500]), &[a, b], Some((completion.clone(), next)), 1).unwrap();
    }
}

#[test]
fn nothing_acknowledged_is_lost_when_the_process_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let mut acked = std::collections::BTreeSet::new();
    for round in 0..6u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "spool::tests::child_that_appends_until_it_is_killed", "--nocapture"])
            .env("TIDEGATE_SPOOL_CHILD", dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut seen = 0;
        for line in lines.map_while(Result::ok) {
            let Some(ids) = line.split("acked ").nth(1) else { continue };
            let mut ids = ids.split(' ').map(|number| number.parse::<u64>().unwrap());
            acked.insert((ids.next().unwrap(), ids.next().unwrap()));
            seen += 1;
            if seen == 40 + 97 * round {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(seen >= 40);
    }
    let spool = open(dir.path(), vec![sink("a", Delivery::Disk), sink("b", Delivery::Os)]);
    for name in ["a", "b"] {
        let found = take_all(&mut spool.reader(spool.sink(name).unwrap()));
        let ids: Vec<(u64, u64)> = found.iter().map(|r| (u64::from(r.message.id.epoch), r.message.id.seq)).collect();
        assert!(ids.is_sorted(), "order is kept");
        let ids: std::collections::BTreeSet<_> = ids.into_iter().collect();
        let lost: Vec<_> = acked.difference(&ids).collect();
        assert!(lost.is_empty(), "{} of {} acknowledged are lost", lost.len(), acked.len());
    }
}

// ---- limits ----

#[test]
fn a_queue_that_refuses_says_full_and_takes_again_when_it_drains() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = sink("a", Delivery::Disk);
    config.queue.bytes_max = ByteSize(20_000);
    let spool = open(dir.path(), vec![config]);
    let id = spool.sink("a").unwrap();
    let taken = (0..100).take_while(|&seq| append(&spool, &[id], &message(1, seq, vec![0; 1000])).is_ok()).count();
    assert!((15..20).contains(&taken), "{taken}");
    assert!(matches!(
        append(&spool, &[id], &message(1, 100, vec![0; 1000])),
        Err(Reject::Full { limit: "queue.bytes_max", .. })
    ));
    assert!(matches!(
        append(&spool, &[id], &message(1, 100, vec![0; 20_001])),
        Err(Reject::TooLarge { limit: "queue.bytes_max", bytes_max: 20_000 })
    ));
    let mut reader = spool.reader(id);
    let records = take(&mut reader, 10);
    reader.done(records[9].cursor);
    append(&spool, &[id], &message(1, 101, vec![0; 1000])).unwrap();
    assert!(spool.ledger(10).unwrap().is_empty());
}

#[test]
fn the_oldest_are_dropped_into_the_ledger() {
    let dir = tempfile::tempdir().unwrap();
    let config = || {
        let mut config = sink("a", Delivery::Disk);
        config.queue.bytes_max = ByteSize(100_000);
        config.queue.when_full = WhenFull::DropOldest;
        config
    };
    let spool = open(dir.path(), vec![config()]);
    let id = spool.sink("a").unwrap();
    for seq in 0..300 {
        append(&spool, &[id], &message(1, seq, vec![0; 1000])).unwrap();
    }
    let stats = &spool.stats()[0];
    assert!(stats.queued_bytes <= 100_000, "{stats:?}");
    assert!(stats.queued_records >= 80);
    let left = seqs(&take_all(&mut spool.reader(id)));
    assert_eq!(left, (300 - stats.queued_records..300).collect::<Vec<_>>());
    assert_eq!(stats.dropped, left[0]);
    eventually("ledger", || {
        let ledger = spool.ledger(100).unwrap();
        let lost: u64 = ledger.iter().map(|loss| loss.records).sum();
        lost == left[0]
            && ledger.iter().all(|loss| loss.reason == Reason::QueueFull && loss.sink == "a" && loss.epoch == 1)
            && ledger.iter().find(|loss| loss.device == "d0").is_some_and(|loss| loss.seq_first == 0)
    });
    drop(spool);
    let spool = open(dir.path(), vec![config()]);
    assert_eq!(spool.stats()[0].dropped, left[0]);
    assert_eq!(seqs(&take_all(&mut spool.reader(id))), left);
}

#[test]
fn the_old_expire_into_the_ledger_but_not_what_was_stamped_before_the_clock_was_set() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = sink("a", Delivery::Disk);
    config.queue.age_max = Age::from_secs(3600);
    let spool = open(dir.path(), vec![config]);
    let id = spool.sink("a").unwrap();
    let old = Message { ingested_ms: writer::now_ms() - 3_700_000, ..message(1, 1, "old") };
    append(&spool, &[id], &old).unwrap();
    append(&spool, &[id], &message(1, 2, "new")).unwrap();
    eventually("expiry", || spool.stats()[0].dropped == 1);
    let unset = Message { ingested_ms: 5_000, ..message(1, 3, "1970") };
    append(&spool, &[id], &unset).unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(seqs(&take_all(&mut spool.reader(id))), [2, 3]);
    eventually("ledger", || {
        spool.ledger(9).unwrap().iter().any(|loss| loss.reason == Reason::Expired && loss.records == 1)
    });
}

#[test]
fn the_inbox_is_bounded_while_the_disk_is_slow() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config { pending_bytes_max: 65_536, ..Config::default() };
    let (spool, control) = open_faulty(dir.path(), config, vec![sink("a", Delivery::Disk)]);
    let id = spool.sink("a").unwrap();
    control.hold(true);
    let (completion, answer) = answers();
    let mut pending = 0;
    let reject = loop {
        match spool.append(&message(1, pending, vec![0; 1000]), &[id], Some((completion.clone(), pending)), 1) {
            Ok(_) => pending += 1,
            Err(reject) => break reject,
        }
        assert!(pending < 1000);
    };
    assert!(matches!(reject, Reject::Full { limit: "spool.pending_bytes_max", .. }), "{reject:?}");
    control.hold(false);
    for _ in 0..pending {
        answer.recv_timeout(PATIENCE).unwrap().1.unwrap();
    }
    append(&spool, &[id], &message(1, pending, vec![0; 1000])).unwrap();
}

#[test]
fn memory_class_is_never_written_when_the_sink_is_quick_and_spilled_when_it_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config { spill_after_ms: 400, ..Config::default() };
    let spool = Spool::open(dir.path(), config, vec![sink("m", Delivery::Memory)]).unwrap();
    let id = spool.sink("m").unwrap();
    let mut reader = spool.reader(id);
    let rows = || -> u32 {
        let connection = rusqlite::Connection::open(dir.path().join("spool.db")).unwrap();
        connection.query_row("SELECT count(*) FROM queue_1", [], |row| row.get(0)).unwrap()
    };
    assert_eq!(spool.append(&message(1, 0, "quick"), &[id], None, 1), Ok(Accepted::Done));
    let records = take(&mut reader, 10);
    reader.done(records[0].cursor);
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(rows(), 0);
    for seq in 1..20 {
        spool.append(&message(1, seq, "slow"), &[id], None, 1).unwrap();
    }
    eventually("spill", || rows() > 0);
    assert_eq!(seqs(&take_all(&mut reader)), (1..20).collect::<Vec<_>>());
    spool.append(&message(1, 20, "at shutdown"), &[id], None, 1).unwrap();
    drop(reader);
    drop(spool);
    let spool = open(dir.path(), vec![sink("m", Delivery::Memory)]);
    assert_eq!(seqs(&take_all(&mut spool.reader(id))), (1..21).collect::<Vec<_>>());
}

#[test]
fn a_sink_behind_its_memory_reads_the_disk_and_then_memory_again() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config { memory_bytes_per_sink_max: 65_536, ..Config::default() };
    let spool = Spool::open(dir.path(), config, vec![sink("a", Delivery::Disk)]).unwrap();
    let id = spool.sink("a").unwrap();
    for seq in 0..300 {
        append(&spool, &[id], &message(1, seq, vec![0; 1000])).unwrap();
    }
    let mut reader = spool.reader(id);
    let batch = block_on(reader.next_batch(10, 1 << 20, Duration::ZERO)).unwrap();
    assert!(batch.replayed);
    assert_eq!(spool.stats()[0].state, SinkState::Behind);
    let mut found = seqs(&batch.records);
    found.extend(seqs(&take_all(&mut reader)));
    assert_eq!(found, (0..300).collect::<Vec<_>>());
    assert_eq!(spool.stats()[0].state, SinkState::Live);
    append(&spool, &[id], &message(1, 300, "live")).unwrap();
    let batch = block_on(reader.next_batch(10, 1 << 20, Duration::ZERO)).unwrap();
    assert!(!batch.replayed);
    reader.done(batch.cursor);
    assert_eq!(spool.stats()[0].state, SinkState::Empty);
    assert_eq!(spool.stats()[0].queued_bytes, 0);
}

#[test]
fn a_batch_respects_its_limits_and_its_linger_and_survives_being_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let spool = open(dir.path(), vec![sink("a", Delivery::Memory)]);
    let id = spool.sink("a").unwrap();
    let mut reader = spool.reader(id);
    for seq in 0..7 {
        spool.append(&message(1, seq, vec![0; 100]), &[id], None, 1).unwrap();
    }
    // Whoever lingers is woken by the number of records, not by their bytes: the deadline is for that.
    eventually("all are there", || reader.appended() == 7);
    block_on(async {
        let long = Duration::from_secs(600);
        assert_eq!(reader.next_batch(3, 1 << 20, long).await.unwrap().records.len(), 3);
        assert_eq!(reader.next_batch(100, 250, long).await.unwrap().records.len(), 2);
        // Larger than the limit alone: still comes, alone.
        assert_eq!(reader.next_batch(100, 1, long).await.unwrap().records.len(), 1);
        let dropped = tokio::time::timeout(Duration::from_millis(50), reader.next_batch(100, 1 << 20, long)).await;
        assert!(dropped.is_err());
        let batch = reader.next_batch(100, 1 << 20, Duration::from_millis(20)).await.unwrap();
        assert_eq!(seqs(&batch.records), [6]);
        reader.rewind();
        let all = reader.next_batch(100, 1 << 20, Duration::ZERO).await.unwrap();
        assert_eq!(seqs(&all.records), (0..7).collect::<Vec<_>>());
    });
}

#[test]
fn refused_by_the_upstream_for_good_is_in_the_ledger() {
    let dir = tempfile::tempdir().unwrap();
    let spool = open(dir.path(), vec![sink("a", Delivery::Disk)]);
    let id = spool.sink("a").unwrap();
    append(&spool, &[id], &message(1, 9, "poison")).unwrap();
    let mut reader = spool.reader(id);
    let records = take(&mut reader, 1);
    reader.lose(&records, Reason::Rejected);
    reader.done(records[0].cursor);
    eventually("ledger", || !spool.ledger(9).unwrap().is_empty());
    let loss = spool.ledger(9).unwrap().remove(0);
    assert_eq!((loss.reason, loss.device.as_str(), loss.seq_first, loss.records), (Reason::Rejected, "d0", 9, 1));
    assert_eq!(spool.stats()[0].delivered, 0);
}

#[test]
fn a_sink_that_left_the_configuration_is_kept_until_it_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let spool = open(dir.path(), vec![sink("old", Delivery::Disk)]);
    append(&spool, &[spool.sink("old").unwrap()], &message(1, 1, "x")).unwrap();
    drop(spool);
    let spool = open(dir.path(), vec![sink("new", Delivery::Disk)]);
    assert!(spool.sink("old").is_none());
    let state = |spool: &Spool| spool.stats().iter().find(|s| s.name == "old").map(|s| (s.state, s.queued_records));
    assert_eq!(state(&spool), Some((SinkState::Orphaned, 1)));
    assert!(matches!(spool.drop_sink("older"), Err(Error::NoSuchSink { .. })));
    assert_eq!(spool.drop_sink("old").unwrap(), 1);
    assert_eq!(spool.ledger(9).unwrap()[0].reason, Reason::Dropped);
    drop(spool);
    let spool = open(dir.path(), vec![sink("new", Delivery::Disk)]);
    assert_eq!(state(&spool), None);
}

#[test]
fn the_ledger_is_bounded_and_keeps_its_sums() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = sink("a", Delivery::Disk);
    config.queue.age_max = Age::from_secs(60);
    let spool = Spool::open(dir.path(), Config { ledger_rows_max: 100, ..Config::default() }, vec![config]).unwrap();
    let id = spool.sink("a").unwrap();
    for seq in 0..250u64 {
        let device = DeviceId::parse(&format!("device-{seq}")).unwrap();
        let mut old = Message { ingested_ms: writer::now_ms() - 100_000, ..message(1, seq, "x") };
        old.origin.device = Some(device);
        let _ = spool.append(&old, &[id], None, 1);
        if seq % 60 == 59 {
            eventually("expiry", || spool.stats()[0].queued_records == 0);
        }
    }
    eventually("sums", || spool.ledger(1000).unwrap().iter().map(|loss| loss.records).sum::<u64>() == 250);
    let ledger = spool.ledger(1000).unwrap();
    assert!(ledger.len() <= 100, "{}", ledger.len());
    assert!(ledger.iter().any(|loss| loss.device == SEVERAL && loss.records > 100));
}

// ---- damage ----

#[test]
fn what_is_not_a_spool_is_left_alone_with_a_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("spool.db");
    let fail = || Spool::open(dir.path(), Config::default(), vec![]).err().unwrap();
    std::fs::write(&path, vec![b'x'; 8192]).unwrap();
    assert!(matches!(fail(), Error::NotASpool { .. }));
    assert_eq!(std::fs::read(&path).unwrap(), vec![b'x'; 8192]);
    std::fs::remove_file(&path).unwrap();
    let other = rusqlite::Connection::open(&path).unwrap();
    other.execute_batch("CREATE TABLE somebody (elses)").unwrap();
    drop(other);
    assert!(matches!(fail(), Error::NotASpool { .. }));
    std::fs::remove_file(&path).unwrap();
    drop(open(dir.path(), vec![]));
    let ours = rusqlite::Connection::open(&path).unwrap();
    ours.execute_batch("PRAGMA user_version = 9").unwrap();
    drop(ours);
    assert!(matches!(fail(), Error::TooNew { version: 9, .. }));
}

#[test]
fn a_damaged_file_is_a_clear_error_and_is_not_changed() {
    let dir = tempfile::tempdir().unwrap();
    let spool = open(dir.path(), vec![sink("a", Delivery::Disk)]);
    append(&spool, &[spool.sink("a").unwrap()], &message(1, 1, "x")).unwrap();
    drop(spool);
    let path = dir.path().join("spool.db");
    let mut data = std::fs::read(&path).unwrap();
    for byte in &mut data[100..4096] {
        *byte = 0xA5;
    }
    std::fs::write(&path, &data).unwrap();
    let error = Spool::open(dir.path(), Config::default(), vec![sink("a", Delivery::Disk)]).err().unwrap();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), data);
}

#[test]
fn a_damaged_row_is_set_aside_and_the_rest_is_delivered() {
    let dir = tempfile::tempdir().unwrap();
    let spool = open(dir.path(), vec![sink("a", Delivery::Disk)]);
    let id = spool.sink("a").unwrap();
    for seq in 0..5 {
        append(&spool, &[id], &message(1, seq, "payload")).unwrap();
    }
    drop(spool);
    let path = dir.path().join("spool.db");
    let connection = rusqlite::Connection::open(&path).unwrap();
    for position in [0, 2] {
        let sql = "UPDATE queue_1 SET data = CAST(substr(data, 1, 20) || x'ff' || substr(data, 22) AS BLOB) WHERE position = ?1";
        assert_eq!(connection.execute(sql, [position]).unwrap(), 1);
    }
    drop(connection);
    let spool = open(dir.path(), vec![sink("a", Delivery::Disk)]);
    let mut reader = spool.reader(id);
    let records = take_all(&mut reader);
    assert_eq!(seqs(&records), [1, 3, 4]);
    eventually("ledger", || {
        let ledger = spool.ledger(9).unwrap();
        ledger.iter().map(|loss| loss.records).sum::<u64>() == 2 && ledger.iter().all(|l| l.reason == Reason::Damaged)
    });
    reader.done(records[2].cursor);
    let stats = spool.stats().remove(0);
    assert_eq!((stats.queued_records, stats.queued_bytes, stats.delivered, stats.dropped), (0, 0, 3, 2));
    drop(reader);
    drop(spool);
    let connection = rusqlite::Connection::open(&path).unwrap();
    let kept: u32 = connection.query_row("SELECT count(*) FROM damaged", [], |row| row.get(0)).unwrap();
    assert_eq!(kept, 2);
    drop(connection);
    assert_eq!(open(dir.path(), vec![sink("a", Delivery::Disk)]).stats()[0].queued_records, 0);
}

#[test]
fn a_directory_that_cannot_be_written_is_a_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    assert!(matches!(Spool::open(&missing, Config::default(), vec![]), Err(Error::NotWritable { .. })));
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o500)).unwrap();
    if std::fs::write(dir.path().join("root"), "writes anywhere").is_ok() {
        return;
    }
    assert!(matches!(Spool::open(dir.path(), Config::default(), vec![]), Err(Error::NotWritable { .. })));
}

#[test]
fn two_spools_on_one_directory_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let spool = open(dir.path(), vec![]);
    assert!(matches!(Spool::open(dir.path(), Config::default(), vec![]), Err(Error::InUse { .. })));
    drop(spool);
    open(dir.path(), vec![]);
}

#[test]
fn the_file_is_for_its_owner_only() {
    let dir = tempfile::tempdir().unwrap();
    let _spool = open(dir.path(), vec![]);
    for name in ["spool.db", "spool.db-wal"] {
        assert_eq!(std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
    }
}

#[test]
fn after_close_messages_are_refused_and_readers_end() {
    let dir = tempfile::tempdir().unwrap();
    let spool = open(dir.path(), vec![sink("a", Delivery::Disk)]);
    let id = spool.sink("a").unwrap();
    append(&spool, &[id], &message(1, 1, "x")).unwrap();
    let mut reader = spool.reader(id);
    spool.close();
    assert_eq!(append(&spool, &[id], &message(1, 2, "y")), Err(Reject::ShuttingDown));
    block_on(async {
        assert_eq!(reader.next_batch(9, 999, Duration::ZERO).await.unwrap().records.len(), 1);
        assert!(reader.next_batch(9, 999, Duration::ZERO).await.is_none());
    });
    assert_eq!(spool.healthy(), Err(Unhealthy::Stopped));
}

// ---- model ----

#[derive(Clone, Debug)]
enum Step {
    /// To the first, the second, or both sinks; waits for the answer or not.
    Append {
        sinks: u8,
        bytes: usize,
        wait: bool,
    },
    Take {
        sink: usize,
        records_max: usize,
    },
    /// Acknowledges so many of the records that are out.
    Done {
        sink: usize,
        records: usize,
    },
    Rewind {
        sink: usize,
    },
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1u8..4, 0usize..3000, any::<bool>()).prop_map(|(sinks, bytes, wait)| Step::Append { sinks, bytes, wait }),
        3 => (0usize..2, 1usize..20).prop_map(|(sink, records_max)| Step::Take { sink, records_max }),
        3 => (0usize..2, 1usize..20).prop_map(|(sink, records)| Step::Done { sink, records }),
        1 => (0usize..2).prop_map(|sink| Step::Rewind { sink }),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// Whatever is done to it, a sink is a list: what was appended, in order, from the first that is not acknowledged.
    #[test]
    fn a_sink_is_a_list_with_a_cursor(steps in proptest::collection::vec(step(), 1..60), memory in any::<bool>()) {
        let dir = tempfile::tempdir().unwrap();
        let second = if memory { Delivery::Memory } else { Delivery::Os };
        let config = Config { memory_bytes_per_sink_max: 1 << 16, ack_delay_ms: 1, spill_after_ms: 3, ..Config::default() };
        let start = || Spool::open(dir.path(), config.clone(), vec![sink("a", Delivery::Disk), sink("b", second)]).unwrap();
        let mut spool = start();
        let ids = [spool.sink("a").unwrap(), spool.sink("b").unwrap()];
        let mut readers = ids.map(|id| spool.reader(id));
        let mut queued: [VecDeque<u64>; 2] = Default::default();
        let mut out: [VecDeque<Stored>; 2] = Default::default();
        let mut seq = 0;
        for step in steps {
            match step {
                Step::Append { sinks, bytes, wait } => {
                    seq += 1;
                    let to: Vec<usize> = (0..2).filter(|sink| sinks & (1 << sink) != 0).collect();
                    let to_ids: Vec<SinkId> = to.iter().map(|&sink| ids[sink]).collect();
                    let message = message(1, seq, vec![seq as u8; bytes]);
                    let taken = if wait {
                        append(&spool, &to_ids, &message).is_ok()
                    } else {
                        spool.append(&message, &to_ids, None, 0).is_ok()
                    };
                    // Only a full memory lane may refuse here.
                    prop_assert!(taken || memory);
                    if taken {
                        for sink in to {
                            queued[sink].push_back(seq);
                        }
                    }
                }
                Step::Take { sink, records_max } => {
                    if queued[sink].len() > out[sink].len() {
                        let batch = block_on(readers[sink].next_batch(records_max, 1 << 20, Duration::ZERO)).unwrap();
                        for record in batch.records {
                            prop_assert_eq!(Some(&record.message.id.seq), queued[sink].get(out[sink].len()));
                            out[sink].push_back(record);
                        }
                    }
                }
                Step::Done { sink, records } => {
                    let mut cursor = None;
                    for _ in 0..records.min(out[sink].len()) {
                        cursor = out[sink].pop_front().map(|record| record.cursor);
                        queued[sink].pop_front();
                    }
                    if let Some(cursor) = cursor {
                        readers[sink].done(cursor);
                    }
                }
                Step::Rewind { sink } => {
                    readers[sink].rewind();
                    out[sink].clear();
                }
                Step::Restart => {
                    drop(readers);
                    drop(spool);
                    spool = start();
                    readers = ids.map(|id| spool.reader(id));
                    out = Default::default();
                }
            }
        }
        drop(spool);
        drop(readers);
        let spool = start();
        for sink in 0..2 {
            let found = take_all(&mut spool.reader(ids[sink]));
            prop_assert_eq!(seqs(&found), Vec::from(queued[sink].clone()));
            prop_assert_eq!(spool.stats()[sink].queued_records, queued[sink].len() as u64);
            if queued[sink].is_empty() {
                prop_assert_eq!(spool.stats()[sink].queued_bytes, 0);
            }
        }
    }
}

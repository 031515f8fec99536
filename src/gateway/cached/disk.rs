//! The second level: one file an entry, in a folder of the data folder, so that answers survive a restart.
//!
//! A file is written beside its place, put there by renaming, and never synced: a cache may be lost, and an SD card should not be worn for it. What is
//! damaged is found by its checksum when it is read, and removed. Bounded in bytes, each file counted by whole blocks; what has not been used for longest
//! goes first, after a restart what was written first.
//!
//! Files are read and written by one thread; where its queue is full, a read finds nothing and a write is left out.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use parking_lot::Mutex;
use portable_atomic::{AtomicBool, Ordering};
use tokio::sync::oneshot;

use super::store::Memory;
use crate::cache::response::{Entry, Key};
use crate::gateway::wall_ms;

pub(super) struct Disk {
    files: Arc<Files>,
    jobs: Option<SyncSender<Job>>,
    worker: Option<JoinHandle<()>>,
    interval: Duration,
}

struct Files {
    folder: PathBuf,
    bytes_max: u64,
    index: Mutex<Index>,
    /// What was there at the start is known.
    is_scanned: AtomicBool,
    memory: Arc<Memory>,
}

#[derive(Default)]
struct Index {
    slots: BTreeMap<Key, Slot>,
    /// By last use.
    order: BTreeMap<u64, Key>,
    bytes: u64,
    turn: u64,
}

struct Slot {
    bytes: u64,
    turn: u64,
    /// When it was written and what, unless before the start.
    written: Option<(u64, u64)>,
    /// There has been a newer answer, which was not written for the card's sake: good for nothing until a restart.
    is_old: bool,
}

enum Job {
    Read { key: Key, seq: u64, now_ms: u64, reply: oneshot::Sender<Option<Entry>> },
    Write { entry: Arc<Entry>, now_ms: u64 },
}

impl Disk {
    /// `None` where the thread cannot be started. What is in the folder is found out behind it.
    pub(super) fn open(folder: PathBuf, bytes_max: u64, interval: Duration, memory: Arc<Memory>) -> Option<Disk> {
        let (index, is_scanned) = (Mutex::default(), AtomicBool::new(false));
        let files = Arc::new(Files { folder, bytes_max, index, is_scanned, memory });
        let (jobs, queue) = sync_channel(JOBS_MAX);
        let of_thread = files.clone();
        let worker = std::thread::Builder::new().name("tidegate-cache".into()).spawn(move || of_thread.work(&queue));
        let worker = worker.inspect_err(|error| tracing::warn!(%error, "no cache on disk: no thread for it")).ok()?;
        Some(Disk { files, jobs: Some(jobs), worker: Some(worker), interval })
    }

    /// An entry, older by the time it has been there.
    pub(super) async fn read(&self, key: Key, now_ms: u64) -> Option<Entry> {
        let is_there = self.files.index.lock().slots.get(&key).is_some_and(|slot| !slot.is_old);
        if !is_there && self.files.is_scanned.load(Ordering::Acquire) {
            return None;
        }
        let (reply, answer) = oneshot::channel();
        let seq = self.files.memory.seq();
        self.jobs.as_ref()?.try_send(Job::Read { key, seq, now_ms, reply }).ok()?;
        answer.await.ok()?
    }

    /// Writes an entry that is worth it: one that is of use for a while, and not the same anew or another of the same key so soon.
    pub(super) fn write(&self, entry: &Arc<Entry>, now_ms: u64) {
        if entry.terms.usable() < self.interval {
            return;
        }
        if let Some(slot) = self.files.index.lock().slots.get_mut(&entry.key)
            && let Some((at_ms, content)) = slot.written
            && Duration::from_millis(now_ms.saturating_sub(at_ms)) < self.interval
        {
            slot.is_old = content != content_of(entry);
            return;
        }
        if let Some(jobs) = &self.jobs {
            // A full queue: the disk is busy enough.
            let _ = jobs.try_send(Job::Write { entry: entry.clone(), now_ms });
        }
    }

    /// Removes every form of a page, or one.
    pub(super) fn remove(&self, from: Key, to: Key) {
        let keys: Vec<Key> = self.files.index.lock().slots.range(from..=to).map(|(key, _)| *key).collect();
        for key in keys {
            self.files.remove(key);
        }
    }

    /// Removes what `is_meant` by its URL, and gives back how many that were. Reads the head of every file.
    pub(super) fn purge(&self, is_meant: impl Fn(&str) -> bool) -> u64 {
        let keys: Vec<Key> = self.files.index.lock().slots.keys().copied().collect();
        let mut removed = 0;
        for key in keys {
            // What cannot be read is no loss.
            if self.files.url(key).is_none_or(|url| is_meant(&url)) {
                self.files.remove(key);
                removed += 1;
            }
        }
        removed
    }

    /// Bytes and files.
    pub(super) fn held(&self) -> (u64, u64) {
        let index = self.files.index.lock();
        (index.bytes, index.slots.len() as u64)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(worker) = self.worker.take() {
            // One that panicked has nothing more to write.
            let _ = worker.join();
        }
    }
}

impl Files {
    fn work(&self, queue: &Receiver<Job>) {
        if let Err(error) = self.scan() {
            tracing::warn!(folder = %self.folder.display(), %error, "no cache on disk");
        }
        self.is_scanned.store(true, Ordering::Release);
        let mut failing = false;
        while let Ok(job) = queue.recv() {
            match job {
                Job::Read { key, seq, now_ms, reply } => {
                    // Whoever asked may have gone.
                    let _ = reply.send(self.read(key, seq, now_ms));
                }
                Job::Write { entry, now_ms } => {
                    let written = self.write(&entry, now_ms);
                    if let (Err(error), false) = (&written, failing) {
                        tracing::warn!(folder = %self.folder.display(), %error, "an answer was not written into the cache");
                    }
                    failing = written.is_err();
                }
            }
        }
    }

    /// Finds what an earlier run has left.
    fn scan(&self) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let mut found: Vec<(SystemTime, Key, u64)> = Vec::new();
        for file in fs::read_dir(&self.folder)? {
            let file = file?;
            let Some(key) = file.file_name().to_str().and_then(key_of) else {
                // What a crash has left half written.
                fs::remove_file(file.path()).ok();
                continue;
            };
            let about = file.metadata()?;
            found.push((about.modified().unwrap_or(UNIX_EPOCH), key, about.len()));
        }
        found.sort_unstable_by_key(|(at, key, _)| (*at, *key));
        for (_, key, bytes) in found {
            if self.memory.has_invalid(key.page) {
                fs::remove_file(self.path(key)).ok();
                continue;
            }
            self.index.lock().put(key, bytes, None);
        }
        self.make_room();
        Ok(())
    }

    fn read(&self, key: Key, seq: u64, now_ms: u64) -> Option<Entry> {
        if self.index.lock().slots.get(&key).is_none_or(|slot| slot.is_old) {
            return None;
        }
        let bytes = fs::read(self.path(key)).map(Bytes::from).unwrap_or_default();
        match Entry::from_bytes(&bytes, key, now_ms, wall_ms()) {
            Ok(entry) => {
                self.index.lock().touch(key);
                entry.seq.store(seq, Ordering::Release);
                Some(entry)
            }
            Err(_) => {
                tracing::warn!(file = %self.path(key).display(), "a damaged file of the cache was removed");
                self.remove(key);
                None
            }
        }
    }

    fn write(&self, entry: &Entry, now_ms: u64) -> io::Result<()> {
        if !self.memory.is_valid(entry) {
            return Ok(());
        }
        let bytes = entry.to_bytes(now_ms, wall_ms());
        if blocks(bytes.len() as u64) > self.bytes_max {
            return Ok(());
        }
        let beside = self.folder.join("being-written");
        write_private(&beside, &bytes)?;
        fs::rename(&beside, self.path(entry.key))?;
        self.index.lock().put(entry.key, bytes.len() as u64, Some((now_ms, content_of(entry))));
        // Made invalid while it was written.
        if !self.memory.is_valid(entry) {
            self.remove(entry.key);
        }
        self.make_room();
        Ok(())
    }

    fn make_room(&self) {
        loop {
            let oldest = {
                let index = self.index.lock();
                if index.bytes <= self.bytes_max { None } else { index.order.first_key_value().map(|(_, key)| *key) }
            };
            let Some(key) = oldest else { return };
            self.remove(key);
        }
    }

    fn remove(&self, key: Key) {
        self.index.lock().take(key);
        // Gone is gone.
        fs::remove_file(self.path(key)).ok();
    }

    fn url(&self, key: Key) -> Option<String> {
        let mut head = Vec::new();
        fs::File::open(self.path(key)).ok()?.take(HEAD_BYTES).read_to_end(&mut head).ok()?;
        Entry::url_of(&head).ok().map(str::to_owned)
    }

    fn path(&self, key: Key) -> PathBuf {
        self.folder.join(format!("{:032x}-{:032x}", key.page, key.variant))
    }
}

impl Index {
    fn put(&mut self, key: Key, bytes: u64, written: Option<(u64, u64)>) {
        self.take(key);
        let bytes = blocks(bytes);
        self.turn += 1;
        self.bytes += bytes;
        self.order.insert(self.turn, key);
        self.slots.insert(key, Slot { bytes, turn: self.turn, written, is_old: false });
    }

    fn take(&mut self, key: Key) {
        if let Some(slot) = self.slots.remove(&key) {
            self.order.remove(&slot.turn);
            self.bytes = self.bytes.saturating_sub(slot.bytes);
        }
    }

    fn touch(&mut self, key: Key) {
        self.turn += 1;
        let turn = self.turn;
        if let Some(slot) = self.slots.get_mut(&key) {
            self.order.remove(&slot.turn);
            slot.turn = turn;
            self.order.insert(turn, key);
        }
    }
}

fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)
}

fn key_of(name: &str) -> Option<Key> {
    let (page, variant) = name.split_once('-')?;
    if page.len() != 32 || variant.len() != 32 {
        return None;
    }
    Some(Key { page: u128::from_str_radix(page, 16).ok()?, variant: u128::from_str_radix(variant, 16).ok()? })
}

/// Tells one answer from another; no secret and no proof.
fn content_of(entry: &Entry) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    entry.status.hash(&mut hasher);
    entry.body.hash(&mut hasher);
    hasher.finish()
}

fn blocks(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES).max(1) * BLOCK_BYTES
}

/// Reads and writes that wait for the thread.
const JOBS_MAX: usize = 256;
const BLOCK_BYTES: u64 = 4096;
/// A URL is shorter than a request's head.
const HEAD_BYTES: u64 = 64 << 10;

#[cfg(test)]
mod tests {
    use http::{HeaderMap, StatusCode};
    use portable_atomic::AtomicU64;

    use super::*;
    use crate::cache::response::Terms;

    fn entry(n: u128, body: &'static str) -> Arc<Entry> {
        let terms = Terms {
            fresh: Duration::from_secs(3600),
            while_revalidate: Duration::ZERO,
            if_error: Duration::ZERO,
            must_revalidate: false,
        };
        Arc::new(Entry {
            key: Key { page: n, variant: 1 },
            url: format!("http://g/{n}").into(),
            status: StatusCode::OK,
            headers: HeaderMap::new(),
            body: Bytes::from_static(body.as_bytes()),
            terms,
            age: Duration::ZERO,
            at_ms: 0,
            seq: AtomicU64::new(1),
            rest_until_ms: AtomicU64::new(0),
        })
    }

    fn disk(folder: &Path, bytes_max: u64) -> Disk {
        let memory = Arc::new(Memory::new(1 << 20));
        Disk::open(folder.join("cache"), bytes_max, Duration::from_secs(60), memory).unwrap()
    }

    /// After everything that was asked of the thread before.
    async fn body(disk: &Disk, n: u128) -> Option<Bytes> {
        let (reply, done) = oneshot::channel();
        let nothing = Job::Read { key: Key { page: 0, variant: 0 }, seq: 0, now_ms: 0, reply };
        disk.jobs.as_ref().unwrap().send(nothing).ok().unwrap();
        done.await.unwrap();
        disk.read(Key { page: n, variant: 1 }, 0).await.map(|entry| entry.body)
    }

    #[tokio::test]
    async fn what_was_kept_is_there_after_a_restart_and_damage_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let first = disk(folder.path(), 1 << 20);
        first.write(&entry(1, "one"), 0);
        first.write(&entry(2, "two"), 0);
        assert_eq!(body(&first, 1).await.as_deref(), Some(&b"one"[..]));
        drop(first);
        let files = folder.path().join("cache");
        let path = files.join(format!("{:032x}-{:032x}", 2, 1));
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, bytes).unwrap();
        fs::write(files.join("being-written"), "half").unwrap();
        let second = disk(folder.path(), 1 << 20);
        assert_eq!(body(&second, 1).await.as_deref(), Some(&b"one"[..]));
        assert_eq!(body(&second, 2).await, None);
        assert!(!path.exists() && !files.join("being-written").exists());
        assert_eq!(second.held(), (4096, 1));
    }

    #[tokio::test]
    async fn what_was_not_used_for_longest_makes_room() {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(folder.path(), 3 * 4096);
        for n in 1..=3 {
            disk.write(&entry(n, "x"), 0);
        }
        assert!(body(&disk, 1).await.is_some());
        disk.write(&entry(4, "x"), 0);
        assert!(body(&disk, 4).await.is_some());
        assert!(body(&disk, 2).await.is_none() && body(&disk, 1).await.is_some() && body(&disk, 3).await.is_some());
        assert_eq!(fs::read_dir(folder.path().join("cache")).unwrap().count(), 3);
    }

    #[tokio::test]
    async fn the_card_is_spared_and_an_old_answer_is_not_given_for_a_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(folder.path(), 1 << 20);
        disk.write(&entry(1, "old"), 0);
        assert!(body(&disk, 1).await.is_some());
        disk.write(&entry(1, "old"), 59_000);
        assert!(body(&disk, 1).await.is_some());
        disk.write(&entry(1, "new"), 59_000);
        assert_eq!(body(&disk, 1).await, None);
        disk.write(&entry(1, "new"), 60_000);
        assert_eq!(body(&disk, 1).await.as_deref(), Some(&b"new"[..]));
    }

    #[tokio::test]
    async fn what_is_purged_or_changed_is_gone_from_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(folder.path(), 1 << 20);
        for n in [1, 12, 2] {
            disk.write(&entry(n, "x"), 0);
        }
        assert!(body(&disk, 2).await.is_some());
        assert_eq!(disk.purge(|url| url.starts_with("http://g/1")), 2);
        assert!(body(&disk, 1).await.is_none() && body(&disk, 2).await.is_some());
        disk.remove(Key { page: 2, variant: 0 }, Key { page: 2, variant: u128::MAX });
        assert!(body(&disk, 2).await.is_none());
        assert_eq!(fs::read_dir(folder.path().join("cache")).unwrap().count(), 0);
    }
}

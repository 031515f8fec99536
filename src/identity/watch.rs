//! The thread behind identity: looks for changes of the registry, writes down used JWTs, forgets what has expired.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Shared;
use super::clock::Now;
use super::error::Error;
use super::registry::Registry;
use super::replay::{Replay, Used};
use super::snapshot::Snapshot;

/// Handle of the thread; it ends when this is dropped.
pub(super) struct Watch {
    look: Arc<Mutex<Look>>,
    used: Option<SyncSender<Used>>,
    thread: Option<JoinHandle<()>>,
}

/// The reading side of the registry.
struct Look {
    registry: Registry,
    data_version: i64,
}

impl Look {
    fn refresh(&mut self, shared: &Shared) -> Result<(), Error> {
        let data_version = self.registry.data_version()?;
        if data_version == self.data_version {
            return Ok(());
        }
        let mut devices = Snapshot::clone(&shared.devices.load());
        if self.registry.catch_up(&mut devices)? {
            tracing::info!(devices = devices.len(), revision = devices.revision, "registry changed");
            shared.devices.store(Arc::new(devices));
        }
        // Only now: a look that failed is repeated.
        self.data_version = data_version;
        Ok(())
    }
}

impl Watch {
    pub(super) fn start(shared: Arc<Shared>, registry: Registry, replay: Replay) -> Result<Self, Error> {
        // The first look repeats the one at opening, so that no change in between is lost.
        let look = Arc::new(Mutex::new(Look { registry, data_version: i64::MIN }));
        let (used, receiver) = sync_channel(USED_QUEUE_MAX);
        let thread = {
            let look = Arc::clone(&look);
            let work = move || run(&shared, &look, replay, &receiver);
            std::thread::Builder::new().name("identity".into()).spawn(work).map_err(Error::Thread)?
        };
        Ok(Watch { look, used: Some(used), thread: Some(thread) })
    }

    pub(super) fn refresh(&self, shared: &Shared) -> Result<(), Error> {
        self.look.lock().refresh(shared)
    }

    /// Has something used written down; never waits for the disk. When the thread is far behind, the set in memory alone remembers it, until a restart.
    pub(super) fn remember(&self, used: Used) {
        let Some(queue) = &self.used else { return };
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = queue.try_send(used) {
            tracing::warn!("used token not written down, disk is too slow");
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // The queue's end is the sign to finish; what is in it is written first.
        drop(self.used.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that watches the registry has panicked");
        }
    }
}

fn run(shared: &Shared, look: &Mutex<Look>, mut replay: Replay, used: &Receiver<Used>) {
    let mut trouble = Trouble::default();
    let mut next_look = Instant::now();
    let mut next_sweep = Instant::now() + SWEEP_INTERVAL;
    let mut next_write = Instant::now();
    loop {
        match used.recv_timeout(next_look.saturating_duration_since(Instant::now())) {
            Ok(first) => {
                // The first login after a pause is written at once; those of a crowd share a transaction.
                std::thread::sleep(next_write.saturating_duration_since(Instant::now()));
                let batch: Vec<Used> = std::iter::once(first).chain(used.try_iter().take(BATCH_MAX)).collect();
                trouble.note("used tokens not written down", replay.remember(&batch));
                next_write = Instant::now() + WRITE_INTERVAL;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let now = Instant::now();
        if now >= next_look {
            trouble.note("registry not readable, going on with what is known", look.lock().refresh(shared));
            next_look = now + Duration::from_millis(u64::from(shared.config.load().registry_poll_ms));
        }
        if now >= next_sweep {
            let now_both = Now::read();
            shared.used_jti.lock().forget_expired(now_both.unix_secs);
            shared.used_challenges.lock().forget_expired(u64::from(now_both.boot_secs));
            trouble.note("used tokens not forgotten", replay.forget_expired(now_both));
            next_sweep = now + SWEEP_INTERVAL;
        }
    }
}

/// Logs an error when it begins and then once a minute, not at every look.
#[derive(Default)]
struct Trouble {
    last_logged: Option<Instant>,
}

impl Trouble {
    fn note(&mut self, what: &'static str, outcome: Result<(), Error>) {
        let Err(error) = outcome else { return };
        if self.last_logged.is_none_or(|last| last.elapsed() >= Duration::from_secs(60)) {
            tracing::error!(%error, what, "identity is degraded");
            self.last_logged = Some(Instant::now());
        }
    }
}

/// What may wait to be written down.
const USED_QUEUE_MAX: usize = 4096;
const BATCH_MAX: usize = 1024;
/// Between two transactions: each costs some 90 us of CPU, as much as the signature that it is for.
const WRITE_INTERVAL: Duration = Duration::from_millis(20);
const SWEEP_INTERVAL: Duration = Duration::from_secs(30);

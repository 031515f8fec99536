//! The one place where tasks are spawned: tracked, cancelled together, and heard when they panic.
//!
//! Promises: a task that panics is logged and counted and takes nothing else with it; [`Tasks::drain`] returns by its deadline.
//! A task is told to end through [`Tasks::shutdown_token`] and ends by itself; what is left at the deadline is dropped with its runtime.
//! Deliberately not here: restarting. What must not end is a loop that does not end.

use std::future::Future;
use std::panic::PanicHookInfo;
use std::sync::Arc;
use std::time::Duration;

use portable_atomic::{AtomicU64, Ordering};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::telemetry;

/// Spawns on the runtime it is used on, and remembers what it spawned. Clones share everything.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    shutdown: CancellationToken,
    panics: Arc<AtomicU64>,
}

/// What a drain left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Tasks that did not end by the deadline.
    pub remaining: usize,
}

impl Tasks {
    /// Tasks that end when `shutdown` is cancelled.
    pub fn new(shutdown: CancellationToken) -> Self {
        Tasks { tracker: TaskTracker::new(), shutdown, panics: Arc::default() }
    }

    /// Runs `future` as a task of the current runtime. `name` is for the log of a panic.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn spawn<F>(&self, name: &'static str, future: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let panics = self.panics.clone();
        // The handle is not needed: the tracker counts the task, and the report is made while it unwinds.
        drop(self.tracker.spawn(async move {
            let _report = ReportPanic { name, panics };
            future.await;
        }));
    }

    /// Cancelled when everything is to end. A child of it may be cancelled alone.
    pub fn shutdown_token(&self) -> &CancellationToken {
        &self.shutdown
    }

    /// Tasks alive.
    pub fn len(&self) -> usize {
        self.tracker.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tracker.is_empty()
    }

    /// Tasks that panicked so far.
    pub fn panics(&self) -> u64 {
        self.panics.load(Ordering::Relaxed)
    }

    /// Tells every task to end and waits for them, at most for `deadline`.
    ///
    /// # Cancel safety
    /// May be dropped and called again.
    pub async fn drain(&self, deadline: Duration) -> Drained {
        self.shutdown.cancel();
        self.tracker.close();
        // A timeout is the value asked for here: the number left says the rest.
        let _ = tokio::time::timeout(deadline, self.tracker.wait()).await;
        Drained { remaining: self.tracker.len() }
    }
}

/// Dropped while its task unwinds, it reports; dropped at the end, it says nothing.
struct ReportPanic {
    name: &'static str,
    panics: Arc<AtomicU64>,
}

impl Drop for ReportPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.panics.fetch_add(1, Ordering::Relaxed);
            telemetry::meters().task_panics.increment(1);
            tracing::error!(task = self.name, "task panicked");
        }
    }
}

/// Sends panics to the log instead of to bare standard error. Call once, after the log is set up.
///
/// A formatted panic message may quote outside input, so it is withheld unless the operator asked for it with `RUST_BACKTRACE`.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|panic: &PanicHookInfo<'_>| {
        let wanted = std::env::var_os("RUST_BACKTRACE").is_some_and(|value| value != "0");
        let message = match (panic.payload().downcast_ref::<&'static str>(), panic.payload().downcast_ref::<String>()) {
            (Some(text), _) => text,
            (None, Some(text)) if wanted => text.as_str(),
            _ => "(withheld; set RUST_BACKTRACE=1)",
        };
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        let thread = std::thread::current().name().unwrap_or("unnamed").to_owned();
        let backtrace = wanted.then(|| std::backtrace::Backtrace::force_capture().to_string());
        tracing::error!(location, thread, message, backtrace, "panic");
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panicking_task_is_counted_and_its_neighbours_live() {
        let tasks = Tasks::default();
        let (tell, told) = tokio::sync::oneshot::channel();
        tasks.spawn("bad", async { panic!("on purpose") });
        tasks.spawn("good", async move {
            tokio::task::yield_now().await;
            tell.send(7).unwrap();
        });
        assert_eq!(told.await, Ok(7));
        assert_eq!(tasks.drain(Duration::from_secs(5)).await, Drained { remaining: 0 });
        assert_eq!(tasks.panics(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_tells_everyone_and_leaves_the_deaf_at_the_deadline() {
        let tasks = Tasks::default();
        let token = tasks.shutdown_token().clone();
        tasks.spawn("polite", async move { token.cancelled().await });
        tasks.spawn("deaf", std::future::pending());
        let began = tokio::time::Instant::now();
        assert_eq!(tasks.drain(Duration::from_secs(3)).await, Drained { remaining: 1 });
        assert_eq!(began.elapsed(), Duration::from_secs(3));
        assert_eq!(tasks.panics(), 0);
    }
}

//! `tidegate run`.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until};

use super::{Context, Exit, Failure};
use crate::{Running, StartError, tasks, telemetry};

pub fn run(context: &Context) -> Result<(), Failure> {
    let loaded = context.load()?;
    telemetry::install_logs(&loaded.config.telemetry).map_err(|error| Failure::input(error.to_string()))?;
    tasks::log_panics();
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(no_signals)?;
    // Before anything starts, so that a signal that comes early is not the end of the process.
    let mut signals = runtime.block_on(async { Signals::install() }).map_err(no_signals)?;
    let running = crate::start(loaded, context.inputs()?).map_err(|error| failed_start(&error))?;
    notify(&[sd_notify::NotifyState::Ready]);
    let died = runtime.block_on(signals.serve(&running));
    notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("stopping");
    let stopped = running.stop();
    if died || stopped.is_err() {
        return Err(Failure::fault("a thread of the gateway has died; its log says why")
            .help("what was acknowledged is on disk; please report this"));
    }
    tracing::info!("stopped");
    Ok(())
}

fn failed_start(error: &StartError) -> Failure {
    let exit = if error.can_retry() { Exit::Unavailable } else { Exit::Input };
    Failure::new(exit, error.to_string())
}

fn no_signals(error: std::io::Error) -> Failure {
    Failure::unavailable(format!("cannot listen for signals: {error}"))
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

impl Signals {
    fn install() -> std::io::Result<Self> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for the end; true if a thread has died.
    async fn serve(&mut self, running: &Running) -> bool {
        let mut watchdog = Watchdog::new();
        let mut settled = Some(Instant::now() + SETTLING);
        loop {
            tokio::select! {
                () = sleep_until(settled.unwrap_or_else(Instant::now)), if settled.is_some() => {
                    settled = None;
                    release_code();
                }
                _ = self.terminate.recv() => return false,
                _ = self.interrupt.recv() => return false,
                () = running.failed().cancelled() => return true,
                _ = self.hangup.recv() => {
                    notify(&[sd_notify::NotifyState::Reloading]);
                    // The outcome is in the log: there is nobody to answer.
                    let _ = running.reload();
                    notify(&[sd_notify::NotifyState::Ready]);
                    settled = Some(Instant::now() + SETTLING);
                }
                () = watchdog.due() => notify(&[sd_notify::NotifyState::Watchdog]),
            }
        }
    }
}

/// systemd's watchdog, at half of its interval; without one never due.
struct Watchdog(Option<tokio::time::Interval>);

impl Watchdog {
    fn new() -> Self {
        let mut limit_us = 0;
        let wanted = sd_notify::watchdog_enabled(false, &mut limit_us);
        Watchdog(wanted.then(|| tokio::time::interval(Duration::from_micros((limit_us / 2).max(1000)))))
    }

    async fn due(&mut self) {
        match &mut self.0 {
            Some(interval) => {
                interval.tick().await;
            }
            None => std::future::pending().await,
        }
    }
}

/// Tells systemd; elsewhere nobody listens, and that is well.
fn notify(state: &[sd_notify::NotifyState<'_>]) {
    let _ = sd_notify::notify(false, state);
}

/// How long after a start or a reload it is over for every thread.
const SETTLING: Duration = Duration::from_secs(2);

/// Most of the code has run once for the start and will not run again (docs/adr/0005).
fn release_code() {
    match tidegate_memory::release_code() {
        Ok(bytes) => tracing::debug!(bytes, "code released"),
        // Without /proc there is only less to gain.
        Err(error) => tracing::debug!(%error, "code not released"),
    }
}

/// As many descriptors as the system lets us have: a connection is one.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, "cannot raise the limit of open files");
    }
}

//! One forward rule to an HTTP upstream: reads its queue, makes requests of it, and acknowledges what was taken.
//!
//! Promises: a message leaves the queue when the upstream has answered 2xx with a whole body, or when it has refused that message alone as often
//! as `refusals_max` says, and then it is in the loss ledger. Everything else is tried again for ever: the queue's own limits decide what
//! is lost to an outage. Messages of one path arrive in their order. The ids never change. One request is under way at a time.
//!
//! Memory: one batch, `bytes_max` and its encoding.

use std::sync::Arc;
use std::time::{Duration, Instant};

use backon::BackoffBuilder;
use http::StatusCode;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::ForwardConfig;
use super::batch::{self, Post};
use super::health::Health;
use super::http::{Client, Verdict};
use super::pace::Pace;
use super::template::Template;
use crate::message::Message;
use crate::spool::{Reader, Reason, Stored};
use crate::tasks::Tasks;

/// The work of one rule.
pub struct Forwarder {
    pub rule: ForwardConfig,
    pub path: Template,
    pub client: Arc<Client>,
    pub health: Arc<Health>,
    pub reader: Reader,
    pub gateway: Arc<str>,
    pub replays: Arc<Replays>,
    /// Where connections are driven.
    pub connections: Tasks,
}

/// How sending one request ended.
enum Sent {
    Taken,
    Refused(StatusCode),
}

/// The gateway stops.
struct Stopped;

impl Forwarder {
    /// Forwards until `shutdown`; a request under way then gets a moment to finish.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut pace = Pace::new(&self.rule.queue.replay_rate_max, self.reader.appended(), Instant::now());
        let batch = self.rule.batch.clone();
        let linger = Duration::from_millis(batch.linger_ms.into());
        loop {
            let (records_max, bytes_max) = (batch.records_max as usize, batch.bytes_max as usize);
            let next = tokio::select! {
                next = self.reader.next_batch(records_max, bytes_max, linger) => next,
                () = shutdown.cancelled() => return,
            };
            let Some(next) = next else { return };
            if next.replayed {
                let pause = pace.take(next.records.len(), self.reader.appended(), Instant::now());
                let turn = async {
                    sleep(pause).await;
                    self.replays.turn(self.rule.queue.priority).await;
                };
                tokio::select! {
                    () = turn => {}
                    () = shutdown.cancelled() => return,
                }
            } else {
                pace.live(self.reader.appended(), Instant::now());
            }
            if self.deliver(&next.records, next.replayed, &shutdown).await.is_err() {
                return;
            }
        }
    }

    /// Brings every record to its end and acknowledges each as soon as all before it are done.
    async fn deliver(
        &mut self,
        records: &[Stored],
        replayed: bool,
        shutdown: &CancellationToken,
    ) -> Result<(), Stopped> {
        let mut done = vec![false; records.len()];
        let mut acknowledged = 0;
        for group in batch::group(records, &self.path, &self.gateway, self.rule.batch.format) {
            let members: Vec<&Stored> = group.members.iter().filter_map(|at| records.get(*at)).collect();
            self.deliver_group(&members, &group.path, replayed, shutdown).await?;
            for at in group.members {
                done.get_mut(at).into_iter().for_each(|done| *done = true);
            }
            let before = acknowledged;
            while done.get(acknowledged) == Some(&true) {
                acknowledged += 1;
            }
            if acknowledged > before
                && let Some(record) = records.get(acknowledged - 1)
            {
                self.reader.done(record.cursor);
            }
        }
        Ok(())
    }

    /// Sends a group whole; what is refused is halved until the message is alone that the upstream does not want.
    async fn deliver_group(
        &mut self,
        members: &[&Stored],
        path: &str,
        replayed: bool,
        shutdown: &CancellationToken,
    ) -> Result<(), Stopped> {
        let mut parts = vec![members];
        while let Some(messages) = parts.pop() {
            let post = self.post(messages, path);
            let mut refusals = 0;
            let mut pauses = pauses();
            loop {
                let Sent::Refused(status) = self.send(&post, replayed, shutdown).await? else { break };
                if messages.len() > 1 {
                    let (first, second) = messages.split_at(messages.len() / 2);
                    parts.extend([second, first]);
                    break;
                }
                refusals += 1;
                if refusals >= self.rule.refusals_max {
                    self.give_up(messages, status);
                    break;
                }
                stoppable(sleep(pauses.next().unwrap_or(PAUSE_MAX)), shutdown).await?;
            }
        }
        Ok(())
    }

    fn post(&self, messages: &[&Stored], path: &str) -> Post {
        let messages: Vec<&Message> = messages.iter().map(|stored| &stored.message).collect();
        batch::encode(&messages, path, &self.gateway, self.rule.batch.format)
    }

    fn give_up(&mut self, messages: &[&Stored], status: StatusCode) {
        let reason = if status == StatusCode::PAYLOAD_TOO_LARGE { Reason::TooLarge } else { Reason::Rejected };
        for stored in messages {
            let (id, topic) = (stored.message.id, &stored.message.topic);
            tracing::error!(
                rule = self.rule.name,
                epoch = id.epoch,
                seq = id.seq,
                %topic,
                status = status.as_u16(),
                "upstream refuses a message for good, it is in the loss ledger"
            );
            self.reader.lose(std::slice::from_ref(*stored), reason);
        }
    }

    /// Sends one request until it is taken or refused for its own sake.
    async fn send(&self, post: &Post, replayed: bool, shutdown: &CancellationToken) -> Result<Sent, Stopped> {
        let mut pauses = pauses();
        let mut failures = 0u32;
        loop {
            let verdict = {
                // While it backs off it is no replay that others have to wait for.
                let _replay = replayed.then(|| self.replays.begin(self.rule.queue.priority));
                finish(self.client.deliver(post, &self.connections), shutdown).await?
            };
            let (why, at_least, at_most) = match verdict {
                Verdict::Taken => {
                    if failures > 0 {
                        tracing::info!(rule = self.rule.name, upstream = self.rule.to, failures, "delivered again");
                    }
                    return Ok(Sent::Taken);
                }
                Verdict::Refused(status) if !self.is_about_us(status) => return Ok(Sent::Refused(status)),
                Verdict::Refused(status) => (
                    format!("status {}: see to the credentials and the path of this rule", status.as_u16()),
                    None,
                    None,
                ),
                Verdict::NotNow { why, retry_after } => (why, retry_after, None),
                Verdict::Unavailable { returns_in } => ("no endpoint can be used".to_owned(), None, returns_in),
            };
            failures = failures.saturating_add(1);
            let pause = pauses.next().unwrap_or(PAUSE_MAX);
            let pause = pause.min(at_most.unwrap_or(pause).max(PAUSE_MIN));
            let pause = pause.max(at_least.unwrap_or_default().min(RETRY_AFTER_MAX));
            tracing::warn!(
                rule = self.rule.name,
                upstream = self.rule.to,
                error = why,
                failures,
                pause_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
                "not delivered, trying again"
            );
            let waited = async {
                // What the upstream asked for is kept; a pause of our own ends when somebody is back.
                match at_least {
                    Some(_) => sleep(pause).await,
                    None => {
                        let _ = timeout(pause, self.health.returned()).await;
                    }
                }
            };
            stoppable(waited, shutdown).await?;
        }
    }

    /// Whether a refusal is about the rule rather than a message: then every message would go the same way, and none is given up.
    fn is_about_us(&self, status: StatusCode) -> bool {
        let credentials = [StatusCode::UNAUTHORIZED, StatusCode::PROXY_AUTHENTICATION_REQUIRED];
        let path = [StatusCode::FORBIDDEN, StatusCode::NOT_FOUND, StatusCode::METHOD_NOT_ALLOWED];
        credentials.contains(&status) || self.path.is_constant() && path.contains(&status)
    }
}

async fn stoppable(wait: impl Future<Output = ()>, shutdown: &CancellationToken) -> Result<(), Stopped> {
    tokio::select! {
        () = wait => Ok(()),
        () = shutdown.cancelled() => Err(Stopped),
    }
}

/// Lets a request that is under way at shutdown finish, for a moment: whatever is answered by then is not sent again at the next start.
async fn finish<T>(work: impl Future<Output = T>, shutdown: &CancellationToken) -> Result<T, Stopped> {
    let deadline = async {
        shutdown.cancelled().await;
        sleep(FINISH).await;
    };
    tokio::select! {
        done = work => Ok(done),
        () = deadline => Err(Stopped),
    }
}

/// The rules of one upstream that are replaying a backlog, by priority.
#[derive(Debug, Default)]
pub struct Replays {
    running: Mutex<[u32; PRIORITIES]>,
    ended: Notify,
}

const PRIORITIES: usize = 10;

impl Replays {
    /// Waits while a rule of a higher priority replays.
    async fn turn(&self, priority: u8) {
        loop {
            let ended = self.ended.notified();
            let higher = self.running.lock().iter().skip(usize::from(priority) + 1).any(|count| *count > 0);
            if !higher {
                return;
            }
            ended.await;
        }
    }

    fn begin(&self, priority: u8) -> Replay<'_> {
        let index = usize::from(priority).min(PRIORITIES - 1);
        if let Some(count) = self.running.lock().get_mut(index) {
            *count += 1;
        }
        Replay { replays: self, index }
    }
}

struct Replay<'a> {
    replays: &'a Replays,
    index: usize,
}

impl Drop for Replay<'_> {
    fn drop(&mut self) {
        if let Some(count) = self.replays.running.lock().get_mut(self.index) {
            *count -= 1;
        }
        self.replays.ended.notify_waiters();
    }
}

/// Half a second, doubling up to half a minute, each drawn up to twice as long so that a fleet does not come back at once.
fn pauses() -> backon::ExponentialBackoff {
    let builder = backon::ExponentialBuilder::default().with_min_delay(Duration::from_millis(500));
    builder.with_max_delay(PAUSE_MAX).without_max_times().with_jitter().build()
}

const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// The longest that an upstream can make us wait by `Retry-After`.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(600);
/// For a request under way when the gateway stops.
const FINISH: Duration = Duration::from_secs(2);

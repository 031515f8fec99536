//! One forward rule to an HTTP upstream: reads its queue, makes requests of it, and acknowledges what was taken.
//!
//! Promises: a message leaves the queue when the upstream has answered 2xx with a whole body, or when it has refused that message alone as often
//! as `refusals_max` says, and then it is in the loss ledger. Everything else is tried again for ever: the queue's own limits decide what
//! is lost to an outage. Messages of one path arrive in their order, and so do single messages of
//! one device. The ids never change. At most `requests_in_flight_max` requests are under way, and one while there is trouble.
//!
//! Memory: one batch, `bytes_max` and its encoding.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use backon::BackoffBuilder;
use http::StatusCode;
use parking_lot::Mutex;
use portable_atomic::{AtomicBool, Ordering};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::batch::{self, Group, Post};
use super::health::Health;
use super::http::{Client, Verdict};
use super::pace::Pace;
use super::template::Template;
use super::{BatchFormat, ForwardConfig};
use crate::message::Message;
use crate::spool::{Reader, Reason, Stored};
use crate::tasks::Tasks;

/// The work of one rule.
pub struct Forwarder {
    pub courier: Courier,
    pub reader: Reader,
}

/// What a rule's requests have in common.
pub struct Courier {
    pub rule: ForwardConfig,
    pub path: Template,
    pub client: Arc<Client>,
    /// `backoff_max_ms` of the upstream.
    pub pause_max: Duration,
    pub health: Arc<Health>,
    pub gateway: Arc<str>,
    pub replays: Arc<Replays>,
    /// The last request was not taken, so that one at a time is enough.
    pub in_trouble: AtomicBool,
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
    /// Forwards until `shutdown`; requests under way then get a moment to finish.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let rule = &self.courier.rule;
        let mut pace = Pace::new(&rule.queue.replay_rate_max, self.reader.appended(), Instant::now());
        let linger = Duration::from_millis(rule.batch.linger_ms.into());
        let (records_max, bytes_max) = (rule.batch.records_max as usize, rule.batch.bytes_max as usize);
        let priority = rule.queue.priority;
        loop {
            let next = tokio::select! {
                next = self.reader.next_batch(records_max, bytes_max, linger) => next,
                () = shutdown.cancelled() => return,
            };
            let Some(next) = next else { return };
            if next.replayed {
                let pause = pace.take(next.records.len(), self.reader.appended(), Instant::now());
                let turn = async {
                    sleep(pause).await;
                    self.courier.replays.turn(priority).await;
                };
                if stoppable(turn, &shutdown).await.is_err() {
                    return;
                }
            } else {
                pace.live(self.reader.appended(), Instant::now());
            }
            if self.deliver(&next.records, next.replayed, &shutdown).await.is_err() {
                return;
            }
        }
    }

    /// Brings every record to its end, several requests at a time where no order binds them, and acknowledges each record as soon as all before it are done.
    async fn deliver(
        &mut self,
        records: &[Stored],
        replayed: bool,
        shutdown: &CancellationToken,
    ) -> Result<(), Stopped> {
        let (courier, reader) = (&self.courier, &mut self.reader);
        let groups = batch::group(records, &courier.path, &courier.gateway, courier.rule.batch.format);
        let mut waiting = chains(records, groups, courier.rule.batch.format).into_iter();
        let mut under_way: Vec<UnderWay<'_>> = Vec::new();
        let mut done = vec![false; records.len()];
        let mut acknowledged = 0;
        // Each chain's group, one after the other; a chain whose first group is done comes back for its next.
        loop {
            // Somebody in trouble is enough; the others wait until it is over.
            let at_once =
                if courier.in_trouble.load(Ordering::Relaxed) { 1 } else { courier.rule.requests_in_flight_max };
            while under_way.len() < at_once as usize
                && let Some(chain) = waiting.next()
            {
                under_way.push(Box::pin(courier.deliver_first(records, chain, replayed, shutdown)));
            }
            if under_way.is_empty() {
                return Ok(());
            }
            let mut chain = first_of(&mut under_way).await?;
            let Some((group, lost)) = chain.finished.take() else { continue };
            for (at, reason) in lost {
                if let Some(record) = records.get(at) {
                    reader.lose(std::slice::from_ref(record), reason);
                }
            }
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
                reader.done(record.cursor);
            }
            if !chain.groups.is_empty() {
                under_way.push(Box::pin(courier.deliver_first(records, chain, replayed, shutdown)));
            }
        }
    }
}

/// Requests that must follow each other.
struct Chain {
    groups: VecDeque<Group>,
    /// What has just been done, and what of it was given up.
    finished: Option<(Group, Vec<(usize, Reason)>)>,
}

/// Groups of different paths go their own ways. Single messages of one device stay in order, whatever their paths.
fn chains(records: &[Stored], groups: Vec<Group>, format: BatchFormat) -> Vec<Chain> {
    let mut chains: Vec<Chain> = Vec::new();
    let mut known: HashMap<Option<&str>, usize> = HashMap::new();
    for group in groups {
        let device = group.members.first().and_then(|at| records.get(*at));
        let device = device.and_then(|record| record.message.origin.device.as_ref()).map(|device| device.as_str());
        let chain = known.get(&device).filter(|_| format == BatchFormat::Single).copied();
        match chain.and_then(|chain| chains.get_mut(chain)) {
            Some(chain) => chain.groups.push_back(group),
            None => {
                known.insert(device, chains.len());
                chains.push(Chain { groups: VecDeque::from([group]), finished: None });
            }
        }
    }
    chains
}

/// Waits until one of several is done, and takes it out. They are few, so all are asked.
async fn first_of<T>(futures: &mut Vec<Pin<Box<dyn Future<Output = T> + Send + '_>>>) -> T {
    std::future::poll_fn(|cx| {
        for index in 0..futures.len() {
            let Some(future) = futures.get_mut(index) else { break };
            if let Poll::Ready(done) = future.as_mut().poll(cx) {
                drop(futures.swap_remove(index));
                return Poll::Ready(done);
            }
        }
        Poll::Pending
    })
    .await
}

impl Courier {
    /// Brings the first group of a chain to its end.
    async fn deliver_first(
        &self,
        records: &[Stored],
        mut chain: Chain,
        replayed: bool,
        shutdown: &CancellationToken,
    ) -> Result<Chain, Stopped> {
        if let Some(group) = chain.groups.pop_front() {
            let lost = self.deliver_group(records, &group, replayed, shutdown).await?;
            chain.finished = Some((group, lost));
        }
        Ok(chain)
    }

    /// Sends a group whole; what is refused is halved until the message is alone that the upstream does not want. Returns what was given up.
    async fn deliver_group(
        &self,
        records: &[Stored],
        group: &Group,
        replayed: bool,
        shutdown: &CancellationToken,
    ) -> Result<Vec<(usize, Reason)>, Stopped> {
        let mut lost = Vec::new();
        let mut parts = vec![group.members.as_slice()];
        while let Some(part) = parts.pop() {
            let post = self.post(records, part, &group.path);
            let mut refusals = 0;
            let mut pauses = pauses(self.pause_max);
            loop {
                let Sent::Refused(status) = self.send(&post, replayed, shutdown).await? else { break };
                if part.len() > 1 {
                    let (first, second) = part.split_at(part.len() / 2);
                    parts.extend([second, first]);
                    break;
                }
                refusals += 1;
                if refusals >= self.rule.refusals_max {
                    lost.extend(part.iter().map(|at| (*at, self.give_up(records.get(*at), status))));
                    break;
                }
                stoppable(sleep(pauses()), shutdown).await?;
            }
        }
        Ok(lost)
    }

    fn post(&self, records: &[Stored], part: &[usize], path: &str) -> Post {
        let messages: Vec<&Message> =
            part.iter().filter_map(|at| records.get(*at)).map(|record| &record.message).collect();
        batch::encode(&messages, path, &self.gateway, self.rule.batch.format)
    }

    fn give_up(&self, record: Option<&Stored>, status: StatusCode) -> Reason {
        if let Some(Stored { message, .. }) = record {
            tracing::error!(
                rule = self.rule.name,
                epoch = message.id.epoch,
                seq = message.id.seq,
                topic = %message.topic,
                status = status.as_u16(),
                "upstream refuses a message for good, it is in the loss ledger"
            );
        }
        if status == StatusCode::PAYLOAD_TOO_LARGE { Reason::TooLarge } else { Reason::Rejected }
    }

    /// Sends one request until it is taken or refused for its own sake.
    async fn send(&self, post: &Post, replayed: bool, shutdown: &CancellationToken) -> Result<Sent, Stopped> {
        let mut pauses = pauses(self.pause_max);
        let mut failures = 0u32;
        loop {
            let verdict = {
                // While it backs off it is no replay that others have to wait for.
                let _replay = replayed.then(|| self.replays.begin(self.rule.queue.priority));
                finish(self.client.deliver(post, &self.connections), shutdown).await?
            };
            let (why, at_least, at_most) = match verdict {
                Verdict::Taken => {
                    self.in_trouble.store(false, Ordering::Relaxed);
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
            self.in_trouble.store(true, Ordering::Relaxed);
            let pause = pauses();
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

/// One chain's next request.
type UnderWay<'a> = Pin<Box<dyn Future<Output = Result<Chain, Stopped>> + Send + 'a>>;

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

/// Half a second, doubling up to `max`, each drawn up to twice as long so that a fleet does not come back at once.
fn pauses(max: Duration) -> impl FnMut() -> Duration {
    let builder = backon::ExponentialBuilder::default().with_min_delay(Duration::from_millis(500));
    let mut pauses = builder.with_max_delay(max).without_max_times().with_jitter().build();
    move || pauses.next().unwrap_or(max)
}

const PAUSE_MIN: Duration = Duration::from_millis(50);
/// The longest that an upstream can make us wait by `Retry-After`.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(600);
/// For a request under way when the gateway stops.
const FINISH: Duration = Duration::from_secs(2);

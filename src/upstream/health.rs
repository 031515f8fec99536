//! Active health checks: who is there, asked again and again.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Empty;
use portable_atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::HealthConfig;
use super::connect::{Dial, Sender};
use crate::tasks::Tasks;

/// What the checks say about the endpoints of one upstream. All are healthy until a check says otherwise.
#[derive(Debug)]
pub struct Health {
    healthy: Box<[AtomicBool]>,
    /// Grows with every change, so that a worker sees one at the cost of a load.
    version: AtomicU64,
    returned: Notify,
}

impl Health {
    pub fn new(endpoints: usize) -> Self {
        Health {
            healthy: (0..endpoints).map(|_| AtomicBool::new(true)).collect(),
            version: AtomicU64::new(0),
            returned: Notify::new(),
        }
    }

    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Of each endpoint, whether it is healthy.
    pub fn all(&self) -> impl Iterator<Item = bool> {
        self.healthy.iter().map(|healthy| healthy.load(Ordering::Acquire))
    }

    pub fn is_healthy(&self, index: usize) -> bool {
        self.all().nth(index).is_some_and(|healthy| healthy)
    }

    pub fn healthy_count(&self) -> usize {
        self.all().filter(|healthy| *healthy).count()
    }

    fn set(&self, index: usize, healthy: bool) {
        if let Some(known) = self.healthy.get(index) {
            known.store(healthy, Ordering::Release);
        }
        self.version.fetch_add(1, Ordering::AcqRel);
        if healthy {
            self.returned.notify_waiters();
        }
    }

    /// Waits until an endpoint that was away is back.
    pub async fn returned(&self) {
        self.returned.notified().await;
    }
}

/// Counts answers of one kind in a row and turns at the thresholds.
#[derive(Debug)]
struct Judgement {
    healthy: bool,
    /// Answers in a row against what is held now.
    against: u32,
    unhealthy_after: u32,
    healthy_after: u32,
}

impl Judgement {
    fn new(config: &HealthConfig) -> Self {
        Judgement {
            healthy: true,
            against: 0,
            unhealthy_after: config.unhealthy_after.max(1),
            healthy_after: config.healthy_after.max(1),
        }
    }

    /// The new judgement, if this answer changes it.
    fn answered(&mut self, well: bool) -> Option<bool> {
        if well == self.healthy {
            self.against = 0;
            return None;
        }
        self.against += 1;
        let enough = if self.healthy { self.unhealthy_after } else { self.healthy_after };
        if self.against < enough {
            return None;
        }
        self.against = 0;
        self.healthy = well;
        Some(well)
    }
}

/// One endpoint under watch.
pub struct Watch<'a> {
    pub upstream: &'a str,
    pub index: usize,
    pub dial: Dial,
    pub config: HealthConfig,
    /// Sent with an HTTP check.
    pub headers: http::HeaderMap,
}

impl Watch<'_> {
    /// Checks until `shutdown`; `changed` is called after each change.
    pub async fn run(self, health: &Health, tasks: &Tasks, shutdown: CancellationToken, changed: impl Fn()) {
        let mut judgement = Judgement::new(&self.config);
        let limit = Duration::from_millis(self.config.timeout_ms.into());
        let mut random = super::random::Random::new();
        loop {
            let found = tokio::select! {
                found = timeout(limit, self.check(tasks)) => found.unwrap_or_else(|_| Err("no answer in time".into())),
                () = shutdown.cancelled() => return,
            };
            let url = &self.dial.endpoint.url;
            if let Some(healthy) = judgement.answered(found.is_ok()) {
                health.set(self.index, healthy);
                changed();
                match &found {
                    Ok(()) => tracing::info!(upstream = self.upstream, endpoint = url, "endpoint is healthy again"),
                    Err(why) => {
                        tracing::warn!(upstream = self.upstream, endpoint = url, why, "endpoint is unhealthy");
                    }
                }
            }
            let tenth = u64::from(self.config.interval_ms / 10);
            let pause = u64::from(self.config.interval_ms) - tenth + random.below(2 * tenth + 1);
            tokio::select! {
                () = sleep(Duration::from_millis(pause)) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    async fn check(&self, tasks: &Tasks) -> Result<(), String> {
        if self.config.path.is_empty() {
            return self.dial.stream().await.map(drop).map_err(|fault| fault.to_string());
        }
        let mut sender =
            self.dial.open::<Empty<Bytes>>(self.upstream, tasks).await.map_err(|fault| fault.to_string())?;
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = self.dial.endpoint.uri(&self.config.path).map_err(|error| error.to_string())?;
        *request.headers_mut() = self.headers.clone();
        let headers = request.headers_mut();
        headers.insert(http::header::HOST, self.dial.endpoint.authority.clone());
        if matches!(sender, Sender::Http1(_)) {
            headers.insert(http::header::CONNECTION, http::HeaderValue::from_static("close"));
        }
        let answer = sender.send(request).await.map_err(|error| error.to_string())?;
        match answer.status().as_u16() {
            200..=399 => Ok(()),
            status => Err(format!("status {status}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_judgement_turns_only_at_the_threshold_of_answers_in_a_row() {
        let config = HealthConfig { unhealthy_after: 3, healthy_after: 2, ..HealthConfig::default() };
        let mut judgement = Judgement::new(&config);
        let answers = [
            (true, None),
            (false, None),
            (false, None),
            (true, None),
            (false, None),
            (false, None),
            (false, Some(false)),
            (false, None),
            (true, None),
            (false, None),
            (true, None),
            (true, Some(true)),
        ];
        for (n, (well, turned)) in answers.into_iter().enumerate() {
            assert_eq!(judgement.answered(well), turned, "answer {n}");
        }
    }

    #[tokio::test]
    async fn whoever_waits_is_woken_by_a_return_and_not_by_a_loss() {
        let health = Health::new(2);
        let mut returned = Box::pin(health.returned());
        assert!(timeout(Duration::ZERO, &mut returned).await.is_err());
        health.set(1, false);
        assert!(timeout(Duration::ZERO, &mut returned).await.is_err());
        assert_eq!((health.healthy_count(), health.is_healthy(1), health.version()), (1, false, 1));
        health.set(1, true);
        returned.await;
        assert_eq!(health.healthy_count(), 2);
    }
}

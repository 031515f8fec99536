//! Bodies of the request plane on their way through: nothing is kept, everything is bounded in size or in waiting time.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use portable_atomic::{AtomicU8, AtomicU32, Ordering};
use tokio::time::Instant;

use super::problem::Refused;
use crate::gateway::{BoxError, ProxyBody};
use crate::listener::UnderWay;
use crate::message::Reject;
use crate::telemetry::access_log::Pending;
use crate::timer::LazyTimer;

/// A client's body on its way to an upstream.
pub struct Upload {
    body: Incoming,
    left: u64,
    /// For each piece.
    patience: Duration,
    waiting_since: Option<Instant>,
    timer: LazyTimer,
    verdict: Arc<Verdict>,
}

/// What became of an upload, for the answer: the upstream's side only sees a body that failed.
#[derive(Debug, Default)]
pub struct Verdict(AtomicU8);

impl Verdict {
    const TOO_LARGE: u8 = 1;
    const TIMEOUT: u8 = 2;
    const BROKEN: u8 = 3;
    const WHOLE: u8 = 4;

    /// Whether all of it has been read, so that the connection is where the next request begins.
    pub fn is_whole(&self) -> bool {
        self.0.load(Ordering::Relaxed) == Self::WHOLE
    }

    /// What the client is told; `None` if its body was never at fault. `bytes_max` is by which key.
    pub fn refused(&self, limit: &'static str, bytes_max: u64) -> Option<Refused> {
        match self.0.load(Ordering::Relaxed) {
            Self::TOO_LARGE => Some(Reject::TooLarge { limit, bytes_max }.into()),
            Self::TIMEOUT => Some(Refused::BodyTimeout),
            Self::BROKEN => Some(Refused::BodyBroken),
            _ => None,
        }
    }
}

impl Upload {
    pub fn new(body: Incoming, bytes_max: u64, patience: Duration, verdict: Arc<Verdict>) -> Self {
        Upload { body, left: bytes_max, patience, waiting_since: None, timer: LazyTimer::default(), verdict }
    }

    fn fail(&self, verdict: u8, text: &'static str) -> BoxError {
        self.verdict.0.store(verdict, Ordering::Relaxed);
        text.into()
    }
}

impl hyper::body::Body for Upload {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Pending => {
                let since = *self.waiting_since.get_or_insert_with(Instant::now);
                let deadline = since + self.patience;
                if self.timer.poll_past(cx, deadline).is_pending() {
                    return Poll::Pending;
                }
                Poll::Ready(Some(Err(self.fail(Verdict::TIMEOUT, "request body does not come"))))
            }
            Poll::Ready(None) => {
                self.verdict.0.store(Verdict::WHOLE, Ordering::Relaxed);
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(_))) => {
                Poll::Ready(Some(Err(self.fail(Verdict::BROKEN, "request body ends early or is malformed"))))
            }
            Poll::Ready(Some(Ok(frame))) => {
                self.waiting_since = None;
                let bytes = frame.data_ref().map_or(0, |data| data.len() as u64);
                match self.left.checked_sub(bytes) {
                    Some(left) => self.left = left,
                    None => return Poll::Ready(Some(Err(self.fail(Verdict::TOO_LARGE, "request body is too large")))),
                }
                if self.body.is_end_stream() {
                    self.verdict.0.store(Verdict::WHOLE, Ordering::Relaxed);
                }
                Poll::Ready(Some(Ok(frame)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What one request of the request plane holds until its answer is through.
pub struct Held {
    _slot: Slot,
    _under_way: UnderWay,
}

impl Held {
    pub fn new(slot: Slot, under_way: UnderWay) -> Self {
        Held { _slot: slot, _under_way: under_way }
    }
}

/// An upstream's body on its way to a client.
pub struct Download {
    body: ProxyBody,
    /// Without one byte.
    patience: Duration,
    waiting_since: Option<Instant>,
    timer: LazyTimer,
    bytes: u64,
    log: Option<Pending>,
    _held: Held,
}

impl fmt::Debug for Download {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Download")
    }
}

impl Download {
    pub fn new(body: ProxyBody, patience: Duration, held: Held) -> Self {
        Download { body, patience, waiting_since: None, timer: LazyTimer::default(), bytes: 0, log: None, _held: held }
    }

    /// The line that is written when the body has ended.
    pub fn log_at_end(&mut self, log: Pending) {
        self.log = Some(log);
    }

    /// The next frame; an error cuts the connection, so that a client never takes half an answer for a whole one.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Pending => {
                let since = *self.waiting_since.get_or_insert_with(Instant::now);
                if self.timer.poll_past(cx, since + self.patience).is_pending() {
                    return Poll::Pending;
                }
                Poll::Ready(Some(Err("upstream's body does not come".into())))
            }
            Poll::Ready(frame) => {
                self.waiting_since = None;
                if let Some(Ok(frame)) = &frame {
                    self.bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
                }
                Poll::Ready(frame)
            }
        }
    }

    pub fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    pub fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if let Some(log) = self.log.take() {
            log.write(self.bytes);
        }
    }
}

/// One of a number that has a limit.
#[derive(Debug)]
pub struct Slot(Arc<AtomicU32>);

impl Slot {
    /// # Errors
    /// [`Reject::Full`] with `limit` when all are taken.
    pub fn take(
        taken: &Arc<AtomicU32>,
        limit: &'static str,
        slots_max: u32,
        retry_after: Duration,
    ) -> Result<Self, Reject> {
        taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < slots_max).then_some(n + 1))
            .map_err(|_| Reject::Full { limit, retry_after })?;
        Ok(Slot(taken.clone()))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

//! A stream that fails when its peer takes too long: silent between requests, slow with a request's head, or not reading what it is sent.
//!
//! Timers are lazy: one is armed when the stream first has to wait, and when it fires the true deadline is computed again. A busy
//! connection therefore pays a comparison per wait and no timer operation per request.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use portable_atomic::{AtomicU64, Ordering};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use crate::timer::LazyTimer;

/// How long a peer may take.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// Between two requests.
    pub idle: Duration,
    /// From a request's first byte to the end of its head; `None` where bytes between requests are no request (HTTP/2).
    pub head: Option<Duration>,
    /// To take one byte of what waits to be written.
    pub write: Duration,
}

/// What the application knows and the stream does not: whether a request is under way.
#[derive(Debug)]
pub struct Activity {
    started: Instant,
    begun: AtomicU64,
    ended: AtomicU64,
    /// Milliseconds since `started`.
    last_end_ms: AtomicU64,
}

impl Default for Activity {
    fn default() -> Self {
        Activity {
            started: Instant::now(),
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            last_end_ms: AtomicU64::new(0),
        }
    }
}

impl Activity {
    /// A request begins; it ends when the guard is dropped.
    pub fn begin(self: &Arc<Self>) -> UnderWay {
        self.begun.fetch_add(1, Ordering::Relaxed);
        UnderWay(self.clone())
    }

    fn is_busy(&self) -> bool {
        self.begun.load(Ordering::Relaxed) != self.ended.load(Ordering::Relaxed)
    }

    fn idle_since(&self) -> Instant {
        self.started + Duration::from_millis(self.last_end_ms.load(Ordering::Relaxed))
    }
}

/// A request under way.
#[derive(Debug)]
pub struct UnderWay(Arc<Activity>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        let now = u64::try_from(self.0.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.0.last_end_ms.store(now, Ordering::Relaxed);
        self.0.ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Deadlined<IO> {
    io: IO,
    deadlines: Deadlines,
    activity: Arc<Activity>,
    /// When the first byte after the end of the request before came, and how many requests had begun then.
    head_since: Option<(u64, Instant)>,
    stalled_since: Option<Instant>,
    read_timer: LazyTimer,
    write_timer: LazyTimer,
}

impl<IO> Deadlined<IO> {
    pub fn new(io: IO, deadlines: Deadlines, activity: Arc<Activity>) -> Self {
        Deadlined {
            io,
            deadlines,
            activity,
            head_since: None,
            stalled_since: None,
            read_timer: LazyTimer::default(),
            write_timer: LazyTimer::default(),
        }
    }

    /// The stream without its deadlines.
    pub fn into_inner(self) -> IO {
        self.io
    }

    fn read_deadline(&self) -> Instant {
        let head = self.head_since.filter(|(begun, _)| *begun == self.activity.begun.load(Ordering::Relaxed));
        match (head, self.deadlines.head) {
            (Some((_, since)), Some(allowed)) => since + allowed,
            (None, _) | (_, None) => self.activity.idle_since() + self.deadlines.idle,
        }
    }

    /// Turns a write that has to wait for too long into an error.
    fn bounded<T>(&mut self, cx: &mut Context<'_>, poll: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.stalled_since = None;
            return poll;
        }
        let since = *self.stalled_since.get_or_insert_with(Instant::now);
        match self.write_timer.poll_past(cx, since + self.deadlines.write) {
            Poll::Ready(()) => Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "peer does not read"))),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Deadlined<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let filled = buffer.filled().len();
        if let Poll::Ready(result) = Pin::new(&mut self.io).poll_read(cx, buffer) {
            if buffer.filled().len() > filled && !self.activity.is_busy() {
                let begun = self.activity.begun.load(Ordering::Relaxed);
                if self.head_since.is_none_or(|(of, _)| of != begun) {
                    self.head_since = Some((begun, Instant::now()));
                }
            }
            return Poll::Ready(result);
        }
        if self.activity.is_busy() {
            // The request's own deadlines hold; the next request is waited for after its end.
            return Poll::Pending;
        }
        let deadline = self.read_deadline();
        match self.read_timer.poll_past(cx, deadline) {
            Poll::Ready(()) => Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "peer is silent"))),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Deadlined<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.bounded(cx, poll)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.io).poll_flush(cx);
        self.bounded(cx, poll)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.io).poll_shutdown(cx);
        self.bounded(cx, poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        self.bounded(cx, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::*;

    const IDLE: Duration = Duration::from_secs(100);
    const HEAD: Duration = Duration::from_secs(10);

    fn pair(head: Option<Duration>) -> (DuplexStream, Deadlined<DuplexStream>, Arc<Activity>) {
        let (near, far) = tokio::io::duplex(16);
        let activity = Arc::new(Activity::default());
        let deadlines = Deadlines { idle: IDLE, head, write: Duration::from_secs(20) };
        (near, Deadlined::new(far, deadlines, activity.clone()), activity)
    }

    async fn seconds_to_fail(io: &mut Deadlined<DuplexStream>) -> u64 {
        let began = Instant::now();
        let mut buffer = [0; 64];
        loop {
            match io.read(&mut buffer).await {
                Ok(_) => {}
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
                    return began.elapsed().as_secs();
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_peer_has_the_idle_time_and_a_slow_head_less() {
        let (_near, mut far, _) = pair(Some(HEAD));
        assert_eq!(seconds_to_fail(&mut far).await, 100);

        let (mut near, mut far, _) = pair(Some(HEAD));
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_secs(3)).await;
                if near.write_all(b"x").await.is_err() {
                    return;
                }
            }
        });
        assert_eq!(seconds_to_fail(&mut far).await, 13, "ten seconds from the first byte");
    }

    #[tokio::test(start_paused = true)]
    async fn idle_time_counts_from_the_end_of_the_last_request() {
        let (mut near, mut far, activity) = pair(Some(HEAD));
        near.write_all(b"head").await.unwrap();
        let mut head = [0; 4];
        far.read_exact(&mut head).await.unwrap();
        let under_way = activity.begin();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(500)).await;
            drop(under_way);
        });
        // A request may take its time.
        let mut byte = [0; 1];
        assert!(tokio::time::timeout(Duration::from_secs(501), far.read(&mut byte)).await.is_err());
        assert_eq!(seconds_to_fail(&mut far).await, 99);
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_between_requests_begin_no_head_where_there_is_none() {
        let (mut near, mut far, _) = pair(None);
        near.write_all(b"ping").await.unwrap();
        assert_eq!(seconds_to_fail(&mut far).await, 100);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_read_is_given_up() {
        let (_near, mut far, _) = pair(Some(HEAD));
        let began = Instant::now();
        let error = far.write_all(&[0; 100]).await.unwrap_err();
        assert_eq!((error.kind(), began.elapsed().as_secs()), (io::ErrorKind::TimedOut, 20));
    }
}

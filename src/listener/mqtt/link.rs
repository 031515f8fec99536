//! The transport of one connection: reading, writing, and the buffers.
//!
//! A connection owns memory only for what is unfinished: part of a packet that has not come whole, output that its peer has not taken. What
//! is read and written at once goes through two buffers of the worker's thread, so that many packets cost one read and one write and an idle
//! connection costs no buffer.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

use crate::gateway::Delivery;
use crate::timer::LazyTimer;

pub type Engine = tidegate_mqtt::Connection<Delivery>;

/// See the module's documentation.
pub struct Link<IO> {
    io: IO,
    pub engine: Engine,
    /// Read and not yet taken by the engine.
    pub input: BytesMut,
    /// What was read last lies in the thread's buffer, not in one of our own.
    of_thread: bool,
    /// Written by the engine and not yet taken by the peer.
    pending: BytesMut,
    /// The transport holds bytes that it was given.
    unflushed: bool,
    /// Since when the peer has taken nothing of what waits for it.
    stalled_since: Option<Instant>,
    /// When the first byte of the unfinished packet came.
    partial_since: Option<Instant>,
    timer: LazyTimer,
}

/// A buffer to write into, of the thread or of the connection.
pub struct Out {
    pub bytes: BytesMut,
    of_thread: bool,
}

/// What came of writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// There was nothing to write.
    Nothing,
    /// The peer has taken everything.
    All,
    /// The peer has to take something first.
    Blocked,
}

thread_local! {
    static READ: Cell<BytesMut> = Cell::default();
    static WRITE: Cell<BytesMut> = Cell::default();
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Link<IO> {
    pub fn new(io: IO, prefix: BytesMut, engine: Engine) -> Self {
        Link {
            io,
            engine,
            input: prefix,
            of_thread: false,
            pending: BytesMut::new(),
            unflushed: false,
            stalled_since: None,
            partial_since: None,
            timer: LazyTimer::default(),
        }
    }

    /// The buffer for this turn's output; it begins with what is still to be written.
    pub fn begin(&mut self) -> Out {
        if self.pending.is_empty() {
            let mut bytes = WRITE.take();
            bytes.reserve(WRITE_BYTES);
            Out { bytes, of_thread: true }
        } else {
            Out { bytes: std::mem::take(&mut self.pending), of_thread: false }
        }
    }

    /// Writes as much as the peer takes, and keeps the rest.
    ///
    /// # Errors
    /// The transport's; nothing more can be written then.
    pub fn poll_write(&mut self, cx: &mut Context<'_>, out: Out, now: Instant) -> io::Result<Written> {
        let Out { mut bytes, of_thread } = out;
        let mut taken = 0;
        let mut outcome = Ok(if bytes.is_empty() && !self.unflushed { Written::Nothing } else { Written::All });
        while let Some(rest) = bytes.get(taken..).filter(|rest| !rest.is_empty()) {
            match Pin::new(&mut self.io).poll_write(cx, rest) {
                Poll::Ready(Ok(0)) => outcome = Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(count)) => {
                    taken += count;
                    self.unflushed = true;
                    self.stalled_since = None;
                    continue;
                }
                Poll::Ready(Err(error)) => outcome = Err(error),
                Poll::Pending => outcome = Ok(Written::Blocked),
            }
            break;
        }
        if let Ok(Written::All) = outcome {
            match Pin::new(&mut self.io).poll_flush(cx) {
                Poll::Ready(Ok(())) => self.unflushed = false,
                Poll::Ready(Err(error)) => outcome = Err(error),
                Poll::Pending => outcome = Ok(Written::Blocked),
            }
        }
        match &outcome {
            Ok(Written::Blocked) => {
                self.stalled_since.get_or_insert(now);
            }
            Ok(Written::Nothing | Written::All) | Err(_) => self.stalled_since = None,
        }
        if of_thread {
            if outcome.is_ok() && taken < bytes.len() {
                self.pending = BytesMut::from(bytes.get(taken..).unwrap_or_default());
            }
            bytes.clear();
            // One huge message must not leave the thread with a huge buffer.
            if bytes.capacity() <= WRITE_BYTES_KEPT {
                WRITE.set(bytes);
            }
        } else if taken < bytes.len() {
            bytes::Buf::advance(&mut bytes, taken);
            self.pending = bytes;
        }
        outcome
    }

    /// Reads what is there, after what is left of what was read before; give back with [`keep`](Self::keep) what is not used. Empty is the end.
    pub fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<BytesMut>> {
        if self.input.is_empty() {
            let mut buffer = READ.take();
            // Takes the whole buffer back once no message holds a slice of it.
            buffer.reserve(READ_BYTES);
            let read = pin!(self.io.read_buf(&mut buffer)).poll(cx);
            let chunk = buffer.split();
            READ.set(buffer);
            ready!(read)?;
            self.of_thread = true;
            return Poll::Ready(Ok(chunk));
        }
        // Grows with what has come, not with what the peer says will come.
        let room = self.engine.missing(&self.input).min(self.input.len().max(GROW_BYTES_MIN));
        self.input.reserve(room);
        let count = ready!(pin!(self.io.read_buf(&mut self.input)).poll(cx))?;
        Poll::Ready(Ok(if count == 0 { BytesMut::new() } else { std::mem::take(&mut self.input) }))
    }

    /// Keeps what the engine has not taken. `whole` says that it took a packet, `waits` that the rest waits for us and not for the peer.
    pub fn keep(&mut self, rest: BytesMut, whole: bool, waits: bool, now: Instant) {
        if rest.is_empty() {
            // Gives the memory back.
            self.input = BytesMut::new();
            self.partial_since = None;
            return;
        }
        if waits {
            self.partial_since = None;
        } else if whole || self.partial_since.is_none() {
            self.partial_since = Some(now);
        }
        // A rest is copied out of the thread's buffer, which it would otherwise hold, and out of one that has become too large for it.
        self.input = if whole || self.of_thread { BytesMut::from(&rest[..]) } else { rest };
        self.of_thread = false;
    }

    /// When the peer has taken too long to send the rest of a packet, or to take what is written.
    pub fn deadline(&self, packet: Duration, write: Duration) -> Option<Instant> {
        let packet = self.partial_since.and_then(|since| since.checked_add(packet));
        let write = self.stalled_since.and_then(|since| since.checked_add(write));
        earliest(packet, write)
    }

    /// Whether the peer has not taken anything for `write`.
    pub fn is_stalled(&self, write: Duration, now: Instant) -> bool {
        self.stalled_since.is_some_and(|since| now >= since + write)
    }

    /// Whether a packet has not come whole within `packet`.
    pub fn is_partial_overdue(&self, packet: Duration, now: Instant) -> bool {
        self.partial_since.is_some_and(|since| now >= since + packet)
    }

    /// Ready once `deadline` has passed.
    pub fn poll_timer(&mut self, cx: &mut Context<'_>, deadline: Option<Instant>) -> Poll<()> {
        match deadline {
            Some(deadline) => self.timer.poll_past(cx, deadline.into()),
            None => Poll::Pending,
        }
    }

    /// Sends the last words and closes. The peer gets a moment to read them: closing with unread input would make the kernel throw them away.
    pub async fn close(mut self: Box<Self>, write: Duration) {
        let patience = write.min(GOODBYE_TIMEOUT);
        let goodbye = async {
            std::future::poll_fn(|cx| {
                let out = self.begin();
                match self.poll_write(cx, out, Instant::now()) {
                    Ok(Written::Blocked) => Poll::Pending,
                    Ok(Written::Nothing | Written::All) | Err(_) => Poll::Ready(()),
                }
            })
            .await;
            std::future::poll_fn(|cx| Pin::new(&mut self.io).poll_shutdown(cx)).await?;
            let mut discarded = 0;
            while discarded < GOODBYE_BYTES_MAX {
                self.input = BytesMut::new();
                let chunk = std::future::poll_fn(|cx| self.poll_read(cx)).await?;
                if chunk.is_empty() {
                    break;
                }
                discarded += chunk.len();
            }
            io::Result::Ok(())
        };
        // Whether the peer listened to the end is its own affair.
        let _ = tokio::time::timeout(patience, goodbye).await;
    }
}

pub fn earliest(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// The monotonic clock, tokio's, so that tests can stop it.
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// One read: some hundreds of small messages.
const READ_BYTES: usize = 32 * 1024;
const WRITE_BYTES: usize = 32 * 1024;
const WRITE_BYTES_KEPT: usize = 512 * 1024;
/// An unfinished packet's buffer grows by at least this, and then by doubling.
const GROW_BYTES_MIN: usize = 2048;
/// Bytes and time spent on a peer that goes on talking after the end.
const GOODBYE_BYTES_MAX: usize = 64 * 1024;
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

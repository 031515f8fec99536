//! Stops what two programs could read differently before hyper, which is laxer here and there, has read it.
//!
//! hyper sees the harmless bytes and then a NUL, which no part of a head may have, and the end of a head: it answers 400 and closes. In a body, where a
//! NUL may stand, the stream ends: the request is answered 400 as one whose body broke off.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tidegate_http::framing::Framing;
use tokio::io::{AsyncRead, ReadBuf};

use super::upgrade::Fate;
use crate::listener::stream::write_through;
use crate::telemetry::meters;

/// An HTTP/1 connection's stream.
#[derive(Debug)]
pub struct Strict<IO> {
    io: IO,
    framing: Framing,
    /// Says when the stream has ceased to be HTTP's.
    fate: Arc<Fate>,
    /// What is still to be read instead of what came; then the stream ends.
    stopped: Option<&'static [u8]>,
}

impl<IO> Strict<IO> {
    pub fn new(io: IO, fate: Arc<Fate>) -> Self {
        Strict { io, framing: Framing::default(), fate, stopped: None }
    }

    /// The stream, when it has ceased to be HTTP's.
    pub fn into_inner(self) -> IO {
        self.io
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Strict<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(instead) = &mut self.stopped {
            give(instead, buffer);
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buffer))?;
        if self.fate.has_switched() {
            return Poll::Ready(Ok(()));
        }
        let came = buffer.filled().get(before..).unwrap_or_default();
        if let Err(found) = self.framing.follow(came) {
            buffer.set_filled(before + found.at);
            let mut instead: &[u8] = if found.in_body { b"" } else { b"\0\r\n\r\n" };
            if found.in_body {
                // hyper counts what it cannot parse, but this it takes for the end.
                meters().http.malformed.increment(1);
            }
            give(&mut instead, buffer);
            self.stopped = Some(instead);
            self.fate.spoil();
            tracing::debug!(what = found.what.as_str(), "ambiguous request refused");
        }
        Poll::Ready(Ok(()))
    }
}

/// As much of `bytes` as there is room for.
fn give(bytes: &mut &'static [u8], buffer: &mut ReadBuf<'_>) {
    let (now, later) = bytes.split_at(bytes.len().min(buffer.remaining()));
    buffer.put_slice(now);
    *bytes = later;
}

write_through!(Strict);

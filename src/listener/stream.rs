//! The byte streams that adapters are handed.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, ReadBuf};
use tokio_util::either::Either;

use crate::tls;

/// A stream whose first bytes were read already; they are read again first.
#[derive(Debug)]
pub struct Prefixed<IO> {
    prefix: BytesMut,
    io: IO,
}

impl<IO> Prefixed<IO> {
    pub fn new(prefix: BytesMut, io: IO) -> Self {
        Prefixed { prefix, io }
    }

    /// The stream, and what of the prefix nobody has read.
    pub fn into_parts(self) -> (BytesMut, IO) {
        (self.prefix, self.io)
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Prefixed<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, buffer);
        }
        let count = self.prefix.len().min(buffer.remaining());
        buffer.put_slice(&self.prefix[..count]);
        self.prefix.advance(count);
        if self.prefix.is_empty() {
            // Gives the memory back: this stream may live for years.
            self.prefix = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

/// Writes to a wrapper go to its field `io` unchanged.
macro_rules! write_through {
    ($wrapper:ident) => {
        // A block, so that the names it needs are in scope wherever it is used.
        const _: () = {
            use std::io::{IoSlice, Result};
            use std::pin::Pin;
            use std::task::{Context, Poll};
            use tokio::io::AsyncWrite;

            impl<IO: AsyncWrite + Unpin> AsyncWrite for $wrapper<IO> {
                fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
                    Pin::new(&mut self.io).poll_write(cx, bytes)
                }

                fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
                    Pin::new(&mut self.io).poll_flush(cx)
                }

                fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
                    Pin::new(&mut self.io).poll_shutdown(cx)
                }

                fn poll_write_vectored(
                    mut self: Pin<&mut Self>,
                    cx: &mut Context<'_>,
                    slices: &[IoSlice<'_>],
                ) -> Poll<Result<usize>> {
                    Pin::new(&mut self.io).poll_write_vectored(cx, slices)
                }

                fn is_write_vectored(&self) -> bool {
                    self.io.is_write_vectored()
                }
            }
        };
    };
}
pub(super) use write_through;

write_through!(Prefixed);

/// A connection with or without TLS, as one type, so that every adapter is compiled once. The right side is boxed: the
/// state of a TLS session is a kilobyte that plain connections need not carry.
pub type Transport<IO> = Either<IO, Box<tls::ServerStream<Prefixed<IO>>>>;

/// Reads what is there into `buffer`, without letting it grow beyond `bytes_max`; 0 is the end of the stream or a full buffer.
///
/// # Cancel safety
/// What was read is in `buffer`.
pub async fn read_some<IO: AsyncRead + Unpin>(
    io: &mut IO,
    buffer: &mut BytesMut,
    bytes_max: usize,
) -> io::Result<usize> {
    std::future::poll_fn(|cx| {
        let mut chunk = [std::mem::MaybeUninit::uninit(); 512];
        let wanted = bytes_max.saturating_sub(buffer.len()).min(chunk.len());
        let mut read = ReadBuf::uninit(&mut chunk[..wanted]);
        ready!(Pin::new(&mut *io).poll_read(cx, &mut read))?;
        buffer.extend_from_slice(read.filled());
        Poll::Ready(Ok(read.filled().len()))
    })
    .await
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn the_prefix_comes_first_and_then_the_stream() {
        let (mut near, far) = tokio::io::duplex(64);
        near.write_all(b" world").await.unwrap();
        drop(near);
        let mut stream = Prefixed::new(BytesMut::from("hello"), far);
        let mut two = [0; 2];
        stream.read_exact(&mut two).await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!((&two, rest.as_str()), (b"he", "llo world"));
    }

    #[tokio::test]
    async fn reading_stops_at_the_bound() {
        let (mut near, mut far) = tokio::io::duplex(4096);
        near.write_all(&[7; 2000]).await.unwrap();
        let mut buffer = BytesMut::new();
        while read_some(&mut far, &mut buffer, 600).await.unwrap() > 0 {}
        assert_eq!(buffer.len(), 600);
    }
}

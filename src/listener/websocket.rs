//! MQTT over WebSocket (MQTT 5 section 6): the stream of packets inside binary frames.
//!
//! Promises: frames and packets need not meet ([MQTT-6.0.0-2]); a data frame that is not binary ends the connection ([MQTT-6.0.0-1]); a frame,
//! and a message of several, is bounded by the largest packet. Pings are answered. The opening handshake was HTTP's.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use futures_core::Stream;
use futures_sink::Sink;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

/// A byte stream in binary frames.
#[derive(Debug)]
pub struct Frames<IO> {
    socket: WebSocketStream<IO>,
    /// Of the last frame, what was not read.
    rest: Bytes,
}

/// Speaks the server's side over `io`. `packet_bytes_max` is the largest MQTT packet.
pub async fn open<IO: AsyncRead + AsyncWrite + Unpin>(io: IO, packet_bytes_max: usize) -> Frames<IO> {
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        // Every write is one frame that goes out at once.
        .write_buffer_size(0)
        .max_write_buffer_size(WRITE_BUFFER_BYTES_MAX)
        .max_message_size(Some(packet_bytes_max))
        .max_frame_size(Some(packet_bytes_max));
    let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await;
    Frames { socket, rest: Bytes::new() }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Frames<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(Pin::new(&mut self.socket).poll_next(cx)) {
                Some(Ok(Message::Binary(bytes))) => self.rest = bytes,
                Some(Ok(Message::Text(_))) => {
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "a text frame")));
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(())),
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
            }
        }
        let count = self.rest.len().min(buffer.remaining());
        buffer.put_slice(&self.rest[..count]);
        self.rest.advance(count);
        if self.rest.is_empty() {
            // Gives the frame's memory back.
            self.rest = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Frames<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(io_error)?;
        let count = bytes.len().min(FRAME_BYTES_MAX);
        let frame = Message::Binary(Bytes::copy_from_slice(&bytes[..count]));
        Pin::new(&mut self.socket).start_send(frame).map_err(io_error)?;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(io_error)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_close(cx).map_err(io_error)
    }
}

fn io_error(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}

const READ_BUFFER_BYTES: usize = 4096;
/// One outgoing frame; a larger write becomes several.
const FRAME_BYTES_MAX: usize = 64 * 1024;
/// One frame, and answers to pings beside it.
const WRITE_BUFFER_BYTES_MAX: usize = 2 * FRAME_BYTES_MAX;

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::*;

    async fn pair(bytes_max: usize) -> (WebSocketStream<DuplexStream>, Frames<DuplexStream>) {
        let (near, far) = tokio::io::duplex(1 << 16);
        (WebSocketStream::from_raw_socket(near, Role::Client, None).await, open(far, bytes_max).await)
    }

    async fn send(client: &mut WebSocketStream<DuplexStream>, message: Message) {
        std::future::poll_fn(|cx| Pin::new(&mut *client).poll_ready(cx)).await.unwrap();
        Pin::new(&mut *client).start_send(message).unwrap();
        std::future::poll_fn(|cx| Pin::new(&mut *client).poll_flush(cx)).await.unwrap();
    }

    async fn next(client: &mut WebSocketStream<DuplexStream>) -> Option<Message> {
        std::future::poll_fn(|cx| Pin::new(&mut *client).poll_next(cx)).await.and_then(Result::ok)
    }

    #[tokio::test]
    async fn frames_become_one_stream_and_writes_become_frames() {
        let (mut client, mut server) = pair(1000).await;
        for piece in ["he", "", "llo"] {
            send(&mut client, Message::binary(piece)).await;
        }
        let mut five = [0; 5];
        server.read_exact(&mut five).await.unwrap();
        assert_eq!(&five, b"hello");
        server.write_all(b"yes").await.unwrap();
        assert_eq!(next(&mut client).await, Some(Message::binary("yes")));
    }

    #[tokio::test]
    async fn a_ping_is_answered_while_the_stream_waits() {
        let (mut client, mut server) = pair(1000).await;
        send(&mut client, Message::Ping("x".into())).await;
        send(&mut client, Message::binary("y")).await;
        assert_eq!(server.read_u8().await.unwrap(), b'y');
        server.flush().await.unwrap();
        assert_eq!(next(&mut client).await, Some(Message::Pong("x".into())));
    }

    #[tokio::test]
    async fn text_and_what_is_too_large_are_errors_and_a_close_is_the_end() {
        for bad in [Message::text("hello"), Message::binary(vec![0; 1001])] {
            let (mut client, mut server) = pair(1000).await;
            send(&mut client, bad).await;
            assert_eq!(server.read_u8().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        let (mut client, mut server) = pair(1000).await;
        send(&mut client, Message::Close(None)).await;
        assert_eq!(server.read(&mut [0; 8]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_shutdown_says_goodbye() {
        let (mut client, mut server) = pair(1000).await;
        server.shutdown().await.unwrap();
        assert!(matches!(next(&mut client).await, Some(Message::Close(_))));
    }
}

//! Bodies, in and out.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming, SizeHint};

use super::events::Events;
use super::problem::Refused;
use super::stream::Download;
use crate::gateway::BoxError;
use crate::message::Reject;

/// What an answer carries.
#[derive(Debug)]
pub enum Body {
    Empty,
    Full(Bytes),
    /// Server-sent events, until somebody ends them.
    Events(Box<Events>),
    /// An upstream's answer.
    Download(Box<Download>),
}

impl From<String> for Body {
    fn from(text: String) -> Self {
        Body::Full(text.into())
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Self {
        Body::Full(bytes.into())
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        if bytes.is_empty() { Body::Empty } else { Body::Full(bytes) }
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = self.get_mut();
        match this {
            Body::Empty => Poll::Ready(None),
            Body::Full(_) => match std::mem::replace(this, Body::Empty) {
                Body::Full(bytes) => Poll::Ready(Some(Ok(Frame::data(bytes)))),
                Body::Empty | Body::Events(_) | Body::Download(_) => Poll::Ready(None),
            },
            Body::Events(events) => events.poll_next(cx).map(|event| event.map(|bytes| Ok(Frame::data(bytes)))),
            Body::Download(download) => download.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Empty => true,
            Body::Full(bytes) => bytes.is_empty(),
            Body::Events(_) => false,
            Body::Download(download) => download.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Empty => SizeHint::with_exact(0),
            Body::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Body::Events(_) => SizeHint::default(),
            Body::Download(download) => download.size_hint(),
        }
    }
}

/// Reads a whole body of at most `bytes_max`, waiting at most `patience` for each piece.
///
/// A body that says it is too large is refused before the first byte of it is read, so that `Expect: 100-continue` saves the upload.
///
/// # Errors
/// [`Reject::TooLarge`] with `limit`, [`Refused::BodyTimeout`], [`Refused::BodyBroken`].
pub async fn read(
    mut body: Incoming,
    limit: &'static str,
    bytes_max: usize,
    patience: Duration,
) -> Result<Bytes, Refused> {
    let too_large = || Refused::Reject(Reject::TooLarge { limit, bytes_max: bytes_max as u64 });
    let announced = hyper::body::Body::size_hint(&body).lower();
    if announced > bytes_max as u64 {
        return Err(too_large());
    }
    let mut first = Bytes::new();
    let mut whole = BytesMut::new();
    while !hyper::body::Body::is_end_stream(&body) {
        // Cancel safe: a frame is either returned or still in the body.
        let frame = match tokio::time::timeout(patience, body.frame()).await {
            Err(_) => return Err(Refused::BodyTimeout),
            Ok(None) => break,
            Ok(Some(Err(_))) => return Err(Refused::BodyBroken),
            Ok(Some(Ok(frame))) => frame,
        };
        // Trailers say nothing that we use.
        let Ok(data) = frame.into_data() else { continue };
        if first.len() + whole.len() + data.len() > bytes_max {
            return Err(too_large());
        }
        if first.is_empty() && whole.is_empty() {
            // Most bodies come in one piece and are not copied.
            first = data;
            continue;
        }
        if whole.is_empty() {
            whole.reserve(usize::try_from(announced).unwrap_or(0).max(first.len() + data.len()));
            whole.extend_from_slice(&first);
            first = Bytes::new();
        }
        whole.extend_from_slice(&data);
    }
    Ok(if whole.is_empty() { first } else { whole.freeze() })
}

//! One HTTP/1.1 connection to an upstream, driven by whoever uses it: no task, no channel, one read and one write for a small exchange.
//!
//! Promises: what is sent is what was asked for, with a length of our own saying; an answer that breaks off is an error; a request comes back unsent
//! only if not one byte of it was taken. The request's body goes on being sent while its answer is read.
//!
//! Not here: what the bytes mean (`tidegate_http`), when a connection is used again (`pool`), who is asked again (`proxy`).

use std::cell::RefCell;
use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::Instant;

use bytes::{Buf, Bytes, BytesMut};
use http::header::{AUTHORIZATION, CONTENT_LENGTH, HOST, TRAILER, TRANSFER_ENCODING};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty};
use hyper::body::{Body, Frame, SizeHint};
use tidegate_http::body::{Decoder, Length, Piece};
use tidegate_http::request::write_head;
use tidegate_http::response::{self, Head, Malformed};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

use super::connect::{HEAD_BYTES_MAX, Open, Stream};
use crate::timer::LazyTimer;

/// Why a body ended early.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A body on its way through, in either direction: streamed, with trailers.
pub type ProxyBody = UnsyncBoxBody<Bytes, BoxError>;

/// What is sent: a body whose first frame may have been read already, so that it goes out with the head.
pub struct Upload {
    pub first: Option<Frame<Bytes>>,
    pub rest: ProxyBody,
}

impl Upload {
    pub fn empty() -> Self {
        Upload { first: None, rest: ProxyBody::new(Empty::new().map_err(|never| match never {})) }
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.first.take() {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None => Pin::new(&mut self.rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        with_read(self.rest.size_hint(), self.first.as_ref())
    }
}

/// The size of a body of which `read` has been taken from the front.
pub fn with_read(mut rest: SizeHint, read: Option<&Frame<Bytes>>) -> SizeHint {
    let bytes = read.and_then(Frame::data_ref).map_or(0, |data| data.len() as u64);
    match rest.exact() {
        Some(exact) => rest.set_exact(exact + bytes),
        None => {
            let (lower, upper) = (rest.lower(), rest.upper());
            rest = SizeHint::new();
            rest.set_lower(lower + bytes);
            upper.into_iter().for_each(|upper| rest.set_upper(upper + bytes));
        }
    }
    rest
}

/// See the module's documentation.
pub struct Link {
    stream: Stream,
    /// What came and is not taken yet.
    read: BytesMut,
    out: Out,
    /// What is still to be sent of a request.
    upload: Option<Upload>,
    /// Its last chunk has been put behind what is to be sent; its end is still to be heard of.
    upload_ended: bool,
    /// Bytes of it, where its head has said how many.
    upload_left: Option<u64>,
    /// The trailers that its head has announced, in lower case; others are not passed on: nobody downstream expects them.
    announced: Vec<String>,
    /// Of the request under way.
    method: Method,
    answer: Decoder,
    /// Whether the connection may be used again after this answer.
    keep_alive: bool,
    /// Why nothing more can be sent. An answer may have come before that.
    broken: Option<io::Error>,
    timer: LazyTimer,
    _open: Open,
}

/// Why there is no answer.
pub enum SendFault {
    /// Nothing of the request was sent; it is whole.
    Unsent,
    Broken(Fault),
    /// The deadline passed.
    Timeout,
}

/// What ends a connection.
#[derive(Debug)]
pub enum Fault {
    Io(io::Error),
    /// What came is not HTTP, or can be read in two ways.
    Malformed(&'static str),
    /// It was closed before the answer began.
    Closed,
    /// The body that was to be sent failed: the asker's fault.
    Upload(BoxError),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Io(error) => write!(f, "connection error: {error}"),
            Fault::Malformed(what) => write!(f, "malformed answer: {what}"),
            Fault::Closed => f.write_str("the connection was closed before an answer came"),
            Fault::Upload(error) => write!(f, "the request's body failed: {error}"),
        }
    }
}

impl std::error::Error for Fault {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Fault::Io(error) => Some(error),
            Fault::Upload(error) => Some(&**error),
            Fault::Malformed(_) | Fault::Closed => None,
        }
    }
}

impl From<Malformed> for Fault {
    fn from(Malformed(what): Malformed) -> Self {
        Fault::Malformed(what)
    }
}

impl Link {
    pub fn new(stream: Stream, open: Open) -> Self {
        Link {
            stream,
            read: BytesMut::new(),
            out: Out::default(),
            upload: None,
            upload_ended: false,
            upload_left: None,
            announced: Vec::new(),
            method: Method::GET,
            answer: Decoder::new(Length::Exactly(0)),
            keep_alive: true,
            broken: None,
            timer: LazyTimer::default(),
            _open: open,
        }
    }

    /// Whether an idle connection can take a request: a peer that has closed it, or says what nobody asked for, is found out here.
    pub fn is_usable(&mut self) -> bool {
        self.is_at_rest() && self.poll_read(&mut Context::from_waker(Waker::noop())).is_pending()
    }

    /// Whether the last request was sent and answered as a whole, and the connection is to be kept.
    pub fn is_at_rest(&self) -> bool {
        self.keep_alive && self.broken.is_none() && self.answer.is_ended() && self.is_sent() && self.read.is_empty()
    }

    /// Sends a request in origin-form and waits for the answer's head. The answer's body is then to be read with [`Link::poll_body`].
    ///
    /// Takes the request's body, unless it comes back [`SendFault::Unsent`].
    ///
    /// # Cancel safety
    /// Dropped, the request may have been sent; the link has to be dropped with it.
    pub async fn send(&mut self, request: &mut Request<Upload>, deadline: Instant) -> Result<Response<()>, SendFault> {
        let bytes = request.body().size_hint().exact();
        let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
        let length = bytes.map_or(Length::Chunked, Length::Exactly);
        write_head(&mut self.out.head, request.method(), target, request.headers(), length);
        self.method = request.method().clone();
        self.upload_left = bytes;
        self.upload_ended = false;
        self.announced.clear();
        let names = request.headers().get_all(TRAILER).iter().filter_map(|names| names.to_str().ok());
        self.announced.extend(names.flat_map(|names| names.split(',')).map(|name| name.trim().to_ascii_lowercase()));
        // What has been read already leaves with the head.
        let first = request.body().first.as_ref().and_then(Frame::data_ref).cloned();
        first.map_or(Ok(()), |data| self.put(data)).map_err(SendFault::Broken)?;
        let written = std::future::poll_fn(|cx| match self.out.poll_once(&mut self.stream, cx) {
            Poll::Ready(written) => Poll::Ready(Some(written)),
            Poll::Pending => self.timer.poll_past(cx, deadline.into()).map(|()| None),
        });
        match written.await {
            Some(Ok(())) => {}
            Some(Err(_)) => return Err(SendFault::Unsent),
            None => return Err(SendFault::Timeout),
        }
        let mut upload = std::mem::replace(request.body_mut(), Upload::empty());
        // Trailers that came first are still to be sent.
        upload.first = upload.first.filter(|frame| !frame.is_data());
        let is_over = self.upload_left == Some(0) && upload.is_end_stream();
        self.upload = (!is_over).then_some(upload);
        let answered = std::future::poll_fn(|cx| match self.poll_head(cx) {
            Poll::Ready(head) => Poll::Ready(Some(head)),
            Poll::Pending => self.timer.poll_past(cx, deadline.into()).map(|()| None),
        });
        let head = match answered.await {
            Some(Ok(head)) => head,
            Some(Err(fault)) => return Err(SendFault::Broken(fault)),
            None => return Err(SendFault::Timeout),
        };
        self.answer = Decoder::new(head.length);
        self.keep_alive = head.keep_alive;
        let mut response = Response::new(());
        *response.status_mut() = head.status;
        *response.version_mut() = head.version;
        *response.headers_mut() = head.headers;
        Ok(response)
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Head, Fault>> {
        self.upload(cx)?;
        let mut interim = 0;
        let mut parse = true;
        loop {
            let head = if parse { response::take_head(&mut self.read, &self.method)? } else { None };
            match head {
                Some(head) if head.status == StatusCode::SWITCHING_PROTOCOLS => {
                    return Poll::Ready(Err(Fault::Malformed("another protocol, unasked")));
                }
                // RFC 9110 section 15.2: more of them may come than are of use to anybody.
                Some(head) if head.status.is_informational() => {
                    interim += 1;
                    if interim > INTERIM_MAX {
                        return Poll::Ready(Err(Fault::Malformed("interim answers without end")));
                    }
                    continue;
                }
                Some(head) => return Poll::Ready(Ok(head)),
                None if self.read.len() >= HEAD_BYTES_MAX => {
                    return Poll::Ready(Err(Fault::Malformed("a head that is too large")));
                }
                None => {}
            }
            let before = self.read.len();
            match ready!(self.poll_read(cx)) {
                Ok(0) => return Poll::Ready(Err(self.broken.take().map_or(Fault::Closed, Fault::Io))),
                Ok(_) => {}
                Err(error) => return Poll::Ready(Err(Fault::Io(error))),
            }
            // A head that comes byte by byte is not parsed with every one of them.
            parse = self.read.get(before..).is_some_and(|came| came.contains(&b'\n'));
        }
    }

    /// The next frame of the answer's body; None at its end.
    pub fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Fault>>> {
        if let Err(fault) = self.upload(cx) {
            return Poll::Ready(Some(Err(fault)));
        }
        loop {
            match self.answer.next(&mut self.read) {
                Ok(Piece::Data(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Ok(Piece::Trailers(trailers)) => return Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
                Ok(Piece::End) => return Poll::Ready(None),
                Ok(Piece::Wanting) => {}
                Err(malformed) => return Poll::Ready(Some(Err(malformed.into()))),
            }
            let ended = match ready!(self.poll_read(cx)) {
                Ok(0) => self.answer.close().map_err(Fault::from),
                Ok(_) => continue,
                Err(error) => Err(Fault::Io(error)),
            };
            return Poll::Ready(ended.err().map(Err));
        }
    }

    /// Whether all of the answer's body has been taken.
    pub fn is_answered(&self) -> bool {
        self.answer.is_ended()
    }

    /// What is left of the answer's body.
    pub fn size_hint(&self) -> SizeHint {
        self.answer.left().map_or_else(SizeHint::new, SizeHint::with_exact)
    }

    /// Sends what can be sent now.
    fn upload(&mut self, cx: &mut Context<'_>) -> Result<(), Fault> {
        while self.broken.is_none() {
            match self.out.poll_all(&mut self.stream, cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => {
                    self.upload = None;
                    self.broken = Some(error);
                    break;
                }
                Poll::Pending => break,
            }
            let Some(upload) = &mut self.upload else { break };
            match Pin::new(upload).poll_frame(cx) {
                Poll::Pending => break,
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => self.put(data)?,
                    Err(frame) => self.end_upload(frame.into_trailers().ok())?,
                },
                Poll::Ready(None) => {
                    self.end_upload(None)?;
                    self.upload = None;
                }
                Poll::Ready(Some(Err(error))) => return Err(Fault::Upload(error)),
            }
        }
        Ok(())
    }

    fn is_sent(&self) -> bool {
        self.out.is_empty() && (self.upload.is_none() || self.upload_ended || self.upload_left == Some(0))
    }

    /// Puts a piece of the request's body behind what is to be sent.
    fn put(&mut self, data: Bytes) -> Result<(), Fault> {
        if data.is_empty() {
            return Ok(());
        }
        if self.upload_ended {
            return Err(Fault::Upload(WRONG_LENGTH.into()));
        }
        match &mut self.upload_left {
            Some(left) => {
                *left = left.checked_sub(data.len() as u64).ok_or_else(|| Fault::Upload(WRONG_LENGTH.into()))?;
            }
            None => self.out.head.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes()),
        }
        let tail: &[u8] = if self.upload_left.is_none() { b"\r\n" } else { b"" };
        if data.len() <= COPIED_BYTES_MAX {
            self.out.head.extend_from_slice(&data);
            self.out.head.extend_from_slice(tail);
        } else {
            self.out.data = data;
            self.out.tail = tail;
        }
        Ok(())
    }

    fn end_upload(&mut self, trailers: Option<HeaderMap>) -> Result<(), Fault> {
        match self.upload_left {
            Some(0) => return Ok(()),
            Some(_) => return Err(Fault::Upload(WRONG_LENGTH.into())),
            None if self.upload_ended => return Ok(()),
            None => self.upload_ended = true,
        }
        let out = &mut self.out.head;
        out.extend_from_slice(b"0\r\n");
        for (name, value) in trailers.iter().flatten() {
            // RFC 9110 section 6.5.1: what frames, routes or authenticates comes before a body or not at all.
            let is_announced = self.announced.iter().any(|announced| name == announced.as_str());
            if !is_announced || [CONTENT_LENGTH, TRANSFER_ENCODING, HOST, TRAILER, AUTHORIZATION].contains(name) {
                continue;
            }
            for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
                out.extend_from_slice(part);
            }
        }
        out.extend_from_slice(b"\r\n");
        Ok(())
    }

    /// Reads what has come; 0 is the end.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let expected = usize::try_from(self.answer.expected()).unwrap_or(usize::MAX);
        if expected >= DIRECT_BYTES_MIN {
            self.read.reserve(expected.min(DIRECT_BYTES_MAX));
            return poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.read);
        }
        // Most answers are small: a buffer that all connections of a worker share, and a copy of what came, keep an idle connection small.
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(SCRATCH_BYTES, 0);
            let mut came = ReadBuf::new(scratch);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut came))?;
            self.read.extend_from_slice(came.filled());
            Poll::Ready(Ok(came.filled().len()))
        })
    }
}

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// What is to be written, in this order.
#[derive(Default)]
struct Out {
    /// Heads, chunk sizes, small pieces of bodies.
    head: Vec<u8>,
    /// Of these, what has been written.
    at: usize,
    /// One large piece.
    data: Bytes,
    tail: &'static [u8],
}

impl Out {
    fn is_empty(&self) -> bool {
        self.at == self.head.len() && self.data.is_empty() && self.tail.is_empty()
    }

    /// Writes once.
    fn poll_once(&mut self, stream: &mut Stream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let head = self.head.get(self.at..).unwrap_or_default();
        let stream = Pin::new(stream);
        let written = if self.data.is_empty() && self.tail.is_empty() {
            ready!(stream.poll_write(cx, head))?
        } else {
            ready!(
                stream
                    .poll_write_vectored(cx, &[IoSlice::new(head), IoSlice::new(&self.data), IoSlice::new(self.tail)])
            )?
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        let of_head = written.min(head.len());
        let of_data = (written - of_head).min(self.data.len());
        self.at += of_head;
        self.data.advance(of_data);
        self.tail = self.tail.get(written - of_head - of_data..).unwrap_or_default();
        if self.at == self.head.len() {
            self.at = 0;
            self.head.clear();
            self.head.shrink_to(HEAD_BYTES_KEPT);
        }
        Poll::Ready(Ok(()))
    }

    /// Writes everything, and sees it off.
    fn poll_all(&mut self, stream: &mut Stream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            ready!(self.poll_once(stream, cx))?;
        }
        Pin::new(stream).poll_flush(cx)
    }
}

/// 1xx answers before the one that counts.
const INTERIM_MAX: u32 = 16;
const WRONG_LENGTH: &str = "its length is not what its head says";
/// Smaller pieces of a body are copied behind the head: one buffer is cheaper to write than two.
const COPIED_BYTES_MAX: usize = 2048;
/// Room for a head that a connection keeps.
const HEAD_BYTES_KEPT: usize = 4096;
/// An answer's body with at least so much to come is read without a copy, so much at once.
const DIRECT_BYTES_MIN: usize = 16 << 10;
const DIRECT_BYTES_MAX: usize = 64 << 10;
const SCRATCH_BYTES: usize = 16 << 10;

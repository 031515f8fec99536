//! An answer's body on its way to a client, kept while it passes.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::Instant;

use super::flight::{Landed, Lead};
use super::{Cached, Draft};
use crate::cache::response::Entry;
use crate::gateway::{BoxError, ProxyBody};

pub(super) struct Tee {
    /// Read already, and still to be given.
    ready: VecDeque<Frame<Bytes>>,
    rest: ProxyBody,
    keeping: Option<Box<Keeping>>,
}

struct Keeping {
    cached: Arc<Cached>,
    draft: Draft,
    body: BytesMut,
    bytes_max: u64,
    lead: Option<Lead>,
}

impl Tee {
    pub(super) fn new(rest: ProxyBody, cached: Arc<Cached>, draft: Draft, bytes_max: u64, lead: Option<Lead>) -> Self {
        let keeping = Keeping { cached, draft, body: BytesMut::new(), bytes_max, lead };
        Tee { ready: VecDeque::new(), rest, keeping: Some(Box::new(keeping)) }
    }

    /// Reads ahead until the whole is kept, then gives it back; `None`: it is not to be had by then, or not to be kept, and streams on from here.
    ///
    /// # Errors
    /// The body broke off.
    pub(super) async fn fill(&mut self, until: Instant) -> Result<Option<Arc<Entry>>, BoxError> {
        loop {
            if self.rest.is_end_stream() {
                return Ok(self.finish());
            }
            if self.keeping.is_none() {
                return Ok(None);
            }
            let next = std::future::poll_fn(|cx| Pin::new(&mut self.rest).poll_frame(cx));
            match tokio::time::timeout_at(until, next).await {
                Err(_) => return Ok(None),
                Ok(None) => return Ok(self.finish()),
                Ok(Some(Err(error))) => return Err(error),
                Ok(Some(Ok(frame))) => {
                    self.note(&frame);
                    self.ready.push_back(frame);
                }
            }
        }
    }

    fn note(&mut self, frame: &Frame<Bytes>) {
        let Some(keeping) = &mut self.keeping else { return };
        let room = keeping.bytes_max.saturating_sub(keeping.body.len() as u64);
        match frame.data_ref() {
            Some(data) if data.len() as u64 <= room => keeping.body.extend_from_slice(data),
            // Too large, or with trailers, for which there is no place.
            Some(_) | None => {
                if let Some(lead) = self.keeping.take().and_then(|keeping| keeping.lead) {
                    lead.land(Landed::NotKept);
                }
            }
        }
    }

    fn finish(&mut self) -> Option<Arc<Entry>> {
        let Keeping { cached, draft, body, lead, .. } = *self.keeping.take()?;
        let entry = cached.keep(draft, body.freeze());
        if let Some(lead) = lead {
            lead.land(Landed::Kept(entry.clone()));
        }
        Some(entry)
    }
}

impl Body for Tee {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(frame) = self.ready.pop_front() {
            return Poll::Ready(Some(Ok(frame)));
        }
        let frame = std::task::ready!(Pin::new(&mut self.rest).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                self.note(frame);
                if self.rest.is_end_stream() {
                    self.finish();
                }
            }
            Some(Err(_)) => self.keeping = None,
            None => drop(self.finish()),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.ready.is_empty() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let ready: u64 = self.ready.iter().filter_map(Frame::data_ref).map(|data| data.len() as u64).sum();
        let rest = self.rest.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(ready));
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(ready));
        }
        hint
    }
}

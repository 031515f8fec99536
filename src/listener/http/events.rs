//! Server-sent events: a subscription as the body of an answer.
//!
//! One event per message:
//! ```text
//! id: EPOCH/SEQ
//! data: {"topic":"dev/d1/telemetry","payload":"21.5","content_type":"text/plain","time_ms":1790000000000,"retain":false,"device":"d1","id":"EPOCH/SEQ"}
//! ```
//! A payload that is not UTF-8 stands in `payload_base64` instead. A comment every 15 seconds keeps proxies from closing the stream and
//! finds out that the reader is gone. A reader that does not read fills its outbox, which drops and counts (`outbox_messages_max`,
//! `outbox_bytes_max`), and is closed after `write_timeout_ms`.

use std::collections::VecDeque;
use std::fmt;
use std::fmt::Write as _;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use tokio::time::Sleep;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::seats::Seat;
use super::stream::Slot;
use crate::gateway::{Delivery, Drained};
use crate::listener::UnderWay;

const HEARTBEAT: Duration = Duration::from_secs(15);
/// Messages turned into text per wake-up.
const BATCH: usize = 64;

/// One reader's stream. Its session and subscription end when it is dropped.
pub struct Events {
    seat: Seat,
    /// Retained messages, sent first.
    first: VecDeque<Delivery>,
    drained: Drained,
    heartbeat: Pin<Box<Sleep>>,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
    greeted: bool,
    _permit: Slot,
    _under_way: UnderWay,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Events")
    }
}

impl Events {
    pub fn new(
        seat: Seat,
        retained: Vec<Delivery>,
        permit: Slot,
        under_way: UnderWay,
        shutdown: CancellationToken,
    ) -> Self {
        Events {
            seat,
            first: retained.into(),
            drained: Drained::default(),
            heartbeat: Box::pin(tokio::time::sleep(HEARTBEAT)),
            ended: Box::pin(shutdown.cancelled_owned()),
            greeted: false,
            _permit: permit,
            _under_way: under_way,
        }
    }

    /// The next piece of the stream; `None` when it ends.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.ended.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        let mut text = String::new();
        if !self.greeted {
            // Proxies and clients see at once that the stream stands.
            self.greeted = true;
            text.push_str(": subscribed\n\n");
        }
        let Some(client) = self.seat.client() else { return Poll::Ready(None) };
        let before = text.len();
        for delivery in self.first.drain(..self.first.len().min(BATCH)) {
            write_event(&mut text, &delivery);
        }
        if self.first.is_empty() && client.outbox.poll_drain(cx, &mut self.drained, BATCH).is_ready() {
            for delivery in self.drained.deliveries.drain(..) {
                write_event(&mut text, &delivery);
                client.count_delivered(1);
            }
            self.drained.completions.clear();
        }
        if text.len() > before || before > 0 {
            self.heartbeat.as_mut().reset(tokio::time::Instant::now() + HEARTBEAT);
            return Poll::Ready(Some(text.into()));
        }
        if self.drained.close.is_some() {
            return Poll::Ready(None);
        }
        if self.heartbeat.as_mut().poll(cx).is_ready() {
            self.heartbeat.as_mut().reset(tokio::time::Instant::now() + HEARTBEAT);
            // Registers the new deadline with this task.
            let _ = self.heartbeat.as_mut().poll(cx);
            // A revoked device hears nothing more.
            return Poll::Ready(self.seat.is_current().then(|| Bytes::from_static(b":\n\n")));
        }
        Poll::Pending
    }
}

fn write_event(text: &mut String, delivery: &Delivery) {
    let message = &delivery.message;
    let (prefix, rest) = delivery.topic_parts();
    let id = format!("{}/{}", message.id.epoch, message.id.seq);
    let mut event = serde_json::Map::new();
    event.insert("topic".into(), format!("{prefix}{rest}").into());
    match std::str::from_utf8(&message.payload) {
        Ok(payload) => event.insert("payload".into(), payload.into()),
        Err(_) => event.insert("payload_base64".into(), STANDARD.encode(&message.payload).into()),
    };
    if let Some(content_type) = message.content_type() {
        event.insert("content_type".into(), content_type.into());
    }
    event.insert("time_ms".into(), message.ingested_ms.into());
    event.insert("retain".into(), delivery.retain.into());
    if let Some(device) = &message.origin.device {
        event.insert("device".into(), device.as_str().into());
    }
    event.insert("id".into(), id.as_str().into());
    // JSON has no raw line break, so one data line holds it. Writing to a String cannot fail.
    let _ = write!(text, "id: {id}\ndata: {}\n\n", serde_json::Value::Object(event));
}

/// The end of a subscription is not an event to wait for.
impl Drop for Events {
    fn drop(&mut self) {
        self.seat.close(Instant::now());
    }
}

/// Shared by all workers: how many streams are open.
pub type Streams = Arc<portable_atomic::AtomicU32>;

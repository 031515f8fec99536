//! `/api/v1/tail?filter=`: messages as they pass, as server-sent events, for `tidegate tail` and the dashboard.
//!
//! An operator sees every topic, payloads included; that is what the token is for. A reader that cannot keep up loses messages, never holds
//! anybody up: its subscription is `QoS` 0.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::json;

use super::api::problem;
use super::{Admin, Shared};
use crate::hub::{Delivery, Drained, Filter, Outbox, OutboxLimits, SubscribeOptions};
use crate::message::SessionId;

#[derive(Deserialize)]
pub(super) struct TailQuery {
    filter: Option<String>,
}

pub(super) async fn tail(State(admin): Shared, Query(query): Query<TailQuery>) -> Response {
    let text = query.filter.unwrap_or_else(|| "#".into());
    let filter = match Filter::parse(&text) {
        Ok(filter) => filter,
        Err(reject) => return (StatusCode::BAD_REQUEST, problem(&reject.to_string())).into_response(),
    };
    let limits = OutboxLimits { messages_max: 256, bytes_max: 1 << 20, crowded_wait: std::time::Duration::ZERO };
    let follower = Follower::new(admin, filter, limits);
    match follower {
        Ok(follower) => {
            let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
            (headers, Body::new(follower)).into_response()
        }
        Err(detail) => (StatusCode::SERVICE_UNAVAILABLE, problem(&detail)).into_response(),
    }
}

/// The body of one tail: its subscription lives as long as it does.
struct Follower {
    admin: Arc<Admin>,
    filter: Filter,
    outbox: Arc<Outbox>,
    drained: Drained,
    ended: std::pin::Pin<Box<tokio_util::sync::WaitForCancellationFutureOwned>>,
}

impl Follower {
    fn new(admin: Arc<Admin>, filter: Filter, limits: OutboxLimits) -> Result<Self, String> {
        let session = SessionId(FOLLOWER_IDS.fetch_add(1, portable_atomic::Ordering::Relaxed));
        let outbox = Arc::new(Outbox::new(session, limits));
        let subscribed = admin.gateway.hub.subscribe(&filter, &outbox, 0, SubscribeOptions::default());
        subscribed.map_err(|reject| reject.to_string())?;
        let ended = Box::pin(admin.shutdown.clone().cancelled_owned());
        Ok(Follower { admin, filter, outbox, drained: Drained::default(), ended })
    }
}

/// Followers are no sessions of devices, so their ids count up from where those never get.
static FOLLOWER_IDS: portable_atomic::AtomicU64 = portable_atomic::AtomicU64::new(1 << 63);

impl Drop for Follower {
    fn drop(&mut self) {
        self.admin.gateway.hub.unsubscribe(&self.filter, self.outbox.session(), 0);
    }
}

impl hyper::body::Body for Follower {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, Infallible>>> {
        if self.ended.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        let this = &mut *self;
        if this.outbox.poll_drain(cx, &mut this.drained, 64).is_pending() {
            return Poll::Pending;
        }
        let events: String = this.drained.deliveries.drain(..).map(|delivery| event(&delivery)).collect();
        Poll::Ready(Some(Ok(hyper::body::Frame::data(events.into()))))
    }
}

fn event(delivery: &Delivery) -> String {
    let message = &delivery.message;
    let payload = match std::str::from_utf8(&message.payload) {
        Ok(text) => json!(text),
        Err(_) => json!({ "bytes": message.payload.len() }),
    };
    let data = json!({
        "topic": message.topic.as_str(),
        "device": message.origin.device.as_ref().map(|device| device.as_str()),
        "protocol": message.origin.protocol.as_str(),
        "time_ms": message.ingested_ms,
        "id": format!("{}/{}", message.id.epoch, message.id.seq),
        "payload": payload,
    });
    format!("data: {data}\n\n")
}

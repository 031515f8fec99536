//! Publishing, reading, following and waiting for commands.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{ACCEPT, AGE, CACHE_CONTROL, CONTENT_TYPE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_NONE_MATCH};
use http::{Response, StatusCode};
use parking_lot::Mutex;
use tidegate_http::traceparent;

use super::Connection;
use super::body::Body;
use super::call::Target;
use super::events::Events;
use super::problem::Refused;
use super::seats::Seat;
use super::stream::Slot;
use crate::gateway::cached::is_listed;
use crate::gateway::{Draft, Drained, Published, SendRetained, SubscribeOptions, wall_ms};
use crate::message::{Completion, Device, Message, Properties, Qos, Receipt, Reject};

/// The id that the gateway gave an accepted message.
const MESSAGE_ID: HeaderName = HeaderName::from_static("tidegate-message-id");
/// A command's request id and name, as the answer to it needs them.
const COMMAND_REQUEST: HeaderName = HeaderName::from_static("tidegate-request");
const COMMAND_NAME: HeaderName = HeaderName::from_static("tidegate-command");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// RFC 9110 has no bound for a media type; the registry's names have at most 127 characters on each side of the slash.
const CONTENT_TYPE_BYTES_MAX: usize = 256;

impl Connection {
    /// Hands one message in, and answers when the delivery class holds.
    pub async fn publish(
        &self,
        device: Option<Arc<Device>>,
        target: &Target,
        draft: Draft,
    ) -> Result<Response<Body>, Refused> {
        let waits = draft.qos != Qos::AtMostOnce;
        let outcome = waits.then(|| Arc::new(Outcome::default()));
        let completion = outcome.clone().map(|outcome| outcome as Arc<dyn Completion>);
        let published = self
            .seats
            .with(&self.gateway, &self.conn, device, |gateway, client| {
                let done = completion.as_ref().map(|completion| (completion, 0));
                gateway.publish(client, target.address(), draft, done, Instant::now())
            })
            .await??;
        let receipt = match (published, outcome) {
            (Published::Done(receipt), _) => receipt,
            (Published::Pending, Some(outcome)) => {
                let patience = Duration::from_millis(self.limits.write_timeout_ms.into());
                tokio::time::timeout(patience, outcome.wait()).await.map_err(|_| Refused::NoOutcome)??
            }
            // Without a completion nothing is ever pending.
            (Published::Pending, None) => return Err(Refused::NoOutcome),
        };
        let mut response = Response::new(Body::Empty);
        *response.status_mut() = StatusCode::ACCEPTED;
        let id = format!("{}/{}/{}", self.gateway.config().name, receipt.id.epoch, receipt.id.seq);
        if let Ok(id) = HeaderValue::try_from(id) {
            response.headers_mut().insert(MESSAGE_ID, id);
        }
        Ok(response)
    }

    /// The last value of a topic.
    pub async fn read(
        &self,
        device: Option<Arc<Device>>,
        target: &Target,
        headers: &HeaderMap,
    ) -> Result<Response<Body>, Refused> {
        let message = self
            .seats
            .with(&self.gateway, &self.conn, device, |gateway, client| {
                gateway.read(client, target.address(), Instant::now())
            })
            .await??;
        let tag = format!("\"{}-{}\"", message.id.epoch, message.id.seq);
        let unchanged = is_listed(headers.get_all(IF_NONE_MATCH), Some(tag.as_bytes()));
        let mut response = Response::new(Body::Empty);
        let out = response.headers_mut();
        out.insert(AGE, HeaderValue::from(wall_ms().saturating_sub(message.ingested_ms) / 1000));
        // The value may change at any moment, and not everybody may see it.
        out.insert(CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
        if let Ok(tag) = HeaderValue::try_from(tag) {
            out.insert(ETAG, tag);
        }
        if unchanged {
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            return Ok(response);
        }
        out.insert(CONTENT_TYPE, content_type(&message));
        *response.body_mut() = Body::Full(message.payload.clone());
        Ok(response)
    }

    fn stream_slot(&self) -> Result<Slot, Reject> {
        let streams_max = self.limits.event_streams_max;
        Slot::take(&self.shared.streams, "event_streams_max", streams_max, Duration::from_secs(10))
    }

    /// A subscription as a stream of events.
    pub async fn follow(&self, device: Option<Arc<Device>>, filter: &str) -> Result<Response<Body>, Refused> {
        let permit = self.stream_slot()?;
        let name = format!("{}#{}", self.conn.peer, self.shared.next_name());
        let (mut seat, _) = Seat::open(&self.gateway, &self.conn, device, &name, None).await?;
        let (gateway, client) = seat.parts().ok_or(Reject::ShuttingDown)?;
        let options = SubscribeOptions { retain_as_published: true, ..SubscribeOptions::default() };
        let subscribed = gateway.subscribe(client, filter, 0, options, SendRetained::Always, Instant::now())?;
        let events = Events::new(seat, subscribed.retained, permit, self.activity.begin(), self.shutdown.clone());
        let mut response = Response::new(Body::Events(Box::new(events)));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        Ok(response)
    }

    /// The next command for the device: at once if one waits, otherwise within `wait`; 204 when none came.
    ///
    /// The subscription outlives the request, so a command sent between two polls waits for the next. Of two polls of one device at
    /// once the later one wins and the earlier is answered 204. A command counts as delivered when it is handed to the connection: the
    /// sender knows that it arrived by the device's answer.
    pub async fn command(&self, device: Option<Arc<Device>>, wait: Duration) -> Result<Response<Body>, Refused> {
        let device = device.ok_or(Reject::Unauthenticated)?;
        let _permit = self.stream_slot()?;
        // The connection's own session begins too: between two polls the device is still present.
        self.seats.with(&self.gateway, &self.conn, Some(device.clone()), |_, _| ()).await?;
        let keep = Some(self.limits.session_expiry_max.0);
        let (mut seat, resumed) = Seat::open(&self.gateway, &self.conn, Some(device), "command", keep).await?;
        let (gateway, client) = seat.parts().ok_or(Reject::ShuttingDown)?;
        if !resumed || client.subscriptions() == 0 {
            let options = SubscribeOptions { qos: Qos::AtLeastOnce, ..SubscribeOptions::default() };
            let subscribed = gateway.subscribe(client, "c/#", 0, options, SendRetained::Never, Instant::now());
            if let Err(reject) = subscribed {
                seat.forget();
                return Err(reject.into());
            }
        } else {
            gateway.check_current(client)?;
        }
        let client = seat.client().ok_or(Reject::ShuttingDown)?;
        let mut drained = Drained::default();
        let wait = wait.min(self.limits.idle_timeout.0);
        tokio::select! {
            // Cancel safe: nothing is taken unless it completes.
            () = client.outbox.drain(&mut drained, 1) => {}
            () = tokio::time::sleep(wait) => {}
            () = self.shutdown.cancelled() => {}
        }
        let Some(delivery) = drained.deliveries.pop_front() else {
            let mut response = Response::new(Body::Empty);
            *response.status_mut() = StatusCode::NO_CONTENT;
            return Ok(response);
        };
        client.count_delivered(1);
        let mut response = Response::new(Body::Full(delivery.message.payload.clone()));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, content_type(&delivery.message));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        // `/REQ/NAME`, NAME possibly in several levels.
        let (_, rest) = delivery.topic_parts();
        let rest = rest.trim_start_matches('/');
        let (request, name) = rest.split_once('/').unwrap_or((rest, ""));
        for (header, value) in [(COMMAND_REQUEST, request), (COMMAND_NAME, name)] {
            // A topic level may hold what a header may not; then the device has to be told in the payload.
            if let Ok(value) = HeaderValue::try_from(value) {
                headers.insert(header, value);
            }
        }
        Ok(response)
    }
}

/// A message as the request's headers and body describe it.
///
/// # Errors
/// [`Reject::Malformed`].
pub fn draft(headers: &HeaderMap, payload: Bytes, qos: Qos, retain: bool) -> Result<Draft, Reject> {
    let content_type = match headers.get(CONTENT_TYPE) {
        None => None,
        Some(value) => match value.to_str() {
            Ok(text) if text.len() <= CONTENT_TYPE_BYTES_MAX => Some(text.into()),
            Ok(_) | Err(_) => return Err(Reject::Malformed { what: "a content type that is no media type" }),
        },
    };
    // An invalid traceparent is ignored, not refused (W3C Trace Context section 3.2.2).
    let traceparent =
        headers.get(TRACEPARENT).and_then(|value| value.to_str().ok()).filter(|text| traceparent::is_valid(text));
    let properties = (content_type.is_some() || traceparent.is_some()).then(|| {
        Box::new(Properties { content_type, traceparent: traceparent.map(Into::into), ..Properties::default() })
    });
    Ok(Draft { payload, qos, retain, properties })
}

/// Whether the asker wants a stream of events.
pub fn wants_events(headers: &HeaderMap) -> bool {
    let of_events = |range: &str| {
        let media_type = range.split(';').next().unwrap_or_default();
        media_type.trim().eq_ignore_ascii_case("text/event-stream")
    };
    headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()).any(|value| value.split(',').any(of_events))
}

fn content_type(message: &Message) -> HeaderValue {
    let known = message.content_type().and_then(|text| HeaderValue::try_from(text).ok());
    known.unwrap_or(HeaderValue::from_static("application/octet-stream"))
}

/// The outcome of one message, waited for by its request.
#[derive(Default)]
struct Outcome {
    state: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    outcome: Option<Result<Receipt, Reject>>,
    waker: Option<Waker>,
}

impl Outcome {
    async fn wait(&self) -> Result<Receipt, Reject> {
        Wait(self).await
    }
}

impl Completion for Outcome {
    fn complete(&self, _token: u64, outcome: Result<Receipt, Reject>) {
        let waker = {
            let mut state = self.state.lock();
            state.outcome = Some(outcome);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

struct Wait<'a>(&'a Outcome);

impl Future for Wait<'_> {
    type Output = Result<Receipt, Reject>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.0.state.lock();
        match state.outcome.take() {
            Some(outcome) => Poll::Ready(outcome),
            None => {
                state.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_wanted_only_when_asked_for() {
        let headers = |value: &'static str| HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(value))]);
        assert!(wants_events(&headers("text/event-stream")));
        assert!(wants_events(&headers("text/html, Text/Event-Stream;q=0.5")));
        for no in ["*/*", "text/*", "application/json", "x-text/event-stream"] {
            assert!(!wants_events(&headers(no)), "{no}");
        }
    }
}

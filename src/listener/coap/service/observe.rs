//! Observations: who follows what, and what he is sent.

use std::collections::VecDeque;
use std::time::Instant;

use tidegate_coap::endpoint::Delivery as Sent;
use tidegate_coap::{Code, Notification, ObserverId, Request};

use super::{Moment, Reply, Service, refuse, value};
use crate::gateway::{Delivery, Part, SendRetained, SubscribeOptions, is_expired, wall_ms};
use crate::listener::coap::answer::{Answer, code, format_of};
use crate::listener::coap::call::Space;
use crate::listener::coap::contexts::ContextId;
use crate::listener::coap::observations::Observation;
use crate::message::{Qos, Reject};
use crate::telemetry::meters;

impl Service {
    /// GET with Observe 0. Where policy or a limit does not let the asker subscribe, it is a GET (RFC 7641 section 4.1).
    pub(super) fn follow(
        &mut self,
        now: Moment,
        request: &Request<'_>,
        id: ContextId,
        space: Space,
        rest: &str,
        wildcard: bool,
    ) -> Reply {
        let Some(context) = self.contexts.get_mut(id) else {
            return Reply::Now(refuse(&Reject::ShuttingDown, false));
        };
        let known = context.client.caller.device.is_some();
        let filter = match space {
            Space::Topic => rest.to_owned(),
            Space::Device(Part::Command, _) => "c/#".to_owned(),
            Space::Device(_, _) => "s".to_owned(),
        };
        let tag = self.observations.next_tag();
        let is_command = matches!(space, Space::Device(Part::Command, _));
        let send = if wildcard && !is_command { SendRetained::Always } else { SendRetained::Never };
        let options =
            SubscribeOptions { qos: Qos::AtLeastOnce, retain_as_published: true, ..SubscribeOptions::default() };
        let subscribed = match self.gateway.subscribe(&mut context.client, &filter, tag, options, send, now.at) {
            Ok(subscribed) => subscribed,
            Err(Reject::Forbidden { .. } | Reject::Full { .. }) if !wildcard => {
                let read = self.gateway.read(&mut context.client, space.address(rest), now.at);
                let answer = read.map(|message| value(&message, request));
                return Reply::Now(answer.unwrap_or_else(|reject| Answer::refusal(&reject, known)));
            }
            Err(reject) => return Reply::Now(Answer::refusal(&reject, known)),
        };
        // Subscribed first and read then, so that nothing falls between the two. A topic may be observed before it has a value.
        let first = if wildcard {
            Ok(Answer::new(Code::CONTENT))
        } else {
            match self.gateway.read(&mut context.client, space.address(rest), now.at) {
                Ok(message) => Ok(value(&message, request)),
                Err(Reject::NotFound | Reject::Forbidden { .. }) => Ok(Answer::new(Code::CONTENT)),
                Err(reject) => Err(reject),
            }
        };
        let answer = match first {
            Ok(answer) if answer.code.is_success() => answer,
            refused => {
                self.gateway.unsubscribe(&mut context.client, &filter, tag);
                return Reply::Now(refused.unwrap_or_else(|reject| Answer::refusal(&reject, known)));
            }
        };
        context.observations.push(tag);
        let waiting = subscribed.retained.iter().take(self.limits.commands_per_device_max as usize);
        let waiting: VecDeque<Notification> = waiting.map(|delivery| notification(delivery, true)).collect();
        let value = (!wildcard).then(|| (space, rest.to_owned()));
        self.observations.insert(tag, Observation { context: id, filter, value, observer: None, waiting });
        Reply::Observe { answer, tag }
    }

    /// How the engine took an observer of [`Reply::Observe`]. What waits for it is to be sent now ([`Service::next`]).
    pub fn registered(&mut self, tag: u64, observer: Option<ObserverId>) {
        match observer {
            Some(observer) => self.observations.registered(tag, observer),
            None => self.end(tag),
        }
    }

    /// A message for an observer, and the notification that brings it.
    pub fn deliver(&mut self, delivery: &Delivery) -> Option<(ObserverId, Notification)> {
        let observation = self.observations.get_mut(delivery.tag)?;
        if is_expired(&delivery.message, wall_ms()) {
            return None;
        }
        let each = observation.value.is_none();
        let notification = notification(delivery, each);
        let observer = observation.observer?;
        if let Some(context) = self.contexts.get_mut(observation.context) {
            context.client.count_delivered(1);
            meters().coap.delivered.increment(1);
        }
        Some((observer, notification))
    }

    /// Lets a notification of which each matters wait for its turn. One more than there is room for is dropped and counted.
    pub fn wait(&mut self, observer: ObserverId, notification: Notification) {
        let waiting_max = self.limits.commands_per_device_max as usize;
        let Some(observation) = self.observations.of(observer) else { return };
        if observation.waiting.len() < waiting_max {
            observation.waiting.push_back(notification);
        } else {
            meters().dropped_outbox.increment(1);
        }
    }

    /// The notification whose turn it is; [`Service::sent`] once the engine has it.
    pub fn next(&mut self, observer: ObserverId) -> Option<Notification> {
        self.observations.of(observer)?.waiting.front().cloned()
    }

    pub fn sent(&mut self, observer: ObserverId) {
        if let Some(observation) = self.observations.of(observer) {
            observation.waiting.pop_front();
        }
    }

    /// Observers for whom something waits.
    pub fn waiting(&self) -> Vec<ObserverId> {
        self.observations.waiting()
    }

    /// The engine has no such observer any more.
    pub fn left(&mut self, observer: ObserverId) {
        if let Some(tag) = self.observations.tag_of(observer) {
            self.end(tag);
        }
    }

    /// The observed value as it is now; nothing for an observer of many topics.
    pub fn current(&mut self, observer: ObserverId, now: Instant) -> Option<Notification> {
        let observation = self.observations.of(observer)?;
        let (space, rest) = observation.value.as_ref()?;
        let context = self.contexts.get_mut(observation.context)?;
        Some(match self.gateway.read(&mut context.client, space.address(rest), now) {
            Ok(message) => Notification::content(format_of(&message), message.payload.clone()),
            Err(Reject::NotFound | Reject::TooFast { .. }) => return None,
            Err(reject) => Notification::ended(code(&reject)),
        })
    }

    /// Observers that may have missed a value because the outbox overflowed: each is to be refreshed.
    pub fn missed(&mut self) -> Vec<ObserverId> {
        let dropped = self.outbox.dropped();
        if std::mem::replace(&mut self.dropped, dropped) == dropped {
            Vec::new()
        } else {
            self.observations.observers()
        }
    }

    /// Observers whose observation has ended, each with its last notification.
    pub fn ended(&mut self) -> impl Iterator<Item = (ObserverId, Notification)> + use<> {
        std::mem::take(&mut self.ended).into_iter().map(|(observer, code)| (observer, Notification::ended(code)))
    }

    /// Ends an observation that the observer's side has ended.
    fn end(&mut self, tag: u64) {
        let Some(observation) = self.observations.remove(tag) else { return };
        let Some(context) = self.contexts.get_mut(observation.context) else { return };
        context.observations.retain(|own| *own != tag);
        self.gateway.unsubscribe(&mut context.client, &observation.filter, tag);
    }
}

/// A message as a notification. Where the observed resource stands for many topics, it says which one and each counts.
fn notification(delivery: &Delivery, each: bool) -> Notification {
    let message = &delivery.message;
    let mut notification = Notification::content(format_of(message), message.payload.clone());
    if each {
        let (short, rest) = delivery.topic_parts();
        let path = if short.is_empty() { format!("ps/{rest}") } else { format!("{short}{rest}") };
        notification.location = Some(path.into());
        notification.delivery = Sent::Each { ticket: message.id.seq };
    }
    notification
}

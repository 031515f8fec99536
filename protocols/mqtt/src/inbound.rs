//! Messages from the client: who waits for an answer, in what order the answers go out, and which QoS 2 identifiers are taken.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::event::Handle;
use crate::packet::{PacketId, Qos};
use crate::reason::Reason;

#[derive(Debug, Default)]
pub(crate) struct Inbound {
    /// In the order of the PUBLISHes; answers leave from the front (`[MQTT-4.6.0-2]`, `[MQTT-4.6.0-3]`).
    slots: VecDeque<Slot>,
    /// How many of the slots are repetitions.
    repeats: usize,
    /// Handle of the first slot; the others follow one by one.
    first: u64,
    /// QoS 2 identifiers between PUBREC and PUBREL, sorted.
    unreleased: Vec<PacketId>,
    /// Topic of alias n at n - 1.
    aliases: Vec<Option<Arc<str>>>,
}

#[derive(Debug)]
struct Slot {
    id: PacketId,
    qos: Qos,
    answer: Option<Answer>,
    /// A repetition of a message that is in `unreleased`: answered at once, but in its turn.
    repeat: bool,
}

#[derive(Debug)]
struct Answer {
    reason: Reason,
    text: Option<Box<str>>,
}

/// An acknowledgement whose turn has come.
pub(crate) struct Ready {
    pub(crate) id: PacketId,
    pub(crate) qos: Qos,
    pub(crate) reason: Reason,
    pub(crate) text: Option<Box<str>>,
}

/// What a PUBLISH above QoS 0 is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    New(Handle),
    /// A repetition of a QoS 2 message: answered with it, or next in turn.
    Repeated,
}

impl Inbound {
    pub(crate) fn resume(unreleased: Vec<PacketId>) -> Self {
        Inbound { unreleased, ..Inbound::default() }
    }

    /// Messages whose answer has not left.
    pub(crate) fn waiting(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn unreleased(&self) -> usize {
        self.unreleased.len()
    }

    /// Messages that count against the Receive Maximum: those without an answer, and QoS 2 ones without PUBREL.
    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.repeats + self.unreleased.len()
    }

    pub(crate) fn admit(&mut self, id: PacketId, qos: Qos) -> Admission {
        if qos == Qos::ExactlyOnce {
            if self.slots.iter().any(|s| s.id == id && s.qos == Qos::ExactlyOnce) {
                return Admission::Repeated;
            }
            if self.unreleased.binary_search(&id).is_ok() {
                let answer = Some(Answer { reason: Reason::Success, text: None });
                self.slots.push_back(Slot { id, qos, answer, repeat: true });
                self.repeats += 1;
                return Admission::Repeated;
            }
        }
        let handle = Handle(self.first.wrapping_add(self.slots.len() as u64));
        self.slots.push_back(Slot { id, qos, answer: None, repeat: false });
        Admission::New(handle)
    }

    /// The identifier of a message whose answer has not left.
    pub(crate) fn packet_id(&self, handle: Handle) -> Option<PacketId> {
        let index = usize::try_from(handle.0.wrapping_sub(self.first)).ok()?;
        self.slots.get(index).map(|slot| slot.id)
    }

    /// Records the application's answer. A handle that is unknown, or answered before, is ignored.
    pub(crate) fn answer(&mut self, handle: Handle, reason: Reason, text: Option<Box<str>>) {
        let index = usize::try_from(handle.0.wrapping_sub(self.first)).unwrap_or(usize::MAX);
        if let Some(slot) = self.slots.get_mut(index)
            && slot.answer.is_none()
        {
            slot.answer = Some(Answer { reason, text });
        }
    }

    /// The next acknowledgement in order, when it is decided. `kept` says whether a QoS 2 identifier stays taken after this answer.
    pub(crate) fn next_ready(&mut self, kept: impl Fn(Reason) -> bool) -> Option<Ready> {
        self.slots.front()?.answer.as_ref()?;
        let Slot { id, qos, answer, repeat } = self.slots.pop_front()?;
        self.first = self.first.wrapping_add(1);
        self.repeats -= usize::from(repeat);
        let Answer { reason, text } = answer?;
        // A repetition whose original was released meanwhile must not take the identifier again.
        if qos == Qos::ExactlyOnce && kept(reason) && !repeat {
            self.keep(id);
        }
        Some(Ready { id, qos, reason, text })
    }

    fn keep(&mut self, id: PacketId) {
        if let Err(at) = self.unreleased.binary_search(&id) {
            self.unreleased.insert(at, id);
        }
    }

    /// PUBREL: whether the identifier was taken; it is free now.
    pub(crate) fn release(&mut self, id: PacketId) -> bool {
        match self.unreleased.binary_search(&id) {
            Ok(at) => {
                self.unreleased.remove(at);
                true
            }
            Err(_) => false,
        }
    }

    pub(crate) fn alias(&self, alias: u16) -> Option<Arc<str>> {
        self.aliases.get(usize::from(alias).checked_sub(1)?)?.clone()
    }

    /// `alias` is at least 1 and within the announced maximum, which bounds the table.
    pub(crate) fn set_alias(&mut self, alias: u16, topic: &str) {
        let alias = usize::from(alias);
        if self.aliases.len() < alias {
            self.aliases.resize(alias, None);
        }
        if let Some(slot) = alias.checked_sub(1).and_then(|index| self.aliases.get_mut(index))
            && slot.as_deref() != Some(topic)
        {
            *slot = Some(topic.into());
        }
    }

    /// What a resumed session needs. Messages without an answer are forgotten: the client sends them again, and the application has not accepted them.
    pub(crate) fn into_unreleased(mut self, kept: impl Fn(Reason) -> bool) -> Vec<PacketId> {
        for slot in std::mem::take(&mut self.slots) {
            if slot.qos == Qos::ExactlyOnce && !slot.repeat && slot.answer.is_some_and(|a| kept(a.reason)) {
                self.keep(slot.id);
            }
        }
        self.unreleased
    }

    /// Gives back what a burst has grown.
    pub(crate) fn shrink(&mut self) {
        self.slots.shrink_to(self.slots.len());
        self.unreleased.shrink_to(self.unreleased.len());
    }
}

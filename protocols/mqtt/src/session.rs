//! What of a connection outlives it: the unfinished handshakes of QoS 1 and 2.

use std::collections::VecDeque;

use crate::outbound::InFlight;
use crate::packet::PacketId;

/// How far an outgoing message has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// QoS 1, sent.
    Puback,
    /// QoS 2, sent.
    Pubrec,
    /// QoS 2, received by the client; PUBREL sent.
    Pubcomp,
}

/// Taken from a closed connection, given to the one that resumes the session.
#[derive(Clone, Debug)]
pub struct SessionState<M> {
    pub(crate) in_flight: VecDeque<InFlight<M>>,
    pub(crate) next_id: PacketId,
    /// Incoming QoS 2 messages that were accepted and not yet released, sorted.
    pub(crate) unreleased: Vec<PacketId>,
}

impl<M> Default for SessionState<M> {
    fn default() -> Self {
        SessionState { in_flight: VecDeque::new(), next_id: PacketId::FIRST, unreleased: Vec::new() }
    }
}

impl<M> SessionState<M> {
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether there is nothing to resume.
    pub fn is_empty(&self) -> bool {
        self.in_flight.is_empty() && self.unreleased.is_empty()
    }

    /// Outgoing messages in the order they were sent: identifier, stage, RETAIN flag, and the message while the client has not received it.
    pub fn in_flight(&self) -> impl Iterator<Item = (PacketId, Stage, bool, Option<&M>)> {
        self.in_flight.iter().map(|e| (e.id, e.stage, e.retain, e.message.as_ref()))
    }

    /// Identifiers of incoming QoS 2 messages that the client has yet to release.
    pub fn unreleased(&self) -> impl Iterator<Item = PacketId> + '_ {
        self.unreleased.iter().copied()
    }

    /// Adds an outgoing message that was sent before, oldest first, when a session is read back from storage. False, and nothing added, when the
    /// identifier is already there, or the stage wants a message and there is none.
    pub fn restore_in_flight(&mut self, id: PacketId, stage: Stage, retain: bool, message: Option<M>) -> bool {
        if self.in_flight.iter().any(|e| e.id == id) || (message.is_none() && stage != Stage::Pubcomp) {
            return false;
        }
        self.in_flight.push_back(InFlight { id, stage, retain, message });
        self.next_id = id.next();
        true
    }

    /// Adds an incoming QoS 2 identifier, when a session is read back from storage.
    pub fn restore_unreleased(&mut self, id: PacketId) {
        if let Err(at) = self.unreleased.binary_search(&id) {
            self.unreleased.insert(at, id);
        }
    }
}

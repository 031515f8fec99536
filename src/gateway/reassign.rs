//! Shared subscriptions: what a member had not taken when its session ended goes to another member (MQTT 5 section 4.8.2).
//!
//! What a persistent session leaves is read from the disk a part at a time and, for a member that is persistent too, stored anew before it is
//! released. A crash within that moment loses it: the session's own rows are gone by then.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::stored::Backlog;
use super::{Delivery, Filter, Gateway, Message, meters};
use crate::hub::{Hub, Left, Pushed};

/// What it takes, also on the spool's thread.
#[derive(Clone)]
pub(super) struct Reassigner {
    hub: Arc<Hub>,
    backlog: Backlog,
}

impl Reassigner {
    pub fn new(hub: Arc<Hub>, backlog: Backlog) -> Self {
        Reassigner { hub, backlog }
    }

    /// Without another member the message is lost, as it is with any other subscription that ends.
    fn reassign(&self, message: &Arc<Message>, shared: &Filter) {
        let Some(member) = self.hub.member(shared) else {
            meters().dropped_outbox.increment(1);
            return;
        };
        let delivery = member.delivery(message, None);
        if member.stores(message.qos) {
            self.backlog.store(&member.outbox, delivery);
        } else if member.outbox.push(delivery, Instant::now()) == Pushed::Dropped {
            meters().dropped_outbox.increment(1);
        }
    }

    /// Settles what an ended session had on disk.
    pub fn settle(&self, left: Vec<Left>) {
        let (shared, unshared): (Vec<Left>, Vec<Left>) = left.into_iter().partition(|left| left.shared.is_some());
        unshared.iter().for_each(|left| self.backlog.spool.release(left.position));
        if !shared.is_empty() {
            self.clone().read(shared.into());
        }
    }

    /// Reassigns the first of what is left, and then the rest.
    fn read(self, mut left: VecDeque<Left>) {
        let positions = left.iter().take(READ_MAX).map(|left| left.position).collect();
        let spool = self.backlog.spool.clone();
        spool.fetch(positions, move |found| {
            if found.is_empty() {
                // The spool is closing; what is left stands on disk and is deleted at the next start.
                return;
            }
            for found in found {
                let Some(Left { position, shared }) = left.pop_front() else { break };
                match (found.message, shared) {
                    (Some(message), Some(shared)) => self.reassign(&Arc::new(message), &shared),
                    (None, _) | (_, None) => meters().dropped_session.increment(1),
                }
                self.backlog.spool.release(position);
            }
            if !left.is_empty() {
                self.read(left);
            }
        });
    }
}

impl Gateway {
    /// Gives what a session that has ended had in memory to other members of its shared subscriptions.
    pub fn reassign(&self, left: impl IntoIterator<Item = Delivery>) {
        for delivery in left {
            // What has a place on disk is passed on from there.
            if let (Some(shared), None) = (&delivery.terms.shared, delivery.ticket) {
                self.reassigner.reassign(&delivery.message, shared);
            }
        }
    }
}

/// Messages read at a time.
const READ_MAX: usize = 128;

//! One request to the upstream for many that ask the same at once.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::cache::response::{Entry, Key};
use crate::gateway::UpstreamFault;

/// What came of it, for those who wait.
#[derive(Clone, Debug)]
pub(super) enum Landed {
    Kept(Arc<Entry>),
    /// There is an answer, for whoever asked alone.
    NotKept,
    Failed(UpstreamFault),
}

/// What is being fetched.
#[derive(Debug, Default)]
pub(super) struct Flights(Mutex<HashMap<Key, watch::Receiver<Option<Landed>>>>);

pub(super) enum Joined {
    /// To fetch, and to tell.
    Lead(Lead),
    /// Somebody does. Closed without a word: that one has gone away.
    Wait(watch::Receiver<Option<Landed>>),
}

/// Who fetches. Dropped without [`land`](Lead::land), the next one fetches.
#[derive(Debug)]
pub(super) struct Lead {
    flights: Arc<Flights>,
    key: Key,
    tell: watch::Sender<Option<Landed>>,
}

impl Flights {
    pub(super) fn join(self: &Arc<Self>, key: Key) -> Joined {
        let mut flights = self.0.lock();
        if let Some(under_way) = flights.get(&key) {
            return Joined::Wait(under_way.clone());
        }
        let (tell, under_way) = watch::channel(None);
        flights.insert(key, under_way);
        Joined::Lead(Lead { flights: self.clone(), key, tell })
    }
}

impl Lead {
    pub(super) fn land(self, landed: Landed) {
        self.tell.send_replace(Some(landed));
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        self.flights.0.lock().remove(&self.key);
    }
}

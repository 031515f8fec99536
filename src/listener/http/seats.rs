//! The sessions that one HTTP connection holds: one for each device that speaks over it.
//!
//! A device's requests on one connection share a session, so that rate, route cache and presence work as on the other protocols. A
//! reverse proxy may carry many devices over one connection; the table is small and the oldest makes room.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use crate::gateway::{Client, Gateway, Keep, Mailbox, Open};
use crate::listener::ConnectionInfo;
use crate::message::{Device, Protocol, Reject};

/// A session that ends with its holder.
pub struct Seat {
    gateway: Arc<Gateway>,
    client: Option<Client>,
    /// For how long its subscriptions and queue outlive it.
    keep: Option<Duration>,
}

impl Seat {
    /// Begins a session under `name`, which together with the device is the session's key.
    ///
    /// # Errors
    /// As [`Gateway::open`].
    ///
    /// # Cancel safety
    /// Nothing has begun unless it completes.
    pub async fn open(
        gateway: &Arc<Gateway>,
        conn: &ConnectionInfo,
        device: Option<Arc<Device>>,
        name: &str,
        keep: Option<Duration>,
    ) -> Result<(Seat, bool), Reject> {
        let open = Open {
            device,
            protocol: Protocol::Http,
            peer: conn.peer,
            client: name,
            clean: keep.is_none(),
            mailbox: Mailbox::Own,
        };
        let opened = gateway.open(open, Instant::now()).await?;
        let seat = Seat { gateway: gateway.clone(), client: Some(opened.client), keep };
        Ok((seat, opened.resumed.is_some()))
    }

    pub fn client(&self) -> Option<&Client> {
        self.client.as_ref()
    }

    /// The gateway beside the session, for a call.
    pub fn parts(&mut self) -> Option<(&Gateway, &mut Client)> {
        self.client.as_mut().map(|client| (&*self.gateway, client))
    }

    /// Whether the device still stands as it did.
    pub fn is_current(&mut self) -> bool {
        self.parts().is_some_and(|(gateway, client)| gateway.check_current(client).is_ok())
    }

    /// Keeps nothing after all.
    pub fn forget(&mut self) {
        self.keep = None;
    }

    /// Ends the session now.
    pub fn close(&mut self, now: Instant) {
        let Some(client) = self.client.take() else { return };
        let keep = self.keep.map(|expiry| Keep { state: Box::new(()), expiry: Some(expiry) });
        self.gateway.close(client, keep, now);
    }

    fn is_of(&self, device: Option<&Arc<Device>>) -> bool {
        let own = self.client.as_ref().map(|client| client.caller.device.as_ref());
        own.is_some_and(|own| match (own, device) {
            (Some(own), Some(device)) => own.index == device.index && own.generation == device.generation,
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        })
    }

    /// Whether somebody (an operator, a drain) ordered the session to end.
    fn is_ordered_to_close(&self) -> bool {
        self.client.as_ref().is_none_or(|client| client.outbox.is_ordered_to_close())
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.close(Instant::now());
    }
}

/// The sessions of one connection.
pub struct Seats {
    /// What the sessions are called.
    name: String,
    // Requests of one HTTP/2 connection run at once, and opening a session waits.
    held: Mutex<Held>,
}

struct Held {
    seats: Vec<Seat>,
    /// When all of them were last looked at.
    swept: Instant,
}

impl Seats {
    const HELD_MAX: usize = 16;
    /// How long a session that was ordered to end may outlive the order on a connection where others speak.
    const SWEEP_EVERY: Duration = Duration::from_secs(1);

    pub fn new(name: String) -> Self {
        Seats { name, held: Mutex::new(Held { seats: Vec::new(), swept: Instant::now() }) }
    }

    /// Calls `act` with the session of `device` on this connection, which begins if it has not yet.
    ///
    /// # Errors
    /// As [`Gateway::open`].
    pub async fn with<T>(
        &self,
        gateway: &Arc<Gateway>,
        conn: &ConnectionInfo,
        device: Option<Arc<Device>>,
        act: impl FnOnce(&Gateway, &mut Client) -> T,
    ) -> Result<T, Reject> {
        let mut held = self.held.lock().await;
        let Held { seats: held, swept } = &mut *held;
        let now = Instant::now();
        let mut index = held.iter().position(|seat| seat.is_of(device.as_ref()));
        let is_over = index.and_then(|index| held.get(index)).is_some_and(Seat::is_ordered_to_close);
        // Looking at every session with every request would cost more than the rest of its admission.
        if is_over || now.saturating_duration_since(*swept) >= Self::SWEEP_EVERY {
            *swept = now;
            held.retain(|seat| !seat.is_ordered_to_close());
            index = held.iter().position(|seat| seat.is_of(device.as_ref()));
        }
        let index = match index {
            Some(index) => index,
            None => {
                if held.len() >= Self::HELD_MAX {
                    held.remove(0);
                }
                let (seat, _) = Seat::open(gateway, conn, device, &self.name, None).await?;
                held.push(seat);
                held.len() - 1
            }
        };
        match held.get_mut(index).and_then(Seat::parts) {
            Some((gateway, client)) => Ok(act(gateway, client)),
            // A held seat has its client until it is dropped.
            None => Err(Reject::ShuttingDown),
        }
    }
}

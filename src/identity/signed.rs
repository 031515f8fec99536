//! Messages that carry their own proof: one datagram, no login, no token.

use std::collections::HashMap;
use std::sync::Arc;

use tidegate_auth::KeyId;
use tidegate_auth::cose::{Purpose, Signed, Window};

use super::Identity;
use super::clock::Now;
use super::replay::Used;
use crate::message::{Device, Reject};

/// A message whose signature holds and whose number is new.
#[derive(Clone, Debug)]
pub struct SignedMessage<'b> {
    pub device: Arc<Device>,
    /// A CoAP Content-Format, of the payload.
    pub content_format: Option<u16>,
    pub payload: &'b [u8],
}

/// Why a signed message is not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotTaken {
    Reject(Reject),
    /// The signature holds and the number has been used: a repetition, or a device that has lost count.
    Used,
}

/// The numbers used by each key that has signed something. No larger than the registry: only a good signature adds to it.
#[derive(Debug, Default)]
pub(super) struct Sequences(HashMap<(u32, KeyId), Window>);

impl Sequences {
    /// What was known before a restart.
    pub(super) fn restore(&mut self, device_index: u32, key: KeyId, highest: u64) {
        self.0.insert((device_index, key), Window::after(highest));
    }

    fn take(&mut self, device_index: u32, key: KeyId, sequence: u64) -> bool {
        self.0.entry((device_index, key)).or_default().take(sequence)
    }
}

impl Identity {
    /// Verifies a COSE_Sign1 message that came by CoAP with `method` (its code) for `path`, and uses its number up. One verification, whoever it is.
    ///
    /// # Errors
    /// `Unauthenticated` for everything that does not hold, `TooFast` at `verify_concurrency_max`; [`NotTaken::Used`] only to who could sign.
    pub fn coap_signed<'b>(
        &self,
        body: &'b [u8],
        method: u8,
        path: &[&str],
        now: Now,
    ) -> Result<SignedMessage<'b>, NotTaken> {
        let refused = || NotTaken::Reject(Reject::Unauthenticated);
        let signed = Signed::parse(body).ok_or_else(refused)?;
        let claimant = self.shared.claimant(signed.device_id, signed.key_id, now);
        let purpose = Purpose { method, path, gateway_id: &self.gateway().id };
        let holds = {
            let _place = self.shared.begin_verification().ok_or_else(|| NotTaken::Reject(super::login::busy()))?;
            signed.verify(claimant.key(), &purpose)
        };
        if !holds {
            return Err(refused());
        }
        let login = claimant.admit(now, u64::MAX).map_err(NotTaken::Reject)?;
        // The store's numbers have a sign.
        let storable = i64::try_from(signed.sequence).is_ok();
        let (device_index, key) = (login.device.index, login.key_id);
        if !storable || !self.shared.sequences.lock().take(device_index, key, signed.sequence) {
            return Err(NotTaken::Used);
        }
        self.watch.remember(Used::Sequence { device_index, key, sequence: signed.sequence });
        Ok(SignedMessage { device: login.device, content_format: signed.content_format, payload: signed.payload })
    }
}

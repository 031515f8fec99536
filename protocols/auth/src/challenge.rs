//! The stateless challenge of HTTP and CoAP: 38 bytes that the gateway can recognise as its own without having kept anything.
//!
//! ```text
//! 01 | epoch 1 | t u32 seconds of CLOCK_BOOTTIME | random 16 | tag 16
//! tag = HMAC-SHA256(K[epoch], "tidegate-challenge/1" 00 | proto | the 22 bytes before | lp(device_id) | lp(client_nonce) | lp(peer))[0..16]
//! ```
//! So a flood of questions costs no memory, and an answer is good only for the device, the nonce, the protocol and the peer that asked.
//! The keys live in memory alone: a restart voids every challenge. Time is the machine's own since boot, because a Pi has no clock when it starts.
//! That a challenge works once is not this module's promise but the used-set's ([`crate::used_set`]).

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use subtle::ConstantTimeEq as _;
use zeroize::{Zeroize as _, Zeroizing};

use crate::ClientNonce;
use crate::transcript::Proto;

/// A challenge as it travels.
pub type Challenge = [u8; CHALLENGE_BYTES];
pub const CHALLENGE_BYTES: usize = BODY_BYTES + TAG_BYTES;
/// Seconds after which a key is replaced; the one before it stays valid for as long again.
pub const ROTATION_SECS: u32 = 600;

/// Whom a challenge is bound to, beyond the device and its nonce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// HTTP: a second request may come over another connection.
    Any,
    /// CoAP: the address and port that asked, so that the answer to a forged address is of no use to the forger.
    Address(SocketAddr),
}

impl Peer {
    /// `IPv6-mapped address (16) || port (2)`, or nothing.
    fn encode(&self) -> ([u8; 18], usize) {
        let Peer::Address(address) = self else { return ([0; 18], 0) };
        let ip = match address.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        let mut bytes = [0; 18];
        for (to, from) in bytes.iter_mut().zip(ip.octets().into_iter().chain(address.port().to_be_bytes())) {
            *to = from;
        }
        (bytes, bytes.len())
    }
}

/// Why a challenge is not one of ours, or no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChallengeError {
    /// Not 38 bytes, or of another version.
    Malformed,
    /// Not sealed by us, or for something else, or by a key that is gone.
    Forged,
    Expired,
}

impl fmt::Display for ChallengeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ChallengeError::Malformed => "not a challenge",
            ChallengeError::Forged => "not a challenge of this gateway for this device, nonce and peer",
            ChallengeError::Expired => "the challenge has expired",
        })
    }
}

impl std::error::Error for ChallengeError {}

/// The sealing keys of the present epoch and the one before.
pub struct ChallengeKeys {
    epoch: u8,
    current: Zeroizing<[u8; 32]>,
    previous: Option<Zeroizing<[u8; 32]>>,
    rotated_at_secs: u32,
}

impl ChallengeKeys {
    /// `key` must be random and from nowhere else; `now_secs` is time since boot.
    pub fn new(epoch: u8, key: [u8; 32], now_secs: u32) -> Self {
        ChallengeKeys { epoch, current: Zeroizing::new(key), previous: None, rotated_at_secs: now_secs }
    }

    /// Whether [`rotate`](Self::rotate) is due.
    pub fn is_stale(&self, now_secs: u32) -> bool {
        now_secs.saturating_sub(self.rotated_at_secs) >= ROTATION_SECS
    }

    /// Begins the next epoch with a fresh random `key`.
    pub fn rotate(&mut self, mut key: [u8; 32], now_secs: u32) {
        let before = std::mem::replace(&mut self.current, Zeroizing::new(key));
        key.zeroize();
        // A key that has been idle for two rotations seals nothing that could still live.
        let is_recent = now_secs.saturating_sub(self.rotated_at_secs) < 2 * ROTATION_SECS;
        self.previous = is_recent.then_some(before);
        self.epoch = self.epoch.wrapping_add(1);
        self.rotated_at_secs = now_secs;
    }

    /// Makes a challenge. `random` must be fresh.
    pub fn seal(&self, now_secs: u32, random: [u8; 16], for_whom: &Asker<'_>) -> Challenge {
        let mut challenge = [0; CHALLENGE_BYTES];
        let head = [VERSION, self.epoch].into_iter().chain(now_secs.to_be_bytes()).chain(random);
        for (to, from) in challenge.iter_mut().zip(head) {
            *to = from;
        }
        if let Some((body, tag)) = challenge.split_first_chunk_mut::<BODY_BYTES>() {
            tag.copy_from_slice(&seal_tag(&self.current, body, for_whom));
        }
        challenge
    }

    /// Recognises a challenge that was sealed for the same asker at most `ttl_secs` ago, and says when it ends (exclusive, since boot).
    ///
    /// # Errors
    /// For anything else. The tag is checked before the time, so that a stranger cannot probe our clock.
    pub fn open(
        &self,
        now_secs: u32,
        ttl_secs: u32,
        challenge: &[u8],
        for_whom: &Asker<'_>,
    ) -> Result<u32, ChallengeError> {
        let Some((body, tag)) = challenge.split_first_chunk::<BODY_BYTES>() else {
            return Err(ChallengeError::Malformed);
        };
        let [version, epoch, t0, t1, t2, t3, ..] = *body;
        if version != VERSION || tag.len() != TAG_BYTES {
            return Err(ChallengeError::Malformed);
        }
        let key = if epoch == self.epoch {
            &self.current
        } else if let Some(previous) = &self.previous
            && epoch == self.epoch.wrapping_sub(1)
        {
            previous
        } else {
            return Err(ChallengeError::Forged);
        };
        if !bool::from(seal_tag(key, body, for_whom).as_slice().ct_eq(tag)) {
            return Err(ChallengeError::Forged);
        }
        let sealed_at = u32::from_be_bytes([t0, t1, t2, t3]);
        let ends_at = sealed_at.saturating_add(ttl_secs);
        if now_secs < sealed_at || now_secs >= ends_at {
            return Err(ChallengeError::Expired);
        }
        Ok(ends_at)
    }
}

impl fmt::Debug for ChallengeKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChallengeKeys").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

/// Who asked, and how: what a challenge is bound to.
#[derive(Clone, Copy, Debug)]
pub struct Asker<'a> {
    pub proto: Proto,
    /// A device id, so at most 128 bytes.
    pub device_id: &'a str,
    pub client_nonce: &'a ClientNonce,
    pub peer: Peer,
}

/// What the used-set remembers of a challenge: its random part.
pub fn random_of(challenge: &[u8]) -> Option<[u8; 16]> {
    challenge.get(6..BODY_BYTES)?.try_into().ok()
}

fn seal_tag(key: &[u8; 32], body: &[u8; BODY_BYTES], asker: &Asker<'_>) -> [u8; TAG_BYTES] {
    let mut mac = hmac(key);
    mac.update(DOMAIN);
    mac.update(&[asker.proto as u8]);
    mac.update(body);
    let (peer, peer_bytes) = asker.peer.encode();
    let peer = peer.get(..peer_bytes).unwrap_or_default();
    for part in [asker.device_id.as_bytes(), asker.client_nonce.as_slice(), peer] {
        // No device id comes near 65,535 bytes (see `Asker`).
        mac.update(&u16::try_from(part.len()).unwrap_or(u16::MAX).to_be_bytes());
        mac.update(part);
    }
    truncate(mac)
}

pub(crate) fn hmac(key: &[u8; 32]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes a key of any length")
}

/// The first 16 bytes of a finished MAC.
pub(crate) fn truncate(mac: Hmac<Sha256>) -> [u8; TAG_BYTES] {
    let full: [u8; 32] = mac.finalize().into_bytes().into();
    let mut tag = [0; TAG_BYTES];
    for (to, from) in tag.iter_mut().zip(full) {
        *to = from;
    }
    tag
}

const DOMAIN: &[u8] = b"tidegate-challenge/1\0";
const VERSION: u8 = 1;
const BODY_BYTES: usize = 22;
const TAG_BYTES: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NONCE: ClientNonce = [0xa0; 16];
    const TTL: u32 = 60;

    fn asker(device_id: &str) -> Asker<'_> {
        Asker {
            proto: Proto::Coap,
            device_id,
            client_nonce: &NONCE,
            peer: Peer::Address("192.0.2.5:49152".parse().unwrap()),
        }
    }

    #[test]
    fn a_challenge_lives_its_time_to_the_second() {
        let keys = ChallengeKeys::new(0, [1; 32], 100);
        let challenge = keys.seal(100, [2; 16], &asker("a"));
        assert_eq!(keys.open(100, TTL, &challenge, &asker("a")), Ok(160));
        assert_eq!(keys.open(159, TTL, &challenge, &asker("a")), Ok(160));
        assert_eq!(keys.open(160, TTL, &challenge, &asker("a")), Err(ChallengeError::Expired));
        assert_eq!(keys.open(99, TTL, &challenge, &asker("a")), Err(ChallengeError::Expired));
    }

    #[test]
    fn a_challenge_near_the_end_of_time_does_not_wrap() {
        let keys = ChallengeKeys::new(0, [1; 32], u32::MAX - 5);
        let challenge = keys.seal(u32::MAX - 5, [2; 16], &asker("a"));
        assert_eq!(keys.open(u32::MAX - 1, TTL, &challenge, &asker("a")), Ok(u32::MAX));
        assert_eq!(keys.open(3, TTL, &challenge, &asker("a")), Err(ChallengeError::Expired));
    }

    #[test]
    fn two_epochs_are_valid_and_no_third() {
        let mut keys = ChallengeKeys::new(255, [1; 32], 0);
        let challenge = keys.seal(599, [2; 16], &asker("a"));
        assert!(!keys.is_stale(599));
        assert!(keys.is_stale(600));
        keys.rotate([3; 32], 600);
        assert_eq!(keys.open(601, TTL, &challenge, &asker("a")), Ok(659));
        keys.rotate([4; 32], 601);
        assert_eq!(keys.open(602, TTL, &challenge, &asker("a")), Err(ChallengeError::Forged));
    }

    #[test]
    fn the_epoch_number_alone_opens_nothing() {
        let mut keys = ChallengeKeys::new(0, [1; 32], 0);
        let old = keys.seal(0, [2; 16], &asker("a"));
        for round in 1..=256u32 {
            keys.rotate([u8::try_from(round % 251).unwrap() + 2; 32], round);
        }
        // The epoch byte is 0 again, the key is another.
        assert_eq!(keys.open(1, TTL, &old, &asker("a")), Err(ChallengeError::Forged));
    }

    #[test]
    fn a_challenge_is_bound_to_device_nonce_protocol_and_peer() {
        let keys = ChallengeKeys::new(0, [1; 32], 0);
        let challenge = keys.seal(0, [2; 16], &asker("a"));
        let other_nonce = [0xa1; 16];
        let others = [
            asker("b"),
            asker("a\0"),
            Asker { client_nonce: &other_nonce, ..asker("a") },
            Asker { proto: Proto::Http, ..asker("a") },
            Asker { peer: Peer::Any, ..asker("a") },
            Asker { peer: Peer::Address("192.0.2.5:49153".parse().unwrap()), ..asker("a") },
            Asker { peer: Peer::Address("192.0.2.6:49152".parse().unwrap()), ..asker("a") },
        ];
        for other in others {
            assert_eq!(keys.open(1, TTL, &challenge, &other), Err(ChallengeError::Forged), "{other:?}");
        }
        // The same address as a dual-stack socket reports it.
        let mapped = Asker { peer: Peer::Address("[::ffff:192.0.2.5]:49152".parse().unwrap()), ..asker("a") };
        assert_eq!(keys.open(1, TTL, &challenge, &mapped), Ok(60));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_refused(key: [u8; 32], random: [u8; 16], at in 0u32..u32::MAX - 60, bit in 0usize..CHALLENGE_BYTES * 8) {
            let keys = ChallengeKeys::new(7, key, at);
            let mut challenge = keys.seal(at, random, &asker("a"));
            challenge[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(keys.open(at, TTL, &challenge, &asker("a")).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_open_and_never_panic(bytes: Vec<u8>, now: u32, ttl: u32) {
            let keys = ChallengeKeys::new(1, [1; 32], 0);
            prop_assert!(keys.open(now, ttl, &bytes, &asker("a")).is_err());
            let _ = random_of(&bytes);
        }
    }
}

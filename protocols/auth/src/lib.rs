//! The rules by which a device proves who it is, as pure functions and small tables: `docs/` calls them the identity part of the wire contract.
//!
//! - [`transcript`]: the bytes that are signed in every challenge flow, and the gateway's own proof.
//! - [`challenge`]: the stateless challenge of HTTP and CoAP.
//! - [`enhanced`]: the payloads of MQTT 5 enhanced authentication.
//! - [`jwt`]: a strict verifier and a signer for the one kind of JWT that the contract knows.
//! - [`token`]: the 43-byte bearer token.
//! - [`used_set`]: what has been used once and must not work again.
//! - [`keys`], [`keyfile`]: Ed25519 keys, their ids and their files.
//! - [`cose`]: a signed message that needs no login, and the numbers by which it works once.
//! - [`exchange`], [`cbor`]: bodies of the HTTP and CoAP flows, for both ends.
//!
//! Promises: no clock, no randomness, no socket, no allocation that outside input can size without a bound, and no panic on any input.
//! Every comparison of secrets is constant-time, every signature check is `verify_strict`, secrets are wiped on drop and never printed.
//! It deliberately holds no registry and decides nothing about roles: it says whether bytes prove a key, the caller says whose key that is.

#![forbid(unsafe_code)]

pub mod cbor;
pub mod challenge;
pub mod cose;
pub mod enhanced;
pub mod exchange;
pub mod jwt;
pub mod keyfile;
pub mod keys;
pub mod provider;
pub mod text;
pub mod token;
pub mod transcript;
pub mod used_set;

pub use challenge::{Challenge, ChallengeError, ChallengeKeys, Peer};
pub use keys::{GatewayId, InvalidKey, KeyId, PublicKey, SecretKey};
pub use token::{Token, TokenError, TokenKey};
pub use transcript::{CbType, Proto, TooLong, Transcript};
pub use used_set::{NotFresh, UsedSet};
/// Wipes what it holds when it is dropped.
pub use zeroize::Zeroizing;

/// A signature as it travels.
pub type Signature = [u8; 64];
/// The device's own random bytes, 16 of them, in every challenge flow.
pub type ClientNonce = [u8; 16];

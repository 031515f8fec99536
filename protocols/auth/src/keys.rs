//! Ed25519 keys and the ids that are made of them.
//!
//! A public key is kept as its 32 bytes and expanded at each use: a registry of 100,000 devices then costs 3 MB for keys instead of 20, and the
//! expansion (about a tenth of a verification) is paid only by those who log in.

use std::fmt;

use ed25519_dalek::{Signature as DalekSignature, Signer as _, SigningKey, VerifyingKey};
use sha2::{Digest as _, Sha256};

use crate::{Signature, text};

/// A device's or a gateway's public key, which [`PublicKey::register`] has found fit for use.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey([u8; 32]);

/// Why 32 bytes are refused as a public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidKey {
    /// Not the encoding of a point on the curve.
    NotAPoint,
    /// The same point has another, shorter encoding (RFC 8032 section 5.1.3): two spellings of one key would be two key ids.
    NotCanonical,
    /// Of small order, or with a component of small order: some signatures hold for messages that were never signed.
    Weak,
}

impl fmt::Display for InvalidKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            InvalidKey::NotAPoint => "not an Ed25519 public key",
            InvalidKey::NotCanonical => "an Ed25519 public key in a non-canonical encoding",
            InvalidKey::Weak => "a weak Ed25519 public key (it has a component of small order)",
        })
    }
}

impl std::error::Error for InvalidKey {}

impl PublicKey {
    /// Takes a key into use; the one place where a key is judged.
    ///
    /// # Errors
    /// For bytes that are no point, not canonical, or weak.
    pub fn register(bytes: [u8; 32]) -> Result<Self, InvalidKey> {
        let key = VerifyingKey::from_bytes(&bytes).map_err(|_| InvalidKey::NotAPoint)?;
        let point = key.to_edwards();
        if point.compress().to_bytes() != bytes {
            return Err(InvalidKey::NotCanonical);
        }
        if point.is_small_order() || !point.is_torsion_free() {
            return Err(InvalidKey::Weak);
        }
        Ok(PublicKey(bytes))
    }

    /// A key that was registered before and comes back from our own store. Bytes that are no key are kept, and verify nothing.
    pub const fn from_registered(bytes: [u8; 32]) -> Self {
        PublicKey(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub fn key_id(&self) -> KeyId {
        let [a, b, c, d, e, f, g, h, ..] = sha256(&self.0);
        KeyId([a, b, c, d, e, f, g, h])
    }

    /// Whether `signature` is this key's over `message`, strictly (RFC 8032 with canonical R and S, and no point of small order).
    #[must_use]
    pub fn verify(&self, message: &[u8], signature: &Signature) -> bool {
        match VerifyingKey::from_bytes(&self.0) {
            Ok(key) => key.verify_strict(message, &DalekSignature::from_bytes(signature)).is_ok(),
            Err(_) => false,
        }
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text::hex(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

/// The first eight bytes of a device key's SHA-256: says which of a device's keys is meant, proves nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(pub [u8; 8]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text::hex(&self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

/// The SHA-256 of a gateway's public key; devices pin it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct GatewayId(pub [u8; 32]);

impl GatewayId {
    pub fn of(key: &PublicKey) -> Self {
        GatewayId(sha256(key.as_bytes()))
    }

    /// The audience of a JWT meant for this gateway: `urn:tidegate:` and the first 32 hex digits.
    pub fn audience(&self) -> String {
        let mut urn = format!("{}{self}", GatewayId::URN);
        urn.truncate(GatewayId::URN.len() + 32);
        urn
    }

    /// Whether `audience` names this gateway, by the first 32 hex digits of its id or by all 64.
    pub fn is_named_by(&self, audience: &str) -> bool {
        let Some(digits) = audience.strip_prefix(GatewayId::URN) else { return false };
        matches!(digits.len(), 32 | 64) && self.to_string().starts_with(digits)
    }

    const URN: &str = "urn:tidegate:";
}

impl fmt::Display for GatewayId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text::hex(&self.0))
    }
}

impl fmt::Debug for GatewayId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GatewayId({self})")
    }
}

/// A private key. Wiped on drop, never printed.
#[derive(Clone)]
pub struct SecretKey(SigningKey);

impl SecretKey {
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        SecretKey(SigningKey::from_bytes(seed))
    }

    /// The seed, for a key file or to derive another secret from.
    pub fn seed(&self) -> &[u8; 32] {
        self.0.as_bytes()
    }

    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key().to_bytes())
    }

    pub fn sign(&self, message: &[u8]) -> Signature {
        self.0.sign(message).to_bytes()
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(..)")
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The eight points of small order, and encodings of some of them that RFC 8032 forbids (from "Taming the many EdDSAs", table 6).
    const SMALL_ORDER: [&str; 11] = [
        "0100000000000000000000000000000000000000000000000000000000000000",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "0000000000000000000000000000000000000000000000000000000000000080",
        "0000000000000000000000000000000000000000000000000000000000000000",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
        "0100000000000000000000000000000000000000000000000000000000000080",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    ];

    #[test]
    fn weak_and_non_canonical_keys_are_refused() {
        for key in SMALL_ORDER {
            let refusal = PublicKey::register(text::from_hex(key).unwrap()).unwrap_err();
            assert!(matches!(refusal, InvalidKey::Weak | InvalidKey::NotCanonical), "{key}: {refusal:?}");
        }
        // y = p + 3 is the point with y = 3 in another spelling, and not of small order.
        let mut non_canonical = [0xff; 32];
        (non_canonical[0], non_canonical[31]) = (0xf0, 0x7f);
        assert_eq!(PublicKey::register(non_canonical), Err(InvalidKey::NotCanonical));
        // y = 2 is not on the curve.
        let mut no_point = [0; 32];
        no_point[0] = 2;
        assert_eq!(PublicKey::register(no_point), Err(InvalidKey::NotAPoint));
    }

    #[test]
    fn a_key_with_a_component_of_small_order_is_weak() {
        let honest = VerifyingKey::from_bytes(SecretKey::from_seed(&[7; 32]).public().as_bytes()).unwrap();
        let torsion = VerifyingKey::from_bytes(&text::from_hex(SMALL_ORDER[4]).unwrap()).unwrap();
        let mixed = (honest.to_edwards() + torsion.to_edwards()).compress().to_bytes();
        assert_eq!(PublicKey::register(mixed), Err(InvalidKey::Weak));
    }

    #[test]
    fn a_secret_key_does_not_print_itself() {
        let key = SecretKey::from_seed(&[7; 32]);
        assert_eq!(format!("{key:?}"), "SecretKey(..)");
    }

    #[test]
    fn the_audience_is_the_first_32_digits_and_all_64_are_understood() {
        let id = GatewayId([0xab; 32]);
        assert_eq!(id.audience(), format!("urn:tidegate:{}", "ab".repeat(16)));
        assert!(id.is_named_by(&id.audience()));
        assert!(id.is_named_by(&format!("urn:tidegate:{id}")));
        for bad in
            ["", "urn:tidegate:", "urn:tidegate:ab", &id.audience()[1..], &format!("urn:tidegate:{}", "ab".repeat(17))]
        {
            assert!(!id.is_named_by(bad), "{bad}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_generated_key_registers_and_verifies(seed: [u8; 32], message: Vec<u8>) {
            let secret = SecretKey::from_seed(&seed);
            let public = PublicKey::register(*secret.public().as_bytes()).unwrap();
            prop_assert!(public.verify(&message, &secret.sign(&message)));
        }

        #[test]
        fn any_flipped_bit_of_a_signature_fails(seed: [u8; 32], message: Vec<u8>, bit in 0usize..512) {
            let secret = SecretKey::from_seed(&seed);
            let mut signature = secret.sign(&message);
            signature[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!secret.public().verify(&message, &signature));
        }

        #[test]
        fn arbitrary_bytes_as_a_key_never_panic(key: [u8; 32], message: Vec<u8>, signature: [u8; 32]) {
            let mut full = [0; 64];
            full[..32].copy_from_slice(&signature);
            let _ = PublicKey::register(key);
            let _ = PublicKey::from_registered(key).verify(&message, &full);
        }
    }
}

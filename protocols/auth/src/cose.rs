//! A signed message in one datagram: COSE_Sign1 (RFC 9052 section 4.2) over CoAP, for a device that does not log in.
//!
//! ```text
//! [ << { 1: -8 or -19, 4: key_id 8, 15: { 2: device_id }, "seq": n, ? 3: content format } >>, {}, payload, signature 64 ]     with or without tag 18
//! external_aad = << [ method code, [ path segments ], gateway_id 32 ] >>
//! ```
//! The algorithm is Ed25519 (EdDSA, or its fully specified number of RFC 9864), the device's name a CWT claim (RFC 9597). `seq` grows with every message of
//! one key: each number works once, within a window of the last 64 (see [`Window`]). What the message is for, and for which gateway, is under the signature by
//! way of `external_aad`, so that a captured message can be sent nowhere else.
//!
//! Deliberately not here: anything in the unprotected header, and headers that are not named above.

use crate::Signature;
use crate::cbor::{Reader, Writer};
use crate::keys::{GatewayId, KeyId, PublicKey, SecretKey};

/// What stands under the signature beside the message itself.
#[derive(Clone, Copy, Debug)]
pub struct Purpose<'a> {
    /// The CoAP code of the request, 2 for POST.
    pub method: u8,
    pub path: &'a [&'a str],
    pub gateway_id: &'a GatewayId,
}

impl Purpose<'_> {
    fn encode(&self) -> Vec<u8> {
        let path = Writer::default().array(3).uint(u64::from(self.method)).array(self.path.len() as u64);
        let path = self.path.iter().fold(path, |writer, segment| writer.text(segment));
        path.bytes(&self.gateway_id.0).finish()
    }
}

/// A message as it came, not verified.
#[derive(Clone, Copy, Debug)]
pub struct Signed<'a> {
    protected: &'a [u8],
    pub device_id: &'a str,
    pub key_id: KeyId,
    pub sequence: u64,
    /// Of the payload.
    pub content_format: Option<u16>,
    pub payload: &'a [u8],
    signature: Signature,
}

impl<'a> Signed<'a> {
    /// Reads a message; `None` for what is not of this form.
    pub fn parse(body: &'a [u8]) -> Option<Self> {
        let mut reader = Reader::new(body);
        if body.first() == Some(&TAG_SIGN1) {
            reader = Reader::new(body.get(1..)?);
        }
        (reader.array()? == 4).then_some(())?;
        let protected = reader.bytes()?;
        (reader.map()? == 0).then_some(())?;
        let payload = reader.bytes()?;
        let signature = reader.bytes()?.try_into().ok()?;
        reader.end()?;
        let header = Header::parse(protected)?;
        Some(Signed {
            protected,
            device_id: header.device_id?,
            key_id: header.key_id?,
            sequence: header.sequence?,
            content_format: header.content_format,
            payload,
            signature,
        })
    }

    /// Whether `key` signed this, for this purpose.
    #[must_use]
    pub fn verify(&self, key: &PublicKey, purpose: &Purpose<'_>) -> bool {
        key.verify(&to_be_signed(self.protected, purpose, self.payload), &self.signature)
    }
}

/// Makes a message: the device's side.
pub fn sign(
    key: &SecretKey,
    device_id: &str,
    sequence: u64,
    content_format: Option<u16>,
    payload: &[u8],
    purpose: &Purpose<'_>,
) -> Vec<u8> {
    let pairs = if content_format.is_some() { 5 } else { 4 };
    let header = Writer::default().map(pairs).uint(ALGORITHM).int(EDDSA);
    let header = match content_format {
        Some(format) => header.uint(CONTENT_TYPE).uint(u64::from(format)),
        None => header,
    };
    let header = header.uint(KEY_ID).bytes(&key.public().key_id().0);
    let header = header.uint(CWT_CLAIMS).map(1).uint(SUBJECT).text(device_id);
    let protected = header.text(SEQUENCE).uint(sequence).finish();
    let signature = key.sign(&to_be_signed(&protected, purpose, payload));
    Writer::default().array(4).bytes(&protected).map(0).bytes(payload).bytes(&signature).finish()
}

/// RFC 9052 section 4.4.
fn to_be_signed(protected: &[u8], purpose: &Purpose<'_>, payload: &[u8]) -> Vec<u8> {
    let structure = Writer::default().array(4).text("Signature1").bytes(protected);
    structure.bytes(&purpose.encode()).bytes(payload).finish()
}

#[derive(Default)]
struct Header<'a> {
    algorithm: Option<i64>,
    content_format: Option<u16>,
    key_id: Option<KeyId>,
    device_id: Option<&'a str>,
    sequence: Option<u64>,
}

impl<'a> Header<'a> {
    /// Each header once, and none that we do not know: one that we skipped might have been meant to refuse us.
    fn parse(protected: &'a [u8]) -> Option<Self> {
        let mut reader = Reader::new(protected);
        let mut header = Header::default();
        for _ in 0..reader.map()? {
            let fresh = if let Some(label) = reader.uint() {
                match label {
                    ALGORITHM => header.algorithm.replace(reader.int()?).is_none(),
                    CONTENT_TYPE => header.content_format.replace(u16::try_from(reader.uint()?).ok()?).is_none(),
                    KEY_ID => header.key_id.replace(KeyId(reader.bytes()?.try_into().ok()?)).is_none(),
                    CWT_CLAIMS => {
                        (reader.map()? == 1 && reader.uint()? == SUBJECT).then_some(())?;
                        header.device_id.replace(reader.text()?).is_none()
                    }
                    _ => return None,
                }
            } else {
                (reader.text()? == SEQUENCE).then_some(())?;
                header.sequence.replace(reader.uint()?).is_none()
            };
            fresh.then_some(())?;
        }
        reader.end()?;
        matches!(header.algorithm, Some(EDDSA | ED25519)).then_some(header)
    }
}

/// Which sequence numbers of one key have been used: the highest, and which of the 63 below it. What is older counts as used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// One above the highest used; 0 when none was.
    next: u64,
    /// Bit n stands for `next - 1 - n`.
    used: u64,
}

impl Window {
    /// The window of a key of which only the highest number used is known: everything up to it counts as used.
    pub const fn after(highest: u64) -> Self {
        Window { next: highest.saturating_add(1), used: u64::MAX }
    }

    /// Uses a number, once.
    #[must_use]
    pub fn take(&mut self, sequence: u64) -> bool {
        // The last number of all could not be followed by another.
        if sequence == u64::MAX {
            return false;
        }
        match sequence.checked_sub(self.next) {
            Some(ahead) => {
                self.used = match u32::try_from(ahead + 1) {
                    Ok(shift) if shift < u64::BITS => self.used << shift | 1,
                    Ok(_) | Err(_) => 1,
                };
                self.next = sequence + 1;
                true
            }
            None => {
                let behind = self.next - 1 - sequence;
                if behind >= u64::from(u64::BITS) || self.used >> behind & 1 == 1 {
                    return false;
                }
                self.used |= 1 << behind;
                true
            }
        }
    }

    /// The highest number used.
    pub const fn highest(&self) -> Option<u64> {
        self.next.checked_sub(1)
    }
}

const TAG_SIGN1: u8 = 0xd2;
const ALGORITHM: u64 = 1;
const CONTENT_TYPE: u64 = 3;
const KEY_ID: u64 = 4;
const CWT_CLAIMS: u64 = 15;
const SUBJECT: u64 = 2;
const SEQUENCE: &str = "seq";
const EDDSA: i64 = -8;
const ED25519: i64 = -19;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const GATEWAY: GatewayId = GatewayId([9; 32]);

    fn purpose<'a>(method: u8, path: &'a [&'a str]) -> Purpose<'a> {
        Purpose { method, path, gateway_id: &GATEWAY }
    }

    #[test]
    fn a_message_reads_back_and_holds_for_its_purpose_only() {
        let key = SecretKey::from_seed(&[1; 32]);
        let body = sign(&key, "sensor-1", 7, Some(50), b"{}", &purpose(2, &["t", "room"]));
        let signed = Signed::parse(&body).unwrap();
        assert_eq!((signed.device_id, signed.sequence, signed.content_format), ("sensor-1", 7, Some(50)));
        assert_eq!((signed.payload, signed.key_id), (&b"{}"[..], key.public().key_id()));
        assert!(signed.verify(&key.public(), &purpose(2, &["t", "room"])));
        assert!(!signed.verify(&key.public(), &purpose(3, &["t", "room"])), "another method");
        assert!(!signed.verify(&key.public(), &purpose(2, &["e", "room"])), "another path");
        assert!(!signed.verify(&key.public(), &purpose(2, &["t/room"])), "other segments");
        let elsewhere = Purpose { gateway_id: &GatewayId([8; 32]), ..purpose(2, &["t", "room"]) };
        assert!(!signed.verify(&key.public(), &elsewhere), "another gateway");
        assert!(!signed.verify(&SecretKey::from_seed(&[2; 32]).public(), &purpose(2, &["t", "room"])), "another key");
        let tagged = [&[TAG_SIGN1][..], &body].concat();
        assert!(Signed::parse(&tagged).unwrap().verify(&key.public(), &purpose(2, &["t", "room"])));
    }

    /// The same bytes as the Python package cbor2 makes of the description above.
    #[test]
    fn the_bytes_under_the_signature_are_those_of_rfc_9052() {
        let protected = [0xa1, 0x01, 0x27];
        let path = ["t"];
        let purpose = Purpose { method: 2, path: &path, gateway_id: &GatewayId([0; 32]) };
        let mut expected = b"\x84\x6aSignature1\x43\xa1\x01\x27\x58\x27\x83\x02\x81\x61t\x58\x20".to_vec();
        expected.extend([0; 32]);
        expected.extend(b"\x42hi");
        assert_eq!(to_be_signed(&protected, &purpose, b"hi"), expected);
    }

    #[test]
    fn what_is_not_of_this_form_is_not_read() {
        let key = SecretKey::from_seed(&[1; 32]);
        let body = sign(&key, "d", 7, None, b"x", &purpose(2, &["t"]));
        for end in 0..body.len() {
            assert!(Signed::parse(&body[..end]).is_none(), "cut at {end}");
        }
        assert!(Signed::parse(&[&body[..], b"\0"].concat()).is_none(), "something behind it");
        let protected =
            |header: Vec<u8>| Writer::default().array(4).bytes(&header).map(0).bytes(b"x").bytes(&[0; 64]).finish();
        let id = [0; 8];
        let claims = |w: Writer| w.uint(15).map(1).uint(2).text("d");
        let whole = |w: Writer| claims(w.uint(1).int(-8).uint(4).bytes(&id)).text("seq").uint(1);
        assert!(Signed::parse(&protected(whole(Writer::default().map(4)).finish())).is_some());
        for (why, header) in [
            ("twice the same", whole(Writer::default().map(5)).uint(1).int(-8)),
            ("an unknown header", whole(Writer::default().map(5)).uint(99).uint(0)),
            ("no sequence", claims(Writer::default().map(3).uint(1).int(-8).uint(4).bytes(&id))),
            (
                "another algorithm",
                claims(Writer::default().map(4).uint(1).int(-7).uint(4).bytes(&id)).text("seq").uint(1),
            ),
            (
                "a short key id",
                claims(Writer::default().map(4).uint(1).int(-8).uint(4).bytes(&[0; 7])).text("seq").uint(1),
            ),
            ("nothing", Writer::default().map(0)),
        ] {
            assert!(Signed::parse(&protected(header.finish())).is_none(), "{why}");
        }
    }

    #[test]
    fn each_number_works_once_within_the_last_64() {
        let mut window = Window::default();
        assert!(window.take(0) && !window.take(0));
        assert!(window.take(5) && window.take(3) && !window.take(3));
        assert!(window.take(100) && !window.take(36) && window.take(37) && !window.take(37));
        assert!(window.take(1 << 40) && !window.take(100));
        assert!(!window.take(u64::MAX));
        let mut restarted = Window::after(10);
        assert!(!restarted.take(9) && !restarted.take(10) && restarted.take(11));
        assert_eq!(restarted.highest(), Some(11));
    }

    proptest! {
        #[test]
        fn a_window_never_lets_a_number_through_twice(numbers in prop::collection::vec(0u64..200, 0..300)) {
            let (mut window, mut used) = (Window::default(), BTreeSet::new());
            for number in numbers {
                let highest = used.last().copied().unwrap_or(0);
                let in_reach = number + 63 >= highest;
                prop_assert_eq!(window.take(number), in_reach && used.insert(number));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(body: Vec<u8>) {
            let _ = Signed::parse(&body);
        }
    }
}

//! Keys as text: PKCS#8 and SPKI in PEM (RFC 8410), as openssl and every library read and write them, and the short forms that people paste.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

use crate::keys::{InvalidKey, PublicKey, SecretKey};
use crate::text;

/// Why a text is not a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyTextError {
    /// Neither PEM nor hex nor base64, or of another kind of key.
    Unreadable,
    /// A private key where a public one is asked for: it is safer to say so than to derive the public one.
    IsPrivate,
    /// The text is fine, the key is not.
    Invalid(InvalidKey),
}

impl fmt::Display for KeyTextError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeyTextError::Unreadable => {
                f.write_str("not an Ed25519 key in PEM, OpenSSH form, 64 hex digits or 32 bytes of base64")
            }
            KeyTextError::IsPrivate => f.write_str("a private key, and a public one is needed"),
            KeyTextError::Invalid(why) => why.fmt(f),
        }
    }
}

impl std::error::Error for KeyTextError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            KeyTextError::Unreadable | KeyTextError::IsPrivate => None,
            KeyTextError::Invalid(why) => Some(why),
        }
    }
}

/// A private key as PKCS#8 in PEM.
pub fn secret_to_pem(key: &SecretKey) -> Zeroizing<String> {
    let der = Zeroizing::new([PKCS8_HEAD, key.seed()].concat());
    Zeroizing::new(pem(PRIVATE_LABEL, &der))
}

/// A public key as SPKI in PEM.
pub fn public_to_pem(key: &PublicKey) -> String {
    pem(PUBLIC_LABEL, &[SPKI_HEAD, key.as_bytes()].concat())
}

/// Reads a private key: PKCS#8 in PEM (version 1 or 2), or the seed as 64 hex digits.
///
/// # Errors
/// For anything else. If the file carries a public key too, it must be the right one.
pub fn secret_from_text(input: &str) -> Result<SecretKey, KeyTextError> {
    let input = input.trim();
    if let Some(seed) = text::from_hex(input).map(Zeroizing::new) {
        return Ok(SecretKey::from_seed(&seed));
    }
    let der = Zeroizing::new(unpem(PRIVATE_LABEL, input).ok_or(KeyTextError::Unreadable)?);
    // RFC 8410 section 7: version 0 or 1, then the algorithm, then the seed; version 1 may add the public key.
    let (version, rest) = match der.as_slice() {
        [0x30, _, 0x02, 0x01, version @ 0..=1, rest @ ..] => (*version, rest),
        _ => return Err(KeyTextError::Unreadable),
    };
    let rest = rest.strip_prefix(PKCS8_BODY).ok_or(KeyTextError::Unreadable)?;
    let (seed, rest) = rest.split_first_chunk::<32>().ok_or(KeyTextError::Unreadable)?;
    let key = SecretKey::from_seed(seed);
    let public = rest.strip_prefix(&[0x81, 0x21, 0x00]).or_else(|| rest.strip_prefix(&[0xa1, 0x23, 0x03, 0x21, 0x00]));
    match public {
        None if rest.is_empty() => Ok(key),
        Some(public) if version == 1 && public == key.public().as_bytes() => Ok(key),
        None | Some(_) => Err(KeyTextError::Unreadable),
    }
}

/// Reads and judges a public key: SPKI in PEM, `ssh-ed25519 ...`, 64 hex digits, or base64 of either alphabet, of the 32 bytes or of the SPKI.
///
/// # Errors
/// For anything else, and for keys that must not be registered.
pub fn public_from_text(input: &str) -> Result<PublicKey, KeyTextError> {
    let input = input.trim();
    if input.contains("PRIVATE KEY") {
        return Err(KeyTextError::IsPrivate);
    }
    let bytes = public_bytes(input).ok_or(KeyTextError::Unreadable)?;
    PublicKey::register(bytes).map_err(KeyTextError::Invalid)
}

fn public_bytes(input: &str) -> Option<[u8; 32]> {
    let of_spki = |der: &[u8]| der.strip_prefix(SPKI_HEAD)?.try_into().ok();
    if let Some(der) = unpem(PUBLIC_LABEL, input) {
        return of_spki(&der);
    }
    if let Some(rest) = input.strip_prefix("ssh-ed25519 ") {
        let blob = STANDARD.decode(rest.split(' ').next()?).ok()?;
        return blob.strip_prefix(SSH_HEAD)?.try_into().ok();
    }
    let unpadded = input.trim_end_matches('=').replace('+', "-").replace('/', "_");
    text::from_text(&unpadded).or_else(|| of_spki(&text::from_base64url::<44>(&unpadded)?))
}

fn pem(label: &str, der: &[u8]) -> String {
    // The longest of ours has 83 bytes of DER: two lines.
    let body = STANDARD.encode(der);
    let mut out = format!("-----BEGIN {label}-----\n");
    for line in body.as_bytes().chunks(64) {
        out.push_str(&String::from_utf8_lossy(line));
        out.push('\n');
    }
    out.push_str(&format!("-----END {label}-----\n"));
    out
}

fn unpem(label: &str, input: &str) -> Option<Vec<u8>> {
    // Text before the first block is a comment (RFC 7468 section 2); openssl writes such.
    let (_, rest) = input.split_once(&format!("-----BEGIN {label}-----"))?;
    let (body, _) = rest.split_once(&format!("-----END {label}-----"))?;
    let body: Zeroizing<String> = Zeroizing::new(body.split_ascii_whitespace().collect());
    if body.len() > 256 {
        return None;
    }
    STANDARD.decode(body.as_bytes()).ok()
}

const PRIVATE_LABEL: &str = "PRIVATE KEY";
const PUBLIC_LABEL: &str = "PUBLIC KEY";
/// `SEQUENCE { INTEGER 0, SEQUENCE { OID 1.3.101.112 }, OCTET STRING { OCTET STRING {` seed; RFC 8410 section 7.
const PKCS8_HEAD: &[u8] =
    &[0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
/// The same from behind the version.
const PKCS8_BODY: &[u8] = &[0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
/// `SEQUENCE { SEQUENCE { OID 1.3.101.112 }, BIT STRING {` key; RFC 8410 section 4.
const SPKI_HEAD: &[u8] = &[0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// `string "ssh-ed25519"`, `string` key; RFC 8709 section 4.
const SSH_HEAD: &[u8] = b"\0\0\0\x0bssh-ed25519\0\0\0\x20";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 8410 section 10.3, version 1.
    const RFC_PRIVATE: &str = "-----BEGIN PRIVATE KEY-----\n\
        MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n-----END PRIVATE KEY-----\n";
    /// RFC 8410 section 10.1.
    const RFC_PUBLIC: &str = "-----BEGIN PUBLIC KEY-----\n\
        MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n-----END PUBLIC KEY-----\n";

    #[test]
    fn the_keys_of_rfc_8410_are_read_and_written() {
        let secret = secret_from_text(RFC_PRIVATE).unwrap();
        let public = public_from_text(RFC_PUBLIC).unwrap();
        assert_eq!(secret.public(), public);
        assert_eq!(*secret_to_pem(&secret), RFC_PRIVATE);
        assert_eq!(public_to_pem(&public), RFC_PUBLIC);
        assert_eq!(secret_from_text(&text::hex(secret.seed())).unwrap().public(), public);
    }

    #[test]
    fn version_2_is_read_if_its_public_key_is_the_right_one() {
        let key = SecretKey::from_seed(&[8; 32]);
        let of = |head: [u8; 3], tail: &[u8], public: &[u8; 32]| {
            let [_, length, version] = head;
            let der = [&[0x30, length, 2, 1, version][..], PKCS8_BODY, key.seed(), tail, public].concat();
            secret_from_text(&pem(PRIVATE_LABEL, &der)).map(|key| key.public())
        };
        let right = *key.public().as_bytes();
        assert_eq!(of([0, 0x51, 1], &[0x81, 0x21, 0], &right), Ok(key.public()));
        assert_eq!(of([0, 0x53, 1], &[0xa1, 0x23, 3, 0x21, 0], &right), Ok(key.public()));
        assert_eq!(of([0, 0x51, 1], &[0x81, 0x21, 0], &[1; 32]), Err(KeyTextError::Unreadable));
        assert_eq!(of([0, 0x51, 0], &[0x81, 0x21, 0], &right), Err(KeyTextError::Unreadable));
    }

    #[test]
    fn a_public_key_is_read_in_every_form_that_people_paste() {
        let key = public_from_text(RFC_PUBLIC).unwrap();
        let spki = [SPKI_HEAD, key.as_bytes()].concat();
        let ssh = STANDARD.encode([SSH_HEAD, key.as_bytes().as_slice()].concat());
        for form in [
            text::hex(key.as_bytes()),
            text::base64url(key.as_bytes()),
            STANDARD.encode(key.as_bytes()),
            STANDARD.encode(&spki),
            format!("ssh-ed25519 {ssh} someone@somewhere"),
            format!("ssh-ed25519 {ssh}\n"),
            format!("a comment\n{RFC_PUBLIC}"),
        ] {
            assert_eq!(public_from_text(&form), Ok(key), "{form}");
        }
    }

    #[test]
    fn the_wrong_key_is_named() {
        assert_eq!(public_from_text(RFC_PRIVATE), Err(KeyTextError::IsPrivate));
        assert_eq!(public_from_text(&"00".repeat(32)), Err(KeyTextError::Invalid(InvalidKey::Weak)));
        for bad in ["", "abc", &RFC_PUBLIC[..100], "ssh-rsa AAAA"] {
            assert_eq!(public_from_text(bad), Err(KeyTextError::Unreadable), "{bad}");
        }
        assert!(secret_from_text(RFC_PUBLIC).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text: String, der: Vec<u8>) {
            let _ = public_from_text(&text);
            let _ = secret_from_text(&text).map(|_| ());
            let _ = public_from_text(&pem(PUBLIC_LABEL, &der));
            let _ = secret_from_text(&pem(PRIVATE_LABEL, &der)).map(|_| ());
        }

        #[test]
        fn every_secret_reads_back(seed: [u8; 32]) {
            let key = SecretKey::from_seed(&seed);
            let pem = secret_to_pem(&key);
            let again = secret_from_text(&pem).unwrap();
            prop_assert_eq!(again.seed(), &seed);
        }
    }
}

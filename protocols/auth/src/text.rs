//! Bytes as text: lower-case hex for ids, base64url without padding (RFC 4648 section 5) for everything that is random.
//!
//! Decoding is strict (no whitespace, no padding, no stray bits), so that one value has one spelling in each alphabet.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        for nibble in [byte >> 4, byte & 15] {
            text.extend(DIGITS.get(usize::from(nibble)));
        }
    }
    text
}

/// Reads exactly `N` bytes of hex, either case.
pub fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let nibble = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let text = text.as_bytes();
    if text.len() != N.checked_mul(2)? {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.as_chunks::<2>().0) {
        let [high, low] = *pair;
        *byte = nibble(high)? << 4 | nibble(low)?;
    }
    Some(bytes)
}

/// base64url without padding.
pub fn base64url(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Reads exactly `N` bytes of unpadded base64url.
pub fn from_base64url<const N: usize>(text: &str) -> Option<[u8; N]> {
    // The exact length first: nothing longer is ever decoded.
    if text.len() != N.checked_mul(4)?.div_ceil(3) {
        return None;
    }
    URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok()
}

/// Reads exactly `N` bytes of hex or of base64url: their lengths differ, so there is never a doubt which it is.
pub fn from_text<const N: usize>(text: &str) -> Option<[u8; N]> {
    from_hex(text).or_else(|| from_base64url(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn both_alphabets_read_back(bytes: [u8; 19]) {
            prop_assert_eq!(from_text(&hex(&bytes)), Some(bytes));
            prop_assert_eq!(from_text(&hex(&bytes).to_uppercase()), Some(bytes));
            prop_assert_eq!(from_text(&base64url(&bytes)), Some(bytes));
        }

        #[test]
        fn arbitrary_text_never_panics(text: String) {
            let _ = from_text::<8>(&text);
            let _ = from_text::<16>(&text);
        }
    }

    #[test]
    fn one_value_has_one_spelling() {
        assert_eq!(from_base64url::<1>("_w"), Some([255]));
        // Stray bits, padding, the other alphabet, whitespace.
        for bad in ["_x", "_w==", "/w", " _w", "_w\n", ""] {
            assert_eq!(from_base64url::<1>(bad), None, "{bad:?}");
        }
    }
}

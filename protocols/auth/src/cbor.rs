//! As much CBOR (RFC 8949) as the CoAP flow needs: arrays, maps, text, byte strings and whole numbers, of definite length.
//!
//! The reader takes shortest encodings only and nothing nested deeper than its caller asks for, so it cannot be led anywhere.

/// Reads one item after another from a body.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub const fn new(body: &'a [u8]) -> Self {
        Reader { rest: body }
    }

    /// The head of an array: its number of items.
    pub fn array(&mut self) -> Option<u64> {
        self.head(ARRAY)
    }

    /// The head of a map: its number of pairs.
    pub fn map(&mut self) -> Option<u64> {
        self.head(MAP)
    }

    pub fn uint(&mut self) -> Option<u64> {
        self.head(UINT)
    }

    /// A whole number of either sign.
    pub fn int(&mut self) -> Option<i64> {
        match self.rest.first()? >> 5 {
            NEGATIVE => i64::try_from(self.head(NEGATIVE)?).ok().map(|value| -1 - value),
            _ => i64::try_from(self.uint()?).ok(),
        }
    }

    pub fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = self.head(BYTES)?;
        self.take(length)
    }

    pub fn text(&mut self) -> Option<&'a str> {
        let length = self.head(TEXT)?;
        std::str::from_utf8(self.take(length)?).ok()
    }

    /// That nothing follows.
    pub fn end(&self) -> Option<()> {
        self.rest.is_empty().then_some(())
    }

    fn head(&mut self, major: u8) -> Option<u64> {
        let (&first, rest) = self.rest.split_first()?;
        if first >> 5 != major {
            return None;
        }
        let extra = match first & 31 {
            small @ 0..24 => {
                self.rest = rest;
                return Some(u64::from(small));
            }
            24 => 1,
            25 => 2,
            26 => 4,
            27 => 8,
            _ => return None,
        };
        let (number, rest) = rest.split_at_checked(extra)?;
        let value = number.iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        let shortest_min = match extra {
            1 => 24,
            2 => 1 << 8,
            4 => 1 << 16,
            _ => 1 << 32,
        };
        if value < shortest_min {
            return None;
        }
        self.rest = rest;
        Some(value)
    }

    fn take(&mut self, length: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(usize::try_from(length).ok()?)?;
        self.rest = rest;
        Some(taken)
    }
}

/// Writes one item after another, in the shortest encoding.
#[derive(Debug, Default)]
pub struct Writer {
    body: Vec<u8>,
}

impl Writer {
    #[must_use]
    pub fn array(self, items: u64) -> Self {
        self.head(ARRAY, items)
    }

    #[must_use]
    pub fn map(self, pairs: u64) -> Self {
        self.head(MAP, pairs)
    }

    #[must_use]
    pub fn uint(self, value: u64) -> Self {
        self.head(UINT, value)
    }

    #[must_use]
    pub fn int(self, value: i64) -> Self {
        match u64::try_from(value) {
            Ok(value) => self.head(UINT, value),
            Err(_) => self.head(NEGATIVE, (-1 - value).unsigned_abs()),
        }
    }

    #[must_use]
    pub fn bytes(self, bytes: &[u8]) -> Self {
        self.string(BYTES, bytes)
    }

    #[must_use]
    pub fn text(self, text: &str) -> Self {
        self.string(TEXT, text.as_bytes())
    }

    pub fn finish(self) -> Vec<u8> {
        self.body
    }

    fn string(self, major: u8, bytes: &[u8]) -> Self {
        let mut this = self.head(major, bytes.len() as u64);
        this.body.extend_from_slice(bytes);
        this
    }

    fn head(mut self, major: u8, value: u64) -> Self {
        let major = major << 5;
        let [b0, b1, b2, b3, b4, b5, b6, b7] = value.to_be_bytes();
        match value {
            0..24 => self.body.push(major | b7),
            24..0x100 => self.body.extend([major | 24, b7]),
            0x100..0x1_0000 => self.body.extend([major | 25, b6, b7]),
            0x1_0000..0x1_0000_0000 => self.body.extend([major | 26, b4, b5, b6, b7]),
            0x1_0000_0000.. => self.body.extend([major | 27, b0, b1, b2, b3, b4, b5, b6, b7]),
        }
        self
    }
}

const UINT: u8 = 0;
const NEGATIVE: u8 = 1;
const BYTES: u8 = 2;
const TEXT: u8 = 3;
const ARRAY: u8 = 4;
const MAP: u8 = 5;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_have_the_encodings_of_rfc_8949_appendix_a() {
        for (value, encoded) in [
            (0, vec![0x00]),
            (23, vec![0x17]),
            (24, vec![0x18, 0x18]),
            (1000, vec![0x19, 0x03, 0xe8]),
            (1_000_000, vec![0x1a, 0x00, 0x0f, 0x42, 0x40]),
            (1_000_000_000_000, vec![0x1b, 0, 0, 0, 0xe8, 0xd4, 0xa5, 0x10, 0]),
        ] {
            assert_eq!(Writer::default().uint(value).finish(), encoded);
            assert_eq!(Reader::new(&encoded).uint(), Some(value));
        }
    }

    #[test]
    fn numbers_below_zero_have_the_encodings_of_rfc_8949_appendix_a() {
        for (value, encoded) in [
            (-1, vec![0x20]),
            (-10, vec![0x29]),
            (-100, vec![0x38, 0x63]),
            (-1000, vec![0x39, 0x03, 0xe7]),
            (i64::MIN, vec![0x3b, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
            (10, vec![0x0a]),
        ] {
            assert_eq!(Writer::default().int(value).finish(), encoded);
            assert_eq!(Reader::new(&encoded).int(), Some(value));
        }
        assert_eq!(Reader::new(&[0x3b, 0x80, 0, 0, 0, 0, 0, 0, 0]).int(), None, "below the smallest");
    }

    #[test]
    fn longer_encodings_indefinite_lengths_and_short_bodies_are_refused() {
        for bad in [&[0x18, 0x17][..], &[0x19, 0, 0xff], &[0x1b, 0, 0, 0, 0, 0, 0, 0, 1], &[0x1f], &[0x19, 1], &[]] {
            assert_eq!(Reader::new(bad).uint(), None, "{bad:?}");
        }
        assert_eq!(Reader::new(&[0x5f, 0xff]).bytes(), None);
        assert_eq!(Reader::new(&[0x5b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]).bytes(), None);
        assert_eq!(Reader::new(&[0x61, 0xff]).text(), None);
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(text: String, bytes: Vec<u8>, number: u64) {
            let body = Writer::default().array(3).text(&text).bytes(&bytes).uint(number).finish();
            let mut reader = Reader::new(&body);
            prop_assert_eq!(reader.array(), Some(3));
            prop_assert_eq!(reader.text(), Some(text.as_str()));
            prop_assert_eq!(reader.bytes(), Some(bytes.as_slice()));
            prop_assert_eq!(reader.uint(), Some(number));
            prop_assert_eq!(reader.end(), Some(()));
        }

        #[test]
        fn arbitrary_bytes_never_panic(body: Vec<u8>) {
            let mut reader = Reader::new(&body);
            let _ = (reader.array(), reader.map(), reader.uint(), reader.bytes(), reader.text(), reader.end());
        }
    }
}

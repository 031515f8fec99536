//! Option numbers with what a receiver must know about each: name, class, length range, repeatability.
//!
//! The class is in the number itself (RFC 7252 section 5.4.6): odd is critical, bit 1 is unsafe to forward, bits 2 to 4 all set under a safe
//! one is "not part of the cache key".

/// Option numbers (the IANA registry "CoAP Option Numbers").
pub mod number {
    pub const IF_MATCH: u16 = 1;
    pub const URI_HOST: u16 = 3;
    pub const ETAG: u16 = 4;
    pub const IF_NONE_MATCH: u16 = 5;
    pub const OBSERVE: u16 = 6;
    pub const URI_PORT: u16 = 7;
    pub const LOCATION_PATH: u16 = 8;
    pub const OSCORE: u16 = 9;
    pub const URI_PATH: u16 = 11;
    pub const CONTENT_FORMAT: u16 = 12;
    pub const MAX_AGE: u16 = 14;
    pub const URI_QUERY: u16 = 15;
    pub const HOP_LIMIT: u16 = 16;
    pub const ACCEPT: u16 = 17;
    pub const Q_BLOCK1: u16 = 19;
    pub const LOCATION_QUERY: u16 = 20;
    pub const EDHOC: u16 = 21;
    pub const BLOCK2: u16 = 23;
    pub const BLOCK1: u16 = 27;
    pub const SIZE2: u16 = 28;
    pub const Q_BLOCK2: u16 = 31;
    pub const PROXY_URI: u16 = 35;
    pub const PROXY_SCHEME: u16 = 39;
    pub const SIZE1: u16 = 60;
    pub const ECHO: u16 = 252;
    pub const NO_RESPONSE: u16 = 258;
    pub const REQUEST_TAG: u16 = 292;
}

use number as n;

/// What the specification says about one option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Definition {
    pub name: &'static str,
    pub length_min: u16,
    pub length_max: u16,
    pub repeatable: bool,
}

/// An unrecognised option of this class refuses the message (RFC 7252 section 5.4.1).
pub const fn is_critical(number: u16) -> bool {
    number & 1 == 1
}

/// A proxy that does not know it must not forward the message (section 5.4.2).
pub const fn is_unsafe_to_forward(number: u16) -> bool {
    number & 2 == 2
}

/// Two requests that differ only in such an option ask for the same thing (section 5.4.2).
pub const fn is_no_cache_key(number: u16) -> bool {
    number & 0x1e == 0x1c
}

/// The registered definition; `None` for numbers that this engine has never heard of.
pub const fn definition(number: u16) -> Option<Definition> {
    const fn def(name: &'static str, length_min: u16, length_max: u16, repeatable: bool) -> Option<Definition> {
        Some(Definition { name, length_min, length_max, repeatable })
    }
    match number {
        n::IF_MATCH => def("If-Match", 0, 8, true),
        n::URI_HOST => def("Uri-Host", 1, 255, false),
        n::ETAG => def("ETag", 1, 8, true),
        n::IF_NONE_MATCH => def("If-None-Match", 0, 0, false),
        n::OBSERVE => def("Observe", 0, 3, false),
        n::URI_PORT => def("Uri-Port", 0, 2, false),
        n::LOCATION_PATH => def("Location-Path", 0, 255, true),
        n::OSCORE => def("OSCORE", 0, 255, false),
        n::URI_PATH => def("Uri-Path", 0, 255, true),
        n::CONTENT_FORMAT => def("Content-Format", 0, 2, false),
        n::MAX_AGE => def("Max-Age", 0, 4, false),
        n::URI_QUERY => def("Uri-Query", 0, 255, true),
        n::HOP_LIMIT => def("Hop-Limit", 1, 1, false),
        n::ACCEPT => def("Accept", 0, 2, false),
        n::Q_BLOCK1 => def("Q-Block1", 0, 3, false),
        n::LOCATION_QUERY => def("Location-Query", 0, 255, true),
        n::EDHOC => def("EDHOC", 0, 0, false),
        n::BLOCK2 => def("Block2", 0, 3, false),
        n::BLOCK1 => def("Block1", 0, 3, false),
        n::SIZE2 => def("Size2", 0, 4, false),
        n::Q_BLOCK2 => def("Q-Block2", 0, 3, true),
        n::PROXY_URI => def("Proxy-Uri", 1, 1034, false),
        n::PROXY_SCHEME => def("Proxy-Scheme", 1, 255, false),
        n::SIZE1 => def("Size1", 0, 4, false),
        n::ECHO => def("Echo", 1, 40, false),
        n::NO_RESPONSE => def("No-Response", 0, 1, false),
        n::REQUEST_TAG => def("Request-Tag", 0, 8, true),
        _ => None,
    }
}

/// Critical options that this engine acts on or hands to the application in a request; every other critical one is refused.
pub const fn is_understood_critical(number: u16) -> bool {
    matches!(
        number,
        n::IF_MATCH
            | n::URI_HOST
            | n::IF_NONE_MATCH
            | n::URI_PORT
            | n::URI_PATH
            | n::URI_QUERY
            | n::ACCEPT
            | n::BLOCK1
            | n::BLOCK2
    )
}

/// An unsigned integer in network order without leading zeros; leading zeros are accepted (section 3.2). `None` above eight bytes.
pub fn uint(value: &[u8]) -> Option<u64> {
    if value.len() > 8 {
        return None;
    }
    Some(value.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

/// [`uint`] for options of at most four bytes.
pub fn uint32(value: &[u8]) -> Option<u32> {
    uint(value).and_then(|v| u32::try_from(v).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn criticality_follows_from_the_number() {
        for critical in
            [n::IF_MATCH, n::URI_PATH, n::URI_QUERY, n::ACCEPT, n::BLOCK1, n::BLOCK2, n::PROXY_URI, n::OSCORE]
        {
            assert!(is_critical(critical), "{critical}");
        }
        for elective in
            [n::ETAG, n::OBSERVE, n::CONTENT_FORMAT, n::MAX_AGE, n::SIZE1, n::ECHO, n::NO_RESPONSE, n::REQUEST_TAG]
        {
            assert!(!is_critical(elective), "{elective}");
        }
        assert!(is_no_cache_key(n::SIZE1) && is_no_cache_key(n::ECHO) && !is_no_cache_key(n::URI_QUERY));
        assert!(is_unsafe_to_forward(n::PROXY_URI) && !is_unsafe_to_forward(n::ACCEPT));
    }

    #[test]
    fn unsigned_integers_may_have_leading_zeros_and_are_bounded() {
        assert_eq!(uint(&[]), Some(0));
        assert_eq!(uint(&[0, 0, 1]), Some(1));
        assert_eq!(uint(&[0x12, 0x34]), Some(0x1234));
        assert_eq!(uint(&[1; 9]), None);
        assert_eq!(uint32(&[1, 0, 0, 0, 0]), None);
    }
}

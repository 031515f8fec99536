//! Tells from a connection's first bytes which protocol its peer speaks.
//!
//! [`classify`] is a pure function of those bytes. It promises three things, each a property test below:
//! - **bounded**: with [`PREFIX_BYTES_MAX`] bytes at hand it never asks for more;
//! - **prefix-monotone**: a decided verdict never changes when more bytes arrive, so it may be asked after every read;
//! - **honest**: [`Verdict::Need`] never asks for bytes that a speaker of some protocol might not send before it expects an answer,
//!   with one exception, noted at `coap_over_tcp`.
//!
//! It deliberately does not parse: a verdict says whose engine gets the bytes, and that engine judges them from the first byte on.
//! WebSocket is an HTTP/1.1 request with `Upgrade` and is told apart by the HTTP adapter. An empty line before a request line
//! (RFC 9112 section 2.2 lets a server skip it) is not skipped: no client in use sends one on a fresh connection.

#![forbid(unsafe_code)]

/// With this many bytes every verdict is final: the longest method, a space, and `https://`.
pub const PREFIX_BYTES_MAX: usize = METHOD_BYTES_MAX + 1 + HTTPS.len();

/// The longest method token taken for HTTP. The longest registered one, `UPDATEREDIRECTREF`, has 17 bytes.
pub const METHOD_BYTES_MAX: usize = 32;

const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const PROXY_V1: &[u8] = b"PROXY ";
const PROXY_V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
const HTTP: &[u8] = b"http://";
const HTTPS: &[u8] = b"https://";
/// RFC 8323 section 5.3: code 7.01, the first message of either side.
const CSM: u8 = 0xE1;

/// What the peer speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Undecided; no protocol can be recognised before this many more bytes (at least 1) have arrived.
    Need(usize),
    /// An HTTP/1.x request line: a method token, a space and the beginning of a request target (RFC 9112 section 3).
    Http1,
    /// The HTTP/2 connection preface, whole (RFC 9113 section 3.4).
    Http2,
    /// An MQTT CONNECT with the protocol name `MQTT` (3.1.1, 5, or a level to be refused) or `MQIsdp` (3.1, to be refused).
    Mqtt,
    /// A CoAP capabilities and settings message (RFC 8323).
    CoapTcp,
    /// A TLS record that holds the beginning of a ClientHello.
    Tls,
    /// A PROXY protocol header in text.
    ProxyV1,
    /// A PROXY protocol header in binary.
    ProxyV2,
    /// None of these.
    Unknown,
}

/// Judges the first bytes of a connection, as many of them as there are so far. Costs a few comparisons and no allocation.
pub fn classify(prefix: &[u8]) -> Verdict {
    let Some(&first) = prefix.first() else {
        // The shortest recognisable beginning is an empty CSM: two bytes.
        return Verdict::Need(2);
    };
    let mut least = None;
    for (seen, verdict) in [
        (mqtt(prefix), Verdict::Mqtt),
        (tls(prefix), Verdict::Tls),
        (literal(prefix, PROXY_V2), Verdict::ProxyV2),
        (literal(prefix, PROXY_V1), Verdict::ProxyV1),
        (literal(prefix, H2_PREFACE), Verdict::Http2),
        (coap_over_tcp(prefix), Verdict::CoapTcp),
    ] {
        match seen {
            Seen::Yes => return verdict,
            Seen::No => {}
            Seen::Partly(more) => least = Some(least.map_or(more, |known: usize| known.min(more))),
        }
    }
    if is_token_byte(first) {
        match http1(prefix) {
            Seen::Yes => return Verdict::Http1,
            Seen::No => {}
            Seen::Partly(more) => least = Some(least.map_or(more, |known: usize| known.min(more))),
        }
    }
    least.map_or(Verdict::Unknown, Verdict::Need)
}

/// How far the bytes agree with one protocol.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    Yes,
    No,
    /// So far; at least this many bytes are missing.
    Partly(usize),
}

fn literal(prefix: &[u8], whole: &[u8]) -> Seen {
    let common = prefix.len().min(whole.len());
    if prefix[..common] != whole[..common] {
        Seen::No
    } else if common == whole.len() {
        Seen::Yes
    } else {
        Seen::Partly(whole.len() - common)
    }
}

/// Fixed header 0x10, a remaining length of one to four bytes, then the protocol name (MQTT 3.1.1 and 5, section 3.1).
fn mqtt(prefix: &[u8]) -> Seen {
    if prefix.first() != Some(&0x10) {
        return Seen::No;
    }
    let length = prefix.iter().skip(1).take(4).take_while(|b| **b & 0x80 != 0).count();
    if length == 4 {
        return Seen::No;
    }
    // The byte that ends the remaining length, and the shorter of the two names.
    let body = 2 + length;
    if prefix.len() < body {
        return Seen::Partly(body - prefix.len() + 6);
    }
    match (literal(&prefix[body..], b"\0\x04MQTT"), literal(&prefix[body..], b"\0\x06MQIsdp")) {
        (Seen::Yes, _) | (_, Seen::Yes) => Seen::Yes,
        (Seen::No, Seen::No) => Seen::No,
        (Seen::Partly(more), _) | (Seen::No, Seen::Partly(more)) => Seen::Partly(more),
    }
}

/// Record type 22, version 3.x, a length of at least a handshake header and at most a record, message type 1 (RFC 8446 sections 4 and 5.1).
fn tls(prefix: &[u8]) -> Seen {
    let fits = |at: usize, allowed: fn(u8) -> bool| prefix.get(at).is_none_or(|b| allowed(*b));
    if !(fits(0, |b| b == 0x16) && fits(1, |b| b == 3) && fits(2, |b| b <= 4) && fits(5, |b| b == 1)) {
        return Seen::No;
    }
    if let [_, _, _, high, low, ..] = prefix
        && !(4..=16_384).contains(&u16::from_be_bytes([*high, *low]))
    {
        return Seen::No;
    }
    // The upper byte of the ClientHello's length: none is longer than 65,535 bytes.
    if !fits(6, |b| b == 0) {
        return Seen::No;
    }
    if prefix.len() >= 7 { Seen::Yes } else { Seen::Partly(7 - prefix.len()) }
}

/// Length and token length in one byte, up to four bytes of extended length, then the code (RFC 8323 section 3.2).
///
/// `10 E1` begins both a CSM with one byte of options and an MQTT CONNECT whose length is 97 modulo 128. MQTT is asked first; what
/// cannot be an MQTT CONNECT any more is CoAP. A CoAP client that sends precisely such a CSM, and then waits for ours, waits in vain.
fn coap_over_tcp(prefix: &[u8]) -> Seen {
    let Some(&first) = prefix.first() else {
        return Seen::Partly(2);
    };
    if first & 0x0F > 8 {
        return Seen::No;
    }
    let code_at = match first >> 4 {
        13 => 2,
        14 => 3,
        15 => 5,
        _ => 1,
    };
    match prefix.get(code_at) {
        None => Seen::Partly(code_at + 1 - prefix.len()),
        Some(&CSM) => {
            if first != 0x10 {
                return Seen::Yes;
            }
            // One byte of options is one option without a value.
            if prefix.get(2).is_some_and(|b| b & 0x0F != 0) {
                return Seen::No;
            }
            match mqtt(prefix) {
                Seen::No => Seen::Yes,
                Seen::Yes => Seen::No,
                Seen::Partly(_) => Seen::Partly(1),
            }
        }
        Some(_) => Seen::No,
    }
}

/// A method token, one space, and a target: origin-form, absolute-form with http or https, `*` after OPTIONS, an authority after CONNECT.
fn http1(prefix: &[u8]) -> Seen {
    let method_length = prefix.iter().take_while(|b| is_token_byte(**b)).count();
    if method_length == 0 || method_length > METHOD_BYTES_MAX {
        return Seen::No;
    }
    let (method, rest) = prefix.split_at(method_length);
    let Some((space, target)) = rest.split_first() else {
        return Seen::Partly(2);
    };
    // `PRI` is reserved for the HTTP/2 preface (RFC 9113 section 11.6), and `PROXY ` never reaches a server as a method.
    if *space != b' ' || method == b"PRI" || method == b"PROXY" {
        return Seen::No;
    }
    let Some(&target_first) = target.first() else {
        return Seen::Partly(1);
    };
    match target_first {
        b'/' => Seen::Yes,
        b'*' if method == b"OPTIONS" => Seen::Yes,
        b'[' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' if method == b"CONNECT" => Seen::Yes,
        b'h' | b'H' => match (scheme(target, HTTP), scheme(target, HTTPS)) {
            (Seen::Yes, _) | (_, Seen::Yes) => Seen::Yes,
            (Seen::No, Seen::No) => Seen::No,
            (Seen::Partly(more), _) | (Seen::No, Seen::Partly(more)) => Seen::Partly(more),
        },
        _ => Seen::No,
    }
}

/// A scheme is compared without case (RFC 3986 section 3.1).
fn scheme(target: &[u8], whole: &[u8]) -> Seen {
    let common = target.len().min(whole.len());
    if !target[..common].eq_ignore_ascii_case(&whole[..common]) {
        Seen::No
    } else if common == whole.len() {
        Seen::Yes
    } else {
        Seen::Partly(whole.len() - common)
    }
}

/// RFC 9110 section 5.6.2, `tchar`.
fn is_token_byte(b: u8) -> bool {
    b.is_ascii_alphanumeric()
        || matches!(
            b,
            b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~'
        )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A beginning of each kind, and the fewest bytes of it that suffice.
    const KNOWN: &[(&[u8], usize, Verdict)] = &[
        (b"GET / HTTP/1.1\r\n", 5, Verdict::Http1),
        (b"POST /telemetry HTTP/1.1\r\n", 6, Verdict::Http1),
        (b"OPTIONS * HTTP/1.1\r\n", 9, Verdict::Http1),
        (b"CONNECT [2001:db8::1]:443 HTTP/1.1\r\n", 9, Verdict::Http1),
        (b"CONNECT example.org:443 HTTP/1.1\r\n", 9, Verdict::Http1),
        (b"GET http://example.org/ HTTP/1.1\r\n", 11, Verdict::Http1),
        (b"GET HTTPS://example.org/ HTTP/1.1\r\n", 12, Verdict::Http1),
        (b"X-EXTENSION!method /x HTTP/1.1\r\n", 20, Verdict::Http1),
        (b"PRIZE /x HTTP/1.1\r\n", 7, Verdict::Http1),
        (b"PROXYING /x HTTP/1.1\r\n", 10, Verdict::Http1),
        (b"UPDATEREDIRECTREF /x HTTP/1.1\r\n", 19, Verdict::Http1),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 24, Verdict::Http2),
        (b"\x10\x0c\0\x04MQTT\x04\x02\0\x3c\0\0", 8, Verdict::Mqtt),
        (b"\x10\x0d\0\x04MQTT\x05\x02\0\x3c\0\0\0", 8, Verdict::Mqtt),
        (b"\x10\x0e\0\x06MQIsdp\x03\x02\0\x3c\0\0", 10, Verdict::Mqtt),
        (b"\x10\xff\xff\x7f\0\x04MQTT\x05", 10, Verdict::Mqtt),
        (b"\x10\xff\xff\xff\x7f\0\x04MQTT\x05", 11, Verdict::Mqtt),
        // The remaining length begins like a CSM's code: 97 + 128 * 64.
        (b"\x10\xe1\x40\0\x04MQTT\x05", 9, Verdict::Mqtt),
        (b"\x10\xe1\x41\0\x04MQTT\x05", 9, Verdict::Mqtt),
        (b"\x00\xe1", 2, Verdict::CoapTcp),
        (b"\x50\xe1\x23\x10\0\0\x20", 2, Verdict::CoapTcp),
        (b"\x16\xe1tokens\x40", 2, Verdict::CoapTcp),
        (b"\xd0\x01\xe1\x23", 3, Verdict::CoapTcp),
        (b"\xe3\0\x01\xe1\x23", 4, Verdict::CoapTcp),
        (b"\xf8\0\0\0\x01\xe1\x23", 6, Verdict::CoapTcp),
        // A CSM that only says "block-wise", followed by a GET: the byte after it cannot belong to a CONNECT.
        (b"\x10\xe1\x40\x01\x01\xaa", 4, Verdict::CoapTcp),
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", 7, Verdict::Tls),
        (b"\x16\x03\x03\0\x7a\x01\0\0\x76\x03\x03", 7, Verdict::Tls),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", 6, Verdict::ProxyV1),
        (b"PROXY UNKNOWN\r\n", 6, Verdict::ProxyV1),
        (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c", 12, Verdict::ProxyV2),
    ];

    #[test]
    fn every_protocol_is_recognised_from_its_fewest_bytes_on() {
        for (bytes, fewest, verdict) in KNOWN {
            for length in 0..=bytes.len() {
                match classify(&bytes[..length]) {
                    Verdict::Need(more) => {
                        assert!(length < *fewest, "{bytes:02x?} undecided at {length}");
                        assert!(more >= 1 && length + more <= *fewest, "{bytes:02x?} at {length} asks for {more}");
                    }
                    decided => {
                        assert_eq!(decided, *verdict, "{bytes:02x?} at {length}");
                        assert!(length >= *fewest, "{bytes:02x?} decided at {length}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_no_protocol_of_ours_is_unknown() {
        let long = [b'A'; METHOD_BYTES_MAX + 1];
        let cases: &[&[u8]] = &[
            &long,
            b"EHLO mail.example.org\r\n",
            b"USER anonymous\r\n",
            b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
            b"GET\t/ HTTP/1.1\r\n",
            b"GET  / HTTP/1.1\r\n",
            b" GET / HTTP/1.1\r\n",
            b"G(T / HTTP/1.1\r\n",
            b"GET\r\n",
            b"GET * HTTP/1.1\r\n",
            b"GET ftp://example.org/ HTTP/1.1\r\n",
            b"GET hello HTTP/1.1\r\n",
            b"PRI * HTTP/1.1\r\n\r\n",
            b"PRI / HTTP/1.1\r\n\r\n",
            b"\r\nGET / HTTP/1.1\r\n",
            b"\r\n\r\n\0\r\nQUIX\n",
            b"\x10\xff\xff\xff\xff\x01\0\x04MQTT",
            b"\x10\x0c\0\x05MQTTX",
            b"\x10\x0c\0\x04MQTX",
            b"\x20\x02\0\0",
            b"\x30\x05\0\x01a12",
            b"\x16\x03\x01\0\x03\x01\0",
            b"\x16\x03\x01\x40\x01\x01\0",
            b"\x16\x03\x01\x02\0\x02\0",
            b"\x16\x03\x05",
            b"\x80\x2e\x01\x03\x01",
            b"\x09\xe1",
            b"\x00\x01",
            b"\xff\xff\xff\xff\xff\xff",
            b"\0\0\0\0",
        ];
        for bytes in cases {
            assert_eq!(classify(bytes), Verdict::Unknown, "{bytes:02x?}");
        }
    }

    #[test]
    fn the_bound_is_reached_and_not_loose() {
        let mut longest = vec![b'M'; METHOD_BYTES_MAX];
        longest.extend_from_slice(b" https://");
        assert_eq!(longest.len(), PREFIX_BYTES_MAX);
        assert_eq!(classify(&longest), Verdict::Http1);
        assert_eq!(classify(&longest[..PREFIX_BYTES_MAX - 1]), Verdict::Need(1));
    }

    /// Random bytes rarely look like anything, so most cases mutate a known beginning.
    fn beginnings() -> impl Strategy<Value = Vec<u8>> {
        let mutated = (0..KNOWN.len(), 0..40usize, any::<u8>(), 0..50usize, prop::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(which, at, byte, keep, tail)| {
                let mut bytes = KNOWN[which].0.to_vec();
                bytes.truncate(keep);
                if let Some(b) = bytes.get_mut(at) {
                    *b = byte;
                }
                bytes.extend_from_slice(&tail);
                bytes
            });
        prop_oneof![
            mutated,
            prop::collection::vec(any::<u8>(), 0..80),
            "[A-Z]{1,34} ?[a-zA-Z/*:]{0,12}".prop_map(Vec::from)
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn a_decided_verdict_never_changes_with_more_bytes(bytes in beginnings()) {
            let mut decided = None;
            let mut not_before = 0;
            for length in 0..=bytes.len() {
                let verdict = classify(&bytes[..length]);
                match (decided, verdict) {
                    (Some(earlier), now) => prop_assert_eq!(earlier, now),
                    (None, Verdict::Need(more)) => {
                        prop_assert!(more >= 1);
                        not_before = not_before.max(length + more);
                    }
                    (None, now) => {
                        prop_assert!(now == Verdict::Unknown || length >= not_before, "{:?} at {}", now, length);
                        decided = Some(now);
                    }
                }
            }
        }

        #[test]
        fn the_bound_decides(mut bytes in beginnings(), filler in any::<u8>()) {
            if bytes.len() < PREFIX_BYTES_MAX {
                bytes.resize(PREFIX_BYTES_MAX, filler);
            }
            prop_assert!(!matches!(classify(&bytes[..PREFIX_BYTES_MAX]), Verdict::Need(_)));
        }
    }
}

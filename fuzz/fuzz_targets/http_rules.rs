//! The rules of a proxy on any header text: nothing that a client writes can forge an element of `Forwarded`, strip a protected field or pass as
//! a trace that is none.
#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use libfuzzer_sys::fuzz_target;
use tidegate_http::{forwarded, hop_by_hop, traceparent};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for peer in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        let element = forwarded::element(peer, "http", Some(text));
        let bare = forwarded::element(peer, "http", None);
        let host = element
            .strip_prefix(&bare)
            .and_then(|rest| rest.strip_prefix(";host=\""))
            .expect("as without a host, then the host");
        // The only quote is the closing one, so whatever else there is stays one value.
        assert_eq!(host.find('"'), Some(host.len() - 1), "{element:?}");
        assert!(!host.contains(['\\', '\r', '\n', '\0']), "{element:?}");
    }
    for name in hop_by_hop::connection_options(text) {
        assert!(!name.is_empty() && name == name.trim() && name == name.to_ascii_lowercase());
        assert!(!["host", "content-length", "authorization", "forwarded", "x-forwarded-for"].contains(&name.as_str()));
    }
    if traceparent::is_valid(text) {
        assert!(text.len() >= traceparent::BYTES && text.is_char_boundary(traceparent::BYTES));
        let fields: Vec<&str> = text[..traceparent::BYTES].split('-').collect();
        assert_eq!(fields.iter().map(|f| f.len()).collect::<Vec<_>>(), [2, 32, 16, 2]);
        assert!(u128::from_str_radix(fields[1], 16).is_ok_and(|id| id != 0));
        assert!(u64::from_str_radix(fields[2], 16).is_ok_and(|id| id != 0));
        assert!(text.len() == traceparent::BYTES || (fields[0] != "00" && text[traceparent::BYTES..].starts_with('-')));
    }
});

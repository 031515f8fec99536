//! `Forwarded` (RFC 7239): who asked, by which scheme, for which host.

use std::fmt::Write;
use std::net::IpAddr;

/// One element, ready to be appended to what the request already carries.
///
/// `host` is quoted, so that whatever a client put there stays one value; control characters and quotes in it are left out.
pub fn element(peer: IpAddr, scheme: &str, host: Option<&str>) -> String {
    let mut text = String::with_capacity(64);
    // Writing to a String cannot fail.
    let _ = match peer {
        IpAddr::V4(address) => write!(text, "for={address}"),
        // RFC 7239 section 6: brackets, and therefore quotes.
        IpAddr::V6(address) => write!(text, "for=\"[{address}]\""),
    };
    let _ = write!(text, ";proto={scheme}");
    if let Some(host) = host {
        text.push_str(";host=\"");
        text.extend(host.chars().filter(|c| !c.is_control() && !matches!(c, '"' | '\\')));
        text.push('"');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    #[test]
    fn addresses_are_written_as_the_rfc_says() {
        let v4 = element(Ipv4Addr::new(192, 0, 2, 43).into(), "http", None);
        assert_eq!(v4, "for=192.0.2.43;proto=http");
        let v6 = element(Ipv6Addr::LOCALHOST.into(), "https", Some("example.org:8443"));
        assert_eq!(v6, "for=\"[::1]\";proto=https;host=\"example.org:8443\"");
    }

    #[test]
    fn a_host_cannot_break_out_of_its_quotes() {
        let text = element(Ipv4Addr::LOCALHOST.into(), "http", Some("a\";for=10.0.0.1\\\r\n"));
        assert_eq!(text, "for=127.0.0.1;proto=http;host=\"a;for=10.0.0.1\"");
    }
}

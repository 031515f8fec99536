//! Where a tunnel may lead: the allow-list of CONNECT (RFC 9110 section 9.3.6).

use http::uri::Authority;

use super::Host;

/// One entry of `connect`.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    host: Host,
    port: u16,
}

impl Target {
    /// `None` for what is not HOST:PORT, *.DOMAIN:PORT or [IPV6]:PORT; any host at all cannot be allowed.
    pub fn parse(text: &str) -> Option<Self> {
        let named = text.strip_prefix("*.").unwrap_or(text);
        let authority: Authority = named.parse().ok()?;
        let (host, port) = asked(&authority)?;
        let host = if named.len() < text.len() { format!("*.{host}") } else { host.to_owned() };
        Some(Target { host: Host::parse(&host), port })
    }

    /// Whether it allows a host and port.
    pub fn allows(&self, host: &str, port: u16) -> bool {
        self.port == port && self.host.matches(Some(host))
    }
}

/// Host and port of a CONNECT's target. Both have to be there, and nothing else.
pub fn asked(authority: &Authority) -> Option<(&str, u16)> {
    let (host, port) = (authority.host(), authority.port_u16().filter(|port| *port > 0)?);
    let is_name = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
    let is_v6 = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let is_v6 = is_v6.is_some_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok());
    let is_whole = !authority.as_str().contains('@');
    (is_whole && !host.is_empty() && (is_name(host) || is_v6)).then_some((host, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_allows_its_host_and_port_alone() {
        let allows = |target: &str, asked_for: &str| {
            let authority: Authority = asked_for.parse().unwrap();
            asked(&authority).is_some_and(|(host, port)| Target::parse(target).unwrap().allows(host, port))
        };
        for (target, asked_for) in [
            ("a.example:443", "a.example:443"),
            ("A.example:443", "a.Example:443"),
            ("*.example:443", "a.b.example:443"),
            ("[::1]:22", "[::1]:22"),
            ("192.0.2.1:80", "192.0.2.1:80"),
        ] {
            assert!(allows(target, asked_for), "{target} {asked_for}");
        }
        for (target, asked_for) in [
            ("a.example:443", "a.example:80"),
            ("a.example:443", "a.example"),
            ("a.example:443", "b.a.example:443"),
            ("a.example:443", "a.example.:443"),
            ("a.example:443", "x@a.example:443"),
            ("*.example:443", "example:443"),
            ("*.example:443", "evilexample:443"),
        ] {
            assert!(!allows(target, asked_for), "{target} {asked_for}");
        }
        for bad in ["", "a", "a:", "a:x", "a:70000", "*:443", "*.*:1", "a b:1", "::1:22", "http://a:1"] {
            assert_eq!(Target::parse(bad), None, "{bad}");
        }
    }
}

//! Where an HTTP endpoint is.

use http::HeaderValue;
use http::uri::Scheme;

/// A scheme, a host and a port, checked once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// As it was written: its name in logs, status and the balancer.
    pub url: String,
    pub tls: bool,
    /// A name or an address, without the brackets of IPv6.
    pub host: String,
    pub port: u16,
    /// What `Host` says: without the port where it is the scheme's own.
    pub authority: HeaderValue,
}

impl Endpoint {
    /// Reads `http://HOST[:80]` or `https://HOST[:443]`.
    ///
    /// # Errors
    /// What is wrong, as a lowercase clause.
    pub fn parse(url: &str) -> Result<Self, &'static str> {
        let uri: http::Uri = url.parse().map_err(|_| "not a URL")?;
        let tls = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => false,
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            Some(_) | None => return Err("not a URL of http or https"),
        };
        let authority = uri.authority().ok_or("no host in it")?;
        if authority.as_str().contains('@') {
            return Err("a user in it; credentials belong in `headers`");
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err("a path in it; paths belong to the forward rule or the route");
        }
        let host = authority.host();
        if host.is_empty() {
            return Err("no host in it");
        }
        let port = match authority.as_str().strip_prefix(host).and_then(|rest| rest.strip_prefix(':')) {
            None => {
                if tls {
                    443
                } else {
                    80
                }
            }
            Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or("no port from 1 to 65535 in it")?,
        };
        let written = if port == if tls { 443 } else { 80 } { host.to_owned() } else { format!("{host}:{port}") };
        Ok(Endpoint {
            url: url.to_owned(),
            tls,
            host: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
            port,
            authority: HeaderValue::try_from(written).map_err(|_| "not a host")?,
        })
    }

    /// The address of a path here.
    ///
    /// # Errors
    /// The path is none.
    pub fn uri(&self, path: &str) -> Result<http::Uri, http::Error> {
        let scheme = if self.tls { Scheme::HTTPS } else { Scheme::HTTP };
        http::Uri::builder().scheme(scheme).authority(self.authority.as_bytes()).path_and_query(path).build()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_with_their_default_ports() {
        for (url, tls, host, port, authority) in [
            ("http://cloud.example", false, "cloud.example", 80, "cloud.example"),
            ("https://cloud.example/", true, "cloud.example", 443, "cloud.example"),
            ("https://cloud.example:80", true, "cloud.example", 80, "cloud.example:80"),
            ("http://[::1]:3001", false, "::1", 3001, "[::1]:3001"),
            ("HTTP://127.0.0.1:80", false, "127.0.0.1", 80, "127.0.0.1"),
        ] {
            let read = Endpoint::parse(url).unwrap();
            assert_eq!((read.tls, read.host.as_str(), read.port), (tls, host, port), "{url}");
            assert_eq!(read.authority, authority, "{url}");
        }
    }

    #[test]
    fn what_is_no_endpoint_is_said_to_be_none() {
        for bad in [
            "",
            "cloud.example",
            "mqtt://x",
            "http://",
            "http://:80",
            "http://u:p@x",
            "http://x/path",
            "http://x?q",
            "http://x:0",
            "http://x:70000",
            "http://x:",
            "http://x y",
        ] {
            assert!(Endpoint::parse(bad).is_err(), "{bad}");
        }
    }
}

//! Ready-to-run client lines: what a person copies to see a first message arrive.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use crate::listener::{Config as Listener, ProtocolName, TransportKind};
use crate::message::DeviceId;

/// Where clients of each protocol connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoints {
    mqtt: Option<Stream>,
    http: Option<Stream>,
    coap: Option<SocketAddr>,
    prefix: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stream {
    address: SocketAddr,
    tls: bool,
}

impl Endpoints {
    /// The first listener that serves each protocol, without TLS before with it. No listeners at all: the standard ports on this machine.
    pub(crate) fn of(listeners: &[Listener], prefix: &str) -> Endpoints {
        // The prefix at the top is "/", which is in front of every path anyway.
        let prefix = prefix.trim_end_matches('/').to_owned();
        if listeners.is_empty() {
            let stream = Stream { address: SocketAddr::from((Ipv4Addr::LOCALHOST, 1883)), tls: false };
            let coap = Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 5683)));
            return Endpoints { mqtt: Some(stream), http: Some(stream), coap, prefix };
        }
        let find = |transport, protocol| {
            let serves =
                |listener: &&Listener| listener.transport == transport && listener.protocols.contains(&protocol);
            listeners.iter().find(serves).map(|listener| reachable(listener.bind))
        };
        let stream = |protocol| {
            let of = |transport, tls| find(transport, protocol).map(|address| Stream { address, tls });
            of(TransportKind::Tcp, false).or_else(|| of(TransportKind::Tls, true))
        };
        Endpoints {
            mqtt: stream(ProtocolName::Mqtt),
            http: stream(ProtocolName::Http),
            coap: find(TransportKind::Udp, ProtocolName::Coap),
            prefix,
        }
    }

    /// Where `login` goes if nothing else is said.
    pub(super) fn login_url(&self) -> Option<String> {
        self.http_url().or_else(|| self.coap_url())
    }

    fn http_url(&self) -> Option<String> {
        let Stream { address, tls } = self.http?;
        let scheme = if tls { "https" } else { "http" };
        Some(format!("{scheme}://{address}{}", self.prefix))
    }

    fn coap_url(&self) -> Option<String> {
        self.coap.map(|address| format!("coap://{address}"))
    }

    /// One line for each protocol that is served.
    pub(super) fn lines(&self, id: &DeviceId, key_file: &Path, program: &str) -> Vec<String> {
        let payload = r#"'{"celsius":21.5}'"#;
        let key = quoted(&key_file.display().to_string());
        let id = quoted(id.as_str());
        let mut lines = Vec::new();
        if let Some(Stream { address, tls }) = self.mqtt {
            let (host, port) = (address.ip(), address.port());
            let tls = if tls { " --cafile ca.crt" } else { "" };
            lines.push(format!(
                "mosquitto_pub -h {host} -p {port}{tls} -V 5 -q 1 -i {id} -u {id} \
                 -P \"$({program} device token {id} --key {key})\" -t telemetry -m {payload}"
            ));
        }
        if let Some(url) = self.http_url() {
            let (tls, ca) = if url.starts_with("https:") { (" --cacert ca.crt", " --ca ca.crt") } else { ("", "") };
            lines.push(format!(
                "curl -i{tls} -H \"Authorization: Bearer $({program} device login {id} --key {key} --url {url}{ca})\" \
                 -H 'Content-Type: application/json' -d {payload} {url}/telemetry"
            ));
        }
        if let Some(url) = self.coap_url() {
            lines.push(format!(
                "{} -m post -t json -e {payload} \"{url}/t?t=$({program} device login {id} --key {key} --url {url})\"",
                coap_client()
            ));
        }
        lines
    }
}

/// How this program was called, so that the lines work from where they are printed.
pub(super) fn program() -> String {
    std::env::args()
        .next()
        .filter(|name| name.contains('/'))
        .map_or_else(|| "tidegate".to_owned(), |name| quoted(&name))
}

/// An address that a client on this machine can connect to.
fn reachable(bind: SocketAddr) -> SocketAddr {
    let ip = match bind.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, bind.port())
}

/// Debian ships libcoap's client under the name of the TLS library it is built with.
fn coap_client() -> &'static str {
    const NAMES: [&str; 4] = ["coap-client", "coap-client-notls", "coap-client-openssl", "coap-client-gnutls"];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_there = |name: &&str| std::env::split_paths(&path).any(|folder| folder.join(name).is_file());
    NAMES.into_iter().find(is_there).unwrap_or("coap-client")
}

/// As one word for a shell.
pub(in crate::cli) fn quoted(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/' | b':' | b'@');
    if !text.is_empty() && text.bytes().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(bind: &str, transport: TransportKind, protocols: &[ProtocolName]) -> Listener {
        Listener { bind: bind.parse().unwrap(), transport, protocols: protocols.to_vec(), ..Listener::default() }
    }

    #[test]
    fn without_listeners_the_standard_ports_are_meant() {
        let lines = Endpoints::of(&[], "").lines(&DeviceId::parse("s-1").unwrap(), Path::new("s-1.key"), "tidegate");
        assert_eq!(lines.len(), 3);
        assert!(lines[0].starts_with("mosquitto_pub -h 127.0.0.1 -p 1883 -V 5 -q 1 -i s-1 -u s-1"), "{}", lines[0]);
        assert!(lines[1].contains("--url http://127.0.0.1:1883)"), "{}", lines[1]);
        assert!(lines[2].contains("\"coap://127.0.0.1:5683/t?t=$(tidegate device login s-1"), "{}", lines[2]);
    }

    #[test]
    fn what_is_not_served_gets_no_line() {
        let tls = listener("0.0.0.0:8883", TransportKind::Tls, &[ProtocolName::Http]);
        let endpoints = Endpoints::of(&[tls], "/iot");
        let lines = endpoints.lines(&DeviceId::parse("s").unwrap(), Path::new("s.key"), "tidegate");
        assert_eq!(lines.len(), 1);
        assert!(lines[0].contains("https://127.0.0.1:8883/iot/telemetry"), "{}", lines[0]);
        assert_eq!(endpoints.login_url().unwrap(), "https://127.0.0.1:8883/iot");
    }

    #[test]
    fn a_plain_listener_is_preferred_and_ipv6_is_bracketed() {
        let listeners = [
            listener("127.0.0.1:8883", TransportKind::Tls, &ProtocolName::ALL),
            listener("[::]:1884", TransportKind::Tcp, &ProtocolName::ALL),
        ];
        let endpoints = Endpoints::of(&listeners, "");
        assert_eq!(endpoints.login_url().unwrap(), "http://[::1]:1884");
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("a/b-c.key"), "a/b-c.key");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}

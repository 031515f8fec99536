//! One `[[listener]]` of the configuration.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::network::Network;
use crate::tls::KeyPair;

/// A door for devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What logs and policies call this listener; unique.
    pub name: String,
    /// Address and port to listen on. `0.0.0.0` is every IPv4 address and `[::]` every IPv6 address of the machine, each by itself; port 0 takes a free one.
    #[schemars(extend("format" = "socket-address"))]
    pub bind: SocketAddr,
    /// Without encryption (tcp, udp) a listener binds to loopback and private addresses only, because plain logins can be relayed and
    /// payloads read. True allows any address, such as "0.0.0.0:1883".
    pub allow_public: bool,
    /// tcp, tls, udp (`CoAP`) or dtls (`CoAP`; not served by this build).
    pub transport: TransportKind,
    /// What is spoken here. Another protocol is recognised, counted and closed.
    pub protocols: Vec<ProtocolName>,
    /// For udp: network interfaces, such as "eth0", on which multicast discovery is answered (RFC 7252 section 8): `GET /.well-known/core` to 224.0.1.187
    /// or, with an IPv6 `bind`, to ff02::fd and ff05::fd, at the port of `bind`, which should be 5683. Answers show what a stranger may see, in at
    /// most 136 bytes or three times the question, after up to 5 seconds. Those who ask go on by unicast, so `bind` has to be reachable from there.
    pub multicast_interfaces: Vec<String>,
    /// Addresses that may send a PROXY protocol header (v1 or v2), whose client address is then believed. From any other address such a header closes the connection.
    pub proxy_protocol_from: Vec<Network>,
    /// Addresses of reverse proxies in front of the gateway. Their Forwarded and X-Forwarded-* headers are passed on and added to; from any other address
    /// they are replaced.
    pub forwarded_from: Vec<Network>,
    /// For tls: the certificate chain, PEM, the gateway's own first. Relative to this file.
    #[schemars(extend("format" = "path"))]
    pub certificate: Option<PathBuf>,
    /// For tls: the private key, PEM, not readable by every user. Relative to this file.
    #[schemars(extend("format" = "path"))]
    pub key: Option<PathBuf>,
    /// For tls: whether a device may identify itself by certificate. Any self-signed one will do; its Ed25519 key has to be in the registry.
    pub client_certificates: ClientCertificates,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            name: String::new(),
            bind: SocketAddr::from(([127, 0, 0, 1], 1883)),
            allow_public: false,
            transport: TransportKind::Tcp,
            protocols: ProtocolName::ALL.to_vec(),
            multicast_interfaces: Vec::new(),
            proxy_protocol_from: Vec::new(),
            forwarded_from: Vec::new(),
            certificate: None,
            key: None,
            client_certificates: ClientCertificates::Optional,
        }
    }
}

/// What carries the protocols.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TransportKind {
    Tcp,
    Tls,
    Udp,
    Dtls,
}

impl TransportKind {
    pub const fn as_str(self) -> &'static str {
        match self {
            TransportKind::Tcp => "tcp",
            TransportKind::Tls => "tls",
            TransportKind::Udp => "udp",
            TransportKind::Dtls => "dtls",
        }
    }
}

/// What may be spoken on a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ProtocolName {
    Mqtt,
    Http,
    Websocket,
    Coap,
}

impl ProtocolName {
    pub const ALL: [ProtocolName; 4] =
        [ProtocolName::Mqtt, ProtocolName::Http, ProtocolName::Websocket, ProtocolName::Coap];
}

/// Whether a TLS listener asks for a client certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ClientCertificates {
    Off,
    Optional,
}

impl Config {
    /// What cannot work although every key by itself is well formed: the key, and a lowercase clause.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        let mut add = |key, text: &str| problems.push((key, text.to_owned()));
        if self.name.is_empty() {
            add("name", "a listener needs a name");
        }
        if self.protocols.is_empty() {
            add("protocols", "name at least one of mqtt, http, websocket, coap");
        }
        match self.transport {
            TransportKind::Tls => {
                if self.certificate.is_none() {
                    add("certificate", "transport = \"tls\" needs a certificate");
                }
                if self.key.is_none() {
                    add("key", "transport = \"tls\" needs a key");
                }
            }
            TransportKind::Dtls => {
                add("transport", "dtls is not served by this build; use tls, or udp with signed messages")
            }
            TransportKind::Udp if !self.protocols.is_empty() && !self.protocols.contains(&ProtocolName::Coap) => {
                add("protocols", "over udp only coap is spoken");
            }
            TransportKind::Tcp | TransportKind::Udp => {}
        }
        if matches!(self.transport, TransportKind::Udp | TransportKind::Dtls) && !self.proxy_protocol_from.is_empty() {
            add("proxy_protocol_from", "the PROXY protocol is for tcp and tls");
        }
        if !matches!(self.transport, TransportKind::Udp | TransportKind::Dtls) && !self.multicast_interfaces.is_empty()
        {
            add("multicast_interfaces", "multicast is for udp");
        }
        problems
    }

    /// The groups of this listener's address family: all CoAP nodes (RFC 7252 section 12.8).
    pub(super) fn multicast_groups(&self) -> &'static [IpAddr] {
        const V4: [IpAddr; 1] = [IpAddr::V4(Ipv4Addr::new(224, 0, 1, 187))];
        const V6: [IpAddr; 2] = [
            IpAddr::V6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xfd)),
            IpAddr::V6(Ipv6Addr::new(0xff05, 0, 0, 0, 0, 0, 0, 0xfd)),
        ];
        if self.bind.is_ipv4() { &V4 } else { &V6 }
    }

    pub(super) fn key_pair(&self) -> Option<KeyPair> {
        Some(KeyPair { certificate: self.certificate.clone()?, key: self.key.clone()? })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_operators_examples_are_understood() {
        let parse = |value: serde_json::Value| serde_json::from_value::<Config>(value);
        let plain = parse(json!({
            "name": "plain",
            "bind": "127.0.0.1:1883",
            "transport": "tcp",
            "protocols": ["mqtt", "http", "websocket", "coap"],
            "proxy_protocol_from": ["10.0.0.0/8"],
        }));
        let plain = plain.unwrap();
        assert!(plain.problems().is_empty());
        assert_eq!(plain.protocols, ProtocolName::ALL);
        let tls = json!({ "name": "tls", "bind": "0.0.0.0:8883", "transport": "tls", "certificate": "a.crt", "key": "a.key" });
        assert!(parse(tls).unwrap().problems().is_empty());
        let udp = json!({ "name": "coap", "bind": "127.0.0.1:5683", "transport": "udp" });
        assert!(parse(udp).unwrap().problems().is_empty());
        assert!(parse(json!({ "bindd": 1 })).is_err());
    }

    #[test]
    fn what_cannot_work_is_named_by_its_key() {
        let keys = |config: Config| config.problems().into_iter().map(|(key, _)| key).collect::<Vec<_>>();
        let named = |transport| Config { name: "x".into(), transport, ..Config::default() };
        assert_eq!(keys(Config::default()), ["name"]);
        assert_eq!(keys(named(TransportKind::Tls)), ["certificate", "key"]);
        assert_eq!(keys(named(TransportKind::Dtls)), ["transport"]);
        let mqtt_over_udp = Config { protocols: vec![ProtocolName::Mqtt], ..named(TransportKind::Udp) };
        assert_eq!(keys(mqtt_over_udp), ["protocols"]);
        let none = Config { protocols: vec![], ..named(TransportKind::Tcp) };
        assert_eq!(keys(none), ["protocols"]);
    }
}

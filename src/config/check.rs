//! What one key cannot say alone: references between tables, duplicate names, combinations that make no sense or are unsafe.
//!
//! A single value's range and form are the schema's work; what a module knows about its own table it says in its `problems()`.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use crate::listener::TransportKind;
use crate::tls::{KeyPair, Server};

use super::Config;
use super::document::{KeyPath, Node, Step, quoted};
use super::problem::Problem;

mod route;
mod upstream;

/// Appends everything that is wrong or doubtful.
///
/// `config` lacks what was already `refused`, so names are taken from the document, and an entry with a refused key is not looked at
/// again: its defaults would only lead to complaints about values that nobody wrote.
pub fn check(config: &Config, document: &Node, refused: &[KeyPath], problems: &mut Vec<Problem>) {
    let mut check = Check { config, document, refused, problems };
    check.duplicate_names();
    check.listeners();
    check.admin();
    check.upstreams();
    check.forwards();
    check.queues();
    check.routes();
    check.route_upstreams();
    check.unused_upstreams();
}

const TOKEN_CHARS_MIN: usize = 16;

struct Check<'a> {
    config: &'a Config,
    document: &'a Node,
    refused: &'a [KeyPath],
    problems: &'a mut Vec<Problem>,
}

impl Check<'_> {
    /// Lists whose entries are referred to by name: a name may stand once.
    fn duplicate_names(&mut self) {
        for entry in self.document.entries() {
            let mut seen: HashMap<&str, usize> = HashMap::new();
            for (index, item) in entry.node.items().iter().enumerate() {
                let Some(name) = item.name() else { continue };
                if let Some(first) = seen.insert(name, index) {
                    self.problems.push(
                        Problem::error(format!("the name is taken by entry {first} of the list"))
                            .key(format!("{}.{index}.name", entry.key))
                            .value(quoted(name))
                            .at(item.get("name").map_or(item.at, |n| n.at))
                            .allowed("names that differ within one list"),
                    );
                }
            }
        }
    }

    fn listeners(&mut self) {
        if self.document.get("listener").is_none_or(|n| n.items().is_empty()) {
            let help = "add a [[listener]]; `tidegate config defaults` shows its keys";
            let problem = Problem::warning("nothing to listen on: no device can connect");
            self.problems.push(problem.key("listener").help(help));
        }
        let mut taken: HashMap<(bool, u16), Vec<(SocketAddr, String)>> = HashMap::new();
        for listener in &self.config.listener {
            let Some(index) = self.entry("listener", &listener.name) else { continue };
            for (key, text) in listener.problems() {
                self.report(&at("listener", index, key), Problem::error(text));
            }
            let datagrams = matches!(listener.transport, TransportKind::Udp | TransportKind::Dtls);
            let same_port = taken.entry((datagrams, listener.bind.port())).or_default();
            let clash = same_port.iter().find(|(bind, _)| listener.bind.port() != 0 && overlap(bind, &listener.bind));
            if let Some((_, other)) = clash {
                let problem = Problem::error(format!("the address is taken by listener {}", quoted(other)));
                self.report(&at("listener", index, "bind"), problem.allowed("one listener per address and port"));
            }
            same_port.push((listener.bind, listener.name.clone()));
            self.encryption(listener, index);
        }
    }

    fn encryption(&mut self, listener: &crate::listener::Config, index: usize) {
        let plain = matches!(listener.transport, TransportKind::Tcp | TransportKind::Udp);
        if plain && !is_private(listener.bind.ip()) && !listener.allow_public {
            let help = "`allow_public = true` in this listener accepts it: payloads can be read, logins relayed";
            self.report(
                &at("listener", index, "bind"),
                Problem::error("without encryption, but reachable from public networks")
                    .allowed("a loopback or private address, or transport = \"tls\"")
                    .help(help),
            );
        }
        let (TransportKind::Tls, Some(certificate), Some(key)) =
            (listener.transport, &listener.certificate, &listener.key)
        else {
            return;
        };
        let pair = KeyPair { certificate: certificate.clone(), key: key.clone() };
        if let Err(error) = Server::new(&pair, &[], false) {
            use crate::tls::Error;
            let about_key = match &error {
                Error::File { path, .. } | Error::TooLarge { path, .. } => path == key,
                Error::NoKey { .. } | Error::BadKey { .. } | Error::KeyReadable { .. } | Error::KeyMismatch { .. } => {
                    true
                }
                Error::NoCertificate { .. }
                | Error::BadCertificate { .. }
                | Error::NoRoots
                | Error::BadServerName { .. }
                | Error::Setup { .. } => false,
            };
            let help = "`tidegate cert ca` and `tidegate cert gateway` make a pair for development";
            let key = if about_key { "key" } else { "certificate" };
            self.report(&at("listener", index, key), Problem::error(error.to_string()).help(help));
        }
    }

    fn admin(&mut self) {
        let admin = &self.config.admin;
        if !admin.token.is_empty() && admin.token.len() < TOKEN_CHARS_MIN {
            let problem = Problem::error("too short to be a secret")
                .allowed(format!("at least {TOKEN_CHARS_MIN} characters, or empty to close the API"))
                .help("`tidegate init` writes a random one");
            self.report(&path("admin", "token"), problem);
        }
        match admin.bind.parse::<SocketAddr>() {
            Ok(bind) if !is_private(bind.ip()) => {
                let problem = Problem::warning("the admin API speaks plain HTTP and is reachable from public networks")
                    .help("bind it to loopback or a management network");
                self.report(&path("admin", "bind"), problem);
            }
            Ok(_) => {}
            Err(_) => {
                let problem = Problem::error("not understood").allowed(super::schema::SOCKET_ADDRESS);
                self.report(&path("admin", "bind"), problem);
            }
        }
    }

    /// Index in the document of a list's entry with this name, if none of its keys was refused.
    fn entry(&self, list: &str, name: &str) -> Option<usize> {
        let index = self.document.get(list)?.items().iter().position(|item| item.name().unwrap_or("") == name)?;
        let here = [Step::Key(list.to_owned()), Step::Index(index)];
        (!self.refused.iter().any(|path| path.starts_with(&here))).then_some(index)
    }

    /// Fills in key, value and place of a problem. A key that is not written is reported at the table that lacks it.
    fn report(&mut self, path: &[Step], problem: Problem) {
        let problem = problem.key(self.document.render_path(path));
        let parent = path.split_last().and_then(|(_, parent)| self.document.at_path(parent));
        self.problems.push(match (self.document.at_path(path), parent) {
            (Some(node), _) => problem.value(node).at(node.at),
            (None, Some(parent)) => problem.at(parent.at),
            (None, None) => problem,
        });
    }
}

fn path(section: &str, key: &str) -> Vec<Step> {
    vec![Step::Key(section.to_owned()), Step::Key(key.to_owned())]
}

fn at(list: &str, index: usize, key: &str) -> Vec<Step> {
    vec![Step::Key(list.to_owned()), Step::Index(index), Step::Key(key.to_owned())]
}

/// Whether both cannot be bound with one port: the same address, or one of them is every address of the family.
fn overlap(a: &SocketAddr, b: &SocketAddr) -> bool {
    a.ip() == b.ip() || a.is_ipv4() == b.is_ipv4() && (a.ip().is_unspecified() || b.ip().is_unspecified())
}

/// Loopback, link-local, and the ranges that are not routed publicly (RFC 1918, RFC 4193, RFC 6598).
pub fn is_private(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            v4.is_loopback() || v4.is_private() || v4.is_link_local() || a == 100 && (64..128).contains(&b)
        }
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unique_local() || v6.is_unicast_link_local(),
    }
}

//! `[[upstream]]`, `[[forward]]` and who refers to whom.

use std::collections::HashSet;

use crate::hub::Filter;
use crate::tls::{Client, ClientConfig, KeyPair};
use crate::units::ByteSize;
use crate::upstream::endpoint::Endpoint;
use crate::upstream::template::Template;
use crate::upstream::{BatchConfig, Config, ForwardConfig, Kind, mqtt};

use super::super::document::{Step, quoted};
use super::super::problem::Problem;
use super::{Check, at, path};

/// Framing and routing of a request are ours, not the operator's.
const OWN_HEADERS: [&str; 6] = ["connection", "content-length", "host", "te", "transfer-encoding", "upgrade"];

impl Check<'_> {
    pub(super) fn upstreams(&mut self) {
        for upstream in &self.config.upstream {
            let Some(index) = self.entry("upstream", &upstream.name) else { continue };
            let encrypted = self.endpoints(upstream, index);
            self.trust(upstream, index, encrypted);
            for key in self.foreign_keys("upstream", index, upstream.kind) {
                let problem = Problem::error(format!("means nothing to kind = \"{}\"", upstream.kind.as_str()));
                self.report(&at("upstream", index, key), problem);
            }
            self.headers(upstream, index);
            for (n, filter) in upstream.subscribe.iter().enumerate() {
                self.filter("upstream", index, "subscribe", n, filter);
            }
            if let Some(health) = &upstream.health
                && !health.path.is_empty()
            {
                let mut place = at("upstream", index, "health");
                place.push(Step::Key("path".into()));
                if upstream.kind == Kind::Mqtt {
                    let help = "without it a check connects and closes";
                    self.report(&place, Problem::error("only an http upstream has paths").help(help));
                } else if !is_path(&health.path) {
                    self.report(&place, Problem::error("not a path").allowed("a path that begins with /, or nothing"));
                }
            }
        }
    }

    /// Returns whether any endpoint speaks TLS.
    fn endpoints(&mut self, upstream: &Config, index: usize) -> bool {
        let mut encrypted = false;
        let mut seen = HashSet::new();
        for (n, endpoint) in upstream.endpoints.iter().enumerate() {
            let mut place = at("upstream", index, "endpoints");
            place.extend([Step::Index(n), Step::Key("url".into())]);
            let (wrong, allowed) = match upstream.kind {
                Kind::Http => match Endpoint::parse(&endpoint.url) {
                    Ok(endpoint) => {
                        encrypted |= endpoint.tls;
                        (None, "")
                    }
                    Err(what) => (Some(what), "http://HOST[:PORT] or https://HOST[:PORT]"),
                },
                Kind::Mqtt => match mqtt::Endpoint::parse(&endpoint.url) {
                    Some(endpoint) => {
                        encrypted |= endpoint.tls;
                        (None, "")
                    }
                    None => (Some("not the address of a broker"), "mqtt://HOST[:PORT] or mqtts://HOST[:PORT]"),
                },
            };
            if let Some(what) = wrong {
                self.report(&place, Problem::error(what).allowed(allowed));
            } else if !seen.insert(&endpoint.url) {
                self.report(&place, Problem::error("the endpoint is listed twice").help("raise its `weight` instead"));
            }
        }
        encrypted
    }

    fn trust(&mut self, upstream: &Config, index: usize, encrypted: bool) {
        let identity = match (&upstream.certificate, &upstream.key) {
            (Some(certificate), Some(key)) => Some(KeyPair { certificate: certificate.clone(), key: key.clone() }),
            (None, None) => None,
            (Some(_), None) => {
                let problem = Problem::error("a certificate is of no use without its key");
                return self.report(&at("upstream", index, "key"), problem);
            }
            (None, Some(_)) => {
                let problem = Problem::error("a key is of no use without its certificate");
                return self.report(&at("upstream", index, "certificate"), problem);
            }
        };
        if !encrypted {
            for (key, named) in [("ca_file", upstream.ca_file.is_some()), ("certificate", identity.is_some())] {
                if named {
                    let problem = Problem::warning("not used: no endpoint of this upstream speaks TLS");
                    self.report(&at("upstream", index, key), problem.help("write https:// or mqtts://"));
                }
            }
            return;
        }
        let config = ClientConfig { ca_file: upstream.ca_file.clone(), identity, alpn: Vec::new() };
        if let Err(error) = Client::new(&config) {
            use crate::tls::Error;
            let key = match &error {
                Error::File { path, .. }
                | Error::TooLarge { path, .. }
                | Error::NoCertificate { path }
                | Error::BadCertificate { path }
                | Error::NoKey { path }
                | Error::BadKey { path, .. }
                | Error::KeyReadable { path, .. } => {
                    let is = |named: &Option<std::path::PathBuf>| named.as_ref() == Some(path);
                    if is(&upstream.ca_file) {
                        "ca_file"
                    } else if is(&upstream.key) {
                        "key"
                    } else {
                        "certificate"
                    }
                }
                Error::KeyMismatch { .. } => "key",
                Error::NoRoots | Error::BadServerName { .. } | Error::Setup { .. } => "ca_file",
            };
            self.report(&at("upstream", index, key), Problem::error(error.to_string()));
        }
    }

    /// Keys that stand in the entry and that its kind does not know.
    fn foreign_keys(&self, list: &str, index: usize, kind: Kind) -> Vec<&'static str> {
        let keys: &[&str] = match (list, kind) {
            ("upstream", Kind::Http) => {
                &["client_id", "username", "password", "mqtt_version", "in_flight_max", "subscribe"]
            }
            ("upstream", Kind::Mqtt) => {
                &["headers", "idle_timeout_ms", "request_timeout_ms", "http2", "backoff_max_ms", "waiting_max"]
            }
            (_, Kind::Http) => &["topic"],
            (_, Kind::Mqtt) => &["path", "batch", "requests_in_flight_max", "refusals_max"],
        };
        let entry = self.document.at_path(&[Step::Key(list.to_owned()), Step::Index(index)]);
        keys.iter().copied().filter(|key| entry.is_some_and(|entry| entry.get(key).is_some())).collect()
    }

    fn headers(&mut self, upstream: &Config, index: usize) {
        for (name, value) in &upstream.headers {
            let mut place = at("upstream", index, "headers");
            place.push(Step::Key(name.clone()));
            let wrong = match http::HeaderName::try_from(name) {
                Err(_) => "not the name of a header",
                Ok(name) if OWN_HEADERS.contains(&name.as_str()) => "the gateway's own: it follows from the request",
                Ok(_) if http::HeaderValue::try_from(value).is_err() => "holds characters that a header cannot",
                Ok(_) => continue,
            };
            self.report(&place, Problem::error(wrong));
        }
    }

    fn filter(&mut self, list: &str, index: usize, key: &str, n: usize, filter: &str) {
        let wrong = match Filter::parse(filter) {
            Err(_) => "not a topic filter",
            Ok(Filter { group: Some(_), .. }) if list == "forward" => "a rule shares nothing with others",
            Ok(_) => return,
        };
        let mut place = at(list, index, key);
        place.push(Step::Index(n));
        let allowed = "levels separated by /, of which + stands for one and # at the end for the rest";
        self.report(&place, Problem::error(wrong).allowed(allowed));
    }

    pub(super) fn forwards(&mut self) {
        for rule in &self.config.forward {
            let Some(index) = self.entry("forward", &rule.name) else { continue };
            for (n, filter) in rule.topics.iter().enumerate() {
                self.filter("forward", index, "topics", n, filter);
            }
            let Some(kind) = self.named_upstream("forward", index, &rule.to) else { continue };
            for key in self.foreign_keys("forward", index, kind) {
                let what =
                    format!("means nothing here: upstream {} is of kind \"{}\"", quoted(&rule.to), kind.as_str());
                self.report(&at("forward", index, key), Problem::error(what));
            }
            match kind {
                Kind::Http => self.forward_path(rule, index),
                Kind::Mqtt => self.forward_topic(rule, index),
            }
        }
    }

    /// The disk is promised once.
    pub(super) fn queues(&mut self) {
        let promised = self.config.forward.iter().map(|rule| rule.queue.bytes_max.bytes());
        let promised = promised.fold(0u64, u64::saturating_add);
        if promised > self.config.limits.spool_bytes_max.bytes() {
            let what = format!("the queues of all [[forward]] may hold {} together", ByteSize(promised));
            let help = "lower `queue.bytes_max` of a [[forward]], or raise this to what the disk has room for";
            let problem = Problem::error(what).allowed("at least the sum of their `queue.bytes_max`").help(help);
            self.report(&path("limits", "spool_bytes_max"), problem);
        }
    }

    fn forward_path(&mut self, rule: &ForwardConfig, index: usize) {
        let place = at("forward", index, "path");
        if let Err(braces) = Template::parse(&rule.path) {
            return self.unknown_placeholder(&place, &braces);
        }
        if !is_path(&rule.path.replace(['{', '}'], "x")) {
            self.report(&place, Problem::error("not a path").allowed("a path that begins with /"));
        }
        let BatchConfig { bytes_max, .. } = rule.batch;
        if u64::from(bytes_max) > rule.queue.bytes_max.bytes() {
            let mut place = at("forward", index, "batch");
            place.push(Step::Key("bytes_max".into()));
            self.report(&place, Problem::warning("larger than `queue.bytes_max`: no batch gets that large"));
        }
    }

    fn forward_topic(&mut self, rule: &ForwardConfig, index: usize) {
        let place = at("forward", index, "topic");
        if let Err(braces) = Template::parse(&rule.topic) {
            return self.unknown_placeholder(&place, &braces);
        }
        if rule.topic.is_empty() || rule.topic.contains(['+', '#', '\0']) {
            self.report(&place, Problem::error("not a topic").allowed("text without + and #"));
        }
    }

    fn unknown_placeholder(&mut self, place: &[Step], braces: &str) {
        let problem = Problem::error(format!("{} stands for nothing", quoted(braces)));
        self.report(place, problem.allowed(Template::PLACEHOLDERS));
    }

    pub(super) fn route_upstreams(&mut self) {
        for route in &self.config.route {
            let keys = route.jwt.as_ref().map_or("", |jwt| jwt.jwks_upstream.as_str());
            let entries = self.document.get("upstream").map(|node| node.items()).unwrap_or_default();
            let is_named = entries.iter().any(|entry| entry.name() == Some(keys));
            let is_broker = self.config.upstream.iter().any(|u| u.name == keys && u.kind == Kind::Mqtt);
            if let Some(index) =
                self.entry("route", &route.name).filter(|_| !keys.is_empty() && (!is_named || is_broker))
            {
                let mut place = at("route", index, "jwt");
                place.push(Step::Key("jwks_upstream".into()));
                let what = if is_named { "a broker has no keys" } else { "there is no upstream of this name" };
                self.report(&place, Problem::error(what).allowed("an upstream of kind \"http\""));
            }
            let Some(index) = self.entry("route", &route.name).filter(|_| !route.to.is_empty()) else { continue };
            if self.named_upstream("route", index, &route.to) == Some(Kind::Mqtt) {
                let problem = Problem::error("requests cannot be proxied to a broker");
                self.report(&at("route", index, "to"), problem.allowed("an upstream of kind \"http\""));
            }
        }
    }

    /// The kind of the upstream that an entry's `to` names. `None`: there is none, which is reported, or it is itself refused.
    fn named_upstream(&mut self, list: &str, index: usize, to: &str) -> Option<Kind> {
        let entries = self.document.get("upstream").map(|node| node.items()).unwrap_or_default();
        let names: Vec<&str> = entries.iter().filter_map(|entry| entry.name()).collect();
        if !names.contains(&to) {
            let problem = Problem::error("there is no upstream of this name");
            let problem = match names.as_slice() {
                [] => problem.help("add an [[upstream]]"),
                names => problem.allowed(names.join(", ")),
            };
            self.report(&at(list, index, "to"), problem);
            return None;
        }
        self.entry("upstream", to)?;
        self.config.upstream.iter().find(|upstream| upstream.name == to).map(|upstream| upstream.kind)
    }

    pub(super) fn unused_upstreams(&mut self) {
        let config = self.config;
        let used: HashSet<&str> = (config.forward.iter().map(|rule| rule.to.as_str()))
            .chain(config.route.iter().map(|route| route.to.as_str()))
            .chain(config.route.iter().filter_map(|route| Some(route.jwt.as_ref()?.jwks_upstream.as_str())))
            .collect();
        // A rule that was refused may name it.
        let all_read = ["forward", "route"].iter().all(|list| {
            let refused = |path: &Vec<Step>| path.first() == Some(&Step::Key((*list).to_owned()));
            !self.refused.iter().any(refused)
        });
        for upstream in config.upstream.iter().filter(|_| all_read) {
            let Some(index) = self.entry("upstream", &upstream.name) else { continue };
            if !used.contains(upstream.name.as_str()) && upstream.subscribe.is_empty() {
                let problem = Problem::warning("not used: no rule and no route names it");
                self.report(&at("upstream", index, "name"), problem);
            }
        }
    }
}

fn is_path(text: &str) -> bool {
    text.starts_with('/') && http::uri::PathAndQuery::try_from(text).is_ok()
}

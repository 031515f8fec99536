//! `[[route]]`: what cannot work, and what no request ever reaches.

use crate::gateway::{RouteConfig, canonical_path, shadowed_routes};
use crate::listener::{ProtocolName, TransportKind, is_own_path};

use super::super::document::{Step, quoted};
use super::super::problem::Problem;
use super::{Check, at};

/// What a route may list in `methods`.
const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];

impl Check<'_> {
    pub(super) fn routes(&mut self) {
        let config = self.config;
        for route in &config.route {
            let Some(index) = self.entry("route", &route.name) else { continue };
            for (n, method) in route.methods.iter().enumerate() {
                if !METHODS.contains(&method.as_str()) {
                    let mut place = at("route", index, "methods");
                    place.push(Step::Index(n));
                    self.report(&place, Problem::error("not a method").allowed(METHODS.join(", ")));
                }
            }
            if !route.path_prefix.starts_with('/') {
                let problem = Problem::error("not a path").allowed("a path that begins with /");
                self.report(&at("route", index, "path_prefix"), problem);
            }
            for (key, text) in route.problems() {
                self.report(&at("route", index, key), Problem::error(text));
            }
            self.unreachable(route, index);
        }
        self.shadowed();
        self.nobody_asks();
    }

    /// Routes whose path or host is never what a request has.
    fn unreachable(&mut self, route: &RouteConfig, index: usize) {
        let (key, path, below) = match route.path.as_str() {
            "" => ("path_prefix", route.path_prefix.trim_end_matches('/'), true),
            path => ("path", path, false),
        };
        let spelled = if path.is_empty() { Some("/".into()) } else { canonical_path(path) };
        match spelled {
            Some(spelled) if !path.is_empty() && spelled != path => {
                let problem = Problem::warning("never used: paths are compared decoded");
                self.report(&at("route", index, key), problem.allowed(quoted(&spelled)));
            }
            Some(_) if is_own_path(&self.config.gateway.device_api_prefix, path, below) => {
                let help = "`gateway.device_api_prefix` moves the device API elsewhere";
                let problem = Problem::warning("never used: the device API answers this path");
                self.report(&at("route", index, key), problem.help(help));
            }
            None if path.starts_with('/') => {
                let what = "never used: no request has such a path (//, a dot segment, ?, # or \\)";
                self.report(&at("route", index, key), Problem::warning(what));
            }
            Some(_) | None => {}
        }
        let host = route.host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()));
        if let Some((host, _)) = host.filter(|(host, _)| !host.ends_with(':') || host.starts_with('[')) {
            let problem = Problem::warning("never used: hosts are compared without their port");
            self.report(&at("route", index, "host"), problem.allowed(quoted(host)));
        }
    }

    /// Routes before which others take every request.
    fn shadowed(&mut self) {
        let readable: Vec<(usize, &RouteConfig)> =
            (self.config.route.iter()).filter_map(|route| Some((self.entry("route", &route.name)?, route))).collect();
        let configs: Vec<RouteConfig> = readable.iter().map(|(_, route)| (*route).clone()).collect();
        for (route, by) in shadowed_routes(&configs) {
            let names: Vec<String> =
                by.iter().filter_map(|by| configs.get(*by)).map(|route| quoted(&route.name)).collect();
            let what = match names.as_slice() {
                [one] => format!("never used: route {one} takes all it would"),
                some => format!("never used: routes {} take all it would", some.join(", ")),
            };
            if let Some((index, _)) = readable.get(route) {
                self.report(&at("route", *index, "name"), Problem::warning(what));
            }
        }
    }

    /// Routes that no listener leads to: HTTP comes over TCP, and CoAP over everything.
    fn nobody_asks(&mut self) {
        let config = self.config;
        let Some(route) = config.route.first() else { return };
        let refused = |path: &Vec<Step>| path.first() == Some(&Step::Key("listener".to_owned()));
        let leads = config.listener.iter().any(|listener| {
            matches!(listener.transport, TransportKind::Udp)
                || listener.protocols.iter().any(|spoken| matches!(spoken, ProtocolName::Http | ProtocolName::Coap))
        });
        if leads || config.listener.is_empty() || self.refused.iter().any(refused) {
            return;
        }
        let Some(index) = self.entry("route", &route.name) else { return };
        let problem = Problem::warning("never used, as all routes: no listener speaks http or coap");
        self.report(&at("route", index, "name"), problem.help("add \"http\" to `protocols` of a [[listener]]"));
    }
}

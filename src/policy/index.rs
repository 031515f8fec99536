//! Finds the rules that match, without reading the others.
//!
//! First by who: one look-up per name the caller goes by (its id, its role, each attribute, "anyone"), which yields a tree. Then by
//! segments: one step per segment of the resource, one hash look-up per step and a branch for each wildcard that stands there. A node is
//! one prefix of patterns and is visited at most once, so a decision never costs more than the tree is large.
//! The whole: no allocation, unless a rule with `when` or `hours` matches.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::pattern::{Segment, is_id_between};
use super::rule::{ActionSet, Effect, Principal, Rule};
use crate::message::Device;

/// All rules, findable.
#[derive(Debug, Default)]
pub(super) struct Index {
    anyone: Option<Box<Node>>,
    devices: TextMap<Node>,
    roles: TextMap<Node>,
    attributes: TextMap<TextMap<Node>>,
}

/// The prefix of some patterns.
#[derive(Debug, Default)]
struct Node {
    literals: TextMap<Node>,
    devices: Vec<(Box<str>, Box<str>, Node)>,
    one: Option<Box<Node>>,
    one_not_empty: Option<Box<Node>>,
    /// Rules whose pattern ends here.
    end: Leaf,
    /// Rules whose pattern goes on with `#`.
    rest: Leaf,
}

#[derive(Debug, Default)]
struct Leaf {
    allow: Vec<Entry>,
    deny: Vec<Entry>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    actions: ActionSet,
    /// Has `when` or `hours`.
    conditional: bool,
    rule: u32,
}

/// What was found: the first rule of each effect that matches whatever the circumstances, and all those that depend on them.
#[derive(Debug, Default)]
pub(super) struct Hits {
    pub deny: Option<u32>,
    pub allow: Option<u32>,
    pub conditional_deny: Vec<u32>,
    pub conditional_allow: Vec<u32>,
}

/// What is looked for. `allow` and `deny` say which effects a step may still collect.
#[derive(Clone, Copy)]
struct Search<'q> {
    action: ActionSet,
    device: Option<&'q str>,
    allow: bool,
    deny: bool,
}

impl Index {
    pub fn new(rules: &[Rule]) -> Self {
        let mut index = Index::default();
        for (number, rule) in rules.iter().enumerate() {
            let entry = Entry {
                actions: rule.actions,
                conditional: rule.when.is_some() || rule.hours.is_some(),
                rule: u32::try_from(number).unwrap_or(u32::MAX),
            };
            for principal in &rule.who {
                for pattern in &rule.on {
                    let root = index.root(principal);
                    let node = pattern.segments.iter().fold(root, Node::step);
                    let leaf = if pattern.rest { &mut node.rest } else { &mut node.end };
                    leaf.add(rule.effect, entry);
                }
            }
        }
        index
    }

    fn root(&mut self, principal: &Principal) -> &mut Node {
        match principal {
            Principal::Anyone => self.anyone.get_or_insert_default(),
            Principal::Device(id) => self.devices.entry(id.clone()).or_default(),
            Principal::Role(role) => self.roles.entry(role.clone()).or_default(),
            Principal::Attribute(key, value) => {
                self.attributes.entry(key.clone()).or_default().entry(value.clone()).or_default()
            }
        }
    }

    /// Rules that match a concrete topic or path.
    pub fn find(&self, device: Option<&Device>, role: &str, action: ActionSet, resource: &str) -> Hits {
        let mut hits = Hits::default();
        let search = Search { action, device: device.map(|d| d.id.as_str()), allow: true, deny: true };
        self.each_root(device, role, |root| root.find(resource, search, true, &mut hits));
        hits
    }

    /// Rules about a topic filter: those allow rules that cover it, and those deny rules that meet it.
    pub fn find_filter(&self, device: Option<&Device>, role: &str, action: ActionSet, filter: &str) -> Hits {
        let mut hits = Hits::default();
        let search = Search { action, device: device.map(|d| d.id.as_str()), allow: true, deny: false };
        let meeting = Search { allow: false, deny: true, ..search };
        // A topic has at least one level, so `#` alone says the same as `+/#`.
        let covered = if filter == "#" { "+/#" } else { filter };
        self.each_root(device, role, |root| {
            root.covering(Some(covered), search, true, &mut hits);
            root.meeting(Some(filter), meeting, true, &mut hits);
        });
        hits
    }

    fn each_root<'i>(&'i self, device: Option<&Device>, role: &str, mut visit: impl FnMut(&'i Node)) {
        if let Some(device) = device {
            self.devices.get(device.id.as_str()).map(&mut visit);
            if !self.attributes.is_empty() {
                for (key, value) in &device.attributes {
                    self.attributes.get(key).and_then(|values| values.get(value)).map(&mut visit);
                }
            }
        }
        self.roles.get(role).map(&mut visit);
        self.anyone.as_deref().map(&mut visit);
    }
}

impl Node {
    fn step(&mut self, segment: &Segment) -> &mut Node {
        match segment {
            Segment::Literal(text) => self.literals.entry(text.clone()).or_default(),
            Segment::One => self.one.get_or_insert_default(),
            Segment::OneNotEmpty => self.one_not_empty.get_or_insert_default(),
            Segment::Device { prefix, suffix } => {
                let known = self.devices.iter().position(|(p, s, _)| p == prefix && s == suffix);
                let place = known.unwrap_or_else(|| {
                    self.devices.push((prefix.clone(), suffix.clone(), Node::default()));
                    self.devices.len() - 1
                });
                &mut self.devices[place].2
            }
        }
    }

    fn find(&self, resource: &str, search: Search<'_>, first: bool, hits: &mut Hits) {
        let (segment, after) = match resource.as_bytes().iter().position(|b| *b == b'/') {
            Some(at) => (&resource[..at], Some(&resource[at + 1..])),
            None => (resource, None),
        };
        let wild = Search { allow: search.allow && !(first && segment.starts_with('$')), ..search };
        self.rest.collect(wild, hits);
        let mut go = |node: &Node, search: Search<'_>| match after {
            Some(after) => node.find(after, search, false, hits),
            None => {
                node.end.collect(search, hits);
                node.rest.collect(search, hits);
            }
        };
        if let Some(node) = self.literals.get(segment) {
            go(node, search);
        }
        if let Some(id) = search.device {
            for (prefix, suffix, node) in &self.devices {
                if is_id_between(segment, prefix, id, suffix) {
                    go(node, search);
                }
            }
        }
        if let Some(node) = &self.one {
            go(node, wild);
        }
        if let Some(node) = &self.one_not_empty
            && !segment.is_empty()
        {
            go(node, wild);
        }
    }

    /// `None` is the end of the filter.
    fn covering(&self, filter: Option<&str>, search: Search<'_>, first: bool, hits: &mut Hits) {
        let wild = Search { allow: search.allow && !(first && filter.is_some_and(|f| f.starts_with('$'))), ..search };
        self.rest.collect(wild, hits);
        let Some(filter) = filter else {
            self.end.collect(search, hits);
            return;
        };
        let (level, after) = match filter.split_once('/') {
            Some((level, after)) => (level, Some(after)),
            None => (filter, None),
        };
        if level == "#" {
            return;
        }
        if let Some(node) = &self.one {
            node.covering(after, wild, false, hits);
        }
        if level == "+" {
            return;
        }
        if let Some(node) = self.literals.get(level) {
            node.covering(after, search, false, hits);
        }
        if let Some(id) = search.device {
            for (prefix, suffix, node) in &self.devices {
                if is_id_between(level, prefix, id, suffix) {
                    node.covering(after, search, false, hits);
                }
            }
        }
        if let Some(node) = &self.one_not_empty
            && !level.is_empty()
        {
            node.covering(after, wild, false, hits);
        }
    }

    fn meeting(&self, filter: Option<&str>, search: Search<'_>, first: bool, hits: &mut Hits) {
        self.rest.collect(search, hits);
        let Some(filter) = filter else {
            self.end.collect(search, hits);
            return;
        };
        let (level, after) = match filter.split_once('/') {
            Some((level, after)) => (level, Some(after)),
            None => (filter, None),
        };
        if level == "#" {
            self.end.collect(search, hits);
        }
        // `#` keeps itself as the rest of the filter, at every depth.
        let after = if level == "#" { Some("#") } else { after };
        let wildcard = matches!(level, "+" | "#");
        let one_of = |node: &Node, hits: &mut Hits| node.meeting(after, search, false, hits);
        if wildcard {
            for (text, node) in &self.literals {
                if !(first && text.starts_with('$')) {
                    one_of(node, hits);
                }
            }
            if search.device.is_some() {
                self.devices.iter().for_each(|(_, _, node)| one_of(node, hits));
            }
        } else {
            self.literals.get(level).into_iter().for_each(|node| one_of(node, hits));
            for (prefix, suffix, node) in &self.devices {
                if search.device.is_some_and(|id| is_id_between(level, prefix, id, suffix)) {
                    one_of(node, hits);
                }
            }
        }
        if let Some(node) = &self.one {
            one_of(node, hits);
        }
        if let Some(node) = &self.one_not_empty
            && !level.is_empty()
        {
            one_of(node, hits);
        }
    }
}

impl Leaf {
    /// Leaves out what an earlier rule of the same place and effect decides anyway.
    fn add(&mut self, effect: Effect, entry: Entry) {
        let entries = match effect {
            Effect::Allow => &mut self.allow,
            Effect::Deny => &mut self.deny,
        };
        if !entries.iter().any(|e| !e.conditional && e.actions.covers(entry.actions)) {
            entries.push(entry);
        }
    }

    fn collect(&self, search: Search<'_>, hits: &mut Hits) {
        if search.allow {
            let Hits { allow, conditional_allow, .. } = hits;
            collect(&self.allow, search.action, allow, conditional_allow);
        }
        if search.deny {
            let Hits { deny, conditional_deny, .. } = hits;
            collect(&self.deny, search.action, deny, conditional_deny);
        }
    }
}

/// Entries are in the order of the rules, so the first that is sure ends the search.
fn collect(entries: &[Entry], action: ActionSet, sure: &mut Option<u32>, conditional: &mut Vec<u32>) {
    for entry in entries.iter().filter(|e| e.actions.meets(action)) {
        if sure.is_some_and(|known| known <= entry.rule) {
            return;
        }
        if entry.conditional {
            conditional.push(entry.rule);
        } else {
            *sure = Some(entry.rule);
            return;
        }
    }
}

type TextMap<V> = HashMap<Box<str>, V, BuildHasherDefault<TextHasher>>;

/// A multiplicative hash for the keys of the policy (the operator's, so nobody can choose them to collide). An outsider chooses only
/// what is looked up, which finds nothing worse than one full bucket.
#[derive(Default)]
pub(super) struct TextHasher(u64);

impl Hasher for TextHasher {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0u8; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = (self.0.rotate_left(5) ^ u64::from_le_bytes(word)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
    }

    fn write_u8(&mut self, byte: u8) {
        self.0 = (self.0.rotate_left(5) ^ u64::from(byte)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 29)
    }
}

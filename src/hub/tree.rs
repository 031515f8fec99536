//! The subscription tree: which subscribers want a topic.
//!
//! One node per topic level. Matching visits at most the exact, `+` and `#` branches of each level, so its cost is bounded by
//! the number of levels and of matching filters, not by the number of subscriptions.

use std::collections::HashMap;
use std::sync::Arc;

use tidegate_mqtt::topic;

use crate::message::{Message, Qos, Reject, SessionId};

use super::outbox::{Delivery, Outbox, View};
use super::queue::{Terms, Ticket};

/// What a subscriber asked for, per filter (MQTT 5 section 3.8.3.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubscribeOptions {
    /// The most that is delivered.
    pub qos: Qos,
    /// Not what the same session published.
    pub no_local: bool,
    /// Keep the retain flag as published.
    pub retain_as_published: bool,
    /// MQTT 5 Subscription Identifier.
    pub identifier: Option<u32>,
    pub view: View,
}

impl Default for SubscribeOptions {
    fn default() -> Self {
        SubscribeOptions {
            qos: Qos::AtMostOnce,
            no_local: false,
            retain_as_published: false,
            identifier: None,
            view: View::Canonical,
        }
    }
}

/// One subscriber of a topic, all its matching filters folded into one.
#[derive(Clone)]
pub struct Target {
    pub outbox: Arc<Outbox>,
    pub qos: Qos,
    pub no_local: bool,
    pub retain_as_published: bool,
    pub terms: Terms,
}

/// Who gets a message: every target, and one member of every shared group.
#[derive(Clone, Default)]
pub struct Matches {
    pub targets: Vec<Target>,
    pub groups: Vec<Arc<[Target]>>,
    /// A persistent session among them may want `QoS` 1 and 2.
    pub stored: bool,
}

impl Target {
    /// No Local: not what the same session published.
    pub fn wants(&self, message: &Message) -> bool {
        !(self.no_local && message.origin.session == Some(self.outbox.session()))
    }

    /// The message as this subscriber gets it.
    pub fn delivery(&self, message: &Arc<Message>, ticket: Option<Ticket>) -> Delivery {
        Delivery {
            message: message.clone(),
            qos: message.qos.min(self.qos),
            retain: message.retain && self.retain_as_published,
            terms: self.terms.clone(),
            ticket,
            repeated: false,
        }
    }

    /// Whether a message published at `qos` is stored for it.
    pub fn stores(&self, qos: Qos) -> bool {
        self.outbox.number().is_some() && qos.min(self.qos) != Qos::AtMostOnce
    }
}

impl Matches {
    pub fn is_empty(&self) -> bool {
        self.targets.is_empty() && self.groups.is_empty()
    }
}

/// A filter split into the group of a shared subscription, if it is one, and the filter proper.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Filter {
    pub group: Option<Box<str>>,
    pub pattern: Box<str>,
}

impl Filter {
    /// Checks a filter (MQTT 5 section 4.7) and splits `$share/GROUP/PATTERN`.
    ///
    /// # Errors
    /// [`Reject::Malformed`].
    pub fn parse(text: &str) -> Result<Self, Reject> {
        topic::check_filter(text).map_err(|_| Reject::Malformed { what: "not a topic filter" })?;
        Ok(match topic::shared(text) {
            Some((group, pattern)) => Filter { group: Some(group.into()), pattern: pattern.into() },
            None => Filter { group: None, pattern: text.into() },
        })
    }
}

#[derive(Default)]
pub struct Tree {
    root: Node,
    count: usize,
}

#[derive(Default)]
struct Node {
    children: HashMap<Box<str>, Node>,
    any: Option<Box<Node>>,
    /// Subscriptions whose filter ends here.
    here: Vec<Entry>,
    /// Subscriptions whose filter ends in `#` here.
    rest: Vec<Entry>,
}

struct Entry {
    outbox: Arc<Outbox>,
    tag: u64,
    /// The filter of a shared subscription.
    shared: Option<Arc<Filter>>,
    options: SubscribeOptions,
}

impl Entry {
    fn is(&self, session: SessionId, tag: u64, group: Option<&str>) -> bool {
        self.outbox.session() == session && self.tag == tag && self.group() == group
    }

    fn group(&self) -> Option<&str> {
        self.shared.as_ref().and_then(|filter| filter.group.as_deref())
    }
}

impl Node {
    fn is_empty(&self) -> bool {
        self.children.is_empty() && self.any.is_none() && self.here.is_empty() && self.rest.is_empty()
    }
}

impl Tree {
    /// Subscriptions in the tree.
    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Adds or replaces a subscription; true if the subscriber did not have this filter before.
    pub fn subscribe(&mut self, filter: &Filter, outbox: Arc<Outbox>, tag: u64, options: SubscribeOptions) -> bool {
        let entries = self.root.entries_mut(&filter.pattern);
        let group = filter.group.as_deref();
        match entries.iter_mut().find(|e| e.is(outbox.session(), tag, group)) {
            Some(entry) => {
                entry.options = options;
                entry.outbox = outbox;
                false
            }
            None => {
                let new = || group.is_some().then(|| Arc::new(filter.clone()));
                // Members of one group share one name of it.
                let member = entries.iter().find(|e| group.is_some() && e.group() == group);
                let shared = member.map_or_else(new, |member| member.shared.clone());
                entries.push(Entry { outbox, tag, shared, options });
                self.count += 1;
                true
            }
        }
    }

    /// Removes a subscription; true if it was there.
    pub fn unsubscribe(&mut self, filter: &Filter, session: SessionId, tag: u64) -> bool {
        let levels: Vec<&str> = filter.pattern.split('/').collect();
        let removed = remove(&mut self.root, &levels, session, tag, filter.group.as_deref());
        self.count -= usize::from(removed);
        removed
    }

    /// The members of a shared subscription.
    pub fn members(&self, filter: &Filter) -> Vec<Target> {
        let entries = self.root.entries(&filter.pattern).unwrap_or_default();
        let members = entries.iter().filter(|e| e.group().is_some() && e.group() == filter.group.as_deref());
        members.filter_map(|member| target(&[member])).collect()
    }

    /// Collects who gets a message on `topic`; a subscriber with several matching filters appears once, with the highest `QoS`
    /// and all identifiers (MQTT 5 section 3.3.4).
    pub fn matches(&self, topic: &str) -> Matches {
        let mut found = Found::default();
        let levels: Vec<&str> = topic.split('/').collect();
        // [MQTT-4.7.2-1]: a leading wildcard does not match a topic that begins with `$`.
        visit(&self.root, &levels, topic.starts_with('$'), &mut found);
        found.fold()
    }
}

impl Node {
    /// The subscriptions with a filter, if there ever was one.
    fn entries(&self, pattern: &str) -> Option<&[Entry]> {
        let mut node = self;
        for level in pattern.split('/') {
            node = match level {
                "#" => return Some(&node.rest),
                "+" => node.any.as_deref()?,
                level => node.children.get(level)?,
            };
        }
        Some(&node.here)
    }

    fn entries_mut(&mut self, pattern: &str) -> &mut Vec<Entry> {
        let mut node = self;
        for level in pattern.split('/') {
            node = match level {
                "#" => return &mut node.rest,
                "+" => node.any.get_or_insert_default(),
                level => node.children.entry(level.into()).or_default(),
            };
        }
        &mut node.here
    }
}

fn remove(node: &mut Node, levels: &[&str], session: SessionId, tag: u64, group: Option<&str>) -> bool {
    let take = |entries: &mut Vec<Entry>| {
        let position = entries.iter().position(|e| e.is(session, tag, group));
        position.map(|at| entries.swap_remove(at)).is_some()
    };
    let Some((level, rest)) = levels.split_first() else { return take(&mut node.here) };
    match *level {
        "#" => take(&mut node.rest),
        "+" => {
            let Some(child) = &mut node.any else { return false };
            let removed = remove(child, rest, session, tag, group);
            if child.is_empty() {
                node.any = None;
            }
            removed
        }
        level => {
            let Some(child) = node.children.get_mut(level) else { return false };
            let removed = remove(child, rest, session, tag, group);
            if child.is_empty() {
                node.children.remove(level);
            }
            removed
        }
    }
}

fn visit<'t>(node: &'t Node, levels: &[&str], shield: bool, found: &mut Found<'t>) {
    // `a/#` matches `a` too (MQTT 5 section 4.7.1.2), so the rest is taken before the end is looked at.
    if !shield {
        found.extend(&node.rest);
    }
    let Some((level, rest)) = levels.split_first() else { return found.extend(&node.here) };
    if let Some(child) = node.children.get(*level) {
        visit(child, rest, false, found);
    }
    if let (Some(child), false) = (&node.any, shield) {
        visit(child, rest, false, found);
    }
}

#[derive(Default)]
struct Found<'t> {
    plain: Vec<&'t Entry>,
    /// With the number of the filter: groups of one name and different filters are different subscriptions (MQTT 5 section 4.8.2).
    shared: Vec<(usize, &'t Entry)>,
    filters: usize,
}

impl<'t> Found<'t> {
    fn extend(&mut self, entries: &'t [Entry]) {
        self.filters += 1;
        for entry in entries {
            if entry.shared.is_some() { self.shared.push((self.filters, entry)) } else { self.plain.push(entry) }
        }
    }

    fn fold(mut self) -> Matches {
        self.plain.sort_by_key(|e| (e.outbox.session(), e.tag));
        let mut targets = Vec::with_capacity(self.plain.len());
        for same in self.plain.chunk_by(|a, b| (a.outbox.session(), a.tag) == (b.outbox.session(), b.tag)) {
            targets.extend(target(same));
        }
        self.shared.sort_by_key(|(filter, e)| (*filter, e.group(), e.outbox.session()));
        let groups = self
            .shared
            .chunk_by(|(f, a), (g, b)| f == g && a.group() == b.group())
            .map(|members| members.iter().filter_map(|(_, m)| target(&[m])).collect())
            .collect::<Vec<Arc<[Target]>>>();
        let stores = |target: &Target| target.stores(Qos::ExactlyOnce);
        let stored = targets.iter().any(stores) || groups.iter().any(|group| group.iter().any(stores));
        Matches { targets, groups, stored }
    }
}

fn target(same: &[&Entry]) -> Option<Target> {
    let first = same.first()?;
    let identifiers: Vec<u32> = same.iter().filter_map(|e| e.options.identifier).collect();
    // A client that subscribed by a short name expects that name, unless a canonical filter of its own matches too.
    let view = same.iter().map(|e| e.options.view).find(|v| *v == View::Canonical).unwrap_or(first.options.view);
    let identifiers = (!identifiers.is_empty()).then(|| identifiers.into());
    Some(Target {
        outbox: first.outbox.clone(),
        qos: same.iter().map(|e| e.options.qos).max().unwrap_or_default(),
        no_local: same.iter().all(|e| e.options.no_local),
        retain_as_published: same.iter().any(|e| e.options.retain_as_published),
        terms: Terms { tag: first.tag, view, identifiers, shared: first.shared.clone() },
    })
}

#[cfg(test)]
mod tests {
    use super::super::outbox::OutboxLimits;
    use super::*;
    use proptest::prelude::*;

    fn outbox(n: u64) -> Arc<Outbox> {
        Arc::new(Outbox::new(
            SessionId(n),
            OutboxLimits { messages_max: 10, bytes_max: 10_000, crowded_wait: std::time::Duration::ZERO },
        ))
    }

    fn sessions(tree: &Tree, topic: &str) -> Vec<u64> {
        tree.matches(topic).targets.iter().map(|t| t.outbox.session().0).collect()
    }

    fn tree_of(filters: &[&str]) -> Tree {
        let mut tree = Tree::default();
        for (n, filter) in filters.iter().enumerate() {
            tree.subscribe(&Filter::parse(filter).unwrap(), outbox(n as u64), 0, SubscribeOptions::default());
        }
        tree
    }

    #[test]
    fn wildcards_match_as_the_specification_writes_them() {
        let tree = tree_of(&["sport/#", "sport/+", "+/+", "/+", "#", "sport", "sport/tennis/+"]);
        assert_eq!(sessions(&tree, "sport"), [0, 4, 5]);
        assert_eq!(sessions(&tree, "sport/"), [0, 1, 2, 4]);
        assert_eq!(sessions(&tree, "/finance"), [2, 3, 4]);
        assert_eq!(sessions(&tree, "sport/tennis/player1"), [0, 4, 6]);
    }

    #[test]
    fn a_leading_wildcard_does_not_see_dollar_topics() {
        let tree = tree_of(&["#", "+/monitor", "$SYS/#", "$SYS/+"]);
        assert_eq!(sessions(&tree, "$SYS/monitor"), [2, 3]);
    }

    #[test]
    fn overlapping_filters_of_one_session_become_one_target() {
        let mut tree = Tree::default();
        let one = outbox(1);
        for (filter, qos, identifier) in [("a/#", Qos::AtMostOnce, 3), ("a/+", Qos::ExactlyOnce, 5)] {
            let options = SubscribeOptions { qos, identifier: Some(identifier), ..SubscribeOptions::default() };
            assert!(tree.subscribe(&Filter::parse(filter).unwrap(), one.clone(), 0, options));
        }
        let matches = tree.matches("a/b");
        assert_eq!(matches.targets.len(), 1);
        assert_eq!(matches.targets[0].qos, Qos::ExactlyOnce);
        assert_eq!(matches.targets[0].terms.identifiers.as_deref(), Some(&[3, 5][..]));
    }

    #[test]
    fn a_shared_group_is_one_entry_with_all_its_members() {
        let mut tree = Tree::default();
        for n in 0..3 {
            tree.subscribe(&Filter::parse("$share/g/a/#").unwrap(), outbox(n), 0, SubscribeOptions::default());
        }
        tree.subscribe(&Filter::parse("$share/h/a/+").unwrap(), outbox(7), 0, SubscribeOptions::default());
        let matches = tree.matches("a/b");
        assert!(matches.targets.is_empty());
        assert_eq!(matches.groups.iter().map(|g| g.len()).collect::<Vec<_>>(), [3, 1]);
    }

    #[test]
    fn groups_of_one_name_and_different_filters_are_different_subscriptions() {
        let mut tree = Tree::default();
        for (n, filter) in (0..).zip(["$share/g/a/#", "$share/g/a/+", "$share/g/a/#"]) {
            tree.subscribe(&Filter::parse(filter).unwrap(), outbox(n), 0, SubscribeOptions::default());
        }
        let mut sizes: Vec<usize> = tree.matches("a/b").groups.iter().map(|g| g.len()).collect();
        sizes.sort_unstable();
        assert_eq!(sizes, [1, 2]);
        let members = |filter: &str| {
            let members = tree.members(&Filter::parse(filter).unwrap());
            members.iter().map(|m| m.outbox.session().0).collect::<Vec<_>>()
        };
        assert_eq!((members("$share/g/a/#"), members("$share/g/a/+")), (vec![0, 2], vec![1]));
        for nobody in ["$share/h/a/+", "$share/g/a/b", "$share/g/x/y/z", "a/#"] {
            assert!(members(nobody).is_empty(), "{nobody}");
        }
    }

    #[test]
    fn removing_the_last_subscription_leaves_an_empty_tree() {
        let mut tree = Tree::default();
        let filters = ["a/b/c", "a/+/c", "a/#", "#", "$share/g/x/y"];
        for filter in filters {
            assert!(tree.subscribe(&Filter::parse(filter).unwrap(), outbox(1), 0, SubscribeOptions::default()));
            assert!(!tree.subscribe(&Filter::parse(filter).unwrap(), outbox(1), 0, SubscribeOptions::default()));
        }
        assert_eq!(tree.len(), filters.len());
        for filter in filters {
            assert!(tree.unsubscribe(&Filter::parse(filter).unwrap(), SessionId(1), 0));
            assert!(!tree.unsubscribe(&Filter::parse(filter).unwrap(), SessionId(1), 0));
        }
        assert!(tree.is_empty() && tree.root.is_empty());
    }

    proptest! {
        #[test]
        fn the_tree_agrees_with_matching_one_filter_at_a_time(
            filters in prop::collection::vec("([ab+]|\\$)?(/[ab+]){0,3}(/#)?", 0..12),
            topic in "\\$?[ab]?(/[ab]){0,3}",
        ) {
            let filters: Vec<&str> = filters.iter().map(String::as_str).filter(|f| !f.is_empty()).collect();
            let tree = tree_of(&filters);
            let expected: Vec<u64> = (0..).zip(&filters).filter(|(_, f)| tidegate_mqtt::topic::matches(f, &topic)).map(|(n, _)| n).collect();
            prop_assert_eq!(sessions(&tree, &topic), expected);
        }
    }
}

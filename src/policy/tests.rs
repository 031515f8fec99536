use super::*;
use crate::message::DeviceId;
use proptest::prelude::*;

fn device(id: &str, role: &str, attributes: &[(&str, &str)]) -> Device {
    Device {
        id: DeviceId::parse(id).unwrap(),
        index: 0,
        generation: 0,
        role: role.into(),
        attributes: attributes.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
    }
}

fn rule(name: &str, who: &str, actions: &[&str], on: &[&str]) -> RuleConfig {
    RuleConfig {
        name: name.into(),
        who: vec![who.into()],
        actions: actions.iter().map(|a| (*a).into()).collect(),
        on: on.iter().map(|o| (*o).into()).collect(),
        ..RuleConfig::default()
    }
}

fn deny(rule: RuleConfig) -> RuleConfig {
    RuleConfig { effect: Effect::Deny, ..rule }
}

fn sources(rules: Vec<RuleConfig>) -> Vec<RuleSource> {
    let place = |(at, rule)| RuleSource { rule, file: "policy.toml".into(), line: at as u32 * 10 + 1 };
    rules.into_iter().enumerate().map(place).collect()
}

fn policy(rules: Vec<RuleConfig>) -> Policy {
    Policy::compile(sources(rules)).unwrap()
}

fn query<'q>(device: &'q Device, action: Action, resource: &'q str) -> Query<'q> {
    Query {
        device: Some(device),
        role: &device.role,
        action,
        resource,
        size: 10,
        minute_of_day: 12 * 60,
        protocol: Protocol::Mqtt,
    }
}

#[test]
fn nothing_is_allowed_without_a_rule() {
    let sensor = device("s1", "sensor", &[]);
    for action in Action::ALL {
        for resource in ["a", "/a", "#", "", "/"] {
            let decision = Policy::deny_all().decide(&query(&sensor, action, resource));
            assert_eq!((decision.effect, decision.rule), (Effect::Deny, None));
        }
    }
}

#[test]
fn the_rule_of_the_wire_contract_reads_as_it_says() {
    let mut own = rule(
        "sensors write their own telemetry",
        "role:sensor",
        &["publish"],
        &["dev/{device}/#", "/api/v1/{device}/*"],
    );
    own.when = Some("msg.size <= 4096".into());
    own.rate = Some("10/s burst 50".into());
    own.bytes_max = Some(crate::units::ByteSize(65_536));
    own.hours = Some("06:00-22:00".into());
    let policy = policy(vec![own]);
    let sensor = device("s1", "sensor", &[]);
    let ask = query(&sensor, Action::Publish, "dev/s1/telemetry");
    let decision = policy.decide(&ask);
    assert!(decision.is_allowed() && !decision.cacheable);
    assert_eq!(decision.bytes_max, Some(65_536));
    assert_eq!(policy.rate(decision.rate.unwrap()).unwrap().to_string(), "10/s burst 50");
    assert!(!policy.decide(&Query { size: 4_097, ..ask }).is_allowed());
    assert!(!policy.decide(&Query { minute_of_day: 23 * 60, ..ask }).is_allowed());
    assert!(!policy.decide(&Query { resource: "dev/s2/telemetry", ..ask }).is_allowed());
    assert!(!policy.decide(&Query { role: "actor", ..ask }).is_allowed());
    assert!(!policy.decide(&Query { action: Action::Subscribe, resource: "dev/s1/#", ..ask }).is_allowed());
}

#[test]
fn a_deny_wins_wherever_it_stands() {
    let all = rule("all", "anyone", &["publish", "subscribe"], &["#"]);
    let secret = deny(rule("no secrets", "anyone", &["publish", "subscribe"], &["+/secret/#"]));
    let sensor = device("s1", "sensor", &[]);
    for rules in [vec![all.clone(), secret.clone()], vec![secret, all]] {
        let policy = policy(rules);
        let decide = |action, resource| policy.decide(&query(&sensor, action, resource)).is_allowed();
        assert!(decide(Action::Publish, "a/open"));
        assert!(!decide(Action::Publish, "a/secret/x"));
        assert!(!decide(Action::Publish, "$x/secret"));
        assert!(decide(Action::Subscribe, "a/open/#"));
        assert!(!decide(Action::Subscribe, "a/#"));
        assert!(!decide(Action::Subscribe, "#"));
    }
}

#[test]
fn the_first_allow_in_the_order_of_the_files_sets_rate_and_size() {
    let mut small = rule("small", "role:sensor", &["publish"], &["dev/#"]);
    small.bytes_max = Some(crate::units::ByteSize(10));
    let mut large = rule("large", "anyone", &["publish"], &["#"]);
    large.bytes_max = Some(crate::units::ByteSize(1_000));
    let sensor = device("s1", "sensor", &[]);
    let decide = |rules| policy(rules).decide(&query(&sensor, Action::Publish, "dev/x")).bytes_max;
    assert_eq!(decide(vec![small.clone(), large.clone()]), Some(10));
    assert_eq!(decide(vec![large, small]), Some(1_000));
}

#[test]
fn a_condition_that_cannot_be_evaluated_fails_closed_and_is_counted() {
    let mut allow = rule("north only", "anyone", &["publish"], &["a/#"]);
    allow.when = Some("device.attrs.site == 'north'".into());
    let mut forbid = deny(rule("not from the south", "anyone", &["publish"], &["b/#"]));
    forbid.when = Some("device.attrs.site == 'south'".into());
    let policy = policy(vec![allow, forbid, rule("rest", "anyone", &["publish"], &["b/#"])]);
    let bare = device("s1", "sensor", &[]);
    assert!(!policy.decide(&query(&bare, Action::Publish, "a/x")).is_allowed());
    let denied = policy.decide(&query(&bare, Action::Publish, "b/x"));
    assert_eq!(policy.rule_name(denied.rule.unwrap()).unwrap().as_ref(), "not from the south");
    assert_eq!(policy.when_errors(), 2);
    let north = device("s2", "sensor", &[("site", "north")]);
    assert!(policy.decide(&query(&north, Action::Publish, "a/x")).is_allowed());
    assert!(policy.decide(&query(&north, Action::Publish, "b/x")).is_allowed());
    assert_eq!(policy.when_errors(), 2);
}

#[test]
fn callers_are_found_by_id_role_and_attribute() {
    let policy = policy(vec![
        rule("by id", "device:s1", &["publish"], &["id"]),
        rule("by role", "role:sensor", &["publish"], &["role"]),
        rule("by attribute", "attr:site=north", &["publish"], &["attr"]),
        rule("anyone", "anyone", &["publish"], &["any"]),
    ]);
    let allowed = |device: Option<&Device>, role, resource| {
        let query = Query {
            device,
            role,
            action: Action::Publish,
            resource,
            size: 0,
            minute_of_day: 0,
            protocol: Protocol::Coap,
        };
        policy.decide(&query).is_allowed()
    };
    let s1 = device("s1", "sensor", &[("site", "north")]);
    let s2 = device("s2", "actor", &[("site", "south")]);
    for (resource, one, two, nobody) in [
        ("id", true, false, false),
        ("role", true, false, false),
        ("attr", true, false, false),
        ("any", true, true, true),
    ] {
        assert_eq!(allowed(Some(&s1), "sensor", resource), one, "{resource}");
        assert_eq!(allowed(Some(&s2), "actor", resource), two, "{resource}");
        assert_eq!(allowed(None, "guest", resource), nobody, "{resource}");
    }
    // A role is not an id, and an id is not a role.
    let confusing = device("sensor", "s1", &[("sensor", "north")]);
    assert!(!allowed(Some(&confusing), "s1", "id"));
    assert!(!allowed(Some(&confusing), "s1", "role"));
}

#[test]
fn encodings_do_not_slip_past_a_rule() {
    let policy = policy(vec![
        rule("api", "anyone", &["GET"], &["/api/**"]),
        deny(rule("not admin", "anyone", &["GET"], &["/api/admin/**"])),
    ]);
    let sensor = device("s1", "sensor", &[]);
    let allowed = |path| policy.decide(&query(&sensor, Action::Get, path)).is_allowed();
    assert!(allowed("/api/x"));
    assert!(allowed("/api"));
    assert!(allowed("/%61pi/x%20y"));
    for path in [
        "/api/admin",
        "/api/%61dmin/x",
        "/api//admin/x",
        "/api/x/../admin/x",
        "/api/x/%2e%2e/admin",
        "/api/./admin",
        "/api\\admin",
        "/api/%5cadmin",
        "/api/x%2fadmin",
        "/api/x?y",
        "api/x",
    ] {
        assert!(!allowed(path), "{path}");
    }
}

#[test]
fn every_problem_of_every_rule_is_reported_with_its_place() {
    let mut bad = rule("", "rolle:sensor", &["Publish", "get"], &["a/#/b"]);
    bad.when = Some("msg.sise > 1".into());
    bad.rate = Some("10/day".into());
    bad.hours = Some("6-22".into());
    let mut forbid = deny(rule("twice", "anyone", &["publish"], &["#"]));
    forbid.rate = Some("1/s".into());
    forbid.bytes_max = Some(crate::units::ByteSize(5));
    let no_path = rule("twice", "anyone", &["GET"], &["dev/#"]);
    let mut empty = rule("empty", "anyone", &[], &[]);
    empty.who.clear();
    let problems = Policy::compile(sources(vec![bad, forbid, no_path, empty])).unwrap_err();
    let seen: Vec<(u32, &str)> = problems.iter().map(|p| (p.line, p.key)).collect();
    let expected = [
        (1, "name"),
        (1, "who"),
        (1, "do"),
        (1, "do"),
        (1, "on"),
        (1, "when"),
        (1, "rate"),
        (1, "hours"),
        (11, "rate"),
        (11, "bytes_max"),
        (21, "on"),
        (21, "name"),
        (31, "who"),
        (31, "do"),
        (31, "on"),
    ];
    assert_eq!(seen, expected);
    assert!(problems[2].what.contains("did you mean publish"), "{}", problems[2]);
    assert!(problems[3].what.contains("did you mean GET"), "{}", problems[3]);
    assert!(problems.iter().all(|p| p.file == "policy.toml" && !p.allowed.is_empty()));
}

#[test]
fn an_explanation_names_the_rule_its_place_and_what_was_near() {
    let mut day = rule("by day", "role:sensor", &["publish"], &["dev/{device}/#"]);
    day.hours = Some("06:00-10:00".into());
    let policy = policy(vec![
        rule("read only", "role:sensor", &["read"], &["dev/{device}/#"]),
        day,
        deny(rule("no admin", "anyone", &["admin"], &["/**"])),
    ]);
    let sensor = device("s1", "sensor", &[]);
    let denied = policy.explain(&query(&sensor, Action::Publish, "dev/s1/t"));
    assert_eq!(denied.rule, None);
    let near: Vec<_> = denied.near.iter().map(|m| (&*m.rule.name, m.rule.line, &m.unmet)).collect();
    assert_eq!(near, [("by day", 11, &Unmet::Hours), ("read only", 1, &Unmet::Do)]);
    let text = policy.explain(&query(&sensor, Action::Admin, "/devices")).to_string();
    assert!(text.starts_with("deny by \"no admin\" (policy.toml:21)"), "{text}");
    let allowed = policy.explain(&query(&sensor, Action::Read, "dev/s1/state"));
    assert_eq!(allowed.to_string(), "allow by \"read only\" (policy.toml:1)");
    assert!(policy.explain(&query(&sensor, Action::Get, "/a//b")).confusable);
}

#[test]
fn a_table_of_cases_is_checked() {
    let mut own = rule("own", "role:sensor", &["publish"], &["dev/{device}/#"]);
    own.bytes_max = Some(crate::units::ByteSize(100));
    let policy = policy(vec![own]);
    let file = r#"{ "case": [
        { "device": "s1", "role": "sensor", "action": "publish", "resource": "dev/s1/t", "expect": "allow", "rule": "own" },
        { "device": "s1", "role": "sensor", "action": "publish", "resource": "dev/s2/t", "expect": "deny" },
        { "device": "s1", "role": "sensor", "action": "publish", "resource": "dev/s1/t", "size": 101, "expect": "deny" },
        { "action": "publish", "resource": "dev/s1/t", "expect": "allow" },
        { "device": "s1", "role": "sensor", "action": "publish", "resource": "dev/s1/t", "expect": "allow", "rule": "other" },
        { "device": "s/1", "action": "publish", "resource": "x", "expect": "deny" }
    ] }"#;
    let cases: CasesFile = serde_json::from_str(file).unwrap();
    let passed: Vec<_> = cases.case.iter().map(|c| policy.test(c).map(|o| o.passed).map_err(|e| e.key)).collect();
    assert_eq!(passed, [Ok(true), Ok(true), Ok(true), Ok(false), Ok(false), Err("device")]);
}

#[test]
fn a_cached_decision_is_the_decision_and_ends_with_its_policy() {
    let sensor = device("s1", "sensor", &[]);
    let open = policy(vec![rule("all", "anyone", &["publish"], &["#"])]);
    let shut = policy(vec![deny(rule("none", "anyone", &["publish"], &["#"]))]);
    let mut cache = DecisionCache::new();
    for _ in 0..2 {
        for topic in ["a", "b", "c", "d", "e", "f", "g"] {
            assert!(cache.decide(&open, &query(&sensor, Action::Publish, topic)).is_allowed());
            assert!(!cache.decide(&open, &query(&sensor, Action::Read, topic)).is_allowed());
        }
    }
    for topic in ["a", "b", "c"] {
        assert!(!cache.decide(&shut, &query(&sensor, Action::Publish, topic)).is_allowed());
    }
}

#[test]
fn what_depends_on_the_message_is_not_cached() {
    let mut small = rule("small", "anyone", &["publish"], &["#"]);
    small.when = Some("msg.size < 5".into());
    let policy = policy(vec![small]);
    let sensor = device("s1", "sensor", &[]);
    let mut cache = DecisionCache::new();
    let ask = query(&sensor, Action::Publish, "a");
    for (size, allowed) in [(1, true), (9, false), (1, true)] {
        assert_eq!(cache.decide(&policy, &Query { size, ..ask }).is_allowed(), allowed);
    }
}

prop_compose! {
    fn any_rule()(
        who in prop_oneof![Just("anyone"), Just("role:r1"), Just("role:r2"), Just("device:dev-1"), Just("attr:k=v")],
        more in prop::option::of(prop_oneof![Just("role:r1"), Just("attr:k=v")]),
        actions in prop::sample::subsequence(vec!["publish", "subscribe", "GET"], 1..=3),
        on in prop::collection::vec(pattern::tests::any_pattern(), 1..3),
        when in prop::option::weighted(0.3, prop_oneof![
            Just("msg.size < 100"), Just("device.attrs.nope == '1'"), Just("time.hour < 12"),
        ]),
        hours in prop::option::weighted(0.2, Just("06:00-18:00")),
        effect in prop_oneof![3 => Just(Effect::Allow), 1 => Just(Effect::Deny)],
    ) -> RuleConfig {
        let mut who: Vec<String> = vec![who.into()];
        who.extend(more.map(String::from));
        RuleConfig {
            who,
            actions: actions.into_iter().chain(["publish"]).map(String::from).collect(),
            on,
            when: when.map(String::from),
            hours: hours.map(String::from),
            effect,
            ..RuleConfig::default()
        }
    }
}

fn any_policy() -> impl Strategy<Value = Policy> {
    prop::collection::vec(any_rule(), 0..12).prop_map(|mut rules| {
        for (number, rule) in rules.iter_mut().enumerate() {
            rule.name = format!("rule {number}");
        }
        policy(rules)
    })
}

fn callers() -> [(Option<Device>, &'static str); 4] {
    [
        (Some(device("dev-1", "r1", &[])), "r1"),
        (Some(device("dev-1", "r2", &[("k", "v")])), "r2"),
        (Some(device("dev-2", "r3", &[("k", "w")])), "r3"),
        (None, "r1"),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_index_decides_as_the_plain_definition_does(
        policy in any_policy(),
        topics in prop::collection::vec(pattern::tests::any_topic(), 1..8),
        filters in prop::collection::vec(pattern::tests::any_filter(), 1..8),
        size in 0u64..200,
        minute_of_day in 0u16..1_440,
    ) {
        for (device, role) in callers() {
            let topics = topics.iter().map(|t| (Action::Publish, t.clone()));
            let paths = topics.clone().map(|(_, t)| (Action::Get, format!("/{t}")));
            let filters = filters.iter().map(|f| (Action::Subscribe, f.clone()));
            for (action, resource) in topics.chain(paths).chain(filters) {
                let query = Query {
                    device: device.as_ref(), role, action, resource: &resource, size, minute_of_day, protocol: Protocol::Mqtt,
                };
                let decision = policy.decide(&query);
                prop_assert_eq!((decision.effect, decision.rule), policy.decide_plainly(&query), "{:?}", query);
            }
        }
    }

    #[test]
    fn what_an_allowed_filter_delivers_is_allowed_and_not_denied(
        policy in any_policy(),
        filter in pattern::tests::any_filter(),
        topics in prop::collection::vec(pattern::tests::any_topic(), 1..60),
    ) {
        for (device, role) in callers() {
            let ask = Query {
                device: device.as_ref(), role, action: Action::Subscribe, resource: &filter, size: 0, minute_of_day: 600,
                protocol: Protocol::Mqtt,
            };
            if !policy.decide(&ask).is_allowed() {
                continue;
            }
            let id = device.as_ref().map(|d| d.id.as_str());
            let subscribe = ActionSet::one(Action::Subscribe);
            for topic in topics.iter().filter(|t| pattern::tests::filter_matches(&filter, t)) {
                let matches = |effect| policy.rules.iter().any(|rule| {
                    rule.effect == effect && rule.actions.meets(subscribe) && rule.when.is_none() && rule.hours.is_none()
                        && rule.who.iter().any(|p| p.is(device.as_ref(), role))
                        && rule.on.iter().any(|p| p.matches(topic, id, effect))
                });
                prop_assert!(!matches(Effect::Deny), "{filter} delivers denied {topic}");
                let granted = policy.rules.iter().any(|rule| {
                    rule.effect == Effect::Allow && rule.actions.meets(subscribe)
                        && rule.on.iter().any(|p| p.matches(topic, id, Effect::Allow))
                });
                prop_assert!(granted, "{filter} delivers {topic}, which no rule allows");
            }
        }
    }

    #[test]
    fn a_cached_answer_holds_for_every_size_and_time(
        policy in any_policy(), topic in pattern::tests::any_topic(), size: u64, minute_of_day in 0u16..1_440,
    ) {
        for (device, role) in callers() {
            let ask = Query {
                device: device.as_ref(), role, action: Action::Publish, resource: &topic, size: 1, minute_of_day: 0,
                protocol: Protocol::Mqtt,
            };
            let kept = policy.decide(&ask);
            if kept.cacheable {
                let later = policy.decide(&Query { size, minute_of_day, ..ask });
                prop_assert_eq!(kept, later);
            }
        }
    }
}

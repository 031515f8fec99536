use std::task::{Context, Waker};

use bytes::Bytes;

use super::*;
use crate::hub::{SubscribeOptions, View};
use crate::identity::{self, NewDevice, Registry};
use crate::policy::{RuleConfig, RuleSource};
use crate::spool::{self, Kind, SinkConfig};

mod durable;
mod start;

const RULES: &str = r##"[
    {"name": "own space", "who": ["role:sensor"], "do": ["publish", "subscribe", "read"], "on": ["dev/{device}/#"]},
    {"name": "operators", "who": ["role:operator"], "do": ["publish", "subscribe", "read", "command"], "on": ["dev/#", "plant/#", "$SYS/#"]},
    {"name": "not there", "effect": "deny", "who": ["anyone"], "do": ["publish"], "on": ["plant/forbidden"]},
    {"name": "small and slow", "who": ["role:slow"], "do": ["publish"], "on": ["#"], "rate": "1/m burst 2", "bytes_max": 4}
]"##;

struct Fixture {
    gateway: Arc<Gateway>,
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Fixture::with(|_| {}, &[])
    }

    /// A gateway on a folder of its own; `sinks` are (topic pattern, delivery class).
    fn with(adjust: impl FnOnce(&mut limit::Config), sinks: &[(&str, spool::Delivery)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        add_devices(folder.path());
        Fixture::start(folder, adjust, sinks)
    }

    /// A gateway on what this one has on disk now, as after `kill -9`. This one's spool goes on in its own folder.
    fn killed(&self, adjust: impl FnOnce(&mut limit::Config)) -> Self {
        Fixture::start(self.copy(), adjust, &[])
    }

    fn copy(&self) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in std::fs::read_dir(self.folder.path()).unwrap() {
            let file = file.unwrap();
            // The index of a log is made anew from the log.
            if file.file_name().to_string_lossy().ends_with("-shm") {
                continue;
            }
            std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
        }
        folder
    }

    fn start(
        folder: tempfile::TempDir,
        adjust: impl FnOnce(&mut limit::Config),
        sinks: &[(&str, spool::Delivery)],
    ) -> Self {
        let identity = Arc::new(Identity::open(folder.path(), &identity::Config::default()).unwrap());
        let configs = sinks.iter().map(|(pattern, delivery)| SinkConfig {
            name: (*pattern).into(),
            delivery: *delivery,
            queue: spool::QueueConfig::default(),
        });
        let spool = Spool::open(folder.path(), spool::Config::default(), configs.collect()).unwrap();
        let forwards = sinks
            .iter()
            .map(|(pattern, _)| ForwardTopics { patterns: vec![(*pattern).into()], sink: spool.sink(pattern).unwrap() })
            .collect();
        let gateway = Gateway::new(Config::default(), identity, spool, forwards, rules(adjust), Instant::now());
        gateway.restore(Instant::now()).unwrap();
        Fixture { gateway: Arc::new(gateway), folder }
    }

    async fn client(&self, id: &str) -> Client {
        self.open(id, Protocol::Mqtt, true).await.client
    }

    async fn open(&self, id: &str, protocol: Protocol, clean: bool) -> Opened {
        let device = self.gateway.identity.device(&DeviceId::parse(id).unwrap());
        let open =
            Open { device, protocol, peer: ([127, 0, 0, 1], 9).into(), client: "client", clean, mailbox: Mailbox::Own };
        self.gateway.open(open, Instant::now()).await.unwrap()
    }

    fn publish(&self, client: &mut Client, topic: &str, draft: Draft) -> Result<Published, Reject> {
        self.gateway.publish(client, Address::from_mqtt(topic), draft, None, Instant::now())
    }

    fn subscribe(&self, client: &mut Client, filter: &str) -> Result<Subscribed, Reject> {
        let options = SubscribeOptions { qos: Qos::ExactlyOnce, ..SubscribeOptions::default() };
        self.gateway.subscribe(client, filter, 0, options, SendRetained::Always, Instant::now())
    }

    /// Publishes and waits until it is stored.
    fn publish_stored(&self, client: &mut Client, topic: &str, draft: Draft) -> Receipt {
        let (sender, answers) = std::sync::mpsc::channel();
        let completion: Arc<dyn Completion> = Arc::new(Answer(Mutex::new(sender)));
        let address = Address::from_mqtt(topic);
        match self.gateway.publish(client, address, draft, Some((&completion, 0)), Instant::now()).unwrap() {
            Published::Done(receipt) => receipt,
            Published::Pending => answers.recv_timeout(Duration::from_secs(20)).unwrap().unwrap(),
        }
    }
}

fn add_devices(folder: &std::path::Path) {
    // Makes the registry.
    drop(Identity::open(folder, &identity::Config::default()).unwrap());
    let mut registry = Registry::open(folder).unwrap();
    let roles = [("a", "sensor"), ("b", "sensor"), ("op", "operator"), ("s", "slow")];
    let devices: Vec<NewDevice> = roles
        .iter()
        .map(|(id, role)| NewDevice {
            id: DeviceId::parse(id).unwrap(),
            role: (*role).into(),
            attributes: vec![],
            keys: vec![],
        })
        .collect();
    registry.add(&devices, 0, |_| {}).unwrap();
}

fn rules(adjust: impl FnOnce(&mut limit::Config)) -> Rules {
    let parsed: Vec<RuleConfig> = serde_json::from_str(RULES).unwrap();
    let sources = parsed.into_iter().zip(1..).map(|(rule, line)| RuleSource { rule, file: "policy.toml".into(), line });
    let mut limits = limit::Config::default();
    adjust(&mut limits);
    let policy = Policy::compile(sources.collect()).unwrap();
    Rules {
        policy,
        address_filter: AddressFilter::default(),
        limits,
        routes: Routes::default(),
        anonymous_role: "".into(),
    }
}

fn draft(payload: &'static str, qos: Qos) -> Draft {
    Draft { payload: Bytes::from_static(payload.as_bytes()), qos, retain: false, properties: None }
}

fn retained(payload: &'static str) -> Draft {
    Draft { retain: true, ..draft(payload, Qos::AtLeastOnce) }
}

fn drain(client: &Client) -> Drained {
    let mut drained = Drained::default();
    let _ = client.outbox.poll_drain(&mut Context::from_waker(Waker::noop()), &mut drained, 10_000);
    drained
}

fn topics(client: &Client) -> Vec<String> {
    drain(client).deliveries.iter().map(|d| [d.topic_parts().0, d.topic_parts().1].concat()).collect()
}

#[derive(Default)]
struct Log(Mutex<Vec<(u64, Result<Receipt, Reject>)>>);

impl Completion for Log {
    fn complete(&self, token: u64, outcome: Result<Receipt, Reject>) {
        self.0.lock().push((token, outcome));
    }
}

struct Answer(Mutex<std::sync::mpsc::Sender<Result<Receipt, Reject>>>);

impl Completion for Answer {
    fn complete(&self, _: u64, outcome: Result<Receipt, Reject>) {
        let _ = self.0.lock().send(outcome);
    }
}

use parking_lot::Mutex;

#[tokio::test]
async fn a_message_reaches_subscribers_whatever_protocol_it_came_by() {
    let fixture = Fixture::new();
    let mut operator = fixture.client("op").await;
    fixture.subscribe(&mut operator, "dev/+/telemetry/#").unwrap();
    let mut sensor = fixture.open("a", Protocol::Coap, true).await.client;
    let published = fixture.publish(&mut sensor, "t/temp", draft("21", Qos::AtLeastOnce)).unwrap();
    assert!(matches!(published, Published::Done(Receipt { receivers: 1, .. })));
    let drained = drain(&operator);
    let delivery = drained.deliveries.front().unwrap();
    assert_eq!(delivery.message.topic.as_str(), "dev/a/telemetry/temp");
    assert_eq!(delivery.message.origin.protocol, Protocol::Coap);
    assert_eq!(&delivery.message.payload[..], b"21");
}

#[tokio::test]
async fn only_what_a_rule_allows_is_done() {
    let fixture = Fixture::new();
    let mut a = fixture.client("a").await;
    let nothing_matched = Err(Reject::Forbidden { rule: None });
    assert_eq!(fixture.publish(&mut a, "dev/b/telemetry", draft("x", Qos::AtMostOnce)), nothing_matched);
    assert_eq!(fixture.publish(&mut a, "dev/a/presence", draft("x", Qos::AtMostOnce)), nothing_matched);
    assert!(fixture.subscribe(&mut a, "dev/+/telemetry").is_err());
    assert!(fixture.subscribe(&mut a, "#").is_err());
    let mut operator = fixture.client("op").await;
    let denied = fixture.publish(&mut operator, "plant/forbidden", draft("x", Qos::AtMostOnce));
    assert_eq!(denied, Err(Reject::Forbidden { rule: Some("not there".into()) }));
    assert_eq!(fixture.publish(&mut operator, "$SYS/x", draft("x", Qos::AtMostOnce)), nothing_matched);
    // A refusal is not cached as a permission.
    assert_eq!(fixture.publish(&mut a, "dev/b/telemetry", draft("x", Qos::AtMostOnce)), nothing_matched);
}

#[tokio::test]
async fn a_command_needs_the_right_to_command() {
    let fixture = Fixture::new();
    let mut device = fixture.client("a").await;
    fixture.subscribe(&mut device, "c/#").unwrap();
    assert!(fixture.publish(&mut device, "dev/a/cmd/1/reboot", draft("", Qos::AtLeastOnce)).is_err());
    let mut operator = fixture.client("op").await;
    fixture.publish(&mut operator, "dev/a/cmd/1/reboot", draft("now", Qos::AtLeastOnce)).unwrap();
    assert_eq!(topics(&device), ["c/1/reboot"]);
    assert!(fixture.publish(&mut device, "c/res/1/200", draft("ok", Qos::AtLeastOnce)).is_ok());
}

#[tokio::test]
async fn rates_and_sizes_of_rules_and_devices_hold() {
    let fixture = Fixture::with(|limits| limits.rate_per_device = crate::units::Rate::per_second(1, 3), &[]);
    let mut slow = fixture.client("s").await;
    let too_large = fixture.publish(&mut slow, "x", draft("12345", Qos::AtMostOnce));
    assert_eq!(too_large, Err(Reject::TooLarge { limit: "bytes_max", bytes_max: 4 }));
    assert!(fixture.publish(&mut slow, "x", draft("1", Qos::AtMostOnce)).is_ok());
    assert!(fixture.publish(&mut slow, "y", draft("1", Qos::AtMostOnce)).is_ok());
    // The device's burst of 3 is used up now; the rule's of 2 as well, but the device is asked first.
    let refused = fixture.publish(&mut slow, "x", draft("1", Qos::AtMostOnce));
    assert!(matches!(refused, Err(Reject::TooFast { limit: "rate_per_device", .. })), "{refused:?}");

    let fixture = Fixture::new();
    let mut slow = fixture.client("s").await;
    for _ in 0..2 {
        assert!(fixture.publish(&mut slow, "x", draft("1", Qos::AtMostOnce)).is_ok());
    }
    let refused = fixture.publish(&mut slow, "x", draft("1", Qos::AtMostOnce));
    assert!(matches!(refused, Err(Reject::TooFast { limit: "rate", .. })), "{refused:?}");
}

#[tokio::test]
async fn two_protocols_of_one_device_share_its_rate() {
    let fixture = Fixture::with(|limits| limits.rate_per_device = crate::units::Rate::per_second(1, 2), &[]);
    let mut mqtt = fixture.open("a", Protocol::Mqtt, true).await.client;
    let mut http = fixture.open("a", Protocol::Http, true).await.client;
    assert!(fixture.publish(&mut mqtt, "t", draft("1", Qos::AtMostOnce)).is_ok());
    assert!(fixture.publish(&mut http, "t", draft("1", Qos::AtMostOnce)).is_ok());
    assert!(fixture.publish(&mut mqtt, "t", draft("1", Qos::AtMostOnce)).is_err());
}

#[tokio::test]
async fn revocation_ends_what_the_device_may_do_at_once() {
    let fixture = Fixture::new();
    let mut a = fixture.client("a").await;
    assert!(fixture.publish(&mut a, "t", draft("1", Qos::AtMostOnce)).is_ok());
    let mut registry = Registry::open(fixture.folder.path()).unwrap();
    registry.set_enabled(&DeviceId::parse("a").unwrap(), false).unwrap();
    fixture.gateway.identity.refresh().unwrap();
    assert_eq!(fixture.publish(&mut a, "t", draft("1", Qos::AtMostOnce)), Err(Reject::Unauthenticated));
    fixture.gateway.tick(Instant::now());
    assert_eq!(drain(&a).close, Some(CloseReason::NotAuthorized));
}

#[tokio::test]
async fn the_last_value_is_there_to_read_retained_or_not() {
    let fixture = Fixture::new();
    let mut a = fixture.client("a").await;
    let now = Instant::now();
    let address = Address::Device(Part::State, None);
    assert_eq!(fixture.gateway.read(&mut a, address, now).unwrap_err(), Reject::NotFound);
    fixture.publish(&mut a, "s", retained("on")).unwrap();
    assert_eq!(&fixture.gateway.read(&mut a, address, now).unwrap().payload[..], b"on");
    fixture.publish(&mut a, "t", draft("1", Qos::AtMostOnce)).unwrap();
    fixture.publish(&mut a, "t", draft("2", Qos::AtMostOnce)).unwrap();
    let telemetry = Address::Topic("dev/a/telemetry");
    assert_eq!(&fixture.gateway.read(&mut a, telemetry, now).unwrap().payload[..], b"2");
    let mut b = fixture.client("b").await;
    assert!(matches!(fixture.gateway.read(&mut b, telemetry, now), Err(Reject::Forbidden { .. })));
    fixture.publish(&mut a, "s", retained("")).unwrap();
    assert_eq!(fixture.gateway.read(&mut a, address, now).unwrap_err(), Reject::NotFound);
}

#[tokio::test]
async fn a_new_subscription_is_sent_what_is_retained() {
    let fixture = Fixture::new();
    let mut a = fixture.client("a").await;
    fixture.publish(&mut a, "s", retained("on")).unwrap();
    let subscribed = fixture.subscribe(&mut a, "s").unwrap();
    let delivery = subscribed.retained.first().unwrap();
    assert!(delivery.retain && matches!(delivery.terms.view, View::Short { prefix: "s", .. }));
    assert_eq!(delivery.topic_parts(), ("s", ""));
    let options = SubscribeOptions::default();
    let again = fixture.gateway.subscribe(&mut a, "s", 0, options, SendRetained::IfNew, Instant::now()).unwrap();
    assert!(again.retained.is_empty());
}

#[tokio::test]
async fn a_disk_class_message_is_acknowledged_by_its_commit() {
    let fixture = Fixture::with(|_| {}, &[("dev/+/telemetry/#", spool::Delivery::Disk)]);
    let mut a = fixture.client("a").await;
    let log = Arc::new(Log::default());
    let completion: Arc<dyn Completion> = log.clone();
    let sent = draft("1", Qos::AtLeastOnce);
    let address = Address::from_mqtt("t");
    let published = fixture.gateway.publish(&mut a, address, sent, Some((&completion, 5)), Instant::now());
    assert_eq!(published, Ok(Published::Pending));
    fixture.gateway.spool.close();
    assert!(matches!(log.0.lock().as_slice(), [(5, Ok(Receipt { receivers: 1, .. }))]));
    let refused = fixture.gateway.publish(&mut a, address, draft("2", Qos::AtLeastOnce), None, Instant::now());
    assert_eq!(refused, Err(Reject::ShuttingDown));
}

#[tokio::test]
async fn a_slow_subscriber_withholds_its_publishers_acknowledgement() {
    for durable in [false, true] {
        let sinks: &[_] = if durable { &[("dev/+/telemetry", spool::Delivery::Disk)] } else { &[] };
        let fixture = Fixture::with(|limits| limits.outbox_messages_max = 2, sinks);
        let mut operator = fixture.client("op").await;
        fixture.subscribe(&mut operator, "dev/a/telemetry").unwrap();
        let mut a = fixture.client("a").await;
        let log = Arc::new(Log::default());
        let completion: Arc<dyn Completion> = log.clone();
        for token in 0..4 {
            let sent = draft("1", Qos::AtLeastOnce);
            let address = Address::from_mqtt("t");
            fixture.gateway.publish(&mut a, address, sent, Some((&completion, token)), Instant::now()).unwrap();
        }
        if durable {
            fixture.gateway.spool.close();
        }
        let early: Vec<u64> = log.0.lock().iter().map(|(token, _)| *token).collect();
        assert!(!early.contains(&2) && !early.contains(&3), "{early:?}");
        assert_eq!(drain(&operator).deliveries.len(), 4);
        let mut all: Vec<u64> = log.0.lock().iter().map(|(token, _)| *token).collect();
        all.sort_unstable();
        assert_eq!(all, if durable { vec![0, 1, 2, 3] } else { vec![2, 3] });
    }
}

#[tokio::test]
async fn a_kept_session_finds_its_subscriptions_and_messages_again() {
    let fixture = Fixture::new();
    let mut b = fixture.client("b").await;
    fixture.subscribe(&mut b, "c/#").unwrap();
    fixture.gateway.close(b, Some(Keep { state: Box::new(7_u32), expiry: None }), Instant::now());
    let mut operator = fixture.client("op").await;
    fixture.publish(&mut operator, "dev/b/cmd/1/x", draft("1", Qos::AtLeastOnce)).unwrap();
    let opened = fixture.open("b", Protocol::Mqtt, false).await;
    assert_eq!(opened.resumed.and_then(|state| state.downcast::<u32>().ok()).as_deref(), Some(&7));
    assert_eq!(topics(&opened.client), ["c/1/x"]);

    let keep = Keep { state: Box::new(8_u32), expiry: Some(Duration::ZERO) };
    fixture.gateway.close(opened.client, Some(keep), Instant::now());
    fixture.gateway.tick(Instant::now());
    assert_eq!(fixture.gateway.hub.subscriptions(), 0);
    assert!(fixture.open("b", Protocol::Mqtt, false).await.resumed.is_none());
}

#[tokio::test]
async fn presence_follows_the_first_and_the_last_session() {
    let fixture = Fixture::new();
    let mut operator = fixture.client("op").await;
    fixture.subscribe(&mut operator, "dev/+/presence").unwrap();
    drain(&operator);
    let one = fixture.open("a", Protocol::Mqtt, true).await.client;
    let two = fixture.open("a", Protocol::Http, true).await.client;
    fixture.gateway.close(one, None, Instant::now());
    fixture.gateway.close(two, None, Instant::now());
    let said: Vec<bool> = drain(&operator)
        .deliveries
        .iter()
        .map(|d| serde_json::from_slice::<serde_json::Value>(&d.message.payload).unwrap()["online"] == true)
        .collect();
    assert_eq!(said, [true, false]);
}

#[tokio::test]
async fn a_new_policy_holds_for_the_next_message() {
    let fixture = Fixture::new();
    let mut a = fixture.client("a").await;
    assert!(fixture.publish(&mut a, "t", draft("1", Qos::AtMostOnce)).is_ok());
    fixture.gateway.replace_rules(Rules { policy: Policy::deny_all(), ..rules(|_| {}) });
    let refused = fixture.publish(&mut a, "t", draft("1", Qos::AtMostOnce));
    assert_eq!(refused, Err(Reject::Forbidden { rule: None }));
}

#[tokio::test]
async fn a_draining_gateway_takes_nothing_new() {
    let fixture = Fixture::new();
    let mut a = fixture.client("a").await;
    fixture.gateway.drain();
    assert_eq!(drain(&a).close, Some(CloseReason::ShuttingDown));
    assert_eq!(fixture.publish(&mut a, "t", draft("1", Qos::AtMostOnce)), Err(Reject::ShuttingDown));
}

#[tokio::test]
async fn subscriptions_of_one_session_are_bounded() {
    let fixture = Fixture::with(|limits| limits.subscriptions_per_session_max = 2, &[]);
    let mut operator = fixture.client("op").await;
    for filter in ["dev/a/#", "dev/b/#", "dev/a/#"] {
        assert!(fixture.subscribe(&mut operator, filter).is_ok(), "{filter}");
    }
    assert!(matches!(fixture.subscribe(&mut operator, "dev/c/#"), Err(Reject::Full { .. })));
    assert!(fixture.gateway.unsubscribe(&mut operator, "dev/a/#", 0));
    assert!(fixture.subscribe(&mut operator, "dev/c/#").is_ok());
}

#[tokio::test]
async fn an_address_over_its_rate_or_outside_the_filter_is_turned_away() {
    let fixture = Fixture::with(|limits| limits.rate_per_address = crate::units::Rate::per_second(1, 2), &[]);
    let now = Instant::now();
    let (one, two) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
    assert!(fixture.gateway.admit_address(one, now).is_ok());
    assert!(fixture.gateway.admit_address(one, now).is_ok());
    assert!(matches!(fixture.gateway.admit_address(one, now), Err(Reject::TooFast { .. })));
    assert!(fixture.gateway.admit_address(two, now).is_ok());
    let address_filter = AddressFilter { allow: vec![], deny: vec!["192.0.2.0/24".parse().unwrap()] };
    fixture.gateway.replace_rules(Rules { address_filter, ..rules(|_| {}) });
    assert_eq!(fixture.gateway.admit_address(two, now), Err(Reject::Forbidden { rule: None }));
}

#[tokio::test]
async fn operators_see_how_the_gateway_is_doing_and_others_do_not() {
    let fixture = Fixture::new();
    let mut operator = fixture.client("op").await;
    let said = |deliveries: &[Delivery]| -> Vec<String> {
        let text =
            |d: &Delivery| format!("{}={}", d.message.topic.as_str(), String::from_utf8_lossy(&d.message.payload));
        deliveries.iter().map(text).collect()
    };
    let sent = fixture.subscribe(&mut operator, "$SYS/broker/clients/+").unwrap().retained;
    assert!(said(&sent).contains(&"$SYS/broker/clients/connected=1".to_owned()), "{:?}", said(&sent));
    // Again when it is time, to who is subscribed, and only what it asked for.
    fixture.gateway.tick(Instant::now());
    assert!(drain(&operator).deliveries.is_empty());
    let second = fixture.client("a").await;
    fixture.gateway.tick(Instant::now() + Duration::from_secs(11));
    let news = said(&Vec::from(drain(&operator).deliveries));
    assert!(news.contains(&"$SYS/broker/clients/connected=2".to_owned()), "{news:?}");
    assert!(news.iter().all(|line| line.starts_with("$SYS/broker/clients/")));
    fixture.gateway.close(second, None, Instant::now());
    let value =
        fixture.gateway.read(&mut operator, Address::from_mqtt("$SYS/broker/subscriptions/count"), Instant::now());
    assert_eq!(value.unwrap().payload, "1");
    let unknown = fixture.gateway.read(&mut operator, Address::from_mqtt("$SYS/broker/weather"), Instant::now());
    assert_eq!(unknown, Err(Reject::NotFound));
    let mut device = fixture.client("a").await;
    assert!(matches!(fixture.subscribe(&mut device, "$SYS/#"), Err(Reject::Forbidden { .. })));
    assert!(fixture.publish(&mut operator, "$SYS/broker/uptime", draft("x", Qos::AtMostOnce)).is_err());
}

//! Instructions of the way of one MQTT message, step by step: decode, admit, match, outbox, encode.
//!
//! Instructions do not depend on what else the machine does, so these figures may fail a build; time is measured by the other suites. The program
//! starts itself under valgrind's callgrind once a step, which counts what [`counted_by_callgrind`] calls and nothing else.
//! The crate gungraun does the like; its runner brings 240 crates, and its features would have the gateway built a second time.

use std::cell::Cell;
use std::hint::black_box;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Instant;

use bytes::BytesMut;
use serde_json::json;
use tidegate::gateway::{
    Address, Client, Config as GatewayConfig, Delivery, Draft, Drained, Gateway, Mailbox, Open, Routes, Rules,
    SendRetained, SubscribeOptions,
};
use tidegate::identity::{self, Identity, NewDevice, Registry};
use tidegate::limit;
use tidegate::message::{Action, Completion, DeviceId, Protocol, Qos};
use tidegate::policy::address::Config as AddressFilter;
use tidegate::policy::{Policy, Query, RuleSource};
use tidegate::spool::{self, Spool};
use tidegate::units::Rate;
use tidegate_mqtt::{self as mqtt, Accept, Connection, Event, Output};

use crate::folder::Folder;
use crate::mqtt::wire::{PublishTemplate, connect, puback};
use crate::report::{Fact, Ordering, Section};
use crate::{Failure, Result, policy};

/// Said to this program, with a number, to be the one that is counted.
pub const STEP: &str = "--message-path-step";

/// Messages of one step. Below the mark from which an outbox slows its publishers down.
const MESSAGES: u16 = 256;
const PAYLOAD_BYTES: usize = 64;
const FILTERS: usize = 10_000;
const PUBLISHER: &str = "bench-00000";
const VIEWERS: usize = 100;

/// What may go by at most, some 15 % above what was measured last (docs/benchmarks.md): a change that costs more is seen.
const STEPS_MAX: [(&str, f64); 13] = [
    ("decode, QoS 0", 1_120.0),
    ("admit and route, nobody subscribed", 3_230.0),
    ("the same, and into one outbox", 3_620.0),
    ("the same, and into 100 outboxes", 34_110.0),
    ("take from the outbox", 10.0),
    ("encode, QoS 0", 810.0),
    ("all of it, QoS 0, 1 -> 1", 5_530.0),
    ("decode, QoS 1", 1_240.0),
    ("admit, route, into one outbox, PUBACK", 4_010.0),
    ("take, encode, QoS 1", 530.0),
    ("PUBACK of the subscriber", 1_180.0),
    ("match a topic anew, 10,000 filters", 2_890.0),
    ("decide anew, 1,000 rules", 2_070.0),
];

pub fn run() -> Section {
    let mut section = Section::new("The way of one MQTT message, in instructions", "");
    match count() {
        Ok(counts) => {
            for ((what, most), value) in STEPS_MAX.into_iter().zip(counts) {
                section.facts.push(Fact {
                    what: what.into(),
                    server: "tidegate".into(),
                    value,
                    unit: "instructions",
                    bar: Some((Ordering::AtMost, most)),
                });
                if value > most {
                    section.fail(what, "tidegate", format!("{value:.0} instructions, {most:.0} at most"));
                }
            }
        }
        Err(error) => section.fail("message path", "tidegate", error.to_string()),
    }
    section
}

/// Instructions per message, by step.
fn count() -> Result<Vec<f64>> {
    (0..STEPS_MAX.len()).map(count_step).collect()
}

fn count_step(step: usize) -> Result<f64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no", "--toggle-collect=*counted_by_callgrind*"])
        .arg("--callgrind-out-file=/dev/null")
        .arg(std::env::current_exe()?)
        .args([STEP, &step.to_string()])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Failure::new(format!("valgrind: {error}; install it: apt-get install valgrind")))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let collected = said.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse::<f64>().ok());
    match collected {
        Some(instructions) if output.status.success() && instructions > 0.0 => Ok(instructions / f64::from(MESSAGES)),
        _ => Err(Failure::new(said)),
    }
}

/// What valgrind looks for by its name: counting begins and ends here.
#[inline(never)]
fn counted_by_callgrind(step: &mut dyn FnMut()) {
    step();
}

/// Goes through all steps, in the order of [`STEPS_MAX`], and counts the one that the argument names.
pub fn serve(arguments: &[String]) -> Result<()> {
    let counted = arguments.first().ok_or_else(|| Failure::new("which step?"))?.parse()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let bench = Bench::new(counted)?;
        bench.qos_0().await?;
        bench.qos_1().await?;
        bench.anew().await
    })
}

struct Bench {
    /// The step that is counted, and the one that is next.
    counted: usize,
    next: Cell<usize>,
    gateway: Gateway,
    _folder: Folder,
}

/// A device with its connection.
struct Peer {
    client: Client,
    engine: Connection<Delivery>,
}

impl Bench {
    fn new(counted: usize) -> Result<Bench> {
        let folder = Folder::new()?;
        drop(Identity::open(folder.path(), &identity::Config::default())?);
        let device = |(id, role): (String, &str)| {
            let id = DeviceId::parse(&id).map_err(|error| Failure::new(error.to_string()))?;
            Ok(NewDevice { id, role: role.into(), attributes: vec![("site".into(), "7".into())], keys: vec![] })
        };
        let viewers = (0..VIEWERS).map(|number| (format!("viewer-{number}"), "viewer"));
        let devices: Vec<_> = viewers.chain([(PUBLISHER.to_owned(), "sensor")]).map(device).collect::<Result<_>>()?;
        Registry::open(folder.path())?.add(&devices, 0, |_| {})?;
        let identity = Arc::new(Identity::open(folder.path(), &identity::Config::default())?);
        let spool = Spool::open(folder.path(), spool::Config::default(), Vec::new())?;

        let mut sources = policy::rules("1000000/s burst 1000000")?;
        let see =
            json!({ "name": "viewers see", "who": ["role:viewer"], "do": ["subscribe"], "on": ["dev/#", "plant/#"] });
        sources.push(RuleSource { rule: serde_json::from_value(see)?, file: "bench".into(), line: 9_999 });
        let limits =
            limit::Config { rate_per_device: Rate::per_second(1_000_000, 1_000_000), ..limit::Config::default() };
        let rules = Rules {
            policy: Policy::compile(sources).map_err(|problems| Failure::new(format!("{problems:?}")))?,
            address_filter: AddressFilter::default(),
            limits,
            routes: Routes::default(),
            anonymous_role: "".into(),
        };
        let gateway = Gateway::new(GatewayConfig::default(), identity, spool, Vec::new(), rules, Instant::now());
        Ok(Bench { counted, next: Cell::new(0), gateway, _folder: folder })
    }

    fn step(&self, step: &mut dyn FnMut()) {
        if self.next.replace(self.next.get() + 1) == self.counted { counted_by_callgrind(step) } else { step() }
    }

    async fn peer(&self, id: &str) -> Result<Peer> {
        let id = DeviceId::parse(id).map_err(|error| Failure::new(error.to_string()))?;
        let device = self.gateway.identity.device(&id);
        let peer = ([127, 0, 0, 1], 9).into();
        let open =
            Open { device, protocol: Protocol::Mqtt, peer, client: id.as_str(), clean: true, mailbox: Mailbox::Own };
        let client =
            self.gateway.open(open, Instant::now()).await.map_err(|reject| Failure::new(reject.to_string()))?.client;
        // A whole step is in flight at once.
        let config = mqtt::Config { receive_maximum: MESSAGES, in_flight_max: MESSAGES, ..mqtt::Config::default() };
        let mut engine = Connection::new(Arc::new(config), Instant::now());
        let mut out = BytesMut::new();
        engine.handle_input(Instant::now(), &mut BytesMut::from(&connect(id.as_str(), None)[..]), &mut out);
        let Output::Event(Event::Connect(_)) = engine.poll_output(Instant::now(), &mut out) else {
            return Err(Failure::new("no CONNECT"));
        };
        engine.accept(Accept::default(), &mut out);
        Ok(Peer { client, engine })
    }

    fn subscribe(&self, peer: &mut Peer, filter: &str, qos: Qos) -> Result<()> {
        let options = SubscribeOptions { qos, ..SubscribeOptions::default() };
        let subscribed =
            self.gateway.subscribe(&mut peer.client, filter, 0, options, SendRetained::Never, Instant::now());
        subscribed.map(|_| ()).map_err(|reject| Failure::new(reject.to_string()))
    }

    /// Publishes every event of one read, as the adapter does. How many were accepted.
    fn publish(&self, client: &mut Client, events: Vec<mqtt::PublishEvent>, qos: Qos) -> u16 {
        let completion: Arc<dyn Completion> = client.outbox.clone();
        let mut accepted = 0;
        for event in events {
            let draft = Draft { payload: event.payload_shared(), qos, retain: event.retain, properties: None };
            let done = event.handle.map(|handle| (&completion, handle.token()));
            let address = Address::from_mqtt(event.topic());
            accepted += u16::from(self.gateway.publish(client, address, draft, done, Instant::now()).is_ok());
        }
        accepted
    }

    async fn qos_0(&self) -> Result<()> {
        let mut publisher = self.peer(PUBLISHER).await?;
        let read = flood(0);
        // Once for what a connection does once.
        let events = decode(&mut publisher.engine, read.clone());
        self.publish(&mut publisher.client, events, Qos::AtMostOnce);

        let mut events = Vec::with_capacity(MESSAGES.into());
        self.step(&mut || events = decode(&mut publisher.engine, black_box(read.clone())));
        expect(events.len(), "decoded")?;
        let mut accepted = 0;
        self.step(&mut || accepted = self.publish(&mut publisher.client, std::mem::take(&mut events), Qos::AtMostOnce));
        expect(accepted.into(), "accepted")?;

        let mut viewer = self.peer("viewer-0").await?;
        self.subscribe(&mut viewer, &format!("dev/{PUBLISHER}/#"), Qos::AtMostOnce)?;
        let mut drained = Drained::default();
        self.pass(&mut publisher, &read)?;
        take(&mut viewer, &mut drained);
        write(&mut viewer, &mut drained, mqtt::Qos::AtMostOnce);
        let mut events = decode(&mut publisher.engine, read.clone());
        self.step(&mut || accepted = self.publish(&mut publisher.client, std::mem::take(&mut events), Qos::AtMostOnce));
        expect(accepted.into(), "accepted for one")?;

        let mut others = Vec::new();
        for number in 1..VIEWERS {
            let mut other = self.peer(&format!("viewer-{number}")).await?;
            self.subscribe(&mut other, &format!("dev/{PUBLISHER}/#"), Qos::AtMostOnce)?;
            others.push(other);
        }
        take(&mut viewer, &mut drained);
        drained.deliveries.clear();
        self.pass(&mut publisher, &read)?;
        for viewer in others.iter_mut().chain([&mut viewer]) {
            take(viewer, &mut Drained::default());
        }
        let mut events = decode(&mut publisher.engine, read.clone());
        self.step(&mut || accepted = self.publish(&mut publisher.client, std::mem::take(&mut events), Qos::AtMostOnce));
        expect(accepted.into(), "accepted for a hundred")?;
        for other in others {
            self.gateway.close(other.client, None, Instant::now());
        }

        self.step(&mut || take(&mut viewer, &mut drained));
        expect(drained.deliveries.len(), "taken")?;
        let mut sent = 0;
        self.step(&mut || sent = write(&mut viewer, &mut drained, mqtt::Qos::AtMostOnce));
        expect(sent, "encoded")?;

        self.pass(&mut publisher, &read)?;
        take(&mut viewer, &mut drained);
        write(&mut viewer, &mut drained, mqtt::Qos::AtMostOnce);
        self.step(&mut || {
            let events = decode(&mut publisher.engine, black_box(read.clone()));
            accepted = self.publish(&mut publisher.client, events, Qos::AtMostOnce);
            take(&mut viewer, &mut drained);
            sent = write(&mut viewer, &mut drained, mqtt::Qos::AtMostOnce);
        });
        expect(sent, "passed on")?;
        for peer in [viewer, publisher] {
            self.gateway.close(peer.client, None, Instant::now());
        }
        Ok(())
    }

    /// What is not counted, so that the counted round finds everything at hand.
    fn pass(&self, publisher: &mut Peer, read: &BytesMut) -> Result<()> {
        let events = decode(&mut publisher.engine, read.clone());
        expect(self.publish(&mut publisher.client, events, Qos::AtMostOnce).into(), "published")
    }

    async fn qos_1(&self) -> Result<()> {
        let (mut publisher, mut viewer) = (self.peer(PUBLISHER).await?, self.peer("viewer-0").await?);
        self.subscribe(&mut viewer, &format!("dev/{PUBLISHER}/#"), Qos::AtLeastOnce)?;
        let (read, mut drained) = (flood(1), Drained::default());
        for counted in [false, true] {
            let step = |step: &mut dyn FnMut()| if counted { self.step(step) } else { step() };
            let mut events = Vec::with_capacity(MESSAGES.into());
            step(&mut || events = decode(&mut publisher.engine, black_box(read.clone())));
            expect(events.len(), "decoded")?;
            let mut out = BytesMut::with_capacity(1 << 16);
            step(&mut || {
                let handles: Vec<_> = events.iter().filter_map(|event| event.handle).collect();
                self.publish(&mut publisher.client, std::mem::take(&mut events), Qos::AtLeastOnce);
                for handle in handles {
                    publisher.engine.ack(handle, mqtt::Reason::Success, None, &mut out);
                }
            });
            expect(out.len() / 4, "acknowledged")?;
            let mut sent = 0;
            step(&mut || {
                take(&mut viewer, &mut drained);
                sent = write(&mut viewer, &mut drained, mqtt::Qos::AtLeastOnce);
            });
            expect(sent, "encoded")?;
            let mut acknowledged = 0;
            // The second round's identifiers go on where the first one's ended.
            let first = if counted { MESSAGES + 1 } else { 1 };
            let mut acks = BytesMut::new();
            for id in first..first + MESSAGES {
                acks.extend_from_slice(&puback(id));
            }
            step(&mut || acknowledged = receive_acks(&mut viewer.engine, std::mem::take(&mut acks)));
            expect(acknowledged, "PUBACKs understood")?;
        }
        Ok(())
    }

    /// What is done once for a topic, and again when the subscriptions or the policy have changed.
    async fn anew(&self) -> Result<()> {
        let viewer = self.peer("viewer-1").await?;
        let sensor = DeviceId::parse(PUBLISHER).ok().and_then(|id| self.gateway.identity.device(&id));
        for number in 0..FILTERS {
            let text = match number % 3 {
                0 => format!("plant/{number}/#"),
                1 => format!("dev/machine-{number}/telemetry/+"),
                _ => format!("dev/+/event/{number}"),
            };
            let filter = tidegate::gateway::Filter::parse(&text).map_err(|_| Failure::new("not a filter"))?;
            let target = SubscribeOptions::default();
            self.gateway
                .hub
                .subscribe(&filter, &viewer.client.outbox, number as u64, target)
                .map_err(|reject| Failure::new(reject.to_string()))?;
        }
        let topic = format!("dev/{PUBLISHER}/telemetry/climate");
        let mut found = 0;
        self.step(&mut || {
            for _ in 0..MESSAGES {
                found += self.gateway.hub.matches(black_box(&topic)).1.targets.len();
            }
        });
        let mut allowed = 0;
        self.step(&mut || {
            self.gateway.with_rules(|rules| {
                for _ in 0..MESSAGES {
                    let query = Query {
                        device: sensor.as_deref(),
                        role: "sensor",
                        action: Action::Publish,
                        resource: black_box(&topic),
                        size: 64,
                        minute_of_day: 600,
                        protocol: Protocol::Mqtt,
                    };
                    allowed += usize::from(rules.policy.decide(&query).is_allowed());
                }
            });
        });
        expect(allowed, "allowed")?;
        black_box(found);
        Ok(())
    }
}

/// One read of [`MESSAGES`] packets.
fn flood(qos: u8) -> BytesMut {
    let template = PublishTemplate::new(&format!("dev/{PUBLISHER}/telemetry/climate"), qos, PAYLOAD_BYTES);
    let mut bytes = Vec::new();
    for id in 1..=MESSAGES {
        template.append(&mut bytes, id, b"21.5");
    }
    BytesMut::from(&bytes[..])
}

fn decode(engine: &mut Connection<Delivery>, mut read: BytesMut) -> Vec<mqtt::PublishEvent> {
    let mut events = Vec::with_capacity(MESSAGES.into());
    let mut out = BytesMut::new();
    let now = Instant::now();
    while engine.handle_input(now, &mut read, &mut out) {
        while let Output::Event(event) = engine.poll_output(now, &mut out) {
            if let Event::Publish(event) = event {
                events.push(event);
            }
        }
    }
    events
}

fn receive_acks(engine: &mut Connection<Delivery>, mut read: BytesMut) -> usize {
    let mut delivered = 0;
    let mut out = BytesMut::new();
    let now = Instant::now();
    while engine.handle_input(now, &mut read, &mut out) {
        while let Output::Event(event) = engine.poll_output(now, &mut out) {
            delivered += usize::from(matches!(event, Event::Delivered { .. }));
        }
    }
    delivered
}

/// Takes what waits for a subscriber.
fn take(peer: &mut Peer, drained: &mut Drained) {
    let mut cx = Context::from_waker(Waker::noop());
    let _ = peer.client.outbox.poll_drain(&mut cx, drained, MESSAGES.into());
}

fn write(peer: &mut Peer, drained: &mut Drained, qos: mqtt::Qos) -> usize {
    let mut out = BytesMut::with_capacity(1 << 16);
    let now = Instant::now();
    let mut sent = 0;
    while let Some(delivery) = drained.deliveries.pop_front() {
        sent += usize::from(matches!(
            peer.engine.publish(now, &delivery, qos, delivery.retain, &mut out),
            mqtt::Published::Sent
        ));
    }
    black_box(out.len());
    sent
}

fn expect(count: usize, what: &str) -> Result<()> {
    if count == usize::from(MESSAGES) {
        Ok(())
    } else {
        Err(Failure::new(format!("{count} messages {what}, {MESSAGES} should be")))
    }
}

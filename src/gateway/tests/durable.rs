//! What survives `kill -9`: each test goes on with a copy of what was on disk at that moment.

use super::*;

fn value(fixture: &Fixture, topic: &str) -> Option<String> {
    let message = fixture.gateway.hub.last_value(topic, wall_ms())?;
    Some(String::from_utf8(message.payload.to_vec()).unwrap())
}

fn expiring(payload: &'static str, secs: u32) -> Draft {
    let properties = crate::message::Properties { expiry_secs: Some(secs), ..Default::default() };
    Draft { properties: Some(Box::new(properties)), ..retained(payload) }
}

#[tokio::test]
async fn an_acknowledged_retained_value_survives_a_kill() {
    let fixture = Fixture::new();
    let mut a = fixture.client("a").await;
    fixture.publish_stored(&mut a, "s", retained("on"));
    fixture.publish_stored(&mut a, "dev/a/x", expiring("soon over", 1000));
    let killed = fixture.killed(|_| {});
    assert_eq!(value(&killed, "dev/a/state").as_deref(), Some("on"));
    assert_eq!(value(&killed, "dev/a/x").as_deref(), Some("soon over"));
    let mut a = killed.client("a").await;
    let sent = killed.subscribe(&mut a, "s").unwrap().retained;
    assert_eq!(sent.iter().map(|d| d.message.payload.clone()).collect::<Vec<_>>(), ["on"]);
    // Removed is removed for good.
    killed.publish_stored(&mut a, "s", retained(""));
    assert_eq!(value(&killed.killed(|_| {}), "dev/a/state"), None);
}

#[tokio::test]
async fn a_retained_publish_waits_for_the_disk_and_an_ordinary_one_does_not() {
    let fixture = Fixture::new();
    let mut a = fixture.client("a").await;
    let log = Arc::new(Log::default());
    let completion: Arc<dyn Completion> = log.clone();
    let mut publish = |draft| {
        let address = Address::from_mqtt("s");
        fixture.gateway.publish(&mut a, address, draft, Some((&completion, 3)), Instant::now()).unwrap()
    };
    assert!(matches!(publish(draft("1", Qos::AtLeastOnce)), Published::Done(_)));
    assert_eq!(publish(retained("2")), Published::Pending);
    fixture.gateway.spool.close();
    assert!(matches!(log.0.lock().as_slice(), [(3, Ok(Receipt { receivers: 0, .. }))]));
}

#[tokio::test]
async fn a_value_retained_at_qos_0_is_there_after_an_orderly_end() {
    let fixture = Fixture::new();
    let mut a = fixture.client("a").await;
    for payload in ["1", "2", "3"] {
        fixture.publish(&mut a, "s", Draft { retain: true, ..draft(payload, Qos::AtMostOnce) }).unwrap();
    }
    fixture.gateway.spool.close();
    assert_eq!(value(&fixture.killed(|_| {}), "dev/a/state").as_deref(), Some("3"));
}

#[tokio::test]
async fn retained_values_that_expired_or_do_not_fit_are_not_loaded() {
    let fixture = Fixture::with(|limits| limits.retained_messages_max = 3, &[]);
    let mut a = fixture.client("a").await;
    fixture.publish_stored(&mut a, "dev/a/x", expiring("over at once", 0));
    for topic in ["dev/a/1", "dev/a/2"] {
        fixture.publish_stored(&mut a, topic, retained("kept"));
    }
    // Presence is the third.
    let killed = fixture.killed(|limits| limits.retained_messages_max = 2);
    assert_eq!(killed.gateway.hub.retained_counts().0, 2);
    assert_eq!(value(&killed, "dev/a/x"), None);
    // Above the bound it was left on disk.
    killed.gateway.spool.close();
    assert_eq!(killed.killed(|_| {}).gateway.hub.retained_counts().0, 3);
}

#[tokio::test]
async fn nobody_is_present_after_a_kill() {
    let fixture = Fixture::new();
    let mut a = fixture.client("a").await;
    assert!(value(&fixture, "dev/a/presence").unwrap().contains("\"online\":true"));
    // Rows are written in order, so presence is on disk with this.
    fixture.publish_stored(&mut a, "s", retained("on"));
    let killed = fixture.killed(|_| {});
    assert!(value(&killed, "dev/a/presence").unwrap().contains("\"online\":false"));
}

async fn open_persistent(fixture: &Fixture, id: &str, clean: bool, expiry_secs: u32) -> Opened {
    let device = fixture.gateway.identity.device(&DeviceId::parse(id).unwrap());
    let peer = ([127, 0, 0, 1], 9).into();
    let open = Open { device, protocol: Protocol::Mqtt, peer, client: "client", clean, mailbox: Mailbox::Own };
    fixture.gateway.open_persistent(open, expiry_secs, Instant::now()).await.unwrap()
}

/// Waits until everything that was set is on disk.
async fn settle(fixture: &Fixture) {
    let mut client = fixture.open("op", Protocol::Http, true).await.client;
    fixture.publish_stored(&mut client, "plant/settled", retained("x"));
}

pub(super) fn keep(secs: u64) -> Option<Keep> {
    Some(Keep { state: Box::new(InFlight::default()), expiry: Some(Duration::from_secs(secs)) })
}

#[tokio::test]
async fn a_persistent_session_and_its_subscriptions_survive_a_kill() {
    for parked in [false, true] {
        let fixture = Fixture::new();
        let mut a = open_persistent(&fixture, "a", true, 600).await.client;
        fixture.subscribe(&mut a, "c/#").unwrap();
        fixture.subscribe(&mut a, "$share/group/dev/a/shared").unwrap();
        fixture.subscribe(&mut a, "dev/a/not-any-more").unwrap();
        assert!(fixture.gateway.unsubscribe(&mut a, "dev/a/not-any-more", 0));
        if parked {
            fixture.gateway.close(a, keep(600), Instant::now());
        }
        settle(&fixture).await;

        let killed = fixture.killed(|_| {});
        assert_eq!(killed.gateway.hub.subscriptions(), 2);
        let mut operator = killed.client("op").await;
        killed.publish(&mut operator, "dev/a/cmd/1/x", draft("1", Qos::AtLeastOnce)).unwrap();
        killed.publish(&mut operator, "dev/a/shared", draft("1", Qos::AtLeastOnce)).unwrap();
        killed.publish(&mut operator, "dev/a/not-any-more", draft("1", Qos::AtLeastOnce)).unwrap();
        let opened = open_persistent(&killed, "a", false, 600).await;
        assert!(opened.resumed.is_some_and(|state| state.is::<InFlight>()));
        let deliveries = taken(&killed, &opened.client, 2, 0).await;
        let topics: Vec<String> = deliveries.iter().map(|d| [d.topic_parts().0, d.topic_parts().1].concat()).collect();
        assert_eq!(topics, ["c/1/x", "dev/a/shared"]);
        // What it had is what it can end.
        let mut a = opened.client;
        assert!(killed.gateway.unsubscribe(&mut a, "c/#", 0));
        assert!(killed.gateway.unsubscribe(&mut a, "$share/group/dev/a/shared", 0));
        assert_eq!(killed.gateway.hub.subscriptions(), 0);
    }
}

#[tokio::test]
async fn a_session_that_ended_leaves_nothing_on_disk() {
    let fixture = Fixture::new();
    // By its own end, by a clean start, by its expiry, by a limit.
    let mut a = open_persistent(&fixture, "a", false, 600).await.client;
    fixture.subscribe(&mut a, "c/#").unwrap();
    fixture.gateway.close(a, None, Instant::now());
    let mut b = open_persistent(&fixture, "b", false, 600).await.client;
    fixture.subscribe(&mut b, "c/#").unwrap();
    fixture.gateway.close(b, keep(600), Instant::now());
    let b = fixture.client("b").await;
    fixture.gateway.close(b, None, Instant::now());
    let mut s = open_persistent(&fixture, "a", false, 600).await.client;
    fixture.subscribe(&mut s, "c/#").unwrap();
    fixture.gateway.close(s, keep(0), Instant::now());
    fixture.gateway.tick(Instant::now());
    settle(&fixture).await;
    for kind in [Kind::Session, Kind::Subscription] {
        let mut rows = 0;
        fixture.gateway.spool.rows(kind, |_, _| rows += 1).unwrap();
        assert_eq!(rows, 0, "{kind:?}");
    }
    assert_eq!(fixture.gateway.hub.subscriptions(), 0);
    assert!(open_persistent(&fixture.killed(|_| {}), "a", false, 600).await.resumed.is_none());
}

#[tokio::test]
async fn expiry_goes_on_over_a_kill_and_numbers_are_not_given_again() {
    let fixture = Fixture::new();
    let a = open_persistent(&fixture, "a", true, 600).await.client;
    fixture.gateway.close(a, keep(1), Instant::now());
    let b = open_persistent(&fixture, "b", true, 600).await.client;
    fixture.gateway.close(b, keep(600), Instant::now());
    settle(&fixture).await;
    let killed = fixture.killed(|_| {});
    assert_eq!(killed.gateway.sessions.counts().1, 2);
    let later = Instant::now() + Duration::from_secs(2);
    killed.gateway.tick(later);
    assert_eq!(killed.gateway.sessions.counts().1, 1);
    settle(&killed).await;
    let again = killed.killed(|limits| limits.persistent_sessions_max = 0);
    assert_eq!(again.gateway.sessions.counts().1, 0);
    assert_eq!(again.gateway.new_number(), 3);
}

/// What comes out of the outbox until it has been silent for a moment: payloads, packet identifiers, DUP.
pub(super) async fn received(client: &Client, wanted: usize) -> Vec<(String, u16, bool)> {
    let mut drained = Drained::default();
    while drained.deliveries.len() < wanted {
        tokio::time::timeout(Duration::from_secs(20), client.outbox.drain(&mut drained, 1000)).await.unwrap();
    }
    let seen = |d: &Delivery| {
        let payload = String::from_utf8(d.message.payload.to_vec()).unwrap();
        (payload, d.ticket.map_or(0, |ticket| ticket.id()), d.repeated)
    };
    drained.deliveries.iter().map(seen).collect()
}

/// The same, and acknowledges the first ones.
async fn taken(fixture: &Fixture, client: &Client, wanted: usize, acknowledged: usize) -> Vec<Delivery> {
    let mut drained = Drained::default();
    while drained.deliveries.len() < wanted {
        tokio::time::timeout(Duration::from_secs(20), client.outbox.drain(&mut drained, 1000)).await.unwrap();
    }
    let deliveries = Vec::from(drained.deliveries);
    deliveries.iter().take(acknowledged).for_each(|delivery| fixture.gateway.delivered(client, delivery));
    deliveries
}

fn text(payload: &str, id: u16, repeated: bool) -> (String, u16, bool) {
    (payload.to_owned(), id, repeated)
}

const PAYLOADS: [&str; 5] = ["1", "2", "3", "4", "5"];

#[tokio::test]
async fn what_is_queued_for_a_persistent_session_survives_a_kill() {
    for parked in [false, true] {
        let fixture = Fixture::new();
        let mut a = open_persistent(&fixture, "a", true, 600).await.client;
        fixture.subscribe(&mut a, "c/#").unwrap();
        let alive = match parked {
            true => {
                fixture.gateway.close(a, keep(600), Instant::now());
                None
            }
            false => Some(a),
        };
        let mut operator = fixture.client("op").await;
        for payload in PAYLOADS {
            let receipt = fixture.publish_stored(&mut operator, "dev/a/cmd/1/x", draft(payload, Qos::AtLeastOnce));
            assert_eq!(receipt.receivers, 1);
        }
        let killed = fixture.killed(|_| {});
        drop(alive);
        let mut operator = killed.client("op").await;
        killed.publish_stored(&mut operator, "dev/a/cmd/1/x", draft("6", Qos::ExactlyOnce));
        let a = open_persistent(&killed, "a", false, 600).await.client;
        let mut drained = received(&a, 6).await;
        assert_eq!(drained.pop(), Some(text("6", 6, false)));
        // The client of the one that was connected may have had them.
        let expected: Vec<_> = PAYLOADS.iter().zip(1..).map(|(p, id)| text(p, id, !parked)).collect();
        assert_eq!(drained, expected);
    }
}

#[tokio::test]
async fn a_publish_for_a_persistent_session_is_acknowledged_by_the_commit() {
    let fixture = Fixture::new();
    let mut a = open_persistent(&fixture, "a", true, 600).await.client;
    fixture.subscribe(&mut a, "c/#").unwrap();
    let mut operator = fixture.client("op").await;
    let log = Arc::new(Log::default());
    let completion: Arc<dyn Completion> = log.clone();
    let mut publish = |qos, token| {
        let address = Address::from_mqtt("dev/a/cmd/1/x");
        fixture.gateway.publish(&mut operator, address, draft("x", qos), Some((&completion, token)), Instant::now())
    };
    assert!(matches!(publish(Qos::AtMostOnce, 1), Ok(Published::Done(_))));
    assert_eq!(publish(Qos::AtLeastOnce, 2), Ok(Published::Pending));
    assert_eq!(publish(Qos::ExactlyOnce, 3), Ok(Published::Pending));
    // It is with the subscriber before.
    assert_eq!(received(&a, 3).await.len(), 3);
    fixture.gateway.spool.close();
    let told: Vec<u64> = log.0.lock().iter().map(|(token, outcome)| (outcome.is_ok(), *token).1).collect();
    assert_eq!(told, [2, 3]);
    assert!(matches!(publish(Qos::AtLeastOnce, 4), Err(Reject::ShuttingDown)));
}

#[tokio::test]
async fn what_the_client_has_taken_does_not_come_again() {
    let fixture = Fixture::new();
    let mut a = open_persistent(&fixture, "a", true, 600).await.client;
    fixture.subscribe(&mut a, "c/#").unwrap();
    let mut operator = fixture.client("op").await;
    for payload in PAYLOADS {
        fixture.publish_stored(&mut operator, "dev/a/cmd/1/x", draft(payload, Qos::ExactlyOnce));
    }
    let deliveries = taken(&fixture, &a, 5, 1).await;
    // The third is between PUBREC and PUBCOMP, the fourth was completed.
    let log: Arc<dyn Completion> = Arc::new(Log::default());
    for delivery in &deliveries[2..4] {
        assert_eq!(fixture.gateway.received(&a, delivery, (&log, 1)), Ok(Published::Pending));
    }
    fixture.gateway.completed(&a, 4);
    fixture.gateway.tick(Instant::now());
    settle(&fixture).await;
    let killed = fixture.killed(|_| {});
    let opened = open_persistent(&killed, "a", false, 600).await;
    let state = opened.resumed.unwrap().downcast::<InFlight>().unwrap();
    assert_eq!(state.received, [3]);
    assert_eq!(received(&opened.client, 2).await, [text("2", 2, true), text("5", 5, true)]);
    // The same between two connections of one life.
    let sent = Keep { state: Box::new(InFlight { sent: vec![2], ..InFlight::default() }), expiry: None };
    killed.gateway.close(opened.client, Some(sent), Instant::now());
    let opened = open_persistent(&killed, "a", false, 600).await;
    assert_eq!(opened.resumed.unwrap().downcast::<InFlight>().unwrap().received, [3]);
    killed.gateway.completed(&opened.client, 3);
    taken(&killed, &opened.client, 2, 2).await;
    killed.gateway.tick(Instant::now());
    let mut operator = killed.client("op").await;
    killed.publish_stored(&mut operator, "dev/a/cmd/1/x", draft("6", Qos::AtLeastOnce));
    let again = killed.killed(|_| {});
    let a = open_persistent(&again, "a", false, 600).await.client;
    assert_eq!(received(&a, 1).await, [text("6", 6, true)]);
}

#[tokio::test]
async fn a_full_queue_drops_its_oldest_and_counts_them() {
    let fixture = Fixture::with(|limits| limits.session_queue_messages_max = 3, &[]);
    let mut a = open_persistent(&fixture, "a", true, 600).await.client;
    fixture.subscribe(&mut a, "c/#").unwrap();
    fixture.gateway.close(a, keep(600), Instant::now());
    let mut operator = fixture.client("op").await;
    for payload in PAYLOADS {
        fixture.publish_stored(&mut operator, "dev/a/cmd/1/x", draft(payload, Qos::AtLeastOnce));
    }
    fixture.gateway.tick(Instant::now());
    settle(&fixture).await;
    let opened = open_persistent(&fixture, "a", false, 600).await;
    assert_eq!(opened.client.outbox.dropped(), 2);
    assert_eq!(received(&opened.client, 3).await, [text("3", 3, false), text("4", 4, false), text("5", 5, false)]);
}

#[tokio::test]
async fn a_slow_persistent_session_holds_nobody_up_and_loses_nothing() {
    let fixture = Fixture::with(|limits| limits.outbox_messages_max = 4, &[]);
    let mut a = open_persistent(&fixture, "a", true, 600).await.client;
    fixture.subscribe(&mut a, "c/#").unwrap();
    let mut operator = fixture.client("op").await;
    let payloads: Vec<String> = (0..50).map(|n| n.to_string()).collect();
    for payload in &payloads {
        let sent = Draft { payload: payload.clone().into(), qos: Qos::AtLeastOnce, retain: false, properties: None };
        fixture.publish_stored(&mut operator, "dev/a/cmd/1/x", sent);
    }
    assert_eq!(a.outbox.depth(), 4);
    let mut seen = Vec::new();
    while seen.len() < 50 {
        for delivery in taken(&fixture, &a, 1, 1).await {
            seen.push(String::from_utf8(delivery.message.payload.to_vec()).unwrap());
        }
    }
    assert_eq!(seen, payloads);
}

#[tokio::test]
async fn how_a_subscriber_sees_its_messages_survives_a_kill() {
    let fixture = Fixture::new();
    let mut operator = fixture.open("op", Protocol::Http, true).await.client;
    fixture.publish_stored(&mut operator, "plant/old", retained("retained"));
    let mut session = open_persistent(&fixture, "op", true, 600).await.client;
    let options = SubscribeOptions {
        qos: Qos::AtLeastOnce,
        retain_as_published: true,
        identifier: Some(77),
        ..SubscribeOptions::default()
    };
    let subscribed =
        fixture.gateway.subscribe(&mut session, "plant/#", 0, options, SendRetained::Always, Instant::now());
    // What is retained is stored for the session like everything else.
    assert!(subscribed.unwrap().retained.is_empty());
    fixture.publish_stored(&mut operator, "plant/new", retained("as published"));
    let killed = fixture.killed(|_| {});
    let session = open_persistent(&killed, "op", false, 600).await.client;
    let deliveries = taken(&killed, &session, 2, 0).await;
    for delivery in &deliveries {
        assert_eq!(delivery.terms.identifiers.as_deref(), Some(&[77][..]));
        assert!(delivery.retain && delivery.qos == Qos::AtLeastOnce);
    }
    assert_eq!(deliveries.iter().map(|d| d.message.topic.as_str()).collect::<Vec<_>>(), ["plant/old", "plant/new"]);
}

#[tokio::test]
async fn a_shared_group_prefers_who_is_connected_and_keeps_for_who_is_not() {
    let fixture = Fixture::new();
    let mut away = open_persistent(&fixture, "a", true, 600).await.client;
    let mut there = open_persistent(&fixture, "b", true, 600).await.client;
    let options = || SubscribeOptions { qos: Qos::AtLeastOnce, ..SubscribeOptions::default() };
    let subscribe = |client: &mut Client, filter: &str| {
        fixture.gateway.subscribe(client, filter, 0, options(), SendRetained::Never, Instant::now()).unwrap();
    };
    // Different spaces, so each is a group of one; the plant is for operators.
    subscribe(&mut away, "$share/g/c/#");
    subscribe(&mut there, "$share/g/c/#");
    fixture.gateway.close(away, keep(600), Instant::now());
    let mut operator = fixture.client("op").await;
    fixture.publish_stored(&mut operator, "dev/a/cmd/1/x", draft("kept", Qos::AtLeastOnce));
    fixture.publish_stored(&mut operator, "dev/b/cmd/1/x", draft("at once", Qos::AtLeastOnce));
    assert_eq!(received(&there, 1).await, [text("at once", 1, false)]);
    let away = open_persistent(&fixture, "a", false, 600).await.client;
    assert_eq!(received(&away, 1).await, [text("kept", 1, false)]);
}

#[tokio::test]
async fn what_a_shared_groups_ended_member_has_on_disk_goes_to_another_and_leaves_nothing() {
    let fixture = Fixture::new();
    let mut member = open_persistent(&fixture, "a", true, 600).await.client;
    fixture.subscribe(&mut member, "$share/g/c/#").unwrap();
    fixture.gateway.close(member, keep(600), Instant::now());
    let mut operator = fixture.client("op").await;
    for payload in PAYLOADS {
        fixture.publish_stored(&mut operator, "dev/a/cmd/1/x", draft(payload, Qos::AtLeastOnce));
    }
    // Another client of the device joins the group, and the session of the first ends.
    let killed = fixture.killed(|_| {});
    assert!(killed.gateway.spool.backlog_bytes() > 0);
    let mut heir = killed.open("a", Protocol::Http, true).await.client;
    killed.subscribe(&mut heir, "$share/g/c/#").unwrap();
    killed.gateway.close(killed.client("a").await, None, Instant::now());
    let expected: Vec<_> = PAYLOADS.iter().map(|payload| text(payload, 0, false)).collect();
    assert_eq!(received(&heir, 5).await, expected);
    let released = async {
        while killed.gateway.spool.backlog_bytes() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), released).await.unwrap();
}

#[tokio::test]
async fn a_packet_identifier_of_qos_2_is_taken_from_its_message_to_its_release_over_kills() {
    let fixture = Fixture::new();
    let mut a = open_persistent(&fixture, "a", true, 600).await.client;
    let (sender, answers) = std::sync::mpsc::channel();
    let completion: Arc<dyn Completion> = Arc::new(Answer(Mutex::new(sender)));
    let stored = || answers.recv_timeout(Duration::from_secs(20)).unwrap().unwrap();
    for id in [7, 65_535] {
        let address = Address::from_mqtt("t");
        let sent = draft("once", Qos::ExactlyOnce);
        let published = fixture.gateway.publish_once(&mut a, id, address, sent, Some((&completion, 0)), Instant::now());
        // It has no subscriber and no sink, and waits for the disk all the same.
        assert_eq!(published, Ok(Published::Pending));
        stored();
    }
    let killed = fixture.killed(|_| {});
    let opened = open_persistent(&killed, "a", false, 600).await;
    assert_eq!(opened.resumed.unwrap().downcast::<InFlight>().unwrap().unreleased, [7, 65_535]);
    let mut a = opened.client;
    assert_eq!(killed.gateway.released(&mut a, 7, (&completion, 0)), Ok(Published::Pending));
    stored();
    let again = killed.killed(|_| {});
    let opened = open_persistent(&again, "a", false, 600).await;
    assert_eq!(opened.resumed.unwrap().downcast::<InFlight>().unwrap().unreleased, [65_535]);
    // A clean session keeps no such thing.
    again.gateway.close(opened.client, None, Instant::now());
    settle(&again).await;
    let mut rows = 0;
    again.gateway.spool.rows(Kind::Unreleased, |_, _| rows += 1).unwrap();
    assert_eq!(rows, 0);
}

fn will(payload: &'static str, delay_secs: u32) -> Will {
    Will { topic: "t/will".into(), draft: draft(payload, Qos::AtLeastOnce), delay_secs }
}

/// Payloads of wills that were published, as the last value of the topic says.
fn last_will(fixture: &Fixture) -> Option<String> {
    value(fixture, "dev/a/telemetry/will")
}

#[tokio::test]
async fn the_will_of_who_was_connected_is_published_after_a_kill() {
    let fixture = Fixture::new();
    let mut reader = open_persistent(&fixture, "op", true, 600).await.client;
    fixture.subscribe(&mut reader, "dev/+/telemetry/#").unwrap();
    let mut clean = fixture.client("a").await;
    fixture.gateway.set_will(&mut clean, will("gone", 100)).unwrap();
    let mut polite = fixture.client("b").await;
    fixture.gateway.set_will(&mut polite, will("never", 0)).unwrap();
    fixture.gateway.cancel_will(&mut polite);
    fixture.gateway.close(polite, None, Instant::now());
    settle(&fixture).await;
    let killed = fixture.killed(|_| {});
    // Its session ended with the kill, so nothing delays it.
    let reader = open_persistent(&killed, "op", false, 600).await.client;
    assert_eq!(received(&reader, 1).await, [text("gone", 1, false)]);
    settle(&killed).await;
    let mut rows = 0;
    killed.gateway.spool.rows(Kind::Will, |_, _| rows += 1).unwrap();
    assert_eq!(rows, 0);
}

#[tokio::test]
async fn a_delayed_will_waits_is_kept_back_by_a_return_and_hurried_by_the_end() {
    let fixture = Fixture::new();
    let now = Instant::now();
    let later = |secs| now + Duration::from_secs(secs);
    let mut a = open_persistent(&fixture, "a", true, 600).await.client;
    fixture.gateway.set_will(&mut a, will("1", 100)).unwrap();
    fixture.gateway.close(a, keep(600), now);
    fixture.gateway.tick(later(50));
    assert_eq!(last_will(&fixture), None);
    // The delay goes on over a kill, and ends.
    settle(&fixture).await;
    let killed = fixture.killed(|_| {});
    killed.gateway.tick(later(90));
    assert_eq!(last_will(&killed), None);
    killed.gateway.tick(later(110));
    assert_eq!(last_will(&killed).as_deref(), Some("1"));
    // It comes back in time.
    let mut a = open_persistent(&fixture, "a", false, 600).await.client;
    fixture.gateway.tick(later(200));
    assert_eq!(last_will(&fixture), None);
    // The session ends before the delay does: by a clean start, by its expiry.
    fixture.gateway.set_will(&mut a, will("2", 100)).unwrap();
    fixture.gateway.close(a, keep(600), now);
    let clean = open_persistent(&fixture, "a", true, 600).await.client;
    assert_eq!(last_will(&fixture).as_deref(), Some("2"));
    fixture.gateway.close(clean, None, now);
    let mut a = open_persistent(&fixture, "a", true, 600).await.client;
    fixture.gateway.set_will(&mut a, will("3", 100)).unwrap();
    fixture.gateway.close(a, keep(10), now);
    fixture.gateway.tick(later(11));
    assert_eq!(last_will(&fixture).as_deref(), Some("3"));
}

#[tokio::test]
async fn a_will_is_published_under_the_rules_in_force_then() {
    let fixture = Fixture::new();
    let mut a = fixture.client("a").await;
    let forbidden = Will { topic: "dev/b/telemetry".into(), ..will("x", 0) };
    fixture.gateway.set_will(&mut a, forbidden).unwrap();
    fixture.gateway.close(a, None, Instant::now());
    assert_eq!(value(&fixture, "dev/b/telemetry"), None);
    let mut a = fixture.client("a").await;
    assert!(fixture.gateway.set_will(&mut a, Will { topic: "a/#".into(), ..will("x", 0) }).is_err());
    fixture.gateway.set_will(&mut a, will("allowed", 0)).unwrap();
    fixture.gateway.close(a, None, Instant::now());
    assert_eq!(last_will(&fixture).as_deref(), Some("allowed"));
}

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

fn keep(secs: u64) -> Option<Keep> {
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
        assert_eq!(topics(&opened.client), ["c/1/x", "dev/a/shared"]);
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

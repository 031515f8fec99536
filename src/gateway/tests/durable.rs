//! What survives `kill -9`: each test goes on with a copy of what was on disk at that moment.

use super::*;

fn value(fixture: &Fixture, topic: &str) -> Option<String> {
    let message = fixture.gateway.hub.last_value(&Topic::parse(topic).unwrap(), wall_ms())?;
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

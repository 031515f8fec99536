//! Observers and the device's commands.

use super::*;

#[tokio::test]
async fn an_observer_sees_what_others_publish_until_it_resets() {
    let fixture = Fixture::new();
    fixture.emit("plant/a/temp", "first");
    let (mut peer, t) = fixture.device("op").await;
    let first = peer.ask(get(&format!("ps/plant/a/temp?t={t}")).observe(&[])).await;
    assert_eq!((code(&first).as_str(), &first.payload[..]), ("2.05", &b"first"[..]));
    let mut sequence = option(&first, CoapOption::Observe).unwrap();
    for value in ["second", "third"] {
        fixture.emit("plant/a/temp", value);
        let notification = peer.notification().await;
        assert_eq!(notification.payload, value.as_bytes());
        let next = option(&notification, CoapOption::Observe).unwrap();
        assert!(next > sequence, "{next:?} after {sequence:?}");
        sequence = next;
    }
    fixture.emit("plant/a/temp", "fourth");
    let notification = peer.next().await;
    peer.acknowledge(&notification, MessageType::Reset).await;
    // The answer to a later request comes without a notification before it.
    fixture.emit("plant/a/temp", "fifth");
    let read = peer.ask(get(&format!("ps/plant/a/temp?t={t}"))).await;
    assert_eq!(read.payload, b"fifth");
    assert_eq!(fixture.gateway.hub.subscriptions(), 0);
    fixture.stop().await;
}

#[tokio::test]
async fn a_topic_may_be_observed_before_it_has_a_value_and_left_by_observe_1() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("op").await;
    let target = format!("ps/plant/new?t={t}");
    let mut ask = get(&target).observe(&[]).token(b"same").0;
    ask.header.message_id = 1;
    peer.socket.send(&ask.to_bytes().unwrap()).await.unwrap();
    let first = peer.next().await;
    assert_eq!((code(&first).as_str(), first.payload.len()), ("2.05", 0));
    fixture.emit("plant/new", "value");
    assert_eq!(peer.notification().await.payload, b"value");
    let mut ask = get(&target).observe(&[1]).token(b"same").0;
    ask.header.message_id = 2;
    peer.socket.send(&ask.to_bytes().unwrap()).await.unwrap();
    let last = peer.next().await;
    assert_eq!((last.payload.as_slice(), option(&last, CoapOption::Observe)), (&b"value"[..], None));
    assert_eq!(fixture.gateway.hub.subscriptions(), 0);
    fixture.stop().await;
}

#[tokio::test]
async fn all_values_of_one_observation_have_one_format() {
    let fixture = Fixture::new();
    let (mut writer, w) = fixture.device("op").await;
    let (mut peer, t) = fixture.device("op").await;
    let mut write = async |topic: &str, format: &[u8]| {
        let put = put(&format!("ps/plant/{topic}?t={w}")).option(CoapOption::ContentFormat, format).payload(b"1");
        assert_eq!(code(&writer.ask(put).await), "2.04");
    };
    // Observed before it has a value: the first one decides.
    assert_eq!(code(&peer.ask(get(&format!("ps/plant/x?t={t}")).observe(&[])).await), "2.05");
    write("x", &[50]).await;
    assert_eq!(option(&peer.notification().await, CoapOption::ContentFormat), Some(vec![50]));
    write("x", &[60]).await;
    let last = peer.next().await;
    assert_eq!((code(&last).as_str(), option(&last, CoapOption::Observe)), ("4.06", None));
    peer.acknowledge(&last, MessageType::Acknowledgement).await;
    // Asked for: another one does not come, not even as the first.
    let wanted = get(&format!("ps/plant/y?t={t}")).observe(&[]).option(CoapOption::Accept, &[50]);
    assert_eq!(code(&peer.ask(wanted).await), "2.05");
    write("y", &[60]).await;
    let last = peer.next().await;
    assert_eq!((code(&last).as_str(), option(&last, CoapOption::Observe)), ("4.06", None));
    peer.acknowledge(&last, MessageType::Acknowledgement).await;
    fixture.stop().await;
}

#[tokio::test]
async fn every_command_arrives_in_order_and_says_which_it_is() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("a").await;
    let first = peer.ask(get(&format!("c?t={t}")).observe(&[])).await;
    assert_eq!(code(&first), "2.05");
    for n in 0..5 {
        fixture.emit(&format!("dev/a/cmd/{n}/blink"), "now");
    }
    for n in 0..5 {
        let command = peer.next().await;
        assert_eq!(command.header.get_type(), MessageType::Confirmable);
        assert_eq!((location(&command), &command.payload[..]), (format!("c/{n}/blink"), &b"now"[..]));
        // The next one comes only now.
        peer.acknowledge(&command, MessageType::Acknowledgement).await;
    }
    assert_eq!(code(&peer.ask(post(&format!("cr/4?status=200&t={t}")).payload(b"done")).await), "2.04");
    let (mut operator, t) = fixture.device("op").await;
    let answer = operator.ask(get(&format!("ps/dev/a/cmd-res/4/200?t={t}"))).await;
    assert_eq!(answer.payload, b"done");
    fixture.stop().await;
}

#[tokio::test]
async fn an_observer_of_many_topics_is_told_which_one_changed() {
    let fixture = Fixture::new();
    fixture.emit("plant/a/temp", "kept");
    let (mut peer, t) = fixture.device("op").await;
    assert_eq!(code(&peer.ask(get(&format!("ps/plant/+/temp?t={t}")).observe(&[])).await), "2.05");
    let kept = peer.notification().await;
    assert_eq!((location(&kept).as_str(), &kept.payload[..]), ("ps/plant/a/temp", &b"kept"[..]));
    fixture.emit("plant/b/temp", "new");
    let new = peer.notification().await;
    assert_eq!((location(&new).as_str(), &new.payload[..]), ("ps/plant/b/temp", &b"new"[..]));
    fixture.stop().await;
}

#[tokio::test]
async fn who_may_not_subscribe_gets_a_plain_answer_or_a_refusal() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("a").await;
    let refused = peer.ask(get(&format!("ps/plant/a?t={t}")).observe(&[])).await;
    assert_eq!((code(&refused).as_str(), option(&refused, CoapOption::Observe)), ("4.03", None));
    assert_eq!(fixture.gateway.hub.subscriptions(), 0);
    fixture.stop().await;
}

#[tokio::test]
async fn observers_are_told_when_the_gateway_stops() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("a").await;
    assert_eq!(code(&peer.ask(get(&format!("s?t={t}")).observe(&[])).await), "2.05");
    fixture.shutdown.cancel();
    let last = peer.next().await;
    assert_eq!((code(&last).as_str(), option(&last, CoapOption::Observe)), ("5.03", None));
    fixture.served.await.unwrap();
}

#[tokio::test]
async fn a_revoked_device_is_out_at_once() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("a").await;
    assert_eq!(code(&peer.ask(get(&format!("s?t={t}")).observe(&[])).await), "2.05");
    let device = DeviceId::parse("a").unwrap();
    Registry::open(fixture.folder.path()).unwrap().set_enabled(&device, false).unwrap();
    fixture.gateway.identity.refresh().unwrap();
    assert_eq!(code(&peer.ask(post(&format!("t?t={t}")).payload(b"x")).await), "4.01");
    fixture.gateway.tick(Instant::now());
    let last = peer.next().await;
    assert_eq!((code(&last).as_str(), option(&last, CoapOption::Observe)), ("4.01", None));
    fixture.stop().await;
}

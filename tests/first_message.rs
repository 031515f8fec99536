//! The main job, end to end: one authenticated message over each protocol arrives at a real HTTP backend, with an id and in one piece.
//! `cross/smoke.sh` runs this against the ARM binaries under emulation, by `TIDEGATE_TEST_PROGRAM`.
#![allow(clippy::unwrap_used)]

mod support;

use support::cloud::Cloud;
use support::coap::{self, CoapClient};
use support::{Gateway, Wanted, http, wait_until};

#[test]
fn one_message_over_each_protocol_reaches_the_backend() {
    let cloud = Cloud::start();
    let gateway = Gateway::start(&Wanted { cloud: vec![cloud.url()], ..Wanted::default() });
    let devices: Vec<_> = ["by-mqtt4", "by-mqtt5", "by-http", "by-coap"].map(|id| gateway.add_device(id)).into();

    let mut mqtt = gateway.mqtt(&devices[0], false);
    assert_eq!(mqtt.publish_and_wait("t", b"over MQTT 3.1.1").unwrap(), 0);
    let mut mqtt = gateway.mqtt(&devices[1], true);
    let reason = mqtt.publish_and_wait("telemetry/room", b"over MQTT 5").unwrap();
    assert!(reason == 0 || reason == 0x10, "{reason:#04x}");

    let bearer = format!("Bearer {}", gateway.bearer(&devices[2]));
    let headers = [("Authorization", bearer.as_str()), ("Content-Type", "text/plain")];
    let response = http::once(gateway.plain, "POST", "/telemetry/room", &headers, b"over HTTP").unwrap();
    assert_eq!(response.status, 202, "{response:?}");

    let mut client = CoapClient::connect(gateway.coap).unwrap();
    let token = gateway.coap_token(&mut client, &devices[3]);
    let answer = client.request(coap::POST, "t/room", &[&format!("t={token}")], b"over CoAP").unwrap();
    assert_eq!(answer.code, (2, 4), "{answer:?}");

    let expected = ["over CoAP", "over HTTP", "over MQTT 3.1.1", "over MQTT 5"];
    wait_until("all four arrive", || cloud.by_body().len() >= expected.len());
    let arrived = cloud.by_body();
    assert_eq!(arrived.keys().collect::<Vec<_>>(), expected);
    for (body, ids) in &arrived {
        assert!(ids.iter().all(|id| id.starts_with("test/")), "{body}: {ids:?}");
    }
    println!("resident: {} kB", gateway.resident_kb());
}

#[test]
fn nobody_gets_in_without_a_key() {
    let cloud = Cloud::start();
    let gateway = Gateway::start(&Wanted { cloud: vec![cloud.url()], ..Wanted::default() });
    let device = gateway.add_device("known");

    for v5 in [false, true] {
        let refused = support::mqtt::MqttClient::connect(gateway.plain, "known", "not a token", v5).err().unwrap();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "{refused}");
    }
    let jwt = gateway.jwt(&device);
    let refused = support::mqtt::MqttClient::connect(gateway.plain, "another", &jwt, true).err().unwrap();
    assert_eq!(refused.to_string(), "CONNACK 0x87");
    drop(support::mqtt::MqttClient::connect(gateway.plain, "known", &jwt, true).unwrap());
    let refused = support::mqtt::MqttClient::connect(gateway.plain, "known", &jwt, true).err().unwrap();
    assert_eq!(refused.to_string(), "CONNACK 0x87", "a jti works once");

    assert_eq!(http::once(gateway.plain, "POST", "/telemetry", &[], b"x").unwrap().status, 401);
    let headers = [("Authorization", "Bearer AAAA")];
    assert_eq!(http::once(gateway.plain, "POST", "/telemetry", &headers, b"x").unwrap().status, 401);

    let mut client = CoapClient::connect(gateway.coap).unwrap();
    assert_eq!(client.request(coap::POST, "t", &[], b"x").unwrap().code, (4, 1));
    assert_eq!(client.request(coap::POST, "t", &["t=AAAA"], b"x").unwrap().code, (4, 1));

    let bearer = format!("Bearer {}", gateway.bearer(&device));
    let headers = [("Authorization", bearer.as_str())];
    assert_eq!(http::once(gateway.plain, "POST", "/telemetry", &headers, b"x").unwrap().status, 202);
    gateway.command_ok(&["device", "revoke", "known"]);
    wait_until("the revocation bites", || {
        http::once(gateway.plain, "POST", "/telemetry", &headers, b"y").unwrap().status == 401
    });
}

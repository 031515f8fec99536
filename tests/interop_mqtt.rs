//! mosquitto's clients and paho, unmodified, against the real binary: each proves an Ed25519 key by a JWT as its password.
#![allow(clippy::unwrap_used)]

mod support;

use std::process::{Command, Stdio};
use std::thread;

use support::cloud::Cloud;
use support::{Device, Gateway, Running, Wanted, program, said, stdout, wait_until};

const PACKAGE: &str = "Debian package mosquitto-clients";

/// The arguments by which a mosquitto client logs in.
fn login(gateway: &Gateway, device: &Device, version: &str) -> Vec<String> {
    let (port, jwt) = (gateway.plain.port().to_string(), gateway.jwt(device));
    ["-h", "127.0.0.1", "-p", &port, "-V", version, "-i", &device.id, "-u", &device.id, "-P", &jwt]
        .map(str::to_owned)
        .to_vec()
}

fn run(name: &str, login: &[String], rest: &[&str]) -> std::process::Output {
    let words: Vec<&str> =
        [name].into_iter().chain(login.iter().map(String::as_str)).chain(rest.iter().copied()).collect();
    program(PACKAGE, &words)
}

#[test]
fn mosquitto_pub_reaches_the_backend_at_every_qos_and_version() {
    let cloud = Cloud::start();
    let gateway = Gateway::start(&Wanted { cloud: vec![cloud.url()], ..Wanted::default() });
    let device = gateway.add_device("sensor-1");
    let mut expected = Vec::new();
    for version in ["mqttv311", "mqttv5"] {
        for qos in ["0", "1", "2"] {
            let payload = format!("{version} {qos}");
            let output = run(
                "mosquitto_pub",
                &login(&gateway, &device, version),
                &["-t", "telemetry/room", "-m", &payload, "-q", qos],
            );
            assert!(output.status.success(), "{payload}: {}", said(&output));
            expected.push(payload);
        }
    }
    wait_until("all six arrive", || cloud.by_body().len() == expected.len());
    assert!(expected.iter().all(|payload| cloud.by_body().contains_key(payload)));
}

#[test]
fn mosquitto_sub_sees_what_another_device_publishes() {
    let gateway = Gateway::start(&Wanted::default());
    let (reader, writer) = (gateway.add_device("reader"), gateway.add_device("writer"));
    for version in ["mqttv311", "mqttv5"] {
        let mut subscribe = Command::new("mosquitto_sub");
        subscribe.args(login(&gateway, &reader, version)).args([
            "-t",
            "plant/+/temp",
            "-q",
            "1",
            "-C",
            "2",
            "-W",
            "20",
            "-v",
        ]);
        let child = subscribe.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect(PACKAGE);
        let (pid, done) = (child.id(), thread::spawn(move || child.wait_with_output().unwrap()));
        // Whoever publishes before the subscription is there is not heard: repeat until the reader has what it waits for.
        wait_until("the reader has two messages", || {
            let output = run(
                "mosquitto_pub",
                &login(&gateway, &writer, version),
                &["-t", "plant/a/temp", "-m", "21.5", "-q", "1"],
            );
            assert!(output.status.success(), "{}", said(&output));
            done.is_finished()
        });
        let output = done.join().unwrap();
        assert!(output.status.success(), "mosquitto_sub {pid}: {}", said(&output));
        assert_eq!(stdout(&output), "plant/a/temp 21.5\nplant/a/temp 21.5\n");
    }
}

#[test]
fn mosquitto_clients_are_told_no() {
    let gateway = Gateway::start(&Wanted::default());
    let device = gateway.add_device("sensor-1");
    for version in ["mqttv311", "mqttv5"] {
        let mut wrong = login(&gateway, &device, version);
        *wrong.last_mut().unwrap() = "not-a-token".to_owned();
        let output = run("mosquitto_pub", &wrong, &["-t", "t", "-m", "x", "-q", "1"]);
        assert!(!output.status.success(), "{version}: a wrong password was taken");
    }
    // A topic of another device: MQTT 5 is told 0x87 in the PUBACK, and mosquitto_pub says so.
    let output =
        run("mosquitto_pub", &login(&gateway, &device, "mqttv5"), &["-t", "dev/other/telemetry", "-m", "x", "-q", "1"]);
    let text = said(&output).to_lowercase();
    assert!(text.contains("not authori"), "{text}");
}

#[test]
fn paho_speaks_both_versions_at_every_qos() {
    let cloud = Cloud::start();
    let gateway = Gateway::start(&Wanted { cloud: vec![cloud.url()], ..Wanted::default() });
    let device = gateway.add_device("paho-1");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop/paho_device.py");
    for (version, transport) in [("311", "tcp"), ("5", "tcp"), ("311", "websockets"), ("5", "websockets")] {
        let (port, jwt) = (gateway.plain.port().to_string(), gateway.jwt(&device));
        let output =
            program("PyPI paho-mqtt", &[&support::python(), script, &port, &device.id, &jwt, version, transport]);
        assert!(
            output.status.success() && stdout(&output).ends_with("ok\n"),
            "{version} {transport}: {}",
            said(&output)
        );
        let expected = format!("from paho {version} {transport}");
        wait_until("telemetry arrives", || cloud.by_body().contains_key(&expected));
    }
}

#[test]
fn the_sessions_of_paho_and_mqtt_js_survive_kill_9() {
    let cloud = Cloud::start();
    let mut gateway = Gateway::start(&Wanted { cloud: vec![cloud.url()], ..Wanted::default() });
    let writer = gateway.add_device("writer");
    let (python, node) = (support::python(), "node".to_owned());
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop/");
    for (package, program_name, script) in
        [("PyPI paho-mqtt", &python, "paho_session.py"), ("npm mqtt", &node, "mqttjs_session.js")]
    {
        for version in ["311", "5"] {
            let reader = gateway.add_device(&format!("{}-{version}", package.replace(" ", "-")));
            let session = |gateway: &Gateway, task: &str, count: &str| {
                let (port, jwt) = (gateway.plain.port().to_string(), gateway.jwt(&reader));
                let script = format!("{folder}{script}");
                let words = [program_name, script.as_str(), &port, &reader.id, &jwt, version, task, count];
                let output = program(package, &words);
                assert!(output.status.success(), "{package} {version} {task}: {}", said(&output));
                stdout(&output)
            };
            session(&gateway, "subscribe", "0");
            for (payload, qos) in [("1", "1"), ("2", "2"), ("3", "1")] {
                let message = ["-t", "plant/x", "-m", payload, "-q", qos];
                let output = run("mosquitto_pub", &login(&gateway, &writer, "mqttv5"), &message);
                assert!(output.status.success(), "{}", said(&output));
            }
            gateway.kill();
            gateway.run();
            let received = session(&gateway, "receive", "3");
            let mut received: Vec<&str> = received.lines().collect();
            // A client may show a message of QoS 2 when its handshake is over.
            received.sort_unstable();
            assert_eq!(received, ["1", "2", "3"], "{package} {version}");
        }
    }
    for version in ["311", "5"] {
        for task in ["subscribe", "receive"] {
            for qos in 0..3 {
                let expected = format!("mqtt.js {version} {task} {qos}");
                wait_until("telemetry arrives", || cloud.by_body().contains_key(&expected));
            }
        }
    }
}

#[test]
fn mosquitto_rr_is_answered_by_rumqttc() {
    use rumqttc::v5::mqttbytes::QoS;
    use rumqttc::v5::mqttbytes::v5::{Packet, PublishProperties};
    use rumqttc::v5::{Client, Event, MqttOptions};

    let gateway = Gateway::start(&Wanted::default());
    let (asker, answerer) = (gateway.add_device("asker"), gateway.add_device("answerer"));
    let mut options = MqttOptions::new(&answerer.id, "127.0.0.1", gateway.plain.port());
    options.set_credentials(&answerer.id, gateway.jwt(&answerer));
    let (client, mut connection) = Client::new(options, 10);
    client.subscribe("plant/question", QoS::AtLeastOnce).unwrap();
    let (subscribed, is_subscribed) = std::sync::mpsc::channel();
    let answering = thread::spawn(move || {
        for event in connection.iter() {
            match event.unwrap() {
                Event::Incoming(Packet::SubAck(_)) => subscribed.send(()).unwrap(),
                Event::Incoming(Packet::Publish(question)) => {
                    let asked = question.properties.unwrap();
                    let properties =
                        PublishProperties { correlation_data: asked.correlation_data, ..PublishProperties::default() };
                    let answer = [&b"answer to "[..], &question.payload].concat();
                    let to = asked.response_topic.unwrap();
                    client.publish_with_properties(to, QoS::AtLeastOnce, false, answer, properties).unwrap();
                }
                Event::Incoming(Packet::PubAck(_)) => return,
                _ => {}
            }
        }
    });
    is_subscribed.recv_timeout(std::time::Duration::from_secs(20)).unwrap();
    let question = ["-t", "plant/question", "-e", "plant/answer", "-m", "question 7", "-q", "1", "-W", "20"];
    let output = run("mosquitto_rr", &login(&gateway, &asker, "mqttv5"), &question);
    assert_eq!(stdout(&output), "answer to question 7\n", "{}", said(&output));
    answering.join().unwrap();
}

#[test]
fn a_bridge_to_mosquitto_forwards_every_message() {
    let folder = tempfile::tempdir().unwrap();
    let (_broker, address) = support::mosquitto(folder.path());
    let port = address.port().to_string();
    let extra = format!(
        "\n[[upstream]]\nname = \"broker\"\nkind = \"mqtt\"\nendpoints = [{{ url = \"mqtt://{address}\" }}]\nclient_id = \"bridge\"\n\n\
         [[forward]]\nname = \"bridged\"\ntopics = [\"dev/+/telemetry/#\"]\nto = \"broker\"\ndelivery = \"disk\"\n"
    );
    let gateway = Gateway::start(&Wanted { extra, ..Wanted::default() });
    let device = gateway.add_device("sensor-1");
    let mut subscribe = Command::new("mosquitto_sub");
    subscribe.args([
        "-h",
        "127.0.0.1",
        "-p",
        &port,
        "-t",
        "dev/sensor-1/telemetry/#",
        "-q",
        "1",
        "-C",
        "20",
        "-W",
        "25",
    ]);
    let child = subscribe.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect(PACKAGE);
    let guard = thread::spawn(move || child.wait_with_output().unwrap());
    // The subscription has to be there first: mosquitto keeps nothing for a stranger.
    let probe = Command::new("mosquitto_sub")
        .args(["-h", "127.0.0.1", "-p", &port, "-t", "$SYS/broker/subscriptions/count", "-C", "1", "-W", "15"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    drop(Running(probe.unwrap()));
    thread::sleep(std::time::Duration::from_millis(500));
    let mut client = gateway.mqtt(&device, true);
    for n in 0..20 {
        client.publish_and_wait("t", format!("bridged {n}").as_bytes()).unwrap();
    }
    let output = guard.join().unwrap();
    let expected: String = (0..20).map(|n| format!("bridged {n}\n")).collect();
    assert_eq!(stdout(&output), expected, "{}", said(&output));
}

//! `cargo test --release --lib gateway::tests::start -- --ignored --nocapture`: how long a start takes with much to take back.

use super::durable::{keep, received};
use super::*;

const SESSIONS: u32 = 10_000;
const MESSAGES_EACH: u32 = 100;

async fn open(fixture: &Fixture, client: &str) -> Client {
    let device = fixture.gateway.identity.device(&DeviceId::parse("op").unwrap());
    let peer = ([127, 0, 0, 1], 9).into();
    let open = Open { device, protocol: Protocol::Mqtt, peer, client, clean: false, mailbox: Mailbox::Own };
    fixture.gateway.open_persistent(open, 86_400, Instant::now()).await.unwrap().client
}

fn limits(limits: &mut limit::Config) {
    limits.rate_per_device = crate::units::Rate::per_second(1_000_000, 1_000_000);
}

#[tokio::test]
#[ignore = "measures; run by hand"]
async fn ten_thousand_sessions_with_a_million_messages_are_there_at_once() {
    let fixture = Fixture::with(limits, &[]);
    let from = Instant::now();
    for n in 0..SESSIONS {
        let mut client = open(&fixture, &format!("client-{n}")).await;
        let options = SubscribeOptions { qos: Qos::AtLeastOnce, ..SubscribeOptions::default() };
        let filter = format!("plant/{n}/#");
        fixture.gateway.subscribe(&mut client, &filter, 0, options, SendRetained::Never, Instant::now()).unwrap();
        fixture.gateway.close(client, keep(86_400), Instant::now());
    }
    println!("{SESSIONS} sessions made in {:?}", from.elapsed());
    let from = Instant::now();
    for round in 0..MESSAGES_EACH {
        for n in 0..SESSIONS {
            let topic = Topic::parse(&format!("plant/{n}/value")).unwrap();
            let payload = Bytes::from(format!("{round:064}"));
            while fixture.gateway.emit(topic.clone(), payload.clone(), false, Instant::now()).is_err() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }
    fixture.gateway.spool.close();
    println!("{} messages stored in {:?}", SESSIONS * MESSAGES_EACH, from.elapsed());
    let size = |name: &str| std::fs::metadata(fixture.folder.path().join(name)).map_or(0, |file| file.len());
    println!("spool.db {} MB, log {} MB", size("spool.db") >> 20, size("spool.db-wal") >> 20);

    let copied = fixture.copy();
    let memory = resident_bytes();
    let from = Instant::now();
    let started = Fixture::start(copied, limits, &[]);
    println!("start: {:?}, {} MB of memory", from.elapsed(), (resident_bytes() - memory) >> 20);
    assert_eq!(started.gateway.sessions.counts().1, SESSIONS as usize);
    let from = Instant::now();
    let client = open(&started, "client-4711").await;
    let first = received(&client, 1).await;
    println!("a client has its first of {MESSAGES_EACH} after {:?}", from.elapsed());
    assert_eq!(first.first().map(|(payload, id, _)| (payload.len(), *id)), Some((64, 1)));
}

fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

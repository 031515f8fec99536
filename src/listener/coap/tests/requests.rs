//! Logins, requests and their bounds over UDP.

use super::*;

#[tokio::test]
async fn a_device_logs_in_publishes_and_reads_its_value_back() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("a").await;
    assert_eq!(code(&peer.ask(post(&format!("t/room?t={t}")).payload(b"21")).await), "2.04");
    let ask = put(&format!("s?t={t}")).payload(b"{}").option(CoapOption::ContentFormat, &[50]);
    assert_eq!(code(&peer.ask(ask).await), "2.04");
    let state = peer.ask(get(&format!("s?t={t}"))).await;
    assert_eq!((code(&state).as_str(), &state.payload[..]), ("2.05", &b"{}"[..]));
    assert_eq!(option(&state, CoapOption::ContentFormat), Some(vec![50]));
    let mirrored = peer.ask(get(&format!("ps/dev/a/telemetry/room?t={t}"))).await;
    assert_eq!(mirrored.payload, b"21");
    fixture.stop().await;
}

#[tokio::test]
async fn a_challenge_works_once_and_every_wrong_login_is_the_same_4_01() {
    let fixture = Fixture::new();
    let mut peer = fixture.peer().await;
    let session = fixture.session_request(&mut peer, "a", &key("a")).await.to_cbor();
    assert_eq!(code(&peer.ask(post("auth/s").payload(&session)).await), "2.04");
    let wrong_key = fixture.session_request(&mut peer, "a", &key("b")).await.to_cbor();
    let nobody = fixture.session_request(&mut peer, "nobody", &key("a")).await.to_cbor();
    for body in [&session[..], &wrong_key, &nobody, b"not cbor", b""] {
        let answer = peer.ask(post("auth/s").payload(body)).await;
        assert_eq!((code(&answer).as_str(), &answer.payload[..]), ("4.01", &b""[..]));
    }
    // The challenge is bound to the address that asked for it.
    let mut thief = fixture.peer().await;
    let session = fixture.session_request(&mut peer, "a", &key("a")).await.to_cbor();
    assert_eq!(code(&thief.ask(post("auth/s").payload(&session)).await), "4.01");
    fixture.stop().await;
}

#[tokio::test]
async fn a_stranger_learns_nothing_but_no() {
    let fixture = Fixture::new();
    let (_, t) = fixture.device("a").await;
    let other = if &t[50..51] == "A" { "B" } else { "A" };
    let broken = format!("{}{other}{}", &t[..50], &t[51..]);
    for ask in [
        post("t").payload(b"x"),
        post(&format!("t?t={broken}")).payload(b"x"),
        get("s"),
        get("nothing/here"),
        put("ps/plant/x"),
        request(RequestType::Delete, "t"),
    ] {
        let answer = fixture.peer().await.ask(ask).await;
        assert_eq!((code(&answer).as_str(), &answer.payload[..]), ("4.01", &b""[..]));
    }
    let core = fixture.peer().await.ask(get(".well-known/core")).await;
    assert!(core.payload.starts_with(b"</auth/c>") && !String::from_utf8(core.payload).unwrap().contains("/ps"));
    fixture.stop().await;
}

#[tokio::test]
async fn a_device_is_told_the_rule_or_limit_that_decided() {
    let fixture = Fixture::with(|limits| limits.packet_bytes_max = 256, &[]);
    let (mut peer, t) = fixture.device("op").await;
    for (ask, expected, reason) in [
        (put(&format!("ps/plant/forbidden?t={t}")).payload(b"x"), "4.03", "not there"),
        (put(&format!("ps/else/where?t={t}")).payload(b"x"), "4.03", "no rule"),
        (put(&format!("ps/small/x?t={t}")).payload(b"12345"), "4.13", "bytes_max"),
        (put(&format!("ps/plant/x?t={t}")).payload(&[0; 257]), "4.13", "packet_bytes_max"),
        (get(&format!("ps/plant/nothing?t={t}")), "4.04", "nothing there"),
        (get(&format!("nothing?t={t}")), "4.04", "nothing there"),
        (post(&format!("cr/7?t={t}")), "4.00", "status"),
        (put(&format!("ps/a+/x?t={t}")), "4.00", "not a topic"),
    ] {
        let answer = peer.ask(ask).await;
        let payload = String::from_utf8(answer.payload.clone()).unwrap();
        assert_eq!(code(&answer), expected, "{payload}");
        assert!(payload.contains(reason), "{payload}");
        assert_eq!(option(&answer, CoapOption::Size1).is_some(), expected == "4.13");
    }
    fixture.stop().await;
}

#[tokio::test]
async fn too_fast_is_4_29_with_the_time_to_wait() {
    let fixture = Fixture::with(|limits| limits.rate_per_device = "1/m burst 2".parse().unwrap(), &[]);
    let (mut peer, t) = fixture.device("a").await;
    let mut last = None;
    for _ in 0..3 {
        last = Some(peer.ask(post(&format!("t?t={t}")).payload(b"x")).await);
    }
    let last = last.unwrap();
    assert_eq!(code(&last), "4.29");
    let wait = option(&last, CoapOption::MaxAge).unwrap();
    assert!((50..=60).contains(&wait[0]), "{wait:?}");
    fixture.stop().await;
}

#[tokio::test]
async fn what_is_acknowledged_is_in_the_spool() {
    let fixture = Fixture::with(|_| {}, &["dev/+/telemetry/#"]);
    let (mut peer, t) = fixture.device("a").await;
    assert_eq!(code(&peer.ask(post(&format!("t?t={t}")).payload(b"kept")).await), "2.04");
    assert_eq!(code(&peer.ask(post(&format!("t?t={t}")).payload(b"kept too").unconfirmed()).await), "2.04");
    let folder = fixture.folder.path().to_owned();
    let sink = spool_texts(&folder);
    assert!(sink.contains("kept too"), "acknowledged before it was stored");
    fixture.stop().await;
}

/// All that lies in the spool's files, as text.
fn spool_texts(folder: &std::path::Path) -> String {
    let mut found = String::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.push_str(&spool_texts(&path));
        } else {
            found.push_str(&String::from_utf8_lossy(&std::fs::read(path).unwrap()));
        }
    }
    found
}

#[tokio::test]
async fn a_retransmission_gets_the_same_answer_and_publishes_once() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("op").await;
    let mut ask = put(&format!("ps/plant/x?t={t}")).payload(b"1").0;
    ask.header.message_id = 9;
    ask.set_token(vec![1]);
    let bytes = ask.to_bytes().unwrap();
    let mut answers = Vec::new();
    for _ in 0..2 {
        peer.socket.send(&bytes).await.unwrap();
        answers.push(peer.next().await.to_bytes().unwrap());
    }
    assert_eq!(answers[0], answers[1]);
    let value = peer.ask(get(&format!("ps/plant/x?t={t}"))).await;
    let again = peer.ask(get(&format!("ps/plant/x?t={t}"))).await;
    assert_eq!(option(&value, CoapOption::ETag), option(&again, CoapOption::ETag));
    let live = fixture.gateway.sessions.live();
    assert_eq!(live.len(), 1, "one session for one device at one address");
    fixture.stop().await;
}

#[tokio::test]
async fn sessions_are_bounded_and_the_one_not_used_for_longest_goes() {
    let fixture = Fixture::with(|limits| limits.coap_sessions_max = 16, &[]);
    let (mut first, t) = fixture.device("op").await;
    assert_eq!(code(&first.ask(get(&format!("ps/plant/x?t={t}")).observe(&[])).await), "2.05");
    for _ in 0..40 {
        let mut peer = fixture.peer().await;
        assert_eq!(code(&peer.ask(put(&format!("ps/plant/y?t={t}")).payload(b"1")).await), "2.04");
        assert!(fixture.gateway.sessions.live().len() <= 16);
    }
    // Who observes stays.
    fixture.emit("plant/x", "still there");
    assert_eq!(first.notification().await.payload, b"still there");
    fixture.stop().await;
}

#[tokio::test]
async fn quiet_sessions_end_and_begin_again() {
    let fixture = Fixture::with(|limits| limits.idle_timeout = "1ms".parse().unwrap(), &[]);
    let (mut peer, t) = fixture.device("op").await;
    assert_eq!(code(&peer.ask(put(&format!("ps/plant/y?t={t}")).payload(b"1")).await), "2.04");
    let waited = Instant::now();
    while !fixture.gateway.sessions.live().is_empty() {
        assert!(waited.elapsed() < Duration::from_secs(30), "the session stays");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(peer.ask(get(&format!("ps/plant/y?t={t}"))).await.payload, b"1");
    fixture.stop().await;
}

#[tokio::test]
async fn an_address_that_has_shown_nothing_gets_no_more_than_it_paid_for() {
    let fixture = Fixture::new();
    let (mut writer, t) = fixture.device("op").await;
    let long = "x".repeat(900);
    assert_eq!(code(&writer.ask(put(&format!("ps/plant/long?t={t}")).payload(long.as_bytes())).await), "2.04");
    // The token is right, but whether this address receives is not known.
    let mut other = fixture.peer().await;
    let target = format!("ps/plant/long?t={t}");
    let ask = get(&target);
    let asked = ask.0.to_bytes().unwrap().len();
    let answer = other.ask(ask).await;
    assert_eq!(code(&answer), "4.01");
    assert!(answer.to_bytes().unwrap().len() <= (3 * asked).max(136));
    let echo = answer.get_option(CoapOption::Unknown(252)).unwrap().front().unwrap().clone();
    let answer = other.ask(get(&target).option(CoapOption::Unknown(252), &echo)).await;
    assert_eq!((code(&answer).as_str(), answer.payload.len()), ("2.05", 900));
    // From now on it is known; who logged in from his address is so already.
    assert_eq!(code(&other.ask(get(&target)).await), "2.05");
    assert_eq!(code(&writer.ask(get(&target)).await), "2.05");
    fixture.stop().await;
}

/// Sends `payload` in blocks of 64 bytes and gives the last answer.
async fn put_in_blocks(peer: &mut Peer, target: &str, payload: &[u8]) -> Packet {
    let count = payload.len().div_ceil(64);
    for (n, block) in payload.chunks(64).enumerate() {
        let more = n + 1 < count;
        let bits = (n as u32) << 4 | u32::from(more) << 3 | 2;
        let value: Vec<u8> = bits.to_be_bytes().into_iter().skip_while(|b| *b == 0).collect();
        let answer = peer.ask(put(target).option(CoapOption::Block1, &value).payload(block)).await;
        if code(&answer) != "2.31" {
            return answer;
        }
    }
    panic!("the last block was taken for another")
}

#[tokio::test]
async fn a_body_in_blocks_becomes_one_message_within_its_bounds() {
    let fixture = Fixture::with(|limits| limits.packet_bytes_max = 1000, &[]);
    let (mut peer, t) = fixture.device("op").await;
    let target = format!("ps/plant/blocks?t={t}");
    let body: Vec<u8> = (0..900).map(|n| (n % 251) as u8).collect();
    assert_eq!(code(&put_in_blocks(&mut peer, &target, &body).await), "2.04");
    assert_eq!(peer.ask(get(&target)).await.payload, body);
    let too_long = put_in_blocks(&mut peer, &target, &[1; 1100]).await;
    assert_eq!(code(&too_long), "4.13");
    assert_eq!(option(&too_long, CoapOption::Size1), Some(vec![3, 232]));
    // Said at the first block already, when it says how long it will be.
    let first =
        put(&target).option(CoapOption::Block1, &[0x0a]).option(CoapOption::Size1, &[0x10, 0]).payload(&[1; 64]);
    assert_eq!(code(&peer.ask(first).await), "4.13");
    // A stranger leaves nothing behind.
    let mut stranger = fixture.peer().await;
    assert_eq!(code(&put_in_blocks(&mut stranger, "ps/plant/blocks", &body).await), "4.01");
    // A block of what never began.
    let lost = put(&target).option(CoapOption::Block1, &[0x1a]).payload(&[1; 64]);
    assert_eq!(code(&peer.ask(lost).await), "4.08");
    fixture.stop().await;
}

#[tokio::test]
async fn conditions_and_formats_are_kept() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("op").await;
    let target = format!("ps/plant/c?t={t}");
    let new =
        || put(&target).option(CoapOption::IfNoneMatch, &[]).payload(b"{}").option(CoapOption::ContentFormat, &[50]);
    assert_eq!(code(&peer.ask(new()).await), "2.04");
    assert_eq!(code(&peer.ask(new()).await), "4.12");
    let value = peer.ask(get(&target)).await;
    let tag = option(&value, CoapOption::ETag).unwrap();
    assert_eq!(code(&peer.ask(get(&target).option(CoapOption::ETag, &tag)).await), "2.03");
    let wrong: Vec<u8> = tag.iter().map(|b| !b).collect();
    assert_eq!(code(&peer.ask(put(&target).option(CoapOption::IfMatch, &wrong).payload(b"x")).await), "4.12");
    assert_eq!(code(&peer.ask(put(&target).option(CoapOption::IfMatch, &tag).payload(b"[]")).await), "2.04");
    assert_eq!(code(&peer.ask(get(&target).option(CoapOption::ETag, &tag)).await), "2.05");
    assert_eq!(code(&peer.ask(put(&target).option(CoapOption::IfMatch, &[]).payload(b"[]")).await), "2.04");
    let json = put(&target).payload(b"{}").option(CoapOption::ContentFormat, &[50]);
    assert_eq!(code(&peer.ask(json).await), "2.04");
    assert_eq!(code(&peer.ask(get(&target).option(CoapOption::Accept, &[50])).await), "2.05");
    assert_eq!(code(&peer.ask(get(&target).option(CoapOption::Accept, &[60])).await), "4.06");
    fixture.stop().await;
}

#[tokio::test]
async fn a_deleted_topic_has_no_last_value() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("op").await;
    let target = format!("ps/plant/gone?t={t}");
    let kept = put(&format!("ps/plant/gone?t={t}&retain=1")).payload(b"x");
    assert_eq!(code(&peer.ask(kept).await), "2.04");
    let core = String::from_utf8(peer.ask(get(&format!(".well-known/core?t={t}"))).await.payload).unwrap();
    assert!(core.contains("</ps/plant/gone>;rt=\"core.ps.data\";obs"), "{core}");
    assert_eq!(code(&peer.ask(request(RequestType::Delete, &target)).await), "2.02");
    assert_eq!(code(&peer.ask(get(&target)).await), "4.04");
    fixture.stop().await;
}

#[tokio::test]
async fn links_show_only_what_the_asker_may_read() {
    let fixture = Fixture::new();
    fixture.emit("plant/a", "x");
    fixture.emit("dev/a/state", "x");
    fixture.emit("dev/b/state", "x");
    let (mut peer, t) = fixture.device("a").await;
    let core = String::from_utf8(peer.ask(get(&format!(".well-known/core?t={t}"))).await.payload).unwrap();
    assert!(core.contains("</ps/dev/a/state>") && core.contains("</t>"), "{core}");
    assert!(!core.contains("/ps/dev/b") && !core.contains("/ps/plant"), "{core}");
    let filtered = peer.ask(get(&format!(".well-known/core?href=/ps*&t={t}"))).await;
    assert_eq!(option(&filtered, CoapOption::ContentFormat), Some(vec![40]));
    let filtered = String::from_utf8(filtered.payload).unwrap();
    assert!(filtered.starts_with("</ps>") && filtered.contains("</ps/dev/a/state>") && !filtered.contains("</t>"));
    fixture.stop().await;
}

#[tokio::test]
async fn what_no_response_asks_to_leave_out_is_left_out() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("op").await;
    let silent = put(&format!("ps/plant/n?t={t}")).payload(b"1").option(CoapOption::Unknown(258), &[2]).unconfirmed();
    peer.send(silent).await;
    // The next answer is that of the next request.
    assert_eq!(peer.ask(get(&format!("ps/plant/n?t={t}"))).await.payload, b"1");
    fixture.stop().await;
}

/// A signed message to `target`.
fn signed(fixture: &Fixture, id: &str, key: &SecretKey, sequence: u64, target: &str, payload: &[u8]) -> Ask {
    let path: Vec<&str> = target.split('/').collect();
    let gateway_id = &fixture.gateway.identity.gateway().id;
    let purpose = tidegate_auth::cose::Purpose { method: 2, path: &path, gateway_id };
    let body = tidegate_auth::cose::sign(key, id, sequence, Some(50), payload, &purpose);
    post(target).payload(&body).option(CoapOption::ContentFormat, &[18])
}

#[tokio::test]
async fn a_signed_message_needs_no_login_and_grants_nothing_else() {
    let fixture = Fixture::new();
    let mut peer = fixture.peer().await;
    assert_eq!(code(&peer.ask(signed(&fixture, "a", &key("a"), 1, "t/room", b"{}")).await), "2.04");
    // The same number again, from anywhere.
    assert_eq!(code(&fixture.peer().await.ask(signed(&fixture, "a", &key("a"), 1, "t/room", b"{}")).await), "4.09");
    assert_eq!(code(&peer.ask(signed(&fixture, "a", &key("b"), 2, "t/room", b"{}")).await), "4.01");
    // To another path than it was signed for.
    let mut moved = signed(&fixture, "a", &key("a"), 3, "t/room", b"{}").0;
    moved.clear_option(CoapOption::UriPath);
    for segment in ["t", "hall"] {
        moved.add_option(CoapOption::UriPath, segment.into());
    }
    assert_eq!(code(&peer.ask(Ask(moved)).await), "4.01");
    // The address is not the device.
    assert_eq!(code(&peer.ask(post("t/room").payload(b"x")).await), "4.01");
    // Policy holds for it as for any other.
    assert_eq!(code(&peer.ask(signed(&fixture, "a", &key("a"), 4, "ps/plant/x", b"{}")).await), "4.03");
    let (mut operator, t) = fixture.device("op").await;
    let value = operator.ask(get(&format!("ps/dev/a/telemetry/room?t={t}"))).await;
    assert_eq!((&value.payload[..], option(&value, CoapOption::ContentFormat)), (&b"{}"[..], Some(vec![50])));
    fixture.stop().await;
}

#[tokio::test]
async fn a_json_value_is_patched_and_a_collection_listed_and_searched() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("op").await;
    let patch = |target: String, body: &[u8], format: u8| {
        let mut ask = request(RequestType::IPatch, &target).payload(body);
        ask.0.add_option(CoapOption::ContentFormat, vec![format]);
        ask
    };
    let target = format!("ps/plant/j?t={t}");
    assert_eq!(code(&peer.ask(put(&format!("{target}&retain=1")).payload(br#"{"a":1,"b":2}"#)).await), "2.04");
    assert_eq!(code(&peer.ask(patch(target.clone(), br#"{"a":null,"c":3}"#, 52)).await), "2.04");
    let value = peer.ask(get(&target)).await;
    assert_eq!(
        (&value.payload[..], option(&value, CoapOption::ContentFormat)),
        (&br#"{"b":2,"c":3}"#[..], Some(vec![50]))
    );
    assert_eq!(code(&peer.ask(patch(target.clone(), b"{}", 51)).await), "4.15");
    assert_eq!(code(&peer.ask(put(&format!("ps/plant/text?t={t}&retain=1")).payload(b"21 C")).await), "2.04");
    assert_eq!(code(&peer.ask(patch(format!("ps/plant/text?t={t}"), b"{}", 52)).await), "4.09");
    let all = String::from_utf8(peer.ask(get(&format!("ps?t={t}"))).await.payload).unwrap();
    assert!(all.contains("</ps/plant/j>") && all.contains("</ps/plant/text>") && !all.contains("</t>"), "{all}");
    let discovered = peer.ask(get(&format!(".well-known/core?rt=core.ps.coll&t={t}"))).await;
    assert_eq!(discovered.payload, br#"</ps>;rt="core.ps core.ps.coll";ct=40"#);
    let found = peer.ask(request(RequestType::Fetch, &format!("ps?t={t}")).payload(b"plant/j/#")).await;
    assert_eq!(found.payload, br#"</ps/plant/j>;rt="core.ps.data";obs;ct=50"#);
    let not_a_filter = request(RequestType::Fetch, &format!("ps?t={t}")).payload(b"a#");
    assert_eq!(code(&peer.ask(not_a_filter).await), "4.00");
    fixture.stop().await;
}

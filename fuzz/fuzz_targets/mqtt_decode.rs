//! MQTT codec: total on any bytes, never past the frame, and what it accepts it writes back. The first byte chooses the version.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use tidegate_mqtt::{Packet, Version, decode, topic};

fuzz_target!(|data: &[u8]| {
    let Some((first, input)) = data.split_first() else { return };
    let version = if first & 1 == 0 { Version::V311 } else { Version::V5 };
    let Ok(Some((packet, taken))) = decode(input, version, 1 << 20) else {
        if let Ok(text) = std::str::from_utf8(input) {
            let _ = (topic::check_name(text), topic::check_filter(text), topic::matches(text, text));
        }
        return;
    };
    assert!(taken <= input.len());
    let mut once = BytesMut::new();
    if packet.encode(version, &mut once).is_err() {
        return;
    }
    // A CONNECT says its own version.
    let version = match &packet {
        Packet::Connect(connect) => connect.version,
        _ => version,
    };
    let (again, taken) = decode(&once, version, 1 << 20).expect("our own bytes are valid").expect("and whole");
    assert_eq!(taken, once.len());
    let mut twice = BytesMut::new();
    again.encode(version, &mut twice).expect("what was encoded once can be encoded again");
    assert_eq!(once, twice);
});

//! `sniff::classify`: bounded and prefix-monotone on any bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate_sniff::{PREFIX_BYTES_MAX, Verdict, classify};

fuzz_target!(|data: &[u8]| {
    let mut decided = None;
    for end in 0..=data.len().min(PREFIX_BYTES_MAX + 8) {
        let verdict = classify(&data[..end]);
        match (decided, verdict) {
            (Some(before), now) => assert_eq!(before, now, "a verdict changed when more bytes arrived"),
            (None, Verdict::Need(more)) => {
                assert!(more >= 1, "asks for nothing");
                assert!(end + more <= PREFIX_BYTES_MAX, "asks for more than the bound");
            }
            (None, now) => decided = Some(now),
        }
    }
});

//! Bearer tokens: any change to a token, and any bytes that are not one, are refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate_auth::{KeyId, Proto, SecretKey, Token, TokenKey};

fuzz_target!(|data: &[u8]| {
    let key = TokenKey::derive(&SecretKey::from_seed(&[7; 32]), 1);
    let token = Token {
        expires_unix: u32::MAX,
        device_index: 3,
        generation: 5,
        protocol_mask: Proto::Http.mask() | Proto::Coap.mask(),
        key_id: KeyId([9; 8]),
        random: [1, 2, 3, 4],
    };
    let sealed = key.seal(&token);
    assert!(key.verify(&sealed, Proto::Http, 0) == Ok(token));
    assert!(key.verify(&sealed, Proto::Mqtt, 0).is_err());

    let mut changed = sealed;
    for (byte, flip) in changed.iter_mut().zip(data) {
        *byte ^= flip;
    }
    assert_eq!(key.verify(&changed, Proto::Http, 0).is_ok(), changed == sealed);
    assert_eq!(key.verify(data, Proto::Http, 0).is_ok(), data == sealed);
    let _ = key.verify_text(data, Proto::Coap, u64::from(data.len() as u32));
});

//! JWTs from strangers: parsing and checking never panic; a token that we sign ourselves holds, and one with changed bytes does not.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate_auth::jwt::{Expected, Unverified, sign};
use tidegate_auth::{GatewayId, SecretKey};

fuzz_target!(|data: &[u8]| {
    let key = SecretKey::from_seed(&[7; 32]);
    let gateway_id = GatewayId::of(&SecretKey::from_seed(&[8; 32]).public());
    let expected =
        Expected { gateway_id: &gateway_id, now_unix: 1_795_132_800, clock_skew_secs: 60, life_secs_max: 86_400 };
    let Ok(jwt) = Unverified::parse(data) else { return };
    let _ = jwt.key_id();
    if jwt.check(&expected).is_ok() {
        assert_eq!(jwt.claims().iss, jwt.claims().sub);
    }
    let ours = sign(jwt.claims(), &key);
    // What is not too long to be taken at all is recognised as our own.
    if let Ok(again) = Unverified::parse(ours.as_bytes()) {
        assert!(again.is_signed_by(&key.public()));
        assert_eq!(again.check(&expected).is_ok(), jwt.check(&expected).is_ok());
        let mut forged = ours.into_bytes();
        let at = usize::from(data.first().copied().unwrap_or(0)) % forged.len();
        forged[at] ^= 1;
        // A flipped bit in the unused bits of the last base64url digit must not parse; elsewhere the signature must not hold.
        if let Ok(forged) = Unverified::parse(&forged) {
            assert!(!forged.is_signed_by(&key.public()), "signature holds after a change at {at}");
        }
    }
});

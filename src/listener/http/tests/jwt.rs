//! Routes for bearers of an identity provider's tokens. The tokens and keys are PyJWT's.

use super::relay::Pretend;
use super::*;

const KEYS: &str = include_str!("../../../../tests/data/jwt/jwks.json");
const TOKENS: &str = include_str!("../../../../tests/data/jwt/tokens.json");

#[tokio::test]
async fn the_providers_tokens_open_the_route_and_others_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("jwks.json");
    std::fs::write(&file, KEYS).unwrap();
    let upstream = Pretend::echo();
    let jwt = json!({ "issuer": "https://idp.example", "audiences": ["api"], "jwks_file": file });
    let routes = json!([{ "name": "r", "to": "cloud", "auth": "jwt", "jwt": jwt }]);
    let fixture = Fixture::routed(|_| {}, &[], routes, Some(upstream.clone()));
    let tokens: Value = serde_json::from_str(TOKENS).unwrap();
    let mut peer = fixture.connect();
    for (name, token) in tokens.as_object().unwrap() {
        let answer = peer.ask("GET", "/x", &bearer(token.as_str().unwrap()), b"").await;
        let expected = if name.starts_with("good") { 200 } else { 401 };
        assert_eq!(answer.status, expected, "{name}");
        if expected == 401 {
            let says = "Bearer realm=\"tidegate\", error=\"invalid_token\"";
            assert_eq!(answer.headers["www-authenticate"], says, "{name}");
        }
    }
    assert_eq!(upstream.count(), 3);
    let nothing = peer.ask("GET", "/x", "", b"").await;
    assert_eq!((nothing.status, nothing.headers["www-authenticate"].as_str()), (401, "Bearer realm=\"tidegate\""));
    let basic = peer.ask("GET", "/x", "authorization: Basic YTpi\r\n", b"").await;
    assert_eq!(basic.status, 401);

    // New keys are taken, and what is no set is not.
    let good = bearer(tokens["good_es256"].as_str().unwrap());
    let set_time = |secs| {
        let file = std::fs::File::options().write(true).open(&file).unwrap();
        file.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(secs)).unwrap();
    };
    std::fs::write(&file, "{}").unwrap();
    set_time(1);
    fixture.gateway.with_rules(|rules| rules.routes.refresh());
    assert_eq!(peer.ask("GET", "/x", &good, b"").await.status, 200);
    std::fs::write(&file, r#"{"keys":[{"kty":"oct","k":"MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE"}]}"#).unwrap();
    set_time(2);
    fixture.gateway.with_rules(|rules| rules.routes.refresh());
    assert_eq!(peer.ask("GET", "/x", &good, b"").await.status, 401);
}

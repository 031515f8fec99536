//! The `[identity]` table.

use serde::{Deserialize, Serialize};

/// How devices prove who they are, and for how long that holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Role of callers that show no credential at all. Empty: nobody gets in unauthenticated.
    pub anonymous_role: String,
    /// Life of a bearer token, in seconds. A request with an older one is answered 401, and the device logs in again.
    #[schemars(range(min = 10, max = 86400))]
    pub token_ttl_secs: u32,
    /// Life of a challenge, in seconds. An answer that comes later is refused.
    #[schemars(range(min = 5, max = 600))]
    pub challenge_ttl_secs: u32,
    /// Longest `exp - iat` of a JWT, in seconds. A longer one is refused.
    #[schemars(range(min = 60, max = 86400))]
    pub jwt_ttl_secs_max: u32,
    /// How far a device's clock may be ahead of ours, in seconds. A JWT issued later than that in our future is refused.
    #[schemars(range(min = 0, max = 3600))]
    pub clock_skew_secs: u32,
    /// Life of a login by MQTT 5 enhanced authentication, in seconds. Then the client re-authenticates, or is disconnected with 0x87.
    #[schemars(range(min = 60, max = 604800))]
    pub mqtt_login_ttl_secs: u32,
    /// JWTs remembered as used, over all devices, about 100 bytes each. When it is full, logins by JWT are refused until the oldest has expired.
    #[schemars(range(min = 1, max = 10000000))]
    pub jti_max: u32,
    /// The same for one device. When it is full, only this device's logins by JWT are refused.
    #[schemars(range(min = 1, max = 1000000))]
    pub jti_per_device_max: u32,
    /// Challenges remembered as used, over all devices, about 100 bytes each for `challenge_ttl_secs`. When it is full, logins by challenge are refused.
    #[schemars(range(min = 1, max = 10000000))]
    pub used_challenges_max: u32,
    /// The same for one device. When it is full, only this device's logins by challenge are refused.
    #[schemars(range(min = 1, max = 1000000))]
    pub used_challenges_per_device_max: u32,
    /// Signatures verified at once. One more login is refused as too fast, and the device comes back.
    #[schemars(range(min = 1, max = 1024))]
    pub verify_concurrency_max: u32,
    /// How often the registry is looked at for changes, in milliseconds: a revocation holds at most this much later.
    #[schemars(range(min = 50, max = 60000))]
    pub registry_poll_ms: u32,
    /// Whether an MQTT Client Identifier of the form projects/P/locations/L/registries/R/devices/DEVICE names the device, as in Google Cloud IoT Core;
    /// the Username is then not looked at.
    pub google_client_ids: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            anonymous_role: String::new(),
            token_ttl_secs: 900,
            challenge_ttl_secs: 60,
            jwt_ttl_secs_max: 86_400,
            clock_skew_secs: 60,
            mqtt_login_ttl_secs: 86_400,
            jti_max: 100_000,
            jti_per_device_max: 2_000,
            used_challenges_max: 65_536,
            used_challenges_per_device_max: 4_096,
            verify_concurrency_max: 16,
            registry_poll_ms: 250,
            google_client_ids: false,
        }
    }
}

//! `cache` of a `[[route]]`.

use serde::{Deserialize, Serialize};

use crate::units::ByteSize;

/// `cache`: answers to GET are kept and given again, by the rules of a shared cache (RFC 9111).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Seconds for which an answer that says nothing itself (no max-age, no Expires) is fresh; only 200, 203, 204, 300, 301 and 308. 0: such answers are
    /// not kept.
    #[schemars(range(min = 0, max = 31_536_000))]
    pub ttl_secs: u32,
    /// Seconds after it has become stale for which an answer is still given at once, while a new one is fetched behind it. What the answer itself says
    /// (`stale-while-revalidate`) comes before it, and `must-revalidate` forbids it.
    #[schemars(range(min = 0, max = 31_536_000))]
    pub stale_while_revalidate_secs: u32,
    /// Seconds after it has become stale for which an answer is still given when the upstream cannot be reached or answers 500, 502, 503 or 504. What the
    /// answer itself says (`stale-if-error`) comes before it, and `must-revalidate` forbids it.
    #[schemars(range(min = 0, max = 31_536_000))]
    pub stale_if_error_secs: u32,
    /// Seconds after such an error for which the stale answer is given without asking the upstream again.
    #[schemars(range(min = 0, max = 3_600))]
    pub stale_retry_secs: u32,
    /// The largest body that is kept. Larger ones pass through and are not.
    pub entry_bytes_max: ByteSize,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            ttl_secs: 0,
            stale_while_revalidate_secs: 0,
            stale_if_error_secs: 0,
            stale_retry_secs: 5,
            entry_bytes_max: ByteSize(64 << 10),
        }
    }
}

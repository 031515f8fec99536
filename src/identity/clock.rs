//! The two clocks of a login.

use std::time::{SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

/// One moment on both clocks; read once for a login and passed along, so that tests can choose it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Wall clock, for what other machines wrote down: JWTs, tokens, the validity of keys. On a Pi without network it may be wrong.
    pub unix_secs: u64,
    /// Seconds since the machine started, suspended time included; what challenges live by.
    pub boot_secs: u32,
}

impl Now {
    pub fn read() -> Self {
        let unix_secs = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        // CLOCK_BOOTTIME exists since Linux 2.6.39; were it to fail, every challenge would be as old as the first.
        let boot_secs = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| time.tv_sec());
        Now { unix_secs, boot_secs: u32::try_from(boot_secs).unwrap_or(u32::MAX) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_clocks_run() {
        let now = Now::read();
        assert!(now.unix_secs > 1_700_000_000);
        assert!(now.boot_secs > 0);
    }
}

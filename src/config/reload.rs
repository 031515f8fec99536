//! What a reload can change while the gateway runs, and what only a new start can.

use super::Config;

/// Keys that differ and are read once, at start.
pub fn needs_restart(old: &Config, new: &Config) -> Vec<&'static str> {
    let differs = [
        ("gateway", old.gateway != new.gateway),
        ("listener", old.listener != new.listener),
        ("admin", old.admin != new.admin),
        ("spool", old.spool != new.spool),
        ("upstream", old.upstream != new.upstream),
        ("forward", old.forward != new.forward),
        ("telemetry", old.telemetry != new.telemetry),
    ];
    differs.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_at_start_is_named_and_the_rest_is_not() {
        let old = Config::default();
        let mut new = old.clone();
        new.limits.connections_max += 1;
        new.identity.token_ttl_secs += 1;
        assert_eq!(needs_restart(&old, &new), [""; 0]);
        new.gateway.name = "another".into();
        new.admin.bind = "127.0.0.1:1".into();
        assert_eq!(needs_restart(&old, &new), ["gateway", "admin"]);
    }
}

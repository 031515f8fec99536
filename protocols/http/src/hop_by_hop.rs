//! Headers that concern one connection and must not be passed on (RFC 9110 section 7.6.1).

/// Always dropped by an intermediary, whether `Connection` names them or not. `Trailer` and `TE: trailers` stay: they describe the message.
pub const NAMES: [&str; 8] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
];

/// Fields that `Connection` must not be able to remove: dropping them would change what the message means or who it is from.
const PROTECTED: [&str; 6] = ["host", "content-length", "authorization", "forwarded", "x-forwarded-for", "cookie"];

/// Whether the header `name`, in lower case, ends at this hop by its name alone.
pub fn is_hop_by_hop(name: &str) -> bool {
    NAMES.contains(&name)
}

/// The names that a `Connection` header's value adds, in lower case; fields a peer must not strip are left out.
pub fn connection_options(value: &str) -> impl Iterator<Item = String> {
    value
        .split(',')
        .map(|name| name.trim().to_ascii_lowercase())
        .filter(|name| !name.is_empty() && !PROTECTED.contains(&name.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_names_further_headers_but_cannot_strip_what_matters() {
        let named: Vec<String> = connection_options("close, X-Debug ,, Authorization,content-length").collect();
        assert_eq!(named, ["close", "x-debug"]);
    }

    #[test]
    fn the_fixed_names_are_known() {
        assert!(is_hop_by_hop("transfer-encoding") && is_hop_by_hop("upgrade"));
        assert!(!is_hop_by_hop("trailer") && !is_hop_by_hop("te") && !is_hop_by_hop("host"));
    }
}

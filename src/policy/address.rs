//! The address filter: which networks may connect at all, before anything is read from them.

use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The `[address_filter]` table. Deny wins. An empty `allow` allows every address that is not denied.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Networks that may connect, such as `"192.168.0.0/16"` or `"2001:db8::/32"`; empty: every network. Others are closed at accept.
    pub allow: Vec<Network>,
    /// Networks that may not, whatever `allow` says.
    pub deny: Vec<Network>,
}

/// An IPv4 or IPv6 network in CIDR notation; an address alone is a network of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

/// Why a text is not a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidNetwork;

impl std::fmt::Display for InvalidNetwork {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("not a network such as \"192.168.0.0/16\", \"10.1.2.3\" or \"2001:db8::/32\" with no bits set beyond the prefix")
    }
}

impl std::error::Error for InvalidNetwork {}

impl Network {
    /// An IPv4 address mapped into IPv6 counts as the IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                prefix(own.to_bits().into(), 32, self.bits) == prefix(other.to_bits().into(), 32, self.bits)
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                prefix(own.to_bits(), 128, self.bits) == prefix(other.to_bits(), 128, self.bits)
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

/// The upper `bits` of a number of `width` bits.
fn prefix(number: u128, width: u8, bits: u8) -> u128 {
    number.checked_shr(u32::from(width - bits)).unwrap_or(0)
}

impl FromStr for Network {
    type Err = InvalidNetwork;

    fn from_str(text: &str) -> Result<Self, InvalidNetwork> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let written: IpAddr = address.trim().parse().map_err(|_| InvalidNetwork)?;
        let written_width = if written.is_ipv4() { 32 } else { 128 };
        let bits: u8 = match bits {
            None => written_width,
            Some(b) if !b.is_empty() && b.bytes().all(|b| b.is_ascii_digit()) => {
                b.parse().map_err(|_| InvalidNetwork)?
            }
            Some(_) => return Err(InvalidNetwork),
        };
        if bits > written_width {
            return Err(InvalidNetwork);
        }
        let address = written.to_canonical();
        // A mapped network narrower than all of IPv4 is an IPv4 network; a wider one would mean something else than it says.
        let bits = match (written, address) {
            (IpAddr::V6(_), IpAddr::V4(_)) => bits.checked_sub(96).ok_or(InvalidNetwork)?,
            _ => bits,
        };
        let (number, width) = match address {
            IpAddr::V4(v4) => (u128::from(v4.to_bits()), 32),
            IpAddr::V6(v6) => (v6.to_bits(), 128),
        };
        // `10.0.0.1/8` is usually a slip of the pen, and guessing which half is meant is not for a filter.
        let kept = prefix(number, width, bits).checked_shl(u32::from(width - bits)).unwrap_or(0);
        if kept != number {
            return Err(InvalidNetwork);
        }
        Ok(Network { address, bits })
    }
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

impl Serialize for Network {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|error| serde::de::Error::custom(format!("{text:?} is {error}")))
    }
}

impl schemars::JsonSchema for Network {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Network".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "format": "cidr" })
    }
}

impl Config {
    pub fn permits(&self, address: IpAddr) -> bool {
        let listed = |networks: &[Network]| networks.iter().any(|network| network.contains(address));
        !listed(&self.deny) && (self.allow.is_empty() || listed(&self.allow))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn network(text: &str) -> Network {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn deny_wins_and_an_empty_allow_means_everybody() {
        let open = Config { allow: vec![], deny: vec![network("10.0.0.0/8")] };
        assert!(open.permits(ip("192.0.2.1")));
        assert!(!open.permits(ip("10.1.2.3")));
        let closed =
            Config { allow: vec![network("10.0.0.0/8"), network("2001:db8::/32")], deny: vec![network("10.9.0.0/16")] };
        assert!(closed.permits(ip("10.1.2.3")));
        assert!(!closed.permits(ip("10.9.2.3")));
        assert!(!closed.permits(ip("192.0.2.1")));
        assert!(closed.permits(ip("2001:db8:1::1")));
        assert!(!closed.permits(ip("2001:db9::1")));
    }

    #[test]
    fn a_mapped_address_is_the_address_it_maps() {
        assert!(network("192.0.2.0/24").contains(ip("::ffff:192.0.2.7")));
        assert!(network("::ffff:192.0.2.0/120").contains(ip("192.0.2.7")));
        assert!(!network("::/0").contains(ip("::ffff:192.0.2.7")));
        assert!(network("0.0.0.0/0").contains(ip("::ffff:192.0.2.7")));
    }

    #[test]
    fn the_whole_width_and_no_width_work() {
        assert!(network("10.1.2.3").contains(ip("10.1.2.3")));
        assert!(!network("10.1.2.3").contains(ip("10.1.2.4")));
        assert!(network("0.0.0.0/0").contains(ip("255.255.255.255")));
        assert!(network("::/0").contains(ip("ffff::1")));
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            "",
            "10",
            "10.0.0.0/33",
            "10.0.0.1/8",
            "::1/64",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "10.0.0.0/-1",
            "::ffff:0:0/64",
            "a/b",
        ] {
            assert_eq!(bad.parse::<Network>(), Err(InvalidNetwork), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_network_contains_exactly_the_addresses_with_its_prefix(own: u32, other: u32, bits in 0u8..=32) {
            let keep = |n: u32| if bits == 0 { 0 } else { n >> (32 - bits) << (32 - bits) };
            let base = std::net::Ipv4Addr::from_bits(keep(own));
            let network = network(&format!("{base}/{bits}"));
            prop_assert_eq!(network.contains(std::net::Ipv4Addr::from_bits(other).into()), keep(own) == keep(other));
            prop_assert_eq!(network.to_string().parse::<Network>(), Ok(network));
        }
    }
}

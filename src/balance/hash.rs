//! Stable hashes: the same on every machine, in every version, after every restart, for they decide where a key lives.

/// FNV-1a with a finaliser, for names and keys.
pub fn text(text: &str) -> u64 {
    bytes(text.as_bytes())
}

/// FNV-1a with a finaliser.
pub fn bytes(bytes: &[u8]) -> u64 {
    let fold = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01B3);
    mix(bytes.iter().fold(0xCBF2_9CE4_8422_2325, fold))
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit of the input reaches every bit of the output.
pub(super) const fn mix(number: u64) -> u64 {
    let z = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A number in (0, 1] from the upper 53 bits.
pub(super) fn unit(number: u64) -> f64 {
    ((number >> 11) as f64 + 1.0) / (1u64 << 53) as f64
}

//! Quantities as an operator writes them: byte sizes, ages, rates.
//!
//! Each type parses from and displays as the text of the configuration, so that what is printed can be pasted back.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes: `"1GiB"`, `"64KiB"`, `"500kB"`, or a bare integer. 1 KiB = 1024 bytes, 1 kB = 1000 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct ByteSize(pub u64);

/// A length of time in words: `"90s"`, `"15m"`, `"12h"`, `"7d"`, `"250ms"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Age(pub Duration);

/// A token bucket: `"100/s burst 200"`, `"30/m"`, `"2/h burst 5"`. Without `burst` the burst equals one period's tokens (at least 1).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// Tokens per period, at least 1.
    pub count: u32,
    pub period: Period,
    /// Bucket depth in tokens, at least 1.
    pub burst: u32,
}

/// A sliding window: `"100/m sliding"`. In any minute, wherever it begins, at most 100.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlidingRate {
    /// Per period, at least 1.
    pub count: u32,
    pub period: Period,
}

/// One or the other: `"100/m burst 20"`, `"100/m sliding"`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Quota {
    Bucket(Rate),
    Sliding(SlidingRate),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Period {
    Second,
    Minute,
    Hour,
}

/// Why a quantity was not understood; `Display` says what would be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidQuantity {
    pub text: String,
    pub allowed: &'static str,
}

impl fmt::Display for InvalidQuantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is not {}", self.text, self.allowed)
    }
}

impl std::error::Error for InvalidQuantity {}

impl ByteSize {
    pub const ALLOWED: &'static str = "a size such as 65536, \"64KiB\", \"1MiB\" or \"1GiB\"";

    pub fn bytes(self) -> u64 {
        self.0
    }

    /// As the size of something in memory: what this machine cannot address is as good as unbounded.
    pub fn in_memory(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl FromStr for ByteSize {
    type Err = InvalidQuantity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = || InvalidQuantity { text: text.to_owned(), allowed: Self::ALLOWED };
        let trimmed = text.trim();
        let digits = trimmed.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = trimmed[..digits].parse().map_err(|_| refuse())?;
        let factor: u64 = match trimmed[digits..].trim_start() {
            "" | "B" => 1,
            "kB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "TB" => 1_000_000_000_000,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "TiB" => 1 << 40,
            _ => return Err(refuse()),
        };
        number.checked_mul(factor).map(ByteSize).ok_or_else(refuse)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, factor) in [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
            if self.0 >= factor && self.0.is_multiple_of(factor) {
                return write!(f, "{}{unit}", self.0 / factor);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl Age {
    pub const ALLOWED: &'static str = "a length of time such as \"250ms\", \"90s\", \"15m\", \"12h\" or \"7d\"";

    pub const fn from_secs(secs: u64) -> Self {
        Age(Duration::from_secs(secs))
    }
}

impl FromStr for Age {
    type Err = InvalidQuantity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = || InvalidQuantity { text: text.to_owned(), allowed: Self::ALLOWED };
        let trimmed = text.trim();
        let digits = trimmed.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = trimmed[..digits].parse().map_err(|_| refuse())?;
        let secs = |factor: u64| number.checked_mul(factor).map(Duration::from_secs).ok_or_else(refuse);
        match trimmed[digits..].trim_start() {
            "ms" => Ok(Age(Duration::from_millis(number))),
            "s" => secs(1).map(Age),
            "m" => secs(60).map(Age),
            "h" => secs(3600).map(Age),
            "d" => secs(86_400).map(Age),
            _ => Err(refuse()),
        }
    }
}

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secs = self.0.as_secs();
        if self.0.subsec_millis() != 0 {
            return write!(f, "{}ms", self.0.as_millis());
        }
        for (unit, factor) in [("d", 86_400), ("h", 3600), ("m", 60)] {
            if secs >= factor && secs.is_multiple_of(factor) {
                return write!(f, "{}{unit}", secs / factor);
            }
        }
        write!(f, "{secs}s")
    }
}

impl Rate {
    pub const ALLOWED: &'static str = "a rate such as \"100/s\", \"100/s burst 200\", \"30/m\" or \"2/h\"";

    pub const fn per_second(count: u32, burst: u32) -> Self {
        Rate { count, period: Period::Second, burst }
    }

    /// Nanoseconds between two tokens (the emission interval of GCRA), at least 1.
    pub fn nanos_per_token(self) -> u64 {
        let period = u64::try_from(self.period.duration().as_nanos()).unwrap_or(u64::MAX);
        (period / u64::from(self.count.max(1))).max(1)
    }
}

impl Quota {
    pub const ALLOWED: &'static str =
        "a rate such as \"100/s\", \"100/s burst 200\", \"30/m\" or \"2/h\", or \"30/m sliding\"";
}

impl FromStr for Quota {
    type Err = InvalidQuantity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some(rate) = text.trim_end().strip_suffix("sliding").filter(|rate| rate.ends_with(char::is_whitespace))
        else {
            let refuse = |InvalidQuantity { text, .. }| InvalidQuantity { text, allowed: Self::ALLOWED };
            return text.parse().map(Quota::Bucket).map_err(refuse);
        };
        match rate.parse::<Rate>() {
            // A window has no depth of its own.
            Ok(Rate { count, period, .. }) if !rate.contains("burst") => {
                Ok(Quota::Sliding(SlidingRate { count, period }))
            }
            _ => Err(InvalidQuantity { text: text.to_owned(), allowed: Self::ALLOWED }),
        }
    }
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Quota::Bucket(rate) => rate.fmt(f),
            Quota::Sliding(SlidingRate { count, period }) => write!(f, "{count}/{} sliding", period.letter()),
        }
    }
}

impl Period {
    const fn letter(self) -> &'static str {
        match self {
            Period::Second => "s",
            Period::Minute => "m",
            Period::Hour => "h",
        }
    }

    pub const fn duration(self) -> Duration {
        match self {
            Period::Second => Duration::from_secs(1),
            Period::Minute => Duration::from_secs(60),
            Period::Hour => Duration::from_secs(3600),
        }
    }
}

impl FromStr for Rate {
    type Err = InvalidQuantity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = || InvalidQuantity { text: text.to_owned(), allowed: Self::ALLOWED };
        let mut words = text.split_whitespace();
        let (count, period) = words.next().and_then(|w| w.split_once('/')).ok_or_else(refuse)?;
        let count: u32 = count.parse().map_err(|_| refuse())?;
        let period = match period {
            "s" => Period::Second,
            "m" => Period::Minute,
            "h" => Period::Hour,
            _ => return Err(refuse()),
        };
        let burst = match (words.next(), words.next(), words.next()) {
            (None, _, _) => count,
            (Some("burst"), Some(burst), None) => burst.parse().map_err(|_| refuse())?,
            _ => return Err(refuse()),
        };
        if count == 0 || burst == 0 {
            return Err(refuse());
        }
        Ok(Rate { count, period, burst })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} burst {}", self.count, self.period.letter(), self.burst)
    }
}

/// Text in the configuration: parsed on the way in, displayed on the way out, described for the JSON schema.
macro_rules! text_in_config {
    ($type:ty, $schema:expr) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl schemars::JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                $schema
            }
        }
    };
}

text_in_config!(
    ByteSize,
    schemars::json_schema!({ "type": ["string", "integer"], "format": "byte-size", "minimum": 0 })
);
text_in_config!(Age, schemars::json_schema!({ "type": "string", "format": "age" }));
text_in_config!(Rate, schemars::json_schema!({ "type": "string", "format": "rate" }));
text_in_config!(Quota, schemars::json_schema!({ "type": "string", "format": "quota" }));

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u64),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(bytes) => Ok(ByteSize(bytes)),
            Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

impl<'de> Deserialize<'de> for Age {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Quota {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A day of the civil calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    pub year: u64,
    /// 1 to 12.
    pub month: u64,
    /// 1 to 31.
    pub day: u64,
}

impl Date {
    /// The day so many days after 1970-01-01 (H. Hinnant, "chrono-compatible low-level date algorithms").
    pub const fn from_days(days: u64) -> Date {
        // Days since 0000-03-01, in eras of 400 years.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        let year = year_of_era + era * 400 + if month <= 2 { 1 } else { 0 };
        Date { year, month, day: day_of_year - (153 * shifted_month + 2) / 5 + 1 }
    }

    /// Days since 1970-01-01; none for a day that does not exist or lies outside of 1970 to 9999.
    pub fn days(self) -> Option<u64> {
        let Date { year, month, day } = self;
        if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
            return None;
        }
        let shifted_year = year - u64::from(month <= 2);
        let (era, year_of_era) = (shifted_year / 400, shifted_year % 400);
        let shifted_month = if month > 2 { month - 3 } else { month + 9 };
        let day_of_year = (153 * shifted_month + 2) / 5 + day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        // The 31st of a month of 30 days reads as the 1st of the next.
        (Date::from_days(days) == self).then_some(days)
    }
}

/// Milliseconds since 1970 as RFC 3339 in UTC.
pub fn rfc3339(ms: u64) -> String {
    let (secs, millis) = (ms / 1000, ms % 1000);
    let Date { year, month, day } = Date::from_days(secs / 86_400);
    let (hour, minute, second) = (secs / 3600 % 24, secs / 60 % 60, secs % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_quantity_displays_as_text_that_parses_to_itself() {
        for text in ["0", "1", "64KiB", "1GiB", "3TiB", "1025"] {
            let size: ByteSize = text.parse().unwrap();
            assert_eq!(size.to_string(), text);
        }
        for text in ["250ms", "90s", "15m", "12h", "7d"] {
            let age: Age = text.parse().unwrap();
            assert_eq!(age.to_string(), text);
        }
        for text in ["100/s burst 200", "30/m burst 30", "2/h burst 5"] {
            let rate: Rate = text.parse().unwrap();
            assert_eq!(rate.to_string(), text);
        }
        for text in ["100/s burst 200", "30/m sliding"] {
            let quota: Quota = text.parse().unwrap();
            assert_eq!(quota.to_string(), text);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "GiB", "-1", "1XB", "99999999999TiB", "1.5GiB"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        for text in ["", "7", "d", "1y", "99999999999999999999d"] {
            assert!(text.parse::<Age>().is_err(), "{text}");
        }
        for text in ["", "10", "10/d", "0/s", "1/s burst 0", "1/s burst", "1/s burst 2 3", "-1/s"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
            assert!(text.parse::<Quota>().is_err(), "{text}");
        }
        for text in ["30/msliding", "sliding", " sliding", "30/m burst 5 sliding", "0/m sliding", "30/m sliding 5"] {
            assert!(text.parse::<Quota>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_rate_knows_the_time_between_two_tokens() {
        assert_eq!("100/s".parse::<Rate>().unwrap().nanos_per_token(), 10_000_000);
        assert_eq!("30/m".parse::<Rate>().unwrap().nanos_per_token(), 2_000_000_000);
    }

    #[test]
    fn times_are_written_as_rfc_3339_has_them() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_795_132_800_123, "2026-11-20T00:00:00.123Z"),
            (4_107_542_399_999, "2100-02-28T23:59:59.999Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(ms), text);
        }
    }
    #[test]
    fn a_day_that_does_not_exist_has_no_number() {
        for (year, month, day) in
            [(2026, 2, 29), (2026, 4, 31), (2026, 13, 1), (2026, 0, 1), (2026, 1, 0), (1969, 12, 31)]
        {
            assert_eq!(Date { year, month, day }.days(), None, "{year}-{month}-{day}");
        }
        assert_eq!(Date { year: 2026, month: 11, day: 20 }.days(), Some(20_777));
    }

    #[test]
    fn every_day_reads_back() {
        for days in 0..2_932_897 {
            assert_eq!(Date::from_days(days).days(), Some(days));
        }
        assert_eq!(Date::from_days(2_932_896), Date { year: 9999, month: 12, day: 31 });
    }
}

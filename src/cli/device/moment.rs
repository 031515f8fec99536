//! Moments for people: RFC 3339 in UTC, and the unix seconds behind it.

use crate::units::Date;

/// Reads `2026-11-20`, `2026-11-20T08:00:00Z`, or unix seconds.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let wrong = || "allowed: 2026-11-20, 2026-11-20T08:00:00Z, or unix seconds".to_owned();
    if let Ok(seconds) = text.parse() {
        return Ok(seconds);
    }
    let (date, time) = match text.split_once('T') {
        Some((date, time)) => (date, time.strip_suffix('Z').ok_or_else(wrong)?),
        None => (text, "00:00:00"),
    };
    let [year, month, day] = numbers(date, '-', [4, 2, 2]).ok_or_else(wrong)?;
    let [hour, minute, second] = numbers(time, ':', [2, 2, 2]).ok_or_else(wrong)?;
    if hour > 23 || minute > 59 || second > 59 {
        return Err(wrong());
    }
    let days = Date { year, month, day }.days().ok_or_else(wrong)?;
    Ok(days * 86_400 + hour * 3_600 + minute * 60 + second)
}

/// Writes unix seconds as `2026-11-20T08:00:00Z`.
pub(in crate::cli) fn format(unix: u64) -> String {
    let rest = unix % 86_400;
    let Date { year, month, day } = Date::from_days(unix / 86_400);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3_600, rest / 60 % 60, rest % 60)
}

/// Exactly three numbers of exactly these digits.
fn numbers(text: &str, separator: char, digits: [usize; 3]) -> Option<[u64; 3]> {
    let mut numbers = [0; 3];
    let mut parts = text.split(separator);
    for (number, digits) in numbers.iter_mut().zip(digits) {
        let part = parts.next().filter(|part| part.len() == digits && part.bytes().all(|b| b.is_ascii_digit()))?;
        *number = part.parse().ok()?;
    }
    parts.next().is_none().then_some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_moments_are_read_and_written() {
        for (text, unix) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2000-02-29T23:59:59Z", 951_868_799),
            ("2026-11-20T00:00:00Z", 1_795_132_800),
            ("2100-03-01T00:00:00Z", 4_107_542_400),
        ] {
            assert_eq!(parse(text), Ok(unix));
            assert_eq!(format(unix), text);
        }
        assert_eq!(parse("2026-11-20"), Ok(1_795_132_800));
        assert_eq!(parse("17"), Ok(17));
    }

    #[test]
    fn what_is_no_moment_is_refused() {
        for bad in [
            "",
            "2026-13-01",
            "2026-02-29",
            "2026-11-20T24:00:00Z",
            "2026-11-20T00:00:00",
            "1969-12-31",
            "26-1-1",
            "-5",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_moment_reads_back(unix in 0u64..253_402_300_800) {
            prop_assert_eq!(parse(&format(unix)), Ok(unix));
        }
    }
}

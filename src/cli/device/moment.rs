//! Moments for people: RFC 3339 in UTC, and the unix seconds behind it.

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
    let days = days_since_1970(year, month, day).ok_or_else(wrong)?;
    Ok(days * 86_400 + hour * 3_600 + minute * 60 + second)
}

/// Writes unix seconds as `2026-11-20T08:00:00Z`.
pub(in crate::cli) fn format(unix: u64) -> String {
    let (days, rest) = (unix / 86_400, unix % 86_400);
    let (year, month, day) = date(days);
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

const fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

const fn days_in(year: u64, month: u64) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Leap days before the first of January of `year`, counted from year 0.
const fn leap_days_before(year: u64) -> u64 {
    let last = year - 1;
    last / 4 - last / 100 + last / 400
}

fn days_since_1970(year: u64, month: u64, day: u64) -> Option<u64> {
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=days_in(year, month)).contains(&day) {
        return None;
    }
    let before_year = (year - 1970) * 365 + leap_days_before(year) - leap_days_before(1970);
    let before_month: u64 = (1..month).map(|month| days_in(year, month)).sum();
    Some(before_year + before_month + day - 1)
}

fn date(mut days: u64) -> (u64, u64, u64) {
    // 400 years have 146,097 days; the rest is a short walk.
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let mut month = 1;
    while days >= days_in(year, month) {
        days -= days_in(year, month);
        month += 1;
    }
    (year, month, days + 1)
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

//! Quantities and tables for people.

use comfy_table::{Table, presets};

/// A table without lines.
pub fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    // The padding of the first column would indent every line.
    table.trim_fmt().lines().map(|line| format!("{}\n", line.strip_prefix(' ').unwrap_or(line))).collect()
}

/// `512 B`, `1.5 KiB`, `20 MiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut scaled = count as f64 / 1024.0;
    let mut unit = 0;
    while scaled >= 1023.5 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(scaled < 9.95);
    format!("{scaled:.digits$} {}", UNITS.get(unit).unwrap_or(&"TiB"))
}

/// `12 s`, `3 min 5 s`, `2 h 7 min`, `5 d 3 h`.
pub fn duration(secs: u64) -> String {
    let two = |big: u64, big_unit: &str, small: u64, small_unit: &str| match small {
        0 => format!("{big} {big_unit}"),
        _ => format!("{big} {big_unit} {small} {small_unit}"),
    };
    match secs {
        0..60 => format!("{secs} s"),
        60..3_600 => two(secs / 60, "min", secs % 60, "s"),
        3_600..86_400 => two(secs / 3_600, "h", secs / 60 % 60, "min"),
        _ => two(secs / 86_400, "d", secs / 3_600 % 24, "h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_rounded_to_what_fits_a_column() {
        let cases = [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (20 << 20, "20 MiB"), ((1 << 20) - 1, "1.0 MiB")];
        for (count, text) in cases {
            assert_eq!(bytes(count), text);
        }
        assert_eq!(bytes(u64::MAX), "16777216 TiB");
    }

    #[test]
    fn durations_have_two_units_at_most() {
        for (secs, text) in [(0, "0 s"), (60, "1 min"), (185, "3 min 5 s"), (7_620, "2 h 7 min"), (442_800, "5 d 3 h")]
        {
            assert_eq!(duration(secs), text);
        }
    }

    #[test]
    fn a_table_begins_at_the_margin() {
        let text = table(["A", "B"], [["1".to_owned(), "22".to_owned()]]);
        assert!(text.lines().all(|line| !line.starts_with(' ')), "{text:?}");
        assert!(text.contains("22\n"));
    }
}

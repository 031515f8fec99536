//! What was measured, as a Markdown table with the ratio last, and as JSON.

use std::fmt::Write;

use serde_json::{Value, json};

/// One run of one load against one server.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Units of work done within `seconds`: requests, delivered messages, connections.
    pub units: u64,
    pub seconds: f64,
    pub cpu_seconds: f64,
    pub p99_us: Option<f64>,
    pub pss_bytes: Option<u64>,
    /// Units that were acknowledged and never arrived.
    pub lost: Option<u64>,
    /// What else is worth a word, e.g. `errors 3`.
    pub notes: Vec<String>,
}

/// The figures of one server under one load: the median of its runs.
#[derive(Clone, Debug)]
pub struct Row {
    pub load: String,
    pub server: String,
    pub outcome: Result<Figures, String>,
    /// Tidegate's figure divided by this server's, and what it may be at most.
    pub ratio: Option<f64>,
    pub bar: Option<f64>,
}

#[derive(Clone, Debug, Default)]
pub struct Figures {
    pub cpu_us: f64,
    pub per_second: f64,
    pub cpu_percent: f64,
    pub p99_us: Option<f64>,
    pub pss_bytes: Option<f64>,
    pub lost: Option<u64>,
    pub notes: Vec<String>,
    /// The spread of `cpu_us` over the runs, in parts of the median.
    pub spread: f64,
}

impl Figures {
    pub fn of(samples: &[Sample]) -> Option<Figures> {
        if samples.iter().all(|sample| sample.units == 0) {
            return None;
        }
        let each = |figure: &dyn Fn(&Sample) -> f64| median(samples.iter().map(figure).collect());
        let optional = |figure: &dyn Fn(&Sample) -> Option<f64>| {
            let values: Vec<f64> = samples.iter().filter_map(figure).collect();
            (!values.is_empty()).then(|| median(values))
        };
        let cpu_us = |sample: &Sample| sample.cpu_seconds * 1e6 / (sample.units.max(1) as f64);
        let middle = each(&cpu_us);
        let (least, most) = samples
            .iter()
            .map(cpu_us)
            .fold((f64::MAX, 0.0_f64), |(least, most), value| (least.min(value), most.max(value)));
        let mut notes: Vec<String> = samples.iter().flat_map(|sample| sample.notes.clone()).collect();
        notes.sort();
        notes.dedup();
        Some(Figures {
            cpu_us: middle,
            per_second: each(&|sample| sample.units as f64 / sample.seconds),
            cpu_percent: each(&|sample| sample.cpu_seconds * 100.0 / sample.seconds),
            p99_us: optional(&|sample| sample.p99_us),
            pss_bytes: optional(&|sample| sample.pss_bytes.map(|bytes| bytes as f64)),
            lost: samples.iter().filter_map(|sample| sample.lost).max(),
            notes,
            spread: if middle > 0.0 { (most - least) / middle } else { 0.0 },
        })
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.get((values.len().max(1) - 1) / 2), values.get(values.len() / 2));
    low.zip(high).map_or(f64::NAN, |(low, high)| f64::midpoint(*low, *high))
}

/// Everything that was measured in this run.
#[derive(Default)]
pub struct Report {
    sections: Vec<Section>,
}

pub struct Section {
    pub title: String,
    /// What a unit of work is.
    pub unit: &'static str,
    pub rows: Vec<Row>,
    /// Sentences below the table: missing peers, limits of the method.
    pub remarks: Vec<String>,
    /// Single figures with a bar, `(what, figure, bar)`; the figure is formatted.
    pub facts: Vec<Fact>,
}

/// A figure that stands by itself.
#[derive(Clone, Debug)]
pub struct Fact {
    pub what: String,
    pub server: String,
    pub value: f64,
    pub unit: &'static str,
    /// At most, or at least.
    pub bar: Option<(Ordering, f64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ordering {
    AtMost,
    AtLeast,
}

impl Section {
    pub fn new(title: &str, unit: &'static str) -> Self {
        Section { title: title.to_owned(), unit, rows: Vec::new(), remarks: Vec::new(), facts: Vec::new() }
    }

    /// Notes something that could not be measured at all.
    pub fn fail(&mut self, load: &str, server: &str, why: String) {
        let (load, server) = (load.to_owned(), server.to_owned());
        self.rows.push(Row { load, server, outcome: Err(why), ratio: None, bar: None });
    }

    pub fn failed(&self) -> bool {
        self.rows.iter().any(|row| row.outcome.is_err())
    }

    pub fn to_markdown(&self) -> String {
        let mut text = format!("\n### {}\n", self.title);
        if !self.rows.is_empty() {
            writeln!(
                text,
                "\n| load | server | CPU us per {} | per second | server CPU | p99 ms | PSS MB | lost | notes | Tidegate / this | bar |",
                self.unit
            )
            .ok();
            text.push_str("|---|---|---|---|---|---|---|---|---|---|---|\n");
        }
        for row in &self.rows {
            writeln!(text, "{}", row.to_markdown()).ok();
        }
        if !self.facts.is_empty() {
            text.push_str("\n| figure | server | value | bar |\n|---|---|---|---|\n");
        }
        for fact in &self.facts {
            writeln!(text, "{}", fact.to_markdown()).ok();
        }
        for remark in &self.remarks {
            writeln!(text, "\n{remark}").ok();
        }
        text
    }

    fn to_json(&self) -> Value {
        json!({
            "title": self.title,
            "unit": self.unit,
            "rows": self.rows.iter().map(Row::to_json).collect::<Vec<_>>(),
            "facts": self.facts.iter().map(Fact::to_json).collect::<Vec<_>>(),
            "remarks": self.remarks,
        })
    }
}

impl Row {
    fn to_markdown(&self) -> String {
        let (load, server) = (&self.load, &self.server);
        let figures = match &self.outcome {
            Ok(figures) => figures,
            Err(why) => {
                return format!("| {load} | {server} | failed: {} | | | | | | | | |", why.replace(['\n', '|'], " "));
            }
        };
        let maybe =
            |value: Option<f64>, digits: usize| value.map_or(String::new(), |value| format!("{value:.digits$}"));
        format!(
            "| {load} | {server} | {:.2} (±{:.0} %) | {} | {:.0} % | {} | {} | {} | {} | {} | {} |",
            figures.cpu_us,
            figures.spread * 50.0,
            thousands(figures.per_second),
            figures.cpu_percent,
            maybe(figures.p99_us.map(|us| us / 1_000.0), 2),
            maybe(figures.pss_bytes.map(|bytes| bytes / 1e6), 1),
            figures.lost.map_or(String::new(), |lost| lost.to_string()),
            figures.notes.join(", "),
            self.ratio.map_or(String::new(), |ratio| format!("**{ratio:.2}**")),
            verdict(self.ratio, self.bar.map(|bar| (Ordering::AtMost, bar)), 2),
        )
    }

    fn to_json(&self) -> Value {
        let mut value = json!({ "load": self.load, "server": self.server, "ratio": self.ratio, "ratio_max": self.bar });
        match &self.outcome {
            Ok(figures) => {
                value["cpu_us"] = json!(figures.cpu_us);
                value["per_second"] = json!(figures.per_second);
                value["cpu_percent"] = json!(figures.cpu_percent);
                value["p99_us"] = json!(figures.p99_us);
                value["pss_bytes"] = json!(figures.pss_bytes);
                value["lost"] = json!(figures.lost);
                value["spread"] = json!(figures.spread);
                value["notes"] = json!(figures.notes);
            }
            Err(why) => value["failed"] = json!(why),
        }
        value
    }
}

impl Fact {
    fn to_markdown(&self) -> String {
        let digits = if self.value.abs() >= 100.0 { 0 } else { 2 };
        format!(
            "| {} | {} | {:.digits$} {} | {} |",
            self.what,
            self.server,
            self.value,
            self.unit,
            verdict(Some(self.value), self.bar, digits)
        )
    }

    fn to_json(&self) -> Value {
        let bar = self.bar.map(|(ordering, value)| json!({ "at_most": ordering == Ordering::AtMost, "value": value }));
        json!({ "what": self.what, "server": self.server, "value": self.value, "unit": self.unit, "bar": bar })
    }
}

/// The bar, and whether the value keeps it.
fn verdict(value: Option<f64>, bar: Option<(Ordering, f64)>, digits: usize) -> String {
    let (Some(value), Some((ordering, bar))) = (value, bar) else { return String::new() };
    let (sign, met) = match ordering {
        Ordering::AtMost => ("<=", value <= bar),
        Ordering::AtLeast => (">=", value >= bar),
    };
    format!("{sign} {bar:.digits$} {}", if met { "met" } else { "MISSED" })
}

fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

impl Report {
    pub fn add(&mut self, section: Section) {
        print!("{}", section.to_markdown());
        self.sections.push(section);
    }

    pub fn failed(&self) -> bool {
        self.sections.iter().any(Section::failed)
    }

    pub fn to_json(&self, machine: &str) -> Value {
        json!({ "machine": machine, "sections": self.sections.iter().map(Section::to_json).collect::<Vec<_>>() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_medians_of_the_runs() {
        let run =
            |cpu_seconds| Sample { units: 1_000_000, seconds: 2.0, cpu_seconds, lost: Some(3), ..Sample::default() };
        let figures = Figures::of(&[run(1.0), run(3.0), run(1.5)]).unwrap();
        assert_eq!((figures.cpu_us, figures.per_second, figures.lost), (1.5, 500_000.0, Some(3)));
        assert_eq!(Figures::of(&[run(1.0), run(2.0)]).unwrap().cpu_us, 1.5);
        assert!(Figures::of(&[Sample::default()]).is_none());
    }

    #[test]
    fn a_bar_says_whether_it_is_met() {
        assert_eq!(verdict(Some(0.2), Some((Ordering::AtMost, 0.2)), 2), "<= 0.20 met");
        assert_eq!(verdict(Some(19.0), Some((Ordering::AtLeast, 20.0)), 0), ">= 20 MISSED");
        assert_eq!(verdict(None, Some((Ordering::AtMost, 1.0)), 0), "");
        assert_eq!(thousands(1_234_567.0), "1,234,567");
    }
}

//! `tidegate check`.

use super::{Context, Exit, Failure};

pub fn run(context: &Context) -> Result<(), Failure> {
    let inputs = context.inputs()?;
    let path = inputs.path.as_deref().map(|p| p.display().to_string()).unwrap_or_default();
    let (report, good) = match crate::config::load(&inputs) {
        Ok(loaded) => (loaded.report, true),
        Err(report) => (report, false),
    };
    context.print_report(&report)?;
    if !context.json {
        let count = |n: usize, one: &str| format!("{n} {one}{}", if n == 1 { "" } else { "s" });
        let found = format!("{}, {}", count(report.errors(), "error"), count(report.warnings(), "warning"));
        match (good, report.warnings()) {
            (true, 0) => context.print(&format!("{path}: well\n"))?,
            (true, _) => context.print(&format!("{path}: usable, {found}\n"))?,
            (false, _) => context.print(&format!("{path}: {found}\n"))?,
        }
    }
    if good { Ok(()) } else { Err(Failure::silent(Exit::Input)) }
}

//! What it costs to be there: memory of the idle process, size of the binary.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::Result;
use crate::compare::{Contender, Options};
use crate::folder::Folder;
use crate::mqtt;
use crate::peers::Peer;
use crate::report::{Fact, Ordering, Section};

pub fn run(options: &Options) -> Section {
    let mut section = Section::new("Idle", "");
    for contender in options.contenders(&[Peer::Mosquitto, Peer::Nginx], &mut section) {
        let is_own = matches!(contender, Contender::Tidegate { .. });
        match footprint(&contender) {
            Ok((pss, rss)) => {
                let mut fact = |what: &str, value, bar| {
                    section.facts.push(Fact {
                        what: what.into(),
                        server: contender.name().into(),
                        value,
                        unit: "MB",
                        bar,
                    });
                };
                fact("PSS, all protocols on", pss as f64 / 1e6, is_own.then_some((Ordering::AtMost, 8.0)));
                fact("RSS", rss as f64 / 1e6, None);
            }
            Err(error) => section.fail("idle process", contender.name(), error.to_string()),
        }
    }
    for (label, binary) in &options.builds {
        match stripped_bytes(binary) {
            Ok(bytes) => section.facts.push(Fact {
                what: format!("binary, stripped, {}", std::env::consts::ARCH),
                server: label.clone(),
                value: bytes as f64 / 1e6,
                unit: "MB",
                bar: (std::env::consts::ARCH == "aarch64").then_some((Ordering::AtMost, 10.0)),
            }),
            Err(error) => section.fail("binary", label, error.to_string()),
        }
    }
    section
}

/// By then a start is over, and Tidegate has given back what only that needed (docs/adr/0005).
const SETTLED: Duration = Duration::from_secs(5);

fn footprint(contender: &Contender) -> Result<(u64, u64)> {
    let (server, _devices) = mqtt::start(contender, 2)?;
    thread::sleep(SETTLED);
    Ok((server.process.pss_bytes(), server.process.rss_bytes()))
}

fn stripped_bytes(binary: &Path) -> Result<u64> {
    let folder = Folder::new()?;
    let copy = folder.path().join("stripped");
    fs::copy(binary, &copy)?;
    // Without binutils the figure is that of the build as it is.
    Command::new("strip").arg(&copy).status().ok();
    Ok(fs::metadata(copy)?.len())
}

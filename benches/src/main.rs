//! The benchmark suite of `docs/benchmarks.md`: Tidegate and its peers under the same load, in turn, as ratios.
//!
//! ```text
//! cargo run --release -p tidegate-bench -- all|http|proxy|mqtt|coap|durable|idle|policy|path... [--seconds N] [--rounds N] [--json FILE]
//!                                          [--only TEXT] [--build NAME=PATH]...
//! ```
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // figures, not addresses

mod coap;
mod compare;
mod durable;
mod folder;
mod gateway;
mod histogram;
mod http;
mod idle;
mod mqtt;
mod origin;
mod path;
mod peers;
mod policy;
mod process;
mod proxy;
mod report;

use std::fmt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use compare::Options;
use report::{Report, Section};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A sentence about what went wrong.
#[derive(Debug)]
struct Failure(String);

impl Failure {
    // Boxed at once, for that is what every caller returns.
    #[allow(clippy::new_ret_no_self)]
    fn new(text: impl Into<String>) -> Box<dyn std::error::Error> {
        Box::new(Failure(text.into()))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

type Suite = (&'static str, fn(&Options) -> Vec<Section>);

const SUITES: [Suite; 8] = [
    ("http", |options| vec![http::run(options)]),
    ("proxy", |options| vec![proxy::run(options)]),
    ("mqtt", |options| vec![mqtt::run(options), mqtt::run_idle_connections(options)]),
    ("coap", |options| vec![coap::run(options)]),
    ("durable", |options| vec![durable::run(options)]),
    ("idle", |options| vec![idle::run(options)]),
    ("policy", |_| vec![policy::run()]),
    ("path", |_| vec![path::run()]),
];

const USAGE: &str =
    "usage: tidegate-bench all|http|proxy|mqtt|coap|durable|idle|policy|path... [--seconds N] [--rounds N] [--json FILE] \
                     [--only TEXT] [--build NAME=PATH]...
  --seconds  length of one measurement [3]
  --rounds   how often each server has its turn [3]
  --only     loads whose name contains TEXT
  --build    a build of Tidegate to measure instead of this one's; the first one's ratios are printed";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.first().map(String::as_str) {
        Some(peers::RUMQTTD) => peers::serve_rumqttd(arguments.get(1).map_or("", String::as_str)).map(|()| true),
        Some(peers::ORIGINS) => origin::serve(&arguments[1..]).map(|()| true),
        Some(path::STEP) => path::serve(&arguments[1..]).map(|()| true),
        _ => run(arguments),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// False if a load could not be run.
fn run(arguments: Vec<String>) -> Result<bool> {
    let mut options = Options { seconds: 3.0, rounds: 3, builds: Vec::new(), filter: String::new() };
    let (mut suites, mut json) = (Vec::new(), None);
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| Failure::new(format!("{argument} needs a value\n{USAGE}")));
        match argument.as_str() {
            "all" => suites.extend(SUITES),
            "--seconds" => options.seconds = value()?.parse()?,
            "--rounds" => options.rounds = value()?.parse()?,
            "--json" => json = Some(PathBuf::from(value()?)),
            "--only" => options.filter = value()?,
            "--build" => {
                let build = value()?;
                let (name, path) = build.split_once('=').ok_or_else(|| Failure::new(USAGE))?;
                options.builds.push((name.to_owned(), PathBuf::from(path)));
            }
            name => {
                let known = SUITES.into_iter().find(|(suite, _)| *suite == name);
                suites.push(known.ok_or_else(|| Failure::new(format!("{name} is unknown\n{USAGE}")))?);
            }
        }
    }
    if suites.is_empty() || options.rounds == 0 || options.seconds <= 0.0 {
        return Err(Failure::new(USAGE));
    }
    if options.builds.is_empty() {
        options.builds.push(("tidegate".into(), build()?));
    }
    process::raise_descriptor_limit();
    process::pin_this_thread(process::LOAD_CORE);
    let machine = machine();
    println!("{machine}; {} s a measurement, {} rounds, medians", options.seconds, options.rounds);
    let mut report = Report::default();
    for (_, suite) in suites {
        suite(&options).into_iter().for_each(|section| report.add(section));
    }
    if let Some(path) = json {
        std::fs::write(path, format!("{:#}\n", report.to_json(&machine)))?;
    }
    Ok(!report.failed())
}

/// The gateway beside this program, brought up to date where cargo started us.
fn build() -> Result<PathBuf> {
    if let Some(cargo) = std::env::var_os("CARGO") {
        let mut command = Command::new(cargo);
        command.args(["build", "--quiet", "-p", "tidegate"]);
        if !cfg!(debug_assertions) {
            command.arg("--release");
        }
        if !command.status()?.success() {
            return Err(Failure::new("the gateway does not build"));
        }
    }
    let binary = std::env::current_exe()?.with_file_name("tidegate");
    if binary.is_file() {
        Ok(binary)
    } else {
        Err(Failure::new(format!("there is no {}: build it first", binary.display())))
    }
}

fn machine() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or("unknown CPU", |(_, name)| name.trim());
    let cores = process::cores();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let pinned = if process::can_pin() {
        "server and load on cores of their own"
    } else {
        "not pinned: two cores and taskset are needed"
    };
    format!("{model}, {cores} cores, Linux {}; {pinned}", kernel.trim())
}

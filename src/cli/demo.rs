//! `tidegate demo`.

use clap::Args;

use super::{Context, Exit, Failure};
use crate::demo::{self, Error, Options};
use crate::{tasks, telemetry};

#[derive(Debug, Args)]
pub struct Arguments {
    /// Ends by itself after this many seconds; without it at Ctrl-C.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(6..=86_400))]
    seconds: Option<u64>,
}

pub fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let logs =
        telemetry::Config { log: "warn,tidegate::upstream=error,rumqttd=error".into(), ..telemetry::Config::default() };
    telemetry::install_logs(&logs).map_err(|error| Failure::fault(error.to_string()))?;
    tasks::log_panics();
    let summary =
        demo::run(Options { seconds: arguments.seconds, json: context.json }).map_err(|error| match error {
            Error::Io { .. } => Failure::unavailable(error.to_string()),
            Error::Start(ref start) if start.can_retry() => Failure::unavailable(error.to_string()),
            Error::Config(_) | Error::Start(_) | Error::Registry(_) => Failure::fault(error.to_string()),
        })?;
    if summary.lost > 0 {
        return Err(Failure::new(Exit::Fault, format!("{} acknowledged readings are not at the cloud", summary.lost)));
    }
    Ok(())
}

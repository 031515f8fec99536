//! The `tidegate` command: arguments in, one action, an exit code out. One file per command.
//!
//! Output for people goes to a terminal with colour unless `NO_COLOR` is set; `--json` prints one JSON document instead. Exit codes: 0
//! well, 1 the configuration or the input is wrong, 2 usage, 70 a fault of ours, 75 cannot now (port taken, disk full).

mod admin_client;
mod cache;
mod cert;
mod check;
mod completions;
mod config;
#[cfg(feature = "demo")]
mod demo;
mod device;
mod init;
mod policy;
mod private_file;
mod run;
mod shown;
mod spool;
mod status;
mod tail;
mod top;

use std::fmt;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::config::{Inputs, Loaded, Report};

/// An IoT edge gateway: MQTT, CoAP and HTTP in, one identity and policy, a durable queue and a load-balanced uplink out.
#[derive(Debug, Parser)]
#[command(name = "tidegate", version, arg_required_else_help = true, disable_help_subcommand = true)]
struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Args)]
struct Options {
    /// The configuration file [default: $TIDEGATE_CONFIG, tidegate.toml, config/tidegate.toml or /etc/tidegate/tidegate.toml].
    #[arg(long, short, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Override one key, e.g. --set limits.connections_max=100 or --set listener.plain.bind=127.0.0.1:0; may be repeated.
    #[arg(long, global = true, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print JSON for programs.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start the gateway: SIGHUP reloads the configuration, SIGTERM drains and stops.
    Run,
    /// See it work: the whole gateway with a pretend cloud and pretend sensors, live.
    #[cfg(feature = "demo")]
    Demo(demo::Arguments),
    /// Write a first configuration, keys, certificates and an example policy.
    Init(init::Arguments),
    /// Check the configuration: every problem at once, with file, line, key, value and what is allowed.
    Check,
    /// Print all keys with their defaults, the JSON schema, or the effective configuration.
    Config(config::Arguments),
    /// Make certificates: a certificate authority, one for the gateway, one for a device.
    Cert(cert::Arguments),
    /// Register devices, look at them, revoke them; sign tokens and log in for them.
    Device(device::Arguments),
    /// Ask the policy: who may do what, which rule decides, a table of cases.
    Policy(policy::Arguments),
    /// Show the running gateway: readiness, listeners, sessions, upstreams, queues.
    Status,
    /// Watch the running gateway: rates, queues, the busiest sessions.
    Top(top::Arguments),
    /// Follow messages as they pass through the running gateway.
    Tail(tail::Arguments),
    /// Look at the queues to the cloud: what waits, what was lost and why; empty one.
    Spool(spool::Arguments),
    /// Answers kept by routes with a `cache`: how many, and how to be rid of them.
    Cache(cache::Arguments),
    /// Print a completion script for a shell.
    Completions(completions::Arguments),
}

/// Parses the process's arguments and does what they say.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are errors to clap, too; it knows which stream and which code. A closed pipe is nobody's fault.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let context = Context::new(cli.options);
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| dispatch(&context, cli.command))) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(failure)) => {
            context.report_failure(&failure);
            ExitCode::from(failure.exit as u8)
        }
        // The panic hook has already said what and where.
        Err(_) => ExitCode::from(Exit::Fault as u8),
    }
}

fn dispatch(context: &Context, command: Command) -> Result<(), Failure> {
    match command {
        Command::Run => run::run(context),
        #[cfg(feature = "demo")]
        Command::Demo(arguments) => demo::run(context, &arguments),
        Command::Init(arguments) => init::run(context, &arguments),
        Command::Check => check::run(context),
        Command::Config(arguments) => config::run(context, arguments),
        Command::Cert(arguments) => cert::run(context, arguments),
        Command::Device(arguments) => device::run(context, arguments),
        Command::Policy(arguments) => policy::run(context, &arguments),
        Command::Status => status::run(context),
        Command::Top(arguments) => top::run(context, &arguments),
        Command::Tail(arguments) => tail::run(context, &arguments),
        Command::Spool(arguments) => spool::run(context, &arguments),
        Command::Cache(arguments) => cache::run(context, &arguments),
        Command::Completions(arguments) => completions::run(context, &mut Cli::command(), arguments),
    }
}

/// What every command needs to know about its surroundings.
#[derive(Clone, Debug)]
pub struct Context {
    /// `--config`, if given.
    pub config_path: Option<PathBuf>,
    /// `--set`, in order.
    pub set: Vec<String>,
    pub json: bool,
    /// Standard output is a terminal that wants colour.
    pub color: bool,
    /// Standard error is one.
    pub color_errors: bool,
}

impl Context {
    fn new(options: Options) -> Self {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty())
            || std::env::var_os("TERM").is_some_and(|t| t == "dumb");
        Context {
            config_path: options.config,
            set: options.set,
            json: options.json,
            color: !plain && std::io::stdout().is_terminal(),
            color_errors: !plain && std::io::stderr().is_terminal(),
        }
    }

    /// The file that a command reads: the one given, else the first that exists.
    ///
    /// # Errors
    /// None given and none found.
    pub fn path(&self) -> Result<PathBuf, Failure> {
        let given = self.config_path.clone().or_else(|| std::env::var_os("TIDEGATE_CONFIG").map(PathBuf::from));
        let candidates = ["tidegate.toml", "config/tidegate.toml", "/etc/tidegate/tidegate.toml"];
        given.or_else(|| candidates.iter().map(PathBuf::from).find(|p| p.is_file())).ok_or_else(|| {
            Failure::input(format!("no configuration found; looked for {}", candidates.join(", ")))
                .help("`tidegate init` writes a first one, `--config FILE` names another")
        })
    }

    pub fn inputs(&self) -> Result<Inputs, Failure> {
        Ok(Inputs::from_process(Some(self.path()?), self.set.clone()))
    }

    /// The checked configuration; warnings go to standard error.
    ///
    /// # Errors
    /// It is wrong: all problems have been printed, on standard error or as JSON on standard output.
    pub fn load(&self) -> Result<Loaded, Failure> {
        match crate::config::load(&self.inputs()?) {
            Ok(loaded) => {
                if !loaded.report.problems.is_empty() {
                    let _ = std::io::stderr().write_all(self.render(&loaded.report, self.color_errors).as_bytes());
                }
                Ok(loaded)
            }
            Err(report) => {
                self.print_report(&report)?;
                Err(Failure::silent(Exit::Input))
            }
        }
    }

    /// Problems in the form this invocation wants: JSON on standard output, otherwise text on standard error.
    pub fn print_report(&self, report: &Report) -> Result<(), Failure> {
        if self.json {
            return self.print_json(&report.to_json());
        }
        let _ = std::io::stderr().write_all(self.render(report, self.color_errors).as_bytes());
        Ok(())
    }

    /// With the culprit's line underlined on a terminal, one line a problem otherwise.
    pub fn render(&self, report: &Report, color: bool) -> String {
        let terminal = std::io::stderr().is_terminal();
        if terminal { report.pretty(color) } else { report.to_string() }
    }

    /// Writes to standard output. A reader that has gone away, as in `| head`, ends the command quietly.
    pub fn print(&self, text: &str) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Err(Failure::silent(Exit::Well)),
            Err(error) => Err(Failure::unavailable(format!("cannot write to standard output: {error}"))),
        }
    }

    pub fn print_json(&self, value: &serde_json::Value) -> Result<(), Failure> {
        self.print(&format!("{value:#}\n"))
    }

    fn report_failure(&self, failure: &Failure) {
        if failure.what.is_empty() {
            return;
        }
        if self.json {
            let _ = self.print_json(&serde_json::json!({ "ok": false, "error": failure.what, "help": failure.help }));
            return;
        }
        let (red, reset) = if self.color_errors { ("\x1b[1;31m", "\x1b[0m") } else { ("", "") };
        let mut text = format!("{red}error:{reset} {}\n", failure.what);
        if let Some(help) = &failure.help {
            text.push_str(&format!("  help: {help}\n"));
        }
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

/// How a command ends, as its exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Well = 0,
    /// The configuration or the input is wrong.
    Input = 1,
    Usage = 2,
    /// A fault of ours.
    Fault = 70,
    /// Cannot now: port taken, disk full, the gateway does not answer.
    Unavailable = 75,
}

/// Why a command did not do what it was asked: what happened, where, and what to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub exit: Exit,
    /// Empty: everything has been said already.
    pub what: String,
    pub help: Option<String>,
}

impl Failure {
    pub fn new(exit: Exit, what: impl Into<String>) -> Self {
        Failure { exit, what: what.into(), help: None }
    }

    pub fn input(what: impl Into<String>) -> Self {
        Failure::new(Exit::Input, what)
    }

    pub fn usage(what: impl Into<String>) -> Self {
        Failure::new(Exit::Usage, what)
    }

    pub fn fault(what: impl Into<String>) -> Self {
        Failure::new(Exit::Fault, what)
    }

    pub fn unavailable(what: impl Into<String>) -> Self {
        Failure::new(Exit::Unavailable, what)
    }

    /// Ends with this code and says no more.
    pub fn silent(exit: Exit) -> Self {
        Failure::new(exit, "")
    }

    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_options_are_accepted_behind_the_command() {
        let cli =
            Cli::try_parse_from(["tidegate", "check", "--config", "a.toml", "--set", "a=1", "--set", "b=2", "--json"]);
        let options = cli.unwrap().options;
        assert_eq!(options.config, Some(PathBuf::from("a.toml")));
        assert_eq!(options.set, ["a=1", "b=2"]);
        assert!(options.json);
    }

    #[test]
    fn a_wrong_use_is_told_from_a_wish_for_help() {
        assert_eq!(Cli::try_parse_from(["tidegate", "no-such-command"]).unwrap_err().exit_code(), 2);
        assert_eq!(Cli::try_parse_from(["tidegate", "--help"]).unwrap_err().exit_code(), 0);
    }
}

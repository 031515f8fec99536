//! `tidegate device`: who may talk to the gateway.
//!
//! The commands write the registry in the data directory; a running gateway sees the change within a second, none is needed. `token` and `login`
//! are for the device's side: they need the device's key file and nothing else, and so run on any machine.

mod add;
mod import;
mod key_file;
mod lines;
mod login;
pub(super) mod moment;
mod show;
mod token;

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use tidegate_auth::keyfile::{KeyTextError, public_from_text};
use tidegate_auth::{KeyId, PublicKey, text};

use crate::identity::{Blame, Error, NewKey, Registry};
use crate::message::DeviceId;

use super::{Context, Failure};
use lines::Endpoints;
pub(super) use lines::quoted;

#[derive(Debug, Args)]
pub struct Arguments {
    /// Folder of the registry and the gateway's key [default: gateway.data_dir of the configuration].
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: DeviceCommand,
}

#[derive(Debug, Subcommand)]
enum DeviceCommand {
    /// Register a device. Without a public key one is generated, and its private half written to ID.key.
    Add(add::Arguments),
    /// List the devices.
    List {
        /// Only those with this role.
        #[arg(long)]
        role: Option<String>,
    },
    /// Show one device with its keys.
    Show { id: String },
    /// Lock a device out: its sessions end, its tokens and keys no longer work.
    Revoke { id: String },
    /// Let a revoked device in again. What it was issued before stays void.
    Enable { id: String },
    /// Add or remove a device's public keys; it may have four.
    Key {
        #[command(subcommand)]
        command: KeyCommand,
    },
    /// Sign a JWT for an MQTT password or an OAuth assertion, and print it.
    Token(token::Arguments),
    /// Log in at a gateway by the challenge flow, without a clock, and print the bearer token: for curl and coap-client.
    Login(login::Arguments),
    /// Register many devices from a CSV or JSON file: all of them, or none and every bad line is reported.
    Import(import::Arguments),
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Add a public key. The device's sessions end and begin anew.
    Add {
        id: String,
        /// A file (PEM or OpenSSH), 64 hex digits, or base64.
        #[arg(value_name = "FILE|HEX|BASE64")]
        public_key: String,
        /// Not valid before: 2026-11-20, 2026-11-20T08:00:00Z, or unix seconds.
        #[arg(long, value_name = "TIME", value_parser = moment::parse)]
        not_before: Option<u64>,
        /// Not valid from then on.
        #[arg(long, value_name = "TIME", value_parser = moment::parse)]
        not_after: Option<u64>,
    },
    /// Remove a key, by the id that `show` prints.
    Remove { id: String, key_id: String },
}

pub fn run(context: &Context, arguments: Arguments) -> Result<(), Failure> {
    let Arguments { data_dir, command } = arguments;
    let site = || Site::find(context, data_dir.as_ref());
    let changed = |change: &dyn Fn(&Site) -> Result<(), Failure>| {
        let site = site()?;
        change(&site)?;
        site.wait_until_seen();
        Ok(())
    };
    match command {
        DeviceCommand::Add(arguments) => changed(&|site| add::run(context, site, &arguments)),
        DeviceCommand::List { role } => show::list(context, &site()?, role.as_deref()),
        DeviceCommand::Show { id } => show::show(context, &site()?, &device_id(&id)?),
        DeviceCommand::Revoke { id } => changed(&|site| show::set_enabled(context, site, &device_id(&id)?, false)),
        DeviceCommand::Enable { id } => changed(&|site| show::set_enabled(context, site, &device_id(&id)?, true)),
        DeviceCommand::Key { command } => changed(&|site| key(context, site, &command)),
        DeviceCommand::Token(arguments) => token::run(context, &site, &arguments),
        DeviceCommand::Login(arguments) => login::run(context, &site, &arguments),
        DeviceCommand::Import(arguments) => changed(&|site| import::run(context, site, &arguments)),
    }
}

fn key(context: &Context, site: &Site, command: &KeyCommand) -> Result<(), Failure> {
    let mut registry = site.registry()?;
    let (record, what) = match command {
        KeyCommand::Add { id, public_key, not_before, not_after } => {
            let id = device_id(id)?;
            if let (Some(from), Some(until)) = (not_before, not_after)
                && from >= until
            {
                return Err(Failure::input("--not-after is not later than --not-before"));
            }
            let key = NewKey { public: read_public_key(public_key)?, not_before: *not_before, not_after: *not_after };
            (registry.add_key(&id, &key, unix_now()).map_err(failure)?, "added")
        }
        KeyCommand::Remove { id, key_id } => {
            let id = device_id(id)?;
            let key_id = text::from_text(key_id).map(KeyId);
            let key_id = key_id.ok_or_else(|| {
                Failure::input("a key id is 16 hex digits").help(format!("`tidegate device show {id}` prints them"))
            })?;
            (registry.remove_key(&id, key_id).map_err(failure)?, "removed")
        }
    };
    if context.json {
        return context.print_json(&show::to_json(&record));
    }
    let mut text = format!("key {what}; sessions of {} end within a second\n", record.id);
    text.push_str(&show::card(&record));
    if record.keys.is_empty() {
        text.push_str("it has no key left and cannot log in; `tidegate device key add` gives it one\n");
    }
    context.print(&text)
}

/// Where the registry is and where clients connect to.
pub(crate) struct Site {
    data_dir: PathBuf,
    endpoints: Endpoints,
    registry_poll: Duration,
}

impl Site {
    fn find(context: &Context, data_dir: Option<&PathBuf>) -> Result<Site, Failure> {
        if let Some(data_dir) = data_dir {
            let registry_poll = poll_of(&crate::identity::Config::default());
            return Ok(Site { data_dir: data_dir.clone(), endpoints: Endpoints::of(&[], "/"), registry_poll });
        }
        let config = context.load()?.config;
        let endpoints = Endpoints::of(&config.listener, &config.gateway.device_api_prefix);
        Ok(Site { data_dir: config.gateway.data_dir, endpoints, registry_poll: poll_of(&config.identity) })
    }

    /// After a change: waits until a running gateway has seen it, so that the next command of a script finds it in force.
    fn wait_until_seen(&self) {
        let running = std::fs::read(self.data_dir.join(crate::RUNNING_FILE)).ok();
        let running = running.and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
        let pid = running.and_then(|running| running.get("pid")?.as_u64());
        if pid.is_some_and(|pid| PathBuf::from(format!("/proc/{pid}")).exists()) {
            std::thread::sleep(self.registry_poll + Duration::from_millis(50));
        }
    }

    fn registry(&self) -> Result<Registry, Failure> {
        Registry::open(&self.data_dir).map_err(failure)
    }
}

fn poll_of(identity: &crate::identity::Config) -> Duration {
    Duration::from_millis(u64::from(identity.registry_poll_ms))
}

/// An error of the registry as the end of a command.
pub(super) fn failure(error: Error) -> Failure {
    let help = match &error {
        Error::UnknownDevice(_) => Some("`tidegate device list` shows all"),
        Error::DeviceExists(_) => Some("`tidegate device key add` gives it another key"),
        Error::TooManyKeys(_) => Some("`tidegate device key remove ID KEY_ID` removes one"),
        Error::KeyTaken { .. } => Some("every device needs a key of its own"),
        _ => None,
    };
    let failure = match error.blame() {
        Blame::Input => Failure::input(error.to_string()),
        Blame::Machine => Failure::unavailable(error.to_string()),
    };
    match help {
        Some(help) => failure.help(help),
        None => failure,
    }
}

pub(super) fn device_id(text: &str) -> Result<DeviceId, Failure> {
    DeviceId::parse(text).map_err(|error| Failure::input(format!("`{text}`: {error}")))
}

/// A public key from a file or from the text itself.
fn read_public_key(given: &str) -> Result<PublicKey, Failure> {
    let refuse = |error: KeyTextError| Failure::input(format!("`{given}` is {error}"));
    match public_from_text(given) {
        Ok(key) => return Ok(key),
        // The text is a key, and a bad one.
        Err(error @ KeyTextError::Invalid(_)) => return Err(refuse(error)),
        Err(KeyTextError::Unreadable | KeyTextError::IsPrivate) => {}
    }
    match std::fs::read_to_string(given) {
        Ok(file) => public_from_text(&file).map_err(|error| match error {
            KeyTextError::IsPrivate => refuse(error).help("give the public half: openssl pkey -in FILE -pubout"),
            KeyTextError::Unreadable | KeyTextError::Invalid(_) => refuse(error),
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Failure::input(format!("`{given}` is neither a key nor a file")))
        }
        Err(error) => Err(Failure::input(format!("cannot read {given}: {error}"))),
    }
}

/// A role: one word that policy can name.
fn check_role(role: &str) -> Result<(), &'static str> {
    if is_word(role) { Ok(()) } else { Err("a role is 1 to 64 characters out of A-Z a-z 0-9 . _ -") }
}

/// One attribute, which policy names as `attr:KEY=VALUE`.
fn check_attribute(key: &str, value: &str) -> Result<(), &'static str> {
    if !is_word(key) {
        return Err("an attribute's key is 1 to 64 characters out of A-Z a-z 0-9 . _ -");
    }
    if value.len() > 256 || value.chars().any(char::is_control) {
        return Err("an attribute's value is at most 256 bytes without control characters");
    }
    Ok(())
}

fn is_word(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    !text.is_empty() && text.len() <= 64 && text.bytes().all(allowed)
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

pub(super) fn random<const N: usize>() -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|error| Failure::unavailable(format!("the system gave no random bytes: {error}")))?;
    Ok(bytes)
}

/// Attributes of one device at most.
const ATTRIBUTES_MAX: usize = 32;
/// What the example policy lets write telemetry.
const DEFAULT_ROLE: &str = "sensor";

//! `tidegate init [DIR]`: everything a first start needs, written in one go or not at all.
//!
//! The configuration and the policy are the examples in `config/`, which tests load; certificates and keys are fresh.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::Args;

use super::cert;
use super::private_file;
use super::{Context, Failure};
use crate::identity::{GatewayKey, Registry};

#[derive(Debug, Args)]
pub struct Arguments {
    /// Folder to write to; made if it is not there.
    #[arg(default_value = ".", value_name = "DIR")]
    folder: PathBuf,
    /// The gateway's name [default: this machine's].
    #[arg(long)]
    name: Option<String>,
    /// A DNS name or address that devices will connect to, for the certificate, besides this machine's loopback; may be repeated.
    #[arg(long = "host", value_name = "NAME|ADDRESS")]
    hosts: Vec<String>,
}

const CONFIGURATION: &str = include_str!("../../config/tidegate.toml");
const POLICY: &str = include_str!("../../config/policy.toml");
const POLICY_CASES: &str = include_str!("../../config/policy-cases.toml");

const AUTHORITY_DAYS: u32 = 3650;
const CERTIFICATE_DAYS: u32 = 825;

pub fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let name = arguments.name.clone().unwrap_or_else(host_name);
    if !is_name(&name) {
        return Err(Failure::input(format!("--name `{name}`: 1 to 64 characters out of A-Z a-z 0-9 . _ -")));
    }
    let folder = &arguments.folder;
    refuse_to_overwrite(folder)?;
    // Made before anything is written, so that a host name that is none leaves nothing behind.
    let files = files(&name, &arguments.hosts)?;
    let mut undo = Undo::default();
    let gateway = write(folder, &files, &mut undo)?;
    undo.keep();
    report(context, folder, &files, &gateway)
}

/// One file to be written, by its name in the folder.
struct Planned {
    name: &'static str,
    text: String,
    secret: bool,
    what: &'static str,
}

fn files(name: &str, hosts: &[String]) -> Result<Vec<Planned>, Failure> {
    let authority = cert::authority(&format!("{name} development CA"), AUTHORITY_DAYS)?;
    let mut names: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).to_vec();
    names.extend(hosts.iter().filter(|host| !["localhost", "127.0.0.1", "::1"].contains(&host.as_str())).cloned());
    let gateway = cert::gateway(&authority, &names, CERTIFICATE_DAYS)?;
    let token = super::device::random::<24>()?;
    let token = tidegate_auth::text::base64url(&token);
    let public = |name, text: String, what| Planned { name, text, secret: false, what };
    let secret = |name, text: String, what| Planned { name, text, secret: true, what };
    Ok(vec![
        public("policy.toml", POLICY.to_owned(), "who may do what"),
        public("policy-cases.toml", POLICY_CASES.to_owned(), "questions for `tidegate policy test`"),
        secret("admin.token", format!("{token}\n"), "opens the admin API"),
        public("certs/ca.crt", authority.certificate, "give it to devices that use TLS"),
        secret("certs/ca.key", authority.key, "signs further certificates; keep it elsewhere in production"),
        public("certs/gateway.crt", gateway.certificate, "the gateway's certificate, for development"),
        secret("certs/gateway.key", gateway.key, "its key"),
        // Last: with it in place everything it names is there.
        public("tidegate.toml", configuration(name), "the configuration"),
    ])
}

/// The example with its name, its token and its TLS listener filled in.
fn configuration(name: &str) -> String {
    let mut out = String::new();
    let mut switched_off = false;
    for line in CONFIGURATION.lines() {
        switched_off = (switched_off || line == "#[[listener]]") && line.starts_with('#');
        let line = if switched_off { line.trim_start_matches('#') } else { line };
        out.push_str(line);
        out.push('\n');
    }
    out.replace(r#""greenhouse-1""#, &format!("{name:?}"))
        .replace(r#""${TIDEGATE_ADMIN_TOKEN:-}""#, r#""${file:admin.token}""#)
        .replace(r#""../certs/"#, r#""certs/"#)
        .replace(
            ": a working example for one machine, and what `tidegate init` starts from.",
            ", written by `tidegate init`.",
        )
}

/// Says at once everything that is in the way.
fn refuse_to_overwrite(folder: &Path) -> Result<(), Failure> {
    const NAMES: [&str; 8] = [
        "tidegate.toml",
        "policy.toml",
        "policy-cases.toml",
        "admin.token",
        "certs/ca.crt",
        "certs/ca.key",
        "certs/gateway.crt",
        "certs/gateway.key",
    ];
    let mut there: Vec<PathBuf> =
        NAMES.iter().map(|name| folder.join(name)).filter(|path| path.symlink_metadata().is_ok()).collect();
    let data = folder.join("data");
    let is_empty = fs::read_dir(&data)
        .map_or_else(|error| error.kind() == io::ErrorKind::NotFound, |mut entries| entries.next().is_none());
    if !is_empty {
        there.push(data);
    }
    if there.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = there.iter().map(|path| path.display().to_string()).collect();
    Err(Failure::input(format!("nothing written: {} there already", are(&list)))
        .help("`tidegate init DIR` writes to another folder"))
}

fn are(list: &[String]) -> String {
    format!("{} {}", list.join(", "), if list.len() == 1 { "is" } else { "are" })
}

fn write(folder: &Path, files: &[Planned], undo: &mut Undo) -> Result<GatewayKey, Failure> {
    undo.create_folder(folder, false)?;
    undo.create_folder(&folder.join("certs"), false)?;
    for file in files {
        let path = folder.join(file.name);
        if file.secret {
            private_file::write_secret(&path, &file.text)?;
        } else {
            private_file::write(&path, &file.text)?;
        }
        undo.files.push(path);
    }
    let data = folder.join("data");
    undo.create_folder(&data, true)?;
    undo.data = Some(data.clone());
    let registry = Registry::open(&data).map_err(super::device::failure)?;
    GatewayKey::open(&data, &registry).map_err(super::device::failure)
}

/// Takes back what was written when a later step fails, unless kept.
#[derive(Default)]
struct Undo {
    files: Vec<PathBuf>,
    /// Folders that were not there before, outermost first.
    folders: Vec<PathBuf>,
    /// The data folder: it was empty, so whatever is in it is ours.
    data: Option<PathBuf>,
}

impl Undo {
    fn create_folder(&mut self, folder: &Path, private: bool) -> Result<(), Failure> {
        if folder.as_os_str().is_empty() || folder.is_dir() {
            return Ok(());
        }
        private_file::create_folder(folder, private)?;
        self.folders.push(folder.to_owned());
        Ok(())
    }

    fn keep(mut self) {
        self.files.clear();
        self.folders.clear();
        self.data = None;
    }
}

impl Drop for Undo {
    /// As far as it goes: what cannot be removed is named by the next `init`.
    fn drop(&mut self) {
        let ours = self.data.as_ref().and_then(|data| fs::read_dir(data).ok()).into_iter().flatten().flatten();
        for path in self.files.iter().cloned().chain(ours.map(|entry| entry.path())) {
            let _ = fs::remove_file(path);
        }
        for folder in self.folders.iter().rev() {
            let _ = fs::remove_dir(folder);
        }
    }
}

fn report(context: &Context, folder: &Path, files: &[Planned], gateway: &GatewayKey) -> Result<(), Failure> {
    let shown = |name: &str| if folder == Path::new(".") { name.into() } else { folder.join(name) };
    if context.json {
        let files: Vec<_> = files.iter().map(|file| shown(file.name).display().to_string()).collect();
        return context.print_json(&serde_json::json!({
            "ok": true, "files": files, "data_dir": shown("data"), "gateway_id": gateway.id.to_string(),
        }));
    }
    let mut text = String::new();
    let key = ("data/gateway.key", "the gateway's own key, which devices pin: back it up");
    let written = files.iter().map(|file| (file.name, file.what)).chain([key]);
    for (name, what) in written {
        text.push_str(&format!("wrote {:<36} {what}\n", shown(name).display()));
    }
    let tidegate = program();
    let first = if folder == Path::new(".") {
        String::new()
    } else {
        format!("  cd {}\n", super::device::quoted(&folder.display().to_string()))
    };
    text.push_str(&format!(
        "\nNext:\n{first}  {tidegate} run                    # starts the gateway; leave it running\n  \
         {tidegate} device add sensor-1    # in another terminal, there: prints lines for mosquitto_pub, curl and coap-client\n  \
         {tidegate} status                 # what the gateway sees\n\n\
         Readings go to the upstream in tidegate.toml, http://127.0.0.1:3001 until you change it; until it answers they wait on disk.\n"
    ));
    context.print(&text)
}

/// How this program was called, in a way that also works from another folder.
fn program() -> String {
    let called = std::env::args().next().filter(|name| name.contains('/'));
    let path = called.and_then(|name| fs::canonicalize(name).ok());
    path.map_or_else(|| "tidegate".to_owned(), |path| super::device::quoted(&path.display().to_string()))
}

/// The machine's name as far as it can be one of ours.
fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name.trim().chars().filter(|c| is_name(c.encode_utf8(&mut [0; 4]))).take(64).collect();
    if name.is_empty() { "gateway-1".to_owned() } else { name }
}

fn is_name(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    !text.is_empty() && text.len() <= 64 && text.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_filled_in_everywhere() {
        let text = configuration("north");
        assert!(text.contains("name = \"north\""));
        assert!(text.contains("token = \"${file:admin.token}\""));
        assert!(text.contains("\n[[listener]]\nname = \"tls\"\n"));
        assert!(text.contains("\nkey = \"certs/gateway.key\"\n"));
        assert!(text.contains("written by `tidegate init`"));
        assert!(!text.contains("greenhouse-1") && !text.contains("../certs") && !text.contains("TIDEGATE_ADMIN_TOKEN"));
    }

    #[test]
    fn what_fails_half_way_leaves_nothing_behind() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("new");
        let files = files("north", &[]).unwrap();
        let mut undo = Undo::default();
        // A folder where the last file should go.
        fs::create_dir_all(folder.join("tidegate.toml")).unwrap();
        assert!(write(&folder, &files, &mut undo).is_err());
        drop(undo);
        let left: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["tidegate.toml"]);
    }

    #[test]
    fn everything_in_the_way_is_named_and_nothing_is_written() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("policy.toml"), "").unwrap();
        fs::create_dir(folder.path().join("data")).unwrap();
        assert!(refuse_to_overwrite(folder.path()).unwrap_err().what.contains("policy.toml is there"));
        fs::write(folder.path().join("data/registry.db"), "").unwrap();
        let failure = refuse_to_overwrite(folder.path()).unwrap_err();
        assert!(failure.what.contains("policy.toml,") && failure.what.contains("data are there"), "{}", failure.what);
        assert_eq!(failure.exit, crate::cli::Exit::Input);
    }
}

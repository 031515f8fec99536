//! `tidegate device add`.

use std::path::PathBuf;

use clap::Args;
use tidegate_auth::SecretKey;

use super::key_file::KeyFile;
use super::{ATTRIBUTES_MAX, read_public_key, unix_now};
use super::{
    Context, DEFAULT_ROLE, Failure, Site, check_attribute, check_role, device_id, failure, lines, random, show,
};
use crate::identity::{Error, GatewayKey, NewDevice, NewKey};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// 1 to 128 characters out of A-Z a-z 0-9 . _ ~ : -
    id: String,
    /// What policy lets it do.
    #[arg(long, default_value = DEFAULT_ROLE)]
    role: String,
    /// An attribute for policy's attr:KEY=VALUE; may be repeated.
    #[arg(long = "attr", value_name = "KEY=VALUE")]
    attributes: Vec<String>,
    /// The device's own public key: a file (PEM or OpenSSH), 64 hex digits, or base64.
    #[arg(long, value_name = "FILE|HEX|BASE64")]
    public_key: Option<String>,
    /// Folder for ID.key.
    #[arg(long, default_value = ".", value_name = "DIR", conflicts_with = "public_key")]
    out: PathBuf,
}

pub(super) fn run(context: &Context, site: &Site, arguments: &Arguments) -> Result<(), Failure> {
    let id = device_id(&arguments.id)?;
    check_role(&arguments.role).map_err(|why| Failure::input(format!("`{}`: {why}", arguments.role)))?;
    let attributes = attributes(&arguments.attributes)?;
    let mut registry = site.registry()?;
    let gateway = GatewayKey::open(&site.data_dir, &registry).map_err(failure)?;
    // Said before a key file is in the way of saying it.
    if registry.get(&id).map_err(failure)?.is_some() {
        return Err(failure(Error::DeviceExists(id)));
    }
    let add = |registry: &mut crate::identity::Registry, public| {
        let keys = vec![NewKey { public, not_before: None, not_after: None }];
        let new = NewDevice { id: id.clone(), role: arguments.role.clone(), attributes, keys };
        registry.add(&[new], unix_now(), |_| {}).map_err(failure)
    };
    let key_file = match &arguments.public_key {
        Some(given) => {
            add(&mut registry, read_public_key(given)?)?;
            None
        }
        None => {
            let secret = SecretKey::from_seed(&random()?);
            let name = format!("{id}.key");
            let path = if arguments.out.as_os_str() == "." { name.into() } else { arguments.out.join(name) };
            // The file first: a device whose key nobody has would be worse than a key without a device.
            KeyFile::write(&path, &id, &secret, &gateway.public)?;
            if let Err(failure) = add(&mut registry, secret.public()) {
                let _ = std::fs::remove_file(&path);
                return Err(failure);
            }
            Some(path)
        }
    };
    let record = registry.get(&id).map_err(failure)?.ok_or_else(|| Failure::fault(format!("{id} was not added")))?;
    let lines = key_file.as_ref().map(|path| site.endpoints.lines(&id, path, &lines::program())).unwrap_or_default();
    if context.json {
        let mut json = show::to_json(&record);
        if let Some(object) = json.as_object_mut() {
            let path = key_file.map(|path| path.display().to_string());
            object.insert("key_file".into(), path.into());
            object.insert("gateway_id".into(), gateway.id.to_string().into());
            object.insert("client_lines".into(), lines.into());
        }
        return context.print_json(&json);
    }
    let mut text = show::card(&record);
    text.push_str(&format!("gateway     {}\n", gateway.id));
    if let Some(path) = key_file {
        text.push_str(&format!(
            "wrote       {} (mode 0600; it belongs on the device, and there is no copy)\n",
            path.display()
        ));
        text.push_str("\nSend a first message:\n");
        for line in lines {
            text.push_str(&format!("\n{line}\n"));
        }
    }
    context.print(&text)
}

fn attributes(given: &[String]) -> Result<Vec<(String, String)>, Failure> {
    let mut attributes: Vec<(String, String)> = Vec::new();
    for text in given {
        let pair = text.split_once('=').ok_or_else(|| Failure::input(format!("--attr `{text}`: write KEY=VALUE")))?;
        let (key, value) = pair;
        check_attribute(key, value).map_err(|why| Failure::input(format!("--attr `{text}`: {why}")))?;
        if attributes.iter().any(|(known, _)| known == key) {
            return Err(Failure::input(format!("--attr `{text}`: this key is there twice")));
        }
        attributes.push((key.to_owned(), value.to_owned()));
    }
    if attributes.len() > ATTRIBUTES_MAX {
        return Err(Failure::input(format!("a device has at most {ATTRIBUTES_MAX} attributes")));
    }
    Ok(attributes)
}

//! `tidegate device list | show | revoke | enable`.

use comfy_table::{Table, presets};
use serde_json::{Value, json};

use super::{Context, Failure, Site, failure, moment};
use crate::identity::{KeyRecord, Record};
use crate::message::DeviceId;

pub(super) fn list(context: &Context, site: &Site, role: Option<&str>) -> Result<(), Failure> {
    let mut records = site.registry()?.list().map_err(failure)?;
    records.retain(|record| role.is_none_or(|role| record.role == role));
    if context.json {
        return context.print_json(&records.iter().map(to_json).collect());
    }
    if records.is_empty() {
        return context.print("no devices; `tidegate device add ID` registers one\n");
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(["DEVICE", "ROLE", "STATE", "KEYS", "ATTRIBUTES", "CREATED"]);
    for record in &records {
        table.add_row([
            record.id.to_string(),
            record.role.clone(),
            state(record).to_owned(),
            record.keys.len().to_string(),
            attributes(record),
            moment::format(record.created_unix),
        ]);
    }
    let revoked = records.iter().filter(|record| !record.enabled).count();
    context.print(&format!("{}\n{} devices, {revoked} revoked\n", table.trim_fmt(), records.len()))
}

pub(super) fn show(context: &Context, site: &Site, id: &DeviceId) -> Result<(), Failure> {
    let record = site.registry()?.get(id).map_err(failure)?;
    let record = record.ok_or_else(|| failure(crate::identity::Error::UnknownDevice(id.clone())))?;
    if context.json { context.print_json(&to_json(&record)) } else { context.print(&card(&record)) }
}

pub(super) fn set_enabled(context: &Context, site: &Site, id: &DeviceId, enabled: bool) -> Result<(), Failure> {
    let record = site.registry()?.set_enabled(id, enabled).map_err(failure)?;
    if context.json {
        return context.print_json(&to_json(&record));
    }
    let done = if enabled {
        "enabled; it logs in anew with its keys"
    } else {
        "revoked; a running gateway ends its sessions within a second"
    };
    context.print(&format!("{id} {done}\n"))
}

/// One device for a person.
pub(super) fn card(record: &Record) -> String {
    let mut text = format!(
        "device      {}\nrole        {}\nstate       {}, generation {}\ncreated     {}\n",
        record.id,
        record.role,
        state(record),
        record.generation,
        moment::format(record.created_unix)
    );
    if !record.attributes.is_empty() {
        text.push_str(&format!("attributes  {}\n", attributes(record)));
    }
    for key in &record.keys {
        text.push_str(&format!("key         {}  {}{}\n", key.public.key_id(), key.public, validity(key)));
    }
    text
}

/// One device for a program.
pub(super) fn to_json(record: &Record) -> Value {
    let key = |key: &KeyRecord| {
        json!({
            "key_id": key.public.key_id().to_string(),
            "public_key": key.public.to_string(),
            "not_before": key.not_before.map(moment::format),
            "not_after": key.not_after.map(moment::format),
            "added": moment::format(key.added_unix),
        })
    };
    json!({
        "id": record.id.as_str(),
        "index": record.index,
        "role": record.role,
        "attributes": Value::from_iter(record.attributes.iter().cloned()),
        "enabled": record.enabled,
        "generation": record.generation,
        "created": moment::format(record.created_unix),
        "keys": record.keys.iter().map(key).collect::<Vec<_>>(),
    })
}

fn state(record: &Record) -> &'static str {
    if record.enabled { "enabled" } else { "revoked" }
}

fn attributes(record: &Record) -> String {
    record.attributes.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
}

fn validity(key: &KeyRecord) -> String {
    let from = key.not_before.map(|from| format!(", from {}", moment::format(from))).unwrap_or_default();
    let until = key.not_after.map(|until| format!(", until {}", moment::format(until))).unwrap_or_default();
    from + &until
}

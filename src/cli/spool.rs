//! `tidegate spool show | ledger | drop`: what waits for the cloud, what was lost and why.
//!
//! Asks the running gateway; where none answers, reads its data folder.

use std::path::Path;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::admin_client::{AdminClient, Trouble};
use super::device::moment;
use super::status::{items, now_ms, number, queues, text};
use super::{Context, Failure, shown};
use crate::config::Config;
use crate::spool::{self, Spool};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: SpoolCommand,
}

#[derive(Debug, Subcommand)]
enum SpoolCommand {
    /// Each queue: how much waits, since when, and when it will be empty.
    Show,
    /// What was thrown away: which queue, why, whose, how much.
    Ledger {
        /// At most this many rows, newest first.
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=10_000))]
        rows_max: u16,
    },
    /// Throw away everything that waits in one queue. The loss ledger keeps the count.
    Drop {
        /// The queue: the name of its `[[forward]]`.
        sink: String,
        /// Do it; without this the command only says what would go.
        #[arg(long)]
        yes: bool,
    },
}

pub fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let config = context.load()?.config;
    match &arguments.command {
        SpoolCommand::Show => show(context, &config),
        SpoolCommand::Ledger { rows_max } => ledger(context, &config, usize::from(*rows_max)),
        SpoolCommand::Drop { sink, yes } => drop_sink(context, &config, sink, *yes),
    }
}

fn show(context: &Context, config: &Config) -> Result<(), Failure> {
    let client = client(config)?;
    let first = sinks(client.as_ref(), &config.gateway.data_dir)?;
    let waiting = first.sinks.iter().any(|sink| number(&sink["queued_records"]) > 0);
    let mut etas = Vec::new();
    let mut now = Sinks { live: first.live, sinks: first.sinks.clone() };
    if let (true, true, Some(client)) = (first.live, waiting, &client) {
        // Two looks give the speed.
        std::thread::sleep(BETWEEN_LOOKS);
        now = sinks(Some(client), &config.gateway.data_dir)?;
        etas = estimates(&first.sinks, &now.sinks);
    }
    if context.json {
        let eta = etas.iter().map(|(name, secs)| (name.clone(), json!(secs))).collect::<serde_json::Map<_, _>>();
        return context.print_json(&json!({ "running": now.live, "sinks": now.sinks, "eta_secs": eta }));
    }
    if !now.live && now.sinks.is_empty() {
        return context.print("nothing is stored, and no gateway runs\n");
    }
    let mut out = String::new();
    if !now.live {
        out.push_str("no gateway runs; as it is on disk:\n");
    }
    out.push_str(&queues(&now.sinks, now_ms()));
    for (name, secs) in etas {
        out.push_str(&match secs {
            Some(secs) => format!("{name}: empty in about {}\n", shown::duration(secs)),
            None => format!("{name}: does not get shorter at the moment; `tidegate status` shows its upstream\n"),
        });
    }
    context.print(&out)
}

struct Sinks {
    /// From a running gateway, not from its files.
    live: bool,
    sinks: Vec<Value>,
}

fn sinks(client: Option<&AdminClient>, data_dir: &Path) -> Result<Sinks, Failure> {
    if let Some(client) = client {
        match client.get("/spool") {
            Ok(answer) => return Ok(Sinks { live: true, sinks: items(&answer["sinks"]).to_vec() }),
            Err(Trouble::Unreachable(_)) => {}
            Err(refused) => return Err(refused.into()),
        }
    }
    let sinks = inspect(data_dir)?["sinks"].as_array().cloned().unwrap_or_default();
    Ok(Sinks { live: false, sinks })
}

/// Without a token there is still the disk.
fn client(config: &Config) -> Result<Option<AdminClient>, Failure> {
    if config.admin.token.is_empty() { Ok(None) } else { AdminClient::of(config).map(Some) }
}

fn inspect(data_dir: &Path) -> Result<Value, Failure> {
    if !data_dir.join(Spool::FILE).exists() {
        return Ok(json!({ "sinks": [], "ledger": [] }));
    }
    let found = spool::inspect(data_dir).map_err(|error| failure(&error))?;
    serde_json::to_value(found).map_err(|error| Failure::fault(error.to_string()))
}

/// Seconds until each queue that holds something is empty; none if it does not shrink.
fn estimates(before: &[Value], after: &[Value]) -> Vec<(String, Option<u64>)> {
    let waiting = after.iter().filter(|sink| number(&sink["queued_records"]) > 0);
    waiting
        .filter_map(|sink| {
            let was = before.iter().find(|old| old["name"] == sink["name"])?;
            let (was, is) = (number(&was["queued_records"]), number(&sink["queued_records"]));
            let shrunk = was.checked_sub(is).filter(|shrunk| *shrunk > 0);
            Some((text(&sink["name"]), shrunk.map(|shrunk| is.div_ceil(shrunk) * BETWEEN_LOOKS.as_secs())))
        })
        .collect()
}

fn ledger(context: &Context, config: &Config, rows_max: usize) -> Result<(), Failure> {
    let mut asked = None;
    if let Some(client) = client(config)? {
        match client.get(&format!("/spool/ledger?rows_max={rows_max}")) {
            Ok(rows) => asked = Some(rows),
            Err(Trouble::Unreachable(_)) => {}
            Err(refused) => return Err(refused.into()),
        }
    }
    let rows = match asked {
        Some(rows) => items(&rows).to_vec(),
        None => items(&inspect(&config.gateway.data_dir)?["ledger"]).iter().take(rows_max).cloned().collect(),
    };
    if context.json {
        return context.print_json(&rows.into());
    }
    if rows.is_empty() {
        return context.print("nothing was lost\n");
    }
    let at = |value: &Value| moment::format(number(value) / 1000);
    let lines = rows.iter().map(|row| {
        [
            text(&row["sink"]),
            text(&row["reason"]),
            match row["device"].as_str() {
                Some("") | None => "-".into(),
                Some(spool::SEVERAL) => "(several)".into(),
                Some(device) => device.to_owned(),
            },
            number(&row["records"]).to_string(),
            shown::bytes(number(&row["bytes"])),
            at(&row["first_ms"]),
            at(&row["last_ms"]),
            match number(&row["seq_last"]) {
                0 => "-".into(),
                last => format!("{}/{}-{last}", number(&row["epoch"]), number(&row["seq_first"])),
            },
        ]
    });
    let header = ["QUEUE", "REASON", "DEVICE", "MESSAGES", "BYTES", "FIRST", "LAST", "IDS WITHIN"];
    context.print(&shown::table(header, lines))
}

fn drop_sink(context: &Context, config: &Config, name: &str, sure: bool) -> Result<(), Failure> {
    let client = client(config)?;
    let found = sinks(client.as_ref(), &config.gateway.data_dir)?;
    let Some(sink) = found.sinks.iter().find(|sink| sink["name"] == name) else {
        let names: Vec<String> = found.sinks.iter().map(|sink| text(&sink["name"])).collect();
        let help = if names.is_empty() { "there are none".into() } else { format!("there are {}", names.join(", ")) };
        return Err(Failure::input(format!("no queue is called `{name}`")).help(help));
    };
    if !sure {
        let waiting = number(&sink["queued_records"]);
        let size = shown::bytes(number(&sink["queued_bytes"]));
        return Err(Failure::usage(format!(
            "this would throw away {waiting} messages ({size}) that devices were told are safe"
        ))
        .help("add --yes to do it"));
    }
    let dropped = match &client {
        Some(client) if found.live => {
            number(&client.delete(&format!("/spool/{name}")).map_err(Failure::from)?["dropped"])
        }
        _ => {
            let configured = config.forward.iter().map(crate::upstream::ForwardConfig::sink).collect();
            let spool = Spool::open(&config.gateway.data_dir, config.spool.clone(), configured)
                .map_err(|error| failure(&error))?;
            let dropped = spool.drop_sink(name).map_err(|error| failure(&error));
            spool.close();
            dropped?
        }
    };
    if context.json {
        return context.print_json(&json!({ "dropped": dropped }));
    }
    context.print(&format!("{dropped} messages dropped from {name}; `tidegate spool ledger` has the entry\n"))
}

fn failure(error: &spool::Error) -> Failure {
    if error.can_retry() { Failure::unavailable(error.to_string()) } else { Failure::input(error.to_string()) }
}

const BETWEEN_LOOKS: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_estimated_from_two_looks() {
        let before = [json!({ "name": "a", "queued_records": 100 }), json!({ "name": "b", "queued_records": 5 })];
        let after = [json!({ "name": "a", "queued_records": 90 }), json!({ "name": "b", "queued_records": 6 })];
        assert_eq!(estimates(&before, &after), [("a".into(), Some(9)), ("b".into(), None)]);
        assert_eq!(estimates(&before, &[json!({ "name": "a", "queued_records": 0 })]), []);
    }
}

//! `tidegate top`: the running gateway, live: rates, queues, the busiest sessions.

use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::admin_client::AdminClient;
use super::status::{items, now_ms, number, page, text};
use super::{Context, Failure, shown};

#[derive(Debug, Args)]
pub struct Arguments {
    /// Seconds between two looks.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// End after this many looks; without it at Ctrl-C.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
}

pub fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let client = AdminClient::find(context)?;
    let is_live = std::io::stdout().is_terminal() && !context.json;
    let mut before = look(&client)?;
    let mut left = arguments.count;
    loop {
        std::thread::sleep(Duration::from_secs(arguments.interval));
        let now = look(&client)?;
        let rates = Rates::between(&before.sessions, &now.sessions, arguments.interval);
        if context.json {
            // One line a look, for programs that read lines.
            context.print(&format!("{}\n", json!({ "status": now.status, "sessions": rates.busiest })))?;
        } else {
            // Home and clear: the whole picture is drawn anew.
            let clear = if is_live { "\x1b[H\x1b[2J" } else { "" };
            context.print(&format!("{clear}{}\n{}", page(&now.status, now_ms()), rates.table()))?;
        }
        before = now;
        left = left.map(|left| left - 1);
        if left == Some(0) {
            return Ok(());
        }
    }
}

struct Look {
    status: Value,
    sessions: Vec<Value>,
}

fn look(client: &AdminClient) -> Result<Look, Failure> {
    let status = client.get("/status").map_err(Failure::from)?;
    let sessions = client.get("/sessions").map_err(Failure::from)?;
    Ok(Look { status, sessions: items(&sessions).to_vec() })
}

/// What sessions did between two looks.
struct Rates {
    received: f64,
    delivered: f64,
    refused: f64,
    /// The sessions with the most messages, each with its rates.
    busiest: Vec<Value>,
}

const SHOWN: usize = 15;
const COUNTERS: [&str; 3] = ["received", "delivered", "refused"];

impl Rates {
    fn between(before: &[Value], now: &[Value], secs: u64) -> Rates {
        let known: HashMap<u64, &Value> = before.iter().map(|session| (number(&session["id"]), session)).collect();
        let per_second = |session: &Value, counter: &str| {
            let was = known.get(&number(&session["id"])).map_or(0, |old| number(&old[counter]));
            number(&session[counter]).saturating_sub(was) as f64 / secs as f64
        };
        let mut sum = [0.0; 3];
        let mut sessions: Vec<(f64, Value)> = Vec::new();
        for session in now {
            let rates = COUNTERS.map(|counter| per_second(session, counter));
            for (sum, rate) in sum.iter_mut().zip(rates) {
                *sum += rate;
            }
            let [received, delivered, refused] = rates;
            let row = json!({
                "id": session["id"], "device": session["device"], "protocol": session["protocol"], "address": session["address"],
                "received_per_second": received, "delivered_per_second": delivered, "refused_per_second": refused,
            });
            sessions.push((rates.iter().sum(), row));
        }
        sessions.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        let busiest = sessions.into_iter().take(SHOWN).map(|(_, row)| row).collect();
        let [received, delivered, refused] = sum;
        Rates { received, delivered, refused, busiest }
    }

    fn table(&self) -> String {
        let rate = |value: &Value| format!("{:.1}", value.as_f64().unwrap_or(0.0));
        let rows = self.busiest.iter().map(|session| {
            [
                text(&session["device"]),
                text(&session["protocol"]),
                text(&session["address"]),
                rate(&session["received_per_second"]),
                rate(&session["delivered_per_second"]),
                rate(&session["refused_per_second"]),
            ]
        });
        let sessions = shown::table(["DEVICE", "PROTOCOL", "ADDRESS", "IN/S", "OUT/S", "REFUSED/S"], rows);
        let Rates { received, delivered, refused, .. } = self;
        format!("messages: {received:.1}/s in, {delivered:.1}/s out, {refused:.1}/s refused\n\n{sessions}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busiest_session_comes_first_and_new_ones_count_from_zero() {
        let session = |id: u64, device: &str, received: u64| json!({ "id": id, "device": device, "protocol": "mqtt", "address": "-", "received": received, "delivered": 0, "refused": 1 });
        let rates = Rates::between(&[session(1, "a", 10)], &[session(1, "a", 12), session(2, "b", 8)], 2);
        assert_eq!(rates.busiest[0]["device"], "b");
        assert_eq!((rates.received, rates.refused), (5.0, 0.5));
        assert!(rates.table().starts_with("messages: 5.0/s in, 0.0/s out, 0.5/s refused"), "{}", rates.table());
    }

    #[test]
    fn nobody_connected_is_an_empty_table() {
        assert!(Rates::between(&[], &[], 1).table().contains("DEVICE"));
    }
}

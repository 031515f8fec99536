//! `tidegate status`: the running gateway in one page.

use serde_json::Value;

use super::admin_client::AdminClient;
use super::{Context, Failure, shown};

pub fn run(context: &Context) -> Result<(), Failure> {
    let client = AdminClient::find(context)?;
    let status = client.get("/status")?;
    if context.json {
        return context.print_json(&status);
    }
    context.print(&page(&status, now_ms()))
}

pub fn page(status: &Value, now_ms: u64) -> String {
    let ready = if status["ready"] == true { "ready" } else { "NOT READY" };
    let gateway = text(&status["gateway_id"]);
    let up = shown::duration(number(&status["uptime_secs"]));
    let mut page = format!(
        "{}  {ready}, up {up}, start {}, version {}\ngateway id {gateway}\n",
        text(&status["name"]),
        number(&status["epoch"]),
        text(&status["version"]),
    );
    for check in items(&status["checks"]).iter().filter(|check| check["ok"] != true) {
        page.push_str(&format!("failing: {}: {}\n", text(&check["name"]), text(&check["detail"])));
    }
    let sessions = &status["sessions"];
    let by_protocol: Vec<String> = sessions["by_protocol"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(protocol, count)| format!("{protocol} {}", number(count)))
        .collect();
    let by_protocol = if by_protocol.is_empty() { String::new() } else { format!(" ({})", by_protocol.join(", ")) };
    page.push_str(&format!(
        "sessions {}{by_protocol}, {} away, {} subscriptions, {} last values ({})\n",
        number(&sessions["live"]),
        number(&sessions["parked"]),
        number(&status["subscriptions"]),
        number(&status["retained"]["messages"]),
        shown::bytes(number(&status["retained"]["bytes"])),
    ));
    let listeners = items(&status["listeners"]);
    let listeners = listeners.iter().map(|l| [text(&l["name"]), text(&l["address"]), text(&l["transport"])]);
    page.push_str(&format!("\n{}", shown::table(["LISTENER", "ADDRESS", "TRANSPORT"], listeners)));
    page.push_str(&format!("\n{}", upstreams(&status["upstreams"])));
    page.push_str(&format!("\n{}", queues(items(&status["spool"]), now_ms)));
    page
}

fn upstreams(upstreams: &Value) -> String {
    let endpoints = items(upstreams).iter().flat_map(|upstream| {
        items(&upstream["endpoints"]).iter().map(|endpoint| {
            let named = |value: &Value| text(value);
            [named(&upstream["name"]), named(&upstream["kind"]), named(&endpoint["url"]), named(&endpoint["state"])]
        })
    });
    let endpoints: Vec<_> = endpoints.collect();
    if endpoints.is_empty() {
        return "no upstream\n".into();
    }
    shown::table(["UPSTREAM", "KIND", "ENDPOINT", "STATE"], endpoints)
}

/// The queues, of `status` and of `spool show`.
pub fn queues(sinks: &[Value], now_ms: u64) -> String {
    if sinks.is_empty() {
        return "no queue: nothing is forwarded\n".into();
    }
    let rows = sinks.iter().map(|sink| {
        let oldest = sink["oldest_ms"].as_u64().filter(|_| number(&sink["queued_records"]) > 0);
        [
            text(&sink["name"]),
            text(&sink["state"]),
            number(&sink["queued_records"]).to_string(),
            shown::bytes(number(&sink["queued_bytes"])),
            oldest.map_or("-".into(), |oldest| shown::duration(now_ms.saturating_sub(oldest) / 1000)),
            number(&sink["delivered"]).to_string(),
            number(&sink["dropped"]).to_string(),
        ]
    });
    shown::table(["QUEUE", "STATE", "WAITING", "BYTES", "OLDEST", "DELIVERED", "LOST"], rows)
}

pub fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or("-").to_owned()
}

pub fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

pub fn now_ms() -> u64 {
    crate::gateway::wall_ms()
}

#[cfg(test)]
mod tests {
    use super::*;

    use serde_json::json;

    #[test]
    fn a_page_says_what_fails_and_what_waits() {
        let status = json!({
            "name": "north", "version": "0.1.0", "gateway_id": "ab", "epoch": 3, "uptime_secs": 65, "ready": false,
            "checks": [{ "name": "disk", "ok": false, "detail": "full" }, { "name": "listeners", "ok": true, "detail": "2" }],
            "listeners": [{ "name": "plain", "address": "127.0.0.1:1883", "transport": "tcp" }],
            "sessions": { "live": 2, "parked": 1, "by_protocol": { "mqtt": 2 } },
            "upstreams": [{ "name": "cloud", "kind": "http", "endpoints": [{ "url": "http://x", "state": "unhealthy" }] }],
            "spool": [{ "name": "telemetry", "state": "behind", "queued_records": 7, "queued_bytes": 2048,
                        "oldest_ms": 1_000, "appended": 9, "delivered": 2, "dropped": 0 }],
        });
        let page = page(&status, 61_000);
        for part in [
            "north  NOT READY, up 1 min 5 s, start 3",
            "failing: disk: full\n",
            "sessions 2 (mqtt 2), 1 away",
            "unhealthy",
            "1 min",
            "2.0 KiB",
        ] {
            assert!(page.contains(part), "{part} in\n{page}");
        }
        assert!(!page.contains("failing: listeners"));
    }

    #[test]
    fn an_answer_of_another_version_still_makes_a_page() {
        assert!(page(&json!({}), 0).contains("NOT READY"));
    }
}

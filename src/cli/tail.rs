//! `tidegate tail FILTER`: messages as they pass, until Ctrl-C.

use clap::Args;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use super::admin_client::AdminClient;
use super::status::{number, text};
use super::{Context, Failure};

#[derive(Debug, Args)]
pub struct Arguments {
    /// A topic filter, such as 'dev/+/telemetry/#'; in quotes, for the shell's sake.
    #[arg(default_value = "#")]
    filter: String,
    /// End after this many messages.
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

pub fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let client = AdminClient::find(context)?;
    let path = format!("/tail?filter={}", percent_encoded(&arguments.filter));
    let mut left = arguments.count;
    client.follow(&path, |line| {
        let Some(data) = line.strip_prefix("data: ") else { return Ok(true) };
        let message: Value = serde_json::from_str(data).unwrap_or_default();
        let shown = if context.json { data.to_owned() } else { one_line(&message) };
        context.print(&format!("{shown}\n"))?;
        left = left.map(|left| left.saturating_sub(1));
        Ok(left != Some(0))
    })?;
    if left == Some(0) {
        return Ok(());
    }
    Err(Failure::unavailable("the gateway ended the stream")
        .help("it stops or was stopped; `tidegate status` says more"))
}

/// Time of day in UTC, protocol, topic, payload. What a device wrote does not control the terminal.
fn one_line(message: &Value) -> String {
    let secs = number(&message["time_ms"]) / 1000 % 86_400;
    let time = format!("{:02}:{:02}:{:02}", secs / 3_600, secs / 60 % 60, secs % 60);
    let payload = match &message["payload"] {
        Value::String(text) => text.clone(),
        binary => format!("({} bytes, not text)", number(&binary["bytes"])),
    };
    let line = format!("{time} {:<4} {} {payload}", text(&message["protocol"]), text(&message["topic"]));
    line.chars().map(|c| if c.is_control() { '\u{b7}' } else { c }).collect()
}

fn percent_encoded(text: &str) -> String {
    const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');
    utf8_percent_encode(text, ENCODED).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    use serde_json::json;

    #[test]
    fn a_payload_cannot_write_to_the_terminal() {
        let message =
            json!({ "time_ms": 3_661_000, "protocol": "mqtt", "topic": "dev/a/telemetry", "payload": "a\u{1b}[2Jb" });
        assert_eq!(one_line(&message), "01:01:01 mqtt dev/a/telemetry a\u{b7}[2Jb");
        let binary = json!({ "time_ms": 0, "protocol": "coap", "topic": "x", "payload": { "bytes": 3 } });
        assert_eq!(one_line(&binary), "00:00:00 coap x (3 bytes, not text)");
    }

    #[test]
    fn a_filter_survives_the_query() {
        assert_eq!(percent_encoded("dev/+/a b#"), "dev/%2B/a%20b%23");
    }
}

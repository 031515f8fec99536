//! What the demo shows: on a terminal one block that is drawn over, otherwise a line every five seconds.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::{ADMIN_TOKEN, Introduction, Summary};
use crate::spool::SinkStats;

/// One look at everything.
pub struct Standing {
    pub elapsed: Duration,
    pub uplink: bool,
    pub books: Summary,
    pub sinks: Vec<SinkStats>,
    pub sessions: usize,
    pub requests: u64,
    pub at_broker: u64,
    pub commands: u64,
}

pub struct Screen {
    terminal: bool,
    color: bool,
    json: bool,
    /// Lines of the block now on the terminal.
    drawn: AtomicUsize,
    /// The five-second step last written.
    step: AtomicU64,
}

impl Screen {
    pub fn new(json: bool) -> Self {
        let terminal = std::io::stdout().is_terminal() && !json;
        let color = terminal && std::env::var_os("NO_COLOR").is_none();
        Screen { terminal, color, json, drawn: AtomicUsize::new(0), step: AtomicU64::new(u64::MAX) }
    }

    /// How to join in.
    pub fn introduce(&self, to: &Introduction<'_>) {
        if self.json {
            return;
        }
        let program = std::env::current_exe().map_or_else(|_| "tidegate".into(), |path| path.display().to_string());
        let config = shell_word(&to.folder.join("tidegate.toml"));
        let key = shell_word(&to.folder.join("guest.key"));
        let (host, port) = (to.tcp.ip(), to.tcp.port());
        self.write(&format!(
            "tidegate demo: 8 sensors over MQTT 3.1.1, MQTT 5, HTTP and CoAP, an HTTP backend and an MQTT broker as the cloud.\n\n\
             Dashboard   http://{admin}/   token {ADMIN_TOKEN}\n\n\
             Join in as the device `guest` from another terminal:\n\n\
             # watch everything the sensors say\n\
             mosquitto_sub -h {host} -p {port} -i guest/watch -u guest -P \"$({program} --config {config} device token guest --key {key})\" -t 'dev/+/telemetry/#' -v\n\n\
             # publish over MQTT\n\
             mosquitto_pub -h {host} -p {port} -i guest/say -u guest -P \"$({program} --config {config} device token guest --key {key})\" -t t/hello -m hi -q 1\n\n\
             # publish over HTTP, read it back\n\
             TOKEN=$({program} device login guest --key {key} --url http://{tcp})\n\
             curl -i -H \"Authorization: Bearer $TOKEN\" -d hi http://{tcp}/telemetry/hello\n\
             curl -i -H \"Authorization: Bearer $TOKEN\" http://{tcp}/topics/dev/guest/telemetry/hello\n\n\
             # publish over CoAP\n\
             TOKEN=$({program} device login guest --key {key} --url coap://{udp})\n\
             coap-client-notls -m post -e hi \"coap://{udp}/t/hello?t=$TOKEN\"\n\n\
             Ctrl-C ends the demo.\n\n",
            admin = to.admin,
            tcp = to.tcp,
            udp = to.udp,
        ));
    }

    /// Says what just happened.
    pub fn note(&self, text: &str) {
        if self.json {
            return;
        }
        self.erase();
        self.write(&format!("{}\n", self.paint("1", text)));
    }

    pub fn show(&self, standing: &Standing) {
        if self.json {
            return;
        }
        let uplink = if standing.uplink { self.paint("32", "up") } else { self.paint("31", "DOWN") };
        let queued: u64 = standing.sinks.iter().map(|sink| sink.queued_records).sum();
        let books = &standing.books;
        if !self.terminal {
            let step = standing.elapsed.as_secs() / 5;
            if self.step.swap(step, Ordering::Relaxed) != step {
                self.write(&format!(
                    "{:>4} s  uplink {uplink}  sessions {}  sent {}  acknowledged {}  delivered {}  queued {queued}\n",
                    standing.elapsed.as_secs(),
                    standing.sessions,
                    books.sent,
                    books.acknowledged,
                    books.delivered,
                ));
            }
            return;
        }
        let mut lines = vec![
            format!("{:>5} s   uplink {uplink}   sessions {}", standing.elapsed.as_secs(), standing.sessions),
            format!(
                "        readings   sent {}   acknowledged {}   delivered {}   in {} requests",
                books.sent, books.acknowledged, books.delivered, standing.requests
            ),
            format!(
                "        commands   answered {}   messages at the broker {}",
                standing.commands, standing.at_broker
            ),
        ];
        for sink in &standing.sinks {
            let bar = "#".repeat(usize::try_from(sink.queued_records / 5).unwrap_or(0).min(40));
            lines.push(format!(
                "        queue {:<10} {:>6} waiting  {}",
                sink.name,
                sink.queued_records,
                self.paint("36", &bar)
            ));
        }
        self.erase();
        self.drawn.store(lines.len(), Ordering::Relaxed);
        self.write(&format!("{}\n", lines.join("\n")));
    }

    /// The books.
    pub fn conclude(&self, summary: &Summary) {
        if self.json {
            self.write(&format!("{}\n", serde_json::json!(summary)));
            return;
        }
        let lost = if summary.lost == 0 { self.paint("32", "0") } else { self.paint("31", &summary.lost.to_string()) };
        self.write(&format!(
            "\nsent {}, acknowledged {}, delivered {}, lost {lost}, duplicates {}\n",
            summary.sent, summary.acknowledged, summary.delivered, summary.duplicates
        ));
    }

    fn erase(&self) {
        let lines = self.drawn.swap(0, Ordering::Relaxed);
        if lines > 0 {
            self.write(&format!("\x1b[{lines}A\x1b[J"));
        }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// A closed pipe is no reason to fail.
    fn write(&self, text: &str) {
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}

fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

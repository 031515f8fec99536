//! One line per HTTP request, and per CoAP request that was admitted along a route, written by a thread of its own: a slow disk or a full pipe never holds a worker up. Lines that find the queue full are
//! dropped and counted.
//!
//! Text, in fixed columns, `-` for what there is not:
//! ```text
//! TIME PEER DEVICE "METHOD HOST TARGET VERSION" STATUS BYTES TOTAL_MS ROUTE ENDPOINT UPSTREAM_MS REQUEST_ID CACHE
//! ```
//! or, with `log_format = "json"`, one object with the same names. BYTES is the answer's body as sent, TOTAL_MS the time until its last byte
//! was handed to the connection, UPSTREAM_MS that until the upstream's answer began. A file that was moved away is opened anew within a second or so.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use metrics::{Counter, counter};
use serde_json::{Map, Value};

use super::{ACCESS_LOG_DROPPED_TOTAL, Config, LogFormat};
use crate::message::DeviceId;
use crate::units::rfc3339;

/// See the module's documentation. Dropping the last one writes what waits.
#[derive(Debug)]
pub struct AccessLog {
    lines: Option<SyncSender<String>>,
    writer: Option<JoinHandle<()>>,
    format: LogFormat,
    dropped: Counter,
}

/// What one line says.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Milliseconds since 1970, of the request.
    pub time_ms: u64,
    pub peer: IpAddr,
    pub device: Option<DeviceId>,
    pub method: http::Method,
    /// HTTP/1.1, HTTP/2.0 or CoAP.
    pub version: &'static str,
    pub host: Option<String>,
    /// Path and query, as they came.
    pub target: String,
    pub status: u16,
    pub route: Option<Arc<str>>,
    pub endpoint: Option<Arc<str>>,
    pub upstream: Option<Duration>,
    pub request_id: Option<String>,
    /// What the route's cache did: hit, stale, revalidated, shared, miss, bypass.
    pub cache: Option<&'static str>,
}

/// A line that waits for the end of its answer.
#[derive(Debug)]
pub struct Pending {
    log: Arc<AccessLog>,
    began: Instant,
    pub entry: Entry,
}

impl AccessLog {
    /// Opens the destination that the configuration names; `None` if there is to be no log.
    ///
    /// # Errors
    /// The file cannot be opened, or the thread not be started.
    pub fn open(config: &Config) -> io::Result<Option<Arc<AccessLog>>> {
        let out = match config.access_log.as_str() {
            "off" => return Ok(None),
            "stdout" => Out::Stdout(io::stdout()),
            path => Out::open(Path::new(path))?,
        };
        let (lines, queue) = sync_channel(config.access_log_lines_max as usize);
        let dropped = counter!(ACCESS_LOG_DROPPED_TOTAL);
        let lost = dropped.clone();
        let writer =
            std::thread::Builder::new().name("tidegate-access".into()).spawn(move || write_all(&queue, out, &lost))?;
        Ok(Some(Arc::new(AccessLog { lines: Some(lines), writer: Some(writer), format: config.log_format, dropped })))
    }

    /// Notes a request; the line is written with [`Pending::write`].
    pub fn note(self: &Arc<Self>, entry: Entry, began: Instant) -> Pending {
        Pending { log: self.clone(), began, entry }
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        drop(self.lines.take());
        if let Some(writer) = self.writer.take() {
            // A writer that panicked has nothing more to write.
            let _ = writer.join();
        }
    }
}

impl Pending {
    /// Hands the line over. Never waits.
    pub fn write(self, body_bytes: u64) {
        let total = self.began.elapsed();
        let line = match self.log.format {
            LogFormat::Text => self.entry.text(body_bytes, total),
            LogFormat::Json => self.entry.json(body_bytes, total),
        };
        if self.log.lines.as_ref().is_none_or(|lines| lines.try_send(line).is_err()) {
            self.log.dropped.increment(1);
        }
    }
}

impl Entry {
    fn text(&self, bytes: u64, total: Duration) -> String {
        let mut line = String::with_capacity(192);
        let device = self.device.as_ref().map_or("-", |device| device.as_str());
        // Writing to a String cannot fail.
        let _ = write!(line, "{} {} {device} \"{} ", rfc3339(self.time_ms), self.peer, self.method);
        escape(&mut line, self.host.as_deref().unwrap_or("-"));
        line.push(' ');
        escape(&mut line, &self.target);
        let _ = write!(line, " {}\" {} {bytes} {:.3} ", self.version, self.status, millis(total));
        line.push_str(self.route.as_deref().unwrap_or("-"));
        line.push(' ');
        line.push_str(self.endpoint.as_deref().unwrap_or("-"));
        let _ = match self.upstream {
            Some(took) => write!(line, " {:.3} ", millis(took)),
            None => write!(line, " - "),
        };
        escape(&mut line, self.request_id.as_deref().unwrap_or("-"));
        line.push(' ');
        line.push_str(self.cache.unwrap_or("-"));
        line.push('\n');
        line
    }

    fn json(&self, bytes: u64, total: Duration) -> String {
        let mut object = Map::new();
        let mut put = |name: &str, value: Value| {
            if !value.is_null() {
                object.insert(name.to_owned(), value);
            }
        };
        put("time", rfc3339(self.time_ms).into());
        put("peer", self.peer.to_string().into());
        put("device", self.device.as_ref().map(|device| device.as_str()).into());
        put("method", self.method.as_str().into());
        put("host", self.host.as_deref().into());
        put("target", self.target.as_str().into());
        put("version", self.version.into());
        put("status", self.status.into());
        put("bytes", bytes.into());
        put("total_ms", millis(total).into());
        put("route", self.route.as_deref().into());
        put("endpoint", self.endpoint.as_deref().into());
        put("upstream_ms", self.upstream.map(millis).into());
        put("request_id", self.request_id.as_deref().into());
        put("cache", self.cache.into());
        let mut line = Value::Object(object).to_string();
        line.push('\n');
        line
    }
}

/// To a microsecond.
fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// A client's text cannot end a line, a column or a quotation.
fn escape(line: &mut String, text: &str) {
    for c in text.chars() {
        if c.is_control() || c.is_whitespace() || matches!(c, '"' | '\\') {
            let _ = write!(line, "\\x{:02x}", u32::from(c));
        } else {
            line.push(c);
        }
    }
}

enum Out {
    Stdout(io::Stdout),
    File { file: BufWriter<File>, path: PathBuf, inode: u64, checked: Instant },
}

impl Out {
    fn open(path: &Path) -> io::Result<Self> {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(named)?;
        let inode = file.metadata().map_err(named)?.ino();
        Ok(Out::File { file: BufWriter::new(file), path: path.to_owned(), inode, checked: Instant::now() })
    }

    fn write(&mut self, line: &str) -> io::Result<()> {
        match self {
            Out::Stdout(out) => out.lock().write_all(line.as_bytes()),
            Out::File { file, .. } => file.write_all(line.as_bytes()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Out::Stdout(out) => out.lock().flush(),
            Out::File { file, .. } => file.flush(),
        }
    }

    /// Follows a file that logrotate has moved away.
    fn follow(&mut self) {
        const EVERY: Duration = Duration::from_secs(1);
        let Out::File { path, inode, checked, .. } = self else { return };
        if checked.elapsed() < EVERY {
            return;
        }
        *checked = Instant::now();
        if std::fs::metadata(&*path).is_ok_and(|there| there.ino() == *inode) {
            return;
        }
        // Without the right to make a new one, the old one goes on being written.
        if let Ok(new) = Out::open(&path.clone()) {
            *self = new;
        }
    }
}

fn write_all(queue: &Receiver<String>, mut out: Out, dropped: &Counter) {
    let mut failing = false;
    while let Ok(first) = queue.recv() {
        out.follow();
        let mut written: io::Result<()> = Ok(());
        let mut lines = 0_u64;
        for line in std::iter::once(first).chain(queue.try_iter().take(LINES_PER_FLUSH)) {
            lines += 1;
            written = written.and_then(|()| out.write(&line));
        }
        match written.and_then(|()| out.flush()) {
            Ok(()) => failing = false,
            Err(error) => {
                dropped.increment(lines);
                if !std::mem::replace(&mut failing, true) {
                    tracing::error!(%error, "access log cannot be written; lines are dropped until it can");
                }
            }
        }
    }
}

const LINES_PER_FLUSH: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(target: &str) -> Entry {
        Entry {
            time_ms: 1_795_132_800_123,
            peer: IpAddr::from([192, 0, 2, 1]),
            device: DeviceId::parse("d1").ok(),
            method: http::Method::GET,
            version: "HTTP/1.1",
            host: Some("example.org".into()),
            target: target.into(),
            status: 200,
            route: Some("api".into()),
            endpoint: Some("http://127.0.0.1:3001".into()),
            upstream: Some(Duration::from_micros(1234)),
            request_id: Some("r1".into()),
            cache: Some("hit"),
        }
    }

    #[test]
    fn a_line_has_its_columns_whatever_a_client_sends() {
        let line = entry("/a?x=\"\u{7f}\n b\\").text(5, Duration::from_millis(2));
        let expected = "2026-11-20T00:00:00.123Z 192.0.2.1 d1 \"GET example.org /a?x=\\x22\\x7f\\x0a\\x20b\\x5c HTTP/1.1\" \
                        200 5 2.000 api http://127.0.0.1:3001 1.234 r1 hit\n";
        assert_eq!(line, expected);
        let bare = Entry {
            device: None,
            host: None,
            route: None,
            endpoint: None,
            upstream: None,
            request_id: None,
            cache: None,
            ..entry("/")
        };
        let line = bare.text(0, Duration::ZERO);
        assert_eq!(line, "2026-11-20T00:00:00.123Z 192.0.2.1 - \"GET - / HTTP/1.1\" 200 0 0.000 - - - - -\n");
    }

    #[test]
    fn json_has_one_object_a_line() {
        let line = entry("/a\n").json(5, Duration::from_millis(2));
        assert_eq!(line.matches('\n').count(), 1);
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            (&value["target"], &value["status"], &value["upstream_ms"]),
            (&"/a\n".into(), &200.into(), &1.234.into())
        );
    }

    #[test]
    fn a_file_takes_every_line_before_the_log_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("access.log");
        let config = Config { access_log: path.to_str().unwrap().into(), ..Config::default() };
        let log = AccessLog::open(&config).unwrap().unwrap();
        for n in 0..100 {
            log.note(entry(&format!("/{n}")), Instant::now()).write(n);
        }
        drop(log);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 100);
        assert!(text.lines().last().unwrap().contains("/99"));
        assert!(AccessLog::open(&Config::default()).unwrap().is_none());
        let missing = Config { access_log: "/nonexistent/x/access.log".into(), ..Config::default() };
        assert!(AccessLog::open(&missing).unwrap_err().to_string().contains("/nonexistent/x"));
    }
}

//! A server process: started on its own core, measured through `/proc`, ended.

use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Failure, Result};

/// Where servers run; the load comes from the other core.
pub const SERVER_CORE: usize = 0;
pub const LOAD_CORE: usize = 1;

/// How long a server may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// How long it may take to end before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// A process of ours with its children. Dropping it ends it.
pub struct Process {
    child: Child,
    program: String,
}

impl Process {
    /// Starts `program` pinned to `core` if that is possible; what it says goes to `log`.
    pub fn start(program: &str, arguments: &[&str], core: usize, log: &Path) -> Result<Self> {
        let output = File::create(log)?;
        let errors = output.try_clone()?;
        let mut command = if can_pin() {
            let mut command = Command::new("taskset");
            command.args(["-c", &core.to_string(), program]);
            command
        } else {
            Command::new(program)
        };
        let child = command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .process_group(0)
            .spawn()
            .map_err(|error| Failure::new(format!("cannot start {program}: {error}")))?;
        Ok(Process { child, program: program.to_owned() })
    }

    pub fn wait_for_tcp(&mut self, address: SocketAddr, log: &Path) -> Result<()> {
        self.wait_until(log, || TcpStream::connect(address).is_ok())
    }

    /// Polls `ready`; fails with the log's end if the process dies or the time is over.
    pub fn wait_until(&mut self, log: &Path, mut ready: impl FnMut() -> bool) -> Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        while !ready() {
            if let Some(status) = self.child.try_wait()? {
                return Err(Failure::new(format!("{} ended ({status}):\n{}", self.program, tail(log))));
            }
            if Instant::now() > deadline {
                return Err(Failure::new(format!("{} does not answer:\n{}", self.program, tail(log))));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// CPU time of the process and its children so far, in seconds.
    pub fn cpu_seconds(&self) -> f64 {
        self.tree().into_iter().map(|pid| cpu_nanos(pid) as f64 / 1e9).sum()
    }

    /// Proportional set size in bytes: private memory, and shared memory divided by those who share it.
    pub fn pss_bytes(&self) -> u64 {
        self.rollup("Pss:")
    }

    pub fn rss_bytes(&self) -> u64 {
        self.rollup("Rss:")
    }

    fn rollup(&self, field: &str) -> u64 {
        let of = |pid| {
            let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
            let line = text.lines().find(|line| line.starts_with(field))?;
            Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
        };
        self.tree().into_iter().filter_map(of).sum()
    }

    /// Bytes that the process has made the kernel send to the disk.
    pub fn written_bytes(&self) -> u64 {
        let of = |pid| {
            let text = fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
            text.lines().find_map(|line| line.strip_prefix("write_bytes: ")?.parse::<u64>().ok())
        };
        self.tree().into_iter().filter_map(of).sum()
    }

    /// `kill -9`: no chance to write anything.
    pub fn kill_now(&mut self) {
        for pid in self.tree() {
            kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
        }
        self.child.wait().ok();
    }

    fn stop(&mut self) {
        kill(Pid::from_raw(self.id()), Signal::SIGTERM).ok();
        let deadline = Instant::now() + STOP_TIMEOUT;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
        self.kill_now();
    }

    fn id(&self) -> i32 {
        // A process id always fits: the kernel's maximum is 2^22.
        i32::try_from(self.child.id()).unwrap_or(i32::MAX)
    }

    /// The process and all its descendants.
    fn tree(&self) -> Vec<i32> {
        let mut tree = vec![self.id()];
        let mut at = 0;
        while let Some(pid) = tree.get(at).copied() {
            tree.extend(children(pid));
            at += 1;
        }
        tree
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop();
    }
}

fn children(pid: i32) -> Vec<i32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads
        .filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok())
        .flat_map(|text| text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// The scheduler's own count where the kernel gives it: nanoseconds, summed over the threads alive. Servers here keep their threads. Otherwise
/// user + system time of `/proc/PID/stat`, in ticks of 10 ms.
fn cpu_nanos(pid: i32) -> u64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of =
        |path: &Path| fs::read_to_string(path.join("schedstat")).ok()?.split_whitespace().next()?.parse::<u64>().ok();
    let scheduled: u64 = threads.filter_map(|thread| of(&thread.path())).sum();
    if scheduled > 0 { scheduled } else { stat_ticks(pid).unwrap_or(0) * 10_000_000 }
}

fn stat_ticks(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command may hold spaces and brackets; fields count from behind its last bracket, the 3rd first.
    let (_, fields) = text.rsplit_once(')')?;
    fields.split_whitespace().skip(11).take(4).map(|ticks| ticks.parse::<u64>().ok()).sum()
}

/// Whether servers and load can be kept on cores of their own.
pub fn can_pin() -> bool {
    cores() > LOAD_CORE && is_installed("taskset")
}

/// Cores that this program was started with, before it pinned itself.
pub fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| thread::available_parallelism().map_or(1, usize::from))
}

/// Moves this thread, and the threads it makes from now on, to `core`.
pub fn pin_this_thread(core: usize) {
    if !can_pin() {
        return;
    }
    let Ok(thread) = fs::read_link("/proc/thread-self") else { return };
    let Some(id) = thread.file_name().and_then(|name| name.to_str()) else { return };
    Command::new("taskset").args(["-c", "-p", &core.to_string(), id]).stdout(Stdio::null()).status().ok();
}

/// The full path of a program in PATH or where Debian keeps servers.
pub fn find_program(name: &str) -> Option<String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let folders = path.split(':').chain(["/usr/sbin", "/sbin"]);
    folders.map(|folder| format!("{folder}/{name}")).find(|candidate| Path::new(candidate).is_file())
}

pub fn is_installed(name: &str) -> bool {
    find_program(name).is_some()
}

/// A port of the loopback interface that was free a moment ago, for TCP and for UDP.
pub fn free_address() -> io::Result<SocketAddr> {
    loop {
        let address = std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?;
        if std::net::UdpSocket::bind(address).is_ok() {
            return Ok(address);
        }
    }
}

/// Lets this process and its children open as many sockets as the system allows.
pub fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).ok();
    }
}

fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

//! The README's walk-through, command by command, with the real clients. Only the ports are others, so that it can run beside anything.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::{Running, free_address, said, stdout, wait_until};

/// The commands of one section, continuation lines joined.
fn commands(section: &str) -> Vec<String> {
    let readme = fs::read_to_string(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let (_, rest) = readme.split_once(&format!("\n## {section}\n")).expect("the README has that section");
    let text = rest.split("\n## ").next().unwrap().replace("\\\n", " ");
    let fenced = text.split("```").skip(1).step_by(2);
    fenced.flat_map(str::lines).map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

struct Walk {
    /// What the README calls a terminal is a folder and a search path here.
    folder: PathBuf,
    path: String,
    /// Port in the README, port here.
    ports: Vec<(&'static str, String)>,
    log: PathBuf,
}

impl Walk {
    fn here(&self, text: &str) -> String {
        let text = self.ports.iter().fold(text.to_owned(), |text, (there, here)| text.replace(there, here));
        let debian = !self.path.split(':').any(|folder| Path::new(folder).join("coap-client").exists());
        if debian { text.replace("coap-client ", "coap-client-notls ") } else { text }
    }

    fn shell(&self, line: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", &self.here(line)]).current_dir(&self.folder).env("PATH", &self.path).env("NO_COLOR", "1");
        command.env_remove("TIDEGATE_CONFIG").stdin(Stdio::null());
        command
    }

    /// A command that goes on running.
    fn terminal(&self, line: &str) -> Running {
        let out = fs::OpenOptions::new().create(true).append(true).open(&self.log).unwrap();
        let line = format!("exec {line}");
        Running(self.shell(&line).stdout(out.try_clone().unwrap()).stderr(out).spawn().unwrap())
    }

    fn run(&self, line: &str) -> String {
        let output = self.shell(line).output().unwrap();
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        assert!(output.status.success(), "{line}\n{}\n{log}", said(&output));
        stdout(&output)
    }
}

#[test]
fn a_first_message_arrives_as_the_readme_says() {
    let parent = tempfile::tempdir().unwrap();
    let built = Path::new(env!("CARGO_BIN_EXE_tidegate")).parent().unwrap().display().to_string();
    let ports = ["1883", "8883", "5683", "9883", "3001"].map(|port| (port, free_address().port().to_string()));
    let mut walk = Walk {
        folder: parent.path().to_owned(),
        path: format!("{built}:{}", std::env::var("PATH").unwrap()),
        ports: ports.to_vec(),
        log: parent.path().join("log"),
    };
    let mut terminals = Vec::new();
    let mut ran = Vec::new();
    for line in commands("A first message in five minutes") {
        match line.as_str() {
            line if line.starts_with("cargo build") || line.starts_with("export PATH=") => continue,
            "cd greenhouse" => walk.folder.push("greenhouse"),
            "tidegate run" => {
                let config = walk.folder.join("tidegate.toml");
                let text = fs::read_to_string(&config).unwrap();
                fs::write(&config, walk.here(&text)).unwrap();
                terminals.push(walk.terminal("tidegate run"));
                wait_until("the gateway answers", || walk.shell("tidegate status").output().unwrap().status.success());
            }
            "python3 examples/backend.py" => {
                let waiting = walk.run("tidegate spool show");
                assert!(waiting.lines().any(|line| line.starts_with("telemetry") && line.contains(" 3 ")), "{waiting}");
                let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples/backend.py");
                terminals.push(walk.terminal(&format!("python3 {} 3001", script.display())));
            }
            line => {
                let output = walk.run(line);
                if line.starts_with("curl") {
                    assert!(output.starts_with("HTTP/1.1 202"), "{output}");
                }
                ran.push(line.split(' ').next().unwrap().to_owned());
            }
        }
    }
    for client in ["mosquitto_pub", "curl", "coap-client"] {
        assert!(ran.iter().any(|name| name == client), "the README does not show {client}");
    }
    let arrived = || fs::read_to_string(&walk.log).unwrap().matches("{'celsius': 21.5}").count();
    wait_until("the three messages arrive at the backend", || arrived() >= 3);
    assert_eq!(arrived(), 3, "{}", fs::read_to_string(&walk.log).unwrap());
}

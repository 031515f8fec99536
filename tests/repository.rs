//! The files around the code agree with each other: cross-compilation, CI, licences.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const PI_TARGETS: [&str; 3] =
    ["aarch64-unknown-linux-musl", "armv7-unknown-linux-musleabihf", "arm-unknown-linux-musleabihf"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn cross_toml_pins_an_image_for_every_raspberry_pi() {
    let cross: toml::Table = read("Cross.toml").parse().unwrap();
    assert_eq!(cross.keys().collect::<Vec<_>>(), ["target"], "cross 0.2.5 knows other tables, but we use only this");
    let targets = cross["target"].as_table().unwrap();
    for target in PI_TARGETS {
        assert!(targets.contains_key(target), "{target} is missing");
    }
    for (target, settings) in targets {
        let settings = settings.as_table().unwrap();
        assert_eq!(settings.keys().collect::<Vec<_>>(), ["image"], "`zig` and others are unknown to cross 0.2.5");
        assert_eq!(settings["image"].as_str().unwrap(), format!("ghcr.io/cross-rs/{target}:0.2.5"));
    }
}

#[test]
fn setup_readme_and_cross_toml_name_the_same_targets() {
    for file in ["cross/setup.sh", "cross/README.md"] {
        let text = read(file);
        for target in PI_TARGETS {
            assert!(text.contains(target), "{file} does not name {target}");
        }
    }
}

#[test]
fn every_gate_of_ci_is_run_and_explained() {
    let text = read("ci.sh");
    let defined: BTreeSet<&str> =
        text.lines().filter_map(|l| l.strip_prefix("gate_")?.split_once("() { # ")).map(|(name, _)| name).collect();
    let run = text.lines().find_map(|l| l.strip_prefix("gates=(")?.strip_suffix(')')).unwrap();
    let run: BTreeSet<&str> = run.split(' ').collect();
    assert_eq!(defined, run, "gates that ./ci.sh defines, and those it runs");
    let usage = text.lines().find_map(|l| l.split_once("GATE...          some: ")).unwrap().1;
    assert_eq!(usage.split(' ').collect::<BTreeSet<_>>(), run, "the usage text");
    assert!(read(".ci/run").contains("./ci.sh"));
}

#[test]
fn every_package_names_the_licences_that_the_repository_holds() {
    let manifest: toml::Table = read("Cargo.toml").parse().unwrap();
    assert_eq!(manifest["workspace"]["package"]["license"].as_str(), Some("MIT OR Apache-2.0"));
    assert!(read("LICENSE-APACHE").contains("Apache License"));
    assert!(read("LICENSE-MIT").contains("Permission is hereby granted"));
    for engine in fs::read_dir(root().join("protocols")).unwrap() {
        let manifest = fs::read_to_string(engine.unwrap().path().join("Cargo.toml")).unwrap();
        assert!(manifest.contains("license.workspace = true"), "{manifest}");
    }
}

#[test]
fn every_package_forbids_unsafe_code() {
    let manifest: toml::Table = read("Cargo.toml").parse().unwrap();
    assert_eq!(manifest["workspace"]["lints"]["rust"]["unsafe_code"].as_str(), Some("forbid"));
    let mut manifests = vec![root().join("Cargo.toml"), root().join("benches/Cargo.toml")];
    manifests.extend(fs::read_dir(root().join("protocols")).unwrap().map(|e| e.unwrap().path().join("Cargo.toml")));
    for path in manifests {
        let manifest: toml::Table = fs::read_to_string(&path).unwrap().parse().unwrap();
        assert_eq!(manifest["lints"]["workspace"].as_bool(), Some(true), "{}", path.display());
    }
}

#[test]
fn the_package_installs_what_the_unit_starts() {
    let (unit, deb, postinst) =
        (read("packaging/tidegate.service"), read("packaging/deb.sh"), read("packaging/deb/postinst"));
    assert!(unit.contains("ExecStart=/usr/bin/tidegate run --config /etc/tidegate/tidegate.toml\n"));
    assert!(
        deb.contains("\"$stage/usr/bin/tidegate\"")
            && deb.contains("\"$stage/usr/lib/systemd/system/tidegate.service\"")
    );
    assert!(unit.contains("User=tidegate\n") && unit.contains("StateDirectory=tidegate\n"), "/var/lib/tidegate");
    assert!(postinst.contains("ln -s /var/lib/tidegate /etc/tidegate/data") && postinst.contains("init /etc/tidegate"));
    // What `tidegate init` writes keeps its data there.
    assert!(read("config/tidegate.toml").contains("data_dir = \"data\""));
}
